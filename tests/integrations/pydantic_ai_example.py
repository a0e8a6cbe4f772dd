"""An agent's workspace in a virtual machine."""

from __future__ import annotations

import asyncio

from pydantic_ai.workspaces import Workspace

from trio_sandbox.aio import open_sandbox
from trio_sandbox.integrations.pydantic_ai import SandboxBackend


async def main() -> None:
    """Write a program and run it, as an agent with this workspace would."""
    async with open_sandbox("python", memory_mib=512) as sandbox:
        workspace = Workspace(SandboxBackend(sandbox))
        await workspace.write_bytes("program.py", b"print(6 * 7)\n")
        result = await workspace.run(["python3", "program.py"])
        assert (result.stdout, result.exit_code) == ("42\n", 0)


asyncio.run(main())
