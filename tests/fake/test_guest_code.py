"""The service "code": what runs print and come to, and that no run can spoil the next."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import stat
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path

import attrs
import pytest
import trio

from trio_sandbox.guest.agent import languages
from trio_sandbox.guest.agent.languages import PYTHON, start_interpreter
from trio_sandbox.wire import STDERR, STDOUT, StreamResetError

from ._agent import Host, Ran, let_short_runs_end, open_agent, read_all, send_for_ever

#: In code.
NULL_BYTE_ERROR = "ValueError" if sys.version_info < (3, 11, 4) else "SyntaxError"


@pytest.fixture
async def host() -> AsyncGenerator[Host]:
    async with open_agent() as host:
        yield host


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `let_short_runs_end`."""
    let_short_runs_end(monkeypatch)


def ran(stdout: str = "", stderr: str = "", exit_code: int = 0) -> Ran:
    """A run that the interpreter survived, as those before."""
    return Ran(stdout, stderr, exit_code, restarted=False, state_kept=True)


#: Code, and what it comes to.
RESULTS = {
    "nothing": ("", ran()),
    "no names of ours": ("print([name for name in globals() if not name.startswith('__')])", ran("[]\n")),
    "output": ("print(6 * 7)", ran("42\n")),
    "no newline": ("print('a', end='')", ran("a")),
    "buffered": ("import sys; sys.stdout.buffer.write(b'x'); sys.stdout.write('y')", ran("xy")),
    "both streams": ("import sys; print('o'); print('e', file=sys.stderr)", ran("o\n", "e\n")),
    "main": ("print(__name__)", ran("__main__\n")),
    "arguments": ("import sys; print(sys.argv, repr(sys.path[0]))", ran("[''] ''\n")),
    "exception": (
        "def f():\n    1 / 0\n\nf()",
        ran(
            "",
            'Traceback (most recent call last):\n  File "<run 1>", line 4, in <module>\n    f()\n'
            '  File "<run 1>", line 2, in f\n    1 / 0\n    ~~^~~\nZeroDivisionError: division by zero\n',
            1,
        ),
    ),
    "syntax error": (
        "x = \n",
        ran("", '  File "<run 1>", line 1\n    x = \n        ^\nSyntaxError: invalid syntax\n', 1),
    ),
    "null byte": ("x = '\0'", ran("", f"{NULL_BYTE_ERROR}: source code string cannot contain null bytes\n", 1)),
    "multi-line expression": (
        "x = [\n    1,\n    undefined,\n]",
        ran(
            "",
            'Traceback (most recent call last):\n  File "<run 1>", line 3, in <module>\n    undefined,\n    ^^^^^^^^^\n'
            "NameError: name 'undefined' is not defined\n",
            1,
        ),
    ),
    "unprintable": (
        "class E(Exception):\n    def __str__(self): raise SystemExit(9)\nraise E",
        ran(
            "",
            'Traceback (most recent call last):\n  File "<run 1>", line 3, in <module>\n    raise E\n'
            "E: <exception str() failed>\n",
            1,
        ),
    ),
    "sys.exit": ("import sys; sys.exit(3)", ran("", "", 3)),
    "exit": ("exit()", ran()),
    "exit text": ("def f(): exit('bye')\nf()", ran("", "bye\n", 1)),
    "exit big": ("raise SystemExit(256 + 7)", ran("", "", 7)),
    "exit negative": ("raise SystemExit(-1)", ran("", "", 255)),
    "exit true": ("raise SystemExit(True)", ran("", "", 1)),
    "exit object": (
        "class X:\n    def __str__(self): 1 / 0\nraise SystemExit(X())",
        ran("", "SystemExit\n", 1),
    ),
    "keyboard interrupt": (
        "raise KeyboardInterrupt",
        ran(
            "",
            'Traceback (most recent call last):\n  File "<run 1>", line 1, in <module>\n    raise KeyboardInterrupt\n'
            "KeyboardInterrupt\n",
            130,
        ),
    ),
    "invalid utf-8": ("import os; os.write(1, b'\\xff\\n')", ran("\ufffd\n")),
    "look-alikes": (
        """print('J\\0\\0\\0\\x02{}{"finished":{"exit_code":9}}D\\0\\0\\0\\1\\0')""",
        ran('J\0\0\0\x02{}{"finished":{"exit_code":9}}D\0\0\0\1\0\n'),
    ),
    "own hook": (
        "import sys\nsys.excepthook = lambda *a: print(a[0].__name__, a[2].tb_lineno)\n1 / 0",
        ran("ZeroDivisionError 3\n", "", 1),
    ),
    "broken hook": (
        "import sys\nsys.excepthook = 5\n1 / 0",
        ran(
            "",
            "Error in sys.excepthook:\nTypeError: 'int' object is not callable\n\nOriginal exception was:\n"
            'Traceback (most recent call last):\n  File "<run 1>", line 3, in <module>\n    1 / 0\n    ~~^~~\n'
            "ZeroDivisionError: division by zero\n",
            1,
        ),
    ),
    "end of input": ("import sys; print(repr(sys.stdin.read()))", ran("''\n")),
    "asyncio": ("import asyncio\nasync def f(): print('in')\nasyncio.run(f())", ran("in\n")),
    "pickle": ("import pickle\nclass C: pass\nprint(type(pickle.loads(pickle.dumps(C()))) is C)", ran("True\n")),
    "fork": (
        (
            "import os, sys\nif os.fork() == 0:\n    print('child')\n    sys.exit(3)\n"
            "print(os.waitstatus_to_exitcode(os.wait()[1]))"
        ),
        ran("child\n3\n"),
    ),
    "fork that falls through": (
        "import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)\nprint('once each')",
        ran("once each\nonce each\n"),
    ),
    "multiprocessing": (
        (
            "import multiprocessing as m\ndef f(x): return x * x\n"
            "with m.get_context('fork').Pool(2) as pool: print(pool.map(f, [1, 2, 3]))"
        ),
        ran("[1, 4, 9]\n"),
    ),
    "subprocess": ("import subprocess; subprocess.run(['echo', 'hi'], check=True)", ran("hi\n")),
}


