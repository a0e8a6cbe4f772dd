"""Names that are longer than any: the error is the kernel's, and the sandbox goes on."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

import pytest

from trio_sandbox import GuestProtocolError, Sandbox
from trio_sandbox.sandbox._files import parse_path

from ._sandbox import open_local_sandbox

LONG = "/" + "x" * 2_000_000

CALLS: dict[str, Callable[[Sandbox], Awaitable[object]]] = {
    "a program": lambda sandbox: sandbox.run_process([LONG]),
    "a directory of a process": lambda sandbox: sandbox.run_process(["true"], cwd=LONG),
    "a directory of a run": lambda sandbox: sandbox.run("1", cwd=LONG),
    "a file": lambda sandbox: sandbox.path(LONG).read_bytes(),
    "a file that is opened": lambda sandbox: sandbox.path(LONG).open("rb"),
    "just too long": lambda sandbox: sandbox.path("/" + "x/" * 2047 + "x").stat(),
    "two files": lambda sandbox: sandbox.path("/" + "x" * 600_000).rename("/" + "y" * 600_000),
    "a link's target": lambda sandbox: sandbox.path("/tmp/link").symlink_to("x" * 4096),
    "a directory": lambda sandbox: sandbox.path(LONG).iterdir(),
    "a path to be resolved": lambda sandbox: sandbox.path("y" * 5000).resolve(),
}


@pytest.mark.parametrize("name", CALLS)
async def test_what_is_too_long_is_told_by_the_kernel_s_error(name: str) -> None:
    async with open_local_sandbox() as (sandbox, machine):
        with pytest.raises(OSError, match=r".") as caught:
            await CALLS[name](sandbox)
        assert caught.value.errno == errno.ENAMETOOLONG
        assert machine.failure is None
        assert (await sandbox.run("print(1)")).stdout == "1\n"


async def test_the_longest_names_there_are() -> None:
    async with open_local_sandbox() as (sandbox, _):
        longest = "/" + "./" * 2046 + "xy"
        assert len(longest) == 4095
        assert not await sandbox.path(longest).exists()
        relative = "z" * 255 + "/" + "./" * 1900 + "x"
        assert (await sandbox.path(relative).resolve()).name == "x"


async def test_a_user_that_nobody_can_be() -> None:
    async with open_local_sandbox() as (sandbox, _):
        for user in ("u" * 257, "u" * 2_000_000):
            with pytest.raises(ValueError, match=r"of at most 256 characters, not 'u{79}$"):
                await sandbox.run_process(["true"], user=user)


@pytest.mark.parametrize("payload", [b"", b"a\0b"])
def test_what_is_no_path_is_a_violation(payload: bytes) -> None:
    with pytest.raises(GuestProtocolError, match="not a path"):
        parse_path(payload)


def test_where_links_lead_may_be_longer_than_a_path_but_not_endless() -> None:
    assert parse_path(b"/x" * 8192).name == "x"
    with pytest.raises(OSError, match="16386 bytes") as caught:
        parse_path(b"/x" * 8193)
    assert caught.value.errno == errno.ENAMETOOLONG
