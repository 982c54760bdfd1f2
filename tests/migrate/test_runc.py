"""The runc driver against a stand-in for runc: command lines, answers, limits, cleaning up."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from migrate.runtimes.base import (
    Container,
    ContainerNotFoundError,
    InvalidNameError,
    Mount,
    RuntimeDriverError,
    validate_name,
    validate_path,
)
from migrate.runtimes.command import descriptors_json
from migrate.runtimes.oci import mounts_of, namespace_path, network_namespace
from migrate.runtimes.runc import Runc, cgroup_for

SPEC: dict[str, Any] = {
    "process": {"terminal": False},
    "root": {"path": "rootfs"},
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/data", "source": "/srv/data", "options": ["rbind", "rw"]},
    ],
    "linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/web"}]},
}
STATE = {"id": "web", "pid": 4711, "status": "running", "rootfs": "/srv/web/rootfs"}
KEPT = {
    "cgroup_paths": {"": "/sys/fs/cgroup/dolly/web"},
    "external_descriptors": ["/dev/null", "pipe:[17]", "/dev/null"],
}

# Answers `state NAME` from answer.json, logs every call; what it does not know does not exist.
STAND_IN = """\
#!/bin/sh
here=$(dirname "$0")
echo "$*" >> "$here/calls"
case "$*" in
*--version) echo "runc version 1.1.15+ds1"; echo "spec: 1.2.0" ;;
*" state web") cat "$here/answer.json" ;;
*" delete --force "*) rm -rf "$2/web" ;;
*) echo "level=error msg=\\"container does not exist\\"" >&2; exit 1 ;;
esac
"""


class Host:
    """A directory with a stand-in for runc, its state directory and one bundle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = path / "state"
        self.program = path / "runc"
        self.program.write_text(STAND_IN)
        self.program.chmod(stat.S_IRWXU)
        self.bundle = path / "bundle"
        self.bundle.mkdir()
        self.write(SPEC, STATE, KEPT)

    def write(self, spec: object, state: dict[str, Any], kept: object) -> None:
        (self.root / "web").mkdir(parents=True, exist_ok=True)
        (self.bundle / "config.json").write_text(json.dumps(spec))
        (self.root / "web" / "state.json").write_text(json.dumps(kept))
        answer = {"bundle": str(self.bundle), **state}
        (self.path / "answer.json").write_text(json.dumps(answer))

    def runc(self) -> Runc:
        return Runc(root=self.root, program=str(self.program))

    def calls(self) -> list[str]:
        calls = self.path / "calls"
        return calls.read_text().splitlines() if calls.exists() else []


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_inspect_tells_all_that_a_migration_needs(host: Host) -> None:
    assert host.runc().inspect("web") == Container(
        name="web",
        runtime="runc",
        status="running",
        pid=4711,
        bundle=host.bundle,
        rootfs=Path("/srv/web/rootfs"),
        spec=SPEC,
        cgroup=Path("/sys/fs/cgroup/dolly/web"),
        netns=Path("/run/netns/web"),
        terminal=False,
        mounts=mounts_of(SPEC),
        descriptors=("/dev/null", "pipe:[17]", "/dev/null"),
    )


