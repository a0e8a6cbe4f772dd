"""Which addresses a guest's connection may lead to.

The table is our own: `ipaddress.is_global` of Python 3.11 takes for global what leads into private networks, for instance
NAT64's 64:ff9b::/96, 6to4's 2002::/16 and IPv4-mapped addresses. Sources: the IANA registries of special-purpose addresses
(RFC 6890), and what clouds have put on addresses that look public.
"""

from __future__ import annotations

import errno
import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Literal

_REFUSED_IPV4 = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by the customers of a provider; Alibaba's metadata
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's host
        "169.254.0.0/16",  # link-local; metadata of most clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks; the guest's own range
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/3",  # multicast, reserved, broadcast
    )
)
#: The only part of IPv6 that has addresses of hosts anywhere in the world, without what is special in it.
_GLOBAL_IPV6 = IPv6Network("2000::/3")
_REFUSED_IPV6 = tuple(
    IPv6Network(text)
    for text in (
        "2001::/23",  # protocol assignments: Teredo, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: an IPv4 address in disguise
        "3fff::/20",  # documentation
    )
)

#: What nobody means by a private network: addresses by which clouds give a machine's credentials away, or that are of no
#: one host.
_NEVER_IPV4 = tuple(
    IPv4Network(text)
    for text in (
        "100.100.100.200/32",  # Alibaba's metadata
        "168.63.129.16/32",  # Azure's host
        "169.254.0.0/16",  # metadata of most clouds
        "192.0.0.192/32",  # Oracle's metadata
        "224.0.0.0/4",
        "255.255.255.255/32",
    )
)
_NEVER_IPV6 = tuple(
    IPv6Network(text)
    for text in (
        "fd00:42::42/128",  # Scaleway's metadata
        "fd00:100::100:200/128",  # Alibaba's metadata
        "fd00:a9fe:a9fe::1/128",  # Linode's metadata
        "fd00:c1::a9fe:a9fe/128",  # Oracle's metadata
        "fd00:ec2::/32",  # Amazon's metadata
        "fd20:ce::/32",  # Google's metadata
        "fe80::/10",
        "ff00::/8",
    )
)
#: Networks that take an IPv4 address in their last four bytes for where a packet goes: mapped and translated addresses, NAT64.
_WITH_IPV4 = tuple(
    IPv6Network(text) for text in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48")
)
_6TO4 = IPv6Network("2002::/16")

Private = Literal[False, True, "loopback"]


def is_public(address: str) -> bool:
    """Tell whether a host anywhere in the world can have *address*, as `getaddrinfo` writes it."""
    if "%" in address:  # it counts within a network only
        return False
    match ip_address(address):
        case IPv4Address() as ipv4:
            return not any(ipv4 in network for network in _REFUSED_IPV4)
        case ipv6:
            return ipv6 in _GLOBAL_IPV6 and not any(ipv6 in network for network in _REFUSED_IPV6)


def is_own(address: str) -> bool:
    """Tell whether *address* leads to this machine: a loopback address, or one of an interface's.

    Nothing is sent: the kernel is asked which address it would send from.

    Raises:
      OSError: if this machine has no descriptor, or no memory, to find out.

    """
    plain = ip_address(address.partition("%")[0])
    inner = _inner(plain)
    if plain.is_loopback or plain.is_unspecified or (inner is not None and is_own(str(inner))):
        return True
    family = socket.AF_INET if isinstance(plain, IPv4Address) else socket.AF_INET6
    try:
        sock = socket.socket(family, socket.SOCK_DGRAM)
    except OSError as exc:
        if exc.errno == errno.EAFNOSUPPORT:
            return False
        raise  # nothing is known, for want of descriptors or memory
    with sock:
        try:
            sock.connect((address, 9))
        except OSError:  # there is no way to it at all
            return False
        return ip_address(str(sock.getsockname()[0]).partition("%")[0]) == plain


def _inner(address: IPv4Address | IPv6Address) -> IPv4Address | None:
    """Return the IPv4 address that *address* has in it, and leads to."""
    if isinstance(address, IPv6Address):
        if any(address in network for network in _WITH_IPV4):
            return IPv4Address(address.packed[12:])
        if address in _6TO4:
            return IPv4Address(address.packed[2:6])
    return None


def _is_never_meant(address: str) -> bool:
    plain = ip_address(address.partition("%")[0])
    inner = _inner(plain)
    if inner is not None and not (plain.is_loopback or plain.is_unspecified):
        return _is_never_meant(str(inner))
    return any(plain in network for network in (_NEVER_IPV4 if isinstance(plain, IPv4Address) else _NEVER_IPV6))


def may_connect(address: str, private: Private) -> bool:
    """Tell whether a rule with *private* lets a guest connect to *address*.

    Raises:
      OSError: if this machine can't find out.

    """
    if not private:
        return is_public(address) and not is_own(address)
    if _is_never_meant(address):
        return False
    return private == "loopback" or not is_own(address)
