"""Gives up nearly all rights to files, then becomes another program: what is left to an ordinary user who may not make namespaces.

A script, not a module of the package: it is started as ``python -I -S THIS_FILE PROGRAM ARGUMENTS...`` and imports the standard
library only. What it gives up it gives up for what it becomes, too, and for good: see landlock(7).

What is left is to read and execute programs and libraries, to read what /proc says of itself, and to open again what was inherited open,
to read it or, where it is open for that, to write it. Where the kernel knows how, there are no TCP connections, no abstract sockets and no signals
to anybody else, either. Nobody outside can be looked into or traced.

Source: ``include/uapi/linux/landlock.h`` and ``Documentation/userspace-api/landlock.rst`` in the kernel's sources.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
import sys

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1
_PR_SET_NO_NEW_PRIVS = 38

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
#: How many kinds of access to files each version knows, from the first on.
_KINDS = (13, 14, 15, 15, 16)
_TCP, _SCOPES = 0b11, 0b11
_TCP_SINCE, _SCOPES_SINCE = 4, 6

#: Where programs and libraries are, as in a jail, and what else is opened by its name.
_PROGRAMS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_READABLE = ("/etc/ld.so.cache", "/proc/self")
_DEVICES = ("/dev/null", "/dev/kvm")

_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"system call {number}")
    return result


def _version() -> int:
    """Return the version of Landlock that the kernel has; OSError if it has none, or has it switched off."""
    return _call(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(_VERSION))


class _Ruleset:
    def __init__(self, version: int) -> None:
        self._handled = (1 << _KINDS[min(version, len(_KINDS)) - 1]) - 1
        tcp = _TCP if version >= _TCP_SINCE else 0
        scopes = _SCOPES if version >= _SCOPES_SINCE else 0
        # An earlier kernel takes a shorter structure only.
        attributes = struct.pack("QQQ", self._handled, tcp, scopes)[: 24 if scopes else 16 if tcp else 8]
        self._descriptor = _call(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))

    def allow(self, descriptor: int, access: int) -> None:
        """Allow what is a file there, or below a directory."""
        rule = struct.pack("=Qi", access & self._handled, descriptor)
        try:
            _call(_ADD_RULE, ctypes.c_int(self._descriptor), ctypes.c_int(_PATH_BENEATH), rule, ctypes.c_uint(0))
        except OSError as exc:
            if exc.errno != errno.EBADFD:  # it has no place in the file system, as memory files have none
                raise

    def allow_path(self, path: str, access: int) -> None:
        """The same of a path, if there is such a thing."""
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return
        try:
            directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            self.allow(descriptor, access if directory else access & ~_READ_DIR)
        finally:
            os.close(descriptor)

    def restrict(self) -> None:
        """Let this process do nothing else from now on."""
        _call(_RESTRICT_SELF, ctypes.c_int(self._descriptor), ctypes.c_uint(0))


def _allow_inherited(ruleset: _Ruleset) -> None:
    for name in os.listdir("/proc/self/fd"):
        try:
            mode = os.fstat(int(name)).st_mode
        except OSError:
            continue  # the listing's own
        if stat.S_ISREG(mode):
            writable = fcntl.fcntl(int(name), fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
            ruleset.allow(int(name), _READ_FILE | (_WRITE_FILE | _TRUNCATE if writable else 0))


def main(argv: list[str]) -> None:
    """Become *argv*, confined."""
    ruleset = _Ruleset(_version())
    programs = os.path.realpath(argv[0])
    for path in (*_PROGRAMS, os.path.dirname(os.path.dirname(programs))):
        if path != "/":
            ruleset.allow_path(path, _EXECUTE | _READ_FILE | _READ_DIR)
    for path in _READABLE:
        ruleset.allow_path(path, _READ_FILE | _READ_DIR)
    for path in _DEVICES:
        ruleset.allow_path(path, _READ_FILE | _WRITE_FILE | _IOCTL_DEV)
    _allow_inherited(ruleset)
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "new privileges can't be refused")
    ruleset.restrict()
    os.execv(argv[0], argv)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as exc:
        sys.exit(f"Landlock can't confine {sys.argv[1]}: {exc}")
