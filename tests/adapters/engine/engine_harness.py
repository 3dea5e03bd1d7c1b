# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""vLLM's real engine in this process, on the CPU, with or without the adapter. One at a time, as many as you like."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK_TOKENS = 128  # vLLM's block on the CPU
PROMPT_TOKENS = 3 * BLOCK_TOKENS + 20  # of a usual prompt: three full blocks
LOTS = 64 << 20  # bytes of host memory that hold all records of a test
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # one thread, anywhere: more would wait for each other on a busy machine
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Answer:
    """What the engine made of one prompt.

    Attributes:
        tokens: generated tokens, greedy.
        logprobs: their log-probabilities: these depend on the cache even where the tokens do not.
        cached_tokens: prompt tokens that were not computed.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    cached_tokens: int

    def like(self, other: Answer, tolerance: float = 1e-4) -> bool:
        """The same tokens with the same probabilities, up to the rounding of another order of sums."""
        near = all(abs(a - b) <= tolerance for a, b in zip(self.logprobs, other.logprobs, strict=True))
        return self.tokens == other.tokens and near


def all_like(some: Sequence[Answer], others: Sequence[Answer]) -> bool:
    """Whether all answers are alike, one by one."""
    return all(a.like(b) for a, b in zip(some, others, strict=True))


def version_of_vllm() -> tuple[int, ...]:
    """Major and minor version of the vLLM that runs."""
    import vllm

    return tuple(int(part) for part in vllm.__version__.split(".")[:2])


def chunk_of(blocks: int) -> dict[str, int]:
    """The setting that joins blocks to a chunk; up to 0.25 vLLM knows a chunk by its tokens."""
    return {"blocks_per_chunk": blocks} if version_of_vllm() >= (0, 26) else {"block_size": blocks * BLOCK_TOKENS}


def prompts(count: int, tokens: int, seed: int = 1) -> list[list[int]]:
    """Random prompts that share nothing."""
    generator = random.Random(seed)
    return [[generator.randrange(3, 500) for _ in range(tokens)] for _ in range(count)]


class Engine:
    """A running engine; make it with `running`."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    @property
    def core(self) -> Any:
        """vLLM's engine core, scheduler and all."""
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def catalog(self) -> Any:
        """The adapter's scheduler side: what it believes the workers to hold."""
        return self.core.scheduler.connector.connector_scheduler.manager.catalog

    @property
    def worker(self) -> Any:
        """The adapter's worker."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group().connector_worker.worker

    @property
    def swap(self) -> Any:
        """The worker's `SwapEngine`."""
        return self.worker.engine

    @property
    def caches(self) -> list[Any]:
        """The KV cache tensors, one a layer, blocks first."""
        worker = self.core.model_executor.driver_worker
        return list(getattr(worker, "worker", worker).model_runner.kv_caches)

    def ask(self, prompt: Sequence[int], max_tokens: int = 8) -> Answer:
        """Generate greedily from one prompt."""
        return self.ask_all([prompt], max_tokens)[0]

    def ask_all(self, several: Sequence[Sequence[int]], max_tokens: int = 8) -> list[Answer]:
        """Generate from several prompts at once."""
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, logprobs=1)
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in several]
        answers = []
        for output in self.llm.generate(inputs, parameters, use_tqdm=False):
            made = output.outputs[0]
            chosen = [step[token].logprob for token, step in zip(made.token_ids, made.logprobs, strict=True)]
            answers.append(Answer(tuple(made.token_ids), tuple(chosen), output.num_cached_tokens or 0))
        return answers

    def settle(self) -> None:
        """Take two more steps: vLLM submits the stores of a step at the next one, and hears of their end after it."""
        self.ask(prompts(1, 8, seed=99)[0], max_tokens=3)

    def forget(self, *, pages: bool = True) -> None:
        """Empty vLLM's own prefix cache, so that prompts come back from the adapter or not at all.

        Args:
            pages: wipe the memory too: what is read there afterwards was loaded or computed.
        """
        self.settle()
        assert self.llm.reset_prefix_cache()
        if pages:
            for cache in self.caches:
                cache.zero_()

    def come_back(self, several: Sequence[Sequence[int]]) -> tuple[list[Answer], list[Answer]]:
        """Ask everything, forget vLLM's own cache, ask everything again."""
        first = [self.ask(prompt) for prompt in several]
        self.forget()
        return first, [self.ask(prompt) for prompt in several]

    def damage(self) -> int:
        """Flip bits in the payload of every record; returns how many there are."""
        keys = list(self.swap._index._entries)
        for entry in self.swap._index.find(keys):
            self.swap.pool.views(entry.allocation)[-1][-40] ^= 0x41
        return len(keys)

    def check_accounts(self) -> int:
        """Assert that what the scheduler counts is what the worker's pool really has; returns the bytes."""
        self.settle()
        self.catalog.check()
        used = int(self.swap.stats().pool.extent_bytes_used)
        assert self.catalog.used_bytes == (used,)
        return used


def transfer_config(budget_bytes: int, **extra: Any) -> dict[str, Any]:
    """vLLM's ``kv_transfer_config`` for the adapter."""
    return {
        "kv_connector": "KvzipConnector",
        "kv_connector_module_path": "kvzip.adapters.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"cpu_bytes_to_use": budget_bytes, **extra},
    }


@contextmanager
def running(
    model: Path, transfer: dict[str, Any] | None = None, *, blocks: int = 40, max_tokens: int = 2048, **options: Any
) -> Iterator[Engine]:
    """An engine, shut down at the end.

    Args:
        model: folder of the model.
        transfer: ``kv_transfer_config``; None runs vLLM as it is.
        blocks: blocks of its KV cache.
        max_tokens: longest sequence.
        options: more of ``vllm.LLM``.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    options = {"dtype": "float32", "enable_prefix_caching": True, **options}
    if transfer is not None:
        options["kv_transfer_config"] = transfer
    llm = LLM(str(model), enforce_eager=True, max_model_len=max_tokens, num_gpu_blocks_override=blocks, **options)
    try:
        yield Engine(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()
