# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What is moved and how exactly: dtypes, error bounds, the layout of a block, and a view of blocks in memory."""

from __future__ import annotations

import ctypes
import enum
import hashlib
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from kvzip.errors import ConfigError, LayoutError

__all__ = ["BlockLayout", "BlockView", "ChannelBounds", "DType", "ErrorBound", "SegmentLayout"]

_MAX_VALUES = 2**31 - 1  # of one page (docs/reference/format.md)
_MAX_BYTES = 2**32 - 16


class DType(enum.IntEnum):
    """Element types of KV pages; the values are those of the record format."""

    BFLOAT16 = 0
    FLOAT16 = 1
    FLOAT32 = 2
    OPAQUE = 3  # bytes of unknown meaning: stored exactly

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return (2, 2, 4, 1)[self]

    @property
    def numpy_bits(self) -> np.dtype[Any]:
        """The unsigned NumPy dtype that holds the bit pattern of one element."""
        return np.dtype(("<u2", "<u2", "<u4", "u1")[self])

    @classmethod
    def parse(cls, name: str | DType) -> DType:
        """Look a dtype up by its usual name.

        Args:
            name: ``"bfloat16"`` / ``"bf16"``, ``"float16"`` / ``"fp16"``, ``"float32"`` / ``"fp32"`` or ``"opaque"``.

        Raises:
            ConfigError: the name is none of these.
        """
        if isinstance(name, DType):
            return name
        found = _DTYPE_NAMES.get(str(name).removeprefix("torch."))  # torch.bfloat16 and np.dtype("float32") too
        if found is None:
            raise ConfigError(f"unknown dtype {name!r}: use one of {', '.join(sorted(_DTYPE_NAMES))}")
        return found


_DTYPE_NAMES = {
    "bfloat16": DType.BFLOAT16,
    "bf16": DType.BFLOAT16,
    "float16": DType.FLOAT16,
    "fp16": DType.FLOAT16,
    "float32": DType.FLOAT32,
    "fp32": DType.FLOAT32,
    "opaque": DType.OPAQUE,
    "uint8": DType.OPAQUE,
    "int8": DType.OPAQUE,
}


_FLOATS = ("bfloat16", "float16", "float32")
_INT64 = np.dtype(np.int64)


class BoundKind(enum.IntEnum):
    """Kinds of error bound; the values are those of the record format."""

    LOSSLESS = 0
    ABSOLUTE = 1
    RELATIVE = 2
    TOKEN_RMS = 3
    CHANNEL_TABLE = 4
    BY_PAGE = 5  # of a record whose pages have different bounds


class ChannelBounds:
    """An absolute error bound for each (KV head, channel) of a page. Immutable; compared and hashed by its values.

    Args:
        bounds: shape ``[kv_heads, head_dim]``, finite and positive. Kept as float32, rounded toward zero; what is below
            2^-96 becomes 0 (exact), what is above 2^120 becomes 2^120.

    Raises:
        ConfigError: the bounds have another shape, or one is not finite and positive.
    """

    __slots__ = ("digest", "values")

    def __init__(self, bounds: npt.ArrayLike) -> None:
        given = np.array(bounds, np.float64)
        if given.ndim != 2 or given.size == 0:
            raise ConfigError(f"channel bounds of shape {given.shape}: give [kv_heads, head_dim]")
        if not (np.isfinite(given).all() and (given > 0).all()):
            raise ConfigError("a channel bound is not finite and positive: floor the table first")
        clipped = np.minimum(given, 2.0**120)
        with np.errstate(under="ignore"):
            nearest = clipped.astype(np.float32)
            values = np.where(nearest > clipped, np.nextafter(nearest, np.float32(0)), nearest).astype("<f4")
        values[values < np.float32(2.0**-96)] = 0
        values.flags.writeable = False
        #: shape ``[kv_heads, head_dim]``, float32, read-only, C-contiguous
        self.values: npt.NDArray[np.float32] = values
        #: SHA-256 of the values as they lie in memory
        self.digest = hashlib.sha256(values.tobytes()).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChannelBounds) and (self.digest, self.values.shape) == (
            other.digest,
            other.values.shape,
        )

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        heads, dim = self.values.shape
        return f"ChannelBounds([{heads}, {dim}], {self.digest[:4].hex()})"


