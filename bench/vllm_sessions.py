# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Sessions that come back in vLLM's real engine: its own CPU offloading beside kvzip, in one run.

Run ``python bench/vllm_sessions.py --data CACHE.npy --out FOLDER`` with vLLM and kvzip in one environment, on a machine
with a GPU (six minutes on an H100; ``--smoke`` a minute). It writes ``<gpu>_vllm_sessions.json`` as rows come.

The model has the geometry of Llama-3.1-8B and dummy weights, so times are real and answers are not. Dummy weights make
KV values unlike real ones, and the ratio depends on them: before blocks are offloaded, by any tier, their pages are
overwritten with a real KV cache (``--data``, or the sample that ships with kvzip). The 16 half-heads of a page are
heads of one layer of that cache, at different places of its text.

Tiers: ``native`` is vLLM's ``CPUOffloadingSpec``; ``kvzip`` its defaults, the others the same with another bound or
codec. Each pair of connector and host budget is an engine in a process of its own; kvzip's tiers share one and begin
with an empty pool each. Loads:

* ``round robin``: every session is asked for once, then again and again in the same order, one token each. The GPU's
  cache holds ``gpu_sessions`` of the sessions; with ``reset`` vLLM's own prefix cache is emptied before every round
  instead. The TTFT is that of ``LLM.generate`` with ``max_tokens=1``, by the host's clock. ``load_ms`` is what the
  tier says its transfers took.
* ``open loop``: requests arrive as a Poisson process, for the sessions in turn, 16 tokens each. What has not begun to
  answer at the end counts with the time that it has waited. Not run with ``kvzip-raw``.
* ``stores only``: prompts that share nothing, all at once.

``verified_pages`` pages of the last round were compared with what was stored.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvzip import BoundPolicy, ErrorBound
from kvzip.benchmark import GIB, Results, Row, gpu_name, host_environment, link_environment
from kvzip.coding import compare_pages
from kvzip.demo import read_input
from kvzip.types import DType

PART = "vllm_sessions"
BUDGETS = {"half": 0.5, "fits": 1.25}  # of the raw bytes of the long sessions
CHANGES: dict[str, Row] = {
    "kvzip": {},
    "kvzip-1e-3": {"bound": "rel:1e-3"},
    "kvzip-raw": {"codec": "raw", "bound": "lossless"},
    "kvzip-lossless": {"bound": "lossless"},
}
TIERS = {"native": ["native"], "kvzip": ["kvzip-1e-3", "kvzip", "kvzip-raw", "kvzip-lossless"]}
ENGINES = ("kvzip-half", "native-half", "native-fits", "kvzip-fits")

GEOMETRIES: dict[str, Row] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 512,
    },
}


@dataclass(frozen=True)
class Plan:
    """How large everything is.

    Attributes:
        geometry: of the model.
        long: sessions and their tokens, for the round robin.
        short: the same, where everything fits.
        open: sessions, tokens, arrivals a second and seconds of the open loop.
        stores: prompts and tokens of the load without reuse.
        rounds: how often the sessions come back.
        gpu_sessions: long sessions that the GPU's cache holds.
    """

    geometry: str = "llama-3.1-8b"
    long: tuple[int, int] = (4, 32768)
    short: tuple[int, int] = (8, 4096)
    open: tuple[int, int, float, float] = (8, 16384, 6.0, 12.0)
    stores: tuple[int, int] = (24, 4096)
    rounds: int = 3
    gpu_sessions: float = 2.2

    @property
    def long_bytes(self) -> int:
        """Raw bytes of the long sessions' KV cache."""
        shape = GEOMETRIES[self.geometry]
        token_bytes = shape["num_hidden_layers"] * 2 * shape["num_key_value_heads"] * shape["head_dim"] * 2
        return int(self.long[0] * self.long[1] * token_bytes)


PLANS = {
    "full": Plan(),
    "smoke": Plan(long=(4, 4096), short=(4, 2048), open=(4, 4096, 8.0, 3.0), stores=(8, 2048), rounds=2),
    "tiny": Plan("tiny", (4, 1536), (4, 512), (4, 1536, 8.0, 2.0), (4, 1536), 2),
}


