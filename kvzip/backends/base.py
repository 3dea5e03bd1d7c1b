# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The contract of a codec.

A codec turns the pages of blocks into payloads and back. It sees a batch of blocks at a time (`Codec`), or, when it is
simple and lives on the host, a page at a time (`PageCodec`). What every codec promises:

1. **Bound.** Every finite value that comes back differs from what went in by at most the bound of its page, token or
   channel, exactly, in the output dtype; other values come back bit for bit. With `ErrorBound.lossless`, or if
   `lossless_only` is set, all do. `bound_kinds` names the kinds of bound that a codec takes.
2. **Size.** No payload is larger than `max_payload_bytes`, for any bytes that go in.
3. **Determinism.** The same pages, bound and mode give the same bytes, on every device, with any number of threads.
4. **Completeness.** Decoding writes every value of every page, and nothing else.
5. **Hostile bytes.** A damaged payload raises `CorruptRecordError`, and no page was written then.
6. **No state.** Calls do not affect each other; a codec object may be used by several threads at once.

`kvzip.testing.check_codec` asserts all of this; run it in the tests of a codec of your own. Register a codec with
`kvzip.register_codec`, or with an entry point of the group ``kvzip.codecs``.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvzip.bounds import BoundPolicy, PageBounds, bound_of_page
from kvzip.errors import ConfigError, CorruptRecordError
from kvzip.record import ALIGNMENT, ENTRY_DTYPE, KINDS, Coding, Reason, align
from kvzip.types import BlockLayout, BlockView, BoundKind, DType, ErrorBound, SegmentLayout

Table = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class EncodeRequest:
    """What the caller wants of an encoder.

    Attributes:
        bound: the error bound of every page, or a tuple of one a page.
        mode: encoding mode, one of the codec's `modes`.
        threads: most threads that the host may use; 0 = all cores that the process may use.
        reason: why this request is not what the caller asked for first, for the records' headers.
    """

    bound: PageBounds
    mode: str = "fixed"
    threads: int = 0
    reason: Reason = Reason.AS_ASKED


