"""The messages of the control channel: frozen structs, JSON, one websocket text message each.

    source                                     target
      | OpenSession ------------------------->  |   (also with dry_run: checks, then nothing)
      | <------------ SessionOpened | Refused   |
      |   ... pages and files travel on the data port ...
      | Prepare ------------------------------> |
      | <------------------------------ Prepared|
      | Restore ------------------------------> |
      | <---------------- RestoreStage ..., Held|
      | Commit, Frames -----------------------> |
      | <------------------------------ Running |
      | Frames -------------------------------> |
      | <-------------- FillProgress ..., FillDone
    at any time: Ping -> Pong; Ask -> State (both ways); Failed from the target; Abort from the
    source, before Commit
    first on every connection: Heard from the target (the source's is in the URL), then on both ways
    what the other has not heard (outbox.py)

What a peer sends is hostile until decoded here: every number has bounds, every text a limit, every
name an allow-list (`\\Z`, not `$`: the latter lets a newline through), every list a length, and
unknown fields or tags are errors. This module does not know what a valid address or a valid
`config.json` is; who uses one parses it.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from migrate.core.confinement import Confinements
from migrate.errors import ProtocolError
from migrate.network_identity import FRAMES_MAX, HeldFrame, IpText, NetworkIdentity

PROTOCOL: Final = 1
"""Both ends must speak the same one. It changes with anything that the peer could misread."""

MAX_MESSAGE_BYTES: Final = 2 * 1024 * 1024
"""Of one encoded message, to be refused before it is read (websocket `max_msg_size`). The largest
is OpenSession: a `config.json` of up to 256 KiB whose JSON escapes may double it, and the rest."""

MAX_TEXT: Final = 4096
MAX_CONFIG_CHARS: Final = 256 * 1024
MAX_CPUINFO_BYTES: Final = 64 * 1024
MAX_TASKS: Final = 4096
MAX_FILES: Final = 4 * MAX_TASKS + 256
"""Image files of one restore: about four per task and a few for the whole."""
MAX_MANIFEST_BYTES: Final = 1440 << 10
"""Room for MAX_FILES names and hashes; as base64 it still fits a message."""
MAX_LABELS: Final = 16
"""Of a security module, on the tasks of one container. Most have one."""
MAX_MARKS: Final = 64
MAX_RENAMED: Final = 16
MAX_COPIES: Final = 64
"""Of one transfer, on one host."""
MAX_REFUSALS: Final = 64
MAX_BYTES: Final = 1 << 50
"""1 PiB: no memory or file system is larger, and sums of a thousand of them fit 64 bits."""
MAX_US: Final = 1 << 60
MAX_PATIENCE_S: Final = 3600
MAX_RESIDENTS: Final = 2048
"""Containers of one host."""
MAX_TARGETS: Final = 1024
MAX_SIDES: Final = 1024
"""Of migrations, under way or of the latest."""
MAX_HEARD: Final = 1 << 32
"""Messages of one session and end; nobody gets near it."""

Text: TypeAlias = Annotated[str, Meta(max_length=MAX_TEXT)]
Label: TypeAlias = Annotated[str, Meta(max_length=128)]
Code: TypeAlias = Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9_.-]{0,63}\Z")]
ContainerName: TypeAlias = Annotated[
    str, Meta(pattern=r"\A[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}\Z", max_length=64)
]
MigrationId: TypeAlias = Annotated[str, Meta(pattern=r"\A[a-zA-Z0-9][a-zA-Z0-9_-]{0,63}\Z")]
FileName: TypeAlias = Annotated[
    str, Meta(pattern=r"\A[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}\Z", max_length=128)
]
HostName: TypeAlias = Annotated[
    str, Meta(pattern=r"\A[a-zA-Z0-9]([a-zA-Z0-9.-]{0,251}[a-zA-Z0-9])?\Z", max_length=253)
]
Ticket: TypeAlias = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Bytes: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_BYTES)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_BYTES // 4096)]
Micros: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_US)]
Attempt: TypeAlias = Annotated[int, Meta(ge=1, le=(1 << 53) - 1)]
Task: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 22)]
ManifestBytes: TypeAlias = Annotated[bytes, Meta(min_length=1, max_length=MAX_MANIFEST_BYTES)]
Signature: TypeAlias = Annotated[bytes, Meta(min_length=64, max_length=64)]
Certificate: TypeAlias = Annotated[bytes, Meta(min_length=1, max_length=8192)]
Bandwidth: TypeAlias = Annotated[float, Meta(ge=1, le=1e7)]
"""MiB a second. Less would take 16 streams longer than a peer waits for the next piece of one."""
MoveState: TypeAlias = Literal["moving", "arrived", "undone", "held"]
"""How far a move is: undone, it runs where it ran; held, nobody knows yet where it will."""
Marks: TypeAlias = Annotated[dict[Code, Micros], Meta(max_length=MAX_MARKS)]
"""Name of an instant -> microseconds of the sender's monotonic clock."""


