"""Which certificates count for connections to the outside: the system's, and those of `HostConfig.ca_certificates`."""

from __future__ import annotations

import ssl
from functools import cached_property
from pathlib import Path
from typing import Final, final

#: Bytes of a file of certificates: some fifteen of them. A machine's hello has room for so many.
_LONGEST_FILE: Final = 32 * 2**10


@final
class Trust:
    """Who is believed.

    Args:
      certificates: Certificates besides the system's, as PEM.

    """

    def __init__(self, certificates: str = "") -> None:
        self.certificates: str = certificates

    @cached_property
    def context(self) -> ssl.SSLContext:
        """What connections of ours over TLS are made with; they speak HTTP/1.1."""
        context = ssl.create_default_context()
        if self.certificates:
            context.load_verify_locations(cadata=self.certificates)
        context.set_alpn_protocols(["http/1.1"])
        return context


def read_trust(path: Path | None) -> Trust:
    """Return who is believed with the certificates in the file *path*.

    Raises:
      OSError: if it can't be read.
      ValueError: if it has none, or is too long.

    """
    if path is None:
        return Trust()
    with open(path, "rb") as file:
        data = file.read(_LONGEST_FILE + 1)
    if len(data) > _LONGEST_FILE:
        raise ValueError(
            f"`ca_certificates` must have at most {_LONGEST_FILE} bytes, and {str(path)!r} has more: it needs the certificates "
            "that the system has not; the system's count anyway"
        )
    try:
        # In the guest they are one part of a file, in which nothing else may be.
        certificates = "".join(ssl.DER_cert_to_PEM_cert(certificate) for certificate in _parse(data.decode("latin-1")))
    except (ssl.SSLError, ValueError) as exc:
        raise ValueError(
            f"`ca_certificates` must be a file of certificates in PEM, and {str(path)!r} is none: {exc}"
        ) from None
    return Trust(certificates)


def _parse(text: str) -> list[bytes]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=text)
    authorities = context.get_ca_certs(binary_form=True)
    if not authorities:
        raise ssl.SSLError("it has no certificate of an authority")
    return authorities
