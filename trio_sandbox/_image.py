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

from ._checks import to_path
from ._image_steps import AptStep, EnvironmentStep, FilesStep, NpmStep, PackagesStep, ScriptStep, Step
from ._metadata import mark_public
from ._network import Network
from ._oci_reference import is_oci, parse_oci
from ._requirements import (
    LOCK_NAME,
    check_debian_package,
    check_npm_requirement,
    check_requirement,
    read_requirements,
)

#: Where no image is named.
DEFAULT_IMAGE: Final = "python"
#: Where Debian's packages are, unless an image says otherwise.
DEBIAN: Final = Network.allow("deb.debian.org", "security.debian.org")
#: Directories of the guest's that no disk keeps: the kernel's, and those in memory.
_NOT_KEPT: Final = ("dev", "proc", "run", "sys")
#: Bytes of a path with its end, as Linux has it.
_PATH_MAX: Final = 4096
#: Bytes of the variables of a step: the kernel takes no more for one of them, and the guest reads no more than some of these.
_MOST_VARIABLES: Final = 128 * 2**10
_VARIABLE: Final = re.compile("[A-Za-z_][A-Za-z0-9_]*")
_DAY: Final = re.compile(r"\d{4}-\d\d-\d\d")


def _check_name(name: object) -> str:
    """Return an image's name in its one form."""
    if not isinstance(name, str):
        raise TypeError(f"an image's `name` must be str, not {name!r:.100}")
    if not name:
        raise ValueError("an image's `name` must not be empty; there are 'python', 'node' and 'data'")
    return str(parse_oci(name)) if is_oci(name) else name


