"""What a machine that makes a layer does with files: asked of a real file helper in this process, and of guests that lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trio_sandbox import GuestProtocolError, ImageBuildError, OutcomeUnknownError
from trio_sandbox.machines import _file_requests
from trio_sandbox.machines._file_requests import ask_file_helper
from trio_sandbox.wire import RecordStream

from ._guest import open_fake_machine
from ._sandbox import open_local_sandbox


async def test_a_file_helper_does_what_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_file_requests, "_ROOT", None)  # nobody becomes root here
    path = tmp_path / "environment"
    async with open_local_sandbox() as (_, machine):
        for value in ("1", "\u00e9 \udcff"):
            await ask_file_helper(machine, ["append", os.fspath(path), f"A={value}\n"])
        assert path.read_bytes() == b"A=1\nA=\xc3\xa9 \xff\n"
        with pytest.raises(ImageBuildError, match=r"can't be done: .*/none/x: No such file or directory"):
            await ask_file_helper(machine, ["append", os.fspath(tmp_path / "none" / "x"), "A=1\n"])
        with pytest.raises(ImageBuildError, match=r"/source: No such file or directory"):
            await ask_file_helper(machine, ["merge", os.fspath(tmp_path / "source"), "/a-target-of-this-test"])
        # A file system without a disk has other numbers than the root's.
        with pytest.raises(ImageBuildError, match=r"/dev/shm/x: this is no part of the image's disk"):
            await ask_file_helper(machine, ["merge", os.fspath(path), "/dev/shm/x"])
        assert machine.failure is None


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ((b"R", b"more"), GuestProtocolError),
        ((b"D", b""), GuestProtocolError),
        ((b"X", b"no number\0/x"), GuestProtocolError),
        ((b"X", b"0\0/x"), GuestProtocolError),
        ((b"X", b"2\0" + b"x" * 2**15), GuestProtocolError),
        ((b"X", b"2\0/x\x1b[2J"), ImageBuildError),
        ((b"X", b"28"), ImageBuildError),
        (None, GuestProtocolError),
    ],
)
async def test_a_guest_that_answers_otherwise(answer: tuple[bytes, bytes] | None, error: type[Exception]) -> None:
    async def serve(records: RecordStream) -> None:
        await records.receive()
        if answer is None:
            await records.send_eof()
        else:
            await records.send(*answer, end=True)

    async with open_fake_machine({"file": serve}) as machine:
        with pytest.raises(error) as caught:
            await ask_file_helper(machine, ["merge", "/a", "/b"])
        assert str(caught.value).isprintable()
        assert (machine.failure is None) is (error is ImageBuildError)


async def test_a_guest_that_gives_up() -> None:
    async def serve(records: RecordStream) -> None:
        await records.receive()
        records.stream.reset("no file helpers here")

    async with open_fake_machine({"file": serve}) as machine:
        with pytest.raises(OutcomeUnknownError, match="no file helpers here"):
            await ask_file_helper(machine, ["append", "/a", "b"])
