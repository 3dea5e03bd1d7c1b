# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Memory resources: exact sizes, use after close, and pinned memory that leaves nothing behind when CUDA refuses."""

from __future__ import annotations

import gc
import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kvzip import _cuda, _native, memory
from kvzip.errors import BackendUnavailableError, ConfigError, NativeError
from kvzip.memory import MemoryResource, PageableMemory, PinnedMemory, Region, memory_for

MIB = 1 << 20


class Cuda:
    """Stands in for cudaHostRegister: keeps what is registered, and fails when told to."""

    def __init__(self, fail_at: int | None = None, status: int = 6, unregister_status: int = 0) -> None:
        self.registered: dict[int, int] = {}
        self.calls: list[tuple[int, int]] = []
        self.unregistered: list[int] = []
        self.fail_at = fail_at
        self.status = status
        self.unregister_status = unregister_status

    def register(self, address: int, nbytes: int) -> int:
        self.calls.append((address, nbytes))
        if self.fail_at is not None and len(self.calls) > self.fail_at:
            return self.status
        assert is_mapped(address)
        self.registered[address] = nbytes
        return 0

    def unregister(self, address: int) -> int:
        assert is_mapped(address), "unmapped while CUDA still had it registered"
        del self.registered[address]
        self.unregistered.append(address)
        return self.unregister_status

    def memory(self, **options: object) -> PinnedMemory:
        return PinnedMemory(
            piece_bytes=2 * MIB,
            register=self.register,
            unregister=self.unregister,
            **options,  # type: ignore[arg-type]
        )


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = line.split()[0].split("-")
        if int(first, 16) <= address < int(last, 16):
            return True
    return False


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def contract(resource: MemoryResource) -> None:
    """What every resource must keep (the contract in `MemoryResource`)."""
    assert isinstance(resource, MemoryResource)
    for nbytes in (1, 255, 4096, 4097, 5 * MIB + 256):
        with resource.allocate(nbytes) as region:
            assert region.nbytes == nbytes
            assert region.array.shape == (nbytes,)
            assert region.array.dtype == np.uint8
            assert region.address == region.array.ctypes.data
            assert region.address % 4096 == 0
            assert not region.array.any()
            region.array[:] = 7
            assert int(region.array.sum()) == 7 * nbytes
    first, second = resource.allocate(100), resource.allocate(100)
    first.array[:] = 1
    assert not second.array.any()
    first.close()
    second.array[:] = 2
    second.close()
    for nbytes in (0, -1, 1 << 62):
        with pytest.raises(ConfigError):
            resource.allocate(nbytes)


@pytest.mark.parametrize("huge_pages", [True, False])
def test_pageable_memory_keeps_the_contract(huge_pages: bool) -> None:
    contract(PageableMemory(huge_pages=huge_pages))
    with PageableMemory().allocate(1) as region:
        assert not region.pinned
        assert region.piece_bytes == 0


@linux
def test_pinned_memory_keeps_the_contract() -> None:
    cuda = Cuda()
    contract(cuda.memory())
    assert not cuda.registered


def test_a_closed_region_refuses_use() -> None:
    region = PageableMemory().allocate(10)
    region.close()
    region.close()
    assert region.closed
    assert region.nbytes == 10
    for use in (lambda: region.array, lambda: region.address):
        with pytest.raises(ConfigError, match="closed"):
            use()
    assert "closed" in repr(region)


@linux
def test_memory_is_unmapped_when_closed_and_no_view_is_left() -> None:
    region = PageableMemory().allocate(8 * MIB)
    address = region.address
    view = region.array[5:]
    view[0] = 9
    region.close()
    assert view[0] == 9  # a dangling view would crash here
    assert is_mapped(address)
    del view
    gc.collect()
    assert not is_mapped(address)


def test_region_takes_any_flat_byte_array() -> None:
    closed: list[int] = []
    array = np.zeros(64, np.uint8)
    region = Region(array, release=lambda: closed.append(1))
    region.array[3] = 1
    assert array[3] == 1
    region.close()
    region.close()
    assert closed == [1]
    for bad in (np.zeros((2, 2), np.uint8), np.zeros(4, np.int8), np.zeros(8, np.uint8)[::2]):
        with pytest.raises(ConfigError, match="contiguous"):
            Region(bad)  # type: ignore[arg-type]
    array.flags.writeable = False
    with pytest.raises(ConfigError, match="writable"):
        Region(array)