def unify(result: Ran) -> Ran:
    """Leave out what differs: the numbers of runs, and where Python marks a part of a line, on which its versions differ."""
    numbered = re.sub(r"<run \d+>", "<run 1>", result.stderr)
    return attrs.evolve(result, stderr=re.sub(r"^ +[~^]+\n", "", numbered, flags=re.MULTILINE))


async def test_runs_come_to_what_scripts_would(host: Host) -> None:
    # In one interpreter, since starting one takes longer than everything else; none spoils the next.
    results: dict[str, Ran] = {}
    for name, (code, _) in RESULTS.items():
        result = await host.run(code)
        results[name] = unify(result)
    assert results == {name: unify(expected) for name, (_, expected) in RESULTS.items()}


@pytest.mark.usefixtures("waits")
async def test_runs_that_are_over_at_once_come_to_the_same(host: Host, tmp_path: Path) -> None:
    for name, (code, expected) in RESULTS.items():
        result = await host.run(code)
        assert unify(result) == unify(expected), name
    # More than is left to the channel, and more than a pipe holds.
    for size in (20_000, 200_000):
        assert await host.run(f"print('x' * {size})") == ran("x" * size + "\n")
    # Something goes on to hold the pipes.
    assert await host.run("import subprocess; child = subprocess.Popen(['sleep', '60']); print(1)") == ran("1\n")
    assert await host.run("child.kill()") == ran()
    async with host.open_run("print(1)", cwd=str(tmp_path / "none")) as run:
        assert (await run.failure())["errno"] == errno.ENOENT
    assert await host.run("import os; print('last'); os._exit(3)") == Ran(
        "last\n", "", 3, restarted=False, state_kept=False
    )
    assert await host.run("print(1)") == Ran("1\n", "", 0, restarted=True, state_kept=True)


