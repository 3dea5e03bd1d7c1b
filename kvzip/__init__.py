# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Compressed KV-cache swap: store KV blocks in host memory at a fraction of their size, within a stated error bound.

``SwapEngine`` moves blocks, ``encode`` and ``decode`` handle single tensors. Importing kvzip starts nothing: no
threads, no CUDA context, no native library.
"""

from kvzip.backends.base import Codec
from kvzip.backends.registry import get_codec, register_codec
from kvzip.bounds import BoundPolicy
from kvzip.calibration import CalibrationTable
from kvzip.coding import decode, encode
from kvzip.engine import SwapEngine
from kvzip.errors import (
    BackendUnavailableError,
    BlockNotFoundError,
    CodecNotFoundError,
    ConfigError,
    CorruptRecordError,
    CudaError,
    FormatError,
    FormatVersionError,
    KvzipError,
    LayoutError,
    NativeError,
    PoolExhaustedError,
    TransferError,
)
from kvzip.info import system_info
from kvzip.pool import HostPool
from kvzip.record import read_header
from kvzip.transfer import Transfer
from kvzip.types import BlockLayout, BlockView, ErrorBound

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "BlockLayout",
    "BlockNotFoundError",
    "BlockView",
    "BoundPolicy",
    "CalibrationTable",
    "Codec",
    "CodecNotFoundError",
    "ConfigError",
    "CorruptRecordError",
    "CudaError",
    "ErrorBound",
    "FormatError",
    "FormatVersionError",
    "HostPool",
    "KvzipError",
    "LayoutError",
    "NativeError",
    "PoolExhaustedError",
    "SwapEngine",
    "Transfer",
    "TransferError",
    "decode",
    "encode",
    "get_codec",
    "read_header",
    "register_codec",
    "system_info",
]
