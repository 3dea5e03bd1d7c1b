# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The conformance kit for codecs: `check_codec` asserts every promise that ``kvzip/backends/base.py`` makes.

For the tests of a codec of your own, inside or outside kvzip; it needs NumPy alone::

    from kvzip.testing import check_codec

    def test_my_codec() -> None:
        check_codec(MyCodec())
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvzip.backends.base import Bytes, Codec, EncodeRequest, Table
from kvzip.bounds import PageBounds, bound_of_page, summary
from kvzip.errors import ConfigError, CorruptRecordError, KvzipError
from kvzip.record import ALIGNMENT, ENTRY_DTYPE, KINDS, MODES, crc32c, pack_headers, read_record
from kvzip.types import BlockLayout, BlockView, BoundKind, DType, ErrorBound

__all__ = ["check_codec"]

Bits = npt.NDArray[Any]

_PROMISES = {
    0: "interface",
    1: "bound",
    2: "size",
    3: "determinism",
    4: "completeness",
    5: "hostile bytes",
    6: "no state",
}
_POISONS = (0xA5, 0x5A)
_GUARD_BYTES = 64
_SPARE_BLOCKS = 2  # blocks of the tensors that a view leaves out
_MUTATIONS = 36  # of one record in the test of hostile bytes
_BOUNDS = (
    ErrorBound.relative(1e-3),
    ErrorBound.lossless(),
    ErrorBound.absolute(0.5),
    ErrorBound.relative(0.3),
    ErrorBound.relative(1.0),
    ErrorBound.absolute(1e-2),
    ErrorBound.relative(1e-12),
    ErrorBound.absolute(1e-40),
    ErrorBound.absolute(1e38),
)
# Exponent field, mantissa field and sign of the floating-point dtypes.
_FIELDS = {
    DType.BFLOAT16: (0x7F80, 0x007F, 0x8000),
    DType.FLOAT16: (0x7C00, 0x03FF, 0x8000),
    DType.FLOAT32: (0x7F800000, 0x007FFFFF, 0x80000000),
}


@dataclass(frozen=True)
class _Geometry:
    """Shape of the pages of a case; dims ``""`` is memory order."""

    dims: str
    tokens: int
    heads: int
    head_dim: int
    tensors: int = 1

    def __str__(self) -> str:
        where = f"order {self.dims}" if self.dims else "memory order"
        return f"{where}, {self.tokens} tokens x {self.heads} heads x {self.head_dim}, {self.tensors} tensors"

    @property
    def turned(self) -> _Geometry:
        """The same pages with their axes in another order in memory, where there is one."""
        other = {"NHD": "HND", "HND": "NHD", "2NHD": "2HND", "2HND": "2NHD"}.get(self.dims, self.dims)
        return _Geometry(other, self.tokens, self.heads, self.head_dim, self.tensors)


_GEOMETRIES = (
    _Geometry("NHD", 16, 2, 8, tensors=2),
    _Geometry("HND", 5, 3, 7, tensors=2),
    _Geometry("2NHD", 17, 2, 9),
    _Geometry("2HND", 32, 1, 40),
    _Geometry("HN2D", 3, 2, 4),
    _Geometry("ND", 1, 1, 1),
    _Geometry("", 1, 1, 77, tensors=3),
    _Geometry("", 1, 1, 1),
)


class _Memory:
    """Tensors of a case in host memory, with a guard before and after them and a gap along every axis."""

    def __init__(self, geometry: _Geometry, dtype: DType, blocks: int, fill: int) -> None:
        size = {"2": 2, "N": geometry.tokens, "H": geometry.heads, "D": geometry.head_dim}
        dims = geometry.dims or "D"
        shape = [blocks, *(size[d] for d in dims)]
        padded = [n + 1 for n in shape]
        nbytes = math.prod(padded) * dtype.itemsize
        whole = tuple(slice(n) for n in shape)
        self.geometry, self.dtype = geometry, dtype
        self.bytes: list[Bytes] = []
        self.tensors: list[Bits] = []
        self.pages: list[Bits] = []  # of each page [blocks, tokens, heads, head_dim]: found without BlockView's help
        for _ in range(geometry.tensors):
            memory = np.full(nbytes + 2 * _GUARD_BYTES, fill, np.uint8)
            tensor = memory[_GUARD_BYTES : _GUARD_BYTES + nbytes].view(dtype.numpy_bits).reshape(padded)[whole]
            self.bytes.append(memory)
            self.tensors.append(tensor)
            named = tensor
            present = dims
            for d in "NH":
                if d not in present:
                    named, present = named[:, None], d + present
            axes = [1 + present.index(d) for d in ("2NHD" if "2" in present else "NHD")]
            ordered = named.transpose(0, *axes)
            self.pages += [ordered[:, 0], ordered[:, 1]] if "2" in present else [ordered]

    def layout(self) -> BlockLayout:
        if self.geometry.dims:
            return BlockLayout.from_tensors(self.tensors, self.geometry.dims, dtype=self.dtype)
        return BlockLayout.opaque(self.tensors, dtype=self.dtype)

    def view(self, block_ids: Sequence[int]) -> BlockView:
        return BlockView(self.tensors, self.layout(), block_ids)

    def snapshot(self) -> list[Bytes]:
        return [memory.copy() for memory in self.bytes]

    def same(self, before: list[Bytes]) -> bool:
        return all(np.array_equal(a, b) for a, b in zip(self.bytes, before, strict=True))

    def values(self, block_ids: Sequence[int]) -> list[Bits]:
        """A copy of the bit patterns of each page, blocks in the order asked for."""
        return [page[list(block_ids)] for page in self.pages]


