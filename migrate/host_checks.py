"""What a host must have to dump or restore containers, and what on it makes migrations worse.

`judge_*` are pure; the others ask the host. CRIU's answers are asked once in the life of a process:
a kernel does not change, and a new CRIU comes with a restart of the agent.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from migrate.mounts import keeps_from_swap
from migrate.refusals import Caution, Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

# 4.2 is the first CRIU that dumps TCP sockets on kernels since 6.16 and resumes lazy dumps rightly.
CRIU_VERSION_MIN = (4, 2)
# CRIU answers in 10-30 ms.
CRIU_DEADLINE_S = 20.0
CRIU_LINE_CHARS_MAX = 300

# What a migration opens besides its data streams and tasks, on either side: channels, pipes of the
# runtime, rsync and CRIU, the journal, FIFOs of the holds. Some 40 were counted.
DESCRIPTORS_RESERVE = 64
# A file of the page store on the target; on the source the task's directory, its userfaultfd, its
# memory and its pagemap.
DESCRIPTORS_PER_TASK_MAX = 4

_PROGRAMS = ("criu", "rsync", "ip")
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SYS_NET = Path("/sys/class/net")
_SWAPS = Path("/proc/swaps")
# CRIU reads the first of itself, runc and crun name the others: what they say wins over a
# request's options (criu/config.c), and can undo what a migration asks.
_CRIU_CONFIGS = tuple(Path("/etc/criu", f"{name}.conf") for name in ("default", "runc", "crun"))


def host_refusals(*, lazy: bool) -> list[Refusal]:
    """Why this host can neither dump nor restore. Blocking, 60 ms at the first time."""
    if os.geteuid() != 0:
        return [Refusal("not-root", "this process is not root", "run it by sudo")]
    if is_filtered():
        return [
            Refusal(
                "filtered",
                "this process is under a filter of system calls (seccomp), may not trace containers"
                " that are under one, and what it restores would inherit its own",
                "start it outside of what filters it (SystemCallFilter and most of Protect... in a"
                " unit of systemd, a container without --privileged)",
            )
        ]
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        names = ", ".join(missing)
        return [
            Refusal("program", f"{names} can't be found on this host", f"install {names}"),
        ]
    refusals = judge_criu(criu_version(), criu_failure("check"))
    if lazy and not refusals and criu_failure("check", "--feature", "uffd-noncoop"):
        refusals.append(
            Refusal(
                "userfaultfd",
                "this kernel has no userfaultfd with events, which a lazy restore needs",
                "--restore eager, or a kernel with CONFIG_USERFAULTFD",
            )
        )
    return refusals


def is_filtered() -> bool:
    """Whether this thread is under seccomp, which refuses PTRACE_O_SUSPEND_SECCOMP (ptrace(2))."""
    sheet = Path("/proc/thread-self/status").read_text()
    return re.search(r"^Seccomp:\t[12]$", sheet, re.MULTILINE) is not None


def raise_descriptor_limit() -> None:
    """As many descriptors as this process may have: the usual limit is for those that use
    select(2), which counts to 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def descriptor_refusals(tasks: int, streams: int) -> list[Refusal]:
    """Why this process can't open what a migration of so many tasks needs."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = sum(1 for _ in Path("/proc/self/fd").iterdir())
    except OSError:
        # There is not even one left for the directory.
        used = limit
    return judge_descriptors(limit, used, tasks, streams)


def judge_descriptors(limit: int, used: int, tasks: int, streams: int) -> list[Refusal]:
    """By the limit of open files and how many are. Pure."""
    needed = DESCRIPTORS_RESERVE + streams + DESCRIPTORS_PER_TASK_MAX * tasks
    if limit - used >= needed:
        return []
    return [
        Refusal(
            "open-files",
            f"{max(limit - used, 0)} more files can be opened by this process, {needed} are needed",
            "raise its limit (ulimit -n; LimitNOFILE= of a service)",
        )
    ]


def space_refusals(directory: Path, needed_bytes: int, needed_files: int) -> list[Refusal]:
    """Why so much does not fit where `directory` is, or will be made. Raises OSError."""
    status = os.statvfs(existing(directory))
    free_bytes = status.f_bavail * status.f_frsize
    # A file system that makes inodes as it needs them, like btrfs, counts none.
    free_files = status.f_favail if status.f_files else needed_files
    if free_bytes >= needed_bytes and free_files >= needed_files:
        return []
    return [
        Refusal(
            "space",
            f"{directory} has room for {free_bytes >> 10} KiB in {free_files} files,"
            f" {needed_bytes >> 10} KiB in {needed_files} files are needed",
            f"free space in {directory}",
        )
    ]


def existing(path: Path) -> Path:
    """The deepest directory on the way to `path` that is there already."""
    while not path.exists():
        path = path.parent
    return path


def judge_criu(version: str, failure: str) -> list[Refusal]:
    """By `criu --version` and what `criu check` says, "" if all is well. Pure."""
    if version_of(version) < CRIU_VERSION_MIN:
        wanted = ".".join(str(part) for part in CRIU_VERSION_MIN)
        return [
            Refusal(
                "criu-version",
                f"CRIU is {version or 'of an unknown version'}, at least {wanted} is needed",
                "install a newer CRIU (Debian: from sid or backports)",
            )
        ]
    if failure:
        return [
            Refusal(
                "criu-check",
                f"CRIU does not work here: {failure}",
                "`criu check` says what this kernel lacks",
            )
        ]
    return []


def host_cautions() -> list[Caution]:
    """What makes migrations from or to this host worse than they need be."""
    configured = [str(path) for path in _CRIU_CONFIGS if path.exists()]
    swaps = [] if keeps_from_swap() else open_swaps(_read(_SWAPS), _mapping_of)
    return judge_cautions(_read(_THP), configured, swaps)


def open_swaps(swaps: str, mapping_of: Callable[[str], str]) -> list[str]:
    """Which of /proc/swaps put memory on a disk as it is. Pure. `mapping_of` gives the UUID of a
    device mapper's device, which says whether it is encrypted (cryptsetup: CRYPT-…)."""
    devices = [line.split()[0] for line in swaps.splitlines()[1:] if line.strip()]
    return [
        device
        for device in devices
        if not device.startswith("/dev/zram") and not mapping_of(device).startswith("CRYPT-")
    ]


