"""An agent's backend whose files and commands are in a virtual machine."""

from __future__ import annotations

from trio_sandbox.blocking import open_sandbox
from trio_sandbox.integrations.deepagents import SandboxBackend

with open_sandbox("python", memory_mib=512) as sandbox:
    backend = SandboxBackend(sandbox)  # for create_deep_agent(model, backend=backend)
    backend.write("/home/user/program.py", "print(6 * 7)\n")
    answer = backend.execute("python3 program.py")
    assert (answer.output, answer.exit_code) == ("42\n", 0)
