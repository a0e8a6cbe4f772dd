"""What `trio-sandbox fleet` prints, and how it fails."""

from __future__ import annotations

import json

import pytest

from tests.fake._fleet import LocalHost
from trio_sandbox import FleetError, SavedSandbox
from trio_sandbox.cli import _fleet, build_parser
from trio_sandbox.fleet import NodeReport, TemplateReport


def reports(address: str) -> list[NodeReport]:
    assert address == "auto"
    host = LocalHost(memory_mib=2000, open=3).statistics()
    stored = (
        (TemplateReport("3f9a61c2", "python", 256, 1),),
        (
            SavedSandbox(name="mine", image="python", memory_mib=512, vcpus=2),
            SavedSandbox(name="old", problem="it is damaged"),
        ),
    )
    return [
        NodeReport("one", host, False, *stored),
        NodeReport("one", host, False, *stored),  # for another program
        NodeReport("two", host, draining=True),
        NodeReport("three", None, draining=True),
    ]


def test_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_fleet, "read_reports", reports)
    assert _fleet.fleet(build_parser().parse_args(["fleet", "status"])) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["one", "open", "3", "0", "0", "of", "2000", "0", "of", "8"],
        ["one", "open", "3", "0", "0", "of", "2000", "0", "of", "8"],
        ["two", "draining", "3", "0", "0", "of", "2000", "0", "of", "8"],
        ["three", "ended"],
        [],
        ["one", "has"],
        ["template", "3f9a61c2", "python", "256", "MiB", "1", "vCPU"],
        ["saved", "mine", "python", "512", "MiB", "2", "vCPU"],
        ["saved", "old", "it", "is", "damaged"],
    ]
    assert len({len(header), *map(len, lines[:2])}) == 1
    assert _fleet.table([]) == "no fleet has a node on this cluster"


def test_what_nodes_say_does_no_harm_to_a_terminal_or_to_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of hosts, images and files are whatever somebody has called them."""
    bad = "\x1b[2J\nfeigned"
    host = LocalHost().statistics()
    saved = SavedSandbox(name=bad, problem=bad), SavedSandbox(name="a", image=bad, memory_mib=1, vcpus=1)
    told = [
        NodeReport(bad, host, draining=False, templates=(TemplateReport(bad, bad, 256, 1),), saved=saved),
        NodeReport("silent", None, draining=False, problem=f"does not answer{bad}"),
        NodeReport("unsure", host, draining=False, problem="can't say what its cache has: no permission"),
    ]

    def read(address: str) -> list[NodeReport]:
        return told

    monkeypatch.setattr(_fleet, "read_reports", read)
    assert _fleet.fleet(build_parser().parse_args(["fleet", "status"])) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert not [line for line in out.splitlines() if line.startswith("feigned")]
    assert out.count("\\x1b[2J feigned") == 8
    assert "silent                           does not answer\\x1b[2J feigned\n" in out
    assert "unsure has\n  can't say what its cache has: no permission\n" in out


@pytest.mark.parametrize("text", ["-1", "nan", "soon"])
def test_a_timeout_that_is_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["fleet", "drain", "one", "--timeout", text])
    assert "is not a number of seconds from 0" in capsys.readouterr().err
    assert build_parser().parse_args(["fleet", "drain", "one", "--timeout", "0"]).timeout == 0


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_fleet, "read_reports", reports)
    assert _fleet.fleet(build_parser().parse_args(["fleet", "status", "--json"])) == 0
    one, *_ = json.loads(capsys.readouterr().out)
    assert one["host"]["admission"]["memory_mib_budget"] == 2000
    assert [template["image"] for template in one["templates"]] == ["python"]
    assert [saved["name"] for saved in one["saved"]] == ["mine", "old"]


@pytest.mark.parametrize("error", [FleetError("no cluster"), ModuleNotFoundError("no ray")])
def test_failures(error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object, **__: object) -> int:
        raise error

    monkeypatch.setattr(_fleet, "drain_node", fail)
    assert _fleet.fleet(build_parser().parse_args(["fleet", "drain", "one", "--timeout", "5"])) == 1
    assert str(error) in capsys.readouterr().err


def test_a_drained_node(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[object] = []

    def drain(*args: object, **options: object) -> int:
        asked.append((args, options))
        return 2

    monkeypatch.setattr(_fleet, "drain_node", drain)
    assert _fleet.fleet(build_parser().parse_args(["fleet", "--address", "a:1", "drain", "one", "--timeout", "5"])) == 0
    assert asked == [(("one",), {"timeout": 5.0, "address": "a:1"})]
    assert capsys.readouterr().out == "one is drained; 2 sandboxes were left, and ended\n"
