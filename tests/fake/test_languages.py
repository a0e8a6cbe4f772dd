"""The service "code" in the languages whose interpreters have a porter: shell and JavaScript, with this machine's own bash and Node.js."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import attrs
import pytest
import trio

from tests._leaks import wait_until
from trio_sandbox.guest.helpers.dialects import GATE

from ._agent import NO_IMPORTS, Host, Ran, node_can_import, open_agent

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js here; tests/qemu has one")
needs_imports = pytest.mark.skipif(not node_can_import(), reason=NO_IMPORTS)
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
LANGUAGES = [
    pytest.param("shell", marks=needs_bash),
    pytest.param("javascript", marks=needs_node),
]


@pytest.fixture
async def host() -> AsyncGenerator[Host]:
    async with open_agent() as host:
        yield host


def ran(stdout: str = "", stderr: str = "", exit_code: int = 0, value: str | None = None) -> Ran:
    """A run that the interpreter survived, as those before."""
    return Ran(stdout, stderr, exit_code, restarted=False, state_kept=True, value=value)


#: Code, and what it comes to. In one interpreter, one after the other.
SHELL: dict[str, tuple[str, Ran | None]] = {
    "output": ("echo out; echo err >&2", ran("out\n", "err\n")),
    "by name": ("echo out >/dev/stdout; echo err >/dev/stderr", ran("out\n", "err\n")),
    "status": ("(exit 5)", ran(exit_code=5)),
    "descriptors": ("ls /proc/self/fd", ran("0\n1\n2\n3\n")),  # the last is of the listing itself
    "return": ("echo a; return 3; echo b", ran("a\n", "", 3)),
    "unknown": ("no-such-command", ran("", "bash: no-such-command: command not found\n", 127)),
    "syntax": (
        "echo a\nif )",
        ran("a\n", "bash: FILE: line 2: syntax error near unexpected token `)'\nbash: FILE: line 2: `if )'\n", 2),
    ),
    "unfinished": (
        "echo 'a",
        ran("", "bash: FILE: line 1: unexpected EOF while looking for matching `''\n", 2),
    ),
    "define": ("x='a  b'; f() { echo \"f: $1\"; }; alias hi='echo hello'; shopt -s nullglob; cd /", ran()),
    "use": ('echo "$x"; f 1; hi; shopt nullglob; pwd', ran("a  b\nf: 1\nhello\nnullglob       \ton\n/\n")),
    "fails": ("(exit 7)", ran(exit_code=7)),
    "status of the run before": ("echo $?; echo $?", ran("7\n0\n")),
    "fails with a trap": ("trap 'echo \"err $?\"' ERR; (exit 3)", ran("err 3\n", exit_code=3)),
    "sets off nothing again": ("echo $?; trap - ERR", ran("3\n")),
    "exclamation": ("echo 'wow!' \"!x\" $((1!=2))", ran("wow! !x 1\n")),
    "no input": ("cat; read line; echo $?", ran("1\n")),
    "redirected for good": ("exec >/dev/null 2>&1; echo gone", ran()),
    "not for the next": ("echo here", ran("here\n")),
    "own functions": ("printf() { :; }; cd() { :; }; source() { :; }; export() { :; }; eval() { :; }", ran()),
    "as before": ("unset -f printf cd source export eval; printf '%s\\n' fine", ran("fine\n")),
    "unset variable": ("set -u; echo $nope", ran("", "bash: nope: unbound variable\n", 1)),
    "prompts": ("set +u; PS1='$ '; PS2='> '; PROMPT_COMMAND='echo prompt'", ran()),
    "no prompts": ("echo a\necho b", ran("a\nb\n")),
    "traps": (
        "unset PROMPT_COMMAND; trap 'echo debug' DEBUG; trap 'echo err' ERR; trap 'echo ret' RETURN",
        ran("debug\ndebug\ndebug\nret\n"),
    ),
    "look-alikes": ("trap - DEBUG ERR RETURN; echo 'D 0123456789abcdef 7'; echo R", ran("D 0123456789abcdef 7\nR\n")),
    "closed": ("exec 0<&- 1>&- 2>&-", ran()),
    "open again": ("echo open", ran("open\n")),
    "byte order mark": ("\ufeffecho bom", ran("bom\n")),
    "tracing": ("set -x; x=1", ran("", "++ x=1\n")),
    "no more": ("{ set +x; } 2>/dev/null; echo $x", ran("1\n")),
}

JAVASCRIPT: dict[str, tuple[str, Ran | None]] = {
    "output": (
        "console.log('out'); console.error('err'); process.stdout.write('more')",
        ran("out\nmore", "err\n", value="true"),
    ),
    "by name": ("require('fs').writeFileSync('/dev/stdout', 'x')", ran("x")),
    "value": ("({a: [1, 'b']})", ran(value="{ a: [ 1, 'b' ] }")),
    "no value": ("undefined", ran()),
    "numbers": ("[NaN, -0, 1n, Infinity]", ran(value="[ NaN, -0, 1n, Infinity ]")),
    "a big one": ("-10n", ran(value="-10n")),
    "a symbol": ("Symbol('s')", ran(value="Symbol(s)")),
    "exception": (
        "function f() {\n  throw new TypeError('no')\n}\nf()",
        ran("", "TypeError: no\n    at f (<run>:2:9)\n    at <run>:4:1\n", 1),
    ),
    "no error": ("throw {a: 1}", ran("", "Uncaught { a: 1 }\n", 1)),
    "syntax": (
        "let a = 1\nlet b = )",
        ran("", "<run>:2\nlet b = )\n        ^\n\nSyntaxError: Unexpected token ')'\n", 1),
    ),
    "rejection": ("Promise.reject(new Error('no')); 1", ran("", "Error: no\n    at <run>:1:16\n", 1)),
    "rejected value": (
        "(async () => { throw new Error('no') })()",
        ran("", "Error: no\n    at <run>:1:22\n    at <run>:1:40\n", 1),
    ),
    "let": ("let a = 1; const b = 2; class C {}; var d = 4; function e() { return 5 }", ran()),
    "again": ("let a = 10; const b = 20; class C { x = 1 }; var d = 40; function e() { return 50 }", ran()),
    "as another": ("var a = 11; let d = 41, {f, g = [...'xy']} = {f: 6}; const e = () => 51", ran()),
    "all": ("[a, b, new C(), d, e(), f, g]", ran(value="[ 11, 20, C { x: 1 }, 41, 51, 6, [ 'x', 'y' ] ]")),
    "function for let": ("function a() { return 12 }; a()", ran(value="12")),
    "await": ("const later = await new Promise((done) => setTimeout(done, 1, 7)); later", ran(value="7")),
    "a promise": (
        "async function main() { await null; console.log('main'); return 8 }\nmain()",
        ran("main\n", value="8"),
    ),
    "require": ("const path = require('path'); path.basename('/a/b')", ran(value="'b'")),
    "exit code": ("process.exitCode = 4", ran("", "", 4, value=None)),
    "only once": ("process.exitCode", ran()),
    "a child": (
        "require('child_process').spawnSync('sh', ['-c', 'echo child; echo err >&2'], {stdio: 'inherit'}).status",
        ran("child\n", "err\n", value="0"),
    ),
    "no input": ("require('fs').readFileSync(0, 'utf8')", ran(value="''")),
    "console": (
        "console.log = console.error = process.stdout.write = () => {}; JSON.parse = process.exit = null",
        ran(value="null"),
    ),
    "still": ("process.stdout.end('end'); console.log('gone')", ran()),
    "closed": ("const {closeSync, writeSync} = require('fs'); for (const fd of [0, 1, 2]) closeSync(fd)", ran()),
    "open again": ("writeSync(1, 'open')", ran("open", value="4")),
    "look-alikes": ("writeSync(1, 'D 0123456789abcdef 7\\nR\\n')", ran("D 0123456789abcdef 7\nR\n", value="23")),
    "contexts": (
        (
            "const vm = require('vm'), old = vm.createContext({ n: 1 }); vm.runInContext('Math.random()', old);\n"
            "const draws = [vm.runInNewContext('Math.random()'), new vm.Script('Math.random()').runInNewContext(), vm.runInContext('Math.random()', old)];\n"
            "[new Set(draws).size, vm.createContext(old) === old, vm.runInNewContext('n + 1', { n: 1 }, 'x.js'), vm.runInNewContext('Math.random()', { Math: { random: () => 7 } }),\n"
            " vm.runInNewContext('Math.random instanceof Function && Math.random.name'), vm.isContext(vm.createContext()), typeof vm.runInContext('n', old)]"
        ),
        ran(value="[ 3, true, 2, 7, 'random', true, 'number' ]"),
    ),
    "a wrong context": (
        "try { vm.createContext(5) } catch (error) { error.code }",
        ran(value="'ERR_INVALID_ARG_TYPE'"),
    ),
    "byte order mark": ("\ufeff'use strict'; 1", ran(value="1")),
    "timer": ("setTimeout(() => { throw new Error('late') }, 1); await new Promise(() => {})", None),
    "no names of ours": ("Object.keys(globalThis).includes('__trio_sandbox__')", ran(value="false")),
    "fails elsewhere": ("process.emit('warning', 5)", None),
}


IMPORTS: dict[str, tuple[str, Ran | None]] = {
    "import": (
        (
            "import fs, { readFileSync as read } from 'node:fs'\nimport * as os from 'os'\nimport 'node:http'\n"
            "console.log(typeof fs.openSync, typeof read, typeof os.cpus)"
        ),
        ran("function function function\n"),
    ),
    "dynamic import": ("const { sep } = await import('node:path'); sep", ran(value="'/'")),
    "lines after imports": (
        "import {\n  sep as s\n} from 'path'\nnull.x",
        ran("", "TypeError: Cannot read properties of null (reading 'x')\n    at <run>:4:6\n", 1),
    ),
}
TABLES = {"shell": SHELL, "javascript": JAVASCRIPT, "imports": IMPORTS}


def plain(result: Ran) -> Ran:
    text = re.sub(r"<run-\d+>", "<run>", re.sub(r"/proc/\d+/fd/\d+", "FILE", result.stderr))
    return attrs.evolve(result, stderr=text)


@pytest.mark.parametrize("table", [*LANGUAGES, pytest.param("imports", marks=needs_imports)])
async def test_runs_come_to_what_their_language_says(host: Host, table: str) -> None:
    language = "shell" if table == "shell" else "javascript"
    results: dict[str, Ran] = {}
    expected: dict[str, Ran | None] = {}
    for name, (code, result) in TABLES[table].items():
        results[name] = plain(await host.run(code, language=language))
        expected[name] = result or results[name]
    assert results == expected
    assert all(result.state_kept and not result.restarted for result in results.values())


async def test_a_shell_that_closes_what_it_reads_from_runs_to_its_end(host: Host) -> None:
    # Longer than it takes until somebody asks whether the end of the run was lost.
    for code, exit_code in (
        ("sleep 1.5; echo end", 0),
        ("sleep 1.5; exit 3", 3),
        ("sleep 1.5; kill -PIPE $$", 128 + signal.SIGPIPE),
    ):
        result = await host.run(f'exec 5>&1; for n in {{6..300}}; do eval "exec $n>&-"; done; {code}', language="shell")
        assert (result.exit_code, result.state_kept, "end" in result.stdout) == (exit_code, False, exit_code == 0)


async def test_javascript_that_fails_in_a_timer_ends_the_run_that_waits(host: Host) -> None:
    if shutil.which("node") is None:
        pytest.skip("there is no Node.js here")
    code = "setTimeout(() => { throw new Error('late') }, 1); await new Promise(() => {})"
    result = await host.run(code, language="javascript")
    assert (result.exit_code, result.state_kept) == (1, True)
    assert result.stderr.startswith("Error: late\n")


#: Code that ends its interpreter, and the exit code.
ENDS: dict[str, list[tuple[str, int | None]]] = {
    "shell": [
        ("echo last; exit 3", 3),
        ("set -e; echo last; false; echo no", 1),
        ("trap 'echo last' EXIT; exit 4", 4),
        ("echo last; exec sh -c 'exit 5'", 5),
        ("echo last; kill -9 $$", 137),
        ("echo last; kill -SEGV $$", 139),
        ("echo last; kill -9 $PPID", 137),
    ],
    "javascript": [
        ("console.log('last'); process.exit(3)", 3),
        ("console.log('last'); process.kill(process.pid, 9)", 137),
        ("console.log('last'); process.abort()", 134),
        ("console.log('last'); for (let fd = 3; fd < 200; fd++) try { require('fs').closeSync(fd) } catch {}", None),
    ],
}


@pytest.mark.parametrize("language", LANGUAGES)
async def test_an_interpreter_that_ended_is_replaced(host: Host, language: str) -> None:
    echo = {"shell": "x=1; echo $$", "javascript": "x = 1; console.log(process.pid)"}[language]
    for code, status in ENDS[language]:
        await host.run(echo, language=language)
        result = await host.run(code, language=language)
        assert (result.stdout, result.restarted, result.state_kept) == ("last\n", False, False), code
        assert status is None or result.exit_code == status, code
        result = await host.run({"shell": "echo $x", "javascript": "typeof x"}[language], language=language)
        assert (result.stdout.strip(), result.restarted, result.state_kept) == ("", True, True)


#: Code that never ends by itself, and keeps its interpreter when it is interrupted.
ENDLESS = {
    "shell": [
        "f() { while :; do :; done; }; f",
        "sleep 1000",
        "while :; do sleep 1000; done",
        "sleep 1000 | cat",
    ],
    "javascript": [
        "while (true);",
        "await new Promise(() => {})",
        "require('child_process').execSync('sleep 1000')",
        "(function f() { for (;;) { try { for (;;); } catch {} } })()",
    ],
}


@pytest.mark.parametrize("language", LANGUAGES)
async def test_an_interrupt_ends_the_run_and_keeps_the_state(host: Host, language: str) -> None:
    keep = {"shell": "kept=7; echo go; ", "javascript": "kept = 7; console.log('go'); "}[language]
    show = {"shell": "echo $kept", "javascript": "console.log(kept)"}[language]
    for code in ENDLESS[language]:
        async with host.open_run(keep + code, language=language) as run:
            await run.until(b"go\n")
            await run.interrupt()
            result = await run.finish()
        assert (result.exit_code, result.restarted, result.state_kept) == (130, False, True), code
        assert await host.run(show, language=language) == ran("7\n"), code


@needs_node
async def test_node_is_sent_no_interrupt_while_it_could_not_stand_one(host: Host) -> None:
    gate = f"const gate = require('fs').openSync(`/proc/${{process.ppid}}/fd/{GATE}`, 'r+'); "
    write = "require('fs').writeSync(gate, Buffer.of({}), 0, 1, 0); "
    code = (
        f"kept = 7; {gate}setTimeout(() => {{ {write.format(1)}console.log('closed') }}); "
        f"setTimeout(() => {{ console.log('open'); {write.format(0)}}}, 300); await new Promise(() => {{}})"
    )
    async with host.open_run(code, language="javascript") as run:
        await run.until(b"closed\n")
        await run.interrupt()
        result = await run.finish()
    assert (result.stdout, result.stderr, result.exit_code) == ("closed\nopen\n", "Interrupted\n", 130)
    assert await host.run("console.log(kept)", language="javascript") == ran("7\n")


@needs_node
async def test_what_an_interrupt_keeps_node_from_loading_is_loaded_the_next_time(host: Host, tmp_path: Path) -> None:
    (tmp_path / "slow.js").write_text("console.log('go'); while (!globalThis.quick); exports.x = 1;")
    code = {
        f"require('{tmp_path}/slow').x": "1\n",
        # It looks at the environment while it is loaded.
        "(globalThis.quick ??= false); var { env } = process; if (!quick) process.env = new Proxy(env, "
        "{ getOwnPropertyDescriptor() { console.log('go'); for (;;); } }); require('cluster').isPrimary": "true\n",
    }
    for text, printed in code.items():
        async with host.open_run(f"globalThis.quick = false; {text}", language="javascript") as run:
            await run.until(b"go\n")
            await run.interrupt()
            assert (await run.finish()).state_kept
        await host.run("globalThis.quick = true; process.env = globalThis.env ?? process.env", language="javascript")
        result = await host.run(f"var value = {text}; console.log(value)", language="javascript")
        assert (result.stdout.removeprefix("go\n"), result.stderr) == (printed, "")


@pytest.mark.parametrize("language", LANGUAGES)
async def test_an_interrupt_that_overtakes_the_code_of_its_run_ends_that(host: Host, language: str) -> None:
    parent, endless = {
        "shell": ("echo $PPID", "while :; do :; done"),
        "javascript": ("console.log(process.ppid)", "for (;;);"),
    }[language]
    porter = int((await host.run(parent, language=language)).stdout)
    os.kill(porter, signal.SIGINT)
    # It has taken the signal, and waits for what comes next.
    await wait_until(lambda: Path(f"/proc/{porter}/stat").read_text().rpartition(")")[2].split()[0] == "S")
    async with host.open_run(endless, language=language) as run:
        with trio.move_on_after(10):
            assert (await run.finish()).exit_code == 130
            return
    pytest.fail("it runs on")


@needs_node
async def test_an_interrupt_when_code_begins_to_wait_keeps_the_state(host: Host) -> None:
    for number in range(40):
        async with host.open_run("console.log('go'); await new Promise(() => {})", language="javascript") as run:
            await run.until(b"go\n")
            await trio.sleep(number * 5e-5)
            await run.interrupt()
            result = await run.finish()
        assert (result.exit_code, result.state_kept) == (130, True)


@pytest.mark.parametrize("language", LANGUAGES)
async def test_what_is_sent_to_an_interpreter_has_no_name_to_be_read_by(host: Host, language: str) -> None:
    code = {
        "shell": "exec 9</proc/$$/fd/10",
        "javascript": "require('fs').openSync('/proc/self/fd/3')",
    }
    result = await host.run(code[language], language=language)
    assert os.strerror(errno.ENXIO).lower() in result.stderr.lower()


@pytest.mark.parametrize("language", LANGUAGES)
async def test_an_interrupt_at_any_instant_hits_its_own_run_or_nothing(host: Host, language: str) -> None:
    code = {
        "shell": "echo a; for i in {1..%d}; do :; done; echo b",
        "javascript": "console.log('a'); for (let i = 0; i < %d * 10; i++);",
    }
    for number in range(20):
        async with host.open_run(code[language] % (number * 4 + 1), language=language) as run:
            if number % 2:
                await run.until(b"a\n")
            await run.interrupt()
            result = await run.finish()
        assert result.exit_code in (0, 130)
        # Node gives SIGINT back to its handlers after each script: in that instant it would end the process.
        assert result.state_kept or language == "javascript"
        result = await host.run(
            {"shell": "echo $((6 * 7))", "javascript": "console.log(6 * 7)"}[language], language=language
        )
        assert (result.stdout, result.exit_code) == ("42\n", 0)


@pytest.mark.parametrize("language", LANGUAGES)
async def test_code_that_ignores_an_interrupt_can_be_killed(host: Host, language: str) -> None:
    code = {
        "shell": "trap '' INT; echo go; while :; do :; done",
        "javascript": "await null; console.log('go'); for (;;) {}",  # Node interrupts what runs before an await only
    }[language]
    async with host.open_run(code, language=language) as run:
        await run.until(b"go\n")
        await run.interrupt()
        await run.kill()
        assert await run.finish() == Ran("go\n", "", 137, restarted=False, state_kept=False)
    assert (
        await host.run({"shell": "echo 1", "javascript": "console.log(1)"}[language], language=language)
    ).stdout == "1\n"


@pytest.mark.parametrize("language", LANGUAGES)
async def test_input_environment_and_directory(host: Host, language: str, tmp_path: Path) -> None:
    read = {
        "shell": 'read line; echo "1: $line"; cat',
        "javascript": "let text = ''; for await (const chunk of process.stdin) text += chunk; process.stdout.write(text.replace('one', '1: one')); 0",
    }[language]
    for rest in ("two\n", "three\n"):
        pipe = host.open_pipe()
        async with host.open_run(read, language=language, stdin=pipe.id) as run:
            await pipe.send_all(b"one\n" + rest.encode())
            await pipe.send_eof()
            assert (await run.finish()).stdout == f"1: one\n{rest}"
        pipe.close()
    show = {"shell": 'echo "$GREETING|$PWD"', "javascript": "console.log(`${process.env.GREETING}|${process.cwd()}`)"}[
        language
    ]
    greeting = 'it\'s\n"ü" \\ $HOME !'
    (directory := tmp_path / "it's a 'dir' $x").mkdir()
    expected, before = ran(f"{greeting}|{directory}\n"), await host.run(show, language=language)
    assert before != expected
    # Both are the run's only, whatever it does to them.
    change = {"shell": "cd /; GREETING=other", "javascript": "process.chdir('/'); process.env.GREETING = 'other'; 0"}[
        language
    ]
    for after in ("", change):
        assert await host.run(
            f"{show}\n{after}", language=language, env={"GREETING": greeting}, cwd=str(directory)
        ) == (attrs.evolve(expected, value="0") if after and language == "javascript" else expected)
        assert await host.run(show, language=language) == before
    async with host.open_run(show, language=language, cwd=str(tmp_path / "none"), env={"GREETING": "x"}) as run:
        assert await run.failure() == {
            "errno": errno.ENOENT,
            "strerror": os.strerror(errno.ENOENT),
            "filename": str(tmp_path / "none"),
        }
    for name in ("", "a=b"):
        async with host.open_run(show, language=language, env={name: "x"}) as run:
            assert (await run.failure())["errno"] == errno.EINVAL
    assert await host.run(show, language=language) == before
    # What was there before is there again.
    set_up, show_all = {
        "shell": (
            f"cd {tmp_path}; cd /; GREETING=$'a\\n'\"'b\"; declare -xi NUMBER=3",
            "declare -p GREETING NUMBER OLDPWD PWD",
        ),
        "javascript": (
            "process.chdir('/'); process.env.GREETING = 'a\\n\\'b'; process.env.NUMBER = 3",
            "console.log(process.env.GREETING, process.env.NUMBER, process.cwd())",
        ),
    }[language]
    await host.run(set_up, language=language)
    before = await host.run(show_all, language=language)
    await host.run("", language=language, env={"GREETING": "x", "NUMBER": "4"}, cwd=str(directory))
    assert await host.run(show_all, language=language) == before
    # Also after a run that was stopped, and one that failed.
    await host.run(
        {"shell": "set -u; $nope", "javascript": "null.x"}[language],
        language=language,
        env={"GREETING": "x"},
        cwd="/tmp",
    )
    async with host.open_run(
        {"shell": "echo a; while :; do :; done", "javascript": "console.log('a'); while (true);"}[language],
        language=language,
        env={"NUMBER": "5"},
        cwd=str(directory),
    ) as run:
        await run.until(b"a\n")
        await run.interrupt()
        assert (await run.finish()).state_kept
    assert await host.run(show_all, language=language) == before


@pytest.mark.parametrize("language", LANGUAGES)
async def test_code_and_output_of_several_megabytes(host: Host, language: str) -> None:
    text = "e" * 1_000_000
    code = {
        "shell": f"text='{text}'; echo ${{#text}}",
        "javascript": f"const text = '{text}'; console.log(text.length)",
    }
    assert await host.run(code[language], language=language) == ran("1000000\n")
    code = {
        "shell": 'for i in {1..4}; do echo "$text"; done',
        "javascript": "for (let i = 0; i < 4; i++) console.log(text)",
    }
    assert (await host.run(code[language], language=language)).stdout == f"{text}\n" * 4


@pytest.mark.parametrize("language", LANGUAGES)
async def test_what_is_left_in_the_background_lives_on_and_has_no_say_in_later_runs(
    host: Host, language: str, tmp_path: Path
) -> None:
    go, done = tmp_path / "go", tmp_path / "done"
    os.mkfifo(go)
    child = f"read x <{go}; seq 100000; echo $? >{done}"
    code = {
        "shell": f"{{ {child}; }} & echo run",
        "javascript": f"child = require('child_process').spawn('sh', ['-c', {child!r}], {{stdio: 'inherit'}}); console.log('run')",
    }[language]
    assert (await host.run(code, language=language)).stdout == "run\n"
    code = {
        "shell": f"echo >{go}; wait; echo after",
        "javascript": f"const ended = new Promise((done) => child.on('exit', done)); require('fs').writeFileSync({str(go)!r}, '\\n'); await ended; console.log('after')",
    }[language]
    assert (await host.run(code, language=language)).stdout == "after\n"
    assert done.read_text() == "0\n"


@needs_node
async def test_what_javascript_leaves_waiting_goes_on_between_runs(host: Host) -> None:
    code = """
        const net = require('net')
        server = net.createServer((socket) => socket.end('hello')).listen(0, '127.0.0.1', () => {})
        await new Promise((done) => server.on('listening', done))
        console.log(server.address().port)
    """
    port = int((await host.run(code, language="javascript")).stdout)
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        assert await stream.receive_some() == b"hello"
    assert (await host.run("server.close(); console.log('closed')", language="javascript")).stdout == "closed\n"


@needs_imports
async def test_modules_of_the_directory_that_a_run_is_in(host: Host, tmp_path: Path) -> None:
    for name, text in (("old", "exports.name = 'old'"), ("new", "")):
        (tmp_path / "node_modules" / name).mkdir(parents=True)
        (tmp_path / "node_modules" / name / "index.js").write_text(text)
    package = tmp_path / "node_modules" / "new"
    (package / "package.json").write_text('{"type": "module", "exports": "./index.js"}')
    (package / "index.js").write_text("export const name = 'new'; export default 7")
    (tmp_path / "mine.mjs").write_text("export const name = 'mine'")
    code = """
        import seven, { name } from 'new'
        import { name as old } from 'old'
        import * as mine from './mine.mjs'
        console.log(seven, name, old, mine.name, require('old').name, (await import('./mine.mjs')).name)
    """
    assert await host.run(code, language="javascript", cwd=str(tmp_path)) == ran("7 new old mine old mine\n")
    result = await host.run("import nothing from 'nothing'", language="javascript")
    assert result.exit_code == 1
    assert "Cannot find package 'nothing'" in result.stderr


@needs_node
async def test_typescript_is_refused_with_the_way_out(host: Host) -> None:
    for code in (
        "let x: number = 1",
        "const f = (x: number, y?: string) => x",
        "function f(a): string { return a }",
        "function f<T>(a: T) {}",
        "interface Point {\n  x: number\n}",
        "1\nenum Color { Red }",
        "const enum Color { Red }",
        "namespace A { export const b = 1 }",
        "type Name = string | number",
        "import type { Stats } from 'fs'",
        "class Point {\n  x: number\n}",
        "class Point { private x = 1 }",
        "class Point implements Shape {}",
        "let a = 1 as number",
        "let b = {} satisfies object",
    ):
        result = await host.run(code, language="javascript")
        assert result.exit_code == 1, code
        assert "SyntaxError: " in result.stderr, code
        assert "If this is TypeScript: Node.js " in result.stderr, code
        assert "Compile it first (tsc, esbuild), and run the JavaScript.\n" in result.stderr, code
    for code in ("let a = )", "let b = {c: 1, d: }", "for (const e f) {}", "null.f"):
        assert "TypeScript" not in (await host.run(code, language="javascript")).stderr, code


@pytest.mark.parametrize("language", LANGUAGES)
async def test_a_forged_end_spoils_nothing_but_the_forger(host: Host, language: str) -> None:
    # Whatever it writes to where its interpreter answers: a token of another run means nothing.
    code = {
        "shell": 'for i in 1 2 3; do echo "D $i 7" >/proc/$PPID/fd/8; echo R >/proc/$PPID/fd/8; done; echo x >/proc/$PPID/fd/8; echo mine',
        "javascript": "require('fs').writeFileSync(`/proc/${process.ppid}/fd/8`, 'D 1 7\\nR\\nS x\\nF 1 2\\nrubbish\\n'); console.log('mine')",
    }[language]
    assert await host.run(code, language=language) == ran("mine\n")
    assert (await host.run({"shell": "echo 1", "javascript": "console.log(1)"}[language], language=language)) == ran(
        "1\n"
    )


#: Prints which of the two the process argv[1] has in memory. This text is there as well, with the second of them in pieces only.
SEARCH = """
import re, sys
mine, theirs = "own text", "secret" + " 4e1f"
found = set()
with open(f"/proc/{sys.argv[1]}/maps") as maps, open(f"/proc/{sys.argv[1]}/mem", "rb", buffering=0) as memory:
    for start, end in re.findall(r"^(\\w+)-(\\w+) rw", maps.read(), re.MULTILINE):
        memory.seek(int(start, 16))
        data = memory.read(int(end, 16) - int(start, 16))
        found |= {name for name in (mine, theirs) if name.encode() in data}
