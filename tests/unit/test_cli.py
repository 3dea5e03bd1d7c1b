# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The command line: what it prints, and its exit status: 0 all holds, 1 a bound is violated, 2 unusable input."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

import kvzip
from kvzip import cli
from kvzip._arguments import size
from kvzip.backends import registry
from kvzip.backends.base import EncodeRequest
from kvzip.backends.raw import RawCodec
from kvzip.types import DType, ErrorBound

KEYS = [  # in the order of the issue that asked for them
    "raw_bytes",
    "stored_bytes",
    "ratio",
    "blocks",
    "evicted",
    "codec",
    "mode",
    "device",
    "bound",
    "max_error",
    "max_error_over_bound",
    "violations",
    "store_gb_per_s",
    "load_gb_per_s",
    "pool_payload_fraction",
]
PUBLIC = {
    *("SwapEngine", "HostPool", "BlockLayout", "BlockView", "ErrorBound", "Transfer", "Codec"),
    *("get_codec", "register_codec", "encode", "decode", "read_header", "system_info"),
    *("KvzipError", "ConfigError", "LayoutError", "CodecNotFoundError", "BackendUnavailableError"),
    *("PoolExhaustedError", "BlockNotFoundError", "FormatError", "FormatVersionError", "CorruptRecordError"),
    *("NativeError", "CudaError", "TransferError", "BoundPolicy", "CalibrationTable"),
}


class Broken(RawCodec):
    """Does not keep any bound: adds to the first value of each page; makes the second one infinite."""

    name: ClassVar[str] = "broken"
    lossless_only: ClassVar[bool] = False
    infinite: ClassVar[bool] = False

    def encode_page(self, values: npt.NDArray[Any], dtype: DType, request: EncodeRequest) -> bytes | None:
        changed = values.copy()
        changed.flat[0] ^= 0x0200
        if self.infinite:
            changed.flat[1] = 0x7F80
        return changed.tobytes()

    _ENCODED: ClassVar[int] = 0

    def encode_blocks(self, blocks: Any, request: EncodeRequest, out: Any) -> Any:
        tables, sizes = super().encode_blocks(blocks, request, out)
        for b in range(len(blocks)):
            for entry in tables[b]:
                page = out[b, int(entry["offset"]) * 16 :][: int(entry["size"])]
                page[:] = np.frombuffer(
                    self.encode_page(page.view(np.uint16), DType.BFLOAT16, request) or b"", np.uint8
                )
        return tables, sizes


@pytest.fixture(autouse=True)
def clean_registry() -> Iterator[None]:
    before = dict(registry._instances)
    yield
    registry._instances.clear()
    registry._instances.update(before)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = cli.main(arguments)
    except SystemExit as leave:  # argparse
        status = int(leave.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def save(path: Path, array: npt.NDArray[Any]) -> str:
    np.save(path, array)
    return str(path)


def cache(dtype: str = "uint16", shape: tuple[int, ...] = (2, 2, 40, 2, 8)) -> npt.NDArray[Any]:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return (x.view(np.uint32) >> 16).astype(np.uint16) if dtype == "uint16" else x.astype(dtype)


def strict(text: str) -> Any:
    """Parse JSON as the standard says: no NaN, no Infinity."""

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


# ---- demo


def test_demo_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "demo", "--codec", "raw", "--json")
    assert (status, err) == (0, "")
    result = strict(out)
    assert list(result)[: len(KEYS)] == KEYS
    assert (result["codec"], result["mode"], result["device"], result["bound"]) == ("raw", "none", "cpu", "lossless")
    assert (result["violations"], result["evicted"], result["max_error"]) == (0, 0, 0.0)
    assert result["raw_bytes"] > 0 < result["blocks"]
    assert result["ratio"] == pytest.approx(result["raw_bytes"] / result["stored_bytes"])
    assert result["store_gb_per_s"] > 0 < result["load_gb_per_s"]
    assert 0.97 <= result["pool_payload_fraction"] <= 1


