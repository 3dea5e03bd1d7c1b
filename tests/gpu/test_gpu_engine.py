# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The engine on a real GPU: the same records as on the CPU, order against streams, asynchrony, both ways at once."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import kvzip
from kvzip import BlockView, CorruptRecordError, ErrorBound, HostPool, SwapEngine, read_header
from kvzip.controller import Controller
from kvzip.integrity import Integrity
from kvzip.memory import PinnedMemory
from kvzip.small import TICKETS
from kvzip.staging import Staging
from kvzip.transfer import QueuedTransfer, Transfer

torch = pytest.importorskip("torch", reason="needs torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

TABLE = 0.3 * 2.0 ** -(np.arange(3 * 64).reshape(3, 64) % 3)  # bounds of channels
BLOCKS, LAYERS = 96, 4  # 6 MiB in all: a small transfer


@pytest.fixture(params=["small", "chunks"])
def staging(request: pytest.FixtureRequest) -> Staging:
    """Transfers that are queued whole, and those that a worker drives."""
    return Staging() if request.param == "small" else Staging(chunk_bytes=1 << 20, small_bytes=0)


def check_way(transfer: Transfer, staging: Staging) -> None:
    assert isinstance(transfer, QueuedTransfer) == bool(staging.small_bytes)


@pytest.fixture(scope="module")
def pool() -> Iterator[HostPool]:
    made = HostPool(256 << 20, resource=PinnedMemory())
    yield made
    made.close()


def pages(device: str = "cuda", seed: int = 0, blocks: int = BLOCKS, heads: int = 4, dim: int = 64) -> list[Any]:
    generator = torch.Generator("cpu").manual_seed(seed)
    made = []
    for _ in range(LAYERS):
        x = torch.randn((blocks, 2, 16, heads, dim), generator=generator)
        x *= torch.rand((1, 2, 1, heads, dim), generator=generator) * 4
        x[3, 0, 5, 1, 7] = float("nan")
        x[4, 1, 5, 1, 7] = float("-inf")
        x[5] = 0
        made.append(x.to(torch.bfloat16).to(device))
    return made


KEYS = [b"%d" % i for i in range(BLOCKS)]


@pytest.mark.parametrize(
    ("codec", "mode"), [("cuszp", "fixed"), ("cuszp", "plain"), ("cuszp", "outlier"), ("raw", None)]
)
@pytest.mark.parametrize("bound", ["1e-3", "1e-2", "abs:0.05", "lossless"])
def test_records_are_the_ones_that_the_cpu_makes(
    pool: HostPool, staging: Staging, codec: str, mode: str | None, bound: str
) -> None:
    gpu = pages()
    cpu = [t.cpu() for t in gpu]
    settings: dict[str, Any] = {"codec": codec, "bound": ErrorBound.parse(bound), "mode": mode}
    with SwapEngine(pool, staging=staging, **settings) as engine, SwapEngine(256 << 20, **settings) as on_cpu:
        transfer = engine.store(KEYS, BlockView(gpu, "2NHD"))
        check_way(transfer, staging)
        transfer.wait()
        on_cpu.store(KEYS, BlockView(cpu, "2NHD"))
        for key in KEYS:
            assert engine.read_record(key) == on_cpu.read_record(key)
        order = np.random.default_rng(0).permutation(BLOCKS)
        for t in gpu:
            t.fill_(7)
        transfer = engine.load([KEYS[i] for i in order], BlockView(gpu, "2NHD"))
        check_way(transfer, staging)
        transfer.wait()
        on_cpu.load([KEYS[i] for i in order], BlockView(cpu, "2NHD"))
        for g, c in zip(gpu, cpu, strict=True):
            assert torch.equal(g.cpu().view(torch.int16), c.view(torch.int16))


def test_store_waits_for_the_stream_that_makes_the_pages(pool: HostPool, staging: Staging) -> None:
    x = torch.zeros((64, 2, 16, 4, 64), dtype=torch.bfloat16, device="cuda")
    want = torch.randn_like(x)
    producer = torch.cuda.Stream()
    with SwapEngine(pool, bound=ErrorBound.lossless(), staging=staging) as engine:
        view = BlockView([x], "2NHD")
        engine.store([b"warm"], view[[0]]).wait()
        torch.cuda.synchronize()
        with torch.cuda.stream(producer):
            torch.cuda._sleep(200_000_000)
            x.copy_(want)
        transfer = engine.store(KEYS[:64], view, stream=producer)
        check_way(transfer, staging)
        assert not transfer.done()  # it returned while the producer still sleeps
        transfer.wait(30)
        x.zero_()
        engine.load(KEYS[:64], view).wait()
        assert torch.equal(x.view(torch.int16), want.view(torch.int16))


def test_streams_wait_for_a_load(pool: HostPool, staging: Staging) -> None:
    (x,) = pages()[:1]
    want = x.clone()
    consumer = torch.cuda.Stream()
    with SwapEngine(pool, bound=ErrorBound.lossless(), staging=staging) as engine:
        view = BlockView([x], "2NHD")
        engine.store(KEYS, view).wait()
        for _ in range(20):
            x.fill_(3)
            torch.cuda.synchronize()
            transfer = engine.load(KEYS, view)
            transfer.wait_stream(consumer)
            with torch.cuda.stream(consumer):
                seen = x.clone()
            consumer.synchronize()
            assert torch.equal(seen.view(torch.int16), want.view(torch.int16))
            transfer.wait()


def test_a_load_waits_for_readers_of_the_pages(pool: HostPool, staging: Staging) -> None:
    (x,) = pages()[:1]
    reader = torch.cuda.Stream()
    with SwapEngine(pool, bound=ErrorBound.lossless(), staging=staging) as engine:
        view = BlockView([x], "2NHD")
        engine.store(KEYS, view).wait()
        x.fill_(3)
        torch.cuda.synchronize()
        with torch.cuda.stream(reader):
            torch.cuda._sleep(100_000_000)
            seen = x.clone()
        engine.load(KEYS, view, stream=reader).wait(30)
        reader.synchronize()
        assert bool((seen == 3).all())


def test_out_and_in_at_the_same_time(pool: HostPool, staging: Staging) -> None:
    first, second = pages(seed=1), pages(seed=2)
    want = [t.clone() for t in first]
    with SwapEngine(pool, bound=ErrorBound.lossless(), staging=staging) as engine:
        a, b = BlockView(first, "2NHD"), BlockView(second, "2NHD")
        engine.store(KEYS, a).wait()
        for round_ in range(5):
            for t in first:
                t.zero_()
            torch.cuda.synchronize()
            out = engine.store([b"%d-%d" % (round_, i) for i in range(BLOCKS)], b)
            back = engine.load(KEYS, a)
            out.wait()
            back.wait()
            for t, w in zip(first, want, strict=True):
                assert torch.equal(t.view(torch.int16), w.view(torch.int16))


def test_several_threads(pool: HostPool, staging: Staging) -> None:
    failures: list[BaseException] = []

    def work(seed: int, engine: SwapEngine) -> None:
        try:
            mine = pages(seed=seed, blocks=16)
            want = [t.clone() for t in mine]
            view = BlockView(mine, "2NHD")
            for i in range(6):
                keys = [b"%d-%d-%d" % (seed, i, b) for b in range(16)]
                engine.store(keys, view).wait()
                for t in mine:
                    t.zero_()
                torch.cuda.current_stream().synchronize()
                engine.load(keys, view).wait()
                for t, w in zip(mine, want, strict=True):
                    assert torch.equal(t.view(torch.int16), w.view(torch.int16))
                engine.discard(keys)
        except BaseException as error:
            failures.append(error)

    with SwapEngine(pool, bound=ErrorBound.lossless(), staging=staging) as engine:
        threads = [threading.Thread(target=work, args=(seed, engine)) for seed in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not failures, failures[0]


def test_damaged_records_leave_their_pages_alone(pool: HostPool, staging: Staging) -> None:
    mine = pages()
    with SwapEngine(pool, bound=ErrorBound.relative(1e-3), staging=staging) as engine:
        view = BlockView(mine, "2NHD")
        engine.store(KEYS, view).wait()
        for place in (0, 17, 95):
            entry = engine._index.find([KEYS[place]])[0]
            run = pool.views(entry.allocation)[0]
            run[read_header(engine.read_record(KEYS[place])).header_bytes + 100 + place] ^= 0x10
        for t in mine:
            t.fill_(9)
        with pytest.raises(CorruptRecordError) as caught:
            engine.load(KEYS, view).wait()
        assert caught.value.blocks == (0, 17, 95)
        for t in mine:
            assert bool((t[[0, 17, 95]] == 9).all())
            assert not bool((t[1] == 9).all())


def test_raw_and_encoded_blocks_under_a_controller(pool: HostPool, staging: Staging) -> None:
    gpu = pages()
    before = [t.clone() for t in gpu]
    controller = Controller("latency")
    with SwapEngine(pool, staging=staging, bound=ErrorBound.relative(1e-2), controller=controller) as engine:
        for coding in ("raw", "encoded", None, None):
            transfer = engine.store(KEYS, BlockView(gpu, "2NHD"), coding=coding)
            check_way(transfer, staging)
            transfer.wait()
            for t in gpu:
                t.zero_()
            engine.load(KEYS, BlockView(gpu, "2NHD")).wait()
            codec = read_header(engine.read_record(KEYS[0])).codec
            assert codec == {"raw": "raw", "encoded": "cuszp"}.get(coding or "", codec)
            for g, b in zip(gpu, before, strict=True):
                if codec == "raw":
                    assert torch.equal(g.view(torch.int16), b.view(torch.int16))
                g.copy_(b)
        seen = controller.snapshot()
        assert sum(seen.decisions.values()) == 4
        assert {direction for _, direction in seen.link_bytes_per_second} == {"store", "load"}


@pytest.mark.parametrize("codec", ["raw", "cuszp"])
def test_checksums_that_are_not_asked_for(pool: HostPool, codec: str) -> None:
    """What a checksum alone can find is not found; what contradicts the format is, as ever."""
    gpu = pages()
    settings: dict[str, Any] = {"codec": codec, "staging": Staging(chunk_bytes=1 << 20, small_bytes=0)}
    with SwapEngine(pool, integrity=Integrity(checksum=0.0), bound=ErrorBound.lossless(), **settings) as engine:
        engine.store(KEYS, BlockView(gpu, "2NHD")).wait()
        before = [t.clone() for t in gpu]
        for t in gpu:
            t.zero_()
        engine.load(KEYS, BlockView(gpu, "2NHD")).wait()
        for g, b in zip(gpu, before, strict=True):
            assert torch.equal(g.view(torch.int16), b.view(torch.int16))
        assert engine.stats().unchecked_blocks == BLOCKS
        entry = engine._index.find([KEYS[9]])[0]
        pool.views(entry.allocation)[0][-40] ^= 0xFF  # values, or the planes of their mantissas
        engine.load(KEYS, BlockView(gpu, "2NHD")).wait()
        assert engine.stats().corrupt_blocks == 0


def test_measured_error(pool: HostPool) -> None:
    mine = pages()
    with SwapEngine(pool, bound=ErrorBound.absolute(0.02)) as engine:
        result = engine.store(KEYS, BlockView(mine, "2NHD"), measure_error=True).result()
        assert result.violations == 0
        assert result.max_error is not None
        assert 0 < result.max_error <= 0.02


def test_layouts_and_dtypes(pool: HostPool, staging: Staging) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        nhd = torch.randn((20, 24, 3, 48), device="cuda").to(dtype)
        hnd = torch.empty((20, 3, 24, 48), device="cuda", dtype=dtype)
        with SwapEngine(pool, bound=ErrorBound.lossless(), staging=staging) as engine:
            engine.store(KEYS[:20], BlockView([nhd], "NHD")).wait()
            engine.load(KEYS[:20], BlockView([hnd], "HND")).wait()
            assert torch.equal(hnd.transpose(1, 2), nhd)


def test_a_small_transfer_that_nobody_waits_for_ends(pool: HostPool) -> None:
    x = torch.randn((BLOCKS, 2, 16, 4, 64), device="cuda").bfloat16()
    want = x.clone()
    with SwapEngine(pool, bound=ErrorBound.lossless()) as engine:
        view = BlockView([x], "2NHD")
        engine.store(KEYS, view)
        deadline = time.monotonic() + 10
        while not engine.contains(KEYS[-1]):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        x.zero_()
        engine.load(KEYS, view)
        while engine.stats().loaded_blocks < BLOCKS:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert torch.equal(x.view(torch.int16), want.view(torch.int16))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 31])
