"""Nothing on the host's side piles up what a guest says: who reads in a loop has a bound, and says it to `receive_up_to`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import trio_sandbox

PACKAGE = Path(trio_sandbox.__file__).parent
#: What returns bytes of a guest's stream.
READS = {"receive_some", "receive_view", "receive_up_to", "relay"}
#: What keeps something.
KEEPS = {"append", "extend", "join", "write", "insert"}
#: Loops that keep what they read, each with what bounds it.
BOUNDED = {
    ("wire/_answers.py", "receive_up_to"): "the caller's number of bytes",
    ("testing/_guest.py", "call"): "it is the library itself that says it, an answer at a time",
    ("testing/_guest.py", "_connect"): "_CONNECT_ANSWER, two bytes",
    ("fleet/_links.py", "_receive_secret"): "SECRET_BYTES; and no guest says it",
    ("fleet/_links.py", "_receive_exactly"): "MAX_MESSAGE; and no guest says it",
    ("network/_proxy.py", "_receive_head"): "_LONGEST_HEAD; and it is a proxy that says it",
}


def reads(node: ast.AST) -> bool:
    return any(
        isinstance(part, ast.Call) and getattr(part.func, "attr", getattr(part.func, "id", None)) in READS
        for part in ast.walk(node)
    )


def names_of_data(loop: ast.While | ast.For | ast.AsyncFor) -> set[str]:
    """Give the names that hold what the loop reads."""
    found: set[str] = set()
    for node in ast.walk(loop):
        if isinstance(node, ast.NamedExpr) and reads(node.value):
            found.add(node.target.id)
        elif isinstance(node, ast.Assign) and reads(node.value):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AsyncFor) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def keeps(loop: ast.While | ast.For | ast.AsyncFor, names: set[str]) -> bool:
    def is_data(node: ast.AST) -> bool:
        return any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node))

    for node in ast.walk(loop):
        if (
            isinstance(node, ast.AugAssign)
            and isinstance(node.op, ast.Add)
            and (is_data(node.value) or reads(node.value))
        ):
            return True
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in KEEPS
            and any(is_data(argument) for argument in node.args)
        ):
            return True
    return False


def unbounded(source: str) -> Iterator[str]:
    """Give the functions with a loop that reads of a guest and keeps it."""
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for loop in ast.walk(function):
                if isinstance(loop, (ast.While, ast.AsyncFor)) and reads(loop) and keeps(loop, names_of_data(loop)):
                    yield function.name


def test_who_keeps_what_a_guest_says_has_a_bound() -> None:
    found: set[tuple[str, str]] = set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith("guest/"):
            found |= {(name, function) for function in unbounded(path.read_text())}
    assert found == set(BOUNDED)


@pytest.mark.parametrize(
    "body",
    [
        "while data := await stream.receive_some(): answer += data",
        "while True:\n        data = await stream.receive_some()\n        parts.append(data)",
        "while len(x) < 5: x += await stream.receive_some()",
    ],
)
def test_the_test_finds_them(body: str) -> None:
    assert list(unbounded(f"async def f():\n    {body}\n")) == ["f"]
