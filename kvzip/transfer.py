# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""`Transfer`: a store or a load under way, and what it did."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

from kvzip._log import log_once
from kvzip.errors import ConfigError, KvzipError, PoolExhaustedError, TransferError
from kvzip.interop.torch import stream_handle

_log = logging.getLogger("kvzip")

_SPIN_US = 1000  # that a wait for a small transfer spins: all have ended by then where the link is not shared
_PATIENCE_SECONDS = 1.0  # between looks at the interpreter's signals
_PATIENCE_US = int(_PATIENCE_SECONDS * 1e6)


class StreamDriver(Protocol):
    """The device functions that a transfer needs (see `kvzip.driver.Driver`)."""

    def get_device(self) -> int: ...  # noqa: D102
    def set_device(self, device: int) -> None: ...  # noqa: D102
    def stream_wait_event(self, stream: int, event: int) -> None: ...  # noqa: D102
    def event_create(self, *, timing: bool = False) -> int: ...  # noqa: D102
    def event_destroy(self, event: int) -> None: ...  # noqa: D102
    def event_record(self, event: int, stream: int) -> None: ...  # noqa: D102
    def event_wait(self, event: int, spin_us: int, timeout_us: int) -> bool: ...  # noqa: D102


class OnDevice:
    """A context in which a GPU is the thread's current one; afterwards it is the one before, unless that fails.

    Args:
        driver: device functions.
        device: index of the GPU.
    """

    def __init__(self, driver: StreamDriver, device: int) -> None:
        self._driver = driver
        self._device = device

    def __enter__(self) -> None:
        self._before = self._driver.get_device()
        if self._before != self._device:
            self._driver.set_device(self._device)

    def __exit__(self, *_: object) -> None:
        if self._before != self._device:
            with contextlib.suppress(Exception):  # whoever uses that GPU next is told; what was done here is done
                self._driver.set_device(self._before)


class TransferResult(NamedTuple):
    """What a finished transfer did.

    Attributes:
        blocks: number of blocks.
        raw_bytes: bytes of their values.
        record_bytes: bytes of their records in the pool.
        seconds: from the call to its end.
        evicted: records that had to leave the pool, for this store or for one before it that failed: each counts once.
        fallbacks: pages that were not coded as asked, by reason.
        max_error: largest absolute error of a store with ``measure_error``, else None.
        violations: values that broke the bound in such a store (0 unless a codec is at fault), else None.
    """

    blocks: int
    raw_bytes: int
    record_bytes: int
    seconds: float
    evicted: int = 0
    fallbacks: Mapping[str, int] = MappingProxyType({})
    max_error: float | None = None
    violations: int | None = None


