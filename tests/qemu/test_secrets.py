"""Real programs that use secrets which their machine does not have."""

from __future__ import annotations

import base64
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from tests.qemu.test_network import sh
from trio_sandbox import Host, HostConfig, Network, NetworkRule, Sandbox, SandboxConfig, open_host
from trio_sandbox.image import BuiltImage
from trio_sandbox.network._authority import Authority

pytestmark = pytest.mark.qemu

VALUE = "ghp_a-value-that-no-guest-ever-sees-0002"
PLACES = "/etc/ssl/certs/ca-certificates.crt"


@attrs.define
class Api:
    """A server that echoes heads of requests."""

    port: int
    authority: Authority
    heads: list[bytes] = attrs.field(factory=list[bytes])

    def policy(self) -> Network:
        return Network.allow(
            NetworkRule("api.test", to=("127.0.0.1", self.port), secrets={"TOKEN": VALUE}),
            NetworkRule("other.test", to=("127.0.0.1", self.port)),
        )


@asynccontextmanager
async def open_api(tmp_path: Path) -> AsyncGenerator[tuple[Api, Host]]:
    authority = Authority(["api.test", "other.test"])
    file = tmp_path / "ca.pem"
    file.write_text(authority.pem)
    context = authority.context("api.test")
    context.sni_callback = lambda tls, name, _: setattr(tls, "context", authority.context(str(name)))

    async def serve(stream: trio.SocketStream) -> None:
        tls = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        try:
            while True:
                head = b""
                while b"\r\n\r\n" not in head:
                    data = await tls.receive_some(10_000)
                    if not data:
                        return
                    head += data
                api.heads.append(head)
                answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % len(head)
                await tls.send_all(answer + head)
        except trio.BrokenResourceError:
            return
        finally:
            await trio.aclose_forcefully(tls)

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await nursery.start(trio.serve_listeners, serve, [listener])
        api = Api(listener.socket.getsockname()[1], authority)
        async with open_host(HostConfig(ca_certificates=file)) as host:
            yield api, host
        nursery.cancel_scope.cancel(reason="the test is over")


URLLIB = """\
import os, urllib.request
request = urllib.request.Request("https://api.test/", headers={"Authorization": "Bearer " + os.environ["TOKEN"]})
print(urllib.request.urlopen(request).read().decode())
"""


REQUESTS = """\
import os, requests
print(requests.get("https://api.test/", headers={"Authorization": "Bearer " + os.environ["TOKEN"]}).text)
"""

FETCH = """\
const answer = await fetch("https://api.test/", {headers: {Authorization: "Bearer " + process.env.TOKEN}});
console.log(await answer.text());
"""


async def curl(sandbox: Sandbox, host: str = "api.test") -> str:
    return await sh(sandbox, f'curl -sS -H "Authorization: Bearer $TOKEN" https://{host}/')


async def test_programs_use_a_secret_that_the_machine_does_not_have(python_image: BuiltImage, tmp_path: Path) -> None:
    async with open_api(tmp_path) as (api, host):
        async with host.open_sandbox(config=SandboxConfig(network=api.policy())) as sandbox:
            placeholder = (await sandbox.environment())["TOKEN"]
            sent = f"Bearer {VALUE}".encode()

            async def check(output: str) -> None:
                assert sent in api.heads.pop(), output
                assert not api.heads
                # The server echoes it, and the placeholder comes back.
                assert placeholder in output
                assert VALUE not in output

            await check(await curl(sandbox))
            await check((await sandbox.run(URLLIB)).stdout)
            await check((await sandbox.run_process(["python3", "-c", URLLIB], capture_stdout=True)).stdout.decode())
            await check((await sandbox.run(REQUESTS)).stdout)
            await sh(sandbox, "git ls-remote https://api.test/x.git")
            assert b"GET /x.git/info/refs" in api.heads.pop()
            # Credentials of the basic kind.
            await sh(sandbox, 'curl -sS -u "me:$TOKEN" https://api.test/')
            assert base64.b64encode(f"me:{VALUE}".encode()) in api.heads.pop()
            # Another host gets the placeholder.
            assert placeholder in await curl(sandbox, "other.test")
            assert placeholder.encode() in api.heads.pop()
            # Nothing of it is in the guest, or in what is saved of it.
            everywhere = await sh(
                sandbox, f"env; cat /proc/[0-9]*/environ | tr '\\0' '\\n'; grep -c CERTIFICATE {PLACES}", user=0
            )
            assert placeholder in everywhere
            assert VALUE not in everywhere
            # What a program has in its own environment, it has in place of the default one.
            assert placeholder not in await sh(sandbox, "/usr/bin/env", env={"PATH": "/usr/bin"})
            assert "mine" in (await sandbox.run("import os; print(os.environ['TOKEN'])", env={"TOKEN": "mine"})).stdout

            # Copies go on with it.
            async with sandbox.fork(1) as (child,):
                assert (await child.environment())["TOKEN"] == placeholder
                await check(await curl(child))
            checkpoint = await sandbox.checkpoint()
            files = [path for path in host._runtime.directory.rglob("*") if path.is_file()]  # pyright: ignore[reportPrivateUsage]
            assert any(path.stat().st_size > 2**20 for path in files)
            for path in files:
                assert VALUE.encode() not in path.read_bytes(), path
            await sandbox.revert(checkpoint)
            await check(await curl(sandbox))
            await sandbox.hibernate()
            await sandbox.resume()
            await check((await sandbox.run(URLLIB)).stdout)


