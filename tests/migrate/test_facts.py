"""What is read of a host: the memory that cgroups leave."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from migrate.facts import free_memory_bytes, left_bytes

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


def limited(group: Path, limit: str, current: int, inactive_file: int = 0) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{current}\n")
    (group / "memory.stat").write_text(f"anon 7\ninactive_file {inactive_file}\nslab 1\n")


def test_the_tightest_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    limited(tmp_path / "system.slice", str(100 * MIB), 60 * MIB)
    limited(tmp_path / "system.slice/agent", "max", 10 * MIB)
    assert left_bytes(tmp_path, "system.slice/agent") == 40 * MIB
    limited(tmp_path / "system.slice/agent", str(30 * MIB), 20 * MIB)
    assert left_bytes(tmp_path, "system.slice/agent") == 10 * MIB


def test_pages_of_files_can_be_taken_again(tmp_path: Path) -> None:
    limited(tmp_path / "agent", str(30 * MIB), 29 * MIB, inactive_file=20 * MIB)
    assert left_bytes(tmp_path, "agent") == 21 * MIB


@pytest.mark.parametrize("own", ["", "agent", "not/there"])
def test_no_limit(tmp_path: Path, own: str) -> None:
    limited(tmp_path / "agent", "max", MIB)
    assert left_bytes(tmp_path, own) == math.inf


def test_a_group_above_its_limit_has_nothing(tmp_path: Path) -> None:
    limited(tmp_path / "agent", str(MIB), 2 * MIB)
    assert left_bytes(tmp_path, "agent") == 0


def test_this_machine_has_some() -> None:
    assert free_memory_bytes() > 0
