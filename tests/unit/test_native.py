# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The native library below the codecs: its loader, its arguments, threads and instruction sets, damage, comparison."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvzip import _config, _cuda, _native
from kvzip.errors import (
    BackendUnavailableError,
    ConfigError,
    CorruptRecordError,
    LayoutError,
    NativeError,
)
from kvzip.record import ENTRY_DTYPE, Coding, Reason
from kvzip.types import BlockLayout, BlockView, DType, ErrorBound, SegmentLayout

Bits = npt.NDArray[Any]

REL = ErrorBound.relative(1e-3)
CODINGS = (Coding.FIXED, Coding.PLAIN, Coding.OUTLIER, Coding.LOSSLESS)
DTYPES = (DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32)
GROUPS = (16, 8, 4, 2, 1)


def to_bits(x: npt.NDArray[np.float32], dtype: DType) -> Bits:
    if dtype is DType.FLOAT16:
        return x.astype(np.float16).view(np.uint16)
    if dtype is DType.BFLOAT16:
        return ((x.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
    return x.view(np.uint32)


def to_float(bits: Bits, dtype: DType) -> npt.NDArray[np.float64]:
    if dtype is DType.FLOAT16:
        return bits.view(np.float16).astype(np.float64)
    if dtype is DType.BFLOAT16:
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(np.float32).astype(np.float64)


def kv_like(shape: tuple[int, ...], seed: int = 0) -> npt.NDArray[np.float32]:
    """Like a K cache [blocks, tokens, heads, head_dim]: channels of their own mean and scale, a few of them large."""
    rng = np.random.default_rng(seed)
    channels = (1, 1, *shape[2:])
    scale = np.exp(rng.normal(0, 0.7, channels))
    x = rng.normal(0, 1, channels) * scale + rng.normal(0, 0.5, shape) * scale
    return x.astype(np.float32)


def view_of(bits: Bits, dtype: DType, dims: str = "NHD", group_tokens: int | None = None) -> BlockView:
    name = dtype.name.lower()
    layout = BlockLayout.from_tensors([bits], dims, dtype=name)
    if group_tokens is not None:
        s = layout.segments[0]
        layout = BlockLayout(
            (
                SegmentLayout(
                    0,
                    dtype,
                    s.tokens,
                    s.heads,
                    s.head_dim,
                    s.offset_bytes,
                    s.token_stride_bytes,
                    s.head_stride_bytes,
                    group_tokens=group_tokens,
                ),
            )
        )
    return BlockView([bits], layout)


class Batch:
    """A view encoded by the native CPU codec."""

    def __init__(
        self, view: BlockView, bound: ErrorBound = REL, coding: Coding = Coding.FIXED, threads: int = 1
    ) -> None:
        self.view = view
        self.segments = _native.segments_array(view, bound, coding)
        self.out = np.full((len(view), _native.max_payload_bytes(self.segments)), 0xA5, np.uint8)
        self.table, self.sizes = _native.cpu_encode(self.segments, view.block_ids, self.out, threads=threads)

    @property
    def payloads(self) -> list[Bits]:
        return [self.out[i, : int(n)].copy() for i, n in enumerate(self.sizes)]

    def decode_into(self, view: BlockView, threads: int = 1) -> None:
        _native.cpu_decode(_native.segments_array(view), view.block_ids, self.payloads, self.table, threads=threads)

    def same_bytes(self, other: Batch) -> bool:
        return (
            bool((self.table == other.table).all())
            and bool((self.sizes == other.sizes).all())
            and all((a == b).all() for a, b in zip(self.payloads, other.payloads, strict=True))
        )


@pytest.fixture
def isa() -> Iterator[None]:
    """Give the best instruction set back after a test that changes it."""
    yield
    _native.set_cpu_isa("auto")


# ---- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", CODINGS, ids=lambda c: c.name.lower())
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name.lower())
@pytest.mark.parametrize("group_tokens", GROUPS)
@pytest.mark.parametrize(
    "shape", [(2, 16, 2, 64), (1, 17, 3, 20), (1, 5, 1, 7), (2, 33, 1, 33), (1, 1, 1, 100)], ids=str
)
def test_round_trip_keeps_the_bound(
    coding: Coding, dtype: DType, group_tokens: int, shape: tuple[int, ...], isa: None
) -> None:
    bits = to_bits(kv_like(shape), dtype).copy()
    bound = ErrorBound.lossless() if coding is Coding.LOSSLESS else REL
    view = view_of(bits, dtype, group_tokens=group_tokens)
    batches = []
    for name in _native.cpu_isas():
        _native.set_cpu_isa(name)
        batch = Batch(view, bound, coding)
        batches.append(batch)
        assert batch.same_bytes(batches[0]), f"{name} writes other bytes than {_native.cpu_isas()[0]}"
        for reader in _native.cpu_isas():
            _native.set_cpu_isa(reader)
            out = np.full_like(bits, 0x5A5A)
            batch.decode_into(view_of(out, dtype, group_tokens=group_tokens))
            for b in range(shape[0]):
                applied = float(batch.table["bound"][b, 0])
                a, c = to_float(bits[b], dtype), to_float(out[b], dtype)
                assert np.abs(a - c).max() <= applied
                if applied:
                    assert applied <= 1e-3 * (a.max() - a.min())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name.lower())
