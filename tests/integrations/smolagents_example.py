"""A smolagents agent whose code runs in a virtual machine, and whose tools run here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smolagents import ChatMessage, CodeAgent, Model, Tool, tool
from smolagents.local_python_executor import CodeOutput, InterpreterError, PythonExecutor
from smolagents.models import MessageRole
from smolagents.serialization import SafeSerializer
from smolagents.utils import truncate_content

from trio_sandbox.blocking import Sandbox, fail_after, open_sandbox

#: `final_answer` in the guest: it gives the answer to the host, and ends the step.
FINAL_ANSWER = """
def final_answer(*args, **kwargs):
    give_final_answer(*args, **kwargs)
    raise SystemExit
"""


class SandboxExecutor(PythonExecutor):
    """Runs each step of an agent in the same interpreter of a sandbox."""

    def __init__(self, sandbox: Sandbox, *, seconds: float = 60) -> None:
        self.sandbox = sandbox
        self.seconds = seconds
        self.tools: dict[str, Callable[..., object]] = {}

    def send_tools(self, tools: dict[str, Tool]) -> None:
        self.tools = dict(tools)
        self.run(FINAL_ANSWER)

    def send_variables(self, variables: dict[str, Any]) -> None:
        if variables:
            data = SafeSerializer.dumps(variables)
            self.run(f"{SafeSerializer.get_deserializer_code(False)}\nglobals().update(_deserialize({data!r}))")

    def __call__(self, code_action: str) -> CodeOutput:
        return self.run(code_action)

    def run(self, code: str) -> CodeOutput:
        answers: list[object] = []

        def give_final_answer(*args: object, **kwargs: object) -> None:
            answers.append(self.tools["final_answer"](*args, **kwargs))

        functions = {**self.tools, "give_final_answer": give_final_answer}
        functions.pop("final_answer", None)  # the guest's own calls the other
        try:
            with fail_after(self.seconds):
                result = self.sandbox.run(code, functions=functions)
        except TimeoutError:
            logs = self.sandbox.last_output.stdout
            raise InterpreterError(f"{logs}\nThe code took more than {self.seconds:g} s and was stopped.") from None
        logs = truncate_content(result.stdout)
        if answers:
            return CodeOutput(answers[-1], logs, is_final_answer=True)
        if not result.ok:
            lost = "" if result.state_kept else "\nAll variables are lost."
            raise InterpreterError(f"{logs}\n{truncate_content(result.stderr)}{lost}")
        return CodeOutput(result.value, logs, is_final_answer=False)


class CannedModel(Model):
    """Says what a model would say."""

    def __init__(self, *steps: str) -> None:
        super().__init__(model_id="canned")
        self.steps = list(steps)
        self.told: list[str] = []

    def generate(self, messages: list[ChatMessage], *args: object, **kwargs: object) -> ChatMessage:
        content = messages[-1].content
        self.told.append(content if isinstance(content, str) else "".join(part["text"] for part in content or ()))
        return ChatMessage(role=MessageRole.ASSISTANT, content=f"<code>\n{self.steps.pop(0)}\n</code>")


@tool
def price(item: str) -> float:
    """Say what one of an item costs.

    Args:
        item: Its name.
    """
    return {"tea": 2.5}[item]


def main() -> None:
    """Have an agent compute something in four steps, two of which fail."""
    model = CannedModel(
        "total = price('tea') * count\nprint('total:', total)",
        "price('gold')",
        "while True: pass",
        "final_answer({'total': total})\nprint('not reached')",
    )
    with open_sandbox("python") as sandbox:
        agent = CodeAgent([price], model, executor=SandboxExecutor(sandbox, seconds=10), verbosity_level=0)
        answer = agent.run("What do they cost?", additional_args={"count": 4})
    _, first, second, third = model.told
    assert "total: 10.0" in first
    assert "KeyError: 'gold'" in second
    assert "took more than 10 s" in third
    assert answer == {"total": 10.0}


if __name__ == "__main__":
    main()
