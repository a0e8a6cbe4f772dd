"""The QMP channel against a scripted peer."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from trio_sandbox import QMPClosedError, QMPCommandError, QMPConnectError, QMPError, QMPProtocolError, Timeouts
from trio_sandbox.constants import QMP_EVENT_BUFFER, QMP_LINE_LIMIT
from trio_sandbox.qemu import QMPChannel, open_qmp

from .._leaks import cancel_at_every_step, open_fds
from ._qmp_peer import GREETING, Peer, open_pair, socket_pair


async def settled() -> None:
    """Let every task, and the data between the sockets, come to rest."""
    await trio.testing.wait_all_tasks_blocked(0.005)


class Call:
    """A call of `execute` in a task of its own, whose end can be looked at."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.value: object = None
        self.error: QMPError | None = None
        self.done = trio.Event()

    async def run(self, channel: QMPChannel, command: str, fds: tuple[int, ...] = ()) -> None:
        with self.scope:
            try:
                self.value = await channel.execute(command, fds=fds)
            except QMPError as exc:
                self.error = exc
        self.done.set()


# --- Connecting ---


async def test_greeting_and_negotiation() -> None:
    async with open_pair() as (channel, _):
        assert channel.greeting.version == (7, 2, 22)
        assert channel.greeting.package == "fake"
        assert "open" in repr(channel)
    assert "left" in repr(channel)


async def test_nobody_listens(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path, tmp_path / ("x" * 200)):
        with pytest.raises(QMPConnectError, match="can't connect to the QMP server at"):
            async with open_qmp(path):
                raise AssertionError("not reached")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "dead"))
    with pytest.raises(QMPConnectError, match="refused"):
        async with open_qmp(str(tmp_path / "dead")):
            raise AssertionError("not reached")


async def test_full_queue_of_the_listener_is_said(tmp_path: Path) -> None:
    path = str(tmp_path / "busy")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as other:
        listener.bind(path)
        listener.listen(0)
        other.connect(path)
        with pytest.raises(QMPConnectError, match="too many clients"):
            async with open_qmp(path):
                raise AssertionError("not reached")


async def test_path_by_a_real_listener(tmp_path: Path) -> None:
    path = tmp_path / "with space ü"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        async def serve() -> None:
            await trio.lowlevel.wait_readable(listener)
            peer = Peer(listener.accept()[0])
            await peer.negotiate()
            await peer.reply(await peer.expect("stop"), 7)
            assert await peer.receive() is None
            peer.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            async with open_qmp(path, expected_uid=os.geteuid()) as channel:
                assert await channel.execute("stop") == 7


async def test_peer_of_another_user_is_refused() -> None:
    sock, peer = socket_pair()
    with pytest.raises(QMPConnectError, match=rf"\(PID {os.getpid()}\) runs as user {os.geteuid()}, not as 4711"):
        async with open_qmp(sock, expected_uid=4711):
            raise AssertionError("not reached")
    assert sock.fileno() == -1
    assert await peer.receive() is None  # nothing was sent before the check
    peer.close()


@pytest.mark.parametrize("greet", [False, True])
async def test_silent_peer_times_out(greet: bool, autojump_clock: trio.testing.MockClock) -> None:
    sock, peer = socket_pair()
    if greet:
        await peer.send(GREETING)
    with pytest.raises(QMPConnectError, match="within 7 s") as caught:
        async with open_qmp(sock, timeouts=Timeouts(qmp_connect=7)):
            raise AssertionError("not reached")
    assert isinstance(caught.value.__cause__, trio.TooSlowError)
    assert sock.fileno() == -1
    peer.close()


async def test_peer_hangs_up_instead_of_greeting() -> None:
    sock, peer = socket_pair()
    peer.close()
    with pytest.raises(QMPConnectError, match="closed the connection"):
        async with open_qmp(sock):
            raise AssertionError("not reached")


