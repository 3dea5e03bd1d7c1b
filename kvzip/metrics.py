# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What an engine counts, as families of counters, gauges and histograms; and an exporter of them to Prometheus.

`SwapEngine.metrics` gives a `MetricsSnapshot`. docs/reference/metrics.md has the names: base units (bytes, seconds),
labels with few values, none for a request. Nothing here imports prometheus_client before a `PrometheusCollector` is
used.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from prometheus_client.core import Metric

__all__ = ["Family", "HistogramValue", "Meter", "MetricsSnapshot", "PrometheusCollector", "Sample", "snapshot"]

OPERATIONS = ("store", "load")
#: Upper ends of the histograms' buckets; the last bucket is open.
SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BYTES = tuple(float(1 << shift) for shift in range(16, 34, 2))  # 64 KiB to 4 GiB
BYTES_PER_SECOND = (1e8, 2.5e8, 5e8, 1e9, 2.5e9, 5e9, 1e10, 2e10, 4e10, 6e10, 8e10, 1.2e11, 1.6e11, 2e11, 3e11)
RATIO = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 16.0)


@dataclass(frozen=True)
class HistogramValue:
    """A histogram at one moment.

    Attributes:
        buckets: upper end of each bucket and the observations up to it, the last one open (infinity).
        sum: of the observed values.
    """

    buckets: tuple[tuple[float, int], ...]
    sum: float

    @property
    def count(self) -> int:
        """Number of observations."""
        return self.buckets[-1][1]


@dataclass(frozen=True)
class Sample:
    """One value of a family, under its labels."""

    labels: Mapping[str, str]
    value: float | HistogramValue


@dataclass(frozen=True)
class Family:
    """Values of one name.

    Attributes:
        name: as Prometheus calls it; counters end in ``_total``.
        kind: ``"counter"``, ``"gauge"`` or ``"histogram"``.
        help: one sentence.
        samples: one for each set of labels; a counter that has counted nothing yet may have none.
    """

    name: str
    kind: str
    help: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class MetricsSnapshot:
    """All families of an engine at one moment."""

    families: tuple[Family, ...]

    def value(self, name: str, **labels: str) -> float | HistogramValue:
        """One value; 0.0 for labels that have not been counted yet.

        Raises:
            KeyError: no family has this name.
        """
        for family in self.families:
            if family.name == name:
                return next((s.value for s in family.samples if dict(s.labels) == labels), 0.0)
        raise KeyError(f"no metric is named {name!r}: docs/reference/metrics.md has the names")

    def as_dict(self) -> dict[str, float]:
        """Numbers by ``name{label="value"}``; a histogram gives its ``_count`` and ``_sum``."""
        flat: dict[str, float] = {}
        for family in self.families:
            for sample in family.samples:
                labels = ",".join(f'{k}="{v}"' for k, v in sample.labels.items())
                suffix = f"{{{labels}}}" if labels else ""
                if isinstance(sample.value, HistogramValue):
                    flat[f"{family.name}_count{suffix}"] = float(sample.value.count)
                    flat[f"{family.name}_sum{suffix}"] = sample.value.sum
                else:
                    flat[f"{family.name}{suffix}"] = float(sample.value)
        return flat


class _Histogram:
    def __init__(self, ends: Sequence[float]) -> None:
        self._ends = ends
        self._counts = [0] * (len(ends) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._ends, value)] += 1
        self._sum += value

    def value(self) -> HistogramValue:
        total, buckets = 0, []
        for end, count in zip((*self._ends, float("inf")), self._counts, strict=True):
            total += count
            buckets.append((end, total))
        return HistogramValue(tuple(buckets), self._sum)


