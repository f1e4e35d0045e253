"""Random sequences of operations on stores that share pages, against plain lists of slots."""

from __future__ import annotations

import helpers
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpress import ops
from kvpress.ops import Bounds, Columns, Logits, Noise, Token
from kvpress.store import Column, PagedRows, Survivors

NAMES = ("position", "key", "value", "mass")
COLUMNS = {
    "key": Column((4,), torch.float32, slot_last=True),
    "value": Column((3,), torch.float32),
    "mass": Column((), torch.float32, volatile=True),
}
MOST_STORES = 4


class Twin:
    """A store, and what it should hold: for each row a list of slots, in any order.

    tail: how many tokens were appended to every row since slots last changed their order.
    """

    def __init__(self, store: PagedRows, rows: list[list[tuple]], tail: int = 0) -> None:
        self.store, self.rows, self.tail = store, rows, tail

    def copy_of(self, store: PagedRows, sequences: list[int] | None = None) -> Twin:
        heads = store.heads
        chosen = range(store.sequences) if sequences is None else sequences
        rows = [list(self.rows[b * heads + h]) for b in chosen for h in range(heads)]
        return Twin(store, rows, self.tail)


class Stores(RuleBasedStateMachine):
    """Appends, evictions, crops, beams, forks and files, on up to four stores."""

    @initialize(
        sequences=st.integers(1, 3),
        heads=st.integers(1, 2),
        page=st.sampled_from([1, 3, 4]),
        massive=st.booleans(),
    )
    def start(self, sequences: int, heads: int, page: int, massive: bool) -> None:
        torch.manual_seed(0)
        self.names = NAMES if massive else NAMES[:3]
        self.columns = {name: COLUMNS[name] for name in self.names if name != "position"}
        store = PagedRows(sequences, heads, self.columns, page, torch.device("cpu"))
        self.twins = [Twin(store, [[] for _ in range(sequences * heads)])]
        self.seen = 0

    @rule(data=st.data(), tokens=st.integers(0, 9), everywhere=st.booleans())
    def append(self, data: st.DataObject, tokens: int, everywhere: bool) -> None:
        twin = self.pick(data)
        store = twin.store
        some = st.lists(st.integers(0, store.sequences - 1), unique=True, min_size=1)
        chosen = list(range(store.sequences)) if everywhere else data.draw(some)
        shape = (len(chosen), store.heads, tokens)
        columns = {
            "position": torch.arange(self.seen, self.seen + tokens).expand(shape),
            "key": torch.randn(*shape, 4),
            "value": torch.randn(*shape, 3),
            "mass": torch.randn(shape),
        }
        store.append({name: columns[name] for name in self.names}, chosen)
        for b, sequence in enumerate(chosen):
            for h in range(store.heads):
                new = [self.slot(columns, b, h, t) for t in range(tokens)]
                twin.rows[sequence * store.heads + h].extend(new)
        self.seen += tokens
        twin.tail = twin.tail + tokens if len(chosen) == store.sequences else 0

    @rule(data=st.data(), steps=st.integers(1, 4))
    def decode(self, data: st.DataObject, steps: int) -> None:
        """Appends with the fused operator, which writes where the reservation lets it."""
        twin = self.pick(data)
        if "mass" in self.columns and twin.store.memory.shares:
            return  # it would write masses to shared pages; the engine does not call it then
        for _ in range(steps):
            self.decode_one(twin)

    def decode_one(self, twin: Twin) -> None:
        store = twin.store
        store.paging.reserve_one()
        shape = (store.sequences, store.heads, 1)
        key, value = torch.randn(*shape, 4), torch.randn(*shape, 3)
        everyone = torch.full((store.sequences,), self.seen + 1)
        mass_PS = store.paging.pages("mass") if "mass" in store.columns else None
        never = torch.full_like(store.counts, 10**6), torch.zeros_like(store.counts)
        ops.decode_step(
            Token(torch.randn(*shape, 4), key, value),
            store.paging.operands(),
            Columns(store.paging.pages("position"), mass_PS),
            Bounds(everyone, *never, torch.zeros_like(everyone), "position"),
            False,
            Noise("none", 1.0, 0, 0),
            Logits(0.0),
        )
        store.count_step(None, False)
        masses = store.dense("mass").flatten(0, 1) if "mass" in store.columns else None
        position = store.dense("position").flatten(0, 1)
        for r, row in enumerate(twin.rows):
            new = (self.seen, key.flatten(0, 1)[r, 0].tolist(), value.flatten(0, 1)[r, 0].tolist())
            row.append((*new, 0.0))
            if masses is not None:  # the reference of decode_step is tested elsewhere
                now = dict(zip(position[r].tolist(), masses[r].tolist(), strict=True))
                twin.rows[r] = [(*slot[:3], now[slot[0]]) for slot in row]
        self.seen, twin.tail = self.seen + 1, twin.tail + 1

    @rule(data=st.data(), times=st.integers(1, 4))
    def evict(self, data: st.DataObject, times: int) -> None:
        twin = self.pick(data)
        for _ in range(times):
            self.evict_some(twin)

    def evict_some(self, twin: Twin) -> None:
        store = twin.store
        chosen = (store.counts > 0) & (torch.rand(len(store.counts)) < 0.7)
        slot = (torch.rand(len(store.counts)) * store.counts).long()
        victims = store.dense("position").flatten(0, 1)
        for r in chosen.nonzero().flatten().tolist():
            gone = int(victims[r, slot[r]])
            twin.rows[r] = [s for s in twin.rows[r] if s[0] != gone]
        row = chosen.nonzero().flatten()
        store.evict_one(row, slot[row])
        twin.tail = 0

    @rule(data=st.data(), share=st.floats(0, 1), headroom=st.integers(0, 3))
    def compact(self, data: st.DataObject, share: float, headroom: int) -> None:
        """Keeps the newest slots of every row."""
        twin = self.pick(data)
        store, everybody = twin.store, range(twin.store.sequences)
        columns = store.dense_by_position(everybody)
        counts = (store.counts_BH * share).long()
        newest = {name: x.flip(2) for name, x in columns.items()}
        store.fill([Survivors(tuple(everybody), newest, counts)], headroom)
        for r, row in enumerate(twin.rows):
            twin.rows[r] = sorted(row, reverse=True)[: int(counts.flatten()[r])]
        twin.tail = 0

    @rule(data=st.data(), share=st.floats(0, 1), everywhere=st.booleans())
    def retain(self, data: st.DataObject, share: float, everywhere: bool) -> None:
        """Keeps some slots of some sequences, with new masses."""
        twin = self.pick(data)
        store = twin.store
        chosen = [b for b in range(store.sequences) if everywhere or torch.rand(()) < 0.5]
        if not chosen or not store.counts_BH[chosen].any():
            return
        rows = [[store.heads * b + h for h in range(store.heads)] for b in chosen]
        for r in (r for heads in rows for r in heads):
            kept = torch.rand(len(twin.rows[r])) < share
            kept_slots = [slot for slot, stays in zip(twin.rows[r], kept, strict=True) if stays]
            new = torch.randn(len(kept_slots)).tolist() if "mass" in self.columns else None
            twin.rows[r] = [
                (*slot[:3], new[i]) if new else slot for i, slot in enumerate(kept_slots)
            ]
        counts = torch.tensor([[len(twin.rows[r]) for r in heads] for heads in rows])
        shape = (*counts.shape, max(1, int(counts.max())))
        position, mass = torch.full(shape, -1, dtype=torch.int32), torch.zeros(shape)
        for i, heads in enumerate(rows):
            for h, r in enumerate(heads):
                for place, slot in enumerate(twin.rows[r]):
                    position[i, h, place] = slot[0]
                    mass[i, h, place] = slot[3] if "mass" in self.columns else 0
        store.retain(Survivors(tuple(chosen), {"position": position, "mass": mass}, counts))
        twin.tail = 0

    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        twin = self.pick(data)
        if "mass" not in self.columns:
            return
        mass, position = torch.randn(twin.store.dense("mass").shape), twin.store.dense("position")
        twin.store.write("mass", mass)
        for r, row in enumerate(twin.rows):
            places = position.flatten(0, 1)[r].tolist()
            now = dict(zip(places, mass.flatten(0, 1)[r].tolist(), strict=True))
            twin.rows[r] = [(*s[:3], now[s[0]]) for s in row]

    @precondition(lambda self: any(twin.tail for twin in self.twins))
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        able = [n for n, twin in enumerate(self.twins) if twin.tail]
        twin = self.twins[data.draw(st.sampled_from(able))]
        tokens = data.draw(st.integers(1, twin.tail))
        twin.store.truncate(tokens)
        twin.rows = [row[: len(row) - tokens] for row in twin.rows]
        twin.tail -= tokens

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        """Reorders, repeats and drops sequences, as beams do."""
        twin = self.pick(data)
        one = st.integers(0, twin.store.sequences - 1)
        index = data.draw(st.lists(one, min_size=1, max_size=4))
        self.twins[self.twins.index(twin)] = twin.copy_of(twin.store.select_sequences(index), index)
        del twin
        for left in self.twins:
            left.store.memory.trim()

    @precondition(lambda self: len(self.twins) < MOST_STORES)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        twin = self.pick(data)
        everybody = range(twin.store.sequences)
        self.twins.append(twin.copy_of(twin.store.select_sequences(everybody)))

    @precondition(lambda self: len(self.twins) > 1)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.twins.remove(self.pick(data))

    @rule(data=st.data())
    def save_and_load(self, data: st.DataObject) -> None:
        twin = self.pick(data)
        store = twin.store
        state = {name: tensor.clone() for name, tensor in store.state().items()}
        sizes = (store.sequences, store.heads)
        loaded = PagedRows(*sizes, self.columns, store.page_slots, store.device)
        loaded.load(state)
        self.twins[self.twins.index(twin)] = twin.copy_of(loaded)

    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        """Asks whether pages are shared, which puts volatile columns back where none are."""
        self.pick(data).store.memory.shares  # noqa: B018

    @invariant()
    def contents_are_equal_and_bytes_exact(self) -> None:
        for twin in getattr(self, "twins", []):
            dense = {n: twin.store.dense(n) for n in self.names}
            for r, row in enumerate(twin.rows):
                b, h = divmod(r, twin.store.heads)
                count = int(twin.store.counts[r])
                held = [self.slot(dense, b, h, s) for s in range(count)]
                assert sorted(held) == sorted(row)
            assert twin.store.check_integrity()
            alive, store = helpers.live_storages(twin.store), twin.store
            if len(store.paging.pool.members) == 1:
                assert store.memory.nbytes == alive
            pages = len(set(store.paging.owned_pages().tolist()))
            used, shared = pages * (store.paging.page_bytes() - 4), store.memory.nbytes_shared
            assert alive >= store.memory.nbytes >= used > shared - 1

    def slot(self, columns: dict[str, torch.Tensor], b: int, h: int, s: int) -> tuple:
        """Position, key, value and mass (0 where none is kept) of one slot."""
        values = [columns[name][b, h, s].tolist() for name in self.names]
        return (*values, *[0.0] * (len(NAMES) - len(values)))

    def pick(self, data: st.DataObject) -> Twin:
        # Not sampled_from: it would keep stores alive.
        return self.twins[data.draw(st.integers(0, len(self.twins) - 1))]


TestStores = Stores.TestCase
TestStores.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
