"""What a run has used, as a real agent counts it by real control groups. Needs root."""

from __future__ import annotations

import os
import shutil

import pytest
import trio

from ._cgroup import own_cgroup
from ._sandbox import open_local_sandbox

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make control groups")

#: Code that keeps a processor busy for some tenths of a second, by the language's own words.
BUSY = {
    "python": "for _ in range(3_000_000): pass",
    "javascript": "for (let i = 0; i < 3e8; i++);",
    "shell": "for ((i = 0; i < 200000; i++)); do :; done",
}
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
        assert (await sandbox.run(BUSY["python"])).cpu_seconds == 0.0
