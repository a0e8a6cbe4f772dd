"""Values that a guest may use and never sees: names with texts that are in no repr, no pickle and no copy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import final

#: The name of an environment variable, as a shell takes it.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
#: What may stand in a header: printable ASCII, with no space at either end.
_VALUE = re.compile(r"[!-~]([ -~]*[!-~])?")
_SHORTEST, _LONGEST = 4, 4096
_MOST = 32


@final
class Secrets(Mapping[str, str]):
    """Secrets by their names. Hashable; its repr has the names only; it can't be pickled unless it is empty."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, str] | None = None) -> None:
        if values is not None and not isinstance(values, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"`secrets` must be a mapping of names to values, not {type(values).__name__}")
        self._values: dict[str, str] = dict(values or {})
        if len(self._values) > _MOST:
            raise ValueError(f"`secrets` must have at most {_MOST} entries, not {len(self._values)}")
        for name, value in self._values.items():
            _check(name, value)

    def __getitem__(self, name: str) -> str:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"<secrets {', '.join(self._values)}>" if self._values else "{}"

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __copy__(self) -> Secrets:
        return self

    def __deepcopy__(self, memo: object) -> Secrets:
        return self

    def __reduce__(self) -> tuple[type[Secrets], tuple[()]]:
        if self._values:
            raise TypeError(
                "a NetworkRule with secrets can't be pickled: pickles are written to files, and sent to other programs. "
                "Make it where it is used"
            )
        return Secrets, ()


def _check(name: object, value: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"a name in `secrets` must be str, not {type(name).__name__}")
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"a name in `secrets` must be that of an environment variable, not {name!r:.150}: letters, digits and '_', "
            "128 at most, and no digit first"
        )
    # What is wrong with a value is said without the value.
    if not isinstance(value, str):
        raise TypeError(f"`secrets[{name!r}]` must be str, not {type(value).__name__}")
    if not _SHORTEST <= len(value) <= _LONGEST:
        raise ValueError(
            f"`secrets[{name!r}]` must have from {_SHORTEST} to {_LONGEST} characters, not {len(value)}: "
            "it is put into a header of a request, and looked for in all responses"
        )
    if not _VALUE.fullmatch(value):
        raise ValueError(
            f"`secrets[{name!r}]` must be printable ASCII without line breaks, and begin and end with no space: it is put "
            "into a header of a request. A line break at the end may come from the file that it was read from"
        )
