"""What the part `runs` does, in which order: drawn from the seed, without doing any of it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Literal, TypeVar

import attrs

from trio_sandbox.wire._framing import INITIAL_CREDIT

_Drawn = TypeVar("_Drawn")
Language = Literal["python", "javascript", "shell"]
Kind = Literal["prints", "leaves a pipe open", "is refused", "reads", "is cancelled", "is left", "ends", "is forked"]

#: What one stream of a run may print, in the soak: more than there is credit for, so that it is not the first limit to be met.
MAX_OUTPUT = 300_000
#: Sizes around which something changes, and how often each is drawn: what an agent leaves to the channel, what a pipe and a frame
#: hold, when credit is given back, the credit, and the limit.
LIMITS = {0: 20, 80: 20, 1 << 14: 20, 1 << 16: 20, INITIAL_CREDIT // 2: 5, INITIAL_CREDIT: 8, MAX_OUTPUT: 7}
_KINDS: dict[Kind, float] = {
    "prints": 75,
    "leaves a pipe open": 5,
    "is refused": 5,
    "reads": 4,
    "is cancelled": 8,
    "is left": 3,
    "ends": 0.3,
    "is forked": 0.1,
}
_LANGUAGES: dict[Language, float] = {"python": 16, "javascript": 1, "shell": 2}
#: Seconds within which a run is cancelled: some before it has begun, some in the middle.
_LATEST_CANCELLATION = 0.05

_PRINT: dict[Language, str] = {
    "python": "import sys; _ = sys.std{stream}.write('{letter}' * {size})",
    "javascript": "process.std{stream}.write('{letter}'.repeat({size})); undefined",
    "shell": "head -c {size} /dev/zero | tr '\\0' {letter} >&{number}",
}
#: What is left holds the run's output open for a moment.
_LEAVE: dict[Language, str] = {
    "python": "import subprocess; child = subprocess.Popen(['sleep', '0.1'])",
    "javascript": "undefined; require('child_process').spawn('sleep', ['0.1'], { stdio: ['ignore', 'inherit', 'inherit'] }).unref()",
    "shell": "sleep 0.1 &",
}
_READ: dict[Language, str] = {
    "python": "import sys; print(len(sys.stdin.read()))",
    "javascript": "console.log(require('fs').readFileSync(0).length)",
    "shell": "wc -c",
}
_GO_ON: dict[Language, tuple[str, ...]] = {
    "python": ("import time; time.sleep(60)", "while True: pass", "while True: print('x' * 1000)", "input()"),
    "javascript": (
        "await new Promise((resolve) => setTimeout(resolve, 60000).unref())",
        "while (true) {}",
        "while (true) console.log('x'.repeat(1000))",
    ),
    "shell": ("sleep 60", "while true; do :; done", "while true; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done"),
}
_END: dict[Language, str] = {
    "python": "import os; os._exit(3)",
    "javascript": "process.exit(3)",
    "shell": "exit 3",
}


@attrs.frozen
class Step:
    """One run, or a fork with some runs in it."""

    number: int
    kind: Kind
    language: Language
    code: str = ""
    streamed: bool = False
    """By `Sandbox.stream`, not by `Sandbox.run`."""
    letter: str = ""
    stdout: int = 0
    """Bytes that it prints, all of them *letter*."""
    stderr: int = 0
    stdin: int | None = None
    """Bytes that it can read; None: nothing is sent."""
    cancelled_after: float | None = None
    has_deadline: bool = False

    def __str__(self) -> str:
        way = "stream" if self.streamed else "run"
        more = f", cancelled after {self.cancelled_after:.4f} s" if self.cancelled_after is not None else ""
        sizes = f", {self.stdout} and {self.stderr} bytes" if self.stdout or self.stderr else ""
        return f"step {self.number} ({self.language} by {way}, it {self.kind}{sizes}{more}: {self.code[:80]!r})"


def steps(seed: int) -> Iterator[Step]:
    """Yield steps without end, the same ones for the same seed."""
    rng = random.Random(seed)
    number = 0
    while True:
        number += 1
        yield _step(rng, number)


def _step(rng: random.Random, number: int) -> Step:
    kind = _draw(rng, _KINDS)
    step = Step(
        number,
        kind,
        _draw(rng, _LANGUAGES),
        streamed=rng.random() < 0.3,
        letter=chr(ord("a") + number % 26),
        has_deadline=rng.random() < 0.5,
    )
    match kind:
        case "prints" | "leaves a pipe open":
            return _print(rng, step)
        case "is refused":
            return attrs.evolve(step, code=rng.choice(_GO_ON[step.language]))
        case "reads":
            return attrs.evolve(step, code=_READ[step.language], stdin=_size(rng))
        case "is cancelled":
            return attrs.evolve(
                step,
                code=rng.choice(_GO_ON[step.language]),
                stdin=rng.choice((None, None, 6, 300_000)),
                cancelled_after=rng.uniform(0, _LATEST_CANCELLATION) * rng.random(),
            )
        case "is left":
            printing = _PRINT[step.language].format(stream="out", number=1, letter=step.letter, size=50_000)
            return attrs.evolve(step, code=f"{printing}\n{rng.choice(_GO_ON[step.language])}", streamed=True)
        case "ends":
            return attrs.evolve(step, code=_END[step.language])
        case "is forked":
            return attrs.evolve(step, language="python")


def _print(rng: random.Random, step: Step) -> Step:
    stdout, stderr = _size(rng), _size(rng) if rng.random() < 0.2 else 0
    lines = [
        _PRINT[step.language].format(stream=stream, number=number, letter=step.letter, size=size)
        for stream, number, size in (("out", 1, stdout), ("err", 2, stderr))
        if size or number == 1
    ]
    if step.kind == "leaves a pipe open":
        lines.append(_LEAVE[step.language])
    return attrs.evolve(step, code="\n".join(lines), stdout=stdout, stderr=stderr)


def _size(rng: random.Random) -> int:
    beside = rng.choice((0, 1, 2, 5, 10, 13, 100, rng.randrange(1000)))
    return max(0, _draw(rng, LIMITS) + rng.choice((-1, 1)) * beside)


def _draw(rng: random.Random, weights: Mapping[_Drawn, float]) -> _Drawn:
    return rng.choices(list(weights), list(weights.values()))[0]
