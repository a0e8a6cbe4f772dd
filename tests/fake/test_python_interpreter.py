"""An interpreter of Python is what `python3` is: its streams, its paths, its tracebacks; and reads nothing of the user's at its start."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import trio

from ._agent import Host, Ran, open_agent


@pytest.fixture(autouse=True)
def _plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no variables that make Python another one than in an image."""
    for name in os.environ:
        if name.startswith("PYTHON"):
            monkeypatch.delenv(name)


@pytest.fixture
async def host() -> AsyncGenerator[Host]:
    async with open_agent() as host:
        yield host


def ran(stdout: str = "", stderr: str = "", exit_code: int = 0) -> Ran:
    """A run that the interpreter survived, as those before."""
    return Ran(stdout, stderr, exit_code, restarted=False, state_kept=True)


# --- Streams ---

_DESCRIBE = """
import sys
def describe(part):
    found = {}
    for name in dir(part):
        if name.startswith("__") or name in ("buffer", "raw", "_finalizing"):
            continue
        try:
            value = getattr(part, name)
            if callable(value) and name in ("fileno", "isatty", "seekable", "readable", "writable", "tell"):
                value = value()
        except Exception as exc:
            value = type(exc)
        found[name] = repr(value) if not callable(value) else "a method"
    return type(part), found
for stream in (sys.stdin, sys.stdout, sys.stderr):
    parts = stream, stream.buffer, stream.buffer.raw
    for part in parts:
        print(*describe(part))
print(repr(sys.stdin.read()), sys.__stdin__ is sys.stdin, sys.__stdout__ is sys.stdout, sys.__stderr__ is sys.stderr)
"""


async def run_with_input(host: Host, code: str, text: bytes) -> Ran:
    pipe = host.open_pipe()
    async with host.open_run(code, stdin=pipe.id) as run:
        await pipe.send_all(text)
        await pipe.send_eof()
        return await run.finish()


async def test_streams_are_as_pythons_own(host: Host) -> None:
    text = b"one\r\ntwo\rthree\n\xc3\xa9"
    process = await trio.run_process(["python3", "-c", _DESCRIBE], stdin=text, capture_stdout=True, capture_stderr=True)
    # Each line goes out when it is complete, as at a terminal.
    expected = process.stdout.decode().replace("'line_buffering': 'False'", "'line_buffering': 'True'")
    await host.run("pass")
    result = await run_with_input(host, _DESCRIBE, text)
    assert result.stdout.replace("'line_buffering': 'False'", "'line_buffering': 'True'") == expected
    assert result.exit_code == 0


#: Each wraps, closes or replaces a stream, and prints "ok é" or what it has read.
WRAPPED = {
    "wrapper": "sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')\nprint('ok é')",
    "wrapper again": "sys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding='utf-8')\nprint('ok é')",
    "codecs": "sys.stdout = codecs.getwriter('utf-8')(sys.stdout.buffer)\nprint('ok é')",
    "codecs, detached": "sys.stdout = codecs.getwriter('utf-8')(sys.stdout.detach())\nprint('ok é')",
    "reconfigured": "sys.stdout.reconfigure(encoding='utf-8', errors='replace', line_buffering=False)\nprint('ok é')",
    "opened": "sys.stdout = open(sys.stdout.fileno(), 'w', encoding='utf-8')\nprint('ok é')",
    "raw": "sys.stdout = io.TextIOWrapper(sys.stdout.buffer.raw, write_through=True)\nprint('ok é')",
    "opened and closed": "sys.stdout = open(1, 'w')\nprint('ok é')\nsys.stdout.close()",
    "closed": "print('ok é')\nsys.stdout.close(); sys.stderr.close(); sys.stdin.close()",
    "not sought": "print('ok é' if not sys.stdout.seekable() and not sys.stdin.seekable() else 'seekable')",
    "stdin, wrapper": "sys.stdin = io.TextIOWrapper(sys.stdin.buffer, encoding='utf-8')\nprint(input())",
    "stdin, codecs": "sys.stdin = codecs.getreader('utf-8')(sys.stdin.buffer)\nprint(sys.stdin.readline().strip())",
    "stdin, detached": "sys.stdin = io.TextIOWrapper(sys.stdin.detach(), newline='')\nprint(input())",
    "stdin, opened": "sys.stdin = open(0)\nprint(input())",
    "stdin, kept": "f = open(0, closefd=False)\nprint(f.readline().strip())",
    "stdin, binary": "g = open(0, 'rb', closefd=False)\nprint(g.readline().decode().strip())",
    "stdin, iterated": "for line in sys.stdin:\n    print(line.strip())\n    break",
    "stdin, cut": "sys.stdin.reconfigure(encoding='utf-8', errors='strict')\nprint(sys.stdin.buffer.readline().decode().strip())\nsys.stdin.buffer.peek()",
    "stdin, text": "sys.stdin = io.StringIO('ok é')\nprint(input())\nsys.stdin = sys.__stdin__",
}