@pytest.mark.parametrize("coding", CODINGS, ids=lambda c: c.name.lower())
def test_special_values_come_back_bit_for_bit(dtype: DType, coding: Coding) -> None:
    rng = np.random.default_rng(1)
    bits = rng.integers(
        0, 2 ** (8 * dtype.itemsize), (8, 16, 1, 48), dtype.numpy_bits
    )  # NaNs with payloads, Inf, subnormals
    bits[1] &= 0x007F if dtype is DType.BFLOAT16 else 0x03FF  # subnormals alone
    bits[2] |= dtype.numpy_bits.type({0: 0x7F80, 1: 0x7C00, 2: 0x7F800000}[int(dtype)])  # no finite value
    bits[3] = to_bits(kv_like((1, 16, 1, 48)), dtype)[0]
    bits[3, 7, 0, 5] = {0: 0x7FC1, 1: 0x7E01, 2: 0x7FC00001}[int(dtype)]  # a lone NaN
    for bound in (ErrorBound.relative(1e-2), ErrorBound.absolute(0.5), ErrorBound.lossless()):
        batch = Batch(view_of(bits, dtype), bound, coding)
        out = np.zeros_like(bits)
        batch.decode_into(view_of(out, dtype))
        applied = batch.table["bound"].astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            a, c = to_float(bits, dtype), to_float(out, dtype)
            finite = np.isfinite(a)
            assert (bits[~finite] == out[~finite]).all()
            error = np.where(finite, np.abs(a - c), 0).reshape(len(bits), -1).max(1)
        assert (error <= applied[:, 0]).all()
        exact = applied[:, 0] == 0
        assert (bits[exact] == out[exact]).all()


def test_a_page_never_takes_more_than_raw_and_says_why() -> None:
    rng = np.random.default_rng(2)
    noise = rng.integers(0, 2**16, (1, 16, 2, 64), np.uint16)
    batch = Batch(view_of(noise, DType.BFLOAT16), ErrorBound.lossless(), Coding.LOSSLESS)
    assert batch.table[0, 0]["coding"] == Coding.RAW
    assert batch.table[0, 0]["reason"] == Reason.INCOMPRESSIBLE
    assert batch.sizes[0] == noise.nbytes
    out = np.zeros_like(noise)
    batch.decode_into(view_of(out, DType.BFLOAT16))
    assert (out == noise).all()


def test_equal_values_take_four_bytes() -> None:
    bits = np.full((1, 16, 2, 64), 0x8000, np.uint16)
    batch = Batch(view_of(bits, DType.BFLOAT16))
    assert tuple(batch.table[0, 0])[1:4] == (4, 0.0, Coding.CONSTANT)
    assert batch.sizes[0] == 16
    out = np.zeros_like(bits)
    batch.decode_into(view_of(out, DType.BFLOAT16))
    assert (out == bits).all()


