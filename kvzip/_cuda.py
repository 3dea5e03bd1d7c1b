# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The CUDA part of the native library, called through ctypes: codec launches, memory, copies, streams, events, devices.

Handles and addresses are integers, sizes are bytes, streams are ``cudaStream_t`` (0 = the legacy default stream). Calls
act on the thread's current device and block the host only where their docstring says so. ``csrc/cuszp/kvz.h`` documents
the interface; `kvzip.driver` says what it needs of it (``Driver``).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvzip import _native
from kvzip._process import watch
from kvzip.errors import BackendUnavailableError, CudaError

if TYPE_CHECKING:
    from kvzip.driver import Copy, CrcArgs, DecodeArgs, EncodeArgs, FewArgs, MoveArgs

Words = npt.NDArray[np.uint64]

_P, _U32, _U64, _I32 = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int32
_PI32, _PU64, _PP = ctypes.POINTER(_I32), ctypes.POINTER(_U64), ctypes.POINTER(_P)

_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "kvz_cuda_workspace_bytes": (_U64, [_U32, _U32]),
    "kvz_cuda_arena_bytes": (_U64, [_P, _U32, _U32, _U32]),
    "kvz_cuda_encode": (_I32, [_P, _P]),
    "kvz_cuda_decode": (_I32, [_P, _P]),
    "kvz_cuda_crc32c": (_I32, [_P, _P]),
    "kvz_cuda_store": (_I32, [_P, _P]),
    "kvz_cuda_load": (_I32, [_P, _P]),
    "kvz_cuda_store_wait": (_I32, [_P, _U64, _U64, _PI32]),
    "kvz_cuda_load_wait": (_I32, [_P, _U64, _U64, _PI32]),
    "kvz_cuda_few_bytes": (_U64, []),
    "kvz_cuda_encode_chunk": (_I32, [_P, _P]),
    "kvz_cuda_decode_chunk": (_I32, [_P, _P]),
    "kvz_cuda_encode_and_copy": (_I32, [_P, _U64, _U64, _PI32]),
    "kvz_cuda_copy_between": (_I32, [_P, _P, _P, _U64, _P, _P, _P]),
    "kvz_cuda_mapped_copy": (_I32, [_P, _P, _U64, _P]),
    "kvz_cuda_last_error": (_I32, [_P, _U64]),
    "kvz_cuda_available": (_I32, [_PI32]),
    "kvz_cuda_device_info": (_I32, [_I32, _P]),
    "kvz_cuda_versions": (_I32, [_PI32, _PI32]),
    "kvz_cuda_get_device": (_I32, [_PI32]),
    "kvz_cuda_set_device": (_I32, [_I32]),
    "kvz_cuda_memory": (_I32, [_PU64, _PU64]),
    "kvz_cuda_malloc": (_I32, [_U64, _PP]),
    "kvz_cuda_free": (_I32, [_P]),
    "kvz_cuda_host_register": (_I32, [_P, _U64]),
    "kvz_cuda_host_unregister": (_I32, [_P]),
    "kvz_cuda_memset": (_I32, [_P, _I32, _U64, _P]),
    "kvz_cuda_copy": (_I32, [_P, _P, _U64, _P]),
    "kvz_cuda_copy_batch": (_I32, [_P, _P, _P, _U64, _P]),
    "kvz_cuda_stream_create": (_I32, [_I32, _PP]),
    "kvz_cuda_stream_destroy": (_I32, [_P]),
    "kvz_cuda_stream_wait_event": (_I32, [_P, _P]),
    "kvz_cuda_stream_synchronize": (_I32, [_P]),
    "kvz_cuda_event_create": (_I32, [_I32, _PP]),
    "kvz_cuda_event_destroy": (_I32, [_P]),
    "kvz_cuda_event_record": (_I32, [_P, _P]),
    "kvz_cuda_event_query": (_I32, [_P, _PI32]),
    "kvz_cuda_event_synchronize": (_I32, [_P]),
    "kvz_cuda_event_wait": (_I32, [_P, _U64, _U64, _PI32]),
    "kvz_cuda_event_elapsed": (_I32, [_P, _P, ctypes.POINTER(ctypes.c_float)]),
}


