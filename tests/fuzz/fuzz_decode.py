# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Mutated records against kvzip's decoders: an error of kvzip's or valid output, never anything else.

    python tests/fuzz/fuzz_decode.py --cases 100000 --seed 1          # a run; the same seed gives the same cases
    python tests/fuzz/fuzz_decode.py --seed 1 --only 4711             # one case again, with its error
    python tests/fuzz/fuzz_decode.py --processes 2 --json fuzz.json   # several processes, and a report

Each case goes through `kvzip.decode`, and, when header and checksums hold, through the codec itself: the payload ends
where an inaccessible page of memory begins, and the pages have guard bytes around them. What must hold:

* A record whose checksums are not those of its bytes is refused. Most cases get new checksums, so that the checks
  behind them are reached.
* What is refused leaves the pages as they were.
* What is accepted is what the format allows: the reference of tests/reference_codec.py, which shares no code with
  kvzip, accepts it too and reads the same values; and it refuses whatever kvzip refuses.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import adversarial as adv
import reference_codec as ref

import kvzip
from kvzip import BoundPolicy, ErrorBound
from kvzip.benchmark import host_environment
from kvzip.errors import CodecNotFoundError, FormatError, KvzipError, LayoutError
from kvzip.record import RecordHeader, read_record
from kvzip.types import BlockLayout, BlockView

MAX_RAW_BYTES = 1 << 20  # no case decodes to more; what claims more must be refused
GUARD = 64  # bytes before and after every page
FILL = 0xA5
ASAN = "asan" in os.environ.get("LD_PRELOAD", "")

HEADER_FIELDS = [  # offset, struct code
    (4, "H"), (6, "H"), (8, "I"), (16, "Q"), (24, "Q"), (36, "I"), (40, "H"), (42, "B"), (43, "B"), (44, "B"),
    (45, "B"), (48, "d"), (56, "d"), (64, "B"), (80, "B"), (88, "B"),
]  # fmt: skip
RUN_FIELDS = [(0, "I"), (4, "I"), (8, "I"), (12, "I"), (16, "B"), (17, "B"), (18, "B")]
ENTRY_FIELDS = [(0, "I"), (4, "I"), (8, "f"), (12, "B"), (13, "B"), (14, "B"), (15, "B")]
LIMITS = {"B": 255, "H": 65535, "I": 2**32 - 1, "Q": 2**64 - 1}
FLOATS = [0.0, -0.0, 1.0, -1.0, 2.0**-97, 2.0**-96, 2.0**120, 2.0**121, 3e38, float("inf"), float("nan"), 1e-300]


