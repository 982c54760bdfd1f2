"""The manifest of a checkpoint: what a source says, signed, that a target may restore.

Pure: bytes in, values out, and comparisons. Signatures and certificates are the matter of
`migrate/signing.py`.

A manifest is JSON, and there is one way to write each: `decode` takes nothing that `encode` would
not have written, so that what is signed is all there is. It names the migration, both hosts, the
epoch (the source's attempt, which only grows) and an expiry; every image file with its hash; and
the memory, as what its streams have carried (both kinds of hash: `transport/core/transcript.py`)::

    {"version":1, "migration_id":…, "container":…, "epoch":…, "source":…, "target":…,
     "created_s":…, "expires_s":…, "versions":{…}, "protocol":1,
     "files":[["core-1.img",908,"<SHA-256>"],…],
     "memory":{"kind":"streams","streams":[[0,512,"<SHA-256>"],…]}}

That of a checkpoint which is kept (`migrate/checkpoint.py`) has its memory in files, and holds for
longer; nobody restores from it directly::

     "memory":{"kind":"files","files":[["1.pages",4096,"<SHA-256>"],…],"is_for_fleet":false}

Signed, it is an envelope, which is the same in a message and in a file::

    {"type":"signed_manifest", "manifest":"<base64>", "signature":"<base64>", "certificate":"<DER>"}

What a peer or a file says is hostile until decoded here: every field has a bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from migrate.core.messages import (
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    Attempt,
    Bytes,
    Certificate,
    ContainerName,
    FileName,
    HostName,
    ManifestBytes,
    MigrationId,
    Signature,
    Versions,
)
from migrate.errors import CheckpointRefused

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

MAX_ENVELOPE_BYTES: Final = 2 << 20
STREAMS_MAX: Final = 16
LIFE_S: Final = 3600
"""From its making to its expiry; a target restores within seconds."""
DAY_S: Final = 86400
KEPT_DAYS_MAX: Final = 90
"""The same of a checkpoint that is kept: certificates and lists of revocations last for longer."""
SKEW_S: Final = 3600
"""By which the clock of the source may be ahead: as much as certificates allow for."""
TIME_MAX_S: Final = 1 << 40

Digest: TypeAlias = Annotated[bytes, Meta(min_length=32, max_length=32)]
Seconds: TypeAlias = Annotated[int, Meta(ge=0, le=TIME_MAX_S)]
"""Of Unix time."""


class _Row(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A part of a manifest of which there may be thousands: its fields without their names."""


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Any other part."""


class FileEntry(_Row, frozen=True):
    """An image file, and the hash of its pieces."""

    name: FileName
    size_bytes: Bytes
    digest: Digest


class StreamEntry(_Row, frozen=True):
    """A data stream: how many frames it carried, and the digest of all of them."""

    index: Annotated[int, Meta(ge=0, lt=STREAMS_MAX)]
    frames: Annotated[int, Meta(ge=1, le=1 << 50)]
    digest: Digest


class StreamedMemory(_Part, frozen=True, tag_field="kind", tag="streams"):
    """Memory as it was transferred."""

    streams: Annotated[tuple[StreamEntry, ...], Meta(max_length=STREAMS_MAX)]


class StoredMemory(_Part, frozen=True, tag_field="kind", tag="files"):
    """Memory that lies in files, and what else a checkpoint has besides CRIU's images.
    is_for_fleet: any host may have it, not the manifest's target alone."""

    files: Annotated[tuple[FileEntry, ...], Meta(max_length=MAX_FILES)]
    is_for_fleet: bool


class Manifest(_Part, frozen=True):
    """See the module. `epoch` is the source's attempt; `target` the only host that may restore."""

    @property
    def stored(self) -> tuple[FileEntry, ...]:
        """Files besides the images."""
        return self.memory.files if isinstance(self.memory, StoredMemory) else ()

    migration_id: MigrationId
    container: ContainerName
    epoch: Attempt
    source: HostName
    target: HostName
    created_s: Seconds
    expires_s: Seconds
    versions: Versions
    protocol: Annotated[int, Meta(ge=1, le=1 << 16)]
    files: Annotated[tuple[FileEntry, ...], Meta(min_length=1, max_length=MAX_FILES)]
    memory: StreamedMemory | StoredMemory
    version: Literal[1] = 1


class SignedManifest(_Part, frozen=True, tag_field="type", tag="signed_manifest"):
    """A manifest's bytes, the source's signature over them, and its identity certificate (DER)."""

    manifest: ManifestBytes
    signature: Signature
    certificate: Certificate


@dataclass(frozen=True, slots=True)
class Binding:
    """What a manifest is bound to: what a target knows of the session by other means than it."""

    migration_id: str
    container: str
    epoch: int
    source: str
    target: str
    versions: Versions
    protocol: int


