"""The command line of the measurements: `kvpress bench` and what hangs below it."""

from __future__ import annotations

import typer
from kvpress.bench.distill.recall_command import heads
from kvpress.bench.operators.commands import ops
from kvpress.bench.peers.commands import peers
from kvpress.bench.peers.positions_command import positions
from kvpress.bench.plan.commands import peaks as plan
from kvpress.bench.retrieval.commands import retrieval
from kvpress.bench.serving.commands import serving
from kvpress.bench.sparse.commands import sparse
from kvpress.bench.speed.commands import decode, memory, overhead, prefill, throughput
from kvpress.bench.tiers.commands import tiers

bench = typer.Typer(help="Measure the operators and the engine.", no_args_is_help=True)
TIMED = (decode, prefill, throughput, memory, tiers, sparse, retrieval, heads, ops, overhead)
for command in (*TIMED, serving, peers, positions):
    command.add_to(bench)
plan.add_to(bench, "plan")
