# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""`KvzipOffloadingWorker`: vLLM's transfers as stores and loads of a `SwapEngine`. One in every worker process."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.v1.kv_offload.base import GPULoadStoreSpec, OffloadingWorker, TransferResult

from kvzip.adapters.shard import Shard
from kvzip.adapters.vllm.bounds import group_bounds
from kvzip.adapters.vllm.layout import Group
from kvzip.adapters.vllm.messages import RecordSpec, WorkerReport
from kvzip.adapters.vllm.metrics import worker_totals
from kvzip.adapters.vllm.settings import CHANGEABLE, AdapterSettings
from kvzip.bounds import BoundPolicy
from kvzip.engine import SwapEngine
from kvzip.errors import BlockNotFoundError, ConfigError, CorruptRecordError
from kvzip.policy import LRU
from kvzip.transfer import Transfer

_log = logging.getLogger("kvzip")


class WatchedLRU(LRU):
    """LRU that remembers which records the engine evicted by itself: the scheduler has to hear of it."""

    def __init__(self) -> None:
        super().__init__()
        self.evicted: deque[bytes] = deque()

    def remove(self, key: bytes, *, evicted: bool) -> None:
        """Forget ``key``, and note it when it was a victim."""
        super().remove(key, evicted=evicted)
        if evicted:
            self.evicted.append(key)


@dataclass(frozen=True)
class Part:
    """What a job moves in one KV cache group: block `blocks[i]` under key `keys[i]`, part of record `numbers[i]`.

    `group` is the position of the group among the worker's; `starts` says which blocks begin a prompt.
    """

    group: int
    blocks: npt.NDArray[np.int64]
    keys: tuple[bytes, ...]
    numbers: tuple[int, ...]
    starts: tuple[bool, ...]

    def only(self, positions: Sequence[int]) -> Part:
        """The part with these of its blocks."""
        return Part(
            self.group,
            self.blocks[list(positions)],
            tuple(self.keys[i] for i in positions),
            tuple(self.numbers[i] for i in positions),
            tuple(self.starts[i] for i in positions),
        )


@dataclass(eq=False)
class Job:
    """One of vLLM's transfer jobs.

    Attributes:
        job_id: vLLM's number of it.
        store: whether it stores.
        numbers: its records.
        parts: what it moves, a part a group.
        transfers: what is under way, with the part that it moves.
        failed: positions of blocks that were not moved, with the part that they are in.
        unmatched: the blocks, where they and the records do not add up; none was moved.
        error: the first reason for that.
        started: by `time.perf_counter`.
    """

    job_id: int
    store: bool
    numbers: tuple[int, ...] = ()
    parts: list[Part] = field(default_factory=list)
    transfers: list[tuple[Transfer, Part]] = field(default_factory=list)
    failed: list[tuple[Part, tuple[int, ...]]] = field(default_factory=list)
    unmatched: tuple[int, ...] = ()
    error: Exception | None = None
    started: float = field(default_factory=time.perf_counter)

    def fail(self, part: Part, positions: Sequence[int], error: Exception) -> None:
        """Note that blocks of a part were not moved."""
        self.failed.append((part, tuple(positions)))
        self.error = self.error or error

    def done(self) -> bool:
        """Whether everything under way has ended."""
        return all(transfer.done() for transfer, _ in self.transfers)


