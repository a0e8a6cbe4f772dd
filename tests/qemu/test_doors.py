"""`trio_sandbox.blocking` and `trio_sandbox.aio` with real machines: what a sandbox without one has not."""

from __future__ import annotations

import asyncio
import urllib.request

import pytest

from trio_sandbox import Network, SandboxClosedError, aio, blocking

pytestmark = pytest.mark.qemu

SERVER = ["python3", "-m", "http.server", "8000", "--bind", "127.0.0.1", "--directory", "/tmp"]


def test_the_life_of_a_sandbox_by_the_blocking_door() -> None:
    with blocking.open_host() as host:
        with host.open_sandbox("python") as sandbox:
            sandbox.run("x = 1")
            checkpoint = sandbox.checkpoint()
            with pytest.raises(ValueError, match="not like this"):
                with sandbox.transaction():
                    sandbox.run("x = 2")
                    raise ValueError("not like this")
            assert sandbox.run("x").value == "1"
            with sandbox.fork(2) as (left, right):
                left.run("x = 3")
                assert (left.run("x").value, right.run("x").value) == ("3", "1")
            with pytest.raises(SandboxClosedError):
                left.run("x")
            sandbox.revert(checkpoint)
            checkpoint.discard()
            assert checkpoint.discarded
            sandbox.hibernate()
            assert sandbox.statistics().hibernated
            sandbox.resume()
            with sandbox.open_process(SERVER), sandbox.forward_port(8000) as port:
                sandbox.wait_port(8000)
                sandbox.path("/tmp/a.txt").write_text("served")
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/a.txt") as answer:
                    assert answer.read() == b"served"
                with sandbox.open_tcp_stream(8000) as connection:
                    connection.send_all(b"GET /a.txt HTTP/1.0\r\n\r\n")
                    assert b"".join(connection).endswith(b"served")
            with sandbox.network(Network.allow("example.com")) as watch:
                sandbox.run("import socket\ntry: socket.create_connection(('example.org', 80))\nexcept OSError: pass")
                assert next(watch).host == "example.org"
            assert sandbox.usage().cpu_seconds > 0
        assert host.statistics().sandboxes_opened == 3
        assert host.run("print(6 * 7)").stdout == "42\n"


def test_the_life_of_a_sandbox_by_the_door_of_asyncio() -> None:
    async def main() -> None:
        async with aio.open_host() as host, host.open_sandbox("python") as sandbox:
            await sandbox.run("x = 1")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5), sandbox.transaction():
                    await sandbox.run("x = 2\nwhile True: pass")
            assert (await sandbox.run("x")).value == "1"
            async with sandbox.fork(2) as children:
                results = await asyncio.gather(*(child.run("x") for child in children))
                assert [result.value for result in results] == ["1", "1"]
            async with sandbox.open_process(SERVER), sandbox.forward_port(8000) as port:
                await sandbox.wait_port(8000)
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET / HTTP/1.0\r\n\r\n")
                assert (await reader.read()).startswith(b"HTTP/1.0 200")
                writer.close()
                await writer.wait_closed()

    asyncio.run(main())
