# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Make the golden records. Run by hand, once for a new case; it never changes a file that exists.

    python tests/golden/make_golden.py

The records come from the reference codec (tests/reference_codec.py), not from kvzip. ``cases`` gives the input of every
record again, on every platform and NumPy version: all of it comes from a small generator of integers. A golden file
that no longer agrees means that the format changed: that needs a new format version, not a new golden file.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parents[1]))

import reference_codec as ref

FOLDER = Path(__file__).parent / "v1"
MANIFEST = FOLDER / "manifest.json"
DTYPES = {"bf16": ref.BF16, "fp16": ref.FP16, "fp32": ref.FP32}
CODINGS = {"fixed": ref.FIXED, "plain": ref.PLAIN, "outlier": ref.OUTLIER}
MODES = {ref.FIXED: ref.MODE_FIXED, ref.PLAIN: ref.MODE_PLAIN, ref.OUTLIER: ref.MODE_OUTLIER, ref.RICE: ref.MODE_RICE}


class Lcg:
    """x' = (a x + c) mod 2^64 (Knuth's MMIX constants); the upper 32 bits are what is used."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def words(self, count: int) -> npt.NDArray[np.int64]:
        """The next `count` 32-bit numbers."""
        out = []
        for _ in range(count):
            self.state = (6364136223846793005 * self.state + 1442695040888963407) % 2**64
            out.append(self.state >> 32)
        return np.array(out, np.int64)


@dataclass(frozen=True)
class Case:
    """One golden record: what goes in, and how it is encoded."""

    name: str
    pages: tuple[ref.Page, ...]
    mode: int = ref.MODE_FIXED
    bound_kind: int = ref.BOUND_RELATIVE
    bound: float = 1e-2
    codec: str = "cuszp"
    dims: str = ""
    measured: bool = False
    codings: tuple[int, ...] = ()  # that the segments must have, in order
    asked: tuple[ref.Asked, ...] | None = None  # a bound for each page; bound_kind is 5 then

    def encode(self) -> bytes:
        """The record, from the reference codec."""
        options: dict[str, Any] = {
            "mode": self.mode,
            "bound_kind": self.bound_kind,
            "bound": self.bound,
            "codec": self.codec,
            "dims": self.dims,
            "asked": self.asked,
        }
        record = ref.encode_record(self.pages, **options)
        return ref.encode_record(self.pages, **options, max_error=self.max_error(record)) if self.measured else record

    def max_error(self, record: bytes) -> float:
        """Largest error over the finite values."""
        largest = 0.0
        for page, decoded in zip(self.pages, ref.decode_record(record, self.asked or ()).pages, strict=True):
            finite = ref.is_finite(page.bits, page.geometry.dtype)
            before = ref.to_float32(page.bits[finite], page.geometry.dtype).astype(np.float64)
            after = ref.to_float32(decoded[finite], page.geometry.dtype).astype(np.float64)
            largest = max(largest, float(np.abs(before - after).max(initial=0.0)))
        return largest


def smooth(rng: Lcg, geometry: ref.Geometry, *, specials: bool = False) -> ref.Bits:
    """A bell-shaped page with a level for each channel; all sums of 1/4096 below 2^12, so exact in every step."""
    shape = (geometry.tokens, geometry.channels)
    count = shape[0] * shape[1]
    noise = rng.words(4 * count).reshape(4, *shape) >> 22  # 10 bits each
    level = (rng.words(shape[1]) >> 20) - 2048
    values = (noise.sum(axis=0) - 2046 + level).astype(np.float64) / 1024
    single = values.astype(np.float32)
    bits: ref.Bits
    if geometry.dtype == ref.FP16:
        bits = single.astype(np.float16).view(np.uint16)
    else:
        bits = single.view(np.uint32)
        if geometry.dtype == ref.BF16:
            bits = (bits >> 16).astype(np.uint16)
    if specials:
        constants = ref.TYPES[geometry.dtype]
        mantissa = constants.sign_and_mantissa - 1
        infinity = ((1 << constants.exponent) - 1) << mantissa
        sign = 1 << (constants.bits - 1)
        for i, pattern in enumerate((infinity, infinity | sign, infinity | 1, infinity | sign | 5, sign, 1)):
            bits.flat[(i * 53) % count] = pattern
    return bits


def anything(rng: Lcg, geometry: ref.Geometry) -> ref.Bits:
    """Every bit pattern is as likely as another: incompressible."""
    count = geometry.tokens * geometry.channels
    unsigned = ref.TYPES[geometry.dtype].unsigned
    bits: ref.Bits = rng.words(count).reshape(geometry.tokens, geometry.channels).astype(unsigned)
    return bits


def cases() -> Iterator[Case]:
    """Every golden record."""
    for dtype_name, dtype in DTYPES.items():
        for group_tokens in (16, 8, 4, 2, 1):
            rng = Lcg(1000 * dtype + group_tokens)
            whole = ref.Geometry(16, 1, 32, dtype, group_tokens)
            tails = ref.Geometry(19, 3, 7, dtype, group_tokens)
            for coding_name, coding in CODINGS.items():
                yield Case(
                    f"{dtype_name}_{coding_name}_g{group_tokens}",
                    (ref.Page(smooth(rng, whole), whole, 1), ref.Page(smooth(rng, tails, specials=True), tails, 2)),
                    mode=MODES[coding],
                    bound=2e-2,
                    codings=(coding, coding),
                )
            yield Case(
                f"{dtype_name}_lossless_g{group_tokens}",
                (ref.Page(smooth(rng, whole), whole, 1), ref.Page(smooth(rng, whole, specials=True), whole, 2)),
                bound_kind=ref.BOUND_LOSSLESS,
                bound=0.0,
                codings=(ref.LOSSLESS, ref.LOSSLESS),
            )
            yield Case(
                f"{dtype_name}_raw_g{group_tokens}",
                (ref.Page(anything(rng, tails), tails),),
                bound_kind=ref.BOUND_ABSOLUTE,
                bound=1e-30,
                codings=(ref.RAW,),
            )
            constant = np.full((19, 21), anything(rng, tails)[0, 0])
            yield Case(f"{dtype_name}_constant_g{group_tokens}", (ref.Page(constant, tails),), codings=(ref.CONSTANT,))
    yield from whole_records()
    yield from rice_and_bounds()


def rice_and_bounds() -> Iterator[Case]:
    """The Rice codings, and bounds that differ within a page, in every coding that has them."""
    for dtype_name, dtype in DTYPES.items():
        for group_tokens in (16, 8, 4, 2, 1):
            rng = Lcg(5000 + 1000 * dtype + group_tokens)
            whole = ref.Geometry(16, 1, 32, dtype, group_tokens)
            tails = ref.Geometry(19, 3, 35, dtype, group_tokens)
            pages = (ref.Page(smooth(rng, whole), whole, 1), ref.Page(smooth(rng, tails, specials=True), tails, 2))
            name = f"{dtype_name}_rice_g{group_tokens}"
            yield Case(name, pages, mode=ref.MODE_RICE, bound=2e-2, codings=(ref.RICE, ref.RICE))
            yield Case(
                f"{dtype_name}_lossless_rice_g{group_tokens}",
                (pages[0], ref.Page(smooth(rng, whole, specials=True), whole, 2)),
                mode=ref.MODE_RICE,
                bound_kind=ref.BOUND_LOSSLESS,
                bound=0.0,
                codings=(ref.LOSSLESS_RICE, ref.LOSSLESS_RICE),
            )
            for coding_name, coding in {**CODINGS, "rice": ref.RICE}.items():
                if coding in (ref.PLAIN, ref.OUTLIER) and group_tokens not in (16, 2):
                    continue
                tables = [((1 + rng.words(g.channels) % 15) / 64).astype(np.float32) for g in (whole, tails)]
                asked = (ref.Asked(ref.BOUND_CHANNEL_TABLE, 0.0, tables[0]), ref.Asked(ref.BOUND_TOKEN_RMS, 0.125))
                yield Case(
                    f"{dtype_name}_{coding_name}_within_g{group_tokens}",
                    pages,
                    mode=MODES[coding],
                    bound_kind=ref.BOUND_BY_PAGE,
                    bound=0.0,
                    codings=(coding | ref.BY_CHANNEL, coding | ref.BY_TOKEN),
                    asked=asked,
                )


def whole_records() -> Iterator[Case]:
    """Records that are about more than one coding."""
    rng = Lcg(77)
    opaque = ref.Geometry(1, 1, 301, ref.OPAQUE, 1)
    yield Case("opaque_raw", (ref.Page(anything(rng, opaque), opaque),), codings=(ref.RAW,))
    yield Case("opaque_constant", (ref.Page(np.full((1, 301), 9, np.uint8), opaque),), codings=(ref.CONSTANT,))

    memory_order = ref.Geometry(1, 1, 333, ref.BF16, 1)
    yield Case("memory_order", (ref.Page(smooth(rng, memory_order), memory_order),), codings=(ref.FIXED,))

    page = ref.Geometry(16, 2, 8, ref.BF16, 16)
    kv = tuple(ref.Page(smooth(rng, page), page, 1 + i % 2) for i in range(4))
    yield Case("dims_2nhd_measured", kv, dims="2NHD", measured=True, codings=(ref.FIXED,) * 4)
    yield Case("codec_raw", kv, mode=ref.MODE_NONE, codec="raw", codings=(ref.RAW,) * 4)
    yield Case("absolute", kv, bound_kind=ref.BOUND_ABSOLUTE, bound=0.1, codings=(ref.FIXED,) * 4)
    yield Case("lossless_smaller", kv, bound=1e-5, codings=(ref.LOSSLESS,) * 4)
    yield Case("bound_too_fine", kv, bound_kind=ref.BOUND_ABSOLUTE, bound=2.0**-97, codings=(ref.LOSSLESS,) * 4)
    yield Case(
        "bound_ends",
        tuple(ref.Page(b, page) for b in (smooth(rng, page), smooth(rng, page))),
        bound_kind=ref.BOUND_ABSOLUTE,
        bound=1e300,
        codings=(ref.FIXED, ref.FIXED),
    )

    mixed: list[ref.Page] = []
    for i, dtype in enumerate((ref.BF16, ref.BF16, ref.FP16, ref.FP32, ref.FP32, ref.OPAQUE, ref.BF16)):
        geometry = opaque if dtype == ref.OPAQUE else ref.Geometry(16, 1, 9, dtype, 16)
        bits = anything(rng, geometry) if dtype == ref.OPAQUE else smooth(rng, geometry)
        mixed.append(ref.Page(bits, geometry, i % 3))
    yield Case("mixed_dtypes", tuple(mixed), mode=ref.MODE_OUTLIER, bound=3e-2)


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def describe(case: Case, record: bytes) -> dict[str, Any]:
    """What the manifest says of a golden record."""
    decoded = ref.decode_record(record, case.asked or ())
    if case.codings:
        assert tuple(e.coding for e in decoded.entries) == case.codings, (case.name, decoded.entries)
    return {
        "record_bytes": len(record),
        "record_sha256": sha256(record),
        "input_sha256": sha256(b"".join(p.bits.tobytes() for p in case.pages)),
        "output_sha256": sha256(b"".join(p.tobytes() for p in decoded.pages)),
    }


def main() -> int:
    """Write what is missing; refuse to change what exists."""
    FOLDER.mkdir(exist_ok=True)
    manifest: dict[str, Any] = json.loads(MANIFEST.read_text()) if MANIFEST.exists() else {}
    written = 0
    for case in cases():
        record = case.encode()
        entry = describe(case, record)
        path = FOLDER / f"{case.name}.kvz"
        if manifest.get(case.name, entry) != entry or (path.exists() and path.read_bytes() != record):
            print(f"{path.name} exists and would change: nothing was written for it; a new format needs a new version")
            return 1
        if not path.exists():
            path.write_bytes(record)
            written += 1
        manifest[case.name] = entry
    MANIFEST.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    print(f"{written} records written, {len(manifest) - written} were there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
