"""Random programs against a model: whatever tasks do to their memory between rounds, a copy that
is kept up to date from nothing but the tracker's reports equals the memory at the end."""

from __future__ import annotations

import contextlib
import mmap
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from criu_glue.memory import TaskMemory
from criu_glue.trackers import soft_dirty
from criu_glue.trackers.soft_dirty import SoftDirtyTracker
from criu_glue.trackers.write_protect import WriteProtectTracker
from tests.criu_glue.puppets import (
    ARENA,
    NONE,
    PAGE,
    READ,
    READ_WRITE,
    Puppet,
    Stage,
    present_pages,
    state,
    until,
)

ARENA_PAGES = 48
PUPPETS_MAX = 4

first_pages = st.integers(0, ARENA_PAGES - 1)
page_counts = st.integers(1, 12)
protections = st.sampled_from([NONE, READ, READ_WRITE])
which = st.integers(0, PUPPETS_MAX - 1)


class Model:
    """What a puppet's arena must hold: per mapped page its protection and its number (0: zeros)."""

    def __init__(self) -> None:
        self.protection: dict[int, int] = {}
        self.number: dict[int, int] = {}

    def copy(self) -> Model:
        made = Model()
        made.protection = dict(self.protection)
        made.number = dict(self.number)
        return made

    def mapped(self, first: int, pages: int) -> bool:
        return all(page in self.protection for page in range(first, first + pages))

    def free(self, first: int, pages: int) -> bool:
        fits = first + pages <= ARENA_PAGES
        return fits and not any(page in self.protection for page in range(first, first + pages))

    def unmap(self, first: int, pages: int) -> None:
        for page in range(first, first + pages):
            self.protection.pop(page, None)
            self.number.pop(page, None)


