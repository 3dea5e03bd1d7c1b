# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Who takes the steps of transfers: a `Worker` runs jobs in order, a `Reaper` completes what nobody waits for.

A job is a generator of steps, with what has to be waited for between them. The thread that submits a job takes the
first step, if it is the job's turn, so that the device has work at once; the others are taken by the worker's thread,
or by the thread that waits for the transfer, whoever comes first: who waits anyway need not be woken. Where somebody
waited for the last transfer, the worker's thread is not woken for this one: it looks now and then whether the transfer
was left alone, until nobody has come for a while. Two threads at the same objects and the same interpreter lock take
longer than one.

No thread dies of an error: a job that fails, in whatever way, is the end of its transfer alone.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from kvzip.driver import Driver
from kvzip.errors import ConfigError, KvzipError, TransferError
from kvzip.staging import BLOCKS, Steps, Wait
from kvzip.transfer import OnDevice, Transfer, TransferQueue, TransferResult, transfer_error

_log = logging.getLogger("kvzip")

_PATIENCE_SECONDS = 1.0  # between looks at the interpreter's signals
_LOOK_SECONDS = 5e-4  # between looks at jobs that threads wait for
_IDLE_LOOKS = 100  # after which the worker's thread sleeps, if there is no job
_abandoned: list[object] = []  # steps of a parent's jobs in a forked child: to end them would touch its GPU


def in_one_step(run: Callable[[], TransferResult]) -> Steps[TransferResult]:
    """Steps of work that does not wait for events, for a worker's own thread."""
    yield BLOCKS
    return run()


class Job:
    """What is done for a transfer.

    Args:
        steps: do it; they return the result.
        clean_up: called once, whatever happens, before the transfer ends: also for a job that never began.
        transfer: gets the result, or the error.
        what: ``"store"`` or ``"load"``.
    """

    def __init__(
        self, steps: Steps[TransferResult], clean_up: Callable[[], None], transfer: Transfer, what: str
    ) -> None:
        self.steps = steps
        self.transfer = transfer
        self.what = what
        self.lock = threading.Lock()  # held by the thread that takes steps
        self.due: Wait | None = None  # before the next step; None before the first one
        self._clean_up: Callable[[], None] | None = clean_up

    def clean_up(self) -> None:
        """Clean up, unless that was done."""
        clean_up, self._clean_up = self._clean_up, None
        if clean_up is not None:
            clean_up()

    def give_up(self) -> None:
        """Clean up a job that `Worker.submit` has refused, or was interrupted with; one that has begun goes on."""
        if not self.transfer._begun:
            self.clean_up()


