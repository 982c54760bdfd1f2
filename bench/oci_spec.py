"""The OCI configuration of a lab container, as `runc spec` would make it for a server. Pure.

Its network namespace is one that the host owns and names by path: CRIU then stores a reference to
it and touches none of its devices. The configuration is written by hand, so that tests see the
same container whatever version of a runtime they use.

Source: the OCI runtime specification 1.0.2, `config.md` and `config-linux.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# What Docker and Podman give by default (moby: oci/caps/defaults.go).
CAPABILITIES = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
# Refused with EPERM when a container has a filter: no workload needs them, every real profile
# refuses them. The point is that the tasks have a filter, which checkpointing must cope with.
SECCOMP_REFUSED = ("kexec_load", "init_module", "finit_module", "delete_module", "reboot", "swapon")
OPEN_FILES_MAX = 1024
MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
    "/proc/scsi",
)
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def oci_spec(
    arguments: Sequence[str],
    *,
    hostname: str,
    network_namespace: str,
    cgroup: str,
    annotations: Mapping[str, str],
    seccomp: bool = True,
    told_user: int = 0,
) -> dict[str, Any]:
    """The content of a bundle's config.json. The root file system is "rootfs" beside it.

    told_user: what getuid(2) says by the filter (up to 4095), for a program that will not be root:
    errors are negative, so the user it takes itself for is 2**32 less that.
    """
    capabilities = list(CAPABILITIES)
    linux: dict[str, Any] = {
        "cgroupsPath": cgroup,
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        "namespaces": [
            {"type": "pid"},
            {"type": "ipc"},
            {"type": "uts"},
            {"type": "mount"},
            {"type": "cgroup"},
            {"type": "network", "path": network_namespace},
        ],
        "maskedPaths": list(MASKED),
        "readonlyPaths": list(READ_ONLY),
    }
    if seccomp:
        linux["seccomp"] = {
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": list(SECCOMP_REFUSED), "action": "SCMP_ACT_ERRNO"}],
        }
        if told_user:
            linux["seccomp"]["syscalls"].append(
                {"names": ["getuid", "geteuid"], "action": "SCMP_ACT_ERRNO", "errnoRet": told_user}
            )
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": list(arguments),
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities,
                "effective": capabilities,
                "permitted": capabilities,
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": OPEN_FILES_MAX, "soft": OPEN_FILES_MAX}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": False},
        "hostname": hostname,
        "mounts": _mounts(),
        "annotations": dict(annotations),
        "linux": linux,
    }


def _mounts() -> list[dict[str, Any]]:
    hard = ["nosuid", "noexec", "nodev"]
    return [
        _mount("/proc", "proc", "proc", []),
        _mount("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        _mount(
            "/dev/pts",
            "devpts",
            "devpts",
            ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        _mount("/dev/shm", "tmpfs", "shm", [*hard, "mode=1777", "size=65536k"]),  # noqa: S108
        _mount("/dev/mqueue", "mqueue", "mqueue", hard),
        _mount("/sys", "sysfs", "sysfs", [*hard, "ro"]),
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", [*hard, "relatime", "ro"]),
    ]


def _mount(destination: str, kind: str, source: str, options: list[str]) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source, "options": options}
