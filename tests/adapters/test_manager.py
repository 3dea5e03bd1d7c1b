# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The manager as vLLM's scheduler calls it, the workers' reports, metrics and events."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

pytest.importorskip("torch", reason="vLLM needs torch")
pytest.importorskip("vllm.v1", reason="vLLM is not installed")

from vllm.v1.kv_offload import base as vllm_base

from kvzip.adapters.vllm import metrics
from kvzip.adapters.vllm.catalog import RecordCatalog
from kvzip.adapters.vllm.manager import KvzipOffloadingManager
from kvzip.adapters.vllm.messages import KvzipWorkerMetadata, OffloadingWorkerMetadata, RecordSpec, WorkerReport
from kvzip.adapters.vllm.metrics import ManagerMetrics

WORST = 100


def k(*numbers: int, group: int = 0) -> list[Any]:
    return [vllm_base.make_offload_key(b"hash%d" % n, group) for n in numbers]


def request(name: str = "r") -> Any:
    return vllm_base.ReqContext(name)


def manager(capacity: int = 10 * WORST, workers: int = 1, events: bool = False) -> KvzipOffloadingManager:
    catalog = RecordCatalog(capacity, workers, {0: WORST, 1: WORST}, vllm_base.get_offload_group_idx)
    return KvzipOffloadingManager(catalog, ManagerMetrics(), {0: 2, 1: 4}, enable_events=events)


def store(m: KvzipOffloadingManager, keys: list[Any], context: Any, nbytes: int = WORST) -> Any:
    output = m.prepare_store(keys, context)
    assert output is not None
    spec = output.store_spec
    m.apply({0: WorkerReport(dict.fromkeys(spec.numbers, nbytes))})
    m.complete_store(set(output.keys_to_store), context)
    return output


RESULT = getattr(vllm_base, "LookupResult", None)


def test_a_chunk_from_its_store_to_its_load() -> None:
    m, r = manager(), request()
    assert m.on_new_request(r) is not None
    assert m.lookup(k(1)[0], r) == RESULT.MISS
    output = m.prepare_store(k(1, 2), r)
    assert output is not None
    assert (output.keys_to_store, output.evicted_keys) == (k(1, 2), [])
    assert m.lookup(k(1)[0], r) == RESULT.HIT_PENDING
    m.apply({0: WorkerReport(dict.fromkeys(output.store_spec.numbers, 50))})
    m.complete_store(set(k(1, 2)), r)
    assert m.lookup(k(1)[0], r) == RESULT.HIT
    spec = m.prepare_load(k(2), r)
    assert spec.numbers == (output.store_spec.numbers[1],)
    m.complete_load(set(k(2)), r)
    again = m.prepare_store(k(1, 2), request("s"))
    assert again is not None
    assert again.keys_to_store == []
    if hasattr(vllm_base, "CacheHitSource"):
        assert m.get_load_source(k(1)[0], r) == vllm_base.CacheHitSource.HOST


def test_evicted_and_lost_records_ride_in_the_next_message() -> None:
    m, r = manager(3 * WORST), request()
    first = store(m, k(1, 2, 3), r)
    output = m.prepare_store(k(4), r)
    assert output is not None
    assert output.evicted_keys == k(3)
    assert output.store_spec.discards == (first.store_spec.numbers[2],)
    m.apply({0: WorkerReport({output.store_spec.numbers[0]: 0})})
    m.complete_store(k(4), r)
    assert m.lookup(k(4)[0], r) == RESULT.MISS
    assert m.prepare_load(k(1), r).discards == (output.store_spec.numbers[0],)


def test_a_store_of_nothing_new_takes_no_message_along() -> None:
    m, r = manager(), request()
    store(m, k(1, 2), r)
    m.apply({0: WorkerReport({0: 0})})
    unsent = m.prepare_store(k(2), r)  # vLLM throws such a store away
    assert unsent is not None
    assert unsent.keys_to_store == []
    output = m.prepare_store(k(3), r)
    assert output is not None
    assert output.store_spec.discards == (0,)


def test_no_room_now_means_ask_again() -> None:
    m, r = manager(2 * WORST), request()
    store(m, k(1, 2), r)
    m.prepare_load(k(1, 2), r)
    assert m.prepare_store(k(3), r) is None
    m.complete_load(k(1, 2), r)
    assert m.prepare_store(k(3), r) is not None


def test_the_beginning_of_a_finished_request_is_the_hottest() -> None:
    m = manager(4 * WORST)
    r = request()
    store(m, k(1, 2), r)  # a prompt computed in two steps, its end stored last
    late = m.prepare_store(k(3, 4), r)
    assert late is not None
    m.on_request_finished(r)
    m.apply({0: WorkerReport(dict.fromkeys(late.store_spec.numbers, WORST))})
    m.complete_store(set(k(3, 4)), r)
    output = m.prepare_store(k(10, 11), request("other"))
    assert output is not None
    assert output.evicted_keys == k(4, 3)
    assert m._requests.keys() == {"other"}


def test_chunks_at_position_0_are_marked() -> None:
    m, r = manager(), request()
    hashes = [b"hash%d" % n for n in range(8)]
    m.note_starts("r", hashes)  # two hashes a chunk in group 0, four in group 1
    output = m.prepare_store([*k(1, 3), *k(3, 7, group=1)], r)
    assert output is not None
    assert output.store_spec.starts == (0, 2)
    m.note_starts("short", hashes[:1])
    short = m.prepare_store(k(0), request("short"))
    assert short is not None
    assert short.store_spec.starts == ()


