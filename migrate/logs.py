"""Where the log of every process of ours goes: to its standard error, a line for each event."""

from __future__ import annotations

import sys

import structlog


def log_to_stderr(level: int) -> None:
    """From now on, what is at least as important as `level` (of `logging`)."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
