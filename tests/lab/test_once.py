"""Migrations to hosts that are in no fleet: by SSH alone, and nothing is left of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from bench.containers import ContainerSpec
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.faults import halting
from tests.faults.points import moment
from tests.faults.scene import ENVIRONMENT, HALTING, PROGRAMS
from tests.lab.migrating import Migration, begin, resident, running_on, wait_clean
from tests.lab.waiting import wait_until

NAME = "once"
# An agent is brought and started, with all of its modules compiled, on a busy machine.
PATIENCE_S = 240.0

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def bare() -> Iterator[Lab]:
    """Hosts without any identity, on which no agent runs."""
    with Lab(["A", "B"]) as lab:
        _strip(lab)
        yield lab


def _strip(lab: Lab) -> None:
    for host in lab.hosts:
        host.run(["rm", "-rf", "/etc/migrate"])


def _spec(number: int) -> ContainerSpec:
    return ContainerSpec(
        f"{NAME}{number}",
        "memory",
        args=("16", "--text", "30", "--zero", "10"),
        memory_mib=64,
        address=f"10.77.0.{150 + number}/24",
        address6=None,
    )


def _firewall(host: Host) -> None:
    """Nothing but SSH reaches the host itself; what is bridged to containers is not asked."""
    rules = f"""table inet closed {{
        chain input {{
            type filter hook input priority 0;
            ip daddr {host.address} tcp dport 1024-65535 ct state new drop;
        }}
    }}
    """
    host.run(["nft", "-f", "-"], input=rules)


def _open(host: Host) -> None:
    host.run(["nft", "delete", "table", "inet", "closed"])


def _is_gone(lab: Lab, *residents: str) -> None:
    for host in lab.hosts:
        here = [name for name in residents if running_on(lab, name) == [host.name]]
        places = [host.path(f"{base}/once") for base in ("/var/lib/migrate", "/run/migrate")]
        wait_until(f"{places} are gone", partial(_are_gone, places))
        wait_clean(host, *here)
        assert not _agents(host)


def migrate(host: Host, name: str, target: str, *options: str) -> Migration:
    """To its end: an agent is brought and started within it."""
    return begin(host, name, target, *options).finish(PATIENCE_S)


def _are_gone(places: list[Path]) -> bool:
    return not any(place.exists() for place in places)


def _agents(host: Host) -> list[str]:
    shown = host.run(["ps", "-eo", "args="]).stdout.splitlines()
    return [line for line in shown if "migrate agent" in line]


def test_there_by_tls_and_back_through_ssh(bare: Lab) -> None:
    spec = _spec(0)
    with resident(bare, spec) as guest:
        there = migrate(bare.host("A"), guest.name, "root@B")
        assert there.done["target"] == "B"
        assert "data by TLS" in there.stderr
        assert running_on(bare, guest.name) == ["B"]
        guest.verify()
        _is_gone(bare, guest.name)

        _firewall(bare.host("A"))
        back = migrate(bare.host("B"), guest.name, "root@A")
        assert back.done["target"] == "A"
        assert "through SSH" in back.stderr
        assert running_on(bare, guest.name) == ["A"]
        guest.verify()
        guest.wait_answers()
        assert guest.stop_probe().clean
        _is_gone(bare, guest.name)
        _open(bare.host("A"))


def test_checking_leaves_nothing_and_trusts_nobody(bare: Lab) -> None:
    """A host that no known_hosts has is refused without a word to it, or accepted for good."""
    spec, here = _spec(1), bare.host("A")
    known = here.read_text("/root/.ssh/known_hosts")
    here.write_text("/root/.ssh/known_hosts", "")
    with resident(bare, spec, probe=False) as guest:
        check = ["migrate", guest.name, "--to", "root@B", "--dry-run", "--json"]
        refused = here.run(check, check=False)
        assert refused.returncode != 0
        assert "SHA256:" in refused.stderr
        assert "is in no known_hosts" in refused.stderr
        assert not bare.host("B").path("/var/lib/migrate/once").exists()

        done = here.run([*check, "--accept-new"], timeout_s=PATIENCE_S)
        assert json.loads(done.stdout)["target"] == "B"
        assert running_on(bare, guest.name) == ["A"]
        _is_gone(bare, guest.name)
        key = known.splitlines()[1].split()[2]
        assert key in here.read_text("/root/.ssh/known_hosts")


def test_a_container_that_is_not_there(bare: Lab) -> None:
    refused = migrate(bare.host("A"), "nobody", "root@B")
    assert refused.code == 2
    assert "no container nobody" in refused.stderr
    _is_gone(bare)


def test_the_source_is_interrupted(bare: Lab) -> None:
    """Undone here and there, and the agent of this migration is gone."""
    spec = _spec(2)
    with resident(bare, spec) as guest:
        underway = begin(bare.host("A"), guest.name, "root@B", "--json", "--max-downtime", "1")
        underway.wait_phase("rootfs", deadline_s=PATIENCE_S)
        underway.interrupt()
        ended = underway.finish(PATIENCE_S)
        assert ended.code == 1, ended
        assert running_on(bare, guest.name) == ["A"]
        assert guest.stop_probe().clean
        _is_gone(bare, guest.name)


def test_the_source_is_killed_when_it_has_committed(new_lab: Callable[..., Lab]) -> None:
    """`migrate recover` comes back by SSH, has the copy run, and clears up."""
    lab = new_lab(["A", "B"])
    here, at = lab.host("A"), moment("source.send_commit.before")
    _strip(lab)
    here.write_text(f"{PROGRAMS}/migrate", HALTING, 0o755)
    for directory in (halting.ARMED, halting.REACHED):
        here.path(directory).mkdir(parents=True)
    here.path(halting.ARMED / str(at)).touch()
    with resident(lab, _spec(3)) as guest:
        underway = begin(here, guest.name, "root@B", env=ENVIRONMENT)
        wait_until(
            "it has committed", here.path(halting.REACHED / str(at)).exists, deadline_s=PATIENCE_S
        )
        underway.kill()
        underway.finish()
        assert here.path("/var/lib/migrate/once").exists()
        here.run(["migrate", "recover"])
        wait_until("it runs on B alone", lambda: running_on(lab, guest.name) == ["B"])
        guest.verify()
        guest.wait_answers()
        assert guest.stop_probe().clean
        # The agent there is dismissed when the memory is filled in.
        wait_until("nothing is left", lambda: here.run(["migrate", "recover"]).returncode == 0)
        _is_gone(lab, guest.name)
