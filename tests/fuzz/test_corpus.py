"""What fuzzing has found worth keeping is read again by each run of the tests."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
TARGETS = sorted(path.stem for path in (HERE / "targets").glob("*.py"))
CHANGES = 300


def target(name: str) -> Any:
    return importlib.import_module(f"tests.fuzz.targets.{name}")


def inputs(name: str) -> list[tuple[str, bytes]]:
    """Seeds and kept inputs, with names for whoever has to look for one."""
    kept = sorted((HERE / "corpus" / name).iterdir())
    seeds = [(f"seed {number}", seed) for number, seed in enumerate(target(name).seeds())]
    return seeds + [(path.name, path.read_bytes()) for path in kept]


def read(one_input: Callable[[bytes], None], name: str, data: bytes) -> None:
    try:
        one_input(data)
    except Exception as error:
        error.add_note(f"on the input {name}: {data[:200].hex()}")
        raise


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_that_were_kept(name: str) -> None:
    known = inputs(name)
    assert len(known) > len(list(target(name).seeds())), "the corpus is empty"
    for source, data in known:
        read(target(name).one_input, source, data)


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_that_are_damaged(name: str) -> None:
    """A few changes of each kind, the same in every run: where atheris is not there."""
    chance = random.Random(name)
    known = inputs(name)
    for number in range(CHANGES):
        source, data = chance.choice(known)
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.randrange(len(damaged)) if damaged else 0
            match chance.randrange(3):
                case 0 if damaged:
                    damaged[at] = chance.randrange(256)
                case 1:
                    del damaged[at : at + chance.choice((1, 8))]
                case _:
                    damaged[at:at] = chance.randbytes(chance.choice((1, 8)))
        read(target(name).one_input, f"{source}, changed ({number})", bytes(damaged))