def test_demo_table(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "demo", "--codec", "raw", "--bound", "abs:1e-2")
    assert (status, err) == (0, "")  # no progress: stderr is no terminal
    for word in ("blocks", "ratio", "raw, mode none, on cpu", "abs:0.01", "violations", "GB/s of raw data"):
        assert word in out, out


@pytest.mark.parametrize("mode", ["fixed", "plain", "outlier"])
@pytest.mark.parametrize("bound", ["1e-3", "abs:1e-2", "lossless"])
def test_demo_with_the_default_codec(bound: str, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "demo", "--bound", bound, "--mode", mode, "--json")
    result = strict(out)
    assert (status, result["violations"], result["codec"], result["mode"]) == (0, 0, "cuszp", mode)
    assert result["ratio"] > 1.3
    assert result["max_error_over_bound"] <= 1
    assert (result["max_error"] == 0) == (bound == "lossless")


def test_demo_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "demo", "--json")
    result = strict(out)
    assert (status, result["violations"], result["codec"], result["mode"]) == (0, 0, "cuszp", "rice")
    assert kvzip.calibration.parse_bounds(result["bound"]) == kvzip.BoundPolicy.uncalibrated()
    assert result["ratio"] >= 2.5
    assert 0 < result["max_error_over_bound"] <= 1


@pytest.mark.parametrize("dtype", ["uint16", "float16", "float32", ">f4", ">u2"])
def test_demo_inputs(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    array = cache(dtype.replace(">u2", "uint16").replace(">f4", "float32"))
    path = save(tmp_path / "x.npy", array.astype(dtype))
    status, out, err = run(capsys, "demo", "--input", path, "--codec", "raw", "--json")
    assert (status, err) == (0, "")
    assert strict(out)["blocks"] == 3  # 40 tokens in blocks of 16: the last is filled up


def test_demo_reads_other_byte_orders_as_the_same_values(tmp_path: Path) -> None:
    from kvzip.demo import read_input

    little, big = cache("float32"), tmp_path / "big.npy"
    np.save(big, np.asfortranarray(little.astype(">f4")))
    data, dtype = read_input(big)
    assert dtype is DType.FLOAT32
    assert np.array_equal(data, little.view(np.uint32))


def test_demo_with_every_kind_of_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    shape = (1, 2, 32, 2, 8)
    kinds = {
        "random": rng.integers(0, 1 << 16, shape),
        "constant": np.full(shape, 0x3F80),
        "zero": np.zeros(shape),
        "denormal": rng.integers(1, 0x80, shape),
        "nan": rng.integers(0x7F80, 0x8000, shape),
    }
    for bits in kinds.values():
        path = save(tmp_path / "x.npy", bits.astype(np.uint16))
        for bound in ("1e-3", "lossless"):
            status, out, _ = run(capsys, "demo", "--input", path, "--bound", bound, "--json")
            assert status == 0
            assert strict(out)["violations"] == 0


def test_demo_under_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "x.npy", cache(shape=(2, 2, 160, 2, 8)))
    status, out, _ = run(capsys, "demo", "--input", path, "--codec", "raw", "--budget", "8KiB", "--json")
    result = strict(out)
    assert status == 0
    assert result["blocks"] == 10
    assert 0 < result["evicted"] < 10
    assert result["raw_bytes"] == (10 - result["evicted"]) * 2 * 2 * 16 * 2 * 8 * 2
    _, out, _ = run(capsys, "demo", "--input", path, "--codec", "raw", "--budget", "8KiB")
    assert f"{result['evicted']} evicted under the budget" in out


def test_demo_loads_into_other_block_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moves: list[tuple[int, int]] = []
    real = kvzip.SwapEngine.load

    def load(self: kvzip.SwapEngine, keys: Any, out: kvzip.BlockView, **more: Any) -> Any:
        names = list(keys)
        numbered = [(k.decode().partition("block-")[2], int(b)) for k, b in zip(names, out.block_ids, strict=True)]
        moves.extend((int(number), block) for number, block in numbered if number)  # the rest is the warm-up
        return real(self, names, out, **more)

    monkeypatch.setattr(kvzip.SwapEngine, "load", load)
    assert run(capsys, "demo", "--codec", "raw")[0] == 0
    assert len(moves) > 1
    assert all(source != target for source, target in moves)


