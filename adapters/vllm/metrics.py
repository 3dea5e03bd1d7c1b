# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Metrics through vLLM's own hook: their definitions, and the counting of what the workers report."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingGaugeMetadata

from kvzip.adapters.vllm.catalog import RecordCatalog
from kvzip.engine import EngineStats

_PREFIX = "vllm:kvzip_"
_FALLBACK = "fallback:"  # of a total's name; what follows is the reason

#: name -> what it says. Bytes and records are sums over the workers where nothing else is said.
GAUGES = {
    "ratio": "Raw bytes over record bytes of what is held.",
    "held_raw_bytes": "Raw bytes of the KV blocks that are held.",
    "held_record_bytes": "Bytes of their records.",
    "pool_capacity_bytes": "Bytes of host memory that the pools have.",
    "pool_used_bytes": "Bytes of the pools that records take, rounded up to extents.",
    "pool_usage_perc": "Used fraction of the fullest worker's pool (1.0 = full).",
    "chunks": "Chunks that are held or being stored.",
}
COUNTERS = {
    "stored_raw_bytes": "Raw bytes of the KV blocks that were stored.",
    "stored_record_bytes": "Bytes of their records.",
    "loaded_raw_bytes": "Raw bytes of the KV blocks that were loaded.",
    "store_seconds": "Time from the start to the end of stores, summed; they may overlap.",
    "load_seconds": "Time from the start to the end of loads, summed; they may overlap.",
    "violations": "Values outside the bound, found by stores that verify.",
    "corrupt_records": "Records that failed their checks at a load.",
    "failed_store_blocks": "KV blocks that could not be stored.",
    "failed_load_blocks": "KV blocks that could not be loaded and were left to be computed again.",
    "stored_chunks": "Chunks that were stored on all workers.",
    "evicted_chunks": "Chunks whose records left for others.",
    "lost_chunks": "Chunks that a worker could not store, or found damaged or missing.",
    "refused_stores": "Stores that found no room and were put off.",
}
FALLBACKS = "fallback_pages"


def definitions() -> dict[str, Any]:
    """What vLLM needs to know of the metrics, by their full names."""
    found: dict[str, Any] = {}
    for name, text in GAUGES.items():
        found[_PREFIX + name] = OffloadingGaugeMetadata(documentation=text)
    for name, text in COUNTERS.items():
        found[_PREFIX + name] = OffloadingCounterMetadata(documentation=text)
    found[_PREFIX + FALLBACKS] = OffloadingCounterMetadata(
        documentation="Pages that were not coded as asked, by reason.", labelnames=("reason",)
    )
    return found


def worker_totals(stats: EngineStats, failed_store_blocks: int, failed_load_blocks: int) -> dict[str, float]:
    """The numbers of one worker that the scheduler's side adds up."""
    totals: dict[str, float] = {
        "held_raw_bytes": stats.raw_bytes,
        "held_record_bytes": stats.record_bytes,
        "pool_capacity_bytes": stats.pool.capacity_bytes,
        "pool_used_bytes": stats.pool.extent_bytes_used,
        "stored_raw_bytes": stats.stored_raw_bytes,
        "stored_record_bytes": stats.stored_record_bytes,
        "loaded_raw_bytes": stats.loaded_raw_bytes,
        "store_seconds": stats.store_seconds,
        "load_seconds": stats.load_seconds,
        "violations": stats.violations,
        "corrupt_records": stats.corrupt_blocks,
        "failed_store_blocks": failed_store_blocks,
        "failed_load_blocks": failed_load_blocks,
    }
    totals.update({_FALLBACK + reason: pages for reason, pages in stats.fallbacks.items()})
    return totals


class ManagerMetrics:
    """Adds up what the workers report, and what the catalogue counts."""

    def __init__(self) -> None:
        self._workers: dict[int, dict[str, float]] = {}
        self._told: dict[str, float] = {}  # counters as they stood at the last collection
        self._gauges: dict[str, float] = {}

    def update(self, rank: int, totals: dict[str, float]) -> None:
        """Take in a worker's totals."""
        if totals:
            self._workers[rank] = totals

    def collect(self, catalog: RecordCatalog) -> OffloadingConnectorStats | None:
        """What has changed since the last call, or None."""
        sums: dict[str, float] = {}
        for totals in self._workers.values():
            for name, value in totals.items():
                sums[name] = sums.get(name, 0) + value
        counts = catalog.counts
        sums.update(
            stored_chunks=counts.stored,
            evicted_chunks=counts.evicted,
            lost_chunks=counts.lost,
            refused_stores=counts.refused,
        )
        gauges = {name: sums.pop(name, 0.0) for name in GAUGES}
        held = gauges["held_record_bytes"]
        gauges["ratio"] = gauges["held_raw_bytes"] / held if held else 1.0
        gauges["pool_usage_perc"] = max(catalog.used_bytes) / catalog.capacity_bytes
        gauges["chunks"] = len(catalog)
        changed = {name: value for name, value in sums.items() if value != self._told.get(name, 0)}
        if not changed and gauges == self._gauges:
            return None
        stats = OffloadingConnectorStats()
        for name, value in gauges.items():
            stats.set_gauge(_PREFIX + name, value)
        for name, value in changed.items():
            more = value - self._told.get(name, 0)
            if name.startswith(_FALLBACK):
                stats.increase_counter(_PREFIX + FALLBACKS, more, (name.removeprefix(_FALLBACK),))
            else:
                stats.increase_counter(_PREFIX + name, more)
        self._told, self._gauges = sums, gauges
        return stats
