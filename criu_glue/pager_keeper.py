"""The pager's keeper: is there, and makes another worker when the worker dies or hangs.

It holds every descriptor that the worker has (pager_pair.py) and does nothing that the worker dies
of. When the keeper dies, the worker makes another one, in a process that then comes here.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from criu_glue.pager_pair import Companion, enter_role, fork, sweep
from criu_glue.pager_state import tell

if TYPE_CHECKING:
    from criu_glue.pager_pair import Pair
    from criu_glue.pager_state import PagerState

# So many workers that died one after the other without having filled anything died of something in
# the memory or the images. The next one only holds what there is.
DEATHS_MAX: Final = 10
# A turn of the worker's loop takes milliseconds and it waits for half a second at most. The longest
# ones seen are those of a host out of memory, which last as long as the kernel's search for some:
# seconds. Clients of the container wait for a minute and more before they give up.
HUNG_S: Final = 10.0
_LOOK_S: Final = 1.0
# Between tries to make a process where the system allows no more.
_FORK_AGAIN_S: Final = 0.1


def keep(pair: Pair) -> None:
    """Be the keeper until the pager ends, which ends the process.

    Returns in another process: one that was made to be the worker.
    """
    state = pair.state
    state.keepers += 1
    enter_role(state, "keeper")
    # Of a keeper that a worker made; the first one has no worker yet.
    worker = Companion.parent(state.worker) if state.worker else None
    while True:
        if worker is None:
            worker = _start_worker(pair)
            if worker is None:
                return
        _watch(worker, state)
        if state.ended:
            os._exit(int(state.ended != 1))
        worker.close()
        worker = None
        _count_death(state)
        tell(pair.alive)


def _start_worker(pair: Pair) -> Companion | None:
    sweep(pair.common)
    while True:
        try:
            return fork()
        except OSError:
            time.sleep(_FORK_AGAIN_S)


def _count_death(state: PagerState) -> None:
    settled = state.settled_bytes
    if settled != state.settled_then:
        state.settled_then = settled
        state.deaths = 0
    state.deaths += 1
    if state.deaths > DEATHS_MAX:
        # Even one that only holds dies: no need to hurry.
        time.sleep(_FORK_AGAIN_S)


def _watch(worker: Companion, state: PagerState) -> None:
    """Until the worker is dead; one that does not turn its loop any more is killed.

    Time is counted in looks of our own: when everything stood still, this process did so too.
    """
    beat, looks = state.beat, 0
    while not worker.is_gone(_LOOK_S):
        looks += 1
        if state.beat != beat or _waits_for_memory(worker.pid):
            beat, looks = state.beat, 0
        elif looks * _LOOK_S >= HUNG_S:
            worker.kill()


def _waits_for_memory(pid: int) -> bool:
    """Whether the kernel has it wait for a disk or for memory: no other worker would wait less."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat[stat.rindex(")") + 2] == "D"