async def test_garbage_instead_of_a_greeting() -> None:
    sock, peer = socket_pair()
    await peer.send_raw(b"SSH-2.0-OpenSSH\r\n")
    with pytest.raises(QMPProtocolError, match=r"SSH-2\.0"):
        async with open_qmp(sock):
            raise AssertionError("not reached")
    peer.close()


async def test_refused_negotiation() -> None:
    sock, peer = socket_pair()

    async def serve() -> None:
        await peer.send(GREETING)
        await peer.refuse(await peer.expect("qmp_capabilities"), "GenericError", "not you")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        with pytest.raises(QMPConnectError, match="not you"):
            async with open_qmp(sock):
                raise AssertionError("not reached")
    peer.close()


# --- Commands ---


async def test_replies_are_matched_by_id_in_any_order() -> None:
    async with open_pair() as (channel, peer), trio.open_nursery() as nursery:
        calls = [Call() for _ in range(5)]
        for index, call in enumerate(calls):
            nursery.start_soon(call.run, channel, f"c{index}")
        messages = [await peer.receive() for _ in calls]
        assert channel.statistics().commands_in_flight == 5
        for message in reversed(messages):
            assert message is not None
            await peer.reply(message, message["execute"])
        for call in calls:
            await call.done.wait()
        assert [call.value for call in calls] == ["c0", "c1", "c2", "c3", "c4"]
        assert channel.statistics().commands_in_flight == 0


async def test_error_reply_names_command_class_and_description() -> None:
    async with open_pair() as (channel, peer), trio.open_nursery() as nursery:
        call = Call()
        nursery.start_soon(call.run, channel, "balloon")
        await peer.refuse(await peer.expect("balloon"), "DeviceNotActive", "No balloon")
        await call.done.wait()
        assert isinstance(call.error, QMPCommandError)
        assert (call.error.command, call.error.error_class) == ("balloon", "DeviceNotActive")
        assert call.error.desc == "No balloon"


async def test_execute_is_a_checkpoint_and_wrong_arguments_send_nothing() -> None:
    async with open_pair() as (channel, peer), trio.open_nursery() as nursery:
        with pytest.raises(TypeError):
            await channel.execute("x", {"a": b""})
        with pytest.raises(ValueError, match="empty"):
            await channel.execute("")
        with pytest.raises(ValueError, match="may hold 16"):
            await channel.execute("x", fds=[0] * 17)
        with pytest.raises(OSError, match="Bad file descriptor"):
            await channel.execute("x", fds=[0, 2**30])
        nursery.start_soon(peer_answers, peer, 1)
        with trio.testing.assert_checkpoints():
            await channel.execute("right")


async def peer_answers(peer: Peer, count: int) -> None:
    for _ in range(count):
        message = await peer.receive()
        assert message is not None
        await peer.reply(message, message["execute"])


async def test_cancelled_before_the_hand_over_nothing_is_sent() -> None:
    async with open_pair() as (channel, peer), trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            scope.cancel()
            await channel.execute("never")
        assert scope.cancelled_caught
        nursery.start_soon(peer_answers, peer, 1)
        assert await channel.execute("next") == "next"
        assert channel.statistics().late_replies == 0


async def clog(channel: QMPChannel, nursery: trio.Nursery) -> Call:
    """Keep the writer busy with a command that the peer does not read."""
    call = Call()

    async def run() -> None:
        with call.scope:
            call.value = await channel.execute("big", {"x": "y" * 2**22})
        call.done.set()

    nursery.start_soon(run)
    await settled()
    return call


async def test_cancelled_while_the_writer_is_busy_nothing_is_sent() -> None:
    async with open_pair() as (channel, peer), trio.open_nursery() as nursery:
        await clog(channel, nursery)
        waiting, next_one = Call(), Call()
        nursery.start_soon(waiting.run, channel, "never")
        await settled()
        waiting.scope.cancel()
        await waiting.done.wait()
        nursery.start_soon(next_one.run, channel, "next")
        await peer_answers(peer, 2)
        await next_one.done.wait()
        assert next_one.value == "next"
        assert channel.statistics().late_replies == 0


