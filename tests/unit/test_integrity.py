# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""How much an engine checks: checksums of loads, bounds of stores, and what is said of what they find."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvzip import BlockView, ConfigError, CorruptRecordError, ErrorBound, SwapEngine
from kvzip.backends.base import EncodeRequest
from kvzip.backends.raw import RawCodec
from kvzip.integrity import Integrity, Sampler

KEYS = [b"a", b"b"]


def blocks() -> BlockView:
    return BlockView([np.random.default_rng(0).normal(size=(2, 2, 16, 2, 8)).astype(np.float16)], "2NHD")


class Broken(RawCodec):
    """Changes the first value of each block."""

    name: ClassVar[str] = "broken"
    lossless_only: ClassVar[bool] = False

    def encode_blocks(self, blocks: Any, request: EncodeRequest, out: Any) -> Any:
        tables, sizes = super().encode_blocks(blocks, request, out)
        out[:, 1] ^= 0x40  # an exponent
        return tables, sizes


@given(part=st.floats(0, 1), calls=st.integers(1, 500))
def test_a_sampler_picks_its_part_evenly(part: float, calls: int) -> None:
    sampler = Sampler(part)
    picked = 0
    for number in range(1, calls + 1):
        picked += sampler()
        assert abs(picked - number * part) <= 1 + 1e-6
        assert picked > 0 or part == 0


@pytest.mark.parametrize(("checksum", "found", "unchecked"), [(1.0, 4, 0), (0.5, 2, 6), (0.0, 0, 12)])
def test_checksums_of_loads(checksum: float, found: int, unchecked: int) -> None:
    view = blocks()
    with SwapEngine(1 << 20, bound=ErrorBound.lossless(), integrity=Integrity(checksum=checksum)) as engine:
        engine.store(KEYS, view)
        out = BlockView([np.zeros_like(view.tensors[0])], "2NHD")
        engine.load(KEYS, out)
        engine.load(KEYS, out)
        assert np.array_equal(out.tensors[0], view.tensors[0])
        engine.pool.views(engine._index.find([b"a"])[0].allocation)[0][-20] ^= 1  # a mantissa: the codes stay valid
        refused = 0
        for _ in range(4):
            try:
                engine.load(KEYS, out)
            except CorruptRecordError:
                refused += 1
        stats = engine.stats()
        assert (refused, stats.corrupt_blocks, stats.unchecked_blocks) == (found, found, unchecked)


@pytest.mark.parametrize("checksum", [1.0, 0.0])
def test_lengths_and_headers_are_always_checked(checksum: float) -> None:
    view = blocks()
    with SwapEngine(1 << 20, integrity=Integrity(checksum=checksum)) as engine:
        engine.store(KEYS, view)
        engine.pool.views(engine._index.find([b"b"])[0].allocation)[0][20] ^= 1
        with pytest.raises(CorruptRecordError):
            engine.load(KEYS, view)


def test_the_bound_is_verified_on_a_part_of_the_stores(caplog: pytest.LogCaptureFixture) -> None:
    view = blocks()
    with SwapEngine(1 << 20, bound=ErrorBound.relative(1e-2), integrity=Integrity(bound=0.25)) as engine:
        results = [engine.store(KEYS, view).result() for _ in range(8)]
        assert [r.violations is not None for r in results] == [True, False, False, False] * 2
        assert all(r.max_error for r in results[::4])
        assert engine.stats().verified_blocks == 4
        assert engine.stats().violations == 0
        assert not caplog.records
        engine.configure(codec=Broken())
        engine.store(KEYS, view)
        assert engine.stats().violations == 2
        assert engine.metrics().value("kvzip_violations_total") == 2
        assert [r.levelname for r in caplog.records] == ["ERROR"]
        assert "2 values of a store of 2 blocks are outside their bound" in caplog.text


@pytest.mark.parametrize("values", [{"checksum": -0.1}, {"bound": 1.1}, {"checksum": float("nan")}, {"bound": "off"}])
def test_parts_are_between_0_and_1(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="from 0"):
        Integrity(**values)
