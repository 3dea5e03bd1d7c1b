# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The Triton codec against the native CPU codec: identical bytes, identical pages, nothing written beside them.

On a machine without a GPU, Triton's interpreter runs the kernels on CPU tensors; with one, the GPU runs them. The
interpreter needs some tenths of a second for a page, so the pages here are small; tests/gpu has the large and the many.
"""

from __future__ import annotations

import subprocess
import sys

import adversarial
import numpy as np
import pytest
import reference_codec as ref
import triton_bridge as bridge
from bridge import layout_of
from triton_bridge import check_batch, check_hostile, codec, torch

from kvzip.errors import BackendUnavailableError, ConfigError, CorruptRecordError, LayoutError
from kvzip.record import Coding, Reason
from kvzip.types import BlockLayout, BlockView, BoundKind, ErrorBound

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes what a mask then drops
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
]

RELATIVE = ErrorBound.relative(1e-2)
LOSSLESS = ErrorBound.lossless()
DTYPES = {"bfloat16": ref.BF16, "float16": ref.FP16}


@pytest.fixture(autouse=True)
def _skip_where_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge.device()
    bridge.shorten_interpreter(monkeypatch)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 8 groups, 2 tiles a step: small pages then have many of both."""
    monkeypatch.setattr("kvzip.backends.triton.codec._TILE_GROUPS", 8)
    monkeypatch.setattr("kvzip.backends.triton.codec._LANES", 2)


def normal(seed: int, shape: tuple[int, ...], dtype: str = "bfloat16", scale: float = 1.0) -> bridge.Bits:
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return adversarial.from_float(values, DTYPES[dtype])


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", sorted(adversarial.FLAVOURS))
def test_flavours(flavour: str) -> None:
    """Every kind of page, with a relative, an absolute and a lossless bound."""
    seed = sum(map(ord, flavour))
    geometries = [
        ref.Geometry(16, 1, 9, ref.BF16, 16),
        ref.Geometry(16, 1, 9, ref.FP16, 16),
        ref.Geometry(3, 1, 21, seed % 2, 1),
    ]
    bases = [adversarial.page_bits(flavour, seed + i, g).reshape(1, g.tokens, 1, -1) for i, g in enumerate(geometries)]
    absolute = ErrorBound.absolute(2.0**-7 * (1 + seed % 8 / 8))
    check_batch(bases, layout_of(geometries), [ErrorBound.relative(10.0 ** -(seed % 4)), absolute, LOSSLESS])


@pytest.mark.parametrize("group_tokens", adversarial.GROUP_TOKENS)
def test_group_shapes_with_tails(group_tokens: int) -> None:
    """Groups that leave the page in both directions and lie in two heads."""
    geometries = [ref.Geometry(19, 3, 7, dtype, group_tokens) for dtype in (ref.BF16, ref.FP16)]
    bases = [normal(i, (1, 19, 3, 7), name) for i, name in enumerate(DTYPES)]
    table = check_batch(bases, layout_of(geometries), RELATIVE)
    assert set(table["coding"].ravel().tolist()) == {Coding.FIXED}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_and_the_ends_of_the_bound(dtype: str) -> None:
    """Groups of all widths 0 to 14, on both sides of every step's reach, and of the limits of the bound."""
    columns = []
    for power in range(13):
        for offset in (-0.6, -0.5, 0.0, 0.4):
            column = np.zeros(16)
            column[3], column[4] = 2.0**power + offset, -(2.0**power) - offset
            columns.append(column)
    columns += [np.full(16, 8191.0), np.full(16, 8191.4), np.full(16, -8191.5), np.full(16, 8192.0)]
    unit = 2.0**-12 if dtype == "float16" else 1.0
    base = adversarial.from_float(np.stack(columns, axis=1)[None, :, None, :] * unit, DTYPES[dtype])
    for value in (0.5, 0.6):
        check_batch([base], "NHD", ErrorBound.absolute(value * unit), dtype=dtype)


