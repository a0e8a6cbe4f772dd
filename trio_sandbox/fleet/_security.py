"""Who talks to whom: a certificate for each node, known by its fingerprint, and secrets that are good once."""

from __future__ import annotations

import hashlib
import hmac
import importlib
import secrets
import ssl
import tempfile
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Final, final

import attrs

from .._errors import WrongNodeError

#: Bytes of a secret, which is the first that who connects says.
SECRET_BYTES: Final = 32
#: A node lives as long as its user; who is known by a fingerprint needs no date.
_LIFE: Final = timedelta(days=3650)
_SKEW: Final = timedelta(days=1)


def check_extra() -> None:
    """Say so if what links need is not installed.

    Raises:
      ModuleNotFoundError: if it is not.

    """
    try:
        importlib.import_module("cryptography.x509")
    except ModuleNotFoundError as exc:
        raise ModuleNotFoundError(
            f"a fleet needs the module {exc.name!r}, which is not installed; nothing was started. "
            "Install the extra: pip install 'trio-sandbox[ray]'",
            name=exc.name,
        ) from None


@attrs.frozen
class Identity:
    """A node's own certificate."""

    context: ssl.SSLContext
    """For a server."""
    fingerprint: bytes
    """SHA-256 of the certificate."""


def make_identity() -> Identity:
    """Make a certificate, and its key, which never leaves this process but for a file that is gone at once."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "trio-sandbox node")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + _LIFE)
        .sign(key, hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # nobody comes back
    text = certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    # Python's ssl takes certificates from files only.
    with tempfile.NamedTemporaryFile(prefix="trio-sandbox-") as file:
        file.write(text)
        file.flush()
        context.load_cert_chain(file.name)
    return Identity(context, hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).digest())


@cache
def client_context() -> ssl.SSLContext:
    """Return what all clients use. It takes any certificate: `check_fingerprint` decides."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def check_fingerprint(certificate: bytes | None, fingerprint: bytes) -> None:
    """Refuse a peer whose certificate (DER) is not the one of that *fingerprint*.

    Raises:
      WrongNodeError: if so.

    """
    if certificate is None or not hmac.compare_digest(hashlib.sha256(certificate).digest(), fingerprint):
        raise WrongNodeError("whoever answered at the node's address is not that node; nothing was said to it")


@final
class Secrets:
    """Secrets that were given out, each with what it is good for, once. What is kept of each is a digest."""

    def __init__(self) -> None:
        self._known: dict[bytes, int] = {}

    def issue(self, purpose: int) -> bytes:
        """Return a new secret that is good for *purpose*."""
        secret = secrets.token_bytes(SECRET_BYTES)
        self._known[hashlib.sha256(secret).digest()] = purpose
        return secret

    def redeem(self, secret: bytes) -> int | None:
        """Return what a secret is good for, for the first and only time; None: it is no secret of ours, or was used."""
        # Looked up by its digest: how long that takes tells nothing of the secret.
        return self._known.pop(hashlib.sha256(secret).digest(), None)

    def revoke(self, purpose: int) -> None:
        """Forget the secrets that are good for *purpose* and were not used."""
        self._known = {digest: known for digest, known in self._known.items() if known != purpose}