class _EncodeArgs(ctypes.Structure):
    """``kvz_cuda_encode_args``."""

    _fields_ = (
        ("segments", _P),
        ("device_segments", _P),
        ("block_ids", _P),
        ("arena", _P),
        ("arena_bytes", _U64),
        ("record_stride", _U64),
        ("table", _P),
        ("payload_bytes", _P),
        ("record_offsets", _P),
        ("status", _P),
        ("workspace", _P),
        ("workspace_bytes", _U64),
        ("num_segments", _U32),
        ("num_blocks", _U32),
        ("header_bytes", _U32),
        ("max_ctas", _U32),
        ("strips_per_warp", _U32),
        ("reserved", _U32),
        ("crc32c", _P),
    )


class _DecodeArgs(ctypes.Structure):
    """``kvz_cuda_decode_args``."""

    _fields_ = (
        ("segments", _P),
        ("device_segments", _P),
        ("block_ids", _P),
        ("payloads", _P),
        ("payload_bytes", _P),
        ("table", _P),
        ("block_status", _P),
        ("workspace", _P),
        ("workspace_bytes", _U64),
        ("num_segments", _U32),
        ("num_blocks", _U32),
        ("all_or_nothing", _U32),
        ("max_ctas", _U32),
        ("strips_per_warp", _U32),
        ("extended", _U32),
        ("crc32c", _P),
    )


class _CrcArgs(ctypes.Structure):
    """``kvz_cuda_crc_args``."""

    _fields_ = (
        ("base", _P),
        ("offsets", _P),
        ("skip", _U64),
        ("payload_bytes", _P),
        ("crc32c", _P),
        ("scratch", _P),
        ("max_payload_bytes", _U64),
        ("count", _U32),
        ("check", _U32),
        ("max_ctas", _U32),
        ("reserved", _U32),
    )


class _Run(ctypes.Structure):
    """``kvz_run``."""

    _fields_ = (("start", _U64), ("address", _U64), ("bytes", _U64))


class _MoveArgs(ctypes.Structure):
    """``kvz_cuda_move_args``."""

    _fields_ = (
        ("arena", _P),
        ("record_offsets", _P),
        ("payload_bytes", _P),
        ("checked_bytes", _P),
        ("crc32c", _P),
        ("scratch", _P),
        ("runs", _P),
        ("run", _Run),
        ("beside_to", _P),
        ("beside_from", _P),
        ("max_payload_bytes", _U64),
        ("beside_bytes", _U32),
        ("num_runs", _U32),
        ("num_blocks", _U32),
        ("header_bytes", _U32),
        ("max_ctas", _U32),
        ("most_pieces", _U32),
    )


class _FewArgs(ctypes.Structure):
    """``kvz_cuda_few``."""

    _fields_ = (
        ("memory", _P),
        ("ends", _P),
        ("table", _P),
        ("block_ids", _P),
        ("payload_bytes", _P),
        ("status", _P),
        ("launch", _U32),
        ("reserved", _U32),
    )


class _StoreArgs(ctypes.Structure):
    """``kvz_cuda_store_args``."""

    _fields_ = (
        ("encode", _EncodeArgs),
        ("move", _MoveArgs),
        ("few", _FewArgs),
        ("after", _P),
        ("order", _P),
        ("done", _P),
        ("device", _I32),
        ("reserved", _I32),
    )


class _LoadArgs(ctypes.Structure):
    """``kvz_cuda_load_args``."""

    _fields_ = (("decode", _DecodeArgs), *_StoreArgs._fields_[1:])


_COPY_FIELDS = tuple(
    (f"{what}_{part}", _U64 if part == "bytes" else _P)
    for what in ("inputs", "results")
    for part in ("to", "from", "bytes")
)


class _EncodeChunkArgs(ctypes.Structure):
    """``kvz_cuda_encode_chunk_args``."""

    _fields_ = (("encode", _EncodeArgs), *_COPY_FIELDS, ("done", _P))


class _Outgoing(ctypes.Structure):
    """``kvz_cuda_outgoing``."""

    _fields_ = (("encode", _P), ("stream", _P), ("copied", _P), ("begins", _P), ("ends", _P))


