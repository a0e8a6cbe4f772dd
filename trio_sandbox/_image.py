"""What a sandbox's code sees, as one value: a named image, and steps that are added to it in order."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path, PurePosixPath
from typing import Final, final

import attrs

from ._checks import instance, to_path
from ._metadata import mark_public
from ._network import Network
from ._requirements import LOCK_NAME, check_requirement, read_requirements

#: Where no image is named.
DEFAULT_IMAGE: Final = "python"
#: Directories of the guest's that no disk keeps: the kernel's, and those in memory.
_NOT_KEPT: Final = ("dev", "proc", "run", "sys")
_VARIABLE: Final = re.compile("[A-Za-z_][A-Za-z0-9_]*")
_DAY: Final = re.compile(r"\d{4}-\d\d-\d\d")


@final
@attrs.frozen
class PackagesStep:
    """Packages of Python's, by requirements or by a whole lock."""

    requirements: tuple[str, ...] = ()
    lock: str | None = attrs.field(default=None, repr=False)
    """The text of a pylock.toml; then there are no requirements."""
    exclude_newer: str | None = None
    """Only what was published before then counts, RFC 3339."""

    def __str__(self) -> str:
        return f"packages {'of a lock' if self.lock is not None else ' '.join(self.requirements)}"

    def call(self) -> str:
        """Return the call that makes it, for `repr`."""
        words = [repr(each) for each in self.requirements]
        if self.lock is not None:
            words = [f"<a lock of {len(self.lock)} characters>"]
        if self.exclude_newer is not None:
            words.append(f"exclude_newer={self.exclude_newer!r}")
        return f"packages({', '.join(words)})"


@final
@attrs.frozen
class FilesStep:
    """Files and directories of the host's, by their places in the guest."""

    places: tuple[tuple[str, Path], ...]

    def __str__(self) -> str:
        return f"files {' '.join(target for target, _ in self.places)}"

    def call(self) -> str:
        """Return the call that makes it, for `repr`."""
        return f"files({ {target: os.fspath(source) for target, source in self.places}!r})"


@final
@attrs.frozen
class EnvironmentStep:
    """Variables that every program in the guest finds in its environment."""

    variables: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"environment {' '.join(name for name, _ in self.variables)}"

    def call(self) -> str:
        """Return the call that makes it, for `repr`."""
        return f"env({dict(self.variables)!r})"


@final
@attrs.frozen
class ScriptStep:
    """A shell script that runs as root in a virtual machine of the image."""

    command: str
    network: Network = attrs.field(factory=Network.none, validator=instance(Network))
    """What it may reach."""

    def __str__(self) -> str:
        first, *more = self.command.strip().splitlines()
        return f"script {first[:60]}{' ...' if more or len(first) > 60 else ''}"

    def call(self) -> str:
        """Return the call that makes it, for `repr`."""
        network = f", network={self.network!r}" if self.network else ""
        return f"script({self.command!r}{network})"


Step = PackagesStep | FilesStep | EnvironmentStep | ScriptStep


def _check_name(_: object, _attribute: attrs.Attribute[str], value: str) -> None:
    if not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"an image's `name` must be str, not {value!r:.100}")
    if not value:
        raise ValueError("an image's `name` must not be empty; there are 'python' and 'node'")


