"""What is told of the sandboxes of a fleet, for whoever looks at spans and numbers."""

from __future__ import annotations

import pytest
import trio

from tests._telemetry import telemetry
from trio_sandbox import CapacityError
from trio_sandbox._observe import record
from trio_sandbox.fleet import FleetConfig

from ._fleet import LocalHost, open_fake_fleet


async def test_the_spans_of_a_sandbox_on_a_node() -> None:
    async with open_fake_fleet("one") as fleet:
        with record() as recording:
            async with fleet.host.open_sandbox(memory_mib=512) as sandbox:
                await sandbox.run("print(1)")
        # The node is in this process, and its sandbox is not opened by a host: all of these are the program's.
        spans = {each.name: each for each in recording.spans()}
        assert [(each.name, each.depth) for each in recording.spans()][:3] == [
            ("sandbox", 0),
            ("start", 1),
            ("admit", 2),
        ]
        told = spans["sandbox"].attributes
        assert (told["sandbox_id"], told["node"], told["kind"], told["outcome"]) == (sandbox.id, "one", "fleet", "ok")
        assert spans["run"].attributes["sandbox_id"] == sandbox.id
        assert "teardown" in spans
        assert all(each.ended is not None for each in recording.spans())


async def test_numbers_of_sandboxes_on_nodes() -> None:
    with telemetry() as seen:
        async with open_fake_fleet("one", one=LocalHost(memory_mib=800)) as fleet:  # for two
            async with fleet.host.open_sandbox(), fleet.host.open_sandbox():
                assert seen.total("sandboxes.open") == 2
                with trio.move_on_after(0.1):
                    async with fleet.host.open_sandbox():
                        pytest.fail("there is no room")
            with pytest.raises(CapacityError):
                async with fleet.host.open_sandbox(memory_mib=10_000):
                    pass
        outcomes = {
            outcome: seen.total("starts", kind="fleet", outcome=outcome) for outcome in ("ok", "cancelled", "error")
        }
        assert outcomes == {"ok": 2, "cancelled": 1, "error": 1}
        assert seen.total("admission.duration") == 3, "who never gets room has waited, too"
        assert seen.total("sandboxes.open") == 0


async def test_what_a_fleet_logs_of_a_sandbox_has_its_id(caplog: pytest.LogCaptureFixture) -> None:
    async with open_fake_fleet("one", fleet=FleetConfig(end_timeout=0.1)) as fleet:
        async with fleet.host.open_sandbox() as sandbox:
            fleet.nodes["one"].wire.stall()
        fleet.nodes["one"].wire.go_on()
    logged = {
        (each.__dict__["sandbox_id"], each.getMessage()) for each in caplog.records if each.name == "trio_sandbox.fleet"
    }
    assert (sandbox.id, "node one did not clean up after opening a sandbox within 0.1 s") in logged
    assert all(hasattr(each, "sandbox_id") for each in caplog.records if each.name.startswith("trio_sandbox"))
