"""Signed checkpoints: the manifest, and the envelope that it travels and is kept in.

first byte  0 a manifest | 1 an envelope; then JSON
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from migrate.core import manifest as m
from migrate.core.messages import Versions
from migrate.errors import MigrateError

MAX_BYTES = 8 << 10
IS_JSON = True

_VERSIONS = Versions("6.12.0", "4.2.1", "runc 1.1.15", "x86_64")
_STREAMS = (m.StreamEntry(0, 5, bytes(32)), m.StreamEntry(3, 1, bytes(32)))
_MANIFEST = m.Manifest(
    migration_id="m1",
    container="sheep",
    epoch=7,
    source="a.test",
    target="b.test",
    created_s=1_800_000_000,
    expires_s=1_800_000_060,
    versions=_VERSIONS,
    protocol=1,
    files=(
        m.FileEntry("core-1.img", 900, bytes(range(32))),
        m.FileEntry("inventory.img", 40, bytes(32)),
    ),
    memory=m.StreamedMemory(_STREAMS),
)
_BINDING = m.Binding("m1", "sheep", 7, "a.test", "b.test", _VERSIONS, 1)
_SIGNED = m.SignedManifest(m.encode(_MANIFEST), bytes(64), bytes(range(200)))


def one_input(data: bytes) -> None:
    """Nothing but MigrateError may come of it. What is accepted has one form, so that a signature
    is over one thing; it names files of its own directory alone, each once."""
    if not data:
        return
    with suppress(MigrateError):
        if data[0] % 2:
            signed = m.decode_signed(data[1:])
            assert m.encode(signed) == data[1:]
            _manifest(signed.manifest)
        else:
            _manifest(data[1:])


def _manifest(data: bytes) -> None:
    manifest = m.decode(data)
    assert m.encode(manifest) == data
    names = [entry.name for entry in manifest.files]
    assert len(set(names)) == len(names)
    assert all(Path("/x", name).parent == Path("/x") for name in names)
    with suppress(MigrateError):
        m.check_binding(manifest, _BINDING, _MANIFEST.created_s + 1)
        said = (manifest.migration_id, manifest.container, manifest.epoch)
        assert said == (_BINDING.migration_id, _BINDING.container, _BINDING.epoch)
        assert (manifest.source, manifest.target) == (_BINDING.source, _BINDING.target)
    with suppress(MigrateError):
        m.check_streams(manifest, _STREAMS)
        assert manifest.memory == _MANIFEST.memory
    with suppress(MigrateError):
        m.check_files(manifest, _MANIFEST.files)
        assert manifest.files == _MANIFEST.files


def seeds() -> Iterator[bytes]:
    yield b"\0" + m.encode(_MANIFEST)
    yield b"\1" + m.encode(_SIGNED)
    replaced = {"epoch": 6, "target": "c.test", "expires_s": _MANIFEST.created_s}
    for name, value in replaced.items():
        yield b"\0" + m.encode(msgspec.structs.replace(_MANIFEST, **{name: value}))


DICTIONARY = (b'"kind":"streams"', b'"version":1', b'"epoch":', b"AAAA", b"\\u0000", b" ")
