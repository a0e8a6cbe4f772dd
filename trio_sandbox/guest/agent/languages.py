"""The languages whose interpreters take code, and how each one is started. Stdlib only: used before Trio is there.

To add one, add a `Language` here and its worker in `interpreters`. A worker that can take messages of `messages` with
their descriptors speaks with the agent itself, as Python's does; any other has a `porter`, and reads one of its dialects: JSON if it can.
And an image needs the interpreter: `trio_sandbox.image` lists which has what.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..helpers.dialects import ANSWERS, GATE, LIBRARIES, SOURCE
from ..helpers.porter import CONTROL
from ..messages import send_message, write_message_file

if TYPE_CHECKING:
    from ..spawner.becoming import Program, Request

#: Runs with numbers above this one are none of the user's: those that warm a template up.
WARM_UP = 1 << 31
#: Where the texts are that interpreters run.
_WORKERS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "interpreters")

#: The parts of Python's worker that come before it: what is after "python_" in their names.
_PYTHON_PARTS = (
    "imports",
    "interrupts",
    "commands",
    "surroundings",
    "streams",
    "displays",
    "sources",
    "renewal",
    "functions",
    "debugging",
)
#: A program that none of them executes: one of them hands it on.
_PYTHON_SPAWNED = "python_spawned.py"
# Nothing but their own dictionaries holds their names: those of `__main__` are for the code of runs. Each has builtins of
# its own.
_PYTHON_BOOT = f"""exec('''
import builtins, _socket
control = _socket.socket(fileno={CONTROL})
parts = {{}}
def start(name, **names):
    parts[name] = {{"__name__": "trio_sandbox_" + name, "__builtins__": dict(vars(builtins)), **names}}
    exec(compile(control.recv(1 << 17), "<trio-sandbox " + name + ">", "exec"), parts[name])
program = control.recv(1 << 17).decode()
for name in {list(_PYTHON_PARTS)}:
    start(name)
start("worker", _control=control, _parts=parts, _program_of_spawned=program)
''', {{}})"""


_NODE_PARTS = ("node_declarations.js", "node_randomness.js", "node_functions.js")
_NODE_BOOT = (
    "const files = `/proc/${process.ppid}/fd/`; "
    "const load = (name) => require('node:vm')"
    ".runInThisContext(require('node:fs').readFileSync(files + name, 'utf8'), {filename: 'trio-sandbox worker'}); "
    f"load({SOURCE})(require, files + {ANSWERS}, files + {SOURCE}, files + {GATE}, "
    f"{', '.join(f'load({descriptor})' for descriptor in LIBRARIES)})"
)


class Language:
    """How to start an interpreter of a language and what to send it first."""

    __slots__ = ("argv", "dialect", "name", "parts", "worker")

    def __init__(
        self, name: str, argv: list[str], worker: str, *, parts: tuple[str, ...] = (), dialect: str | None = None
    ) -> None:
        self.name: str = name
        self.argv: list[str] = argv
        self.worker: str = worker
        """File in `interpreters` with the text that the interpreter is to run."""
        self.parts: tuple[str, ...] = parts
        """Others, which it or its porter finds before that in the control socket."""
        self.dialect: str | None = dialect
        """What its porter speaks with it, one of `dialects.DIALECTS`; None: it has none, and speaks with the agent."""


PYTHON = Language(
    "python",
    ["python3", "-I", "-c", _PYTHON_BOOT],  # see `python_imports` for why it is isolated
    "python_worker.py",
    parts=(_PYTHON_SPAWNED, *(f"python_{part}.py" for part in _PYTHON_PARTS)),
)

LANGUAGES = {
    language.name: language
    for language in (
        PYTHON,
        # Its own parser is what finds the imports in a run's code.
        Language(
            "javascript",
            ["node", "--expose-internals", "-e", _NODE_BOOT],
            "node_worker.js",
            parts=_NODE_PARTS,
            dialect="json",
        ),
        Language("shell", ["bash", "--noprofile", "--norc", "--noediting", "-i"], "bash_worker.sh", dialect="shell"),
    )
}


class StartedInterpreter:
    """What is left in the agent's hands once a spawner has been asked for an interpreter."""

    __slots__ = ("control", "language", "stderr")

    def __init__(self, language: Language, control: socket.socket, stderr: int) -> None:
        self.language: Language = language
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
    program: Program = (language.argv, None, None, None)
    with theirs, open(errors, "wb", buffering=0), open(write_message_file(program), "rb", buffering=0) as file:
        request: Request = {
            "user": None,
            "targets": [2, CONTROL],
            # Its worker unblocks it for the code of a run only; an interpreter that is still starting would die of it.
            "blocked": [int(signal.SIGINT)],
            "metered": True,
        }
        if language is PYTHON:
            request["shared"] = True
        if language.dialect is not None:
            request["dialect"] = language.dialect
        # Before it can be gone again.
        for name in (*language.parts, language.worker):
            with open(os.path.join(_WORKERS, name), "rb") as source:
                ours.send(source.read())
        spawn(request, [errors, theirs.fileno(), file.fileno()])
    return StartedInterpreter(language, ours, stderr)


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


def send_functions(control: socket.socket, names: list[str], descriptors: list[int]) -> None:
    """Send a worker, before the code of a run, the names of the host's functions that this may call.

    *descriptors*: what answers come from, and what calls go to. Errors as `send_code`.
    """
    send_message(control, ("functions", names), descriptors)


def send_sync(control: socket.socket) -> None:
    """Make a worker forget the SIGINT that it got so far; errors as `send_code`."""
    send_message(control, ("sync",))


def send_renewal(control: socket.socket, entropy: bytes) -> None:
    """Make a worker forget what two machines must not share, and give it some randomness; errors as `send_code`."""
    send_message(control, ("renew", entropy))
