"""Code that is run in a machine before anybody has it, and getting it ready to be saved."""

from __future__ import annotations

from typing import Final

import trio

from .._config import Timeouts
from .._errors import VmError, WarmupError
from .._quote import quote_lines
from ..client import RunTrace, ask, code_request, collect, open_run
from ..qemu import Vm

#: Run in every template after the user's own warm-up, so that what a first run needs is in memory.
_TRIVIAL_RUNS: Final = {"python": "print(1)", "javascript": "console.log(1)", "shell": "echo 1"}
#: Bytes that a warm-up may print.
_WARMUP_OUTPUT: Final = 2**20
_FROZEN: Final = b"frozen"
#: Seconds that the guest has for falling asleep: what it has still to do then, each clone has to do.
_SETTLE: Final = 0.05


async def run_trivial_code(vm: Vm, language: str, timeouts: Timeouts) -> None:
    """Do what every run does, which leaves nothing but what makes the next one faster. Without a *language* there are none.

    Raises:
      WarmupError: if it fails.

    """
    await trio.lowlevel.checkpoint()
    if language:
        await run_warm_up(vm, language, _TRIVIAL_RUNS[language], timeouts)


async def run_warm_up(vm: Vm, language: str, code: str, timeouts: Timeouts) -> None:
    """Run *code* in the interpreter of *language*.

    Raises:
      WarmupError: if it fails.

    """
    request = {**code_request(code, language=language, env=None, cwd=None), "warm_up": True}
    async with open_run(
        vm,
        request,
        RunTrace(language),
        display_limit=_WARMUP_OUTPUT,
        memory_mib=vm.config.memory_mib,
        grace=timeouts.interrupt_grace,
        patience=timeouts.kill,
    ) as events:
        result = await collect(events, _WARMUP_OUTPUT)
    if result.exit_code != 0 or not result.state_kept:
        raise WarmupError(f"the warm-up ended with status {result.exit_code}:\n{quote_lines(result.stderr)}")


async def freeze(vm: Vm, marker: bytes, timeouts: Timeouts) -> None:
    """Have the agent get ready for being saved.

    Raises:
      VmError: if it says that it did not.
      OutcomeUnknownError, GuestProtocolError: if it does not answer in time, or says what no agent of ours says.

    """
    header = {"service": "snapshot", "marker": marker.hex()}
    if await ask(vm, header, "a snapshot", most=len(_FROZEN), patience=timeouts.kill) != _FROZEN:
        raise VmError("the guest did not get ready to be saved", console=vm.console())
    await trio.sleep(_SETTLE)
