"""scripts/setup on a machine on which all is there."""

from __future__ import annotations

import subprocess

from bench.lab import paths


def test_setup_finds_everything_there_without_a_network_also_twice_at_once() -> None:
    """Without a network device neither apt nor pip could get anything."""
    command = ["unshare", "--net", str(paths.PROJECT / "scripts" / "setup")]
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    for run in runs:
        output, _ = run.communicate(timeout=60)
        assert run.returncode == 0, output
        # One line, and it is the last: no step had anything to do.
        assert output.startswith("setup: ready")
        assert output.count("\n") == 1
