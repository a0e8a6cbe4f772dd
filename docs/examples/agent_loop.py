"""An agent loop: the model writes code, its output streams to the user, and a new message of the user's stops what runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Literal, NamedTuple

import trio

from trio_sandbox import OutputChunk, RunResult, Sandbox, open_sandbox


class Message(NamedTuple):
    """One message of the conversation, as a model's API takes it."""

    role: Literal["user", "assistant", "code", "result"]
    text: str


#: Asks the model for its next message: "code" to run, or "assistant", which ends its turn.
Model = Callable[[list[Message]], Awaitable[Message]]

#: Shows text to the user.
Show = Callable[[str], object]


async def run_code(sandbox: Sandbox, code: str, show: Show) -> str:
    """Run code, show its output as it comes, and return what the model is told of it."""
    told = ""
    async with sandbox.stream(code) as events:
        async for event in events:
            if isinstance(event, OutputChunk):
                show(event.data.decode(errors="replace"))
            elif isinstance(event, RunResult):  # the last event: it has the end of what was printed
                told = f"{event.stdout}{event.stderr}exit code {event.exit_code}"
    return told


async def answer(sandbox: Sandbox, model: Model, history: list[Message], show: Show) -> None:
    """Let the model run code until it answers in words."""
    while True:
        message = await model(history)
        history.append(message)
        if message.role != "code":
            show(message.text + "\n")
            return
        with trio.move_on_after(60) as limit:
            told = await run_code(sandbox, message.text, show)
        history.append(Message("result", "stopped after 60 seconds" if limit.cancelled_caught else told))


async def converse(sandbox: Sandbox, model: Model, messages: AsyncIterator[str], show: Show) -> None:
    """Answer each message. A new one stops the answer to the one before; variables and files stay."""
    history: list[Message] = []
    answering, answered = trio.CancelScope(), trio.Event()
    answered.set()

    async def answer_in(scope: trio.CancelScope, done: trio.Event) -> None:
        with scope:
            await answer(sandbox, model, history, show)
        if scope.cancelled_caught:
            history.append(Message("result", "stopped by the user"))
        done.set()

    async with trio.open_nursery() as nursery:
        async for text in messages:
            answering.cancel(reason="a new message of the user's")
            await answered.wait()  # by then the guest has stopped the code
            history.append(Message("user", text))
            answering, answered = trio.CancelScope(), trio.Event()
            nursery.start_soon(answer_in, answering, answered)


async def scripted_model(history: list[Message]) -> Message:
    """Stand in for a model: call your provider's API here."""
    await trio.lowlevel.checkpoint()
    last = history[-1]
    if last.role == "result":
        return Message("assistant", f"The result: {last.text}")
    if "for ever" in last.text:
        return Message("code", "n = 0\nprint('counting', flush=True)\nwhile True: n += 1")
    return Message("code", "print('counted to more than 1:', n > 1)")


async def main() -> None:
    """Ask for something that takes too long, then ask for something else."""
    send, receive = trio.open_memory_channel[str](10)

    def show(text: str) -> None:
        print(text, end="")
        if text.startswith("counting"):
            send.send_nowait("How far did you get?")  # the user has seen enough
        elif text.startswith("The result"):
            send.close()

    await send.send("Count for ever.")
    async with open_sandbox("python") as sandbox:
        await converse(sandbox, scripted_model, receive, show)


if __name__ == "__main__":
    trio.run(main)
