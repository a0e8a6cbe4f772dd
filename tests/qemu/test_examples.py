"""The programs of docs/examples do what the cookbook says."""

from __future__ import annotations

import json
import os
import runpy
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpcore
import pytest
import trio

from tests._leaks import HANG_LIMIT
from tests.documented import ROOT
from trio_sandbox import SandboxError
from trio_sandbox.sessions import Sessions, SessionsConfig

pytestmark = pytest.mark.qemu

EXAMPLES = ROOT / "docs" / "examples"

#: What the examples without arguments print.
PRINTED = {
    "agent_tools": "ada 9.0\nbob 2.5\n",
    "grader": """\
ada: passed
bob: AssertionError: double(4) is 6, not 8
cyd: too slow: more than 5 seconds
dan: ended before the tests did
""",
    "speculate": "works: right\n25.0\n",
    "agent_loop": """\
counting
counted to more than 1: True
The result: counted to more than 1: True
exit code 0
""",
    "mcp_client": """\
True
1
checkpoint 1
reverted to checkpoint 1
['kept']
""",
}

#: In place of Matplotlib, which takes a minute to install and to import under emulation.
PYPLOT = """
def bar(names, heights):
    bars.update(zip(names, heights))

def title(text):
    pass

def get_fignums():
    return []

def close(which):
    pass

def savefig(path):
    open(path, "wb").write(b"\\x89PNG" + repr(bars).encode())

bars = {}
"""


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_every_example_is_tested() -> None:
    tested = {*PRINTED, "analysis", "web_sessions"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


@pytest.mark.parametrize("name", PRINTED)
async def test_an_example_prints_what_it_should(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with trio.fail_after(HANG_LIMIT):
        await load(name)["main"]()
    assert capfd.readouterr().out == PRINTED[name]


async def test_an_answer_to_each_message_where_nothing_is_interrupted() -> None:
    """The first answer is over before the second message comes."""
    loop = load("agent_loop")
    shown: list[str] = []
    answered = trio.Event()

    def show(text: str) -> None:
        shown.append(text)
        if text.startswith("bye"):
            answered.set()

    async def model(history: list[Any]) -> Any:
        await trio.lowlevel.checkpoint()
        last = history[-1]
        return loop["Message"](*(("code", last.text) if last.role == "user" else ("assistant", f"bye {last.text!r}")))

    async def messages() -> AsyncIterator[str]:
        nonlocal answered
        for code in ("x = 1", "print(x); 1 / 0"):
            yield code
            await answered.wait()
            answered = trio.Event()

    with trio.fail_after(HANG_LIMIT):
        async with loop["open_sandbox"]("python") as sandbox:
            await loop["converse"](sandbox, model, messages(), show)
    assert shown[0] == "bye 'exit code 0'\n"
    assert shown[1] == "1\n"
    assert shown[-1].startswith("bye '1\\nTraceback")
    assert shown[-1].endswith("exit code 1'\n")


async def test_an_analysis_of_a_table_comes_back_as_a_picture(tmp_path: Path) -> None:
    example = load("analysis")
    assert repr(example["IMAGE"]).count("matplotlib") == 1
    table = tmp_path / "sales.csv"
    table.write_text("month,sales\nMay,3\nJune,5\n")
    with trio.fail_after(HANG_LIMIT):
        async with example["open_sandbox"]("python") as sandbox:
            await sandbox.path("matplotlib").mkdir()
            await sandbox.path("matplotlib/__init__.py").write_text("rcParams = {'backend': 'agg'}\n")
            await sandbox.path("matplotlib/pyplot.py").write_text(PYPLOT)
            assert await example["analyse"](sandbox, table, example["CODE"], tmp_path / "plot.png") == "'June'"
    assert (tmp_path / "plot.png").read_bytes() == b"\x89PNG{'May': 3, 'June': 5}"


async def ask(address: str, user: str, code: str) -> dict[str, Any]:
    """Have the service run code."""
    async with httpcore.AsyncConnectionPool() as pool:
        response = await pool.request("POST", f"{address}/run/{user}", content=code.encode())
        return {"status": response.status, **(json.loads(response.content) if response.status == 200 else {})}


async def test_each_user_of_the_web_service_has_a_sandbox_that_sleeps_and_is_replaced() -> None:
    service = load("web_sessions")
    names: dict[str, Any] = service["make_app"].__globals__
    names["LIMITS"] = SessionsConfig(sleep_after=None, max_awake=1)
    with trio.fail_after(HANG_LIMIT):
        async with trio.open_nursery() as nursery:
            sessions: list[Sessions] = []
            make_app = names["make_app"]

            def make(opened: Sessions) -> object:
                sessions.append(opened)
                return make_app(opened)

            names["make_app"] = make
            address = await nursery.start(service["serve_sessions"], "127.0.0.1:0")
            assert (await ask(address, "ada", "x = 1"))["exit_code"] == 0
            assert (await ask(address, "ada", "print(x)"))["stdout"] == "1\n"
            assert "NameError" in (await ask(address, "bob", "print(x)"))["stderr"]  # for whom ada's sleeps
            assert sessions[0].statistics().slept == 1
            assert await ask(address, "ada", "print(x)") == {
                "status": 200,
                "exit_code": 0,
                "stdout": "1\n",
                "stderr": "",
                "lost": None,
            }
            assert (await ask(address, "", "1"))["status"] == 404
            assert (await ask(address, "ada", "#" * 200_000))["status"] == 413
            async with sessions[0].lease("ada") as session:
                pid = session.sandbox.statistics().qemu_pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                with pytest.raises(SandboxError):
                    await session.sandbox.run("1")
            assert (await ask(address, "ada", "print(2)"))["lost"] == "died"
            names["RUN_SECONDS"] = 1
            assert "stopped after 1 seconds" in (await ask(address, "ada", "while True: pass"))["error"]
            assert (await ask(address, "ada", "print(3)"))["stdout"] == "3\n"
            nursery.cancel_scope.cancel(reason="the test is over")
    assert sessions[0].statistics().sessions == 0