@dataclass(frozen=True)
class ErrorBound:
    """How far a loaded value may be from the stored one. Make one with a class method.

    The bound holds exactly in the output dtype, for every finite value; NaN and infinities come back bit for bit.

    Attributes:
        kind: what the bound depends on.
        value: the number that was given; 0 where there is none.
        channels: the bounds of a channel table.
    """

    kind: BoundKind
    value: float
    channels: ChannelBounds | None = None

    @classmethod
    def absolute(cls, value: float) -> ErrorBound:
        """``|out - in| <= value``, in the unit of the values.

        Raises:
            ConfigError: the value is not finite and positive.
        """
        return cls(BoundKind.ABSOLUTE, _positive("absolute error bound", value))

    @classmethod
    def relative(cls, value: float) -> ErrorBound:
        """``|out - in| <= value * (max - min)``, the range taken over the finite values of each page, K and V apart.

        Raises:
            ConfigError: the value is not in (0, 1].
        """
        if _positive("relative error bound", value) > 1:
            raise ConfigError(
                f"relative error bound {value!r} is above 1: use a fraction of the page's range such as 1e-3"
            )
        return cls(BoundKind.RELATIVE, float(value))

    @classmethod
    def token_rms(cls, value: float) -> ErrorBound:
        """``|out - in| <= value * rms``, the root mean square of the finite values of one token's vector of one head.

        For V: attention adds these vectors up, so that the error of the sum stays this small a part of it.

        Raises:
            ConfigError: the value is not in (0, 1].
        """
        if _positive("token rms error bound", value) > 1:
            raise ConfigError(f"token rms error bound {value!r} is above 1: use a fraction of the rms such as 0.1")
        return cls(BoundKind.TOKEN_RMS, float(value))

    @classmethod
    def channel_table(cls, bounds: npt.ArrayLike | ChannelBounds) -> ErrorBound:
        """``|out - in| <= bounds[head, channel]``: an absolute bound for each channel of a page.

        For K, with bounds that follow how strongly queries use a channel (see `kvzip.CalibrationTable`). The table is
        not kept in records, only its name: to decode them one needs it again.

        Args:
            bounds: shape ``[kv_heads, head_dim]``, in the unit of the values.

        Raises:
            ConfigError: see `ChannelBounds`.
        """
        table = bounds if isinstance(bounds, ChannelBounds) else ChannelBounds(bounds)
        return cls(BoundKind.CHANNEL_TABLE, 0.0, table)

    @classmethod
    def lossless(cls) -> ErrorBound:
        """``out`` equals ``in``, bit for bit."""
        return cls(BoundKind.LOSSLESS, 0.0)

    @classmethod
    def parse(cls, text: str) -> ErrorBound:
        """Read the command line's form of one bound.

        ``1e-3`` or ``rel:1e-3`` (relative), ``abs:1e-2``, ``rms:0.17`` (token rms) or ``lossless``.

        Raises:
            ConfigError: the text has none of these forms.
        """
        if text == "lossless":
            return cls.lossless()
        prefix, colon, number = str(text).rpartition(":")
        kinds = {"": cls.relative, "rel": cls.relative, "abs": cls.absolute, "rms": cls.token_rms}
        try:
            if prefix not in kinds or (colon and not prefix):
                raise ValueError(prefix)
            value = float(number)
        except ValueError:
            raise ConfigError(
                f"error bound {text!r}: use a number such as 1e-3 (relative), abs:1e-2, rms:0.17 or lossless"
            ) from None
        return kinds[prefix](value)

    def __str__(self) -> str:
        if self.kind is BoundKind.LOSSLESS:
            return "lossless"
        if self.kind is BoundKind.BY_PAGE:
            return "by page"
        if self.kind is BoundKind.CHANNEL_TABLE:
            return f"table:{self.channels.digest[:4].hex()}" if self.channels is not None else "table"
        prefix = {BoundKind.ABSOLUTE: "abs", BoundKind.RELATIVE: "rel", BoundKind.TOKEN_RMS: "rms"}[self.kind]
        return f"{prefix}:{self.value!r}"


