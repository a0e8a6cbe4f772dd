"""The guest's agent and what it imports, as an archive: our own sources and the host's installed Trio."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

from .._errors import ImageBuildError

#: The parts of our own that run inside the guest.
_OUR_PACKAGES = ("wire", "guest")
#: Trio and what it imports on Linux: the distribution, and its packages.
_DISTRIBUTIONS = {
    "trio": ("trio",),
    "attrs": ("attr", "attrs"),
    "outcome": ("outcome",),
    "sortedcontainers": ("sortedcontainers",),
    "idna": ("idna",),
    "sniffio": ("sniffio",),
}
#: Directories that nothing imports at run time.
_LEFT_OUT = frozenset({"__pycache__", "_tests", "testing", "_tools"})
#: Python, and the languages of workers.
_SUFFIXES = (".py", ".js", ".sh")
_MAIN = b"from trio_sandbox.guest.agent import init\n\ninit.main()\n"


def agent_files() -> Iterator[tuple[str, bytes]]:
    """Yield path and content of every file of the agent's directory, in a fixed order. Reads files.

    Raises:
      ImageBuildError: if a distribution that the agent needs is not installed as ordinary files.
    """
    from importlib import metadata  # slow to import, and a mere --help can do without

    yield "__main__.py", _MAIN
    # No `trio_sandbox/__init__.py`: inside the guest it is a namespace package of these parts.
    ours = Path(__file__).parent.parent
    for package in _OUR_PACKAGES:
        yield from _sources(ours / package, f"trio_sandbox/{package}")
    for distribution, packages in _DISTRIBUTIONS.items():
        try:
            location = Path(str(metadata.distribution(distribution).locate_file("")))
        except metadata.PackageNotFoundError as exc:
            raise ImageBuildError(
                f"the guest's agent needs the Python distribution {distribution}, which is not installed"
            ) from exc
        for package in packages:
            yield from _sources(location / package, package)


def _sources(directory: Path, target: str) -> Iterator[tuple[str, bytes]]:
    if not (directory / "__init__.py").is_file():
        raise ImageBuildError(
            f"the guest's agent needs the Python package {directory}, which is not there as ordinary files"
        )
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        if path.suffix in _SUFFIXES and not _LEFT_OUT.intersection(relative.parts):
            yield f"{target}/{relative.as_posix()}", path.read_bytes()


def agent_archive() -> bytes:
    """Return `agent_files` as an uncompressed tar archive; equal files give equal bytes.

    Raises:
      ImageBuildError: as `agent_files` does.
    """
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path, data in agent_files():
            info = tarfile.TarInfo(path)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    return archive.getvalue()