@pytest.mark.parametrize("name", WRAPPED)
async def test_streams_that_code_wraps_or_replaces(host: Host, name: str) -> None:
    await host.run("import codecs, io, sys")
    for _ in range(2):
        await host.run("sys.stdin, sys.stdout = sys.__stdin__, sys.__stdout__")
        result = await run_with_input(
            host, WRAPPED[name], "ok é\nsecret of this run\n".encode() + (b"\xc3" if name == "stdin, cut" else b"")
        )
        assert (result.stdout, result.stderr, result.exit_code) == ("ok é\n", "", 0)
        assert await host.run("print('next')") == ran("next\n")
        assert await run_with_input(
            host, "print(input())\ntry: print(f.readline(), end='')\nexcept NameError: pass", b"in\n"
        ) == ran("in\n")
        assert (await host.run("input()")).stderr.endswith("EOFError: EOF when reading a line\n")


async def test_what_keeps_a_stream_prints_to_the_run_that_is_current(host: Host) -> None:
    await host.run(
        "import logging, sys\nlogging.basicConfig(level='INFO', format='%(message)s')\nout, read = sys.stdout, sys.stdin"
    )
    assert await host.run("logging.info('log'); out.write('kept\\n'); sys.__stdout__.write('dunder\\n')") == ran(
        "kept\ndunder\n", "log\n"
    )
    assert await run_with_input(host, "print(read.readline(), end='')", b"a\nb\n") == ran("a\n")
    assert await run_with_input(host, "print(read.readline(), end='')", b"c\n") == ran("c\n")


async def test_what_is_in_buffers_goes_out_with_its_own_run(host: Host) -> None:
    await host.run("import ctypes, io, os, sys\nlibc = ctypes.CDLL(None)")
    for name, code in {
        "C": "libc.puts(b'text')",
        "C, errors": "libc.fputs(b'text\\n', ctypes.c_void_p.in_dll(libc, 'stdout'))",
        "file object": "one = open(1, 'w', closefd=False); n = one.write('text\\n')",
        "binary file object": "two = open(1, 'wb', closefd=False); n = two.write(b'text\\n')",
        "copy of the descriptor": "three = os.fdopen(os.dup(1), 'w'); n = three.write('text\\n')",
        "wrapper": "four = io.TextIOWrapper(sys.stdout.buffer); n = four.write('text\\n')",
        "by name": "five = open('/dev/stdout', 'w'); n = five.write('text\\n')",
    }.items():
        assert await host.run(code) == ran("text\n"), name
        assert await host.run("print('next')") == ran("next\n"), name
    # A file of its own is the code's affair.
    assert await host.run("f = open('/dev/null', 'w'); n = f.write('x'); print('ok')") == ran("ok\n")


async def test_input_that_c_has_read_is_not_for_the_next_run(host: Host) -> None:
    await host.run("import ctypes\nlibc = ctypes.CDLL(None)")
    assert await run_with_input(host, "print(chr(libc.getchar()))", b"ab\n") == ran("a\n")
    assert await host.run("print(libc.getchar())") == ran("-1\n")
    assert await run_with_input(host, "print(chr(libc.getchar()))", b"c\n") == ran("c\n")


