# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Faults that have no other home, and docs/reference/faults.md: each of its rows names a test that is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvzip import BlockView, ErrorBound, SwapEngine
from kvzip.backends import registry
from kvzip.errors import BackendUnavailableError

ROOT = Path(__file__).parents[2]

PRELUDE = """
import os, sys
import numpy as np
from kvzip import BlockView, ErrorBound, SwapEngine
pages = np.random.default_rng(0).normal(size=(64, 2, 16, 4, 64)).astype(np.float16)
keys = [b"%d" % i for i in range(64)]
out = BlockView([np.zeros_like(pages)], "2NHD")
engine = SwapEngine(1 << 24, bound=ErrorBound.relative(1e-3), threads=2)
engine.store(keys, BlockView([pages], "2NHD"))
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_fork_leaves_both_sides_working() -> None:
    """The codec's threads and the pool's memory, in a child that forked while they were there."""
    code = """
child = os.fork()
if child == 0:
    import signal
    signal.alarm(60)
engine.load(keys, out)
engine.store(keys[:8], out[range(8)])
assert np.abs(out.tensors[0].astype(np.float32) - pages).max() < 0.1
if child == 0:
    os.write(1, b"child ")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("parent")
"""
    assert run(code) == "child parent\n"


def test_forks_beside_stores() -> None:
    """Whatever moment a child is born in, its engine works or says that it does not: no call waits for ever."""
    code = """
import signal, threading, time
from kvzip import KvzipError
small = SwapEngine(1 << 20, bound=ErrorBound.lossless(), threads=1)
one, ended = BlockView([pages[:1]], "2NHD"), threading.Event()
def stores(key):
    while not ended.is_set():
        small.store([key], one)
threads = [threading.Thread(target=stores, args=(b"%d" % i,)) for i in range(4)]
for thread in threads:
    thread.start()
states = []
for _ in range(40):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            small.store([b"child"], one)
        except KvzipError:
            os._exit(0 if not small.usable else 1)
        os._exit(0)
    states.append(os.waitpid(child, 0)[1])
    time.sleep(0.001)
ended.set()
for thread in threads:
    thread.join()
assert states == [0] * 40, states
print("end")
"""
    assert run(code) == "end\n"


def test_a_process_may_end_with_an_open_engine() -> None:
    assert run('print("end")\n') == "end\n"
    assert run('kept = engine.load(keys, out)\nwith engine.pin(keys):\n    print("end")\n    sys.exit(0)\n') == "end\n"


def test_a_codec_without_threads() -> None:
    """Address space for no thread's stack: the codec goes on with the caller's own."""
    code = """
import mmap, resource, threading
fresh = SwapEngine(1 << 24, bound=ErrorBound.relative(1e-3), threads=32)
fresh.store(keys[:1], out[[0]])  # what is allocated once
mapped = int(open("/proc/self/statm").read().split()[0]) * mmap.PAGESIZE
resource.setrlimit(resource.RLIMIT_AS, (mapped + (40 << 20), -1))
threading.stack_size(64 << 20)
try:
    threading.Thread(target=len).start()
except RuntimeError:
    pass
else:
    raise AssertionError("there is a thread to be had")
fresh.store(keys, BlockView([pages], "2NHD"))
fresh.load(keys, out)
assert np.abs(out.tensors[0].astype(np.float32) - pages).max() < 0.1
print("end")
"""
    assert run(code) == "end\n"


def test_a_codec_that_is_missing_has_a_stand_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(name: str) -> None:
        raise BackendUnavailableError("nvCOMP is not installed")

    monkeypatch.setattr("kvzip._log._logged", set())
    monkeypatch.setitem(registry._instances, "nvcomp", registry.get_codec("raw"))
    monkeypatch.setattr(registry._instances["nvcomp"], "check_available", lambda: missing("nvcomp"), raising=False)
    view = BlockView([np.random.default_rng(0).normal(size=(2, 2, 16, 2, 32)).astype(np.float16)], "2NHD")
    for _ in range(2):
        with SwapEngine(1 << 20, codec="nvcomp", bound=ErrorBound.relative(1e-2)) as engine:
            assert engine.store([b"a", b"b"], view).result().fallbacks == {"codec_unavailable": 4}
            assert engine.settings.codec.name == "cuszp"
            before = view.tensors[0].copy()
            view.tensors[0][:] = 0
            engine.load([b"a", b"b"], view)
            assert np.array_equal(view.tensors[0], before)
    assert caplog.text.count("cuszp takes its place, lossless: nvCOMP is not installed") == 1


def test_the_page_names_tests_that_are_there() -> None:
    text = (ROOT / "docs" / "reference" / "faults.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and not line.startswith(("| fault", "|---"))]
    named = [re.search(r"\| `(tests/[\w/]+\.py)::(test_\w+)` \|$", row) for row in rows]
    assert len(rows) > 20
    for row, found in zip(rows, named, strict=True):
        assert found, f"no test in the last column: {row}"
        file, name = found.groups()
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file} has no {name}"
