# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Dtypes, error bounds, layouts and views: what they take, what they refuse, and what they say then."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from kvzip.errors import ConfigError, LayoutError
from kvzip.types import BlockLayout, BlockView, BoundKind, DType, ErrorBound, SegmentLayout, TensorMemory

# ---- dtypes


@pytest.mark.parametrize(
    ("name", "dtype", "itemsize"),
    [
        ("bfloat16", DType.BFLOAT16, 2),
        ("bf16", DType.BFLOAT16, 2),
        ("torch.bfloat16", DType.BFLOAT16, 2),
        ("float16", DType.FLOAT16, 2),
        ("fp16", DType.FLOAT16, 2),
        ("float32", DType.FLOAT32, 4),
        ("fp32", DType.FLOAT32, 4),
        ("opaque", DType.OPAQUE, 1),
        ("uint8", DType.OPAQUE, 1),
        (np.dtype("float32"), DType.FLOAT32, 4),
        (DType.FLOAT16, DType.FLOAT16, 2),
    ],
)
def test_dtype_names(name: Any, dtype: DType, itemsize: int) -> None:
    assert DType.parse(name) is dtype
    assert dtype.itemsize == itemsize == dtype.numpy_bits.itemsize


@pytest.mark.parametrize("name", ["float64", "", "BF16", "int32", None, 3.5, np.float32])
def test_dtype_names_that_do_not_exist(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"unknown dtype .*: use one of .*bfloat16"):
        DType.parse(name)


# ---- bounds


@pytest.mark.parametrize("value", [0, 0.0, -1e-3, math.nan, math.inf, -math.inf, "much", None, 10**400, [1.0], 1j])
@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_bounds_out_of_range(kind: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="not a finite positive number: use a value such as 1e-3"):
        getattr(ErrorBound, kind)(value)


def test_a_relative_bound_is_a_fraction() -> None:
    assert ErrorBound.relative(1).value == 1.0
    with pytest.raises(ConfigError, match=r"relative error bound 1\.5 is above 1: use a fraction"):
        ErrorBound.relative(1.5)


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), np.array(0.25)])
def test_bounds_take_numpy_numbers(number: Any) -> None:
    bound = ErrorBound.absolute(number)
    assert bound == ErrorBound(BoundKind.ABSOLUTE, 0.25)
    assert type(bound.value) is float


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("1e-3", ErrorBound.relative(1e-3)),
        ("rel:0.5", ErrorBound.relative(0.5)),
        ("abs:1e-2", ErrorBound.absolute(1e-2)),
        ("abs:100", ErrorBound.absolute(100)),
        ("lossless", ErrorBound.lossless()),
    ],
)
def test_bounds_as_text(text: str, bound: ErrorBound) -> None:
    assert ErrorBound.parse(text) == bound
    assert ErrorBound.parse(str(bound)) == bound


@pytest.mark.parametrize(
    "text",
    ["", "x", "abs:", "abs:x", "foo:1", ":1e-3", "abs:lossless", "rel:2", "2", "-1", "nan", "inf", "abs:abs:1", "0"],
)
def test_bounds_as_bad_text(text: str) -> None:
    with pytest.raises(ConfigError, match="use a"):
        ErrorBound.parse(text)


@pytest.mark.parametrize("value", [1 / 3, 1e-7, 0.1, 5e-324])
def test_printing_a_bound_loses_nothing(value: float) -> None:
    assert ErrorBound.parse(str(ErrorBound.relative(value))) == ErrorBound.relative(value)


def test_bounds_are_values() -> None:
    assert len({ErrorBound.relative(0.5), ErrorBound.relative(0.5), ErrorBound.absolute(0.5)}) == 2
    with pytest.raises(AttributeError):
        ErrorBound.lossless().value = 1.0  # type: ignore[misc]


# ---- layouts


