"""Podman's checkpoint, export and restore, with what Podman offers to make it shorter.

The archive is copied by scp, as its documentation shows it. Both hosts have the image and the
network namespace before. `--ignore-static-ip` and the like are not needed: the namespace is given.
Source: podman-container-checkpoint(1), podman-container-restore(1) of Podman 5.4.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Final

from bench import containers
from bench.compare.systems import (
    ANNOUNCE,
    NAME,
    PLUG,
    SSH,
    UNPLUG,
    WORK,
    ImpossibleError,
    Moved,
    move_by_script,
    remove_container,
    rootfs,
    wait_listening,
)

if TYPE_CHECKING:
    from bench.compare.systems import Scene

IMAGE: Final = f"localhost/{NAME}:1"
_ARCHIVE: Final = f"{WORK}/image.tar"
_COPY: Final = SSH.replace("ssh", "scp -q", 1)


class Podman:
    """One checkpoint, exported uncompressed: the link is faster than its compression."""

    name = "podman checkpoint --export"
    needs_podman = True

    def start(self, scene: Scene) -> None:
        """The same root file system as an image, which both hosts know by the same id."""
        for host in (scene.source, scene.target):
            containers.create(host, scene.spec)
            host.run(["mkdir", "-p", WORK])
        scene.target.run(["sh", "-c", UNPLUG])
        source = scene.source
        source.run(["sh", "-c", f"tar -C {rootfs(NAME)} -c . | podman import -q - {IMAGE}"])
        source.run(["podman", "save", "-q", "-o", _ARCHIVE, IMAGE])
        shutil.copyfile(source.path(_ARCHIVE), scene.target.path(_ARCHIVE))
        scene.target.run(["podman", "load", "-q", "-i", _ARCHIVE])
        network = f"ns:/run/netns/{NAME}"
        command = ["podman", "run", "-d", "--name", NAME, "--network", network, IMAGE]
        source.run([*command, *scene.spec.command])
        wait_listening(source, scene.spec)

    def move(self, scene: Scene) -> Moved:
        """Stop, export, copy, import."""
        return move_by_script(
            scene,
            f"""
            mark begin
            podman container checkpoint --tcp-established -c none -e {WORK}/c.tar {NAME} >/dev/null
            {UNPLUG}
            mark checkpoint
            {_COPY} {WORK}/c.tar B:{WORK}/
            mark copy
            {SSH} B '{self._restore(scene, "")}'
            mark restore
            """,
        )

    def remove(self, scene: Scene) -> None:
        """On both hosts; the image too."""
        for host in (scene.source, scene.target):
            for command in (["rm", "-f", "-t", "0", NAME], ["rmi", "-f", IMAGE]):
                host.run(["podman", *command], check=False)
            remove_container(host, NAME)
            host.run(["rm", "-rf", WORK])

    def _restore(self, scene: Scene, options: str) -> str:
        announce = ANNOUNCE.format(name=NAME, ip=scene.spec.ip)
        restore = f"podman container restore --tcp-established -i {WORK}/c.tar {options}"
        return f"{PLUG} && {restore} >/dev/null && {announce}"


class PodmanPreCheckpoint(Podman):
    """One round before: what Podman has of pre-copy. Needs soft-dirty tracking in the kernel."""

    name = "podman, one pre-checkpoint"

    def move(self, scene: Scene) -> Moved:
        """The first archive travels while the container runs."""
        tracks = ["criu", "check", "--feature", "mem_dirty_track"]
        if scene.source.run(tracks, check=False).returncode != 0:
            raise ImpossibleError("this kernel has no soft-dirty bits, which CRIU's pre-dump needs")
        restore = self._restore(scene, f"--import-previous {WORK}/p.tar")
        return move_by_script(
            scene,
            f"""
            mark begin
            podman container checkpoint -P -c none -e {WORK}/p.tar {NAME} >/dev/null
            {_COPY} {WORK}/p.tar B:{WORK}/
            mark pre-checkpoint
            podman container checkpoint --with-previous --tcp-established -c none \\
                -e {WORK}/c.tar {NAME} >/dev/null
            {UNPLUG}
            mark checkpoint
            {_COPY} {WORK}/c.tar B:{WORK}/
            mark copy
            {SSH} B '{restore}'
            mark restore
            """,
        )
