# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Records as users meet them: exact bytes of a header, `encode` and `decode` of arrays and tensors, refusals."""

from __future__ import annotations

import inspect
import math
import struct
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from crc32c import crc32c

import kvzip
from kvzip.backends.raw import RawCodec
from kvzip.errors import (
    BackendUnavailableError,
    CodecNotFoundError,
    ConfigError,
    CorruptRecordError,
    FormatError,
    FormatVersionError,
    LayoutError,
)
from kvzip.record import (
    ENTRY_DTYPE,
    MAX_SEGMENTS,
    Coding,
    Reason,
    fallback_reasons,
    header_nbytes,
    pack_headers,
    read_header,
)
from kvzip.types import BlockLayout, DType, ErrorBound, SegmentLayout

LOSSLESS = ErrorBound.lossless()


def codecs() -> list[Any]:
    from kvzip import _native

    try:
        _native.library()
    except BackendUnavailableError as error:
        missing = pytest.mark.skip(f"the native library is not built here: {error}")
        return ["raw", pytest.param("cuszp", marks=missing)]
    return ["raw", "cuszp"]


CODECS = codecs()


def reseal(record: bytes, at: int, value: bytes) -> bytes:
    """Forge a header: other bytes, and the checksum that goes with them."""
    data = bytearray(record)
    data[at : at + len(value)] = value
    size = int.from_bytes(data[8:12], "little")
    data[12:16] = bytes(4)
    data[12:16] = crc32c(bytes(data[:size])).to_bytes(4, "little")
    return bytes(data)


# ---- the header


def test_exact_bytes_of_a_record() -> None:
    """Written by hand from docs/reference/format.md."""
    x = np.array([[[1.0, 2.0]], [[3.0, -4.0]]], np.float32)  # two tokens, one head
    fixed = struct.pack("<4sHHII", b"KVZP", 1, 0, 144, 0)
    payload = struct.pack("<4f", 1.0, 2.0, 3.0, -4.0)
    fixed += struct.pack("<QQII", len(payload), 16, crc32c(payload), 1)
    fixed += struct.pack("<HBBB3xdd", 1, 0, 1, 0, 0.25, math.nan)
    fixed += struct.pack("<16s8s8x", b"raw", b"NHD")
    run = struct.pack("<IIIIBB6x", 1, 2, 1, 2, 2, 2)
    entry = struct.pack("<IIfBBBB", 0, 16, 0.0, 0, 0, 0, 0)
    header = fixed + run + entry + bytes(8)
    assert len(header) == 144
    header = header[:12] + crc32c(header).to_bytes(4, "little") + header[16:]
    assert kvzip.encode(x, bound=ErrorBound.absolute(0.25), codec="raw", layout="NHD") == header + payload


def test_what_a_header_says() -> None:
    x = np.zeros((2, 16, 2, 8), np.uint16)
    record = kvzip.encode(x, bound=ErrorBound.relative(0.125), codec="raw", layout="2NHD", dtype="bfloat16")
    h = kvzip.read_header(record)
    assert (h.version, h.codec, h.mode, h.dims) == (1, "raw", "none", "2NHD")
    assert h.bound == ErrorBound.relative(0.125)
    assert (h.reason, h.max_error) == (Reason.AS_ASKED, None)
    assert (h.raw_bytes, h.payload_bytes, h.record_bytes) == (1024, 1024, len(record))
    assert h.header_bytes == header_nbytes(h.layout()) == 96 + 24 + 2 * 16 + 8
    assert h.ratio == 1024 / len(record)
    assert [(g.count, g.tokens, g.heads, g.head_dim, g.dtype) for g in h.geometry] == [(2, 16, 2, 8, DType.BFLOAT16)]
    assert h.num_segments == 2
    assert h.table["kind"].tolist() == [1, 2]
    assert h.table["offset"].tolist() == [0, 32]
    assert [s.kind for s in h.layout().segments] == ["k", "v"]
    with pytest.raises(ValueError, match="read-only"):
        h.table["size"] = 0


def test_reading_a_header_needs_the_header_alone() -> None:
    record = kvzip.encode(np.zeros(64, np.float32), bound=LOSSLESS, codec="raw")
    h = kvzip.read_header(record)
    assert kvzip.read_header(record[: h.header_bytes]).record_bytes == len(record)
    for kind in (bytes, bytearray, memoryview, lambda r: np.frombuffer(r, np.uint8)):
        assert kvzip.read_header(kind(record)).record_bytes == len(record)


