# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""bench/gpu_transport.py, controller.py and plot_gpu.py on a GPU made of host memory: all but the figures."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeDriver, FakeTensor, Mapped

from kvzip import BlockView, ErrorBound, HostPool, SwapEngine, _cuda
from kvzip.device import DeviceSwap
from kvzip.memory import PageableMemory
from kvzip.staging import Staging
from kvzip.transport import CudaTransport

torch = pytest.importorskip("torch", reason="torch is not installed: the benchmark needs it")

ROOT = Path(__file__).parents[2]
PAGES = 128


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "bench"))
    yield importlib.import_module("gpu_transport")
    sys.path.remove(str(ROOT / "bench"))


class Event:
    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        time.sleep(0.001)

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1e3


class Stream:
    cuda_stream = 0

    def __init__(self, priority: int = 0) -> None:
        self.priority = priority

    def synchronize(self) -> None: ...

    def wait_event(self, event: Event) -> None: ...


class Torch:
    """torch with a GPU that does everything at once."""

    cuda = types.SimpleNamespace(
        synchronize=lambda: None,
        empty_cache=lambda: None,
        _sleep=lambda cycles: None,
        stream=lambda stream: contextlib.nullcontext(),
        Event=Event,
        Stream=Stream,
    )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class Memory(dict[int, Any]):
    """The fake's allocations, and the real driver's function of that name."""

    def __call__(self) -> tuple[int, int]:
        return (1 << 30) - sum(a.size for a in self.values()), 1 << 30


class Driver(FakeDriver):
    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()

    def event_elapsed_seconds(self, start: int, stop: int) -> float:
        assert {start, stop} <= self.events
        return (stop - start) * 1e-6  # handles count up

    def arena_bytes(self, segments: Any, num_blocks: int, header_bytes: int) -> int:
        return num_blocks * (header_bytes + 64 * 65536 + 256)


