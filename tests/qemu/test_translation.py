"""Under software emulation: code that was translated once is not translated again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trio_sandbox import constants, open_sandbox
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


#: More code than QEMU keeps of what it has translated, and more threads that read from the disk than it has for that.
_BUSY = """
import ctypes, mmap, os, random, threading
code = mmap.mmap(-1, 2**22, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(b"\\xff\\xc0" * (len(code) // 2 - 1) + b"\\xc3\\x90")  # inc eax; ...; ret
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()

device = open("/sys/block/vdb/dev").read().split(":")
os.mknod("/tmp/disk", 0o60600, os.makedev(*map(int, device)))
disk = os.open("/tmp/disk", os.O_RDONLY | os.O_DIRECT)
def read():
    buffer = mmap.mmap(-1, 2**20)
    for _ in range(10):
        os.preadv(disk, [buffer], random.randrange(7000) * 2**20)
threads = [threading.Thread(target=read) for _ in range(80)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def memory_beside_the_guests(pid: int) -> int:
    """Give the bytes that a QEMU has for itself and has written to, but for its guest's RAM."""
    total, is_ram = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            is_ram = line.endswith(("/memory", "/memfd:ram (deleted)"))
        elif line.startswith("Private_Dirty:") and not is_ram:
            total += int(line.split()[1]) * 1024
    return total


async def test_qemu_takes_for_itself_what_is_reckoned_with() -> None:
    async with open_sandbox(vcpus=2) as sandbox:
        if sandbox.accelerator != "tcg":
            pytest.skip("without translated code there is far less")
        pid = sandbox.statistics().qemu_pid
        assert pid is not None
        await sandbox.run_process(["python3", "-c", _BUSY], user="root", check=True)
        assert 64 * 2**20 < memory_beside_the_guests(pid) <= constants.VM_OVERHEAD_MIB * 2**20


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
