# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Codecs by name: the ones that kvzip brings, registered ones, and entry points of the group ``kvzip.codecs``."""

from __future__ import annotations

import threading
from importlib import import_module
from importlib.metadata import entry_points

from kvzip.backends.base import Codec
from kvzip.errors import BackendUnavailableError, CodecNotFoundError, ConfigError

ENTRY_POINT_GROUP = "kvzip.codecs"
#: Lossless codecs whose place cuszp takes, lossless as well, where they cannot run.
LOSSLESS_STAND_INS = ("nvcomp",)
_BUILT_IN = {
    "cuszp": ("kvzip.backends.cuszp", "CuszpCodec"),
    "nvcomp": ("kvzip.backends.nvcomp", "NvcompCodec"),
    "raw": ("kvzip.backends.raw", "RawCodec"),
}

_lock = threading.RLock()  # a codec's module may look codecs up while it loads
_instances: dict[str, Codec] = {}


def register_codec(codec: Codec, *, replace: bool = False) -> None:
    """Make a codec available under its name, in this process.

    Args:
        codec: the codec object.
        replace: allow a name that is taken.

    Raises:
        ConfigError: the name is taken, or does not fit into a record.
    """
    name = codec.name
    if not (name.isascii() and name.isprintable() and 1 <= len(name) <= 16):
        raise ConfigError(f"codec name {name!r}: use 1 to 16 printable ASCII characters")
    with _lock:
        if not replace and (name in _instances or name in _BUILT_IN):
            raise ConfigError(f"a codec named {name!r} is registered: pass replace=True to take its place")
        _instances[name] = codec


def get_codec(name: str | Codec) -> Codec:
    """Look a codec up; a codec object is returned as it is.

    Args:
        name: such as ``"cuszp"`` or ``"raw"``; entry points are loaded at their first use.

    Raises:
        CodecNotFoundError: nothing of that name is registered.
    """
    if isinstance(name, Codec):
        return name
    with _lock:
        if name not in _instances:
            _instances[name] = _load(name)
        return _instances[name]


def _load(name: str) -> Codec:
    if name in _BUILT_IN:
        module, attribute = _BUILT_IN[name]
        made = getattr(import_module(module), attribute)()
    else:
        found = [e for e in entry_points(group=ENTRY_POINT_GROUP) if e.name == name]
        if not found:
            raise CodecNotFoundError(f"no codec is named {name!r}: use one of {', '.join(_known())}")
        try:
            loaded = found[0].load()
        except ImportError as error:
            raise BackendUnavailableError(
                f"codec {name!r} of {found[0].value} cannot be imported ({error}): install what its package needs"
            ) from error
        made = loaded() if isinstance(loaded, type) else loaded
    if not isinstance(made, Codec) or made.name != name:
        raise CodecNotFoundError(f"entry point {name!r} of {ENTRY_POINT_GROUP} gives no kvzip.Codec of that name")
    return made


def _known() -> list[str]:
    return sorted({*_BUILT_IN, *_instances, *(e.name for e in entry_points(group=ENTRY_POINT_GROUP))})


def codec_names() -> list[str]:
    """Names of all codecs that can be looked up; nothing is loaded."""
    with _lock:
        return _known()
