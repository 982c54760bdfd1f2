"""known_hosts, against files that ssh-keygen has written or can read."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path

import pytest

from tests.transport.ssh.server import generate_key
from transport.ssh import known_hosts
from transport.ssh.errors import SshConfigError
from transport.ssh.known_hosts import KnownHosts, Verdict, fingerprint, remember


@pytest.fixture
def blob(tmp_path: Path) -> bytes:
    public = generate_key(tmp_path).with_suffix(".pub")
    return base64.b64decode(public.read_text().split()[1])


def _known(tmp_path: Path, *lines: str) -> KnownHosts:
    path = tmp_path / "known_hosts"
    path.write_text("".join(f"{line}\n" for line in lines))
    return KnownHosts([path])


def _line(names: str, blob: bytes) -> str:
    return f"{names} ssh-ed25519 {base64.b64encode(blob).decode()} a comment"


OTHER = b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + bytes(32)


def test_a_fingerprint_is_that_of_ssh_keygen(tmp_path: Path, blob: bytes) -> None:
    listed = subprocess.run(
        ["ssh-keygen", "-lf", str(tmp_path / "id_ed25519.pub")], capture_output=True, check=True
    )
    assert listed.stdout.split()[1].decode() == fingerprint(blob)


@pytest.mark.parametrize(
    ("names", "name", "is_known"),
    [
        ("db7", "db7", True),
        ("DB7", "db7", True),
        ("db7,10.0.0.7", "10.0.0.7", True),
        ("db7", "db77", False),
        ("db7", "[db7]:2222", False),
        ("[db7]:2222", "[db7]:2222", True),
        ("[db7]:2222", "db7", False),
        ("*.example.com", "db7.example.com", True),
        ("*.example.com,!db7.example.com", "db7.example.com", False),
        ("db?", "db7", True),
    ],
)
def test_names(tmp_path: Path, blob: bytes, names: str, name: str, is_known: bool) -> None:
    verdict = _known(tmp_path, _line(names, blob)).judge(name, blob).verdict
    assert verdict == (Verdict.KNOWN if is_known else Verdict.UNKNOWN)


@pytest.mark.parametrize("name", ["db7", "[db7]:2222"])
def test_a_hashed_name_is_found_by_us_and_by_ssh_keygen(
    tmp_path: Path, blob: bytes, name: str
) -> None:
    path = tmp_path / "new" / "known_hosts"
    remember(path, name, "ssh-ed25519", blob, hashed=True)
    assert "db7" not in path.read_text()
    found = subprocess.run(["ssh-keygen", "-F", name, "-f", str(path)], capture_output=True)
    assert found.returncode == 0
    assert KnownHosts([path]).judge(name, blob).verdict == Verdict.KNOWN
    assert KnownHosts([path]).judge(name + "x", blob).verdict == Verdict.UNKNOWN
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_names_that_ssh_keygen_has_hashed(tmp_path: Path, blob: bytes) -> None:
    path = tmp_path / "known_hosts"
    path.write_text(_line("db7,10.0.0.7", blob) + "\n")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(path)], check=True, capture_output=True)
    assert path.read_text().startswith("|1|")
    assert KnownHosts([path]).judge("10.0.0.7", blob).verdict == Verdict.KNOWN


def test_another_key_has_changed_and_the_place_of_the_known_one_is_told(
    tmp_path: Path, blob: bytes
) -> None:
    judgement = _known(tmp_path, "# ours", _line("db7", OTHER)).judge("db7", blob)
    assert judgement.verdict == Verdict.CHANGED
    assert [entry.place for entry in judgement.entries] == [f"{tmp_path / 'known_hosts'}:2"]


def test_one_of_several_known_keys_is_enough(tmp_path: Path, blob: bytes) -> None:
    known = _known(tmp_path, _line("db7", OTHER), _line("db7", blob))
    assert known.judge("db7", blob).verdict == Verdict.KNOWN


def test_a_revoked_key_is_revoked_though_another_line_has_it(tmp_path: Path, blob: bytes) -> None:
    known = _known(tmp_path, _line("db7", blob), "@revoked " + _line("*", blob))
    assert known.judge("db7", blob).verdict == Verdict.REVOKED


def test_a_certificate_authority_proves_nothing_about_a_plain_key(
    tmp_path: Path, blob: bytes
) -> None:
    judgement = _known(tmp_path, "@cert-authority " + _line("*", blob)).judge("db7", blob)
    assert (judgement.verdict, judgement.by_authority) == (Verdict.UNKNOWN, True)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "# db7 ssh-ed25519 AAAA",
        "db7",
        "db7 ssh-ed25519",
        "db7 ssh-ed25519 !!!!",
        "@strange db7 ssh-ed25519 AAAA",
        "|1|x ssh-ed25519 AAAA",
        "\0\xff",
    ],
)
def test_a_line_that_is_none_proves_nothing(tmp_path: Path, blob: bytes, line: str) -> None:
    known = _known(tmp_path, line, _line("db8", blob))
    assert known.judge("db7", blob).verdict == Verdict.UNKNOWN
    assert known.judge("db8", blob).verdict == Verdict.KNOWN


def test_a_line_is_begun_where_the_last_one_was_not_ended(tmp_path: Path, blob: bytes) -> None:
    path = tmp_path / "known_hosts"
    path.write_text(_line("db8", OTHER).removesuffix(" a comment"))
    remember(path, "db7", "ssh-ed25519", blob, hashed=False)
    assert KnownHosts([path]).judge("db7", blob).verdict == Verdict.KNOWN
    assert KnownHosts([path]).judge("db8", OTHER).verdict == Verdict.KNOWN


def test_a_file_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_hosts, "FILE_BYTES_MAX", 100)
    with pytest.raises(SshConfigError, match="larger"):
        _known(tmp_path, "x" * 101)


def test_a_file_that_is_not_there_has_no_keys(tmp_path: Path, blob: bytes) -> None:
    assert KnownHosts([tmp_path / "none"]).judge("db7", blob).verdict == Verdict.UNKNOWN
