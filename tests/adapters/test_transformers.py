# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Calibration and fidelity on tiny random models of several architectures, made on the fly."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvzip import cli
from kvzip.calibration import CalibrationTable
from kvzip.errors import ConfigError
from kvzip.types import ErrorBound

torch = pytest.importorskip("torch", reason="needs torch: pip install 'kvzip[calibrate]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'kvzip[calibrate]'")

from hf_models import MIXED, MODELS, OLDER, REFUSED, SIZES, TEXT, byte_tokenizer, make  # noqa: E402

from kvzip.adapters.transformers import fidelity, fit, gradients, moments, schemes  # noqa: E402
from kvzip.adapters.transformers.models import LanguageModel, load_model  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are so small that threads of torch only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return make("llama, grouped queries")


@pytest.fixture(scope="module")
def folder(llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    llama.model.save_pretrained(path)
    llama.tokenizer.save_pretrained(path)
    (path / "text.txt").write_text(TEXT * 4, encoding="utf-8")
    return path


# ---- calibration


@pytest.mark.parametrize("name", MODELS)
def test_the_moments_are_those_of_the_queries(name: str) -> None:
    """RoPE turns pairs of channels, so the sum of a pair's moments is known before it."""
    model = make(name)
    _, _, where, factor = MODELS[name]
    seen: list[Any] = []
    for path, module in model.model.named_modules():
        if path.endswith(f".{where}"):
            module.register_forward_hook(lambda _, __, out: seen.append(out.detach().double()))
    table = moments.calibrate(model, [TEXT])
    layers, heads, head_dim = table.geometry
    assert (layers, heads) == (SIZES["num_hidden_layers"], model.model.config.num_key_value_heads)
    assert table.model == name
    assert table.tokens == len(TEXT)
    for layer, out in enumerate(seen[:layers]):  # a run of one token follows, which shows what the model keeps
        queries = out.reshape(len(TEXT), -1, head_dim)[:, : SIZES["num_attention_heads"]]
        if where == "q_norm" and out.shape[1] == SIZES["num_attention_heads"]:  # heads come before tokens
            queries = out[0].transpose(0, 1)
        expected = factor * queries.unflatten(1, (heads, -1)).square().mean(0).sum(1)
        half = head_dim // 2
        pairs = table.moments[layer, :, :half] + table.moments[layer, :, half:]
        np.testing.assert_allclose(pairs, expected[:, :half] + expected[:, half:], rtol=1e-4)
        assert not np.allclose(table.moments[layer], expected, rtol=1e-2), "these are the queries before RoPE"


@pytest.mark.parametrize("name", OLDER)
def test_moments_without_rotation_are_those_of_the_projection(name: str) -> None:
    model = make(name)
    seen: list[Any] = []
    for path, module in model.model.named_modules():
        if path.endswith(f".{OLDER[name][2]}"):
            module.register_forward_hook(lambda _, __, out: seen.append(out.detach().double()))
    table = moments.calibrate(model, [TEXT])
    assert table.geometry == (3, 4, 16)
    for moment, out in zip(table.moments, seen, strict=False):  # a run of one token follows
        queries = out.reshape(len(TEXT), -1)[:, :64].unflatten(1, (4, 16))
        np.testing.assert_allclose(moment, queries.square().mean(0), rtol=1e-4)


@pytest.mark.parametrize("name", MIXED)
def test_layers_that_differ_have_moments_of_their_own(name: str) -> None:
    """Where later layers use the keys of an earlier one, their queries count there."""
    model = make(name)
    seen: dict[int, Any] = {}
    for path, module in model.model.named_modules():
        if found := re.search(r"layers\.(\d+)\.self_attn\.q_(norm|layernorm)$", path):
            module.register_forward_hook(
                lambda _, __, out, layer=int(found[1]): (  # the first run: one of a single token follows
                    None if layer in seen else seen.update({layer: out.detach().double()[0]})
                )
            )
    table = moments.calibrate(model, [TEXT])
    gemma = name.startswith("gemma4")
    own_keys = 2 if gemma else 4  # transformers 5.24 counts layers without keys of their own too
    assert table.shapes[:own_keys] == (((2, 16), (1, 32)) if gemma else ((0, 0), (2, 16), (0, 0), (2, 16)))
    assert not any(map(any, table.shapes[own_keys:]))
    assert not table.is_uniform
    for layer, (heads, dim) in enumerate(table.shapes):
        own = () if not heads else (layer, layer + 2) if gemma else (layer,)
        squares = [seen[i].unflatten(1, (heads, -1)).square().mean(0).sum(1) * (dim if gemma else 1) for i in own]
        expected = np.zeros((heads, dim)) + sum(s.numpy() for s in squares)
        half = dim // 2
        found = table.moments[layer, :heads, :dim]
        np.testing.assert_allclose(
            found[:, :half] + found[:, half:], expected[:, :half] + expected[:, half:], rtol=1e-4
        )
        assert not table.moments[layer, heads:].any()


def test_several_texts_count_by_their_tokens(llama: LanguageModel) -> None:
    short, long = TEXT[:20], TEXT[20:]
    both = moments.calibrate(llama, [short, long])
    each = [moments.calibrate(llama, [text]) for text in (short, long)]
    assert both.tokens == len(TEXT)
    mean = sum(t.moments * t.tokens for t in each) / both.tokens
    np.testing.assert_allclose(both.moments, mean, rtol=1e-5)
    assert moments.calibrate(llama, [TEXT], max_tokens=20).tokens == 20


def test_calibration_leaves_transformers_as_it_was(llama: LanguageModel) -> None:
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    before = dict(functions)
    local = functions["sdpa"] = lambda *args, **kwargs: before["sdpa"](*args, **kwargs)
    try:
        with pytest.raises(ConfigError, match="no tokens"):
            moments.calibrate(llama, [TEXT, ""])
        assert functions["sdpa"] is local
    finally:
        del functions["sdpa"]
    assert dict(functions) == before


@pytest.mark.parametrize(("texts", "tokens"), [([], 10), ([TEXT], 0)])
def test_calibration_refuses(llama: LanguageModel, texts: list[str], tokens: int) -> None:
    with pytest.raises(ConfigError):
        moments.calibrate(llama, texts, max_tokens=tokens)


def test_a_model_without_attention_is_refused() -> None:
    config = transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)
    mamba = LanguageModel("mamba", transformers.AutoModelForCausalLM.from_config(config).eval(), byte_tokenizer())
    with pytest.raises(ConfigError, match="no attention of mamba"):
        moments.calibrate(mamba, [TEXT])
    with pytest.raises(ConfigError, match="layer 0 of mamba keeps a state"):
        mamba.prefill(mamba.tokens(TEXT))


