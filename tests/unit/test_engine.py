# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What users of `SwapEngine` rely on: contents, eviction, all or nothing, errors with a remedy, threads, statistics."""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

import kvzip
from kvzip.backends.base import Bytes, EncodeRequest, Table
from kvzip.backends.raw import RawCodec
from kvzip.bounds import BoundPolicy
from kvzip.errors import (
    BackendUnavailableError,
    BlockNotFoundError,
    ConfigError,
    CorruptRecordError,
    LayoutError,
    NativeError,
    PoolExhaustedError,
    TransferError,
)
from kvzip.index import RecordIndex
from kvzip.policy import LRU
from kvzip.record import Reason
from kvzip.types import BlockView, ErrorBound

K = [bytes([i]) for i in range(64)]
RECORD = 512  # of a block of `pages`: 144 bytes of header, 256 of values, rounded up to extents


def pages(blocks: int = 64, *, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(blocks, 4, 2, 8)).astype(np.float32)


def view(x: Any, ids: Sequence[int] | range | None = None) -> BlockView:
    return BlockView([x], "NHD", ids)


@pytest.fixture
def engine() -> Iterator[kvzip.SwapEngine]:
    with kvzip.SwapEngine(8 * RECORD, codec="raw") as made:
        yield made
        made.pool.check()


def held(engine: kvzip.SwapEngine) -> list[int]:
    return [i for i, k in enumerate(K) if engine.contains(k)]


def test_a_store_may_have_a_bound_of_its_own() -> None:
    x = pages()
    with kvzip.SwapEngine(1 << 20, codec="cuszp", bound=ErrorBound.relative(1e-1)) as engine:
        engine.store(K[:1], view(x, [0]))
        engine.store(K[1:2], view(x, [0]), bound=ErrorBound.lossless())
        coarse, exact = engine.record_sizes(K[:2])
        assert coarse < exact
        out = np.zeros_like(x)
        engine.load(K[1:2], view(out, [3]))
        np.testing.assert_array_equal(out[3], x[0])
        assert engine.settings.bound == ErrorBound.relative(1e-1)
        with pytest.raises(ConfigError, match="is no ErrorBound"):
            engine.store(K[2:3], view(x, [0]), bound=1e-3)  # type: ignore[arg-type]


def test_results_go_between_processes(engine: kvzip.SwapEngine) -> None:
    x = pages()
    for transfer in (engine.store(K[:2], view(x, [0, 1])), engine.load(K[:2], view(np.zeros_like(x), [0, 1]))):
        assert pickle.loads(pickle.dumps(transfer.result())) == transfer.result()


