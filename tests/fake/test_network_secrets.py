"""Secrets: a guest that the tests play, over TLS that ends in the gateway, and a server with a certificate of its own."""

from __future__ import annotations

import base64
import logging
import ssl
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from tests.fake.test_network_gateway import Site, open_network, open_server
from trio_sandbox import Network, NetworkRule
from trio_sandbox.network import Gateway, HostResolver, Trust, _http as http_module, read_trust
from trio_sandbox.network._authority import Authority
from trio_sandbox.wire import ChannelStream, StreamResetError

VALUE = "ghp_a-value-that-no-guest-ever-sees-0001"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@attrs.define
class Server:
    """What a server saw, and what it answers to each request."""

    answers: list[bytes]
    seen: bytes = b""
    connections: int = 0
    ended: trio.Event = attrs.field(factory=trio.Event)

    async def serve(self, stream: trio.abc.Stream) -> None:
        self.connections += 1
        answers = list(self.answers)
        begun = len(self.seen)
        try:
            while data := bytes(await stream.receive_some(100_000)):
                self.seen += data
                if answers and is_whole(self.seen[begun:]):
                    begun = len(self.seen)
                    await stream.send_all(answers.pop(0))
                    if not answers:
                        await stream.aclose()
                        return
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self.ended.set()


def is_whole(data: bytes) -> bool:
    """Tell whether *data* is a whole request of HTTP, as simple as a server can take one."""
    head, end, body = data.lower().partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head:
        return body.endswith(b"0\r\n\r\n")
    length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return bool(end) and len(body) >= int(length or b"0")


def make_rule(port: int, **more: Any) -> NetworkRule:
    return NetworkRule("api.test", to=("127.0.0.1", port), secrets={"TOKEN": VALUE}, **more)


@attrs.define
class Api:
    site: Site
    server: Server
    placeholder: bytes

    async def tls(
        self,
        host: str = "api.test",
        port: int = 443,
        name: str | None = None,
        protocols: Sequence[str] = ("h2", "http/1.1"),
    ) -> trio.SSLStream[ChannelStream]:
        stream = await self.site.connect(host, port)
        context = ssl.create_default_context(cadata=self.site.gateway.certificates)
        context.set_alpn_protocols(list(protocols))
        return trio.SSLStream(stream, context, server_hostname=name or host, https_compatible=True)

    async def ask(self, *requests: bytes, wait: bool = True) -> bytes:
        """Send each request over one connection, and return all that comes back."""
        stream = await self.tls()
        with trio.fail_after(10):
            await stream.do_handshake()
            assert stream.selected_alpn_protocol() == "http/1.1"
            await stream.send_all(b"".join(requests))
            received = b""
            try:
                while data := bytes(await stream.receive_some(100_000)):
                    received += data
            except trio.BrokenResourceError:
                received += b"[reset]"
            await trio.aclose_forcefully(stream)
            await trio.testing.wait_all_tasks_blocked()
        assert VALUE.encode() not in received
        return received


@asynccontextmanager
async def open_api(
    *answers: bytes,
    serve: Callable[[trio.abc.Stream], Any] | None = None,
    authority: Authority | None = None,
    trusted: Authority | None = None,
    more: tuple[NetworkRule, ...] = (),
) -> AsyncGenerator[Api]:
    authority = authority or Authority(["api.test"])
    server = Server(list(answers))
    context = authority.context(next(iter(authority.hosts)))

    async def serve_tls(stream: trio.SocketStream) -> None:
        tls = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        try:
            await (serve or server.serve)(tls)
        except trio.BrokenResourceError:
            server.ended.set()
        finally:
            await trio.aclose_forcefully(tls)

    async with open_server(serve_tls) as port:
        network = Network.allow(make_rule(port), *more)
        trust = Trust((trusted or authority).pem)
        async with open_network(network, trust=trust) as site:
            yield Api(site, server, site.gateway.environment["TOKEN"].encode())


def request(*lines: bytes, host: bytes = b"api.test", method: bytes = b"GET", body: bytes = b"") -> bytes:
    return b"\r\n".join([method + b" / HTTP/1.1", b"Host: " + host, *lines, b"", body])


