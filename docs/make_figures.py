# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Writes the measured figures into the documentation: ``docs/performance.md``, those of the README and of fidelity.

And the constants of ``kvzip plan`` into the package: see bench/planner_rates.py.

Run ``python docs/make_figures.py`` after a benchmark has written to ``bench/results/``. Every figure in the
documentation comes from there; a test fails when the documents say anything else.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- begin of figures: docs/make_figures.py writes them -->", "<!-- end of figures -->"
BOUNDS = {
    "rice default": "the default: K 1e-3 of each page's range, V 0.1 of each token's rms",
    "fixed default": "the same, mode `fixed`",
    "fixed rel:1e-3": "1e-3 of each page's range",
    "fixed rel:1e-2": "1e-2 of each page's range",
}
WAYS = {
    "raw-link": "raw bytes, one large copy",
    "raw-loop": "raw pages, a copy each",
    "raw-batch": "raw pages, batched copies",
    "raw-gather": "raw pages, gathered, one copy",
    "traffic": "the memory traffic alone, at a ratio of 4",
    "nvcomp-ans": "nvCOMP ANS (lossless)",
    "fp8": "cast to fp8 (no stated bound)",
    "int8": "int8 per row (no stated bound)",
    "kvzip-lossless": "kvzip, lossless",
    "kvzip-1e-3": "kvzip, 1e-3 of each page's range",
    "kvzip-1e-2": "kvzip, 1e-2 of each page's range",
    "kvzip-uncalibrated": "kvzip, default, mode `fixed`",
    "kvzip-uncalibrated-rice": "kvzip, default",
    "kvzip-calibrated": "kvzip, calibrated, mode `fixed`",
    "kvzip-calibrated-rice": "kvzip, calibrated",
}
README_WAYS = {"raw-link", "fp8", "nvcomp-ans", "kvzip-lossless", "kvzip-uncalibrated-rice", "kvzip-calibrated-rice"}
README_WAYS |= {"kvzip-1e-3", "kvzip-1e-2"}
SHOWN = {
    "fp8": "fp8 e4m3",
    "int8": "int8 per token and head",
    "KIVI-4": "KIVI, 4 bits",
    "lossless rice": "kvzip, lossless, mode `rice`",
    "relative 0.001, sink exact fixed": "kvzip, `1e-3`",
    "default fixed": "kvzip, default, mode `fixed`",
    "default rice": "kvzip, default",
    "K relative 0.001, V rms 0.15 rice": "kvzip, `k=1e-3,v=rms:0.15`",
    "calibrated t=0.4 r=0.17 fixed": "kvzip, calibrated, mode `fixed`",
    "calibrated t=0.4 r=0.17 rice": "kvzip, calibrated",
    "weighed t=0.6 r=0.25 rice": "kvzip, calibrated with gradients, t=0.6",
}


STEPS = {
    "fp8": "fp8",
    "a bound relative to the page, fixed length": "relative 0.003",
    "K by channel, V by token": "calibrated t=0.4 r=0.17 fixed, sink not protected",
    "the block of position 0 exact": "calibrated t=0.4 r=0.17 fixed",
    "channels and layers weighed by gradients": "weighed t=0.6 r=0.25 fixed",
    "Rice codes": "weighed t=0.6 r=0.25 rice",
}


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def paragraph(text: str) -> str:
    """A paragraph in lines of the documents' width."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def load(pattern: str) -> tuple[str, dict[str, Any]] | None:
    """The results file of this pattern and its contents; None when there is none."""
    found = sorted(RESULTS.glob(pattern))
    return (found[0].name, json.loads(found[0].read_text(encoding="utf-8"))) if found else None


def plot(name: str) -> str:
    """The picture that ``bench/plot_gpu.py`` draws from a results file."""
    picture = Path(name).with_suffix(".png").name
    return f"![{Path(name).stem}](../bench/results/{picture})\n"


def gpu_conditions(environment: dict[str, Any]) -> str:
    """One sentence on where a GPU benchmark ran."""
    e = environment
    return (
        f"{e['gpu']}, PCIe {e['pcie_link_gen_max']}.0 x{e['pcie_link_width_current']}, driver {e['driver_version']}, "
        f"CUDA {e['cuda']}, commit {e['commit']}. Pages: {e['page']}, cut from {e['data']}. {e['method'][:1].upper()}"
        f"{e['method'][1:]}."
    )


def cpu_rows(isa: dict[str, Any]) -> list[list[object]]:
    """Ratio and speed of the cases that the README shows."""
    names = {**BOUNDS, "lossless": "lossless"}
    return [[names[n], *ratio_and_speed(isa[n])] for n in names if n in isa]


def ratio_and_speed(case: dict[str, Any]) -> list[str]:
    """Ratio, and GB/s of a core's time for encode and decode."""
    if case["violations"]:
        raise SystemExit("a benchmark found violations: no figure of it is published")
    speed = case["core_gb_per_s"]
    return [f"{case['ratio']:.2f}", *(f"{speed[op]['median']:.1f} GB/s" for op in ("encode", "decode"))]


def largest(rows: list[dict[str, Any]], way: str, direction: str) -> dict[str, Any] | None:
    """The row of a way with the most bytes."""
    found = [r for r in rows if r["way"] == way and r["direction"] == direction]
    return max(found, key=lambda r: int(r["raw_bytes"])) if found else None


def link_rows(rows: list[dict[str, Any]], ways: Iterable[str]) -> list[list[object]]:
    """Ratio, and GB/s out and in, of the largest transfer of each way."""
    result: list[list[object]] = []
    for way in ways:
        out, into = largest(rows, way, "out"), largest(rows, way, "in")
        if out and into:
            result.append([WAYS[way], f"{out['ratio']:.2f}", f"{out['gb_per_s']:.0f}", f"{into['gb_per_s']:.0f}"])
    return result


