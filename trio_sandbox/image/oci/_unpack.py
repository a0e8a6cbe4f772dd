"""Layers as they are stored, checked and decompressed: from untrusted files to archives of a bounded size."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import signal
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import trio
import trio.from_thread

from ..._errors import OciError
from ...qemu import require_program, run_owned
from .._full_disk import says_full
from ._manifest import Layer, check_digest

#: Bytes that the layers of an image may have, unpacked, in all.
MOST_BYTES: Final = 16 * 2**30
_PIECE: Final = 1 << 20
#: Bytes that are unpacked at a time.
_STEP: Final = 1 << 14
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
#: A frame that says nothing, which some programs put first.
_ZSTD_SKIPPABLE: Final = b"\x2a\x4d\x18"
_ANY_GZIP: Final = 31


async def unpack_layer(layer: Layer, directory: Path, target: Path, room: int, environment: Mapping[str, str]) -> Path:
    """Return the archive of a layer: *target*, or the file itself where it is not compressed.

    Args:
      layer: Which.
      directory: Where its file is, by its digest.
      target: A new file.
      room: Bytes that the archive may have.
      environment: Goes into the environment of every child process.

    Raises:
      OciError: if it is not what it should be, or larger than *room*.
      MissingProgramError: if the layer is of a kind that needs a program which is not installed.
      OSError: if a file can't be read or written.

    """
    path = directory / layer.blob.digest
    name = f"the layer sha256:{layer.blob.digest[:12]}"
    try:
        beginning = await trio.to_thread.run_sync(_check_blob, path, layer, name)
        if beginning.startswith(_ZSTD) or beginning[1:4] == _ZSTD_SKIPPABLE:
            await _run_zstd(path, target, room, name, environment)
        elif beginning.startswith(_GZIP):
            await trio.to_thread.run_sync(_gunzip, path, target, room, name)
        else:
            target = path
        await trio.to_thread.run_sync(_check_archive, target, layer, room, name)
    except (ValueError, zlib.error) as exc:
        raise OciError(f"the container image is damaged: {exc}") from exc
    return target


def _check_blob(path: Path, layer: Layer, name: str) -> bytes:
    """Make sure that a file is what it is named; return how it begins."""
    size = path.stat().st_size
    if size != layer.blob.size:
        raise ValueError(f"{name} should have {layer.blob.size} bytes and has {size}")
    check_digest(name, layer.blob.digest, _sha256(path))
    with path.open("rb") as file:
        return file.read(4)


def _check_archive(path: Path, layer: Layer, room: int, name: str) -> None:
    if path.stat().st_size > room:
        raise _too_large(name)
    check_digest(f"{name}, unpacked,", layer.diff_id, _sha256(path))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for piece in _pieces(file.read):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(read: Callable[[int], bytes | None]) -> Iterator[bytes]:
    while piece := read(_PIECE):
        trio.from_thread.check_cancelled()
        yield piece


def _gunzip(path: Path, target: Path, room: int, name: str) -> None:
    with path.open("rb", buffering=0) as source, target.open("xb", buffering=0) as output:
        member = zlib.decompressobj(_ANY_GZIP)
        for piece in _pieces(source.read):
            offset = 0
            while offset < len(piece):
                # What a member leaves is copied, and there may be one for every few bytes.
                part = piece[offset : offset + _STEP]
                if member.eof:
                    if not part.strip(b"\0"):
                        offset += len(part)  # it was filled up
                        continue
                    member = zlib.decompressobj(_ANY_GZIP)
                room -= output.write(member.decompress(part, _PIECE))
                if room < 0:
                    raise _too_large(name)
                offset += len(part) - len(member.unused_data if member.eof else member.unconsumed_tail)
        if not member.eof:
            raise ValueError(f"{name} ends too early")


async def _run_zstd(path: Path, target: Path, room: int, name: str, environment: Mapping[str, str]) -> None:
    # A program that writes a file of more is killed.
    process = await run_owned(
        ["prlimit", f"--fsize={room}", require_program("zstd"), "-d", "-q", "--no-progress", "-o", target, path],
        environment={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", **environment},
    )
    if process.returncode != 0:
        if process.returncode == -signal.SIGXFSZ:
            raise _too_large(name)
        said = process.output().strip()[-300:]
        if says_full(said):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(target))
        raise ValueError(f"{name} can't be unpacked: {said}")


def _too_large(name: str) -> OciError:
    return OciError(
        f"the container image is too large: with {name}, its layers are more than {MOST_BYTES >> 30} GiB, unpacked"
    )


@contextmanager
def open_archive(path: Path) -> Generator[bytes | memoryview]:
    """Yield the content of a file for the block, without reading it into memory."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            yield view
