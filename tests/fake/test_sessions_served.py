"""Sessions behind a web server, and by the doors for asyncio and for threads. Guests are scripts."""

from __future__ import annotations

import asyncio
import json
import runpy
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from functools import partial
from typing import Any, cast

import httpcore
import pytest
import trio
from hypercorn.config import Config
from hypercorn.trio import serve  # pyright: ignore[reportUnknownVariableType] - its type has parts without one

from tests._leaks import HANG_LIMIT, wait_until
from tests.documented import ROOT
from tests.fake._fleet import open_fake_fleet
from trio_sandbox import Host, Sandbox, SandboxConfig, VmDiedError, aio, blocking
from trio_sandbox.aio._door import open_root as open_aio
from trio_sandbox.blocking._door import open_root as open_blocking
from trio_sandbox.sessions import Sessions, SessionsConfig, open_sessions
from trio_sandbox.testing import Answer, Call, open_scripted_sandbox


async def remember(call: Call) -> Answer:
    """Remember the code, unless it is to do something else, and print what was remembered before."""
    await trio.lowlevel.checkpoint()
    match call.code:
        case "wait":
            await trio.sleep_forever()
        case "die":
            raise VmDiedError("killed")
        case _:
            pass
    before, call.state["text"] = call.state.get("text", ""), call.code
    return Answer(stdout=before)


class ScriptedHost:
    """A host that opens scripted sandboxes."""

    def __init__(self) -> None:
        self.open = self.opened = 0

    @asynccontextmanager
    async def open_sandbox(
        self, image: object = "python", config: SandboxConfig | None = None, **_fields: object
    ) -> AsyncGenerator[Sandbox]:
        assert image == "python"
        self.opened += 1
        async with open_scripted_sandbox(remember, config=config) as sandbox:
            self.open += 1
            try:
                yield sandbox
            finally:
                self.open -= 1


@asynccontextmanager
async def open_scripted_host(hosts: list[ScriptedHost]) -> AsyncGenerator[ScriptedHost]:
    await trio.lowlevel.checkpoint()
    hosts.append(ScriptedHost())
    yield hosts[-1]


# --- A web server ---


class Client:
    """A client of the example's service."""

    def __init__(self, pool: httpcore.AsyncConnectionPool, address: str) -> None:
        self._pool, self._address = pool, address

    async def ask(self, user: str, code: str, method: str = "POST") -> dict[str, Any]:
        """Return what the response says, and its status."""
        response = await self._pool.request(method, f"{self._address}/run/{user}", content=code.encode())
        said: dict[str, Any] = json.loads(response.content) if response.status in (200, 503) else {}
        return {"status": response.status, **said}


@asynccontextmanager
async def open_service(sessions: Sessions, names: dict[str, Any]) -> AsyncGenerator[Client]:
    """Serve the example's application with a real server on a real socket."""
    config = Config()
    config.bind = ["127.0.0.1:0"]
    async with trio.open_nursery() as nursery, httpcore.AsyncConnectionPool() as pool:
        (address,) = await nursery.start(serve, names["make_app"](sessions), config)  # pyright: ignore[reportUnknownArgumentType] - as above
        yield Client(pool, address)
        nursery.cancel_scope.cancel(reason="the test is over")


@pytest.fixture
def example() -> dict[str, Any]:
    """The names of the cookbook's example."""
    return runpy.run_path(str(ROOT / "docs" / "examples" / "web_sessions.py"))


async def test_requests_of_a_user_are_in_different_tasks_and_find_the_same_sandbox(example: dict[str, Any]) -> None:
    host = ScriptedHost()
    async with open_sessions(host) as sessions, open_service(sessions, example) as client:
        assert (await client.ask("ada", "x"))["stdout"] == ""
        assert (await client.ask("ada", "y"))["stdout"] == "x"
        assert (await client.ask("bob", "y"))["stdout"] == ""
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(client.ask, "eve", "z")
        assert host.opened == 3
        died = await client.ask("ada", "die")
        assert (died["status"], died["retry"]) == (503, False)
        assert (await client.ask("ada", "x"))["lost"] == "died"
        assert (await client.ask("ada", "", "DELETE")) == {"status": 204}
        assert (await client.ask("ada", "x"))["lost"] == "closed"
        assert (await client.ask("ada", "#" * 200_000))["status"] == 413
        assert (await client.ask("", "x"))["status"] == 404
    assert host.open == 0


async def test_a_request_that_takes_too_long_is_stopped_and_a_client_that_leaves_loses_nothing(
    example: dict[str, Any],
) -> None:
    host = ScriptedHost()
    example["make_app"].__globals__["RUN_SECONDS"] = 0.2
    async with open_sessions(host) as sessions, open_service(sessions, example) as client:
        await client.ask("ada", "x")
        assert "stopped after 0.2 seconds" in (await client.ask("ada", "wait"))["error"]
        example["make_app"].__globals__["RUN_SECONDS"] = 1000
        with trio.move_on_after(0.2):
            await client.ask("ada", "wait")
        await wait_until(lambda: sessions.statistics().leased == 0)  # the server has noticed
        assert (await client.ask("ada", "y"))["stdout"] == "x"
    assert (host.open, host.opened) == (0, 1)


