"""The server name in a TLS client's first bytes."""

from __future__ import annotations

import ssl

import pytest
from hypothesis import given, strategies as st

from trio_sandbox.network._client_hello import LONGEST_HELLO, ClientHello, NotNamedError


def hello(name: str | None, *, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> bytes:
    """Return what OpenSSL sends first to a server of that name."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = newest
    out = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return out.read()


def in_records(data: bytes, size: int) -> bytes:
    """Return the handshake message of one TLS record in several, of *size* bytes each."""
    payload = data[5:]
    pieces = [payload[start : start + size] for start in range(0, len(payload), size)]
    return b"".join(data[:3] + len(piece).to_bytes(2, "big") + piece for piece in pieces)


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_the_name_is_found_however_it_comes(newest: ssl.TLSVersion) -> None:
    data = hello("Pypi.org", newest=newest)
    assert ClientHello().feed(data) == "pypi.org"
    for cut in range(len(data)):
        reader = ClientHello()
        assert reader.feed(data[:cut]) is None
        assert reader.feed(data[cut:]) == "pypi.org"
        assert reader.data == data
    assert ClientHello().feed(in_records(data, 50)) == "pypi.org"


def test_a_hello_without_a_name_says_so() -> None:
    with pytest.raises(NotNamedError, match="no server name"):
        ClientHello().feed(hello(None))


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\nHost: a.org\r\n\r\n", b"SSH-2.0-x\r\n", b"\x16\x03\x01" + bytes(100)]
)
def test_what_is_no_tls_says_so(data: bytes) -> None:
    with pytest.raises(NotNamedError, match="did not begin with a TLS hello"):
        ClientHello().feed(data)


def test_an_endless_hello_ends() -> None:
    reader = ClientHello()
    # A handshake message of 64 KiB that comes in records of one byte.
    start = b"\x16\x03\x01\x00\x04" + b"\x01\x00\xff\xff"
    with pytest.raises(NotNamedError):
        reader.feed(start)
        for _ in range(LONGEST_HELLO):
            reader.feed(b"\x16\x03\x01\x00\x01\x00")
    assert len(reader.data) <= LONGEST_HELLO + 10


def test_a_hello_that_is_too_long_ends_though_it_has_come_at_once() -> None:
    whole = with_server_names(listed(entry(b"a.org")))
    assert ClientHello().feed(whole) == "a.org"
    message = whole[5:]
    message = message[:4] + message[4:39] + b"\x80\0" + b"\x13\1" * 0x4000 + message[43:]  # with many cipher suites
    message = b"\1" + (len(message) - 4).to_bytes(3, "big") + message[4:]
    for size in (1, 16384):
        pieces = (message[start : start + size] for start in range(0, len(message), size))
        hello = b"".join(b"\x16\3\1" + len(piece).to_bytes(2, "big") + piece for piece in pieces)
        reader = ClientHello()
        with pytest.raises(NotNamedError, match="longer than"):
            reader.feed(hello)
        assert reader._position <= 2 * LONGEST_HELLO + 5


def read(data: bytes) -> tuple[str | None, str]:
    """Return the name in *data*, or why there is none."""
    try:
        return ClientHello().feed(data), ""
    except NotNamedError as exc:
        return None, str(exc)


@given(st.binary(max_size=2000))
def test_in_whatever_comes_there_is_no_name(data: bytes) -> None:
    name, reason = read(data)
    assert name is None
    assert reason.isprintable()


def read_by_openssl(data: bytes) -> str | None:
    """Return the server name that OpenSSL finds in a client's hello."""
    names: list[str | None] = []

    def note(_object: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> int:
        names.append(name)
        return ssl.ALERT_DESCRIPTION_HANDSHAKE_FAILURE

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = note
    incoming = ssl.MemoryBIO()
    server = context.wrap_bio(incoming, ssl.MemoryBIO(), server_side=True)
    incoming.write(data)
    with pytest.raises(ssl.SSLError):
        server.do_handshake()
    return names[0] if names else None


@given(st.data())
def test_a_damaged_hello_has_the_name_that_openssl_finds_or_a_reason(data: st.DataObject) -> None:
    changed = bytearray(hello("pypi.org"))
    for _ in range(data.draw(st.integers(1, 5))):
        # ASCII: of other names OpenSSL's users in Python hear nothing.
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 127))
    name, reason = read(bytes(changed))
    assert reason.isprintable()
    if name is not None:
        # It may refuse the rest of the hello before it looks for a name, but it finds no other.
        assert (read_by_openssl(bytes(changed)) or name).lower() == name


def with_server_names(*content: bytes) -> bytes:
    """Return a hello with extensions of the kind "server_name" only."""
    extensions = b"".join(b"\0\0" + len(each).to_bytes(2, "big") + each for each in content)
    body = b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0" + len(extensions).to_bytes(2, "big") + extensions
    message = b"\1" + len(body).to_bytes(3, "big") + body
    return b"\x16\3\1" + len(message).to_bytes(2, "big") + message


def entry(name: bytes, kind: int = 0) -> bytes:
    return bytes([kind]) + len(name).to_bytes(2, "big") + name


def listed(*entries: bytes) -> bytes:
    joined = b"".join(entries)
    return len(joined).to_bytes(2, "big") + joined


@pytest.mark.parametrize(
    "content",
    [
        [listed(entry(b"a.org"), entry(b"b.org"))],
        [listed(entry(b"a.org"), entry(b"a.org"))],
        [listed(entry(b"a.org")), listed(entry(b"b.org"))],
        [listed(entry(b"a.org", 1))],
        [listed(entry(b"a.org")) + b"x"],
        [listed(entry(b"127.0.0.1"))],
        [listed(entry(b"a.org\0"))],
        [listed(entry(b"a.org."))],
        [listed(entry("\N{LATIN SMALL LETTER E WITH ACUTE}.org".encode()))],
        [listed(entry(b""))],
        [listed()],
        [b""],
        [],
    ],
)
def test_what_leaves_any_doubt_about_the_name_is_refused(content: list[bytes]) -> None:
    name, reason = read(with_server_names(*content))
    assert name is None
    assert reason.isprintable()
    assert reason


def test_the_helpers_make_a_hello_that_is_read() -> None:
    assert read(with_server_names(listed(entry(b"A.org")))) == ("a.org", "")