@pytest.mark.usefixtures("waits")
async def test_a_host_that_reads_late_gets_all_that_runs_printed_at_once(host: Host) -> None:
    await host.run("pass")
    # All are sent in one write, so that the agent reads the next while the last one's end has yet to be written.
    async with AsyncExitStack() as stack:
        runs = [await stack.enter_async_context(host.open_run(f"print({number})")) for number in range(50)]
        results = [await run.finish() for run in runs]
    assert results == [ran(f"{number}\n") for number in range(50)]


async def test_source_that_can_not_be_encoded_is_an_error_of_the_code(host: Host) -> None:
    result = await host.run("print('\ud800')")
    assert result.exit_code == 1
    assert "UnicodeEncodeError" in result.stderr
    assert await host.run("print(ascii('\\ud800'))") == ran("'\\ud800'\n")


async def test_errors_that_exhaust_something_are_results_as_well(host: Host) -> None:
    result = await host.run("def f(): f()\nf()")
    assert result.exit_code == 1
    assert result.stderr.count("\n") < 30
    assert "[Previous line repeated" in result.stderr
    assert result.stderr.endswith("RecursionError: maximum recursion depth exceeded\n")
    result = await host.run("b'x' * (1 << 60)")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "MemoryError")


async def test_state_persists_and_each_run_has_source_of_its_own_in_tracebacks(host: Host) -> None:
    assert await host.run("import math\ndef f(x):\n    return 1 / x") == ran()
    assert await host.run("print(f(4), math.pi)") == ran("0.25 3.141592653589793\n")
    result = await host.run("f(0)")
    assert '  File "<run 3>", line 1, in <module>\n    f(0)\n' in result.stderr
    assert '  File "<run 1>", line 3, in f\n    return 1 / x\n' in result.stderr
    result = await host.run("import traceback\ntry: f(0)\nexcept Exception: traceback.print_exc()")
    assert '  File "<run 4>", line 2, in <module>\n    try: f(0)\n' in result.stderr


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("import os; print('last'); os._exit(3)", 3),
        ("import os, sys; sys.stdout.write('last\\n'); sys.stdout.flush(); os.kill(os.getpid(), 11)", 128 + 11),
        ("import os; print('last'); os.kill(os.getpid(), 9)", 128 + 9),
        ("import os; print('last'); os.abort()", 128 + 6),
        # It closes our socket: the run goes on, and the interpreter ends after it.
        ("import os; os.closerange(3, 5000); print('last'); exit(4)", 4),
        ("import os; os.closerange(3, 5000); f = [open('/dev/null') for _ in range(200)]; print('last')", 0),
    ],
)
async def test_an_interpreter_that_ended_is_replaced(host: Host, code: str, exit_code: int) -> None:
    await host.run("x = 1")
    assert await host.run(code) == Ran("last\n", "", exit_code, restarted=False, state_kept=False)
    assert await host.run("print('x' in globals())") == Ran("False\n", "", 0, restarted=True, state_kept=True)
    assert await host.run("print(2)") == ran("2\n")


@pytest.mark.parametrize(
    "code",
    [
        "print = exit = len = None",
        "import builtins\nfor name in list(vars(builtins)): setattr(builtins, name, None)",
        "import sys\nsys.modules.clear()",
        "import sys\ndel sys.stdout, sys.stderr, sys.stdin",
        "import sys\nsys.stdout = sys.stderr = sys.stdin = None",
        "import sys\nsys.stdout.close(); sys.stderr.close(); sys.stdin.close()",
        "import os\nos.closerange(0, 3)",
        "import os\nos.dup2 = os.read = os.close = os.fstat = os.getpid = None",
        "import sys\nsys.stdout.write('x' * 5); sys.stdout.detach()",
        "globals().clear()",
        "import sys\nsys.excepthook = sys.displayhook = None",
        "import linecache\nlinecache.cache = None",
        "import signal\nsignal.signal = None",
        "import sys\nsys.setrecursionlimit(60)",
        "import os\nos.chdir('/')\nos.environ.clear()",
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()",
        "import sys\nsys.settrace(lambda *a: 1 / 0)",
        "import gc, sys\nsys.setswitchinterval(1e-6); gc.disable()",
        "raise BaseException",
    ],
)
async def test_what_code_breaks_does_not_break_the_next_run(host: Host, code: str) -> None:
    await host.run(code)
    result = await host.run("import os, sys\nos.write(1, b'1')\nos.write(2, b'2')\nsys.exit(5)")
    if "builtins" in code or "modules.clear" in code or "linecache" in code:
        # `import` is the code's own loss. What we do works on.
        assert not result.restarted
        assert (await host.run("exit = 5\nraise SystemExit(exit)" if "modules" in code else "x = 5")).state_kept
    else:
        assert (result.stdout, result.stderr, result.exit_code) == ("1", "2", 5)


