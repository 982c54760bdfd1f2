"""A brake for CRIU: stops a dump or a restore at its very beginning, for as long as a test wants.
A restore is stopped before CRIU is executed, a dump when it has taken hold of the frozen tasks.

    brake = Brake(lab.host("A"))                         # once for each host
    lab.start_agent("B", env=Brake(lab.host("B")).env)   # or: begin(..., env=brake.env)
    with brake.on("dump"):
        ... brake.wait_reached(underway) ...                     # the container is frozen now
                                                         # released here

Without it such a moment lasts for a tenth of a second, and a test would have to be lucky.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Final, Literal

from bench.lab.host import Host
from bench.lab.host_files import PATH_INSIDE
from tests.lab.migrating import Underway
from tests.lab.waiting import wait_until

DIRECTORY: Final = "/usr/local/brake"
_KINDS: Final = {"dump": "1", "restore": "2"}
# criu_req.type is field 1 of the first request on the socket (criu/images/rpc.proto).
_PROGRAM: Final = f"""\
#!/usr/bin/python3 -ISE
import os, socket, sys, time
if len(sys.argv) > 2 and sys.argv[1] == "swrk":
    peer = socket.socket(fileno=int(sys.argv[2]))
    request = peer.recv(2, socket.MSG_PEEK)
    peer.detach()
    held = "{DIRECTORY}/hold-2"
    if request[1] == 2 and os.path.exists(held):
        open(held + ".reached", "w").close()
        while os.path.exists(held):
            time.sleep(0.002)
    if request[1] == 1:
        with open(os.environ["CRIU_CONFIG_FILE"], "a") as options:
            options.write("action-script {DIRECTORY}/hook\\n")
os.execv("/usr/sbin/criu", ["criu", *sys.argv[1:]])
"""
_HOOK: Final = f"""\
#!/bin/sh
[ "$CRTOOLS_SCRIPT_ACTION" = network-lock ] && [ -e {DIRECTORY}/hold-1 ] || exit 0
true > {DIRECTORY}/hold-1.reached
while [ -e {DIRECTORY}/hold-1 ]; do sleep 0.01; done
"""


class Brake:
    """The brake of one host. `env` belongs to whatever starts the runtime there."""

    env: Final[Mapping[str, str]] = {"PATH": f"{DIRECTORY}:{PATH_INSIDE}"}

    def __init__(self, host: Host) -> None:
        self._host = host
        self._hold = ""
        host.write_text(f"{DIRECTORY}/criu", _PROGRAM, 0o755)
        host.write_text(f"{DIRECTORY}/hook", _HOOK, 0o755)

    @contextlib.contextmanager
    def on(self, act: Literal["dump", "restore"]) -> Iterator[None]:
        """Holds the next CRIU that does `act`, until the end or `release`."""
        self._hold = f"{DIRECTORY}/hold-{_KINDS[act]}"
        self._host.write_text(self._hold, "")
        try:
            yield
        finally:
            self.release()
            self._host.path(f"{self._hold}.reached").unlink(missing_ok=True)

    def wait_reached(self, underway: Underway) -> None:
        """Returns when CRIU is held; fails when the migration has ended without."""

        def reached() -> bool:
            ended = underway.process.poll() is not None
            if self._host.path(f"{self._hold}.reached").exists():
                return True
            assert not ended, f"ended: {underway.stdout[-2000:]} {underway.stderr}"
            return False

        # Everything up to there: a busy machine needs longer than for a single state.
        wait_until("CRIU is held", reached, deadline_s=60.0 * self._host.patience)

    def release(self) -> None:
        """Lets it go. Idempotent."""
        self._host.path(self._hold).unlink(missing_ok=True)