def corpus() -> list[bytes]:
    """Small valid records of every dtype, coding and group shape."""
    records = []
    for dtype in adv.NUMERIC:
        for group_tokens in adv.GROUP_TOKENS:
            for mode in (ref.MODE_FIXED, ref.MODE_PLAIN, ref.MODE_OUTLIER, ref.MODE_RICE):
                seed = 100 * dtype + 10 * group_tokens + mode
                shape = [(8, 1, 6), (5, 2, 3), (16, 1, 3), (17, 2, 35)][mode - 1]
                geometry = ref.Geometry(*shape, dtype, group_tokens)
                flavours = ("normal", "some_specials", "lattice")
                pages = [ref.Page(adv.page_bits(f, seed, geometry), geometry, 1) for f in flavours[: 1 + seed % 3]]
                records.append(ref.encode_record(pages, mode=mode, bound=[3e-2, 1e-2, 1e-1][seed % 3], dims=""))
            geometry = ref.Geometry(7, 1, 9, dtype, group_tokens)
            pages = [ref.Page(adv.page_bits(f, 3, geometry), geometry) for f in ("normal", "constant", "any_bits")]
            for mode in (ref.MODE_FIXED, ref.MODE_RICE):
                records.append(ref.encode_record(pages, mode=mode, bound_kind=ref.BOUND_LOSSLESS, bound=0.0))
                records.append(ref.encode_record(pages, mode=mode, bound_kind=ref.BOUND_TOKEN_RMS, bound=0.1))
        geometry = ref.Geometry(16, 1, 70, dtype, 16)
        for flavour in ("normal", "some_specials"):  # large enough for lossless_rice to be smaller than raw
            page = ref.Page(adv.page_bits(flavour, 3, geometry), geometry)
            records.append(ref.encode_record([page], mode=ref.MODE_RICE, bound_kind=ref.BOUND_LOSSLESS, bound=0.0))
    opaque = ref.Geometry(1, 1, 50, ref.OPAQUE, 1)
    records.append(ref.encode_record([ref.Page(adv.page_bits("any_bits", 1, opaque), opaque)]))
    records.append(ref.encode_record([ref.Page(adv.page_bits("constant", 1, opaque), opaque)] * 2))
    page = ref.Geometry(4, 1, 5, ref.BF16, 4)
    pages = [ref.Page(adv.page_bits("normal", i, page), page, 1 + i % 2) for i in range(4)]
    records.append(ref.encode_record(pages, codec="raw", mode=ref.MODE_NONE))
    records.append(ref.encode_record(pages, dims="2NHD"))
    records.append(ref.encode_record(pages, dims="2HND", bound_kind=ref.BOUND_ABSOLUTE, bound=0.3))
    for named in TABLES:
        for dtype in adv.NUMERIC:
            for mode in (ref.MODE_FIXED, ref.MODE_PLAIN, ref.MODE_OUTLIER, ref.MODE_RICE):
                geometry = ref.Geometry(*named.shape, dtype, adv.GROUP_TOKENS[(dtype + mode) % len(adv.GROUP_TOKENS)])
                pages = [ref.Page(adv.page_bits("normal", i + mode, geometry), geometry, 1 + i % 2) for i in range(2)]
                records.append(ref.encode_record(pages, mode=mode, bound_kind=named.kind, bound=0.0, asked=named.asked))
    return records


class Tables:
    """Channel tables that records name: what a reader has to give with them, to kvzip and to the reference."""

    def __init__(self, shape: tuple[int, int, int], key: ErrorBound, value: ErrorBound) -> None:
        self.shape, self.bounds = shape, (key, value)
        self.bound = key if key == value else BoundPolicy(key, value)
        self.kind = ref.BOUND_CHANNEL_TABLE if key == value else ref.BOUND_BY_PAGE
        self.asked = [
            ref.Asked(ref.BOUND_TOKEN_RMS, b.value)
            if b.channels is None
            else ref.Asked(ref.BOUND_CHANNEL_TABLE, 0.0, b.channels.values.reshape(-1))
            for b in self.bounds
        ]
        self.number = ref.table_id(self.asked)


_BY_TOKEN = ErrorBound.token_rms(0.1)


def _tables() -> list[Tables]:
    rng = np.random.default_rng(3)
    made = []
    for heads, head_dim in ((2, 7), (1, 20)):
        table = ErrorBound.channel_table(10.0 ** rng.uniform(-3, 0, (heads, head_dim)))
        made += [Tables((9, heads, head_dim), table, table), Tables((17, heads, head_dim), table, _BY_TOKEN)]
    return made


TABLES = _tables()


# ---- mutations -------------------------------------------------------------------------------------------------------


def header_size(record: bytearray) -> int:
    """Bytes of the header that the record claims, at most what is there."""
    return min(int(struct.unpack_from("<I", record, 8)[0]), len(record)) if len(record) >= 96 else len(record)


def reseal(record: bytearray) -> None:
    """Compute both checksums again."""
    if len(record) < 96:
        return
    header_bytes = header_size(record)
    struct.pack_into("<I", record, 32, crc32c(bytes(record[header_bytes:])))
    record[12:16] = bytes(4)
    struct.pack_into("<I", record, 12, crc32c(bytes(record[:header_bytes])))


def value_for(rng: random.Random, code: str, old: float) -> float:
    """A value for a field: an end, a power of two, a neighbour, or anything."""
    if code in "fd":
        return rng.choice(FLOATS)
    limit = LIMITS[code]
    return rng.choice(
        (0, 1, 2, 3, limit, limit - 1, limit // 2, limit // 2 + 1, (1 << rng.randrange(64)) & limit,
         (int(old) + 1) & limit, (int(old) - 1) & limit, rng.randint(0, limit))
    )  # fmt: skip