def test_opaque_bytes_are_constant_or_raw() -> None:
    data = np.arange(3 * 100, dtype=np.uint8).reshape(3, 100)
    data[1] = 7
    view = BlockView([data], BlockLayout.opaque([data], dtype="opaque"))
    batch = Batch(view)
    assert batch.table["coding"][:, 0].tolist() == [Coding.RAW, Coding.CONSTANT, Coding.RAW]
    assert batch.table["reason"][:, 0].tolist() == [Reason.OPAQUE_DTYPE, 0, Reason.OPAQUE_DTYPE]
    out = np.zeros_like(data)
    batch.decode_into(BlockView([out], view.layout))
    assert (out == data).all()


def test_raw_asked_for_is_raw() -> None:
    bits = np.zeros((1, 16, 1, 8), np.uint16)
    batch = Batch(view_of(bits, DType.BFLOAT16), REL, Coding.RAW)
    assert batch.table[0, 0]["coding"] == Coding.RAW
    assert batch.table[0, 0]["reason"] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name.lower())
def test_orders_and_strides_do_not_change_the_bytes(dtype: DType) -> None:
    nhd = to_bits(kv_like((2, 16, 4, 40)), dtype).copy()
    hnd = np.ascontiguousarray(nhd.transpose(0, 2, 1, 3))
    wide = np.zeros((2, 16, 4, 56), nhd.dtype)
    wide[..., :40] = nhd
    plain = Batch(view_of(nhd, dtype, "NHD"))
    assert plain.same_bytes(Batch(view_of(hnd, dtype, "HND")))
    assert plain.same_bytes(Batch(view_of(wide[..., :40], dtype, "NHD")))
    into = np.full_like(hnd, 0x5A5A)
    plain.decode_into(view_of(into, dtype, "HND"))
    same = np.zeros_like(nhd)
    plain.decode_into(view_of(same, dtype, "NHD"))
    assert (into.transpose(0, 2, 1, 3) == same).all()


@pytest.mark.parametrize("offset", [1, 2, 3, 6])
def test_addresses_need_no_alignment(offset: int) -> None:
    bits = to_bits(kv_like((2, 16, 2, 40)), DType.BFLOAT16)
    aligned = Batch(view_of(bits, DType.BFLOAT16))
    memory = np.zeros(bits.nbytes + 64, np.uint8)
    shifted = np.ndarray(bits.shape, np.uint16, memory.data, offset)
    shifted[...] = bits
    batch = Batch(view_of(shifted, DType.BFLOAT16))
    assert batch.same_bytes(aligned)
    payloads = []
    for payload in batch.payloads:
        odd = np.zeros(payload.size + 64, np.uint8)[offset : offset + payload.size]
        odd[:] = payload
        payloads.append(odd)
    shifted[...] = 0
    view = view_of(shifted, DType.BFLOAT16)
    _native.cpu_decode(_native.segments_array(view), view.block_ids, payloads, batch.table)
    expected = np.zeros_like(bits)
    aligned.decode_into(view_of(expected, DType.BFLOAT16))
    assert (shifted == expected).all()
    assert not memory[:offset].any()
    assert not memory[offset + bits.nbytes :].any()


def test_every_page_may_have_a_bound_of_its_own() -> None:
    bits = to_bits(kv_like((1, 2, 16, 64)).reshape(1, 2, 16, 1, 64), DType.BFLOAT16)
    view = BlockView([bits], "2NHD", dtype="bfloat16")
    bounds = [ErrorBound.absolute(0.5), ErrorBound.lossless()]
    segments = _native.segments_array(view, bounds, [Coding.FIXED, Coding.LOSSLESS])
    out = np.zeros((1, _native.max_payload_bytes(segments)), np.uint8)
    table, _ = _native.cpu_encode(segments, view.block_ids, out)
    assert table["coding"].tolist() == [[Coding.FIXED, Coding.LOSSLESS]]
    assert table["bound"].tolist() == [[0.5, 0.0]]
    assert table["kind"].tolist() == [[1, 2]]
    with pytest.raises(ConfigError, match="one a page"):
        _native.segments_array(view, bounds[:1], Coding.FIXED)


