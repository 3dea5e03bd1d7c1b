# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Hostile records in an engine's pool, loaded into a GPU by small transfers, held against loads into host memory.

    python tests/gpu/fuzz_small.py --cases 20000 --seed 1 --json fuzz_small.json

A case is a record whose payload, segment table or checksum is damaged or forged where the engine keeps it. Small
transfers, those of few pages by kernels of their own, must refuse what the CPU refuses, load the same bytes otherwise,
and leave all other blocks as they were.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts import give_result, seeded_parser

from kvzip import BlockView, CorruptRecordError, ErrorBound, HostPool, KvzipError, SwapEngine
from kvzip.benchmark import host_environment
from kvzip.index import Entry
from kvzip.record import ENTRY_DTYPE, crc32c
from kvzip.types import empty_view

BLOCKS = 16
POISON = 7

Rng = np.random.Generator
Pages = list[npt.NDArray[Any]]  # bit patterns of all blocks, a layer each


class Fault(AssertionError):
    """A small load broke a promise on hostile bytes."""


class Gpu:
    """Layers of values on a GPU, read and poisoned from the host.

    Args:
        layers: torch tensors in host memory, ``[BLOCKS, 2, tokens, heads, head_dim]``.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.source = BlockView([t.cuda() for t in layers], "2NHD")
        self.out = [t.cuda() for t in layers]
        self.target = BlockView(self.out, "2NHD")

    def poison(self) -> None:
        """Fill the blocks that are loaded into."""
        import torch

        for tensor in self.out:
            tensor.view(torch.int16).fill_(POISON)

    def read(self) -> Pages:
        """What is there."""
        import torch

        return [tensor.view(torch.int16).cpu().numpy() for tensor in self.out]


def forge(table: npt.NDArray[Any], rng: Rng, extended: int) -> None:
    """Another value in a field of a segment table; no coding that the engine's kernels do not look for."""
    codings = [*range(6), *((6, 7) if extended & 1 else ()), *((0x12,) if extended & 2 else ()), 0x36, 255]
    entry = table[int(rng.integers(len(table)))]
    size = int(entry["size"])
    values: dict[str, list[Any]] = {
        "offset": [0, int(entry["offset"]) + 1, 2**28, 2**32 - 1],
        "size": [0, 1, size ^ 1, size + 16, size + 2, max(size, 2) - 2, 2**31, 2**32 - 1],
        "bound": [0, np.nan, np.inf, -1, 2.0**-97, 2.0**121, 3.0],
        "coding": codings,
        "param": [0, 1, 31, 127, 128, 255, int(rng.integers(256))],
    }
    field = str(rng.choice(list(values)))
    value = values[field][int(rng.integers(len(values[field])))]
    entry[field] = value % 2**32 if field in ("offset", "size") else value


def spoil(payload: npt.NDArray[np.uint8], table: npt.NDArray[Any], rng: Rng, extended: int) -> str:
    """Damage a record; returns how. `extended`: see `forge`."""
    how = str(rng.choice(["none", "bits", "bytes", "noise", "classes", "entry", "entry"]))
    at = int(rng.integers(payload.size))
    start = 16 * int(table["offset"][int(rng.integers(len(table)))])
    if how == "bits":
        payload[at] ^= np.uint8(1 << rng.integers(8))
    elif how == "bytes":
        payload[at : at + int(rng.choice((1, 4, 16, 300)))] = rng.choice((0, 255, 15, 63, int(rng.integers(256))))
    elif how == "noise":
        payload[at:] = rng.integers(0, 256, payload.size - at)
    elif how == "classes":
        i, j = (min(start + int(rng.integers(16)), payload.size - 1) for _ in range(2))
        payload[[i, j]] = payload[[j, i]]
        payload[i] ^= np.uint8(rng.choice((0, 1, 16, 255)))
    elif how == "entry":
        forge(table, rng, extended)
    return how


