"""Where a guest's connection may lead."""

from __future__ import annotations

import errno
import socket

import pytest

from trio_sandbox.network._addresses import is_own, is_public, may_connect
from trio_sandbox.network._connect import interleave


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254", "168.63.129.16",
        "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.192", "192.0.2.1", "192.88.99.1",
        "192.168.1.1", "198.18.0.2", "198.19.255.255", "198.51.100.1", "203.0.113.80", "224.0.0.1", "239.1.1.1",
        "240.0.0.1", "255.255.255.255",
        "::", "::1", "::ffff:8.8.8.8", "::ffff:127.0.0.1", "::8.8.8.8", "64:ff9b::8.8.8.8", "64:ff9b:1::1", "100::1",
        "2001::1", "2001:10::1", "2001:db8::1", "2002:a00:1::", "2002:808:808::", "3fff::1", "5f00::1", "fc00::1",
        "fd00:ec2::254", "fe80::1", "fe80::1%lo", "2606:4700::1111%2", "fec0::1", "ff02::1",
    ],
)  # fmt: skip
def test_these_are_not_public(address: str) -> None:
    assert not is_public(address)
    assert not may_connect(address, private=False)


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", "8.8.8.8", "9.255.255.255", "100.63.0.1", "100.128.0.1", "172.15.0.1", "172.32.0.1", "192.0.1.1",
     "192.167.0.1", "198.17.0.1", "198.20.0.1", "223.255.255.254", "2606:4700::1111", "2a00:1450::1", "2001:200::1"],
)  # fmt: skip
def test_these_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::"])
def test_loopback_is_ours_and_takes_a_word_of_its_own(address: str) -> None:
    assert is_own(address)
    assert not may_connect(address, private=True)
    assert may_connect(address, private="loopback")


def test_an_address_of_an_interface_is_ours() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network, and no address but loopback ones")
        address = sock.getsockname()[0]
    assert is_own(address)
    assert not may_connect(address, private=True)


def test_private_networks_take_a_word() -> None:
    assert may_connect("10.255.255.254", private=True)
    assert not is_own("8.8.8.8")


@pytest.mark.parametrize(
    "address",
    ["169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254",
     "fd00:42::42", "fd00:100::100:200", "fd00:a9fe:a9fe::1", "fd00:c1::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe", "::ffff:0:a9fe:a9fe",
     "fe80::1", "fe80::1%lo", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "224.0.0.1", "ff02::1",
     "255.255.255.255"],
)  # fmt: skip
def test_what_gives_a_machines_credentials_away_is_no_private_network(address: str) -> None:
    assert not may_connect(address, private=True)
    assert not may_connect(address, private="loopback")


@pytest.mark.parametrize(
    "address", ["64:ff9b::7f00:1", "64:ff9b:1::7f00:1", "2002:7f00:1::", "::127.0.0.1", "::ffff:0:7f00:1"]
)
def test_this_machine_in_disguise_is_ours(address: str) -> None:
    assert is_own(address)
    assert not may_connect(address, private=True)


def test_without_a_descriptor_no_address_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(socket, "socket", fail)
    with pytest.raises(OSError, match="too many open files"):
        may_connect("8.8.8.8", private=False)


def test_a_machine_without_ipv6_has_no_such_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> socket.socket:
        raise OSError(errno.EAFNOSUPPORT, "address family not supported")

    monkeypatch.setattr(socket, "socket", fail)
    assert not is_own("2606:4700::1111")


def test_families_take_turns() -> None:
    assert interleave(["1.1.1.1", "2.2.2.2", "a::1", "b::1", "c::1"]) == ["1.1.1.1", "a::1", "2.2.2.2", "b::1", "c::1"]
    assert interleave(["a::1", "1.1.1.1"]) == ["a::1", "1.1.1.1"]
    assert interleave(["1.1.1.1"]) == ["1.1.1.1"]
    assert interleave([]) == []
