# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The README and the documentation do what they say: code runs, names exist, links lead somewhere."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripts import load_script

import kvzip
from kvzip import CalibrationTable, _config, cli
from kvzip._arguments import build_parser

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted(p for p in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

pytestmark = pytest.mark.skipif(
    not (ROOT / "bench" / "results").exists(),
    reason="a source distribution leaves out files that the documents link to",
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a document, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", read(name), re.MULTILINE | re.DOTALL)


def prepare_table(folder: Path) -> None:
    """What `kvzip calibrate` writes, for the guide that goes on with it."""
    CalibrationTable(np.ones((2, 4, 64), np.float32), "a model", 2048).save(folder / "table.npz")


PREPARED = {"docs/guides/calibrate.md": prepare_table}
RUNNING = [n for n in (str(p.relative_to(ROOT)) for p in DOCS) if {"python", "sh"} & {block[0] for block in blocks(n)}]


@pytest.mark.parametrize("name", RUNNING)
def test_the_code_of_the_document_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    PREPARED.get(name, lambda folder: None)(tmp_path)
    namespace: dict[str, Any] = {}
    for language, text in blocks(name):
        if language == "python":
            try:
                exec(compile(text, name, "exec"), namespace)
            except ModuleNotFoundError as missing:
                if missing.name not in ("torch", "transformers"):
                    raise
                pytest.skip(f"needs {missing.name}")
        elif language == "sh" and name.startswith("docs"):  # .ci/run runs the others in a shell
            for line in text.splitlines():
                command, *arguments = shlex.split(line)
                if command == "pip":
                    extras = re.findall(r"kvzip\[(.*?)\]", line)
                    assert all(f"\n{extra} = [" in read("pyproject.toml") for e in extras for extra in e.split(","))
                    continue
                assert command == "kvzip", "mark what the tests cannot run as `bash`"
                assert cli.main(arguments) == 0, line
    assert "Error" not in capsys.readouterr().err


def within_the_default(before: Any, after: Any) -> bool:
    """Whether blocks, ``[blocks, K and V, tokens, heads, head_dim]`` in float64, are within the default bounds."""
    (keys, values), error = before.unbind(1), (after - before).abs()
    page_range = keys.amax((1, 2, 3), keepdim=True) - keys.amin((1, 2, 3), keepdim=True)
    token_rms = values.square().mean(-1, keepdim=True).sqrt()
    return bool((error[:, 0] <= 1e-3 * page_range).all() and (error[:, 1] <= 0.1 * token_rms).all())


@pytest.mark.gpu
def test_the_code_of_the_gpu_guide_runs() -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    namespace: dict[str, Any] = {}
    for language, text in blocks("docs/guides/gpu.md"):
        if language == "py":
            exec(compile(text, "gpu.md", "exec"), namespace)
    before, after = namespace["layers"][0][:32].double(), namespace["layers"][0][32:].double()
    assert within_the_default(before, after)


def test_the_code_of_the_guide_for_engines_runs() -> None:
    pytest.importorskip("torch", reason="the guide's cache is made of torch tensors")
    namespace: dict[str, Any] = {}
    set_up, swap = (text for language, text in blocks("docs/guides/integrate.md") if language == "python")
    exec(compile(set_up, "integrate.md", "exec"), namespace)
    for layer in namespace["cache"]:
        layer.normal_()
    exec(compile(swap, "integrate.md", "exec"), namespace)
    for layer in namespace["cache"]:
        before, after = layer[[5, 9, 2]].double(), layer[[40, 41, 42]].double()
        error = (after - before).abs().amax((2, 3, 4))
        assert within_the_default(before, after)
        assert not error[0].any()
        assert error[1:].all()
    namespace["engine"].close()
    namespace["pool"].close()


def test_the_readme_has_one_block_to_install_and_one_to_test() -> None:
    commands = [text.splitlines() for language, text in blocks("README.md") if language == "sh"]
    assert [lines[-1] for lines in commands] == ["kvzip demo", "pytest"]


def test_the_figures_are_those_that_were_measured() -> None:
    figures = load_script("docs/make_figures.py")
    remedy = "run `python docs/make_figures.py`"
    for name, text in figures.documents().items():
        assert figures.replaced(read(name), text) == read(name), remedy
    assert figures.performance() == read("docs/performance.md"), remedy


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{path.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in anchors, f"{path.name} links to {target}"


def test_the_api_page_names_every_export_and_no_other() -> None:
    text = read("docs/reference/api.md")
    missing = [name for name in kvzip.__all__ if not re.search(rf"`{name}\b", text)]
    assert not missing
    errors = set(re.findall(r"^\| `(\w+Error)`", text, re.MULTILINE))
    assert errors == {name for name in kvzip.__all__ if name.endswith("Error")}


@pytest.mark.parametrize("function", ["SwapEngine", "HostPool", "BlockView", "encode", "decode"])
def test_the_api_page_has_the_signatures(function: str) -> None:
    text = read("docs/reference/api.md")
    found = re.search(rf"^### `{function}\((.*)\)", text, re.MULTILINE)
    assert found
    documented = [part.split("=")[0].strip() for part in found[1].split(",")]
    parameters = inspect.signature(getattr(kvzip, function)).parameters
    assert [name for name in documented if name != "*"] == list(parameters)
    for part in found[1].split(","):
        name, _, default = part.partition("=")
        if default:
            assert eval(default) == parameters[name.strip()].default


@pytest.mark.parametrize("name", ["SwapEngine", "Transfer", "BlockLayout", "ErrorBound", "BlockView", "HostPool"])
def test_the_api_page_names_the_members(name: str) -> None:
    section = re.search(rf"^### `{name}\b.*?(?=^##)", read("docs/reference/api.md"), re.MULTILINE | re.DOTALL)
    assert section
    cells = [row.split("|")[1] for row in re.findall(r"^(\|.*)$", section[0], re.MULTILINE)]
    documented = {m for cell in cells for m in re.findall(r"`(\w+)", cell)} - {"view", "len"}
    made = getattr(kvzip, name)
    public = {m for m in (*vars(made), *getattr(made, "__annotations__", ())) if not m.startswith("_")}
    assert documented <= public | _set_by_init(made)
    if name not in ("BlockView", "HostPool"):  # these two have members for kvzip's own use as well
        own = {m for m in public if "HostPaths" in (getattr(getattr(made, m, None), "__doc__", None) or "")}
        assert public - documented - own <= {"channels", "kind", "value"}


def _set_by_init(made: type) -> set[str]:
    return set(re.findall(r"self\.([a-z]\w*)\b.* = ", inspect.getsource(made)))


def test_the_command_line_page_has_every_option() -> None:
    sections = re.split(r"^## kvzip ", read("docs/reference/cli.md"), flags=re.MULTILINE)[1:]
    documented = {s.split()[0]: set(re.findall(r"^\| `(--[\w-]+)", s, re.MULTILINE)) for s in sections}
    action = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert documented.keys() == action.choices.keys()
    for command, parser in action.choices.items():
        options = {o for a in parser._actions for o in a.option_strings if o.startswith("--")} - {"--help"}
        assert documented[command] == options, command


def test_the_command_line_page_has_every_key_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--json"]) == 0
    keys = set(json.loads(capsys.readouterr().out))
    table = read("docs/reference/cli.md").split("`--json` prints one object.")[1].split("## ")[0]
    assert keys == {k for row in re.findall(r"^\|(.*?)\|", table, re.MULTILINE) for k in re.findall(r"`(\w+)`", row)}


def test_the_settings_page_has_the_table_of_the_code() -> None:
    text = read("docs/reference/settings.md")
    for s in _config.SETTINGS:
        default = f"`{s.default}`" if s.default else ""
        row = f"| `{s.name}` | {default} | {s.unit} | {s.meaning} |"
        assert re.sub(" +", " ", row) in text


def test_the_settings_page_has_every_build_switch() -> None:
    build = set(re.findall(r"^\s*#   (KVZIP_\w+) ", read("CMakeLists.txt"), re.MULTILINE))
    assert build
    assert all(f"`{name}`" in read("docs/reference/settings.md") for name in build)
