"""Every order in which a prefill and a decode engine, the router and the channels between them can move, and fail.

Two channels lead to the router and two away from it; they keep their order unless a fault breaks it. What an engine is
told waits until a step takes some of it; what a step tells arrives as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

from shoal.cluster.workers.wire import Command, Event

from .engine import EngineSettings
from .handoff_parts import Desk, Site, message_key
from .interned import Interned
from .messages import may_get_lost
from .model import Payload, Row

Action = tuple[Any, ...]
"""Its name and its arguments."""
DEAD = -1
WAIT: Action = ("wait",)
FAULTS = ("abort", "kill", "lose", "repeat", "swap", "spoil", "preempt", "time passes")


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What is searched."""

    rows: Mapping[str, Row]
    settings: tuple[EngineSettings, EngineSettings]
    """Settings of the prefill and of the decode engine."""
    faults: tuple[str, ...] = FAULTS
    """Each kind may happen once."""
    max_faults: int
    """Most faults of all kinds together."""


class State(NamedTuple):
    """The numbers of its parts."""

    sites: tuple[int, ...]
    desk: int
    commands: tuple[tuple[int, ...], ...]
    """On their way to each side."""
    told: tuple[tuple[tuple[int, ...], ...], ...]
    """On its way from each side, step by step."""
    known_dead: tuple[bool, ...]
    faults: frozenset[str]
    """Faults that happened."""


@dataclass
class Searched:
    """How much there was to see."""

    num_states: int
    num_steps: int
    """From a state to another one, or to itself."""
    num_ends: int


@dataclass(slots=True)
class _Node:
    """A state, and how it was first reached."""

    state: State
    parent: int
    action: Action
    following: list[int] = field(default_factory=list)
    """Reached without a further fault."""
    is_end: bool = False


