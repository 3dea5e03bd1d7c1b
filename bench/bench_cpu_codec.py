# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Speed and ratio of the native CPU codec on real KV caches.

Run ``python bench/bench_cpu_codec.py FILE.npy ...`` (a few minutes), or with ``--quick`` for a smoke run on the sample
that ships with the package. A file holds bit patterns of bfloat16, uint16, shape ``[layers, 2, tokens, kv_heads,
head_dim]``; its blocks are repeated until there are ``--mib`` MiB of raw data, more than caches hold, in one paged
tensor a layer. Writes ``bench/results/cpu_codec.json``.

GB/s is 1e9 bytes of raw bfloat16 a second. ``wall`` is the time of a call on N threads. ``core`` is the CPU time of the
calling thread on one thread: what a core does when others do not take it away. A call is timed after its result has
been verified: every value within its bound, every bit of lossless data; with the default bounds, which differ within
pages, those of the first blocks. The ratio counts headers, tables and padding.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvzip import _native
from kvzip.backends.base import EncodeRequest
from kvzip.backends.cuszp import coding_of
from kvzip.benchmark import cpu_model, usable_cores
from kvzip.bounds import BoundPolicy, differs_within_pages, resolve
from kvzip.coding import compare_blocks
from kvzip.types import BlockView, ErrorBound

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "kvzip" / "data" / "smollm2_sample.npy"

COMPARED_BLOCKS = 8  # with bounds that differ within pages

CASES: dict[str, tuple[ErrorBound | BoundPolicy, str]] = {
    "rice default": (BoundPolicy.uncalibrated(), "rice"),
    "fixed default": (BoundPolicy.uncalibrated(), "fixed"),
    "fixed rel:1e-3": (ErrorBound.relative(1e-3), "fixed"),
    "fixed rel:1e-2": (ErrorBound.relative(1e-2), "fixed"),
    "plain rel:1e-3": (ErrorBound.relative(1e-3), "plain"),
    "outlier rel:1e-3": (ErrorBound.relative(1e-3), "outlier"),
    "lossless": (ErrorBound.lossless(), "fixed"),
}


def paged(path: Path, block_tokens: int, mib: int, dims: str) -> BlockView:
    """A KV cache as one paged tensor a layer: [blocks, 2, block_tokens, heads, head_dim], or heads before tokens."""
    cache = np.load(path)
    if cache.dtype != np.uint16 or cache.ndim != 5:
        raise SystemExit(f"{path}: {cache.dtype} {cache.shape}, not uint16 [layers, 2, tokens, kv_heads, head_dim]")
    layers, _, tokens, heads, head_dim = cache.shape
    blocks = tokens // block_tokens
    cut = cache[:, :, : blocks * block_tokens].reshape(layers, 2, blocks, block_tokens, heads, head_dim)
    order = (0, 2, 1, 3, 4, 5) if dims == "2NHD" else (0, 2, 1, 4, 3, 5)
    pages = cut.transpose(order)
    copies = max(1, round(mib * 2**20 / pages.nbytes))
    return BlockView([np.concatenate([layer] * copies) for layer in pages], dims, dtype="bfloat16")


