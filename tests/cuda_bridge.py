# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The same batch of pages in host and in device memory, for the CPU codec and the CUDA codec."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any

import numpy as np
import numpy.typing as npt

from kvzip import _native
from kvzip.record import ENTRY_DTYPE, crc32c

BF16, FP16, FP32, OPAQUE = range(4)
RAW, CONSTANT, FIXED, PLAIN, OUTLIER, LOSSLESS, RICE, LOSSLESS_RICE = range(8)
BOUND_LOSSLESS, BOUND_ABSOLUTE, BOUND_RELATIVE, BOUND_TOKEN_RMS, BOUND_CHANNEL_TABLE = range(5)
ITEM = (2, 2, 4, 1)
ALIGNMENT = 256

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Spec:
    """One page of every block: geometry, layout in memory, and how it is coded."""

    dtype: int
    tokens: int
    heads: int
    head_dim: int
    group_tokens: int = 16
    coding: int = FIXED
    bound_kind: int = BOUND_RELATIVE
    bound: float = 1e-3
    heads_first: bool = False
    pad: int = 0  # values between rows, and between blocks
    kind: int = 0
    exact_channels: int = 37  # with a table, one channel of so many; 0: none

    def strides(self) -> tuple[int, int, int]:
        """(block, token, head) strides in bytes."""
        item, pad = ITEM[self.dtype], self.pad * ITEM[self.dtype]
        row = self.head_dim * item + pad
        if self.heads_first:
            token, head = row, row * self.tokens + pad
            return head * self.heads + pad, token, head
        token, head = row * self.heads + pad, row
        return token * self.tokens + pad, token, head

    @property
    def raw_bytes(self) -> int:
        return self.tokens * self.heads * self.head_dim * ITEM[self.dtype]

    def table(self) -> Array | None:
        """Bounds of the channels, from 1/16 of `bound` to all of it; some channels are exact."""
        if self.bound_kind != BOUND_CHANNEL_TABLE:
            return None
        channels = np.arange(self.heads * self.head_dim)
        exact = channels % self.exact_channels == 5 if self.exact_channels else channels < 0
        return np.where(exact, 0, self.bound * 2.0 ** -(channels % 5)).astype(np.float32)

    @property
    def extended(self) -> int:
        """What a decoder must know: 1 for the Rice codings, 2 for bounds within pages."""
        within = self.bound_kind in (BOUND_TOKEN_RMS, BOUND_CHANNEL_TABLE)
        return int(self.coding >= RICE) | (2 if within else 0)


def load() -> tuple[Any, Any]:
    """torch and the CUDA functions of the library.

    Raises:
        BackendUnavailableError: there is no GPU or no CUDA build.
    """
    import torch

    from kvzip import _cuda

    return torch, _cuda.driver()