# ---- threads and instruction sets ----------------------------------------------------------------------------------


def many_pages(blocks: int = 5) -> BlockView:
    tensors = [to_bits(kv_like((blocks, 16, 2, 72), seed), DType.BFLOAT16) for seed in range(7)]
    tensors[3][1] = 0x3F80  # a constant page among them
    return BlockView(tensors, "NHD", dtype="bfloat16")


@pytest.mark.parametrize("coding", CODINGS, ids=lambda c: c.name.lower())
def test_threads_and_instruction_sets_do_not_change_the_bytes(coding: Coding, isa: None) -> None:
    bound = ErrorBound.lossless() if coding is Coding.LOSSLESS else REL
    first: Batch | None = None
    for name in _native.cpu_isas():
        _native.set_cpu_isa(name)
        assert _native.cpu_isa() == name
        for threads in (1, 2, 3, 16, 0):
            batch = Batch(many_pages(), bound, coding, threads)
            first = first or batch
            assert batch.same_bytes(first), (name, threads)


def test_calls_from_many_threads_at_once() -> None:
    view = many_pages()
    expected = Batch(view)
    failures: list[str] = []

    def work() -> None:
        for _ in range(20):
            batch = Batch(view, threads=3)
            if not batch.same_bytes(expected):
                failures.append("bytes differ")

    workers = [threading.Thread(target=work) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_its_own_workers() -> None:
    view = many_pages()
    expected = Batch(view, threads=4)
    child = os.fork()
    if child == 0:
        os._exit(0 if Batch(view, threads=4).same_bytes(expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_flushing_of_subnormals_in_the_host_program_changes_nothing() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 0x200, (2, 16, 1, 64), np.uint16)
    for dtype in (DType.BFLOAT16, DType.FLOAT16):
        expected = Batch(view_of(bits, dtype), ErrorBound.absolute(1e-28 if dtype is DType.BFLOAT16 else 1e-6))
        if not torch.set_flush_denormal(True):
            pytest.skip("this machine cannot flush subnormal numbers")
        try:
            batch = Batch(view_of(bits, dtype), ErrorBound.absolute(1e-28 if dtype is DType.BFLOAT16 else 1e-6))
            out = np.zeros_like(bits)
            batch.decode_into(view_of(out, dtype))
        finally:
            torch.set_flush_denormal(False)
        assert batch.same_bytes(expected)
        assert (np.abs(to_float(out, dtype) - to_float(bits, dtype)) <= expected.table["bound"].max()).all()


def test_no_thread_before_it_is_needed() -> None:
    code = (
        "import os, kvzip\n"
        "from kvzip import _native\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = count(); _native.library(); after = count()\n"
        "assert before == after, (before, after)\n"
    )
    if not Path("/proc/self/task").is_dir():
        pytest.skip("threads are counted in /proc")
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- damage --------------------------------------------------------------------------------------------------------


def refused(batch: Batch, payloads: list[Bits], table: Bits, view: BlockView | None = None) -> bool:
    """Is the damage refused, by validation as by decoding, with nothing written?"""
    view = view or batch.view
    out = [np.full(t.shape, 0x5A, t.dtype) for t in view.tensors]
    into = BlockView(out, view.layout, view.block_ids)
    segments = _native.segments_array(into)
    try:
        _native.cpu_validate(_native.segments_array(view.layout), payloads, table)
        valid = True
    except CorruptRecordError:
        valid = False
    try:
        _native.cpu_decode(segments, into.block_ids, payloads, table)
        assert valid, "decoded what validation refuses"
    except CorruptRecordError:
        assert not valid, "refused what validation passes"
        assert all((t == 0x5A).all() for t in out), "a refused payload changed memory"
    return not valid


def test_every_damaged_table_field_is_refused() -> None:
    batch = Batch(many_pages(2))
    assert not refused(batch, batch.payloads, batch.table)
    pages = batch.table.shape[1]
    for field, wrong in [
        ("offset", lambda v: v + 1),
        ("size", lambda v: v + 1),
        ("size", lambda v: v - 2),
        ("size", lambda v: 0),
        ("size", lambda v: 2**32 - 1),
        ("coding", lambda v: 6),
        ("coding", lambda v: 255),
        ("bound", lambda v: np.nan),
        ("bound", lambda v: 0.0),
        ("bound", lambda v: -1.0),
        ("bound", lambda v: np.inf),
    ]:
        for page in range(pages):
            table = batch.table.copy()
            if field == "bound" and table[0, page]["coding"] != Coding.FIXED:
                continue
            table[1 if field != "bound" else 0, page][field] = wrong(table[1 if field != "bound" else 0, page][field])
            assert refused(batch, batch.payloads, table), (field, page)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name.lower())
@pytest.mark.parametrize("coding", CODINGS, ids=lambda c: c.name.lower())
def test_classes_that_do_not_exist_are_refused(dtype: DType, coding: Coding) -> None:
    bits = to_bits(kv_like((1, 16, 1, 25)), dtype)  # an odd number of groups
    bound = ErrorBound.lossless() if coding is Coding.LOSSLESS else ErrorBound.relative(1e-2)
    batch = Batch(view_of(bits, dtype), bound, coding)
    assert batch.table[0, 0]["coding"] == coding
    nibbles = coding is Coding.LOSSLESS or (coding is not Coding.OUTLIER and dtype is not DType.FLOAT32)
    used = 13 if nibbles else 25
    # wrong sizes or classes, class padding, the unused bit of a byte class
    for at, value in [
        (0, 0xEF),
        (0, 0x3E),
        (used, 1),
        (used - 1, 0xF0) if nibbles else (0, 0x80 | batch.payloads[0][0]),
    ]:
        payloads = batch.payloads
        payloads[0][at] = value
        assert refused(batch, payloads, batch.table), (at, value)
    payloads = batch.payloads  # padding behind the segment
    if int(batch.table[0, 0]["size"]) % 16:
        payloads[0][-1] = 1
        assert refused(batch, payloads, batch.table)


def test_the_first_bad_page_is_named() -> None:
    batch = Batch(many_pages(3), threads=0)
    table = batch.table.copy()
    table[2, 1]["size"] = 3
    table[1, 4]["size"] = 3
    with pytest.raises(CorruptRecordError, match=r"page 4 of block 1 .*nothing was written"):
        _native.cpu_validate(batch.segments, batch.payloads, table, threads=2)


@pytest.mark.parametrize("coding", CODINGS, ids=lambda c: c.name.lower())
def test_random_damage_is_refused_or_decodes(coding: Coding) -> None:
    rng = np.random.default_rng(4)
    for dtype in DTYPES:
        bound = ErrorBound.lossless() if coding is Coding.LOSSLESS else ErrorBound.relative(1e-2)
        batch = Batch(view_of(to_bits(kv_like((1, 16, 1, 40)), dtype), dtype), bound, coding)
        size = batch.payloads[0].size
        outcomes = set()
        for _ in range(200):
            payloads = batch.payloads
            table = batch.table.copy()
            if rng.random() < 0.3:
                table.view(np.uint8)[0, rng.integers(0, 16)] ^= np.uint8(1 << rng.integers(0, 8))
            for _ in range(rng.integers(0, 4)):
                near = size if rng.random() < 0.5 else 48
                payloads[0][rng.integers(0, near)] ^= np.uint8(1 << rng.integers(0, 8))
            if rng.random() < 0.2:
                payloads[0] = payloads[0][: rng.integers(0, size)].copy()
            outcomes.add(refused(batch, payloads, table))
        assert outcomes == {True, False}


# ---- arguments -----------------------------------------------------------------------------------------------------


def small() -> BlockView:
    return view_of(to_bits(kv_like((2, 16, 1, 32)), DType.BFLOAT16), DType.BFLOAT16)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", 0),
        ("heads", 0),
        ("head_dim", 0),
        ("tokens", 2**31),
        ("dtype", 4),
        ("group_tokens", 3),
        ("group_tokens", 0),
        ("kind", 3),
        ("base", 0),
        ("coding", 1),
        ("coding", 8),
        ("bound_kind", 4),
        ("bound_kind", 5),
        ("bound", 0.0),
        ("bound", -1.0),
        ("bound", np.nan),
        ("bound", np.inf),
    ],
)
def test_arguments_outside_their_contract_are_refused(field: str, value: float) -> None:
    view = small()
    segments = _native.segments_array(view, REL, Coding.FIXED)
    out = np.zeros((2, 2048), np.uint8)
    assert _native.max_segment_bytes(segments[:1]) == 1024
    segments[field] = value
    status = _native.library().kvz_cpu_encode(
        segments.ctypes.data,
        1,
        view.block_ids.ctypes.data,
        2,
        out.ctypes.data,
        2048,
        *[np.zeros(64).ctypes.data] * 2,
        1,
    )
    assert status == _native.INVALID_ARGUMENT
    assert not out.any()
    with pytest.raises(NativeError, match="outside its contract"):
        _native.check(status, "encoding")


