"""Where the lab keeps its things on this machine. Knows nothing about hosts or processes.

/var/cache/dolly/root-KEY        root file system of the lab hosts, made by scripts/setup; a second
                                 one, by scripts/setup --bench, has what bench compares with
/var/cache/dolly/machine-KEY     what virtual machines start from, made by scripts/setup --vm
/var/cache/dolly/workloads-KEY   the C workloads, static, made by scripts/setup
/var/cache/dolly/bytecode-KEY    what the hosts' Python has compiled, of one root and one source
/var/cache/dolly/lab.lock        held while labs are made known or swept
/var/lib/dolly-lab/LAB           state of one lab; exists only while the lab does
CGROUP2/dolly-lab-LAB/HOST       the cgroups of a lab
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from bench.lab.errors import LabError

PROJECT = Path(__file__).resolve().parents[2]
CACHE = Path("/var/cache/dolly")
SWEEP_LOCK = CACHE / "lab.lock"
STATE_BASE = Path("/var/lib/dolly-lab")
CGROUP_PREFIX = "dolly-lab-"
# In a lab's state directory: what it consists of (JSON), and the keeper's socket.
DESCRIPTION = "lab.json"
CONTROL = "control"
# The same files in the same order as in scripts/setup.
RECIPE = ("build", "mirror", "packages", "packages-sid")
SERVERS = ("packages", "files/etc/nginx/container.conf")
COMPARED = ("packages", "files/etc/containers/containers.conf")


def root_path(*, compared: bool = False) -> Path:
    """The cached root of this checkout's recipe: with servers that are moved, and with what bench
    compares with. LabError when scripts/setup has not made it."""
    parts = [PROJECT / "bench/lab/root" / name for name in RECIPE]
    parts += [PROJECT / "bench/lab/servers" / name for name in SERVERS]
    if compared:
        parts += [PROJECT / "bench/compare/root" / name for name in COMPARED]
    recipe = b"".join(part.read_bytes() for part in parts)
    root = CACHE / f"root-{hashlib.sha256(recipe).hexdigest()[:16]}"
    if not root.is_dir():
        option = " --bench" if compared else ""
        raise LabError(f"no lab root at {root}: run scripts/setup{option}")
    return root


def bytecode_path(root: Path, source: Path) -> Path:
    """Where the hosts with this root and this source keep their Python's byte code."""
    of = hashlib.sha256(f"{root}\0{source}".encode())
    return CACHE / f"bytecode-{of.hexdigest()[:16]}"


def state_path(lab: str) -> Path:
    return STATE_BASE / lab


def cgroup_path(lab: str) -> Path:
    return cgroup2_mount() / f"{CGROUP_PREFIX}{lab}"


def cgroup2_mount() -> Path:
    """Where this machine has cgroup2: alone (pure v2), or beside v1 (hybrid)."""
    return find_cgroup2(Path("/proc/self/mountinfo").read_text())


def find_cgroup2(mountinfo: str) -> Path:
    """Field 5 of a line is the mount point, the first after ` - ` the type (proc(5))."""
    for line in mountinfo.splitlines():
        mount, _, kind = line.partition(" - ")
        if kind.split()[0] == "cgroup2":
            return Path(mount.split()[4])
    raise LabError("no cgroup2 is mounted on this machine; the lab needs it for its hosts")