def headlines() -> str:
    """What the README says first: what it is good for, in figures."""
    lines = []
    if (found := load("fidelity_smollm2.json")) is not None:
        rows = {row["scheme"]: row for row in found[1]["rows"]}
        shown = [rows.get(name) for name in ("default rice", "weighed t=0.6 r=0.25 rice", "fp8")]
        if all(shown):
            ratios, divergences = zip(*((f"{r['ratio']:.1f}", f"{r['kl']:.1e}") for r in shown if r), strict=True)
            lines.append(
                f"**{ratios[0]} times as many tokens in a GiB** of host memory by default, {ratios[1]} times "
                f"calibrated, at a mean KL of {divergences[0]} and {divergences[1]} nats; fp8: {ratios[2]} times at "
                f"{divergences[2]} (SmolLM2-135M)."
            )
    if (found := load("*_transport.json")) is not None:
        rows = found[1]["rows"]
        found_rows = {way: [largest(rows, way, d) for d in ("out", "in")] for way in WAYS}
        speeds = {way: [row for row in pair if row] for way, pair in found_rows.items() if all(pair)}
        near, best = ("kvzip-uncalibrated-rice", "kvzip-calibrated-rice")
        if not {near, best} <= set(speeds):  # of measurements before these were the default and what it is about
            near, best = ("kvzip-1e-3", "kvzip-1e-2")
        if {near, best, "raw-link"} <= set(speeds):
            out, into = ({way: f"{pair[k]['gb_per_s']:.0f}" for way, pair in speeds.items()} for k in (0, 1))
            ratio = {way: f"{pair[0]['ratio']:.1f}" for way, pair in speeds.items()}
            lines.append(
                f"**{out[near]} GB/s of raw data out of an H100 and {into[near]} into it** at a ratio of "
                f"{ratio[near]}, {out[best]} and {into[best]} at {ratio[best]}, over a link that copies "
                f"{out['raw-link']} and {into['raw-link']}."
            )
    if (found := load("*_vllm_sessions.json")) is not None:
        rows = {(r["load"], r["tier"], r["budget"], r["tokens"]): r for r in found[1]["rows"]}
        long = max(r["tokens"] for r in found[1]["rows"] if r["load"] == "round robin")
        pair = [rows.get(("round robin", tier, "half", long)) for tier in ("kvzip", "native")]
        if pair[0] and pair[1]:
            lines.append(
                f"**{pair[0]['ttft_return_ms']:,.0f} ms to the first token** at `{pair[0]['bound']}` when one of "
                f"{pair[0]['sessions']} sessions of {long:,} tokens comes back to vLLM with "
                f"{pair[0]['budget_gib']:g} GiB of host memory, {pair[1]['ttft_return_ms']:,.0f} ms with vLLM's own "
                "offloading."
            )
    return "".join(
        textwrap.fill(line, 120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False) + "\n"
        for line in lines
    )


def readme() -> str:
    """The figures of the README."""
    parts: list[str] = []
    found = load("fidelity_smollm2.json")
    if found:
        name, data = found
        parts.append(_shown_schemes(data))
        parts.append(
            paragraph(
                f"SmolLM2-135M, {data['prefix']:,} swapped tokens of {len(data['environment']['texts'])} texts, "
                "everything counted; `kvzip calibrate` and `kvzip verify` do this for a model of your own "
                "([fidelity](docs/fidelity.md), "
                f"[conditions](bench/results/{name}))."
            )
        )
    gpu = load("*_transport.json")
    if gpu:
        name, data = gpu
        rows = data["rows"]
        size = max(r["raw_bytes"] for r in rows) >> 20
        parts.append(
            table(
                [f"{size:,} MiB of pages on a GPU", "ratio", "out, GB/s of raw data", "in, GB/s of raw data"],
                link_rows(rows, (way for way in WAYS if way in README_WAYS)),
            )
        )
        small = [r for r in rows if r["way"] == "kvzip-1e-3" and r["pages"] == 8 and r["direction"] == "out"]
        raw = [r for r in rows if r["way"] == "raw-batch" and r["pages"] == 8 and r["direction"] == "out"]
        text = (
            f"{data['environment']['gpu']}, medians ([conditions](bench/results/{name})). The same data; these pages "
            "join heads of several layers, which widens their range and with it the relative bound."
        )
        if small and raw and small[0]["us"] > raw[0]["us"]:
            text += (
                f" Small transfers gain nothing: 8 pages of 64 KiB take {small[0]['us']:.0f} us out at 1e-3, and "
                f"{raw[0]['us']:.0f} us as raw copies."
            )
        parts.append(paragraph(text + " See [performance](docs/performance.md)."))
    sessions = load("*_vllm_sessions.json")
    if sessions:
        parts += _readme_sessions(*sessions)
    cpu = load("cpu_codec.json")
    if cpu:
        name, data = cpu
        isa = data["results"]["smollm2_prose_512"]["isa"]["avx512"]
        wall = next(isa[n] for n in BOUNDS if n in isa)["wall_gb_per_s"]["1"]["encode"]["median"]
        parts.append(
            table(["real KV cache, bound", "ratio", "encode, one CPU core", "decode, one CPU core"], cpu_rows(isa))
        )
        parts.append(
            paragraph(
                "Data: SmolLM2-135M on 512 tokens of prose, bfloat16; no value was outside the bound. GB/s are "
                f"raw bytes per second of a thread's CPU time, {data['environment']['cpu'].replace('(R)', '')}, "
                f"AVX-512, a virtual machine at a load average of {data['environment']['load_average_1min']:.1f}; by "
                f"the clock one thread encoded {wall:.1f} GB/s in the first case "
                f"([all figures](docs/performance.md), [conditions](bench/results/{name}))."
            )
        )
    return "\n".join(parts)


def _readme_sessions(name: str, data: dict[str, Any]) -> list[str]:
    """What vLLM's own offloading reached, and kvzip's default."""
    rows = {(r["load"], r["tier"], r["budget"], r["tokens"]): r for r in data["rows"]}
    long = max(r["tokens"] for r in data["rows"] if r["load"] == "round robin")
    lines = []
    for budget in ("half", "fits"):
        pair = [rows.get(("round robin", tier, budget, long)) for tier in ("native", "kvzip")]
        if pair[0] and pair[1]:
            what = f"{pair[0]['sessions']} sessions of {long:,} tokens come back, {pair[0]['budget_gib']:g} GiB: TTFT"
            lines.append([what, *(f"{r['ttft_return_ms']:,.0f} ms" for r in pair if r)])
    loops = {r["tier"]: r for r in data["rows"] if r["load"] == "open loop"}
    if {"native", "kvzip"} <= set(loops):
        pair = [loops["native"], loops["kvzip"]]
        what = f"{pair[0]['arrivals_per_s']:g} requests a second, {pair[0]['sessions']} sessions of "
        what += f"{pair[0]['tokens']:,} tokens, {pair[0]['budget_gib']:g} GiB: "
        lines.append([what + "served a second", *(f"{r['served_per_s']:.1f}" for r in pair if r)])
        lines.append([what + "TTFT p95", *(f"{r['ttft_p95_ms']:,.0f} ms" for r in pair if r)])
    bound = rows["round robin", "kvzip", "half", long]["bound"]
    e = data["environment"]
    return [
        table([f"vLLM {e['vllm']}, geometry of {e['geometry']}", "its own CPU offloading", f"kvzip, {bound}"], lines),
        paragraph(
            f"{e['gpu']}, dummy weights, values of a real KV cache in the pages ([conditions](bench/results/{name})). "
            "See [performance](docs/performance.md#sessions-that-come-back-in-vllm) and "
            "[KV offloading in vLLM](docs/guides/vllm.md)."
        ),
    ]


def performance() -> str:
    """The page with all figures."""
    parts = [
        "# Performance\n",
        paragraph(
            "Written by `docs/make_figures.py` from `bench/results/`; do not edit. GB/s are 1e9 bytes of raw data a "
            "second, medians. Measure on your own machine before you rely on any of it."
        ),
    ]
    sections = (
        *(cpu_section, pool_section, policy_section),
        *(transport_section, codec_section, kernel_section, compute_section, controller_section, pinned_section),
        *(sessions_section, conversation_section, transformers_section),
    )
    for make in sections:
        parts += make()
    return "\n".join(parts)


