# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Raw or encoded: the break-even controller, which chooses for each store by what transfers were seen to take.

A block that is stored raw can only be loaded raw, so the choice is made once, for the store and the loads that follow.
What a transfer takes is predicted by a model with built-in rates, times a correction for its size class that is the
median of what was observed lately. The road that is not taken is measured now and then, within a budget of time.
Nothing here touches a device, and time comes in with the observations.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal, NamedTuple, TypeAlias

from kvzip.errors import ConfigError

__all__ = ["Controller", "ControllerSnapshot", "Crossing", "Decision", "Prior", "Profile", "make_controller"]

Choice: TypeAlias = Literal["raw", "encoded"]
Direction: TypeAlias = Literal["store", "load"]

RAW: Choice = "raw"
ENCODED: Choice = "encoded"
CHOICES: tuple[Choice, ...] = (RAW, ENCODED)
DIRECTIONS: tuple[Direction, ...] = ("store", "load")
OBJECTIVES = ("latency", "balanced", "capacity")
#: Why a choice was made; see `Decision`.
CAUSES = ("asked", "objective", "hysteresis", "exploration")

#: What is asked of a transfer: nothing, when it ends, or what it took as well: in place of `WATCH_EVERY`, or of itself.
SKIP, NOTE, OBSERVE, YOUNGEST = 0, 1, 2, 3

TO_RAW, TO_ENCODED = 0.04, 0.01  # of raw over encoded, logarithm: where the choice changes, each way
SLACK = 0.02  # logarithm of the ratio up to which `capacity` finds both sizes equal
OPTIMISM, UNSEEN_OPTIMISM = 2.0, 100.0  # raw is measured only if it could win at this part of its estimate
FIRST_TRIES = 2  # of each road in a size class
FIRST_PART = 0.05  # of the time of all transfers, that these may lose
TRY_EVERY = 32  # choices in a size class, after that
CHANGED = 0.2  # logarithm of the change of the road taken after which the other one is tried anew
SMALL = 8 << 20  # raw bytes: of larger transfers each is observed
YOUNG = 16  # transfers of a size that are observed, and after each of which the roads are compared
WATCH_EVERY = 7  # one of so many is observed later, and the end of the one before it
MOST_SAMPLES = 9
STALE = 4  # transfers of a size that were observed since: then a road's samples, all but one, go when a new one comes
MOST_STATES = 512
SMALLEST_CLASS, LARGEST_CLASS = 6, 16  # 4 KiB and less, 4 GiB and more
SEEN_RATIO = 1.5  # of data that has not been encoded yet


class Profile:
    """What an encoder is asked for. Immutable; hashed once, as every store looks it up.

    Args:
        codec: name of the codec.
        mode: encoding mode.
        bound: any hashable object with a readable ``str``.
        family: bounds of a family take about as long as each other at the same ratio.
    """

    __slots__ = ("_hash", "bound", "codec", "family", "mode")

    def __init__(self, codec: str, mode: str, bound: Hashable, family: str = "") -> None:
        self.codec, self.mode, self.bound, self.family = codec, mode, bound, family
        self._hash = hash((codec, mode, bound))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Profile) and (self.codec, self.mode, self.bound) == (other.codec, other.mode, other.bound)
        )

    def __str__(self) -> str:
        return f"{self.codec} {self.mode} {self.bound}"


@dataclass(frozen=True)
class Prior:
    """What transfers of a device are taken for before they were observed.

    Attributes:
        link_out, link_in: raw values to the pool and back, bytes a second.
        encode, decode: bytes of values a second.
        fixed_seconds: what a transfer takes beside that.
        overlapped: whether coding and moving go on at the same time.
    """

    link_out: float
    link_in: float
    encode: float
    decode: float
    fixed_seconds: float
    overlapped: bool

    def __post_init__(self) -> None:
        for name in ("link_out", "link_in", "encode", "decode"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"prior {name}={getattr(self, name)!r}: give bytes a second, above 0")
        if not self.fixed_seconds >= 0:
            raise ConfigError(f"prior fixed_seconds={self.fixed_seconds!r}: give seconds, at least 0")

    def seconds(self, direction: Direction, choice: Choice, raw_bytes: int, ratio: float) -> float:
        """What a transfer takes.

        Args:
            direction: ``"store"`` or ``"load"``.
            choice: ``"raw"`` or ``"encoded"``.
            raw_bytes: bytes of its values.
            ratio: these over the bytes of its encoded records.
        """
        link, codec = (self.link_out, self.encode) if direction == "store" else (self.link_in, self.decode)
        if choice == RAW:
            return self.fixed_seconds + raw_bytes / link
        coded, moved = raw_bytes / codec, raw_bytes / ratio / link
        return self.fixed_seconds + (max(coded, moved) if self.overlapped else coded + moved)


