# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What an engine counts, under which names, and what Prometheus is given."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvzip
from kvzip import BlockNotFoundError, BlockView, CorruptRecordError, ErrorBound, PoolExhaustedError, SwapEngine
from kvzip.metrics import BYTES, RATIO, SECONDS, HistogramValue, Meter, PrometheusCollector

KEYS = [b"a", b"b", b"c", b"d"]
ROOT = Path(__file__).parents[2]


def blocks(scale: float = 1.0) -> BlockView:
    values = np.random.default_rng(0).normal(scale=scale, size=(4, 2, 16, 2, 32)).astype(np.float32)
    return BlockView([values.astype(np.float16)], "2NHD")


@pytest.fixture
def engine() -> Iterator[SwapEngine]:
    with SwapEngine(1 << 20, bound=ErrorBound.relative(1e-2)) as made:
        yield made


def number(engine: SwapEngine, name: str, **labels: str) -> float:
    value = engine.metrics().value(name, **labels)
    assert not isinstance(value, HistogramValue)
    return value


def histogram(engine: SwapEngine, name: str, **labels: str) -> HistogramValue:
    value = engine.metrics().value(name, **labels)
    assert isinstance(value, HistogramValue)
    return value


def test_transfers_are_counted_in_bytes_blocks_and_seconds(engine: SwapEngine) -> None:
    view = blocks()
    stored = engine.store(KEYS, view).result()
    for _ in range(3):
        loaded = engine.load(KEYS[:2], view[[0, 1]]).result()
    assert number(engine, "kvzip_store_bytes_total", kind="raw") == view.nbytes
    assert number(engine, "kvzip_store_bytes_total", kind="encoded") == stored.record_bytes
    assert number(engine, "kvzip_load_bytes_total", kind="raw") == 3 * loaded.raw_bytes
    assert number(engine, "kvzip_load_bytes_total", kind="encoded") == 3 * loaded.record_bytes
    assert number(engine, "kvzip_store_blocks_total") == 4
    assert number(engine, "kvzip_load_blocks_total") == 6
    seconds = histogram(engine, "kvzip_transfer_seconds", operation="load")
    assert seconds.count == 3
    assert seconds.sum == pytest.approx(engine.stats().load_seconds)
    assert histogram(engine, "kvzip_transfer_raw_bytes", operation="store").sum == view.nbytes
    ratio = histogram(engine, "kvzip_store_ratio")
    assert (ratio.count, ratio.sum) == (1, pytest.approx(view.nbytes / stored.record_bytes))
    rates = histogram(engine, "kvzip_transfer_raw_bytes_per_second", operation="store")
    assert rates.sum == pytest.approx(view.nbytes / stored.seconds)


def test_what_is_held_and_what_left(engine: SwapEngine) -> None:
    engine.store(KEYS, blocks())
    stats = engine.stats()
    with engine.pin(KEYS[:1]):
        assert number(engine, "kvzip_pinned_records") == 1
    engine.discard(KEYS[:3])
    assert number(engine, "kvzip_records") == 1
    assert number(engine, "kvzip_discarded_blocks_total") == 3
    assert number(engine, "kvzip_records_bytes", kind="raw") == stats.raw_bytes / 4
    assert number(engine, "kvzip_pool_capacity_bytes") == engine.pool.capacity_bytes
    assert number(engine, "kvzip_pool_peak_bytes") == stats.pool.extent_bytes_used
    assert number(engine, "kvzip_pool_used_bytes") == engine.stats().pool.extent_bytes_used
    assert number(engine, "kvzip_pool_payload_bytes") == engine.stats().record_bytes


def test_failures_are_counted_by_their_class(engine: SwapEngine) -> None:
    view = blocks()
    engine.store(KEYS, view)
    with pytest.raises(BlockNotFoundError):
        engine.load([b"x"], view[[0]])
    engine.pool.views(engine._index.find([b"b"])[0].allocation)[0][-1] ^= 1
    with pytest.raises(CorruptRecordError):
        engine.load(KEYS, view)
    big = BlockView([np.random.default_rng(1).normal(size=(64, 2, 16, 8, 64)).astype(np.float32)], "2NHD")
    engine.configure(bound=ErrorBound.lossless())
    with pytest.raises(PoolExhaustedError):
        engine.store([b"%d" % i for i in range(64)], big)
    failed = "kvzip_failed_transfers_total"
    assert number(engine, failed, operation="load", error="BlockNotFoundError") == 1
    assert number(engine, failed, operation="load", error="CorruptRecordError") == 1
    assert number(engine, failed, operation="store", error="PoolExhaustedError") == 1
    assert number(engine, failed, operation="store", error="TransferError") == 0
    assert number(engine, "kvzip_missing_blocks_total") == number(engine, "kvzip_corrupt_blocks_total") == 1
    assert histogram(engine, "kvzip_transfer_seconds", operation="store").count == 1


