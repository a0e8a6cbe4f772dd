"""Each line of the failure table, in a real guest: what the caller gets, what is left, and that the next run works."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable

import pytest
import trio

from tests._leaks import HANG_LIMIT, nothing_left
from tests.failures import ACCIDENTS, ATTACKS, ENDS, LANGUAGES, Language, Outcome, Raised, Row
from trio_sandbox import (
    HostConfig,
    OutcomeUnknownError,
    OutputChunk,
    RunResult,
    Sandbox,
    SandboxClosedError,
    SandboxConfig,
    SandboxError,
    Timeouts,
    VmDiedError,
    open_host,
)

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "node_image", "system_disk")]

#: Little, for what takes all of it to be done with soon.
CONFIG = SandboxConfig(memory_mib=192, max_output_bytes=2**18)


@pytest.mark.parametrize("rows", [ACCIDENTS, ATTACKS], ids=["accidents", "attacks"])
@pytest.mark.parametrize("language", LANGUAGES.values(), ids=LANGUAGES.keys())
async def test_whatever_a_run_comes_to_the_next_one_works(language: Language, rows: list[Row]) -> None:
    wrong: list[str] = []
    # SIGINT is to do, and SIGKILL, however slow the machine is now.
    patient, hasty = Timeouts(interrupt_grace=60, kill=60), Timeouts(kill=60)
    async with (
        open_host(HostConfig(timeouts=patient)) as patient_host,
        patient_host.open_sandbox(language.image, CONFIG) as patient_sandbox,
        open_host(HostConfig(timeouts=hasty)) as host,
        host.open_sandbox(language.image, CONFIG) as hasty_sandbox,
    ):
        for row in rows:
            if language.name not in row.cases:
                continue
            code, expected = row.cases[language.name]
            sandbox = patient_sandbox if all(possible.kept for possible in expected) else hasty_sandbox
            await run(sandbox, language, language.remember)
            came = await outcome(sandbox, language, row, code, expected)
            left = await run(sandbox, language, language.recall)
            kept = left.stdout == "kept"
            if not any(fits(came, kept, possible) for possible in expected):
                wrong.append(f"{row.what}: {came!r}, variables {'kept' if kept else 'lost'}; not {expected}")
            if (left.stdout, left.exit_code, left.restarted) not in (("kept", 0, False), ("lost", 0, True)):
                wrong.append(f"{row.what}: and then {left!r} {left.stdout!r} {left.stderr!r}")
            await run(sandbox, language, language.tidy)
    assert not wrong, "\n".join(wrong)


async def run(sandbox: Sandbox, language: Language, code: str) -> RunResult:
    return await sandbox.run(code, language=language.name)


async def outcome(
    sandbox: Sandbox, language: Language, row: Row, code: str, expected: Iterable[Outcome]
) -> RunResult | str:
    """Bring a line about, and give its result or the name of the exception."""
    try:
        if row.by == "deadline" and any(isinstance(possible, Raised) for possible in expected):
            with trio.fail_after(1):
                return await run(sandbox, language, code)
        if row.by == "cancel":
            with trio.CancelScope() as scope:
                await run_and_call(sandbox, language, code, scope.cancel)
            return "Cancelled" if scope.cancelled_caught else "nothing"
        with trio.fail_after(HANG_LIMIT):
            return await run(sandbox, language, code)
    except (SandboxError, trio.TooSlowError) as exc:
        return type(exc).__name__


async def run_and_call(sandbox: Sandbox, language: Language, code: str, function: Callable[[], object]) -> None:
    """Run *code*, and call *function* once it has printed "go"."""
    async with sandbox.stream(code, language=language.name) as events:
        async for event in events:
            assert event == OutputChunk("stdout", b"go\n")
            function()


def fits(came: RunResult | str, kept: bool, possible: Outcome) -> bool:
    """Whether that is one of the things that may come of a line."""
    if isinstance(possible, Raised):
        return (came, kept) == (possible.name, possible.kept)
    return (
        isinstance(came, RunResult)
        and (came.exit_code, came.state_kept, kept) == (possible.exit_code, possible.kept, possible.kept)
        and possible.stderr in came.stderr
    )


_TRACE = """
import ctypes, sys, time
libc = ctypes.CDLL(None)
assert libc.ptrace(16, int(sys.argv[1]), None, None) == 0  # PTRACE_ATTACH
print('go', flush=True)
time.sleep(1000)
"""


async def test_an_interpreter_that_another_process_stops_is_replaced(sandbox: Sandbox) -> None:
    pid = (await sandbox.run("import os\nprint(os.getpid(), end='')")).stdout
    async with sandbox.open_process(["python3", "-c", _TRACE, pid], user="root") as tracer:
        assert tracer.stdout is not None
        assert await tracer.stdout.receive_some() == b"go\n"
        with trio.move_on_after(1) as scope:
            await sandbox.run("print('never')")
        assert scope.cancelled_caught
        result = await sandbox.run("print('new')")
        assert (result.stdout, result.restarted) == ("new\n", True)


@pytest.mark.parametrize("language", LANGUAGES.values(), ids=LANGUAGES.keys())
async def test_what_ends_the_machine_ends_the_sandbox_and_nothing_else(language: Language) -> None:
    with nothing_left():
        async with open_host() as host:
            for row in ENDS:
                code, (expected,) = row.cases[language.name]
                async with host.open_sandbox(language.image, CONFIG) as sandbox, trio.open_nursery() as nursery:

                    def end(by: str = row.by, sandbox: Sandbox = sandbox, nursery: trio.Nursery = nursery) -> None:
                        if by == "panic":
                            nursery.start_soon(panic, sandbox)
                        else:
                            pid = sandbox.statistics().qemu_pid
                            assert pid is not None
                            os.kill(pid, signal.SIGKILL)

                    with pytest.raises(OutcomeUnknownError) as caught:
                        await run_and_call(sandbox, language, code, end)
                    assert fits(type(caught.value).__name__, False, expected)
                    assert isinstance(caught.value.__cause__, VmDiedError)
                    assert ("kernel panicked" if row.by == "panic" else "SIGKILL") in str(caught.value.__cause__)
                    with pytest.raises(SandboxClosedError):
                        await run(sandbox, language, "")
            assert (await host.run("1", image=language.image)).exit_code == 0


async def panic(sandbox: Sandbox) -> None:
    with pytest.raises(OutcomeUnknownError):
        await sandbox.run_process("echo c > /proc/sysrq-trigger", shell=True, user="root")
