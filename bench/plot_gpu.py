# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Draws what bench/gpu_transport.py and bench/vllm_sessions.py measured, from their JSON files alone.

Run ``python bench/plot_gpu.py bench/results`` (needs matplotlib). Beside every ``<gpu>_transport.json``,
``<gpu>_interference.json`` and ``<gpu>_vllm_sessions.json`` in the folder it writes a PNG and an SVG of the same name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

COLOURS = {
    "kvzip-1e-2": "#b2182b",
    "kvzip-1e-3": "#ef6548",
    "kvzip-lossless": "#fdae61",
    "raw-link": "#000000",
    "raw-batch": "#525252",
    "raw-gather": "#969696",
    "raw-loop": "#c0c0c0",
    "nvcomp-ans": "#1b7837",
    "fp8": "#2166ac",
    "int8": "#67a9cf",
}


def size_name(nbytes: float) -> str:
    """``65536`` is ``"64 KiB"``."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):g} {unit}"
    return f"{nbytes:g} B"


def subtitle(environment: Row) -> str:
    """What the figures depend on, in a line."""
    link = environment.get("pcie_link_gen_max")
    parts = [environment.get("gpu", ""), f"PCIe {link} x{environment.get('pcie_link_width_current')}" if link else ""]
    parts += [f"driver {environment['driver_version']}" if "driver_version" in environment else ""]
    parts += [str(environment.get("time", ""))[:10], str(environment.get("commit", ""))[:10]]
    return ", ".join(p for p in parts if p)


def transport(pyplot: Any, content: Row) -> Any:
    """GB/s of raw bytes against the size of a transfer, out and in."""
    rows: list[Row] = content["rows"]
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for panel, direction, title in zip(panels, ("out", "in"), ("GPU to host", "host to GPU"), strict=True):
        own = [r for r in rows if r["direction"] == direction]
        found = {r["way"] for r in own}
        for way in [w for w in COLOURS if w in found] + sorted(found - set(COLOURS)):
            points = sorted((r for r in own if r["way"] == way), key=lambda r: r["raw_bytes"])
            sizes = [r["raw_bytes"] for r in points]
            ratio = points[-1]["ratio"]
            label = way if abs(ratio - 1) < 0.005 else f"{way} (ratio {ratio:.2f})"
            low, high = ([r["raw_bytes"] / r[key] / 1e3 for r in points] for key in ("us_p90", "us_p10"))
            colour = COLOURS.get(way)
            width = 2.2 if way.startswith("kvzip") else 1.3
            style = "--" if way == "raw-link" else "-"
            (line,) = panel.plot(
                sizes, [r["gb_per_s"] for r in points], style, marker="o", ms=3.5, lw=width, color=colour, label=label
            )
            panel.fill_between(sizes, low, high, color=line.get_color(), alpha=0.12, lw=0)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        ticks = sorted({r["raw_bytes"] for r in own})
        panel.set_xticks(ticks, [size_name(t) for t in ticks], rotation=30)
        panel.minorticks_off()
        panel.set_yticks([1, 2, 5, 10, 20, 50, 100, 200, 500], ["1", "2", "5", "10", "20", "50", "100", "200", "500"])
        if own:
            panel.set_ylim(min(r["gb_per_s"] for r in own) * 0.8, max(r["gb_per_s"] for r in own) * 1.3)
        panel.set_title(title)
        panel.set_xlabel("raw bytes of a transfer, in scattered pages of 64 KiB")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="lower right")
    panels[0].set_ylabel("GB/s of raw bytes, as a caller sees it (median; band p10-p90)")
    figure.suptitle("Swapping KV pages: " + subtitle(content["environment"]), fontsize=11)
    return figure


def interference(pyplot: Any, content: Row) -> Any:
    """How much longer a computation takes beside a swap; a panel for each computation and priority of its stream."""
    rows: list[Row] = content["rows"]
    kinds = list(dict.fromkeys((r["compute"], r.get("compute_priority", 0)) for r in rows))
    most = max(sum((r["compute"], r.get("compute_priority", 0)) == k for r in rows) for k in kinds)
    figure, panels = pyplot.subplots(
        len(kinds),
        1,
        figsize=(9, 1.2 + len(kinds) * (0.9 + 0.26 * most)),
        layout="constrained",
        squeeze=False,
        sharex=True,
    )
    for panel, kind in zip(panels[:, 0], kinds, strict=True):
        own = [r for r in rows if (r["compute"], r.get("compute_priority", 0)) == kind]
        for at, row in enumerate(own):
            extra = (row["slowdown"] - 1) * 100
            panel.barh(
                at, extra, color=COLOURS.get(row["way"], "#777777"), alpha=1 if row["direction"] == "out" else 0.55
            )
            text = f"{extra:+.1f} %, swap {row['gb_per_s']:.0f} GB/s"
            panel.text(max(extra, 0), at, " " + text, va="center", fontsize=8)
        labels = [
            f"{r['way']} {r['direction']}" + (f", {r['max_ctas']} CTAs" if r.get("max_ctas") else "") for r in own
        ]
        panel.set_yticks(range(len(own)), labels, fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.35)
        panel.axvline(0, color="black", lw=0.8)
        panel.grid(axis="x", alpha=0.3)
        panel.set_title(f"{kind[0]}, its stream's priority {kind[1]}", fontsize=10)
    panels[-1, 0].set_xlabel("longer than alone, %")
    figure.suptitle("Computing beside a swap: " + subtitle(content["environment"]), fontsize=11)
    return figure


def vllm_sessions(pyplot: Any, content: Row) -> Any:
    """Time to the first token of sessions that come back, a panel a load and host budget."""
    rows = [r for r in content["rows"] if r["load"] == "round robin"]
    loads = list(dict.fromkeys((r["sessions"], r["tokens"], r["budget_gib"]) for r in rows))
    figure, panels = pyplot.subplots(
        1, len(loads), figsize=(4.5 * len(loads), 3.6), squeeze=False, layout="constrained"
    )
    for panel, load in zip(panels[0], loads, strict=True):
        own = [r for r in rows if (r["sessions"], r["tokens"], r["budget_gib"]) == load]
        for at, row in enumerate(own):
            panel.barh(at, row["ttft_return_ms"], color="black" if row["tier"] == "native" else "#ef6548")
            text = f" {row['ttft_return_ms']:,.0f} ms, {row['cached_fraction']:.0%} cached"
            panel.text(row["ttft_return_ms"], at, text, va="center", fontsize=8)
        panel.axvline(max(r["ttft_cold_ms"] for r in own), color="gray", ls="--", lw=0.8)
        panel.set_yticks(range(len(own)), [r["tier"] for r in own], fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.5)
        panel.set_title(f"{load[0]} x {load[1]:,} tokens, {load[2]:g} GiB", fontsize=10)
        panel.set_xlabel("TTFT on return, ms (dashed: cold)")
    figure.suptitle("Sessions that come back in vLLM: " + subtitle(content["environment"]), fontsize=11)
    return figure


PLOTS = {"transport": transport, "interference": interference, "vllm_sessions": vllm_sessions}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="with <gpu>_transport.json and the like")
    options = parser.parse_args(argv)
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kvzip"  # the same file from the same figures
    from matplotlib import pyplot

    written = 0
    for name, draw in PLOTS.items():
        for path in sorted(options.folder.glob(f"*_{name}.json")):
            content = json.loads(path.read_text())
            if not content["rows"]:
                print(f"{path.name} has no rows", file=sys.stderr)
                continue
            figure = draw(pyplot, content)
            for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
                figure.savefig(path.with_suffix(suffix), dpi=130, metadata=metadata)
                print(path.with_suffix(suffix))
                written += 1
            pyplot.close(figure)
    if not written:
        print(f"nothing to draw in {options.folder}: run bench/gpu_transport.py first", file=sys.stderr)
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
