# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Settings of the adapter: what is read, what is refused with which words, and what they mean for pages."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvzip import BlockLayout, BlockView, CalibrationTable, CodecNotFoundError, ErrorBound
from kvzip.adapters.shard import Shard
from kvzip.adapters.vllm.bounds import group_bounds
from kvzip.adapters.vllm.layout import Group, Page
from kvzip.adapters.vllm.settings import AdapterSettings
from kvzip.bounds import BoundPolicy
from kvzip.errors import ConfigError
from kvzip.types import DType, SegmentLayout

REL = ErrorBound.relative


def read(**more: Any) -> AdapterSettings:
    return AdapterSettings.read({"cpu_bytes_to_use": 1 << 30, **more})


def test_the_defaults() -> None:
    settings = read()
    assert (settings.cpu_bytes_to_use, settings.codec, settings.bounds) == (
        1 << 30,
        "cuszp",
        BoundPolicy.uncalibrated(),
    )
    assert settings.coding_mode == "rice"
    assert settings.change(bound=1e-2).change(bound=None).bounds == BoundPolicy.uncalibrated()


@pytest.mark.parametrize(
    ("value", "bound"),
    [
        (1e-2, REL(1e-2)),
        ("1e-2", REL(1e-2)),
        ("abs:0.5", ErrorBound.absolute(0.5)),
        ("lossless", ErrorBound.lossless()),
        ("k=1e-3,v=rms:0.1,sink=none", BoundPolicy(REL(1e-3), ErrorBound.token_rms(0.1), sink=None)),
    ],
)
def test_bounds(value: Any, bound: Any) -> None:
    assert read(bound=value).bounds == bound


def test_layers_of_their_own() -> None:
    settings = read(bound=1e-3, layer_bounds={"0": "lossless", 5: "k=1e-2,v=1e-1"})
    policy = settings.bounds
    assert isinstance(policy, BoundPolicy)
    assert policy.layers[0] == (ErrorBound.lossless(),) * 2
    assert policy.layers[5] == (REL(1e-2), REL(1e-1))
    assert (policy.key, policy.value) == (REL(1e-3), REL(1e-3))


