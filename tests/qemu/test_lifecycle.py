"""Checkpoints, saving and sleep of real machines: what is back is all of it, and nothing is left."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
import trio

from tests._leaks import child_pids, nothing_left, wait_until
from trio_sandbox import (
    Checkpoint,
    HostConfig,
    Sandbox,
    SandboxClosedError,
    SandboxConfig,
    SandboxHibernatedError,
    TemplateUnusableError,
    UnknownTemplateError,
    open_host,
)
from trio_sandbox.image import default_cache_directory
from trio_sandbox.machines._named import NamedTemplateStore
from trio_sandbox.qemu import Vm
from trio_sandbox.qemu._chain import MOST_LAYERS

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]


async def run(sandbox: Sandbox, code: str) -> str:
    result = await sandbox.run(code)
    assert result.exit_code == 0, result.stderr
    return result.stdout.strip()


async def test_memory_files_and_processes_are_back_and_a_dead_machine_too() -> None:
    with nothing_left():
        async with open_host() as host, host.open_sandbox() as sandbox:
            await run(
                sandbox, "import subprocess\nx = 1; open('f', 'w').write('one')\np = subprocess.Popen(['sleep', 'inf'])"
            )
            checkpoint = await sandbox.checkpoint()
            await run(sandbox, "x = 2; open('f', 'w').write('two'); p.kill(); p.wait()")
            state = "print(x, open('f').read(), p.poll())"
            assert await run(sandbox, state) == "2 two -9"
            for _ in range(2):
                await sandbox.revert(checkpoint)
                assert await run(sandbox, state) == "1 one None"
                await run(sandbox, "x = 3; p.kill(); p.wait()")
            pid = sandbox.statistics().qemu_pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await wait_until(lambda: sandbox.statistics().qemu_pid is None)
            with pytest.raises(SandboxClosedError):
                await sandbox.run("")
            await sandbox.revert()
            assert await run(sandbox, state) == "1 one None"
            async with sandbox.open_process(["sleep", "inf"]):
                with pytest.raises(trio.BusyResourceError):
                    await sandbox.hibernate()
            with pytest.raises(trio.BusyResourceError, match="an earlier run has left"):
                await sandbox.hibernate()
            with trio.CancelScope() as scope:
                async with sandbox.transaction():
                    await run(sandbox, "x = 4; p.kill(); p.wait()")
                    scope.cancel()
                    await trio.sleep_forever()
            assert await run(sandbox, state) == "1 one None"


async def test_asleep_there_is_no_process_and_what_was_saved_is_gone_on_from() -> None:
    name = f"test-{os.getpid()}"
    named = NamedTemplateStore(default_cache_directory())
    try:
        async with open_host() as host:
            idle = child_pids()
            config = SandboxConfig(memory_mib=192, hibernate_after=1.5)
            with nothing_left():
                async with host.open_sandbox(config=config) as sandbox:
                    await run(sandbox, "x = [1, 2]; open('f', 'w').write('mine')")
                    assert await sandbox.path("f").read_text() == "mine"
                    await sandbox.hibernate()
                    assert child_pids() == idle
                    assert host.statistics().admission.memory_mib_reserved == 0
                    with pytest.raises(SandboxHibernatedError):
                        await sandbox.run("")
                    await sandbox.resume()
                    assert await run(sandbox, "print(x, open('f').read())") == "[1, 2] mine"
                    await wait_until(lambda: sandbox.statistics().hibernated)
                    await wait_until(lambda: child_pids() == idle)
                    assert await sandbox.path("f").read_text() == "mine"
                    await sandbox.save(name)
                async with host.open_sandbox(template=name) as other, host.open_sandbox(template=name) as another:
                    for each in (other, another):
                        assert each.config.memory_mib == 192
                        assert await run(each, "x.append(3); print(x, open('f').read())") == "[1, 2, 3] mine"
                    names = {await run(each, "import socket; print(socket.gethostname())") for each in (other, another)}
                    assert len(names) == 2
            with pytest.raises(ValueError, match="memory_mib=192"):
                async with host.open_sandbox(memory_mib=191, template=name):
                    pytest.fail("it has been opened")
            os.truncate(named.find(name).devices, 1)
            with pytest.raises(TemplateUnusableError, match="is damaged: changed since it was saved: devices"):
                async with host.open_sandbox(template=name):
                    pytest.fail("it has been opened")
    finally:
        with contextlib.suppress(UnknownTemplateError):
            named.remove(name)


async def test_a_host_that_keeps_no_templates_saves_and_sleeps_too(short_path: Path) -> None:
    config = HostConfig(templates=False, runtime_dir=short_path)
    with nothing_left(short_path):
        async with open_host(config) as host, host.open_sandbox() as sandbox:
            await run(sandbox, "x = 1")
            await sandbox.checkpoint()
            await run(sandbox, "x = 2")
            await sandbox.hibernate()
            await sandbox.resume()
            assert await run(sandbox, "print(x)") == "2"
            await sandbox.revert()
            assert await run(sandbox, "print(x)") == "1"


async def test_the_layers_of_many_snapshots_are_merged_and_those_that_are_kept_go_on(short_path: Path) -> None:
    async def nodes(sandbox: Sandbox) -> int:
        machine = sandbox._slot.machine  # pyright: ignore[reportPrivateUsage]
        assert isinstance(machine, Vm)
        assert len(machine.config.layers) <= MOST_LAYERS
        return len(await machine.qmp.execute("query-named-block-nodes"))

    def files() -> int:
        return len(list(short_path.rglob("*.qcow2")))

    with nothing_left(short_path):
        async with open_host(HostConfig(runtime_dir=short_path)) as host, host.open_sandbox() as sandbox:
            first, most_nodes, most_files = await nodes(sandbox), 0, 0
            files_before = files()
            await run(sandbox, "import os, random\ndata = random.randbytes(300_000)\nopen('first', 'wb').write(data)")
            kept: Checkpoint | None = None
            for number in range(40):
                # Each layer has something of its own, and hides something of those below.
                await run(
                    sandbox,
                    f"open('last', 'w').write('{number}'); open('only{number}', 'w').write('{number}'); os.sync()\n"
                    + (f"os.remove('only{number - 1}')" if number % 2 else ""),
                )
                if number == 10:
                    kept = await sandbox.checkpoint()
                elif number % 7 == 6:
                    async with sandbox.fork(1) as (child,):
                        assert await run(child, "print(open('last').read())") == str(number)
                else:
                    (await sandbox.checkpoint()).discard()
                most_nodes, most_files = max(most_nodes, await nodes(sandbox)), max(most_files, files())
            assert most_nodes <= first + 2 * (MOST_LAYERS + 1)
            kept_files = 12
            assert most_files <= files_before + kept_files + MOST_LAYERS + 1
            # Read from the disk, and not from the guest's memory.
            look = (
                "for each in os.listdir():\n"
                "    if os.path.isfile(each):\n"
                "        with open(each) as file: os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)\n"
                "print(open('first', 'rb').read() == data, open('last').read(),"
                " sorted(int(open(each).read()) for each in os.listdir() if each.startswith('only')))"
            )
            assert await run(sandbox, look) == f"True 39 {[n for n in range(40) if n % 2]}"
            async with sandbox.fork(1) as (child,):
                assert (await run(child, look)).startswith("True 39 ")
            await sandbox.revert(kept)
            assert await run(sandbox, look) == "True 10 [1, 3, 5, 7, 9, 10]"
            # Going back and forth makes no long chain either.
            for _ in range(MOST_LAYERS + 2):
                await sandbox.revert(await sandbox.checkpoint())
                await nodes(sandbox)
            assert await run(sandbox, look) == "True 10 [1, 3, 5, 7, 9, 10]"


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a directory whose path leaves room for a socket's."""
    return tmp_path_factory.mktemp("h")


