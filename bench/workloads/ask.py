"""Asks a workload with a line protocol (memory, tree, blocker) and prints its answers.

    python3 -m bench.workloads.ask ADDRESS PORT LINE [LINE ...]

One connection, the lines in order, one line of answer each.
"""

from __future__ import annotations

import argparse
import socket
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ANSWER_S = 30.0
"""VERIFY of some GiB on a busy machine takes seconds."""
ANSWER_BYTES_MAX = 64 * 1024


class WorkloadError(Exception):
    """A workload could not be reached, or its answer is not what it must be."""


def ask(address: str, port: int, lines: Sequence[str], timeout_s: float = ANSWER_S) -> list[str]:
    """The answers to these lines, in order. Raises WorkloadError."""
    where = f"workload at {address} port {port}"
    answers = []
    try:
        with (
            socket.create_connection((address, port), timeout=timeout_s) as connection,
            connection.makefile("rb") as stream,
        ):
            connection.sendall("".join(line + "\n" for line in lines).encode())
            for line in lines:
                answer = stream.readline(ANSWER_BYTES_MAX)
                if not answer.endswith(b"\n"):
                    raise WorkloadError(f"{where}: no whole answer to {line!r}: {answer[:200]!r}")
                answers.append(answer.decode("utf-8", "replace").rstrip("\n"))
    except OSError as error:
        raise WorkloadError(f"{where}: {error}") from error
    return answers


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.workloads.ask", description="Ask a workload.")
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("lines", nargs="+", metavar="LINE")
    parser.add_argument("--timeout-s", type=float, default=ANSWER_S)
    options = parser.parse_args(arguments)
    try:
        answers = ask(options.address, options.port, options.lines, options.timeout_s)
    except WorkloadError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(answers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
