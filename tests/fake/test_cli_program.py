"""`trio-sandbox run` with real interpreters, in a real agent in this process: what its programs see."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from unittest import mock

import attrs
import pytest
import trio

from tests._leaks import nothing_left
from trio_sandbox import HostConfig, Sandbox, SandboxConfig, Usage
from trio_sandbox.cli._copies import Download, Upload
from trio_sandbox.cli._program import find_program
from trio_sandbox.cli._run import RunRequest, run_until_signal

from ._sandbox import open_local_sandbox


@attrs.define(eq=False)
class LocalHost:
    """A host whose one sandbox is on this machine."""

    sandbox: Sandbox

    async def prepare(self, image: str) -> None:
        await trio.lowlevel.checkpoint()

    @asynccontextmanager
    async def open_sandbox(self, image: str, config: SandboxConfig) -> AsyncGenerator[Sandbox]:
        yield self.sandbox


@attrs.define
class Console:
    """Our standard input, output and error."""

    input: list[bytes] = attrs.field(factory=list[bytes])
    stdout: bytes = b""
    stderr: bytes = b""
    waits: bool = False
    """After the input there is no end of it."""

    async def read(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self.input and self.waits:
            await trio.sleep_forever()
        return self.input.pop(0) if self.input else b""

    async def write(self, stream: str, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        setattr(self, stream, getattr(self, stream) + data)


async def run(
    workdir: Path,
    *words: str | Path,
    code: str | None = None,
    language: str | None = None,
    console: Console | None = None,
    environment: dict[str, str] | None = None,
    uploads: Sequence[Upload] = (),
    downloads: Sequence[Download] = (),
    workspace: Path | None = None,
    stdin: bytes = b"",
) -> tuple[int, Console]:
    """Run a program as the command line would, in *workdir*; return its status and what it printed."""
    console = Console() if console is None else console
    program = find_program(
        code=code,
        words=[str(word) for word in words],
        language=language,
        uploads=uploads,
        workspace=workspace,
        read_stdin=lambda: stdin,
    )
    request = RunRequest(
        program=program,
        host=HostConfig(),
        sandbox=SandboxConfig(),
        workdir=str(workdir),
        environment=environment or {},
        uploads=tuple(uploads),
        downloads=tuple(downloads),
        workspace=workspace,
        quiet=workspace is None,
    )
    async with open_local_sandbox() as (sandbox, _):

        @asynccontextmanager
        async def open_host(config: HostConfig) -> AsyncGenerator[LocalHost]:
            yield LocalHost(sandbox)

        status = await run_until_signal(
            request,
            open_host=open_host,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            write=console.write,
            read=console.read,
        )
    return status, console


@pytest.fixture(autouse=True)
def no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nothing used by a machine that there is none of."""
    nothing = Usage(cpu_seconds=0, memory_bytes=0, disk_bytes=0, network_bytes_sent=0, network_bytes_received=0)
    monkeypatch.setattr(Sandbox, "usage", mock.Mock(return_value=nothing))


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """The working directory in the guest, which is made by the command."""
    return tmp_path / "guest" / "work"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    directory = tmp_path / "here"
    directory.mkdir()
    return directory


WHAT_COMES_AFTER_THE_LAST_LINE = """\
import atexit, ctypes, sys, threading, time
atexit.register(print, "atexit")
threading.Thread(target=lambda: (time.sleep(0.05), print("thread"))).start()
ctypes.CDLL(None).puts(b"C's own output")
sys.stderr.write("no newline")
print("main")
"""


async def test_a_program_runs_to_its_end(guest: Path, here: Path) -> None:
    file = here / "program.py"
    file.write_text(WHAT_COMES_AFTER_THE_LAST_LINE)
    status, console = await run(guest, file)
    assert status == 0
    assert sorted(console.stdout.split(b"\n")) == [b"", b"C's own output", b"atexit", b"main", b"thread"]
    assert console.stderr == b"no newline"