def set_field(rng: random.Random, record: bytearray, at: int, code: str) -> None:
    """Overwrite one field."""
    packer = struct.Struct("<" + code)
    if at + packer.size <= len(record):
        packer.pack_into(record, at, value_for(rng, code, packer.unpack_from(record, at)[0]))


def flip_bits(rng: random.Random, record: bytearray, first: int, last: int) -> None:
    """Flip 1 to 4 bits of record[first:last]."""
    if last > first:
        for _ in range(rng.choice((1, 1, 2, 4))):
            record[rng.randrange(first, last)] ^= 1 << rng.randrange(8)


def mutate_anywhere(rng: random.Random, record: bytearray, records: list[bytes]) -> None:
    """Damage without new checksums."""
    flip_bits(rng, record, 0, len(record))


def mutate_payload(rng: random.Random, record: bytearray, records: list[bytes]) -> None:
    """Flip bits, set bytes or fill a stretch of the payload."""
    first = header_size(record)
    if len(record) > first:
        if rng.random() < 0.5:
            flip_bits(rng, record, first, len(record))
        else:
            at = rng.randrange(first, len(record))
            for i in range(at, min(len(record), at + rng.choice((1, 2, 4, 16)))):
                record[i] = rng.choice((0, 255, 15, 63, 127, rng.randrange(256)))
    reseal(record)


def mutate_classes(rng: random.Random, record: bytearray, records: list[bytes]) -> None:
    """Damage the first bytes of a segment, where its classes are, or swap two of them."""
    header_bytes = header_size(record)
    runs, segments = struct.unpack_from("<H", record, 40)[0], struct.unpack_from("<I", record, 36)[0]
    entry = 96 + 24 * runs + 16 * rng.randrange(segments)
    offset, size = struct.unpack_from("<II", record, entry)
    first = header_bytes + 16 * offset
    reach = min(size, 12)
    a, b = first + rng.randrange(reach), first + rng.randrange(reach)
    if rng.random() < 0.4:
        record[a], record[b] = record[b], record[a]
    elif rng.random() < 0.5:  # one class up, one down: the size still fits
        record[a], record[b] = (record[a] + 1) & 255, (record[b] - 1) & 255
    else:
        record[a] = rng.choice((0, 255, 63, 64, 127, 0x80, 0xF0, 0x0F, rng.randrange(256)))
    reseal(record)


def mutate_header(rng: random.Random, record: bytearray, records: list[bytes]) -> None:
    """Flip bits of the header."""
    flip_bits(rng, record, 0, header_size(record))
    reseal(record)


def mutate_field(rng: random.Random, record: bytearray, records: list[bytes]) -> None:
    """Forge one to three fields of the fixed part, a geometry run or a table entry."""
    runs, segments = struct.unpack_from("<H", record, 40)[0], struct.unpack_from("<I", record, 36)[0]
    for _ in range(rng.choice((1, 1, 2, 3))):
        where = rng.randrange(3)
        if where == 0:
            base, (at, code) = 0, rng.choice(HEADER_FIELDS)
        elif where == 1:
            base, (at, code) = 96 + 24 * rng.randrange(runs), rng.choice(RUN_FIELDS)
        else:
            base, (at, code) = 96 + 24 * runs + 16 * rng.randrange(segments), rng.choice(ENTRY_FIELDS)
        set_field(rng, record, base + at, code)
    reseal(record)


