"""Bindings to the few system calls that Python has no function for, and their constants.

Shared by the trackers, the task memory and the pager. Knows no policy: each function is one
system call, raises OSError with the kernel's errno, and releases the GIL while it runs.
x86-64 only, like the rest of the package. Numbers are from the kernel's uapi headers
`linux/userfaultfd.h`, `linux/fs.h` (PAGEMAP_SCAN) and `asm/unistd_64.h`.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PAGE_BYTES: Final = 4096
# uio(7): iovecs that one readv-like call may be given; the kernel's UIO_MAXIOV.
IOV_MAX: Final = 1024

# -- system call numbers --
SYS_CLOSE: Final = 3
SYS_KCMP: Final = 312
SYS_USERFAULTFD: Final = 323
SYS_PIDFD_GETFD: Final = 438

# -- userfaultfd(2) --
UFFD_USER_MODE_ONLY: Final = 1
UFFD_API: Final = 0xAA

UFFD_FEATURE_PAGEFAULT_FLAG_WP: Final = 1 << 0
UFFD_FEATURE_WP_UNPOPULATED: Final = 1 << 13
UFFD_FEATURE_WP_ASYNC: Final = 1 << 15

UFFDIO_REGISTER_MODE_WP: Final = 1 << 1


# -- kcmp(2): "the same memory?" --
KCMP_VM: Final = 1

# -- PAGEMAP_SCAN, Documentation/admin-guide/mm/pagemap.rst --
PM_SCAN_WP_MATCHING: Final = 1 << 0
PM_SCAN_CHECK_WPASYNC: Final = 1 << 1

PAGE_IS_WRITTEN: Final = 1 << 1
PAGE_IS_PRESENT: Final = 1 << 3
PAGE_IS_SWAPPED: Final = 1 << 4
PAGE_IS_PFNZERO: Final = 1 << 5
# Linux >= 6.15; EINVAL before.
PAGE_IS_GUARD: Final = 1 << 8


class UffdioApi(ctypes.Structure):
    """struct uffdio_api"""

    _fields_ = (
        ("api", ctypes.c_uint64),
        ("features", ctypes.c_uint64),
        ("ioctls", ctypes.c_uint64),
    )


class UffdioRange(ctypes.Structure):
    """struct uffdio_range: argument of UFFDIO_UNREGISTER and UFFDIO_WAKE"""

    _fields_ = (("start", ctypes.c_uint64), ("len", ctypes.c_uint64))


class UffdioRegister(ctypes.Structure):
    """struct uffdio_register"""

    _fields_ = (
        ("start", ctypes.c_uint64),
        ("len", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("ioctls", ctypes.c_uint64),
    )


class UffdioCopy(ctypes.Structure):
    """struct uffdio_copy; `copy` returns the bytes copied or a negative errno"""

    _fields_ = (
        ("dst", ctypes.c_uint64),
        ("src", ctypes.c_uint64),
        ("len", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("copy", ctypes.c_int64),
    )


class UffdioZeropage(ctypes.Structure):
    """struct uffdio_zeropage; `zeropage` returns the bytes zeroed or a negative errno"""

    _fields_ = (
        ("start", ctypes.c_uint64),
        ("len", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("zeropage", ctypes.c_int64),
    )


class PmScanArg(ctypes.Structure):
    """struct pm_scan_arg; `vec` is the address of `vec_len` regions of three u64 each:
    start, end, categories."""

    _fields_ = (
        ("size", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("walk_end", ctypes.c_uint64),
        ("vec", ctypes.c_uint64),
        ("vec_len", ctypes.c_uint64),
        ("max_pages", ctypes.c_uint64),
        ("category_inverted", ctypes.c_uint64),
        ("category_mask", ctypes.c_uint64),
        ("category_anyof_mask", ctypes.c_uint64),
        ("return_mask", ctypes.c_uint64),
    )


_IOC_READ: Final = 2
_IOC_WRITE: Final = 1


def _ioc(direction: int, kind: int, number: int, size_bytes: int) -> int:
    return direction << 30 | size_bytes << 16 | kind << 8 | number


def _iowr(kind: int, number: int, argument: type[ctypes.Structure]) -> int:
    return _ioc(_IOC_READ | _IOC_WRITE, kind, number, ctypes.sizeof(argument))


def _ior(kind: int, number: int, argument: type[ctypes.Structure]) -> int:
    return _ioc(_IOC_READ, kind, number, ctypes.sizeof(argument))


UFFDIO_API: Final = _iowr(UFFD_API, 0x3F, UffdioApi)
UFFDIO_REGISTER: Final = _iowr(UFFD_API, 0x00, UffdioRegister)
UFFDIO_UNREGISTER: Final = _ior(UFFD_API, 0x01, UffdioRange)
UFFDIO_WAKE: Final = _ior(UFFD_API, 0x02, UffdioRange)
UFFDIO_COPY: Final = _iowr(UFFD_API, 0x03, UffdioCopy)
UFFDIO_ZEROPAGE: Final = _iowr(UFFD_API, 0x04, UffdioZeropage)
PAGEMAP_SCAN: Final = _iowr(ord("f"), 16, PmScanArg)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_vm_arguments = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
)
_libc.process_vm_readv.argtypes = _vm_arguments
_libc.process_vm_readv.restype = ctypes.c_ssize_t


def _failure(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def ioctl(fd: int, request: int, argument: ctypes.Structure) -> int:
    """ioctl(2) with a structure that the kernel reads and writes, also when the call fails.

    Unlike `fcntl.ioctl` this leaves no doubt about that: `UffdioCopy.copy` is valid after EAGAIN
    and EEXIST. Returns the call's result; raises OSError.
    """
    result = int(_libc.ioctl(fd, request, ctypes.byref(argument)))
    if result < 0:
        raise _failure("ioctl")
    return result


def pidfd_getfd(pidfd: int, target_fd: int) -> int:
    """pidfd_getfd(2): a duplicate of another process's descriptor (`os.pidfd_open` for the pidfd).
    Close-on-exec is set on it."""
    fd = int(_libc.syscall(SYS_PIDFD_GETFD, pidfd, target_fd, 0))
    if fd < 0:
        raise _failure("pidfd_getfd")
    return fd


def kcmp_memory(pid: int, other_pid: int) -> int:
    """kcmp(2) with KCMP_VM: negative, 0 or positive as the memory of one task is ordered before,
    is the same as, or is ordered behind that of the other. The order is arbitrary but total."""
    order = int(_libc.syscall(SYS_KCMP, pid, other_pid, KCMP_VM, 0, 0))
    if order < 0:
        raise _failure("kcmp")
    # linux/kcmp.h, kcmp_ptr(): 0 equal, 1 less, 2 greater
    return (0, -1, 1)[order]


def process_vm_readv(
    pid: int, local_address: int, bytes_: int, remote: npt.NDArray[np.uint64]
) -> int:
    """process_vm_readv(2) into one local buffer.

    `remote`: C-contiguous, shape (n, 2), n <= IOV_MAX, columns [address, bytes]: struct iovec.
    Returns the bytes read, which is fewer than asked when a remote page can't be read; raises
    OSError when not even the first one can (EFAULT), or the process is gone (ESRCH).
    """
    local = (ctypes.c_uint64 * 2)(local_address, bytes_)
    count = int(
        _libc.process_vm_readv(pid, ctypes.byref(local), 1, remote.ctypes.data, len(remote), 0)
    )
    if count < 0:
        raise _failure("process_vm_readv")
    return count
