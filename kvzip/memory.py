# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Host memory for pools: `PageableMemory` and `PinnedMemory` behind one contract, `MemoryResource`.

A resource hands out a `Region`: one contiguous, zeroed, writable range of host memory, of exactly the bytes that were
asked for. The kernel rounds the mapping up to whole pages and nothing else does, so the budget that a user gives is
the budget that is used (``cudaHostAlloc`` and power-of-two allocators do not give that).

How `PinnedMemory` fills and pins, and why:

* Anonymous ``mmap``, then a parallel first touch, then ``cudaHostRegister``: about nine times faster per GiB than
  ``cudaHostAlloc``, which zeroes and pins page by page in one thread. Touching is the larger part; on an otherwise idle
  2-core virtual machine it took 1,040 ms per GiB in one thread with 4 KiB pages, 280 ms in two, and 84 ms in two with
  transparent huge pages (``bench/bench_pool.py`` measures it again). One written byte per page from NumPy, which
  releases the interpreter lock, was as fast as ``MADV_POPULATE_WRITE`` or faster, and works on every kernel.
* Registration goes piece by piece (`Region.piece_bytes`), so that no single call holds the kernel's memory lock for
  seconds, progress can be shown, and the touching of one piece overlaps the registration of the one before it. CUDA
  promises copies within one registered range only: whoever cuts a region up must not let a copy cross a multiple of
  ``piece_bytes``. `kvzip.HostPool` never does.
* Nothing runs at import, and nothing is freed by accident: memory goes back to the system when the region was closed
  *and* no NumPy view of it is alive.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import re
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from kvzip import _cuda, _native
from kvzip.errors import BackendUnavailableError, ConfigError, NativeError
from kvzip.interop.torch import gpu_problem, host_register, host_unregister

__all__ = [
    "MemoryResource",
    "PageableMemory",
    "PinnedMemory",
    "Region",
    "memory_for",
    "numa_node_of_gpu",
    "numa_nodes",
]

Bytes = npt.NDArray[np.uint8]
#: Called as ``progress(done_bytes, total_bytes)`` in the thread that allocates, after each piece.
Progress = Callable[[int, int], None]

_MIB = 1 << 20
_SLICE_BYTES = 32 * _MIB  # of one touch task: a multiple of every huge page size in use for anonymous memory
_MAX_TOUCH_THREADS = 16  # first touch is bound by memory bandwidth well before that
_STATUS_NO_CUDA = 5  # KVZ_NO_CUDA of csrc/cuszp/kvz.h
_NODES = Path("/sys/devices/system/node")
_PCI = Path("/sys/bus/pci/devices")
_CGROUP = Path("/sys/fs/cgroup")
_MPOL_PREFERRED, _MPOL_BIND = 1, 2
_SYS_MBIND = {"x86_64": 237, "aarch64": 235}

# Regions whose unregistration failed: unmapping memory that the driver still considers pinned would let it write to
# whatever is mapped there next, so these stay mapped until the process ends.
_kept_mapped: list[Bytes] = []


