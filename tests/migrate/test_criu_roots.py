"""Roots in /tmp of CRIUs that were killed, in a directory of the test's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from migrate.agent import criu_roots
from migrate.mounts import mount_tmpfs, unmount


def test_a_root_is_unmounted_and_removed(tmp_path: Path) -> None:
    root, empty = tmp_path / ".criu.mntns.abc123", tmp_path / ".criu.mntns.def456"
    other = tmp_path / "criu.mntns.x"
    for directory in (root, empty, other):
        directory.mkdir()
    mount_tmpfs(root, 1 << 20)
    (root / "file").write_text("of the container")
    # A lab beside this test may have a CRIU.
    assert criu_roots.sweep(tmp_path, lambda: False) == 2
    assert list(tmp_path.iterdir()) == [other]
    assert criu_roots.sweep(tmp_path, lambda: False) == 0


def test_what_is_not_empty_and_no_mount_is_left_alone(tmp_path: Path) -> None:
    root = tmp_path / ".criu.mntns.abc123"
    root.mkdir()
    (root / "file").write_text("whose is that?")
    assert criu_roots.sweep(tmp_path, lambda: False) == 0
    assert (root / "file").exists()


def test_a_living_criu_keeps_everything(tmp_path: Path) -> None:
    root = tmp_path / ".criu.mntns.abc123"
    root.mkdir()
    mount_tmpfs(root, 1 << 20)
    criu = tmp_path / "criu"
    criu.write_text(f"#!{sys.executable}\nprint('up', flush=True)\ninput()\n")
    criu.chmod(0o755)
    with subprocess.Popen(
        [str(criu)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert criu_roots.sweep(tmp_path) == 0
        assert root.is_mount()
        process.kill()
    unmount(root)
