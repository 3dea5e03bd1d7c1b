# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Where the pages of an LMCache object lie, and which bound each of them gets.

An object is the KV of one chunk of tokens. It holds one tensor for each group of layers, one behind the other:

====================================  ==============================================================================
shape                                 meaning
====================================  ==============================================================================
``2, L, T, H * D``                    K and V apart
``1, L, T, H * 2D``, ``L, T, H * 2D`` K and V of each head side by side, where the settings say that it is so
``1, L, T, D`` or ``L, T, D``         latent caches (MLA) and other vectors, one a token
====================================  ==============================================================================

with L layers, T tokens, H KV heads, D values a head. A page is 16 tokens of K or V of a layer, as in a paged cache: the
range that a relative bound speaks of is that of 16 tokens, however long the chunk is. What is not known to be K or V
comes back bit for bit: floats as vectors of their tokens, everything else as bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from kvzip._log import log_once
from kvzip.adapters.shard import Shard
from kvzip.bounds import WITHIN_PAGES, BoundPolicy, PageBounds
from kvzip.errors import ConfigError, LayoutError
from kvzip.record import KINDS, MAX_SEGMENTS, RecordHeader, geometry_of
from kvzip.types import BlockLayout, DType, ErrorBound, SegmentLayout

PAGE_TOKENS = 16
_OPAQUE_PAGE_BYTES = 1 << 20
_FLOATS = ("torch.bfloat16", "torch.float16", "torch.float32")


@dataclass(frozen=True)
class HeadForm:
    """What the shape of an object does not say about its heads.

    Attributes:
        head_dim: values of one head of one token; 0 = not known, all heads of a token are taken as one vector.
        packed: objects of one plane have K and V of each head side by side; needs `head_dim`.
    """

    head_dim: int = 0
    packed: bool = False


@dataclass(frozen=True)
class Page:
    """What a page is in its object.

    Attributes:
        layer: number of its layer among those of the object with K and V; -1 where they are not known.
        heads: KV heads that it holds; 0 = not known.
        first: whether it holds the first tokens of the object.
    """

    layer: int = -1
    heads: int = 0
    first: bool = False


@dataclass(frozen=True, eq=False)  # one of each kind is made, and it is a key of caches on the hot path
class ObjectLayout:
    """The pages of an object.

    Attributes:
        block: where they lie, in one tensor of the object's bytes.
        pages: what each of them is.
        num_layers: layers with K and V.
        nbytes: bytes of the object.
        kinds: of the pages, as a record's table has them.
    """

    block: BlockLayout
    pages: tuple[Page, ...]
    num_layers: int
    nbytes: int
    kinds: bytes


Shapes: TypeAlias = tuple[tuple[int, ...], ...]
_Pages: TypeAlias = list[tuple[SegmentLayout, Page]]


@lru_cache(maxsize=64)
def object_layout(shapes: Shapes, dtypes: tuple[Any, ...], form: HeadForm) -> ObjectLayout:
    """The pages of an object of these tensors.

    Args:
        shapes: of its tensors, in the order in which they lie in memory.
        dtypes: torch's, of each.
        form: see `HeadForm`.

    Raises:
        LayoutError: the object is empty.
    """
    pages: _Pages = []
    at = layers = 0
    for shape, dtype in zip(shapes, dtypes, strict=True):
        nbytes = math.prod(shape) * dtype.itemsize
        found = _tensor_pages(shape, dtype, at, layers, form)
        layers = max([layers, *(page.layer + 1 for _, page in found)])
        pages += found
        at += nbytes
    if len(pages) > MAX_SEGMENTS:
        log_once("an LMCache object has more pages than a record can hold, it is kept as bytes", f"{len(pages)} pages")
        pages, layers = _opaque(0, at), 0
    # Those of one shape side by side: a record keeps runs of shapes.
    pages.sort(key=lambda found: -found[0].tokens)
    block = BlockLayout(tuple(segment for segment, _ in pages))
    kinds = bytes(KINDS.index(segment.kind) for segment in block.segments)
    return ObjectLayout(block, tuple(page for _, page in pages), layers, at, kinds)


def layout_of_record(shapes: Shapes, dtypes: tuple[Any, ...], header: RecordHeader) -> ObjectLayout:
    """The pages that an object of these tensors had when a record was made of it, whatever the settings are today.

    Raises:
        LayoutError: the record was made of another object.
    """
    kinds = header.table["kind"].tobytes()
    for dim in (0, *{geometry.head_dim: None for geometry in header.geometry}):
        for packed in (False, True)[: 1 + (dim > 0)]:
            layout = object_layout(shapes, dtypes, HeadForm(dim, packed))
            if geometry_of(layout.block) == header.geometry and layout.kinds == kinds:
                return layout
    raise LayoutError(
        f"the record has {header.num_segments} pages, {header.raw_bytes} bytes in all; an object of the shape "
        f"{', '.join(map(str, shapes))} has others: it was made of another model or chunk size"
    )


