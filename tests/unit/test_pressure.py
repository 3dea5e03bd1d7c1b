# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Bound pressure: which bound new records get while the pool fills, and what may not happen to it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvzip import BlockView, BoundPolicy, ConfigError, ErrorBound, SwapEngine, read_header
from kvzip.backends.raw import RawCodec
from kvzip.calibration import CalibrationTable
from kvzip.pressure import BoundPressure, PressureGauge
from kvzip.record import Reason

REL = ErrorBound.relative
FINE, STEPS = REL(1e-3), (REL(3e-3), REL(1e-2))
TABLE = CalibrationTable(np.random.default_rng(1).lognormal(0, 1, (2, 2, 8)))


def blocks(count: int) -> BlockView:
    return BlockView([np.random.default_rng(0).normal(size=(count, 2, 16, 2, 8)).astype(np.float16)], "2NHD")


@given(
    st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4, unique=True).map(sorted),
    st.floats(0.0, 0.3),
    st.lists(st.floats(0.0, 1.0), max_size=60),
)
def test_a_step_ends_only_below_its_threshold_less_the_hysteresis(
    thresholds: list[float], hysteresis: float, fills: list[float]
) -> None:
    steps = [REL(0.001 * (i + 1)) for i in range(len(thresholds))]
    gauge = PressureGauge(BoundPressure(steps, thresholds, hysteresis))
    before = 0
    for fill in fills:
        step = gauge.step(fill)
        assert gauge.step(fill) == step
        reached = sum(fill >= t for t in thresholds)
        assert step >= reached
        if step > reached:  # it holds from before, as the pool has not fallen far enough
            assert step <= before
            assert fill >= thresholds[step - 1] - hysteresis
        before = step


def test_new_records_get_coarser_as_the_pool_fills() -> None:
    view = blocks(64)
    with SwapEngine(20_000, bound=FINE, pressure=BoundPressure(STEPS, (0.4, 0.7), floor=REL(1e-2))) as engine:
        seen = []
        for i in range(40):
            engine.store([bytes([i])], view[[i]])
            header = read_header(engine.read_record(bytes([i])))
            assert header.reason is (Reason.AS_ASKED if header.bound == FINE else Reason.BOUND_PRESSURE)
            seen.append(header.bound.value)
        assert sorted(seen) == seen
        assert [b for b, after in pairwise([*seen, 0.0]) if b != after] == [1e-3, 3e-3, 1e-2]
        assert read_header(engine.read_record(bytes([39]))).bound == REL(1e-2)
        stats, metrics = engine.stats(), engine.metrics()
        assert stats.evicted_blocks > 0
        coarser = sum(b > 1e-3 for b in seen)
        assert stats.fallbacks == {"bound_pressure": coarser * len(view.layout.segments)}
        by_step = [metrics.value("kvzip_pressure_blocks_total", step=str(i)) for i in range(3)]
        assert by_step == [seen.count(b) for b in (1e-3, 3e-3, 1e-2)]
        engine.discard(engine.list_keys())
        engine.store([b"new"], view[[0]])
        assert read_header(engine.read_record(b"new")).bound == FINE


def test_what_pressure_leaves_alone() -> None:
    """Blocks that begin a sequence, and stores with a bound of their own."""
    view = blocks(8)
    policy = BoundPolicy(FINE, FINE)
    coarse = BoundPolicy(REL(1e-1), REL(1e-1), sink=None)
    with SwapEngine(8_000, bound=policy, pressure=BoundPressure([coarse], (0.1,))) as engine:
        engine.store([b"%d" % i for i in range(8)], view)
        engine.store([b"first", b"second"], view[[0, 1]], sink=[True, False])
        first, second = (read_header(engine.read_record(key)) for key in (b"first", b"second"))
        assert (first.bound, first.reason) == (ErrorBound.lossless(), Reason.AS_ASKED)
        assert (second.bound, second.reason) == (REL(1e-1), Reason.BOUND_PRESSURE)
        engine.store([b"own"], view[[2]], bound=REL(1e-2))
        own = read_header(engine.read_record(b"own"))
        assert (own.bound, own.reason) == (REL(1e-2), Reason.AS_ASKED)
        out = BlockView([np.zeros_like(view.tensors[0][:2])], "2NHD")
        engine.load([b"first", b"second"], out)
        assert np.array_equal(out.tensors[0][0], view.tensors[0][0])
        assert not np.array_equal(out.tensors[0][1], view.tensors[0][1])


