# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The worker: blocks of several groups, unaligned chunks, sizes, lost and damaged records. Real engine, host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="vLLM needs torch")
pytest.importorskip("vllm.v1", reason="vLLM is not installed")

from kvzip import BlockView, ErrorBound, HostPool, SwapEngine, read_header  # noqa: E402
from kvzip.adapters.vllm.layout import Group, Page  # noqa: E402
from kvzip.adapters.vllm.messages import RecordSpec  # noqa: E402
from kvzip.adapters.vllm.settings import AdapterSettings  # noqa: E402
from kvzip.adapters.vllm.worker import KvzipOffloadingWorker  # noqa: E402
from kvzip.errors import ConfigError  # noqa: E402
from kvzip.integrity import Integrity  # noqa: E402

BLOCKS = 24


def caches(groups: int = 1) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn((BLOCKS, 2, 16, 2, 8), generator=generator) for _ in range(groups)]


Make = Callable[..., KvzipOffloadingWorker]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[KvzipOffloadingWorker] = []

    def build(
        tensors: list[Any],
        blocks_per_chunk: int = 1,
        capacity: int = 1 << 20,
        verify: float = 0.0,
        coding: dict[str, Any] | None = None,
        **more: Any,
    ) -> KvzipOffloadingWorker:
        settings = AdapterSettings(capacity).change(**(coding or {"bound": "lossless"}))
        worker = KvzipOffloadingWorker(
            [Group(BlockView([tensor], "2NHD"), (Page(0, (0, 2)),) * 2, 2) for tensor in tensors],
            settings,
            blocks_per_chunk,
            lambda policy: SwapEngine(
                HostPool(capacity),
                policy=policy,
                integrity=Integrity(bound=verify),
                controller=settings.objective,
                pressure=settings.bound_pressure,
            ),
            **more,
        )
        made.append(worker)
        return worker

    yield build
    for worker in made:
        worker.engine.pool.check()
        worker.shutdown()


def gpu(*groups: tuple[int, list[int]]) -> Any:
    """Blocks of each group, behind the index of the first one in its prompt."""
    return SimpleNamespace(
        block_ids=np.array([b for _, blocks in groups for b in blocks], np.int32),
        group_sizes=[len(blocks) for _, blocks in groups],
        block_indices=[index for index, _ in groups],
    )


def finish(worker: KvzipOffloadingWorker, *jobs: int) -> None:
    worker.wait(set(jobs))
    results = worker.get_finished()
    assert [r.job_id for r in results] == list(jobs)
    assert all(r.success for r in results)


def sizes(worker: KvzipOffloadingWorker) -> dict[int, int]:
    report = worker.take_report()
    assert report is not None
    return report.sizes


def test_blocks_come_back_and_sizes_are_those_of_the_pool(make: Make) -> None:
    (cache,) = tensors = caches()
    worker = make(tensors)
    before = cache.clone()
    assert worker.submit_store(7, gpu((0, [3, 1, 4])), RecordSpec((0, 1, 2)))
    finish(worker, 7)
    reported = sizes(worker)
    assert sorted(reported) == [0, 1, 2]
    assert sum(reported.values()) == worker.engine.pool.stats().extent_bytes_used
    assert worker.take_report() is None
    assert worker.submit_load(8, RecordSpec((2, 0)), gpu((0, [10, 11])))
    finish(worker, 8)
    assert torch.equal(cache[10], before[4])
    assert torch.equal(cache[11], before[3])
    untouched = [b for b in range(BLOCKS) if b not in (10, 11)]
    assert torch.equal(cache[untouched], before[untouched])
    assert worker.take_bad_blocks() == set()


