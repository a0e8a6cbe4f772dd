"""The guest's resolver and packets: bytes in, bytes out."""

from __future__ import annotations

import errno
import socket
import struct
from ipaddress import IPv4Address

import pytest
from hypothesis import given, strategies as st

from trio_sandbox.guest.agent.network import dns, names as names_module
from trio_sandbox.guest.agent.network.names import OWN, RANGE, RESOLVER, Names
from trio_sandbox.guest.agent.network.packets import admit, parse_syn, refuse


def query(
    name: bytes, kind: int = dns.A, *, flags: int = 0x0100, klass: int = 1, more: bytes = b"", counts: str = ""
) -> bytes:
    numbers = [7, flags, *([1, 0, 0, 0] if not counts else map(int, counts.split()))]
    return struct.pack(">6H", *numbers) + name + struct.pack(">HH", kind, klass) + more


def encoded(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"


EDNS = b"\0" + struct.pack(">HHIH", 41, 1232, 0, 0)


def test_an_ordinary_question() -> None:
    asked = dns.parse(query(encoded("Example.ORG")))
    assert asked is not None
    assert (asked.number, asked.name, asked.kind, asked.extended, asked.supported) == (7, "example.org", 1, False, True)
    answer = dns.answer(asked, records=[(dns.A, 60, b"\xc6\x12\x01\x00")])
    assert struct.unpack_from(">6H", answer) == (7, 0x8180, 1, 1, 0, 0)
    assert encoded("Example.ORG") in answer  # as it was written
    assert answer.endswith(struct.pack(">HHHIH", 0xC00C, 1, 1, 60, 4) + b"\xc6\x12\x01\x00")


def test_there_is_no_such_record_and_why_a_name_is_blocked() -> None:
    asked = dns.parse(query(encoded("a.b"), dns.AAAA, more=EDNS, counts="1 0 0 1"))
    assert asked is not None
    assert asked.extended
    assert struct.unpack_from(">6H", dns.answer(asked)) == (7, 0x8180, 1, 0, 1, 1)
    blocked = dns.answer(asked, dns.NXDOMAIN, why="not allowed")
    assert blocked[3] & 15 == dns.NXDOMAIN
    assert blocked.endswith(struct.pack(">HHH", 15, 13, 15) + b"not allowed")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        query(encoded("a.b"), flags=0x8180),  # an answer
        query(encoded("a.b"), counts="2 0 0 0"),
        query(encoded("a.b"), counts="0 0 0 0"),
        query(b"\x3fa"),
        query(b"\xc0\x0c"),  # a pointer
        query(b"\x40" + b"a" * 64 + b"\0"),
        query((b"\x3f" + b"a" * 63) * 4 + b"\0"),
        query(encoded("a.b"))[:-1],
        query(encoded("a.b"), more=bytes(5000)),
    ],
)
def test_what_deserves_no_answer(data: bytes) -> None:
    assert dns.parse(data) is None


@pytest.mark.parametrize(
    "name", [b"\x0bevil\0.b.org\0", b"\x03a.b\0", b"\x02a \0", b"\x01*\x03org\0", b"\x02\xc3\xa9\0", b"\0", b"\x02-a\0"]
)
def test_a_name_that_is_no_host_name_is_none(name: bytes) -> None:
    asked = dns.parse(query(name))
    assert asked is not None
    assert asked.name == ""


def test_other_operations_and_classes_are_not_supported() -> None:
    for data in (query(encoded("a.b"), flags=0x2800), query(encoded("a.b"), klass=3)):
        asked = dns.parse(data)
        assert asked is not None
        assert not asked.supported


@given(st.binary(max_size=600))
def test_any_bytes_are_a_question_or_none(data: bytes) -> None:
    asked = dns.parse(data)
    if asked is not None:
        for code in (dns.NOERROR, dns.NXDOMAIN, dns.SERVFAIL):
            answer = dns.answer(asked, code, why="no")
            assert answer[:2] == data[:2]
            assert asked.question == data[12 : 12 + len(asked.question)] == answer[12 : 12 + len(asked.question)]
            assert len(answer) < 512


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("0.1.18.198.in-addr.arpa", b"\xc6\x12\x01\x00"),
        ("1.18.198.in-addr.arpa", None),
        ("256.1.18.198.in-addr.arpa", None),
        ("a.1.18.198.in-addr.arpa", None),
    ],
)
def test_reverse_names(name: str, address: bytes | None) -> None:
    assert dns.parse_reverse_name(name) == address