class Search:
    """Visits the states in a scope."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.sites: Interned[Site] = Interned()
        self.desks: Interned[Desk] = Interned()
        self.messages: list[Command | Event] = []
        self._numbers: dict[Any, int] = {}
        self._new = [self.sites.add(Site(settings, scope.rows)) for settings in scope.settings]
        self._nodes: list[_Node] = []
        self._places: dict[State, int] = {}
        desk = self.desks.add(Desk(scope.settings, scope.rows))
        first = State(tuple(self._new), desk, ((), ()), ((), ()), (False, False), frozenset())
        self._first = self._ask(first, "submit")

    def run(self) -> Searched:
        """Visit every state, the nearest first; AssertionError with the shortest way to one where something is wrong.

        Wherever nothing happens any more, even when time passes, all must be answered and nothing left behind; and from
        every state there must be a way to such an end without further faults.
        """
        self._visit(self._first, -1, ())
        num_steps = 0
        for place, node in enumerate(self._nodes):  # it grows
            actions = [(action, False) for action in self._actions(node.state)]
            actions += [(action, True) for action in self._faults(node.state)]
            num_steps += len(actions)
            for action, is_fault in actions:
                self._follow(place, action, is_fault=is_fault)
            if not node.following:
                self._follow(place, WAIT, is_fault=False)
            if not node.following:
                node.is_end = True
                with _on_the_way(self._way(place), "the end"):
                    self._check_end(node.state)
        self._check_ends_are_reached()
        return Searched(len(self._nodes), num_steps, sum(node.is_end for node in self._nodes))

    def walk(self, rng: Random, *, fault_rate: float) -> int:
        """Go one way to an end, for scopes too large to be searched; its length. AssertionError as of `run`."""
        state = self._first
        way: list[Action] = []
        while True:
            actions, faults = list(self._actions(state)), list(self._faults(state))
            action = rng.choice(faults if faults and rng.random() < fault_rate else actions)
            with _on_the_way(way, action):
                after = self._after(state, action)
                if after == state and all(self._after(state, a) == state for a in actions):
                    action = WAIT
                    after = self._after(state, WAIT)
                    if after == state:
                        self._check_end(state)
                        return len(way)
            if after != state:
                way.append(action)
            state = after

    def _follow(self, place: int, action: Action, *, is_fault: bool) -> None:
        state = self._nodes[place].state
        try:
            after = self._after(state, action)
        except Exception as error:
            raise AssertionError(_listed(self._way(place), action, error)) from error
        if after != state:
            found = self._visit(after, place, action)
            if not is_fault:
                self._nodes[place].following.append(found)

    def _visit(self, state: State, parent: int, action: Action) -> int:
        place = self._places.setdefault(state, len(self._nodes))
        if place == len(self._nodes):
            self._nodes.append(_Node(state, parent, action))
        return place

    # -- what can happen ---------------------------------------------------------------------------------------------

    def _actions(self, state: State) -> Iterator[Action]:
        """Without faults."""
        for side, site in enumerate(state.sites):
            if state.told[side]:
                yield "deliver", side
            if site == DEAD:
                yield ("restore", side) if state.known_dead[side] else ("learn", side)
                continue
            reading = self.sites.view(site, "reading", lambda s: s.reading)
            for num_taken in range(len(state.commands[side]) + 1):
                for arriving in range(1 << len(reading)):
                    yield "step", side, num_taken, arriving, False

    def _faults(self, state: State) -> Iterator[Action]:
        """What may go wrong, as far as it may."""
        if len(state.faults) < self.scope.max_faults:
            possible = set(self.scope.faults) - state.faults
            for action in self._all_faults(state):
                if action[0] in possible:
                    yield action

    def _all_faults(self, state: State) -> Iterator[Action]:
        yield ("time passes",)
        for row in self.desks.view(state.desk, "open", lambda d: d.open):
            yield "abort", row
        for side, site in enumerate(state.sites):
            for place, message in enumerate(state.commands[side]):
                if may_get_lost(self.messages[message]):
                    for name in ("lose", "repeat", "swap"):
                        yield name, "commands", side, 0, place
            for batch, events in enumerate(state.told[side]):
                for place, message in enumerate(events):
                    yield "repeat", "told", side, batch, place
                    if may_get_lost(self.messages[message]):
                        yield "lose", "told", side, batch, place
                        yield "swap", "told", side, batch, place
            if site == DEAD:
                continue
            yield "kill", side
            for seq_id in self.sites.view(site, "preemptible", lambda s: s.preemptible):
                yield "preempt", side, seq_id
            reading = self.sites.view(site, "reading", lambda s: s.reading)
            for number in range(len(reading)):
                yield "spoil", side, 0, 1 << number, True

    # -- what happens then -------------------------------------------------------------------------------------------

    def _after(self, state: State, action: Action) -> State:
        after = self._apply(state, action)
        return after._replace(faults=after.faults | {action[0]}) if action[0] in FAULTS else after

    def _apply(self, state: State, action: Action) -> State:
        match action:
            case "deliver", side:
                batch, *rest = state.told[side]
                events = [self.messages[i] for i in batch]
                state = state._replace(told=_put(state.told, side, tuple(rest)))
                return self._ask(state, "hear", side, events, name=("hear", side, batch))
            case (("step" | "spoil"), side, num_taken, arriving, spoiled):
                return self._step(state, side, num_taken, arriving, spoiled=spoiled)
            case "kill", side:
                state = state._replace(sites=_put(state.sites, side, DEAD))
                return state._replace(told=_put(state.told, side, ()))
            case "learn", side:
                state = state._replace(known_dead=_put(state.known_dead, side, True))
                return self._ask(state._replace(commands=_put(state.commands, side, ())), "lose", side)
            case "restore", side:
                state = state._replace(known_dead=_put(state.known_dead, side, False))
                return self._ask(state._replace(sites=_put(state.sites, side, self._new[side])), "restore", side)
            case "abort", row:
                return self._ask(state, "abort", row)
            case "preempt", side, seq_id:
                site, _ = self.sites.step(state.sites[side], action, lambda s: s.preempt(seq_id))
                return state._replace(sites=_put(state.sites, side, site))
            case (("time passes" | "wait"), *_):
                return state._replace(sites=tuple(map(self._later, state.sites)))
            case ("lose" | "repeat" | "swap") as how, "commands", side, _, place:
                return state._replace(commands=_put(state.commands, side, _disturb(state.commands[side], place, how)))
            case ("lose" | "repeat" | "swap") as how, "told", side, batch, place:
                batches = state.told[side]
                batches = _put(batches, batch, _disturb(batches[batch], place, how))
                return state._replace(told=_put(state.told, side, batches))
        raise AssertionError(f"no such action: {action}")

    def _step(self, state: State, side: int, num_taken: int, arriving: int, *, spoiled: bool) -> State:
        site = state.sites[side]
        taken, left = state.commands[side][:num_taken], state.commands[side][num_taken:]
        other = state.sites[1 - side]
        published: Mapping[int, Payload] = {}
        if other != DEAD:
            published = self.sites.view(other, "published", lambda s: s.transport.published)
        reads: list[tuple[int, Payload | None]] = []
        for place, (number, generation) in enumerate(self.sites.view(site, "reading", lambda s: s.reading)):
            if arriving >> place & 1:
                payload = published.get(generation)
                reads.append((number, _flipped(payload) if spoiled and payload is not None else payload))
        commands: Any = [self.messages[i] for i in taken]
        after, events = self.sites.step(
            site, ("step", taken, tuple(reads)), lambda s: tuple(map(self._number, s.step(commands, reads)))
        )
        told = (*state.told[side], events) if events else state.told[side]
        return state._replace(
            sites=_put(state.sites, side, after),
            commands=_put(state.commands, side, left),
            told=_put(state.told, side, told),
        )

    def _later(self, site: int) -> int:
        if site == DEAD:
            return site
        seconds = max(settings.transfer_timeout_s for settings in self.scope.settings)
        return self.sites.step(site, "later", lambda s: s.pass_time(seconds))[0]

    def _ask(self, state: State, method: str, *arguments: Any, name: Any = None) -> State:
        """Let the router decide, and put what it sends on its ways."""
        desk, sent = self.desks.step(
            state.desk,
            name or (method, *arguments),
            lambda d: [(side, self._number(command)) for side, command in getattr(d, method)(*arguments)],
        )
        commands = list(state.commands)
        for side, command in sent:
            assert not state.known_dead[side], "a group was told something that is lost"
            commands[side] += (command,)
        return state._replace(desk=desk, commands=tuple(commands))

    def _number(self, message: Command | Event) -> int:
        number = self._numbers.setdefault(message_key(message), len(self.messages))
        if number == len(self.messages):
            self.messages.append(message)
        return number

    # -- how it ends -------------------------------------------------------------------------------------------------

    def _check_end(self, state: State) -> None:
        self.desks.view(state.desk, "end", lambda d: d.check_end())
        for site in state.sites:
            self.sites.view(site, "end", lambda s: s.engine.check_nothing_left())
        if not self.scope.max_faults:
            self.desks.view(state.desk, "fair end", lambda d: d.check_fair_end())

    def _check_ends_are_reached(self) -> None:
        before: list[list[int]] = [[] for _ in self._nodes]
        for place, node in enumerate(self._nodes):
            for following in node.following:
                before[following].append(place)
        reaching = [node.is_end for node in self._nodes]
        to_visit = [place for place, is_end in enumerate(reaching) if is_end]
        while to_visit:
            for place in before[to_visit.pop()]:
                if not reaching[place]:
                    reaching[place] = True
                    to_visit.append(place)
        if not all(reaching):
            raise AssertionError(_listed(self._way(reaching.index(False)), "from here on", "there is no end"))

    def _way(self, place: int) -> list[Action]:
        """The actions that lead to a state."""
        actions: list[Action] = []
        while place > 0:
            actions.append(self._nodes[place].action)
            place = self._nodes[place].parent
        return actions[::-1]


@contextmanager
def _on_the_way(way: list[Action], last: object) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise AssertionError(_listed(way, last, error)) from error


def _listed(way: list[Action], last: object, problem: object) -> str:
    return "\n".join(["the way there:", *map(repr, way), f"{last}: {problem!r}"])


def _put(values: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*values[:place], value, *values[place + 1 :])


def _disturb(messages: tuple[int, ...], place: int, how: str) -> tuple[int, ...]:
    """One message less, one more, or one after the next."""
    before, message, after = messages[:place], messages[place], messages[place + 1 :]
    if how == "lose":
        return before + after
    if how == "repeat":
        return (*before, message, message, *after)
    return before + after[:1] + (message,) + after[1:]


def _flipped(payload: Payload) -> Payload:
    return Payload(bytes([payload[0] ^ 1]) + payload[1:])
