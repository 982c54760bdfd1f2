"""What a host lacks, and what is brought there. The rest is in tests/lab/test_hosts.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from migrate.errors import UsageError
from migrate.hosts import book, bundle, enrolment
from migrate.hosts.remote import HostFacts, RemoteHost
from migrate.service import START_DEADLINE_S, STOP_DEADLINE_S, IdentityState, ServiceState
from transport.authority import Authority

FINE = HostFacts(
    hostname="db7",
    uid=0,
    python=(3, 13, 5),
    machine="x86_64",
    glibc="2.41",
    systemd=True,
    apt=True,
    programs={name: f"/usr/bin/{name}" for name in ("criu", "runc", "crun", "rsync", "ip")},
    criu="Version: 4.2.1",
    distributions={
        one.name: "6" if one.name == "protobuf" else "999" for one in bundle.requirements()
    },
    pycriu=True,
    installed="",
)


def _without(name: str) -> dict[str, str]:
    return {one: version for one, version in FINE.distributions.items() if one != name}


@pytest.mark.parametrize("without", ["runc", "crun"])
def test_a_host_that_lacks_nothing(without: str) -> None:
    """One runtime is enough."""
    assert enrolment.lacking(FINE) == []
    one = msgspec.structs.replace(FINE, programs={**FINE.programs, without: ""})
    assert enrolment.lacking(one) == []


@pytest.mark.parametrize(
    ("change", "what", "package"),
    [
        ({"python": (3, 9, 2)}, "Python 3.11 or newer (it has 3.9.2)", ""),
        ({"programs": {**FINE.programs, "ip": ""}}, "the program ip", "iproute2"),
        ({"criu": "Version: 3.17.1"}, "CRIU is 3.17.1, at least 4.2 is needed", ""),
        ({"pycriu": False}, "CRIU's Python bindings (pycriu)", "python3-pycriu"),
        ({"distributions": _without("numpy")}, "Python's numpy>=2.2", "python3-numpy"),
    ],
)
def test_what_is_lacking(change: dict[str, object], what: str, package: str) -> None:
    (lack,) = enrolment.lacking(msgspec.structs.replace(FINE, **change))
    assert lack.what.startswith(what)
    assert lack.package == package


class Host:
    """Takes what is installed, and is asked for facts again."""

    def __init__(self, later: HostFacts) -> None:
        self.later = later
        self.packages: list[str] = []
        self.installed: list[str] = []

    def install_packages(self, packages: list[str]) -> None:
        self.packages += packages

    def probe(self) -> HostFacts:
        return self.later

    def install(self, version: str, archive: bytes, root: str = "/opt/migrate") -> None:
        self.installed.append(version)


def _provide(host: Host, facts: HostFacts, wishes: enrolment.Wishes) -> str:
    return enrolment.provide(host, facts, wishes, lambda line: None)  # type: ignore[arg-type]


def test_all_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    facts = msgspec.structs.replace(
        FINE, pycriu=False, programs={**FINE.programs, "rsync": "", "runc": "", "crun": ""}
    )
    host = Host(FINE)
    with pytest.raises(UsageError) as refused:
        _provide(host, facts, enrolment.Wishes(wheels=tmp_path))
    assert "lacks the program runc, the program rsync, CRIU's Python" in refused.value.message
    assert "apt-get install python3-pycriu rsync runc there" in refused.value.remedy
    assert (host.packages, host.installed) == ([], [])


def test_packages_are_installed_where_that_is_allowed() -> None:
    host = Host(FINE)
    facts = msgspec.structs.replace(FINE, pycriu=False)
    version = _provide(host, facts, enrolment.Wishes(install_packages=True))
    assert host.packages == ["python3-pycriu"]
    assert host.installed == [version]


def test_packages_that_help_nothing_are_an_error() -> None:
    lacking = msgspec.structs.replace(FINE, criu="", programs={**FINE.programs, "criu": ""})
    host = Host(lacking)
    with pytest.raises(UsageError, match="the program criu"):
        _provide(host, lacking, enrolment.Wishes(install_packages=True))
    assert host.installed == []


def test_what_is_there_is_not_brought_again() -> None:
    host = Host(FINE)
    facts = msgspec.structs.replace(FINE, installed=bundle.make().version)
    _provide(host, facts, enrolment.Wishes())
    assert host.installed == []


def test_wheels_that_nobody_has(tmp_path: Path) -> None:
    """An empty directory, so that no index is asked."""
    facts = msgspec.structs.replace(FINE, distributions=_without("numpy"))
    with pytest.raises(UsageError, match=r"Python's numpy>=2\.2; pip got no wheels"):
        _provide(Host(FINE), facts, enrolment.Wishes(wheels=tmp_path))


class Slow(Host):
    """Its agent takes as long to stop and to start as its service may wait for it."""

    destination = "root@db7"

    def __enter__(self) -> Slow:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def migrate(self, arguments: list[str], answer: type, deadline_s: float = 60.0) -> ServiceState:
        if arguments != ["service", "state"]:
            assert deadline_s > STOP_DEADLINE_S + START_DEADLINE_S
        return ServiceState("db7", "1", 0, "", False, (), IdentityState(), time.time())


def test_an_agent_may_take_its_time_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemoteHost, "reach", lambda *_: Slow(FINE))
    book.put(tmp_path, book.HostRecord("db7", "root@db7"))
    authority = Authority.temporary()
    told: list[str] = []
    asking: Any = None
    assert enrolment.remove("db7", tmp_path, authority, asking, told.append) == []
    assert "db7: its agent is stopped, its identity deleted" in told
