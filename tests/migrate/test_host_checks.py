"""What is refused of a host, by what CRIU, the kernel and the bridges say."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrate.host_checks import (
    bridge_refusals,
    first_error,
    judge_bridge,
    judge_cautions,
    judge_criu,
    judge_descriptors,
    open_swaps,
    space_refusals,
    version_of,
)

CHECK_FAILS = """\
(00.000790) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: not permitted
(00.001200) Warn  (criu/kerndat.c:12): something
(00.003) Error (criu/cr-check.c:1450): UFFD is not supported
(00.004) Error (criu/cr-check.c:1500): and more
"""


def test_the_line_that_tells_why() -> None:
    assert first_error(CHECK_FAILS) == "UFFD is not supported"
    assert first_error("Looks good.\n") == ""
    assert first_error("Error without a place") == "Error without a place"
    assert len(first_error("Error (x.c:1): " + "y" * 5000)) <= 300


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("4.2.1", (4, 2, 1)), ("4.2", (4, 2)), ("4.3-rc1", (4, 3)), ("v4", ()), ("", ())],
)
def test_versions(text: str, numbers: tuple[int, ...]) -> None:
    assert version_of(text) == numbers


@pytest.mark.parametrize(
    ("version", "failure", "codes"),
    [
        ("4.2.1", "", []),
        ("4.10", "", []),
        ("5.0", "", []),
        ("4.1.1", "", ["criu-version"]),
        ("3.17.1", "UFFD is not supported", ["criu-version"]),
        ("", "", ["criu-version"]),
        ("4.2", "UFFD is not supported", ["criu-check"]),
    ],
)
def test_criu(version: str, failure: str, codes: list[str]) -> None:
    refusals = judge_criu(version, failure)
    assert [refusal.code for refusal in refusals] == codes
    assert all(failure in refusal.message for refusal in refusals if refusal.code == "criu-check")


@pytest.mark.parametrize(
    ("facts", "codes"),
    [
        ({}, []),
        ({"is_bridge": False}, ["bridge"]),
        ({"is_up": False}, ["bridge"]),
        ({"has_spanning_tree": True}, ["bridge-stp"]),
        ({"has_vlans": True}, ["bridge-vlan"]),
        ({"has_vlans": True, "has_spanning_tree": True}, ["bridge-stp", "bridge-vlan"]),
    ],
)
def test_bridges(facts: dict[str, bool], codes: list[str]) -> None:
    ordinary = {"is_bridge": True, "is_up": True, "has_spanning_tree": False, "has_vlans": False}
    refusals = judge_bridge("br7", **(ordinary | facts))
    assert [refusal.code for refusal in refusals] == codes
    assert all("br7" in refusal.message for refusal in refusals)


def test_what_is_no_bridge() -> None:
    for name in ("lo", "no-such-bridge"):
        assert [refusal.code for refusal in bridge_refusals(name)] == ["bridge"]


def test_cautions() -> None:
    assert judge_cautions("always [madvise] never", [], []) == []
    assert judge_cautions("", [], []) == []
    found = judge_cautions("[always] madvise never", ["/etc/criu/runc.conf"], [])
    assert [caution.code for caution in found] == ["huge-pages", "criu-config"]
    assert "/etc/criu/runc.conf" in found[1].message


@pytest.mark.parametrize(
    ("limit", "used", "tasks", "codes"),
    [
        (1024, 12, 1, []),
        (1024, 1000, 1, ["open-files"]),
        (1024, 12, 400, ["open-files"]),
        (64, 70, 1, ["open-files"]),
    ],
)
def test_descriptors(limit: int, used: int, tasks: int, codes: list[str]) -> None:
    refusals = judge_descriptors(limit, used, tasks, streams=4)
    assert [refusal.code for refusal in refusals] == codes
    assert all("-" not in refusal.message.split()[0] for refusal in refusals)


def test_space(tmp_path: Path) -> None:
    """Also of a directory that is not there yet."""
    assert space_refusals(tmp_path / "a" / "b", 4096, 1) == []
    (refusal,) = space_refusals(tmp_path / "a" / "b", 1 << 60, 1)
    assert refusal.code == "space"
    assert str(tmp_path / "a" / "b") in refusal.remedy


SWAPS = """\
Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority
/dev/dm-1                               partition\t999420\t\t0\t\t-2
/dev/dm-2                               partition\t999420\t\t0\t\t-3
/dev/zram0                              partition\t999420\t\t0\t\t100
/swapfile                               file\t\t999420\t\t0\t\t-4
"""


def test_swap_that_is_a_disk_as_it_is() -> None:
    mappings = {"/dev/dm-1": "CRYPT-LUKS2-0123-swap", "/dev/dm-2": "LVM-0123"}
    found = open_swaps(SWAPS, lambda device: mappings.get(device, ""))
    assert found == ["/dev/dm-2", "/swapfile"]
    assert open_swaps(SWAPS.splitlines()[0], lambda _: "") == open_swaps("", lambda _: "") == []
    cautions = judge_cautions("", [], found)
    assert [(one.code, one.remedy.split(",")[0]) for one in cautions] == [
        ("swap", "swapoff /dev/dm-2"),
        ("swap", "swapoff /swapfile"),
    ]
