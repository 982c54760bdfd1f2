"""Images that are made those of a copy: CRIU's own library reads from them what was renamed."""

from __future__ import annotations

import contextlib
import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_glue.core.renaming import rename_addresses, rename_cgroups, rename_host
from criu_glue.core.wire import ImageFormatError
from tests.criu_glue.checkpoint_images import image
from tests.criu_glue.test_timers import entries, timer

OWNER = {"uid": 64, "euid": 56, "signum": 0, "pid_type": 0, "pid": 0}
OLD4, NEW4 = ipaddress.ip_address("10.77.0.50"), ipaddress.ip_address("10.77.0.250")
OLD6, NEW6 = ipaddress.ip_address("fd77::50"), ipaddress.ip_address("fd77::fa:ce")
RENAMED: Any = {OLD4: NEW4, OLD6: NEW6}


def socket(number: int, family: int, source: str, destination: str) -> dict[str, Any]:
    """A TCP socket of a files image."""
    return {
        "type": "INETSK",
        "id": number,
        "isk": {
            "id": number,
            "ino": 7,
            "family": family,
            "type": 1,
            "proto": 6,
            "state": 10,
            "src_port": 7000,
            "dst_port": 0,
            "flags": 2,
            "backlog": 128,
            "fown": OWNER,
            "src_addr": [source],
            "dst_addr": [destination],
            "v6only": True,
            "opts": {
                "so_sndbuf": 1,
                "so_rcvbuf": 2,
                "so_snd_tmo_sec": 0,
                "so_snd_tmo_usec": 0,
                "so_rcv_tmo_sec": 0,
                "so_rcv_tmo_usec": 0,
            },
        },
    }


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [
        (2, "10.77.0.50", "10.77.0.250"),
        (2, "0.0.0.0", "0.0.0.0"),
        (2, "10.77.0.51", "10.77.0.51"),
        (10, "fd77::50", "fd77::fa:ce"),
        (10, "::", "::"),
        (10, "::ffff:10.77.0.50", "::ffff:10.77.0.250"),
    ],
)
def test_own_addresses_are_renamed_and_nothing_else(family: int, before: str, after: str) -> None:
    other = timer(9, ticks=0, left=(1, 0), period=(1, 0))
    files = image("FILES", [socket(1, family, before, before), other])
    wanted = image("FILES", [socket(1, family, after, after), other])
    assert entries(rename_addresses(files, RENAMED)) == entries(wanted)
    assert rename_addresses(rename_addresses(files, RENAMED), RENAMED) == rename_addresses(
        files, RENAMED
    )


@pytest.mark.parametrize("name", ["ram", "sheep-17", "a" * 64])
def test_a_host_name_is_replaced(name: str) -> None:
    image_of = [{"nodename": "original", "domainname": "(none)"}]
    wanted = [{"nodename": name, "domainname": "(none)"}]
    assert rename_host(image("UTSNS", image_of), name) == image("UTSNS", wanted)


def test_addresses_stay_in_their_family() -> None:
    with pytest.raises(ImageFormatError, match="of another family"):
        rename_addresses(image("FILES", []), {OLD4: NEW6})


@given(st.binary(max_size=200))
def test_a_damaged_image_is_an_error_and_no_crash(tail: bytes) -> None:
    with contextlib.suppress(ImageFormatError):
        rename_addresses(image("FILES", [])[:8] + tail, RENAMED)
    with contextlib.suppress(ImageFormatError):
        rename_host(image("UTSNS", [])[:8] + tail, "ram")
    with contextlib.suppress(ImageFormatError):
        rename_cgroups(image("CGROUP", [])[:8] + tail, "/dolly/ram")


@pytest.mark.parametrize(
    ("before", "hidden", "after", "hidden_after"),
    [
        ("/dolly/ewe", 10, "/dolly/lamb-1", 13),
        ("/dolly/ewe/web", 10, "/dolly/lamb-1/web", 13),
        ("/dolly/ewe", 0, "/dolly/lamb-1", 0),
        ("/dolly", 6, "/dolly", 6),
        ("/", 0, "/", 0),
        ("/init.scope", 0, "/init.scope", 0),
    ],
)
def test_tasks_are_in_the_cgroup_of_the_copy(
    before: str, hidden: int, after: str, hidden_after: int
) -> None:
    def groups(path: str, hidden: int) -> bytes:
        other = {"name": "pids", "path": "/dolly/ewe", "cgns_prefix": 10}
        member = {"name": "", "path": path, "cgns_prefix": hidden}
        return image("CGROUP", [{"sets": [{"id": 1, "ctls": [other, member]}]}])

    renamed = rename_cgroups(groups(before, hidden), "/dolly/lamb-1")
    assert renamed == groups(after, hidden_after)
