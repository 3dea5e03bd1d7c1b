# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Bits per value of the codec's modes on real KV caches, and of the codes that were tried for the mode ``rice``.

    python bench/rate.py --table calibration.npz --out bench/results/rate.json CACHE.npy[:LAYER,LAYER,...] ...

A cache is a ``.npy`` of bfloat16 bit patterns (uint16), shape ``[layers, 2, tokens, kv_heads, head_dim]``; the layers
of the model that it holds follow the colon when it does not hold all. The first 16 tokens are left out: a policy keeps
them exact. The modes are measured with the codec (segments with their table entries and padding, without record
headers); the alternatives are counted in NumPy, from the same quantised values, without padding.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvzip import BlockLayout, BlockView, CalibrationTable, ErrorBound, get_codec, system_info
from kvzip.backends.base import EncodeRequest
from kvzip.record import ENTRY_DTYPE

Ints = npt.NDArray[np.int64]
TOKENS = 16
MODES = ("fixed", "plain", "outlier", "rice")
LARGEST = 12  # Rice parameter that is tried


def schemes(table: CalibrationTable) -> list[tuple[str, str, Callable[[int], ErrorBound]]]:
    """(name, ``"k"`` or ``"v"``, bound of a layer)."""
    found: list[tuple[str, str, Callable[[int], ErrorBound]]] = []
    for e in (1e-3, 1e-2):
        for kind in "kv":
            found.append((f"page {e:g}", kind, lambda layer, e=e: ErrorBound.relative(e)))
    for t in (0.2, 0.4, 0.5, 0.6):
        bounds = table.key_bounds(t)
        found.append((f"attn {t:g}", "k", lambda layer, b=bounds: ErrorBound.channel_table(b[layer])))
    for r in (0.08, 0.1, 0.17, 0.21, 0.25):
        found.append((f"rms {r:g}", "v", lambda layer, r=r: ErrorBound.token_rms(r)))
    for kind in "kv":
        found.append(("lossless", kind, lambda layer: ErrorBound.lossless()))
    return found


