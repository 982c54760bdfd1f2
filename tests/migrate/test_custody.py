"""Two who undo the same dump; what they put back is tested in tests/criu_glue and tests/lab."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from migrate import custody


def test_only_one_mends_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "custody"
    record.write_bytes(b"\x90")
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    monkeypatch.setattr(custody, "ALONE_DEADLINE_S", 0.05)
    with pytest.raises(TimeoutError, match="another process mends"):
        custody.mend(tmp_path, tmp_path / "cgroup")
    assert record.exists()
    # As its end does, however that came.
    os.close(other)
    custody.mend(tmp_path, tmp_path / "cgroup")
    assert not record.exists()


def test_what_is_undone_and_wiped_needs_no_mending(tmp_path: Path) -> None:
    custody.mend(tmp_path / "gone", tmp_path / "cgroup")