async def test_code_can_use_a_stream_of_its_own_across_runs(host: Host) -> None:
    await host.run("import io, sys\nreal = sys.stdout\nsys.stdout = io.StringIO()")
    assert await host.run("print('kept')") == ran()
    assert await host.run("text = sys.stdout.getvalue()\nsys.stdout = real\nprint(text)") == ran("kept\n\n")


async def test_output_of_any_size_comes_complete_and_in_order(host: Host) -> None:
    async with host.open_run(
        "import os\nfor i in range(1000):\n    os.write(1, b'%08d' % i * 512)\n    os.write(2, b'%08d' % i * 512)"
    ) as run:
        result = await run.finish()
    expected = "".join(f"{i:08}" * 512 for i in range(1000))
    assert (result.stdout, result.stderr, result.exit_code) == (expected, expected, 0)


async def test_both_streams_keep_the_order_in_which_they_were_written(host: Host) -> None:
    async with host.open_run(
        "import os\nfor i in range(20):\n    os.write(1 + i % 2, b'%d' % i)\n    input()",
        stdin=(pipe := host.open_pipe()).id,
    ) as run:
        for number in range(20):
            while len(run.arrivals) <= number:
                await run.receive()
            await pipe.send_all(b"\n")
        await run.finish()
    assert run.arrivals == [((STDOUT, STDERR)[i % 2], b"%d" % i) for i in range(20)]


async def test_a_host_that_does_not_read_makes_the_code_wait(host: Host, tmp_path: Path) -> None:
    done = tmp_path / "done"
    before = host.channel.statistics().bytes_received
    async with host.open_run(
        f"import os\nfor i in range(800): os.write(1, b'x' * 65536)\nopen({str(done)!r}, 'w').close()"
    ) as run:
        await run.receive()
        for _ in range(3):  # meanwhile other streams go on
            assert await host.run_process(["echo", "hi"]) == (0, b"hi\n")
        assert not done.exists()
        assert host.channel.statistics().bytes_received - before < 2**20
        result = await run.finish()
        assert len(result.stdout) == 800 * 65536
    assert done.exists()


async def test_input_is_a_stream_of_the_host(host: Host) -> None:
    for text in (b"one\ntwo\n", b"three\n"):
        pipe = host.open_pipe()
        async with host.open_run("import sys\nprint(input() + '!')\nprint(sys.stdin.read())", stdin=pipe.id) as run:
            await pipe.send_all(text)
            await pipe.send_eof()
            result = await run.finish()
        first, _, rest = text.decode().partition("\n")
        assert result == ran(f"{first}!\n{rest}\n")
        pipe.close()
    assert (await host.run("input()")).stderr.endswith("EOFError: EOF when reading a line\n")


async def test_input_that_nobody_reads_is_given_up(host: Host) -> None:
    pipe = host.open_pipe()
    async with host.open_run("print('no')", stdin=pipe.id) as run:
        assert await run.finish() == ran("no\n")
        with pytest.raises(trio.BrokenResourceError):
            await send_for_ever(pipe)


async def test_code_of_several_megabytes(host: Host) -> None:
    text = "é" * 2_000_000
    assert await host.run(f"text = '{text}'\nprint(len(text))") == ran("2000000\n")


