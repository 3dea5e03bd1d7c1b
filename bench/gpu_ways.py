# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
# ruff: noqa: D102 - the methods of ways are described in `gpu_peers.Way`
"""kvzip's ways for gpu_transport.py: at bounds by the page's range, lossless, and at the settings of a fidelity.

The latter have bounds by kind of page, so that a block needs K and V pages of its own: its tensors hold pairs of them,
one pair a layer. ``uncalibrated`` is `BoundPolicy.uncalibrated`; ``calibrated`` is K by attention t = 0.4, V by token
RMS 0.17 with the channel tables of the heads that the pages were cut from (``--moments``). Each in the modes ``fixed``
and ``rice``, from the pages of a whole block on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import gpu_peers as peers
import numpy as np
import numpy.typing as npt
from gpu_peers import MIB, PAGE_BYTES, Ints, Unavailable, Way

from kvzip import BlockView, BoundPolicy, ErrorBound, HostPool, SwapEngine
from kvzip.benchmark import EngineWay
from kvzip.calibration import CalibrationTable
from kvzip.coding import compare_blocks, on_host
from kvzip.errors import KvzipError
from kvzip.memory import PinnedMemory
from kvzip.staging import Staging

MOST_PAGES_OF_BLOCK = 64
CHECKED_BLOCKS = 4  # that are compared value by value on the host


class TransportBench(peers.Bench):
    """What the sections share: the peers' memory, and a pool of pinned memory for kvzip, made at its first use."""

    def __init__(self, torch: Any, cache: npt.NDArray[Any], count: int, moments: Path | None = None) -> None:
        super().__init__(torch, cache, count)
        self._cache, self._moments = cache, moments
        self._layers: tuple[BlockView, BlockView] | None = None
        self._pool: HostPool | None = None
        self._views: dict[tuple[int, bool], BlockView] = {}

    @property
    def pool(self) -> HostPool:
        """Room for two and a half times the pages: nothing is evicted."""
        if self._pool is None:
            self._pool = HostPool(self.count * PAGE_BYTES * 5 // 2 + 64 * MIB, resource=PinnedMemory())
        return self._pool

    def engine(self, bound: ErrorBound | BoundPolicy, staging: Staging | None = None, **settings: Any) -> SwapEngine:
        """A new engine over the pool."""
        return SwapEngine(self.pool, bound=bound, staging=staging, **settings)

    def tensors(self, pages_per_block: int, targets: bool) -> list[Any]:
        """The pages (or the targets), cut: tensor l holds page l of every block."""
        blocks = self.count // pages_per_block
        tensor = self.targets if targets else self.pages
        return [tensor[part * blocks : (part + 1) * blocks] for part in range(pages_per_block)]

    def view(self, pages: int, *, targets: bool = False) -> BlockView:
        """All blocks of the size that a transfer of so many pages has."""
        key = (min(MOST_PAGES_OF_BLOCK, pages), targets)
        if key not in self._views:
            self._views[key] = BlockView(self.tensors(*key), "NHD")
        return self._views[key]

    @property
    def layers(self) -> tuple[BlockView, BlockView]:
        """Blocks of one pair of K and V pages a layer, and others to load into; all pages differ."""
        if self._layers is None:
            pages = self.layer_tensors()
            targets = [self.torch.zeros_like(layer) for layer in pages]
            self._layers = self.layer_view(pages), self.layer_view(targets)
        return self._layers

    def layer_tensors(self) -> list[Any]:
        """The pages of `layers`."""
        blocks = self.count // MOST_PAGES_OF_BLOCK
        return layer_pages(self.torch, self._cache, MOST_PAGES_OF_BLOCK // 2, blocks, self.device)

    def layer_view(self, tensors: list[Any]) -> BlockView:
        """Blocks of such pages."""
        return BlockView(tensors, "2NHD")

    def calibration(self) -> CalibrationTable:
        """Query moments for the heads of `layers`."""
        if self._moments is None:
            raise Unavailable("needs the model's query moments: --moments FILE")
        moments = np.load(self._moments)
        flat = moments.reshape(-1, moments.shape[-1])
        return CalibrationTable(np.stack([flat[heads] for heads in layer_heads(len(flat), MOST_PAGES_OF_BLOCK // 2)]))

    def selections(self, pages: int, most: int) -> list[Ints]:
        """Numbers of blocks with so many pages in all: disjoint sets, in random order."""
        each = max(1, pages // MOST_PAGES_OF_BLOCK)
        order: Ints = np.random.default_rng(1).permutation(self.count // min(MOST_PAGES_OF_BLOCK, pages))
        return [order[k * each : (k + 1) * each] for k in range(min(most, len(order) // each))]

    def page_numbers(self, pages: int, blocks: Ints) -> Ints:
        """Numbers of the pages of these blocks."""
        per_block = min(MOST_PAGES_OF_BLOCK, pages)
        return (np.arange(per_block)[:, None] * (self.count // per_block) + blocks).ravel()


def check_pages(bench: peers.Bench, numbers: Ints, bound: float, name: str) -> None:
    """Assert that targets are the pages within `bound` x the page's range; 0: every bit."""
    torch = bench.torch
    for first in range(0, len(numbers), 512):
        part = torch.from_numpy(numbers[first : first + 512]).to(bench.device)
        want, got = bench.pages[part].flatten(1), bench.targets[part].flatten(1)
        if bound == 0:
            assert torch.equal(want.view(torch.int16), got.view(torch.int16)), f"{name}: other bits came back"
            continue
        want, got = want.double(), got.double()
        limit = bound * (want.amax(1) - want.amin(1)) * (1 + 1e-6)
        error = (want - got).abs().amax(1)
        assert bool((error <= limit).all()), f"{name}: a page is further off than {bound} x its range"


class Kvzip(EngineWay, Way):
    """An engine with its default settings. `store` and `load` take numbers of blocks; `pages` says of which size."""

    name: ClassVar[str]  # type: ignore[misc]  # of the class here
    relative: ClassVar[float] = 0.0  # 0: lossless
    mode: ClassVar[str] = "fixed"
    least_pages: ClassVar[int] = 1

    def __init__(self, bench: TransportBench, staging: Staging | None = None) -> None:
        Way.__init__(self, bench)
        self.kvzip_bench = bench
        self.pages = 1
        self.bound = self.make_bound(bench)
        try:
            engine = bench.engine(self.bound, staging, mode=self.mode)
        except KvzipError as error:
            raise Unavailable(str(error)) from error
        EngineWay.__init__(self, self.name, engine, self._pages, int(bench.kernels.cuda_stream))

    def make_bound(self, bench: TransportBench) -> ErrorBound | BoundPolicy:
        return ErrorBound.relative(self.relative) if self.relative else ErrorBound.lossless()

    @property
    def pages(self) -> int:
        """Pages of a transfer, which decide the size of the blocks."""
        return self._count

    @pages.setter
    def pages(self, count: int) -> None:
        self._count = count
        self._both = self.kvzip_bench.view(count), self.kvzip_bench.view(count, targets=True)

    def _pages(self) -> tuple[BlockView, BlockView]:
        return self._both

    def note(self) -> str:
        stats = self.engine.stats()
        return f"pages not coded as asked: {dict(stats.fallbacks)} of {stats.stored_raw_bytes // PAGE_BYTES}"

    def check(self, ids: Ints) -> None:
        check_pages(self.bench, self.kvzip_bench.page_numbers(self.pages, ids), self.relative, self.name)


class Kvzip1e3(Kvzip):
    """Within 1e-3 of a page's range."""

    name = "kvzip-1e-3"
    relative = 1e-3


class Kvzip1e2(Kvzip):
    """Within 1e-2 of a page's range."""

    name = "kvzip-1e-2"
    relative = 1e-2


class KvzipLossless(Kvzip):
    """Every bit."""

    name = "kvzip-lossless"


class FidelityWay(Kvzip):
    """Bounds by kind of page."""

    least_pages = MOST_PAGES_OF_BLOCK

    def _pages(self) -> tuple[BlockView, BlockView]:
        return self.kvzip_bench.layers

    def check(self, ids: Ints) -> None:
        source, target = (on_host(view[ids[:CHECKED_BLOCKS]]) for view in self.kvzip_bench.layers)
        found = compare_blocks(source, target, self.bound)
        assert found.violations == 0, f"{self.name}: {found.violations} values are further off than their bounds"
        assert found.over_bound > 0.5, f"{self.name}: the largest error is {found.over_bound:.2f} of its bound"


class Uncalibrated(FidelityWay):
    """`BoundPolicy.uncalibrated`."""

    name = "kvzip-uncalibrated"

    def make_bound(self, bench: TransportBench) -> BoundPolicy:
        return BoundPolicy.uncalibrated()


class Calibrated(FidelityWay):
    """What a calibration table gives by default."""

    name = "kvzip-calibrated"

    def make_bound(self, bench: TransportBench) -> BoundPolicy:
        return bench.calibration().policy()


class UncalibratedRice(Uncalibrated):
    """The same in the mode rice."""

    name = "kvzip-uncalibrated-rice"
    mode = "rice"


class CalibratedRice(Calibrated):
    """The same in the mode rice."""

    name = "kvzip-calibrated-rice"
    mode = "rice"


def layer_heads(columns: int, layers: int) -> list[Ints]:
    """Which heads of all layers of the cache, side by side, the pages of each layer are cut from."""
    return [(np.arange(peers.HEADS) + layer * columns // layers) % columns for layer in range(layers)]


def layer_pages(torch: Any, cache: npt.NDArray[Any], layers: int, blocks: int, device: Any) -> list[Any]:
    """Cut pages for layers that have the same heads in every block.

    Args:
        torch: the module.
        cache: as for `gpu_peers.real_pages`.
        layers: layers of a block.
        blocks: number of blocks; each takes other tokens.
        device: where they go.

    Returns:
        For each layer bfloat16 ``[blocks, 2, 16, 32, 64]``.
    """
    tokens = cache.shape[2]
    if tokens - peers.TOKENS + 1 < blocks:
        raise Unavailable(f"the cache has {tokens} tokens, too few for {blocks} different blocks: use a longer one")
    flat = torch.from_numpy(np.ascontiguousarray(cache).view(np.int16)).to(device)
    flat = flat.permute(1, 2, 0, 3, 4).reshape(2, tokens, -1, peers.HEAD_DIM)
    first = torch.arange(blocks, device=flat.device) * (tokens - peers.TOKENS + 1) // max(1, blocks)
    token = first[:, None] + torch.arange(peers.TOKENS, device=flat.device)
    found = []
    for heads in layer_heads(flat.shape[2], layers):
        head = torch.from_numpy(heads).to(flat.device)
        found.append(flat[:, token][:, :, :, head].transpose(0, 1).contiguous().view(torch.bfloat16))
    return found


FIDELITY_WAYS: tuple[type[Kvzip], ...] = (Uncalibrated, UncalibratedRice, Calibrated, CalibratedRice)
WAYS: tuple[type[Way], ...] = (*peers.WAYS, Kvzip1e3, Kvzip1e2, KvzipLossless, *FIDELITY_WAYS)
