"""How files in the guest are opened."""

from __future__ import annotations

import codecs
from typing import Literal, TypeAlias

from ._file import GuestFile, check_limit
from ._files import FileSession, encode_request
from ._slot import Slot
from ._text import GuestTextFile

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
    kinds = mode.replace("b", "", 1).replace("t", "", 1).replace("+", "", 1)
    if kinds not in ("r", "w", "a", "x") or ("b" in mode and "t" in mode):
        raise ValueError(f"`mode` must be one of r, w, a and x, with + and b where wanted, not {mode!r}")
    if newline not in (None, "", "\n", "\r", "\r\n"):
        raise ValueError(f"`newline` must be None, '', '\\n', '\\r' or '\\r\\n', not {newline!r}")
    codecs.lookup(encoding)
    codecs.lookup_error(errors)
    check_limit(limit)
    request = encode_request("open", path, kinds + ("+" if "+" in mode else ""))
    what = f"open of {path!r:.200}"
    session = FileSession(await slot.resolve(what), user, what)
    try:
        async with session.failures():
            await session.send(request)
            await session.reply()
    except BaseException:
        session.close()
        raise
    file = GuestFile(path, mode, session, limit)
    return file if "b" in mode else GuestTextFile(file, encoding, errors, newline, limit)
