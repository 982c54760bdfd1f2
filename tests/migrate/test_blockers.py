"""What is refused of what runs in a container: every row, by what /proc says of it."""

from __future__ import annotations

import socket
import stat
from typing import Any

import pytest

from migrate import config
from migrate.blockers import TOLD_PER_CODE_MAX, judge
from migrate.refusals import Findings
from migrate.socket_scan import SocketView
from migrate.task_scan import ContainerView, Mounted, OpenFile, TaskView

INIT = 100
ROOT = Mounted("ext4", "/")
TMPFS = Mounted("tmpfs", "/dev")
PTS = Mounted("devpts", "/dev/pts")
OWN = {"user": 1, "pid": 2, "ipc": 3, "uts": 4, "net": 5, "time": 6}
REGULAR = stat.S_IFREG | 0o644
CHARACTER = stat.S_IFCHR | 0o666


def task(pid: int = INIT, name: str = "server", **fields: Any) -> TaskView:
    return TaskView(
        pid, name, **{"parent": 1 if pid == INIT else INIT, "namespaces": OWN, **fields}
    )


def view(*tasks: TaskView, **fields: Any) -> ContainerView:
    return ContainerView(INIT, tasks or (task(),), **fields)


def of_file(**fields: Any) -> Findings:
    return judge(view(task(files=(OpenFile(**{"number": 7, **fields}),))))


def codes(found: Findings) -> list[str]:
    return [refusal.code for refusal in found.refusals]


def test_an_ordinary_server_has_no_blockers() -> None:
    files = (
        OpenFile(0, "/dev/null", TMPFS, CHARACTER, (1, 3)),
        OpenFile(1, "pipe:[17]"),
        OpenFile(3, "/data/log", ROOT, REGULAR, links=1, blocks=8),
        OpenFile(4, "/tmp/gone (deleted)", ROOT, REGULAR, links=0, blocks=8, is_deleted=True),
        OpenFile(5, "/memfd:buffer (deleted)", None, REGULAR, links=0, blocks=1 << 40),
        OpenFile(6, "/dev/net/tun", TMPFS, CHARACTER, (10, 200)),
        OpenFile(8, "/data", ROOT, stat.S_IFDIR | 0o755, links=2),
        OpenFile(9, "net:[4026531840]", note=""),
        *(
            OpenFile(20 + number, target)
            for number, target in enumerate(
                (
                    *("anon_inode:[eventfd]", "anon_inode:[eventpoll]", "anon_inode:inotify"),
                    *("anon_inode:[fanotify]", "anon_inode:[signalfd]", "anon_inode:[timerfd]"),
                    *("anon_inode:[pidfd]", "pidfd:[77]"),
                )
            )
        ),
    )
    sockets = (
        SocketView(1, socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP),
        SocketView(2, socket.AF_INET6, socket.SOCK_DGRAM, socket.IPPROTO_UDP),
        SocketView(3, socket.AF_INET, socket.SOCK_RAW, 89),
        SocketView(4, socket.AF_UNIX, socket.SOCK_STREAM, 0, peer=5),
        SocketView(5, socket.AF_UNIX, socket.SOCK_STREAM, 0, peer=4),
        SocketView(6, socket.AF_UNIX, socket.SOCK_STREAM, 0),
        SocketView(7, socket.AF_NETLINK, socket.SOCK_RAW, 0),
        SocketView(8, socket.AF_PACKET, socket.SOCK_RAW, 768),
    )
    mapped = frozenset({"/usr/lib/libc.so.6", "[heap]", "[vdso]", "/dev/zero (deleted)", "/SYSV0"})
    found = judge(
        view(
            task(files=files, sockets=frozenset(range(1, 9)), mapped=mapped),
            task(101, parent=INIT, state="Z", namespaces={}),
            sockets=sockets,
        )
    )
    assert found == Findings()


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("anon_inode:[io_uring]", "io-uring"),
        ("/secretmem (deleted)", "memfd-secret"),
        ("anon_inode:[perf_event]", "perf-event"),
        ("anon_inode:bpf-map", "bpf"),
        ("anon_inode:bpf-prog", "bpf"),
        ("anon_inode:[userfaultfd]", "userfaultfd"),
        ("anon_inode:kvm-vm", "kvm"),
        ("anon_inode:seccomp notify", "seccomp-notify"),
        ("anon_inode:[landlock-ruleset]", "kernel-object"),
        ("anon_inode:[fscontext]", "kernel-object"),
        ("/dmabuf:", "kernel-object"),
        ("/dev/nvidia0", "gpu"),
        ("/dev/dri/renderD128", "gpu"),
        ("/dev/kfd", "gpu"),
    ],
)
def test_kernel_objects(target: str, code: str) -> None:
    found = of_file(target=target)
    assert codes(found) == [code]
    message, remedy = found.refusals[0][1:]
    assert message.startswith("server (pid 100) ")
    assert remedy
    assert not message.endswith(".")


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"number": 1, "target": "/srv/log", "mount": None, "mode": REGULAR}, "foreign-file"),
        (
            {"target": "/dev/null", "mount": None, "mode": CHARACTER, "device": (1, 3)},
            "foreign-file",
        ),
        ({"target": "/q", "mount": Mounted("mqueue", "/dev/mqueue"), "mode": REGULAR}, "mqueue"),
        ({"target": "/dev/fuse", "mount": TMPFS, "mode": CHARACTER, "device": (10, 229)}, "device"),
        ({"target": "/dev/sg0", "mount": TMPFS, "mode": CHARACTER, "device": (21, 0)}, "device"),
        ({"target": "/dev/pts/0", "mount": PTS, "mode": CHARACTER, "device": (136, 0)}, "terminal"),
        (
            {"target": "/dev/pts/3", "mount": None, "mode": CHARACTER, "device": (136, 3)},
            "terminal",
        ),
        ({"target": "/dev/tty", "mount": TMPFS, "mode": CHARACTER, "device": (5, 0)}, "terminal"),
        (
            {
                "target": "/big (deleted)",
                "mount": ROOT,
                "mode": REGULAR,
                "links": 0,
                "blocks": config.GHOST_FILE_BYTES_MAX // 512 + 1,
                "is_deleted": True,
            },
            "ghost-file",
        ),
        (
            {
                "target": "/a (deleted)",
                "mount": ROOT,
                "mode": REGULAR,
                "links": 1,
                "is_deleted": True,
            },
            "deleted-link",
        ),
    ],
)
def test_files(fields: dict[str, Any], code: str) -> None:
    assert codes(of_file(**fields)) == [code]