async def test_cancelled_in_the_middle_of_sending_the_message_stays_whole() -> None:
    async with open_pair() as (channel, peer), trio.open_nursery() as nursery:
        big = await clog(channel, nursery)
        big.scope.cancel()
        await big.done.wait()
        next_one = Call()
        nursery.start_soon(next_one.run, channel, "next")
        await peer_answers(peer, 2)
        await next_one.done.wait()
        assert next_one.value == "next"
        assert channel.statistics().late_replies == 1


async def test_late_reply_is_eaten_and_counted() -> None:
    async with open_pair() as (channel, peer), trio.open_nursery() as nursery:
        call = Call()
        nursery.start_soon(call.run, channel, "slow")
        message = await peer.expect("slow")
        call.scope.cancel()
        await call.done.wait()
        assert channel.statistics().commands_in_flight == 1
        following = Call()
        nursery.start_soon(following.run, channel, "next")
        second = await peer.expect("next")
        assert second["id"] != message["id"]
        await peer.reply(message, "too late")
        await peer.reply(second, "in step")
        await following.done.wait()
        assert following.value == "in step"
        assert channel.statistics().late_replies == 1
        assert channel.statistics().commands_in_flight == 0


@pytest.mark.parametrize("step", range(6))
async def test_cancelled_at_any_step_the_channel_stays_in_step(step: int) -> None:
    """Cancel after so many steps of the scheduler, wherever the caller is then."""
    async with open_pair() as (channel, peer), trio.open_nursery() as nursery:
        served = trio.CancelScope()

        async def serve() -> None:
            with served:
                while True:
                    await peer_answers(peer, 1)

        nursery.start_soon(serve)
        call = Call()
        nursery.start_soon(call.run, channel, "first")
        for _ in range(step):
            await trio.lowlevel.checkpoint()
        call.scope.cancel()
        await call.done.wait()
        for index in range(3):
            assert await channel.execute(f"c{index}") == f"c{index}"
        assert channel.statistics().commands_in_flight == 0
        served.cancel()


# --- Descriptors ---


def receive_with_fds(peer: Peer) -> tuple[bytes, list[int]]:
    data, ancillary, flags, _ = peer.sock.recvmsg(65536, socket.CMSG_SPACE(4 * 32), socket.MSG_CMSG_CLOEXEC)
    assert not flags & socket.MSG_CTRUNC
    fds = array.array("i")
    for _level, _kind, payload in ancillary:
        fds.frombytes(payload)
    return data, list(fds)


async def receive_fd_command(peer: Peer) -> list[int]:
    await trio.lowlevel.wait_readable(peer.sock)
    _, fds = receive_with_fds(peer)
    return fds


async def test_descriptors_travel_with_their_command() -> None:
    before = open_fds()
    async with open_pair() as (channel, peer), trio.open_nursery() as nursery:
        readable, writable = os.pipe()
        call = Call()
        nursery.start_soon(call.run, channel, "getfd", (readable, writable))
        (got_readable, got_writable) = await receive_fd_command(peer)
        os.write(got_writable, b"through")
        assert os.read(readable, 7) == b"through"
        await peer.send({"return": 1, "id": 0})
        await call.done.wait()
        for fd in (readable, writable, got_readable, got_writable):
            os.close(fd)
    assert open_fds() == before


async def test_second_descriptor_waits_for_the_first_reply() -> None:
    """QEMU keeps one message's descriptors: a second set would replace the first."""
    async with open_pair() as (channel, peer), trio.open_nursery() as nursery:
        first, second = Call(), Call()
        nursery.start_soon(first.run, channel, "getfd", (0,))
        (fd,) = await receive_fd_command(peer)
        os.close(fd)
        nursery.start_soon(second.run, channel, "getfd", (0,))
        await settled()
        with pytest.raises(BlockingIOError):
            receive_with_fds(peer)
        first.scope.cancel()  # a cancelled caller changes nothing about that
        await first.done.wait()
        await settled()
        with pytest.raises(BlockingIOError):
            receive_with_fds(peer)
        await peer.send({"return": 1, "id": 0})
        (fd,) = await receive_fd_command(peer)
        os.close(fd)
        await peer.send({"return": 2, "id": 0})
        await second.done.wait()
        assert second.value == 2