def write_model(folder: Path, geometry: str) -> Path:
    """Write the configuration of a Llama; there are no weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **GEOMETRIES[geometry],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def transfer_config(tier: str, budget_bytes: int) -> Row:
    """VLLM's ``kv_transfer_config``."""
    extra: Row = {"cpu_bytes_to_use": budget_bytes}
    if tier == "native":
        return {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"spec_name": "CPUOffloadingSpec", **extra},
        }
    return {
        "kv_connector": "KvzipConnector",
        "kv_connector_module_path": "kvzip.adapters.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


class RealPages:
    """Blocks of a real KV cache in the shape of vLLM's: ``[layers][blocks, heads, tokens, 2 x head_dim]``.

    Args:
        cache: bit patterns of bfloat16, shape ``[layers, 2, tokens, heads, head_dim]``.
        caches: vLLM's cache tensors, one a layer.
    """

    def __init__(self, cache: npt.NDArray[Any], caches: Sequence[Any]) -> None:
        import torch

        self.caches = list(caches)
        _, heads, tokens, double = self.caches[0].shape
        layers, _, length, sources, width = cache.shape
        self.blocks = length // tokens
        parts = double // 2 // width
        self.tiles: list[Any] = []
        for number in range(len(self.caches)):
            tile = np.empty((self.blocks, heads, tokens, double), np.uint16)
            for kind in range(2):
                for slot in range(heads * parts):
                    head, part = divmod(slot, parts)
                    shift = slot // sources * (length // (heads * parts // sources + 1))
                    values = np.roll(cache[number % layers, kind, :, slot % sources], shift, axis=0)
                    start = kind * double // 2 + part * width
                    tile[:, head, :, start : start + width] = values[: self.blocks * tokens].reshape(
                        self.blocks, tokens, width
                    )
            bits = torch.from_numpy(tile.view(np.int16)).view(torch.bfloat16)
            self.tiles.append(bits.to(self.caches[0].device, self.caches[0].dtype))

    def write(self, block_ids: Any) -> None:
        """Put real values into blocks, behind what is queued on the current stream."""
        import torch

        ids = torch.as_tensor(np.asarray(block_ids, np.int64), device=self.caches[0].device)
        which = ids % self.blocks
        for cache, tile in zip(self.caches, self.tiles, strict=True):
            cache[ids] = tile[which]

    def check(self, block_ids: Sequence[int], bound: ErrorBound | BoundPolicy) -> Row:
        """Compare blocks that were loaded with what was stored.

        Returns:
            ``{"verified_pages", "max_error_over_bound"}``; the latter is 0 where every bit is right.
        """
        import torch

        bounds = (bound.key, bound.value) if isinstance(bound, BoundPolicy) else (bound, bound)
        worst, pages = 0.0, 0
        for block in block_ids:
            found = self.caches[0][block].float()
            which = int((self.tiles[0].float() - found).abs().amax(dim=(1, 2, 3)).argmin())
            for cache, tile in zip(self.caches, self.tiles, strict=True):
                # [heads, tokens, K and V of head_dim values], as pages of [tokens, heads, head_dim]
                halves = (t.transpose(0, 1).contiguous().view(torch.int16).cpu() for t in (tile[which], cache[block]))
                bits = (np.split(half.numpy().view(np.uint16), 2, axis=-1) for half in halves)
                for before, after, one in zip(*bits, bounds, strict=True):
                    worst = max(worst, compare_pages(before, after, DType.BFLOAT16, one).over_bound)
                    pages += 1
        return {"verified_pages": pages, "max_error_over_bound": worst}


class Engine:
    """A running engine with one tier below it, and hands on what the tier's worker does."""

    def __init__(self, plan: Plan, tier: str, budget_bytes: int, folder: Path, data: npt.NDArray[Any]) -> None:
        from vllm import LLM

        started = time.perf_counter()
        tokens = max(plan.long[1], plan.short[1], plan.open[1], plan.stores[1])
        probe_block = 128 if _on_cpu() else 16
        blocks = max(int(plan.gpu_sessions * plan.long[1]), tokens + 512) // probe_block + 2
        self.plan, self.budget_bytes = plan, budget_bytes
        self.llm = LLM(
            str(write_model(folder, plan.geometry)),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enforce_eager=True,
            enable_prefix_caching=True,
            max_model_len=tokens + 256,
            num_gpu_blocks_override=blocks,
            gpu_memory_utilization=0.6,
            block_size=probe_block,
            kv_transfer_config=transfer_config(tier, budget_bytes),
        )
        self.start_seconds = time.perf_counter() - started
        core = self.llm.llm_engine.engine_core.engine_core
        worker = core.model_executor.driver_worker
        caches = list(getattr(worker, "worker", worker).model_runner.kv_caches)
        self.gpu_tokens = blocks * probe_block
        self.block_bytes = sum(cache[0].nbytes for cache in caches)
        self.block_tokens = probe_block
        self.pages = RealPages(data, caches)
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        self.worker = get_kv_transfer_group().connector_worker.worker
        self.load_jobs: set[int] = set()
        self.load_seconds: list[float] = []
        self.loaded_blocks: list[int] = []
        self._watch()

    def _watch(self) -> None:
        worker, pages = self.worker, self.pages
        submit_store, submit_load, get_finished = worker.submit_store, worker.submit_load, worker.get_finished

        def store(job_id: int, src_spec: Any, dst_spec: Any) -> Any:
            pages.write(src_spec.block_ids)
            return submit_store(job_id, src_spec, dst_spec)

        def load(job_id: int, src_spec: Any, dst_spec: Any, *more: Any, **also: Any) -> Any:
            self.load_jobs.add(job_id)
            self.loaded_blocks = [int(b) for b in dst_spec.block_ids]
            return submit_load(job_id, src_spec, dst_spec, *more, **also)

        def finished() -> Any:
            results = list(get_finished())
            for result in results:
                if result.job_id in self.load_jobs and result.transfer_time is not None:
                    self.load_seconds.append(result.transfer_time)
            return results

        worker.submit_store, worker.submit_load, worker.get_finished = store, load, finished

    # ---- asking

    def ask(self, prompts: Sequence[Sequence[int]]) -> tuple[float, float]:
        """Generate one token for each of the prompts; returns seconds and the cached fraction of their tokens."""
        parameters = _parameters(1)
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        started = time.perf_counter()
        outputs = self.llm.generate(inputs, parameters, use_tqdm=False)
        seconds = time.perf_counter() - started
        cached = sum(output.num_cached_tokens or 0 for output in outputs)
        return seconds, cached / sum(len(prompt) for prompt in prompts)

    def settle(self) -> None:
        """Let the stores of the last step begin and end."""
        for seed in range(2):
            self.ask([_prompt(8, 10**6 + seed, self.vocabulary)])
            time.sleep(0.2)

    def empty(self) -> None:
        """Forget everything in both caches."""
        self.settle()
        assert self.llm.reset_prefix_cache(reset_connector=True)
        self.settle()

    @property
    def vocabulary(self) -> int:
        """Number of tokens that prompts are made of."""
        return int(GEOMETRIES[self.plan.geometry]["vocab_size"])

    def sessions(self, count: int, tokens: int, seed: int) -> list[list[int]]:
        """Prompts that share nothing."""
        return [_prompt(tokens, 1000 * seed + i, self.vocabulary) for i in range(count)]

    # ---- loads

    def round_robin(self, count: int, tokens: int, rounds: int, *, reset: bool) -> Row:
        """Sessions come back in the order in which they came."""
        sessions = self.sessions(count, tokens, seed=1 if reset else 2)
        self.ask([_prompt(tokens, 77, self.vocabulary)])  # kernels are chosen and memory is taken
        self.empty()
        cold = [self.ask([session])[0] for session in sessions]
        back: list[float] = []
        cached: list[float] = []
        self.load_seconds.clear()
        for _ in range(rounds):
            if reset:
                self.settle()
                assert self.llm.reset_prefix_cache()
            for session in sessions:
                seconds, fraction = self.ask([session])
                back.append(seconds)
                cached.append(fraction)
        row: Row = {"load": "round robin", "sessions": count, "tokens": tokens, "reset": reset, "returns": len(back)}
        row |= {"ttft_cold_ms": _ms(cold, 50), "ttft_return_ms": _ms(back, 50)}
        row |= {"ttft_return_p10_ms": _ms(back, 10), "ttft_return_p90_ms": _ms(back, 90)}
        row |= {"cached_fraction": float(np.mean(cached))}
        row |= {"load_ms": _ms(self.load_seconds, 50) if self.load_seconds else None}
        return row

    def open_loop(self, count: int, tokens: int, rate: float, seconds: float, *, drain: bool) -> Row:
        """Requests arrive whether or not the earlier ones are done; without `drain` this is the last load."""
        sessions = self.sessions(count, tokens, seed=3)
        self.empty()
        for session in sessions:
            self.ask([session])
        generator = np.random.default_rng(4)
        due = np.cumsum(generator.exponential(1 / rate, size=int(rate * seconds * 2) + 16))
        due = due[due < seconds]
        engine = self.llm.llm_engine
        parameters = _parameters(16)
        first: dict[str, float] = {}
        cached: dict[str, float] = {}
        served = added = 0
        started = time.perf_counter()
        while (now := time.perf_counter() - started) < seconds:
            while added < len(due) and due[added] <= now:
                prompt = {"prompt_token_ids": sessions[added % count]}
                engine.add_request(f"open-{added}", prompt, parameters)
                added += 1
            if not engine.has_unfinished_requests():
                time.sleep(max(0.0, min(due[added] if added < len(due) else seconds, seconds) - now))
                continue
            for output in engine.step():
                if output.outputs and output.outputs[0].token_ids and output.request_id not in first:
                    first[output.request_id] = time.perf_counter() - started
                    cached[output.request_id] = (output.num_cached_tokens or 0) / tokens
                served += output.finished
        window = time.perf_counter() - started
        while drain and engine.has_unfinished_requests():
            engine.step()
        waits = [first.get(f"open-{i}", window) - due[i] for i in range(added)]
        return {
            "load": "open loop",
            "sessions": count,
            "tokens": tokens,
            "arrivals_per_s": rate,
            "window_seconds": window,
            "arrived": added,
            "served": served,
            "served_per_s": served / window,
            "not_begun": added - len(first),
            "ttft_p50_ms": _ms(waits, 50),
            "ttft_p95_ms": _ms(waits, 95),
            "cached_fraction": float(np.mean(list(cached.values()))) if cached else 0.0,
        }

    def stores_only(self, count: int, tokens: int) -> Row:
        """Nothing ever comes back: what offloading costs."""
        self.empty()
        seconds = []
        for repetition in range(3):
            prompts = self.sessions(count, tokens, seed=10 + repetition)
            seconds.append(self.ask(prompts)[0])
        rates = [count * tokens / s for s in seconds[1:]]
        return {
            "load": "stores only",
            "sessions": count,
            "tokens": tokens,
            "tokens_per_s": float(np.median(rates)),
            "tokens_per_s_all": [count * tokens / s for s in seconds],
        }


def _parameters(max_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False)


def _prompt(tokens: int, seed: int, vocabulary: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(10, vocabulary) for _ in range(tokens)]


def _ms(seconds: Sequence[float], percentile: float) -> float:
    return float(np.percentile(seconds, percentile)) * 1e3


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.device_type == "cpu")


