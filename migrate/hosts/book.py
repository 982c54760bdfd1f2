"""The hosts of a fleet as their operator knows them: `hosts.json` beside the authority's files.

    {"version": 1, "hosts": [{"name": "db7", "destination": "root@db7.example.com:22", …}]}

One process changes it at a time; a reader sees the former content or the new one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from migrate.errors import MigrateError, UsageError
from transport import sealed_files

if TYPE_CHECKING:
    from collections.abc import Callable

HOSTS_MAX: Final = 1000
_VERSION: Final = 1
_FILE: Final = "hosts.json"


class HostRecord(msgspec.Struct, frozen=True):
    """name: in its certificates. destination: for SSH. addresses: that its certificates have
    besides. port: of its agent's control channel. added_wall_s: Unix time."""

    name: str
    destination: str
    addresses: tuple[str, ...] = ()
    port: int = 0
    added_wall_s: float = 0.0


class _Book(msgspec.Struct, frozen=True):
    version: int
    hosts: tuple[HostRecord, ...] = ()


def fleet_directory() -> Path:
    """Where the operator keeps the fleet: ~/.config/migrate/fleet, or as XDG_CONFIG_HOME says."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    config = Path(base) if base.startswith("/") else Path.home() / ".config"
    return config / "migrate" / "fleet"


def read(directory: Path) -> tuple[HostRecord, ...]:
    """The hosts, by name. Raises MigrateError."""
    path = directory / _FILE
    try:
        book = msgspec.json.decode(sealed_files.read(path), type=_Book)
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MigrateError(f"{path} can't be read: {error}") from error
    if book.version != _VERSION:
        raise MigrateError(f"{path} is of version {book.version}, {_VERSION} is understood")
    return book.hosts


def find(directory: Path, wanted: str) -> HostRecord:
    """By its name, or by what it is reached with. Raises UsageError."""
    hosts = read(directory)
    for one in hosts:
        if wanted in (one.name, one.destination):
            return one
    known = ", ".join(one.name for one in hosts) or "none"
    raise UsageError(f"no host {wanted} is in this fleet", remedy=f"known: {known}")


def put(directory: Path, record: HostRecord) -> None:
    """Add a host, or replace what is known of one with its name. Raises MigrateError."""

    def change(hosts: tuple[HostRecord, ...]) -> tuple[HostRecord, ...]:
        kept = [one for one in hosts if one.name != record.name]
        if len(kept) >= HOSTS_MAX:
            raise UsageError(f"a fleet has {HOSTS_MAX} hosts at most")
        return tuple(sorted([*kept, record], key=lambda one: one.name))

    _change(directory, change)


def drop(directory: Path, name: str) -> None:
    """Forget a host. Raises MigrateError."""
    _change(directory, lambda hosts: tuple(one for one in hosts if one.name != name))


def _change(
    directory: Path, change: Callable[[tuple[HostRecord, ...]], tuple[HostRecord, ...]]
) -> None:
    try:
        with sealed_files.locked(directory):
            book = _Book(_VERSION, change(read(directory)))
            pretty = msgspec.json.format(msgspec.json.encode(book), indent=2)
            sealed_files.replace(directory / _FILE, pretty)
    except OSError as error:
        raise MigrateError(f"{directory / _FILE} can't be written: {error}") from error
