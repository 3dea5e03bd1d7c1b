# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The native library: find, load and check it, and call it with NumPy arrays.

Nothing is loaded before `library` is called for the first time. One call handles a batch of blocks, because a
ctypes call costs more than encoding a small page. ``csrc/cuszp/kvz.h`` documents the interface.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvzip import _config
from kvzip.errors import BackendUnavailableError, ConfigError, CorruptRecordError, LayoutError, NativeError
from kvzip.record import ENTRY_DTYPE, KINDS, Coding, align
from kvzip.types import BlockLayout, BlockView, DType, ErrorBound

ABI_VERSION = 4
#: file name of the library within the package
LIBRARY_NAME = {"darwin": "libkvzip_native.dylib", "win32": "kvzip_native.dll"}.get(sys.platform, "libkvzip_native.so")

#: `kvz_segment` of kvz.h
SEGMENT_DTYPE = np.dtype(
    [
        ("base", "<u8"),
        ("block_stride", "<i8"),
        ("token_stride", "<i8"),
        ("head_stride", "<i8"),
        ("tokens", "<u4"),
        ("heads", "<u4"),
        ("head_dim", "<u4"),
        ("dtype", "u1"),
        ("group_tokens", "u1"),
        ("coding", "u1"),
        ("bound_kind", "u1"),
        ("bound", "<f8"),
        ("kind", "u1"),
        ("reserved", "u1", (7,)),
        ("channel_bounds", "<u8"),
    ]
)
assert SEGMENT_DTYPE.itemsize == 72
assert ENTRY_DTYPE.itemsize == 16

Segments = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

OK = 0
INVALID_ARGUMENT = 1
CORRUPT = 2
OUT_OF_SPACE = 3
OUT_OF_MEMORY = 4
NO_CUDA = 5
CUDA_ERROR = 6
NO_BOUNDS = 7

_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_library_path: Path | None = None

_P, _U32, _U64, _I32 = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int32

_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "kvz_abi_version": (_U32, []),
    "kvz_format_version": (_U32, []),
    "kvz_build_info": (ctypes.c_char_p, []),
    "kvz_status_string": (ctypes.c_char_p, [_I32]),
    "kvz_cpu_isa": (ctypes.c_char_p, []),
    "kvz_cpu_set_isa": (_I32, [ctypes.c_char_p]),
    "kvz_max_segment_bytes": (_U64, [_P]),
    "kvz_cpu_encode": (_I32, [_P, _U32, _P, _U32, _P, _U64, _P, _P, _U32]),
    "kvz_cpu_validate": (_I32, [_P, _U32, _U32, _P, _P, _P, _U32, _P, _P]),
    "kvz_cpu_decode": (_I32, [_P, _U32, _P, _U32, _P, _P, _P, _U32, _P, _P]),
    "kvz_cpu_compare": (_I32, [_P, _P, _P, _P, _U32, _U32, _P, _P, _P, _U32]),
}


# ---- the library ---------------------------------------------------------------------------------------------------


def library() -> ctypes.CDLL:
    """The native library, loaded and checked on the first call. Thread-safe.

    Raises:
        BackendUnavailableError: it is missing, cannot be loaded, or belongs to another version of kvzip.
    """
    global _library, _library_path
    if _library is not None:
        return _library
    with _lock:
        if _library is None:
            path = find_library()
            _library = _load(path)
            _library_path = path
        return _library