_ENCODER: Final = msgspec.json.Encoder()
_MANIFEST: Final = msgspec.json.Decoder(Manifest)
_SIGNED: Final = msgspec.json.Decoder(SignedManifest)
_T = TypeVar("_T", Manifest, SignedManifest)


def encode(value: Manifest | SignedManifest) -> bytes:
    """The one way to write it. Raises CheckpointRefused for a manifest that nobody would take."""
    data = _ENCODER.encode(value)
    if len(data) > (MAX_MANIFEST_BYTES if isinstance(value, Manifest) else MAX_ENVELOPE_BYTES):
        raise CheckpointRefused(f"a manifest of {len(data)} bytes is too large")
    return data


def decode(data: bytes) -> Manifest:
    """What `encode` has written. Raises CheckpointRefused."""
    manifest = _decoded(_MANIFEST, data, MAX_MANIFEST_BYTES)
    names = [entry.name for entry in manifest.files]
    match manifest.memory:
        case StreamedMemory(streams=streams):
            others: list[int] | list[str] = [entry.index for entry in streams]
            life_s = LIFE_S
        case StoredMemory(files=files):
            others = [entry.name for entry in files]
            life_s = KEPT_DAYS_MAX * DAY_S
    if names != sorted(set(names)) or others != sorted(set(others)):  # type: ignore[type-var]
        raise CheckpointRefused("the manifest names a file or a stream twice, or out of order")
    if not manifest.created_s <= manifest.expires_s <= manifest.created_s + life_s:
        raise CheckpointRefused(f"the manifest is to hold for more than {life_s} s, or less than 0")
    return manifest


def decode_signed(data: bytes) -> SignedManifest:
    """An envelope that `encode` has written. Raises CheckpointRefused."""
    return _decoded(_SIGNED, data, MAX_ENVELOPE_BYTES)


def _decoded(decoder: msgspec.json.Decoder[_T], data: bytes, bytes_max: int) -> _T:
    if len(data) > bytes_max:
        raise CheckpointRefused(f"a manifest of {len(data)} bytes is larger than {bytes_max}")
    try:
        value = decoder.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise CheckpointRefused(f"the manifest cannot be read: {error}") from error
    if _ENCODER.encode(value) != data:
        raise CheckpointRefused("the manifest is written in another form than its own")
    return value


def check_binding(manifest: Manifest, binding: Binding, now_s: float) -> None:
    """That the manifest is of this very session, and holds now. Raises CheckpointRefused."""
    for name in Binding.__slots__:
        said, known = getattr(manifest, name), getattr(binding, name)
        if said != known:
            raise CheckpointRefused(f"the manifest is of {name} {said}, this session of {known}")
    check_time(manifest, now_s)


def check_time(manifest: Manifest, now_s: float) -> None:
    """That the manifest holds now. Raises CheckpointRefused."""
    is_stored = isinstance(manifest.memory, StoredMemory)
    if now_s >= manifest.expires_s:
        raise CheckpointRefused(
            f"the manifest expired {now_s - manifest.expires_s:.0f} s ago",
            remedy="save it anew" if is_stored else "compare the clocks of the two hosts",
        )
    if now_s + SKEW_S < manifest.created_s:
        raise CheckpointRefused(
            f"the manifest is of a time {manifest.created_s - now_s:.0f} s ahead",
            remedy="compare the clocks of the two hosts",
        )


def check_streams(manifest: Manifest, carried: Collection[StreamEntry]) -> None:
    """That the streams carried what the source says, no more and no less. CheckpointRefused."""
    if isinstance(manifest.memory, StoredMemory):
        raise CheckpointRefused("the manifest is of a checkpoint that was kept, not of a transfer")
    said = {f"stream {entry.index}": entry for entry in manifest.memory.streams}
    _check_same(said, {f"stream {entry.index}": entry for entry in carried})


def check_files(manifest: Manifest, found: Collection[FileEntry]) -> None:
    """That exactly these files are there, and as they were. Raises CheckpointRefused."""
    said = {f"image file {entry.name}": entry for entry in manifest.files}
    _check_same(said, {f"image file {entry.name}": entry for entry in found})


def check_stored(manifest: Manifest, found: Collection[FileEntry]) -> None:
    """The same of the files besides the images. Raises CheckpointRefused."""
    said = {f"file {entry.name}": entry for entry in manifest.stored}
    _check_same(said, {f"file {entry.name}": entry for entry in found})


def _check_same(said: Mapping[str, _Row], found: Mapping[str, _Row]) -> None:
    for what in sorted(said.keys() | found.keys()):
        if what not in found:
            raise CheckpointRefused(f"{what} of the manifest did not arrive")
        if what not in said:
            raise CheckpointRefused(f"{what} is not in the manifest")
        if said[what] != found[what]:
            raise CheckpointRefused(f"{what} is another one than the manifest's")