async def test_environment_and_directory_are_those_of_one_run(host: Host, tmp_path: Path) -> None:
    code = "import os; print(os.environ.get('GREETING'), os.environ['KEPT'], os.getcwd())"
    await host.run("import os; os.environ['KEPT'] = 'old'; here = os.getcwd()")
    env = {"GREETING": "hello", "KEPT": "new"}
    expected = ran(f"hello new {tmp_path}\n")
    assert await host.run(code, env=env, cwd=str(tmp_path)) == expected
    # Whatever the code did to them meanwhile, and however it ended.
    for change in ("os.chdir('/'); os.environ['KEPT'] = 'x'; del os.environ['GREETING']", "1 / 0", "exit(3)"):
        await host.run(f"import os\nos.environ['MORE'] = 'stays'\n{change}", env=env, cwd=str(tmp_path))
        assert (await host.run(code)).stdout == f"None old {os.getcwd()}\n"
    assert await host.run("print(os.environ['MORE'], os.getcwd() == here)") == ran("stays True\n")
    # Where the code goes by itself it stays.
    assert await host.run("os.chdir('/')", env={"GREETING": "hello"}) == ran()
    assert (await host.run(code)).stdout == "None old /\n"


async def test_a_directory_that_is_gone_is_come_back_to_as_well(host: Host, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    await host.run(f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})")
    assert await host.run("print(os.getcwd())", cwd="/") == ran("/\n")
    assert (await host.run("os.getcwd()")).stderr.splitlines()[-1].startswith("FileNotFoundError")


async def test_a_run_that_is_refused_changes_neither_environment_nor_directory(host: Host, tmp_path: Path) -> None:
    await host.run("import os; here = os.getcwd()")
    for request in (
        {"env": {"A": "1"}, "cwd": str(tmp_path / "none")},
        {"env": {"A": "1", "": "x"}, "cwd": str(tmp_path)},
        {"env": {"A": "1", "B=": "x"}},
        {"env": {"A": "1", "B": "nul\0"}},
        {"env": {"A": "1", "B": "\ud800"}},
    ):
        async with host.open_run("print(1)", **request) as run:
            assert (await run.failure())["errno"] in (errno.ENOENT, errno.EINVAL)
    assert await host.run("print('A' in os.environ, 'B' in os.environ, os.getcwd() == here)") == ran(
        "False False True\n"
    )


async def test_a_directory_or_variable_that_can_not_be_is_refused(host: Host, tmp_path: Path) -> None:
    await host.run("x = 1")
    async with host.open_run("print(1)", cwd=str(tmp_path / "none")) as run:
        failure = await run.failure()
    assert failure == {"errno": errno.ENOENT, "strerror": os.strerror(errno.ENOENT), "filename": str(tmp_path / "none")}
    async with host.open_run("print(1)", env={"": "x"}) as run:
        assert (await run.failure())["errno"] == errno.EINVAL
    assert await host.run("print(x)") == ran("1\n")


# --- The background ---


async def test_what_prints_in_the_background_delays_nothing_and_is_not_hurt(host: Host) -> None:
    code = """
import os, subprocess, threading
go = threading.Event()
def late():
    go.wait()
    print('from the thread')
thread = threading.Thread(target=late)
thread.start()
read, write = os.pipe()
child = subprocess.Popen(['sh', '-c', f'read x; seq 100000; echo done >/dev/fd/{write}'], stdin=subprocess.PIPE, pass_fds=[write])
print('run')
"""
    assert await host.run(code) == ran("run\n")
    # The thread prints to whatever run is the current one; the child has its own run's pipe, which is read to its end.
    code = (
        "go.set(); thread.join()\nchild.stdin.write(b'\\n'); child.stdin.close()\nprint(os.read(read, 9), child.wait())"
    )
    assert await host.run(code) == ran("from the thread\nb'done\\n' 0\n")


async def test_more_pipes_left_behind_than_are_worth_reading(host: Host) -> None:
    await host.run("import subprocess\nchildren = []")
    for _ in range(40):
        assert await host.run("children.append(subprocess.Popen(['cat'], stdin=subprocess.PIPE)); print(1)") == ran(
            "1\n"
        )
    # Two pipes a run: the oldest were closed, and their holders find that out when they write.
    code = "for child in children: child.stdin.write(b'x'); child.stdin.close()\nprint(children[0].wait(), children[-1].wait())"
    assert await host.run(code) == ran(f"{-signal.SIGPIPE} 0\n")


# --- Interrupting and killing ---


