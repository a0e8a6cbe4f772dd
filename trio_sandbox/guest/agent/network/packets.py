"""The packets of a connection that waits for the host: bytes in, bytes out (RFC 791, RFC 792, RFC 9293)."""

from __future__ import annotations

import errno
import struct
from typing import Final, NamedTuple

_TCP, _ICMP = 6, 1
_SHORTEST_IP, _SHORTEST_TCP = 20, 20
_RST_ACK, _HEADER_WORDS = 0x14, 0x50
#: Codes of "destination unreachable" by what a program is to see; administratively prohibited is EHOSTUNREACH, too.
_UNREACHABLE: Final = {errno.EHOSTUNREACH: 1, errno.ENETUNREACH: 0, errno.EACCES: 13}


class Syn(NamedTuple):
    """The first packet of a connection."""

    packet: bytes
    header_length: int
    source: bytes
    target: bytes
    source_port: int
    target_port: int

    @property
    def key(self) -> tuple[bytes, int, bytes, int]:
        """What no other connection has at the same time: both ends."""
        return self.source, self.source_port, self.target, self.target_port

    @property
    def number(self) -> int:
        """Its sequence number, which the packet has again when it is sent again."""
        return int.from_bytes(self.packet[self.header_length + 4 : self.header_length + 8], "big")


def parse_syn(packet: bytes) -> Syn | None:
    """Return the SYN that *packet* is; None if it is none that is whole."""
    if len(packet) < _SHORTEST_IP or packet[0] >> 4 != 4 or packet[9] != _TCP:
        return None
    header, total = (packet[0] & 15) * 4, int.from_bytes(packet[2:4], "big")
    if header < _SHORTEST_IP or not header + _SHORTEST_TCP <= total <= len(packet):
        return None
    source_port, target_port = struct.unpack_from(">HH", packet, header)
    return Syn(packet[:total], header, packet[12:16], packet[16:20], source_port, target_port)


def admit(syn: Syn) -> bytes:
    """Return the SYN once more, to be let in.

    Its checksum is made here: on the loopback interface nobody has completed it, and a packet that is sent
    by hand is checked.
    """
    segment = bytearray(syn.packet[syn.header_length :])
    segment[16:18] = b"\0\0"
    struct.pack_into(">H", segment, 16, _checksum(_pseudo_header(syn.source, syn.target, len(segment)) + segment))
    return syn.packet[: syn.header_length] + bytes(segment)


def refuse(syn: Syn, number: int) -> bytes:
    """Return the answer to a SYN by which a program sees the errno *number*: an ICMP message, or a reset."""
    code = _UNREACHABLE.get(number)
    if code is not None:
        message = struct.pack(">BBHI", 3, code, 0, 0) + syn.packet[: syn.header_length + 8]
        message = message[:2] + struct.pack(">H", _checksum(message)) + message[4:]
        return _packet(syn.target, syn.source, _ICMP, message)
    fields = (syn.target_port, syn.source_port, 0, (syn.number + 1) & 0xFFFFFFFF, _HEADER_WORDS, _RST_ACK, 0)
    segment = struct.pack(">HHIIBBHHH", *fields, 0, 0)
    checksum = _checksum(_pseudo_header(syn.target, syn.source, len(segment)) + segment)
    return _packet(syn.target, syn.source, _TCP, struct.pack(">HHIIBBHHH", *fields, checksum, 0))


def _packet(source: bytes, target: bytes, protocol: int, payload: bytes) -> bytes:
    # The kernel puts the header's checksum in.
    return struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0, source, target) + payload


def _pseudo_header(source: bytes, target: bytes, length: int) -> bytes:
    return source + target + struct.pack(">BBH", 0, _TCP, length)


def _checksum(data: bytes) -> int:
    if len(data) & 1:
        data += b"\0"
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
