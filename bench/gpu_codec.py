# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Check the CUDA codec against the CPU codec, then time it alone, without the link.

Run ``python bench/gpu_codec.py --out FOLDER [--kvdata FOLDER]`` on a machine with a GPU (a minute or two); it writes
``kernels.json``. The pages are real: heads of a KV cache (uint16 bit patterns of bfloat16, shape [layers, 2 (K, V),
tokens, kv_heads, head_dim]), gathered into pages of the sizes that models have, a layer's K and V each, repeated until
the batch is full. Times are medians between CUDA events over whole calls, a decode with its validation. GB/s count raw
bytes; ``ceiling_fraction`` compares raw plus encoded bytes with what a copy in device memory reads plus writes in the
same run; ``+crc`` has the payloads checksummed, or checked.

``--once`` encodes and decodes one batch a few times and stops: for a profiler.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

try:
    import crc32c  # noqa: F401
except ImportError:  # kvzip needs it for records, of which there are none here

    def _no_records(*_: object) -> int:
        raise RuntimeError("install crc32c")

    sys.modules["crc32c"] = types.ModuleType("crc32c")
    sys.modules["crc32c"].crc32c = _no_records  # type: ignore[attr-defined]

import cuda_bridge as bridge  # noqa: E402
from cuda_bridge import (  # noqa: E402
    BF16,
    BOUND_ABSOLUTE,
    BOUND_CHANNEL_TABLE,
    BOUND_RELATIVE,
    BOUND_TOKEN_RMS,
    FIXED,
    FP16,
    FP32,
    LOSSLESS,
    OPAQUE,
    OUTLIER,
    PLAIN,
    RAW,
    RICE,
    Batch,
    GpuDecode,
    GpuEncode,
    Spec,
)

SAMPLE = ROOT / "kvzip" / "data" / "smollm2_sample.npy"
TOKEN = {"bound": 0.17, "bound_kind": BOUND_TOKEN_RMS}
CHANNEL = {"bound": 1.0, "bound_kind": BOUND_CHANNEL_TABLE, "exact_channels": 0}  # from 1/16 to 1
HEAD = 64  # channels of a unit that pages are made of

#: name: heads, head_dim; 16 tokens each
PAGES = {
    "4KiB": (2, 64),
    "6KiB": (3, 64),
    "16KiB": (4, 128),
    "32KiB": (8, 128),
    "64KiB": (16, 128),
    "128KiB": (32, 128),
}


def load_cache(folder: Path | None) -> npt.NDArray[np.uint16]:
    files = sorted(folder.glob("*prose*.npy")) if folder else []
    return np.asarray(np.load(files[0] if files else SAMPLE))


