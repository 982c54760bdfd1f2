"""Where the lab looks for cgroup2, and for what setup made."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bench.lab import paths
from bench.lab.errors import LabError
from bench.vm import image

ROOT = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
V1 = "30 28 0:26 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
HYBRID = "31 28 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw\n"
PURE = "28 24 0:25 / /sys/fs/cgroup rw,nosuid,nodev - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.mark.parametrize(
    ("mountinfo", "place"),
    [(ROOT + V1 + HYBRID, "/sys/fs/cgroup/unified"), (ROOT + PURE, "/sys/fs/cgroup")],
)
def test_cgroup2_is_found_alone_and_beside_v1(mountinfo: str, place: str) -> None:
    assert paths.find_cgroup2(mountinfo) == Path(place)


def test_a_machine_without_cgroup2_is_told_so() -> None:
    with pytest.raises(LabError, match="no cgroup2"):
        paths.find_cgroup2(ROOT + V1)


def test_setup_and_the_lab_agree_on_the_roots_key() -> None:
    """The key is computed twice, in shell and here; a missing root is reported by its path."""
    setup = (paths.PROJECT / "scripts" / "setup").read_text()
    (parts,) = re.findall(r"^parts=.*$", setup, re.MULTILINE)
    script = 'cat "${parts[@]/#/bench/lab/}" | sha256sum | cut -c1-16'
    assert script in setup
    command = ["bash", "-c", f"{parts}; {script}"]
    key = subprocess.run(
        command, cwd=paths.PROJECT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert paths.root_path() == paths.CACHE / f"root-{key}"


def test_setup_and_the_lab_agree_on_the_key_of_the_other_root(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    setup = (paths.PROJECT / "scripts" / "setup").read_text()
    (parts,) = re.findall(r"^parts=.*$", setup, re.MULTILINE)
    script = (
        'cat "${parts[@]/#/bench/lab/}" '
        "bench/compare/root/{packages,files/etc/containers/containers.conf}"
        " | sha256sum | cut -c1-16"
    )
    command = ["bash", "-c", f"{parts}; {script}"]
    key = subprocess.run(
        command, cwd=paths.PROJECT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert script.replace("bench/compare", "\\\n    bench/compare") in setup
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    (tmp_path / f"root-{key}").mkdir()
    assert paths.root_path(compared=True) == tmp_path / f"root-{key}"
    with pytest.raises(LabError, match="run scripts/setup"):
        paths.root_path()


def test_a_root_that_setup_has_not_made_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    with pytest.raises(LabError, match="run scripts/setup"):
        paths.root_path()


def test_the_machines_image_is_known_by_all_that_makes_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A change of a package list makes another image, one of what only uses it does not."""
    for part in ("bench/vm", "bench/lab/root"):
        shutil.copytree(paths.PROJECT / part, tmp_path / part)
    before = image.key()
    monkeypatch.setattr(paths, "PROJECT", tmp_path)
    assert image.key() == before
    (tmp_path / "bench/vm/machine.py").write_text("")
    assert image.key() == before
    for part in ("bench/lab/root/packages", "bench/vm/qemu.py"):
        with (tmp_path / part).open("a") as file:
            file.write("# changed\n")
        assert image.key() != before
        before = image.key()
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    with pytest.raises(LabError, match="scripts/setup --vm"):
        image.path()