def blocks_of(pages: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[tokens, heads, dim] -> [blocks, 16, heads, dim], without the first block."""
    tokens = len(pages) // TOKENS * TOKENS
    return np.ascontiguousarray(pages[TOKENS:tokens].reshape(-1, TOKENS, *pages.shape[1:]))


def measured_bits(pages: npt.NDArray[Any], bound: ErrorBound, mode: str) -> int:
    """Bits that the codec needs for pages [blocks, 16, heads, dim]."""
    codec = get_codec("cuszp")
    view = BlockView([pages], BlockLayout.from_tensors([pages], "NHD", dtype="bfloat16"))
    out = np.empty((len(view), codec.max_payload_bytes(view.layout)), np.uint8)
    _, sizes = codec.encode_blocks(view, EncodeRequest(bound, mode), out)
    return 8 * (int(sizes.sum()) + len(view) * ENTRY_DTYPE.itemsize)


# ---- what was tried


def zigzag(q: Ints) -> Ints:
    return np.where(q >= 0, 2 * q, -2 * q - 1)


def bit_length(z: Ints) -> Ints:
    return np.where(z > 0, np.floor(np.log2(np.maximum(z, 1))) + 1, 0).astype(np.int64)


def quantise(pages: npt.NDArray[Any], bound: ErrorBound) -> Ints:
    """Codes q of the groups of pages [blocks, 16, heads, dim], shape [blocks, groups, 16], with the format's steps."""
    x = (pages.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    if bound.channels is not None:
        limit = np.broadcast_to(bound.channels.values, x.shape)
    elif str(bound).startswith("rms"):
        limit = np.broadcast_to(bound.value * np.sqrt((x**2).mean(axis=3, keepdims=True)), x.shape)
        limit = (limit.astype(np.float32).view(np.uint32) >> 19 << 19).view(np.float32)
    else:
        span = x.max(axis=(1, 2, 3), keepdims=True) - x.min(axis=(1, 2, 3), keepdims=True)
        limit = np.broadcast_to(bound.value * span, x.shape)
    bits = np.ascontiguousarray(limit, np.float32).view(np.uint32)
    width = np.full((len(x), 1, *x.shape[2:]), 14)
    while True:
        kept = np.clip(9 - width, 1, 8)
        step = 2.0 * (bits & (np.uint32(0xFFFFFFFF) << (24 - kept).astype(np.uint32))).view(np.float32)
        q = np.rint(x / step).astype(np.int64)
        again = bit_length(zigzag(q).max(axis=1, keepdims=True))
        if (again == width).all():
            return np.moveaxis(q.reshape(len(x), TOKENS, -1), 1, 2)
        width = again


def rice_costs(z: Ints) -> Ints:
    """Bits of groups [..., n] with every Rice parameter, shape [..., LARGEST]."""
    return np.stack([z.shape[-1] * (k + 1) + (z >> k).sum(axis=-1) for k in range(LARGEST)], axis=-1)


def header(costs: Ints, planes: int) -> int:
    """Bits of pages [blocks, groups, LARGEST] when parameters lie in the best window of 2^planes of their page."""
    size = 2**planes
    windows = [costs[:, :, k : k + size].min(axis=2).sum(axis=1) for k in range(max(1, LARGEST - size + 1))]
    return int(np.min(windows, axis=0).sum()) + planes * costs.shape[0] * costs.shape[1]


def entropy(symbols: Ints) -> float:
    _, counts = np.unique(symbols, return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


def golomb(z: Ints) -> Ints:
    """Bits of groups with the best of parameters m that are no powers of two either."""
    best = np.full(z.shape[:-1], np.iinfo(np.int64).max)
    for m in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64, 96, 128, 192, 256, 384, 512):
        b = int(np.ceil(np.log2(m)))
        rest = np.where(z % m < 2**b - m, b - 1, b) if m > 1 else 0
        best = np.minimum(best, (z // m + 1 + rest).sum(axis=-1))
    return best


def alternatives(q: Ints) -> dict[str, float]:
    """Bits per value of codes q [blocks, groups, 16]."""
    values, groups = q.size, q.shape[0] * q.shape[1]
    plain, delta = zigzag(q), zigzag(np.diff(q, axis=2, prepend=0))
    own = rice_costs(plain)
    both = np.minimum(own, rice_costs(delta))
    width = bit_length(plain.max(axis=2))
    spread = bit_length((q - q.min(axis=2, keepdims=True)).max(axis=2))
    offset = own.copy()
    for k in range(LARGEST):
        base = np.clip(np.rint(np.median(q, axis=2) / 2**k), -8, 7).astype(np.int64) << k
        z = zigzag(q - base[:, :, None])
        offset[:, :, k] = 16 * (k + 1) + (z >> k).sum(axis=2)
    size = np.round(np.log2(np.abs(q).mean(axis=2) + 1e-9) * 2).clip(-16, 60).astype(np.int64)
    coded = sum(entropy(q[size == s]) * (size == s).sum() * 16 for s in np.unique(size))
    found = {
        "fixed length, zigzag": (4 * groups + 16 * int(width.sum())) / values,
        "fixed length, the better of zigzag and offset": (
            5 * groups + int(np.minimum(16 * width, 16 * spread + 8).sum())
        )
        / values,
        "rice, nibble header": (4 * groups + int(own.min(axis=2).sum())) / values,
        "rice, nibble header for two channels": (
            2 * groups + int(rice_costs(plain.reshape(*q.shape[:1], -1, 32)).min(axis=2).sum())
        )
        / values,
        "golomb, nibble header": (4 * groups + int(golomb(plain).sum())) / values,
        "rice, offset nibble": (8 * groups + int(offset.min(axis=2).sum())) / values,
        "rice, differences": (4 * groups + int(rice_costs(delta).min(axis=2).sum())) / values,
        "rice, delta bit, nibble header": (5 * groups + int(both.min(axis=2).sum())) / values,
    }
    for planes in range(4):
        found[f"rice, delta bit, {planes} planes"] = (groups + header(both, planes)) / values
    found["rice, delta bit, the best planes of each page"] = (
        groups + int(np.min([[header(page[None], p) for p in range(4)] for page in both], axis=1).sum())
    ) / values
    found["entropy in classes of half an octave, nibble header"] = coded / values + 4 / 16
    return found


def run(cache: npt.NDArray[Any], layers: list[int], table: CalibrationTable) -> list[dict[str, Any]]:
    rows = []
    for name, kind, bound_of in schemes(table):
        pages = [blocks_of(layer["kv".index(kind)]) for layer in cache]
        row: dict[str, Any] = {"scheme": name, "kind": kind, "modes": {}, "alternatives": {}}
        values = sum(p.size for p in pages)
        for mode in MODES:
            bits = sum(measured_bits(p, bound_of(layer), mode) for p, layer in zip(pages, layers, strict=True))
            row["modes"][mode] = round(bits / values, 4)
        if name != "lossless":
            q = [quantise(p, bound_of(layer)) for p, layer in zip(pages, layers, strict=True)]
            row["alternatives"] = {k: round(v, 4) for k, v in alternatives(np.concatenate(q)).items()}
        print(name, kind, row["modes"], file=sys.stderr)
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", type=Path, required=True, help="calibration table of the model")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("caches", nargs="+", metavar="CACHE.npy[:LAYERS]")
    arguments = parser.parse_args()
    table = CalibrationTable.load(arguments.table)
    result: dict[str, Any] = {"block_tokens": TOKENS, "unit": "bits per value", "caches": {}}
    for text in arguments.caches:
        path, _, numbers = text.partition(":")
        cache = np.load(path, mmap_mode="r")
        layers = [int(n) for n in numbers.split(",")] if numbers else list(range(len(cache)))
        result["caches"][Path(path).stem] = run(cache, layers, table)
    result["environment"] = {k: system_info()[k] for k in ("kvzip", "python", "platform") if k in system_info()}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
