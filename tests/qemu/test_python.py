"""Python in a real guest: what its interpreter has is what `python3` there has."""

from __future__ import annotations

import pytest

from trio_sandbox import Sandbox

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]

#: Each prints something of Python's own that is the same in every process of the user's.
_SAME = {
    "streams": "import sys\nfor f in sys.stdin, sys.stdout, sys.stderr:\n    print(repr(f), f.mode, f.errors, f.buffer, f.buffer.raw, f.fileno(), f.isatty(), f.seekable())",
    "flags": "import sys; print(sys.flags, sys._xoptions, sys.warnoptions, sys.executable)",
    "paths": "import site, sys; print(sys.path, site.ENABLE_USER_SITE, site.getusersitepackages(), site.PREFIXES)",
    "environment": "import os; print(sorted(os.environ.items()), os.getcwd(), os.getgroups(), os.umask(0o022))",
    "encodings": "import locale, sys; print(locale.setlocale(locale.LC_ALL, ''), sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())",
    "signals": "import signal; print([signal.getsignal(n) for n in (1, 2, 10, 13, 14, 15, 17)], signal.pthread_sigmask(0, []))",
    "limits": "import resource, sys; print([resource.getrlimit(n) for n in range(12)], sys.getrecursionlimit())",
    "main": "import builtins, threading; print(__name__, __builtins__ is builtins, threading.enumerate())",
}


async def test_an_interpreter_is_as_python_started_by_hand(sandbox: Sandbox) -> None:
    for name, code in _SAME.items():
        completed = await sandbox.run_process(
            ["python3", "-c", code], stdin=b"x", capture_stdout=True, capture_stderr=True
        )
        result = await sandbox.run(code, stdin=b"x")
        assert (result.stdout, result.stderr) == (completed.stdout.decode(), ""), name


async def test_the_first_run_is_the_users_first(sandbox: Sandbox) -> None:
    assert 'File "<run 1>", line 1' in (await sandbox.run("missing")).stderr
    # Nor is a line of ours taken for one of the code's.
    shown = (await sandbox.run("exec('x = 1\\nmissing')")).stderr
    assert shown.endswith("File \"<string>\", line 2, in <module>\nNameError: name 'missing' is not defined\n")


async def test_files_of_the_users_do_not_keep_an_interpreter_from_starting(sandbox: Sandbox) -> None:
    for name in ("types", "json", "re", "_socket", "sitecustomize", "usercustomize"):
        await sandbox.path(f"{name}.py").write_text("raise SystemExit('shadowed')\n")
    site = sandbox.path(".local/lib/python3.13/site-packages")
    await site.mkdir(parents=True, exist_ok=True)
    await (site / "usercustomize.py").write_text("import os; os._exit(9)\n")
    await (site / "made_later.py").write_text("answer = 42\n")
    assert (await sandbox.run("import made_later; made_later.answer")).value == "42"
    await sandbox.run("import os; os._exit(1)")
    result = await sandbox.run("import made_later; made_later.answer")
    assert (result.value, result.stderr) == ("42", "")
    assert "ZeroDivisionError" in (await sandbox.run("1 / 0")).stderr
