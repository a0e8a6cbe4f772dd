"""Functions of the host that code calls: with a real agent, this machine's own Python and Node.js, and code that lies."""

from __future__ import annotations

import contextlib
import gc
import runpy
import shutil
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import cast

import attrs
import pytest
import trio
import trio.lowlevel
import trio.testing

from tests._leaks import cancel_at_every_step, wait_until
from tests.documented import ROOT
from trio_sandbox import RunResult
from trio_sandbox._quiet_log import MOST_LINES
from trio_sandbox.client import _functions as functions_module
from trio_sandbox.client._functions import BadCallError, HostFunctions
from trio_sandbox.constants import CALLS_AT_ONCE, CALLS_PER_SECOND, MAXIMUM_CALL_BYTES, MAXIMUM_CALL_VALUES
from trio_sandbox.guest.agent.code import CodeService
from trio_sandbox.sandbox import Sandbox
from trio_sandbox.wire import ChannelStream, RecordStream

from ._sandbox import open_local_sandbox

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js here; tests/qemu has one")
LANGUAGES = ["python", pytest.param("javascript", marks=needs_node)]


@pytest.fixture
async def sandbox() -> AsyncGenerator[Sandbox]:
    async with open_local_sandbox() as (sandbox, _):
        yield sandbox


def search(text: str, limit: int = 2) -> list[str]:
    return [text] * limit


async def later(value: object) -> object:
    await trio.lowlevel.checkpoint()
    return value


def fail(text: str) -> None:
    raise LookupError(text)


FUNCTIONS: dict[str, Callable[..., object]] = {"search": search, "later": later, "fail": fail}

#: By language: code, and its last value.
CALLS: dict[str, dict[str, tuple[str, str | None]]] = {
    "python": {
        "sync": ("search('a') + search('b', limit=1)", "['a', 'a', 'b']"),
        "async": ("await search.aio('a', limit=1)", "['a']"),
        "many": (
            "import asyncio; await asyncio.gather(*(later.aio(n) for n in range(100))) == list(range(100))",
            "True",
        ),
        "json": (
            "later({'a': [1, 2.5, None, True, 'é\\n\\ud800'], 'b': (1,)}) == {'a': [1, 2.5, None, True, 'é\\n\\ud800'], 'b': [1]}",
            "True",
        ),
        "none": ("later(None)", None),
        "loop of its own": ("async def main():\n    return await later.aio(1)\nasyncio.run(main())", "1"),
        "thread": (
            """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool: print(sum(pool.map(later, range(200))))""",
            None,
        ),
        "large": (f"len(later('x' * {MAXIMUM_CALL_BYTES - 10}))", str(MAXIMUM_CALL_BYTES - 10)),
        "caught": (
            "try: fail('é')\nexcept HostFunctionError as exc: text = repr(exc)\ntext",
            "\"HostFunctionError('LookupError: é')\"",
        ),
        "a class": ("HostFunctionError.__mro__[1]", "<class 'RuntimeError'>"),
        "repr": ("search", "<function search of the host>"),
    },
    "javascript": {
        "promise": ("await search('a')", "[ 'a', 'a' ]"),
        "last": ("search('a', 1)", "[ 'a' ]"),
        "many": ("(await Promise.all(Array.from({length: 100}, (_, n) => later(n)))).every((x, n) => x === n)", "true"),
        "json": (
            "JSON.stringify(await later({a: [1, 2.5, null, true, 'é\\n\\ud800']}))",
            '\'{"a":[1,2.5,null,true,"é\\\\n\\\\ud800"]}\'',
        ),
        "none": ("await later(null)", "null"),
        "large": (f"(await later('x'.repeat({MAXIMUM_CALL_BYTES - 10}))).length", str(MAXIMUM_CALL_BYTES - 10)),
        "caught": (
            "try { await fail('é') } catch (error) { `${error} ${error instanceof Error}` }",
            "'HostFunctionError: LookupError: é true'",
        ),
        "name": ("search.name", "'search'"),
        "timer": ("await new Promise((done) => setTimeout(() => later(7).then(done), 5))", "7"),
    },
}


