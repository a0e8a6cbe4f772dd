"""What can be asked of a sandbox only if there is a virtual machine, and of its host: each can be cancelled anywhere."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Mapping

import attrs
import trio

from tests._operations import OPERATIONS, Operation
from tests._stage import Stage
from trio_sandbox import Host, HostConfig, Network, NetworkRule, Sandbox, SandboxConfig, open_host


def _host(stage: Stage) -> Host:
    assert stage.host is not None
    return stage.host


def _config(stage: Stage) -> HostConfig:
    return attrs.evolve(_host(stage)._config)  # pyright: ignore[reportPrivateUsage]


async def _has_state(sandbox: Sandbox) -> None:
    assert (await sandbox.run("print(x)")).stdout == "12345\n"


# --- Runs ---


async def _run(stage: Stage) -> None:
    assert (await stage.sandbox.run("print(sum(range(1000)))")).stdout == "499500\n"


async def _run_with_input(stage: Stage) -> None:
    result = await stage.sandbox.run("print(len(input()))", stdin=b"a" * 200_000 + b"\n")
    assert result.stdout == "200000\n"


async def _long_run(stage: Stage) -> None:
    result = await stage.sandbox.run(f"#{'x' * 60_000}\nprint('z' * 500_000)")
    assert len(result.stdout) == 500_001


async def _stream(stage: Stage) -> None:
    async with stage.sandbox.stream("for i in range(5): print(input(), flush=True)", stdin=True) as events:
        assert events.stdin is not None
        await events.stdin.send_all(b"1\n2\n3\n4\n5\n")
        async for _ in events:
            pass


async def _functions(stage: Stage) -> None:
    async def double(number: int) -> int:
        await trio.lowlevel.checkpoint()
        return number * 2

    result = await stage.sandbox.run("print(double(4) + double(5))", functions={"double": double})
    assert result.stdout == "18\n"


# --- The sandbox's life ---


async def _checkpoint(stage: Stage) -> None:
    (await stage.sandbox.checkpoint()).discard()


async def _revert(stage: Stage) -> None:
    checkpoint = await stage.sandbox.checkpoint()
    try:
        await stage.sandbox.revert(checkpoint)
        await _has_state(stage.sandbox)
    finally:
        checkpoint.discard()


async def _transaction(stage: Stage) -> None:
    async with stage.sandbox.transaction():
        await stage.sandbox.run("y = 1")


async def _transaction_undone(stage: Stage) -> None:
    try:
        async with stage.sandbox.transaction():
            await stage.sandbox.run(f"x = 'lost'; open('{stage.there}/new/file', 'w').close()")
            raise KeyError
    except KeyError:
        await _has_state(stage.sandbox)


async def _fork(stage: Stage) -> None:
    async with stage.sandbox.fork(2) as children:
        for child in children:
            await _has_state(child)


async def _sleep(stage: Stage) -> None:
    await stage.sandbox.hibernate()
    await stage.sandbox.resume()


async def _save(stage: Stage) -> None:
    await stage.sandbox.save("cancelled", replace=True)


async def _network(stage: Stage) -> None:
    async def refuse() -> trio.abc.HalfCloseableStream:
        await trio.lowlevel.checkpoint()
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")

    code = "import socket\ntry: socket.create_connection(('echo.test', 80))\nexcept OSError as exc: print(exc.errno)"
    async with stage.sandbox.network(Network.allow(NetworkRule("echo.test", to=refuse))):
        assert (await stage.sandbox.run(code)).stdout == "111\n"
    assert (await stage.sandbox.run(code)).stdout != "111\n"


# --- The host ---


async def _open_sandbox(stage: Stage) -> None:
    async with _host(stage).open_sandbox() as sandbox:
        assert (await sandbox.run("print(1)")).stdout == "1\n"


async def _open_with_mounts(stage: Stage) -> None:
    config = SandboxConfig(mounts={"/data": stage.tree})
    async with _host(stage).open_sandbox(config=config) as sandbox:
        assert (await sandbox.run("import os; print(len(os.listdir('/data')))")).stdout == "3\n"


async def _make_template(stage: Stage) -> None:
    config = SandboxConfig(warmup=f"x = 12345  # {secrets.token_hex(4)}")
    async with _host(stage).open_sandbox(config=config) as sandbox:
        await _has_state(sandbox)


async def _open_saved(stage: Stage) -> None:
    await stage.sandbox.save("opened", replace=True)
    async with _host(stage).open_sandbox(template="opened") as sandbox:
        await _has_state(sandbox)


async def _open_host(stage: Stage) -> None:
    async with open_host(_config(stage)) as host, host.open_sandbox() as sandbox:
        assert (await sandbox.run("print(1)")).stdout == "1\n"


async def _open_warm_host(stage: Stage) -> None:
    async with open_host(attrs.evolve(_config(stage), warm={"python": 1})) as host, host.open_sandbox() as sandbox:
        assert (await sandbox.run("print(1)")).stdout == "1\n"


def _undone(made: object, kept: object) -> bool:
    return made == {}


#: All of them. Those with a server in the guest are left out: a sandbox with a thread in the background does not sleep.
MACHINE_OPERATIONS: Mapping[str, Operation] = {
    **{name: operation for name, operation in OPERATIONS.items() if name not in ("connection", "forwarding")},
    "run": Operation(_run),
    "run with input": Operation(_run_with_input),
    "long run": Operation(_long_run),
    "stream": Operation(_stream),
    "run with functions": Operation(_functions),
    "checkpoint": Operation(_checkpoint),
    "revert": Operation(_revert),
    "transaction": Operation(_transaction),
    "transaction that is undone": Operation(_transaction_undone, _undone),
    "fork": Operation(_fork),
    "sleep": Operation(_sleep),
    "save": Operation(_save),
    "network for a block": Operation(_network),
    "open a sandbox": Operation(_open_sandbox),
    "open one with mounts": Operation(_open_with_mounts),
    "make a template": Operation(_make_template),
    "save and open that": Operation(_open_saved),
    "open a host": Operation(_open_host),
    "open a host with a warm pool": Operation(_open_warm_host),
}
#: Those that need a server in the guest.
TUNNEL_OPERATIONS: Mapping[str, Operation] = {name: OPERATIONS[name] for name in ("connection", "forwarding")}
