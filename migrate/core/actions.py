"""What the state machines ask for. The coordinator and the agent's session carry it out.

The actions of one transition are carried out in the order given, beside those of earlier ones;
ROLLBACK and DISCARD first stop whatever is still under way, whose answers count no more. Each act
reports by an event (named below); an act that fails reports ACT_FAILED and the ones behind it in
the same transition are dropped. TELL_* is best effort: without a link it does nothing and does not
fail. TELL_STATE tells a state that is in the journal already, never one that is being entered.
Every act is idempotent: recovery carries it out again.
"""

from __future__ import annotations

from enum import StrEnum


class SourceAction(StrEnum):
    """Acts of the coordinator."""

    RUN_PREFLIGHT = "run_preflight"  # -> PREFLIGHT_PASSED | PREFLIGHT_FAILED
    OPEN_SESSION = "open_session"  # -> SESSION_OPENED | TARGET_REFUSED
    COPY_ROOTFS = "copy_rootfs"  # the pass while the container runs; no event
    RUN_ROUND = "run_round"  # -> ROUND_DONE (another is worth it) | CONVERGED_NOW
    PREPARE_TARGET = "prepare_target"  # -> TARGET_PREPARED
    FREEZE_AND_DUMP = "freeze_and_dump"  # unplug, freeze, dump, hold -> DUMPED
    SEND_FINAL = "send_final"  # what FREEZE_AND_DUMP's overlapped sending left -> FINAL_SENT
    REQUEST_RESTORE = "request_restore"  # -> TARGET_HELD
    RECORD_COMMIT = "record_commit"  # journal COMMITTED, synced -> COMMIT_RECORDED
    SEND_COMMIT = "send_commit"  # -> TARGET_RUNNING
    ASK_TARGET = "ask_target"  # connect if need be and ask -> TARGET_* | LINK_LOST
    RELEASE = "release"  # CRIU kills the frozen tree, clean up -> RELEASED
    ROLLBACK = "rollback"  # thaw, replug, detach, tell the target if it hears -> ROLLED_BACK
    TELL_STATE = "tell_state"  # answer the target's question
    HOLD = "hold"  # leave everything as it is, and tell the operator
    REPORT_DONE = "report_done"
    REPORT_ABORTED = "report_aborted"


class TargetAction(StrEnum):
    """Acts of the agent's session."""

    RECEIVE = "receive"  # admit data streams; prepare page store, rootfs, network
    TELL_OPENED = "tell_opened"
    PREPARE = "prepare"  # start the restore up to its gate -> PREPARED
    TELL_PREPARED = "tell_prepared"
    RESTORE = "restore"  # open the gate -> CRIU_HELD
    TELL_HELD = "tell_held"
    RECORD_COMMIT = "record_commit"  # journal COMMITTED, synced -> COMMIT_RECORDED
    RESUME = "resume"  # let CRIU go, plug, announce -> RESUMED (at once if it runs already)
    TELL_RUNNING = "tell_running"
    FILL = "fill"  # watch over the pager -> FILL_DONE
    TELL_FILLED = "tell_filled"
    CLEAN_UP = "clean_up"  # wipe what only the migration needed; the container stays
    DISCARD = "discard"  # kill the copy if there is one, wipe everything -> DISCARDED
    TELL_ABORTED = "tell_aborted"
    TELL_FAILED = "tell_failed"  # the error of the event that led here
    TELL_STATE = "tell_state"  # answer the source's question
    CHECK_COPY = "check_copy"  # after a restart: is the copy still held? -> COPY_LOST if not
    ASK_SOURCE = "ask_source"  # connect if need be and ask -> SOURCE_* | LINK_LOST
    HOLD = "hold"  # leave everything as it is, and tell the operator