class Meter:
    """What an engine observes of its transfers, beside the counters of `EngineStats`. The engine's lock guards it."""

    def __init__(self) -> None:
        self.seconds = {operation: _Histogram(SECONDS) for operation in OPERATIONS}
        self.raw_bytes = {operation: _Histogram(BYTES) for operation in OPERATIONS}
        self.rates = {operation: _Histogram(BYTES_PER_SECOND) for operation in OPERATIONS}
        self.ratios = _Histogram(RATIO)
        self.record_bytes: Counter[str] = Counter()
        self.failures: Counter[tuple[str, str]] = Counter()
        self.pressure_blocks: Counter[int] = Counter()  # blocks stored, by the step of the bound pressure

    def finished(self, operation: str, raw_bytes: int, record_bytes: int, seconds: float) -> None:
        """A transfer has ended well; of no blocks, it is not counted.

        Args:
            operation: ``"store"`` or ``"load"``.
            raw_bytes: bytes of the blocks' values.
            record_bytes: bytes of their records.
            seconds: from the call to its end.
        """
        if not raw_bytes:
            return
        self.seconds[operation].observe(seconds)
        self.raw_bytes[operation].observe(raw_bytes)
        self.rates[operation].observe(raw_bytes / max(seconds, 1e-9))
        self.record_bytes[operation] += record_bytes
        if operation == "store":
            self.ratios.observe(raw_bytes / record_bytes)

    def failed(self, operation: str, error: BaseException) -> None:
        """A transfer has failed."""
        self.failures[operation, type(error).__name__] += 1


def snapshot(
    stats: Mapping[str, Any], meter: Meter, decisions: Mapping[tuple[str, str], int] | None = None
) -> MetricsSnapshot:
    """Families of an engine.

    Args:
        stats: its `EngineStats`, as a mapping.
        meter: its meter.
        decisions: of its controller, by choice and cause.
    """
    pool = stats["pool"]

    def counter(name: str, text: str, *values: tuple[Mapping[str, str], float]) -> Family:
        return Family(f"kvzip_{name}_total", "counter", text, tuple(Sample(labels, v) for labels, v in values))

    def gauge(name: str, text: str, *values: tuple[Mapping[str, str], float]) -> Family:
        return Family(f"kvzip_{name}", "gauge", text, tuple(Sample(labels, v) for labels, v in values))

    def histogram(name: str, text: str, by: Mapping[str, _Histogram]) -> Family:
        samples = tuple(Sample({"operation": k} if k else {}, h.value()) for k, h in by.items())
        return Family(f"kvzip_{name}", "histogram", text, samples)

    def alone(value: float) -> tuple[Mapping[str, str], float]:
        return {}, value

    def by(label: str, counts: Mapping[str, float]) -> list[tuple[Mapping[str, str], float]]:
        return [({label: key}, value) for key, value in sorted(counts.items())]

    stored = {"raw": stats["stored_raw_bytes"], "encoded": stats["stored_record_bytes"]}
    loaded = {"raw": stats["loaded_raw_bytes"], "encoded": meter.record_bytes["load"]}
    held = {"raw": stats["raw_bytes"], "encoded": stats["record_bytes"]}
    failures: list[tuple[Mapping[str, str], float]] = [
        ({"operation": operation, "error": error}, n) for (operation, error), n in sorted(meter.failures.items())
    ]
    return MetricsSnapshot(
        (
            counter("store_bytes", "Bytes stored: of the values, and of their records.", *by("kind", stored)),
            counter("load_bytes", "Bytes loaded: of the values, and of their records.", *by("kind", loaded)),
            counter("store_blocks", "Blocks stored.", alone(stats["stored_blocks"])),
            counter("load_blocks", "Blocks loaded.", alone(stats["loaded_blocks"])),
            counter("failed_transfers", "Transfers that failed, by the class of the error.", *failures),
            histogram("transfer_seconds", "Time of a transfer, from the call to its end.", meter.seconds),
            histogram("transfer_raw_bytes", "Raw bytes of a transfer.", meter.raw_bytes),
            histogram("transfer_raw_bytes_per_second", "Raw bytes of a transfer over its time.", meter.rates),
            histogram("store_ratio", "Raw bytes of a store over the bytes of its records.", {"": meter.ratios}),
            counter("fallback_pages", "Pages not coded as asked.", *by("reason", stats["fallbacks"])),
            counter(
                "controller_decisions",
                "Stores for which the controller chose between raw and encoded.",
                *(({"choice": c, "cause": why}, n) for (c, why), n in sorted((decisions or {}).items())),
            ),
            counter(
                "pressure_blocks",
                "Blocks stored under bound pressure, by its step; 0 = none.",
                *(({"step": str(step)}, n) for step, n in sorted(meter.pressure_blocks.items())),
            ),
            counter(
                "portable_blocks",
                "Blocks on GPUs coded without the CUDA part of the native library.",
                *by("coder", stats["portable_blocks"]),
            ),
            counter("evicted_blocks", "Records that left the pool to make room.", alone(stats["evicted_blocks"])),
            counter("discarded_blocks", "Records that their owner gave up.", alone(stats["discarded_blocks"])),
            counter("missing_blocks", "Keys that a load asked for in vain.", alone(stats["missing_blocks"])),
            counter("verified_blocks", "Blocks that a store decoded to compare.", alone(stats["verified_blocks"])),
            counter("unchecked_blocks", "Blocks loaded without a checksum.", alone(stats["unchecked_blocks"])),
            counter("corrupt_blocks", "Records that a load found damaged.", alone(stats["corrupt_blocks"])),
            counter("violations", "Values that a store found outside the bound.", alone(stats["violations"])),
            counter("pool_refusals", "Times that the pool could not hold a record.", alone(pool["total_refusals"])),
            gauge("records", "Records held.", alone(stats["records"])),
            gauge("pinned_records", "Records under a pin.", alone(stats["pinned"])),
            gauge("records_bytes", "Bytes held: of the values, and of their records.", *by("kind", held)),
            gauge("pool_capacity_bytes", "Budget of the pool.", alone(pool["capacity_bytes"])),
            gauge("pool_used_bytes", "Bytes of the extents in use.", alone(pool["extent_bytes_used"])),
            gauge("pool_peak_bytes", "Highest bytes of extents in use so far.", alone(pool["peak_extent_bytes_used"])),
            gauge("pool_payload_bytes", "Bytes that records asked for.", alone(pool["payload_bytes"])),
            gauge("pool_reserved_bytes", "Bytes promised to stores under way.", alone(pool["reserved_bytes"])),
        )
    )


