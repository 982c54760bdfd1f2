"""What is brought to a host: this source, and the wheels of what its Python lacks, as one archive.

    dolly-VERSION.dist-info/METADATA     name, version, requirements
    migrate/ transport/ criu_glue/       the packages, without byte code
    aiohttp/ …                           the content of wheels, if any

It has the layout of an installed wheel (PEP 427) and is unpacked into a virtual environment. The
same files make the same archive, byte by byte; its digest is the version, so that a host which has
it already is left alone.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import criu_glue
import migrate
import transport
from migrate.errors import MigrateError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

NAME: Final = "dolly"
PYTHON_MIN: Final = (3, 11)
BUNDLE_BYTES_MAX: Final = 512 << 20
"""With the wheels of all dependencies it has some 30 MB; 1 MB without."""
# Whose file names say that everything in them belongs where it lies (PEP 427, ".data").
_PLACED: Final = ("purelib", "platlib")
_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)((?:[<>=!~]=?[0-9.]+,?)*)")
_BOUND = re.compile(r"(>=|<)([0-9.]+)")


@dataclass(frozen=True, slots=True)
class Bundle:
    """version: of letters and digits; archive: tar.gz."""

    version: str
    archive: bytes


@dataclass(frozen=True, slots=True)
class Requirement:
    """A dependency: `text` as in pyproject.toml, and (operator, version) of its bounds."""

    text: str
    name: str
    bounds: tuple[tuple[str, tuple[int, ...]], ...]

    def admits(self, version: str) -> bool:
        """Whether that version will do. Bounds are >= and < here, which are all that there are.

        One that says 0.0.0 does not know its version (Debian 13's python3-xxhash): it will do.
        """
        found = _numbers(version)
        if not found:
            return True
        return all(found >= bound if how == ">=" else found < bound for how, bound in self.bounds)


def make(wheels: Sequence[Path] = ()) -> Bundle:
    """This project as it runs now, and the wheels. Blocking. Raises MigrateError."""
    files = dict(_project())
    for wheel in wheels:
        files.update(_of_wheel(wheel))
    if sum(map(len, files.values())) > BUNDLE_BYTES_MAX:
        raise MigrateError(f"what would be brought to the host exceeds {BUNDLE_BYTES_MAX >> 20} MB")
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return Bundle(f"{_version()}-{digest.hexdigest()[:16]}", _archive(files))


def requirements() -> list[Requirement]:
    """What this project needs at run time."""
    return [one for text in _requirement_texts() if (one := _parse(text)) is not None]


def lacking(distributions: Mapping[str, str]) -> list[Requirement]:
    """What a Python that has these (lower-case name, version) lacks."""
    known = {_canonical(name): version for name, version in distributions.items()}
    return [
        one
        for one in requirements()
        if (version := known.get(_canonical(one.name))) is None or not one.admits(version)
    ]


def _project() -> Iterable[tuple[str, bytes]]:
    yield f"{NAME}-{_version()}.dist-info/METADATA", _metadata().encode()
    for package in (migrate, transport, criu_glue):
        (top,) = package.__path__
        for path in sorted(Path(top).rglob("*.py")):
            yield f"{package.__name__}/{path.relative_to(top)}", path.read_bytes()


def _of_wheel(wheel: Path) -> Iterable[tuple[str, bytes]]:
    with zipfile.ZipFile(wheel) as archive:
        if sum(one.file_size for one in archive.infolist()) > BUNDLE_BYTES_MAX:
            raise UsageError(f"{wheel} is larger than {BUNDLE_BYTES_MAX >> 20} MB")
        for one in archive.infolist():
            if one.is_dir():
                continue
            name = one.filename
            if ".data/" in name.partition("/")[0] + "/":
                kind, _, name = name.partition("/")[2].partition("/")
                if kind not in _PLACED:
                    continue  # scripts and manuals, which nothing here calls
            if name.startswith("/") or ".." in Path(name).parts:
                raise UsageError(f"{wheel} has a file named {name!r}")
            yield name, archive.read(one)


def _archive(files: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0, compresslevel=6) as zipped,
        tarfile.open(fileobj=zipped, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def _metadata() -> str:
    lines = ["Metadata-Version: 2.1", f"Name: {NAME}", f"Version: {_version()}"]
    lines += [f"Requires-Dist: {text}" for text in _requirement_texts()]
    return "\n".join(lines) + "\n"


def _version() -> str:
    pyproject = _pyproject()
    return str(pyproject["version"]) if pyproject else metadata.version(NAME)


def _requirement_texts() -> list[str]:
    """Of the source if this is one: what is installed may be older than it."""
    if pyproject := _pyproject():
        return [str(text) for text in pyproject["dependencies"]]
    return [text for text in metadata.requires(NAME) or [] if "extra ==" not in text]


def _pyproject() -> dict[str, Any] | None:
    path = Path(next(iter(migrate.__path__))).parent / "pyproject.toml"
    if not path.exists():
        return None
    project: dict[str, Any] = tomllib.loads(path.read_text())["project"]
    return project


def _parse(text: str) -> Requirement | None:
    if (match := _REQUIREMENT.match(text.replace(" ", ""))) is None:
        return None
    bounds = tuple((how, _numbers(bound)) for how, bound in _BOUND.findall(match[2]))
    return Requirement(text, match[1], bounds)


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version, for comparing: 3.21.12 -> (3, 21, 12); trailing zeros count not."""
    release = re.match(r"[0-9.]*", version)
    parts = [int(part) for part in (release[0] if release else "").split(".") if part]
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
