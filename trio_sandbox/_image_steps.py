"""The steps that are added to an image: frozen values, which say what was asked for, and nothing of how it is done."""

from __future__ import annotations

import os
from pathlib import Path
from typing import final

import attrs

from ._checks import instance
from ._network import Network


@final
@attrs.frozen
class PackagesStep:
    """Packages of Python's, by requirements or by a whole lock."""

    requirements: tuple[str, ...] = ()
    lock: str | None = attrs.field(default=None, repr=False)
    """The text of a pylock.toml; then there are no requirements."""
    exclude_newer: str | None = None
    """Only what was published before then counts, RFC 3339."""
    digests: tuple[str, ...] = attrs.field(default=(), repr=False)
    """Only wheels with these SHA-256 digests are taken; empty: any that the index has."""
    label: str = ""
    """What it is called, where that says more than its packages."""

    def __str__(self) -> str:
        if self.label:
            return self.label
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
class NpmStep:
    """Packages of Node.js, by requirements."""

    requirements: tuple[str, ...]

    def __str__(self) -> str:
        return f"npm {' '.join(self.requirements)}"

    def call(self) -> str:
        """Return the call that makes it, for `repr`."""
        return f"npm({', '.join(map(repr, self.requirements))})"


@final
@attrs.frozen
class AptStep:
    """Debian packages."""

    names: tuple[str, ...]
    network: Network = attrs.field(validator=instance(Network))
    """What apt may reach."""

    def __str__(self) -> str:
        return f"apt {' '.join(self.names)}"

    def call(self) -> str:
        """Return the call that makes it, for `repr`."""
        return f"apt({', '.join(map(repr, self.names))}, network={self.network!r})"


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


#: What an image can be made of besides its name.
Step = PackagesStep | NpmStep | AptStep | FilesStep | EnvironmentStep | ScriptStep