def test_pages_whose_size_does_not_fit_the_table_are_refused() -> None:
    segments = _native.segments_array(small(), REL, Coding.FIXED)
    segments["dtype"], segments["tokens"], segments["head_dim"] = 2, 2**15, 2**15
    with pytest.raises(NativeError):
        _native.max_segment_bytes(segments)


def test_an_output_that_is_too_small_is_refused() -> None:
    view = small()
    segments = _native.segments_array(view, REL, Coding.FIXED)
    for out in (
        np.zeros((2, 1023), np.uint8),
        np.zeros((1, 1024), np.uint8),
        np.zeros((2, 2048), np.uint8)[:, ::2],
        np.zeros((2, 512), np.uint16),
        np.zeros(4096, np.uint8),
    ):
        with pytest.raises(LayoutError, match=r"at least \(2, 1024\)"):
            _native.cpu_encode(segments, view.block_ids, out)
    status = _native.library().kvz_cpu_encode(
        segments.ctypes.data, 1, view.block_ids.ctypes.data, 2, *[np.zeros(4096).ctypes.data] * 1, 1023, 1, 1, 1
    )
    assert status == _native.OUT_OF_SPACE


def test_payloads_and_tables_that_do_not_fit_are_refused() -> None:
    batch = Batch(small())
    view = batch.view
    with pytest.raises(LayoutError, match="1 payloads for 2 blocks"):
        _native.cpu_decode(batch.segments, view.block_ids, batch.payloads[:1], batch.table[:1])
    with pytest.raises(LayoutError, match="segment tables of shape"):
        _native.cpu_decode(batch.segments, view.block_ids, batch.payloads, batch.table[:1])
    with pytest.raises(LayoutError, match="contiguous uint8"):
        _native.cpu_validate(batch.segments, [p[::2] for p in batch.payloads], batch.table)
    with pytest.raises(ConfigError, match="threads"):
        _native.cpu_validate(batch.segments, batch.payloads, batch.table, threads=-1)


