"""Images of one container made those of another: its host name, the addresses of its sockets, and
the cgroup of its tasks.

A socket that is bound to an address of the container's own is restored by bind(2), which fails
where no interface has that address. Here the address is replaced, in the family that the socket
has: an IPv4 address may also be mapped into IPv6 (::ffff:10.0.0.5).

Source: images/utsns.proto, images/sk-inet.proto, images/fdinfo.proto, images/cgroup.proto; an
address is one word of 32 bits, or four, each with the bytes in the order of the network
(criu/sk-inet.c: restore_sockaddr).
Pure: bytes in, bytes out.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import TYPE_CHECKING, Final

from criu_glue.core.timers import FILES_BYTES_MAX, FILES_MAGIC, FILES_MAX
from criu_glue.core.wire import (
    IMG_COMMON_MAGIC,
    MAGIC_BYTES,
    WIRE_BYTES,
    WIRE_VARINT,
    ImageFormatError,
    check_magic,
    encode_varint,
    iterate_fields,
    split_entries,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    IP = ipaddress.IPv4Address | ipaddress.IPv6Address

UTSNS_MAGIC: Final = 0x54473203
UTSNS_BYTES_MAX: Final = 4096
# utsns_entry: nodename = 1
_NODENAME: Final = 1
# file_entry: type = 1, isk = 4; fd_types: INETSK = 4
_TYPE_INETSK: Final = bytes((1 << 3, 4))
_FILE_SOCKET: Final = 4
# inet_sk_entry: src_addr = 11, dst_addr = 12
_ADDRESSES: Final = (11, 12)
CGROUP_MAGIC: Final = 0x59383330
CGROUP_BYTES_MAX: Final = 1 << 20
# cgroup_entry: sets = 1; cg_set_entry: ctls = 2; cg_member_entry: name = 1, path = 2,
# cgns_prefix = 3, the length of what the namespace hides of the path
_SETS, _MEMBERS = 1, 2
_NAME, _PATH, _HIDDEN = 1, 2, 3


def rename_host(data: bytes, hostname: str, what: str = "utsns") -> bytes:
    """`utsns-N.img` with another host name. Raises ImageFormatError."""
    check_magic(data, IMG_COMMON_MAGIC, UTSNS_MAGIC, what)
    starts, ends = split_entries(data, what, entries_max=1)
    if len(starts) != 1:
        raise ImageFormatError(f"{what}: no entry")
    fields = [
        (field, kind, hostname.encode() if field == _NODENAME else value)
        for field, kind, value in _fields(data, int(starts[0]), int(ends[0]))
    ]
    return data[:MAGIC_BYTES] + _entry(fields)


def rename_addresses(data: bytes, renamed: Mapping[IP, IP], what: str = "files") -> bytes:
    """`files.img` whose sockets have the addresses that their own are renamed to.

    Raises ImageFormatError.
    """
    if len(data) > FILES_BYTES_MAX:
        raise ImageFormatError(f"{what}: {len(data)} bytes are more than {FILES_BYTES_MAX}")
    check_magic(data, IMG_COMMON_MAGIC, FILES_MAGIC, what)
    words = _words(renamed)
    starts, ends = split_entries(data, what, entries_max=FILES_MAX)
    out = [data[:MAGIC_BYTES]]
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if data.startswith(_TYPE_INETSK, start):
            fields = [
                (field, kind, _renamed_socket(value, words))
                if field == _FILE_SOCKET and isinstance(value, bytes)
                else (field, kind, value)
                for field, kind, value in _fields(data, start, end)
            ]
            out.append(_entry(fields))
        else:
            out.append(data[start - 4 : end])
    return b"".join(out)


def rename_cgroups(data: bytes, group: str, what: str = "cgroup") -> bytes:
    """`cgroup.img` whose tasks are in `group` (from the mount of cgroup v2 on, "/…") or below it,
    in place of the one beside it that they were in. Raises ImageFormatError."""
    check_magic(data, IMG_COMMON_MAGIC, CGROUP_MAGIC, what)
    starts, ends = split_entries(data, what, entries_max=1)
    if len(starts) != 1:
        raise ImageFormatError(f"{what}: no entry")

    def member(data: bytes) -> bytes:
        return _renamed_member(data, group)

    def of_set(data: bytes) -> bytes:
        return _message(_with(_fields(data, 0, len(data)), _MEMBERS, member))

    fields = _fields(data, int(starts[0]), int(ends[0]))
    return data[:MAGIC_BYTES] + _entry(_with(fields, _SETS, of_set))


def _with(fields: Iterator[_Field], wanted: int, change: Callable[[bytes], bytes]) -> list[_Field]:
    """The fields, those of one number changed."""
    return [
        (field, kind, change(value) if field == wanted and isinstance(value, bytes) else value)
        for field, kind, value in fields
    ]


def _renamed_member(data: bytes, group: str) -> bytes:
    """A cg_member_entry. That of cgroup v2 has no name."""
    fields = list(_fields(data, 0, len(data)))
    told = {field: value for field, _, value in fields}
    path = told.get(_PATH)
    if told.get(_NAME) or not isinstance(path, bytes):
        return data
    old, (*beside, own) = path.split(b"/"), group.encode().split(b"/")
    at = len(beside)
    if old[:at] != beside or not any(old[at:]):
        return data
    new = b"/".join((*beside, own, *old[at + 1 :]))
    changed: dict[int, int | bytes] = {_PATH: new}
    if isinstance(hidden := told.get(_HIDDEN), int) and hidden > len(b"/".join(beside)):
        changed[_HIDDEN] = hidden + len(new) - len(path)
    return _message([(field, kind, changed.get(field, value)) for field, kind, value in fields])


def _words(renamed: Mapping[IP, IP]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """The addresses as CRIU writes them, those of IPv4 as those of IPv6 too."""
    words = {}
    for old, new in renamed.items():
        if old.version != new.version:
            raise ImageFormatError(f"{old} can't become {new}, of another family")
        words[_packed(old.packed)] = _packed(new.packed)
        if old.version == 4:
            mapped = bytes(10) + b"\xff\xff"
            words[_packed(mapped + old.packed)] = _packed(mapped + new.packed)
    return words


def _packed(address: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(address) // 4}I", address)


_Field = tuple[int, int, int | bytes]


def _fields(data: bytes, start: int, end: int) -> Iterator[_Field]:
    for field, kind, value, size in iterate_fields(data, start, end):
        yield field, kind, data[value : value + size] if kind == WIRE_BYTES else value


def _renamed_socket(data: bytes, words: Mapping[tuple[int, ...], tuple[int, ...]]) -> bytes:
    """An inet_sk_entry. CRIU's are not packed: one field a word."""
    fields = list(_fields(data, 0, len(data)))
    for wanted in _ADDRESSES:
        at = [index for index, one in enumerate(fields) if one[0] == wanted]
        if any(fields[index][1] != WIRE_VARINT for index in at):
            raise ImageFormatError("a socket has an address of a kind that is unknown here")
        found = tuple(value for index in at if isinstance(value := fields[index][2], int))
        for index, word in zip(at, words.get(found, found), strict=True):
            fields[index] = (wanted, WIRE_VARINT, word)
    return _message(fields)


def _message(fields: Sequence[_Field]) -> bytes:
    out = bytearray()
    for field, kind, value in fields:
        out += encode_varint(field << 3 | kind)
        if isinstance(value, bytes):
            out += encode_varint(len(value)) + value
        elif kind == WIRE_VARINT:
            out += encode_varint(value)
        else:
            raise ImageFormatError(f"field {field} has a number of fixed size")
    return bytes(out)


def _entry(fields: Sequence[_Field]) -> bytes:
    message = _message(fields)
    return struct.pack("<I", len(message)) + message