def test_objective_and_pressure() -> None:
    assert (read().objective, read().bound_pressure, read().steps) == (
        None,
        None,
        (BoundPolicy.uncalibrated(),),
    )
    settings = read(
        bound=1e-3,
        objective="balanced",
        pressure=["rel:3e-3", 1e-2],
        pressure_thresholds=[0.5, 0.9],
        pressure_floor="rel:1e-2",
        layer_bounds={"0": "lossless"},
    )
    assert settings.objective == "balanced"
    pressure = settings.bound_pressure
    assert pressure is not None
    assert (pressure.bounds, pressure.thresholds, pressure.floor) == ((REL(3e-3), REL(1e-2)), (0.5, 0.9), REL(1e-2))
    assert [step.layers[0][0] for step in settings.steps if isinstance(step, BoundPolicy)] == [
        ErrorBound.lossless()
    ] * 3
    assert settings.coding_mode == "fixed"
    assert read(bound=1e-3, pressure=["k=3e-3,v=rms:0.1"]).coding_mode == "rice"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"objective": "speed"}, "latency, balanced, capacity"),
        ({"objective": 1}, "objective 1"),
        ({"pressure": "rel:1e-2"}, "give a list"),
        ({"pressure": ["1e-2", "1e-3"]}, "finer than"),
        ({"pressure": ["1e-2"], "pressure_thresholds": [2]}, "pressure_thresholds 2"),
        ({"pressure": ["1e-2"], "pressure_floor": "5e-3"}, "floor"),
        ({"pressure_floor": "5e-3"}, "without pressure"),
        ({"presure": ["1e-2"]}, "'pressure'"),
    ],
)
def test_objectives_and_pressure_that_cannot_be(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        read(**settings)


def test_vllms_own_settings_are_left_alone() -> None:
    assert read(spec_name="x", blocks_per_chunk=4, offload_prompt_only=False, something_of_vllms=1) == read()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cpu_bytes_to_use": None}, "cpu_bytes_to_use is not set"),
        ({"cpu_bytes_to_use": "much"}, "give a whole number"),
        ({"cpu_bytes_to_use": 1000}, "at least 1048576"),
        ({"bonud": 1e-3}, "did you mean 'bound'"),
        ({"bound": 2}, "above 1"),
        ({"bound": [1]}, "give a number such as 1e-3"),
        ({"bound": "table:/nowhere/table.npz:0.4"}, "cannot be read"),
        ({"layer_bounds": ["lossless"]}, "give bounds by layer"),
        ({"layer_bounds": {"x": 1e-3}}, "give a whole number"),
        ({"mode": "fancy"}, "has no mode 'fancy'"),
        ({"codec": 7}, "give a name"),
        ({"policy": "mru"}, "unknown eviction policy"),
        ({"verify": "yes"}, "give a part from 0"),
        ({"max_ctas": -1}, "at least 0"),
        ({"chunk_bytes": 12}, "at least 1048576"),
    ],
)
def test_errors_say_what_to_do(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read(**given)


def test_an_unknown_codec() -> None:
    with pytest.raises(CodecNotFoundError):
        read(codec="zip")


def test_changes_leave_the_rest_and_check_before_they_hold() -> None:
    settings = read(bound=1e-2, mode="plain", verify=True)
    changed = settings.change(bound="lossless")
    assert (changed.bounds, changed.mode, changed.verify) == (ErrorBound.lossless(), "plain", 1.0)
    assert settings.change(codec="raw").mode is None
    with pytest.raises(ConfigError, match="cannot be changed"):
        settings.change(colour="blue")


# ---- bounds of pages


def group(layers: tuple[int, ...], heads: int = 2, kinds: str = "kv") -> Group:
    tensors = [np.zeros((3, 2, 16, heads, 4), np.float32) for _ in layers]
    view = BlockView(tensors, "2NHD")
    return Group(view, tuple(Page(layer, (0, heads)) for layer in layers for _ in kinds), heads)


def page_bounds(bound: Any, of: Group, shard: Shard | None = None) -> tuple[ErrorBound, ...]:
    policy = group_bounds(bound, of, shard or Shard())
    return policy.page_bounds(of.view.layout)


def test_layers_are_those_of_the_model_not_of_the_group() -> None:
    policy = BoundPolicy(REL(1e-3), REL(1e-2), layers={3: (REL(0.3), REL(0.03)), 4: REL(0.4)})
    assert page_bounds(policy, group((1, 3))) == (REL(1e-3), REL(1e-2), REL(0.3), REL(0.03))
    assert page_bounds(policy, group((4,))) == (REL(0.4), REL(0.4))
    assert page_bounds(REL(1e-3), group((0,))) == (REL(1e-3), REL(1e-3))


def test_pages_of_unknown_kind_are_exact() -> None:
    tensor = np.zeros((3, 64), np.float32)
    of = Group(BlockView([tensor], BlockLayout.opaque([tensor])), (Page(),))
    assert page_bounds(REL(1e-1), of) == (ErrorBound.lossless(),)


def test_values_in_memory_order_get_the_bound_of_keys() -> None:
    """There a token's rms would be that of the whole page."""
    tensor = np.zeros((3, 2, 64), np.float32)
    pages = tuple(SegmentLayout(0, DType.FLOAT32, 1, 1, 64, i * 256, kind=kind) for i, kind in enumerate("kv"))
    of = Group(BlockView([tensor], BlockLayout(pages)), (Page(0, (0, 1)), Page(0, (0, 1))), 1)
    assert page_bounds(read().bounds, of) == (REL(1e-3), REL(1e-3))
    assert page_bounds(read().bounds, group((0,))) == (REL(1e-3), ErrorBound.token_rms(0.1))
    assert page_bounds(ErrorBound.token_rms(0.1), of)[1] == ErrorBound.lossless()
    assert page_bounds(moments(heads=1).policy(), of)[1] == ErrorBound.lossless()


def moments(layers: int = 4, heads: int = 4) -> CalibrationTable:
    return CalibrationTable(np.arange(1, 1 + layers * heads * 4).reshape(layers, heads, 4))


@pytest.mark.parametrize(("rank", "own"), [(0, slice(0, 2)), (1, slice(2, 4))])
def test_a_calibration_table_is_cut_for_each_worker(rank: int, own: slice) -> None:
    table = moments()
    found = page_bounds(table.policy(), group((0, 2)), Shard(rank, 2))
    for bound, layer in zip(found[::2], (0, 2), strict=True):
        assert bound.channels is not None
        np.testing.assert_allclose(bound.channels.values, table.key_bounds(0.4)[layer, own], rtol=1e-6)
    assert found[1] == ErrorBound.token_rms(0.17)


def test_replicated_heads() -> None:
    shard = [Shard(rank, 4).first_head(total=2, own=1) for rank in range(4)]
    assert shard == [0, 0, 1, 1]
    assert Shard(3, 4).first_head(total=1, own=1) == 0


def test_a_table_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="4 KV heads, this model has 3"):
        page_bounds(moments().policy(), group((0,), heads=3))
    with pytest.raises(ConfigError, match="channels a head"):
        page_bounds(CalibrationTable(np.ones((4, 2, 8))).policy(), group((0,)))