def check(engine: SwapEngine, gpu: Any, entries: list[Entry], rng: Rng, counts: Counter[str]) -> int:
    """Damage a few records, load them both ways, and mend them; returns the number of cases.

    Raises:
        Fault: a promise was broken.
    """
    chosen = rng.permutation(BLOCKS)[: int(rng.choice((1, 1, 2, 4, 8)))]
    places = rng.permutation(BLOCKS)[: len(chosen)]
    kept, hows = [], []
    for i in chosen:
        entry = entries[i]
        header = entry.contents.header_bytes
        payload = engine.pool.read(entry.allocation)[header:].copy()
        kept.append((payload.copy(), entry.table, entry.payload_crc32c))
        table = np.frombuffer(entry.table, ENTRY_DTYPE).copy()
        hows.append(spoil(payload, table, rng, entry.contents.extended))
        engine.pool.write(entry.allocation, payload, offset_bytes=header)
        entry.table = table.tobytes()
        entry.payload_crc32c = crc32c(payload) ^ int(rng.integers(8) == 0)
    keys = [b"%d" % i for i in chosen]
    wanted: dict[int, Pages | None] = {}
    for key, place in zip(keys, places, strict=True):
        host = empty_view(gpu.target.layout, 1)
        try:
            engine.load([key], host)
            wanted[int(place)] = list(host.tensors)
        except CorruptRecordError:
            wanted[int(place)] = None
    gpu.poison()
    try:
        engine.load(keys, gpu.target[places]).wait(60)
        refused: set[int] = set()
    except CorruptRecordError as error:
        refused = {int(places[b]) for b in error.blocks}
    expected_refused = {place for place, pages in wanted.items() if pages is None}
    if refused != expected_refused:
        raise Fault(f"{hows}: refused on the GPU {sorted(refused)}, on the CPU {sorted(expected_refused)}")
    pages_of_layer = len(gpu.target.layout.segments) // len(gpu.target.tensors)
    for layer, now in enumerate(gpu.read()):
        for block in range(BLOCKS):
            pages = wanted.get(block)
            for kv in range(pages_of_layer):
                found = now[block, kv].view(np.uint16)
                expected = POISON if pages is None else pages[layer * pages_of_layer + kv][0].view(np.uint16)
                if not (found == expected).all():
                    raise Fault(f"{hows}: layer {layer}, block {block}, page {kv}: other bytes")
    for i, (payload, table_bytes, crc) in zip(chosen, kept, strict=True):
        entry = entries[i]
        engine.pool.write(entry.allocation, payload, offset_bytes=entry.contents.header_bytes)
        entry.table, entry.payload_crc32c = table_bytes, crc
    for how, place in zip(hows, places, strict=True):
        counts[f"{how}: {'refused' if int(place) in refused else 'accepted'}"] += 1
    return len(chosen)


def fuzz(engine: SwapEngine, gpu: Any, cases: int, rng: Rng, counts: Counter[str]) -> int:
    """Store the blocks of a GPU, and load them damaged, until there were so many cases."""
    keys = [b"%d" % i for i in range(BLOCKS)]
    for i in range(BLOCKS):
        engine.store([keys[i]], gpu.source[[i]]).wait(60)
    entries, done = engine._index.find(keys), 0
    while done < cases:
        done += check(engine, gpu, entries, rng, counts)
    return done


def settings(seed: int) -> Iterator[tuple[dict[str, Any], str, tuple[int, int, int, int]]]:
    """Engines, dtypes, and layers, tokens, heads and channels of a head, without end."""
    rng = np.random.default_rng(seed)
    shapes = [(1, 16, 8, 64), (2, 16, 1, 64), (1, 32, 4, 128), (3, 16, 3, 24), (2, 7, 2, 9), (1, 16, 32, 64)]
    ways: list[dict[str, Any]] = [
        {"bound": ErrorBound.relative(1e-3)},
        {"bound": ErrorBound.relative(1e-2)},
        {"bound": ErrorBound.lossless()},
        {"bound": ErrorBound.absolute(0.05), "mode": "plain"},
        {"bound": ErrorBound.relative(1e-2), "mode": "outlier"},
        {"bound": ErrorBound.token_rms(0.1), "mode": "rice"},
        {"bound": ErrorBound.token_rms(0.1), "mode": "fixed"},
    ]
    while True:
        for shape in shapes:
            way = ways[int(rng.integers(len(ways)))]
            yield way, str(rng.choice(["bfloat16", "float16"])), shape


def run(cases: int, seed: int, most_seconds: float = float("inf")) -> dict[str, Any]:
    """Fuzz engines of many settings.

    Raises:
        Fault: a promise was broken; the message names the engine.
    """
    import torch

    from kvzip.memory import PinnedMemory

    rng, counts, done, started = np.random.default_rng(seed), Counter[str](), 0, time.perf_counter()
    with HostPool(64 << 20, resource=PinnedMemory()) as pool:
        for number, (way, dtype, (layers, tokens, heads, dim)) in enumerate(settings(seed)):
            generator = torch.Generator().manual_seed(seed * 1000 + number)
            x = torch.randn((layers, BLOCKS, 2, tokens, heads, dim), generator=generator)
            x[:, 5] = 1.5  # pages of one value
            x[:, 6, :, 1] = float("nan")
            with SwapEngine(pool, **{"bound": ErrorBound.lossless(), **way}) as engine:
                gpu = Gpu([t.to(getattr(torch, dtype)) for t in x])
                try:
                    done += fuzz(engine, gpu, min(500, cases - done), rng, counts)
                except (Fault, KvzipError) as fault:
                    raise Fault(f"engine {number} of seed {seed}, {way}, {dtype}, {x.shape}: {fault}") from fault
            if done >= cases or time.perf_counter() - started > most_seconds:
                break
    return {
        "what": "hostile records loaded into a GPU by small transfers, held against loads into host memory",
        "environment": host_environment() | {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__},
        "settings": {"cases": cases, "seed": seed},
        "cases": done,
        "seconds": round(time.perf_counter() - started, 1),
        "faults": 0,
        "accepted": sum(n for name, n in counts.items() if name.endswith("accepted")),
        "refused": sum(n for name, n in counts.items() if name.endswith("refused")),
        "outcomes": dict(sorted(counts.items())),
    }


def main() -> int:
    """Command line."""
    parser = seeded_parser("hostile records in small transfers to a GPU", "cases", 20_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    options = parser.parse_args()
    result = run(options.cases, options.seed, options.seconds)
    give_result(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
