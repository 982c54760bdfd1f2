"""The receiving side of transfers: a listener, and a thread for each stream that it lets in.

::

    accept -> TLS handshake -> greeting -> authorise -> end the former connection -> frames
    `----'    `--------------------- in the stream's own thread --------------------------'

A greeting names a session by its ticket; `authorise` says which sink it belongs to, knowing who
asks by the handshake. What a session's streams have applied is kept here until `revoke`, so that a
broken stream can go on. Every refusal is one line in the log; the ticket is in none of them. Knows
nothing of what sinks do.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import structlog

from transport import tls
from transport.complaints import Complaints
from transport.core.frames import HELLO_BYTES, Hello, Status, parse_hello
from transport.core.transcript import Carried
from transport.door import Door, Guest
from transport.errors import (
    FrameError,
    PeerNotTrustedError,
    StreamBrokenError,
    StreamBusyError,
    StreamRefusedError,
    TargetFailedError,
    TargetFullError,
    TransportError,
)
from transport.identity import Peer, peer_of
from transport.inbound import (
    FRAME_DEADLINE_S,
    IDLE_DEADLINE_S,
    InboundStream,
    PageSink,
    Session,
    send_answer,
)

if TYPE_CHECKING:
    import ssl
    from types import TracebackType

Authorise: TypeAlias = Callable[[Hello, Peer], PageSink | None]
"""(greeting, who sends it) -> the session's sink, or None to refuse. Any thread."""

STREAMS_TOTAL_MAX = 64
"""Greeted streams of all sessions: four full ones; a stream costs a thread and 3 MiB."""
SESSIONS_MAX = 64
"""Sessions remembered; beyond it the oldest one without connections can't be resumed."""
END_DEADLINE_S = 10.0
"""For a cut stream's thread to end; longer only if its sink hangs."""

_BACKLOG = 64
_PAUSE_S = 0.1
"""Before accepting again when the process is out of descriptors."""


@dataclass(eq=False, slots=True)
class _Connection:
    """One accepted connection; its fields change under the listener's condition."""

    address: str
    guest: Guest
    stream: ssl.SSLSocket | None = None
    peer: Peer | None = None
    """None: it has proven nothing yet."""
    ticket: bytes = b""
    index: int = -1
    revoked: bool = False
    session: Session | None = None
    thread: threading.Thread | None = field(default=None, repr=False)

    @property
    def who(self) -> str:
        """For the log."""
        return "?" if self.peer is None else str(self.peer)

    def cut(self) -> None:
        if self.stream is not None:
            tls.cut(self.stream)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there from now on; `port` 0 takes a free one. Raises TransportError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise TransportError(f"cannot listen on {host}:{port}: {error}") from error