def test_small_transfers_of_every_size(pool: HostPool, count: int) -> None:
    """Records whose sizes are no multiples of what the carrying kernel takes at a time; several in flight."""
    torch.manual_seed(count)
    shapes = [(16, 1, 8), (16, 2, 64), (7, 3, 24), (16, 8, 128), (1, 1, 513)]
    tensors = [torch.randn((64, *shape), device="cuda").half() for shape in shapes]
    want = [t.clone() for t in tensors]
    for bound in (ErrorBound.lossless(), ErrorBound.relative(1e-2)):
        with SwapEngine(pool, bound=bound) as engine, SwapEngine(64 << 20, bound=bound) as on_cpu:
            view = BlockView(tensors, "NHD")
            transfers = [
                engine.store(KEYS[first : first + count], view[range(first, min(first + count, 64))])
                for first in range(0, 64 - count, count)
            ]
            held = len(transfers) * count
            assert all(isinstance(t, QueuedTransfer) for t in transfers[:TICKETS])
            for transfer in transfers:
                transfer.wait(10)
            on_cpu.store(KEYS[:held], BlockView([t.cpu() for t in want], "NHD")[range(held)])
            assert all(engine.read_record(key) == on_cpu.read_record(key) for key in KEYS[:held])
            if bound == ErrorBound.lossless():
                for t in tensors:
                    t[:held] = 9
                loads = [
                    engine.load(KEYS[first : first + count], view[range(first, first + count)])
                    for first in range(0, held, count)
                ]
                for transfer in loads:
                    transfer.wait(10)
                assert all(torch.equal(t, w) for t, w in zip(tensors, want, strict=True))


