"""Changes JSON as JSON, for readers in C whose coverage can't be seen: bytes changed at random are
hardly ever JSON any more, and never get to what is behind the parser."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import atheris

HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 1 << 53, (1 << 63) - 1, 1 << 63, 1 << 64, 1e308, -0.0, "", ".", "..",
    "../../etc/passwd", "/etc/passwd", "a/b", "a\0b", "\n", "name\n", "x" * 300, "\ud800", "é", "*",
    "-rf", "$(id)", "a" * 64, "0" * 64, [], {}, [[]], "default", "10.0.0.1/24", "fe80::1%eth0",
)  # fmt: skip


def mutate(data: bytes, size_max: int, seed: int) -> bytes:
    """libFuzzer's own change of the bytes, or one or a few of the values."""
    chance = random.Random(seed)
    if chance.random() < 0.3:
        return bytes(atheris.Mutate(data, size_max))
    head, text = data[:1], data[1:]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return bytes(atheris.Mutate(data, size_max))
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        value = _changed(value, chance)
    try:
        changed = head + json.dumps(value, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return data
    return changed if len(changed) <= size_max else data


def _changed(value: Any, chance: random.Random) -> Any:
    """`value` with one thing in it replaced, removed, doubled or renamed."""
    place = value
    path: list[tuple[Any, Any]] = []
    while isinstance(place, (dict, list)) and place and (not path or chance.random() < 0.8):
        key = (
            chance.choice(list(place)) if isinstance(place, dict) else chance.randrange(len(place))
        )
        path.append((place, key))
        place = place[key]
    if not path:
        return _hostile(chance)
    parent, key = path[-1]
    match chance.randrange(5):
        case 1 if isinstance(parent, list):
            parent.extend([place] * chance.choice((1, 1, 100)))
        case 1:
            parent[str(_hostile(chance))[:64]] = place
        case 0 | 2 if isinstance(place, str) and place.startswith("{"):
            parent[key] = _inside(place, chance)
        case 2 if isinstance(place, str):
            at = chance.randrange(len(place) + 1)
            parent[key] = place[:at] + str(_hostile(chance)) + place[at:]
        case 0:
            del parent[key]
        case 2 if isinstance(place, int):
            parent[key] = place + chance.choice((-1, 1, 1 << 31, 1 << 63))
        case 3:
            # Another thing of the same value, in its place.
            other, name = chance.choice(path)
            parent[key] = json.loads(json.dumps(other[name]))
        case _:
            parent[key] = _hostile(chance)
    return value


def _inside(text: str, chance: random.Random) -> str:
    """JSON that travels as a text in JSON, changed as JSON too."""
    try:
        return json.dumps(_changed(json.loads(text), chance))
    except (ValueError, RecursionError):
        return text[: chance.randrange(len(text))]


def _hostile(chance: random.Random) -> Any:
    """One of its own: it may be changed later."""
    return copy.deepcopy(chance.choice(HOSTILE))
