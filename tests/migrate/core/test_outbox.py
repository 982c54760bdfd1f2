"""The outbox: whatever breaks when, each message is heard once and in order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.core.outbox import Outbox
from migrate.errors import ProtocolError


@given(seed=st.integers(0, 1 << 32), count=st.integers(0, 60), breaks=st.floats(0, 0.9))
def test_every_message_is_heard_once_and_in_order(seed: int, count: int, breaks: float) -> None:
    """A connection carries some of what was written to it, and then breaks."""
    chance = random.Random(seed)
    outbox = Outbox(messages_max=count + 1)
    heard: list[str] = []
    on_the_way: list[str] = []
    for number in range(count):
        outbox.add(str(number))
        on_the_way.append(str(number))
        while chance.random() < breaks:
            heard += on_the_way[: chance.randint(0, len(on_the_way))]
            on_the_way = list(outbox.resume(len(heard)))
    heard += on_the_way
    assert heard == [str(number) for number in range(count)]


def test_counts_that_can_not_be_are_refused() -> None:
    outbox = Outbox()
    for text in "abc":
        outbox.add(text)
    with pytest.raises(ProtocolError, match="has heard 4 messages, but 0 to 3"):
        outbox.resume(4)
    with pytest.raises(ProtocolError):
        outbox.resume(-1)
    assert outbox.resume(2) == ("c",)
    # What was said to be heard is forgotten.
    with pytest.raises(ProtocolError, match="has heard 1 messages, but 2 to 3"):
        outbox.resume(1)
    assert outbox.resume(2) == ("c",)
    assert outbox.resume(3) == ()


def test_it_is_bounded_and_leaves_no_gap() -> None:
    few = Outbox(messages_max=2)
    small = Outbox(bytes_max=5)
    for text in ("aa", "bb", "cc"):
        few.add(text)
        small.add(text)
    for outbox in (few, small):
        assert not outbox.can_resume(0)
        assert outbox.resume(1) == ("bb", "cc")
    # One that is larger than the limit is kept alone: it is about to be sent.
    small.add("dddddd")
    assert small.resume(3) == ("dddddd",)
