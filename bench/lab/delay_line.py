"""The delay line: holds back what hosts send by a fixed time, frame by frame.

    host's uplink === wireN --(read)--> queue of delay_ms --(write)--> lineN === slowN in the bridge
    host's uplink === wireN <-------------(at once)------------------- lineN === slowN in the bridge

`tc netem` would do it in the kernel; many kernels of virtual machines are built without it. Frames
carry a virtio header in both directions (PACKET_VNET_HDR, packet(7)), so that large segments and
unfinished checksums pass as they are. Runs as a forked child of the keeper for each host, in the
wire.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from bench.lab import kernel
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
# Frames taken from one socket before the others have their turn.
FRAMES_PER_TURN = 64


@dataclass(slots=True)
class DelayQueue:
    """Frames in the order in which they came, each with the time at which it is due. Pure."""

    delay_s: float
    bytes_max: int = QUEUE_BYTES_MAX
    queued_bytes: int = 0
    _frames: deque[tuple[float, bytes]] = field(default_factory=deque)

    def push(self, frame: bytes, now_s: float) -> bool:
        """Takes a frame; False when the queue is full and the frame is lost."""
        if self.queued_bytes + len(frame) > self.bytes_max:
            return False
        self.queued_bytes += len(frame)
        self._frames.append((now_s + self.delay_s, frame))
        return True

    def pop_due(self, now_s: float) -> Iterable[bytes]:
        while self._frames and self._frames[0][0] <= now_s:
            frame = self._frames.popleft()[1]
            self.queued_bytes -= len(frame)
            yield frame

    def due_s(self) -> float | None:
        """When the next frame is due; None when there is none."""
        return self._frames[0][0] if self._frames else None


def start(node: Node, delay_ms: float) -> int:
    """Forks the delay line of a node's link, which exists; its pid. It ends with this thread."""
    # Opened before the fork: frames count from the moment that this returns.
    with _open(node.wire_end) as host_end, _open(node.line_end) as bridge_end:
        pid = os.fork()
        if pid == 0:
            try:
                kernel.die_with_parent()
                _run(host_end, bridge_end, DelayQueue(delay_ms / 1000))
            finally:
                os._exit(1)
    return pid


def _open(device: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    end.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    end.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    end.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
    end.setblocking(False)
    end.bind((device, ETH_P_ALL))
    return end


def _run(host_end: socket.socket, bridge_end: socket.socket, queue: DelayQueue) -> None:
    clock = time.monotonic
    while True:
        due_s = queue.due_s()
        wait_s = None if due_s is None else max(0.0, due_s - clock())
        readable = select.select([host_end, bridge_end], [], [], wait_s)[0]
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
