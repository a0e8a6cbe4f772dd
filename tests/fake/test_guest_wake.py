"""The agent takes the time again when a machine that was idle is handed over."""

from __future__ import annotations

from collections.abc import Mapping

import trio
import trio.testing

from trio_sandbox.guest.agent import agent
from trio_sandbox.guest.agent.children import Children
from trio_sandbox.guest.agent.local import start_local_spawner
from trio_sandbox.wire import Role, open_channel


async def test_what_the_host_says_is_taken_and_acknowledged() -> None:
    told: list[Mapping[str, object]] = []
    spawner, process = start_local_spawner()
    ours, theirs = trio.testing.memory_stream_pair()
    try:
        with spawner:
            async with trio.open_nursery() as nursery:
                children = Children(spawner)

                async def serve() -> None:
                    await agent.serve(theirs, children, on_hello=told.append)

                nursery.start_soon(serve)  # noqa: ASYNC113 - what is sent before it runs waits in the stream
                async with open_channel(ours, role=Role.HOST, hello={"time": 1}) as channel:
                    answer = b""
                    async with channel.open_stream({"service": "wake", "time": 2}) as stream:
                        while data := await stream.receive_some():
                            answer += data
                    assert answer == b"awake"
                    assert [hello["time"] for hello in told] == [1, 2]
                nursery.cancel_scope.cancel()
    finally:
        process.wait()
