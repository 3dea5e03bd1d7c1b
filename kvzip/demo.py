# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The main job, end to end: paged KV tensors stored compressed, overwritten, loaded elsewhere, every value verified."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvzip.backends.portable import device_codec
from kvzip.backends.registry import get_codec
from kvzip.bounds import BoundPolicy
from kvzip.coding import compare_blocks, max_record_bytes
from kvzip.engine import SwapEngine
from kvzip.errors import BackendUnavailableError, ConfigError
from kvzip.interop.torch import copy_to, host_bits
from kvzip.memory import memory_for
from kvzip.pool import HostPool
from kvzip.types import BlockLayout, BlockView, DType, ErrorBound

_BATCH = 64  # blocks of one store
_MOST_BLOCK_TOKENS = 1 << 20
_POISON = 37  # not a value of any cache, and no fill that memory comes with


@dataclass(frozen=True)
class DemoResult:
    """Outcome of a demo; the names are those of ``kvzip demo --json``."""

    raw_bytes: int
    stored_bytes: int
    ratio: float
    blocks: int
    evicted: int
    codec: str
    mode: str
    device: str
    bound: str
    max_error: float
    max_error_over_bound: float
    violations: int
    store_gb_per_s: float
    load_gb_per_s: float
    pool_payload_fraction: float

    def as_dict(self) -> dict[str, Any]:
        """The result as plain types."""
        return asdict(self)


def read_input(path: Path | None) -> tuple[npt.NDArray[Any], DType]:
    """Read a KV cache.

    Args:
        path: a ``.npy`` file of shape ``[layers, 2, tokens, kv_heads, head_dim]``, uint16 (bit patterns of bfloat16),
            float16 or float32; None takes the sample that ships with kvzip.

    Raises:
        ConfigError: the file cannot be used.
    """
    if path is None:
        with resources.as_file(resources.files("kvzip") / "data" / "smollm2_sample.npy") as sample:
            return np.load(sample), DType.BFLOAT16
    try:
        data = np.load(path, allow_pickle=False)
    except Exception as error:  # NumPy raises many kinds for files that are not its own (BadZipFile, MemoryError, ...)
        raise ConfigError(f"cannot read {path}: {error}; give a file that numpy.save wrote") from error
    if not isinstance(data, np.ndarray) or data.ndim != 5 or data.shape[1] != 2 or 0 in data.shape:
        shape = getattr(data, "shape", "of several arrays")
        raise ConfigError(f"{path} has shape {shape}: give [layers, 2, tokens, kv_heads, head_dim], none of them 0")
    dtypes = {"uint16": DType.BFLOAT16, "bfloat16": DType.BFLOAT16, "float16": DType.FLOAT16, "float32": DType.FLOAT32}
    if data.dtype.name not in dtypes:
        raise ConfigError(f"{path} holds {data.dtype}: give uint16 (bit patterns of bfloat16), float16 or float32")
    dtype = dtypes[data.dtype.name]
    data = data.astype(data.dtype.newbyteorder("<"), order="C", copy=False)  # the file may be big-endian
    return data.view(dtype.numpy_bits), dtype


