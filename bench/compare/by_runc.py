"""What can be done with runc, CRIU and rsync by hand: stop-and-copy, and CRIU's own post-copy.

Both as one shell script on A, so that nothing of the benchmark is between their steps, and as well
as a careful operator would write them: the files are copied before, images lie on tmpfs, the
target's network is prepared, the neighbours are told. Post-copy's pages go over a plain connection,
which is all that CRIU has; the rest over SSH.
"""

from __future__ import annotations

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
)
from bench.containers import bundle_path

if TYPE_CHECKING:
    from bench.compare.systems import Scene

PAGES_PORT: Final = 7400
PIPE_BYTES: Final = 16 << 20

_FILES: Final = f"rsync -a --delete -e '{SSH}' {rootfs(NAME)}/ B:{rootfs(NAME)}/"
_IMAGES: Final = f"rsync -a --whole-file -e '{SSH}' {WORK}/img B:{WORK}/"
_RUNC: Final = "runc --log {work}/runc.log"
_RESTORE: Final = (
    f"{_RUNC.format(work=WORK)} restore --detach --tcp-established --file-locks"
    f" --bundle {bundle_path(NAME)} --image-path {WORK}/img --work-path {WORK}/work"
)
_CHECKPOINT: Final = (
    f"{_RUNC.format(work=WORK)} checkpoint --tcp-established --file-locks"
    f" --image-path {WORK}/img --work-path {WORK}/work"
)


class _ByRunc:
    """A container of runc, and everything on B that it needs there, made before."""

    needs_podman = False

    def start(self, scene: Scene) -> None:
        """On A it runs; B has its bundle and its network, unplugged."""
        containers.create(scene.source, scene.spec)
        containers.create(scene.target, scene.spec)
        scene.target.run(["sh", "-c", UNPLUG])
        containers.start(scene.source, NAME)
        for host in (scene.source, scene.target):
            host.run(["mkdir", "-p", f"{WORK}/img", f"{WORK}/work"])

    def remove(self, scene: Scene) -> None:
        """On both hosts."""
        for host in (scene.source, scene.target):
            remove_container(host, NAME)
            host.run(["rm", "-rf", WORK])


class StopAndCopy(_ByRunc):
    """Dump all of it, copy it, restore it."""

    name = "stop-and-copy (runc, rsync)"

    def move(self, scene: Scene) -> Moved:
        """The container stands still from the dump to the restore."""
        return move_by_script(
            scene,
            f"""
            mark begin
            {_FILES}
            mark files-before
            {_CHECKPOINT} {NAME}
            {_after_dump(scene)}
            """,
        )


class PostCopy(_ByRunc):
    """CRIU's lazy pages through runc: restore first, fetch memory when it is needed."""

    name = "post-copy (runc, CRIU lazy-pages)"

    def move(self, scene: Scene) -> Moved:
        """Returns when the last page has come."""
        pipe_bytes_max = int(scene.source.read_text("/proc/sys/fs/pipe-max-size"))
        if pipe_bytes_max < PIPE_BYTES:
            raise ImpossibleError(
                f"CRIU's page server splices pipes of {PIPE_BYTES} bytes; without CAP_SYS_RESOURCE"
                f" that needs sysctl fs.pipe-max-size={PIPE_BYTES}, and it is {pipe_bytes_max}"
            )
        source = scene.source.address
        lazy = (
            f"criu lazy-pages --page-server --address {source} --port {PAGES_PORT}"
            f" -D {WORK}/img -W {WORK}/work -o lazy.log"
        )
        serve = (
            f"{{ {lazy} </dev/null >/dev/null 2>&1 & }}; "
            f"while [ ! -S {WORK}/work/lazy-pages.socket ]; do sleep 0.005; done; "
        )
        return move_by_script(
            scene,
            f"""
            mark begin
            {_FILES}
            mark files-before
            mkfifo {WORK}/ready
            {_CHECKPOINT} --lazy-pages --page-server {source}:{PAGES_PORT} --status-fd 3 \\
                {NAME} 3>{WORK}/ready >/dev/null 2>&1 &
            dump=$!
            [ "$(head -c1 <{WORK}/ready | wc -c)" = 1 ] || {{ cat {WORK}/runc.log; exit 1; }}
            {_after_dump(scene, serve, "--lazy-pages")}
            wait $dump
            mark pages
            """,
        )


def _after_dump(scene: Scene, before: str = "", options: str = "") -> str:
    """The steps from a dump to the restored container; `before` runs on B before its restore."""
    announce = ANNOUNCE.format(name=NAME, ip=scene.spec.ip)
    quiet = "</dev/null >/dev/null 2>&1"
    restore = f"{before}{PLUG} && {_RESTORE} {options} {NAME} {quiet} && {announce}"
    return f"""
            {UNPLUG}
            mark dump
            {_IMAGES}
            mark images
            {_FILES}
            mark files
            {SSH} B '{restore}' || {{ {SSH} B cat {WORK}/runc.log; exit 1; }}
            mark restore
    """
