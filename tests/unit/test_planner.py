# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What `kvzip plan` says agrees with what was measured, and with itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripts import load_script

from kvzip import cli
from kvzip.backends.registry import get_codec
from kvzip.calibration import parse_bounds
from kvzip.errors import ConfigError
from kvzip.planner import Model, Plan, Rates
from kvzip.types import DType

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
LLAMA = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "torch_dtype": "bfloat16",
}
needs_results = pytest.mark.skipif(not RESULTS.exists(), reason="a source distribution leaves the results out")


def rows(name: str) -> list[dict[str, Any]]:
    return list(json.loads((RESULTS / name).read_text())["rows"])


@needs_results
def test_the_table_is_what_the_results_give() -> None:
    script = load_script("bench/planner_rates.py")
    assert script.TABLE.read_text() == script.text(), "run `python docs/make_figures.py`"


@needs_results
@pytest.mark.parametrize("way", ["raw-link", "kvzip-1e-3", "kvzip-1e-2", "kvzip-lossless"])
@pytest.mark.parametrize("direction", ["out", "in"])
def test_large_transfers_agree_with_the_measured_ones(way: str, direction: str) -> None:
    rates = Rates.measured()
    large = [
        r
        for r in rows("h100_transport.json")
        if (r["way"], r["direction"]) == (way, direction) and r["raw_bytes"] >= 256 << 20
    ]
    assert large
    for row in large:
        ratio = None if way == "raw-link" else row["ratio"]
        estimate = rates.transfer_seconds(direction, row["raw_bytes"], ratio=ratio)
        assert estimate == pytest.approx(row["us"] * 1e-6, rel=0.15), row


@needs_results
def test_transfers_of_any_size_agree_with_the_measured_ones_as_a_rule() -> None:
    """One measured median of a small transfer may be off; most are not, in either mode and direction."""
    rates = Rates.measured()
    for direction in ("out", "in"):
        for mode, ways in (("fixed", ("1e-3", "1e-2", "lossless")), ("rice", ("uncalibrated-rice", "calibrated-rice"))):
            off = [
                abs(rates.transfer_seconds(direction, r["raw_bytes"], ratio=r["ratio"], mode=mode) / r["us"] * 1e6 - 1)
                for r in rows("h100_transport.json")
                if r["direction"] == direction and r["way"].removeprefix("kvzip-") in ways
            ]
            assert np.median(off) < 0.15, (direction, mode, off)
            assert max(off) < 1, (direction, mode, off)


