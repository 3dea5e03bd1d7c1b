# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What an engine promises of whoever says no bound: every value against the default's own words."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from kvzip import BlockLayout, BlockView, SwapEngine

HEADS, DIM = 2, 8


def page(rng: np.random.Generator, tokens: int, dtype: type[np.floating], wild: bool) -> npt.NDArray[np.floating]:
    """K or V of some tokens, whose sizes differ; where it is wild, with zeros and values that are not finite."""
    sizes = 10.0 ** rng.uniform(-2, 1.5, (tokens, HEADS, 1))
    x = (rng.standard_normal((tokens, HEADS, DIM)) * sizes + rng.normal(0, 5, DIM)).astype(dtype)
    if wild:
        x[rng.random(x.shape) < 0.05] = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0])
        x[rng.integers(tokens)] = 0
    return x


@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 40),
    kinds=st.sampled_from(["k", "v", "kv", ""]),
    dtype=st.sampled_from([np.float16, np.float32]),
    wild=st.booleans(),
    first=st.integers(0, 2),
)
@settings(max_examples=150)
def test_each_page_keeps_the_bound_of_its_kind(
    seed: int, tokens: int, kinds: str, dtype: type[np.floating], wild: bool, first: int
) -> None:
    rng = np.random.default_rng(seed)
    before = [np.stack([page(rng, tokens, dtype, wild) for _ in range(2)]) for _ in range(2)]  # [blocks, T, H, D]
    after = [np.zeros_like(x) for x in before]
    layout = BlockLayout.from_tensors(before, "NHD", kinds=kinds)
    keys = [b"0", b"1"]
    with SwapEngine(1 << 20) as engine:
        engine.store(keys, BlockView(before, layout), sink=[first == 0, first == 1])
        engine.load(keys, BlockView(after, layout))
    for segment, old, new in zip(layout.segments, before, after, strict=True):
        for block in range(2):
            x, y = old[block].astype(np.float64), new[block].astype(np.float64)
            bits = old[block].view(f"u{old.itemsize}"), new[block].view(f"u{old.itemsize}")
            if segment.kind == "" or block == first:
                np.testing.assert_array_equal(*bits)
                continue
            finite = np.isfinite(x)
            np.testing.assert_array_equal(bits[0][~finite], bits[1][~finite])
            known = np.where(finite, x, 0)
            if segment.kind == "k":
                limit = np.asarray(1e-3 * np.ptp(x[finite])) if finite.any() else np.zeros(())
            else:
                rms = np.sqrt((known**2).mean(-1, keepdims=True))  # what is not finite counts as nothing
                limit = 0.1 * rms * (1 + 1e-12)  # of the rounding of this line
            assert (np.abs(np.where(finite, y, 0) - known) <= limit).all()
