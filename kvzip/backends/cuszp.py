# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The default codec: error-bounded quantisation with fixed-length or Rice codes, after cuSZp, made for KV pages.

The algorithm is that of cuSZp (Huang et al., SC'23) in outline: uniform quantisation to the bound, small groups with a
rate of their own, fixed-length codes, optional delta. What differs, and why, is in ``docs/reference/format.md``. The
work is done by the native library; this module checks arguments and hands whole batches over.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntFlag
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvzip import _native
from kvzip.backends.base import Bytes, Codec, EncodeRequest, Table
from kvzip.bounds import WITHIN_PAGES, BoundPolicy, differs_within_pages
from kvzip.record import ENTRY_DTYPE, Coding
from kvzip.types import BlockLayout, BlockView, BoundKind, ErrorBound

# Most tokens x heads of a page with bounds by token that the CUDA codec encodes.
GPU_VECTORS = 16384
GPU_RICE_VECTORS = 4096
_CODINGS = {"fixed": Coding.FIXED, "plain": Coding.PLAIN, "outlier": Coding.OUTLIER, "rice": Coding.RICE}


class CuszpCodec(Codec):
    """Error-bounded and lossless coding along tokens.

    Modes: ``fixed`` (each value by itself), ``plain`` (differences along the group), ``outlier`` (differences, the
    first value kept apart where that is smaller), all with fixed-length codes; ``rice`` (Rice codes of values or
    differences, whichever are smaller, and of exponents where every bit has to come back).
    """

    name: ClassVar[str] = "cuszp"
    modes: ClassVar[tuple[str, ...]] = tuple(_CODINGS)
    bound_kinds: ClassVar[frozenset[BoundKind]] = frozenset(BoundKind)

    def check_available(self) -> None:
        """Load the native library.

        Raises:
            BackendUnavailableError: it cannot be loaded.
        """
        _native.library()

    def default_mode(self, bound: ErrorBound | BoundPolicy) -> str:
        """``rice`` where bounds differ within pages, whose ratio it makes 9 to 14 % higher; else ``fixed``."""
        return "rice" if differs_within_pages(bound) else "fixed"

    def max_payload_bytes(self, layout: BlockLayout) -> int:
        """Most bytes of one block's payload: a page never takes more than its raw values."""
        return layout.padded_nbytes

    def encode_blocks(
        self, blocks: BlockView, request: EncodeRequest, out: Bytes
    ) -> tuple[Table, npt.NDArray[np.uint64]]:
        """Encode a batch; see `Codec.encode_blocks`.

        Raises:
            BackendUnavailableError: the native library cannot be loaded.
            NativeError: it reported a failure.
        """
        self.check_mode(request.mode)
        segments = _native.segments_array(blocks, request.bound, coding_of(request))
        return _native.cpu_encode(segments, blocks.block_ids, out, threads=request.threads)

    def validate_blocks(self, layout: BlockLayout, payloads: Sequence[Bytes], tables: Sequence[Table]) -> None:
        """Check classes, sizes and padding of every segment; see `Codec.validate_blocks`."""
        if payloads:
            _native.cpu_validate(_native.segments_array(layout), payloads, _stack(tables))

    def decode_blocks(
        self, blocks: BlockView, payloads: Sequence[Bytes], tables: Sequence[Table], *, threads: int = 0
    ) -> None:
        """Decode a batch; see `Codec.decode_blocks`."""
        if payloads:
            segments = _native.segments_array(blocks)
            _native.cpu_decode(segments, blocks.block_ids, payloads, _stack(tables), threads=threads)


class Extended(IntFlag):
    """What records may have beside pages with one bound each, in the codings but `rice` (``kvz_extended``).

    A GPU decodes each with kernels of its own.
    """

    NONE = 0
    RICE = 1  # pages in the Rice codings
    BOUNDS = 2  # pages with bounds by token or by channel


def extended_by(request: EncodeRequest) -> Extended:
    """What records of a request may have."""
    bounds = (request.bound,) if isinstance(request.bound, ErrorBound) else request.bound
    within = any(bound.kind in WITHIN_PAGES for bound in bounds)
    return (Extended.RICE if request.mode == "rice" else Extended.NONE) | (Extended.BOUNDS if within else Extended.NONE)


def encodes_on_gpu(request: EncodeRequest, layout: BlockLayout) -> bool:
    """Whether the CUDA codec has what a request asks for: all but bounds by token for very many of them."""
    each = (request.bound,) * len(layout.segments) if isinstance(request.bound, ErrorBound) else request.bound
    most = GPU_RICE_VECTORS if request.mode == "rice" else GPU_VECTORS
    return all(
        b.kind is not BoundKind.TOKEN_RMS or s.tokens * s.heads <= most
        for b, s in zip(each, layout.segments, strict=True)
    )


def coding_of(request: EncodeRequest) -> Coding | list[Coding]:
    """The coding that a request asks for, or one a page."""
    if not isinstance(request.bound, ErrorBound):
        return [_coding(bound, request.mode) for bound in request.bound]
    return _coding(request.bound, request.mode)


def _coding(bound: ErrorBound, mode: str) -> Coding:
    if bound.kind is BoundKind.LOSSLESS:
        return Coding.LOSSLESS_RICE if mode == "rice" else Coding.LOSSLESS
    return _CODINGS[mode]


def _stack(tables: Sequence[Table]) -> npt.NDArray[Any]:
    """Tables of a batch as one array, shape ``[blocks, pages]``."""
    return np.ascontiguousarray(tables, ENTRY_DTYPE)
