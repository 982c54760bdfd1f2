"""Containers of runc and crun inside lab hosts: bundle, network, start, removal.

    /var/lib/containers/lab/NAME/{config.json,rootfs/}   bundle
    /run/netns/NAME                              network namespace, owned by the host
    v-NAME  <-veth->  eth0 inside                plugged into the host's br0
    cgroup /dolly/NAME

Everything is made from the machine's side through the lab's API; nothing here runs a runtime on
the machine itself. `create` makes what a container needs, `start` runs it and waits until its
server listens, `remove` takes all of it away again, from whatever state.
"""

from __future__ import annotations

import ipaddress
import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.lab.errors import LabError
from bench.oci_spec import oci_spec
from bench.workloads.binaries import binary

if TYPE_CHECKING:
    from bench.lab.host import Host

BUNDLES: Final = "/var/lib/containers/lab"
"""On the host's plain disk: on its overlay CRIU could not dump an inotify watch."""
PORTS: Final = {
    "memory": 7000,
    "tree": 7001,
    "blocker": 7002,
    "redis": 6379,
    "nginx": 8080,
    "web": 8081,
    "postgres": 5432,
}
CLIENTS: Final = {"redis": "redis", "nginx": "http", "web": "http", "postgres": "postgres"}
"""What a workload speaks (bench/probe.py); the others answer lines."""
TICKING: Final = ("memory",)
"""These answer datagrams too."""
PORT_ANNOTATION: Final = "dolly.port"
"""Tells `start`, from the bundle alone, what to wait for."""
RUNTIME_ANNOTATION: Final = "dolly.runtime"
"""Tells `start`, from the bundle alone, by whom."""
RUNTIMES: Final = ("runc", "crun")
NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,12}")
"""A device name has at most 15 bytes (IFNAMSIZ), two of which are "v-"."""
LISTENING_S: Final = 60.0
"""A workload of some GiB fills its memory before it listens."""
POLL_S: Final = 0.02
RUNTIME_S: Final = 60.0
DIRECTORIES: Final = ("bin", "data", "dev", "etc", "proc", "sys", "tmp")

REDIS_CONFIG: Final = """\
bind * -::*
protected-mode no
port 6379
daemonize no
dir /data
save ""
appendonly no
activedefrag no
io-threads 1
locale-collate C
"""
NGINX: Final = "/usr/sbin/nginx"
NGINX_CONFIG: Final = "/etc/nginx/container.conf"
"""In every lab host (bench/lab/servers)."""
POSTGRES: Final = "/usr/lib/postgresql/17"
"""In hosts of comparisons (bench/compare/root)."""
POSTGRES_SHARE: Final = "/usr/share/postgresql/17"
POSTGRES_DATA: Final = "/data/postgres"
POSTGRES_TOLD_USER: Final = 1000
"""Postgres will not be root, and a lab host can't dump a task of anybody else (docs/facts.md)."""
POSTGRES_CONFIG: Final = """\
listen_addresses = '*'
unix_socket_directories = ''
fsync = off
timezone = GMT
log_timezone = GMT
"""
PYTHON: Final = "/usr/bin/python3"
PYTHON_LIBRARY: Final = ("/usr/lib/python3.13",)
WEB: Final = Path(__file__).parent / "workloads/web.py"
# $1 namespace, $2 host end, $3 MAC, $4 IPv4/prefix, $5 IPv6/prefix or "", $6 gateway or "".
# nodad: an address that is still being probed for duplicates can't be bound or answered for.
NETWORK_SCRIPT: Final = """\
set -e
ip netns add "$1"
ip link add "$2" type veth peer name eth0 address "$3" netns "$1"
ip -n "$1" link set lo up
ip -n "$1" addr add "$4" dev eth0
[ -z "$5" ] || ip -n "$1" addr add "$5" dev eth0 nodad
ip -n "$1" link set eth0 up
[ -z "$6" ] || ip -n "$1" route add default via "$6"
ip link set "$2" master br0 up
"""
# $1 rootfs; the rest: programs. The loader is the line of ldd without "=>".
PROGRAMS_SCRIPT: Final = """\
set -e
root=$1; shift
for program; do
    libraries=$(ldd "$program" | grep -o '/[^ ]*')
    for file in "$program" $libraries; do
        mkdir -p "$root$(dirname "$file")"
        cp -Lu "$file" "$root$file"
    done
done
"""
# A runtime hands its own standard streams to the container: CRIU can't dump a file or pipe of the
# host there, /dev/null it can. So what the runtime has to say goes to its log.
# $1 data directory, $2 programs, $3 its owner. Postgres's own user makes it, as root may not.
POSTGRES_SCRIPT: Final = """\
set -e
directory=$(mktemp -d)
chown postgres "$directory"
setpriv --reuid postgres --clear-groups \
    "$2/bin/initdb" -D "$directory/data" -U postgres -A trust --no-sync --locale=C >/dev/null
echo 'host all all all trust' >>"$directory/data/pg_hba.conf"
mv "$directory/data" "$1"
rmdir "$directory"
chown -R "$3" "$1"
"""
START_SCRIPT: Final = """\
exec "$3" --log "$1/runtime.log" run --detach --bundle "$1" "$2" </dev/null >/dev/null 2>&1
"""


