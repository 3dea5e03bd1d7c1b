# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The adapter in vLLM's real engine, on the CPU: what needs an engine of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from engine_harness import (
    BLOCK_TOKENS,
    LOTS,
    PROMPT_TOKENS,
    Answer,
    all_like,
    chunk_of,
    prompts,
    running,
    transfer_config,
    version_of_vllm,
)
from test_one_engine import PREFIX, check_pages

from kvzip import ErrorBound


def test_bfloat16(llama: Path, asked: list[list[int]]) -> None:
    """The usual type. Answers are compared with those from vLLM's own cache, which has the same order of sums."""
    with running(llama, transfer_config(LOTS, bound="lossless"), dtype="bfloat16") as engine:
        _, second = engine.come_back(asked)
        assert {a.cached_tokens for a in second} == {PREFIX}
        assert all_like(second, [engine.ask(prompt) for prompt in asked])
        check_pages(engine, ErrorBound.relative(1e-2))


def test_two_blocks_a_chunk(llama: Path, asked: list[list[int]], expected: list[Answer]) -> None:
    with running(llama, transfer_config(LOTS, bound="lossless", **chunk_of(2))) as engine:
        first, second = engine.come_back(asked)
        assert all_like(first, expected)
        assert all_like(second, expected)
        assert {a.cached_tokens for a in second} == {2 * BLOCK_TOKENS}  # one full chunk
        engine.check_accounts()


def test_a_small_budget_evicts_and_is_kept(llama: Path, asked: list[list[int]], expected: list[Answer]) -> None:
    raw_bytes = PREFIX * 2 * 2 * 2 * 64 * 4  # of a prompt's full blocks: layers, K and V, heads, float32
    with running(llama, transfer_config(3 * raw_bytes, bound="lossless")) as engine:
        first, second = engine.come_back(asked)
        assert all_like(first, expected)
        assert all_like(second, expected)
        stats = engine.swap.stats()
        assert stats.pool.capacity_bytes <= 3 * raw_bytes
        assert engine.catalog.counts.evicted + stats.evicted_blocks > 0
        engine.forget()  # of six in a circle LRU holds none when they come around; the last one is there
        again = engine.ask(asked[-1])
        assert again.cached_tokens == PREFIX
        assert again.like(expected[-1])
        assert 0 < engine.check_accounts() <= stats.pool.capacity_bytes


def test_many_requests_at_once_with_preemptions(llama: Path, asked: list[list[int]], expected: list[Answer]) -> None:
    """More than the cache holds, twice: stores, loads and preemptions go on side by side."""
    with running(llama, transfer_config(LOTS, bound="lossless"), blocks=18, max_num_seqs=6) as engine:
        for _ in range(2):
            answers = engine.ask_all(asked * 2)
            assert [a.tokens for a in answers] == [a.tokens for a in expected] * 2
            engine.forget()
        assert engine.swap.stats().loaded_blocks > 0
        engine.check_accounts()


def test_two_groups_of_layers(gemma: Path) -> None:
    """With a sliding window: within it, beyond it, and with damaged records."""
    short, long = prompts(2, PROMPT_TOKENS, seed=3), prompts(2, 1100, seed=4)
    with running(gemma, blocks=64) as engine:
        expected = [engine.ask(prompt) for prompt in short + long]
    transfer = transfer_config(LOTS, bound="lossless")
    with running(gemma, transfer, blocks=64, disable_hybrid_kv_cache_manager=False) as engine:
        assert len(engine.core.scheduler.kv_cache_config.kv_cache_groups) == 2
        first, second = engine.come_back(short + long)
        assert all_like(first, expected)
        assert all_like(second, expected)
        assert [a.cached_tokens for a in second] == [PREFIX] * 2 + [8 * BLOCK_TOKENS] * 2
        engine.check_accounts()
        if version_of_vllm() < (0, 32):  # vLLM cannot compute blocks of several groups again
            return
        engine.forget()
        assert engine.damage() > 0
        assert all_like([engine.ask(prompt) for prompt in short + long], expected)
        assert engine.swap.stats().corrupt_blocks > 0
        engine.check_accounts()


def test_the_spec_works_with_vllms_own_connector(llama: Path, asked: list[list[int]], expected: list[Answer]) -> None:
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "KvzipOffloadingSpec",
            "spec_module_path": "kvzip.adapters.vllm.spec",
            "cpu_bytes_to_use": LOTS,
            "bound": "lossless",
        },
    }
    with running(llama, transfer) as engine:
        first, second = engine.come_back(asked[:2])
        assert all_like(first, expected[:2])
        assert all_like(second, expected[:2])
        assert all(answer.cached_tokens for answer in second)
        assert engine.catalog.used_bytes[0] > engine.swap.stats().pool.extent_bytes_used, "the worst case is counted"


def test_wrong_settings_are_refused_at_start_up(llama: Path) -> None:
    with pytest.raises(Exception, match="did you mean 'bound'"), running(llama, transfer_config(LOTS, buond=1e-3)):
        pass
    too_large = transfer_config(2 << 20, **chunk_of(16))
    with pytest.raises(Exception, match="a chunk may take"), running(llama, too_large):
        pass


def test_two_workers(llama: Path) -> None:
    """Tensor parallel: each worker has a pool of its own. In a process of its own, because it starts others."""
    script = Path(__file__).with_name("two_workers.py")
    done = subprocess.run(
        [sys.executable, str(script), str(llama)], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "two workers: ok" in done.stdout
