"""Planning for a model: what it is in numbers, and what the process holds before a cache."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kvpress.errors import KVPressError, PlanError
from kvpress.formulas.sizes import UNITS, parse_size
from kvpress.hf import learned
from kvpress.hf.fitting import check_fit
from kvpress.hf.foresight import head_of
from kvpress.hf.support import Fingerprint, check_model
from kvpress.hf.tiering import check_tiers
from kvpress.pipe.plan.choose import choose
from kvpress.pipe.plan.demand import Shape, Texts
from kvpress.pipe.plan.fit import Asked
from kvpress.pipe.plan.looking import Looking
from kvpress.pipe.plan.plan import Memory, Plan
from kvpress.policy.ladder import Rung, ladder
from kvpress.policy.layer_counts import check_layers
from kvpress.policy.loading import parse
from kvpress.policy.recipe import Recipe
from kvpress.store.tiers.caps import Caps

_LOG = logging.getLogger("kvpress")
NEW_TOKENS = 256  # decoded tokens that are planned for where nobody says how many
_STATUS = Path("/proc/self/status")
_PROCESS = 512 << 20  # of Python, torch and transformers, where the system does not tell
_PAGE = 1024  # numbers of a weight of which one is read: no page of the system has more


class Wanted(NamedTuple):
    """What `attach` was given that concerns a plan, and the caps, as they were said."""

    memory: str | int | None = None
    length: int | None = None
    batch: int = 1
    new_tokens: int | None = None
    device: str | int | None = None
    host: str | int | None = None
    disk: str | None = None

    def plans(self, policy: Any) -> bool:
        """Whether there is to be a plan. Raises PlanError for what does not go together."""
        texts = {"length": self.length, "new_tokens": self.new_tokens}
        given = [name for name, value in texts.items() if value is not None]
        given += ["batch"] if self.batch != 1 else []
        if self.memory is None and (given or policy is None):
            what = f"{'= and '.join(given)}= say" if given else "attach() without a policy says"
            raise PlanError(
                f"{what} what is to be planned, but there is no memory=. Give a policy, such as"
                ' "name:budget=0.5", or the bytes that all may take, such as memory="8GiB".'
            )
        if self.memory is not None and self.device is not None:
            raise PlanError(
                f"memory={self.memory!r} and device={self.device!r}: what keys and values may take"
                " on the device follows from memory=. Leave one of them out."
            )
        return self.memory is not None

    def caps(self, plan: Plan) -> Caps | None:
        """The caps of a plan; None where everything stays on the device."""
        if not plan.chosen.tiered:
            return None
        return Caps.parse(plan.chosen.device, self.host, self.disk)


def plan_for(
    model: Any, policy: Any, wanted: Wanted, stored: tuple[int, torch.dtype | None]
) -> Plan:
    """The plan of an engine for a model that is there.

    policy: None, for all that the ladder has. stored: slots of a page, dtype of keys and values.
    Raises PlanError, TierError, and what `attach` raises of the model.
    """
    found = check_model(model)
    texts = texts_of(model.config, wanted.length, wanted.batch, wanted.new_tokens)
    memory = memory_of(wanted.memory or 0, wanted.host, wanted.disk)
    rungs, shape = rungs_of(policy), shape_of(model, found, *stored)

    @functools.cache
    def head(recipe: Recipe) -> Looking | None:
        made = head_of(recipe, model, found)
        return None if made is None else Looking.of(made)

    def admits(recipe: Recipe, tiered: bool) -> str:
        return refusal(model, found, recipe, tiered, head)

    asked = Asked(shape, texts, memory._replace(base=resident(model)), admits, head)
    plan = choose(asked, rungs)
    _LOG.info("%s", plan)
    return plan


def rungs_of(policy: Any) -> Sequence[Rung]:
    """What is tried: a policy that was asked for, on the device and in tiers; else the ladder."""
    if policy is None:
        return ladder()
    spec = str(parse(policy))
    return Rung("given", spec), Rung("given", spec, True)


def memory_of(memory: str | int, host: str | int | None, disk: str | None) -> Memory:
    """Sizes in bytes. Raises PlanError, TierError."""
    whole = isinstance(memory, int) and not isinstance(memory, bool)
    size = memory if isinstance(memory, int) and whole else parse_size(str(memory))
    if size is None or size <= 0:
        raise PlanError(
            f"memory={memory!r} is no size. Allowed: a number of bytes, or one with a unit"
            f" ({', '.join(UNITS)}, in any case), as in 8GiB."
        )
    caps = Caps.parse(0, host, disk)
    assert caps is not None, "there is a device"
    return Memory(size, 0, caps.host, caps.disk.bytes if caps.disk else 0)


def texts_of(config: Any, length: int | None, batch: int, new: int | None) -> Texts:
    """The texts that are planned for; the longest that the model takes. Raises PlanError."""
    text = config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None)
    if length is None and longest is None:
        raise PlanError(
            "memory= without length=: this model does not say how long its texts may be. Give"
            " length=, the tokens of a sequence, decoded ones included."
        )
    for name, number in (("length", length), ("batch", batch), ("new_tokens", new)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise PlanError(f"{name}={number!r} must be a whole number of at least 1.")
    tokens = int(length or longest or 0)
    decoded = min(NEW_TOKENS, tokens // 2) if new is None else new
    if tokens < 2 or decoded >= tokens:
        raise PlanError(
            f"length={tokens} counts all tokens of a sequence, new_tokens={decoded} of them: leave"
            " at least one to the prompt."
        )
    return Texts(batch, tokens, decoded)


def shape_of(model: Any, found: Fingerprint, page_slots: int, stored: torch.dtype | None) -> Shape:
    """The model in numbers; those that its config does not have as they usually are."""
    text = model.config.get_text_config(decoder=True)
    hidden = int(text.hidden_size)
    names = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "moe_intermediate_size")
    inner = [value for name in names if isinstance(value := getattr(text, name, None), int)]
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    return Shape(
        Path(name).name,
        found.kinds,
        hidden,
        max(inner, default=4 * hidden),
        int(text.vocab_size),
        model.dtype,
        stored or model.dtype,
        page_slots,
    )


def refusal(
    model: Any,
    found: Fingerprint,
    recipe: Recipe,
    tiered: bool,
    head: Callable[[Recipe], Looking | None],
) -> str:
    """Why a policy cannot be attached to this model, or not in tiers; "" where it can.

    head: loads that of a policy.
    """
    unplanned = {
        "states of linear attention and convolutions": any(x.count for x in found.states),
        "layers that attend within chunks": any(x.chunk for x in found.states),
        "keys that several layers read": any(kind.readers for kind in found.kinds),
        "what prompts take beside learned sinks": any(kind.sink for kind in found.kinds),
    }
    for what, there in unplanned.items():
        if there:
            return f"{what} are not planned for yet; give the policy and the caps yourself"
    try:
        check_fit(recipe, found.kinds)
        check_layers(recipe, found.kinds)
        if tiered:
            check_tiers(recipe, found)
        head(recipe)
        learned.calibrated(recipe, model, found)
    except KVPressError as error:
        return str(error).partition(". ")[0]
    return ""


def resident(model: Any) -> int:
    """Bytes of the device that are taken before there is a cache, weights among them.

    On a CPU these are what is resident of the process; weights are read once, since those that are
    mapped from a file are there only then. Raises PlanError for a model on several devices.
    """
    devices = {weight.device for weight in model.parameters()}
    if len(devices) != 1:
        raise PlanError(
            f"memory= plans for one device, but the model is on {sorted(map(str, devices))}. Load"
            " it onto one, or give the caps yourself: device=, host=, disk=."
        )
    (device,) = devices
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    for weight in model.parameters():
        weight.detach().view(-1)[::_PAGE].sum()
    return process_bytes() or _PROCESS + weight_bytes(model)


def process_bytes() -> int:
    """Resident bytes of this process; 0: the system does not tell."""
    if not _STATUS.exists():
        return 0
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    found = [line.split()[1] for line in lines if line.startswith("VmRSS:")]
    return int(found[0]) * 1024 if found else 0


def weight_bytes(model: Any) -> int:
    """Bytes of the model's weights."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())