@pytest.mark.parametrize("name", REFUSED)
def test_queries_that_cannot_be_used_are_refused(name: str) -> None:
    """Attention that transformers does not dispatch; and latent vectors, which no table of the keys' channels fits."""
    model = make(name)
    with pytest.raises(ConfigError, match=REFUSED[name][2]):
        moments.calibrate(model, [TEXT])
    layers, _ = model.prefill(model.tokens(TEXT)[:, :32])
    schemes.engine_scheme("bounds without a table are of use", ErrorBound.relative(1e-3)).swap(
        [(k.bfloat16(), v.bfloat16()) for k, v in layers]
    )


def test_layers_that_keep_a_state_are_calibrated_but_not_run_behind_a_swap() -> None:
    model = make("lfm2, convolutions between")
    table = moments.calibrate(model, [TEXT])
    with pytest.raises(ConfigError, match=r"layer 0 of lfm2.*keeps a state"):
        model.prefill(model.tokens(TEXT))
    with pytest.raises(ConfigError, match="keeps a state"):
        gradients.weigh(model, table, [TEXT])


# ---- gradients


@pytest.mark.parametrize(
    "name",
    [
        "llama, grouped queries",
        "gemma3, both kinds of layer",
        "gpt-oss, eager attention, YaRN",
        "gemma4, two shapes, shared layers",
    ],
)
def test_weighing_moves_bounds_within_a_factor_of_two_around_their_mean(name: str) -> None:
    model = make(name)
    table = moments.calibrate(model, [TEXT])
    weighed = gradients.weigh(model, table, [TEXT])
    assert (weighed.shapes, weighed.model, weighed.tokens) == (table.shapes, table.model, table.tokens)
    keys = np.log2(weighed.key_bounds(0.4) / table.key_bounds(0.4))
    np.testing.assert_array_equal(np.isnan(keys), np.isnan(table.key_bounds(1)), "of padding alone")
    own = [layer for layer, (heads, _) in enumerate(table.shapes) if heads]
    assert weighed.value_factors is not None
    for change in (keys[~np.isnan(keys)], np.log2(weighed.value_factors[own])):
        assert np.abs(change).max() <= 2.01, "clipped at one, around a mean that the clipping moves"
        assert abs(change.mean()) < 0.25
        assert change.std() > 0.01
    assert all(p.requires_grad for p in model.model.parameters())
    again = gradients.weigh(model, table, [TEXT])
    np.testing.assert_array_equal(again.moments, weighed.moments)