def test_a_name_keeps_its_address_and_an_address_its_name() -> None:
    names = Names()
    first, second = names.address("a.org"), names.address("b.org")
    assert IPv4Address(first) in RANGE
    assert first not in (OWN.packed, RESOLVER.packed)
    assert first < second
    assert names.address("a.org") == first
    assert names.name(first) == "a.org"
    assert names.name(b"\xc6\x13\xff\xfe") is None


def test_what_is_forgotten_means_nothing_and_is_not_used_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names_module, "_REMEMBERED", 2)
    names = Names()
    first = names.address("a.org")
    names.address("b.org")
    assert names.name(first) == "a.org"  # and b.org is the one not used for longest
    third = names.address("c.org")
    assert names.name(first) == "a.org"
    assert names.address("b.org") > third
    assert names.name(first) is None or names.name(third) is None


def test_addresses_begin_anew_after_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names_module, "_REMEMBERED", 3)
    monkeypatch.setattr(names_module, "_LAST", names_module._FIRST + 4)  # pyright: ignore[reportPrivateUsage]
    names = Names()
    given_out = [names.address(f"n{number}.org") for number in range(20)]
    assert len(set(given_out[:5])) == 5
    for earlier, later in zip(given_out, given_out[3:], strict=False):
        assert earlier != later or names.name(earlier) is not None
    assert {names.name(address) for address in given_out[-3:]} == {"n17.org", "n18.org", "n19.org"}


# --- Packets ---

SOURCE, TARGET = b"\xc6\x12\x00\x01", b"\xc6\x12\x01\x00"


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) & 1)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def syn(*, options: bytes = b"\x02\x04\xff\xd7", ip_options: bytes = b"") -> bytes:
    offset = (5 + len(options) // 4) << 4
    tcp = struct.pack(">HHIIBBHHH", 40000, 443, 123456, 0, offset, 2, 65495, 0xFE30, 0) + options
    size = 20 + len(ip_options)
    return (
        struct.pack(">BBHHHBBH4s4s", 0x40 | size // 4, 0, size + len(tcp), 1, 0x4000, 64, 6, 0, SOURCE, TARGET)
        + ip_options
        + tcp
    )


@pytest.mark.parametrize("ip_options", [b"", b"\x01\x01\x01\x00"])
def test_a_syn_that_is_let_in_is_the_same_with_a_checksum_that_is_right(ip_options: bytes) -> None:
    parsed = parse_syn(syn(ip_options=ip_options) + b"trailer")
    assert parsed is not None
    assert parsed.key == (SOURCE, 40000, TARGET, 443)
    again = admit(parsed)
    segment = again[parsed.header_length :]
    assert checksum(SOURCE + TARGET + struct.pack(">BBH", 0, 6, len(segment)) + segment) == 0xFFFF
    assert again[: parsed.header_length + 16] == parsed.packet[: parsed.header_length + 16]


def test_a_refused_connection_is_reset_with_the_number_that_its_kernel_expects() -> None:
    parsed = parse_syn(syn())
    assert parsed is not None
    packet = refuse(parsed, errno.ECONNREFUSED)
    assert packet[9] == socket.IPPROTO_TCP
    assert (packet[12:16], packet[16:20]) == (TARGET, SOURCE)
    assert struct.unpack_from(">HHIIBB", packet, 20) == (443, 40000, 0, 123457, 0x50, 0x14)
    assert checksum(TARGET + SOURCE + struct.pack(">BBH", 0, 6, 20) + packet[20:]) == 0xFFFF


@pytest.mark.parametrize(("number", "code"), [(errno.EHOSTUNREACH, 1), (errno.ENETUNREACH, 0), (errno.EACCES, 13)])
def test_what_is_unreachable_is_told_by_icmp(number: int, code: int) -> None:
    parsed = parse_syn(syn())
    assert parsed is not None
    packet = refuse(parsed, number)
    assert packet[9] == socket.IPPROTO_ICMP
    assert packet[20:22] == bytes([3, code])
    assert checksum(packet[20:]) == 0xFFFF
    assert packet[28:] == parsed.packet[:28]


@pytest.mark.parametrize(
    "packet",
    [b"", syn()[:30], b"\x60" + syn()[1:], syn()[:9] + b"\x11" + syn()[10:], b"\x4f" + syn()[1:], b"\x41" + syn()[1:], syn()[:2] + b"\xff\xff" + syn()[4:]],
)  # fmt: skip
def test_what_is_no_whole_syn_is_none(packet: bytes) -> None:
    assert parse_syn(packet) is None


@given(st.binary(max_size=120))
def test_any_packet_is_a_syn_or_none(packet: bytes) -> None:
    parsed = parse_syn(packet)
    if parsed is not None:
        assert len(admit(parsed)) == len(parsed.packet)
        for number in (errno.ECONNREFUSED, errno.EHOSTUNREACH):
            refuse(parsed, number)
