"""Variables of the user's environment that name places, for programs that are run in another directory than ours."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final

#: What can be before the place of an index of uv's: its name.
_INDEX_NAME: Final = re.compile(r"[\w.-]+=")
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def absolute(name: str, value: str, places: Mapping[str, str]) -> str:
    """Return a variable's value with all paths in it absolute.

    Args:
      name: The variable's.
      value: The variable's.
      places: Variables that have paths, relative to our directory, or URLs; and what is between two of them, "" if there is one only.

    """
    if name not in places:
        return value
    separator, found = places[name], list[str]()
    for place in value.split(separator) if separator else [value]:
        match = _INDEX_NAME.match(place) if "INDEX" in name else None
        before, path = (match[0], place[match.end() :]) if match else ("", place)
        found.append(place if not path or _URL.match(path) else f"{before}{os.path.abspath(path)}")
    return separator.join(found)
