"""`migrate verify`: whether a manifest, and the images beside it, are what a host has signed."""

from __future__ import annotations

import datetime
from pathlib import Path

import click

from migrate import checkpoint, config, signing
from migrate.core import manifest as manifests
from migrate.core.manifest import Manifest, StoredMemory, StreamedMemory
from migrate.progress import mib
from migrate.signing import Signed
from transport.identity import IdentityPaths

IMAGE_DIR = "img"


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE|DIR")
@click.option(
    "--images",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help=f"Where the image files are; by default {IMAGE_DIR}/ beside FILE, if there is one.",
)
@click.option(
    "--trust",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A directory with ca.pem and crl.pem; by default this host's identity.",
)
def verify(file: Path, images: Path | None, trust: Path | None) -> None:
    """Verify a signed manifest, and the image files that it names.

    A container that came from another host has the manifest that it came with in its directory,
    below /var/lib/migrate/containers. DIR is a checkpoint that was kept (migrate clone --save), all
    of which is compared. The certificate is judged by the time that the manifest says it was made
    at, and by the revocations that are known here now.
    """
    paths = IdentityPaths(trust) if trust else config.HostPaths().tls
    if file.is_dir():
        kept = checkpoint.opened(file, paths)
        _tell(kept.signed, f"verified in {kept.place.images}")
        return
    found = signing.opened(signing.read_stored(file), paths)
    directory = images or file.parent / IMAGE_DIR
    has_images = directory.is_dir()
    if has_images:
        manifests.check_files(found.manifest, signing.hashed_images(directory))
    where = f"verified in {directory}" if has_images else "not here"
    _tell(found, where)


def _tell(found: Signed, where: str) -> None:
    signed_by = f"signed by {found.signer}: verified"
    click.echo("\n".join((*said_lines(found.manifest, where), signed_by)))


def said_lines(manifest: Manifest, where: str) -> list[str]:
    """What a manifest says; `where` is what is known of its image files."""
    versions = manifest.versions
    size = mib(sum(file.size_bytes for file in manifest.files))
    for_whom = f"{manifest.target} alone"
    match manifest.memory:
        case StreamedMemory(streams=streams):
            frames = sum(stream.frames for stream in streams)
            memory = f"memory: {frames} frames on {len(streams)} streams"
        case StoredMemory(files=files, is_for_fleet=is_for_fleet):
            for_whom = "any host of the fleet" if is_for_fleet else for_whom
            memory = f"memory: {len(files)} files, {mib(sum(file.size_bytes for file in files))}"
    return [
        f"container {manifest.container}, migration {manifest.migration_id},"
        f" attempt {manifest.epoch}",
        f"from {manifest.source} for {for_whom}, made {_time(manifest.created_s)},"
        f" to be restored before {_time(manifest.expires_s)}",
        f"kernel {versions.kernel}, criu {versions.criu}, runtime {versions.runtime},"
        f" {versions.architecture}, protocol {manifest.protocol}",
        memory,
        f"images: {len(manifest.files)} files, {size}: {where}",
    ]


def _time(wall_s: int) -> str:
    moment = datetime.datetime.fromtimestamp(wall_s, datetime.UTC)
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"