def find_library() -> Path:
    """Where the library lies: where KVZIP_LIBRARY says, else in the installed package.

    Raises:
        BackendUnavailableError: it is in neither place.
    """
    override = _config.library_path()
    if override is not None:
        if not override.is_file():
            raise BackendUnavailableError(
                f"{_config.LIBRARY.name}={str(override)!r} is no file: give the path of {LIBRARY_NAME}, or unset it"
            )
        return override
    # An editable install spreads the package over the source tree and the folder of built files; both are on __path__.
    candidates = [Path(str(importlib.resources.files("kvzip").joinpath(LIBRARY_NAME)))]
    candidates += [Path(folder, LIBRARY_NAME) for folder in sys.modules["kvzip"].__path__]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    remedy = "install kvzip with `pip install .` (needs a C++ compiler)"
    if any(candidate.parents[1].joinpath("pyproject.toml").is_file() for candidate in candidates):
        remedy = (
            "these are kvzip's sources, which Python finds before the installed package when it is started in their "
            "folder: start it in another one, or install with `pip install -e .`"
        )
    raise BackendUnavailableError(
        f"the native library {LIBRARY_NAME} was not found in {', '.join(sorted({str(c.parent) for c in candidates}))}: "
        f"{remedy}, or set {_config.LIBRARY.name} to its path"
    )


def _load(path: Path) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendUnavailableError(
            f"the native library {path} cannot be loaded ({error}): it was built for another machine or is damaged; "
            "build it here with `pip install --force-reinstall --no-deps .`"
        ) from error
    try:
        found = int(loaded.kvz_abi_version())
    except AttributeError:
        raise BackendUnavailableError(
            f"{path} is not kvzip's native library (it has no kvz_abi_version): unset "
            f"{_config.LIBRARY.name}, or reinstall"
        ) from None
    if found != ABI_VERSION:
        raise BackendUnavailableError(
            f"the native library {path} has ABI version {found}, this kvzip needs {ABI_VERSION}: reinstall kvzip, so "
            "that both come from one build"
        )
    for name, (result, arguments) in _PROTOTYPES.items():
        try:
            function = getattr(loaded, name)
        except AttributeError:
            raise BackendUnavailableError(
                f"the native library {path} has no {name}: it belongs to another version; reinstall kvzip, so that "
                "both come from one build"
            ) from None
        function.restype, function.argtypes = result, arguments
    isa = _config.cpu_isa()
    if isa != "auto" and loaded.kvz_cpu_set_isa(isa.encode()) != OK:
        raise ConfigError(f"{_config.CPU_ISA.name}={isa!r}: this machine has auto, {', '.join(_isas(loaded))}")
    return loaded


def _isas(loaded: ctypes.CDLL) -> list[str]:
    before: bytes = loaded.kvz_cpu_isa()
    found = [name for name in ("baseline", "avx2", "avx512") if loaded.kvz_cpu_set_isa(name.encode()) == OK]
    loaded.kvz_cpu_set_isa(before)
    return found


def _text(value: bytes) -> str:
    return value.decode("ascii", "replace")


def describe() -> dict[str, Any]:
    """Where the library is and what it can do.

    Raises:
        BackendUnavailableError: as `library`.
    """
    loaded = library()
    return {
        "path": str(_library_path),
        "abi_version": int(loaded.kvz_abi_version()),
        "format_version": int(loaded.kvz_format_version()),
        "build": _text(loaded.kvz_build_info()),
        "cpu_isa": cpu_isa(),
    }


def cpu_isa() -> str:
    """Instruction set that the CPU codec uses: ``"avx512"``, ``"avx2"`` or ``"baseline"``."""
    return _text(library().kvz_cpu_isa())


def cpu_isas() -> list[str]:
    """Instruction sets that the CPU codec can use on this machine, the plainest first."""
    return _isas(library())


def set_cpu_isa(name: str) -> None:
    """Use another instruction set, for all threads; ``"auto"`` is the best one. For tests and measurements.

    Raises:
        ConfigError: the machine does not have it.
    """
    if library().kvz_cpu_set_isa(name.encode()) != OK:
        raise ConfigError(f"instruction set {name!r}: this machine has auto, {', '.join(cpu_isas())}")


def check(status: int, what: str) -> None:
    """Turn a status other than 0 into an error.

    Raises:
        NativeError: the status says failure.
    """
    if status != OK:
        reason = _text(library().kvz_status_string(status))
        raise NativeError(f"{what} failed: {reason} (status {status})", status=status)


# ---- segments ------------------------------------------------------------------------------------------------------


