"""The files in which one lab host differs from the common root, written before it starts.

They become the upper layer of the host's overlay. A directory that exists there replaces the
root's directory of the same name in its mode, so modes are given throughout.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from bench.lab.plan import LabPlan, Node, hosts_file
from bench.lab.ssh_keys import SshKey, make_ssh_key
from transport import enrolment
from transport.authority import Authority
from transport.identity import IdentityPaths, Role

# Where the source of this project is seen, read-only, inside a host.
SOURCE_INSIDE = "/opt/dolly"
# Where Python keeps byte code inside a host, of the source and of all else: shared with every host
# that has the same root and source, since a host of its own would take seconds to compile it.
BYTECODE_INSIDE = "/var/cache/migrate/pyc"
PATH_INSIDE = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TLS_INSIDE = "/etc/migrate/tls"

MIGRATE = f"""#!/bin/sh
export PYTHONPATH={SOURCE_INSIDE} PYTHONPYCACHEPREFIX={BYTECODE_INSIDE}
exec /usr/bin/python3 -m migrate "$@"
"""
# UsePAM no: no session modules that would look for systemd. The one key of the lab opens root.
SSHD = f"""UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
HostKey /etc/ssh/ssh_host_ed25519_key
UseDNS no
PrintMotd no
SetEnv PATH={PATH_INSIDE} LANG=C.UTF-8
"""


# Where the client has its operator's identity: `migrate … --fleet FLEET --as OPERATOR`.
FLEET = "/root/lab-fleet"
OPERATOR = "lab"


class LabIdentities:
    """The keys of one lab, shared by its hosts."""

    def __init__(self, plan: LabPlan) -> None:
        self._plan = plan
        self._authority = Authority.temporary()
        self._login: SshKey = make_ssh_key()
        self._host_keys: Mapping[str, SshKey] = {node.name: make_ssh_key() for node in plan.nodes}

    def write(self, upper: Path, node: Node) -> None:
        """Fills the upper layer `upper` (an empty directory) of `node`."""
        put = _Writer(upper)
        put.file("/etc/hostname", node.name + "\n")
        put.file("/etc/hosts", hosts_file(self._plan))
        put.file("/etc/resolv.conf", "")
        put.file("/usr/local/bin/migrate", MIGRATE, 0o755)
        put.directory("/root", 0o700)
        put.directory("/root/.ssh", 0o700)
        put.file("/root/.ssh/id_ed25519", self._login.private, 0o600)
        put.file("/root/.ssh/authorized_keys", f"{self._login.public} dolly-lab\n", 0o600)
        put.file("/root/.ssh/known_hosts", self._known_hosts())
        host_key = self._host_keys[node.name]
        put.file("/etc/ssh/ssh_host_ed25519_key", host_key.private, 0o600)
        put.file("/etc/ssh/ssh_host_ed25519_key.pub", host_key.public + "\n")
        put.file("/etc/ssh/sshd_config.d/lab.conf", SSHD)
        if node.is_client:
            enrolment.enrol_here(
                IdentityPaths(put.directory(f"{FLEET}/operators/{OPERATOR}", 0o700)),
                self._authority,
                OPERATOR,
                Role.OPERATOR,
                [],
            )
        else:
            put.directory("/etc/migrate", 0o700)
            enrolment.enrol_here(
                IdentityPaths(put.directory(TLS_INSIDE, 0o700)),
                self._authority,
                node.name,
                Role.HOST,
                [node.address, node.address6],
            )

    def _known_hosts(self) -> str:
        return "".join(
            f"{node.name.lower()},{node.name},{node.address},{node.address6} "
            f"{self._host_keys[node.name].public}\n"
            for node in self._plan.hosts
        )


class _Writer:
    """Writes below a directory; directories on the way are made 0755, as Debian has them."""

    def __init__(self, upper: Path) -> None:
        self._upper = upper

    def directory(self, inside: str, mode: int = 0o755) -> Path:
        path = self._upper / inside.lstrip("/")
        if not path.is_dir():
            if path.parent != self._upper:
                self.directory(os.path.dirname(inside))  # noqa: PTH120 - a path inside the host
            path.mkdir()
            path.chmod(mode)
        return path

    def file(self, inside: str, text: str, mode: int = 0o644) -> None:
        parent, name = os.path.split(inside)
        path = self.directory(parent) / name
        # Created with its mode: a key is never readable by others, not even for a moment.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
            file.write(text)
        path.chmod(mode)
