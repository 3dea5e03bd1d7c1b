# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What transfers need of a GPU: the functions (`Driver`), and the arguments of its kernels.

`kvzip._cuda` has the real ones. Handles and addresses are integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

RECORD_ALIGNMENT = 256  # bytes: records begin at multiples of it in the arena (csrc/cuszp/kvz.h)

Copy = tuple[int, int, int]  # (to, from, bytes)


class Driver(Protocol):
    """The device functions that the pipeline needs; `kvzip._cuda` has the real ones.

    Handles and addresses are integers. Freeing address 0 does nothing.
    """

    def get_device(self) -> int: ...  # noqa: D102
    def set_device(self, device: int) -> None: ...  # noqa: D102
    def malloc(self, nbytes: int) -> int: ...  # noqa: D102
    def free(self, address: int) -> None: ...  # noqa: D102
    def memset(self, address: int, byte: int, nbytes: int, stream: int) -> None: ...  # noqa: D102
    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None: ...  # noqa: D102
    def copy_between(self, pieces: Sequence[Copy], after: int, done: int, stream: int) -> None: ...  # noqa: D102
    def mapped_copy(self, to: int, source: int, nbytes: int, stream: int) -> None: ...  # noqa: D102
    def stream_create(self, priority: int = 0) -> int: ...  # noqa: D102
    def stream_destroy(self, stream: int) -> None: ...  # noqa: D102
    def stream_wait_event(self, stream: int, event: int) -> None: ...  # noqa: D102
    def stream_synchronize(self, stream: int) -> None: ...  # noqa: D102
    def event_create(self, *, timing: bool = False) -> int: ...  # noqa: D102
    def event_destroy(self, event: int) -> None: ...  # noqa: D102
    def event_record(self, event: int, stream: int) -> None: ...  # noqa: D102
    def event_synchronize(self, event: int) -> None: ...  # noqa: D102
    def event_wait(self, event: int, spin_us: int, timeout_us: int) -> bool: ...  # noqa: D102
    def workspace_bytes(self, num_segments: int, num_blocks: int) -> int: ...  # noqa: D102

    def encode_call(  # noqa: D102
        self, encode: EncodeArgs, inputs: Copy, results: Copy, done: int, stream: int, copied: int, copies: int
    ) -> Callable[[], None]: ...

    def outgoing(  # noqa: D102
        self, calls: Sequence[Any], stream: int
    ) -> OutgoingChunks: ...

    def decode_call(  # noqa: D102
        self, decode: DecodeArgs, inputs: Copy, copied: int, done: int, stream: int
    ) -> Callable[[], None]: ...

    def few_bytes(self) -> int: ...  # noqa: D102

    def store_call(  # noqa: D102
        self, encode: EncodeArgs, move: MoveArgs, few: FewArgs, order: int, device: int, stream: int
    ) -> SwapCall: ...

    def load_call(  # noqa: D102
        self, decode: DecodeArgs, move: MoveArgs, few: FewArgs, order: int, device: int, stream: int
    ) -> SwapCall: ...


@dataclass(frozen=True)
class EncodeArgs:
    """Arguments of one encode launch: device-addressable addresses, sizes in bytes (see ``kvz_cuda_encode_args``).

    With `crc32c`, the checksums of the payloads are written there.
    """

    segments: npt.NDArray[Any]
    device_segments: int
    block_ids: int
    num_blocks: int
    arena: int
    arena_bytes: int
    header_bytes: int
    table: int
    payload_bytes: int
    record_offsets: int
    status: int
    workspace: int
    workspace_bytes: int
    max_ctas: int
    crc32c: int = 0


@dataclass(frozen=True)
class DecodeArgs:
    """Arguments of one decode launch (see ``kvz_cuda_decode_args``).

    With `crc32c`, payloads that have other checksums than those there are refused. `extended` says what pages may have
    beside one bound each and codings other than Rice's (`kvzip.backends.cuszp.Extended`).
    """

    segments: npt.NDArray[Any]
    device_segments: int
    block_ids: int
    num_blocks: int
    payloads: int
    payload_bytes: int
    table: int
    block_status: int
    workspace: int
    workspace_bytes: int
    max_ctas: int
    crc32c: int = 0
    extended: int = 0


@dataclass(frozen=True)
class CrcArgs:
    """Arguments of one checksum launch (see ``kvz_cuda_crc_args``)."""

    base: int
    offsets: int
    skip: int
    payload_bytes: int
    crc32c: int
    scratch: int
    max_payload_bytes: int
    count: int
    check: bool
    max_ctas: int


@dataclass(frozen=True)
class MoveArgs:
    """What carries records between an arena and mapped host memory (see ``kvz_cuda_move_args``)."""

    arena: int
    record_offsets: int
    payload_bytes: int
    checked_bytes: int
    crc32c: int
    scratch: int
    runs: int
    beside_to: int
    beside_from: int
    beside_bytes: int
    max_payload_bytes: int
    num_blocks: int
    header_bytes: int


@dataclass(frozen=True)
class FewArgs:
    """What kernels for few pages need besides (see ``kvz_cuda_few``): device memory, and places in host memory."""

    memory: int
    ends: int
    table: int
    block_ids: int
    payload_bytes: int = 0
    status: int = 0


class SwapCall(Protocol):
    """A whole transfer, bound to its memory: each call queues it on its stream behind the work of another.

    Args:
        after: stream whose queued work comes before.
        done: event that is recorded behind everything.
        num_runs: runs of host memory; more than one stand where `MoveArgs.runs` says.
        address: where the only run lies.
        nbytes: its size.
    """

    def __call__(self, after: int, done: int, num_runs: int, address: int, nbytes: int) -> None: ...  # noqa: D102

    def wait(self, spin_us: int, timeout_us: int) -> bool:
        """Wait for the end of the last one, as `Driver.event_wait` does for its event; may see it earlier."""
        ...


class OutgoingChunks(Protocol):
    """Chunks that are encoded, and copied to one run of host memory, without a step of the interpreter in between.

    Each is copied as soon as its size is known, right behind the one before. An encoder is launched before the one in
    front of it is waited for. Made by `Driver.outgoing`, and used again and again:

    Args:
        calls: launches of the chunks, from `Driver.encode_call`.
        stream: stream of the encoders. A copy goes to the stream that its call was made with, and the event of that is
            recorded behind it.

    Attributes:
        copied: bytes of each copy, multiples of `RECORD_ALIGNMENT`; 0 where it is not queued.
    """

    @property
    def copied(self) -> Iterable[int]: ...  # noqa: D102

    def begin(self, to: int, room_bytes: int) -> None:
        """The first of `calls` was called, and all are to be copied.

        Args:
            to: host address.
            room_bytes: bytes that there are.
        """
        ...

    def wait(self, spin_us: int, timeout_us: int) -> bool:
        """Go on until all copies are queued, or an encoder has failed, or has said what cannot be.

        Returns:
            False: not yet, within the time. To be called again.
        """
        ...
