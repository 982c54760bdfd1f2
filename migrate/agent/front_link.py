"""What the agent and its front say to each other besides HTTP: two sockets, a question at a time.

    asks      front: Greeting            -> agent: Granted (+ 3 directories) | NotGranted
              front: Ready               -> agent: Done
    orders    agent: Revoke              -> front: Done | Failed

The front is a process that the network may have taken over (front.py), so the agent takes what it
says as coming from a peer: every field is bounded, and no descriptor is accepted from it. Each
message is one datagram (SOCK_SEQPACKET): JSON, and descriptors beside it (SCM_RIGHTS).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import threading
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

import msgspec
from msgspec import Meta

from migrate.errors import MigrateError
from transport.certificates import NAME_CHARACTERS_MAX, Peer, Role
from transport.core.frames import Hello, StreamKind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

USER: Final = "migrate-front"
USER_NUMBER: Final = 65530
"""Where the user was not made: nobody's (systemd's UIDS-GIDS.md: 65520 to 65533 are unused)."""

MESSAGE_BYTES_MAX: Final = 16 << 10
DESCRIPTORS_MAX: Final = 3
ANSWER_DEADLINE_S: Final = 30.0
"""Longer than the listener of data streams waits for a sink that hangs."""

# How a WebSocket of a peer has ended, if not by its own word: by its kernel, in order; in another
# way; or by the front, because of what it has said. Codes for applications (RFC 6455, 7.4.2), which
# a peer's own code is never passed on as.
HUNG_UP: Final = 4001
BROKEN: Final = 4002
REFUSED: Final = 4003

PEER_HEADER: Final = "Migrate-Peer"
"""Of a request that the front hands on: who calls, proven."""

Ticket: TypeAlias = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class Caller(msgspec.Struct, frozen=True):
    """A Peer, as it travels; `serial` in hex, since it is longer than an integer of JSON."""

    name: Annotated[str, Meta(min_length=1, max_length=NAME_CHARACTERS_MAX)]
    role: Role
    serial: Annotated[str, Meta(pattern=r"\A[0-9a-f]{1,40}\Z")]
    address: Annotated[str, Meta(max_length=64)] = ""

    @classmethod
    def of(cls, peer: Peer, address: str = "") -> Caller:
        """What the front says of a peer that has proven itself to it."""
        return cls(peer.name, peer.role, f"{peer.serial:x}", address)

    @property
    def peer(self) -> Peer:
        """What the agent takes it for."""
        return Peer(self.name, self.role, int(self.serial, 16))

    def header(self) -> str:
        """For PEER_HEADER."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_header(cls, text: str) -> Caller:
        """Raises msgspec.DecodeError."""
        return msgspec.json.decode(text, type=cls)


class Greeting(msgspec.Struct, frozen=True, tag=True):
    """A data stream says whose it is."""

    kind: Annotated[int, Meta(ge=0, le=255)]
    stream: Annotated[int, Meta(ge=0, le=255)]
    ticket: Ticket
    use: Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
    caller: Caller

    @classmethod
    def of(cls, hello: Hello, peer: Peer) -> Greeting:
        """What the front asks about a stream's greeting."""
        return cls(hello.kind, hello.stream, hello.ticket.hex(), hello.use.hex(), Caller.of(peer))

    @property
    def hello(self) -> Hello:
        """What the agent takes it for. Raises ValueError."""
        ticket, use = bytes.fromhex(self.ticket), bytes.fromhex(self.use)
        return Hello(StreamKind(self.kind), self.stream, ticket, use)

    def __repr__(self) -> str:
        return f"Greeting(stream={self.stream}, peer={self.caller.name})"


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The front has given up what it had, and serves."""


class Granted(msgspec.Struct, frozen=True, tag=True):
    """The stream's pages, files and ledger go into three directories, which come with this."""

    quota_bytes: Annotated[int, Meta(ge=0)]


class NotGranted(msgspec.Struct, frozen=True, tag=True):
    """There is no such session for this peer."""


class Revoke(msgspec.Struct, frozen=True, tag=True):
    """End the streams of a session and close its files."""

    ticket: Ticket

    def __repr__(self) -> str:
        return "Revoke()"


class Done(msgspec.Struct, frozen=True, tag=True):
    """It is so."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """It could not be done."""

    why: Annotated[str, Meta(max_length=4096)]


Ask: TypeAlias = Greeting | Ready
Order: TypeAlias = Revoke
Message: TypeAlias = Greeting | Ready | Granted | NotGranted | Revoke | Done | Failed

_DECODER: Final[msgspec.json.Decoder[Message]] = msgspec.json.Decoder(Message)


class FrontLostError(MigrateError):
    """The other process does not answer: it has ended, or hangs, or speaks nonsense."""


class Link:
    """One end of one of the two sockets; `asks` on one end, `serve` on the other."""

    def __init__(self, end: socket.socket, deadline_s: float = ANSWER_DEADLINE_S) -> None:
        self._end = end
        self._deadline_s = deadline_s
        self._asking = threading.Lock()

    def ask(self, message: Message) -> tuple[Message, list[int]]:
        """The other's answer and the descriptors that came with it, the caller's to close. From any
        thread; blocking. Raises FrontLostError."""
        with self._asking:
            try:
                self._end.settimeout(self._deadline_s)
                self._end.sendall(msgspec.json.encode(message))
                return _receive(self._end, DESCRIPTORS_MAX)
            except (OSError, msgspec.DecodeError) as error:
                # An answer that comes too late would be taken for that to the next question.
                self.close()
                raise FrontLostError(f"no answer to {message!r}: {error}") from error

    def serve(self, answer: Callable[[Message], tuple[Message, Sequence[int]]]) -> None:
        """Answer until the other end is closed, or has said what can't be; for a thread. The
        descriptors of an answer are closed when it was sent."""
        while True:
            try:
                message, _ = _receive(self._end, 0)
                said, descriptors = answer(message)
                try:
                    socket.send_fds(self._end, [msgspec.json.encode(said)], descriptors)
                finally:
                    _close(descriptors)
            except (OSError, msgspec.DecodeError):
                return

    def close(self) -> None:
        """End it; whoever waits on either end hears of it. Idempotent."""
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)
        self._end.close()


def front_user() -> int:
    """The front's user, also its group's number."""
    try:
        return pwd.getpwnam(USER).pw_uid
    except KeyError:
        return USER_NUMBER


def pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a link."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _receive(end: socket.socket, descriptors_max: int) -> tuple[Message, list[int]]:
    """Raises OSError, also at the end of the link, and msgspec.DecodeError."""
    data, descriptors, flags, _ = socket.recv_fds(
        end, MESSAGE_BYTES_MAX, descriptors_max, socket.MSG_CMSG_CLOEXEC
    )
    try:
        if not data:
            raise ConnectionResetError("it has ended")
        if flags & socket.MSG_TRUNC or (flags & socket.MSG_CTRUNC and descriptors_max):
            raise ConnectionAbortedError("a message was too long")
        return _DECODER.decode(data), descriptors
    except BaseException:
        _close(descriptors)
        raise


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
