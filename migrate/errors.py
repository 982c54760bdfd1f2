# ruff: noqa: N818 - a name says what happened ("dump failed"); "Error" behind it says nothing
"""The errors that a user of this project meets, and what a process exits with for each.

An error says what failed, on which host, in which phase, whether the container runs and where,
and what to do next, in that order. This module is pure (the core raises from it too): it knows
neither terminals nor logs, and nothing of CRIU or of sockets; errors of the packages below are
translated into these with `raise ... from`.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1
"""It failed and was undone: the container runs where it ran before."""
EXIT_REFUSED: Final = 2
"""Refused before anything was touched: wrong usage, or preflight found a blocker."""
EXIT_IN_DOUBT: Final = 3
"""The container is held and this process cannot decide alone: its operator has to."""
EXIT_PARTLY: Final = 4
"""Some of the copies that were asked for run, and the others are not there."""


def runs_on(host: str) -> str:
    """The container's state in the words that every error uses for it."""
    return f"runs on {host}"


def held_on(host: str) -> str:
    """Frozen or restored, alive, and executing nothing on `host`."""
    return f"is held on {host}"


class MigrateError(Exception):
    """The base of every error of the package `migrate`.

    message: what failed, a sentence without a full stop. host: where it failed. phase: the step
    of the migration, in the words of the state machines. container_state: a predicate whose
    subject is the container ("runs on alpha"). remedy: what to do next. All but the message may
    be empty, for code that does not know them; whoever does adds them with `at`.
    """

    exit_code: ClassVar[int] = EXIT_FAILED

    def __init__(
        self,
        message: str,
        *,
        host: str = "",
        phase: str = "",
        container_state: str = "",
        remedy: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.host = host
        self.phase = phase
        self.container_state = container_state
        self.remedy = remedy

    def at(
        self, *, host: str = "", phase: str = "", container_state: str = "", remedy: str = ""
    ) -> MigrateError:
        """Fill in what is still empty and return the same error (what is known first is kept)."""
        self.host = self.host or host
        self.phase = self.phase or phase
        self.container_state = self.container_state or container_state
        self.remedy = self.remedy or remedy
        return self

    def fields(self) -> tuple[tuple[str, str], ...]:
        """(label, text) of what is known, in the order of every rendering, the message first."""
        known = (
            ("error", self.message),
            ("host", self.host),
            ("phase", self.phase),
            ("container", self.container_state),
            ("remedy", self.remedy),
        )
        return tuple((label, text) for label, text in known if text)

    def render(self) -> str:
        """Several lines for a terminal: the message, then one labelled line per known field."""
        _, *rest = self.fields()
        lines = [self.message]
        lines += [f"  {label + ':':<11}{text}" for label, text in rest]
        return "\n".join(lines)

    def __str__(self) -> str:
        """One line for a log."""
        where = ", ".join(
            f"{label} {text}"
            for label, text in (("host", self.host), ("phase", self.phase))
            if text
        )
        line = f"{self.message} ({where})" if where else self.message
        if self.container_state:
            line += f"; the container {self.container_state}"
        if self.remedy:
            line += f"; remedy: {self.remedy}"
        return line


def remedy_of(error: OSError) -> str:
    """What to do about a resource that has run out, by the number of an error of the system."""
    return _REMEDIES.get(error.errno or 0, "")


_REMEDIES: Final = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or raise the quota",
    errno.EROFS: "mount it writable",
    errno.EMFILE: "raise the limit of open files (ulimit -n; LimitNOFILE= of a service)",
    errno.ENFILE: "raise fs.file-max there",
    errno.ENOMEM: "free memory there",
    errno.EAGAIN: "raise the limit of processes there (ulimit -u; TasksMax= of a service)",
}


class UsageError(MigrateError):
    """The command line or a configuration file asks for something that cannot be."""

    exit_code = EXIT_REFUSED


class PreflightRefused(MigrateError):
    """A check before the migration found what would make it fail; nothing was touched.

    refusals: (code, message, remedy) of each blocker, the most important first.
    """

    exit_code = EXIT_REFUSED

    def __init__(
        self,
        refusals: Sequence[tuple[str, str, str]],
        *,
        host: str = "",
        phase: str = "preflight",
        container_state: str = "",
        remedy: str = "",
    ) -> None:
        self.refusals = tuple(refusals)
        blockers = "1 blocker" if len(self.refusals) == 1 else f"{len(self.refusals)} blockers"
        super().__init__(
            f"preflight found {blockers}",
            host=host,
            phase=phase,
            container_state=container_state,
            remedy=remedy,
        )

    def render(self) -> str:
        """The rendering of every error, and below it each blocker with its remedy."""
        lines = [super().render()]
        for code, message, remedy in self.refusals:
            lines.append(f"  - {message} [{code}]")
            if remedy:
                lines.append(f"    remedy: {remedy}")
        return "\n".join(lines)


class SessionRefused(PreflightRefused):
    """The target's policy or its own preflight refused the session; nothing was touched."""


class Unreachable(MigrateError):
    """The other host does not answer, or does not prove who it is."""


class ProtocolError(MigrateError):
    """The peer sent something that the protocol does not allow, or speaks another version."""


class TransferFailed(MigrateError):
    """Memory, image files or the root file system did not arrive completely."""


class DumpFailed(MigrateError):
    """The container could not be frozen or dumped on the source."""


class RestoreFailed(MigrateError):
    """The container could not be restored on the target."""


class CheckpointRefused(RestoreFailed):
    """A checkpoint is not what its signed manifest says, or the manifest is not to be believed."""


class NotConverging(MigrateError):
    """The container writes memory faster than it travels, and the user chose to give up then."""


class DeadlineExceeded(MigrateError):
    """A phase took longer than its limit."""


class Cancelled(MigrateError):
    """The user, or a shutdown of this process, asked for the migration to end before its commit."""


class RollbackFailed(MigrateError):
    """The migration failed and its undoing failed too: something is left behind on the source."""

    exit_code = EXIT_IN_DOUBT


class InDoubt(MigrateError):
    """The source has committed and does not know whether the target runs the container."""

    exit_code = EXIT_IN_DOUBT


class CopiesMissing(MigrateError):
    """Not all of the copies that were asked for could be made."""

    exit_code = EXIT_PARTLY


class JournalError(MigrateError):
    """The journal cannot be read or written; without it no ownership changes."""


class JournalUnusable(JournalError):
    """The journal could not be opened or begun: nothing was touched."""

    exit_code = EXIT_REFUSED


class InvalidTransition(MigrateError):
    """A state machine was given an event that its table has no row for; its state is unchanged."""

    def __init__(
        self, machine: str, state: str, event: str, history: Sequence[tuple[str, str]]
    ) -> None:
        self.machine = machine
        self.state = state
        self.event = event
        self.history = tuple(history)
        way = " ".join(
            f"{past_state!s} -{past_event!s}->" for past_state, past_event in self.history
        )
        super().__init__(
            f"the {machine} does not allow {event} in state {state} (way: {way or 'none'})",
            phase=state,
        )