#: By kind of device. The order of magnitude is enough: two observations replace them.
PRIORS = {
    "cuda": Prior(40e9, 40e9, 500e9, 500e9, 100e-6, overlapped=True),
    "cpu": Prior(5e9, 8e9, 3e9, 3e9, 30e-6, overlapped=False),
}


class Decision(NamedTuple):
    """A choice for one store.

    Attributes:
        device: where the blocks lie.
        profile: what the encoder would be asked for.
        choice: ``"raw"`` or ``"encoded"``.
        cause: ``"objective"`` (it serves the objective better), ``"hysteresis"`` (the other one does, but not by enough
            or not for long enough), ``"exploration"`` (to measure it), ``"asked"`` (by the caller).
        expected_seconds: what the store was expected to take when the roads were last compared.
        starting: it is one of the first attempts, which have a budget of their own.
        watch: what to report of the store: `SKIP`, `NOTE`, `OBSERVE` or `YOUNGEST`.
    """

    device: str
    profile: Profile
    choice: Choice
    cause: str
    expected_seconds: float
    starting: bool = False
    watch: int = YOUNGEST


@dataclass(frozen=True)
class Crossing:
    """What a controller thinks of one size class.

    Attributes:
        device, profile: of the transfers.
        least_bytes, most_bytes: raw bytes of the transfers in the class.
        choice: what it chooses now.
        decisions, switches: choices made, and how often they changed.
        ratio: raw bytes over encoded bytes.
        store_seconds, load_seconds: by choice, what a transfer of the geometric mean of the class is expected to take.
    """

    device: str
    profile: str
    least_bytes: int
    most_bytes: int
    choice: Choice
    decisions: int
    switches: int
    ratio: float
    store_seconds: Mapping[Choice, float]
    load_seconds: Mapping[Choice, float]


@dataclass(frozen=True)
class ControllerSnapshot:
    """A controller at one moment.

    Attributes:
        objective: what it serves.
        decisions: choices made, by choice and cause.
        transfer_seconds: of all transfers, estimated from those that were observed, without the time that they waited
            for others.
        exploration_seconds: what roads took that were tried although they were expected to be slower, beyond what the
            others were expected to take.
        waiting_seconds: by direction, the time that they waited.
        link_bytes_per_second: by device and direction, what raw transfers of the largest size seen reach.
        crossings: what it thinks, by device, profile and size class.
    """

    objective: str
    decisions: Mapping[tuple[str, str], int]
    transfer_seconds: float
    exploration_seconds: float
    waiting_seconds: Mapping[str, float]
    link_bytes_per_second: Mapping[tuple[str, Direction], float]
    crossings: tuple[Crossing, ...]


