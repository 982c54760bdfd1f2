"""CRIU's log read for the line that matters, and what to do about it.

CRIU reports a failure by its log alone: some thousand lines, of which the first error is nearly
always the cause and the last ones ("Dumping FAILED") never are. Pure: text in, a hint out. The
patterns are messages of CRIU 3.17 to 4.2, from its source (`criu/*.c`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

# A log of -v4 for a container with thousands of mappings; callers give the end of longer ones.
LOG_CHARACTERS_MAX: Final = 64 << 20
LINE_CHARACTERS_MAX: Final = 500


@dataclass(frozen=True, slots=True)
class Hint:
    """`line`: the log's line that matters, without time stamps; `remedy`: what to do, or what is
    behind it. Either may be empty."""

    line: str
    remedy: str


_ERROR: Final = re.compile(r"Error \([^)]*\): *(.*)")
_STAMP: Final = re.compile(r"^(?:\(\d+\.\d+\) +)?(?:pie: *)?(?:\d+: *)*")

# Said in runs that succeed, too.
_HARMLESS: Final = re.compile(r"rlimit: Can't setup RLIMIT_NOFILE")
# What every failure ends with, whatever its cause.
_CONSEQUENCE: Final = re.compile(
    r"Dumping FAILED|Restoring FAILED|Pre-dumping FAILED|Can't dump core|Dump .* failed with"
    r"|exited, status=|Killing processes because|post-restore script ret code"
    r"|Can't read from socket|Lazy pages transfer FAILED|cgroupd: recv req error"
)

# Pattern, then remedy. The first error that fits any wins; of those that fit it, the first.
_SPECIFIC: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), remedy)
    for pattern, remedy in (
        (
            r"rt vDSO area bounds|Can't find (rt )?vDSO|two nonconsecutive vvar",
            "This CRIU does not know this kernel's vDSO: install CRIU 4.1 or later (Linux 6.13 "
            "needs it).",
        ),
        (
            r"anon_inode:\[io_uring\]|io_uring",
            "CRIU can't move io_uring. Start the program without it (its option or environment "
            "variable), or deny io_uring_setup in the container's seccomp profile.",
        ),
        (
            r"anon_inode:\[secretmem\]|/secretmem",
            "Memory of memfd_secret(2) can't be read by anybody, so it can't move. Start the "
            "program without it.",
        ),
        (
            # 195 and 226 are the character devices of nvidia and of the kernel's DRM.
            r"\(chr (195|226):|/dev/nvidia|/dev/kfd|/dev/dri",
            "The container uses a GPU, which needs CRIU's plugin for it on both hosts.",
        ),
        (
            r"Can't dump file \d+ of that type",
            "The container has an open file of a kind that CRIU can't move: the line names it. "
            "Close it, or start the program without it.",
        ),
        (
            r"Can't lookup mount=",
            "A task holds a file that is outside of the container's mounts, often its standard "
            "output. Give the container pipes or /dev/null for its output, or a mount that "
            "contains the file.",
        ),
        (
            r"overmounted mounts are not supported",
            "A task holds a file below a mount that covers it. Close it, or undo the mount.",
        ),
        (
            r"External socket (is used|found)|name-less external socket|half of stream unix"
            r"|unreachable peer",
            "A unix socket of the container is connected to a process outside of it (a log or "
            "runtime daemon, a mounted docker.sock). Close that connection, or do not mount the "
            "socket.",
        ),
        (
            r"Can't create link remap",
            "A task holds a file that was deleted while another name of it exists. Allow it with "
            "CRIU's `link-remap`.",
        ),
        (
            r"Can't dump ghost file .* (of|more than)|ghost file .*limit",
            "A task holds a deleted file larger than CRIU's limit of 1 MiB. Raise `ghost-limit`, "
            "or have the task close it.",
        ),
        (
            r"has bad size|has bad mode",
            "A file that a task has open is not on the target what it was on the source: it "
            "changed after the dump, or was not synchronised. Log files must lie in the root "
            "file system or on a volume that moves with the container.",
        ),
        (
            r"bad build-ID",
            "A program or library on the target is another build than the running one. Both "
            "hosts need the same image.",
        ),
        (
            r"Can't get 1:16 opt",
            "This CRIU does not know this kernel's rules for SO_PASSCRED: install CRIU 4.2.1 or "
            "later.",
        ),
        (
            r"Can't fork for \d+.*(File exists|exists)|Pid \d+ do(es)? not match expected",
            "A pid that the container needs is taken. Restore into a pid namespace of its own, "
            "or end the process that has it.",
        ),
        (
            r"Requested sid \d+ doesn't match",
            "The tree was started from a terminal or by another session. Start it with setsid.",
        ),
        (
            r"CPU (Feature|capabilities|instruction|xfeatures|xsave)|xsave size mismatch|SIGILL"
            r"|killed by signal 4",
            "The target's processor lacks features that the container may use. Migrate to one "
            "that has them, or start the container where the oldest processor is.",
        ),
        (
            r"Unable to freeze cgroup|Timeout reached. Try to interrupt",
            "A task did not stop in time, mostly one that waits in the kernel for a disk or a "
            "network file system. Try again when that has passed, or raise CRIU's `timeout`.",
        ),
        (
            r"Found dangling tty|tty to inherit|Can't open (slave )?tty|ctty inherit",
            "The container has a terminal whose other end is outside. Start it without one "
            "(no -t).",
        ),
        (
            r"iptables|ip6tables|nftables|Locking (network|connection) failed",
            "CRIU could not lock the network with iptables or nftables. Install nftables, or "
            "leave the lock to the unplugged port (`network-lock skip`).",
        ),
        (
            r"Connected TCP socket",
            "The container has established connections. Allow them with `tcp-established`.",
        ),
        (
            r"In-flight connection",
            "A connection was just being opened. Try again, or allow CRIU to skip it "
            "(`skip-in-flight`).",
        ),
        (
            r"No parent for snapshot pagemap|Missing [0-9a-f]+ in parent pagemap"
            r"|Can't open parent path",
            "The images are not joined to the page store, or a page never arrived. The "
            "checkpoint is not complete: migrate again.",
        ),
        (
            r"BUG at criu/mem\.c|[Dd]irty track|soft-?dirty",
            "This kernel has no soft-dirty tracking (CONFIG_MEM_SOFT_DIRTY). Use the "
            "write-protect tracker.",
        ),
        (
            r"connect to lazy-pages\.socket|No lazy-pages socket",
            "The pager does not listen in CRIU's work directory: it ended, or was not started.",
        ),
        (
            r"Lazy pages are not available|userfaultfd|uffd",
            "The kernel gives no userfaultfd that handles forks and moves. A restore without "
            "lazy filling works.",
        ),
        (
            r"autodetected external mount|No mapping for .* mountpoint|external mount",
            "A bind mount of the source has nothing to be mapped to here. Provide the same "
            "mount on the target.",
        ),
        (
            r"FS mnt .* unsupported|doesn't have a proper root mount|Unable to dump a file system"
            r"|Can't dump (nested )?.*mnt|Nested mount namespaces",
            "A file system mounted inside the container can't be moved. Unmount it, or mount "
            "it from outside.",
        ),
        (
            r"Unsupported (proto|socket family|type .* on socket)|packet socket",
            "The container has a socket of a kind that CRIU can't move: the line names it.",
        ),
        (
            r"find an external netns|external network namespace",
            "The network namespace of the container is not there under the name that the images "
            "have for it.",
        ),
        (
            r"Unknown (freezer state|file lock)|file lock",
            "The container holds file locks that CRIU may not move. Allow it with `file-locks`.",
        ),
        (
            r"uprobes vma",
            "Something traces the container with uprobes. End the tracing, or allow it with "
            "`allow-uprobes`.",
        ),
        (
            r"seized|Can't attach to|ptrace.*(not permitted|EPERM)|Unable to (seize|interrupt)",
            "Another program (a debugger, strace) traces a task of the container. End it.",
        ),
    )
)

# Said where no specific message says more.
_GENERAL: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), remedy)
    for pattern, remedy in (
        (
            r"No space left on device|Cannot allocate memory|ENOMEM",
            "The host ran out of memory or of room for images.",
        ),
        (
            r"Operation not permitted|Permission denied",
            "CRIU lacks a right that it needs: run the agent as root, outside of any container, "
            "and look for a security module (AppArmor, SELinux) that forbids it.",
        ),
        (
            r"cgroup",
            "CRIU and the cgroups of this host do not agree. Have it leave them alone: "
            "`manage-cgroups ignore`.",
        ),
    )
)


def explain(text: str) -> Hint:
    """What a log of CRIU says about a failure. Never fails: without a known cause the remedy is
    empty, without any error the line is."""
    errors: list[str] = []
    for line in text[-LOG_CHARACTERS_MAX:].splitlines():
        match = _ERROR.search(line) or ("BUG at criu/" in line and _STAMP.match(line))
        if match and not _HARMLESS.search(line):
            said = match[1] if match.re is _ERROR else line[match.end() :]
            errors.append(said.strip()[:LINE_CHARACTERS_MAX])
    causes = [line for line in errors if not _CONSEQUENCE.search(line)]
    for table in (_SPECIFIC, _GENERAL):
        for line in causes:
            for pattern, remedy in table:
                if pattern.search(line):
                    return Hint(line, remedy)
    return Hint(next(iter(causes or errors), ""), "")
