# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The worker over an engine whose transfers take their time: a GPU made of host memory (tests/fake_cuda.py)."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeDriver, FakeTensor, cuda_error

pytest.importorskip("torch", reason="vLLM needs torch")
pytest.importorskip("vllm.v1", reason="vLLM is not installed")

from kvzip import BlockView, ErrorBound, HostPool, SwapEngine
from kvzip.adapters.vllm.layout import Group, Page
from kvzip.adapters.vllm.messages import RecordSpec
from kvzip.adapters.vllm.settings import AdapterSettings
from kvzip.adapters.vllm.worker import KvzipOffloadingWorker
from kvzip.device import DeviceSwap
from kvzip.memory import PageableMemory
from kvzip.policy import LRU
from kvzip.staging import Staging
from kvzip.transport import CudaTransport

BLOCKS = 12


class Rig:
    """A worker over such a GPU; `driver.hold` stops and lets go what is under way."""

    def __init__(self, capacity: int = 1 << 20) -> None:
        values = np.random.default_rng(5).normal(size=(BLOCKS, 2, 16, 2, 32)).astype(np.float32)
        self.array = np.ascontiguousarray(values.view(np.uint32) >> 16).astype(np.uint16)
        self.before = self.array.copy()
        self.driver = FakeDriver()
        view = BlockView([FakeTensor(self.array)], "2NHD")
        self.worker = KvzipOffloadingWorker(
            [Group(view, (Page(),) * 2)],
            AdapterSettings(capacity, bound=ErrorBound.lossless()),
            1,
            lambda policy: self._engine(policy, capacity),
        )

    def _engine(self, policy: LRU, capacity: int) -> SwapEngine:
        engine = SwapEngine(HostPool(capacity), policy=policy)
        staging = Staging(chunk_bytes=1 << 14, slots=2)
        transport = CudaTransport(0, driver=self.driver, staging=staging, resource=PageableMemory())
        engine._devices["cuda:0"] = DeviceSwap(
            0, engine._index, engine.pool, engine._store_lock, engine, staging, transport
        )
        return engine

    def store(self, job: int, blocks: list[int], numbers: tuple[int, ...], **more: Any) -> None:
        assert self.worker.submit_store(job, gpu(blocks), RecordSpec(numbers, **more))

    def load(self, job: int, numbers: tuple[int, ...], blocks: list[int]) -> None:
        assert self.worker.submit_load(job, RecordSpec(numbers), gpu(blocks))

    def finished(self) -> list[int]:
        return [result.job_id for result in self.worker.get_finished()]


def gpu(blocks: list[int]) -> Any:
    return SimpleNamespace(block_ids=np.array(blocks), group_sizes=[len(blocks)], block_indices=[0])


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.driver.hold.set()
    made.worker.shutdown()
    gc.collect()
    assert not made.driver.memory
    assert not made.driver.events
    assert not made.driver.streams


def test_jobs_are_finished_when_they_are_and_wait_blocks_until_then(rig: Rig) -> None:
    rig.driver.hold.clear()
    rig.store(1, [1, 2, 3], (0, 1, 2))
    assert rig.finished() == []
    assert rig.worker.take_report() is None
    waiting = threading.Thread(target=rig.worker.wait, args=({1, 99},))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    rig.driver.hold.set()
    waiting.join(30)
    assert not waiting.is_alive()
    assert rig.finished() == [1]
    report = rig.worker.take_report()
    assert report is not None
    assert sorted(report.sizes) == [0, 1, 2]
    assert all(report.sizes.values())


def test_a_load_may_be_finished_before_an_older_store(rig: Rig) -> None:
    rig.store(1, [1, 2], (0, 1))
    rig.worker.wait({1})
    assert rig.finished() == [1]
    rig.array[:] = 0
    rig.load(2, (1, 0), [5, 6])
    rig.store(3, [8], (2,))
    rig.worker.wait({2, 3})
    assert sorted(rig.finished()) == [2, 3]
    assert np.array_equal(rig.array[[5, 6]], rig.before[[2, 1]])


def test_a_reset_while_a_store_is_under_way(rig: Rig) -> None:
    rig.driver.hold.clear()
    rig.store(1, [1, 2], (0, 1))
    rig.store(2, [3], (2,), first_number=2)
    rig.driver.hold.set()
    rig.worker.wait({1, 2})
    assert sorted(rig.finished()) == [1, 2]
    report = rig.worker.take_report()
    assert report is not None
    assert list(report.sizes) == [2]
    assert len(rig.worker.engine.list_keys()) == 1


@pytest.mark.parametrize("function", ["copy_batch", "copy", "malloc"])
def test_a_device_error_loses_the_job_and_nothing_else(rig: Rig, function: str) -> None:
    rig.driver.fail[function] = cuda_error()
    rig.store(1, [1, 2], (0, 1))
    rig.store(2, [3], (2,))
    rig.worker.wait({1, 2})
    assert sorted(rig.finished()) == [1, 2]
    report = rig.worker.take_report()
    assert report is not None
    failed = function not in rig.driver.fail  # not every way out of the GPU uses every function
    assert ({n for n, size in report.sizes.items() if size == 0} == {0, 1}) is failed
    assert report.sizes[2] > 0


def test_a_load_that_fails_on_the_device_is_left_to_be_computed_again(rig: Rig) -> None:
    rig.store(1, [1, 2], (0, 1))
    rig.worker.wait({1})
    rig.finished()
    rig.driver.hold.clear()
    rig.load(2, (0, 1), [5, 6])
    for name in ("copy", "copy_batch", "malloc"):
        rig.driver.fail[name] = cuda_error()
    rig.driver.hold.set()
    rig.worker.wait({2})
    assert rig.finished() == [2]
    assert rig.worker.take_bad_blocks() == {5, 6}
    report = rig.worker.take_report()
    assert report is not None
    assert report.sizes[0] == report.sizes[1] == 0


def test_damaged_records_are_named_one_by_one(rig: Rig) -> None:
    rig.store(1, [1, 2, 3], (0, 1, 2))
    rig.worker.wait({1})
    rig.finished()
    key = next(k for k in rig.worker.engine.list_keys() if k[7] == 1)
    rig.worker.engine.pool.views(rig.worker.engine._index.find([key])[0].allocation)[0][-16:] ^= 0x5A
    rig.load(2, (0, 1, 2), [5, 6, 7])
    rig.worker.wait({2})
    assert rig.finished() == [2]
    assert rig.worker.take_bad_blocks() == {6}
    assert np.array_equal(rig.array[[5, 7]], rig.before[[1, 3]])
    assert np.array_equal(rig.array[6], rig.before[6])


def test_shutdown_lets_what_is_under_way_end(rig: Rig) -> None:
    rig.driver.hold.clear()
    rig.store(1, [1, 2], (0, 1))
    ending = threading.Thread(target=rig.worker.shutdown)
    ending.start()
    ending.join(0.05)
    assert ending.is_alive()
    rig.driver.hold.set()
    ending.join(30)
    assert not ending.is_alive()
    assert rig.worker.engine.pool.closed
