"""Where things are on a host, and every limit and deadline with its reason.

Values that the operator may want to change come from the command line; the rest is here, once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transport.identity_paths import IdentityPaths

CONTROL_PORT = 7337
DATA_PORT = 7338

DOWNTIME_MS_MAX_DEFAULT = 300
# Less would take 16 streams longer than a peer waits for the next piece of one (transport/).
BANDWIDTH_MIB_S_MIN = 1.0
ROUNDS_MAX_DEFAULT = 30

# Address space that a session's tmpfs keeps besides the container's memory: CRIU's small images,
# its logs, and pages that are in the store and already filled but not yet punched out.
SESSION_RESERVE_BYTES = 256 << 20

# What of a root file system that is copied may have been written since the last pass over it: it is
# kept in memory while it is sent, and copied while the container stands still.
SNAPSHOT_BYTES_MAX = 256 << 20

# Each deadline ends a wait for somebody else; all are far above what was ever measured, and far
# below what a person waits before they reach for the power switch.
CONNECT_DEADLINE_S = 10.0
# The target looks at its host (`criu check`, 20 s at most) and may have to end a former session.
OPEN_DEADLINE_S = 120.0
# `criu check` and the runtime's commands have 20 s each.
PREFLIGHT_DEADLINE_S = 120.0
# To tell a target that has been lost that all is undone; one that does not hear it finds out.
LAST_WORD_DEADLINE_S = 3.0
# The container runs meanwhile, so this has only to find out what hangs. A host that is short of
# processors takes half a minute to start what a freeze needs (docs/facts.md).
PREPARE_DEADLINE_S = 120.0
# What follows is waited for while the container stands still, so each is also how long its users
# wait for something that hangs. No option stretches them: the target keeps those of the restore,
# and whoever finishes the work of a dead process goes by them without having heard an option. Two
# emulated machines took a seventh of each at most (docs/facts.md).
FREEZE_DEADLINE_S = 5.0
DUMP_DEADLINE_S = 30.0
RESTORE_DEADLINE_S = 30.0
EAGER_RESTORE_DEADLINE_S = 600.0
HANDOVER_DEADLINE_S = 10.0
RUNTIME_EXIT_DEADLINE_S = 30.0
# Of all programs that a copy meets before its first instruction, together.
COPY_HOOK_DEADLINE_S = 30.0
# All of a rollback, or of a release; then whoever does it says that it hangs.
UNDO_DEADLINE_S = 90.0
ROOTFS_DEADLINE_S = 3600.0
# rsync that looks at many files sends their names meanwhile; one that says nothing for so long is
# at a single huge file, or hangs.
ROOTFS_SILENCE_S = 120.0
# The container stands still meanwhile. The passes before took what is to be taken, so this one only
# looks; whoever has so many files that looking takes longer must not be moved like this.
ROOTFS_FROZEN_DEADLINE_S = 30.0
FILL_DEADLINE_S = 3600.0

# While the container stands still: how often the target is asked whether it is there, and how long
# it may be silent, unless the user says otherwise (--silence). A rollback costs the users this
# much; a busy host or full link answers sooner, one that is starved of processors may not.
FROZEN_PING_S = 0.5
FROZEN_SILENCE_S = 5.0
# A target whose source is lost for longer gives up: FROZEN_SILENCE_S and LINK_GRACE_MORE_S.
FROZEN_SILENCE_S_MAX = 15.0

# A connection of the control channel that is silent for so long is asked whether it is there; half
# of it later it counts as broken. At 500 ms of delay an answer takes one second.
HEARTBEAT_S = 5.0
# How long the source tries to reconnect while the container runs: a router that starts again takes
# less. While it stands still FROZEN_SILENCE_S decides, after the commit the machine does.
LINK_PATIENCE_S = 30.0
# A host that refuses connections is there, and its agent is not; one that starts again has lost the
# sessions that hold nothing. Longer than a firewall's rule is wrong for by mistake.
LINK_REFUSED_S = 2.0
# The target waits for its source's patience and this much more: the two may notice a silent link
# 1.5 HEARTBEAT_S apart, and the source's last attempt takes its time.
LINK_GRACE_MORE_S = 1.5 * HEARTBEAT_S + 3.0
# The source's kernel has ended the connection in order, which it does for a process that died, and
# hardly ever for one that lives. That this was heard means that the link is up: a source that lives
# is back within a few round trips (TCP, TLS, HTTP: 4 s at 500 ms of delay each way).
LINK_ORPHAN_S = 8.0

# How long a coordinator that has committed asks a target that does not answer, before it leaves the
# container held and the decision to the operator.
IN_DOUBT_PATIENCE_S = 60.0
RECONNECT_PAUSE_S = 0.5
ASK_AGAIN_S = 5.0
# A word to the peer's agent outside of a session: it may wait for its own journal first.
WORD_DEADLINE_S = 15.0
# A host that is there answers a connection in four round trips at most, 500 ms of delay and a lost
# packet included; whoever asks has a person waiting, or a claim that others want.
WORD_CONNECT_DEADLINE_S = 5.0
# A drain reads its modules and writes its file, on a host that may be shutting down and slow: one
# that is given up then has its containers end with the host. One that ends is noticed at once.
DRAIN_START_DEADLINE_S = 180.0
# The agent's rounds over migrations whose coordinator is dead.
RECOVERY_PERIOD_S = 5.0
# How long a decision that the journal can't take is tried again.
JOURNAL_PATIENCE_S = 20.0
JOURNAL_PAUSE_S = 1.0
# From the answer to OpenSession to the control channel: nothing is in between.
FIRST_CONNECT_DEADLINE_S = 10.0
# How long a new migration asks the target of a former one that was left in doubt.
FORMER_PATIENCE_S = 5.0

# For an agent that stops to undo the sessions that hold nothing.
STOP_DEADLINE_S = 30.0

# How often the agent looks whether its certificate for TLS is half through its life of a day, and
# for revocations that a command brought: as long as a connection of a revoked host may live on.
IDENTITY_PERIOD_S = 5.0

# Sessions that an agent serves at once, whatever its policy says: each may hold a container's
# memory.
SESSIONS_MAX = 16

# Blocking steps of an agent's sessions at once, four of each: they wait for processes to end.
AGENT_THREADS = 4 * SESSIONS_MAX

# CRIU copies deleted but open files into its images only up to this size (`--ghost-limit`).
GHOST_FILE_BYTES_MAX = 64 << 20


@dataclass(frozen=True, slots=True)
class HostPaths:
    """Where this host keeps what a migration needs.

    `run` is on a tmpfs and gone after a reboot; `state` survives one. `identity` and `bundles` are
    below `config` and `state` unless they are given.
    """

    run: Path = Path("/run/migrate")
    state: Path = Path("/var/lib/migrate")
    config: Path = Path("/etc/migrate")
    identity: Path | None = None
    bundles: Path | None = None

    def once(self, migration_id: str) -> HostPaths:
        """What is for that migration alone, as if this host had nothing else: see `agent/once.py`.
        Containers that come go where all are, since they stay."""
        state = self.state / "once" / migration_id
        return replace(
            self,
            run=self.run / "once" / migration_id,
            state=state,
            identity=state / "tls",
            bundles=self.containers,
        )

    def with_identity(self, directory: Path) -> HostPaths:
        """The same host, which shows another identity."""
        return replace(self, identity=directory)

    @property
    def tls(self) -> IdentityPaths:
        """The identity of this host."""
        return IdentityPaths(self.identity or self.config / "tls")

    @property
    def journal(self) -> Path:
        """The journal of handovers."""
        return self.state / "journal.sqlite"

    @property
    def policy(self) -> Path:
        """What this host's operator lets come and go: see `policy.py`."""
        return self.config / "policy.toml"

    @property
    def copy_hooks(self) -> Path:
        """Programs that copies may meet before their first instruction: `agent/copy_hook.py`."""
        return self.config / "clone.d"

    @property
    def containers(self) -> Path:
        """Bundles of containers that came here."""
        return self.bundles or self.state / "containers"

    @property
    def front(self) -> Path:
        """All that the agent's front sees of this host."""
        return self.run / "front"

    @property
    def cordon(self) -> Path:
        """A file that is there while this host takes nothing: see `cordon.py`."""
        return self.state / "cordon.json"

    @property
    def drain(self) -> Path:
        """What is kept of a drain of this host, and of the moves that it began."""
        return self.state / "drain"

    @property
    def drain_hooks(self) -> Path:
        """Programs that are asked before and after each move of a drain."""
        return self.config / "drain.d"

    @property
    def drain_claim(self) -> Path:
        """What is locked by the process that drains this host."""
        return self.run / "claims" / "drain"

    @property
    def agent_claim(self) -> Path:
        """What is locked by the agent of this host as long as it runs."""
        return self.run / "claims" / "agent"

    def claim(self, migration_id: str, role: str) -> Path:
        """What is locked by the process that drives one side of a migration: see `claim.py`."""
        return self.run / "claims" / f"{migration_id}.{role}"

    def rate(self, migration_id: str) -> Path:
        """What a migration may send, if a drain says so (`told_rate.py`)."""
        return self.run / "rates" / migration_id

    def session(self, migration_id: str, role: str) -> Path:
        """The directory of one migration; a tmpfs of its own is mounted there."""
        return self.run / "sessions" / f"{migration_id}.{role}"
