"""What debuggers, `traceback` and `inspect` see in a Python interpreter: the code of runs, and nothing of what calls it.

Like the worker, whose part it is, it stands alone: the standard library of Python 3.9 or later, in the process of code
that nobody trusts.

A debugger that steps on after the last line of a run would come to our lines, and could end our loop there.
"""

from __future__ import annotations

import sys
from itertools import takewhile
from sys import gettrace, settrace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType
    from typing import Any

_modules = sys.modules  # as code may put something else there


def hide_from_debuggers(bdb: Any, is_ours: Callable[[FrameType], bool]) -> None:
    """Have the debuggers of the standard library pass by our frames.

    Args:
      bdb: The module, just imported.
      is_ours: Tells what is ours.

    """
    debugger = getattr(bdb, "Bdb", None)
    if debugger is None:
        return  # a module of the code's own
    find_stack, is_place_to_stop = debugger.get_stack, debugger.stop_here

    def get_stack(self: Any, frame: Any, traceback: Any) -> tuple[list[Any], int]:
        stack, index = find_stack(self, frame, traceback)
        first = next((at for at, entry in enumerate(stack) if is_ours(entry[0])), 0)
        shown = [entry for entry in stack[first:] if not is_ours(entry[0])]
        return shown, max(0, index - len(stack) + len(shown))

    def stop_here(self: Any, frame: FrameType) -> bool:
        return not is_ours(frame) and bool(is_place_to_stop(self, frame))

    debugger.get_stack, debugger.stop_here = get_stack, stop_here


def hide_from_stacks(traceback: Any, is_ours: Callable[[FrameType], bool]) -> None:
    """Have the stacks that *traceback* shows, and `logging` by it, begin with the code's frames."""
    walk = traceback.walk_stack

    def walk_stack(f: FrameType | None) -> Iterable[tuple[FrameType, int]]:
        # None means a frame some steps below the call: another one would be counted as a step.
        return takewhile(lambda step: not is_ours(step[0]), walk(f)) if f is not None else walk(f)

    traceback.walk_stack = walk_stack


def patch_inspect(inspect: Any, is_ours: Callable[[FrameType], bool], find_class: Callable[[type], str | None]) -> None:
    """Have *inspect* show stacks of the code alone, and find the source of its classes.

    Args:
      inspect: The module, just imported.
      is_ours: Tells what is ours.
      find_class: Gives the name of the run that defines a class, if any does.

    """
    if not hasattr(inspect, "getouterframes"):
        return  # a module of the code's own
    find_frames, find_file = inspect.getouterframes, inspect.getfile

    def getouterframes(frame: FrameType, context: int = 1) -> list[Any]:
        return list(takewhile(lambda record: not is_ours(record[0]), find_frames(frame, context)))

    def getfile(object: Any) -> Any:  # noqa: A002  its name there
        try:
            return find_file(object)
        except (OSError, TypeError):
            # It asks the class's module for its file, and the code's has none.
            name = find_class(object) if isinstance(object, type) and object.__module__ == "__main__" else None
            if name is None:
                raise
            return name

    inspect.getouterframes, inspect.getfile = getouterframes, getfile


def stop_debugging() -> None:
    """End a debugger's session with the run that it was in: the next one has another input to be asked for."""
    trace = gettrace()
    if trace is None or "bdb" not in _modules:
        return
    debugger = getattr(_modules["bdb"], "Bdb", None)
    if isinstance(debugger, type) and issubclass(type(getattr(trace, "__self__", None)), debugger):
        settrace(None)