class ContainerError(Exception):
    """A container could not be made, started or removed."""


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """One container. Addresses carry their prefix length, such as "10.77.0.50/24".

    `args` are the workload's own: rate and options of memory (default: 8 MiB/s), the kind of
    blocker, options of tree, further lines of configuration of redis; the others have none.
    An empty `mac` is made from the address.
    """

    name: str
    workload: str
    args: tuple[str, ...] = ()
    memory_mib: int = 16
    address: str = "10.77.0.50/24"
    address6: str | None = "fd77::50/112"
    mac: str = ""
    gateway: str | None = None
    hostname: str = ""
    seccomp: bool = True
    runtime: str = "runc"

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ContainerError(f"container name {self.name!r}: use up to 13 of a-z, 0-9 and -")
        if self.workload not in PORTS:
            raise ContainerError(f"workload {self.workload!r}: there are {', '.join(PORTS)}")

    @property
    def port(self) -> int:
        return PORTS[self.workload]

    @property
    def client(self) -> str:
        """The kind of bench.probe that it answers."""
        return CLIENTS.get(self.workload, "lines")

    @property
    def ticks(self) -> bool:
        """Whether it answers bench.probe's datagrams too."""
        return self.workload in TICKING

    @property
    def ip(self) -> str:
        """The IPv4 address without its prefix length."""
        return str(ipaddress.ip_interface(self.address).ip)

    @property
    def ip6(self) -> str | None:
        return None if self.address6 is None else str(ipaddress.ip_interface(self.address6).ip)

    @property
    def hardware_address(self) -> str:
        """The given MAC, or a locally administered one that no other address yields."""
        if self.mac:
            return self.mac
        return ":".join(
            ["02", "42", *(f"{byte:02x}" for byte in ipaddress.ip_address(self.ip).packed)]
        )

    @property
    def command(self) -> list[str]:
        """What the container runs."""
        if self.workload == "redis":
            return ["/usr/bin/redis-server", "/etc/redis.conf"]
        if self.workload == "nginx":
            return [NGINX, "-c", NGINX_CONFIG]
        if self.workload == "postgres":
            return [f"{POSTGRES}/bin/postgres", "-D", POSTGRES_DATA]
        if self.workload == "web":
            return [PYTHON, "/bin/web.py", str(self.port), str(self.memory_mib)]
        program, port = f"/bin/{self.workload}", str(self.port)
        if self.workload == "memory":
            rate, *options = self.args or ("8",)
            return [program, port, str(self.memory_mib), rate, *options]
        if self.workload == "blocker":
            kind, *options = self.args or ("idle",)
            return [program, kind, port, *options]
        return [program, port, *self.args]


