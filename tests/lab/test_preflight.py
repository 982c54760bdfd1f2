"""Preflight with real containers and hosts: what is refused, and that nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.containers import ContainerSpec, bundle_path, create, make_network, remove, start
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.lab.inside import inside
from tests.lab.waiting import wait_until

SPEC = ContainerSpec("pf1", "memory", address="10.77.0.81/24", address6="fd77::81/112")
HOLDER = Path(__file__).parent / "programs" / "holder.py"
# The host's own root file system, without what is mounted on it: there is a Python in it.
ROOTFS = "/srv/pf-root"
CAPABILITIES = [
    f"CAP_{name}"
    for name in ("SYS_ADMIN", "NET_ADMIN", "NET_RAW", "SYS_PTRACE", "SYS_NICE", "BPF", "PERFMON")
]
CHECK_SOURCE = """
from migrate import preflight
from migrate.config import HostPaths
from migrate.errors import PreflightRefused
from migrate.runtimes.runc import Runc
try:
    checked = preflight.check_source(
        Runc(), "pf1", given, restore="lazy", streams=4, host="A", paths=HostPaths(),
        targets=["B"],
    )
    request = checked.facts.open_session(
        migration_id="m1", attempt=1, host="A", streams=4, restore="lazy", dry_run=True)
    answer({"refusals": [], "cautions": checked.cautions, "request": request})
except PreflightRefused as error:
    answer({"refusals": error.refusals, "cautions": []})
