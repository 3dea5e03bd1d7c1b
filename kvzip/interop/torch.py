# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What the core asks of torch. Torch is only looked at when the process has imported it already."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from kvzip.errors import ConfigError
from kvzip.types import DType


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


def copy_to(bits: npt.NDArray[Any], device: str) -> Any:
    """Copy bit patterns to a device.

    Args:
        bits: unsigned bit patterns.
        device: ``"cpu"``, or a torch device.

    Returns:
        A NumPy array, or on other devices a torch tensor of signed integers of the same size.
    """
    if device == "cpu":
        return bits.copy()
    import torch

    return torch.from_numpy(bits.view(bits.dtype.str.replace("u", "i"))).to(device)


def host_bits(tensor: Any, dtype: DType) -> npt.NDArray[Any]:
    """Bit patterns of what `copy_to` made, in host memory.

    Args:
        tensor: a NumPy array or a torch tensor.
        dtype: what the patterns mean.
    """
    array: npt.NDArray[Any] = tensor if isinstance(tensor, np.ndarray) else tensor.cpu().numpy()
    return array.view(dtype.numpy_bits)