class _OutgoingArgs(ctypes.Structure):
    """``kvz_cuda_outgoing_args``."""

    _fields_ = (
        ("chunks", _P),
        ("count", _U64),
        ("launched", _U64),
        ("to", _P),
        ("room_bytes", _U64),
        ("bytes", _P),
        ("kernels", _P),
    )


class _DecodeChunkArgs(ctypes.Structure):
    """``kvz_cuda_decode_chunk_args``."""

    _fields_ = (
        ("decode", _DecodeArgs),
        *_COPY_FIELDS[:3],
        ("copied", _P),
        ("done", _P),
    )


class _DeviceInfo(ctypes.Structure):
    """``kvz_cuda_device``."""

    _fields_ = (
        ("name", ctypes.c_char * 256),
        ("memory_bytes", _U64),
        ("capability_major", _I32),
        ("capability_minor", _I32),
        ("multiprocessors", _I32),
        ("l2_bytes", _I32),
        ("shared_bytes", _I32),
        ("copy_engines", _I32),
        ("pci_domain", _I32),
        ("pci_bus", _I32),
        ("pci_device", _I32),
        ("host_native_atomics", _I32),
    )


@dataclass(frozen=True)
class DeviceInfo:
    """One GPU.

    Attributes:
        index: number of the device.
        name: what the driver calls it.
        memory_bytes: device memory.
        capability: compute capability, (major, minor).
        multiprocessors: their number.
        l2_bytes: second-level cache.
        shared_bytes: most shared memory of one thread block.
        copy_engines: copies that can run at a time.
        pci_bus_id: such as ``"0000:01:00.0"``.
    """

    index: int
    name: str
    memory_bytes: int
    capability: tuple[int, int]
    multiprocessors: int
    l2_bytes: int
    shared_bytes: int
    copy_engines: int
    pci_bus_id: str


_lock = threading.Lock()
_driver: CudaDriver | None = None


def driver() -> CudaDriver:
    """The device functions of this process. Thread-safe.

    Raises:
        BackendUnavailableError: the native library was built without CUDA, or no GPU can be used; says what to do.
    """
    global _driver
    with _lock:
        if _driver is None:
            _driver = CudaDriver()
        return _driver


def unavailable() -> str:
    """Why the GPU cannot be used, as a sentence that says what to do; ``""`` when it can."""
    try:
        driver()
    except BackendUnavailableError as error:
        return str(error)
    return ""


def describe() -> dict[str, Any]:
    """Versions and devices, for reports.

    Raises:
        BackendUnavailableError: as `driver`.
    """
    found = driver()
    driver_version, runtime_version = found.versions()
    return {
        "driver": f"{driver_version // 1000}.{driver_version % 1000 // 10}",
        "runtime": f"{runtime_version // 1000}.{runtime_version % 1000 // 10}",
        "devices": [asdict(found.device_info(i)) for i in range(found.device_count())],
    }


def _bind() -> ctypes.CDLL:
    library = _native.library()
    for name, (result, arguments) in _PROTOTYPES.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise BackendUnavailableError(
                f"the native library has no {name}: it belongs to another version; reinstall kvzip"
            ) from None
        function.restype, function.argtypes = result, arguments
    return library