def _tensor_pages(shape: tuple[int, ...], dtype: Any, at: int, layers: int, form: HeadForm) -> _Pages:
    """Pages of one tensor that begins `at` bytes into the object, its layers counted from `layers` on."""
    item = dtype.itemsize
    total = math.prod(shape) * item
    if total == 0:
        return []
    if str(dtype) not in _FLOATS or len(shape) < 2 or at % item:
        return _opaque(at, total)
    element = DType.parse(str(dtype))
    tokens, hidden = shape[-2], shape[-1]
    plane = tokens * hidden * item
    planes = {3: 1, 4: shape[0]}.get(len(shape), 0)
    packed = planes == 1 and form.packed and form.head_dim > 0 and hidden % (2 * form.head_dim) == 0
    dim = form.head_dim if form.head_dim and hidden % form.head_dim == 0 else hidden
    pages: _Pages = []

    def add(offset: int, heads: int, values: int, stride: int, name: str = "", layer: int = -1) -> None:
        for token in range(0, tokens, PAGE_TOKENS):
            count, start = min(PAGE_TOKENS, tokens - token), at + offset + token * hidden * item
            segment = SegmentLayout(0, element, count, heads, values, start, hidden * item, stride, name)
            pages.append((segment, Page(layer, heads if dim == form.head_dim else 0, token == 0)))

    if planes == 2 or packed:
        vectors = 2 if packed else 1  # of a head, K or K and V
        second = dim * item if packed else shape[-3] * plane  # from K to V
        for layer in range(shape[-3]):
            for name, offset in (("k", 0), ("v", second)):
                add(layer * plane + offset, hidden // dim // vectors, dim, vectors * dim * item, name, layers + layer)
    else:
        for number in range(math.prod(shape[:-2])):
            add(number * plane, 1, hidden, hidden * item)
    return pages


def _opaque(at: int, nbytes: int) -> _Pages:
    """Pages of bytes of unknown meaning."""
    return [
        (SegmentLayout(0, DType.OPAQUE, 1, 1, min(_OPAQUE_PAGE_BYTES, at + nbytes - start), start), Page())
        for start in range(at, at + nbytes, _OPAQUE_PAGE_BYTES)
    ]


@lru_cache(maxsize=64)
def page_bounds(bound: ErrorBound | BoundPolicy, layout: ObjectLayout, kv_rank: int) -> PageBounds:
    """The bound of each page of an object.

    LMCache does not say which chunk begins a sequence. So the first page of every object gets the bound of a sequence's
    beginning (`BoundPolicy.sink`), by default none at all: exact. What the bounds do not fit is exact too, with a
    warning, and so are pages that are not known to be K or V, unless the bounds say otherwise.

    Args:
        bound: one for all K and V pages, or by kind and layer.
        layout: the object.
        kv_rank: LMCache's number of the part of the model that it comes from.
    """
    exact = ErrorBound.lossless()
    policy = bound if isinstance(bound, BoundPolicy) else BoundPolicy(bound, bound)
    shard = Shard((kv_rank >> 16) & 0xFF, max(1, kv_rank >> 24))  # as LMCache's ObjectKey.ComputeKVRank packs it
    if layout.num_layers and policy.num_layers not in (None, layout.num_layers):
        _kept_exact("the bounds are for another number of layers", f"{policy.num_layers}, not {layout.num_layers}")
        policy = BoundPolicy(exact, exact, other=policy.other)
    bounds: list[ErrorBound] = []
    misfit: ConfigError | None = None
    for segment, page in zip(layout.block.segments, layout.pages, strict=True):
        if not segment.kind:
            bounds.append(policy.other if segment.dtype is not DType.OPAQUE else exact)
            continue
        pair = policy.layers.get(page.layer, (policy.key, policy.value))
        key, value = pair if isinstance(pair, tuple) else (pair, pair)
        chosen = key if segment.kind == "k" else value
        if page.first and policy.sink is not None:
            chosen = policy.sink
        try:
            if chosen.kind in WITHIN_PAGES and not page.heads:
                raise ConfigError(f"{segment.head_dim} values a token are no whole heads: give this model's head_dim")
            bounds.append(shard.bound(chosen, segment, page.layer, (0, page.heads), page.heads))
        except ConfigError as error:
            misfit = misfit or error
            bounds.append(exact)
    if misfit is not None:
        _kept_exact("the bounds do not fit the heads", str(misfit))
    return bounds[0] if len(set(bounds)) == 1 else tuple(bounds)


def _kept_exact(what: str, detail: str) -> None:
    log_once(f"LMCache objects are kept bit for bit: {what}", detail)