def random_pages(torch: Any, spec: Spec, slots: int, seed: int) -> Any:
    """Bytes of `slots` blocks of a page on the device, uint8 ``[slots * block stride]``: what can break a codec, mixed.

    Neighbouring blocks have different flavours, which repeat every 12 blocks.
    """
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, device="cuda")

    def uniform(*shape: int) -> Any:
        return torch.rand(shape, generator=generator, device="cuda")

    block, token, head = spec.strides()
    item = ITEM[spec.dtype]
    memory = torch.randint(0, 256, (slots * block,), generator=generator, device="cuda", dtype=torch.uint8)
    shape = (slots, spec.tokens, spec.heads, spec.head_dim)
    bits_type = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[item]
    typed = memory.view(bits_type)
    pages = typed.as_strided(shape, (block // item, token // item, head // item, 1))
    flavour = torch.arange(slots, device="cuda") % 12
    if spec.dtype == OPAQUE:
        values = torch.randint(0, 256, shape, generator=generator, device="cuda", dtype=torch.uint8)
        same = values[:, :1, :1, :1].expand(shape)
        pages.copy_(torch.where((flavour == 4)[:, None, None, None], same, values))
        return memory
    channel = normal(slots, 1, spec.heads, spec.head_dim)
    x = normal(*shape)
    wide = 12.0 if spec.dtype == FP16 else 100.0
    kinds = [
        x,
        channel * 4 + 0.1 * x,
        x * torch.exp2(uniform(*shape) * 20 - 10),
        torch.where(uniform(*shape) < 0.02, x * 1000, x * 0.01),
        channel[:, :, :1, :1].expand(shape),
        x,  # zeros of both signs, below
        x,  # any bits, below
        x,  # some that are not finite, below
        channel + 0.01 * torch.arange(spec.tokens, device="cuda")[None, :, None, None],
        x * torch.exp2(uniform(slots, 1, 1, 1) * 2 * wide - wide),
        torch.where(torch.arange(spec.tokens, device="cuda")[None, :, None, None] % 16 == 0, 30 * x, 0.05 * x),
        channel * torch.where(uniform(*channel.shape) < 0.05, 20.0, 1.0) * (1 + 0.05 * x),
    ]
    values = torch.empty(shape, device="cuda")
    for i, kind in enumerate(kinds):
        values[flavour == i] = kind[flavour == i]
    float_type = (torch.bfloat16, torch.float16, torch.float32)[spec.dtype]
    bits = values.to(float_type).view(bits_type)
    low, high = (-(2**15), 2**15) if item == 2 else (-(2**31), 2**31)
    noise = torch.randint(low, high, shape, generator=generator, device="cuda", dtype=torch.int64).to(bits_type)
    signs = torch.where(noise > 0, 0, low).to(bits_type)
    exponent = {BF16: 0x7F80, FP16: 0x7C00, FP32: 0x7F800000}[spec.dtype]
    nonfinite = torch.where(uniform(*shape) < 0.01, noise | exponent, bits).to(bits_type)
    for i, special in ((5, signs), (6, noise), (7, nonfinite)):
        bits[flavour == i] = special[flavour == i]
    pages.copy_(bits)
    return memory


class Batch:
    """Blocks of pages in device memory (and, on demand, in host memory).

    Args:
        torch: the module.
        driver: `kvzip._cuda.CudaDriver`.
        specs: the pages of a block.
        memories: uint8 device tensor of each page, blocks at its block stride.
        block_ids: the blocks that are meant.
    """

    def __init__(self, torch: Any, driver: Any, specs: Sequence[Spec], memories: Sequence[Any], block_ids: Array):
        self.torch, self.driver, self.specs = torch, driver, list(specs)
        self.memories = list(memories)
        self.block_ids = np.ascontiguousarray(block_ids, np.int64)
        self.segments = np.zeros(len(specs), _native.SEGMENT_DTYPE)
        for row, spec in zip(self.segments, specs, strict=True):
            row["block_stride"], row["token_stride"], row["head_stride"] = spec.strides()
            row["tokens"], row["heads"], row["head_dim"] = spec.tokens, spec.heads, spec.head_dim
            row["dtype"], row["group_tokens"], row["kind"] = spec.dtype, spec.group_tokens, spec.kind
            row["coding"], row["bound_kind"], row["bound"] = spec.coding, spec.bound_kind, spec.bound
        self.segments["base"] = [m.data_ptr() for m in self.memories]
        self.tables = [s.table() for s in specs]
        self.device_tables = [None if t is None else self.upload(t) for t in self.tables]
        self.segments["channel_bounds"] = [0 if t is None else t.data_ptr() for t in self.device_tables]
        self.device_segments = self.upload(self.segments)
        self.device_ids = self.upload(self.block_ids)
        self.worst = sum(-(-s.raw_bytes // 16) * 16 for s in self.specs)
        nbytes = driver.workspace_bytes(len(specs), len(block_ids))
        self.workspace = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")

    @classmethod
    def random(cls, torch: Any, driver: Any, specs: Sequence[Spec], blocks: int, seed: int) -> Batch:
        slots = blocks + 1
        memories = [random_pages(torch, spec, slots, seed * 1000 + i) for i, spec in enumerate(specs)]
        ids = np.random.default_rng(seed).permutation(slots)[:blocks]
        return cls(torch, driver, specs, memories, ids)

    def give_tables(self) -> None:
        """A channel table for every page, also for those that were not encoded with one: forged records name them."""
        self.tables = [replace(s, bound_kind=BOUND_CHANNEL_TABLE).table() for s in self.specs]
        self.device_tables = [self.upload(t) for t in self.tables]
        self.segments["channel_bounds"] = [t.data_ptr() for t in self.device_tables]
        self.device_segments = self.upload(self.segments)

    def upload(self, array: Array) -> Any:
        """A uint8 device tensor with the array's bytes."""
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return self.torch.from_numpy(flat.copy()).cuda()

    @property
    def pages(self) -> int:
        return len(self.specs) * len(self.block_ids)

    @property
    def raw_bytes(self) -> int:
        return sum(s.raw_bytes for s in self.specs) * len(self.block_ids)

    def host_segments(self, memories: Sequence[npt.NDArray[np.uint8]]) -> Array:
        segments = self.segments.copy()
        segments["base"] = [m.ctypes.data for m in memories]
        segments["channel_bounds"] = [0 if t is None else t.ctypes.data for t in self.tables]
        return segments

    def host_memories(self) -> list[npt.NDArray[np.uint8]]:
        return [m.cpu().numpy() for m in self.memories]

    def like(self, seed: int = 7) -> Batch:
        """The same pages in other memory, full of other bytes."""
        torch = self.torch
        generator = torch.Generator(device="cuda").manual_seed(seed)
        memories = [
            torch.randint(0, 256, m.shape, generator=generator, device="cuda", dtype=torch.uint8) for m in self.memories
        ]
        return Batch(torch, self.driver, self.specs, memories, self.block_ids)


@dataclass
class Encoded:
    """What an encoder wrote; `payloads` is a uint8 device tensor, payload b at ``starts[b]``."""

    payloads: Any
    starts: npt.NDArray[np.uint64]
    payload_bytes: npt.NDArray[np.uint64]
    table: Array  # [blocks, pages]


def encode_cpu(batch: Batch, memories: Sequence[npt.NDArray[np.uint8]] | None = None) -> Encoded:
    """The CPU codec's bytes, uploaded; payload b begins at a multiple of 256."""
    blocks = len(batch.block_ids)
    stride = -(-batch.worst // ALIGNMENT) * ALIGNMENT
    memories = batch.host_memories() if memories is None else memories  # alive while the segments point there
    host = batch.host_segments(memories)
    out = np.zeros(blocks * stride, np.uint8)
    table = np.zeros((blocks, len(host)), ENTRY_DTYPE)
    payload_bytes = np.zeros(blocks, np.uint64)
    status = _native.library().kvz_cpu_encode(
        host.ctypes.data, len(host), batch.block_ids.ctypes.data, blocks, out.ctypes.data, stride, table.ctypes.data,
        payload_bytes.ctypes.data, 0,
    )  # fmt: skip
    _native.check(status, "encoding")
    starts = np.arange(blocks, dtype=np.uint64) * np.uint64(stride)
    return Encoded(batch.torch.from_numpy(out).cuda(), starts, payload_bytes, table)


class GpuEncode:
    """Buffers of an encode launch; `launch` may be called again and again, and captured."""

    def __init__(
        self,
        batch: Batch,
        *,
        header: int = 0,
        packed: bool = False,
        max_ctas: int = 0,
        strips_per_warp: int = 0,
        arena_bytes: int | None = None,
        guard: int = 0,
        checksums: bool = False,
    ):
        from kvzip.driver import EncodeArgs

        torch, blocks = batch.torch, len(batch.block_ids)
        self.batch, self.header = batch, -(-header // 16) * 16
        stride = -(-(batch.worst + self.header) // ALIGNMENT) * ALIGNMENT
        self.arena_bytes = blocks * stride if arena_bytes is None else arena_bytes
        self.arena = torch.full((self.arena_bytes + guard,), 0xEE, dtype=torch.uint8, device="cuda")
        self.table = torch.zeros(batch.pages * 16, dtype=torch.uint8, device="cuda")
        self.payload_bytes = torch.zeros(blocks, dtype=torch.int64, device="cuda")
        self.offsets = torch.zeros(blocks, dtype=torch.int64, device="cuda")
        self.status = torch.full((2,), 99, dtype=torch.int32, device="cuda")
        self.crc32c = torch.zeros(blocks if checksums else 0, dtype=torch.int32, device="cuda")
        self.options = {"record_stride": 0 if packed else stride, "strips_per_warp": strips_per_warp}
        self.args = EncodeArgs(
            segments=batch.segments,
            device_segments=batch.device_segments.data_ptr(),
            block_ids=batch.device_ids.data_ptr(),
            num_blocks=blocks,
            arena=self.arena.data_ptr(),
            arena_bytes=self.arena_bytes,
            header_bytes=header,
            table=self.table.data_ptr(),
            payload_bytes=self.payload_bytes.data_ptr(),
            record_offsets=self.offsets.data_ptr(),
            status=self.status.data_ptr(),
            workspace=batch.workspace.data_ptr(),
            workspace_bytes=batch.workspace.numel(),
            max_ctas=max_ctas,
            crc32c=self.crc32c.data_ptr() if checksums else 0,
        )

    def launch(self, stream: int | None = None) -> None:
        if stream is None:
            stream = self.batch.torch.cuda.current_stream().cuda_stream
        self.batch.driver.encode(self.args, stream, **self.options)

    def result(self) -> Encoded:
        """Blocks the host."""
        self.batch.torch.cuda.synchronize()
        table = self.table.cpu().numpy().view(ENTRY_DTYPE).reshape(len(self.batch.block_ids), -1)
        starts = self.offsets.cpu().numpy().astype(np.uint64) + np.uint64(self.header)
        return Encoded(self.arena, starts, self.payload_bytes.cpu().numpy().astype(np.uint64), table)


class GpuDecode:
    """Buffers of a decode launch into `batch`."""

    def __init__(
        self,
        batch: Batch,
        encoded: Encoded,
        *,
        all_or_nothing: bool = False,
        max_ctas: int = 0,
        strips_per_warp: int = 0,
        crc32c: Array | None = None,
        extended: int | None = None,
    ):
        from kvzip.driver import DecodeArgs

        torch = batch.torch
        self.batch = batch
        self.keep = encoded.payloads
        self.addresses = batch.upload(encoded.starts + np.uint64(encoded.payloads.data_ptr()))
        self.payload_bytes = batch.upload(encoded.payload_bytes)
        self.table = batch.upload(encoded.table)
        self.status = torch.full((len(batch.block_ids),), 99, dtype=torch.int32, device="cuda")
        self.crc32c = None if crc32c is None else batch.upload(crc32c.astype(np.uint32))
        self.options = {"all_or_nothing": all_or_nothing, "strips_per_warp": strips_per_warp}
        self.args = DecodeArgs(
            segments=batch.segments,
            device_segments=batch.device_segments.data_ptr(),
            block_ids=batch.device_ids.data_ptr(),
            num_blocks=len(batch.block_ids),
            payloads=self.addresses.data_ptr(),
            payload_bytes=self.payload_bytes.data_ptr(),
            table=self.table.data_ptr(),
            block_status=self.status.data_ptr(),
            workspace=batch.workspace.data_ptr(),
            workspace_bytes=batch.workspace.numel(),
            max_ctas=max_ctas,
            crc32c=0 if self.crc32c is None else self.crc32c.data_ptr(),
            extended=reduce(or_, (spec.extended for spec in batch.specs)) if extended is None else extended,
        )

    def launch(self, stream: int | None = None) -> None:
        if stream is None:
            stream = self.batch.torch.cuda.current_stream().cuda_stream
        self.batch.driver.decode(self.args, stream, **self.options)

    def statuses(self) -> Array:
        """Blocks the host."""
        self.batch.torch.cuda.synchronize()
        return self.status.cpu().numpy()


def differences(batch: Batch, cpu: Encoded, gpu: Encoded) -> str:
    """Where the GPU's table or payloads are not those of the CPU; "" when they are equal."""
    torch = batch.torch
    if not np.array_equal(cpu.table, gpu.table):
        b, s = np.argwhere(cpu.table != gpu.table)[0]
        return f"entry of block {b} page {s} ({batch.specs[s]}): CPU {cpu.table[b, s]}, GPU {gpu.table[b, s]}"
    if not np.array_equal(cpu.payload_bytes, gpu.payload_bytes):
        return "payload sizes"
    most = int(cpu.payload_bytes.max()) // 16
    step = max(1, (64 << 20) // (most * 16))
    rows = torch.arange(most, device="cuda")[None, :]
    for first in range(0, len(cpu.starts), step):
        last = min(first + step, len(cpu.starts))
        units = torch.from_numpy(cpu.payload_bytes[first:last].astype(np.int64) // 16).cuda()[:, None]
        inside = rows < units

        def gather(e: Encoded, first: int, last: int, inside: Any) -> Any:
            start = torch.from_numpy(e.starts[first:last].astype(np.int64) // 16).cuda()[:, None]
            index = torch.where(inside, start + rows, 0)
            return e.payloads[: e.payloads.numel() // 16 * 16].view(torch.int64).view(-1, 2)[index]

        wrong = (gather(cpu, first, last, inside) != gather(gpu, first, last, inside)).any(dim=2) & inside
        if bool(wrong.any()):
            b, unit = (int(i) for i in wrong.nonzero()[0])
            b += first
            s = int(np.searchsorted(cpu.table[b]["offset"], unit, side="right")) - 1
            return f"payload of block {b}, 16 bytes {unit}, page {s} ({batch.specs[s]}, {cpu.table[b, s]})"
    return ""


def checksums(encoded: Encoded) -> Array:
    """CRC32C of every payload, computed on the host."""
    payloads = encoded.payloads.cpu().numpy()
    ends = encoded.starts + encoded.payload_bytes
    return np.array([crc32c(payloads[i:j]) for i, j in zip(encoded.starts, ends, strict=True)], np.uint32)


def decode_cpu(
    batch: Batch, encoded: Encoded, blocks: Sequence[int], memories: Sequence[npt.NDArray[np.uint8]]
) -> None:
    """Decode payloads of the given positions in the batch into host copies of its memory."""
    if not len(blocks):
        return
    host = batch.host_segments(memories)
    payloads = encoded.payloads.cpu().numpy()
    chosen = np.array(blocks, np.intp)
    addresses = encoded.starts[chosen] + np.uint64(payloads.ctypes.data)
    sizes = np.ascontiguousarray(encoded.payload_bytes[chosen])
    table = np.ascontiguousarray(encoded.table[chosen])
    ids = np.ascontiguousarray(batch.block_ids[chosen])
    bad_block, bad_segment = ctypes.c_uint32(), ctypes.c_uint32()
    status = _native.library().kvz_cpu_decode(
        host.ctypes.data, len(host), ids.ctypes.data, len(ids), addresses.ctypes.data, sizes.ctypes.data,
        table.ctypes.data, 0, ctypes.byref(bad_block), ctypes.byref(bad_segment),
    )  # fmt: skip
    _native.check(status, "decoding")


def verdicts_cpu(batch: Batch, encoded: Encoded) -> Array:
    """kvz_cpu_validate's status of every block."""
    host = batch.host_segments(batch.host_memories())
    payloads = encoded.payloads.cpu().numpy()
    found = np.zeros(len(encoded.starts), np.int32)
    bad_block, bad_segment = ctypes.c_uint32(), ctypes.c_uint32()
    for b in range(len(found)):
        address = np.array([encoded.starts[b] + np.uint64(payloads.ctypes.data)], np.uint64)
        size, table = encoded.payload_bytes[b : b + 1].copy(), np.ascontiguousarray(encoded.table[b])
        found[b] = _native.library().kvz_cpu_validate(
            host.ctypes.data, len(host), 1, address.ctypes.data, size.ctypes.data, table.ctypes.data, 1,
            ctypes.byref(bad_block), ctypes.byref(bad_segment),
        )  # fmt: skip
    return found


def check_both_ways(batch: Batch, **options: Any) -> Encoded:
    """Encode on both devices and compare; decode on both and compare all memory. Returns the GPU's records."""
    encode_options = {k: v for k, v in options.items() if k != "all_or_nothing"}
    decode_options = {k: v for k, v in options.items() if k in ("max_ctas", "strips_per_warp", "all_or_nothing")}
    memories = batch.host_memories()
    cpu = encode_cpu(batch, memories)
    job = GpuEncode(batch, checksums=True, **encode_options)
    job.launch()
    gpu = job.result()
    assert job.status.tolist() == [0, 1]
    crcs = job.crc32c.cpu().numpy().view(np.uint32)
    assert np.array_equal(crcs, checksums(gpu)), "checksums differ"
    found = differences(batch, cpu, gpu)
    assert not found, found
    for after, before in zip(batch.host_memories(), memories, strict=True):
        assert np.array_equal(after, before), "encoding wrote to the pages"
    out = batch.like()
    expected = out.host_memories()
    back = GpuDecode(out, gpu, crc32c=crcs, **decode_options)
    back.launch()
    assert not back.statuses().any()
    decode_cpu(out, cpu, range(len(batch.block_ids)), expected)
    for spec, a, b in zip(batch.specs, out.host_memories(), expected, strict=True):
        assert np.array_equal(a, b), f"decoded bytes differ at {np.flatnonzero(a != b)[:4]}: {spec}"
    assert not bool(batch.workspace.any()), "the workspace is not zero after the calls"
    assert not bool(out.workspace.any()), "the workspace is not zero after the calls"
    return gpu
