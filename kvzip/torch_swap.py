# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Stores and loads of blocks on a GPU by way of torch, where the native library has no CUDA.

One worker thread for each direction, each with a stream of its own. The codec's own functions do the work: encoded on
the device by Triton where it can, copied to the host, kept in the pool. Slower than the pipelines of `kvzip.device`,
with the same records.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar, Protocol

from kvzip._process import when_dropped
from kvzip.backends.base import Codec
from kvzip.backends.portable import PortableCodec
from kvzip.coding import Part, check_geometry
from kvzip.device import HostPaths
from kvzip.errors import CorruptRecordError, KvzipError
from kvzip.index import Entry, RecordIndex
from kvzip.interop.torch import Lane, record_event
from kvzip.staging import Staging
from kvzip.transfer import Transfer, TransferResult
from kvzip.types import BlockView
from kvzip.worker import Job, Worker, in_one_step


class Streams(Protocol):
    """What a worker runs on; see `kvzip.interop.torch.Lane`."""

    def behind(self, event: Any) -> AbstractContextManager[None]:
        """A context in which work is queued behind an event; its end waits for the work."""
        ...


class TorchSwap:
    """The GPU side of an engine without the CUDA part of the native library.

    Args:
        device: index of the GPU.
        index: the engine's records.
        store_lock: held by one store at a time.
        host: the engine's own paths.
        staging: `chunk_bytes` bounds what is decoded at a time.
        use_triton: see `PortableCodec`.
        lanes: makes the two streams, for tests.
        mark: makes an event at the end of a stream, for tests.
    """

    def __init__(
        self,
        device: int,
        index: RecordIndex,
        store_lock: threading.Lock,
        host: HostPaths,
        staging: Staging,
        *,
        use_triton: bool,
        lanes: Callable[[int], Streams] = Lane,
        mark: Callable[[object, int], Any] = record_event,
    ) -> None:
        self._device = device
        self._index = index
        self._store_lock = store_lock
        self._host = host
        self._staging = staging
        self._use_triton = use_triton
        self._mark = mark
        self._codecs: dict[str, PortableCodec] = {}
        self._lanes = (lanes(device), lanes(device))
        self._out = Worker(f"kvzip-out-{device}")
        self._into = Worker(f"kvzip-in-{device}")
        self._dropped = when_dropped(self, partial(_close, self._out, self._into))

    @property
    def coded_blocks(self) -> dict[str, int]:
        """Blocks encoded and decoded so far, by what coded them: ``"triton"`` or ``"host"``."""
        total: dict[str, int] = {}
        for codec in list(self._codecs.values()):  # copies: the workers add to both
            for coder, blocks in codec.blocks.copy().items():
                total[coder] = total.get(coder, 0) + blocks
        return total

    def codec_for(self, codec: Codec) -> Codec:
        """The codec for blocks on this GPU."""
        if "cuda" in codec.devices:
            return codec
        return self._codecs.setdefault(codec.name, PortableCodec(codec, use_triton=self._use_triton))

    def store(self, parts: Sequence[Part], codec: Codec, measure_error: bool, stream: object) -> Transfer:
        """Queue a store. The pages must stay as they are until the transfer is done."""
        after = self._mark(stream, self._device)

        def run() -> TransferResult:
            with self._host.counting_failures("store"), self._store_lock, self._lanes[0].behind(after):
                self._index.check_open()
                return self._host.store_blocks(parts, self.codec_for(codec), measure_error)

        transfer = Transfer()
        self._out.submit(Job(in_one_step(run), lambda: None, transfer, "store"))
        return transfer

    small_bytes: ClassVar[int] = sys.maxsize  # nothing begins before it was checked

    def begin_load(self, keys: Sequence[bytes], out: BlockView) -> None:
        """See `kvzip.device.DeviceSwap`."""

    def load(
        self, keys: Sequence[bytes], entries: Sequence[Entry], out: BlockView, stream: object, begun: object = None
    ) -> Transfer:
        """Queue a load of records that `RecordIndex.begin_load` protects; they are released when it has ended."""
        started = time.perf_counter()
        try:
            after = self._mark(stream, self._device)
        except BaseException:
            self._index.end_load(entries)
            raise

        def run() -> TransferResult:
            with self._host.counting_failures("load"), self._lanes[1].behind(after):
                self._load(keys, entries, out)
            result = TransferResult(
                len(keys), out.nbytes, sum(e.allocation.nbytes for e in entries), time.perf_counter() - started, 0, {}
            )
            self._host.count_load(result)
            return result

        transfer = Transfer()
        job = Job(in_one_step(run), partial(self._index.end_load, entries), transfer, "load")
        try:
            self._into.submit(job)
        except BaseException:
            job.give_up()
            raise
        return transfer

    def close(self) -> None:
        """Let everything that was queued end. Blocks the host."""
        self._dropped.detach()
        _close(self._out, self._into)

    lost = None  # torch does not say it: see `kvzip.device.DeviceSwap`

    def settle(self, timeout_seconds: float) -> None:
        """See `kvzip.device.DeviceSwap`."""
        end = time.monotonic() + timeout_seconds
        for ending in (self._out, self._into):
            ending.close(max(0.0, end - time.monotonic()))

    def abandon(self, error: KvzipError) -> None:
        """See `kvzip.device.DeviceSwap`."""
        self._dropped.detach()
        self._out.abandon(error)
        self._into.abandon(error)

    def _load(self, keys: Sequence[bytes], entries: Sequence[Entry], out: BlockView) -> None:
        for entry in entries:
            check_geometry(entry.contents.geometry, out.layout)  # all of them, before the first page is written
        bad: list[int] = []
        step = max(1, self._staging.chunk_bytes // out.layout.nbytes)
        for first in range(0, len(entries), step):
            members = range(first, min(first + step, len(entries)))
            try:
                self._load_some(entries, members, out)
            except CorruptRecordError:  # nothing of the chunk was written: load the good ones
                for i in members:
                    try:
                        self._load_some(entries, [i], out)
                    except CorruptRecordError:
                        bad.append(i)
        if bad:
            self._host.count_corrupt(len(bad))
            raise CorruptRecordError(
                f"{len(bad)} of {len(keys)} records are damaged (the first under key {keys[bad[0]]!r}); their pages "
                "are as they were, the other blocks were loaded: discard these records",
                blocks=tuple(bad),
            )

    def _load_some(self, entries: Sequence[Entry], members: Sequence[int], out: BlockView) -> None:
        self._host.load_blocks([entries[i] for i in members], out[out.block_ids[list(members)]])


def _close(*workers: Worker) -> None:
    for worker in workers:
        worker.close()
