"""Boots a machine once and saves its memory, so that no lab has to wait for a boot.

    python3 -m bench.vm.snapshot DIRECTORY      with disk, kernel and initrd; adds memory

Part of scripts/setup, before there is an environment: the standard library alone.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from bench.vm import console, qemu

# Emulated, on a loaded machine: half a minute as a rule.
BOOT_DEADLINE_S = 300.0
POLL_S = 0.1
UP = "MACHINE UP"
CLONE_NEWNET = 0x40000000


class SnapshotError(Exception):
    """The machine did not come up, or could not be saved."""


def make(image: Path) -> None:
    """Adds `memory` to the directory."""
    disk, log = image / "memory", image / "console"
    backing = ["-F", "raw", "-b", "disk"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(disk)], check=True)
    _leave_network()
    for tap in ("uplink", "management"):
        subprocess.run(["ip", "tuntap", "add", "dev", tap, "mode", "tap"], check=True)
        subprocess.run(["ip", "link", "set", tap, "up"], check=True)
    wiring = qemu.Wiring(image, disk, log, "uplink", "management")
    with subprocess.Popen(
        qemu.command(wiring, "-qmp", "stdio"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as machine:
        try:
            _wait_up(machine, log)
            _save(machine)
        finally:
            machine.kill()
    log.unlink()


def _leave_network() -> None:
    """For good: a network namespace for this process, without anything outside."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        raise SnapshotError("no network namespace of its own")


def _wait_up(machine: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + BOOT_DEADLINE_S
    while UP not in (text := log.read_text(errors="replace") if log.exists() else ""):
        faults = console.faults(text)
        if faults or machine.poll() is not None or time.monotonic() > deadline_s:
            raise SnapshotError(f"the machine does not come up: {faults or text[-4000:]}")
        time.sleep(POLL_S)


def _save(machine: subprocess.Popen[bytes]) -> None:
    assert machine.stdin is not None
    assert machine.stdout is not None
    monitor = (machine.stdin, machine.stdout)
    machine.stdout.readline()  # its greeting
    _ask(*monitor, "qmp_capabilities")
    said = _ask(*monitor, "human-monitor-command", {"command-line": f"savevm {qemu.SNAPSHOT}"})
    if said:
        raise SnapshotError(f"QEMU could not save the machine: {said}")
    _ask(*monitor, "quit")
    machine.wait()


def _ask(to: IO[bytes], answers: IO[bytes], execute: str, arguments: Any = None) -> Any:
    """One command of QMP; events between are of no interest."""
    to.write(json.dumps({"execute": execute, "arguments": arguments or {}}).encode() + b"\n")
    to.flush()
    for line in answers:
        answer = json.loads(line)
        if "error" in answer:
            raise SnapshotError(f"QEMU: {execute}: {answer['error']}")
        if "return" in answer:
            return answer["return"]
    raise SnapshotError(f"QEMU ended at {execute}")


def main() -> int:
    try:
        make(Path(sys.argv[1]))
    except (SnapshotError, OSError, subprocess.SubprocessError) as error:
        print(f"snapshot: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
