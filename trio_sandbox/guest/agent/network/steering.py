"""What makes the kernel bring the guest's connections to the agent: one address, one BPF program, two filters.

- An address with a mask makes the whole range this machine's own (AnyIP): packets to it stay on the loopback interface.
- A program of the kind `sk_lookup` hands each TCP connection to the range, whatever its port, to one listener (Linux 5.9;
  Documentation/bpf/prog_sk_lookup.rst). It comes before the users' listeners.
- A filter on that listener drops each SYN without our mark. A packet socket gives us a copy of it. When the host has
  connected we send the SYN anew, with the mark, and it is let in; else we answer it with the error that the host had.

There is no module for it, and no other program: system calls only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from typing import Final, final

from .names import OWN, RANGE, RESOLVER
from .packets import Syn, admit, parse_syn, refuse

# rtnetlink(7), linux/if_addr.h.
_RTM_NEWADDR, _RTM_DELADDR, _REQUEST_ACK, _CREATE_OR_REPLACE = 20, 21, 0x5, 0x500
_IFA_ADDRESS, _IFA_LOCAL, _IFA_LABEL = 1, 2, 3
#: A name of the loopback interface for our address, by which users may take it down alone; with zeros to a multiple of four.
_LABEL: Final = b"lo:network\0\0"

# bpf(2); the number of the system call is that of x86_64.
_SYS_BPF: Final = 321
_MAP_CREATE, _MAP_UPDATE_ELEM, _PROG_LOAD, _LINK_CREATE = 0, 2, 5, 28
_MAP_TYPE_SOCKMAP, _PROG_TYPE_SK_LOOKUP, _ATTACH_SK_LOOKUP = 15, 30, 36
_MAP_LOOKUP_ELEM, _SK_RELEASE, _SK_ASSIGN = 1, 86, 124  # helpers

_SO_ATTACH_FILTER, _SO_MARK, _IP_FREEBIND = 26, 36, 15
_SOL_PACKET, _PACKET_IGNORE_OUTGOING, _ETH_P_IP = 263, 23, 0x0800
_MARK: Final = 0x74726E65
_DNS_PORT: Final = 53
#: Connections that the kernel keeps for us to accept.
_BACKLOG: Final = 512
#: A SYN has no data; what is longer is none of ours.
_LONGEST_PACKET: Final = 2048

_NETWORK, _MASK = int(RANGE.network_address), int(RANGE.netmask)
_FLAGS_SYN_ACK, _FLAG_SYN, _TCP = 0x12, 0x02, 6
#: Where classic BPF finds a packet's mark (SKF_AD_OFF + SKF_AD_MARK, linux/filter.h).
_AD_MARK: Final = 0xFFFFF000 + 20
_ALL, _NOTHING = 0xFFFFFFFF, 0

# Classic BPF as (code, jump if true, jump if false, operand); see linux/filter.h.
_LOAD_WORD, _LOAD_BYTE, _LOAD_BYTE_INDEXED, _LOAD_HEADER_LENGTH = 0x20, 0x30, 0x50, 0xB1
_AND, _JUMP_EQUAL, _RETURN = 0x54, 0x15, 0x06

#: Of the listener, which sees a packet from its TCP header on: a SYN passes with our mark only.
_HOLD_SYNS: Final = (
    (_LOAD_BYTE, 0, 0, 13),
    (_AND, 0, 0, _FLAGS_SYN_ACK),
    (_JUMP_EQUAL, 0, 3, _FLAG_SYN),
    (_LOAD_WORD, 0, 0, _AD_MARK),
    (_JUMP_EQUAL, 1, 0, _MARK),
    (_RETURN, 0, 0, _NOTHING),
    (_RETURN, 0, 0, _ALL),
)
#: Of the packet socket, which sees a packet from its IP header on: SYNs to the range, without our mark.
_SEE_SYNS: Final = (
    (_LOAD_WORD, 0, 0, 16),
    (_JUMP_EQUAL, 11, 0, int(OWN)),
    (_AND, 0, 0, _MASK),
    (_JUMP_EQUAL, 0, 9, _NETWORK),
    (_LOAD_BYTE, 0, 0, 9),
    (_JUMP_EQUAL, 0, 7, _TCP),
    (_LOAD_HEADER_LENGTH, 0, 0, 0),
    (_LOAD_BYTE_INDEXED, 0, 0, 13),
    (_AND, 0, 0, _FLAGS_SYN_ACK),
    (_JUMP_EQUAL, 0, 3, _FLAG_SYN),
    (_LOAD_WORD, 0, 0, _AD_MARK),
    (_JUMP_EQUAL, 1, 0, _MARK),
    (_RETURN, 0, 0, _LONGEST_PACKET),
    (_RETURN, 0, 0, _NOTHING),
)


@final
class Steering:
    """The sockets that the kernel steers the guest's connections to, and its program; they cost nothing before the first `switch`.

    Raises:
      OSError: if the kernel has not what it takes.

    """

    def __init__(self) -> None:
        self.listener: socket.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        """Has the connections that were let in."""
        self.listener.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        # Each connection has it from the listener. Who writes to one wants it sent.
        self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.listener.bind((str(RESOLVER), 1))
        self.listener.listen(_BACKLOG)
        _attach_filter(self.listener, _HOLD_SYNS)
        self._program = _load(self.listener)
        self._link = -1
        """What has the kernel use the program; it stays while the descriptor does."""
        self.queries: socket.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        """Has what programs ask the resolver."""
        self.queries.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        self.queries.bind((str(RESOLVER), _DNS_PORT))
        self._answers = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        self._answers.setblocking(False)
        self._answers.setsockopt(socket.SOL_SOCKET, _SO_MARK, _MARK)
        self.syns: socket.socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, 0)
        """Has the SYNs that are held; see `receive_syn`."""
        _attach_filter(self.syns, _SEE_SYNS)
        self.syns.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)

    def switch(self, *, on: bool) -> None:
        """Make the range this machine's own, or unreachable.

        Raises:
          OSError: if that can't be done.

        """
        if on and self._link < 0:
            self._link = _attach(self._program)
            self.syns.bind(("lo", _ETH_P_IP))
        _set_address(on=on)

    def receive_syn(self) -> Syn | None:
        """Return a SYN that is held; None for what is none.

        Raises:
          BlockingIOError: if there is no packet.

        """
        return parse_syn(self.syns.recv(_LONGEST_PACKET))

    def let_in(self, syn: Syn) -> None:
        """Let a connection come about; it can be accepted then."""
        self._send(admit(syn), syn.target)

    def refuse(self, syn: Syn, number: int) -> None:
        """Let a connection fail with an errno."""
        self._send(refuse(syn, number), syn.source)

    def _send(self, packet: bytes, target: bytes) -> None:
        try:
            self._answers.sendto(packet, (socket.inet_ntoa(target), 0))
        except OSError:
            # There is no room, or the address is down. The program's kernel sends its SYN again, or gives up.
            return


def _set_address(*, on: bool) -> None:
    # rtnetlink(7): struct ifaddrmsg and its attributes, of four bytes and more. It takes a third of what SIOCSIFADDR and
    # SIOCSIFNETMASK take, which add the address with another mask, remove it, and add it again.
    message = struct.pack("=BBBBI", socket.AF_INET, RANGE.prefixlen, 0, 0, socket.if_nametoindex("lo")) + b"".join(
        struct.pack("=HH", 4 + len(value), kind) + value
        for kind, value in ((_IFA_ADDRESS, OWN.packed), (_IFA_LOCAL, OWN.packed), (_IFA_LABEL, _LABEL))
    )
    kind, flags = (_RTM_NEWADDR, _CREATE_OR_REPLACE) if on else (_RTM_DELADDR, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.send(struct.pack("=IHHII", 16 + len(message), kind, _REQUEST_ACK | flags, 0, 0) + message)
        (error,) = struct.unpack_from("=i", sock.recv(256), 16)
    if error and not (not on and error == -errno.EADDRNOTAVAIL):
        raise OSError(-error, f"setting the address of the network: {os.strerror(-error)}")


def _attach_filter(sock: socket.socket, program: tuple[tuple[int, int, int, int], ...]) -> None:
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog
    sock.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HxxxxxxQ", len(program), ctypes.addressof(buffer))
    )


def _load(listener: socket.socket) -> int:
    """Load the program that steers connections to *listener*, and return its descriptor."""
    sockets = _bpf(_MAP_CREATE, struct.pack("<5I", _MAP_TYPE_SOCKMAP, 4, 8, 1, 0).ljust(72, b"\0"))
    code = _program(sockets)
    text = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"GPL")
    program = _bpf(
        _PROG_LOAD,
        struct.pack(
            "<IIQQIIQII16sII",
            _PROG_TYPE_SK_LOOKUP,
            len(code) // 8,
            ctypes.addressof(text),
            ctypes.addressof(licence),
            0,
            0,
            0,
            0,
            0,
            b"trio_sandbox",
            0,
            _ATTACH_SK_LOOKUP,
        ),
    )
    key = ctypes.create_string_buffer(4)
    value = ctypes.create_string_buffer(struct.pack("<Q", listener.fileno()), 8)
    _bpf(_MAP_UPDATE_ELEM, struct.pack("<IIQQQ", sockets, 0, ctypes.addressof(key), ctypes.addressof(value), 0))
    os.close(sockets)  # the program has it
    return program


def _attach(program: int) -> int:
    """Have the kernel use *program*, and return the descriptor of that."""
    namespace = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _bpf(_LINK_CREATE, struct.pack("<4I", program, namespace, _ATTACH_SK_LOOKUP, 0).ljust(64, b"\0"))
    finally:
        os.close(namespace)


def _bpf(command: int, attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result: int = ctypes.CDLL(None, use_errno=True).syscall(_SYS_BPF, command, buffer, len(attributes))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"bpf({command}): {os.strerror(number)}")
    return result


def _program(sockets: int) -> bytes:
    """Return the program. Offsets are those of struct bpf_sk_lookup (linux/bpf.h); addresses are in network order there."""
    own, network, mask = (int.from_bytes(value.to_bytes(4, "big"), "little") for value in (int(OWN), _NETWORK, _MASK))
    return b"".join(
        struct.pack("<BBhi", code, source << 4 | target, offset, value - (value >> 31 << 32))
        for code, target, source, offset, value in (
            (0xBF, 6, 1, 0, 0),  # r6 = context
            (0x61, 2, 1, 8, 0),  # r2 = family
            (0x55, 2, 0, 20, socket.AF_INET),  # if it is another: pass
            (0x61, 2, 1, 12, 0),  # r2 = protocol
            (0x55, 2, 0, 18, _TCP),  # if it is another: pass
            (0x61, 2, 1, 40, 0),  # r2 = local address
            (0x16, 2, 0, 16, own),  # if it is our own: pass
            (0x54, 2, 0, 0, mask),  # r2 &= mask
            (0x56, 2, 0, 14, network),  # if that is not the range: pass
            (0x62, 10, 0, -4, 0),  # key = 0
            (0xBF, 2, 10, 0, 0),  # r2 = &key
            (0x07, 2, 0, 0, -4 & 0xFFFFFFFF),
            (0x18, 1, 1, 0, sockets),  # r1 = the map, in two words
            (0x00, 0, 0, 0, 0),
            (0x85, 0, 0, 0, _MAP_LOOKUP_ELEM),
            (0x15, 0, 0, 7, 0),  # if there is no listener: pass
            (0xBF, 7, 0, 0, 0),  # r7 = listener
            (0xBF, 1, 6, 0, 0),  # r1 = context
            (0xBF, 2, 0, 0, 0),  # r2 = listener
            (0xB7, 3, 0, 0, 0),  # r3 = no flags
            (0x85, 0, 0, 0, _SK_ASSIGN),
            (0xBF, 1, 7, 0, 0),  # r1 = listener
            (0x85, 0, 0, 0, _SK_RELEASE),
            (0xB7, 0, 0, 0, 1),  # pass: SK_PASS
            (0x95, 0, 0, 0, 0),
        )
    )
