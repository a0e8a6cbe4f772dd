"""Secrets in a policy, and the authority that vouches for their hosts."""

from __future__ import annotations

import copy
import pickle
import ssl
from datetime import timedelta
from typing import Any

import attrs
import pytest
from cryptography import x509

from trio_sandbox import Network, NetworkRule, SandboxConfig
from trio_sandbox.network._authority import Authority

VALUE = "ghp_0123456789abcdefghijklmnopqrstuvwxyz"


def rule(host: str = "api.example.org", **more: Any) -> NetworkRule:
    arguments: dict[str, Any] = {"secrets": {"TOKEN": VALUE}, **more}
    return NetworkRule(host, **arguments)


def test_a_rule_keeps_its_values_to_itself() -> None:
    network = Network.allow(rule())
    config = SandboxConfig(network=network)
    for thing in (rule(), network, config, rule().secrets):
        assert VALUE not in repr(thing) + str(thing)
        assert "TOKEN" in repr(thing)
        assert hash(thing) == hash(copy.deepcopy(thing))
        with pytest.raises(TypeError, match="can't be pickled"):
            pickle.dumps(thing)
    assert VALUE not in repr(attrs.asdict(network))
    assert rule() == rule()
    assert rule() != rule(secrets={"TOKEN": VALUE[::-1]})
    assert attrs.evolve(rule(), private=True).secrets == {"TOKEN": VALUE}
    without = Network.allow("example.org")
    assert pickle.loads(pickle.dumps(without)) == without


def test_a_callers_mapping_may_change_later() -> None:
    values = {"TOKEN": VALUE}
    kept = rule(secrets=values)
    values["TOKEN"] = "something else"
    assert dict(kept.secrets) == {"TOKEN": VALUE}


def test_ports_and_tls_of_a_rule_with_secrets() -> None:
    assert rule().ports == (443,)
    assert rule(port=8443).ports == (8443,)
    assert rule(ports=(443, 8443)).ports == (443, 8443)
    assert rule(to=("127.0.0.1", 1)).tls == "named"
    assert NetworkRule("a.org", secrets={}).ports == (80, 443)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"host": "*.example.org"}, "needs a single host"),
        ({"tls": "any"}, "exclude each other"),
        ({"ports": None}, "HTTP over TLS"),
        ({"port": 80}, "HTTP over TLS"),
        ({"secrets": {"1TOKEN": VALUE}}, "environment variable"),
        ({"secrets": {"A=B": VALUE}}, "environment variable"),
        ({"secrets": {"": VALUE}}, "environment variable"),
        ({"secrets": {"TOKEN": VALUE + "\n"}}, "line break"),
        ({"secrets": {"TOKEN": VALUE + "\r\nX: y"}}, "printable"),
        ({"secrets": {"TOKEN": VALUE + "\0"}}, "printable"),
        ({"secrets": {"TOKEN": VALUE + "\N{EURO SIGN}"}}, "printable"),
        ({"secrets": {"TOKEN": " " + VALUE}}, "printable"),
        ({"secrets": {"TOKEN": "abc"}}, "from 4 to 4096"),
        ({"secrets": {"TOKEN": ""}}, "from 4 to 4096"),
        ({"secrets": {"TOKEN": "x" * 4097}}, "from 4 to 4096"),
        ({"secrets": {f"T{number}": VALUE for number in range(33)}}, "at most 32"),
    ],
)
def test_what_can_be_no_rule_with_secrets(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        rule(**more)
    assert VALUE not in str(caught.value)


@pytest.mark.parametrize("secrets", [["TOKEN"], "TOKEN", {"TOKEN": b"bytes"}, {5: VALUE}, {"TOKEN": None}])
def test_what_is_no_mapping_of_text(secrets: Any) -> None:
    with pytest.raises(TypeError):
        rule(secrets=secrets)


def test_policies_that_would_give_a_secret_away_or_not_use_it() -> None:
    with pytest.raises(ValueError, match="must have no rule with secrets"):
        Network.open(rule())
    with pytest.raises(ValueError, match="must come before"):
        Network.allow("*.example.org", rule())
    with pytest.raises(ValueError, match="must come before"):
        Network.allow(rule(secrets={"OTHER": VALUE}), rule())
    with pytest.raises(ValueError, match="one value") as caught:
        Network.allow(rule(), rule("b.org", secrets={"TOKEN": VALUE[::-1]}))
    assert VALUE not in str(caught.value)
    longest = ".".join(["a" * 61] * 4)
    hosts = [f"{number:02}.{longest}" for number in range(33)]
    with pytest.raises(ValueError, match="at most 32 hosts"):
        Network.allow(*map(rule, hosts))
    Network.allow(*map(rule, hosts[:32]))
    assert len(Authority(hosts[:32]).pem) < 2**14
    Network.allow(rule(), rule("b.org"), "*.example.org", NetworkRule("api.example.org", port=80))


def test_the_authority_is_for_its_hosts_and_a_day() -> None:
    authority = Authority(["api.example.org", "b.org"])
    certificate = x509.load_pem_x509_certificate(authority.pem.encode())
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert timedelta(days=1) <= life < timedelta(days=1, hours=1)
    extensions = certificate.extensions
    basic = extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert (usage.value.key_cert_sign, usage.value.digital_signature, usage.value.crl_sign) == (True, False, False)
    names = extensions.get_extension_for_class(x509.NameConstraints)
    assert names.critical
    permitted = names.value.permitted_subtrees
    assert permitted is not None
    assert [name.value for name in permitted] == ["api.example.org", "b.org"]
    assert names.value.excluded_subtrees  # every address
    assert not authority.stale
    assert Authority(["b.org"]).pem != Authority(["b.org"]).pem


def handshake(server: ssl.SSLContext, pem: str, name: str) -> None:
    """Shake hands in memory, with all the checks that there are."""
    client = ssl.create_default_context(cadata=pem)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    wires = [ssl.MemoryBIO(), ssl.MemoryBIO()]
    ends = [
        client.wrap_bio(wires[0], wires[1], server_hostname=name),
        server.wrap_bio(wires[1], wires[0], server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert ends[0].version() is not None


def test_programs_believe_the_authority_for_its_hosts_only() -> None:
    authority = Authority(["api.example.org"])
    handshake(authority.context("api.example.org"), authority.pem, "api.example.org")
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(authority.context("api.example.org"), authority.pem, "other.org")
    # Whoever had its key could not vouch for another host.
    authority.hosts = frozenset({"other.org"})
    with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree"):
        handshake(authority.context("other.org"), authority.pem, "other.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(authority.context("other.org"), Authority(["other.org"]).pem, "other.org")
