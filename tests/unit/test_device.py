# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The engine's GPU side, on a GPU made of host memory (tests/fake_cuda.py)."""

from __future__ import annotations

import gc
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeDriver, FakeTensor, cuda_error

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
    TransferError,
)
from kvzip.backends.base import EncodeRequest, PageCodec
from kvzip.calibration import CalibrationTable
from kvzip.device import DeviceSwap
from kvzip.errors import NativeError
from kvzip.memory import PageableMemory
from kvzip.record import read_header
from kvzip.transport import CudaTransport, Staging
from kvzip.types import DType

BLOCKS = 12


class Rig:
    """An engine with a GPU made of host memory, and blocks on it."""

    def __init__(self, *, capacity: int = 1 << 22, chunk_blocks: int = 2, slots: int = 3, **settings: Any) -> None:
        rng = np.random.default_rng(5)
        values = rng.normal(size=(2, BLOCKS, 2, 16, 2, 32)).astype(np.float32)
        values[:, 3, 0, 2, 1, 5] = np.nan
        self.arrays = [np.ascontiguousarray(v.view(np.uint32) >> 16).astype(np.uint16) for v in values]
        self.tensors = [FakeTensor(a) for a in self.arrays]
        self.view = BlockView(self.tensors, "2NHD")
        self.original = [a.copy() for a in self.arrays]
        self.keys = [b"key-%d" % i for i in range(BLOCKS)]
        self.driver = FakeDriver()
        self.pool = HostPool(capacity, extent_bytes=settings.pop("extent_bytes", 256))
        self.engine = SwapEngine(self.pool, **settings)
        staging = Staging(chunk_bytes=chunk_blocks * self.view.layout.nbytes, slots=slots)
        transport = CudaTransport(0, driver=self.driver, staging=staging, resource=PageableMemory())
        self.engine._devices["cuda:0"] = DeviceSwap(
            0, self.engine._index, self.pool, self.engine._store_lock, self.engine, staging, transport
        )

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


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(bound=ErrorBound.lossless())
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


@pytest.mark.parametrize(
    ("bound", "mode"),
    [
        (ErrorBound.relative(1e-2), "rice"),
        (ErrorBound.lossless(), "rice"),
        (ErrorBound.token_rms(0.1), "fixed"),
        (CalibrationTable(np.random.default_rng(1).lognormal(0, 1, (2, 2, 32))).policy(), "rice"),
    ],
)
def test_what_the_kernels_lack_is_coded_on_the_host(bound: ErrorBound | BoundPolicy, mode: str) -> None:
    rig = Rig(bound=bound, mode=mode)
    marks = [i == 0 for i in range(BLOCKS)]
    result = rig.engine.store(rig.keys, rig.view, sink=marks, measure_error=True).result(10)
    assert result.violations == 0
    assert rig.engine.stats().fallbacks["coded_on_host"] == BLOCKS * len(rig.view.layout.segments)
    rig.poison()
    rig.engine.load(rig.keys, rig.view).wait(10)
    with SwapEngine(1 << 22, bound=bound, mode=mode) as on_cpu:
        there = [a.copy() for a in rig.original]
        on_cpu.store(rig.keys, BlockView(there, "2NHD", dtype="bfloat16"), sink=marks, measure_error=True)
        for key in rig.keys:
            assert rig.engine.read_record(key) == on_cpu.read_record(key)
        on_cpu.load(rig.keys, BlockView(there, "2NHD", dtype="bfloat16"))
    for array, expected in zip(rig.arrays, there, strict=True):
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


def test_measured_error_is_within_the_bound() -> None:
    rig = Rig(bound=ErrorBound.absolute(0.01))
    result = rig.engine.store(rig.keys, rig.view, measure_error=True).result()
    assert result.violations == 0
    assert result.max_error is not None
    assert 0.005 < result.max_error <= 0.01
    assert read_header(rig.engine.read_record(rig.keys[0])).max_error is not None
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


@pytest.mark.parametrize("call", ["encode", "copy", "copy_batch", "event_synchronize", "malloc", "crc32c"])
def test_failed_store_changes_nothing(call: str) -> None:
    rig = Rig(bound=ErrorBound.lossless(), extent_bytes=64)
    rig.engine.store(rig.keys[:2], rig.view[[5, 6]]).wait()
    rig.engine.store([b"x"], rig.view[[0]]).wait()
    rig.engine.discard([b"x"])
    before = [rig.engine.read_record(k) for k in rig.keys[:2]]
    if call == "malloc":  # slots have their memory: make them need more
        rig.engine._devices["cuda:0"]._transport.out._staging = Staging(chunk_bytes=1 << 20)
    rig.driver.fail[call] = cuda_error()
    if call == "copy_batch":
        rig.driver.fail["copy"] = cuda_error()
    with pytest.raises(CudaError, match="cudaErrorLaunchFailure"):
        rig.engine.store(rig.keys, rig.view).wait()
    rig.driver.fail.clear()
    assert [rig.engine.read_record(k) for k in rig.keys[:2]] == before
    assert rig.engine.stats().records == 2
    rig.pool.check()
    rig.engine.store(rig.keys, rig.view).wait()
    assert rig.engine.stats().records == BLOCKS
    rig.close()


def test_encoder_failure_stores_raw(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.driver.fail["encode"] = NativeError("encoding failed: injected", status=1)
    result = rig.engine.store(rig.keys, rig.view).result()
    assert result.fallbacks == {"encoder_failed": 4 * BLOCKS}
    assert "injected" in caplog.text
    rig.poison()
    rig.engine.load(rig.keys, rig.view).wait()
    assert all(np.array_equal(a, o) for a, o in zip(rig.arrays, rig.original, strict=True))


def test_failures_of_other_kinds_become_transfer_errors(rig: Rig) -> None:
    rig.driver.fail["event_synchronize"] = ZeroDivisionError("boom")
    with pytest.raises(TransferError, match="a store failed: ZeroDivisionError: boom"):
        rig.engine.store(rig.keys, rig.view).wait()
    assert rig.engine.stats().records == 0


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
