"""What a sandbox may reach on the network: frozen values, and the grammar of host names.

A policy speaks of names and ports, never of addresses: the host resolves the name itself, and the guest holds none.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, final

import attrs

from . import constants
from ._checks import or_none, whole_number
from ._metadata import mark_public
from ._secrets import Secrets

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    import trio

#: A label of a host name: letters, digits, hyphens inside, and the underscore that some names have (RFC 1123, RFC 2782).
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
#: What `inet_aton` takes for the last part of an address: "127.1", "0x7f.1" (inet(3)).
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_LONGEST_NAME = 253
_HIGHEST_PORT = 65535
#: Ports that a rule allows unless it says otherwise: HTTP and HTTPS.
WEB_PORTS = (80, 443)
_HTTP_PORT, _HTTPS_PORT = WEB_PORTS
#: The certificate that a guest gets for them names them all, and a machine's hello has room for so many.
_MOST_HOSTS_WITH_SECRETS = 32

StreamFactory: TypeAlias = "Callable[[], Awaitable[trio.abc.HalfCloseableStream]]"
"""Opens what a name of `NetworkRule.to` leads to, anew for each connection."""


def is_host_name(name: str) -> bool:
    """Tell whether *name* is a host name as it is written here: lower case, ASCII, no dot at the end, and no address."""
    if not 0 < len(name) <= _LONGEST_NAME:
        return False
    *_, last = labels = name.split(".")
    return all(_LABEL.fullmatch(label) for label in labels) and not _NUMBER.fullmatch(last)


def _host(value: str) -> str:
    """Return the name of a rule as it is compared, or say what is wrong with it."""
    if not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`host` must be str, not {type(value).__name__}")
    name = value.lower().removesuffix(".")
    if not name.isascii():
        raise ValueError(f"`host` must be ASCII, not {value!r}{_spelled_in_ascii(name)}")
    wildcard, name = name.startswith("*."), name.removeprefix("*.")
    if name == "*" or (wildcard and "." not in name):
        raise ValueError(
            f"`host` must not be {value!r}, which is nearly everything; name a domain, as in '*.example.org', "
            "or say Network.open()"
        )
    if ":" in name or "[" in name or _NUMBER.fullmatch(name.rpartition(".")[2]):
        raise ValueError(f"`host` must be a name, not the address {value!r}; a guest connects by name only")
    if not is_host_name(name):
        raise ValueError(
            f"`host` must be a host name such as 'example.org' or '*.example.org', not {value!r}: labels of letters, "
            f"digits, '-' and '_', 1 to 63 characters each and {_LONGEST_NAME} in all"
        )
    return f"*.{name}" if wildcard else name


def _spelled_in_ascii(name: str) -> str:
    import idna

    try:
        return f"; write {idna.encode(name.removeprefix('*.')).decode()!r}"
    except idna.IDNAError:
        return ""


def check_port(port: object, name: str = "ports") -> int:
    """Return *port*, or say what is wrong with it."""
    if type(port) is not int:
        raise TypeError(f"`{name}` must have whole numbers, not {port!r}")
    if not 0 < port <= _HIGHEST_PORT:
        raise ValueError(f"`{name}` must be from 1 to {_HIGHEST_PORT}, not {port}")
    return port


def _ports(value: int | tuple[int, ...] | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, int):
        return (check_port(value),)
    ports = tuple(check_port(port) for port in value)
    if not ports:
        raise ValueError("`ports` must not be empty; None is all ports")
    return ports


_Target: TypeAlias = "tuple[str, int] | StreamFactory | None"


def _check_to(_: object, _attribute: attrs.Attribute[_Target], value: object) -> None:
    if value is None or callable(value):
        return
    address = cast("tuple[object, ...]", value) if isinstance(value, tuple) else ()
    if len(address) != 2 or not isinstance(address[0], str):
        raise TypeError(f"`to` must be an address such as ('127.0.0.1', 5432), or an async function, not {value!r}")
    check_port(address[1], "to")


@final
@attrs.frozen(init=False)
class NetworkRule:
    """One host, or the hosts of one domain, that a sandbox may connect to.

    Args:
      host: A name, ``"pypi.org"``, or a domain, ``"*.pythonhosted.org"``: every name below it, at any depth, and not the
        domain itself. Upper case and a dot at the end make no difference.
      port: The only port, instead of *ports*.
      ports: The ports; None for all.
      private: Whether the name may lead to addresses that are not public, such as 10.0.0.5. ``"loopback"`` allows addresses of
        this machine as well. Neither allows link-local addresses and those of clouds' metadata services.
      tls: "named": on port 443 the guest must begin with a TLS handshake for the very name that it asked for, so that it
        can't talk to another site behind the same address. "any": whatever it sends is passed on.
      to: Where connections to this name lead: an address on your side, ``("127.0.0.1", 5432)``, or an async function
        that opens a stream for each connection. The name is not resolved, and need not exist.
      secrets: Values that the guest's programs may use with this host and never see, by the names of environment variables. In
        the guest each variable has a placeholder; in the headers of requests to this host your process puts the value in its
        place. For that it ends the guest's TLS, and speaks HTTP/1.1 over TLS of its own. The host must be a single name, and
        its port is 443 unless you say otherwise. Needs the extra: ``pip install trio-sandbox[network]``.

    Raises:
      TypeError, ValueError: if something is not valid.

    """

    host: str = attrs.field(converter=_host)
    """The name; lower case, with ``*.`` in front if it is a domain."""
    ports: tuple[int, ...] | None = attrs.field(default=WEB_PORTS, converter=_ports)
    """The ports; None: all."""
    private: Literal[False, True, "loopback"] = attrs.field(default=False)
    """Whether it may lead to addresses that are not public."""
    tls: Literal["named", "any"] = attrs.field(default="named")
    """What the guest must send first on port 443."""
    to: _Target = attrs.field(default=None, validator=_check_to)
    """Where connections really go; None: where the name leads."""
    secrets: Mapping[str, str] = attrs.field(default=Secrets(), converter=Secrets)
    """What is put into requests. Its repr has the names only, and a rule that has some can't be pickled."""

    def __attrs_post_init__(self) -> None:
        if not self.secrets:
            return
        if self.host.startswith("*."):
            raise ValueError(
                f"`secrets` needs a single host, not {self.host!r}: whoever gets a name in that domain would get the values"
            )
        if self.tls != "named":
            raise ValueError("`secrets` and tls='any' exclude each other: the value is put into what TLS carries")
        if self.ports is None or _HTTP_PORT in self.ports:
            raise ValueError(
                f"`secrets` needs ports on which the host speaks HTTP over TLS, such as 443, not {self.ports}; "
                "give other ports a rule of their own"
            )

    def __init__(
        self,
        host: str,
        *,
        port: int | None = None,
        ports: int | tuple[int, ...] | None = WEB_PORTS,
        private: Literal[False, True, "loopback"] = False,
        tls: Literal["named", "any"] | None = None,
        to: tuple[str, int] | StreamFactory | None = None,
        secrets: Mapping[str, str] | None = None,
    ) -> None:
        if port is not None and ports != WEB_PORTS:
            raise TypeError("`port` and `ports` must not be given both")
        if private not in (False, True, "loopback"):
            raise ValueError(f"`private` must be False, True or 'loopback', not {private!r}")
        if secrets and port is None and ports == WEB_PORTS:
            ports = _HTTPS_PORT
        if tls is None:
            tls = "named" if to is None or secrets else "any"
        if tls not in ("named", "any"):
            raise ValueError(f"`tls` must be 'named' or 'any', not {tls!r}")
        self.__attrs_init__(  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType] - made by attrs
            host, ports if port is None else port, private, tls, to, secrets
        )

    @classmethod
    def parse(cls, text: str) -> NetworkRule:
        """Return the rule that *text* is: a host, or a host and a port, ``"db.example.org:5432"``."""
        if "://" in text:
            raise ValueError(f"a host must be a name such as 'pypi.org', not the URL {text!r:.200}")
        host, colon, port = text.rpartition(":")
        if not colon or ":" in host:
            return cls(text)
        if not (port.isascii() and port.isdecimal()):
            raise ValueError(f"what follows the colon must be a port's number, not {port!r} (in {text!r})")
        return cls(host, port=int(port))

    def allows_host(self, host: str) -> bool:
        """Tell whether this is a rule about the name *host*."""
        return host.endswith(self.host[1:]) if self.host.startswith("*.") else host == self.host

    def allows_port(self, port: int) -> bool:
        """Tell whether this rule allows *port*."""
        return self.ports is None or port in self.ports


