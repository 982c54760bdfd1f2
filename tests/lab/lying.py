"""`migrate`, by a source that signs something else than it sends, or says COMMIT when it may not.

    python3 -m tests.lab.lying LIE ARGUMENTS    as `migrate ARGUMENTS`, inside a lab host

It has the host's identity and its session, as a host has that was taken over; what it sends is well
formed, and right in every checksum. Runs with the host's own Python and must not import anything
that only tests have.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from migrate import signing
from migrate.cli import main
from migrate.coordinator import Coordinator
from migrate.core import manifest as manifests
from migrate.core import messages
from migrate.target_link import TargetLink
from transport import worker
from transport.core import transcript
from transport.core.frames import FrameType
from transport.core.transcript import Carried

KEPT = Path("/root/kept-manifest")

_manifest_of = signing.manifest_of
_sealed = signing.sealed
_send = worker.Worker._send
_digest = transcript.piece_digest
_send_commit = Coordinator._send_commit
_prepare = Coordinator._prepare_target
_tell = TargetLink.tell


def flip_a_page() -> None:
    """A bit of one page, between the account of it and the wire."""
    done: list[bool] = []

    def send(self: worker.Worker, kind: FrameType, *arguments: Any, **options: Any) -> None:
        transmit = self.stream.send

        def flipped(frame: Any) -> float:
            if kind is FrameType.PAGES and frame.body and not done:
                done.append(True)
                body = bytearray(frame.body)
                body[-1] ^= 1
                frame = replace(frame, body=body)
            return transmit(frame)

        self.stream.send = flipped  # type: ignore[method-assign]
        try:
            _send(self, kind, *arguments, **options)
        finally:
            self.stream.send = transmit  # type: ignore[method-assign]

    worker.Worker._send = send  # type: ignore[method-assign]


def flip_an_image() -> None:
    """A bit of an image file."""
    flipped: list[bytes] = []

    def digest(data: Any) -> bytes:
        if not flipped:
            data = bytearray(data)
            data[-1] ^= 1
            flipped.append(b"")
        return _digest(data)

    worker.piece_digest = digest  # type: ignore[attr-defined]  # imported there


def lie(change: Any) -> None:
    """Sign something else than what was carried."""

    def manifest_of(binding: Any, carried: Carried, now_s: float) -> manifests.Manifest:
        return change(_manifest_of(binding, carried, now_s))

    signing.manifest_of = manifest_of


def keep_or_replay() -> None:
    """The first time the signed manifest is kept, the second time the kept one is sent."""

    def sealed(manifest: manifests.Manifest, signer: Any) -> manifests.SignedManifest:
        if KEPT.exists():
            return manifests.decode_signed(KEPT.read_bytes())
        signed = _sealed(manifest, signer)
        KEPT.write_bytes(manifests.encode(signed))
        # This one does not go through: its images are to come again.
        return msgspec.structs.replace(signed, signature=bytes(64))

    signing.sealed = sealed


def commit_twice() -> None:
    """At once, and without an answer in between."""

    async def send(self: Coordinator) -> None:
        await _send_commit(self)
        await _send_commit(self)

    Coordinator._send_commit = send  # type: ignore[method-assign]


def commit_never() -> None:
    """The source has recorded it, and does not say so."""

    async def send(self: Coordinator) -> None:
        del self
        await asyncio.Event().wait()

    Coordinator._send_commit = send  # type: ignore[method-assign]


def commit_early() -> None:
    """Before anything was restored."""

    async def prepare(self: Coordinator) -> None:
        await _send_commit(self)
        await _prepare(self)

    Coordinator._prepare_target = prepare  # type: ignore[method-assign]


def restore_twice() -> None:
    """The second time with other words of what holds the tasks back than those that are judged."""

    async def tell(self: TargetLink, message: messages.SourceMessage) -> None:
        await _tell(self, message)
        if isinstance(message, messages.Restore):
            sheets = tuple(
                msgspec.structs.replace(sheet, bounding=0) for sheet in message.confinement.sheets
            )
            other = msgspec.structs.replace(message.confinement, sheets=sheets)
            await _tell(self, msgspec.structs.replace(message, confinement=other))

    TargetLink.tell = tell  # type: ignore[method-assign]


def fields(**changed: Any) -> Any:
    return lambda: lie(lambda said: msgspec.structs.replace(said, **changed))


LIES = {
    "page": flip_a_page,
    "image": flip_an_image,
    "file-too-many": lambda: lie(lambda said: msgspec.structs.replace(said, files=said.files[1:])),
    "stream-too-many": fields(memory=manifests.StreamedMemory(())),
    "another-target": fields(target="C"),
    "another-session": fields(migration_id="0123456789ab"),
    "an-old-epoch": fields(epoch=1),
    "expired": fields(created_s=1, expires_s=2),
    "replay": keep_or_replay,
    "restore-twice": restore_twice,
    "commit-twice": commit_twice,
    "commit-never": commit_never,
    "commit-early": commit_early,
}

if __name__ == "__main__":
    LIES[sys.argv.pop(1)]()
    main()