class Region:
    """One contiguous range of host memory, owned by whoever allocated it.

    Args:
        array: the memory: one-dimensional, contiguous, writable uint8.
        pinned: whether devices can copy from and to it directly and asynchronously.
        piece_bytes: the memory was registered in pieces of this size, and no copy may cross a multiple of it; 0 where
            the whole region is one piece.
        release: gives back what the resource holds beside the mapping (a registration); called once.

    Thread safety: reading the properties is safe; `close` must not run beside a use.
    """

    def __init__(
        self, array: Bytes, *, pinned: bool = False, piece_bytes: int = 0, release: Callable[[], None] | None = None
    ) -> None:
        if array.dtype != np.uint8 or array.ndim != 1 or not array.flags.c_contiguous or not array.flags.writeable:
            raise ConfigError(
                f"a region needs a one-dimensional, contiguous, writable uint8 array, not {array.ndim} dimensions of "
                f"{array.dtype}: use array.reshape(-1).view(np.uint8)"
            )
        self._array: Bytes | None = array
        self._address = int(array.ctypes.data)
        self._nbytes = int(array.nbytes)
        self._pinned = pinned
        self._piece_bytes = piece_bytes
        self._finalizer = weakref.finalize(self, release) if release is not None else None
        if self._finalizer is not None:
            # At exit the driver may be gone already, and it releases what a process leaves behind anyway.
            self._finalizer.atexit = False

    @property
    def array(self) -> Bytes:
        """The memory as a writable uint8 array of `nbytes` values. A view of it keeps the mapping alive.

        Raises:
            ConfigError: the region is closed.
        """
        if self._array is None:
            raise ConfigError(f"this region of {self._nbytes} bytes is closed: allocate another one")
        return self._array

    @property
    def address(self) -> int:
        """Address of the first byte, aligned to a page.

        Raises:
            ConfigError: the region is closed.
        """
        _ = self.array
        return self._address

    @property
    def nbytes(self) -> int:
        """Bytes of the region: exactly what was asked for."""
        return self._nbytes

    @property
    def pinned(self) -> bool:
        """Whether devices can copy from and to this memory directly and asynchronously."""
        return self._pinned

    @property
    def piece_bytes(self) -> int:
        """No copy to or from a device may cross a multiple of this offset; 0 where there is no such limit."""
        return self._piece_bytes

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._array is None

    def close(self) -> None:
        """Give the memory back. Views that are still alive stay readable, and keep the mapping until they are gone.

        The caller sees to it that no device copy is under way. Calling it again has no effect.

        Raises:
            NativeError: the device runtime refused to unregister the memory; it then stays mapped.
        """
        self._array = None
        if self._finalizer is not None:
            self._finalizer()

    def __enter__(self) -> Region:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"at {self._address:#x}"
        return f"Region({self._nbytes} bytes, {'pinned' if self._pinned else 'pageable'}, {state})"


@runtime_checkable
class MemoryResource(Protocol):
    """Where a pool gets its memory from.

    The contract, for third parties that bring their own (shared memory, CXL, a file mapping):

    * ``allocate(nbytes)`` returns a `Region` of exactly ``nbytes`` >= 1 bytes, zeroed, aligned to at least 4,096 bytes.
    * It either succeeds entirely or raises and leaves nothing behind: no mapping, no registration, no thread.
    * `ConfigError` says that the amount is impossible here, `BackendUnavailableError` that the kind of memory is.
    * It blocks the host for as long as it takes. It may be called from any thread, and several times; the regions are
      independent of each other and of the resource's lifetime.
    """

    def allocate(self, nbytes: int) -> Region:
        """Allocate ``nbytes`` bytes of zeroed memory. Blocks the host."""
        ...


class PageableMemory:
    """Ordinary anonymous memory. Pages are taken from the system when they are first written, so it costs nothing yet.

    Args:
        huge_pages: ask for transparent huge pages where the system offers them (fewer faults and TLB misses; a pool
            is filled entirely sooner or later, so nothing is wasted).
    """

    def __init__(self, *, huge_pages: bool = True) -> None:
        self._huge_pages = huge_pages

    def allocate(self, nbytes: int) -> Region:
        """Map ``nbytes`` bytes of zeroed memory. Returns at once.

        Raises:
            ConfigError: ``nbytes`` is not positive, or the system refuses a mapping of that size.
        """
        return Region(_as_array(_map(nbytes, self._huge_pages)))

    def __repr__(self) -> str:
        return f"PageableMemory(huge_pages={self._huge_pages})"


