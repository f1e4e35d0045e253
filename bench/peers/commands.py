"""The command line of the comparison with others: `kvpress bench peers`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import typer
from kvpress.bench.common.command import command
from kvpress.bench.common.options import HubOptions
from kvpress.bench.speed import options
from kvpress.bench.speed.commands import make_setting
from rich.console import Console

console = Console()
OURS = ["full", "snapkv:window=64", "knorm", "streaming_llm", "keyformer"]
CACHES = ("transformers", "transformers-fp8", "transformers-int4")
PRESSES = [
    "SnapKVPress",
    "KnormPress",
    "StreamingLLMPress",
    "AdaKVPress(SnapKVPress)",
    "ThinKPress",
]
HALF, SHORT = ["0.5"], [1000]


@command("kvpress bench peers --budget 0.2 --policy full --policy snapkv --press SnapKVPress")
def peers(
    loading: HubOptions,
    policy: options.Policies = OURS,
    press: Annotated[
        list[str],
        typer.Option(help="Of NVIDIA's kvpress: Class:option=value,… ; repeatable."),
    ] = PRESSES,
    budget: options.Budgets = HALF,
    tokens: options.Lengths = SHORT,
    samples: Annotated[int, typer.Option(help="Contexts per task, for quality.", min=1)] = 5,
    rounds: options.Rounds = 9,
    warmup: options.Warmup = 1,
    out: options.Out = None,
) -> None:
    """Compare with transformers' caches and NVIDIA's kvpress: bytes, quality and time in one run.

    The same model, prompts, budgets and threads; every round runs all of them. Bytes are counted
    from the storages that a cache keeps alive, by one function; answers are scored from the
    logits, by one function too. `scripts/peers` installs the others.
    """
    from kvpress.bench.common import report
    from kvpress.bench.peers import remote, table
    from kvpress.bench.peers.candidates import CandidatesWithPeers
    from kvpress.bench.speed import grid, run
    from kvpress.bench.speed.scores import QualityOptions

    setting = make_setting(loading, None, rounds, warmup)
    remote.environment()  # refuse before a long run, not in it
    caches = (*CACHES, "transformers-offloaded") if setting.device == "cuda" else CACHES
    ours = options.with_budgets(policy, budget)
    names = list(dict.fromkeys((*caches, *ours, *_presses(press, budget))))
    cells = [*grid.cells("decode", tokens, [1]), *grid.cells("prefill", tokens, [1])]
    candidates = CandidatesWithPeers(setting)
    try:
        made = run.run(
            setting, cells, names, QualityOptions(("copy", "needle"), samples), out, candidates
        )
    finally:
        candidates.close()
    for sheet in table.sheets(made):
        console.print(report.table(sheet))
    console.print(table.LEGEND)


def _presses(given: Sequence[str], budgets: Sequence[str]) -> Iterator[str]:
    """Names of presses, at every budget where they name none."""
    from kvpress.bench.peers.remote import PREFIX

    for press in given:
        if "budget=" in press:
            yield PREFIX + press
            continue
        for budget in budgets:
            yield f"{PREFIX}{press}{',' if ':' in press else ':'}budget={budget}"
