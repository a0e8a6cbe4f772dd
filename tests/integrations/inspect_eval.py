"""An eval whose samples run code in virtual machines: ``inspect eval inspect_eval.py``."""

from __future__ import annotations

from inspect_ai import Task, eval as run_eval, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.util import SandboxEnvironmentSpec, sandbox

from trio_sandbox.integrations.inspect import TrioSandboxConfig


@solver
def run_it() -> Solver:
    """Run the input, in place of a model that would write code for it."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        done = await sandbox().exec(["python3", "-c", state.input_text], timeout=30)
        state.output.completion = done.stdout
        return state

    return solve


@task
def arithmetic() -> Task:
    """Two samples, each in a machine of its own; ``sandbox="trio"`` is one with 512 MiB."""
    return Task(
        dataset=[Sample(input="print(6 * 7)", target="42"), Sample(input="print(2 ** 10)", target="1024")],
        solver=run_it(),
        scorer=match(),
        sandbox=SandboxEnvironmentSpec("trio", TrioSandboxConfig(memory_mib=256)),
    )


if __name__ == "__main__":
    (log,) = run_eval(arithmetic(), model="mockllm/model", display="none")
    assert log.status == "success", log.error
    assert log.results is not None
    assert log.results.scores[0].metrics["accuracy"].value == 1.0
