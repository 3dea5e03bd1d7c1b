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

from kvzip import plots
from kvzip.plots import COLOURS, subtitle

Row = dict[str, Any]


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


PLOTS = {"transport": plots.bandwidth, "interference": interference, "vllm_sessions": vllm_sessions}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="with <gpu>_transport.json and the like")
    options = parser.parse_args(argv)
    written = 0
    for name, draw in PLOTS.items():
        for path in sorted(options.folder.glob(f"*_{name}.json")):
            content = json.loads(path.read_text())
            if not content["rows"]:
                print(f"{path.name} has no rows", file=sys.stderr)
                continue
            for suffix in (".png", ".svg"):
                plots.save(draw, content, path.with_suffix(suffix))
                print(path.with_suffix(suffix))
                written += 1
    if not written:
        print(f"nothing to draw in {options.folder}: run bench/gpu_transport.py first", file=sys.stderr)
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