def cpu_section() -> list[str]:
    """The CPU codec, every mode and instruction set."""
    found = load("cpu_codec.json")
    if not found:
        return []
    name, data = found
    e = data["environment"]
    parts = [
        "## CPU codec\n",
        paragraph(
            f"{e['cpu'].replace('(R)', '')}, {e['cores']} virtual cores, load average {e['load_average_1min']} "
            f"while it ran ([{name}](../bench/results/{name})). `core`: raw bytes per second of CPU time of one "
            "thread. `wall`: one thread by the clock."
        ),
    ]
    for cache, result in data["results"].items():
        rows: list[list[object]] = []
        for isa, cases in result["isa"].items():
            for case, r in cases.items():
                wall = r["wall_gb_per_s"]["1"]
                core = r["core_gb_per_s"]
                rows.append(
                    [
                        case,
                        isa,
                        f"{r['ratio']:.3f}",
                        f"{core['encode']['median']:.2f} / {core['decode']['median']:.2f}",
                        f"{wall['encode']['median']:.2f} / {wall['decode']['median']:.2f}",
                    ]
                )
        parts += [
            f"### {cache}\n",
            table(["mode and bound", "instructions", "ratio", "core, encode / decode", "wall, encode / decode"], rows),
        ]
    return parts


def pool_section() -> list[str]:
    """Payload and runs after churn."""
    found = load("pool.json")
    if not found:
        return []
    name, data = found
    shown = [c for c in data["churn"] if c["headroom"] in (0, 0.02)]
    rows = [
        [
            c["record_bytes"],
            c["eviction"],
            f"{c['headroom']:.1%}",
            f"{c['payload_fraction']['median']:.1%}",
            f"{c['runs_per_record']['mean']:.2f}",
            f"{c['allocate_us']['median']:.0f} / {c['free_us']['median']:.0f}",
        ]
        for c in shown
    ]
    stores = {c["stores"] for c in shown}
    return [
        "## Pool after churn\n",
        paragraph(
            f"{' or '.join(f'{n:,}' for n in sorted(stores))} stores and evictions each, in a pool of "
            f"{shown[0]['pool_bytes'] >> 20} MiB ([{name}](../bench/results/{name})). The default headroom is 2 %."
        ),
        table(["records", "eviction", "headroom", "payload", "runs per record", "allocate / free, us"], rows),
    ]


def policy_section() -> list[str]:
    """Hit rates of the eviction policies."""
    found = load("policies.json")
    if not found:
        return []
    name, data = found
    parts = [
        "## Eviction policies\n",
        paragraph(
            "The part of all blocks of the requests that the pool still held as part of a prefix, by the size of the "
            "pool as a part of all blocks of the trace (`bench/policies.py`; requests give their blocks from the first "
            f"token on, [{name}](../bench/results/{name}) has the reverse order too). A ratio of 2 is worth about one "
            "column to the right. `lru` is the default: no other is better on all traces. The traces `mooncake-` are "
            "those published with Mooncake (Qin et al., FAST 2025)."
        ),
    ]
    rows = [r for r in data["rows"] if r["order"] == "forward"]
    fractions = sorted({r["capacity_fraction"] for r in rows})
    cells = {(r["trace"], r["policy"], r["capacity_fraction"]): f"{r['prefix_hit_rate']:.1%}" for r in rows}
    lines = [
        [about["trace"], policy, *(cells[about["trace"], policy, f] for f in fractions), f"{about['ceiling']:.1%}"]
        for about in data["traces"]
        for policy in dict.fromkeys(r["policy"] for r in rows)
    ]
    return [*parts, table(["trace", "policy", *(f"{f:.0%}" for f in fractions), "all"], lines)]


