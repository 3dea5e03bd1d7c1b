# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Whether this build does on this machine what a release does: ``kvzip verify`` without a model.

Real and hostile pages go through an engine with every instruction set of the processor, with one thread and with all,
and on the GPU where there is one. All have to write the same records, those whose digests ship with kvzip
(data/golden.json, the golden set), and to read them back to the same values, each within its bound.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from kvzip import _native
from kvzip.backends.registry import get_codec
from kvzip.calibration import parse_bounds
from kvzip.coding import compare_blocks, max_record_bytes
from kvzip.demo import choose_device, paged, read_input
from kvzip.engine import SwapEngine
from kvzip.interop.torch import copy_to, host_bits
from kvzip.memory import memory_for
from kvzip.pool import HostPool
from kvzip.types import BlockLayout, BlockView, DType

Bits = npt.NDArray[Any]

_BOUNDS = (
    ("fixed", "1e-3"),
    ("fixed", "abs:0.05"),
    ("plain", "1e-2"),
    ("outlier", "1e-2"),
    ("rice", "1e-2"),
    ("rice", "lossless"),
    ("fixed", "lossless"),
    ("fixed", "rms:0.17"),
    ("rice", "k=1e-2,v=rms:0.17"),
)


@dataclass(frozen=True)
class Case:
    """Pages, and how they are coded.

    Attributes:
        pages: ``sample`` (a real KV cache) or ``hostile`` (any bits, infinities and NaN among them).
        dtype: their type.
        block_tokens: tokens of one block.
        mode: encoding mode.
        bound: as `kvzip.calibration.parse_bounds` takes it.
    """

    pages: str
    dtype: DType
    block_tokens: int
    mode: str
    bound: str

    @property
    def name(self) -> str:
        """What the golden set calls it."""
        return f"{self.pages} {self.dtype.name.lower()} {self.block_tokens} tokens, {self.mode}, {self.bound}"


@dataclass(frozen=True)
class Digests:
    """SHA-256 of the records of a case, one after the other, and of the values that they decode to."""

    records: str
    values: str


@dataclass(frozen=True)
class Checked:
    """What was found of a case.

    Attributes:
        name: of the case.
        violations: values outside the bound, and non-finite values whose bits changed.
        max_error_over_bound: largest ratio of a value's error to its bound.
        golden: whether the records and the values are those of the golden set.
        differ: ways whose records or values are not those of the first way.
    """

    name: str
    violations: int
    max_error_over_bound: float
    golden: bool
    differ: list[str]


@dataclass(frozen=True)
class _Way:
    name: str
    isa: str
    device: str = "cpu"
    threads: int = 1


def cases() -> Iterator[Case]:
    """Every case of the golden set."""
    for dtype in (DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32):
        for mode, bound in _BOUNDS:
            yield Case("sample", dtype, 16, mode, bound)
            yield Case("hostile", dtype, 16, mode, bound)
        for mode in ("fixed", "plain", "rice"):
            yield Case("sample", dtype, 5, mode, "1e-2")  # groups of other shapes


def golden() -> dict[str, Digests]:
    """The golden set, by the names of the cases."""
    text = (resources.files("kvzip") / "data" / "golden.json").read_text(encoding="utf-8")
    return {name: Digests(**digests) for name, digests in json.loads(text).items()}