def times(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> list[float]:
    """Seconds of each of `repeats` calls."""
    found = []
    for _ in range(repeats):
        start = clock()
        call()
        found.append(clock() - start)
    return found


def speed(raw_bytes: int, seconds: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile of GB/s."""
    rates = sorted(raw_bytes / s / 1e9 for s in seconds)
    p10, p90 = np.quantile(rates, [0.1, 0.9])
    return {"median": round(statistics.median(rates), 3), "p10": round(float(p10), 3), "p90": round(float(p90), 3)}


def measure(view: BlockView, name: str, thread_counts: list[int], repeats: int) -> dict[str, Any]:
    """Encode, verify, decode, compare: speed and ratio of one case."""
    bound, mode = CASES[name]
    bounds = resolve(bound, view.layout)
    segments = _native.segments_array(view, bounds, coding_of(EncodeRequest(bounds, mode)))
    out = np.zeros((len(view), _native.max_payload_bytes(segments)), np.uint8)
    back = BlockView([np.full_like(t, 0x5A5A) for t in view.tensors], view.layout)
    into = _native.segments_array(back)
    ids = view.block_ids

    table, sizes = _native.cpu_encode(segments, ids, out)
    payloads = [out[i, : int(n)] for i, n in enumerate(sizes)]
    _native.cpu_decode(into, ids, payloads, table)
    if differs_within_pages(bound):
        worst = compare_blocks(view[ids[:COMPARED_BLOCKS]], back[ids[:COMPARED_BLOCKS]], bound)
        over, bad = worst.over_bound, worst.violations
    else:
        limits = table["bound"].astype(np.float64)
        errors, violations = _native.cpu_compare(segments, ids, into, ids, limits)
        over, bad = float(np.max(errors / np.where(limits > 0, limits, 1))), int(violations.sum())
        bad += int(errors.any()) if bound == ErrorBound.lossless() else 0
    if bad:
        raise SystemExit(f"{name}: {bad} values break the bound")

    header = -(-(96 + 24 + 16 * len(segments)) // 16) * 16  # one geometry
    stored = int(sizes.sum()) + header * len(view)

    def encode(threads: int) -> Callable[[], object]:
        return lambda: _native.cpu_encode(segments, ids, out, threads=threads)

    def decode(threads: int) -> Callable[[], object]:
        return lambda: _native.cpu_decode(into, ids, payloads, table, threads=threads)

    result: dict[str, Any] = {
        "ratio": round(view.nbytes / stored, 4),
        "max_error_over_bound": round(over, 6),
        "violations": 0,
        "core_gb_per_s": {
            "encode": speed(view.nbytes, times(encode(1), repeats, time.thread_time)),
            "decode": speed(view.nbytes, times(decode(1), repeats, time.thread_time)),
        },
        "wall_gb_per_s": {},
    }
    for threads in thread_counts:
        result["wall_gb_per_s"][str(threads)] = {
            "encode": speed(view.nbytes, times(encode(threads), repeats, time.perf_counter)),
            "decode": speed(view.nbytes, times(decode(threads), repeats, time.perf_counter)),
        }
    return result


def main() -> int:
    """Measure, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="KV caches, *.npy (default: the sample)")
    parser.add_argument("--mib", type=int, default=192, help="raw data to work on, MiB (default: 192)")
    parser.add_argument("--block-tokens", type=int, default=16, help="tokens of a block (default: 16)")
    parser.add_argument("--dims", choices=["2NHD", "2HND"], default="2NHD", help="order of the axes (default: 2NHD)")
    parser.add_argument("--threads", type=int, nargs="*", help="numbers of threads (default: 1 and all cores)")
    parser.add_argument("--repeats", type=int, default=11, help="calls for each figure (default: 11)")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "cpu_codec.json")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few data, few calls, nothing written")
    args = parser.parse_args()
    if args.quick:
        args.mib, args.repeats = 4, 3
    cores = usable_cores()
    threads = args.threads or sorted({1, cores})

    results: dict[str, Any] = {}
    for path in args.files or [SAMPLE]:
        view = paged(path, args.block_tokens, args.mib, args.dims)
        copy_to: list[npt.NDArray[Any]] = [np.zeros_like(t) for t in view.tensors]

        def copy(view: BlockView = view, copy_to: list[npt.NDArray[Any]] = copy_to) -> None:
            for source, target in zip(view.tensors, copy_to, strict=True):
                np.copyto(target, source)

        found: dict[str, Any] = {
            "raw_bytes": view.nbytes,
            "blocks": len(view),
            "memcpy_core_gb_per_s": speed(view.nbytes, times(copy, args.repeats, time.thread_time)),
            "isa": {},
        }
        print(f"{path.stem}: {view.nbytes / 1e6:.0f} MB, {len(view)} blocks of {args.block_tokens} tokens, {args.dims}")
        print(f"  memcpy {found['memcpy_core_gb_per_s']['median']:.2f} GB/s a core")
        for isa in reversed(_native.cpu_isas()):
            _native.set_cpu_isa(isa)
            found["isa"][isa] = {}
            for name in CASES:
                one = measure(view, name, threads, args.repeats)
                found["isa"][isa][name] = one
                core = one["core_gb_per_s"]
                wall = "  ".join(
                    f"{n} threads {w['encode']['median']:.2f} / {w['decode']['median']:.2f}"
                    for n, w in one["wall_gb_per_s"].items()
                )
                print(
                    f"  {isa:9s} {name:17s} ratio {one['ratio']:.3f}  encode / decode GB/s: core "
                    f"{core['encode']['median']:.2f} / {core['decode']['median']:.2f}  wall: {wall}"
                )
        _native.set_cpu_isa("auto")
        results[path.stem] = found
    report = {
        "what": "native CPU codec: encode and decode, 1e9 bytes of raw bfloat16 a second",
        "environment": {
            "cpu": cpu_model(),
            "cores": cores,
            "load_average_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
            "platform": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "numpy": np.__version__,
            "native": _native.describe()["build"],
        },
        "settings": {
            "mib": args.mib,
            "block_tokens": args.block_tokens,
            "dims": args.dims,
            "threads": threads,
            "repeats": args.repeats,
        },
        "results": results,
    }
    if not args.quick:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