def test_layers_behind_the_table_are_exact() -> None:
    assert page_bounds(moments(layers=2, heads=2).policy(), group((5,))) == (ErrorBound.lossless(),) * 2


def test_a_table_in_a_file(tmp_path: Path) -> None:
    moments().save(tmp_path / "table.npz")
    policy = read(bound=f"table:{tmp_path}/table.npz:0.4").bounds
    assert isinstance(policy, BoundPolicy)
    assert policy.num_layers == 4


def test_keys_by_head_with_channels_as_heads() -> None:
    """vLLM's CPU attention keeps K transposed: each head is a page."""
    table = moments(heads=2)
    whole = group((0,)).view
    pages = [
        SimpleNamespace(**{**vars_of(s), "kind": kind, "heads": 4, "head_dim": 1})
        for s, kind in zip(whole.layout.segments[:1] * 2, "kk", strict=True)
    ]
    of = SimpleNamespace(
        view=SimpleNamespace(layout=SimpleNamespace(segments=pages)), pages=(Page(0, (0, 1)), Page(0, (1, 2))), heads=2
    )
    policy = group_bounds(table.policy(), of, Shard())  # type: ignore[arg-type]
    for head in range(2):
        bound = policy.layers[head][0]  # type: ignore[index]
        assert bound.channels.values.shape == (4, 1)
        np.testing.assert_allclose(bound.channels.values[:, 0], table.key_bounds(0.4)[0, head], rtol=1e-6)


def vars_of(segment: Any) -> dict[str, Any]:
    return {name: getattr(segment, name) for name in ("tokens", "heads", "head_dim", "kind")}


@pytest.mark.parametrize(
    ("extra", "mode"),
    [
        ({}, "rice"),
        ({"mode": "fixed"}, "fixed"),
        ({"bound": "1e-3"}, "fixed"),
        ({"bound": "k=1e-3,v=rms:0.15"}, "rice"),
        ({"bound": "1e-3", "layer_bounds": {"3": "rms:0.1"}}, "rice"),
        ({"bound": "rms:0.15", "mode": "fixed"}, "fixed"),
        ({"bound": "lossless", "codec": "raw"}, "none"),
    ],
)
def test_bounds_within_pages_take_the_mode_rice(extra: dict[str, Any], mode: str) -> None:
    assert read(**extra).coding_mode == mode


def test_a_bound_without_them_goes_back_to_the_first_mode() -> None:
    assert read(bound="rms:0.15").change(bound="1e-3").coding_mode == "fixed"