@pytest.mark.parametrize("language", LANGUAGES)
async def test_code_calls_functions(sandbox: Sandbox, language: str) -> None:
    for name, (code, value) in CALLS[language].items():
        result = await sandbox.run(code, language=language, functions=FUNCTIONS)
        assert (name, result.value, result.stderr) == (name, value, "")
        if name == "thread":
            assert result.stdout == "19900\n"


#: By language: code that fails, and how.
ERRORS: dict[str, list[tuple[str, str]]] = {
    "python": [
        ("fail('why')", "HostFunctionError: LookupError: why\n"),
        ("search()", "HostFunctionError: TypeError: search() missing 1 required positional argument: 'text'\n"),
        ("await fail.aio('why')", "HostFunctionError: LookupError: why\n"),
        (
            "search(object())",
            "TypeError: the arguments of search() must be JSON: Object of type object is not JSON serializable\n",
        ),
        (
            "search(float('nan'))",
            "TypeError: the arguments of search() must be JSON: Out of range float values are not JSON compliant",
        ),
        (
            f"search('x' * {MAXIMUM_CALL_BYTES})",
            "ValueError: the arguments of search() may have 1048576 bytes as JSON, not 1048585\n",
        ),
        (
            "search(10 ** 5000)",
            "HostFunctionError: TypeError: the arguments are no JSON that is taken here: Exceeds the limit",
        ),
        (
            f"search([0] * {MAXIMUM_CALL_VALUES + 1})",
            "HostFunctionError: TypeError: the arguments may have 20000 values; call it more often, or pass them as one text\n",
        ),
        ("many()", "HostFunctionError: ValueError: the result may have 20000 values, and has more"),
        ("strange()", "HostFunctionError: TypeError: Object of type object is not JSON serializable\n"),
        ("large()", "HostFunctionError: ValueError: the result may have 1048576 bytes as JSON, not"),
        ("search._pipes.begin('nope', (), {}, lambda answer: print(answer))\nlater(1)\n1/0", "ZeroDivisionError"),
    ],
    "javascript": [
        ("await fail('why')", "HostFunctionError: LookupError: why\n    at <run-"),
        (
            "await search()",
            "HostFunctionError: TypeError: search() missing 1 required positional argument: 'text'\n    at <run-",
        ),
        (
            "await search(() => 1)",
            "TypeError: the arguments of a function of the host's must be JSON, which () => 1 is not\n",
        ),
        ("await search(NaN)", "TypeError: the arguments of a function of the host's must be JSON, which NaN is not\n"),
        ("await search(1n)", "TypeError: Do not know how to serialize a BigInt\n"),
        (
            f"await search('x'.repeat({MAXIMUM_CALL_BYTES}))",
            "RangeError: the arguments of search() may have 1048576 bytes as JSON, not 1048585\n",
        ),
        ("await strange()", "HostFunctionError: TypeError: Object of type object is not JSON serializable\n"),
        ("await large()", "HostFunctionError: ValueError: the result may have 1048576 bytes as JSON, not"),
    ],
}


@pytest.mark.parametrize("language", LANGUAGES)
async def test_exceptions_go_both_ways(sandbox: Sandbox, language: str, caplog: pytest.LogCaptureFixture) -> None:
    functions = {
        **FUNCTIONS,
        "strange": object,
        "large": lambda: "x" * MAXIMUM_CALL_BYTES,
        "many": lambda: [0] * (MAXIMUM_CALL_VALUES + 1),
    }
    for code, error in ERRORS[language]:
        result = await sandbox.run(code, language=language, functions=functions)
        assert result.exit_code == 1, code
        assert error in result.stderr, result.stderr
        assert __file__ not in result.stderr
    assert "the function 'fail' that the code of a run has called raised an exception" in caplog.messages