def _mapping_of(device: str) -> str:
    return _read(Path("/sys/block", Path(device).resolve().name, "dm/uuid"))


def judge_cautions(huge_pages: str, criu_configs: list[str], swaps: list[str]) -> list[Caution]:
    """By the text of transparent_hugepage/enabled, the configuration files there are, and the swap
    devices to which the memory of containers on their way may go as it is. Pure."""
    cautions = [
        Caution(
            "swap",
            f"memory of containers on their way may be written to {device} unencrypted, which this"
            " kernel can't keep a tmpfs from",
            f"swapoff {device}, encrypt it, or use Linux 6.4 or newer",
        )
        for device in swaps
    ]
    if "[always]" in huge_pages:
        cautions.append(
            Caution(
                "huge-pages",
                "transparent huge pages are always on, so memory may be tracked by 2 MiB",
                f"echo madvise > {_THP}",
            )
        )
    cautions += [
        Caution(
            "criu-config",
            f"{path} gives CRIU options that win over those of a migration",
            "empty it, unless it is meant for migrations",
        )
        for path in criu_configs
    ]
    return cautions


def bridge_refusals(bridge: str) -> list[Refusal]:
    """Why ports of this bridge can't be moved in or out."""
    directory = _SYS_NET / bridge
    is_bridge = (directory / "bridge").is_dir()
    is_up = _read(directory / "operstate").strip() not in ("", "down")
    spanning_tree = _read(directory / "bridge/stp_state").strip()
    vlan_filtering = _read(directory / "bridge/vlan_filtering").strip()
    return judge_bridge(
        bridge,
        is_bridge=is_bridge,
        is_up=is_up,
        has_spanning_tree=spanning_tree not in ("", "0"),
        has_vlans=vlan_filtering not in ("", "0"),
    )


def judge_bridge(
    bridge: str, *, is_bridge: bool, is_up: bool, has_spanning_tree: bool, has_vlans: bool
) -> list[Refusal]:
    """Whether a port plugged into it is on the network at once. Pure."""
    if not is_bridge:
        return [
            Refusal(
                "bridge",
                f"this host has no bridge {bridge}",
                f"make it and plug the network in: ip link add {bridge} type bridge",
            )
        ]
    if not is_up:
        return [Refusal("bridge", f"bridge {bridge} is down", f"ip link set {bridge} up")]
    refusals = []
    if has_spanning_tree:
        # A port that is plugged in listens and learns for twice the forward delay, 30 s.
        refusals.append(
            Refusal(
                "bridge-stp",
                f"bridge {bridge} runs the spanning tree protocol, which holds new ports back",
                f"ip link set {bridge} type bridge stp_state 0",
            )
        )
    if has_vlans:
        refusals.append(
            Refusal(
                "bridge-vlan",
                f"bridge {bridge} filters VLANs, and a port's VLANs do not move with it",
                "use a bridge for each VLAN",
            )
        )
    return refusals


def criu_version() -> str:
    """The second word of `criu --version`, "" if CRIU can't be run."""
    try:
        return _criu_version()
    except (OSError, subprocess.SubprocessError):
        # Not kept: this process may only lack descriptors or memory now.
        return ""


@cache
def _criu_version() -> str:
    words = _criu("--version").stdout.split()
    return words[1] if len(words) > 1 else ""


def criu_failure(*arguments: str) -> str:
    """Why `criu ARGUMENTS` fails, "" if it does not; what CRIU says is asked for once."""
    try:
        return _criu_failure(*arguments)
    except (OSError, subprocess.SubprocessError) as error:
        return f"criu {' '.join(arguments)}: {error}"


def cpu_failure(cpuinfo: bytes) -> str:
    """Why a container of the processor in this image (`criu cpuinfo dump`) can't run here."""
    with tempfile.TemporaryDirectory(prefix="migrate-") as directory:
        Path(directory, "cpuinfo.img").write_bytes(cpuinfo)
        return _failure("cpuinfo", "check", "--images-dir", directory)


def version_of(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with: "4.2.1-rc" is (4, 2, 1)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


@cache
def _criu_failure(*arguments: str) -> str:
    return _failure(*arguments)


def _failure(*arguments: str) -> str:
    """Raises OSError and SubprocessError when CRIU can't be run."""
    done = _criu(*arguments)
    if done.returncode == 0:
        return ""
    return first_error(done.stderr + done.stdout) or f"criu {' '.join(arguments)} failed"


def first_error(said: str) -> str:
    """The line of CRIU's words that tells why, without its time and place in the source. Pure."""
    # Raising its own limit of descriptors fails without CAP_SYS_RESOURCE, and does no harm.
    lines = [line for line in said.splitlines() if "Error" in line and "rlimit" not in line]
    if not lines:
        return ""
    _, _, text = lines[0].partition("): ")
    return (text or lines[0])[:CRIU_LINE_CHARS_MAX]


def _criu(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["criu", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=CRIU_DEADLINE_S,
        check=False,
    )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
