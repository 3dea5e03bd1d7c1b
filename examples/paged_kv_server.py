# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""A serving loop in miniature: a paged KV cache, conversations that outgrow it, and `kvzip.SwapEngine` between them.

    python examples/paged_kv_server.py

runs on a GPU where there is one, else on the CPU. What stands in for a model writes values of a real KV cache into the
pages, so that all that comes back can be compared with what it was. ``docs/guides/integrate.md`` goes through it.
"""

from __future__ import annotations

import argparse
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.resources import files

import numpy as np
import torch

from kvzip import BlockView, BoundPolicy, HostPool, KvzipError, SwapEngine, Transfer
from kvzip.memory import PageableMemory, PinnedMemory

BLOCK = 16  # tokens of a block
BOUNDS = BoundPolicy.uncalibrated()  # the default; after a calibration, those of the model's table


@dataclass(eq=False)
class Conversation:
    """What a scheduler knows of a sequence."""

    number: int
    tokens: int = 0
    table: list[int] = field(default_factory=list)  # block table: where its blocks lie in the cache
    kept: int = 0  # full blocks that were stored: they never change again
    transfer: Transfer | None = None  # its last swap, until somebody waits for it


class Server:
    """A paged KV cache with its block allocator, and the swap to host memory."""

    def __init__(self, device: torch.device, num_blocks: int, pool_bytes: int) -> None:
        sample = np.load(str(files("kvzip") / "data" / "smollm2_sample.npy"))  # bits of bfloat16
        self.sample = torch.from_numpy(sample.view(np.int16)).view(torch.bfloat16).to(device)
        layers, _, _, heads, dim = self.sample.shape  # [layers, K and V, tokens, heads, head_dim]
        self.cache = [
            torch.zeros(num_blocks, 2, BLOCK, heads, dim, dtype=torch.bfloat16, device=device) for _ in range(layers)
        ]
        self.free = list(range(num_blocks))
        self.resident: list[Conversation] = []  # those that have pages, least recently used first
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # the model's; None on the CPU
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(device))  # on which the tensors were filled
        # All that kvzip needs to know of the cache: its tensors, and the order of the axes behind the block axis.
        self.blocks = BlockView(self.cache, "2NHD")
        self.pool = HostPool(pool_bytes, resource=PinnedMemory() if self.stream else PageableMemory())
        self.engine = SwapEngine(self.pool, bound=BOUNDS)
        self.counts = {"blocks_out": 0, "blocks_in": 0, "computed_again": 0}

    def named(self, conversation: Conversation, blocks: range) -> tuple[list[bytes], BlockView]:
        """Keys of a conversation's blocks, and the blocks. To share prefixes, a key would be a hash of all tokens."""
        keys = [f"{conversation.number}/{i}".encode() for i in blocks]
        return keys, self.blocks[[conversation.table[i] for i in blocks]]

    def swap_out(self, conversation: Conversation) -> None:
        """Store what is new in a conversation's pages, and free them. On a GPU it does not wait for the copy."""
        self.settle(conversation)
        full = conversation.tokens // BLOCK
        new = range(conversation.kept, len(conversation.table))
        # Exact: the block of position 0, which attention leans on, and the one that still grows, because it is stored
        # again later and errors must not add up.
        exact = [i == 0 or i >= full for i in new]
        try:
            conversation.transfer = self.engine.store(*self.named(conversation, new), sink=exact, stream=self.stream)
            conversation.transfer.wait_stream(self.stream)  # what the model writes next comes after the pages were read
            conversation.kept = full
        except KvzipError as error:  # the pool has no room: the next load will find no records
            print(f"conversation {conversation.number} is not kept: {error}")
        self.counts["blocks_out"] += len(new)
        self.free += conversation.table
        conversation.table = []
        self.resident.remove(conversation)

    def swap_in(self, conversation: Conversation, keep: list[Conversation]) -> None:
        """Give a conversation its pages again and begin to load them. On a GPU it does not wait for the copy."""
        if conversation in self.resident:
            return
        count = -(-conversation.tokens // BLOCK)
        conversation.table = self.allocate(count, keep)
        self.resident.append(conversation)
        try:
            if conversation.transfer is not None:
                conversation.transfer.result()  # records are there when their store is done: usually long ago
            conversation.transfer = self.engine.load(*self.named(conversation, range(count)), stream=self.stream)
            self.counts["blocks_in"] += count
        except KvzipError as error:  # a record had to leave the pool, or never came there
            self.compute_again(conversation, error)

    def settle(self, conversation: Conversation) -> None:
        """Wait for a conversation's load: only then its pages can be trusted. A scheduler would ask `done` instead."""
        try:
            if conversation.transfer is not None:
                conversation.transfer.wait_stream(self.stream)  # the model's next kernels see what was loaded
                conversation.transfer.result()  # raises if a record was damaged
        except KvzipError as error:
            self.compute_again(conversation, error)
        conversation.transfer = None

    def compute_again(self, conversation: Conversation, error: KvzipError) -> None:
        """Prefill a conversation whose records are not there: losing them costs time, never an answer."""
        print(f"conversation {conversation.number} is computed again: {error}")
        self.counts["computed_again"] += 1
        conversation.transfer, conversation.kept = None, 0
        self.compute(conversation, 0, conversation.tokens)

    def allocate(self, count: int, keep: list[Conversation]) -> list[int]:
        """Take blocks. Where too few are free, conversations leave that need not be kept."""
        for conversation in [c for c in self.resident if c not in keep]:
            if len(self.free) < count:
                self.swap_out(conversation)
        if len(self.free) < count:
            raise RuntimeError(
                f"a conversation needs {count} more blocks, {len(self.free)} are free: use more --blocks"
            )
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def values(self, conversation: Conversation, first: int, last: int) -> torch.Tensor:
        """K and V of tokens, [layers, K and V, tokens, heads, head_dim]: here they come from the sample."""
        tokens = torch.arange(first, last, device=self.sample.device) * 7 + conversation.number * 29
        return self.sample[:, :, tokens % self.sample.shape[2]]

    def compute(self, conversation: Conversation, first: int, last: int) -> None:
        """The model's work: K and V of tokens are written into the pages. Attention would read them here."""
        for at in range(first - first % BLOCK, last, BLOCK):
            begin, end = max(first, at), min(last, at + BLOCK)
            for pages, kv in zip(self.cache, self.values(conversation, begin, end), strict=True):
                pages[conversation.table[at // BLOCK], :, begin - at : end - at] = kv

    def decode(self, conversation: Conversation, tokens: int) -> None:
        """A turn: one token after the other, and another block where the last one is full."""
        for _ in range(tokens):
            if conversation.tokens % BLOCK == 0:
                conversation.table += self.allocate(1, keep=[conversation])
            self.compute(conversation, conversation.tokens, conversation.tokens + 1)
            conversation.tokens += 1

    def check(self, conversation: Conversation) -> float:
        """Compare every value in a conversation's pages with what it was; the largest error over its bound."""
        worst = 0.0
        for at in range(0, conversation.tokens, BLOCK):
            before = self.values(conversation, at, min(at + BLOCK, conversation.tokens)).double()
            block = conversation.table[at // BLOCK]
            after = torch.stack([pages[block, :, : before.shape[2]] for pages in self.cache]).double()
            error, (keys, values) = (after - before).abs(), before.unbind(1)
            page_range = keys.amax((1, 2, 3), keepdim=True) - keys.amin((1, 2, 3), keepdim=True)
            token_rms = values.square().mean(-1, keepdim=True).sqrt()
            for kv, limit in enumerate((BOUNDS.key.value * page_range, BOUNDS.value.value * token_rms)):
                right = error[:, kv] <= limit
                assert bool(right.all()), f"block {at // BLOCK} of conversation {conversation.number} is wrong"
                worst = max(worst, float((error[:, kv] / limit).nan_to_num().max()))
        return worst


def serve(server: Server, conversations: list[Conversation], turns: int, tokens: int) -> float:
    """The loop: conversations take turns, and while one decodes, the pages of the next one arrive."""
    worst = 0.0
    queue = deque(conversations * turns)
    while queue:
        conversation = queue.popleft()
        server.swap_in(conversation, keep=[])
        server.settle(conversation)
        server.resident.remove(conversation)
        server.resident.append(conversation)  # the most recently used
        if queue:
            server.swap_in(queue[0], keep=[conversation])
        server.decode(conversation, tokens)
        worst = max(worst, server.check(conversation))
    return worst


def main(arguments: list[str] | None = None) -> None:
    """Run the loop, and say what came of it."""
    parser = argparse.ArgumentParser(description="conversations that outgrow a paged KV cache")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, default=40, help="of the cache")
    parser.add_argument("--pool-kib", type=int, default=4096, help="of host memory for records")
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5, help="of each conversation")
    parser.add_argument("--tokens", type=int, default=40, help="of each turn")
    options = parser.parse_args(arguments)

    server = Server(torch.device(options.device), options.blocks, options.pool_kib << 10)
    conversations = [Conversation(number) for number in range(options.conversations)]
    with torch.cuda.stream(server.stream) if server.stream else nullcontext():
        worst = serve(server, conversations, options.turns, options.tokens)
    need = sum(-(-c.tokens // BLOCK) for c in conversations)
    stats = server.engine.stats()
    print(f"{len(conversations)} conversations of {conversations[0].tokens} tokens took {need} blocks, in turn,")
    print(f"on the {options.blocks} of a cache on {options.device}: {server.counts}")
    print(f"in the host pool: {stats.records} blocks, {stats.raw_bytes >> 10} KiB of values in")
    print(f"{stats.record_bytes >> 10} KiB, ratio {stats.ratio:.2f}; all values checked, error/bound <= {worst:.3f}")
    server.engine.close()
    server.pool.close()


if __name__ == "__main__":
    main()
