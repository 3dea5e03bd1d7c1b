# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The native codecs for torch tensors on a GPU, by the kernels of the native library: one batch, and the host waits.

`kvzip.encode` and `kvzip.decode` use it; an engine has pipelines with memory and streams of their own
(`kvzip.transport`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from kvzip import _cuda, _native
from kvzip.backends.base import Bytes, Codec, EncodeRequest, Table
from kvzip.backends.cuszp import Extended, coding_of, encodes_on_gpu
from kvzip.backends.portable import PortableCodec
from kvzip.bounds import PageBounds
from kvzip.driver import DecodeArgs, EncodeArgs
from kvzip.errors import CorruptRecordError
from kvzip.interop.torch import device_bytes, download, stream_handle, upload
from kvzip.record import ALIGNMENT, ENTRY_DTYPE, Coding
from kvzip.types import BlockView, ErrorBound


class CudaCodec(PortableCodec):
    """A native codec for torch tensors on a GPU as well. Calls block the host and run on torch's current stream.

    Device memory of about the size of the pages is taken meanwhile.

    Args:
        codec: what codes pages in host memory, and stands in the records: ``cuszp`` or ``raw``.
    """

    def __init__(self, codec: Codec) -> None:
        super().__init__(codec, use_triton=False)

    def encode_blocks(
        self, blocks: BlockView, request: EncodeRequest, out: Bytes
    ) -> tuple[Table, npt.NDArray[np.uint64]]:
        """Encode a batch; see `Codec.encode_blocks`."""
        if blocks.device == "cpu" or (self.name == "cuszp" and not encodes_on_gpu(request, blocks.layout)):
            return super().encode_blocks(blocks, request, out)
        self.check_mode(request.mode)
        segments = _native.segments_array(
            blocks, request.bound, coding_of(request) if self.name == "cuszp" else Coding.RAW
        )
        pages, count = len(segments), len(blocks)
        with _on(blocks) as (driver, stream):
            keep = _place_tables(segments, request.bound, blocks.device)
            inputs = [upload(a, blocks.device) for a in (segments.view(np.uint8), blocks.block_ids.copy())]
            arena, workspace, table, sizes, offsets, status = (
                device_bytes(n, blocks.device)
                for n in (
                    driver.arena_bytes(segments, count, 0),
                    driver.workspace_bytes(pages, count),
                    count * pages * ENTRY_DTYPE.itemsize,
                    8 * count,
                    8 * count,
                    8,
                )
            )
            args = EncodeArgs(
                segments=segments,
                device_segments=inputs[0].data_ptr(),
                block_ids=inputs[1].data_ptr(),
                num_blocks=count,
                arena=arena.data_ptr(),
                arena_bytes=arena.numel(),
                header_bytes=0,
                table=table.data_ptr(),
                payload_bytes=sizes.data_ptr(),
                record_offsets=offsets.data_ptr(),
                status=status.data_ptr(),
                workspace=workspace.data_ptr(),
                workspace_bytes=workspace.numel(),
                max_ctas=0,
            )
            driver.encode(args, stream)
            _native.check(int(download(status).view(np.uint32)[0]), "encoding on the GPU")
            starts = download(offsets).view(np.int64).tolist()
            found = download(sizes).view(np.uint64)
            payload = download(arena[: starts[-1] + int(found[-1])]) if count else out[:0]
            del keep
        for row, start, size in zip(out, starts, found.tolist(), strict=False):
            row[:size] = payload[start : start + size]
        return download(table).view(ENTRY_DTYPE).reshape(count, pages), found

    def decode_blocks(
        self, blocks: BlockView, payloads: Sequence[Bytes], tables: Sequence[Table], *, threads: int = 0
    ) -> None:
        """Decode a batch; see `Codec.decode_blocks`."""
        if blocks.device == "cpu" or not payloads:
            return super().decode_blocks(blocks, payloads, tables, threads=threads)
        table = np.ascontiguousarray(tables, ENTRY_DTYPE)
        sizes = np.array([payload.size for payload in payloads], np.int64)
        if (sizes % ALIGNMENT).any() or (self.name == "raw" and table["coding"].any()):
            # The host says what is wrong: the kernels would read all codings of `cuszp` in a raw record.
            self.validate_blocks(blocks.layout, payloads, tables)
        segments = _native.segments_array(blocks)
        pages, count = len(segments), len(payloads)
        extended = Extended.RICE if (table["coding"] & 0x0F > Coding.LOSSLESS).any() else Extended.NONE
        extended |= Extended.BOUNDS if (table["coding"] & 0x30).any() else Extended.NONE
        with _on(blocks) as (driver, stream):
            keep = _place_tables(segments, blocks.bounds, blocks.device)
            data = upload(np.concatenate(payloads), blocks.device)
            arrays = (
                segments.view(np.uint8),
                blocks.block_ids.copy(),
                np.cumsum(sizes) - sizes + data.data_ptr(),
                sizes,
                table.view(np.uint8),
            )
            inputs = [upload(array, blocks.device) for array in arrays]
            workspace = device_bytes(driver.workspace_bytes(pages, count), blocks.device)
            status = device_bytes(4 * count, blocks.device)
            device_segments, ids, addresses, lengths, entries = (tensor.data_ptr() for tensor in inputs)
            args = DecodeArgs(
                segments=segments,
                device_segments=device_segments,
                block_ids=ids,
                num_blocks=count,
                payloads=addresses,
                payload_bytes=lengths,
                table=entries,
                block_status=status.data_ptr(),
                workspace=workspace.data_ptr(),
                workspace_bytes=workspace.numel(),
                max_ctas=0,
                extended=int(extended),
            )
            driver.decode(args, stream, all_or_nothing=True)
            statuses = download(status).view(np.uint32)
            del keep
        if statuses.any():
            raise CorruptRecordError("the GPU found a segment that contradicts the format: the record is damaged")


@contextmanager
def _on(blocks: BlockView) -> Iterator[tuple[_cuda.CudaDriver, int]]:
    """The device functions with the blocks' GPU as the thread's current one, and torch's current stream there."""
    driver = _cuda.driver()
    before, device = driver.get_device(), int(blocks.device.partition(":")[2] or 0)
    driver.set_device(device)
    try:
        yield driver, stream_handle(None, device)
    finally:
        driver.set_device(before)


def _place_tables(segments: npt.NDArray[Any], bounds: PageBounds, device: str) -> list[Any]:
    """Channel tables to the device, and their addresses into descriptors; the tensors must stay meanwhile."""
    each = (bounds,) * len(segments) if isinstance(bounds, ErrorBound) else bounds
    keep: dict[bytes, Any] = {}
    for page, bound in enumerate(each):
        if (table := bound.channels) is not None:
            if table.digest not in keep:
                keep[table.digest] = upload(table.values.copy(), device)
            segments["channel_bounds"][page] = keep[table.digest].data_ptr()
    return list(keep.values())