def test_empty_batches_do_nothing() -> None:
    view = small()[[]]
    segments = _native.segments_array(view, REL, Coding.FIXED)
    table, sizes = _native.cpu_encode(segments, view.block_ids, np.zeros((0, 1024), np.uint8))
    assert table.shape == (0, 1)
    assert sizes.size == 0
    _native.cpu_validate(segments, [], table)
    _native.cpu_decode(segments, view.block_ids, [], table)


# ---- comparison ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name.lower())
def test_compare_finds_the_largest_error(dtype: DType, isa: None) -> None:
    a = to_bits(kv_like((3, 16, 3, 100)), dtype).copy()
    b = to_bits(kv_like((3, 16, 3, 100)) + np.float32(0.01), dtype).copy()
    b[2] = a[2]
    error = np.abs(to_float(a, dtype) - to_float(b, dtype)).reshape(3, -1)
    x, y = view_of(a, dtype), view_of(np.ascontiguousarray(b[::-1].transpose(0, 2, 1, 3)), dtype, "HND")
    for name in _native.cpu_isas():
        _native.set_cpu_isa(name)
        errors, violations = _native.cpu_compare(
            _native.segments_array(x), x.block_ids, _native.segments_array(y), y.block_ids[::-1], np.float64(0.012)
        )
        assert errors[:, 0].tolist() == error.max(1).tolist()
        assert violations[:, 0].tolist() == (error > 0.012).sum(1).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name.lower())