def test_gradients_of_several_texts_add_up(llama: LanguageModel) -> None:
    """Each text counts, not the first alone; twice the same text is that text."""
    table = moments.calibrate(llama, [TEXT])
    one, other = gradients.weigh(llama, table, [TEXT]), gradients.weigh(llama, table, [TEXT[::-1]])
    both = gradients.weigh(llama, table, [TEXT, TEXT[::-1]])
    np.testing.assert_allclose(gradients.weigh(llama, table, [TEXT, TEXT]).moments, one.moments, rtol=1e-5)
    for single in (one, other):
        assert not np.allclose(both.moments, single.moments, rtol=1e-3)
    low, high = np.minimum(one.moments, other.moments), np.maximum(one.moments, other.moments)
    assert ((both.moments > 0.7 * low) & (both.moments < 1.4 * high)).all()


def test_gradients_are_those_of_the_fisher_information(llama: LanguageModel) -> None:
    """To second order, half of F e^2 is the divergence that small errors cause."""
    ids = llama.tokens(TEXT * 2)
    prefix, _ = llama.prefill(ids[:, :160])
    exact = llama.continue_from(prefix, ids[:, 160:]).double().log_softmax(-1)
    layer = 1
    keys, values = prefix[layer]
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(3)) * 1e-3
    noise[: gradients._PROTECTED] = 0
    changed = [*prefix[:layer], (keys, values + noise), *prefix[layer + 1 :]]
    noisy = llama.continue_from(changed, ids[:, 160:]).double().log_softmax(-1)
    found = float((exact.exp() * (exact - noisy)).sum())
    _, squares, _ = gradients.squared_gradients(llama, ids[:, :160], ids[:, 160:], samples=200, seed=0)
    predicted = 0.5 * 1e-6 * float(squares[2 * layer + 1][gradients._PROTECTED :].sum())
    assert found == pytest.approx(predicted, rel=0.35)


def test_gradients_refuse_short_texts_and_other_tables(llama: LanguageModel) -> None:
    table = moments.calibrate(llama, [TEXT])
    with pytest.raises(ConfigError, match="no text"):
        gradients.weigh(llama, table, [])
    with pytest.raises(ConfigError, match="text 2 has 5 tokens"):
        gradients.weigh(llama, table, [TEXT, "short"])
    with pytest.raises(ConfigError, match="does not fit"):
        gradients.weigh(llama, table.select(layers=[0]), [TEXT])


# ---- t and r of a model


def test_a_fit_keeps_its_limit_with_bounds_as_large_as_that_allows(llama: LanguageModel) -> None:
    table = moments.calibrate(llama, [TEXT])
    texts = {"one": TEXT * 2, "two": TEXT[::-1] * 2}
    steps: list[tuple[str, int, int]] = []
    found = fit.fit(llama, table, texts, limit=2e-2, progress=lambda *step: steps.append(step))
    assert found.limit == 2e-2
    assert 0.25 * found.limit < found.kl <= found.limit
    assert found.table.r / found.table.t == pytest.approx(table.r / table.t)
    np.testing.assert_array_equal(found.table.moments, table.moments)
    again = measure(llama, [schemes.engine_scheme("fitted", found.table.policy(), mode="rice")], prefix=160)
    assert again.rows[0].ratio == pytest.approx(found.ratio, rel=0.05)
    assert [done for _, done, _ in steps] == list(range(1, len(steps) + 1))
    finer = fit.fit(llama, table, texts, limit=4e-3)
    assert finer.table.t < found.table.t
    assert finer.ratio < found.ratio


def test_a_fit_aims_below_fp8_by_default(llama: LanguageModel) -> None:
    table = moments.calibrate(llama, [TEXT])
    texts = {"one": TEXT * 2}
    found = fit.fit(llama, table, texts)
    fp8 = measure(llama, schemes.peers(), prefix=160, continuation=64, needle_depths=()).limit()
    assert found.limit == pytest.approx(0.8 * fp8, rel=0.5), "of another text less"
    assert found.kl <= found.limit


