"""A host that takes nothing: `migrate cordon`, and a host that is being emptied.

It is a file in the host's state, so that it lasts over a reboot: what an operator has emptied for
one must not be filled again before they have said so (`migrate uncordon`).
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

import msgspec

from migrate.errors import MigrateError
from migrate.refusals import Refusal
from transport import sealed_files

if TYPE_CHECKING:
    from migrate.config import HostPaths


class Cordon(msgspec.Struct, frozen=True):
    """by: the id of the drain that made it, empty for an operator. expects: migrations that may
    come all the same, since this host has asked for its container back."""

    by: str = ""
    expects: tuple[str, ...] = ()


def read(paths: HostPaths) -> Cordon | None:
    """None for a host that takes containers. Raises MigrateError."""
    try:
        return msgspec.json.decode(sealed_files.read(paths.cordon), type=Cordon)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MigrateError(
            f"{paths.cordon} can't be read: {error}", remedy="migrate uncordon, or cordon, here"
        ) from error


def put(paths: HostPaths, cordon: Cordon) -> None:
    """From now on nothing comes. Raises MigrateError."""
    try:
        sealed_files.make_directory(paths.cordon.parent)
        sealed_files.replace(paths.cordon, msgspec.json.encode(cordon))
    except OSError as error:
        raise MigrateError(f"{paths.cordon} can't be written: {error}") from error


def lift(paths: HostPaths) -> None:
    """This host takes containers again. Idempotent."""
    with contextlib.suppress(FileNotFoundError):
        paths.cordon.unlink()


def expect(paths: HostPaths, migration_id: str) -> None:
    """That one may come, though the host is cordoned. Raises MigrateError."""
    found = read(paths)
    if found is not None:
        put(paths, msgspec.structs.replace(found, expects=(*found.expects, migration_id)))


def refusals(paths: HostPaths, migration_id: str) -> list[Refusal]:
    """Why a migration may not come; also of a file that can't be read."""
    try:
        found = read(paths)
    except MigrateError as error:
        return [Refusal("cordoned", error.message, error.remedy)]
    if found is None or migration_id in found.expects:
        return []
    host = socket.gethostname()
    return [
        Refusal(
            "cordoned",
            f"{host} is cordoned and takes nothing",
            f"choose another host, or there: migrate {'undrain' if found.by else 'uncordon'}",
        )
    ]