def test_a_forgotten_region_is_released() -> None:
    closed: list[int] = []
    region = Region(np.zeros(64, np.uint8), release=lambda: closed.append(1))
    del region
    gc.collect()
    assert closed == [1]


@linux
@pytest.mark.parametrize("nbytes", [1, 2 * MIB, 2 * MIB + 1, 7 * MIB + 256])
def test_pieces_are_bounded_and_cover_exactly_what_was_asked_for(nbytes: int) -> None:
    cuda = Cuda()
    progress: list[tuple[int, int]] = []
    region = cuda.memory(progress=lambda done, total: progress.append((done, total)), threads=2).allocate(nbytes)
    assert region.pinned
    assert region.piece_bytes == 2 * MIB
    assert [address for address, _ in cuda.calls] == list(range(region.address, region.address + nbytes, 2 * MIB))
    assert all(0 < size <= 2 * MIB for _, size in cuda.calls)
    assert sum(size for _, size in cuda.calls) == nbytes
    assert [done for done, _ in progress] == [min(i * 2 * MIB, nbytes) for i in range(1, len(cuda.calls) + 1)]
    assert {total for _, total in progress} == {nbytes}
    address = region.address
    region.close()
    assert not cuda.registered
    assert cuda.unregistered == [a for a, _ in reversed(cuda.calls)]
    assert not is_mapped(address)


@linux
def test_pages_are_touched_before_they_are_registered() -> None:
    def resident_bytes(address: int) -> int:
        here = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            head = line.split()[0]
            if "-" in head and not head.endswith(":"):
                first, last = (int(x, 16) for x in head.split("-"))
                here = first <= address < last
            elif here and head == "Rss:":
                return int(line.split()[1]) * 1024
        return 0

    seen: list[int] = []

    def register(address: int, nbytes: int) -> int:
        seen.append(resident_bytes(address))
        return 0

    resource = PinnedMemory(piece_bytes=64 * MIB, register=register, unregister=lambda address: 0)
    with resource.allocate(40 * MIB):
        assert len(seen) == 1
        assert seen[0] >= 40 * MIB


@linux
@pytest.mark.parametrize("fail_at", [0, 1, 3])
def test_a_refused_registration_leaves_nothing_behind(fail_at: int) -> None:
    cuda = Cuda(fail_at=fail_at)
    with pytest.raises(NativeError, match="released again") as caught:
        cuda.memory().allocate(8 * MIB)
    assert caught.value.status == 6
    assert len(cuda.calls) == fail_at + 1
    assert not cuda.registered
    assert cuda.unregistered == [address for address, _ in reversed(cuda.calls[:-1])]
    assert not is_mapped(cuda.calls[0][0])  # even while the error, and with it its traceback, is held


@linux
def test_an_exception_from_progress_undoes_everything() -> None:
    cuda = Cuda()

    def progress(done: int, total: int) -> None:
        if done > 4 * MIB:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cuda.memory(progress=progress).allocate(16 * MIB)
    assert len(cuda.calls) == 3
    assert not cuda.registered
    assert not is_mapped(cuda.calls[0][0])


@linux
def test_memory_that_cuda_will_not_let_go_stays_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[memory.Bytes] = []
    monkeypatch.setattr(memory, "_kept_mapped", kept)
    cuda = Cuda(unregister_status=6)
    region = cuda.memory().allocate(4 * MIB)
    address = region.address
    with pytest.raises(NativeError, match="stay mapped"):
        region.close()
    assert region.closed
    assert len(cuda.unregistered) == 2  # the second piece is tried although the first failed
    assert is_mapped(address)
    kept.clear()

    cuda = Cuda(fail_at=1, unregister_status=6)
    with pytest.raises(NativeError, match="released again"):
        cuda.memory().allocate(4 * MIB)
    assert is_mapped(cuda.calls[0][0])
    kept.clear()


