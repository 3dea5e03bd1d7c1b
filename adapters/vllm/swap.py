# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The older seam: block swaps under vLLM's function names, and a hook that puts them into a platform class.

vLLM's platforms have ``swap_out_blocks_to_host`` and ``insert_blocks_to_device``, which copy rows of one tensor into
rows of another. `CompressedSwapManager` does the same with compressed records in host memory, and takes vLLM's own way
whenever it cannot. For offloading in the engine use the connector (`kvzip.adapters.vllm`); this is for code that calls
the swap functions itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from kvzip._log import log_once
from kvzip.engine import SwapEngine
from kvzip.errors import ConfigError, CorruptRecordError, LayoutError
from kvzip.memory import memory_for
from kvzip.pool import HostPool
from kvzip.record import RecordHeader, read_header
from kvzip.types import BlockLayout, BlockView, ErrorBound

__all__ = [
    "CompressedSwapManager",
    "SwapStatistics",
    "get_compressed_swap_manager",
    "initialize_compressed_swap",
    "install_platform_hook",
    "shutdown_compressed_swap",
]

_log = logging.getLogger("kvzip")

HOST_BUFFERS = ("compressed", "decoded")
_HOOKED = ("swap_out_blocks_to_host", "insert_blocks_to_device")
_DEFAULT_CAPACITY_BYTES = 4 << 30


@dataclass(frozen=True)
class SwapStatistics:
    """Counters of a manager since it was made.

    Attributes:
        held_blocks: blocks that are held as records now.
        swapped_out_blocks, swapped_in_blocks: blocks that went through the compressed path.
        raw_bytes, compressed_bytes: of the blocks that were swapped out so.
        ratio: raw_bytes / compressed_bytes; 1.0 before the first.
        out_seconds, in_seconds: host time spent in both paths.
        fallback_blocks: blocks that took the original path, by reason.
        pages_not_as_asked: pages that the encoder kept lossless or raw, by reason.
        capacity_bytes, used_bytes: of the pool.
    """

    held_blocks: int
    swapped_out_blocks: int
    swapped_in_blocks: int
    raw_bytes: int
    compressed_bytes: int
    ratio: float
    out_seconds: float
    in_seconds: float
    fallback_blocks: Mapping[str, int]
    pages_not_as_asked: Mapping[str, int]
    capacity_bytes: int
    used_bytes: int


