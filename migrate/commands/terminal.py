"""What is asked at a terminal: yes or no, passwords, the authority's passphrase. Nothing is ever
taken from the environment or from arguments, which others can see."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from migrate.errors import UsageError
from transport import sealed_files

if TYPE_CHECKING:
    from pathlib import Path


class Terminal:
    """Somebody at a terminal (`transport.ssh.asking.Prompts`)."""

    def confirm(self, text: str) -> bool:
        """Whether the answer is yes."""
        return click.confirm(text, default=False, err=True)

    def secret(self, text: str) -> str:
        """Typed without an echo."""
        answer: str = click.prompt(text, hide_input=True, default="", show_default=False, err=True)
        return answer


def terminal() -> Terminal | None:
    """None where nobody can be asked."""
    return Terminal() if sys.stdin.isatty() and sys.stderr.isatty() else None


def passphrase(file: Path | None, question: str = "passphrase of the fleet's authority") -> bytes:
    """From a file that only its owner can read, or typed. Raises UsageError."""
    if file is not None:
        try:
            return sealed_files.read_secret(file).rstrip(b"\r\n")
        except OSError as error:
            raise UsageError(f"the passphrase can't be read: {error}") from error
    somebody = terminal()
    if somebody is None:
        raise UsageError(
            "nobody can be asked for the passphrase", remedy="give it by --passphrase-file FILE"
        )
    return somebody.secret(question).encode()
