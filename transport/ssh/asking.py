"""Who can be asked while a connection is made, and what is taken without asking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path


class Prompts(Protocol):
    """Somebody at a terminal."""

    def confirm(self, text: str) -> bool:
        """Whether the answer to a question is yes."""
        ...

    def secret(self, text: str) -> str:
        """A password, typed without an echo."""
        ...


@dataclass(frozen=True, slots=True)
class Asking:
    """prompts: None where nobody can be asked. accept_new: keys of hosts that no known_hosts has
    are taken and written down. config_file: instead of the user's ~/.ssh/config."""

    prompts: Prompts | None = None
    accept_new: bool = False
    config_file: Path | None = None
