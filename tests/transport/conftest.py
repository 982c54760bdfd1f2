"""A fleet for the transport tests: a source, and a target that listens."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.identities import Fleet
from tests.transport.transfer_parts import SOURCE_NAME, TARGET_NAME, Recorder, Target
from transport.identity import HostIdentity


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return Fleet(tmp_path_factory.mktemp("fleet"))


@pytest.fixture(scope="session")
def source(fleet: Fleet) -> ssl.SSLContext:
    return HostIdentity.load(fleet.host(SOURCE_NAME)).client_context()


@pytest.fixture(scope="session")
def accepting(fleet: Fleet) -> ssl.SSLContext:
    """The target's end of every connection."""
    return HostIdentity.load(fleet.host(TARGET_NAME)).server_context()


@pytest.fixture
def log() -> Recorder:
    return Recorder()


@pytest.fixture
def target(accepting: ssl.SSLContext, log: Recorder, tmp_path: Path) -> Iterator[Target]:
    """A listener with one session, writing into files."""
    with Target(accepting, tmp_path, log) as running:
        yield running
