"""There is one way to speak to another host, and nothing in the product that switches it off."""

from __future__ import annotations

import re
import ssl
from pathlib import Path

import pytest

from tests.identities import Fleet
from transport.identity import HostIdentity, TlsIdentity

ROOT = Path(__file__).parents[2]
PRODUCT = [
    path
    for package in ("migrate", "transport", "criu_glue")
    for path in (ROOT / package).rglob("*.py")
]
WEAKENING = re.compile(
    r"CERT_NONE|CERT_OPTIONAL|check_hostname\s*=\s*False|_create_unverified_context"
    r"|ssl\s*=\s*False|verify_ssl|set_ciphers|TLSv1_[0-2]\b|TLSv1\b|http://(?!agent\b)"
    r"|SSLKEYLOGFILE|keylog_filename"
)
CONTEXTS = re.compile(r"PROTOCOL_TLS|create_default_context|wrap_bio\(")


def test_the_product_has_no_word_that_weakens_tls() -> None:
    assert len(PRODUCT) > 50
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in PRODUCT
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if WEAKENING.search(line)
    ]
    assert not found


def test_contexts_are_made_in_one_place() -> None:
    makers = {str(path.relative_to(ROOT)) for path in PRODUCT if CONTEXTS.search(path.read_text())}
    assert makers == {"transport/identity.py"}


@pytest.mark.parametrize("kind", [TlsIdentity, HostIdentity])
def test_every_context_demands_a_certificate(tmp_path: Path, kind: type[TlsIdentity]) -> None:
    identity = kind(Fleet(tmp_path).host("alpha"))
    inner = identity._tls.present()
    for context in (identity.server_context(), identity.client_context(), inner.accepting):
        assert context.verify_mode == ssl.CERT_REQUIRED
        assert context.minimum_version == ssl.TLSVersion.TLSv1_3
        assert context.verify_flags & ssl.VERIFY_X509_STRICT
        assert issubclass(context.sslsocket_class, ssl.SSLSocket)
        assert context.sslsocket_class is not ssl.SSLSocket
        assert context.sslobject_class is not ssl.SSLObject
    assert identity.client_context().check_hostname
    assert identity.server_context().num_tickets == inner.accepting.num_tickets == 0
