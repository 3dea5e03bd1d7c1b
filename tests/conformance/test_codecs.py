# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Every codec passes the conformance kit, and the kit catches a codec that breaks any one promise."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

import kvzip
from kvzip.backends import registry
from kvzip.backends.base import Bytes, EncodeRequest, PageCodec, Table
from kvzip.backends.raw import RawCodec
from kvzip.errors import CorruptRecordError
from kvzip.record import ALIGNMENT, align
from kvzip.testing import check_codec
from kvzip.types import BlockLayout, BlockView, DType, ErrorBound

Bits = npt.NDArray[Any]


class ZlibCodec(PageCodec):
    """What a third party writes: a whole codec in ten lines. zlib's own checksum refuses damaged bytes."""

    name: ClassVar[str] = "zlib"
    lossless_only: ClassVar[bool] = True

    def encode_page(self, values: Bits, dtype: DType, request: EncodeRequest) -> bytes | None:
        return zlib.compress(values.tobytes(), 1)

    def decode_page(self, data: bytes, dtype: DType, shape: tuple[int, int]) -> Bits:
        size = shape[0] * shape[1] * dtype.itemsize
        inflater = zlib.decompressobj()
        raw = inflater.decompress(data, size)  # never more, whatever the bytes claim
        if not inflater.eof or inflater.unused_data:
            raise ValueError("trailing or missing bytes")
        return np.frombuffer(raw, dtype.numpy_bits)


@pytest.fixture
def clean_registry() -> Iterator[None]:
    before = dict(registry._instances)
    yield
    registry._instances.clear()
    registry._instances.update(before)


@pytest.fixture
def entry_point(monkeypatch: pytest.MonkeyPatch, clean_registry: None) -> Any:
    """Pretend that an installed package brings the entry point NAME = VALUE of the group kvzip.codecs."""

    def install(name: str, value: str) -> None:
        real = importlib.metadata.entry_points
        fake = importlib.metadata.EntryPoint(name, value, registry.ENTRY_POINT_GROUP)

        def entry_points(**choice: Any) -> Any:
            return [*real(**choice), fake] if choice.get("group") == registry.ENTRY_POINT_GROUP else real(**choice)

        monkeypatch.setattr(registry, "entry_points", entry_points)

    return install


# ---- codecs that keep their promises


@pytest.mark.parametrize("mode", ["fixed", "plain", "outlier", "rice"])
def test_cuszp_conforms(mode: str) -> None:
    codec = kvzip.get_codec("cuszp")
    assert mode in codec.modes
    one_mode = type("OneMode", (type(codec),), {"modes": (mode,)})  # a mode a test: short tests, not a long one
    check_codec(one_mode())


def test_cuszp_is_checked_in_all_its_modes() -> None:
    assert kvzip.get_codec("cuszp").modes == ("fixed", "plain", "outlier", "rice")


def test_raw_conforms() -> None:
    check_codec(kvzip.get_codec("raw"))


def test_a_third_party_codec_conforms() -> None:
    check_codec(ZlibCodec(), seed=1)


def test_a_third_party_codec_by_hand(clean_registry: None) -> None:
    kvzip.register_codec(ZlibCodec())
    assert kvzip.get_codec("zlib").name == "zlib"
    assert "zlib" in registry.codec_names()
    with pytest.raises(kvzip.ConfigError, match="'zlib' is registered: pass replace=True"):
        kvzip.register_codec(ZlibCodec())
    again = ZlibCodec()
    kvzip.register_codec(again, replace=True)
    assert kvzip.get_codec("zlib") is again


def test_a_third_party_codec_by_entry_point(entry_point: Any) -> None:
    with pytest.raises(kvzip.CodecNotFoundError, match="no codec is named 'zlib'"):
        kvzip.get_codec("zlib")
    entry_point("zlib", f"{__name__}:ZlibCodec")
    assert "zlib" in registry.codec_names()
    x = np.zeros((16, 2, 8), np.float32)
    record = kvzip.encode(x, bound=ErrorBound.lossless(), codec="zlib", layout="NHD")
    assert kvzip.read_header(record).codec == "zlib"
    assert len(record) < x.nbytes
    assert np.array_equal(kvzip.decode(record), x)


