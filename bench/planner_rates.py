# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The constants of ``kvzip plan`` (kvzip/data/planner.json), fitted to the results of the other benchmarks.

``docs/make_figures.py`` calls this after a benchmark has written to ``bench/results/``.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvzip.planner import Curve, Line, Model
from kvzip.staging import Staging

RESULTS = Path(__file__).parent / "results"
TABLE = Path(__file__).parents[1] / "kvzip" / "data" / "planner.json"
DIRECTIONS = ("out", "in")
FIXED = ("kvzip-1e-3", "kvzip-1e-2", "kvzip-lossless")  # ways with codes of fixed length
RICE = ("kvzip-uncalibrated-rice", "kvzip-calibrated-rice")
SMALL_BYTES = Staging().small_bytes  # up to here transfers are queued whole, beyond they go in chunks
LARGE_BYTES = 256 << 20  # of a copy that reaches the link's rate
LLAMA_8B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
}

Row = dict[str, Any]


def read(name: str) -> Row:
    return dict(json.loads((RESULTS / name).read_text(encoding="utf-8")))


def fit(rows: list[Row]) -> Line:
    """The line of least relative squares; none of its constants is negative."""
    seconds = np.array([r["us"] for r in rows]) * 1e-6
    raw = np.array([r["raw_bytes"] for r in rows], float)
    encoded = raw / np.array([r["ratio"] for r in rows])
    columns = np.stack([np.ones_like(seconds), encoded, raw], 1) / seconds[:, None]
    scale = np.linalg.norm(columns, axis=0)
    free = [0, 1, 2]
    while True:  # three constants: leave out what comes out negative, until nothing does
        found, *_ = np.linalg.lstsq(columns[:, free] / scale[free], np.ones_like(seconds), rcond=None)
        if (found >= 0).all():
            break
        free.remove(free[int(np.argmin(found))])
    constants = np.zeros(3)
    constants[free] = found / scale[free]
    return Line(*(float(c) for c in constants))


def curve(rows: list[Row], like: Curve | None = None) -> Curve:
    """A line each for transfers that are queued whole and for those that go in chunks.

    Where few small ones were measured, their line is that of `like`, moved.
    """
    small = [r for r in rows if r["raw_bytes"] <= SMALL_BYTES]
    large = [r for r in rows if r["raw_bytes"] > SMALL_BYTES]
    ends = max(r["raw_bytes"] for r in small), min(r["raw_bytes"] for r in large)
    if like is None:
        return Curve(fit(small), fit(large), *ends)
    more = statistics.median(r["us"] * 1e-6 - like.small(r["raw_bytes"], r["raw_bytes"] / r["ratio"]) for r in small)
    return Curve(replace(like.small, seconds=like.small.seconds + max(0.0, more)), fit(large), *ends)


def rates(gpu: str = "h100") -> Row:
    """The table, from the results on one kind of GPU."""
    transport = read(f"{gpu}_transport.json")
    rice = [r for r in read(f"{gpu}_rice.json")["rows"] if "rice" in r["case"]]
    churn = next(c for c in read("pool.json")["churn"] if c["headroom"] == 0.02)
    rows = transport["rows"]

    def of(way: str, direction: str, least: int) -> list[Row]:
        return [r for r in rows if (r["way"], r["direction"]) == (way, direction) and r["raw_bytes"] >= least]

    link = {d: statistics.median(r["gb_per_s"] for r in of("raw-link", d, LARGE_BYTES)) for d in DIRECTIONS}
    smallest = {d: min(of("raw-link", d, 0), key=lambda r: r["raw_bytes"]) for d in DIRECTIONS}
    fixed = {d: curve([r for way in FIXED for r in of(way, d, 0)]) for d in DIRECTIONS}
    ricing = {d: curve([r for way in RICE for r in of(way, d, 0)], fixed[d]) for d in DIRECTIONS}
    sources = [f"{gpu}_transport.json", f"{gpu}_rice.json", f"{gpu}_vllm_sessions.json", "pool.json"]
    environment = transport["environment"]
    link_name = f"PCIe {environment['pcie_link_gen_max']}.0 x{environment['pcie_link_width_current']}"
    return {
        "machine": f"{environment['gpu']}, {link_name}",
        "sources": [f"bench/results/{name}" for name in sources],
        "link_gb_per_s": link,
        "raw": {
            d: {
                "seconds": smallest[d]["us"] * 1e-6 - smallest[d]["raw_bytes"] / link[d] / 1e9,
                "seconds_per_encoded_byte": 1e-9 / link[d],
                "seconds_per_raw_byte": 0.0,
            }
            for d in DIRECTIONS
        },
        "encoded": {
            mode: {d: asdict(curves[d]) for d in DIRECTIONS} for mode, curves in (("fixed", fixed), ("rice", ricing))
        },
        "rice_gb_per_s": {
            d: statistics.median(r[f"{op}_gb_per_s"]["median"] for r in rice)
            for d, op in (("out", "encode"), ("in", "decode"))
        },
        "prefill_flop_per_s": prefill_flop_per_s(f"{gpu}_vllm_sessions.json"),
        "pool_payload_fraction": churn["payload_fraction"]["median"],
    }


def prefill_flop_per_s(name: str) -> float:
    """By the times to the first token of prompts that nothing was cached of."""
    results = read(name)
    if results["environment"]["geometry"] != "llama-3.1-8b":
        raise ValueError(f"{name} has another model: say how many parameters it has")
    model = Model.from_dict(LLAMA_8B)
    cold = [(r["tokens"], r["ttft_cold_ms"] / 1e3) for r in results["rows"] if r.get("ttft_cold_ms")]
    return statistics.median((model.prefill_flop(tokens) or 0.0) / seconds for tokens, seconds in cold)


def text() -> str:
    """What the table's file holds; numbers are rounded to four figures."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: rounded(v) for k, v in value.items()}
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return json.dumps(rounded(rates()), indent=1) + "\n"


if __name__ == "__main__":
    TABLE.write_text(text(), encoding="utf-8")