class CudaDriver:
    """Device functions as methods; every failure is a `CudaError` (or `NativeError` for a refused argument).

    Raises:
        BackendUnavailableError: the native library was built without CUDA, or no GPU can be used.
    """

    def __init__(self) -> None:
        self._library: Any = _bind()
        count = _I32()
        status = self._library.kvz_cuda_available(ctypes.byref(count))
        if status == _native.NO_CUDA:
            raise BackendUnavailableError(
                "the native library was built without CUDA: reinstall kvzip with KVZIP_CUDA=on and nvcc on PATH"
            )
        if status != _native.OK:
            code, text = self._last_error()
            raise BackendUnavailableError(f"no GPU can be used: {text} (CUDA error {code}). {_remedy(code)}")
        self._devices = count.value
        watch(self)

    def _after_fork(self) -> None:
        """CUDA does not work in a forked child, and must not be touched there."""
        global _lock
        _lock = threading.Lock()
        self._library = _Forked()

    def _at_exit(self) -> None:
        """Nothing: the runtime releases what is left."""

    # ---- errors

    def _last_error(self) -> tuple[int, str]:
        text = ctypes.create_string_buffer(512)
        code = self._library.kvz_cuda_last_error(text, len(text))
        return int(code), text.value.decode("utf-8", "replace")

    def _check(self, status: int, what: str) -> None:
        if status == _native.OK:
            return
        if status == _native.CUDA_ERROR:
            code, text = self._last_error()
            raise CudaError(f"{what} failed: {text}", code=code, name=text.partition(":")[0], status=status)
        _native.check(status, what)

    # ---- devices

    def device_count(self) -> int:
        """Number of GPUs that this process sees."""
        return self._devices

    def versions(self) -> tuple[int, int]:
        """CUDA versions of the driver and of the runtime that the library holds; 13000 is 13.0."""
        driver_version, runtime_version = _I32(), _I32()
        status = self._library.kvz_cuda_versions(ctypes.byref(driver_version), ctypes.byref(runtime_version))
        self._check(status, "asking for the CUDA versions")
        return driver_version.value, runtime_version.value

    def device_info(self, device: int) -> DeviceInfo:
        """What the driver says of one GPU."""
        info = _DeviceInfo()
        self._check(self._library.kvz_cuda_device_info(device, ctypes.byref(info)), f"asking about device {device}")
        return DeviceInfo(
            index=device,
            name=info.name.decode("utf-8", "replace"),
            memory_bytes=info.memory_bytes,
            capability=(info.capability_major, info.capability_minor),
            multiprocessors=info.multiprocessors,
            l2_bytes=info.l2_bytes,
            shared_bytes=info.shared_bytes,
            copy_engines=info.copy_engines,
            pci_bus_id=f"{info.pci_domain:04x}:{info.pci_bus:02x}:{info.pci_device:02x}.0",
        )

    def get_device(self) -> int:
        """The thread's current device."""
        if self._devices == 1:  # it cannot be another
            return 0
        device = _I32()
        self._check(self._library.kvz_cuda_get_device(ctypes.byref(device)), "asking for the current device")
        return device.value

    def set_device(self, device: int) -> None:
        """Make a device the thread's current one."""
        if device or self._devices > 1:  # else it is that already
            self._check(self._library.kvz_cuda_set_device(device), f"switching to device {device}")

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the current device."""
        free, total = _U64(), _U64()
        self._check(self._library.kvz_cuda_memory(ctypes.byref(free), ctypes.byref(total)), "asking for device memory")
        return free.value, total.value

    # ---- memory and copies

    def malloc(self, nbytes: int) -> int:
        """Allocate device memory. May block the host."""
        address = _P()
        status = self._library.kvz_cuda_malloc(nbytes, ctypes.byref(address))
        self._check(status, f"allocating {nbytes} bytes of device memory")
        return address.value or 0

    def free(self, address: int) -> None:
        """Free device memory; 0 is allowed. May block the host."""
        if address:
            self._check(self._library.kvz_cuda_free(address), "freeing device memory")

    def host_register(self, address: int, nbytes: int) -> None:
        """Pin host memory and map it for all devices. Blocks the host."""
        self._check(self._library.kvz_cuda_host_register(address, nbytes), f"pinning {nbytes} bytes of host memory")

    def host_unregister(self, address: int) -> None:
        """Undo `host_register`. Blocks the host."""
        self._check(self._library.kvz_cuda_host_unregister(address), "unpinning host memory")

    def memset(self, address: int, byte: int, nbytes: int, stream: int) -> None:
        """Fill device memory, in stream order."""
        self._check(self._library.kvz_cuda_memset(address, byte, nbytes, stream), f"filling {nbytes} bytes")

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        """Copy in any direction, in stream order. Host memory must be pinned, or the call may block."""
        self._check(self._library.kvz_cuda_copy(to, source, nbytes, stream), f"copying {nbytes} bytes")

    def copy_batch(self, to: Words, source: Words, nbytes: Words, stream: int) -> None:
        """Many copies in one call, in stream order; they may run in any order among themselves.

        Args:
            to: addresses, uint64.
            source: addresses, uint64.
            nbytes: sizes, uint64; none may be 0.
            stream: stream.
        """
        to, source, nbytes = (np.ascontiguousarray(a, np.uint64) for a in (to, source, nbytes))
        status = self._library.kvz_cuda_copy_batch(
            to.ctypes.data, source.ctypes.data, nbytes.ctypes.data, len(nbytes), stream
        )
        self._check(status, f"copying {len(nbytes)} pieces")

    def mapped_copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        """Copy between device memory and mapped host memory by a small kernel, in stream order.

        Addresses and size are multiples of 16.
        """
        self._check(self._library.kvz_cuda_mapped_copy(to, source, nbytes, stream), f"copying {nbytes} bytes")

    # ---- streams and events

    def stream_create(self, priority: int = 0) -> int:
        """Make a stream that does not wait for the legacy default stream; -1 is served before 0."""
        stream = _P()
        self._check(self._library.kvz_cuda_stream_create(priority, ctypes.byref(stream)), "creating a stream")
        return stream.value or 0

    def stream_destroy(self, stream: int) -> None:
        """Give a stream up; its work still ends."""
        self._check(self._library.kvz_cuda_stream_destroy(stream), "destroying a stream")

    def stream_wait_event(self, stream: int, event: int) -> None:
        """Have later work of a stream wait for what an event stands for now."""
        self._check(self._library.kvz_cuda_stream_wait_event(stream, event), "making a stream wait")

    def stream_synchronize(self, stream: int) -> None:
        """Wait for a stream. Blocks the host."""
        self._check(self._library.kvz_cuda_stream_synchronize(stream), "waiting for a stream")

    def event_create(self, *, timing: bool = False) -> int:
        """Make an event; waiting for it sleeps, it does not spin."""
        event = _P()
        self._check(self._library.kvz_cuda_event_create(int(timing), ctypes.byref(event)), "creating an event")
        return event.value or 0

    def event_destroy(self, event: int) -> None:
        """Give an event up."""
        self._check(self._library.kvz_cuda_event_destroy(event), "destroying an event")

    def event_record(self, event: int, stream: int) -> None:
        """Let an event stand for all work of a stream so far."""
        self._check(self._library.kvz_cuda_event_record(event, stream), "recording an event")

    def event_query(self, event: int) -> bool:
        """Whether the work that an event stands for is done."""
        done = _I32()
        self._check(self._library.kvz_cuda_event_query(event, ctypes.byref(done)), "asking for an event")
        return bool(done.value)

    def event_synchronize(self, event: int) -> None:
        """Wait for an event. Blocks the host."""
        self._check(self._library.kvz_cuda_event_synchronize(event), "waiting for an event")

    def event_wait(self, event: int, spin_us: int, timeout_us: int) -> bool:
        """Wait for an event for a time: spin at first, then look now and then. Blocks the host.

        Returns:
            Whether the work that it stands for is done.
        """
        done = _I32()
        self._check(
            self._library.kvz_cuda_event_wait(event, spin_us, timeout_us, ctypes.byref(done)), "waiting for an event"
        )
        return bool(done.value)

    def event_elapsed_seconds(self, start: int, stop: int) -> float:
        """Time between two events that were made with timing."""
        milliseconds = ctypes.c_float()
        status = self._library.kvz_cuda_event_elapsed(start, stop, ctypes.byref(milliseconds))
        self._check(status, "timing events")
        return milliseconds.value / 1e3

    # ---- codec

    def workspace_bytes(self, num_segments: int, num_blocks: int) -> int:
        """Scratch of `encode` and `decode`; zero it once, it stays zero between calls."""
        return int(self._library.kvz_cuda_workspace_bytes(num_segments, num_blocks))

    def arena_bytes(self, segments: npt.NDArray[Any], num_blocks: int, header_bytes: int) -> int:
        """Most bytes that the records of a batch can take in an arena."""
        found = int(self._library.kvz_cuda_arena_bytes(segments.ctypes.data, len(segments), num_blocks, header_bytes))
        if found == 0 and num_blocks:
            self._check(_native.INVALID_ARGUMENT, "sizing an arena")
        return found

    def encode(self, args: EncodeArgs, stream: int, *, record_stride: int = 0, strips_per_warp: int = 0) -> None:
        """Launch an encoder (``kvz_cuda_encode``).

        Args:
            args: what and where to.
            stream: stream.
            record_stride: bytes from one record to the next in the arena; 0 packs them.
            strips_per_warp: tuning; 0 = automatic.
        """
        native = _encode_args(args, record_stride=record_stride, strips_per_warp=strips_per_warp)
        self._check(self._library.kvz_cuda_encode(ctypes.byref(native), stream), "encoding on the GPU")

    def decode(self, args: DecodeArgs, stream: int, *, all_or_nothing: bool = False, strips_per_warp: int = 0) -> None:
        """Launch validation and decoder (``kvz_cuda_decode``).

        Args:
            args: what and where to.
            stream: stream.
            all_or_nothing: one corrupt block keeps every block of the batch from being written.
            strips_per_warp: tuning; 0 = automatic.
        """
        native = _decode_args(args, all_or_nothing=all_or_nothing, strips_per_warp=strips_per_warp)
        self._check(self._library.kvz_cuda_decode(ctypes.byref(native), stream), "decoding on the GPU")

    def crc32c(self, args: CrcArgs, stream: int) -> None:
        """Launch checksums of payloads, or their check (``kvz_cuda_crc32c``)."""
        native = _CrcArgs(
            base=args.base,
            offsets=args.offsets,
            skip=args.skip,
            payload_bytes=args.payload_bytes,
            crc32c=args.crc32c,
            scratch=args.scratch,
            max_payload_bytes=args.max_payload_bytes,
            count=args.count,
            check=int(args.check),
            max_ctas=args.max_ctas,
            reserved=0,
        )
        self._check(self._library.kvz_cuda_crc32c(ctypes.byref(native), stream), "checksumming on the GPU")

    # ---- chunks of large transfers

    def encode_call(
        self, encode: EncodeArgs, inputs: Copy, results: Copy, done: int, stream: int, copied: int, copies: int
    ) -> _EncodeCall:
        """Bind ``kvz_cuda_encode_chunk``: each call queues it. `outgoing` copies in another stream, and marks that."""
        return _EncodeCall(self, encode, inputs, results, done, stream, copied, copies)

    def outgoing(self, calls: Sequence[_EncodeCall], stream: int) -> _OutgoingChunks:
        """Bind ``kvz_cuda_encode_and_copy``; see `kvzip.driver.OutgoingChunks`."""
        return _OutgoingChunks(self, calls, stream)

    def decode_call(self, decode: DecodeArgs, inputs: Copy, copied: int, done: int, stream: int) -> Callable[[], None]:
        """Bind ``kvz_cuda_decode_chunk``: each call queues it behind the event of the copies."""
        native = _DecodeChunkArgs(_decode_args(decode), *inputs, copied, done)
        function, reference = self._library.kvz_cuda_decode_chunk, ctypes.byref(native)

        def call(keep: object = decode) -> None:
            status = function(reference, stream)
            if status:
                self._check(status, "decoding on the GPU")

        return call

    def copy_between(self, pieces: Sequence[Copy], after: int, done: int, stream: int) -> None:
        """Copies in stream order, behind an event if it is not 0; another event is recorded behind them."""
        count = len(pieces)
        columns = _words(pieces[0] if count == 1 else [n for column in zip(*pieces, strict=True) for n in column])
        to = ctypes.addressof(columns)
        source, nbytes = to + 8 * count, to + 16 * count
        status = self._library.kvz_cuda_copy_between(to, source, nbytes, count, after, done, stream)
        if status:
            self._check(status, f"copying {len(pieces)} pieces")

    # ---- whole transfers

    def few_bytes(self) -> int:
        """Device memory of the kernels for few pages (``kvz_cuda_few_bytes``)."""
        return int(self._library.kvz_cuda_few_bytes())

    def store_call(
        self, encode: EncodeArgs, move: MoveArgs, few: FewArgs, order: int, device: int, stream: int
    ) -> _SwapCall:
        """Bind a store (``kvz_cuda_store``); see `kvzip.driver.SwapCall`."""
        native = _StoreArgs(encode=_encode_args(encode), move=_move_args(move), few=_few_args(few))
        native.order, native.device = order, device
        call, wait = self._library.kvz_cuda_store, self._library.kvz_cuda_store_wait
        return _SwapCall(self, call, wait, native, stream, "storing from the GPU", encode)

    def load_call(
        self, decode: DecodeArgs, move: MoveArgs, few: FewArgs, order: int, device: int, stream: int
    ) -> _SwapCall:
        """Bind a load (``kvz_cuda_load``); see `kvzip.driver.SwapCall`."""
        native = _LoadArgs(decode=_decode_args(decode), move=_move_args(move), few=_few_args(few))
        native.order, native.device = order, device
        call, wait = self._library.kvz_cuda_load, self._library.kvz_cuda_load_wait
        return _SwapCall(self, call, wait, native, stream, "loading to the GPU", decode)


class _Forked:
    """Stands in for the native library in a forked child."""

    def __getattr__(self, name: str) -> Any:
        raise BackendUnavailableError(
            "this process was forked from one that uses the GPU, and CUDA does not work in such a child: start it with "
            "the method spawn or forkserver, or fork before the GPU is used"
        )


def _words(values: Sequence[int]) -> ctypes.Array[ctypes.c_uint64]:
    return (_U64 * len(values))(*values)


class _EncodeCall:
    """A chunk's launch; the native arguments are made once."""

    def __init__(
        self,
        driver: CudaDriver,
        encode: EncodeArgs,
        inputs: Copy,
        results: Copy,
        done: int,
        stream: int,
        copied: int,
        copies: int,
    ) -> None:
        self._driver = driver
        self._keep = encode  # which has the segments that the native arguments point to
        self._native = _EncodeChunkArgs(_encode_args(encode), *inputs, *results, done)
        self._function, self._reference = driver._library.kvz_cuda_encode_chunk, ctypes.byref(self._native)
        self._stream = stream
        self._outgoing = _Outgoing(encode=ctypes.addressof(self._native), stream=copies, copied=copied)
        self.address = ctypes.addressof(self._outgoing)

    def mark(self, begins: int, ends: int) -> None:
        """Record events before and behind the chunk's copy, where `CudaDriver.outgoing` makes it; 0 = none."""
        self._outgoing.begins, self._outgoing.ends = begins, ends

    def __call__(self) -> None:
        status = self._function(self._reference, self._stream)
        if status:
            self._driver._check(status, "encoding on the GPU")