class Transfer:
    """A store or a load that was accepted. Thread-safe.

    On the CPU the work is done when `store` or `load` returns, and an error has been raised there. On a GPU it goes on
    in the background: pages that are being stored must stay as they are, and pages that are being loaded must not be
    read, until the transfer is done, or, for work on the GPU, behind `wait_stream`.
    """

    _observer: Callable[[TransferResult], None] | None = None
    _event = 0  # for one that was interrupted while it was made

    def __init__(self, driver: StreamDriver | None = None, device: int = 0) -> None:
        self._changed = threading.Condition(threading.Lock())  # of what follows
        self._ended = False
        self._result: TransferResult | None = None
        self._error: KvzipError | None = None
        self._driver = driver
        self._device = device
        self._event = 0  # behind the last kernel; 0 until that is queued
        self._recalled = 0  # an event to use again
        self._released = False  # somebody may go on behind the event
        self._begun = False
        self._cancelled = False
        self._clean_up: Callable[[], None] | None = None  # set while it waits for a worker
        self._help: Callable[[float | None], None] | None = None  # until it has ended

    def done(self) -> bool:
        """Whether the transfer has ended, well or not. Never blocks."""
        return self._ended

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Block the host until the transfer has ended.

        Args:
            timeout_seconds: give up after this long; None waits for ever.

        Returns:
            Whether it has ended.

        Raises:
            TransferError: it failed; the pool and the pages are as they were.
            ConfigError: the timeout is no number.
        """
        timeout_seconds = _seconds(timeout_seconds)
        started, help_it = time.monotonic(), self._help
        if help_it is not None:
            help_it(timeout_seconds)
        if not self._ended:
            left = None if timeout_seconds is None else max(0.0, started + timeout_seconds - time.monotonic())
            with self._changed:
                if not self._changed.wait_for(lambda: self._ended, left):
                    return False
        if self._error is not None:
            raise self._error
        return True

    def result(self, timeout_seconds: float | None = None) -> TransferResult:
        """Wait, and say what was done.

        Raises:
            TransferError: it failed, or it has not ended within the time.
        """
        if not self.wait(timeout_seconds):
            raise TransferError(f"the transfer has not ended within {timeout_seconds} s: wait longer")
        assert self._result is not None
        return self._result

    def cancel(self) -> bool:
        """Give up a transfer that has not begun: one that waits behind others for its GPU's worker. Never blocks.

        Returns:
            Whether it was given up. Then nothing of it happens, its pages are the caller's again at once, and `wait`
            raises `TransferError`. False: it is under way, and goes on to its end, or has ended.
        """
        with self._changed:
            if self._begun or self._clean_up is None:
                return False
            clean_up, self._clean_up = self._clean_up, None
            self._cancelled = self._begun = True  # so that the worker passes it over
        clean_up()
        self._fail(TransferError("the transfer was cancelled before it began: nothing was changed"))
        return True

    def _accept(self, clean_up: Callable[[], None], help_it: Callable[[float | None], None]) -> None:
        """It stands in a queue.

        Args:
            clean_up: called when it is cancelled there.
            help_it: takes its steps in the thread that waits for it, at most for so many seconds.
        """
        self._clean_up, self._help = clean_up, help_it

    def _begin(self) -> bool:
        """It is its turn, or still is. False when it was cancelled."""
        if not self._begun:
            with self._changed:
                self._begun, self._clean_up = True, None
        return not self._cancelled

    def wait_stream(self, stream: object = None) -> None:
        """Make a CUDA stream wait for the transfer's work on the pages: what is queued there next comes after it.

        After a load, kernels of that stream see the loaded values; after a store, they may overwrite the pages. Blocks
        the host only until the transfer's kernels are queued. On the CPU it does nothing: the work is done.

        Whether a load found every record intact is known at its end: ask `result` before the values are trusted. A
        store whose encoder fails after this call fails, where it would have stored raw bytes: the pages may have
        changed.

        Args:
            stream: a CUDA stream handle, anything with ``cuda_stream`` (torch), or None for torch's current stream.

        Raises:
            TransferError: the transfer failed before all of its work was queued. What fails later, `result` says.
        """
        if self._driver is None:
            self.wait()
            return
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._event)
            self._released = self._event != 0
        if not self._released:
            self.wait()
            return
        with OnDevice(self._driver, self._device):
            self._driver.stream_wait_event(stream_handle(stream, self._device), self._event)

    @property
    def cuda_event(self) -> int:
        """Handle of the event behind the last kernel, for integrators; 0 before it is queued, and on the CPU.

        It is destroyed with the transfer: keep that while you use it.
        """
        self._release()
        return self._event

    def _release(self) -> bool:
        """Whether all kernels are queued: then they are not queued again (`_recall`)."""
        with self._changed:
            self._released = self._event != 0
            return self._released

    def _recall(self) -> bool:
        """Take `_mark_queued` back. False when it is too late: what comes behind the event may overwrite the pages."""
        with self._changed:
            if self._released:
                return False
            self._event, self._recalled = 0, self._event or self._recalled
            return True

    def _mark_queued(self, stream: int) -> None:
        """All kernels are queued on this stream of the pipeline."""
        assert self._driver is not None
        event = self._recalled or self._driver.event_create()
        self._recalled = 0
        try:
            self._driver.event_record(event, stream)
        except BaseException:
            self._driver.event_destroy(event)
            raise
        with self._changed:
            self._event = event
            self._changed.notify_all()

    def _finish(self, result: TransferResult) -> None:
        with self._changed:
            self._result = result
            self._ended = True
            self._changed.notify_all()
        self._help = None
        self._tell()

    def _observe(self, observer: Callable[[TransferResult], None]) -> None:
        """Call this once with the result, if there is one, in whatever thread completes the transfer."""
        self._observer = observer
        if self._result is not None:
            self._tell()

    def _tell(self) -> None:
        observer = self.__dict__.pop("_observer", None)  # in one step: two threads may come here
        if observer is not None:
            try:
                observer(self._result)
            except Exception:  # the transfer has ended well, whatever its observer makes of it
                _log.exception("the observer of a transfer failed")

    def _fail(self, error: KvzipError) -> None:
        with self._changed:
            self._error = error
            self._ended = True
            self._changed.notify_all()
        self._help = None

    def _abandon(self, error: KvzipError) -> None:
        """In a forked child, where nobody completes it, and a thread of the parent may hold the locks."""
        self._changed = threading.Condition(threading.Lock())
        self._begun, self._clean_up = True, None
        self._fail(error)

    def __del__(self) -> None:
        event = getattr(self, "_event", 0) or getattr(self, "_recalled", 0)
        if event and self._driver is not None:
            with contextlib.suppress(KvzipError):  # at the interpreter's end the device may be gone already
                self._driver.event_destroy(event)


Land = Callable[[Exception | None], TransferResult]


class QueuedWork(Protocol):
    """Work of a transfer on the device (`kvzip.small.Ticket`).

    Attributes:
        event: recorded behind it; 0 where a transfer has taken it, or when the work has ended.
        wait: waits for its end, as `StreamDriver.event_wait` for the event; may see it earlier.
    """

    event: int

    @property
    def wait(self) -> Callable[[int, int], bool]: ...  # noqa: D102


class QueuedTransfer(Transfer):
    """A transfer whose work was queued whole on the device: whoever asks for its end completes it on the host.

    Args:
        queue: where it stands.
        driver: device functions.
        device: index of the GPU.
        work: its work; another transfer's when it has ended.
    """

    def __init__(self, queue: TransferQueue, driver: StreamDriver, device: int, work: QueuedWork) -> None:
        # Without the condition of the base class, which costs more than a small copy: the queue's lock does.
        self._queue = queue
        self._driver = driver
        self._device = device
        self._work = work
        self._event = 0  # its own only since somebody asked for it: else its work's
        self._ended = False
        self._result = None
        self._error = None

    def done(self) -> bool:
        """Whether the transfer has ended, well or not. Never blocks."""
        return self._ended or self._queue.complete(self, 0, wait=False)

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """See `Transfer.wait`."""
        if not self._ended and not self._queue.complete(self, _seconds(timeout_seconds)):
            return False
        if self._error is not None:
            raise self._error
        return True

    def cancel(self) -> bool:
        """Always False: the device has the work already. See `Transfer.cancel`."""
        return False

    def wait_stream(self, stream: object = None) -> None:
        """See `Transfer.wait_stream`. Does not block the host."""
        assert self._driver is not None
        handle = stream_handle(stream, self._device)
        with self._queue.lock:
            event = self._event or self._work.event
            if not self._ended:  # else the device has done it
                with OnDevice(self._driver, self._device):
                    self._driver.stream_wait_event(handle, event)

    @property
    def cuda_event(self) -> int:
        """See `Transfer.cuda_event`; never 0."""
        assert self._driver is not None
        with self._queue.lock:
            if not self._event:
                if self._ended:  # an event that was never recorded has passed
                    with OnDevice(self._driver, self._device):
                        self._event = self._driver.event_create()
                else:
                    self._event, self._work.event = self._work.event, 0
            return self._event

    def _release(self) -> bool:
        return True  # queued whole, and never again

    def _finish(self, result: TransferResult) -> None:
        self._result = result
        self._ended = True
        if self._observer is not None:
            self._tell()

    def _fail(self, error: KvzipError) -> None:
        self._error = error
        self._ended = True

    def _abandon(self, error: KvzipError) -> None:
        self._fail(error)

    def __del__(self) -> None:
        if self._event and self._driver is not None:
            try:  # faster than suppress()
                self._driver.event_destroy(self._event)
            except KvzipError:  # at the interpreter's end the device may be gone already
                return


class TransferQueue:
    """Transfers of one stream that the host has not completed yet, in their order. Thread-safe.

    Args:
        driver: device functions.
        what: what they are called in messages.
    """

    def __init__(self, driver: StreamDriver, what: str) -> None:
        self.lock = threading.Lock()
        self._driver = driver
        self._what = what
        self._pending: deque[tuple[QueuedTransfer, Land]] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, transfer: QueuedTransfer, land: Land) -> None:
        """Add a transfer that was just queued; `lock` is held since before that.

        Args:
            transfer: the transfer.
            land: completes it on the host, once its event has passed; with an error it cleans up and raises it.
        """
        self._pending.append((transfer, land))

    def withdraw(self, work: QueuedWork) -> None:
        """Forget a transfer that was just added; `lock` is held since before that."""
        if self._pending and self._pending[-1][0]._work is work:
            self._pending.pop()

    def complete(self, transfer: QueuedTransfer, timeout_seconds: float | None = None, *, wait: bool = True) -> bool:
        """Wait for a transfer, and complete all up to it: later ones may replace the records of earlier ones.

        Args:
            transfer: one of this queue.
            timeout_seconds: give up after this long; None waits for ever.
            wait: False: give up at once where the host would have to wait.

        Returns:
            Whether it has ended.
        """
        error: Exception | None = None
        try:
            if not self._wait(transfer, timeout_seconds if wait else 0):
                return False
        except KvzipError as caught:  # the device is at fault, and with it all that is queued
            error = caught  # anything else is not, such as what a signal raises here: the device goes on
        if not self.lock.acquire(blocking=wait):
            return transfer._ended
        pending = self._pending
        try:
            while pending and (pending[0][0]._ended or not transfer._ended):
                first, land = pending[0]
                if not first._ended:  # else whoever ended it was interrupted
                    self._land(first, land, error)
                pending.popleft()
        finally:
            self.lock.release()
        return transfer._ended

    def poll(self) -> None:
        """Complete what has ended on the device. Does not wait for it."""
        with contextlib.suppress(IndexError):  # somebody else was faster
            while self._pending:
                if not self.complete(self._pending[0][0], 0, wait=False):
                    return

    def drain(self) -> None:
        """Complete everything. Blocks the host."""
        with contextlib.suppress(IndexError):
            while self._pending:
                self.complete(self._pending[-1][0])

    def abandon(self, error: KvzipError) -> None:
        """In a forked child: nothing that was queued ends here."""
        self.lock = threading.Lock()
        while self._pending:
            self._pending.popleft()[0]._abandon(error)

    @staticmethod
    def _wait(transfer: QueuedTransfer, timeout_seconds: float | None) -> bool:
        # Another thread may complete it meanwhile, and the memory that says so may be another transfer's by then.
        end = transfer._work.wait
        if timeout_seconds is None:
            while not (end(_SPIN_US, _PATIENCE_US) or transfer._ended):
                pass
            return True
        if timeout_seconds <= _PATIENCE_SECONDS:
            return end(_SPIN_US, int(max(0.0, timeout_seconds) * 1e6)) or transfer._ended
        left = timeout_seconds
        while left > 0:
            part = min(left, _PATIENCE_SECONDS)
            if end(_SPIN_US, int(part * 1e6)) or transfer._ended:
                return True
            left -= part
        return False

    def _land(self, transfer: QueuedTransfer, land: Land, error: Exception | None) -> None:
        try:
            transfer._finish(land(error))
        except BaseException as caught:
            transfer._fail(transfer_error(self._what, caught))
            if not isinstance(caught, Exception):
                raise  # Ctrl-C, in a thread of the caller


def _seconds(timeout: float | None) -> float | None:
    """A caller's timeout, before anything depends on it."""
    if timeout is None:
        return None
    try:
        return min(float(timeout), threading.TIMEOUT_MAX)
    except (TypeError, ValueError):
        raise ConfigError(f"timeout {timeout!r}: give seconds, or None to wait for ever") from None


def transfer_error(what: str, error: BaseException) -> KvzipError:
    """What a transfer raises for an error, which is logged."""
    if isinstance(error, PoolExhaustedError):  # a pool that is full is full for every store that comes
        log_once(f"a {what} failed", "the pool could not hold its blocks")
    else:
        _log.warning("a %s failed: %s", what, str(error))
    if isinstance(error, KvzipError):
        return error
    wrapped = TransferError(f"a {what} failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