def test_the_commands_are_these(host: Host) -> None:
    runc, container = host.runc(), host.runc().inspect("web")
    checkpoint = runc.checkpoint_command(
        container, Path("/run/m/img"), Path("/run/m/work"), lazy=True
    )
    log = ["--log", "/run/m/work/runtime.log", "--log-format", "json"]
    head = [str(host.program), "--root", str(host.root), *log]
    directories = ["--image-path", "/run/m/img", "--work-path", "/run/m/work"]
    assert checkpoint == [
        *(*head, "checkpoint", "--tcp-established", "--file-locks", "--lazy-pages"),
        *("--page-server", "127.0.0.1:1", *directories, "web"),
    ]
    plain = runc.checkpoint_command(container, Path("/i"), Path("/w"), lazy=False)
    assert "--lazy-pages" not in plain
    assert "--page-server" not in plain
    after = runc.checkpoint_command(
        container, Path("/run/m/img"), Path("/run/m/work"), lazy=False, parent="../last"
    )
    assert after == [
        *(*head, "checkpoint", "--tcp-established", "--file-locks"),
        *("--parent-path", "../last", *directories, "web"),
    ]
    for parent, words in ((None, []), ("../last", ["--parent-path", "../last"])):
        pre_dump = runc.pre_dump_command(
            container, Path("/run/m/img"), Path("/run/m/work"), parent=parent
        )
        assert pre_dump == [*head, "checkpoint", "--pre-dump", *words, *directories, "web"]
    restore = runc.restore_command(
        "web", Path("/srv/web"), Path("/run/m/img"), Path("/run/m/work"), lazy=True
    )
    assert restore == [
        *(*head, "restore", "--detach", "--tcp-established", "--file-locks", "--lazy-pages"),
        *("--bundle", "/srv/web", *directories, "web"),
    ]
    eager = runc.restore_command("web", Path("/b"), Path("/i"), Path("/w"), lazy=False)
    assert "--lazy-pages" not in eager


def test_version_is_runcs_own_word(host: Host) -> None:
    assert host.runc().version() == "1.1.15+ds1"


def test_a_missing_program_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeDriverError, match="not installed"):
        Runc(root=tmp_path, program=str(tmp_path / "none")).version()


def test_an_unknown_container_is_not_found(host: Host) -> None:
    runc = host.runc()
    with pytest.raises(ContainerNotFoundError, match="no container other"):
        runc.inspect("other")
    assert runc.state("other") is None
    assert not runc.exists("other")
    assert runc.state("web") == "running"
    assert runc.exists("web")


def test_a_restore_that_has_not_ended_takes_the_name_and_has_no_state(host: Host) -> None:
    (host.root / "half").mkdir()
    assert host.runc().exists("half")
    assert host.runc().state("half") is None


def test_a_state_that_runc_takes_back_is_not_found(host: Host) -> None:
    (host.root / "gone").mkdir()
    (host.root / "gone" / "state.json").write_text("{}")
    assert host.runc().state("gone") is None


@pytest.mark.parametrize("name", ["", "-v", ".x", "a/b", "a b", "..", "a\n", "x" * 65, "é"])
def test_a_bad_name_reaches_no_command_line(host: Host, name: str) -> None:
    runc, container = host.runc(), host.runc().inspect("web")
    before = host.calls()
    path = Path("/p")
    bad = Container(**{field: getattr(container, field) for field in container.__slots__})
    object.__setattr__(bad, "name", name)
    for act in (
        lambda: runc.inspect(name),
        lambda: runc.exists(name),
        lambda: runc.state(name),
        lambda: runc.kill(name),
        lambda: runc.delete(name),
        lambda: runc.checkpoint_command(bad, path, path, lazy=True),
        lambda: runc.pre_dump_command(bad, path, path, parent=None),
        lambda: runc.restore_command(name, path, path, path, lazy=True),
    ):
        with pytest.raises(InvalidNameError):
            act()
    assert host.calls() == before


def test_good_names_stay_as_they_are() -> None:
    for name in ("a", "Web_1.2-x", "0" * 64):
        assert validate_name(name) == name


@pytest.mark.parametrize("path", ["relative", "/a/../b", "/a\0b", "/" + "a" * 4096])
def test_a_bad_path_reaches_no_command_line(path: str) -> None:
    with pytest.raises(RuntimeDriverError):
        validate_path(Path(path))