def test_small_transfers_in_a_fragmented_pool() -> None:
    x = torch.randn((8, 2, 16, 4, 64), device="cuda").bfloat16()
    want = x.clone()
    with HostPool(1 << 20, resource=PinnedMemory()) as small, SwapEngine(small, bound=ErrorBound.lossless()) as engine:
        held = [small.allocate(4096) for _ in range(256)]
        for allocation in held[::2]:
            small.free(allocation)
        view = BlockView([x], "2NHD")
        for first in range(0, 8, 2):
            transfer = engine.store(KEYS[first : first + 2], view[[first, first + 1]])
            assert isinstance(transfer, QueuedTransfer)
            transfer.wait()
        assert len(engine._index.find(KEYS[:1])[0].allocation.runs) > 1
        x.zero_()
        transfer = engine.load(KEYS[:8], view)
        assert isinstance(transfer, QueuedTransfer)
        transfer.wait()
        assert torch.equal(x.view(torch.int16), want.view(torch.int16))


def test_small_stores_evict(pool: HostPool) -> None:
    x = torch.randn((64, 2, 16, 4, 64), device="cuda").bfloat16()
    bound = ErrorBound.relative(1e-3)  # of the default bounds all records would fit
    with HostPool(2 << 20, resource=PinnedMemory()) as small, SwapEngine(small, bound=bound) as engine:
        view = BlockView([x], "2NHD")
        for turn in range(4):
            for i in range(64):
                engine.store([b"%d-%d" % (turn, i)], view[[i]]).wait()
        stats = engine.stats()
        assert stats.evicted_blocks == 4 * 64 - stats.records > 0
        assert stats.pool.payload_fraction > 0.9
        small.check()
        keys = [b"3-%d" % i for i in range(60, 64)]
        engine.load(keys, view[range(4)]).wait()


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_a_pool(pool: HostPool) -> None:
    with SwapEngine(pool, bound=ErrorBound.lossless()) as engine:
        made = []
        for device in range(2):
            with torch.cuda.device(device):
                mine = pages(f"cuda:{device}", seed=device)
                torch.cuda.synchronize()
                made.append((mine, [t.clone() for t in mine], BlockView(mine, "2NHD")))
        transfers = [
            engine.store([b"%d-%d" % (d, i) for i in range(BLOCKS)], view) for d, (_, _, view) in enumerate(made)
        ]
        for t in transfers:
            t.wait()
        # What one GPU stored, the other loads.
        for device, (mine, _, view) in enumerate(made):
            engine.load([b"%d-%d" % (1 - device, i) for i in range(BLOCKS)], view).wait()
            for t, w in zip(mine, made[1 - device][1], strict=True):
                assert torch.equal(t.cpu().view(torch.int16), w.cpu().view(torch.int16))


