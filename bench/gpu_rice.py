# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Speed of the CUDA codec's mode ``rice`` on real pages, beside ``fixed``, with a check of the bytes first.

    python bench/gpu_rice.py --out bench/results/h100_rice.json [--data FOLDER] [--commit NAME]

256 MiB of raw data a call, pages of several sizes made of heads of SmolLM2's cache; medians of 15 runs with p10 and
p90, kernels alone between CUDA events.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]

import cuda_bridge as bridge  # noqa: E402
from cuda_bridge import (  # noqa: E402
    BOUND_CHANNEL_TABLE,
    BOUND_LOSSLESS,
    BOUND_RELATIVE,
    BOUND_TOKEN_RMS,
    FIXED,
    LOSSLESS,
    LOSSLESS_RICE,
    RICE,
    GpuDecode,
    GpuEncode,
)
from gpu_codec import load_cache, real_batch, timed  # noqa: E402

CASES = {
    "fixed, page 1e-2": {"coding": FIXED, "bound": 1e-2, "bound_kind": BOUND_RELATIVE},
    "rice, page 1e-2": {"coding": RICE, "bound": 1e-2, "bound_kind": BOUND_RELATIVE},
    "rice, page 1e-3": {"coding": RICE, "bound": 1e-3, "bound_kind": BOUND_RELATIVE},
    "rice, rms 0.1": {"coding": RICE, "bound": 0.1, "bound_kind": BOUND_TOKEN_RMS},
    "rice, rms 0.17": {"coding": RICE, "bound": 0.17, "bound_kind": BOUND_TOKEN_RMS},
    "rice, rms 0.27": {"coding": RICE, "bound": 0.27, "bound_kind": BOUND_TOKEN_RMS},
    "rice, channel table": {"coding": RICE, "bound": 0.5, "bound_kind": BOUND_CHANNEL_TABLE},
    "lossless": {"coding": LOSSLESS, "bound": 1.0, "bound_kind": BOUND_LOSSLESS},
    "lossless rice": {"coding": LOSSLESS_RICE, "bound": 1.0, "bound_kind": BOUND_LOSSLESS},
}


def spread(seconds: Any, raw_bytes: int) -> dict[str, float]:
    """GB/s of raw data: median, p10 and p90 of the runs."""
    rates = raw_bytes / seconds / 1e9
    return {name: round(float(np.percentile(rates, p)), 1) for name, p in (("median", 50), ("p10", 10), ("p90", 90))}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--commit", default="", help="what the results say of the source")
    parser.add_argument("--data", type=Path, help="folder with a KV cache; default: the sample that ships with kvzip")
    arguments = parser.parse_args()
    torch, driver = bridge.load()
    cache = load_cache(arguments.data)
    rows: list[dict[str, Any]] = []
    for page in ("6KiB", "32KiB", "64KiB"):
        for name, how in CASES.items():
            bridge.check_both_ways(real_batch(torch, driver, cache, page, 16 << 20, **how), packed=True)
            batch = real_batch(torch, driver, cache, page, 256 << 20, **how)
            job = GpuEncode(batch, packed=True)
            encode = timed(torch, job.launch, 15)
            encoded = job.result()
            decode = timed(torch, GpuDecode(batch.like(), encoded).launch, 15)
            row = {
                "case": name,
                "page": page,
                "raw_bytes": batch.raw_bytes,
                "ratio": round(batch.raw_bytes / float(encoded.payload_bytes.sum()), 3),
                "encode_gb_per_s": spread(encode, batch.raw_bytes),
                "decode_gb_per_s": spread(decode, batch.raw_bytes),
            }
            print(row, flush=True)
            rows.append(row)
            del batch, job, encoded
    environment = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": arguments.commit,
        "data": arguments.data.name if arguments.data else "smollm2_sample.npy",
        "time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    arguments.out.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
