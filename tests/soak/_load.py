"""A mixed load on sandboxes, which goes on until it is stopped, and knows what may have become of what failed.

Whoever raises an error says whether the request may have had its effect. That is held against what is found later: of each run it is
known which numbers it may print, and an error that calls a retry safe leaves no more of them.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import attrs
import trio

from trio_sandbox import Sandbox, SandboxClosedError, SandboxError

#: Bytes that go to a process and come back, and those of a file.
_BYTES = 50_000
#: Seconds between a failure and the next attempt.
_PAUSE = 0.05
#: What each run does: a number that is lost, or counted twice, is seen.
_COUNT = "v = globals().get('v', 0) + 1; print(v)"


class WrongError(Exception):
    """A result that is not as it must be."""


@attrs.frozen
class Failure:
    """What an operation raised."""

    kind: str
    error: BaseException
    at: float
    """On the clock of `time.monotonic`."""
    started: float

    def __str__(self) -> str:
        cause = self.error.__cause__
        because = f", because of {type(cause).__name__}: {str(cause)[:200]}" if cause is not None else ""
        return f"{self.kind}: {type(self.error).__name__}: {str(self.error)[:300]}{because}"


@attrs.define
class Load:
    """Uses a sandbox in all ways at once; `serve` does not return until each of them was told that it is closed, or is stopped."""

    sandbox: Sandbox
    name: str
    """What it is saved as."""
    failures: list[Failure] = attrs.field(factory=list[Failure])
    done: Counter[str] = attrs.field(factory=Counter[str])
    expected: set[int] = attrs.field(factory=lambda: {1})
    """What the next run may print."""
    may_lose_state: bool = False
    _stopped: bool = False

    async def serve(self, *kinds: str) -> None:
        """Do the operations of each kind, one after the other; all kinds at once."""
        async with trio.open_nursery() as nursery:
            for kind in kinds:
                nursery.start_soon(self._repeat, kind, getattr(self, f"do_{kind}"))

    def stop(self) -> None:
        """Have no more operations begin."""
        self._stopped = True

    async def _repeat(self, kind: str, operation: Callable[[], Awaitable[None]]) -> None:
        while not self._stopped:
            started = time.monotonic()
            try:
                await operation()
            except Exception as exc:  # noqa: BLE001  whether it is right is judged later
                self.failures.append(Failure(kind, exc, time.monotonic(), started))
                if isinstance(exc, SandboxClosedError):
                    return
                await trio.sleep(_PAUSE)
            else:
                self.done[kind] += 1

    async def do_run(self) -> None:
        before = self.expected
        try:
            result = await self.sandbox.run(_COUNT)
        except BaseException as exc:
            if not (isinstance(exc, SandboxError) and exc.retry_safe):
                self.expected = before | {number + 1 for number in before}
            raise
        if not result.state_kept:
            self._forget(f"the run ended its interpreter: {result!r}")
            return
        if result.exit_code:
            raise WrongError(f"it failed: {result!r} {result.stderr[-200:]!r}")
        printed = int(result.stdout)
        if result.restarted:
            self._forget("another interpreter has begun")
        if printed not in self.expected:
            raise WrongError(f"it printed {printed}, and not one of {sorted(self.expected)}")
        self.expected = {printed + 1}

    def _forget(self, why: str) -> None:
        if not self.may_lose_state:
            raise WrongError(f"its variables are lost: {why}")
        self.expected = {1}

    async def do_shell(self) -> None:
        result = await self.sandbox.run("echo $((6 * 7))", language="shell")
        if result.exit_code or result.stdout != "42\n":
            if self.may_lose_state and not result.state_kept:
                return
            raise WrongError(f"it came to {result!r} {result.stdout!r}")

    async def do_stream(self) -> None:
        printed = b""
        async with self.sandbox.stream("for i in range(20): print('x' * 999)", language="python") as events:
            async for event in events:
                printed += getattr(event, "data", b"")
        if len(printed) != 20_000 and not self.may_lose_state:
            raise WrongError(f"{len(printed)} bytes came")

    async def do_process(self) -> None:
        ran = await self.sandbox.run_process(["cat"], stdin=b"z" * _BYTES, capture_stdout=True, check=False)
        if (ran.returncode, len(ran.stdout)) != (0, _BYTES):
            raise WrongError(f"it ended with {ran.returncode} and {len(ran.stdout)} bytes")

    async def do_file(self) -> None:
        path = self.sandbox.path(f"/home/user/f{self.done['file'] % 5}")
        content = os.urandom(_BYTES)
        await path.write_bytes(content)
        if await path.read_bytes() != content:
            raise WrongError("the file has another content")

    async def do_tunnel(self) -> None:
        try:
            stream = await self.sandbox.open_tcp_stream(9)
        except ConnectionRefusedError:
            await trio.sleep(_PAUSE)
        else:
            await stream.aclose()
            raise WrongError("nobody listens there, and it was connected")

    async def do_fork(self) -> None:
        async with self.sandbox.fork(1) as (child,):
            if (await child.run("print(6 * 7)")).stdout != "42\n":
                raise WrongError("the copy does not compute")

    async def do_checkpoint(self) -> None:
        (await self.sandbox.checkpoint()).discard()
        await trio.sleep(_PAUSE)

    async def do_life(self) -> None:
        """Go back, save, sleep: what nothing else may be under way for."""
        await self.resume()
        await self._expect_state()
        kept = await self.sandbox.checkpoint()
        try:
            await self.sandbox.run("v = 'another'")
            await self.sandbox.revert(kept)
        finally:
            kept.discard()
        await self._expect_state()
        await self.sandbox.save(self.name, replace=True)
        await self.sandbox.hibernate()
        await self.resume()
        await self._expect_state()

    async def resume(self) -> None:
        """Wake it up if it sleeps."""
        if self.sandbox.statistics().hibernated:
            await self.sandbox.resume()

    async def _expect_state(self) -> None:
        result = await self.sandbox.run("print(v)")
        # A revert that did not come about leaves the sandbox as it was.
        if result.stdout not in ("7\n", "another\n"):
            raise WrongError(f"its state is {result.stdout!r} {result.stderr[-200:]!r}")
        if result.stdout == "another\n":
            await self.sandbox.run("v = 7")