class CompressedSwapManager:
    """Swaps blocks between a KV cache and host memory in compressed form. Thread-safe; every call blocks the host.

    A block is known by the place that it was swapped out to: host cache and block index. The manager keeps the host
    caches that it has seen alive until `release`, so that no other tensor can take their place in memory.

    With ``host_buffer="compressed"`` the records are all there is: the host cache is not written, except where a block
    took the original path. With ``"decoded"`` the host cache holds the decoded values as soon as the call returns and
    no record is kept: for a host cache that somebody else reads. Then only the way out of the GPU is compressed.

    Nothing is evicted: a block that finds no room in the pool takes the original path.

    Args:
        enable_compression: False takes the original path for everything.
        error_bound: largest error of a value, in the unit of the values or of the page's range.
        use_relative_error: whether `error_bound` is a fraction of max - min of each page, K and V apart.
        encoding_mode: ``"fixed"``, ``"plain"`` (differences) or ``"outlier"`` (differences, the first value apart).
        capacity_bytes: bytes of the pool of records; pinned when the first cache lies on a GPU.
        host_buffer: ``"compressed"`` or ``"decoded"``.
        dims: order of the axes behind the block axis, such as ``"2NHD"`` (see `BlockLayout.from_tensors`); None tells
            it by the number of axes: 2NHD, NHD or ND, else memory order.
        threads: most host threads for coding, 0 = all cores.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(
        self,
        enable_compression: bool = True,
        error_bound: float = 1e-4,
        use_relative_error: bool = True,
        encoding_mode: str = "plain",
        *,
        capacity_bytes: int = _DEFAULT_CAPACITY_BYTES,
        host_buffer: str = "compressed",
        dims: str | None = None,
        threads: int = 0,
    ) -> None:
        if host_buffer not in HOST_BUFFERS:
            raise ConfigError(f"host_buffer {host_buffer!r}: use one of {', '.join(HOST_BUFFERS)}")
        if capacity_bytes < 1:
            raise ConfigError(f"capacity_bytes {capacity_bytes}: give the bytes of host memory for the records")
        self.enable_compression = enable_compression
        self.host_buffer = host_buffer
        self._error_bound = error_bound
        self._relative = use_relative_error
        self._mode = encoding_mode
        self._capacity_bytes = capacity_bytes
        self._dims = dims
        self._threads = threads
        _check_settings(self.bound, encoding_mode, threads)  # here, although memory is taken at the first swap
        self._lock = threading.RLock()
        self._engine: SwapEngine | None = None
        self._held: dict[bytes, ExitStack] = {}  # key of a record -> its pin
        self._caches: dict[int, Any] = {}  # address -> host cache
        self._totals: Counter[str] = Counter()
        self._seconds = {"out": 0.0, "in": 0.0}
        self._fallbacks: Counter[str] = Counter()

    @property
    def bound(self) -> ErrorBound:
        """The bound of the next swap-out."""
        return (ErrorBound.relative if self._relative else ErrorBound.absolute)(self._error_bound)

    # ---- the two directions

    def swap_out_blocks_to_host_compressed(
        self, src_cache: Any, dst_cache: Any, src_block_indices: Any, dst_block_indices: Any
    ) -> None:
        """Move blocks from a KV cache to host memory.

        Args:
            src_cache: torch tensor on the GPU or the CPU, block axis first.
            dst_cache: host tensor of the same block shape and dtype.
            src_block_indices: rows of `src_cache`, a tensor or a sequence of integers.
            dst_block_indices: as many rows of `dst_cache`.

        Raises:
            IndexError: what the original path raises for rows that do not exist.
        """
        started = time.perf_counter()
        source, target = _indices(src_block_indices, src_cache), _indices(dst_block_indices, dst_cache)
        with self._lock:
            keys = [_key(dst_cache, index) for index in target]
            reason = self._store(src_cache, dst_cache, source, target, keys)
            if reason is not None:
                _copy_rows(src_cache, dst_cache, source, target)
                self._discard(keys)  # what a swap-in finds must be what was swapped out last
                self._fallbacks[reason] += len(keys)
            self._seconds["out"] += time.perf_counter() - started

    def swap_in_blocks_from_host_compressed(
        self, src_cache: Any, dst_cache: Any, src_block_indices: Any, dst_block_indices: Any
    ) -> None:
        """Move blocks from host memory into a KV cache. Blocks that took the original path out take it in.

        Args:
            src_cache: the host tensor that they were swapped out to.
            dst_cache: torch tensor on the GPU or the CPU, block axis first.
            src_block_indices: rows of `src_cache`, a tensor or a sequence of integers.
            dst_block_indices: as many rows of `dst_cache`.

        Raises:
            CorruptRecordError: a record is damaged, so there is nothing to give back; compute the blocks again.
            IndexError: what the original path raises for rows that do not exist.
        """
        started = time.perf_counter()
        source, target = _indices(src_block_indices, src_cache), _indices(dst_block_indices, dst_cache)
        with self._lock:
            pairs = list(zip(source, target, strict=True))
            keys = [_key(src_cache, index) for index in source]
            held = [(key, to) for key, (_, to) in zip(keys, pairs, strict=True) if key in self._held]
            rest = [pair for key, pair in zip(keys, pairs, strict=True) if key not in self._held]
            if held:
                self._load([key for key, _ in held], dst_cache, [to for _, to in held])
            if rest:
                _copy_rows(src_cache, dst_cache, [a for a, _ in rest], [b for _, b in rest])
                self._fallbacks["not held"] += len(rest)
            self._seconds["in"] += time.perf_counter() - started

    # ---- the rest

    def configure(
        self,
        *,
        enable_compression: bool | None = None,
        error_bound: float | None = None,
        use_relative_error: bool | None = None,
        encoding_mode: str | None = None,
    ) -> None:
        """Change what the next swap-outs use; what is None stays. Blocks that are held still come back.

        Raises:
            ConfigError: a setting is out of range; nothing was changed.
        """
        with self._lock:
            relative = self._relative if use_relative_error is None else use_relative_error
            value = self._error_bound if error_bound is None else error_bound
            mode = self._mode if encoding_mode is None else encoding_mode
            bound = (ErrorBound.relative if relative else ErrorBound.absolute)(value)
            if self._engine is not None:
                self._engine.configure(bound=bound, mode=mode)
            else:
                _check_settings(bound, mode, self._threads)
            self._relative, self._error_bound, self._mode = relative, value, mode
            if enable_compression is not None:
                self.enable_compression = enable_compression

    def block_header(self, host_cache: Any, block_index: int) -> RecordHeader | None:
        """What is known of a block that is held: sizes, bound, codec; None when it is not held as a record."""
        with self._lock:
            key = _key(host_cache, block_index)
            if self._engine is None or key not in self._held:
                return None
            return read_header(self._engine.read_record(key))

    def release(self, host_cache: Any) -> int:
        """Forget the blocks of a host cache, and the cache itself. Returns how many blocks were held."""
        with self._lock:
            keys = [_key(host_cache, index) for index in range(host_cache.shape[0])]
            held = [key for key in keys if key in self._held]
            self._discard(held)
            self._caches.pop(int(host_cache.data_ptr()), None)
            return len(held)

    def statistics(self) -> SwapStatistics:
        """Counters at this moment."""
        with self._lock:
            engine = self._engine
            stats = None if engine is None else engine.stats()
            raw, compressed = self._totals["raw_bytes"], self._totals["compressed_bytes"]
            return SwapStatistics(
                held_blocks=len(self._held),
                swapped_out_blocks=self._totals["out"],
                swapped_in_blocks=self._totals["in"],
                raw_bytes=raw,
                compressed_bytes=compressed,
                ratio=raw / compressed if compressed else 1.0,
                out_seconds=self._seconds["out"],
                in_seconds=self._seconds["in"],
                fallback_blocks=dict(self._fallbacks),
                pages_not_as_asked={} if stats is None else dict(stats.fallbacks),
                capacity_bytes=self._capacity_bytes,
                used_bytes=0 if engine is None else engine.pool.capacity_bytes - engine.pool.free_bytes,
            )

    def close(self) -> None:
        """Forget everything and give the memory back; may be called twice. The manager can be used again."""
        with self._lock:
            for pin in self._held.values():
                pin.close()
            self._held.clear()
            self._caches.clear()
            if self._engine is not None:
                self._engine.close()
                self._engine.pool.close()
                self._engine = None

    # ---- inside

    def _store(
        self, src_cache: Any, dst_cache: Any, source: Sequence[int], target: Sequence[int], keys: Sequence[bytes]
    ) -> str | None:
        """Swap out compressed; the reason when it did not work, and then nothing that counts was changed."""
        if not self.enable_compression:
            return "disabled"
        try:
            if src_cache.shape[1:] != dst_cache.shape[1:] or src_cache.dtype != dst_cache.dtype:
                raise LayoutError(
                    f"blocks of {tuple(src_cache.shape[1:])} {src_cache.dtype} do not fit a host cache of "
                    f"{tuple(dst_cache.shape[1:])} {dst_cache.dtype}: make it of the same blocks"
                )
            if max(target, default=-1) >= dst_cache.shape[0]:
                raise LayoutError(
                    f"block {max(target)}: the host cache has blocks 0 to {dst_cache.shape[0] - 1}: make it larger"
                )
            engine = self._engine_for(src_cache)
            view = BlockView([src_cache], self._layout(src_cache), source)
            result = engine.store(keys, view).result()
            if self.host_buffer == "decoded":
                try:
                    engine.load(keys, BlockView([dst_cache], self._layout(dst_cache), target)).result()
                finally:
                    engine.discard(keys)
            else:
                self._caches[int(dst_cache.data_ptr())] = dst_cache
                for key in keys:
                    if key not in self._held:
                        pin = ExitStack()
                        pin.enter_context(engine.pin([key]))
                        self._held[key] = pin
        except Exception as error:  # whatever it is, vLLM's own way is still open
            log_once("blocks are swapped out uncompressed", f"{type(error).__name__}: {error}")
            return type(error).__name__
        self._totals["out"] += result.blocks
        self._totals["raw_bytes"] += result.raw_bytes
        self._totals["compressed_bytes"] += result.record_bytes
        return None

    def _load(self, keys: Sequence[bytes], dst_cache: Any, target: Sequence[int]) -> None:
        assert self._engine is not None
        try:
            self._engine.load(keys, BlockView([dst_cache], self._layout(dst_cache), target)).result()
        except CorruptRecordError:
            raise
        except Exception as error:
            log_once("blocks are decoded on the host and copied in", f"{type(error).__name__}: {error}")
            pages = dst_cache.new_empty((len(keys), *dst_cache.shape[1:]), device="cpu")
            self._engine.load(keys, BlockView([pages], self._layout(pages))).result()
            _copy_rows(pages, dst_cache, list(range(len(keys))), target)
            self._fallbacks[type(error).__name__] += len(keys)
        self._totals["in"] += len(keys)

    def _engine_for(self, cache: Any) -> SwapEngine:
        if self._engine is None:
            pool = HostPool(self._capacity_bytes, resource=memory_for(str(cache.device)))
            self._engine = SwapEngine(pool, bound=self.bound, mode=self._mode, threads=self._threads)
        return self._engine

    def _layout(self, cache: Any) -> BlockLayout:
        dims = self._dims
        if dims is None:
            dims = {5: "2NHD", 4: "NHD", 3: "ND"}.get(cache.ndim, "")
            if dims == "2NHD" and cache.shape[1] != 2:
                dims = ""
        if not dims or cache.element_size() == 1 or not cache.dtype.is_floating_point:
            return BlockLayout.opaque([cache], dtype=None if cache.dtype.is_floating_point and dims else "opaque")
        return BlockLayout.from_tensors([cache], dims)

    def _discard(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            pin = self._held.pop(key, None)
            if pin is not None and self._engine is not None:
                self._engine.discard([key])
                pin.close()


def _check_settings(bound: ErrorBound, mode: str, threads: int) -> None:
    SwapEngine(1 << 16, bound=bound, mode=mode, threads=threads).close()


def _indices(indices: Any, cache: Any) -> list[int]:
    """Row numbers from a tensor or a sequence; negative ones count from the end, as torch has it."""
    rows = int(cache.shape[0])
    listed = list(indices.tolist() if hasattr(indices, "tolist") else indices)
    for index in listed:
        if type(index) is not int or not -rows <= index < rows:  # a mask or a fraction would mean other rows
            raise IndexError(f"block index {index!r}: give integers from {-rows} to {rows - 1}")
    return [index + rows if index < 0 else index for index in listed]


def _key(cache: Any, index: int) -> bytes:
    """Names a row of a tensor by its address."""
    address = int(cache.data_ptr()) + index * int(cache.stride(0)) * int(cache.element_size())
    return address.to_bytes(8, "little")


def _copy_rows(src_cache: Any, dst_cache: Any, source: Sequence[int], target: Sequence[int]) -> None:
    """VLLM's own way, in both directions: copy rows of one tensor into rows of another, uncompressed."""
    if source:
        dst_cache[list(target)] = src_cache[list(source)].to(dst_cache.device)


