"""The command `trio-sandbox` as a shell runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests._leaks import HANG_LIMIT
from trio_sandbox._programs import REQUIREMENTS
from trio_sandbox.bench import MEASURES

pytestmark = pytest.mark.qemu

COMMAND = (sys.executable, "-m", "trio_sandbox")


def trio_sandbox(
    *arguments: str, stdin: bytes = b"", environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )


def test_output_and_exit_status_are_the_codes() -> None:
    code = b"import sys\nprint('out', end='')\nprint('err', end='', file=sys.stderr)\nsys.exit(7)\n"
    completed = trio_sandbox("run", "--quiet", "-", stdin=code)
    assert (completed.returncode, completed.stdout, completed.stderr) == (7, b"out", b"err")


def test_a_timeout_keeps_what_was_printed() -> None:
    code = "print('before', flush=True)\nwhile True: pass"
    # The interpreter's own start counts, which takes a while under emulation on a busy machine.
    completed = trio_sandbox("run", "--quiet", "--timeout", "15", "-c", code)
    assert (completed.returncode, completed.stdout) == (124, b"before\n")
    assert b"stopped after 15 seconds" in completed.stderr


def test_a_program_is_run_to_its_end_with_all_that_it_has(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import atexit, ctypes, os, sys, threading, time\n"
        "atexit.register(print, 'atexit')\n"
        "threading.Thread(target=lambda: (time.sleep(0.3), print('thread'))).start()\n"
        "ctypes.CDLL(None).puts(b'C')\n"
        "print(sys.argv, __file__, os.environ['A'], open('data.txt').read(), int(input()) + 1)\n"
        "open('out.txt', 'w').write('result')\n"
        "sys.exit(7)\n"
    )
    (tmp_path / "data.txt").write_text("data")
    options = ["-q", "-e", "A=b c", "--upload", f"{tmp_path}/data.txt", "--download", f"out.txt:{tmp_path}/"]
    completed = trio_sandbox("run", *options, str(program), "--flag", "-c", stdin=b"41\n")
    assert (completed.returncode, completed.stderr) == (7, b"")
    shown = b"['program.py', '--flag', '-c'] /home/user/program.py b c data 42"
    assert sorted(completed.stdout.splitlines()) == sorted([shown, b"C", b"atexit", b"thread"])
    assert (tmp_path / "out.txt").read_text() == "result"


def test_node_waits_for_what_comes_after_the_last_line(tmp_path: Path) -> None:
    program = tmp_path / "program.mjs"
    program.write_text("setTimeout(() => console.log(process.argv.slice(2)), 200); console.log('main')")
    completed = trio_sandbox("run", "-q", str(program), "--a")
    assert (completed.stdout, completed.stderr) == (b"main\n[ '--a' ]\n", b"")


def test_python_of_standard_input_in_another_encoding() -> None:
    completed = trio_sandbox("run", "-q", "-", stdin="# coding: latin-1\nprint('é')\n".encode("latin-1"))
    assert (completed.stdout, completed.stderr) == ("é\n".encode(), b"")


def test_json() -> None:
    completed = trio_sandbox("run", "-q", "--json", "-c", "import sys; print('out'); sys.exit('err')")
    assert completed.returncode == 1
    report = json.loads(completed.stdout)
    assert (report["exit_code"], report["stdout"], report["stderr"]) == (1, "out\n", "err\n")
    assert completed.stderr == b""


def test_a_reader_who_went_away() -> None:
    command = f"{' '.join(COMMAND)} run -q -c 'while True: print(1)' | head -n 1; echo ${{PIPESTATUS[0]}}"
    completed = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert (completed.stdout, completed.stderr) == (b"1\n141\n", b"")


@pytest.mark.parametrize(("closed", "stdout", "stderr"), [(">&-", b"", b"err\n"), ("<&- 2>&-", b"out\n", b"")])
def test_closed_streams(closed: str, stdout: bytes, stderr: bytes) -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.stdin.read()"
    command = f'{" ".join(COMMAND)} run -q -c "{code}" {closed}'
    completed = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert (completed.returncode, completed.stdout, completed.stderr) == (0, stdout, stderr)


def test_conditions_of_the_caller(tmp_path: Path) -> None:
    gone, long = tmp_path / "gone", tmp_path / ("long" * 30)
    gone.mkdir()
    long.mkdir()
    script = f"cd {gone}; rmdir {gone}; trap '' CHLD; umask 0777; {' '.join(COMMAND)} run -q -c 'print(6 * 7)'"
    environment = {**os.environ, "TMPDIR": str(long), "PYTHONPATH": str(Path(__file__).parents[2])}
    completed = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, check=False)
    assert (completed.stdout, completed.returncode) == (b"42\n", 0), completed.stderr
    assert b"jail" not in completed.stderr


_OWNER = r"""
import trio
from trio_sandbox import OutcomeUnknownError, SandboxClosedError, open_sandbox