@pytest.mark.parametrize(
    ("spec", "state", "kept", "says"),
    [
        (SPEC, {"status": "running"}, KEPT, "no rootfs"),
        (SPEC, {**STATE, "status": "on fire"}, KEPT, "on fire"),
        (SPEC, STATE, {"cgroup_paths": {"": "/x"}}, "three descriptors"),
        (SPEC, STATE, {**KEPT, "cgroup_paths": {"memory": "/m", "cpu": "/c"}}, "cgroup v2"),
        ([], STATE, KEPT, "not a JSON object"),
    ],
)
def test_answers_that_are_not_understood_are_errors(
    host: Host, spec: object, state: dict[str, Any], kept: object, says: str
) -> None:
    host.write(spec, state, kept)
    with pytest.raises(RuntimeDriverError, match=says):
        host.runc().inspect("web")


def test_a_huge_configuration_is_not_read(host: Host) -> None:
    with (host.bundle / "config.json").open("r+b") as file:
        file.truncate((8 << 20) + 1)
    with pytest.raises(RuntimeDriverError, match="larger than"):
        host.runc().inspect("web")


def test_delete_forgets_the_container_once(host: Host) -> None:
    runc = host.runc()
    runc.delete("web")
    assert not runc.exists("web")
    calls = host.calls()
    runc.delete("web")
    assert host.calls() == calls


def test_delete_says_when_something_is_left(host: Host) -> None:
    (host.root / "half").mkdir()
    with pytest.raises(RuntimeDriverError, match="left"):
        host.runc().delete("half")


def test_kill_writes_to_the_containers_cgroup(host: Host, tmp_path: Path) -> None:
    cgroup = tmp_path / "cgroup"
    cgroup.mkdir()
    (cgroup / "cgroup.kill").write_text("")
    (cgroup / "cgroup.events").write_text("populated 0\nfrozen 0\n")
    host.write(SPEC, STATE, {**KEPT, "cgroup_paths": {"": str(cgroup)}})
    host.runc().kill("web")
    assert (cgroup / "cgroup.kill").read_text() == "1"
    host.runc().kill("other")


def test_descriptors_are_written_as_runc_does() -> None:
    text = descriptors_json(("/dev/null", "pipe:[12]", '/tmp/"ä'))
    assert text == '["/dev/null","pipe:[12]","/tmp/\\"ä"]'.encode()


def test_mounts_and_namespaces_are_found() -> None:
    assert mounts_of(SPEC) == (
        Mount("/proc", "proc", "proc", ()),
        Mount("/data", "", "/srv/data", ("rbind", "rw")),
    )
    assert [mount.is_bind for mount in mounts_of(SPEC)] == [False, True]
    assert namespace_path(SPEC, "network") == Path("/run/netns/web")
    assert namespace_path(SPEC, "pid") is None
    assert namespace_path({}, "network") is None
    assert network_namespace(SPEC, 7) == Path("/run/netns/web")
    owned = {"linux": {"namespaces": [{"type": "user"}, {"type": "network"}]}}
    assert network_namespace(owned, 7) == Path("/proc/7/ns/net")
    assert network_namespace(owned, 0) is None


@pytest.mark.parametrize(
    ("given", "own", "expected"),
    [
        ("/dolly/web", "/system.slice/agent.service", "/sys/fs/cgroup/dolly/web"),
        ("/../../etc", "/", "/sys/fs/cgroup/etc"),
        (None, "/init.scope", "/sys/fs/cgroup/web"),
        ("pods/../web2", "/a/b", "/sys/fs/cgroup/a/web2"),
        ("../../../x", "/a/b", "/sys/fs/cgroup/a/x"),
    ],
)
def test_the_cgroup_is_where_runc_will_put_it(given: str | None, own: str, expected: str) -> None:
    spec = {"linux": {} if given is None else {"cgroupsPath": given}}
    assert cgroup_for(spec, "web", own_cgroup=own) == Path(expected)


def test_runc_sees_no_terminal(host: Host) -> None:
    """The driver gives runc an empty stdin, so it never waits for somebody to type."""
    host.program.write_text(f"#!/bin/sh\nreadlink /proc/self/fd/0 > {host.path}/stdin\nexit 1\n")
    with pytest.raises(RuntimeDriverError):
        host.runc().version()
    assert (host.path / "stdin").read_text().strip() == os.devnull