@final
@attrs.frozen(repr=False)
class Image:
    """What a sandbox's code sees: an image, by its name, and what you add to it.

        image = Image("python").packages("pandas", "matplotlib>=3.10")
        async with open_sandbox(image) as sandbox:
            ...

    A frozen value: you can compare, hash, print and pickle it, and send it to another machine. Use it in place of an
    image's name. Each method returns a new value with one more step. Nothing is read or started until a host needs the
    image, unless a method says so. Then each step becomes a layer of the disk, which is built once and kept in the cache.
    Images that begin with the same steps share those layers.
    """

    name: str = attrs.field(converter=_check_name)
    """The name of the image below all steps: one of ours, or that of a container image, as `oci` takes it."""
    steps: tuple[Step, ...] = attrs.field(default=(), kw_only=True)
    """What is added to it, in order."""

    def __repr__(self) -> str:
        call = "Image.oci" if is_oci(self.name) else "Image"
        return ".".join([f"{call}({self.name!r})", *(step.call() for step in self.steps)])

    def __str__(self) -> str:
        return ", ".join([self.name, *map(str, self.steps)])

    @classmethod
    def oci(cls, reference: str) -> Image:
        """Return a container image (OCI, Docker). You can add to it like to any other.

            Image.oci("docker://python:3.13-slim")

        skopeo fetches it once: later a tag means the same image, until you remove that from the store. Files are checked
        each time, and fetched again if they have changed. Code runs as the image's user, in its directory and with its
        variables. A run needs an interpreter in the image: python3 (3.11 or newer), node or bash. Programs need nothing.

        Args:
          reference: ``docker://NAME:TAG`` or ``docker://NAME@sha256:DIGEST`` of a registry; ``oci:DIR``, ``oci-archive:FILE`` or
            ``docker-archive:FILE`` on this machine, each with ``:TAG`` if there are several.

        Raises:
          TypeError, ValueError: if it is not such a name.

        """
        return cls(str(parse_oci(reference)))

    def packages(self, *requirements: str | os.PathLike[str], exclude_newer: str | date | None = None) -> Image:
        """Add Python packages from the package index; needs the extra ``packages``.

        They are resolved on the host, for the image's Python, and only wheels are accepted: none of their code runs outside
        a VM. A container image's ``python3`` is asked what it is, once, in a VM of that image. Chosen versions stay until no
        layer uses them and ``trio-sandbox image prune`` removes the choice. Packages of earlier steps, and those that a
        container image has, keep their versions. The index, proxy and credentials come from uv's configuration.

        Args:
          *requirements: Requirements as in ``"pandas>=2"`` (PEP 508); or files, as `Path`: a requirements file, a
            ``pyproject.toml``, whose dependencies are meant, or a ``pylock.toml`` (PEP 751), which then is the only
            argument. Files are read now.
          exclude_newer: Only files published before this time count: a `datetime` with a time zone, a `date` (its beginning,
            UTC), or text in the format of RFC 3339, ``"2026-11-01"`` or ``"2026-11-01T12:00:00Z"``.

        Raises:
          TypeError, ValueError: if something is not a requirement, or there is none at all.
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
                    raise ValueError(f"{path} is a lock, which fixes everything: leave out the other arguments")
                return self._with(PackagesStep(lock=path.read_text("utf-8")))
            found += read_requirements(path)
        if not found:
            raise ValueError("`packages` needs a requirement, such as 'pandas', or a file that has some")
        return self._with(PackagesStep(tuple(found), exclude_newer=_moment(exclude_newer)))

    def npm(self, *requirements: str) -> Image:
        """Add packages of Node.js from the npm registry, which JavaScript finds in every directory of the guest.

        npm on the host, or else that of the extra ``npm``, chooses and fetches them, and their digests are checked. They are
        unpacked, and none of their code runs, not even install scripts. Chosen versions stay, as with `packages`; packages of
        earlier steps keep their versions. The registry, proxy and credentials come from npm's configuration.

        Args:
          *requirements: Names in the registry, optionally with ``@`` and a version, a range or a tag: ``"zod"``,
            ``"typescript@5"``, ``"@types/node@^20"``.

        Raises:
          TypeError, ValueError: if something is not a requirement, or there is none at all.

        """
        for each in requirements:
            check_npm_requirement(each)
        if not requirements:
            raise ValueError("`npm` needs a requirement, such as 'zod@3'")
        return self._with(NpmStep(requirements))

    def apt(self, *names: str, network: Network | None = None) -> Image:
        """Add Debian packages and their dependencies. apt installs them as root, in a VM of the image so far.

        Recommended packages are installed only if you name them. No service is started. As with a script, another network
        makes another layer, but newer packages do not.

        Args:
          *names: Packages, ``"graphviz"``, optionally of one version, ``"graphviz=2.42.4-3"``; or the absolute paths of
            ``.deb`` files that an earlier step has added.
          network: What apt may reach. None: Debian's own servers, by name. With `Network.none()` it reaches nothing and
          fetches no lists of packages, which is enough for files.

        Raises:
          TypeError, ValueError: if a name is not valid, if there is none, or if the network has secrets, which would stay in the layer.

        """
        for each in names:
            check_debian_package(each)
        if not names:
            raise ValueError("`apt` needs a package, such as 'graphviz'")
        return self._with(AptStep(names, _without_secrets(DEBIAN if network is None else network)))

    def files(self, places: Mapping[str, str | os.PathLike[str]]) -> Image:
        """Add copies of the host's files and directories.

        They are read each time a host needs the image: other content makes another layer. In the guest they belong to root
        and keep their permission bits. Symbolic links in a directory are kept as they are. Files are added to a directory
        that exists already, which keeps its own permission bits; other files of the same names are replaced. The image needs
        no shell for it.

        Args:
          places: Files and directories by their paths in the guest, ``{"/opt/tool": "tool"}``. A path in the guest is
            absolute, and not in /dev, /proc, /run or /sys, which are not on the disk.

        Raises:
          TypeError, ValueError: if a path is not valid.

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
          variables: Values by names of letters, digits and ``_``. They replace those that a login sets. A value is one line that does
            not end in white space. At most 128 KiB in all.

        Raises:
          TypeError, ValueError: if a name or a value is not valid.

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
            if value != value.rstrip():
                raise ValueError(f"the value of {name} must not end in white space, which is lost: {value!r:.100}")
        if (size := sum(len(os.fsencode(f"{name}={value}\n")) for name, value in variables.items())) > _MOST_VARIABLES:
            raise ValueError(f"`variables` must have at most {_MOST_VARIABLES} bytes, not {size}")
        return self._with(EnvironmentStep(tuple(variables.items())))

    def script(self, command: str, *, network: Network | None = None) -> Image:
        """Add what a shell script does. It runs as root in a VM of the image so far.

        It runs once, with ``sh -e`` in ``/``, when a host needs the image; the VM's disk is then the layer. Processes that
        it leaves running are killed. Another script, or another network, makes another layer; a change on the network does
        not.

        Args:
          command: The script.
          network: What it may reach; None: nothing.

        Raises:
          TypeError, ValueError: if the script is not text or is empty, or if the network has secrets, which would stay in the layer.

        """
        if type(command) is not str:
            raise TypeError(f"`command` must be str, not {type(command).__name__}")
        if not command.strip() or "\0" in command:
            raise ValueError(f"`command` must be a shell script without zero bytes, not {command!r:.100}")
        return self._with(ScriptStep(command, _without_secrets(Network.none() if network is None else network)))

    def _with(self, step: Step) -> Image:
        return attrs.evolve(self, steps=(*self.steps, step))


#: What names an image: its name, where nothing is added to it, or its value. See `to_image`.
AnyImage = str | Image


def to_image(image: object) -> AnyImage:
    """Return what names an image in its one form: the name of one without steps, or else the value.

    Raises:
      TypeError: if it is neither.
      ValueError: if it begins as the name of a container image does, and is none.

    """
    if isinstance(image, Image):
        return image if image.steps else image.name
    if not isinstance(image, str):
        raise TypeError(f"`image` must be the name of an image, not {image!r:.100}; a trio_sandbox.Image will do, too")
    return str(parse_oci(image)) if is_oci(image) else image


def _without_secrets(network: object) -> Network:
    if not isinstance(network, Network):
        raise TypeError(f"`network` must be a Network or None, not {network!r:.100}")
    if any(rule.secrets for rule in network.rules):
        raise ValueError("`network` must have no secrets: what is done with them could stay in the image")
    return network


def _check_place(target: object) -> str:
    if type(target) is not str:
        raise TypeError(f"a place in `places` must be str, not {type(target).__name__}")
    place = PurePosixPath(posixpath.normpath(target))
    if not place.is_absolute() or target.startswith("//") or len(place.parts) == 1 or set(target) & {"\0", "\n"}:
        raise ValueError(f"a place in `places` must be an absolute path below /, not {target!r:.100}")
    if len(os.fsencode(target)) >= _PATH_MAX:
        raise ValueError(f"a place in `places` must have fewer than {_PATH_MAX} bytes: {target!r:.100}")
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
