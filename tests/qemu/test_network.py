"""Real programs in a real guest, by name and through the host."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from trio_sandbox import Host, HostConfig, Network, NetworkRule, Sandbox, SandboxConfig, open_host
from trio_sandbox.image import BuiltImage

pytestmark = pytest.mark.qemu

ANSWER = b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello"
#: A server of the user's, on every address that there is.
WILDCARD_SERVER = """\
import http.server, threading
server = http.server.HTTPServer(("0.0.0.0", 8080), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=server.serve_forever, daemon=True).start()
"""


@pytest.fixture
async def host(python_image: BuiltImage) -> AsyncGenerator[Host]:
    async with open_host(HostConfig()) as host:
        yield host


async def greet(stream: trio.SocketStream) -> None:
    try:
        await stream.receive_some(1000)
        await stream.send_all(ANSWER)
    except trio.BrokenResourceError:
        return


async def echo(stream: trio.SocketStream) -> None:
    try:
        while data := await stream.receive_some(100_000):
            await stream.send_all(data)
        await stream.send_eof()
    except trio.BrokenResourceError:
        return


@asynccontextmanager
async def open_server(serve: Callable[[trio.SocketStream], Any]) -> AsyncGenerator[int]:
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await nursery.start(trio.serve_listeners, serve, [listener])
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel(reason="the test is over")


def web(port: int, name: str = "web.test", **more: Any) -> NetworkRule:
    return NetworkRule(name, to=("127.0.0.1", port), **more)


async def sh(sandbox: Sandbox, command: str, **more: Any) -> str:
    result = await sandbox.run_process(
        command, shell=True, capture_stdout=True, stderr_to_stdout=True, check=False, **more
    )
    return result.stdout.decode() + f"[{result.returncode}]"


CONNECT = """\
import errno, socket, sys, time
start = time.monotonic()
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20).close()
except OSError as exc:
    print(errno.errorcode.get(exc.errno, type(exc).__name__))
else:
    print("connected")
"""


async def connect(sandbox: Sandbox, host: str, port: int) -> str:
    result = await sandbox.run_process(["python3", "-c", CONNECT, host, str(port)], capture_stdout=True)
    return result.stdout.decode().strip()


async def test_unmodified_programs_reach_what_the_policy_names_and_nothing_else(host: Host) -> None:
    async with open_server(greet) as port, open_server(echo) as echo_port:
        policy = Network.allow(web(port, ports=(80, 8080)), web(echo_port, "echo.test", ports=None))
        async with host.open_sandbox(config=SandboxConfig(network=policy)) as sandbox:
            assert (
                await sh(sandbox, "curl -sS http://web.test/ http://web.test:8080/ http://WEB.test./")
                == "hellohellohello[0]"
            )
            assert (await sh(sandbox, "getent hosts web.test")).startswith("198.18.")
            assert await sh(sandbox, "cat /etc/resolv.conf") == "nameserver 198.18.0.2\n[0]"
            code = "import urllib.request; print(urllib.request.urlopen('http://web.test/').read())"
            assert (await sandbox.run(code)).stdout == "b'hello'\n"
            # Refused names fail at the lookup, refused ports and addresses at once when they are connected to.
            assert (await sh(sandbox, "curl -sS http://other.test/")).startswith("curl: (6)")
            assert await connect(sandbox, "web.test", 81) == "EHOSTUNREACH"
            assert await connect(sandbox, "1.2.3.4", 80) == "ENETUNREACH"
            assert await connect(sandbox, "::ffff:1.2.3.4", 80) == "ENETUNREACH"
            assert await connect(sandbox, "2606:4700::1111", 80) in ("ENETUNREACH", "EADDRNOTAVAIL")
            assert await connect(sandbox, "198.18.77.77", 80) == "EHOSTUNREACH"
            # A server of the user's own is not disturbed.
            assert (await sandbox.run(WILDCARD_SERVER)).exit_code == 0
            assert (await sh(sandbox, "curl -sS http://web.test:8080/")) == "hello[0]"
            assert "Directory listing" in await sh(sandbox, "curl -sS http://localhost:8080/")
            # Much data, both ways at once.
            code = """\
import socket, threading
with socket.create_connection(("echo.test", 7)) as sock:
    data = bytes(range(256)) * 4096 * 4
    threading.Thread(target=lambda: (sock.sendall(data), sock.shutdown(socket.SHUT_WR))).start()
    got = b"".join(iter(lambda: sock.recv(1 << 16), b""))
