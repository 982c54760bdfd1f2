"""A pre-dump with a shell in place of the runtime; the real one is in tests/vm/test_trackers.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from criu_glue.errors import TrackerError
from migrate.pre_dumping import PreDump
from tests.criu_glue.checkpoint_images import image

STATS = {"freezing_time": 2_500, "frozen_time": 30_000, "memdump_time": 1, "memwrite_time": 1}
COUNTS = {"pages_scanned": 1, "pages_skipped_parent": 1, "pages_written": 1, "pages_lazy": 0}


class Played:
    """A runtime whose pre-dump is a line of shell, in the directory of the logs."""

    def __init__(self) -> None:
        self.line = "true"

    def pre_dump_command(
        self, _container: Any, image_dir: Path, work_dir: Path, *, parent: str | None
    ) -> list[str]:
        words = [str(work_dir), str(image_dir), parent or "-"]
        return ["/bin/sh", "-c", f'cd "$1"; {self.line}', "played", *words]


def test_what_it_costs_the_tasks_is_told_where_criu_says_it(tmp_path: Path) -> None:
    runtime, told = Played(), list[float]()
    work = tmp_path / "work"
    run = PreDump(cast("Any", None), cast("Any", runtime), work, told.append)
    (tmp_path / "stats").write_bytes(image("STATS", [{"dump": STATS | COUNTS}]))
    runtime.line = 'cp ../stats stats-dump; grep -q "mode read" "$CRIU_CONFIG_FILE"; test "$3" = -'
    run(tmp_path, None)
    assert told == [32.5]
    runtime.line = 'echo nothing > stats-dump; test "$3" = last'
    run(tmp_path, "last")
    runtime.line = "rm stats-dump"
    run(tmp_path, None)
    assert told == [32.5]


def test_why_it_failed_is_criu_s_own_word(tmp_path: Path) -> None:
    runtime, told = Played(), list[float]()
    run = PreDump(cast("Any", None), cast("Any", runtime), tmp_path / "work", told.append)
    runtime.line = "echo '(00.1) Error (criu/mem.c:1): no such page' > dump.log; exit 3"
    with pytest.raises(TrackerError, match="no such page"):
        run(tmp_path, None)
    assert told == []
