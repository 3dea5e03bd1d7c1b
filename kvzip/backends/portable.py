# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Blocks on a GPU that the CUDA part of the native library does not reach: Triton where it can, else the host codec.

The bytes are the same whichever of them codes. `device_codec` says which it is here and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvzip import _cuda
from kvzip.backends import triton
from kvzip.backends.base import Bytes, Codec, EncodeRequest, Table
from kvzip.errors import BackendUnavailableError
from kvzip.interop.torch import download, gpu_problem, to_device, to_host, upload
from kvzip.record import ALIGNMENT, ENTRY_DTYPE, Coding
from kvzip.types import BlockLayout, BlockView, BoundKind, DType, ErrorBound, empty_view

_TRITON_CODINGS = (Coding.RAW, Coding.CONSTANT, Coding.FIXED, Coding.LOSSLESS)
_TRITON_DTYPES = (DType.BFLOAT16, DType.FLOAT16)


@dataclass(frozen=True)
class DeviceCodec:
    """What codes blocks on a GPU here.

    Attributes:
        name: ``"cuda"`` (kernels of the native library), ``"triton"``, ``"host"`` (pages are copied to the host and
            coded there) or ``"none"`` (GPUs cannot be used).
        reason: why it is this one; for ``"none"`` also what to do.
    """

    name: str
    reason: str


def device_codec() -> DeviceCodec:
    """What codes blocks on a GPU here, and why. Imports torch and Triton where the native library has no GPU."""
    reason = _cuda.unavailable()
    if not reason:
        return DeviceCodec("cuda", "the native library was built with CUDA and finds a GPU")
    problem = gpu_problem()
    if problem:
        return DeviceCodec("none", f"{reason}; {problem}")
    usable, detail = triton.available()
    if usable and not triton.interpreted():
        return DeviceCodec("triton", f"{detail}; {reason}")
    return DeviceCodec("host", f"{reason}; Triton cannot take its place: {detail}")


def codec_for(codec: Codec, device: str) -> Codec:
    """The codec itself where it works on a device; for a GPU else one that brings the pages to it, the same bytes.

    Args:
        codec: a codec.
        device: such as ``"cpu"`` or ``"cuda:0"``.

    Raises:
        BackendUnavailableError: the device is a GPU, and nothing here reaches it.
    """
    if not device.startswith("cuda") or "cuda" in codec.devices:
        return codec
    choice = device_codec()
    if choice.name == "none":
        raise BackendUnavailableError(f"tensors on {device} cannot be coded: {choice.reason}")
    return PortableCodec(codec, use_triton=choice.name == "triton")


class PortableCodec(Codec):
    """A host codec for torch tensors on a GPU as well. Calls block the host and run on torch's current stream.

    Args:
        codec: what codes pages in host memory, and stands in the records.
        use_triton: code pages on the device with Triton where it has their coding and dtype.
        kind: kind of device whose pages Triton takes; ``"cpu"`` with its interpreter.

    Attributes:
        blocks: blocks encoded and decoded for tensors of that kind, by what coded them: ``"triton"`` or ``"host"``.
    """

    devices = ("cpu", "cuda")

    def __init__(self, codec: Codec, *, use_triton: bool, kind: str = "cuda") -> None:
        self.name, self.modes = codec.name, codec.modes  # type: ignore[misc]  # of the class for all other codecs
        self.lossless_only = codec.lossless_only  # type: ignore[misc]
        self.bound_kinds = codec.bound_kinds  # type: ignore[misc]
        self.blocks: Counter[str] = Counter()
        self._host = codec
        self._triton = use_triton and codec.name == "cuszp"
        self._kind = kind

    def check_available(self) -> None:
        """See `Codec.check_available`."""
        self._host.check_available()

    def max_payload_bytes(self, layout: BlockLayout) -> int:
        """As the host codec says."""
        return self._host.max_payload_bytes(layout)

    def encode_blocks(
        self, blocks: BlockView, request: EncodeRequest, out: Bytes
    ) -> tuple[Table, npt.NDArray[np.uint64]]:
        """Encode a batch; see `Codec.encode_blocks`."""
        self.check_mode(request.mode)
        bounds = {request.bound} if isinstance(request.bound, ErrorBound) else set(request.bound)
        known = request.mode != "rice" and all(
            b.kind is BoundKind.LOSSLESS or (request.mode == "fixed" and b.kind in triton.BOUND_KINDS) for b in bounds
        )
        if not (self._triton_takes(blocks) and known):
            self._count("host", blocks)
            return self._host.encode_blocks(blocks if blocks.device == "cpu" else to_host(blocks), request, out)
        self._count("triton", blocks)
        encoded = triton.encode_blocks(blocks, request.bound)
        sizes = download(encoded.payload_bytes)
        tables = download(encoded.table).view(ENTRY_DTYPE)[..., 0]
        payload = download(encoded.payload[: int(sizes.sum())])  # they follow each other
        for row, end, size in zip(out, np.cumsum(sizes).tolist(), sizes.tolist(), strict=True):
            row[:size] = payload[end - size : end]
        return tables, sizes.astype(np.uint64)

    def validate_blocks(self, layout: BlockLayout, payloads: Sequence[Bytes], tables: Sequence[Table]) -> None:
        """Check on the host; see `Codec.validate_blocks`."""
        self._host.validate_blocks(layout, payloads, tables)

    def decode_blocks(
        self, blocks: BlockView, payloads: Sequence[Bytes], tables: Sequence[Table], *, threads: int = 0
    ) -> None:
        """Decode a batch; see `Codec.decode_blocks`."""
        if not payloads:
            return
        table = np.ascontiguousarray(tables, ENTRY_DTYPE)
        sizes = np.array([p.size for p in payloads], np.int64)
        known = np.isin(table["coding"], _TRITON_CODINGS).all() and not (sizes % ALIGNMENT).any()
        if known and self._triton_takes(blocks):
            self._count("triton", blocks)
            entries = np.ascontiguousarray(table[..., None]).view(np.uint8)
            arguments = (np.concatenate(payloads), np.cumsum(sizes) - sizes, sizes, entries)
            status = triton.decode_blocks(blocks, *(upload(a, blocks.device) for a in arguments))
            triton.check_status(status)
            return
        self._count("host", blocks)
        pages = blocks
        if blocks.device != "cpu":
            pages = empty_view(blocks.layout, len(blocks))
            pages = pages.with_bounds(blocks.bounds) if blocks.bounds else pages
        self._host.decode_blocks(pages, payloads, tables, threads=threads)
        if pages is not blocks:
            to_device(pages, blocks)

    def _triton_takes(self, blocks: BlockView) -> bool:
        """Whether blocks lie where Triton runs, in values that its kernels read."""
        return (
            self._triton
            and blocks.device.startswith(self._kind)
            and all(
                s.dtype in _TRITON_DTYPES
                and not (blocks.address(s.tensor) | blocks.block_stride_bytes(s.tensor)) % 2
                and not (s.offset_bytes | s.token_stride_bytes | s.head_stride_bytes) % 2
                for s in blocks.layout.segments
            )
        )

    def _count(self, coder: str, blocks: BlockView) -> None:
        if blocks.device.startswith(self._kind):
            self.blocks[coder] += len(blocks)
