"""Random sequences of operations on packed rows: evictions in any order leave pages of holes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import helpers
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from packing import layout_of

import kvpress
from kvpress import ops
from kvpress.formulas.page_layout import PageLayout
from kvpress.ops import Bounds, Columns, Logits, Noise, Token
from kvpress.store import Column, FormattedRows, PackedRows, PagedRows, Survivors
from kvpress.store.compaction import compact

WIDTHS = (8, 6)
RAW = [
    [layout_of(16, 16, WIDTHS, WIDTHS, torch.float32, slots, (32, 32)) for slots in pair]
    for pair in ((32, 64), (64, 32))
]
FEW = [
    [layout_of(8, 8, WIDTHS, WIDTHS, torch.float32, slots, (64, 32)) for slots in pair]
    for pair in ((64, 32), (192, 64))
]
MASSLESS = {
    "key": Column((WIDTHS[0],), torch.float32, slot_last=True),
    "value": Column((WIDTHS[1],), torch.float32),
}
MASSIVE = MASSLESS | {"mass": Column((), torch.float32, volatile=True)}
MOST_STORES = 3


class Slot(NamedTuple):
    """What a row should hold of one token."""

    position: int
    key: tuple[float, ...]
    value: tuple[float, ...]
    mass: float


Rows = list[dict[int, Slot]]  # of each row, by position


class Twin:
    """A store, and what it should hold. tail: tokens since slots were last dropped."""

    def __init__(self, store: FormattedRows, rows: Rows, tail: int = 0) -> None:
        self.store, self.rows, self.tail = store, rows, tail


def new_store(
    sequences: int, heads: int, page: int, layouts: list[PageLayout], residual: int, massive: bool
) -> FormattedRows:
    columns = MASSIVE if massive else MASSLESS
    recent = PagedRows(sequences, heads, columns, page, torch.device("cpu"))
    return FormattedRows(recent, layouts, residual, ordered=False)


class Packed(RuleBasedStateMachine):
    """Appends, evictions, crops, beams, forks and files, on up to three stores."""

    @initialize(
        shape=st.tuples(st.integers(1, 2), st.integers(1, 2)),
        page=st.sampled_from([1, 3, 16]),
        layouts=st.sampled_from([*RAW, *FEW]),
        residual=st.sampled_from([0, 5, 40]),
        massive=st.booleans(),
    )
    def start(
        self,
        shape: tuple[int, int],
        page: int,
        layouts: list[PageLayout],
        residual: int,
        massive: bool,
    ) -> None:
        torch.manual_seed(0)
        store = new_store(*shape, page, layouts, residual, massive)
        self.layouts, self.seen, self.massive = layouts, 0, massive
        self.make = (page, layouts, residual, massive)
        self.twins = [Twin(store, [{} for _ in range(shape[0] * shape[1])])]
        self.feed(self.twins[0], 150, True)

    def feed(self, twin: Twin, tokens: int, ended: bool) -> None:
        """New tokens of every row, perhaps a prompt; what has become old is then packed."""
        store = twin.store
        shape = (store.sequences, store.heads, tokens)
        new = {
            "position": torch.arange(self.seen, self.seen + tokens).expand(shape),
            "key": torch.randn(*shape, WIDTHS[0]),
            "value": torch.randn(*shape, WIDTHS[1]),
            "mass": torch.rand(shape),
        }
        store.append({name: new[name] for name in store.columns})
        mass = new["mass"] if self.massive else torch.zeros(shape)
        for r, row in enumerate(twin.rows):
            for t in range(tokens):
                key, value = (tuple(new[n].flatten(0, 1)[r, t].tolist()) for n in ("key", "value"))
                place = self.seen + t
                row[place] = Slot(place, key, value, float(mass.flatten(0, 1)[r, t]))
        self.seen, twin.tail = self.seen + tokens, twin.tail + tokens
        self.pack(store, range(store.sequences) if ended else ())

    def pack(self, store: FormattedRows, ended: Sequence[int] = ()) -> None:
        due = store.aging.due(torch.zeros(store.sequences).long(), ended)
        for b in due:
            if not store.aging.decided_B[b]:
                key, value = (torch.arange(width).expand(1, store.heads, width) for width in WIDTHS)
                formats = torch.arange(b, b + store.heads)[None] % 2
                store.aging.decide([b], self.layouts, key, value, formats)
        if due:
            store.aging.pack_old(due, ended)

    @rule(data=st.data(), tokens=st.integers(1, 70), ended=st.booleans())
    def append(self, data: st.DataObject, tokens: int, ended: bool) -> None:
        self.feed(self.pick(data), tokens, ended)

    @rule(
        data=st.data(),
        times=st.sampled_from([1, 20, 90]),
        order=st.sampled_from(["first", "last", "any"]),
        among=st.sampled_from(["all", "some"]),
    )
    def evict(self, data: st.DataObject, times: int, order: str, among: str) -> None:
        """Drops slots one by one; the first ones first empties page after page."""
        twin = self.pick(data)
        chosen = [r for r in range(len(twin.rows)) if among == "all" or r % 2 == 0]
        for _ in range(times):
            self.evict_one(twin, order, chosen)

    def evict_one(self, twin: Twin, order: str, chosen: list[int]) -> None:
        position = twin.store.dense("position").flatten(0, 1)
        rows, slots = [], []
        for r in chosen:
            held = sorted(twin.rows[r])
            if not held:
                continue
            place = {"first": 0, "last": -1, "any": int(torch.randint(len(held), ()))}[order]
            rows.append(r)
            slots.append(int((position[r] == held[place]).nonzero()))
            del twin.rows[r][held[place]]
        twin.store.evict_one(torch.tensor(rows, dtype=torch.int64), torch.tensor(slots).long())
        twin.tail = 0

    @rule(data=st.data(), tokens=st.integers(1, 40), quota=st.integers(1, 200))
    def decode(self, data: st.DataObject, tokens: int, quota: int) -> None:
        """Steps of the fused operator, which finds its victims in all parts: the first tokens."""
        twin = self.pick(data)
        if ops.backends()["cpu"] != "cpu" or twin.store.memory.shares:
            return  # the engine does not call it then
        for _ in range(tokens):
            self.decode_one(twin, quota)
            self.pack(twin.store)

    def decode_one(self, twin: Twin, quota: int) -> None:
        store = twin.store
        store.paging.reserve_one()
        shape = (store.sequences, store.heads, 1)
        key, value = torch.randn(*shape, WIDTHS[0]), torch.randn(*shape, WIDTHS[1])
        seen = torch.full((store.sequences,), self.seen + 1)
        mass_PS = store.paging.pages("mass") if self.massive else None
        quota_R = torch.full_like(store.aging.recent.counts, quota)
        bounds = (seen, quota_R, torch.zeros_like(quota_R), torch.zeros_like(seen))
        ops.decode_step(
            Token(torch.randn(*shape, WIDTHS[0]), key, value),
            store.paging.operands(),
            Columns(store.paging.pages("position"), mass_PS),
            Bounds(*bounds, "position"),
            True,
            Noise("none", 1.0, 0, 0),
            Logits(0.3),
            store.old(),
        )
        store.count_step(None, False)
        masses = self.masses(store)
        for r, row in enumerate(twin.rows):
            own = (tuple(x.flatten(0, 1)[r, 0].tolist()) for x in (key, value))
            row[self.seen] = Slot(self.seen, *own, 0.0)
            if len(row) > quota:
                del row[min(row)]
            for place, slot in row.items():  # what the operator adds up is tested elsewhere
                row[place] = slot._replace(mass=masses[r].get(place, 0.0))
        self.seen, twin.tail = self.seen + 1, 0

    @rule(data=st.data(), share=st.floats(0, 1), order=st.sampled_from(["first", "last", "any"]))
    def retain(self, data: st.DataObject, share: float, order: str) -> None:
        """Keeps some slots of every row, with new masses."""
        twin = self.pick(data)
        store = twin.store
        for r, row in enumerate(twin.rows):
            held = sorted(row, reverse=order == "last")
            if order == "any":
                held = [held[i] for i in torch.randperm(len(held)).tolist()]
            kept = held[int(len(held) * share) :]
            mass = torch.rand(len(kept)).tolist() if self.massive else [0.0] * len(kept)
            twin.rows[r] = {p: row[p]._replace(mass=m) for p, m in zip(kept, mass, strict=True)}
        counts = torch.tensor([len(row) for row in twin.rows]).view(-1, store.heads)
        shape = (len(twin.rows), max(1, int(counts.max())))
        position, masses = torch.full(shape, -1, dtype=torch.int32), torch.zeros(shape)
        for r, row in enumerate(twin.rows):
            for place, slot in enumerate(row.values()):
                position[r, place], masses[r, place] = slot.position, slot.mass
        columns = {"position": position, "mass": masses}
        by_head = {n: x.view(-1, store.heads, shape[1]) for n, x in columns.items()}
        store.retain(Survivors(tuple(range(store.sequences)), by_head, counts))
        twin.tail = 0

    @precondition(lambda self: any(twin.tail for twin in self.twins))
    @rule(data=st.data(), tokens=st.integers(1, 100))
    def crop(self, data: st.DataObject, tokens: int) -> None:
        able = [n for n, twin in enumerate(self.twins) if twin.tail]
        twin = self.twins[data.draw(st.sampled_from(able))]
        tokens = min(tokens, twin.tail)
        twin.store.truncate(tokens)
        for r, row in enumerate(twin.rows):
            twin.rows[r] = {p: row[p] for p in sorted(row)[: len(row) - tokens]}
        twin.tail -= tokens

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        """Reorders, repeats and drops sequences, as beams do."""
        place = data.draw(st.integers(0, len(self.twins) - 1))
        one = st.integers(0, self.twins[place].store.sequences - 1)
        index = data.draw(st.lists(one, min_size=1, max_size=3))
        self.twins[place] = self.copied(self.twins[place], index)
        for twin in self.twins:
            twin.store.memory.trim()

    @precondition(lambda self: len(self.twins) < MOST_STORES)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        twin = self.pick(data)
        self.twins.append(self.copied(twin, list(range(twin.store.sequences))))

    def copied(self, twin: Twin, index: list[int]) -> Twin:
        heads = twin.store.heads
        rows = [dict(twin.rows[b * heads + h]) for b in index for h in range(heads)]
        return Twin(twin.store.select_sequences(index), rows, twin.tail)

    @precondition(lambda self: len(self.twins) > 1)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.twins.remove(self.pick(data))

    @rule(data=st.data())
    def unshare(self, data: st.DataObject) -> None:
        self.pick(data).store.unshare()

    @rule(data=st.data())
    def save_and_load(self, data: st.DataObject) -> None:
        twin = self.pick(data)
        state = {name: tensor.clone() for name, tensor in twin.store.state().items()}
        loaded = new_store(twin.store.sequences, twin.store.heads, *self.make)
        loaded.load(state, lambda kept: self.layouts)
        twin.store = loaded

    @invariant()
    def contents_are_equal_and_bytes_exact(self) -> None:
        for twin in getattr(self, "twins", []):
            store = twin.store
            assert store.check_integrity()
            assert store.counts.tolist() == [len(row) for row in twin.rows]
            position = store.dense("position").flatten(0, 1)
            masses = self.masses(store)
            key, value = (store.dense(name).flatten(0, 1) for name in ("key", "value"))
            for r, row in enumerate(twin.rows):
                held = position[r] >= 0
                assert sorted(position[r][held].tolist()) == sorted(row)
                if not row:
                    continue
                slots = [row[p] for p in position[r][held].tolist()]
                assert masses[r] == {slot.position: slot.mass for slot in slots}
                self.close(key[r][held], [slot.key for slot in slots])
                self.close(value[r][held], [slot.value for slot in slots])
            alive = helpers.live_storages(store)
            parts = (*store.aging.parts, store.aging.recent)
            if all(len(part.paging.pool.members) == 1 for part in parts):
                assert store.memory.nbytes == alive
            assert alive >= store.memory.nbytes
            self.attends(store, position, key, value)

    def close(self, given: torch.Tensor, wanted: list[tuple[float, ...]]) -> None:
        """As they came, or not far from it: pages are packed again whenever they are compacted."""
        far = (given - torch.tensor(wanted)).abs().max()
        assert far == 0 if self.layouts[0].key_bits == 16 else far < 0.5

    def attends(
        self,
        store: FormattedRows,
        position: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        """Holes, and pages of nothing else, are not attended to."""
        query = torch.ones(store.sequences, store.heads, 1, WIDTHS[0])
        out, _, weights = store.attend(query, None, Logits(0.3), True)
        logits = (key @ query.flatten(0, 1).mT)[..., 0] * 0.3
        wanted = logits.masked_fill(position < 0, -torch.inf).softmax(-1)[:, None]
        some = store.counts > 0
        got = weights.flatten(0, 1)[..., : wanted.shape[-1]]
        torch.testing.assert_close(got[some], wanted[some], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            out.flatten(0, 1)[some], (wanted @ value)[some], rtol=1e-3, atol=1e-4
        )

    def masses(self, store: FormattedRows) -> list[dict[int, float]]:
        position = store.dense("position").flatten(0, 1)
        mass = store.dense("mass").flatten(0, 1) if self.massive else torch.zeros(position.shape)
        rows = (
            zip(p.tolist(), m.tolist(), strict=True) for p, m in zip(position, mass, strict=True)
        )
        return [{p: m for p, m in row if p >= 0} for row in rows]

    def pick(self, data: st.DataObject) -> Twin:
        # Not sampled_from: it would keep stores alive.
        return self.twins[data.draw(st.integers(0, len(self.twins) - 1))]


TestPacked = Packed.TestCase
TestPacked.settings = settings(
    max_examples=40,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize(
    "recipe",
    [
        "streaming_llm:budget=80,sink=0+quant:residual=4",
        "streaming_llm:budget=80,sink=0+think:recent=4",
        "h2o:budget=80,sink=4,recent=8+quant:key_bits=8,residual=4",
        "random:budget=80,interval=7+quant:residual=4,group=96",
    ],
)
def test_a_long_answer_outlives_every_page_of_its_prompt(recipe: str) -> None:
    """While decoding all tokens of a prompt are evicted, page after page."""
    model = helpers.tiny("llama")
    with kvpress.attach(model, recipe) as engine:
        out = engine.generate(helpers.prompt(2, 150), max_new_tokens=500, do_sample=False)
        cache = engine.cache
    assert out.shape[1] == 650
    assert cache.check_integrity()
    assert all(
        80 <= n <= 87 for layer in engine.report().slots_kept for rows in layer for n in rows
    )


@pytest.mark.parametrize("slots", [32, 64])
@pytest.mark.parametrize("pages_lost", [1, 2, 3, 5])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_compaction_leaves_as_few_pages_as_hold_the_slots(
    slots: int, pages_lost: int, more: int
) -> None:
    """Wherever the holes of a row are: less than a page of them is left, also of five pages."""
    holes = min(pages_lost * slots + more, 5 * slots)
    layout = layout_of(16, 16, WIDTHS, WIDTHS, torch.float32, slots, (32, 32))
    store = PackedRows(1, 2, layout, {}, torch.empty(0), ordered=False)
    key_C, value_U = (torch.arange(width).short() for width in WIDTHS)
    store.key_channels_RC, store.value_channels_RU = key_C.repeat(2, 1), value_U.repeat(2, 1)
    channels = (key_C.repeat(10, 1), value_U.repeat(10, 1))
    pages = ops.pack(*(torch.randn(10, slots, width) for width in WIDTHS), *channels, list(layout))
    positions = torch.arange(5 * slots).view(5, slots).repeat(2, 1)
    none = torch.zeros(10).long()
    store.add(torch.arange(2).repeat_interleave(5), pages, {"position": positions}, none)
    before = store.dense("key")[0, 1]
    for slot in torch.randperm(5 * slots)[:holes].tolist():
        store.evict_one(torch.tensor([1]), torch.tensor([slot]))
    compact(store, torch.arange(2))
    left = 5 * slots - holes
    pages_left = -(-left // slots) if holes > slots else 5  # a page of holes may be
    assert store.counts.tolist() == [5 * slots, pages_left * slots]
    assert store.held.tolist() == [5 * slots, left]
    assert store.check_integrity()
    position = store.dense("position")[0, 1]
    assert torch.equal(store.dense("key")[0, 1][position >= 0], before[position[position >= 0]])


def test_no_recent_slot_may_be_left() -> None:
    """A prompt of whole pages of which nothing stays as it came."""
    model, ids = helpers.tiny("llama"), helpers.prompt(2, 64)
    with kvpress.attach(model, "quant:residual=0,guard=none,key_bits=8,value_bits=8") as engine:
        out = engine.generate(ids, max_new_tokens=70, do_sample=False)
        assert engine.report().slots_kept[0][0] == [133, 133]
    assert out.shape == (2, 134)
