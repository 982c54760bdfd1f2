"""One SSH connection, as `connecting.connect` makes it: commands, and streams to ports over there.

Everything blocks. What the other host prints is bounded and is never waited for without a deadline.
"""

from __future__ import annotations

import contextlib
import selectors
import shlex
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import paramiko

from transport.ssh.errors import SshCommandError, SshUnreachableError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType

    from transport.ssh.config import SshTarget

CHANNEL_DEADLINE_S: Final = 20.0
"""For the other sshd to open a channel: a round trip, and for a port a TCP connection."""
KEEPALIVE_S: Final = 15
OUTPUT_BYTES_MAX: Final = 1 << 20
"""What a command may print, on each of its two outputs."""
_CHUNK_BYTES: Final = 128 << 10


@dataclass(frozen=True, slots=True)
class Completed:
    """A command that has ended. status: its exit status, -1 if a signal ended it."""

    status: int
    stdout: bytes
    stderr: bytes

    @property
    def last_words(self) -> str:
        """The last line that it wrote to its standard error, printable."""
        lines = self.stderr.decode("utf-8", "replace").strip().splitlines()
        return "".join(c for c in lines[-1] if c.isprintable())[:500] if lines else ""


class SshConnection:
    """See the module. Made by `connect`; close it."""

    def __init__(
        self, target: SshTarget, transport: paramiko.Transport, behind: contextlib.ExitStack
    ) -> None:
        """behind: what the connection consists of and goes through; it ends with it."""
        self.target = target
        self._transport = transport
        self._behind = behind
        transport.set_keepalive(KEEPALIVE_S)

    def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes | Iterable[bytes] = b"",
        deadline_s: float,
        output_bytes_max: int = OUTPUT_BYTES_MAX,
    ) -> Completed:
        """Run a command to its end, its arguments quoted for the login shell.

        Raises SshCommandError when it prints more or takes longer; its channel is closed then.
        """
        cutoff_s = time.monotonic() + deadline_s
        with self._errors(), self._session() as channel:
            channel.exec_command(shlex.join(command))
            pieces = (stdin,) if isinstance(stdin, bytes) else stdin
            feeding = threading.Thread(target=_feed, args=(channel, pieces), name="ssh-stdin")
            feeding.daemon = True
            feeding.start()
            stdout, stderr = self._read(channel, cutoff_s, output_bytes_max, command[0])
            if not channel.status_event.wait(max(0.0, cutoff_s - time.monotonic())):
                raise SshUnreachableError(f"{self.target} closed {command[0]} without its status")
            return Completed(channel.recv_exit_status(), stdout, stderr)

    def open_tunnel(self, host: str, port: int) -> paramiko.Channel:
        """A stream to a port as the other host sees it. Raises SshUnreachableError."""
        with self._errors():
            return self._transport.open_channel(
                "direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=CHANNEL_DEADLINE_S
            )

    @property
    def is_alive(self) -> bool:
        """Whether the connection still stands, as far as is known."""
        return self._transport.is_active()

    def close(self) -> None:
        """End the connection, and those that it goes through. Idempotent."""
        self._behind.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _session(self) -> Iterator[paramiko.Channel]:
        channel = self._transport.open_session(timeout=CHANNEL_DEADLINE_S)
        try:
            yield channel
        finally:
            # A connection that was lost has closed it, and must not hide why the block ended.
            with contextlib.suppress(paramiko.SSHException, EOFError, OSError):
                channel.close()

    def _read(
        self, channel: paramiko.Channel, cutoff_s: float, bytes_max: int, name: str
    ) -> tuple[bytes, bytes]:
        """Both outputs to their ends. The channel's descriptor is readable when either has data."""
        stdout, stderr = bytearray(), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(channel, selectors.EVENT_READ)
            while True:
                remaining_s = cutoff_s - time.monotonic()
                if remaining_s <= 0 or not selector.select(remaining_s):
                    raise SshCommandError(f"{name} on {self.target} takes too long")
                while channel.recv_stderr_ready():
                    stderr += channel.recv_stderr(_CHUNK_BYTES)
                    _check(len(stderr), bytes_max, name, self.target)
                if channel.recv_ready():
                    stdout += channel.recv(_CHUNK_BYTES)
                    _check(len(stdout), bytes_max, name, self.target)
                elif (channel.eof_received or channel.closed) and not channel.recv_stderr_ready():
                    return bytes(stdout), bytes(stderr)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise SshUnreachableError(
                f"{self.target}: {error or 'the connection was lost'}"
            ) from error


def _check(length: int, bytes_max: int, name: str, target: SshTarget) -> None:
    if length > bytes_max:
        raise SshCommandError(f"{name} on {target} prints more than {bytes_max} bytes")


def _feed(channel: paramiko.Channel, pieces: Iterable[bytes]) -> None:
    """A command that ends without reading all of its input is judged by its status."""
    with contextlib.suppress(OSError, paramiko.SSHException, EOFError):
        for piece in pieces:
            channel.sendall(piece)
        channel.shutdown_write()
