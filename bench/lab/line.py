"""The line: what hosts send travels through it when it shall be late, lost or out of order.

    host's uplink === wireN --(read)--> queue, by Fault --(write)--> lineN === slowN in the bridge
    host's uplink === wireN <-------------(at once)----------------- lineN === slowN in the bridge

`tc netem` would do it in the kernel; many kernels of virtual machines are built without it. Frames
carry a virtio header in both directions (PACKET_VNET_HDR, packet(7)), so that large segments and
unfinished checksums pass as they are. Runs as a forked child of the keeper for each host, in the
wire; the keeper tells it of a new Fault over a socket.
"""

from __future__ import annotations

import heapq
import json
import os
import random
import select
import signal
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from bench.lab import kernel
from bench.lab.errors import LabError
from bench.lab.plan import Node

# linux/if_packet.h, linux/if_ether.h
SOL_PACKET = 263
PACKET_VNET_HDR = 15
PACKET_IGNORE_OUTGOING = 23
ETH_P_ALL = 0x0003
# asm/socket.h: SO_RCVBUF beyond the machine's limit, which root may ask for.
SO_RCVBUFFORCE = 33
# The largest segment (64 KiB) with its Ethernet and virtio headers.
FRAME_BYTES_MAX = 65536 + 64
# What a link of 10 Gbit/s brings in 50 ms; more is dropped, as a router would.
QUEUE_BYTES_MAX = 64 << 20
# The receive buffer bridges the moments in which this process does not run.
RECEIVE_BUFFER_BYTES = 16 << 20
# A Fault as JSON.
ORDER_BYTES_MAX = 4096
# Frames taken from one socket before the others have their turn.
FRAMES_PER_TURN = 64


# How much later than others a frame leaves that is to be overtaken: some round trips of a lab.
REORDER_S = 0.005


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to the frames that a host sends: all are late by `delay_ms`, a share of `loss`
    never arrives, and a share of `reorder` leaves later than what was sent behind it."""

    delay_ms: float = 0.0
    loss: float = 0.0
    reorder: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.delay_ms <= 60_000 and 0 <= self.loss <= 1 and 0 <= self.reorder <= 1):
            raise LabError(f"{self}: 0 to 60000 ms, and shares between 0 and 1")


@dataclass(slots=True)
class LineQueue:
    """Frames with the time at which each is due. Pure: the same seed loses the same frames."""

    fault: Fault
    bytes_max: int = QUEUE_BYTES_MAX
    queued_bytes: int = 0
    _chance: random.Random = field(default_factory=random.Random)
    _frames: list[tuple[float, int, bytes]] = field(default_factory=list)
    _count: int = 0

    def __post_init__(self) -> None:
        self.change(self.fault)

    def change(self, fault: Fault) -> None:
        """From now on; what is queued leaves as it was to."""
        self.fault = fault
        self._chance.seed(fault.seed)

    def push(self, frame: bytes, now_s: float) -> bool:
        """Takes a frame; False when it is lost: by chance, or since the queue is full."""
        fault = self.fault
        if fault.loss and self._chance.random() < fault.loss:
            return False
        if self.queued_bytes + len(frame) > self.bytes_max:
            return False
        due_s = now_s + fault.delay_ms / 1000
        if fault.reorder and self._chance.random() < fault.reorder:
            due_s += REORDER_S
        self.queued_bytes += len(frame)
        self._count += 1
        heapq.heappush(self._frames, (due_s, self._count, frame))
        return True

    def pop_due(self, now_s: float) -> Iterable[bytes]:
        while self._frames and self._frames[0][0] <= now_s:
            frame = heapq.heappop(self._frames)[2]
            self.queued_bytes -= len(frame)
            yield frame

    def due_s(self) -> float | None:
        """When the next frame is due; None when there is none."""
        return self._frames[0][0] if self._frames else None


@dataclass(frozen=True, slots=True)
class Line:
    """A line that runs. `change` takes effect with the next frame."""

    pid: int
    _orders: socket.socket

    def change(self, fault: Fault) -> None:
        self._orders.send(json.dumps(asdict(fault)).encode())

    def end(self) -> None:
        """Not yet reaped, so the pid is still the child's."""
        self._orders.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def start(node: Node, fault: Fault) -> Line:
    """Forks the line of a node's link, which exists. It ends with this thread."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Opened before the fork: frames count from the moment that this returns.
    with theirs, _open(node.wire_end) as host_end, _open(node.line_end) as bridge_end:
        pid = os.fork()
        if pid == 0:
            try:
                kernel.die_with_parent()
                _run(host_end, bridge_end, theirs, LineQueue(fault))
            finally:
                os._exit(1)
    return Line(pid, ours)


def _open(device: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    end.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    end.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    end.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
    end.setblocking(False)
    end.bind((device, ETH_P_ALL))
    return end


def _run(
    host_end: socket.socket, bridge_end: socket.socket, orders: socket.socket, queue: LineQueue
) -> None:
    clock = time.monotonic
    while True:
        due_s = queue.due_s()
        wait_s = None if due_s is None else max(0.0, due_s - clock())
        readable = select.select([host_end, bridge_end, orders], [], [], wait_s)[0]
        if orders in readable:
            queue.change(Fault(**json.loads(orders.recv(ORDER_BYTES_MAX))))
        if host_end in readable:
            for frame in _frames(host_end):
                queue.push(frame, clock())
        if bridge_end in readable:
            for frame in _frames(bridge_end):
                _send(host_end, frame)
        for frame in queue.pop_due(clock()):
            _send(bridge_end, frame)


def _frames(end: socket.socket) -> Iterable[bytes]:
    for _ in range(FRAMES_PER_TURN):
        try:
            yield end.recv(FRAME_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            # ENETDOWN: the link was taken down, or the host with its end of it is gone.
            return


def _send(end: socket.socket, frame: bytes) -> None:
    try:
        end.send(frame)
    except OSError:
        # A full queue or a link that is down loses frames; a network may.
        return
