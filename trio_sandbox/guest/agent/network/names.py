"""Which name each synthetic address stands for.

A guest gets no address of anything outside. It gets one of a range that is its own, and that stands for the name: the host
is asked by name, whatever the address was. Addresses are given out in rising order, so that one that was forgotten is
refused for long, and does not mean another name.
"""

from __future__ import annotations

from collections import OrderedDict
from ipaddress import IPv4Address, IPv4Network
from typing import Final, final

#: The range of RFC 2544, for benchmarks between hosts of one's own: no host outside has an address in it.
RANGE: Final = IPv4Network("198.18.0.0/15")
#: This machine's own address in the range; what connects to it meets the users' own servers.
OWN: Final = RANGE[1]
#: Where the resolver is.
RESOLVER: Final = RANGE[2]
_FIRST, _LAST = int(RANGE[256]), int(RANGE[-2])
#: Names that are remembered. There are 32 addresses for each.
_REMEMBERED = 4096


@final
class Names:
    """Gives each name an address, which it keeps while it is remembered."""

    def __init__(self) -> None:
        self._addresses: OrderedDict[str, int] = OrderedDict()
        self._names: dict[int, str] = {}
        self._next = _FIRST

    def address(self, name: str) -> bytes:
        """Return the address of *name*, packed."""
        address = self._addresses.get(name)
        if address is None:
            if len(self._addresses) >= _REMEMBERED:
                _, oldest = self._addresses.popitem(last=False)
                del self._names[oldest]
            while self._next in self._names:
                self._step()
            address = self._next
            self._step()
            self._addresses[name] = address
            self._names[address] = name
        self._addresses.move_to_end(name)
        return IPv4Address(address).packed

    def name(self, address: bytes) -> str | None:
        """Return the name that the packed *address* stands for."""
        name = self._names.get(int.from_bytes(address, "big"))
        if name is not None:
            self._addresses.move_to_end(name)
        return name

    def _step(self) -> None:
        self._next = _FIRST if self._next >= _LAST else self._next + 1