@pytest.mark.parametrize(
    ("dims", "shape", "pages", "geometry"),
    [
        ("NHD", (3, 16, 2, 8), 1, (16, 2, 8)),
        ("HND", (3, 2, 16, 8), 1, (16, 2, 8)),
        ("2NHD", (3, 2, 16, 4, 8), 2, (16, 4, 8)),
        ("2HND", (3, 2, 4, 16, 8), 2, (16, 4, 8)),
        ("HN2D", (3, 4, 16, 2, 8), 2, (16, 4, 8)),
        ("N2HD", (3, 16, 2, 4, 8), 2, (16, 4, 8)),
        ("ND", (3, 16, 8), 1, (16, 1, 8)),
    ],
)
def test_orders_of_axes(dims: str, shape: tuple[int, ...], pages: int, geometry: tuple[int, int, int]) -> None:
    tensor = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    view = BlockView([tensor], dims)
    assert view.layout.dims == dims
    assert [s.kind for s in view.layout.segments] == (["k", "v"] if pages == 2 else [""])
    assert all((s.tokens, s.heads, s.head_dim) == geometry for s in view.layout.segments)
    assert view.layout.nbytes == tensor[0].nbytes
    assert view.nbytes == tensor.nbytes
    for b in range(3):
        for p in range(pages):
            named = tensor[b]
            names = dims
            if "2" in names:
                named, names = np.take(named, p, axis=names.index("2")), names.replace("2", "")
            if "H" not in names:
                named, names = named[:, None], "NHD"
            want = named.transpose([names.index(d) for d in "NHD"])
            assert np.array_equal(view.page(b, p).view(np.float32), want)


@pytest.mark.parametrize("dims", ["", "N", "HD", "NHDX", "NNHD", "nhd", "3NHD", "N D"])
def test_orders_of_axes_that_do_not_exist(dims: str) -> None:
    with pytest.raises(LayoutError, match="give N and D"):
        BlockLayout.from_tensors([np.zeros((1, 2, 3, 4), np.float32)], dims)


def test_wrong_number_of_axes() -> None:
    with pytest.raises(LayoutError, match=r"tensor 0 has shape \(2, 3, 4\): dims 'NHD' need 4 axes, blocks first"):
        BlockView([np.zeros((2, 3, 4), np.float32)], "NHD")


def test_the_pair_axis_is_a_pair() -> None:
    with pytest.raises(LayoutError, match=r"axis '2' .* has size 3, not 2"):
        BlockView([np.zeros((1, 3, 4, 1, 8), np.float32)], "2NHD")


def test_head_dim_is_contiguous() -> None:
    tensor = np.zeros((2, 16, 2, 16), np.float32)[..., ::2]
    with pytest.raises(LayoutError, match="stride of 8 bytes, 4 is needed: make D contiguous"):
        BlockView([tensor], "NHD")


def test_kinds_cycle_through_the_tensors() -> None:
    tensors = [np.zeros((1, 4, 1, 4), np.float16)] * 4
    assert [s.kind for s in BlockLayout.from_tensors(tensors, "NHD", kinds="kv").segments] == ["k", "v", "k", "v"]
    with pytest.raises(LayoutError, match="kind 'x': use 'k', 'v' or ''"):
        BlockLayout.from_tensors(tensors, "NHD", kinds="x")


def test_opaque_blocks_are_contiguous() -> None:
    layout = BlockLayout.opaque([np.zeros((3, 5, 7), np.float32)])
    assert layout.segments[0].geometry == (1, 1, 35, int(DType.FLOAT32), 1)
    with pytest.raises(LayoutError, match="not contiguous: give the page geometry"):
        BlockLayout.opaque([np.zeros((3, 5, 7), np.float32).transpose(0, 2, 1)])
    gap_between_blocks = np.zeros((3, 5, 7), np.float32)[:, :2]
    assert BlockLayout.opaque([gap_between_blocks]).nbytes == 2 * 7 * 4


def test_any_tensor_may_be_read_as_bytes() -> None:
    tensor = np.arange(6, dtype=np.float64).reshape(2, 3)
    view = BlockView([tensor], BlockLayout.opaque([tensor], dtype="opaque"))
    assert view.page(1, 0).tobytes() == tensor[1].tobytes()