def test_pressure_and_objective_reach_the_engine(make: Make) -> None:
    """Steps hold for pages, layers of their own and first blocks stay as they are; the metrics see both."""
    tensors = caches()
    coding = {"bound": "1e-3", "pressure": ["1e-1"], "pressure_thresholds": [0.1], "objective": "capacity"}
    worker = make(tensors, capacity=40_000, coding=coding)
    for number in range(6):
        worker.submit_store(number, gpu((0, [number])), RecordSpec((number,)))
        finish(worker, number)
    worker.submit_store(6, gpu((0, [6, 7])), RecordSpec((6, 7), starts=(0,)))
    finish(worker, 6)
    calm, pressed, first = (
        read_header(worker.engine.read_record(number.to_bytes(8, "big") + bytes(4))).bound for number in (0, 5, 6)
    )
    assert (calm, pressed, first) == (ErrorBound.relative(1e-3), ErrorBound.relative(1e-1), ErrorBound.lossless())
    report = worker.take_report()
    assert report is not None
    assert report.totals["fallback:bound_pressure"] > 0
    assert worker.engine.controller is not None
    assert set(worker.engine.controller.decisions) == {("encoded", "objective")}
    worker.configure(bound="lossless", layer_bounds={"0": "1e-2"})
    worker.submit_store(8, gpu((0, [8])), RecordSpec((8,)))
    finish(worker, 8)
    assert read_header(worker.engine.read_record((8).to_bytes(8, "big") + bytes(4))).bound == ErrorBound.relative(1e-2)


@pytest.mark.parametrize("blocks_per_chunk", [2, 3])
def test_chunks_of_several_blocks_and_unaligned_heads(make: Make, blocks_per_chunk: int) -> None:
    n = blocks_per_chunk
    (cache,) = tensors = caches()
    worker = make(tensors, n)
    before = cache.clone()
    prompt = list(range(1, 1 + 3 * n))
    worker.submit_store(1, gpu((0, prompt)), RecordSpec((0, 1, 2)))
    finish(worker, 1)
    assert sum(sizes(worker).values()) == worker.engine.pool.stats().extent_bytes_used
    cache.zero_()
    # Blocks n + 1 to 3n - 2: the first chunk and the last block are on the GPU already, or not wanted.
    wanted = prompt[n + 1 : -1]
    worker.submit_load(2, RecordSpec((1, 2)), gpu((n + 1, wanted)))
    finish(worker, 2)
    assert torch.equal(cache[wanted], before[wanted])
    others = [b for b in range(BLOCKS) if b not in wanted]
    assert not cache[others].any()


def test_a_chunk_without_its_first_blocks(make: Make) -> None:
    """A sliding window has given them up; what is there is kept, the rest cannot be loaded."""
    (cache,) = tensors = caches()
    worker = make(tensors, 3)
    before = cache.clone()
    worker.submit_store(1, gpu((4, [5, 6, 7, 8, 9])), RecordSpec((0, 1)))
    finish(worker, 1)
    assert all(sizes(worker).values())
    cache.zero_()
    worker.submit_load(2, RecordSpec((0,)), gpu((3, [1, 2, 3])))
    finish(worker, 2)
    assert torch.equal(cache[[2, 3]], before[[5, 6]])
    assert worker.take_bad_blocks() == {1}


def test_several_groups_in_one_job(make: Make) -> None:
    tensors = caches(3)
    worker = make(tensors, 2)
    before = [t.clone() for t in tensors]
    worker.submit_store(1, gpu((0, [1, 2, 3, 4]), (0, []), (3, [5, 6, 7])), RecordSpec((0, 1, 2, 3)))
    finish(worker, 1)
    assert len(sizes(worker)) == 4
    for tensor in tensors:
        tensor.zero_()
    worker.submit_load(2, RecordSpec((1, 2, 3)), gpu((2, [8, 9]), (0, []), (3, [10, 11, 12])))
    finish(worker, 2)
    assert torch.equal(tensors[0][[8, 9]], before[0][[3, 4]])
    assert not tensors[1].any()
    assert torch.equal(tensors[2][[10, 11, 12]], before[2][[5, 6, 7]])


