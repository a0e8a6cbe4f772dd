"""Programs that use the library under conditions that somebody else made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.qemu

PROGRAM = """\
import os, signal, threading
import trio, trio_sandbox
{before}
async def main():
    async with trio_sandbox.open_sandbox() as sandbox:
        result = await sandbox.run("print(6 * 7)")
        process = await sandbox.run_process(["cat"], stdin=b"x", capture_stdout=True)
        async with sandbox.fork(1) as (child,):
            await child.run("1")
        with open({output!r}, "w", encoding="ascii") as file:
            file.write(result.stdout + process.stdout.decode())
{run}
"""


def run_program(
    directory: Path,
    *,
    before: str = "",
    run: str = "trio.run(main)",
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    shell: str = "",
) -> None:
    program, output = directory / "program.py", directory / "output"
    program.write_text(PROGRAM.format(before=before, run=run, output=str(output)))
    completed = subprocess.run(
        ["bash", "-c", f'{shell}\nexec "$@"', "bash", sys.executable, *options, str(program)],
        capture_output=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    assert completed.stderr.decode() == ""
    assert completed.returncode == 0
    assert output.read_text("ascii") == "42\nx"


IN_A_THREAD = "thread = threading.Thread(target=trio.run, args=(main,)); thread.start(); thread.join()"


@pytest.mark.parametrize("run", ["trio.run(main)", IN_A_THREAD], ids=["main thread", "another thread"])
def test_sigchld_is_ignored(run: str, tmp_path: Path) -> None:
    run_program(tmp_path, before="signal.signal(signal.SIGCHLD, signal.SIG_IGN)", run=run)


def test_everything_is_an_error(tmp_path: Path) -> None:
    options = ["-X", "warn_default_encoding", "-X", "dev", "-W", "error", "-O"]
    run_program(tmp_path, options=options, environment={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})


def test_the_working_directory_is_gone_and_so_is_much_else(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    shell = f"umask 0777; ulimit -n 64; cd {tmp_path}/gone; rmdir {tmp_path}/gone; exec <&- >&-"
    run_program(tmp_path, shell=shell, before="os.umask(0o022)", environment={"TMPDIR": "/nonexistent", "TERM": ""})


def test_no_umask_keeps_qemu_out_of_its_jail(tmp_path: Path) -> None:
    (tmp_path / "output").touch()
    run_program(tmp_path, before="os.umask(0o777)")  # without a jail a warning would be logged


def test_a_tmpdir_that_is_too_long(tmp_path: Path) -> None:
    long = tmp_path / ("long" * 30)
    long.mkdir()
    run_program(tmp_path, environment={"TMPDIR": str(long)})
    assert list(long.iterdir()) == []


def test_ctrl_c_says_where_the_program_was_and_little_more(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import trio, trio_sandbox\n"
        "async def main():\n"
        "    async with trio_sandbox.open_sandbox() as sandbox:\n"
        "        print('ready', flush=True)\n"
        "        await sandbox.run('while True: pass')\n"
        "trio.run(main)\n"
    )
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(signal.SIGINT)
            error = process.stderr.read().decode()
        finally:
            process.kill()
    assert error.endswith("\nKeyboardInterrupt\n")
    assert f'File "{program}", line ' in error
    assert "The above exception" not in error
    assert len(error.splitlines()) < 40
