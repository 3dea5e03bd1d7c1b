# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The codec of last resort: the values as they are. It needs NumPy alone, not the native library."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy.typing as npt

from kvzip.backends.base import EncodeRequest, PageCodec
from kvzip.record import Reason
from kvzip.types import DType


class RawCodec(PageCodec):
    """Store every page as it is, in the order tokens, heads, head_dim."""

    name: ClassVar[str] = "raw"
    lossless_only: ClassVar[bool] = True
    _ENCODED: ClassVar[int] = 0

    def encode_page(self, values: npt.NDArray[Any], dtype: DType, request: EncodeRequest) -> bytes | None:
        """Return None: stored raw is what is asked for."""
        return None

    def decode_page(self, data: bytes, dtype: DType, shape: tuple[int, int]) -> npt.NDArray[Any]:
        """Never called: every page is raw."""
        raise AssertionError("a raw page needs no decoder")

    def _reason(self, reason: Reason) -> Reason:
        return Reason.AS_ASKED
