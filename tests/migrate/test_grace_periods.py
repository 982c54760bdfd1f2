"""The switch of the kernel is played by files: it is the machine's, and other labs turn it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from migrate import grace_periods
from migrate.grace_periods import CLAIM_NAME, GracePeriods, put_back_left
from tests.lab.waiting import wait_until


class Kernel:
    """Its three files."""

    def __init__(self, directory: Path) -> None:
        self.expedited, self.normal, self.nohz_full = (
            directory / name for name in ("rcu_expedited", "rcu_normal", "nohz_full")
        )
        self.expedited.write_text("0\n")
        self.normal.write_text("0\n")
        self.nohz_full.write_text("(null)\n")

    @property
    def is_expedited(self) -> bool:
        return self.expedited.read_text().strip() == "1"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel(tmp_path)
    monkeypatch.setattr(grace_periods, "_EXPEDITED", kernel.expedited)
    monkeypatch.setattr(grace_periods, "_NORMAL", kernel.normal)
    monkeypatch.setattr(grace_periods, "_NOHZ_FULL", kernel.nohz_full)
    return kernel


def test_they_are_short_for_as_long_as_asked(tmp_path: Path, kernel: Kernel) -> None:
    periods = GracePeriods(tmp_path, "coordinator")
    for _ in range(2):
        periods.shorten()
        periods.shorten()
        assert kernel.is_expedited
        periods.put_back()
        periods.put_back()
        assert not kernel.is_expedited
        assert not (tmp_path / CLAIM_NAME).exists()


@pytest.mark.parametrize(
    ("name", "text"), [("normal", "1"), ("nohz_full", "2-7"), ("expedited", "1")]
)
def test_the_operators_word_counts(tmp_path: Path, kernel: Kernel, name: str, text: str) -> None:
    getattr(kernel, name).write_text(text)
    periods = GracePeriods(tmp_path, "coordinator")
    periods.shorten()
    assert not (tmp_path / CLAIM_NAME).exists()
    periods.put_back()
    assert getattr(kernel, name).read_text() == text
    assert kernel.is_expedited == (name == "expedited")


def test_a_kernel_without_it(tmp_path: Path, kernel: Kernel) -> None:
    for path in (kernel.expedited, kernel.normal):
        path.unlink()
    GracePeriods(tmp_path, "agent").shorten()
    assert not kernel.expedited.exists()


def test_the_first_of_two_takes_it_back(tmp_path: Path, kernel: Kernel) -> None:
    first, second = (GracePeriods(tmp_path, kind) for kind in ("coordinator", "agent"))
    first.shorten()
    second.shorten()
    second.put_back()
    put_back_left(tmp_path)
    assert kernel.is_expedited
    first.put_back()
    assert not kernel.is_expedited


DIES = """
import sys, time
from pathlib import Path
from migrate import grace_periods
directory = Path(sys.argv[1])
grace_periods._EXPEDITED = directory / "rcu_expedited"
grace_periods._NORMAL = directory / "rcu_normal"
grace_periods._NOHZ_FULL = directory / "nohz_full"
periods = grace_periods.GracePeriods(directory, "coordinator")
periods.shorten()
time.sleep(60)
"""


@pytest.mark.parametrize("by_the_next", [True, False])
def test_what_a_dead_process_left_is_put_back(
    tmp_path: Path, kernel: Kernel, by_the_next: bool
) -> None:
    process = subprocess.Popen([sys.executable, "-c", DIES, str(tmp_path)])
    try:
        wait_until("it is switched", lambda: kernel.is_expedited)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert kernel.is_expedited
    if by_the_next:
        periods = GracePeriods(tmp_path, "coordinator")
        periods.shorten()
        assert kernel.is_expedited
        periods.put_back()
    else:
        put_back_left(tmp_path)
    assert not kernel.is_expedited
    assert not (tmp_path / CLAIM_NAME).exists()
