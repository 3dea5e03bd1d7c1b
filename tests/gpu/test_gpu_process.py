# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""A real GPU's worst cases, each in a process of its own: it is lost, the process forks, the process ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
WAYS = pytest.mark.parametrize("small", [False, True], ids=["worker", "small"])

PRELUDE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import os, warnings
warnings.simplefilter("ignore")
import torch
from kvzip import BlockView, ConfigError, CudaError, ErrorBound, HostPool, SwapEngine, TransferError
from kvzip.errors import BackendUnavailableError
from kvzip.memory import PinnedMemory
from kvzip.staging import Staging
pages = torch.randn((64, 2, 16, 4, 64), device="cuda").to(torch.bfloat16)
before = pages.clone()
keys = [b"%d" % i for i in range(64)]
view = BlockView([pages], "2NHD")
pool = HostPool(64 << 20, resource=PinnedMemory())
def engine_of(small):
    staging = Staging() if small else Staging(chunk_bytes=1 << 20, small_bytes=0)
    made = SwapEngine(pool, bound=ErrorBound.lossless(), staging=staging)
    for count in (64, 8):  # the first launch of a kernel loads it, and CUDA may wait for the device to do so
        made.store(keys[:count], view[range(count)]).wait()
        made.load(keys[:count], view[range(count)]).wait()
    return made
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@WAYS
def test_a_lost_gpu_is_said_and_the_process_ends_well(small: bool) -> None:
    """Pages at an address that is nobody's: an error that CUDA does not recover from."""
    code = f"""
import numpy as np
from fake_cuda import FakeTensor
class Nowhere(FakeTensor):
    def data_ptr(self):
        return 1 << 20
engine = engine_of({small})
bad = BlockView([Nowhere(np.zeros((64, 2, 16, 4, 64), np.uint16))], "2NHD")
try:
    engine.store([b"x"], bad[[0]]).result(60)
except CudaError as error:
    assert error.fatal, error
else:
    raise AssertionError
assert not engine.usable
for use in (engine.store, engine.load):
    try:
        use(keys, view)
    except CudaError as error:
        assert "is lost to this process" in str(error), error
    else:
        raise AssertionError
host = BlockView([torch.zeros(pages.shape, dtype=torch.bfloat16)], "2NHD")
engine.load(keys, host)  # the records are there
print(engine.stats().records, host.tensors[0].abs().sum().item() > 0)
engine.close()
"""
    assert run(code) == "64 True\n"


@WAYS
def test_a_forked_child_leaves_the_gpu_to_its_parent(small: bool) -> None:
    code = f"""
engine = engine_of({small})
torch.cuda._sleep(500_000_000)
store = engine.store([b"new"], view[[0]])
load = engine.load(keys[:8], view[range(8, 16)])
child = os.fork()
if child == 0:
    import signal
    signal.alarm(30)
    assert not engine.usable
    for transfer in (store, load):
        try:
            transfer.result(5)
        except TransferError as error:
            assert "belongs to another process" in str(error), error
        else:
            os._exit(2)
    for use in (lambda: engine.store([b"x"], view[[0]]), lambda: SwapEngine(pool).store([b"x"], view[[0]])):
        try:
            use()
        except (ConfigError, BackendUnavailableError) as error:
            assert "fork" in str(error) or "closed" in str(error), error
        else:
            os._exit(3)
    engine.close()
    del transfer, store, load, engine
    os.write(1, b"child ")
    os._exit(0)
status = os.waitpid(child, 0)[1]
assert status == 0, os.waitstatus_to_exitcode(status)
assert store.result(30).blocks == 1 and load.result(30).blocks == 8
assert engine.usable
pages.zero_()
engine.load(keys, view).wait()
assert torch.equal(pages, before)
engine.close()
print("parent")
"""
    assert run(code) == "child parent\n"


@WAYS
@pytest.mark.parametrize("closes", [False, True])
def test_a_process_may_end_with_transfers_under_way(small: bool, closes: bool) -> None:
    code = f"""
engine = engine_of({small})
torch.cuda._sleep(500_000_000)
store = engine.store([b"new"], view[[0]])
load = engine.load(keys[:8], view[range(8, 16)])
if {closes}:
    engine.close()
    pool.close()
print("end")
"""
    assert run(code) == "end\n"
