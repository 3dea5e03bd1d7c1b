# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The engine's GPU side, on a GPU made of host memory (tests/fake_cuda.py)."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import zlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fake_cuda
import numpy as np
import pytest
from fake_cuda import FakeDriver, FakeTensor, Mapped, cuda_error

from kvzip import (
    BlockLayout,
    BlockNotFoundError,
    BlockView,
    BoundPolicy,
    ConfigError,
    CorruptRecordError,
    CudaError,
    ErrorBound,
    HostPool,
    PoolExhaustedError,
    SwapEngine,
    Transfer,
    TransferError,
)
from kvzip.backends.base import EncodeRequest, PageCodec
from kvzip.calibration import CalibrationTable
from kvzip.controller import Controller, Prior
from kvzip.device import DeviceSwap
from kvzip.errors import NativeError
from kvzip.index import RecordIndex
from kvzip.integrity import Integrity
from kvzip.memory import PageableMemory
from kvzip.pool import Room
from kvzip.pressure import BoundPressure
from kvzip.record import Reason, read_header
from kvzip.small import MOST_PLANS, TICKETS, SmallLoads, SmallStores
from kvzip.staging import Staging, chunk_bounds, tapered_bounds
from kvzip.transport import CudaTransport
from kvzip.types import DType

BLOCKS = 12


class Rig:
    """An engine with a GPU made of host memory, and blocks on it."""

    def __init__(
        self,
        *,
        capacity: int = 1 << 22,
        chunk_blocks: int = 2,
        slots: int = 3,
        reaper_seconds: float = 0.5,
        **settings: Any,
    ) -> None:
        rng = np.random.default_rng(5)
        values = rng.normal(size=(2, BLOCKS, 2, 16, 2, 32)).astype(np.float32)
        values[:, 3, 0, 2, 1, 5] = np.nan
        self.arrays = [np.ascontiguousarray(v.view(np.uint32) >> 16).astype(np.uint16) for v in values]
        self.tensors = [FakeTensor(a) for a in self.arrays]
        self.view = BlockView(self.tensors, "2NHD")
        self.original = [a.copy() for a in self.arrays]
        self.keys = [b"key-%d" % i for i in range(BLOCKS)]
        self.driver = FakeDriver()
        resource = Mapped() if settings.pop("small", False) else None
        self.pool = HostPool(capacity, extent_bytes=settings.pop("extent_bytes", 256), resource=resource, headroom=0.25)
        self.engine = SwapEngine(self.pool, **settings)
        staging = Staging(chunk_bytes=chunk_blocks * self.view.layout.nbytes, slots=slots)
        transport = CudaTransport(0, driver=self.driver, staging=staging, resource=PageableMemory())
        self.swap = DeviceSwap(
            0, self.engine._index, self.pool, self.engine._store_lock, self.engine, staging, transport
        )
        self.swap._reaper.EVERY_SECONDS = reaper_seconds
        self.engine._devices["cuda:0"] = self.swap

    def poison(self) -> None:
        for array in self.arrays:
            array[:] = 0xA5A5

    def close(self) -> None:
        self.engine.close()
        self.engine.close()  # twice does no harm
        self.pool.check()
        assert self.pool.stats().allocations == 0
        self.pool.close()
        gc.collect()  # exceptions keep frames, and frames keep transfers
        assert not self.driver.memory
        assert not self.driver.events
        assert not self.driver.streams


@contextlib.contextmanager
def given_away(pool: HostPool) -> Iterator[list[np.ndarray]]:
    """All free bytes of a pool, filled by somebody else."""
    rooms: list[Room] = []
    for nbytes in [pool.extent_bytes << i for i in range(20)][::-1]:
        while (room := pool.try_take(nbytes)) is not None:
            rooms.append(room)
    parts = [pool._region.array[at : at + nbytes] for room in rooms for at, nbytes in room.runs]
    for part in parts:
        part[:] = 0x77
    yield parts
    for room in rooms:
        room.close()


