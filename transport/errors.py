"""The errors of this package: one sentence for each class says when it is raised.

Library errors (`ssl`, `OSError`, `zstandard`) are translated into these, `from` the original.
Whoever calls this package needs to catch `TransportError` only.
"""

from __future__ import annotations


class TransportError(Exception):
    """Memory or files could not be moved between the two hosts."""


class FrameError(TransportError):
    """The peer sent bytes that are not a frame of this protocol."""


class FrameTooLargeError(FrameError):
    """A length in a frame exceeds its limit; nothing was allocated for it."""


class FrameMalformedError(FrameError):
    """A frame's fields contradict each other, its own size, or the protocol's rules."""


class FrameCorruptError(FrameError):
    """A frame's checksum does not match its content."""


class FrameUndecodableError(FrameError):
    """A frame's compressed body does not decompress to exactly the size that it declares."""


class FrameOutOfOrderError(FrameError):
    """A frame's sequence number or round is not the one that may follow what was applied."""


class TlsError(TransportError):
    """An encrypted connection could not be set up."""


class PeerNotTrustedError(TlsError):
    """A certificate is missing or was not issued by the authority that the other side trusts."""


class CertificateMalformedError(PeerNotTrustedError):
    """A certificate or revocation list is not in the form that this fleet's have."""


class CertificateRevokedError(PeerNotTrustedError):
    """The fleet's authority has taken back the identity that the other side shows."""


class RoleNotAllowedError(PeerNotTrustedError):
    """The other side's identity is good, and not of a kind that may be spoken to here."""


class IdentityUnusableError(TlsError):
    """This host's own identity is missing, damaged, or not of its own authority."""


class AuthorityUnusableError(TlsError):
    """The fleet's authority is missing, damaged, or can't be written where it is kept."""


class PassphraseWrongError(TlsError):
    """The passphrase does not open the authority's key, or is too short for a new one."""


class SignatureWrongError(TransportError):
    """What was signed is not what is here, or another key has signed it."""


class CertificateExpiredError(TlsError):
    """One side's certificate is expired or not yet valid."""


class PeerNameMismatchError(TlsError):
    """The certificate is good, but belongs to another host than the one that was called."""


class StreamBrokenError(TransportError):
    """A stream's connection was lost, or stood still too long; opening another one may help."""


class StreamRefusedError(TransportError):
    """The target refused the stream's greeting, and asking again will not change that."""


class StreamBusyError(TransportError):
    """The target cannot take the stream right now; it may be asked again."""


class TargetFailedError(TransportError):
    """The target received a frame and could not store it, or found it wrong."""


class TargetFullError(TargetFailedError):
    """The target has no room for what it received."""


class SourceFailedError(TransportError):
    """The source could not read the memory or the file that was to be sent."""


class AbortedError(TransportError):
    """The transfer was ended on this side by `abort()` or `close()`."""


class TableFullError(TransportError):
    """The container's memory spreads over more address space than can be kept account of."""
