# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Codecs by name: built in, registered by hand, and brought by other packages."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

import kvzip
from kvzip.backends import registry
from kvzip.backends.raw import RawCodec
from kvzip.errors import CodecNotFoundError, ConfigError


class Other(RawCodec):
    name: ClassVar[str] = "other"


@pytest.fixture(autouse=True)
def clean_registry() -> Iterator[None]:
    before = dict(registry._instances)
    yield
    registry._instances.clear()
    registry._instances.update(before)


def test_names_that_kvzip_brings() -> None:
    assert {"cuszp", "raw"} <= set(registry.codec_names())
    assert registry.codec_names() == sorted(registry.codec_names())
    assert kvzip.get_codec("raw").name == "raw"
    assert kvzip.get_codec("raw") is kvzip.get_codec("raw")


def test_a_codec_object_is_itself() -> None:
    codec = Other()
    assert kvzip.get_codec(codec) is codec
    assert "other" not in registry.codec_names()


@pytest.mark.parametrize("name", ["", "CUSZP", "nope", "kvzip.backends.raw"])
def test_names_that_do_not_exist(name: str) -> None:
    with pytest.raises(CodecNotFoundError, match=r"no codec is named .*: use one of cuszp, .*raw") as caught:
        kvzip.get_codec(name)
    assert isinstance(caught.value, LookupError)


@pytest.mark.parametrize("taken", ["raw", "cuszp", "other"])
def test_a_name_that_is_taken(taken: str) -> None:
    kvzip.register_codec(Other())

    class Same(RawCodec):
        name: ClassVar[str] = taken

    with pytest.raises(ConfigError, match=f"'{taken}' is registered: pass replace=True"):
        kvzip.register_codec(Same())
    same = Same()
    kvzip.register_codec(same, replace=True)
    assert kvzip.get_codec(taken) is same


@pytest.mark.parametrize("name", ["", "x" * 17, "\u00fc", "tab\t"])
def test_names_that_no_record_can_keep(name: str) -> None:
    class Odd(RawCodec):
        pass

    Odd.name = name
    with pytest.raises(ConfigError, match="1 to 16 printable ASCII characters"):
        kvzip.register_codec(Odd())


def test_one_object_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    registry._instances.pop("raw", None)
    got: list[Any] = []
    barrier = threading.Barrier(8)

    def look() -> None:
        barrier.wait()
        got.append(kvzip.get_codec("raw"))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert len({id(codec) for codec in got}) == 1


# ---- packages that bring a codec, as pip would install them

CODEC = """
from kvzip.backends.raw import RawCodec
class Their(RawCodec):
    name = "their"
"""


def run_with_package(folder: Path, entry: str, module: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process in which a package with one entry point is installed."""
    info = folder / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[kvzip.codecs]\n{entry}\n")
    (folder / "their_module.py").write_text(module)
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n" + code
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)


def test_an_installed_codec_is_found(tmp_path: Path) -> None:
    done = run_with_package(
        tmp_path,
        "their = their_module:Their",
        CODEC,
        "import kvzip\nfrom kvzip.backends.registry import codec_names\n"
        "assert 'their' in codec_names()\n"
        "assert 'their_module' not in sys.modules\n"  # listing loads nothing
        "assert kvzip.get_codec('their').name == 'their'\n"
        "assert 'their' in kvzip.system_info()['codecs']\n",
    )
    assert done.returncode == 0, done.stderr


def test_an_entry_point_may_be_an_object(tmp_path: Path) -> None:
    done = run_with_package(
        tmp_path,
        "their = their_module:codec",
        CODEC + "codec = Their()\n",
        "import kvzip; assert kvzip.get_codec('their').name == 'their'",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("entry", "module"), [("their = their_module:Their", "class Their: name = 'their'\n")])
def test_what_is_no_codec(tmp_path: Path, entry: str, module: str) -> None:
    code = "import kvzip\ntry: kvzip.get_codec('their')\nexcept kvzip.CodecNotFoundError as e: print(e)"
    done = run_with_package(tmp_path, entry, module, code)
    assert "entry point 'their' of kvzip.codecs gives no kvzip.Codec" in done.stdout, done.stderr


def test_a_built_in_name_cannot_be_taken_by_a_package(tmp_path: Path) -> None:
    done = run_with_package(
        tmp_path,
        "raw = their_module:Their",
        CODEC.replace('"their"', '"raw"'),
        "import kvzip; assert type(kvzip.get_codec('raw')).__module__ == 'kvzip.backends.raw'",
    )
    assert done.returncode == 0, done.stderr


def test_a_broken_package_does_not_break_the_report(tmp_path: Path) -> None:
    done = run_with_package(
        tmp_path,
        "their = their_module:Their",
        "import a_module_that_is_not_installed\n",
        "import kvzip; info = kvzip.system_info(); assert 'error' in info['codecs']['their'], info['codecs']",
    )
    assert done.returncode == 0, done.stderr


def test_a_broken_package_gives_an_error_of_ours(tmp_path: Path) -> None:
    done = run_with_package(
        tmp_path,
        "their = their_module:Their",
        "import a_module_that_is_not_installed\n",
        "import kvzip\ntry: kvzip.get_codec('their')\nexcept kvzip.BackendUnavailableError as e: print(e)",
    )
    assert "a_module_that_is_not_installed" in done.stdout, done.stderr


def test_a_codec_may_use_another_one_when_it_is_made(tmp_path: Path) -> None:
    code = (
        "import faulthandler; faulthandler.dump_traceback_later(3, exit=True)\nimport kvzip; kvzip.get_codec('their')"
    )
    module = CODEC + "import kvzip\ninner = kvzip.get_codec('raw')\n"
    done = run_with_package(tmp_path, "their = their_module:Their", module, code)
    assert done.returncode == 0, done.stderr