async def main():
    async with open_sandbox("python") as sandbox:
        def tell():
            print(sandbox.id, sandbox.statistics().qemu_pid, flush=True)

        for code, kind in (("tell()\nwhile True: pass", OutcomeUnknownError), ("1", SandboxClosedError)):
            try:
                await sandbox.run(code, functions={"tell": tell})
            except kind as exc:
                print(str(exc).splitlines()[0], repr(exc.__cause__)[:60], flush=True)

trio.run(main)
"""


def listed_of(owner: int) -> list[dict[str, object]]:
    completed = trio_sandbox("ps", "--json")
    assert (completed.returncode, completed.stderr) == (0, b"")
    return [row for row in json.loads(completed.stdout) if row["owner_pid"] == owner]


def test_a_sandbox_of_another_process_is_listed_and_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", _OWNER], stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            name, qemu = owner.stdout.readline().split()
            (sandbox,) = listed_of(owner.pid)
            assert (sandbox["id"], sandbox["image"], sandbox["state"]) == (name, "python", "running")
            assert sandbox["qemu_pid"] == int(qemu)
            completed = trio_sandbox("kill", name)
            assert (completed.returncode, completed.stdout, completed.stderr) == (0, f"{name}: ended\n".encode(), b"")
            died, closed = owner.stdout.read().splitlines()
            assert died.startswith("the virtual machine ended during a run, which may have had its effect VmDiedError(")
            assert "SIGKILL" in died
            assert closed.startswith("the run was not sent: the sandbox's virtual machine is gone VmDiedError(")
            assert owner.wait() == 0
        finally:
            owner.kill()
    assert listed_of(owner.pid) == []
    completed = trio_sandbox("kill", name)
    assert (completed.returncode, completed.stdout) == (1, b"")
    assert completed.stderr.startswith(f"trio-sandbox: no sandbox '{name}' of this user runs on this machine".encode())


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_once_and_twice(times: int) -> None:
    # Not tmp_path: the path of a runtime directory has to be short.
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with subprocess.Popen(
            [*COMMAND, "run", "--quiet", "-c", "print('ready', flush=True)\nwhile True: pass"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "TMPDIR": name},
        ) as process:
            try:
                assert process.stdout is not None
                assert process.stderr is not None
                assert process.stdout.readline() == b"ready\n"
                process.send_signal(signal.SIGINT)
                assert process.stderr.readline() == (
                    b"trio-sandbox: SIGINT: closing the sandbox; once more ends it at once\n"
                )
                if times == 2:
                    process.send_signal(signal.SIGINT)
                # The second one may come when all is closed already.
                assert process.wait() in ({130} if times == 1 else {130, -signal.SIGINT})
                assert process.stderr.read() == b""
            finally:
                process.kill()
        deadline = time.monotonic() + HANG_LIMIT
        while list(directory.iterdir()):  # the reaper's work, where we were ended
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_sigterm_leaves_nothing() -> None:
    code = "print('ready', flush=True)\nwhile True: pass"
    # Not tmp_path: the path of a runtime directory has to be short.
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with subprocess.Popen(
            [*COMMAND, "run", "--quiet", "-c", code], stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": name}
        ) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n"
                assert list(directory.iterdir())  # the runtime directory
                process.terminate()
                assert process.wait() == 128 + signal.SIGTERM
            finally:
                process.kill()
        assert list(directory.iterdir()) == []


def test_an_unknown_image_is_a_failure_that_lists_the_known(tmp_path: Path) -> None:
    completed = trio_sandbox("run", "--image", "windows", "--cache-dir", str(tmp_path), "-c", "1")
    assert completed.returncode == 125
    assert b"windows" in completed.stderr
    assert b"python" in completed.stderr
    assert b"Traceback" not in completed.stderr


def test_an_image_that_must_not_be_built_is_a_failure_that_says_how_to(tmp_path: Path) -> None:
    completed = trio_sandbox("run", "--no-build", "--cache-dir", str(tmp_path), "-c", "1")
    assert completed.returncode == 125
    assert b"trio-sandbox image build" in completed.stderr


def test_a_missing_qemu_is_named_with_its_package(tmp_path: Path) -> None:
    for requirement in REQUIREMENTS:
        found = requirement.find()
        if found is not None and requirement.name != "qemu-system-x86_64":
            (tmp_path / Path(found).name).symlink_to(found)
    completed = trio_sandbox("run", "-c", "1", environment={"PATH": str(tmp_path)})
    assert completed.returncode == 125
    assert b"qemu-system-x86" in completed.stderr
    assert b"Traceback" not in completed.stderr


def test_doctor_is_content_where_these_tests_run() -> None:
    completed = trio_sandbox("doctor", "--json")
    report = json.loads(completed.stdout)
    assert completed.returncode == 0, report
    assert report["ok"]
    (accelerator,) = [finding for finding in report["findings"] if finding["subject"] == "accelerator"]
    assert accelerator["detail"].startswith(("kvm", "tcg"))
    if accelerator["detail"].startswith("tcg"):
        assert "no security boundary" in accelerator["detail"]


def test_doctor_finds_what_is_missing(tmp_path: Path) -> None:
    completed = trio_sandbox("doctor", environment={"PATH": str(tmp_path)})
    assert completed.returncode == 1
    assert b"apt-get install" in completed.stdout
    assert b"qemu-system-x86" in completed.stdout
    assert completed.stderr == b""


def test_bench_measures_this_machine() -> None:
    measures = [name for name in MEASURES if name != "cold"]
    completed = trio_sandbox("bench", "--quick", "--only", ",".join(measures), "-n", "2", "--json")
    assert completed.returncode == 0, completed.stderr
    report = json.loads(completed.stdout)
    figures = {(figure["measure"], figure["n"]): figure for figure in report["figures"]}
    for measure in measures:
        assert figures[measure, 2]["samples"] >= 1
        assert 0 < figures[measure, 2]["median"] <= figures[measure, 2]["p95"]
    assert report["accelerator"]["name"] in ("kvm", "tcg")
    assert report["machine"]["cpus"] > 0
    assert b"template, n = 2: measuring" in completed.stderr


def test_an_empty_cache_has_no_images(tmp_path: Path) -> None:
    completed = trio_sandbox("image", "list", "--cache-dir", str(tmp_path / "cache"))
    assert completed.returncode == 0
    assert b"no images" in completed.stdout
    assert not (tmp_path / "cache").exists()  # looking makes nothing
    assert json.loads(trio_sandbox("image", "list", "--json", "--cache-dir", str(tmp_path)).stdout) == []


def test_removing_an_image_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    completed = trio_sandbox("image", "rm", "python", "--cache-dir", str(tmp_path))
    assert completed.returncode == 1
    assert b"python" in completed.stderr
    assert b"Traceback" not in completed.stderr
