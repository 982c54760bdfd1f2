"""The parent of a lazy dump, and how CRIU is made to take one. CRIU is played by a program that
knows of the kernel what its file says, as CRIU does; CRIU itself is in the lab's migrations."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from criu_glue import kerndat
from criu_glue.core.pagemap import PE_PRESENT, decode_pagemap
from criu_glue.core.wire import iterate_fields
from criu_glue.kerndat import KernelCacheError, tracking_prefix
from criu_glue.known_pages import KnownPages

# The magic numbers, shmem_dev, last_cap, zero_page_pfn, and has_dirty_track.
BEFORE = bytes(range(1, 33))
AFTER = bytes(40)
CRIU = """\
#!/bin/sh
[ "$*" = "check --feature mem_dirty_track" ] || exit 2
[ "$(od -An -tu1 -j {place} -N 1 '{cache}')" -eq 1 ]
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What CRIU knows of the kernel."""
    path = tmp_path / "criu.kdat"
    path.write_bytes(BEFORE + b"\0" + AFTER)
    monkeypatch.setattr(kerndat, "_CACHE", path)
    play(path, monkeypatch, place=len(BEFORE))
    return path


def play(cache: Path, monkeypatch: pytest.MonkeyPatch, *, place: int) -> None:
    """A CRIU that looks for its answer at a place of its file."""
    programs = cache.parent / f"programs-{place}"
    programs.mkdir()
    (programs / "criu").write_text(CRIU.format(cache=cache, place=place))
    (programs / "criu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")


def test_a_kernel_that_notes_soft_dirty_pages_needs_nothing(cache: Path) -> None:
    cache.write_bytes(BEFORE + b"\1" + AFTER)
    copy = cache.with_name("copy")
    assert tracking_prefix(copy) == ()
    assert not copy.exists()


def test_one_program_is_told_and_nobody_else(cache: Path) -> None:
    prefix = tracking_prefix(cache.with_name("copy"))
    told = subprocess.run([*prefix, "cat", cache], capture_output=True, check=True).stdout
    assert told == BEFORE + b"\1" + AFTER
    assert cache.read_bytes() == BEFORE + b"\0" + AFTER


def test_the_program_is_the_process_that_was_started(cache: Path) -> None:
    """The gate's process becomes CRIU, and its parent is the runtime."""
    prefix = tracking_prefix(cache.with_name("copy"))
    with subprocess.Popen([*prefix, "sh", "-c", "echo $$ $PPID"], stdout=subprocess.PIPE) as one:
        said, _ = one.communicate()
    assert said.split() == [str(one.pid).encode(), str(os.getpid()).encode()]


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "No such file"), (BEFORE, "criu.kdat"), (BEFORE + b"\7" + AFTER, "not as CRIU 4.2")],
    ids=["none", "short", "another"],
)
def test_a_file_that_is_not_understood(cache: Path, content: bytes | None, why: str) -> None:
    cache.unlink()
    if content is not None:
        cache.write_bytes(content)
    with pytest.raises(KernelCacheError, match=why):
        tracking_prefix(cache.with_name("copy"))


def test_a_criu_that_keeps_it_elsewhere(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(cache, monkeypatch, place=len(BEFORE) + 1)
    with pytest.raises(KernelCacheError, match="does not take"):
        tracking_prefix(cache.with_name("copy"))


def test_no_criu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(cache.parent / "nothing"))
    with pytest.raises(KernelCacheError, match="criu check"):
        tracking_prefix(cache.with_name("copy"))


def test_the_parent_has_every_page_of_every_task(cache: Path, tmp_path: Path) -> None:
    known = KnownPages.prepare(tmp_path / "known")
    group = tmp_path / "group"
    group.mkdir()
    (group / "cgroup.procs").write_text(f"{os.getpid()}\n")
    known.name_tasks(group)
    image = known.directory / f"pagemap-{os.getpid()}.img"
    (whole,) = decode_pagemap(image.read_bytes()).runs(having=PE_PRESENT).tolist()
    assert whole[0] == 0
    assert whole[1] * 4096 >= 1 << 47
    assert {path.name for path in known.directory.iterdir()} == {
        "inventory.img",
        "criu.kdat",
        image.name,
    }


def test_the_parent_is_older_than_no_task(cache: Path, tmp_path: Path) -> None:
    data = (KnownPages.prepare(tmp_path / "known").directory / "inventory.img").read_bytes()
    assert len(data) == 8 + int.from_bytes(data[4:8], "little")
    fields = {field: value for field, _, value, _ in iterate_fields(data, 8, len(data))}
    # img_version, and dump_uptime in microseconds: more than any machine was ever up.
    assert fields == {1: 1, 8: (1 << 63) - 1}
