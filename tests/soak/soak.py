# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Random operations on engines, with faults, against a plain dict: what is held, what it holds, and what is left over.

    python tests/soak/soak.py --operations 1000000 --processes 2 --json soak.json
    python tests/soak/soak.py --seed 1 --only 17                       # one episode again
    python tests/soak/soak.py --seed 1 --first 500                     # go on from an episode

A run is made of episodes of 1,000 operations. Each has an engine of its own, of random capacity, extents, policy and
codec, either on host memory or on a GPU made of host memory (tests/fake_cuda.py), whose calls fail at random. After
every operation the engine has the model's keys and sums, and what it evicted was the model's coldest (LRU); every load
is compared with what was stored, within the bound. After every episode nothing is left: bytes of the pool, device
memory, streams, events, threads; over the run, memory and file descriptors stay as they were.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_cuda import FakeDriver, FakeTensor, cuda_error
from scripts import give_result, seeded_parser

import kvzip
from kvzip import (
    BlockNotFoundError,
    BlockView,
    ConfigError,
    CorruptRecordError,
    ErrorBound,
    HostPool,
    KvzipError,
    PoolExhaustedError,
    SwapEngine,
    Transfer,
    TransferError,
)
from kvzip.benchmark import host_environment
from kvzip.coding import compare_pages
from kvzip.device import DeviceSwap
from kvzip.errors import NativeError
from kvzip.memory import PageableMemory, Region
from kvzip.staging import Staging
from kvzip.transfer import TransferResult
from kvzip.transport import CudaTransport
from kvzip.types import DType

EPISODE = 1000  # operations
BLOCKS = 12  # of page memory: stores read the first half, loads write the second
SHAPE = (2, 5, 1, 6)  # K and V, tokens, heads, head_dim, bfloat16
RAW_BYTES = 120
KEYS = [b"key-%d" % i for i in range(16)]
POISON = 0x7A7A
FATAL = ("cudaErrorIllegalAddress", 700)
CODINGS = [("raw", "none"), ("cuszp", "fixed"), ("cuszp", "plain"), ("cuszp", "outlier"), ("cuszp", "rice")]
TABLE = ErrorBound.channel_table(np.random.default_rng(3).uniform(1e-3, 0.1, (1, 6)))
BOUNDS = [
    ErrorBound.relative(1e-3),
    ErrorBound.relative(0.3),
    ErrorBound.absolute(0.25),
    ErrorBound.absolute(1e-30),
    ErrorBound.lossless(),
    ErrorBound.token_rms(0.1),
    TABLE,
]

DEVICE_CALLS = (
    *("malloc", "memset", "copy", "copy_between", "mapped_copy", "encode", "decode", "encode_call", "decode_call"),
    *("store_call", "load_call", "event_create", "event_record", "event_synchronize", "event_wait", "set_device"),
    *("stream_wait_event", "stream_synchronize"),
)

Bits = npt.NDArray[np.uint16]


def block_values() -> Bits:
    """Blocks to store: normal, constant, zeros, any bits, with NaN and infinities, integers."""
    rng = np.random.default_rng(1)
    count = 96
    x = rng.normal(size=(count, *SHAPE)) * np.exp2(rng.integers(-8, 8, (count, 1, 1, 1, 1)))
    kind = np.arange(count) % 6
    x[kind == 1] = x[kind == 1][:, :1, :1, :1, :1]
    x[kind == 2] = 0
    x[kind == 4] = np.where(rng.random(x[kind == 4].shape) < 0.2, np.nan, x[kind == 4])
    x[kind == 5] = np.round(4 * x[kind == 5])
    bits = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    bits[kind == 3] = rng.integers(0, 1 << 16, bits[kind == 3].shape, dtype=np.uint16)
    return bits


VALUES = block_values()


class Broken(AssertionError):
    """The engine is not what the model says."""


def result_of(transfer: Transfer) -> TransferResult:
    """What a transfer did; an exception of this thread while it waits is no end of the transfer."""
    try:
        return transfer.result(60)
    except ZeroDivisionError:
        return transfer.result(60)