class PinnedMemory:
    """Page-locked host memory that CUDA devices copy from and to directly; see the module's text for how and why.

    Args:
        numa_node: the node to take the memory from, usually `numa_node_of_gpu`. None leaves it to the system. Without
            effect on a machine of one node.
        numa_strict: refuse what the node has no room for, or where nothing can be placed. False: take from other nodes
            what this one does not give.
        piece_bytes: bytes that one registration covers, a multiple of 2 MiB. Copies must not cross a piece.
        threads: threads for the first touch; 0 means one per usable core, 16 at most.
        huge_pages: ask for transparent huge pages where the system offers them.
        progress: called as ``progress(done_bytes, total_bytes)`` after each piece, in the calling thread. An exception
            from it undoes the allocation and is passed on.
        register: ``register(address, nbytes) -> status`` (0 is success); None = `kvz_cuda_host_register` of the native
            library, or what torch has where the library was built without CUDA.
        unregister: ``unregister(address) -> status``, its reverse.

    The memory is not inherited by forked children (``MADV_DONTFORK``): a fork would otherwise have to copy every
    pinned page, or let the parent's next write move away from the page that the device knows.
    """

    def __init__(
        self,
        *,
        numa_node: int | None = None,
        numa_strict: bool = True,
        piece_bytes: int = 1 << 30,
        threads: int = 0,
        huge_pages: bool = True,
        progress: Progress | None = None,
        register: Callable[[int, int], int] | None = None,
        unregister: Callable[[int], int] | None = None,
    ) -> None:
        if piece_bytes <= 0 or piece_bytes % (2 * _MIB):
            raise ConfigError(f"piece_bytes={piece_bytes} must be a positive multiple of {2 * _MIB} (2 MiB)")
        if threads < 0:
            raise ConfigError(f"threads={threads} must be 0 (one per usable core) or more")
        if (register is None) != (unregister is None):
            raise ConfigError("register and unregister belong together: give both or neither")
        nodes = numa_nodes()
        if numa_node is not None and len(nodes) > 1 and numa_node not in nodes:
            raise ConfigError(f"numa_node={numa_node} does not exist: this machine has the nodes {list(nodes)}")
        self._numa_node = numa_node if len(nodes) > 1 else None
        self._numa_strict = numa_strict
        self._piece_bytes = piece_bytes
        self._threads = threads
        self._huge_pages = huge_pages
        self._progress = progress
        self._register = register
        self._unregister = unregister

    def allocate(self, nbytes: int) -> Region:
        """Map, touch and register ``nbytes`` bytes. Blocks the host (some 100-200 ms per GiB).

        Raises:
            ConfigError: ``nbytes`` is not positive, or more than the machine, its control group or the chosen node
                has available (taking it anyway would have the kernel end processes).
            BackendUnavailableError: there is no CUDA here; the message says what is missing.
            NativeError: CUDA refused a registration. Nothing stays mapped or registered.
        """
        register, unregister = self._register, self._unregister
        if register is None or unregister is None:
            register, unregister = _native_functions()
        _check_available(nbytes, self._numa_node if self._numa_strict else None)
        mapping = _map(nbytes, self._huge_pages)
        array = _as_array(mapping)
        base = int(array.ctypes.data)
        registered: list[int] = []
        cpus = None
        if hasattr(mmap, "MADV_DONTFORK"):
            mapping.madvise(mmap.MADV_DONTFORK)
        if self._numa_node is not None:
            cpus = _bind(base, nbytes, self._numa_node, self._numa_strict)
        threads = self._threads or min(len(cpus) if cpus else _usable_cores(), _MAX_TOUCH_THREADS)
        workers = ThreadPoolExecutor(threads, "kvzip-touch", initializer=_stay_on, initargs=(cpus,))
        pieces: list[tuple[int, int, list[Future[None]]]] = []
        try:
            for start in range(0, nbytes, self._piece_bytes):
                stop = min(start + self._piece_bytes, nbytes)
                slices = range(start, stop, _SLICE_BYTES)
                pieces.append(
                    (start, stop, [workers.submit(_touch, array[at : min(at + _SLICE_BYTES, stop)]) for at in slices])
                )
            for start, stop, touched in pieces:
                for future in touched:
                    future.result()
                status = register(base + start, stop - start)
                if status != 0:
                    raise _register_error(status, start, stop, nbytes)
                registered.append(base + start)
                if self._progress is not None:
                    self._progress(stop, nbytes)
        except BaseException:
            workers.shutdown(wait=True, cancel_futures=True)
            failed = [address for address in reversed(registered) if unregister(address) != 0]
            if failed:
                _kept_mapped.append(array)
            del array, mapping, pieces  # or the traceback would keep the memory for as long as somebody holds the error
            raise
        workers.shutdown()
        release = _Release(array, registered, unregister)
        return Region(array, pinned=True, piece_bytes=self._piece_bytes, release=release)

    def __repr__(self) -> str:
        return f"PinnedMemory(numa_node={self._numa_node}, piece_bytes={self._piece_bytes}, threads={self._threads})"