class Message(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    """Base of every message; each names its tag, the class name in snake case."""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of what messages contain."""


class WireError(Part, frozen=True, omit_defaults=True):
    """An error in the words of `MigrateError`, to be shown on the other side."""

    message: Text
    phase: Label = ""
    remedy: Text = ""
    container_state: Label = ""


class Refusal(Part, frozen=True):
    """One reason not to begin, and what the user can do about it."""

    code: Code
    message: Text
    remedy: Text


class Caution(Part, frozen=True):
    """Something that works, but worse or otherwise than its user may expect."""

    code: Code
    message: Text
    remedy: Text


class Versions(Part, frozen=True):
    """What decides whether a checkpoint of one host can be restored on another."""

    kernel: Label
    criu: Label
    runtime: Label
    architecture: Label


CopySignal: TypeAlias = Literal["HUP", "USR1", "USR2"]
"""Those that a program may have a meaning of its own for, and none that stops or kills."""


class CopyOf(Part, frozen=True):
    """What a container is a copy of, which runs on. renamed: (the original's address, the copy's),
    of sockets that are bound to one. hook: of the target's own programs, those that the copy meets
    before its first instruction. signal: what its first task is sent when it runs. beside: the
    session, of the same source, in which another copy comes to the same host: nothing is sent for
    this one, it has what that one has received. number: how many such copies come before this one.
    fill: whether all of its memory is to be brought in; otherwise what it needs, when it does."""

    container: ContainerName
    renamed: Annotated[tuple[tuple[IpText, IpText], ...], Meta(max_length=MAX_RENAMED)]
    hook: Code | msgspec.UnsetType = msgspec.UNSET
    signal: CopySignal | msgspec.UnsetType = msgspec.UNSET
    beside: MigrationId | msgspec.UnsetType = msgspec.UNSET
    number: Annotated[int, Meta(ge=0, le=MAX_COPIES)] = 0
    fill: bool = True


# --- source to target ---


class OpenSession(Message, frozen=True, tag="open_session"):
    """Asks the target to receive a container. With `dry_run` it only checks and answers.

    config_json: the text of the container's `config.json`, by which alone the target judges.
    attempt: the strictly growing number of this attempt (the journal's). tasks: pids in the
    container's own pid namespace. memory_bytes: present memory, and shared_bytes of it is shared
    (dumped and restored eagerly). cpuinfo: the image that `criu cpuinfo dump` writes. patience_s:
    how long the source tries to reconnect a broken link. labels: those that a security module has
    given the tasks, each once. copy_of: the source keeps its container; all else that is said here
    is of the copy.
    """

    migration_id: MigrationId
    container: ContainerName
    runtime: Code
    attempt: Attempt
    host: HostName
    config_json: Annotated[str, Meta(max_length=MAX_CONFIG_CHARS)]
    tasks: Annotated[tuple[Task, ...], Meta(min_length=1, max_length=MAX_TASKS)]
    memory_bytes: Bytes
    shared_bytes: Bytes
    rootfs_bytes: Bytes
    streams: Annotated[int, Meta(ge=1, le=64)]
    restore: Literal["lazy", "eager"]
    network: NetworkIdentity
    versions: Versions
    cpuinfo: Annotated[bytes, Meta(max_length=MAX_CPUINFO_BYTES)]
    dry_run: bool = False
    patience_s: Annotated[float, Meta(ge=0, le=MAX_PATIENCE_S)] = 0.0
    labels: Annotated[tuple[Text, ...], Meta(max_length=MAX_LABELS)] = ()
    protocol: Literal[1] = PROTOCOL
    copy_of: CopyOf | msgspec.UnsetType = msgspec.UNSET


class Prepare(Message, frozen=True, tag="prepare"):
    """Asks for everything up to the restore's gate. descriptors: what stdin, stdout and stderr of
    the container are, in the words of runc's `descriptors.json`."""

    descriptors: tuple[Text, Text, Text]


class Restore(Message, frozen=True, tag="restore"):
    """Asks for the restore; all that the manifest (`manifest.py`) names has been acknowledged.

    signature: of the source's identity over the manifest. certificate: that identity's, DER.
    confinement: what held the tasks back on the source when they were frozen, and must hold the
    copy.
    """

    manifest: ManifestBytes
    signature: Signature
    certificate: Certificate
    lazy_pages: Count
    confinement: Confinements


class Commit(Message, frozen=True, tag="commit"):
    """The source's journal says that the container is the target's. May come more than once."""

    migration_id: MigrationId
    attempt: Attempt


class Frames(Message, frozen=True, tag="frames"):
    """What came for the container on the source while it stood still (`held_frames.py`)."""

    migration_id: MigrationId
    attempt: Attempt
    frames: Annotated[tuple[HeldFrame, ...], Meta(max_length=FRAMES_MAX)]


class Abort(Message, frozen=True, tag="abort"):
    """The source keeps the container. Never sent after a Commit that the target may act on."""

    migration_id: MigrationId
    attempt: Attempt
    reason: Text


class Ping(Message, frozen=True, tag="ping"):
    """Asks for the peer's clock. t_us: the sender's monotonic clock."""

    t_us: Micros


# --- both ways ---


class Ask(Message, frozen=True, tag="ask"):
    """Asks for the state that the peer's journal gives for this migration."""

    migration_id: MigrationId
    attempt: Attempt


class State(Message, frozen=True, tag="state"):
    """Answers Ask. name: of `SourceState` or `TargetState`, or "unknown"."""

    migration_id: MigrationId
    attempt: Attempt
    name: Code


# --- an operator to the agent of the same host ---


class Recover(Message, frozen=True, tag="recover"):
    """Asks the agent to end a session that is in doubt. owner: whose the container is, said by the
    operator; it counts only where the source says nothing."""

    migration_id: MigrationId
    owner: Literal["", "source", "target"] = ""


class Standing(Message, frozen=True, tag="standing"):
    """Answers Recover. state: of this host's side afterwards. peer: what the source says. stopped:
    why a container that is this host's is frozen here; empty for one that runs."""

    migration_id: MigrationId
    state: Code
    peer: Text
    stopped: Text = ""


class Status(Message, frozen=True, tag="status"):
    """Asks an agent, by an operator or its own host, for the migrations of that host: for those
    that `migrate status` shows, or for one."""

    migration_id: MigrationId | None = None


class Cancel(Message, frozen=True, tag="cancel"):
    """Asks the agent of the source to have a migration undone that is not committed."""

    migration_id: MigrationId


class Side(Part, frozen=True):
    """One side of a migration. since_wall_s: Unix time of the last record. driver: who drives it
    now, empty for nobody. container_state: where it is, in the words of errors, of a migration that
    has not ended. meaning: what that is. remedy: what to do."""

    migration_id: MigrationId
    role: Literal["source", "target"]
    container: ContainerName
    peer: Annotated[str, Meta(max_length=253)]
    attempt: Attempt
    state: Code
    since_wall_s: float
    ended: bool
    driver: Text
    container_state: Text
    meaning: Text
    remedy: Text


class Overview(Message, frozen=True, tag="overview"):
    """Answers Status, and Cancel by how that migration is now."""

    migrations: Annotated[tuple[Side, ...], Meta(max_length=MAX_SIDES)] = ()


# --- about whole hosts: drains ---


class Describe(Message, frozen=True, tag="describe"):
    """Asks a host what it could take, before anything is planned."""


class Description(Message, frozen=True, tag="description"):
    """Answers Describe. free_memory_bytes: after what the host keeps for itself. bridges, labels
    (its policy's), spread: the words of anti-affinity of its containers. closed: why it takes
    nothing at all, empty for a host that does."""

    host: HostName
    free_memory_bytes: Bytes
    free_cpus: Annotated[float, Meta(ge=-65536, le=65536)]
    versions: Versions
    runtimes: Annotated[tuple[Code, ...], Meta(max_length=16)] = ()
    bridges: Annotated[tuple[Label, ...], Meta(max_length=1024)] = ()
    labels: Annotated[tuple[Label, ...], Meta(max_length=256)] = ()
    spread: Annotated[tuple[Label, ...], Meta(max_length=MAX_RESIDENTS)] = ()
    closed: Text = ""


class GiveBack(Message, frozen=True, tag="give_back"):
    """Asks for a container that the asking host has sent, by a migration of this id; asked again it
    begins nothing and is answered how far that one is. bandwidth_mib_s: what it may send from now
    on."""

    migration_id: MigrationId
    container: ContainerName
    bandwidth_mib_s: Bandwidth | None = None


class GivingBack(Message, frozen=True, tag="giving_back"):
    """Answers GiveBack. why: of one that has not arrived."""

    migration_id: MigrationId
    state: MoveState
    why: Text = ""
    downtime_ms: Annotated[float, Meta(ge=0, le=1e9)] | None = None


class Drain(Message, frozen=True, tag="drain"):
    """Asks an agent about emptying its host, which only an operator and the host itself may.

    act: start and home (an undrain) begin, resume goes on as asked before; show only asks, stop
    begins no more moves. to: hosts. parallel: moves at once, from a host and to a host.
    bandwidth_mib_s: of all moves together.
    """

    act: Literal["start", "resume", "home", "show", "stop", "cordon", "uncordon"]
    to: Annotated[tuple[HostName, ...], Meta(max_length=MAX_TARGETS)] = ()
    parallel: Annotated[int, Meta(ge=1, le=64)] = 1
    deadline_s: Annotated[float, Meta(ge=1, le=1e7)] | None = None
    shared: Annotated[tuple[Text, ...], Meta(max_length=256)] = ()
    bandwidth_mib_s: Bandwidth | None = None
    move_back: bool = False
    dry_run: bool = False


class DrainMove(Part, frozen=True):
    """One container of a drain. target: where it goes, or went. state: waiting; moving; arrived;
    stopped, as its policy says; left, as its policy says; stays: it could not move, and runs where
    it ran; held: nobody knows yet where it will run; home: an undrain brought it back. why: of one
    that stays, is held, or has arrived and failed its check."""

    container: ContainerName
    runtime: Code
    memory_bytes: Bytes
    state: Literal["waiting", "moving", "arrived", "stopped", "left", "stays", "held", "home"]
    target: Annotated[str, Meta(max_length=253)] = ""
    migration_id: Annotated[str, Meta(max_length=64)] = ""
    why: Text = ""
    begin_s: float = 0.0
    seconds: float = 0.0
    downtime_ms: float | None = None
    predicted_s: float = 0.0
    predicted_downtime_ms: float | None = None


class Drained(Message, frozen=True, tag="drained"):
    """Answers Drain, and is what a drain keeps on its disk. exit_code: of one that has ended, as
    `errors.py` has them. is_driven: whether a process is at it."""

    host: HostName
    drain_id: Annotated[str, Meta(max_length=64)] = ""
    asked: Drain = Drain("show")
    phase: Literal["none", "planning", "moving", "ended"] = "none"
    began_wall_s: float = 0.0
    exit_code: Annotated[int, Meta(ge=0, le=3)] = 0
    why: Text = ""
    cordoned: bool = False
    is_driven: bool = False
    moves: Annotated[tuple[DrainMove, ...], Meta(max_length=MAX_RESIDENTS)] = ()


# --- target to source ---


class SessionOpened(Message, frozen=True, tag="session_opened"):
    """The session exists. ticket: 32 bytes in hex, for the HELLO of each data stream, once each."""

    session_id: MigrationId
    ticket: Ticket
    data_port: Annotated[int, Meta(ge=1, le=65535)]
    host: HostName
    versions: Versions
    free_memory_bytes: Bytes
    cautions: Annotated[tuple[Caution, ...], Meta(max_length=64)] = ()
    protocol: Literal[1] = PROTOCOL


class Heard(Message, frozen=True, tag="heard"):
    """The first on every connection: how many messages the target has heard in this session. It is
    not counted itself, nor are Ping and Pong."""

    messages: Annotated[int, Meta(ge=0, le=MAX_HEARD)]


class Refused(Message, frozen=True, tag="refused"):
    """The session is not opened, for these reasons; nothing was touched."""

    refusals: Annotated[tuple[Refusal, ...], Meta(min_length=1, max_length=MAX_REFUSALS)]


class Prepared(Message, frozen=True, tag="prepared"):
    """The restore waits at its gate."""


class RestoreStage(Message, frozen=True, tag="restore_stage"):
    """The restore has reached a stage (a name of CRIU's action scripts), for the display."""

    name: Code
    at_us: Micros


class Held(Message, frozen=True, tag="held"):
    """Restored, and held before its first instruction."""

    marks: Marks


class Running(Message, frozen=True, tag="running"):
    """The tasks run here."""

    marks: Marks


class FillProgress(Message, frozen=True, tag="fill_progress"):
    """How far the pager is."""

    filled_bytes: Bytes
    total_bytes: Bytes


class FillDone(Message, frozen=True, tag="fill_done"):
    """All memory is there. faults: pages that were needed before the fill brought them; how long
    half of them waited at most, and 99 % (0 without any)."""

    fill_ms: Annotated[float, Meta(ge=0, le=1e9)]
    faults: Count
    filled_bytes: Bytes
    fault_p50_us: Micros = 0
    fault_p99_us: Micros = 0


class Failed(Message, frozen=True, tag="failed"):
    """Something failed on the target."""

    error: WireError


class Pong(Message, frozen=True, tag="pong"):
    """t_us: of the Ping. now_us: the target's monotonic clock as it answers."""

    t_us: Micros
    now_us: Micros


SourceMessage: TypeAlias = (
    OpenSession
    | Prepare
    | Restore
    | Commit
    | Frames
    | Abort
    | Ping
    | Ask
    | State
    | Recover
    | Status
    | Cancel
    | Describe
    | GiveBack
    | Drain
)
TargetMessage: TypeAlias = (
    SessionOpened
    | Heard
    | Refused
    | Prepared
    | RestoreStage
    | Held
    | Running
    | FillProgress
    | FillDone
    | Failed
    | Pong
    | Ask
    | State
    | Standing
    | Overview
    | Description
    | GivingBack
    | Drained
)


class _Version(msgspec.Struct):
    """Read before anything else, so that a newer peer is refused by number and not by a field."""

    protocol: int = PROTOCOL


MessageT = TypeVar("MessageT")
_ENCODER: Final = msgspec.json.Encoder()
_VERSION: Final = msgspec.json.Decoder(_Version)
_FROM_SOURCE: Final[msgspec.json.Decoder[SourceMessage]] = msgspec.json.Decoder(SourceMessage)
_FROM_TARGET: Final[msgspec.json.Decoder[TargetMessage]] = msgspec.json.Decoder(TargetMessage)


def encode(message: SourceMessage | TargetMessage) -> bytes:
    """The message as JSON. Raises `ProtocolError` if the peer would refuse its size."""
    data = _ENCODER.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {len(data)} bytes is larger than {MAX_MESSAGE_BYTES}")
    return data


def decode_from_source(data: bytes | str) -> SourceMessage:
    """A message that the target has received. Raises `ProtocolError`."""
    return _decode(_FROM_SOURCE, data)


def decode_from_target(data: bytes | str) -> TargetMessage:
    """A message that the source has received. Raises `ProtocolError`."""
    return _decode(_FROM_TARGET, data)


def _decode(decoder: msgspec.json.Decoder[MessageT], data: bytes | str) -> MessageT:
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {len(data)} bytes is larger than {MAX_MESSAGE_BYTES}")
    try:
        version = _VERSION.decode(data).protocol
        if version != PROTOCOL:
            raise ProtocolError(
                f"the peer speaks protocol {version}, this host {PROTOCOL}",
                remedy="install the same version on both hosts",
            )
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ProtocolError(f"a message cannot be read: {error}") from error
