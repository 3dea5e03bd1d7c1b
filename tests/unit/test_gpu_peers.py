# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What of bench/gpu_peers.py runs without a GPU: its pages, and the arithmetic of its peers."""

from __future__ import annotations

import itertools
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripts import load_script

torch = pytest.importorskip("torch", reason="torch is not installed: the benchmark needs it")

ROOT = Path(__file__).parent.parent.parent
SAMPLE = ROOT / "kvzip" / "data" / "smollm2_sample.npy"


@pytest.fixture(scope="module")
def peers() -> Any:
    return load_script("bench/gpu_peers.py")


def _pages(peers: Any, count: int) -> Any:
    cache = np.concatenate([np.load(SAMPLE)] * 3, axis=0)  # the sample's layers alone have too few heads
    return peers.real_pages(torch, cache, count, "cpu")


def test_pages_are_all_different(peers: Any) -> None:
    pages = _pages(peers, 300).view(torch.int16).flatten(1)
    assert len(torch.unique(pages, dim=0)) == 300
    assert bool((pages != 0).any(1).all())


def test_more_pages_than_the_data_has_are_refused(peers: Any) -> None:
    with pytest.raises(SystemExit, match="different pages"):
        _pages(peers, 10_000)


@pytest.mark.parametrize("name", ["RawGather", "Fp8", "Int8"])
def test_kernels_give_back_what_the_way_promises(peers: Any, name: str) -> None:
    pages = _pages(peers, 40)
    kind = getattr(peers, name)
    way = object.__new__(kind)
    way.torch = torch
    way.bench = types.SimpleNamespace(device=torch.device("cpu"), pages=pages, targets=torch.zeros_like(pages))
    ids = torch.randperm(40)[:9]
    staging = torch.empty(9 * kind.page_bytes, dtype=torch.uint8)
    getattr(way, "_encode", way.encode)(pages, ids, staging)
    getattr(way, "_decode", way.decode)(staging, ids, way.bench.targets)
    way.check(ids.numpy())
    with pytest.raises(AssertionError):
        way.check(np.setdiff1d(np.arange(40), ids.numpy()))


def test_no_gpu_is_said(peers: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peers.main(["--data", str(SAMPLE)]) == 1
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 8, 64, 65, 512, 4096, 16384])
def test_chunks_cover_all_pages(peers: Any, count: int) -> None:
    parts = peers.chunks_of(count)
    assert parts[0][0] == 0
    assert parts[-1][1] == count
    assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
    assert max(last - first for first, last in parts) <= 512
