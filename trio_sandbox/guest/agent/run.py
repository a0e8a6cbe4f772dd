"""One run of the service "code": what its host asked for, and how what comes of it gets there."""

from __future__ import annotations

import json
import os
import time
from typing import final

import trio

from ...wire import DISPLAY, JSON, ChannelStream, RecordStream, encode_json
from .children import shell_status
from .displays import Display
from .functions import FunctionPipes
from .meter import NOTHING, Used
from .pipes import feed
from .processes import failure_fields

_JSON = {False: "false", True: "true"}


@final
class Run:
    """One run, as the host asked for it.

    Args:
      records: Where its output and its end go.
      code: Source text.
      env: Variables to set in the interpreter's environment.
      cwd: Directory to change to, or None.
      display_limit: Bytes of one display that the host takes.
      deadline: When something is to be done about it: SIGINT, and after that SIGKILL; infinity for never.
      grace: Seconds from SIGINT to SIGKILL, at most; infinity to wait for its host.

    """

    def __init__(
        self,
        records: RecordStream,
        code: str,
        env: dict[str, str] | None,
        cwd: str | None,
        display_limit: int,
        deadline: float,
        grace: float,
    ) -> None:
        self.records = records
        self.code = code
        self.env = env
        self.cwd = cwd
        self.is_warm_up = False
        """It is none of the user's own."""
        self.stdin: ChannelStream | None = None
        """What it reads; None for nothing."""
        self.functions: FunctionPipes | None = None
        """What it may call of the host's; None for nothing."""
        self.begun: trio.Event | None = None
        """It has begun, where there is something to `carry`: before that its input is kept, for another interpreter may need it."""
        self.is_handed_on = False
        """An interpreter has ended without beginning it, so that it has another."""
        self.display_limit = display_limit
        self.stdin_pipe: int = -1
        """Our end of the pipe for what it reads, from the moment that an interpreter has it."""
        self.deadline = deadline
        self.grace = grace
        self.interrupted = False
        self.stopped = 0
        """What it ends with if it has not begun: as if the last signal that was meant for it had ended it."""
        self.expired = False
        """It was its deadline that interrupted it."""
        self.restarted = False
        self.over: trio.Event = trio.Event()
        """It has an end; that may still be on its way to the host."""
        self.given_up = False
        """Its host does not want it any more."""
        self.abandoned = False
        """Its host is gone, and it may end by itself."""
        self._unheard = False
        self.started_at: float = time.perf_counter()
        """When it was asked for."""

    @property
    def has_streams(self) -> bool:
        """Whether there is something to `carry`."""
        return self.stdin is not None or self.functions is not None

    async def carry(self) -> None:
        """Carry its input, and its calls of the host's functions, once it has begun; cancelled when it is over. An interpreter has it."""
        assert self.begun is not None
        try:
            await self.begun.wait()
            async with trio.open_nursery() as nursery:
                if self.stdin is not None:
                    descriptor, self.stdin_pipe = self.stdin_pipe, -1
                    nursery.start_soon(feed, self.stdin, descriptor)
                if self.functions is not None:
                    nursery.start_soon(self.functions.carry)
        finally:
            self.close_pipes()

    def close_pipes(self) -> None:
        """Close our ends of what nobody carries."""
        if self.stdin_pipe >= 0:
            os.close(self.stdin_pipe)
            self.stdin_pipe = -1
        if self.functions is not None:
            self.functions.close()

    async def send(self, output: list[tuple[bytes, bytes]], *, end: bool = False) -> None:
        """Send the host some records, the last ones if *end*, unless it has given the run up."""
        if self._unheard:
            return
        try:
            if end:
                # Closed in the same write: the host has nothing to answer, which would only wake us.
                await self.records.send_and_close(output)
            else:
                await self.records.send_many(output)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._unheard = True  # whoever reads `records` sees it as well, and ends the run

    async def show(self, output: list[tuple[bytes, bytes]], display: Display) -> None:
        """Send the host some output, and then what the run shows."""
        about: dict[str, object] = {"mime": display.mime, "size": display.size, "item": display.item}
        await self.send([*output, (JSON, encode_json({"display": about}))])
        if display.size <= self.display_limit:
            for data in display.read():
                await self.send([(DISPLAY, data)])

    async def finish(
        self,
        output: list[tuple[bytes, bytes]],
        returncode: int,
        *,
        value: str | None = None,
        state_kept: bool,
        oom: bool = False,
        used: Used = NOTHING,
    ) -> None:
        """Send the last of the output and how it ended."""
        end = self._describe_end(returncode, value, state_kept=state_kept, oom=oom, used=used)
        self.over.set()
        await self.send([*output, (JSON, end)], end=True)

    def finish_nowait(self, output: list[tuple[bytes, bytes]], status: int, value: str | None, *, used: Used) -> bool:
        """Do what `finish` does, of a run that left its interpreter as it should, if it can be done at once."""
        end = self._describe_end(status, value, state_kept=True, oom=False, used=used)
        try:
            if not self.records.send_and_close_nowait([*output, (JSON, end)]):
                return False
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # as in `send`
        self.over.set()
        return True

    def _describe_end(self, returncode: int, value: str | None, *, state_kept: bool, oom: bool, used: Used) -> bytes:
        # Put together by hand: a JSON encoder takes several times as long, at the end of every run.
        text = "null" if value is None else json.dumps(value)
        cpu, peak, written = used
        return (
            f'{{"finished":{{"exit_code":{shell_status(returncode)},"value":{text},'
            f'"restarted":{_JSON[self.restarted]},"state_kept":{_JSON[state_kept]},'
            f'"expired":{_JSON[self.expired]},"oom":{_JSON[oom]},"used":[{cpu},{peak},{written}]}}}}'
        ).encode()

    async def fail(self, error: OSError) -> None:
        """Say why nothing was run."""
        self.over.set()
        await self.send([(JSON, encode_json({"failed": failure_fields(error)}))], end=True)
