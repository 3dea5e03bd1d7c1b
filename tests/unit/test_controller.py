# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""An engine with a controller: what it stores, what it says of it, and how a caller overrules it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvzip import BlockView, BoundPolicy, ConfigError, ErrorBound, SwapEngine, read_header
from kvzip.controller import Controller, Prior
from kvzip.record import Reason

KEYS = [b"a", b"b", b"c", b"d"]
SLOW_CODEC = {"cpu": Prior(1e15, 1e15, 1.0, 1.0, 0.0, overlapped=False)}
FAST_CODEC = {"cpu": Prior(1e6, 1e6, 1e15, 1e15, 0.0, overlapped=False)}


def blocks() -> BlockView:
    return BlockView([np.random.default_rng(0).normal(size=(4, 2, 16, 2, 8)).astype(np.float16)], "2NHD")


def like(view: BlockView) -> BlockView:
    return BlockView([np.zeros_like(view.tensors[0])], "2NHD")


def always(priors: dict[str, Prior]) -> Controller:
    """The first choice follows the prior, and is not looked at again."""
    return Controller("latency", priors=priors, exploration=0.0, dwell=1 << 30)


def test_without_a_controller_everything_is_encoded() -> None:
    with SwapEngine(1 << 20) as engine:
        engine.store(KEYS, blocks())
        assert engine.controller is None
        assert {read_header(engine.read_record(key)).codec for key in KEYS} == {"cuszp"}
        assert not [k for k in engine.metrics().as_dict() if k.startswith("kvzip_controller")]


def test_a_codec_that_is_too_slow_is_left_out() -> None:
    view = blocks()
    controller = Controller("latency", priors=SLOW_CODEC, exploration=0.0)
    with SwapEngine(1 << 20, controller=controller) as engine:
        result = engine.store(KEYS, view, sink=[True, False, False, True]).result()
        pages = len(KEYS) * len(view.layout.segments)
        assert result.fallbacks == engine.stats().fallbacks == {"break_even": pages}
        header = read_header(engine.read_record(KEYS[1]))
        assert (header.codec, header.reason, header.bound) == ("raw", Reason.BREAK_EVEN, ErrorBound.lossless())
        out = like(view)
        engine.load(KEYS, out)
        assert np.array_equal(out.tensors[0], view.tensors[0])
        assert engine.metrics().value("kvzip_controller_decisions_total", choice="raw", cause="objective") == 1
        seen = controller.snapshot()
        assert seen.transfer_seconds > 0
        assert set(seen.link_bytes_per_second) == {("cpu", "store"), ("cpu", "load")}
        assert [c.choice for c in seen.crossings] == ["raw"]


def test_a_link_that_is_too_slow_gets_encoded_blocks() -> None:
    view = blocks()
    controller = always(FAST_CODEC)
    with SwapEngine(1 << 20, controller=controller, bound=ErrorBound.relative(1e-2)) as engine:
        assert engine.store(KEYS, view).result().fallbacks == {}
        engine.load(KEYS, like(view))
        header = read_header(engine.read_record(KEYS[0]))
        assert (header.codec, header.reason) == ("cuszp", Reason.AS_ASKED)
        assert engine.controller is controller
        assert controller.decisions == {("encoded", "objective"): 1}
        assert controller.snapshot().link_bytes_per_second == {}


@pytest.mark.parametrize("controller", [None, always(SLOW_CODEC), always(FAST_CODEC)])
def test_a_call_overrules(controller: Controller | None) -> None:
    view = blocks()
    with SwapEngine(1 << 20, controller=controller) as engine:
        engine.store(KEYS[:2], view[[0, 1]], coding="raw")
        engine.store(KEYS[2:], view[[2, 3]], coding="encoded")
        headers = [read_header(engine.read_record(key)) for key in KEYS]
        assert [h.codec for h in headers] == ["raw", "raw", "cuszp", "cuszp"]
        assert {h.reason for h in headers} == {Reason.AS_ASKED}
        assert engine.stats().fallbacks == {}
        if controller is not None:
            asked = {choice: controller.decisions[choice, "asked"] for choice in ("raw", "encoded")}
            assert asked == {"raw": 1, "encoded": 1}
        engine.load(KEYS, like(view))  # raw and encoded records in one load
        with pytest.raises(ConfigError, match=r"'lossless'.*raw, encoded"):
            engine.store(KEYS, view, coding="lossless")  # type: ignore[arg-type]


def test_each_bound_has_a_ratio_of_its_own() -> None:
    view = blocks()
    controller = Controller("capacity")
    with SwapEngine(1 << 20, controller=controller) as engine:
        for _ in range(3):
            for bound in (ErrorBound.relative(1e-1), ErrorBound.lossless(), BoundPolicy.uncalibrated()):
                engine.store(KEYS, view, bound=bound)
        ratios = {c.profile: c.ratio for c in controller.snapshot().crossings}
        assert len(ratios) == 3
        assert len(set(ratios.values())) == 3
        assert max(ratios, key=lambda name: ratios[name]).endswith("rel:0.1")


def test_nothing_is_chosen_where_there_is_no_choice() -> None:
    controller = Controller()
    with SwapEngine(1 << 20, codec="raw", controller=controller) as engine:
        engine.store(KEYS, blocks())
        assert read_header(engine.read_record(KEYS[0])).reason is Reason.AS_ASKED
        engine.store([], blocks()[[]])
    with SwapEngine(1 << 20, controller=controller) as engine:
        engine.store([], blocks()[[]])
    assert controller.decisions == {}


def test_a_store_that_fails_teaches_nothing() -> None:
    controller = Controller("latency")
    with SwapEngine(600, controller=controller) as engine:
        with pytest.raises(MemoryError):
            engine.store(KEYS, blocks())
        assert controller.snapshot().transfer_seconds == 0


@pytest.mark.parametrize("bad", ["fast", 1, Controller])
def test_what_is_no_controller_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match="latency"):
        SwapEngine(1 << 20, controller=bad)