def test_a_terminal_whose_master_is_inside_moves() -> None:
    slave = OpenFile(0, "/dev/pts/0", PTS, CHARACTER, (136, 0))
    master = OpenFile(5, "/dev/pts/ptmx", PTS, CHARACTER, (5, 2))
    assert judge(view(task(files=(master,)), task(101, files=(slave,)))) == Findings()


def test_streams_are_called_by_their_names() -> None:
    found = of_file(number=2, target="/srv/log", mode=REGULAR)
    assert "/srv/log open as its standard error, which" in found.refusals[0].message


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("/secretmem (deleted)", "memfd-secret"),
        ("[uprobes]", "uprobes"),
        ("anon_inode:[io_uring]", "io-uring"),
        ("anon_inode:[perf_event]", "perf-event"),
        ("anon_inode:i915.gem", "device-memory"),
        ("/dev/nvidia0", "device-memory"),
        ("/dev/mem", "device-memory"),
    ],
)
def test_mappings(name: str, code: str) -> None:
    assert codes(judge(view(task(mapped=frozenset({name}))))) == [code]


@pytest.mark.parametrize(
    ("one", "code"),
    [
        (SocketView(1, 40, 1, 0), "socket-family"),
        (SocketView(1, 44, 3, 0), "socket-family"),
        (SocketView(1, 99, 3, 0), "socket-family"),
        (SocketView(1, socket.AF_INET, 1, 262), "socket-protocol"),
        (SocketView(1, socket.AF_INET, 1, 132), "socket-protocol"),
        (SocketView(1, socket.AF_INET, 6, 33), "socket-protocol"),
        (SocketView(1, socket.AF_INET, 1, 6, is_foreign=True), "foreign-socket"),
        (SocketView(1, socket.AF_INET, 1, 6, upper_protocol="tls"), "socket-ulp"),
        (SocketView(1, socket.AF_INET, 2, 17, is_corked=True), "udp-cork"),
        (SocketView(1, socket.AF_UNIX, 1, 0, peer=9), "external-unix-socket"),
        (SocketView(1, socket.AF_UNIX, 1, 0, is_dangling=True), "external-unix-socket"),
    ],
)
def test_sockets(one: SocketView, code: str) -> None:
    found = judge(view(task(sockets=frozenset({1})), sockets=(one,)))
    assert codes(found) == [code]
    assert found.refusals[0].message.startswith("server (pid 100) ")