@needs_results
@pytest.mark.parametrize("way", ["kvzip-1e-3", "kvzip-1e-2", "kvzip-lossless"])
@pytest.mark.parametrize("direction", ["out", "in"])
def test_records_break_even_where_they_were_measured_to(way: str, direction: str) -> None:
    """Between the largest size that clearly did not pay and the one from which on all clearly did, or twice off."""
    us = {
        name: {
            r["raw_bytes"]: r["us"]
            for r in rows("h100_transport.json")
            if r["way"] == name and r["direction"] == direction
        }
        for name in (way, "raw-link")
    }
    sizes = sorted(us[way])
    below = max((n for n in sizes if us[way][n] > 1.1 * us["raw-link"][n]), default=0)
    doubtful = max((n for n in sizes if us[way][n] > 0.9 * us["raw-link"][n]), default=0)
    above = next(n for n in sizes if n > doubtful)
    per_token = 8192
    ratio = next(r["ratio"] for r in rows("h100_transport.json") if r["way"] == way and r["raw_bytes"] == above)
    model = Model(layers=1, kv_heads=1, head_dim=per_token // 4)
    tokens = Plan(model, Rates.measured(), 1 << 30, ratio).break_even()["store" if direction == "out" else "load"]
    assert tokens is not None
    assert below / 2 <= tokens * per_token <= above * 2


@needs_results
def test_loads_in_vllm_agree_with_the_measured_ones() -> None:
    rates, model = Rates.measured(), Model.from_dict(LLAMA)
    loads = [
        r
        for r in rows("h100_vllm_sessions.json")
        if r["tier"].startswith("kvzip") and r["tier"] != "kvzip-raw" and r.get("load_ms") and r["tokens"] >= 8192
    ]
    assert loads
    for row in loads:
        mode = get_codec("cuszp").default_mode(parse_bounds(row["bound"]))
        plan = Plan(model, rates, 1 << 34, row["ratio"], mode)
        # The engine's run may be of an earlier commit than that of the transfers alone, which get faster.
        assert (
            0.7 * row["load_ms"]
            <= 1e3 * plan.transfer_seconds("in", row["tokens"], encoded=True)
            <= 1.15 * row["load_ms"]
        )
        assert plan.recompute_seconds(row["tokens"]) == pytest.approx(row["ttft_cold_ms"] / 1e3, rel=0.15)


# ---- itself

RATES = Rates.measured()
MODELS = st.builds(
    Model,
    st.integers(1, 128),
    st.integers(1, 64),
    st.sampled_from([64, 128, 256]),
    st.sampled_from([DType.BFLOAT16, DType.FLOAT32]),
    st.none() | st.floats(1e6, 1e12),
    st.none() | st.integers(1, 1 << 15),
)
PLANS = st.builds(
    Plan,
    MODELS,
    st.floats(1, 500).map(RATES.with_link),
    st.integers(1, 1 << 42),
    st.floats(0.5, 20),
    st.sampled_from(["fixed", "rice"]),
)


@given(PLANS)
def test_a_break_even_is_one(plan: Plan) -> None:
    cheaper = {
        "store": lambda n: (
            plan.transfer_seconds("out", n, encoded=True) < plan.transfer_seconds("out", n, encoded=False)
        ),
        "load": lambda n: plan.transfer_seconds("in", n, encoded=True) < plan.transfer_seconds("in", n, encoded=False),
        "recompute": lambda n: plan.transfer_seconds("in", n, encoded=True) < (plan.recompute_seconds(n) or 0),
    }
    for name, tokens in plan.break_even().items():
        if tokens is None:
            assert not cheaper[name](1 << 40)  # few tokens may pay where many do not
        else:
            assert cheaper[name](tokens)
            assert tokens == 1 or not cheaper[name](tokens - 1)


@given(PLANS, st.integers(1, 1 << 20))
def test_more_tokens_take_longer_and_more_ratio_holds_more(plan: Plan, tokens: int) -> None:
    few, many = plan.row(tokens), plan.row(2 * tokens)
    assert all(few[key] < many[key] for key in few if few[key] is not None)
    better = Plan(plan.model, plan.rates, plan.budget_bytes, plan.ratio * 2, plan.mode)
    assert better.tokens_held(encoded=True) >= plan.tokens_held(encoded=True)
    assert better.row(tokens)["load_encoded_seconds"] <= few["load_encoded_seconds"]
    assert plan.tokens_held(encoded=False) == plan.budget_bytes // plan.model.bytes_per_token


def test_the_link_scales_what_it_moves() -> None:
    slow = RATES.with_link(RATES.link_gb_per_s["out"] / 2)
    size = float(1 << 40)  # so large that nothing else counts
    assert slow.transfer_seconds("out", size, ratio=None) == pytest.approx(
        2 * RATES.transfer_seconds("out", size, ratio=None), rel=1e-3
    )
    gained = slow.transfer_seconds("out", size, ratio=4) / RATES.transfer_seconds("out", size, ratio=4)
    assert 1.4 < gained <= 2  # the coding takes as long as before


# ---- configurations


def test_the_configuration_of_a_model(tmp_path: Path) -> None:
    model = Model.from_dict(LLAMA)
    assert (model.layers, model.kv_heads, model.head_dim, model.dtype) == (32, 8, 128, DType.BFLOAT16)
    assert model.bytes_per_token == 131_072
    assert model.parameters == pytest.approx(7e9, rel=0.01)  # without the embeddings, which compute nothing
    (tmp_path / "config.json").write_text(json.dumps({"text_config": LLAMA, "vision_config": {"hidden_size": 1}}))
    assert Model.from_config(tmp_path) == Model.from_config(tmp_path / "config.json") == model


def test_configurations_of_other_kinds() -> None:
    experts = {**LLAMA, "num_experts_per_tok": 2, "moe_intermediate_size": 1024}
    assert (Model.from_dict(experts).parameters or 0) < (Model.from_dict(LLAMA).parameters or 0)
    assert Model.from_dict({**LLAMA, "head_dim": 256}).head_dim == 256
    assert Model.from_dict({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}).kv_heads == 32
    mixed = Model.from_dict({**LLAMA, "layer_types": ["linear_attention"] * 24 + ["full_attention"] * 8})
    assert mixed.layers == 8
    unknown = Model.from_dict({k: v for k, v in LLAMA.items() if k != "intermediate_size"})
    assert unknown.parameters is None
    assert Plan(unknown, RATES, 1 << 30, 2.0).break_even()["recompute"] is None
    assert Plan(unknown, RATES, 1 << 30, 2.0, prefill_tokens_per_s=1e4).recompute_seconds(1000) == 0.1


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"kv_lora_rank": 512}, "latent vectors .MLA"),
        ({"num_hidden_layers": None}, "does not say"),
        ({"num_attention_heads": 0}, "does not say"),
        ({"hidden_size": "wide"}, "does not say"),
        ({"torch_dtype": "float8"}, "unknown dtype"),
    ],
)
def test_configurations_that_cannot_be_used(content: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Model.from_dict({**LLAMA, **content})


# ---- the command


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = cli.main(["plan", *arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


NUMBERS = ["--layers", "32", "--kv-heads", "8", "--head-dim", "128"]


def test_plan_by_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    status, out, err = run(capsys, str(path), "--budget", "1GiB", "--bound", "1e-2", "--tokens", "100", "200", "--json")
    assert (status, err) == (0, "")
    plan = json.loads(out)
    assert plan["tokens_held"]["raw"] == 8192
    assert plan["tokens_held"]["encoded"] > 3 * 8192
    assert [row["tokens"] for row in plan["rows"]] == [100, 200]
    assert plan["ratio"] > 3
    assert plan["bytes_per_token"]["encoded"] == pytest.approx(131_072 / plan["ratio"])
    assert plan["link_gb_per_s"] == dict(RATES.link_gb_per_s)
    status, out, _ = run(capsys, str(path), "--layers", "16", "--ratio", "2", "--json")
    assert json.loads(out)["bytes_per_token"] == {"raw": 65_536, "encoded": 32_768}
    assert json.loads(out)["ratio_from"] == "given"


def test_plan_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, *NUMBERS, "--parameters", "8e9", "--link-gb-per-s", "25", "--mode", "rice")
    assert status == 0
    for words in ("32 layers", "mode rice", "25.0 GB/s out", "loading beats recomputing +from", "8,192 tokens"):
        assert re.search(words, out), out
    assert re.search("recomputing +never", run(capsys, *NUMBERS)[1])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "--layers, --kv-heads, --head-dim not given"),
        (["--layers", "3"], "--kv-heads, --head-dim not given"),
        ([*NUMBERS, "--layers", "0"], "layers is 0: use at least 1"),
        ([*NUMBERS, "--dtype", "int8"], "opaque caches"),
        ([*NUMBERS, "--ratio", "0"], "ratio 0.0: use a positive number"),
        ([*NUMBERS, "--ratio", "inf"], "ratio inf: use a positive number"),
        ([*NUMBERS, "--link-gb-per-s", "-1"], "use a positive rate"),
        ([*NUMBERS, "--link-gb-per-s", "1e-320"], "use a positive rate"),
        ([*NUMBERS, "--tokens", "9" * 400], "tokens: use at least 1, and fewer than"),
        ([*NUMBERS, "--tokens", "0"], "0 tokens: use at least 1"),
        ([*NUMBERS, "--parameters", "0"], "parameters is 0.0"),
        ([*NUMBERS, "--prefill-tokens-per-s", "nan"], "use a positive rate"),
        ([*NUMBERS, "--mode", "best"], "has no mode 'best'"),
        ([*NUMBERS, "--input", "nowhere.npy"], "cannot read nowhere.npy"),
        (["nowhere.json"], "cannot read nowhere.json"),
    ],
)
def test_plan_refuses(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert why in err


def test_a_configuration_that_is_nested_without_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    status, out, err = run(capsys, str(tmp_path))
    assert (status, out) == (2, "")
    assert "give a config.json of a model" in err