class HasMetrics(Protocol):
    """What `PrometheusCollector` reads: a `SwapEngine`."""

    def metrics(self) -> MetricsSnapshot:
        """What was counted."""
        ...


class PrometheusCollector:
    """A custom collector of prometheus_client (the extra ``[metrics]``) over engines.

    ``prometheus_client.REGISTRY.register(PrometheusCollector(engine))`` adds an engine to what a process exports. The
    values are read when they are scraped; nothing is counted twice.

    Args:
        engines: an engine, or engines by name: they get the label ``engine``.
    """

    def __init__(self, engines: HasMetrics | Mapping[str, HasMetrics]) -> None:
        self._engines: Mapping[str, HasMetrics] = engines if isinstance(engines, Mapping) else {"": engines}

    def collect(self) -> Iterator[Metric]:
        """Families of prometheus_client, read now.

        Raises:
            ImportError: prometheus_client is not installed: ``pip install 'kvzip[metrics]'``.
        """
        from prometheus_client.core import Metric

        made: dict[str, Metric] = {}
        for engine_name, engine in self._engines.items():
            own = {"engine": engine_name} if engine_name else {}
            for family in engine.metrics().families:
                name = family.name.removesuffix("_total") if family.kind == "counter" else family.name
                metric = made.setdefault(family.name, Metric(name, family.help, family.kind))
                for sample in family.samples:
                    labels = own | dict(sample.labels)
                    if isinstance(sample.value, HistogramValue):
                        for end, count in sample.value.buckets:
                            text = "+Inf" if end == float("inf") else repr(end)
                            metric.add_sample(f"{name}_bucket", labels | {"le": text}, count)
                        metric.add_sample(f"{name}_count", labels, sample.value.count)
                        metric.add_sample(f"{name}_sum", labels, sample.value.sum)
                    else:
                        metric.add_sample(family.name, labels, sample.value)
        yield from made.values()
