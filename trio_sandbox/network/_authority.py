"""A certificate authority for one policy of one sandbox: for the hosts with secrets only, a day long, its key in memory only."""

from __future__ import annotations

import importlib
import ipaddress
import os
import ssl
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

#: How long it counts, and how far the guest's clock may be behind ours.
_LIFE: Final = timedelta(days=1)
_SKEW: Final = timedelta(minutes=5)
#: With less than this left it is made anew, at the next occasion.
_SPARE: Final = timedelta(hours=1)


def check_extra() -> None:
    """Say so if what secrets need is not installed.

    Raises:
      ModuleNotFoundError: if it is not.

    """
    try:
        for name in ("cryptography.x509", "h11"):
            importlib.import_module(name)
    except ModuleNotFoundError as exc:
        raise ModuleNotFoundError(
            f"a NetworkRule with secrets needs the module {exc.name!r}, which is not installed; nothing was started. "
            "Install the extra: pip install 'trio-sandbox[network]'",
            name=exc.name,
        ) from None


@final
class Authority:
    """Vouches for *hosts*, and can't vouch for others: name constraints say so to whoever trusts it."""

    def __init__(self, hosts: Collection[str]) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID

        now = datetime.now(UTC)
        self.hosts: frozenset[str] = frozenset(hosts)
        self._times = now - _SKEW, now + _LIFE
        self._key = ec.generate_private_key(ec.SECP256R1())
        # A name of its own, so that a program that knows two of them tells them apart.
        serial = x509.random_serial_number()
        self._name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "trio-sandbox"),
                x509.NameAttribute(NameOID.COMMON_NAME, f"trio-sandbox {serial:040x}"[:64]),
            ]
        )
        permitted = [x509.DNSName(host) for host in sorted(self.hosts)]
        # Names alone would leave addresses free.
        addresses = [x509.IPAddress(ipaddress.ip_network(network)) for network in ("0.0.0.0/0", "::/0")]
        self._certificate = (
            self._begin(self._name, self._key.public_key(), serial)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(x509.NameConstraints(permitted, addresses), critical=True)
            .sign(self._key, _sha256())
        )
        self.pem: str = self._certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")
        """Its certificate, for the guest."""
        self._contexts: dict[str, ssl.SSLContext] = {}

    @property
    def stale(self) -> bool:
        """Whether it is about to expire."""
        return datetime.now(UTC) > self._times[1] - _SPARE

    def context(self, host: str) -> ssl.SSLContext:
        """Return what a server of the name *host* is made with."""
        assert host in self.hosts
        if host not in self._contexts:
            self._contexts[host] = self._make_context(host)
        return self._contexts[host]

    def _make_context(self, host: str) -> ssl.SSLContext:
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID

        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            self._begin(x509.Name([]), key.public_key(), x509.random_serial_number())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=True)  # there is no other name
            .sign(self._key, _sha256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.num_tickets = 0
        # Each would cost us as much as a handshake, and no client needs one.
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
        context.set_alpn_protocols(["http/1.1"])
        # `ssl` takes them from a file only: this one is nowhere but in memory.
        descriptor = os.memfd_create("certificate")
        with open(descriptor, "wb") as file:
            file.write(private + certificate.public_bytes(serialization.Encoding.PEM))
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        return context

    def _begin(self, name: x509.Name, key: ec.EllipticCurvePublicKey, serial: int) -> x509.CertificateBuilder:
        from cryptography import x509

        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(serial)
            .not_valid_before(self._times[0])
            .not_valid_after(self._times[1])
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )


def _sha256() -> hashes.SHA256:
    from cryptography.hazmat.primitives import hashes

    return hashes.SHA256()


def _usage(*, signs: bool) -> x509.KeyUsage:
    """Return what a key is for: certificates, or handshakes."""
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
