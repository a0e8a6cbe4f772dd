"""The services "process" and "pipe": processes of the spawner, seen through the agent."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from trio_sandbox.guest.agent import pipes
from trio_sandbox.wire import StreamResetError

from ._agent import Host, open_agent, read_all, send_for_ever
from ._sandbox import comes_late, open_local_sandbox


@pytest.fixture
async def host() -> AsyncGenerator[Host]:
    async with open_agent() as host:
        yield host


async def wait_gone(pid: int) -> None:
    """Wait until a process, which need not be our child, has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await trio.lowlevel.wait_readable(descriptor)
    finally:
        trio.lowlevel.notify_closing(descriptor)
        os.close(descriptor)


async def test_output_status_and_pid(host: Host) -> None:
    async with host.open_process(["sh", "-c", "echo $$; exit 3"], stdout=True) as process:
        pid = await process.started()
        assert await read_all(process.stdout) == b"%d\n" % pid
        assert await process.exited() == 3


async def test_status_of_a_process_that_a_signal_ended(host: Host) -> None:
    assert await host.run_process(["sh", "-c", "kill -SEGV $$"]) == (-signal.SIGSEGV, b"")


async def test_environment_directory_and_arguments(host: Host, tmp_path: Path) -> None:
    arguments = ["a b", "", "é", "*", "\udcff"]
    script = "printf '<%s>' \"$@\"; pwd; env | grep -v -e PWD -e _="
    status, output = await host.run_process(
        ["/bin/sh", "-c", script, "sh", *arguments], env={"NAME": "välue=1", "PATH": "/usr/bin:/bin"}, cwd=str(tmp_path)
    )
    assert status == 0
    first, *rest = output.split(b"\n")
    assert first == b"<a b><><\xc3\xa9><*><\xff>" + os.fsencode(tmp_path)
    assert sorted(rest) == sorted([b"NAME=v\xc3\xa4lue=1", b"PATH=/usr/bin:/bin", b""])


async def test_nothing_is_inherited_but_the_three_streams(host: Host) -> None:
    status, output = await host.run_process(
        ["sh", "-c", "ls -l /proc/self/fd; cut -d' ' -f6-8 /proc/self/stat; grep -E 'Sig(Blk|Ign)' /proc/self/status"]
    )
    lines = output.decode().splitlines()
    assert status == 0
    assert sorted(line.split()[8] for line in lines[1:5]) == ["0", "1", "2", "3"]  # the last is ls's own
    assert lines[1].endswith("/dev/null")
    session, terminal, _ = lines[5].split()
    assert session != str(os.getsid(0))
    assert terminal == "0"
    assert [int(line.split()[1], 16) for line in lines[6:8]] == [0, 0]


async def test_streams_that_are_not_asked_for_are_null(host: Host) -> None:
    async with host.open_process(["sh", "-c", "cat && echo out && echo err >&2"]) as process:
        await process.started()
        assert await process.exited() == 0
    # Merged into nothing.
    async with host.open_process(["sh", "-c", "echo err >&2"], stderr="stdout") as process:
        await process.started()
        assert await process.exited() == 0


async def test_input_is_passed_on_and_ends(host: Host) -> None:
    data = os.urandom(1_000_000)
    async with host.open_process(["cat"], stdin=True, stdout=True) as process, trio.open_nursery() as nursery:
        assert process.stdin is not None
        await process.started()

        async def feed(stream: trio.abc.HalfCloseableStream) -> None:
            await stream.send_all(data)
            await stream.send_eof()

        nursery.start_soon(feed, process.stdin)
        assert await read_all(process.stdout) == data
        assert await process.exited() == 0