class _Samples:
    """The latest observations of a number, and their lower median."""

    __slots__ = ("_count", "_values", "serial")

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=MOST_SAMPLES)
        self._count = 0
        self.serial = 0  # of the latest one, among all transfers of its size and direction

    def add(self, value: float, *, stale: bool) -> None:
        """Add an observation. `stale`: the others are from another time, of which only the latest still counts."""
        while stale and len(self._values) > 1:
            self._values.popleft()
        self._values.append(value)
        self._count += 1

    def value(self, prior: float = 0.0) -> float:
        """The lower median, as delays only add; the prior is one of the samples until there were three."""
        values = list(self._values)
        if self._count < 3:
            values.append(prior)
        return sorted(values)[(len(values) - 1) // 2]


@dataclass(slots=True)
class _State:
    """A size class of a profile on a device."""

    choice: Choice = ENCODED
    standing: tuple[Decision, ...] = ()  # what holds until the next look, by what is watched
    passes: int = 0  # stores that go by unwatched, and how many have
    passed: int = 0
    noted: bool = False  # the end of the last store is reported: the next one can be observed
    decisions: int = 0
    switches: int = 0
    changed: int = 0  # number of the decision at which the choice was made, or changed
    next_look: int = 1  # number of the decision at which the roads are compared again
    tries: dict[Choice, int] = field(default_factory=lambda: dict.fromkeys(CHOICES, 0))
    tried: dict[Choice, int] = field(default_factory=lambda: dict.fromkeys(CHOICES, 0))  # number of the last decision
    expected: dict[Choice, float] = field(default_factory=lambda: dict.fromkeys(CHOICES, 0.0))  # seconds of a store
    beside: dict[Choice, float] = field(default_factory=dict)  # seconds of the other road, when this one was taken last


Cell: TypeAlias = tuple[int, int]  # size class, ratio in half octaves
Kind: TypeAlias = tuple[str, Direction, Hashable]  # device, direction, what is moved
Way: TypeAlias = tuple[str, Direction]


class Controller:
    """Chooses raw or encoded for every store. Thread-safe.

    The objective decides what counts: ``"latency"`` the seconds of the store and of the loads after it, ``"balanced"``
    the product of seconds and bytes in the pool, ``"capacity"`` the bytes (and the seconds where both are about the
    same size, as with values that cannot be made smaller). Where both are equal, encoded is chosen.

    Args:
        objective: one of these.
        loads_per_store: loads of a block that are expected for each store of it.
        exploration: most time, as a part of all transfers' time, that is lost by measuring the road that is not chosen;
            0 = never measure it.
        allowance_seconds: what may be lost at once on the first two attempts in each size class, and on those that
            follow a change of what the chosen road takes; over time, 5 % of all.
        dwell: choices in a size class before the roads are compared again, and the choice may change again.
        priors: what is expected at first, by device (``"cuda:0"``) or kind of device (``"cuda"``, ``"cpu"``).
        clock: seconds; for tests.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(
        self,
        objective: str = "latency",
        *,
        loads_per_store: float = 1.0,
        exploration: float = 0.01,
        allowance_seconds: float = 0.05,
        dwell: int = 8,
        priors: Mapping[str, Prior] | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        if objective not in OBJECTIVES:
            raise ConfigError(f"controller objective {objective!r}: use one of {', '.join(OBJECTIVES)}")
        if not (loads_per_store >= 0 and math.isfinite(loads_per_store)):
            raise ConfigError(f"controller loads_per_store={loads_per_store!r}: give a number, at least 0")
        if not 0 <= exploration <= 0.5:
            raise ConfigError(f"controller exploration={exploration!r}: give a part from 0 (never) to 0.5")
        if not allowance_seconds >= 0:
            raise ConfigError(f"controller allowance_seconds={allowance_seconds!r}: give seconds, at least 0")
        if dwell < 1:
            raise ConfigError(f"controller dwell={dwell!r}: give a number of choices, at least 1")
        self.objective = objective
        self._loads = loads_per_store
        self._exploration = exploration
        self._allowance = allowance_seconds
        self._dwell = dwell
        self._priors = {**PRIORS, **(priors or {})}
        self._clock = clock
        self._lock = threading.Lock()
        self._states: dict[tuple[str, Profile, int], _State] = {}
        self._cells: dict[Kind, dict[Cell, _Samples]] = {}
        self._ratios: dict[Profile, _Samples] = {}
        self._decisions: Counter[tuple[str, str]] = Counter()
        self._ends: dict[Way, float] = {}
        self._known: dict[tuple[str, Profile, int], _State] = {}  # states by the very size of transfers
        self._serials: dict[tuple[str, Direction, int], int] = {}
        self._loads_seen: dict[tuple[str, int], tuple[str, int]] = {}  # by size: codec of the last one, and how many
        self._waiting: dict[str, float] = dict.fromkeys(DIRECTIONS, 0.0)
        self._seconds = 0.0
        self._explored = {True: 0.0, False: 0.0}  # seconds, at the beginning and later

    # ---- decisions

    def decide(self, device: str, profile: Profile, raw_bytes: int, asked: Choice | None = None) -> Decision:
        """Choose for one store.

        Args:
            device: where the blocks lie.
            profile: what the encoder would be asked for.
            raw_bytes: bytes of the blocks' values.
            asked: the caller's own choice, if there is one.
        """
        # The price of most stores: what was found by this key is not looked at before `passes` stores have gone by.
        known = self._known.get((device, profile, raw_bytes))
        if known is not None and known.passed < known.passes and asked is None:
            known.passed += 1
            return known.standing[SKIP]
        with self._lock:
            state = self._state(device, profile, raw_bytes)
            self._settle(state)
            young = state.decisions < YOUNG or raw_bytes > SMALL
            watch = YOUNGEST if young else OBSERVE if state.noted else NOTE
            state.noted = watch == NOTE
            state.decisions += 1
            if asked is not None:
                decision = Decision(device, profile, asked, "asked", state.expected[asked], watch=watch)
            elif not state.standing or (watch >= OBSERVE and state.decisions >= state.next_look):
                decision = self._look(state, device, profile, raw_bytes, watch)
            else:
                decision = state.standing[watch]
            state.tries[decision.choice] += 1
            state.tried[decision.choice] = state.decisions
            state.passes = WATCH_EVERY - 2 if watch == OBSERVE and asked is None else 0
            self._decisions[decision.choice, decision.cause] += 1
            return decision

    def _settle(self, state: _State) -> None:
        """Count the stores that went by."""
        if state.passed:
            passed, state.passed = state.passed, 0
            chosen = state.standing[SKIP]
            state.decisions += passed
            state.tries[chosen.choice] += passed
            state.tried[chosen.choice] = state.decisions
            self._decisions[chosen.choice, chosen.cause] += passed

    def _look(self, state: _State, device: str, profile: Profile, raw_bytes: int, watch: int) -> Decision:
        """Compare the roads, and choose."""
        soon = 1 if state.decisions < YOUNG else (self._dwell + 1) // 2 if watch == YOUNGEST else self._dwell
        state.next_look = state.decisions + soon
        times = {}
        for choice in CHOICES:
            store = state.expected[choice] = self._expected(device, "store", choice, profile, raw_bytes)
            times[choice] = store + self._loads * self._expected(device, "load", choice, profile, raw_bytes)
        gain = self._gain(times, profile)
        wanted: Choice = RAW if gain > TO_RAW else ENCODED if gain < TO_ENCODED else state.choice
        if state.changed == 0:
            state.choice, state.changed = wanted, state.decisions
        elif wanted != state.choice and state.decisions - state.changed >= self._dwell:
            state.choice, state.changed = wanted, state.decisions
            state.switches += 1
        cause = "objective" if state.choice == (RAW if gain > 0 else ENCODED) else "hysteresis"
        chosen = Decision(device, profile, state.choice, cause, state.expected[state.choice])
        state.standing = tuple(chosen._replace(watch=each) for each in (SKIP, NOTE, OBSERVE, YOUNGEST))
        other = ENCODED if state.choice == RAW else RAW
        change = math.log(times[state.choice] / state.beside.get(other, times[state.choice]))
        if abs(change) > CHANGED:
            state.tries[other] = min(state.tries[other], FIRST_TRIES - 1)  # who knows what it takes by now
        starting = state.tries[other] < FIRST_TRIES
        state.beside[state.choice] = times[other]
        times[other] *= math.exp(min(0.0, change))  # what has eased one road will have eased the other one
        if self._explores(state, other, times, profile, starting):
            state.beside[other] = times[state.choice]
            return Decision(device, profile, other, "exploration", state.expected[other], starting, watch)
        return state.standing[watch]

    def _gain(self, times: Mapping[Choice, float], profile: Profile) -> float:
        """How much raw serves the objective better than encoded, logarithm."""
        faster, larger = math.log(times[ENCODED] / times[RAW]), math.log(self._ratio(profile))
        if self.objective == "latency":
            return faster
        if self.objective == "balanced":
            return faster - larger
        return -larger if larger > SLACK else faster

    def _explores(
        self, state: _State, other: Choice, times: Mapping[Choice, float], profile: Profile, starting: bool
    ) -> bool:
        """Whether to take the road that is not chosen, to see what it takes; then its cost is charged."""
        if state.changed == state.decisions or self._exploration == 0:
            return False
        if not starting and state.decisions - state.tried[other] < TRY_EVERY:
            return False
        if other == RAW:
            hoped = {**times, RAW: times[RAW] / (UNSEEN_OPTIMISM if starting else OPTIMISM)}
            if self._gain(hoped, profile) <= TO_RAW:
                return False
        extra = max(0.0, times[other] - times[state.choice])
        spent = self._explored[starting]
        most = self._allowance + FIRST_PART * self._seconds if starting else self._exploration * self._seconds
        if spent + extra > most:
            return False
        self._explored[starting] = spent + extra
        return True

    def _state(self, device: str, profile: Profile, raw_bytes: int) -> _State:
        key = (device, profile, size_class(raw_bytes))
        state = self._states.get(key)
        if state is None:
            if len(self._states) >= MOST_STATES:
                oldest = next(iter(self._states))
                self._settle(self._states.pop(oldest))
                self._known.clear()
            state = self._states[key] = _State()
        if len(self._known) >= MOST_STATES:
            self._known.clear()
        self._known[device, profile, raw_bytes] = state
        return state

    # ---- observations

    def stored(self, decision: Decision, raw_bytes: int, record_bytes: int, seconds: float) -> None:
        """A store has ended well.

        Args:
            decision: what was decided for it.
            raw_bytes: bytes of its values.
            record_bytes: bytes of its records.
            seconds: from the call to its end.
        """
        now = self._clock()
        own = self._end((decision.device, "store"), seconds, now, decision.watch)
        if decision.watch < OBSERVE or raw_bytes <= 0 or record_bytes <= 0:
            return
        with self._lock:
            if decision.choice == ENCODED:
                self._learn_ratio(decision, raw_bytes / record_bytes)
            kind = _kind(decision.device, "store", decision.choice, decision.profile)
            explored = decision.cause == "exploration"
            self._observe(kind, decision.choice, raw_bytes, record_bytes, own, alone=explored)
            if explored:
                self._explored[decision.starting] += max(0.0, own - decision.expected_seconds)

    def watch_load(self, device: str, codec: str, raw_bytes: int) -> int:
        """What to watch of a load that begins: `SKIP`, `NOTE`, `OBSERVE` or `YOUNGEST`.

        Args:
            device: where the blocks lie.
            codec: of the first record.
            raw_bytes: bytes of the blocks' values.
        """
        size = (device, size_class(raw_bytes))
        before, seen = self._loads_seen.get(size, ("", 0))
        seen += 1
        self._loads_seen[size] = (codec, seen)
        if seen <= YOUNG or raw_bytes > SMALL or codec != before:  # of the road that is seldom taken, all are
            return YOUNGEST
        turn = seen % WATCH_EVERY
        return SKIP if turn > 1 else OBSERVE if turn else NOTE

    def loaded(
        self,
        device: str,
        profile: Profile | None,
        raw_bytes: int,
        record_bytes: int,
        seconds: float,
        watch: int = YOUNGEST,
    ) -> None:
        """A load has ended well.

        Args:
            device: where the blocks lie.
            profile: what the records were encoded with; of its mode it matters whether that is ``rice``, the bound does
                not matter. None: they are raw.
            raw_bytes: bytes of the blocks' values.
            record_bytes: bytes of their records.
            seconds: from the call to its end.
            watch: what `watch_load` said.
        """
        now = self._clock()
        own = self._end((device, "load"), seconds, now, watch)
        if watch < OBSERVE or raw_bytes <= 0 or record_bytes <= 0:
            return
        choice = RAW if profile is None else ENCODED
        with self._lock:
            self._observe(_kind(device, "load", choice, profile), choice, raw_bytes, record_bytes, own)

    def _end(self, way: Way, seconds: float, now: float, watch: int) -> float:
        """A transfer has ended: what it took, without the time that it waited for others of its direction.

        Without the lock: two that end at the same moment may count a little wrong.
        """
        own = max(now - max(now - seconds, self._ends.get(way, -math.inf)), 1e-7)
        self._ends[way] = now
        if watch >= OBSERVE:
            times = WATCH_EVERY if watch == OBSERVE else 1
            self._seconds += times * own
            self._waiting[way[1]] += times * max(0.0, seconds - own)
        return own

    def _observe(
        self, kind: Kind, choice: Choice, raw_bytes: int, record_bytes: int, own: float, *, alone: bool = False
    ) -> None:
        device, direction, _ = kind
        ratio, size = raw_bytes / record_bytes, size_class(raw_bytes)
        model = self._prior(device).seconds(direction, choice, raw_bytes, ratio)
        cells = self._cells.setdefault(kind, {})
        if len(self._cells) > MOST_STATES:
            del self._cells[next(iter(self._cells))]
        serial = self._serials[device, direction, size] = self._serials.get((device, direction, size), 0) + 1
        samples = cells.setdefault((size, _octaves(ratio) if choice == ENCODED else 0), _Samples())
        samples.add(math.log(own / model), stale=alone or serial - samples.serial > STALE)
        samples.serial = serial

    def _learn_ratio(self, decision: Decision, ratio: float) -> None:
        samples = self._ratios.get(decision.profile)
        if samples is None:
            if len(self._ratios) >= MOST_STATES:
                del self._ratios[next(iter(self._ratios))]
            samples = self._ratios[decision.profile] = _Samples()
        samples.add(math.log(ratio), stale=decision.cause == "exploration")

    # ---- predictions

    def _ratio(self, profile: Profile) -> float:
        samples = self._ratios.get(profile)
        return SEEN_RATIO if samples is None else math.exp(samples.value(math.log(SEEN_RATIO)))

    def _expected(self, device: str, direction: Direction, choice: Choice, profile: Profile, raw_bytes: int) -> float:
        prior, ratio = self._prior(device), self._ratio(profile)
        model = prior.seconds(direction, choice, raw_bytes, ratio)
        size, octave = size_class(raw_bytes), _octaves(ratio) if choice == ENCODED else 0
        # What was never seen is as far from the model as its neighbour; as the other road; as the other direction.
        for kind in (
            _kind(device, direction, choice, profile),
            _kind(device, direction, RAW, None),
            _kind(device, direction, ENCODED, profile),
            _kind(device, "store", RAW, None),
        ):
            cells = self._cells.get(kind)
            if not cells:
                continue
            known = cells.get((size, octave))
            if known is not None:
                return model * math.exp(known.value())
            near = min(cells, key=lambda at: (abs(at[0] - size) + 0.3 * abs(at[1] - octave), at))
            factor = math.exp(cells[near].value())
            if near[0] < size:  # what a smaller one took beside the model is no matter of its bytes
                there = prior.seconds(direction, choice, _middle(near[0]), ratio)
                return max(model + (factor - 1) * there, model / 4)
            return model * factor
        return model

    def _prior(self, device: str) -> Prior:
        return self._priors.get(device) or self._priors.get(device.partition(":")[0]) or PRIORS["cuda"]

    # ---- what it knows

    @property
    def decisions(self) -> dict[tuple[str, str], int]:
        """Choices made so far, by choice and cause."""
        with self._lock:
            for state in self._states.values():
                self._settle(state)
            return dict(self._decisions)

    def snapshot(self) -> ControllerSnapshot:
        """What it has seen and what it thinks."""
        decisions = self.decisions
        with self._lock:
            crossings = []
            for (device, profile, size), state in self._states.items():
                middle = _middle(size)
                expected = {
                    direction: {
                        choice: self._expected(device, direction, choice, profile, middle) for choice in CHOICES
                    }
                    for direction in DIRECTIONS
                }
                crossings.append(
                    Crossing(
                        device,
                        str(profile),
                        0 if size == SMALLEST_CLASS else 1 << (2 * size),
                        (4 << (2 * size)) - 1,
                        state.choice,
                        state.decisions,
                        state.switches,
                        self._ratio(profile),
                        expected["store"],
                        expected["load"],
                    )
                )
            links = {}
            for (device, direction, moved), cells in self._cells.items():
                if moved == RAW:
                    size, octave = max(cells)
                    seconds = self._prior(device).seconds(direction, RAW, _middle(size), 1.0)
                    links[device, direction] = _middle(size) / (seconds * math.exp(cells[size, octave].value()))
            return ControllerSnapshot(
                self.objective,
                decisions,
                self._seconds,
                sum(self._explored.values()),
                dict(self._waiting),
                links,
                tuple(crossings),
            )

    def __repr__(self) -> str:
        return f"Controller({self.objective!r})"


def size_class(raw_bytes: int) -> int:
    """Transfers of a class differ by less than a factor of 4 in their raw bytes."""
    return min(max((raw_bytes.bit_length() - 1) // 2, SMALLEST_CLASS), LARGEST_CLASS)


def _middle(size: int) -> int:
    """Bytes in the middle of a size class."""
    return 2 << (2 * size)


def _octaves(ratio: float) -> int:
    return round(2 * math.log2(ratio))


def _kind(device: str, direction: Direction, choice: Choice, profile: Profile | None) -> Kind:
    if choice == RAW or profile is None:
        return device, direction, RAW
    if direction == "store":
        return device, direction, (profile.codec, profile.mode, profile.family)
    # What is known of a record is its codec, and whether the kernels of the mode `rice` decode it.
    return device, direction, (profile.codec, profile.mode == "rice")


def make_controller(controller: str | Controller | None) -> Controller | None:
    """A controller by the name of its objective, or the given one.

    Raises:
        ConfigError: no such objective, or it is no controller.
    """
    if controller is None or isinstance(controller, Controller):
        return controller
    if isinstance(controller, str):
        return Controller(controller)
    raise ConfigError(f"{controller!r} is no controller: give a Controller, or one of {', '.join(OBJECTIVES)}")
