r"""For tests of programs that use sandboxes, without a virtual machine.

async def answer(call: Call) -> Answer:
return Answer(stdout="42\n")

async with open_scripted_sandbox(answer) as sandbox:
assert (await sandbox.run("print(6 * 7)")).stdout == "42\n"
"""

from __future__ import annotations

from .._metadata import fix_module_metadata
from ._calls import Answer as Answer, Call as Call
from ._scripted import open_scripted_sandbox as open_scripted_sandbox

fix_module_metadata(__name__, globals())
del fix_module_metadata