@pytest.mark.parametrize(
    "value", [2.0**-97, 2.0**-96 * (1 - 2.0**-40), 2.0**-96, 2.0**-25 * 1.9, 2.0**120, 1e300, 5e-324]
)
def test_extreme_bounds(value: float) -> None:
    geometries = [ref.Geometry(16, 1, 4, dtype, 16) for dtype in (ref.BF16, ref.FP16)]
    bases = [
        adversarial.page_bits("subnormal" if value < 1 else "largest", 5, g).reshape(1, 16, 1, -1) for g in geometries
    ]
    check_batch(bases, layout_of(geometries), ErrorBound(BoundKind.ABSOLUTE, value))


def test_ladder() -> None:
    """The pages take each way that the format has, for the reason that it names."""
    rng = np.random.default_rng(0)
    shape = (1, 16, 1, 16)
    cases = [
        (np.full(shape, 0x3F80, np.uint16), RELATIVE, Coding.CONSTANT, Reason.AS_ASKED),
        (normal(1, shape), RELATIVE, Coding.FIXED, Reason.AS_ASKED),
        (normal(2, shape), LOSSLESS, Coding.LOSSLESS, Reason.AS_ASKED),
        (normal(3, shape), ErrorBound.relative(1e-9), Coding.LOSSLESS, Reason.LOSSLESS_SMALLER),
        (rng.integers(0, 2, shape).astype(np.uint16) << 15, RELATIVE, Coding.LOSSLESS, Reason.BOUND_TOO_FINE),
        (rng.integers(0, 65536, shape).astype(np.uint16), ErrorBound.absolute(1e-9), Coding.RAW, Reason.INCOMPRESSIBLE),
    ]
    layout = layout_of([ref.Geometry(16, 1, 16, ref.BF16, 16)] * len(cases), kinds=[0, 1, 2, 0, 1, 2])
    table = check_batch([c[0] for c in cases], layout, [c[1] for c in cases])
    found = [(Coding(int(e["coding"])), Reason(int(e["reason"]))) for e in table[0]]
    assert found == [(c[2], c[3]) for c in cases]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("bound", [RELATIVE, LOSSLESS], ids=str)
def test_pages_of_many_tiles(bound: ErrorBound) -> None:
    noise = np.random.default_rng(1).integers(0, 65536, (1, 16, 3, 7)).astype(np.uint16)
    check_batch([normal(4, (1, 16, 3, 7)), noise], "NHD", bound)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_layouts_strides_and_block_numbers() -> None:
    """K and V in one tensor, heads outside of tokens, gaps between heads, blocks out of order."""
    check_batch([normal(5, (3, 2, 2, 16, 5))], "2HND", RELATIVE, [2, 0])
    check_batch(
        [normal(6, (2, 16, 4, 6), "float16")], "NHD", RELATIVE, [1], dtype="float16", select=lambda a: a[:, :, ::2]
    )
    check_batch([normal(7, (2, 5, 3, 8))], "NHD", RELATIVE, [1], select=lambda a: a[:, 1:, :, 2:7])


def test_mixed_dtypes_and_kinds_in_one_block() -> None:
    geometries = [
        ref.Geometry(16, 2, 4, ref.BF16, 16),
        ref.Geometry(1, 1, 70, ref.FP16, 1),
        ref.Geometry(8, 1, 6, ref.BF16, 8),
    ]
    bases = [normal(i, (2, g.tokens, g.heads, g.head_dim), list(DTYPES)[g.dtype]) for i, g in enumerate(geometries)]
    table = check_batch(bases, layout_of(geometries, kinds=[1, 2, 0]), [RELATIVE, LOSSLESS, ErrorBound.absolute(0.25)])
    assert table["kind"].tolist() == [[1, 2, 0]] * 2


def test_real_kv_data(kv_cache: bridge.Bits) -> None:
    """One block of the first layer of a real cache."""
    block = np.ascontiguousarray(kv_cache[0, :, 16:32, :1][None])
    table = check_batch([block], "2NHD", ErrorBound.relative(1e-3))
    assert set(table["coding"].ravel().tolist()) == {Coding.FIXED}
    assert table["kind"].tolist() == [[1, 2]]


