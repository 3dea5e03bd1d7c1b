# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Bytes of LMCache's chunks in its storage tier, and how far what comes back is from them: its own fp8, and kvzip.

Run ``python bench/lmcache_chunks.py --kv FILE.npy [--moments FILE.npy]`` where LMCache is installed (``.ci/lmcache.sh``
makes such an environment); ``--kv`` is a cache of bit patterns of bfloat16, ``[layers, 2, tokens, heads, head_dim]``.
Writes ``bench/results/lmcache_chunks.json``. The serdes are called as LMCache calls them, on its memory objects;
``stored_bytes`` is what they tell it to write. The largest errors are over the range of a page of 16 tokens, K and V
apart.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.serde import Fp8QuantizationDeserializer, Fp8QuantizationSerializer
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

from kvzip.adapters.lmcache.layout import PAGE_TOKENS
from kvzip.adapters.lmcache.serde import KvzipDeserializer, KvzipSerializer
from kvzip.adapters.lmcache.settings import SerdeSettings
from kvzip.benchmark import host_environment, write_json

ROOT = Path(__file__).parent.parent
KEY = ObjectKey(bytes(32), "model", 0)


def memory(shape: tuple[int, ...], dtype: torch.dtype) -> TensorMemoryObj:
    """A memory object of LMCache."""
    size = torch.Size(shape)
    nbytes = size.numel() * dtype.itemsize
    about = MemoryObjMetadata(size, dtype, 0, nbytes, 1, fmt=MemoryFormat.KV_2LTD, shapes=[size], dtypes=[dtype])
    return TensorMemoryObj(torch.zeros(nbytes, dtype=torch.uint8), about, None)


def chunks(path: Path, tokens: int) -> list[TensorMemoryObj]:
    """The chunks of a cache, each ``[2, layers, tokens, heads * head_dim]``."""
    kv = torch.from_numpy(np.load(path).view(np.int16)).view(torch.bfloat16).permute(1, 0, 2, 3, 4).flatten(3)
    made = []
    for at in range(0, kv.shape[2] - tokens + 1, tokens):
        made.append(memory((2, kv.shape[1], tokens, kv.shape[3]), torch.bfloat16))
        made[-1].tensor.copy_(kv[:, :, at : at + tokens])
    return made


def error_over_range(before: torch.Tensor, after: torch.Tensor) -> list[float]:
    """Largest error of K and of V over the range of their page."""
    pages, error = (
        x.double().unflatten(2, (-1, PAGE_TOKENS)).flatten(3) for x in (before, after.double() - before.double())
    )
    over = error.abs().amax(-1) / (pages.amax(-1) - pages.amin(-1))
    return [float(x) for x in over.amax((1, 2))]


def measure(serializer: Any, deserializer: Any, objects: list[TensorMemoryObj]) -> dict[str, Any]:
    """One serde on all chunks."""
    layout = MemoryLayoutDesc(objects[0].get_shapes(), objects[0].get_dtypes())
    buffers = [memory((serializer.estimate_serialized_size(layout),), torch.uint8) for _ in objects]
    back = [memory(tuple(obj.get_shape()), torch.bfloat16) for obj in objects]
    stored = [serializer.serialize(*pair, KEY) for pair in zip(objects, buffers, strict=True)]
    for pair in zip(buffers, back, strict=True):
        deserializer.deserialize(*pair, KEY)
    raw = sum(obj.get_size() for obj in objects)
    errors = [error_over_range(a.tensor, b.tensor) for a, b in zip(objects, back, strict=True)]
    return {
        "raw_bytes": raw,
        "stored_bytes": sum(stored),
        "ratio": raw / sum(stored),
        "estimate_over_raw": sum(b.get_size() for b in buffers) / raw,
        "max_error_over_range_k": max(e[0] for e in errors),
        "max_error_over_range_v": max(e[1] for e in errors),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", type=Path, required=True)
    parser.add_argument("--moments", type=Path, help="a calibration table, or moments of the model's queries")
    parser.add_argument("--tokens", type=int, default=256, help="of a chunk")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "lmcache_chunks.json")
    args = parser.parse_args()
    heads, dim = np.load(args.kv, mmap_mode="r").shape[3:]
    objects = chunks(args.kv, args.tokens)
    settings: dict[str, dict[str, Any]] = {
        "lossless": {"bound": "lossless"},
        "lossless, rice": {"bound": "lossless", "mode": "rice"},
        "rel:1e-3": {"bound": "rel:1e-3"},
        "rel:1e-3, rice": {"bound": "rel:1e-3", "mode": "rice"},
        "rel:1e-2": {"bound": "rel:1e-2"},
        "default": {"head_dim": dim},
        "default, fixed": {"head_dim": dim, "mode": "fixed"},
        "default without head_dim": {},
        "k=1e-3,v=rms:0.15": {"bound": "k=1e-3,v=rms:0.15", "head_dim": dim},
    }
    if args.moments:
        settings["table, 0.4"] = {"bound": f"table:{args.moments}", "head_dim": dim}
    rows = {"LMCache's fp8": measure(Fp8QuantizationSerializer(), Fp8QuantizationDeserializer(), objects)}
    for name, options in settings.items():
        read = SerdeSettings.read(options)
        rows[f"kvzip, {name}"] = measure(KvzipSerializer(read), KvzipDeserializer(read), objects)
        print(f"{name:24} ratio {rows[f'kvzip, {name}']['ratio']:.2f}")
    environment = host_environment() | {
        "lmcache": version("lmcache"),
        "torch": torch.__version__,
        "data": args.kv.stem,
        "chunk": f"2 x {objects[0].get_shape()[1]} layers x {args.tokens} tokens x {heads} heads x {dim}, bfloat16",
        "chunks": len(objects),
    }
    write_json(args.out, {"environment": environment, "rows": rows})


if __name__ == "__main__":
    main()