def bundle_path(name: str) -> str:
    """Inside the host."""
    return f"{BUNDLES}/{name}"


def host_device(name: str) -> str:
    """The host's end of the container's veth pair."""
    return f"v-{name}"


def create(host: Host, spec: ContainerSpec) -> None:
    """Makes bundle and network of a container, plugged in, not running. Raises ContainerError."""
    bundle = host.path(bundle_path(spec.name))
    if bundle.exists():
        raise ContainerError(f"{host.name} already has a container {spec.name}")
    try:
        _make_rootfs(host, spec)
        configuration = oci_spec(
            spec.command,
            hostname=spec.hostname or spec.name,
            network_namespace=f"/run/netns/{spec.name}",
            cgroup=f"/dolly/{spec.name}",
            annotations={PORT_ANNOTATION: str(spec.port), RUNTIME_ANNOTATION: spec.runtime},
            seccomp=spec.seccomp,
            told_user=POSTGRES_TOLD_USER if spec.workload == "postgres" else 0,
        )
        (bundle / "config.json").write_text(json.dumps(configuration, indent=1))
        make_network(host, spec)
    except (LabError, OSError) as error:
        raise ContainerError(f"container {spec.name} on {host.name}: {error}") from error


def make_network(host: Host, spec: ContainerSpec) -> None:
    """The network namespace and its veth pair, plugged into the bridge."""
    host.run(
        [
            *("sh", "-c", NETWORK_SCRIPT, "network", spec.name, host_device(spec.name)),
            *(spec.hardware_address, spec.address, spec.address6 or "", spec.gateway or ""),
        ]
    )


def start(host: Host, name: str, *, listening_s: float = LISTENING_S) -> None:
    """Runs a created container; returns when its server listens. Raises ContainerError."""
    bundle = bundle_path(name)
    where = f"container {name} on {host.name}"
    try:
        runtime = _annotation(host, name, RUNTIME_ANNOTATION)
        host.run(["sh", "-c", START_SCRIPT, "start", bundle, name, runtime], timeout_s=RUNTIME_S)
    except LabError as error:
        log = host.path(f"{bundle}/runtime.log")
        raise ContainerError(f"{where}: {log.read_text() if log.exists() else error}") from error
    until_s = time.monotonic() + listening_s * host.patience
    while not _listens(host, name):
        if state(host, name) != "running":
            raise ContainerError(f"{where} ended by itself")
        if time.monotonic() > until_s:
            raise ContainerError(f"{where} does not listen after {listening_s:g} s")
        time.sleep(POLL_S)


def remove(host: Host, name: str) -> None:
    """Ends a container if it runs, and removes everything that `create` made. Idempotent."""
    # Left mounted by a restore that was killed, and what is deleted around it, deletes through it.
    for directory in (f"/run/runc/{name}", bundle_path(name)):
        host.run(["umount", "--lazy", f"{directory}/criu-root"], check=False)
    for runtime in RUNTIMES:
        host.run([runtime, "delete", "--force", name], check=False, timeout_s=RUNTIME_S)
    host.run(["ip", "link", "delete", host_device(name)], check=False)
    host.run(["ip", "netns", "delete", name], check=False)
    shutil.rmtree(host.path(bundle_path(name)), ignore_errors=True)
    present = host.run(["ip", "netns", "list"]).stdout.split()
    if state(host, name) != "absent" or name in present:
        raise ContainerError(f"container {name} on {host.name} could not be removed")


def state(host: Host, name: str) -> str:
    """ "running", "stopped", … as its runtime says, or "absent"."""
    known = _known(host, name)
    return "absent" if known is None else str(known["status"])


def is_running(host: Host, name: str) -> bool:
    """Whether its tasks execute on this host: not frozen, and not held by a tracer."""
    known = _known(host, name)
    if known is None or known["status"] != "running":
        return False
    events = host.read_text(f"/sys/fs/cgroup/dolly/{name}/cgroup.events")
    status = host.read_text(f"/proc/{known['pid']}/status")
    task_state = re.search(r"^State:\s+(\S)", status, re.MULTILINE)
    return "frozen 1" not in events and task_state is not None and task_state[1] not in "tTZX"


