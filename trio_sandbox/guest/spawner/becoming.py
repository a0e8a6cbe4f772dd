"""What a fork of the spawner does until it is the program that was asked for.

Each page that it reads or writes first costs a page fault, some microseconds or, under software emulation, some
twenty; what its Python did here was most of a process's start. So whatever can be done before the fork is, and what
is left is little but system calls, by C functions: those of `signal` that wrap them in enumerations alone touch fifty pages.

But for one thing: what to execute, with its arguments and environment, is read here, from a memory file. The spawner passes it on and
never reads it, because some of its forks, `porter`s, are as open to the code of users as its own memory is.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
from _signal import (  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]
    pthread_sigmask,  # pyright: ignore[reportUnknownVariableType]
)
from signal import SIG_SETMASK, set_wakeup_fd
from typing import TYPE_CHECKING, NoReturn

from ..helpers import dialects, file_helper, porter
from ..messages import read_message_file
from .terminals import control_terminal
from .users import PATH

if TYPE_CHECKING:  # `typing` itself is wanted by nothing else that is imported before the fork
    from typing import NotRequired, TypedDict

    from .cgroups import Group
    from .twin import Twin
    from .users import User

    class Request(TypedDict):
        """What the spawner is to know of a process.

        Among its descriptors the one after those of `targets` is a message file with a `Program`. A file helper, which is
        forked off us, has none.
        """

        user: str | int | None
        """None: the default user of the `Confinement`."""
        targets: list[int]
        """What number each of the descriptors gets; 0 to 2 are /dev/null unless named."""
        blocked: list[int]
        """Signals that it starts with blocked."""
        terminal: NotRequired[tuple[int, int, str]]
        """Rows, columns and TERM of a new terminal, to control it and to be its descriptors 0 to 2."""
        metered: NotRequired[bool]
        """Its control group is one that nobody was in before, and the agent gets a file with what that uses."""
        dialect: NotRequired[str]
        """It is to be the child of a `porter`, which speaks this one of its dialects with it."""
        shared: NotRequired[bool]
        """Its program may be run from our own file if it is the same (see `twin`); it gives itself its name then."""

    #: What to run: argv, of at least one; env, None for what a login of the user would give it; cwd, None for the user's home
    #: directory, or / if there is none; what comes besides the environment of a login.
    Program = tuple[list[str], dict[str, str] | None, str | None, dict[str, str] | None]

_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 24, 38
_prctl = ctypes.CDLL(None).prctl

#: What a process failed at, where that has a name, which the spawner is not to know: the second number of a report.
NAMELESS, PROGRAM, DIRECTORY = range(3)


class Becoming:
    """All that a child needs to know, made before it is forked.

    Args:
      request: What it is to be.
      descriptors: Those that `Request.targets` gives numbers to, and that of its program.
      user: Who it is to be; None: who we are.
      group: The control group to be in, if there is one.
      terminal: Its end of its terminal, if it has one, alone in a list.
      twin: What is the same program as ours, if there is one.

    """

    __slots__ = ("_descriptors", "_group", "_program", "_request", "_terminal", "_twin", "_user")

    def __init__(
        self,
        request: Request,
        descriptors: list[int],
        user: User | None,
        group: Group | None,
        terminal: list[int],
        twin: Twin | None = None,
    ) -> None:
        self._request = request
        self._user = user
        self._group = group
        self._terminal = terminal
        self._twin = twin if "shared" in request else None
        self._program = descriptors[len(request["targets"]) :]
        # Ours are /dev/null, but for stderr, which is the console.
        self._descriptors = [(0, 2), *zip(descriptors, request["targets"], strict=False)]
        self._descriptors += [(end, target) for end in terminal for target in (0, 1, 2)]
        if user is not None:
            for descriptor in descriptors:
                # It may open its own output by name: /dev/stderr.
                if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                    os.fchown(descriptor, user.uid, -1)

    def become(self, report: int) -> NoReturn:
        """Turn this process, a child, into what was asked for, or write to *report* why not."""
        request, user = self._request, self._user
        subject = NAMELESS
        try:
            set_wakeup_fd(-1)
            argv, env, cwd = self._read_program()
            if self._group is not None:
                self._group.join()
            os.setsid()
            for end in self._terminal:
                control_terminal(end)
            if user is not None:
                _forgo_protection()
                os.setgroups(user.groups)
                os.setresgid(user.gid, user.gid, user.gid)
                if user.uid != 0:
                    _give_up_capabilities()
                os.setresuid(user.uid, user.uid, user.uid)
            subject = DIRECTORY
            _change_directory(cwd, user)
            subject = NAMELESS
            for descriptor, target in self._descriptors:
                os.dup2(descriptor, target)
            pthread_sigmask(SIG_SETMASK, request["blocked"])
            if not self._program:
                file_helper.main(dict(os.environ) if user is None else user.environment())
            subject = PROGRAM
            if "dialect" in request:
                porter.divide(dialects.DIALECTS[request["dialect"]], report)
            _exec(argv, env, self._twin)
        except OSError as exc:
            os.write(report, b"%d %d" % (exc.errno or errno.EIO, subject))
        except ValueError:  # not an argument or a variable that execve(2) could take
            os.write(report, b"%d %d" % (errno.EINVAL, subject))
        except BaseException as exc:  # noqa: BLE001  a bug of ours: say so on the console rather than run our loop twice
            sys.excepthook(type(exc), exc, exc.__traceback__)
            os.write(report, b"%d %d" % (errno.EIO, subject))
        finally:
            os._exit(127)

    def _read_program(self) -> tuple[list[str], dict[str, str], str | None]:
        if not self._program:
            return [], {}, None
        program: Program = read_message_file(self._program[0])  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
        argv, given, cwd, more = program
        env = given
        if env is None:
            env = dict(os.environ) if self._user is None else self._user.environment()
            if more:
                env.update(more)
        if "terminal" in self._request and (given is None or "TERM" not in env):
            env["TERM"] = self._request["terminal"][2]
        return argv, env, cwd


def _give_up_capabilities() -> None:
    """See to it that no program, whatever it is, gives this process or its children a capability or another user's rights."""
    number = 0
    # The kernel refuses the first number that is no capability any more.
    while _prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) == 0:
        number += 1
    if number == 0 or _prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def _forgo_protection() -> None:
    """Be as good for the kernel to kill as anybody, when memory is short; the spawner itself is not."""
    try:
        descriptor = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
    except FileNotFoundError:
        return  # no /proc: then the spawner has no such privilege either
    os.write(descriptor, b"0")
    os.close(descriptor)


def _change_directory(cwd: str | None, user: User | None) -> None:
    if cwd is not None:
        os.chdir(cwd)
    elif user is not None:
        try:
            os.chdir(user.directory)
        except OSError:
            os.chdir("/")


def _exec(argv: list[str], env: dict[str, str], twin: Twin | None) -> NoReturn:
    """execve(2) with the PATH of *env*, as a shell would; in Python's own a lazy import would fail in the users' root."""
    name = argv[0]
    if "/" in name:
        os.execve(name, argv, env)
    refusal: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    for directory in env.get("PATH", PATH).split(":"):
        path = f"{directory or '.'}/{name}"
        try:
            os.execve(path if twin is None or not twin.is_at(path) else twin.descriptor, argv, env)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except PermissionError as exc:  # a later directory may have one that can be run
            refusal = OSError(exc.errno, exc.strerror, name)
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, name) from None
    raise refusal
