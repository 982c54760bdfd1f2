"""The SSH keys of a lab, judged by an implementation that meets them."""

from __future__ import annotations

import io

import paramiko

from bench.lab.ssh_keys import make_ssh_key


def test_ssh_reads_the_keys() -> None:
    key = make_ssh_key()
    loaded = paramiko.Ed25519Key.from_private_key(io.StringIO(key.private))
    assert f"ssh-ed25519 {loaded.get_base64()}" == key.public
