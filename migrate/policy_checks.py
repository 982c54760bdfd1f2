"""Whether the policy of a host lets a container come, or leave. Pure.

What is privileged is judged by the container's config.json, which says what the runtime sets up
here as root. What its tasks then really are is `core/confinement.py`'s matter. Paths: as in OCI's
config.json. A shape that no runtime would take is a ValueError, TypeError, AttributeError or
LookupError.
"""

from __future__ import annotations

import fnmatch
import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from migrate.container_checks import DEFAULT_DEVICES, is_below
from migrate.core import confinement
from migrate.refusals import Refusal
from migrate.runtimes.oci import has_user_namespace, part

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from migrate.core.confinement import Confinements
    from migrate.core.messages import OpenSession
    from migrate.policy import Policy, Receive
    from migrate.runtimes.base import Mount

FILE: Final = "/etc/migrate/policy.toml"

# Their containers may use every device that no rule denies.
_OPEN_RUNTIMES = frozenset({"crun"})
# What containers have without asking (moby: oci/caps/defaults.go); runc's default is a part of it.
USUAL_CAPABILITIES: Final = frozenset(
    {
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
    }
)
# Character devices of DEFAULT_DEVICES and tun by their numbers; "*" as in a rule of a cgroup.
_USUAL_NUMBERS: Final = frozenset(
    {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (10, 200)}
)
_PSEUDOTERMINALS: Final = 136
# What gives a task the host's memory, keys or settings when it can be reached (moby:
# oci/defaults.go; runc spec). A path covers what is below it.
_MASKED: Final = ("/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware")
_READ_ONLY: Final = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
# A filter that allows all is none.
_ALLOWING: Final = ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG")
_MIB: Final = 1 << 20


class Load(NamedTuple):
    """What one session that is under way has asked for. sessions: 0 of one that shares another's
    transfer."""

    host: str
    memory_bytes: int
    rootfs_bytes: int
    sessions: int

    @classmethod
    def of(cls, host: str, request: OpenSession) -> Load:
        """A copy that shares the page store of another one takes of memory what it writes."""
        copy_of = request.copy_of
        shares = bool(copy_of and copy_of.beside)
        is_whole = not copy_of or not shares or copy_of.fill
        memory_bytes = request.memory_bytes if is_whole else request.shared_bytes
        return cls(host, memory_bytes, request.rootfs_bytes, 0 if shares else 1)


def judge_send(policy: Policy, container: str, target: str) -> list[Refusal]:
    """Whether this host gives the container to that one."""
    refusals = []
    if not _is_named(target, policy.send.hosts):
        refusals.append(
            Refusal(
                "policy-target",
                f"this host sends no containers to {target}",
                _add("send", "to", target),
            )
        )
    if not _is_named(container, policy.send.containers):
        refusals.append(
            Refusal(
                "policy-container",
                f"this host does not send {container}",
                _add("send", "containers", container),
            )
        )
    return refusals


def judge_clone(
    policy: Policy, container: str, *, source: str = "", target: str = "", hook: str = ""
) -> list[Refusal]:
    """Whether this host lets a container be copied: from it to `target`, or from `source` to it,
    where the copy meets `hook`."""
    asked = [("containers", container, policy.clone.containers)]
    if source:
        asked.append(("from", source, policy.clone.sources))
    if target:
        asked.append(("to", target, policy.clone.targets))
    if hook:
        asked.append(("hooks", hook, policy.clone.hooks))
    return [
        Refusal(
            "policy-clone",
            f"this host's policy makes no copies with {key} = {name}",
            _add("clone", key, name),
        )
        for key, name, allowed in asked
        if not _is_named(name, allowed)
    ]


def judge_receive(
    policy: Policy, request: OpenSession, spec: dict[str, Any], mounts: Sequence[Mount]
) -> list[Refusal]:
    """Whether the container may come here, from that host, as it is configured."""
    receive = policy.receive
    refusals = []
    if copy_of := request.copy_of:
        hook = copy_of.hook or ""
        refusals += judge_clone(policy, copy_of.container, source=request.host, hook=hook)
    for code, name, allowed, key in (
        ("policy-source", request.host, receive.hosts, "from"),
        ("policy-container", request.container, receive.containers, "containers"),
        ("policy-runtime", request.runtime, receive.runtimes, "runtimes"),
    ):
        if not _is_named(name, allowed):
            message = f"this host's policy receives nothing with {key} = {name}"
            refusals.append(Refusal(code, message, _add("receive", key, name)))
    if receive.require_user_namespace and not _maps_root_away(spec):
        refusals.append(_no_user_namespace("the container may have the ids of this host's root"))
    if not receive.privileged:
        refusals += [
            *_of_capabilities(spec, receive),
            *_of_devices(spec, receive),
            *_of_unruled_devices(spec, request.runtime),
            *_of_seccomp(spec, receive),
            *_of_kernel_files(spec, mounts, receive),
        ]
    return refusals