@final
@attrs.frozen(repr=False)
class Image:
    """What a sandbox's code sees: an image by its name, and what is added to it.

        image = Image("python").packages("pandas", "matplotlib>=3.10")
        async with open_sandbox(image) as sandbox:
            ...

    A frozen value, which can be compared, hashed, printed, pickled and sent to another machine. Wherever an image's name is taken, an
    `Image` is taken, too. Each method returns a new value with one more step. Nothing is read or started until a host needs the image,
    unless a method says so; then each step becomes a layer of the disk, which is built once and kept in the cache. Images
    that begin with the same steps share those layers.
    """

    name: str = attrs.field(validator=_check_name)
    """The name of the image below all steps."""
    steps: tuple[Step, ...] = attrs.field(default=(), kw_only=True)
    """What is added to it, in order."""

    def __repr__(self) -> str:
        return ".".join([f"Image({self.name!r})", *(step.call() for step in self.steps)])

    def __str__(self) -> str:
        return ", ".join([self.name, *map(str, self.steps)])

    def packages(self, *requirements: str | os.PathLike[str], exclude_newer: str | date | None = None) -> Image:
        """Add packages of Python's from the package index; needs the extra ``packages``.

        They are resolved on the host, for the image's Python, and wheels only: nothing of theirs runs outside a virtual machine.
        What was chosen once stays, until ``trio-sandbox image prune`` removes what no layer uses any more. Packages of earlier
        steps keep their versions. The index, proxy and credentials are those of uv's configuration.

        Args:
          *requirements: Requirements as in ``"pandas>=2"`` (PEP 508); or files, as `Path`: a requirements file, a
            ``pyproject.toml``, whose dependencies are meant, or a ``pylock.toml`` (PEP 751), which then is the only
            argument. Files are read now.
          exclude_newer: Only what was published before this time counts: a `datetime` with a time zone, a `date` (its
            beginning, UTC), or text in the format of RFC 3339, ``"2026-11-01"`` or ``"2026-11-01T12:00:00Z"``.

        Raises:
          TypeError, ValueError: if a requirement is none, or there is none at all.
          OSError: if a file can't be read.

        """
        found: list[str] = []
        for each in requirements:
            if isinstance(each, str):
                check_requirement(each)
                found.append(each)
                continue
            path = to_path(each, "a file of requirements", "file")
            if LOCK_NAME.fullmatch(path.name):
                if len(requirements) > 1 or exclude_newer is not None:
                    raise ValueError(f"{path} is a lock, which says all: leave out the other arguments")
                return self._with(PackagesStep(lock=path.read_text("utf-8")))
            found += read_requirements(path)
        if not found:
            raise ValueError("`packages` needs a requirement, such as 'pandas', or a file that has some")
        return self._with(PackagesStep(tuple(found), exclude_newer=_moment(exclude_newer)))

    def files(self, places: Mapping[str, str | os.PathLike[str]]) -> Image:
        """Add copies of the host's files and directories.

        They are read when a host needs the image, each time: other content makes another layer. In the guest they belong to root and
        keep their permission bits. Symbolic links in a directory are kept as they are. A directory that is there already gets them besides.

        Args:
          places: Files and directories by their places in the guest, ``{"/opt/tool": "tool"}``; a place is an absolute path, below
            none of /dev, /proc, /run and /sys, which no disk keeps.

        Raises:
          TypeError, ValueError: if a place or a path can't be one.

        """
        if not isinstance(places, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"`places` must be a mapping from places in the guest to files, not {places!r:.100}")
        if not places:
            raise ValueError("`places` must have a place at least, as in {'/opt/tool': 'tool'}")
        checked: dict[str, Path] = {}
        for target, source in places.items():
            place = _check_place(target)
            if place in checked:
                raise ValueError(f"`places` has two files for {place!r}")
            checked[place] = Path(os.path.abspath(to_path(source, f"places[{target!r}]", "file or directory")))
        return self._with(FilesStep(tuple(checked.items())))

    def env(self, variables: Mapping[str, str]) -> Image:
        """Add variables to the environment of every program in the guest; they are in ``/etc/environment`` there.

        Args:
          variables: Values by names of letters, digits and ``_``. They take the place of those that a login sets. A value has no line end.

        Raises:
          TypeError, ValueError: if a name or a value can't be one.

        """
        if not isinstance(variables, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"`variables` must be a mapping from names to values, not {variables!r:.100}")
        if not variables:
            raise ValueError("`variables` must have a variable at least, as in {'TZ': 'Europe/Paris'}")
        for name, value in variables.items():
            if type(name) is not str or type(value) is not str:
                raise TypeError(f"a variable's name and value must be str, not {name!r:.100} and {value!r:.100}")
            if not _VARIABLE.fullmatch(name) or not name.isascii():
                raise ValueError(f"a variable's name must be of letters, digits and '_', not {name!r:.100}")
            if set(value) & {"\0", "\n", "\r"}:
                raise ValueError(f"the value of {name} must be one line without zero bytes, not {value!r:.100}")
        return self._with(EnvironmentStep(tuple(variables.items())))

    def script(self, command: str, *, network: Network | None = None) -> Image:
        """Add what a shell script does, which runs as root in a virtual machine of the image as it is by then.

        It runs once, with ``sh -e`` and in ``/``, when a host needs the image; the machine's disk is the layer then. What it leaves running is
        ended. Another script, or another network, makes another layer; that something on the network has changed does not.

        Args:
          command: The script.
          network: What it may reach; None: nothing.

        Raises:
          TypeError, ValueError: if the script is no text or empty, or the network has secrets, which would stay in the layer.

        """
        if type(command) is not str:
            raise TypeError(f"`command` must be str, not {type(command).__name__}")
        if not command.strip() or "\0" in command:
            raise ValueError(f"`command` must be a shell script without zero bytes, not {command!r:.100}")
        step = ScriptStep(command, Network.none() if network is None else network)
        if any(rule.secrets for rule in step.network.rules):
            raise ValueError("`network` must have no secrets: what a script does with them could stay in the image")
        return self._with(step)

    def _with(self, step: Step) -> Image:
        return attrs.evolve(self, steps=(*self.steps, step))


#: What names an image: its name, where nothing is added to it, or its value. See `to_image`.
AnyImage = str | Image


def to_image(image: object) -> AnyImage:
    """Return what names an image in its one form: the name of one without steps, or else the value.

    Raises:
      TypeError: if it is neither.

    """
    if isinstance(image, Image):
        return image if image.steps else image.name
    if not isinstance(image, str):
        raise TypeError(f"`image` must be the name of an image, not {image!r:.100}; a trio_sandbox.Image will do, too")
    return image


def _check_place(target: object) -> str:
    if type(target) is not str:
        raise TypeError(f"a place in `places` must be str, not {type(target).__name__}")
    place = PurePosixPath(posixpath.normpath(target))
    if not place.is_absolute() or target.startswith("//") or len(place.parts) == 1 or set(target) & {"\0", "\n"}:
        raise ValueError(f"a place in `places` must be an absolute path below /, not {target!r:.100}")
    if place.parts[1] in _NOT_KEPT:
        raise ValueError(f"a place in `places` must not be in /{place.parts[1]}, which no disk keeps: {target!r:.100}")
    return str(place)


def _moment(value: str | date | None) -> str | None:
    """Return a moment as uv is told it, the same on every machine."""
    if value is None:
        return None
    moment: object = value
    if isinstance(moment, str):
        try:
            moment = date.fromisoformat(moment) if _DAY.fullmatch(moment) else datetime.fromisoformat(moment)
        except ValueError:
            raise ValueError(
                f"`exclude_newer` must be a time such as '2026-11-01' or '2026-11-01T12:00:00Z', not {value!r:.100}"
            ) from None
    if isinstance(moment, datetime):
        if moment.tzinfo is None:
            raise ValueError(f"`exclude_newer` must have a time zone, as in '2026-11-01T12:00:00Z', not {value!r}")
        return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    if isinstance(moment, date):  # pyright: ignore[reportUnnecessaryIsInstance]
        return f"{moment.isoformat()}T00:00:00Z"
    raise TypeError(f"`exclude_newer` must be a date, a datetime or str, not {value!r:.100}")


mark_public(__name__, globals())