async def test_the_server_gets_the_value_and_the_guest_has_the_placeholder() -> None:
    answer = b"HTTP/1.1 200 OK\r\nX-Echo: %b\r\nContent-Length: %d\r\nConnection: close\r\n\r\nyou are %b!"
    text = answer % (VALUE.encode(), len(VALUE) + 9, VALUE.encode())
    async with open_api(text) as api:
        basic = base64.b64encode(b"me:" + api.placeholder)
        received = await api.ask(
            request(
                b"Authorization: Bearer " + api.placeholder,
                b"X-Basic: Basic " + basic,
                b"Accept-Encoding: gzip, br",
                b"Connection: keep-alive, X-Hop",
                b"X-Hop: 1",
                b"Proxy-Authorization: Basic xyz",
                b"Upgrade: h2c",
                b"TE: trailers",
            )
        )
        seen = api.server.seen
        assert b"Authorization: Bearer " + VALUE.encode() in seen
        assert b"X-Basic: Basic " + base64.b64encode(b"me:" + VALUE.encode()) in seen
        assert b"Accept-Encoding: identity" in seen
        assert api.placeholder not in seen
        for stripped in (b"Connection", b"X-Hop", b"Proxy", b"Upgrade", b"TE:"):
            assert stripped not in seen
        assert received.count(api.placeholder) == 2
        assert b"you are " + api.placeholder + b"!" in received
        assert [event.outcome for event in api.site.events] == ["closed"]
        assert VALUE not in repr(api.site.events) + repr(api.site.gateway.network)


async def test_a_value_is_filtered_that_comes_in_pieces_and_encoded() -> None:
    async def serve(stream: trio.abc.Stream) -> None:
        head = bytes(await stream.receive_some(10_000))
        sent = head.partition(b"Basic ")[2].partition(b"\r\n")[0]
        await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for byte in VALUE.encode() + sent:
            await stream.send_all(b"1\r\n%c\r\n" % byte)
        await stream.send_all(b"0\r\nX-Trailer: " + VALUE.encode() + b"\r\n\r\n")
        await stream.aclose()

    async with open_api(serve=serve) as api:
        credentials = base64.b64encode(b"me:" + api.placeholder)
        received = await api.ask(request(b"Authorization: Basic " + credentials))
        assert base64.b64encode(b"me:" + VALUE.encode()) not in received
        body = b"".join(received.partition(b"\r\n\r\n")[2].split(b"\r\n")[1::2])
        assert body == api.placeholder + credentials
        assert b"X-Trailer" not in received


async def test_what_the_guest_sends_decides_nothing_about_how_the_answer_is_encoded() -> None:
    async with open_api(OK, OK) as api:
        # It has options of one connection called off; and an answer in parts, or in a form that hides the value, asked for.
        await api.ask(request(b"Connection: accept-encoding", b"Range: bytes=0-9", b'If-Range: "x"'), request())
        assert api.server.seen.count(b"\r\nAccept-Encoding: identity\r\n") == 2
        assert b"range" not in api.server.seen.lower()


@pytest.mark.parametrize("before", [b"", b"x", b"xy", b"me:"])
async def test_a_value_is_filtered_that_a_server_has_encoded(before: bytes) -> None:
    encoded = base64.b64encode(before + VALUE.encode() + b" and more")
    async with open_api(
        b"HTTP/1.1 200 OK\r\nX: %b\r\nContent-Length: %d\r\n\r\n%b" % (encoded, len(encoded), encoded)
    ) as api:
        received = await api.ask(request())
        for seen in (received.rpartition(b"\r\n")[2], received.partition(b"X: ")[2].partition(b"\r\n")[0]):
            assert len(seen) == len(encoded)
            assert VALUE[3:-3].encode() not in base64.b64decode(seen.replace(b"*", b"A"))


async def test_a_head_in_pieces_has_the_value_in_its_place() -> None:
    async with open_api(OK) as api:
        stream = await api.tls()
        for byte in request(b"Authorization: Bearer " + api.placeholder, b"Connection: close"):
            await stream.send_all(bytes([byte]))
        assert (await stream.receive_some(1000)).startswith(b"HTTP/1.1 200")
        await trio.aclose_forcefully(stream)
        assert b"Authorization: Bearer " + VALUE.encode() in api.server.seen


@pytest.mark.parametrize("cut", range(5))
async def test_lines_of_a_body_are_not_those_of_a_head(cut: int) -> None:
    body = b"line\n" * 1000
    sent = request(b"Content-Length: %d" % len(body), method=b"POST", body=body)
    end = sent.index(b"\r\n\r\n") + cut
    async with open_api(OK) as api:
        stream = await api.tls()
        await stream.send_all(sent[:end])
        await trio.testing.wait_all_tasks_blocked(0.01)
        await stream.send_all(sent[end:])
        assert (await stream.receive_some(1000)).startswith(b"HTTP/1.1 200")
        await trio.aclose_forcefully(stream)
        assert api.server.seen.endswith(body)


