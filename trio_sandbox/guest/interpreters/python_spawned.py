"""What a process of `multiprocessing` that is not forked runs in place of the program's file, which code of runs has not.

It makes what past runs have defined at their top level: imports, functions, classes, and names for literal values; not what
they computed, which is what the guard `if __name__ == "__main__"` keeps out of such processes. Whatever fails
is left out, and what is missing in the end says so when it is called.

Its text is put into a memory file, with a call of `_define` behind it: see `python_sources`.
"""

from __future__ import annotations
import __future__

import ast
import io
import linecache

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _define(runs: list[tuple[str, str]]) -> None:  # pyright: ignore[reportUnusedFunction]
    scope: dict[str, Any] = globals()
    for name, code in runs:
        linecache.cache[name] = (len(code), None, io.StringIO(code, None).readlines(), name)
        try:
            statements = ast.parse(code).body
        except (SyntaxError, ValueError):
            continue
        flags = 0
        for statement in filter(_is_definition, statements):
            if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
                for alias in statement.names:
                    flags |= getattr(__future__, alias.name).compiler_flag
            try:
                exec(compile(ast.Module([statement], []), name, "exec", flags, dont_inherit=True), scope)
            except Exception:  # noqa: BLE001  as if it were not there
                continue
    scope["__getattr__"] = _stand_in


def _is_definition(statement: ast.stmt) -> bool:
    if isinstance(statement, _DEFINITIONS):
        return True
    if isinstance(statement, ast.Try):
        handlers = [line for handler in statement.handlers for line in handler.body]
        return all(map(_is_definition, [*statement.body, *handlers, *statement.orelse, *statement.finalbody]))
    if not isinstance(statement, (ast.Assign, ast.AnnAssign)) or statement.value is None:
        return False
    try:
        ast.literal_eval(statement.value)
    except ValueError:
        return False
    return True


def _stand_in(name: str) -> Any:
    """Be what the code has sent here by *name*, and that nothing here is called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def call(*_arguments: object, **_options: object) -> NoReturn:
        raise RuntimeError(
            f"{name!r} is not known to a process that was not forked: it has the imports, functions, classes and literal values "
            'that runs define at their top level. Define it so, put it into a module, or use get_context("fork").'
        )

    call.__name__ = call.__qualname__ = name
    return call
