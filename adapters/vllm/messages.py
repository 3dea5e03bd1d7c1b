# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What the scheduler's side and the workers tell each other, inside vLLM's own messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
from vllm.v1.kv_offload.base import LoadStoreSpec


class RecordSpec(LoadStoreSpec):
    """Scheduler to workers: the records of a store or a load, one a chunk, in the order of the chunks.

    Attributes:
        numbers: of the records.
        discards: numbers of records to forget before it.
        first_number: records with smaller numbers are to be forgotten.
        starts: positions in `numbers` of chunks that begin a prompt.
    """

    def __init__(
        self,
        numbers: tuple[int, ...],
        discards: tuple[int, ...] = (),
        first_number: int = 0,
        starts: tuple[int, ...] = (),
    ) -> None:
        self.numbers = numbers
        self.discards = discards
        self.first_number = first_number
        self.starts = starts

    @staticmethod
    def medium() -> str:
        """What vLLM up to 0.25 calls the place of the records."""
        return "KVZIP"

    def __repr__(self) -> str:
        return f"RecordSpec({len(self.numbers)} records, {len(self.discards)} discards)"


@dataclass
class WorkerReport:
    """Worker to scheduler: what has changed since the last one.

    Attributes:
        sizes: number of a record -> bytes of this worker's pool that it takes; 0 = it is not held (any more).
        totals: counters since the worker began, by name.
    """

    sizes: dict[int, int] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)


@dataclass
class KvzipWorkerMetadata(OffloadingWorkerMetadata):
    """vLLM's list of finished jobs, with the workers' reports.

    Attributes:
        reports: rank -> report.
    """

    reports: dict[int, WorkerReport] = field(default_factory=dict)

    @classmethod
    def of(cls, base: OffloadingWorkerMetadata | None, reports: Mapping[int, WorkerReport]) -> KvzipWorkerMetadata:
        """Add reports to what vLLM's own side made."""
        own: dict[str, Any] = {}
        if base is not None:
            own = {f.name: getattr(base, f.name) for f in fields(base) if f.name != "reports"}
        return cls(**own, reports=dict(reports))

    def aggregate(self, other: Any) -> KvzipWorkerMetadata:
        """Join with another worker's."""
        return KvzipWorkerMetadata.of(super().aggregate(other), {**self.reports, **getattr(other, "reports", {})})
