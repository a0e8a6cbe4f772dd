"""`trio-sandbox shell` on a real pseudo-terminal, and tunnels, with a real guest: what can't be seen without one."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Generator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import attrs
import httpcore
import pytest
import trio

from tests._httpcore import SandboxBackend
from tests._leaks import HANG_LIMIT
from trio_sandbox import open_sandbox
from trio_sandbox.guest.spawner.terminals import resize_terminal

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]


@attrs.define(eq=False)
class Session:
    """Whoever sits at the terminal that `trio-sandbox shell` runs on."""

    master: int
    slave: int
    process: subprocess.Popen[bytes]
    shown: bytes = b""

    def type(self, text: bytes) -> None:
        assert os.write(self.master, text) == len(text)

    def until(self, pattern: bytes) -> re.Match[bytes]:
        """Wait until the screen shows *pattern*, which may not stretch over what was looked at before."""
        deadline = time.monotonic() + HANG_LIMIT
        while (match := re.search(pattern, self.shown)) is None:
            assert select.select([self.master], [], [], deadline - time.monotonic())[0], (
                f"no {pattern!r}: {self.shown!r}"
            )
            self.shown += os.read(self.master, 65536)
        self.shown = self.shown[match.end() :]
        return match

    def wait(self) -> int:
        """Wait for the command's end, and read what it says meanwhile: otherwise it could wait for us."""
        with open(os.pidfd_open(self.process.pid), "rb", buffering=0) as pidfd:
            deadline = time.monotonic() + HANG_LIMIT
            both: list[int | FileIO] = [self.master, pidfd]
            while pidfd not in (ready := select.select(both, [], [], deadline - time.monotonic())[0]):
                assert ready, f"it does not end: {self.shown!r}"
                self.shown += os.read(self.master, 65536)
        while select.select([self.master], [], [], 0)[0]:
            self.shown += os.read(self.master, 65536)
        return self.process.wait()


@contextmanager
def open_session(*arguments: str, runtime: Path) -> Generator[Session]:
    """Run `trio-sandbox shell` on a new terminal, which must be afterwards as it was before."""
    master, slave = os.openpty()
    try:
        resize_terminal(master, 33, 101)
        before = termios.tcgetattr(slave)
        # With a controlling terminal, for it to be told of sizes.
        command = ["setsid", "--ctty", sys.executable, "-m", "trio_sandbox", "shell", *arguments]
        environment = {**os.environ, "TERM": "xterm", "XDG_RUNTIME_DIR": str(runtime)}
        process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
        try:
            yield Session(master, slave, process)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()
        assert termios.tcgetattr(slave) == before
        assert list(runtime.iterdir()) == []  # and no machine is left
    finally:
        os.close(master)
        os.close(slave)


#: Only from here on are keys the shell's again; what is typed before that is lost, or read as something else.
PROMPT = rb"user@[^\r\n]*\$ "


def test_a_session(tmp_path: Path) -> None:
    with open_session(runtime=tmp_path) as session:
        session.until(rb"Ctrl-\] ends the shell")
        session.until(PROMPT)
        session.type(b"stty size; echo $TERM; id -u; echo $((6 * 7))\r")
        session.until(rb"33 101\r\nxterm\r\n1000\r\n42\r\n")
        session.until(PROMPT)

        # A new size reaches what runs in the foreground.
        session.type(b'sh -c \'trap "stty size; exit" WINCH; echo wai""ting; while :; do sleep 0.01; done\'\r')
        session.until(rb"waiting\r\n")
        resize_terminal(session.master, 44, 99)
        session.until(rb"44 99\r\n")
        session.until(PROMPT)

        # Ctrl-C ends what runs in the guest, not us; and every other key goes there as well.
        session.type(b"sh -c 'echo star\"\"ted; exec sleep 1000'\r")
        session.until(rb"started\r\n")
        session.type(b"\x03")
        session.until(PROMPT)
        session.type(b"echo status $?\r")
        session.until(rb"status 130\r\n")
        session.until(PROMPT)
        session.type(b"echo rea''dy; cat | tr a-z A-Z\r")
        session.until(rb"ready\r\n")
        session.type(b"typed\r\x04")
        session.until(rb"TYPED\r\n")
        session.until(PROMPT)
        session.type(b"exit 7\r")
        assert session.wait() == 7


def test_the_detach_key_ends_it_whatever_the_guest_does(tmp_path: Path) -> None:
    script = "stty raw -echo; trap '' HUP INT TERM; printf '\\033[?1049h\\033[?25lrea''dy'; exec sleep 1000"
    with open_session("--quiet", "--", "sh", "-c", script, runtime=tmp_path) as session:
        session.until(rb"\x1b\[\?1049h\x1b\[\?25lready")
        session.type(b"\x03\x1a\x1c")  # nobody there cares
        session.type(b"x\x1d")
        assert session.wait() == 128 + signal.SIGHUP
        assert b"\x1b[?25h" in session.shown  # the cursor that the guest had hidden


def test_a_signal_to_the_command_itself(tmp_path: Path) -> None:
    with open_session(
        "--quiet", "--user", "root", "--", "sh", "-c", "id -u; exec sleep 1000", runtime=tmp_path
    ) as session:
        session.until(rb"^0\r\n")
        session.process.send_signal(signal.SIGTERM)
        assert session.wait() == 128 + signal.SIGTERM


def test_without_a_terminal_it_says_what_else_there_is() -> None:
    completed = subprocess.run(
        [sys.executable, "-m", "trio_sandbox", "shell"], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    assert completed.returncode == 2
    assert b"trio-sandbox run" in completed.stderr


# --- Tunnels ---

SERVER = """
import http.server, threading

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[::-1])
    def log_message(self, *args):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
"""


async def test_http_with_a_server_in_the_guest() -> None:
    body = os.urandom(300_000)
    async with open_sandbox("python") as sandbox:
        with pytest.raises(ConnectionRefusedError):
            await sandbox.open_tcp_stream(8000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sandbox.run, SERVER)
            await sandbox.wait_port(8000)

        async def ask(pool: httpcore.AsyncConnectionPool, port: int) -> None:
            response = await pool.request("POST", f"http://127.0.0.1:{port}/", content=body)
            assert (response.status, response.content) == (200, body[::-1])

        async with (
            httpcore.AsyncConnectionPool(network_backend=SandboxBackend(sandbox)) as pool,
            trio.open_nursery() as nursery,
        ):
            for _ in range(8):
                nursery.start_soon(ask, pool, 8000)
        async with trio.open_nursery() as nursery:
            port: int = await nursery.start(sandbox.forward_port, 8000)
            async with httpcore.AsyncConnectionPool() as pool:
                await ask(pool, port)
            nursery.cancel_scope.cancel()
        # Code in the guest sees nothing but its loopback interface.
        result = await sandbox.run("import os; print(os.listdir('/sys/class/net'))")
        assert result.stdout == "['lo']\n"
        # A terminal has its name in the file system of the users, and is theirs.
        completed = await sandbox.run_process(
            "tty; stat -c %u $(tty); echo by name > $(tty)", shell=True, pty=True, capture_stdout=True
        )
        assert re.fullmatch(rb"/dev/pts/\d+\r\n1000\r\nby name\r\n", completed.stdout)