def paged(cache: npt.NDArray[Any], block_tokens: int) -> list[npt.NDArray[Any]]:
    """Lay a cache out as a paged KV cache, one tensor a layer; a last, partial block is filled up with zeros.

    Args:
        cache: shape ``[layers, 2, tokens, kv_heads, head_dim]``.
        block_tokens: tokens of one block.

    Returns:
        Tensors of shape ``[blocks, 2, block_tokens, kv_heads, head_dim]``.

    Raises:
        ConfigError: no block can have so many tokens.
    """
    if not 1 <= block_tokens <= _MOST_BLOCK_TOKENS:
        raise ConfigError(f"block of {block_tokens} tokens: use 1 to {_MOST_BLOCK_TOKENS}, 16 is usual")
    layers, two, tokens, heads, head_dim = cache.shape
    blocks = -(-tokens // block_tokens)
    padded = np.zeros((layers, two, blocks * block_tokens, heads, head_dim), cache.dtype)
    padded[:, :, :tokens] = cache
    split = padded.reshape(layers, two, blocks, block_tokens, heads, head_dim)
    return [np.ascontiguousarray(layer.swapaxes(0, 1)) for layer in split]


def choose_device(wanted: str) -> str:
    """Where the pages of ``kvzip demo`` and ``kvzip bench`` lie.

    Args:
        wanted: ``"auto"``, ``"cpu"`` or ``"cuda"``.

    Raises:
        ConfigError: it is none of these.
        BackendUnavailableError: ``"cuda"`` was asked for and cannot be used; the message says why.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device {wanted!r}: use auto, cpu or cuda")
    if wanted == "cpu":
        return wanted
    choice = device_codec()
    reason = choice.reason if choice.name == "none" else ""
    if not reason and importlib.util.find_spec("torch") is None:
        reason = "pages on a GPU are torch tensors here: pip install 'kvzip[torch]'"
    if reason and wanted == "cuda":
        raise BackendUnavailableError(f"there is no GPU that can be used: {reason}")
    return "cpu" if reason else "cuda"


def measure_ratio(
    path: Path | None = None, *, bound: ErrorBound | BoundPolicy | None = None, mode: str | None = None
) -> float:
    """Raw bytes of a KV cache over the bytes of its records, as ``kvzip plan`` needs it.

    Args:
        path: see `read_input`.
        bound: error bound; None takes the engine's default.
        mode: encoding mode; None takes the engine's default.

    Raises:
        ConfigError: an argument or the input cannot be used.
    """
    cache, dtype = read_input(path)
    view = BlockView(paged(cache, 16), "2NHD", dtype=dtype)
    capacity = len(view) * (max_record_bytes(get_codec("cuszp"), view.layout) + 4096)
    with SwapEngine(capacity, bound=bound, mode=mode) as engine:
        engine.store([b"%d" % i for i in range(len(view))], view)
        return engine.stats().ratio


def run(
    path: Path | None = None,
    *,
    bound: ErrorBound | BoundPolicy | None = None,
    codec: str = "cuszp",
    mode: str | None = None,
    block_tokens: int = 16,
    budget_bytes: int | None = None,
    device: str = "auto",
    threads: int = 0,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> DemoResult:
    """Run the main job on a KV cache.

    Args:
        path: see `read_input`.
        bound: error bound; None takes the engine's default.
        codec: name of the codec.
        mode: encoding mode; None takes the engine's default.
        block_tokens: tokens of one block.
        budget_bytes: bytes of the host pool; None makes it large enough for everything.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``, which takes the GPU when there is one that can be used.
        threads: most host threads; 0 = all cores.
        progress: called with the stage, the blocks done and the blocks in all.

    Raises:
        ConfigError: an argument or the input cannot be used.
        BackendUnavailableError: there is no such device, or nothing runs on it.
        PoolExhaustedError: the budget cannot hold even one batch of a single block.
    """
    device = choose_device(device)
    cache, dtype = read_input(path)
    before = paged(cache, block_tokens)
    pages = [copy_to(layer, device) for layer in before]
    layout = BlockLayout.from_tensors(pages, "2NHD", dtype=dtype)
    view = BlockView(pages, layout)
    count = len(view)
    keys = [f"block-{i}".encode() for i in range(count)]

    if budget_bytes is None:
        with SwapEngine(1 << 20, codec=codec, mode=mode) as probe:
            budget_bytes = (count + 1) * (max_record_bytes(probe.settings.codec, layout) + 4096)
    with (
        HostPool(budget_bytes, resource=memory_for(device)) as pool,
        SwapEngine(pool, codec=codec, bound=bound, mode=mode, threads=threads) as engine,
    ):
        batch = max(1, min(_BATCH, budget_bytes // 4 // layout.nbytes))
        # What the first call alone costs (loading the library, staging memory) is not the transfers' speed.
        engine.store([b"warm-up"], view[[0]]).wait()
        engine.load([b"warm-up"], BlockView([copy_to(layer[:1], device) for layer in before], layout)).wait()
        engine.discard([b"warm-up"])
        store_seconds = load_seconds = 0.0
        for first in range(0, count, batch):
            last = min(first + batch, count)
            store_seconds += engine.store(keys[first:last], view[range(first, last)]).result().seconds
            progress("store", last, count)
        stats = engine.stats()

        for layer in pages:
            layer[...] = _POISON
        held = [i for i in range(count) if engine.contains(keys[i])]
        held.reverse()  # another order, into other block numbers
        target = np.array([(i + 1) % count for i in held], np.int64)
        for first in range(0, len(held), batch):
            chosen = held[first : first + batch]
            result = engine.load([keys[i] for i in chosen], view[target[first : first + batch]]).result()
            load_seconds += result.seconds
            progress("load", first + len(chosen), len(held))

        bound = engine.settings.bound
        came_back = BlockView([host_bits(page, dtype) for page in pages], layout)
        found = compare_blocks(
            BlockView(before, layout)[held], came_back[target], bound, lambda done: progress("verify", done, len(held))
        )
        loaded_bytes = len(held) * layout.nbytes
        return DemoResult(
            raw_bytes=stats.raw_bytes,
            stored_bytes=stats.record_bytes,
            ratio=stats.ratio,
            blocks=count,
            evicted=stats.evicted_blocks,
            codec=engine.settings.codec.name,
            mode=engine.settings.mode,
            device=device,
            bound=str(bound).removeprefix("rel:"),
            max_error=found.max_error,
            max_error_over_bound=found.over_bound,
            violations=found.violations,
            store_gb_per_s=count * layout.nbytes / store_seconds / 1e9,
            load_gb_per_s=loaded_bytes / load_seconds / 1e9,
            pool_payload_fraction=stats.pool.payload_bytes / max(1, stats.pool.extent_bytes_used),
        )