def test_a_segment_has_values() -> None:
    with pytest.raises(LayoutError, match=r"0 tokens .*: every one must be at least 1"):
        SegmentLayout(0, DType.FLOAT32, 0, 1, 1)
    with pytest.raises(LayoutError, match=r"4294967296 values: at most 2147483647; split it"):
        SegmentLayout(0, DType.FLOAT32, 2**16, 2**8, 2**8)
    with pytest.raises(LayoutError, match="group_tokens 3: use 16, 8, 4, 2 or 1"):
        SegmentLayout(0, DType.FLOAT32, 1, 1, 1, group_tokens=3)
    with pytest.raises(LayoutError, match="tensor index -1"):
        SegmentLayout(-1, DType.FLOAT32, 1, 1, 1)


def test_groups_waste_at_most_an_eighth() -> None:
    for tokens in range(1, 200):
        group = SegmentLayout(0, DType.FLOAT32, tokens, 1, 1).group_tokens
        assert -(-tokens // group) * group * 8 <= tokens * 9
        larger = [g for g in (16, 8, 4, 2) if g > group]
        assert all(-(-tokens // g) * g * 8 > tokens * 9 for g in larger)


def test_a_layout_has_pages() -> None:
    with pytest.raises(LayoutError, match="at least one page: give at least one tensor"):
        BlockLayout(())
    with pytest.raises(LayoutError, match="at least one page"):
        BlockLayout.from_tensors([], "NHD")


@pytest.mark.parametrize("dims", ["NHDNHDNHD", "N\0D", "N\u00e9", "N\n"])
def test_dims_that_no_record_can_keep(dims: str) -> None:
    with pytest.raises(LayoutError, match="at most 8 printable ASCII characters"):
        BlockLayout((SegmentLayout(0, DType.FLOAT32, 1, 1, 1),), dims)


def test_layouts_are_values() -> None:
    a = BlockLayout.from_tensors([np.zeros((3, 16, 2, 8), np.float32)], "NHD")
    b = BlockLayout.from_tensors([np.zeros((9, 16, 2, 8), np.float32)], "NHD")
    assert a == b
    assert hash(a) == hash(b)
    assert a != BlockLayout.from_tensors([np.zeros((9, 16, 2, 8), np.float32)[:, :8]], "NHD")


# ---- tensors


@pytest.mark.parametrize("tensor", [[1.0, 2.0], 3.0, None, "x", b"x", memoryview(b"x")])
def test_what_is_no_tensor(tensor: Any) -> None:
    with pytest.raises(LayoutError, match=r"is no NumPy array and no torch tensor: pass one of these"):
        TensorMemory.of(tensor)


@pytest.mark.parametrize("name", ["float64", "int32", "uint16", "int64", "bool", "complex64"])
def test_elements_of_unknown_meaning(name: str) -> None:
    with pytest.raises(LayoutError, match=f"elements of type {name}: say what they are with dtype="):
        TensorMemory.of(np.zeros(4, name))


def test_a_dtype_of_another_size() -> None:
    with pytest.raises(LayoutError, match="bfloat16 has 2 bytes, the tensor's uint32 has 4: view the tensor"):
        TensorMemory.of(np.zeros(4, np.uint32), "bfloat16")


@pytest.mark.parametrize(("own", "asked"), [("float16", "bfloat16"), ("float16", "bf16")])
def test_a_dtype_that_contradicts_the_tensor(own: str, asked: str) -> None:
    with pytest.raises(LayoutError, match="the tensor holds float16, not bfloat16"):
        TensorMemory.of(np.zeros(4, own), asked)
    assert TensorMemory.of(np.zeros(4, own).view(np.uint16), asked).dtype is DType.BFLOAT16
    assert TensorMemory.of(np.zeros(4, own), "opaque").dtype is DType.OPAQUE


@pytest.mark.parametrize("dtype", [">f4", ">f2", ">u2"])
def test_foreign_byte_order(dtype: str) -> None:
    with pytest.raises(LayoutError, match="foreign byte order: use astype"):
        TensorMemory.of(np.zeros(4, dtype), "bfloat16" if dtype == ">u2" else None)


def test_ml_dtypes_are_known() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    memory = TensorMemory.of(np.zeros((2, 3), ml_dtypes.bfloat16))
    assert (memory.dtype, memory.shape, memory.device, memory.writable) == (DType.BFLOAT16, (2, 3), "cpu", True)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "uint8"])
def test_torch_tensors_are_known(name: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor = torch.zeros((4, 16, 2, 8), dtype=getattr(torch, name))
    memory = TensorMemory.of(tensor)
    assert memory.dtype is DType.parse(name)
    assert memory.address == tensor.data_ptr()
    assert memory.strides_bytes[-1] == tensor.element_size()
    assert BlockView([tensor], "NHD").page(3, 0).shape == (16, 2, 8)


# ---- views


def view_of(blocks: int = 4, **kwargs: Any) -> BlockView:
    return BlockView([np.arange(blocks * 64, dtype=np.float32).reshape(blocks, 4, 2, 8)], "NHD", **kwargs)


@pytest.mark.parametrize("ids", [[3, 1], (3, 1), np.array([3, 1]), np.array([3, 1], np.uint8), iter([3, 1])])
def test_block_numbers(ids: Any) -> None:
    view = view_of(block_ids=ids)
    assert len(view) == 2
    assert view.block_ids.tolist() == [3, 1]
    assert view.nbytes == 2 * 256
    assert view.page(0, 0).view(np.float32)[0, 0, 0] == 3 * 64


def test_selecting_from_a_selection_counts_blocks_of_the_tensors() -> None:
    assert view_of(block_ids=[3, 1])[[0]].block_ids.tolist() == [0]
    assert len(view_of()[[]]) == 0
    assert len(view_of()[range(2)]) == 2


@pytest.mark.parametrize("bad", [[4], [-1], [0, 2**40], [np.int64(-(2**62))]])
def test_block_numbers_out_of_range(bad: list[int]) -> None:
    for make in (lambda: view_of(block_ids=bad), lambda: view_of()[bad]):
        with pytest.raises(LayoutError, match="the tensors have blocks 0 to 3"):
            make()


@pytest.mark.parametrize(
    "bad", [np.array([True, False, True, False]), [0.0, 1.0], [1.5], ["1"], np.array([0.5]), [True], [2**70]]
)
def test_block_numbers_are_integers(bad: Any) -> None:
    """A mask or a fraction would silently select other blocks."""
    with pytest.raises(LayoutError, match="give integers"):
        view_of(block_ids=bad)


def test_block_numbers_are_a_list() -> None:
    with pytest.raises(LayoutError, match=r"shape \(1, 2\): give a flat list"):
        view_of(block_ids=np.array([[0, 1]]))


def test_block_numbers_are_kept() -> None:
    ids = np.array([3, 1])
    view = view_of(block_ids=ids)
    ids[:] = 10**9  # was checked, and must not change what was
    assert view.block_ids.tolist() == [3, 1]
    with pytest.raises(ValueError, match="read-only"):
        view.block_ids[0] = 10**9


def test_a_view_keeps_its_tensors() -> None:
    view = BlockView([np.full((2, 4, 2, 8), 7.0, np.float32)], "NHD")
    np.full((2, 4, 2, 8), 8.0, np.float32)
    assert (view.page(1, 0).view(np.float32) == 7).all()


def test_tensors_that_do_not_fit_the_layout() -> None:
    tensor = np.zeros((4, 16, 2, 8), np.float32)
    layout = BlockLayout.from_tensors([tensor], "NHD")
    with pytest.raises(LayoutError, match="the layout speaks of 1 tensors, 2 were given"):
        BlockView([tensor, tensor], layout)
    with pytest.raises(LayoutError, match=r"page 0 ends 1024 bytes into its block, the block has 512"):
        BlockView([tensor[:, :8].copy()], layout)
    with pytest.raises(LayoutError, match="the tensor holds float16, not bfloat16"):
        BlockView(
            [tensor.astype(np.float16)],
            BlockLayout.from_tensors([tensor.astype(np.float16).view("u2")], "NHD", dtype="bf16"),
        )
    skips = BlockLayout((SegmentLayout(1, DType.FLOAT32, 1, 1, 1),))
    with pytest.raises(LayoutError, match="no page of the layout lies in tensor 0"):
        BlockView([tensor, tensor], skips)
    with pytest.raises(LayoutError, match="negative offset or stride"):
        BlockView([tensor[:, ::-1]], layout)
    with pytest.raises(LayoutError, match="negative offset or stride"):
        BlockView([tensor], BlockLayout((SegmentLayout(0, DType.FLOAT32, 1, 1, 1, offset_bytes=-4),)))


def test_the_blocks_that_all_tensors_have() -> None:
    tensors = [np.zeros((n, 4, 2, 8), np.float32) for n in (5, 3)]
    view = BlockView(tensors, "NHD")
    assert len(view) == 3
    with pytest.raises(LayoutError, match="blocks 0 to 2"):
        view[[3]]


def test_blocks_behind_another_axis() -> None:
    """vLLM's [2, blocks, ...] seen with the block axis first: K and V lie far apart."""
    cache = np.arange(2 * 5 * 4 * 2 * 8, dtype=np.float32).reshape(2, 5, 4, 2, 8)
    view = BlockView([cache.swapaxes(0, 1)], "2NHD")
    for b in range(5):
        for p in range(2):
            assert np.array_equal(view.page(b, p).view(np.float32), cache[p, b])


def test_read_only_and_shared_memory_is_not_writable() -> None:
    tensor = np.zeros((4, 4, 2, 8), np.float32)
    assert BlockView([tensor], "NHD").writable
    tensor.flags.writeable = False
    assert not BlockView([tensor], "NHD").writable
    torch = pytest.importorskip("torch", reason="torch is not installed")
    assert BlockView([torch.zeros(4, 4, 2, 8)], "NHD").writable
    assert not BlockView([torch.zeros(4, 4, 1, 8).expand(4, 4, 2, 8)], "NHD").writable
    assert not BlockView([torch.zeros(1, 4, 2, 8).expand(4, 4, 2, 8)], "NHD").writable
    assert BlockView([torch.zeros(1, 1, 1, 8).expand(1, 1, 1, 8)], "NHD").writable


def test_tensors_on_two_devices() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensors = [torch.zeros(4, 4, 2, 8), torch.zeros(4, 4, 2, 8, device="meta")]
    with pytest.raises(LayoutError, match="a view needs all of them on one device"):
        BlockView(tensors, "NHD")
    with pytest.raises(LayoutError, match=r"pages on meta.* cannot be read from the host"):
        BlockView(tensors[1:], "NHD").page(0, 0)


def test_pages_that_overlap_are_not_writable() -> None:
    """What is loaded into them would depend on the order in which they are written."""
    x = np.zeros((4, 2, 16, 2, 8), np.float32)
    assert BlockView([x, x + 1], "2NHD").writable
    assert not BlockView([x, x], "2NHD").writable
    assert BlockView([x[:, 0], x[:, 1]], "NHD").writable  # K and V of one tensor
    assert BlockView([x[..., :1, :], x[..., 1:, :]], "2NHD").writable  # heads of one tensor
    assert BlockView([x.transpose(0, 2, 1, 3, 4)], "N2HD").writable
    tight = np.lib.stride_tricks.as_strided(x, (3, 16, 2, 8), (1024, 48, 32, 4))  # a token begins within one before
    assert not BlockView([tight], "NHD").writable
    by_token = np.lib.stride_tricks.as_strided(x, (64, 16, 2, 8), (64, 64, 32, 4))  # blocks by their first token
    assert BlockView([by_token], "NHD").writable


def test_torch_tensors_whose_memory_is_not_their_values() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    with pytest.raises(LayoutError, match="resolve_neg"):
        BlockView([torch._neg_view(torch.ones(2, 16, 2, 8))], "NHD")
    with pytest.raises(LayoutError, match="without memory of its own"):
        BlockView([torch.ones(2, 16, 2, 8).to_sparse()], "NHD")


@pytest.mark.parametrize("ids", [3, slice(1, 2)])
def test_block_numbers_are_several(ids: Any) -> None:
    view = BlockView([np.zeros((4, 16, 2, 8), np.float32)], "NHD")
    with pytest.raises(LayoutError, match=r"give several, such as \[3, 1\] or range"):
        view[ids]


@pytest.mark.parametrize("layout", [None, 3, ["NHD"]])
def test_a_layout_is_a_layout(layout: Any) -> None:
    with pytest.raises(LayoutError, match="give a BlockLayout, or the order of the axes"):
        BlockView([np.zeros((4, 16, 2, 8), np.float32)], layout)
