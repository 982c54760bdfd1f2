"""Manifests: one way to write each, and whatever differs is refused by name."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.core import manifest as manifests
from migrate.core import messages
from migrate.core.confinement import Confinements
from migrate.core.manifest import (
    LIFE_S,
    SKEW_S,
    Binding,
    FileEntry,
    Manifest,
    SignedManifest,
    StreamedMemory,
    StreamEntry,
)
from migrate.errors import CheckpointRefused

VERSIONS = messages.Versions("6.12.0", "4.2.1", "runc 1.1.15", "x86_64")
BINDING = Binding("m1", "sheep", 7, "alpha", "beta", VERSIONS, 1)
FILES = (FileEntry("core-1.img", 908, b"a" * 32), FileEntry("pages-1.img", 4096, b"b" * 32))
STREAMS = (StreamEntry(0, 512, b"c" * 32), StreamEntry(3, 1, b"d" * 32))
MANIFEST = Manifest(
    migration_id="m1",
    container="sheep",
    epoch=7,
    source="alpha",
    target="beta",
    created_s=1000,
    expires_s=1000 + LIFE_S,
    versions=VERSIONS,
    protocol=1,
    files=FILES,
    memory=StreamedMemory(STREAMS),
)
GOLDEN = (
    b'{"migration_id":"m1","container":"sheep","epoch":7,"source":"alpha","target":"beta",'
    b'"created_s":1000,"expires_s":4600,'
    b'"versions":{"kernel":"6.12.0","criu":"4.2.1","runtime":"runc 1.1.15",'
    b'"architecture":"x86_64"},"protocol":1,'
    b'"files":[["core-1.img",908,"YWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWE="],'
    b'["pages-1.img",4096,"YmJiYmJiYmJiYmJiYmJiYmJiYmJiYmJiYmJiYmJiYmI="]],'
    b'"memory":{"kind":"streams","streams":'
    b'[[0,512,"Y2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2M="],'
    b'[3,1,"ZGRkZGRkZGRkZGRkZGRkZGRkZGRkZGRkZGRkZGRkZGQ="]]},"version":1}'
)


def changed(**fields: Any) -> Manifest:
    return msgspec.structs.replace(MANIFEST, **fields)


def rewritten(path: str, value: Any) -> bytes:
    """GOLDEN with something else at a place like "files.0.1"; None takes it out."""
    tree = json.loads(GOLDEN)
    *way, last = (int(key) if key.isdigit() else key for key in path.split("."))
    part = tree
    for key in way:
        part = part[key]
    if value is None:
        del part[last]
    else:
        part[last] = value
    return json.dumps(tree, separators=(",", ":")).encode()


def test_golden() -> None:
    assert manifests.encode(MANIFEST) == GOLDEN
    assert manifests.decode(GOLDEN) == MANIFEST


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("version", 2),
        ("version", None),
        ("migration_id", "../m1"),
        ("container", "she/ep"),
        ("container", "s" * 65),
        ("epoch", 0),
        ("epoch", 1 << 63),
        ("source", "al\u0000pha"),
        ("source", ""),
        ("created_s", -1),
        ("created_s", 1 << 63),
        ("created_s", 999),
        ("expires_s", 999),
        ("expires_s", 1001 + LIFE_S),
        ("protocol", 0),
        ("files", []),
        ("files.0.0", "../core-1.img"),
        ("files.0.0", "/etc/passwd"),
        ("files.0.0", ".hidden"),
        ("files.0.0", "core-1.img\u0000"),
        ("files.0.0", "c" * 129),
        ("files.0.0", "pages-1.img"),
        ("files.0.0", "z.img"),
        ("files.0.1", -1),
        ("files.0.1", 1 << 63),
        ("files.0.2", "YWE="),
        ("files.0.2", None),
        ("files.0", ["core-1.img", 908, "YWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWE=", 1]),
        ("memory", {}),
        ("memory.kind", "files"),
        ("memory.kind", None),
        ("memory.streams.0.0", 16),
        ("memory.streams.0.0", 3),
        ("memory.streams.0.0", 4),
        ("memory.streams.0.1", 0),
        ("memory.streams", [[0, 1, "Y2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2M="]] * 17),
        ("more", 1),
    ],
)
def test_what_cannot_be_is_refused(path: str, value: Any) -> None:
    with pytest.raises(CheckpointRefused, match="manifest"):
        manifests.decode(rewritten(path, value))


@pytest.mark.parametrize(
    "data",
    [
        GOLDEN + b" ",
        GOLDEN.replace(b":", b": ", 1),
        GOLDEN.replace(b'"epoch":7', b'"epoch":6,"epoch":7'),
        GOLDEN.replace(b"sheep", b"\\u0073heep"),
        b'{"version":1,' + GOLDEN[1:].replace(b',"version":1}', b"}"),
    ],
    ids=["behind", "between", "twice", "escaped", "order"],
)
def test_there_is_one_way_to_write_it(data: bytes) -> None:
    with pytest.raises(CheckpointRefused, match="another form"):
        manifests.decode(data)


@given(st.integers(0, len(GOLDEN)), st.binary(max_size=3), st.integers(0, 3))
def test_noise_is_refused_or_means_what_it_says(at: int, noise: bytes, gone: int) -> None:
    data = GOLDEN[:at] + noise + GOLDEN[at + gone :]
    try:
        manifest = manifests.decode(data)
    except CheckpointRefused:
        return
    assert manifests.encode(manifest) == data


def test_nothing_is_read_that_is_too_large() -> None:
    with pytest.raises(CheckpointRefused, match="larger than"):
        manifests.decode(bytes(messages.MAX_MANIFEST_BYTES + 1))
    with pytest.raises(CheckpointRefused, match="larger than"):
        manifests.decode_signed(bytes(manifests.MAX_ENVELOPE_BYTES + 1))


def test_the_largest_checkpoint_fits_a_message() -> None:
    """As many tasks as a container may have, with the longest names that CRIU gives files."""
    files = tuple(
        FileEntry(f"pagemap-shmem-{number:07}.img", 1 << 30, b"\xff" * 32)
        for number in range(messages.MAX_FILES)
    )
    data = manifests.encode(changed(files=files))
    assert manifests.decode(data).files == files
    confinement = Confinements((), {})
    messages.encode(messages.Restore(data, bytes(64), bytes(2000), 5, confinement))


def test_the_envelope() -> None:
    signed = SignedManifest(b"manifest", bytes(64), b"certificate")
    data = manifests.encode(signed)
    assert data.startswith(b'{"type":"signed_manifest","manifest":"bWFuaWZlc3Q="')
    assert manifests.decode_signed(data) == signed
    for wrong in (data[:-1], data + b"\n", data.replace(b"AAAA", b"", 1), GOLDEN, b""):
        with pytest.raises(CheckpointRefused):
            manifests.decode_signed(wrong)


def test_the_session_that_it_was_made_for() -> None:
    manifests.check_binding(MANIFEST, BINDING, 1000.0)
    manifests.check_binding(MANIFEST, BINDING, 999.9 + LIFE_S)
    manifests.check_binding(MANIFEST, BINDING, 1000.0 - SKEW_S)


@pytest.mark.parametrize(
    "fields",
    [
        {"migration_id": "m2"},
        {"container": "goat"},
        {"epoch": 6},
        {"epoch": 8},
        {"source": "gamma"},
        {"target": "gamma"},
        {"versions": msgspec.structs.replace(VERSIONS, criu="4.2.0")},
        {"protocol": 2},
    ],
    ids=str,
)
def test_no_other_session(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(CheckpointRefused, match=f"is of {name}"):
        manifests.check_binding(changed(**fields), BINDING, 1000.0)


@pytest.mark.parametrize("now_s", [1000.0 + LIFE_S, 1e9, 999.0 - SKEW_S, 0.0])
def test_no_other_time(now_s: float) -> None:
    later = changed(created_s=5000, expires_s=5000 + LIFE_S) if now_s < 1 else MANIFEST
    with pytest.raises(CheckpointRefused, match=r"expired|ahead"):
        manifests.check_binding(later, BINDING, now_s)


@pytest.mark.parametrize(
    ("carried", "why"),
    [
        (STREAMS[:1], "stream 3 of the manifest did not arrive"),
        ((), "stream 0 of the manifest did not arrive"),
        ((*STREAMS, StreamEntry(1, 1, b"e" * 32)), "stream 1 is not in the manifest"),
        ((STREAMS[0], StreamEntry(3, 2, b"d" * 32)), "stream 3 is another one"),
        ((STREAMS[0], StreamEntry(3, 1, b"x" * 32)), "stream 3 is another one"),
    ],
)
def test_the_streams_are_all_there_is(carried: tuple[StreamEntry, ...], why: str) -> None:
    manifests.check_streams(MANIFEST, STREAMS[::-1])
    with pytest.raises(CheckpointRefused, match=why):
        manifests.check_streams(MANIFEST, carried)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (FILES[1:], "image file core-1.img of the manifest did not arrive"),
        ((*FILES, FileEntry("mm-1.img", 1, b"e" * 32)), "image file mm-1.img is not in the"),
        ((FILES[0], FileEntry("pages-1.img", 4095, b"b" * 32)), "pages-1.img is another one"),
        ((FILES[0], FileEntry("pages-1.img", 4096, b"x" * 32)), "pages-1.img is another one"),
    ],
)
def test_the_files_are_all_there_is(found: tuple[FileEntry, ...], why: str) -> None:
    manifests.check_files(MANIFEST, FILES[::-1])
    with pytest.raises(CheckpointRefused, match=why):
        manifests.check_files(MANIFEST, found)
