"""What a process of `multiprocessing` that is not forked runs in place of the program's file, which code of runs has not.

It knows what past runs have defined at their top level: imports, functions, classes, and names for literal values; not what
they computed, which is what the guard `if __name__ == "__main__"` keeps out of such processes. It makes of that what
is asked for, and what that needs. Whatever else is asked for says so when it is called.

Its text is put into a memory file, with a call of `_learn` behind it: see `python_sources`.
"""

from __future__ import annotations
import __future__

import ast
import io
import linecache

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_IMPORTS = (ast.Import, ast.ImportFrom)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

#: By name, what has to be executed for it, each with the name of its run and the flags to compile it with.
_known: dict[str, list[tuple[ast.stmt, str, int]]] = {}


def _learn(runs: list[tuple[str, str]]) -> None:  # pyright: ignore[reportUnusedFunction]
    for run, code in runs:
        linecache.cache[run] = (len(code), None, io.StringIO(code, None).readlines(), run)
        try:
            statements = ast.parse(code).body
        except (SyntaxError, ValueError):
            continue
        flags = 0
        for statement in statements:
            if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
                for alias in statement.names:
                    flags |= getattr(__future__, alias.name).compiler_flag
            elif _is_definition(statement):
                for name in _bound_names(statement):
                    # `import a.b` and `import a.c` make one `a`. Anything else replaces what was there.
                    before = _known.get(name, []) if isinstance(statement, _IMPORTS) else []
                    _known[name] = [*before, (statement, run, flags)]


def _is_definition(statement: ast.stmt) -> bool:
    if isinstance(statement, (*_IMPORTS, *_DEFINITIONS)):
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


def _bound_names(statement: ast.stmt) -> set[str]:
    if isinstance(statement, _DEFINITIONS):
        return {statement.name}
    names: set[str] = set()
    for node in ast.walk(statement):
        if isinstance(node, _IMPORTS):
            names.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def __getattr__(name: str) -> Any:
    """Give whoever unpickles something what runs called *name*."""
    scope = globals()
    if name not in scope:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            _make(name)
        except Exception as exc:  # noqa: BLE001  raised here it would end the process, and a pool would start the next one
            return _stand_in(name, f"making it failed with {exc!r}")
    return scope[name] if name in scope else _stand_in(name, "no run defines it there")


def _make(name: str) -> None:
    # Taken out first: functions call each other. What `from a import *` brings may be in anything.
    for statement, run, flags in (*_known.pop("*", ()), *_known.pop(name, ())):
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                _make(node.id)
        exec(compile(ast.Module([statement], []), run, "exec", flags, dont_inherit=True), globals())


def _stand_in(name: str, problem: str) -> Any:
    def call(*_arguments: object, **_options: object) -> NoReturn:
        raise RuntimeError(
            f"{name!r} is not known to a process that was not forked: it has the imports, functions, classes and literal values "
            f'that runs define at their top level, and {problem}. Put it into a module, or use get_context("fork").'
        )

    call.__name__ = call.__qualname__ = name
    return call
