"""The part `runs`: runs one right after the other, of all kinds and sizes, cancelled, refused and left, in forks as well.

After each it is checked that all of the output came, once and from that run, and that the interpreter's state is there unless the
run ended it. Descriptors, tasks and memory are compared before and after.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import attrs
import trio

from trio_sandbox import (
    HostConfig,
    OutputChunk,
    OutputLimitError,
    RunRefusedError,
    RunResult,
    Sandbox,
    SandboxConfig,
    SandboxError,
    Timeouts,
    open_host,
)

from ._gauges import compare, measure
from ._report import Budget, Report
from ._steps import MAX_OUTPUT, Language, Step, steps
from ._watch import HungError, bounded

#: Seconds for one operation, on the slowest machine: nothing of what is done takes a hundredth of it.
PATIENCE = 120.0
#: Steps in each fork, and steps before the first measurement: caches are full by then.
_IN_FORK = 12
_WARM_UP = 150
_SET: dict[Language, str] = {"python": "state = {0}", "javascript": "state = {0}; undefined", "shell": "state={0}"}
_GET: dict[Language, str] = {"python": "print(state)", "javascript": "console.log(state)", "shell": "echo $state"}


class WrongError(Exception):
    """Something is not as it must be."""


#: Opens what is soaked; another one each time.
Opener = Callable[[], AbstractAsyncContextManager[Sandbox]]


@asynccontextmanager
async def open_world() -> AsyncGenerator[Sandbox]:
    """Open a sandbox with all three languages, whose host has more time than is ever needed."""
    timeouts = Timeouts(interrupt_grace=PATIENCE / 4, kill=PATIENCE / 4)
    config = SandboxConfig(max_output_bytes=MAX_OUTPUT, memory_mib=512)
    async with open_host(HostConfig(timeouts=timeouts)) as host, host.open_sandbox("node", config) as sandbox:
        yield sandbox


async def soak(budget: Budget, report: Report, *, opener: Opener = open_world) -> None:
    """Soak runs. A sandbox in which something went wrong is given up for another."""
    plan = steps(budget.seed)
    while budget.is_left(report.operations.total()) and not report.is_hopeless:
        async with opener() as sandbox:
            await _soak_one(sandbox, plan, budget, report)


async def _soak_one(sandbox: Sandbox, plan: Iterator[Step], budget: Budget, report: Report) -> None:
    soaker = Soaker(sandbox, report)
    first: dict[str, float] | None = None
    for done, step in enumerate(plan):
        if not budget.is_left(report.operations.total()):
            break
        if first is None and done >= _WARM_UP:
            first = await measure(sandbox)
        try:
            if step.kind == "is forked":
                await _soak_fork(soaker, step, plan)
            else:
                await soaker.do(step)
        except Exception as exc:  # noqa: BLE001  whatever it is, the report says it
            report.fail(f"{step}: {type(exc).__name__}: {exc}\n    The console's end: {sandbox.console()[-1000:]!r}")
            return
    if first is not None:
        compare(report, first, await measure(sandbox))


async def _soak_fork(soaker: Soaker, step: Step, plan: Iterator[Step]) -> None:
    """Do some steps in a copy, which was made in the middle of a run; that goes on, and the copy has all state."""

    async def run() -> None:
        code = "import time; print('begun'); time.sleep(0.5); print('ended')"
        result = await soaker.sandbox.run(code, language="python")
        if (result.stdout, result.state_kept) != ("begun\nended\n", True):
            raise WrongError(f"the run during which it was forked came to {result}")

    async def fork() -> None:
        async with trio.open_nursery() as nursery:
            if step.streamed:  # as good as a coin
                nursery.start_soon(run)
                await trio.sleep(0.1)
            async with soaker.sandbox.fork(1) as (child,):
                copy = Soaker(child, soaker.report, states=dict(soaker.states), ended=set(soaker.ended))
                for _ in range(_IN_FORK):
                    inner = next(plan)
                    if inner.kind != "is forked":
                        await copy.do(inner)

    soaker.report.operations[step.kind] += 1
    await soaker.have_state(step)
    try:
        await bounded(str(step), fork, PATIENCE * (2 + _IN_FORK), by_deadline=False)
    except* (HungError, WrongError, SandboxError) as group:
        raise WrongError(f"in a fork: {group.exceptions}") from group
    await soaker.check_state("python")


@attrs.define(eq=False)
class Soaker:
    """Does steps in a sandbox, and knows what must be there after each."""

    sandbox: Sandbox
    report: Report
    states: dict[Language, int] = attrs.field(factory=dict["Language", int])
    """What the variable is in each interpreter that has one."""
    ended: set[Language] = attrs.field(factory=set["Language"])
    """Whose interpreter the last run ended."""

    async def do(self, step: Step) -> None:
        """Do one step, and check what it leaves.

        Raises:
          HungError: if it did not come back.
          WrongError: if something is not as it must be.
          SandboxError: which nothing here may raise.

        """
        await self.have_state(step)
        self.report.operations[f"{step.kind} ({step.language})"] += 1
        started = time.monotonic()
        await bounded(str(step), lambda: self._do(step), PATIENCE, by_deadline=step.has_deadline)
        if step.kind == "ends":
            del self.states[step.language]
            self.ended.add(step.language)
        else:
            await bounded(f"the run after {step}", lambda: self.check_state(step.language), PATIENCE, by_deadline=False)
        self.report.slowest = max(self.report.slowest, round(time.monotonic() - started, 2))

    async def _do(self, step: Step) -> None:
        if step.cancelled_after is not None:
            await self._cancel(step, step.cancelled_after)
        elif step.kind == "is refused":
            await self._refuse(step)
        elif step.streamed:
            await self._stream(step)
        else:
            await self._run(step)

    async def _run(self, step: Step) -> None:
        try:
            result = await self.sandbox.run(step.code, language=step.language, stdin=b"x" * (step.stdin or 0))
        except OutputLimitError as exc:
            _check(max(step.stdout, step.stderr) > MAX_OUTPUT, "its output is within the limit, and was too much")
            which = exc.stdout_bytes if step.stdout > MAX_OUTPUT else exc.stderr_bytes
            if min(step.stdout, step.stderr) <= MAX_OUTPUT:
                _check(which == step.letter.encode() * MAX_OUTPUT, f"{len(which)} bytes came up to the limit")
            return
        _check(max(step.stdout, step.stderr) <= MAX_OUTPUT, "its output is past the limit, and was let through")
        self._check_result(step, result, result.stdout_bytes, result.stderr_bytes)

    async def _stream(self, step: Step) -> None:
        output = {"stdout": bytearray(), "stderr": bytearray()}
        result = None
        stdin = b"x" * (step.stdin or 0)
        async with self.sandbox.stream(step.code, language=step.language, stdin=stdin) as events:
            async for event in events:
                if step.kind == "is left":
                    return
                if isinstance(event, OutputChunk):
                    output[event.stream] += event.data
                elif isinstance(event, RunResult):
                    result = event
        assert result is not None
        self._check_result(step, result, bytes(output["stdout"]), bytes(output["stderr"]))

    def _check_result(self, step: Step, result: RunResult, stdout: bytes, stderr: bytes) -> None:
        letter = step.letter.encode()
        expected = letter * step.stdout if step.stdin is None else None
        if expected is None:
            _check(int(stdout) == step.stdin, f"it read {stdout[:50]!r} bytes of {step.stdin}")
        else:
            _check(stdout == expected, f"stdout is {_describe(stdout)}")
        _check(stderr == letter * step.stderr, f"stderr is {_describe(stderr)}")
        ends = step.kind == "ends"
        _check(result.exit_code == (3 if ends else 0), f"it came to {result}")
        _check(result.state_kept is not ends, f"it came to {result}")

    async def _refuse(self, step: Step) -> None:
        try:
            await self.sandbox.run(step.code, language=step.language, cwd="/nowhere")
        except RunRefusedError:
            return
        raise WrongError("it was not refused")

    async def _cancel(self, step: Step, seconds: float) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def cancel() -> None:
                    await trio.sleep(seconds)
                    scope.cancel(reason="the soak cancels it")

                nursery.start_soon(cancel)
                await self._run_until_cancelled(step)
                nursery.cancel_scope.cancel(reason="it is over")

    async def _run_until_cancelled(self, step: Step) -> None:
        stdin = b"x" * (step.stdin or 0)
        try:
            if not step.streamed:
                await self.sandbox.run(step.code, language=step.language, stdin=stdin)
                return
            async with self.sandbox.stream(step.code, language=step.language, stdin=stdin) as events:
                async for _ in events:
                    pass
        except OutputLimitError:
            pass  # it was quick

    async def check_state(self, language: Language) -> None:
        """Check that the interpreter has what it was given. WrongError if not."""
        result = await self.sandbox.run(_GET[language], language=language)
        self.report.operations["looks for the state"] += 1
        wanted = f"{self.states[language]}\n"
        if (result.stdout, result.restarted, result.stderr) != (wanted, False, ""):
            raise WrongError(
                f"the state is {result.stdout!r}, not {wanted!r}; restarted: {result.restarted}; {result.stderr[-200:]!r}"
            )

    async def have_state(self, step: Step) -> None:
        """Give the step's interpreter a state if it has none. WrongError if that can't be."""
        language, state = step.language, step.number
        if language in self.states:
            return
        result = await self.sandbox.run(_SET[language].format(state), language=language)
        self.report.operations["sets the state"] += 1
        restarted = language in self.ended
        self.ended.discard(language)
        if (result.exit_code, result.restarted) != (0, restarted):
            raise WrongError(f"a new state could not be set: {result}, {result.stderr[-200:]!r}")
        self.states[language] = state


def _check(right: bool, what: str) -> None:
    if not right:
        raise WrongError(what)


def _describe(output: bytes) -> str:
    parts = sorted({bytes([byte]) for byte in output[:1000]})
    return f"{len(output)} bytes of {parts[:5]}"
