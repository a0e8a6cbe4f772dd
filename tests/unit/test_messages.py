"""What guests say and users ask: every field is checked before it means anything."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import given, strategies as st

from trio_sandbox import GuestProtocolError
from trio_sandbox.client._messages import (
    Exited,
    Failed,
    Finished,
    Message,
    Mounted,
    Shown,
    Started,
    Used,
    code_request,
    parse_message,
    process_request,
)
from trio_sandbox.constants import MAXIMUM_REQUEST_BYTES, MAXIMUM_VALUE_BYTES

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ({"started": 12}, Started(12)),
        ({"mounted": 2}, Mounted(2)),
        ({"exited": {"status": 0}}, Exited(0)),
        ({"exited": {"status": -9, "oom": True, "used": [1, 2, 3]}}, Exited(-9, oom=True, used=Used(1, 2, 3))),
        ({"exited": {"status": -9, "expired": True}}, Exited(-9, expired=True)),
        (
            {"finished": {"exit_code": 3, "value": None, "restarted": True, "state_kept": False}},
            Finished(exit_code=3, value=None, restarted=True, state_kept=False),
        ),
        (
            {
                "finished": {
                    "exit_code": 0,
                    "restarted": False,
                    "state_kept": True,
                    "used": [10**18, 2**32 - 1, 2**64 - 1],
                }
            },
            Finished(
                exit_code=0, value=None, restarted=False, state_kept=True, used=Used(10**18, 2**32 - 1, 2**64 - 1)
            ),
        ),
        (
            {"finished": {"exit_code": 0, "value": "é" * 2**15, "restarted": False, "state_kept": True}},
            Finished(exit_code=0, value="é" * 2**15, restarted=False, state_kept=True),
        ),
        (
            {"display": {"mime": "image/svg+xml", "size": 2**32 - 1, "item": 7}},
            Shown(mime="image/svg+xml", size=2**32 - 1, item=7),
        ),
        (
            {"failed": {"errno": 2, "strerror": "No such file or directory", "filename": "nope"}},
            Failed(2, "No such file or directory", "nope"),
        ),
        ({"failed": {"strerror": "no interpreter"}}, Failed(0, "no interpreter", None)),
    ],
)
def test_messages_that_a_guest_of_ours_sends(sent: dict[str, Any], meant: Message) -> None:
    assert parse_message(json.dumps(sent).encode()) == meant


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff",
        b"[" * 100_000,
        b"null",
        b"{}",
        b'{"started": 1, "exited": 2}',
        b'{"started": true}',
        b'{"started": "1"}',
        b'{"exited": {}}',
        b'{"exited": 0}',
        b'{"exited": {"status": 256}}',
        b'{"exited": {"status": -65}}',
        b'{"exited": {"status": 1e400}}',
        b'{"exited": {"status": 0, "oom": 1}}',
        b'{"exited": {"status": 0, "used": [1, 2]}}',
        b'{"finished": 3}',
        b'{"finished": {}}',
        b'{"finished": {"exit_code": -1, "restarted": false, "state_kept": true}}',
        b'{"finished": {"exit_code": 0, "restarted": 0, "state_kept": true}}',
        b'{"finished": {"exit_code": 0, "value": 1, "restarted": false, "state_kept": true}}',
        b'{"finished": {"exit_code": 0, "value": "\\ud800", "restarted": false, "state_kept": true}}',
        b'{"finished": {"exit_code": 0, "value": "%s", "restarted": false, "state_kept": true}}' % (b"x" * (2**16 + 1)),
        b'{"finished": {"exit_code": 0, "restarted": false, "state_kept": true, "used": [-1, 0, 0]}}',
        b'{"finished": {"exit_code": 0, "restarted": false, "state_kept": true, "used": [0.5, 0, 0]}}',
        b'{"finished": {"exit_code": 0, "restarted": false, "state_kept": true, "used": [0, -1, 0]}}',
        b'{"finished": {"exit_code": 0, "restarted": false, "state_kept": true, "used": [0, 0, -2]}}',
        b'{"finished": {"exit_code": 0, "restarted": false, "state_kept": true, "used": [NaN, 0, 0]}}',
        b'{"finished": {"exit_code": 0, "restarted": false, "state_kept": true, "used": [1000000000000000001, 0, 0]}}',
        b'{"finished": {"exit_code": 0, "restarted": false, "state_kept": true, "used": null}}',
        b'{"display": {}}',
        b'{"display": {"mime": "image/png", "size": -1, "item": 0}}',
        b'{"display": {"mime": "image/png", "size": 4294967296, "item": 0}}',
        b'{"display": {"mime": "image/png", "size": true, "item": 0}}',
        b'{"display": {"mime": "image/png", "size": 1}}',
        b'{"display": {"mime": "image", "size": 1, "item": 0}}',
        b'{"display": {"mime": "image/png\\n", "size": 1, "item": 0}}',
        b'{"display": {"mime": "text/html; charset=latin-1", "size": 1, "item": 0}}',
        b'{"display": {"mime": "../etc", "size": 1, "item": 0}}',
        b'{"display": {"mime": "a/%s", "size": 1, "item": 0}}' % (b"x" * 128),
        b'{"failed": {"errno": -1, "strerror": ""}}',
        b'{"failed": {"errno": 1}}',
        b'{"failed": {"strerror": "x", "filename": 4}}',
        b'{"surprise": 1}',
        b'{"started": 1, "x": [%s0]}' % (b"0," * 2**14),
        b'{"finished": {"exit_code": 0, "restarted": false, "state_kept": true, "x": [%s0]}}' % (b"0," * 2**18),
        '{"started": 1}'.encode("utf-16"),
        b'\xef\xbb\xbf{"started": 1}',
        b'{"failed": {"errno": 1, "strerror": "\xed\xa0\x80"}}',  # half of a character
    ],
)
def test_anything_else_is_a_violation(payload: bytes) -> None:
    with pytest.raises(GuestProtocolError):
        parse_message(payload)


@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
def test_no_payload_raises_anything_but_a_violation(payload: bytes) -> None:
    try:
        parse_message(payload)
    except GuestProtocolError:
        pass


@given(st.sampled_from(["started", "exited", "finished", "display", "failed"]), json_values)
def test_no_field_raises_anything_but_a_violation(kind: str, body: object) -> None:
    try:
        parse_message(json.dumps({kind: body}).encode())
    except GuestProtocolError:
        pass


def test_the_longest_messages() -> None:
    value = "\1" * MAXIMUM_VALUE_BYTES
    end = {"exit_code": 0, "restarted": False, "state_kept": True, "expired": False, "oom": False, "value": value}
    assert parse_message(json.dumps({"finished": end}).encode()) == Finished(0, value, False, True)
    for more in ("[[],[]", '"x","y"', '{"a":{}'):  # which would take long to read
        many = json.dumps({"finished": {**end, "value": "x"}})[:-2] + f',"more":[{f"{more}," * 6000}0'
        assert len(many) < 6 * MAXIMUM_VALUE_BYTES
        with pytest.raises(GuestProtocolError, match="sent a message of"):
            parse_message(many.encode())
    path = "/" + "\1" * 4095
    failed = {"errno": 2, "strerror": "No such file or directory", "filename": path}
    assert parse_message(json.dumps({"failed": failed}).encode()) == Failed(2, "No such file or directory", path)


def test_a_long_explanation_of_the_guest_is_cut() -> None:
    failed = parse_message(json.dumps({"failed": {"strerror": "x" * 10_000, "filename": "y" * 10_000}}).encode())
    assert isinstance(failed, Failed)
    assert len(failed.reason) == 1000
    assert failed.filename is not None
    assert len(failed.filename) == 4096


def test_code_must_be_text_of_a_bounded_size() -> None:
    with pytest.raises(TypeError, match="`code` must be str, not bytes"):
        code_request(b"print(1)", language="python", env=None, cwd=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"at most {MAXIMUM_REQUEST_BYTES} bytes"):
        code_request("#" * (MAXIMUM_REQUEST_BYTES + 1), language="python", env=None, cwd=None)
    code_request("#" * MAXIMUM_REQUEST_BYTES, language="python", env=None, cwd=None)
    with pytest.raises(TypeError, match="`language` must be str, not int"):
        code_request("1", language=3, env=None, cwd=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"at most {MAXIMUM_REQUEST_BYTES} bytes"):
        process_request(["echo"] * (MAXIMUM_REQUEST_BYTES // 4), env={"A": "b"}, cwd=None, user=None)


def test_a_command_is_a_sequence_of_strings_and_paths() -> None:
    request = process_request(["cat", PurePosixPath("/etc/hostname")], env={"A": "b"}, cwd="/tmp", user="root")
    assert request["argv"] == ["cat", "/etc/hostname"]
    assert (request["env"], request["cwd"], request["user"]) == ({"A": "b"}, "/tmp", "root")


@pytest.mark.parametrize(
    ("command", "error", "words"),
    [
        ("ls -l", TypeError, "shell=True"),
        ([], ValueError, "not be empty"),
        (["a\0b"], ValueError, "NUL"),
        ([b"bytes"], TypeError, "must be str"),
    ],
)
def test_a_wrong_command_is_refused(command: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        process_request(command, env=None, cwd=None, user=None)


@pytest.mark.parametrize(
    ("env", "cwd", "words"),
    [
        ({"A=B": "c"}, None, "must not be empty or hold '='"),
        ({"": "c"}, None, "must not be empty or hold '='"),
        ({"A": "b\0c"}, None, "NUL"),
        (None, "relative", "absolute path in the guest, not 'relative'"),
        (None, "/a\0b", "NUL"),
        ([("A", "b")], None, "`env` must be a mapping .*, not list"),
        ("A=b", None, "`env` must be a mapping .*, not str"),
    ],
)
def test_a_wrong_environment_or_directory_is_refused(env: Any, cwd: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        process_request(["true"], env=env, cwd=cwd, user=None)
    with pytest.raises((TypeError, ValueError), match=words):
        code_request("pass", language="python", env=env, cwd=cwd)


@pytest.mark.parametrize("language", ["python", "javascript", "shell"])
def test_code_with_a_nul_is_refused_and_where_it_is_said(language: str) -> None:
    for code, where in (("\0", "at position 0, in line 1;"), ("a\nb\0c\0", "at position 3, in line 2;")):
        with pytest.raises(ValueError, match=f"`code` must not hold the character NUL.* {where}"):
            code_request(code, language=language, env=None, cwd=None)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"": "x"}, "must not be empty or hold '=', but '' does"),
        ({"A=B": "x"}, "must not be empty or hold '=', but 'A=B' does"),
        ({"A\0": "x"}, r"a name in `env` must not hold a NUL character: 'A\\x00'"),
        ({"A": "x\0"}, r"`env\['A'\]` must not hold a NUL character"),
    ],
)
def test_variables_that_nothing_can_have_are_refused(env: dict[str, str], words: str) -> None:
    for language in ("python", "javascript", "shell"):
        with pytest.raises(ValueError, match=words):
            code_request("1", language=language, env=env, cwd=None)
    with pytest.raises(ValueError, match=words):
        process_request(["true"], env=env, cwd=None, user=None)


@pytest.mark.parametrize("name", ["BAD KEY", "1A", "a-b", "a.b", "É", "BASH_FUNC_f%%", "UID", "SHELLOPTS"])
def test_variables_that_only_a_shell_can_not_have(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        code_request("1", language="shell", env={"A": "", name: "x"}, cwd=None)
    for language in ("python", "javascript"):
        assert code_request("1", language=language, env={name: "x"}, cwd=None)["env"] == {name: "x"}
    assert process_request(["true"], env={name: "x"}, cwd=None, user=None)["env"] == {name: "x"}
