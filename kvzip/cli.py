# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The command line: ``kvzip demo``, ``kvzip info``, ``kvzip inspect``.

Results go to stdout, progress and errors to stderr. Exit status: 0 = all holds, 1 = a bound is violated, 2 = unusable
arguments or input.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvzip.errors import KvzipError
from kvzip.record import Coding, Reason, RecordHeader, read_header, read_record
from kvzip.types import ErrorBound


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        The exit status.
    """
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except (KvzipError, OSError) as error:
        print(f"kvzip: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"kvzip: out of memory ({error}): use a smaller input, block or budget", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvzip", description="Compressed KV-cache swap.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="store, overwrite, load and verify a KV cache")
    demo.add_argument(
        "--input",
        type=Path,
        metavar="FILE.npy",
        help="uint16 views of bf16, shape [layers, 2, tokens, kv_heads, head_dim]; default: a small real sample",
    )
    demo.add_argument(
        "--bound",
        type=_bound,
        default="1e-3",
        help="1e-3 (relative to each page's range), abs:1e-2 or lossless; default 1e-3",
    )
    demo.add_argument("--mode", help="encoding mode: fixed, plain or outlier; default: the codec's first")
    demo.add_argument("--codec", default="cuszp", help="name of the codec; default cuszp")
    demo.add_argument("--block-tokens", type=int, default=16, metavar="N", help="tokens of one block; default 16")
    demo.add_argument(
        "--budget", type=_bytes, metavar="BYTES", help="bytes of the host pool, such as 64MiB; default: all fits"
    )
    demo.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the pages lie; default auto"
    )
    demo.add_argument("--threads", type=int, default=0, metavar="N", help="most host threads; default 0, all cores")
    demo.add_argument("--json", action="store_true", help="print one JSON object")
    demo.set_defaults(run=_demo)

    info = commands.add_parser("info", help="what this installation can do")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=_info)

    inspect = commands.add_parser("inspect", help="show the header of a record")
    inspect.add_argument("file", type=Path, metavar="FILE", help="a file that holds one record")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(run=_inspect)
    return parser


def _bound(text: str) -> ErrorBound:
    try:
        return ErrorBound.parse(text)
    except KvzipError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _bytes(text: str) -> int:
    units = {
        "": 1,
        "B": 1,
        "KIB": 1 << 10,
        "MIB": 1 << 20,
        "GIB": 1 << 30,
        "TIB": 1 << 40,
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "TB": 10**12,
    }
    number = text.rstrip("kKmMgGtTiIbB")
    unit = text[len(number) :].upper()
    try:
        value = float(number) * units[unit]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: use bytes, or a number with KiB, MiB or GiB") from None
    if not (math.isfinite(value) and value >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: use at least one byte")
    return int(value)


def _demo(arguments: argparse.Namespace) -> int:
    from kvzip import demo

    show = sys.stderr.isatty()

    def progress(stage: str, done: int, total: int) -> None:
        if show:
            print(f"\r{stage:>6} {done}/{total} blocks", end="" if done < total else "\n", file=sys.stderr, flush=True)

    result = demo.run(
        arguments.input,
        bound=arguments.bound,
        codec=arguments.codec,
        mode=arguments.mode,
        block_tokens=arguments.block_tokens,
        budget_bytes=arguments.budget,
        device=arguments.device,
        threads=arguments.threads,
        progress=progress,
    )
    if arguments.json:
        print(_json(result.as_dict()))
    else:
        print(_table(_demo_rows(result.as_dict())))
    return 1 if result.violations else 0


def _demo_rows(r: dict[str, Any]) -> list[tuple[str, str]]:
    lost = f", {r['evicted']} evicted under the budget" if r["evicted"] else ""
    return [
        ("stored", f"{r['blocks']} blocks{lost}"),
        ("raw", f"{r['raw_bytes']:,} bytes"),
        ("in the pool", f"{r['stored_bytes']:,} bytes, {r['pool_payload_fraction']:.1%} of its extents are payload"),
        ("ratio", f"{r['ratio']:.3f}"),
        ("codec", f"{r['codec']}, mode {r['mode']}, on {r['device']}"),
        ("bound", f"{r['bound']}"),
        ("largest error", f"{r['max_error']:.4g} ({r['max_error_over_bound']:.4f} of the bound of its page)"),
        ("violations", f"{r['violations']}"),
        ("store", f"{r['store_gb_per_s']:.2f} GB/s of raw data"),
        ("load", f"{r['load_gb_per_s']:.2f} GB/s of raw data"),
    ]


def _info(arguments: argparse.Namespace) -> int:
    from kvzip.info import system_info

    info = system_info()
    if arguments.json:
        print(_json(info, indent=2))
    else:
        print(_table(list(_flatten(info))))
    return 0


def _flatten(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, dict):
            rows += _flatten(item, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, ", ".join(map(str, item)) if isinstance(item, list) else str(item)))
    return rows


def _inspect(arguments: argparse.Namespace) -> int:
    data = arguments.file.read_bytes()
    header = read_header(data)
    read_record(data)
    if arguments.json:
        print(_json(_header_dict(header)))
    else:
        print(_table(list(_flatten(_header_dict(header)))))
    return 0


def _header_dict(header: RecordHeader) -> dict[str, Any]:
    coding: Counter[int] = Counter(header.table["coding"].tolist())
    reason: Counter[int] = Counter(header.table["reason"].tolist())
    names = {int(c): c.name.lower() for c in Coding}
    return {
        "format_version": header.version,
        "codec": header.codec,
        "mode": header.mode,
        "bound": str(header.bound),
        "reason": header.reason.name.lower(),
        "max_error": header.max_error,
        "raw_bytes": header.raw_bytes,
        "record_bytes": header.record_bytes,
        "header_bytes": header.header_bytes,
        "ratio": round(header.ratio, 4),
        "dims": header.dims,
        "pages": header.num_segments,
        "geometry": [
            f"{g.count} x ({g.tokens} tokens, {g.heads} heads, {g.head_dim}) {g.dtype.name.lower()}, "
            f"groups of {g.group_tokens} tokens"
            for g in header.geometry
        ],
        "codings": {names.get(k, str(k)): n for k, n in sorted(coding.items())},
        "reasons": {Reason(k).name.lower(): n for k, n in sorted(reason.items())},
        "largest_applied_bound": float(header.table["bound"].max()),
        "payload_crc32c": f"{header.payload_crc32c:08x}",
    }


def _json(value: dict[str, Any], indent: int | None = None) -> str:
    """JSON proper: it has no infinity and no NaN, they become null."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()}
    return json.dumps(plain, indent=indent, allow_nan=False)


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


if __name__ == "__main__":
    sys.exit(main())