class Programs(RuleBasedStateMachine):
    """Commands to some puppets, rounds of copying between them, the comparison at the end."""

    program: Path
    tracks_by_bits = False

    @initialize()
    def start(self) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.stage = Stage(self.program, self.directory / "socket")
        self.puppets: list[Puppet] = [self.stage.start()]
        self.models: dict[int, Model] = {self.puppets[0].pid: Model()}
        self.copies: dict[int, dict[int, bytes]] = {}
        self.numbers = iter(range(1, 1 << 40, 1 << 16))
        self.tracker = (
            SoftDirtyTracker(self.pids, self.still)
            if self.tracks_by_bits
            else WriteProtectTracker(self.pids)
        )

    def pids(self) -> list[int]:
        return [puppet.pid for puppet in self.puppets]

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """They do nothing without a command."""
        for puppet in self.puppets:
            puppet.settle()
        yield

    def pick(self, index: int) -> tuple[Puppet, Model]:
        puppet = self.puppets[index % len(self.puppets)]
        return puppet, self.models[puppet.pid]

    @rule(who=which, first=first_pages, pages=page_counts, protection=protections)
    def map(self, who: int, first: int, pages: int, protection: int) -> None:
        puppet, model = self.pick(who)
        if model.free(first, pages):
            puppet.do("map", ARENA + first * PAGE, pages, protection)
            for page in range(first, first + pages):
                model.protection[page] = protection

    @rule(who=which, first=first_pages, pages=page_counts)
    def unmap(self, who: int, first: int, pages: int) -> None:
        puppet, model = self.pick(who)
        puppet.do("unmap", ARENA + first * PAGE, pages)
        model.unmap(first, pages)

    @rule(who=which, first=first_pages, pages=page_counts, protection=protections)
    def protect(self, who: int, first: int, pages: int, protection: int) -> None:
        puppet, model = self.pick(who)
        if model.mapped(first, pages):
            puppet.do("protect", ARENA + first * PAGE, pages, protection)
            for page in range(first, first + pages):
                model.protection[page] = protection

    @rule(who=which, first=first_pages, pages=page_counts, to=first_pages, grown=page_counts)
    def move(self, who: int, first: int, pages: int, to: int, grown: int) -> None:
        """mremap(2). It refuses several mappings at a time, older kernels always, newer ones
        (6.17) only when their size changes."""
        puppet, model = self.pick(who)
        apart = to >= first + pages or to + grown <= first
        if not (model.mapped(first, pages) and model.free(to, grown) and apart):
            return
        puppet.send("remap", ARENA + first * PAGE, pages, grown, ARENA + to * PAGE)
        if puppet.answer() < 0:
            # It may have unmapped the tail that would not fit before it refused.
            if grown < pages:
                model.unmap(first + grown, pages - grown)
                puppet.do("unmap", ARENA + (first + grown) * PAGE, pages - grown)
            return
        protections = [model.protection[first + i] for i in range(pages)]
        numbers = [model.number.get(first + i, 0) for i in range(pages)]
        model.unmap(first, pages)
        for i in range(grown):
            model.protection[to + i] = protections[min(i, pages - 1)]
            model.number[to + i] = numbers[i] if i < pages else 0

    @rule(who=which, first=first_pages, pages=page_counts)
    def write(self, who: int, first: int, pages: int) -> None:
        puppet, model = self.pick(who)
        number = next(self.numbers)
        for page in range(first, first + pages):
            if model.protection.get(page) == READ_WRITE:
                puppet.do("write", ARENA + page * PAGE, 1, number + page)
                model.number[page] = number + page

    @rule(who=which, first=first_pages, pages=page_counts)
    def touch(self, who: int, first: int, pages: int) -> None:
        puppet, model = self.pick(who)
        for page in range(first, first + pages):
            if model.protection.get(page, NONE) != NONE:
                puppet.do("touch", ARENA + page * PAGE, 1)

    @rule(who=which, first=first_pages, pages=page_counts)
    def give_back(self, who: int, first: int, pages: int) -> None:
        puppet, model = self.pick(who)
        if model.mapped(first, pages):
            puppet.do("advise", ARENA + first * PAGE, pages, mmap.MADV_DONTNEED)
            for page in range(first, first + pages):
                model.number[page] = 0

    @rule(who=which, pages=page_counts)
    def grow_heap(self, who: int, pages: int) -> None:
        puppet, _ = self.pick(who)
        heap = puppet.do("brk", pages)
        puppet.do("write", heap, pages, next(self.numbers))

    @rule(who=which, frames=page_counts)
    def grow_stack(self, who: int, frames: int) -> None:
        self.pick(who)[0].do("dig", frames)

    @precondition(lambda self: len(self.puppets) < PUPPETS_MAX)
    @rule(who=which)
    def fork(self, who: int) -> None:
        puppet, model = self.pick(who)
        child = puppet.fork()
        self.puppets.append(child)
        self.models[child.pid] = model.copy()

    @precondition(lambda self: len(self.puppets) > 1)
    @rule(who=which)
    def leave(self, who: int) -> None:
        """Not the first: it is the parent that the others are reaped by."""
        puppet = self.puppets[1 + who % (len(self.puppets) - 1)]
        puppet.send("exit")
        until(lambda: not Path(f"/proc/{puppet.pid}").exists() or state(puppet.pid) == "Z")
        self.puppets.remove(puppet)
        del self.models[puppet.pid]
        self.copies.pop(puppet.pid, None)

    @rule(who=which)
    def exec(self, who: int) -> None:
        puppet, _ = self.pick(who)
        puppet.exec()
        self.models[puppet.pid] = Model()

    @rule()
    def copy_a_round(self) -> None:
        self.copy()

    def copy(self, *, last: bool = False) -> None:
        for task in self.tracker.collect(last=last):
            buffer = bytearray(task.pages * PAGE)
            memory = TaskMemory(task.pid)
            mask = memory.read(task.runs, memoryview(buffer))
            memory.close()
            pages = [a + i * PAGE for a, count in task.runs.tolist() for i in range(count)]
            copied = self.copies.setdefault(task.pid, {})
            for i, address in enumerate(pages):
                if mask[i]:
                    copied[address] = bytes(buffer[i * PAGE : (i + 1) * PAGE])

    def teardown(self) -> None:
        if not hasattr(self, "stage"):
            return
        try:
            with self.stage:
                self.compare()
        finally:
            self.tracker.detach()
            shutil.rmtree(self.directory)

    def compare(self) -> None:
        for puppet in self.puppets:
            puppet.settle()
        self.copy(last=True)
        if isinstance(self.tracker, WriteProtectTracker):
            assert self.tracker.untracked == {}
        for puppet in self.puppets:
            copied = self.copies[puppet.pid]
            present = present_pages(puppet.pid)
            for address, content in present.items():
                assert copied.get(address, bytes(PAGE)) == content, f"{address:#x} differs"
            for page, number in self.models[puppet.pid].number.items():
                address = ARENA + page * PAGE
                restored = copied.get(address, bytes(PAGE)) if address in present else bytes(PAGE)
                words = memoryview(restored).cast("Q")
                wanted = (number, number ^ (1 << 64) - 1) if number else (0, 0)
                assert (words[0], words[511]) == wanted, f"page {page} holds another number"


@pytest.mark.parametrize(
    "by_bits",
    [
        pytest.param(False, id="write-protect"),
        pytest.param(
            True,
            id="soft-dirty",
            marks=pytest.mark.skipif(
                soft_dirty.supported() is not None, reason=str(soft_dirty.supported())
            ),
        ),
    ],
)
def test_a_copy_kept_by_the_tracker_equals_the_memory(programs: Path, by_bits: bool) -> None:
    attributes = {"program": programs / "puppet", "tracks_by_bits": by_bits}
    machine = type("Programs", (Programs,), attributes)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            suppress_health_check=list(HealthCheck),
        ),
    )
