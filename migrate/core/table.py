"""What both state machines share: a transition table, one step in it, and its picture.

A table is a dict {(state, event kind): (next state, actions)}. It is everything that decides what
can happen; this module only looks things up in it. A pair without a row is refused.
"""

from __future__ import annotations

import textwrap
from collections import deque
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from migrate.errors import InvalidTransition

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Set

StateT = TypeVar("StateT", bound=StrEnum)
KindT = TypeVar("KindT", bound=StrEnum)
ActionT = TypeVar("ActionT", bound=StrEnum)


class Verdict(StrEnum):
    """What a held CRIU is to do when whoever drove the migration is gone. Each machine has a table
    of them by its last recorded state."""

    UNDO = "undo"  # source: give the tasks back; target: kill the copy
    HOLD = "hold"  # only the peer or an operator knows
    LET_GO = "let_go"  # source: let the frozen tasks die; target: let the copy run


HISTORY_LIMIT: Final = 64
"""Transitions kept for error messages: a whole migration with a dozen rounds fits."""


def merge_rows(
    *groups: Mapping[tuple[StateT, KindT], tuple[StateT, tuple[ActionT, ...]]],
) -> Mapping[tuple[StateT, KindT], tuple[StateT, tuple[ActionT, ...]]]:
    """One read-only table of all groups. A pair that has two rows is an error of the author."""
    table: dict[tuple[StateT, KindT], tuple[StateT, tuple[ActionT, ...]]] = {}
    for group in groups:
        for pair, row in group.items():
            if pair in table:
                raise ValueError(f"two rows for {pair}")
            table[pair] = row
    return MappingProxyType(table)


def ignored(
    states: Iterable[StateT], kinds: Iterable[KindT]
) -> dict[tuple[StateT, KindT], tuple[StateT, tuple[ActionT, ...]]]:
    """Rows that change nothing and ask for nothing, for each of `states` with each of `kinds`."""
    wanted = tuple(kinds)
    return {(state, kind): (state, ()) for state in states for kind in wanted}


def followers(
    table: Mapping[tuple[StateT, KindT], tuple[StateT, tuple[ActionT, ...]]],
    recorded: Set[StateT],
    start: StateT,
) -> Mapping[StateT, frozenset[StateT]]:
    """For `start` and each recorded state, the recorded ones that can come next in a journal."""
    after_one: dict[StateT, set[StateT]] = {}
    for (before, _), (after, _) in table.items():
        after_one.setdefault(before, set()).add(after)
    result: dict[StateT, frozenset[StateT]] = {}
    for first in {start, *recorded}:
        seen: set[StateT] = set()
        waiting = list(after_one.get(first, ()))
        while waiting:
            state = waiting.pop()
            if state not in seen:
                seen.add(state)
                waiting += () if state in recorded else after_one.get(state, ())
        result[first] = frozenset(seen & recorded) - {first}
    return MappingProxyType(result)


class Machine(Generic[StateT, KindT, ActionT]):
    """A state with the way that led to it. Holds no other knowledge than its table."""

    def __init__(
        self,
        name: str,
        table: Mapping[tuple[StateT, KindT], tuple[StateT, tuple[ActionT, ...]]],
        state: StateT,
    ) -> None:
        self._name = name
        self._table = table
        self._state = state
        self._history: deque[tuple[StateT, KindT]] = deque(maxlen=HISTORY_LIMIT)

    @property
    def state(self) -> StateT:
        """The state now."""
        return self._state

    def enter(self, state: StateT) -> None:
        """Go on where a process before this one has ended."""
        self._state = state

    @property
    def history(self) -> tuple[tuple[StateT, KindT], ...]:
        """The last `HISTORY_LIMIT` transitions as (state before, event kind), oldest first."""
        return tuple(self._history)

    def allows(self, kind: KindT) -> bool:
        """Whether the table has a row for `kind` in the state now."""
        return (self._state, kind) in self._table

    def feed(self, kind: KindT) -> tuple[ActionT, ...]:
        """Take one event. Raises `InvalidTransition`, and stays as it was, if it has no row."""
        before = self._state
        row = self._table.get((before, kind))
        if row is None:
            raise InvalidTransition(self._name, before, kind, self._history)
        self._history.append((before, kind))
        self._state, actions = row
        return actions


def diagram(
    table: Mapping[tuple[StateT, KindT], tuple[StateT, tuple[ActionT, ...]]],
    states: Iterable[StateT],
    names: Mapping[str, frozenset[KindT]] | None = None,
) -> str:
    """The transitions that change the state, as text: one line per pair of states, wrapped.

    `names` gives sets of events that are shown by one name where all of them lead the same way.
    Docstrings contain this text and a test compares them.
    """
    lines: list[str] = []
    for state in states:
        edges: dict[StateT, set[KindT]] = {}
        for (before, kind), (after, _) in table.items():
            if before is state and after is not state:
                edges.setdefault(after, set()).add(kind)
        for after, kinds in sorted(edges.items(), key=lambda edge: str(edge[0])):
            lines += _edge(state, after, kinds, names or {})
    return "\n".join(lines)


def _edge(
    before: StateT, after: StateT, kinds: set[KindT], names: Mapping[str, frozenset[KindT]]
) -> list[str]:
    labels: list[str] = []
    for name, group in names.items():
        if group <= kinds:
            labels.append(name)
            kinds = kinds - group
    labels += sorted(str(kind) for kind in kinds)
    head = f"{before.upper():<13} -> {after.upper():<13} "
    return textwrap.wrap(
        ", ".join(labels), width=96, initial_indent=head, subsequent_indent=" " * len(head)
    )