def test_compare_wants_nonfinite_values_bit_for_bit(dtype: DType) -> None:
    nan, inf = {0: (0x7FC0, 0x7F80), 1: (0x7E00, 0x7C00), 2: (0x7FC00000, 0x7F800000)}[int(dtype)]
    a = np.zeros((4, 1, 1, 300), dtype.numpy_bits)
    a[0, ..., 5], a[1, ..., 299], a[2, ..., 0] = nan, inf, inf
    b = a.copy()
    b[1, ..., 299], b[2, ..., 0], b[3, ..., 7] = nan, 0, nan
    x, y = view_of(a, dtype), view_of(b, dtype)
    errors, violations = _native.cpu_compare(
        _native.segments_array(x), x.block_ids, _native.segments_array(y), y.block_ids, np.float64(1e30)
    )
    assert violations[:, 0].tolist() == [0, 1, 1, 1]
    assert errors[:, 0].tolist() == [0.0, 0.0, 0.0, np.inf]


def test_compare_refuses_other_geometry() -> None:
    x, y = small(), view_of(np.zeros((2, 32, 1, 16), np.uint16), DType.BFLOAT16)
    with pytest.raises(NativeError):
        _native.cpu_compare(
            _native.segments_array(x), x.block_ids, _native.segments_array(y), y.block_ids, np.float64(0)
        )
    with pytest.raises(LayoutError, match="as many"):
        _native.cpu_compare(
            _native.segments_array(x), x.block_ids[:1], _native.segments_array(x), x.block_ids, np.float64(0)
        )


# ---- the library itself --------------------------------------------------------------------------------------------


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(_native, "_library", None)
    monkeypatch.setattr(_native, "_library_path", None)
    return monkeypatch


def test_describe_says_what_was_loaded() -> None:
    said = _native.describe()
    assert Path(said["path"]).is_file()
    assert said["abi_version"] == _native.ABI_VERSION
    assert said["format_version"] == 1
    assert said["cpu_isa"] in said["build"]


def test_layout_of_the_structs() -> None:
    assert _native.SEGMENT_DTYPE.itemsize == 72
    assert _native.SEGMENT_DTYPE.fields is not None
    assert _native.SEGMENT_DTYPE.fields["bound"][1] == 48
    assert ENTRY_DTYPE.itemsize == 16


