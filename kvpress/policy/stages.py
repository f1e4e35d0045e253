"""The stages that a policy can replace, and what each of them cannot stand beside."""

from __future__ import annotations

from typing import NamedTuple


class Stage(NamedTuple):
    """A question that one policy answers. not_beside: what must not be replaced with it, and why.

    asked: the method of `Policy` that answers, where it is not the one of this name.
    """

    name: str
    not_beside: tuple[str, ...] = ()
    why: str = ""
    asked: str = ""

    @property
    def method(self) -> str:
        """The method of `Policy` that answers."""
        return self.asked or self.name


_PACKED = (
    "merges into slots, or trims layers later, that it also packs: packed slots are never written"
    " again. Combine prune and pack stages with policies that drop"
)
_DIVIDED = (
    "divides its budget in two ways. Leave one of the two policies out, or the option by which its"
    " rows compete (scope, threshold)"
)
_HELD = (
    "compresses layers only once a prompt has passed all of them, which merging, and budgets by the"
    " demand of layers, do in their own way. Combine it with policies that drop"
)
_FITTED = (
    "fits the slots that stay once a prompt has passed all layers, which merging, budgets by the"
    " demand of layers, and retrieval do not wait for. Combine it with policies that drop"
)
_BOXED = (
    "merges into slots, or trims layers later, whose pages it also judges by their keys: what is in"
    " such a page is never written again. Combine retrieval with policies that drop"
)
STAGES = (
    Stage("sparsify"),
    Stage("allocate", ("compete", "share"), _DIVIDED),
    Stage("compete", ("share", "absorb"), _HELD),
    Stage("share"),
    Stage("probes", ("share", "absorb"), _HELD),
    Stage("observe"),
    Stage("accumulate"),
    Stage("score"),
    Stage("select"),
    Stage("absorb"),
    Stage("refit", ("share", "absorb", "retrieve"), _FITTED, asked="absorb"),
    Stage("prune", ("absorb", "share"), _PACKED),
    Stage("pack", ("absorb", "share"), _PACKED),
    Stage("retrieve", ("absorb", "share"), _BOXED),
)
