"""Where secrets may not be found: in logs, journals, reports, command lines and environments; and
that what holds them is neither swapped out nor dumped as a core."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

import pytest

from bench.containers import ContainerSpec, bundle_path, create, start
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.lab.brake import Brake
from tests.lab.inside import inside
from tests.lab.invariants import AGENT_LOG
from tests.lab.migrating import Resident, begin, expel

SPEC: Final = ContainerSpec("sc1", "memory", address="10.77.0.92/24", address6=None)
MARKER: Final = "a-password-of-the-container-4711"
RECORD: Final = "/run/tickets"
# Python imports it by itself: whatever the agent draws for a ticket is known to this test.
RECORDER: Final = f"""\
import secrets
_draw = secrets.token_bytes
def token_bytes(size=None):
    drawn = _draw(size)
    if size == 32:
        with open({RECORD!r}, "a") as record:
            record.write(drawn.hex() + "\\n")
    return drawn
secrets.token_bytes = token_bytes
"""
LOOK = """
import base64, os
def contents(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""
places = {}
for pid in (name for name in os.listdir("/proc") if name.isdecimal()):
    name = contents(Path(f"/proc/{pid}/comm")).decode().strip()
    numbers = contents(Path(f"/proc/{pid}/status")).partition(b"NSpid:")[2].split(b"\\n")[0]
    if len(numbers.split()) > 1:
        # A task of the container, which may know its own password.
        continue
    for kind in ("cmdline", "environ"):
        places[f"{name} {pid} {kind}"] = contents(Path(f"/proc/{pid}/{kind}"))
for pattern in given["files"]:
    for path in Path("/").glob(pattern):
        places[str(path)] = contents(path)
raw = bytes.fromhex
found = []
for place, data in places.items():
    for what, secret in given["secrets"].items():
        forms = [secret.encode()]
        if what == "ticket":
            forms += [raw(secret), base64.b64encode(raw(secret))]
        found += [f"{what} in {place}" for form in forms if form in data]
answer({"found": found, "places": sorted(places)})
"""
FILES: Final = (
    "var/lib/migrate/journal.sqlite*",
    AGENT_LOG[1:],
    "run/migrate/sessions/*/work/*.log",
    "run/migrate/sessions/*/work/hold/*.conf",
    "tmp/*report.json",
)
MOUNTS = """
lines = Path("/proc/self/mounts").read_text().splitlines()
answer([line.split() for line in lines if "/run/migrate/sessions/" in line])
"""
# Who was started for a migration, and whether a fault of it would leave something.
CORES = """
import psutil
def is_ours(one):
    words = " ".join(one.cmdline())
    return one.name() in ("criu", "runc") or "migrate" in words or "criu_glue" in words
ours = [one for one in psutil.process_iter() if is_ours(one)]
def core(one):
    # prlimit(2) of another user's process needs a capability.
    limits = Path(f"/proc/{one.pid}/limits").read_text()
    return int(limits.partition("Max core file size")[2].split()[0].replace("unlimited", "-1"))
answer({f"{one.name()} {one.pid}": core(one) for one in ours})
"""


@pytest.fixture(scope="module")
def stage() -> Iterator[Lab]:
    with Lab(["A", "B"]) as lab:
        for host in lab.hosts:
            (python,) = host.path("/usr/local/lib").glob("python3.*")
            (python / "dist-packages/usercustomize.py").write_text(RECORDER)
            lab.start_agent(host.name, env=Brake(host).env)
        yield lab


@pytest.fixture
def guest(stage: Lab) -> Iterator[Resident]:
    """A container whose memory holds a password."""
    host = stage.host("A")
    try:
        create(host, SPEC)
        path = f"{bundle_path(SPEC.name)}/config.json"
        config: dict[str, Any] = json.loads(host.read_text(path))
        config["process"]["env"].append(f"PASSWORD={MARKER}")
        host.write_text(path, json.dumps(config))
        start(host, SPEC.name)
        yield Resident(stage, SPEC, None)
    finally:
        expel(stage, SPEC.name)


def secrets_of(lab: Lab) -> dict[str, str]:
    tickets = lab.host("B").read_text(RECORD).split()
    # The front's own numbers are drawn the same way; each is a secret.
    assert tickets
    secrets = {"password": MARKER, "ticket": tickets[-1]}
    for host in lab.hosts:
        for path in host.path("/etc/migrate/tls").glob("*.pem"):
            _, begun, rest = path.read_text().partition("PRIVATE KEY-----")
            if begun:
                secrets[f"key of {host.name} {path.name}"] = rest.split()[0]
    assert len(secrets) >= 4, sorted(secrets)
    return secrets


def look(host: Host, secrets: Mapping[str, str]) -> list[str]:
    """Asserts that none of them is anywhere; where was looked."""
    seen = inside(host, LOOK, {"files": FILES, "secrets": secrets})
    # The one that looks was given them.
    assert [one for one in seen["found"] if not one.endswith("cmdline")] == []
    assert len([one for one in seen["found"] if one.endswith("cmdline")]) == len(secrets)
    return list(seen["places"])


def test_secrets_are_nowhere_to_be_read(stage: Lab, guest: Resident) -> None:
    source, target = stage.hosts
    brakes = {"dump": Brake(source), "restore": Brake(target)}
    with brakes["dump"].on("dump"), brakes["restore"].on("restore"):
        underway = begin(source, guest.name, "B", "--json", env=Brake.env)
        for act in ("dump", "restore"):
            brakes[act].wait_reached(underway)
            secrets = secrets_of(stage)
            places = look(source, secrets) + look(target, secrets)
            assert any(place.startswith("/run/migrate/sessions/") for place in places)
            for host in stage.hosts:
                assert host.path("/run/migrate/sessions").stat().st_mode & 0o077 == 0 or all(
                    one.stat().st_mode & 0o077 == 0
                    for one in host.path("/run/migrate/sessions").iterdir()
                )
                for mount in inside(host, MOUNTS):
                    assert mount[2] == "tmpfs"
                    # Where nobody can write, nothing is.
                    safe = {"ro"} if mount[1].endswith("/masked") else {"mode=700", "noswap"}
                    assert safe <= set(mount[3].split(",")), mount
                cores = inside(host, CORES)
                assert cores
                assert set(cores.values()) == {0}, cores
            brakes[act].release()
        moved = underway.finish()
    assert moved.done
    for host in stage.hosts:
        look(host, secrets)
        for kind, text in (("stdout", moved.stdout), ("stderr", moved.stderr)):
            assert not [what for what, one in secrets.items() if one in text], kind
        assert not [what for what, one in secrets.items() if one in json.dumps(moved.report)]
