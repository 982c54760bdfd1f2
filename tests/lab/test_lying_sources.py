"""A source that lies about its checkpoint: refused before CRIU has seen any of it, and undone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest

from bench.lab.host_files import SOURCE_INSIDE
from bench.lab.lab import Lab
from tests.lab.invariants import (
    Threatened,
    assert_moves,
    assert_undone,
    explained,
    failure_lab,
    threatened,
)
from tests.lab.migrating import Underway

NAME: Final = "lies"
MANIFEST: Final = f"/var/lib/migrate/containers/{NAME}/manifest.json"
PROGRAM: Final = ("env", f"PYTHONPATH={SOURCE_INSIDE}", "python3", "-m", "tests.lab.lying")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with failure_lab() as lab:
        yield lab


@pytest.fixture(scope="module")
def under(lab: Lab) -> Iterator[Threatened]:
    """One container for all of them, since each is undone."""
    with threatened(lab, NAME) as under:
        yield under


def told_by(lab: Lab, lie: str) -> str:
    """What the command says of its failure, which must be the target's."""
    arguments = [lie, NAME, "--to", "B"]
    lying = Underway(lab.host("A"), NAME, arguments, env=None, program=PROGRAM)
    told = explained(lying.finish())
    assert (told.host, told.phase, told.container) == ("B", "restore", "runs on A")
    return told.error


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ("page", " is another one than the manifest's"),
        ("image", " is another one than the manifest's"),
        ("file-too-many", ".img is not in the manifest"),
        ("stream-too-many", "stream 0 is not in the manifest"),
        ("another-target", "the manifest is of target C, this session of B"),
        ("another-session", "the manifest is of migration_id 0123456789ab, this session of"),
        ("an-old-epoch", "the manifest is of epoch 1, this session of"),
        ("expired", "the manifest expired"),
    ],
)
def test_a_lie(under: Threatened, lie: str, words: str) -> None:
    assert words in told_by(under.lab, lie)
    assert_undone(under)


def test_a_manifest_that_is_replayed(under: Threatened) -> None:
    """Signed by this very host, for this container, a moment ago."""
    lab = under.lab
    assert "the signature is not of this key" in told_by(lab, "replay")
    assert "the manifest is of migration_id" in told_by(lab, "replay")
    assert_undone(under)


def test_then_the_truth(under: Threatened) -> None:
    """Nothing of the lies is in its way, and whoever has the container can see who brought it."""
    assert_moves(under)
    host = under.lab.host("B")
    verified = host.run(["migrate", "verify", MANIFEST]).stdout.splitlines()
    assert verified[0].startswith(f"container {NAME}, migration ")
    assert verified[1].startswith("from A for B alone, made 20")
    assert verified[-1] == "signed by A: verified"
    path = host.path(MANIFEST)
    path.write_bytes(path.read_bytes().replace(b'"signature":"', b'"signature":"A', 1))
    refused = host.run(["migrate", "verify", MANIFEST], check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "the manifest" in refused.stderr