@pytest.mark.parametrize("mode", ["fixed", "plain", "outlier", "rice"])
@pytest.mark.parametrize(
    "bound",
    [ErrorBound.relative(1e-2), ErrorBound.lossless(), ErrorBound.token_rms(0.17), ErrorBound.channel_table(TABLE)],
    ids=["relative", "lossless", "token", "channel"],
)
@pytest.mark.parametrize("layout", ["2NHD", "2HND"])
def test_single_tensors_are_coded_on_the_gpu(
    bound: ErrorBound, mode: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`encode` and `decode` of CUDA tensors: the CPU's records and values, and no page goes to the host."""
    shape = (2, 48, 3, 64) if layout == "2NHD" else (2, 3, 48, 64)
    x = torch.randn(shape, generator=torch.Generator(device="cuda").manual_seed(4), device="cuda").to(torch.bfloat16)
    expected = kvzip.encode(x.cpu(), bound=bound, mode=mode, layout=layout)
    values = torch.empty(shape, dtype=torch.bfloat16)
    kvzip.decode(expected, out=values, bound=bound)

    def no_copy(*_: object) -> None:
        raise AssertionError("pages were copied to or from the host")

    monkeypatch.setattr("kvzip.backends.portable.to_host", no_copy)
    monkeypatch.setattr("kvzip.backends.portable.to_device", no_copy)
    assert kvzip.encode(x, bound=bound, mode=mode, layout=layout) == expected
    out = torch.full(shape, 7, dtype=torch.bfloat16, device="cuda")
    kvzip.decode(expected, out=out, bound=bound)
    assert torch.equal(out.cpu().view(torch.int16), values.view(torch.int16))


def test_an_engine_that_is_dropped_gives_its_memory_back(staging: Staging, pool: HostPool) -> None:
    layers = pages()
    view = BlockView(layers, "2NHD")
    names = [b"dropped-%d" % i for i in range(BLOCKS)]

    def use() -> int:
        engine = SwapEngine(pool, staging=staging)
        engine.store(names, view).wait(60)
        engine.load(names, view).wait(60)
        engine.discard(names)
        torch.cuda.synchronize()
        return int(torch.cuda.mem_get_info()[0])

    used = use()
    with pytest.warns(ResourceWarning, match="was not closed"):
        gc.collect()
    deadline = time.monotonic() + 20
    while torch.cuda.mem_get_info()[0] <= used and time.monotonic() < deadline:
        time.sleep(0.01)
    assert torch.cuda.mem_get_info()[0] > used
    while any(t.name.startswith("kvzip-") for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("kvzip-")]
