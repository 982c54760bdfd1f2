"""What the operator of a host lets containers and other hosts do there: `/etc/migrate/policy.toml`.

    [receive]
    from = ["db-*", "web1"]             # hosts that may send here, by name; "*" as in a shell
    containers = ["*"]
    runtimes = ["runc"]
    require_user_namespace = false      # whether none may have an id of this host's root
    bind_mounts = ["/srv/shared"]       # the same storage on every host: may be shown to containers
    devices = ["/dev/fuse"]             # beyond those that every container has
    capabilities = ["CAP_NET_ADMIN"]    # beyond those that containers usually have
    seccomp_off = false                 # whether a container may come without a filter
    kernel_files = false                # whether parts of /proc and /sys may be writable
    privileged = false                  # everything from `devices` on, whatever it is
    labels = ["ssd", "zone=a"]          # what a container's annotation migrate.requires asks for

    [receive.quotas]                    # of everything that is being received at a time
    sessions = 16
    sessions_per_host = 8
    memory_mib = 65536
    rootfs_mib = 1048576

    [send]
    to = ["*"]
    containers = ["*"]
    devices = []                        # that are the same on every host

    [clone]                             # besides what the tables above allow
    from = ["*"]                        # hosts that may make copies here
    to = ["*"]                          # hosts where copies of what runs here may be made
    containers = ["*"]                  # that copies may be made of
    hooks = ["*"]                       # of /etc/migrate/clone.d, that may be asked for; here

Without a file, or without a line of it: any host of the fleet, and nothing that is privileged. A
key that nobody knows is refused, for it is a protection that its writer believes in. This module
does not judge; `policy_checks.py` does.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Annotated, Final, TypeAlias

import msgspec
from msgspec import Meta

from migrate.config import SESSIONS_MAX
from migrate.errors import EXIT_REFUSED, MigrateError

# Far more than anybody writes by hand.
POLICY_BYTES_MAX: Final = 64 << 10
LIST_MAX: Final = 256
# One host can't keep all others out.
SESSIONS_PER_HOST_DEFAULT: Final = 8
MIB_MAX: Final = 1 << 30

Glob: TypeAlias = Annotated[str, Meta(pattern=r"\A[a-zA-Z0-9*?\[\]!_.-]{1,253}\Z")]
HostPath: TypeAlias = Annotated[str, Meta(pattern=r"\A/[^\0\n]*\Z", max_length=4095)]
Capability: TypeAlias = Annotated[str, Meta(pattern=r"\ACAP_[A-Z0-9_]{1,60}\Z")]
Word: TypeAlias = Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9_.-]{0,63}\Z")]
Label: TypeAlias = Annotated[str, Meta(pattern=r"\A[a-zA-Z0-9][a-zA-Z0-9_.=-]{0,63}\Z")]
Mib: TypeAlias = Annotated[int, Meta(ge=0, le=MIB_MAX)]
Globs: TypeAlias = Annotated[tuple[Glob, ...], Meta(max_length=LIST_MAX)]
Paths: TypeAlias = Annotated[tuple[HostPath, ...], Meta(max_length=LIST_MAX)]


class PolicyError(MigrateError):
    """The policy of this host can't be used; nothing is received or sent by it."""

    exit_code = EXIT_REFUSED


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every table of the file."""


class Quotas(Section, frozen=True):
    """Limits of what is being received at a time. None: what the host has."""

    sessions: Annotated[int, Meta(ge=0, le=SESSIONS_MAX)] = SESSIONS_MAX
    sessions_per_host: Annotated[int, Meta(ge=0, le=SESSIONS_MAX)] = SESSIONS_PER_HOST_DEFAULT
    memory_mib: Mib | None = None
    rootfs_mib: Mib | None = None


class Receive(Section, frozen=True, rename={"hosts": "from"}):
    """What may come here, from whom."""

    hosts: Globs = ("*",)
    containers: Globs = ("*",)
    runtimes: Annotated[tuple[Word, ...], Meta(max_length=LIST_MAX)] = ("runc",)
    require_user_namespace: bool = False
    bind_mounts: Paths = ()
    devices: Paths = ()
    capabilities: Annotated[tuple[Capability, ...], Meta(max_length=LIST_MAX)] = ()
    seccomp_off: bool = False
    kernel_files: bool = False
    privileged: bool = False
    labels: Annotated[tuple[Label, ...], Meta(max_length=LIST_MAX)] = ()
    quotas: Quotas = Quotas()


class Send(Section, frozen=True, rename={"hosts": "to"}):
    """What may leave, and where to."""

    hosts: Globs = ("*",)
    containers: Globs = ("*",)
    devices: Paths = ()


class Clone(Section, frozen=True, rename={"sources": "from", "targets": "to"}):
    """Who may make copies, of what. What a table above refuses to move is not copied either."""

    sources: Globs = ("*",)
    targets: Globs = ("*",)
    containers: Globs = ("*",)
    hooks: Globs = ("*",)


class Policy(Section, frozen=True):
    """The whole file."""

    receive: Receive = Receive()
    send: Send = Send()
    clone: Clone = Clone()


def parse(text: str) -> Policy:
    """The policy of a file's text. Raises PolicyError, which names the line."""
    if len(text) > POLICY_BYTES_MAX:
        raise PolicyError(f"the policy is larger than {POLICY_BYTES_MAX} bytes")
    try:
        return msgspec.convert(tomllib.loads(text), Policy)
    except tomllib.TOMLDecodeError as error:
        raise PolicyError(f"the policy is no TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise PolicyError(f"the policy {_where(text, str(error))}: {error}") from error
    except RecursionError as error:
        raise PolicyError("the policy is nested too deeply") from error


def load(path: Path) -> Policy:
    """The policy in a file, the default one where there is none. Raises PolicyError."""
    return PolicyFile(path).current()


def render(policy: Policy) -> str:
    """The policy as a file that says all of it."""
    lines: list[str] = []
    _table(lines, "receive", msgspec.to_builtins(policy.receive))
    _table(lines, "send", msgspec.to_builtins(policy.send))
    _table(lines, "clone", msgspec.to_builtins(policy.clone))
    return "\n".join(lines).rstrip("\n")


class PolicyFile:
    """A policy that follows its file: a change is in force for the next one who asks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self._policy = Policy()

    def current(self) -> Policy:
        """The policy as the file is now. Blocking. Raises PolicyError: a file that can't be read is
        no reason to fall back to an older or a default one."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                seen = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode)
                if seen != self._seen:
                    self._policy = self._read(status, file.read(POLICY_BYTES_MAX + 1))
                    self._seen = seen
        except FileNotFoundError:
            self._seen, self._policy = None, Policy()
        except OSError as error:
            raise PolicyError(f"{self._path} can't be read: {error}") from error
        return self._policy

    def _read(self, status: os.stat_result, data: bytes) -> Policy:
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PolicyError(
                f"{self._path} can be written by others than its owner, root",
                remedy=f"chown root {self._path}; chmod 644 {self._path}",
            )
        try:
            return parse(data.decode())
        except UnicodeDecodeError as error:
            raise PolicyError(f"{self._path} is no text in UTF-8: {error}") from error
        except PolicyError as error:
            raise PolicyError(
                f"{self._path}: {error.message}", remedy=f"migrate policy check {self._path}"
            ) from error


def _where(text: str, reason: str) -> str:
    """The line of what msgspec complains about, by the path at the end of its message
    ("… - at `$.receive.from[0]`") and the name of a field that it does not know."""
    found = re.search(r"`\$\.?([^`]*)`\Z", reason)
    wanted = re.sub(r"\[[^\]]*\]", "", found[1]).split(".") if found and found[1] else []
    wanted += re.findall(r"unknown field `([^`]+)`", reason)
    table: list[str] = []
    best, best_number = 0, 0
    for number, line in enumerate(text.splitlines(), 1):
        key, _, _ = line.partition("=")
        names = re.findall(r"[\w-]+", key.partition("#")[0])
        if line.lstrip().startswith("["):
            table = names
        said = table if line.lstrip().startswith("[") else [*table, *names]
        if len(said) > best and said == wanted[: len(said)]:
            best, best_number = len(said), number
    return f"can't be used, line {best_number}" if best else "can't be used"


def _table(lines: list[str], name: str, values: dict[str, object]) -> None:
    lines.append(f"[{name}]")
    below = {}
    for key, value in values.items():
        if isinstance(value, dict):
            below[key] = value
        elif value is not None:
            # JSON's strings, numbers, booleans and lists are TOML's as well.
            lines.append(f"{key} = {json.dumps(value)}")
    lines.append("")
    for key, value in below.items():
        _table(lines, f"{name}.{key}", value)
