# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What the core asks of torch: streams, copies of pages, and the CUDA functions that only torch has here.

Nothing imports torch before it is needed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from kvzip.errors import ConfigError
from kvzip.types import BlockView, DType, SegmentLayout, empty_view


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
    if type(stream) is int:
        return stream
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


# ---- a GPU that the native library does not reach --------------------------------------------------------------------


def gpu_problem() -> str:
    """Why torch cannot use a GPU, as a clause that says what to do; ``""`` when it can. Imports torch."""
    if find_spec("torch") is None:
        return "torch is not installed (pip install 'kvzip[torch]')"
    try:
        import torch

        found = torch.cuda.is_available()
    except Exception as error:  # a broken installation is a reason, not a failure of the caller
        return f"torch cannot be used ({type(error).__name__}: {error})"
    return "" if found else "torch finds no GPU (install a CUDA build of torch, and see whether nvidia-smi works)"


def page_view(blocks: BlockView, segment: SegmentLayout) -> Any:
    """One page of every block of a torch tensor, without a copy, in the widest integers that fit.

    Args:
        blocks: the blocks; their numbers do not matter.
        segment: the page, one of the layout's segments.

    Returns:
        A tensor of shape ``[blocks, tokens, heads, head_dim * itemsize / width]``.
    """
    import torch

    tensor = blocks.tensors[segment.tensor]
    storage = tensor.untyped_storage()
    start = tensor.data_ptr() - storage.data_ptr() + segment.offset_bytes
    line = segment.head_dim * segment.dtype.itemsize
    block = blocks.block_stride_bytes(segment.tensor)
    strides = (block, segment.token_stride_bytes, segment.head_stride_bytes)
    width = math.gcd(8, storage.data_ptr(), start, line, *strides)
    types = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    shape = (blocks.num_blocks, segment.tokens, segment.heads, line // width)
    view = torch.empty(0, dtype=types[width], device=tensor.device)
    return view.set_(storage, start // width, shape, (*(n // width for n in strides), 1))


def to_host(blocks: BlockView) -> BlockView:
    """A copy of blocks of torch tensors in host memory, in the order of the view. Blocks the host.

    Runs on torch's current stream of the tensors' device.
    """
    copy = empty_view(blocks.layout, len(blocks))
    for page, ids, host in _pages(blocks, copy):
        host.copy_(page.index_select(0, ids))
    return copy


def to_device(pages: BlockView, blocks: BlockView) -> None:
    """Write what `to_host` made, or a view like it, into blocks of torch tensors; the reverse of `to_host`."""
    for page, ids, host in _pages(blocks, pages):
        page.index_copy_(0, ids, host.to(page.device))


def _pages(blocks: BlockView, copy: BlockView) -> Iterator[tuple[Any, Any, Any]]:
    """For each page of a block: its tensor, the numbers of the blocks there, and its place in the host copy."""
    import torch

    for segment, array in zip(blocks.layout.segments, copy.tensors, strict=True):
        page = page_view(blocks, segment)
        ids = torch.from_numpy(blocks.block_ids.copy()).to(page.device)
        rows = torch.from_numpy(array.view(np.uint8).reshape(-1))
        yield page, ids, rows.view(page.dtype).view(len(blocks), *page.shape[1:])


def download(tensor: Any) -> npt.NDArray[Any]:
    """The values of a tensor in host memory, by way of pinned memory where it lies on a GPU. Blocks the host."""
    import torch

    if tensor.device.type == "cpu":
        own: npt.NDArray[Any] = tensor.numpy()
        return own
    staging = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    staging.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    array: npt.NDArray[Any] = staging.numpy()
    return array


def upload(array: npt.NDArray[Any], device: str) -> Any:
    """A copy of a contiguous array as a tensor on a device, in the order of torch's current stream."""
    import torch

    tensor = torch.from_numpy(array)
    return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def device_bytes(nbytes: int, device: str) -> Any:
    """A uint8 tensor of zeros on a device, in the order of torch's current stream."""
    import torch

    return torch.zeros(nbytes, dtype=torch.uint8, device=device)


def record_event(stream: object, device: int) -> Any:
    """A torch event at the end of a caller's stream; `stream` as in `stream_handle`."""
    import torch

    handle = stream_handle(stream, device)
    source = torch.cuda.ExternalStream(handle, device) if handle else torch.cuda.default_stream(device)
    event = torch.cuda.Event(blocking=True)
    event.record(source)
    return event


class Lane:
    """A CUDA stream of its own for the work of one thread.

    Args:
        device: index of the GPU.
    """

    def __init__(self, device: int) -> None:
        import torch

        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def behind(self, event: Any) -> Iterator[None]:
        """Make device and stream the thread's current ones, behind an event; at the end wait for the stream."""
        import torch

        with torch.cuda.stream(self._stream):
            self._stream.wait_event(event)
            try:
                yield
            finally:
                self._stream.synchronize()


def host_register(address: int, nbytes: int) -> int:
    """Pin host memory for all devices; returns a status of kvz.h. Blocks the host."""
    import torch

    portable = 1  # cudaHostRegisterPortable
    return _status(torch.cuda.cudart().cudaHostRegister(address, nbytes, portable))


def host_unregister(address: int) -> int:
    """Undo `host_register`; returns a status of kvz.h. Blocks the host."""
    import torch

    return _status(torch.cuda.cudart().cudaHostUnregister(address))


def _status(code: Any) -> int:
    ok, cuda_error = 0, 6  # KVZ_OK and KVZ_CUDA_ERROR of csrc/cuszp/kvz.h
    return cuda_error if int(code) else ok


def describe_gpu() -> dict[str, Any]:
    """The current GPU and the versions that figures depend on."""
    import torch

    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": device.name,
        "gpu_memory_bytes": device.total_memory,
        "multiprocessors": device.multi_processor_count,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


class LinkCopy:
    """Plain copies between a GPU and pinned memory: the limit of the link.

    Args:
        nbytes: most bytes of a copy.
        device: the GPU.
    """

    def __init__(self, nbytes: int, device: str) -> None:
        import torch

        self._device = torch.empty(nbytes, dtype=torch.uint8, device=device).random_()
        self._host = self._device.cpu().pin_memory()
        self._stream = torch.cuda.current_stream()

    def out(self, nbytes: int) -> int:
        """Copy so many bytes to the host; returns their number. Blocks the host."""
        self._host[:nbytes].copy_(self._device[:nbytes], non_blocking=True)
        self._stream.synchronize()
        return nbytes

    def into(self, nbytes: int) -> int:
        """The reverse of `out`."""
        self._device[:nbytes].copy_(self._host[:nbytes], non_blocking=True)
        self._stream.synchronize()
        return nbytes
