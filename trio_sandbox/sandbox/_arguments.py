"""Paths of the guest among the arguments of runs and processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike

from ._path import AnyGuestPath, GuestPath, check_guest_path, check_slot
from ._slot import Slot


async def path_text(slot: Slot, path: AnyGuestPath) -> str:
    """Return a path as the guest is to get it; it is asked for where a relative `GuestPath` starts.

    Raises:
      TypeError, ValueError: for a path of the host's, or in another sandbox.
      Exception: what methods of `GuestPath` raise.

    """
    check_guest_path(path)
    if isinstance(path, GuestPath):
        check_slot(path, slot)
        if not path.is_absolute():
            path = await path.absolute()
    return str(path)  # noqa: ASYNC910 - most need not ask


async def command_texts(slot: Slot, command: Sequence[AnyGuestPath]) -> Sequence[str]:
    """Return a process's arguments as the guest is to get them. Errors as `path_text`."""
    if isinstance(command, (str, bytes)) or not isinstance(command, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        return command  # noqa: ASYNC910 - `process_request` refuses it
    texts: list[str] = []
    for argument in command:
        if isinstance(argument, str):
            texts.append(argument)
        elif isinstance(argument, (PathLike, GuestPath)):  # pyright: ignore[reportUnnecessaryIsInstance]
            texts.append(await path_text(slot, argument))
        else:
            raise TypeError(
                f"an argument in `command` must be str or a path in the guest, not {type(argument).__name__}: {argument!r:.80}"
            )
    return texts  # noqa: ASYNC910 - as above