def test_output_tensors() -> None:
    base = normal(8, (2, 16, 1, 8))
    view = BlockView([bridge.on_device(base)], BlockLayout.from_tensors([base], "NHD", dtype="bfloat16"))
    most = codec.max_payload_bytes(view.layout)
    expected, _ = bridge.fetch(codec.encode_blocks(view, RELATIVE))
    rows = torch.full((3, most + 48), 0xA5, dtype=torch.uint8, device=view.device)
    encoded = codec.encode_blocks(view, RELATIVE, out=rows)
    assert encoded.offsets.tolist() == [0, most + 48]
    for i, payload in enumerate(expected):
        row = rows[i].cpu().numpy()
        assert np.array_equal(row[: payload.size], payload)
        assert (row[payload.size :] == 0xA5).all(), "the encoder wrote behind the payload"
    assert (rows[2] == 0xA5).all()
    filled = bridge.on_device(np.zeros_like(base))
    codec.check_status(codec.decode_blocks(BlockView([filled], view.layout), *encoded))
    flat = torch.empty(2 * most, dtype=torch.uint8, device=view.device)
    got, _ = bridge.fetch(codec.encode_blocks(view, RELATIVE, out=flat))
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
    for wrong in (flat[:-1], flat[1:], rows[:1], rows[:, : most - 1], rows[:, ::2], flat.view(torch.int8)):
        with pytest.raises(ConfigError, match="out"):
            codec.encode_blocks(view, RELATIVE, out=wrong)


def test_no_blocks() -> None:
    base = normal(9, (2, 16, 1, 8))
    view = BlockView([bridge.on_device(base)], BlockLayout.from_tensors([base], "NHD", dtype="bfloat16"), [])
    encoded = codec.encode_blocks(view, RELATIVE)
    assert encoded.payload_bytes.tolist() == []
    codec.check_status(codec.decode_blocks(view, *encoded))


# ---- hostile bytes ---------------------------------------------------------------------------------------------------


def hostile_start() -> tuple[BlockLayout, list[bridge.Bits], bridge.Bits]:
    """A block with pages of each coding, odd numbers of groups and padding of every kind."""
    shape = (1, 16, 1, 5)
    rng = np.random.default_rng(2)
    bases = [
        normal(10, shape),
        normal(11, shape),
        np.full(shape, 0x1234, np.uint16),
        rng.integers(0, 65536, shape).astype(np.uint16),
    ]
    layout = layout_of([ref.Geometry(16, 1, 5, ref.BF16, 16)] * 4)
    payloads, table = bridge.native_encode(BlockView(bases, layout), [RELATIVE, LOSSLESS, RELATIVE, LOSSLESS])
    assert table["coding"].tolist() == [[Coding.FIXED, Coding.LOSSLESS, Coding.CONSTANT, Coding.RAW]]
    return layout, payloads, table


HOSTILE_FIELDS = {
    "a size of 0": (0, "size", 0),
    "a size beyond the payload": (3, "size", 2**32 - 1),
    "a size that its classes do not imply": (0, "size", 2),
    "an offset out of order": (1, "offset", 0),
    "an offset far away": (2, "offset", 2**32 - 1),
    "an unknown coding": (3, "coding", 77),
    "raw said of constant": (2, "coding", Coding.RAW),
    "lossless said of fixed": (0, "coding", Coding.LOSSLESS),
    "a bound of NaN": (0, "bound", np.nan),
    "a negative bound": (0, "bound", -1.0),
    "a bound below the least": (0, "bound", 2.0**-97),
    "a bound above the largest": (0, "bound", np.inf),
}


@pytest.mark.parametrize("case", HOSTILE_FIELDS)
def test_hostile_tables(case: str) -> None:
    layout, payloads, table = hostile_start()
    page, field, value = HOSTILE_FIELDS[case]
    table[0, page][field] = value
    assert not check_hostile(layout, payloads, table)


