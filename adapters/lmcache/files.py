# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""LMCache's file-system tier for records, whose sizes differ; LMCache takes it as an L2 adapter of the type ``plugin``.

LMCache (0.5.6) stores as many bytes as a serde has written, but at a load it asks a tier for as many as the serde could
have written at most, and its own tier takes every shorter file for a damaged one. Here the file says how long it is.
Besides, a damaged file is a miss of its own object alone, and is deleted, so that the next store of the object writes
it anew.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters.base import L2TaskId
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import FSL2Adapter, FSL2AdapterConfig
from lmcache.v1.memory_management import MemoryObj

from kvzip._log import logger
from kvzip.adapters.lmcache import register
from kvzip.adapters.lmcache.stored import host_bytes, verify_stored
from kvzip.errors import ConfigError, CorruptRecordError
from kvzip.record import MAGIC


class FilesL2AdapterConfig(FSL2AdapterConfig):
    """Settings of the tier: those of LMCache's ``fs``, without ``use_odirect``."""

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> FilesL2AdapterConfig:
        """Read them.

        Raises:
            ConfigError: ``use_odirect`` is set.
            ValueError: see LMCache's ``fs``.
        """
        if d.get("use_odirect"):
            raise ConfigError(f"use_odirect={d['use_odirect']!r}: records are no whole disk blocks, leave it out")
        config: FilesL2AdapterConfig = super().from_dict(d)
        return config


class FilesL2Adapter(FSL2Adapter):
    """Files of records, one an object, under LMCache's names.

    Args:
        config: see `FilesL2AdapterConfig`.
        l1_memory_desc: not used.
    """

    def __init__(self, config: FilesL2AdapterConfig, l1_memory_desc: Any = None) -> None:
        register()  # LMCache looks for the serde after it has made the tier
        self._loads: dict[L2TaskId, tuple[list[ObjectKey], list[MemoryObj]]] = {}
        self._refused = 0
        super().__init__(config)

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> L2TaskId:
        """Read files into buffers, each of them narrowed to the size of its file."""
        for key, buffer in zip(keys, objects, strict=True):
            with contextlib.suppress(OSError):  # what is not there is found missing when it is read
                buffer.set_used_size(min(os.stat(self._key_to_path(key)).st_size, buffer.get_size()))
        task: L2TaskId = super().submit_load_task(keys, objects)
        self._loads[task] = (list(keys), list(objects))
        return task

    def query_load_result(self, task_id: L2TaskId) -> Bitmap | None:
        """Which of a task's objects were read and are whole; None while the task runs."""
        found = super().query_load_result(task_id)
        if found is None:
            return None
        keys, objects = self._loads.pop(task_id)
        damaged = []
        for i in found.get_indices_list():
            try:
                verify_stored(objects[i], keys[i])
            except Exception as error:  # whatever it is: LMCache would wait for ever for this task
                logger.warning("%s is not read, LMCache will compute it again: %s", self._key_to_path(keys[i]), error)
                found.clear(i)
                self._refused += 1
                if isinstance(error, CorruptRecordError) and _begins_as_ours(objects[i]):
                    damaged.append(keys[i])
        if damaged:
            self.delete(damaged)
        return found

    def report_status(self) -> dict[str, Any]:
        """LMCache's status of the tier, and how many objects were read and refused since the start."""
        return {**super().report_status(), "refused_object_count": self._refused}


def _begins_as_ours(obj: MemoryObj) -> bool:
    """Whether what was read may be a record, or what a file system leaves of one; else it may be another serde's."""
    return host_bytes(obj)[:4].tobytes() in (MAGIC, bytes(4), b"")
