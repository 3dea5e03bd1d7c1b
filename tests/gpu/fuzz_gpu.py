# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Hostile records against the CUDA decoder, thousands in a launch, held against the CPU decoder.

    python tests/gpu/fuzz_gpu.py --cases 100000 --seed 1 --json fuzz_gpu.json
    compute-sanitizer python tests/gpu/fuzz_gpu.py --cases 4000 --blocks 96 --seed 7 --json memcheck.json

A case is one block of several pages: bytes of its payload are damaged, cut or taken from another block, or entries of
its segment table are forged; a quarter of the launches have the checksums of the undamaged payloads. What must hold:

* The verdict is that of the CPU decoder, and where it accepts, the pages are the same bytes; a payload with another
  checksum is refused.
* What is refused leaves its pages as they were; guard zones around all pages, and the payloads themselves, stay as they
  were.
* Nothing depends on what lies behind a payload: a second launch with other bytes there ends the same.
* The workspace is zero again, so that the next launch finds it as it must.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import cuda_bridge as bridge
from cuda_bridge import (
    BF16,
    BOUND_ABSOLUTE,
    BOUND_CHANNEL_TABLE,
    BOUND_RELATIVE,
    BOUND_TOKEN_RMS,
    FIXED,
    FP16,
    FP32,
    LOSSLESS,
    LOSSLESS_RICE,
    OPAQUE,
    OUTLIER,
    PLAIN,
    RICE,
    Batch,
    Encoded,
    GpuDecode,
    Spec,
)
from scripts import give_result, seeded_parser

from kvzip.benchmark import host_environment

GUARD = 4096  # bytes before and after each page's memory
BLOCKS = 1024  # of a launch
PLAIN_CODINGS = 6  # codings below this one are decoded by the kernels that know no others
ALL = 3  # kvz_extended: the Rice codings, and bounds within pages
STEPS, BY_CHANNEL = 0x30, 0x20  # of a coding: a page with steps by channel needs a table of them

Bytes = npt.NDArray[np.uint8]
Rng = np.random.Generator


def specs_of(seed: int) -> list[list[Spec]]:
    """Pages of the launches: every dtype, coding, kind of bound and group, on shapes of both families of kernels."""
    rice = [
        Spec(dtype, *shape, coding=RICE, bound=bound, bound_kind=kind)
        for dtype, shape in ((BF16, (16, 2, 64)), (FP16, (16, 3, 24)), (FP32, (17, 1, 40)))
        for bound, kind in (
            (1e-2, BOUND_RELATIVE),
            (0.05, BOUND_ABSOLUTE),
            (0.1, BOUND_TOKEN_RMS),
            (0.3, BOUND_CHANNEL_TABLE),
        )
    ]
    groups = (16, 8, 4, 2, 1)
    return [
        [Spec(BF16, 16, 2, 64, coding=c) for c in (FIXED, PLAIN, OUTLIER, LOSSLESS)],
        [Spec(FP16, 16, 3, 64, coding=c, bound=1e-2) for c in (FIXED, PLAIN, OUTLIER, LOSSLESS)],
        [Spec(FP32, 16, 1, 64, coding=c) for c in (FIXED, PLAIN, OUTLIER, LOSSLESS)],
        [Spec(BF16, 32, 2, 24, coding=FIXED, bound=0.05, bound_kind=BOUND_ABSOLUTE, heads_first=True, pad=8)] * 2,
        [
            Spec(d, 7, 3, 9, group_tokens=g, coding=c)
            for d, g, c in zip(
                (BF16, FP16, FP32, BF16, FP16), groups, (FIXED, PLAIN, OUTLIER, LOSSLESS, FIXED), strict=True
            )
        ],
        [Spec(OPAQUE, 3, 1, 77, group_tokens=1), Spec(BF16, 1, 1, 1), Spec(FP32, 1, 1, 257, coding=PLAIN)],
        *([replace(spec, coding=c) for spec in (rice[2], rice[3], rice[6], rice[7])] for c in (FIXED, PLAIN, OUTLIER)),
        [replace(rice[i], coding=c) for i, c in ((10, FIXED), (11, PLAIN), (11, OUTLIER), (3, FIXED))],
        rice[0:4],
        rice[4:8],
        rice[8:12],
        [replace(rice[i], coding=LOSSLESS_RICE) for i in (0, 4, 8)],
        [replace(rice[i], group_tokens=g) for i, g in zip((0, 2, 5, 7, 10), groups, strict=True)],
        [replace(rice[2], coding=RICE), Spec(BF16, 16, 2, 64), Spec(BF16, 16, 2, 64, coding=LOSSLESS)],
    ]


