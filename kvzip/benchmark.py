# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Speed of stores and loads on a KV cache, verified: ``kvzip bench``, and the parts that ``bench/`` shares with it.

The time of a transfer is a caller's: from the call of ``store`` or ``load`` until ``wait`` returns. Other blocks are
moved every time, so that no cache helps. GB/s is 1e9 bytes of raw data a second.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvzip import _native
from kvzip.backends.base import Codec, EncodeRequest
from kvzip.backends.portable import device_codec
from kvzip.backends.registry import get_codec
from kvzip.bounds import BoundPolicy, resolve
from kvzip.coding import compare_blocks, max_record_bytes, on_host
from kvzip.demo import choose_device, paged, read_input
from kvzip.engine import SwapEngine
from kvzip.errors import ConfigError
from kvzip.interop.torch import LinkCopy, copy_to, describe_gpu
from kvzip.memory import memory_for
from kvzip.pool import HostPool
from kvzip.record import header_nbytes
from kvzip.transfer import Transfer
from kvzip.types import BlockLayout, BlockView, BoundKind, ErrorBound

GIB = 1 << 30
PATIENCE_SECONDS = 60.0  # a transfer that takes longer hangs
SAMPLE_HEADS = 5  # times that the sample's heads are repeated: its pages of 6 KiB are smaller than those of most models
SAMPLE_BLOCKS = 256  # most blocks of a case that are compared, value by value

Ints = npt.NDArray[np.int64]
Row = dict[str, Any]


# ---- timing


@dataclass
class Timing:
    """Calls that were timed.

    Attributes:
        seconds: of each call.
        processor_seconds: time that all threads of the process computed in them.
        moved_bytes: what the calls returned, added up.
        used: slots that were called with, 0 to used - 1.
    """

    seconds: list[float] = field(default_factory=list)
    processor_seconds: float = 0.0
    moved_bytes: int = 0
    used: int = 0


def repeat(
    call: Callable[[int], int],
    slots: int,
    *,
    repetitions: int,
    warm: int = 1,
    limit_seconds: float = 0.7,
    prepare: Callable[[int], object] = lambda slot: None,
) -> Timing:
    """Time a call with slot 0, 1, ... in turn.

    Args:
        call: takes the slot and returns the bytes that it moved.
        slots: number of slots; they come again when there are more calls.
        repetitions: most calls that are timed.
        warm: calls before these.
        limit_seconds: no more calls after so long, once there are five.
        prepare: done before each call, not timed.
    """
    timing = Timing()
    began = time.perf_counter()
    for number in range(-warm, repetitions):
        slot = (number + warm) % slots
        prepare(slot)
        timing.used = max(timing.used, slot + 1)
        before = time.process_time()
        start = time.perf_counter()
        nbytes = call(slot)
        end = time.perf_counter()
        if number >= 0:
            timing.seconds.append(end - start)
            timing.processor_seconds += time.process_time() - before
            timing.moved_bytes += nbytes
            if end - began > limit_seconds and len(timing.seconds) >= 5:
                break
    return timing


def quantiles(seconds: Sequence[float]) -> Row:
    """Median, p10 and p90 in microseconds."""
    low, middle, high = (float(q) * 1e6 for q in np.percentile(seconds, (10, 50, 90)))
    return {"us": middle, "us_p10": low, "us_p90": high}


def transfer_row(way: str, direction: str, raw_bytes: int, timing: Timing, **more: Any) -> Row:
    """A row of results: ``direction`` is ``"out"`` or ``"in"``; `add_link` fills in the link later."""
    count = len(timing.seconds)
    row: Row = {"way": way, "direction": direction, "raw_bytes": raw_bytes, **more}
    row["ratio"] = raw_bytes * count / timing.moved_bytes
    row["gb_per_s"] = raw_bytes / float(np.median(timing.seconds)) / 1e9
    row |= {"link_gb_per_s": None} | quantiles(timing.seconds)
    row |= {"efficiency": None, "cpu_s_per_gib": timing.processor_seconds / (raw_bytes * count) * GIB}
    return row | {"repetitions": count}


def add_link(rows: Iterable[Row]) -> None:
    """Fill in what the plain copy of as many bytes (way ``raw-link``) reached."""
    rows = list(rows)
    link = {(r["direction"], r["raw_bytes"]): r["gb_per_s"] for r in rows if r["way"] == "raw-link"}
    for row in rows:
        row["link_gb_per_s"] = link.get((row["direction"], row["raw_bytes"]))
        if row["link_gb_per_s"]:
            row["efficiency"] = row["gb_per_s"] / (row["ratio"] * row["link_gb_per_s"])


