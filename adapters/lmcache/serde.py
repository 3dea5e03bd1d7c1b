# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""LMCache's `Serializer` and `Deserializer`: memory objects into records and back, in host memory.

Both may be called by several threads at once. What they raise is a failed store or a miss for LMCache, and nothing of
the destination was written then.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.serde import AsyncSerdeProcessor, Deserializer, Serializer
from lmcache.v1.memory_management import MemoryObj

from kvzip._log import log_once, logger
from kvzip.adapters.lmcache.layout import HeadForm, layout_of_record, object_layout, page_bounds
from kvzip.adapters.lmcache.settings import SerdeSettings
from kvzip.adapters.lmcache.stored import SEAL_BYTES, host_bytes, read_stored, seal
from kvzip.backends.base import EncodeRequest
from kvzip.backends.registry import get_codec
from kvzip.bounds import table_id
from kvzip.coding import check_device, encode_records, max_record_bytes
from kvzip.errors import ConfigError, LayoutError
from kvzip.integrity import Sampler
from kvzip.record import ALIGNMENT, ENTRY_DTYPE, GEOMETRY_BYTES, Reason, header_nbytes
from kvzip.types import BlockView, ErrorBound


@dataclass
class SerdeStats:
    """What was coded since the start.

    Attributes:
        objects: how many.
        raw_bytes: bytes of their values.
        stored_bytes: bytes of what was made of them.
        violations: values outside the bound that `SerdeSettings.verify` found; these objects are kept raw.
        fallback_pages: pages that are not coded as asked, by reason.
    """

    objects: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    violations: int = 0
    fallback_pages: Counter[str] = field(default_factory=Counter)


class KvzipSerializer(Serializer):
    """Makes a record of each object. See `SerdeSettings` for what it is coded with."""

    def __init__(self, settings: SerdeSettings) -> None:
        self.settings = settings
        self.stats = SerdeStats()
        self._codec = get_codec(settings.codec)
        self._bounds, self._mode = settings.bounds, settings.coding_mode
        self._form = HeadForm(settings.head_dim, settings.packed)
        self._verifies = Sampler(settings.verify)
        self._lock = threading.Lock()

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        """Most bytes that an object of this layout can take when it is stored, under any settings.

        LMCache sizes the buffers of its loads by this too, and what it loads may have been stored under others.
        """
        layout = object_layout(*_described(layout_desc.shapes, layout_desc.dtypes), self._form)
        # Other settings can make two pages of one, each with its entry, a shape and padding.
        more = (ENTRY_DTYPE.itemsize + GEOMETRY_BYTES + 2 * ALIGNMENT) * len(layout.pages)
        return max_record_bytes(self._codec, layout.block) + more + SEAL_BYTES

    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> int:
        """Write an object's record and seal to the beginning of a buffer; what follows them is unspecified.

        Args:
            src: the object.
            dst: a buffer of at least `estimate_serialized_size` bytes.
            key: the object's key.

        Returns:
            Bytes that were written.

        Raises:
            LayoutError: the object is not what its shapes say, or the buffer is too small.
        """
        data, room = host_bytes(src), host_bytes(dst)
        layout = object_layout(*_described(src.get_shapes(), src.get_dtypes()), self._form)
        if data.size != layout.nbytes:
            raise LayoutError(f"the object has {data.size} bytes, its tensors have {layout.nbytes}")
        needed = max_record_bytes(self._codec, layout.block) + SEAL_BYTES
        if room.size < needed:
            raise LayoutError(f"the buffer has {room.size} bytes, {needed} may be needed: see estimate_serialized_size")
        blocks = BlockView([data[None]], layout.block)
        out = room[None, header_nbytes(layout.block) :]  # the payload is made in its place
        bounds = page_bounds(self._bounds, layout, key.kv_rank)
        request = EncodeRequest(bounds, self._mode, self.settings.threads)
        batch = encode_records(blocks, self._codec, request, measure_error=self._verifies(), out=out)
        violations = batch.records[0].violations or 0
        if violations:
            log_once("values outside the bound, the LMCache object is kept raw", f"{violations} values")
            exact = EncodeRequest(ErrorBound.lossless(), "none", reason=Reason.ENCODER_FAILED)
            batch = encode_records(blocks, get_codec("raw"), exact, out=out)
        record = batch.records[0]
        end = record.nbytes + SEAL_BYTES
        header = record.header.tobytes()
        room[: len(header)] = record.header
        room[record.nbytes : end] = np.frombuffer(seal(header, key), np.uint8)
        with self._lock:
            self.stats.objects += 1
            self.stats.raw_bytes += data.size
            self.stats.stored_bytes += end
            self.stats.violations += violations
            self.stats.fallback_pages.update(batch.fallbacks)
        return end


class KvzipDeserializer(Deserializer):
    """Brings objects back. The record says how; of the settings only the bounds count, where they are a table."""

    def __init__(self, settings: SerdeSettings) -> None:
        self.settings = settings
        self._bounds = settings.bounds

    def deserialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> None:
        """Fill an object from its record, after that was verified.

        Args:
            src: a buffer that begins with what `KvzipSerializer.serialize` wrote.
            dst: the object.
            key: the object's key.

        Raises:
            CorruptRecordError: the record is damaged, or another object's.
            FormatVersionError: a newer kvzip wrote it.
            LayoutError: it was made of an object of another shape.
            CodecNotFoundError: its codec is not installed here.
            ConfigError: it was stored with another calibration table.
        """
        header, payload = read_stored(src, key)
        layout = layout_of_record(*_described(dst.get_shapes(), dst.get_dtypes()), header)
        blocks = BlockView([host_bytes(dst)[None]], layout.block)
        codec = get_codec(header.codec)
        check_device(codec, blocks)
        if header.table_id:
            bounds = page_bounds(self._bounds, layout, key.kv_rank)
            if table_id(bounds, header.num_segments) != header.table_id:
                raise ConfigError(
                    f"the record was stored with calibration table {header.table_id:016x}, the settings have another: "
                    "it can be read with that one alone"
                )
            blocks = blocks.with_bounds(bounds)
        codec.decode_blocks(blocks, [np.frombuffer(payload, np.uint8)], [header.table], threads=self.settings.threads)


def create_processor(options: dict[str, object]) -> AsyncSerdeProcessor:
    """What LMCache makes of ``{"type": "kvzip", ...}``.

    Args:
        options: the settings, without ``type``; see `SerdeSettings`.

    Raises:
        ConfigError: see `SerdeSettings.read`.
    """
    settings = SerdeSettings.read(options)
    logger.info("LMCache serde: codec %s, bound %s, mode %s", settings.codec, settings.bounds, settings.coding_mode)
    return AsyncSerdeProcessor(KvzipSerializer(settings), KvzipDeserializer(settings), settings.max_workers)


def _described(shapes: Any, dtypes: Any) -> tuple[tuple[tuple[int, ...], ...], tuple[Any, ...]]:
    return tuple(tuple(int(n) for n in shape) for shape in shapes), tuple(dtypes)