async def test_a_file_is_the_main_program_of_its_interpreter(guest: Path, here: Path) -> None:
    file = here / "prögram.py"
    file.write_text("import os, sys\nprint(sys.argv, __name__, __file__, sys.path[0], os.getcwd())\nsys.exit(7)\n")
    status, console = await run(guest, file, "--flag", "", "a b", "-c")
    argv = ["prögram.py", "--flag", "", "a b", "-c"]
    assert status == 7
    assert console.stdout.decode() == f"{argv} __main__ {guest}/prögram.py {guest} {guest}\n"


async def test_code_is_the_main_program_of_its_interpreter(guest: Path) -> None:
    code = "import sys; print(sys.argv, __name__, '__file__' in globals(), sys.stdin.read())"
    _, console = await run(guest, "a", "--b", code=code, console=Console([b"in", b"put"]))
    assert console.stdout == b"['-c', 'a', '--b'] __main__ False input\n"


@pytest.mark.parametrize(
    "source",
    [
        b"# -*- coding: latin-1 -*-\nprint('\xe9', __import__('sys').argv)",
        b"#!/usr/bin/env python3\n# vim: set fileencoding=latin-1 :\nprint('\xe9', __import__('sys').argv)\n",
        b"\xef\xbb\xbfprint('\xc3\xa9', __import__('sys').argv)\r\n",
    ],
    ids=["latin-1", "latin-1 in the second line", "UTF-8 with a mark"],
)
async def test_python_from_standard_input_is_in_the_encoding_that_it_declares(guest: Path, source: bytes) -> None:
    _, console = await run(guest, "-", "a", stdin=source)
    assert console.stdout.decode() == "é ['-', 'a']\n"
    assert console.stderr == b""


async def test_shell_programs(guest: Path, here: Path) -> None:
    file = here / "-x.sh"
    file.write_text('echo "$0 $# $1"; read -r line; echo "[$line]"; (sleep 0.05; echo late) & wait; kill -TERM $$')
    status, console = await run(guest, file, "a b", console=Console([b"input\nmore"]))
    assert (status, console.stdout) == (128 + 15, b"./-x.sh 1 a b\n[input]\nlate\n")
    _, console = await run(guest, "a b", code='echo "$0 $1"', language="shell")
    assert console.stdout == b"bash a b\n"
    # The shell reads its commands no further than it runs them: the rest is its commands' input.
    _, console = await run(guest, "-", "a b", language="shell", console=Console([b'cat "$1"; cat\nrest']))
    assert console.stdout == b"rest"
    assert b"a b" in console.stderr


async def test_input_and_output_are_bytes_of_any_number(guest: Path) -> None:
    pieces = [bytes(range(256)) * 256] * 40  # 2.6 MiB, more than any buffer between us
    code = "import sys, shutil; shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer)"
    _, console = await run(guest, code=code, console=Console(list(pieces)))
    assert console.stdout == b"".join(pieces)


async def test_a_program_need_not_read_its_input_to_its_end(guest: Path) -> None:
    for waits in (False, True):
        console = Console([b"x" * 100_000] * 20, waits=waits)
        status, console = await run(guest, code="print(input()[:0] if 0 else 'done')", console=console)
        assert (status, console.stdout) == (0, b"done\n")