@pytest.fixture(params=["worker", "small"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """Transfers by the worker, and queued whole."""
    made = Rig(bound=ErrorBound.lossless(), small=request.param == "small")
    yield made
    made.close()


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("chunk_blocks", [1, 5, 100])
def test_blocks_come_back_into_other_blocks(slots: int, chunk_blocks: int) -> None:
    rig = Rig(bound=ErrorBound.lossless(), slots=slots, chunk_blocks=chunk_blocks)
    stored = rig.engine.store(rig.keys, rig.view).result(10)
    assert stored.blocks == BLOCKS
    assert stored.raw_bytes == rig.view.nbytes
    assert stored.record_bytes == rig.pool.stats().payload_bytes
    rig.poison()
    order = np.random.default_rng(1).permutation(BLOCKS)
    loaded = rig.engine.load([rig.keys[i] for i in order], rig.view).result(10)
    assert loaded.raw_bytes == rig.view.nbytes
    for array, original in zip(rig.arrays, rig.original, strict=True):
        assert np.array_equal(array, original[order])
    rig.close()


def test_records_are_the_ones_that_the_cpu_makes() -> None:
    rig = Rig(bound=ErrorBound.relative(1e-3))
    rig.engine.store(rig.keys, rig.view, measure_error=True).wait()
    with SwapEngine(1 << 22, bound=ErrorBound.relative(1e-3)) as on_cpu:
        on_cpu.store(rig.keys, BlockView(rig.original, "2NHD", dtype="bfloat16"), measure_error=True)
        for key in rig.keys:
            assert rig.engine.read_record(key) == on_cpu.read_record(key)
    rig.close()


POLICY = CalibrationTable(np.random.default_rng(1).lognormal(0, 1, (2, 2, 32))).policy()


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("mode", ["fixed", "plain", "outlier", "rice"])
@pytest.mark.parametrize(
    "bound", [ErrorBound.relative(1e-2), ErrorBound.lossless(), ErrorBound.token_rms(0.1), POLICY], ids=repr
)
def test_every_bound_in_every_mode_is_coded_on_the_gpu(bound: ErrorBound | BoundPolicy, mode: str, small: bool) -> None:
    rig = Rig(bound=bound, mode=mode, small=small)
    for _ in range(2):
        result = rig.engine.store(rig.keys, rig.view).result(10)
    assert "coded_on_host" not in result.fallbacks
    rig.poison()
    rig.engine.load(rig.keys, rig.view).wait(10)
    assert ("store_call" in rig.driver.calls) == ("load_call" in rig.driver.calls) == small
    assert ("encode_call" in rig.driver.calls) != small
    with SwapEngine(1 << 22, bound=bound, mode=mode) as on_cpu:
        there = [a.copy() for a in rig.original]
        on_cpu.store(rig.keys, BlockView(there, "2NHD", dtype="bfloat16"))
        for key in rig.keys:
            assert rig.engine.read_record(key) == on_cpu.read_record(key)
        on_cpu.load(rig.keys, BlockView(there, "2NHD", dtype="bfloat16"))
    for array, expected in zip(rig.arrays, there, strict=True):
        assert np.array_equal(array, expected)
    rig.close()


@pytest.mark.parametrize("mode", ["fixed", "rice"])
def test_more_bounds_by_token_than_the_kernels_take_are_coded_on_the_host(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvzip.backends.cuszp.GPU_VECTORS", 31)
    monkeypatch.setattr("kvzip.backends.cuszp.GPU_RICE_VECTORS", 31)
    rig = Rig(bound=ErrorBound.token_rms(0.1), mode=mode)
    result = rig.engine.store(rig.keys, rig.view, measure_error=True).result(10)
    assert result.violations == 0
    assert rig.engine.stats().fallbacks["coded_on_host"] == BLOCKS * len(rig.view.layout.segments)
    rig.poison()
    rig.engine.load(rig.keys, rig.view).wait(10)
    assert "decode_call" in rig.driver.calls
    rig.close()


@pytest.mark.parametrize("small", [False, True])
def test_channel_tables_on_the_device_are_bounded(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvzip.staging.MOST_TABLES", 5)
    rig = Rig(small=small)
    rng = np.random.default_rng(3)
    for _ in range(6):
        rig.engine.configure(bound=CalibrationTable(rng.lognormal(0, 1, (2, 2, 32))).policy())
        rig.engine.store(rig.keys, rig.view).wait(10)
        rig.engine.load(rig.keys, rig.view).wait(10)
    tables = 2 * 32 * 4
    held = [a for a in rig.driver.memory.values() if a.size == tables + 256]
    assert 2 <= len(held) <= 2 * 5
    loaded = [a.copy() for a in rig.arrays]
    rig.poison()
    rig.engine.load(rig.keys, rig.view).wait(10)
    for array, expected in zip(rig.arrays, loaded, strict=True):
        assert np.array_equal(array, expected)
    rig.close()


def test_a_block_that_begins_a_sequence_is_exact_and_the_others_are_not() -> None:
    rig = Rig(bound=BoundPolicy(ErrorBound.relative(1e-2), ErrorBound.relative(2e-2)))
    result = rig.engine.store(rig.keys, rig.view, sink=[i in (0, 7) for i in range(BLOCKS)]).result(10)
    assert result.blocks == BLOCKS
    assert "coded_on_host" not in result.fallbacks
    rig.poison()
    rig.engine.load(rig.keys, rig.view).wait(10)
    for array, original in zip(rig.arrays, rig.original, strict=True):
        exact = [bool(np.array_equal(array[i], original[i])) for i in range(BLOCKS)]
        assert exact == [i in (0, 7) for i in range(BLOCKS)]
    rig.close()


@pytest.mark.parametrize("small", [False, True])
def test_blocks_that_are_kept_raw(small: bool) -> None:
    """By the caller, or by the controller: then the records and the counters say so."""
    link = Prior(1e15, 1e15, 1.0, 1.0, 0.0, overlapped=True)
    controller = Controller("latency", priors={"cuda": link}, exploration=0.0, dwell=1000)
    rig = Rig(bound=ErrorBound.relative(1e-2), small=small, controller=controller)
    result = rig.engine.store(rig.keys[:8], rig.view[range(8)], sink=[i % 3 == 0 for i in range(8)]).result(10)
    pages = len(rig.view.layout.segments)
    assert result.fallbacks == {"break_even": 8 * pages}
    rig.engine.store(rig.keys[8:10], rig.view[[8, 9]], coding="raw").wait(10)
    rig.engine.store(rig.keys[10:], rig.view[[10, 11]], coding="encoded").wait(10)
    headers = [read_header(rig.engine.read_record(key)) for key in rig.keys]
    assert [h.codec for h in headers] == ["raw"] * 10 + ["cuszp"] * 2
    assert [h.reason for h in headers] == [Reason.BREAK_EVEN] * 8 + [Reason.AS_ASKED] * 4
    assert rig.engine.stats().fallbacks == {"break_even": 8 * pages}
    rig.poison()
    rig.engine.load(rig.keys[:10], rig.view[range(10)]).wait(10)
    rig.engine.load(rig.keys[10:], rig.view[[10, 11]]).wait(10)
    rig.engine.load(rig.keys, rig.view).wait(10)  # both kinds
    for array, original in zip(rig.arrays, rig.original, strict=True):
        assert np.array_equal(array[:10], original[:10])
        assert not np.array_equal(array[10:], original[10:])
    assert controller.decisions == {("raw", "objective"): 1, ("raw", "asked"): 1, ("encoded", "asked"): 1}
    assert set(controller.snapshot().link_bytes_per_second) == {("cuda:0", "store"), ("cuda:0", "load")}
    rig.close()


@pytest.mark.parametrize("small", [False, True])
def test_pressure_is_in_the_records_and_in_the_counters(small: bool) -> None:
    steps = BoundPressure([ErrorBound.relative(1e-2)], (0.001,))
    rig = Rig(bound=ErrorBound.relative(1e-3), small=small, pressure=steps)
    rig.engine.store(rig.keys[:4], rig.view[range(4)]).wait(10)
    result = rig.engine.store(rig.keys[4:], rig.view[range(4, BLOCKS)]).result(10)
    headers = [read_header(rig.engine.read_record(key)) for key in (rig.keys[0], rig.keys[-1])]
    assert [(h.bound.value, h.reason) for h in headers] == [(1e-3, Reason.AS_ASKED), (1e-2, Reason.BOUND_PRESSURE)]
    assert sum(result.fallbacks.values()) == 8 * len(rig.view.layout.segments)
    assert result.fallbacks["bound_pressure"] > 0
    rig.close()


@pytest.mark.parametrize(("checksum", "found", "unchecked"), [(1.0, 4, 0), (0.5, 2, 2 * BLOCKS), (0.0, 0, 4 * BLOCKS)])
def test_checksums_of_large_loads_are_verified_as_asked(checksum: float, found: int, unchecked: int) -> None:
    rig = Rig(bound=ErrorBound.lossless(), integrity=Integrity(checksum=checksum))
    rig.engine.store(rig.keys, rig.view, coding="raw").wait(10)
    rig.pool.views(rig.engine._index.find(rig.keys[5:6])[0].allocation)[0][-20] ^= 1  # any value is a raw value
    refused = []
    for _ in range(4):
        try:
            rig.engine.load(rig.keys, rig.view).wait(10)
        except CorruptRecordError as error:
            refused.append(error.blocks)
    assert refused == [(5,)] * found
    stats = rig.engine.stats()
    assert (stats.corrupt_blocks, stats.unchecked_blocks) == (found, unchecked)
    rig.close()


def test_measured_error_is_within_the_bound() -> None:
    rig = Rig(bound=ErrorBound.absolute(0.01))
    result = rig.engine.store(rig.keys, rig.view, measure_error=True).result()
    assert result.violations == 0
    assert result.max_error is not None
    assert 0.005 < result.max_error <= 0.01
    assert read_header(rig.engine.read_record(rig.keys[0])).max_error is not None
    rig.close()


@pytest.mark.parametrize(
    ("link_is_slow", "wanted"),
    [
        (True, "encode copy encode copy encode copy note encode copy note note encode copy note note"),
        (False, "encode copy encode copy encode copy encode encode copy copy note note note note note"),
    ],
)
def test_the_link_gets_its_chunks_before_the_host_notes_them(
    monkeypatch: pytest.MonkeyPatch, link_is_slow: bool, wanted: str
) -> None:
    """Out: the first chunks go without a step of the host in between, each as soon as it is encoded; what the host
    notes of one waits until the link has enough to do, or all of it. In: a chunk's copy is queued before its
    decoder."""
    rig = Rig(bound=ErrorBound.lossless(), chunk_blocks=4)
    steps: list[str] = []
    called, enter, event_wait = rig.driver._called, RecordIndex.enter, rig.driver.event_wait
    if link_is_slow:  # the host finds no copy ended before it waits for it, and enough behind it

        def waited(event: int, spin_us: int, timeout_us: int) -> bool:
            return timeout_us > 0 and event_wait(event, spin_us, timeout_us)

        monkeypatch.setattr(rig.driver, "event_wait", waited)
        monkeypatch.setattr("kvzip.transport._NOTE_BYTES", 1)

    def note(name: str, *, held: bool = True) -> None:
        if name in ("encode_call", "copy_between", "outgoing", "decode_call"):
            steps.append({"outgoing": "copy"}.get(name, name.partition("_")[0]))
        called(name, held=held)

    def entered(index: RecordIndex, *args: Any) -> Any:
        steps.append("note")
        return enter(index, *args)

    monkeypatch.setattr(rig.driver, "_called", note)
    monkeypatch.setattr(RecordIndex, "enter", entered)
    rig.engine.store(rig.keys, rig.view).result(10)
    sizes = [last - first for first, last in chunk_bounds(BLOCKS, 4)]
    assert len(sizes) == 5
    assert " ".join(steps) == wanted
    for _ in range(2):  # the first one takes memory
        steps.clear()
        rig.engine.load(rig.keys, rig.view).result(10)
    assert steps == ["copy", *["copy", "decode"] * (len(tapered_bounds(BLOCKS, 4)) - 1), "decode"]
    rig.close()


def test_store_returns_before_the_device_has_worked(rig: Rig) -> None:
    rig.engine.store(rig.keys[:1], rig.view[[0]]).wait()
    rig.driver.hold.clear()
    transfer = rig.engine.store(rig.keys, rig.view)
    assert not transfer.done()
    assert not transfer.wait(0.05)
    with pytest.raises(TransferError, match=r"0\.05 s"):
        transfer.result(0.05)
    rig.driver.hold.set()
    assert transfer.wait(10)
    transfer.wait_stream(7)
    assert transfer.cuda_event in rig.driver.events
    del transfer


@pytest.mark.parametrize("timeout", [None, 20])
@pytest.mark.parametrize("waits", [True, False])
def test_who_takes_the_steps(waits: bool, timeout: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the memory is there, the thread that stores takes the first step, and those that wait take the others."""
    rig = Rig(bound=ErrorBound.lossless())
    for _ in range(6):  # every slot has had chunks of every size
        rig.engine.store(rig.keys, rig.view).wait()
        rig.engine.load(rig.keys, rig.view).wait()
    called, by = rig.driver._called, list[str]()

    def note(name: str, *, held: bool = True) -> None:
        if name in ("encode_call", "copy_between", "outgoing", "decode_call"):
            by.append(threading.current_thread().name)
        called(name, held=held)

    monkeypatch.setattr(rig.driver, "_called", note)
    here = threading.current_thread().name
    for move, worker in ((rig.engine.store, rig.swap._out), (rig.engine.load, rig.swap._into)):
        by.clear()
        assert worker.close(10)
        worker._closed = False
        monkeypatch.setattr(worker, "_thread", SimpleNamespace(is_alive=lambda: True))  # one that never comes
        transfer = move(rig.keys, rig.view)
        assert set(by) == {here}
        if waits:
            assert transfer.wait(timeout)
            assert set(by) == {here}
        worker._thread = worker._start_thread("store")
        deadline = time.monotonic() + 10
        while not transfer.done() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert transfer.result(0).blocks == BLOCKS
        # A load that needs no more chunks than are queued ahead was queued whole.
        assert set(by) == ({here} if waits or move == rig.engine.load else {here, worker._name})
    del transfer
    rig.close()


def test_eviction_counts_encoded_bytes() -> None:
    rig = Rig(capacity=30_000, bound=ErrorBound.relative(1e-2))
    for i in range(BLOCKS):
        rig.engine.store([rig.keys[i]], rig.view[[i]]).wait()
    stats = rig.engine.stats()
    assert stats.evicted_blocks == BLOCKS - stats.records > 0
    held = [rig.engine.contains(k) for k in rig.keys]
    assert held == sorted(held)  # the oldest left
    rig.close()


def test_a_batch_that_fits_by_its_real_size_is_accepted() -> None:
    need = Rig(bound=ErrorBound.relative(1e-2))
    need.engine.store(need.keys, need.view).wait()
    used = need.pool.stats().extent_bytes_used
    need.close()
    rig = Rig(capacity=used, bound=ErrorBound.relative(1e-2))
    assert rig.engine.store(rig.keys, rig.view).result().blocks == BLOCKS
    rig.close()
    small = Rig(capacity=used - 256, bound=ErrorBound.relative(1e-2))
    small.engine.store(small.keys[:3], small.view[range(3)]).wait()
    before = small.engine.stats()
    with pytest.raises(PoolExhaustedError, match="store fewer blocks at once"):
        small.engine.store([b"other-%d" % i for i in range(BLOCKS)], small.view).wait()
    after = small.engine.stats()
    assert (after.records, after.evicted_blocks) == (before.records, before.evicted_blocks)
    small.close()


def test_a_full_pool_does_not_fill_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvzip._log._logged", set())
    rig = Rig(capacity=4096)
    for _ in range(5):
        with pytest.raises(PoolExhaustedError):
            rig.engine.store(rig.keys, rig.view).wait()
    assert [r.getMessage() for r in caplog.records] == [
        "a store failed: the pool could not hold its blocks (logged once; the counters have the rest)"
    ]
    assert (
        rig.engine.metrics().value("kvzip_failed_transfers_total", operation="store", error="PoolExhaustedError") == 5
    )
    rig.close()


def test_fragmented_pool() -> None:
    rig = Rig(capacity=80_000, bound=ErrorBound.lossless(), extent_bytes=64)
    for i in range(BLOCKS):
        rig.engine.store([rig.keys[i]], rig.view[[i]]).wait()
        if i % 3 == 0:
            rig.engine.discard([rig.keys[i - 1]])
    held = [i for i in range(BLOCKS) if rig.engine.contains(rig.keys[i])]
    rig.poison()
    rig.engine.load([rig.keys[i] for i in held], rig.view[held]).wait()
    for array, original in zip(rig.arrays, rig.original, strict=True):
        assert np.array_equal(array[held], original[held])
    rig.close()


def test_damaged_record_leaves_its_pages_alone(rig: Rig) -> None:
    rig.engine.store(rig.keys, rig.view).wait()
    for place, at in ((2, 300), (7, -40)):
        entry = rig.engine._index.find([rig.keys[place]])[0]
        rig.pool.views(entry.allocation)[0][at] ^= 4
    rig.poison()
    with pytest.raises(CorruptRecordError, match="2 of 12 records are damaged") as caught:
        rig.engine.load(rig.keys, rig.view).wait()
    assert caught.value.blocks == (2, 7)
    good = [i for i in range(BLOCKS) if i not in (2, 7)]
    for array, original in zip(rig.arrays, rig.original, strict=True):
        assert np.array_equal(array[good], original[good])
        assert (array[[2, 7]] == 0xA5A5).all()
    assert rig.engine.stats().corrupt_blocks == 2
    assert rig.engine.discard([rig.keys[2], rig.keys[7]]) == 2


def test_a_load_does_not_trust_the_header_in_the_pool(rig: Rig) -> None:
    rig.engine.store(rig.keys, rig.view).wait()
    for place in range(BLOCKS):
        entry = rig.engine._index.find([rig.keys[place]])[0]
        rig.pool.views(entry.allocation)[0][place * 12] ^= 1
    rig.poison()
    rig.engine.load(rig.keys, rig.view).wait()  # sizes and checksums are the engine's own
    assert all(np.array_equal(a, o) for a, o in zip(rig.arrays, rig.original, strict=True))


@pytest.mark.parametrize("call", ["encode", "encode_call", "copy_between", "event_wait", "malloc"])
def test_failed_store_changes_nothing(call: str) -> None:
    rig = Rig(bound=ErrorBound.lossless(), extent_bytes=64)
    rig.engine.store(rig.keys[:2], rig.view[[5, 6]]).wait()
    rig.engine.store([b"x"], rig.view[[0]]).wait()
    rig.engine.discard([b"x"])
    before = [rig.engine.read_record(k) for k in rig.keys[:2]]
    if call == "malloc":  # slots have their memory: make them need more
        rig.engine._devices["cuda:0"]._transport.out._staging = Staging(chunk_bytes=1 << 20)
    rig.driver.fail[call] = cuda_error()
    with pytest.raises(CudaError, match="cudaErrorMemoryAllocation"):
        rig.engine.store(rig.keys, rig.view).wait()
    rig.driver.fail.clear()
    assert [rig.engine.read_record(k) for k in rig.keys[:2]] == before
    assert rig.engine.stats().records == 2
    rig.pool.check()
    rig.engine.store(rig.keys, rig.view).wait()
    assert rig.engine.stats().records == BLOCKS
    rig.close()


def test_encoder_failure_stores_raw(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    for call in ("store_call", "encode"):
        rig.driver.fail[call] = NativeError("encoding failed: injected", status=1)
    result = rig.engine.store(rig.keys, rig.view).result()
    assert result.fallbacks == {"encoder_failed": 4 * BLOCKS}
    assert "injected" in caplog.text
    rig.poison()
    rig.engine.load(rig.keys, rig.view).wait()
    assert all(np.array_equal(a, o) for a, o in zip(rig.arrays, rig.original, strict=True))


@pytest.mark.parametrize("released", ["nobody", "a stream", "an integrator"])
def test_an_encoder_that_fails_behind_its_queue(monkeypatch: pytest.MonkeyPatch, released: str) -> None:
    """All kernels are queued when the first status is read. They are queued again for raw records, unless somebody was
    let go behind the first ones: the pages may have other values by then."""
    rig = Rig(bound=ErrorBound.lossless(), slots=1)
    encode, failed, recalled = FakeDriver.encode, [], []
    recall = Transfer._recall

    def report(driver: FakeDriver, a: Any, stream: int) -> None:
        encode(driver, a, stream)
        if not failed:
            failed.append(1)
            fake_cuda.at(a.status, np.uint32, 1)[0] = 1

    def note(transfer: Transfer) -> bool:
        recalled.append(recall(transfer))
        return recalled[-1]

    rig.engine.store(rig.keys[1:2], rig.view[[1]]).wait(10)  # which takes the memory
    monkeypatch.setattr(FakeDriver, "encode", report)
    monkeypatch.setattr(Transfer, "_recall", note)
    rig.driver.hold.clear()  # no status comes before the caller has gone on
    transfer = rig.engine.store(rig.keys[:1], rig.view[[0]])
    deadline = time.monotonic() + 10
    while transfer._event == 0 and time.monotonic() < deadline:
        time.sleep(0.001)
    if released == "a stream":
        transfer.wait_stream(7)
    elif released == "an integrator":
        assert transfer.cuda_event in rig.driver.events
    rig.driver.hold.set()
    if released == "nobody":
        assert transfer.result(10).fallbacks == {"encoder_failed": 4}
        transfer.wait_stream(7)
    else:
        with pytest.raises(NativeError, match="encoding on the GPU"):
            transfer.result(10)
        assert not rig.engine.contains(rig.keys[0])
    assert recalled == [released == "nobody"]
    del transfer
    rig.close()  # no event is left


def test_failures_of_other_kinds_become_transfer_errors(rig: Rig) -> None:
    """Those of a worker's thread; what is raised in a thread that waits is that thread's own, and ends no transfer."""
    rig.driver.fail["event_wait"] = ZeroDivisionError("boom")
    transfer = rig.engine.store(rig.keys, rig.view)
    queued_whole = "store_call" in rig.driver.calls
    with pytest.raises(ZeroDivisionError if queued_whole else TransferError, match="boom"):
        transfer.wait()
    if queued_whole:
        assert transfer.result(10).blocks == BLOCKS
    assert rig.engine.stats().records == (BLOCKS if queued_whole else 0)
    del transfer


def test_missing_key_is_said_at_once(rig: Rig) -> None:
    with pytest.raises(BlockNotFoundError):
        rig.engine.load(rig.keys, rig.view)


class Zlib(PageCodec):
    name = "zlib-test"
    lossless_only = True

    def encode_page(self, values: Any, dtype: DType, request: EncodeRequest) -> bytes:
        return zlib.compress(values.tobytes(), 1)

    def decode_page(self, data: bytes, dtype: DType, shape: tuple[int, int]) -> Any:
        return np.frombuffer(zlib.decompress(data), dtype.numpy_bits)


def test_a_host_codec_works_by_way_of_host_memory() -> None:
    rig = Rig(codec=Zlib())
    rig.engine.store(rig.keys, rig.view).wait()
    rig.engine.configure(codec="cuszp", bound=ErrorBound.lossless())
    rig.engine.store(rig.keys[:4], rig.view[range(4)]).wait()  # a load of both kinds
    assert read_header(rig.engine.read_record(rig.keys[5])).codec == "zlib-test"
    rig.poison()
    rig.engine.load(rig.keys, rig.view).wait()
    assert all(np.array_equal(a, o) for a, o in zip(rig.arrays, rig.original, strict=True))
    rig.close()


def test_raw_codec_and_memory_order() -> None:
    rig = Rig(codec="raw")
    opaque = BlockView(rig.tensors, BlockLayout.opaque(rig.tensors))
    rig.engine.store(rig.keys, opaque).wait()
    rig.poison()
    rig.engine.load(rig.keys, opaque).wait()
    assert all(np.array_equal(a, o) for a, o in zip(rig.arrays, rig.original, strict=True))
    rig.close()


def test_stream_argument(rig: Rig) -> None:
    with pytest.raises(ConfigError, match="no CUDA stream"):
        rig.engine.store(rig.keys, rig.view, stream="stream")
    assert not rig.engine.contains(rig.keys[0])


def test_staging_memory_is_bounded() -> None:
    small = Rig(bound=ErrorBound.lossless(), chunk_blocks=1, slots=3)
    small.engine.store(small.keys, small.view).wait()
    block = small.view.layout.nbytes
    assert small.driver.peak_bytes < 3 * (block + 4096)
    small.close()


# ---- small transfers


def small_rig(**settings: Any) -> Rig:
    return Rig(small=True, **{"bound": ErrorBound.lossless(), **settings})


@pytest.mark.parametrize("bound", ["1e-3", "1e-2", "lossless"])
def test_both_ways_make_the_same_records(bound: str) -> None:
    rigs = [Rig(bound=ErrorBound.parse(bound), small=small) for small in (False, True)]
    for rig in rigs:
        result = rig.engine.store(rig.keys, rig.view).result(10)
        assert result.record_bytes == rig.pool.stats().payload_bytes
    assert "store_call" not in rigs[0].driver.calls
    assert "encode_call" not in rigs[1].driver.calls
    records = [[rig.engine.read_record(key) for key in rig.keys] for rig in rigs]
    assert records[0] == records[1]
    stats = [rig.engine.stats() for rig in rigs]
    assert stats[0].stored_record_bytes == stats[1].stored_record_bytes
    assert stats[0].fallbacks == stats[1].fallbacks
    for rig in rigs:
        rig.close()


def test_small_blocks_come_back_into_other_blocks() -> None:
    rig = small_rig()
    rig.engine.store(rig.keys, rig.view).wait(10)
    rig.poison()
    order = np.random.default_rng(1).permutation(BLOCKS)
    for part in (order[:5], order[5:6], order[6:]):  # several, one, several
        rig.engine.load([rig.keys[i] for i in part], rig.view[part]).wait(10)
    assert all(np.array_equal(a, o) for a, o in zip(rig.arrays, rig.original, strict=True))
    assert rig.driver.calls.count("load_call") == 3
    assert "decode_call" not in rig.driver.calls
    rig.close()


def test_small_blocks_of_one_page() -> None:
    rig = small_rig()
    view = BlockView(rig.tensors[:1], BlockLayout.opaque(rig.tensors[:1]))
    rig.engine.store(rig.keys, view).wait()
    rig.poison()
    rig.engine.load(rig.keys, view).wait()
    assert np.array_equal(rig.arrays[0], rig.original[0])
    assert rig.driver.calls.count("store_call") == rig.driver.calls.count("load_call") == 1
    rig.close()


def test_events_of_small_transfers() -> None:
    """Transfers share events, but who asked for one has it to itself until the transfer is dropped."""
    rig = small_rig()
    rig.engine.store(rig.keys[:1], rig.view[[0]]).wait(10)
    made = rig.driver.calls.count("event_create")
    for _ in range(3):
        rig.engine.store(rig.keys[:1], rig.view[[0]]).wait(10)
    assert rig.driver.calls.count("event_create") == made
    rig.driver.hold.clear()
    transfers = [rig.engine.store([key], rig.view[[0]]) for key in rig.keys[1:4]]
    own = transfers[0].cuda_event
    assert own == transfers[0].cuda_event != transfers[1].cuda_event
    assert {own, transfers[1].cuda_event} <= rig.driver.events
    rig.driver.hold.set()
    assert all(transfer.wait(10) for transfer in transfers)
    assert transfers[0].cuda_event == own
    waits = rig.driver.calls.count("stream_wait_event")
    transfers[2].wait_stream(7)  # it has ended: there is nothing to wait for
    assert rig.driver.calls.count("stream_wait_event") == waits
    rig.engine.store(rig.keys[4:5], rig.view[[0]]).wait(10)
    late = transfers[2].cuda_event
    assert late in rig.driver.events - {own}
    del transfers
    assert rig.driver.events.isdisjoint({own, late})
    rig.close()


def test_a_small_transfer_that_nobody_waits_for_ends() -> None:
    rig = small_rig(reaper_seconds=0.001)
    rig.engine.store(rig.keys, rig.view)
    deadline = time.monotonic() + 10
    while not rig.engine.contains(rig.keys[-1]):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    rig.poison()
    rig.engine.load(rig.keys, rig.view)
    while rig.engine.stats().loaded_blocks < BLOCKS:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert all(np.array_equal(a, o) for a, o in zip(rig.arrays, rig.original, strict=True))
    time.sleep(0.3)  # the thread that looked after it sleeps now
    rig.engine.store(rig.keys[:1], rig.view[[0]])
    while rig.engine.stats().stored_blocks < BLOCKS + 1:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    rig.close()


def test_small_transfers_under_way() -> None:
    """Many at a time, waited for in another order than they were queued in: the last store of a key wins."""
    rig = small_rig()
    rig.engine.store(rig.keys, rig.view).wait()
    rig.engine.load(rig.keys, rig.view).wait()
    rig.driver.hold.clear()
    first = [rig.engine.store([b"same", b"%d" % i], rig.view[[i, i + 1]]) for i in range(8)]
    loads = [rig.engine.load([key], rig.view[[i]]) for i, key in enumerate(rig.keys)]
    assert not any(t.done() for t in (*first, *loads))
    with pytest.raises(TransferError, match=r"0\.02 s"):
        first[-1].result(0.02)
    assert rig.pool.stats().reserved_bytes > 0
    rig.driver.hold.set()
    for t in (*reversed(first), *loads):
        assert t.wait(10)
        assert t.done()
    assert rig.pool.stats().reserved_bytes == 0
    rig.poison()
    rig.engine.load([b"same"], rig.view[[0]]).wait()
    for array, original in zip(rig.arrays, rig.original, strict=True):
        assert np.array_equal(array[0], original[7])
    del first, loads, t
    rig.close()


def test_more_small_transfers_than_tickets_go_the_long_way() -> None:
    rig = small_rig()
    rig.engine.store(rig.keys[:1], rig.view[[0]]).wait()
    rig.driver.hold.clear()
    transfers = [rig.engine.store([b"n%d" % i], rig.view[[i % BLOCKS]]) for i in range(TICKETS + 4)]
    rig.driver.hold.set()
    for t in transfers:
        t.wait(10)
    assert rig.engine.stats().records == TICKETS + 5
    assert rig.driver.calls.count("encode_call") == 4
    del transfers, t
    rig.close()


def test_a_small_store_behind_a_large_one_keeps_the_order() -> None:
    rig = small_rig()
    rig.swap.small_bytes = 6 * rig.view.layout.nbytes
    rig.engine.store([b"warm"], rig.view[[0]]).wait()
    rig.driver.hold.clear()
    large = rig.engine.store(rig.keys, rig.view)
    small = rig.engine.store(rig.keys[:1], rig.view[[9]])  # replaces what the large one stores
    later = rig.engine.store(rig.keys[1:], rig.view[range(1, BLOCKS)])
    rig.driver.hold.set()
    for t in (later, small, large):
        t.wait(10)
    rig.poison()
    rig.engine.load(rig.keys[:1], rig.view[[0]]).wait()
    assert all(np.array_equal(a[0], o[9]) for a, o in zip(rig.arrays, rig.original, strict=True))
    del large, small, later, t
    rig.close()


def test_small_stores_evict_within_the_headroom() -> None:
    rig = small_rig(capacity=120_000, bound=ErrorBound.relative(1e-2))
    assert rig.pool.headroom_bytes == 29952
    for turn in range(3):
        for i in range(BLOCKS):
            rig.engine.store([b"%d-%d" % (turn, i)], rig.view[[i]]).wait()
            rig.pool.check()
    stats = rig.engine.stats()
    assert stats.evicted_blocks == 3 * BLOCKS - stats.records > 0
    assert "encode_call" not in rig.driver.calls
    worst = -(-(rig.view.layout.nbytes + 1024) // 256) * 256
    assert stats.pool.free_bytes < 2 * worst  # what leaves ahead of need is needed next
    held = [rig.engine.contains(b"%d-%d" % (2, i)) for i in range(BLOCKS)]
    assert held == sorted(held)
    rig.close()


def test_small_stores_in_a_pool_without_headroom_evict_by_real_sizes() -> None:
    rig = small_rig(capacity=120_000, bound=ErrorBound.relative(1e-2))
    rig.pool._headroom = 0
    for turn in range(3):
        for i in range(BLOCKS):
            rig.engine.store([b"%d-%d" % (turn, i)], rig.view[[i]]).wait()
    assert rig.driver.calls.count("encode_call") > 0
    assert rig.pool.stats().payload_fraction > 0.9
    rig.close()


def test_pinned_records_stay_under_small_stores() -> None:
    rig = small_rig(capacity=60_000)
    rig.engine.store(rig.keys[:5], rig.view[range(5)]).wait()
    with rig.engine.pin(rig.keys[:5]):
        rig.engine.store(rig.keys[5:6], rig.view[[5]]).wait()
        with pytest.raises(PoolExhaustedError):
            rig.engine.store(rig.keys[6:], rig.view[range(6, BLOCKS)]).wait()
    assert all(rig.engine.contains(k) for k in rig.keys[:5])
    rig.close()


def test_small_transfers_in_a_fragmented_pool() -> None:
    rig = small_rig(capacity=60 * 1024)
    blocks = [rig.pool.allocate(1024) for _ in range(60)]
    for allocation in blocks[::2]:
        rig.pool.free(allocation)
    rig.engine.store(rig.keys[:2], rig.view[[0, 1]]).wait()
    assert len(rig.engine._index.find(rig.keys[:1])[0].allocation.runs) > 4
    rig.pool.check()
    rig.poison()
    rig.engine.load(rig.keys[:2], rig.view[[0, 1]]).wait()
    assert rig.driver.calls.count("store_call") == rig.driver.calls.count("load_call") == 1
    assert all(np.array_equal(a[:2], o[:2]) for a, o in zip(rig.arrays, rig.original, strict=True))
    for allocation in blocks[1::2]:
        rig.pool.free(allocation)
    rig.close()


def test_many_views_and_bounds_take_turns_in_the_plans() -> None:
    rig = small_rig()
    for i in range(2 * MOST_PLANS + 3):
        rig.engine.configure(bound=ErrorBound.absolute(1e-3 * (i + 1)))
        rig.engine.store([b"k"], rig.view[[i % BLOCKS]]).wait()
    assert rig.engine.read_record(b"k")
    rig.close()


@pytest.mark.parametrize("call", ["store_call", "event_wait"])
def test_a_failed_small_store_changes_nothing(call: str) -> None:
    rig = small_rig()
    rig.engine.store(rig.keys[:2], rig.view[[5, 6]]).wait()
    before = [rig.engine.read_record(k) for k in rig.keys[:2]]
    rig.driver.fail[call] = cuda_error()
    rig.driver.fail["encode_call"] = cuda_error()  # the long way, which is tried then
    with pytest.raises(CudaError, match="cudaErrorMemoryAllocation"):
        rig.engine.store(rig.keys, rig.view).wait()
    rig.driver.fail.clear()
    assert [rig.engine.read_record(k) for k in rig.keys[:2]] == before
    assert rig.engine.stats().records == 2
    assert rig.pool.stats().reserved_bytes == 0
    rig.pool.check()
    rig.engine.store(rig.keys, rig.view).wait()
    assert rig.engine.stats().records == BLOCKS
    rig.close()


@pytest.mark.parametrize("call", ["load_call", "event_wait"])
def test_a_failed_small_load_lets_go_of_the_records(call: str) -> None:
    rig = small_rig()
    rig.engine.store(rig.keys, rig.view).wait()
    rig.driver.fail[call] = cuda_error()
    rig.driver.fail["decode_call"] = cuda_error()
    with pytest.raises(CudaError, match="cudaErrorMemoryAllocation"):
        rig.engine.load(rig.keys, rig.view).wait()
    rig.driver.fail.clear()
    rig.poison()
    rig.engine.load(rig.keys, rig.view).wait()
    assert all(np.array_equal(a, o) for a, o in zip(rig.arrays, rig.original, strict=True))
    assert rig.engine.discard(rig.keys) == BLOCKS
    assert rig.pool.stats().allocations == 0
    rig.close()


def test_closing_ends_small_transfers_under_way() -> None:
    rig = small_rig()
    rig.engine.store(rig.keys[:1], rig.view[[0]]).wait()
    rig.driver.hold.clear()
    transfer = rig.engine.store(rig.keys, rig.view)
    threading.Timer(0.05, rig.driver.hold.set).start()
    rig.engine.close()
    assert transfer.done()
    assert transfer.result().blocks == BLOCKS
    del transfer
    rig.close()


@pytest.mark.parametrize("small", [False, True])
def test_a_closing_engine_takes_nothing_more(small: bool) -> None:
    """Stores and loads that come between the end of the device's side and that of the index."""
    rig = Rig(bound=ErrorBound.lossless(), small=small)
    rig.engine.store(rig.keys, rig.view).wait()
    rig.swap.close()
    with pytest.raises(ConfigError, match="closed"):
        rig.engine.store(rig.keys, rig.view)
    with pytest.raises(ConfigError, match="closed"):
        rig.engine.load(rig.keys, rig.view)
    assert not rig.driver.memory
    rig.close()  # waits for no load


def test_whoever_closes_second_waits_for_the_first() -> None:
    rig = small_rig()
    rig.engine.store(rig.keys[:1], rig.view[[0]]).wait()
    rig.driver.hold.clear()
    transfer = rig.engine.store(rig.keys, rig.view)
    threads = [threading.Thread(target=rig.engine.close) for _ in range(2)]
    for thread in threads:
        thread.start()
    with pytest.raises(TransferError, match="not ended"):
        transfer.result(0.05)
    assert all(thread.is_alive() for thread in threads)
    rig.driver.hold.set()
    for thread in threads:
        thread.join(10)
    assert transfer.result(10).blocks == BLOCKS
    del transfer
    rig.close()


def test_first_loads_at_once_share_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline is not for two: they would write into each other's staging memory."""
    rig = Rig(bound=ErrorBound.lossless())
    rig.engine.store(rig.keys, rig.view).wait()
    make, makers = threading.Thread, []

    def slowly(**arguments: Any) -> threading.Thread:
        makers.append(arguments["name"])
        time.sleep(0.05)
        return make(**arguments)

    monkeypatch.setattr("kvzip.device.threading.Thread", slowly)
    threads = [make(target=lambda: rig.engine.load(rig.keys, rig.view).wait(10)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert makers == ["kvzip-in-0"]
    assert all(np.array_equal(a, o) for a, o in zip(rig.arrays, rig.original, strict=True))
    rig.close()


@pytest.mark.parametrize("small", [False, True])
def test_where_the_system_gives_no_thread(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(bound=ErrorBound.lossless(), small=small)
    rig.engine.store(rig.keys, rig.view).wait()
    rig.swap._reaper.close()
    rig.swap._reaper._halt = False

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        rig.poison()
        if small:  # it ends when somebody asks
            rig.engine.load(rig.keys, rig.view).wait()
            assert rig.engine.store([b"k"], rig.view[[0]]).result().blocks == 1
        else:
            with pytest.raises(TransferError, match="new thread"):
                rig.engine.load(rig.keys, rig.view)
    rig.engine.load(rig.keys, rig.view).wait()
    assert all(np.array_equal(a, o) for a, o in zip(rig.arrays, rig.original, strict=True))
    assert rig.engine._index._loads == 0
    rig.close()


@pytest.mark.parametrize("call", ["malloc", "event_create", "allocate"])
@pytest.mark.parametrize("direction", [SmallStores, SmallLoads])
def test_a_full_gpu_does_not_get_fuller(
    call: str, direction: type[SmallStores | SmallLoads], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small transfers take their memory at the first one: where they cannot, nothing of it stays."""
    driver, resource = FakeDriver(), PageableMemory()
    owner: Any = resource if call == "allocate" else driver
    real, calls = getattr(owner, call), []

    def full(*arguments: Any) -> Any:
        calls.append(call)
        if call != "malloc" or len(calls) == 3:
            raise cuda_error()
        return real(*arguments)

    monkeypatch.setattr(owner, call, full)
    with pytest.raises(CudaError):
        direction(0, driver, Staging(), resource)
    assert not driver.memory
    assert not driver.events
    assert not driver.streams


@pytest.mark.parametrize("call", ["event_wait", "encode_call", "copy_between", "malloc"])
@pytest.mark.parametrize("at_call", [1, 2, 3, 5])
def test_a_store_after_one_that_the_device_failed(call: str, at_call: int) -> None:
    """Whatever fails wherever, sizes that are asked first included: the next one finds all staging free."""
    rig = Rig(bound=ErrorBound.lossless(), capacity=60_000, chunk_blocks=1)
    real, calls = rig.driver._called, []

    def failing(name: str, *, held: bool = True) -> None:
        calls.append(name)
        if name == call and calls.count(call) == at_call:
            raise cuda_error()
        real(name, held=held)

    rig.driver._called = failing  # type: ignore[method-assign]
    keys, view = rig.keys[:9], rig.view[range(9)]
    for _ in range(2):
        with contextlib.suppress(CudaError):
            rig.engine.store(keys, view).wait(10)
        rig.engine.discard(keys)
    assert calls.count(call) >= at_call
    assert rig.engine.store(keys, view).result(10).blocks == 9
    rig.poison()
    rig.engine.load(keys, view).wait(10)
    assert all(np.array_equal(a[:9], o[:9]) for a, o in zip(rig.arrays, rig.original, strict=True))
    rig.close()


def test_threads_share_small_transfers() -> None:
    rig = small_rig(reaper_seconds=0.001)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for turn in range(20):
                chosen = rng.permutation(BLOCKS)[:3]
                keys = [b"%d-%d-%d" % (seed, turn, i) for i in range(3)]
                rig.engine.store(keys, rig.view[chosen]).wait(10)
                record = rig.engine.read_record(keys[1])
                assert record == expected[chosen[1]]
                assert rig.engine.discard(keys) == 3
        except BaseException as error:
            failures.append(error)

    rig.engine.store(rig.keys, rig.view).wait()
    expected = [rig.engine.read_record(k) for k in rig.keys]
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    rig.pool.check()
    rig.close()


@pytest.mark.parametrize(("blocks", "largest"), [(0, 8), (1, 8), (5, 1), (7, 8), (256, 8), (1000, 512), (9, 3)])
def test_chunks_cover_a_batch(blocks: int, largest: int) -> None:
    for cut in (chunk_bounds, tapered_bounds):
        chunks = cut(blocks, largest)
        assert [i for first, last in chunks for i in range(first, last)] == list(range(blocks))
        assert all(0 < last - first <= largest for first, last in chunks)
    stored, loaded = ([last - first for first, last in cut(blocks, largest)] for cut in (chunk_bounds, tapered_bounds))
    if blocks > largest:
        assert stored[0] <= max(1, largest // 4)
    if blocks:
        assert loaded[-1] < 2 * max(1, largest // 8) or len(loaded) == 1
