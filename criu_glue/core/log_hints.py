"""Placeholder until the real table arrives: API used by migrate: explain(text) -> Hint(line, remedy)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hint:
    line: str
    remedy: str


def explain(text: str) -> Hint:
    for line in text.splitlines():
        if "Error (" in line and "rlimit" not in line:
            return Hint(line, "")
    return Hint("", "")