class KvzipOffloadingWorker(OffloadingWorker):
    """Stores and loads blocks of the worker's KV cache. A failure is counted and reported, it never reaches vLLM.

    Args:
        groups: the KV cache groups.
        settings: what blocks are stored with.
        blocks_per_chunk: vLLM's chunk, in blocks; each block of a chunk is a record of the engine's.
        make_engine: makes the engine, given an eviction policy.
        shard: this worker's part of the model.
        recover: whether loads that fail can be reported; without it they raise.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        settings: AdapterSettings,
        blocks_per_chunk: int,
        make_engine: Callable[[LRU], SwapEngine],
        *,
        shard: Shard | None = None,
        recover: bool = True,
    ) -> None:
        self._groups = tuple(groups)
        self._shard = shard or Shard()
        self._bounds = self._group_bounds(settings)  # before memory is taken
        self.settings = settings
        self._blocks_per_chunk = blocks_per_chunk
        self._policy = WatchedLRU()
        self.engine = make_engine(self._policy)
        self._recover = recover
        self._jobs: dict[int, Job] = {}
        self._first = 0  # records with smaller numbers were forgotten
        self._sizes: dict[int, int] = {}
        self._news = False  # a job has ended since the last report
        self._bad_blocks: set[int] = set()
        self._bad_jobs: set[int] = set()
        self._failed_blocks = {True: 0, False: 0}  # of stores, of loads
        self._warned: set[tuple[bool, type[Exception]]] = set()

    # ---- what vLLM calls

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: RecordSpec) -> bool:
        """Begin to store blocks. They must stay as they are until the job is finished."""
        return self._submit(job_id, src_spec, dst_spec, store=True)

    def submit_load(
        self, job_id: int, src_spec: RecordSpec, dst_spec: GPULoadStoreSpec, expedited: bool = False
    ) -> bool:
        """Begin to load blocks. They must not be read until the job is finished."""
        return self._submit(job_id, dst_spec, src_spec, store=False)

    def get_finished(self) -> list[TransferResult]:
        """Jobs that have ended since the last call, all of them a success as far as vLLM is concerned."""
        ended = [job for job in self._jobs.values() if job.done()]
        results = [self._settle(job) for job in ended]
        if not self._recover:
            self.take_report()  # nobody asks for it, and it would grow
        return results

    def wait(self, job_ids: Collection[int]) -> None:
        """Block the host until these jobs have ended."""
        for job_id in job_ids:
            job = self._jobs.get(job_id)
            for transfer, _ in job.transfers if job is not None else ():
                try:
                    transfer.wait()
                except Exception:  # `get_finished` sees to it
                    _log.debug("job %d failed", job_id)

    def shutdown(self) -> None:
        """Let what is under way end, and free the pool."""
        self.wait(list(self._jobs))
        self._jobs.clear()
        self.engine.close()
        self.engine.pool.close()

    # ---- what the connector calls

    def take_report(self) -> WorkerReport | None:
        """What the scheduler has to know, or None when nothing has changed."""
        while self._policy.evicted:
            self._drop([_number(self._policy.evicted.popleft())])
        if not (self._sizes or self._news):
            return None
        self._news = False
        sizes, self._sizes = self._sizes, {}
        totals = worker_totals(self.engine.stats(), self._failed_blocks[True], self._failed_blocks[False])
        return WorkerReport(sizes, totals)

    def take_bad_blocks(self) -> set[int]:
        """Blocks of the cache that could not be loaded, once."""
        taken, self._bad_blocks = self._bad_blocks, set()
        return taken

    def take_bad_jobs(self) -> set[int]:
        """Load jobs with blocks that could not be loaded, once."""
        taken, self._bad_jobs = self._bad_jobs, set()
        return taken

    def configure(self, **changes: Any) -> AdapterSettings:
        """Change what the next stores are coded with; records that are held still load.

        Args:
            changes: some of ``codec``, ``bound``, ``layer_bounds`` and ``mode``; see `AdapterSettings`.

        Returns:
            The settings that hold now.

        Raises:
            ConfigError: a setting is not known, out of range, or cannot be changed here; nothing was changed.
        """
        fixed = sorted(set(changes) - CHANGEABLE)
        if fixed:
            raise ConfigError(
                f"{', '.join(fixed)}: only {', '.join(sorted(CHANGEABLE))} can be changed while vLLM runs"
            )
        settings = self.settings.change(**changes)
        bounds = self._group_bounds(settings)
        self.engine.configure(codec=settings.codec, bound=settings.bounds, mode=settings.coding_mode)
        self._bounds, self.settings = bounds, settings
        return settings

    def _group_bounds(self, settings: AdapterSettings) -> list[tuple[BoundPolicy, ...]]:
        """For each group its bounds, and those of all steps of the pressure."""
        return [tuple(group_bounds(step, group, self._shard) for step in settings.steps) for group in self._groups]

    # ---- inner

    def _submit(self, job_id: int, gpu: GPULoadStoreSpec, spec: RecordSpec, *, store: bool) -> bool:
        job = Job(job_id, store, tuple(spec.numbers))
        self._jobs[job_id] = job
        try:
            self._obey(spec)
            job.parts = list(self._parts(gpu, spec))
        except Exception as error:
            job.unmatched = tuple(int(block) for block in gpu.block_ids)
            job.error = error
            return True
        for part in job.parts:
            (self._start_store if store else self._start_load)(job, part)
        return True

    def _obey(self, spec: RecordSpec) -> None:
        """Forget the records that the scheduler has given up."""
        if spec.first_number > self._first:
            self._first = spec.first_number
            held = self.engine.list_keys()
            self.engine.discard([key for key in held if _number(key) < self._first])
        if spec.discards:
            self.engine.discard(_key(number, i) for number in spec.discards for i in range(self._blocks_per_chunk))

    def _parts(self, gpu: GPULoadStoreSpec, spec: RecordSpec) -> Iterator[Part]:
        """Match blocks with records, group by group."""
        numbers, starts = spec.numbers, {spec.numbers[i] for i in spec.starts}
        n = self._blocks_per_chunk
        sizes = gpu.group_sizes if getattr(gpu, "group_sizes", None) else [len(gpu.block_ids)]
        indices = gpu.block_indices if getattr(gpu, "block_indices", None) else [0] * len(sizes)
        ids = np.asarray(gpu.block_ids, np.int64)
        block = record = 0
        for group, (_, size, index) in enumerate(zip(self._groups, sizes, indices, strict=True)):
            if size == 0:
                continue
            skip = index % n  # blocks of the first chunk that are not meant
            chunks = -(-(skip + size) // n)
            own = numbers[record : record + chunks]
            at = [(own[i // n], i % n) for i in range(skip, skip + size)]
            yield Part(
                group,
                ids[block : block + size],
                tuple(_key(number, i) for number, i in at),
                tuple(number for number, _ in at),
                tuple(i == 0 and number in starts for number, i in at),
            )
            block += size
            record += chunks
        if block != len(ids) or record != len(numbers):
            raise ValueError(f"{len(ids)} blocks and {len(numbers)} records, {block} and {record} are accounted for")

    def _start_store(self, job: Job, part: Part) -> None:
        try:
            transfer = self.engine.store(
                part.keys,
                self._groups[part.group].view[part.blocks],
                bound=self._bounds[part.group],
                sink=part.starts if any(part.starts) else None,
            )
            job.transfers.append((transfer, part))
        except Exception as error:
            job.fail(part, range(len(part.keys)), error)

    def _start_load(self, job: Job, part: Part, positions: Sequence[int] | None = None) -> None:
        """Load the blocks at these positions of a part; what cannot be loaded is noted, the rest is."""
        left = list(range(len(part.keys)) if positions is None else positions)
        while left:
            chosen = part.only(left)
            try:
                job.transfers.append(
                    (self.engine.load(chosen.keys, self._groups[part.group].view[chosen.blocks]), chosen)
                )
                return
            except BlockNotFoundError as error:
                missing = set(error.keys)
                bad = [i for i in left if part.keys[i] in missing]
                job.fail(part, bad, error)
            except CorruptRecordError as error:  # in host memory nothing was loaded yet
                if len(left) > 1:  # which ones are damaged shows one by one
                    for i in left:
                        self._start_load(job, part, [i])
                    return
                bad = left
                job.fail(part, bad, error)
            except Exception as error:
                bad = left
                job.fail(part, bad, error)
            left = [i for i in left if i not in bad]

    def _settle(self, job: Job) -> TransferResult:
        """A job has ended: see what came of it."""
        del self._jobs[job.job_id]
        self._news = True
        moved = 0
        for transfer, part in job.transfers:
            try:
                moved += transfer.result().record_bytes
            except CorruptRecordError as error:
                job.fail(part, error.blocks or range(len(part.keys)), error)
            except Exception as error:
                job.fail(part, range(len(part.keys)), error)
        if job.error is not None:
            self._warn(job, job.error)
        for part, positions in job.failed:
            self._failed_blocks[job.store] += len(positions)
            if not job.store:
                self._load_failed(job, part.blocks[list(positions)].tolist(), {part.numbers[i] for i in positions})
        if job.unmatched:
            self._failed_blocks[job.store] += len(job.unmatched)
            if not job.store:
                self._load_failed(job, job.unmatched, job.numbers)
        if job.store:
            self._stored(job)
        return _result(job, moved)

    def _stored(self, job: Job) -> None:
        """Report what the records of a store take; a record that lacks a block is dropped."""
        keys = [key for part in job.parts for key in part.keys]
        numbers = [number for part in job.parts for number in part.numbers]
        taken = dict.fromkeys(job.numbers, 0)
        dropped = {number for number in job.numbers if number < self._first} | (set(job.numbers) - set(numbers))
        for number, nbytes in zip(numbers, self.engine.record_sizes(keys), strict=True):
            taken[number] += nbytes
            if nbytes == 0:
                dropped.add(number)
        self._sizes.update((number, nbytes) for number, nbytes in taken.items() if number not in dropped)
        self._drop(dropped)

    def _load_failed(self, job: Job, blocks: Sequence[int], numbers: Collection[int]) -> None:
        if not self._recover:
            raise RuntimeError(
                f"{len(blocks)} KV blocks could not be loaded, and vLLM's own OffloadingConnector cannot compute "
                "them again: use kv_connector KvzipConnector with kv_load_failure_policy recompute"
            )
        self._bad_blocks.update(blocks)
        self._bad_jobs.add(job.job_id)
        self._drop(numbers)

    def _warn(self, job: Job, error: Exception) -> None:
        """Log the first failure of a kind as a warning: what goes on failing would fill the log, and is counted."""
        kind = (job.store, type(error))
        level = logging.DEBUG if kind in self._warned else logging.WARNING
        self._warned.add(kind)
        _log.log(
            level,
            "%d of %d KV blocks could not be %s, vLLM goes on without them (logged once; the metrics count them): "
            "%s: %s",
            sum(len(positions) for _, positions in job.failed) + len(job.unmatched),
            sum(len(part.keys) for part in job.parts) + len(job.unmatched),
            "stored" if job.store else "loaded",
            type(error).__name__,
            str(error),  # who keeps the message shall not keep the transfer
        )

    def _drop(self, numbers: Collection[int]) -> None:
        """Give records up, and say so."""
        self.engine.discard(_key(number, i) for number in numbers for i in range(self._blocks_per_chunk))
        self._sizes.update({number: 0 for number in numbers if number >= self._first})


def _key(number: int, block: int) -> bytes:
    """The engine's key of a block of a chunk."""
    return number.to_bytes(8, "big") + block.to_bytes(4, "big")


def _number(key: bytes) -> int:
    return int.from_bytes(key[:8], "big")


def _result(job: Job, moved: int) -> TransferResult:
    return TransferResult(
        job_id=job.job_id, success=True, transfer_size=moved, transfer_time=time.perf_counter() - job.started
    )