def pid(host: Host, name: str) -> int:
    """Of the container's first process, as its host sees it."""
    known = _known(host, name)
    if known is None:
        raise ContainerError(f"{host.name} has no container {name}")
    return int(known["pid"])


def _known(host: Host, name: str) -> dict[str, Any] | None:
    """What the runtime that has the container says of it."""
    for runtime in RUNTIMES:
        if host.path(f"/run/{runtime}/{name}").exists():
            answer = host.run([runtime, "state", name], check=False)
            if answer.returncode == 0:
                return dict(json.loads(answer.stdout))
    return None


def _make_rootfs(host: Host, spec: ContainerSpec) -> None:
    rootfs_inside = f"{bundle_path(spec.name)}/rootfs"
    rootfs = host.path(rootfs_inside)
    for directory in DIRECTORIES:
        (rootfs / directory).mkdir(parents=True)
    (rootfs / "tmp").chmod(0o1777)
    (rootfs / "etc/passwd").write_text(
        "root:x:0:0:root:/:/bin/sh\nuser:x:1000:1000:user:/:/bin/sh\n"
    )
    (rootfs / "etc/group").write_text("root:x:0:\nuser:x:1000:\n")
    if spec.workload == "redis":
        host.run(["sh", "-c", PROGRAMS_SCRIPT, "programs", rootfs_inside, "/usr/bin/redis-server"])
        configuration = REDIS_CONFIG + "".join(f"{line}\n" for line in spec.args)
        (rootfs / "etc/redis.conf").write_text(configuration)
    elif spec.workload == "nginx":
        host.run(["sh", "-c", PROGRAMS_SCRIPT, "programs", rootfs_inside, NGINX])
        (rootfs / "etc/nginx").mkdir()
        shutil.copy2(host.path(NGINX_CONFIG), rootfs / NGINX_CONFIG.lstrip("/"))
    elif spec.workload == "postgres":
        _make_postgres(host, spec, rootfs_inside)
    elif spec.workload == "web":
        host.run(["sh", "-c", PROGRAMS_SCRIPT, "programs", rootfs_inside, PYTHON])
        host.run(["cp", "-r", "--parents", *PYTHON_LIBRARY, rootfs_inside])
        shutil.copy2(WEB, rootfs / "bin" / WEB.name)
    else:
        shutil.copy2(binary(spec.workload), rootfs / "bin" / spec.workload)


def _make_postgres(host: Host, spec: ContainerSpec, rootfs: str) -> None:
    """Programs, their libraries, and an empty database whose buffers are the memory."""
    host.run(["sh", "-c", PROGRAMS_SCRIPT, "programs", rootfs, f"{POSTGRES}/bin/postgres"])
    host.run(["cp", "-r", "--parents", f"{POSTGRES}/lib", POSTGRES_SHARE, rootfs])
    data, owner = f"{rootfs}{POSTGRES_DATA}", f"{2**32 - POSTGRES_TOLD_USER}:0"
    host.run(["sh", "-c", POSTGRES_SCRIPT, "postgres", data, POSTGRES, owner])
    with host.path(f"{data}/postgresql.conf").open("a") as configuration:
        configuration.write(f"{POSTGRES_CONFIG}shared_buffers = {spec.memory_mib}MB\n")


def _annotation(host: Host, name: str, key: str) -> str:
    configuration = json.loads(host.read_text(f"{bundle_path(name)}/config.json"))
    return str(configuration["annotations"][key])


def _listens(host: Host, name: str) -> bool:
    """Asked of the kernel rather than by connecting: a connection would be the first client's."""
    port = _annotation(host, name, PORT_ANNOTATION)
    filtered = ["ss", "-Hltn", "sport", "=", f":{port}"]
    return bool(host.run(["ip", "netns", "exec", name, *filtered]).stdout.strip())
