"""What a guest says of a file: bytes of a hostile guest in, an `os.stat_result` out."""

from __future__ import annotations

import os

from .._errors import GuestProtocolError

#: All bits of `st_mode`.
HIGHEST_MODE = 0o177777
_NANOSECONDS = 10**9
_UNSIGNED_32, _UNSIGNED_64, _SIGNED_64 = (0, 2**32 - 1), (0, 2**64 - 1), (0, 2**63 - 1)
#: Seconds of 64 bits, which some file systems have, in nanoseconds.
_TIMES = (-(2**63) * _NANOSECONDS, 2**63 * _NANOSECONDS)
#: What the guest tells of a file, in its order, and what each number can be.
_STAT_RANGES = {
    "st_mode": (0, HIGHEST_MODE),
    "st_ino": _UNSIGNED_64,
    "st_dev": _UNSIGNED_64,
    "st_nlink": _UNSIGNED_64,
    "st_uid": _UNSIGNED_32,
    "st_gid": _UNSIGNED_32,
    "st_size": _SIGNED_64,
    "st_rdev": _UNSIGNED_64,
    "st_blksize": _SIGNED_64,
    "st_blocks": _SIGNED_64,
    "st_atime_ns": _TIMES,
    "st_mtime_ns": _TIMES,
    "st_ctime_ns": _TIMES,
}
#: So many of them are the first items of the result as a tuple; seconds follow.
_STAT_SEQUENCE = 7
_STAT_DIGITS = len(str(_TIMES[0]))


def parse_stat(payload: bytes) -> os.stat_result:
    """Return the status.

    Raises:
      GuestProtocolError: if there are not as many numbers as there should be, or one of them can't be what it stands for.

    """
    fields = payload.split(b"\0")
    numbers: list[int] = []
    if len(fields) == len(_STAT_RANGES):
        for field, (lowest, highest) in zip(fields, _STAT_RANGES.values(), strict=True):
            # Not int() alone: it takes blanks, underscores and megabytes of digits.
            if not 0 < len(field) <= _STAT_DIGITS or not field.removeprefix(b"-").isdigit():
                break
            number = int(field)
            if not lowest <= number <= highest:
                break
            numbers.append(number)
    if len(numbers) != len(_STAT_RANGES):
        raise GuestProtocolError(f"the guest sent something that is not a status: {payload[:200]!r}")
    status: dict[str, int | float] = dict(zip(_STAT_RANGES, numbers, strict=True))
    seconds: list[int] = []
    for name in ("st_atime", "st_mtime", "st_ctime"):
        nanoseconds = status[f"{name}_ns"]
        status[name] = nanoseconds / _NANOSECONDS
        seconds.append(int(nanoseconds // _NANOSECONDS))
    # Python 3.13 refuses names whose values are in the sequence, too.
    others = {name: value for number, (name, value) in enumerate(status.items()) if number >= _STAT_SEQUENCE}
    return os.stat_result([*numbers[:_STAT_SEQUENCE], *seconds], others)