class DataListener:
    """Accepts on `listening`, which is its own from now on, at once, until `stop`.

    `remember` gives what is known of a ticket's session that this listener does not know, from a
    listener before it; it may raise TransportError.
    """

    def __init__(
        self,
        listening: socket.socket,
        context: ssl.SSLContext,
        authorise: Authorise,
        *,
        remember: Callable[[bytes], Session] = lambda _: Session(),
        streams_max: int = STREAMS_TOTAL_MAX,
        door: Door | None = None,
        handshake_deadline_s: float = tls.HANDSHAKE_DEADLINE_S,
        idle_deadline_s: float = IDLE_DEADLINE_S,
        frame_deadline_s: float = FRAME_DEADLINE_S,
        clock: Callable[[], float] = time.monotonic,
        log: Any = None,
    ) -> None:
        self._context = context
        self._authorise = authorise
        self._remember = remember
        self._streams_max = streams_max
        self._door = door if door is not None else Door()
        self._complaints = Complaints()
        self._handshake_deadline_s = handshake_deadline_s
        self._idle_deadline_s = idle_deadline_s
        self._frame_deadline_s = frame_deadline_s
        self._clock = clock
        self._log = log if log is not None else structlog.get_logger("transport")
        self._changed = threading.Condition()
        self._connections: set[_Connection] = set()
        self._sessions: dict[bytes, Session] = {}
        self._stopping = threading.Event()
        self._listening = listening
        self._thread = threading.Thread(target=self._accept, name="page-listener", daemon=True)
        self._thread.start()

    def __enter__(self) -> DataListener:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def port(self) -> int:
        return int(self._listening.getsockname()[1])

    def revoke(self, ticket: bytes) -> Carried:
        """End the streams of a session and forget it; its sink is not called any more afterwards.

        Returns what they have carried, nothing for a session that is not known. `authorise` must
        refuse the ticket already. Raises TransportError when a sink call does not return.
        """
        self._end(lambda connection: connection.ticket == ticket)
        with self._changed:
            session = self._sessions.pop(ticket, None)
        return session.carried() if session is not None else Carried()

    def stop(self) -> None:
        """End the listener and all streams, as `revoke` does. Idempotent."""
        self._stopping.set()
        with contextlib.suppress(OSError):  # stopped before
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes accept(2)
        self._thread.join(END_DEADLINE_S)
        self._listening.close()
        self._end(lambda _: True)

    def _end(self, chosen: Callable[[_Connection], bool]) -> None:
        """Cut connections and wait for their threads, but for the one that this is called in."""

        def left() -> list[_Connection]:
            return [
                connection
                for connection in self._connections
                if chosen(connection) and connection.thread is not threading.current_thread()
            ]

        with self._changed:
            for connection in self._connections:
                if chosen(connection):
                    connection.revoked = True
                    connection.cut()
            if not self._changed.wait_for(lambda: not left(), END_DEADLINE_S):
                raise TransportError(f"{len(left())} streams did not end: their sink hangs")

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                plain, address = self._listening.accept()
            except OSError as error:
                if self._stopping.is_set():
                    return
                self._log.warning("accepting failed", reason=str(error))
                self._stopping.wait(_PAUSE_S)
                continue
            self._begin(plain, *address[:2])

    def _begin(self, plain: socket.socket, address: str, port: int) -> None:
        """Give an accepted connection its thread, if there is room."""
        connection = _Connection(f"{address}:{port}", Guest(address))
        connection.guest.turn_away = connection.cut
        connection.thread = threading.Thread(
            target=self._run, args=(connection, plain), name="page-stream", daemon=True
        )
        with self._changed:
            self._connections.add(connection)
        if not self._door.enter(connection.guest):
            plain.close()
            self._refused(connection, "too many connections of this host, or in all")
            self._leave(connection)
            return
        try:
            connection.thread.start()
        except RuntimeError as error:  # the process has no more threads
            plain.close()
            self._refused(connection, str(error))
            self._leave(connection)

    def _run(self, connection: _Connection, plain: socket.socket) -> None:
        """A stream's thread."""
        try:
            self._serve(connection, plain)
        except TransportError as error:
            self._refused(connection, str(error))
        except Exception:  # noqa: BLE001  a thread ends here: the log must hear of it
            self._log.exception("a stream failed", address=connection.address, peer=connection.who)
        finally:
            self._leave(connection)

    def _serve(self, connection: _Connection, plain: socket.socket) -> None:
        stream = tls.accepted(plain, self._context)
        with self._changed:
            connection.stream = stream
            connection.revoked |= self._stopping.is_set()
        if connection.revoked or connection.guest.was_turned_away:
            # Said before there was something to cut.
            connection.cut()
        try:
            tls.shake_hands(stream, deadline_s=self._handshake_deadline_s)
        except PeerNotTrustedError:
            # A client of TLS 1.3 has ended the handshake before it is judged here: tell it why.
            with contextlib.suppress(StreamBrokenError):
                send_answer(stream, Status.DISTRUSTED, 0)
            raise
        connection.peer = peer = peer_of(stream)
        hello = self._greeting(stream)
        try:
            session, sink = self._admit(connection, peer, hello)
        except TransportError as error:
            send_answer(stream, _status_of(error), 0)
            raise
        inbox = session.inbox(hello.stream)
        inbound = InboundStream(
            stream,
            sink=sink,
            session=session,
            index=hello.stream,
            use=hello.use,
            idle_deadline_s=self._idle_deadline_s,
            frame_deadline_s=self._frame_deadline_s,
        )
        send_answer(stream, Status.ACCEPTED, inbox.applied)
        try:
            inbound.run()
        except (FrameError, TargetFailedError) as error:
            session.failure = error
            send_answer(stream, _status_of(error), inbox.applied)
            raise
        self._log.debug("stream ended", peer=str(peer), stream=hello.stream, frames=inbound.frames)

    def _greeting(self, stream: ssl.SSLSocket) -> Hello:
        greeting = b""
        cutoff_s = self._clock() + self._handshake_deadline_s
        try:
            while len(greeting) < HELLO_BYTES:
                received = stream.recv(HELLO_BYTES - len(greeting))
                if not received:
                    raise StreamBrokenError("the connection ended before its greeting")
                greeting += received
                if self._clock() > cutoff_s:
                    raise StreamBrokenError("the greeting took too long")
        except OSError as error:
            raise StreamBrokenError(f"no greeting: {error}") from error
        return parse_hello(greeting)

    def _admit(self, connection: _Connection, peer: Peer, hello: Hello) -> tuple[Session, PageSink]:
        """The session of a greeting, its former connection of this stream ended."""
        with self._changed:
            # From here on `revoke` finds this connection, whatever `authorise` answers meanwhile.
            connection.ticket, connection.index = hello.ticket, hello.stream
        sink = self._authorise(hello, peer)
        if sink is None:
            raise StreamRefusedError("no such session for this host")
        with self._changed:

            def former() -> list[_Connection]:
                return [
                    each
                    for each in self._connections
                    if each.session is not None
                    and (each.ticket, each.index) == (hello.ticket, hello.stream)
                ]

            for each in former():
                each.cut()
            if not self._changed.wait_for(lambda: not former(), END_DEADLINE_S):
                raise StreamBusyError("the stream's former connection does not end")
            if connection.revoked:
                raise StreamRefusedError("the session was revoked")
            if sum(each.session is not None for each in self._connections) >= self._streams_max:
                raise StreamBusyError(f"there are {self._streams_max} streams already")
            session = self._session(hello.ticket)
            if session.failure is not None:
                raise type(session.failure)(f"the session failed before: {session.failure}")
            if not self._door.admit(connection.guest):
                raise StreamBusyError("turned away before it was known")
            connection.session = session
            return session, sink

    def _session(self, ticket: bytes) -> Session:
        session = self._sessions.pop(ticket, None) or self._remember(ticket)
        in_use = {id(connection.session) for connection in self._connections}
        for other, candidate in list(self._sessions.items()):
            if len(self._sessions) < SESSIONS_MAX:
                break
            if id(candidate) not in in_use:
                del self._sessions[other]
        self._sessions[ticket] = session  # now the newest
        return session

    def _refused(self, connection: _Connection, reason: str) -> None:
        fields: dict[str, int] | None = {}
        if connection.session is None:
            fields = self._complaints.allow(connection.guest.address)
            if connection.guest.was_turned_away:
                reason = f"too many connections that have not greeted ({reason})"
        if connection.revoked:
            reason = f"cut by this side ({reason})"
        if fields is None:
            return
        self._log.warning(
            "stream refused" if connection.session is None else "stream ended early",
            address=connection.address,
            peer=connection.who,
            stream=connection.index,
            reason=reason,
            **fields,
        )

    def _leave(self, connection: _Connection) -> None:
        if connection.stream is not None:
            tls.part(connection.stream)
        self._door.leave(connection.guest)
        with self._changed:
            self._connections.discard(connection)
            self._changed.notify_all()


def _status_of(error: TransportError) -> Status:
    if isinstance(error, StreamBusyError):
        return Status.BUSY
    if isinstance(error, TargetFullError):
        return Status.SINK_FULL
    if isinstance(error, TargetFailedError):
        return Status.SINK_FAILED
    if isinstance(error, FrameError):
        return Status.BAD_FRAME
    return Status.REFUSED
