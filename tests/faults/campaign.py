"""Runs points and says what became of them: `scripts/test --faults all | PATTERN …`.

    python3 -m tests.faults.campaign all                     every point; renews docs/reliability.md
    python3 -m tests.faults.campaign 'source.*.kill-guard'   some, by name (fnmatch)
    python3 -m tests.faults.campaign sample                  those of tests/faults/test_sample.py
    python3 -m tests.faults.campaign all --results DIR --document     the document once more

Several labs run side by side, each in a thread; a lab in which a point failed is replaced, since
what the failure left would be blamed on the next. Results are JSON lines, with what there was to
see of each failure beside them. A campaign that finds results in its directory goes on: points that
passed are not carried out again. The document names those that had failed before.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import platform
import queue
import re
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from bench.lab.errors import LabError
from bench.lab.lab import Lab
from tests.faults import trial, watch
from tests.faults.courses import COURSES
from tests.faults.evidence import gather
from tests.faults.outcome import Outcome
from tests.faults.points import Point, generate, sample
from tests.faults.report import Simulation, render
from tests.faults.scene import SPEC, Scene
from tests.faults.trial import Trial
from tests.migrate.core import test_handover
from tests.migrate.core.handover_world import Protocol, Search

DOCUMENT: Final = Path(__file__).resolve().parents[2] / "docs/reliability.md"
RESULTS: Final = "results.jsonl"
# A point mostly waits: for programs to start, for timers.
JOBS: Final = 2


class Campaign:
    """Points that are carried out by some labs side by side."""

    def __init__(self, points: Sequence[Point], directory: Path) -> None:
        self.outcomes: list[Outcome] = []
        self._count = len(points)
        self._directory = directory
        self._waiting: queue.SimpleQueue[Point] = queue.SimpleQueue()
        for point in points:
            self._waiting.put(point)
        self._lock = threading.Lock()
        self._results = (directory / RESULTS).open("ab")
        self._broken: list[BaseException] = []

    def run(self, jobs: int) -> None:
        """All of them. Raises what made a lab break."""
        threads = [threading.Thread(target=self._work, name=f"lab-{one}") for one in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._results.close()
        if self._broken:
            raise self._broken[0]

    def _work(self) -> None:
        try:
            while not self._broken and not self._waiting.empty():
                with Scene() as scene:
                    self._work_in(scene)
        except (LabError, OSError) as error:
            self._broken.append(error)
            raise

    def _work_in(self, scene: Scene) -> None:
        """Until a point fails or none is left."""
        while not self._broken:
            try:
                point = self._waiting.get_nowait()
            except queue.Empty:
                return
            outcome = attempt(scene, point, self._directory)
            self._tell(outcome)
            if not outcome.passed:
                return

    def _tell(self, outcome: Outcome) -> None:
        with self._lock:
            self.outcomes.append(outcome)
            self._results.write(msgspec.json.encode(outcome) + b"\n")
            self._results.flush()
            number = f"{len(self.outcomes):{len(str(self._count))}}/{self._count}"
            print(f"{number} {outcome.line()}", flush=True)


def attempt(scene: Scene, point: Point, directory: Path) -> Outcome:
    """One point; what there is to see of a failure goes to `directory`/POINT.txt."""
    tried = Trial(scene, point)
    outcome = tried.run()
    if not outcome.passed:
        assert tried.command is not None
        seen = [outcome.line(), tried.command.stdout, tried.command.stderr]
        seen += [gather(host) for host in tried.hosts]
        (directory / f"{point}.txt").write_text("\n".join(seen))
    return outcome


def environment(jobs: int) -> dict[str, str]:
    """What the campaign ran on."""
    with Lab(["A"]) as lab:
        host = lab.host("A")
        version = host.run(["sh", "-c", "criu --version; runc --version; python3 --version"]).stdout
    found = dict(re.findall(r"^(Version|runc version|Python):? (\S+)", version, re.MULTILINE))
    return {
        "kernel": f"{platform.release()} ({platform.machine()})",
        "machine": f"{os.cpu_count()} cores, {jobs} labs side by side",
        "CRIU": found["Version"],
        "runc": found["runc version"],
        "Python": found["Python"],
        "container": f"{SPEC.memory_mib} MiB, {SPEC.args[0]} MiB/s written,"
        f" a client with {trial.CLIENT_PER_S:g} requests/s",
    }


def simulate() -> Simulation:
    """The search of the tables, as the tests run it."""
    search = Search(Protocol(), test_handover.FAULTS)
    search.run()
    return Simulation(
        test_handover.FAULTS, len(search.worlds), test_handover.WALKS, test_handover.WALK_FAULTS
    )


def chosen(patterns: Sequence[str]) -> list[Point]:
    """The points of these names; "all" and "sample" are names of several."""
    points = generate(COURSES)
    if "all" in patterns:
        return points
    some = sample(points) if "sample" in patterns else []
    return some + [
        point
        for point in points
        if point not in some and any(fnmatch.fnmatchcase(str(point), one) for one in patterns)
    ]


def read_outcomes(directory: Path, points: Sequence[Point]) -> list[Outcome]:
    """What has become of these points before, the oldest first; nothing of others."""
    file = directory / RESULTS
    lines = file.read_bytes().splitlines() if file.exists() else []
    names = {str(point) for point in points}
    found = [msgspec.json.decode(line, type=Outcome) for line in lines]
    return [one for one in found if one.point in names]


def main() -> int:
    """The command line; 0 when every point passed."""
    parser = argparse.ArgumentParser(prog="scripts/test --faults")
    parser.add_argument("patterns", nargs="+", metavar="all|sample|PATTERN")
    parser.add_argument("--jobs", type=int, default=JOBS, help="labs side by side")
    parser.add_argument("--results", type=Path, help="directory of the results, to go on with")
    parser.add_argument("--list", action="store_true", help="only name the points")
    parser.add_argument(
        "--document", action="store_true", help="only make the document, of the results so far"
    )
    options = parser.parse_args()
    points = chosen(options.patterns)
    if not points:
        parser.error("no point has such a name")
    if options.list:
        print(*points, sep="\n")
        return 0
    directory = options.results or Path(tempfile.mkdtemp(prefix="dolly-faults-"))
    directory.mkdir(parents=True, exist_ok=True)
    failed = 0 if options.document else _carry_out(points, directory, options.jobs)
    if "all" in options.patterns:
        outcomes = read_outcomes(directory, points)
        text = render(
            outcomes,
            environment(options.jobs),
            simulate(),
            len(points),
            silence_s=trial.SILENCE_S,
            alone_s=trial.OPERATOR_AFTER_S,
            helped_s=trial.RECOVERED_AFTER_S,
            period_ms=watch.PERIOD_S * 1000,
        )
        DOCUMENT.write_text(text)
        print(f"written: {DOCUMENT}")
    return int(failed > 0)


def _carry_out(points: Sequence[Point], directory: Path, jobs: int) -> int:
    """Those that have not passed yet; how many failed."""
    begin_s = time.monotonic()
    passed = {one.point for one in read_outcomes(directory, points) if one.passed}
    campaign = Campaign([point for point in points if str(point) not in passed], directory)
    campaign.run(jobs)
    failed = sum(not one.passed for one in campaign.outcomes)
    minutes = (time.monotonic() - begin_s) / 60
    done = f"{len(campaign.outcomes)} points in {minutes:.1f} min, {failed} failed"
    print(f"{done}; results in {directory}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