@pytest.mark.parametrize("infinite", [False, True])
def test_demo_says_when_a_bound_is_violated(infinite: bool, capsys: pytest.CaptureFixture[str]) -> None:
    codec = Broken()
    codec.infinite = infinite  # type: ignore[misc]
    kvzip.register_codec(codec)
    status, out, _ = run(capsys, "demo", "--codec", "broken", "--json")
    assert status == 1
    result = strict(out)
    assert result["violations"] >= result["blocks"] * (2 if infinite else 1)
    assert (result["max_error"] is None) == infinite
    status, out, _ = run(capsys, "demo", "--codec", "broken")
    assert status == 1
    assert re.search(r"violations +[1-9]", out)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--bound", "-1"], "expected one argument|not a finite positive number"),
        (["--bound=-1"], "not a finite positive number: use a value such as 1e-3"),
        (["--bound", "many"], "use a number such as 1e-3"),
        (["--bound", "2"], "above 1: use a fraction"),
        (["--bound", "nan"], "not a finite positive number"),
        (["--mode", "best"], "has no mode 'best': use one of"),
        (["--codec", "nope"], "no codec is named 'nope': use one of"),
        (["--block-tokens", "0"], "block of 0 tokens: use 1 to 1048576"),
        (["--block-tokens", "9" * 22], "use 1 to 1048576"),
        (["--block-tokens", "x"], "invalid int value"),
        (["--block-tokens", "1000000000000000"], "use 1 to 1048576"),
        (["--budget", "0"], "use at least one byte"),
        (["--budget", "1"], "larger capacity"),
        (["--budget", "4KiB"], "the pool can give .* of 4096"),
        (["--budget", "3 parsecs"], "is no size: use bytes"),
        (["--budget", "nan"], "is no size"),
        (["--budget", "1000000TiB"], "capacity_bytes=1099511627776000000"),
        (["--threads", "-1"], "threads -1 is negative"),
        (["--device", "cuda"], "cuda|GPU"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--input", "/does/not/exist.npy"], "No such file"),
        (["--input", "."], "directory"),
        (["--unknown"], "unrecognized arguments"),
    ],
)
def test_demo_with_unusable_arguments(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    if arguments == ["--device", "cuda"]:
        torch = pytest.importorskip("torch", reason="torch is not installed")
        if torch.cuda.is_available():
            pytest.skip("there is a GPU here")
    if "--mode" not in arguments and "--codec" not in arguments and arguments != ["--device", "cuda"]:
        arguments = [*arguments, "--codec", "raw"]
    status, out, err = run(capsys, "demo", *arguments)
    assert (status, out) == (2, "")
    assert re.search(why, err), err
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("kvzip")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("text.npy", b"this is no array\n", "cannot read"),
        ("empty.npy", b"", "cannot read"),
        ("zip.npy", b"PK\x03\x04 not really a zip archive", "cannot read"),
        ("cut.npy", b"\x93NUMPY\x01\x00\xff\xff{'descr'", "cannot read"),
        ("pickle.npy", b"\x80\x04K\x01.", "cannot read"),
        ("huge.npy", b"shape:(1000000000, 2, 1000000000, 8, 64)", "cannot read"),
        ("odd.npy", b"shape:(2, 2, 'x', 1, 1)", "cannot read"),
    ],
)
def test_demo_with_unusable_files(
    name: str, content: bytes, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content.startswith(b"shape:"):
        header = b"{'descr': '<u2', 'fortran_order': False, 'shape': " + content[6:] + b"}"
        header = header.ljust(117) + b"\n"
        content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    path = tmp_path / name
    path.write_bytes(content)
    status, out, err = run(capsys, "demo", "--input", str(path))
    assert (status, out) == (2, "")
    assert re.search(why, err), err
    assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.zeros((2, 3), np.uint16), r"shape \(2, 3\): give \[layers, 2, tokens, kv_heads, head_dim\]"),
        (np.zeros((2, 3, 4, 5, 6), np.uint16), r"shape \(2, 3, 4, 5, 6\)"),
        (np.zeros((2, 2, 0, 5, 6), np.uint16), "none of them 0"),
        (np.zeros((2, 2, 4, 1, 8), np.float64), "float64: give uint16 .*float16 or float32"),
        (np.zeros((2, 2, 4, 1, 8), np.int16), "int16: give uint16"),
    ],
)
def test_demo_with_arrays_of_another_kind(
    array: npt.NDArray[Any], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "demo", "--input", save(tmp_path / "x.npy", array))
    assert (status, out) == (2, "")
    assert re.search(why, err), err


