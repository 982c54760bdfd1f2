"""A userfaultfd of a task's memory: opened inside the task, brought out, registered with mappings.

    in the task   userfaultfd(2), by a thread of it that `criu_glue.ptrace` borrows
    here          pidfd_getfd(2): our own descriptor of it
    in the task   close(2): the container's view of its files is unchanged

A userfaultfd belongs to the memory of the task that created it; no other process can create one
for it. Knows nothing of scanning.
"""

from __future__ import annotations

import errno
import functools
import math
import os
from typing import Final

from criu_glue import kernel, ptrace
from criu_glue.errors import (
    InjectionError,
    TaskBusyError,
    TaskGoneError,
    TrackerError,
    TrackerUnsupportedError,
)
from criu_glue.mappings import Task

# WP_UNPOPULATED: PAGEMAP_SCAN refuses to protect anonymous memory without it
# (fs/proc/task_mmu.c: pagemap_scan_test_walk).
_FEATURES: Final = (
    kernel.UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | kernel.UFFD_FEATURE_WP_UNPOPULATED
    | kernel.UFFD_FEATURE_WP_ASYNC
)
# USER_MODE_ONLY needs no capability in the container (vm.unprivileged_userfaultfd), and costs
# nothing: an asynchronous fault is never handed to user space.
_OPEN_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK | kernel.UFFD_USER_MODE_ONLY
# A thread in uninterruptible sleep can't be stopped; of these many one will be.
_THREADS_TRIED_MAX: Final = 3
# pidfd_open(2), Linux >= 6.9: a thread rather than a process.
_PIDFD_THREAD: Final = os.O_EXCL


class TrackedTask:
    """One task and the userfaultfd of its memory (-1: none).

    soft_dirty_pages: at most so many pages of it have a soft-dirty bit; infinite when nobody knows.
    """

    __slots__ = (
        "reopened",
        "seen_protected",
        "soft_dirty_pages",
        "task",
        "thread",
        "uffd",
        "vpid",
    )

    def __init__(self, pid: int) -> None:
        self.task = Task(pid)
        try:
            self.vpid = self.task.vpid()
        except TaskGoneError:
            self.task.close()
            raise
        self.uffd = -1
        self.soft_dirty_pages: float = math.inf
        self.begin()

    def begin(self) -> None:
        """A new collect. Raises TaskGoneError if the task has no memory (any more)."""
        self.thread = self.task.living_thread()
        self.reopened = False
        self.seen_protected = False

    def reopen(self) -> None:
        """Get a userfaultfd of the memory that the task has now. What the old one protected is
        let go. Raises InjectionError, TaskGoneError, TrackerUnsupportedError."""
        self.close_uffd()
        self.reopened = True
        uffd = _open_in_task(self.task)
        try:
            kernel.ioctl(
                uffd, kernel.UFFDIO_API, kernel.UffdioApi(api=kernel.UFFD_API, features=_FEATURES)
            )
        except OSError as error:
            os.close(uffd)
            raise TrackerUnsupportedError(
                "userfaultfd has no asynchronous write-protection (Linux >= 6.7)"
            ) from error
        self.uffd = uffd

    def register(self, start: int, end: int) -> bool:
        """Put a mapping under the userfaultfd, opening a new one if the program was replaced.

        False where that is impossible: a kind of memory that can't be protected, a userfaultfd
        of the program's own, or mappings that have changed since they were read.
        """
        if self.uffd < 0:
            return False
        argument = kernel.UffdioRegister(
            start=start, len=end - start, mode=kernel.UFFDIO_REGISTER_MODE_WP
        )
        try:
            kernel.ioctl(self.uffd, kernel.UFFDIO_REGISTER, argument)
        except OSError as error:
            # userfaultfd_register() answers ENOMEM when its memory is gone: execve(2), exit.
            if error.errno == errno.ENOMEM and not self.reopened:
                self.reopen()
                return self.register(start, end)
            if error.errno in (errno.ENOMEM, errno.EINVAL, errno.EBUSY, errno.EPERM):
                return False
            raise TrackerError(f"UFFDIO_REGISTER in task {self.task.pid}: {error}") from error
        return True

    def close_uffd(self) -> None:
        """The kernel unregisters what is registered and removes every protection."""
        if self.uffd >= 0:
            os.close(self.uffd)
            self.uffd = -1

    def close(self) -> None:
        self.close_uffd()
        self.task.close()


def _open_in_task(task: Task) -> int:
    """A userfaultfd of the task's memory, made by a thread of it."""
    states = {}
    for thread in task.threads():
        try:
            states[thread] = task.thread_state(thread)
        except TaskGoneError:
            continue
    threads = sorted(
        (thread for thread, state in states.items() if state not in "ZX"),
        key=lambda thread: states[thread] == "D",
    )
    failure: InjectionError | TaskGoneError = TaskGoneError(f"task {task.pid} has exited")
    for thread in threads[:_THREADS_TRIED_MAX]:
        try:
            return ptrace.run_in_thread(task, thread, functools.partial(_take_userfaultfd, task))
        except TaskBusyError:
            raise
        except (InjectionError, TaskGoneError) as error:
            failure = error
    raise failure


def _take_userfaultfd(task: Task, thread: ptrace.TracedThread) -> int:
    theirs = thread.call(kernel.SYS_USERFAULTFD, _OPEN_FLAGS)
    if theirs < 0:
        reason = f"userfaultfd in thread {thread.tid}: {os.strerror(-theirs)}"
        if theirs == -errno.ENOSYS:
            raise TrackerUnsupportedError(reason)
        raise InjectionError(reason)
    try:
        pidfd = _pidfd(task, thread.tid)
        try:
            return kernel.pidfd_getfd(pidfd, theirs)
        finally:
            os.close(pidfd)
    except OSError as error:
        raise InjectionError(f"fetching the userfaultfd of thread {thread.tid}: {error}") from error
    finally:
        thread.call(kernel.SYS_CLOSE, theirs)


def _pidfd(task: Task, tid: int) -> int:
    if tid == task.pid:
        return os.pidfd_open(tid)
    try:
        return os.pidfd_open(tid, _PIDFD_THREAD)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.pidfd_open(task.pid)
