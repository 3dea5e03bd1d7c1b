# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The codec `cuszp` in Triton: the portable path for GPUs on which the CUDA library is missing.

Same bytes as every other implementation of docs/reference/format.md, for mode ``fixed`` and lossless bounds, bfloat16
and float16. Nothing here imports Triton or torch before the first call.
"""

from kvzip.backends.triton.codec import (
    BOUND_KINDS,
    EncodedBlocks,
    available,
    check_status,
    decode_blocks,
    encode_blocks,
    interpreted,
    max_payload_bytes,
)

__all__ = [
    "BOUND_KINDS",
    "EncodedBlocks",
    "available",
    "check_status",
    "decode_blocks",
    "encode_blocks",
    "interpreted",
    "max_payload_bytes",
]