def test_reset_cache_begins_a_generation() -> None:
    m, r = manager(), request()
    store(m, k(1, 2), r)
    m.reset_cache()
    assert m.lookup(k(1)[0], r) == RESULT.MISS
    output = m.prepare_store(k(1), r)
    assert output is not None
    assert output.store_spec.first_number == 2
    assert min(output.store_spec.numbers) >= 2
    m.complete_load(k(1, 2), r)  # what was under way may still end


def test_a_request_that_goes_on_after_a_reset_begins_again() -> None:
    m, r, done = manager(), request(), request("done")
    m.note_starts("r", [b"hash%d" % n for n in range(4)])
    assert m.prepare_store(k(1, 3), r) is not None
    assert m.prepare_store(k(7), done) is not None
    m.on_request_finished(done)
    m.reset_cache()
    assert m._requests.keys() == {"r"}
    output = m.prepare_store(k(1, 3), r)
    assert output is not None
    assert output.store_spec.starts == (0,)
    m.complete_store(k(1, 3), r)
    m.on_request_finished(r)
    assert not m._requests


def test_a_failed_store_is_forgotten() -> None:
    m, r = manager(), request()
    assert m.prepare_store(k(1), r) is not None
    m.complete_store(k(1), r, success=False)
    assert m.lookup(k(1)[0], r) == RESULT.MISS
    assert m.catalog.used_bytes == (0,)


def test_events() -> None:
    assert list(manager().take_events()) == []
    m, r = manager(WORST, events=True), request()
    store(m, k(1), r)
    store(m, k(2), r)
    told = [(event.keys, event.removed) for event in m.take_events()]
    assert told == [(k(1), False), (k(1), True), (k(2), False)]
    assert list(m.take_events()) == []


def test_a_lost_chunk_is_announced_as_removed() -> None:
    m, r = manager(workers=2, events=True), request()
    output = m.prepare_store(k(1, 2), r)
    assert output is not None
    first, second = output.store_spec.numbers
    m.apply({0: WorkerReport({first: 10, second: 10}), 1: WorkerReport({first: 10, second: 0})})
    m.complete_store(set(k(1, 2)), r)
    m.apply({0: WorkerReport({first: 0}), 1: WorkerReport({first: 0})})
    assert [(event.keys, event.removed) for event in m.take_events()] == [(k(1), False), (k(1), True)]


def test_reports_of_several_workers() -> None:
    def meta(rank: int, jobs: dict[int, int], sizes: dict[int, int]) -> KvzipWorkerMetadata:
        base = OffloadingWorkerMetadata(completed_jobs=jobs)
        return KvzipWorkerMetadata.of(base, {rank: WorkerReport(sizes, {"stored_raw_bytes": 10.0})})

    joined = meta(0, {5: 1}, {0: 40}).aggregate(meta(1, {5: 1, 6: 1}, {0: 60, 1: 7}))
    joined = joined.aggregate(OffloadingWorkerMetadata(completed_jobs={6: 1}))  # a worker with nothing to report
    joined = pickle.loads(pickle.dumps(joined))
    assert joined.completed_jobs == {5: 2, 6: 2}
    assert {rank: report.sizes for rank, report in joined.reports.items()} == {0: {0: 40}, 1: {0: 60, 1: 7}}
    m, r = manager(workers=2), request()
    assert m.prepare_store(k(1, 2), r) is not None
    m.apply(joined.reports)
    assert m.catalog.used_bytes == (40 + WORST, 67)


def test_the_messages_survive_pickling() -> None:
    spec = pickle.loads(pickle.dumps(RecordSpec((3, 4), (1,), 1, (0,))))
    assert (spec.numbers, spec.discards, spec.first_number, spec.starts) == ((3, 4), (1,), 1, (0,))


def values(stats: Any) -> dict[str, Any]:
    return {name: dict(by_label) for name, by_label in stats.data["data"].items()}


def test_metrics_are_defined_counted_once_and_summed_over_workers() -> None:
    m, r = manager(workers=2), request()
    definitions = metrics.definitions()
    assert all(name.startswith("vllm:") for name in definitions)
    totals = {"stored_raw_bytes": 200.0, "held_raw_bytes": 200.0, "held_record_bytes": 50.0, "fallback:not_finite": 3.0}
    m.apply({0: WorkerReport({}, totals), 1: WorkerReport({}, totals)})
    store(m, k(1), r)
    found = values(m.get_stats())
    assert found["vllm:kvzip_stored_raw_bytes"] == {(): 400.0}
    assert found["vllm:kvzip_ratio"] == {(): 4.0}
    assert found["vllm:kvzip_fallback_pages"] == {("not_finite",): 6.0}
    assert found["vllm:kvzip_stored_chunks"] == {(): 1}
    assert found["vllm:kvzip_pool_usage_perc"] == {(): 0.1}
    assert found.keys() <= definitions.keys()
    assert m.get_stats() is None
    m.apply({1: WorkerReport({}, {**totals, "stored_raw_bytes": 230.0})})
    found = values(m.get_stats())
    assert found["vllm:kvzip_stored_raw_bytes"] == {(): 30.0}
    assert "vllm:kvzip_fallback_pages" not in found
