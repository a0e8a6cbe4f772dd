"""Speculative execution: try several ways from one state at once, and keep the first that works."""

from __future__ import annotations

import trio

from trio_sandbox import Sandbox, open_sandbox

#: What has to be prepared once: here a bug and its test. It could be a repository with its dependencies.
PREPARE = """
def median(values):
    return sorted(values)[len(values) // 2]

def test():
    assert median([9, 1, 2]) == 2
    assert median([9, 1, 3, 2]) == 2.5
"""

#: What a model proposes.
CANDIDATES = {
    "endless": "while True: pass",
    "wrong": "def median(values): return sum(values) / len(values)",
    "right": "import statistics\nmedian = statistics.median",
}


async def first_that_works(sandbox: Sandbox, candidates: dict[str, str], check: str) -> str | None:
    """Try each candidate in a copy of the sandbox; return the name of the first that passes the check, None if none does."""
    winner: str | None = None

    async def attempt(name: str, child: Sandbox) -> None:
        nonlocal winner
        result = await child.run(f"{candidates[name]}\n{check}")
        if result.ok and winner is None:
            winner = name
            nursery.cancel_scope.cancel(reason=f"{name} works")  # stops the others, in their VMs as well

    async with sandbox.fork(len(candidates)) as children:
        with trio.move_on_after(30):
            async with trio.open_nursery() as nursery:
                for name, child in zip(candidates, children, strict=True):
                    nursery.start_soon(attempt, name, child)
    return winner


async def main() -> None:
    """Find the fix, then apply it."""
    async with open_sandbox("python") as sandbox:
        await sandbox.run(PREPARE, check=True)
        winner = await first_that_works(sandbox, CANDIDATES, "test()")
        print("works:", winner)
        if winner is not None:
            await sandbox.run(CANDIDATES[winner], check=True)
            print((await sandbox.run("median([10, 20, 30, 40])")).value)


if __name__ == "__main__":
    trio.run(main)
