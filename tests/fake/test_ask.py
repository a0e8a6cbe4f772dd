"""Questions to a guest: it is read no further than its answer may be long, and waited for no longer than agreed."""

from __future__ import annotations

import pytest
import trio

from trio_sandbox import GuestProtocolError, OutcomeUnknownError, SandboxClosedError
from trio_sandbox.client import ask
from trio_sandbox.wire import RecordStream

from ._guest import FakeMachine, open_fake_machine


async def question(machine: FakeMachine, *, most: int = 4, patience: float = 10.0) -> bytes:
    return await ask(machine, {"service": "word"}, "a word", most=most, patience=patience)


@pytest.mark.parametrize("answer", [b"", b"i", b"idle"])
async def test_an_answer_that_fits(answer: bytes) -> None:
    async def word(records: RecordStream) -> None:
        for byte in answer:
            await records.stream.send_all(bytes([byte]))
        await records.send_eof()

    async with open_fake_machine({"word": word}) as machine:
        for _ in range(3):
            assert await question(machine) == answer
        assert machine.failure is None


@pytest.mark.parametrize("size", [5, 10**6])
async def test_a_longer_answer_ends_the_machine_and_is_not_read(size: int) -> None:
    async def word(records: RecordStream) -> None:
        await records.stream.send_all(bytes(size), end=True)

    async with open_fake_machine({"word": word}) as machine:
        with pytest.raises(GuestProtocolError, match="an answer of more than 4 bytes"):
            await question(machine)
        assert machine.failure is not None
        with pytest.raises(SandboxClosedError, match="a word was not sent"):
            await question(machine)


async def silent(records: RecordStream) -> None:
    await trio.sleep_forever()


async def half(records: RecordStream) -> None:
    await records.stream.send_all(b"id")
    await trio.sleep_forever()


async def no_end(records: RecordStream) -> None:
    await records.stream.send_all(b"idle")
    await trio.sleep_forever()


@pytest.mark.parametrize("word", [silent, half, no_end])
async def test_a_late_answer_ends_the_machine(word: object) -> None:
    async with open_fake_machine({"word": word}) as machine:  # type: ignore[dict-item]
        with pytest.raises(
            OutcomeUnknownError, match=r"did not answer within 0\.05 s when it was asked for a word"
        ) as info:
            await question(machine, patience=0.05)
        assert machine.failure is not None
        assert info.value.__cause__ is machine.failure


async def test_cancelled_it_does_no_harm() -> None:
    async with open_fake_machine({"word": silent}) as machine:
        with trio.move_on_after(0.05):
            await question(machine)
        assert machine.failure is None