class Codec(abc.ABC):
    """A codec for batches of blocks. The module's text is the contract.

    Attributes:
        name: what records call it; at most 16 printable ASCII characters.
        modes: encoding modes it knows, the default first.
        lossless_only: it ignores the bound and returns every bit.
        bound_kinds: kinds of bound that it takes; with ``BoundKind.BY_PAGE``, a tuple of one a page as well.
        devices: kinds of device whose tensors it takes: ``"cpu"``, ``"cuda"``.
    """

    name: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = ("none",)
    lossless_only: ClassVar[bool] = False
    bound_kinds: ClassVar[frozenset[BoundKind]] = frozenset(
        (BoundKind.LOSSLESS, BoundKind.ABSOLUTE, BoundKind.RELATIVE)
    )
    devices: ClassVar[tuple[str, ...]] = ("cpu",)

    def check_available(self) -> None:  # noqa: B027 - most codecs can always run
        """Raise `BackendUnavailableError` when the codec cannot run here; an engine asks when it is set up with it."""

    def check_mode(self, mode: str) -> str:
        """Return `mode`, or raise `ConfigError` when the codec does not know it."""
        if mode not in self.modes:
            raise ConfigError(f"codec {self.name!r} has no mode {mode!r}: use one of {', '.join(self.modes)}")
        return mode

    def check_bound(self, bound: ErrorBound | BoundPolicy) -> None:
        """Raise `ConfigError` when the codec does not take this bound."""
        unknown = set() if self.lossless_only else self._unknown_kinds(bound)
        if unknown:
            names = ", ".join(sorted(kind.name.lower() for kind in unknown))
            raise ConfigError(
                f"codec {self.name!r} does not take bounds of the kind {names} (asked for: {bound}): use cuszp, or "
                "another bound"
            )

    def _unknown_kinds(self, bound: ErrorBound | BoundPolicy) -> set[BoundKind]:
        wanted = {bound.kind} if isinstance(bound, ErrorBound) else {*bound.kinds, BoundKind.BY_PAGE}
        return wanted - self.bound_kinds

    def default_bound(self) -> ErrorBound | BoundPolicy:
        """What holds where nobody says a bound: `BoundPolicy.uncalibrated`.

        A codec that has no bounds by token gets the bound of K, the finer one, for V too; one that takes a single bound
        gets it for all pages. One that ignores bounds says what it does: lossless.
        """
        if self.lossless_only:
            return ErrorBound.lossless()
        policy = BoundPolicy.uncalibrated()
        fitting = (bound for bound in (policy, policy.with_keys_bound()) if not self._unknown_kinds(bound))
        return next(fitting, policy.key)

    def default_mode(self, bound: ErrorBound | BoundPolicy) -> str:
        """The mode where nobody says one: the first, unless a codec knows a better one for a bound."""
        return self.modes[0]

    @abc.abstractmethod
    def max_payload_bytes(self, layout: BlockLayout) -> int:
        """Most bytes that the payload of one block can take, a multiple of 16."""

    @abc.abstractmethod
    def encode_blocks(
        self, blocks: BlockView, request: EncodeRequest, out: Bytes
    ) -> tuple[Table, npt.NDArray[np.uint64]]:
        """Encode every block of a view. Blocks the host.

        Args:
            blocks: what to encode.
            request: how.
            out: shape ``[len(blocks), stride]``, uint8, stride at least `max_payload_bytes`, rows contiguous. The
                payload of block i is written to the start of row i; what follows it is unspecified.

        Returns:
            The segment tables, shape ``[len(blocks), pages]``, dtype `ENTRY_DTYPE`, and the sizes of the payloads in
            bytes.
        """

    @abc.abstractmethod
    def validate_blocks(self, layout: BlockLayout, payloads: Sequence[Bytes], tables: Sequence[Table]) -> None:
        """Check everything that `decode_blocks` relies on.

        Raises:
            CorruptRecordError: a payload contradicts the codec's format.
        """

    @abc.abstractmethod
    def decode_blocks(
        self, blocks: BlockView, payloads: Sequence[Bytes], tables: Sequence[Table], *, threads: int = 0
    ) -> None:
        """Decode payloads into the blocks of a view. Blocks the host.

        Args:
            blocks: where the values go; every value of every page is written. `BlockView.bounds` has what the payloads
                were encoded with when that was a channel table.
            payloads: one a block.
            tables: one segment table a block.
            threads: as in `EncodeRequest`.

        Raises:
            CorruptRecordError: a payload contradicts the codec's format; nothing was written.
        """


