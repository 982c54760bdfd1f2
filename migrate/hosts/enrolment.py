"""A host becomes one of the fleet, and stops being one: what `migrate hosts add|remove|check` do.

Each step looks first whether it is needed, so that asking again changes nothing, or goes on where
the last try ended.
"""

from __future__ import annotations

import ipaddress
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from migrate import config, host_checks
from migrate.errors import MigrateError, UsageError
from migrate.hosts import book, bundle, wheels
from migrate.hosts.book import HostRecord
from migrate.hosts.remote import PROGRAM_ROOT, HostFacts, RemoteHost
from migrate.identity import identity_errors
from migrate.service import CHANGE_DEADLINE_S, ServiceState, Started
from transport.errors import TransportError
from transport.identity import Role

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from migrate.hosts.bundle import Bundle, Requirement
    from transport.authority import Authority
    from transport.ssh.asking import Asking

# A host with less than this left of its identity's year gets a new one when it is added again.
RENEW_BELOW_DAYS: Final = 60
# The identity of a host is not valid before its issuing, less the backdating of an hour.
CLOCK_DIFFERENCE_S_MAX: Final = 300.0
_DAY_S: Final = 86400.0
_MIGRATE: Final = f"{PROGRAM_ROOT}/current/bin/migrate"
_PACKAGES: Final = {"criu": "criu", "runc": "runc", "rsync": "rsync", "ip": "iproute2"}


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the operator allows: packages to be installed on the host; wheels from a directory; that
    the host leaves the fleet that it is in."""

    install_packages: bool = False
    wheels: Path | None = None
    new_fleet: bool = False


@dataclass(frozen=True, slots=True)
class Lack:
    """What a host lacks: `what`, a package that has it where there is one, or a requirement."""

    what: str
    package: str = ""
    requirement: Requirement | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """problems: what is wrong with a host, empty when all is well."""

    name: str
    version: str = ""
    days_left: float = 0.0
    clock_difference_s: float = 0.0
    problems: tuple[str, ...] = ()


def add(
    destination: str,
    fleet: Path,
    authority: Authority,
    asking: Asking,
    wishes: Wishes,
    addresses: Sequence[str],
    tell: Callable[[str], None],
) -> HostRecord:
    """Install, enrol, start, check. Blocking. Raises MigrateError."""
    with RemoteHost.reach(destination, asking) as host:
        facts = host.probe()
        name = facts.hostname
        tell(f"{name}: reached as {host.destination}")
        _refuse_another(fleet, name, destination)
        version = provide(host, facts, wishes, tell)
        host.settle()
        all_addresses = tuple(dict.fromkeys([*addresses, *_address_of(host)]))
        state = host.migrate(["service", "state"], ServiceState)
        _check_clock(name, state)
        if not _is_enrolled(state, name, authority):
            give_identity(
                host, PROGRAM_ROOT, name, authority, all_addresses, new_fleet=wishes.new_fleet
            )
            tell(f"{name}: enrolled")
        started = host.migrate(["service", "start"], Started, deadline_s=CHANGE_DEADLINE_S)
        tell(_told(name, started, version))
    record = HostRecord(name, destination, all_addresses, config.CONTROL_PORT, time.time())
    book.put(fleet, record)
    return record


def remove(
    wanted: str,
    fleet: Path,
    authority: Authority,
    asking: Asking,
    tell: Callable[[str], None],
) -> list[str]:
    """Take a host's identities back and tell all others. Returns the names of those that could not
    be told, the removed one among them. Blocking. Raises MigrateError."""
    record = book.find(fleet, wanted)
    try:
        authority.revoke(
            *(
                one.peer.serial
                for one in authority.issued()
                if (one.peer.name, one.peer.role) == (record.name, Role.HOST)
            )
        )
        tell(f"{record.name}: revoked")
        missed = push_revocations(fleet, authority, asking, tell, without=record.name)
    except TransportError as error:
        raise MigrateError(str(error)) from error
    book.drop(fleet, record.name)
    try:
        with RemoteHost.reach(record.destination, asking) as host:
            host.migrate(["service", "remove"], ServiceState, deadline_s=CHANGE_DEADLINE_S)
        tell(f"{record.name}: its agent is stopped, its identity deleted")
    except MigrateError as error:
        tell(f"{record.name}: not reached ({error.message}); nobody accepts its identity any more")
        missed.append(record.name)
    return missed


def push_revocations(
    fleet: Path,
    authority: Authority,
    asking: Asking,
    tell: Callable[[str], None],
    *,
    without: str = "",
) -> list[str]:
    """Bring the latest list to all hosts but one; who could not be told. Raises TransportError."""
    crl, missed = authority.crl_pem, []
    for record in book.read(fleet):
        if record.name == without:
            continue
        try:
            with RemoteHost.reach(record.destination, asking) as host:
                host.run([_MIGRATE, "identity", "revocations"], stdin=crl)
            tell(f"{record.name}: knows what is revoked")
        except MigrateError as error:
            tell(f"{record.name}: NOT TOLD what is revoked: {error.message}")
            missed.append(record.name)
    return missed


def check(record: HostRecord, asking: Asking) -> Health:
    """Ask a host over SSH, and its port from here. Blocking; raises nothing."""
    problems = []
    try:
        with RemoteHost.reach(record.destination, asking) as host:
            before_s = time.time()
            state = host.migrate(["service", "state"], ServiceState)
            middle_s = (before_s + time.time()) / 2
            address = host.ssh.target.host
    except MigrateError as error:
        return Health(record.name, problems=(error.message,))
    days = (state.identity.until_wall_s - time.time()) / _DAY_S
    difference_s = state.wall_s - middle_s
    if state.hostname != record.name:
        problems.append(f"it calls itself {state.hostname}")
    if state.identity.problem:
        problems.append(f"its identity: {state.identity.problem}")
    elif days < RENEW_BELOW_DAYS:
        problems.append(f"its identity ends in {days:.0f} days: migrate hosts add it again")
    if not state.agent_pid:
        problems.append("no agent runs there")
    elif state.agent_version != state.version:
        problems.append("its agent is of another version: migrate hosts add it again")
    if abs(difference_s) > CLOCK_DIFFERENCE_S_MAX:
        problems.append(f"its clock differs by {difference_s:.0f} s")
    if state.agent_pid and not _answers(address, record.port):
        problems.append(f"port {record.port} can't be reached from here")
    return Health(record.name, state.version, days, difference_s, tuple(problems))


def provide(
    host: RemoteHost,
    facts: HostFacts,
    wishes: Wishes,
    tell: Callable[[str], None],
    root: str | None = None,
) -> str:
    """Have this source's program on the host; the version that is there now. Raises MigrateError:
    UsageError names all that is missing."""
    lacks = lacking(facts)
    packages = sorted({one.package for one in lacks if one.package})
    if packages and wishes.install_packages and facts.apt:
        tell(f"{facts.hostname}: installs {' '.join(packages)}")
        host.install_packages(packages)
        facts = host.probe()
        lacks = lacking(facts)
    with tempfile.TemporaryDirectory(prefix="migrate-wheels-") as directory:
        found: list[Path] = []
        if lacks:
            wanted = [one.requirement for one in lacks if one.requirement is not None]
            if len(wanted) < len(lacks):
                raise _refusal(facts, lacks)
            try:
                found = wheels.fetch(wanted, facts, Path(directory), wishes.wheels)
            except MigrateError as error:
                raise _refusal(facts, lacks, f"; {error.message}") from error
        made = bundle.make(found)
    install(host, made, facts, tell, root)
    return made.version


def install(
    host: RemoteHost,
    made: Bundle,
    facts: HostFacts,
    tell: Callable[[str], None],
    root: str | None = None,
) -> None:
    """Bring a bundle unless the host has it. Raises MigrateError."""
    if root is None and facts.installed == made.version:
        return
    size = f"{len(made.archive) / 1e6:.1f} MB"
    tell(f"{facts.hostname}: installs version {made.version} ({size})")
    if root is None:
        host.install(made.version, made.archive)
    else:
        host.install(made.version, made.archive, root)


def _can_do_without(program: str, programs: dict[str, str]) -> bool:
    """One runtime is enough; where there is none, it is runc that lacks."""
    return program == "crun" or (program == "runc" and bool(programs.get("crun")))


def lacking(facts: HostFacts) -> list[Lack]:
    """What the host has too little of for this project. Pure."""
    lacks = []
    if facts.python < bundle.PYTHON_MIN:
        wanted = ".".join(map(str, bundle.PYTHON_MIN))
        found = ".".join(map(str, facts.python))
        lacks.append(Lack(f"Python {wanted} or newer (it has {found})"))
    for program, path in facts.programs.items():
        if not path and not _can_do_without(program, facts.programs):
            lacks.append(Lack(f"the program {program}", _PACKAGES.get(program, "")))
    if facts.programs.get("criu"):
        version = facts.criu.partition(":")[2].strip()
        wrong = host_checks.judge_criu(version, "")
        lacks += [Lack(f"{one.message}; {one.remedy}") for one in wrong]
    if not facts.pycriu:
        lacks.append(Lack("CRIU's Python bindings (pycriu)", "python3-pycriu"))
    for one in bundle.lacking(facts.distributions):
        lacks.append(Lack(f"Python's {one.text}", f"python3-{one.name}", one))
    return lacks


def _refusal(facts: HostFacts, lacks: Sequence[Lack], more: str = "") -> UsageError:
    packages = sorted({one.package for one in lacks if one.package})
    apt = f"apt-get install {' '.join(packages)}"
    remedy = f"{apt} there, or --install-packages" if packages and facts.apt else ""
    return UsageError(
        f"this host lacks {', '.join(one.what for one in lacks)}{more}",
        host=facts.hostname,
        phase="installation",
        remedy=remedy or "install what it lacks",
    )


def _refuse_another(fleet: Path, name: str, destination: str) -> None:
    """Two hosts of one name could each speak as the other."""
    for one in book.read(fleet):
        if one.name == name and one.destination != destination:
            raise MigrateError(
                f"a host called {name} is in this fleet already, reached as {one.destination}",
                remedy=f"if it is the same one: migrate hosts remove {name}; else rename one",
            )


def _check_clock(name: str, state: ServiceState) -> None:
    difference_s = state.wall_s - time.time()
    if abs(difference_s) > CLOCK_DIFFERENCE_S_MAX:
        raise MigrateError(
            f"the clock of {name} differs by {difference_s:.0f} s: certificates would not hold",
            host=name,
            remedy="set both clocks (chrony, systemd-timesyncd)",
        )


def _is_enrolled(state: ServiceState, name: str, authority: Authority) -> bool:
    """Whether what the host has will do for a while."""
    identity = state.identity
    if identity.problem or identity.name != name:
        return False
    if identity.authority.encode() != authority.certificate_pem:
        return False
    known = {one.peer.serial: one for one in authority.issued()}
    ours = known.get(int(identity.serial, 16))
    days = (identity.until_wall_s - time.time()) / _DAY_S
    return ours is not None and not ours.revoked and days >= RENEW_BELOW_DAYS


def give_identity(
    host: RemoteHost,
    root: str,
    name: str,
    authority: Authority,
    addresses: Sequence[str] = (),
    into: Sequence[str] = (),
    *,
    new_fleet: bool = False,
) -> None:
    """The key is made on the host; what travels is a request and certificates. `into`: options of
    `migrate identity`. Raises MigrateError."""
    command = [f"{root}/current/bin/migrate", "identity"]
    wanted = host.run([*command, "request", *into]).stdout
    with identity_errors():
        answer = {
            "ca": authority.certificate_pem.decode(),
            "crl": authority.crl_pem.decode(),
            "certificate": authority.issue(wanted, name, Role.HOST, addresses).decode(),
        }
    leave = ["--new-fleet"] if new_fleet else []
    host.run([*command, "install", *into, *leave], stdin=msgspec.json.encode(answer))


def _address_of(host: RemoteHost) -> tuple[str, ...]:
    """Where it was reached, if that is an address: then others may call it by that too."""
    try:
        return (str(ipaddress.ip_address(host.ssh.target.host)),)
    except ValueError:
        return ()


def _told(name: str, started: Started, version: str) -> str:
    if started.how == "busy":
        return (
            f"{name}: its agent is of another version and serves a migration;"
            " add the host again when that has ended"
        )
    if started.how == "running":
        return f"{name}: its agent runs, version {version}"
    return f"{name}: its agent was {started.how}, version {version}"


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=config.CONNECT_DEADLINE_S).close()
    except OSError:
        return False
    return True
