"""What runs and processes have used of a real guest: its memory and its disk."""

from __future__ import annotations

import pytest

from trio_sandbox import Sandbox

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]

_SIZE = 40 * 2**20
_WRITE = f"open('/home/user/data', 'wb').write(bytes({_SIZE}))"


async def test_a_run_says_what_it_had_of_memory_and_wrote_to_the_disk(sandbox: Sandbox) -> None:
    idle = await sandbox.run("")
    assert idle.peak_memory_bytes is not None
    assert 2**20 < idle.peak_memory_bytes < _SIZE
    assert idle.disk_written_bytes == 0
    large = await sandbox.run(f"x = bytes({_SIZE}); x = x.replace(b'\\0', b'x'); {_WRITE}; del x")
    assert large.ok, large.stderr
    assert large.peak_memory_bytes is not None
    assert large.disk_written_bytes is not None
    assert large.peak_memory_bytes > _SIZE
    assert _SIZE <= large.disk_written_bytes < 1.1 * _SIZE
    # What it waited for counts on the disk, and not in its memory; what is in memory is not on the disk.
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {_WRITE!r}], check=True)"
    started = await sandbox.run(f"{code}\nopen('/dev/shm/data', 'wb').write(bytes({_SIZE}))")
    assert started.ok, started.stderr
    assert started.peak_memory_bytes is not None
    assert started.disk_written_bytes is not None
    assert _SIZE <= started.disk_written_bytes < 1.1 * _SIZE
    shell = await sandbox.run(f"head -c {_SIZE} /dev/zero > zeros", language="shell")
    assert shell.ok, shell.stderr
    assert shell.peak_memory_bytes is None
    assert shell.disk_written_bytes is not None
    assert _SIZE <= shell.disk_written_bytes < 1.1 * _SIZE
    # It counts in copies, too, which have the same interpreter.
    async with sandbox.fork(1) as (copy,):
        again = await copy.run("")
        assert (again.peak_memory_bytes or 0) < _SIZE
        assert again.disk_written_bytes == 0
    killed = await sandbox.run(f"x = bytearray({_SIZE}); {_WRITE}; import os; os.kill(os.getpid(), 9)")
    assert (killed.peak_memory_bytes or 0) > _SIZE
    assert (killed.disk_written_bytes or 0) >= _SIZE


async def test_a_process_says_what_it_has_used(sandbox: Sandbox) -> None:
    async with sandbox.open_process(["python3", "-c", f"x = bytearray({_SIZE}); {_WRITE}"]) as process:
        await process.wait()
    assert process.usage is not None
    assert process.usage.cpu_seconds > 0
    assert process.usage.peak_memory_bytes > _SIZE
    assert _SIZE <= process.usage.disk_written_bytes < 1.1 * _SIZE
    async with sandbox.open_process(["true"]) as process:
        await process.wait()
    assert process.usage is not None
    assert 0 < process.usage.peak_memory_bytes < _SIZE
    assert process.usage.disk_written_bytes == 0