# ---- one manager for the process


_manager: CompressedSwapManager | None = None
_manager_lock = threading.Lock()


def initialize_compressed_swap(
    enable_compression: bool = True,
    error_bound: float = 1e-4,
    use_relative_error: bool = True,
    encoding_mode: str = "plain",
    **settings: Any,
) -> CompressedSwapManager:
    """Make the manager of this process. See `CompressedSwapManager` for the arguments.

    Raises:
        ConfigError: a setting is out of range, or the manager that is there holds blocks.
    """
    global _manager
    with _manager_lock:
        fresh = CompressedSwapManager(enable_compression, error_bound, use_relative_error, encoding_mode, **settings)
        if _manager is not None:
            held = _manager.statistics().held_blocks
            if held:
                raise ConfigError(
                    f"compressed swap is initialized and holds {held} blocks: change it with configure(), or call "
                    "shutdown_compressed_swap() first"
                )
            _manager.close()
        _manager = fresh
        return fresh


def get_compressed_swap_manager() -> CompressedSwapManager | None:
    """The manager of this process, or None before `initialize_compressed_swap`."""
    return _manager


def shutdown_compressed_swap() -> None:
    """Forget the manager of this process and all that it holds. Uninstall a platform hook first."""
    global _manager
    with _manager_lock:
        if _manager is not None:
            _manager.close()
        _manager = None