async def test_waiting_with_descriptors_is_cancelled_or_fails_without_a_leak() -> None:
    before = open_fds()
    async with open_pair() as (channel, peer), trio.open_nursery() as nursery:
        await clog_ignoring_loss(channel, nursery)
        calls = [Call() for _ in range(4)]
        for call in calls:
            nursery.start_soon(call.run, channel, "getfd", (0, 1))
        await settled()
        calls[0].scope.cancel()
        calls[2].scope.cancel()
        await calls[0].done.wait()
        await calls[2].done.wait()
        peer.close()
        for call in (calls[1], calls[3]):
            await call.done.wait()
            assert isinstance(call.error, QMPClosedError)
            assert call.error.retry_safe
    assert open_fds() == before


async def clog_ignoring_loss(channel: QMPChannel, nursery: trio.Nursery) -> None:
    async def run() -> None:
        with pytest.raises(QMPClosedError):
            await channel.execute("big", {"x": "y" * 2**22})

    nursery.start_soon(run)
    await settled()


# --- Events ---


async def test_events_reach_their_subscribers_only() -> None:
    async with open_pair() as (channel, peer):
        with channel.subscribe("A", "B") as some, channel.subscribe() as every:
            assert channel.statistics().subscribers == 2
            for name in ("A", "C", "B"):
                await peer.event(name, number=1)
            assert [(await some.receive()).name for _ in range(2)] == ["A", "B"]
            got = [await every.receive() for _ in range(3)]
            assert [event.name for event in got] == ["A", "C", "B"]
            assert got[0].data == {"number": 1}
        assert channel.statistics().subscribers == 0
        await peer.event("A")
        await settled()
        statistics = channel.statistics()
        assert (statistics.events_received, statistics.events_lost) == (4, 0)


async def test_slow_subscriber_loses_the_oldest_and_holds_nothing_up() -> None:
    lost = 10
    async with open_pair() as (channel, peer), trio.open_nursery() as nursery:
        with channel.subscribe("A") as slow:
            for number in range(QMP_EVENT_BUFFER + lost):
                await peer.event("A", number=number)
            nursery.start_soon(peer_answers, peer, 1)
            assert await channel.execute("x") == "x"
            assert channel.statistics().events_lost == lost
            numbers = [slow.receive_nowait().data["number"] for _ in range(QMP_EVENT_BUFFER)]
            assert numbers == list(range(lost, QMP_EVENT_BUFFER + lost))
            with pytest.raises(trio.WouldBlock):
                slow.receive_nowait()


async def test_subscriber_that_closed_its_end_does_no_harm() -> None:
    async with open_pair() as (channel, peer), trio.open_nursery() as nursery:
        with channel.subscribe("A") as closed, channel.subscribe("A") as open_one:
            closed.close()
            await peer.event("A")
            assert (await open_one.receive()).name == "A"
            nursery.start_soon(peer_answers, peer, 1)
            assert await channel.execute("x") == "x"


async def test_subscription_ends_with_the_connection_after_what_came() -> None:
    async with open_pair() as (channel, peer):
        with channel.subscribe("A") as events:
            await peer.event("A")
            peer.close()
            assert [event.name async for event in events] == ["A"]
        with channel.subscribe("A") as events:
            assert [event.name async for event in events] == []


# --- The end ---