@pytest.mark.parametrize(
    ("texts", "limit", "message"),
    [
        ({}, None, "0 texts"),
        ({"short": TEXT[:50]}, None, "1 texts of 50 tokens"),
        ({"one": TEXT * 2}, 0.0, "not positive"),
        ({"one": TEXT * 2}, 1e-12, "no t and r down to"),
    ],
)
def test_a_fit_refuses(llama: LanguageModel, texts: dict[str, str], limit: float | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit.fit(llama, moments.calibrate(llama, [TEXT]), texts, limit=limit)


# ---- the model behind a swapped cache


@pytest.mark.parametrize("name", MODELS)
def test_an_exact_cache_changes_nothing(name: str) -> None:
    """Sliding windows too: all tokens are kept, the mask does the rest."""
    model = make(name)
    ids = model.tokens(TEXT)
    with torch.inference_mode():
        whole = model.model(ids).logits[0]
    layers, last = model.prefill(ids[:, :48])
    assert all(k.shape[0] == 48 for k, _ in layers)
    torch.testing.assert_close(last, whole[47], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.continue_from(layers, ids[:, 48:]), whole[48:], rtol=1e-3, atol=1e-3)


def test_greedy_decoding_takes_the_likeliest(llama: LanguageModel) -> None:
    ids = llama.tokens(TEXT)
    layers, last = llama.prefill(ids)
    chosen = llama.greedy(layers, last, 5)
    with torch.inference_mode():
        logits = llama.model(torch.cat([ids, chosen], 1)).logits[0]
    assert logits[ids.shape[1] - 1 : -1].argmax(-1).tolist() == chosen[0].tolist()


# ---- schemes


def cache(tokens: int = 64) -> list[tuple[Any, Any]]:
    generator = torch.Generator().manual_seed(1)
    scale = torch.logspace(-1, 1, 32)  # channels differ, as those of real keys do
    shape = (tokens, 2, 32)
    return [tuple((torch.randn(shape, generator=generator) * scale).bfloat16() for _ in "kv") for _ in range(3)]


def errors(scheme: schemes.Scheme, layers: list[tuple[Any, Any]]) -> tuple[float, float]:
    """Mean squared error over mean square, and bits a value."""
    after, nbytes = scheme.swap(layers)
    before = torch.stack([t for pair in layers for t in pair]).double()
    change = torch.stack([t for pair in after for t in pair]).double() - before
    return float(change.square().mean() / before.square().mean()), nbytes * 8 / before.numel()


def test_the_peers_take_the_bits_that_their_formats_take() -> None:
    found = {scheme.name: errors(scheme, cache()) for scheme in schemes.peers()}
    assert found["fp8 unscaled"][1] == 8
    assert found["fp8"][1] == pytest.approx(8 + 32 / (64 * 2 * 32))
    assert found["int8"][1] == 8 + 16 / 32
    assert found["KIVI-4"][1] == 4 + 32 / 32
    assert found["int8"][0] < found["fp8"][0] < found["KIVI-4"][0]
    assert all(0 < error < 0.01 for error, _ in found.values())


def test_kvzip_runs_through_the_engine_with_its_first_block_protected() -> None:
    layers = cache()
    bound = ErrorBound.relative(1e-2)
    after, nbytes = schemes.engine_scheme("x", bound).swap(layers)
    for pair, swapped in zip(layers, after, strict=True):
        for before, now in zip(pair, swapped, strict=True):
            assert torch.equal(before[:16], now[:16])
            pages = before.double().reshape(4, -1)
            error = (now.double().reshape(4, -1) - pages).abs().amax(1)
            assert (error <= 1e-2 * (pages.amax(1) - pages.amin(1))).all()
            assert error[1:].min() > 0
    assert nbytes % 256 == 0, "whole extents of the pool"
    free, fewer = schemes.engine_scheme("x", bound, protect=False).swap(layers)
    assert not torch.equal(free[0][0][:16], layers[0][0][:16])
    assert fewer < nbytes


def test_a_prefix_of_half_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="40 tokens"):
        schemes.engine_scheme("x").swap(cache(40))


# ---- fidelity


def measure(model: LanguageModel, chosen: list[schemes.Scheme], **options: Any) -> fidelity.FidelityResult:
    texts = {"one": TEXT * 2, "two": TEXT[::-1] * 2}
    sizes = {"prefix": 96, "continuation": 40, "greedy_tokens": 8, "needle_depths": (0.5,), **options}
    return fidelity.evaluate(model, texts, chosen, **sizes)


