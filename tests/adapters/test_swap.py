# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The older seam: swaps under vLLM's function names, on CPU tensors and, where there is one, on a GPU."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the swap functions move torch tensors")

from kvzip.adapters.vllm import swap  # noqa: E402
from kvzip.errors import ConfigError, CorruptRecordError  # noqa: E402

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
)
POOL_BYTES = 8 << 20


@pytest.fixture(autouse=True)
def no_manager_is_left() -> Iterator[None]:
    yield
    swap.shutdown_compressed_swap()


@pytest.fixture
def cache(kv_cache: npt.NDArray[Any]) -> Any:
    """Real values as one layer's cache: 16 blocks of [K and V, 16 tokens, heads, head_dim], bfloat16."""
    blocks = [layer[:, first : first + 16] for layer in kv_cache[:2] for first in range(0, 128, 16)]
    return torch.from_numpy(np.stack(blocks).view(np.int16)).view(torch.bfloat16)


def values(tensor: Any) -> npt.NDArray[np.float64]:
    array: npt.NDArray[np.float64] = tensor.detach().cpu().double().numpy()
    return array


def page_range(blocks: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """max - min of K and of V of each block, shape [blocks, 2, 1, 1, 1]."""
    spread: npt.NDArray[np.float64] = np.ptp(blocks, axis=(2, 3, 4), keepdims=True)
    return spread


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    mode=st.sampled_from(["fixed", "plain", "outlier"]),
    relative=st.booleans(),
    bound=st.sampled_from([1e-4, 1e-3, 1e-2, 0.3]),
    rows=st.lists(st.integers(0, 7), min_size=1, max_size=6, unique=True),
)
def test_every_value_comes_back_within_the_bound(
    seed: int, dtype: Any, mode: str, relative: bool, bound: float, rows: list[int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    cache = (torch.randn((8, 2, 16, 2, 16), generator=generator) * 3).to(dtype)
    host, back = torch.zeros_like(cache), torch.full_like(cache, 7)
    manager = swap.CompressedSwapManager(True, bound, relative, mode, capacity_bytes=POOL_BYTES)
    places = rows[::-1]
    manager.swap_out_blocks_to_host_compressed(cache, host, torch.tensor(rows), torch.tensor(places))
    manager.swap_in_blocks_from_host_compressed(host, back, torch.tensor(places), torch.tensor(rows))
    before, after = values(cache)[rows], values(back)[rows]
    limit = bound * page_range(before) if relative else bound
    assert (np.abs(after - before) <= limit).all()
    others = sorted(set(range(8)) - set(rows))
    assert (values(back)[others] == 7).all()
    assert manager.statistics().swapped_in_blocks == len(rows)
    assert not manager.statistics().fallback_blocks
    manager.close()


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_real_pages_shrink_and_come_back(cache: Any, device: str) -> None:
    manager = swap.initialize_compressed_swap(error_bound=1e-2, encoding_mode="fixed", capacity_bytes=64 << 20)
    assert swap.get_compressed_swap_manager() is manager
    pages, host = cache.to(device), torch.zeros_like(cache)
    manager.swap_out_blocks_to_host_compressed(pages, host, torch.arange(16), torch.arange(16))
    pages.zero_()
    manager.swap_in_blocks_from_host_compressed(host, pages, torch.arange(16), torch.arange(16))
    before = values(cache)
    assert (np.abs(values(pages) - before) <= 1e-2 * page_range(before)).all()
    stats = manager.statistics()
    assert stats.ratio > 2
    assert stats.held_blocks == stats.swapped_out_blocks == stats.swapped_in_blocks == 16
    assert stats.raw_bytes == cache.nbytes
    assert 0 < stats.compressed_bytes <= stats.used_bytes < stats.raw_bytes
    assert not host.any()  # the records are all there is


@pytest.mark.parametrize("shape", [(6, 16, 2, 32), (6, 16, 48), (6, 3, 5, 7, 2), (6, 128)])
def test_other_shapes_are_swapped_too(shape: tuple[int, ...]) -> None:
    cache = torch.randn(shape, dtype=torch.float32)
    host, back = torch.zeros_like(cache), torch.zeros_like(cache)
    manager = swap.CompressedSwapManager(error_bound=1e-3, use_relative_error=False, capacity_bytes=POOL_BYTES)
    manager.swap_out_blocks_to_host_compressed(cache, host, [0, 5], [1, 2])
    manager.swap_in_blocks_from_host_compressed(host, back, [1, 2], [0, 5])
    assert (back[[0, 5]] - cache[[0, 5]]).abs().max() <= 1e-3
    assert manager.statistics().swapped_in_blocks == 2


def test_bytes_that_are_no_floats_come_back_bit_for_bit() -> None:
    cache = torch.randint(0, 255, (4, 2, 16, 2, 32), dtype=torch.uint8)
    host, back = torch.zeros_like(cache), torch.zeros_like(cache)
    manager = swap.CompressedSwapManager(error_bound=0.5, capacity_bytes=POOL_BYTES)
    manager.swap_out_blocks_to_host_compressed(cache, host, [0, 1, 2, 3], [0, 1, 2, 3])
    manager.swap_in_blocks_from_host_compressed(host, back, [0, 1, 2, 3], [0, 1, 2, 3])
    assert torch.equal(back, cache)
    assert manager.statistics().swapped_in_blocks == 4


# ---- the original path


def swap_all(manager: Any, cache: Any, host: Any) -> Any:
    """Everything out and in again, into a new cache."""
    rows = torch.arange(cache.shape[0])
    back = torch.full_like(cache, 7)
    manager.swap_out_blocks_to_host_compressed(cache, host, rows, rows)
    manager.swap_in_blocks_from_host_compressed(host, back, rows, rows)
    return back


def test_a_full_pool_takes_the_original_path_and_loses_nothing(cache: Any) -> None:
    first, second = torch.zeros_like(cache), torch.zeros_like(cache)
    manager = swap.CompressedSwapManager(error_bound=1e-3, capacity_bytes=cache.nbytes)
    swap_all(manager, cache, first)
    back = swap_all(manager, -cache, second)  # does not fit beside the first
    stats = manager.statistics()
    assert stats.fallback_blocks == {"PoolExhaustedError": 16, "not held": 16}
    assert torch.equal(back, -cache)
    assert torch.equal(second, -cache)
    rows = torch.arange(16)
    manager.swap_in_blocks_from_host_compressed(first, back, rows, rows)  # nothing was evicted for it
    before = values(cache)
    assert (np.abs(values(back) - before) <= 1e-3 * page_range(before)).all()


def test_disabled_is_the_original_path_and_can_change_at_run_time(cache: Any) -> None:
    host = torch.zeros_like(cache)
    manager = swap.CompressedSwapManager(False, error_bound=1e-2, capacity_bytes=POOL_BYTES)
    assert torch.equal(swap_all(manager, cache, host), cache)
    assert manager.statistics().fallback_blocks == {"disabled": 16, "not held": 16}
    manager.configure(enable_compression=True)
    assert not torch.equal(swap_all(manager, cache, host), cache)
    assert manager.statistics().swapped_in_blocks == 16
    manager.configure(enable_compression=False)
    assert torch.equal(swap_all(manager, -cache, host), -cache)  # the newest, not the record of the same place
    assert manager.statistics().held_blocks == 0


def test_a_layout_that_cannot_be_described_takes_the_original_path(cache: Any) -> None:
    manager = swap.CompressedSwapManager(capacity_bytes=POOL_BYTES)
    turned = cache.transpose(-1, -2)  # head_dim is not contiguous
    assert torch.equal(swap_all(manager, turned, torch.zeros_like(turned)), turned)
    assert manager.statistics().fallback_blocks == {"LayoutError": 16, "not held": 16}


def test_what_the_original_path_refuses_is_refused(cache: Any) -> None:
    manager = swap.CompressedSwapManager(capacity_bytes=POOL_BYTES)
    with pytest.raises(RuntimeError, match="dtypes match"):
        manager.swap_out_blocks_to_host_compressed(cache, torch.zeros(cache.shape), [1], [2])


def test_rows_that_do_not_exist_are_an_error_of_the_caller(cache: Any) -> None:
    manager = swap.CompressedSwapManager(capacity_bytes=POOL_BYTES)
    with pytest.raises(IndexError):
        manager.swap_out_blocks_to_host_compressed(cache, torch.zeros_like(cache), [99], [0])
    with pytest.raises(IndexError):
        manager.swap_out_blocks_to_host_compressed(cache, torch.zeros_like(cache), [0], [99])


@pytest.mark.parametrize(
    "rows", [[1.5], [True], ["1"], torch.tensor([True, False]), torch.tensor([0.0]), [-99], [None]]
)
def test_rows_that_are_no_numbers_of_rows(cache: Any, rows: Any) -> None:
    """Rounded, or counted from the end twice, they would be other rows."""
    manager = swap.CompressedSwapManager(capacity_bytes=POOL_BYTES)
    host = torch.zeros_like(cache)
    for way in (manager.swap_out_blocks_to_host_compressed, manager.swap_in_blocks_from_host_compressed):
        with pytest.raises(IndexError, match="give integers from"):
            way(cache, host, rows, [0] * len(rows))
        with pytest.raises(IndexError, match="give integers from"):
            way(cache, host, [0] * len(rows), rows)


def test_negative_rows_count_from_the_end(cache: Any) -> None:
    manager = swap.CompressedSwapManager(error_bound=1e-2, capacity_bytes=POOL_BYTES)
    host, back = torch.zeros_like(cache), torch.zeros_like(cache)
    manager.swap_out_blocks_to_host_compressed(cache, host, [-1], [-2])
    manager.swap_in_blocks_from_host_compressed(host, back, [14], [0])
    assert (values(back)[0] != 0).any()
    assert not manager.statistics().fallback_blocks


# ---- damage, settings, memory


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_damaged_record_is_an_error_and_leaves_the_cache(cache: Any, device: str) -> None:
    manager = swap.CompressedSwapManager(error_bound=1e-2, capacity_bytes=64 << 20)
    host = torch.zeros_like(cache)
    manager.swap_out_blocks_to_host_compressed(cache.to(device), host, [3], [3])
    engine = manager._engine
    assert engine is not None
    entry = engine._index.find([swap._key(host, 3)])[0]
    record = bytearray(engine.read_record(swap._key(host, 3)))
    record[-20] ^= 0x55
    engine.pool.write(entry.allocation, np.frombuffer(record, np.uint8))
    back = torch.full_like(cache, 7).to(device)
    with pytest.raises(CorruptRecordError):
        manager.swap_in_blocks_from_host_compressed(host, back, [3], [0])
    assert (back == 7).all()


def test_settings_change_at_run_time_and_old_blocks_come_back(cache: Any) -> None:
    manager = swap.CompressedSwapManager(error_bound=1e-2, encoding_mode="fixed", capacity_bytes=POOL_BYTES)
    host, back = torch.zeros_like(cache), torch.zeros_like(cache)
    manager.swap_out_blocks_to_host_compressed(cache, host, [0], [0])
    manager.configure(error_bound=0.5, use_relative_error=False, encoding_mode="outlier")
    manager.swap_out_blocks_to_host_compressed(cache, host, [1], [1])
    old, new = manager.block_header(host, 0), manager.block_header(host, 1)
    assert old is not None
    assert new is not None
    assert (str(old.bound), old.mode) == ("rel:0.01", "fixed")
    assert (str(new.bound), new.mode) == ("abs:0.5", "outlier")
    assert manager.block_header(host, 2) is None
    manager.swap_in_blocks_from_host_compressed(host, back, [0, 1], [0, 1])
    before, after = values(cache), values(back)
    assert (np.abs(after[0] - before[0]) <= 1e-2 * page_range(before[:1])[0]).all()
    assert (np.abs(after[1] - before[1]) <= 0.5).all()
    with pytest.raises(ConfigError, match="no mode 'zip'"):
        manager.configure(encoding_mode="zip")
    with pytest.raises(ConfigError, match="error bound"):
        manager.configure(error_bound=-1.0)
    assert str(manager.bound) == "abs:0.5"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"error_bound": 0.0}, "error bound"),
        ({"error_bound": 2.0}, "above 1"),
        ({"encoding_mode": "lz4"}, "no mode 'lz4'"),
        ({"host_buffer": "elsewhere"}, "host_buffer"),
        ({"capacity_bytes": 0}, "capacity_bytes"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        swap.initialize_compressed_swap(**settings)
    assert swap.get_compressed_swap_manager() is None


def test_initializing_twice_does_not_lose_blocks(cache: Any) -> None:
    manager = swap.initialize_compressed_swap(capacity_bytes=POOL_BYTES)
    assert swap.initialize_compressed_swap(capacity_bytes=POOL_BYTES) is not manager
    manager = swap.get_compressed_swap_manager()
    assert manager is not None
    manager.swap_out_blocks_to_host_compressed(cache, torch.zeros_like(cache), [0], [0])
    with pytest.raises(ConfigError, match="holds 1 blocks"):
        swap.initialize_compressed_swap()
    assert swap.get_compressed_swap_manager() is manager


def test_release_gives_the_bytes_back(cache: Any) -> None:
    manager = swap.CompressedSwapManager(error_bound=1e-2, capacity_bytes=POOL_BYTES)
    first, second = torch.zeros_like(cache), torch.zeros_like(cache)
    for host in (first, second):
        manager.swap_out_blocks_to_host_compressed(cache, host, [0, 1, 2], [3, 4, 5])
    used = manager.statistics().used_bytes
    assert manager.release(first) == 3
    assert manager.statistics().used_bytes == used // 2
    assert manager.statistics().held_blocks == 3
    assert manager.release(first) == 0


def test_the_decoded_host_buffer_holds_values_within_the_bound(cache: Any) -> None:
    manager = swap.CompressedSwapManager(error_bound=1e-2, capacity_bytes=POOL_BYTES, host_buffer="decoded")
    host = torch.full_like(cache, 7)
    back = swap_all(manager, cache, host)
    before = values(cache)
    assert (np.abs(values(host) - before) <= 1e-2 * page_range(before)).all()
    assert torch.equal(back, host)  # whatever lies there now: somebody else may have written it
    stats = manager.statistics()
    assert (stats.swapped_out_blocks, stats.held_blocks, stats.used_bytes) == (16, 0, 0)


# ---- the hook in vLLM's platforms


@pytest.fixture
def cuda_platform(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's own class for CUDA. A build for the CPU lacks the kernels that its module loads; none is called here."""
    pytest.importorskip("vllm.v1", reason="needs vLLM")
    name = "vllm._C_stable_libtorch"
    if importlib.util.find_spec(name) is None:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    return importlib.import_module("vllm.platforms.cuda").NonNvmlCudaPlatform


def test_the_hook_serves_vllms_own_caller(cache: Any, cuda_platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.kv_transfer.kv_connector import utils

    monkeypatch.setattr(utils, "current_platform", cuda_platform())
    original = cuda_platform.swap_out_blocks_to_host
    manager = swap.initialize_compressed_swap(error_bound=1e-2, capacity_bytes=POOL_BYTES)
    uninstall = swap.install_platform_hook(platform=cuda_platform)
    host, back = {"layer": torch.zeros_like(cache)}, {"layer": torch.zeros_like(cache)}
    utils.copy_kv_blocks({"layer": cache}, host, [0, 2, 4], [1, 3, 5], "d2h")
    utils.copy_kv_blocks(host, back, [1, 3, 5], [0, 2, 4], "h2d")
    before, after = values(cache)[[0, 2, 4]], values(back["layer"])[[0, 2, 4]]
    assert (np.abs(after - before) <= 1e-2 * page_range(before)).all()
    assert manager.statistics().swapped_in_blocks == 3
    uninstall()
    assert cuda_platform.swap_out_blocks_to_host == original
    utils.copy_kv_blocks({"layer": cache}, host, [7], [7], "d2h")
    assert torch.equal(host["layer"][7], cache[7])
    assert manager.statistics().swapped_out_blocks == 3


def test_the_hook_needs_a_manager_and_a_platform_with_swap_functions(cuda_platform: Any) -> None:
    with pytest.raises(ConfigError, match="initialize_compressed_swap"):
        swap.install_platform_hook(platform=cuda_platform)
    swap.initialize_compressed_swap(capacity_bytes=POOL_BYTES)
    from vllm.platforms.cpu import CpuPlatform

    with pytest.raises(ConfigError, match="CpuPlatform has no swap_out_blocks_to_host"):
        swap.install_platform_hook(platform=CpuPlatform)


@pytest.mark.parametrize(
    "transfer",
    [
        {"kv_connector": "NixlConnector", "kv_role": "kv_both"},
        {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "connectors": [
                    {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"},
                    {"kv_connector": "NixlConnector", "kv_role": "kv_both"},
                ]
            },
        },
    ],
)
def test_the_hook_refuses_nixl_unless_the_host_buffer_is_decoded(cuda_platform: Any, transfer: dict[str, Any]) -> None:
    from vllm.config import KVTransferConfig

    config = SimpleNamespace(kv_transfer_config=KVTransferConfig(**transfer))
    before = dict(vars(cuda_platform))
    manager = swap.CompressedSwapManager(capacity_bytes=POOL_BYTES)
    with pytest.raises(ConfigError, match="NIXL is configured"):
        swap.install_platform_hook(manager, platform=cuda_platform, vllm_config=config)
    assert dict(vars(cuda_platform)) == before
    decoded = swap.CompressedSwapManager(capacity_bytes=POOL_BYTES, host_buffer="decoded")
    swap.install_platform_hook(decoded, platform=cuda_platform, vllm_config=config)()
    assert dict(vars(cuda_platform)) == before


def test_the_hook_stands_aside_for_a_nixl_that_came_later(
    cache: Any, cuda_platform: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.distributed.kv_transfer import kv_transfer_state
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlConnector

    manager = swap.CompressedSwapManager(capacity_bytes=POOL_BYTES)
    uninstall = swap.install_platform_hook(manager, platform=cuda_platform)
    monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", NixlConnector.__new__(NixlConnector))
    host = torch.zeros_like(cache)
    cuda_platform.swap_out_blocks_to_host(cache, host, torch.tensor([1]), torch.tensor([1]))
    assert torch.equal(host[1], cache[1])  # plain: a peer may read it
    assert manager.statistics().swapped_out_blocks == 0
    uninstall()
