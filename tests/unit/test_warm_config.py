"""`HostConfig.warm`: what can be asked for."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import attrs
import pytest

from trio_sandbox import HostConfig, SandboxConfig

LARGE = SandboxConfig(memory_mib=512)


def test_each_entry_gets_its_whole_configuration() -> None:
    given: dict[str | tuple[str, SandboxConfig], int] = {"python": 2, ("python", LARGE): 1}
    config = HostConfig(warm=given)
    given["python"] = 1000
    assert config.warm == {("python", SandboxConfig()): 2, ("python", LARGE): 1}
    assert config == HostConfig(warm={("python", LARGE): 1, ("python", SandboxConfig()): 2})
    assert config != HostConfig(warm={"python": 2})


def test_a_configuration_is_a_value_that_travels() -> None:
    config = HostConfig(warm={"python": 1, ("python", LARGE): 0})
    assert hash(attrs.evolve(config)) == hash(config)
    assert attrs.evolve(config, templates=False).warm == config.warm
    assert pickle.loads(pickle.dumps(config.warm)) == config.warm


@attrs.frozen
class Service:
    """What a program's own configuration may look like: the type checkers read this, too."""

    host: HostConfig = attrs.field(factory=HostConfig)


def test_it_is_a_field_of_other_configurations_and_takes_each_kind_of_mapping() -> None:
    assert Service() == Service(HostConfig())
    names: dict[str, int] = {"python": 2}
    whole: dict[tuple[str, SandboxConfig], int] = {("python", SandboxConfig()): 2}
    assert Service(HostConfig(warm=names)) == Service(HostConfig(warm=whole))
    copied = HostConfig(warm=HostConfig(warm=names).warm)
    assert copied.warm == whole


@pytest.mark.parametrize(
    ("warm", "message"),
    [
        (2, "`warm` must be a mapping from images to numbers, not 2"),
        ("python", "`warm` must be a mapping"),
        ({1: 1}, r"a key of `warm` must be an image's name, or a pair \(name, SandboxConfig\), not 1"),
        ({("python", 256): 1}, "a key of `warm` must be"),
        ({("python", LARGE, LARGE): 1}, "a key of `warm` must be"),
        ({"python": True}, r"`warm\['python'\]` must be a number of machines, not True"),
        ({"python": "2"}, "must be a number of machines, not '2'"),
        ({"python": 1.0}, "must be a number of machines, not 1.0"),
    ],
)
def test_of_the_wrong_type(warm: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        HostConfig(warm=warm)


def test_of_the_wrong_value(tmp_path: Path) -> None:
    wrong: list[tuple[Any, str]] = [
        ({"python": -1}, "numbers from 0, not 'python': -1"),
        ({"": 1}, "names of images"),
        ({"python": 1, ("python", SandboxConfig()): 1}, "image 'python' with one and the same configuration twice"),
        ({("python", SandboxConfig(mounts={"/data": tmp_path})): 1}, "no configuration with `mounts`"),
    ]
    for warm, message in wrong:
        with pytest.raises(ValueError, match=message):
            HostConfig(warm=warm)
