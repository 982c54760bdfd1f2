"""Reading OCI's config.json, which every runtime's bundle has. Pure; no shape of it is a crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from migrate.runtimes.base import Mount


def namespace_path(spec: dict[str, Any], kind: str) -> Path | None:
    """The path of the namespace `kind` in config.json, None when it has none."""
    for namespace in part(spec, "linux").get("namespaces") or ():
        if namespace.get("type") == kind and namespace.get("path"):
            return Path(namespace["path"])
    return None


def mounts_of(spec: dict[str, Any]) -> tuple[Mount, ...]:
    """The mounts of config.json, in its order."""
    return tuple(
        Mount(
            destination=str(mount.get("destination", "")),
            kind=str(mount.get("type") or ""),
            source=str(mount.get("source") or ""),
            options=tuple(str(option) for option in mount.get("options") or ()),
        )
        for mount in spec.get("mounts") or ()
    )


def part(spec: dict[str, Any], key: str) -> dict[str, Any]:
    """The object `key` of `spec`, an empty one if it is none."""
    value = spec.get(key)
    return value if isinstance(value, dict) else {}
