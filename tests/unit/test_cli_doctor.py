"""What `trio-sandbox doctor` finds, and how it says it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import attrs
import pytest

from trio_sandbox import ImageBuildError
from trio_sandbox._programs import Requirement
from trio_sandbox.cli import _doctor
from trio_sandbox.cli._doctor import Finding
from trio_sandbox.image import StoredImage
from trio_sandbox.machines import LedgerEntry, Room, Stalls, open_ledger

ABSENT = Requirement("no-such-program-anywhere", "its-package", "does something")


def test_a_missing_program_comes_with_its_package() -> None:
    (finding,) = _doctor.programs([ABSENT])
    assert finding.verdict == "missing"
    assert "does something" in finding.detail
    assert finding.remedy == "install the package its-package"
    assert finding.package == "its-package"


def test_a_program_that_is_there_comes_with_its_path(tmp_path: Path) -> None:
    (finding,) = _doctor.programs([Requirement(str(tmp_path), "package", "purpose")])
    assert finding == Finding(tmp_path.name, "ok", str(tmp_path))


def test_what_root_does_not_need_is_not_missing_for_root() -> None:
    requirement = ABSENT._replace(ordinary_user_only=True)
    assert _doctor.programs([requirement], root=True) == []
    assert [finding.verdict for finding in _doctor.programs([requirement], root=False)] == ["missing"]


def test_a_user_without_a_name_has_a_number() -> None:
    assert _doctor.user_name(0) == "root"
    assert _doctor.user_name(54321) == "54321"


def test_shared_budgets_say_who_has_what(tmp_path: Path) -> None:
    directory = tmp_path / "ledgers"
    assert _doctor.budgets(directory).detail == "no other process of this user has a host open"
    with open_ledger(directory) as ledger:
        ledger.publish(LedgerEntry(pid=4711, memory_total=1000, memory_reserved=352))
        finding = _doctor.budgets(directory)
        assert (finding.verdict, finding.detail) == ("ok", "process 4711 has 352 MiB")
    directory.mkdir(mode=0o755)
    finding = _doctor.budgets(directory)
    assert finding.verdict == "note"
    assert str(directory) in finding.detail
    assert "HostConfig.memory_budget_mib" in finding.remedy


def test_whether_the_kernel_tells_of_stalls() -> None:
    room = Room("in the machine", 10 * 2**30, 16 * 2**30, Stalls(0.0, 0.0))
    finding = _doctor.memory_stalls(lambda: [room])
    assert (finding.subject, finding.verdict) == ("memory pressure", "ok")
    assert "of 16384 MiB in the machine 10240 MiB are left" in finding.detail
    finding = _doctor.memory_stalls(lambda: [attrs.evolve(room, stalls=None)])
    assert finding.verdict == "note"
    assert "the kernel does not tell how long programs wait" in finding.detail
    assert "psi=1" in finding.remedy

    def fail() -> list[Room]:
        raise OSError("no /proc")

    assert _doctor.memory_stalls(fail).detail.endswith("no /proc")
    assert _doctor.memory_stalls().subject == "memory pressure"


async def test_no_cache_directory_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 54321)
    *_, finding = await _doctor.examine(None)
    assert (finding.subject, finding.verdict) == ("cache directory", "missing")
    assert "54321" in finding.detail


@pytest.mark.parametrize(("built", "verdict"), [(False, "missing"), (True, "note")])
async def test_whether_images_can_be_built(tmp_path: Path, *, built: bool, verdict: str) -> None:
    async def works(cache: Path, environment: Mapping[str, str]) -> str:
        return f"in {cache}"

    async def fails(cache: Path, environment: Mapping[str, str]) -> str:
        raise ImageBuildError("the reason, and what to do")

    assert await _doctor.building(tmp_path, built=built, examine=works) == Finding(
        "building images", "ok", f"in {tmp_path}"
    )
    refused = await _doctor.building(tmp_path, built=built, examine=fails)
    assert (refused.verdict, refused.detail) == (verdict, "the reason, and what to do")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("ann:100000:65536\n", "ok"),
        ("bob:1:2\nann:100000:131072\n", "ok"),
        ("ann:100000:1000\n", "missing"),
        ("bob:100000:65536\n", "missing"),
        ("ann:rubbish\n\n:::\n", "missing"),
        (None, "missing"),
    ],
)
def test_subordinate_ids(tmp_path: Path, text: str | None, verdict: str) -> None:
    good, tried = tmp_path / "subgid", tmp_path / "subuid"
    good.write_text("ann:100000:65536\n")
    if text is not None:
        tried.write_text(text)
    finding = _doctor.subordinate_ids("ann", (tried, good))
    assert finding.verdict == verdict
    if verdict == "missing":
        assert str(tried) in finding.detail
        assert str(good) not in finding.detail
        assert "usermod" in finding.remedy


def test_cache_directory(tmp_path: Path) -> None:
    assert _doctor.cache_directory(tmp_path) == Finding("cache directory", "ok", str(tmp_path))
    later = _doctor.cache_directory(tmp_path / "not" / "yet")
    assert (later.verdict, "not made yet" in later.detail) == ("ok", True)
    assert not (tmp_path / "not").exists()  # looking makes nothing
    file = tmp_path / "file"
    file.touch()
    refused = _doctor.cache_directory(file / "below")
    assert refused.verdict == "missing"
    assert "XDG_CACHE_HOME" in refused.remedy


def test_free_space(tmp_path: Path) -> None:
    assert _doctor.free_space(tmp_path, needed=1).verdict == "ok"
    assert _doctor.free_space(tmp_path / "not made yet", needed=1).verdict == "ok"
    short = _doctor.free_space(tmp_path, needed=2**70)
    assert short.verdict == "note"
    assert short.remedy


def test_a_note_is_not_a_failure() -> None:
    assert _doctor.exit_status([Finding("a", "ok", ""), Finding("b", "note", "")]) == 0
    assert _doctor.exit_status([Finding("a", "ok", ""), Finding("b", "missing", "")]) == 1


def test_text_ends_with_one_command_for_all_that_is_missing() -> None:
    findings = [
        Finding("b", "missing", "not found", package="two"),
        Finding("a", "missing", "not found", package="one"),
    ]
    text = _doctor.as_text([*findings, Finding("free space", "ok", "plenty")])
    assert "As root: apt-get install --no-install-recommends one two\n" in text
    assert text.endswith("Something is missing.")
    assert _doctor.as_text([Finding("free space", "ok", "plenty")]).endswith("Sandboxes can run here.")


def test_long_text_is_wrapped_in_its_column() -> None:
    lines = _doctor.as_text([Finding("subject", "note", "word " * 30, "do it " * 30)], columns=60).splitlines()
    assert lines[0].startswith("note    subject  word word")
    assert all(len(line) <= 60 for line in lines)
    assert all(line.startswith(" " * 17) for line in lines[1:-2])


def stored(name: str, *, current: bool) -> StoredImage:
    return StoredImage(name=name, digest="d", path=Path("/"), created=0, size_bytes=1, current=current)


def test_only_images_that_would_be_used_count() -> None:
    assert _doctor.images([]).verdict == "note"
    assert _doctor.images([stored("python", current=False)]).verdict == "note"
    found = _doctor.images([stored("system", current=True), stored("python", current=True)])
    assert (found.verdict, found.detail) == ("ok", "python, system")


def test_json() -> None:
    value = json.loads(_doctor.as_json([Finding("a", "missing", "detail", "remedy")]))
    assert value == {
        "ok": False,
        "findings": [{"subject": "a", "verdict": "missing", "detail": "detail", "remedy": "remedy", "package": ""}],
    }
