"""What OpenTelemetry is told of a real start from a template, of runs, and of the network."""

from __future__ import annotations

import pytest
import trio

from tests._telemetry import attributes_of, telemetry
from trio_sandbox import Network, open_host
from trio_sandbox.image import BuiltImage

pytestmark = pytest.mark.qemu

#: What no span may have in it: the guest's code, output, and the name that it asks for.
SECRET = "tr0ub4dor"
CODE = f"""
import socket
print("{SECRET}")
try:
    socket.create_connection(("{SECRET}.test", 80), 5)
except OSError as exc:
    print(type(exc).__name__)
"""


async def test_a_restore_a_run_and_a_decision_are_spans_and_numbers(python_image: BuiltImage) -> None:
    with telemetry() as seen:
        async with open_host() as host:
            async with host.open_sandbox("python") as first:
                await first.run("1")
            async with host.open_sandbox("python", network=Network.allow("web.test")) as second:
                result = await second.run(CODE, check=True)
                # The guest does not tell the code how the host has told of it.
                with trio.fail_after(10):
                    while not seen.spans("network"):
                        await trio.sleep(0.01)
            assert seen.total("sandboxes.open") == 0
    assert SECRET in result.stdout
    whole = next(each for each in seen.spans("sandbox") if attributes_of(each)["sandbox_id"] == second.id)
    assert attributes_of(whole)["kind"] == "template"
    paths = [seen.path(each) for each in seen.within(whole)]
    for path in (
        ["sandbox", "start", "admit"],
        ["sandbox", "start", "restore", "qemu"],
        ["sandbox", "start", "restore", "load"],
        ["sandbox", "start", "restore", "hello"],
        ["sandbox", "run", "first_output"],
        ["sandbox", "network"],
        ["sandbox", "teardown"],
    ):
        assert path in paths
    assert SECRET not in "".join(each.to_json() for each in seen.spans())
    assert seen.total("starts", kind="template", outcome="ok") == 2
    assert seen.total("start.duration", kind="template") == 2
    assert seen.total("runs", language="python", outcome="ended") == 2
    assert seen.total("network.decisions") >= 1
    assert result.timings.sent <= (result.timings.first_output or 0.0) <= result.timings.ended
