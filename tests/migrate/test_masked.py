"""What is hidden from a container, in a mount namespace of a process as a runtime makes it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from migrate.masked import dump_options

MOUNTS = """\
cd "$1"
mount -t tmpfs -o ro tmpfs hidden
mount -t tmpfs tmpfs writable
mount -t tmpfs -o ro,mode=755 tmpfs changed
mount -t tmpfs tmpfs full && touch full/file && mount -o remount,ro tmpfs full
mount -t tmpfs tmpfs part && mkdir -m 1777 part/inner && mount --bind part/inner part &&
    mount -o remount,ro,bind part
mount --bind / root && mount -o remount,ro,bind root
echo made
read -r end
"""
NAMES = ("hidden", "writable", "changed", "full", "part", "root", "nothing", "missing")


def test_only_what_nobody_could_tell_from_another_is_left_out(tmp_path: Path) -> None:
    for name in NAMES[:-1]:
        (tmp_path / name).mkdir()
    unshared = ["unshare", "--mount", "--propagation", "private"]
    with subprocess.Popen(
        [*unshared, "sh", "-ec", MOUNTS, "sh", tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"made\n"
        spec = {"linux": {"maskedPaths": [str(tmp_path / name) for name in NAMES]}}
        options = dump_options(spec, process.pid)
        assert dump_options({}, process.pid) == ()
        process.communicate(b"\n")
    assert options == (f"external mnt[{tmp_path / 'hidden'}]:masked",)
    assert process.returncode == 0