async def test_input_that_nobody_reads_is_given_up(host: Host) -> None:
    async with host.open_process(["sh", "-c", "exec 0<&-; echo ready; sleep 1000"], stdin=True, stdout=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        await process.started()
        assert await process.stdout.receive_some() == b"ready\n"
        with pytest.raises(StreamResetError, match="nobody reads"):
            await send_for_ever(process.stdin)


async def test_standard_error_of_its_own(host: Host) -> None:
    async with host.open_process(["sh", "-c", "echo out; echo err >&2"], stdout=True, stderr=True) as process:
        await process.started()
        assert await read_all(process.stdout) == b"out\n"
        assert await read_all(process.stderr) == b"err\n"
        assert await process.exited() == 0


async def test_a_reader_that_stalls_stops_its_process_and_nobody_else(host: Host) -> None:
    async with host.open_process(
        ["sh", "-c", "yes | head -c 30000000; echo done >&2"], stdout=True, stderr=True
    ) as stalled:
        await stalled.started()
        assert stalled.stdout is not None
        size = len(await stalled.stdout.receive_some())
        for _ in range(3):
            assert await host.run_process(["seq", "3"]) == (0, b"1\n2\n3\n")
        assert host.channel.statistics().bytes_received < 2_000_000
        assert size + len(await read_all(stalled.stdout)) == 30_000_000
        assert await read_all(stalled.stderr) == b"done\n"
        assert await stalled.exited() == 0


async def test_output_that_the_host_gives_up_is_a_broken_pipe(host: Host) -> None:
    async with host.open_process(["sh", "-c", "trap '' PIPE; yes; echo $?"], stdout=True) as process:
        assert process.stdout is not None
        await process.started()
        await process.stdout.receive_some()
        process.stdout.close()
        assert await process.exited() == 1  # echo fails as well


async def test_the_end_of_a_process_does_not_wait_for_its_output_to_be_read(host: Host) -> None:
    async with host.open_process(["sh", "-c", "sleep 1000 & echo out"], stdout=True) as process:
        await process.started()
        assert await process.exited() == 0
        assert process.stdout is not None
        assert await process.stdout.receive_some() == b"out\n"


async def test_signals(host: Host) -> None:
    async with host.open_process(
        ["sh", "-c", "trap 'echo usr; exit 4' USR1; echo ready; while :; do read x; done"], stdin=True, stdout=True
    ) as process:
        assert process.stdout is not None
        await process.started()
        assert await process.stdout.receive_some() == b"ready\n"
        await process.records.send_json({"signal": int(signal.SIGUSR1)})
        assert await process.exited() == 4
    # One that comes before the process knows what it is going to be.
    async with host.open_process(["sleep", "1000"]) as process:
        await process.records.send_json({"signal": int(signal.SIGINT)})
        await process.started()
        assert await process.exited() == -signal.SIGINT


async def test_kill_reaches_the_descendants_and_is_acknowledged(host: Host) -> None:
    async with host.open_process(["sh", "-c", "sleep 1000 & echo $!; trap '' TERM INT; wait"], stdout=True) as process:
        await process.started()
        assert process.stdout is not None
        child = int(await process.stdout.receive_some())
        await process.records.send_json({"kill": True})
        assert await process.exited() == -signal.SIGKILL
        await wait_gone(child)


_TRACED = (
    "import ctypes, time\nctypes.CDLL(None).prctl(0x59616D61, -1)\nprint('go', end='', flush=True)\ntime.sleep(1000)"
)
_TRACER = """
import ctypes, sys, time
ptrace = ctypes.CDLL(None).ptrace
ptrace.argtypes = ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p
print(ptrace({request}, int(sys.argv[1]), None, {options}), end='', flush=True)
time.sleep(1000)
"""


# PTRACE_ATTACH, and PTRACE_SEIZE with PTRACE_O_TRACEEXIT, by which it stops once more before it ends.
@pytest.mark.parametrize(("request_", "options"), [(16, 0), (0x4206, 0x40)])
async def test_a_tracer_can_not_keep_what_was_killed(host: Host, request_: int, options: int) -> None:
    tracer = _TRACER.format(request=request_, options=options)
    async with host.open_process([sys.executable, "-c", _TRACED], stdout=True) as traced:
        pid = await traced.started()
        assert traced.stdout is not None
        assert await traced.stdout.receive_some() == b"go"
        async with host.open_process([sys.executable, "-c", tracer, str(pid)], stdout=True) as other:
            await other.started()
            assert other.stdout is not None
            if await other.stdout.receive_some() != b"0":
                pytest.skip("nobody may trace here")
            await traced.records.send_json({"kill": True})
            assert await traced.exited() == -signal.SIGKILL
            assert await other.exited() == -signal.SIGKILL


@pytest.mark.parametrize("give_up", ["close", "reset"])
async def test_a_host_that_ends_the_stream_ends_the_process(host: Host, give_up: str) -> None:
    async with host.open_process(["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=True) as process:
        pid = await process.started()
        assert process.stdout is not None
        child = int(await process.stdout.receive_some())
        if give_up == "close":
            await process.records.send_eof()
        else:
            process.records.stream.reset("enough")
        for gone in (pid, child):
            await wait_gone(gone)


async def test_what_is_left_in_the_background_goes_with_the_stream(host: Host) -> None:
    async with host.open_process(["sh", "-c", "sleep 1000 & echo $!"], stdout=True) as process:
        await process.started()
        assert process.stdout is not None
        child = int(await process.stdout.receive_some())
        assert await process.exited() == 0
        os.kill(child, 0)
    await wait_gone(child)


@pytest.mark.parametrize(
    ("argv", "request_", "expected"),
    [
        (["no-such-program"], {}, (errno.ENOENT, "no-such-program")),
        (["/no/such"], {}, (errno.ENOENT, "/no/such")),
        (["/dev/null"], {}, (errno.EACCES, "/dev/null")),
        (["true"], {"cwd": "/no/such"}, (errno.ENOENT, "/no/such")),
        (["true"], {"cwd": "/dev/null"}, (errno.ENOTDIR, "/dev/null")),
        (["true"], {"env": {"PATH": "/nowhere"}}, (errno.ENOENT, "true")),
        (["true"], {"env": {"A=B": "x"}}, (errno.EINVAL, "true")),
        (["true", "a\0b"], {}, (errno.EINVAL, "true")),
        (["true", "x" * 200_000], {}, (errno.E2BIG, "true")),
        (["true"], {"user": "nobody"}, (errno.EPERM, "nobody")),
    ],
)
async def test_processes_that_can_not_start(
    host: Host, argv: list[str], request_: dict[str, object], expected: tuple[int, str]
) -> None:
    async with host.open_process(argv, stdin=True, stdout=True, stderr=True, **request_) as process:
        failed = (await process.message())["failed"]
        assert (failed["errno"], failed["filename"]) == expected
        assert failed["strerror"]
        assert await process.records.receive() is None
        # Nobody will ever write these.
        assert await read_all(process.stdout) == await read_all(process.stderr) == b""
    assert await host.run_process(["echo", "on"]) == (0, b"on\n")


async def test_a_file_that_is_no_program(host: Host, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("echo hi\n")
    script.chmod(0o755)
    async with host.open_process([str(script)]) as process:
        assert (await process.message())["failed"]["errno"] == errno.ENOEXEC


async def test_the_path_is_searched_past_what_can_not_be_run(host: Host, tmp_path: Path) -> None:
    (tmp_path / "true").write_text("")
    status, _ = await host.run_process(["true"], env={"PATH": f"{tmp_path}:/no/such:/usr/bin:/bin"})
    assert status == 0
    async with host.open_process(["true"], env={"PATH": str(tmp_path)}) as process:
        assert (await process.message())["failed"]["errno"] == errno.EACCES


async def test_large_environments_arrive(host: Host) -> None:
    env = {f"V{number}": "x" * 1000 for number in range(300)} | {"PATH": "/usr/bin:/bin"}
    status, output = await host.run_process(["env"], env=env)
    assert status == 0
    assert output.count(b"x" * 1000) == 300


async def test_many_at_once(host: Host) -> None:
    outputs: dict[int, bytes] = {}

    async def one(number: int) -> None:
        status, outputs[number] = await host.run_process(["sh", "-c", f"seq {number}; exit {number}"])
        assert status == number

    async with trio.open_nursery() as nursery:
        for number in range(40):
            nursery.start_soon(one, number)
    assert {number: len(output.split()) for number, output in outputs.items()} == {n: n for n in range(40)}


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        ({"argv": []}, "argv must be a list"),
        ({"argv": "true"}, "argv must be a list"),
        ({"argv": ["true", 5]}, "an argument must be a string"),
        ({"env": {"A": None}}, "the variable 'A' must be a string"),
        ({"stdin": "here"}, "stdin must be a stream's id"),
        ({"stderr": 1.5}, "stderr must be a stream's id"),
        ({"user": 1.5}, "user must be a string"),
        ({"stdin": 12345}, "no pipe with the stream id 12345"),
    ],
)
async def test_a_request_that_no_host_makes_is_reset(
    host: Host, request_: dict[str, object], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipes, "_PATIENCE", 0)
    async with host.open_process(["true"], **request_) as process:
        with pytest.raises(StreamResetError, match=complaint):
            await process.records.receive()


@pytest.mark.parametrize("message", [{"signal": 0}, {"signal": 65}, {"signal": "KILL"}, {"dance": True}])
async def test_a_message_that_no_host_sends_ends_the_process(host: Host, message: dict[str, object]) -> None:
    async with host.open_process(["sleep", "1000"]) as process:
        pid = await process.started()
        await process.records.send_json(message)
        with pytest.raises(StreamResetError, match="not a request to a running process"):
            await process.records.receive()
        await wait_gone(pid)


@pytest.mark.parametrize("size", [[0, 80], [24, 65536], [-1, 80]])
async def test_a_size_that_no_terminal_has_ends_the_process_alone(host: Host, size: list[int]) -> None:
    stdio = host.open_pipe()
    terminal = {"stdio": stdio.id, "rows": 24, "columns": 80, "term": "dumb"}
    async with host.open_process(["sleep", "1000"], terminal=terminal) as process:
        pid = await process.started()
        await process.records.send_json({"resize": size})
        with pytest.raises(StreamResetError, match="a terminal has from 1 to 65535 rows and columns, not"):
            await process.records.receive()
        await wait_gone(pid)
    # Everything else goes on.
    assert await host.run_process(["echo", "on"]) == (0, b"on\n")


@pytest.mark.parametrize(
    ("deadline", "complaint"), [("now", "some seconds or null, not 'now'"), (-(10**400), "out of range")]
)
async def test_a_deadline_that_is_no_time_ends_the_process_alone(host: Host, deadline: object, complaint: str) -> None:
    async with host.open_process(["sleep", "1000"]) as process:
        pid = await process.started()
        await process.records.send_json({"deadline": deadline})
        with pytest.raises(StreamResetError, match=f"deadline .*{complaint}"):
            await process.records.receive()
        await wait_gone(pid)
    assert await host.run_process(["echo", "on"]) == (0, b"on\n")


async def test_a_pipe_serves_one_process(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    async with host.open_process(["cat"], stdin=True) as process:
        assert process.stdin is not None
        await process.started()
        monkeypatch.setattr(pipes, "_PATIENCE", 0)
        async with host.open_process(["cat"], stdin=process.stdin.id) as other:
            with pytest.raises(StreamResetError, match="no pipe"):
                await other.records.receive()


async def test_pipes_that_nobody_names_are_bounded(host: Host) -> None:
    streams = [host.open_pipe() for _ in range(300)]
    refused: list[StreamResetError] = []

    async def watch(stream: trio.abc.ReceiveStream) -> None:
        with pytest.raises(StreamResetError, match="more than 256 pipes") as info:
            await stream.receive_some()
        refused.append(info.value)
        if len(refused) == 300 - 256:
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(watch, stream)
    for stream in streams:
        stream.close()
    async with host.open_process(["true"]) as process:  # by its end the agent has seen those of the streams
        await process.started()
        await process.exited()
    assert await host.run_process(["echo", "hi"]) == (0, b"hi\n")


async def test_a_process_whose_start_was_cancelled_is_over(tmp_path: Path) -> None:
    """Or it could begin after the caller has gone on, and do what nobody wants any more."""
    late: list[str] = []
    async with open_local_sandbox() as (sandbox, _):
        for number in range(60):
            path = tmp_path / f"file{number}"
            touch = partial(sandbox.run_process, ["touch", str(path)])
            if await comes_late(0.0004 * (number % 20), touch, path.exists):
                late.append(path.name)
    assert not late


async def test_input_that_is_none_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    wrong: list[Any] = ["text", 5, None, [1], memoryview(b"abcd")[::2]]
    async with open_local_sandbox() as (sandbox, _):
        for stdin in wrong:
            with pytest.raises(TypeError, match="`stdin` must be bytes"):
                await sandbox.run_process(["touch", str(tmp_path / "started")], stdin=stdin)
    assert not (tmp_path / "started").exists()