def mutate_geometry(rng: random.Random, record: bytearray, records: list[bytes]) -> None:
    """Another geometry with the raw size that belongs to it: absurd sizes reach the codec."""
    (runs,) = struct.unpack_from("<H", record, 40)
    run = 96 + 24 * rng.randrange(runs)
    small = (1, 2, 3, 5, 8, 15, 16, 17, 33, 64)
    large = (1 << 10, 1 << 15, 1 << 20, 46340, (1 << 31) - 1, 1 << 30)
    if rng.random() < 0.7:
        tokens, heads, head_dim = struct.unpack_from("<III", record, run + 4)
        swaps = [
            (tokens, head_dim, heads),
            (head_dim, heads, tokens),
            (1, 1, tokens * heads * head_dim),
            (tokens * 2, heads, head_dim),
        ]
        shape: tuple[int, int, int] = rng.choice(swaps)
        if rng.random() < 0.5:
            shape = (rng.choice(small), rng.choice((1, 2, 3)), rng.choice(small))
    else:
        shape = (rng.choice(small + large), rng.choice((1, 2, 1 << 10)), rng.choice(small + large))
    struct.pack_into("<III", record, run + 4, *shape)
    if rng.random() < 0.5:
        record[run + 16] = rng.randrange(4)
    if rng.random() < 0.5:
        record[run + 17] = rng.choice((16, 8, 4, 2, 1))
    raw = 0
    for i in range(runs):
        count, t, h, d, dtype, _ = struct.unpack_from("<IIIIBB", record, 96 + 24 * i)
        raw += count * t * h * d * (2, 2, 4, 1)[dtype & 3]
    struct.pack_into("<Q", record, 24, raw & (2**64 - 1))
    if rng.random() < 0.3:  # another coding as well: `constant` fits any geometry
        (segments,) = struct.unpack_from("<I", record, 36)
        record[96 + 24 * runs + 16 * rng.randrange(segments) + 12] = rng.randrange(7)
    reseal(record)


def mutate_sizes(rng: random.Random, record: bytearray, records: list[bytes]) -> None:
    """Cut or stretch the last segment, with lengths that agree with each other."""
    header_bytes = header_size(record)
    runs, segments = struct.unpack_from("<H", record, 40)[0], struct.unpack_from("<I", record, 36)[0]
    entry = 96 + 24 * runs + 16 * (segments - 1)
    offset, size = struct.unpack_from("<II", record, entry)
    size = max(1, size + rng.choice((-17, -16, -4, -3, -2, -1, 1, 2, 3, 4, 16, 100)))
    body = record[header_bytes + 16 * offset :][:size]
    body += bytes(rng.randrange(256) for _ in range(size - len(body)))
    del record[header_bytes + 16 * offset :]
    record += body + bytes(-size % 16)
    struct.pack_into("<I", record, entry + 4, size)
    struct.pack_into("<Q", record, 16, len(record) - header_bytes)
    reseal(record)


def mutate_coding(rng: random.Random, record: bytearray, records: list[bytes]) -> None:
    """Another coding, bound or param for a segment."""
    runs, segments = struct.unpack_from("<H", record, 40)[0], struct.unpack_from("<I", record, 36)[0]
    entry = 96 + 24 * runs + 16 * rng.randrange(segments)
    steps = rng.choice((0, 0, 0x10, 0x20))
    record[entry + 12] = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 2 | steps, 6 | steps, rng.randrange(256)))
    if rng.random() < 0.7:
        struct.pack_into("<f", record, entry + 8, rng.choice((1.0, 0.01, 2.0**-96, 2.0**120, *FLOATS)))
    if rng.random() < 0.3:
        record[entry + 14] = rng.randrange(256)
    if rng.random() < 0.2:
        record[64:80] = rng.choice((b"raw", b"cuszp", b"", b"zzz")).ljust(16, b"\0")
    reseal(record)


def mutate_splice(rng: random.Random, record: bytearray, records: list[bytes]) -> None:
    """The header of one record with the payload of another, or two records cut together."""
    other = bytearray(rng.choice(records))
    if rng.random() < 0.6:
        del record[header_size(record) :]
        record += other[header_size(other) :]
        struct.pack_into("<Q", record, 16, len(record) - header_size(record))
    else:
        del record[rng.randrange(96, len(record)) :]
        record += other[rng.randrange(len(other)) :]
    if rng.random() < 0.9:
        reseal(record)