def _positive(what: str, value: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ConfigError(f"{what} {value!r} is not a finite positive number: use a value such as 1e-3")
    return number


def _group_tokens(tokens: int) -> int:
    """Tokens of one coding group: the most that wastes at most an eighth on padding."""
    return next(g for g in (16, 8, 4, 2, 1) if -(-tokens // g) * g * 8 <= tokens * 9)


@dataclass(frozen=True)
class SegmentLayout:
    """One page (K or V of one layer) within a block: where its values lie.

    Attributes:
        tensor: index of the tensor that holds it.
        dtype: element type.
        tokens: tokens of the page, T.
        heads: KV heads, H.
        head_dim: values of one head of one token, D; they are contiguous in memory.
        offset_bytes: from the start of the block to the first value.
        token_stride_bytes: from one token to the next.
        head_stride_bytes: from one head to the next.
        kind: ``"k"``, ``"v"`` or ``""`` when it is not known.
        group_tokens: tokens of one coding group, 16, 8, 4, 2 or 1; 0 takes the most that wastes at most an eighth.
    """

    tensor: int
    dtype: DType
    tokens: int
    heads: int
    head_dim: int
    offset_bytes: int = 0
    token_stride_bytes: int = 0
    head_stride_bytes: int = 0
    kind: str = ""
    group_tokens: int = 0

    def __post_init__(self) -> None:
        if self.tensor < 0:
            raise LayoutError(f"tensor index {self.tensor}: tensors are counted from 0")
        if self.kind not in ("", "k", "v"):
            raise LayoutError(f"kind {self.kind!r}: use 'k', 'v' or ''")
        if min(self.tokens, self.heads, self.head_dim) < 1:
            raise LayoutError(
                f"page of {self.tokens} tokens x {self.heads} heads x {self.head_dim} values: "
                "every one must be at least 1"
            )
        if self.values > _MAX_VALUES:
            raise LayoutError(f"page of {self.values} values: at most {_MAX_VALUES}; split it into several pages")
        if self.nbytes > _MAX_BYTES:
            raise LayoutError(f"page of {self.nbytes} bytes: at most {_MAX_BYTES}; split it into several pages")
        if self.group_tokens == 0:
            object.__setattr__(self, "group_tokens", _group_tokens(self.tokens))
        elif self.group_tokens not in (16, 8, 4, 2, 1):
            raise LayoutError(f"group_tokens {self.group_tokens}: use 16, 8, 4, 2 or 1, or 0 for the default")

    @property
    def values(self) -> int:
        """Number of values in the page."""
        return self.tokens * self.heads * self.head_dim

    @property
    def nbytes(self) -> int:
        """Bytes of the page's values."""
        return self.values * self.dtype.itemsize

    @property
    def geometry(self) -> tuple[int, int, int, int, int]:
        """What a record keeps of it: (tokens, heads, head_dim, dtype, group_tokens)."""
        return (self.tokens, self.heads, self.head_dim, int(self.dtype), self.group_tokens)


@dataclass(frozen=True)
class BlockLayout:
    """The pages of one block, in the order in which a record keeps them.

    Attributes:
        segments: one entry a page.
        dims: order of the axes within each tensor's block, such as ``"2NHD"``; ``""`` when the geometry is not known
            or is given by hand.
        nbytes: bytes of one block's values.
        padded_nbytes: the same with every page rounded up to 16 bytes, as in a payload of raw pages.
    """

    segments: tuple[SegmentLayout, ...]
    dims: str = ""
    nbytes: int = field(init=False, repr=False, compare=False)
    padded_nbytes: int = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.segments:
            raise LayoutError("a block needs at least one page: give at least one tensor")
        if not (self.dims.isascii() and self.dims.isprintable() and len(self.dims) <= 8):
            raise LayoutError(f"dims {self.dims!r}: a record keeps at most 8 printable ASCII characters")
        object.__setattr__(self, "nbytes", sum(s.nbytes for s in self.segments))
        object.__setattr__(self, "padded_nbytes", sum(-(-s.nbytes // 16) * 16 for s in self.segments))
        object.__setattr__(self, "_hash", hash((self.segments, self.dims)))

    def __hash__(self) -> int:
        return self._hash  # layouts are keys of caches on the hot path

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layer of each page: K pages are counted by themselves, V pages too, and so are those of unknown kind."""
        seen: Counter[str] = Counter()
        layers = []
        for segment in self.segments:
            layers.append(seen[segment.kind])
            seen[segment.kind] += 1
        return tuple(layers)

    @property
    def num_tensors(self) -> int:
        """Number of tensors that the layout speaks of."""
        return max(s.tensor for s in self.segments) + 1

    @classmethod
    def from_tensors(
        cls,
        tensors: Sequence[Any],
        dims: str = "NHD",
        *,
        dtype: str | DType | None = None,
        kinds: str = "",
    ) -> BlockLayout:
        """Describe KV tensors by the order of their axes after the leading block axis.

        Args:
            tensors: NumPy arrays or torch tensors, shape ``[num_blocks, *dims]``.
            dims: one letter an axis: ``N`` tokens, ``H`` heads, ``D`` head_dim, ``2`` K and V. ``N`` and ``D`` are
                required, ``D`` is contiguous. ``"NHD"``, ``"HND"``, ``"2NHD"``, ``"2HND"``, ``"HN2D"`` and ``"ND"``
                are usual.
            dtype: element type; needed when the tensors hold bit patterns (bfloat16 in NumPy's uint16).
            kinds: for dims without ``2``: ``"k"``, ``"v"`` or the cycle ``"kv"`` of the tensors in turn; ``""`` = not
                known.

        Raises:
            LayoutError: axes, shapes or strides do not fit.
            ConfigError: the dtype is not known.
        """
        if sorted(dims) != sorted(set(dims)) or not {"N", "D"} <= set(dims) <= {"2", "N", "H", "D"}:
            raise LayoutError(f"dims {dims!r}: give N and D, and H and 2 where there are, each once, as in '2NHD'")
        segments: list[SegmentLayout] = []
        for index, tensor in enumerate(tensors):
            memory = TensorMemory.of(tensor, dtype)
            if len(memory.shape) != len(dims) + 1:
                raise LayoutError(
                    f"tensor {index} has shape {memory.shape}: dims {dims!r} need {len(dims) + 1} axes, blocks first"
                )
            size = dict(zip(dims, memory.shape[1:], strict=True))
            stride = dict(zip(dims, memory.strides_bytes[1:], strict=True))
            itemsize = memory.dtype.itemsize
            if size["D"] > 1 and stride["D"] != itemsize:
                raise LayoutError(
                    f"tensor {index}: head_dim has a stride of {stride['D']} bytes, {itemsize} is needed: "
                    "make D contiguous, or use BlockLayout.opaque"
                )
            if size.get("2", 2) != 2:
                raise LayoutError(f"tensor {index}: axis '2' of dims {dims!r} has size {size['2']}, not 2 (K and V)")
            pair = (("k", 0), ("v", stride["2"])) if "2" in size else ((kinds[index % len(kinds)] if kinds else "", 0),)
            for kind, offset in pair:
                segments.append(
                    SegmentLayout(
                        tensor=index,
                        dtype=memory.dtype,
                        tokens=size["N"],
                        heads=size.get("H", 1),
                        head_dim=size["D"],
                        offset_bytes=offset,
                        token_stride_bytes=stride["N"],
                        head_stride_bytes=stride.get("H", size["D"] * itemsize),
                        kind=kind,
                    )
                )
        return cls(tuple(segments), dims)

    @classmethod
    def opaque(cls, tensors: Sequence[Any], *, dtype: str | DType | None = None) -> BlockLayout:
        """Describe tensors whose page geometry is not known: each block is coded in memory order.

        Args:
            tensors: NumPy arrays or torch tensors, shape ``[num_blocks, ...]``, each block contiguous.
            dtype: element type; ``"opaque"`` treats any tensor as bytes.

        Raises:
            LayoutError: a block is not contiguous.
        """
        segments = []
        for index, tensor in enumerate(tensors):
            memory = TensorMemory.of(tensor, dtype)
            expected = memory.dtype.itemsize
            for size, stride in reversed(list(zip(memory.shape[1:], memory.strides_bytes[1:], strict=True))):
                if size > 1 and stride != expected and 0 not in memory.shape[1:]:
                    raise LayoutError(
                        f"tensor {index}: its blocks are not contiguous: give the page geometry (dims) instead"
                    )
                expected *= size
            segments.append(SegmentLayout(index, memory.dtype, 1, 1, math.prod(memory.shape[1:])))
        return cls(tuple(segments), "")


@dataclass(frozen=True)
class TensorMemory:
    """What the core needs to know of a NumPy array or torch tensor: address, shape, strides, dtype, device."""

    address: int
    shape: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    dtype: DType
    device: str  # "cpu" or "cuda:N"
    writable: bool

    @property
    def is_distinct(self) -> bool:
        """Whether no two elements of a block share their memory, as in what slices and permutes a contiguous tensor.

        Blocks may begin within each other, as blocks of tokens do that are numbered by their first token: which of them
        are used together is the caller's to choose.
        """
        extent = self.dtype.itemsize
        for stride, size in sorted(zip(self.strides_bytes[1:], self.shape[1:], strict=True)):
            if size > 1 and stride < extent:
                return False
            extent += max(0, size - 1) * stride
        return self.strides_bytes[0] > 0 or self.shape[0] <= 1

    @classmethod
    def of(cls, tensor: Any, dtype: str | DType | None = None) -> TensorMemory:
        """Describe a tensor without copying it.

        Args:
            tensor: a NumPy array, or anything with torch's tensor attributes.
            dtype: what its elements mean; by default what the tensor says.

        Raises:
            LayoutError: it is neither, it is no KV dtype, or `dtype` has another element size.
        """
        if isinstance(tensor, np.ndarray):
            address, shape, strides = tensor.__array_interface__["data"][0], tensor.shape, tensor.strides
            if tensor.dtype.byteorder == (">" if sys.byteorder == "little" else "<"):
                raise LayoutError(f"elements of type {tensor.dtype} are in foreign byte order: use astype to change it")
            own, itemsize, device, writable = tensor.dtype.name, tensor.itemsize, "cpu", bool(tensor.flags.writeable)
        elif hasattr(tensor, "data_ptr") and hasattr(tensor, "stride"):
            if getattr(tensor, "is_neg", bool)():  # torch negates some views when they are read, not before
                raise LayoutError("the tensor is a negated view, its memory holds other values: use resolve_neg()")
            try:
                address = int(tensor.data_ptr())
            except RuntimeError as error:
                raise LayoutError(f"a tensor without memory of its own ({error}): pass a dense tensor") from error
            shape, itemsize = tuple(tensor.shape), int(tensor.element_size())
            strides = tuple(int(s) * itemsize for s in tensor.stride())
            own, writable = str(tensor.dtype).removeprefix("torch."), True
            device = "cpu" if tensor.device.type == "cpu" else f"{tensor.device.type}:{tensor.device.index or 0}"
        else:
            raise LayoutError(f"{type(tensor).__name__} is no NumPy array and no torch tensor: pass one of these")
        if dtype is None and own not in _DTYPE_NAMES:
            raise LayoutError(f"elements of type {own}: say what they are with dtype=, for instance dtype='bfloat16'")
        meaning = DType.parse(own if dtype is None else dtype)
        if meaning is DType.OPAQUE and itemsize > 1:  # any tensor may be read as bytes
            shape, strides = (*shape, itemsize), (*strides, 1)
        elif meaning.itemsize != itemsize:
            raise LayoutError(
                f"dtype {meaning.name.lower()} has {meaning.itemsize} bytes, the tensor's {own} has {itemsize}: "
                "view the tensor as the right type"
            )
        elif own in _FLOATS and meaning is not DType.OPAQUE and _DTYPE_NAMES[own] is not meaning:
            raise LayoutError(
                f"the tensor holds {own}, not {meaning.name.lower()}: pass a tensor of that type, or a view of its bit "
                "patterns as uint16 or uint32"
            )
        return cls(
            int(address), tuple(int(n) for n in shape), tuple(int(s) for s in strides), meaning, device, writable
        )


class BlockView:
    """Blocks of KV tensors in memory: tensors, their layout, and the numbers of the blocks that are meant.

    ``view[[3, 1]]`` is a view of blocks 3 and 1 of the same tensors. The view keeps the tensors alive; it copies
    nothing.

    Args:
        tensors: NumPy arrays or torch tensors with a leading block axis, all on one device.
        layout: a `BlockLayout`, or the order of the axes after the block axis, such as ``"NHD"`` (see
            `BlockLayout.from_tensors`).
        block_ids: numbers of the blocks; all of them by default.
        dtype: element type; needed when NumPy's uint16 holds bfloat16 or float16.

    Raises:
        LayoutError: tensors, layout and block numbers do not fit together.
    """

    __slots__ = (
        "_memory",
        "addresses",
        "block_ids",
        "bounds",
        "device",
        "layout",
        "num_blocks",
        "tensors",
        "writable",
    )

    def __init__(
        self,
        tensors: Sequence[Any],
        layout: BlockLayout | str = "NHD",
        block_ids: Iterable[int] | npt.NDArray[np.int64] | None = None,
        *,
        dtype: str | DType | None = None,
    ) -> None:
        self.tensors = tuple(tensors)
        if isinstance(layout, str):
            layout = BlockLayout.from_tensors(self.tensors, layout, dtype=dtype)
        if not isinstance(layout, BlockLayout):
            raise LayoutError(f"layout {layout!r}: give a BlockLayout, or the order of the axes such as '2NHD'")
        self.layout = layout
        #: error bound of each page, where a codec needs them to decode into these blocks; see `with_bounds`
        self.bounds: tuple[ErrorBound, ...] = ()
        if layout.num_tensors != len(self.tensors):
            raise LayoutError(f"the layout speaks of {layout.num_tensors} tensors, {len(self.tensors)} were given")
        by_tensor = {s.tensor: s.dtype for s in layout.segments}
        if len(by_tensor) != len(self.tensors):
            unused = min(set(range(len(self.tensors))) - set(by_tensor))
            raise LayoutError(f"no page of the layout lies in tensor {unused}: leave it out")
        self._memory = tuple(
            TensorMemory.of(t, DType.OPAQUE if _item_bytes(t) != by_tensor[i].itemsize else by_tensor[i])
            for i, t in enumerate(self.tensors)
        )
        devices = {m.device for m in self._memory}
        if len(devices) != 1:
            raise LayoutError(f"tensors on {', '.join(sorted(devices))}: a view needs all of them on one device")
        self.device = devices.pop()
        self.num_blocks = min(m.shape[0] for m in self._memory)
        self._check_segments()
        #: Address of block 0 of every tensor, and bytes from one block to the next; shape ``[tensors]``.
        self.addresses = (
            np.array([m.address for m in self._memory], np.uint64),
            np.array([m.strides_bytes[0] for m in self._memory], np.int64),
        )
        #: Whether every tensor may be written to, and no two values share their memory.
        self.writable = all(m.writable and m.is_distinct for m in self._memory) and len(
            {self._memory[s.tensor].address + s.offset_bytes for s in layout.segments}
        ) == len(layout.segments)
        if block_ids is None:
            block_ids = np.arange(self.num_blocks, dtype=np.int64)
        self.block_ids = self._check_ids(block_ids)

    def _check_ids(self, block_ids: Iterable[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        if type(block_ids) is np.ndarray and block_ids.dtype is _INT64 and block_ids.ndim == 1:  # as a rule
            ids: npt.NDArray[np.int64] = block_ids.copy()  # what was checked here must not change
        else:
            try:
                given = np.asarray(block_ids if isinstance(block_ids, np.ndarray) else list(block_ids))
            except TypeError:
                raise LayoutError(f"block numbers {block_ids!r}: give several, such as [3, 1] or range(2, 5)") from None
            if given.size and given.dtype.kind not in "iu":  # a mask or fractions would select other blocks than meant
                raise LayoutError(f"block numbers of type {given.dtype}: give integers")
            if given.ndim != 1:
                raise LayoutError(f"block numbers of shape {given.shape}: give a flat list")
            ids = given.astype(np.int64)
        ids.setflags(write=False)
        size = ids.size
        if size:
            known = ids.tolist() if size <= 64 else (int(ids.min()), int(ids.max()))  # few: faster without NumPy
            least, most = (known[0], known[0]) if size == 1 else (min(known), max(known))
            if least < 0 or most >= self.num_blocks:
                bad = least if least < 0 else most
                raise LayoutError(f"block number {bad}: the tensors have blocks 0 to {self.num_blocks - 1}")
        return ids

    def _check_segments(self) -> None:
        for number, s in enumerate(self.layout.segments):
            memory = self._memory[s.tensor]
            extent = sum((n - 1) * st for n, st in zip(memory.shape[1:], memory.strides_bytes[1:], strict=True))
            extent += memory.dtype.itemsize
            last = (s.tokens - 1) * s.token_stride_bytes + (s.heads - 1) * s.head_stride_bytes
            end = s.offset_bytes + last + s.head_dim * s.dtype.itemsize
            if min(s.offset_bytes, s.token_stride_bytes, s.head_stride_bytes, *memory.strides_bytes) < 0:
                raise LayoutError(f"page {number} has a negative offset or stride: make the tensor's strides positive")
            if end > extent:
                raise LayoutError(
                    f"page {number} ends {end} bytes into its block, the block has {extent}: check the layout"
                )

    def __len__(self) -> int:
        return len(self.block_ids)

    def __getitem__(self, block_ids: Iterable[int] | npt.NDArray[np.int64]) -> BlockView:
        view = self._again()  # the tensors were checked when this view was made
        view.block_ids = self._check_ids(block_ids)
        return view

    def _again(self) -> BlockView:
        """A copy, faster than `copy.copy`: a swap makes one for every transfer."""
        view = object.__new__(BlockView)
        view.tensors, view.layout, view.addresses = self.tensors, self.layout, self.addresses
        view.device, view.num_blocks, view.block_ids = self.device, self.num_blocks, self.block_ids
        view._memory, view.writable, view.bounds = self._memory, self.writable, self.bounds
        return view

    def with_groups(self, layout: BlockLayout) -> BlockView:
        """The same blocks under a layout that differs in `SegmentLayout.group_tokens` alone."""
        view = self._again()
        view.layout = layout
        return view

    def with_bounds(self, bounds: ErrorBound | Sequence[ErrorBound]) -> BlockView:
        """The same blocks, to be decoded into from records that were encoded with channel tables.

        Args:
            bounds: what was asked of the encoder: one bound for all pages, or one a page.

        Raises:
            LayoutError: there are more or fewer bounds than pages, or a table does not fit its page.
        """
        pages = self.layout.segments
        each = (bounds,) * len(pages) if isinstance(bounds, ErrorBound) else tuple(bounds)
        if len(each) != len(pages):
            raise LayoutError(f"{len(each)} error bounds for {len(pages)} pages: give one, or one a page")
        for number, (bound, s) in enumerate(zip(each, pages, strict=True)):
            if bound.channels is not None and bound.channels.values.shape != (s.heads, s.head_dim):
                raise LayoutError(
                    f"channel bounds of shape {bound.channels.values.shape}, page {number} has {s.heads} heads of "
                    f"{s.head_dim} channels"
                )
        view = self._again()
        view.bounds = each
        return view

    @property
    def nbytes(self) -> int:
        """Bytes of the values of all selected blocks."""
        return len(self.block_ids) * self.layout.nbytes

    def page(self, block: int, segment: int) -> npt.NDArray[Any]:
        """Bit patterns of one page in host memory, without a copy.

        Args:
            block: position in this view, 0 to ``len(view) - 1``.
            segment: index of the page in the layout.

        Returns:
            Shape ``[tokens, heads, head_dim]``, unsigned, strided as the tensor is.

        Raises:
            LayoutError: the tensors are not in host memory.
        """
        if self.device != "cpu":
            raise LayoutError(f"pages on {self.device} cannot be read from the host: copy the tensor to the CPU first")
        s = self.layout.segments[segment]
        memory = self._memory[s.tensor]
        start = memory.address + int(self.block_ids[block]) * memory.strides_bytes[0] + s.offset_bytes
        strides = (s.token_stride_bytes, s.head_stride_bytes, s.dtype.itemsize)
        span = (
            sum((n - 1) * st for n, st in zip((s.tokens, s.heads, s.head_dim), strides, strict=True)) + s.dtype.itemsize
        )
        memory_bytes = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(start))
        page: npt.NDArray[Any] = np.ndarray(
            (s.tokens, s.heads, s.head_dim), s.dtype.numpy_bits, memory_bytes, 0, strides
        )
        return page

    def address(self, tensor: int) -> int:
        """Address of block 0 of a tensor, in bytes."""
        return self._memory[tensor].address

    def block_stride_bytes(self, tensor: int) -> int:
        """Bytes from one block of a tensor to the next."""
        return self._memory[tensor].strides_bytes[0]


def _item_bytes(tensor: Any) -> int:
    return int(tensor.itemsize if isinstance(tensor, np.ndarray) else tensor.element_size())


def empty_view(layout: BlockLayout, num_blocks: int) -> BlockView:
    """New host memory for blocks of a layout, one contiguous tensor a page."""
    segments = tuple(
        replace(
            s,
            tensor=i,
            offset_bytes=0,
            token_stride_bytes=s.heads * s.head_dim * s.dtype.itemsize,
            head_stride_bytes=s.head_dim * s.dtype.itemsize,
        )
        for i, s in enumerate(layout.segments)
    )
    arrays = [np.empty((num_blocks, s.tokens, s.heads, s.head_dim), s.dtype.numpy_bits) for s in segments]
    return BlockView(arrays, BlockLayout(segments, layout.dims))
