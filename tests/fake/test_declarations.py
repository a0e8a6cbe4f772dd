"""Names that JavaScript declares again, in a later run and in another way, with this machine's own Node.js."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import AsyncGenerator

import pytest

from ._agent import NO_IMPORTS, Host, node_can_import, open_agent

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js here; tests/qemu has one")
needs_imports = pytest.mark.skipif(not node_can_import(), reason=NO_IMPORTS)


@pytest.fixture
async def host() -> AsyncGenerator[Host]:
    async with open_agent() as host:
        yield host


#: How NAME gets the value N, and an expression of it that is N then.
DECLARATIONS = {
    "const": ("const NAME = N", "NAME"),
    "let": ("let NAME = N", "NAME"),
    "var": ("var NAME = N", "NAME"),
    "function": ("function NAME() { return N }", "NAME()"),
    "class": ("class NAME { static n = N }", "NAME.n"),
    "import": ("import { join as NAME } from 'path'", "(NAME('N') - 0)"),
    "assignment": ("NAME = N", "NAME"),
    "const with await": ("const NAME = await N", "NAME"),
    "pattern": ("const { a: [NAME] } = { a: [N] }", "NAME"),
    "several": ("let other_NAME = 0, NAME = N", "NAME"),
    "several vars": ("var other_NAME = 0, NAME = N", "NAME"),
    "async function": ("async function NAME() { return N }", "(await NAME())"),
    "generator": ("function* NAME() { yield N }", "[...NAME()][0]"),
    "namespace": ("import * as NAME from 'path'", "(NAME.join('N') - 0)"),
    "default": ("import NAME from 'path'", "(NAME.join('N') - 0)"),
    "var in a block": ("{ var NAME = N }", "NAME"),
    "var in a loop": ("for (var NAME = 0; NAME < N; NAME++);", "NAME"),
    "var of a loop": ("for (var NAME of [0, N]);", "NAME"),
}
IMPORTS = {"import", "namespace", "default"}
CONSTANTS = {"const", "import", "const with await", "pattern", "namespace", "default"}


@pytest.mark.parametrize("mode", ["", "'use strict'; "])
@pytest.mark.parametrize("imports", [False, pytest.param(True, marks=needs_imports)], ids=["", "imports"])
async def test_a_new_declaration_replaces_the_old_one(host: Host, mode: str, imports: bool) -> None:
    pairs = [pair for pair in itertools.product(DECLARATIONS, repeat=2) if imports == bool(IMPORTS.intersection(pair))]
    for number, (first, later) in enumerate(pairs):
        expression = ""
        for value, kind in ((3, first), (4, later)):
            declaration, expression = (
                text.replace("NAME", f"name{number}").replace("N", str(value)) for text in DECLARATIONS[kind]
            )
            if kind == "assignment" and mode and value == 3:
                declaration = f"globalThis.{declaration}"
            result = await host.run(
                f"{mode}{declaration}\nconst check{number} = {expression}; check{number}", language="javascript"
            )
            what = f"{first}, then {later}"
            if value == 4 and kind == "assignment" and first in CONSTANTS:
                assert "TypeError: Assignment to constant variable." in result.stderr, what
            else:
                assert (result.stderr, result.value) == ("", str(value)), what
        # And it is the same for a run that comes after both.
        if not (later == "assignment" and first in CONSTANTS):
            assert (await host.run(expression, language="javascript")).value == "4", f"{first}, then {later}"


async def test_what_one_run_declares_twice_is_an_error_of_javascripts(host: Host) -> None:
    lexical = ["const", "let", "class", "import"]
    for first, later in itertools.product(lexical, [*lexical, "function", "var"]):
        once, twice = (DECLARATIONS[kind][0].replace("NAME", "name").replace("N", "1") for kind in (first, later))
        # Where there are imports V8 complains of these.
        words = "Cannot use import statement|has already been declared"
        for _ in range(2):
            result = await host.run(f"console.log('begun')\n{once}\n{twice}", language="javascript")
            assert (result.exit_code, result.stdout) == (1, ""), (first, later)
            assert re.search(f"SyntaxError: .*({words})", result.stderr), (first, later)
            await host.run(once, language="javascript")


#: Runs one after the other, and what the last one is.
SEQUENCES: dict[str, tuple[list[str], str]] = {
    "functions are there from the beginning": (
        ["let f = 1", "const before = f(); function f() { return 2 }; before"],
        "2",
    ),
    "vars are undefined before": (["let v = 1", "const before = v; var v = 2; [before, v]"], "[ undefined, 2 ]"),
    "vars without a value keep theirs": (["var v = 1", "var v; v"], "1"),
    "vars that replace do not": (["let v = 1", "var v; v"], ""),
    "let without a value has none": (["var v = 1", "let v; v"], ""),
    "two functions of one name": (["let f", "function f() { return 1 }; function f() { return 2 }; f()"], "2"),
    "functions know each other": (["let f, g", "function f() { return g() }\nfunction g() { return 3 }\nf()"], "3"),
    "a function that replaces itself": (["let f", "function f() { f = () => 2; return 1 }; [f(), f()]"], "[ 1, 2 ]"),
    "its name": (["let f", "function f() {}; f.name"], "'f'"),
    "functions and vars": (["let f", "function f() {}; var f; typeof f"], "'function'"),
    "two vars": (["let v", "var v = 1; var v = v + 1; v"], "2"),
    "a conditional var": (["let v = 1", "if (false) var v = 2; else v = 3; v"], "3"),
    "loops": (
        ["let i, k, o", "let n = 0; for (var i = 0, k = 1; i < 3; i++) n += k; for (var o in [1, 2]) n += +o; n"],
        "4",
    ),
    "values of statements": (["let v", "5; var v = 1"], ""),
    "globals": (["var v = 1; function f() {}", "[globalThis.v, typeof globalThis.f]"], "[ 1, 'function' ]"),
    "imports come first": (["const before = sep; import { sep } from 'path'; before"], "'/'"),
    "imports behind directives": (["'use strict'; import { sep } from 'path'; (function () { return this })()"], ""),
    "logical assignment": (["const c = 1; let l = 0; c ||= 2; c && l; [c ||= 2, l ??= 3]"], "[ 1, 0 ]"),
    "shadowed": (
        [
            "const c = 1, d = 2",
            (
                "function f(c) { c = 5; var d = 6; { let c = 7; c++ }; return [c, d] }\n"
                "const g = function c() { return typeof c }, h = ({ c } = {}, ...[d]) => { c = d = 8; return c }\n"
                "for (let c = 0; c < 2; c++); for (const c of [1]); try { throw 1 } catch (c) { c = 2 }\n"
                "switch (1) { case 1: let c = 3; c = 4 }\n"
                "class K { static { var c = 1; c = 2; let d; d = 3 } }\n"
                "{ function c() {} c = 9 } { class c {} }\n"
                "[f(), g(), h(), c, d]"
            ),
        ],
        "[ [ 5, 6 ], 'function', 8, 1, 2 ]",
    ),
    "text is not code": (["const c = 1", "`c = 2; import(x) ${c}`"], "'c = 2; import(x) 1'"),
    "deep": (["const c = 1", "+".join(["c"] * 3000)], "3000"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_imports if name.startswith("imports") else ()) for name in SEQUENCES]
)
async def test_declared_again(host: Host, name: str) -> None:
    runs, value = SEQUENCES[name]
    results = [await host.run(code, language="javascript") for code in runs]
    assert [(result.stderr, result.exit_code) for result in results] == [("", 0)] * len(runs)
    assert results[-1].value == (value or None)


#: To the constant c.
ASSIGNMENTS = """
c = 2
c += 1
c++
--c
[c] = [1]
({ c } = {})
({ c = 1 } = {})
({ d: c } = {})
({ ...c } = {})
[...c] = []
for (c of [1]);
for (c in [1]);
{ c = 2 }
c &&= 2
globalThis.d = c = 2
(() => { c = 2 })()
(function () { 'use strict'; c = 2 })()
(function f(a = (c = 2)) {})()
`${c = 2}`
new (class { x = c++ })
"""


async def test_constants_can_not_be_assigned_to(host: Host) -> None:
    await host.run("const c = 1", language="javascript")
    assignments = ASSIGNMENTS.split("\n")[1:-1]
    for code in [f"const c = 1\n;{text};" for text in assignments] + assignments:
        result = await host.run(code, language="javascript")
        line = code.count("\n") + 1
        assert re.match(
            rf"TypeError: Assignment to constant variable\.\n    at .*<run-\d+>:{line}:\d+\)?\n", result.stderr
        ), (code, result)
        assert (await host.run("c", language="javascript")).value == "1"
    assert (await host.run("let c = 5; c = 6; c", language="javascript")).value == "6"


async def test_lines_of_functions_that_replace(host: Host) -> None:
    await host.run("let f, g, h, v", language="javascript")
    code = "function h() { null.x }; let a = 1\nfunction f() {\n  null.x\n}\nvar v; function g() { null.x }\nfor (const k of [f, g, h]) try { k() } catch (e) { console.log(e.stack.split('\\n')[1]) }\nnull.x"
    result = await host.run(code, language="javascript")
    assert re.findall(r"at (\w) \(<run-\d+>:(\d+):", result.stdout) == [("f", "3"), ("g", "5"), ("h", "1")]
    assert "    at f (<run-2>:3:8)" in result.stdout
    assert "<run-2>:7:6" in result.stderr