async def test_a_thread_that_reads_input_for_ever_holds_nothing_up(host: Host) -> None:
    pipe = host.open_pipe()
    code = "import sys, threading\nthread = threading.Thread(target=sys.stdin.read, daemon=True)\nthread.start()\nprint('on')"
    async with host.open_run(code, stdin=pipe.id) as run:
        assert await run.finish() == ran("on\n")
    assert await run_with_input(host, "thread.join()\nprint(input())", b"in\n") == ran("in\n")


# --- Nothing of the user's is read before its code runs ---

#: Modules that a worker imports, or that what it imports would.
SHADOWS = (
    "_ctypes", "_socket", "array", "ast", "asyncio", "base64", "binascii", "builtins", "codecs", "collections", "contextlib", "copyreg",
    "encodings", "enum", "errno", "fcntl", "functools", "heapq", "importlib", "io", "itertools", "json", "keyword", "linecache",
    "marshal", "multiprocessing", "operator", "os", "random", "re", "reprlib", "select", "signal", "site", "sitecustomize", "socket", "struct",
    "subprocess", "textwrap", "token", "tokenize", "traceback", "types", "typing", "unicodedata", "usercustomize", "warnings",
)  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory, in which interpreters are started."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    # That of a virtual environment has no directory of the user's.
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python3").symlink_to(os.path.realpath(sys.executable))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return tmp_path


def user_site(home: Path) -> Path:
    directory = home / ".local/lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    directory.mkdir(parents=True)
    return directory


