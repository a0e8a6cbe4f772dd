"""A sandbox against a dictionary: whatever is done in whatever order, both hold the same. A difference is lost data.

Commands are drawn by Hypothesis, which finds the shortest sequence that shows a difference. `apply` does one to a sandbox
and to the model of what it holds; `Holder` says how something is put into the sandbox, and what is there.
"""

from __future__ import annotations

import base64
import copy
import json
import secrets
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import attrs
import trio
from hypothesis import strategies as st

from trio_sandbox import Checkpoint, Host, Sandbox


@attrs.define
class Model:
    """What a sandbox holds."""

    variables: dict[str, str] = attrs.field(factory=dict[str, str])
    files: dict[str, tuple[int, str]] = attrs.field(factory=dict[str, tuple[int, str]])
    """Mode and content."""

    def write(self, name: str, content: str, *, mode: int = 0o644) -> None:
        """A file that is there keeps its mode."""
        old, _ = self.files.get(name, (mode, ""))
        self.files[name] = old, content


class Holder(Protocol):
    """What is put into a sandbox, and looked at."""

    @property
    def sandbox(self) -> Sandbox:
        """The sandbox."""
        ...

    async def set(self, name: str, value: str) -> None:
        """Have a variable."""
        ...

    async def look(self) -> Model:
        """Return what is there."""
        ...

    def of(self, sandbox: Sandbox) -> Holder:
        """Return the same for a copy of the sandbox."""
        ...


@attrs.frozen
class Interpreter:
    """Variables of Python's interpreter, and the files in a directory."""

    sandbox: Sandbox
    directory: str

    async def set(self, name: str, value: str) -> None:
        """Have a variable."""
        await self._run(f"{name} = {value!r}")

    async def look(self) -> Model:
        """Return what is there."""
        code = f"""
import base64, json, os
def read(name):
    with open(os.path.join({self.directory!r}, name), "rb") as file:
        return os.fstat(file.fileno()).st_mode & 0o7777, base64.b64encode(file.read()).decode()
print(json.dumps([
    {{name: value for name, value in globals().items() if name.startswith("v_")}},
    {{name: read(name) for name in os.listdir({self.directory!r})}},
]))
"""
        variables, files = json.loads(await self._run(code))
        return Model(variables, {name: (mode, base64.b64decode(text).decode()) for name, (mode, text) in files.items()})

    def of(self, sandbox: Sandbox) -> Interpreter:
        """Return the same for a copy."""
        return attrs.evolve(self, sandbox=sandbox)

    async def clear(self) -> None:
        """Have nothing."""
        await self._run(
            "import os\nfor name in [name for name in globals() if name.startswith('v_')]: del globals()[name]\n"
            f"for name in os.listdir({self.directory!r}): os.unlink(os.path.join({self.directory!r}, name))"
        )

    async def _run(self, code: str, **more: Any) -> str:
        result = await self.sandbox.run(code, **more)
        assert result.exit_code == 0, result.stderr
        return result.stdout


@attrs.define
class Bench:
    """A sandbox, the model of it, and the checkpoints with what the model was then."""

    holder: Holder
    host: Host | None = None
    model: Model = attrs.field(factory=Model)
    checkpoints: list[tuple[Checkpoint, Model]] = attrs.field(factory=list[tuple[Checkpoint, Model]])

    @property
    def sandbox(self) -> Sandbox:
        return self.holder.sandbox

    @property
    def directory(self) -> str:
        assert isinstance(self.holder, Interpreter)
        return self.holder.directory

    async def check(self) -> None:
        """Assert that the sandbox holds what the model does."""
        found = await self.holder.look()
        assert found == self.model, f"{found}\nis not\n{self.model}"

    def close(self) -> None:
        """Discard the checkpoints."""
        while self.checkpoints:
            self.checkpoints.pop()[0].discard()


#: What is done, and with what.
Command: TypeAlias = "tuple[str, str, str, int]"


async def play(bench: Bench, commands: Sequence[Command]) -> None:
    """Do what *commands* say to both, and compare after each."""
    try:
        for command in commands:
            await apply(bench, *command)
            await bench.check()
    finally:
        bench.close()


async def apply(bench: Bench, kind: str, name: str, text: str, number: int) -> None:
    """Do one command."""
    await _COMMANDS[kind](bench, name, text, number)


def command_lists(kinds: Sequence[str], most: int) -> st.SearchStrategy[list[Command]]:
    """Draw sequences of commands of these kinds."""
    return st.lists(st.tuples(st.sampled_from(kinds), _NAMES, _TEXTS, st.integers(0, 0o777)), min_size=1, max_size=most)


_NAMES = st.sampled_from(["v_a", "v_b", "v_c"])
#: Anything but half a character, and a carriage return, which text files change.
_TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=30) | st.sampled_from(
    ["", "\0", "x" * 70_000, "\n\n", "'\"\\", "${HOME} `id`"]
)


# --- Variables ---


async def _set(bench: Bench, name: str, text: str, _: int) -> None:
    await bench.holder.set(name, text)
    bench.model.variables[name] = text


async def _read_input(bench: Bench, name: str, text: str, _: int) -> None:
    await bench.sandbox.run(f"import sys; {name} = sys.stdin.buffer.read().decode()", stdin=text.encode())
    bench.model.variables[name] = text


async def _be_cancelled(bench: Bench, name: str, text: str, number: int) -> None:
    with trio.move_on_after(number / 50_000):
        await bench.sandbox.run("import time; time.sleep(1)", stdin=text.encode()[: number % 3])


