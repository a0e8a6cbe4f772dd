"""What was chosen for requirements, and for what: locks of uv's and of npm's, and what interpreters said. The store keeps them by name, each behind its own digest."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol, TypeVar

from .._private import make_private_directory, write_new_file
from ._interpreters import parse_node, parse_python
from ._manifest import Manifest
from ._npm_lock import parse_npm_lock
from ._pylock import parse_lock
from ._recipe import digest_of

PYLOCK, NPM_LOCK, PYTHON, NODE = "pylock", "npmlock", "python", "node"
CHOICE_NAME: Final = re.compile(f"(?P<kind>{PYLOCK}|{NPM_LOCK}|{PYTHON}|{NODE})-[0-9a-f]{{32}}")
#: Where a manifest names the choices that its layer was made by.
_DETAILS: Final = ("pylock", "npm_lock", "python", "node")


class AnyLock(Protocol):
    """A lock of either kind, or what an interpreter said."""

    @property
    def text(self) -> str: ...


L = TypeVar("L", bound=AnyLock)

_PARSERS: Final[Mapping[str, Callable[[str], AnyLock]]] = {
    PYLOCK: parse_lock,
    NPM_LOCK: parse_npm_lock,
    PYTHON: parse_python,
    NODE: parse_node,
}


def choice_name(kind: str, digest: str) -> str:
    """Return the name of what is chosen where all that decides on it has that digest."""
    return f"{kind}-{digest[:32]}"


def choices_of(manifest: Manifest) -> set[str]:
    """Return the names of the choices that a layer was made by."""
    names = {str(manifest.details.get(key)) for key in _DETAILS}
    return {name for name in names if CHOICE_NAME.fullmatch(name)}


def read_choice(path: Path, parse: Callable[[str], L]) -> L | None:
    """Return a stored lock; None if it is missing or damaged."""
    try:
        return _parse(path.read_text("utf-8"), parse)
    except (OSError, ValueError):
        return None


def is_choice(name: str, stored: str) -> bool:
    """Tell whether *stored* is the undamaged text of a choice of the kind that *name* says.

    Raises:
      PackagesError: if it is none at all.

    """
    match = CHOICE_NAME.fullmatch(name)
    if match is None:
        return False
    return _parse(stored, _PARSERS[match["kind"]]) is not None


def write_choice(path: Path, lock: AnyLock) -> None:
    """Keep a lock."""
    make_private_directory(path.parent, 0o755)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    write_new_file(temporary, f"{digest_of(lock.text)}\n{lock.text}", 0o644)
    temporary.replace(path)


def _parse(stored: str, parse: Callable[[str], L]) -> L | None:
    digest, _, text = stored.partition("\n")
    return parse(text) if digest == digest_of(text) else None