"""
CHECK_TARGET = """
from migrate import preflight
from migrate.config import HostPaths
from migrate import policy
from migrate.core.messages import OpenSession
from migrate.runtimes.runc import Runc
request = msgspec.convert(given, OpenSession, str_keys=True, builtin_types=())
paths = HostPaths()
answer(preflight.check_target(request, Runc(), paths, policy.load(paths.policy)))
"""
BETTER_PROCESSOR = """
import base64, io
import pycriu
image = pycriu.images.load(io.BytesIO(base64.b64decode(given)))
words = image["entries"][0]["x86_entry"][0]["capability"]
image["entries"][0]["x86_entry"][0]["capability"] = [0xFFFFFFFF] * len(words)
better = io.BytesIO()
pycriu.images.dump(image, better)
answer(better.getvalue())
"""


@pytest.fixture
def host(lab: Lab) -> Iterator[Host]:
    host = lab.host("A")
    yield host
    remove(host, SPEC.name)


@pytest.fixture
def holder(host: Host) -> Iterator[Callable[..., None]]:
    """Starts the container with a program that holds the kinds given."""
    host.run(["mkdir", "-p", ROOTFS, bundle_path("pf1")])
    host.run(["mount", "--bind", "/", ROOTFS])
    host.write_text("/srv/holder.py", HOLDER.read_text())
    make_network(host, SPEC)
    host.run(["runc", "spec", "--bundle", bundle_path("pf1")])

    def hold(*kinds: str, output: str = "/dev/null", **changes: Any) -> None:
        path = f"{bundle_path('pf1')}/config.json"
        spec = json.loads(host.read_text(path))
        spec["process"] |= {
            "terminal": False,
            "args": ["/usr/bin/python3", "/srv/holder.py", *kinds],
            "capabilities": dict.fromkeys(spec["process"]["capabilities"], CAPABILITIES),
            "noNewPrivileges": False,
        }
        spec["root"] = {"path": ROOTFS, "readonly": False}
        spec["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"})
        for namespace in spec["linux"]["namespaces"]:
            if namespace["type"] == "network":
                namespace["path"] = "/run/netns/pf1"
        spec["linux"] |= {"cgroupsPath": "/dolly/pf1", "resources": {}}
        spec |= changes
        host.write_text(path, json.dumps(spec))
        run = f"exec runc run -d --bundle {bundle_path('pf1')} pf1 </dev/null >{output} 2>&1"
        host.run(["sh", "-c", run])
        wait_until("the holder holds", lambda: said(host))
        assert said(host) == "ready"

    yield hold
    inside(host, 'from migrate.runtimes.runc import Runc\nRunc().delete("pf1")')
    host.run(["umount", "-l", ROOTFS])
    # Not `rm -r`: if it were still mounted, that would be the host's own root.
    host.run(["rmdir", ROOTFS])
    host.run(["rm", "-f", "/srv/holder.py", "/run/pf1.log"])


def said(host: Host) -> str:
    done = host.run(["runc", "exec", "pf1", "cat", "/tmp/ready"], check=False)
    return done.stdout.strip()


def check_source(host: Host, shared: Sequence[str] = ()) -> dict[str, Any]:
    answer = inside(host, CHECK_SOURCE, list(shared))
    assert isinstance(answer, dict)
    for finding in (*answer["refusals"], *answer["cautions"]):
        assert all(finding), finding
    return answer


def codes(findings: Sequence[Sequence[str]]) -> set[str]:
    return {code for code, *_ in findings}


# ---- on the source ----


def test_a_plain_container_passes_and_tells_what_it_is(host: Host) -> None:
    create(host, SPEC)
    start(host, "pf1")
    answer = check_source(host)
    assert answer["refusals"] == []
    assert answer["request"]["container"] == "pf1"
    assert answer["request"]["network"]["ports"][0]["host_end"] == "v-pf1"


def test_what_moves_is_not_refused(host: Host, holder: Callable[..., None]) -> None:
    holder(
        *("raw", "packet", "udplite", "link_events", "tcp", "unix", "in_flight", "pidfd"),
        *("unix_waiting", "half_closed"),
        *("inotify", "fanotify", "terminal", "deleted", "odd_name", "memfd", "mount"),
        *("child", "zombie"),
    )
    answer = check_source(host)
    assert answer["refusals"] == []
    # And so it is.
    host.write_text("/run/pf1.conf", "manage-cgroups ignore\nnetwork-lock skip\n")
    dump = ["runc", "checkpoint", "--tcp-established", "--file-locks", "--image-path", "/run/pf1"]
    try:
        host.run([*dump, "pf1"], env={"CRIU_CONFIG_FILE": "/run/pf1.conf"})
    finally:
        host.run(["rm", "-rf", "/run/pf1", "/run/pf1.conf"])


def test_what_is_lost_or_may_fail_is_said(host: Host, holder: Callable[..., None]) -> None:
    holder("semaphore", "waiting")
    answer = check_source(host)
    assert answer["refusals"] == []
    said_of = {"eventfd-semaphore", "accept-queue"}
    assert said_of <= codes(answer["cautions"])


def test_every_blocker_is_found_and_told_at_once(host: Host, holder: Callable[..., None]) -> None:
    script = "import socket, signal; s = socket.socket(socket.AF_UNIX); "
    script += "s.bind('/srv/external.sock'); s.listen(); kept = s.accept(); signal.pause()"
    with host.popen(["python3", "-c", script]) as listener:
        try:
            path = host.path("/srv/external.sock")
            wait_until("the socket is there", path.exists)
            holder(
                *("io_uring", "secret", "perf", "bpf", "userfaultfd", "landlock", "mqueue"),
                *("vsock", "mptcp", "corked", "external", "deleted_large", "deleted_link"),
                *("traced", "user", "net", "deadline", "external", "overlay_watch"),
                output="/run/pf1.log",
                hooks={"poststop": [{"path": "/bin/true"}]},
            )
            session = "runc exec -d pf1 sleep 600 </dev/null >/dev/null 2>&1"
            host.run(["sh", "-c", session])
            found = check_source(host)["refusals"]
        finally:
            listener.kill()
            host.run(["rm", "-f", "/srv/external.sock"])
    assert codes(found) == {
        *("io-uring", "memfd-secret", "perf-event", "bpf", "userfaultfd", "kernel-object"),
        *("mqueue", "socket-family", "socket-protocol", "udp-cork", "external-unix-socket"),
        *("ghost-file", "deleted-link", "traced", "nested-namespace", "sched-deadline"),
        *("foreign-file", "exec-session", "hooks", "inotify-overlay"),
    }
    # One connection was accepted, the other still waits.
    assert [code for code, *_ in found].count("external-unix-socket") == 2
    text = "\n".join(message for _, message, _ in found)
    assert "/srv/external.sock" in text
    assert "/run/pf1.log open as its standard output" in text


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("ip netns exec pf1 sleep 600 >/dev/null 2>&1 &", "network-shared"),
        ("ip netns exec pf1 nft add table inet filter", "network-firewall"),
        ("ip link set v-pf1 nomaster", "network-bridge"),
        ("ip link set br0 type bridge stp_state 1", "bridge-stp"),
        ("runc pause pf1", "not-running"),
        ("mkdir -p /etc/criu; touch /etc/criu/runc.conf", "criu-config"),
    ],
)
def test_what_is_around_the_container(host: Host, script: str, code: str) -> None:
    create(host, SPEC)
    start(host, "pf1")
    host.run(["sh", "-c", script])
    try:
        answer = check_source(host)
        assert codes(answer["refusals"]) | codes(answer["cautions"]) == {code}
    finally:
        undo = "ip link set br0 type bridge stp_state 0; runc resume pf1;"
        host.run(["sh", "-c", f"{undo} rm -f /etc/criu/runc.conf; true"])
        host.run(["sh", "-c", "ip netns pids pf1 | xargs -r kill -KILL"])


def test_a_bind_mount_is_refused_unless_it_is_shared(
    host: Host, holder: Callable[..., None]
) -> None:
    spec = json.loads(host.read_text(f"{bundle_path('pf1')}/config.json"))
    bind = {"destination": "/mnt", "type": "bind", "source": "/srv", "options": ["rbind"]}
    tmp = {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}
    holder("child", mounts=[*spec["mounts"], bind, tmp])
    assert codes(check_source(host)["refusals"]) == {"bind-mount"}
    assert check_source(host, ["/srv"])["refusals"] == []


# ---- on the target ----


@pytest.fixture
def request_of(host: Host) -> dict[str, Any]:
    """What the source of a plain container asks a target."""
    create(host, SPEC)
    start(host, "pf1")
    request = check_source(host)["request"]
    assert isinstance(request, dict)
    return request


def check_target(host: Host, request: dict[str, Any]) -> set[str]:
    refusals = inside(host, CHECK_TARGET, request)
    for refusal in refusals:
        assert all(refusal), refusal
    return codes(refusals)


def test_a_target_that_can(lab: Lab, request_of: dict[str, Any]) -> None:
    assert check_target(lab.host("B"), request_of) == set()


def test_a_container_does_not_come_to_the_host_that_it_is_on(
    lab: Lab, request_of: dict[str, Any]
) -> None:
    assert check_target(lab.host("A"), request_of) == {"same-host"}
    renamed = request_of | {"host": "other"}
    taken = {"name-taken", "path-taken", "cgroup-taken"}
    assert check_target(lab.host("A"), renamed) == taken


def test_what_a_target_lacks(lab: Lab, request_of: dict[str, Any]) -> None:
    target = lab.host("B")
    (port,) = request_of["network"]["ports"]
    network = request_of["network"] | {"ports": [port | {"bridge": "br9"}]}
    spec = json.loads(request_of["config_json"])
    spec["linux"]["resources"] = {"memory": {"limit": 1 << 30}}
    versions = request_of["versions"] | {"architecture": "aarch64", "criu": "99.1"}
    wanted = request_of | {
        "network": network,
        "versions": versions,
        "memory_bytes": 1 << 45,
        "rootfs_bytes": 1 << 45,
        "config_json": json.dumps(spec),
    }
    assert check_target(target, wanted) == {
        *("bridge", "architecture", "criu-older", "memory", "disk", "cgroup-controller")
    }


def test_a_processor_that_lacks_what_the_sources_has(lab: Lab, request_of: dict[str, Any]) -> None:
    better = inside(lab.host("B"), BETTER_PROCESSOR, request_of["cpuinfo"])
    assert check_target(lab.host("B"), request_of | {"cpuinfo": better}) == {"cpu"}


def test_what_a_peer_may_not_ask_for(lab: Lab, request_of: dict[str, Any]) -> None:
    """A peer's config.json says what runs here as root, so it is not taken at its word."""
    spec = json.loads(request_of["config_json"])
    spec["linux"]["namespaces"] = [{"type": "mount"}, {"type": "ipc", "path": "/proc/1/ns/ipc"}]
    spec["linux"]["cgroupsPath"] = "/init.scope"
    spec["linux"]["devices"] = [{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]
    spec["hooks"] = {"createRuntime": [{"path": "/bin/sh"}]}
    spec["process"]["apparmorProfile"] = "no-such-profile"
    spec["mounts"].append({"destination": "/host", "source": "/", "options": ["rbind"]})
    spec["annotations"]["org.criu.config"] = "/srv/criu.conf"
    spec["HOOKS"] = spec["hooks"]
    wanted = request_of | {"config_json": json.dumps(spec)}
    assert check_target(lab.host("B"), wanted) == {
        *("host-namespace", "shared-namespace", "network-host", "cgroup-taken", "hooks"),
        *("apparmor", "mount-not-shared", "policy-device", "annotation", "config-key"),
    }


def test_a_target_shows_what_its_operator_shares(lab: Lab, request_of: dict[str, Any]) -> None:
    target = lab.host("B")
    spec = json.loads(request_of["config_json"])
    spec["mounts"].append({"destination": "/data", "source": "/srv/x", "options": ["rbind"]})
    wanted = request_of | {"config_json": json.dumps(spec)}
    target.write_text("/etc/migrate/policy.toml", '[receive]\nbind_mounts = ["/srv"]\n')
    try:
        assert check_target(target, wanted) == {"mount-missing"}
        target.run(["mkdir", "-p", "/srv/x"])
        assert check_target(target, wanted) == set()
    finally:
        target.run(["rm", "-rf", "/etc/migrate/policy.toml", "/srv/x"])


def test_a_config_that_is_none(lab: Lab, request_of: dict[str, Any]) -> None:
    for text in ("{", "[]", '{"linux": {"resources": 7}}'):
        wanted = request_of | {"config_json": text}
        assert "config" in check_target(lab.host("B"), wanted)
