"""Which files belong to a checkpoint: the names that CRIU and the runtimes give their images.

An allow-list, because a peer sends these names. What is not named here does not travel: logs, the
`parent` link, sockets, statistics. Pure. Source: criu/image-desc.c (imgset_template), runc
libcontainer/criu_linux.go and crun src/libcrun/criu.c (descriptors.json).
"""

from __future__ import annotations

import re
from typing import Final

DESCRIPTORS_NAME: Final = "descriptors.json"

_SINGLE: Final = (
    "inventory reg-files ext-files ns-files eventfd eventpoll eventpoll-tfd signalfd inotify "
    "inotify-wd fanotify fanotify-mark pipes pipes-data fifo fifo-data pstree unixsk inetsk "
    "packetsk netlinksk sk-queues remap-fpath memfd binfmt-misc tty tty-info tty-data filelocks "
    "tunfile cgroup timerfd cpuinfo seccomp files bpfmap-file bpfmap-data apparmor pidfd"
)
_NUMBERED: Final = (
    "fdinfo pagemap pagemap-shmem core ids mm vmas sigacts itimers posix-timers creds utsns "
    "ipcns-var ipcns-shm ipcns-msg ipcns-sem fs mountpoints netdev netns ifaddr route route6 rule "
    "iptables ip6tables nftables autofs rlimit pages signal-s signal-p userns netns-ct netns-exp "
    "timens pidns tmpfs-dev tmpfs"
)
_HEXADECIMAL: Final = "ghost-file tcp-stream"
_ARCHIVED: Final = ("tmpfs-dev", "tmpfs")

_IMAGE: Final = re.compile(
    "(?:{}|(?:{})-[0-9]{{1,20}}|(?:{})-[0-9]{{1,20}}\\.tar\\.gz|(?:{})-[0-9a-f]{{1,8}})\\.img".format(
        "|".join(_SINGLE.split()),
        "|".join(name for name in _NUMBERED.split() if name not in _ARCHIVED),
        "|".join(_ARCHIVED),
        "|".join(_HEXADECIMAL.split()),
    )
)
_TASK_PAGEMAP: Final = re.compile(r"pagemap-([1-9][0-9]{0,6})\.img")


def is_image_name(name: str) -> bool:
    """Whether a file of this name belongs to a checkpoint and may travel."""
    return name == DESCRIPTORS_NAME or _IMAGE.fullmatch(name) is not None


def task_of_pagemap(name: str) -> int | None:
    """The task whose pagemap has this name; None for every other file, shared memory's too."""
    match = _TASK_PAGEMAP.fullmatch(name)
    return int(match[1]) if match else None
