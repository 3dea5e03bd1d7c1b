# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What is kept of an object: its record, and behind it a seal that ties the record to the object's key.

The record has checksums of its own. The seal is for what they cannot see: a whole record under another object's name,
or in a buffer that a storage tier did not fill.
"""

from __future__ import annotations

import hashlib
import struct
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from kvzip.errors import CorruptRecordError, LayoutError
from kvzip.record import RecordHeader, read_header, read_record

SEAL_BYTES = 16

#: Buffers whose payload was verified since it was read, with the seal of what is in them: once is enough.
_verified: weakref.WeakKeyDictionary[Any, bytes] = weakref.WeakKeyDictionary()


def host_bytes(obj: Any) -> npt.NDArray[np.uint8]:
    """The bytes of an LMCache memory object, without a copy.

    Raises:
        LayoutError: they are not in host memory.
    """
    tensor = obj.raw_tensor
    if tensor is not None and tensor.device.type != "cpu":
        raise LayoutError(f"the object lies on {tensor.device}: the serde takes objects in host memory")
    return np.frombuffer(obj.byte_array, np.uint8)


def seal(header: bytes, key: Any) -> bytes:
    """What ties a record to its key.

    Args:
        header: of the record, with the checksum of its payload.
        key: LMCache's ``ObjectKey``.
    """
    digest = hashlib.blake2b(header, digest_size=SEAL_BYTES)
    digest.update(struct.pack("<QQ", key.kv_rank, key.object_group_id))
    for part in (key.chunk_hash, key.model_name.encode(), key.cache_salt.encode()):
        digest.update(struct.pack("<Q", len(part)) + part)
    return digest.digest()


def verify_stored(obj: Any, key: Any) -> None:
    """Check what was read into a buffer for a key; the next `read_stored` of it leaves the payload's checksum out.

    Args:
        obj: LMCache's memory object.
        key: LMCache's ``ObjectKey``.

    Raises:
        FormatVersionError: a newer kvzip wrote it.
        CorruptRecordError: it is damaged, or of another object.
    """
    _verified.pop(obj, None)
    header, _ = read_stored(obj, key)
    _verified[obj] = seal(host_bytes(obj)[: header.header_bytes].tobytes(), key)


def read_stored(obj: Any, key: Any) -> tuple[RecordHeader, memoryview]:
    """Check what is in a buffer for a key; bytes behind the seal are ignored.

    Args:
        obj: LMCache's memory object.
        key: LMCache's ``ObjectKey``.

    Returns:
        The record's header, and its payload as a view of the buffer.

    Raises:
        FormatVersionError: a newer kvzip wrote it.
        CorruptRecordError: it is damaged, or of another object.
    """
    data = host_bytes(obj)
    header = read_header(data)
    end = header.record_bytes
    if len(data) < end + SEAL_BYTES:
        raise CorruptRecordError(f"{len(data)} bytes, the record and its seal have {end + SEAL_BYTES}: it is cut")
    expected = seal(data[: header.header_bytes].tobytes(), key)
    if _verified.pop(obj, None) != expected:
        read_record(data[:end])
    if data[end : end + SEAL_BYTES].tobytes() != expected:
        raise CorruptRecordError("the seal does not match: it is damaged, or the record of another object")
    return header, data[header.header_bytes : end].data
