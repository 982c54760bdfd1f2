"""What is brought to a host: complete, the same each time, nothing that leads elsewhere."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from migrate.errors import UsageError
from migrate.hosts import bundle, wheels


def _unpacked(made: bundle.Bundle, into: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(made.archive)) as archive:
        for member in archive:
            assert member.isfile()
            archive.extract(member, into)


def test_the_same_source_makes_the_same_bundle() -> None:
    assert bundle.make() == bundle.make()


def test_it_runs_where_it_was_unpacked(tmp_path: Path) -> None:
    """Its own packages come first; what they need is this environment's."""
    _unpacked(bundle.make(), tmp_path)
    program = (
        "import migrate.agent.serving, migrate.cli, migrate.moving, transport, criu_glue, sys\n"
        "for name in migrate.cli.cli.list_commands(None): migrate.cli.cli.get_command(None, name)\n"
        "print(*(module.__file__ for module in (migrate, transport, criu_glue)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert all(path.startswith(str(tmp_path)) for path in done.stdout.split())


def _wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_wheels_come_with_it_and_change_its_version(tmp_path: Path) -> None:
    wheel = _wheel(
        tmp_path / "x.whl",
        {
            "x/__init__.py": b"X = 1",
            "x-1.data/purelib/y.py": b"Y = 2",
            "x-1.data/scripts/z": b"#!/bin/sh",
            "x-1.dist-info/METADATA": b"Name: x",
        },
    )
    made = bundle.make([wheel])
    assert made.version != bundle.make().version
    _unpacked(made, tmp_path / "there")
    assert (tmp_path / "there/x/__init__.py").read_bytes() == b"X = 1"
    assert (tmp_path / "there/y.py").read_bytes() == b"Y = 2"
    assert not list((tmp_path / "there").rglob("z"))


@pytest.mark.parametrize("name", ["../x.py", "/etc/x", "a/../../x", "x.data/purelib/../../y"])
def test_a_wheel_that_leads_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="has a file named"):
        bundle.make([_wheel(tmp_path / "x.whl", {name: b""})])


def test_a_wheel_that_is_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "BUNDLE_BYTES_MAX", 1 << 20)
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", bytes(2 << 20))
    assert wheel.stat().st_size < 10_000
    with pytest.raises(UsageError, match="larger"):
        bundle.make([wheel])


@pytest.mark.parametrize(
    ("name", "version", "is_enough"),
    [
        ("protobuf", "3.21.12", True),
        ("protobuf", "3.20.9", False),
        ("protobuf", "6.33.1", True),
        ("protobuf", "7.0", False),
        ("aiohttp", "3.9.5", False),
        ("aiohttp", "3.11", True),
        ("aiohttp", "3.11.16+ds1", True),
        ("xxhash", "0.0.0", True),
        ("psutil", "7.0.0", True),
    ],
)
def test_versions(name: str, version: str, is_enough: bool) -> None:
    needed = {one.name for one in bundle.lacking({name: version})}
    assert (name not in needed) == is_enough
    assert "click" in needed


def test_names_of_distributions_are_written_in_many_ways() -> None:
    wanted = {one.name: "999" for one in bundle.requirements() if one.name != "protobuf"}
    shouted = {name.upper().replace("-", "_"): version for name, version in wanted.items()}
    assert [one.name for one in bundle.lacking(shouted)] == ["protobuf"]


def test_which_wheels_run_there() -> None:
    tags = wheels.platforms("x86_64", "2.36")
    assert tags[0] == "manylinux_2_36_x86_64"
    assert "manylinux2014_x86_64" in tags
    assert "manylinux_2_37_x86_64" not in tags
    assert "manylinux2014_aarch64" not in wheels.platforms("aarch64", "2.12")