def require(holds: object, what: str) -> None:
    """Raise `Broken` unless it holds."""
    if not holds:
        raise Broken(what)


@dataclass(eq=False)
class Record:
    """What the model knows of a record."""

    values: Bits
    bound: ErrorBound | None  # None: exact
    asked: ErrorBound  # of the encoder
    pins: set[int] = field(default_factory=set)

    def check(self, loaded: Bits) -> None:
        """Whether what was loaded is what was stored, within the bound, K and V apart."""
        for x, y in zip(self.values, loaded, strict=True):
            if self.bound is None:
                require(np.array_equal(x, y), "an exact record came back as something else")
            else:
                error = compare_pages(x, y, DType.BFLOAT16, self.bound)
                require(error.violations == 0, f"{error} under the bound {self.bound}")


@dataclass(eq=False)
class Flight:
    """A transfer under way."""

    transfer: Transfer
    keys: list[bytes]
    ids: list[int]
    fresh: dict[bytes, Record] | None  # of a store
    records: list[Record]  # of a load


class Mapped:
    """Pageable memory that says it is pinned: the fake GPU can address it."""

    def allocate(self, nbytes: int) -> Region:
        """See `kvzip.memory.MemoryResource`."""
        return Region(np.zeros(nbytes, np.uint8), pinned=True)


