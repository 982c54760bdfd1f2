"""A source of packages for apt in a lab that leads nowhere: what the client has installed, packed
anew and served by HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Final

from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.lab.waiting import wait_until

PORT: Final = 8099
DIRECTORY: Final = "/srv/packages"
# Without the scripts of their maintainers, which only register what they bring.
_PACK: Final = """\
mkdir -p "$0" && cd "$0"
for package; do
    root=$(mktemp -d)
    mkdir "$root/DEBIAN"
    dpkg-query -s "$package" | awk '
        /^[^ ]/ { kept = !/^(Status|Conffiles):/ } kept' >"$root/DEBIAN/control"
    dpkg-query -L "$package" | while read -r file; do
        if [ -f "$file" ] || [ -h "$file" ]; then cp -a --parents "$file" "$root"; fi
    done
    dpkg-deb --build -Znone "$root" "$package.deb" >/dev/null
    dpkg-deb --field "$package.deb"
    echo "Filename: ./$package.deb"
    echo "Size: $(stat -c %s "$package.deb")"
    echo "SHA256: $(sha256sum <"$package.deb" | cut -d' ' -f1)"
    echo
    rm -r "$root"
done >Packages
"""


@contextlib.contextmanager
def serving(lab: Lab, host: Host, packages: Sequence[str]) -> Iterator[None]:
    """`host` has a source of these packages, and no other."""
    client, source = lab.client, "/etc/apt/sources.list.d/lab.list"
    client.run(["sh", "-ec", _PACK, DIRECTORY, *packages])
    serve = ["python3", "-m", "http.server", "--directory", DIRECTORY, str(PORT)]
    with client.popen(serve) as server:
        try:
            filtered = ["ss", "-Hltn", "sport", "=", f":{PORT}"]
            wait_until("packages are served", lambda: client.run(filtered).stdout.strip())
            host.write_text(source, f"deb [trusted=yes] http://{client.address}:{PORT} ./\n")
            yield
        finally:
            host.path(source).unlink(missing_ok=True)
            server.kill()
