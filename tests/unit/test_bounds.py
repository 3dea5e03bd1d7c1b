# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Bound policies, calibration tables, and the engine and records that use them."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import pytest

import kvzip
from kvzip import BlockLayout, BlockView, BoundPolicy, CalibrationTable, ErrorBound, SwapEngine
from kvzip.bounds import resolve, table_id
from kvzip.calibration import parse_bounds
from kvzip.coding import compare_pages, value_bounds
from kvzip.errors import ConfigError, CorruptRecordError, FormatError, LayoutError
from kvzip.record import Coding, Steps, read_header, split_coding
from kvzip.types import BoundKind, ChannelBounds, DType

LAYERS, HEADS, DIM = 3, 2, 32


def table(seed: int = 0, layers: int = LAYERS, heads: int = HEADS, dim: int = DIM) -> CalibrationTable:
    return CalibrationTable(np.random.default_rng(seed).lognormal(0, 1, (layers, heads, dim)), "a model", 2000)


def cache(blocks: int = 4) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((LAYERS, blocks, 2, 16, HEADS, DIM)).astype(np.float32)
    return list((values.view(np.uint32) >> 16).astype(np.uint16))


def view(pages: list[np.ndarray]) -> BlockView:
    return BlockView(pages, "2NHD", dtype="bfloat16")


def names(count: int) -> list[bytes]:
    return [b"%d" % i for i in range(count)]


# ---- bounds


def test_channel_bounds_are_rounded_down_and_clipped() -> None:
    bounds = ChannelBounds([[0.1, 1e-30, 1e300]])
    assert bounds.values.tolist() == [[np.nextafter(np.float32(0.1), np.float32(0)), 0.0, np.float32(2.0**120)]]
    assert bounds.values[0, 0] <= 0.1
    with pytest.raises(ValueError, match="read-only"):
        bounds.values[0, 0] = 1


@pytest.mark.parametrize("bad", [[1.0, 2.0], [[]], [[0.0]], [[-1.0]], [[np.nan]], [[np.inf]]])
def test_channel_bounds_refuse(bad: object) -> None:
    with pytest.raises(ConfigError):
        ErrorBound.channel_table(bad)  # type: ignore[arg-type]


def test_tables_compare_by_value() -> None:
    one, same, other = (ErrorBound.channel_table([[x, 2.0]]) for x in (1.0, 1.0, 3.0))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other


@pytest.mark.parametrize("r", [0.0, -1.0, 1.5, float("nan"), float("inf")])
def test_token_rms_range(r: float) -> None:
    with pytest.raises(ConfigError):
        ErrorBound.token_rms(r)


def test_parse() -> None:
    assert ErrorBound.parse("rms:0.17") == ErrorBound.token_rms(0.17)
    assert ErrorBound.parse(str(ErrorBound.token_rms(0.17))) == ErrorBound.token_rms(0.17)
    assert parse_bounds("k=1e-3,v=rms:0.1") == BoundPolicy(ErrorBound.relative(1e-3), ErrorBound.token_rms(0.1))
    assert parse_bounds("k=1e-3,v=rms:0.1,sink=none,other=1e-2") == BoundPolicy(
        ErrorBound.relative(1e-3), ErrorBound.token_rms(0.1), sink=None, other=ErrorBound.relative(1e-2)
    )
    for bad in ("k=1e-3", "k=1,v=1,k=1", "q=1", "table:x", "table::0.4", "rms:", ":1", "k=1e-3,v=table:x:1"):
        with pytest.raises(ConfigError):
            parse_bounds(bad)


