"""A host is emptied and filled again: four hosts, containers with clients that must not notice."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from bench.containers import ContainerSpec, bundle_path, create, start
from bench.lab.host_files import FLEET, OPERATOR
from tests.lab.migrating import expel, migrate, resident, running_on
from tests.lab.waiting import wait_until
from transport.core.bucket import BURST_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.lab.host import Host
    from bench.lab.lab import Lab
    from tests.lab.migrating import Resident

pytestmark = pytest.mark.lab
DRAIN_S = 240.0
REMOTE = ("A", "--fleet", FLEET, "--as", OPERATOR)
STATE = "/var/lib/migrate/drain/state.json"
# Says yes when two containers are on their way, or have left: nobody may wait for it meanwhile.
PATIENT_HOOK = f"""\
#!/bin/sh
[ "$1" = before ] || exit 0
until [ "$(grep -Eo '"state":"(moving|arrived)"' {STATE} | wc -l)" -ge 2 ]; do sleep 0.1; done
"""


@pytest.fixture
def four(new_lab: Callable[..., Lab]) -> Lab:
    lab = new_lab(["A", "B", "C", "D"])
    lab.start_agents()
    return lab


def spec(number: int, workload: str = "memory", **others: Any) -> ContainerSpec:
    others = {"args": ("1",), **others} if workload == "memory" else others
    return ContainerSpec(
        f"d{number}",
        workload,
        address=f"10.77.0.{60 + number}/24",
        address6=None,
        **others,
    )


def annotate(host: Host, name: str, **annotations: str) -> None:
    path = host.path(f"{bundle_path(name)}/config.json")
    config = json.loads(path.read_text())
    config["annotations"] |= {f"migrate.{key}": text for key, text in annotations.items()}
    path.write_text(json.dumps(config))


@contextlib.contextmanager
def unclad(lab: Lab, container: ContainerSpec, **annotations: str) -> Iterator[None]:
    """A container on A without a client, with annotations."""
    host = lab.host("A")
    try:
        create(host, container)
        annotate(host, container.name, **annotations)
        start(host, container.name)
        yield
    finally:
        expel(lab, container.name)


def drained(
    host: Host, *arguments: str, code: int = 0, deadline_s: float = DRAIN_S
) -> dict[str, Any]:
    """A command of drains on `host`, run to its end; what it says at last."""
    done = host.run(["migrate", *arguments, "--json"], check=False, timeout_s=deadline_s)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    state: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return state


def moves(state: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {one["container"]: (one["state"], one["target"]) for one in state["moves"]}


def assert_all_stay_when_cancelled(lab: Lab) -> None:
    """A drain of A that is cancelled, from elsewhere, while a program of the operator thinks."""
    host = lab.host("A")
    hook = "#!/bin/sh\nuntil [ -e /run/go-on ]; do sleep 0.1; done\n"
    host.write_text("/etc/migrate/drain.d/check", hook, 0o755)
    lab.client.run(["migrate", "drain-node", *REMOTE, "--to", "B,C,D", "--detach"])
    moving, ended = '"state":"moving"', '"phase":"ended"'
    wait_until("one begins", lambda: moving in host.read_text(STATE), deadline_s=60)
    lab.client.run(["migrate", "cancel", "drain", "--host", *REMOTE])
    host.write_text("/run/go-on", "")
    wait_until("the drain ends", lambda: ended in host.read_text(STATE), deadline_s=60)
    state = json.loads(host.read_text(STATE))
    cancelled = [one["container"] for one in state["moves"] if "cancelled" in one["why"]]
    assert cancelled == ["d0", "d1", "d2"]
    assert state["exit_code"] == 1
    assert all(running_on(lab, name) == ["A"] for name in cancelled)
    # As after any drain that has begun.
    assert host.path("/var/lib/migrate/cordon.json").exists()


def predicted_ms(plan: dict[str, Any]) -> dict[str, float]:
    """The downtimes of what would move."""
    return {
        one["container"]: one["predicted_downtime_ms"]
        for one in plan["moves"]
        if one["state"] == "waiting"
    }


def assert_paced(host: Host, state: dict[str, Any], *, mib_s: float) -> None:
    """No first round was faster than the drain's bandwidth, on whatever machine, where there was
    something to send."""
    ids = [one["migration_id"] for one in state["moves"] if one["state"] == "arrived"]
    sizes: list[float] = []
    for migration_id in ids:
        first = json.loads(host.read_text(f"/var/lib/migrate/drain/{migration_id}.json"))["rounds"][
            0
        ]
        # What is on its way at once is let through at once: a piece of each stream, and a burst.
        sent_mib = first["bytes_sent"] / (1 << 20) - 1.0 - mib_s * BURST_S
        sizes.append(sent_mib)
        assert first["duration_ms"] >= 1000 * sent_mib / mib_s
    assert max(sizes) > 4


def assert_unharmed(guests: list[Resident]) -> None:
    for guest in guests:
        if guest.spec.workload == "memory":
            guest.verify()
        assert guest.probe is not None
        assert guest.probe.alive(), f"the connection to {guest.name} broke"
        seen = guest.stop_probe()
        assert seen.clean, seen


def test_a_host_is_emptied_and_filled_again(four: Lab) -> None:
    """The plan first; then, asked by an operator from elsewhere, three containers with clients, of
    which two keep apart and two together, one that must stay and one that can't move: the host is
    cordoned, takes nothing, and undrain brings home what left. Before, the same was cancelled."""
    host = four.host("A")
    with contextlib.ExitStack() as stack:
        kinds = ("memory", "nginx", "web")
        guests = [
            stack.enter_context(resident(four, spec(number, kind), rate_per_s=100))
            for number, kind in enumerate(kinds)
        ]
        stack.enter_context(unclad(four, spec(3), policy="leave"))
        stack.enter_context(unclad(four, spec(4, "blocker", args=("io_uring",))))
        annotate(host, "d0", **{"anti-affinity": "db"})
        annotate(host, "d1", **{"anti-affinity": "db", "group": "shop"})
        annotate(host, "d2", group="shop", order="1")
        plan = drained(host, "drain-node", "--to", "B,C,D", "--dry-run", code=1)
        assert {name: state for name, (state, _) in moves(plan).items()} == {
            **dict.fromkeys(("d0", "d1", "d2"), "waiting"),
            "d3": "left",
            "d4": "stays",
        }
        assert running_on(four, "d0") == ["A"]
        assert not plan["cordoned"]

        shared = ("--max-parallel", "2", "--bandwidth", "32")
        assert_all_stay_when_cancelled(four)
        host.write_text("/etc/migrate/drain.d/check", PATIENT_HOOK, 0o755)
        emptied = drained(four.client, "drain-node", *REMOTE, "--to", "B,C,D", *shared, code=1)
        assert_paced(host, emptied, mib_s=32)
        where = moves(emptied)
        assert [state for state, _ in where.values()].count("arrived") == 3
        for name in ("d0", "d1", "d2"):
            assert running_on(four, name) == [where[name][1]]
        assert where["d0"][1] != where["d1"][1] == where["d2"][1]
        assert where["d3"][0] == "left"
        (blocked,) = (one for one in emptied["moves"] if one["container"] == "d4")
        assert blocked["state"] == "stays"
        assert "io_uring" in blocked["why"]
        assert running_on(four, "d4") == ["A"]
        assert emptied["cordoned"]

        there = four.host(where["d0"][1])
        refused = migrate(there, "d0", "A")
        assert refused.code == 2
        assert "[cordoned]" in refused.stderr
        assert "undrain" in refused.stderr
        shown = host.run(["migrate", "status"]).stdout
        assert emptied["drain_id"] in shown
        assert four.client.run(["migrate", "status", "--host", *REMOTE]).stdout == shown

        home = drained(host, "undrain", "--max-parallel", "2")
        assert [state for state, _ in moves(home).values()].count("home") == 3
        assert all(running_on(four, guest.name) == ["A"] for guest in guests)
        assert not home["cordoned"]
        again = drained(host, "drain-node", "--to", "B,C,D", "--dry-run", code=1)
        assert predicted_ms(again) == {
            one["container"]: round(one["downtime_ms"], 1)
            for one in emptied["moves"]
            if one["state"] == "arrived"
        }
        assert_unharmed(guests)


def test_a_target_dies_and_the_command_too_and_all_still_run(four: Lab) -> None:
    """The command is killed, the drain goes on; a target is lost in the middle, and gets nothing
    more; a program of the operator says no to one container; no order of a stranger is heard."""
    host = four.host("A")
    hook = '#!/bin/sh\n[ "$1 $2" != "before d2" ] || { echo not now; exit 1; }\n'
    with contextlib.ExitStack() as stack:
        guests = [stack.enter_context(resident(four, spec(number))) for number in range(3)]
        host.write_text("/etc/migrate/drain.d/check", hook, 0o755)
        process = host.popen(["migrate", "drain-node", "--to", "B,C", "--max-parallel", "1"])

        def state() -> dict[str, Any]:
            found: dict[str, Any] = json.loads(host.read_text(STATE))
            return found

        path = host.path(STATE)
        wait_until(
            "a container moves",
            lambda: path.exists() and any(one["state"] == "moving" for one in state()["moves"]),
            deadline_s=60,
        )
        process.kill()
        process.wait()
        (first,) = {one["target"] for one in state()["moves"] if one["state"] == "moving"}
        four.kill_agent(first)
        wait_until("the drain ends", lambda: state()["phase"] == "ended", deadline_s=DRAIN_S)
        ended, other = state(), ({"B", "C"} - {first}).pop()
        where = moves(ended)
        assert where["d2"][0] == "stays"
        assert "not now" in next(one["why"] for one in ended["moves"] if one["container"] == "d2")
        assert ended["exit_code"] == 1
        four.start_agent(first)
        for name in ("d0", "d1"):
            assert where[name][0] == "arrived"
            assert running_on(four, name) == [where[name][1]]
        assert other in {target for _, target in where.values()}

        stranger = four.host("D").run(["migrate", "cordon", "A"], check=False)
        assert stranger.returncode == 2
        late = drained(host, "drain-node", "--to", "B,C", "--deadline", "1", code=1)
        assert "the deadline" in next(
            one["why"] for one in late["moves"] if one["container"] == "d2"
        )
        four.host("B").run(["migrate", "cordon"])
        four.host("C").run(["migrate", "cordon"])
        full = drained(host, "drain-node", "--to", "B,C", code=2)
        assert "cordoned" in full["why"]
        assert_unharmed(guests)


def test_a_drain_that_is_killed_is_gone_on_with_and_a_check_brings_back(four: Lab) -> None:
    """Its process is killed while a container moves, which goes on; resumed, it asks the operator's
    program about that one, which comes back, and ends another as its policy says."""
    host = four.host("A")
    hook = '#!/bin/sh\n[ "$1" != after ] || { echo no answer; exit 1; }\n'
    with contextlib.ExitStack() as stack:
        guest = stack.enter_context(resident(four, spec(0)))
        stack.enter_context(unclad(four, spec(1), policy="stop", priority="-1"))
        host.write_text("/etc/migrate/drain.d/check", hook, 0o755)
        host.run(["migrate", "drain-node", "--to", "B", "--move-back", "--detach"])
        path = host.path(STATE)
        moving = '"state":"moving"'
        wait_until("a container moves", lambda: moving in path.read_text(), deadline_s=60)
        host.run(["pkill", "-KILL", "-f", "migrate.drain drain-"])
        resumed = drained(host, "drain-node", "--resume", code=1)
        (kept, _), (ended, _) = moves(resumed)["d0"], moves(resumed)["d1"]
        assert (kept, ended) == ("stays", "stopped")
        (why,) = (one["why"] for one in resumed["moves"] if one["container"] == "d0")
        assert "no answer" in why
        assert "moved back" in why
        assert running_on(four, "d0") == ["A"]
        assert running_on(four, "d1") == []
        assert_unharmed([guest])