class _Release:
    """Unregisters a region's pieces. Holds the memory, so that it cannot be unmapped before."""

    def __init__(self, array: Bytes, registered: list[int], unregister: Callable[[int], int]) -> None:
        self._array = array
        self._registered = registered
        self._unregister = unregister
        self._process = os.getpid()

    def __call__(self) -> None:
        if os.getpid() != self._process:
            return  # a forked child: neither the memory nor the registration is its own
        statuses = [self._unregister(address) for address in reversed(self._registered)]
        failed = [status for status in statuses if status != 0]
        if failed:
            _kept_mapped.append(self._array)
            raise NativeError(
                f"CUDA refused to unregister {len(failed)} of {len(statuses)} pieces of pinned memory (status "
                f"{failed[0]}): {self._array.nbytes} bytes stay mapped until the process ends; close pools before the "
                "CUDA context is destroyed",
                status=failed[0],
            )


def memory_for(device: str, *, progress: Progress | None = None) -> MemoryResource:
    """Memory for a pool of blocks that lie on a device.

    Args:
        device: as `BlockView.device` has it. ``"cpu"``: pageable memory. ``"cuda:1"``: pinned memory of the NUMA node
            that this GPU is attached to, as far as that has room and the system says which one it is. ``"cuda"`` is the
            thread's current GPU.
        progress: as `PinnedMemory` calls it.
    """
    if device == "cpu":
        return PageableMemory()
    node = None
    if len(numa_nodes()) > 1 and not _cuda.unavailable():
        driver, index = _cuda.driver(), device.partition(":")[2]
        node = numa_node_of_gpu(driver.device_info(int(index) if index else driver.get_device()).pci_bus_id)
        node = node if node in numa_nodes() else None
    return PinnedMemory(numa_node=node, numa_strict=False, progress=progress)


def numa_nodes() -> tuple[int, ...]:
    """The numbers of the machine's NUMA nodes that are online; (0,) where the system does not say."""
    try:
        return _parse_list((_NODES / "online").read_text()) or (0,)
    except (OSError, ValueError):
        return (0,)


