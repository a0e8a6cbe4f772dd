"""JSON that we wrote to a disk ourselves, read as if anybody had: damage is one kind of error, whatever it is.

`json.loads` alone raises `RecursionError` for what is nested deep, takes NaN and infinity, and a file of any size. What is read
is then used as if it had the types that were written: a number that is `True`, or has 300 digits, goes wrong much later.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final, NoReturn, cast, final

#: Bytes of a file; ours have some hundred, unless their writer knows of more.
_LONGEST: Final = 2**20
_HIGHEST: Final = 2**63 - 1
#: The year 9999, the last that a date may have.
_LAST_SECOND: Final = 253_402_300_799


def read_json(path: Path, *, longest: int = _LONGEST) -> object:
    """Return the value in a file.

    Args:
      path: The file.
      longest: Bytes that it may have.

    Raises:
      ValueError: if it is not JSON, or more than any file of ours.
      OSError: if it can't be read.

    """
    with open(path, "rb", opener=_open_at_once) as file:
        data = file.read(longest + 1)
    if len(data) > longest:
        raise ValueError(f"it has more than {longest} bytes")
    return parse_json(data)


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a named pipe would wait for ever


def parse_json(data: bytes) -> object:
    """Return the value that *data* is. `ValueError` if it is not JSON in UTF-8, or is nested too deep."""
    try:
        return json.loads(data.decode(), parse_constant=_refuse)
    except RecursionError as exc:
        raise ValueError("it is nested too deep") from exc


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


class OtherVersionError(ValueError):
    """It was written by a version of the library whose files mean something else."""


@final
class Fields:
    """The fields of an object, each of the type that it must have; `ValueError` if it has not.

    Args:
      value: What ought to be an object.

    """

    def __init__(self, value: object) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"it is damaged: an object was expected, not {value!r:.80}")  # noqa: TRY004  damage is one error
        self._fields = cast("dict[str, object]", value)

    def check_format(self, wanted: int) -> None:
        """Refuse what has another number than *wanted* as its "format".

        Raises:
          OtherVersionError: which says both.

        """
        found = self._fields.get("format")
        if type(found) is not int or found != wanted:
            raise OtherVersionError(
                f"its format is {found!r:.20}, and this version of trio-sandbox reads {wanted} only"
            )

    def names(self) -> list[str]:
        """Return the names of all fields."""
        return list(self._fields)

    def values(self) -> dict[str, object]:
        """Return the fields as they are."""
        return dict(self._fields)

    def text(self, name: str) -> str:
        """Return a text that can be written anywhere."""
        value = self._fields.get(name)
        if not isinstance(value, str) or (not value.isascii() and not _is_unicode(value)):
            raise self._damaged(name, "a text")
        return value

    def number(self, name: str) -> int:
        """Return a whole number, not negative, of at most 63 bits."""
        value = self._fields.get(name)
        if type(value) is not int or not 0 <= value <= _HIGHEST:
            raise self._damaged(name, "a whole number, not negative,")
        return value

    def time(self, name: str) -> float:
        """Return a time in Unix seconds that can be shown as a date."""
        value = self._fields.get(name)
        # A bool is a number to isinstance().
        if type(value) not in (int, float) or not 0 <= cast("float", value) <= _LAST_SECOND:
            raise self._damaged(name, "a time")
        return float(cast("float", value))

    def flag(self, name: str) -> bool:
        """Return true or false."""
        value = self._fields.get(name)
        if type(value) is not bool:
            raise self._damaged(name, "true or false")
        return value

    def data(self, name: str) -> bytes:
        """Return bytes that were written in hexadecimal digits."""
        return bytes.fromhex(self.text(name))

    def fields(self, name: str) -> Fields:
        """Return the fields of an object in this one."""
        return Fields(self._fields.get(name))

    def items(self, name: str, most: int) -> list[object]:
        """Return the values of a list that has no more than *most*."""
        value = self._fields.get(name)
        if not isinstance(value, list) or len(cast("list[object]", value)) > most:
            raise self._damaged(name, f"a list of at most {most}")
        return cast("list[object]", value)

    def _damaged(self, name: str, wanted: str) -> ValueError:
        return ValueError(f"it is damaged: {name!r} must be {wanted} and is {self._fields.get(name)!r:.80}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a character beyond U+FFFF
        return False
    return True
