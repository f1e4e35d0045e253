"""Runs that processes share: what they leave apart from times, and policies that end them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from kvpress.cli import app

_POLICY = """
import os
from dataclasses import dataclass
from pathlib import Path
from kvpress.policy import Budget, Policy, Slots, option

@dataclass(frozen=True, kw_only=True)
class Noted(Policy):
    budget: Budget = option(0.5, "kept")

    def score(self, slots: Slots):
        if slots.layer == 0 and {dies} and not Path({spared!r}).exists():
            {before}
            os._exit(9)
        with open({log!r}, "a") as log:
            log.write("one\\n")
        return slots.position_BHS.float()
"""


def noted(folder: Path, name: str, dies: str = "False", once: bool = False) -> str:
    """A file with a policy that keeps the newest tokens and notes each time that it is asked.

    dies: where it ends its process, as Python of `slots`; `spare` makes it go on, and where it
    dies once, it spares itself.
    """
    spared = str(folder / f"{name}.spared")
    before = f"Path({spared!r}).touch()" if once else "pass"
    made = _POLICY.format(dies=dies, spared=spared, before=before, log=str(folder / f"{name}.log"))
    path = folder / f"{name}.py"
    path.write_text(made, encoding="utf-8")
    return str(path)


def spare(policy: str) -> None:
    """From now on the policy ends no process."""
    Path(policy).with_suffix(".spared").touch()


def times_asked(policy: str) -> int:
    """How often it was asked since this was called last."""
    log = Path(policy).with_suffix(".log")
    count = len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0
    log.unlink(missing_ok=True)
    return count


def rows(path: Path) -> list[Any]:
    """The lines of a file without what the clock said, which alone may differ."""
    return [_timeless(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _timeless(value: Any) -> Any:
    clocks = {"seconds", "time", "tokens_per_second", "attention", "stages"}
    if isinstance(value, dict):
        return {name: _timeless(of) for name, of in value.items() if name not in clocks}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def text(path: Path) -> str:
    """The same as a text, in which names have their order."""
    return "\n".join(json.dumps(row) for row in rows(path))


def called(*given: str) -> Any:
    """What a command says in this process."""
    done = CliRunner().invoke(app, list(given))
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def say(rank: int, world: int, folder: Path, *given: str) -> tuple[str, str]:
    """What one of several processes prints, and the error that it ends with."""
    printed = folder / f"printed{rank}"
    os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    os.environ["COLUMNS"] = "200"
    try:
        app(list(given), standalone_mode=False)
    except Exception as error:
        return printed.read_text(encoding="utf-8"), f"{type(error).__name__}: {error}"
    sys.stdout.flush()
    return printed.read_text(encoding="utf-8"), ""
