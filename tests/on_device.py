# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Run a codec for device tensors behind the interface of one for host tensors, so that `check_codec` can check it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvzip.backends.base import Bytes, Codec, EncodeRequest, Table
from kvzip.types import BlockLayout, BlockView


class OnDevice(Codec):
    """A codec whose blocks are copied to a device and back around every call.

    The whole span of memory that a tensor covers travels, gaps along its axes too, and comes back after a decode: what
    the codec writes beside its pages is seen.

    Args:
        codec: the codec under test.
        device: torch device that its tensors live on.
    """

    devices = ("cpu",)

    def __init__(self, codec: Codec, device: str) -> None:
        self.codec, self.device = codec, device
        self.name, self.modes, self.lossless_only = codec.name, codec.modes, codec.lossless_only  # type: ignore[misc]

    def _copy(self, view: BlockView, layout: BlockLayout) -> tuple[BlockView, list[tuple[Bytes, Any]]]:
        """The view on the device, and (host bytes, device bytes) of every tensor."""
        import torch

        types = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
        tensors, spans = [], []
        for t in view.tensors:
            bits: npt.NDArray[Any] = t
            size = sum((n - 1) * s for n, s in zip(bits.shape, bits.strides, strict=True)) + bits.itemsize
            host = np.frombuffer((ctypes.c_uint8 * size).from_address(bits.ctypes.data), np.uint8)
            moved = torch.from_numpy(host.copy()).to(self.device)
            empty = torch.empty(0, dtype=types[bits.itemsize], device=self.device)
            strides = tuple(s // bits.itemsize for s in bits.strides)
            tensors.append(empty.set_(moved.untyped_storage(), 0, bits.shape, strides))
            spans.append((host, moved))
        return BlockView(tensors, layout, view.block_ids), spans

    def max_payload_bytes(self, layout: BlockLayout) -> int:
        return self.codec.max_payload_bytes(layout)

    def encode_blocks(
        self, blocks: BlockView, request: EncodeRequest, out: Bytes
    ) -> tuple[Table, npt.NDArray[np.uint64]]:
        view, spans = self._copy(blocks, blocks.layout)
        result = self.codec.encode_blocks(view, request, out)
        for host, moved in spans:
            assert np.array_equal(moved.cpu().numpy(), host), "encode_blocks wrote to the pages"
        return result

    def validate_blocks(self, layout: BlockLayout, payloads: Sequence[Bytes], tables: Sequence[Table]) -> None:
        self.codec.validate_blocks(layout, payloads, tables)

    def decode_blocks(
        self, blocks: BlockView, payloads: Sequence[Bytes], tables: Sequence[Table], *, threads: int = 0
    ) -> None:
        view, spans = self._copy(blocks, blocks.layout)
        try:
            self.codec.decode_blocks(view, payloads, tables, threads=threads)
        finally:
            for host, moved in spans:
                host[:] = moved.cpu().numpy()