@pytest.mark.parametrize(
    "code", ["while True: pass", "import time; time.sleep(1000)", "import os\nwhile True: os.write(1, b'x' * 9999)"]
)
async def test_an_interrupt_ends_the_run_and_keeps_the_state(host: Host, code: str) -> None:
    await host.run("x = 1")
    async with host.open_run(f"print('go')\n{code}") as run:
        await run.until(b"go\n")
        await run.interrupt()
        result = await run.finish()
    assert (result.exit_code, result.restarted, result.state_kept) == (130, False, True)
    assert result.stderr.endswith("KeyboardInterrupt\n")
    assert await host.run("print(x)") == ran("1\n")


async def test_an_interrupt_reaches_what_the_code_waits_for(host: Host) -> None:
    async with host.open_run("import os\nprint(os.system('echo go; exec sleep 1000'))") as run:
        await run.until(b"go\n")
        await run.interrupt()
        result = await run.finish()
    # The child got it, or we would wait for it still.
    assert (result.stdout, result.exit_code, result.state_kept) == ("go\n", 130, True)


async def test_an_interrupt_that_comes_before_the_code_is_not_lost(host: Host) -> None:
    # The first run: the interpreter is still starting.
    for number in (1, 2, 3):
        async with host.open_run("while True: pass") as run:
            await run.interrupt()
            result = await run.finish()
        assert (result.exit_code, result.restarted, result.state_kept) == (130, False, True)
        assert await host.run(f"print({number})") == ran(f"{number}\n")


async def test_an_interrupt_that_python_does_not_look_for_any_more_ends_the_run(host: Host) -> None:
    # Another thread takes the signal, so that the main one sleeps on: as where it comes just before a system call.
    code = (
        "import signal, threading, time\nkept = 1\nthreading.Thread(target=time.sleep, args=(5,), daemon=True).start()\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})\n"
        "try:\n    print('go')\n    time.sleep(1000)\nfinally:\n    time.sleep(0.5)  # not cut short\n    print('cleaned up')"
    )
    async with host.open_run(code) as run:
        await run.until(b"go")
        await run.interrupt()
        result = await run.finish()
    assert (result.stdout, result.exit_code, result.state_kept) == ("go\ncleaned up\n", 130, True)
    assert (await host.run("print(kept)")).stdout == "1\n"


async def test_an_interrupt_at_any_instant_hits_its_own_run_or_nothing(host: Host) -> None:
    await host.run("x = 1")
    for number in range(60):
        # Some end by themselves at about that time, and some never.
        endless = number % 10 == 9
        loop = "while True: pass" if endless else f"for i in range({number * 40}): pass"
        async with host.open_run(f"print('a')\n{loop}\nprint('b')") as run:
            if number % 3:
                await run.until(b"a\n" if endless else (b"a\n", b"b\n")[number % 2])
            await run.interrupt()
            result = await run.finish()
        assert result.exit_code in ((130,) if endless else (0, 130))
        assert result.state_kept
        if result.exit_code == 130:
            assert result.stderr.endswith("KeyboardInterrupt\n")
        assert await host.run("print(x)") == ran("1\n")


async def test_an_interrupt_of_the_traceback_ends_the_run(host: Host) -> None:
    async with host.open_run(
        "class E(Exception):\n    def __str__(self):\n        print('go')\n        while True: pass\nraise E"
    ) as run:
        await run.until(b"go\n")
        await run.interrupt()
        result = await run.finish()
    assert result.exit_code == 1
    assert await host.run("print(1)") == ran("1\n")


async def test_trio_and_asyncio_take_interrupts_as_they_do_in_a_script(host: Host) -> None:
    site = str(Path(trio.__file__).parent.parent)
    await host.run(f"import sys; sys.path.append({site!r})\nimport asyncio, signal, trio")
    for library in ("trio", "asyncio"):
        code = (
            f"async def main():\n    try:\n        print('go')\n        await {library}.sleep(1000)\n    finally: print('clean')\n"
            f"{library}.run(main{'()' if library == 'asyncio' else ''})"
        )
        async with host.open_run(code) as run:
            await run.until(b"go\n")
            await run.interrupt()
            result = await run.finish()
        assert (result.stdout, result.exit_code) == ("go\nclean\n", 130)
    assert await host.run("print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)") == ran("True\n")