async def test_peer_gone_wakes_every_waiter_with_the_cause() -> None:
    async with open_pair() as (channel, peer), trio.open_nursery() as nursery:
        calls = [Call() for _ in range(3)]
        for index, call in enumerate(calls):
            nursery.start_soon(call.run, channel, f"c{index}")
        await peer_reads(peer, 3)
        peer.close()
        for index, call in enumerate(calls):
            await call.done.wait()
            assert isinstance(call.error, QMPClosedError)
            assert f"c{index} may have run" in str(call.error)
            assert not call.error.retry_safe
        causes = {id(call.error.__cause__) for call in calls if call.error is not None}
        assert causes == {id(await channel.wait_closed())}
        assert len({id(call.error) for call in calls}) == 3
        with pytest.raises(QMPClosedError, match="later was not sent") as caught:
            await channel.execute("later")
        assert caught.value.retry_safe
        with trio.testing.assert_checkpoints(), pytest.raises(QMPClosedError):
            await channel.execute("later")


async def peer_reads(peer: Peer, count: int) -> None:
    for _ in range(count):
        assert await peer.receive() is not None


async def test_peer_gone_while_idle_is_noticed() -> None:
    async with open_pair() as (channel, peer):
        peer.close()
        failure = await channel.wait_closed()
        assert isinstance(failure, QMPClosedError)
        assert isinstance(failure.__cause__, (EOFError, OSError))
        assert "closed" in repr(channel)


async def test_peer_gone_in_the_middle_of_a_message_to_it() -> None:
    async with open_pair() as (channel, peer), trio.open_nursery() as nursery:
        await clog_ignoring_loss(channel, nursery)
        waiting = Call()
        nursery.start_soon(waiting.run, channel, "unsent")
        await settled()
        peer.close()
        await waiting.done.wait()
        assert isinstance(waiting.error, QMPClosedError)
        assert waiting.error.retry_safe


async def test_peer_that_stops_reading_only() -> None:
    """A write fails, though nothing will ever come to read, not even an end of file."""
    async with open_pair() as (channel, peer):
        peer.sock.shutdown(socket.SHUT_RD)
        with pytest.raises(QMPClosedError, match="while sending"):
            await channel.execute("x")


@pytest.mark.parametrize(
    "data",
    [
        b"garbage\r\n",
        b'{"return": {}, "id": 99}\r\n',
        b"x" * (QMP_LINE_LIMIT + 1),
        b'{"error": {"class": "GenericError", "desc": "Invalid JSON"}}\r\n',
    ],
    ids=["garbage", "unknown id", "oversized", "error without id"],
)
async def test_violation_closes_the_channel_and_nothing_hangs(data: bytes) -> None:
    async with open_pair() as (channel, peer), trio.open_nursery() as nursery:
        call = Call()
        nursery.start_soon(call.run, channel, "x")
        await peer.expect("x")
        try:
            await peer.send_raw(data)
        except trio.BrokenResourceError:
            assert len(data) > QMP_LINE_LIMIT  # it hangs up before the last byte
        await call.done.wait()
        assert isinstance(call.error, QMPProtocolError)
        failure = await channel.wait_closed()
        assert isinstance(failure, QMPProtocolError)
        with pytest.raises(QMPProtocolError, match="was not sent"):
            await channel.execute("later")


async def test_violation_while_the_writer_is_stuck() -> None:
    async with open_pair() as (channel, peer), trio.open_nursery() as nursery:
        calls = [Call(), Call()]

        async def big() -> None:
            with pytest.raises(QMPProtocolError):
                await channel.execute("big", {"x": "y" * 2**22})

        nursery.start_soon(big)
        await settled()
        for call in calls:
            nursery.start_soon(call.run, channel, "unsent")
        await settled()
        await peer.send_raw(b"garbage\n")
        for call in calls:
            await call.done.wait()
            assert isinstance(call.error, QMPProtocolError)
            assert call.error.retry_safe


class AtHandOver(trio.abc.Instrument):
    """Does something between the hand-over of a request and the writer's taking it up."""

    def __init__(self, channel: QMPChannel, action: Callable[[], object]) -> None:
        self._channel, self._action = channel, action
        self.times = 0

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.times == 0 and self._channel._inbox.statistics().tasks_waiting_receive == 0:
            self.times += 1
            self._action()