# ---- damage: each changes the payload of one block, which is `size` bytes from `start`, or its table ----------------


@dataclass(eq=False)
class Damaged:
    """A batch that is being damaged."""

    payloads: Bytes
    starts: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.uint64]
    table: npt.NDArray[Any]
    good: Encoded
    good_payloads: Bytes

    def segment(self, rng: Rng, b: int) -> tuple[int, int]:
        """Place and size of the bytes of one of its pages."""
        entry = self.good.table[b, int(rng.integers(self.table.shape[1]))]
        return int(self.starts[b]) + 16 * int(entry["offset"]), int(entry["size"])


def damage_bits(d: Damaged, rng: Rng, b: int) -> None:
    start, size = int(d.starts[b]), int(d.sizes[b])
    for _ in range(int(rng.choice((1, 1, 2, 4)))):
        d.payloads[start + int(rng.integers(size))] ^= np.uint8(1 << rng.integers(8))


def damage_bytes(d: Damaged, rng: Rng, b: int) -> None:
    start, size = int(d.starts[b]), int(d.sizes[b])
    at = int(rng.integers(size))
    last = min(size, at + int(rng.choice((1, 2, 4, 16, 300))))
    d.payloads[start + at : start + last] = rng.choice((0, 255, 15, 63, 127, int(rng.integers(256))))


def damage_noise(d: Damaged, rng: Rng, b: int) -> None:
    start, size = int(d.starts[b]), int(d.sizes[b])
    at = int(rng.integers(size))
    d.payloads[start + at : start + size] = rng.integers(0, 256, size - at)


def damage_classes(d: Damaged, rng: Rng, b: int) -> None:
    """At the first bytes of a segment, where its classes are: other ones, or two change places."""
    start, size = d.segment(rng, b)
    reach = min(size, 16)
    i, j = start + int(rng.integers(reach)), start + int(rng.integers(reach))
    if rng.integers(2):
        d.payloads[[i, j]] = d.payloads[[j, i]]
    elif rng.integers(2):  # one class up, one down: the size still fits
        d.payloads[i] = (int(d.payloads[i]) + 1) % 256
        d.payloads[j] = (int(d.payloads[j]) - 1) % 256
    else:
        d.payloads[i] = rng.choice((0, 255, 63, 64, 127, 0x80, 0xF0, 0x0F, int(rng.integers(256))))


def damage_splice(d: Damaged, rng: Rng, b: int) -> None:
    """The payload of another block, with or without its table."""
    other = int(rng.integers(len(d.starts)))
    size = int(d.good.payload_bytes[other])
    from_, to = int(d.starts[other]), int(d.starts[b])
    if rng.integers(2):
        d.payloads[to : to + size] = d.good_payloads[from_ : from_ + size]
        d.sizes[b] = size
    else:
        half = int(rng.integers(min(size, int(d.sizes[b])))) // 16 * 16
        d.payloads[to : to + half] = d.good_payloads[from_ : from_ + half]
    if rng.integers(2):
        d.table[b] = d.good.table[other]


