"""What `SandboxConfig.mounts` may be."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from trio_sandbox import SandboxConfig


def test_places_are_made_plain_and_directories_paths() -> None:
    config = SandboxConfig(mounts={"/data/": "/srv/data", "/a//b/./c": Path("x")})
    assert dict(config.mounts) == {"/data": Path("/srv/data"), "/a/b/c": Path("x")}


def test_a_config_with_mounts_is_a_value() -> None:
    mounts = {"/data": "/srv/data"}
    config = SandboxConfig(mounts=mounts)
    mounts["/more"] = "/srv/more"
    assert dict(config.mounts) == {"/data": Path("/srv/data")}
    assert config == pickle.loads(pickle.dumps(config)) != SandboxConfig()
    assert len({config, SandboxConfig(mounts={"/data": "/srv/data"}), SandboxConfig()}) == 2


@pytest.mark.parametrize(
    ("mounts", "error", "message"),
    [
        ({"data": "/x"}, ValueError, "absolute path below /, not 'data'"),
        ({"/": "/x"}, ValueError, "below /, not '/'"),
        ({"/..": "/x"}, ValueError, "below /, not '/'"),
        ({"//data": "/x"}, ValueError, "not '//data'"),
        ({"/a\0b": "/x"}, ValueError, "absolute path"),
        ({"": "/x"}, ValueError, "not '.'"),
        ({"/proc": "/x"}, ValueError, "must not be in /proc"),
        ({"/a/../sys/b": "/x"}, ValueError, "must not be in /sys, .* '/sys/b'"),
        ({"/dev/shm/x": "/x"}, ValueError, "must not be in /dev"),
        ({"/a": "/x", "/a/": "/y"}, ValueError, "two directories for '/a'"),
        ({"/a": "/x", "/a/b/c": "/y"}, ValueError, "'/a/b/c' is in '/a'"),
        ({f"/{n}": "/x" for n in range(16)}, ValueError, "at most 15, not 16"),
        ({b"/a": "/x"}, TypeError, "must be str, not bytes"),
        ({"/a": 1}, TypeError, "must be a path, str or Path, not 1"),
        (["/a"], TypeError, "`mounts` must be a mapping"),
    ],
)
def test_what_can_not_be_mounted(mounts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SandboxConfig(mounts=mounts)


@pytest.mark.parametrize("field", ["hibernate_after", "reclaim_after"])
def test_seconds_must_be_a_positive_number(field: str) -> None:
    with pytest.raises(TypeError, match=f"`{field}` must be a number of seconds, not '1'"):
        SandboxConfig(**{field: "1"})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=f"`{field}` must be a positive number of seconds, not 0"):
        SandboxConfig(**{field: 0})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