class _OutgoingChunks:
    """`kvzip.driver.OutgoingChunks`: the native arguments are made once."""

    def __init__(self, driver: CudaDriver, calls: Sequence[_EncodeCall], stream: int) -> None:
        self._driver = driver
        self._function = driver._library.kvz_cuda_encode_and_copy
        count = len(calls)
        chunks, self._sizes = (_P * count)(*[call.address for call in calls]), (_U64 * count)()
        self._none = bytes(self._sizes)
        self._keep = calls, chunks  # what the native arguments point to
        self._native = _OutgoingArgs(
            chunks=ctypes.addressof(chunks), count=count, bytes=ctypes.addressof(self._sizes), kernels=stream
        )
        self._reference = ctypes.byref(self._native)

    @property
    def copied(self) -> Iterable[int]:
        return self._sizes

    def begin(self, to: int, room_bytes: int) -> None:
        native = self._native
        native.launched, native.to, native.room_bytes = 1, to, room_bytes
        ctypes.memmove(self._sizes, self._none, len(self._none))

    def wait(self, spin_us: int, timeout_us: int) -> bool:
        done = _I32()
        status = self._function(self._reference, spin_us, timeout_us, ctypes.byref(done))
        if status:
            self._driver._check(status, "encoding on the GPU")
        return bool(done.value)