def _template(layout: BlockLayout) -> tuple[Segments, npt.NDArray[np.intp], npt.NDArray[np.uint64]]:
    """What does not depend on tensors: descriptors, tensor of each, offset of each. Kept with the layout."""
    kept: tuple[Segments, npt.NDArray[np.intp], npt.NDArray[np.uint64]] | None
    kept = layout.__dict__.get("_native_template")
    if kept is None:
        segments = np.zeros(len(layout.segments), SEGMENT_DTYPE)
        for row, s in zip(segments, layout.segments, strict=True):
            row["token_stride"], row["head_stride"] = s.token_stride_bytes, s.head_stride_bytes
            row["tokens"], row["heads"], row["head_dim"] = s.tokens, s.heads, s.head_dim
            row["dtype"], row["group_tokens"] = int(s.dtype), s.group_tokens
            row["kind"] = KINDS.index(s.kind)
        tensors = np.array([s.tensor for s in layout.segments], np.intp)
        offsets = np.array([s.offset_bytes for s in layout.segments], np.uint64)
        kept = (segments, tensors, offsets)
        layout.__dict__["_native_template"] = kept
    return kept


def segments_array(
    blocks: BlockView | BlockLayout,
    bound: ErrorBound | Sequence[ErrorBound] | None = None,
    coding: int | Sequence[int] = Coding.RAW,
) -> Segments:
    """Descriptors of the pages of a view (or, without addresses, of a layout).

    Args:
        blocks: a view; or a layout, for validation.
        bound: one error bound, or one a page; to decode, only channel tables matter, and the view has them.
        coding: coding wanted, or one a page; not needed to decode.

    Returns:
        Shape ``[pages]``, dtype `SEGMENT_DTYPE`. It does not keep the tensors and the bounds alive.
    """
    layout = blocks if isinstance(blocks, BlockLayout) else blocks.layout
    template, tensors, offsets = _template(layout)
    segments: Segments = template.copy()
    if isinstance(blocks, BlockView):
        addresses, strides = blocks.addresses
        segments["base"] = addresses[tensors] + offsets
        segments["block_stride"] = strides[tensors]
        if bound is None and blocks.bounds:
            bound = blocks.bounds
    segments["coding"] = coding
    if isinstance(bound, ErrorBound):
        segments["bound_kind"], segments["bound"] = int(bound.kind), bound.value
        segments["channel_bounds"] = _channels(bound)
    elif bound is not None:
        if len(bound) != len(segments):
            raise ConfigError(f"{len(bound)} error bounds for {len(segments)} pages: give one, or one a page")
        segments["bound_kind"] = [int(b.kind) for b in bound]
        segments["bound"] = [b.value for b in bound]
        segments["channel_bounds"] = [_channels(b) for b in bound]
    return segments


def _channels(bound: ErrorBound) -> int:
    return 0 if bound.channels is None else _pointer(bound.channels.values)


def max_segment_bytes(segment: npt.NDArray[Any]) -> int:
    """Most bytes of a payload that one page can take, padding included.

    Args:
        segment: shape ``[1]``, dtype `SEGMENT_DTYPE`.

    Raises:
        NativeError: the descriptor is invalid.
    """
    found = int(library().kvz_max_segment_bytes(_pointer(segment)))
    if found == 0:
        check(INVALID_ARGUMENT, "sizing a page")
    return found


