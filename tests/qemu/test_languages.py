"""JavaScript and shell in a real guest: what their workers meet there, and what two clones share."""

from __future__ import annotations

import errno
import json

import pytest
import trio

from trio_sandbox import HostConfig, OutputChunk, RunRefusedError, Sandbox, SandboxConfig, Timeouts, open_host

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("node_image", "system_disk")]

#: What machines that go on from one state must not share.
_RANDOM = """
    const crypto = require('crypto')
    const array = globalThis.crypto.getRandomValues(new Uint32Array(2))
    JSON.stringify([
        Math.random(), crypto.randomUUID(), globalThis.crypto.randomUUID(), crypto.randomBytes(8).toString('hex'),
        crypto.randomInt(2 ** 40), crypto.randomFillSync(Buffer.alloc(8)).toString('hex'), array.join(),
        await new Promise((done) => crypto.randomBytes(8, (error, bytes) => done(bytes.toString('hex')))),
        await new Promise((done) => crypto.randomInt(2 ** 40, (error, number) => done(number))),
        crypto.generateKeyPairSync('ed25519').privateKey.export({type: 'pkcs8', format: 'der'}).toString('hex'),
        crypto.createECDH('prime256v1').generateKeys('hex'),
        (await globalThis.crypto.subtle.exportKey('jwk', await globalThis.crypto.subtle.generateKey({name: 'AES-GCM', length: 128}, true, ['encrypt']))).k,
        await new Promise((done) => new (require('worker_threads').Worker)(
            "require('worker_threads').parentPort.postMessage([Math.random(), crypto.randomUUID()].join())", {eval: true},
        ).on('message', done)),
    ])
"""


#: Tell the process id of the interpreter's parent, and wait. The code is in that parent's memory.
_WAITS = {
    "javascript": "console.log(process.ppid); await new Promise((done) => setTimeout(done, 1e6, 'own text'))",
    "shell": "echo $PPID; sleep 1000 # own text",
}
#: Say which of two texts the process $1 has in memory.
_SEARCH = r"""
while read -r range mode _; do
    start=$((0x${range%-*})) end=$((0x${range#*-}))
    [[ $mode != rw* ]] || dd if=/proc/$1/mem bs=4096 skip=$((start / 4096)) count=$(((end - start) / 4096)) 2>/dev/null
done </proc/$1/maps | grep -aoE 'own text|secret[ ]4e1f' | sort -u
"""

#: Files in the home directory that would be in the way of an interpreter, were they read.
_IN_THE_WAY = r"""
    mkdir -p node_modules/vm
    echo '{"type": "module"}' >package.json
    for name in fs.js vm.js node_modules/vm/index.js .noderc .node_repl_history; do echo 'process.exit(9)' >$name; done
    for name in .bashrc .bash_profile .profile .bash_login; do echo 'exit 9' >$name; done
    echo 'set editing-mode vi' >.inputrc
"""


async def test_javascript_and_shell_in_the_image_node() -> None:
    # What was drawn before is drawn ahead: Node keeps some of it, and OpenSSL has a generator for each thread.
    config = SandboxConfig(warmup=f"warm = Math.random(); {_RANDOM}")
    # Of a busy machine's guest an interrupt may take a while.
    async with open_host(HostConfig(timeouts=Timeouts(interrupt_grace=30))) as host:
        async with host.open_sandbox("node", config) as sandbox:
            assert sandbox.language == "javascript"
            drawn = await sandbox.run(_RANDOM)
            warm = await sandbox.run("warm")
            await _check_javascript(sandbox)
            await _check_shell(sandbox)
            # Neither they nor their parents need a Python of the image's, or read anything of the user's when they start.
            await sandbox.run_process("rm /usr/bin/python3*", shell=True, user="root")
            await sandbox.run_process(_IN_THE_WAY, shell=True)
            await _check_parents(sandbox)
            assert (await sandbox.run("require('vm').isContext({})")).value == "false"
            with pytest.raises(RunRefusedError, match=r"Images that have it: node, python$") as caught:
                await sandbox.run("print(1)", language="python")
            assert caught.value.errno == errno.ENOENT
            with pytest.raises(RunRefusedError, match="no language 'typescript'"):
                await sandbox.run("1", language="typescript")
        async with host.open_sandbox("node", config) as sandbox:
            assert (await sandbox.run("warm")).value == warm.value, "the warm-up ran once"
            draws = [drawn]
            async with sandbox.fork(2) as children:
                draws.extend([await machine.run(_RANDOM) for machine in (sandbox, *children)])
    # As JavaScript writes the text of some JSON.
    columns = list(zip(*(json.loads((draw.value or "")[1:-1]) for draw in draws), strict=True))
    assert len(columns) == 13
    for column in columns:
        assert len(set(column)) == len(draws)


async def _check_parents(sandbox: Sandbox) -> None:
    await sandbox.run_process(["true", "secret 4e1f"], env={"SECRET": "secret 4e1f"}, user="root", check=True)
    for language, end in (("javascript", "process.exit()"), ("shell", "exit")):
        assert not (await sandbox.run(end, language=language)).state_kept
        async with sandbox.stream(_WAITS[language], language=language) as events:
            started = await anext(events)
            assert isinstance(started, OutputChunk)
            search = ["bash", "-c", _SEARCH, "bash", started.data.decode().strip()]
            found = await sandbox.run_process(search, user="root", capture_stdout=True, check=True)
            assert found.stdout == b"own text\n", language
            # Users have no way there at all.
            refused = await sandbox.run_process(search, capture_stdout=True, check=False)
            assert refused.stdout == b"", language


async def _check_javascript(sandbox: Sandbox) -> None:
    result = await sandbox.run(
        "import { basename } from 'node:path'\nconst { uptime } = await import('os')\n"
        "console.log(process.getuid(), typeof uptime(), require('path') !== undefined)\nbasename('/a/b')"
    )
    assert (result.stdout, result.stderr, result.value) == ("1000 number true\n", "", "'b'")
    result = await sandbox.run("require('fs').writeFileSync('/dev/stderr', 'by name'); null.x")
    assert result.exit_code == 1
    assert result.stderr.startswith("by nameTypeError: Cannot read properties of null")
    assert (await sandbox.run("basename('/c/d')")).value == "'d'"
    with trio.move_on_after(1) as scope:
        await sandbox.run("kept = 1; while (true);")
    assert scope.cancelled_caught
    assert (await sandbox.run("kept")).value == "1"
    # The port of a server that a run left behind is there for tunnels.
    code = "server = require('http').createServer((_, answer) => answer.end('hello')).listen(8080, '127.0.0.1'); 0"
    await sandbox.run(code)
    await sandbox.wait_port(8080)
    async with await sandbox.open_tcp_stream(8080) as stream:
        await stream.send_all(b"GET / HTTP/1.0\r\n\r\n")
        answer = b""
        async for data in stream:
            answer += data
    assert answer.endswith(b"hello")


async def _check_shell(sandbox: Sandbox) -> None:
    result = await sandbox.run("x=1; cd /tmp; id -u; echo err >/dev/stderr; false", language="shell")
    assert (result.stdout, result.stderr, result.exit_code) == ("1000\n", "err\n", 1)
    # The kernel ends the child that takes all memory, and the shell goes on.
    result = await sandbox.run("dd if=/dev/zero of=/dev/null bs=200M; echo $? $x $PWD", language="shell")
    assert result.stdout == "137 1 /tmp\n"
    assert (await sandbox.run("kept")).value == "1", "the other interpreter has its state"
