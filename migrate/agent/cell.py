"""Executes a program in a cell: `python3 -m migrate.agent.cell DIRECTORY... -- PROGRAM ARGUMENT...`

It can write into these directories only; see lockdown.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from migrate.agent.lockdown import enter_cell


def main() -> None:
    """Become the program."""
    at = sys.argv.index("--")
    command = sys.argv[at + 1 :]
    # The program has words of its own for one that is missing.
    enter_cell([path for path in map(Path, sys.argv[1:at]) if path.is_dir()])
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
