# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""`kvzip verify` without a model: it passes on this build, and finds what it is there to find."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvzip import _native, cli, selfcheck
from kvzip.types import BlockView

Made = tuple[selfcheck.Digests, BlockView, BlockView]


def verify(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = cli.main(["verify", *arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_this_build_passes(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = verify(capsys, "--device", "cpu", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["ways"] == [*(f"cpu, {isa}" for isa in _native.cpu_isas()), "cpu, all threads"]
    assert (found["failures"], found["violations"]) == ([], 0)
    assert {case["name"] for case in found["cases"]} == {case.name for case in selfcheck.cases()}
    assert max(case["max_error_over_bound"] for case in found["cases"]) > 0.9  # the bounds were used


def test_the_golden_set_is_complete() -> None:
    names = [case.name for case in selfcheck.cases()]
    assert len(set(names)) == len(names) >= 60, "cases are only ever added"
    assert set(selfcheck.golden()) == set(names)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[selfcheck.Case]:
    chosen = [case for case in selfcheck.cases() if case.bound == "1e-2" and case.block_tokens == 5][:2]
    monkeypatch.setattr(selfcheck, "cases", lambda: iter(chosen))
    return chosen


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[selfcheck.Case, Made], Made]) -> None:
    real = selfcheck.store_and_load
    monkeypatch.setattr(selfcheck, "store_and_load", lambda case, *more: change(case, real(case, *more)))


def test_other_bytes_than_the_golden_set(
    few: list[selfcheck.Case], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selfcheck, "golden", lambda: {few[0].name: selfcheck.store_and_load(few[0])[0]})
    status, out, _ = verify(capsys, "--device", "cpu")
    assert status == 1
    assert f"failed: {few[1].name}: not the bytes of the golden set" in out
    assert few[0].name not in out


def test_an_instruction_set_that_writes_other_bytes(
    few: list[selfcheck.Case], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    last = _native.cpu_isas()[-1]
    if last == "baseline":
        pytest.skip("this processor has one instruction set")
    before = _native.cpu_isa()

    def change(case: selfcheck.Case, made: Made) -> Made:
        wrong = _native.cpu_isa() == last and case == few[1]
        return (selfcheck.Digests("0", made[0].values), *made[1:]) if wrong else made

    spoil(monkeypatch, change)
    status, out, _ = verify(capsys, "--device", "cpu", "--json")
    assert status == 1
    failures: list[str] = json.loads(out)["failures"]
    assert f"{few[1].name}: cpu, {last} writes or reads other bytes than cpu, baseline" in failures
    assert all(failure.startswith(few[1].name) for failure in failures)
    assert _native.cpu_isa() == before


def test_a_value_outside_its_bound(
    few: list[selfcheck.Case], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(case: selfcheck.Case, made: Made) -> Made:
        page: Any = made[2].page(0, 0)
        page.flat[3] = np.asarray(page.flat[3]) ^ np.asarray(1 << (8 * page.itemsize - 1), page.dtype)  # the sign
        return made

    spoil(monkeypatch, change)
    status, out, _ = verify(capsys, "--device", "cpu", "--json")
    assert status == 1
    assert json.loads(out)["violations"] == len(few)


@pytest.mark.gpu
def test_the_gpu_passes(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    status, out, _ = verify(capsys, "--device", "cuda", "--json")
    assert status == 0, out
    assert "cuda" in json.loads(out)["ways"]


@pytest.mark.parametrize("option", [["--bound", "1e-2"], ["--mode", "rice"], ["--text", "x"], ["--plot", "x.png"]])
def test_options_for_a_model(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = verify(capsys, *option)
    assert (status, out) == (2, "")
    assert "give --model" in err


def test_a_model_needs_texts(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = verify(capsys, "--model", "folder")
    assert status == 2
    assert "--text not given" in err
    status, _, err = verify(capsys, "--device", "tpu")
    assert status == 2
    assert "use auto, cpu or cuda" in err
