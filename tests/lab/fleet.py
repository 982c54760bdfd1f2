"""`migrate hosts` as an operator has it: on the client of a lab, over its hosts' real sshd."""

from __future__ import annotations

import json
import subprocess
from typing import Any, Final

from bench.lab.host import Host
from bench.lab.lab import Lab

PASSPHRASE: Final = "/root/passphrase"
INSTALLED: Final = "/usr/local/bin/migrate"
PATIENCE_S: Final = 240.0


def found(lab: Lab) -> None:
    """The client has an authority; it knows no hosts yet."""
    lab.client.write_text(PASSPHRASE, "correct horse\n", 0o600)
    lab.client.run(["migrate", "ca", "init", "--passphrase-file", PASSPHRASE])


def hosts(lab: Lab, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`migrate hosts ARGUMENTS`, however it ends."""
    patience = max(host.patience for host in lab.hosts)
    command = ["migrate", "hosts", *arguments]
    return lab.client.run(command, check=False, timeout_s=PATIENCE_S * patience)


def add(lab: Lab, destination: str, *options: str) -> subprocess.CompletedProcess[str]:
    """`migrate hosts add USER@HOST`, however it ends."""
    return hosts(lab, "add", destination, "--passphrase-file", PASSPHRASE, *options)


def remove(lab: Lab, name: str) -> subprocess.CompletedProcess[str]:
    """`migrate hosts remove NAME`, however it ends."""
    return hosts(lab, "remove", name, "--passphrase-file", PASSPHRASE)


def state(host: Host) -> dict[str, Any]:
    """What an enrolled host says of its agent."""
    answer: dict[str, Any] = json.loads(host.run([INSTALLED, "service", "state"]).stdout)
    return answer


def make_older(host: Host) -> str:
    """Another version is installed and runs instead of the present one, which it does not know any
    more; the name of that."""
    version: str = state(host)["version"]
    script = f"""
        cd /opt/migrate && cp -a versions/{version} versions/older
        sed -i s,versions/{version},versions/older, versions/older/bin/migrate
        ln -sfn versions/older current
        {INSTALLED} service start
        rm -r versions/{version}
    """
    host.run(["sh", "-ec", script], timeout_s=PATIENCE_S * host.patience)
    assert state(host)["agent_version"] == "older"
    return version