def test_what_is_exact_is_the_reference_and_coarser_is_worse(llama: LanguageModel) -> None:
    steps: list[tuple[str, int, int]] = []
    table = moments.calibrate(llama, [TEXT])
    chosen = [
        *schemes.peers(),
        schemes.engine_scheme("lossless", ErrorBound.lossless()),
        schemes.calibrated(table, 0.01, 0.01),
        schemes.calibrated(table, 1.0, 0.5),
    ]
    result = measure(llama, chosen, progress=lambda *step: steps.append(step))
    rows = {row.scheme: row for row in result.rows}
    exact = rows["lossless"]
    assert (exact.kl, exact.kl_p999, exact.top1, exact.dnll, exact.greedy) == (0, 0, 1, 0, 1)
    assert exact.needle == result.reference_needle
    assert exact.ratio > 1.1
    assert 0 < rows["calibrated t=0.01 r=0.01"].kl < rows["calibrated t=1 r=0.5"].kl
    assert rows["calibrated t=0.01 r=0.01"].ratio < rows["calibrated t=1 r=0.5"].ratio
    assert 0 < rows["int8"].kl < rows["KIVI-4"].kl
    assert all(row.kl <= row.kl_p999 for row in result.rows)
    assert all(np.mean(list(row.kl_by_text.values())) == pytest.approx(row.kl) for row in result.rows)
    assert result.positions == 80
    assert steps[-1] == ("fidelity", 28, 28)
    assert [done for _, done, _ in steps] == list(range(1, 29))
    assert result.worse() == ["calibrated t=1 r=0.5"]
    assert "calibrated t=1 r=0.5" in result.table()


def test_the_divergence_is_that_of_the_distributions(llama: LanguageModel) -> None:
    """Against SciPy-free arithmetic of its own, through a scheme that zeroes every value."""
    zeroed = schemes.Scheme("zero", lambda layers: ([(k * 0, v * 0) for k, v in layers], 1))
    result = measure(llama, [zeroed], needle_depths=())
    expected = []
    for text in (TEXT * 2, TEXT[::-1] * 2):
        ids = llama.tokens(text)[:, :136]
        layers = [(k.bfloat16(), v.bfloat16()) for k, v in llama.prefill(ids[:, :96])[0]]
        p = llama.continue_from(layers, ids[:, 96:]).double().softmax(-1).numpy()
        q = llama.continue_from([(k * 0, v * 0) for k, v in layers], ids[:, 96:]).double().softmax(-1).numpy()
        expected.append((p * np.log(p / q)).sum(-1))
    (row,) = result.rows
    assert row.kl == pytest.approx(np.mean(expected), rel=1e-4)
    assert row.kl_p999 == pytest.approx(np.quantile(np.concatenate(expected), 0.999), rel=1e-4)
    assert row.needle is None
    assert row.top1 < 1