@pytest.mark.parametrize("size", [0, 1, 4, 95, 96, 143])
def test_a_cut_header(size: int) -> None:
    record = kvzip.encode(np.zeros(64, np.float32), bound=LOSSLESS, codec="raw")
    with pytest.raises(CorruptRecordError, match=f"{size}"):
        kvzip.read_header(record[:size])


def test_every_flipped_bit_of_a_header_is_found() -> None:
    record = kvzip.encode(np.arange(64, dtype=np.float32), bound=LOSSLESS, codec="raw")
    for bit in range(8 * kvzip.read_header(record).header_bytes):
        data = bytearray(record)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            kvzip.read_header(bytes(data))


def test_a_version_from_the_future() -> None:
    record = kvzip.encode(np.zeros(64, np.float32), bound=LOSSLESS, codec="raw")
    with pytest.raises(FormatVersionError, match="format version 9: this kvzip reads version 1; upgrade"):
        kvzip.decode(reseal(record, 4, b"\x09\x00"))


def test_a_codec_that_is_not_here() -> None:
    record = reseal(kvzip.encode(np.zeros(64, np.float32), bound=LOSSLESS, codec="raw"), 64, b"elsewhere\0")
    assert kvzip.read_header(record).codec == "elsewhere"
    with pytest.raises(CodecNotFoundError, match=r"no codec is named 'elsewhere': use one of .*raw"):
        kvzip.decode(record)


def test_more_pages_than_a_record_holds() -> None:
    page = SegmentLayout(0, DType.OPAQUE, 1, 1, 1)
    with pytest.raises(FormatError, match="65537 pages in a block: a record holds at most 65536; split"):
        header_nbytes(BlockLayout((page,) * (MAX_SEGMENTS + 1)))
    other = SegmentLayout(0, DType.OPAQUE, 1, 1, 2)
    with pytest.raises(FormatError, match=r"65536 runs .* at most 65535; put pages of one shape side by side"):
        header_nbytes(BlockLayout((page, other) * (MAX_SEGMENTS // 2)))
    assert header_nbytes(BlockLayout((page,) * MAX_SEGMENTS)) == 96 + 24 + 16 * MAX_SEGMENTS + 8


@pytest.mark.parametrize("name", ["", "seventeen letters", "caf\u00e9", "a\0b", "new\nline"])
def test_codec_names_that_no_record_can_keep(name: str) -> None:
    class Odd(RawCodec):
        pass

    Odd.name = name
    with pytest.raises(ConfigError, match="1 to 16 printable ASCII characters"):
        kvzip.encode(np.zeros(64, np.float32), bound=LOSSLESS, codec=Odd())
    with pytest.raises(ConfigError, match="1 to 16 printable ASCII characters"):
        kvzip.register_codec(Odd())


def test_an_infinite_error_makes_a_record_that_can_be_read() -> None:
    layout = BlockLayout.opaque([np.zeros((1, 16), np.uint8)])
    table = np.zeros((1, 1), ENTRY_DTYPE)
    table["size"] = 16
    sizes, crcs = np.array([16], np.uint64), np.zeros(1, np.uint32)
    kept = []
    for error in (math.inf, 1.5):
        header = pack_headers(
            layout, table, sizes, crcs, codec="raw", mode="none", bound=LOSSLESS, max_errors=np.array([error])
        )
        kept.append(read_header(header[0]).max_error)
    assert kept == [np.finfo(np.float64).max, 1.5]


def test_a_mode_that_the_format_does_not_know() -> None:
    """A third party's mode is its own business: the record keeps none."""

    class Fast(RawCodec):
        name: ClassVar[str] = "fast"
        modes: ClassVar[tuple[str, ...]] = ("ludicrous",)

    record = kvzip.encode(np.zeros(64, np.float32), bound=LOSSLESS, codec=Fast(), mode="ludicrous")
    assert kvzip.read_header(record).mode == "none"


# ---- encode and decode


def sample(name: str, shape: tuple[int, ...]) -> Any:
    """An array or tensor of this type with ordinary values, NaN and infinity among them."""
    x = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    x.flat[::37] = np.nan
    x.flat[5::41] = -np.inf
    if name == "uint8":
        return np.where(np.isfinite(x), x * 100, 0).astype(np.int64).astype(np.uint8)
    if name.startswith("numpy:"):
        return x.astype(name.removeprefix("numpy:"))
    if name.startswith("ml_dtypes:"):
        ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
        return x.astype(ml_dtypes.bfloat16)
    torch = pytest.importorskip("torch", reason="torch is not installed")
    return torch.from_numpy(x).to(getattr(torch, name.removeprefix("torch:")))


def bits(x: Any) -> npt.NDArray[Any]:
    """Bit patterns of an array or tensor."""
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x).view(f"u{x.itemsize}")
    torch = pytest.importorskip("torch")
    return np.asarray(x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])).view(
        f"u{x.element_size()}"
    )


