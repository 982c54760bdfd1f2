"""A checkpoint is taken as it was signed, by the host that it comes from, or not at all."""

from __future__ import annotations

import datetime
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from migrate import signing
from migrate.commands.verify import verify
from migrate.core import manifest as manifests
from migrate.core.manifest import LIFE_S, Binding, SignedManifest
from migrate.core.messages import Versions
from migrate.errors import CheckpointRefused
from tests.identities import Fleet
from transport.core.transcript import (
    PIECE_BYTES,
    Carried,
    FileDigest,
    StreamDigest,
    file_digest,
    piece_digest,
)
from transport.identity import HostIdentity

if TYPE_CHECKING:
    from collections.abc import Callable

    from transport.identity import IdentityPaths

NOW_S = datetime.datetime.now(datetime.UTC).timestamp()
BINDING = Binding(
    "m1", "sheep", 7, "alpha", "beta", Versions("6.12", "4.2.1", "runc 1.1", "x86_64"), 1
)
IMAGES = {
    "core-1.img": os.urandom(900),
    "mm-1.img": b"",
    "pagemap-1.img": os.urandom(PIECE_BYTES + 17),
    "pages-1.img": os.urandom(2 * PIECE_BYTES),
}
STREAMS = (StreamDigest(0, 512, os.urandom(32)), StreamDigest(1, 9, os.urandom(32)))


def carried() -> Carried:
    files = []
    for name, content in IMAGES.items():
        pieces = [content[at : at + PIECE_BYTES] for at in range(0, len(content) or 1, PIECE_BYTES)]
        files.append(FileDigest(name, len(content), file_digest(map(piece_digest, pieces))))
    return Carried(STREAMS, tuple(files))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return Fleet(tmp_path_factory.mktemp("fleet"))


@pytest.fixture(scope="module")
def alpha(fleet: Fleet) -> IdentityPaths:
    return fleet.host("alpha")


@pytest.fixture(scope="module")
def trust(fleet: Fleet) -> IdentityPaths:
    """What the target knows of the fleet."""
    return fleet.host("beta")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    directory = tmp_path / "img"
    directory.mkdir()
    for name, content in IMAGES.items():
        (directory / name).write_bytes(content)
    (directory / "descriptors.json").write_text("[]")
    return directory


def signed_by(identity: IdentityPaths, **fields: Any) -> SignedManifest:
    """The manifest of alpha's session, but for `fields`."""
    manifest = signing.manifest_of(BINDING, carried(), NOW_S)
    return signing.sealed(msgspec.structs.replace(manifest, **fields), HostIdentity.load(identity))


@pytest.fixture
def check(images: Path, trust: IdentityPaths) -> Callable[..., None]:
    def checked(signed: SignedManifest, came: Carried | None = None, now_s: float = NOW_S) -> None:
        signing.check_arrived(
            signed,
            BINDING,
            carried() if came is None else came,
            images,
            beside=["descriptors.json"],
            trust=trust,
            now_s=now_s,
        )

    return checked


def test_what_was_signed_is_taken(check: Callable[..., None], alpha: IdentityPaths) -> None:
    check(signed_by(alpha))


@pytest.mark.parametrize("place", ["manifest", "signature", "certificate"])
@pytest.mark.parametrize("at", [0, 0.3, 0.7, -1])
def test_a_bit_flips_anywhere(
    check: Callable[..., None], alpha: IdentityPaths, place: str, at: float
) -> None:
    signed = signed_by(alpha)
    data = bytearray(getattr(signed, place))
    data[int(at * len(data)) if at >= 0 else -1] ^= 1
    with pytest.raises(CheckpointRefused):
        check(msgspec.structs.replace(signed, **{place: bytes(data)}))


@pytest.mark.parametrize("place", ["manifest", "signature", "certificate"])
def test_truncated(check: Callable[..., None], alpha: IdentityPaths, place: str) -> None:
    signed = signed_by(alpha)
    with pytest.raises(CheckpointRefused):
        check(msgspec.structs.replace(signed, **{place: getattr(signed, place)[:-1]}))


