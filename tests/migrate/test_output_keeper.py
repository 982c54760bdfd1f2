"""The keeper of a container's output, as the process that it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from migrate import output_keeper

KEEPER = Path(output_keeper.__file__)


def keep(log: Path, data: bytes) -> None:
    subprocess.run([sys.executable, "-ISE", str(KEEPER), str(log)], input=data, check=True)


def test_what_is_written_is_kept_over_restarts(tmp_path: Path) -> None:
    log = tmp_path / "output.log"
    keep(log, b"one\n")
    keep(log, b"two\n")
    assert log.read_bytes() == b"one\ntwo\n"
    assert log.stat().st_mode & 0o777 == 0o600


def test_the_last_of_much_output_is_kept_in_bounded_space(tmp_path: Path) -> None:
    log = tmp_path / "output.log"
    line = b"%07d\n"
    data = b"".join(line % number for number in range(3 * output_keeper.KEPT_BYTES // 8))
    keep(log, data)
    kept = (tmp_path / "output.log.1").read_bytes() + log.read_bytes()
    assert data.endswith(kept)
    assert len(kept) >= output_keeper.KEPT_BYTES
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * output_keeper.KEPT_BYTES