def finish(transfer: Transfer) -> int:
    """Wait for a transfer; returns the bytes of its records."""
    return transfer.result(PATIENCE_SECONDS).record_bytes


class EngineWay:
    """Stores and loads of chosen blocks by an engine.

    Args:
        name: what the results call it.
        engine: the engine; `close` closes it.
        views: the blocks to store, and those to load into, of the same numbers.
        stream: CUDA stream of the transfers; None takes the current one.
    """

    def __init__(
        self, name: str, engine: SwapEngine, views: Callable[[], tuple[BlockView, BlockView]], stream: object = None
    ) -> None:
        self.name, self.engine = name, engine
        self._views, self._stream = views, stream
        self._fresh = itertools.count()
        self._keys: dict[int, list[bytes]] = {}

    def fresh_keys(self, count: int) -> list[bytes]:
        """Keys that nobody had before."""
        number = next(self._fresh)
        return [b"%s-%d-%d" % (self.name.encode(), number, i) for i in range(count)]

    def renew(self, blocks: Ints, slot: int) -> None:
        """Forget what a slot holds; the next store there has other keys."""
        self.engine.discard(self._keys.pop(slot, []))
        self._keys[slot] = self.fresh_keys(len(blocks))

    def forget(self) -> None:
        """Discard everything."""
        for keys in self._keys.values():
            self.engine.discard(keys)
        self._keys.clear()

    def start_store(self, keys: list[bytes], blocks: Ints) -> Transfer:
        """Queue a store of blocks."""
        return self.engine.store(keys, self._views()[0][blocks], stream=self._stream)

    def start_load(self, keys: list[bytes], blocks: Ints) -> Transfer:
        """Queue a load into blocks."""
        return self.engine.load(keys, self._views()[1][blocks], stream=self._stream)

    def store(self, blocks: Ints, slot: int) -> int:
        """Store under the keys of a slot (see `renew`), to the end; returns the bytes of the records."""
        return finish(self.start_store(self._keys[slot], blocks))

    def load(self, blocks: Ints, slot: int) -> int:
        """Load what a slot holds, to the end; returns the bytes of the records."""
        return finish(self.start_load(self._keys[slot], blocks))

    def close(self) -> None:
        """Discard everything and close the engine."""
        self.forget()
        self.engine.close()


# ---- results


class Results:
    """The files of a run, written whenever rows come.

    Args:
        folder: where they go.
        gpu: the GPU in their names.
        environment: stands in each.
    """

    def __init__(self, folder: Path, gpu: str, environment: Row) -> None:
        self.folder, self.gpu, self.environment = folder, gpu, environment
        self.parts: dict[str, Row] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def rows(self, part: str, kind: str = "rows") -> list[Row]:
        """The rows of a file, by kind."""
        made = self.parts.setdefault(part, {"environment": self.environment, "rows": [], "notes": []})
        found: list[Row] = made.setdefault(kind, [])
        return found

    def add(self, part: str, rows: Iterable[Row], kind: str = "rows") -> None:
        """Add rows and write the file."""
        self.rows(part, kind).extend(rows)
        self.save(part)

    def note(self, part: str, text: str) -> None:
        """Add a note, print it and write the file."""
        print(f"{part}: {text}", flush=True)
        self.rows(part)
        self.parts[part]["notes"].append(text)
        self.save(part)

    def save(self, part: str) -> None:
        """Write a file."""
        write_json(self.folder / f"{self.gpu}_{part}.json", self.parts[part])

    @contextmanager
    def attempt(self, part: str, what: str) -> Iterator[None]:
        """What fails inside becomes a note."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.note(part, f"{what} failed: {type(error).__name__}: {error}")


def write_json(path: Path, content: Row) -> None:
    """Write a file; whoever reads it never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def gpu_name(full: str) -> str:
    """``"NVIDIA H200"`` is ``"h200"``."""
    words = re.findall(r"[a-z0-9]+", full.lower().replace("nvidia", ""))
    return next((w for w in words if re.search(r"\d", w)), "".join(words) or "gpu")


