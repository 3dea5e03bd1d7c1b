# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The adapter in vLLM's real engine, on the CPU: answers, bounds, accounts, damage, settings. One engine for all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from engine_harness import (
    BLOCK_TOKENS,
    LOTS,
    PROMPT_TOKENS,
    Answer,
    Engine,
    all_like,
    prompts,
    running,
    transfer_config,
    version_of_vllm,
)

from kvzip import ErrorBound

PREFIX = PROMPT_TOKENS // BLOCK_TOKENS * BLOCK_TOKENS  # tokens of a prompt's full blocks


@pytest.fixture(scope="module")
def started(llama: Path, expected: list[Answer]) -> Iterator[Engine]:
    with running(llama, transfer_config(LOTS, bound="lossless"), disable_log_stats=False) as engine:
        yield engine


@pytest.fixture
def engine(started: Engine) -> Iterator[Engine]:
    """The engine with both caches empty."""
    started.settle()
    assert started.llm.reset_prefix_cache(reset_connector=True)
    yield started
    started.worker.configure(codec="cuszp", bound=ErrorBound.lossless())


@pytest.mark.parametrize("codec", ["cuszp", "raw"])
def test_prompts_that_come_back_get_the_same_answer(
    engine: Engine, asked: list[list[int]], expected: list[Answer], codec: str
) -> None:
    engine.worker.configure(codec=codec)
    loaded = engine.swap.stats().loaded_blocks
    first, second = engine.come_back(asked)
    assert all_like(first, expected)
    assert all_like(second, expected)
    assert {a.cached_tokens for a in first} == {0}
    assert {a.cached_tokens for a in second} == {PREFIX}
    assert engine.swap.stats().loaded_blocks - loaded == len(asked) * PREFIX // BLOCK_TOKENS


def test_what_comes_back_is_used(engine: Engine, asked: list[list[int]], expected: list[Answer]) -> None:
    """The control of the others: a bound that destroys the values destroys the answers."""
    engine.worker.configure(bound=ErrorBound.relative(1.0))
    first, second = engine.come_back(asked)
    assert all_like(first, expected)
    assert {a.cached_tokens for a in second} == {PREFIX}
    assert not any(a.like(b) for a, b in zip(second, expected, strict=True))


@pytest.mark.parametrize("bound", ["rel:1e-3", "abs:0.02"])
def test_pages_come_back_within_the_bound(engine: Engine, bound: str) -> None:
    check_pages(engine, ErrorBound.parse(bound))


def check_pages(engine: Engine, bound: ErrorBound) -> None:
    """Every full block of every layer is in the cache again, within the bound and not bit for bit."""
    engine.worker.configure(bound=f"k={bound},v={bound},sink=none")
    asked = prompts(4, PROMPT_TOKENS, seed=7)
    for cache in engine.caches:
        cache.zero_()
    for prompt in asked:
        engine.ask(prompt)
    engine.settle()
    assert engine.swap.stats().ratio > 1.2
    before = [cache.double().numpy().copy() for cache in engine.caches]
    engine.forget()
    for prompt in asked:
        assert engine.ask(prompt).cached_tokens == PREFIX
    after = [cache.double().numpy() for cache in engine.caches]
    blocks = len(asked) * PREFIX // BLOCK_TOKENS
    assert [_blocks_within(a, b, bound) for a, b in zip(before, after, strict=True)] == [blocks] * len(before)


def _blocks_within(old: npt.NDArray[Any], new: npt.NDArray[Any], bound: ErrorBound) -> int:
    """How many blocks of an old cache are in the new one. A block of the CPU's cache is, head by head, K and then V."""
    before, after = (cache.reshape(len(cache), cache.shape[1], 2, -1) for cache in (old, new))
    found = 0
    for block in before[before.any(axis=(1, 2, 3))]:
        spread = np.ptp(block, axis=(0, 2), keepdims=True)  # of all heads: never narrower than a page's own
        limit = bound.value * (spread if str(bound).startswith("rel") else 1.0)
        error = np.abs(after - block)
        found += bool(((error <= limit).all(axis=(1, 2, 3)) & (error > 0).any(axis=(1, 2, 3))).any())
    return found


def test_the_scheduler_counts_what_the_pool_has(engine: Engine, asked: list[list[int]]) -> None:
    counted = []
    for prompt in asked:
        engine.ask(prompt)
        counted.append(engine.check_accounts())
    assert counted == sorted(set(counted))
    assert engine.swap.stats().records == len(asked) * PREFIX // BLOCK_TOKENS


def test_resetting_the_connector_forgets_the_records(engine: Engine, asked: list[list[int]]) -> None:
    for prompt in asked[:3]:
        engine.ask(prompt)
    engine.settle()
    assert engine.llm.reset_prefix_cache(reset_connector=True)
    assert [engine.ask(prompt).cached_tokens for prompt in asked[:2]] == [0, 0]
    engine.check_accounts()
    assert engine.swap.stats().records == 2 * PREFIX // BLOCK_TOKENS  # those of the third are gone


def test_damaged_records_are_noticed_and_computed_again(
    engine: Engine, asked: list[list[int]], expected: list[Answer]
) -> None:
    corrupt = engine.swap.stats().corrupt_blocks
    for prompt in asked:
        engine.ask(prompt)
    engine.forget()
    assert engine.damage() == len(asked) * PREFIX // BLOCK_TOKENS
    assert all_like([engine.ask(prompt) for prompt in asked], expected)
    assert engine.swap.stats().corrupt_blocks > corrupt
    for _ in range(2):  # up to 0.32 a request does not store what it meant to load; the next one does
        engine.forget()
        answers = [engine.ask(prompt) for prompt in asked]
        assert all_like(answers, expected)
    assert {a.cached_tokens for a in answers} == {PREFIX}
    engine.check_accounts()


def test_metrics_go_through_vllms_own_hook(engine: Engine, asked: list[list[int]]) -> None:
    engine.come_back(asked[:2])
    engine.settle()
    metrics = {m.name: m.value for m in engine.llm.get_metrics() if m.name.startswith("vllm:kvzip_")}
    stats = engine.swap.stats()
    assert metrics["vllm:kvzip_stored_raw_bytes"] == stats.stored_raw_bytes > 0
    assert stats.loaded_raw_bytes > 0
    if version_of_vllm() >= (0, 27):  # before, `LLM` throws the counters of a step away that gives no token
        assert metrics["vllm:kvzip_loaded_raw_bytes"] == stats.loaded_raw_bytes
    assert metrics["vllm:kvzip_ratio"] == pytest.approx(stats.ratio)