def test_what_ended_is_counted_whether_somebody_asks_or_not(
    engine: kvzip.SwapEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvzip.engine._MOST_ENDED", 3)
    x = pages()
    for i in range(6):
        engine.store(K[i : i + 1], view(x, [i]))
        assert len(engine._ended) <= 3  # it does not grow for ever
    engine.load(K[:2], view(np.zeros_like(x), [0, 1]))
    stats = engine.stats()
    assert (stats.stored_blocks, stats.loaded_blocks) == (6, 2)
    assert engine.metrics().value("kvzip_store_blocks_total") == 6
    assert engine.stats().stored_blocks == 6  # once


def test_keys_and_the_bytes_of_the_pool_that_their_records_take(engine: kvzip.SwapEngine) -> None:
    engine.store(K[:3], view(pages(), range(3)))
    assert engine.record_sizes([K[2], K[9], K[0]]) == [RECORD, 0, RECORD]
    assert sorted(engine.list_keys()) == K[:3]
    assert sum(engine.record_sizes(K)) == engine.pool.stats().extent_bytes_used
    with pytest.raises(ConfigError, match="single key"):
        engine.record_sizes(K[0])


# ---- contents


@pytest.mark.parametrize("codec", ["raw", "cuszp"])
@pytest.mark.parametrize("bound", [ErrorBound.lossless(), ErrorBound.absolute(0.01), ErrorBound.relative(1e-3)])
def test_what_is_loaded_is_what_was_stored(codec: str, bound: ErrorBound) -> None:
    x = pages()
    x[::5, 0, 0, 0] = np.nan
    x[::7, 1, 1, 3] = -np.inf
    order = np.random.default_rng(1).permutation(64)
    y = np.full_like(x, 7)
    with kvzip.SwapEngine(1 << 20, codec=codec, bound=bound) as engine:
        stored = engine.store(K, view(x), measure_error=True)
        assert stored.done()
        result = stored.result()
        assert (result.blocks, result.raw_bytes, result.violations, result.evicted) == (64, x.nbytes, 0, 0)
        loaded = engine.load([K[i] for i in order], view(y, np.arange(64))).result()
        assert (loaded.blocks, loaded.raw_bytes, loaded.record_bytes) == (64, x.nbytes, result.record_bytes)
        assert loaded.max_error is None
        assert loaded.violations is None
    want = x[order]
    finite = np.isfinite(want)
    assert np.array_equal(want.view(np.uint32)[~finite], y.view(np.uint32)[~finite])
    limits = {"lossless": 0.0, "abs": 0.01}
    kind = str(bound).split(":")[0]
    spans = np.where(finite, want, 0).reshape(64, -1)
    limit = limits.get(kind, 1e-3) * (spans.max(1) - spans.min(1) if kind == "rel" else np.ones(64))
    error = np.abs(np.where(finite, want, 0).astype(np.float64) - np.where(finite, y, 0)).reshape(64, -1).max(1)
    assert (error <= limit * (1 + 1e-12)).all()
    assert result.max_error == pytest.approx(error.max(), abs=1e-12)


@pytest.mark.parametrize("codec", ["raw", "cuszp"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "uint8"])
def test_torch_tensors(dtype: str, codec: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    shape = (12, 2, 16, 2, 8)
    x = (torch.randn(shape) * 20).to(getattr(torch, dtype))
    y = torch.full_like(x, 3)
    before = x.clone()
    with kvzip.SwapEngine(1 << 20, codec=codec, bound=ErrorBound.lossless()) as engine:
        engine.store(K[:12], BlockView([x], "2NHD"))
        engine.load(list(reversed(K[:12])), BlockView([y], "2NHD", range(12)))
        assert torch.equal(y.flip(0), x)
        assert torch.equal(x, before)
        # What torch stored, NumPy loads, from the same bytes.
        z = np.zeros(shape, {"uint8": np.uint8, "float32": np.float32, "float16": np.float16}.get(dtype, np.uint16))
        engine.load(K[:12], BlockView([z], "2NHD", dtype="opaque" if dtype == "uint8" else dtype))
        unsigned = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]
        assert z.tobytes() == x.view(unsigned).numpy().tobytes()


def test_several_tensors_of_several_dtypes() -> None:
    """A block that has pages of bf16, fp32 and opaque bytes, as hybrid models do."""
    rng = np.random.default_rng(0)
    tensors = [
        rng.integers(0, 1 << 16, (6, 2, 16, 2, 8)).astype(np.uint16),
        rng.normal(size=(6, 16, 4)).astype(np.float32),
        rng.integers(0, 256, (6, 100)).astype(np.uint8),
    ]
    parts = [
        kvzip.BlockLayout.from_tensors(tensors[:1], "2NHD", dtype="bfloat16"),
        kvzip.BlockLayout.from_tensors(tensors[1:2], "ND"),
        kvzip.BlockLayout.opaque(tensors[2:]),
    ]
    from dataclasses import replace

    layout = kvzip.BlockLayout(tuple(replace(s, tensor=i) for i, part in enumerate(parts) for s in part.segments))
    blank = [np.zeros_like(t) for t in tensors]
    with kvzip.SwapEngine(1 << 20, codec="raw") as engine:
        engine.store(K[:6], BlockView(tensors, layout))
        engine.load(K[:6], BlockView(blank, layout, [5, 4, 3, 2, 1, 0]))
    for t, b in zip(tensors, blank, strict=True):
        assert np.array_equal(b[::-1], t)


def test_load_into_another_order_of_memory(engine: kvzip.SwapEngine) -> None:
    x = pages(4)
    engine.store(K[:4], view(x))
    head_first = np.zeros((9, 2, 4, 8), np.float32)
    engine.load(K[:4], BlockView([head_first], "HND", [8, 1, 0, 5]))
    assert np.array_equal(head_first[[8, 1, 0, 5]].swapaxes(1, 2), x)
    assert not head_first[[2, 3, 4, 6, 7]].any()


def test_one_record_into_many_blocks(engine: kvzip.SwapEngine) -> None:
    x = pages(1)
    engine.store(K[:1], view(x))
    y = np.zeros((5, 4, 2, 8), np.float32)
    assert engine.load([K[0]] * 3, view(y, [4, 0, 2])).result().blocks == 3
    assert all(np.array_equal(y[i], x[0]) for i in (4, 0, 2))
    assert not y[[1, 3]].any()


def test_a_held_key_gets_the_new_record(engine: kvzip.SwapEngine) -> None:
    x = pages()
    engine.store(K[:2], view(x, [0, 1]))
    engine.store(K[:1], view(x, [9]))
    y = np.zeros((2, 4, 2, 8), np.float32)
    engine.load(K[:2], view(y))
    assert np.array_equal(y, x[[9, 1]])
    stats = engine.stats()
    assert (stats.records, stats.evicted_blocks, stats.discarded_blocks, stats.stored_blocks) == (2, 0, 0, 3)


def test_nothing_to_do(engine: kvzip.SwapEngine) -> None:
    x = pages(2)
    assert engine.store([], view(x, [])).result().blocks == 0
    assert engine.load([], view(x, [])).result().blocks == 0
    assert engine.discard([]) == 0
    with engine.pin([]):
        pass


def test_settings_change_and_old_records_load() -> None:
    x = pages(5)
    y = np.zeros_like(x)
    with kvzip.SwapEngine(1 << 20) as engine:
        engine.configure(bound=ErrorBound.relative(1e-3))
        engine.store(K[:1], view(x, [0]))
        engine.configure(bound=ErrorBound.lossless())
        engine.store(K[1:2], view(x, [1]))
        engine.configure(codec="raw")
        assert engine.settings.mode == "none"
        engine.store(K[2:3], view(x, [2]))
        engine.configure(codec="cuszp", mode="outlier", bound=ErrorBound.absolute(0.5))
        engine.store(K[3:4], view(x, [3]))
        engine.configure(bound=ErrorBound.absolute(0.25))
        assert engine.settings.mode == "outlier"  # what is not given stays
        engine.store(K[4:5], view(x, [4]))
        engine.load(K[:5], view(y))  # one batch of records of five settings
        headers = [kvzip.read_header(engine.read_record(k)) for k in K[:5]]
    assert [h.codec for h in headers] == ["cuszp", "cuszp", "raw", "cuszp", "cuszp"]
    assert [h.mode for h in headers] == ["fixed", "fixed", "none", "outlier", "outlier"]
    assert np.array_equal(y[1:3], x[1:3])
    assert 0 < np.abs(y[3] - x[3]).max() <= 0.5
    assert np.abs(y[4] - x[4]).max() <= 0.25
    assert np.abs(y[0] - x[0]).max() <= 1e-3 * np.ptp(x[0])


def test_the_default_is_the_uncalibrated_policy_in_the_mode_that_suits_it() -> None:
    with kvzip.SwapEngine(1 << 20) as engine:
        assert (engine.settings.codec.name, engine.settings.bound) == ("cuszp", BoundPolicy.uncalibrated())
        assert engine.settings.mode == "rice"
        assert engine.configure(bound=ErrorBound.relative(1e-3)).mode == "fixed"  # a mode that nobody gave follows
        assert engine.configure(bound=ErrorBound.token_rms(0.1)).mode == "rice"
        assert engine.configure(mode="outlier").mode == "outlier"
        assert engine.configure(bound=ErrorBound.lossless()).mode == "outlier"  # one that was given stays
    with kvzip.SwapEngine(1 << 20, mode="fixed") as engine:
        assert engine.settings.mode == "fixed"


def test_the_default_of_a_codec_without_bounds_by_token_is_the_finer_of_the_two() -> None:
    class Pages(RawCodec):
        name: ClassVar[str] = "pages"
        lossless_only: ClassVar[bool] = False
        bound_kinds = kvzip.backends.base.PageCodec.bound_kinds

    class Single(Pages):
        name: ClassVar[str] = "single"
        bound_kinds = kvzip.backends.base.Codec.bound_kinds

    finer = ErrorBound.relative(1e-3)
    with kvzip.SwapEngine(1 << 20) as engine:
        assert engine.configure(codec=Pages()).bound == BoundPolicy(finer, finer)
        assert engine.configure(codec=Single()).bound == finer
        assert engine.configure(codec="raw").bound == ErrorBound.lossless()
        assert engine.configure(codec="cuszp").bound == BoundPolicy.uncalibrated()


def test_what_is_not_known_to_be_k_or_v_is_exact_by_default(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvzip._log._logged", set())
    x = np.random.default_rng(3).standard_normal((2, 16, 2, 32)).astype(np.float32)
    layouts = {
        "said": kvzip.BlockLayout.from_tensors([x], "NHD", kinds="k"),
        "not said": kvzip.BlockLayout.from_tensors([x], "NHD"),
        "memory order": kvzip.BlockLayout.opaque([x]),
    }
    with caplog.at_level(logging.WARNING, "kvzip"), kvzip.SwapEngine(1 << 20) as engine:
        for name, layout in layouts.items():
            y = np.zeros_like(x)
            engine.store(K[:2], BlockView([x], layout))
            engine.load(K[:2], BlockView([y], layout))
            assert np.array_equal(x, y) == (name != "said")
        engine.configure(bound=ErrorBound.relative(1e-2))  # who says a bound for all pages gets it for all pages
        engine.store(K[:2], BlockView([x], layouts["memory order"]))
        engine.load(K[:2], BlockView([y], layouts["memory order"]))
    assert 0 < np.abs(x - y).max() <= 1e-2 * np.ptp(x)
    assert "not known to be K or V" in caplog.text


def test_settings_that_are_refused_change_nothing(engine: kvzip.SwapEngine) -> None:
    before = engine.settings
    with pytest.raises(ConfigError, match="codec 'raw' has no mode 'fixed': use one of none"):
        engine.configure(mode="fixed")
    with pytest.raises(kvzip.CodecNotFoundError, match="no codec is named 'nope'"):
        engine.configure(codec="nope", bound=ErrorBound.lossless())
    with pytest.raises(ConfigError, match=r"bound 0\.001 is no ErrorBound: use ErrorBound\.relative"):
        engine.configure(bound=0.001)  # type: ignore[arg-type]
    assert engine.settings == before


def test_a_codec_object_need_not_be_registered() -> None:
    class Mine(RawCodec):
        name: ClassVar[str] = "mine"

    x = pages(3)
    y = np.zeros_like(x)
    with kvzip.SwapEngine(1 << 20, codec=Mine()) as engine:
        engine.store(K[:3], view(x))
        engine.configure(codec="raw")
        engine.load(K[:3], view(y))
        assert kvzip.read_header(engine.read_record(K[0])).codec == "mine"
    assert np.array_equal(x, y)


def test_a_record_leaves_the_engine_as_bytes(engine: kvzip.SwapEngine) -> None:
    x = pages(2)
    engine.store(K[:2], view(x))
    assert np.array_equal(kvzip.decode(engine.read_record(K[1])), x[1])
    with pytest.raises(BlockNotFoundError, match=r"1 of 1 keys are not held \(the first is b'\\x05'\)"):
        engine.read_record(K[5])


# ---- eviction


def test_the_coldest_leave_first(engine: kvzip.SwapEngine) -> None:
    x = pages()
    y = np.zeros_like(x)
    for i in range(8):
        engine.store([K[i]], view(x, [i]))
    engine.load([K[1], K[0]], view(y, [0, 1]))  # now 2 3 4 5 6 7 1 0
    engine.store([K[3]], view(x, [3]))  # 2 4 5 6 7 1 0 3
    assert engine.contains(K[2])  # asking is not using
    result = engine.store(K[8:11], view(x, [8, 9, 10])).result()
    assert result.evicted == 3
    assert held(engine) == [0, 1, 3, 6, 7, 8, 9, 10]
    assert engine.stats().evicted_blocks == 3


def test_a_pinned_record_stays(engine: kvzip.SwapEngine) -> None:
    x = pages()
    engine.store(K[:8], view(x, range(8)))
    with engine.pin([K[0], K[1]]):
        assert engine.stats().pinned == 2
        assert engine.store(K[8:14], view(x, range(8, 14))).result().evicted == 6
        assert held(engine) == [0, 1, 8, 9, 10, 11, 12, 13]
        with pytest.raises(PoolExhaustedError):
            engine.store(K[20:27], view(x, range(7)))
    assert engine.stats().pinned == 0
    engine.store(K[20:22], view(x, range(2)))
    assert held(engine) == [10, 11, 12, 13, 20, 21] or held(engine) == [8, 9, 10, 11, 12, 13, 20, 21]


def test_a_replaced_record_stays_pinned_even_when_the_pool_is_full(engine: kvzip.SwapEngine) -> None:
    x = pages()
    engine.store(K[:8], view(x, range(8)))
    with engine.pin([K[0]]):
        engine.store(K[:7], view(x, range(10, 17)))  # seven more do not fit beside: they are replaced in place
        assert engine.stats().pinned == 1
        assert engine.stats().evicted_blocks == 0
        engine.store(K[20:27], view(x, range(7)))
        assert held(engine) == [0, 20, 21, 22, 23, 24, 25, 26]
    assert engine.stats().pinned == 0


def test_pins_nest_and_belong_to_the_record(engine: kvzip.SwapEngine) -> None:
    x = pages()
    engine.store(K[:1], view(x, [0]))
    first, second = engine.pin([K[0]]), engine.pin([K[0]])
    with first:
        with engine.pin([K[0], K[0]]):
            assert engine.stats().pinned == 1
        assert engine.stats().pinned == 1
        assert engine.discard([K[0]]) == 1  # a pin is against eviction only
        assert engine.stats().pinned == 0
        engine.store(K[:1], view(x, [1]))
        second.__enter__()
    assert engine.stats().pinned == 1  # the end of the first pin is not the end of the second
    second.__exit__(None, None, None)
    assert engine.stats().pinned == 0


def test_pins_end_with_an_exception_too(engine: kvzip.SwapEngine) -> None:
    engine.store(K[:1], view(pages(1)))
    with pytest.raises(RuntimeError), engine.pin([K[0]]):
        raise RuntimeError
    assert engine.stats().pinned == 0
    with pytest.raises(BlockNotFoundError) as caught, engine.pin([K[0], K[1], K[2]]):
        raise AssertionError("not reached")
    assert caught.value.keys == (K[1], K[2])
    assert engine.stats().pinned == 0


def test_a_policy_of_ones_own() -> None:
    class MostRecentFirst(LRU):
        evicted: ClassVar[list[tuple[bytes, bool]]] = []

        def victims(self) -> Iterator[bytes]:
            return reversed(list(super().victims()))

        def remove(self, key: bytes, *, evicted: bool) -> None:
            self.evicted.append((key, evicted))
            super().remove(key, evicted=evicted)

    x = pages()
    policy = MostRecentFirst()
    with kvzip.SwapEngine(8 * RECORD, codec="raw", policy=policy) as engine:
        engine.store(K[:8], view(x, range(8)))
        engine.store(K[8:10], view(x, range(2)))
        assert held(engine) == [0, 1, 2, 3, 4, 5, 8, 9]
        engine.store(K[:8], view(x, range(8)))  # 0 to 5 in place of themselves, 6 and 7 in place of 9 and 8
        engine.discard([K[0]])
    assert policy.evicted[:2] == [(K[7], True), (K[6], True)]
    assert {(K[8], True), (K[9], True), (K[0], False), (K[5], False)} <= set(policy.evicted)
    assert (K[0], True) not in policy.evicted  # replaced is not evicted
    with pytest.raises(ConfigError, match="unknown eviction policy 'fifo': use one of arc, lru"):
        kvzip.SwapEngine(4096, codec="raw", policy="fifo")


# ---- all or nothing


def test_a_store_that_does_not_fit_changes_nothing(engine: kvzip.SwapEngine) -> None:
    x = pages()
    engine.store(K[:8], view(x, range(8)))
    before = engine.stats()
    with pytest.raises(PoolExhaustedError) as caught:
        engine.store(K[4:13], view(x, range(20, 29)))
    error = caught.value
    assert (error.requested, error.free) == (9 * RECORD, 8 * RECORD)
    for part in ("9 of 9 blocks", "4608 bytes", "4096 of 4096", "store fewer blocks at once", "larger"):
        assert part in str(error)
    after = engine.stats()
    assert before.pool.total_allocations == after.pool.total_allocations
    assert (after.records, after.evicted_blocks, after.stored_blocks) == (8, 0, 8)
    y = np.zeros_like(x)
    engine.load(K[:8], view(y, range(8)))
    assert np.array_equal(y[:8], x[:8])


def test_as_many_as_fit_are_taken(engine: kvzip.SwapEngine) -> None:
    x = pages()
    engine.store(K[:8], view(x, range(8)))
    assert engine.store(K[8:16], view(x, range(8, 16))).result().evicted == 8
    assert engine.store(K[8:16], view(x, range(16, 24))).result().evicted == 0
    y = np.zeros_like(x)
    engine.load(K[8:16], view(y, range(8)))
    assert np.array_equal(y[:8], x[16:24])


def test_a_store_whose_codec_shrinks_needs_its_real_bytes_alone() -> None:
    """The worst case does not fit, the encoded blocks do."""
    x = np.zeros((30, 64, 2, 64), np.float32)  # 32 KiB each; constant pages take 16 bytes
    with kvzip.SwapEngine(64 << 10, bound=ErrorBound.lossless()) as engine:
        engine.store([b"%d" % i for i in range(30)], view(x))
        assert engine.stats().records == 30
        assert engine.stats().ratio > 100


def test_a_large_transfer_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvzip import engine as module

    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 256)
    x = pages()
    y = np.zeros_like(x)
    with kvzip.SwapEngine(64 * RECORD, codec="raw") as engine:
        assert engine.store(K, view(x)).result().blocks == 64
        engine.load(K, view(y))
        assert np.array_equal(x, y)
        assert engine.store(K, view(y)).result().evicted == 0  # replaced, the pool being full
        assert engine.stats().records == 64
        more = [b"more %d" % i for i in range(40)]
        assert engine.store(more, view(x, range(40))).result().evicted == 40
        engine.pool.check()
        with pytest.raises(PoolExhaustedError):
            engine.store([b"x%d" % i for i in range(65)], view(x, [i % 64 for i in range(65)]))
        assert engine.stats().records == 64
        engine.load(more, view(y, range(40)))
        assert np.array_equal(x[:40], y[:40])
        engine.pool.check()


def test_a_load_of_a_missing_key_changes_nothing(engine: kvzip.SwapEngine) -> None:
    x = pages()
    engine.store(K[:3], view(x, range(3)))
    y = np.full_like(x, 7)
    with pytest.raises(BlockNotFoundError) as caught:
        engine.load([K[0], K[8], K[1], K[9]], view(y, range(4)))
    assert caught.value.keys == (K[8], K[9])
    assert isinstance(caught.value, KeyError)
    assert str(caught.value) == "2 of 4 keys are not held (the first is b'\\x08'): check with contains()"
    assert (y == 7).all()
    assert engine.stats().missing_blocks == 2
    with pytest.raises(BlockNotFoundError), engine.pin([K[9]]):
        pass
    assert engine.stats().missing_blocks == 2  # a pin is no load


def test_a_load_into_pages_that_do_not_fit_changes_nothing(engine: kvzip.SwapEngine) -> None:
    engine.store(K[:2], view(pages(2)))
    for shape, dtype in (((2, 4, 2, 9), np.float32), ((2, 5, 2, 8), np.float32), ((2, 4, 2, 8), np.float16)):
        y = np.full(shape, 7, dtype)
        with pytest.raises(LayoutError, match=r"page 0 of the record is 4 tokens x 2 heads x 8 float32, .* load into"):
            engine.load(K[:2], view(y))
        assert (y == 7).all()
    two = [np.full((2, 4, 2, 8), 7, np.float32) for _ in range(2)]
    with pytest.raises(LayoutError, match="the record has 1 pages, the blocks to load into have 2"):
        engine.load(K[:2], BlockView(two, "NHD"))


def test_a_load_into_pages_that_cannot_be_written(engine: kvzip.SwapEngine) -> None:
    engine.store(K[:2], view(pages(2)))
    y = np.full((2, 4, 2, 8), 7, np.float32)
    with pytest.raises(LayoutError, match=r"a block number repeats .*: give each block once"):
        engine.load(K[:2], view(y, [1, 1]))
    y.flags.writeable = False
    with pytest.raises(LayoutError, match="read-only, or share memory among themselves: pass writable"):
        engine.load(K[:2], view(y))
    shared = np.lib.stride_tricks.as_strided(np.zeros((1, 4, 2, 8), np.float32), (2, 4, 2, 8), (0, 64, 32, 4))
    for other in (shared, np.lib.stride_tricks.as_strided(np.zeros(512, np.float32), (2, 4, 2, 8), (256, 48, 32, 4))):
        with pytest.raises(LayoutError, match="read-only, or share"):
            engine.load(K[:2], view(other))


def test_read_only_pages_can_be_stored(engine: kvzip.SwapEngine) -> None:
    x = pages(2)
    x.flags.writeable = False
    engine.store(K[:2], view(x))
    torch = pytest.importorskip("torch", reason="torch is not installed")
    engine.store(K[2:4], view(torch.ones(1, 4, 2, 8).expand(2, 4, 2, 8)))


# ---- damage


def flip(engine: kvzip.SwapEngine, key: bytes, at: int) -> None:
    """Change a byte of a record where it lies in the pool's memory."""
    entry = engine._index.find([key])[0]
    for offset, nbytes in entry.allocation.runs:
        if at < nbytes:
            engine.pool._memory()[offset + at] ^= 0x10
            return
        at -= nbytes


@pytest.mark.parametrize("codec", ["raw", "cuszp"])
@pytest.mark.parametrize("at", [0, 4, 13, 48, 64, 80, 100, 125, 130, 200, -1])
def test_a_damaged_record_is_refused_and_the_rest_goes_on(at: int, codec: str) -> None:
    x = pages()
    y = np.full_like(x, 7)
    with kvzip.SwapEngine(1 << 20, codec=codec) as engine:
        engine.store(K[:4], view(x, range(4)))
        flip(engine, K[2], at % len(engine.read_record(K[2])))
        for keys in ([K[2]], K[:4]):
            with pytest.raises(CorruptRecordError):
                engine.load(keys, view(y, range(len(keys))))
        assert (y == 7).all()
        assert engine.stats().corrupt_blocks == 2
        assert engine.contains(K[2])  # it stays until it is discarded
        outside = kvzip.FormatVersionError if at == 4 else CorruptRecordError  # a version may really be a new one there
        with pytest.raises(outside):
            kvzip.decode(engine.read_record(K[2]))
        engine.load([K[0], K[1], K[3]], view(y, range(3)))
        assert engine.discard([K[2]]) == 1
        engine.store([K[2]], view(x, [2]))
        engine.load([K[2]], view(y, [0]))
        assert np.abs(y[0] - x[2]).max() <= 1e-3 * np.ptp(x[2])
        engine.pool.check()


def test_damage_is_found_before_any_codec_writes() -> None:
    """A batch of two codecs: the second one's record is damaged, in a way that its checksum does not show."""

    class Strict(RawCodec):
        name: ClassVar[str] = "strict"

        def validate_blocks(self, layout: Any, payloads: Sequence[Bytes], tables: Sequence[Table]) -> None:
            raise CorruptRecordError("found by the codec alone")

        def decode_blocks(self, *a: Any, **k: Any) -> None:
            raise AssertionError("not reached")

    x = pages()
    y = np.full_like(x, 7)
    with kvzip.SwapEngine(1 << 20, codec="raw") as engine:
        engine.store(K[:2], view(x, range(2)))
        engine.configure(codec=Strict())
        engine.store(K[2:4], view(x, range(2)))
        with pytest.raises(CorruptRecordError, match="found by the codec alone"):
            engine.load(K[:4], view(y, range(4)))
    assert (y == 7).all()


# ---- a codec that fails


class Failing(RawCodec):
    """Raises what it is told to when it encodes."""

    name: ClassVar[str] = "failing"
    modes: ClassVar[tuple[str, ...]] = ("fixed", "plain")

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def encode_blocks(self, blocks: BlockView, request: EncodeRequest, out: Bytes) -> Any:
        if self.error is not None:
            out[:] = 0xEE
            raise self.error
        return super().encode_blocks(blocks, request, out)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NativeError("the encoder broke", status=4), Reason.ENCODER_FAILED),
        (kvzip.CudaError("no kernel", code=209, name="cudaErrorNoKernelImageForDevice"), Reason.ENCODER_FAILED),
        (BackendUnavailableError("install it"), Reason.CODEC_UNAVAILABLE),
        (MemoryError("no scratch"), Reason.ENCODER_FAILED),
        (ZeroDivisionError("a bug of a third party"), Reason.ENCODER_FAILED),
    ],
)
def test_a_codec_that_fails_is_replaced_by_raw(
    error: Exception, reason: Reason, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvzip._log._logged", set())
    x = pages()
    y = np.zeros_like(x)
    codec = Failing(error)
    with caplog.at_level(logging.WARNING, "kvzip"), kvzip.SwapEngine(1 << 20, codec=codec, mode="plain") as engine:
        result = engine.store(K[:4], view(x, range(4))).result()
        engine.store(K[4:8], view(x, range(4, 8)))
        assert result.fallbacks == {reason.name.lower(): 4}
        assert engine.stats().fallbacks == {reason.name.lower(): 8}
        header = kvzip.read_header(engine.read_record(K[0]))
        assert (header.codec, header.mode, header.reason) == ("raw", "none", reason)
        engine.load(K[:8], view(y, range(8)))
        assert np.array_equal(y[:8], x[:8])
        codec.error = None
        engine.store(K[8:9], view(x, [8]))
        header = kvzip.read_header(engine.read_record(K[8]))
        assert (header.codec, header.mode, header.reason) == ("failing", "plain", Reason.AS_ASKED)
        assert engine.stats().fallbacks == {reason.name.lower(): 8}
    records = [r for r in caplog.records if r.name == "kvzip"]
    assert len(records) == 1  # once, however often
    assert str(error) in records[0].getMessage()
    assert "'failing'" in records[0].getMessage()


def test_the_mistakes_of_a_caller_are_no_reason_to_store_raw() -> None:
    for error in (ConfigError("a setting"), LayoutError("a layout")):
        with kvzip.SwapEngine(1 << 20, codec=Failing(error)) as engine:
            with pytest.raises(type(error), match=str(error)):
                engine.store(K[:1], view(pages(1)))
            assert engine.stats().records == 0
            assert engine.stats().pool.allocations == 0


def test_violations_are_measured_and_counted() -> None:
    class Off(RawCodec):
        name: ClassVar[str] = "off"

        def encode_blocks(self, blocks: BlockView, request: EncodeRequest, out: Bytes) -> Any:
            made = super().encode_blocks(blocks, request, out)
            out[:, 3] ^= 0x01  # a bit of the exponent of the first value
            return made

    x = pages(2) + 3
    with kvzip.SwapEngine(1 << 20, codec=Off(), bound=ErrorBound.absolute(1e-3)) as engine:
        assert engine.store(K[:2], view(x)).result().violations is None
        result = engine.store(K[:2], view(x), measure_error=True).result()
        assert result.violations == 2
        assert result.max_error is not None
        assert result.max_error > 1e-3
        assert engine.stats().violations == 2
        assert kvzip.read_header(engine.read_record(K[0])).max_error is not None


# ---- arguments


@pytest.mark.parametrize("keys", [b"abc", "abc", None, 7])
def test_keys_are_a_list(keys: Any, engine: kvzip.SwapEngine) -> None:
    x = pages(3)
    for call in (
        lambda: engine.store(keys, view(x)),
        lambda: engine.load(keys, view(x)),
        lambda: engine.discard(keys),
        lambda: engine.pin(keys).__enter__(),
    ):
        with pytest.raises(ConfigError, match=r"is the single key .*: give a list of keys"):
            call()


@pytest.mark.parametrize("key", ["a", 1, None, bytearray(b"a"), (b"a",)])
def test_keys_are_bytes(key: Any, engine: kvzip.SwapEngine) -> None:
    for call in (
        lambda: engine.store([key], view(pages(1))),
        lambda: engine.load([key], view(pages(1))),
        lambda: engine.discard([key]),
        lambda: engine.pin([key]).__enter__(),
    ):
        with pytest.raises(ConfigError, match=f"is of type {type(key).__name__}: keys are bytes"):
            call()


def test_keys_go_with_blocks(engine: kvzip.SwapEngine) -> None:
    x = pages(3)
    for call in (engine.store, engine.load):
        with pytest.raises(ConfigError, match="2 keys for 3 blocks: give one key a block"):
            call(K[:2], view(x))
    with pytest.raises(ConfigError, match=r"key b'\\x01' is given twice: each block needs its own key"):
        engine.store([K[0], K[1], K[1]], view(x))
    engine.store(iter([b"", b"x" * 10_000, b"\0\xff"]), view(x))  # any bytes
    assert engine.contains(b"x" * 10_000)
    assert not engine.contains("x")  # type: ignore[arg-type]


def test_what_an_engine_is_made_of() -> None:
    for arguments, error, why in (
        ({"threads": -1}, ConfigError, "threads -1 is negative or no integer: use 0 for all cores"),
        ({"codec": "nope"}, kvzip.CodecNotFoundError, "no codec is named 'nope': use one of"),
        ({"mode": "best"}, ConfigError, "codec 'raw' has no mode 'best': use one of none"),
        ({"bound": 1e-3}, ConfigError, "is no ErrorBound: use"),
        ({"bound": 0.0}, ConfigError, "is no ErrorBound: use"),
        ({"threads": "2"}, ConfigError, "threads '2' is negative or no integer"),
        ({"threads": 1.5}, ConfigError, "threads 1.5 is negative or no integer"),
        ({"threads": 10**6}, ConfigError, "how many, 65536 at most"),
        ({"staging": 3}, ConfigError, r"staging 3: give Staging\(...\), or None"),
        ({"integrity": "always"}, ConfigError, r"integrity .always.: give Integrity\(...\), or None"),
        ({"pressure": []}, ConfigError, r"pressure \[\]: give BoundPressure\(...\), or None"),
    ):
        with pytest.raises(error, match=why):
            kvzip.SwapEngine(4096, **{"codec": "raw", **arguments})  # type: ignore[arg-type]
    for capacity in (0, -1, 255):
        with pytest.raises(ConfigError, match=r"at least 1|larger capacity"):
            kvzip.SwapEngine(capacity, codec="raw")
    with kvzip.SwapEngine(np.int64(4096), codec="raw") as engine:  # type: ignore[arg-type]
        assert engine.pool.capacity_bytes == 4096


def test_blocks_on_a_device_that_nobody_serves(engine: kvzip.SwapEngine) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    nowhere = torch.zeros(2, 4, 2, 8, device="meta")
    with pytest.raises(LayoutError, match="meta"):
        engine.store(K[:2], view(nowhere))
    engine.store(K[:2], view(pages(2)))
    with pytest.raises(LayoutError, match="meta"):
        engine.load(K[:2], view(nowhere))
    engine.load(K[:2], view(pages(2)))
    engine.store(K[2:4], view(pages(2)))


def test_views_of_nothing() -> None:
    with pytest.raises(LayoutError):
        view(np.zeros((2, 0, 2, 8), np.float32))


# ---- statistics, life and death


def test_statistics_are_exact(engine: kvzip.SwapEngine) -> None:
    x = pages()
    y = np.zeros_like(x)
    assert engine.stats().ratio == 1.0
    engine.store(K[:8], view(x, range(8)))
    engine.store(K[8:10], view(x, range(2)))
    engine.load(K[5:10], view(y, range(5)))
    engine.discard([K[9], K[0], K[63]])
    s = engine.stats()
    assert (s.records, s.stored_blocks, s.loaded_blocks, s.discarded_blocks, s.evicted_blocks) == (7, 10, 5, 1, 2)
    assert (s.raw_bytes, s.record_bytes) == (7 * 256, 7 * 400)
    assert s.ratio == 256 / 400
    assert (s.stored_raw_bytes, s.stored_record_bytes, s.loaded_raw_bytes) == (10 * 256, 10 * 400, 5 * 256)
    assert (s.missing_blocks, s.corrupt_blocks, s.violations, s.fallbacks, s.pinned) == (0, 0, 0, {}, 0)
    assert s.store_seconds > 0 < s.load_seconds
    assert (s.pool.allocations, s.pool.payload_bytes, s.pool.extent_bytes_used) == (7, 7 * 400, 7 * RECORD)
    assert s.pool.free_bytes == RECORD


def test_a_closed_engine() -> None:
    x = pages(2)
    engine = kvzip.SwapEngine(4096, codec="raw")
    engine.store(K[:2], view(x))
    engine.close()
    engine.close()
    assert not engine.contains(K[0])
    assert engine.discard(K[:2]) == 0
    for call in (lambda: engine.store(K[:2], view(x)), lambda: engine.load(K[:2], view(x))):
        with pytest.raises(ConfigError, match="the engine is closed: make a new one"):
            call()
    with pytest.raises(BlockNotFoundError):
        engine.read_record(K[0])
    assert engine.pool.closed


def test_a_pool_of_ones_own_outlives_the_engine() -> None:
    x = pages(2)
    with kvzip.HostPool(1 << 16) as pool:
        with kvzip.SwapEngine(pool, codec="raw") as first, kvzip.SwapEngine(pool, codec="raw") as second:
            first.store(K[:2], view(x))
            second.store(K[:2], view(x[::1]))
            assert pool.stats().allocations == 4
            first.discard(K[:1])
            assert second.contains(K[0])
            pool.check()
        assert pool.stats().allocations == 0
        pool.allocate(100)


def test_engines_that_share_a_pool_do_not_evict_each_other() -> None:
    x = pages()
    with (
        kvzip.HostPool(8 * RECORD) as pool,
        kvzip.SwapEngine(pool, codec="raw") as a,
        kvzip.SwapEngine(pool, codec="raw") as b,
    ):
        a.store(K[:5], view(x, range(5)))
        b.store(K[:3], view(x, range(3)))
        with pytest.raises(PoolExhaustedError) as caught:
            b.store(K[10:14], view(x, range(4)))
        assert (caught.value.requested, caught.value.free) == (4 * RECORD, 3 * RECORD)
        assert b.stats().records == 3
        assert b.store(K[10:13], view(x, range(3))).result().evicted == 3
        assert a.stats().records == 5
        pool.check()


def test_a_transfer_on_the_cpu_is_done(engine: kvzip.SwapEngine) -> None:
    transfer = engine.store(K[:1], view(pages(1)))
    assert transfer.done()
    assert transfer.wait()
    assert transfer.wait(0)
    assert transfer.result(0).seconds > 0
    transfer.wait_stream()


def test_a_transfer_that_has_not_ended() -> None:
    transfer = kvzip.Transfer()
    assert not transfer.done()
    assert not transfer.wait(0.001)
    with pytest.raises(TransferError, match=r"has not ended within 0\.001 s: wait longer"):
        transfer.result(0.001)


# ---- threads


def in_threads(count: int, work: Any) -> None:
    """Run work(0) .. work(count - 1) at once; raise the first error."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            barrier.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("codec", ["raw", "cuszp"])
def test_threads_with_keys_of_their_own(codec: str) -> None:
    with kvzip.SwapEngine(1 << 20, codec=codec, bound=ErrorBound.lossless(), threads=2) as engine:

        def work(number: int) -> None:
            rng = np.random.default_rng(number)
            names = [b"%d-%d" % (number, i) for i in range(10)]
            for _ in range(25):
                x = rng.normal(size=(10, 4, 2, 8)).astype(np.float32)
                y = np.zeros_like(x)
                engine.store(names, view(x))
                order = rng.permutation(10)
                with engine.pin(names[:3]):
                    engine.load([names[i] for i in order], view(y))
                assert np.array_equal(y, x[order])
                assert engine.discard(names[:5]) == 5
                engine.stats()
                assert not engine.contains(names[0])
                assert engine.contains(names[7])

        in_threads(4, work)
        s = engine.stats()
        assert (s.records, s.stored_blocks, s.loaded_blocks, s.discarded_blocks, s.pinned) == (20, 1000, 1000, 500, 0)
        assert s.fallbacks == {}
        engine.pool.check()


def test_threads_that_fight_over_a_small_pool() -> None:
    """Evictions, refusals, misses and replaced keys: contents are always those of one store, never mixed."""
    with kvzip.SwapEngine(6 * RECORD, codec="raw") as engine:

        def work(number: int) -> None:
            rng = np.random.default_rng(number)
            for _ in range(60):
                i = int(rng.integers(10))
                x = np.full((2, 4, 2, 8), float(rng.integers(1000)), np.float32)
                x[1] += 0.5
                y = np.zeros_like(x)
                try:
                    if rng.random() < 0.5:
                        engine.store([K[i], K[i + 20]], view(x))
                    elif rng.random() < 0.2:
                        engine.discard([K[i], K[i + 20]])
                    else:
                        engine.load([K[i], K[i + 20]], view(y))
                        assert len(np.unique(y[0])) == len(np.unique(y[1])) == 1
                        assert y[1, 0, 0, 0] == y[0, 0, 0, 0] + 0.5  # both of the same store
                except (BlockNotFoundError, PoolExhaustedError):
                    pass

        in_threads(4, work)
        engine.pool.check()
        assert engine.stats().pool.allocations == engine.stats().records <= 6


class Slow(RawCodec):
    """Waits for a signal while it decodes."""

    name: ClassVar[str] = "slow"

    def __init__(self) -> None:
        self.inside = threading.Event()
        self.go = threading.Event()

    def decode_blocks(self, *arguments: Any, **more: Any) -> None:
        self.inside.set()
        assert self.go.wait(30)
        super().decode_blocks(*arguments, **more)


def test_a_record_that_is_being_loaded_is_neither_evicted_nor_freed() -> None:
    x = pages()
    y = np.zeros_like(x)
    codec = Slow()
    with kvzip.SwapEngine(4 * RECORD, codec=codec) as engine:
        engine.store(K[:4], view(x, range(4)))
        loader = threading.Thread(target=lambda: engine.load(K[:2], view(y, range(2))))
        loader.start()
        assert codec.inside.wait(30)
        assert engine.store(K[10:12], view(x, range(2))).result().evicted == 2
        assert held(engine) == [0, 1, 10, 11]
        assert engine.discard([K[0]]) == 1  # forgotten at once, freed when the load ends
        assert engine.stats().pool.allocations == 4
        codec.go.set()
        loader.join(30)
        assert np.array_equal(y[:2], x[:2])
        assert engine.stats().pool.allocations == engine.stats().records == 3
        engine.pool.check()


def test_a_store_does_not_wait_for_what_others_hold() -> None:
    """On a shared pool only loads of its own engine can give bytes back that it hears of."""
    with kvzip.HostPool(1 << 16) as pool, kvzip.SwapEngine(pool, codec="raw") as other:
        other.store([b"%d" % i for i in range(60)], view(pages(60)))
        index, ended = RecordIndex(pool, LRU()), []

        def take() -> None:
            with pytest.raises(PoolExhaustedError, match="the pool can give"):
                index.take(1 << 16, [b"key"])
            ended.append(True)

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        thread.join(20)  # it would wait a minute for loads
        assert ended


def test_a_store_waits_for_the_bytes_of_a_load() -> None:
    """Room was promised while nothing was in flight; a load that begins since then only delays the store."""
    x = pages()
    y = np.zeros_like(x)
    codec = Slow()

    class Pause(Slow):
        name: ClassVar[str] = "pause"

        def encode_blocks(self, *arguments: Any) -> Any:
            self.inside.set()
            assert self.go.wait(30)
            return super().encode_blocks(*arguments)

    pause = Pause()
    with kvzip.SwapEngine(2 * RECORD, codec=codec) as engine:
        engine.store(K[:2], view(x, range(2)))
        engine.configure(codec=pause)
        storer = threading.Thread(target=lambda: engine.store(K[10:12], view(x, range(10, 12))), daemon=True)
        storer.start()
        assert pause.inside.wait(30)
        loader = threading.Thread(target=lambda: engine.load(K[:2], view(y, range(2))), daemon=True)
        loader.start()
        assert codec.inside.wait(30)
        pause.go.set()
        time.sleep(0.05)
        assert storer.is_alive()
        assert held(engine) == [0, 1]
        engine.discard([K[0]])  # what is gone counts as soon as its load has ended
        codec.go.set()
        storer.join(30)
        loader.join(30)
        assert not storer.is_alive()
        assert held(engine) == [10, 11]
        assert np.array_equal(y[:2], x[:2])
        engine.pool.check()


def test_close_waits_for_a_load() -> None:
    x = pages()
    y = np.zeros_like(x)
    codec = Slow()
    engine = kvzip.SwapEngine(4 * RECORD, codec=codec)
    engine.store(K[:2], view(x, range(2)))
    loader = threading.Thread(target=lambda: engine.load(K[:2], view(y, range(2))), daemon=True)
    loader.start()
    assert codec.inside.wait(30)
    closer = threading.Thread(target=engine.close, daemon=True)
    closer.start()
    time.sleep(0.05)
    assert closer.is_alive()
    codec.go.set()
    closer.join(30)
    loader.join(30)
    assert not closer.is_alive()
    assert np.array_equal(y[:2], x[:2])


def test_a_key_is_never_missing_while_it_is_replaced() -> None:
    """The pool is full, so that the old record must go for the new one."""
    x = pages()
    with kvzip.SwapEngine(4 * RECORD, codec="raw") as engine:
        engine.store(K[:4], view(x, range(4)))
        stop = threading.Event()
        misses: list[bytes] = []

        def watch() -> None:
            y = np.zeros((4, 4, 2, 8), np.float32)
            while not stop.is_set():
                misses.extend(k for k in K[:4] if not engine.contains(k))
                engine.load(K[:4], view(y))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        refused = 0
        for i in range(100):
            try:
                engine.store(K[:4], view(x, range(i % 32, i % 32 + 4)))
            except PoolExhaustedError:
                refused += 1
        stop.set()
        watcher.join(30)
        assert not misses
        assert refused < 100


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo"])
def test_a_full_pool_under_every_policy(policy: str) -> None:
    """Records come and go, some of them pinned: what is held is right, and the pool is used to the end."""
    rng = np.random.default_rng(4)
    pages = [rng.integers(0, 1 << 16, (40, 2, 16, 2, 8)).astype(np.uint16)]
    view = BlockView(pages, "2NHD", dtype="bfloat16")
    keys = [b"block-%d" % i for i in range(40)]
    with kvzip.SwapEngine(12 * 1536, codec="raw", policy=policy) as engine:
        for step in range(400):
            chosen = [int(i) for i in rng.integers(0, 40, 3)]
            held = [i for i in chosen if engine.contains(keys[i])]
            out = BlockView([np.zeros_like(pages[0][:1])], "2NHD", dtype="bfloat16")
            for i in held:
                engine.load([keys[i]], out)
                assert np.array_equal(out.tensors[0][0], pages[0][i])
            with engine.pin([keys[i] for i in held[:1]]):
                engine.store([keys[i] for i in dict.fromkeys(chosen)], view[list(dict.fromkeys(chosen))])
                assert all(engine.contains(keys[i]) for i in chosen)
            if step % 50 == 0:
                engine.discard([keys[chosen[0]]])
        stats = engine.stats()
        engine.pool.check()
        assert stats.evicted_blocks > 100
        assert stats.pool.free_bytes < 1536 + engine.pool.headroom_bytes
        assert sorted(engine._index._policy.victims()) == sorted(k for k in keys if engine.contains(k))
