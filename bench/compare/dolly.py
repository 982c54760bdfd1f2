"""Ours: `migrate NAME --to B`, and `migrate clone`, as a user runs them on A."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from bench import containers
from bench.compare.systems import MOVE_DEADLINE_S, NAME, Moved, MoveError, remove_container

if TYPE_CHECKING:
    from bench.compare.systems import Scene

COPY: Final = "dolly"
COPY_ADDRESS: Final = "10.77.0.60"
RECEIVED: Final = "/var/lib/migrate/containers"
REPORT: Final = "/tmp/compare.json"  # noqa: S108  (inside the lab host, whose /tmp is its own)
KEPT: Final = (
    "tracker",
    "downtime_ms",
    "predicted_downtime_ms",
    "prediction",
    "bytes_sent",
    "fill_ms",
    "faults",
    "fault_p50_us",
    "fault_p99_us",
    "held_frames",
)


KEPT_OF_ROUNDS: Final = ("pages", "bytes_raw", "bytes_sent", "zero_pages", "duration_ms")


class _Ours:
    """A container of the lab, on A."""

    needs_podman = False

    def start(self, scene: Scene) -> None:
        """As every container of the lab."""
        containers.create(scene.source, scene.spec)
        containers.start(scene.source, NAME)


class Dolly(_Ours):
    """`migrate`, with the options of a case."""

    def __init__(self, name: str, *options: str) -> None:
        self.name = name
        self._options = options

    def move(self, scene: Scene) -> Moved:
        """Returns when all memory is there: the command does."""
        command = ["migrate", NAME, "--to", "B", *self._options]
        report, told = run_reported(scene, command)
        facts = {name: report[name] for name in KEPT}
        rounds = [{name: one[name] for name in KEPT_OF_ROUNDS} for one in report["rounds"]]
        facts |= {"rounds": rounds, "told": told}
        return Moved(report["total_ms"], report["downtime_parts_ms"], facts)

    def remove(self, scene: Scene) -> None:
        """Also what B has made for it."""
        forget(scene, NAME)


class DollyClone(_Ours):
    """`migrate clone`: the original runs on, and its client sees a pause."""

    name = "migrate clone"

    def move(self, scene: Scene) -> Moved:
        """One copy, on B."""
        copy = ["--to", "B", "--name", COPY, "--ip", COPY_ADDRESS]
        report, _ = run_reported(scene, ["migrate", "clone", NAME, *copy])
        copying = report["copying"]
        facts = {name: copying[name] for name in ("tracker", "bytes_sent", "fill_ms")}
        return Moved(copying["total_ms"], {}, facts | {"pause_ms": report["pause_ms"]})

    def remove(self, scene: Scene) -> None:
        """Original and copy."""
        forget(scene, NAME)
        forget(scene, COPY)


def run_reported(
    scene: Scene, command: list[str]
) -> tuple[dict[str, Any], list[tuple[float, str]]]:
    """Run a command of ours on A; its report, and when it told what, in ms since it began: names
    of phases, and of events like "round". Raises MoveError."""
    begun_s = time.monotonic()
    told = []
    with tempfile.TemporaryFile() as said:
        process = scene.source.popen(
            [*command, "--json", "--report", REPORT], stdout=subprocess.PIPE, stderr=said
        )
        overdue = threading.Timer(MOVE_DEADLINE_S, process.kill)
        overdue.start()
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                event = json.loads(line)
                name = event.get("phase") or event.get("event", "report")
                if name != "progress":
                    told.append((round((time.monotonic() - begun_s) * 1000, 1), name))
        overdue.cancel()
        if process.returncode != 0:
            said.seek(0)
            raise MoveError(said.read()[-3000:].decode(errors="replace"))
    report: dict[str, Any] = json.loads(scene.source.read_text(REPORT))
    return report, told


def forget(scene: Scene, name: str) -> None:
    """Remove a container wherever it is, with what an agent has made for it."""
    scene.source.run(["rm", "-f", REPORT])
    for host in (scene.source, scene.target):
        remove_container(host, name)
        shutil.rmtree(host.path(f"{RECEIVED}/{name}"), ignore_errors=True)