def test_schemes_that_give_the_same_values_run_the_model_once(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    run = LanguageModel.continue_from
    monkeypatch.setattr(LanguageModel, "continue_from", lambda *given: calls.append(1) or run(*given))
    raw = schemes.Scheme("raw", schemes.EngineSwap({"codec": "raw"}), own=True)
    twins = [schemes.engine_scheme("lossless", ErrorBound.lossless()), raw]
    one = measure(llama, twins[:1])
    alone = len(calls)
    both = measure(llama, twins)
    assert len(calls) == 2 * alone
    a, b = both.rows
    assert one.rows == [a]
    assert a.ratio != b.ratio
    assert (a.kl, a.top1, a.needle, a.kl_by_text) == (b.kl, b.top1, b.needle, b.kl_by_text)


def test_a_needle_lies_in_the_prefix_and_is_asked_for(llama: LanguageModel) -> None:
    tokens = llama.tokens(TEXT * 2)
    hay, question, answer = fidelity._needle(llama, tokens, 96, 0.5, seed="a text")
    text, asked, number = (llama.tokenizer.decode(ids[0]) for ids in (hay, question, answer))
    assert hay.shape == (1, 96)
    assert number.strip().isdigit()
    assert f"{asked.strip()}{number}" in text
    assert text.startswith(TEXT[:20])
    with pytest.raises(ConfigError, match="cannot hide"):
        fidelity._needle(llama, tokens, 30, 0.5, seed="a text")


@pytest.mark.parametrize(
    "options",
    [{"prefix": 10_000}, {"prefix": 0}, {"continuation": 1}, {"greedy_tokens": 0}, {"kv_dtype": "float64"}],
)
def test_fidelity_refuses(llama: LanguageModel, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        measure(llama, schemes.peers(), **options)


def test_there_must_be_something_to_measure_and_to_compare_with(llama: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="nothing to measure"):
        measure(llama, [])
    with pytest.raises(ConfigError, match="fp8"):
        measure(llama, [schemes.engine_scheme("default")], needle_depths=()).worse()


# ---- the command line


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(command: str, *arguments: str, model: str = str(folder)) -> tuple[int, str, str]:
        status = cli.main([command, "--model", model, "--text", str(folder / "text.txt"), "--device=cpu", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_calibrate_and_verify(folder: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    table = tmp_path / "table.npz"
    status, out, err = run("calibrate", "--out", str(table), "--tokens", "64", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found == {
        "model": folder.name,
        "layers": 3,
        "kv_heads": 2,
        "head_dim": 16,
        "tokens": 64,
        "t": 0.4,
        "r": 0.17,
        "table": str(table),
    }
    assert CalibrationTable.load(table).geometry == (3, 2, 16)

    small = ("--prefix", "64", "--continuation", "32")
    fine = f"k=table:{table}:0.01,v=rms:0.01"
    arguments = (*small, "--bound", fine, "--bound", "1e-4", "--json")
    status, out, err = run("verify", *arguments)
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert [row["scheme"] for row in result["rows"] if row["own"]] == [fine, "1e-4"]
    assert {"scheme", "ratio", "kl", "kl_p999", "top1", "dnll", "greedy", "needle"} <= set(result["rows"][0])
    assert result["worse"] == []

    weighed = tmp_path / "weighed.json"
    status, out, _ = run("calibrate", "--out", str(weighed), "--gradients", "--fit", str(folder / "text.txt"), "--json")
    found = json.loads(out)
    assert status == 0
    assert 0 < found["kl"] <= found["kl_limit"]
    loaded = CalibrationTable.load(weighed)
    assert loaded.value_factors is not None
    assert (loaded.t, loaded.r) == (found["t"], found["r"])
    assert found["t"] != 0.4

    status, out, err = run("verify", *small, "--bound", "0.5")
    assert status == 1
    assert "worse than fp8: 0.5" in out
    assert "KIVI-4" in out


def test_the_code_of_the_guide_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "calibrate.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(folder)
    for name in ("sample.txt", "a.txt", "b.txt", "c.txt", "d.txt"):
        (tmp_path / name).write_text(TEXT * 20, encoding="utf-8")
    namespace: dict[str, Any] = {}
    ran = []
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(compile(text, "calibrate.md", "exec"), namespace)
        for line in text.splitlines() if language in ("sh", "bash") else ():
            command, *arguments = shlex.split(line, comments=True)
            if command == "kvzip":
                ran.append(arguments[0])
                assert cli.main([*arguments, "--device", "cpu"]) in (0, 1), "random weights bear less than a model's"
    assert ran == ["calibrate", "calibrate", "verify"]
    engine = namespace["engine"]
    assert engine.settings.bound.num_layers == SIZES["num_hidden_layers"]
    engine.close()


def test_unusable_input_ends_with_status_2(
    folder: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    status, _, err = run("verify")  # the text is too short for the default prefix
    assert status == 2
    assert "1536 + 512 are needed" in err
    (tmp_path / "config.json").write_text("{}")
    status, _, err = run("verify", model=str(tmp_path))
    assert status == 2
    assert "cannot load a model" in err
    for nowhere in (str(tmp_path / "none"), "./none", "a/b/c"):
        status, _, err = run("verify", model=nowhere)
        assert status == 2
        assert f"there is no {nowhere}:" in err
    status, _, err = run("calibrate", "--out", str(tmp_path / "nowhere" / "table.npz"))
    assert status == 2
    assert "no folder" in err
    with pytest.raises(SystemExit) as ended:
        run("verify", "--bound", f"table:{folder / 'text.txt'}:0.4")
    assert ended.value.code == 2


def test_a_model_loads_from_its_folder(folder: Path, llama: LanguageModel) -> None:
    loaded = load_model(str(folder), device="cpu")
    ids = llama.tokens(TEXT)
    assert loaded.name == folder.name
    assert torch.equal(loaded.tokens(TEXT), ids)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(ids).logits, llama.model(ids).logits)
    (folder / "a.gguf").touch()
    try:
        assert load_model(str(folder), device="cpu").name == folder.name, "a checkpoint goes before a GGUF file"
    finally:
        (folder / "a.gguf").unlink()
