# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The ladder lossy -> lossless -> raw, page by page: what a page gets, and that the record and the counters say why."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvzip import BlockLayout, BlockView, BoundPolicy, ErrorBound, SwapEngine, read_header
from kvzip.record import Coding, Reason

RNG = np.random.default_rng(7)
SHAPE = (1, 16, 2, 32)
NORMAL = RNG.normal(size=SHAPE).astype(np.float32)
ANY_BITS = RNG.integers(0, 1 << 16, SHAPE).astype(np.uint16)


def bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def with_specials() -> npt.NDArray[np.uint16]:
    values = NORMAL.copy()
    values[0, 3, 1, 5], values[0, 9, 0, 7], values[0, 2, 0, 0] = np.nan, np.inf, -np.inf
    return bf16(values)


REL, ABS = ErrorBound.relative, ErrorBound.absolute


@pytest.mark.parametrize(
    ("page", "bound", "coding", "reason"),
    [
        (bf16(NORMAL), REL(1e-2), Coding.FIXED, Reason.AS_ASKED),
        (bf16(NORMAL), ErrorBound.lossless(), Coding.LOSSLESS, Reason.AS_ASKED),
        (bf16(NORMAL), ABS(1e-6), Coding.LOSSLESS, Reason.LOSSLESS_SMALLER),
        (bf16(NORMAL), ABS(1e-37), Coding.LOSSLESS, Reason.BOUND_TOO_FINE),
        (np.full(SHAPE, 0x3F80, np.uint16), REL(1e-2), Coding.CONSTANT, Reason.AS_ASKED),
        (ANY_BITS, ErrorBound.lossless(), Coding.RAW, Reason.INCOMPRESSIBLE),
        (ANY_BITS, ABS(1e-6), Coding.RAW, Reason.INCOMPRESSIBLE),
        (with_specials(), REL(1e-2), Coding.FIXED, Reason.AS_ASKED),  # the groups with them are kept raw
        (np.full(SHAPE, 0x7FC1, np.uint16) + ANY_BITS % 7, REL(1e-2), Coding.RAW, Reason.INCOMPRESSIBLE),  # NaN alone
    ],
    ids=["lossy", "lossless", "lossless-smaller", "too-fine", "constant", "noise", "noise-lossy", "specials", "nan"],
)
def test_a_page_gets_the_lowest_rung_that_holds(
    page: npt.NDArray[np.uint16], bound: ErrorBound, coding: Coding, reason: Reason
) -> None:
    out = np.zeros_like(page)
    with SwapEngine(1 << 20, bound=bound) as engine:
        result = engine.store([b"k"], BlockView([page], "NHD", dtype="bfloat16"), measure_error=True).result()
        header = read_header(engine.read_record(b"k"))
        (entry,) = header.table
        assert Reason(entry["reason"]) is reason
        assert entry["coding"] & 0x0F == coding
        expected = {} if reason is Reason.AS_ASKED else {reason.name.lower(): 1}
        assert result.fallbacks == engine.stats().fallbacks == expected
        assert result.violations == 0
        assert header.codec == "cuszp"
        assert header.bound == bound
        assert entry["size"] <= page.nbytes
        assert header.record_bytes == len(engine.read_record(b"k"))
        engine.load([b"k"], BlockView([out], "NHD", dtype="bfloat16"))
    special = (page & 0x7F80) == 0x7F80
    assert np.array_equal(out[special], page[special])
    if entry["coding"] & 0x0F != Coding.FIXED:
        assert np.array_equal(out, page)


@pytest.mark.parametrize(
    ("dtype", "values", "coding", "reason"),
    [
        ("opaque", RNG.integers(0, 256, (1, 4096)).astype(np.uint8), Coding.RAW, Reason.OPAQUE_DTYPE),  # fp8, state
        ("opaque", np.zeros((1, 4096), np.uint8), Coding.CONSTANT, Reason.AS_ASKED),
        ("bfloat16", bf16(NORMAL).reshape(1, -1), Coding.LOSSLESS, Reason.AS_ASKED),  # a latent cache (MLA)
    ],
)
@pytest.mark.parametrize("bound", [REL(1e-2), ErrorBound.lossless()])
def test_pages_of_unknown_meaning_are_exact(
    dtype: str, values: npt.NDArray[Any], coding: Coding, reason: Reason, bound: ErrorBound
) -> None:
    """As the adapters ask for them: bytes as they are, and latent caches with the bound of pages that are no K or V."""

    out = np.zeros_like(values)
    layout = BlockLayout.opaque([values], dtype=dtype)
    with SwapEngine(1 << 20, bound=BoundPolicy(bound, bound)) as engine:
        result = engine.store([b"k"], BlockView([values], layout)).result()
        (entry,) = read_header(engine.read_record(b"k")).table
        assert entry["coding"] & 0x0F == coding
        assert Reason(entry["reason"]) is reason
        assert result.fallbacks == ({} if reason is Reason.AS_ASKED else {reason.name.lower(): 1})
        engine.load([b"k"], BlockView([out], layout))
    assert np.array_equal(out, values)
