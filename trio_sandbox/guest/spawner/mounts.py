"""Mounting, and the namespaces that users' processes live in. Linux only, stdlib only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_NOATIME = 1024
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
_MNT_DETACH = 2
_CLONE_NEWNS = 0x00020000
_CLONE_NEWPID = 0x20000000

#: Character devices that every program may expect: name, major and minor number (Linux's devices.txt).
_DEVICES = (
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
)
_LINKS = (
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
)

#: Files in /etc that say who a machine is.
IDENTITY_FILES = ("resolv.conf", "machine-id", "hostname", "hosts")
#: Of a linked file, so much is kept.
_LONGEST_CONTENT = 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def mount(source: str, target: str, fstype: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """Mount on the directory *target*, which is made where it is missing."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(target)
    options = None if data is None else data.encode()
    kind = None if fstype is None else fstype.encode()
    _check(_libc.mount(source.encode(), os.fsencode(target), kind, ctypes.c_ulong(flags), options), target)


def bind_file(source: str, target: str) -> None:
    """Have the file *source* be seen at the file *target*."""
    _check(_libc.mount(source.encode(), target.encode(), None, ctypes.c_ulong(MS_BIND), None), target)


def unmount(target: str) -> None:
    """Take off what is mounted on *target*; whoever has it open keeps it."""
    with contextlib.suppress(OSError):  # the guest's root user did already
        _check(_libc.umount2(target.encode(), _MNT_DETACH), target)


def enter_namespaces() -> None:
    """Go on as process 1 of a new PID namespace, in a mount namespace of its own.

    The calling process ends: it is its child that returns. The child's parent is then whoever
    adopts orphans, which in a virtual machine is process 1, so that no process stands between.
    """
    _check(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWPID), "unshare")
    # Otherwise what we mount would show in the namespace that we came from.
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    if os.fork() != 0:
        os._exit(0)


def enter_root(root: str) -> None:
    """Make *root* the file system of this mount namespace, with what programs expect in it, and drop all else."""
    # pivot_root(2) wants a mount point.
    mount(root, root, None, MS_BIND | MS_REC)
    os.chdir(root)
    # Of processes that are not their own, users see nothing: neither what is done as root, nor us.
    mount("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "hidepid=2")
    mount("sysfs", "sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY)
    mount("tmpfs", "run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    _make_devices("dev")
    # With both arguments the same the old root ends up on top of the new one, and comes off from there: pivot_root(2), "NOTES".
    _check(_libc.pivot_root(b".", b"."), root)
    _check(_libc.umount2(b".", _MNT_DETACH), root)
    os.chdir("/")


def _make_devices(dev: str) -> None:
    mount("tmpfs", dev, "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755")
    for name, major, minor in _DEVICES:
        os.mknod(f"{dev}/{name}", 0o666 | stat.S_IFCHR, os.makedev(major, minor))
        os.chmod(f"{dev}/{name}", 0o666)
    for name, target in _LINKS:
        os.symlink(target, f"{dev}/{name}")
    mount("devpts", f"{dev}/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620,gid=5")
    mount("tmpfs", f"{dev}/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")


def open_identity_files(etc: str = "/etc") -> list[int]:
    """Return descriptors of `IDENTITY_FILES`, for writing. They are ordinary files, which users may replace.

    A machine that goes on from a saved state has to say who it is before its first output: an open file costs least.
    What is missing is made: programs that bring no libc look for these files as well. What can't be opened as a regular file is
    written to a file without a name, where nobody sees it.
    """
    with contextlib.suppress(OSError):  # it is there, or is nothing that can be
        os.mkdir(etc)
    replace_link(f"{etc}/resolv.conf")
    return [_open_regular(f"{etc}/{name}") for name in IDENTITY_FILES]


def replace_link(path: str) -> None:
    """Put in place of the link *path* a file with the same content; an empty one if it leads nowhere.

    In many images the resolver's file is a link to what a service of the image would write, which does not run here.
    """
    with contextlib.suppress(OSError):
        if not os.path.islink(path):
            return
        content = b""
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            try:
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    content = os.read(descriptor, _LONGEST_CONTENT)
            finally:
                os.close(descriptor)
        os.unlink(path)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, content)
        finally:
            os.close(descriptor)


def _open_regular(path: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    # An image that can't have it is no reason not to run.
    with contextlib.suppress(OSError):
        descriptor = os.open(path, flags, 0o644)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    return os.memfd_create("identity", os.MFD_CLOEXEC)