print(*sorted(found), sep=", ")
"""


@needs_bash
async def test_an_interpreters_parent_has_seen_no_process(host: Host) -> None:
    secret = "secret" + " 4e1f"
    for many in (secret, secret * 9_000):
        env = {"SECRET": many, "PATH": os.environ["PATH"]}
        assert await host.run_process(["true", many], env=env, cwd="/tmp") == (0, b"")
    for argv, cwd in ([f"no {secret}"], "/"), ([f"/no {secret}"], "/"), (["true"], f"/no {secret}"):
        async with host.open_process(argv, cwd=cwd, stdout=True) as process:
            failed = (await process.message())["failed"]
            assert failed["filename"] == (argv[0] if cwd == "/" else cwd)
    # The interpreter, and with it its parent, is started now.
    code = f"{sys.executable} -c '{SEARCH}' $PPID"
    assert await host.run(code, language="shell") == ran("own text\n")


@pytest.mark.parametrize(("language", "program"), [("shell", "bash"), ("javascript", "node")])
async def test_an_image_without_the_interpreter(
    language: str, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    async with open_agent() as host:
        async with host.open_run("1", language=language) as run:
            assert await run.failure() == {
                "errno": errno.ENOENT,
                "strerror": f"this image can't run {language}: {os.strerror(errno.ENOENT)}",
                "filename": program,
            }
