"""Each of our errors survives what carries exceptions between processes: pickle, copies, and messages of a fleet."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from trio_sandbox import RunResult, SandboxError
from trio_sandbox.fleet._messages import Failure, decode_all, encode

#: Values for parameters that can't be just any text.
RESULT = RunResult(exit_code=3, stderr_bytes=b"why", duration=1.0, restarted=False, state_kept=True, accelerator="tcg")
VALUES: dict[str, object] = {
    "result": RESULT,
    "errno": 2,
    "changes": (),
    "conflicts": (),
    "stdout_bytes": b"out",
    "stderr_bytes": b"err",
    "displays": (),
}


def kinds(root: type[SandboxError] = SandboxError) -> Iterator[type[SandboxError]]:
    yield root
    for kind in root.__subclasses__():
        if kind.__module__.startswith("trio_sandbox"):
            yield from kinds(kind)


def example(kind: type[SandboxError]) -> SandboxError:
    arguments: list[object] = []
    named: dict[str, object] = {}
    for parameter in list(inspect.signature(kind.__init__).parameters.values())[1:]:
        value = VALUES.get(parameter.name, f"some {parameter.name}")
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.VAR_POSITIONAL):
            arguments.append(value)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            named[parameter.name] = value
    return kind(*arguments, **named)


def by_pickle(error: Exception) -> Any:
    return pickle.loads(pickle.dumps(error))


def by_message(error: Exception) -> Any:
    (message,) = decode_all(encode(Failure(error)))
    return message.error


EXAMPLES = [example(kind) for kind in dict.fromkeys(kinds())]


@pytest.mark.parametrize("carry", [by_pickle, by_message, copy.copy], ids=lambda each: each.__name__)
@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_arrives_as_it_was(error: SandboxError, carry: Callable[[Exception], Any]) -> None:
    error.__notes__ = ["on node one"]
    there = carry(error)
    assert type(there) is type(error)
    assert (str(there), there.retry_safe) == (str(error), error.retry_safe)
    assert vars(there) == vars(error)
    for name in ("errno", "strerror", "filename"):
        assert getattr(there, name, None) == getattr(error, name, None)