async def test_code_fills_no_log_by_calls_that_fail(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    code = f"for _ in range({MOST_LINES + 30}):\n    try: fail()\n    except Exception: pass"
    result = await sandbox.run(code, functions={"fail": lambda: 1 / 0})
    assert result.exit_code == 0, result.stderr
    assert len(caplog.records) == MOST_LINES + 1
    assert caplog.messages[-1] == "30 more were not logged: there were too many"
    # The next run has its own.
    caplog.clear()
    await sandbox.run("try: fail()\nexcept Exception: pass", functions={"fail": lambda: 1 / 0})
    assert len(caplog.records) == 1


#: By language: code before, code with a function `name`, code after, and what that comes to.
NAMES: dict[str, list[tuple[str, str, str, str]]] = {
    "python": [
        ("1", "name(1)", "'name' in globals()", "False"),
        ("name = 5", "name(1)", "name", "5"),
        ("name = 5", "name = name(7)", "name", "7"),
        ("name = 5", "del name", "'name' in globals()", "False"),
        ("print = 5", "print", "name = 6; print", "5"),
    ],
    "javascript": [
        ("1", "await name(1)", "typeof name", "'undefined'"),
        ("globalThis.name = 5", "await name(1)", "name", "5"),
        ("delete globalThis.name; 1", "name = await name(7)", "name", "7"),
        ("delete globalThis.name; var name = 5", "await name(1)", "name", "5"),
        ("function name() { return 8 }", "await name(1)", "name()", "8"),
        ("let other = 5", "await other(1)", "other", "5"),
        ("const fixed = 5", "await fixed(1)", "fixed", "5"),
        ("class Thing {}", "await Thing(1)", "new Thing()", "Thing {}"),
        ("1", "let fresh = await fresh2(3)", "fresh", "3"),
        ("1", "let mine = 4; mine", "mine", "4"),
    ],
}


@pytest.mark.parametrize("language", LANGUAGES)
async def test_names_are_the_runs_own(sandbox: Sandbox, language: str) -> None:
    names = ("name", "print", "other", "fixed", "Thing", "fresh2", "mine")
    for before, code, after, value in NAMES[language]:
        await sandbox.run(before, language=language, check=True)
        await sandbox.run(code, language=language, functions=dict.fromkeys(names, later), check=True)
        result = await sandbox.run(after, language=language, check=True)
        assert (code, result.value) == (code, value)


@attrs.define
class Blocked:
    """A function that is called and does not return."""

    calls: int = 0
    cancelled: int = 0
    called: trio.Event = attrs.field(factory=trio.Event)

    async def __call__(self, *_: object) -> None:
        self.calls += 1
        self.called.set()
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled += 1


WAITING = {"python": "wait()", "javascript": "await wait()"}


@pytest.mark.parametrize("language", LANGUAGES)
async def test_calls_are_cancelled_with_the_run(sandbox: Sandbox, language: str) -> None:
    blocked = Blocked()
    await sandbox.run("x = 1", language=language)
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            await sandbox.run(WAITING[language], language=language, functions={"wait": blocked})

        nursery.start_soon(run)
        await blocked.called.wait()
        nursery.cancel_scope.cancel()
    assert (blocked.calls, blocked.cancelled) == (1, 1)
    result = await sandbox.run("x", language=language, functions=FUNCTIONS)
    assert (result.value, result.restarted) == ("1", False)


@pytest.mark.parametrize("language", LANGUAGES)
async def test_calls_are_cancelled_when_the_run_has_ended(sandbox: Sandbox, language: str) -> None:
    blocked = Blocked()
    code = {
        "python": "import threading, time; failures = []\n"
        "def call():\n    try: wait()\n    except BaseException as exc: failures.append(str(exc))\n"
        "thread = threading.Thread(target=call); thread.start(); later(1)",
        "javascript": "var failure = wait().catch((error) => error.message); later(1)",
    }[language]
    await sandbox.run(code, language=language, functions={"wait": blocked, "later": later}, check=True)
    assert blocked.cancelled == blocked.calls
    code = {"python": "thread.join(); failures[0]", "javascript": "await failure"}[language]
    result = await sandbox.run(code, language=language, functions={"wait": later})
    assert result.value == '"wait() of the host can\'t be called any more: the run that it was for is over"'


#: Code that keeps a function, and code that calls it when the run is over: in a run that has functions of its own.
LATE = {
    "python": [
        ("kept = search", "kept('x')"),
        (
            "kept = search",
            "import threading; t = threading.Thread(target=kept, args=['x']); t.start(); t.join(); kept('x')",
        ),
        ("kept = search", "await kept.aio('x')"),
    ],
    "javascript": [
        ("var kept = search", "await kept('x')"),
        (
            "var kept = search; var done; var late = new Promise((r) => done = r); setTimeout(() => done(kept('x')), 20); 1",
            "await late",
        ),
    ],
}


@pytest.mark.parametrize("language", LANGUAGES)
async def test_calls_after_the_run_fail(sandbox: Sandbox, language: str) -> None:
    calls: list[object] = []
    for keep, call in LATE[language]:
        await sandbox.run(keep, language=language, functions={"search": calls.append}, check=True)
        result = await sandbox.run(call, language=language, functions={"search": calls.append})
        assert result.exit_code == 1, call
        assert "search() of the host can't be called any more: the run that it was for is over" in result.stderr
    assert calls == []


async def test_a_forked_child_can_call_nothing(sandbox: Sandbox) -> None:
    code = """
import os
def call():
    try:
        search("x")
    except RuntimeError as exc:
        print(exc, flush=True)
search("x")
if (pid := os.fork()) == 0:
    call()
    os._exit(0)
os.waitpid(pid, 0)
search("x", 1)
"""
    result = await sandbox.run(code, functions=FUNCTIONS, check=True)
    assert result.stdout == "search() of the host can't be called in a process that the run's own has forked off\n"
    assert result.value == "['x']"


async def test_a_forked_child_that_outlives_its_run_can_call_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    code = """
import os, pathlib, time
directory = pathlib.Path({!r})
search("x")
if os.fork() == 0:
    while not (directory / "go").exists():
        time.sleep(0.01)
    try:
        search("x")
    except RuntimeError as exc:
        (directory / "new").write_text(str(exc))
    (directory / "new").rename(directory / "said")
    os._exit(0)
"""
    await sandbox.run(code.format(str(tmp_path)), functions=FUNCTIONS, check=True)
    calls: list[object] = []

    async def wait() -> None:
        (tmp_path / "go").touch()
        await wait_until((tmp_path / "said").exists)

    # Nor does it get hold of those of a later run.
    await sandbox.run("wait()", functions={"search": calls.append, "wait": wait}, check=True)
    assert (
        "search() of the host can't be called in a process that the run's own has forked off"
        in (tmp_path / "said").read_text()
    )
    assert calls == []


@needs_node
async def test_in_node_a_worker_and_a_child_have_nothing_of_it(sandbox: Sandbox) -> None:
    worker = """
const { Worker } = require('worker_threads');
const asking = new Worker("require('worker_threads').parentPort.postMessage(typeof search)", { eval: true });
await new Promise((done) => asking.once('message', done))
"""
    child = "require('child_process').execFileSync('ls', ['/proc/self/fd']).toString()"
    without = await sandbox.run(child, language="javascript", check=True)
    assert (await sandbox.run(worker, language="javascript", functions=FUNCTIONS, check=True)).value == "'undefined'"
    called = await sandbox.run(f"await search('x'); {child}", language="javascript", functions=FUNCTIONS, check=True)
    assert called.value == without.value


async def test_an_executed_child_has_nothing_of_it(sandbox: Sandbox) -> None:
    code = "import os, subprocess; subprocess.run(['ls', '/proc/self/fd'], stdout=-1, close_fds=False).stdout"
    without = await sandbox.run(code)
    assert (await sandbox.run(f"search('x'); {code}", functions=FUNCTIONS)).value == without.value


async def test_code_that_closes_all_descriptors(sandbox: Sandbox) -> None:
    result = await sandbox.run("import os; os.closerange(3, 1000)\nsearch('x')", functions=FUNCTIONS)
    assert (
        "RuntimeError: search() of the host can't be called: this process has closed all descriptors" in result.stderr
    )


@pytest.mark.parametrize("language", LANGUAGES)
async def test_few_calls_are_underway_at_once(sandbox: Sandbox, language: str) -> None:
    underway = most = 0
    release = trio.Event()

    async def call(n: int) -> int:
        nonlocal underway, most
        underway += 1
        most = max(most, underway)
        if underway == CALLS_AT_ONCE:
            await trio.testing.wait_all_tasks_blocked(0.01)
            release.set()
        await release.wait()
        underway -= 1
        return n

    code = {
        "python": "import asyncio; sum(await asyncio.gather(*(call.aio(n) for n in range(48))))",
        "javascript": "(await Promise.all(Array.from({length: 48}, (_, n) => call(n)))).reduce((x, y) => x + y)",
    }[language]
    result = await sandbox.run(code, language=language, functions={"call": call})
    assert (result.value, result.stderr, most) == ("1128", "", CALLS_AT_ONCE)


@attrs.define
class Flood:
    """A stream by which code makes calls as fast as it can."""

    calls: int

    async def __aiter__(self) -> AsyncGenerator[bytes]:
        await trio.lowlevel.checkpoint()
        yield b"1 note [[],{}]\n" * self.calls
        await trio.sleep_forever()

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()


async def test_calls_come_at_a_rate(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    times: list[float] = []
    functions = HostFunctions({"note": lambda: times.append(trio.current_time())})
    start, count = trio.current_time(), int(3 * CALLS_PER_SECOND)
    async with functions.served(cast("ChannelStream", Flood(count))):
        while len(times) < count:
            await trio.sleep(0.1)
    for second in (1, 2):
        assert 0 < sum(time <= start + second for time in times) <= CALLS_AT_ONCE + second * CALLS_PER_SECOND + 1


@pytest.mark.parametrize(
    "data",
    [
        "b'x\\n'",
        "b'1 search\\n'",
        "b'x' * (1 << 21)",
        "b'\\xff\\xfe\\n' * 1000",
        "b'1 search [] []\\n' b'-1 search []\\n'",
    ],
)
async def test_code_that_writes_what_is_no_call(sandbox: Sandbox, data: str, caplog: pytest.LogCaptureFixture) -> None:
    code = f"import os\nd = memoryview({data})\ntry:\n    while d: d = d[os.write(search._pipes._calls.number, d):]\nexcept OSError: pass\nsearch('x')"
    result = await sandbox.run(code, functions=FUNCTIONS)
    assert "RuntimeError: search() of the host can't be called any more" in result.stderr
    assert "can call no functions of the host any more" in caplog.text
    assert (await sandbox.run("search('x', 1)", functions=FUNCTIONS)).value == "['x']"


async def test_code_that_makes_strange_calls(sandbox: Sandbox) -> None:
    """Numbers that are used twice, names that are none, arguments that are none: each has its answer, and nothing else suffers."""
    code = r"""
import os
def ask(line):
    os.write(search._pipes._calls.number, line)
    return os.read(search._pipes._answers.number, 1000)
for line in (b'7 search [["a"],{}]', b'7 search [["a"],{}]', b'8 nope [[],{}]', b'9 search [', b'10 search [[[["%s' % (b'[' * 9000),
             b'11 search {}', b'12 search [[],{"__class__":1}]'):
    print(ask(line + b'\n').decode()[:60], end='\n')
"""
    result = await sandbox.run(code, functions=FUNCTIONS, check=True)
    lines = [line for line in result.stdout.splitlines() if line]
    assert lines[:3] == ['7 r ["a","a"]', '7 r ["a","a"]', '8 e "NameError: no function nope"']
    assert [line.split(":")[0] for line in lines[3:]] == [f'{number} e "TypeError' for number in (9, 10, 11, 12)]


async def test_code_that_leaves_half_a_call(sandbox: Sandbox) -> None:
    code = "import os; os.write(search._pipes._calls.number, b'1 search [[')"
    assert (await sandbox.run(code, functions=FUNCTIONS)).exit_code == 0
    assert (await sandbox.run("search('x', 1)", functions=FUNCTIONS)).value == "['x']"


async def test_code_that_reads_no_answers(sandbox: Sandbox) -> None:
    """Calls end with the run although nobody took what they came to."""
    code = (
        "import os\nos.set_blocking(search._pipes._calls.number, False)\n"
        "try:\n    while True: os.write(search._pipes._calls.number, b'1 large [[],{}]\\n')\nexcept BlockingIOError: pass"
    )
    functions: dict[str, Callable[..., object]] = {"search": search, "large": lambda: "x" * 1_000_000}
    assert (await sandbox.run(code, functions=functions)).exit_code == 0
    assert (await sandbox.run("search('x', 1)", functions=functions)).value == "['x']"


@pytest.mark.parametrize("language", LANGUAGES)
async def test_an_interpreter_that_ends_in_a_call(sandbox: Sandbox, language: str) -> None:
    blocked = Blocked()
    code = {
        "python": "import os, threading; threading.Thread(target=wait).start(); later(1); os._exit(7)",
        "javascript": "wait(); await later(1); process.exit(7)",
    }[language]
    result = await sandbox.run(code, language=language, functions={"wait": blocked, "later": later})
    assert (result.exit_code, result.state_kept) == (7, False)
    assert blocked.calls == blocked.cancelled


@pytest.mark.parametrize("language", LANGUAGES)
async def test_a_function_that_would_wait_for_its_own_run_is_told(sandbox: Sandbox, language: str) -> None:
    async def nested() -> str:
        async def inner() -> None:
            await sandbox.run("1")

        async with trio.open_nursery() as nursery:  # noqa: ASYNC112 - it is a task of its own that asks
            nursery.start_soon(inner)
        return "unreachable"

    async def direct() -> str:
        return str(await sandbox.run("1"))

    code = {"python": "direct()", "javascript": "await direct()"}[language]
    result = await sandbox.run(code, language=language, functions={"direct": direct})
    assert "HostFunctionError: RuntimeError: a run of this sandbox calls this function" in result.stderr
    result = await sandbox.run(code, language=language, functions={"direct": nested})
    assert "HostFunctionError: ExceptionGroup" in result.stderr


async def test_a_function_may_use_its_sandbox_otherwise(sandbox: Sandbox) -> None:
    async def other(nursery_of_the_program: trio.Nursery) -> str:
        nursery_of_the_program.start_soon(sandbox.run, "print(1)")  # it waits for this run's end, and nobody for it
        completed = await sandbox.run_process(["echo", "fine"], capture_stdout=True)
        return completed.stdout.decode()

    async with trio.open_nursery() as nursery:
        result = await sandbox.run("other()", functions={"other": lambda: other(nursery)})
    assert result.value == "'fine\\n'"
    assert [output.stdout for output in sandbox.recent_runs()] == ["", "1\n"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
async def test_what_ends_the_program_ends_the_run(sandbox: Sandbox, error: type[BaseException]) -> None:
    def end() -> None:
        raise error

    with pytest.raises(error):
        await sandbox.run("end()", functions={"end": end})
    assert (await sandbox.run("1")).value == "1"


async def test_functions_are_called_while_nobody_asks_for_events(sandbox: Sandbox) -> None:
    called = trio.Event()
    async with sandbox.stream("done(); print(1)", functions={"done": called.set}) as events:
        await called.wait()
        assert [type(event).__name__ async for event in events] == ["OutputChunk", "RunResult"]


async def test_nothing_is_kept_of_functions_that_cannot_be_called(sandbox: Sandbox) -> None:
    class Tool:
        def __call__(self) -> int:
            return 1

    tool = Tool()
    gone = weakref.ref(tool)
    await sandbox.run("tool()", functions={"tool": tool})
    await sandbox.run("1")
    del tool
    gc.collect()
    assert gone() is None


async def test_the_documented_tools_of_an_agent(sandbox: Sandbox) -> None:
    example = runpy.run_path(str(ROOT / "docs" / "examples" / "agent_tools.py"))
    assert await example["answer"](sandbox, example["CODE"]) == "ada 9.0\nbob 2.5\n"
    assert "ValueError: no customer 'eve'" in await example["answer"](sandbox, "orders_of('eve')")


async def test_what_can_be_no_functions_is_refused_before_anything_is_sent(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match="can't be called from a shell"):
        await sandbox.run("true", language="shell", functions=FUNCTIONS)
    with pytest.raises(ValueError, match="must be free"):
        await sandbox.run("1", functions={"class": later})
    assert sandbox.last_output.outcome == "unsent"


async def test_a_run_that_is_refused(sandbox: Sandbox) -> None:
    with pytest.raises(FileNotFoundError):
        await sandbox.run("1", cwd="/nowhere", functions=FUNCTIONS)
    result = await sandbox.run("'search' in globals()")
    assert (result.value, result.restarted) == ("False", False)


@pytest.mark.parametrize("text", [b"[[1], {}]", b"no JSON"])
async def test_arguments_that_take_long_to_read_leave_others_as_long(
    text: bytes, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter(range(0, 100, 5))  # each look at the clock is 5 s after the one before
    monkeypatch.setattr(functions_module, "perf_counter", lambda: next(looks))
    functions = HostFunctions({})
    started = trio.current_time()

    async def read() -> None:
        with contextlib.suppress(BadCallError):
            await functions._parse(text)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(read)
    assert trio.current_time() - started == pytest.approx(15), "one after the other"


CANCELLED: dict[str, Callable[[Sandbox], Awaitable[RunResult]]] = {
    "python": lambda sandbox: sandbox.run("search('x'); later(1)", functions=FUNCTIONS),
    "with input": lambda sandbox: sandbox.run("search(input()); later(1)", stdin=b"hello\n", functions=FUNCTIONS),
    "asyncio": lambda sandbox: sandbox.run("await later.aio(1); await later.aio(1)", functions=FUNCTIONS),
    "javascript": lambda sandbox: sandbox.run(
        "await later(1); search('x')", language="javascript", functions=FUNCTIONS
    ),
}


@pytest.mark.parametrize("every_task", [False, True], ids=["own steps", "all steps"])
@pytest.mark.parametrize("name", CANCELLED)
async def test_cancelled_at_any_point_it_leaves_an_interpreter_that_takes_runs(name: str, every_task: bool) -> None:
    if name == "javascript" and shutil.which("node") is None:
        pytest.skip("there is no Node.js here; tests/qemu has one")
    language = "javascript" if name == "javascript" else "python"
    # Whether variables survive is a question of when an interrupt comes, in an event loop: see test_run_cancellation.
    async with open_local_sandbox() as (sandbox, machine):
        results: list[RunResult] = []

        async def look() -> None:
            results.append(await sandbox.run("12345", language=language))

        runs = await cancel_at_every_step(lambda: CANCELLED[name](sandbox), check=look, every_task=every_task)
        assert [result.value for result in results] == ["12345"] * runs
        assert machine.failure is None


async def test_a_run_without_functions_says_nothing_of_them(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[object] = []
    begin = CodeService._begin

    def note(self: CodeService, records: RecordStream, request: object) -> Awaitable[None] | None:
        requests.append(request)
        return begin(self, records, request)

    monkeypatch.setattr(CodeService, "_begin", note)
    await sandbox.run("1")
    await sandbox.run("1", functions={})
    await sandbox.run("1", functions={"search": search})
    assert ["functions" in str(request) for request in requests] == [False, False, True]
