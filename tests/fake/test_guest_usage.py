"""What a run has used, as a real agent counts it by real control groups. Needs root."""

from __future__ import annotations

import math
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import trio

from trio_sandbox import RunResult

from ._cgroup import own_cgroup
from ._sandbox import open_local_sandbox

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make control groups")

#: Code that keeps a processor busy for some tenths of a second, by the language's own words.
BUSY = {
    "python": "for _ in range(3_000_000): pass",
    "javascript": "for (let i = 0; i < 3e8; i++);",
    "shell": "for ((i = 0; i < 200000; i++)); do :; done",
}
#: Bytes, of which an interpreter has much less by itself.
SIZE = 100 * 2**20
LANGUAGES = [
    pytest.param(
        language, marks=pytest.mark.skipif(shutil.which(program) is None, reason=f"there is no {program} here")
    )
    for language, program in (("python", "python3"), ("javascript", "node"), ("shell", "bash"))
]


@pytest.mark.parametrize("language", LANGUAGES)
async def test_a_run_tells_the_processor_time_that_it_used_itself(language: str) -> None:
    with own_cgroup() as cgroup:
        async with open_local_sandbox(cgroup=cgroup) as (sandbox, _):
            await sandbox.run("", language=language)
            busy = await sandbox.run(BUSY[language], language=language)
            idle = await sandbox.run("", language=language)
            assert 0 < idle.cpu_seconds < busy.cpu_seconds


async def test_what_it_starts_counts_and_what_others_do_does_not() -> None:
    with own_cgroup() as cgroup:
        async with open_local_sandbox(cgroup=cgroup) as (sandbox, _):
            await sandbox.run("import subprocess, sys")
            child = await sandbox.run(f"subprocess.run([sys.executable, '-Ic', {BUSY['python']!r}])")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sandbox.run_process, ["python3", "-Ic", BUSY["python"]])
                beside = await sandbox.run("import time; time.sleep(0.3)")
            assert beside.cpu_seconds < child.cpu_seconds


async def test_a_run_that_ends_its_interpreter_tells_too_and_the_next_one_begins_anew() -> None:
    with own_cgroup() as cgroup:
        async with open_local_sandbox(cgroup=cgroup) as (sandbox, _):
            await sandbox.run(BUSY["python"])
            killed = await sandbox.run(f"{BUSY['python']}\nimport os; os.kill(os.getpid(), 9)")
            assert (killed.exit_code, killed.state_kept) == (137, False)
            after = await sandbox.run("")
            assert after.restarted
            assert killed.cpu_seconds > 0
            busy = await sandbox.run(BUSY["python"])
            idle = await sandbox.run("")
            assert idle.cpu_seconds < busy.cpu_seconds


async def test_where_there_are_no_control_groups_nothing_is_counted() -> None:
    async with open_local_sandbox() as (sandbox, _):
        result = await sandbox.run(BUSY["python"])
        assert (result.cpu_seconds, result.peak_memory_bytes) == (0.0, None)
        assert result.disk_written_bytes is not None
        result = await sandbox.run("true", language="shell")
        assert result.peak_memory_bytes is None
        assert result.disk_written_bytes is not None


def peak(result: RunResult) -> int:
    """Return the most memory that the run's interpreter had."""
    assert result.peak_memory_bytes is not None
    return result.peak_memory_bytes


#: By language: code that has much memory for a moment, that keeps it, and that lets go of it.
LARGE = {
    "python": (f"x = bytearray({SIZE}); del x", f"x = b'x' * {SIZE}", "del x"),
    "javascript": (
        f"(() => {{ Buffer.alloc({SIZE}, 1) }})()",
        f"globalThis.x = Buffer.alloc({SIZE}, 1); 0",
        "x = null",
    ),
}


@pytest.mark.parametrize("pauses", [True, False])
@pytest.mark.parametrize("language", LANGUAGES[:2])
async def test_a_run_tells_the_most_memory_that_its_interpreter_had(
    language: str, pauses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trio_sandbox.guest.agent.meter._RECENTLY", -math.inf if pauses else math.inf)
    moment, kept, let_go = LARGE[language]
    with own_cgroup() as cgroup:
        async with open_local_sandbox(cgroup=cgroup) as (sandbox, _):
            idle = peak(await sandbox.run("", language=language))
            assert 2**20 < idle < SIZE
            assert peak(await sandbox.run(moment, language=language)) > idle + SIZE // 8
            if language == "python":  # when others give memory back is their own affair
                assert peak(await sandbox.run("")) < SIZE
            # What it has already counts.
            assert peak(await sandbox.run(kept, language=language)) > SIZE
            assert peak(await sandbox.run(let_go, language=language)) > SIZE
            if language == "python" and pauses:
                assert peak(await sandbox.run("")) < SIZE


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os._exit(3)"])
async def test_a_run_that_ends_its_interpreter_tells_of_its_memory_too(end: str) -> None:
    with own_cgroup() as cgroup:
        async with open_local_sandbox(cgroup=cgroup) as (sandbox, _):
            await sandbox.run("import os")
            assert SIZE < peak(await sandbox.run(f"x = bytearray({SIZE}); {end}")) < 2 * SIZE
            after = await sandbox.run("")
            assert after.restarted
            assert peak(after) < SIZE


@pytest.mark.parametrize("language", [each for each in LANGUAGES if each.values != ("python",)])
async def test_of_another_interpreter_that_is_killed_nobody_can_tell(language: str) -> None:
    with own_cgroup() as cgroup:
        async with open_local_sandbox(cgroup=cgroup) as (sandbox, _):
            code = "kill -9 $$" if language == "shell" else "process.kill(process.pid, 9)"
            result = await sandbox.run(code, language=language)
            assert (result.exit_code, result.peak_memory_bytes, result.disk_written_bytes) == (137, None, None)


async def test_code_may_have_a_module_of_the_name_of_what_counts_its_memory(tmp_path: Path) -> None:
    (tmp_path / "resource.py").write_text("mine = 1")
    async with open_local_sandbox() as (sandbox, _):
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import resource; print(resource.mine)"
        assert (await sandbox.run(code)).stdout == "1\n"


@pytest.mark.parametrize("grouped", [True, False])
async def test_a_process_tells_what_it_has_used(grouped: bool) -> None:
    with own_cgroup() if grouped else nullcontext() as cgroup:
        async with open_local_sandbox(cgroup=cgroup) as (sandbox, _):
            async with sandbox.open_process(["python3", "-Ic", f"x = bytearray({SIZE})"]) as large:
                assert large.usage is None
                await large.wait()
            # What it waited for counts, and nothing of others.
            code = f"import subprocess, sys; subprocess.run([sys.executable, '-Ic', {BUSY['python']!r}])"
            async with sandbox.open_process(["python3", "-Ic", code]) as busy:
                await busy.wait()
            async with sandbox.open_process(["sleep", "1000"]) as killed:
                killed.kill()
                await killed.wait()
            assert large.usage is not None
            assert busy.usage is not None
            assert killed.usage is not None
            assert SIZE < large.usage.peak_memory_bytes < 2 * SIZE
            assert 0 < busy.usage.peak_memory_bytes < SIZE
            assert 0 < killed.usage.peak_memory_bytes < SIZE
            assert killed.usage.cpu_seconds < busy.usage.cpu_seconds
