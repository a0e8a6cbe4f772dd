"""Functions that a run may call: which there can be, and what of a guest's words is a call."""

from __future__ import annotations

import json
import keyword
from typing import Any

import pytest
from hypothesis import given, strategies as st

from tests._parsers import count_values
from trio_sandbox.client._functions import (
    BadCallError,
    Call,
    CallDecoder,
    check_arguments,
    check_functions,
    describe_exception,
    encode_result,
    parse_arguments,
)
from trio_sandbox.client._json import has_more_values
from trio_sandbox.constants import MAXIMUM_CALL_BYTES, MAXIMUM_CALL_VALUES, MAXIMUM_FUNCTIONS


def search(text: str) -> list[str]:
    return [text]


def test_functions_are_copied() -> None:
    given = {"search": search, "_a1": print, "print": print}
    checked = check_functions(given, "python")
    given.clear()
    assert list(checked) == ["search", "_a1", "print"]
    assert check_functions(None, "shell") == {}
    assert check_functions({}, "shell") == {}
    assert len(check_functions({f"f{n}": print for n in range(MAXIMUM_FUNCTIONS)}, "javascript")) == MAXIMUM_FUNCTIONS


@pytest.mark.parametrize(
    "name",
    [
        "",
        "1a",
        "a-b",
        "a b",
        "a.b",
        "é",
        "a\n",
        "x" * 101,
        "__main__",
        "class",
        "None",
        "await",
        "function",
        "let",
        "undefined",
    ],
)
def test_names_that_no_function_can_have(name: str) -> None:
    with pytest.raises(ValueError, match="a name in `functions` must"):
        check_functions({name: search}, "python")


@given(st.sampled_from(keyword.kwlist))
def test_no_keyword_is_a_name(name: str) -> None:
    with pytest.raises(ValueError, match="must be free"):
        check_functions({name: search}, "javascript")


@pytest.mark.parametrize(
    ("functions", "error", "match"),
    [
        ([search], TypeError, "must be a mapping"),
        ("search", TypeError, "must be a mapping, not str|must be a mapping of names to functions, not str"),
        ({1: search}, TypeError, "must be str, not 1"),
        ({"search": "search"}, TypeError, r"`functions\['search'\]` must be a function"),
        ({"search": None}, TypeError, "must be a function, not None"),
        ({f"f{n}": print for n in range(MAXIMUM_FUNCTIONS + 1)}, ValueError, "must be at most 64, not 65"),
    ],
)
def test_what_can_be_no_functions(functions: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        check_functions(functions, "python")


def test_a_shell_calls_none() -> None:
    with pytest.raises(ValueError, match="can't be called from a shell"):
        check_functions({"search": search}, "shell")


@given(
    st.lists(st.tuples(st.integers(0, 10**10 - 1), st.binary(max_size=50).map(lambda data: data.replace(b"\n", b"")))),
    st.integers(1, 40),
)
def test_calls_are_the_same_however_they_are_cut(sent: list[tuple[int, bytes]], size: int) -> None:
    data = b"".join(b"%d name %s\n" % call for call in sent)
    decoder = CallDecoder()
    calls = [call for at in range(0, len(data), size) for call in decoder.feed(data[at : at + size])]
    assert calls == [Call(number, "name", arguments) for number, arguments in sent]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"x",
        b"1",
        b"1 a",
        b"-1 a []",
        b"1  []",
        b"12345678901 a []",
        b"1 a-b []",
        b"1 \xc3\xa9 []",
        b" 1 a []",
        b"1 %s []" % (b"a" * 101),
        b"1 a %s" % (b"1" * (MAXIMUM_CALL_BYTES + 1)),
    ],
)
def test_lines_that_are_no_calls(line: bytes) -> None:
    with pytest.raises(BadCallError):
        list(CallDecoder().feed(line + b"\n"))


def test_a_line_without_an_end_is_not_kept() -> None:
    decoder = CallDecoder()
    with pytest.raises(BadCallError, match="more than 1048576 bytes"):
        for _ in range(1000):
            decoder.feed(b"1" * 65536)
    assert len(decoder._unfinished) < 2 * MAXIMUM_CALL_BYTES


def test_the_longest_call() -> None:
    arguments = b'[["%s"],{}]' % (b"x" * (MAXIMUM_CALL_BYTES - 9))
    assert len(arguments) == MAXIMUM_CALL_BYTES
    (call,) = CallDecoder().feed(b"9999999999 %s %s\n" % (b"a" * 100, arguments))
    assert call.arguments == arguments


