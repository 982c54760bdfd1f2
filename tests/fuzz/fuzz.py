"""Fuzzes one reader of what a peer sends, guided by coverage; `scripts/fuzz` starts it.

    python3 -m tests.fuzz.fuzz TARGET --prepare DIRECTORY     writes DIRECTORY/seeds and /words
    python3 -m tests.fuzz.fuzz TARGET [libFuzzer's arguments]

Needs the optional group `fuzz` (atheris). Only this project's packages are instrumented: coverage
of libraries in C is not seen, so that targets of JSON bring a mutator of their own.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import atheris

from tests.fuzz.json_mutator import mutate

PACKAGES = ["transport", "criu_glue", "migrate"]


def main() -> None:
    name, *arguments = sys.argv[1:]
    with atheris.instrument_imports(include=PACKAGES):
        target = importlib.import_module(f"tests.fuzz.targets.{name}")
    if arguments[:1] == ["--prepare"]:
        prepare(target, Path(arguments[1]))
        return
    # A merge runs the program again, by sh(1) and with what it calls its name.
    program = f"{sys.executable} -m tests.fuzz.fuzz {name}"
    mutator = {"custom_mutator": mutate} if target.IS_JSON else {}
    limits = [f"-max_len={target.MAX_BYTES}", "-rss_limit_mb=256", "-timeout=10"]
    atheris.Setup([program, *limits, *arguments], target.one_input, **mutator)
    atheris.Fuzz()


def prepare(target: Any, directory: Path) -> None:
    """The target's own inputs as files, and its words in libFuzzer's form."""
    (directory / "seeds").mkdir(parents=True)
    for number, seed in enumerate(target.seeds()):
        (directory / "seeds" / str(number)).write_bytes(seed)
    words = ["".join(f"\\x{byte:02x}" for byte in word) for word in target.DICTIONARY]
    (directory / "words").write_text("".join(f'"{word}"\n' for word in words))


if __name__ == "__main__":
    main()