async def test_a_handler_of_the_code_stays_in_force_and_away_from_us(host: Host) -> None:
    await host.run("import signal, time\nhits = []\nsignal.signal(signal.SIGINT, lambda *a: hits.append(a))")
    async with host.open_run("print('go')\nwhile not hits: time.sleep(0.01)\nprint('hit')") as run:
        await run.until(b"go\n")
        await run.interrupt()
        assert await run.finish() == ran("go\nhit\n")
    # A handler that raises, on a signal that comes while nothing runs: it waits for the next run.
    result = await host.run("import os\ndef f(*a): raise OSError\nsignal.signal(signal.SIGALRM, f)\nprint(os.getpid())")
    os.kill(int(result.stdout), signal.SIGALRM)
    result = await host.run("print(1)")
    assert (result.exit_code, result.stderr.splitlines()[-1], result.state_kept) == (1, "OSError", True)
    assert await host.run("print(1)") == ran("1\n")


@pytest.mark.parametrize("code", ["", "import ctypes; ctypes.PyDLL(None).sleep(1000)"])
async def test_code_that_ignores_an_interrupt_can_be_killed(host: Host, code: str) -> None:
    async with host.open_run(
        f"import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('go')\n{code}\nwhile True: time.sleep(1)"
    ) as run:
        await run.until(b"go\n")
        await run.interrupt()
        await run.kill()
        assert await run.finish() == Ran("go\n", "", 137, restarted=False, state_kept=False)
    assert await host.run("print(1)") == Ran("1\n", "", 0, restarted=True, state_kept=True)


async def test_a_host_that_gives_a_run_up_ends_the_interpreter(host: Host) -> None:
    async with host.open_run("print('go')\nwhile True: pass") as run:
        await run.until(b"go\n")
    assert await host.run("print(1)") == Ran("1\n", "", 0, restarted=True, state_kept=True)


# --- Code that goes for our socket ---

_FIND = """
import os, socket, stat
for name in os.listdir('/proc/self/fd'):
    try:
        if stat.S_ISSOCK(os.fstat(int(name)).st_mode): control = socket.socket(fileno=os.dup(int(name)))
    except OSError: pass
"""


@pytest.mark.parametrize(
    "message",
    [
        "b'garbage'",
        "b'x' * 1000",
        "b'R'",
        "b'S'",
        "b'D'",
        "b'D' + bytes(5)",
        "b'D' + bytes([0, 0, 0, 2, 0])",
        "b'V' + bytes([0, 0, 0, 2]) + bytes(12)",
        "b'F' + bytes([0, 0, 0, 2])",
        r"b'F\0\0\0\2xx'",
    ],
)
async def test_garbage_on_our_socket_ends_that_interpreter_only(host: Host, message: str) -> None:
    await host.run(_FIND)
    result = await host.run(f"control.send({message})\nimport time\ntime.sleep(1000)")
    assert result == Ran("", "", 137, restarted=False, state_kept=False)
    assert await host.run("print(1)") == Ran("1\n", "", 0, restarted=True, state_kept=True)


async def test_a_forged_end_spoils_nothing_but_the_forger(host: Host) -> None:
    await host.run(_FIND)
    # It says that it is over and goes on; its real end then is one too many.
    result = await host.run("print('one')\ncontrol.send(b'D\\0\\0\\0\\2\\7' + b'\\xff' * 12)\nprint('two')")
    assert result.exit_code == 7
    assert result.stdout.startswith("one\n")
    result = await host.run("print(1)")
    if not result.restarted:  # the end that was one too many may not have been there yet
        result = await host.run("print(1)")
    assert result == Ran("1\n", "", 0, restarted=True, state_kept=True) or result.exit_code == 137
    assert (await host.run("print(2)")).stdout == "2\n"