def judge_tasks(policy: Policy, confinements: Confinements) -> list[Refusal]:
    """Whether tasks that are held back like this may run here, whatever config.json says."""
    receive = policy.receive
    if receive.require_user_namespace and confinement.roots(confinements):
        return [_no_user_namespace("a task of the container may have the ids of its host's root")]
    if receive.privileged:
        return []
    refusals = [
        Refusal(
            "policy-capability",
            f"a task of the container has the capability {name}",
            _add("receive", "capabilities", name),
        )
        for name in confinement.unusual(
            confinements, USUAL_CAPABILITIES | set(receive.capabilities)
        )
    ]
    if confinement.unfiltered(confinements) and not receive.seccomp_off:
        refusals.append(
            Refusal(
                "policy-seccomp",
                "a task of the container has no seccomp filter",
                f"set [receive] seccomp_off = true in {FILE} there, if it may",
            )
        )
    return refusals


def judge_quotas(policy: Policy, request: OpenSession, others: Sequence[Load]) -> list[Refusal]:
    """Whether it may come beside the sessions that are under way."""
    quotas = policy.receive.quotas
    loads = [Load.of(request.host, request), *others]
    of_all = sum(one.sessions for one in loads)
    of_host = sum(one.sessions for one in loads if one.host == request.host)
    memory_bytes = sum(one.memory_bytes for one in loads)
    rootfs_bytes = sum(one.rootfs_bytes for one in loads)
    asked: tuple[tuple[str, int, int | None, str], ...] = (
        ("sessions", of_all, quotas.sessions, "sessions"),
        ("sessions_per_host", of_host, quotas.sessions_per_host, f"sessions of {request.host}"),
        ("memory_mib", -(-memory_bytes // _MIB), quotas.memory_mib, "MiB of memory"),
        ("rootfs_mib", -(-rootfs_bytes // _MIB), quotas.rootfs_mib, "MiB of files"),
    )
    return [
        Refusal(
            "quota",
            f"this host's policy receives {most} {what} at a time, and {wanted} would be",
            f"wait for the others, or raise [receive.quotas] {key} in {FILE} there",
        )
        for key, wanted, most, what in asked
        if most is not None and wanted > most
    ]


def _maps_root_away(spec: dict[str, Any]) -> bool:
    outside = [
        extent["hostID"]
        for mapping in ("uidMappings", "gidMappings")
        for extent in part(spec, "linux").get(mapping) or ()
    ]
    return has_user_namespace(spec) and 0 not in outside


def _no_user_namespace(message: str) -> Refusal:
    return Refusal(
        "policy-user-namespace",
        message,
        "give it a user namespace, without hostID 0 in uidMappings and gidMappings of config.json,"
        f" or remove [receive] require_user_namespace from {FILE} there",
    )


def _is_named(name: str, globs: Iterable[str]) -> bool:
    """Names of hosts have no case."""
    return any(fnmatch.fnmatchcase(name.lower(), glob.lower()) for glob in globs)


def _add(table: str, key: str, value: str) -> str:
    return f'add "{value}" to [{table}] {key} in {FILE} there, if it may'


def _of_capabilities(spec: dict[str, Any], receive: Receive) -> Iterator[Refusal]:
    sets = part(part(spec, "process"), "capabilities")
    asked = {str(name) for names in sets.values() for name in names or ()}
    for name in sorted(asked - USUAL_CAPABILITIES - set(receive.capabilities)):
        yield Refusal(
            "policy-capability",
            f"the container has the capability {name}",
            _add("receive", "capabilities", name),
        )


def _of_devices(spec: dict[str, Any], receive: Receive) -> Iterator[Refusal]:
    allowed = set()
    for device in part(spec, "linux").get("devices") or ():
        path = str(device["path"])
        number = (str(device.get("type")), device.get("major"), device.get("minor"))
        if path in receive.devices:
            allowed.add(number)
        elif path not in DEFAULT_DEVICES or not _is_usual(number):
            yield Refusal(
                "policy-device",
                f"the container is given the device {path}",
                _add("receive", "devices", path),
            )
    for rule in part(part(spec, "linux"), "resources").get("devices") or ():
        # Making a node is CAP_MKNOD's matter, and gives no access.
        if rule.get("allow") is not True or set(str(rule.get("access") or "rwm")) <= {"m"}:
            continue
        number = (str(rule.get("type") or "a"), rule.get("major"), rule.get("minor"))
        if number not in allowed and not _is_usual(number):
            yield Refusal(
                "policy-device",
                "the container may use the device {} {}:{}".format(
                    number[0], *("*" if one is None else one for one in number[1:])
                ),
                "remove it from linux.resources.devices, or name its file in linux.devices and in"
                f" [receive] devices in {FILE} there",
            )


def _of_unruled_devices(spec: dict[str, Any], runtime: str) -> Iterator[Refusal]:
    """runc begins by allowing the usual devices alone; crun has no filter without a rule."""
    rules = part(part(spec, "linux"), "resources").get("devices") or ()
    if runtime not in _OPEN_RUNTIMES or any(map(_denies_all, rules)):
        return
    yield Refusal(
        "policy-device",
        f"no rule keeps the container from devices, and {runtime} allows all then",
        "add {'allow': false, 'access': 'rwm'} to linux.resources.devices in config.json, in the"
        " first place",
    )


def _denies_all(rule: dict[str, Any]) -> bool:
    is_all = rule.get("type") in (None, "a") and not {"major", "minor"} & rule.keys()
    return is_all and rule.get("allow") is False and set("rwm") <= set(str(rule.get("access")))


def _is_usual(number: tuple[str, Any, Any]) -> bool:
    kind, major, minor = number
    # OCI's "u" is a character device without a buffer.
    return kind in ("c", "u") and (major == _PSEUDOTERMINALS or (major, minor) in _USUAL_NUMBERS)


def _of_seccomp(spec: dict[str, Any], receive: Receive) -> Iterator[Refusal]:
    profile = part(part(spec, "linux"), "seccomp")
    actions = [
        profile.get("defaultAction"),
        *(one["action"] for one in profile.get("syscalls") or ()),
    ]
    if not receive.seccomp_off and all(one in (None, *_ALLOWING) for one in actions):
        yield Refusal(
            "policy-seccomp",
            "the container has no seccomp filter",
            "give it one (linux.seccomp in config.json, as Docker and Podman do), or set"
            f" [receive] seccomp_off = true in {FILE} there",
        )
    if profile.get("listenerPath"):
        yield Refusal(
            "policy-seccomp",
            "the container's seccomp filter asks a program of the host (listenerPath)",
            "remove it from linux.seccomp in config.json",
        )


def _of_kernel_files(
    spec: dict[str, Any], mounts: Iterable[Mount], receive: Receive
) -> Iterator[Refusal]:
    if receive.kernel_files:
        return
    linux = part(spec, "linux")
    masked = [str(path) for path in linux.get("maskedPaths") or ()]
    closed = [*masked, *(str(path) for path in linux.get("readonlyPaths") or ())]
    missing = [path for path in _MASKED if not is_below(path, masked)]
    missing += [path for path in _READ_ONLY if not is_below(path, closed)]
    missing += [one.destination for one in mounts if _opens_kernel(one, linux)]
    if missing:
        few = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        yield Refusal(
            "policy-kernel-files",
            f"the container can reach what belongs to the kernel: {few}",
            "mask it (maskedPaths, readonlyPaths, `ro` in config.json, as `runc spec` does), or set"
            f" [receive] kernel_files = true in {FILE} there",
        )


def _opens_kernel(mount: Mount, linux: dict[str, Any]) -> bool:
    """Whether a mount shows the kernel's files where no mask is, or writable."""
    where = os.path.normpath(mount.destination)
    match mount.kind:
        case "proc":
            return where != "/proc"
        case "sysfs":
            return where != "/sys" or not _is_read_only(mount)
        case "cgroup" | "cgroup2":
            kinds = [one.get("type") for one in linux.get("namespaces") or ()]
            return "cgroup" not in kinds and not _is_read_only(mount)
        case "devtmpfs":
            return True
        case _:
            return False


def _is_read_only(mount: Mount) -> bool:
    """The last word counts."""
    said = [option for option in mount.options if option in ("ro", "rw")]
    return said[-1:] == ["ro"]
