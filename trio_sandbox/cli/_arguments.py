"""What the options' texts mean: each function is a `type` of argparse's."""

from __future__ import annotations

import argparse
import math
import os
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

# What a mere --help does not need is imported where it is needed.
if TYPE_CHECKING:
    from .._network import NetworkRule
    from ._copies import Download, Upload

#: Those of `trio_sandbox.bench`, whose import takes as long as all of ``--help``.
MEASURES = (
    "overlay",
    "cold",
    "template",
    "run",
    "memory",
    "idle",
    "warm",
    "fork",
    "pause",
    "checkpoint",
    "revert",
    "resume",
)

_MEBIBYTES = re.compile(r"(\d{1,15})(M|MiB|G|GiB)?", re.IGNORECASE | re.ASCII)


def memory_mib(text: str) -> int:
    """Read an amount of memory: ``512`` and ``512M`` are MiB, ``2G`` is GiB."""
    return _mebibytes(text, "not an amount of memory")


def disk_mib(text: str) -> int:
    """Read an amount of disk, written as one of memory is."""
    return _mebibytes(text, "not an amount of disk")


def _mebibytes(text: str, refusal: str) -> int:
    match = _MEBIBYTES.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is {refusal}; write 512 or 512M (MiB), or 2G (GiB)")
    unit = (match[2] or "M")[0].upper()
    return int(match[1]) * {"M": 1, "G": 1024}[unit]


def image_name(text: str) -> str:
    """Read an image's name. Paths in the names of container images become absolute."""
    from .._oci_reference import is_oci, parse_oci

    try:
        return str(parse_oci(text)) if is_oci(text) else text
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def network_rule(text: str) -> NetworkRule | None:
    """Read a host that may be reached, maybe with a port; None for "open", which is every public host."""
    from .._network import NetworkRule

    if text == "open":
        return None
    try:
        return NetworkRule.parse(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def seconds(text: str) -> float:
    """Read a positive number of seconds."""
    value = _number(text)
    if not value > 0:  # NaN is not above 0 either
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def patience(text: str) -> float:
    """Read a number of seconds to wait, which may be 0."""
    value = _number(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0")
    return value


def _number(text: str) -> float:
    """Read a number; NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def address(text: str) -> tuple[str, int]:
    """Read where to listen: a port, of 127.0.0.1, or an address, a colon and a port."""
    host, colon, port = text.rpartition(":")
    if not (port.isascii() and port.isdecimal() and int(port) <= 65535) or bool(colon) != bool(host):
        raise argparse.ArgumentTypeError(f"{text!r} is not where a server can listen; write a port, or ADDRESS:PORT")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


def count(text: str) -> int:
    """Read a positive number."""
    (number, *more) = counts(text)
    if more:
        raise argparse.ArgumentTypeError(f"{text!r} is not one number")
    return number


def counts(text: str) -> tuple[int, ...]:
    """Read positive numbers with commas between them."""
    words = text.split(",")
    if not all(word.isascii() and word.isdecimal() and int(word) for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} are not positive numbers with commas between them")
    return tuple(dict.fromkeys(map(int, words)))


def measures(text: str) -> tuple[str, ...]:
    """Read names of what can be measured, with commas between them."""
    names = tuple(text.split(","))
    for name in names:
        if name not in MEASURES:
            raise argparse.ArgumentTypeError(f"{name!r} can't be measured; there are: {', '.join(MEASURES)}")
    return names


def variable(text: str) -> tuple[str, str | None]:
    """Read ``NAME=VALUE``, or ``NAME`` for one that is set here."""
    name, has_value, value = text.partition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} has no name; write NAME=VALUE, or NAME for one that is set here")
    return name, value if has_value else None


def upload(text: str) -> Upload:
    """Read ``HOST[:GUEST]``; the guest's path is what follows the last colon."""
    from ._copies import Upload

    local, colon, remote = text.rpartition(":")
    if not colon:
        local, remote = text, ""
    if not local:
        raise argparse.ArgumentTypeError(f"{text!r} does not say what to upload; write HOST or HOST:GUEST")
    if not remote or remote.endswith("/"):
        remote += os.path.basename(os.path.normpath(local))
    remote = posixpath.normpath(remote)
    if posixpath.basename(remote) in ("", ".", ".."):
        raise argparse.ArgumentTypeError(f"{text!r} gives it no name in the guest; write HOST:GUEST")
    return Upload(Path(local), remote)


def download(text: str) -> Download:
    """Read ``GUEST[:HOST]``; the guest's path ends at the first colon."""
    from ._copies import Download

    remote, _, local = text.partition(":")
    if posixpath.basename(posixpath.normpath(remote or ".")) in ("", ".", ".."):
        raise argparse.ArgumentTypeError(f"{text!r} does not say what to download; write GUEST or GUEST:HOST")
    return Download(remote, Path(local))


def guest_directory(text: str) -> str:
    """Read an absolute path of the guest's."""
    if not text.startswith("/"):
        raise argparse.ArgumentTypeError(f"{text!r} is not an absolute path in the guest")
    return posixpath.normpath(text)
