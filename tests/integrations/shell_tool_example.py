"""The shell of an agent of the OpenAI Agents SDK, in a virtual machine."""

from __future__ import annotations

import asyncio

from agents import (
    Agent,
    RunConfig,
    Runner,
    ShellCallOutcome,
    ShellCommandOutput,
    ShellCommandRequest,
    ShellResult,
    ShellTool,
    ToolCallOutputItem,
)
from agents.testing import ModelStep, ScriptedModel, assistant_message
from openai.types.responses.response_function_shell_tool_call import Action, ResponseFunctionShellToolCall

from trio_sandbox import OutputLimitError
from trio_sandbox.aio import Sandbox, open_sandbox


class Executor:
    """Runs what the model wants, a command after the other, in one shell of a sandbox."""

    def __init__(self, sandbox: Sandbox, *, max_seconds: float = 60) -> None:
        self.sandbox = sandbox
        self.max_seconds = max_seconds

    async def __call__(self, request: ShellCommandRequest) -> ShellResult:
        action = request.data.action
        seconds = self.max_seconds
        if action.timeout_ms is not None:
            seconds = min(seconds, action.timeout_ms / 1000)
        # The SDK cuts the output to `action.max_output_length`.
        return ShellResult([await self.run(command, seconds) for command in action.commands])

    async def run(self, command: str, seconds: float) -> ShellCommandOutput:
        try:
            async with asyncio.timeout(seconds):
                result = await self.sandbox.run(command, language="shell")
        except TimeoutError:
            last = self.sandbox.last_output
            return ShellCommandOutput(last.stdout, last.stderr, ShellCallOutcome("timeout"), command)
        except OutputLimitError as exc:
            stdout = exc.stdout_bytes.decode("utf-8", "replace")
            return ShellCommandOutput(stdout, f"{exc}\n", ShellCallOutcome("exit", 137), command)
        return ShellCommandOutput(result.stdout, result.stderr, ShellCallOutcome("exit", result.exit_code), command)


#: What a model would say.
COMMANDS = ["cd /tmp && echo 6*7 >sum", "cat sum; ls missing", "echo started; sleep 60", "pwd", "yes"]
SCRIPT = ScriptedModel(
    [
        ModelStep(
            [
                ResponseFunctionShellToolCall(
                    id="1",
                    call_id="call",
                    type="shell_call",
                    status="completed",
                    action=Action(commands=COMMANDS, timeout_ms=10_000, max_output_length=1000),
                )
            ]
        ),
        ModelStep([assistant_message("Done.")]),
    ]
)


async def main() -> None:
    """Have an agent run commands: some fail, one takes too long, one prints too much."""
    async with open_sandbox("python", max_output_bytes=100_000) as sandbox:
        shell = ShellTool(executor=Executor(sandbox))
        agent = Agent(name="worker", model=SCRIPT, tools=[shell])
        result = await Runner.run(agent, "Compute it.", run_config=RunConfig(tracing_disabled=True))
    (told,) = [item for item in result.new_items if isinstance(item, ToolCallOutputItem)]
    print(told.output)
    for expected in ("6*7\n", "exit code: 2", "started\nstatus: timeout", "$ pwd\n/tmp\n"):
        assert expected in str(told.output), expected
    assert len(str(told.output)) <= 1000
    assert result.final_output == "Done."


if __name__ == "__main__":
    asyncio.run(main())
