"""What probes say in words, and how the tokens of a text are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kvpress.errors import PolicyError
from kvpress.policy.recipe import Recipe


class Wording(NamedTuple):
    """The tokens of what probes say, and the tokenizer where a policy needs one."""

    texts: tuple[tuple[int, ...], ...] = ()
    tokenizer: Any = None

    def words(self, ids: Sequence[int]) -> list[str]:
        """Every token as it is written, with the space before it."""
        written = {}
        for token in set(ids):
            word = self.tokenizer.decode([token])
            raw = self.tokenizer.convert_ids_to_tokens(token) or ""
            # A word alone loses the space that it begins with in some tokenizers.
            spaced = raw[:1] == "\u2581" and word[:1] != " "
            written[token] = f" {word}" if spaced else word
        return [written[token] for token in ids]


def wording(recipe: Recipe, model: Any, tokenizer: Any) -> Wording:
    """What a recipe says and reads.

    tokenizer: None: that of the folder or name that the model was loaded from. Raises PolicyError
    where none can be had.
    """
    policy = recipe.stage("probes")
    texts = policy.texts if recipe.probes else ()
    wanted = any(texts) or (recipe.probes and "words" in policy.needs)
    if not wanted:
        return Wording(((),) * len(texts))
    known = _own_tokenizer(model, recipe) if tokenizer is None else tokenizer
    encoded = (known(x, add_special_tokens=False)["input_ids"] if x else () for x in texts)
    return Wording(tuple(map(tuple, encoded)), known)


def _own_tokenizer(model: Any, recipe: Recipe) -> Any:
    from transformers import AutoTokenizer  # takes a while, and few policies need it

    name = getattr(model.config, "name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise PolicyError(
            f"{recipe} reads a text behind every prompt and needs the tokenizer of the model, which"
            f" {name!r} does not give. Pass it: kvpress.attach(model, policy, tokenizer=tokenizer)."
        ) from error
