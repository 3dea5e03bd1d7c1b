# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The serde on LMCache's memory objects: sizes, bounds, damage, and what is not known."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="LMCache needs torch")
pytest.importorskip("lmcache.v1", reason="needs lmcache, which .ci/lmcache.sh installs")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey  # noqa: E402
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj  # noqa: E402

from kvzip import BoundPolicy, CalibrationTable, ErrorBound  # noqa: E402
from kvzip.adapters.lmcache import register  # noqa: E402
from kvzip.adapters.lmcache.layout import PAGE_TOKENS  # noqa: E402
from kvzip.adapters.lmcache.serde import KvzipDeserializer, KvzipSerializer, create_processor  # noqa: E402
from kvzip.adapters.lmcache.settings import SerdeSettings  # noqa: E402
from kvzip.adapters.lmcache.stored import host_bytes, verify_stored  # noqa: E402
from kvzip.errors import ConfigError, CorruptRecordError, KvzipError, LayoutError  # noqa: E402

KEY = ObjectKey(b"\x07" * 32, "models/some", 0)
GUARD = 0xA5
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def memory(shapes: list[Any], dtypes: list[Any]) -> TensorMemoryObj:
    """A memory object as LMCache's allocators make them."""
    shapes = [torch.Size(shape) for shape in shapes]
    nbytes = sum(shape.numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True))
    about = MemoryObjMetadata(
        shapes[0], dtypes[0], 0, nbytes, 1, fmt=MemoryFormat.KV_2LTD, shapes=shapes, dtypes=list(dtypes)
    )
    return TensorMemoryObj(torch.full((nbytes,), GUARD, dtype=torch.uint8), about, None)


def buffer(nbytes: int) -> TensorMemoryObj:
    return memory([(nbytes,)], [torch.uint8])


@dataclass
class Case:
    """An object, how it is stored, and how it is read."""

    source: TensorMemoryObj
    shapes: list[Any]
    dtypes: list[Any]
    store: SerdeSettings
    load: SerdeSettings

    @property
    def layout(self) -> MemoryLayoutDesc:
        return MemoryLayoutDesc([torch.Size(s) for s in self.shapes], self.dtypes)


BOUNDS = ["lossless", 1e-3, 1e-2, "abs:0.05", "k=1e-3,v=rms:0.15", "k=1e-2,v=1e-1,sink=none"]


@st.composite
def tensors(draw: st.DrawFn, dim: int) -> tuple[tuple[int, ...], Any]:
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    tokens = draw(st.one_of(st.integers(1, 40), st.just(0)))
    shape = draw(
        st.sampled_from(
            [
                (2, layers, tokens, heads * dim),
                (1, layers, tokens, 2 * heads * dim),
                (1, layers, tokens, dim + 3),
                (layers, tokens, dim),
                (layers, tokens, 2 * heads * dim),
                (2, layers, tokens, dim + 1),
                (heads * 7,),
            ]
        )
    )
    return shape, draw(st.sampled_from([*FLOATS, torch.uint8, torch.float8_e4m3fn, torch.int64]))


