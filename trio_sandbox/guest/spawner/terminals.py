"""Pseudo-terminals by ioctl_tty(2), for the spawner, which opens them, and the agent. Stdlib only."""

from __future__ import annotations

import fcntl
import os
import struct

_TCGETS, _TCSETS = 0x5401, 0x5402
_TIOCSCTTY = 0x540E
_TIOCSWINSZ = 0x5414
_TIOCSPTLCK = 0x40045431
_TIOCGPTPEER = 0x5441
#: struct termios: four words of flags, the line discipline and 19 control characters.
_TERMIOS_SIZE = 36
#: Of the first word: what the erase key deletes is a character, not a byte.
_IUTF8 = 0o40000


def open_terminal(rows: int, columns: int, owner: int | None) -> tuple[int, int]:
    """Open a new terminal of the file system that we live in; return our end and that of a process.

    Args:
      rows: Its height in characters, up to 65535.
      columns: Its width, likewise.
      owner: The user who is to be able to open it by its name; None for us.

    Raises:
      OSError: where there are no more terminals, or no /dev/ptmx.

    """
    flags = os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC
    ours = os.open("/dev/ptmx", flags)
    try:
        fcntl.ioctl(ours, _TIOCSPTLCK, struct.pack("i", 0))
        # Not by its name, which a root user of the guest could have made the name of something else.
        theirs = fcntl.ioctl(ours, _TIOCGPTPEER, flags)
        try:
            resize_terminal(ours, rows, columns)
            attributes = bytearray(fcntl.ioctl(theirs, _TCGETS, bytes(_TERMIOS_SIZE)))
            struct.pack_into("I", attributes, 0, struct.unpack_from("I", attributes)[0] | _IUTF8)
            fcntl.ioctl(theirs, _TCSETS, bytes(attributes))
            if owner is not None:
                os.fchown(theirs, owner, -1)
        except BaseException:
            os.close(theirs)
            raise
    except BaseException:
        os.close(ours)
        raise
    return ours, theirs


def control_terminal(descriptor: int) -> None:
    """Make a terminal the controlling one of this process's session, which has none."""
    fcntl.ioctl(descriptor, _TIOCSCTTY, 0)


def resize_terminal(descriptor: int, rows: int, columns: int) -> None:
    """Set a terminal's size; its foreground processes get SIGWINCH where that changes it."""
    fcntl.ioctl(descriptor, _TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
