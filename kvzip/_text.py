# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Results of the command line as text: JSON proper, and tables for people."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from kvzip.planner import BREAK_EVENS
from kvzip.record import Coding, Reason, RecordHeader, Steps


def to_json(value: dict[str, Any], indent: int | None = None) -> str:
    """JSON proper: it has no infinity and no NaN, they become null."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def plain(value: Any) -> Any:
    """The same without numbers that are not finite: None stands for them."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def columns(rows: list[tuple[str, str]]) -> str:
    """Names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def flatten(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The rows of an object in objects; a name is the path to its value."""
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, dict):
            rows += flatten(item, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, ", ".join(map(str, item)) if isinstance(item, list) else str(item)))
    return rows


def demo_rows(r: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of what ``kvzip demo`` found."""
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


def bench_table(result: dict[str, Any]) -> str:
    """The text of what ``kvzip bench`` found."""
    lines = [columns([*flatten(result["environment"]), *flatten(result["settings"])]), ""]
    for row in result["rows"]:
        efficiency = f"  {row['efficiency']:.2f} of ratio x link" if row["efficiency"] else ""
        lines.append(
            f"{row['way']:<14} {row['direction']:<3} {row['blocks']:>5} blocks {row['raw_bytes'] / 2**20:>8.2f} MiB "
            f"ratio {row['ratio']:.3f} {row['gb_per_s']:>7.2f} GB/s {row['us']:>9.0f} us "
            f"[{row['us_p10']:.0f}, {row['us_p90']:.0f}]{efficiency}"
        )
    lines += [
        f"{row['codec']:<14} {row['op']} alone, {row['threads']} threads: ratio {row['ratio']:.3f} "
        f"{row['gb_per_s']:.2f} GB/s"
        for row in result["codec_rows"]
    ]
    return "\n".join([*lines, "", f"violations  {result['violations']}"])


def plan_table(r: dict[str, Any]) -> str:
    """The text of what ``kvzip plan`` estimates."""
    model, held, each, link = r["model"], r["tokens_held"], r["bytes_per_token"], r["link_gb_per_s"]

    def tokens(count: int | None) -> str:
        return "never, or too little is known" if count is None else f"from {count:,} tokens on"

    def ms(seconds: float | None) -> str:
        return f"{'-':>10}" if seconds is None else f"{seconds * 1e3:>10,.2f}"

    lines = [
        columns(
            [
                (
                    "model",
                    f"{model['layers']} layers, {model['kv_heads']} KV heads of {model['head_dim']}, {model['dtype']}",
                ),
                ("bound", f"{r['bound']}, mode {r['mode']}: ratio {r['ratio']:.2f} ({r['ratio_from']})"),
                ("a token", f"{each['raw']:,} bytes raw, {each['encoded']:,.0f} encoded"),
                (
                    f"{r['budget_bytes'] / 2**30:,.1f} GiB hold",
                    f"{held['raw']:,} tokens raw, {held['encoded']:,} encoded",
                ),
                ("link", f"{link['out']:.1f} GB/s out, {link['in']:.1f} in"),
            ]
        ),
        "",
        f"{'ms for':>14} {'out, raw':>10} {'encoded':>10} {'in, raw':>10} {'encoded':>10} {'recompute':>10}",
    ]
    for row in r["rows"]:
        times = [row[f"{name}_{what}_seconds"] for name in ("store", "load") for what in ("raw", "encoded")]
        lines.append(f"{row['tokens']:>7,} tokens {' '.join(ms(t) for t in [*times, row['recompute_seconds']])}")
    return "\n".join(
        [
            *lines,
            "",
            columns([(BREAK_EVENS[name], tokens(at)) for name, at in r["break_even_tokens"].items()]),
            "",
            f"Rates of: {r['machine']}",
        ]
    )  # fmt: skip


def header_fields(header: RecordHeader) -> dict[str, Any]:
    """The fields of a record's header, in plain types."""
    coding: Counter[int] = Counter(header.table["coding"].tolist())
    reason: Counter[int] = Counter(header.table["reason"].tolist())
    names = {
        int(c) | int(s): c.name.lower() + ("" if s is Steps.PAGE else f" by {s.name.lower()}")
        for c in Coding
        for s in Steps
    }
    return {
        "format_version": header.version,
        "codec": header.codec,
        "mode": header.mode,
        "bound": str(header.bound),
        **({"table_id": f"{header.table_id:016x}"} if header.table_id else {}),
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
