"""What a machine's kernel has to say when it is ill. Pure."""

from __future__ import annotations

import re

FAULT = re.compile(
    r"Oops|\bBUG\b|Kernel panic|Call Trace|WARNING: CPU|soft lockup|blocked for more than"
)
# A fault is explained by what follows it.
LINES_AFTER = 30


def faults(console: str) -> str:
    """The excerpt from the first fault on; empty when there is none."""
    lines = console.splitlines()
    for number, line in enumerate(lines):
        if FAULT.search(line):
            return "\n".join(lines[number : number + LINES_AFTER])
    return ""
