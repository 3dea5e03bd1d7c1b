# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Every error that kvzip raises on purpose. Each message gives the value, the limit and the remedy."""

from __future__ import annotations


class KvzipError(Exception):
    """Base class: catch this to catch everything that kvzip raises on purpose."""


class ConfigError(KvzipError, ValueError):
    """A setting or an argument is outside its range."""


class LayoutError(KvzipError, ValueError):
    """Tensors, geometry or block numbers do not fit together."""


class CodecNotFoundError(KvzipError, LookupError):
    """No codec of that name is registered."""


class BackendUnavailableError(KvzipError, RuntimeError):
    """A backend cannot run here; the message says what is missing and what to do."""


class PoolExhaustedError(KvzipError, MemoryError):
    """The pool cannot hold what was asked for.

    Attributes:
        requested: bytes asked for.
        free: bytes that were free, or could have been freed.
    """

    def __init__(self, message: str, *, requested: int, free: int) -> None:
        super().__init__(message)
        self.requested = requested
        self.free = free


class BlockNotFoundError(KvzipError, KeyError):
    """No record is stored under a key.

    Attributes:
        keys: the keys that were not found.
    """

    def __init__(self, message: str, *, keys: tuple[bytes, ...] = ()) -> None:
        super().__init__(message)
        self.keys = keys

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class FormatError(KvzipError, ValueError):
    """Bytes are not a record that this version can read."""


class FormatVersionError(FormatError):
    """The record's format version is not known to this version of kvzip."""


class CorruptRecordError(FormatError):
    """A record is damaged: a length, a checksum or a field contradicts the format.

    Attributes:
        blocks: positions of the damaged records in the load that found them, where they are known.
    """

    def __init__(self, message: str, *, blocks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.blocks = blocks


class NativeError(KvzipError, RuntimeError):
    """The native library reported a failure.

    Attributes:
        status: the native status code.
    """

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


# After these every call of the process fails on that GPU (CUDA Runtime API, "Data types used by CUDA Runtime").
_FATAL = frozenset(
    {
        "cudaErrorAssert",
        "cudaErrorContained",
        "cudaErrorContextIsDestroyed",
        "cudaErrorECCUncorrectable",
        "cudaErrorExternalDevice",
        "cudaErrorHardwareStackError",
        "cudaErrorIllegalAddress",
        "cudaErrorIllegalInstruction",
        "cudaErrorInvalidAddressSpace",
        "cudaErrorInvalidPc",
        "cudaErrorLaunchFailure",
        "cudaErrorLaunchTimeout",
        "cudaErrorMisalignedAddress",
        "cudaErrorNvlinkUncorrectable",
        "cudaErrorTensorMemoryLeak",
    }
)


class CudaError(NativeError):
    """A CUDA call failed.

    Attributes:
        code: the CUDA error code.
        name: its name, such as ``cudaErrorIllegalAddress``.
    """

    def __init__(self, message: str, *, code: int, name: str, status: int = 0) -> None:
        super().__init__(message, status=status)
        self.code = code
        self.name = name

    @property
    def fatal(self) -> bool:
        """Whether the GPU is lost to this process: all that follows fails too, and only a new process helps."""
        return self.name in _FATAL


class TransferError(KvzipError):
    """A store or a load failed after it was accepted; the pool and the pages are as they were."""
