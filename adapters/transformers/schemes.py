# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Ways to keep a KV cache in fewer bytes: kvzip's own through its engine, and what others do, to compare with.

Each takes the keys and values of a prefix and returns what a model would find after a swap, with the bytes that the
swapped cache takes. The peers are short renderings of what their names stand for, in torch, without packing: their
bytes are counted as their formats would have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvzip.adapters.transformers.models import LayerKV, require
from kvzip.bounds import BoundPolicy
from kvzip.calibration import CalibrationTable
from kvzip.coding import max_record_bytes
from kvzip.engine import SwapEngine
from kvzip.errors import ConfigError
from kvzip.pool import HostPool
from kvzip.types import BlockLayout, BlockView, ErrorBound

#: Keys and values after the swap, and the bytes of the swapped cache.
Swapped = tuple[list[LayerKV], int]


@dataclass(frozen=True)
class Scheme:
    """A way to keep a cache.

    Attributes:
        name: what tables call it.
        swap: takes the layers' keys and values, bfloat16 or float16, in host memory.
        own: whether it is kvzip's.
        note: what it does, for readers of a table.
    """

    name: str
    swap: Callable[[Sequence[LayerKV]], Swapped]
    own: bool = False
    note: str = ""


# ---- kvzip


@dataclass(frozen=True)
class EngineSwap:
    """Stores the blocks of a prefix in a `SwapEngine` and loads them elsewhere; counts the pool's extents.

    Attributes:
        options: keyword arguments of the engine: bound, mode, codec.
        block_tokens: tokens of a block.
        protect: mark the first block as the start of a sequence.
    """

    options: dict[str, Any] = field(default_factory=dict)
    block_tokens: int = 16
    protect: bool = True

    def __call__(self, layers: Sequence[LayerKV]) -> Swapped:
        """Swap a cache; `Scheme.swap`."""
        (torch,) = require("torch")
        tokens = layers[0][0].shape[0]
        if tokens % self.block_tokens:
            raise ConfigError(
                f"{tokens} tokens are no multiple of blocks of {self.block_tokens}: choose another prefix"
            )
        pages = [t.reshape(-1, self.block_tokens, *t.shape[1:]).contiguous() for pair in layers for t in pair]
        layout = BlockLayout.from_tensors(pages, "NHD", kinds="kv")
        view = BlockView(pages, layout)
        keys = [str(i).encode() for i in range(len(view))]
        marks = [self.protect and i == 0 for i in range(len(view))]
        with SwapEngine(1 << 20, **self.options) as probe:
            room = len(view) * (max_record_bytes(probe.settings.codec, layout) + 4096)
        with HostPool(room) as pool, SwapEngine(pool, **self.options) as engine:
            engine.store(keys, view, sink=marks).wait()
            after = [torch.empty_like(page) for page in pages]
            engine.load(keys, BlockView(after, layout)).wait()
            nbytes = pool.stats().extent_bytes_used
        flat = [page.reshape(tokens, *page.shape[2:]) for page in after]
        return list(zip(flat[::2], flat[1::2], strict=True)), nbytes


def engine_scheme(
    name: str,
    bound: ErrorBound | BoundPolicy | None = None,
    *,
    mode: str | None = None,
    block_tokens: int = 16,
    protect: bool = True,
) -> Scheme:
    """One of kvzip's own schemes; a bound of None is the engine's default."""
    options: dict[str, Any] = {} if bound is None else {"bound": bound}
    if mode is not None:
        options["mode"] = mode
    note = f"{bound or 'default bounds'}, {mode or 'default mode'}"
    return Scheme(name, EngineSwap(options, block_tokens, protect), own=True, note=note)


def calibrated(
    table: CalibrationTable, t: float, r: float, mode: str | None = None, *, name: str = "calibrated"
) -> Scheme:
    """Keys bounded by their effect on attention, values by the rms of their token."""
    return engine_scheme(f"{name} t={t:g} r={r:g}{f' {mode}' if mode else ''}", table.policy(t, r), mode=mode)


# ---- peers


def peers() -> list[Scheme]:
    """What other systems do, the gate's fp8 first."""
    return [
        Scheme(
            "fp8", _each(_fp8_scaled), note="e4m3, K and V of a layer scaled by their largest value (static scales)"
        ),
        Scheme("fp8 unscaled", _each(_fp8), note="e4m3 with scale 1, vLLM's default without scales in the checkpoint"),
        Scheme("int8", _each(_int8), note="symmetric, a float16 scale for each token and head"),
        Scheme(
            "KIVI-4", _kivi, note="4 bits, K per channel in groups of 32 tokens, V per token in groups of 32 channels"
        ),
    ]


def _each(code: Callable[[Any], tuple[Any, int]]) -> Callable[[Sequence[LayerKV]], Swapped]:
    """A scheme that treats every K and V of a layer alike."""

    def swap(layers: Sequence[LayerKV]) -> Swapped:
        done = [[code(t) for t in pair] for pair in layers]
        return [(k, v) for (k, _), (v, _) in done], sum(nbytes for pair in done for _, nbytes in pair)

    return swap


def _fp8(x: Any) -> tuple[Any, int]:
    (torch,) = require("torch")
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype), x.numel()


def _fp8_scaled(x: Any) -> tuple[Any, int]:
    (torch,) = require("torch")
    scale = x.float().abs().amax() / 448
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype), x.numel() + 4


def _int8(x: Any) -> tuple[Any, int]:
    scale = (x.float().abs().amax(-1, keepdim=True) / 127).half().float().clamp(min=6e-8)
    return ((x.float() / scale).round().clamp(-127, 127) * scale).to(x.dtype), x.numel() + 2 * scale.numel()


def _kivi(layers: Sequence[LayerKV]) -> Swapped:
    """KIVI (Liu et al., 2024) at 4 bits, without its window of recent tokens: all of a swapped prefix is coded."""
    out: list[LayerKV] = []
    nbytes = 0
    for k, v in layers:
        tokens, channels = k.shape[0], v.shape[2]
        keys, key_bytes = _four_bits(k.float(), 0, 32 if tokens % 32 == 0 else tokens)
        values, value_bytes = _four_bits(v.float(), 2, 32 if channels % 32 == 0 else channels)
        out.append((keys.to(k.dtype), values.to(v.dtype)))
        nbytes += key_bytes + value_bytes
    return out, nbytes


def _four_bits(x: Any, axis: int, group: int) -> tuple[Any, int]:
    """Asymmetric 4-bit codes along an axis, with a float16 minimum and step for each group."""
    grouped = x.unflatten(axis, (-1, group))
    low = grouped.amin(axis + 1, keepdim=True)
    step = ((grouped.amax(axis + 1, keepdim=True) - low) / 15).half().float().clamp(min=6e-8)
    low = low.half().float()
    codes = ((grouped - low) / step).round().clamp(0, 15)
    return (codes * step + low).flatten(axis, axis + 1), x.numel() // 2 + 4 * step.numel()
