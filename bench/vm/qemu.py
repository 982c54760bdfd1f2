"""The command line of a machine's QEMU. Pure.

    management ──tap── eth1   commands, by SSH: link-local, the same address in every machine
    uplink ─────tap── eth0    the lab's network
    disk ──────virtio-blk── /dev/vda

A snapshot can be loaded only into the devices that it was saved from, so machine type, devices and
their order are the same for everybody who asks here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PROGRAM = "qemu-system-x86_64"
# The first whose emulated processor (with TYPE's) has not corrupted the guest: docs/facts.md.
VERSION_MIN = (10, 0)
TYPE = "pc-q35-10.0"
# cx16: what an older QEMU emulates wrongly. The guest does without.
PROCESSOR = "max,cx16=off"
MEMORY_MIB = 1280
# Translated code; QEMU's own default is a share of this machine's memory.
TRANSLATION_MIB = 256
# madvise: otherwise the kernel notices writes to 2 MiB and not to a page. No ifnames: eth0, eth1.
KERNEL_LINE = (
    "root=/dev/vda rw console=ttyS0 quiet net.ifnames=0 panic=-1 mitigations=off"
    " transparent_hugepage=madvise systemd.show_status=no"
)
UPLINK_MAC = "52:54:00:77:00:01"
MANAGEMENT_MAC = "52:54:00:77:00:02"
SNAPSHOT = "up"


@dataclass(frozen=True, slots=True)
class Wiring:
    """What of this machine a virtual one uses. The taps exist in QEMU's network namespace."""

    image: Path  # directory that build has made, for kernel and initrd
    disk: Path  # qcow2, written to
    console: Path  # what its kernel prints
    uplink: str
    management: str


def command(wiring: Wiring, *more: str) -> list[str]:
    """QEMU in the foreground, which boots the machine; `more` is added."""
    return [
        *(PROGRAM, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", TYPE, "-cpu", PROCESSOR, "-smp", "1", "-m", str(MEMORY_MIB)),
        *("-accel", f"tcg,thread=multi,tb-size={TRANSLATION_MIB}"),
        *("-kernel", str(wiring.image / "kernel"), "-initrd", str(wiring.image / "initrd")),
        *("-append", KERNEL_LINE, "-serial", f"file:{wiring.console}"),
        *("-drive", _drive(wiring)),
        # Random numbers, and new ones in every machine that starts from the same memory.
        *("-device", "virtio-rng-pci", "-device", "vmgenid,guid=auto"),
        *_network("uplink", wiring.uplink, UPLINK_MAC),
        *_network("management", wiring.management, MANAGEMENT_MAC),
        *more,
    ]


def _drive(wiring: Wiring) -> str:
    """The file that is written to may be a copy in another directory: it says not what it is of."""
    below = f"backing.driver=raw,backing.file.driver=file,backing.file.filename={wiring.image}/disk"
    return f"file={wiring.disk},format=qcow2,if=virtio,cache=unsafe,discard=unmap,{below}"


def _network(name: str, tap: str, mac: str) -> list[str]:
    return [
        *("-netdev", f"tap,id={name},ifname={tap},script=no,downscript=no"),
        *("-device", f"virtio-net-pci,netdev={name},mac={mac},romfile="),
    ]