def test_hostile_bytes_in_every_role() -> None:
    """Class bytes, padding of classes, of constants and of segments; and bytes that may hold anything."""
    layout, payloads, table = hostile_start()
    assert check_hostile(layout, payloads, table)
    start = table["offset"][0].astype(int) * 16
    ends = start + table["size"][0]
    bad = {
        "class": (start[0], 0xEE),
        "class beyond the widest": (start[1], 0x99),
        "padding nibble": (start[0] + 2, 0x10),
        "padding of the classes": (start[0] + 3, 1),
        "padding of the bases": (start[1] + 4 + 3, 1),
        "padding of the constant": (start[2] + 3, 1),
        "padding of the segment": (ends[2] + 7, 1),
    }
    for role, (at, flip) in bad.items():
        changed = payloads[0].copy()
        changed[at] ^= flip
        assert not check_hostile(layout, [changed], table), role
    changed = payloads[0].copy()
    changed[start[0] + 4 : ends[0]] ^= 0xFF  # forged codes decode, the same everywhere
    changed[start[1] + 4] ^= 0x77  # bases
    table["param"][0, 1] ^= 0xFF
    assert check_hostile(layout, [changed], table)


def test_shortened_payloads_and_wrong_offsets() -> None:
    layout, payloads, table = hostile_start()
    assert not check_hostile(layout, [payloads[0][:-16]], table)
    assert not check_hostile(layout, [np.append(payloads[0], np.zeros(16, np.uint8))], table)
    bases = [np.zeros((1, s.tokens, s.heads, s.head_dim), np.uint16) for s in layout.segments]
    view = BlockView([bridge.on_device(b) for b in bases], layout)
    for offset, size in ((-16, 0), (16, 0), (2**62, 0), (8, 0), (0, 2**62), (0, -(2**63))):
        sent = bridge.send(payloads, table)
        status = codec.decode_blocks(view, sent.payload, sent.offsets + offset, sent.payload_bytes + size, sent.table)
        with pytest.raises(CorruptRecordError, match="nothing was written"):
            codec.check_status(status)


def test_codings_of_other_modes_are_refused_by_name() -> None:
    layout, payloads, table = hostile_start()
    table["coding"][0, 0] = Coding.PLAIN
    bases = [np.zeros((1, s.tokens, s.heads, s.head_dim), np.uint16) for s in layout.segments]
    view = BlockView([bridge.on_device(b) for b in bases], layout)
    status = codec.decode_blocks(view, *bridge.send(payloads, table))
    assert status.tolist() == [[2, 0, 0, 0]]
    with pytest.raises(BackendUnavailableError, match="native codec"):
        codec.check_status(status)


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_arguments_are_checked() -> None:
    base = normal(12, (2, 16, 1, 8))
    layout = BlockLayout.from_tensors([base], "NHD", dtype="bfloat16")
    view = BlockView([bridge.on_device(base)], layout)
    with pytest.raises(ConfigError, match="plain"):
        codec.encode_blocks(view, RELATIVE, "plain")
    with pytest.raises(ConfigError, match="2 bounds for 1 pages"):
        codec.encode_blocks(view, [RELATIVE, RELATIVE])
    single = torch.zeros((2, 16, 1, 8), device=view.device)
    with pytest.raises(LayoutError, match="float32"):
        codec.encode_blocks(BlockView([single], "NHD"), RELATIVE)
    encoded = codec.encode_blocks(view, RELATIVE)
    for name, wrong in (
        ("payload", encoded._replace(payload=encoded.payload.view(torch.int8))),
        ("offsets", encoded._replace(offsets=encoded.offsets[:1])),
        ("payload_bytes", encoded._replace(payload_bytes=encoded.payload_bytes.to(torch.int32))),
        ("table", encoded._replace(table=encoded.table[:, :, :8])),
    ):
        with pytest.raises(ConfigError, match=name):
            codec.decode_blocks(view, *wrong)


def test_nothing_is_imported_before_the_first_call() -> None:
    program = (
        "import sys, kvzip.backends.triton as t; assert callable(t.encode_blocks); "
        "assert not {'triton', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_available_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    usable, detail = codec.available()
    assert usable
    assert "triton" in detail
    monkeypatch.setattr("kvzip.backends.triton.codec.find_spec", lambda name: None if name == "triton" else name)
    assert codec.available() == (False, "triton is not installed: pip install triton")
    base = normal(13, (1, 16, 1, 8))
    view = BlockView([base], BlockLayout.from_tensors([base], "NHD", dtype="bfloat16"))
    with pytest.raises(BackendUnavailableError, match="pip install triton"):
        codec.encode_blocks(view, RELATIVE)
