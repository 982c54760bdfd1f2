"""What runs on a host before anything of this project is there: its own Python, and this file.

    ssh HOST python3 -I -c 'exec(sys.stdin.buffer.read(N))' ACTION ARGUMENT...   < this file, data

    probe ROOT             what the host is and has; JSON
    install ROOT VERSION   unpacks a tar (the rest of standard input) as ROOT/versions/VERSION
    settle ROOT            makes what lasts from one version to the next
    clear DIRECTORY        removes a directory below /var/lib/migrate/once

It imports the standard library only, and is written for any Python 3 to read, so that a host with
an old one hears what it lacks. What it unpacks comes from the operator, over SSH.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROGRAMS = ("criu", "runc", "crun", "rsync", "ip")
FRONT_USER = "migrate-front"
LINK = Path("/usr/local/bin/migrate")
VERSIONS_KEPT = 2
COMMAND_DEADLINE_S = 60

LAUNCHER = """#!/bin/sh
exec {python} -m migrate "$@"
"""


def probe(root: str) -> None:
    """Facts as JSON; all of them small. Nothing is changed."""
    known = {one.metadata["Name"]: one.version for one in metadata.distributions()}
    facts = {
        "hostname": os.uname().nodename,
        "uid": os.geteuid(),
        "python": list(sys.version_info[:3]),
        "machine": platform.machine(),
        "glibc": platform.libc_ver()[1],
        "systemd": Path("/run/systemd/system").is_dir(),
        "apt": shutil.which("apt-get") is not None,
        "programs": {name: shutil.which(name) or "" for name in PROGRAMS},
        "criu": first_line(["criu", "--version"]),
        "distributions": {str(name).lower(): version for name, version in known.items() if name},
        "pycriu": has_module("pycriu"),
        "installed": installed(Path(root)),
    }
    print(json.dumps(facts))  # noqa: T201


def install(root: str, version: str) -> None:
    """A virtual environment that sees the host's packages, with the tar's content in it.

    It gets its name when it is complete, and `current` points to it by one rename.
    """
    versions = Path(root) / "versions"
    versions.mkdir(mode=0o755, parents=True, exist_ok=True)
    place, partial = versions / version, versions / (version + ".partial")
    if not place.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
        venv = [sys.executable, "-m", "venv", "--without-pip", "--system-site-packages"]
        subprocess.run([*venv, str(partial)], check=True, timeout=COMMAND_DEADLINE_S)
        (site,) = partial.glob("lib/python3*/site-packages")
        unpack(site)
        launcher = partial / "bin" / "migrate"
        launcher.write_text(LAUNCHER.format(python=place / "bin" / "python"))
        launcher.chmod(0o755)
        os.sync()
        partial.rename(place)
    link, new = Path(root) / "current", Path(root) / "current.new"
    new.unlink(missing_ok=True)
    new.symlink_to(Path("versions") / version)
    new.replace(link)
    prune(versions, version)
    print(json.dumps({"installed": version}))  # noqa: T201


def settle(root: str) -> None:
    """The account of the agent's part that faces the network, which owns nothing, and `migrate` in
    the PATH unless something else is called so."""
    try:
        import pwd

        pwd.getpwnam(FRONT_USER)
    except KeyError:
        command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin"]
        subprocess.run([*command, FRONT_USER], check=True, timeout=COMMAND_DEADLINE_S)
    if not os.path.lexists(LINK):
        LINK.symlink_to(Path(root) / "current" / "bin" / "migrate")
    print(json.dumps({"user": FRONT_USER, "link": str(LINK)}))  # noqa: T201


def clear(directory: str) -> None:
    """What a single migration had brought here. Where its agent has been, only that removes it."""
    path = Path(directory)
    if path.parent != Path("/var/lib/migrate/once"):
        sys.exit("not below /var/lib/migrate/once: " + directory)
    if not (path / "journal.sqlite").exists():
        shutil.rmtree(str(path), ignore_errors=True)
    # Another migration may have brought something too.
    with contextlib.suppress(OSError):
        path.parent.rmdir()
    print(json.dumps({"there": path.exists()}))  # noqa: T201


def unpack(site: Path) -> None:
    """The tar on standard input: plain files, none of which leads out of `site`."""
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|gz") as archive:
        for member in archive:
            if not member.isfile() or member.name.startswith("/") or ".." in member.name.split("/"):
                sys.exit("the archive has what it must not: " + member.name)
            archive.extract(member, site)


def prune(versions: Path, present: str) -> None:
    """Remove what neither runs nor is among the latest: processes load modules late."""
    running = "\n".join(command_lines())
    others = [path for path in versions.iterdir() if path.name != present]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in others[VERSIONS_KEPT - 1 :]:
        if str(path) not in running:
            shutil.rmtree(path, ignore_errors=True)


def command_lines() -> Iterator[str]:
    """Of all processes."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue


def installed(root: Path) -> str:
    """The version that `current` points to."""
    try:
        place = (root / "current").resolve(strict=True)
    except OSError:
        return ""
    return place.name if (place / "bin" / "migrate").exists() else ""


def first_line(command: list[str]) -> str:
    """What a program says of itself, "" if it is not there."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout.decode(errors="replace").splitlines() or [""])[0][:200]


def has_module(name: str) -> bool:
    """Whether Python finds it; it is not imported."""
    from importlib.util import find_spec

    return find_spec(name) is not None


ACTIONS: dict[str, Callable[..., None]] = {
    "probe": probe,
    "install": install,
    "settle": settle,
    "clear": clear,
}

if __name__ == "__main__":
    ACTIONS[sys.argv[1]](*sys.argv[2:])
