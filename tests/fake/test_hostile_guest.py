"""A guest that sends anything at all: the host's calls end, in bounded time, in errors of ours."""

from __future__ import annotations

import contextlib
import json
import struct

import trio
import trio.testing
from hypothesis import given, settings, strategies as st

from tests._leaks import HANG_LIMIT
from trio_sandbox import SandboxConfig, SandboxError, Timeouts
from trio_sandbox.sandbox import Sandbox
from trio_sandbox.sandbox._slot import Slot
from trio_sandbox.wire import PROTOCOL_VERSION, Role, open_channel

from ._guest import FakeMachine

HELLO = 1
#: Every kind there is, and some that there are not; the ids of streams that the host opens, and others.
frames = st.tuples(
    st.integers(min_value=0, max_value=10),
    st.integers(min_value=0, max_value=9),
    st.one_of(
        st.binary(max_size=40),
        st.sampled_from(
            [
                b'J\x00\x00\x00\x1a{"exited": {"status": -9}}',
                b'J\x00\x00\x00\x0e{"started": 1}',
                b"O\x00\x00\x00\x02hi",
                b'J\x00\x00\x00\x4e{"finished": {"exit_code": 0, "restarted": false, "state_kept": true, "x": ""}}',
                b'{"service": "code"}',
                b"\xff\xff\xff\xff",
            ]
        ),
    ),
)
anything = st.one_of(
    st.binary(max_size=200),
    st.lists(frames, max_size=12).map(lambda parts: b"".join(encode(*part) for part in parts)),
)


def encode(kind: int, stream_id: int, payload: bytes) -> bytes:
    return struct.pack(">IBI", len(payload), kind, stream_id) + payload


async def meet(sent: bytes) -> None:
    """Run code and a process while the guest sends *sent*, then nothing."""
    ours, theirs = trio.testing.memory_stream_pair()
    hello = encode(HELLO, 0, json.dumps({"version": PROTOCOL_VERSION}).encode())

    async def guest() -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await theirs.send_all(hello)
            await theirs.receive_some()
            await theirs.send_all(sent)
            await theirs.send_eof()
            while await theirs.receive_some():
                pass

    async def attempt(sandbox: Sandbox) -> None:
        # Errors of ours, or of a process that could not start; anything else fails the test.
        with contextlib.suppress(SandboxError):
            await sandbox.run("print(1)")
        with contextlib.suppress(SandboxError, OSError):
            await sandbox.run_process(["true"], capture_stdout=True, check=False)

    with trio.fail_after(HANG_LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest)
            async with open_channel(ours, role=Role.HOST, hello={"version": PROTOCOL_VERSION}) as channel:
                machine = FakeMachine(
                    channel, cut=lambda: trio.lowlevel.spawn_system_task(trio.aclose_forcefully, theirs)
                )
                machine.ended.set()  # whoever waits for QEMU's end need not
                sandbox = Sandbox(Slot(machine), "python", SandboxConfig(), Timeouts(interrupt_grace=0.01, kill=0.01))
                await attempt(sandbox)
            nursery.cancel_scope.cancel()


@settings(max_examples=300)
@given(anything)
def test_whatever_a_guest_sends_the_calls_end_in_errors_of_ours(sent: bytes) -> None:
    trio.run(meet, sent)
