# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The codec of last resort: the values as they are. It needs NumPy alone, not the native library."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvzip.backends.base import Bytes, EncodeRequest, PageCodec, Table
from kvzip.record import ALIGNMENT, ENTRY_DTYPE, KINDS, Coding, Reason, align
from kvzip.types import BlockView, DType


class RawCodec(PageCodec):
    """Store every page as it is, in the order tokens, heads, head_dim."""

    name: ClassVar[str] = "raw"
    lossless_only: ClassVar[bool] = True
    _ENCODED: ClassVar[int] = 0

    def encode_blocks(
        self, blocks: BlockView, request: EncodeRequest, out: Bytes
    ) -> tuple[Table, npt.NDArray[np.uint64]]:
        """Copy every page to its place; see `Codec.encode_blocks`."""
        segments = blocks.layout.segments
        table = np.zeros(len(segments), ENTRY_DTYPE)
        at = 0
        for s, segment in enumerate(segments):
            kind = KINDS.index(segment.kind)
            table[s] = (at // ALIGNMENT, segment.nbytes, 0.0, Coding.RAW, kind, 0, Reason.AS_ASKED)
            start, end, at = at, at + segment.nbytes, at + align(segment.nbytes)
            for b in range(len(blocks)):
                page = blocks.page(b, s)
                out[b, start:end].view(page.dtype).reshape(page.shape)[...] = page
                out[b, end:at] = 0
        return np.tile(table, (len(blocks), 1)), np.full(len(blocks), at, np.uint64)

    def encode_page(self, values: npt.NDArray[Any], dtype: DType, request: EncodeRequest) -> bytes | None:
        """Return None: stored raw is what is asked for."""
        return None

    def decode_page(self, data: bytes, dtype: DType, shape: tuple[int, int]) -> npt.NDArray[Any]:
        """Never called: every page is raw."""
        raise AssertionError("a raw page needs no decoder")
