"""Container images fetched by skopeo, which knows registries, archives, layouts, and the user's credentials for them.

It is asked for the image of our guests' platform, and puts manifest, configuration and layers into a directory as they
are. Whose credentials, certificates, mirrors and signatures count is its configuration, which is the user's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from ..._errors import OciError
from ..._nurseries import hide_nursery
from ..._oci_reference import OciReference
from ...qemu import require_program, run_owned
from .._full_disk import says_full
from ._unpack import MOST_BYTES

_OUTPUT_BYTES: Final = 16 * 2**10
_LINES, _COLUMNS = 5, 600
_MESSAGE: Final = re.compile(r'level=(?:fatal|error) msg="((?:[^"\\]|\\.)*)"')
#: Seconds between two looks at how much is there.
_LOOK: Final = 0.5

Report = Callable[[str, float | None], object]


async def fetch(
    reference: OciReference, directory: Path, temporary: Path, environment: Mapping[str, str], report: Report
) -> None:
    """Have the image *reference* in the new directory *directory*. Cancelled, it leaves no process.

    Args:
      reference: Which.
      directory: Where to.
      temporary: For files that skopeo needs meanwhile; what it leaves there is of no use.
      environment: Goes into the environment of every child process.
      report: Told what is going on.

    Raises:
      OciError: if it can't be fetched, or is too large; skopeo's words are in the message.
      MissingProgramError: if skopeo is not installed.

    """
    report("fetching", None)
    for each in (directory, temporary):
        os.mkdir(each)

    async def watch() -> None:
        while True:
            await trio.sleep(_LOOK)
            size = _size(directory) + _size(temporary)
            report(f"fetching: {size >> 20} MiB", None)
            if size > MOST_BYTES:
                raise too_large(reference)

    argv = [
        "prlimit",
        f"--fsize={MOST_BYTES}",
        require_program("skopeo"),
        "--override-os",
        "linux",
        "--override-arch",
        "amd64",
    ]
    argv += ["--tmpdir", os.fspath(temporary), "copy", str(reference), f"dir:{directory}"]
    with hide_nursery("the fetching of a container image"):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            process = await run_owned(argv, environment={**os.environ, **environment}, tail_bytes=_OUTPUT_BYTES)
            nursery.cancel_scope.cancel(reason="it is fetched")
    if process.returncode != 0:
        raise _explain(reference, process.output())


def too_large(reference: OciReference) -> OciError:
    return OciError(
        f"the container image {reference} is too large: a file of it, or all, have more than {MOST_BYTES >> 30} GiB"
    )


def _size(directory: Path) -> int:
    """Return the bytes of all files there; what somebody removes meanwhile has none."""
    size = 0
    for path, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.lstat(os.path.join(path, name)).st_size
    return size


def _explain(reference: OciReference, output: str) -> OciError:
    """Return the error that skopeo's output tells of, with its words."""
    found = [message.replace('\\"', '"').replace("\\n", " ") for message in _MESSAGE.findall(output)]
    lines = found or [line for line in output.splitlines() if line.strip()]
    words = "\n".join(["skopeo says:", *(line[:_COLUMNS] for line in lines[-_LINES:])])
    said = words.lower()
    if says_full(said):
        return OciError(f"the container image {reference} can't be fetched: the disk is full\n{words}")
    if "file too large" in said:
        return too_large(reference)
    if "unauthorized" in said or "authentication required" in said or "denied" in said:
        return OciError(
            f"the container image {reference} can't be fetched: the registry does not have it, or wants other credentials, which "
            f"`skopeo login` keeps\n{words}"
        )
    if "no image found in manifest list" in said or "no image found in image index" in said:
        return OciError(f"the container image {reference} has nothing for linux on amd64, which guests are\n{words}")
    return OciError(f"the container image {reference} can't be fetched; it is safe to try again\n{words}")
