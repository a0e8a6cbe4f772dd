"""Requirements of Python programs, as files have them: read into values, and never passed on as files."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path
from typing import Any, Final, cast, final

import attrs

#: What a lock is called (PEP 751).
LOCK_NAME: Final = re.compile(r"pylock(\.[^.]+)?\.toml")
#: Nobody's file of requirements is longer; what is longer is something else.
_MOST_BYTES: Final = 2**20
#: The lines between which a script says what it needs (PEP 723).
_SCRIPT_START: Final = "# /// script"
_SCRIPT_END: Final = "# ///"
#: How a URL, an absolute path or a variable that uv replaces begins.
_PLACE: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:|/|\$\{")
#: How a requirement begins (PEP 508): a name, maybe extras, and the end or what a version, a URL or a marker begins with.
_BEGINNING: Final = re.compile(r"\s*[A-Za-z0-9][A-Za-z0-9._-]*\s*(\[[^\[\]]*\]\s*)?($|[(<>=!~@;])")
#: A name of npm's, and what it may be followed by.
NPM_NAME: Final = r"(?:@[A-Za-z0-9~_][A-Za-z0-9._~-]*/)?[A-Za-z0-9~_][A-Za-z0-9._~-]*"
_NPM: Final = re.compile(rf"{NPM_NAME}(?:@[A-Za-z0-9^~*<>=][A-Za-z0-9.^~*<>=|+ -]*)?(?<!\.tgz)(?<!\.tar)(?<!\.tar\.gz)")
#: A name of Debian's, of an architecture, a version or a release; or a file.
_DEBIAN: Final = re.compile(
    r"[a-z0-9][a-z0-9+.-]*(?<!-)(?::[a-z0-9]+)?(?:=[A-Za-z0-9.+:~-]+|/[a-z0-9-]+)?|/[^\x00-\x1f\x7f]+\.deb"
)
_COMMENT: Final = re.compile(r"(^|\s)#.*$")


def check_requirement(text: str) -> None:
    """Refuse what can't be a requirement; uv looks closer.

    Raises:
      ValueError: if it is empty, an option, more than one line, the name of a file, or of a relative path, or begins with no package's name.

    """
    if not text.strip() or not text.isprintable():
        raise ValueError(f"a requirement must be one line such as 'pandas>=2', not {text!r:.100}")
    if text.lstrip().startswith("-"):
        raise ValueError(
            f"{text!r:.100} is an option, not a requirement; set options in uv's configuration and its variables (UV_...)"
        )
    if "/" in text.partition("@")[0].partition(";")[0] or text.strip().endswith((".txt", ".toml")):
        raise ValueError(f"{text!r:.100} is the name of a file: pass it as Path({text!r:.100})")
    if not _BEGINNING.match(text):
        raise ValueError(
            f"a requirement must be a package's name, with a version if you like, as in 'pandas' or 'pandas>=2', not {text!r:.100}"
        )
    name, at, place = text.partition("@")
    if at and not _PLACE.match(place.strip()):
        raise ValueError(
            f"{text!r:.100} has a relative path, which means something else in another directory: make it absolute, as in "
            f"'{name.strip():.40} @ file:///srv/name.whl'"
        )


def check_npm_requirement(text: object) -> None:
    """Refuse what is no package of the npm registry.

    Raises:
      TypeError, ValueError: if it is none.

    """
    if type(text) is not str:
        raise TypeError(f"a requirement must be str, not {text!r:.100}")
    if not _NPM.fullmatch(text):
        raise ValueError(
            f"a requirement of npm must be a package's name, with a version, a range or a tag behind '@' or without, such as "
            f"'typescript@5', not {text!r:.100}; a URL, a path and a repository can't be one"
        )


def check_debian_package(text: object) -> None:
    """Refuse what apt would not take for a package to be installed.

    Raises:
      TypeError, ValueError: if it is none.

    """
    if type(text) is not str:
        raise TypeError(f"a package's name must be str, not {text!r:.100}")
    if not _DEBIAN.fullmatch(text):
        raise ValueError(
            f"a package must be a name such as 'graphviz', 'graphviz=2.42.4-3', or the absolute path of a .deb file in the guest, "
            f"not {text!r:.100}"
        )


def read_requirements(path: Path) -> list[str]:
    """Return what a requirements file, or a ``pyproject.toml``, requires.

    Raises:
      OSError: if it can't be read.
      ValueError: if it is none, or has more than requirements.

    """
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{path} is longer than {_MOST_BYTES} bytes: that is not a requirements file")
    try:
        text = data.decode("utf-8-sig")
        found = _of_project(text) if path.suffix == ".toml" else _of_lines(text)
        for each in found:
            check_requirement(each)
    except ValueError as exc:  # what is no UTF-8 or no TOML, too
        raise ValueError(f"{path}: {exc}") from exc
    return found


@final
@attrs.frozen
class ScriptNeeds:
    """What a script says that it needs."""

    requirements: tuple[str, ...] = ()
    requires_python: str | None = None
    exclude_newer: str | None = None
    """What ``[tool.uv]`` has of that name."""


def read_script(text: str) -> ScriptNeeds:
    """Return what the script *text* needs by its block ``# /// script`` (PEP 723); nothing if it has none.

    Raises:
      ValueError: if the block can't be read, or there are two.

    """
    lines = [line.rstrip("\r") for line in text.split("\n")]
    starts = [number for number, line in enumerate(lines) if line == _SCRIPT_START]
    if not starts:
        return ScriptNeeds()
    if len(starts) > 1:
        raise ValueError(f"the script has two blocks {_SCRIPT_START!r}")
    after = lines[starts[0] + 1 :]
    comment = list(itertools.takewhile(lambda line: line == "#" or line.startswith("# "), after))
    if _SCRIPT_END not in comment:
        raise ValueError(f"the script's block {_SCRIPT_START!r} has no end, {_SCRIPT_END!r}")
    last = len(comment) - comment[::-1].index(_SCRIPT_END) - 1
    try:
        table: Any = tomllib.loads("\n".join(line[2:] for line in comment[:last]))
        requirements = tuple(_texts(table.get("dependencies", []), "dependencies"))
        for each in requirements:
            check_requirement(each)
        uv = table.get("tool", {}).get("uv", {})
        return ScriptNeeds(
            requirements,
            _text_or_none(table.get("requires-python"), "requires-python"),
            _text_or_none(uv.get("exclude-newer"), "exclude-newer of [tool.uv]"),
        )
    except (ValueError, AttributeError) as exc:
        raise ValueError(f"the script's block {_SCRIPT_START!r}: {exc}") from exc


def _text_or_none(value: object, name: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} is no text")
    return value


def allows(specifier: str, python: str) -> bool:
    """Tell whether a version of Python, major and minor, is one that ``requires-python`` allows.

    Raises:
      ValueError: if *specifier* is none.

    """
    have = _numbers(python)
    for clause in specifier.split(","):
        match = re.fullmatch(r"\s*(~=|===?|!=|<=|>=|<|>)\s*(\d+(?:\.\d+){0,3})(\.\*)?\s*", clause)
        if match is None:
            raise ValueError(f"requires-python is {specifier!r:.100}, of which {clause!r:.50} can't be read")
        operator, wanted = match[1], _numbers(match[2])
        # Which patch of its minor version the image's Python is nobody says: one that fits is enough.
        minor = wanted[:2]
        good = {
            "~=": have >= minor and have[: len(wanted) - 1] == wanted[: len(wanted) - 1][:2],
            "==": have[: len(minor)] == minor,
            "===": have[: len(minor)] == minor,
            "!=": not (match[3] and have[: len(minor)] == minor and len(wanted) <= 2),
            "<=": have <= minor,
            ">=": have >= minor,
            "<": have < minor or (have == minor and len(wanted) > 2),
            ">": have >= minor,
        }[operator]
        if not good:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _of_lines(text: str) -> list[str]:
    whole = re.sub(r"\\\r?\n", " ", text)
    lines = (_COMMENT.sub("", line).strip() for line in whole.splitlines())
    return [line for line in lines if line]


def _of_project(text: str) -> list[str]:
    project: Any = tomllib.loads(text).get("project")
    if not isinstance(project, dict):
        raise ValueError("it has no table [project]")  # noqa: TRY004 - the file's fault, not the caller's type
    return _texts(cast("dict[str, object]", project).get("dependencies", []), "project.dependencies")


def _texts(value: object, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in cast("list[object]", value)):
        raise ValueError(f"{name} is no list of texts")
    return cast("list[str]", value)