async def test_a_process_that_is_left_behind_is_not_waited_for(guest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_sandbox.cli._process.DRAIN_SECONDS", 0.1)
    with nothing_left():
        status, console = await run(guest, code="echo before; sleep 1000 & exit 3", language="shell")
    assert (status, console.stdout) == (3, b"before\n")


async def test_the_environment_is_the_default_one_and_what_was_asked_for(guest: Path) -> None:
    code = "import os; print(os.environ['A'], repr(os.environ['B']), os.environ['HOME'] != '')"
    _, console = await run(guest, code=code, environment={"A": "x=y z", "B": ""})
    assert console.stdout == b"x=y z '' True\n"


async def test_neighbours_are_beside_the_program(guest: Path, here: Path) -> None:
    (here / "package").mkdir()
    (here / "package" / "helper.py").write_text("NAME = 'helper'")
    (here / "data.txt").write_text("data")
    (here / "program.py").write_text(
        "import package.helper; open('out.txt', 'w').write(package.helper.NAME + open('in/data.txt').read())"
    )
    uploads = (Upload(here / "package", "package"), Upload(here / "data.txt", "in/data.txt"))
    downloads = (Download("out.txt", here / "result.txt"), Download(str(guest / "in"), here / "in"))
    status, console = await run(guest, here / "program.py", uploads=uploads, downloads=downloads)
    assert (status, console.stderr) == (0, b"")
    assert (here / "result.txt").read_text() == "helperdata"
    assert (here / "in" / "data.txt").read_text() == "data"


async def test_a_program_of_an_uploaded_directory_runs_there(guest: Path, here: Path) -> None:
    (here / "bin").mkdir()
    (here / "bin" / "main.py").write_text("import sys, helper; print(sys.argv[0], helper.NAME)")
    (here / "bin" / "helper.py").write_text("NAME = 'helper'")
    _, console = await run(guest, here / "bin" / "main.py", uploads=[Upload(here, "project")])
    assert console.stdout == b"project/bin/main.py helper\n"
    assert os.listdir(guest) == ["project"]


async def test_a_workspace_comes_back(guest: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "tool").mkdir()
    (here / "tool" / "main.py").write_text(
        "import helper; open('out.txt', 'w').write(helper.NAME); import os; os.remove('old'); os.makedirs('tool/__pycache__', exist_ok=True)"
    )
    (here / "tool" / "helper.py").write_text("NAME = 'helper'")
    (here / "old").touch()
    (here / ".git").mkdir()
    status, console = await run(guest, here / "tool" / "main.py", workspace=here)
    assert (status, console.stdout, console.stderr) == (0, b"", b"")
    assert sorted(path.name for path in here.rglob("*")) == [".git", "helper.py", "main.py", "out.txt", "tool"]
    assert (here / "out.txt").read_text() == "helper"
    assert (guest / "tool" / "__pycache__").is_dir()  # which was left there
    assert capsys.readouterr().err == f"{here}: removed old\n{here}: added out.txt\n"


async def test_what_a_workspace_cant_take_back_is_told(
    guest: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = f"""
import os
os.symlink("/etc", "evil\\x1b[2J")
open("kept", "w").write("of the guest")
open({str(here / "kept")!r}, "w").write("changed here")  # as somebody else would meanwhile
open("new", "w").close()
raise SystemExit({{}})
"""
    for own, told in ((3, 3), (0, 125)):
        (here / "kept").write_text("as it was")
        status, _ = await run(guest, code=code.format(own), workspace=here)
        assert status == told
        said = capsys.readouterr().err
        assert f"{here}: not added evil\\x1b[2J: is a link that leads out of the directory" in said
        assert f"{here}: not changed kept: was changed here, too" in said
        assert (here / "new").exists()
        assert (here / "kept").read_text() == "changed here"
        shutil.rmtree(guest)
        guest.mkdir()


def test_a_file_outside_of_the_workspace_is_refused(here: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").touch()
    with pytest.raises(ValueError, match="is not in the workspace"):
        find_program(code=None, words=[str(tmp_path / "program.py")], workspace=here)


@pytest.mark.skipif(shutil.which("node") is None, reason="only in the image")
async def test_node_programs(guest: Path, here: Path) -> None:
    file = here / "program.mjs"
    file.write_text("setTimeout(() => console.log(process.argv.slice(2)), 20); console.log('main')")
    _, console = await run(guest, file, "--a", "b")
    assert console.stdout == b"main\n[ '--a', 'b' ]\n"
    _, console = await run(guest, "--a", code="console.log(process.argv.slice(1))", language="javascript")
    assert console.stdout == b"[ '--a' ]\n"