def test_demo_with_an_archive_of_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "x.npz", a=cache(), b=cache())
    status, _, err = run(capsys, "demo", "--input", str(tmp_path / "x.npz"))
    assert status == 2
    assert "of several arrays" in err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("64MiB", 64 << 20),
        ("1.5KiB", 1536),
        ("2kb", 2000),
        ("1GB", 10**9),
        ("1TB", 10**12),
        ("1e3", 1000),
        ("7B", 7),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert size(text) == value


# ---- bench


def test_bench_measures_and_verifies(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    status, out, err = run(
        capsys, "bench", "--quick", "--device", "cpu", "--bound", "1e-2", "--bound", "lossless", "--json",
        *("--out", str(file)),
    )  # fmt: skip
    assert (status, err) == (0, "")
    result = strict(out)
    assert strict(file.read_text()) == result
    assert result["violations"] == 0
    assert result["settings"]["bounds"] == ["rel:0.01", "lossless"]
    assert result["settings"]["pages_of_a_block"] == 8
    assert {"cpu", "cpu_cores", "native", "kvzip", "numpy"} <= set(result["environment"])
    rows = {(r["way"], r["direction"], r["blocks"]): r for r in result["rows"]}
    sizes = sorted({blocks for *_, blocks in rows})
    assert len(rows) == len(result["rows"]) == 2 * 2 * len(sizes)
    for (way, _, blocks), row in rows.items():
        assert row["raw_bytes"] == blocks * result["settings"]["block_bytes"]
        assert row["us_p10"] <= row["us"] <= row["us_p90"]
        assert row["gb_per_s"] == pytest.approx(row["raw_bytes"] / row["us"] / 1e3)
        assert row["ratio"] > (3 if way == "kvzip-1e-2" else 1.3)
    loaded = rows["kvzip-1e-2", "in", sizes[-1]]
    assert loaded["compared_blocks"] >= sizes[-1]
    assert 0.5 < loaded["max_error_over_bound"] <= 1
    assert {(r["codec"], r["op"]) for r in result["codec_rows"]} == {
        (w, op) for w in ("kvzip-1e-2", "kvzip-lossless") for op in ("encode", "decode")
    }


def test_bench_table(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "bench", "--quick", "--device", "cpu", "--bound", "abs:1e-2", "--codec", "raw")
    assert (status, err) == (0, "")
    for word in ("kvzip-abs:1e-2", "GB/s", "blocks", "ratio 0.9", "encode alone, 1 threads", "violations  0"):
        assert word in out, out


def test_bench_fails_when_a_bound_is_violated(capsys: pytest.CaptureFixture[str]) -> None:
    kvzip.register_codec(Broken())
    status, out, _ = run(capsys, "bench", "--quick", "--device", "cpu", "--codec", "broken", "--json")
    assert status == 1
    assert strict(out)["violations"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bound", "0"], "error bound"),
        (["--mib", "0"], "0 MiB"),
        (["--block-tokens", "0"], "0 tokens"),
        (["--input", "nowhere.npy"], "cannot read nowhere.npy"),
        (["--codec", "none"], "no codec is named"),
        (["--out", "no/such/folder/x.json", "--codec", "raw"], "there is no folder"),
    ],
)
def test_bench_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    status, out, err = run(capsys, "bench", "--quick", "--device", "cpu", *arguments)
    assert (status, out) == (2, "")
    assert words in err


