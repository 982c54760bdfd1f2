"""One pre-dump: the runtime has CRIU copy the written memory of a container that runs on.

    runtime checkpoint --pre-dump ── criu: tasks stopped for a moment ─ memory written as they run

Nobody holds CRIU here, and the tasks are not in custody as in the final dump: it stops and lets go
of them by itself. The kernel is asked not to take it when memory runs out, since a CRIU that dies
in that moment leaves its code in the tasks.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import TYPE_CHECKING

from criu_glue.core.log_hints import explain
from criu_glue.core.stats import decode_dump_stats
from criu_glue.core.wire import ImageFormatError
from criu_glue.errors import TrackerError
from migrate.mounts import is_full
from migrate.processes import kill_tree, last_message, tail
from migrate.runtimes.command import LOG_NAME

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from migrate.runtimes.base import Container, Runtime

# All memory of a container is written: a terabyte at 1 GB/s. Whoever hangs for so long is killed,
# and the tasks with what it has done to them are not mended.
DEADLINE_S = 1200.0
_LOG_BYTES_MAX = 4 << 20
# In `read` mode the tasks stand still only while their page tables are walked, not while pages are
# taken into pipes; a first round of 128 MiB stopped them for a fifth of the time.
_OPTIONS = ("manage-cgroups ignore", "pre-dump-mode read", "verbosity 2")
# The rank is inherited; where the system does not allow it, CRIU goes without.
_RANKED = 'echo -1000 2> /dev/null > /proc/self/oom_score_adj; exec "$@"'


class PreDump:
    """Calls it makes, one after another, of one container; `directory` is made, for the logs.
    `stood_still_ms` hears after each for how long CRIU has stopped the tasks."""

    def __init__(
        self,
        container: Container,
        runtime: Runtime,
        directory: Path,
        stood_still_ms: Callable[[float], None],
    ) -> None:
        self._container = container
        self._runtime = runtime
        self._directory = directory
        self._stood_still_ms = stood_still_ms
        self._config = directory / "criu.conf"
        directory.mkdir(mode=0o700)
        self._config.write_text("\n".join(_OPTIONS) + "\n")

    def __call__(self, image_dir: Path, parent: str | None) -> None:
        """Returns when the images are complete. Blocking. Raises TrackerError."""
        command = self._runtime.pre_dump_command(
            self._container, image_dir, self._directory, parent=parent
        )
        # A session of its own: what interrupts the coordinator lets it come to its end.
        process = subprocess.Popen(
            ["/bin/sh", "-c", _RANKED, "pre-dump", *command],
            env={**os.environ, "CRIU_CONFIG_FILE": str(self._config)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired as error:
            kill_tree(process.pid)
            process.wait()
            raise TrackerError(f"CRIU's pre-dump has not ended in {DEADLINE_S:g} s") from error
        if code:
            raise TrackerError(f"CRIU's pre-dump failed: {self._why()}")
        self._measure()

    def _measure(self) -> None:
        # It is a figure of the report, and nothing depends on it.
        with contextlib.suppress(OSError, ImageFormatError):
            stats = decode_dump_stats((self._directory / "stats-dump").read_bytes())
            self._stood_still_ms((stats.freezing_us + stats.frozen_us) / 1000)

    def _why(self) -> str:
        if is_full(self._directory):
            return "no space left on the session's tmpfs; free memory on this host"
        hint = explain(tail(self._directory / "dump.log", _LOG_BYTES_MAX))
        said = last_message(tail(self._directory / LOG_NAME, _LOG_BYTES_MAX))
        return "; ".join(
            filter(None, (hint.line or said or "it ended without a word", hint.remedy))
        )