# ---- the hook


def install_platform_hook(
    manager: CompressedSwapManager | None = None, *, platform: Any = None, vllm_config: Any = None
) -> Callable[[], None]:
    """Let vLLM's ``swap_out_blocks_to_host`` and ``insert_blocks_to_device`` go through a manager.

    In vLLM the callers of these functions are connectors with a host buffer that remote peers read (NIXL). Such a
    buffer must hold plain values, so NIXL is refused unless the manager was made with ``host_buffer="decoded"``.

    Args:
        manager: a manager; that of the process by default.
        platform: a platform class, or an object of one; vLLM's current platform by default.
        vllm_config: configuration to check for NIXL; vLLM's current one, where there is one, by default.

    Returns:
        A function that puts the original functions back.

    Raises:
        ConfigError: there is no manager, the platform has no such functions, or NIXL would read compressed bytes.
    """
    chosen = manager or get_compressed_swap_manager()
    if chosen is None:
        raise ConfigError("there is no swap manager: call initialize_compressed_swap() before install_platform_hook()")
    if platform is None:
        from vllm.platforms import current_platform

        platform = current_platform
    owner = platform if isinstance(platform, type) else type(platform)
    missing = [name for name in _HOOKED if getattr(owner, name, None) is None]
    if missing:
        raise ConfigError(
            f"platform {owner.__name__} has no {' and no '.join(missing)}: the hook is for vLLM's CUDA, ROCm and XPU "
            "platforms; use the offloading connector instead"
        )
    if chosen.host_buffer == "compressed" and _configures_nixl(vllm_config or _current_config()):
        raise ConfigError(
            "NIXL is configured, and its peers read the host buffer as plain values: make the manager with "
            'host_buffer="decoded", or leave the hook out'
        )
    saved = {name: owner.__dict__.get(name) for name in _HOOKED}
    swap_out, insert = (getattr(owner, name) for name in _HOOKED)

    def compressed_swap_out(cls: Any, src_cache: Any, dst_cache: Any, src_indices: Any, dst_indices: Any) -> None:
        if _host_buffer_is_shared(chosen):
            swap_out(src_cache, dst_cache, src_indices, dst_indices)
        else:
            chosen.swap_out_blocks_to_host_compressed(src_cache, dst_cache, src_indices, dst_indices)

    def compressed_insert(cls: Any, src_cache: Any, dst_cache: Any, src_indices: Any, dst_indices: Any) -> None:
        if _host_buffer_is_shared(chosen):
            insert(src_cache, dst_cache, src_indices, dst_indices)
        else:
            chosen.swap_in_blocks_from_host_compressed(src_cache, dst_cache, src_indices, dst_indices)

    for name, function in zip(_HOOKED, (compressed_swap_out, compressed_insert), strict=True):
        setattr(owner, name, classmethod(function))
    _log.info("swap functions of %s are compressed (%s)", owner.__name__, chosen.bound)

    def uninstall() -> None:
        for name, original in saved.items():
            if original is None:
                if name in owner.__dict__:
                    delattr(owner, name)
            else:
                setattr(owner, name, original)

    return uninstall


def _current_config() -> Any:
    try:
        from vllm.config import get_current_vllm_config_or_none
    except ImportError:  # older than the function, or no vLLM: nothing to check
        return None
    return get_current_vllm_config_or_none()


def _configures_nixl(vllm_config: Any) -> bool:
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    if transfer is None:
        return False
    extra = getattr(transfer, "kv_connector_extra_config", None) or {}
    names = [getattr(transfer, "kv_connector", None)]
    names += [part.get("kv_connector") for part in extra.get("connectors", ()) if isinstance(part, Mapping)]
    return any("nixl" in str(name).lower() for name in names)


def _host_buffer_is_shared(manager: CompressedSwapManager) -> bool:
    """Whether a connector that appeared after the hook reads the host buffer: its bytes must stay plain."""
    if manager.host_buffer == "decoded":
        return False
    try:
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
    except ImportError:
        return False
    if not has_kv_transfer_group():
        return False
    group = get_kv_transfer_group()
    shared = any("nixl" in type(c).__name__.lower() for c in (group, *getattr(group, "_connectors", ())))
    if shared:
        log_once("the swap hook stands aside", "NIXL reads the host buffer as plain values")
    return shared
