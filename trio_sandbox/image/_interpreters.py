"""The Python and the Node.js of a container image: what they are they say themselves, in a virtual machine of that image.

Nothing of the image runs on the host, and an answer is input like any other: it is bounded, each part of it is checked, and a lie about it leads to packages
that are of no use to whoever lied.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar, cast, final

import attrs

from .._errors import PackagesError
from .._stored_json import Fields, parse_json
from ._pylock import Pin
from ._stored import OLDEST_PYTHON
from ._target import Target, find_platform

#: What interpreters of images run.
_TEXTS: Final = Path(__file__).parent / "in_guest"
#: Before the answer, on its line.
_MARK: Final = "trio-sandbox-facts:"
#: Bytes of all that is said, and seconds until it is said; under emulation, on a busy machine, a Python takes some to start.
MOST_SAID: Final = 512 * 2**10
PATIENCE: Final = 120.0
_MOST_INSTALLED: Final = 5000
_VERSION: Final = re.compile(r"\d{1,2}\.\d{1,3}")
_NODE_VERSION: Final = re.compile(r"\d{1,4}\.\d{1,4}\.\d{1,4}")
_NAME: Final = re.compile("[a-z0-9]([a-z0-9-]{0,200}[a-z0-9])?")
#: As PEP 440 has them: uv reads no others.
_PACKAGE_VERSION: Final = re.compile(
    r"(\d{1,9}!)?\d{1,18}(\.\d{1,18}){0,15}((a|b|rc)\d{1,18})?(\.post\d{1,18})?(\.dev\d{1,18})?(\+[a-z0-9]+([._-][a-z0-9]+){0,15})?"
)
#: A path that can be written into a script, and into a file that describes a package.
_PATH: Final = re.compile(r"""(/[^/\x00-\x1f\x7f"'`\\$]{1,255}){1,40}""")
_LONGEST_PATH: Final = 1000
#: Which no disk keeps.
_NOT_KEPT: Final = ("/dev", "/proc", "/run", "/sys")


T = TypeVar("T")


@final
@attrs.frozen
class ImagePython:
    """The Python of an image. Made by `parse_python`."""

    text: str = attrs.field(repr=False)
    """What it said, as JSON."""
    version: str
    """Major and minor."""
    libc: tuple[str, str]
    """Name and version."""
    interpreter: str
    site: str
    scripts: str
    prefix: str
    installed: tuple[Pin, ...]
    """What is where packages go: they would be unpacked over it."""

    @property
    def takes_code(self) -> bool:
        """Whether runs can have it as their interpreter."""
        return tuple(map(int, self.version.split("."))) >= OLDEST_PYTHON

    def target(self, image: str) -> Target:
        """Return what packages are for.

        Raises:
          PackagesError: if there are none for its C library.

        """
        return Target(
            self.version,
            find_platform(image, *self.libc),
            self.site.removeprefix("/"),
            self.scripts.removeprefix("/"),
            self.prefix.removeprefix("/"),
            self.interpreter,
            container=True,
        )


@final
@attrs.frozen
class ImageNode:
    """The Node.js of an image. Made by `parse_node`."""

    text: str = attrs.field(repr=False)
    """What it said, as JSON."""
    interpreter: str
    libc: str
    """The name of its C library."""


def in_guest_program(interpreter: str, text: str, *arguments: str) -> tuple[str, ...]:
    """Return a command line by which an interpreter of an image runs one of our texts for it.

    Args:
      interpreter: Its path, or its name.
      text: The name of a file in `in_guest`.
      *arguments: What the text is given.

    """
    source = (_TEXTS / text).read_text("utf-8")
    # Isolated like the interpreter that code runs in: nothing of the image's variables, or of where we are.
    options = ("-I", "-c") if text.endswith(".py") else ("-e",)
    return (interpreter, *options, source, *arguments)


def python_question(interpreter: str = "python3") -> tuple[str, ...]:
    """Return a program whose output `parse_python` understands, by way of `find_answer`."""
    return in_guest_program(interpreter, "python_facts.py", _MARK)


def node_question() -> tuple[str, ...]:
    """Return a program whose output `parse_node` understands, by way of `find_answer`."""
    return in_guest_program("node", "node_facts.js", _MARK)


def unpacking_program(interpreter: str) -> tuple[str, ...]:
    """Return a program that unpacks an archive (tar) from its standard input where it is: the image may have no tar."""
    _, *command = in_guest_program(interpreter, "python_unpack.py")
    return (interpreter, "-S", *command)  # what is installed has no say in it


def find_answer(said: bytes, image: str) -> str:
    """Return the answer in the output of a question.

    Raises:
      PackagesError: if there is none.

    """
    lines = [line for line in said.decode("utf-8", "replace").split("\n") if line.startswith(_MARK)]
    if not lines:
        raise PackagesError(f"packages can't be added to the image {image!r}: its interpreter does not say what it is")
    return lines[-1].removeprefix(_MARK)


def missing_interpreter(image: str, program: str) -> PackagesError:
    """Return the error of an image that has not the interpreter that packages are for."""
    what, package = ("Python", "python3") if program.startswith("python") else ("Node.js", "nodejs")
    return PackagesError(
        f"packages of {what} can't be added to the image {image!r}: it has no {program} on its PATH that can be started. Take an image that has one, or "
        f'have an earlier step install it there: .apt("{package}") in an image of Debian\'s or Ubuntu\'s, .script("apk add {package}", network=...) in one of Alpine\'s'
    )


def parse_python(text: str) -> ImagePython:
    """Read what a Python said, or what was kept of that.

    Raises:
      PackagesError: if packages can't be for it, or it said anything else.

    """
    return _reading("Python", text, _python)


def parse_node(text: str) -> ImageNode:
    """Read what a Node.js said, or what was kept of that; errors as `parse_python`."""
    return _reading("Node.js", text, _node)


def _reading(what: str, text: str, read: Callable[[Fields, str], T]) -> T:
    try:
        value = parse_json(text.encode())
        return read(Fields(value), json.dumps(value, sort_keys=True))
    except ValueError as exc:
        raise PackagesError(f"the {what} of the image gives an answer that can't be one: {exc!s:.200}") from exc


def _python(fields: Fields, text: str) -> ImagePython:
    values = fields.values()
    version, (libc, libc_version) = fields.text("version"), _texts(values.get("libc"), 2)
    if not _VERSION.fullmatch(version) or len(libc) > 20 or len(libc_version) > 40:
        raise ValueError(f"version {version!r:.40}, {libc!r:.40} {libc_version!r:.40}")
    if fields.text("implementation") != "cpython" or values.get("threaded") or not values.get("wide"):
        kind = "32 bits" if not values.get("wide") else "threads without a lock" if values.get("threaded") else ""
        raise PackagesError(
            f"packages can't be chosen for the image's Python: it is {kind or fields.text('implementation'):.40}, and wheels are chosen for CPython of 64 bits "
            'with its lock (GIL). Its own pip can do it: .script("pip install ...", network=...)'
        )
    if not values.get("looked_for"):
        raise ValueError(f"it installs packages into {fields.text('site')!r:.100}, where it does not look for them")
    site, scripts = _path(fields, "site"), _path(fields, "scripts")
    prefix = "/" if fields.text("prefix") == "/" else _path(fields, "prefix")
    for other in (scripts, *(posixpath.join(prefix, name) for name in ("etc", "include", "share"))):
        if f"{site}/".startswith(f"{other}/") or f"{other}/".startswith(f"{site}/"):
            raise ValueError(f"its modules are in {site!r:.200}, and other files in {other!r:.200}")
    interpreter = _path(fields, "interpreter")
    installed = _installed(values.get("installed"))
    return ImagePython(text, version, (libc, libc_version), interpreter, site, scripts, prefix, installed)


def _node(fields: Fields, text: str) -> ImageNode:
    libc = fields.text("libc")
    version, architecture = fields.text("version"), fields.text("architecture")
    if not _NODE_VERSION.fullmatch(version) or libc not in ("glibc", "musl") or architecture != "x64":
        raise ValueError(f"version {version!r:.40} for {architecture!r:.40} and {libc!r:.40}")
    return ImageNode(text, _path(fields, "interpreter"), libc)


def _path(fields: Fields, name: str) -> str:
    path = fields.text(name)
    if not _PATH.fullmatch(path) or posixpath.normpath(path) != path or len(path) > _LONGEST_PATH:
        raise ValueError(f"its {name} is {path!r:.200}, which is no path that can be used")
    if any(path == each or path.startswith(f"{each}/") for each in _NOT_KEPT):
        raise ValueError(f"its {name} is {path!r:.200}, which is on no disk")
    return path


def _installed(value: object) -> tuple[Pin, ...]:
    if not isinstance(value, list) or len(cast("list[object]", value)) > _MOST_INSTALLED:
        raise ValueError("its list of packages is none, or too long")
    found: dict[str, Pin] = {}
    for each in cast("list[object]", value):
        name, version = _texts(each, 2)
        name = re.sub(r"[-_.]+", "-", name).lower()
        # What is called otherwise uv can't know, and so does not choose.
        if _NAME.fullmatch(name):
            found[name] = Pin(name, version)
    return tuple(found[name] for name in sorted(found))


def _texts(value: object, count: int) -> Sequence[str]:
    if not isinstance(value, list) or len(cast("list[object]", value)) != count:
        raise ValueError(f"a list of {count} texts was expected, not {value!r:.80}")
    texts = cast("list[object]", value)
    if not all(isinstance(each, str) and len(each) <= 200 for each in texts):
        raise ValueError(f"a list of {count} texts was expected, not {value!r:.80}")
    return cast("list[str]", texts)


def is_version(text: str) -> bool:
    """Tell whether uv would read *text* as a version."""
    return _PACKAGE_VERSION.fullmatch(text) is not None


def same_version(one: str, other: str) -> bool:
    """Tell whether two texts are the same version, which may be written in several ways."""
    return _version_key(one) == _version_key(other)


def _version_key(text: str) -> tuple[object, ...]:
    match = re.match(r"v?(?:(\d+)!)?(\d+(?:\.\d+)*)(.*)", text.lower(), re.DOTALL)
    if match is None:
        return (text,)
    release = [int(part) for part in match[2].split(".")]
    while len(release) > 1 and release[-1] == 0:
        release.pop()
    rest = match[3].replace("alpha", "a").replace("beta", "b").replace("preview", "rc").replace("pre", "rc")
    return (int(match[1] or 0), *release, re.sub("[-_.]", "", rest))