class _SwapCall:
    """`kvzip.driver.SwapCall`: the native arguments are made once."""

    def __init__(
        self,
        driver: CudaDriver,
        function: Any,
        wait: Any,
        native: _StoreArgs | _LoadArgs,
        stream: int,
        what: str,
        keep: object,
    ) -> None:
        self._driver = driver
        self._function = function
        self._wait = wait
        self._native = native
        self._move = native.move
        self._run = self._move.run
        self._reference = ctypes.byref(native)
        self._stream = stream
        self._what = what
        self._keep = keep  # the segments that the native arguments point to

    def __call__(self, after: int, done: int, num_runs: int, address: int, nbytes: int) -> None:
        native, run = self._native, self._run
        native.after, native.done = after, done
        self._move.num_runs, run.address, run.bytes = num_runs, address, nbytes
        status = self._function(self._reference, self._stream)
        if status:
            self._driver._check(status, self._what)

    def wait(self, spin_us: int, timeout_us: int) -> bool:
        done = ctypes.c_int32()  # several threads may wait
        status = self._wait(self._reference, spin_us, timeout_us, ctypes.byref(done))
        if status:
            self._driver._check(status, self._what)
        return bool(done.value)


def _few_args(args: FewArgs) -> _FewArgs:
    return _FewArgs(
        memory=args.memory,
        ends=args.ends,
        table=args.table,
        block_ids=args.block_ids,
        payload_bytes=args.payload_bytes,
        status=args.status,
    )


