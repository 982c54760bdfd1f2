"""The policy of a host, which its operator writes: a mistake in it is said, never half taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from migrate.policy import Policy, PolicyError, parse, render

MAX_BYTES = 4 << 10
IS_JSON = False


def one_input(data: bytes) -> None:
    """Nothing but PolicyError may come of it; what is accepted can be written again."""
    with suppress(PolicyError):
        policy = parse(data.decode("utf-8", "replace"))
        assert parse(render(policy)) == policy


def seeds() -> Iterator[bytes]:
    yield b""
    yield render(Policy()).encode()
    yield b"""
[receive]
from = ["db-*", "web1"]   # a comment
bind_mounts = ['/srv/shared', "/a\\u00e9\\"b"]
devices = ["/dev/fuse"]
capabilities = ["CAP_NET_ADMIN"]
seccomp_off = true
[receive.quotas]
sessions = 0x10
memory_mib = 65_536
[send]
to = ["*"]
"""


DICTIONARY = (
    b"[receive]",
    b"[receive.quotas]",
    b"[send]",
    b"privileged = true",
    b"from = [",
    b'"""',
    b"'''",
    b"\\u0000",
    b"\\U0010ffff",
    b"1979-05-27T07:32:00Z",
    b"9223372036854775808",
    b"inf",
)