def bench_of(module: Any, count: int = PAGES) -> Any:
    """All in host memory."""
    cache = np.concatenate([np.load(ROOT / "kvzip" / "data" / "smollm2_sample.npy")] * 3, axis=0)

    class Bench(module.TransportBench):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.torch, self.count = Torch(), count
            self.device = torch.device("cpu")
            self.pages = module.peers.real_pages(torch, cache, count, "cpu")
            self.targets = torch.zeros_like(self.pages)
            self.host = torch.zeros(count * module.PAGE_BYTES, dtype=torch.uint8)
            self.order = np.random.default_rng(0).permutation(count)
            self.kernels, self.copies = Stream(), Stream()
            self.cudart = types.SimpleNamespace(
                copy=lambda to, source, nbytes, kind, stream: ctypes.memmove(to, source, nbytes),
                has_batch=False,
                major=12,
            )
            self._pool = HostPool(count * module.PAGE_BYTES * 5 // 2 + (1 << 20))
            self._views: dict[Any, Any] = {}
            self._cache, self._layers = cache, None
            self._moments = self.moments
            self.driver = Driver()

        moments: Any = None

        def tensors(self, pages_per_block: int, targets: bool) -> list[Any]:
            parts = super().tensors(pages_per_block, targets)
            return [FakeTensor(p.view(torch.int16).numpy().view(np.uint16)) for p in parts]

        def layer_view(self, tensors: list[Any]) -> BlockView:
            return BlockView([FakeTensor(t.view(torch.int16).numpy().view(np.uint16)) for t in tensors], "2NHD")

        def engine(self, bound: ErrorBound, staging: Staging | None = None, **settings: Any) -> SwapEngine:
            engine = SwapEngine(self.pool, bound=bound, **settings)
            staging = staging or Staging(chunk_bytes=4 << 20)
            transport = CudaTransport(0, driver=self.driver, staging=staging, resource=PageableMemory())
            engine._devices["cuda:0"] = DeviceSwap(
                0, engine._index, self.pool, engine._store_lock, engine, staging, transport
            )
            return engine

    return Bench()


@pytest.fixture
def results(module: Any, tmp_path: Path) -> Any:
    return module.Results(tmp_path, "h200", {"gpu": "NVIDIA H200"})


def options_of(module: Any, tmp_path: Path, *more: str) -> Any:
    return module.arguments(["--data", "x.npy", "--out", str(tmp_path), "--quick", *more])


def test_ways_are_measured_checked_and_written(module: Any, results: Any, tmp_path: Path) -> None:
    bench = bench_of(module)
    ways = "raw-link,raw-loop,raw-batch,kvzip-1e-2,kvzip-1e-3,kvzip-lossless"
    options = options_of(module, tmp_path, "--pages", "1,8,64,128", "--ways", ways, "--sections", "transport,both")
    module.run(bench, results, options)
    written = json.loads((tmp_path / "h200_transport.json").read_text())
    rows = {(r["way"], r["direction"], r["pages"]): r for r in written["rows"]}
    assert len(rows) == 5 * 2 * 4
    assert [n for n in written["notes"] if "skipped" in n and "raw-batch" in n]
    assert not [n for n in written["notes"] if "failed" in n]
    wanted = {"raw_bytes", "ratio", "gb_per_s", "link_gb_per_s", "us", "us_p10", "us_p90", "cpu_s_per_gib"}
    for row in written["rows"]:
        assert wanted <= set(row)
        assert row["link_gb_per_s"] == rows["raw-link", row["direction"], row["pages"]]["gb_per_s"]
    assert rows["kvzip-1e-2", "out", 128]["ratio"] > rows["kvzip-1e-3", "in", 128]["ratio"] > 1.5
    both = json.loads((tmp_path / "h200_both.json").read_text())
    assert {(r["way"], r["direction"]) for r in both["rows"]} == {
        (w, d) for w in ("raw-link", "kvzip-1e-2") for d in ("out", "in")
    }
    assert both["notes"] == []
    assert bench.pool.stats().allocations == 0


def test_ways_at_the_settings_of_a_fidelity(
    module: Any, results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = importlib.import_module("gpu_ways")
    monkeypatch.setattr(
        ways,
        "on_host",
        lambda view: BlockView([t.array for t in view.tensors], "2NHD", dtype="bfloat16")[view.block_ids],
    )
    names = [way.name for way in ways.FIDELITY_WAYS]
    options = options_of(module, tmp_path, "--pages", "8,128", "--ways", ",".join(names), "--sections", "transport")
    without = bench_of(module)
    module.run(without, results, options)
    written = json.loads((tmp_path / "h200_transport.json").read_text())
    assert len([n for n in written["notes"] if "skipped: needs the model's query moments" in n]) == 2
    assert {r["way"] for r in written["rows"]} == {"kvzip-uncalibrated", "kvzip-uncalibrated-rice"}
    bench = bench_of(module)
    layers, _, _, heads, dim = bench._cache.shape
    bench._moments = tmp_path / "moments.npy"
    np.save(bench._moments, np.random.default_rng(0).lognormal(0, 1, (layers, heads, dim)).astype(np.float32))
    results.parts.clear()
    module.run(bench, results, options)
    written = json.loads((tmp_path / "h200_transport.json").read_text())
    assert not [n for n in written["notes"] if "failed" in n or "skipped" in n]
    ratio = {r["way"]: r["ratio"] for r in written["rows"]}
    assert set(ratio) == set(names)
    assert {r["pages"] for r in written["rows"]} == {128}
    assert ratio["kvzip-uncalibrated-rice"] > ratio["kvzip-uncalibrated"] > 1.5
    target = bench.layers[1]
    target.tensors[3].array[:] = 0x7F00  # far off
    way = ways.Uncalibrated(bench)
    with pytest.raises(AssertionError, match="further off"):
        way.check(np.arange(2))
    way.close()


def test_where_the_time_of_a_transfer_goes(module: Any, results: Any, tmp_path: Path) -> None:
    bench = bench_of(module, 256)
    events = set(bench.driver.events)
    module.run(bench, results, options_of(module, tmp_path, "--pages", "64,256", "--sections", "timeline"))
    written = json.loads((tmp_path / "h200_timeline.json").read_text())
    assert written["notes"] == []
    assert {(r["direction"], r["pages"]) for r in written["rows"]} == {("out", 256), ("in", 256)}  # 64 are small
    for row in written["rows"]:
        assert row["chunks"] > 1
        parts = row["before_us"] + row["link_us"] + row["idle_us"] + row["after_us"]
        assert parts == pytest.approx(row["us"], rel=0.5)  # medians of each
    assert bench.driver.events == events
    assert module.parts_of(10.0, [(1.0, 3.0), (4.0, 8.0)]) == {
        "us": 10e6, "before_us": 1e6, "link_us": 6e6, "idle_us": 1e6, "after_us": 2e6, "chunks": 2
    }  # fmt: skip
    overlapping = module.parts_of(10.0, [(1.0, 6.0), (4.0, 5.0), (5.0, 8.0)])
    assert (overlapping["link_us"], overlapping["idle_us"], overlapping["after_us"]) == (7e6, 0.0, 2e6)


def test_where_the_time_of_a_small_transfer_goes(module: Any, results: Any, tmp_path: Path) -> None:
    bench = bench_of(module, 128)
    bench._pool = HostPool(16 << 20, resource=Mapped())
    events = set(bench.driver.events)
    module.run(bench, results, options_of(module, tmp_path, "--sections", "small"))
    written = json.loads((tmp_path / "h200_small.json").read_text())
    assert written["notes"] == []
    assert len(written["rows"]) == 12
    for row in written["rows"]:
        assert all(row[part + "_us"] > 0 for part in ("view", "queue", "result", "native_call", "native_wait"))
    assert bench.driver.events == events


def test_wrong_pages_are_found(module: Any) -> None:
    bench = bench_of(module, 64)
    way = module.Kvzip1e2(bench)
    way.pages = 8
    blocks = bench.selections(8, 1)[0]
    way.renew(blocks, 0)
    way.store(blocks, 0)
    way.load(blocks, 0)
    way.check(blocks)
    bench.targets[bench.page_numbers(8, blocks)[5], 3, 4, 5] += 100
    with pytest.raises(AssertionError, match="further off"):
        way.check(blocks)
    way.close()


def test_a_way_that_fails_leaves_a_note(module: Any, results: Any, tmp_path: Path) -> None:
    bench = bench_of(module, 64)
    bench.driver.fail["encode"] = RuntimeError("on purpose")
    options = options_of(module, tmp_path, "--pages", "1,64", "--ways", "raw-link,kvzip-1e-2")
    module.section_transport(bench, results, options)
    written = json.loads((tmp_path / "h200_transport.json").read_text())
    assert len(written["rows"]) == 6
    assert any("kvzip-1e-2, 1 pages failed" in n for n in written["notes"])


def test_kernels_alone(module: Any, results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(module)
    monkeypatch.setattr(_cuda, "driver", lambda: bench.driver)
    options = options_of(module, tmp_path, "--pages", "128", "--sections", "codec")
    module.run(bench, results, options)
    written = json.loads((tmp_path / "h200_codec.json").read_text())
    found = {(r["codec"], r["op"]) for r in written["rows"]}
    assert found >= {(c[0], op) for c in module.CODECS for op in ("encode", "decode", "crc32c")}
    assert {r["max_ctas"] for r in written["max_ctas_rows"]} == {0, 8, 16, 32, 64, 132}
    # Triton needs a real GPU, or its interpreter and CPU tensors, as other tests may have asked for.
    assert not [n for n in written["notes"] if "failed" in n and "triton" not in n]


def test_interference(module: Any, results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(module)

    class Work:
        def __init__(self, name: str) -> None:
            self.name, self.description = name, "nothing"

        def prepare(self, stream: Any) -> Any:
            return lambda: time.sleep(0.002)

    monkeypatch.setattr(module, "Gemm", lambda torch, size: Work("gemm-8192"))
    monkeypatch.setattr(module, "DecodeStep", lambda *_: Work("decode-b8"))
    options = options_of(module, tmp_path, "--sections", "interference")
    module.run(bench, results, options)
    written = json.loads((tmp_path / "h200_interference.json").read_text())
    assert not [n for n in written["notes"] if "failed" in n]
    found = {(r["way"], r["max_ctas"], r["compute"], r["direction"]) for r in written["rows"]}
    swaps = {("raw-link", 0), ("kvzip-1e-2", 0), ("kvzip-1e-2", 32)}
    assert found == {
        (*swap, compute, direction)
        for compute, more in (("gemm-8192", set()), ("decode-b8", {("traffic", 0)}))
        for swap in swaps | more
        for direction in ("out", "in")
    }
    assert len(written["rows"]) == len(found)


def test_traffic_moves_a_quarter_of_the_pages(module: Any) -> None:
    bench = bench_of(module)
    traffic = module.Traffic(bench, PAGES)
    quarter = bench.pages.view(torch.float32).view(4, -1).sum(0)
    traffic.start_of("out")()()
    host = bench.host.view(torch.float32)
    assert torch.equal(host[: len(quarter)], quarter)
    assert not host[len(quarter) :].any()
    traffic.start_of("in")()()
    assert torch.equal(bench.targets.view(torch.float32).view(4, -1), quarter.expand(4, -1))


def test_the_controller_beside_raw_and_encoded(results: Any, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    bench = bench_of(module)
    controller = importlib.import_module("controller")
    launched: list[float] = []
    work = types.SimpleNamespace(prepare=lambda stream: lambda: (time.sleep(0.001), launched.append(0.0)))
    monkeypatch.setattr(controller, "Gemm", lambda torch, size: work)
    monkeypatch.setattr(controller, "LOADED_PROFILES", ("noise", "1e-2"))
    few = [p for p in controller.PROFILES if p.name in ("noise", "1e-2")]
    monkeypatch.setattr(controller, "PROFILES", few)
    options = types.SimpleNamespace(pages=[1, 16], loads=["idle", "gemm-8192", "host"], profiles=None, quick=True)
    controller.run_device(bench, results, options)
    written = json.loads((results.folder / "h200_controller.json").read_text())
    assert written["notes"] == []
    assert launched
    rows = {(r["load"], r["profile"], r["pages"], r["way"], r["direction"]): r for r in written["rows"]}
    assert len(rows) == len(written["rows"]) == 2 * 2 * 2 * 4 * 2
    assert all(r["us_p10"] <= r["us"] <= r["us_p90"] for r in written["rows"])
    assert rows["idle", "1e-2", 16, "encoded", "out"]["ratio"] > 2
    assert rows["idle", "noise", 16, "encoded", "out"]["ratio"] <= 1
    assert {r["raw_part"] for r in written["rows"] if r["way"] == "raw"} == {1.0}
    assert {r["raw_part"] for r in written["rows"] if r["way"] == "encoded"} == {0.0}
    cases = written["cases"]
    assert len(cases) == 2 * 2 * 2
    for case in cases:
        assert case["low"] <= case["over"] <= case["high"]
        assert case["again"]["low"] <= case["again"]["over"] <= case["again"]["high"]
        assert (case["verdict"] == "within") == (case["over"] <= 1.05)
    assert {(r["pages"], r["way"]) for r in written["overhead_rows"]} == {
        (pages, way) for pages in (1, 16) for way in ("none", "always", "raw", "always-raw")
    }
    assert {r["way"] for r in written["objective_rows"]} == {"raw", "encoded", "latency", "balanced", "capacity"}
    assert {(r["load"], r["coding"], r["checked"]) for r in written["checksum_rows"]} == {
        (load, coding, checked)
        for load in ("idle", "gemm-8192")
        for coding in ("raw", "encoded")
        for checked in (True, False)
    }
    assert [c["controller"] for c in written["controllers"]] == ["latency"]
    assert bench.pool.stats().allocations == 0


def test_memory_of_an_engine(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(module, 64)
    monkeypatch.setattr(_cuda, "driver", lambda: bench.driver)
    rows = module.hidden_memory(bench)
    assert rows[0]["allocated_bytes"] == rows[-1]["allocated_bytes"] == 0
    assert rows[-2]["allocated_bytes"] > 4 << 20


@pytest.mark.parametrize(
    ("full", "short"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("Tesla", "tesla")],
)
def test_names_of_files(module: Any, full: str, short: str) -> None:
    assert module.gpu_name(full) == short


def test_no_gpu_is_said(module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module.main(["--data", "x.npy", "--out", "nowhere"]) == 1
    assert "no GPU" in capsys.readouterr().err


def test_plots_are_drawn(module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: the plots need it")
    plot = importlib.import_module("plot_gpu")
    assert plot.main([str(tmp_path)]) == 1
    times = {"us": 9.0, "us_p10": 8.0, "us_p90": 12.0}
    rows = [
        {"way": way, "direction": direction, "raw_bytes": 65536 * n, "ratio": 2.0, "gb_per_s": 7.0, **times}
        for way in ("raw-link", "kvzip-1e-2", "another")
        for direction in ("out", "in")
        for n in (1, 64)
    ]
    beside = {"compute": "gemm-8192", "compute_priority": 0, "slowdown": 1.02, "gb_per_s": 120.0, "max_ctas": 16}
    for name, content in (("transport", rows), ("interference", [{**rows[0], **beside}])):
        (tmp_path / f"h200_{name}.json").write_text(json.dumps({"environment": {}, "rows": content, "notes": []}))
    assert plot.main([str(tmp_path)]) == 0
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".png", ".svg"}