def run(
    device: str = "auto", progress: Callable[[str, int, int], None] = lambda stage, done, total: None
) -> dict[str, Any]:
    """Check every case in every way that this machine has.

    Args:
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``, which takes the GPU besides when there is one that can be used.
        progress: called with the stage, the cases done and the cases in all.

    Returns:
        ``{"native", "ways", "cases", "violations", "failures"}``; docs/reference/cli.md has the keys.

    Raises:
        BackendUnavailableError: the native library, or the device that was asked for, cannot be used.
    """
    chosen = choose_device(device)
    isa = _native.cpu_isa()
    ways = [_Way(f"cpu, {name}", name) for name in _native.cpu_isas()]
    ways.append(_Way("cpu, all threads", isa, threads=0))
    if chosen == "cuda":
        ways.append(_Way("cuda", isa, device="cuda"))
    expected, every = golden(), list(cases())
    checked: list[Checked] = []
    try:
        for case in every:
            checked.append(_check(case, ways, expected.get(case.name)))
            progress("verify", len(checked), len(every))
    finally:
        _native.set_cpu_isa(isa)
    failures = [
        *(f"{c.name}: {c.violations} values outside the bound" for c in checked if c.violations),
        *(f"{c.name}: not the bytes of the golden set" for c in checked if not c.golden),
        *(f"{c.name}: {way} writes or reads other bytes than {ways[0].name}" for c in checked for way in c.differ),
    ]
    return {
        "native": _native.describe()["build"],
        "ways": [way.name for way in ways],
        "cases": [asdict(c) for c in checked],
        "violations": sum(c.violations for c in checked),
        "failures": failures,
    }


def store_and_load(case: Case, device: str = "cpu", threads: int = 1) -> tuple[Digests, BlockView, BlockView]:
    """Send the pages of a case through an engine; returns the digests, and the blocks before and after, on the host."""
    before = _pages(case)
    layout = BlockLayout.from_tensors(before, "2NHD", dtype=case.dtype)
    source = BlockView([copy_to(layer, device) for layer in before], layout)
    loaded = [copy_to(np.full_like(layer, 0x5A), device) for layer in before]
    keys = [b"%d" % number for number in range(len(source))]
    capacity = (len(keys) + 1) * (max_record_bytes(get_codec("cuszp"), layout) + 4096)
    with (
        HostPool(capacity, resource=memory_for(device)) as pool,
        SwapEngine(pool, bound=parse_bounds(case.bound), mode=case.mode, threads=threads) as engine,
    ):
        engine.store(keys, source).wait()
        engine.load(keys, BlockView(loaded, layout)).wait()
        records = hashlib.sha256(b"".join(engine.read_record(key) for key in keys)).hexdigest()
    after = [host_bits(tensor, case.dtype) for tensor in loaded]
    values = hashlib.sha256(b"".join(layer.tobytes() for layer in after)).hexdigest()
    return Digests(records, values), BlockView(before, layout), BlockView(after, layout)


def _check(case: Case, ways: list[_Way], expected: Digests | None) -> Checked:
    _native.set_cpu_isa(ways[0].isa)
    found, source, target = store_and_load(case, ways[0].device, ways[0].threads)
    compared = compare_blocks(source, target, parse_bounds(case.bound))
    differ = []
    for way in ways[1:]:  # what has the same digests is within the same bound
        _native.set_cpu_isa(way.isa)
        if store_and_load(case, way.device, way.threads)[0] != found:
            differ.append(way.name)
    return Checked(case.name, compared.violations, compared.over_bound, found == expected, differ)


def _pages(case: Case) -> list[Bits]:
    """One tensor a layer; the same bits on every platform and NumPy version."""
    cache = read_input(None)[0][:2]
    if case.dtype is not DType.BFLOAT16:
        cache = cache.astype(np.uint32) << 16
        if case.dtype is DType.FLOAT16:
            cache = cache.view(np.float32).astype(np.float16).view(np.uint16)
    if case.pages == "hostile":
        cache = cache[:1, :, :32]
        spoilt = np.arange(0, cache.size, 23, dtype=np.uint64)
        mixed = (spoilt + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # splitmix64's constants; wraps around
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        cache.flat[spoilt] = (mixed >> np.uint64(64 - 8 * cache.itemsize)).astype(cache.dtype)
        infinity = {DType.BFLOAT16: 0x7F80, DType.FLOAT16: 0x7C00, DType.FLOAT32: 0x7F800000}[case.dtype]
        cache.flat[7::997] = infinity
        cache.flat[11::997] = infinity + 1  # NaN
    return paged(cache, case.block_tokens)