# ---- plots and completion


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plots(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    numbers = ("--layers", "8", "--kv-heads", "2", "--head-dim", "64", "--parameters", "1e9")
    for command in (("bench", "--quick", "--device", "cpu", "--codec", "raw"), ("plan", *numbers)):
        path = tmp_path / f"{command[0]}.{suffix}"
        assert run(capsys, *command, "--plot", str(path))[0] == 0
        assert {"png": b"\x89PNG", "svg": b"<svg "}[suffix] in path.read_bytes()


def test_plots_that_cannot_be_drawn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = ("--layers", "8", "--kv-heads", "2", "--head-dim", "64")
    status, _, err = run(capsys, "plan", *numbers, "--plot", "no/such/folder/x.png")
    assert status == 2
    assert "there is no folder" in err
    status, _, err = run(capsys, "plan", *numbers, "--plot", "x.doc")
    assert status == 2
    assert "x.doc is no picture" in err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = run(capsys, "plan", *numbers, "--plot", "x.png")
    assert status == 2
    assert "pip install 'kvzip[bench]'" in err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed")
    status, script, _ = run(capsys, "completion", shell)
    assert status == 0
    for word in ("verify", "block-tokens", "gb-per-s"):
        assert word in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, check=True, text=True, timeout=60)


def test_bash_completes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed")
    script = run(capsys, "completion", "bash")[1]
    asked = "COMP_WORDS=(kvzip plan --kv); COMP_CWORD=2; $f; echo ${COMPREPLY[@]}"
    found = "f=$(complete -p kvzip | sed 's/.*-F \\([^ ]*\\).*/\\1/')"
    done = subprocess.run(["bash", "-c", f"{script}\n{found}\n{asked}"], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["--kv-heads"], done.stderr


def test_completion_without_shtab(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    status, out, err = run(capsys, "completion", "zsh")
    assert (status, out) == (2, "")
    assert "pip install 'kvzip[completion]'" in err


# ---- info and inspect


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "info", "--json")
    assert status == 0
    info = strict(out)
    assert {"kvzip", "format_version", "python", "platform", "native", "codecs", "packages", "settings"} <= set(info)
    assert info["format_version"] == 1
    assert {"cuszp", "raw"} <= set(info["codecs"])
    status, out, _ = run(capsys, "info")
    assert status == 0
    assert "codecs.raw.modes" in out


def test_info_and_raw_work_when_the_native_library_is_broken(tmp_path: Path) -> None:
    text = tmp_path / "libkvzip_native.so"
    text.write_text("this is no library\n")
    for library, complaint in ((text, "cannot be loaded"), (tmp_path / "missing.so", "is no file")):
        environment = {**os.environ, "KVZIP_LIBRARY": str(library)}

        def kvzip_command(*arguments: str, env: dict[str, str] = environment) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "kvzip.cli", *arguments]
            return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)

        done = kvzip_command("info", "--json")
        assert done.returncode == 0, done.stderr
        info = strict(done.stdout)
        assert complaint in info["native"]["error"]
        assert str(library) in info["native"]["error"]
        assert info["settings"]["KVZIP_LIBRARY"] == str(library)
        assert kvzip_command("demo", "--codec", "raw").returncode == 0
        # The default codec cannot run: that is said at once, not found out later from a pool full of raw blocks.
        done = kvzip_command("demo", "--json")
        assert done.returncode == 2
        assert str(library) in done.stderr


