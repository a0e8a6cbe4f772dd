"""What JavaScript of runs finds is what Node.js has: standard streams, handlers of errors, stacks, its main module."""

from __future__ import annotations

import shutil
from collections.abc import AsyncGenerator

import pytest

from ._agent import Host, Ran, open_agent

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js here; tests/qemu has one")


@pytest.fixture
async def host() -> AsyncGenerator[Host]:
    async with open_agent() as host:
        yield host


async def run_with_input(host: Host, code: str, text: bytes) -> Ran:
    pipe = host.open_pipe()
    async with host.open_run(code, language="javascript", stdin=pipe.id) as run:
        await pipe.send_all(text)
        await pipe.send_eof()
        return await run.finish()


#: Each waits for something of a standard stream, and prints its input.
STREAMS = {
    "pipeline": "await require('stream/promises').pipeline(process.stdin, process.stdout)",
    "pipeline of text": "await require('stream/promises').pipeline(require('stream').Readable.from(['o', 'ne\\n']), process.stdout)",
    "pipe": "process.stdin.pipe(process.stdout); await new Promise((done) => process.stdin.on('end', done))",
    "end": "await new Promise((done) => process.stdout.end('one\\n', done))",
    "end in an encoding": "await new Promise((done) => process.stdout.end('b25lCg==', 'base64', done))",
    "end without a text": "await new Promise((done) => process.stdout.end(null, done)); console.log('one')",
    "finish": "const over = new Promise((done) => process.stdout.once('finish', done)); process.stdout.end('one\\n'); await over",
    "web stream": "const web = require('stream').Writable.toWeb(process.stdout).getWriter(); await web.write('one\\n'); await web.close()",
    "typed array": "process.stdout.write(new Uint16Array([0x6e6f, 0x0a65]))",
    "without a hold on the loop": "process.stdin.unref().ref(); for await (const part of process.stdin) process.stdout.write(part)",
}


@pytest.mark.parametrize("name", STREAMS)
async def test_what_waits_for_a_standard_stream_goes_on(host: Host, name: str) -> None:
    for _ in range(2):
        result = await run_with_input(host, f"{{ {STREAMS[name]} }}", b"one\n")
        assert (result.stdout, result.stderr, result.exit_code) == ("one\n", "", 0)


@pytest.mark.parametrize("chunk", ["5", "undefined", "null", "{}"])
async def test_what_is_neither_text_nor_bytes_is_not_written(host: Host, chunk: str) -> None:
    result = await host.run(f"process.stdout.write({chunk})", language="javascript")
    assert (result.stdout, result.exit_code, result.state_kept) == ("", 1, True)
    assert "ERR_STREAM_NULL_VALUES" in result.stderr if chunk == "null" else "ERR_INVALID_ARG_TYPE" in result.stderr
    assert (await host.run("console.log('next')", language="javascript")).stdout == "next\n"


#: What our part of the interpreter uses, or Node.js for us.
BROKEN = [
    "Buffer.from = null",
    "Buffer.concat = String.prototype.trimEnd = null",
    "String.prototype.replace = Array.prototype.map = null",
    "Array.prototype[Symbol.iterator] = null",
]


@pytest.mark.parametrize("broken", BROKEN)
async def test_code_that_breaks_what_the_interpreter_needs_holds_no_run_up(host: Host, broken: str) -> None:
    """A run then ends with 70, and the next one has a new interpreter, or all goes on."""
    before = await host.run(f"{broken}; 1", language="javascript")
    for code, status in (("let a = [1].concat(2); a.length", 0), ("throw new Error('x')", 1), ("await 5", 0)):
        result = await host.run(code, language="javascript")
        assert result.exit_code in (status, 70), (code, result)
        assert before.state_kept or result.restarted
        assert result.state_kept or "the code has broken its interpreter" in result.stderr
        before = result


WAIT = "await new Promise((done) => setTimeout(done, 20)); console.log('on')"


@pytest.mark.parametrize(
    "code",
    [
        "setTimeout(() => { throw new Error('no') }, 1)",
        "Promise.reject(new Error('no'))",
        "require('events').once(process, 'no such event', { signal: AbortSignal.abort(new Error('no')) })",
    ],
)
async def test_errors_in_the_background_are_for_the_handlers_that_code_has(host: Host, code: str) -> None:
    await host.run("process.on('uncaughtException', (error) => console.log('handled'))", language="javascript")
    result = await host.run(f"{code}; {WAIT}", language="javascript")
    assert (result.stdout, result.stderr, result.exit_code) == ("handled\non\n", "", 0)
    await host.run("process.on('unhandledRejection', () => console.log('rejected'))", language="javascript")
    result = await host.run(f"Promise.reject(new Error('no')); {WAIT}", language="javascript")
    assert (result.stdout, result.stderr, result.exit_code) == ("rejected\non\n", "", 0)
    result = await host.run("throw new Error('direct')", language="javascript")
    assert (result.stdout, result.stderr, result.exit_code) == ("", "Error: direct\n    at <run-5>:1:7\n", 1)


async def test_an_exit_while_code_waits_says_nothing(host: Host) -> None:
    code = "setTimeout(() => process.exit(6), 1); await new Promise(() => {})"
    result = await host.run(code, language="javascript")
    assert (result.stdout, result.stderr, result.exit_code, result.state_kept) == ("", "", 6, False)


async def test_stacks_end_where_the_code_does(host: Host) -> None:
    code = "function f() { try { null.x } catch (error) { console.log(error.stack) } }\nf()"
    expected = "TypeError: Cannot read properties of null (reading 'x')\n    at f (<run-1>:1:27)\n    at <run-1>:2:1\n"
    assert (await host.run(code, language="javascript")).stdout == expected
    assert (
        await host.run("console.trace('here')", language="javascript")
    ).stderr == "Trace: here\n    at <run-2>:1:9\n"
    result = await host.run("throw Object.assign(new Error('no'), { code: 'Z' })", language="javascript")
    assert result.stderr == "Error: no\n    at <run-3>:1:21 {\n  code: 'Z'\n}\n"
    code = "Error.prepareStackTrace = (error, sites) => sites.length; const own = new Error('no').stack; own"
    assert (await host.run(code, language="javascript")).value == "1"


async def test_code_is_the_main_module(host: Host) -> None:
    code = "if (require.main === module) console.log('main')\nexports.one = 1; module.exports"
    result = await host.run(code, language="javascript")
    assert (result.stdout, result.value) == ("main\n", "{ one: 1 }")
    await host.run("process.chdir('/'); const exports = 2", language="javascript")
    assert (await host.run("[require.main === module, exports]", language="javascript")).value == "[ true, 2 ]"
