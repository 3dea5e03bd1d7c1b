# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Pictures of what the commands and the benchmarks write. Needs matplotlib (the extra ``bench``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvzip.errors import BackendUnavailableError, ConfigError
from kvzip.planner import BREAK_EVENS

Row = dict[str, Any]

COLOURS = {
    "kvzip-1e-2": "#b2182b",
    "kvzip-1e-3": "#ef6548",
    "kvzip-default": "#7f0000",
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
            return f"{nbytes / (1 << shift):.3g} {unit}"
    return f"{nbytes:g} B"


def subtitle(environment: Row) -> str:
    """What the figures depend on, in a line."""
    link = environment.get("pcie_link_gen_max")
    parts = [
        environment.get("gpu", environment.get("cpu", "")),
        f"PCIe {link} x{environment.get('pcie_link_width_current')}" if link else "",
    ]
    parts += [f"driver {environment['driver_version']}" if "driver_version" in environment else ""]
    parts += [str(environment.get("time", ""))[:10], str(environment.get("commit", ""))[:10]]
    return ", ".join(p for p in parts if p)


def bandwidth(pyplot: Any, content: Row) -> Any:
    """GB/s of raw bytes against the size of a transfer, out and in."""
    rows: list[Row] = content["rows"]
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for panel, direction, title in zip(panels, ("out", "in"), ("out: stores", "in: loads"), strict=True):
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
        levels = [f"{digit}e{power}" for power in range(-2, 4) for digit in (1, 2, 5)]
        panel.set_yticks([float(level) for level in levels], [f"{float(level):g}" for level in levels])
        if own:
            panel.set_ylim(min(r["gb_per_s"] for r in own) * 0.8, max(r["gb_per_s"] for r in own) * 1.3)
        panel.set_title(title)
        panel.set_xlabel("raw bytes of a transfer")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="lower right")
    panels[0].set_ylabel("GB/s of raw bytes (median; band p10-p90)")
    figure.suptitle("Swapping KV pages: " + subtitle(content["environment"]), fontsize=11)
    return figure


def fidelity(pyplot: Any, content: Row) -> Any:
    """Mean KL against ratio, a point a scheme, from what ``kvzip verify --json`` and bench/fidelity.py write."""
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    lines: dict[str, Callable[[str], bool]] = {
        "kvzip weighed, rice": lambda n: n.startswith("weighed") and n.endswith("rice"),
        "kvzip weighed, fixed": lambda n: n.startswith("weighed") and n.endswith("fixed"),
        "kvzip calibrated, rice": lambda n: n.startswith("calibrated") and n.endswith("rice"),
        "kvzip calibrated, fixed": lambda n: n.startswith("calibrated") and n.endswith("fixed"),
        "kvzip relative to the page": lambda n: n.startswith("relative"),
    }
    left = {row["scheme"]: row for row in content["rows"] if row["kl"] > 0}
    for label, belongs in lines.items():
        rows = [left.pop(name) for name in list(left) if belongs(name)]
        if rows:
            axes.plot([r["ratio"] for r in rows], [r["kl"] for r in rows], "o-", markersize=4, label=label)
    for number, (name, row) in enumerate(left.items()):
        axes.plot(row["ratio"], row["kl"], "s" if row["own"] else "D", color="C3" if row["own"] else "black", ms=5)
        place = (6, -10 if number % 2 else 4)
        axes.annotate(name, (row["ratio"], row["kl"]), xytext=place, textcoords="offset points", fontsize=7)
    axes.axhline(content["limit"], color="gray", linestyle="--", linewidth=1, label="fp8")
    axes.set(yscale="log", xlabel="ratio, everything counted", ylabel="mean KL to the exact cache, nats")
    axes.set_title(
        f"{content['model']}, {content['prefix']} tokens swapped, {content['positions']} positions", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def break_even(pyplot: Any, content: Row) -> Any:
    """Time of swaps and of a prefill against the length of a sequence, from what ``kvzip plan --json`` writes."""
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    rows = content["rows"]
    tokens = [r["tokens"] for r in rows]
    for key, label, style in (
        ("store_raw_seconds", "store, raw", "k:"),
        ("store_encoded_seconds", f"store, ratio {content['ratio']:.2f}", "C3:"),
        ("load_raw_seconds", "load, raw", "k-"),
        ("load_encoded_seconds", f"load, ratio {content['ratio']:.2f}", "C3-"),
        ("recompute_seconds", "recompute", "C0--"),
    ):
        if rows[0][key] is not None:
            axes.plot(tokens, [r[key] * 1e3 for r in rows], style, label=label)
    for height, (name, at) in zip((0.97, 0.9, 0.83), content["break_even_tokens"].items(), strict=True):
        if at is not None and tokens[0] <= at <= tokens[-1]:
            axes.axvline(at, color="gray", linewidth=0.8)
            place = ("data", "axes fraction")
            axes.annotate(f" {BREAK_EVENS[name]} from {at:,} on", (at, height), xycoords=place, fontsize=8, va="top")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms, estimated")
    axes.set_title(f"{content['bound']}, mode {content['mode']}; rates of {content['machine']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def load_pyplot() -> Any:
    """Matplotlib's pyplot, for files alone.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise BackendUnavailableError("plots need matplotlib: pip install 'kvzip[bench]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kvzip"  # the same file from the same figures
    from matplotlib import pyplot

    return pyplot


def save(draw: Callable[[Any, Row], Any], content: Row, path: Path) -> None:
    """Draw a picture into a file; its suffix says the format.

    Args:
        draw: one of this module's pictures.
        content: the results.
        path: the file, ``.png``, ``.svg`` or ``.pdf``.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
        ConfigError: the suffix is none of these.
    """
    metadata = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}  # no date
    if path.suffix not in metadata:
        raise ConfigError(f"{path} is no picture: use a name that ends in .png, .svg or .pdf")
    pyplot = load_pyplot()
    figure = draw(pyplot, content)
    figure.savefig(path, dpi=130, metadata=metadata[path.suffix])
    pyplot.close(figure)