_check_limit = or_none(whole_number(0, unit="bytes"))


def _check_rules(_: object, _attribute: attrs.Attribute[tuple[NetworkRule, ...]], value: tuple[object, ...]) -> None:
    if not isinstance(value, tuple):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`rules` must be a tuple of NetworkRule, not {value!r:.100}")
    for rule in value:
        if not isinstance(rule, NetworkRule):
            raise TypeError(f"`rules` must have instances of NetworkRule, not {rule!r}")


def _check_open_ports(_: object, _attribute: attrs.Attribute[Any], value: object) -> None:
    if not (value is None or isinstance(value, tuple)):
        raise TypeError(f"`open_ports` must be a tuple of ports, or None for all of them, not {value!r:.100}")
    for port in cast("tuple[object, ...]", value or ()):
        check_port(port, "open_ports")


@final
@attrs.frozen(kw_only=True)
class Network:
    """What a sandbox may reach. Make one with `none`, `allow` or `open`.

    The guest never has a network device or an address of anything outside: your process makes the connections.
    """

    rules: tuple[NetworkRule, ...] = attrs.field(default=(), validator=_check_rules)
    """What may be connected to. Of several rules about a name, the first that allows the port counts."""
    open_ports: tuple[int, ...] | None = attrs.field(default=(), repr=False, validator=_check_open_ports)
    """The ports on which every public host may be connected to; (): none; None: all. `open` sets it."""
    max_connections: int = attrs.field(
        default=constants.DEFAULT_MAX_CONNECTIONS, validator=whole_number(1, constants.MAXIMUM_CONNECTIONS)
    )
    """Connections at a time, from 1 to `constants.MAXIMUM_CONNECTIONS`. Further ones wait."""
    max_sent_bytes: int | None = attrs.field(default=None, validator=_check_limit)
    """What the sandbox may send in all; then its connections are reset, and it gets no new ones. None: no limit."""
    max_received_bytes: int | None = attrs.field(default=None, validator=_check_limit)
    """What the sandbox may receive in all, in the same way."""

    def __attrs_post_init__(self) -> None:
        values: dict[str, str] = {}
        for rule in self.rules:
            for name, value in rule.secrets.items():
                if values.setdefault(name, value) != value:
                    raise ValueError(
                        f"the secret {name!r} must have one value, as the guest has one variable of that name; "
                        f"the rule for {rule.host!r} has another one"
                    )
            for port in rule.ports or () if rule.secrets else ():
                if (other := self.find(rule.host, port)) is not rule:
                    raise ValueError(
                        f"the rule for {rule.host!r} that has secrets must come before that for {other and other.host!r}, "
                        "which counts now"
                    )
        Secrets(values)  # or says that they are too many
        if len({rule.host for rule in self.rules if rule.secrets}) > _MOST_HOSTS_WITH_SECRETS:
            raise ValueError(f"at most {_MOST_HOSTS_WITH_SECRETS} hosts of a Network may have secrets")
        if values and self.open_ports != ():
            raise ValueError(
                "Network.open() must have no rule with secrets: code that can reach every host can take what it gets "
                "from one to any other. Name the hosts: Network.allow(...)"
            )

    @classmethod
    def none(cls) -> Network:
        """Nothing may be reached. This is the default, and costs nothing."""
        return cls()

    @classmethod
    def allow(
        cls,
        *hosts: str | NetworkRule,
        max_connections: int = constants.DEFAULT_MAX_CONNECTIONS,
        max_sent_bytes: int | None = None,
        max_received_bytes: int | None = None,
    ) -> Network:
        """The named hosts may be reached, and nothing else.

        Args:
          hosts: Names, ``"pypi.org"``, domains, ``"*.pythonhosted.org"``, either with one port, ``"db.example.org:5432"``, or rules.
          max_connections: See `Network.max_connections`.
          max_sent_bytes: See `Network.max_sent_bytes`.
          max_received_bytes: See `Network.max_received_bytes`.

        Raises:
          TypeError, ValueError: if there are no hosts, or one is not valid. A list is a TypeError: say ``allow(*hosts)``.

        """
        if not hosts:
            raise TypeError(
                "Network.allow() needs a host; nothing is Network.none(), and every public host Network.open()"
            )
        for host in hosts:
            if not isinstance(host, (str, NetworkRule)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(
                    f"a host must be str or a NetworkRule, not {host!r:.200}; pass those of a list as Network.allow(*hosts)"
                )
        return cls(
            rules=tuple(NetworkRule.parse(host) if isinstance(host, str) else host for host in hosts),
            max_connections=max_connections,
            max_sent_bytes=max_sent_bytes,
            max_received_bytes=max_received_bytes,
        )

    @classmethod
    def open(
        cls,
        *rules: NetworkRule,
        ports: tuple[int, ...] | None = WEB_PORTS,
        max_connections: int = constants.DEFAULT_MAX_CONNECTIONS,
        max_sent_bytes: int | None = None,
        max_received_bytes: int | None = None,
    ) -> Network:
        """Every host may be reached that has a public address. Private networks and this machine stay out of reach.

        Args:
          rules: Exceptions for single hosts.
          ports: The ports; None for all.
          max_connections: See `Network.max_connections`.
          max_sent_bytes: See `Network.max_sent_bytes`.
          max_received_bytes: See `Network.max_received_bytes`.

        Raises:
          TypeError, ValueError: if a port or a limit is not valid.

        """
        return cls(
            rules=rules,
            open_ports=_ports(ports),
            max_connections=max_connections,
            max_sent_bytes=max_sent_bytes,
            max_received_bytes=max_received_bytes,
        )

    def __bool__(self) -> bool:
        """Whether there is anything that may be reached."""
        return bool(self.rules) or self.open_ports != ()

    def find(self, host: str, port: int | None = None) -> NetworkRule | None:
        """Return the rule by which *host* may be reached, on *port* if that is given; None if it may not."""
        for rule in self.rules:
            if rule.allows_host(host) and (port is None or rule.allows_port(port)):
                return rule
        if self.open_ports == () or (port is not None and self.open_ports is not None and port not in self.open_ports):
            return None
        return NetworkRule(host, ports=self.open_ports)


mark_public(__name__, globals())
