"""The bookkeeping of resumption."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from transport.core.connection import Inbox, Outbox, Rounds
from transport.errors import FrameOutOfOrderError


@dataclass(frozen=True)
class Frame:
    sequence: int
    kept_bytes: int = 10


def outbox_of(*sequences: int) -> Outbox[Frame]:
    outbox: Outbox[Frame] = Outbox(window_bytes=25, window_frames=3)
    outbox.resume(0)
    for sequence in sequences:
        outbox.add(Frame(sequence))
    return outbox


def test_frames_are_numbered_without_gaps() -> None:
    outbox = outbox_of(1, 2)
    assert outbox.next_sequence == 3
    with pytest.raises(ValueError, match="3 is next"):
        outbox.add(Frame(4))


def test_the_window_is_bounded_in_bytes_and_frames() -> None:
    outbox = outbox_of(1, 2)
    assert outbox.room_for(5)
    assert not outbox.room_for(6)
    outbox.add(Frame(3, kept_bytes=0))
    assert not outbox.room_for(0)
    outbox.acknowledged(1)
    assert outbox.room_for(15)


def test_an_empty_window_takes_any_frame() -> None:
    assert outbox_of().room_for(1000)


def test_answers_come_in_order() -> None:
    outbox = outbox_of(1, 2)
    with pytest.raises(FrameOutOfOrderError):
        outbox.acknowledged(2)
    assert outbox.acknowledged(1) == Frame(1)
    assert outbox.acknowledged(2) == Frame(2)
    with pytest.raises(FrameOutOfOrderError):
        outbox.acknowledged(3)


def test_resuming_drops_what_arrived_and_keeps_the_rest() -> None:
    outbox = outbox_of(1, 2, 3)
    assert outbox.resume(2) == ([Frame(1), Frame(2)], [Frame(3)])
    assert outbox.pending == 1
    assert outbox.room_for(15)
    assert outbox.resume(2) == ([], [Frame(3)])
    assert outbox.resume(3) == ([Frame(3)], [])


def test_a_target_that_lost_its_memory_is_noticed() -> None:
    outbox = outbox_of(1, 2, 3)
    outbox.acknowledged(1)
    with pytest.raises(FrameOutOfOrderError):
        outbox.resume(0)


def test_a_target_that_claims_too_much_is_noticed() -> None:
    with pytest.raises(FrameOutOfOrderError):
        outbox_of(1, 2).resume(3)


def test_a_second_sender_goes_on_with_the_numbers_of_the_first() -> None:
    outbox: Outbox[Frame] = Outbox()
    assert outbox.resume(7) == ([], [])
    assert outbox.next_sequence == 8
    with pytest.raises(FrameOutOfOrderError):
        outbox.resume(9)


def test_the_inbox_takes_the_next_frame_only() -> None:
    inbox = Inbox()
    for wrong in (0, 2):
        with pytest.raises(FrameOutOfOrderError):
            inbox.expect(wrong)
    inbox.expect(1)
    inbox.done(1, bytes(range(32)))
    assert (inbox.applied, inbox.digest) == (1, bytes(range(32)))
    with pytest.raises(FrameOutOfOrderError):
        inbox.expect(1)
    inbox.expect(2)


def test_rounds_do_not_go_back() -> None:
    rounds = Rounds()
    for number in (0, 3, 3):
        rounds.admit(number)
    with pytest.raises(FrameOutOfOrderError):
        rounds.admit(2)