@dataclass(frozen=True)
class _Case:
    """Input of one check: blocks of pages, each block filled with another kind of values."""

    geometry: _Geometry
    dtype: DType
    memory: _Memory
    ids: tuple[int, ...]
    kinds: tuple[str, ...]

    @property
    def view(self) -> BlockView:
        return self.memory.view(self.ids)

    @property
    def pages(self) -> list[Bits]:
        return self.memory.values(self.ids)


def check_codec(codec: Codec, *, seed: int = 0) -> None:
    """Assert that a codec keeps every promise of the contract in ``kvzip/backends/base.py``. Takes seconds.

    All modes of the codec are tried with lossless, absolute and relative bounds on pages of bfloat16, float16, float32
    and opaque bytes, in several orders of axes, with odd sizes and with values such as zeros, denormals, NaN and
    infinities; then damaged payloads and segment tables, and several threads at once.

    Args:
        codec: the codec to check; its devices must include ``"cpu"``.
        seed: of the random inputs; the same seed gives the same inputs.

    Raises:
        AssertionError: a promise is broken; the message says which one, and with what input.
    """
    _Checker(codec, seed).run()


class _Checker:
    def __init__(self, codec: Codec, seed: int) -> None:
        self.codec = codec
        self.seed = seed

    def run(self) -> None:
        self.check_interface()
        cases = [self.case(g, dtype) for dtype in DType for g in _GEOMETRIES]
        bounds = _BOUNDS[:3] if self.codec.lossless_only else _BOUNDS
        for number, case in enumerate(cases):
            for mode in self.codec.modes:
                for within in self.bounds_within(case):
                    self.check_round_trip(case, EncodeRequest(within, mode, threads=1))
                    if number % 4 == 0:
                        self.check_determinism(case, EncodeRequest(within, mode))
        for number, case in enumerate(cases):
            for mode in self.codec.modes:
                # Every bound meets every dtype and mode, the first three every geometry as well.
                others = [b for i, b in enumerate(bounds[3:]) if (i - number) % 3 == 0]
                for every in (*bounds[:3], *others):
                    self.check_round_trip(case, EncodeRequest(every, mode, threads=1))
        for number, case in enumerate(cases):
            for mode in self.codec.modes:
                self.check_determinism(case, EncodeRequest(bounds[number % len(bounds)], mode))
        for case in cases:
            if case.geometry in (_GEOMETRIES[1], _GEOMETRIES[6]):
                for mode in self.codec.modes:
                    for bound in (*bounds[:2], *self.bounds_within(case)):
                        self.check_hostile_bytes(case, EncodeRequest(bound, mode))
        self.check_no_state(cases)
        self.check_threads(cases[::3])

    # ---- inputs

    def bounds_within(self, case: _Case) -> list[PageBounds]:
        """Bounds that differ within a page or from page to page, as far as the codec takes them."""
        if self.codec.lossless_only:
            return []
        segments = case.view.layout.segments
        rng = self.rng(29, int(case.dtype), _GEOMETRIES.index(case.geometry))
        table = ErrorBound.channel_table(10.0 ** rng.uniform(-4, 0, (segments[0].heads, segments[0].head_dim)))
        each = [ErrorBound.token_rms(0.17), ErrorBound.token_rms(1e-3), table]
        found: list[PageBounds] = [bound for bound in each if bound.kind in self.codec.bound_kinds]
        if BoundKind.BY_PAGE in self.codec.bound_kinds:
            kinds = [*found, ErrorBound.relative(1e-2), ErrorBound.lossless()]
            found.append(tuple(kinds[(s + len(case.kinds)) % len(kinds)] for s in range(len(segments))))  # type: ignore[misc]
        return found

    def rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *purpose])

    def case(self, geometry: _Geometry, dtype: DType) -> _Case:
        rng = self.rng(int(dtype), _GEOMETRIES.index(geometry))
        makers = _BYTE_VALUES if dtype is DType.OPAQUE else _VALUES
        count = len(makers)
        memory = _Memory(geometry, dtype, count + _SPARE_BLOCKS, 0xC3)
        ids = tuple(int(i) for i in rng.permutation(count + _SPARE_BLOCKS)[:count])
        for block, maker in zip(ids, makers.values(), strict=True):
            for page in memory.pages:
                page[block] = maker(rng, page.shape[1:], dtype)
        return _Case(geometry, dtype, memory, ids, tuple(makers))

    # ---- failures

    def broken(self, promise: int, what: str, case: _Case | None = None, request: EncodeRequest | None = None) -> Any:
        """Return the error to raise."""
        where = [] if case is None else [f"{case.dtype.name.lower()}", str(case.geometry)]
        if request is not None:
            where += [f"mode {request.mode}", f"bound {request.bound}", f"threads {request.threads}"]
        where.append(f"seed {self.seed}")
        return AssertionError(
            f"codec {self.codec.name!r} breaks promise {promise} ({_PROMISES[promise]}): {what}; "
            f"input: {', '.join(where)}"
        )

    def require(
        self,
        condition: bool,
        promise: int,
        what: str,
        case: _Case | None = None,
        request: EncodeRequest | None = None,
    ) -> None:
        if not condition:
            raise self.broken(promise, what, case, request)

    # ---- the codec, called with care

    def encode(
        self,
        case: _Case,
        request: EncodeRequest,
        view: BlockView | None = None,
        *,
        fill: int = 0xA5,
        spare_bytes: int = 0,
    ) -> tuple[list[Bytes], list[Table]]:
        """Encode a view of the case (all of it by default); check what holds for every call."""
        view = case.view if view is None else view
        limit = self.codec.max_payload_bytes(view.layout)
        memory = np.full((len(view) + 2, limit + spare_bytes), fill, np.uint8)
        before = case.memory.snapshot()
        try:
            table, sizes = self.codec.encode_blocks(view, request, memory[1:-1])
        except Exception as error:
            raise self.broken(
                0, f"encode_blocks raised {type(error).__name__}: {error} for pages that it has to take", case, request
            ) from error
        self.require(case.memory.same(before), 4, "encode_blocks changed the pages that it reads", case, request)
        guards = np.concatenate((memory[0], memory[-1]))
        self.require(bool((guards == fill).all()), 2, "encode_blocks wrote outside of its output", case, request)
        self.require(
            isinstance(table, np.ndarray)
            and table.dtype == ENTRY_DTYPE
            and table.shape == (len(view), len(view.layout.segments)),
            0,
            f"the segment table is {_describe(table)}, not [{len(view)}, {len(view.layout.segments)}] of ENTRY_DTYPE",
            case,
            request,
        )
        self.require(
            isinstance(sizes, np.ndarray) and sizes.shape == (len(view),) and sizes.dtype == np.uint64,
            0,
            f"the payload sizes are {_describe(sizes)}, not [{len(view)}] of uint64",
            case,
            request,
        )
        payloads = []
        for b, size in enumerate(int(n) for n in sizes):
            kind = f"block {b} of {len(view)}"
            self.require(
                size <= limit, 2, f"a payload of {size} bytes, max_payload_bytes is {limit} ({kind})", case, request
            )
            self.require(
                size % ALIGNMENT == 0, 2, f"a payload of {size} bytes, no multiple of 16 ({kind})", case, request
            )
            payload = memory[1 + b, :size].copy()
            payload.flags.writeable = False
            payloads.append(payload)
        tables = [table[b].copy() for b in range(len(view))]
        for t in tables:
            t.flags.writeable = False
        return payloads, tables

    def check_records(
        self, case: _Case, request: EncodeRequest, payloads: Sequence[Bytes], tables: Sequence[Table]
    ) -> None:
        """The segment tables must make records that a reader accepts."""
        layout = case.view.layout
        headers = pack_headers(
            layout,
            np.stack(tables),
            np.array([payload.size for payload in payloads], np.uint64),
            np.array([crc32c(payload) for payload in payloads], np.uint32),
            codec=self.codec.name,
            mode=request.mode if request.mode in MODES else "none",
            bound=request.bound,
        )
        kinds = [KINDS.index(s.kind) for s in layout.segments]
        for b, (header, payload) in enumerate(zip(headers, payloads, strict=True)):
            try:
                read_record(header.tobytes() + payload.tobytes())
            except KvzipError as error:
                raise self.broken(
                    2, f"the segment table of block {b} makes a record that nobody can read: {error}", case, request
                ) from error
            self.require(
                tables[b]["kind"].tolist() == kinds,
                0,
                f"the segment table of block {b} does not keep the kinds of the pages",
                case,
                request,
            )

    def decode(
        self,
        case: _Case,
        request: EncodeRequest,
        payloads: Sequence[Bytes],
        tables: Sequence[Table],
        target: _Memory,
        ids: Sequence[int],
        *,
        threads: int = 0,
    ) -> list[Bits]:
        """Decode what the codec itself wrote; returns the bit patterns of each page."""
        try:
            self.codec.decode_blocks(target.view(ids).with_bounds(request.bound), payloads, tables, threads=threads)
        except Exception as error:
            raise self.broken(
                0, f"decode_blocks raised {type(error).__name__}: {error} for its own payloads", case, request
            ) from error
        return target.values(ids)

    def written_outside(self, target: _Memory, ids: Sequence[int], fill: int) -> bool:
        """Whether anything but the pages of these blocks differs from the fill."""
        bits = np.frombuffer(bytes([fill]) * target.dtype.itemsize, target.dtype.numpy_bits)[0]
        kept = target.values(ids)
        for page in target.pages:
            page[list(ids)] = bits
        clean = all(bool((memory == fill).all()) for memory in target.bytes)
        for page, values in zip(target.pages, kept, strict=True):
            page[list(ids)] = values
        return not clean

    # ---- the promises

    def check_interface(self) -> None:
        codec = self.codec
        if not isinstance(codec, Codec):
            raise AssertionError(f"{codec!r} is no kvzip.Codec: make a subclass of it, and pass an object")
        name = codec.name
        self.require(
            isinstance(name, str) and name.isascii() and name.isprintable() and 1 <= len(name) <= 16,
            0,
            "its name is not 1 to 16 printable ASCII characters, which a record can keep",
        )
        self.require(
            isinstance(codec.modes, tuple) and len(codec.modes) > 0 and all(isinstance(m, str) for m in codec.modes),
            0,
            f"modes {codec.modes!r} is not a tuple of at least one name",
        )
        self.require("cpu" in codec.devices, 0, f"devices {codec.devices!r} do not include 'cpu': it cannot be checked")
        for mode in codec.modes:
            self.require(codec.check_mode(mode) == mode, 0, f"check_mode({mode!r}) does not return the mode")
        try:
            codec.check_mode("no such mode")
        except ConfigError:
            pass
        else:
            raise self.broken(0, "check_mode takes a mode that does not exist instead of raising ConfigError")
        for geometry in _GEOMETRIES:
            for dtype in DType:
                limit = codec.max_payload_bytes(_Memory(geometry, dtype, 1, 0).layout())
                self.require(
                    limit > 0 and limit % ALIGNMENT == 0,
                    2,
                    f"max_payload_bytes is {limit}, no positive multiple of 16 ({dtype.name.lower()}, {geometry})",
                )

    def check_round_trip(self, case: _Case, request: EncodeRequest) -> None:
        payloads, tables = self.encode(case, request, spare_bytes=48)
        self.check_records(case, request, payloads, tables)
        try:
            self.codec.validate_blocks(case.view.layout, payloads, tables)
        except Exception as error:
            raise self.broken(
                5, f"validate_blocks raised {type(error).__name__}: {error} for intact payloads", case, request
            ) from error
        results = []
        for fill, geometry in zip(_POISONS, (case.geometry, case.geometry.turned), strict=True):
            target = _Memory(geometry, case.dtype, len(case.ids) + _SPARE_BLOCKS, fill)
            ids = tuple(reversed(range(1, len(case.ids) + 1)))
            results.append(self.decode(case, request, payloads, tables, target, ids, threads=request.threads))
            if self.written_outside(target, ids, fill):
                raise self.broken(4, "decode_blocks wrote outside of the pages of its blocks", case, request)
        for s, (first, second) in enumerate(zip(*results, strict=True)):
            if not np.array_equal(first, second):
                b = int(np.argwhere(first != second)[0][0])
                raise self.broken(
                    4,
                    f"page {s} of the block of {case.kinds[b]} depends on what its memory held before: "
                    "decode_blocks left values unwritten",
                    case,
                    request,
                )
        self.check_bound(case, request, results[0])

    def check_bound(self, case: _Case, request: EncodeRequest, after: list[Bits]) -> None:
        for s, (x, y) in enumerate(zip(case.pages, after, strict=True)):
            bound = bound_of_page(request.bound, s)
            exact = self.codec.lossless_only or bound.kind is BoundKind.LOSSLESS or case.dtype is DType.OPAQUE
            for b, kind in enumerate(case.kinds):
                limit, bad = (0.0, x[b] != y[b]) if exact else _violations(x[b], y[b], case.dtype, bound)
                if bad.any():
                    at = tuple(int(i) for i in np.argwhere(bad)[0])
                    raise self.broken(
                        1,
                        f"{int(bad.sum())} of {bad.size} values of page {s} of the block of {kind} are outside "
                        f"|out - in| <= {float(np.broadcast_to(limit, bad.shape)[at])!r}, the first at {at}: "
                        f"{_show(x[b][at], case.dtype)} came back as {_show(y[b][at], case.dtype)}",
                        case,
                        request,
                    )

    def check_determinism(self, case: _Case, request: EncodeRequest) -> None:
        payloads, tables = self.encode(case, request)
        want = [(p.tobytes(), t.tobytes()) for p, t in zip(payloads, tables, strict=True)]

        def compare(
            how: str, got: tuple[list[Bytes], list[Table]], order: Sequence[int], asked: EncodeRequest = request
        ) -> None:
            for place, (b, payload, table) in enumerate(zip(order, *got, strict=True)):
                if (payload.tobytes(), table.tobytes()) != want[b]:
                    raise self.broken(
                        3, f"the block of {case.kinds[b]} gives other bytes {how} (place {place})", case, asked
                    )

        everything = range(len(case.ids))
        compare(
            "the second time, into an output that held other bytes",
            self.encode(case, request, fill=0x5A, spare_bytes=160),
            everything,
        )
        for threads in (1, 2, 3):
            asked = EncodeRequest(request.bound, request.mode, threads)
            compare(f"with threads={threads}", self.encode(case, asked), everything, asked)
        order = [int(i) for i in self.rng(17).permutation(len(case.ids))]
        half = len(order) // 2
        for part in (order[:half], order[half:], order[:1]):
            view = case.memory.view([case.ids[b] for b in part])
            compare("in a batch of other blocks", self.encode(case, request, view), part)
        turned = _Memory(case.geometry.turned, case.dtype, len(case.ids), 0)
        for to, page in zip(turned.pages, case.pages, strict=True):
            to[:] = page
        elsewhere = _Case(case.geometry.turned, case.dtype, turned, tuple(everything), case.kinds)
        compare("from another place and order in memory", self.encode(elsewhere, request), everything)

        reference: list[Bits] | None = None
        for threads in (0, 1, 3):
            target = _Memory(case.geometry, case.dtype, len(case.ids), 0)
            got = self.decode(case, request, payloads, tables, target, everything, threads=threads)
            if reference is not None and not _same([got], [reference]):
                raise self.broken(3, f"decode_blocks gives other values with threads={threads}", case, request)
            reference = got
        assert reference is not None
        moved = [_unaligned(p) for p in payloads]
        target = _Memory(case.geometry, case.dtype, len(case.ids), 0)
        got = self.decode(case, request, moved, tables, target, everything)
        if not _same([got], [reference]):
            raise self.broken(
                3, "decode_blocks gives other values for payloads at addresses that are not aligned", case, request
            )

    def check_hostile_bytes(self, case: _Case, request: EncodeRequest) -> None:
        rng = self.rng(23, int(case.dtype), _GEOMETRIES.index(case.geometry), int(summary(request.bound).kind))
        whole, tables = self.encode(case, request)
        target = _Memory(case.geometry, case.dtype, len(case.ids), 0)
        intact = self.decode(case, request, whole, tables, target, range(len(case.ids)))
        ids = (2, 0, 3)  # of the target; three blocks, one of them damaged
        for number in range(_MUTATIONS):
            chosen = [int(i) for i in rng.choice(len(whole), 3, replace=False)]
            good = ([whole[i] for i in chosen], [tables[i] for i in chosen])
            victim = int(rng.integers(3))
            what, payload, table = _damage(rng, number, good[0][victim], good[1][victim])
            payload.flags.writeable = table.flags.writeable = False
            bad = (list(good[0]), list(good[1]))
            bad[0][victim], bad[1][victim] = payload, table
            outcome: list[list[Bits] | None] = []
            for fill in _POISONS:
                target = _Memory(case.geometry, case.dtype, 5, fill)
                before = target.snapshot()
                view = target.view(ids).with_bounds(request.bound)
                try:
                    self.codec.decode_blocks(view, *bad, threads=1)
                except CorruptRecordError as error:
                    self.require(
                        target.same(before),
                        5,
                        f"decode_blocks wrote to the pages before it raised CorruptRecordError ({what}; {error})",
                        case,
                        request,
                    )
                    outcome.append(None)
                except Exception as error:
                    raise self.broken(
                        5,
                        f"decode_blocks raised {type(error).__name__}: {error}, not CorruptRecordError ({what})",
                        case,
                        request,
                    ) from error
                else:
                    if self.written_outside(target, ids, fill):
                        raise self.broken(
                            5, f"decode_blocks wrote outside of the pages of its blocks ({what})", case, request
                        )
                    outcome.append(target.values(ids))
            first, second = outcome
            agree = first is second if first is None or second is None else _same([first], [second])
            self.require(
                agree, 5, f"what decode_blocks does depends on what the pages held before ({what})", case, request
            )
            try:
                self.codec.validate_blocks(view.layout, *bad)
                refused = False
            except CorruptRecordError:
                refused = True
            except Exception as error:
                raise self.broken(
                    5,
                    f"validate_blocks raised {type(error).__name__}: {error}, not CorruptRecordError ({what})",
                    case,
                    request,
                ) from error
            self.require(
                refused == (first is None),
                5,
                f"validate_blocks {'refuses' if refused else 'accepts'} what decode_blocks "
                f"{'refuses' if first is None else 'accepts'} ({what})",
                case,
                request,
            )
        target = _Memory(case.geometry, case.dtype, len(case.ids), 0xA5)
        again = self.decode(case, request, whole, tables, target, range(len(case.ids)))
        self.require(
            _same([again], [intact]), 6, "intact payloads decode to something else after damaged ones", case, request
        )

    def check_no_state(self, cases: Sequence[_Case]) -> None:
        """Calls in another order give the same."""
        requests = [EncodeRequest(_BOUNDS[i % 3], mode) for i, mode in enumerate(self.codec.modes)]
        jobs = [(case, request) for request in requests for case in cases[::2]]
        first = [self.encode(*job) for job in jobs]
        values = [
            self.decode(*job, *made, _Memory(job[0].geometry, job[0].dtype, len(job[0].ids), 1), range(len(job[0].ids)))
            for job, made in zip(jobs, first, strict=True)
        ]
        for i in reversed(range(len(jobs))):
            case, request = jobs[i]
            target = _Memory(case.geometry, case.dtype, len(case.ids), 2)
            decoded = self.decode(case, request, *first[i], target, range(len(case.ids)))
            again = self.encode(case, request)
            self.require(
                _same(again, first[i]) and _same([decoded], [values[i]]),
                6,
                "a call gives another result after other calls",
                case,
                request,
            )

    def check_threads(self, cases: Sequence[_Case]) -> None:
        """Several threads at once give the same as one after the other."""
        bound = _BOUNDS[0]
        jobs = [(case, EncodeRequest(bound, mode, 2)) for mode in self.codec.modes for case in cases]
        want = [self.encode(*job) for job in jobs]
        values = [
            self.decode(*job, *made, _Memory(job[0].geometry, job[0].dtype, len(job[0].ids), 1), range(len(job[0].ids)))
            for job, made in zip(jobs, want, strict=True)
        ]
        workers = 4
        barrier = threading.Barrier(workers)
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                barrier.wait()
                for i in [(n * (2 * number + 1) + number) % len(jobs) for n in range(len(jobs))]:
                    case, request = jobs[i]
                    got = self.encode(case, request)
                    target = _Memory(case.geometry, case.dtype, len(case.ids), 3)
                    decoded = self.decode(case, request, *want[i], target, range(len(case.ids)), threads=2)
                    if not (_same(got, want[i]) and _same([decoded], [values[i]])):
                        raise self.broken(6, "a call gives another result beside other threads", case, request)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise self.broken(6, f"used by {workers} threads at once: {failures[0]}") from failures[0]


