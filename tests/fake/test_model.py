"""Whatever is done to a sandbox in whatever order, it holds what a dictionary does; what the fakes can do of it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import attrs
import trio
from hypothesis import given, settings

from tests._model import OF_AGENT, OF_LIFE, Bench, Command, Holder, Interpreter, Model, command_lists, play
from tests.fake.test_lifecycle import Site, open_site
from trio_sandbox import Sandbox

from ._sandbox import open_local_sandbox


def test_variables_and_files_of_an_agent() -> None:
    async def main() -> None:
        async with open_local_sandbox() as (sandbox, _):
            with tempfile.TemporaryDirectory() as directory:
                holder = Interpreter(sandbox, directory)

                async def example(commands: list[Command]) -> None:
                    await holder.clear()
                    await play(Bench(holder), commands)

                # Hypothesis knows no Trio: it calls from a thread, as many times as it wants.
                @settings(max_examples=40)
                @given(command_lists(OF_AGENT, 10))
                def search(commands: list[Command]) -> None:
                    trio.from_thread.run(example, commands)

                await trio.to_thread.run_sync(search)

    trio.run(main)


@attrs.frozen
class Text:
    """The one text that the fakes of test_lifecycle.py remember; all variables in it."""

    site: Site

    @property
    def sandbox(self) -> Sandbox:
        return self.site.sandbox

    async def set(self, name: str, value: str) -> None:
        variables = {**(await self.look()).variables, name: value}
        await self.site.run(repr(variables))

    async def look(self) -> Model:
        return Model(eval(await self.site.run() or "{}"))

    def of(self, sandbox: Sandbox) -> Holder:
        raise AssertionError("the fakes do not fork")


@settings(max_examples=60)
@given(command_lists(OF_LIFE, 12))
def test_checkpoints_transactions_and_sleep_of_fakes(commands: list[Command]) -> None:
    async def main() -> None:
        with tempfile.TemporaryDirectory() as directory:
            async with open_site(Path(directory)) as site:
                await play(Bench(Text(site)), commands)

    trio.run(main)
