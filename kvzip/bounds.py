# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Which error bound each page of a block gets: `BoundPolicy`, and its resolution for a layout."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TypeAlias

from kvzip.errors import ConfigError, LayoutError
from kvzip.types import BlockLayout, BoundKind, ErrorBound

__all__ = ["BoundPolicy"]

#: What a codec is given: one bound for all pages of a block, or one a page.
PageBounds: TypeAlias = ErrorBound | tuple[ErrorBound, ...]

#: Kinds of bound that differ within a page.
WITHIN_PAGES = frozenset({BoundKind.TOKEN_RMS, BoundKind.CHANNEL_TABLE})


@dataclass(frozen=True)
class BoundPolicy:
    """Error bounds by kind of page, by layer, and for the block that begins a sequence.

    Attributes:
        key: bound of K pages.
        value: bound of V pages.
        layers: exceptions: for a layer the pair (K, V), or one bound for both. Layers are counted from 0 in the order
            of a block's pages (`BlockLayout.layers`).
        sink: bound of all pages of blocks that a store marks as the first of their sequence: attention puts weight on
            position 0 in almost every head, and errors there cost most. None = as the other blocks.
        other: bound of pages that are not known to be K or V; by default lossless.
        num_layers: layers that a model must have for this policy to fit it; None = any number.
    """

    key: ErrorBound
    value: ErrorBound
    layers: Mapping[int, tuple[ErrorBound, ErrorBound] | ErrorBound] = field(default_factory=dict)
    sink: ErrorBound | None = field(default_factory=ErrorBound.lossless)
    other: ErrorBound = field(default_factory=ErrorBound.lossless)
    num_layers: int | None = None
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        pairs: dict[int, tuple[ErrorBound, ErrorBound]] = {}
        for layer, given in dict(self.layers).items():
            pair = (given, given) if isinstance(given, ErrorBound) else given
            if not (isinstance(layer, int) and layer >= 0):
                raise ConfigError(f"layer {layer!r} of a bound policy: use numbers from 0, in the order of the pages")
            if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(b, ErrorBound) for b in pair)):
                raise ConfigError(f"bound {given!r} of layer {layer}: give an ErrorBound, or a pair (K, V)")
            pairs[layer] = pair
        object.__setattr__(self, "layers", pairs)
        for name in ("key", "value", "other", "sink"):
            bound = getattr(self, name)
            if not isinstance(bound, ErrorBound) and not (name == "sink" and bound is None):
                raise ConfigError(f"bound {bound!r} for {name!r} is no ErrorBound: use ErrorBound.relative(1e-3)")
        parts = (self.key, self.value, self.sink, self.other, self.num_layers, tuple(sorted(pairs)))
        object.__setattr__(self, "_hash", hash((parts, tuple(pairs[i] for i in sorted(pairs)))))

    @classmethod
    def uncalibrated(cls) -> BoundPolicy:
        """The default: near exact without a calibration. K 1e-3 of each page's range, V 0.1 of each token's rms.

        The block that begins a sequence is exact. So are pages that are not known to be K or V: one that held both
        would have the range of its keys, and a part of that can be more than its values are.
        """
        return cls(ErrorBound.relative(1e-3), ErrorBound.token_rms(0.1))

    def with_keys_bound(self) -> BoundPolicy:
        """The same with the bound of K for V too: the finer one of `uncalibrated`, where tokens are not known."""
        return replace(self, value=self.key)

    def __hash__(self) -> int:
        return self._hash

    @property
    def kinds(self) -> frozenset[BoundKind]:
        """Kinds of bound that it uses."""
        bounds = {self.key, self.value, self.other, *(b for pair in self._pairs().values() for b in pair)}
        if self.sink is not None:
            bounds.add(self.sink)
        return frozenset(b.kind for b in bounds)

    def _pairs(self) -> dict[int, tuple[ErrorBound, ErrorBound]]:
        return self.layers  # type: ignore[return-value]  # made so in __post_init__

    def pair_of(self, layer: int) -> tuple[ErrorBound, ErrorBound]:
        """The bounds of K and V in a layer."""
        return self._pairs().get(layer, (self.key, self.value))

    def page_bounds(self, layout: BlockLayout) -> tuple[ErrorBound, ...]:
        """The bound of each page of a block that does not begin a sequence.

        Raises:
            LayoutError: the layout has other layers than the policy, or a channel table has another shape than the
                heads and channels of its page.
        """
        pairs = self._pairs()
        layers = 1 + max(layout.layers)
        if self.num_layers not in (None, layers) or (pairs and max(pairs) >= layers):
            wanted = self.num_layers if self.num_layers is not None else 1 + max(pairs)
            raise LayoutError(
                f"the bounds are for {wanted} layers, the blocks have {layers}: "
                "use the calibration table of this model, or select its layers"
            )
        bounds = []
        for number, (segment, layer) in enumerate(zip(layout.segments, layout.layers, strict=True)):
            key, value = self.pair_of(layer)
            bound = {"k": key, "v": value, "": self.other}[segment.kind]
            _check_table(bound, layout, number)
            bounds.append(bound)
        return tuple(bounds)

    def __str__(self) -> str:
        layers = f", {len(self.layers)} layers of their own" if self.layers else ""
        return f"k={self.key},v={self.value}{layers},sink={'as others' if self.sink is None else self.sink}"