def damage_length(d: Damaged, rng: Rng, b: int) -> None:
    """Cut, or with a tail; the room of each payload holds the longest."""
    size, most = int(d.sizes[b]), int(d.starts[1] - d.starts[0])
    d.sizes[b] = rng.choice(
        (0, size - 16, size + 16, most, int(rng.integers(most)), int(rng.integers(most)) // 16 * 16)
    )
    d.sizes[b] = min(int(d.sizes[b]), most)


def damage_entry(d: Damaged, rng: Rng, b: int) -> None:
    """A field of an entry of the segment table."""
    entry = d.table[b, int(rng.integers(d.table.shape[1]))]
    size = int(entry["size"])
    values: dict[str, list[Any]] = {
        "offset": [0, int(entry["offset"]) + 1, 2**32 - 1, 2**28, int(rng.integers(2**32))],
        "size": [0, 1, size ^ 1, size + 16, size + 2, max(size, 2) - 2, 2**31, 2**32 - 1, int(rng.integers(2**32))],
        "bound": [0, np.nan, np.inf, -1, 1e-45, 2.0**-96, 2.0**-97, 2.0**120, 2.0**121, 3.0],
        "coding": [*range(8), 0x12, 0x16, 0x22, 0x26, 0x36, 0x46, 127, 128, 255, int(rng.integers(256))],
        "param": [0, 1, 31, 32, 127, 128, 255, int(rng.integers(256))],
    }
    field = ("offset", "size", "bound", "coding", "coding", "param")[int(rng.integers(6))]
    value = values[field][int(rng.integers(len(values[field])))]
    entry[field] = value % 2**32 if field in ("offset", "size") else value


DAMAGE: dict[str, Callable[[Damaged, Rng, int], None]] = {
    "bits": damage_bits,
    "bytes": damage_bytes,
    "noise": damage_noise,
    "classes": damage_classes,
    "splice": damage_splice,
    "length": damage_length,
    "entry": damage_entry,
}
KINDS = ("none", *DAMAGE, "classes", "entry")  # some more often


def damage(encoded: Encoded, rng: Rng, plain: bool) -> tuple[Damaged, list[str]]:
    """A damaged copy of a batch, and what was done to each block."""
    payloads = encoded.payloads.cpu().numpy().copy()
    d = Damaged(payloads, encoded.starts, encoded.payload_bytes.copy(), encoded.table.copy(), encoded, payloads.copy())
    kinds = [KINDS[int(k)] for k in rng.integers(len(KINDS), size=len(encoded.starts))]
    for b, kind in enumerate(kinds):
        if kind != "none":
            for _ in range(int(rng.choice((1, 1, 2)))):
                if d.sizes[b] > 0:
                    DAMAGE[kind](d, rng, b)
    if plain:  # an engine gives these kernels no other codings
        d.table["coding"] = np.where(d.table["coding"] < PLAIN_CODINGS, d.table["coding"], d.table["coding"] & 3)
    return d, kinds


# ---- one launch ------------------------------------------------------------------------------------------------------


class Fault(AssertionError):
    """The CUDA decoder broke a promise on hostile bytes."""


def require(holds: object, what: str) -> None:
    if not holds:
        raise Fault(what)


def guarded(batch: Batch, seed: int) -> tuple[Batch, list[Any]]:
    """The same pages in other memory with guard zones around it; and all of that memory."""
    torch = batch.torch
    generator = torch.Generator(device="cuda").manual_seed(seed)
    wholes = [
        torch.randint(0, 256, (m.numel() + 2 * GUARD,), generator=generator, device="cuda", dtype=torch.uint8)
        for m in batch.memories
    ]
    pages = [whole[GUARD : whole.numel() - GUARD] for whole in wholes]
    return Batch(torch, batch.driver, batch.specs, pages, batch.block_ids), wholes


def check_launch(batch: Batch, good: Encoded, rng: Rng, counts: Counter[str], *, extended: bool) -> int:
    """Damage a batch and decode it on both devices; returns the number of cases.

    Raises:
        Fault: a promise was broken.
    """
    torch = batch.torch
    d, kinds = damage(good, rng, plain=not extended)
    bad = Encoded(torch.from_numpy(d.payloads).cuda(), d.starts, d.sizes, d.table)
    with_sums = bool(rng.integers(2))
    repaired = bool(rng.integers(2))
    sums = bridge.checksums(bad if repaired else good) if with_sums else None
    verdicts = bridge.verdicts_cpu(batch, bad) != 0
    tables = np.array([table is not None for table in batch.tables])
    verdicts |= ((d.table["coding"] & STEPS == BY_CHANNEL) & ~tables).any(axis=1)  # the CPU says so when it decodes
    if with_sums and not repaired:
        verdicts |= bridge.checksums(bad) != sums
    out, wholes = guarded(batch, int(rng.integers(1 << 30)))
    before = [w.cpu().numpy() for w in wholes]
    expected = out.host_memories()
    bridge.decode_cpu(out, bad, np.flatnonzero(~verdicts).tolist(), expected)
    given = d.payloads.copy()
    for attempt in range(2):
        job = GpuDecode(out, bad, crc32c=sums, extended=ALL if extended else 0)
        job.launch()
        refused = job.statuses() != 0
        wrong = np.flatnonzero(refused != verdicts)
        if len(wrong):
            b = int(wrong[0])
            raise Fault(f"block {b} ({kinds[b]}): refused on the GPU {refused[b]}, on the CPU {verdicts[b]}")
        for number, (whole, first, wanted) in enumerate(zip(wholes, before, expected, strict=True)):
            now = whole.cpu().numpy()
            same = np.array_equal(now[:GUARD], first[:GUARD]) and np.array_equal(now[-GUARD:], first[-GUARD:])
            require(same, f"page {number}: a guard zone was written")
            at = np.flatnonzero(now[GUARD:-GUARD] != wanted)
            if len(at):
                stride = batch.specs[number].strides()[0]
                b = int(np.flatnonzero(batch.block_ids == at[0] // stride)[0])
                raise Fault(
                    f"block {b} ({kinds[b]}), page {number}, {batch.specs[number]}, {d.table[b, number]}: other bytes"
                )
        require(np.array_equal(bad.payloads.cpu().numpy(), given), "a payload was written")
        require(not bool(out.workspace.any()), "the workspace is not zero after the call")
        if attempt == 0:  # other bytes behind each payload, and in the pages
            given = d.payloads.copy()
            ends = (d.starts + d.sizes).astype(np.int64)
            for end, next_start in zip(ends, [*d.starts[1:].astype(np.int64), len(given)], strict=True):
                given[end:next_start] = rng.integers(0, 256, max(0, int(next_start) - int(end)))
            bad = Encoded(torch.from_numpy(given).cuda(), d.starts, d.sizes, d.table)
    for kind, no in zip(kinds, verdicts.tolist(), strict=True):
        counts[f"{kind}: {'refused' if no else 'accepted'}"] += 1
    return len(kinds)


def launches(torch: Any, driver: Any, seed: int, blocks: int) -> Iterator[tuple[Batch, Encoded, bool]]:
    """Batches without end; each with its records and whether its kernels know the Rice codings."""
    number = 0
    made: dict[int, tuple[Batch, Encoded]] = {}
    while True:
        for i, specs in enumerate(specs_of(seed)):
            if i not in made:
                batch = Batch.random(torch, driver, specs, blocks, seed=seed * 100 + i)
                made[i] = batch, bridge.encode_cpu(batch)
            plain = all(s.extended == 0 for s in specs) and bool(number % 2)
            yield (*made[i], not plain)
        number += 1


def run(
    torch: Any, driver: Any, cases: int, seed: int, most_seconds: float = float("inf"), blocks: int = BLOCKS
) -> dict[str, Any]:
    """Launch until there were so many cases, or so much time has gone.

    Raises:
        Fault: a promise was broken; the message names the launch.
    """
    counts: Counter[str] = Counter()
    done = launched = 0
    started = time.perf_counter()
    for batch, good, extended in launches(torch, driver, seed, blocks):
        try:
            done += check_launch(batch, good, np.random.default_rng([seed, launched]), counts, extended=extended)
        except Fault as fault:
            raise Fault(f"launch {launched} of seed {seed}: {fault}") from fault
        launched += 1
        if done >= cases or time.perf_counter() - started > most_seconds:
            break
    outcomes: dict[str, dict[str, int]] = {}
    for name, count in sorted(counts.items()):
        kind, _, outcome = name.partition(": ")
        outcomes.setdefault(kind, {})[outcome] = count
    gpu = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    return {
        "what": "hostile records against the CUDA decoder, held against the CPU decoder",
        "environment": host_environment() | gpu,
        "settings": {"cases": cases, "seed": seed, "blocks_of_a_launch": blocks, "launches_of_each": 2},
        "cases": done,
        "launches": 2 * launched,
        "seconds": round(time.perf_counter() - started, 1),
        "faults": 0,
        "accepted": sum(o.get("accepted", 0) for o in outcomes.values()),
        "refused": sum(o.get("refused", 0) for o in outcomes.values()),
        "outcomes": outcomes,
    }


def main() -> int:
    """Command line."""
    parser = seeded_parser("hostile records against the CUDA decoder", "cases", 100_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="cases of a launch")
    options = parser.parse_args()
    result = run(*bridge.load(), options.cases, options.seed, options.seconds, options.blocks)
    give_result(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
