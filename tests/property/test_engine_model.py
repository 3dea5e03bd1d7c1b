# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""`SwapEngine` against a plain-dict model: contents, eviction to the byte, all or nothing, statistics, damage."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import kvzip
from kvzip.backends.base import EncodeRequest
from kvzip.coding import encode_records
from kvzip.errors import BackendUnavailableError, BlockNotFoundError, CorruptRecordError, PoolExhaustedError
from kvzip.types import BlockView, ErrorBound

BLOCKS = 6
SHAPE = (2, 5, 1, 6)  # K and V, tokens, heads, head_dim
RAW_BYTES = 2 * 5 * 6 * 4
KEYS = [b"key-%d" % i for i in range(7)]
BOUNDS = [
    ErrorBound.relative(1e-3),
    ErrorBound.absolute(0.25),
    ErrorBound.relative(0.3),
    ErrorBound.lossless(),
    ErrorBound.absolute(1e-30),
]
KINDS = ["normal", "constant", "zeros", "bits", "with NaN", "integers"]


def native_works() -> bool:
    from kvzip import _native

    try:
        _native.library()
    except BackendUnavailableError:
        return False
    return True


SETTINGS = [("raw", "none")]
if native_works():
    SETTINGS += [("cuszp", mode) for mode in ("fixed", "plain", "outlier")]


