"""The network of a machine that is saved, and of those that go on from there: as each one's own policy says."""

from __future__ import annotations

import contextlib
import os

import pytest

from tests.qemu.test_network import connect, greet, host, open_server, sh, web
from trio_sandbox import Host, Network, Sandbox, SandboxConfig, UnknownTemplateError
from trio_sandbox.image import default_cache_directory
from trio_sandbox.machines._named import NamedTemplateStore

pytestmark = pytest.mark.qemu
__all__ = ["host"]


async def look(sandbox: Sandbox) -> tuple[str, str, str]:
    """Return what there is of a network: an answer by name, what a connection comes to, and the resolver."""
    return (
        await sh(sandbox, "curl -sS http://web.test/ 2>/dev/null"),
        await connect(sandbox, "198.18.0.2", 53),
        await sh(sandbox, "cat /etc/resolv.conf"),
    )


ONLINE = ("hello[0]", "connected", "nameserver 198.18.0.2\n[0]")


async def test_machines_that_go_on_from_a_saved_one_have_the_network_of_their_own_policy(host: Host) -> None:
    names = [f"test-network-{os.getpid()}-{number}" for number in range(2)]
    try:
        async with open_server(greet) as port:
            online = SandboxConfig(network=Network.allow(web(port)))
            async with host.open_sandbox() as sandbox:
                offline = await look(sandbox)
                assert offline[:2] == ("[6]", "ENETUNREACH")
                await sandbox.save(names[0])
            async with host.open_sandbox(config=online) as sandbox:
                assert await look(sandbox) == ONLINE
                await sandbox.save(names[1])
            for name in names:
                async with host.open_sandbox(template=name) as sandbox:
                    assert await look(sandbox) == offline
                async with host.open_sandbox(template=name, network=online.network) as sandbox:
                    assert await look(sandbox) == ONLINE
                    async with sandbox.network(Network.none()):
                        assert await look(sandbox) == offline
                        async with sandbox.fork(1) as (copy,):
                            assert await look(copy) == offline
                        checkpoint = await sandbox.checkpoint()
                    # It goes on with the policy that is in force then, not with that of when it was kept.
                    await sandbox.revert(checkpoint)
                    assert await look(sandbox) == ONLINE
    finally:
        store = NamedTemplateStore(default_cache_directory())
        for name in names:
            with contextlib.suppress(UnknownTemplateError):
                store.remove(name)