def _pointer(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _ids(block_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.ascontiguousarray(block_ids, np.int64)


def _threads(threads: int) -> int:
    if not 0 <= threads <= 2**16:
        raise ConfigError(f"{threads} threads: use a number from 0 (all usable cores) to {2**16}")
    return threads or _config.threads()


def _raw_bytes(segments: Segments) -> npt.NDArray[np.uint64]:
    values = segments["tokens"].astype(np.uint64) * segments["heads"] * segments["head_dim"]
    itemsize = np.array([d.itemsize for d in DType], np.uint64)[segments["dtype"]]
    sizes: npt.NDArray[np.uint64] = values * itemsize
    return sizes


def max_payload_bytes(segments: Segments) -> int:
    """Most bytes that the payload of one block can take."""
    return sum(align(int(n)) for n in _raw_bytes(segments))


# ---- the CPU codec -------------------------------------------------------------------------------------------------


def cpu_encode(
    segments: Segments, block_ids: npt.NDArray[np.int64], out: Bytes, *, threads: int = 0
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint64]]:
    """Encode blocks that lie in host memory. Blocks the host; releases the GIL.

    Args:
        segments: from `segments_array`, with bound and coding.
        block_ids: numbers of the blocks.
        out: shape ``[len(block_ids), stride]``, uint8, rows contiguous, stride at least `max_payload_bytes`. Row i
            receives the payload of block i; what follows it is unspecified.
        threads: most threads to use; 0 = what KVZIP_THREADS says, else all usable cores.

    Returns:
        Segment tables, shape ``[len(block_ids), pages]``, dtype `ENTRY_DTYPE`, and payload sizes in bytes.

    Raises:
        LayoutError: `out` does not fit.
        NativeError: the library reported a failure.
    """
    ids = _ids(block_ids)
    n = ids.size
    worst = max_payload_bytes(segments)
    if (
        out.dtype != np.uint8
        or out.ndim != 2
        or out.shape[0] < n
        or out.shape[1] < worst
        or (n > 0 and out.strides[1] != 1)
        or not out.flags.writeable
        or (n > 1 and out.strides[0] < out.shape[1])
    ):
        raise LayoutError(
            f"output of shape {out.shape}, dtype {out.dtype}: {n} blocks need a writable uint8 array of at least "
            f"({n}, {worst}) with contiguous rows"
        )
    table = np.zeros((n, len(segments)), ENTRY_DTYPE)
    sizes = np.zeros(n, np.uint64)
    stride = out.strides[0] if n > 1 else out.shape[1]
    status = library().kvz_cpu_encode(
        _pointer(segments),
        len(segments),
        _pointer(ids),
        n,
        _pointer(out),
        stride,
        _pointer(table),
        _pointer(sizes),
        _threads(threads),
    )
    check(status, "encoding")
    return table, sizes


def _payload_arrays(
    segments: Segments, payloads: Sequence[Bytes], table: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[Any]]:
    n = len(payloads)
    if table.dtype != ENTRY_DTYPE or table.shape != (n, len(segments)):
        raise LayoutError(
            f"segment tables of shape {table.shape}, dtype {table.dtype}: {n} payloads of {len(segments)} pages need "
            f"shape ({n}, {len(segments)}) and ENTRY_DTYPE"
        )
    for payload in payloads:
        if payload.dtype != np.uint8 or not payload.flags.c_contiguous:
            raise LayoutError(f"a payload of dtype {payload.dtype}: give contiguous uint8 arrays")
    addresses = np.array([_pointer(p) for p in payloads], np.uint64)
    sizes = np.array([p.size for p in payloads], np.uint64)
    return addresses, sizes, np.ascontiguousarray(table)


def _check_decode(status: int, what: str, segments: Segments, bad: Any, table: npt.NDArray[Any]) -> None:
    if status == NO_BOUNDS:
        raise CorruptRecordError(
            f"{what}: a page was encoded with a channel table, and the blocks have none: if the record says which one "
            "it is, give it with BlockView.with_bounds; nothing was written"
        )
    if status == CORRUPT:
        block, page = int(bad[0]), int(bad[1])
        entry, segment = table[block, page], segments[page]
        raise CorruptRecordError(
            f"{what}: page {page} of block {block} of the batch contradicts the record format (coding "
            f"{entry['coding']}, {entry['size']} bytes at {int(entry['offset']) * 16}, for "
            f"{segment['tokens']} x {segment['heads']} x {segment['head_dim']} values); nothing was written: drop the "
            "record and recompute the block"
        )
    check(status, what)


def cpu_validate(segments: Segments, payloads: Sequence[Bytes], table: npt.NDArray[Any], *, threads: int = 0) -> None:
    """Check payloads against the record format; they may hold anything.

    Args:
        segments: from `segments_array`; addresses are not used.
        payloads: one contiguous uint8 array a block, of any alignment.
        table: segment tables, shape ``[len(payloads), pages]``, dtype `ENTRY_DTYPE`.
        threads: as in `cpu_encode`.

    Raises:
        CorruptRecordError: a payload contradicts the format.
    """
    addresses, sizes, entries = _payload_arrays(segments, payloads, table)
    bad = (_U32 * 2)()
    status = library().kvz_cpu_validate(
        _pointer(segments),
        len(segments),
        len(payloads),
        _pointer(addresses),
        _pointer(sizes),
        _pointer(entries),
        _threads(threads),
        ctypes.addressof(bad),
        ctypes.addressof(bad) + 4,
    )
    _check_decode(status, "validation", segments, bad, entries)


def cpu_decode(
    segments: Segments,
    block_ids: npt.NDArray[np.int64],
    payloads: Sequence[Bytes],
    table: npt.NDArray[Any],
    *,
    threads: int = 0,
) -> None:
    """Decode payloads into blocks in host memory; every value is written. Blocks the host; releases the GIL.

    Args:
        segments: from `segments_array` of the view to fill.
        block_ids: number of the block that each payload goes to.
        payloads: one contiguous uint8 array a block, of any alignment.
        table: segment tables, shape ``[len(payloads), pages]``, dtype `ENTRY_DTYPE`.
        threads: as in `cpu_encode`.

    Raises:
        CorruptRecordError: a payload contradicts the format; nothing was written.
        LayoutError: the arguments do not fit together.
        NativeError: the library reported a failure.
    """
    ids = _ids(block_ids)
    if ids.size != len(payloads):
        raise LayoutError(f"{len(payloads)} payloads for {ids.size} blocks: give one a block")
    addresses, sizes, entries = _payload_arrays(segments, payloads, table)
    bad = (_U32 * 2)()
    status = library().kvz_cpu_decode(
        _pointer(segments),
        len(segments),
        _pointer(ids),
        ids.size,
        _pointer(addresses),
        _pointer(sizes),
        _pointer(entries),
        _threads(threads),
        ctypes.addressof(bad),
        ctypes.addressof(bad) + 4,
    )
    _check_decode(status, "decoding", segments, bad, entries)


def cpu_compare(
    a: Segments,
    a_blocks: npt.NDArray[np.int64],
    b: Segments,
    b_blocks: npt.NDArray[np.int64],
    limits: npt.NDArray[np.float64],
    *,
    threads: int = 0,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint64]]:
    """Compare pages of the same geometry in two places of host memory. Blocks the host; releases the GIL.

    Args:
        a: pages of the original, from `segments_array`.
        a_blocks: block numbers in `a`.
        b: pages to compare with it.
        b_blocks: block numbers in `b`, as many.
        limits: largest error allowed, shape ``[blocks, pages]`` or anything that broadcasts to it.
        threads: as in `cpu_encode`.

    Returns:
        Largest absolute error over the finite values of `a` (infinite where `b` is not finite), and the number of
        values that break the limit or, where `a` is not finite, differ in a bit; both of shape ``[blocks, pages]``.

    Raises:
        LayoutError: the arguments do not fit together.
        NativeError: the library reported a failure.
    """
    from_ids, to_ids = _ids(a_blocks), _ids(b_blocks)
    if from_ids.size != to_ids.size or len(a) != len(b):
        raise LayoutError(
            f"{from_ids.size} blocks of {len(a)} pages against {to_ids.size} of {len(b)}: both sides must have as many"
        )
    shape = (from_ids.size, len(a))
    bounds = np.ascontiguousarray(np.broadcast_to(np.asarray(limits, np.float64), shape))
    errors, violations = np.zeros(shape, np.float64), np.zeros(shape, np.uint64)
    status = library().kvz_cpu_compare(
        _pointer(a),
        _pointer(from_ids),
        _pointer(b),
        _pointer(to_ids),
        len(a),
        from_ids.size,
        _pointer(bounds),
        _pointer(errors),
        _pointer(violations),
        _threads(threads),
    )
    check(status, "comparing pages")
    return errors, violations
