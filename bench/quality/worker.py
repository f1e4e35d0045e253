"""The evaluation of our tasks as work that processes can share: each loads the model once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from kvpress.bench.common.environment import environment
from kvpress.bench.common.models import Source
from kvpress.bench.common.text import Text, default_text, read_text
from kvpress.bench.quality import files, ratios, suites
from kvpress.bench.quality.fill import contexts
from kvpress.bench.quality.options import TaskOptions, stored_as
from kvpress.bench.quality.reading import How
from kvpress.bench.quality.run import Contexts, sample_of
from kvpress.bench.quality.sample import Writer
from kvpress.bench.quality.system import LocalSystem
from kvpress.bench.shards.work import Head


def prepared(source: Source, names: Sequence[str], tasks: TaskOptions) -> Callable[[], Contexts]:
    """What loads the model and makes the work of it, in this process.

    Raises, before there is a model, what can be known without one.
    """
    tasks.check()
    wanted = ratios.numbers(tasks.ratio or ())
    asked = ratios.at_ratios(names, wanted)
    dtype, plans_for = stored_as(tasks.cache_dtype, asked), planned(tasks)
    text = default_text() if tasks.text is None else read_text(tasks.text)

    def load() -> Contexts:
        model, tokenizer = source.load()
        systems = partial(LocalSystem, model, cache_dtype=dtype, protects=tasks.protect_system)
        head = head_of(source, model, **settings_of(tasks, text))
        writer, plans, chosen = Writer(tokenizer, text.content), plans_for(model), asked
        if tasks.by_bytes:
            shown = sample_of(writer, plans[0], 0, tasks.seed)
            chosen = ratios.by_bytes(names, wanted, partial(_share, systems, shown.context))
        how = How(tasks.seed, tasks.stepwise, tasks.generate, chosen)
        return contexts(list(chosen), systems, writer, plans, how, head)

    return load


def _share(system_of: Callable[[str], LocalSystem], context: Sequence[int], policy: str) -> float:
    """The bytes that a policy holds of a context, of those of the full cache in bfloat16."""
    system = system_of(policy)
    found = system.bytes(system.read(context))
    return found.held / found.bf16


def begun(source: Source, names: Sequence[str], tasks: TaskOptions) -> Contexts:
    """The work at once: what another process is asked for, of plain values."""
    return prepared(source, names, tasks)()


def settings_of(tasks: TaskOptions, text: Text) -> dict[str, Any]:
    """What results say of the tasks."""
    return {
        "text": text.to_dict() if tasks.files is None else None,
        "files": None if tasks.files is None else files.identity(tasks.files),
        "seed": tasks.seed,
        "stepwise": tasks.stepwise,
        "generate": tasks.generate or None,  # not named where not asked for, as in older files
        "by_bytes": tasks.by_bytes or None,
        "cache_dtype": tasks.cache_dtype,
        "protect_system": tasks.protect_system or None,
    }


def head_of(source: Source, model: Any, **settings: Any) -> Head:
    """What results say of a model, beside other settings, and of this machine."""
    dtype = str(model.dtype).removeprefix("torch.")
    made = {"model": source.name, "dtype": dtype, **source.load_options, **settings}
    return Head(made, environment(model.device))


def planned(tasks: TaskOptions) -> Callable[[Any], list[suites.Plan]]:
    """What is to be run on a model. Raises what can be known before there is one."""
    lengths, samples = tasks.length or (), tasks.samples
    protocols = suites.PROTOCOLS if tasks.protocol == "both" else (tasks.protocol,)
    if tasks.files is None:
        names = tasks.names or [suites.OFFLINE]
        plans = suites.plans(names, protocols, tasks.quick, lengths, samples)
        return lambda model: plans
    entries = files.read(tasks.files, tasks.names, protocols)
    return lambda model: files.plans(entries, lengths, samples, files.positions(model))
