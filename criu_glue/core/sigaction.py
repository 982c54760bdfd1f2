"""The kernel's struct sigaction of x86-64: handler, flags, restorer, mask (rt_sigaction(2))."""

from __future__ import annotations

import struct
from typing import Final

ACTION: Final = struct.Struct("<4Q")
