# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""`KvzipConnector`: vLLM's `OffloadingConnector`, which also carries sizes of records and failed loads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector

from kvzip.adapters.vllm import SPEC, SPEC_MODULE
from kvzip.adapters.vllm.manager import KvzipOffloadingManager
from kvzip.adapters.vllm.messages import KvzipWorkerMetadata
from kvzip.adapters.vllm.spec import CONNECTED, KvzipOffloadingSpec
from kvzip.adapters.vllm.worker import KvzipOffloadingWorker
from kvzip.errors import ConfigError

_log = logging.getLogger("kvzip")


class KvzipConnector(OffloadingConnector):
    """Offloads KV blocks into compressed records in host memory.

    Set ``"kv_connector": "KvzipConnector"`` in vLLM's ``kv_transfer_config``, and
    ``"kv_load_failure_policy": "recompute"``.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        _name_spec(vllm_config)
        _log_with_vllm()
        super().__init__(vllm_config, role, kv_cache_config)
        self._groups = tuple(kv_cache_config.kv_cache_groups)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        if len(self._groups) > 1 and extra.get("sync_load_budget_bytes"):
            raise ConfigError(
                f"sync_load_budget_bytes with {len(self._groups)} KV cache groups: vLLM cannot be told of a damaged "
                "record in such a load; leave it out"
            )
        self._requests: dict[int, str] = {}  # load job -> request
        if self.connector_scheduler is not None and (
            getattr(vllm_config.kv_transfer_config, "kv_load_failure_policy", "recompute") != "recompute"
        ):
            _log.warning(
                'kv_load_failure_policy is not "recompute": a request whose record is damaged will fail; set it in '
                "kv_transfer_config"
            )

    @property
    def prefer_cross_layer_blocks(self) -> bool:
        """Take one tensor a layer, as the attention backends see it (asked by vLLM up to 0.28)."""
        return False

    @property
    def _spec(self) -> KvzipOffloadingSpec:
        assert self.connector_worker is not None
        spec: KvzipOffloadingSpec = self.connector_worker.spec
        return spec

    @property
    def _worker(self) -> KvzipOffloadingWorker | None:
        return getattr(self.connector_worker, "worker", None)

    @property
    def _manager(self) -> KvzipOffloadingManager:
        assert self.connector_scheduler is not None
        manager: KvzipOffloadingManager = self.connector_scheduler.manager
        return manager

    # ---- in the workers

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Learn the layout of the pages, and make the worker."""
        self._spec.note_caches(
            kv_caches, tuple(group.kv_cache_spec for group in self._groups), _cpu_isa(self._vllm_config, kv_caches)
        )
        super().register_kv_caches(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin this step's loads."""
        if len(self._groups) > 1:
            loads = self._connector_metadata.load_jobs
            self._requests.update({job_id: job.req_id for job_id, job in loads.items()})
        super().start_load_kv(forward_context, **kwargs)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Finished transfers; with several KV cache groups, failed ones by request."""
        results = super().get_transfer_results(finished_req_ids)
        if self._worker is not None and len(self._groups) > 1:
            self._worker.take_bad_blocks()
            results.failed_recving |= {self._requests[job] for job in self._worker.take_bad_jobs()}
            under_way = self.connector_worker._load_jobs
            self._requests = {job: request for job, request in self._requests.items() if job in under_way}
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that could not be loaded: vLLM computes them again."""
        if self._worker is None:
            return set()
        self._worker.take_bad_jobs()
        bad = self._worker.take_bad_blocks()
        if bad and len(self._groups) > 1:
            raise RuntimeError(
                f"{len(bad)} KV blocks could not be loaded, and this version of vLLM cannot compute them again for a "
                "model with several KV cache groups: use vLLM 0.32 or later, or disable the hybrid KV cache manager"
            )
        return bad

    def build_connector_worker_meta(self) -> Any:
        """Finished jobs, and what this worker has to report."""
        base = super().build_connector_worker_meta()
        report = None if self._worker is None else self._worker.take_report()
        if report is None:
            return base
        return KvzipWorkerMetadata.of(base, {self._spec.rank: report})

    @property
    def worker(self) -> KvzipOffloadingWorker:
        """The worker, once vLLM has registered its caches.

        Raises:
            ConfigError: it has not, or this is the scheduler.
        """
        if self._worker is None:
            raise ConfigError("vLLM has not registered its KV caches with this connector: ask later, in a worker")
        return self._worker

    # ---- in the scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        """How much of a prompt is held; notes which chunks begin it."""
        self._manager.note_starts(request.request_id, request.block_hashes)
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def update_connector_output(self, connector_output: Any) -> None:
        """Take in the workers' reports before the jobs that they belong to are done."""
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, KvzipWorkerMetadata):
            self._manager.apply(meta.reports)
        super().update_connector_output(connector_output)

    @classmethod
    def build_prom_metrics(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Metrics of vLLM's and of kvzip's."""
        _name_spec(vllm_config)
        return super().build_prom_metrics(vllm_config, *args, **kwargs)


def _name_spec(vllm_config: Any) -> None:
    """Have vLLM make kvzip's spec, and let the spec know that this connector is there."""
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    name = extra.setdefault("spec_name", SPEC)
    if name != SPEC:
        raise ConfigError(f'spec_name {name!r} with kv_connector "KvzipConnector": leave it out, or set {SPEC!r}')
    extra.setdefault("spec_module_path", SPEC_MODULE)
    extra[CONNECTED] = True


def _log_with_vllm() -> None:
    """Show kvzip's warnings where vLLM's are shown, unless the application takes care of them."""
    ours, vllms = logging.getLogger("kvzip"), logging.getLogger("vllm")
    own = [handler for handler in ours.handlers if not isinstance(handler, logging.NullHandler)]
    if not own and not logging.getLogger().handlers:
        for handler in vllms.handlers:
            ours.addHandler(handler)
        ours.setLevel(vllms.level)


def _cpu_isa(vllm_config: Any, kv_caches: Mapping[str, Any]) -> dict[str, str]:
    """Instruction sets that the CPU's attention layers lay K out for."""
    if any(getattr(cache, "device", None) is None or cache.device.type != "cpu" for cache in kv_caches.values()):
        return {}
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    layers = vllm_config.compilation_config.static_forward_context
    found = {}
    for name, cache in kv_caches.items():
        layer = layers.get(name)
        if layer is not None and cache.ndim == 4:
            found[name] = getattr(layer, "isa", None) or _get_attn_isa(cache.dtype, cache.shape[2], cache.shape[3] // 2)
    return found
