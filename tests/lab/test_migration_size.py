"""What a migration of a large container takes of its hosts, besides the memory that it moves."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from bench.containers import ContainerSpec
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.lab.migrating import begin, resident

MIB: Final = 1 << 20
PEAK_BYTES_MAX: Final = 200 * MIB
MEMORY_MIB: Final = 1024
LARGE: Final = ContainerSpec("mv-large", "memory", args=("10",), memory_mib=MEMORY_MIB)
POLL_S: Final = 0.02
# Python programs of ours, by what follows "python3 -m" in their command lines.
PROGRAMS: Final = re.compile(
    rb"python3\0(?:-\S+?\0)*-m\0(migrate\0agent|migrate\.guard|criu_glue\.pager\S*)\0"
    rb"|python3\0(?:-\S+?\0)*(?:\S*/)?(migrate)\0"
)


@dataclass
class Peaks:
    """The largest resident memory of each of our processes on some hosts, while this runs.

    Memory that is mapped from a file of a tmpfs is not counted: it is the container's.
    """

    hosts: list[Host]
    peaks: dict[str, int] = field(default_factory=dict)
    _end: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Peaks:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._thread is not None
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(POLL_S):
            for host in self.hosts:
                self._look(host)

    def _look(self, host: Host) -> None:
        for directory in host.path("/proc").glob("[0-9]*"):
            try:
                found = PROGRAMS.search((directory / "cmdline").read_bytes())
                status = (directory / "status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if found is None:
                continue
            program = (found[1] or found[2]).replace(b"\0", b" ").decode()
            sizes = dict(re.findall(r"^(VmHWM|RssAnon|RssFile):\s+(\d+) kB$", status, re.MULTILINE))
            # The peak of everything, unless the page store is mapped: then what is its own now.
            own = int(sizes.get("RssAnon", 0)) + int(sizes.get("RssFile", 0))
            whole = int(sizes.get("VmHWM", 0))
            kib = own if program.startswith("criu_glue") else whole
            key = f"{host.name}: {program}"
            self.peaks[key] = max(self.peaks.get(key, 0), kib * 1024)


def test_a_large_container_costs_its_hosts_little(new_lab: Callable[..., Lab]) -> None:
    """Agent, coordinator, guard and pager stay small, however large the container is."""
    lab = new_lab(["A", "B"])
    lab.start_agents()
    with resident(lab, LARGE) as guest:
        with Peaks(lab.hosts) as watched:
            report = begin(lab.host("A"), guest.name, "B").finish().done
        guest.verify()
        assert guest.stop_probe().clean
    assert report["memory_bytes"] > MEMORY_MIB * MIB
    assert {"A: migrate", "A: migrate agent", "B: migrate agent"} <= watched.peaks.keys()
    assert any("pager" in name for name in watched.peaks), watched.peaks
    print(watched.peaks)
    too_large = {name: size for name, size in watched.peaks.items() if size > PEAK_BYTES_MAX}
    assert not too_large
