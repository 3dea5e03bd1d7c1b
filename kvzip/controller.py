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
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

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

#: What is to be reported of a transfer: nothing, or that it has ended. Above 0: what it took, for so many like it.
SKIP, NOTE = 0, -1

TO_RAW, TO_ENCODED = 0.02, 0.0  # of raw over encoded, logarithm: where the choice changes, each way
SLACK = 0.02  # logarithm of the ratio up to which `capacity` finds both sizes equal
HOPELESS = 10.0  # raw is not measured if it would not win at this part of its estimate
FIRST_TRIES = 2  # of each road in a size class
NEAR = 2.0  # the first tries need an estimate of at most so many times the other road's, or none
FIRST_PART = 0.01  # of the time of all transfers, that these may lose
TRY_EVERY = 16  # choices in a size class between later tries, at least
CHANGED = 0.82  # parts of each other from which two times differ: then what was known before is out of date
LARGE = 128 << 20  # raw bytes: of larger transfers each is observed
YOUNG = 16  # transfers of a size that are observed, each
WATCH_EVERY = (
    8  # one of so many is observed later; if it has to wait for another one, the next, and the end of this one
)
MOST_SAMPLES = 9
MOST_STATES = 512
MOST_PENDING = 64  # transfers that are observed and wait for the next `catch_up`; older ones are forgotten
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
    "cuda": Prior(50e9, 50e9, 1000e9, 1000e9, 30e-6, overlapped=True),
    "cpu": Prior(2.4e9, 2.4e9, 6e9, 15e9, 100e-6, overlapped=True),
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
        watch: what to report of the store: `SKIP`, `NOTE`, or for how many stores it stands.
    """

    device: str
    profile: Profile
    choice: Choice
    cause: str
    expected_seconds: float
    starting: bool = False
    watch: int = 1


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


class _Estimate:
    """A positive number: the lower median of its latest observations, as delays only add.

    Attributes:
        value: the estimate; what was supposed counts as one observation until there were three.
        count: of the observations since it was made or became outdated.
        serial: of the latest one, among all transfers of its size.
    """

    __slots__ = ("_before", "_supposed", "_values", "count", "serial", "value")

    def __init__(self, supposed: float) -> None:
        self._values: list[float] = []
        self._supposed = [supposed]
        self._before = 0.0  # what it was when it became outdated
        self.value = supposed
        self.count = self.serial = 0

    @property
    def doubtful(self) -> bool:
        """Whether another observation is needed: there were too few, or the latest one differs."""
        return self.count < FIRST_TRIES or _differ(self._values[-1], self.value)

    def add(self, value: float, serial: int) -> float | None:
        """Add an observation.

        Args:
            value: what was observed.
            serial: its number.

        Returns:
            By what the estimate has changed, if the latest observations say so, two that are smaller or three that are
            larger: then the earlier ones count no more.
        """
        before = self.value
        if self.count < 3 and (self._before or self.count < FIRST_TRIES):
            before = self._before
        values = self._values
        values.append(value)
        self.count += 1
        self.serial = serial
        changed = 0
        if before > 0 and len(values) > 1:
            if max(values[-2:]) < before * CHANGED:
                changed = 2
            elif len(values) > 2 and min(values[-3:]) > before / CHANGED:
                changed = 3
        del values[: -(changed or MOST_SAMPLES)]
        known = sorted(values if self.count >= 3 else values + self._supposed)
        self.value = known[(len(known) - 1) // 2]
        return self.value / before if changed else None

    def outdate(self, change: float) -> None:
        """What was observed counts no more; until there is an observation, it is supposed to have changed like this."""
        self._values.clear()
        self._supposed.clear()
        if self.count or not self._before:
            self._before = self.value
        self.value *= change
        self.count = 0


def _differ(one: float, other: float) -> bool:
    return not CHANGED < one / other < 1 / CHANGED


class _Plan(NamedTuple):
    """To measure the road that is not chosen.

    Attributes:
        decision: what to do.
        extra_seconds: what that is expected to cost.
    """

    decision: Decision
    extra_seconds: float


@dataclass(slots=True)
class StoreLane:
    """What an engine looks up for a store: a size class of a profile on a device.

    It takes `passing` as long as it can take one of what is `left`, and asks `Controller.decide` then.
    """

    choice: Choice = ENCODED
    passing: Decision | None = None  # what holds until the next look, for stores that go by unwatched
    standing: dict[int, Decision] = field(default_factory=dict)  # the same by what is watched
    planned: _Plan | None = None  # for the next store that is observed
    granted: int = 0  # stores that may go by unwatched, and how many of these are left
    left: int = 0
    noted: bool = False  # the end of the last store is reported: the next one can be observed
    decisions: int = 0
    switches: int = 0
    changed: int = 0  # number of the decision at which the choice was made, or changed
    next_look: int = 1  # number of the decision at which the roads are compared again
    expected: dict[Choice, float] = field(default_factory=lambda: dict.fromkeys(CHOICES, 0.0))  # seconds of a store
    tried: dict[Choice, int] = field(default_factory=lambda: dict.fromkeys(CHOICES, 0))  # number of the last decision


@dataclass(slots=True)
class LoadLane:
    """What an engine looks up for a load: loads of a size.

    Attributes:
        keep: objects that the key names.
        codec: of the last one.
        count: of those that did not go by unwatched.
        left: that may.
        noted: the end of the last one is reported: the next one can be observed.
    """

    keep: tuple[object, ...] = ()
    codec: str = ""
    count: int = 0
    left: int = 0
    noted: bool = False

    def watch(self, codec: str, raw_bytes: int, *, waits: bool = False) -> int:
        """What to watch of a load that begins: `SKIP`, `NOTE`, or for how many loads it stands.

        Args:
            codec: of the first record.
            raw_bytes: bytes of the blocks' values.
            waits: whether a load before it is under way, whose end nobody reports.
        """
        if self.left > 0 and self.codec == codec:
            self.left -= 1
            return SKIP
        self.count += 1
        if self.count <= YOUNG or raw_bytes > LARGE or self.codec != codec:  # of the road that is seldom taken, all are
            self.codec = codec
            return 1
        self.noted = waits and not self.noted
        if self.noted:
            return NOTE
        self.left = WATCH_EVERY - 1
        return WATCH_EVERY


class Outcome(Protocol):
    """What a transfer did; `kvzip.transfer.TransferResult`."""

    @property
    def raw_bytes(self) -> int: ...

    @property
    def record_bytes(self) -> int: ...

    @property
    def seconds(self) -> float: ...


class Running(Protocol):
    """A transfer; `kvzip.transfer.Transfer`."""

    _ended: bool
    _result: Any  # an `Outcome`, or None


class _Known(NamedTuple):
    """The result of a transfer that has ended."""

    raw_bytes: int
    record_bytes: int
    seconds: float


@dataclass(slots=True)
class _Ended:
    """A transfer that has ended."""

    _result: _Known
    _ended: bool = True


class _Begun(NamedTuple):
    """A transfer that is observed."""

    transfer: Running
    started: float
    direction: Direction
    device: str
    profile: Profile | None  # of a load: what its records were encoded with
    watch: int
    decision: Decision | None  # of a store


Cell: TypeAlias = tuple[int, int]  # size class, ratio in half octaves (0: of raw)
Kind: TypeAlias = tuple[str, Direction, Hashable]  # device, direction, what is moved
Way: TypeAlias = tuple[str, Direction]

_NOTHING: Mapping[Cell, _Estimate] = MappingProxyType({})


class Controller:
    """Chooses raw or encoded for every store. Thread-safe.

    The objective decides what counts: ``"latency"`` the seconds of the store and of the loads after it, ``"balanced"``
    the product of seconds and bytes in the pool, ``"capacity"`` the bytes (and the seconds where both are about the
    same size, as with values that cannot be made smaller). Where both are equal, encoded is chosen.

    A store costs a look-up (`decide`); what was observed is taken in, and the roads are compared, when a transfer has
    been queued and the host has time (`catch_up`).

    Args:
        objective: one of these.
        loads_per_store: loads of a block that are expected for each store of it.
        exploration: most time, as a part of all transfers' time, that is lost by measuring the road that is not chosen;
            0 = never measure it.
        allowance_seconds: what may be lost at once on the first two attempts in each size class, and on those that
            follow a change of what the chosen road takes; over time, 1 % of all.
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
        allowance_seconds: float = 0.25,
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
        self._states: dict[tuple[str, Profile, int], StoreLane] = {}
        self._known: dict[tuple[str, Profile, int], StoreLane] = {}  # states by the very size of transfers
        self._estimates: dict[Kind, dict[Cell, _Estimate]] = {}  # seconds, over what the model says
        self._ratios: dict[Profile, _Estimate] = {}
        self._pending: deque[_Begun] = deque(maxlen=MOST_PENDING)
        self._decisions: Counter[tuple[str, str]] = Counter()
        self._ends: dict[Way, float] = {}
        self._serials: Counter[tuple[str, int]] = Counter()  # of what was observed, by size class
        #: For the engine's own use: what it finds by keys of its own, which name less than `decide` takes.
        self.lanes: dict[Hashable, tuple[StoreLane, tuple[object, ...]]] = {}
        self.loads: dict[Hashable, LoadLane] = {}
        self.last_store: tuple[object, object, int, str, StoreLane] | None = None  # settings, layout, blocks, device
        self.last_load: tuple[object, int, str, LoadLane] | None = None
        self._waiting: dict[str, float] = dict.fromkeys(DIRECTIONS, 0.0)
        self._seconds = 0.0
        self._explored = {True: 0.0, False: 0.0}  # seconds, at the beginning and later

    # ---- decisions

    def decide(
        self, device: str, profile: Profile, raw_bytes: int, asked: Choice | None = None, *, waits: bool = False
    ) -> Decision:
        """Choose for one store.

        Args:
            device: where the blocks lie.
            profile: what the encoder would be asked for.
            raw_bytes: bytes of the blocks' values.
            asked: the caller's own choice, if there is one.
            waits: whether a store before it is under way, whose end nobody reports.
        """
        # The price of most stores; `_settle` counts them.
        state = self._known.get((device, profile, raw_bytes))
        if state is not None and state.left > 0 and asked is None and state.passing is not None:
            state.left -= 1
            return state.passing
        with self._lock:
            if state is None:
                state = self._state(device, profile, raw_bytes)
            self._settle(state)
            state.decisions += 1
            each = state.decisions <= YOUNG or raw_bytes > LARGE
            watch = 1 if each else WATCH_EVERY if state.noted or not waits else NOTE
            state.noted = watch == NOTE
            if not state.standing:
                self._look(state, device, profile, raw_bytes)
            if asked is not None:
                decision = Decision(device, profile, asked, "asked", state.expected[asked], watch=watch)
            elif watch != NOTE and state.planned is not None:
                decision, extra_seconds = state.planned
                state.planned = None
                self._explored[decision.starting] += extra_seconds
            else:
                decision = state.standing[watch]
            state.tried[decision.choice] = state.decisions
            if watch == WATCH_EVERY:
                state.granted = state.left = WATCH_EVERY - 1
            self._decisions[decision.choice, decision.cause] += 1
            return decision

    def lane(self, key: Hashable, device: str, profile: Profile, raw_bytes: int, *keep: object) -> None:
        """Let the engine find what `decide` finds by a key of its own.

        Args:
            key: of `lanes`.
            device: as for `decide`.
            profile: as for `decide`.
            raw_bytes: as for `decide`.
            keep: objects that the key names.
        """
        state = self._known.get((device, profile, raw_bytes))
        if state is not None:
            if len(self.lanes) >= MOST_STATES:
                self.lanes.clear()
            self.lanes[key] = state, keep

    def catch_up(self, decision: Decision, raw_bytes: int) -> None:
        """Take in what has been observed, and compare the roads for the stores to come, now and then.

        Call it when a store has been queued: by now the device is at work.

        Args:
            decision: what was decided for the store.
            raw_bytes: bytes of its blocks' values.
        """
        if decision.watch <= 0:
            return
        state = self._known.get((decision.device, decision.profile, raw_bytes))
        if state is None or state.decisions < state.next_look or not self._lock.acquire(blocking=False):
            return
        try:
            self._take_in()
            self._settle(state)
            self._look(state, decision.device, decision.profile, raw_bytes)
        finally:
            self._lock.release()

    def _settle(self, state: StoreLane) -> None:
        """Count the stores that went by."""
        left = state.left
        if left < state.granted:
            passed, state.granted = state.granted - left, left
            chosen = state.standing[SKIP]
            state.decisions += passed
            state.tried[chosen.choice] = state.decisions
            self._decisions[chosen.choice, chosen.cause] += passed

    def _look(self, state: StoreLane, device: str, profile: Profile, raw_bytes: int) -> None:
        """Compare the roads: what is chosen from now on, and whether the other one is to be measured."""
        soon = 1 if state.decisions < YOUNG else (self._dwell + 1) // 2 if raw_bytes > LARGE else self._dwell
        state.next_look = state.decisions + soon
        size, ratio, prior = size_class(raw_bytes), self._ratio(profile), self._prior(device)
        cells = {RAW: (size, 0), ENCODED: (size, _octaves(ratio))}
        times = {}
        for choice, cell in cells.items():
            store, load = (
                prior.seconds(direction, choice, raw_bytes, ratio)
                * self._factor(device, direction, choice, profile, cell, raw_bytes, ratio)
                for direction in DIRECTIONS
            )
            state.expected[choice] = store
            times[choice] = store + self._loads * load
        other = _other(state.choice)
        known = self._estimates.get(_kind(device, "store", other, profile), _NOTHING)
        doubtful = self._doubtful(device, other, profile, cells[other])
        gain = self._gain(times, ratio)
        wanted: Choice = RAW if gain > TO_RAW else ENCODED if gain < TO_ENCODED else state.choice
        first = not state.standing
        if first:
            state.choice, state.changed = wanted, state.decisions
        elif (
            wanted == other
            and state.decisions - state.changed >= self._dwell
            and not (doubtful and self._exploration > 0)  # or else it is tried first, below
        ):
            state.choice, state.changed = wanted, state.decisions
            state.switches += 1
        chosen = state.choice
        cause = "objective" if chosen == (RAW if gain > 0 else ENCODED) else "hysteresis"
        if first or (chosen, cause) != (state.standing[SKIP].choice, state.standing[SKIP].cause):
            stands = Decision(device, profile, chosen, cause, state.expected[chosen])
            state.standing = {watch: stands._replace(watch=watch) for watch in (SKIP, NOTE, 1, WATCH_EVERY)}
            state.passing = state.standing[SKIP]
        state.planned = None
        if state.changed != state.decisions and self._exploration > 0:
            extra = 0.0 if wanted == other else max(0.0, times[other] - times[chosen])
            starting = doubtful and (not known or extra < (NEAR - 1) * times[chosen])
            budget = self._budget(state, times, ratio, extra, starting=starting)
            if budget is not None:
                decision = Decision(device, profile, other, "exploration", state.expected[other], budget)
                state.planned = _Plan(decision, extra)

    def _doubtful(self, device: str, choice: Choice, profile: Profile, cell: Cell) -> bool:
        """Whether a road has to be taken again to know what it takes."""
        store = self._estimates.get(_kind(device, "store", choice, profile), _NOTHING).get(cell)
        load = self._estimates.get(_kind(device, "load", choice, profile), _NOTHING).get(cell)
        if store is None or store.doubtful:
            return True
        # Loads need not follow.
        return load is not None and load.doubtful and self._loads > 0 and store.count < 2 * FIRST_TRIES

    def _gain(self, times: Mapping[Choice, float], ratio: float) -> float:
        """How much raw serves the objective better than encoded, logarithm."""
        faster, larger = math.log(times[ENCODED] / times[RAW]), math.log(ratio)
        if self.objective == "latency":
            return faster
        if self.objective == "balanced":
            return faster - larger
        return -larger if larger > SLACK else faster

    def _budget(
        self, state: StoreLane, times: Mapping[Choice, float], ratio: float, extra: float, *, starting: bool
    ) -> bool | None:
        """Who pays the `extra` seconds of taking the road that is not chosen, to see what it takes.

        Returns:
            True: the budget of the first tries. False: that of the later ones, which are so seldom that they cost no
            more than a part `exploration` of the time. None: it is not worth it now.
        """
        if state.choice == ENCODED and self._gain({**times, RAW: times[RAW] / HOPELESS}, ratio) <= TO_RAW:
            return None
        if starting and (extra == 0 or self._explored[True] + extra <= self._allowance + FIRST_PART * self._seconds):
            return True
        every = max(TRY_EVERY, extra / times[state.choice] / self._exploration)
        if state.decisions - state.tried[_other(state.choice)] < every:
            return None
        return False if self._explored[False] + extra <= self._exploration * self._seconds else None

    def _state(self, device: str, profile: Profile, raw_bytes: int) -> StoreLane:
        key = (device, profile, size_class(raw_bytes))
        state = self._states.get(key)
        if state is None:
            if len(self._states) >= MOST_STATES:
                oldest = next(iter(self._states))
                self._settle(self._states.pop(oldest))
                self._known.clear()
                self.lanes.clear()
                self.last_store = None
            state = self._states[key] = StoreLane()
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
        ended = _Ended(_Known(raw_bytes, record_bytes, seconds))
        self.store_begun(decision, ended, self._clock() - seconds)

    def store_begun(self, decision: Decision, transfer: Running, started: float) -> None:
        """A store that is watched was queued, which will tell what it took.

        Args:
            decision: what was decided for it.
            transfer: the store.
            started: the clock's time of the call.
        """
        self._pending.append(_Begun(transfer, started, "store", decision.device, None, decision.watch, decision))

    def watch_load(self, device: str, codec: str, raw_bytes: int) -> int:
        """What to watch of a load that begins; see `LoadLane.watch`.

        Args:
            device: where the blocks lie.
            codec: of the first record.
            raw_bytes: bytes of the blocks' values.
        """
        return self.load_lane((device, raw_bytes)).watch(codec, raw_bytes)

    def load_lane(self, key: Hashable, *keep: object) -> LoadLane:
        """Loads of a size, by a key of the engine's own, and objects that the key names."""
        lane = self.loads.get(key)
        if lane is None:
            if len(self.loads) >= MOST_STATES:
                self.loads.clear()
            lane = self.loads[key] = LoadLane(keep)
        return lane

    def loaded(
        self,
        device: str,
        profile: Profile | None,
        raw_bytes: int,
        record_bytes: int,
        seconds: float,
        watch: int = 1,
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
        ended = _Ended(_Known(raw_bytes, record_bytes, seconds))
        self.load_begun(device, profile, ended, self._clock() - seconds, watch)

    def load_begun(self, device: str, profile: Profile | None, transfer: Running, started: float, watch: int) -> None:
        """A load that is watched was queued, which will tell what it took. See `loaded`, and `store_begun`."""
        self._pending.append(_Begun(transfer, started, "load", device, profile, watch, None))
        if len(self._pending) > MOST_PENDING // 2:  # nobody stores
            self.take_in()

    def take_in(self) -> None:
        """Learn from the transfers that have ended."""
        if self._lock.acquire(blocking=False):
            try:
                self._take_in()
            finally:
                self._lock.release()

    def _take_in(self) -> None:
        for _ in range(len(self._pending)):
            try:
                begun = self._pending.popleft()
            except IndexError:  # pragma: no cover - the oldest were forgotten meanwhile
                return
            if not begun.transfer._ended:
                self._pending.append(begun)
                continue
            outcome = begun.transfer._result
            if outcome is not None:  # it did not fail
                self._learn(begun, outcome)

    def _learn(self, begun: _Begun, outcome: Outcome) -> None:
        _, started, direction, device, profile, watch, decision = begun
        raw_bytes, record_bytes, seconds = outcome.raw_bytes, outcome.record_bytes, outcome.seconds
        # What it took without the time that it waited for others of its direction.
        way, ended = (device, direction), started + seconds
        own = max(ended - max(started, self._ends.get(way, -math.inf)), 1e-7)
        self._ends[way] = ended
        if watch <= 0 or raw_bytes <= 0 or record_bytes <= 0:
            return
        self._seconds += watch * own
        self._waiting[direction] += watch * max(0.0, seconds - own)
        ratio, size = raw_bytes / record_bytes, size_class(raw_bytes)
        if decision is None:
            choice = RAW if profile is None else ENCODED
        else:
            choice, profile = decision.choice, decision.profile
            if choice == ENCODED:
                self._learn_ratio(profile, ratio)
            if decision.cause == "exploration":
                self._explored[decision.starting] += max(0.0, own - decision.expected_seconds)
        kind = _kind(device, direction, choice, profile)
        cell = (size, _octaves(ratio) if choice == ENCODED else 0)
        estimate = self._estimates.get(kind, _NOTHING).get(cell)
        if estimate is None:
            cells = self._estimates.setdefault(kind, {})
            estimate = _Estimate(self._factor(device, direction, choice, profile, cell, raw_bytes, ratio))
            if any(at == size for at, _ in cells):  # at another ratio: much the same can be expected
                estimate.outdate(1.0)
            cells[cell] = estimate
            if len(self._estimates) > MOST_STATES:
                del self._estimates[next(iter(self._estimates))]
        self._serials[device, size] += 1
        before = estimate.serial
        model = self._prior(device).seconds(direction, choice, raw_bytes, ratio)
        change = estimate.add(own / model, self._serials[device, size])
        if change is not None:
            self._outdate(device, size, before, change)

    def _outdate(self, device: str, size: int, serial: int, change: float) -> None:
        """What transfers of a size take has changed: who knows what those take that were observed before that."""
        for (where, _, _), cells in self._estimates.items():
            for (at, _), estimate in cells.items() if where == device else ():
                if at == size and estimate.serial < serial:
                    estimate.outdate(min(1.0, change))  # what has eased one will have eased all

    def _learn_ratio(self, profile: Profile, ratio: float) -> None:
        known = self._ratios.get(profile)
        if known is None:
            if len(self._ratios) >= MOST_STATES:
                del self._ratios[next(iter(self._ratios))]
            known = self._ratios[profile] = _Estimate(SEEN_RATIO)
        known.add(ratio, 0)

    # ---- predictions

    def _ratio(self, profile: Profile) -> float:
        known = self._ratios.get(profile)
        return SEEN_RATIO if known is None else known.value

    def _factor(
        self,
        device: str,
        direction: Direction,
        choice: Choice,
        profile: Profile | None,
        cell: Cell,
        raw_bytes: int,
        ratio: float,
    ) -> float:
        """What a transfer takes over what the model says of it."""
        kind = _kind(device, direction, choice, profile)
        known = self._estimates.get(kind, _NOTHING).get(cell)
        if known is not None:
            return known.value
        # What was never seen is as far from the model as its neighbour; as the other road; as the other direction.
        raw, encoded = _kind(device, direction, RAW, None), _kind(device, direction, ENCODED, profile)
        for near_kind in (kind, raw, encoded, _kind(device, "store", RAW, None)):
            cells = self._estimates.get(near_kind)
            if not cells:
                continue
            near = min(cells, key=lambda at: (abs(at[0] - cell[0]) + 0.3 * abs(at[1] - cell[1]), at))
            factor = cells[near].value
            if near[0] < cell[0]:  # what a smaller one took beside the model is no matter of its bytes
                prior = self._prior(device)
                model = prior.seconds(direction, choice, raw_bytes, ratio)
                return max(1 + (factor - 1) * prior.seconds(direction, choice, _middle(near[0]), ratio) / model, 0.25)
            return factor
        return 1.0

    def _expected(self, device: str, direction: Direction, choice: Choice, profile: Profile, raw_bytes: int) -> float:
        ratio = self._ratio(profile)
        cell = (size_class(raw_bytes), _octaves(ratio) if choice == ENCODED else 0)
        model = self._prior(device).seconds(direction, choice, raw_bytes, ratio)
        return model * self._factor(device, direction, choice, profile, cell, raw_bytes, ratio)

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
            self._take_in()
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
            for (device, direction, moved), cells in self._estimates.items():
                if moved == RAW:
                    size, octave = max(cells)
                    seconds = self._prior(device).seconds(direction, RAW, _middle(size), 1.0)
                    links[device, direction] = _middle(size) / (seconds * cells[size, octave].value)
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


def _other(choice: Choice) -> Choice:
    return ENCODED if choice == RAW else RAW


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
