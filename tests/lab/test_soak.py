"""The soak itself: a short run ends well and tells what it saw, and one that fails says why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import soak_run
from bench.containers import ContainerSpec
from bench.lab.host import Host
from bench.lab.lab import Lab
from bench.probe_process import run_module
from bench.soak_result import Move
from bench.soak_samples import Sample
from bench.soak_trend import LIMITS

PROJECT = Path(__file__).resolve().parents[2]


def test_there_and_back(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "bench.soak", "--migrations", "2", "--memory", "16"]
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "flat, and nothing was lost" in done.stdout
    run, before, *moves, verdict = [json.loads(line) for line in out.read_text().splitlines()]
    assert run["run"]["migrations"] == 2
    assert before["move"] == 0
    assert [(move["source"], move["target"]) for move in moves] == [("A", "B"), ("B", "A")]
    for move in moves:
        assert move["downtime_ms"] > 0
        for taken in move["samples"].values():
            assert set(taken) == set(Sample.__dataclass_fields__)
            assert taken["agent_descriptors"] > 0
    # Its root file system, its namespace and its first process are where it is.
    a, b = moves[0]["samples"]["A"], moves[0]["samples"]["B"]
    assert (a["netns"], b["netns"]) == (0, 1)
    assert b["processes"] == a["processes"] + 1
    assert b["state_kib"] > b["journal_kib"]
    assert verdict["verdict"] == "flat"
    assert {(one["host"], one["name"]) for one in verdict["trends"]} == {
        (host, name) for host in "AB" for name in LIMITS
    }
    assert verdict["client"]["received"] == verdict["client"]["sent"] > 0


class Disturber:
    """An observer that spoils the container behind the first move."""

    def begun(self, before: dict[str, Sample]) -> None:
        self.before = before

    def moved(self, move: Move) -> None:
        self.target = move.target


def test_memory_that_changed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the workload's own fault: `CORRUPT` changes one word behind its back. It writes nothing
    itself, which would make good again what it overwrites."""
    measure = soak_run.measure
    spec = ContainerSpec("soak", "memory", args=("0",), memory_mib=16)

    def spoil(lab: Lab) -> dict[str, Sample]:
        ask(lab.client, spec, "CORRUPT")
        return measure(lab)

    monkeypatch.setattr(soak_run, "measure", spoil)
    outcome = soak_run.run_soak(spec, 2, Disturber())
    assert "the memory is not what it was" in outcome.failure
    assert not outcome.is_well
    assert len(outcome.moves) < 2


def ask(client: Host, spec: ContainerSpec, line: str) -> str:
    return run_module(client, "bench.workloads.ask", spec.ip, str(spec.port), line)
