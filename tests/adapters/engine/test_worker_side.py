# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The worker in vLLM's engine: K and V lie where its layout says, settings change while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from engine_harness import BLOCK_TOKENS, LOTS, Answer, Engine, prompts, running, transfer_config

from kvzip import ErrorBound

EXTENSION = "kvzip.adapters.vllm.extension.KvzipWorkerExtension"


@pytest.fixture(scope="module")
def engine(llama: Path, expected: list[Answer]) -> Iterator[Engine]:
    with running(llama, transfer_config(LOTS, bound="lossless"), worker_extension_cls=EXTENSION) as started:
        yield started


def keys_and_values(engine: Engine, prompt: list[int]) -> dict[int, tuple[Any, Any]]:
    """What the attention layers were given for a prompt: layer -> K and V, shape ``[tokens, heads, head_dim]``."""
    worker = engine.core.model_executor.driver_worker
    model = getattr(worker, "worker", worker).model_runner.model
    found: dict[int, tuple[Any, Any]] = {}
    handles = []
    for name, module in model.named_modules():
        if type(module).__name__ == "Attention":
            layer = next(int(part) for part in name.split(".") if part.isdigit())

            def note(attention: Any, given: tuple[Any, ...], layer: int = layer) -> None:
                if len(given[1]) >= len(prompt) and layer not in found:
                    shape = (-1, attention.num_kv_heads, attention.head_size)
                    found[layer] = tuple(x.reshape(shape)[: len(prompt)].clone() for x in given[1:3])  # type: ignore

            handles.append(module.register_forward_pre_hook(note))
    engine.ask(prompt)
    for handle in handles:
        handle.remove()
    return found


def bits(x: Any) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.ascontiguousarray(x.numpy()).view(np.uint32)
    return array


def test_keys_and_values_lie_where_the_layout_says(engine: Engine) -> None:
    (prompt,) = prompts(1, 2 * BLOCK_TOKENS + 9, seed=31)
    given = keys_and_values(engine, prompt)
    assert sorted(given) == [0, 1]
    (group,) = engine.worker._groups
    segments = group.view.layout.segments
    for position in range(2):  # of a block in the prompt
        tokens = slice(position * BLOCK_TOKENS, (position + 1) * BLOCK_TOKENS)
        wanted = []
        for segment, page in zip(segments, group.pages, strict=True):
            part = bits(given[page.layer][segment.kind == "v"][tokens, slice(*page.heads)])
            wanted.append(part.reshape(segment.tokens, segment.heads, segment.head_dim))
        blocks = [
            block
            for block in range(len(group.view))
            if all(np.array_equal(group.view.page(block, s), values) for s, values in enumerate(wanted))
        ]
        assert len(blocks) == 1, "one block has all pages of these tokens"


def test_settings_change_while_it_runs(engine: Engine) -> None:
    (now,) = engine.llm.collective_rpc("kvzip_configure", kwargs={"bound": "k=1e-2,v=rms:0.1", "codec": "cuszp"})
    assert now["bounds"].startswith("k=rel:0.01,v=rms:0.1")
    before = engine.swap.stats()
    engine.ask(prompts(1, 2 * BLOCK_TOKENS + 9, seed=32)[0])
    engine.settle()
    (after,) = engine.llm.collective_rpc("kvzip_stats")
    assert after["stored_blocks"] == before.stored_blocks + 2
    assert after["stored_record_bytes"] - before.stored_record_bytes < 0.6 * (
        after["stored_raw_bytes"] - before.stored_raw_bytes
    )
    with pytest.raises(Exception, match="can be changed while vLLM runs"):
        engine.llm.collective_rpc("kvzip_configure", kwargs={"cpu_bytes_to_use": 1 << 30})
    engine.llm.collective_rpc("kvzip_configure", kwargs={"bound": "lossless"})
    assert engine.worker.settings.bound == ErrorBound.lossless()


def test_the_first_block_of_a_prompt_is_exact(engine: Engine) -> None:
    engine.worker.configure(bound="rel:0.5")
    (prompt,) = prompts(1, 2 * BLOCK_TOKENS + 9, seed=33)
    engine.ask(prompt)
    engine.settle()
    before = [cache.double().numpy().copy() for cache in engine.caches]
    engine.forget()
    assert engine.ask(prompt).cached_tokens == 2 * BLOCK_TOKENS
    after = [cache.double().numpy() for cache in engine.caches]
    engine.worker.configure(bound="lossless")

    def blocks(cache: npt.NDArray[Any]) -> list[bytes]:
        return [block.tobytes() for block in cache if block.any()]

    exact = [len(set(blocks(a)) & set(blocks(b))) for a, b in zip(before, after, strict=True)]
    assert exact == [1] * len(before)
