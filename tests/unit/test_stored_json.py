"""JSON of a disk: what was written is read, and damage is one kind of error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trio_sandbox._stored_json import Fields, parse_json, read_json


def test_what_was_written_is_read(tmp_path: Path) -> None:
    text = '{"a": "\N{SNOWMAN}", "b": 7, "c": 12.5, "d": true, "e": "00ff", "f": {"g": 0}}'
    (tmp_path / "file").write_text(text, "utf-8")
    fields = Fields(read_json(tmp_path / "file"))
    assert (fields.text("a"), fields.number("b"), fields.time("c"), fields.flag("d")) == ("\N{SNOWMAN}", 7, 12.5, True)
    assert (fields.data("e"), fields.time("b"), fields.fields("f").number("g")) == (b"\0\xff", 7.0, 0)
    assert fields.fields("f").values() == {"g": 0}
    assert fields.names() == ["a", "b", "c", "d", "e", "f"]


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff", b"NaN", b"[-Infinity]", b"[" * 100_000, b"9" * 5000, b'{"a": 1} x', "{}".encode("utf-16")],
)
def test_what_is_no_json(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(data)


def test_a_file_has_a_limit_and_nothing_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b" " * 100 + b"{}")
    assert read_json(tmp_path / "file", longest=102) == {}
    with pytest.raises(ValueError, match="more than 101 bytes"):
        read_json(tmp_path / "file", longest=101)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="Expecting value"):
        read_json(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        read_json(tmp_path)


@pytest.mark.parametrize("value", [None, [], "x", 7])
def test_what_is_no_object(value: object) -> None:
    with pytest.raises(ValueError, match="an object was expected"):
        Fields(value)


ODD: list[tuple[str, list[object]]] = [
    ("text", [None, 7, b"x", ["x"], "\ud800"]),
    ("number", [None, "7", True, 7.0, -1, 2**63]),
    ("time", [None, "7", False, -1, 1e300, float("nan"), float("inf"), 10**400]),
    ("flag", [None, 0, 1, "true"]),
    ("data", [None, "0", "xy", "\N{FULLWIDTH DIGIT ONE}0", 7]),
    ("fields", [None, [], "x"]),
]


@pytest.mark.parametrize(("kind", "values"), ODD)
def test_what_is_not_of_the_type(kind: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=r"."):
            getattr(Fields({"a": value}), kind)("a")
    with pytest.raises(ValueError, match=r"."):
        getattr(Fields({}), kind)("a")


def test_damage_is_told_in_short() -> None:
    with pytest.raises(ValueError, match=r"'a' must be a whole number, not negative, and is \[0, 0") as caught:
        Fields({"a": [0] * 10_000}).number("a")
    assert len(str(caught.value)) < 200