def values(kind: str, seed: int) -> npt.NDArray[np.float32]:
    """One block's values."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=SHAPE).astype(np.float32)
    if kind == "constant":
        x[:] = x.flat[0]
    elif kind == "zeros":
        x[:] = 0
    elif kind == "bits":
        x = rng.integers(0, 1 << 32, SHAPE, dtype=np.uint64).astype(np.uint32).view(np.float32)
    elif kind == "with NaN":
        x[rng.random(SHAPE) < 0.2] = np.nan
        x[rng.random(SHAPE) < 0.1] = -np.inf
    elif kind == "integers":
        x = np.round(x * 4)
    return x


def holds(before: npt.NDArray[np.float32], after: npt.NDArray[np.float32], bound: ErrorBound | None) -> bool:
    """Whether what was loaded is what was stored, within the bound of the store (None: exactly), K and V apart."""
    for x, y in zip(before, after, strict=True):
        same = x.view(np.uint32) == y.view(np.uint32)
        if bound is None:
            if not same.all():
                return False
            continue
        finite = np.isfinite(x)
        with np.errstate(invalid="ignore", over="ignore"):
            a, b = x.astype(np.float64), y.astype(np.float64)
            span = float(a[finite].max() - a[finite].min()) if finite.any() else 0.0
            limit = bound.value * span if str(bound).startswith("rel") else bound.value
            good = np.where(finite, np.abs(a - b) <= limit, same)
        if not good.all():
            return False
    return True


@dataclass
class Record:
    """What the model knows of a record."""

    values: npt.NDArray[np.float32]
    bound: ErrorBound | None
    codec: str
    nbytes: int
    extent_nbytes: int
    pins: set[int] = field(default_factory=set)


class EngineModel(RuleBasedStateMachine):
    """The order of `held` is the order in which records leave: the coldest first."""

    @initialize(records=st.integers(2, 6), extent=st.sampled_from([16, 64, 256]), chunk=st.sampled_from([1, 2, 100]))
    def start(self, records: int, extent: int, chunk: int) -> None:
        from kvzip import engine as module

        self.module, self.chunk_before = module, module.CHUNK_BYTES
        module.CHUNK_BYTES = chunk * RAW_BYTES
        self.pool = kvzip.HostPool(records * 400, extent_bytes=extent)
        self.codec, self.mode = SETTINGS[-1]
        self.bound = BOUNDS[0]
        self.engine = kvzip.SwapEngine(self.pool, codec=self.codec, mode=self.mode, bound=self.bound, threads=1)
        self.held: dict[bytes, Record] = {}
        self.pinned: dict[int, ExitStack] = {}
        self.totals: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()
        self.tensor = np.zeros((BLOCKS, *SHAPE), np.float32)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.module.CHUNK_BYTES = self.chunk_before
        for stack in self.pinned.values():
            stack.close()
        self.engine.close()
        assert self.pool.stats().allocations == 0
        assert self.pool.free_bytes == self.pool.capacity_bytes
        self.pool.close()

    # ---- stores

    @rule(
        keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=BLOCKS, unique=True),
        kinds=st.lists(st.sampled_from(KINDS), min_size=BLOCKS, max_size=BLOCKS),
        seed=st.integers(0, 1000),
        measure=st.booleans(),
    )
    def store(self, keys: list[bytes], kinds: list[str], seed: int, measure: bool) -> None:
        ids = [int(i) for i in np.random.default_rng(seed).permutation(BLOCKS)[: len(keys)]]
        for i, kind in zip(ids, kinds, strict=False):
            self.tensor[i] = values(kind, seed + i)
        before = self.tensor.copy()
        view = BlockView([self.tensor], "2NHD", ids)
        codec = kvzip.get_codec(self.codec)
        batch = encode_records(view, codec, EncodeRequest(self.bound, self.mode, 1))
        sizes = [self.pool.round_up(r.nbytes) for r in batch.records]
        needed, free = sum(sizes), self.pool.free_bytes

        room = free + sum(r.extent_nbytes for k, r in self.held.items() if k in keys or not r.pins)
        if needed > room:
            counters = self.engine.stats()
            with pytest.raises(PoolExhaustedError) as caught:
                self.engine.store(keys, view, measure_error=measure)
            assert caught.value.free == room
            assert room < caught.value.requested <= needed
            assert self.engine.stats() == counters  # nothing was evicted, replaced or even allocated
            return
        evicted = []
        if needed > free:
            for key in keys:
                if key in self.held and needed > free:
                    free += self.held[key].extent_nbytes
            for key, record in self.held.items():
                if needed > free and key not in keys and not record.pins:
                    free += record.extent_nbytes
                    evicted.append(key)
        result = self.engine.store(keys, view, measure_error=measure).result()
        assert (result.blocks, result.raw_bytes) == (len(keys), len(keys) * RAW_BYTES)
        assert result.record_bytes == sum(r.nbytes for r in batch.records)
        assert result.evicted == len(evicted)
        assert result.violations == (0 if measure else None)
        assert result.fallbacks == batch.fallbacks
        assert np.array_equal(self.tensor.view(np.uint32), before.view(np.uint32))
        for key in evicted:
            del self.held[key]
        exact = codec.lossless_only or self.bound == ErrorBound.lossless()
        for i, key, record, size in zip(ids, keys, batch.records, sizes, strict=True):
            old = self.held.pop(key, None)
            pins = old.pins if old else set()
            self.held[key] = Record(before[i], None if exact else self.bound, self.codec, record.nbytes, size, pins)
        self.totals["stored_blocks"] += len(keys)
        self.totals["stored_raw_bytes"] += result.raw_bytes
        self.totals["stored_record_bytes"] += result.record_bytes
        self.totals["evicted_blocks"] += len(evicted)
        self.fallbacks.update(result.fallbacks)

    @rule(which=st.sampled_from(SETTINGS), bound=st.sampled_from(BOUNDS))
    def configure(self, which: tuple[str, str], bound: ErrorBound) -> None:
        self.codec, self.mode = which
        self.bound = bound
        made = self.engine.configure(codec=self.codec, mode=self.mode, bound=bound)
        assert (made.codec.name, made.mode, made.bound) == (self.codec, self.mode, bound)

    # ---- loads

    def blank(self, order: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Poisoned memory in another order of axes, and the same seen as ``2NHD``."""
        if order == "2HND":
            memory = np.full((BLOCKS, 2, 1, 5, 6), 7.0, np.float32)
            return memory, memory.swapaxes(2, 3)
        memory = np.full((BLOCKS, *SHAPE), 7.0, np.float32)
        return memory, memory

    @precondition(lambda self: self.held)
    @rule(data=st.data(), order=st.sampled_from(["2NHD", "2HND"]), seed=st.integers(0, 1000))
    def load(self, data: st.DataObject, order: str, seed: int) -> None:
        keys = data.draw(st.lists(st.sampled_from(sorted(self.held)), min_size=1, max_size=BLOCKS))
        ids = [int(i) for i in np.random.default_rng(seed).permutation(BLOCKS)[: len(keys)]]
        memory, seen = self.blank(order)
        result = self.engine.load(keys, BlockView([memory], order, ids)).result()
        assert (result.blocks, result.record_bytes) == (len(keys), sum(self.held[k].nbytes for k in keys))
        for i, key in zip(ids, keys, strict=True):
            record = self.held[key]
            assert holds(record.values, np.ascontiguousarray(seen[i]), record.bound), (key, record)
        rest = [i for i in range(BLOCKS) if i not in ids]
        assert (seen[rest] == 7.0).all()
        for key in keys:
            self.held[key] = self.held.pop(key)
        self.totals["loaded_blocks"] += len(keys)
        self.totals["loaded_raw_bytes"] += len(keys) * RAW_BYTES

    @precondition(lambda self: len(self.held) < len(KEYS))
    @rule(data=st.data(), others=st.lists(st.sampled_from(KEYS), max_size=3))
    def load_what_is_missing(self, data: st.DataObject, others: list[bytes]) -> None:
        missing = data.draw(st.sampled_from(sorted(set(KEYS) - set(self.held))))
        keys = [*others, missing]
        memory, _ = self.blank("2NHD")
        with pytest.raises(BlockNotFoundError) as caught:
            self.engine.load(keys, BlockView([memory], "2NHD", range(len(keys))))
        assert caught.value.keys == tuple(k for k in keys if k not in self.held)
        assert (memory == 7.0).all()
        self.totals["missing_blocks"] += len(caught.value.keys)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), where=st.integers(0, 10_000), bit=st.integers(0, 7))
    def load_what_is_damaged(self, data: st.DataObject, where: int, bit: int) -> None:
        victim = data.draw(st.sampled_from(sorted(self.held)))
        others = data.draw(st.lists(st.sampled_from(sorted(self.held)), max_size=BLOCKS - 1))
        keys = [*others, victim]
        entry = self.engine._index.find([victim])[0]
        at = where % entry.allocation.nbytes
        for offset, nbytes in entry.allocation.runs:
            if at < nbytes:
                at += offset
                break
            at -= nbytes
        memory, _ = self.blank("2NHD")
        self.pool._memory()[at] ^= 1 << bit
        with pytest.raises(CorruptRecordError):
            self.engine.load(keys, BlockView([memory], "2NHD", range(len(keys))))
        self.pool._memory()[at] ^= 1 << bit
        assert (memory == 7.0).all()
        for key in keys:  # it was used, if in vain
            self.held[key] = self.held.pop(key)
        self.totals["corrupt_blocks"] += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def take_a_record_out(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.held)))
        record = self.engine.read_record(key)
        held = self.held[key]
        header = kvzip.read_header(record)
        assert (len(record), header.record_bytes, header.codec) == (held.nbytes, held.nbytes, held.codec)
        assert holds(held.values, kvzip.decode(record), held.bound)

    # ---- the rest

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=4))
    def discard(self, keys: list[bytes]) -> None:
        found = set(keys) & set(self.held)
        assert self.engine.discard(keys) == len(found)
        for key in found:
            del self.held[key]
        self.totals["discarded_blocks"] += len(found)

    @precondition(lambda self: self.held and len(self.pinned) < 3)
    @rule(data=st.data(), number=st.integers(0, 10**9))
    def pin(self, data: st.DataObject, number: int) -> None:
        if number in self.pinned:
            return
        keys = data.draw(st.lists(st.sampled_from(sorted(self.held)), min_size=1, max_size=3))
        stack = ExitStack()
        stack.enter_context(self.engine.pin(keys))
        self.pinned[number] = stack
        for key in keys:
            self.held[key].pins.add(number)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.pinned)))
        self.pinned.pop(number).close()
        for record in self.held.values():
            record.pins.discard(number)

    @invariant()
    def keys_are_those_of_the_model(self) -> None:
        if hasattr(self, "engine"):
            assert [k for k in KEYS if self.engine.contains(k)] == [k for k in KEYS if k in self.held]

    @invariant()
    def order_is_that_of_the_model(self) -> None:
        if hasattr(self, "engine"):
            assert list(self.engine._index._policy.victims()) == list(self.held)

    @invariant()
    def statistics_are_exact(self) -> None:
        if not hasattr(self, "engine"):
            return
        s = self.engine.stats()
        records = list(self.held.values())
        assert s.records == len(records)
        assert s.raw_bytes == len(records) * RAW_BYTES
        assert s.record_bytes == s.pool.payload_bytes == sum(r.nbytes for r in records)
        assert s.ratio == (s.raw_bytes / s.record_bytes if records else 1.0)
        assert s.pinned == sum(bool(r.pins) for r in records)
        assert s.pool.allocations == len(records)
        assert s.pool.extent_bytes_used == sum(r.extent_nbytes for r in records)
        assert s.pool.free_bytes == self.pool.capacity_bytes - s.pool.extent_bytes_used
        assert s.pool.reserved_bytes == 0
        assert s.violations == 0
        assert s.fallbacks == dict(self.fallbacks)
        for name in (
            "stored_blocks",
            "stored_raw_bytes",
            "stored_record_bytes",
            "evicted_blocks",
            "loaded_blocks",
            "loaded_raw_bytes",
            "missing_blocks",
            "corrupt_blocks",
            "discarded_blocks",
        ):
            assert getattr(s, name) == self.totals[name], name
        self.pool.check()


