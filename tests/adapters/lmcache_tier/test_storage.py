# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Chunks through LMCache's own storage manager into files and back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="LMCache needs torch")
pytest.importorskip("lmcache.v1", reason="needs lmcache, which .ci/lmcache.sh installs")

from lmcache.v1.distributed.api import ObjectKey  # noqa: E402

from kvzip import read_header, record  # noqa: E402
from kvzip.adapters.lmcache.layout import PAGE_TOKENS  # noqa: E402

SAMPLE = Path(__file__).parents[3] / "kvzip" / "data" / "smollm2_sample.npy"
CHUNK = 64


@pytest.fixture(scope="module")
def chunks() -> list[Any]:
    """Chunks of a real KV cache, each [2, layers, CHUNK, hidden]."""
    bits = np.load(SAMPLE)
    layers, _, tokens, heads, dim = bits.shape
    kv = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).permute(1, 0, 2, 3, 4)
    kv = kv.reshape(2, layers, tokens, heads * dim)
    return [kv[:, :, at : at + CHUNK].contiguous() for at in range(0, tokens - CHUNK + 1, CHUNK)]


def keys_of(chunks: list[Any]) -> list[ObjectKey]:
    return [ObjectKey(bytes([i]) * 32, "models/some", 0) for i in range(len(chunks))]


def assert_within(before: Any, after: Any, bound: float, exact_tokens: int = PAGE_TOKENS) -> None:
    """Each value within `bound` of the range of its page, the first tokens bit for bit."""
    assert torch.equal(before[:, :, :exact_tokens].view(torch.int16), after[:, :, :exact_tokens].view(torch.int16))
    pages = before.double().unflatten(2, (-1, PAGE_TOKENS)).flatten(3)
    limit = bound * (pages.amax(-1) - pages.amin(-1))
    error = (after.double() - before.double()).abs().unflatten(2, (-1, PAGE_TOKENS)).flatten(3).amax(-1)
    assert (error <= limit).all()
    assert error.max() > 0


def test_files_are_as_much_smaller_as_the_records_and_load_within_the_bound(
    tier: Callable[..., Any], chunks: list[Any]
) -> None:
    one, keys = tier(bound=1e-2), keys_of(chunks)
    one.store(keys, chunks)
    sizes = [one.file(key).stat().st_size for key in keys]
    ratio = sum(chunk.nbytes for chunk in chunks) / sum(sizes)
    assert ratio > 2.5
    for before, after in zip(chunks, one.load(keys, chunks[0].shape, torch.bfloat16), strict=True):
        assert_within(before, after, 1e-2)


@pytest.mark.parametrize("mode", ["fixed", "rice"])
def test_lossless_files_are_smaller_and_load_bit_for_bit(
    tier: Callable[..., Any], chunks: list[Any], mode: str
) -> None:
    one, keys = tier(bound="lossless", mode=mode), keys_of(chunks)
    one.store(keys, chunks)
    assert sum(one.file(key).stat().st_size for key in keys) < sum(chunk.nbytes for chunk in chunks) / 1.3
    for before, after in zip(chunks, one.load(keys, chunks[0].shape, torch.bfloat16), strict=True):
        assert torch.equal(before.view(torch.int16), after.view(torch.int16))


def test_another_process_with_other_settings_reads_the_files(tier: Callable[..., Any], chunks: list[Any]) -> None:
    first, keys = tier(bound=1e-3, head_dim=64, mode="rice"), keys_of(chunks)
    first.store(keys, chunks)
    stored = first.load(keys, chunks[0].shape, torch.bfloat16)
    second = tier(bound="lossless", packed=False)
    for before, after in zip(stored, second.load(keys, chunks[0].shape, torch.bfloat16), strict=True):
        assert torch.equal(before.view(torch.int16), after.view(torch.int16))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def swap(file: Path) -> None:
    """Another object's record under this one's name: what no checksum of the record can see."""
    other = next(f for f in sorted(file.parent.glob("*.data")) if f != file)
    file.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [flip, cut, empty, zero, swap])
