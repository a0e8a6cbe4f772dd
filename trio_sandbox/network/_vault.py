"""What a sandbox and its copies have instead of secrets: placeholders, and an authority that vouches for the hosts with secrets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, final

from .._network import Network, NetworkRule
from ._authority import Authority, check_extra
from ._substitution import make_placeholder

#: Where the guest's agent puts the image's certificates and ours; `guest.spawner.certificates` has the same.
BUNDLE: Final = "/run/trio-sandbox/certificates.pem"
#: Variables by which programs find certificates that do not look where the system has them. Node.js's come besides its own.
_BUNDLE_VARIABLES: Final = (
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "NODE_EXTRA_CA_CERTS",
    "AWS_CA_BUNDLE",
    "CARGO_HTTP_CAINFO",
)


@final
class Vault:
    """Keeps placeholders the same for as long as a sandbox lives, and its copies: programs have them in their memory."""

    def __init__(self) -> None:
        self._placeholders: dict[tuple[str, str], str] = {}
        self._authorities: dict[frozenset[str], Authority] = {}

    def environment(self, network: Network) -> dict[str, str]:
        """Return the variables with placeholders that the guest's programs get."""
        return {name: self._placeholder(name, value) for rule in network.rules for name, value in rule.secrets.items()}

    def values(self, rule: NetworkRule) -> dict[bytes, bytes]:
        """Return what is put into requests by *rule*, by placeholder."""
        return {
            self._placeholder(name, value).encode("ascii"): value.encode("ascii")
            for name, value in rule.secrets.items()
        }

    def authority(self, network: Network, *, renew: bool = False) -> Authority | None:
        """Return who vouches for the hosts of *network* that have secrets; None if none has.

        Args:
          network: The policy.
          renew: Whether it may be another one than before, if that is about to expire: the guest is told next.

        Raises:
          ModuleNotFoundError: if what that takes is not installed.

        """
        hosts = frozenset(rule.host for rule in network.rules if rule.secrets)
        if not hosts:
            return None
        authority = self._authorities.get(hosts)
        if authority is None or (renew and authority.stale):
            check_extra()
            authority = self._authorities[hosts] = Authority(hosts)
        return authority

    def _placeholder(self, name: str, value: str) -> str:
        placeholder = self._placeholders.get((name, value))
        if placeholder is None:
            placeholder = self._placeholders[name, value] = make_placeholder(value)
        return placeholder


def bundle_environment() -> Mapping[str, str]:
    """Return the variables that say where certificates are."""
    return dict.fromkeys(_BUNDLE_VARIABLES, BUNDLE)
