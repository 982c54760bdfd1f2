"""What holds the threads of a container back: as the source saw it, and whether a copy has it too.

    source, frozen      confinement.read -> Confinements ── Restore ──> target
    target, pre-resume  confinement.read -> Confinements, and `weaker(source's, own)` must be empty

Pure. A field that differs in a way that gives the thread more than it had is weaker; less is not,
because a host may hold its containers tighter. Where more and less can't be told apart (names,
maps, labels) every difference is weaker. Threads are named by their numbers in the container's own
pid namespace; many of them share one sheet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

import msgspec
from msgspec import Meta

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

THREADS_MAX: Final = 32768
SHEETS_MAX: Final = 1024
# A map of user_namespaces(7) has 340 lines of at most 33 characters.
MAP_CHARS_MAX: Final = 340 * 34
GROUPS_MAX: Final = 4096
# Differences that are told: one has a reason, a thousand have the same.
TOLD_MAX: Final = 8
UNLIMITED: Final = -1
LIMIT_MAX: Final = (1 << 63) - 1

_EQUAL: Final = ("users", "groups", "more_groups", "user_map", "group_map")
_CAPABILITY_SETS: Final = ("inheritable", "permitted", "effective", "bounding", "ambient")
# SECCOMP_MODE_STRICT: read, write and exit.
_STRICT: Final = 1

CAPABILITY_NAMES: Final = tuple(
    f"CAP_{name}"
    for name in (
        *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID"),
        *("SETUID", "SETPCAP", "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST"),
        *("NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO"),
        *("SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE"),
        *("SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE"),
        *("AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM"),
        *("BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE"),
    )
)
"""By number: linux/capability.h."""

Identity: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
Four: TypeAlias = tuple[Identity, Identity, Identity, Identity]
Bits: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Limit: TypeAlias = Annotated[int, Meta(ge=UNLIMITED, le=LIMIT_MAX)]
Map: TypeAlias = Annotated[str, Meta(max_length=MAP_CHARS_MAX)]
Thread: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 22)]


class Sheet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What holds one thread back, as proc(5) shows it.

    users, groups: real, effective, saved, of the file system. seccomp: 0 none, 1 strict, 2 filter.
    label: of the security module, "" where there is none. user_map, group_map: user_namespaces(7),
    without superfluous spaces. limits: soft and hard of each row of /proc/PID/limits by its name.
    """

    users: Four
    groups: Four
    more_groups: Annotated[tuple[Identity, ...], Meta(max_length=GROUPS_MAX)]
    inheritable: Bits
    permitted: Bits
    effective: Bits
    bounding: Bits
    ambient: Bits
    no_new_privileges: bool
    seccomp: Annotated[int, Meta(ge=0, le=2)]
    filters: Annotated[int, Meta(ge=0, le=1 << 16)]
    label: Annotated[str, Meta(max_length=4096)]
    user_map: Map
    group_map: Map
    setgroups: Annotated[str, Meta(max_length=16)]
    oom_score_adj: Annotated[int, Meta(ge=-1000, le=1000)]
    limits: Annotated[
        dict[Annotated[str, Meta(max_length=64)], tuple[Limit, Limit]], Meta(max_length=32)
    ]


class Confinements(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a whole container. threads: number -> index of its sheet."""

    sheets: Annotated[tuple[Sheet, ...], Meta(max_length=SHEETS_MAX)]
    threads: Annotated[dict[Thread, Annotated[int, Meta(ge=0)]], Meta(max_length=THREADS_MAX)]


def weaker(source: Confinements, copy: Confinements) -> list[str]:
    """In what the copy is held back less than its source was; the first few, a sentence each."""
    found: list[str] = []
    compared: dict[tuple[int, int], list[str]] = {}
    for thread in sorted(source.threads.keys() | copy.threads.keys()):
        if len(found) >= TOLD_MAX:
            break
        before, after = source.threads.get(thread), copy.threads.get(thread)
        if before is None or after is None or before >= len(source.sheets):
            found.append(f"thread {thread} is only on the {'copy' if before is None else 'source'}")
            continue
        if (before, after) not in compared:
            compared[before, after] = list(_weaker(source.sheets[before], copy.sheets[after]))
        found += [f"thread {thread}: {text}" for text in compared[before, after]]
    return found[:TOLD_MAX]


def unusual(confinements: Confinements, capabilities: Collection[str]) -> list[str]:
    """The capabilities beyond `capabilities` that any thread has, or could get."""
    bits = 0
    for sheet in confinements.sheets:
        for name in _CAPABILITY_SETS:
            bits |= getattr(sheet, name)
    return [name for name in names_of(bits) if name not in capabilities]


def unfiltered(confinements: Confinements) -> bool:
    """Whether any thread has no seccomp filter."""
    return any(sheet.seccomp == 0 for sheet in confinements.sheets)


def roots(confinements: Confinements) -> bool:
    """Whether any thread may be the host's root, as a user or as a group."""
    maps = {one for sheet in confinements.sheets for one in (sheet.user_map, sheet.group_map)}
    # user_namespaces(7): first id inside, first id outside, how many.
    return any(line.split()[1:2] == ["0"] for one in maps for line in one.splitlines())


def names_of(bits: int) -> list[str]:
    """Capabilities by name; one of a newer kernel by its number."""
    return [
        CAPABILITY_NAMES[bit] if bit < len(CAPABILITY_NAMES) else f"CAP_{bit}"
        for bit in range(bits.bit_length())
        if bits >> bit & 1
    ]


def _weaker(source: Sheet, copy: Sheet) -> Iterator[str]:
    for name in _EQUAL:
        if getattr(source, name) != getattr(copy, name):
            what = name.replace("_", " ")
            yield f"{what} {_short(getattr(copy, name))} and not {_short(getattr(source, name))}"
    for name in _CAPABILITY_SETS:
        more = getattr(copy, name) & ~getattr(source, name)
        if more:
            yield f"more {name} capabilities: {', '.join(names_of(more))}"
    yield from _weaker_flags(source, copy)
    for name, before in source.limits.items():
        after = copy.limits.get(name, before)
        if any(_is_more(one, other) for one, other in zip(after, before, strict=True)):
            yield f"{name} {_limits(after)} and not {_limits(before)}"


def _weaker_flags(source: Sheet, copy: Sheet) -> Iterator[str]:
    if source.no_new_privileges and not copy.no_new_privileges:
        yield "no_new_privs is off"
    if source.setgroups == "deny" and copy.setgroups != "deny":
        yield "setgroups is allowed"
    if copy.seccomp != source.seccomp and (source.seccomp == _STRICT or copy.seccomp == 0):
        yield f"seccomp mode {copy.seccomp} and not {source.seccomp}"
    if copy.filters < source.filters:
        yield f"{copy.filters} seccomp filters and not {source.filters}"
    if source.label not in ("", "unconfined", copy.label):
        yield f"the security label {copy.label or '(none)'} and not {source.label}"
    if copy.oom_score_adj < source.oom_score_adj:
        yield f"oom_score_adj {copy.oom_score_adj} and not {source.oom_score_adj}"


def _is_more(limit: int, than: int) -> bool:
    return limit != than and than != UNLIMITED and (limit == UNLIMITED or limit > than)


def _limits(pair: tuple[int, int]) -> str:
    return "/".join("unlimited" if one == UNLIMITED else str(one) for one in pair)


def _short(value: object) -> str:
    return str(value)[:80]