def test_info_with_settings_that_make_no_sense() -> None:
    for name in ("KVZIP_THREADS", "KVZIP_CPU_ISA"):
        environment = {**os.environ, name: "nonsense"}
        command = [sys.executable, "-m", "kvzip.cli", "info", "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert "nonsense" in done.stdout


def test_info_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvzip import _native

    def broken() -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(_native, "describe", broken)
    monkeypatch.setattr(registry, "_load", lambda name: broken())
    registry._instances.clear()
    info = kvzip.system_info()
    assert info["native"] == {"error": "RuntimeError: broken"}
    assert info["codecs"]["cuszp"] == {"error": "RuntimeError: broken"}


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record"
    record = kvzip.encode(cache("float32")[0], bound=ErrorBound.relative(0.1), codec="raw", layout="2NHD")
    path.write_bytes(record)
    status, out, _ = run(capsys, "inspect", str(path), "--json")
    assert status == 0
    header = strict(out)
    assert (header["codec"], header["mode"], header["bound"], header["dims"]) == ("raw", "none", "rel:0.1", "2NHD")
    assert header["record_bytes"] == len(record)
    assert header["max_error"] is None
    assert header["codings"] == {"raw": 2}
    status, out, _ = run(capsys, "inspect", str(path))
    assert status == 0
    assert re.search(r"codec +raw", out)


def test_inspect_a_file_of_lmcache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such files have a seal behind the record; they come from a pipe too."""
    record = kvzip.encode(cache("float32")[0], bound=ErrorBound.relative(0.1), codec="raw", layout="2NHD")
    content = record + bytes(range(16))
    (tmp_path / "file").write_bytes(content)
    status, out, _ = run(capsys, "inspect", str(tmp_path / "file"), "--json")
    assert status == 0
    assert strict(out)["lmcache_seal"] == bytes(range(16)).hex()
    assert strict(out)["record_bytes"] == len(record)
    command = [sys.executable, "-m", "kvzip.cli", "inspect", "/dev/stdin"]
    done = subprocess.run(command, input=content, capture_output=True, timeout=120, check=True)
    assert b"lmcache_seal" in done.stdout
    for other in (content[:-1], content + b"x", content[: len(record) // 2]):
        (tmp_path / "file").write_bytes(other)
        assert run(capsys, "inspect", str(tmp_path / "file"))[:2] == (2, "")
    assert run(capsys, "inspect", "/dev/zero")[:2] == (2, "")  # it has no end


def test_inspect_what_is_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = kvzip.encode(cache("float32")[0], bound=ErrorBound.relative(0.1), codec="raw", layout="2NHD")
    damaged = bytearray(record)
    damaged[-1] ^= 1
    cases = [b"", b"KVZP", b"text", record[:-1], record + b"x", bytes(damaged), b"KVZP\x07\x00" + record[6:]]
    for content in cases:
        (tmp_path / "record").write_bytes(content)
        status, out, err = run(capsys, "inspect", str(tmp_path / "record"))
        assert (status, out) == (2, "")
        assert len(err.strip().splitlines()) == 1, err
    for path in (tmp_path, tmp_path / "nothing"):
        status, out, err = run(capsys, "inspect", str(path))
        assert (status, out) == (2, "")


# ---- the rest


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["fly"]):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (2, "")
        assert "usage: kvzip" in err
    assert run(capsys, "--help")[0] == 0
    assert run(capsys, "demo", "--help")[0] == 0


def test_a_reader_that_has_seen_enough() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [
        sys.executable,
        "-m",
        "kvzip.cli",
        "plan",
        "--layers",
        "8",
        "--kv-heads",
        "2",
        "--head-dim",
        "64",
        "--ratio",
        "2",
    ]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=120, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (2, b"")


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvzip.info.system_info", interrupt)
    assert run(capsys, "info") == (130, "", "")


def test_public_names() -> None:
    assert set(kvzip.__all__) == PUBLIC
    assert len(kvzip.__all__) == len(PUBLIC)
    for name in PUBLIC:
        assert getattr(kvzip, name).__doc__, f"{name} has no docstring"
