# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""`KvzipOffloadingManager`: vLLM's offloading manager over a `RecordCatalog`, in the scheduler, without a GPU."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.kv_offload import base as vllm_base
from vllm.v1.kv_offload.base import LoadStoreSpec, OffloadingEvent, OffloadingManager, PrepareStoreOutput

from kvzip.adapters.vllm.catalog import RecordCatalog, State
from kvzip.adapters.vllm.messages import RecordSpec, WorkerReport
from kvzip.adapters.vllm.metrics import ManagerMetrics

_RESULTS = getattr(vllm_base, "LookupResult", None)
# vLLM up to 0.24 answers a lookup with True, False or None ("ask again").
_LOOKUP = {
    State.READY: True if _RESULTS is None else _RESULTS.HIT,
    State.STORING: None if _RESULTS is None else _RESULTS.HIT_PENDING,
    State.MISSING: False if _RESULTS is None else _RESULTS.MISS,
}
_MEDIUM = getattr(vllm_base, "Medium", None)
_SOURCES = getattr(vllm_base, "CacheHitSource", None)


@dataclass(slots=True)
class _Request:
    """What a request has used.

    Attributes:
        keys: its chunks, in the order of the prompt.
        starts: the keys of the chunks at position 0.
        stores: stores that have not ended.
        finished: whether no more will come.
    """

    keys: dict[bytes, None] = field(default_factory=dict)
    starts: frozenset[bytes] = frozenset()
    stores: int = 0
    finished: bool = False


class KvzipOffloadingManager(OffloadingManager):
    """Knows which chunks are held, and decides which leave.

    Args:
        catalog: the records.
        hashes_per_chunk: for each KV cache group, block hashes of a prompt that a chunk covers.
        enable_events: whether vLLM wants to hear of stored and removed chunks.
        metrics: what `get_stats` reports.
    """

    def __init__(
        self,
        catalog: RecordCatalog,
        metrics: ManagerMetrics,
        hashes_per_chunk: Mapping[int, int],
        *,
        enable_events: bool = False,
    ) -> None:
        self.catalog = catalog
        self._hashes_per_chunk = dict(hashes_per_chunk)
        self._metrics = metrics
        self._events: list[OffloadingEvent] | None = [] if enable_events else None
        self._requests: dict[str, _Request] = {}

    # ---- what vLLM calls

    def lookup(self, key: Any, req_context: Any = None) -> Any:
        """Whether a chunk can be loaded, may be asked for later, or is not held."""
        return _LOOKUP[self.catalog.state(key)]

    def get_load_source(self, key: Any, req_context: Any = None) -> Any:
        """Where vLLM's metrics say that loaded tokens came from (asked from 0.32 on)."""
        return None if _SOURCES is None else _SOURCES.HOST

    def prepare_load(self, keys: Collection[Any], req_context: Any = None) -> LoadStoreSpec:
        """Protect records until `complete_load`."""
        numbers = self.catalog.begin_load(keys)
        self._request(req_context).keys.update(dict.fromkeys(keys))
        return RecordSpec(numbers, self.catalog.take_discards(), self.catalog.first_number)

    def touch(self, keys: Collection[Any], req_context: Any = None) -> None:
        """Chunks are in use."""
        self.catalog.touch(keys)

    def complete_load(self, keys: Collection[Any], req_context: Any = None) -> None:
        """A load has ended; what its records lacked is known from the workers' reports."""
        self.catalog.end_load(keys)

    def prepare_store(self, keys: Collection[Any], req_context: Any = None) -> PrepareStoreOutput | None:
        """Make room for new records. None: there is none now, vLLM asks again."""
        asked = list(keys)
        self.catalog.touch(asked)
        plan = self.catalog.begin_store(asked)
        if plan is None:
            return None
        request = self._request(req_context)
        request.keys.update(dict.fromkeys(asked))
        self._announce(plan.evicted, removed=True)
        if not plan.keys:  # vLLM drops such a store, and what its message says with it
            return PrepareStoreOutput([], RecordSpec(()), [])
        request.stores += 1
        spec = RecordSpec(
            plan.numbers,
            self.catalog.take_discards(),
            self.catalog.first_number,
            tuple(i for i, key in enumerate(plan.keys) if key in request.starts),
        )
        return PrepareStoreOutput(list(plan.keys), spec, list(plan.evicted))

    def complete_store(self, keys: Collection[Any], req_context: Any = None, success: bool = True) -> None:
        """All workers are done with a store."""
        if success:
            self._announce(self.catalog.finish_store(keys), removed=False)
        else:
            self.catalog.abandon_store(keys)
        if req_context.req_id in self._requests:
            self._requests[req_context.req_id].stores -= 1
            self._settle(req_context.req_id)

    def on_new_request(self, req_context: Any) -> Any:
        """Every request offloads chunk by chunk."""
        return vllm_base.RequestOffloadingContext()

    def on_request_finished(self, req_context: Any) -> None:
        """No more stores or loads will come of a request; some may still be under way."""
        self._request(req_context).finished = True
        self._settle(req_context.req_id)

    def take_events(self) -> Iterable[OffloadingEvent]:
        """What was stored and removed since the last call."""
        events, self._events = self._events or [], None if self._events is None else []
        return events

    def reset_cache(self) -> None:
        """Forget all records; the workers learn it with the next store or load."""
        self.catalog.reset()
        # Requests that go on are stored anew from their first chunk, and what was under way is not told of.
        self._requests = {
            req_id: _Request(starts=request.starts)
            for req_id, request in self._requests.items()
            if not request.finished
        }

    def get_stats(self) -> Any:
        """Metrics since the last call."""
        return self._metrics.collect(self.catalog)

    # ---- what the connector calls

    def note_starts(self, req_id: str, block_hashes: Sequence[bytes]) -> None:
        """Learn which chunks of a request begin its prompt.

        Args:
            req_id: the request.
            block_hashes: vLLM's hashes of its blocks, in the order of the prompt.
        """
        self._requests.setdefault(req_id, _Request()).starts = frozenset(
            vllm_base.make_offload_key(block_hashes[per_chunk - 1], group)
            for group, per_chunk in self._hashes_per_chunk.items()
            if len(block_hashes) >= per_chunk
        )

    def apply(self, reports: Mapping[int, WorkerReport]) -> None:
        """Take in what the workers report; before vLLM hears that their jobs are done."""
        for rank, report in reports.items():
            left = [self.catalog.report(number, rank, nbytes) for number, nbytes in report.sizes.items()]
            self._announce([key for key in left if key is not None], removed=True)
            self._metrics.update(rank, report.totals)

    # ---- inner

    def _request(self, req_context: Any) -> _Request:
        return self._requests.setdefault(req_context.req_id, _Request())

    def _settle(self, req_id: str) -> None:
        """Let a finished request's first chunks be the hottest: the others are of no use without them."""
        request = self._requests[req_id]
        if request.finished and request.stores <= 0:
            self.catalog.touch(request.keys)
            del self._requests[req_id]

    def _announce(self, keys: Collection[bytes], *, removed: bool) -> None:
        if self._events is not None and keys:
            medium = "CPU" if _MEDIUM is None else _MEDIUM.CPU
            self._events.append(OffloadingEvent(keys=list(keys), medium=medium, removed=removed))
