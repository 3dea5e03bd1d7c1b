# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Two workers with a pool each: answers, damage in one of them, accounts. Run by ``test_engines.py``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # so that the functions below can be sent to the workers

from engine_harness import BLOCK_TOKENS, LOTS, PROMPT_TOKENS, all_like, prompts, running, transfer_config


def pool_bytes(worker: Any) -> int:
    """Bytes that a worker's pool has in use."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return int(get_kv_transfer_group().connector_worker.worker.engine.stats().pool.extent_bytes_used)


def damage_in_second(worker: Any) -> int:
    """Flip bits in the records of worker 1; returns how many it has."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    if worker.rank != 1:
        return 0
    swap = get_kv_transfer_group().connector_worker.worker.engine
    entries = swap._index.find(list(swap._index._entries))
    for entry in entries:
        swap.pool.views(entry.allocation)[-1][-40] ^= 0x41
    return len(entries)


def corrupt_blocks(worker: Any) -> int:
    """Damaged records that a worker has noticed."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return int(get_kv_transfer_group().connector_worker.worker.engine.stats().corrupt_blocks)


def wipe(worker: Any) -> None:
    """Overwrite a worker's KV cache."""
    for cache in worker.model_runner.kv_caches:
        cache.zero_()


def main() -> None:
    asked = prompts(3, PROMPT_TOKENS)
    transfer = transfer_config(LOTS, bound="lossless")
    with running(Path(sys.argv[1]), transfer, tensor_parallel_size=2) as engine:

        def forget() -> None:
            engine.settle()
            assert engine.llm.reset_prefix_cache()
            engine.llm.collective_rpc(wipe)

        def accounts() -> list[int]:
            engine.settle()
            engine.catalog.check()
            used = engine.llm.collective_rpc(pool_bytes)
            assert list(engine.catalog.used_bytes) == used, (engine.catalog.used_bytes, used)
            return used

        first = [engine.ask(prompt) for prompt in asked]
        used = accounts()
        assert min(used) > 0
        assert used[0] != used[1], "each worker has heads of its own, and so its own sizes"
        forget()
        second = [engine.ask(prompt) for prompt in asked]
        assert all_like(first, second)
        assert min(a.cached_tokens for a in second) == 3 * BLOCK_TOKENS
        forget()
        assert engine.llm.collective_rpc(damage_in_second)[1] == 9
        third = [engine.ask(prompt) for prompt in asked]
        assert all_like(first, third)
        noticed = engine.llm.collective_rpc(corrupt_blocks)
        assert noticed[0] == 0 < noticed[1], noticed
        for _ in range(2):  # up to 0.32 a request does not store what it meant to load; the next one does
            forget()
            answers = [engine.ask(prompt) for prompt in asked]
            assert all_like(first, answers)
            accounts()  # the sound worker heard with these stores what it had to give up
        assert {a.cached_tokens for a in answers} == {3 * BLOCK_TOKENS}
    print("two workers: ok")


if __name__ == "__main__":
    main()
