"""Loading policies: from a specification, a file, a module, our own folder, or entry points."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvpress.errors import BudgetError, PolicyError, did_you_mean
from kvpress.policy.base import Policy
from kvpress.policy.corrections import meant
from kvpress.policy.named import Named, named, recipe_of
from kvpress.policy.options import as_text, option_types
from kvpress.policy.recipe import Recipe

PACKAGE = "kvpress.policies"  # also the entry-point group of third-party policies


def parse(spec: str | Policy | Recipe | Sequence[str | Policy]) -> Recipe:
    """A recipe from `name:key=value,key=value+name…`, a policy, or a list of either.

    Raises PolicyError or BudgetError: unknown names and options list close matches.
    """
    if isinstance(spec, Recipe):
        return spec
    if isinstance(spec, str):
        try:
            return Recipe(_policies(spec))
        except (PolicyError, BudgetError) as error:
            better = _corrected(spec)
            if better is None:
                raise
            raise type(error)(f"{error} Write it as {better!r}.") from error
    return Recipe(_policies(spec))


def _policies(spec: Any) -> tuple[Policy, ...]:
    """The policies of a specification, whether they go together or not."""
    if isinstance(spec, Recipe):
        return spec.policies
    if isinstance(spec, Policy):
        return (spec,)
    if isinstance(spec, str):
        return _parse_text(spec)
    if isinstance(spec, Sequence) and spec:
        return tuple(policy for part in spec for policy in _policies(part))
    raise PolicyError(
        f"policy={spec!r} is not a policy. Give a specification such as 'name:budget=0.5', "
        "a Policy object, or a non-empty list of these."
    )


def refuse_options(policy: Any, options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises PolicyError for keywords beside a specification, which options belong into.

    known: the keywords that may stand there.
    """
    if not options:
        return
    given = ",".join(f"{name}={as_text(value)}" for name, value in options.items())
    better, first = None, next(iter(options))
    if isinstance(policy, str):
        better = _corrected(f"{policy}{',' if '=' in policy else ':'}{given}", same=True)
    raise PolicyError(
        f"attach() has no option {first!r}.{did_you_mean(first, known)} Options of a policy stand"
        f" in its specification: write kvpress.attach(model, {better or 'name:' + given!r})."
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


def available() -> dict[str, type[Policy]]:
    """Every installed policy by name: our own, then those of entry points."""
    return {name: _find(name) for name in sorted({*_ours(), *(e.name for e in _entry_points())})}


def recipes() -> Mapping[str, tuple[Named, ...]]:
    """Recipes with a name of their own, as `best:ratio=16`, by these names."""
    return named(PACKAGE)


def _parse_text(spec: str) -> tuple[Policy, ...]:
    return tuple(policy for part in spec.split("+") for policy in _parse_part(part))


def _parse_part(part: str) -> tuple[Policy, ...]:
    """A policy, or those of a named recipe."""
    name, options = _split(part)
    known = recipes().get(name)
    if known is not None:
        return _parse_text(recipe_of(name, known, options))
    return (load_policy(name, **options),)


def _corrected(spec: str, same: bool = False) -> str | None:
    """What a specification was meant to be, if that can be read. same: it may be what was given."""
    options = {
        name: [field.name for field in dataclasses.fields(cls)] for name, cls in available().items()
    }
    better = meant(spec, options)
    if better is None or (better == spec and not same):
        return None
    try:
        Recipe(_parse_text(better))
    except (PolicyError, BudgetError):
        return None
    return better


def _split(part: str) -> tuple[str, dict[str, str]]:
    """The name and the options of a policy. Raises PolicyError."""
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
        if not equals or not key:
            raise PolicyError(f"Option {item!r} of policy {name!r} is not of the form key=value.")
        if key in options:
            raise PolicyError(f"Option {key!r} of policy {name!r} is given twice. Give it once.")
        options[key] = value
    return name, options


def _find(name: str) -> type[Policy]:
    """The policy class of a name, in the documented order."""
    if name.endswith(".py"):
        return _only_policy(_load_file(Path(name)), name)
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            if module in _ours():
                raise PolicyError(
                    f"Option {attribute!r} of policy {module!r} is not of the form key=value."
                ) from None
            raise PolicyError(f"Policy {name!r} cannot be loaded: {error}.") from error
        if not (isinstance(found, type) and issubclass(found, Policy)):
            raise PolicyError(f"{name!r} is not a policy class: derive it from kvpress.Policy.")
        return found
    if name in _ours():
        return _only_policy(importlib.import_module(f"{PACKAGE}.{name}"), name)
    theirs = {e.name: e for e in _entry_points()}
    if name in theirs:
        loaded = theirs[name].load()
        return _only_policy(loaded, name) if isinstance(loaded, types.ModuleType) else loaded
    raise PolicyError(
        f"Unknown policy {name!r}.{did_you_mean(name, {*_ours(), *theirs})} A path ending in .py"
        " and module:attribute work too."
    )


def _ours() -> set[str]:
    """The policies in our own folder."""
    return {m.name for m in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__)}


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
            option_types(cls)
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