@linux
def test_no_cuda_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailableError, match="KVZIP_CUDA=on"):
        Cuda(fail_at=0, status=5).memory().allocate(100)

    monkeypatch.setattr(_cuda, "unavailable", lambda: "no GPU can be used. Run on a machine with one")
    monkeypatch.setattr(memory, "gpu_problem", lambda: "torch is not installed")
    with pytest.raises(BackendUnavailableError, match=r"PageableMemory.*Run on a machine with one"):
        PinnedMemory().allocate(100)


@linux
def test_torch_pins_where_the_library_has_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    monkeypatch.setattr(_cuda, "unavailable", lambda: "the native library was built without CUDA")
    monkeypatch.setattr(memory, "gpu_problem", lambda: "")
    monkeypatch.setattr(memory, "host_register", cuda.register)
    monkeypatch.setattr(memory, "host_unregister", cuda.unregister)
    region = PinnedMemory().allocate(100)
    assert region.pinned
    assert cuda.calls == [(region.address, 100)]
    region.close()
    assert cuda.unregistered


@linux
def test_the_native_library_is_looked_up_when_memory_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []

    class Library:
        def kvz_cuda_host_register(self, address: object, nbytes: object) -> int:
            calls.append(("register", int(getattr(nbytes, "value", 0))))
            return 0

        def kvz_cuda_host_unregister(self, address: object) -> int:
            calls.append(("unregister", 0))
            return 0

    monkeypatch.setattr(_cuda, "unavailable", lambda: "")
    monkeypatch.setattr(_native, "library", Library)
    resource = PinnedMemory()
    assert not calls
    with resource.allocate(1000):
        assert calls == [("register", 1000)]
    assert calls[1:] == [("unregister", 0)]


@pytest.mark.parametrize(
    "options",
    [
        {"piece_bytes": 0},
        {"piece_bytes": MIB},
        {"piece_bytes": 3 * MIB + 1},
        {"threads": -1},
        {"register": lambda a, n: 0},
        {"unregister": lambda a: 0},
    ],
)
def test_pinned_memory_refuses_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        PinnedMemory(**options)  # type: ignore[arg-type]


def nodes(root: Path, online: str, cpus: str) -> Path:
    (root / "online").write_text(online)
    (root / "node1").mkdir()
    (root / "node1" / "cpulist").write_text(cpus)
    (root / "node1" / "meminfo").write_text("Node 1 MemFree:    4096 kB\nNode 1 Inactive(file):   4096 kB\n")
    return root


@linux
def test_numa_node_has_no_effect_on_one_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_NODES", nodes(tmp_path, "0\n", "0\n"))
    monkeypatch.setattr(memory, "_mbind", lambda *arguments: pytest.fail("must not be called"))
    with Cuda().memory(numa_node=5).allocate(100) as region:
        assert region.nbytes == 100


@linux
def test_numa_node_is_bound_by_mbind_and_by_the_cores_that_touch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usable = sorted(__import__("os").sched_getaffinity(0))
    monkeypatch.setattr(memory, "_NODES", nodes(tmp_path, "0-1\n", f"{usable[-1]}\n"))
    bound: list[tuple[int, int]] = []
    stayed: list[Callable[[], object] | frozenset[int] | None] = []

    def mbind(address: int, nbytes: int, node: int, policy: int) -> bool:
        bound.append((nbytes, node))
        return False  # not permitted, as in many containers: the cores decide

    monkeypatch.setattr(memory, "_mbind", mbind)
    monkeypatch.setattr(memory, "_stay_on", stayed.append)
    with Cuda().memory(numa_node=1).allocate(100):
        assert bound == [(100, 1)]
        assert stayed == [frozenset({usable[-1]})]
    with pytest.raises(ConfigError, match="NUMA node 1"):
        Cuda().memory(numa_node=1).allocate(9 * MIB)
    with pytest.raises(ConfigError, match=r"nodes \[0, 1\]"):
        Cuda().memory(numa_node=2)
    (tmp_path / "node1" / "cpulist").write_text("4096\n")
    with pytest.raises(ConfigError, match="CAP_SYS_NICE"):
        Cuda().memory(numa_node=1).allocate(100)
    with Cuda().memory(numa_node=1, numa_strict=False).allocate(9 * MIB):  # more than it has, and nothing is permitted
        assert stayed[-1] is None


