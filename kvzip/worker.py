# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The threads behind transfers: a `Worker` runs jobs in order, a `Reaper` completes what nobody waits for.

Neither dies of an error: a job that fails, in whatever way, is the end of its transfer alone.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvzip.errors import ConfigError, KvzipError, TransferError
from kvzip.transfer import Transfer, TransferQueue, TransferResult, transfer_error

_log = logging.getLogger("kvzip")


@dataclass(frozen=True)
class Job:
    """What a worker does for a transfer.

    Attributes:
        run: does it.
        cleanup: called once, whatever happens, before the transfer ends: also for a job that is never run.
        transfer: gets the result, or the error.
        what: ``"store"`` or ``"load"``.
    """

    run: Callable[[], TransferResult]
    cleanup: Callable[[], None]
    transfer: Transfer
    what: str


class Worker:
    """A thread that runs jobs in order; started with the first one."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._open: deque[Job] = deque()  # not ended, the one that runs first
        self._running: Job | None = None
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # something was submitted, or it was closed
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            ConfigError: the worker is closed.
            TransferError: the system gives no thread. In both cases the job was not queued, nor cleaned up.
        """
        with self._lock:  # one thread, whoever comes first: a pipeline is not for two
            if self._closed:
                raise ConfigError("the engine is closed: make a new one")
            if self._thread is None or not self._thread.is_alive():
                self._thread = self._start_thread(job.what)
            job.transfer._clean_up = job.cleanup
            self._open.append(job)
            self._wake.put(None)

    def _start_thread(self, what: str) -> threading.Thread:
        thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise TransferError(
                f"a {what} failed: the system gives no thread for it ({error}): let the process have more (ulimit -u, "
                "or the limit of its container), or run fewer"
            ) from error
        return thread

    def _loop(self) -> None:
        while True:
            try:
                while self._open:
                    self._do(self._open[0])
                if self._closed:
                    return
                self._wake.get()
            except BaseException as error:  # raised into the thread from outside
                _log.error("%s goes on after %s: %s", self._name, type(error).__name__, str(error))

    def _do(self, job: Job) -> None:
        transfer = job.transfer
        begins, cut_off, self._running = transfer._begin(), self._running is job, job
        try:
            if begins:
                try:
                    result = job.run()
                finally:
                    self._clean_up(job)
                transfer._finish(result)
        except BaseException as error:
            transfer._fail(transfer_error(job.what, error))
        finally:
            if (begins or cut_off) and not transfer.done():
                transfer._fail(TransferError(f"a {job.what} failed: its thread was stopped"))
            self._running = None
            self._open.popleft()

    def _clean_up(self, job: Job) -> None:
        try:
            job.cleanup()
        except KvzipError as error:  # of a GPU that is lost: what was done is done
            _log.warning("cleaning up after a %s failed: %s", job.what, str(error))

    @property
    def busy(self) -> bool:
        """Whether a job has not ended."""
        return bool(self._open)

    def close(self, timeout_seconds: float | None = None) -> bool:
        """Let the jobs that were submitted end, then the thread. Blocks the host.

        Args:
            timeout_seconds: leave them alone after so long; None waits for ever.

        Returns:
            Whether they have ended.
        """
        with self._lock:
            self._closed = True
            thread = self._thread
            self._wake.put(None)
        if thread is None:
            return True
        thread.join(timeout_seconds)
        return not thread.is_alive()

    def abandon(self, error: KvzipError) -> None:
        """In a forked child, which has none of the parent's threads: nothing that was submitted ends here."""
        self._lock = threading.Lock()
        self._closed, self._thread = True, None
        for job in list(self._open):
            job.transfer._abandon(error)
        self._open.clear()


class Reaper:
    """Completes the small transfers that nobody asks for; a thread, started with the first one.

    It looks every two milliseconds while there are any, and sleeps after a while without.
    """

    EVERY_SECONDS = 2e-3
    IDLE_LOOKS = 100

    def __init__(self, name: str, start: Callable[[], None], queues: Sequence[TransferQueue]) -> None:
        self._name = name
        self._start = start
        self._queues = queues
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._parked = True
        self._halt = False
        self._thread: threading.Thread | None = None

    def notice(self) -> None:
        """A transfer was queued."""
        if self._parked:
            with self._lock:
                if self._thread is None:
                    thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
                    try:
                        thread.start()
                    except RuntimeError as error:  # the transfer is queued: it ends when somebody asks for it
                        _log.warning("no thread looks after transfers that nobody waits for: %s", str(error))
                        return
                    self._thread = thread
                self._parked = False
                self._wake.set()

    def _loop(self) -> None:
        while not self._halt:
            try:
                self._start()
                self._watch()
            except BaseException as error:
                _log.error("%s goes on after %s: %s", self._name, type(error).__name__, str(error))
                self._wake.wait(self.EVERY_SECONDS * self.IDLE_LOOKS)

    def _watch(self) -> None:
        idle = 0
        while not self._halt:
            if idle < self.IDLE_LOOKS:
                time.sleep(self.EVERY_SECONDS)
            else:
                self._wake.clear()
                self._parked = True  # who queues one from here on wakes this thread
                if not any(map(len, self._queues)) and not self._halt:
                    self._wake.wait()
                self._parked = False
                idle = 0
            idle = 0 if any(map(len, self._queues)) else idle + 1
            for pending in self._queues:
                pending.poll()

    def close(self, timeout_seconds: float | None = None) -> None:
        """End the thread. Blocks the host, at most for so long."""
        self._halt = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout_seconds)
            self._thread = None

    def abandon(self) -> None:
        """In a forked child, which has none of the parent's threads."""
        self._lock = threading.Lock()
        self._halt, self._parked, self._thread = True, False, None