def test_a_missing_library_is_named(unloaded: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unloaded.setenv("KVZIP_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(BackendUnavailableError, match=r"none\.so.*unset it"):
        _native.library()


def test_a_broken_library_is_named(unloaded: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no ELF")
    unloaded.setenv("KVZIP_LIBRARY", str(broken))
    with pytest.raises(BackendUnavailableError, match="cannot be loaded"):
        _native.library()


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("unsigned kvz_abi_version(void) { return 999; }", f"ABI version 999, this kvzip needs {_native.ABI_VERSION}"),
        ("int nothing;", "not kvzip's native library"),
        (f"unsigned kvz_abi_version(void) {{ return {_native.ABI_VERSION}; }}", "has no kvz_.*another version"),
    ],
)
def test_another_version_is_refused(unloaded: pytest.MonkeyPatch, tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "other.c").write_text(source)
    library = tmp_path / "other.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "other.c")], check=True)
    unloaded.setenv("KVZIP_LIBRARY", str(library))
    with pytest.raises(BackendUnavailableError, match=message):
        _native.library()


@pytest.mark.parametrize(
    ("status", "code", "text", "words"),
    [
        (_native.NO_CUDA, 0, "", "built without CUDA: reinstall kvzip with KVZIP_CUDA=on"),
        (
            _native.CUDA_ERROR,
            35,
            "cudaErrorInsufficientDriver: too old",
            r"too old \(CUDA error 35\).*driver for CUDA 13",
        ),
        (_native.CUDA_ERROR, 100, "cudaErrorNoDevice: none", r"none.*machine with an NVIDIA GPU.*CUDA_VISIBLE_DEVICES"),
        (_native.CUDA_ERROR, 802, "cudaErrorSystemNotReady: wait", r"wait \(CUDA error 802\).*nvidia-smi"),
    ],
)
def test_a_gpu_that_cannot_be_used_says_why_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, status: int, code: int, text: str, words: str
) -> None:
    def last_error(into: Any, nbytes: int) -> int:
        into.value = text.encode()
        return code

    library = SimpleNamespace(kvz_cuda_available=lambda count: status, kvz_cuda_last_error=last_error)
    monkeypatch.setattr(_cuda, "_bind", lambda: library)
    monkeypatch.setattr(_cuda, "_driver", None)
    with pytest.raises(BackendUnavailableError, match=words):
        _cuda.driver()
    assert re.search(words, _cuda.unavailable())


def test_the_installed_library_is_found(unloaded: pytest.MonkeyPatch) -> None:
    unloaded.delenv("KVZIP_LIBRARY", raising=False)
    assert _native.find_library().name == _native.LIBRARY_NAME
    unloaded.setattr(_native, "LIBRARY_NAME", "libkvzip_other.so")
    with pytest.raises(BackendUnavailableError, match="pip install"):
        _native.find_library()


def test_sources_that_python_found_first_are_named(unloaded: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unloaded.delenv("KVZIP_LIBRARY", raising=False)
    unloaded.setattr(_native, "LIBRARY_NAME", "libkvzip_other.so")
    unloaded.setattr(sys.modules["kvzip"], "__path__", [str(tmp_path / "kvzip")])
    (tmp_path / "pyproject.toml").touch()
    with pytest.raises(BackendUnavailableError, match="start it in another one, or install with `pip"):
        _native.find_library()


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVZIP_THREADS", "3")
    assert _config.threads() == 3
    for wrong in ("-1", "many", "1000", "²"):
        monkeypatch.setenv("KVZIP_THREADS", wrong)
        with pytest.raises(ConfigError, match="KVZIP_THREADS"):
            _config.threads()
    monkeypatch.delenv("KVZIP_THREADS")
    assert _config.threads() == 0
    assert set(_config.describe()) == {"KVZIP_LIBRARY", "KVZIP_THREADS", "KVZIP_CPU_ISA"}


def test_instruction_sets_by_name(unloaded: pytest.MonkeyPatch, isa: None) -> None:
    with pytest.raises(ConfigError, match="baseline"):
        _native.set_cpu_isa("sse9")
    assert _native.cpu_isas()[0] == "baseline"
    unloaded.setattr(_native, "_library", None)
    unloaded.setenv("KVZIP_CPU_ISA", "mmx")
    with pytest.raises(ConfigError, match="KVZIP_CPU_ISA='mmx'"):
        _native.library()
    unloaded.setenv("KVZIP_CPU_ISA", "baseline")
    assert _native.cpu_isa() == "baseline"


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_only_the_c_interface_is_exported() -> None:
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", _native.describe()["path"]], check=True, capture_output=True, text=True
    ).stdout
    names = [line.split()[-1] for line in listing.splitlines()]
    assert [n for n in names if not n.startswith("kvz_")] == []
    assert set(_native._PROTOTYPES) <= set(names)


def test_status_strings_are_sentences() -> None:
    library = _native.library()
    texts = [library.kvz_status_string(ctypes.c_int32(s)) for s in range(8)]
    assert len(set(texts)) == 8
    assert all(len(t) > 5 for t in texts)
