"""A grader: each submission runs its tests in a VM of its own, several at once, within limits of time, memory and output."""

from __future__ import annotations

import os

import trio

from trio_sandbox import Host, OutputLimitError, SandboxConfig, open_host

#: What students handed in, by their names.
SUBMISSIONS = {
    "ada": "def double(x):\n    return x * 2\n",
    "bob": "def double(x):\n    return x + 2\n",
    "cyd": "def double(x):\n    while True:\n        pass\n",
    "dan": "import os\nos._exit(0)\n",
}

#: The last line is printed only if all tests have passed, and only these tests know the secret word.
TESTS = """
import sys
secret = sys.stdin.read()
sys.path.insert(0, ".")
from solution import double

assert double(4) == 8, f"double(4) is {double(4)}, not 8"
assert double("ab") == "abab"
print(secret)
"""

LIMITS = SandboxConfig(memory_mib=256, disk_mib=64, max_output_bytes=100_000)
SECONDS = 5


async def grade(host: Host, solution: str, secret: str) -> str:
    """Return what the student is told."""
    async with host.open_sandbox("python", LIMITS) as sandbox:
        await sandbox.path("solution.py").write_text(solution)
        with trio.move_on_after(SECONDS):
            try:
                result = await sandbox.run(TESTS, stdin=secret.encode())
            except OutputLimitError:
                return "too much output"
            if result.oom:
                return "out of memory"
            if result.stdout.endswith(secret + "\n"):
                return "passed"
            return result.stderr.strip().splitlines()[-1] if result.stderr else "ended before the tests did"
        return f"too slow: more than {SECONDS} seconds"


async def grade_all(submissions: dict[str, str]) -> dict[str, str]:
    """Grade as many at once as there are processors, so that none takes another's time."""
    grades: dict[str, str] = {}
    processors = trio.CapacityLimiter(os.cpu_count() or 1)

    async def grade_one(name: str) -> None:
        async with processors:
            grades[name] = await grade(host, submissions[name], secret=f"all tests of {name} have passed")

    async with open_host() as host, trio.open_nursery() as nursery:
        for name in submissions:
            nursery.start_soon(grade_one, name)
    return grades


async def main() -> None:
    """Print the grades."""
    for name, told in sorted((await grade_all(SUBMISSIONS)).items()):
        print(f"{name}: {told}")


if __name__ == "__main__":
    trio.run(main)