async def _end(bench: Bench, name: str, text: str, _: int) -> None:
    assert (await bench.sandbox.run("import os; os._exit(3)")).exit_code == 3
    bench.model.variables.clear()


# --- Files ---


async def _write(bench: Bench, name: str, text: str, _: int) -> None:
    await bench.sandbox.path(bench.directory, name).write_text(text)
    bench.model.write(name, text)


async def _write_in_run(bench: Bench, name: str, text: str, _: int) -> None:
    result = await bench.sandbox.run(f"open('{bench.directory}/{name}', 'w', newline='').write({text!r})")
    assert result.exit_code == 0, result.stderr
    bench.model.write(name, text)


async def _write_in_process(bench: Bench, name: str, text: str, _: int) -> None:
    await bench.sandbox.run_process(["sh", "-c", f"cat > {bench.directory}/{name}"], stdin=text.encode())
    bench.model.write(name, text)


async def _append(bench: Bench, name: str, text: str, _: int) -> None:
    async with await bench.sandbox.path(bench.directory, name).open("ab") as file:
        await file.write(text.encode())
    bench.model.write(name, bench.model.files.get(name, (0, ""))[1] + text)


async def _upload(bench: Bench, name: str, text: str, number: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        local = Path(directory, "file")
        local.write_text(text, newline="")
        local.chmod(number | 0o600)
        await bench.sandbox.upload(local, f"{bench.directory}/{name}")
    bench.model.write(name, text, mode=number | 0o600)


async def _download(bench: Bench, name: str, text: str, number: int) -> None:
    if name not in bench.model.files:
        return
    with tempfile.TemporaryDirectory() as directory:
        await bench.sandbox.download(f"{bench.directory}/{name}", f"{directory}/file", umask=0)
        local = Path(directory, "file")
        assert (local.stat().st_mode & 0o777, local.read_bytes().decode()) == bench.model.files[name]


async def _remove(bench: Bench, name: str, text: str, _: int) -> None:
    await bench.sandbox.path(bench.directory, name).unlink(missing_ok=True)
    bench.model.files.pop(name, None)


async def _rename(bench: Bench, name: str, text: str, number: int) -> None:
    other = f"v_{'abc'[number % 3]}"
    if name in bench.model.files:
        await bench.sandbox.path(bench.directory, name).rename(f"{bench.directory}/{other}")
        bench.model.files[other] = bench.model.files.pop(name)


async def _change_mode(bench: Bench, name: str, text: str, number: int) -> None:
    if name in bench.model.files:
        await bench.sandbox.path(bench.directory, name).chmod(number | 0o600)
        bench.model.files[name] = number | 0o600, bench.model.files[name][1]


# --- The sandbox's life ---


async def _keep(bench: Bench, name: str, text: str, _: int) -> None:
    bench.checkpoints.append((await bench.sandbox.checkpoint(), copy.deepcopy(bench.model)))


async def _go_back(bench: Bench, name: str, text: str, number: int) -> None:
    if bench.checkpoints:
        checkpoint, model = bench.checkpoints[number % len(bench.checkpoints)]
        await bench.sandbox.revert(checkpoint)
        bench.model = copy.deepcopy(model)


async def _discard(bench: Bench, name: str, text: str, number: int) -> None:
    if bench.checkpoints:
        bench.checkpoints.pop(number % len(bench.checkpoints))[0].discard()


async def _transact(bench: Bench, name: str, text: str, number: int) -> None:
    try:
        async with bench.sandbox.transaction():
            await bench.holder.set(name, text)
            if number % 2:
                raise KeyError
        bench.model.variables[name] = text
    except KeyError:
        pass


async def _sleep(bench: Bench, name: str, text: str, _: int) -> None:
    await bench.sandbox.hibernate()
    await bench.sandbox.resume()


async def _fork(bench: Bench, name: str, text: str, number: int) -> None:
    async with bench.sandbox.fork(1 + number % 2) as children:
        for child in children:
            other = Bench(bench.holder.of(child), model=copy.deepcopy(bench.model))
            await other.check()
            await _set(other, name, text, 0)
            await other.check()


async def _save(bench: Bench, name: str, text: str, _: int) -> None:
    assert bench.host is not None
    saved = f"model-{secrets.token_hex(8)}"  # nobody's in a cache that is the user's own
    await bench.sandbox.save(saved)
    try:
        async with bench.host.open_sandbox(template=saved) as other:
            await Bench(bench.holder.of(other), model=copy.deepcopy(bench.model)).check()
    finally:
        bench.host._named.remove(saved)  # pyright: ignore[reportPrivateUsage]


_COMMANDS: dict[str, Callable[[Bench, str, str, int], Awaitable[None]]] = {
    "set": _set,
    "read input": _read_input,
    "be cancelled": _be_cancelled,
    "end": _end,
    "write": _write,
    "write in a run": _write_in_run,
    "write in a process": _write_in_process,
    "append": _append,
    "upload": _upload,
    "download": _download,
    "remove": _remove,
    "rename": _rename,
    "change mode": _change_mode,
    "checkpoint": _keep,
    "revert": _go_back,
    "discard": _discard,
    "transaction": _transact,
    "sleep": _sleep,
    "fork": _fork,
    "save": _save,
}
ALL = list(_COMMANDS)
#: What needs an agent and no machine.
OF_AGENT = ALL[: ALL.index("checkpoint")]
#: What needs machines and no files; the fakes save nothing that could be opened.
OF_LIFE = ["set", "checkpoint", "revert", "discard", "transaction", "sleep"]
