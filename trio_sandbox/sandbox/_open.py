"""How files in the guest are opened."""

from __future__ import annotations

import codecs
import io
from typing import Literal, TypeAlias

import trio

from ._file import GuestFile, check_limit
from ._files import FileSession, encode_request
from ._slot import Slot
from ._text import GuestTextFile, check_newline

BinaryMode: TypeAlias = Literal[
    "rb", "wb", "ab", "xb", "rb+", "wb+", "ab+", "xb+", "r+b", "w+b", "a+b", "x+b"
]  # fmt: skip
TextMode: TypeAlias = Literal["r", "w", "a", "x", "r+", "w+", "a+", "x+", "rt", "wt", "at", "xt"]


async def open_file(
    slot: Slot,
    user: str | int | None,
    path: str,
    mode: str,
    *,
    encoding: str,
    errors: str,
    newline: str | None,
    limit: int,
) -> GuestFile | GuestTextFile:
    """What `GuestPath.open` does."""
    if not isinstance(mode, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`mode` must be str, not {type(mode).__name__}")
    kinds = mode.replace("b", "", 1).replace("t", "", 1).replace("+", "", 1)
    if kinds not in ("r", "w", "a", "x") or ("b" in mode and "t" in mode):
        raise ValueError(f"`mode` must be one of r, w, a and x, with + and b where wanted, not {mode!r}")
    check_newline(newline)
    codecs.lookup(encoding)
    io.TextIOWrapper(io.BytesIO(), encoding)  # which knows what encodings are of text
    codecs.lookup_error(errors)
    check_limit(limit)
    request = encode_request("open", path, kinds + ("+" if "+" in mode else ""))
    what = f"open of {path!r:.200}"
    session = FileSession(await slot.resolve(what), user, what)
    try:
        async with session.failures():
            await session.send(request)
            await session.reply()
    except BaseException as exc:
        if kinds != "r" and isinstance(exc, trio.Cancelled):  # made, emptied or neither, but not under way: see `call`
            await session.take_back()  # noqa: ASYNC102 - it is shielded and bounded by itself
        session.close()
        raise
    file = GuestFile(path, mode, session, limit)
    return file if "b" in mode else GuestTextFile(file, encoding, errors, newline, limit)