def _encode_args(args: EncodeArgs, *, record_stride: int = 0, strips_per_warp: int = 0) -> _EncodeArgs:
    return _EncodeArgs(
        segments=args.segments.ctypes.data,
        device_segments=args.device_segments,
        block_ids=args.block_ids,
        arena=args.arena,
        arena_bytes=args.arena_bytes,
        record_stride=record_stride,
        table=args.table,
        payload_bytes=args.payload_bytes,
        record_offsets=args.record_offsets,
        status=args.status,
        workspace=args.workspace,
        workspace_bytes=args.workspace_bytes,
        num_segments=len(args.segments),
        num_blocks=args.num_blocks,
        header_bytes=args.header_bytes,
        max_ctas=args.max_ctas,
        strips_per_warp=strips_per_warp,
        reserved=0,
        crc32c=args.crc32c,
    )


def _decode_args(args: DecodeArgs, *, all_or_nothing: bool = False, strips_per_warp: int = 0) -> _DecodeArgs:
    return _DecodeArgs(
        segments=args.segments.ctypes.data,
        device_segments=args.device_segments,
        block_ids=args.block_ids,
        payloads=args.payloads,
        payload_bytes=args.payload_bytes,
        table=args.table,
        block_status=args.block_status,
        workspace=args.workspace,
        workspace_bytes=args.workspace_bytes,
        num_segments=len(args.segments),
        num_blocks=args.num_blocks,
        all_or_nothing=int(all_or_nothing),
        max_ctas=args.max_ctas,
        strips_per_warp=strips_per_warp,
        extended=args.extended,
        crc32c=args.crc32c,
    )


def _move_args(args: MoveArgs) -> _MoveArgs:
    return _MoveArgs(
        arena=args.arena,
        record_offsets=args.record_offsets,
        payload_bytes=args.payload_bytes,
        checked_bytes=args.checked_bytes,
        crc32c=args.crc32c,
        scratch=args.scratch,
        runs=args.runs,
        beside_to=args.beside_to,
        beside_from=args.beside_from,
        max_payload_bytes=args.max_payload_bytes,
        beside_bytes=args.beside_bytes,
        num_blocks=args.num_blocks,
        header_bytes=args.header_bytes,
    )


_NO_DEVICE = 100  # cudaErrorNoDevice
_OLD_DRIVER = 35  # cudaErrorInsufficientDriver, also without any driver


def _remedy(code: int) -> str:
    if code == _NO_DEVICE:
        return "Run on a machine with an NVIDIA GPU, and let CUDA_VISIBLE_DEVICES name one."
    if code == _OLD_DRIVER:
        return "Install an NVIDIA driver for CUDA 13 (580 or newer)."
    return "See whether nvidia-smi works."
