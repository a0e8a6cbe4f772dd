"""Under software emulation: code that was translated once is not translated again."""

from __future__ import annotations

import re

import pytest

from trio_sandbox import open_sandbox
from trio_sandbox.qemu import Vm

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]

_STARTS = 20
#: A tenth of what the starts take with programs at random addresses.
_MOST = 2.5 * 2**20


async def test_another_start_of_a_program_needs_no_more_translated_code() -> None:
    async with open_sandbox() as sandbox:
        if sandbox.accelerator != "tcg":
            pytest.skip("nothing is translated")
        machine = sandbox._slot.machine  # pyright: ignore[reportPrivateUsage]
        assert isinstance(machine, Vm)

        async def translated() -> int:
            answer = await machine.qmp.execute("human-monitor-command", {"command-line": "info jit"})
            found = re.search(r"gen code size +(\d+)/", str(answer))
            assert found, answer
            return int(found[1])

        for _ in range(3):  # the first ones are for what has not been translated yet
            await sandbox.run_process(["/bin/true"])
        before = await translated()
        for _ in range(_STARTS):
            await sandbox.run_process(["/bin/true"])
        assert 0 <= await translated() - before < _MOST


async def test_the_interpreter_runs_from_the_agents_python_for_as_long_as_it_is_the_same() -> None:
    where = "import os; print(os.stat('/proc/self/exe').st_dev == os.stat('/usr/bin/python3').st_dev, sys.executable)"
    async with open_sandbox() as sandbox:
        await sandbox.run("import sys")
        assert (await sandbox.run(where)).stdout == "False /usr/bin/python3\n"
        assert (await sandbox.run("print(open('/proc/self/comm').read())")).stdout == "python3\n\n"
        # What is in its place is another file, though it is no different.
        program = "/usr/bin/python3.13"
        await sandbox.run_process(["cp", program, f"{program}.new"], user="root")
        await sandbox.run_process(["mv", f"{program}.new", program], user="root")
        await sandbox.run("import os; os._exit(1)")
        await sandbox.run("import sys")
        assert (await sandbox.run(where)).stdout == "True /usr/bin/python3\n"
        assert (await sandbox.run("print(open('/proc/self/comm').read())")).stdout == "python3\n\n"
