"""The files that say who a machine is, in a real guest: ordinary ones, which its root may write and replace."""

from __future__ import annotations

import pytest

from trio_sandbox import Sandbox, open_host

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]


async def hosts(sandbox: Sandbox, name: str) -> bytes:
    asked = await sandbox.run_process(["getent", "hosts", name], capture_stdout=True, check=False)
    return b" ".join(asked.stdout.split()[:1])


async def test_files_in_etc_are_written_and_replaced() -> None:
    async with open_host() as host, host.open_sandbox("python") as sandbox:
        path = sandbox.path("/etc/hosts", user="root")
        async with await path.open("a") as file:
            await file.write("192.0.2.1 appended.example\n")
        # The copies know their own names, and what was written.
        async with sandbox.fork(2) as copies:
            names = {(await copy.path("/etc/hostname").read_text()).strip() for copy in (sandbox, *copies)}
            assert len(names) == 3
            for copy in copies:
                name = (await copy.path("/etc/hostname").read_text()).strip()
                assert await hosts(copy, "appended.example") == b"192.0.2.1"
                assert await hosts(copy, name) == b"127.0.0.1"
                text = await copy.path("/etc/hosts").read_text()
                assert [other for other in names - {name} if other in text] == []
        await path.write_text(await path.read_text() + "192.0.2.2 written.example\n")
        assert await hosts(sandbox, "written.example") == b"192.0.2.2"
        for name in ("hosts", "hostname", "machine-id"):
            await sandbox.run_process(["sed", "-i", "$ a # replaced", f"/etc/{name}"], user="root")
            assert (await sandbox.path("/etc", name).read_text()).endswith("# replaced\n")
            await sandbox.path("/etc", name, user="root").write_text("192.0.2.3 last.example\n")
            assert not await sandbox.path("/etc", name).is_symlink()
        assert await hosts(sandbox, "last.example") == b"192.0.2.3"
