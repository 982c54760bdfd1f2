"""Programs that choose what a packet socket hears: classic BPF, as linux/filter.h has it."""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

# linux/filter.h and linux/bpf_common.h
LOAD_WORD, LOAD_HALF, LOAD_BYTE = 0x20, 0x28, 0x30
JUMP_IF_EQUAL, RETURN = 0x15, 0x06
Program: TypeAlias = "Sequence[tuple[int, int, int, int]]"
"""Instructions: code, jump if true, jump if false, operand."""
_SO_ATTACH_FILTER: Final = 26
_SOL_SOCKET: Final = 1


def attach(packets: socket.socket, wanted: Program) -> None:
    """Hear no other packets from now on; some that came before may be there. Raises OSError."""
    code = b"".join(struct.pack("=HBBI", *one) for one in wanted)
    buffer = ctypes.create_string_buffer(code, len(code))
    head = struct.pack("@HP", len(wanted), ctypes.addressof(buffer))  # struct sock_fprog
    packets.setsockopt(_SOL_SOCKET, _SO_ATTACH_FILTER, head)
