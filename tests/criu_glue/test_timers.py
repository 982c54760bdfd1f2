"""Periodic timers of the files image that CRIU would restore as off."""

from __future__ import annotations

import io
import struct
import warnings
from typing import Any

import pytest

from criu_glue.core.timers import FILES_MAGIC, rearm_timers
from criu_glue.core.wire import IMG_COMMON_MAGIC, ImageFormatError
from tests.criu_glue.checkpoint_images import image, images


def timer(number: int, *, ticks: int, left: tuple[int, int], period: tuple[int, int]) -> Any:
    """A timerfd; left, period: seconds and nanoseconds."""
    owner = {"uid": 64, "euid": 56, "signum": 0, "pid_type": 0, "pid": 0}
    return {
        "type": "TIMERFD",
        "id": number,
        "tfd": {
            "id": number,
            "flags": 2048,
            "fown": owner,
            "clockid": 1,
            "ticks": ticks,
            "settime_flags": 0,
            "vsec": left[0],
            "vnsec": left[1],
            "isec": period[0],
            "insec": period[1],
        },
    }


def entries(data: bytes) -> list[Any]:
    """The files of an image, as CRIU's own library reads them."""
    with warnings.catch_warnings():
        # As for `image`: it asks protobuf in a way that is going away.
        warnings.simplefilter("ignore", DeprecationWarning)
        found: list[Any] = images.load(io.BytesIO(data))["entries"]
    return found


def left_after(*files: Any) -> list[tuple[int, int]]:
    """What the timers among these files have left after they were armed again; all else is as it
    was."""
    before = image("FILES", list(files))
    after = entries(rearm_timers(before))
    left = [(one["tfd"].pop("vsec"), one["tfd"].pop("vnsec")) for one in after if "tfd" in one]
    unchanged = entries(before)
    for one in unchanged:
        if "tfd" in one:
            del one["tfd"]["vsec"], one["tfd"]["vnsec"]
    assert after == unchanged
    return left


def test_a_periodic_timer_that_was_not_read_goes_on() -> None:
    assert left_after(
        timer(1, ticks=1, left=(0, 0), period=(0, 50_000_000)),
        timer(2, ticks=56 << 7 | 56, left=(0, 0), period=(3600, 0)),
    ) == [(0, 1), (0, 1)]


@pytest.mark.parametrize(
    ("ticks", "left", "period"),
    [
        (0, (0, 0), (1, 0)),  # switched off, its period left set
        (1, (0, 0), (0, 0)),  # went off, and only once
        (1, (0, 7), (1, 0)),
        (0, (5, 0), (1, 0)),
        (0, (0, 0), (0, 0)),
    ],
)
def test_other_timers_stay_as_they_are(
    ticks: int, left: tuple[int, int], period: tuple[int, int]
) -> None:
    assert left_after(timer(1, ticks=ticks, left=left, period=period)) == [left]


def test_other_files_stay_as_they_are() -> None:
    owner = {"uid": 0, "euid": 0, "signum": 0, "pid_type": 0, "pid": 0}
    counter = {"id": 1, "flags": 2, "fown": owner, "counter": 0}
    pipe = {"id": 2, "pipe_id": 3, "flags": 0, "fown": owner}
    files = [
        {"type": "EVENTFD", "id": 1, "efd": counter},
        timer(3, ticks=9, left=(0, 0), period=(1, 1)),
        {"type": "PIPE", "id": 2, "pipe": pipe},
    ]
    assert left_after(*files) == [(0, 1)]
    assert rearm_timers(image("FILES", [])) == image("FILES", [])


def test_what_is_no_files_image_is_refused() -> None:
    good = image("FILES", [timer(1, ticks=1, left=(0, 0), period=(1, 0))])
    for bad in (b"", b"x" * 64, good[:-1], image("MM", [])):
        with pytest.raises(ImageFormatError):
            rearm_timers(bad)


@pytest.mark.parametrize(
    "fields",
    [
        b"\x35\x00\x38\x00\x40",  # a number of four bytes that holds the bytes of two fields
        b"\x38\x00\x40\x00",  # "no time left", once more
    ],
)
def test_a_timer_whose_fields_are_not_what_they_seem_is_refused(fields: bytes) -> None:
    timer_ = b"\x28\x01" + fields + b"\x38\x00\x40\x00\x48\x01\x50\x00"
    entry = b"\x08\x11\x62" + bytes([len(timer_)]) + timer_
    image_ = struct.pack("<III", IMG_COMMON_MAGIC, FILES_MAGIC, len(entry)) + entry
    with pytest.raises(ImageFormatError, match="twice, or of a kind"):
        rearm_timers(image_)