def test_a_third_party_codec_in_the_engine(clean_registry: None) -> None:
    kvzip.register_codec(ZlibCodec())
    pages = np.random.default_rng(0).integers(0, 9, (5, 16, 2, 8)).astype(np.uint16)
    want = pages.copy()
    with kvzip.SwapEngine(1 << 20, codec="zlib") as engine:
        engine.store([bytes([i]) for i in range(5)], kvzip.BlockView([pages], "NHD", dtype="bfloat16"))
        pages[:] = 0xA5A5
        engine.load([bytes([i]) for i in range(5)], kvzip.BlockView([pages], "NHD", dtype="bfloat16"))
        assert engine.stats().ratio > 1
    assert np.array_equal(pages, want)


def test_an_entry_point_that_gives_something_else(entry_point: Any) -> None:
    entry_point("other", f"{__name__}:ZlibCodec")  # its codec calls itself zlib
    with pytest.raises(kvzip.CodecNotFoundError, match="'other'"):
        kvzip.get_codec("other")


def test_the_kit_needs_numpy_alone() -> None:
    code = (
        "import sys; import kvzip.testing as t; import kvzip; t.check_codec(kvzip.get_codec('raw'));"
        "loaded = {'pytest', 'hypothesis', 'torch', 'triton'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---- codecs that break one


class GoodCodec(ZlibCodec):
    """The base of the broken codecs below: it keeps every promise. Lossy, so that all bounds are tried."""

    name: ClassVar[str] = "good"
    lossless_only: ClassVar[bool] = False


class OutOfBound(GoodCodec):
    """Cuts one more bit of each mantissa than the smallest bounds allow."""

    def encode_page(self, values: Bits, dtype: DType, request: EncodeRequest) -> bytes | None:
        keep = values if dtype is DType.OPAQUE else values & ~values.dtype.type(1)
        return zlib.compress(keep.tobytes())


class JustOutOfBound(GoodCodec):
    """Moves values by the next number above an absolute bound; exact otherwise."""

    def encode_page(self, values: Bits, dtype: DType, request: EncodeRequest) -> bytes | None:
        moved = values
        if dtype is DType.FLOAT32 and request.bound == ErrorBound.absolute(0.5):
            x = values.view(np.float32)
            y = np.where(np.abs(x) < 1e3, np.nan_to_num(x) + np.float32(0.5 * (1 + 2.0**-20)), x)
            moved = np.where(np.isfinite(x), y.view(np.uint32), values)
        return zlib.compress(moved.tobytes())


class DropsNanPayload(GoodCodec):
    """Every NaN comes back as the usual one."""

    def encode_page(self, values: Bits, dtype: DType, request: EncodeRequest) -> bytes | None:
        if dtype is DType.FLOAT16:
            values = np.where(np.isnan(values.view(np.float16)), values.dtype.type(0x7E00), values)
        return zlib.compress(values.tobytes())


class LosesTheSignOfZero(GoodCodec):
    """Within any bound, but not lossless."""

    def encode_page(self, values: Bits, dtype: DType, request: EncodeRequest) -> bytes | None:
        if dtype is DType.BFLOAT16:
            values = np.where(values == 0x8000, values.dtype.type(0), values)
        return zlib.compress(values.tobytes())


class LossyOnBytes(GoodCodec):
    """Takes opaque bytes for numbers."""

    def encode_page(self, values: Bits, dtype: DType, request: EncodeRequest) -> bytes | None:
        return zlib.compress((values & np.uint8(0xFE) if dtype is DType.OPAQUE else values).tobytes())


class PromisesTooLittle(RawCodec):
    name: ClassVar[str] = "broken"

    def max_payload_bytes(self, layout: BlockLayout) -> int:
        return super().max_payload_bytes(layout) - ALIGNMENT or ALIGNMENT


class PromisesOddBytes(RawCodec):
    name: ClassVar[str] = "broken"

    def max_payload_bytes(self, layout: BlockLayout) -> int:
        return super().max_payload_bytes(layout) + 1


class GivesOddPayloads(RawCodec):
    name: ClassVar[str] = "broken"

    def encode_blocks(self, blocks: BlockView, request: EncodeRequest, out: Bytes) -> Any:
        tables, sizes = super().encode_blocks(blocks, request, out)
        return tables, sizes - np.uint64(1)


class WritesPastItsOutput(RawCodec):
    """By address, as native code would."""

    name: ClassVar[str] = "broken"

    def encode_blocks(self, blocks: BlockView, request: EncodeRequest, out: Bytes) -> Any:
        result = super().encode_blocks(blocks, request, out)
        import ctypes

        (ctypes.c_uint8 * 16).from_address(out.ctypes.data + out.nbytes)[3] = 1
        return result


class LeavesGapsInTheTable(RawCodec):
    name: ClassVar[str] = "broken"

    def encode_blocks(self, blocks: BlockView, request: EncodeRequest, out: Bytes) -> Any:
        tables, sizes = super().encode_blocks(blocks, request, out)
        if tables.shape[1] > 1:
            tables["offset"][:, -1] += 1
        return tables, sizes


class ForgetsTheKind(RawCodec):
    name: ClassVar[str] = "broken"

    def encode_blocks(self, blocks: BlockView, request: EncodeRequest, out: Bytes) -> Any:
        tables, sizes = super().encode_blocks(blocks, request, out)
        tables["kind"] = 0
        return tables, sizes


class ChangesItsInput(RawCodec):
    name: ClassVar[str] = "broken"

    def encode_blocks(self, blocks: BlockView, request: EncodeRequest, out: Bytes) -> Any:
        result = super().encode_blocks(blocks, request, out)
        blocks.page(0, 0)[0, 0, 0] ^= 1
        return result


class LeavesPaddingUnwritten(RawCodec):
    """The bytes depend on what the output held before, where a page is no multiple of 16 bytes."""

    name: ClassVar[str] = "broken"

    def encode_blocks(self, blocks: BlockView, request: EncodeRequest, out: Bytes) -> Any:
        before = out.copy()
        tables, sizes = super().encode_blocks(blocks, request, out)
        for b in range(len(blocks)):
            for entry in tables[b]:
                end = int(entry["offset"]) * ALIGNMENT + int(entry["size"])
                out[b, end : align(end)] = before[b, end : align(end)]
        return tables, sizes


class DependsOnThreads(GoodCodec):
    def encode_page(self, values: Bits, dtype: DType, request: EncodeRequest) -> bytes | None:
        return zlib.compress(values.tobytes(), 9 if request.threads == 3 else 1)


class DependsOnTheBatch(GoodCodec):
    def encode_blocks(self, blocks: BlockView, request: EncodeRequest, out: Bytes) -> Any:
        self._first = True
        return super().encode_blocks(blocks, request, out)

    def encode_page(self, values: Bits, dtype: DType, request: EncodeRequest) -> bytes | None:
        level, self._first = (9 if self._first else 1), False
        return zlib.compress(values.tobytes(), level)


class DependsOnTheOrderInMemory(GoodCodec):
    def encode_blocks(self, blocks: BlockView, request: EncodeRequest, out: Bytes) -> Any:
        s = blocks.layout.segments[0]
        self._level = 9 if s.token_stride_bytes > s.head_stride_bytes else 1
        return super().encode_blocks(blocks, request, out)

    def encode_page(self, values: Bits, dtype: DType, request: EncodeRequest) -> bytes | None:
        return zlib.compress(values.tobytes(), self._level)


class DecodesOtherValuesWithThreads(GoodCodec):
    def decode_blocks(
        self, blocks: BlockView, payloads: Sequence[Bytes], tables: Sequence[Table], *, threads: int = 0
    ) -> None:
        super().decode_blocks(blocks, payloads, tables)
        if threads == 3:
            blocks.page(len(blocks) - 1, 0)[0, 0, 0] ^= 1


class NeedsAlignedPayloads(RawCodec):
    name: ClassVar[str] = "broken"

    def decode_blocks(
        self, blocks: BlockView, payloads: Sequence[Bytes], tables: Sequence[Table], *, threads: int = 0
    ) -> None:
        if any(p.ctypes.data % 2 for p in payloads):
            raise ValueError("a payload is not aligned")
        super().decode_blocks(blocks, payloads, tables)


class SkipsZeros(GoodCodec):
    """Leaves out the values that it takes the memory to hold already."""

    def decode_blocks(
        self, blocks: BlockView, payloads: Sequence[Bytes], tables: Sequence[Table], *, threads: int = 0
    ) -> None:
        pages = iter(self._decode(blocks.layout, payloads, tables))
        for b in range(len(blocks)):
            for s in range(len(blocks.layout.segments)):
                page = blocks.page(b, s)
                values = next(pages).view(page.dtype).reshape(page.shape)
                page[...] = np.where(values == 0, page, values)


class WritesTheNextToken(RawCodec):
    """Writes where a gap, or the next block, lies in memory."""

    name: ClassVar[str] = "broken"

    def decode_blocks(
        self, blocks: BlockView, payloads: Sequence[Bytes], tables: Sequence[Table], *, threads: int = 0
    ) -> None:
        super().decode_blocks(blocks, payloads, tables)
        import ctypes

        page = blocks.page(len(blocks) - 1, 0)
        past = sum((n - 1) * s for n, s in zip(page.shape, page.strides, strict=True)) + page.itemsize
        (ctypes.c_uint8 * 1).from_address(page.ctypes.data + past)[0] ^= 0xFF


class WritesAnotherBlock(RawCodec):
    name: ClassVar[str] = "broken"

    def decode_blocks(
        self, blocks: BlockView, payloads: Sequence[Bytes], tables: Sequence[Table], *, threads: int = 0
    ) -> None:
        super().decode_blocks(blocks, payloads, tables)
        others = set(range(blocks.num_blocks)) - set(blocks.block_ids.tolist())
        if others:
            blocks[[min(others)]].page(0, 0)[...] = 0


class ChecksNothing(RawCodec):
    """Damaged bytes end in whatever NumPy says."""

    name: ClassVar[str] = "broken"

    def _decode_segment(self, segment: Any, payload: Bytes, entry: Any) -> Bits:
        start = int(entry["offset"]) * ALIGNMENT
        return payload[start : start + int(entry["size"])].view(segment.dtype.numpy_bits)


class BelievesEverything(RawCodec):
    """Never refuses: it makes up what is missing, so that it leaves what is there in memory."""

    name: ClassVar[str] = "broken"

    def decode_blocks(
        self, blocks: BlockView, payloads: Sequence[Bytes], tables: Sequence[Table], *, threads: int = 0
    ) -> None:
        for b, (payload, table) in enumerate(zip(payloads, tables, strict=True)):
            for s, segment in enumerate(blocks.layout.segments):
                start = int(table[s]["offset"]) * ALIGNMENT
                data = payload[start : start + segment.nbytes]
                page = blocks.page(b, s)
                if data.size == segment.nbytes:
                    page[...] = data.view(page.dtype).reshape(page.shape)

    def validate_blocks(self, layout: BlockLayout, payloads: Sequence[Bytes], tables: Sequence[Table]) -> None:
        return


class WritesBeforeItChecks(GoodCodec):
    """Block after block, so that a damaged one is found when others were written."""

    def decode_blocks(
        self, blocks: BlockView, payloads: Sequence[Bytes], tables: Sequence[Table], *, threads: int = 0
    ) -> None:
        for b in range(len(blocks)):
            one = blocks[blocks.block_ids[b : b + 1]]
            super().decode_blocks(one, payloads[b : b + 1], tables[b : b + 1])


class ValidatesNothing(GoodCodec):
    """`decode_blocks` is right, `validate_blocks` is not: the engine relies on it when a batch mixes codecs."""

    def validate_blocks(self, layout: BlockLayout, payloads: Sequence[Bytes], tables: Sequence[Table]) -> None:
        return


class RefusesIntactBytes(GoodCodec):
    def validate_blocks(self, layout: BlockLayout, payloads: Sequence[Bytes], tables: Sequence[Table]) -> None:
        raise CorruptRecordError("no")


class BrokenByDamage(GoodCodec):
    """After a damaged payload, it decodes zeros."""

    _damaged = False

    def _decode(self, layout: BlockLayout, payloads: Sequence[Bytes], tables: Sequence[Table]) -> list[Bits]:
        try:
            pages = super()._decode(layout, payloads, tables)
        except CorruptRecordError:
            self._damaged = True
            raise
        return [np.zeros_like(p) for p in pages] if self._damaged else pages


class Learns(GoodCodec):
    """Compresses better from the five-hundredth batch on."""

    def __init__(self) -> None:
        self._calls = 0

    def encode_blocks(self, blocks: BlockView, request: EncodeRequest, out: Bytes) -> Any:
        self._calls += 1
        return super().encode_blocks(blocks, request, out)

    def encode_page(self, values: Bits, dtype: DType, request: EncodeRequest) -> bytes | None:
        return zlib.compress(values.tobytes(), 1 if self._calls < 500 else 9)


class SharesScratch(GoodCodec):
    """One buffer for all threads."""

    def __init__(self) -> None:
        self._scratch = b""

    def encode_page(self, values: Bits, dtype: DType, request: EncodeRequest) -> bytes | None:
        self._scratch = zlib.compress(values.tobytes(), 1)
        threading.Event().wait(1e-5 if threading.current_thread() is not threading.main_thread() else 0)
        return self._scratch


class NamelessCodec(RawCodec):
    name: ClassVar[str] = ""


class ModelessCodec(RawCodec):
    name: ClassVar[str] = "broken"
    modes: ClassVar[tuple[str, ...]] = ()


class TakesAnyMode(RawCodec):
    name: ClassVar[str] = "broken"

    def check_mode(self, mode: str) -> str:
        return mode


class GivesAList(RawCodec):
    name: ClassVar[str] = "broken"

    def encode_blocks(self, blocks: BlockView, request: EncodeRequest, out: Bytes) -> Any:
        tables, sizes = super().encode_blocks(blocks, request, out)
        return tables, sizes.tolist()


class FailsOnNan(GoodCodec):
    def encode_page(self, values: Bits, dtype: DType, request: EncodeRequest) -> bytes | None:
        if dtype is DType.FLOAT32 and np.isnan(values.view(np.float32)).any():
            raise ValueError("NaN")
        return super().encode_page(values, dtype, request)


BROKEN: list[tuple[type[kvzip.Codec], str]] = [
    (OutOfBound, "promise 1 (bound)"),
    (JustOutOfBound, "promise 1 (bound)"),
    (DropsNanPayload, "promise 1 (bound)"),
    (LosesTheSignOfZero, "promise 1 (bound)"),
    (LossyOnBytes, "promise 1 (bound)"),
    (PromisesTooLittle, "promise 2 (size)"),
    (PromisesOddBytes, "promise 2 (size)"),
    (GivesOddPayloads, "promise 2 (size)"),
    (WritesPastItsOutput, "promise 2 (size)"),
    (LeavesGapsInTheTable, "promise 2 (size)"),
    (ForgetsTheKind, "promise 0 (interface)"),
    (ChangesItsInput, "promise 4 (completeness)"),
    (LeavesPaddingUnwritten, "promise [35] "),
    (DependsOnThreads, "promise 3 (determinism)"),
    (DependsOnTheBatch, "promise 3 (determinism)"),
    (DependsOnTheOrderInMemory, "promise 3 (determinism)"),
    (DecodesOtherValuesWithThreads, "promise 3 (determinism)"),
    (NeedsAlignedPayloads, "promise 0 (interface)"),
    (SkipsZeros, "promise 4 (completeness)"),
    (WritesTheNextToken, "promise 4 (completeness)"),
    (WritesAnotherBlock, "promise 4 (completeness)"),
    (ChecksNothing, "promise 5 (hostile bytes)"),
    (BelievesEverything, "promise 5 (hostile bytes)"),
    (WritesBeforeItChecks, "promise 5 (hostile bytes)"),
    (ValidatesNothing, "promise 5 (hostile bytes)"),
    (RefusesIntactBytes, "promise 5 (hostile bytes)"),
    (BrokenByDamage, "promise 6 (no state)"),
    (Learns, "promise [36] "),
    (SharesScratch, "promise 6 (no state)"),
    (NamelessCodec, "promise 0 (interface)"),
    (ModelessCodec, "promise 0 (interface)"),
    (TakesAnyMode, "promise 0 (interface)"),
    (GivesAList, "promise 0 (interface)"),
    (FailsOnNan, "promise 0 (interface)"),
]


@pytest.mark.parametrize(("codec", "promise"), BROKEN, ids=[c.__name__ for c, _ in BROKEN])
def test_the_kit_catches(codec: type[kvzip.Codec], promise: str) -> None:
    pattern = promise if "[" in promise else promise.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(AssertionError, match=pattern) as caught:
        check_codec(codec())
    message = str(caught.value)
    assert repr(codec.name) in message
    assert "seed 0" in message


def test_a_message_says_what_broke_and_with_what_input() -> None:
    with pytest.raises(AssertionError) as caught:
        check_codec(JustOutOfBound(), seed=5)
    message = str(caught.value)
    for part in ("'good'", "float32", "mode none", "bound abs:0.5", "seed 5", "came back as", "tokens x"):
        assert part in message, message


def test_every_promise_of_the_contract_has_a_broken_codec() -> None:
    assert {f"promise {number}" for number in range(1, 7)} <= {promise.partition(" (")[0] for _, promise in BROKEN}


def test_what_is_no_codec() -> None:
    with pytest.raises(AssertionError, match=r"no kvzip\.Codec"):
        check_codec(RawCodec)  # type: ignore[arg-type]
