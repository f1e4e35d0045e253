"""Policies: recipes that replace stages of the pipe. Reading, loading, checking and combining them.

A policy is one file with one frozen dataclass derived from `Policy`: fields made with `option()`
are its hyper-parameters, methods that it overrides are the stages that it replaces. Policies are
stateless and shared freely; what belongs to a sequence lives with its slots in the store.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from kvpress.budget import Budget, Limits
from kvpress.errors import BudgetError, PolicyError, did_you_mean
from kvpress.observe import Observation
from kvpress.select import keep_top
from kvpress.types import Slots, Step

PACKAGE = "kvpress.policies"  # also the entry-point group of third-party policies
_LARGEST = 2**53  # of a whole number in an option: beyond it tensors overflow
STAGES = ("allocate", "observe", "accumulate", "score", "select")


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """A hyper-parameter: its default, its meaning with its unit, and the allowed values."""
    meta = {"help": help, "low": low, "high": high, "choices": tuple(choices or ())}
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Base of all policies. A subclass overrides the methods of the stages that it replaces.

    Common options, read by the engine where a policy declares them: `budget`, `sink`, `recent`
    (tokens), `recent_ratio` (share of the budget), `interval` (decoded tokens between evictions; 0:
    prompts only).
    """

    # True: `accumulate` runs on every prompt chunk and decode step and its result stays with the
    # slots.
    accumulates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):
            value = _coerce(type(self), field, hints[field.name], getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        limits = self.limits
        if limits is not None:
            limits.check()

    def allocate(self, slots: int, layer: int, layers: int, heads: int) -> Sequence[int]:
        """Slots that each KV head of a layer keeps, given the budget of one row.

        Default: all the same.
        """
        return [slots] * heads

    def observe(self, step: Step) -> Observation | None:
        """What must be recorded while attending. Default: nothing."""
        return None

    def accumulate(self, slots: Slots) -> Tensor:
        """The new `mass_BHS` of every slot, kept with it from now on.

        Needs `accumulates = True`.
        """
        raise NotImplementedError

    def score(self, slots: Slots) -> Tensor:
        """How much each slot matters: fp32, any scale, `[B, H, S]`. Larger stays longer."""
        raise NotImplementedError

    def select(
        self, slots: Slots, score_BHS: Tensor, protected_BHS: Tensor, keep_BH: Tensor
    ) -> Tensor:
        """True for the slots that stay, exactly `min(keep, stored)` of each row.

        Default: the protected ones, then the largest scores.
        """
        return keep_top(score_BHS, slots.position_BHS, protected_BHS, keep_BH)

    @property
    def name(self) -> str:
        """The name by which the policy is loaded: that of its module."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def limits(self) -> Limits | None:
        """The budget with its protected tokens; None for a policy without a budget."""
        if not hasattr(self, "budget"):
            return None
        common = [field.name for field in dataclasses.fields(Limits)]
        return Limits(**{name: getattr(self, name) for name in common if hasattr(self, name)})

    def replaces(self) -> set[str]:
        """The stages that this policy replaces."""
        return {s for s in STAGES if getattr(type(self), s) is not getattr(Policy, s)}

    def __str__(self) -> str:
        options = (f"{f.name}={as_text(getattr(self, f.name))}" for f in dataclasses.fields(self))
        text = ",".join(options)
        return f"{self.name}:{text}" if text else self.name


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Policies combined with `+`: at most one for each stage."""

    policies: tuple[Policy, ...]

    def __post_init__(self) -> None:
        owners: dict[str, Policy] = {}
        for policy in self.policies:
            if policy.accumulates and "accumulate" not in policy.replaces():
                raise PolicyError(
                    f"{policy.name!r} says accumulates = True but has no accumulate(). Write it,"
                    " or drop the declaration."
                )
            parts = policy.replaces() | ({"budget"} if policy.limits else set())
            for part in sorted(parts):
                if part in owners:
                    raise PolicyError(
                        f"{owners[part].name!r} and {policy.name!r} both replace the stage"
                        f" {part!r}. Policies combined with '+' must replace different stages: drop"
                        " one of the two."
                    )
                owners[part] = policy
        if self.limits and "score" not in owners and "select" not in owners:
            raise PolicyError(
                f"{self} has a budget but neither scores nor selects. Combine it with a policy that"
                " does."
            )

    def stage(self, name: str) -> Policy:
        """The policy that answers this stage: the one that replaces it, or the default."""
        return next((p for p in self.policies if name in p.replaces()), _DEFAULT)

    @property
    def limits(self) -> Limits | None:
        """The budget of the combination, if one of its policies has one."""
        return next((p.limits for p in self.policies if p.limits), None)

    @property
    def accumulates(self) -> bool:
        """Whether a per-slot mass is kept in the store."""
        return any(p.accumulates for p in self.policies)

    def __str__(self) -> str:
        return "+".join(str(p) for p in self.policies)


def parse(spec: str | Policy | Recipe | Sequence[str | Policy]) -> Recipe:
    """A recipe from `name:key=value,key=value+name…`, a policy, or a list of either.

    Raises PolicyError or BudgetError: unknown names and options list close matches.
    """
    if isinstance(spec, Recipe):
        return spec
    if isinstance(spec, Policy):
        return Recipe((spec,))
    if isinstance(spec, str):
        return Recipe(tuple(_parse_one(part) for part in spec.split("+")))
    if isinstance(spec, Sequence) and spec:
        return Recipe(tuple(policy for part in spec for policy in parse(part).policies))
    raise PolicyError(
        f"policy={spec!r} is not a policy. Give a specification such as 'name:budget=0.5', "
        "a Policy object, or a non-empty list of these."
    )


def load_policy(name: str, **options: Any) -> Policy:
    """A policy by name with its options.

    `name` is looked for in this order: a path ending in .py; `module:attribute`;
    `kvpress.policies.<name>`; entry points of the group `kvpress.policies`. Options may be text, as
    on the command line.
    """
    cls = _find(name)
    known = {field.name for field in dataclasses.fields(cls)}
    for key in options:
        if key not in known:
            raise PolicyError(f"Policy {name!r} has no option {key!r}.{did_you_mean(key, known)}")
    try:
        return cls(**options)
    except BudgetError as error:
        raise BudgetError(f"Policy {name!r}: {error}") from None


def as_text(value: Any) -> str:
    """An option's value as a specification writes it: `none`, `true`, `0.5`."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def available() -> dict[str, type[Policy]]:
    """Every installed policy by name: our own, then those of entry points."""
    names = [m.name for m in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__)]
    names += [e.name for e in _entry_points() if e.name not in names]
    return {name: _find(name) for name in sorted(names)}


def _parse_one(part: str) -> Policy:
    head, colon, tail = part.strip().rpartition(":")
    name, text = (head, tail) if colon and "=" in tail else (part.strip(), "")
    name = name.removesuffix(":")
    if not name:
        raise PolicyError(
            f"The policy specification {part!r} has no name. Write name:key=value,key=value and"
            " join several policies with '+'."
        )
    options: dict[str, str] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals or not key or not value:
            raise PolicyError(f"Option {item!r} of policy {name!r} is not of the form key=value.")
        if key in options:
            raise PolicyError(f"Option {key!r} of policy {name!r} is given twice. Give it once.")
        options[key] = value
    return load_policy(name, **options)


def _find(name: str) -> type[Policy]:
    """The policy class of a name, in the documented order."""
    if name.endswith(".py"):
        return _only_policy(_load_file(Path(name)), name)
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise PolicyError(f"Policy {name!r} cannot be loaded: {error}.") from error
        if not (isinstance(found, type) and issubclass(found, Policy)):
            raise PolicyError(f"{name!r} is not a policy class: derive it from kvpress.Policy.")
        return found
    ours = {m.name for m in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__)}
    if name in ours:
        return _only_policy(importlib.import_module(f"{PACKAGE}.{name}"), name)
    theirs = {e.name: e for e in _entry_points()}
    if name in theirs:
        loaded = theirs[name].load()
        return _only_policy(loaded, name) if isinstance(loaded, types.ModuleType) else loaded
    raise PolicyError(
        f"Unknown policy {name!r}.{did_you_mean(name, ours | set(theirs))} A path ending in .py and"
        " module:attribute work too."
    )


def _entry_points() -> Sequence[importlib.metadata.EntryPoint]:
    return list(importlib.metadata.entry_points(group=PACKAGE))


def _load_file(path: Path) -> types.ModuleType:
    path = path.expanduser().resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise PolicyError(f"There is no policy file {path}. Give the path of an existing .py file.")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name while the class is made; a later import must not find
    # it.
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
        for cls in _policies_of(module):
            _hints(cls)
    except Exception as error:
        raise PolicyError(
            f"The policy file {path} fails: {type(error).__name__}: {error}."
        ) from error
    finally:
        if before is None:
            del sys.modules[path.stem]
        else:
            sys.modules[path.stem] = before
    return module


def _policies_of(module: types.ModuleType) -> list[type[Policy]]:
    members = vars(module).values()
    return [
        m
        for m in members
        if isinstance(m, type) and issubclass(m, Policy) and m.__module__ == module.__name__
    ]


def _only_policy(module: types.ModuleType, name: str) -> type[Policy]:
    found = _policies_of(module)
    if len(found) != 1:
        raise PolicyError(
            f"{name!r} defines {len(found)} policies"
            f" ({', '.join(cls.__name__ for cls in found) or 'none'}); a policy file defines"
            " exactly one class derived from kvpress.Policy."
        )
    if "__dataclass_fields__" not in vars(found[0]):
        raise PolicyError(
            f"{found[0].__name__} in {name!r} is no dataclass, so that its options are not seen."
            " Put @dataclass(frozen=True, kw_only=True) above it."
        )
    return found[0]


def _hints(cls: type[Policy]) -> dict[str, Any]:
    """The resolved type hints of a policy's options, kept on the class once they are known."""
    if "_option_types" not in cls.__dict__:
        setattr(cls, "_option_types", get_type_hints(cls))  # noqa: B010
    hints: dict[str, Any] = cls.__dict__["_option_types"]
    return hints


def _coerce(cls: type[Policy], field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """An option's value in its declared type and range, from a value or from text.

    Raises PolicyError.
    """
    if hint is Budget:
        return Budget.parse(value)
    meta, where = (
        field.metadata,
        f"Option {field.name}={value!s} of policy {cls.__module__.rpartition('.')[2]!r}",
    )
    choices = meta.get("choices", ())
    if value in choices:
        return value
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in kinds and str(value).lower() == "none":
        return None
    number = _number(value, kinds)
    if number is None:
        wanted = [k.__name__ for k in (bool, int, float) if k in kinds] + [repr(c) for c in choices]
        near = did_you_mean(str(value), choices) if choices and isinstance(value, str) else ""
        raise PolicyError(f"{where} must be {' or '.join(wanted) or 'text'}.{near}")
    low, high = meta.get("low"), meta.get("high")
    high = _LARGEST if high is None and isinstance(number, int) else high
    if (low is not None and number < low) or (high is not None and number > high):
        raise PolicyError(f"{where} is out of range: allowed are values from {low} to {high}.")
    return number


def _number(value: Any, kinds: Sequence[Any]) -> Any:
    """`value` as the first of `bool`, `int`, `float` among `kinds` that fits it, or None."""
    if bool in kinds:
        return {"true": True, "false": False}.get(str(value).lower())
    if isinstance(value, bool):
        return None
    for kind in (int, float):
        if kind not in kinds or (
            kind is int and isinstance(value, float) and not value.is_integer()
        ):
            continue
        try:
            number = kind(value)
        except (TypeError, ValueError):
            continue
        if number == number and abs(number) != float("inf"):
            return number
    return None


_DEFAULT = Policy()
