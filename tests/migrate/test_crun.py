"""What the crun driver does otherwise than runc's, against a stand-in for crun."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from migrate.runtimes import crun as driver
from migrate.runtimes import known
from migrate.runtimes.base import AmbiguousContainerError, InvalidNameError, RuntimeDriverError
from migrate.runtimes.crun import Crun
from migrate.runtimes.runc import Runc

SPEC: dict[str, Any] = {"linux": {"namespaces": [{"type": "network", "path": "/run/netns/web"}]}}
STATUS = {
    "pid": 4711,
    "cgroup-path": "/dolly/web",
    "rootfs": "rootfs",
    "external_descriptors": '["/dev/null","pipe:[17]","/dev/null"]',
}
STAND_IN = """\
#!/bin/sh
here=$(dirname "$0")
case "$*" in
*--version) cat "$here/version" ;;
*" state web") cat "$here/answer.json" ;;
*" delete --force "*) rm -rf "$2/web" ;;
*) echo "error opening file: No such file or directory" >&2; exit 1 ;;
esac
"""
VERSION = "crun version 1.21\ncommit: 1026984\n+SYSTEMD +EBPF {}+YAJL\n"


class Host:
    """A directory with a stand-in for crun, its state directory and one bundle."""

    def __init__(self, path: Path) -> None:
        self.root = path / "state"
        self.program = path / "crun"
        self.version = path / "version"
        self.bundle = path / "bundle"
        self.program.write_text(STAND_IN)
        self.program.chmod(stat.S_IRWXU)
        self.version.write_text(VERSION.format("+CRIU "))
        self.bundle.mkdir()
        (self.bundle / "config.json").write_text(json.dumps(SPEC))
        state = {"id": "web", "pid": 4711, "status": "running", "rootfs": "rootfs"}
        (path / "answer.json").write_text(json.dumps({"bundle": str(self.bundle), **state}))
        self.keep(STATUS)

    def keep(self, status: dict[str, Any]) -> None:
        (self.root / "web").mkdir(parents=True, exist_ok=True)
        (self.root / "web" / "status").write_text(json.dumps(status))

    def crun(self) -> Crun:
        return Crun(root=self.root, program=str(self.program))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_inspect_reads_crun_s_own_words(host: Host) -> None:
    container = host.crun().inspect("web")
    assert container.runtime == "crun"
    assert container.rootfs == host.bundle / "rootfs"
    assert container.cgroup == Path("/sys/fs/cgroup/dolly/web")
    assert container.descriptors == ("/dev/null", "pipe:[17]", "/dev/null")


@pytest.mark.parametrize("text", ['["/dev/null"]', "[", '{"a": 1}'])
def test_descriptors_that_are_none(host: Host, text: str) -> None:
    host.keep({**STATUS, "external_descriptors": text})
    with pytest.raises(RuntimeDriverError, match="descriptors"):
        host.crun().inspect("web")


@pytest.mark.parametrize("lazy", [True, False])
def test_the_commands_are_these(host: Host, lazy: bool) -> None:
    """Of lazy pages crun has no word: CRIU's configuration says it."""
    crun = host.crun()
    log = ["--log", "/w/runtime.log", "--log-format", "json"]
    head = [str(host.program), "--root", str(host.root), *log]
    common = ["--tcp-established", "--file-locks", "--manage-cgroups-mode", "ignore"]
    directories = ["--image-path", "/i", "--work-path", "/w"]
    web = crun.inspect("web")
    checkpoint = crun.checkpoint_command(web, Path("/i"), Path("/w"), lazy=lazy)
    assert checkpoint == [*head, "checkpoint", *common, *directories, "web"]
    restore = crun.restore_command("web", Path("/b"), Path("/i"), Path("/w"), lazy=lazy)
    assert restore == [
        *(*head, "restore", "--detach", *common, "--bundle", "/b", *directories, "web")
    ]


def test_why_crun_can_t(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whichever there is: every machine has one.
    monkeypatch.setattr(driver, "_LIBRARY", "libc.so.6")
    assert host.crun().refusals() == []
    monkeypatch.setattr(driver, "_LIBRARY", "libcriu.so.none")
    (refusal,) = host.crun().refusals()
    assert "libcriu.so.none" in refusal.message
    host.version.write_text(VERSION.format(""))
    (refusal,) = host.crun().refusals()
    assert "without CRIU" in refusal.message
    (refusal,) = Crun(root=tmp_path, program=str(tmp_path / "none")).refusals()
    assert (refusal.code, refusal.remedy) == ("runtime", "install crun here")


@pytest.mark.parametrize(
    ("given", "expected"), [(None, "web"), ("/dolly/web", "dolly/web"), ("pods/web", "pods/web")]
)
def test_the_cgroup_is_where_crun_will_put_it(host: Host, given: str | None, expected: str) -> None:
    spec = {"linux": {} if given is None else {"cgroupsPath": given}}
    assert host.crun().cgroup_for(spec, "web") == Path("/sys/fs/cgroup") / expected


def test_what_a_restore_has_left_in_the_bundle_goes(host: Host) -> None:
    (host.root / "web" / "status").unlink()
    (host.bundle / "criu-root").mkdir()
    host.crun().delete("web", bundle=host.bundle)
    assert [path.name for path in host.bundle.iterdir()] == ["config.json"]
    assert not host.crun().exists("web")
    host.crun().delete("web", bundle=host.bundle)


def test_a_container_is_its_runtime_s(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runc, crun = Runc(root=tmp_path / "runc"), host.crun()
    monkeypatch.setattr(known, "drivers", lambda: {"runc": runc, "crun": crun})
    assert known.having("web") is crun
    assert known.having("nobody") is runc
    (tmp_path / "runc" / "web").mkdir(parents=True)
    with pytest.raises(AmbiguousContainerError, match="runc and crun"):
        known.having("web")
    with pytest.raises(InvalidNameError):
        known.having("../web")
