"""Programs that know nothing of sandboxes, by name: git, node, resolvers of all kinds; installers are in `test_network_installers`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.qemu.test_network import echo, greet, host, open_server, sh, web
from trio_sandbox import Host, Network, NetworkRule, SandboxConfig
from trio_sandbox.image import BuiltImage

pytestmark = pytest.mark.qemu
__all__ = ["host"]


@asynccontextmanager
async def open_file_server(directory: Path) -> AsyncGenerator[int]:
    """Serve the files below *directory* over HTTP; yield the port."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(directory)]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            line += await process.stdout.receive_some()
        yield int(line.split(b" port ")[1].split()[0])
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        assert process.stdout is not None
        await process.stdout.aclose()


def make_repository(directory: Path) -> None:
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    for name in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{name}_NAME": "somebody", f"GIT_{name}_EMAIL": "somebody@example.org"}
    work = directory / "work"
    for command in (
        ["git", "init", "-q", str(work)],
        ["git", "-C", str(work), "commit", "-q", "--allow-empty", "-m", "cloned by name"],
        ["git", "clone", "-q", "--bare", str(work), str(directory / "project.git")],
        ["git", "-C", str(directory / "project.git"), "update-server-info"],
    ):
        subprocess.run(command, check=True, env=environment)


async def test_git_over_http(host: Host, tmp_path: Path) -> None:
    make_repository(tmp_path)
    async with open_file_server(tmp_path) as port:
        async with host.open_sandbox(config=SandboxConfig(network=Network.allow(web(port, "files.test")))) as sandbox:
            clone = "git clone -q http://files.test/project.git /tmp/project && git -C /tmp/project log -1 --format=%s"
            assert (await sh(sandbox, clone)).endswith("cloned by name\n[0]")
            refused = await sh(sandbox, "git clone -q https://elsewhere.test/project.git /tmp/other")
            assert "Could not resolve host: elsewhere.test" in refused


NODE = """\
import dns from "node:dns/promises"
const tell = (what) => console.log(JSON.stringify(what))
tell(await (await fetch("http://web.test/")).text())
tell((await dns.resolve4("web.test")).every((address) => address.startsWith("198.18.")))
tell(await dns.resolve6("web.test").catch((error) => error.code))
tell((await dns.lookup("web.test")).family)
tell(await dns.resolve4("other.test").catch((error) => error.code))
tell(await fetch("http://other.test/").catch((error) => error.cause.code))
"""


async def test_node_by_its_two_resolvers(host: Host, node_image: BuiltImage) -> None:
    del node_image
    async with open_server(greet) as port:
        config = SandboxConfig(network=Network.allow(web(port)))
        async with host.open_sandbox("node", config) as sandbox:
            result = await sandbox.run_process(
                ["node", "--input-type=module", "-e", NODE], capture_stdout=True, capture_stderr=True, check=False
            )
            lines = result.stdout.decode().split("\n")
            assert lines == ['"hello"', "true", '"ENODATA"', "4", '"ENOTFOUND"', '"ENOTFOUND"', ""], result.stderr


BOTH_WAYS = """\
import hashlib, socket, threading
piece = bytes(range(256)) * 4096
sent, got = hashlib.sha256(), hashlib.sha256()
with socket.create_connection(("echo.test", 7)) as sock:
    def send():
        for _ in range(64):
            sent.update(piece)
            sock.sendall(piece)
        sock.shutdown(socket.SHUT_WR)
    thread = threading.Thread(target=send)
    thread.start()
    size = 0
    while data := sock.recv(1 << 17):
        got.update(data)
        size += len(data)
    thread.join()
print(size >> 20, sent.digest() == got.digest())
"""


async def test_much_both_ways_at_once_and_a_resolver_of_any_kind(host: Host) -> None:
    async with open_server(echo) as port:
        policy = Network.allow(NetworkRule("echo.test", port=7, to=("127.0.0.1", port)))
        async with host.open_sandbox(config=SandboxConfig(network=policy, vcpus=2)) as sandbox:
            assert (await sandbox.run(BOTH_WAYS)).stdout == "64 True\n"
            numbers = sandbox.network_statistics()
            assert numbers.bytes_sent == numbers.bytes_received == 64 << 20
            for command in ("getent hosts echo.test", "getent ahosts echo.test", "getent ahostsv4 echo.test"):
                assert (await sh(sandbox, command)).startswith("198.18.")
            assert (await sh(sandbox, "getent ahostsv6 other.test; getent hosts other.test")) == "[2]"
