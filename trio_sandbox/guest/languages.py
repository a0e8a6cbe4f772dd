"""The languages whose interpreters take code, and how each one is started. Stdlib only: used before Trio is there."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from .messages import send_message

if TYPE_CHECKING:
    from .spawner import Request

#: The descriptor that a worker finds its control socket on.
CONTROL = 3

# Nothing but the worker's own dictionary holds its names: those of `__main__` are for the code of runs.
_PYTHON_BOOT = (
    "exec('import _socket, builtins\\n"
    f"control = _socket.socket(fileno={CONTROL})\\n"
    'source = compile(control.recv(1 << 17), "<trio-sandbox worker>", "exec")\\n'
    'exec(source, {"__name__": "trio_sandbox_worker", "__builtins__": dict(vars(builtins)), "_control": control})'
    "', {})"
)


class Language:
    """How to start an interpreter of a language and what to send it first."""

    __slots__ = ("argv", "library", "name", "worker")

    def __init__(self, name: str, argv: list[str], worker: str, *, library: str | None = None) -> None:
        self.name: str = name
        self.argv: list[str] = argv
        self.worker: str = worker
        """File beside this one with the text that the interpreter is to run."""
        self.library: str | None = library
        """Another with text that the worker takes from its control socket next, if it does."""


PYTHON = Language("python", ["python3", "-c", _PYTHON_BOOT], "python_worker.py", library="python_displays.py")

LANGUAGES = {language.name: language for language in (PYTHON,)}


class StartedInterpreter:
    """What is left in the agent's hands once a spawner has been asked for an interpreter."""

    __slots__ = ("control", "stderr")

    def __init__(self, control: socket.socket, stderr: int) -> None:
        self.control: socket.socket = control
        """Our end of its control socket."""
        self.stderr: int = stderr
        """The read end of the pipe that it may complain on until it is ready."""


def start_interpreter(language: Language, spawn: Callable[[Request, list[int]], None]) -> StartedInterpreter:
    """Ask for an interpreter by *spawn*, which sends a request with its descriptors to the spawner."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stderr, errors = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(stderr, False)
    ours.setblocking(False)
    with theirs, open(errors, "wb", buffering=0):
        request: Request = {
            "argv": language.argv,
            "env": None,
            "cwd": None,
            "user": None,
            "targets": [2, CONTROL],
            # Its worker unblocks it for the code of a run only; an interpreter that is still starting would die of it.
            "blocked": [int(signal.SIGINT)],
        }
        spawn(request, [errors, theirs.fileno()])
    for name in filter(None, (language.worker, language.library)):
        with open(os.path.join(os.path.dirname(__file__), name), "rb") as file:
            ours.send(file.read())
    return StartedInterpreter(ours, stderr)


def send_code(
    control: socket.socket,
    number: int,
    code: str,
    env: dict[str, str] | None,
    cwd: str | None,
    descriptors: list[int],
) -> None:
    """Send a worker the code of run *number* with its stdin (or none), stdout and stderr.

    Raises:
      OSError: if the worker is gone, or (`BlockingIOError`) has left more unread than it ever should.

    """
    send_message(control, ("run", number, code, env, cwd), descriptors)


def send_sync(control: socket.socket) -> None:
    """Make a worker forget the SIGINT that it got so far; errors as `send_code`."""
    send_message(control, ("sync",))


def send_renewal(control: socket.socket, entropy: bytes) -> None:
    """Make a worker forget what two machines must not share, and give it some randomness; errors as `send_code`."""
    send_message(control, ("renew", entropy))