# ---- one engine


def measure(
    name: str, plan: Plan, results: Results, data: npt.NDArray[Any], folder: Path, tiers: Sequence[str]
) -> None:
    """Run all loads of one engine, of kvzip's tiers those that are asked for."""
    kind, budget = name.split("-")
    budget_bytes = int(BUDGETS[budget] * plan.long_bytes)
    engine = Engine(plan, kind, budget_bytes, folder, data)
    results.note(PART, f"{name}: started in {engine.start_seconds:.1f} s, {engine.gpu_tokens} tokens on the GPU")
    default = None if kind == "native" else engine.worker.settings
    for tier in [tier for tier in TIERS[kind] if tier == "native" or tier in tiers]:
        bound: Any = ErrorBound.lossless()
        if default is not None:
            changes = {"codec": default.codec, "bound": default.bound, **CHANGES[tier]}
            bound = engine.worker.configure(**changes).bounds
        base: Row = {"tier": tier, "budget": budget, "budget_gib": budget_bytes / GIB, "bound": str(bound)}
        base |= {"gpu_tokens": engine.gpu_tokens}

        def run(load: Any, *arguments: Any, base: Row = base, bound: Any = bound, **more: Any) -> None:
            before = _stored(engine)
            with results.attempt(PART, f"{base['tier']} {base['budget']} {load.__name__}"):
                row = base | load(*arguments, **more)
                after = _stored(engine)
                row["ratio"] = (after[0] - before[0]) / (after[1] - before[1]) if after[1] > before[1] else 1.0
                # On the CPU the halves of a block in memory are not those of its shape.
                comparable = bound == ErrorBound.lossless() or results.gpu != "cpu"
                if row["load"] == "round robin" and row["cached_fraction"] > 0.5 and comparable:
                    loaded = engine.loaded_blocks[:-1]  # the last token of a prompt is always computed
                    row |= engine.pages.check(loaded[:: max(1, len(loaded) // 16)], bound)
                if default is not None:
                    row["failed_loads"] = engine.worker.engine.stats().corrupt_blocks
                results.add(PART, [row])
                print(json.dumps(row), flush=True)

        if budget == "half":
            lossy = tier not in ("native", "kvzip-raw", "kvzip-lossless")
            run(engine.round_robin, *plan.long, plan.rounds if lossy else 1, reset=False)
            run(engine.stores_only, *plan.stores)
            if tier != "kvzip-raw":
                run(engine.open_loop, *plan.open, drain=lossy)
        else:
            run(engine.round_robin, *plan.long, plan.rounds, reset=False)
            run(engine.round_robin, *plan.short, plan.rounds + 1, reset=True)


def _stored(engine: Engine) -> tuple[int, int]:
    """Raw bytes and record bytes that kvzip has stored so far."""
    swap = getattr(engine.worker, "engine", None)
    if swap is None:
        return 0, 0
    stats = swap.stats()
    return stats.stored_raw_bytes, stats.stored_record_bytes


def environment(plan: Plan, data: Path | None) -> Row:
    """What the figures depend on."""
    import torch
    import vllm

    found = host_environment() | {
        "vllm": vllm.__version__,
        "geometry": plan.geometry,
        "weights": "dummy",
        "kv_values": f"real, {data.name if data else 'the sample of kvzip'}, written into the pages before they leave",
        "eager": True,
        "gpu": "cpu",
    }
    if torch.cuda.is_available():
        from kvzip.interop.torch import describe_gpu

        found |= describe_gpu() | link_environment()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON file")
    parser.add_argument("--data", type=Path, help="a KV cache: uint16 patterns of bfloat16, *.npy")
    parser.add_argument("--plan", choices=sorted(PLANS), default="full")
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--engine", choices=ENGINES, help="only this one, in this process")
    parser.add_argument("--tiers", nargs="*", choices=sorted(CHANGES), default=sorted(CHANGES), help="of kvzip's")
    parser.add_argument("--limit-seconds", type=float, default=3600.0, help="start no engine after so long")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    plan = PLANS[options.plan]
    if options.engine is None:
        started = time.monotonic()
        for engine in options.engines:
            left = options.limit_seconds - (time.monotonic() - started)
            if left < 10:
                print(f"no time left for {engine}", flush=True)
                continue
            command = [sys.executable, __file__, "--engine", engine, "--out", str(options.out), "--plan", options.plan]
            command += ["--data", str(options.data)] if options.data else []
            command += ["--tiers", *options.tiers]
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(command, timeout=left, check=False)
        return 0
    found = environment(plan, options.data)
    results = Results(options.out, gpu_name(found["gpu"]), found)
    file = options.out / f"{results.gpu}_{PART}.json"
    if file.exists():  # of the engines before
        results.parts[PART] = json.loads(file.read_text())
    cache, _ = read_input(options.data)
    measure(options.engine, plan, results, np.asarray(cache), options.out / "model", options.tiers)
    sys.stdout.flush()
    os._exit(0)  # requests of the open loop may be under way, and everything is written


if __name__ == "__main__":
    sys.exit(main())
