# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Every golden record stays readable, and kvzip writes the same bytes again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bridge
import numpy as np
import pytest
import reference_codec as ref
from scripts import load_script

from kvzip.record import MODES, read_header

golden = load_script("tests/golden/make_golden.py")
CASES = {case.name: case for case in golden.cases()}
MANIFEST: dict[str, Any] = json.loads(golden.MANIFEST.read_text())


def test_the_folder_is_complete() -> None:
    on_disk = {p.stem for p in golden.FOLDER.glob("*.kvz")}
    assert on_disk == set(MANIFEST) == set(CASES)
    assert len(CASES) >= 100, "golden records are only ever added"


@pytest.mark.parametrize("name", sorted(MANIFEST))
def test_golden_record(name: str) -> None:
    case, expected = CASES[name], MANIFEST[name]
    record = (golden.FOLDER / f"{name}.kvz").read_bytes()
    assert len(record) == expected["record_bytes"]
    assert golden.sha256(record) == expected["record_sha256"]
    assert golden.sha256(b"".join(p.bits.tobytes() for p in case.pages)) == expected["input_sha256"]

    # both readers give the same values
    pages = bridge.native_pages(record, case.asked)
    assert golden.sha256(b"".join(p.tobytes() for p in pages)) == expected["output_sha256"]
    reference = ref.decode_record(record, case.asked or ())
    for page, other in zip(pages, reference.pages, strict=True):
        np.testing.assert_array_equal(page, other)

    header = read_header(record)
    assert header.codec == case.codec
    assert header.mode == MODES[case.mode]
    assert header.bound == bridge.error_bound(case.bound_kind, case.bound)
    assert header.dims == case.dims
    assert (header.max_error is not None) == case.measured

    # both writers give the same bytes
    assert case.encode() == record
    geometries = [p.geometry for p in case.pages]
    view = bridge.view_of([[p.bits for p in case.pages]], geometries, [p.kind for p in case.pages], case.dims)
    (again,) = bridge.native_records(
        view,
        MODES[case.mode],
        case.bound_kind,
        case.bound,
        codec=case.codec,
        measure_error=case.measured,
        asked=case.asked,
    )
    assert again == record


def test_the_generator_refuses_to_change_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(golden, "FOLDER", tmp_path)
    monkeypatch.setattr(golden, "MANIFEST", tmp_path / "manifest.json")
    monkeypatch.setattr(golden, "cases", lambda: [CASES["absolute"], CASES["codec_raw"]])
    assert golden.main() == 0
    written = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert golden.main() == 0
    (tmp_path / "absolute.kvz").write_bytes(b"old")
    assert golden.main() == 1
    assert "would change" in capsys.readouterr().out
    assert (tmp_path / "absolute.kvz").read_bytes() == b"old"
    assert (tmp_path / "manifest.json").read_bytes() == written["manifest.json"]
