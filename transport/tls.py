"""Connections between hosts: how they are made and ended, and what goes wrong with them.

Who is at the other end is a matter of the context (`identity.py`). It must not know what travels.
"""

from __future__ import annotations

import socket
import ssl
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from transport.errors import (
    CertificateExpiredError,
    PeerNameMismatchError,
    PeerNotTrustedError,
    StreamBrokenError,
    TlsError,
)
from transport.identity import PeerRefused

if TYPE_CHECKING:
    from collections.abc import Iterator

HANDSHAKE_DEADLINE_S = 10.0
"""For TCP's packets, and for TLS's: a host that takes longer won't keep up with pages."""

_KEEPALIVE_IDLE_S = 15
_KEEPALIVE_INTERVAL_S = 5
_KEEPALIVE_PROBES = 4
"""A peer that vanished without a word is noticed after 35 s, also by a stream that waits."""

_PART_DEADLINE_S = 2.0
_PART_READ_BYTES = 256 << 10
_PART_READS_MAX = 1024
"""What `part` throws away at most: a stream's window many times over, in pieces of any size."""

# X509_V_ERR_* of OpenSSL's include/openssl/x509_vfy.h
_VERIFY_NOT_YET_VALID = 9
_VERIFY_EXPIRED = 10
_VERIFY_NAMES = frozenset((62, 63, 64))  # hostname, email, IP address mismatch

_REASONS_EXPIRED = ("CERTIFICATE_EXPIRED",)
_REASONS_UNTRUSTED = (
    "UNKNOWN_CA",
    "CERTIFICATE_REQUIRED",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE",
    "BAD_CERTIFICATE",
    "CERTIFICATE_UNKNOWN",
    "CERTIFICATE_REVOKED",
    "UNSUPPORTED_CERTIFICATE",
)


def connect(
    host: str,
    port: int,
    context: ssl.SSLContext,
    *,
    server_name: str,
    deadline_s: float = HANDSHAKE_DEADLINE_S,
) -> ssl.SSLSocket:
    """An encrypted connection to the host whose certificate names it `server_name`.

    `host` is what is dialled, a name or an address; it proves nothing. Raises TlsError or
    StreamBrokenError.
    """
    peer = f"{server_name} at {host}:{port}"
    try:
        plain = socket.create_connection((host, port), timeout=deadline_s)
    except OSError as error:
        raise StreamBrokenError(f"cannot connect to {peer}: {error}") from error
    try:
        tune(plain)
        with handshake_errors(peer):
            return context.wrap_socket(plain, server_hostname=server_name)
    except BaseException:
        plain.close()
        raise


def accepted(plain: socket.socket, context: ssl.SSLContext) -> ssl.SSLSocket:
    """The server's side of an accepted connection, before its handshake. Owns `plain`."""
    try:
        tune(plain)
        return context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
    except OSError as error:
        plain.close()
        raise StreamBrokenError(f"the caller left: {error}") from error


def shake_hands(stream: ssl.SSLSocket, *, deadline_s: float = HANDSHAKE_DEADLINE_S) -> None:
    """The server's handshake. Raises TlsError or StreamBrokenError; `stream` stays open."""
    stream.settimeout(deadline_s)
    with handshake_errors("the caller"):
        stream.do_handshake()


@contextmanager
def handshake_errors(peer: str) -> Iterator[None]:
    """Translate what the handshake with `peer`, or the first read after it, may raise.

    In TLS 1.3 a client learns only by its first read that the server did not like its certificate.
    """
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise _verification_error(error, peer) from error
    except ssl.SSLError as error:
        raise _alert_error(error, peer) from error
    except OSError as error:
        raise StreamBrokenError(
            f"the connection to {peer} was lost in the handshake: {error}"
        ) from error


def tune(plain: socket.socket) -> None:
    """No delay for answers, which are small; dead peers are noticed. See tcp(7)."""
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)


def cut(stream: ssl.SSLSocket) -> None:
    """Make every blocked and later call on `stream`, in any thread, end at once.

    Goes below `SSLSocket.shutdown`, which would drop the encryption of a socket that others still
    use.
    """
    try:
        socket.socket.shutdown(stream, socket.SHUT_RDWR)
    except OSError:
        return  # it had ended by itself


def part(stream: ssl.SSLSocket) -> None:
    """Close `stream` so that what was written to it last still arrives.

    Closing a socket with unread bytes in it sends a reset, which overtakes an alert or an answer
    that the peer has not read yet. So the peer is given a moment to stop, its bytes thrown away.
    """
    cutoff_s = time.monotonic() + _PART_DEADLINE_S
    try:
        socket.socket.shutdown(stream, socket.SHUT_WR)
        for _ in range(_PART_READS_MAX):
            remaining_s = cutoff_s - time.monotonic()
            if remaining_s <= 0:
                break
            stream.settimeout(remaining_s)
            if not socket.socket.recv(stream, _PART_READ_BYTES):
                break
    except OSError:
        pass  # it is gone already
    finally:
        stream.close()


def _verification_error(error: ssl.SSLCertVerificationError, peer: str) -> TlsError:
    if isinstance(error, PeerRefused):
        return type(error.refusal)(f"{peer}: {error.refusal}")
    if error.verify_code in (_VERIFY_EXPIRED, _VERIFY_NOT_YET_VALID):
        return CertificateExpiredError(f"the certificate of {peer}: {error.verify_message}")
    if error.verify_code in _VERIFY_NAMES:
        return PeerNameMismatchError(f"{peer}: {error.verify_message}")
    return PeerNotTrustedError(f"the certificate of {peer}: {error.verify_message}")


def _alert_error(error: ssl.SSLError, peer: str) -> TlsError | StreamBrokenError:
    reason = str(error.reason or "")
    if any(known in reason for known in _REASONS_EXPIRED):
        return CertificateExpiredError(f"{peer} refused this host's certificate as expired")
    if any(known in reason for known in _REASONS_UNTRUSTED):
        return PeerNotTrustedError(
            f"{peer}: a certificate is missing or not of our authority ({reason})"
        )
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)):
        return StreamBrokenError(f"{peer} ended the connection in the handshake")
    return TlsError(f"no TLS 1.3 connection with {peer}: {reason or error}")