class Episode:
    """One engine and its model. The order of `held` is that in which records leave under LRU."""

    def __init__(self, seed: int, number: int, counts: Counter[str]) -> None:
        self.rng = random.Random((seed << 32) | number)
        self.counts = counts
        self.on_gpu = number % 2 == 1
        self.policy = self.rng.choice(("lru", "lru", "arc", "s3fifo"))
        small = self.on_gpu and self.rng.random() < 0.6
        self.pool = HostPool(
            self.rng.randint(3, 14) * 512,
            extent_bytes=256 if small else self.rng.choice((16, 64, 256)),
            resource=Mapped() if small else None,
            headroom=self.rng.choice((0.0, 0.3)),
        )
        chooses = self.rng.choice((None, None, "latency", "balanced", "capacity"))
        self.engine = SwapEngine(self.pool, policy=self.policy, threads=1, bound=BOUNDS[0], controller=chooses)
        self.codec, self.mode, self.bound = "cuszp", "fixed", BOUNDS[0]
        self.pages = np.full((BLOCKS, *SHAPE), POISON, np.uint16)
        self.driver: FakeDriver | None = None
        if self.on_gpu:
            self.driver = FakeDriver()
            staging = Staging(chunk_bytes=self.rng.choice((1, 2, 100)) * RAW_BYTES, slots=self.rng.choice((1, 3)))
            transport = CudaTransport(0, driver=self.driver, staging=staging, resource=PageableMemory())
            engine = self.engine
            self.swap = DeviceSwap(0, engine._index, self.pool, engine._store_lock, engine, staging, transport)
            engine._devices["cuda:0"] = self.swap
            self.view = BlockView([FakeTensor(self.pages)], "2NHD")
        else:
            self.view = BlockView([self.pages], "2NHD", dtype="bfloat16")
        self.held: dict[bytes, Record] = {}
        self.pinned: dict[int, contextlib.ExitStack] = {}
        self.evicted = 0
        self.lost = self.encoder_fails = False

    # ---- what every operation is held against

    def check(self) -> None:
        """Keys, sums, order."""
        stats = self.engine.stats()
        require(set(self.engine.list_keys()) == set(self.held), "other keys are held")
        sizes = self.engine.record_sizes(self.held)
        require(stats.records == stats.pool.allocations == len(self.held), "another number of records")
        require(stats.raw_bytes == RAW_BYTES * len(self.held), "raw bytes do not add up")
        require(stats.pool.extent_bytes_used == sum(sizes), "extents do not add up")
        require(stats.record_bytes == stats.pool.payload_bytes, "bytes of records do not add up")
        require(stats.pool.reserved_bytes == 0, "bytes stay promised")
        require(stats.pinned == sum(bool(r.pins) for r in self.held.values()), "pins do not add up")
        require(stats.evicted_blocks == self.evicted, "evictions do not add up")
        require(stats.violations == 0, "a bound was violated")
        require(self.engine._index._loads == 0, "a load did not end")
        leavable = sum(s for s, r in zip(sizes, self.held.values(), strict=True) if not r.pins)
        require(self.engine._index._leavable == leavable, "bytes that may leave do not add up")
        if self.policy == "lru":
            require(list(self.engine._index._policy.victims()) == list(self.held), "another order")

    def note_evictions(self, keys: Sequence[bytes], *, exactly: int | None = None, replaced: bool = False) -> None:
        """Take what left for a store of `keys` out of the model; with `replaced`, records of the keys among them."""
        left = [k for k in self.held if not self.engine.contains(k)]
        own = [k for k in left if k in keys]
        require(not any(self.held[k].pins for k in left if k not in own), "a pinned record was evicted")
        require(replaced or not own, "a record left for the store that was to replace it")
        if exactly is not None:
            require(len(left) == exactly, f"{len(left)} records left, the store said {exactly}")
        if self.policy == "lru":
            coldest = [k for k, r in self.held.items() if k not in keys and not r.pins]
            require(set(left) - set(own) == set(coldest[: len(left) - len(own)]), "not the coldest left")
        for key in left:
            del self.held[key]
        self.evicted += len(left)

    def keep(self, fresh: dict[bytes, Record]) -> None:
        """A store has ended."""
        for key, record in fresh.items():
            old = self.held.pop(key, None)
            self.held[key] = replace(record, pins=old.pins if old is not None else set())

    # ---- operations

    def some_keys(self, most: int = 4) -> list[bytes]:
        return self.rng.sample(KEYS, self.rng.randint(1, most))

    def fill(self, ids: Sequence[int]) -> None:
        for i in ids:
            self.pages[i] = VALUES[self.rng.randrange(len(VALUES))]

    def begin_store(self, keys: list[bytes], ids: list[int], **options: Any) -> Flight:
        self.fill(ids)
        exact = self.encoder_fails or self.codec == "raw" or self.bound == ErrorBound.lossless()
        bound = None if exact else self.bound
        fresh = {k: Record(self.pages[i].copy(), bound, self.bound) for k, i in zip(keys, ids, strict=True)}
        transfer = self.engine.store(keys, self.view[ids], **options)
        return Flight(transfer, keys, ids, fresh, [])

    def store(self, name: str = "store") -> None:
        """Encode a few blocks; whatever it ends with, the model follows."""
        ids = self.rng.sample(range(BLOCKS // 2), self.rng.randint(1, 4))
        options: dict[str, Any] = {}
        if self.rng.random() < 0.1:
            options["measure_error"] = True
        if self.rng.random() < 0.1:
            options["sink"] = [self.rng.random() < 0.5 for _ in ids]
        if self.rng.random() < 0.1:
            options["coding"] = self.rng.choice(("raw", "encoded"))
        keys = self.rng.sample(KEYS, len(ids))
        others = [i for i in range(BLOCKS) if i not in ids]
        before = self.pages[others]
        owed = self.evicted - self.engine._index._reported  # by stores that failed
        try:
            flight = self.begin_store(keys, ids, **options)
            result = result_of(flight.transfer)
        except PoolExhaustedError:
            self.counts[f"{name}: PoolExhaustedError"] += 1
            # An encoder that fails in the middle may have made room before its blocks, raw, do not fit.
            self.note_evictions(keys, exactly=0 if name == "store" else None)
        except (KvzipError, ZeroDivisionError) as error:
            self.counts[f"{name}: {type(error).__name__}"] += 1
            require(name != "store", f"a store failed without a fault: {error!r}")
            self.note_evictions(keys, replaced="pool.write" in name)  # memory that fails once the old records left
        else:
            self.counts[f"{name}: ended well"] += 1
            require(result.blocks == len(ids), "another number of blocks")
            require(not result.violations, "a store violated its bound")
            self.note_evictions(keys, exactly=result.evicted - owed)
            assert flight.fresh is not None
            for i, record in zip(ids, flight.fresh.values(), strict=True):
                require(np.array_equal(self.pages[i], record.values), "a store changed its pages")
            if "sink" in options and self.policy == "lru":  # in which order those of one store leave is not promised
                keys = list(self.engine._index._policy.victims())[-len(keys) :]
                require(set(keys) == set(flight.fresh), "what was stored last is not the hottest")
            self.keep({k: flight.fresh[k] for k in keys})
        require(np.array_equal(self.pages[others], before), "a store changed pages")

    def begin_load(self, keys: list[bytes], ids: list[int]) -> Flight:
        records = [self.held[k] for k in keys]
        self.pages[ids] = POISON
        transfer = self.engine.load(keys, self.view[ids])
        return Flight(transfer, keys, ids, None, records)

    def touch(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.held[key] = self.held.pop(key)

    def load(self, name: str = "load") -> None:
        """Decode a few blocks and compare them."""
        if not self.held:
            return
        keys = self.rng.choices(sorted(self.held), k=self.rng.randint(1, 4))
        ids = self.rng.sample(range(BLOCKS // 2, BLOCKS), len(keys))
        before = self.pages.copy()
        begun = False
        try:
            flight = self.begin_load(keys, ids)
            begun = True
            result_of(flight.transfer)
        except (KvzipError, ZeroDivisionError) as error:
            self.counts[f"{name}: {type(error).__name__}"] += 1
            require(name != "load", f"a load failed without a fault: {error!r}")
            if not (self.lost and not begun and "is lost to this process" in str(error)):
                self.touch(keys)
        else:
            self.counts[f"{name}: ended well"] += 1
            for i, record in zip(ids, flight.records, strict=True):
                record.check(self.pages[i])
            self.touch(keys)
        others = [i for i in range(BLOCKS) if i not in ids]
        require(np.array_equal(self.pages[others], before[others]), "a load wrote beside its pages")

    def load_missing(self) -> None:
        """A key that is not held."""
        missing = sorted(set(KEYS) - set(self.held))
        if not missing:
            return
        keys = [*self.some_keys(2), self.rng.choice(missing)]
        before = self.pages.copy()
        try:
            self.engine.load(keys, self.view[range(BLOCKS - len(keys), BLOCKS)])
        except BlockNotFoundError as error:
            require(error.keys == tuple(k for k in keys if k not in self.held), "other keys are missing")
        else:
            raise Broken("a key that is not held was loaded")
        require(np.array_equal(self.pages, before), "a load of a missing key wrote")
        self.counts["load of a missing key: BlockNotFoundError"] += 1

    def load_damaged(self) -> None:
        """One bit of a record is wrong while it is loaded."""
        if not self.held:
            return
        victim = self.rng.choice(sorted(self.held))
        keys = [*self.rng.choices(sorted(set(self.held) - {victim}) or [victim], k=self.rng.randint(0, 2)), victim]
        keys = list(dict.fromkeys(keys))
        ids = self.rng.sample(range(BLOCKS // 2, BLOCKS), len(keys))
        entry = self.engine._index.find([victim])[0]
        header = entry.contents.header_bytes
        place = self.rng.randrange(header, entry.allocation.nbytes)  # a GPU does not look at the header
        for view in self.pool.views(entry.allocation):
            if place < view.size:
                break
            place -= view.size
        bit = np.uint8(1 << self.rng.randrange(8))
        records = [self.held[k] for k in keys]
        self.pages[ids] = POISON
        view[place] ^= bit
        try:
            result_of(self.engine.load(keys, self.view[ids]))
        except CorruptRecordError as error:
            if self.on_gpu:
                require(error.blocks == (len(keys) - 1,), "other blocks are called damaged")
        else:
            raise Broken("a damaged record was loaded")
        finally:
            view[place] ^= bit
        require((self.pages[ids[-1]] == POISON).all(), "a damaged record wrote to its pages")
        if self.on_gpu:
            for i, record in zip(ids[:-1], records[:-1], strict=True):
                record.check(self.pages[i])
        self.touch(keys)
        self.counts["load of a damaged record: CorruptRecordError"] += 1

    def read(self) -> None:
        """A record out of the pool."""
        if self.held:
            key = self.rng.choice(sorted(self.held))
            made = self.engine.read_record(key)
            decoded = kvzip.decode(made, bound=self.held[key].asked)
            self.held[key].check(decoded.view(np.uint16).reshape(SHAPE))
            self.counts["record read and decoded"] += 1

    def discard(self) -> None:
        keys = self.some_keys(3)
        found = [k for k in keys if k in self.held]
        require(self.engine.discard(keys) == len(found), "another number was discarded")
        for key in found:
            del self.held[key]
        self.counts["discard"] += 1

    def pin(self) -> None:
        if self.held and len(self.pinned) < 3:
            keys = self.rng.sample(sorted(self.held), min(len(self.held), self.rng.randint(1, 3)))
            number = self.rng.randrange(1 << 60)
            self.pinned[number] = contextlib.ExitStack()
            self.pinned[number].enter_context(self.engine.pin(keys))
            for key in keys:
                self.held[key].pins.add(number)
            self.counts["pin"] += 1

    def unpin(self) -> None:
        if self.pinned:
            number = self.rng.choice(sorted(self.pinned))
            self.pinned.pop(number).close()
            for record in self.held.values():
                record.pins.discard(number)
            self.counts["unpin"] += 1

    def configure(self) -> None:
        self.codec, self.mode = self.rng.choice(CODINGS)
        self.bound = self.rng.choice(BOUNDS)
        self.engine.configure(codec=self.codec, mode=self.mode, bound=self.bound)
        self.counts["configure"] += 1

    def look(self) -> None:
        """Statistics and metrics, and the pool's own check."""
        require(self.engine.metrics().value("kvzip_records") == len(self.held), "metrics do not add up")
        self.pool.check()
        self.counts["metrics"] += 1

    # ---- faults

    def failing_codec(self) -> None:
        """The encoder fails in one way or another: the blocks are kept raw."""
        if self.on_gpu or self.codec == "raw":
            return
        error = self.rng.choice([NativeError("injected", status=1), MemoryError("injected"), ValueError("injected")])
        codec = kvzip.get_codec("cuszp")

        def fail(*arguments: object) -> None:
            self.counts[f"fault: encoder raises {type(error).__name__}"] += 1
            raise error

        fallbacks = self.engine.stats().fallbacks.get("encoder_failed", 0)
        with replaced(codec, "encode_blocks", fail):
            self.encoder_fails = True
            self.store("store, encoder fails")
            self.encoder_fails = False
        require(self.engine.stats().fallbacks.get("encoder_failed", 0) >= fallbacks, "fallbacks do not add up")

    def failing_pool(self) -> None:
        """Host memory cannot be written, or another engine is faster: a step of the pool fails."""
        call = self.rng.choice(("take", "write"))
        if self.on_gpu or self.lost:
            return
        error = PoolExhaustedError("injected", requested=1, free=0) if call == "take" else ZeroDivisionError("injected")
        real, calls = getattr(self.pool, call), []
        at = self.rng.randint(1, 3)

        def fail(*arguments: Any, **named: Any) -> Any:
            calls.append(1)
            if len(calls) == at:
                self.counts[f"fault: pool.{call} raises {type(error).__name__}"] += 1
                raise error
            return real(*arguments, **named)

        with replaced(self.pool, call, fail):
            self.store(f"store, pool.{call} fails")

    def failing_device(self) -> None:
        """A call of the device fails once, in a store or a load."""
        if self.driver is None:
            return
        name = self.rng.choice(DEVICE_CALLS)
        error = self.rng.choice([cuda_error(), NativeError("injected", status=1), ZeroDivisionError("injected")])
        self.driver.fail[name] = error
        getattr(self, self.rng.choice(("store", "load")))("store or load, the device fails")
        if name not in self.driver.fail:  # it was called
            self.counts[f"fault: {name} raises {type(error).__name__}"] += 1
        self.driver.fail.clear()

    def losing_device(self) -> None:
        """The device fails for good: nothing on it works from then on, and the records stay readable."""
        if self.driver is None or self.lost:
            return
        real = self.driver._called

        def fail(name: str, *, held: bool = True) -> None:
            raise cuda_error(*FATAL)

        self.counts["fault: the device is lost"] += 1
        self.driver._called = fail  # type: ignore[method-assign]
        self.lost = True
        for work in (self.store, self.load, self.store):
            work("store or load, the device is lost")
        if self.swap.lost is not None:
            require(not self.engine.usable, "the engine calls itself usable")
        for key in self.held:
            self.read_on_host(key)
        self.driver._called = real  # type: ignore[method-assign]
        if self.swap.lost is None:  # nothing was tried: the pool was empty, say
            self.lost = False

    def read_on_host(self, key: bytes) -> None:
        pages = np.full((1, *SHAPE), POISON, np.uint16)
        self.engine.load([key], BlockView([pages], "2NHD", dtype="bfloat16"))
        self.held[key].check(pages[0])

    def flights(self) -> None:
        """Several transfers under way at a time, some given up, waited for in any order."""
        if self.driver is None or self.lost:
            return
        self.driver.hold.clear()
        timer = threading.Timer(0.002, self.driver.hold.set)  # a first transfer may wait for the device
        timer.start()
        flights: list[Flight] = []
        reading, writing = list(range(BLOCKS // 2)), list(range(BLOCKS // 2, BLOCKS))
        self.rng.shuffle(reading)
        self.rng.shuffle(writing)
        stored: set[bytes] = set()
        for _ in range(self.rng.randint(2, 6)):
            if self.rng.random() < 0.5 and reading:
                flights.append(self.begin_store([self.rng.choice(KEYS)], [reading.pop()]))
                stored |= set(flights[-1].keys)
            else:
                ready = [k for k in sorted(self.held) if k not in stored and self.engine.contains(k)]
                if ready and writing:
                    with contextlib.suppress(BlockNotFoundError):  # it left for a store meanwhile
                        flights.append(self.begin_load([self.rng.choice(ready)], [writing.pop()]))
        given_up = [f for f in flights if self.rng.random() < 0.2 and f.transfer.cancel()]
        self.driver.hold.set()
        timer.cancel()
        timer.join()
        order = list(flights)
        self.rng.shuffle(order)
        ended: dict[int, bool] = {}
        for flight in order:
            try:
                result_of(flight.transfer)
                ended[id(flight)] = True
                require(flight not in given_up, "a transfer that was given up ended well")
            except PoolExhaustedError:
                ended[id(flight)] = False
            except TransferError:
                ended[id(flight)] = False
                require(flight in given_up, "a transfer failed without a fault")
        touched = []
        fresh_keys: dict[bytes, Record] = {}
        for flight in flights:
            if flight.fresh is None:
                touched += flight.keys
                if ended[id(flight)]:
                    flight.records[0].check(self.pages[flight.ids[0]])
                else:
                    require((self.pages[flight.ids] == POISON).all(), "a transfer that was given up wrote")
            elif ended[id(flight)]:
                fresh_keys.update(flight.fresh)
        self.counts["several transfers under way"] += 1
        self.counts["transfer given up"] += len(given_up)
        self.settle_flights(fresh_keys)

    def settle_flights(self, fresh: dict[bytes, Record]) -> None:
        """After several stores: what is held is what was held or stored; in what order they left is not modelled."""
        evicted = self.engine.stats().evicted_blocks - self.evicted
        left = [k for k in {**self.held, **fresh} if not self.engine.contains(k)]
        require(not any(self.held[k].pins for k in left if k in self.held), "a pinned record was evicted")
        require(len(left) <= evicted, "records are gone that nobody evicted")
        self.evicted += evicted
        self.keep(fresh)
        for key in left:
            self.held.pop(key, None)
        order = list(self.engine._index._policy.victims())
        self.held = {k: self.held[k] for k in order}

    def no_thread(self) -> None:
        """The system gives no thread while a transfer needs one."""
        if self.driver is None or self.lost:
            return

        def refuse(thread: threading.Thread) -> None:
            self.counts["fault: no thread"] += 1
            raise RuntimeError("can't start new thread")

        with replaced(threading.Thread, "start", refuse):
            getattr(self, self.rng.choice(("store", "load")))("store or load, no thread")

    def fork(self) -> None:
        """The child of a fork says what it can do, and the parent goes on."""
        sys.stdout.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the process has threads is the point
            child = os.fork()
        if child == 0:
            status = 1
            try:
                if self.on_gpu:
                    with contextlib.suppress(ConfigError):
                        self.engine.store([b"a"], self.view[[0]])
                        os._exit(2)
                    status = int(self.engine.usable)
                else:
                    for key in self.held:
                        self.read_on_host(key)
                    status = int(not self.engine.usable)
                self.engine.close()
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        require(status == 0, f"the child of a fork ended with {status}")
        self.counts["fork"] += 1

    # ---- an episode

    OPERATIONS = (
        (30, "store"),
        (26, "load"),
        (3, "load_missing"),
        (4, "load_damaged"),
        (3, "read"),
        (5, "discard"),
        (4, "pin"),
        (5, "unpin"),
        (3, "configure"),
        (1, "look"),
        (3, "failing_codec"),
        (3, "failing_pool"),
        (9, "failing_device"),
        (3, "flights"),
        (0.5, "no_thread"),
        (0.02, "losing_device"),
        (0.01, "fork"),
    )
    NAMES = tuple(name for _, name in OPERATIONS)
    WEIGHTS = tuple(weight for weight, _ in OPERATIONS)

    def run(self, operations: int) -> int:
        """So many operations, then the end; returns how many there were: a lost device ends it early."""
        done = 0
        while done < operations and not self.lost:
            name = self.rng.choices(self.NAMES, self.WEIGHTS)[0]
            try:
                getattr(self, name)()
                self.check()
            except Exception as error:
                raise Broken(f"operation {done}, {name}: {type(error).__name__}: {error}") from error
            done += 1
        self.close()
        return done

    def close(self) -> None:
        """Nothing is left."""
        for stack in self.pinned.values():
            stack.close()
        self.engine.close()
        self.pool.check()
        require(self.pool.stats().allocations == 0, "allocations are left in the pool")
        require(self.pool.free_bytes == self.pool.capacity_bytes, "bytes are left in the pool")
        self.pool.close()
        if self.driver is not None:
            del self.swap
            self.engine._devices.clear()
            if self.driver.events:
                gc.collect()  # exceptions keep frames, and frames keep transfers
            require(not self.driver.memory, "device memory is left")
            require(not self.driver.events, "events are left")
            require(not self.driver.streams, "streams are left")


@contextlib.contextmanager
def replaced(owner: Any, name: str, other: Any) -> Iterator[None]:
    """Another attribute for a time."""
    own = name in vars(owner)
    real = vars(owner).get(name)
    setattr(owner, name, other)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, real)
        else:
            delattr(owner, name)


def resources() -> dict[str, int]:
    """What this process has now; what the allocator keeps of freed memory does not count."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # a C library that has no such function
        ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return {
        "rss_kib": int(status.split("VmRSS:")[1].split()[0]),
        "threads": int(status.split("Threads:")[1].split()[0]),
        "file_descriptors": len(os.listdir("/proc/self/fd")),
    }


def run(
    operations: int, seed: int, first: int = 0, progress: Callable[[int, int], None] = lambda done, episode: None
) -> dict[str, Any]:
    """Run episodes from `first` on until there were so many operations.

    Raises:
        Broken: the engine is not what the model says; the message names the episode.
    """
    counts: Counter[str] = Counter()
    marks = [{"operations": 0, **resources()}]
    done, episode, started = 0, first, time.perf_counter()
    while done < operations:
        try:
            one = Episode(seed, episode, counts)
            done += one.run(min(EPISODE, operations - done))
            del one
        except Exception as error:
            raise Broken(
                f"episode {episode} of seed {seed}, {error}; again with "
                f"python tests/soak/soak.py --seed {seed} --only {episode}"
            ) from error
        episode += 1
        progress(done, episode)
        if done >= operations * len(marks) / 4:
            marks.append({"operations": done, **resources()})
    return report(seed, first, episode - first, done, time.perf_counter() - started, counts, [marks])


def report(
    seed: int, first: int, episodes: int, done: int, seconds: float, counts: Counter[str], marks: list[list[Any]]
) -> dict[str, Any]:
    """What a run did, for a file; `marks` are the resources of each process in the course of it."""
    faults = {k.removeprefix("fault: "): n for k, n in sorted(counts.items()) if k.startswith("fault: ")}
    return {
        "what": "random operations with faults on engines, against a model",
        "environment": host_environment(),
        "settings": {"seed": seed, "first_episode": first, "episodes": episodes, "operations_of_each": EPISODE},
        "operations": done,
        "seconds": round(seconds, 1),
        "faults": sum(faults.values()),
        "faults_by_kind": faults,
        "outcomes": {k: n for k, n in sorted(counts.items()) if not k.startswith("fault: ")},
        "resources": marks,
    }


def run_processes(operations: int, seed: int, first: int, processes: int) -> dict[str, Any]:
    """The same, split over processes, each with episodes of its own.

    Raises:
        Broken: one of them failed; its output follows.
    """
    share = -(-operations // processes // EPISODE) * EPISODE
    counts: Counter[str] = Counter()
    marks, done, episodes, started = [], 0, 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for i in range(processes):
            path = Path(folder, str(i))
            # A lost device ends an episode early, so that a process may need more of them than this.
            begin = first + i * 2 * share // EPISODE
            command = [sys.executable, "-X", "faulthandler", __file__, "--seed", str(seed), "--first", str(begin)]
            command += ["--operations", str(min(share, operations - i * share)), "--json", str(path)]
            pipe = subprocess.PIPE
            running.append((subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True), path))
        for process, path in running:
            output, _ = process.communicate()
            require(process.returncode == 0, f"a process ended with {process.returncode}:\n{output[-4000:]}")
            one = json.loads(path.read_text())
            done, episodes = done + one["operations"], episodes + one["settings"]["episodes"]
            counts.update(one["outcomes"])
            counts.update({f"fault: {k}": n for k, n in one["faults_by_kind"].items()})
            marks += one["resources"]
    return report(seed, first, episodes, done, time.perf_counter() - started, counts, marks)


def check_flat(marks: Sequence[dict[str, int]]) -> None:
    """That nothing grew from the first quarter to the end.

    Raises:
        Broken: something did.
    """
    early, late = marks[1], marks[-1]
    require(late["rss_kib"] <= early["rss_kib"] + (8 << 10), f"memory grew from {early} to {late}")
    for name in ("threads", "file_descriptors"):
        require(late[name] <= early[name], f"{name} grew from {early} to {late}")


def main() -> int:
    """Command line."""
    parser = seeded_parser("random operations with faults against a model", "operations", 100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first episode")
    parser.add_argument("--only", type=int, help="run this episode alone")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    if options.only is not None:
        options.first, options.operations = options.only, EPISODE

    def progress(done: int, episode: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} operations, {episode} episodes", end="", file=sys.stderr, flush=True)

    if options.processes > 1:
        result = run_processes(options.operations, options.seed, options.first, options.processes)
    else:
        result = run(options.operations, options.seed, options.first, progress)
        if options.operations >= 4 * EPISODE:
            check_flat(result["resources"][0])
    give_result(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
