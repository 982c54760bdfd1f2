"""The file of the fleet's hosts."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from migrate.errors import MigrateError, UsageError
from migrate.hosts import book
from migrate.hosts.book import HostRecord


def test_hosts_are_put_found_and_dropped(tmp_path: Path) -> None:
    first, second = HostRecord("db7", "root@db7:22", ("10.0.0.7",), 7337, 5.0), HostRecord("a", "a")
    book.put(tmp_path, first)
    book.put(tmp_path, second)
    assert book.read(tmp_path) == (second, first)
    assert book.find(tmp_path, "db7") == book.find(tmp_path, "root@db7:22") == first
    book.drop(tmp_path, "a")
    assert book.read(tmp_path) == (first,)
    assert (tmp_path / "hosts.json").stat().st_mode & 0o777 == 0o600


def test_a_host_that_is_put_again_is_replaced(tmp_path: Path) -> None:
    book.put(tmp_path, HostRecord("db7", "x"))
    book.put(tmp_path, HostRecord("db7", "y"))
    assert [one.destination for one in book.read(tmp_path)] == ["y"]


def test_an_unknown_host(tmp_path: Path) -> None:
    book.put(tmp_path, HostRecord("db7", "x"))
    with pytest.raises(UsageError) as refused:
        book.find(tmp_path, "db8")
    assert "db7" in refused.value.remedy


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"version": 1, "hosts": 5}',
        '{"version": 2, "hosts": []}',
        "\xff",
        pytest.param("x" * 2**21, id="large"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "hosts.json").write_text(content, encoding="latin-1")
    with pytest.raises(MigrateError, match=r"hosts\.json"):
        book.read(tmp_path)
    with pytest.raises(MigrateError, match=r"hosts\.json"):
        book.put(tmp_path, HostRecord("db7", "x"))
    assert (tmp_path / "hosts.json").read_text(encoding="latin-1") == content


def test_several_that_add_at_once(tmp_path: Path) -> None:
    names = [f"host{number}" for number in range(20)]
    adding = [
        threading.Thread(target=book.put, args=(tmp_path, HostRecord(name, name))) for name in names
    ]
    for one in adding:
        one.start()
    for one in adding:
        one.join()
    assert sorted(one.name for one in book.read(tmp_path)) == sorted(names)


def test_a_fleet_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book, "HOSTS_MAX", 2)
    book.put(tmp_path, HostRecord("a", "a"))
    book.put(tmp_path, HostRecord("b", "b"))
    book.put(tmp_path, HostRecord("b", "c"))
    with pytest.raises(UsageError, match="2 hosts"):
        book.put(tmp_path, HostRecord("c", "c"))
