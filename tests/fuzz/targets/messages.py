"""Control messages, and what is read out of their texts: `config.json`, network identities.

first byte  0 from a source | 1 from a target; then JSON
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from bench.oci_spec import oci_spec
from migrate import preflight
from migrate.agent.workspace import container_config
from migrate.core import messages as m
from migrate.errors import MigrateError
from migrate.network_identity import validate
from migrate.policy import Policy, Receive
from migrate.runtimes.runc import Runc
from tests.migrate.core.test_messages import FROM_SOURCE, FROM_TARGET, OPEN, VERSIONS

MAX_BYTES = 16 << 10
IS_JSON = True


def one_input(data: bytes) -> None:
    """Nothing but MigrateError may come of it; what is accepted can be said again."""
    if not data:
        return
    with suppress(MigrateError):
        if data[0] % 2:
            answer = m.decode_from_target(data[1:])
            assert m.decode_from_target(m.encode(answer)) == answer
        else:
            message = m.decode_from_source(data[1:])
            assert m.decode_from_source(m.encode(message)) == message
            if isinstance(message, m.OpenSession):
                _session(message)


def _session(request: m.OpenSession) -> None:
    """What the agent does with a request before it has asked its host anything."""
    for name in (request.migration_id, request.container):
        assert Path("/run/migrate", name).parent == Path("/run/migrate")
    preflight.judge_versions(request.versions, VERSIONS)
    preflight.judge_room(request, 1 << 30, 1 << 30)
    with suppress(MigrateError):
        validate(request.network)
    with suppress(MigrateError):
        rules = Policy(receive=Receive(bind_mounts=("/srv",)))
        refusals = preflight._of_configuration(request, Runc(), rules)
        # What is taken is what the runtime gets: it must be one that was understood.
        if not refusals:
            json.loads(container_config(request.config_json, Path("/run/netns/x")))
    with suppress(MigrateError):
        container_config(request.config_json, Path("/run/netns/x"))


def seeds() -> Iterator[bytes]:
    for message, _ in FROM_SOURCE:
        yield b"\0" + m.encode(message)
    for answer, _ in FROM_TARGET:
        yield b"\1" + m.encode(answer)
    names: dict[str, Any] = {
        "hostname": "sheep",
        "network_namespace": "/run/netns/x",
        "cgroup": "/dolly/sheep",
    }
    spec = oci_spec(["/bin/true"], **names, annotations={"org.opencontainers.image": "x"})
    mounts = spec["mounts"]
    for source in ("/srv/data", "/srv/../etc", "/srv/a\0b", "/srv/\ud800", "/srv/" + "x" * 300):
        bind = {"destination": "/data", "type": "bind", "source": source, "options": ["rbind"]}
        spec["mounts"] = [*mounts, bind]
        yield b"\0" + m.encode(msgspec.structs.replace(OPEN, config_json=json.dumps(spec)))


DICTIONARY = (b'"type":"', b'"protocol":2', b"\\u0000", b"../", b"18446744073709551616", b"1e999")