def real_batch(
    torch: Any,
    driver: Any,
    cache: npt.NDArray[np.uint16],
    page: str,
    raw_bytes: int,
    *,
    pages: int = 0,
    **how: Any,
) -> Batch:
    """Blocks with K and V of every layer; a page's heads are heads of that layer, K or V, at neighbouring windows.

    With `pages`, one block with so many pages instead.
    """
    heads, head_dim = PAGES[page]
    units = heads * head_dim // HEAD
    layers, _, tokens, kv_heads, dim = cache.shape
    windows = tokens // 16
    cut = cache[:, :, : windows * 16].reshape(layers, 2, windows, 16, kv_heads, dim)
    cut = cut.transpose(0, 1, 2, 4, 3, 5).reshape(layers * 2, windows * kv_heads, 16, dim)
    if pages:
        cut, raw_bytes = cut[:pages], 0
    spec = Spec(BF16, 16, heads, head_dim, **how)
    blocks = max(1, raw_bytes // (spec.raw_bytes * len(cut)))
    distinct = max(1, windows * kv_heads // units)
    chosen = np.arange(distinct * units).reshape(distinct, units) % (windows * kv_heads)
    memories = []
    order = np.arange(blocks) % distinct
    for segment in cut:
        pages = segment[chosen].transpose(0, 2, 1, 3).reshape(distinct, -1)  # [distinct, token, unit, channel]
        small = torch.from_numpy(np.ascontiguousarray(pages).view(np.uint8)).cuda()
        memories.append(small[torch.from_numpy(order).cuda()].reshape(-1))
    ids = np.random.default_rng(0).permutation(blocks)
    return Batch(torch, driver, [spec] * len(cut), memories, ids)


def timed(torch: Any, run: Callable[[], None], repeats: int) -> npt.NDArray[np.float64]:
    """Seconds of each run between events, after warming up."""
    for _ in range(3):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in events:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return np.array([start.elapsed_time(stop) / 1e3 for start, stop in events])


def copy_ceiling(torch: Any) -> float:
    """Bytes read plus written a second by a large copy in device memory."""
    source = torch.randint(0, 256, (1 << 30,), dtype=torch.uint8, device="cuda")
    to = torch.empty_like(source)
    return 2.0 * source.numel() / float(np.median(timed(torch, lambda: to.copy_(source), 15)))


def check(torch: Any, driver: Any, cache: npt.NDArray[np.uint16]) -> int:
    """Bit identity on random and on real pages; returns how many pages."""
    pages = 0
    for seed, (dtype, coding) in enumerate(
        (d, c) for d in (BF16, FP16) for c in (FIXED, PLAIN, OUTLIER, LOSSLESS, RAW)
    ):
        specs = [
            Spec(
                dtype, tokens, heads, head_dim, coding=coding, bound=bound, bound_kind=kind, heads_first=first, pad=pad
            )
            for tokens, heads, head_dim, bound, kind, first, pad in [
                (16, 8, 128, 1e-2, BOUND_RELATIVE, False, 0),
                (16, 3, 64, 1e-3, BOUND_RELATIVE, True, 8),
                (16, 2, 24, 1e-4, BOUND_RELATIVE, False, 8),
                (32, 5, 24, 1e-2, BOUND_ABSOLUTE, True, 0),
                (48, 1, 72, 1e-3, BOUND_RELATIVE, False, 0),
            ]
        ]
        specs += [replace(specs[0], **TOKEN), replace(specs[1], **CHANNEL)]
        batch = Batch.random(torch, driver, specs, 48, seed)
        bridge.check_both_ways(batch, packed=bool(seed % 2), header=96 * (seed % 3), strips_per_warp=seed % 4)
        pages += batch.pages
    for seed, (dtype, group) in enumerate((d, g) for d in (BF16, FP16, FP32, OPAQUE) for g in (16, 8, 4, 2, 1)):
        specs = [
            Spec(
                dtype, *shape, group_tokens=group, coding=coding, bound=bound, heads_first=bool(seed % 2), pad=seed % 3
            )
            for coding in (FIXED, PLAIN, OUTLIER, LOSSLESS)
            for shape, bound in [((16, 2, 20), 1e-2), ((17, 3, 40), 1e-3), ((5, 3, 7), 1e-4), ((1, 1, 1025), 1e-3)]
        ]
        batch = Batch.random(torch, driver, specs, 12, 100 + seed)
        bridge.check_both_ways(batch, packed=True)
        pages += batch.pages
    for page, coding, bound in [
        ("6KiB", FIXED, 1e-2),
        ("64KiB", FIXED, 1e-3),
        ("32KiB", OUTLIER, 1e-2),
        ("4KiB", FIXED, 1e-5),
    ]:
        batch = real_batch(torch, driver, cache, page, 32 << 20, coding=coding, bound=bound)
        bridge.check_both_ways(batch, packed=True, header=4096)
        pages += batch.pages
    return pages


Row = dict[str, Any]


class Bench:
    """Times encode and decode of batches and keeps the rows."""

    def __init__(self, torch: Any, driver: Any, cache: npt.NDArray[np.uint16], ceiling: float, repeats: int) -> None:
        self.torch, self.driver, self.cache, self.ceiling, self.repeats = torch, driver, cache, ceiling, repeats
        self.rows: list[Row] = []

    def run(
        self,
        name: str,
        page: str,
        raw_bytes: int,
        *,
        strips: int = 0,
        max_ctas: int = 0,
        packed: bool = True,
        checksums: bool = False,
        **how: Any,
    ) -> None:
        """Time one kind of batch, with `checksums` including those of the payloads, and their check."""
        batch = real_batch(self.torch, self.driver, self.cache, page, raw_bytes, **how)
        encode = GpuEncode(
            batch, packed=packed, header=4096, strips_per_warp=strips, max_ctas=max_ctas, checksums=checksums
        )
        encode.launch()
        encoded = encode.result()
        assert encode.status.tolist() == [0, 1]
        out = batch.like()
        crcs = encode.crc32c.cpu().numpy().view(np.uint32) if checksums else None
        decode = GpuDecode(out, encoded, strips_per_warp=strips, max_ctas=max_ctas, crc32c=crcs)
        decode.launch()
        assert not decode.statuses().any()
        sizes = int(encoded.payload_bytes.sum())
        for op, launch in (("encode", encode.launch), ("decode", decode.launch)):
            seconds = timed(self.torch, launch, self.repeats)
            self.keep(name, op + "+crc" * checksums, page, batch, sizes, seconds, strips, max_ctas, packed)

    def keep(
        self,
        name: str,
        op: str,
        page: str,
        batch: Batch,
        sizes: int,
        seconds: Any,
        strips: int,
        max_ctas: int,
        packed: bool,
    ) -> None:
        """Keep and print a row."""
        median = float(np.median(seconds))
        row = {
            "codec": name,
            "op": op,
            "page": page,
            "pages": batch.pages,
            "raw_bytes": batch.raw_bytes,
            "ratio": batch.raw_bytes / sizes,
            "us": median * 1e6,
            "us_p10": float(np.quantile(seconds, 0.1)) * 1e6,
            "us_p90": float(np.quantile(seconds, 0.9)) * 1e6,
            "gb_per_s": batch.raw_bytes / median / 1e9,
            "ceiling_fraction": (batch.raw_bytes + sizes) / median / self.ceiling,
            "strips_per_warp": strips,
            "max_ctas": max_ctas,
            "packed": packed,
        }
        self.rows.append(row)
        print(
            "{codec:16} {op:10} {page:>6} {pages:7} pages strips {strips_per_warp} ctas {max_ctas:4} packed {packed:1} "
            "{us:9.1f} us {gb_per_s:7.1f} GB/s ratio {ratio:.3f} ceiling {ceiling_fraction:.3f}".format(**row),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for kernels.json")
    parser.add_argument("--kvdata", type=Path, help="folder with KV caches; default: the package's sample")
    parser.add_argument("--commit", default="", help="what the results say of the source")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--tune", action="store_true", help="also by strips per warp")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--once", choices=list(PAGES), help="one batch of this page size, for a profiler")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch, driver = bridge.load()
    cache = load_cache(options.kvdata)
    mib = 1 << 20

    if options.once:
        bench = Bench(torch, driver, cache, 1.0, 1)
        bench.run("kvzip-1e-2", options.once, 512 * mib, bound=1e-2)
        bench.run("kvzip-1e-3", options.once, 512 * mib, bound=1e-3)
        return

    info = driver.device_info(0)
    environment = {
        "gpu": info.name,
        "multiprocessors": info.multiprocessors,
        "cuda": driver.versions(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": options.commit,
        "time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    if not options.no_check:
        start = time.perf_counter()
        pages = check(torch, driver, cache)
        print(f"{pages} pages equal on CPU and GPU, {time.perf_counter() - start:.1f} s", flush=True)
        environment["checked_pages"] = pages
    ceiling = copy_ceiling(torch)
    environment["copy_bytes_per_second"] = ceiling
    print(f"{info.name}: a copy reads + writes {ceiling / 1e9:.0f} GB/s", flush=True)
    bench = Bench(torch, driver, cache, ceiling, options.repeats)

    for page in PAGES:
        for name, how in [
            ("kvzip-1e-2", {"bound": 1e-2}),
            ("kvzip-1e-3", {"bound": 1e-3}),
            ("kvzip-lossless", {"coding": LOSSLESS}),
            ("kvzip-token-0.17", TOKEN),
            ("kvzip-channel-1", CHANNEL),
        ]:
            bench.run(name, page, 1024 * mib, **how)
    if options.tune:
        for page in ("6KiB", "64KiB"):
            for strips in (2, 3, 8):
                bench.run("kvzip-1e-3", page, 1024 * mib, strips=strips, bound=1e-3)
    if not options.quick:
        for name, how in [
            ("kvzip-1e-5", {"bound": 1e-5}),
            ("kvzip-plain-1e-2", {"coding": PLAIN, "bound": 1e-2}),
            ("kvzip-outlier-1e-2", {"coding": OUTLIER, "bound": 1e-2}),
            ("kvzip-plain-token-0.17", {"coding": PLAIN, **TOKEN}),
            # The default bounds: K's are `kvzip-1e-3` above and `kvzip-rice-1e-3`, V's these by token.
            ("kvzip-token-0.1", {**TOKEN, "bound": 0.1}),
            ("kvzip-rice-1e-3", {"coding": RICE, "bound": 1e-3}),
            ("kvzip-rice-token-0.1", {"coding": RICE, **TOKEN, "bound": 0.1}),
        ]:
            bench.run(name, "64KiB", 1024 * mib, **how)
        bench.run("kvzip-1e-3", "64KiB", 1024 * mib, packed=False, bound=1e-3)
        for size in (4, 16, 64, 256):
            bench.run("kvzip-1e-3", "64KiB", size * mib, bound=1e-3)
        for ctas in (8, 16, 32, 64, 132):
            bench.run("kvzip-1e-2", "64KiB", 256 * mib, max_ctas=ctas, bound=1e-2)
        for page in ("6KiB", "32KiB", "64KiB"):
            bench.run("kvzip-1e-2", page, 1024 * mib, checksums=True, bound=1e-2)
            bench.run("kvzip-1e-3", page, 1024 * mib, checksums=True, bound=1e-3)
            bench.run("kvzip-lossless", page, 1024 * mib, checksums=True, coding=LOSSLESS)
            bench.run("kvzip-token-0.17", page, 1024 * mib, checksums=True, **TOKEN)
        for checksums in (False, True):
            for pages in (1, 8, 60):
                bench.run("kvzip-1e-2", "64KiB", 0, pages=pages, checksums=checksums, bound=1e-2)
    (options.out / "kernels.json").write_text(
        json.dumps({"environment": environment, "rows": bench.rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