def test_a_store_may_bring_a_bound_for_every_step() -> None:
    view = blocks(8)
    with SwapEngine(8_000, bound=FINE, pressure=BoundPressure([REL(1e-2)], (0.1,))) as engine:
        engine.store([b"calm"], view[[0]], bound=[REL(2e-3), REL(2e-2)])
        engine.store([b"%d" % i for i in range(7)], view[range(7)])
        engine.store([b"full"], view[[0]], bound=[REL(2e-3), REL(2e-2)])
        assert [read_header(engine.read_record(key)).bound.value for key in (b"calm", b"full")] == [2e-3, 2e-2]
        with pytest.raises(ConfigError, match="3 bounds for an engine with 1 steps of pressure: give 2"):
            engine.store([b"x"], view[[0]], bound=[FINE] * 3)
        with pytest.raises(ConfigError, match="is no ErrorBound"):
            engine.store([b"x"], view[[0]], bound=[FINE, 1e-2])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"bounds": []}, "one ErrorBound"),
        ({"bounds": [1e-2]}, "one ErrorBound"),
        ({"bounds": STEPS, "thresholds": (0.5,)}, "1 pressure thresholds for 2 bounds"),
        ({"bounds": STEPS, "thresholds": (0.9, 0.5)}, "rising"),
        ({"bounds": STEPS, "thresholds": (0.5, 1.5)}, "rising"),
        ({"bounds": STEPS, "hysteresis": 1.0}, "hysteresis"),
        ({"bounds": STEPS[::-1]}, "finer than"),
        ({"bounds": STEPS, "floor": REL(3e-3)}, "as fine as the floor rel:0.003"),
        ({"bounds": [ErrorBound.absolute(1e-9)], "floor": REL(1e-2)}, "as fine as the floor"),
        ({"bounds": [BoundPolicy(REL(1e-3), REL(1e-1))], "floor": REL(1e-2)}, "as fine as the floor"),
        ({"bounds": [BoundPolicy(FINE, FINE, layers={3: REL(0.5)})], "floor": REL(1e-2)}, "as fine as the floor"),
        ({"bounds": [TABLE.policy(0.4)], "floor": TABLE.policy(0.3)}, "as fine as the floor"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        BoundPressure(**settings)


@pytest.mark.parametrize(
    ("bound", "floor"),
    [
        (REL(1e-2), REL(1e-2)),
        (ErrorBound.lossless(), ErrorBound.token_rms(0.1)),
        (BoundPolicy(REL(1e-3), REL(1e-2), layers={0: ErrorBound.lossless()}), REL(1e-2)),
        (TABLE.policy(0.3, 0.1), TABLE.policy(0.4, 0.1)),
    ],
)
def test_the_floor_itself_is_allowed(bound: Any, floor: Any) -> None:
    assert BoundPressure([bound], floor=floor).thresholds == (0.8,)


class NoTables(RawCodec):
    """Takes bounds, but no tables of them."""

    name: ClassVar[str] = "plain"
    lossless_only: ClassVar[bool] = False


def test_a_codec_must_know_the_bounds_of_all_steps() -> None:
    pressure = BoundPressure([TABLE.policy(0.4)])
    with pytest.raises(ConfigError, match="channel_table"):
        SwapEngine(1 << 20, codec=NoTables(), pressure=pressure)
    with SwapEngine(1 << 20, pressure=pressure) as engine:
        with pytest.raises(ConfigError, match="channel_table"):
            engine.configure(codec=NoTables())
        assert engine.settings.codec.name == "cuszp"