def test_parse_tables(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    table().save(path)
    assert parse_bounds(f"table:{path}") == table().policy() == table().policy(0.4, 0.17)
    assert parse_bounds(f"table:{path}:0.6") == table().policy(0.6)
    assert parse_bounds(f"k=table:{path},v=rms:0.17") == table().policy()
    assert parse_bounds(f"k=table:{path}:0.2,v=rms:0.08") == table().policy(0.2, 0.08)


# ---- policies


def test_a_policy_gives_each_page_its_bound() -> None:
    layout = view(cache()).layout
    key, value, exact = ErrorBound.relative(1e-3), ErrorBound.token_rms(0.1), ErrorBound.lossless()
    policy = BoundPolicy(key, value, {1: exact, 2: (value, key)})
    assert resolve(policy, layout) == (key, value, exact, exact, value, key)
    assert resolve(policy, layout, sink=True) == exact
    assert resolve(BoundPolicy(key, value, sink=None), layout, sink=True) == (key, value) * LAYERS
    assert resolve(BoundPolicy(key, key), layout) == key
    assert resolve(key, layout, sink=True) == exact


def test_the_uncalibrated_policy_is_smaller_than_one_bound_for_all() -> None:
    pages = cache(8)
    policy = BoundPolicy.uncalibrated()
    sizes = {}
    for bound in (policy, ErrorBound.relative(1e-3), ErrorBound.lossless()):
        with SwapEngine(1 << 20, bound=bound, mode="rice") as engine:
            result = engine.store(names(8), view(pages), measure_error=True).result()
            assert result.violations == 0
            sizes[bound] = result.record_bytes
    assert sizes[policy] < sizes[ErrorBound.relative(1e-3)] < sizes[ErrorBound.lossless()]


def test_pages_of_unknown_kind_get_the_other_bound() -> None:
    layout = BlockLayout.from_tensors(cache()[0][:, 0][None], "NHD", dtype="bfloat16")
    other = ErrorBound.relative(1e-2)
    assert resolve(BoundPolicy(ErrorBound.relative(0.1), ErrorBound.token_rms(0.1), other=other), layout) == other


def test_a_policy_that_does_not_fit_is_refused() -> None:
    layout = view(cache()).layout
    for bad in (table(layers=4), table(layers=2), table(heads=1), table(dim=64)):
        with pytest.raises(LayoutError, match="calibration table of this model"):
            resolve(bad.policy(), layout)
    assert table(layers=5).select(layers=range(LAYERS)).policy().page_bounds(layout)
    assert table(heads=4).select(heads=[2, 3]).policy().page_bounds(layout)


@pytest.mark.parametrize("bad", [{"key": 1e-3}, {"layers": {-1: ErrorBound.lossless()}}, {"layers": {0: 1e-3}}])
def test_a_policy_checks_its_parts(bad: dict[str, object]) -> None:
    parts: dict[str, object] = {"key": ErrorBound.relative(1e-3), "value": ErrorBound.relative(1e-3), **bad}
    with pytest.raises(ConfigError):
        BoundPolicy(**parts)  # type: ignore[arg-type]


# ---- calibration tables


@pytest.mark.parametrize("name", ["t.npz", "t.json"])
def test_a_table_is_saved_and_loaded(tmp_path: Path, name: str) -> None:
    table().save(tmp_path / name)
    loaded = CalibrationTable.load(tmp_path / name)
    np.testing.assert_array_equal(loaded.moments, table().moments)
    assert (loaded.model, loaded.tokens, loaded.geometry) == ("a model", 2000, (LAYERS, HEADS, DIM))


@pytest.mark.parametrize("name", ["t.npz", "t.json"])
def test_a_table_knows_what_its_model_bears(tmp_path: Path, name: str) -> None:
    assert (table().t, table().r) == (0.4, 0.17)
    own = CalibrationTable(table().moments, t=0.3, r=0.1)
    own.save(tmp_path / name)
    loaded = CalibrationTable.load(tmp_path / name)
    for chosen in (own, loaded, loaded.select(layers=range(LAYERS))):
        assert (chosen.t, chosen.r) == (0.3, 0.1)
        assert chosen.policy() == own.policy(0.3, 0.1)
        assert chosen.policy(0.6) == own.policy(0.6, 0.2), "as much larger"
        assert chosen.policy(6.0).value == ErrorBound.token_rms(1.0)
        assert chosen.policy(r=0.2) == own.policy(0.3, 0.2)
    for bad in ({"t": 0.0}, {"t": np.inf}, {"r": 0.0}, {"r": 1.5}, {"r": np.nan}):
        with pytest.raises(ConfigError, match="calibration table"):
            CalibrationTable(table().moments, **bad)


def test_a_table_of_a_file_without_strengths_has_the_usual_ones(tmp_path: Path) -> None:
    table().save(tmp_path / "t.json")
    about = json.loads((tmp_path / "t.json").read_text())
    del about["t"], about["r"]
    (tmp_path / "t.json").write_text(json.dumps(about))
    loaded = CalibrationTable.load(tmp_path / "t.json")
    assert (loaded.t, loaded.r) == (0.4, 0.17)
    about["t"] = "much"
    (tmp_path / "t.json").write_text(json.dumps(about))
    with pytest.raises(FormatError, match="no calibration table"):
        CalibrationTable.load(tmp_path / "t.json")


@pytest.mark.parametrize("name", ["t.npz", "t.json"])
def test_factors_of_v_go_with_their_layers(tmp_path: Path, name: str) -> None:
    factors = np.linspace(0.5, 8, LAYERS, dtype=np.float32)
    CalibrationTable(table().moments, "a model", 2000, factors).save(tmp_path / name)
    loaded = CalibrationTable.load(tmp_path / name)
    np.testing.assert_array_equal(loaded.value_factors, factors)
    for chosen, r in ((loaded, 0.2), (loaded.select(layers=[LAYERS - 1]), 0.1)):
        expected = [min(1.0, r * float(f)) for f in chosen.value_factors]
        layers = chosen.policy(0.4, r).layers
        assert [layers[i][1] for i in range(len(expected))] == [ErrorBound.token_rms(e) for e in expected]
        keys = [layers[i][0] for i in range(len(expected))]
        assert keys == [ErrorBound.channel_table(k) for k in chosen.key_bounds(0.4)]
    for bad in (factors[1:], -factors, factors * np.nan):
        with pytest.raises(ConfigError, match="value factors"):
            CalibrationTable(table().moments, value_factors=bad)


SHAPES = ((2, 8), (0, 0), (1, 16))


def mixed() -> CalibrationTable:
    moments = np.random.default_rng(1).lognormal(0, 1, (3, 2, 16))
    return CalibrationTable(moments, "a model", 2000, np.array([1, 2, 3], np.float32), SHAPES)


@pytest.mark.parametrize("name", ["t.npz", "t.json"])
def test_a_table_of_layers_that_differ(tmp_path: Path, name: str) -> None:
    mixed().save(tmp_path / name)
    loaded = CalibrationTable.load(tmp_path / name)
    np.testing.assert_array_equal(loaded.moments, mixed().moments)
    assert (loaded.shapes, loaded.geometry, loaded.is_uniform) == (SHAPES, (3, 2, 16), False)
    assert not loaded.moments[2, 1].any(), "padding"
    bounds = loaded.key_bounds(0.4)
    for layer, (heads, dim) in enumerate(SHAPES):
        alone = np.full((2, 16), np.nan)
        if heads:
            own = CalibrationTable(mixed().moments[layer : layer + 1, :heads, :dim])
            alone[:heads, :dim] = own.key_bounds(0.4)[0]
        np.testing.assert_array_equal(bounds[layer], alone)
    policy = loaded.policy(0.4, 0.1)
    assert policy.num_layers == 3
    assert set(policy.layers) == {0, 2}
    assert policy.layers[2] == (ErrorBound.channel_table(bounds[2, :1]), ErrorBound.token_rms(0.1 * 3))
    attention = loaded.select(layers=[0, 2])
    assert (attention.shapes, attention.geometry) == ((SHAPES[0], SHAPES[2]), (2, 2, 16))
    assert loaded.select(layers=[0], heads=[1]).shapes == ((1, 8),)
    np.testing.assert_array_equal(loaded.select(layers=[0], heads=[1]).moments[0, 0], loaded.moments[0, 1, :8])
    with pytest.raises(ConfigError, match="select layers first"):
        loaded.select(heads=[0])


@pytest.mark.parametrize("shapes", [SHAPES[:2], ((2, 8), (0, 0), (1, 12)), ((2, 16), (0, 4), (1, 16)), ((0, 0),) * 3])
def test_shapes_must_fit_the_moments(shapes: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        CalibrationTable(np.ones((3, 2, 16)), shapes=shapes)


def test_tables_of_layers_that_differ_are_of_another_format(tmp_path: Path) -> None:
    """What reads only the first one must not take padding for moments."""
    mixed().save(tmp_path / "t.json")
    table().save(tmp_path / "u.json")
    assert '"kvzip calibration 2"' in (tmp_path / "t.json").read_text()
    assert '"kvzip calibration 1"' in (tmp_path / "u.json").read_text()


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"PK\x03\x04nothing", b'{"format": "other"}', b"\x93NUMPY", b"[" * 10**5]
)
@pytest.mark.parametrize("suffix", [".npz", ".json", ".npy"])
def test_other_files_are_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"t{suffix}"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="no calibration table"):
        CalibrationTable.load(path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", about=np.array([object()], object), moments=np.ones((1, 1, 1)))
    with pytest.raises(FormatError):
        CalibrationTable.load(tmp_path / "t.npz")


def test_key_bounds_are_inverse_to_the_queries_and_floored() -> None:
    moments = np.ones((1, 1, 100))
    moments[0, 0, 0] = 0
    moments[0, 0, 1] = 4
    bounds = CalibrationTable(moments).key_bounds(0.4)[0, 0]
    assert bounds[2] == pytest.approx(0.4)
    assert bounds[1] == pytest.approx(0.2)
    assert bounds[0] == pytest.approx(0.4 / np.sqrt(0.01 * moments.mean()))
    for bad in (np.zeros((1, 1, 4)), -moments, np.full((1, 1, 2), np.nan), np.ones((2, 2))):
        with pytest.raises(ConfigError):
            CalibrationTable(bad)


# ---- the engine


def test_store_and_load_with_a_calibration_table() -> None:
    pages = cache()
    policy = table().policy(0.4, 0.17)
    with SwapEngine(1 << 20, bound=policy) as engine:
        result = engine.store(names(4), view(pages), sink=[True, False, False, False], measure_error=True).result()
        assert result.violations == 0
        out = [np.zeros_like(p) for p in pages]
        engine.load(names(4), view(out))
        headers = [read_header(engine.read_record(name)) for name in names(4)]
    assert headers[0].bound == ErrorBound.lossless()
    assert headers[0].table_id == 0
    for header in headers[1:]:
        assert header.bound.kind is BoundKind.BY_PAGE
        assert header.table_id == table_id(resolve(policy, view(pages).layout), 2 * LAYERS)
        codings = [split_coding(c) for c in header.table["coding"].tolist()]
        assert codings == [(Coding.RICE, Steps.CHANNEL), (Coding.RICE, Steps.TOKEN)] * LAYERS
    bounds = policy.page_bounds(view(pages).layout)
    for layer in range(LAYERS):
        np.testing.assert_array_equal(out[layer][0], pages[layer][0])
        for kv in range(2):
            for block in range(1, 4):
                found = compare_pages(
                    pages[layer][block, kv], out[layer][block, kv], DType.BFLOAT16, bounds[2 * layer + kv]
                )
                assert found.violations == 0
                assert 0 < found.over_bound <= 1


def test_records_of_several_tables_load_in_one_call() -> None:
    pages = cache()
    with SwapEngine(1 << 20, bound=table(0).policy()) as engine:
        engine.store(names(2), view(pages)[[0, 1]])
        engine.configure(bound=table(1).policy())
        engine.store(names(4)[2:], view(pages)[[2, 3]])
        out = [np.zeros_like(p) for p in pages]
        engine.load(names(4), view(out))
        records = [engine.read_record(name) for name in names(4)]
    for block, (seed, record) in enumerate(zip((0, 0, 1, 1), records, strict=True)):
        alone = kvzip.decode(record, bound=table(seed).policy())
        np.testing.assert_array_equal(np.stack([p[block] for p in out]), np.stack(alone))


def test_channel_tables_live_as_long_as_their_records() -> None:
    """An engine that is given new tables again and again keeps those that records need, and a bounded number more."""
    pages = cache(1)

    def alive() -> int:
        gc.collect()
        return sum(isinstance(one, ChannelBounds) for one in gc.get_objects())

    with SwapEngine(1 << 20, bound=table(0).policy()) as engine:
        engine.store([b"kept"], view(pages))
        first = [page.copy() for page in pages]
        engine.load([b"kept"], view(first))
        before = alive()
        for seed in range(1, 700):
            engine.configure(bound=table(seed).policy())
            engine.store([b"replaced"], view(pages))
        assert alive() - before <= 350 * LAYERS
        out = [np.zeros_like(page) for page in pages]
        engine.load([b"kept"], view(out))
        for one, expected in zip(out, first, strict=True):
            np.testing.assert_array_equal(one, expected)


@pytest.mark.parametrize("marks", [[True], [1, 0, 0, 0], [[True] * 4], "abcd"])
def test_sink_marks_are_one_bool_a_block(marks: object) -> None:
    with SwapEngine(1 << 20) as engine, pytest.raises(ConfigError, match="sink"):
        engine.store(names(4), view(cache()), sink=marks)  # type: ignore[arg-type]


def test_a_policy_that_does_not_fit_changes_nothing() -> None:
    with SwapEngine(1 << 20, bound=table(layers=4).policy()) as engine:
        with pytest.raises(LayoutError):
            engine.store(names(4), view(cache()))
        assert engine.stats().records == 0


def test_a_codec_that_lacks_a_kind_is_refused_when_it_is_chosen() -> None:
    from kvzip.backends.cuszp import CuszpCodec

    class Old(CuszpCodec):
        bound_kinds = frozenset((BoundKind.LOSSLESS, BoundKind.ABSOLUTE, BoundKind.RELATIVE))

    with SwapEngine(1 << 20, codec=Old()) as engine:
        for bound in (ErrorBound.token_rms(0.1), table().policy()):
            with pytest.raises(ConfigError, match="does not take bounds"):
                engine.configure(bound=bound)
        engine.configure(codec="raw", bound=table().policy())  # exact whatever the bound


# ---- records


def test_decode_needs_the_table_that_the_record_names() -> None:
    x = cache()[0][0, 0]
    bound = ErrorBound.channel_table(table().key_bounds(0.4)[0])
    record = kvzip.encode(x, bound=bound, layout="NHD", dtype="bfloat16", measure_error=True)
    assert read_header(record).bound.kind is BoundKind.CHANNEL_TABLE
    decoded = kvzip.decode(record, bound=bound)
    assert compare_pages(x, decoded, DType.BFLOAT16, bound).violations == 0
    with pytest.raises(ConfigError, match=r"channel table [0-9a-f]{16}, none was given"):
        kvzip.decode(record)
    with pytest.raises(ConfigError, match="is another one"):
        kvzip.decode(record, bound=ErrorBound.channel_table(table(1).key_bounds(0.4)[0]))


def test_a_decoder_without_bounds_refuses() -> None:
    x = cache()[0][0, 0][None]
    bound = ErrorBound.channel_table(table().key_bounds(0.4)[0])
    codec = kvzip.get_codec("cuszp")
    blocks = BlockView([x], "NHD", dtype="bfloat16")
    from kvzip.backends.base import EncodeRequest

    out = np.zeros((1, codec.max_payload_bytes(blocks.layout)), np.uint8)
    tables, sizes = codec.encode_blocks(blocks, EncodeRequest(bound), out)
    target = np.full_like(x, 0x55)
    with pytest.raises(CorruptRecordError, match="channel table"):
        codec.decode_blocks(BlockView([target], "NHD", dtype="bfloat16"), [out[0, : int(sizes[0])]], list(tables))
    assert (target == 0x55).all()
    with pytest.raises(LayoutError):
        blocks.with_bounds(ErrorBound.channel_table([[1.0]]))
    with pytest.raises(LayoutError):
        blocks.with_bounds([bound, bound])


def test_value_bounds_of_a_token() -> None:
    x = np.zeros((2, 1, 4))
    x[0, 0] = [3, 4, 0, 0]
    np.testing.assert_allclose(value_bounds(x, ErrorBound.token_rms(0.5))[:, 0, 0], [1.25, 0])