TestEngineModel = EngineModel.TestCase
TestEngineModel.settings = settings(max_examples=60, stateful_step_count=40)


def test_the_model_meets_what_it_is_for() -> None:
    """A model that never evicts, refuses or replaces would prove nothing: count what happens in a fixed run."""
    rng = np.random.default_rng(0)
    machine = EngineModel()
    machine.start(records=4, extent=16, chunk=2)
    refused = replaced = 0
    try:
        for step in range(120):
            machine.codec, machine.mode = SETTINGS[step % len(SETTINGS)]
            machine.configure((machine.codec, machine.mode), BOUNDS[step % len(BOUNDS)])
            keys = [KEYS[int(i)] for i in rng.permutation(len(KEYS))[: 1 + step % BLOCKS]]
            before = dict(machine.totals)
            replaced += any(k in machine.held for k in keys)
            machine.store(keys, [KINDS[int(i)] for i in rng.integers(len(KINDS), size=BLOCKS)], step, step % 3 == 0)
            refused += before == dict(machine.totals)
            machine.keys_are_those_of_the_model()
            machine.order_is_that_of_the_model()
            machine.statistics_are_exact()
        assert machine.totals["evicted_blocks"] > 20
        assert refused > 5
        assert replaced > 20
    finally:
        machine.teardown()
