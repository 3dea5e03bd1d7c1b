# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""`KvzipOffloadingSpec`: what vLLM makes the manager (scheduler) and the worker (each GPU) of."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingManager, OffloadingSpec, OffloadingWorker

from kvzip.adapters.shard import Shard
from kvzip.adapters.vllm.catalog import RecordCatalog
from kvzip.adapters.vllm.layout import Group, group_view, layers_of
from kvzip.adapters.vllm.manager import KvzipOffloadingManager
from kvzip.adapters.vllm.metrics import ManagerMetrics, definitions
from kvzip.adapters.vllm.settings import AdapterSettings
from kvzip.adapters.vllm.worker import KvzipOffloadingWorker
from kvzip.engine import SwapEngine
from kvzip.errors import ConfigError
from kvzip.integrity import Integrity
from kvzip.memory import memory_for
from kvzip.policy import LRU
from kvzip.pool import HostPool
from kvzip.staging import Staging

_log = logging.getLogger("kvzip")
_PROGRESS_BYTES = 16 << 30  # of pinned memory between two lines in the log

#: Set in ``kv_connector_extra_config`` by the connector: sizes and failures can be reported.
CONNECTED = "_kvzip_connected"


class KvzipOffloadingSpec(OffloadingSpec):
    """The offloading tier of compressed records.

    Made by `kvzip.adapters.vllm.connector.KvzipConnector`. With vLLM's own ``OffloadingConnector`` it works too, but
    the sizes of records do not reach the scheduler, which then counts every record as incompressible, and a damaged
    record stops the engine.
    """

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """Names and texts of the metrics."""
        return definitions()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._connected = bool(self.extra_config.get(CONNECTED))
        self.settings = AdapterSettings.read({k: v for k, v in self.extra_config.items() if k != CONNECTED})
        if not self._connected:
            _log.warning(
                "kvzip's spec without kvzip's connector: records are counted at their worst case, and a damaged one "
                'stops the engine; set "kv_connector": "KvzipConnector"'
            )
        largest = max(self.worst_bytes.values())
        if self.pool_bytes < largest:
            raise ConfigError(
                f"cpu_bytes_to_use {self.settings.cpu_bytes_to_use} for {self.workers} workers: a chunk may take "
                f"{largest} bytes on each; give at least {largest * self.workers}, or a smaller chunk"
            )
        self._manager: KvzipOffloadingManager | None = None
        self._worker: KvzipOffloadingWorker | None = None
        self._kv_caches: Mapping[str, Any] = {}
        self._group_specs: tuple[Any, ...] = ()
        self._isa_of: Mapping[str, str] = {}

    # ---- what differs between vLLM's versions

    @property
    def chunk_blocks(self) -> int:
        """Blocks of a chunk."""
        return int(getattr(self, "blocks_per_chunk", 0) or getattr(self, "block_size_factor", 1))

    @property
    def hashes_per_chunk(self) -> dict[int, int]:
        """For each KV cache group, block hashes that a chunk covers."""
        tokens = getattr(self, "tokens_per_block", None) or self.gpu_block_size
        per_hash = getattr(self, "tokens_per_hash", None) or self.hash_block_size
        return {
            group: tokens_per_block * self.chunk_blocks // per_hash
            for group, tokens_per_block in zip(self.group_ids, tokens, strict=True)
        }

    @property
    def group_ids(self) -> tuple[int, ...]:
        """KV cache groups that are offloaded, as they are numbered in keys."""
        config = getattr(self, "config", None)
        groups = config.groups if config is not None else self.kv_cache_config.kv_cache_groups
        return tuple(getattr(group, "group_id", i) for i, group in enumerate(groups))

    @property
    def layer_names(self) -> tuple[tuple[str, ...], ...]:
        """Layers of each of these groups."""
        config = getattr(self, "config", None)
        groups = config.groups if config is not None else self.kv_cache_config.kv_cache_groups
        return tuple(tuple(group.layer_names) for group in groups)

    @property
    def workers(self) -> int:
        """Workers of the engine."""
        config = getattr(self, "config", None)
        parallel = config.parallel if config is not None else self.vllm_config.parallel_config
        return int(parallel.world_size)

    @property
    def rank(self) -> int:
        """Number of this worker."""
        config = getattr(self, "config", None)
        parallel = config.parallel if config is not None else self.vllm_config.parallel_config
        return int(parallel.rank)

    @property
    def shard(self) -> Shard:
        """This worker's part of the model's heads."""
        config = getattr(self, "config", None)
        size = config.parallel.tp_size if config is not None else self.vllm_config.parallel_config.tensor_parallel_size
        return Shard(self.rank % int(size), int(size))

    @property
    def worst_bytes(self) -> dict[int, int]:
        """For each group, an upper bound of what a chunk's records take in one worker's pool."""
        config = getattr(self, "config", None)
        if config is not None:
            raw = {group: int(config.worker_kv_bytes_per_block) for group in self.group_ids}
        else:
            raw = {
                i: int(group.kv_cache_spec.page_size_bytes) * len(group.layer_names)
                for i, group in enumerate(self.kv_cache_config.kv_cache_groups)
            }
        # A page that cannot be coded is kept raw; headers and rounding come on top.
        return {group: self.chunk_blocks * (nbytes + nbytes // 64 + 8192) for group, nbytes in raw.items()}

    @property
    def pool_bytes(self) -> int:
        """Bytes of one worker's pool."""
        return self.settings.cpu_bytes_to_use // self.workers // 4096 * 4096

    # ---- what vLLM calls

    def get_manager(self) -> OffloadingManager:
        """The scheduler's side."""
        if self._manager is None:
            catalog = RecordCatalog(self.pool_bytes, self.workers, self.worst_bytes, _group_of, self.settings.policy)
            self._manager = KvzipOffloadingManager(
                catalog,
                ManagerMetrics(),
                self.hashes_per_chunk,
                enable_events=self.kv_events_config.enable_kv_cache_events,
            )
        return self._manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """A worker's side."""
        if self._worker is None:
            settings = self.settings
            groups = self._groups(kv_caches)
            self._worker = KvzipOffloadingWorker(
                groups,
                settings,
                self.chunk_blocks,
                lambda policy: self._engine(policy, groups[0].view.device),
                shard=self.shard,
                recover=self._connected,
            )
            _log.info(
                "kvzip: %d bytes of host memory for worker %d of %d, codec %s, bounds %s",
                self.pool_bytes,
                self.rank,
                self.workers,
                settings.codec,
                settings.bounds,
            )
        return self._worker

    # ---- what the connector calls

    def note_caches(
        self, kv_caches: Mapping[str, Any], group_specs: tuple[Any, ...], isa_of: Mapping[str, str]
    ) -> None:
        """Say how the layers' caches look, before `get_worker`.

        Args:
            kv_caches: what vLLM registers, by layer.
            group_specs: ``KVCacheSpec`` of every KV cache group, offloaded or not.
            isa_of: instruction sets of the CPU's attention layers.
        """
        self._kv_caches, self._group_specs, self._isa_of = kv_caches, group_specs, isa_of

    # ---- inner

    def _groups(self, kv_caches: CanonicalKVCaches) -> list[Group]:
        groups = []
        for group, names, refs in zip(self.group_ids, self.layer_names, kv_caches.group_data_refs, strict=True):
            layers = None
            if self._group_specs:
                layers = layers_of(names, self._kv_caches, self._group_specs[group], self._isa_of)
            raw = [(kv_caches.tensors[ref.tensor_idx].tensor, ref.page_size_bytes) for ref in refs]
            groups.append(group_view(str(group), layers, raw))
        return groups

    def _engine(self, policy: LRU, device: str) -> SwapEngine:
        settings = self.settings
        pool = HostPool(self.pool_bytes, resource=memory_for(device, progress=_log_progress))
        try:
            return SwapEngine(
                pool,
                codec=settings.codec,
                bound=settings.bounds,
                mode=settings.coding_mode,
                policy=policy,
                threads=settings.threads,
                staging=Staging(chunk_bytes=settings.chunk_bytes, max_ctas=settings.max_ctas),
                integrity=Integrity(bound=settings.verify),
                controller=settings.objective,
                pressure=settings.bound_pressure,
            )
        except BaseException:
            pool.close()
            raise


def _log_progress(done: int, total: int) -> None:
    """Say how far the pinning of a large pool has come: it takes seconds."""
    if done % _PROGRESS_BYTES == 0 and done < total:
        _log.info("kvzip: %d of %d GiB of host memory are pinned", done >> 30, total >> 30)


def _group_of(key: bytes) -> int:
    """KV cache group of one of vLLM's offload keys."""
    return int.from_bytes(key[-4:], "big")