# --- A fleet ---


async def test_sessions_on_the_nodes_of_a_fleet() -> None:
    async with open_fake_fleet("one") as fleet, open_sessions(fleet.host, "python") as sessions:
        async with sessions.lease("ada") as session:
            assert session.sandbox.node == "one"
            await session.sandbox.run("x = 6")
        async with sessions.lease("ada") as session:
            assert ((await session.sandbox.run("print(x * 7)")).stdout, session.fresh) == ("42\n", False)
            session.sandbox._slot.machine.retire("the test says so")
        async with sessions.lease("ada") as session:
            assert (session.fresh, session.ended) == (True, "died")
            assert "NameError" in (await session.sandbox.run("x")).stderr


# --- asyncio ---


def open_aio_host(hosts: list[ScriptedHost]) -> AbstractAsyncContextManager[aio.Host]:
    return open_aio(lambda: open_scripted_host(hosts), lambda portal, host: aio.Host(portal, cast("Host", host)))


def run_asyncio(main: Callable[[], Any]) -> None:
    """Run it, bounded."""

    async def bounded() -> None:
        async with asyncio.timeout(HANG_LIMIT):
            await main()

    asyncio.run(bounded())


def test_tasks_of_asyncio_share_a_session() -> None:
    hosts: list[ScriptedHost] = []

    async def main() -> None:
        async with open_aio_host(hosts) as host, aio.open_sessions(host, "python") as sessions:

            async def ask(code: str) -> tuple[str, bool]:
                async with sessions.lease("ada") as session:
                    assert isinstance(session.sandbox, aio.Sandbox)
                    assert session.key == "ada"
                    return (await session.sandbox.run(code)).stdout, session.fresh

            fresh = [fresh for _, fresh in await asyncio.gather(*(ask("x") for _ in range(10)))]
            assert sum(fresh) == 1
            assert await ask("y") == ("x", False)
            task = asyncio.create_task(ask("wait"))
            while not sessions.statistics().leased:
                await asyncio.sleep(0.01)
            with pytest.raises(RuntimeError, match="would wait for itself"):
                async with sessions.lease("ada"), sessions.lease("ada", exclusive=True):
                    pytest.fail("it was leased")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await ask("z") == ("y", False)
            assert repr(sessions).startswith("<trio_sandbox.aio.Sessions: 1 sandboxes, 1 awake")
            await sessions.close("ada")
            assert sessions.remembers("ada")
            async with sessions.lease("ada", exclusive=True) as session:
                assert (session.fresh, session.ended) == (True, "closed")

    run_asyncio(main)
    assert (hosts[0].open, hosts[0].opened) == (0, 2)


def test_a_task_of_asyncio_that_is_cancelled_while_it_waits_leaves_no_lease() -> None:
    hosts: list[ScriptedHost] = []
    limits = SessionsConfig(max_sessions=1)

    async def main() -> None:
        async with open_aio_host(hosts) as host, aio.open_sessions(host, limits=limits) as sessions:
            async with sessions.lease("ada"):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1), sessions.lease("bob"):
                        pytest.fail("it was leased")
                assert sessions.statistics().tasks_waiting_lease == 0
            async with sessions.lease("bob"):
                assert sessions.statistics().evicted == 1

    run_asyncio(main)
    assert hosts[0].open == 0


# --- Threads ---


def open_blocking_host(hosts: list[ScriptedHost]) -> AbstractContextManager[blocking.Host]:
    return open_blocking(
        lambda: open_scripted_host(hosts), lambda portal, host: blocking.Host(portal, cast("Host", host))
    )


def test_threads_share_a_session() -> None:
    hosts: list[ScriptedHost] = []
    with open_blocking_host(hosts) as host, blocking.open_sessions(host, "python") as sessions:
        seen: list[bool] = []

        def work(number: int) -> None:
            with blocking.fail_after(HANG_LIMIT), sessions.lease("ada") as session:
                session.sandbox.run(str(number))
                seen.append(session.fresh)

        threads = [threading.Thread(target=partial(work, number)) for number in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(seen) == 1
        with sessions.lease("ada", exclusive=True) as session:
            assert session.sandbox.run("x").stdout in map(str, range(10))
            assert sessions.statistics().leased == 1
            with pytest.raises(TimeoutError), blocking.fail_after(0), sessions.lease("bob"):
                pytest.fail("it was leased")
        sessions.close("ada")
        assert sessions.config == SessionsConfig()
    assert hosts[0].open == 0
