"""What runs as the reaper: the one process of ours that outlives a host that was killed.

A script, not a module of the package: it is started as ``python -I -S THIS_FILE ...`` and imports
the standard library only, so that nothing of the user's can slow it down or break it.

    argv: PIDFD DIRECTORY; stdin: a pipe that only the owner writes to

On that pipe come lines: first the token, which is nobody else's to read as a command line is, then ``uid N`` (processes of this user are the owner's), ``forget N``,
``guard PATH`` (a file or a control group of the owner's), ``release PATH``, and at a clean end ``done``. Once the pipe ends or the owner is dead without ``done``, whatever belongs to the
owner is killed until nothing more is found, and its runtime directory and what it had guarded are removed.

What belongs to the owner is found by looking at every process rather than in a list of those that
it told us about: between the spawning and the telling the owner can die. It is
  - what carries the token in its environment, as every child of ours and its descendants do;
  - what runs as a user id that was made up for one VM. No process can change that about itself,
    and it needs no right to look into processes of other users, which root in a container lacks;
  - descendants and process group of these, for programs that clear the environment.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

#: Name of the environment variable that holds the tokens of all owners, the outermost first.
OWNER_VARIABLE = "TRIO_SANDBOX_OWNER"
#: Set for reapers only: a host that runs inside another host's process must keep its own reaper.
REAPER_VARIABLE = "TRIO_SANDBOX_REAPER"

#: The file by which a directory is known as one of ours. Without it a directory is never emptied, whatever its name.
MARKER = ".trio-sandbox"

#: Seconds between two looks, how long nothing must have been found, and when to give up on what
#: does not die (a process that is stuck in the kernel).
_PAUSE = 0.02
_QUIET = 0.3
_PATIENCE = 60.0


class Process:
    """What one look at /proc said about a process."""

    def __init__(self, pid: int, token: str) -> None:
        self.pid = pid
        with open(f"/proc/{pid}/stat", "rb") as stat:
            # The name stands in parentheses and may hold anything, parentheses included.
            fields = stat.read().rpartition(b")")[2].split()
        self.state, self.parent, self.group = fields[0].decode(), int(fields[1]), int(fields[2])
        with open(f"/proc/{pid}/status", "rb") as status:
            # The real one, of the four. (The owner of the directory may be root for any process.)
            self.uid = next(int(line.split()[1]) for line in status if line.startswith(b"Uid:"))
        self.owned = self.reaper = False
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                environment = file.read().split(b"\0")
        except PermissionError:
            return
        for entry in environment:
            name, _, value = entry.partition(b"=")
            if name == OWNER_VARIABLE.encode():
                self.owned = token.encode() in value.split(b":")
            elif name == REAPER_VARIABLE.encode():
                self.reaper = True


def look(token: str) -> dict[int, Process]:
    """Return every process but ourselves, reapers and those that are dead already."""
    processes: dict[int, Process] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                process = Process(int(name), token)
            except (FileNotFoundError, ProcessLookupError):
                continue  # It ended while we looked.
            if process.state not in "ZX" and not process.reaper:
                processes[process.pid] = process
    return processes


def victims(processes: dict[int, Process], uids: set[int], groups: set[int]) -> set[int]:
    """Return those of *processes* that belong to the owner.

    *groups* are those that earlier victims led. The kernel does not give their numbers to others
    while they have members.
    """
    found = {p.pid for p in processes.values() if p.owned or p.uid in uids or p.group in groups}
    while True:
        more = {p.pid for p in processes.values() if p.parent in found or p.group in found} - found
        if not more:
            return found
        found |= more


def reap(token: str, uids: set[int]) -> None:
    """Kill what belongs to the owner until nothing has been found for a while."""
    groups: set[int] = set()
    started = quiet_since = time.monotonic()
    while (now := time.monotonic()) - quiet_since < _QUIET and now - started < _PATIENCE:
        processes = look(token)
        found = victims(processes, uids, groups)
        groups |= {pid for pid in found if processes[pid].group == pid}
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass  # Gone, or a set-user-id program, which its owner's death has to end.
        if found:
            quiet_since = time.monotonic()
        time.sleep(_PAUSE)


def read_token() -> str:
    """Read the first line, a byte at a time: what follows is for `follow`. The owner wrote it before we were started."""
    text = b""
    while byte := os.read(0, 1):
        if byte == b"\n":
            return text.decode()
        text += byte
    raise SystemExit("there is no token")


def follow(owner: int, uids: set[int], guarded: set[bytes]) -> bool:
    """Read what the owner says until it says that it is done (True) or is gone (False)."""
    text = b""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(owner, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if 0 in ready:
            data = os.read(0, 65536)
            *lines, text = (text + data).split(b"\n")
            for line in lines:
                word, _, name = line.partition(b" ")
                if word == b"done":
                    return True
                if word == b"uid":
                    uids.add(int(name))
                elif word == b"forget":
                    uids.discard(int(name))
                elif word == b"guard":
                    guarded.add(name)
                elif word == b"release":
                    guarded.discard(name)
            if not data:
                return False
        elif owner in ready:
            # Only now, when the pipe holds nothing more: a fork of the owner's may keep it open.
            return False


def remove_guarded(path: bytes) -> None:
    """Remove a file, and its directory if that is empty then; or a control group and those in it, as far as nothing runs in them."""
    try:
        os.unlink(path)
        directories = [os.path.dirname(path)]
    except IsADirectoryError:
        # What the kernel has in such a directory does not count.
        directories = [entry.path for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)] + [path]
    except OSError:
        return  # it is gone, or can't be removed; nobody is left to be told
    for directory in directories:
        try:
            os.rmdir(directory)
        except OSError:
            pass  # as with the runtime directory


def remove_marked(directory: str | os.PathLike[str]) -> None:
    """Remove a directory of ours: one with the mark, which goes last, or an empty one, which has no mark yet.

    Raises:
      OSError: if it is neither, or something in it can't be removed. The rest of it is gone then, but not the mark.

    """
    # By descriptor: a symbolic link is not followed, and nothing can be put in its place meanwhile.
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        names = os.listdir(fd)
        if MARKER in names:
            failure: OSError | None = None
            for name in names:
                try:
                    if name != MARKER:
                        _remove_entry(name, fd)
                except OSError as exc:
                    failure = exc
            if failure is not None:
                raise failure
            os.unlink(MARKER, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(directory)  # refuses what is not empty


def _remove_entry(name: str, directory_fd: int) -> None:
    if not _unlink(name, directory_fd):
        try:
            remove_tree(name, directory_fd)
        except FileNotFoundError:
            pass  # Somebody else removes it as well.


def remove_tree(path: str | os.PathLike[str], directory_fd: int | None = None) -> None:
    """Remove a directory with all that is in it, however deep that is and whatever its modes are, following no link.

    A stranger may have had a part in what is in it. So directories within directories are moved up before they are looked into: none is
    opened by a long path, or from within another one.

    Args:
      path: Which.
      directory_fd: What *path* is relative to; None: the directory that we are in.

    Raises:
      OSError: if something can't be removed. The rest may be there, in other places.

    """
    top = _open_to_empty(path, directory_fd)
    unique = os.urandom(8).hex()
    moved = 0
    try:
        while names := os.listdir(top):
            for name in names:
                if _unlink(name, top):
                    continue
                below = _open_to_empty(name, top)
                try:
                    for inner in os.listdir(below):
                        if not _unlink(inner, below):
                            os.close(_open_to_empty(inner, below))
                            os.rename(inner, f"{unique}-{moved}", src_dir_fd=below, dst_dir_fd=top)
                            moved += 1
                finally:
                    os.close(below)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(path, dir_fd=directory_fd)


def _unlink(name: str, directory_fd: int) -> bool:
    """Remove a name; False if it is a directory's."""
    try:
        os.unlink(name, dir_fd=directory_fd)
    except IsADirectoryError:
        return False
    except FileNotFoundError:
        pass  # Somebody else removes it as well.
    return True


def _open_to_empty(path: str | os.PathLike[str], directory_fd: int | None) -> int:
    """Open a directory; it can be emptied then if it is ours."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, dir_fd=directory_fd)
    except PermissionError:
        os.chmod(path, 0o700, dir_fd=directory_fd)
        fd = os.open(path, flags, dir_fd=directory_fd)
    try:
        os.fchmod(fd, 0o700)
    except PermissionError:
        pass  # It is somebody else's: whether that matters we shall see.
    return fd


def main() -> None:
    """Run as the reaper."""
    owner, directory = int(sys.argv[1]), sys.argv[2]
    token = read_token()
    try:
        os.write(1, b"ready\n")
    except BrokenPipeError:
        pass  # It died while we started; we may be the second reaper, with work to do.
    os.close(1)
    uids: set[int] = set()
    guarded: set[bytes] = set()
    if not follow(owner, uids, guarded):
        reap(token, uids)
        for path in guarded:
            remove_guarded(path)
        try:
            remove_marked(directory)
        except OSError:
            pass  # Nobody is left to be told. The next owner of ours tries again.


if __name__ == "__main__":
    main()
