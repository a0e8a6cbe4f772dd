"""A sandbox whose guest is a script of the test's: no virtual machine, and no code that is run."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any, final

import attrs

from .._config import SandboxConfig, Timeouts
from .._entries import open_block
from .._nurseries import open_services
from ..machines import hold_machine
from ..network import Gateway, HostResolver
from ..sandbox import Sandbox
from ._calls import Answerer
from ._guest import ScriptedGuest
from ._life import Before, ScriptedLife
from ._machine import open_machine
from ._tree import ScriptedFiles


@open_block
async def open_scripted_sandbox(
    answer: Answerer,
    *,
    config: SandboxConfig | None = None,
    state: dict[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    before: Before | None = None,
) -> AsyncGenerator[Sandbox]:
    """Open a real `Sandbox` with no virtual machine behind it: *answer* says how each run and each process ends.

    Limits on output, turns of the interpreter, cancellation and errors are those of the real thing, as is everything
    between your program and the guest. It costs a millisecond, and works with `trio.testing.MockClock`. Checkpoints, copies and sleep keep
    what the script remembers (`Call.state`) and the files. These are in memory: methods of `GuestPath`, `Sandbox.upload` and `Sandbox.download` work on them, without checks of rights. The script connects by `Call.connect`, as the policy allows. It does not fall asleep by itself. Terminals, tunnels and
    `Sandbox.watch` are not scripted: they need a guest.

    Args:
      answer: Called in a task of its own with each `Call`. Cancelling the caller cancels it, as it stops code in a
        guest: with 130 for a run that goes on with its variables. If it raises `VmDiedError`, the virtual machine is
        "gone", and callers get what they get then. Anything else that it raises comes out of the block.
      config: As for `open_sandbox`; its limit on output is kept.
      state: What the script remembers at first; see `Call.state`.
      files: What is on its disk at first: contents by absolute paths, such as ``{"/home/user/data.csv": b"a,b"}``.
      before: Called with "checkpoint", "revert", "fork", "hibernate" or "resume" before that is done, and with the operation and the path before something is done to
        a file, "put /home/user/a.txt" for instance. What it raises (`SnapshotError`; of files `OSError`) is raised by that method, and the sandbox is as it was. Of
        files, other exceptions end the sandbox as those of *answer* do.

    Raises:
      TypeError, ValueError: if an argument can't be what it is. Of what *answer* returns, out of the block.

    """
    for name, function in (("answer", answer), ("before", before or _do_nothing)):
        if not callable(function):
            raise TypeError(f"`{name}` must be a function, not {function!r:.100}")
    if not (config is None or isinstance(config, SandboxConfig)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`config` must be a SandboxConfig, not {config!r:.100}")
    if not (state is None or isinstance(state, dict)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`state` must be a dict, not {state!r:.100}")
    failures: list[Exception] = []
    script = _Script(config or SandboxConfig(), before or _do_nothing)
    disk = ScriptedFiles()
    disk.update(files or {})
    guest = ScriptedGuest(answer, failures, script.before, {} if state is None else state, disk)
    gateway = Gateway(script.config.network, HostResolver(), connect_timeout=script.timeouts.connect)
    try:
        async with script.open(guest, gateway) as sandbox:
            yield sandbox
    finally:
        if failures:
            raise failures[0]  # whatever the program under test made of it


@final
@attrs.frozen
class _Script:
    """What a scripted sandbox and its copies have in common."""

    config: SandboxConfig
    before: Before
    timeouts: Timeouts = attrs.field(factory=Timeouts)

    @asynccontextmanager
    async def open(self, guest: ScriptedGuest, gateway: Gateway) -> AsyncGenerator[Sandbox]:
        """Yield the sandbox of a guest."""
        async with open_services("open_scripted_sandbox()") as services:
            held = await hold_machine(services, open_machine(guest))
            life = ScriptedLife(
                services,
                held,
                gateway,
                patience=self.timeouts.kill,
                give_back=self.timeouts.boot,
                before=self.before,
                open_copy=self.open,
            )
            if gateway.network:
                await life.network.switch(held.vm)
            try:
                yield Sandbox(life.slot, "python", self.config, self.timeouts, life)
            finally:
                life.close()


def _do_nothing(_what: str) -> None:
    """For tests in which nothing of the kind fails."""