async def test_a_client_that_speaks_only_http_2_gets_no_other_than_1() -> None:
    async with open_api(OK) as api:
        stream = await api.tls(protocols=["h2"])
        await stream.do_handshake()
        assert stream.selected_alpn_protocol() is None
        await stream.send_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        assert b" 505 " in await stream.receive_some(1000)
        await trio.aclose_forcefully(stream)
        assert api.server.seen == b""


async def test_of_what_a_guest_sent_little_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with open_api(OK) as api:
        received = await api.ask(request(b"\xff" * 60_000))
        assert received.startswith(b"HTTP/1.1 400")
        assert max(len(received), len(api.site.events[0].error), len(caplog.text)) < 5000


async def test_placeholders_stay_in_what_is_no_header() -> None:
    async with open_api(OK) as api:
        await api.ask(
            b"POST /%b HTTP/1.1\r\nHost: api.test\r\nContent-Length: %d\r\n\r\n%b"
            % (api.placeholder, len(api.placeholder), api.placeholder)
        )
        assert api.server.seen.count(api.placeholder) == 2
        assert VALUE.encode() not in api.server.seen


async def test_requests_follow_each_other_with_bodies_of_all_kinds() -> None:
    answers = [
        OK,
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",  # to a HEAD
        b"HTTP/1.1 304 Not Modified\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nto the end",
    ]
    async with open_api(*answers) as api:
        stream = await api.tls()

        async def receive(end: bytes) -> bytes:
            data = b""
            with trio.fail_after(10):
                while not data.endswith(end):
                    data += bytes(await stream.receive_some(1000))
            return data

        await stream.send_all(request(b"Content-Length: 3", method=b"POST", body=b"abc"))
        assert (await receive(b"ok")).startswith(b"HTTP/1.1 200")
        await stream.send_all(request(b"Transfer-Encoding: chunked", method=b"PUT", body=b"1;x=y\r\na\r\n0\r\n\r\n"))
        assert (await receive(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
        await stream.send_all(request(method=b"HEAD"))
        assert b"Content-Length: 1000" in await receive(b"\r\n\r\n")
        await stream.send_all(request())
        assert (await receive(b"\r\n\r\n")).startswith(b"HTTP/1.1 304")
        await stream.send_all(request())
        assert b"to the end" in await receive(b"\r\n0\r\n\r\n")
        assert await stream.receive_some(10) == b""
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert api.server.connections == 1
        assert [event.outcome for event in api.site.events] == ["closed"]


async def test_expect_100_continue() -> None:
    async def serve(stream: trio.abc.Stream) -> None:
        assert b"100-continue" in bytes(await stream.receive_some(10_000))
        await stream.send_all(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
        assert bytes(await stream.receive_some(100)) == b"body"
        await stream.send_all(OK)
        await stream.aclose()

    async with open_api(serve=serve) as api:
        stream = await api.tls()
        await stream.send_all(request(b"Content-Length: 4", b"Expect: 100-continue", method=b"POST"))
        received = b""
        with trio.fail_after(10):
            while b" 100 " not in received:
                received += bytes(await stream.receive_some(1000))
            await stream.send_all(b"body")
            while not received.endswith(b"ok"):
                received += bytes(await stream.receive_some(1000))
        assert b" 103 " in received
        await trio.aclose_forcefully(stream)


async def test_an_answer_before_the_end_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "_LATE_BODY", 0.01)

    async def serve(stream: trio.abc.Stream) -> None:
        await stream.receive_some(10_000)
        await stream.send_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        await trio.sleep_forever()

    async with open_api(serve=serve) as api:
        received = await api.ask(request(b"Content-Length: 1000", method=b"POST", body=b"begins"))
        assert received.startswith(b"HTTP/1.1 413")
        assert "reset" not in received.decode()


@pytest.mark.parametrize(
    ("head", "status", "outcome"),
    [
        (request(host=b"other.test"), 421, "wrong server name"),
        (request(host=b"api.test:80"), 421, "wrong server name"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "failed"),
        (b"GET / HTTP/1.0\r\n\r\n", 400, "wrong server name"),
        (request(b"Host: api.test"), 400, "failed"),
        (b"GET http://api.test/ HTTP/1.1\r\nHost: api.test\r\n\r\n", 400, "wrong server name"),
        (b"CONNECT api.test:443 HTTP/1.1\r\nHost: api.test\r\n\r\n", 501, "failed"),
        (request(method=b"TRACE"), 501, "failed"),
        (request(b"Connection: Upgrade", b"Upgrade: websocket"), 501, "failed"),
        (request(b"Content-Length: 3", b"Content-Length: 4", method=b"POST", body=b"abcd"), 400, "failed"),
        (request(b"Transfer-Encoding: gzip, chunked", method=b"POST"), 501, "failed"),
        (request(b"Transfer-Encoding: chunked", b"Transfer-Encoding: x", method=b"POST"), 501, "failed"),
        (request(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 400, "failed"),
        (request(b"Bad Name: x"), 400, "failed"),
        (b" GET / HTTP/1.1\r\nHost: api.test\r\n\r\n", 400, "failed"),
        (b"GET / HTTP/9.9\r\nHost: api.test\r\n\r\n", 505, "failed"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "failed"),
        (request(*(b"X-%d: y" % number for number in range(300))), 431, "failed"),
        (request(b"X: y" + b"\r\n z" * 300), 431, "failed"),
        (b"GET / HTTP/1.1\r\nHost:\r\n api.test, other.test\r\n\r\n", 421, "wrong server name"),
        (b"GET //other.test/ HTTP/1.1\r\nHost: api.test#@other.test\r\n\r\n", 421, "wrong server name"),
        (b"GET api.test/ HTTP/1.1\r\nHost: api.test\r\n\r\n", 400, "wrong server name"),
        (request(b"Transfer-Encoding : chunked", method=b"POST"), 400, "failed"),
        (request(b"X: a\rb"), 400, "failed"),
        (request(b"X: a\0b"), 400, "failed"),
        (request(b"X: " + b"y" * 150_000), 431, "failed"),
        (b"\x16\x03\x01\x00\x00", 400, "failed"),
    ],
)
async def test_what_does_not_go_on(head: bytes, status: int, outcome: str) -> None:
    async with open_api(OK) as api:
        # The placeholder comes along, and must get nowhere.
        received = await api.ask(head)
        assert api.server.seen == b""
        assert received.startswith(b"HTTP/1.1 ")
        assert int(received.split()[1]) in (status, 400), received
        assert b"trio-sandbox: " in received
        assert api.site.events[0].outcome in (outcome, "failed")


async def test_the_second_request_of_a_connection_is_looked_at_as_well() -> None:
    async with open_api(OK, OK) as api:
        received = await api.ask(request(), request(b"X: y", host=b"other.test"))
        assert received.count(b"HTTP/1.1 ") == 2
        assert b"HTTP/1.1 421" in received
        assert b"other.test" not in api.server.seen
        assert [(event.outcome, event.bytes_sent > 0) for event in api.site.events] == [("wrong server name", True)]


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno header but " + VALUE.encode() + b"\r\n\r\n",
        b"HTTP/1.1 200 " + VALUE.encode() + b"\r\nContent-Length: " + VALUE.encode() + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 150_000,
    ],
)
async def test_answers_that_are_none(answer: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with open_api(answer) as api:
        received = await api.ask(request())
        assert received.startswith(b"HTTP/1.1 502")
        assert [event.outcome for event in api.site.events] == ["failed"]
        assert VALUE not in caplog.text + repr(api.site.events)


async def test_more_than_an_answer_is_no_answer_to_the_next_request() -> None:
    async with open_api(OK + OK) as api:
        received = await api.ask(request())
        assert received.count(b"HTTP/1.1 200") == 1


async def test_an_answer_that_is_cut_short_is_seen_as_such() -> None:
    async with open_api(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n...") as api:
        assert (await api.ask(request())).endswith(b"...[reset]")


@pytest.mark.parametrize(
    ("authority", "trusted"),
    [(Authority(["api.test"]), Authority(["api.test"])), (Authority(["other.test"]), None)],
    ids=["unknown", "other name"],
)
async def test_a_server_with_a_wrong_certificate_gets_nothing(authority: Authority, trusted: Authority | None) -> None:
    async with open_api(OK, authority=authority, trusted=trusted) as api:
        stream = await api.tls()
        with pytest.raises((trio.BrokenResourceError, StreamResetError)):
            await stream.send_all(request(b"Authorization: " + api.placeholder))
            await stream.receive_some(1)
        await trio.aclose_forcefully(stream)
        await api.server.ended.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert api.server.seen == b""
        assert api.site.events[0].outcome == "failed"
        assert "certificate" in api.site.events[0].error.lower()


async def test_a_hello_for_another_host_is_refused() -> None:
    async with open_api(OK) as api:
        stream = await api.tls(name="other.test")
        with pytest.raises(trio.BrokenResourceError):
            await stream.do_handshake()
        await trio.aclose_forcefully(stream)
        await trio.testing.wait_all_tasks_blocked()
        assert api.site.events[0].outcome == "wrong server name"


async def test_other_hosts_get_the_placeholder_as_it_is() -> None:
    other = Authority(["other.test"])
    plain = Server([OK])

    async def serve(stream: trio.SocketStream) -> None:
        tls = trio.SSLStream(stream, other.context("other.test"), server_side=True, https_compatible=True)
        await plain.serve(tls)

    async with open_server(serve) as port:
        rule = NetworkRule("other.test", to=("127.0.0.1", port))
        async with open_api(OK, more=(rule,)) as api:
            stream = trio.SSLStream(
                await api.site.connect("other.test", 443),
                ssl.create_default_context(cadata=other.pem),
                server_hostname="other.test",
                https_compatible=True,
            )
            await stream.send_all(request(b"Authorization: " + api.placeholder, host=b"other.test"))
            assert (await stream.receive_some(1000)).startswith(b"HTTP/1.1 200")
            await trio.aclose_forcefully(stream)
            assert api.placeholder in plain.seen
            # Another port of the host with secrets is no other host with secrets.
            assert await api.site.refusal("api.test", 80)


async def test_our_authority_vouches_for_the_hosts_of_the_policy_only() -> None:
    async with open_api(OK) as api:
        assert api.site.gateway.certificates.count("BEGIN CERTIFICATE") == 2
        names = set(api.site.gateway.environment) - {"TOKEN"}
        assert {"SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"} <= names


async def test_copies_keep_their_placeholders_and_their_authority() -> None:
    network = Network.allow(NetworkRule("api.test", secrets={"TOKEN": VALUE}))
    gateway = Gateway(network, HostResolver(), connect_timeout=1)
    copy = gateway.copy()
    assert copy.environment == gateway.environment
    assert copy.certificates == gateway.certificates
    other = Gateway(network, HostResolver(), connect_timeout=1)
    assert other.environment["TOKEN"] != gateway.environment["TOKEN"]
    assert other.certificates != gateway.certificates
    with gateway.layer(Network.none()):
        assert (gateway.environment, gateway.certificates) == ({}, "")
    with gateway.layer(Network.allow("example.org")):
        assert (gateway.environment, gateway.certificates) == ({}, "")


async def test_a_policy_without_secrets_costs_nothing() -> None:
    gateway = Gateway(Network.allow("example.org"), HostResolver(), connect_timeout=1)
    assert gateway.environment == {}
    assert gateway.certificates == ""
    company = Authority(["corp.test"]).pem
    gateway = Gateway(Network.allow("example.org"), HostResolver(), connect_timeout=1, trust=Trust(company))
    assert gateway.certificates == company
    assert "SSL_CERT_FILE" in gateway.environment
    assert Gateway(Network.none(), HostResolver(), connect_timeout=1, trust=Trust(company)).environment == {}


def test_the_missing_extra_is_named_before_anything_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography.x509", None)
    network = Network.allow(NetworkRule("api.test", secrets={"TOKEN": VALUE}))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'trio-sandbox\[network\]'"):
        Gateway(network, HostResolver(), connect_timeout=1)


def test_certificates_of_a_company(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    pem = Authority(["corp.test"]).pem
    file.write_text(f"our company\n{pem}\nanother line\n")
    assert read_trust(file).certificates == pem
    assert read_trust(None).certificates == ""
    for text in ("", "no certificates", pem * 100):
        file.write_text(text)
        with pytest.raises(ValueError, match="ca_certificates"):
            read_trust(file)
    with pytest.raises(FileNotFoundError):
        read_trust(tmp_path / "nothing")


async def test_cancelled_anywhere_nothing_is_left() -> None:
    """The policy ends while a connection is at each of its steps."""
    for steps in range(0, 60, 3):
        async with open_api(OK, OK) as api:
            network = api.site.gateway.network
            scope = trio.CancelScope()

            async def talk(api: Api = api, scope: trio.CancelScope = scope) -> None:
                with scope:
                    try:
                        stream = await api.tls()
                        await stream.send_all(request(b"Authorization: " + api.placeholder))
                        await stream.receive_some(1000)
                        await trio.sleep_forever()
                    except (trio.BrokenResourceError, OSError):
                        return

            async with trio.open_nursery() as nursery:
                with api.site.gateway.layer(network):
                    nursery.start_soon(talk)
                    for _ in range(steps):
                        await trio.lowlevel.checkpoint()
                scope.cancel()
            with trio.fail_after(5):
                while api.site.gateway.statistics().open_connections:
                    await trio.sleep(0.001)
            assert api.site.gateway.statistics().open_connections == 0