def mutate_length(rng: random.Random, record: bytearray, records: list[bytes]) -> None:
    """Cut a record, or give it a tail, with or without new checksums."""
    if rng.random() < 0.6:
        del record[rng.randrange(len(record)) :]
    else:
        record += bytes(rng.choice((0, 255)) for _ in range(rng.choice((1, 15, 16, 4096))))
    if len(record) >= 96 and rng.random() < 0.5:
        with contextlib.suppress(struct.error):
            struct.pack_into("<Q", record, 16, len(record) - header_size(record))
        reseal(record)


Mutation = Callable[[random.Random, bytearray, list[bytes]], None]
MUTATIONS: list[tuple[int, Mutation]] = [  # weight, mutation
    (6, mutate_anywhere),
    (18, mutate_payload),
    (18, mutate_classes),
    (8, mutate_header),
    (14, mutate_field),
    (14, mutate_geometry),
    (8, mutate_sizes),
    (10, mutate_coding),
    (8, mutate_splice),
    (6, mutate_length),
]
WEIGHTS = [weight for weight, _ in MUTATIONS]


def is_sealed(record: bytes) -> bool:
    """Whether both checksums are those of the bytes that they cover."""
    sealed = bytearray(record)
    reseal(sealed)
    return len(record) >= 96 and sealed == record


def make_case(seed: int, index: int, records: list[bytes]) -> tuple[str, bytes]:
    """Case `index` of a seed: the mutation's name and the record."""
    rng = random.Random((seed << 32) | index)
    (_, mutation) = rng.choices(MUTATIONS, WEIGHTS)[0]
    record = bytearray(rng.choice(records))
    mutation(rng, record, records)
    return mutation.__name__.removeprefix("mutate_"), bytes(record)


# ---- one case --------------------------------------------------------------------------------------------------------


class Fault(AssertionError):
    """kvzip broke a promise on hostile bytes."""