def test_what_the_scheduler_gives_up_is_forgotten(make: Make) -> None:
    worker = make(caches(), 2)
    worker.submit_store(1, gpu((0, [1, 2, 3, 4, 5, 6])), RecordSpec((0, 1, 2)))
    worker.submit_store(2, gpu((0, [7, 8])), RecordSpec((3,), discards=(0, 2)))
    finish(worker, 1, 2)
    # Job 1 was done before the records were given up; their sizes are still told, the catalogue does not mind.
    assert len(worker.engine.list_keys()) == 4
    worker.submit_store(3, gpu((0, [9, 10])), RecordSpec((4,), first_number=4))
    finish(worker, 3)
    assert [n for n, size in sizes(worker).items() if size] == [1, 3, 4]
    assert len(worker.engine.list_keys()) == 2


def test_a_store_of_a_forgotten_generation_leaves_nothing_behind(make: Make) -> None:
    worker = make(caches())
    worker.submit_store(1, gpu((0, [1, 2])), RecordSpec((0, 1)))  # the scheduler resets before it has ended
    worker.submit_store(2, gpu((0, [3])), RecordSpec((2,), first_number=2))
    finish(worker, 1, 2)
    assert list(sizes(worker)) == [2]
    assert len(worker.engine.list_keys()) == 1


def test_a_store_that_does_not_fit_is_dropped_and_told(make: Make) -> None:
    worker = make(caches(), capacity=4096)
    worker.submit_store(1, gpu((0, list(range(20)))), RecordSpec(tuple(range(20))))
    finish(worker, 1)
    report = worker.take_report()
    assert report is not None
    assert report.sizes == dict.fromkeys(range(20), 0)
    assert report.totals["failed_store_blocks"] == 20
    assert worker.engine.list_keys() == []


def test_what_the_engine_evicts_by_itself_is_told(make: Make) -> None:
    worker = make(caches(), capacity=10_000)
    for number in range(12):
        worker.submit_store(number, gpu((0, [number])), RecordSpec((number,)))
        finish(worker, number)
    told = sizes(worker)
    lost = {number for number, size in told.items() if size == 0}
    assert lost
    held = {int.from_bytes(key[:8], "big") for key in worker.engine.list_keys()}
    assert held == set(range(12)) - lost


def damage(worker: KvzipOffloadingWorker, number: int) -> None:
    key = next(k for k in worker.engine.list_keys() if int.from_bytes(k[:8], "big") == number)
    worker.engine.pool.views(worker.engine._index.find([key])[0].allocation)[0][-16:] ^= 0x5A


@pytest.mark.parametrize("bad", [[1], [0, 2], [0, 1, 2, 3]])
def test_damaged_records_are_reported_dropped_and_the_others_loaded(make: Make, bad: list[int]) -> None:
    (cache,) = tensors = caches()
    worker = make(tensors)
    before = cache.clone()
    worker.submit_store(1, gpu((0, [1, 2, 3, 4])), RecordSpec((0, 1, 2, 3)))
    finish(worker, 1)
    sizes(worker)
    for number in bad:
        damage(worker, number)
    worker.submit_load(2, RecordSpec((0, 1, 2, 3)), gpu((0, [10, 11, 12, 13])))
    finish(worker, 2)
    for number in range(4):
        same = torch.equal(cache[10 + number], before[1 + number])
        assert same != (number in bad)
        assert torch.equal(cache[10 + number], before[10 + number]) == (number in bad), "nothing of it is published"
    assert worker.take_bad_jobs() == {2}
    assert worker.take_bad_blocks() == {10 + number for number in bad}
    assert worker.take_bad_blocks() == set()
    assert sizes(worker) == dict.fromkeys(bad, 0)
    worker.submit_load(3, RecordSpec(tuple(bad)), gpu((0, [10 + number for number in bad])))
    finish(worker, 3)
    assert worker.take_bad_blocks() == {10 + number for number in bad}, "a record that is gone cannot be loaded"


def test_without_the_connector_a_failed_load_does_not_pass_for_a_good_one(make: Make) -> None:
    worker = make(caches(), recover=False)
    worker.submit_load(1, RecordSpec((5,)), gpu((0, [1])))
    with pytest.raises(RuntimeError, match="use kv_connector KvzipConnector"):
        worker.get_finished()


