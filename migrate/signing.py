"""Signed manifests: made on the source, believed on the target, kept and looked at later.

    source   PageSender.carried() ──> manifest_of ──> sealed ──> Restore
    target   Restore ──> opened: signature, certificate, whose it is ──> check (core/manifest.py)
             DataListener.revoke() ──> what the streams carried ┘
             the image directory ──> hashed_images ─────────────┘

What CRIU interprets is hashed on the target as it lies there, in a directory that nobody else can
write any more: what is restored is what was signed, whoever wrote it. The bulk, `pages-*.img`, is
content of the container's memory; it was hashed piece by piece while it arrived.
"""

from __future__ import annotations

import datetime
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from migrate.core import manifest as manifests
from migrate.core.manifest import FileEntry, Manifest, SignedManifest, StreamedMemory, StreamEntry
from migrate.core.messages import MAX_FILES
from migrate.errors import CheckpointRefused
from transport.core.transcript import PIECE_BYTES, file_digest, piece_digest
from transport.errors import SignatureWrongError, TlsError
from transport.identity import Role, verify_certificate, verify_signature

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from migrate.core.manifest import Binding
    from transport.core.transcript import Carried
    from transport.identity import IdentityPaths

MANIFEST_NAME: Final = "manifest.json"
"""Of the signed manifest in the directory of a container that arrived, or beside stored images."""
# Pages alone, of tasks or of shared memory: what is wrong in them is wrong in the container.
_BULK: Final = re.compile(r"pages-[0-9]+\.img")


# Not to wait for whoever has put a FIFO there.
_OPEN: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Signer(Protocol):
    """`transport.identity.HostIdentity`, as far as a manifest needs it."""

    @property
    def certificate_der(self) -> bytes: ...

    def sign(self, data: bytes) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Signed:
    """A manifest whose signature is right; `signer` is whose certificate says so."""

    manifest: Manifest
    signer: str


def manifest_of(binding: Binding, carried: Carried, now_s: float) -> Manifest:
    """The manifest of what a source's streams have carried."""
    return Manifest(
        migration_id=binding.migration_id,
        container=binding.container,
        epoch=binding.epoch,
        source=binding.source,
        target=binding.target,
        created_s=int(now_s),
        expires_s=int(now_s) + manifests.LIFE_S,
        versions=binding.versions,
        protocol=binding.protocol,
        files=tuple(_entries_of(carried).values()),
        memory=StreamedMemory(_streams_of(carried)),
    )


def sealed(manifest: Manifest, signer: Signer) -> SignedManifest:
    """Signed by this host. Raises CheckpointRefused for one that is too large to travel."""
    data = manifests.encode(manifest)
    return SignedManifest(data, signer.sign(data), signer.certificate_der)


def opened(
    signed: SignedManifest, trust: IdentityPaths, at: datetime.datetime | None = None
) -> Signed:
    """What a signed manifest says. The certificate has to be good at `at` (when the manifest says
    that it was made, unless given), a host's, of the source that the manifest names, and not
    revoked. Raises CheckpointRefused.
    """
    try:
        manifest = manifests.decode(signed.manifest)
        when = at or datetime.datetime.fromtimestamp(manifest.created_s, datetime.UTC)
        signer, key = verify_certificate(signed.certificate, trust, when)
        verify_signature(key, signed.signature, signed.manifest)
    except (TlsError, SignatureWrongError) as error:
        raise CheckpointRefused(
            f"the manifest's signature is not to be believed: {error}"
        ) from error
    if signer.role is not Role.HOST or signer.name != manifest.source:
        raise CheckpointRefused(f"the manifest of {manifest.source} was signed by {signer}")
    return Signed(manifest, signer.name)


def check_arrived(
    signed: SignedManifest,
    binding: Binding,
    carried: Carried,
    directory: Path,
    *,
    beside: Collection[str],
    trust: IdentityPaths,
    now_s: float,
) -> None:
    """That what lies in `directory`, and came over the streams, is what the source has signed for
    this session. `beside`: files there that are this host's own. Raises CheckpointRefused.

    Blocking; reads every file but the bulk.
    """
    now = datetime.datetime.fromtimestamp(now_s, datetime.UTC)
    manifest = opened(signed, trust, now).manifest
    manifests.check_binding(manifest, binding, now_s)
    manifests.check_streams(manifest, _streams_of(carried))
    known = {name: entry for name, entry in _entries_of(carried).items() if _BULK.fullmatch(name)}
    manifests.check_files(manifest, hashed_images(directory, beside=beside, known=known))


def hashed_images(
    directory: Path, *, beside: Collection[str] = (), known: dict[str, FileEntry] | None = None
) -> list[FileEntry]:
    """The files of an image directory, hashed; those in `known` by their size alone.

    Anything there that is no plain file, and more files than a manifest may name, are refused.
    Raises CheckpointRefused.
    """
    known = known or {}
    found = []
    # One for all files: the kernel has to clear a new one.
    buffer = memoryview(bytearray(PIECE_BYTES))
    try:
        for name in _names(directory, beside):
            descriptor = os.open(directory / name, _OPEN)
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise CheckpointRefused(f"{name} among the images is no file")
                if name in known and known[name].size_bytes == status.st_size:
                    found.append(known[name])
                else:
                    found.append(FileEntry(name, *_hashed(descriptor, buffer)))
            finally:
                os.close(descriptor)
    except OSError as error:
        raise CheckpointRefused(f"the images in {directory} cannot be read: {error}") from error
    return found


def _names(directory: Path, beside: Collection[str]) -> list[str]:
    names = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name not in beside:
                names.append(entry.name)
            if len(names) > MAX_FILES:
                raise CheckpointRefused(f"{directory} has more files than a checkpoint may have")
    return sorted(names)


def _hashed(descriptor: int, buffer: memoryview) -> tuple[int, bytes]:
    """Size and hash of a file, read through `buffer`, which holds a piece."""
    size_bytes = 0
    digests = []
    for count in _pieces(descriptor, buffer):
        size_bytes += count
        digests.append(piece_digest(buffer[:count]))
    return size_bytes, file_digest(digests or [piece_digest(b"")])


def _pieces(descriptor: int, buffer: memoryview) -> Iterator[int]:
    """Fill `buffer` with one piece after the other; yields how many bytes it has."""
    while True:
        filled = 0
        while filled < len(buffer) and (count := os.readv(descriptor, [buffer[filled:]])):
            filled += count
        if filled:
            yield filled
        if filled < len(buffer):
            return


def _entries_of(carried: Carried) -> dict[str, FileEntry]:
    return {one.name: FileEntry(one.name, one.size_bytes, one.digest) for one in carried.files}


def _streams_of(carried: Carried) -> tuple[StreamEntry, ...]:
    return tuple(StreamEntry(one.index, one.frames, one.digest) for one in carried.streams)


def read_stored(path: Path) -> SignedManifest:
    """A signed manifest from a file. Raises CheckpointRefused."""
    try:
        with path.open("rb") as file:
            data = file.read(manifests.MAX_ENVELOPE_BYTES + 1)
    except OSError as error:
        raise CheckpointRefused(f"{path} cannot be read: {error}") from error
    return manifests.decode_signed(data)


def store(path: Path, signed: SignedManifest) -> None:
    """Keep a signed manifest, whole or not at all. Raises OSError."""
    partial = path.with_name(f".{path.name}.new")
    partial.write_bytes(manifests.encode(signed))
    partial.chmod(0o600)
    partial.replace(path)
