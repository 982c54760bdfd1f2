"""What can go wrong in the lab."""

from __future__ import annotations


class LabError(Exception):
    """The lab could not be made, found, used or removed."""


class LabCommandError(LabError):
    """A command inside a lab host ended with another status than 0, or not in time.

    The message carries the command and the tail of what it wrote, so that a failed test shows it.
    """

    def __init__(self, host: str, command: str, outcome: str, stdout: str, stderr: str) -> None:
        self.stdout = stdout
        self.stderr = stderr
        tails = [
            f"{label}: {text[-4000:]}"
            for label, text in (("stdout", stdout), ("stderr", stderr))
            if text
        ]
        super().__init__("\n".join([f"on {host}: {command}: {outcome}", *tails]))
