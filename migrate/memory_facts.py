"""How much memory a container has, and of which kinds, as /proc shows it. Looks only.

private   of one task each, what trackers watch and what the dump leaves out ...
unwatched ... but for what tasks have written into private mappings of files (relocated
          libraries, mostly): it is private too, and sent while the container stands still
shared    segments of System V, memfd, /dev/zero, and files in a tmpfs that are mapped: dumped
          and restored by CRIU, each once however many tasks map it
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from criu_glue.mappings import MAPPINGS_MAX

if TYPE_CHECKING:
    from collections.abc import Iterable

_STATUS: Final = re.compile(r"^(RssAnon|RssShmem|VmSwap|Threads):\s+(\d+)", re.MULTILINE)
_MAPPING: Final = re.compile(
    rb"([0-9a-f]+)-([0-9a-f]+) ...([ps]) [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) (\d+)"
)
_WRITTEN: Final = re.compile(rb"(?:Anonymous|Swap):\s+(\d+) kB")
_SECTOR_BYTES: Final = 512


@dataclass(slots=True)
class MemoryFacts:
    """See the module. private_bytes is counted for each task that has it. mappings and threads: of
    all tasks together."""

    private_bytes: int = 0
    shared_bytes: int = 0
    unwatched_bytes: int = 0
    mappings: int = 0
    threads: int = 0


@dataclass(slots=True)
class _Seen:
    """What is summed up. segments: bytes by device and inode. shared_in_memory: the devices whose
    files are memory."""

    shared_in_memory: frozenset[int]
    facts: MemoryFacts = field(default_factory=MemoryFacts)
    segments: dict[tuple[int, int], int] = field(default_factory=dict)


def memory_facts(pids: Iterable[int]) -> MemoryFacts:
    """Of these tasks; one that has exited is left out. Blocking: the kernel walks the tasks' page
    tables for `smaps`, 21 to 33 ms a GiB, while they run."""
    seen = _Seen(frozenset())
    for pid in pids:
        proc = Path(f"/proc/{pid}")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if not seen.shared_in_memory:
                seen.shared_in_memory = _memory_devices((proc / "mountinfo").read_text())
            _add_task(proc, seen)
    seen.facts.shared_bytes = sum(seen.segments.values())
    return seen.facts


def _add_task(proc: Path, seen: _Seen) -> None:
    """Of a task whose mappings this process may not see, what all may see of it."""
    status = dict(_STATUS.findall((proc / "status").read_text()))
    kib = {name: int(status.get(name, 0)) for name in ("RssAnon", "VmSwap", "RssShmem")}
    try:
        _add_mappings(proc, seen)
    except PermissionError:
        seen.segments[-1, int(proc.name)] = kib["RssShmem"] * 1024
    seen.facts.private_bytes += (kib["RssAnon"] + kib["VmSwap"]) * 1024
    seen.facts.threads += int(status.get("Threads", 1))


def _add_mappings(proc: Path, seen: _Seen) -> None:
    is_unwatched = False
    with (proc / "smaps").open("rb") as lines:
        for line in lines:
            # Of a mapping's own line the first digit of its address; fields begin with a capital.
            if not line[:1].isupper():
                found = _MAPPING.match(line)
                is_unwatched = found is not None and _add_mapping(proc, found, seen)
                if seen.facts.mappings > MAPPINGS_MAX:
                    return
            elif is_unwatched and (written := _WRITTEN.match(line)) is not None:
                seen.facts.unwatched_bytes += int(written[1]) * 1024


def _add_mapping(proc: Path, found: re.Match[bytes], seen: _Seen) -> bool:
    """Returns whether it is a private one of a file."""
    seen.facts.mappings += 1
    start, end = int(found[1], 16), int(found[2], 16)
    device, inode = os.makedev(int(found[4], 16), int(found[5], 16)), int(found[6])
    if found[3] == b"p" or device not in seen.shared_in_memory:
        return found[3] == b"p" and inode != 0
    if (device, inode) not in seen.segments:
        try:
            blocks = (proc / f"map_files/{start:x}-{end:x}").stat().st_blocks
            seen.segments[device, inode] = blocks * _SECTOR_BYTES
        except (PermissionError, FileNotFoundError):
            # It may not be asked, or is mapped no more: what was mapped of it.
            seen.segments[device, inode] = end - start
    return False


def _memory_devices(mountinfo: str) -> frozenset[int]:
    """Devices whose files are memory: every tmpfs, and the kernel's own, which System V, memfd and
    shared anonymous memory are files of (mm/shmem.c: shm_mnt)."""
    own = os.memfd_create("own")
    try:
        devices = {os.fstat(own).st_dev}
    finally:
        os.close(own)
    for row in mountinfo.splitlines():
        # proc_pid_mountinfo(5): ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [TAG...] - TYPE ...
        front, _, back = row.partition(" - ")
        if back.startswith("tmpfs "):
            major, _, minor = front.split()[2].partition(":")
            devices.add(os.makedev(int(major), int(minor)))
    return frozenset(devices)