@st.composite
def settings_of(draw: st.DrawFn, dim: int) -> SerdeSettings:
    return SerdeSettings.read(
        {
            "bound": draw(st.sampled_from(BOUNDS)),
            "mode": draw(st.sampled_from([None, "fixed", "plain", "outlier", "rice"])),
            "codec": "cuszp",
            "head_dim": dim,
            "packed": draw(st.booleans()),
            "threads": 1,
        }
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dim = draw(st.sampled_from([4, 8]))
    described = draw(st.lists(tensors(dim), min_size=1, max_size=3))
    if all(0 in shape for shape, _ in described):
        described.append(((2, 1, 17, dim), torch.bfloat16))
    shapes, dtypes = [list(part) for part in zip(*described, strict=True)]
    source = memory(shapes, dtypes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    wild = draw(st.booleans())  # any bits, not-a-number and infinities too
    if wild:
        source.raw_data.copy_(torch.from_numpy(rng.integers(0, 256, source.raw_data.numel(), np.uint8)))
    else:
        for i, dtype in enumerate(dtypes):
            if dtype in FLOATS and not _odd(source, i, dtype):
                part = source.get_tensor(i)
                part.copy_(torch.from_numpy(rng.standard_normal(part.shape) * 10 ** rng.uniform(-3, 3)))
    return Case(source, shapes, dtypes, draw(settings_of(dim)), draw(settings_of(dim)))


def _odd(source: Any, index: int, dtype: Any) -> bool:
    return bool(source.group_prefix_sum[index] % dtype.itemsize)


def stored(case: Case) -> tuple[TensorMemoryObj, int]:
    """What the serializer writes into a buffer of the size that it asks for."""
    serializer = KvzipSerializer(case.store)
    room = buffer(serializer.estimate_serialized_size(case.layout) + 64)  # 64 bytes that it must not touch
    size = serializer.serialize(case.source, room, KEY)
    return room, size


@given(cases())
def test_the_estimate_is_an_upper_bound_under_any_settings(case: Case) -> None:
    room, size = stored(case)
    assert size <= room.get_size() - 64
    assert (room.raw_data[-64:] == GUARD).all()
    assert size <= KvzipSerializer(case.load).estimate_serialized_size(case.layout)
    plain = SerdeSettings.read({})
    assert size <= KvzipSerializer(plain).estimate_serialized_size(case.layout)


@given(cases())
def test_objects_come_back_within_the_bound_whoever_reads_them(case: Case) -> None:
    room, size = stored(case)
    room.set_used_size(size)
    back = memory(case.shapes, case.dtypes)
    KvzipDeserializer(case.load).deserialize(room, back, KEY)
    for i, (shape, dtype) in enumerate(zip(case.shapes, case.dtypes, strict=True)):
        if 0 in shape:
            continue
        begin, end = case.source.group_prefix_sum[i], case.source.group_prefix_sum[i + 1]
        before, after = case.source.raw_data[begin:end], back.raw_data[begin:end]
        limits = None if begin % dtype.itemsize else limits_of(before, shape, dtype, case.store)
        if limits is None:  # nothing says what it is: bit for bit
            assert torch.equal(before, after)
            continue
        kept, given_ = (x.view(dtype).view(shape) for x in (after, before))
        finite = torch.isfinite(given_)
        error = (kept.double() - given_.double()).abs()
        assert (error[finite] <= limits.view(shape)[finite]).all()
        bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        assert torch.equal(kept.view(bits)[~finite], given_.view(bits)[~finite])


def limits_of(raw: Any, shape: Any, dtype: Any, settings: SerdeSettings) -> Any:
    """Most error of each value, by the guide's words; None where the tensor is not known to hold K and V."""
    dim = settings.head_dim
    if len(shape) == 3:
        shape = (1, *shape)
    packed = len(shape) == 4 and shape[0] == 1 and settings.packed and shape[-1] % (2 * dim) == 0
    apart = len(shape) == 4 and shape[0] == 2
    if dtype not in FLOATS or not (packed or apart):
        return None
    whole = shape[-1] % dim == 0
    values = raw.view(dtype).view(shape).double()
    limits = torch.zeros(shape, dtype=torch.float64)
    # [K or V, layers, tokens, heads, dim], both ways of keeping them
    pair, by_pair = (
        x.view(1, shape[1], shape[2], -1, 2, dim).movedim(4, 0).squeeze(1)
        if packed
        else x.view(2, shape[1], shape[2], -1, dim if whole else shape[-1])
        for x in (values, limits)
    )
    bounds = settings.bounds
    kinds = (bounds, bounds) if isinstance(bounds, ErrorBound) else (bounds.key, bounds.value)
    exact_first = isinstance(bounds, ErrorBound) or bounds.sink is not None
    for kind, bound in enumerate(kinds):
        for token in range(0, shape[2], PAGE_TOKENS):
            page = pair[kind, :, token : token + PAGE_TOKENS]
            by_pair[kind, :, token : token + PAGE_TOKENS] = (
                0.0 if (exact_first and token == 0) or ("rms" in str(bound) and not whole) else page_limits(page, bound)
            )
    return limits


def page_limits(page: Any, bound: ErrorBound) -> Any:
    """Of pages of K or V, [layers, tokens, heads, dim]."""
    finite = torch.isfinite(page)
    name, _, value = str(bound).partition(":")
    if name == "lossless":
        return 0.0
    if name == "abs":
        return float(value)
    if name == "rel":
        low = torch.where(finite, page, torch.inf).flatten(1).amin(1)
        high = torch.where(finite, page, -torch.inf).flatten(1).amax(1)
        return (float(value) * (high - low).clamp(min=0))[:, None, None, None]
    known = torch.where(finite, page, 0.0)
    largest = known.abs().amax(-1, keepdim=True)
    part = torch.where(largest > 0, known / largest, 0.0)
    return float(value) * largest * part.square().mean(-1, keepdim=True).sqrt()


@given(cases(), st.data())
def test_damage_raises_and_leaves_the_object_as_it_was(case: Case, data: st.DataObject) -> None:
    room, size = stored(case)
    whole = bytes(room.byte_array)[:size]
    kind = data.draw(st.sampled_from(["flip", "cut", "key"]))
    key, cut = KEY, size
    if kind == "flip":
        at = data.draw(st.integers(0, size - 1))
        room.raw_data[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        cut = data.draw(st.integers(0, size - 1))
    else:
        key = data.draw(
            st.sampled_from(
                [
                    ObjectKey(b"\x08" * 32, "models/some", 0),
                    ObjectKey(b"\x07" * 32, "models/other", 0),
                    ObjectKey(b"\x07" * 32, "models/some", 1),
                    ObjectKey(b"\x07" * 32, "models/some", 0, 1),
                    ObjectKey(b"\x07" * 32, "models/some", 0, 0, "salt"),
                ]
            )
        )
    room.set_used_size(cut)
    back = memory(case.shapes, case.dtypes)
    with pytest.raises(KvzipError):
        KvzipDeserializer(case.load).deserialize(room, back, key)
    assert (back.raw_data == GUARD).all()
    room.raw_data[:size] = torch.frombuffer(bytearray(whole), dtype=torch.uint8)
    room.set_used_size(size)
    KvzipDeserializer(case.load).deserialize(room, back, KEY)


def kv(layers: int = 2, tokens: int = 32, hidden: int = 16) -> TensorMemoryObj:
    source = memory([(2, layers, tokens, hidden)], [torch.bfloat16])
    source.tensor.copy_(torch.randn(source.tensor.shape, generator=torch.Generator().manual_seed(1)))
    return source


def round_trip(source: TensorMemoryObj, key: ObjectKey = KEY, **options: Any) -> tuple[TensorMemoryObj, int]:
    settings = SerdeSettings.read(options)
    serializer = KvzipSerializer(settings)
    shapes, dtypes = source.get_shapes(), source.get_dtypes()
    room = buffer(serializer.estimate_serialized_size(MemoryLayoutDesc(shapes, dtypes)))
    size = serializer.serialize(source, room, key)
    back = memory(shapes, dtypes)
    KvzipDeserializer(settings).deserialize(room, back, key)  # with what lies behind the record
    return back, size


def test_a_verified_buffer_is_trusted_for_what_it_held_alone() -> None:
    serializer, deserializer = KvzipSerializer(SerdeSettings()), KvzipDeserializer(SerdeSettings())
    shape = (2, 1, 16, 8)
    stored, out = [], memory([shape], [torch.bfloat16])
    for seed in (1, 2):
        source = memory([shape], [torch.bfloat16])
        source.tensor.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
        room = buffer(serializer.estimate_serialized_size(MemoryLayoutDesc([torch.Size(shape)], [torch.bfloat16])))
        stored.append(host_bytes(room)[: serializer.serialize(source, room, KEY)].copy())
    into = buffer(max(map(len, stored)))
    host_bytes(into)[: len(stored[0])] = stored[0]
    verify_stored(into, KEY)
    deserializer.deserialize(into, out, KEY)
    verify_stored(into, KEY)
    host_bytes(into)[: len(stored[1])] = stored[1]
    host_bytes(into)[len(stored[1]) - 40] ^= 1  # another record, and damaged
    with pytest.raises(CorruptRecordError):
        deserializer.deserialize(into, out, KEY)
    host_bytes(into)[len(stored[1]) - 40] ^= 1
    deserializer.deserialize(into, out, KEY)  # without the tier: verified here
    host_bytes(into)[len(stored[1]) - 40] ^= 1
    with pytest.raises(CorruptRecordError):
        deserializer.deserialize(into, out, KEY)


def test_the_default_speaks_of_heads_only_where_they_are_known() -> None:
    known, unknown = SerdeSettings.read({"head_dim": 8}), SerdeSettings()
    finer = ErrorBound.relative(1e-3)
    assert (known.bounds, known.coding_mode) == (BoundPolicy.uncalibrated(), "rice")
    assert (unknown.bounds, unknown.coding_mode) == (BoundPolicy(finer, finer), "fixed")
    source, sizes = kv(layers=2, tokens=32), []
    before = source.tensor.double()  # [K and V, layers, tokens, heads x 8]
    page = before[:, :, PAGE_TOKENS:]
    by_range = 1e-3 * (page.amax((2, 3), keepdim=True) - page.amin((2, 3), keepdim=True))
    by_token = 0.1 * page[1].unflatten(-1, (-1, 8)).square().mean(-1).sqrt().repeat_interleave(8, -1)
    for options, of_values in (({"head_dim": 8}, by_token), ({}, by_range[1])):
        back, size = round_trip(source, **options)
        sizes.append(size)
        error = (back.tensor.double() - before).abs()
        assert not error[:, :, :PAGE_TOKENS].any()  # a sequence may begin there
        keys, values = error[:, :, PAGE_TOKENS:]
        assert (keys <= by_range[0]).all()
        assert (values <= of_values).all()
        assert keys.any()
        assert values.any()
    assert sizes[0] < sizes[1]


def test_several_threads_at_once_make_and_read_the_same_bytes() -> None:
    settings = SerdeSettings.read({"bound": "k=1e-3,v=rms:0.15", "head_dim": 8})
    serializer, deserializer = KvzipSerializer(settings), KvzipDeserializer(settings)
    sources = [kv(layers=1 + i % 3, tokens=16 + i) for i in range(8)]

    def there_and_back(source: TensorMemoryObj) -> tuple[bytes, bytes]:
        room, back = buffer(1 << 16), memory(source.get_shapes(), source.get_dtypes())
        size = serializer.serialize(source, room, KEY)
        deserializer.deserialize(room, back, KEY)
        return bytes(room.byte_array)[:size], bytes(back.byte_array)

    alone = [there_and_back(source) for source in sources]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(there_and_back, sources * 4))
    assert together == alone * 4
    assert serializer.stats.objects == 5 * len(sources)


def test_a_calibration_table_follows_the_heads_of_the_rank(tmp_path: Any) -> None:
    moments = np.full((2, 4, 8), 1.0, np.float32)
    moments[:, 2:] = 1e4  # these channels matter: they get a hundredth of the others' bound
    CalibrationTable(moments).save(tmp_path / "table.npz")
    bound = f"table:{tmp_path}/table.npz:0.4"
    source = kv(hidden=16)  # 2 of the model's 4 heads
    errors = []
    for rank in (0, 1):
        key = ObjectKey(b"\x07" * 32, "models/some", ObjectKey.ComputeKVRank(2, rank, 2, rank))
        back, _ = round_trip(source, key, bound=bound, head_dim=8)
        errors.append((back.tensor[0].double() - source.tensor[0].double()).abs().max().item())
    assert 0.004 < errors[0] <= 0.4
    assert 0 < errors[1] <= 0.004


def test_a_table_of_another_model_keeps_objects_exact(tmp_path: Any) -> None:
    CalibrationTable(np.ones((3, 4, 8), np.float32)).save(tmp_path / "layers.npz")
    CalibrationTable(np.ones((2, 3, 8), np.float32)).save(tmp_path / "heads.npz")
    for name in ("layers", "heads"):
        source = kv(hidden=16)
        back, _ = round_trip(source, bound=f"k=table:{tmp_path}/{name}.npz:0.4,v=lossless", head_dim=8)
        assert torch.equal(source.raw_data, back.raw_data)


def test_a_record_of_another_table_is_refused(tmp_path: Any) -> None:
    for name, factor in (("one", 1.0), ("two", 2.0)):
        CalibrationTable(np.full((2, 2, 8), factor, np.float32)).save(tmp_path / f"{name}.npz")
    first, second = (
        SerdeSettings.read({"bound": f"table:{tmp_path}/{n}.npz:0.4", "head_dim": 8}) for n in ("one", "two")
    )
    source, room = kv(), buffer(1 << 16)
    KvzipSerializer(first).serialize(source, room, KEY)
    back = memory(source.get_shapes(), source.get_dtypes())
    with pytest.raises(ConfigError, match="another"):
        KvzipDeserializer(second).deserialize(room, back, KEY)
    assert (back.raw_data == GUARD).all()
    KvzipDeserializer(first).deserialize(room, back, KEY)


def test_layers_of_their_own() -> None:
    source = kv(layers=3)
    back, _ = round_trip(source, bound=0.05, layer_bounds={"1": "lossless"})
    same = [torch.equal(source.tensor[:, i], back.tensor[:, i]) for i in range(3)]
    assert same == [False, True, False]


def test_a_buffer_that_is_too_small_is_not_written() -> None:
    source, room = kv(), buffer(100)
    with pytest.raises(LayoutError, match="buffer"):
        KvzipSerializer(SerdeSettings()).serialize(source, room, KEY)
    assert (room.raw_data == GUARD).all()


def test_verified_stores_count_no_violations() -> None:
    serializer = KvzipSerializer(SerdeSettings.read({"bound": 1e-2, "verify": True}))
    serializer.serialize(kv(), buffer(1 << 16), KEY)
    assert (serializer.stats.objects, serializer.stats.violations) == (1, 0)
    assert serializer.stats.raw_bytes > serializer.stats.stored_bytes > 0


def test_a_codec_that_breaks_its_bound_is_found_and_the_object_kept_raw(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvzip.backends.cuszp import CuszpCodec

    asked = CuszpCodec.encode_blocks

    def ten_times_worse(self: Any, blocks: Any, request: Any, out: Any) -> Any:
        from dataclasses import replace

        return asked(self, blocks, replace(request, bound=ErrorBound.relative(0.5)), out)

    monkeypatch.setattr(CuszpCodec, "encode_blocks", ten_times_worse)
    serializer = KvzipSerializer(SerdeSettings.read({"bound": 1e-3, "verify": 1}))
    source, room = kv(), buffer(1 << 16)
    serializer.serialize(source, room, KEY)
    back = memory(source.get_shapes(), source.get_dtypes())
    KvzipDeserializer(SerdeSettings()).deserialize(room, back, KEY)
    assert torch.equal(source.raw_data, back.raw_data)
    assert serializer.stats.violations > 0
    assert serializer.stats.fallback_pages["encoder_failed"] > 0


def test_lmcache_finds_the_serde_by_its_name() -> None:
    from lmcache.v1.distributed.serde import SerdeConfig, create_serde_processor

    register()
    register()
    processor = create_serde_processor(SerdeConfig("kvzip", {"bound": "lossless"}))
    try:
        layout = MemoryLayoutDesc([torch.Size([2, 2, 32, 16])], [torch.bfloat16])
        assert processor.estimate_serialized_size(layout) > 2 * 2 * 32 * 16 * 2
    finally:
        processor.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bond": 1e-3}, "did you mean 'bound'"),
        ({"bound": "rms:0.1"}, "set head_dim"),
        ({"packed": True}, "needs head_dim"),
        ({"packed": "yes"}, "true or false"),
        ({"head_dim": -1}, "at least 0"),
        ({"max_workers": 0}, "at least 1"),
        ({"mode": "fast"}, "no mode 'fast'"),
        ({"verify": 2}, "part from 0"),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_processor(options)


def test_the_guides_settings_are_taken() -> None:
    guide = Path(__file__).parents[3] / "docs" / "guides" / "lmcache.md"
    options = json.loads(guide.read_text().split("--l2-adapter '")[1].split("'\n")[0])["serde"]
    assert options.pop("type") == "kvzip"
    assert SerdeSettings.read(options).head_dim == 128
    rows = re.findall(r"^\| `(\w+)` \| `?(.*?)`? \|", guide.read_text(), re.MULTILINE)
    defaults = {name: default for name, default in rows if name in {f.name for f in fields(SerdeSettings)}}
    assert set(defaults) == {f.name for f in fields(SerdeSettings)}
    given = {name: json.loads(default) for name, default in defaults.items() if default != "see right"}
    assert SerdeSettings.read(given) == SerdeSettings()


def test_a_short_buffer_says_what_is_wrong() -> None:
    with pytest.raises(CorruptRecordError, match="no record"):
        KvzipDeserializer(SerdeSettings()).deserialize(buffer(10), kv(), KEY)
