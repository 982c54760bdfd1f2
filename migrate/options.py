"""What the user asks of one migration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from migrate import config
from migrate.core.throttling import OnStall
from migrate.way import DIRECT, Way


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `migrate CONTAINER --to HOST`, as the command line has checked them.
    bandwidth_told: a file that says another bandwidth while it goes on (`told_rate.py`)."""

    container: str
    target: str
    port: int = config.CONTROL_PORT
    tracker: Literal["auto", "write-protect", "soft-dirty", "predump", "none"] = "auto"
    restore: Literal["lazy", "eager"] = "lazy"
    max_downtime_ms: float = config.DOWNTIME_MS_MAX_DEFAULT
    rounds_max: int = config.ROUNDS_MAX_DEFAULT
    on_stall: OnStall = "throttle"
    streams: int | None = None
    link_patience_s: float = config.LINK_PATIENCE_S
    silence_s: float = config.FROZEN_SILENCE_S
    bandwidth_mib_s: float = float("inf")
    bandwidth_told: Path | None = None
    shared: tuple[str, ...] = ()
    way: Way = DIRECT

    @property
    def bandwidth_bytes_s(self) -> float:
        """The limit in bytes a second, infinite for none."""
        return self.bandwidth_mib_s * (1 << 20)