async def test_a_saved_sandbox_gets_new_mounts_and_more_memory(tmp_path: Path) -> None:
    name = f"test-{os.getpid()}-more"
    named = NamedTemplateStore(default_cache_directory())
    for each in ("old", "new", "newer"):
        (tmp_path / each).mkdir()
        (tmp_path / each / "file").write_text(each)
    read = "print(*(open(f'/{each}/file').read() for each in ('old', 'new', 'newer') if os.path.isdir(f'/{each}')))"
    try:
        with nothing_left():
            async with open_host() as host:
                async with host.open_sandbox(memory_mib=192, mounts={"/old": tmp_path / "old"}) as sandbox:
                    await run(sandbox, "import os; x = 1; open('f', 'w').write('mine')")
                    await sandbox.save(name)
                async with host.open_sandbox(template=name, mounts={"/new": tmp_path / "new"}) as sandbox:
                    assert await run(sandbox, f"{read}; print(x)") == "old new\n1"
                    # Another one above them, and what is saved of that has all.
                    await sandbox.save(name, replace=True)
                mounts = {"/newer": tmp_path / "newer", "/new": tmp_path / "newer"}
                async with host.open_sandbox(template=name, mounts=mounts) as sandbox:
                    assert await run(sandbox, f"{read}; print(x)") == "old newer newer\n1"
                    async with sandbox.fork(1) as (other,):
                        assert await run(other, f"{read}; print(x)") == "old newer newer\n1"
                async with host.open_sandbox(template=name, memory_mib=320, mounts=mounts) as sandbox:
                    memory = "int(open('/proc/meminfo').read().split()[1]) // 1024 > 256"
                    assert await run(sandbox, f"import os; print(open('f').read(), {memory}, 'x' in globals())") == (
                        "mine True False"
                    )
                    assert await run(sandbox, "print(os.listdir('/old'), os.listdir('/new'))") == "[] ['file']"
                    checkpoint = await sandbox.checkpoint()
                    await sandbox.revert(checkpoint)
                    assert await run(sandbox, "print(open('f').read())") == "mine"
    finally:
        with contextlib.suppress(UnknownTemplateError):
            named.remove(name)