class PageCodec(Codec):
    """Base of simple host codecs: give `encode_page` and `decode_page`, the rest is done here.

    A page that `encode_page` does not make smaller is stored raw.
    """

    @abc.abstractmethod
    def encode_page(self, values: npt.NDArray[Any], dtype: DType, request: EncodeRequest) -> bytes | None:
        """Encode one page.

        Args:
            values: bit patterns, contiguous, shape ``[tokens, channels]``.
            dtype: what they mean.
            request: mode, and the bound of this page.

        Returns:
            The bytes, or None to store the page raw.
        """

    @abc.abstractmethod
    def decode_page(self, data: bytes, dtype: DType, shape: tuple[int, int]) -> npt.NDArray[Any]:
        """Decode one page that `encode_page` wrote; the reverse of it.

        Raises:
            Exception: of any kind, when `data` is damaged; it becomes a `CorruptRecordError`.
        """

    #: value of the table's `coding` for pages that this codec encoded; 0 is raw
    _ENCODED: ClassVar[int] = 128

    bound_kinds: ClassVar[frozenset[BoundKind]] = Codec.bound_kinds | {BoundKind.BY_PAGE}

    def max_payload_bytes(self, layout: BlockLayout) -> int:
        """The raw size: a page that does not get smaller is stored raw."""
        return layout.padded_nbytes

    def encode_blocks(
        self, blocks: BlockView, request: EncodeRequest, out: Bytes
    ) -> tuple[Table, npt.NDArray[np.uint64]]:
        """Encode page by page; see `Codec.encode_blocks`."""
        segments = blocks.layout.segments
        tables = np.zeros((len(blocks), len(segments)), ENTRY_DTYPE)
        sizes = np.zeros(len(blocks), np.uint64)
        for b in range(len(blocks)):
            at = 0
            for s, segment in enumerate(segments):
                values = np.ascontiguousarray(blocks.page(b, s)).reshape(segment.tokens, -1)
                asked = replace(request, bound=bound_of_page(request.bound, s))
                data = self.encode_page(values, segment.dtype, asked)
                coding, reason = self._ENCODED, Reason.AS_ASKED
                if data is None or len(data) >= segment.nbytes:
                    coding, reason = Coding.RAW, Reason.INCOMPRESSIBLE
                    data = values.tobytes()
                size = len(data)
                out[b, at : at + size] = np.frombuffer(data, np.uint8)
                out[b, at + size : at + align(size)] = 0
                tables[b, s] = (at // ALIGNMENT, size, 0.0, coding, KINDS.index(segment.kind), 0, reason)
                at += align(size)
            sizes[b] = at
        return tables, sizes

    def _decode_segment(self, segment: SegmentLayout, payload: Bytes, entry: Any) -> npt.NDArray[Any]:
        start, size = int(entry["offset"]) * ALIGNMENT, int(entry["size"])
        data = payload[start : start + size]
        if start % ALIGNMENT or data.size != size:
            raise CorruptRecordError(f"a segment of {size} bytes at {start} leaves its payload of {payload.size} bytes")
        if payload[start + size : align(start + size)].any():
            raise CorruptRecordError(f"the padding after a segment of {size} bytes is not zero: the record is damaged")
        if entry["coding"] == Coding.RAW:
            if size != segment.nbytes:
                raise CorruptRecordError(f"a raw segment of {size} bytes, its page has {segment.nbytes}")
            return data.view(segment.dtype.numpy_bits)
        if entry["coding"] != self._ENCODED:
            raise CorruptRecordError(f"coding {entry['coding']} is not known to codec {self.name!r}")
        try:
            values = self.decode_page(data.tobytes(), segment.dtype, (segment.tokens, segment.heads * segment.head_dim))
        except Exception as error:
            raise CorruptRecordError(f"codec {self.name!r} cannot decode a segment: {error}") from error
        if values.nbytes != segment.nbytes:
            raise CorruptRecordError(
                f"codec {self.name!r} decoded {values.nbytes} bytes, the page has {segment.nbytes}"
            )
        return values

    def _decode(
        self, layout: BlockLayout, payloads: Sequence[Bytes], tables: Sequence[Table]
    ) -> list[npt.NDArray[Any]]:
        return [
            self._decode_segment(segment, payload, entry)
            for payload, table in zip(payloads, tables, strict=True)
            for segment, entry in zip(layout.segments, table, strict=True)
        ]

    def validate_blocks(self, layout: BlockLayout, payloads: Sequence[Bytes], tables: Sequence[Table]) -> None:
        """Decode everything and keep nothing; see `Codec.validate_blocks`."""
        self._decode(layout, payloads, tables)

    def decode_blocks(
        self, blocks: BlockView, payloads: Sequence[Bytes], tables: Sequence[Table], *, threads: int = 0
    ) -> None:
        """Decode all pages, then write them; see `Codec.decode_blocks`."""
        pages = iter(self._decode(blocks.layout, payloads, tables))
        for b in range(len(blocks)):
            for s in range(len(blocks.layout.segments)):
                page = blocks.page(b, s)
                page[...] = next(pages).view(page.dtype).reshape(page.shape)
