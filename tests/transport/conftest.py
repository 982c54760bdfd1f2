"""Identities for the transport tests: an authority, and certificates of it, good and bad."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.transport.transfer_parts import Authority, Recorder, Target
from transport import tls


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that nobody here trusts."""
    return Authority(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="session")
def source(authority: Authority) -> ssl.SSLContext:
    return tls.client_context(authority.issue("source.test"))


@pytest.fixture(scope="session")
def target_identity(authority: Authority) -> tls.TlsPaths:
    return authority.issue("target.test")


@pytest.fixture
def log() -> Recorder:
    return Recorder()


@pytest.fixture
def target(target_identity: tls.TlsPaths, log: Recorder, tmp_path: Path) -> Iterator[Target]:
    """A listener with one session, writing into files."""
    with Target(tls.server_context(target_identity), tmp_path, log) as running:
        yield running
