"""Reading OCI's config.json, which every runtime's bundle has. Pure; no shape of it is a crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from migrate.runtimes.base import Mount

# user_namespaces(7): the id that nobody can have.
_NO_ID = (1 << 32) - 1


def namespace_path(spec: dict[str, Any], kind: str) -> Path | None:
    """The path of the namespace `kind` in config.json, None when it has none."""
    for namespace in part(spec, "linux").get("namespaces") or ():
        if namespace.get("type") == kind and namespace.get("path"):
            return Path(namespace["path"])
    return None


def has_user_namespace(spec: dict[str, Any]) -> bool:
    """Whether config.json gives the container a user namespace."""
    namespaces = part(spec, "linux").get("namespaces") or ()
    return any(isinstance(one, dict) and one.get("type") == "user" for one in namespaces)


def host_root(spec: dict[str, Any], mapping: str) -> int | None:
    """Which id of the host is 0 in the container's user namespace, by `mapping` ("uidMappings",
    "gidMappings"); None if it has none."""
    for extent in part(spec, "linux").get(mapping) or ():
        if isinstance(extent, dict) and extent.get("containerID") == 0 and extent.get("size"):
            outside = extent.get("hostID")
            return outside if type(outside) is int and 0 <= outside < _NO_ID else None
    return None


def network_namespace(spec: dict[str, Any], pid: int) -> Path | None:
    """Where the container's network namespace is: by the path in config.json; in a user namespace,
    which has to own it, that of the first task `pid`, 0 for none. None when it can't be told."""
    if has_user_namespace(spec):
        return Path(f"/proc/{pid}/ns/net") if pid else None
    return namespace_path(spec, "network")


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
