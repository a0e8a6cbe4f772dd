"""What may be reached: rules, policies and the grammar of names."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from trio_sandbox import Network, NetworkRule, SandboxConfig
from trio_sandbox._network import is_host_name


async def a_stream() -> Any:
    raise AssertionError("nobody connects")


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("pypi.org", "pypi.org"),
        ("PyPI.org.", "pypi.org"),
        ("*.Example.org", "*.example.org"),
        ("localhost", "localhost"),
        ("xn--mller-kva.de", "xn--mller-kva.de"),
        ("_srv.example.org", "_srv.example.org"),
        ("a" * 63 + ".org", "a" * 63 + ".org"),
    ],
)
def test_a_rule_has_the_name_as_it_is_compared(text: str, host: str) -> None:
    assert NetworkRule(text).host == host


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("", "must be a host name"),
        (".", "must be a host name"),
        (".example.org", "must be a host name"),
        ("a..b", "must be a host name"),
        ("*", "nearly everything"),
        ("*.", "nearly everything|must be a host name"),
        ("*.org", "nearly everything"),
        ("*.*.org", "must be a host name"),
        ("a.*.org", "must be a host name"),
        ("*foo.org", "must be a host name"),
        ("-a.org", "must be a host name"),
        ("a-.org", "must be a host name"),
        ("a b.org", "must be a host name"),
        ("a/b", "must be a host name"),
        ("user@example.org", "must be a host name"),
        ("http://example.org", "a name, not the address"),
        ("evil.org\0.example.org", "must be a host name"),
        ("a\r\nb.org", "must be a host name"),
        ("a%2eb.org", "must be a host name"),
        (".*", "must be a host name"),
        ("a" * 64 + ".org", "must be a host name"),
        (".".join(["a" * 60] * 5), "must be a host name"),
        ("127.0.0.1", "a name, not the address"),
        ("10.1", "a name, not the address"),
        ("2130706433", "a name, not the address"),
        ("0x7f.1", "a name, not the address"),
        ("0x7f000001", "a name, not the address"),
        ("example.0x10", "a name, not the address"),
        ("[::1]", "a name, not the address"),
        ("fe80::1%eth0", "a name, not the address"),
        ("müller.de", "write 'xn--mller-kva.de'"),
        ("\N{CYRILLIC SMALL LETTER ER}aypal.com", "must be ASCII"),
        ("\N{FULLWIDTH LATIN SMALL LETTER A}.org", "must be ASCII"),
    ],
)
def test_what_is_no_rule_is_refused_with_the_reason(host: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetworkRule(host)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"ports": ()}, ValueError),
        ({"ports": (0,)}, ValueError),
        ({"ports": (65536,)}, ValueError),
        ({"ports": ("80",)}, TypeError),
        ({"ports": (True,)}, TypeError),
        ({"port": True}, TypeError),
        ({"port": 80, "ports": (81,)}, TypeError),
        ({"private": "yes"}, ValueError),
        ({"tls": "off"}, ValueError),
        ({"to": "127.0.0.1:80"}, TypeError),
        ({"to": ("127.0.0.1",)}, TypeError),
        ({"to": ("127.0.0.1", 0)}, ValueError),
    ],
)
def test_fields_that_can_not_be_are_refused(arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        NetworkRule("example.org", **arguments)


@pytest.mark.parametrize("host", [1, None, b"example.org"])
def test_a_host_is_text(host: Any) -> None:
    with pytest.raises(TypeError):
        NetworkRule(host)


def test_a_wildcard_is_what_is_below_and_not_the_domain_itself() -> None:
    rule = NetworkRule("*.example.org")
    assert rule.allows_host("a.example.org")
    assert rule.allows_host("a.b.example.org")
    assert not rule.allows_host("example.org")
    assert not rule.allows_host("notexample.org")
    assert not rule.allows_host("a.example.org.evil.com")


def test_what_leads_elsewhere_is_not_held_to_tls_and_its_port_can_be_said_alone() -> None:
    assert NetworkRule("db.local", port=5432, to=("127.0.0.1", 5432)) == NetworkRule(
        "db.local", ports=(5432,), tls="any", to=("127.0.0.1", 5432)
    )
    assert NetworkRule("db.local", to=a_stream, tls="named").tls == "named"


def test_allow_reads_ports_and_takes_rules() -> None:
    network = Network.allow("pypi.org", "db.example.org:5432", NetworkRule("x.org", ports=None))
    assert [rule.ports for rule in network.rules] == [(80, 443), (5432,), None]
    assert network.find("pypi.org", 443)
    assert not network.find("pypi.org", 5432)
    assert network.find("db.example.org", 5432)
    assert network.find("x.org", 1)
    assert not network.find("y.org")


@pytest.mark.parametrize(
    "text", ["pypi.org:", "pypi.org:x", "pypi.org:80:81", "pypi.org:0", "pypi.org:\N{SUPERSCRIPT TWO}"]
)
def test_a_port_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"port|address"):
        Network.allow(text)


@pytest.mark.parametrize("host", ["https://pypi.org", "http://pypi.org:80/simple", "ssh://example.org"])
def test_a_url_is_no_host(host: str) -> None:
    with pytest.raises(ValueError, match=r"^a host must be a name such as 'pypi\.org', not the URL '"):
        Network.allow(host)


@pytest.mark.parametrize("host", [["pypi.org", "example.org"], ("pypi.org",), 5, None])
def test_hosts_are_not_a_list(host: Any) -> None:
    with pytest.raises(TypeError, match=r"^a host must be str or a NetworkRule, not .*Network\.allow\(\*hosts\)$"):
        Network.allow("ok.example", host)


def test_nothing_allowed_can_not_be_written_by_mistake() -> None:
    with pytest.raises(TypeError, match=r"Network\.none\(\)"):
        Network.allow()
    with pytest.raises(TypeError):
        Network.allow(["pypi.org"])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert not Network.none()
    assert not Network()
    assert Network.allow("pypi.org")
    assert SandboxConfig().network == Network.none()


def test_open_is_every_name_on_its_ports_and_rules_come_first() -> None:
    network = Network.open(NetworkRule("mirror.corp", private=True, port=8080), ports=(443,))
    assert network
    found = network.find("example.org", 443)
    assert found is not None
    assert (found.private, found.tls) == (False, "named")
    assert network.find("example.org", 80) is None
    mirror = network.find("mirror.corp", 8080)
    assert mirror is not None
    assert mirror.private is True
    assert Network.open(ports=None).find("example.org", 25)


@pytest.mark.parametrize(
    ("limits", "error"),
    [
        ({"max_connections": 0}, ValueError),
        ({"max_connections": 257}, ValueError),
        ({"max_connections": True}, TypeError),
        ({"max_sent_bytes": -1}, ValueError),
        ({"max_received_bytes": 1.5}, TypeError),
    ],
)
def test_limits_have_ranges(limits: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Network.allow("pypi.org", **limits)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("rules", "pypi.org", TypeError),
        ("rules", None, TypeError),
        ("rules", [NetworkRule("pypi.org")], TypeError),
        ("open_ports", False, TypeError),
        ("open_ports", "", TypeError),
        ("open_ports", 443, TypeError),
        ("open_ports", (True,), TypeError),
        ("open_ports", (0,), ValueError),
    ],
)
def test_what_can_be_no_part_of_a_policy_opens_nothing(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"`{field}` must"):
        Network(**{field: value})


def test_policies_are_values() -> None:
    network = Network.allow("pypi.org", "*.x.org", max_sent_bytes=5)
    assert pickle.loads(pickle.dumps(network)) == network
    assert hash(network) == hash(Network.allow("PYPI.org", "*.x.org", max_sent_bytes=5))
    assert len({SandboxConfig(network=network), SandboxConfig(), SandboxConfig(network=Network.none())}) == 2


@pytest.mark.parametrize("name", ["a", "a.b", "_a.b", "a-b.c", "xn--a.b", "a" * 63, ".".join(["a" * 49] * 5)])
def test_host_names(name: str) -> None:
    assert is_host_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "", "A", "a.", ".a", "a..b", "a" * 64, ".".join(["a" * 60] * 5), "-a", "a-", "a b", "a\0b", "a\n", "é", "1", "a.1",
        "127.1", "0x1", "a.0x", "*.a", "a:b", "a/b", "a%b", "[a]", "a\x1b[2J",
    ],
)  # fmt: skip
def test_no_host_names(name: str) -> None:
    assert not is_host_name(name)