def _by_size(rows: list[dict[str, Any]], key: str, cell: Callable[[float], str]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a table of transfers from 64 MiB on: a line a way, a column a size and direction."""
    sizes = sorted({r["raw_bytes"] for r in rows if r["raw_bytes"] >= 64 << 20})
    cells = {(r["way"], r["raw_bytes"], r["direction"]): r.get(key) for r in rows}
    lines = [
        [
            WAYS[way],
            *(cell(found) if (found := cells.get((way, n, d))) else "" for n in sizes for d in ("out", "in")),
        ]
        for way in WAYS
        if any((way, n, "out") in cells for n in sizes)
    ]
    return ["way", *(f"{n >> 20:,} MiB {d}" for n in sizes for d in ("out", "in"))], lines


def share_section(rows: list[dict[str, Any]]) -> list[str]:
    """How close large transfers come to what the link and the ratio allow, and what they cost the host."""
    head, lines = _by_size([r for r in rows if r["way"] != "raw-link"], "efficiency", lambda share: f"{share:.2f}")
    if not lines:
        return []
    parts = [
        "### Share of ratio x link, from 64 MiB on\n",
        paragraph(
            "A transfer's rate over the ratio times the rate of one plain copy of as many raw bytes in the same run; "
            "1 would be a link that is never idle. The aim is 0.95."
        ),
        table(head, lines),
    ]
    head, lines = _by_size(rows, "cpu_s_per_gib", lambda seconds: f"{seconds * 1e3:.1f}")
    return [
        *parts,
        "### CPU time of the host, milliseconds for a GiB of raw data\n",
        paragraph(
            "Of all threads of the process, from the call until the data is there. Who waits for one copy of raw bytes "
            "spins all that time; kvzip's threads sleep while the link is at work."
        ),
        table(head, lines),
    ]


def transport_section() -> list[str]:
    """Stores and loads of pages on a GPU, beside other ways."""
    found = load("*_transport.json")
    if not found:
        return []
    name, data = found
    rows = data["rows"]
    counts = sorted({r["pages"] for r in rows})
    parts = [
        "## Stores and loads of pages on a GPU\n",
        paragraph(f"{gpu_conditions(data['environment'])} ([{name}](../bench/results/{name}))"),
        plot(name),
        "### GB/s, largest transfer\n",
        table(["way", "ratio", "out", "in"], link_rows(rows, WAYS)),
        *_missing_ways({r["way"] for r in rows}),
        *share_section(rows),
    ]
    for direction in ("out", "in"):
        cells = {(r["way"], r["pages"]): f"{r['us']:,.0f}" for r in rows if r["direction"] == direction}
        parts += [
            f"### Microseconds {direction}, by pages of 64 KiB\n",
            table(
                ["way", *(f"{n:,}" for n in counts)],
                [
                    [WAYS[w], *(cells.get((w, n), "") for n in counts)]
                    for w in WAYS
                    if any((w, n) in cells for n in counts)
                ],
            ),
        ]
    both = load("*_both.json")
    if both:
        parts += [
            "### Out and in at the same time, GB/s\n",
            table(
                ["way", "direction", "both at once", "alone"],
                [
                    [WAYS[r["way"]], r["direction"], f"{r['gb_per_s']:.0f}", f"{r['alone_gb_per_s']:.0f}"]
                    for r in both[1]["rows"]
                ],
            ),
        ]
    return parts + small_section() + timeline_section()


def small_section() -> list[str]:
    """Where the time of small transfers goes."""
    found = load("*_small.json")
    if not found:
        return []
    name, data = found
    parts = ("us", "view_us", "queue_us", "result_us", "native_us", "native_call_us", "native_wait_us")
    return [
        "### Where the time of a small transfer goes, microseconds\n",
        paragraph(
            "A caller's time: until the view of the blocks is made, until `store` or `load` returns, and until "
            "`result` does. Beside it the native call with the same arguments and the wait for its end, nothing else "
            "between: what the transfer would take if the engine's bookkeeping took no time. "
            f"Medians; commit {data['environment']['commit']} ([{name}](../bench/results/{name}))."
        ),
        table(
            ["way", "direction", "pages", "in all", "view", "store / load", "result", "native alone", "call", "then"],
            [[WAYS[r["way"]], r["direction"], str(r["pages"]), *(f"{r[k]:.1f}" for k in parts)] for r in data["rows"]],
        ),
    ]


def timeline_section() -> list[str]:
    """Where the time of large transfers goes."""
    found = load("*_timeline.json")
    if not found:
        return []
    name, data = found
    parts = ("us", "before_us", "link_us", "idle_us", "after_us")
    twice = "Below 0: copies of two streams overlapped, and this run counted that time twice. "
    return [
        "### Where the time of a large transfer goes, microseconds\n",
        paragraph(
            "By CUDA events around the copies of its chunks: until the first begins, while they move, between them, "
            "and after the last until the caller has the result. The first and the last part do not grow with the "
            "transfer. "
            + twice * any(r["idle_us"] < 0 for r in data["rows"])
            + f"Medians; commit {data['environment']['commit']} ([{name}](../bench/results/{name}))."
        ),
        table(
            ["way", "direction", "MiB", "in all", "before", "link", "between", "after"],
            [
                [WAYS[r["way"]], r["direction"], f"{r['raw_bytes'] >> 20:,}", *(f"{r[k]:,.0f}" for k in parts)]
                for r in data["rows"]
            ],
        ),
    ]


def _missing_ways(shown: set[str]) -> list[str]:
    """Ways that did not run there, from a run on another GPU."""
    parts = []
    for path in sorted(RESULTS.glob("*_transport.json"))[1:]:
        data = json.loads(path.read_text(encoding="utf-8"))
        lines = link_rows(data["rows"], [w for w in WAYS if w not in shown])
        if lines:
            found = "; ".join(f"{way}: ratio {ratio}, {out} out, {into} in" for way, ratio, out, into in lines)
            e = data["environment"]
            parts.append(
                paragraph(
                    f"Not in this run, but in an earlier one on {e['gpu']}: {found} "
                    f"([{path.name}](../bench/results/{path.name}))."
                )
            )
    return parts


def codec_section() -> list[str]:
    """The GPU codecs without the link."""
    gpu = next(
        (p for p in sorted(RESULTS.glob("*_codec.json")) if p.name not in ("cpu_codec.json", "triton_codec.json")), None
    )
    if not gpu:
        return []
    data = json.loads(gpu.read_text(encoding="utf-8"))
    rows = [
        [
            r["codec"],
            r["op"],
            f"{r['raw_bytes'] >> 20:,} MiB",
            f"{r['ratio']:.2f}",
            f"{r['gb_per_s']:,.0f}",
            f"{r['ceiling_fraction']:.0%}",
        ]
        for r in data["rows"]
    ]
    return [
        "## GPU codecs alone\n",
        paragraph(
            "The last column is read plus written bytes over what a copy in device memory reaches in the same run "
            f"([{gpu.name}](../bench/results/{gpu.name}))."
        ),
        table(["codec", "operation", "raw", "ratio", "GB/s", "of the memory's ceiling"], rows),
    ]


def kernel_section() -> list[str]:
    """The CUDA codec by size of a page, and what limits and checksums cost it."""
    found = load("*_kernels.json")
    if not found:
        return []
    name, data = found
    rows = [r for r in data["rows"] if r["packed"] and not r["strips_per_warp"]]
    e = data["environment"]
    whole = [r for r in rows if not r["max_ctas"] and r["raw_bytes"] > 9 << 26]
    at = {(r["page"], r["codec"], r["op"]): r for r in whole}

    def reached(page: str, codec: str, op: str) -> str:
        r = at.get((page, codec, op))
        return f"{r['gb_per_s']:,.0f} ({r['ceiling_fraction']:.0%})" if r else ""

    limited = sorted({(r["max_ctas"], r["codec"]) for r in rows if r["max_ctas"]})
    by_limit = {(r["max_ctas"], r["op"]): r for r in rows if r["max_ctas"]}
    parts = [
        "### CUDA codec by size of a page\n",
        paragraph(
            f"{e['gpu']}, CUDA {e['cuda'][0] // 1000}.{e['cuda'][0] % 1000 // 10}, about 1 GiB of pages of 16 tokens, "
            "GB/s of raw data; in brackets the share of what a copy in device memory reads plus writes "
            f"({e['copy_bytes_per_second'] / 1e9:,.0f} GB/s in this run). Decoding includes the validation that comes "
            f"before it. `+crc` also checksums, or checks, the payloads. ([{name}](../bench/results/{name}))"
        ),
        table(
            ["page", "codec", "ratio", "encode", "decode", "encode+crc", "decode+crc"],
            [
                [
                    page,
                    codec,
                    f"{at[page, codec, 'encode']['ratio']:.2f}",
                    *(reached(page, codec, op) for op in ("encode", "decode", "encode+crc", "decode+crc")),
                ]
                for page, codec in dict.fromkeys((r["page"], r["codec"]) for r in whole)
            ],
        ),
    ]
    if limited:
        codec = limited[0][1]
        parts += [
            paragraph(f"With `max_ctas`, pages of 64 KiB, {codec}:"),
            table(
                ["`max_ctas`", "encode, GB/s", "decode, GB/s"],
                [[n, *(f"{by_limit[n, op]['gb_per_s']:,.0f}" for op in ("encode", "decode"))] for n, _ in limited],
            ),
        ]
    return parts


def compute_section() -> list[str]:
    """What a swap costs the computation beside it."""
    found = load("*_interference.json")
    if not found:
        return []
    name, data = found
    rows = [
        [
            WAYS[r["way"]],
            r["direction"],
            r["compute"],
            r["max_ctas"] or "no limit",
            f"{r['slowdown']:.2f}",
            f"{r['gb_per_s']:.0f}",
            f"{(r['slowdown'] - 1) / r['gb_per_s'] * 1e4:.1f} %" if r["compute"].startswith("decode") else "",
        ]
        for r in data["rows"]
        if not r.get("compute_priority")
    ]
    notes = f" {data['notes'][0]}." if data.get("notes") else ""
    parts = [
        "## What a swap costs the model beside it\n",
        paragraph(
            f"Time of the computation over its time alone, while transfers run without a break.{notes} "
            f"([{name}](../bench/results/{name}))"
        ),
        plot(name),
        table(["way", "direction", "computation", "`max_ctas`", "slowdown", "GB/s", "a 100 GB/s"], rows),
    ]
    if any(r["way"] == "traffic" for r in data["rows"]):
        parts.append(
            paragraph(
                "A step of decoding is bound by the GPU's memory, and so is its slowdown: the last column changes "
                "little with `max_ctas`, and is higher with very few thread blocks, which take long for the same "
                "bytes. So a lower limit trades the swap's speed for the model's. The memory traffic alone, "
                "without any codec, sets the floor; pages that are written cost more than pages that are read, "
                "and even the copy engine's writes cost something. A matrix product is bound by the "
                "multiprocessors: a codec's thread blocks run where it leaves some free, and the swap gives way "
                "first."
            )
        )
    return parts


def controller_section() -> list[str]:
    """Raw, encoded, and what the controller makes of them; and what checksums cost."""
    found = load("*_controller.json")
    if not found:
        return []
    name, data = found
    e = data["environment"]
    parts = [
        "## Raw, encoded, and the controller\n",
        paragraph(
            f"{e['gpu']}, {e['cpu']} with {e['cpu_cores']} cores, commit {e['commit']}. Microseconds that a caller "
            'waits for a store (out) and a load (in), medians; `latency` is an engine with `controller="latency"`, in '
            "turn with the others in an order drawn anew for each round, after it has seen some transfers of that "
            "size. A load takes the road of its store, so both count together: `over` is the median of a store and "
            "its load by the controller over the median by the better of raw and encoded, with the interval that 90 % "
            "of 1,000 resamples of the rounds are in. `again` is the better road measured a second time in the same "
            "rounds, over itself: what the method shows where nothing differs. `total` has the mean in place of the "
            "median, and so the transfers that measure the other road; `first` is the mean of the first ten after the "
            "bound, the size or the load has changed. Pages of 64 KiB; `noise` is random bits "
            f"([{name}](../bench/results/{name}), `bench/controller.py`). [How it chooses](explanation/controller.md)."
        ),
        *_controller_summary(data),
    ]
    places = {
        "idle": "GPU, nothing beside",
        "gemm-8192": "GPU, beside a product of 8192 x 8192 matrices without a pause",
        "decode-b8": "GPU, beside decoding steps without a pause",
        "host": "Host memory",
    }
    times: dict[tuple[str, str, int], dict[tuple[str, str], float]] = {}
    for row in (*data["rows"], *data["host_rows"]):
        case = times.setdefault((row["load"], row["profile"], row["pages"]), {})
        case[row["way"], row["direction"]] = row["us"]
    for load_name, title in places.items():
        rows = []
        for case in (*data["cases"], *data["host_cases"]):
            if case["load"] != load_name:
                continue
            us = times[load_name, case["profile"], case["pages"]]
            rows.append(
                [
                    *(case["profile"], f"{case['ratio']:.2f}", f"{case['pages']:,}"),
                    *(
                        " / ".join(f"{us[way, direction]:,.0f}" for way in ("raw", "encoded", "latency"))
                        for direction in ("out", "in")
                    ),
                    f"{case['over']:.2f} ({case['low']:.2f} to {case['high']:.2f})",
                    *(f"{value:.2f}" for value in (case["again"]["over"], case["total_over"], case["first_over"])),
                    f"{case['raw_part']:.0%}",
                ]
            )
        if rows:
            head = ["bound", "ratio", "pages", "out: raw / encoded / latency", "in: raw / encoded / latency"]
            parts += [f"### {title}\n", table([*head, "over", "again", "total", "first", "kept raw"], rows)]
    return [*parts, *_controller_objectives(data), *_checksums(data)]


VERDICTS = ("within", "unsure", "choice", "bookkeeping")  # of bench/controller.py


def _controller_summary(data: dict[str, Any]) -> list[str]:
    """How many cases are within 5 % of the better road."""
    sizes = {
        "GPU, up to 4 MiB": lambda case: case["raw_bytes"] <= 4 << 20,
        "GPU, 16 to 64 MiB": lambda case: 4 << 20 < case["raw_bytes"] <= 64 << 20,
        "GPU, 256 MiB and 1 GiB": lambda case: case["raw_bytes"] > 64 << 20,
    }
    groups = [(name, [case for case in data["cases"] if chosen(case)]) for name, chosen in sizes.items()]
    rows = []
    for name, cases in (*groups, ("host memory", data["host_cases"])):
        if not cases:
            continue
        row = [name, str(len(cases))]
        row += [str(sum(case["verdict"] == verdict for case in cases)) for verdict in VERDICTS]
        for each in (cases, [case["again"] for case in cases]):
            over = sorted(case["over"] for case in each)
            row += [f"{over[len(over) // 2]:.2f}", f"{over[-1]:.2f}"]
        row.insert(-2, str(sum(case["again"]["over"] <= 1.05 for case in cases)))
        rows.append(row)
    head = ["transfers", "cases", "within 5 %", "unsure", "by choice", "by bookkeeping", "median over", "worst over"]
    text = (
        "Of all cases below, those whose `over` is at most 1.05; those where it is more, but not the whole interval; "
        "and those that surely are not within 5 %: by the choice, where the stores that took the slower road explain "
        "most of it, or by bookkeeping. Beside that, what `again` shows:"
    )
    return [paragraph(text), table([*head, "again: within 5 %", "median", "worst"], rows)]


def _controller_objectives(data: dict[str, Any]) -> list[str]:
    """What the other objectives keep raw, and what a controller costs that never chooses otherwise."""
    parts = []
    cases: dict[tuple[str, int], dict[tuple[str, str], dict[str, Any]]] = {}
    for row in data.get("objective_rows", ()):
        cases.setdefault((row["profile"], row["pages"]), {})[row["way"], row["direction"]] = row
    ways = ("raw", "encoded", "latency", "balanced", "capacity")
    rows = [
        [
            *(profile, f"{pages:,}"),
            *(" / ".join(f"{case[way, direction]['us']:,.0f}" for way in ways) for direction in ("out", "in")),
            " / ".join(f"{case[way, 'out']['raw_part']:.0%}" for way in ways[2:]),
        ]
        for (profile, pages), case in cases.items()
    ]
    if rows:
        parts.append("### The other objectives\n")
        parts.append("Raw, encoded, and the objectives latency, balanced and capacity; nothing beside:\n")
        parts.append(table(["bound", "pages", "out, us", "in, us", "kept raw by the objectives"], rows))
    rows = [
        [f"{row['pages']}", row["direction"], row["way"], f"{row['us']:.1f}", f"{row['us_p10']:.1f}"]
        for row in data.get("overhead_rows", ())
    ]
    if rows:
        parts.append("### What a controller costs a small transfer\n")
        text = (
            "All encoded, without a controller (`none`) and with one that never chooses otherwise (`always`), in turn:"
        )
        parts += [paragraph(text), table(["pages", "direction", "way", "us", "p10"], rows)]
    return parts


def _checksums(data: dict[str, Any]) -> list[str]:
    cases: dict[tuple[str, int, str], dict[bool, dict[str, Any]]] = {}
    for row in data.get("checksum_rows", ()):
        cases.setdefault((row["load"], row["pages"], row["coding"]), {})[row["checked"]] = row
    rows = [
        [*(load_name, f"{pages:,}", coding), f"{case[True]['us']:,.0f}", f"{case[False]['us']:,.0f}",
         f"{case[True]['us'] / case[False]['us']:.2f}"]
        for (load_name, pages, coding), case in cases.items()
    ]  # fmt: skip
    text = (
        "Loads on the GPU by an engine that verifies every checksum and by one that verifies none "
        "(`Integrity(checksum=0.0)`), in turn, medians in microseconds. Small loads are always verified."
    )
    on_gpu = [paragraph(text), table(["beside", "pages", "records", "verified", "not verified", "over"], rows)]
    parts = [*(on_gpu if rows else []), *_host_checksums()]
    return ["### What checksums cost\n", *parts] if parts else []


def _host_checksums() -> list[str]:
    found = load("checksums_host.json")
    if found is None:
        return []
    name, data = found
    cases: dict[str, dict[Any, float]] = {}
    for row in data["rows"]:
        cases.setdefault(row["bound"], {})[row.get("checked", "crc")] = row["gb_per_s"]
    rows = [[bound, *(f"{case[part]:.2f}" for part in (1.0, 0.1, 0.0)), f"{case['crc']:.0f}"]
            for bound, case in cases.items()]  # fmt: skip
    least = min(case["crc"] for case in cases.values())
    text = (
        f"On the host, one thread of an {data['environment']['cpu']}, GB/s by its CPU time, medians: loads of raw "
        "bytes that verify every checksum, one in ten, or none, and CRC32C alone on the bytes of records. A thread "
        f"verifies about {least:.0f} GB/s of records, several times less than a PCIe 5.0 link moves, so what goes to a "
        f"GPU is verified there ([{name}](../bench/results/{name}), `bench/checksums.py`)."
    )
    return [paragraph(text), table(["bound", "all", "one in ten", "none", "CRC32C"], rows)]


def pinned_section() -> list[str]:
    """Filling and pinning a pool."""
    found = load("*_pool.json")
    if not found:
        return []
    name, data = found
    rows = [[r["way"], f"{r['bytes'] / 2**30:.0f} GiB", f"{r['ms_per_gib']:.0f}"] for r in data["rows"]]
    parts = [
        "## Pinned memory\n",
        f"([{name}](../bench/results/{name}))\n",
        table(["way", "size", "ms per GiB"], rows),
    ]
    if data.get("memory_rows"):
        parts += [
            paragraph(
                "Memory that an engine holds beside the pool, with the default `Staging`, MiB. On the device: in all; "
                "of it staging arenas, workspaces and tables; and what CUDA takes by itself for kernels (code, local "
                "memory) and streams. On the host: pinned tables."
            ),
            table(
                ["after", "device", "staging and tables", "CUDA's own", "pinned on the host so far"],
                [
                    [
                        r["what"],
                        *(
                            f"{r[key] / 2**20:.0f}"
                            for key in ("device_bytes", "allocated_bytes", "other_bytes", "pinned_host_bytes_so_far")
                        ),
                    ]
                    for r in data["memory_rows"]
                ],
            ),
        ]
    return parts


def sessions_section() -> list[str]:
    """Sessions that come back in vLLM."""
    found = load("*_vllm_sessions.json")
    if not found:
        return []
    name, data = found
    e, rows = data["environment"], data["rows"]
    parts = [
        "## Sessions that come back in vLLM\n",
        paragraph(
            f"vLLM {e['vllm']}, geometry of {e['geometry']}, {e['weights']} weights, eager; {e['gpu']}, PCIe "
            f"{e['pcie_link_gen_max']}.0 x{e['pcie_link_width_current']}, driver {e['driver_version']}. Values of the "
            f"pages: {e['kv_values']}. `native` is vLLM's own CPU offloading, in the same run. How each load is made "
            f"stands in `bench/vllm_sessions.py` ([{name}](../bench/results/{name})). Times are medians."
        ),
        plot(name),
        "Sessions are asked for in turn, one at a time; host memory for half of the long ones, or for all:\n",
        table(
            [
                "sessions x tokens",
                "host GiB",
                "tier",
                "bound",
                "ratio",
                "cold",
                "return",
                "p10 to p90",
                "cached",
                "load",
            ],
            [
                [
                    *(f"{r['sessions']} x {r['tokens']:,}", f"{r['budget_gib']:g}", r["tier"], r["bound"]),
                    *(f"{r['ratio']:.2f}", f"{r['ttft_cold_ms']:,.0f} ms", f"**{r['ttft_return_ms']:,.0f} ms**"),
                    f"{r['ttft_return_p10_ms']:,.0f} to {r['ttft_return_p90_ms']:,.0f}",
                    f"{r['cached_fraction']:.0%}",
                    f"{r['load_ms']:.0f} ms" if r["load_ms"] else "",
                ]
                for r in _sessions_in_turn(rows)
            ],
        ),
        paragraph(
            "cold: the first time; load: what the tier says that its transfers took. The rest of a return are vLLM's "
            "own steps: the one that asks for the load, and the one that computes the last token. kvzip's tiers ran in "
            f"one process, {next(r['tier'] for r in rows if r['tier'] != 'native')} first. With raw or lossless "
            "records half of the memory holds too little, as with "
            "native: in turn, each session is evicted before it comes back."
        ),
    ]
    loops = [r for r in rows if r["load"] == "open loop"]
    if loops:
        about = loops[0]
        parts += [
            paragraph(
                f"{about['sessions']} sessions of {about['tokens']:,} tokens, {about['arrivals_per_s']:g} requests a "
                f"second for {about['window_seconds']:.0f} s whether or not the earlier ones are done, "
                f"{about['budget_gib']:g} GiB of host memory:"
            ),
            table(
                ["tier", "served a second", "TTFT p50", "TTFT p95", "not begun", "cached"],
                [
                    [
                        *(r["tier"], f"{r['served_per_s']:.1f}", f"{r['ttft_p50_ms']:,.0f} ms"),
                        *(f"{r['ttft_p95_ms']:,.0f} ms", f"{r['not_begun']} of {r['arrived']}"),
                        f"{r['cached_fraction']:.0%}",
                    ]
                    for r in loops
                ],
            ),
        ]
    stores = [r for r in rows if r["load"] == "stores only"]
    if stores:
        about = stores[0]
        parts += [
            f"{about['sessions']} prompts of {about['tokens']:,} tokens at once that share nothing:\n",
            table(["tier", "prompt tokens a second"], [[r["tier"], f"{r['tokens_per_s']:,.0f}"] for r in stores]),
        ]
    return parts


def _sessions_in_turn(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Long sessions with little memory first, and vLLM's own tier before kvzip's."""
    own = [r for r in rows if r["load"] == "round robin"]
    return sorted(own, key=lambda r: (-r["tokens"], r["budget_gib"], r["tier"] != "native"))


def conversation_section() -> list[str]:
    """Whether answers stay the same when a conversation comes back."""
    found = load("vllm_conversation.json")
    if not found:
        return []
    name, data = found
    e = data["environment"]
    return [
        "## Conversations that come back in vLLM\n",
        paragraph(
            f"{data['model']} in vLLM {e['vllm']} on the CPU, {e['dtype']}: each turn's history comes from the tier, "
            "and its greedy answer is compared with the one that was computed without a tier "
            f"(`bench/vllm_conversation.py`, [{name}](../bench/results/{name})). Ratios are those of {e['dtype']}."
        ),
        table(
            ["tier", "ratio", "cached", "same answers", "same tokens", "tokens before the first difference"],
            [
                [
                    *(r["tier"], f"{r['ratio']:.2f}", f"{r['cached_fraction']:.0%}"),
                    *(f"{r['same_turns']} of {r['turns']}", f"{r['same_tokens']} of {r['tokens']}"),
                    f"{r['agreed_before']:.1f}",
                ]
                for r in data["rows"]
            ],
        ),
    ]


def transformers_section() -> list[str]:
    """`CompressedCache` beside the caches of transformers."""
    parts: list[str] = []
    for name, data in filter(None, (load("h100_transformers_cache.json"), load("transformers_cache.json"))):
        e, rows = data["environment"], data["rows"]
        on_gpu = "gpu" in e
        where = e["gpu"] if on_gpu else f"{e['cpu'].replace('(R)', '')}, one thread"
        parts.append(
            paragraph(
                f"{where}: {e['model']}, {e['dtype']}, {e['attention']}; torch {e['torch']}, transformers "
                f"{e['transformers']}, blocks of {e['block_tokens']} tokens ([{name}](../bench/results/{name})). "
                + (
                    "`between` is what is allocated between two steps, `peak` the most within one, `beside` what the "
                    "transfers take outside of torch. The values are noise, which compresses less than a model's, and "
                    "the text of random weights changes as a whole with the first value: its last column tells exact "
                    "from inexact, no more."
                    if on_gpu
                    else "The machine is small and shared: the time is that of the process's thread, which other "
                    "programs do not add to. The ratios are those of float32."
                )
            )
        )
        head = ["cache", *(["between", "peak", "beside"] if on_gpu else ["cache's tensors"]), "pool or host"]
        head += ["ms a token (p10-p90)" if on_gpu else "CPU ms a token", "the dynamic cache's tokens"]
        for length in sorted({r["tokens"] for r in rows}):
            cells = []
            for r in (r for r in rows if r["tokens"] == length):
                sizes = [r["device_bytes"], *((r["peak_bytes"], r["staging_bytes"]) if on_gpu else ()), r["host_bytes"]]
                spread = f"{r['us'] / 1e3:.1f} ({r['us_p10'] / 1e3:.1f}-{r['us_p90'] / 1e3:.1f})"
                cells.append(
                    [
                        *(r["cache"], *(f"{size / 2**20:,.1f} MiB" for size in sizes)),
                        spread if on_gpu else f"{r['cpu_ms_per_token']:.0f}",
                        f"{r['same_tokens']} of {r['of']}",
                    ]
                )
            parts += [f"Behind {length:,} tokens:\n", table(head, cells)]
        if on_gpu and "without cuDNN" not in e["attention"]:
            parts.append(
                paragraph(
                    "The dynamic cache ran first at each length. We take it that its time has the planning of cuDNN in "
                    "it, which every new length needs and the others found done: do not compare it."
                )
            )
        wrong = [r for r in rows if r["cache"] == "offloaded" and r["same_tokens"] < r["of"]]
        if wrong:
            lengths = " and ".join(f"{r['tokens']:,}" for r in wrong)
            parts.append(
                paragraph(
                    f"The offloaded cache of transformers is exact by design; behind {lengths} tokens it was not."
                )
            )
        if data["notes"]:
            parts.append(
                paragraph("Not measured: " + ", ".join(dict.fromkeys(n.split(",")[0] for n in data["notes"])) + ".")
            )
        parts.append(plot(name.removesuffix(".json")))
    return ["## A compressed cache in transformers\n", *parts] if parts else []


def fidelity() -> str:
    """The figures of ``docs/fidelity.md``: what schemes do to a model, against their ratio."""
    parts: list[str] = []
    for path in sorted(RESULTS.glob("fidelity_*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        e = data["environment"]
        needles = data["reference_needle"]
        recalled = "" if needles is None else f" The exact cache recalls {needles:.0%} of the needles."
        parts += [
            f"## {data['model']}\n",
            paragraph(
                f"{len(e['texts'])} texts ({', '.join(e['texts'])}), {data['prefix']:,} swapped tokens and "
                f"{data['continuation']} behind them in each; {e['dtype']}; torch {e['torch']}, transformers "
                f"{e['transformers']}, {e['device']}, {e['time'][:10]} "
                f"([{path.name}](../bench/results/{path.name})).{recalled}"
            ),
            plot(path.name),
            table(
                ["scheme", "ratio", "KL", "KL p99.9", "top-1", "dNLL", "greedy", "needles"],
                [_fidelity_row(row, data["limit"]) for row in data["rows"]],
            ),
            paragraph(f"Bold: ratio of kvzip's schemes whose KL is not above fp8's, {data['limit']:.2e}."),
            *_steps({row["scheme"]: row for row in data["rows"]}, data["limit"]),
        ]
    return "\n".join(parts)


def _steps(rows: dict[str, dict[str, Any]], limit: float) -> list[str]:
    """What each step on the way to the best scheme is worth, in bits and in KL."""
    if not set(STEPS.values()) <= set(rows):
        return []
    lines = []
    before = None
    for step, name in STEPS.items():
        bits = 16 / rows[name]["ratio"]
        equal = bits + math.log2(rows[name]["kl"] / limit) / 2
        gain = "" if before is None else f"{before - equal:.2f}"
        lines.append([step, name, f"{bits:.2f}", f"{rows[name]['kl']:.2e}", f"{equal:.2f}", gain])
        before = equal
    return [
        "### What each step gained\n",
        paragraph(
            "Each row adds one step to the one above. The steps were measured with bounds of other sizes, so the last "
            "but one column brings them to one divergence, that of fp8: bounds twice as large save a bit and cost four "
            "times the KL. What the parts of the codes are worth, and what was tried and dropped, is in "
            "[where the bits go](explanation/rate.md)."
        ),
        table(["step", "scheme", "bits a value", "KL", f"bits at KL {limit:.2e}", "gain"], lines),
    ]


def bounds() -> str:
    """The figures of ``docs/guides/choose-a-bound.md``."""
    found = load("fidelity_smollm2.json")
    assert found
    name, data = found
    text = (
        f"SmolLM2-135M, {data['prefix']:,} swapped tokens of {len(data['environment']['texts'])} texts "
        f"([all schemes](../fidelity.md), [conditions](../../bench/results/{name}))."
    )
    return f"{_shown_schemes(data)}\n{paragraph(text)}"


def _shown_schemes(data: dict[str, Any]) -> str:
    by_name = {row["scheme"]: row for row in data["rows"]}
    return table(
        ["keys and values of a prefix, swapped", "ratio", "mean KL", "same most likely token"],
        [
            [label, f"{by_name[s]['ratio']:.2f}", f"{by_name[s]['kl']:.1e}", f"{by_name[s]['top1']:.1%}"]
            for s, label in SHOWN.items()
            if s in by_name
        ],
    )


def _fidelity_row(row: dict[str, Any], limit: float) -> list[str]:
    ratio = f"{row['ratio']:.2f}"
    return [
        row["scheme"],
        f"**{ratio}**" if row["own"] and row["kl"] <= limit else ratio,
        f"{row['kl']:.2e}",
        f"{row['kl_p999']:.2e}",
        f"{row['top1']:.1%}",
        f"{row['dnll']:+.4f}",
        f"{row['greedy']:.0%}",
        "" if row["needle"] is None else f"{row['needle']:.0%}",
    ]


def rate() -> str:
    """The tables of ``docs/explanation/rate.md``."""
    found = load("rate.json")
    if found is None:
        return ""
    caches = found[1]["caches"]
    names = list(caches)
    parts = ["## The modes\n"]
    head = [
        "bound",
        *(f"{n.split('_')[1]}: fixed" for n in names),
        *(f"{n.split('_')[1]}: rice" for n in names),
        "gain",
    ]
    rows = []
    for number, row in enumerate(caches[names[0]]):
        each = [caches[n][number]["modes"] for n in names]
        gains = [m["fixed"] / m["rice"] - 1 for m in each]
        rows.append(
            [
                f"{row['kind'].upper()} {row['scheme']}",
                *(f"{m['fixed']:.2f}" for m in each),
                *(f"{m['rice']:.2f}" for m in each),
                f"{min(gains):.0%} to {max(gains):.0%}",
            ]
        )
    parts.append(table(head, rows))
    parts.append("## Steps and alternatives, prose\n")
    tried = [r for r in caches[names[0]] if r["alternatives"] and r["scheme"] in ("page 0.01", "attn 0.4", "rms 0.17")]
    rows = [[name, *(f"{r['alternatives'][name]:.2f}" for r in tried)] for name in tried[0]["alternatives"]]
    parts.append(table(["code", *(f"{r['kind'].upper()} {r['scheme']}" for r in tried)], rows))
    parts.append(paragraph("Counted without padding, lengths of strips, table entries and scale bytes."))
    return "\n".join(parts)


def lmcache() -> str:
    """The table of ``docs/guides/lmcache.md``."""
    found = load("lmcache_chunks.json")
    if found is None:
        return ""
    environment, rows = found[1]["environment"], found[1]["rows"]
    lines = [
        [
            name,
            f"{row['ratio']:.2f}",
            *(
                f"{row[f'max_error_over_range_{kind}']:.4f}" if row[f"max_error_over_range_{kind}"] else "0"
                for kind in "kv"
            ),
        ]
        for name, row in rows.items()
    ]
    about = (
        f"Largest errors are parts of the range of a page. Keys and values of SmolLM2-135M on prose, chunks of "
        f"{environment['chunk']}; LMCache {environment['lmcache']} "
        "([conditions](../../bench/results/lmcache_chunks.json))."
    )
    return table(["serde", "ratio", "largest error, K", "V"], lines) + "\n" + paragraph(about)


def _fuzz_runs(pattern: str) -> tuple[dict[str, Any], int, int, int, str] | None:
    """Environment of runs with several seeds, their cases, how many were refused and accepted, and links to them."""
    files = sorted(RESULTS.glob(pattern))
    if not files:
        return None
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    cases, refused, accepted = (sum(run[what] for run in runs) for what in ("cases", "refused", "accepted"))
    links = ", ".join(
        f"[seed {r['settings']['seed']}](../../bench/results/{f.name})" for f, r in zip(files, runs, strict=True)
    )
    return runs[0]["environment"], cases, refused, accepted, links


def faults() -> str:
    """What ``docs/reference/faults.md`` says of long runs; a list, as its tables name a test in every row."""
    lines = []
    if (found := load("soak.json")) is not None:
        name, data = found
        first = max(process[1]["rss_kib"] for process in data["resources"])
        last = max(process[-1]["rss_kib"] for process in data["resources"])
        lines.append(
            f"**Soak**: {data['operations']:,} random operations on {data['settings']['episodes']:,} engines, on host "
            f"memory and on a GPU made of it, {data['faults']:,} faults of {len(data['faults_by_kind'])} kinds among "
            f"them: contents, sums and evictions were those of the model, and nothing was left over. A process took "
            f"{first / 1024:.1f} MiB after a quarter of it and {last / 1024:.1f} MiB at the end "
            f"([all of it](../../bench/results/{name}))."
        )
    if (several := _fuzz_runs("fuzz_cpu*.json")) is not None:
        _, cases, refused, accepted, links = several
        lines.append(
            f"**Records against the CPU decoder**: {cases:,} damaged, cut, spliced and forged records under "
            f"AddressSanitizer and UndefinedBehaviorSanitizer; {refused:,} were refused, and the reference codec reads "
            f"the other {accepted:,} as kvzip does ({links})."
        )
    if (found := load("fuzz_gpu_*.json")) is not None:
        name, data = found
        lines.append(
            f"**Records against the CUDA decoder**: {data['cases']:,} in {data['launches']:,} launches on an "
            f"{data['environment']['gpu']}; the verdicts ({data['refused']:,} refused) and the values were those of "
            f"the CPU decoder, and no byte beside the pages changed ([all of it](../../bench/results/{name}))."
        )
    if (several := _fuzz_runs("fuzz_small_*.json")) is not None:
        environment, cases, refused, _, links = several
        lines.append(
            f"**Records in small transfers to a GPU**: {cases:,} on an {environment['gpu']}; the verdicts ({refused:,} "
            f"refused) and the values were those of loads into host memory, and no other block changed ({links})."
        )
    if (found := load("memcheck_*.json")) is not None:
        name, data = found
        lines.append(
            f"**The same under compute-sanitizer's memcheck**: {data['cases']:,} in {data['launches']:,} launches, "
            f"{data['refused']:,} refused, no error ([all of it](../../bench/results/{name}))."
        )
    items = [
        textwrap.fill(line, 120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False) for line in lines
    ]
    return "\n".join(items) + "\n"


def replaced(text: str, figures: Sequence[str]) -> str:
    """A document with other figures between its pairs of marks, in their order."""
    done = ""
    for part in figures:
        before, _, rest = text.partition(BEGIN)
        _, _, text = rest.partition(END)
        done += f"{before}{BEGIN}\n\n{part}\n{END}"
    return done + text


def documents() -> dict[str, Sequence[str]]:
    """The figures between the pairs of marks of documents, by their paths."""
    return {
        "README.md": (headlines(), readme()),
        "docs/fidelity.md": (fidelity(),),
        "docs/explanation/rate.md": (rate(),),
        "docs/guides/choose-a-bound.md": (bounds(),),
        "docs/guides/lmcache.md": (lmcache(),),
        "docs/reference/faults.md": (faults(),),
    }


def main() -> None:
    """Write the documents."""
    for name, figures in documents().items():
        path = ROOT / name
        path.write_text(replaced(path.read_text(encoding="utf-8"), figures), encoding="utf-8")
    (ROOT / "docs" / "performance.md").write_text(performance(), encoding="utf-8")
    subprocess.run([sys.executable, str(ROOT / "bench" / "planner_rates.py")], check=True)


if __name__ == "__main__":
    main()
