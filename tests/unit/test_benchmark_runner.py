"""What the benchmarks' runner does with figures."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks.__main__ import BY_NAME, known_benchmarks, main
from tests.documented import END_MARK, START_MARK, replace_between_marks


def test_figures_go_between_the_marks() -> None:
    text = f"before\n{START_MARK}\nold\n{END_MARK}\nafter\n"
    assert replace_between_marks(text, "new") == f"before\n{START_MARK}\nnew\n{END_MARK}\nafter\n"
    with pytest.raises(ValueError, match="exactly one"):
        replace_between_marks("no marks", "new")


def test_those_that_run_by_name_are_there() -> None:
    assert set(BY_NAME) < set(known_benchmarks())


def test_an_unknown_benchmark_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["astrology"])
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert "no benchmark 'astrology'" in error
    assert all(name in error for name in known_benchmarks())


def test_what_a_machine_lacks_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["containers"]) == 0
    assert "Not measured: containers, since skopeo, which fetches container images, is not installed." in (
        capsys.readouterr().out
    )
    assert main(["containers", "--json"]) == 0
    assert "skopeo" in json.loads(capsys.readouterr().out)["unmeasured"]["containers"]