def _check_table(bound: ErrorBound, layout: BlockLayout, number: int) -> None:
    segment = layout.segments[number]
    if bound.channels is not None and bound.channels.values.shape != (segment.heads, segment.head_dim):
        heads, dim = bound.channels.values.shape
        raise LayoutError(
            f"channel bounds for {heads} heads of {dim} channels, page {number} has {segment.heads} heads of "
            f"{segment.head_dim}: use the calibration table of this model, or select its heads"
        )


@lru_cache(maxsize=256)
def resolve(bound: ErrorBound | BoundPolicy, layout: BlockLayout, sink: bool = False) -> PageBounds:
    """What the pages of a block are coded with; one bound where all are alike.

    Args:
        bound: what the user asked for; a bound by itself protects a marked block losslessly.
        layout: the block.
        sink: whether the block begins a sequence.

    Raises:
        LayoutError: the bounds do not fit the layout.
    """
    if sink:
        protected = bound.sink if isinstance(bound, BoundPolicy) else ErrorBound.lossless()
        if protected is not None:
            return resolve(protected, layout)
    if isinstance(bound, ErrorBound):
        for number in range(len(layout.segments)) if bound.channels is not None else ():
            _check_table(bound, layout, number)
        return bound
    bounds = bound.page_bounds(layout)
    return bounds[0] if len(set(bounds)) == 1 else bounds


def differs_within_pages(bound: ErrorBound | BoundPolicy) -> bool:
    """Whether it has parts that differ within a page."""
    kinds = bound.kinds if isinstance(bound, BoundPolicy) else {bound.kind}
    return bool(kinds & WITHIN_PAGES)


def bound_of_page(bounds: PageBounds, page: int) -> ErrorBound:
    """The bound of one page."""
    return bounds if isinstance(bounds, ErrorBound) else bounds[page]


def summary(bounds: PageBounds) -> ErrorBound:
    """What a record's header keeps of the bounds of its pages."""
    return bounds if isinstance(bounds, ErrorBound) else ErrorBound(BoundKind.BY_PAGE, 0.0)


@lru_cache(maxsize=256)
def table_id(bounds: PageBounds, pages: int) -> int:
    """Name of the channel tables among the bounds of a block's pages, as records keep it; 0 if there is none.

    Args:
        bounds: what the pages are coded with.
        pages: how many there are.
    """
    each = [bounds] * pages if isinstance(bounds, ErrorBound) else bounds
    if all(b.channels is None for b in each):
        return 0
    digest = hashlib.sha256()
    for page, b in enumerate(each):
        if b.channels is not None:
            digest.update(page.to_bytes(4, "little") + b.channels.values.tobytes())
    return int.from_bytes(digest.digest()[:8], "little") or 1


@dataclass(frozen=True)
class NamedTables:
    """Channel tables among the bounds of a block's pages; equal where their names are.

    Attributes:
        name: see `table_id`; not 0.
        bounds: what the pages are coded with.
    """

    name: int
    bounds: PageBounds = field(compare=False, repr=False)


def named_tables(bounds: PageBounds, pages: int) -> NamedTables | None:
    """The channel tables that a decoder needs for records of these bounds; None where it needs none."""
    name = table_id(bounds, pages)
    return NamedTables(name, bounds) if name != 0 else None
