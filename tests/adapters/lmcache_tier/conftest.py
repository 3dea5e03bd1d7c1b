# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""LMCache's own storage manager over a folder."""

from __future__ import annotations

import json
import os
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
os.environ.setdefault("LMCACHE_LOG_LEVEL", "WARNING")


def guides_adapter() -> dict[str, Any]:
    """What the guide gives to ``--l2-adapter``."""
    guide = Path(__file__).parents[3] / "docs" / "guides" / "lmcache.md"
    adapter: dict[str, Any] = json.loads(guide.read_text().split("--l2-adapter '")[1].split("'\n")[0])
    return adapter


class Tier:
    """LMCache's storage manager, with L1 in host memory and one L2 adapter that keeps files in a folder.

    Args:
        folder: of the files.
        options: settings of the serde.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        from lmcache.v1.distributed.config import (
            EvictionConfig,
            L1ManagerConfig,
            L1MemoryManagerConfig,
            StorageManagerConfig,
        )
        from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
        from lmcache.v1.distributed.storage_manager import StorageManager

        self.folder = folder
        adapter = guides_adapter()
        adapter["adapter_params"]["base_path"] = str(folder)
        adapter["serde"] = {"type": adapter["serde"]["type"], **options}
        self.manager = StorageManager(
            StorageManagerConfig(
                l1_manager_config=L1ManagerConfig(L1MemoryManagerConfig(size_in_bytes=256 << 20, use_lazy=False)),
                eviction_config=EvictionConfig(eviction_policy="LRU"),
                l2_adapter_config=parse_args_to_l2_adapters_config(Namespace(l2_adapter=[json.dumps(adapter)])),
            )
        )

    def file(self, key: Any) -> Path:
        """Where LMCache keeps an object."""
        return self.folder / f"{key.model_name.replace('/', '-SEP-')}@{key.kv_rank:#010x}@0@{key.chunk_hash.hex()}.data"

    def store(self, keys: list[Any], tensors: list[Any]) -> None:
        """Put objects of one tensor each into L1, wait until they are in L2, and empty L1."""
        from lmcache.v1.distributed.api import MemoryLayoutDesc

        layout = MemoryLayoutDesc([tensors[0].shape], [tensors[0].dtype])
        objects = self.manager.reserve_write(keys, layout)
        for key, tensor in zip(keys, tensors, strict=True):
            objects[key].tensor.copy_(tensor)
        self.manager.finish_write(keys)
        wait_for(lambda: all(self.file(key).exists() for key in keys))
        wait_for(lambda: self.manager.report_status()["store_controller"]["in_flight_task_count"] == 0)
        self.manager.clear(force=True)

    def load(self, keys: list[Any], shape: Any, dtype: Any) -> list[Any]:
        """What comes back from L2: copies of the tensors; None for misses."""
        from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, PrefetchTaskSpec

        row = GroupedObjectKeys(keys, 0, MemoryLayoutDesc([shape], [dtype]))
        handle = self.manager.submit_prefetch_task(PrefetchTaskSpec([row], fetching_policy="full"))
        results: list[Any] = []
        wait_for(lambda: results.append(self.manager.query_prefetch_status(handle)) or results[-1] is not None)
        hits = [key for i, key in enumerate(keys) if results[-1].l2_hit_cells[0].test(i)]
        loaded: dict[Any, Any] = {}
        if hits:
            with self.manager.read_prefetched_results(hits) as objects:
                assert objects is not None
                loaded = {key: obj.tensor.clone() for key, obj in zip(hits, objects, strict=True)}
            self.manager.finish_read_prefetched(hits)
        self.manager.clear(force=True)
        return [loaded.get(key) for key in keys]

    def close(self) -> None:
        """End LMCache's threads."""
        self.manager.close()


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    """Poll a condition that another thread makes true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "LMCache did not get there in time"
        time.sleep(0.01)


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Any]:
    """Makes a tier in a folder of the test's own, and closes the one before it: a process has one at a time."""
    made: list[Tier] = []

    def make(**options: Any) -> Tier:
        while made:
            made.pop().close()
        made.append(Tier(tmp_path, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