def cpu_model() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that the process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_environment() -> Row:
    """What figures depend on beside a GPU."""
    from importlib.metadata import version

    return {
        "kvzip": version("kvzip"),
        "native": _native.describe()["build"],
        "cpu": cpu_model(),
        "cpu_cores": usable_cores(),
        "load_average_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def link_environment() -> Row:
    """What nvidia-smi says of GPU 0's driver and link."""
    fields = ("driver_version", "pcie.link.gen.current", "pcie.link.gen.max", "pcie.link.width.current")
    try:
        asked = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()[0]
        return {f.replace(".", "_"): v.strip() for f, v in zip(fields, answer.split(","), strict=True)}
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return {"nvidia_smi": f"not available: {type(error).__name__}"}


# ---- kvzip bench


def run(
    path: Path | None = None,
    *,
    bounds: Sequence[ErrorBound | BoundPolicy | None],
    codec: str = "cuszp",
    device: str = "auto",
    mib: int | None = None,
    block_tokens: int = 16,
    threads: int = 0,
    quick: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Row:
    """Measure an engine, and on the host the codec alone, on blocks of a KV cache.

    Args:
        path: see `kvzip.demo.read_input`; None takes the sample that ships with kvzip, with each head five times.
        bounds: error bounds, each measured by itself in its default mode; None is the default of the codec.
        codec: name of the codec.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``, which takes the GPU when there is one that can be used.
        mib: raw MiB of the largest transfer; the cache is repeated until there is twice as much. None = 16 on the host,
            256 on a GPU.
        block_tokens: tokens of one block.
        threads: most host threads; 0 = all cores.
        quick: few repetitions of 4 MiB: whether it works, not how fast it is.
        progress: called with the stage, the cases done and the cases in all.

    Returns:
        ``{"environment", "settings", "rows", "codec_rows", "violations"}``; docs/reference/cli.md has the keys.

    Raises:
        ConfigError: an argument or the input cannot be used.
        BackendUnavailableError: there is no such device, or nothing runs on it.
    """
    if not bounds or block_tokens < 1 or (mib is not None and mib < 1):
        raise ConfigError(f"{len(bounds)} bounds, {mib} MiB, blocks of {block_tokens} tokens: use at least one of each")
    device = choose_device(device)
    mib = 4 if quick else mib or (16 if device == "cpu" else 256)
    cache, dtype = read_input(path)
    if path is None:
        cache = np.tile(cache, (SAMPLE_HEADS, 1))
    cut = paged(cache, block_tokens)
    copies = -(-2 * (mib << 20) // sum(layer.nbytes for layer in cut))
    layers = [copy_to(np.concatenate([layer] * copies), device) for layer in cut]
    layout = BlockLayout.from_tensors(layers, "2NHD", dtype=dtype)
    source = BlockView(layers, layout)
    target = BlockView([copy_to(np.zeros_like(np.concatenate([layer] * copies)), device) for layer in cut], layout)
    largest = min(len(source), max(1, (mib << 20) // layout.nbytes))
    sizes = sorted({*itertools.takewhile(lambda n: n < largest, (8**i for i in range(12))), largest})
    case = _Case(sizes, repetitions=3 if quick else 100, limit_seconds=0.02 if quick else 0.4)

    total = len(bounds) * len(sizes) + (len(sizes) if device == "cuda" else len(bounds))
    done = itertools.count(1)
    rows: list[Row] = []
    codec_rows: list[Row] = []
    coder = get_codec(codec)
    chosen = [coder.default_bound() if bound is None else bound for bound in bounds]
    with ExitStack() as stack:
        capacity = (len(source) + 1) * (max_record_bytes(coder, layout) + 4096)
        pool = stack.enter_context(HostPool(capacity, resource=memory_for(device)))
        if device == "cuda":
            link = LinkCopy(largest * layout.nbytes, device)
            for blocks in sizes:
                rows += _measure_link(link, blocks, layout, case)
                progress("link", next(done), total)
        for bound in chosen:
            way = EngineWay(
                _name(bound), SwapEngine(pool, codec=codec, bound=bound, threads=threads), lambda: (source, target)
            )
            with ExitStack() as closing:
                closing.callback(way.close)
                for blocks in sizes:
                    rows += _measure_engine(way, blocks, source, target, bound, case)
                    progress(way.name, next(done), total)
            if device == "cpu":
                codec_rows += _measure_codec(
                    coder, source[range(largest)], target[range(largest)], bound, threads, case
                )
                progress("codec", next(done), total)
    add_link(rows)
    return {
        "environment": host_environment()
        | ({**describe_gpu(), **link_environment(), "device_codec": device_codec().name} if device == "cuda" else {}),
        "settings": {
            "input": path.name if path else f"sample, heads x {SAMPLE_HEADS}",
            "device": device,
            "mib": mib,
            "block_tokens": block_tokens,
            "block_bytes": layout.nbytes,
            "pages_of_a_block": len(layout.segments),
            "codec": codec,
            "bounds": [str(b) for b in chosen],
            "threads": threads,
            "quick": quick,
        },
        "rows": rows,
        "codec_rows": codec_rows,
        "violations": sum(row.get("violations", 0) for row in rows + codec_rows),
    }


@dataclass(frozen=True)
class _Case:
    sizes: list[int]  # blocks of a transfer
    repetitions: int
    limit_seconds: float

    def repeat(
        self, call: Callable[[int], int], slots: int, prepare: Callable[[int], object] = lambda slot: None
    ) -> Timing:
        return repeat(call, slots, repetitions=self.repetitions, limit_seconds=self.limit_seconds, prepare=prepare)


def _name(bound: ErrorBound | BoundPolicy) -> str:
    if bound == BoundPolicy.uncalibrated():
        return "kvzip-default"
    if isinstance(bound, BoundPolicy) or bound.kind not in (BoundKind.LOSSLESS, BoundKind.ABSOLUTE, BoundKind.RELATIVE):
        return f"kvzip-{bound}"
    number = np.format_float_scientific(bound.value, trim="-", exp_digits=1)
    kind = {BoundKind.LOSSLESS: "lossless", BoundKind.ABSOLUTE: f"abs:{number}", BoundKind.RELATIVE: number}
    return f"kvzip-{kind[bound.kind]}"


def _measure_link(link: LinkCopy, blocks: int, layout: BlockLayout, case: _Case) -> list[Row]:
    nbytes = blocks * layout.nbytes
    out, into = case.repeat(lambda slot: link.out(nbytes), 1), case.repeat(lambda slot: link.into(nbytes), 1)
    return [
        transfer_row("raw-link", direction, nbytes, timing, blocks=blocks)
        for direction, timing in (("out", out), ("in", into))
    ]


def _measure_engine(
    way: EngineWay, blocks: int, source: BlockView, target: BlockView, bound: ErrorBound | BoundPolicy, case: _Case
) -> list[Row]:
    order: Ints = np.random.default_rng(1).permutation(len(source))
    chosen = [order[k : k + blocks] for k in range(0, len(order) - blocks + 1, blocks)]
    raw = blocks * source.layout.nbytes
    out = case.repeat(
        lambda slot: way.store(chosen[slot], slot), len(chosen), lambda slot: way.renew(chosen[slot], slot)
    )
    into = case.repeat(lambda slot: way.load(chosen[slot], slot), out.used)
    loaded = np.concatenate(chosen[: into.used])[:SAMPLE_BLOCKS]
    found = compare_blocks(on_host(source[loaded]), on_host(target[loaded]), bound)
    way.forget()
    rows = [
        transfer_row(way.name, direction, raw, timing, blocks=blocks)
        for direction, timing in (("out", out), ("in", into))
    ]
    rows[1] |= {
        "compared_blocks": len(loaded),
        "violations": found.violations,
        "max_error_over_bound": found.over_bound,
    }
    return rows


def _measure_codec(
    codec: Codec,
    source: BlockView,
    target: BlockView,
    bound: ErrorBound | BoundPolicy,
    threads: int,
    case: _Case,
) -> list[Row]:
    """Encode and decode alone, on one thread and on as many as the engine uses."""
    out = np.zeros((len(source), codec.max_payload_bytes(source.layout)), np.uint8)
    bounds = resolve(bound, source.layout)
    target = target.with_bounds(bounds)
    rows: list[Row] = []
    for count in sorted({1, threads or usable_cores()}):
        request = EncodeRequest(bounds, codec.default_mode(bound), count)
        tables, sizes = codec.encode_blocks(source, request, out)
        payloads = [out[i, : int(n)] for i, n in enumerate(sizes)]
        record_bytes = int(sizes.sum()) + len(source) * header_nbytes(source.layout)

        encode = partial(codec.encode_blocks, source, request, out)
        decode = partial(codec.decode_blocks, target, payloads, list(tables), threads=count)
        for op, call in (("encode", encode), ("decode", decode)):
            timing = case.repeat(partial(_called, call), 1)
            rows.append(
                {"codec": _name(bound), "op": op, "threads": count, "raw_bytes": source.nbytes}
                | {"ratio": source.nbytes / record_bytes}
                | {"gb_per_s": source.nbytes / float(np.median(timing.seconds)) / 1e9}
                | quantiles(timing.seconds)
            )
        sample = source.block_ids[:SAMPLE_BLOCKS]
        rows[-1]["violations"] = compare_blocks(source[sample], target[sample], bound).violations
    return rows


def _called(call: Callable[[], object], slot: int) -> int:
    call()
    return 0