def test_an_external_socket_is_named() -> None:
    one = SocketView(1, socket.AF_UNIX, 1, 0, peer=9, peer_name="/run/docker.sock")
    found = judge(view(task(sockets=frozenset({1})), sockets=(one,)))
    assert " at /run/docker.sock of a process outside" in found.refusals[0].message


def test_mptcp_names_the_setting_of_go() -> None:
    one = SocketView(1, socket.AF_INET, 1, 262)
    assert "GODEBUG=multipathtcp=0" in judge(view(sockets=(one,))).refusals[0].remedy


@pytest.mark.parametrize(
    ("other", "code"),
    [
        (task(101, tracers=frozenset({4711})), "traced"),
        (task(101, parent=1), "exec-session"),
        (task(101, has_deadline=True), "sched-deadline"),
        *((task(101, namespaces={**OWN, kind: 99}), "nested-namespace") for kind in OWN),
    ],
)
def test_tasks(other: TaskView, code: str) -> None:
    assert codes(judge(view(task(), other))) == [code]


def test_who_traces_is_told() -> None:
    inside = judge(view(task(), task(101, tracers=frozenset({INIT}))))
    outside = judge(view(task(tracers=frozenset({4711}))))
    assert "by a task of the container" in inside.refusals[0].message
    assert "by pid 4711" in outside.refusals[0].message


def test_a_container_of_corpses() -> None:
    assert codes(judge(view(task(state="Z")))) == ["no-tasks"]


def test_what_belongs_to_no_task() -> None:
    assert codes(judge(view(queues=("jobs",)))) == ["mqueue"]
    assert codes(judge(view(strangers=(7, 8)))) == ["network-shared"]


def test_what_gets_lost_is_a_caution() -> None:
    note = "eventfd-count: 0\neventfd-id: 3\neventfd-semaphore: 1\n"
    found = of_file(target="anon_inode:[eventfd]", note=note)
    assert (found.refusals, [one.code for one in found.cautions]) == ((), ["eventfd-semaphore"])
    one = SocketView(1, socket.AF_INET, 1, 6, waiting=2)
    assert [caution.code for caution in judge(view(sockets=(one,))).cautions] == ["accept-queue"]
    found = judge(view(is_complete=False))
    assert [caution.code for caution in found.cautions] == ["scan-incomplete"]


def test_a_watch_on_an_overlay() -> None:
    row = "inotify wd:1 ino:2 sdev:32 mask:2 fhandle-bytes:20 fhandle-type:{} f_handle:0"
    for kind, expected in (("f8", ["inotify-overlay"]), ("fb", ["inotify-overlay"]), ("1", [])):
        note = "pos:\t0\nino:\t1038\n" + row.format(kind) + "\n"
        assert codes(of_file(target="anon_inode:inotify", note=note)) == expected


def test_tasks_of_other_users_need_a_capability() -> None:
    other = task(users=frozenset({0, 1000}))
    assert codes(judge(view(other))) == []
    assert codes(judge(view(other, may_ask_all=False))) == ["other-user"]
    assert codes(judge(view(task(), may_ask_all=False))) == []


def test_one_kind_does_not_fill_the_screen() -> None:
    ring = (OpenFile(7, "anon_inode:[io_uring]"), OpenFile(8, "anon_inode:[io_uring]"))
    many = [task(INIT + number, files=ring, tracers=frozenset({1})) for number in range(50)]
    found = codes(judge(view(*many)))
    assert found.count("io-uring") == found.count("traced") == TOLD_PER_CODE_MAX
