"""The comparison of bench: its ways to move a container do move it, and it is seen when not."""

from __future__ import annotations

from bench.compare.by_runc import StopAndCopy
from bench.compare.cases import LAZY, Case
from bench.compare.dolly import DollyClone
from bench.compare.run import run_case
from bench.compare.systems import NAME, Moved, Scene
from bench.containers import bundle_path
from bench.lab.lab import Lab
from tests.lab.migrating import wait_clean


class Careless(StopAndCopy):
    """Moves it, and then ends it."""

    name = "careless"

    def move(self, scene: Scene) -> Moved:
        moved = super().move(scene)
        scene.target.run(["runc", "kill", NAME, "KILL"])
        return moved


def test_the_throughput_of_a_loaded_server_is_seen_around_its_move() -> None:
    (row,) = run_case(Case(8, "redis", dirty_mib_s=1), (LAZY,), 1, lambda _: None)
    assert row.outcome == "done", row
    assert row.throughput is not None
    assert row.throughput.before_per_s > 0
    assert row.throughput.gap_ms > 0


def test_every_way_moves_a_container_and_leaves_nothing() -> None:
    labs: list[Lab] = []
    rows = []
    case = Case(8, dirty_mib_s=1)
    for row in run_case(case, (LAZY, DollyClone(), StopAndCopy(), Careless()), 1, labs.append):
        rows.append(row)
        (lab,) = labs
        for host in lab.hosts:
            assert not host.path(bundle_path(NAME)).exists()
            wait_clean(host)
    done, lost = rows[:3], rows[3]
    assert [row.outcome for row in done] == ["done"] * 3, rows
    assert all(row.client_gap_ms and row.wire_mib and row.wire_mib > 4.0 for row in done)
    # The third does nothing for its client's packets meanwhile.
    assert done[2].udp_lost
    assert all(row.udp_gap_ms and row.still_ms for row in done)
    for row in done:
        for cost in row.costs.values():
            assert cost.cpu_s > 0
        # The container's memory lies there in files, until it is the container's.
        assert row.costs["B"].files_mib > 4
    assert lost.outcome in ("lost", "failed")
    assert set(rows[0].parts_ms) >= {"dump", "restore"}
    assert rows[0].facts["predicted_downtime_ms"]
