# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""bench/vllm_sessions.py and bench/vllm_conversation.py without vLLM: what goes into pages, how they compare."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvzip import BoundPolicy, ErrorBound

torch = pytest.importorskip("torch", reason="the benchmarks work on torch tensors")
BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("vllm_sessions")


@pytest.fixture
def pages(sessions: Any, kv_cache: npt.NDArray[Any]) -> Any:
    """Real pages for two layers of vLLM's: 12 blocks of 8 heads x 16 tokens x K and V of 128 values."""
    caches = [torch.zeros((12, 16, 8, 256), dtype=torch.bfloat16).transpose(1, 2) for _ in range(2)]
    return sessions.RealPages(kv_cache, caches)


def test_pages_hold_heads_of_one_layer_of_the_real_cache(pages: Any, kv_cache: npt.NDArray[Any]) -> None:
    pages.write([3, 7])
    for number, cache in enumerate(pages.caches):
        assert not cache[[0, 1, 2]].any()
        for kind, half in enumerate(cache[[3, 7]].chunk(2, dim=-1)):
            bits = half.contiguous().view(torch.int16).numpy().view(np.uint16)
            assert set(bits.ravel()) <= set(kv_cache[number, kind].ravel())
            vectors = {v.tobytes() for v in kv_cache[number, kind].reshape(-1, kv_cache.shape[-1])}
            found = bits.reshape(-1, kv_cache.shape[-1])
            assert all(v.tobytes() in vectors for v in found)


def test_the_check_sees_what_is_outside_the_bound(pages: Any) -> None:
    pages.write(range(12))
    lossless, loose = ErrorBound.lossless(), ErrorBound.relative(1e-2)
    assert pages.check([2, 5], lossless) == {"verified_pages": 8, "max_error_over_bound": 0.0}
    page = pages.caches[1][5][..., :128]
    spread = float(page.max() - page.min())
    pages.caches[1][5, 4, 3, 2] += 0.005 * spread
    assert pages.check([2, 5], lossless)["max_error_over_bound"] == float("inf")
    assert 0 < pages.check([2, 5], loose)["max_error_over_bound"] <= 1
    pages.caches[1][5, 4, 3, 2] += 0.05 * spread
    assert pages.check([2, 5], loose)["max_error_over_bound"] > 1
    assert pages.check([2], loose)["max_error_over_bound"] == 0


def test_the_check_knows_bounds_of_k_and_v(pages: Any) -> None:
    pages.write(range(12))
    policy = BoundPolicy.uncalibrated()
    rms = pages.caches[0][5, 4, 3, 128:].float().square().mean().sqrt()
    pages.caches[0][5, 4, 3, 130] += 0.05 * rms  # of V
    assert 0 < pages.check([5], policy)["max_error_over_bound"] <= 1
    pages.caches[0][5, 4, 3, 130] += 0.1 * rms
    assert pages.check([5], policy)["max_error_over_bound"] > 1


def test_budgets_are_parts_of_the_sessions_real_size(sessions: Any) -> None:
    assert sessions.PLANS["full"].long_bytes == 4 * 32768 * 128 * 1024  # 128 KiB a token
    assert sessions.transfer_config("native", 5)["kv_connector_extra_config"]["spec_name"] == "CPUOffloadingSpec"
    assert sessions.transfer_config("kvzip", 5)["kv_connector_extra_config"] == {"cpu_bytes_to_use": 5}


def test_answers_are_compared_token_by_token(sessions: Any) -> None:
    conversation = importlib.import_module("vllm_conversation")
    turn = conversation.Turn
    prompt = list(range(10))
    expected = [turn(prompt, False, [1]), turn(prompt, True, [1, 2, 3, 4]), turn(prompt, True, [5, 6])]
    found = [turn(prompt, False, [9]), turn(prompt, True, [1, 2, 9, 4], 8), turn(prompt, True, [5, 6], 6)]
    assert conversation.compare("made up", expected, found) == {
        "tier": "made up",
        "turns": 2,
        "same_turns": 1,
        "tokens": 6,
        "same_tokens": 5,
        "agreed_before": 2.0,
        "cached_fraction": 0.7,
    }