def test_a_damaged_file_is_a_miss_of_its_chunk_alone_and_is_replaced(
    tier: Callable[..., Any], chunks: list[Any], damage: Callable[[Path], None]
) -> None:
    one, keys = tier(bound="lossless"), keys_of(chunks)
    one.store(keys, chunks)
    file = one.file(keys[1])
    damage(file)
    loaded = one.load(keys, chunks[0].shape, torch.bfloat16)
    assert [after is None for after in loaded] == [i == 1 for i in range(len(keys))]
    assert all(torch.equal(before, after) for before, after in zip(chunks, loaded, strict=True) if after is not None)
    assert not file.exists()
    assert one.manager.report_status()["l2_adapters"][0]["refused_object_count"] == 1
    one.store([keys[1]], [chunks[1]])  # LMCache computes it again and stores it
    assert torch.equal(one.load([keys[1]], chunks[0].shape, torch.bfloat16)[0], chunks[1])


def test_a_missing_file_is_a_miss(tier: Callable[..., Any], chunks: list[Any]) -> None:
    one, keys = tier(), keys_of(chunks)
    one.store(keys, chunks)
    one.file(keys[0]).unlink()
    loaded = one.load(keys, chunks[0].shape, torch.bfloat16)
    assert [after is None for after in loaded] == [i == 0 for i in range(len(keys))]


def test_a_file_of_another_serde_is_a_miss_and_stays(
    tier: Callable[..., Any], chunks: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    one, keys = tier(), keys_of(chunks)
    one.store(keys, chunks)
    file = one.file(keys[0])
    file.write_bytes(b"\x3f" * chunks[0].nbytes)
    with caplog.at_level(logging.WARNING, "kvzip"):
        assert one.load(keys[:1], chunks[0].shape, torch.bfloat16) == [None]
    assert "no kvzip record" in caplog.text
    assert file.exists()


def test_a_record_of_another_shape_is_a_miss(tier: Callable[..., Any], chunks: list[Any]) -> None:
    one, keys = tier(), keys_of(chunks)
    one.store(keys, chunks)
    halves = torch.Size([2, chunks[0].shape[1], CHUNK, chunks[0].shape[3] // 2])
    assert one.load(keys[:1], halves, torch.bfloat16) == [None]


def test_files_begin_with_a_record(tier: Callable[..., Any], chunks: list[Any]) -> None:
    one, keys = tier(bound=1e-3), keys_of(chunks)
    one.store(keys, chunks)
    header = read_header(one.file(keys[0]).read_bytes())
    assert header.raw_bytes == chunks[0].nbytes
    assert header.num_segments == 2 * chunks[0].shape[1] * CHUNK // PAGE_TOKENS


def test_a_misspelt_setting_stops_the_start(tier: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="did you mean 'bound'"):
        tier(bond=1e-3)


def test_direct_io_is_refused(tmp_path: Path) -> None:
    from kvzip.adapters.lmcache.files import FilesL2AdapterConfig

    with pytest.raises(ValueError, match="use_odirect"):
        FilesL2AdapterConfig.from_dict({"base_path": str(tmp_path), "use_odirect": True})


def test_a_payload_is_verified_once(
    tier: Callable[..., Any], chunks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, keys = tier(bound="lossless"), keys_of(chunks)
    one.store(keys, chunks)
    sizes: list[int] = []
    real = record.crc32c

    def counted(data: Any, value: int = 0) -> int:
        sizes.append(len(data))
        return real(data, value)

    monkeypatch.setattr(record, "crc32c", counted)
    loaded = one.load(keys, chunks[0].shape, torch.bfloat16)
    assert all(torch.equal(before, after) for before, after in zip(chunks, loaded, strict=True))
    headers = [read_header(one.file(key).read_bytes()) for key in keys]
    payloads = [header.record_bytes - header.header_bytes for header in headers]
    assert [sizes.count(size) for size in payloads] == [payloads.count(size) for size in payloads]


def test_what_nobody_foresaw_is_a_miss_and_stops_nothing(
    tier: Callable[..., Any], chunks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """LMCache waits for ever for a tier that raises."""
    one, keys = tier(bound="lossless"), keys_of(chunks)
    one.store(keys, chunks)
    with monkeypatch.context() as broken:
        broken.setattr(record, "crc32c", lambda data, value=0: 1 / 0)
        assert one.load(keys, chunks[0].shape, torch.bfloat16) == [None] * len(keys)
    assert all(one.file(key).exists() for key in keys)
    loaded = one.load(keys, chunks[0].shape, torch.bfloat16)
    assert all(torch.equal(before, after) for before, after in zip(chunks, loaded, strict=True))