def empty_like(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return np.full_like(x, 7)
    return x.clone().fill_(7)


TYPES = [
    "numpy:float16",
    "numpy:float32",
    "ml_dtypes:bfloat16",
    "torch:bfloat16",
    "torch:float16",
    "torch:float32",
    "uint8",
]
SHAPES = {
    None: (3, 5, 7),
    "NHD": (16, 3, 8),
    "HND": (3, 17, 8),
    "2NHD": (2, 5, 2, 9),
    "2HND": (2, 2, 33, 4),
    "HN2D": (2, 16, 2, 6),
    "ND": (20, 12),
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("name", TYPES)
def test_round_trip(name: str, layout: str | None, codec: str) -> None:
    x = sample(name, SHAPES[layout])
    record = kvzip.encode(x, bound=LOSSLESS, codec=codec, layout=layout)
    assert kvzip.read_header(record).dims == (layout or "")
    back = kvzip.decode(record)
    assert isinstance(back, np.ndarray)
    assert back.shape == (tuple(x.shape) if layout else (x.size if isinstance(x, np.ndarray) else x.numel(),))
    assert np.array_equal(bits(back).ravel(), bits(x).ravel())
    expected = {"float16": np.float16, "float32": np.float32, "bfloat16": np.uint16, "uint8": np.uint8}
    assert back.dtype == expected[name.split(":")[-1]]
    out = empty_like(x)
    assert kvzip.decode(record, out=out) is out
    assert np.array_equal(bits(out), bits(x))
    elsewhere = [empty_like(x)]  # a list of one
    assert kvzip.decode(record, out=elsewhere) is elsewhere
    assert np.array_equal(bits(elsewhere[0]), bits(x))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", TYPES[:-1])
def test_round_trip_within_a_bound(name: str, codec: str) -> None:
    x = sample(name, (16, 3, 8))
    record = kvzip.encode(x, bound=ErrorBound.absolute(0.01), codec=codec, layout="NHD", measure_error=True)
    out = empty_like(x)
    kvzip.decode(record, out=out)
    a, b = (np.asarray(v, np.float32) if isinstance(v, np.ndarray) else v.float().numpy() for v in (x, out))
    finite = np.isfinite(a)
    error = np.abs(np.subtract(a, b, where=finite, out=np.zeros_like(a)))
    assert error.max() <= 0.01
    assert kvzip.read_header(record).max_error == pytest.approx(float(error.max()), rel=1e-6)
    assert np.array_equal(bits(x)[~finite], bits(out)[~finite])


def test_numpy_bit_patterns_need_a_dtype() -> None:
    x = np.arange(32, dtype=np.uint16)
    with pytest.raises(LayoutError, match=r"elements of type uint16: say what they are with dtype=.*'bfloat16'"):
        kvzip.encode(x, bound=LOSSLESS, codec="raw")
    record = kvzip.encode(x, bound=LOSSLESS, codec="raw", dtype="bfloat16")
    assert np.array_equal(kvzip.decode(record), x)


def test_decode_into_another_order_of_memory() -> None:
    x = np.random.default_rng(0).normal(size=(16, 3, 8)).astype(np.float32)
    record = kvzip.encode(x, bound=LOSSLESS, codec="raw", layout="NHD")
    head_first = np.zeros((3, 16, 8), np.float32)
    kvzip.decode(record, out=head_first.transpose(1, 0, 2))
    assert np.array_equal(head_first.transpose(1, 0, 2), x)
    padded = np.full((16, 3, 9), 7, np.float32)
    kvzip.decode(record, out=padded[..., :8])
    assert np.array_equal(padded[..., :8], x)
    assert (padded[..., 8] == 7).all()


@pytest.mark.parametrize(
    ("out", "why"),
    [
        (np.zeros((16, 3, 9), np.float32), "16 tokens x 3 heads x 8"),
        (np.zeros((3, 16, 8), np.float32), "16 tokens x 3 heads x 8"),
        (np.zeros((16, 24), np.float32), "dims 'NHD' need 4 axes"),
        (np.zeros((16, 3, 8), np.float16), "float32 has 4 bytes"),
        (np.zeros((16, 3, 8), np.int64), "float32 has 4 bytes"),
        (np.zeros((16, 3, 16), np.float32)[..., ::2], "make D contiguous"),
        ([np.zeros((16, 3, 8), np.float32)] * 2, "came from 1 tensors, out has 2"),
        ([], "came from 1 tensors, out has 0"),
    ],
)
def test_what_does_not_fit_is_refused(out: Any, why: str) -> None:
    record = kvzip.encode(np.ones((16, 3, 8), np.float32), bound=LOSSLESS, codec="raw", layout="NHD")
    with pytest.raises(LayoutError, match=why):
        kvzip.decode(record, out=out)
    for array in out if isinstance(out, list) else [out]:
        assert not array.any()


def test_what_cannot_be_written_is_refused() -> None:
    record = kvzip.encode(np.ones((16, 3, 8), np.float32), bound=LOSSLESS, codec="raw", layout="NHD")
    frozen = np.zeros((16, 3, 8), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(LayoutError, match="read-only: pass a writable array"):
        kvzip.decode(record, out=frozen)
    torch = pytest.importorskip("torch", reason="torch is not installed")
    with pytest.raises(LayoutError, match="read-only"):
        kvzip.decode(record, out=torch.zeros(16, 1, 8).expand(16, 3, 8))


def test_a_float16_array_is_no_place_for_bfloat16() -> None:
    record = kvzip.encode(np.ones((16, 3, 8), np.uint16), bound=LOSSLESS, codec="raw", layout="NHD", dtype="bf16")
    with pytest.raises(LayoutError, match="the tensor holds float16, not bfloat16"):
        kvzip.decode(record, out=np.zeros((16, 3, 8), np.float16))


@pytest.mark.parametrize("codec", CODECS)
def test_a_damaged_record_changes_nothing(codec: str) -> None:
    x = np.random.default_rng(0).normal(size=(16, 3, 8)).astype(np.float32)
    record = kvzip.encode(x, bound=ErrorBound.relative(1e-3), codec=codec, layout="NHD")
    out = np.full_like(x, 7)
    for at in range(0, len(record), 5):
        data = bytearray(record)
        data[at] ^= 0x10
        with pytest.raises(FormatError):
            kvzip.decode(bytes(data), out=out)
    for bad in (record[:-1], record + b"\0", record[:-16], b"", b"KVZP"):
        with pytest.raises(CorruptRecordError):
            kvzip.decode(bad, out=out)
    assert (out == 7).all()


def test_a_forged_size_does_not_allocate() -> None:
    """A constant page of 4 GiB in a record of 160 bytes; a larger page than a record can hold is no record."""
    record = bytearray(kvzip.encode(np.zeros(4, np.float32), bound=LOSSLESS, codec="raw"))
    record[24:32] = (2**32 - 16).to_bytes(8, "little")
    forged = reseal(reseal(bytes(record), 96 + 12, (2**30 - 4).to_bytes(4, "little")), 132, bytes([Coding.CONSTANT]))
    assert kvzip.read_header(forged).raw_bytes == 4294967280
    with pytest.raises(ConfigError, match=r"decodes to 4294967280 bytes, the limit is 1073741824: pass out="):
        kvzip.decode(forged)
    record[24:32] = (2**32).to_bytes(8, "little")
    larger = reseal(reseal(bytes(record), 96 + 12, (2**30).to_bytes(4, "little")), 132, bytes([Coding.CONSTANT]))
    with pytest.raises(CorruptRecordError, match="a page of 4294967296 bytes is too large"):
        kvzip.read_header(larger)


def test_max_raw_bytes() -> None:
    x = np.arange(64, dtype=np.float32)
    record = kvzip.encode(x, bound=LOSSLESS, codec="raw")
    assert np.array_equal(kvzip.decode(record, max_raw_bytes=256), x)
    with pytest.raises(ConfigError, match="decodes to 256 bytes, the limit is 255: pass out=, or a larger"):
        kvzip.decode(record, max_raw_bytes=255)
    out = np.zeros_like(x)
    kvzip.decode(record, out=out, max_raw_bytes=0)  # the limit is for what decode allocates itself
    assert np.array_equal(out, x)


def test_a_block_layout_for_one_block() -> None:
    x = np.random.default_rng(0).normal(size=(4, 2, 8)).astype(np.float32)
    pages = (
        SegmentLayout(0, DType.FLOAT32, 4, 1, 8, token_stride_bytes=64, head_stride_bytes=32, kind="k"),
        SegmentLayout(0, DType.FLOAT32, 4, 1, 8, 32, token_stride_bytes=64, head_stride_bytes=32, kind="v"),
    )
    record = kvzip.encode(x, bound=LOSSLESS, codec="raw", layout=BlockLayout(pages))
    assert kvzip.read_header(record).dims == ""
    k, v = kvzip.decode(record)
    assert np.array_equal(k[:, 0], x[:, 0])
    assert np.array_equal(v[:, 0], x[:, 1])


def test_scalars_and_single_values() -> None:
    assert kvzip.decode(kvzip.encode(np.array(2.5, np.float32), bound=LOSSLESS, codec="raw")).tolist() == [2.5]


@pytest.mark.parametrize("x", [[1.0], 2.5, None, "text"])
def test_encode_refuses_what_is_no_array(x: Any) -> None:
    with pytest.raises(LayoutError, match="is no NumPy array and no torch tensor: pass one of these"):
        kvzip.encode(x, bound=LOSSLESS, codec="raw")


@pytest.mark.parametrize("bound", [1e-3, None, "1e-3", 0])
def test_encode_refuses_what_is_no_bound(bound: Any) -> None:
    with pytest.raises(ConfigError, match=r"is no ErrorBound: use ErrorBound\.relative\(1e-3\)"):
        kvzip.encode(np.zeros(4, np.float32), bound=bound, codec="raw")


def test_encode_refuses_what_is_not_contiguous_without_a_layout() -> None:
    with pytest.raises(LayoutError, match="not contiguous: give the page geometry"):
        kvzip.encode(np.zeros((4, 6), np.float32).T, bound=LOSSLESS, codec="raw")
    with pytest.raises(LayoutError, match="at least 1"):
        kvzip.encode(np.zeros((0, 6), np.float32), bound=LOSSLESS, codec="raw")


def test_encode_refuses_another_device() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    with pytest.raises(LayoutError, match=r"the blocks lie on meta.*, codec 'raw' works on cpu: copy them"):
        kvzip.encode(torch.zeros(16, 3, 8, device="meta"), bound=LOSSLESS, codec="raw")
    record = kvzip.encode(torch.zeros(16, 3, 8), bound=LOSSLESS, codec="raw", layout="NHD")
    with pytest.raises(LayoutError, match=r"the blocks lie on meta"):
        kvzip.decode(record, out=torch.zeros(16, 3, 8, device="meta"))


def test_modes() -> None:
    with pytest.raises(ConfigError, match="codec 'raw' has no mode 'fixed': use one of none"):
        kvzip.encode(np.zeros(4, np.float32), bound=LOSSLESS, codec="raw", mode="fixed")
    with pytest.raises(CodecNotFoundError, match=r"no codec is named 'nope': use one of .*raw"):
        kvzip.encode(np.zeros(4, np.float32), bound=LOSSLESS, codec="nope")


def test_signatures_of_the_issue() -> None:
    encode, decode = inspect.signature(kvzip.encode), inspect.signature(kvzip.decode)
    assert list(encode.parameters)[:5] == ["x", "bound", "codec", "mode", "layout"]
    assert encode.parameters["codec"].default == "cuszp"
    assert list(decode.parameters)[:2] == ["record", "out"]
    assert all(p.kind is p.KEYWORD_ONLY for name, p in encode.parameters.items() if name != "x")


@pytest.mark.parametrize("pages", [0, 1, 6, 999])
def test_reasons_are_counted_by_page(pages: int) -> None:
    """A page's own reason comes before the record's; whether tables come as arrays or as bytes does not matter."""
    table = np.zeros(pages, ENTRY_DTYPE)
    reason = ENTRY_DTYPE.names[-1] if ENTRY_DTYPE.names else ""
    table[reason][: pages // 3] = Reason.INCOMPRESSIBLE
    own = {"incompressible": pages // 3} if pages // 3 else {}
    others = {"break_even": pages - pages // 3} if pages else {}
    for tables in (table, [table], table.tobytes()):
        assert fallback_reasons(tables) == own
        counted = fallback_reasons(tables, Reason.BREAK_EVEN)
        assert counted == own | others
        counted["break_even"] = -1  # the caller's own: the next one is told the same again
        assert fallback_reasons(tables, Reason.BREAK_EVEN) == own | others