def test_fallbacks_by_reason(engine: SwapEngine) -> None:
    view = blocks()
    engine.configure(bound=ErrorBound.relative(1e-7))
    engine.store(KEYS, view)
    assert number(engine, "kvzip_fallback_pages_total", reason="lossless_smaller") == 8


def test_unknown_names_are_refused(engine: SwapEngine) -> None:
    with pytest.raises(KeyError, match=r"docs/reference/metrics\.md"):
        engine.metrics().value("kvzip_nothing")


def test_flat_numbers(engine: SwapEngine) -> None:
    engine.store(KEYS, blocks())
    flat = engine.metrics().as_dict()
    assert flat['kvzip_store_bytes_total{kind="raw"}'] == blocks().nbytes
    assert flat['kvzip_transfer_seconds_count{operation="store"}'] == 1
    assert flat["kvzip_records"] == 4
    assert all(isinstance(v, float) for v in flat.values())


@given(st.lists(st.tuples(st.integers(1, 1 << 36), st.floats(1, 20), st.floats(0, 100)), max_size=30))
def test_histograms_hold_every_observation(transfers: list[tuple[int, float, float]]) -> None:
    meter = Meter()
    for raw, ratio, seconds in transfers:
        meter.finished("store", raw, max(1, int(raw / ratio)), seconds)
    meter.finished("store", 0, 0, 1.0)  # of no blocks
    for made, ends, values in (
        (meter.seconds["store"], SECONDS, [s for *_, s in transfers]),
        (meter.raw_bytes["store"], BYTES, [float(raw) for raw, *_ in transfers]),
        (meter.ratios, RATIO, [raw / max(1, int(raw / ratio)) for raw, ratio, _ in transfers]),
    ):
        value = made.value()
        assert value.count == len(values)
        assert value.sum == pytest.approx(sum(values))
        assert value.buckets == tuple((end, sum(v <= end for v in values)) for end in (*ends, float("inf")))


def test_the_reference_has_every_name(engine: SwapEngine) -> None:
    text = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(kvzip_\w+)` \| (\w+) \| ([^|]*) \|", text, re.MULTILINE)
    listed = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    engine.store(KEYS, blocks())
    families = engine.metrics().families
    assert set(listed) == {f.name for f in families}
    for family in families:
        kind, labels = listed[family.name]
        assert kind == family.kind
        assert all(set(sample.labels) == labels for sample in family.samples), family.name
        assert (family.kind == "counter") == family.name.endswith("_total")


# ---- Prometheus ------------------------------------------------------------------------------------------------------


def test_prometheus_is_given_the_same_numbers(engine: SwapEngine) -> None:
    prometheus = pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")
    registry = prometheus.CollectorRegistry()
    registry.register(PrometheusCollector(engine))
    engine.store(KEYS, blocks())
    with pytest.raises(BlockNotFoundError):
        engine.load([b"x"], blocks()[[0]])
    assert registry.get_sample_value("kvzip_store_bytes_total", {"kind": "raw"}) == blocks().nbytes
    assert registry.get_sample_value("kvzip_records") == 4
    assert registry.get_sample_value("kvzip_transfer_seconds_bucket", {"operation": "store", "le": "+Inf"}) == 1
    assert registry.get_sample_value("kvzip_transfer_seconds_count", {"operation": "store"}) == 1
    labels = {"operation": "load", "error": "BlockNotFoundError"}
    assert registry.get_sample_value("kvzip_failed_transfers_total", labels) == 1
    text = prometheus.generate_latest(registry).decode()
    assert "# TYPE kvzip_store_bytes_total counter" in text
    assert 'le="0.0001"' in text


def test_several_engines_have_a_label(engine: SwapEngine) -> None:
    prometheus = pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")
    registry = prometheus.CollectorRegistry()
    with SwapEngine(1 << 16) as other:
        registry.register(PrometheusCollector({"gpu0": engine, "gpu1": other}))
        engine.store(KEYS, blocks())
        assert registry.get_sample_value("kvzip_records", {"engine": "gpu0"}) == 4
        assert registry.get_sample_value("kvzip_records", {"engine": "gpu1"}) == 0
        assert prometheus.generate_latest(registry).decode().count("# TYPE kvzip_records gauge") == 1


# ---- logging ---------------------------------------------------------------------------------------------------------


def test_a_fallback_is_logged_once_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvzip._log._logged", set())
    for _ in range(3):
        kvzip._log.log_once("codec 'x' failed", "no scratch")
    assert [r.getMessage() for r in caplog.records] == [
        "codec 'x' failed: no scratch (logged once; the counters have the rest)"
    ]
    assert logging.getLogger("kvzip").handlers
    assert capsys.readouterr().err == ""
