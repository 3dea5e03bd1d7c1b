# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What the core asks of torch. Torch is only looked at when the process has imported it already."""

from __future__ import annotations

import sys

from kvzip.errors import ConfigError


def stream_handle(stream: object, device: int) -> int:
    """The CUDA stream handle that a caller means.

    Args:
        stream: a handle (``cudaStream_t`` as an integer), anything with an attribute ``cuda_stream`` such as
            ``torch.cuda.Stream``, or None: torch's current stream on the device, or CUDA's default stream without
            torch.
        device: index of the GPU.

    Raises:
        ConfigError: it is none of these.
    """
    if stream is None:
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return 0
        return int(torch.cuda.current_stream(device).cuda_stream)
    handle = getattr(stream, "cuda_stream", stream)
    if not isinstance(handle, int):
        raise ConfigError(f"stream {stream!r} is no CUDA stream: pass torch.cuda.Stream, a handle, or None")
    return handle