class FencedMemory:
    """Bytes that end exactly where memory that nobody may touch begins."""

    def __init__(self, nbytes: int = 1 << 16) -> None:
        page = mmap.PAGESIZE
        self._map = mmap.mmap(-1, nbytes + page)
        memory = np.frombuffer(self._map, np.uint8)
        self._bytes = memory[:nbytes]
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(int(memory.ctypes.data) + nbytes)
        if libc.mprotect(address, ctypes.c_size_t(page), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect of the fence failed")

    def hold(self, data: memoryview) -> npt.NDArray[np.uint8]:
        """A copy of the data that ends at the fence."""
        place = self._bytes[self._bytes.size - len(data) :]
        place[:] = np.frombuffer(data, np.uint8)
        return place


def guarded_view(layout: BlockLayout) -> tuple[list[npt.NDArray[np.uint8]], BlockView]:
    """Memory full of one byte, and a view of the pages within it, guard bytes around each."""
    memories, pages = [], []
    for s in layout.segments:
        memory = np.full(GUARD + s.nbytes + GUARD, FILL, np.uint8)
        memories.append(memory)
        inner = memory[GUARD : GUARD + s.nbytes].view(s.dtype.numpy_bits)
        pages.append(inner.reshape(1, s.tokens, s.heads, s.head_dim))
    return memories, BlockView(pages, layout)


def reference_pages(record: bytes, header: RecordHeader, tables: Tables | None) -> bytes | None:
    """The values of a record as the reference reads them; None where it refuses."""
    asked = tables.asked if tables is not None and len(tables.asked) == header.num_segments else []
    try:
        pages = ref.decode_record(record, asked).pages
    except ref.Refused:
        return None
    return b"".join(page.tobytes() for page in pages)


def check_case(record: bytes, fence: FencedMemory, *, also_decode: bool = True) -> str:
    """Decode one hostile record in both ways; returns how it ended.

    Raises:
        Fault: a promise was broken.
    """
    try:
        header, payload = read_record(record)
    except KvzipError as error:
        if also_decode:  # the same checks again, so only some of these cases
            with contextlib.suppress(FormatError):
                kvzip.decode(record, max_raw_bytes=MAX_RAW_BYTES)
                raise Fault("decoded a record that read_record refuses") from error
        return type(error).__name__
    if not is_sealed(record):
        raise Fault("accepted a record whose checksums are not those of its bytes")
    tables = next((t for t in TABLES if t.number == header.table_id), None)
    decoded: Any = None
    try:
        decoded = kvzip.decode(record, bound=tables and tables.bound, max_raw_bytes=MAX_RAW_BYTES)
        outcome = "decoded"
    except KvzipError as error:
        outcome = type(error).__name__
    if header.raw_bytes > MAX_RAW_BYTES:
        if decoded is not None:
            raise Fault(f"decoded {header.raw_bytes} bytes, the limit was {MAX_RAW_BYTES}")
        return outcome
    memories, view = guarded_view(header.layout())
    try:
        if tables is not None:
            view = view.with_bounds(tables.bounds)
        codec = kvzip.get_codec(header.codec)
        codec.decode_blocks(view, [fence.hold(payload)], [header.table], threads=1)
    except KvzipError as error:
        if any((m != FILL).any() for m in memories):
            raise Fault("a refused record changed memory") from error
        if decoded is not None:
            raise Fault(f"kvzip.decode accepts what the codec refuses: {error}") from error
        # A codec that is not there, or tables for other pages: nothing was said of the payload.
        unknown = header.table_id != 0 and tables is None
        silent = unknown or isinstance(error, (CodecNotFoundError, LayoutError)) or not known_to_reference(header)
        if not silent and reference_pages(record, header, tables) is not None:
            raise Fault(f"kvzip refuses what the format allows: {error}") from error
        return outcome
    for memory in memories:
        if (memory[:GUARD] != FILL).any() or (memory[-GUARD:] != FILL).any():
            raise Fault("written outside of a page")
    values = b"".join(m[GUARD:-GUARD].tobytes() for m in memories)
    if decoded is not None:
        arrays = decoded if isinstance(decoded, list) else [decoded]
        if header.dims == "" and b"".join(a.tobytes() for a in arrays) != values:
            raise Fault("the same record decoded to different values")
    elif outcome not in ("LayoutError", "ConfigError"):  # mixed dtypes, which decode cannot shape; tables not given
        raise Fault(f"kvzip.decode refuses with {outcome} what the codec accepts")
    if header.table_id != 0 and tables is None:  # no reader has these tables: `decode` has refused, no page needs them
        if decoded is not None:
            raise Fault("decoded a record without the channel tables that it names")
        return outcome
    expected = reference_pages(record, header, tables)
    if expected is None:
        raise Fault("kvzip accepts what the format forbids")
    if expected != values:
        raise Fault("the reference reads other values")
    return outcome


def known_to_reference(header: RecordHeader) -> bool:
    """Whether the reference knows the codec's rules: of ``raw`` it reads all codings of ``cuszp``."""
    return header.codec == "cuszp"


def limit_memory(more_bytes: int) -> None:
    """Let this process map `more_bytes` more than it has: an allocation of a forged length fails, touched or not."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * mmap.PAGESIZE + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def run(
    cases: int,
    seed: int,
    first: int = 0,
    progress: Callable[[int], None] | None = None,
    most_seconds: float = float("inf"),
) -> Counter[str]:
    """Run cases first .. first + cases - 1 of a seed, or fewer where the time ends before.

    Raises:
        Fault: a promise was broken; the message names the case.
    """
    records, fence = corpus(), FencedMemory()
    for record in records:
        if check_case(record, fence) != "decoded":
            raise Fault("a valid record of the corpus does not decode")
    outcomes: Counter[str] = Counter()
    end = time.perf_counter() + most_seconds
    for index in range(first, first + cases):
        if index % 256 == 0 and time.perf_counter() > end:
            break
        if progress is not None:
            progress(index)
        name, record = make_case(seed, index, records)
        try:
            outcome = check_case(record, fence, also_decode=index % 8 == 0 or cases == 1)
            outcomes[f"{name}: {outcome}"] += 1
        except Exception as error:
            raise Fault(
                f"case {index} of seed {seed} ({name}, {len(record)} bytes): {type(error).__name__}: {error}; again "
                f"with python tests/fuzz/fuzz_decode.py --seed {seed} --only {index}"
            ) from error
    return outcomes


@contextlib.contextmanager
def last_case(path: Path | None) -> Iterator[Callable[[int], None] | None]:
    """A file with the number of the case in progress, for when the process dies."""
    if path is None:
        yield None
        return
    path.write_bytes(bytes(8))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 8) as memory:

        def note(index: int) -> None:
            memory[:8] = struct.pack("<q", index)

        yield note


def run_processes(options: argparse.Namespace) -> Counter[str]:
    """Split the cases over processes; a crash of one is a fault like any other.

    Raises:
        Fault: a promise was broken, or a process died; the message names the case.
    """
    share = -(-options.cases // options.processes)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for i in range(options.processes):
            count = min(share, options.cases - i * share)
            note, report = Path(folder, f"case{i}"), Path(folder, f"report{i}")
            command = [sys.executable, "-X", "faulthandler", __file__, "--cases", str(count), "--seed"]
            command += [str(options.seed), "--first", str(options.first + i * share), "--last-case", str(note)]
            command += [
                "--memory-mib",
                str(options.memory_mib),
                "--json",
                str(report),
                "--seconds",
                str(options.seconds),
            ]
            pipe = subprocess.PIPE
            running.append((subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True), note, report))
        for process, note, report in running:
            output, _ = process.communicate()
            if process.returncode != 0:
                case = struct.unpack("<q", note.read_bytes())[0] if note.exists() else "none"
                raise Fault(f"exit {process.returncode} at case {case} of seed {options.seed}:\n{output[-4000:]}")
            for name, by_outcome in json.loads(report.read_text())["outcomes"].items():
                outcomes.update({f"{name}: {outcome}": count for outcome, count in by_outcome.items()})
    return outcomes


def report_of(options: argparse.Namespace, outcomes: Counter[str], seconds: float) -> dict[str, Any]:
    """What a run found, for a file."""
    found: dict[str, dict[str, int]] = {}
    for name, count in sorted(outcomes.items()):
        mutation, _, outcome = name.partition(": ")
        found.setdefault(mutation, {})[outcome] = count
    decoded = sum(by_outcome.get("decoded", 0) for by_outcome in found.values())
    return {
        "what": "mutated, truncated, spliced and forged records against kvzip.decode and the CPU codec",
        "environment": host_environment() | {"sanitizers": "address, undefined" if ASAN else ""},
        "settings": {"cases": options.cases, "seed": options.seed, "first": options.first},
        "cases": outcomes.total(),
        "seconds": round(seconds, 1),
        "faults": 0,
        "accepted": decoded,
        "refused": outcomes.total() - decoded,
        "outcomes": found,
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="decode mutated records")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="run this case alone")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for a report")
    parser.add_argument("--last-case", type=Path, help="file that holds the number of the case in progress")
    parser.add_argument(
        "--memory-mib", type=int, default=0 if ASAN else 512, help="memory for the cases; 0 = no limit, as ASan needs"
    )
    options = parser.parse_args()
    if options.only is not None:
        options.first, options.cases = options.only, 1
    os.environ["KVZIP_THREADS"] = "1"  # the cases are small, and there is a process a core
    start = time.perf_counter()
    try:
        if options.processes > 1:
            outcomes = run_processes(options)
        else:
            if options.memory_mib:
                limit_memory(options.memory_mib << 20)
            with last_case(options.last_case) as progress:
                outcomes = run(options.cases, options.seed, options.first, progress, options.seconds)
    except Fault as fault:
        print(f"FAULT {fault}", file=sys.stderr)
        if options.only is not None and fault.__cause__ is not None:
            raise
        return 1
    seconds = time.perf_counter() - start
    for name, count in sorted(outcomes.items()):
        print(f"{count:8d}  {name}")
    print(f"seed {options.seed}: {outcomes.total()} cases in {seconds:.1f} s, no fault")
    if options.json is not None:
        options.json.write_text(json.dumps(report_of(options, outcomes, seconds), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