@pytest.mark.parametrize("fds", [(), (0,)])
async def test_closed_just_after_the_hand_over(fds: tuple[int, ...]) -> None:
    before = open_fds()
    async with open_pair() as (channel, _):
        await settled()
        call = Call()
        moment = AtHandOver(channel, lambda: channel.fail(QMPClosedError("just now")))
        trio.lowlevel.add_instrument(moment)
        try:
            await call.run(channel, "x", fds)
        finally:
            trio.lowlevel.remove_instrument(moment)
        assert moment.times == 1
        assert isinstance(call.error, QMPClosedError)
        assert "x was not sent" in str(call.error)
        assert call.error.retry_safe
    assert open_fds() == before


@pytest.mark.parametrize("fds", [(), (0,)])
async def test_cancelled_just_after_the_hand_over(fds: tuple[int, ...]) -> None:
    before = open_fds()
    async with open_pair() as (channel, peer):
        await settled()
        call = Call()
        moment = AtHandOver(channel, call.scope.cancel)
        trio.lowlevel.add_instrument(moment)
        try:
            await call.run(channel, "x", fds)
        finally:
            trio.lowlevel.remove_instrument(moment)
        assert moment.times == 1
        assert call.scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer_answers, peer, 1)
            assert await channel.execute("next", fds=fds) == "next"
        assert channel.statistics().late_replies == 0
    assert open_fds() == before


async def test_leaving_the_block_wakes_waiters_elsewhere() -> None:
    before = open_fds()
    call = Call()
    async with trio.open_nursery() as nursery:
        async with open_pair() as (channel, peer):
            nursery.start_soon(call.run, channel, "x")
            await peer.expect("x")
        await call.done.wait()
    assert isinstance(call.error, QMPClosedError)
    assert "the block of open_qmp() was left" in str(call.error)
    with pytest.raises(QMPClosedError, match="was not sent"):
        await channel.execute("later")
    assert open_fds() == before


async def test_body_can_still_talk_while_it_is_cancelled() -> None:
    async with open_pair() as (channel, peer):
        pass
    answers: list[object] = []
    async with trio.open_nursery() as nursery:
        sock, peer = socket_pair()

        async def serve() -> None:
            with trio.CancelScope(shield=True):
                await peer.negotiate()
                await peer_answers(peer, 1)
            peer.close()

        nursery.start_soon(serve)
        with trio.CancelScope() as scope:
            async with open_qmp(sock) as channel:
                try:
                    scope.cancel()
                    await trio.sleep_forever()
                finally:
                    with trio.move_on_after(5, shield=True):
                        answers.append(await channel.execute("quit"))
    assert answers == ["quit"]


async def test_body_raises_its_own_exception_bare() -> None:
    sock, peer = socket_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.negotiate)
        with pytest.raises(KeyError):
            async with open_qmp(sock):
                raise KeyError("mine")
    peer.close()


async def test_opening_cancelled_at_every_await_leaves_nothing() -> None:
    before = open_fds()

    async def run() -> None:
        async with open_pair():
            await trio.lowlevel.checkpoint()

    assert await cancel_at_every_step(run) > 4
    assert open_fds() == before


async def test_the_log_has_the_end_of_the_conversation_and_no_more() -> None:
    async with open_pair() as (channel, peer), trio.open_nursery() as nursery:
        nursery.start_soon(channel.execute, "query-status")
        await peer.reply(await peer.expect("query-status"), {"status": "running"})
        await settled()
        greeting, *_, command, reply = channel.log().splitlines()
        assert greeting.startswith('<- {"QMP"')
        assert command.startswith('-> {"execute":"query-status"')
        assert reply.startswith('<- {"return": {"status": "running"}')
        for _ in range(40):
            await peer.event("RESET", padding="x" * 1000)
        await settled()
        assert len(channel.log()) <= 16 * 2**10
        assert "query-status" not in channel.log()
        assert channel.log().endswith("}\n")
    assert "RESET" in channel.log(), "it is there afterwards, for the report"