def numa_node_of_gpu(pci_bus_id: str) -> int | None:
    """The NUMA node that a PCI device is attached to, for `PinnedMemory`.

    Args:
        pci_bus_id: such as ``"0000:c1:00.0"`` or CUDA's ``"00000000:C1:00.0"``.

    Returns:
        The node, or None where the system does not say (most virtual machines).

    Raises:
        ConfigError: that is not a PCI address.
    """
    match = re.fullmatch(r"([0-9a-f]{4,8}):([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])", pci_bus_id.strip().lower())
    if match is None:
        raise ConfigError(f"{pci_bus_id!r} is not a PCI address: give one such as '0000:c1:00.0' (nvidia-smi -q)")
    try:
        node = int((_PCI / f"{match[1][-4:]}:{match[2]}" / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def _parse_list(text: str) -> tuple[int, ...]:
    """Numbers of a kernel list such as ``0-3,8``."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            numbers.extend(range(int(first), int(last or first) + 1))
    return tuple(numbers)


def _map(nbytes: int, huge_pages: bool) -> mmap.mmap:
    if nbytes < 1:
        raise ConfigError(f"cannot allocate {nbytes} bytes: ask for at least 1")
    try:
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"the system refuses to map {nbytes} bytes ({error}): choose a smaller capacity, or raise the memory limit "
            "of the process (ulimit -v) or of the system (vm.overcommit_memory)"
        ) from error
    if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them: slower to fill, the same otherwise
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def _as_array(mapping: mmap.mmap) -> Bytes:
    return np.frombuffer(mapping, dtype=np.uint8)


def _touch(part: Bytes) -> None:
    part[:: mmap.PAGESIZE] = 0


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _stay_on(cpus: frozenset[int] | None) -> None:
    """Bind the calling thread to cores (Linux applies pid 0 to the thread), so that its first touch is local."""
    if cpus:
        os.sched_setaffinity(0, cpus)


def _bind(address: int, nbytes: int, node: int, strict: bool) -> frozenset[int] | None:
    """Have the pages of a fresh mapping come from one node, as far as it has some unless `strict`.

    Two means, because each is forbidden somewhere: ``mbind`` (container runtimes often filter it), and touching from
    the node's own cores (a process may be confined to others).

    Returns:
        The usable cores of the node, for the threads that touch, or None where there are none.
    """
    bound = _mbind(address, nbytes, node, _MPOL_BIND if strict else _MPOL_PREFERRED)
    try:
        cpus = frozenset(_parse_list((_NODES / f"node{node}" / "cpulist").read_text())) & os.sched_getaffinity(0)
    except (OSError, ValueError):
        cpus = frozenset()
    if strict and not bound and not cpus:
        raise ConfigError(
            f"memory cannot be placed on numa_node={node}: mbind is not permitted here and the process may not run on "
            "the node's cores; allow either (CAP_SYS_NICE, or a wider CPU set), or leave numa_node out"
        )
    return cpus or None


def _mbind(address: int, nbytes: int, node: int, policy: int) -> bool:
    number = _SYS_MBIND.get(platform.machine()) if sys.platform == "linux" else None
    if number is None:
        return False
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask = (ctypes.c_ulong * (node // bits + 1))()
    mask[node // bits] = 1 << (node % bits)
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    status = syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(address),
        ctypes.c_ulong(-(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE),
        ctypes.c_ulong(policy),
        mask,
        ctypes.c_ulong(len(mask) * bits + 1),
        ctypes.c_ulong(0),
    )
    return int(status) == 0


def _check_available(nbytes: int, node: int | None) -> None:
    places: list[tuple[str, int | None]] = [("this machine", _field(Path("/proc/meminfo"), "MemAvailable"))]
    limit, used, reclaimable = (
        _number(_CGROUP / "memory.max"),
        _number(_CGROUP / "memory.current"),
        _field(_CGROUP / "memory.stat", "inactive_file"),
    )
    if limit is not None and used is not None:
        places.append(("this control group (container)", max(0, limit - used + (reclaimable or 0))))
    if node is not None:
        parts = [_field(_NODES / f"node{node}" / "meminfo", name) for name in ("MemFree", "Inactive(file)")]
        if parts[0] is not None:
            places.append((f"NUMA node {node}", parts[0] + (parts[1] or 0)))
    for place, available in places:
        if available is not None and nbytes > available:
            raise ConfigError(
                f"{nbytes} bytes of pinned memory are more than the {available} bytes that {place} has available: "
                "choose a smaller capacity"
            )


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max": no limit
        return None


def _field(path: Path, name: str) -> int | None:
    """A field of a file in the style of /proc/meminfo, in bytes."""
    try:
        match = re.search(rf"(?:^|\s){re.escape(name)}:?\s+(\d+)( kB)?", path.read_text())
    except OSError:
        return None
    return int(match[1]) * (1024 if match[2] else 1) if match else None


def _register_error(status: int, start: int, stop: int, total: int) -> Exception:
    if status == _STATUS_NO_CUDA:
        return BackendUnavailableError(
            "pinned memory needs CUDA, and the native library was built without it: rebuild with KVZIP_CUDA=on, or use "
            "PageableMemory"
        )
    return NativeError(
        f"CUDA refused to pin bytes {start} to {stop} of {total} (status {status}): everything was released again; "
        "choose a smaller capacity, check the driver (nvidia-smi), or use PageableMemory",
        status=status,
    )


def _native_functions() -> tuple[Callable[[int, int], int], Callable[[int], int]]:
    reason = _cuda.unavailable()
    if reason and gpu_problem():
        raise BackendUnavailableError(f"pinned memory needs a GPU; use PageableMemory, or mend this: {reason}")
    if reason:
        return host_register, host_unregister
    native = _native.library()
    register, unregister = native.kvz_cuda_host_register, native.kvz_cuda_host_unregister

    def call_register(address: int, nbytes: int) -> int:
        return int(register(ctypes.c_void_p(address), ctypes.c_uint64(nbytes)))

    def call_unregister(address: int) -> int:
        return int(unregister(ctypes.c_void_p(address)))

    return call_register, call_unregister