async def test_certificates_and_variables_are_there_for_the_policy_only(
    python_image: BuiltImage, tmp_path: Path
) -> None:
    look = f"cat {PLACES} | sha256sum; env | grep -E 'TOKEN|BUNDLE|CERT'; ls /run/trio-sandbox/*.pem 2>&1"
    async with open_api(tmp_path) as (api, host), host.open_sandbox() as sandbox:
        before = await sh(sandbox, look)
        assert "TOKEN" not in before
        without = await sandbox.checkpoint()
        async with sandbox.network(api.policy()):
            assert VALUE not in await curl(sandbox)
            inside = await sh(sandbox, look)
            assert "TOKEN=" in inside
            assert inside.split()[0] != before.split()[0]
            # The machine that goes on from before the block has them as well.
            await sandbox.revert(without)
            assert await sh(sandbox, look) == inside
            assert VALUE not in await curl(sandbox)
            within = await sandbox.checkpoint()
            assert api.heads.count(api.heads[0]) == 2
        assert await sh(sandbox, look) == before
        # And the one that goes on from within the block has not.
        await sandbox.revert(within)
        assert await sh(sandbox, look) == before
        async with sandbox.network(Network.allow(NetworkRule("other.test", to=("127.0.0.1", api.port)))):
            # A company's certificates come with any network.
            assert "TOKEN" not in await sh(sandbox, look)
            assert (await sh(sandbox, "curl -sS https://other.test/")).startswith("GET / HTTP/1.1")


async def test_node_uses_a_secret(node_image: BuiltImage, tmp_path: Path) -> None:
    async with open_api(tmp_path) as (api, host):
        async with host.open_sandbox("node", config=SandboxConfig(network=api.policy())) as sandbox:
            placeholder = (await sandbox.environment())["TOKEN"]
            inside = (await sandbox.run(FETCH)).stdout
            process = await sandbox.run_process(["node", "--input-type=module", "-e", FETCH], capture_stdout=True)
            for output in (inside, process.stdout.decode()):
                assert f"Bearer {VALUE}".encode() in api.heads.pop(), output
                assert placeholder in output
                assert VALUE not in output


async def test_without_the_extra_nothing_is_started(monkeypatch: pytest.MonkeyPatch, python_image: BuiltImage) -> None:
    monkeypatch.setitem(sys.modules, "h11", None)
    policy = Network.allow(NetworkRule("api.test", secrets={"TOKEN": VALUE}))
    async with open_host() as host:
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'trio-sandbox\[network\]'"):
            async with host.open_sandbox(config=SandboxConfig(network=policy)):
                pytest.fail("it was opened")
        assert host.statistics().sandboxes_opened == 0
        async with host.open_sandbox() as sandbox:
            with pytest.raises(ModuleNotFoundError):
                async with sandbox.network(policy):
                    pytest.fail("it is in force")
            assert "TOKEN" not in await sandbox.environment()
            assert (await sandbox.run("1 + 1")).value == "2"


async def test_a_host_with_a_wrong_certificate_gets_nothing(python_image: BuiltImage, tmp_path: Path) -> None:
    async with open_api(tmp_path) as (api, _), open_host() as stranger:
        async with stranger.open_sandbox(config=SandboxConfig(network=api.policy())) as sandbox:
            with sandbox.watch_network() as events:
                output = await curl(sandbox)
                event = await anext(events)
            assert not output.endswith("[0]")
            assert event.outcome == "failed"
            assert "certificate" in event.error
            assert api.heads == []
