"""What runs on a host that has nothing yet: as its own process, as over SSH."""

from __future__ import annotations

import inspect
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import msgspec
import pytest

from migrate.hosts import bootstrap, bundle
from migrate.hosts.enrolment import lacking
from migrate.hosts.remote import HostFacts


def _act(*arguments: str, data: bytes = b"") -> dict[str, object]:
    script = inspect.getsource(bootstrap).encode()
    start = f"import sys; exec(sys.stdin.buffer.read({len(script)}))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", start, *arguments],
        input=script + data,
        capture_output=True,
        check=True,
    )
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_facts_of_this_host() -> None:
    facts = msgspec.convert(_act("probe", "/nowhere"), HostFacts, strict=False)
    assert facts.python == sys.version_info[:3]
    assert facts.installed == ""
    assert not [one for one in lacking(facts) if one.requirement is not None]


def test_an_installation_is_complete_and_another_one_replaces_it(tmp_path: Path) -> None:
    made = bundle.make()
    root = tmp_path / "opt"
    assert _act("install", str(root), made.version, data=made.archive) == {
        "installed": made.version
    }
    program = root / "current/bin/migrate"
    done = subprocess.run([program, "--version"], capture_output=True, text=True)
    # Its dependencies are those of the interpreter that made it, which may have none.
    assert done.returncode == 0 or "No module named" in done.stderr
    assert _act("probe", str(root))["installed"] == made.version

    _act("install", str(root), "newer", data=made.archive)
    assert (root / "current").readlink() == Path("versions/newer")
    assert sorted(path.name for path in (root / "versions").iterdir()) == sorted(
        [made.version, "newer"]
    )
    # Back again: what is there is only pointed to.
    _act("install", str(root), made.version)
    assert _act("probe", str(root))["installed"] == made.version


def test_old_versions_go_unless_they_run(tmp_path: Path) -> None:
    archive = bundle.make().archive
    for version in ("v1", "v2"):
        _act("install", str(tmp_path), version, data=archive)
    python = tmp_path / "versions/v1/bin/python"
    with subprocess.Popen([python, "-c", "input()"], stdin=subprocess.PIPE) as running:
        _act("install", str(tmp_path), "v3", data=archive)
        _act("install", str(tmp_path), "v4", data=archive)
        assert {path.name for path in (tmp_path / "versions").iterdir()} == {"v1", "v3", "v4"}
        running.communicate(b"\n")


def test_an_installation_that_breaks_off_leaves_the_former_one(tmp_path: Path) -> None:
    archive = bundle.make().archive
    _act("install", str(tmp_path), "v1", data=archive)
    with pytest.raises(subprocess.CalledProcessError):
        _act("install", str(tmp_path), "v2", data=archive[: len(archive) // 2])
    assert _act("probe", str(tmp_path))["installed"] == "v1"
    _act("install", str(tmp_path), "v2", data=archive)
    assert _act("probe", str(tmp_path))["installed"] == "v2"


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x"])
def test_an_archive_that_leads_elsewhere(tmp_path: Path, name: str) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(subprocess.CalledProcessError):
        _act("install", str(tmp_path), "v1", data=packed.getvalue())
    assert not (tmp_path / "versions/v1").exists()


@pytest.mark.parametrize(
    "directory", ["/", "/var/lib/migrate", "/var/lib/migrate/once", "/var/lib/migrate/once/../x"]
)
def test_nothing_else_is_cleared(directory: str) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        _act("clear", directory)