@linux
def test_a_pool_lies_near_its_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert isinstance(memory_for("cpu"), PageableMemory)
    gpus = {0: "0000:c1:00.0", 1: "0000:41:00.0", 2: "0000:42:00.0", 3: "0000:43:00.0"}
    driver = SimpleNamespace(device_info=lambda index: SimpleNamespace(pci_bus_id=gpus[index]), get_device=lambda: 1)
    monkeypatch.setattr(_cuda, "unavailable", lambda: "")
    monkeypatch.setattr(_cuda, "driver", lambda: driver)
    monkeypatch.setattr(memory, "_PCI", tmp_path)
    for index, text in enumerate(("0", "1", "-1", "7")):  # two nodes, none that is known, one that is offline
        (tmp_path / gpus[index]).mkdir()
        (tmp_path / gpus[index] / "numa_node").write_text(text)
    monkeypatch.setattr(memory, "_NODES", nodes(tmp_path, "0-1\n", "0\n"))
    found = {device: memory_for(device) for device in ("cuda:0", "cuda", "cuda:2", "cuda:3")}
    assert [made._numa_node for made in found.values() if isinstance(made, PinnedMemory)] == [0, 1, None, None]
    policies: list[tuple[int, int]] = []
    monkeypatch.setattr(memory, "_mbind", lambda address, nbytes, node, policy: policies.append((node, policy)) or True)
    monkeypatch.setattr(memory, "_native_functions", lambda: (Cuda().register, lambda address: 0))
    with found["cuda"].allocate(9 * MIB) as region:  # more than the node has free: the rest comes from the others
        assert region.pinned
    assert policies == [(1, memory._MPOL_PREFERRED)]
    monkeypatch.setattr(memory, "_NODES", tmp_path / "missing")
    one = memory_for("cuda:1")
    assert isinstance(one, PinnedMemory)
    assert one._numa_node is None


@linux
def test_mbind_reports_a_node_that_does_not_exist() -> None:
    with PageableMemory().allocate(2 * mmap.PAGESIZE + 1) as region:
        assert memory._mbind(region.address, region.nbytes, 1000, memory._MPOL_BIND) is False
        node = memory.numa_nodes()[0]
        for policy in (memory._MPOL_BIND, memory._MPOL_PREFERRED):
            assert isinstance(memory._mbind(region.address, region.nbytes, node, policy), bool)


def test_numa_nodes_and_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert memory._parse_list("0-3,8,10-11\n") == (0, 1, 2, 3, 8, 10, 11)
    monkeypatch.setattr(memory, "_NODES", tmp_path / "missing")
    assert memory.numa_nodes() == (0,)
    monkeypatch.setattr(memory, "_PCI", tmp_path)
    device = tmp_path / "0000:c1:00.0"
    device.mkdir()
    for text, node in (("1\n", 1), ("-1\n", None)):
        (device / "numa_node").write_text(text)
        assert memory.numa_node_of_gpu("00000000:C1:00.0") == node
        assert memory.numa_node_of_gpu("0000:c1:00.0") == node
    assert memory.numa_node_of_gpu("0000:c2:00.0") is None
    for bad in ("", "GPU-0", "../../etc", "0000:c1:00.0/.."):
        with pytest.raises(ConfigError, match="PCI address"):
            memory.numa_node_of_gpu(bad)


@linux
def test_more_than_there_is_available_is_refused_before_it_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cuda = Cuda()
    with pytest.raises(ConfigError, match="this machine"):
        cuda.memory().allocate(1 << 50)
    (tmp_path / "memory.max").write_text("10000\n")
    (tmp_path / "memory.current").write_text("9000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    with pytest.raises(ConfigError, match="1500 bytes that this control group"):
        cuda.memory().allocate(1501)
    with cuda.memory().allocate(1500):
        pass
    (tmp_path / "memory.max").write_text("max\n")
    with cuda.memory().allocate(1501):
        pass
