# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""`Transfer`: a store or a load under way, and what it did."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from kvzip.errors import KvzipError, TransferError
from kvzip.interop.torch import stream_handle


class StreamDriver(Protocol):
    """The device functions that a transfer needs (see `kvzip.transport.Driver`)."""

    def set_device(self, device: int) -> None: ...  # noqa: D102
    def stream_wait_event(self, stream: int, event: int) -> None: ...  # noqa: D102
    def event_create(self, *, timing: bool = False) -> int: ...  # noqa: D102
    def event_destroy(self, event: int) -> None: ...  # noqa: D102
    def event_record(self, event: int, stream: int) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class TransferResult:
    """What a finished transfer did.

    Attributes:
        blocks: number of blocks.
        raw_bytes: bytes of their values.
        record_bytes: bytes of their records in the pool.
        seconds: from the call to its end.
        evicted: records that had to leave the pool.
        fallbacks: pages that were not coded as asked, by reason.
        max_error: largest absolute error of a store with ``measure_error``, else None.
        violations: values that broke the bound in such a store (0 unless a codec is at fault), else None.
    """

    blocks: int
    raw_bytes: int
    record_bytes: int
    seconds: float
    evicted: int = 0
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    max_error: float | None = None
    violations: int | None = None


class Transfer:
    """A store or a load that was accepted. Thread-safe.

    On the CPU the work is done when `store` or `load` returns, and an error has been raised there. On a GPU it goes on
    in the background: pages that are being stored must stay as they are, and pages that are being loaded must not be
    read, until the transfer is done, or, for work on the GPU, behind `wait_stream`.
    """

    def __init__(self, driver: StreamDriver | None = None, device: int = 0) -> None:
        self._finished = threading.Event()
        self._queued = threading.Event()
        self._result: TransferResult | None = None
        self._error: KvzipError | None = None
        self._driver = driver
        self._device = device
        self._event = 0

    def done(self) -> bool:
        """Whether the transfer has ended, well or not. Never blocks."""
        return self._finished.is_set()

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Block the host until the transfer has ended.

        Args:
            timeout_seconds: give up after this long; None waits for ever.

        Returns:
            Whether it has ended.

        Raises:
            TransferError: it failed; the pool and the pages are as they were.
        """
        if not self._finished.wait(timeout_seconds):
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

    def wait_stream(self, stream: object = None) -> None:
        """Make a CUDA stream wait for the transfer's work on the pages: what is queued there next comes after it.

        After a load, kernels of that stream see the loaded values; after a store, they may overwrite the pages. Blocks
        the host only until the transfer's kernels are queued. On the CPU it does nothing: the work is done.

        Whether a load found every record intact is known at its end: ask `result` before the values are trusted.

        Args:
            stream: a CUDA stream handle, anything with ``cuda_stream`` (torch), or None for torch's current stream.

        Raises:
            TransferError: the transfer has failed, or was never queued.
        """
        if self._driver is None:
            self.wait()
            return
        self._queued.wait()
        if self._event == 0:
            self.wait()
            return
        self._driver.set_device(self._device)
        self._driver.stream_wait_event(stream_handle(stream, self._device), self._event)

    @property
    def cuda_event(self) -> int:
        """Handle of the event behind the last kernel, for integrators; 0 before it is queued, and on the CPU."""
        return self._event

    def _mark_queued(self, stream: int) -> None:
        """All kernels are queued on this stream of the pipeline."""
        assert self._driver is not None
        event = self._driver.event_create()
        self._driver.event_record(event, stream)
        self._event = event
        self._queued.set()

    def _finish(self, result: TransferResult) -> None:
        self._result = result
        self._finished.set()
        self._queued.set()

    def _fail(self, error: KvzipError) -> None:
        self._error = error
        self._finished.set()
        self._queued.set()

    def __del__(self) -> None:
        if self._event and self._driver is not None:
            with contextlib.suppress(KvzipError):  # at the interpreter's end the device may be gone already
                self._driver.event_destroy(self._event)