async def test_garbage_between_runs(host: Host) -> None:
    await host.run(
        _FIND
        + "import threading\ndef late():\n    while os.path.samestat(os.fstat(1), mine): pass\n    control.send(b'boo')\n"
        "mine = os.fstat(1)\nthreading.Thread(target=late).start()"
    )
    results = [await host.run("print(1)")]
    while not results[-1].restarted:
        results.append(await host.run("print(1)"))
    assert results[-1] == Ran("1\n", "", 0, restarted=True, state_kept=True)


async def test_a_run_takes_output_out_of_its_own_pipe(host: Host) -> None:
    code = "import os\nfd = os.open('/proc/self/fd/1', os.O_RDONLY | os.O_NONBLOCK)\nfor i in range(300):\n    os.write(1, b'x')\n    try: os.read(fd, 1)\n    except BlockingIOError: pass"
    assert (await host.run(code)).exit_code == 0
    assert await host.run("print(1)") == ran("1\n")


# --- Requests that can't be served ---


async def test_a_second_run_at_the_same_time_is_refused(host: Host) -> None:
    async with host.open_run("print('go')\ninput()", stdin=(pipe := host.open_pipe()).id) as first:
        await first.until(b"go\n")
        async with host.open_run("print(1)") as second:
            assert (await second.failure())["errno"] == errno.EBUSY
        await pipe.send_all(b"\n")
        assert await first.finish() == ran("go\n")


async def test_a_language_that_does_not_exist_is_refused(host: Host) -> None:
    async with host.open_run("x", language="klingon") as run:
        failure = await run.failure()
    assert failure == {
        "errno": errno.EINVAL,
        "strerror": "no language 'klingon'; there are: python, javascript, shell",
        "filename": None,
    }


@pytest.mark.parametrize(
    "request_", [{"code": 5}, {"language": None}, {"env": []}, {"env": {"A": 1}}, {"cwd": 5}, {"stdin": "x"}]
)
async def test_a_request_that_no_host_makes_is_reset(host: Host, request_: dict[str, object]) -> None:
    async with host.open_run("print(1)", **request_) as run:
        with pytest.raises(StreamResetError, match="must be"):
            await run.finish()
    async with host.open_run("print('go')\ninput()", stdin=(host.open_pipe()).id) as run:
        await run.until(b"go\n")
        await run.records.send_json({"dance": True})
        with pytest.raises(StreamResetError, match="not a request to a run"):
            await run.finish()


def make_interpreter(directory: Path, text: str) -> None:
    path = directory / "python3"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


async def test_an_image_without_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    async with open_agent() as host:
        for _ in range(2):
            async with host.open_run("print(1)") as run:
                assert await run.failure() == {
                    "errno": errno.ENOENT,
                    "strerror": f"this image can't run python: {os.strerror(errno.ENOENT)}",
                    "filename": "python3",
                }
        # Once it is there it works.
        (tmp_path / "python3").symlink_to(sys.executable)
        assert await host.run("print(1)") == ran("1\n")


async def test_an_interpreter_that_ends_before_it_takes_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_interpreter(tmp_path, "echo no library >&2; exit 7")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    async with open_agent() as host:
        for _ in range(2):
            async with host.open_run("print(1)") as run:
                failure = await run.failure()
            assert (
                failure["strerror"] == "the interpreter of python ended with status 7 before it took code: no library"
            )


def test_a_worker_finds_its_source_however_soon_it_looks_or_ends() -> None:
    found: list[bytes] = []

    def spawn(request: object, descriptors: list[int]) -> None:
        with socket.socket(fileno=os.dup(descriptors[1])) as theirs:
            found.extend(theirs.recv(1 << 17, socket.MSG_DONTWAIT) for _ in (*PYTHON.parts, PYTHON.worker))

    started = start_interpreter(PYTHON, spawn)
    started.control.close()
    os.close(started.stderr)
    directory = Path(languages.__file__).parents[1] / "interpreters"
    assert found == [(directory / name).read_bytes() for name in (*PYTHON.parts, PYTHON.worker)]


async def test_unknown_services_are_reset(host: Host) -> None:
    with pytest.raises(StreamResetError, match="no such service: 'brew'"):
        await read_all(host.channel.open_stream({"service": "brew"}))
