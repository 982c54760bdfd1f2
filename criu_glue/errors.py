"""What this package raises: one base class, one sentence each."""

from __future__ import annotations


class CriuGlueError(Exception):
    """Something about CRIU, its images or the memory of tasks failed."""


class TrackerError(CriuGlueError):
    """Pages written by a container can't be told apart from the others (any more)."""


class TrackerUnsupportedError(TrackerError):
    """The kernel does not offer what a dirty tracker needs."""


class TaskGoneError(CriuGlueError):
    """The task has exited (or its pid now belongs to another one). Callers usually just drop it."""


class InjectionError(TrackerError):
    """A system call could not be run inside a task; the task itself goes on untouched."""


class TaskBusyError(InjectionError):
    """Somebody else (a debugger, strace, another migration) already traces the task."""


class LimitExceededError(CriuGlueError):
    """A container is larger than a limit of this package allows."""