# ---- comparing


def _same(a: Sequence[Sequence[Any]], b: Sequence[Sequence[Any]]) -> bool:
    """Whether lists of lists of arrays hold the same."""
    return all(np.array_equal(x, y) for xs, ys in zip(a, b, strict=True) for x, y in zip(xs, ys, strict=True))


def _floats(bits: Bits, dtype: DType) -> npt.NDArray[np.float64]:
    if dtype is DType.BFLOAT16:
        values: npt.NDArray[Any] = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        values = np.ascontiguousarray(bits).view(np.float16 if dtype is DType.FLOAT16 else np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return np.asarray(values, np.float64)


def _violations(before: Bits, after: Bits, dtype: DType, bound: ErrorBound) -> tuple[Any, npt.NDArray[np.bool_]]:
    """The absolute bounds of a page, formed in float64, and which values break them.

    Exact for bounds of a page and of a channel: no rounding decides.
    """
    x, y = _floats(before, dtype), _floats(after, dtype)
    finite = np.isfinite(x)
    limit: Any = bound.value
    if bound.channels is not None:
        limit = bound.channels.values.astype(np.float64)[None]
    elif bound.kind is BoundKind.TOKEN_RMS:
        largest = np.maximum(np.abs(np.where(finite, x, 0)).max(axis=2, keepdims=True), 5e-324)
        with np.errstate(over="ignore"):
            limit = bound.value * largest * np.sqrt(np.mean((np.where(finite, x, 0) / largest) ** 2, 2, keepdims=True))
    elif bound.kind is BoundKind.RELATIVE:
        limit = bound.value * float(x[finite].max() - x[finite].min()) if finite.any() else 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        difference = y - x
        # Rounding is monotonous, so that only a difference that rounds to the bound itself can hide a violation; what
        # the rounding cut off (Knuth's two-sum) decides then.
        part = difference + x
        cut = (y - part) + ((part - difference) - x)
        above = (np.abs(difference) == limit) & (cut * np.sign(difference) > 0)
        held = (np.abs(difference) <= limit) & ~above
    bad: npt.NDArray[np.bool_] = np.where(finite, ~held, before != after)
    return limit, bad


def _show(bits: Any, dtype: DType) -> str:
    pattern = f"0x{int(bits):0{2 * dtype.itemsize}x}"
    if dtype is DType.OPAQUE:
        return pattern
    return f"{float(_floats(np.asarray([bits], dtype.numpy_bits), dtype)[0])!r} ({pattern})"


def _describe(value: Any) -> str:
    return f"{value.shape} of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


def _unaligned(payload: Bytes) -> Bytes:
    memory = np.empty(payload.size + 3, np.uint8)
    moved = memory[3:] if memory.ctypes.data % 2 == 0 else memory[2:-1]
    moved[:] = payload
    moved.flags.writeable = False
    return moved


# ---- damage


def _damage(rng: np.random.Generator, number: int, payload: Bytes, table: Table) -> tuple[str, Bytes, Table]:
    """Damage a copy of a payload or of its segment table; every kind of damage in turn."""
    payload, table = payload.copy(), table.copy()
    s = int(rng.integers(len(table)))
    kind = number % 18
    if kind < 5:  # most segments keep their classes at their start, where damage changes most
        start = int(table["offset"][s]) * ALIGNMENT
        where = (
            start + int(rng.integers(min(16, payload.size - start))) if kind % 2 else int(rng.integers(payload.size))
        )
        bit = int(rng.integers(8))
        payload[where] ^= np.uint8(1 << bit)
        return f"bit {bit} of byte {where} of the payload flipped", payload, table
    if kind == 5:
        where = int(rng.integers(payload.size))
        payload[where : where + 16] = rng.integers(0, 256, payload[where : where + 16].size)
        return f"up to 16 random bytes from byte {where} of the payload", payload, table
    if kind == 6:
        payload[:] = rng.integers(0, 256, payload.size)
        return "a payload of random bytes", payload, table
    if kind in (7, 8):
        payload[:] = 0xFF if kind == 7 else 0
        return f"a payload of {int(payload[0]):#x} bytes", payload, table
    if kind == 9:
        size = int(rng.integers(payload.size))
        return f"a payload cut from {payload.size} to {size} bytes", payload[:size].copy(), table
    if kind == 10:
        return "an empty payload", payload[:0].copy(), table
    field = ("offset", "size", "size", "size", "bound", "coding", "coding")[kind - 11]
    extremes: dict[str, list[Any]] = {
        "offset": [1, 2**32 - 1, 2**28, 2**31 // ALIGNMENT],
        "size": [0, 1, int(table["size"][s]) + 1, max(int(table["size"][s]), 1) - 1, 2**31, 2**32 - 1, 2**32 - 16],
        "bound": [np.nan, np.inf, -1.0, 0.0, 1e-45, 3e38],
        "coding": [*range(8), 0x12, 0x15, 0x30, 0x42, 127, 128, 129, 255],
    }
    value = extremes[field][int(rng.integers(len(extremes[field])))]
    if kind == 17:
        field, value = ("param", "kind", "reason")[number // 18 % 3], int(rng.integers(256))
    table[field][s] = value
    return f"{field} of entry {s} of the segment table is {value}", payload, table


# ---- values

_Maker = Callable[[np.random.Generator, tuple[int, ...], DType], Any]


def _bits(values: npt.NDArray[Any], dtype: DType) -> Bits:
    """Bit patterns of the dtype's values next to these (bfloat16 is cut, not rounded)."""
    with np.errstate(over="ignore"):
        if dtype is DType.FLOAT16:
            return values.astype(np.float16).view(np.uint16)
        bits: Bits = values.astype(np.float32).view(np.uint32)
    return (bits >> np.uint32(16)).astype(np.uint16) if dtype is DType.BFLOAT16 else bits


def _any_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Bits:
    return rng.integers(0, 1 << (8 * dtype.itemsize), shape, dtype=np.uint64).astype(dtype.numpy_bits)


def _masked(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType, mask: int) -> Bits:
    bits = _any_bits(rng, shape, dtype)
    bits &= dtype.numpy_bits.type(mask)
    return bits


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Bits:
    return _bits(rng.normal(0.0, 1.0, shape), dtype)


def _smooth(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Bits:
    along_tokens = np.cumsum(rng.normal(0.0, 0.05, shape), axis=0)
    return _bits(along_tokens + rng.normal(0.0, 4.0, shape[1:]), dtype)


def _denormals(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Bits:
    _, mantissa, sign = _FIELDS[dtype]
    return _masked(rng, shape, dtype, mantissa | sign)


def _wide(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Bits:
    low, high = (-7.0, 4.5) if dtype is DType.FLOAT16 else (-38.0, 38.0)
    return _bits(rng.normal(0.0, 1.0, shape) * 10 ** rng.uniform(low, high, shape), dtype)


def _outlier(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Bits:
    values = rng.normal(0.0, 1e-3, shape)
    values.flat[int(rng.integers(values.size))] = 1.0e4
    return _bits(values, dtype)


def _largest(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Bits:
    exponent, _, sign = _FIELDS[dtype]
    signs = _masked(rng, shape, dtype, sign)
    signs |= dtype.numpy_bits.type(exponent - 1)  # the largest finite pattern is the one before infinity
    return signs


def _non_finite(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Bits:
    exponent, mantissa, sign = _FIELDS[dtype]
    bits = _normal(rng, shape, dtype)
    infinite = rng.random(shape) < 0.5
    special = np.where(infinite, _masked(rng, shape, dtype, sign), _masked(rng, shape, dtype, mantissa | sign))
    special |= dtype.numpy_bits.type(exponent)
    return np.where(rng.random(shape) < 0.1, special, bits)


def _all_nan(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Bits:
    exponent, mantissa, sign = _FIELDS[dtype]
    bits = _masked(rng, shape, dtype, mantissa | sign)
    bits |= dtype.numpy_bits.type(exponent | 1)
    return bits


_VALUES: dict[str, _Maker] = {
    "normal values": _normal,
    "values that change slowly along the tokens": _smooth,
    "arbitrary bit patterns": _any_bits,
    "NaN and infinities among normal values": _non_finite,
    "NaN alone": _all_nan,
    "zeros": lambda rng, shape, dtype: np.zeros(shape, dtype.numpy_bits),
    "zeros of both signs": lambda rng, shape, dtype: (
        _any_bits(rng, shape, dtype) & dtype.numpy_bits.type(_FIELDS[dtype][2])
    ),
    "one constant": lambda rng, shape, dtype: _bits(np.full(shape, -1.625), dtype),
    "denormal values": _denormals,
    "values of a wide range": _wide,
    "small values and one large": _outlier,
    "the largest finite values": _largest,
    "half-integers": lambda rng, shape, dtype: _bits(rng.integers(-9, 10, shape) / 2, dtype),
    "large integers": lambda rng, shape, dtype: _bits(rng.integers(-2000, 2001, shape).astype(np.float64), dtype),
}
_BYTE_VALUES: dict[str, _Maker] = {
    "arbitrary bytes": _any_bits,
    "zero bytes": lambda rng, shape, dtype: np.zeros(shape, np.uint8),
    "one constant byte": lambda rng, shape, dtype: np.full(shape, 0x7F, np.uint8),
    "small bytes": lambda rng, shape, dtype: rng.integers(0, 4, shape).astype(np.uint8),
    "counting bytes": lambda rng, shape, dtype: np.arange(math.prod(shape)).astype(np.uint8).reshape(shape),
}