@pytest.mark.parametrize("text", ["raise SystemExit('shadowed')", "import os\nos._exit(9)", "print('shadowed')"])
async def test_no_file_of_the_users_keeps_an_interpreter_from_starting(
    home: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    site = user_site(home)
    for name in SHADOWS:
        (home / f"{name}.py").write_text(text)
    for name in ("sitecustomize", "usercustomize"):
        (site / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONSTARTUP", str(home / "types.py"))
    monkeypatch.setenv("PYTHONPATH", str(home))
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    monkeypatch.setenv("PYTHONWARNINGS", "error::nonsense")
    async with open_agent() as host:
        for _ in range(2):
            assert (await host.run("print(6 * 7)")).stdout == "42\n"
            assert (await host.run("value = 1\nvalue")).value == "1"
            result = await host.run("'é'.missing + [1][0]")
            assert 'File "<run 3>", line 1, in <module>' in result.stderr
            assert "AttributeError: 'str' object has no attribute 'missing'" in result.stderr
            result = await host.run("async def f(): return 5\nawait f()")
            assert (result.value, result.stderr) == ("5", "")
            await host.run("__import__('posix')._exit(1)")


async def test_files_that_are_made_later_do_not_break_runs(home: Path) -> None:
    async with open_agent() as host:
        await host.run("print(1)")
        for name in SHADOWS:
            (home / f"{name}.py").write_text("raise SystemExit('shadowed')")
        result = await host.run("def f(x):\n    return 'é' + x.missing\nf(1)")
        assert "    return 'é' + x.missing\n" in result.stderr
        assert result.stderr.endswith("AttributeError: 'int' object has no attribute 'missing'\n")
        assert (await host.run("async def f(): return 5\nawait f()")).value == "5"


async def test_paths_are_those_of_python(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = user_site(home)
    (home / "more").mkdir()
    (site / "more.pth").write_text(f"{home / 'more'}\nimport sys; sys.obeyed = True\n")
    monkeypatch.setenv("PYTHONPATH", f"{home / 'given'}:relative")
    code = "import site, sys\nprint(sys.path, sys.obeyed, site.ENABLE_USER_SITE, site.USER_SITE, sys.argv)"
    process = await trio.run_process(["python3", "-c", code], capture_stdout=True)
    async with open_agent() as host:
        result = await host.run(code)
    assert result.stdout == process.stdout.decode().replace("['-c']", "['']")


async def test_a_user_site_that_is_made_later_can_be_imported_from(home: Path) -> None:
    async with open_agent() as host:
        assert (await host.run("import later_made")).stderr.endswith(
            "ModuleNotFoundError: No module named 'later_made'\n"
        )
        site = user_site(home)
        (site / "later_made.py").write_text("answer = 42\n")
        (site / "broken.pth").write_text("import no_such_module_at_all\n")
        assert (await host.run("import later_made\nlater_made.answer")).value == "42"
        (site / "more_of_it.py").write_text("answer = 43\n")
        assert (await host.run("import more_of_it\nmore_of_it.answer")).value == "43"


@pytest.mark.parametrize("line", ["raise SystemExit(3)", "import sys; sys.exit('no')", "import os; 1 / 0"])
async def test_a_pth_file_that_fails_is_told_of_and_does_no_harm(home: Path, line: str) -> None:
    (user_site(home) / "bad.pth").write_text(f"import os; exec({line!r})\n")
    async with open_agent() as host:
        result = await host.run("print(1)")
        assert (result.stdout, result.exit_code) == ("1\n", 0)
        assert await host.run("print(2)") == ran("2\n")


# --- Source ---


@pytest.mark.parametrize(
    "separator", ["\f", "\v", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\n\f\n", "\r\n", "\r", "\n", ""]
)
async def test_tracebacks_show_the_lines_that_python_counts(host: Host, separator: str) -> None:
    code = f"x = '''a{separator}b'''\ndef f():\n    return missing\nf()"
    await host.run("import inspect")
    result = await host.run(code)
    line = 3 + separator.replace("\r\n", "\n").replace("\r", "\n").count("\n")
    assert f"line {line}, in f\n    return missing\n" in result.stderr
    assert f"line {line + 1}, in <module>\n    f()\n" in result.stderr
    assert (await host.run("inspect.getsource(f)")).value == repr("def f():\n    return missing\n")
    assert (await host.run("def g():\n    1 / 0\nx = 1; g()")).stderr.count("    x = 1; g()\n           ") == 1


async def test_what_warms_a_machine_up_is_not_counted(host: Host) -> None:
    assert await host.run("def warm(): missing", warm_up=True) == ran()
    assert await host.run("print(1)", warm_up=True) == ran("1\n")
    shown = (await host.run("warm()")).stderr
    assert 'File "<run 1>", line 1, in <module>\n    warm()\n' in shown
    assert 'File "<warm-up 1>", line 1, in warm\n    def warm(): missing\n' in shown


async def test_a_byte_order_mark_is_no_part_of_the_code(host: Host) -> None:
    assert await host.run("\ufeffprint('bom')") == ran("bom\n")
    assert (await host.run("\ufeffx = 5\nx")).value == "5"
    assert "invalid non-printable character U+FEFF" in (await host.run("x = 1\n\ufeffx")).stderr


@pytest.mark.parametrize(
    "code", ["return 5", "yield 5", "break", "nonlocal x", "x = 1\nfrom __future__ import nope", "await = 5", "x = (1,"]
)
async def test_syntax_errors_show_their_line(host: Host, tmp_path: Path, code: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(code)
    process = await trio.run_process(["python3", str(program)], capture_stderr=True, check=False)
    assert (await host.run(code)).stderr == process.stderr.decode().replace(str(program), "<run 1>")


async def test_an_error_is_shown_where_there_is_no_standard_error(host: Host) -> None:
    assert (
        "NameError: name 'missing' is not defined" in (await host.run("import sys; sys.stderr = None\nmissing")).stderr
    )
    assert (await host.run("import sys; sys.stderr = None\nsys.exit('text')")).stderr == "text\n"


async def test_no_line_of_ours_is_taken_for_one_of_the_codes(host: Host) -> None:
    shown = (await host.run("exec('x = 1\\nmissing')")).stderr
    assert shown.endswith("  File \"<string>\", line 2, in <module>\nNameError: name 'missing' is not defined\n")


async def test_stacks_are_of_the_code_alone(host: Host) -> None:
    shown = await host.run("import traceback\ndef f():\n    traceback.print_stack()\nf()")
    stack = '  File "<run 1>", line {}, in <module>\n    {}\n'
    assert shown == ran("", stack.format(4, "f()") + '  File "<run 1>", line 3, in f\n    traceback.print_stack()\n')
    shown = await host.run("import logging\nlogging.warning('w', stack_info=True)")
    said = "WARNING:root:w\nStack (most recent call last):\n"
    assert shown == ran("", said + stack.format(2, "logging.warning('w', stack_info=True)").replace("run 1", "run 2"))
    for code in (
        "[each.function for each in inspect.stack()]",
        "await asyncio.sleep(0, [each.function for each in inspect.stack()])",
    ):
        assert (await host.run(f"import asyncio, inspect\n{code}")).value == "['<module>']"
    of_a_thread = (
        "import threading\nt = threading.Thread(target=lambda: print(len(inspect.stack()) > 2)); t.start(); t.join()"
    )
    assert await host.run(of_a_thread) == ran("True\n")


async def test_the_source_of_classes_is_found(host: Host) -> None:
    await host.run(
        "class A:\n    x = 1\n\nclass B:\n    def f(self): pass\ndef make():\n    class C:\n        y = 2\n    return C"
    )
    await host.run("from dataclasses import dataclass\n@dataclass\nclass D:\n    z: int\nOld = B\nclass B: pass\n")
    for name, source in [
        ("A", "class A:\n    x = 1\n"),
        ("Old", "class B:\n    def f(self): pass\n"),
        ("B", "class B: pass\n"),
        ("make()", "    class C:\n        y = 2\n"),
        ("D", "@dataclass\nclass D:\n    z: int\n"),
    ]:
        assert (await host.run(f"import inspect\ninspect.getsource({name})")).value == repr(source), name
    result = await host.run("inspect.getsource(type('E', (), {}))")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "OSError: source code not available")


async def test_a_warning_is_shown_in_each_run_that_comes_to_it(host: Host) -> None:
    for _ in range(2):
        shown = (await host.run("import warnings\nfor _ in range(2): warnings.warn('old')")).stderr
        assert shown.count("UserWarning: old\n") == 1


async def test_source_of_old_runs_is_let_go_of(host: Host) -> None:
    await host.run("import linecache\ndef first(): missing")
    for _ in range(5):
        await host.run(f"x = '{'x' * 2_000_000}'")
    result = await host.run("first()")
    assert 'File "<run 1>", line 2, in first\nNameError' in result.stderr
    result = await host.run("len([name for name in linecache.cache if name.startswith('<run')])")
    assert result.value is not None
    assert int(result.value) < 6


async def test_a_value_that_can_not_be_shown_is_blamed_on_its_line(host: Host) -> None:
    code = "class R:\n    def __repr__(self):\n        raise OSError('no text')\nx = R(); R()\n"
    shown = (await host.run(code)).stderr
    assert re.sub(r"\n[ ~^]+\n", "\n", shown) == (
        'Traceback (most recent call last):\n  File "<run 1>", line 4, in <module>\n    x = R(); R()\n'
        "  File \"<run 1>\", line 3, in __repr__\n    raise OSError('no text')\nOSError: no text\n"
    )
    result = await host.run("x = []\nfor _ in range(100_000): x = [x]\nx")
    assert 'File "<run 2>", line 3, in <module>\n    x\nRecursionError' in result.stderr
    assert (await host.run("1 + 1")).value == "2"


async def test_an_exception_that_can_not_be_shown_has_a_traceback(host: Host) -> None:
    code = "class E(Exception):\n    def __getattribute__(self, name): raise RuntimeError(name)\nraise E"
    result = await host.run(code)
    assert 'File "<run 1>", line 3, in <module>' in result.stderr
    assert result.exit_code == 1


async def test_a_coroutine_that_is_not_awaited_is_warned_of_at_its_line(host: Host) -> None:
    result = await host.run("async def main(): pass\nmain()")
    assert result.stderr.startswith("<run 1>:2: RuntimeWarning: coroutine 'main' was never awaited\n  main()\n")
    assert result.value is not None
    assert result.value.startswith("<coroutine object main at ")


async def test_streams_can_be_wrapped_again_in_each_run(host: Host) -> None:
    await host.run("import gc, io, sys\nerrors = sys.stderr")
    code = "sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')\nsys.stderr = io.TextIOWrapper(sys.stderr.buffer)\ngc.collect()\nprint('é')"
    for _ in range(120):  # more than are kept
        assert await host.run(code) == ran("é\n")


async def test_numbers_have_as_many_digits_as_they_have(host: Host) -> None:
    assert (await host.run("print(len(str(2**20000)), int('9' * 5000) > 0)")).stdout == "6021 True\n"
    assert (await host.run("10**5000")).value == "1" + "0" * 5000


# --- Processes that are not forked ---

_POOLED = """
from __future__ import annotations
import math, multiprocessing as mp
from concurrent.futures import ProcessPoolExecutor
LIMIT = 10
try:
    import no_such_module
except ImportError:
    no_such_module = None
class Point:
    x: Nowhere = 3
    def __init__(self, y): self.y = y
def square(x): return Point(x * x).y + LIMIT
def fail(x): return 1 / (x - x)
computed = math.sqrt(4)
def uses_computed(x): return computed
import os.path, xml.dom
import xml.sax
from string import *
def even(n): return n == 0 or odd(n - 1)
def odd(n): return n != 0 and even(n - 1)
callable_one = lambda function: function
@callable_one
def decorated(x): return x
def uses(x): return even(x), xml.dom.__name__, xml.sax.__name__, digits
raise_if_run = open("/nope") if __name__ == "__mp_main__" else None
print('once')
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
async def test_processes_that_are_not_forked_know_what_runs_define(host: Host, method: str) -> None:
    assert await host.run(_POOLED) == ran("once\n")
    await host.run(f"context = mp.get_context({method!r})")
    assert await host.run("with context.Pool(1) as pool: print(pool.map(square, [1, 2]))") == ran("[11, 14]\n")
    assert await host.run(
        "with ProcessPoolExecutor(1, mp_context=context) as pool: print(list(pool.map(square, [3])))"
    ) == ran("[19]\n")
    assert await host.run("with context.Pool(1) as pool: print(pool.map(uses, [3])[0])") == ran(
        "(False, 'xml.dom', 'xml.sax', '0123456789')\n"
    )
    for function, error in (
        ("fail", "ZeroDivisionError: division by zero"),
        ("decorated", "making it failed with NameError(\"name 'callable_one' is not defined\")"),
        ("uses_computed", "NameError: name 'computed' is not defined"),
        (
            "exec('def hidden(x): pass') or hidden",
            "RuntimeError: 'hidden' is not known to a process that was not forked",
        ),
    ):
        result = await host.run(f"with context.Pool(1) as pool: pool.map({function}, [1])")
        assert error in result.stderr.splitlines()[-1]
    assert await host.run("print(square(1))") == ran("11\n")


# --- What lives on from run to run ---


async def test_context_variables_live_on_whether_code_awaits_or_not(host: Host) -> None:
    await host.run("import asyncio, contextvars\nvar = contextvars.ContextVar('var')\nfirst = var.set(1)")
    assert (await host.run("await asyncio.sleep(0)\nsecond = var.set(var.get() + 1); var.get()")).value == "2"
    await host.run("async def work(): return var.get()")
    assert (await host.run("var.get(), asyncio.run(work())")).value == "(2, 2)"
    assert (await host.run("await asyncio.create_task(work())")).value == "2"
    assert await host.run("var.reset(second)\nawait asyncio.sleep(0)\nvar.reset(first)\nprint(var.get(None))") == ran(
        "None\n"
    )


async def test_a_time_zone_of_one_run_is_that_of_its_clock(host: Host) -> None:
    zone = "import time; print(time.strftime('%Z %H', time.localtime(0)))"
    before = (await host.run(zone)).stdout
    assert await host.run(zone, env={"TZ": "XYZ-9"}) == ran("XYZ 09\n")
    assert await host.run(zone) == ran(before)


async def test_the_interpreter_goes_on_where_code_may_have_no_more_memory(host: Host) -> None:
    code = "import resource\nlimits = resource.getrlimit(resource.RLIMIT_AS)\nresource.setrlimit(resource.RLIMIT_AS, (1 << 28, limits[1]))\nx = []\nwhile True: x.append('a' * 100_000)"
    result = await host.run(code)
    # Python 3.13 has not even the memory for its own traceback, and then says it in other words.
    assert (result.exit_code, result.state_kept) == (1, True)
    assert "MemoryError" in result.stderr
    assert await host.run("del x") == ran()
    assert await host.run("resource.setrlimit(resource.RLIMIT_AS, limits); print('on')") == ran("on\n")


@pytest.mark.parametrize("status", ["300", "-1", "10**30", "-10**30", "2**63", "-2**63", "2**63 - 1", "True"])
async def test_exit_statuses_are_pythons(host: Host, status: str) -> None:
    code = f"import sys; sys.exit({status})"
    assert (await host.run(code)).exit_code == (await trio.run_process(["python3", "-c", code], check=False)).returncode


# --- Debuggers ---


@pytest.mark.parametrize("steps", [1, 2, 12, 30])
@pytest.mark.parametrize("command", ["n", "s", "r"])
async def test_a_debugger_that_steps_on_stays_in_the_code_of_its_run(host: Host, command: str, steps: int) -> None:
    await host.run("kept = 1")
    code = "def f():\n    breakpoint()\n    return 5\nx = f()"
    result = await run_with_input(host, code, f"{command}\n".encode() * steps + b"c\n")
    # Where they stop differs: at the line, or at the next, before Python 3.13.
    assert result.stdout.startswith("> <run 2>(")
    assert "trio-sandbox" not in result.stdout
    assert (result.stderr, result.exit_code, result.state_kept) == ("", 0, True)
    assert (await host.run("kept, x")).value == "(1, 5)"


async def test_a_debugger_shows_the_stack_of_the_code(host: Host) -> None:
    code = "import pdb\ndef f(): return 1 / 0\ntry:\n    f()\nexcept ZeroDivisionError:\n    pdb.post_mortem()"
    result = await run_with_input(host, code, b"w\nq\n")
    shown = result.stdout.replace("()->None\n", "()\n")  # Python 3.13
    assert "  <run 1>(4)<module>()\n-> f()\n> <run 1>(2)f()\n-> def f(): return 1 / 0\n(Pdb) " in shown
    code = "def g():\n    breakpoint()\n    return 6\ng()"
    result = await run_with_input(host, code, b"w\nu\nu\nb 3\nc\nc\n")
    assert "(Pdb)   <run 2>(4)<module>()\n-> g()\n> <run 2>(" in result.stdout.replace("()->None\n", "()\n")
    assert "*** Oldest frame" in result.stdout
    assert result.value == "6"


async def test_a_trace_function_of_the_code_stays(host: Host) -> None:
    await host.run(
        "import sys\nseen = []\ndef trace(frame, event, arg): seen.append(frame.f_code.co_name)\nsys.settrace(trace)"
    )
    await host.run("def called(): pass\ncalled()")
    assert (await host.run("sys.settrace(None); 'called' in seen")).value == "True"


async def test_a_module_of_the_code_that_is_called_as_a_debugger_is(host: Host, tmp_path: Path) -> None:
    (tmp_path / "bdb.py").write_text("own = 3\n")
    code = "import bdb; print(bdb.own, bdb.__spec__.loader is bdb.__loader__)"
    assert await host.run(code, cwd=str(tmp_path)) == ran("3 True\n")
    assert await host.run("print('next')") == ran("next\n")
