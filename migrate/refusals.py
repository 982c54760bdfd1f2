"""What a check before a migration says: why it would fail, and what to do about it.

Pure shapes, tuples as `errors.PreflightRefused` takes them; on the wire `core.messages.Refusal`.
"""

from __future__ import annotations

from typing import NamedTuple


class Refusal(NamedTuple):
    """A blocker. `code` is stable (scripts and docs name it); `message` and `remedy` are one
    sentence each, without a full stop.
    """

    code: str
    message: str
    remedy: str


class Caution(NamedTuple):
    """Something that works, but worse or otherwise than its user may expect; fields as above."""

    code: str
    message: str
    remedy: str


class Findings(NamedTuple):
    """What a check found: both empty is the best answer."""

    refusals: tuple[Refusal, ...] = ()
    cautions: tuple[Caution, ...] = ()
