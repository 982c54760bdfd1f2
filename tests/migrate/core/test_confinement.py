"""When a copy is held back less than its source."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from migrate.core.confinement import (
    CAPABILITY_NAMES,
    TOLD_MAX,
    UNLIMITED,
    Confinements,
    Sheet,
    names_of,
    unfiltered,
    unusual,
    weaker,
)

SHEET = Sheet(
    users=(0, 0, 0, 0),
    groups=(0, 0, 0, 0),
    more_groups=(10,),
    inheritable=0b1,
    permitted=0b1,
    effective=0b1,
    bounding=0b11,
    ambient=0b1,
    no_new_privileges=True,
    seccomp=2,
    filters=2,
    label="docker-default (enforce)",
    user_map="0 1000 1",
    group_map="0 1000 1",
    setgroups="deny",
    oom_score_adj=100,
    limits={"Max open files": (1024, 4096), "Max core file size": (0, UNLIMITED)},
)


def container(*sheets: Sheet) -> Confinements:
    return Confinements(
        sheets, {number: index for index, number in enumerate((1, 7, 8)[: len(sheets)])}
    )


def changed(**fields: Any) -> Sheet:
    return msgspec.structs.replace(SHEET, **fields)


def limits(**changes: tuple[int, int]) -> dict[str, tuple[int, int]]:
    return SHEET.limits | {name.replace("_", " "): pair for name, pair in changes.items()}


def test_the_same_is_not_weaker() -> None:
    assert weaker(container(SHEET), container(SHEET)) == []


WEAKER = [
    ({"users": (0, 0, 0, 1)}, "users"),
    ({"groups": (5, 5, 5, 5)}, "groups"),
    ({"more_groups": ()}, "more groups"),
    ({"more_groups": (10, 11)}, "more groups"),
    ({"user_map": "0 0 4294967295"}, "user map 0 0 4294967295 and not 0 1000 1"),
    ({"group_map": ""}, "group map"),
    *(
        ({name: 1 << 21 | 1}, f"more {name} capabilities: CAP_SYS_ADMIN")
        for name in ("inheritable", "permitted", "effective", "bounding", "ambient")
    ),
    ({"no_new_privileges": False}, "no_new_privs"),
    ({"seccomp": 0, "filters": 0}, "seccomp mode 0 and not 2"),
    ({"filters": 1}, "1 seccomp filters and not 2"),
    ({"label": ""}, "label (none)"),
    ({"label": "docker-default (complain)"}, "label docker-default (complain)"),
    ({"setgroups": "allow"}, "setgroups"),
    ({"oom_score_adj": 99}, "oom_score_adj 99"),
    ({"limits": limits(Max_open_files=(1025, 4096))}, "Max open files 1025/4096"),
    ({"limits": limits(Max_open_files=(1024, UNLIMITED))}, "1024/unlimited and not 1024/4096"),
    ({"limits": limits(Max_core_file_size=(UNLIMITED, UNLIMITED))}, "Max core file size"),
]


@pytest.mark.parametrize(("fields", "said"), WEAKER)
def test_what_is_weaker(fields: dict[str, Any], said: str) -> None:
    found = weaker(container(SHEET, SHEET), container(SHEET, changed(**fields)))
    assert found
    assert all(text.startswith("thread 7: ") for text in found)
    assert said in found[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"permitted": 0, "effective": 0, "inheritable": 0, "bounding": 0, "ambient": 0},
        {"filters": 3},
        {"oom_score_adj": 1000},
        {"limits": limits(Max_open_files=(10, 10), Max_core_file_size=(0, 0))},
        {"limits": {}},
    ],
)
def test_held_back_more_is_not_weaker(fields: dict[str, Any]) -> None:
    assert weaker(container(SHEET), container(changed(**fields))) == []


def test_who_was_not_held_back_can_be() -> None:
    free = changed(seccomp=0, filters=0, label="unconfined", no_new_privileges=False, setgroups="")
    assert weaker(container(free), container(changed(label=""))) == []
    assert weaker(container(changed(label="")), container(SHEET)) == []
    # Strict is tighter than any filter.
    assert weaker(container(SHEET), container(changed(seccomp=1))) == []
    assert weaker(container(changed(seccomp=1)), container(SHEET)) != []


def test_every_thread_is_there_and_no_other() -> None:
    one, two = container(SHEET), container(SHEET, SHEET)
    assert weaker(one, two) == ["thread 7 is only on the copy"]
    assert weaker(two, one) == ["thread 7 is only on the source"]
    assert weaker(Confinements((), {1: 5}), one) != []


def test_a_thousand_differences_are_told_as_a_few() -> None:
    many = Confinements((SHEET,), dict.fromkeys(range(1, 1000), 0))
    worse = Confinements((changed(no_new_privileges=False),), many.threads)
    assert len(weaker(many, worse)) == TOLD_MAX


def test_capabilities_by_name() -> None:
    assert CAPABILITY_NAMES[21] == "CAP_SYS_ADMIN"
    assert CAPABILITY_NAMES[40] == "CAP_CHECKPOINT_RESTORE"
    assert names_of(1 << 40 | 1 << 41) == ["CAP_CHECKPOINT_RESTORE", "CAP_41"]
    assert unusual(container(SHEET, changed(bounding=1 << 12)), {"CAP_CHOWN"}) == [
        *("CAP_DAC_OVERRIDE", "CAP_NET_ADMIN")
    ]
    assert unfiltered(container(SHEET, changed(seccomp=0)))
    assert not unfiltered(container(SHEET))