def test_a_store_job_that_does_not_add_up_is_not_kept(make: Make) -> None:
    worker = make(caches())
    worker.submit_store(1, gpu((0, [1, 2, 3])), RecordSpec((0, 1)))
    finish(worker, 1)
    assert sizes(worker) == {0: 0, 1: 0}


def test_a_load_job_that_does_not_add_up_is_computed_again(make: Make) -> None:
    (cache,) = tensors = caches()
    worker = make(tensors)
    worker.submit_store(1, gpu((0, [1, 2])), RecordSpec((0, 1)))
    finish(worker, 1)
    sizes(worker)
    before = cache.clone()
    assert worker.submit_load(2, RecordSpec((0, 1)), gpu((0, [10, 11, 12])))
    finish(worker, 2)
    assert worker.take_bad_blocks() == {10, 11, 12}
    assert worker.take_bad_jobs() == {2}
    report = worker.take_report()
    assert report is not None
    assert report.sizes == {0: 0, 1: 0}, "vLLM would ask for the same load again"
    assert report.totals["failed_load_blocks"] == 3
    assert torch.equal(cache, before)


def test_without_the_connector_nothing_waits_to_be_reported(make: Make) -> None:
    worker = make(caches(), capacity=10_000, recover=False)
    for number in range(40):
        worker.submit_store(number, gpu((0, [number % BLOCKS])), RecordSpec((number,)))
        finish(worker, number)
    assert not worker._sizes
    assert not worker._policy.evicted


def test_what_goes_on_failing_does_not_fill_the_log(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    worker = make(caches())
    for job in range(5):
        worker.submit_load(job, RecordSpec((100 + job,)), gpu((0, [job])))
        finish(worker, job)
    for job in range(5, 10):
        worker.submit_store(job, gpu((0, [1, 2])), RecordSpec((job,)))
        finish(worker, job)
    warned = [record.getMessage() for record in caplog.records if record.name == "kvzip"]
    assert len(warned) == 2
    assert "1 of 1 KV blocks could not be loaded" in warned[0]
    assert "2 of 2 KV blocks could not be stored" in warned[1]
    report = worker.take_report()
    assert report is not None
    assert report.totals["failed_load_blocks"] == 5
    assert report.totals["failed_store_blocks"] == 10


def test_verifying_stores_count_violations(make: Make) -> None:
    worker = make(caches(), verify=1.0)
    worker.submit_store(1, gpu((0, [1])), RecordSpec((0,)))
    finish(worker, 1)
    report = worker.take_report()
    assert report is not None
    assert report.totals["violations"] == 0
    assert report.totals["stored_raw_bytes"] == 2 * 16 * 2 * 8 * 4


def test_settings_change_for_the_next_stores(make: Make) -> None:
    worker = make(caches())
    worker.submit_store(1, gpu((0, [1])), RecordSpec((0,)))
    worker.configure(bound=1e-2)
    worker.submit_store(2, gpu((0, [1])), RecordSpec((1,)))
    finish(worker, 1, 2)
    told = sizes(worker)
    assert told[1] < 0.5 * told[0]
    with pytest.raises(ConfigError, match="max_ctas: only bound, codec, layer_bounds, mode can"):
        worker.configure(max_ctas=4, bound=1e-3)
    assert worker.settings.bound == ErrorBound.relative(1e-2)


def test_the_block_that_begins_a_prompt_is_exact(make: Make) -> None:
    (cache,) = tensors = caches()
    worker = make(tensors, 2)
    worker.configure(bound=1e-1)
    before = cache.clone()
    worker.submit_store(1, gpu((0, [1, 2, 3, 4])), RecordSpec((0, 1), starts=(0,)))
    finish(worker, 1)
    cache.zero_()
    worker.submit_load(2, RecordSpec((0, 1)), gpu((0, [1, 2, 3, 4])))
    finish(worker, 2)
    assert [torch.equal(cache[b], before[b]) for b in (1, 2, 3, 4)] == [True, False, False, False]
