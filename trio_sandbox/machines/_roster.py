"""The sandboxes of a host, for ``trio-sandbox ps``: each is a record in a file that the host holds as long as it lives; see `_held_files`.

A start pays for one write of a record, to memory. Who reads the file believes nothing that the kernel does not confirm; see `_running`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

import attrs
import trio

from .._config import SandboxConfig
from .._errors import SandboxError
from .._image import AnyImage
from .._observe import part_logger
from .._stored_json import Fields
from ..qemu import Vm
from ._held_files import Guard, HeldFile, decode_record, default_directory, encode_record, no_guard
from ._process_facts import MOST_PID, pid_namespace, process_status

_log = part_logger("host")

#: The version of what is in the records. Others are not read.
FORMAT: Final = 1
#: What the files' names begin with.
PREFIX: Final = "sandboxes-"
#: Bytes of a record, and records in a file: a host that opens more sandboxes at a time does not list them.
SIZE: Final = 1024
MOST: Final = 4096
#: Letters of an image's name that are kept; with them a record fits, whatever they are.
_NAME_LETTERS: Final = 100
#: The highest number of a descriptor: Linux's NR_OPEN is far below.
_MOST_DESCRIPTORS: Final = 2**31 - 1

#: Told of the machine that a sandbox has now; None: it hibernates.
NoteMachine = Callable[[Vm | None], object]


@final
@attrs.frozen(kw_only=True)
class SandboxRecord:
    """What a host says of one of its sandboxes."""

    id: str
    """`Sandbox.id`: 12 hexadecimal digits."""
    owner: int
    """The host's process."""
    descriptor: int
    """Under which that process has the file."""
    namespace: int
    """What these process ids are of; see `pid_namespace`."""
    image: str
    opened: float
    """In Unix seconds."""
    memory_mib: int
    vcpus: int
    accelerator: str
    pid: int = 0
    """That of its QEMU; 0 while it hibernates."""
    started: int = 0
    """When that QEMU was started; see `ProcessStatus`."""


def encode(record: SandboxRecord) -> bytes:
    """Return a record's bytes."""
    return encode_record({"format": FORMAT, **attrs.asdict(record)}, SIZE)


def decode(data: bytes) -> SandboxRecord:
    """Return what a record says.

    Raises:
      ValueError: if it is not what `encode` makes, is of another version, or has numbers that can't be.

    """
    fields = decode_record(data, SIZE)
    fields.check_format(FORMAT)
    return SandboxRecord(
        id=_identifier(fields),
        owner=_number(fields, "owner", MOST_PID),
        descriptor=_number(fields, "descriptor", _MOST_DESCRIPTORS),
        namespace=fields.number("namespace"),
        image=fields.text("image"),
        opened=fields.time("opened"),
        memory_mib=fields.number("memory_mib"),
        vcpus=fields.number("vcpus"),
        accelerator=fields.text("accelerator"),
        pid=_number(fields, "pid", MOST_PID),
        started=fields.number("started"),
    )


def is_identifier(text: str) -> bool:
    """Tell whether a sandbox could be called that."""
    return len(text) == 12 and set(text) <= set("0123456789abcdef")


def _identifier(fields: Fields) -> str:
    text = fields.text("id")
    if not is_identifier(text):
        raise ValueError(f"it is damaged: 'id' is {text!r:.80}")
    return text


def _number(fields: Fields, name: str, most: int) -> int:
    number = fields.number(name)
    if number > most:
        raise ValueError(f"it is damaged: {name!r} is {number}, and can't be above {most}")
    return number


@final
class Roster:
    """The file of one host. Made by `open_roster`.

    A sandbox whose record can't be written is opened like any other, and not listed. Of the first one the log says why.
    """

    def __init__(self, directory: Path | None = None, guard: Guard = no_guard) -> None:
        self._file = HeldFile(default_directory() if directory is None else directory, PREFIX, guard)
        self._records: dict[int, SandboxRecord] = {}
        self._namespace = pid_namespace()
        self._said = False

    @contextmanager
    def enter(self, sandbox_id: str, image: str, config: SandboxConfig, accelerator: str) -> Generator[NoteMachine]:
        """List a sandbox for the block; what it yields is to be called with each machine that the sandbox gets."""
        record = SandboxRecord(
            id=sandbox_id,
            owner=os.getpid(),
            descriptor=0,  # there may be no file yet
            namespace=self._namespace,
            image=image.encode("utf-8", "backslashreplace").decode()[:_NAME_LETTERS],
            opened=time.time(),
            memory_mib=config.memory_mib,
            vcpus=config.vcpus,
            accelerator=accelerator,
        )
        place = next(number for number in range(len(self._records) + 1) if number not in self._records)

        def note(vm: Vm | None) -> None:
            pid = 0 if vm is None else vm.pid
            status = process_status(pid) if pid else None  # one that has just ended is not there any more
            self._put(place, attrs.evolve(record, pid=pid, started=0 if status is None else status.started))

        self._records[place] = record
        try:
            yield note
        finally:
            self._put(place, None)

    def open(self) -> None:
        """Make the file, so that no sandbox has to."""
        self._write(())

    def close(self) -> None:
        """Have others know that this host is no more."""
        self._file.remove()

    @trio.lowlevel.enable_ki_protection
    def _put(self, place: int, record: SandboxRecord | None) -> None:
        """Have others know *record*, in *place* of what was there."""
        if record is not None:
            self._records[place] = record
        else:
            del self._records[place]
            if self._file.missing:
                return  # nobody knows of it
        self._write((place,))

    def _write(self, places: Iterable[int]) -> None:
        """Write what is at *places* now; everything, if the file is a new one."""
        try:
            if self._file.missing:
                self._file.make()
                places = self._records
            for place in places:
                if place < MOST:
                    os.pwrite(self._file.fd, self._content(place), place * SIZE)
        except (OSError, SandboxError) as exc:
            self.close()
            if not self._said:
                self._said = True
                _log.warning(
                    "`trio-sandbox ps` does not list all of this process's sandboxes: %s: %s",
                    self._file.directory,
                    (isinstance(exc, OSError) and exc.strerror) or exc,
                )

    def _content(self, place: int) -> bytes:
        record = self._records.get(place)
        return bytes(SIZE) if record is None else encode(attrs.evolve(record, descriptor=self._file.fd))


@contextmanager
def list_sandbox(
    roster: Roster | None, sandbox_id: str, image: AnyImage, config: SandboxConfig, vm: Vm
) -> Generator[NoteMachine]:
    """List a sandbox for the block, as `Roster.enter`; its first machine is *vm*. Without a roster nobody knows of it."""
    if roster is None:
        yield ignore_machine
        return
    with roster.enter(sandbox_id, str(image), config, vm.accelerator.name) as note:
        note(vm)
        yield note


def ignore_machine(vm: Vm | None) -> None:
    """Take no notice."""


@contextmanager
def open_roster(directory: Path | None = None, *, guard: Guard = no_guard) -> Generator[Roster]:
    """Yield a roster for the block. Others know of it until the block is left.

    Args:
      directory: Where the file is; None: where all hosts of this user have theirs.
      guard: Told of the file, for it to be removed if we are killed. Others would remove it some time later.

    """
    roster = Roster(directory, guard)
    try:
        roster.open()
        yield roster
    finally:
        roster.close()