class Worker:
    """Has jobs done in order, by a thread that is started with the first one, and by threads that wait for them.

    Args:
        name: of the thread.
        driver: device functions; None where no job waits for events.
        device: index of the GPU.
    """

    def __init__(self, name: str, driver: Driver | None = None, device: int = 0) -> None:
        self._name = name
        self._driver = driver
        self._device = device
        self._open: deque[Job] = deque()  # not ended, the one that runs first
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # something was submitted, or it was closed
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._waited_for = False  # the last job, while it was under way
        self._looks = False  # the thread looks for jobs now and then

    def submit(self, job: Job) -> None:
        """Queue a job, and take its first step if no other is before it. Its device is the thread's current one.

        Raises:
            ConfigError: the worker is closed.
            TransferError: the system gives no thread. Whatever is raised, `Job.give_up` is for the caller.
        """
        at_once = False
        try:
            with self._lock:  # one thread, whoever comes first: a pipeline is not for two
                if self._closed:
                    raise ConfigError("the engine is closed: make a new one")
                if self._thread is None or not self._thread.is_alive():
                    self._thread = self._start_thread(job.what)
                job.transfer._accept(job.clean_up, lambda seconds: self._help(job, seconds))
                at_once = not self._open and job.lock.acquire(blocking=False)
                self._open.append(job)
            if at_once:
                self._step(job)
        except BaseException:  # Ctrl-C among others: nobody waits for the job
            job.transfer.cancel()
            raise
        finally:
            try:
                if at_once:
                    job.lock.release()
            finally:
                if not self._looks:
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
                    job = self._open[0]
                    if not job.lock.acquire(blocking=False):  # whoever has it wakes this thread, if there is a need to
                        break
                    try:
                        if self._is_first(job):
                            self._waited_for = False
                            self._drive(job)
                    finally:
                        job.lock.release()
                        del job  # an idle thread keeps nobody's transfer
                if self._closed and not self._open:
                    return
                if self._waited_for:
                    self._look()
                else:
                    self._wake.get()
            except BaseException as error:  # raised into the thread from outside
                _log.error("%s goes on after %s: %s", self._name, type(error).__name__, str(error))

    def _look(self) -> None:
        """Sleep until this thread is woken, or a job was left alone from one look to the next."""
        self._looks = True
        last = 0
        try:
            for _ in range(_IDLE_LOOKS):
                with contextlib.suppress(queue.Empty):
                    self._wake.get(timeout=_LOOK_SECONDS)
                    return
                now = self._left_alone()
                if now and now == last:
                    return
                last = now
        finally:
            self._looks = False  # who submits from here on wakes this thread
        if not self._open:
            self._wake.get()

    def _left_alone(self) -> int:
        """Which job is first, if nobody takes its steps, else 0. No reference: a thread that sleeps keeps nothing."""
        try:
            job = self._open[0]
        except IndexError:
            return 0
        return 0 if job.lock.locked() else id(job)

    def _is_first(self, job: Job) -> bool:
        """Whether it is this job's turn; while its lock is held that stays so."""
        try:
            return self._open[0] is job
        except IndexError:
            return False

    def _help(self, job: Job, timeout_seconds: float | None) -> None:
        """Take the steps of a job in the thread that waits for it, if it is the job's turn and nobody does."""
        driver = self._driver
        self._waited_for = True
        if driver is None or not self._is_first(job) or not job.lock.acquire(blocking=False):
            return
        try:
            end = None if timeout_seconds is None else time.monotonic() + timeout_seconds
            with contextlib.suppress(KvzipError), OnDevice(driver, self._device):  # one that fails the worker finds out
                self._drive(job, end, helps=True)
        finally:
            job.lock.release()
            if self._open or self._closed:  # the worker's thread may have passed the job over meanwhile
                self._wake.put(None)

    def _drive(self, job: Job, end: float | None = None, *, helps: bool = False) -> None:
        """Take steps until a job has ended, or until a time; none that may block if it `helps`. Its lock is held."""
        if self._driver is not None and not helps and job.due is not None:  # the first step does it itself
            try:
                self._driver.set_device(self._device)
            except Exception as error:
                self._step(job, error)
        while self._is_first(job):
            due = job.due
            if helps and due is not None and due.blocks:
                return
            try:
                if due is not None and not self._wait(due, end):
                    return
            except Exception as error:  # of the device: the steps clean up
                if helps and not isinstance(error, KvzipError):  # of this thread, as from a signal: the job goes on
                    raise
                self._step(job, error)
            else:
                self._step(job)

    def _wait(self, due: Wait, end: float | None) -> bool:
        """Wait for what is due, at most until a time."""
        wait = due.until
        if wait is None:
            if not due.event:
                return True
            assert self._driver is not None
            wait = partial(self._driver.event_wait, due.event)
        while True:
            left = _PATIENCE_SECONDS if end is None else min(_PATIENCE_SECONDS, max(0.0, end - time.monotonic()))
            if wait(due.spin_us, int(left * 1e6)):
                return True
            if end is not None and time.monotonic() >= end:
                return False

    def _step(self, job: Job, fault: Exception | None = None) -> None:
        """Take one step, which may be the last; or let a fault end the job. The job's lock is held."""
        result: TransferResult | None = None
        error: BaseException | None = None
        try:
            if not job.transfer._begin():  # it was cancelled
                self._open.popleft()
                return
            job.due = next(job.steps) if fault is None else job.steps.throw(fault)
            return
        except StopIteration as stop:
            result = stop.value
            if result is None:  # an exception that was raised into a thread took it away
                error = TransferError(f"a {job.what} failed: its thread was stopped")
        except BaseException as caught:
            error = caught
        try:
            self._clean_up(job)
        finally:
            try:
                self._open.popleft()
            finally:
                if error is None:
                    assert result is not None
                    job.transfer._finish(result)
                else:
                    job.transfer._fail(transfer_error(job.what, error))
        if error is not None and not isinstance(error, Exception):
            raise error  # Ctrl-C, in a thread of the caller

    def _clean_up(self, job: Job) -> None:
        try:
            job.clean_up()
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
            _abandoned.append(job.steps)
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
