"""The runtime directory of a host, and the reaper that cleans up when nothing else can."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, final

import trio

from .._entries import open_block
from .._errors import SandboxError
from .._nurseries import open_services
from .._observe import part_logger
from .._private import make_new_directory
from . import _reaper_main
from ._owned import is_marked, mark, remove_marked
from ._process import InheritedFds, describe_exit

_log = part_logger("runtime")

#: A socket's path may have 107 bytes; this leaves names of up to 14 bytes inside the directory.
_LONGEST_DIRECTORY: Final = 92
_PREFIX: Final = "trio-sandbox-"
_NAME: Final = re.compile(re.escape(_PREFIX) + "[0-9a-f]{12}")
#: Seconds that a dead owner's reaper has to remove its directory, before others do.
_LEFTOVER_AGE: Final = 60.0
#: Seconds for the reaper to come up (a bare Python) and to leave when told so.
_REAPER_START: Final = 30.0
_REAPER_EXIT: Final = 5.0
#: A reaper that lived less than this many seconds would do no better another time.
_REAPER_SETTLED: Final = 5.0


@final
class Runtime:
    """What everything on this host that belongs to one owner shares; made by `open_runtime` only."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._token = secrets.token_hex(16)
        self._uids: set[int] = set()
        self._guarded: set[Path] = set()
        self._reaper: trio.Process | None = None
        self._pipe = -1  # to the reaper, or to one that is about to be it

    def __repr__(self) -> str:
        return f"<Runtime in {self._directory}>"

    @property
    def directory(self) -> Path:
        """A private directory (mode 0700) for sockets and overlays; gone after the block.

        Its path is short enough for sockets with names of up to 14 bytes.
        """
        return self._directory

    @property
    def environment(self) -> Mapping[str, str]:
        """What every child process must have in its environment, so that the reaper finds it."""
        outer = os.environ.get(_reaper_main.OWNER_VARIABLE)
        tokens = self._token if outer is None else f"{outer}:{self._token}"
        return {_reaper_main.OWNER_VARIABLE: tokens}

    @property
    def reaper_pid(self) -> int | None:
        """The reaper's process id, for `doctor` and tests; None while it is being replaced."""
        return None if self._reaper is None else self._reaper.pid

    def guard_uid(self, uid: int) -> None:
        """Make every process of the user id *uid* ours to kill, if we die.

        Call it before anything runs as that user, which must be nobody else's.
        """
        self._uids.add(uid)
        self._tell(f"uid {uid}")

    def release_uid(self, uid: int) -> None:
        """Take back `guard_uid`."""
        self._uids.discard(uid)
        self._tell(f"forget {uid}")

    def guard(self, path: Path) -> None:
        """Have a file, or a control group with the empty ones in it, removed if we die. Its path has no line break."""
        self._guarded.add(path)
        self._tell(f"guard {path}")

    def release(self, path: Path) -> None:
        """Take back `guard`: it is gone."""
        self._guarded.discard(path)
        self._tell(f"release {path}")

    def _tell(self, line: str) -> None:
        if self._reaper is None:
            return  # The next one is told everything when it starts.
        try:
            # Shorter than PIPE_BUF, so all or nothing; the pipe holds thousands of these.
            os.write(self._pipe, os.fsencode(f"{line}\n"))
        except BrokenPipeError:
            pass  # It died; `serve` is about to see it.
        except BlockingIOError as exc:
            raise SandboxError(f"the reaper (PID {self._reaper.pid}) does not listen; is it stopped?") from exc

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Keep a reaper running; when cancelled, send it away. For `open_runtime` only."""
        while True:
            started = trio.current_time()
            process = await self._spawn()
            try:
                with trio.fail_after(_REAPER_START):
                    assert process.stdout is not None
                    if await process.stdout.receive_some() != b"ready\n":
                        raise SandboxError(f"the reaper did not start: it {describe_exit(await process.wait())}")
                self._reaper = process
                for uid in self._uids:
                    self._tell(f"uid {uid}")
                for path in self._guarded:
                    self._tell(f"guard {path}")
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
                status = await process.wait()
            except trio.TooSlowError as exc:
                raise SandboxError(f"the reaper did not start within {_REAPER_START:g} s") from exc
            finally:
                with trio.move_on_after(2 * _REAPER_EXIT, shield=True):
                    await self._dismiss(process)
                self._abandon(process)
            if trio.current_time() - started < _REAPER_SETTLED:
                raise SandboxError(f"the reaper {describe_exit(status)} soon after its start, and is not started again")
            _log.warning("the reaper %s; starting another", describe_exit(status))

    @trio.lowlevel.enable_ki_protection
    async def _spawn(self) -> trio.Process:
        reading, writing = os.pipe()
        with InheritedFds() as inherited, ExitStack() as stack, ExitStack() as undo:
            stack.callback(os.close, reading)
            undo.callback(os.close, writing)
            os.set_blocking(writing, False)
            # Not on its command line, which everybody may read; and before it runs, so that it has it if we die now.
            os.write(writing, f"{self._token}\n".encode())
            owner = inherited.add(os.pidfd_open(os.getpid()))
            process = await trio.lowlevel.open_process(
                [sys.executable, "-I", "-S", _reaper_main.__file__, str(owner), str(self._directory)],
                stdin=reading,
                stdout=subprocess.PIPE,
                pass_fds=inherited.numbers,
                # Nothing of ours: an outer owner's reaper must not take it for a victim.
                env={_reaper_main.REAPER_VARIABLE: self._token},
                cwd="/",
                # Neither Ctrl-C nor the terminal's end may reach it before its work is done.
                start_new_session=True,
            )
            undo.pop_all()
        self._pipe = writing
        return process

    async def _dismiss(self, process: trio.Process) -> None:
        """Send the reaper away; by now there must be nothing left for it to do. One that does not leave is killed."""
        self._reaper = process
        self._tell("done")
        self._reaper = None
        with trio.move_on_after(_REAPER_EXIT):
            await process.wait()
        if process.returncode is None:
            _log.error("the reaper (PID %d) did not leave, and is killed; was it stopped?", process.pid)
            process.kill()
            await process.wait()

    def _abandon(self, process: trio.Process) -> None:
        """Close what was open for a reaper."""
        self._reaper = None
        os.close(self._pipe)
        assert isinstance(process.stdout, trio.lowlevel.FdStream)
        process.stdout.close()


def _default_bases() -> Iterator[str]:
    """Give where large files may live: overlays do, which XDG_RUNTIME_DIR, in memory, is too small for."""
    for base in (os.environ.get("TMPDIR", ""), "/var/tmp", "/tmp"):
        if os.path.isabs(base) and os.path.isdir(base) and os.access(base, os.W_OK | os.X_OK):
            yield base


def _choose_directory(base: Path | None) -> Path:
    name = f"{_PREFIX}{secrets.token_hex(6)}"
    longest = _LONGEST_DIRECTORY - len(name) - 1
    if base is None:
        for default in _default_bases():
            if len(os.fsencode(default)) <= longest:
                return Path(default, name)
        raise SandboxError(
            "there is no place for a runtime directory: neither TMPDIR nor /var/tmp nor /tmp is a directory that can be "
            f"written and whose path has at most {longest} bytes, for the sake of sockets in it. Set TMPDIR to one"
        )
    # Absolute, but with symbolic links kept: resolving could make a short path long.
    parent = os.path.abspath(base)
    if len(os.fsencode(parent)) > longest:
        raise ValueError(
            f"the runtime directory's path must have at most {longest} bytes, for the sake of sockets in it: {parent!r}"
        )
    return Path(parent, name)


@contextmanager
def _own_directory(directory: Path) -> Generator[None]:
    """Make the directory, mark it as ours and in use, and remove it at the end."""
    try:
        make_new_directory(directory)
    except OSError as exc:
        raise SandboxError(f"can't make a runtime directory in {directory.parent}: {exc.strerror}") from exc
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            # Tells others' `remove_leftovers` that somebody is alive; systemd-tmpfiles heeds it as well.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Only now: what has the mark and no lock has no owner.
            mark(directory)
            yield
        finally:
            os.close(fd)
    finally:
        remove_marked(directory)


@contextmanager
def private_directory() -> Generator[Path]:
    """Own a directory like a `Runtime`'s for the block, without a reaper: if we are killed, the next `open_runtime` removes it.

    Raises:
      SandboxError: if there is no place for it, or it can't be made.
    """
    directory = _choose_directory(None)
    with _own_directory(directory):
        yield directory


def remove_leftovers(base: Path) -> None:
    """Remove runtime directories of owners that died together with their reapers.

    That takes a loss of power, or somebody who kills whole control groups, as systemd and container
    engines do; then the processes are gone, but the overlays are not. What has a name like theirs, but
    not their mark, is somebody's own.
    """
    for name in os.listdir(base):
        path = base / name
        if _NAME.fullmatch(name) is None or not is_marked(path):
            continue
        try:
            if time.time() - path.lstat().st_mtime < _LEFTOVER_AGE:
                continue
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # Its owner removed it, or it is no directory.
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass  # In use.
        else:
            _log.warning("removing %s, which a dead owner left", path)
            try:
                remove_marked(path)
            except OSError as exc:
                _log.warning("it can't be: %s", exc)
        finally:
            os.close(fd)


@open_block
async def open_runtime(base: Path | None = None) -> AsyncGenerator[Runtime]:
    """Own a runtime directory and a reaper for the block.

    The reaper is a small process that waits for our death. If this process dies without leaving the
    block, even by SIGKILL, the reaper kills every process that was started with
    `Runtime.environment` and removes the directory; that takes well under two seconds.

    When the block exits, cancelled or not, the directory is removed and the reaper ends. Processes are
    their owners' to end before that. Directories in *base* that earlier owners left when they were
    killed together with their reapers are removed on the way in.

    Args:
      base: The existing directory in which to make ours; None: the first of ``TMPDIR``, ``/var/tmp`` and ``/tmp`` that
        can be written and is short enough for sockets. It must have room for what the guests write to their disks.

    Raises:
      ValueError: if the path of *base* is too long for sockets.
      SandboxError: if the directory can't be made, or the reaper can't be started.
    """
    directory = _choose_directory(base)
    runtime = Runtime(directory)
    async with open_services("open_runtime()") as services:
        # The reaper first: there is no moment in which the directory exists and nobody would remove it.
        await services.start(runtime.serve)
        with _own_directory(directory):
            await trio.to_thread.run_sync(remove_leftovers, directory.parent)
            yield runtime
