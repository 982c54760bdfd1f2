"""Which key a host has, by the known_hosts files of OpenSSH (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT).

    [@revoked|@cert-authority] NAMES KEYTYPE BASE64 [COMMENT]

NAMES are patterns with `*`, `?` and `!`, separated by commas, or one `|1|SALT|HASH`, where HASH is
HMAC-SHA1(SALT, name). A name is `host`, or `[host]:port` for a port other than 22. Lines that can't
be read are skipped, as OpenSSH does: they prove nothing.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from transport.ssh.errors import SshConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

FILE_BYTES_MAX: Final = 16 << 20
"""A known_hosts of a hundred thousand hosts; whatever is larger is none."""

_HASHED: Final = "|1|"
_REVOKED: Final = "@revoked"
_AUTHORITY: Final = "@cert-authority"
_FILE_MODE, _DIRECTORY_MODE = 0o600, 0o700


class Verdict(StrEnum):
    """What known_hosts says about a key that a host has shown."""

    KNOWN = "known"
    UNKNOWN = "unknown"
    CHANGED = "changed"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line. blob: the key in the SSH wire format."""

    marker: str
    names: str
    key_type: str
    blob: bytes
    path: Path
    line: int

    @property
    def place(self) -> str:
        """FILE:LINE."""
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True)
class Judgement:
    """entries: those that the verdict comes from, of this host; none for an unknown key.
    by_authority: the host is known by a certificate authority only, which can't be judged here."""

    verdict: Verdict
    entries: tuple[Entry, ...] = ()
    by_authority: bool = False


class KnownHosts:
    """The files of one user, read once. Raises SshConfigError for one that can't be read."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._entries = [entry for path in files for entry in _read(path)]

    def key_types(self, name: str) -> list[str]:
        """Of the keys that are known for `name`: what to ask the server for."""
        return [entry.key_type for entry in self._of(name) if not entry.marker]

    def judge(self, name: str, blob: bytes) -> Judgement:
        """What is known about this key of the host `name`."""
        entries = self._of(name)
        # A revoked key is revoked for whoever shows it, under the names that its line gives.
        if revoked := [one for one in entries if one.marker == _REVOKED and one.blob == blob]:
            return Judgement(Verdict.REVOKED, tuple(revoked))
        plain = [entry for entry in entries if not entry.marker]
        if same := [entry for entry in plain if hmac.compare_digest(entry.blob, blob)]:
            return Judgement(Verdict.KNOWN, tuple(same))
        if plain:
            return Judgement(Verdict.CHANGED, tuple(plain))
        authority = any(entry.marker == _AUTHORITY for entry in entries)
        return Judgement(Verdict.UNKNOWN, by_authority=authority)

    def _of(self, name: str) -> list[Entry]:
        return [entry for entry in self._entries if _is_named(entry.names, name)]


def fingerprint(blob: bytes) -> str:
    """As `ssh-keygen -l` prints it."""
    digest = base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
    return f"SHA256:{digest}"


def remember(path: Path, name: str, key_type: str, blob: bytes, *, hashed: bool) -> None:
    """Append a key that was accepted. Raises OSError."""
    path.parent.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
    shown = _hash(name, secrets.token_bytes(hashlib.sha1().digest_size)) if hashed else name  # noqa: S324
    line = f"{shown} {key_type} {base64.b64encode(blob).decode()}\n".encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, _FILE_MODE)
    with os.fdopen(descriptor, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        # One write, which O_APPEND puts at the end, whoever else appends.
        os.write(file.fileno(), line)


def _read(path: Path) -> Iterator[Entry]:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise SshConfigError(f"{path} can't be read: {error.strerror}") from error
    if len(content) > FILE_BYTES_MAX:
        raise SshConfigError(f"{path} is larger than {FILE_BYTES_MAX >> 20} MiB")
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        entry = _parse(line.split(), path, number)
        if entry is not None:
            yield entry


def _parse(fields: list[str], path: Path, line: int) -> Entry | None:
    if not fields or fields[0].startswith("#"):
        return None
    marker = fields.pop(0) if fields[0].startswith("@") else ""
    if marker not in ("", _REVOKED, _AUTHORITY) or len(fields) < 3:
        return None
    try:
        blob = base64.b64decode(fields[2], validate=True)
    except binascii.Error:
        return None
    return Entry(marker, fields[0], fields[1], blob, path, line)


def _is_named(names: str, name: str) -> bool:
    if names.startswith(_HASHED):
        try:
            salt = base64.b64decode(names[len(_HASHED) :].partition("|")[0], validate=True)
        except binascii.Error:
            return False
        return hmac.compare_digest(_hash(name, salt).encode(), names.encode())
    patterns = names.lower().split(",")
    name = name.lower()
    if any(_matches(name, one[1:]) for one in patterns if one.startswith("!")):
        return False
    return any(_matches(name, one) for one in patterns if not one.startswith("!"))


def _matches(name: str, pattern: str) -> bool:
    """`*` and `?` alone are special: the brackets of `[host]:port` are not."""
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))


def _hash(name: str, salt: bytes) -> str:
    # SHA-1 is OpenSSH's format; it hides names and proves nothing.
    digest = hmac.new(salt, name.encode(), hashlib.sha1).digest()
    return f"{_HASHED}{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"


def places(entries: Iterable[Entry]) -> str:
    """The old keys for a person: fingerprint and place of each."""
    return "; ".join(f"{fingerprint(one.blob)} ({one.key_type}) in {one.place}" for one in entries)