@pytest.mark.parametrize(
    "fields",
    [
        {"migration_id": "m2"},
        {"container": "goat"},
        {"epoch": 6},
        {"target": "gamma"},
        {"protocol": 2},
        {"versions": Versions("6.12", "4.2.1", "runc 1.1", "aarch64")},
        {"memory": manifests.StreamedMemory(())},
        {"expires_s": int(NOW_S) - 1, "created_s": int(NOW_S) - 10},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_signed_for_something_else(
    check: Callable[..., None], alpha: IdentityPaths, fields: dict[str, Any]
) -> None:
    """The signature is right each time: of another session, of an earlier one, for another host."""
    with pytest.raises(CheckpointRefused):
        check(signed_by(alpha, **fields))


def test_another_host_of_the_fleet(check: Callable[..., None], fleet: Fleet) -> None:
    gamma = fleet.host("gamma")
    with pytest.raises(CheckpointRefused, match="the manifest of alpha was signed by gamma"):
        check(signed_by(gamma))
    with pytest.raises(CheckpointRefused, match="source gamma, this session of alpha"):
        check(signed_by(gamma, source="gamma"))


def test_the_certificate_of_the_source_with_the_signature_of_another(
    check: Callable[..., None], fleet: Fleet, alpha: IdentityPaths
) -> None:
    forged = signed_by(fleet.host("gamma"))
    certificate = HostIdentity.load(alpha).certificate_der
    with pytest.raises(CheckpointRefused, match="signature"):
        check(msgspec.structs.replace(forged, certificate=certificate))


def test_an_operator_signs_no_checkpoint(check: Callable[..., None], fleet: Fleet) -> None:
    with pytest.raises(CheckpointRefused, match="signed by operator alpha"):
        check(signed_by(fleet.operator("alpha")))


def test_another_authority(check: Callable[..., None], tmp_path: Path) -> None:
    stranger = Fleet(tmp_path / "stranger").host("alpha")
    with pytest.raises(CheckpointRefused, match="not to be believed"):
        check(signed_by(stranger))


def test_a_leaf_signs_no_checkpoint(check: Callable[..., None], alpha: IdentityPaths) -> None:
    """The key that a host's network-facing part has in its hands is not the one that signs."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

    HostIdentity.load(alpha)
    pem = alpha.leaf.read_bytes()
    key = load_pem_private_key(pem, None)
    leaf = x509.load_pem_x509_certificates(pem)[0]
    signed = signed_by(alpha)
    signature = key.sign(b"dolly signature 1\0" + signed.manifest)  # type: ignore[call-arg,union-attr]
    forged = SignedManifest(signed.manifest, signature, leaf.public_bytes(Encoding.DER))
    with pytest.raises(CheckpointRefused, match="not to be believed"):
        check(forged)


def test_revoked(tmp_path: Path, images: Path) -> None:
    fleet = Fleet(tmp_path / "fleet")
    alpha, beta = fleet.host("alpha"), fleet.host("beta")
    signed = signed_by(alpha)
    HostIdentity.load(beta).take_revocations(fleet.revoke(alpha))
    with pytest.raises(CheckpointRefused, match="was revoked"):
        signing.opened(signed, beta)


@pytest.mark.parametrize("after_s", [LIFE_S, 400 * 86400])
def test_replayed_later(check: Callable[..., None], alpha: IdentityPaths, after_s: float) -> None:
    signed = signed_by(alpha)
    check(signed, now_s=NOW_S + LIFE_S - 2)
    with pytest.raises(CheckpointRefused, match=r"expired|not to be believed"):
        check(signed, now_s=NOW_S + after_s)


def test_streams_that_carried_something_else(
    check: Callable[..., None], alpha: IdentityPaths
) -> None:
    whole, signed = carried(), signed_by(alpha)
    first, second = STREAMS
    for streams in (
        (first,),
        (),
        (*STREAMS, StreamDigest(2, 1, bytes(32))),
        (first, replace(second, digest=bytes(32))),
        (replace(first, digest=second.digest), replace(second, digest=first.digest)),
        (first, replace(second, frames=8)),
    ):
        with pytest.raises(CheckpointRefused, match="stream"):
            check(signed, Carried(streams, whole.files))


@pytest.mark.parametrize("name", ["core-1.img", "pagemap-1.img"])
def test_what_criu_interprets_is_looked_at_where_it_lies(
    check: Callable[..., None], alpha: IdentityPaths, images: Path, name: str
) -> None:
    """Whoever received it says that it is right; on the disk it is not."""
    data = bytearray(IMAGES[name])
    data[-1] ^= 1
    (images / name).write_bytes(data)
    with pytest.raises(CheckpointRefused, match=f"{name} is another one"):
        check(signed_by(alpha))


def test_the_bulk_is_hashed_as_it_came_or_where_it_lies(
    check: Callable[..., None], alpha: IdentityPaths, images: Path
) -> None:
    signed, came = signed_by(alpha), carried()
    *others, pages = came.files
    check(signed, Carried(STREAMS, tuple(others)))
    wrong = replace(pages, digest=bytes(32))
    with pytest.raises(CheckpointRefused, match=r"pages-1.img is another one"):
        check(signed, Carried(STREAMS, (*others, wrong)))
    (images / "pages-1.img").write_bytes(bytes(2 * PIECE_BYTES))
    with pytest.raises(CheckpointRefused, match=r"pages-1.img is another one"):
        check(signed, Carried(STREAMS, tuple(others)))
    (images / "pages-1.img").write_bytes(IMAGES["pages-1.img"][:-1])
    with pytest.raises(CheckpointRefused, match=r"pages-1.img is another one"):
        check(signed, came)


@pytest.mark.parametrize("name", IMAGES)
def test_a_file_is_missing(
    check: Callable[..., None], alpha: IdentityPaths, images: Path, name: str
) -> None:
    (images / name).unlink()
    with pytest.raises(CheckpointRefused, match=f"{name} of the manifest did not arrive"):
        check(signed_by(alpha))


@pytest.mark.parametrize("name", ["fs-1.img", "parent", ".hidden", "irmap-cache"])
def test_a_file_too_many(
    check: Callable[..., None], alpha: IdentityPaths, images: Path, name: str
) -> None:
    (images / name).write_bytes(b"?")
    with pytest.raises(CheckpointRefused, match=f"{name} is not in the manifest"):
        check(signed_by(alpha))


@pytest.mark.parametrize("kind", ["symlink", "directory", "fifo"])
def test_what_is_no_file(
    check: Callable[..., None], alpha: IdentityPaths, images: Path, kind: str
) -> None:
    path = images / "core-1.img"
    path.unlink()
    if kind == "symlink":
        (images.parent / "elsewhere").write_bytes(IMAGES["core-1.img"])
        path.symlink_to(images.parent / "elsewhere")
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(CheckpointRefused):
        check(signed_by(alpha))


def test_stored_and_read_again(tmp_path: Path, alpha: IdentityPaths, trust: IdentityPaths) -> None:
    path = tmp_path / signing.MANIFEST_NAME
    signed = signed_by(alpha)
    signing.store(path, signed)
    assert path.stat().st_mode & 0o777 == 0o600
    assert signing.read_stored(path) == signed
    found = signing.opened(signing.read_stored(path), trust)
    assert (found.signer, found.manifest.container) == ("alpha", "sheep")
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


# --- migrate verify ---


@pytest.fixture
def stored(images: Path, alpha: IdentityPaths) -> Path:
    """A manifest with its images beside it."""
    (images / "descriptors.json").unlink()
    path = images.parent / signing.MANIFEST_NAME
    signing.store(path, signed_by(alpha))
    return path


def verified(path: Path, trust: IdentityPaths) -> Result:
    return CliRunner().invoke(verify, [str(path), "--trust", str(trust.directory)])


def test_verify_says_what_was_signed(stored: Path, trust: IdentityPaths) -> None:
    result = verified(stored, trust)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0] == "container sheep, migration m1, attempt 7"
    assert lines[1].startswith("from alpha for beta alone, made 20")
    assert "521 frames on 2 streams" in lines[3]
    assert f"4 files, 3.0 MiB: verified in {stored.parent / 'img'}" in lines[4]
    assert lines[-1] == "signed by alpha: verified"


def test_verify_without_images(stored: Path, trust: IdentityPaths, images: Path) -> None:
    images.rename(images.with_name("elsewhere"))
    result = verified(stored, trust)
    assert result.exit_code == 0
    assert "not here" in result.output
    assert "verified in" not in result.output


def test_verify_images_that_differ(stored: Path, trust: IdentityPaths, images: Path) -> None:
    data = bytearray(IMAGES["pages-1.img"])
    data[PIECE_BYTES] ^= 1
    (images / "pages-1.img").write_bytes(data)
    refused = verified(stored, trust).exception
    assert isinstance(refused, CheckpointRefused)
    assert refused.exit_code == 1
    assert "pages-1.img is another one" in refused.message


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\0" * 100, b"[" * 100_000, b" " * (3 << 20)], ids=len
)
def test_verify_what_is_no_manifest(tmp_path: Path, trust: IdentityPaths, content: bytes) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    assert isinstance(verified(path, trust).exception, CheckpointRefused)


def test_verify_outlives_the_certificate_but_no_revocation(tmp_path: Path) -> None:
    """The certificate is judged by when the manifest was made; a thief could date that back."""
    fleet = Fleet(tmp_path / "fleet")
    alpha, beta = fleet.host("alpha"), fleet.host("beta")
    path = tmp_path / "manifest.json"
    signing.store(path, signed_by(alpha))
    assert verified(path, beta).exit_code == 0
    HostIdentity.load(beta).take_revocations(fleet.revoke(alpha))
    assert isinstance(verified(path, beta).exception, CheckpointRefused)
    early = int(NOW_S) - 2 * 365 * 86400
    signing.store(
        path, signed_by(fleet.host("gamma"), source="gamma", created_s=early, expires_s=early)
    )
    assert isinstance(verified(path, beta).exception, CheckpointRefused)