def test_calls_are_looked_at_when_they_are_asked_for() -> None:
    calls = CallDecoder().feed(b"1 a []\nno call\n")
    assert next(calls).number == 1
    with pytest.raises(BadCallError):
        next(calls)


def test_arguments() -> None:
    assert parse_arguments(b'[[1, null, {"a": [true]}], {"limit": 2.5}]') == ([1, None, {"a": [True]}], {"limit": 2.5})


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[",
        b"{}",
        b"[[], {}, 1]",
        b"[{}, []]",
        b"[[]]",
        b"1",
        b"[[NaN], {}]",
        b"[[Infinity], {}]",
        b"[[1e999], {}]",
        b"[[{}], {}, {}]",
        '[["x"], {}]'.encode("utf-16"),
        b"[[\xff], {}]",
        b"[" * 100_000,
        b"[[%s], {}]" % (b"1" * 10_000),
    ],
)
def test_arguments_that_are_none(text: bytes) -> None:
    with pytest.raises(BadCallError):
        parse_arguments(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)

MANY = MAXIMUM_CALL_VALUES + 1


@pytest.mark.parametrize(
    "values",
    [
        "[],[]," * MANY,
        "1.5," * MANY,
        "[" * MANY,
        '{"":0},' * MANY,
        '{"":"",' + '"":"",' * MANY,
        r'"\\",' * MANY,
        r'"\\\\",' * MANY,
        r'"\\","a,b\"",' * MANY,
    ],
)
def test_arguments_that_would_take_long_to_read(values: str) -> None:
    with pytest.raises(BadCallError, match="may have 20000 values"):
        check_arguments(f"[[{values}0]]".encode())
    check_arguments(f"[[{values[:1000]}".encode())


@pytest.mark.parametrize(
    "text", [",[{" * MANY, '",' * MANY, "\\," * MANY, '\\",[' * MANY, "x" * 4 * MANY, '"\n,' * MANY, '\\\\"' * MANY]
)
def test_what_is_within_a_text_does_not_count(text: str) -> None:
    arguments = json.dumps([[text, *([1] * 1000)], {"a,b": text}])
    check_arguments(arguments.encode())


@given(json_values)
def test_no_values_are_overlooked(value: object) -> None:
    count = count_values(value)
    text = json.dumps(value).encode()
    assert not has_more_values(text, count)
    assert count == 0 or has_more_values(text, count - 1)


@given(json_values)
def test_results_travel_as_json_in_one_line_of_ascii(value: object) -> None:
    text = encode_result(value)
    assert text.isascii()
    assert "\n" not in text
    assert json.loads(text) == value


@pytest.mark.parametrize("value", [object(), b"bytes", {1, 2}, float("nan"), [float("inf")], print])
def test_results_that_are_no_json(value: object) -> None:
    with pytest.raises(TypeError, match="JSON"):
        encode_result(value)


def test_results_that_are_too_long() -> None:
    with pytest.raises(ValueError, match="may have 1048576 bytes as JSON, not 1048577"):
        encode_result("x" * (MAXIMUM_CALL_BYTES - 1))
    with pytest.raises(ValueError, match="may have 1048576 bytes as JSON, and has more"):
        encode_result(["x" * 2**19, {"y" * 2**19: 1}, "z"])


def endless() -> object:
    contains: list[object] = []
    contains.append(contains)
    return contains


MUCH: list[Any] = [[0] * MANY, [[[0]] * 200] * 101, {"x": dict.fromkeys(range(MANY))}, ((1,),) * MANY, endless()]


@pytest.mark.parametrize("value", MUCH)
def test_results_that_would_take_long_to_encode(value: object) -> None:
    with pytest.raises(ValueError, match="may have 20000 values, and has more, or contains itself"):
        encode_result(value)


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("exc", "text"),
    [
        (ValueError("no such thing"), "ValueError: no such thing"),
        (KeyError("x"), "KeyError: 'x'"),
        (RuntimeError(), "RuntimeError"),
        (
            FileNotFoundError(2, "No such file or directory", "/etc/secret"),
            "FileNotFoundError: No such file or directory",
        ),
        (MuteError(), "MuteError"),
    ],
)
def test_what_the_guest_is_told_of_an_exception(exc: Exception, text: str) -> None:
    assert describe_exception(exc) == text


def test_what_the_guest_is_told_is_short() -> None:
    assert len(describe_exception(ValueError("x" * 10**6))) == 10_000
