# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Hit rates of the eviction policies on traces of prefix-cached requests.

Run ``python bench/policies.py`` (under a minute), or give traces of your own: ``--trace FILE.jsonl``, one request a
line, in order of time, with the list ``hash_ids`` of its blocks from the first token on (the format of the traces that
come with Mooncake, FAST 2025). Writes ``bench/results/policies.json``.

A request loads the longest prefix of its blocks that the pool holds, and stores the others; those it has in the pool
already count as used. Blocks of the request do not leave for its own sake. ``prefix_hit_rate`` is the part of all
blocks that were loaded: what the model need not compute again. ``ceiling`` is that of a pool that holds everything.
``order`` says in which order the engine is given a request's blocks: ``forward`` from the first token on, ``reverse``
from the last, so that the ends of prefixes are colder than their beginnings.

The synthetic trace: conversations under a few system prompts of unequal popularity. Each turn sends the whole
conversation again and adds a prompt and an answer; people come back after a pause. In between come long single
requests that share nothing but their system prompt.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvzip.benchmark import host_environment, write_json
from kvzip.policy import make_policy

ROOT = Path(__file__).parent.parent
POLICIES = ("lru", "arc", "s3fifo")
ORDERS = ("forward", "reverse")
FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.4)

Request = list[int]


# ---- traces


def synthetic(seed: int, conversations: int) -> list[Request]:
    """Requests of the synthetic trace, in order of time; see the module's text."""
    rng = np.random.default_rng(seed)
    fresh = iter(range(1 << 40))

    def blocks(count: float) -> Request:
        return [next(fresh) for _ in range(max(1, round(count)))]

    systems = [blocks(rng.lognormal(1.5, 0.6)) for _ in range(8)]
    popularity = 1 / np.arange(1, len(systems) + 1)
    popularity /= popularity.sum()

    def system() -> Request:
        return list(systems[rng.choice(len(systems), p=popularity)])

    events: list[tuple[float, int, Request, int]] = []  # time, number, conversation so far, turns left
    clock = 0.0
    for number in range(conversations):
        clock += rng.exponential(1.0)
        events.append((clock, number, system(), int(rng.geometric(0.2))))
    singles = conversations // 2
    events += [(rng.uniform(0, clock), conversations + i, system(), 0) for i in range(singles)]
    heapq.heapify(events)
    requests: list[Request] = []
    while events:
        time, number, so_far, turns = heapq.heappop(events)
        if turns == 0:
            requests.append(so_far + blocks(rng.lognormal(3.0, 0.7)))
            continue
        prompt = so_far + blocks(rng.lognormal(0.8, 0.8))
        requests.append(prompt)
        if turns > 1:
            answer = blocks(rng.lognormal(0.8, 0.6))
            heapq.heappush(events, (time + rng.lognormal(4.0, 1.0), number, prompt + answer, turns - 1))
    return requests


def read_trace(path: Path) -> list[Request]:
    """Requests of a file with one JSON object a line, each with ``hash_ids``."""
    requests = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            requests.append([int(i) for i in json.loads(line)["hash_ids"]])
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}:{number}: {error!r}: give one JSON object a line, with 'hash_ids'") from None
    return [r for r in requests if r]


def sizes_of(requests: Sequence[Request], seed: int) -> dict[int, int]:
    """Bytes of each block's record: ratios differ from block to block, as they do for real KV data."""
    ids = sorted({i for request in requests for i in request})
    ratio = np.random.default_rng(seed).normal(3.0, 0.3, len(ids)).clip(2.0, 4.0)
    return dict(zip(ids, (1e6 / ratio).astype(int).tolist(), strict=True))


# ---- simulation


def run(policy_name: str, requests: Sequence[Request], sizes: dict[int, int], capacity: float, order: str) -> Any:
    """Hit rates of one policy in a pool of so many bytes."""
    policy = make_policy(policy_name)
    keys = {i: b"%d" % i for i in sizes}
    names = {key: i for i, key in keys.items()}
    held: set[int] = set()
    free = capacity
    loaded = found = total = evicted = 0
    for request in requests:
        own = set(request)
        prefix = next((n for n, i in enumerate(request) if i not in held), len(request))
        loaded += prefix
        found += sum(i in held for i in request)
        total += len(request)
        for i in ordered(request[:prefix], order):
            policy.touch(keys[i])
        for i in ordered(request[prefix:], order):
            if i in held:
                policy.touch(keys[i])
                continue
            while free < sizes[i]:
                victim = next((k for k in policy.victims() if names[k] not in own), None)
                if victim is None:
                    break
                policy.remove(victim, evicted=True)
                held.remove(names[victim])
                free += sizes[names[victim]]
                evicted += 1
            if free >= sizes[i]:
                policy.insert(keys[i], sizes[i])
                held.add(i)
                free -= sizes[i]
    return {
        "policy": policy_name,
        "order": order,
        "prefix_hit_rate": round(loaded / total, 4),
        "block_hit_rate": round(found / total, 4),
        "evicted": evicted,
    }


def ordered(blocks: Request, order: str) -> Iterator[int]:
    """Blocks of a request in the order in which the engine is given them."""
    return iter(blocks) if order == "forward" else reversed(blocks)


def ceiling(requests: Sequence[Request]) -> float:
    """Prefix hit rate of a pool that holds everything."""
    seen: set[int] = set()
    loaded = total = 0
    for request in requests:
        loaded += next((n for n, i in enumerate(request) if i not in seen), len(request))
        total += len(request)
        seen.update(request)
    return loaded / total


def measure(name: str, requests: Sequence[Request], seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All policies on one trace."""
    sizes = sizes_of(requests, seed)
    footprint = sum(sizes.values())
    about = {
        "trace": name,
        "requests": len(requests),
        "blocks": len(sizes),
        "mean_blocks_of_a_request": round(sum(map(len, requests)) / len(requests), 1),
        "ceiling": round(ceiling(requests), 4),
    }
    print(about, flush=True)
    rows = []
    for fraction in FRACTIONS:
        for order in ORDERS:
            for policy in POLICIES:
                row = {"trace": name, "capacity_fraction": fraction}
                row |= run(policy, requests, sizes, footprint * fraction, order)
                rows.append(row)
                print(
                    f"{name:14s} {fraction:5.0%} of all blocks, {order:7s} {policy:7s} "
                    f"prefix hits {row['prefix_hit_rate']:.3f}, block hits {row['block_hit_rate']:.3f}",
                    flush=True,
                )
    return about, rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, action="append", default=[], help="a trace; may be given several times")
    parser.add_argument("--conversations", type=int, default=1500, help="of the synthetic trace; 0 leaves it out")
    parser.add_argument("--seed", type=int, default=1, help="of the synthetic trace and of the blocks' sizes")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "policies.json")
    options = parser.parse_args(argv)
    traces = [(path.stem, read_trace(path)) for path in options.trace]
    if options.conversations:
        traces.insert(0, ("synthetic", synthetic(options.seed, options.conversations)))
    abouts, rows = [], []
    for name, requests in traces:
        about, found = measure(name, requests, options.seed)
        abouts.append(about)
        rows += found
    environment = {k: v for k, v in host_environment().items() if k in ("kvzip", "python", "numpy", "time")}
    settings = {"seed": options.seed, "conversations": options.conversations}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, {"environment": environment, "settings": settings, "traces": abouts, "rows": rows})
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