print(got == data)
"""
            assert (await sandbox.run(code)).stdout == "True\n"
            assert sandbox.network_statistics().open_connections == 0


async def test_connect_has_the_result_of_the_real_connection(host: Host) -> None:
    async with open_server(greet) as port:
        pass  # nobody listens there now
    begin, go_on = trio.Event(), trio.Event()

    async def slow() -> Any:
        begin.set()
        await go_on.wait()
        raise ConnectionRefusedError(111, "no")

    async def never() -> Any:
        await trio.sleep_forever()

    policy = Network.allow(
        web(port, "refused.test"), NetworkRule("slow.test", to=slow), NetworkRule("never.test", to=never)
    )
    async with host.open_sandbox(config=SandboxConfig(network=policy)) as sandbox:
        assert await connect(sandbox, "refused.test", 80) == "ECONNREFUSED"
        async with trio.open_nursery() as nursery:

            async def try_it() -> None:
                assert await connect(sandbox, "slow.test", 80) == "ECONNREFUSED"

            nursery.start_soon(try_it)
            await begin.wait()
            go_on.set()
        give_up = "import socket; socket.create_connection(('never.test', 80), timeout=0.3)"
        assert "timed out" in (await sandbox.run(give_up)).stderr
        with sandbox.watch_network() as events:
            # The next one is the attempt that the guest gave up, which its agent tells after a while, or was told before.
            assert await connect(sandbox, "refused.test", 80) == "ECONNREFUSED"
            assert (await anext(events)).host == "refused.test"


async def test_without_a_policy_there_is_no_network(host: Host) -> None:
    async with host.open_sandbox() as sandbox:
        assert (await sh(sandbox, "curl -sS http://example.com/")).startswith("curl: (6)")
        assert await connect(sandbox, "198.18.0.2", 53) == "ENETUNREACH"
        assert "198.18" not in await sh(sandbox, "cat /etc/resolv.conf /proc/net/fib_trie")
        async with open_server(greet) as port:
            async with sandbox.network(Network.allow(web(port))) as events:
                assert await sh(sandbox, "curl -sS http://web.test/") == "hello[0]"
                assert (await anext(events)).outcome == "closed"
        assert (await sh(sandbox, "curl -sS http://web.test/")).startswith("curl: (6)")
        assert await connect(sandbox, "198.18.0.2", 53) == "ENETUNREACH"
        assert "198.18" not in await sh(sandbox, "cat /etc/resolv.conf /proc/net/fib_trie")


KEEP = """\
import socket
sock = socket.create_connection(("echo.test", 7))
sock.sendall(b"x")
print(sock.recv(1))
"""
TRY = """\
try:
    sock.sendall(b"y"); print(sock.recv(1))
except OSError as exc:
    print(type(exc).__name__)
"""
AGAIN = KEEP + "sock.close()"


async def test_copies_and_moves_of_the_machine_break_connections_off_and_can_make_new_ones(host: Host) -> None:
    async with open_server(echo) as port:
        policy = Network.allow(web(port, "echo.test", ports=7))
        async with host.open_sandbox(config=SandboxConfig(network=policy)) as sandbox:
            assert (await sandbox.run(KEEP)).stdout == "b'x'\n"
            async with sandbox.fork(1) as (child,):
                assert (await child.run(TRY)).stdout == "ConnectionResetError\n"
                assert (await child.run(AGAIN)).stdout == "b'x'\n"
                assert (await sandbox.run(TRY)).stdout == "b'y'\n"
                assert child.network_statistics().connections == 1
            checkpoint = await sandbox.checkpoint()
            await sandbox.revert(checkpoint)
            assert (await sandbox.run(TRY)).stdout == "ConnectionResetError\n"
            assert (await sandbox.run(KEEP)).stdout == "b'x'\n"
            await sandbox.hibernate()
            await sandbox.resume()
            assert (await sandbox.run(TRY)).stdout == "ConnectionResetError\n"
            assert (await sandbox.run(AGAIN)).stdout == "b'x'\n"


async def test_hundreds_of_connections_leave_nothing(host: Host) -> None:
    code = """\
import os, socket, threading
def work():
    for _ in range(75):
        with socket.create_connection(("web.test", 80), timeout=60) as sock:
            sock.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
            assert b"hello" in b"".join(iter(lambda: sock.recv(4096), b"")), "no answer"
threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
print(len(os.listdir("/proc/self/fd")))
"""
    async with open_server(greet) as port:
        async with host.open_sandbox(config=SandboxConfig(network=Network.allow(web(port)))) as sandbox:
            result = await sandbox.run(code)
            assert result.stderr == ""
            numbers = sandbox.network_statistics()
            assert (numbers.connections, numbers.failed, numbers.refused) == (300, 0, 0)
            with trio.fail_after(30):
                while sandbox.network_statistics().open_connections:
                    await trio.sleep(0.05)
