"""What of a configuration goes to nodes; what can't go there is refused before anything is started."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, get_args

import attrs
import pytest

from trio_sandbox import HostConfig, Image, Network, NetworkRule, Progress, SandboxConfig
from trio_sandbox._image_steps import Step
from trio_sandbox.fleet import FleetConfig, _travel, open_ray_host
from trio_sandbox.fleet._messages import decode_all, encode


async def dial(*_: object) -> Any:
    raise NotImplementedError


def calls_back() -> Network:
    return Network.allow(NetworkRule("registry.inside", to=dial))


def by_script(image: Image) -> Image:
    return image.script("make install", network=calls_back())


def by_apt(image: Image) -> Image:
    return image.apt("graphviz", network=calls_back())


@pytest.mark.parametrize("make", [by_script, by_apt])
def test_an_image_that_calls_back_does_not_travel(make: Callable[[Image], Image]) -> None:
    with pytest.raises(ValueError, match=r"NetworkRule\('registry.inside'\) has a function of this program"):
        _travel.check_travels(make(Image("python")))


def test_images_of_every_kind_travel(tmp_path: Path) -> None:
    (tmp_path / "pylock.toml").write_text("lock-version = '1.0'")
    network = Network.allow("pypi.org", NetworkRule("registry.inside", to=("10.0.0.1", 5000)), max_sent_bytes=1000)
    image = (
        Image.oci("docker://python:3.13-slim")
        .packages("idna", exclude_newer=date(2026, 11, 1))
        .packages(tmp_path / "pylock.toml")
        .npm("zod")
        .apt("graphviz")
        .apt("nginx", network=network)
        .env({"A": "1"})
        .files({"/opt/tool": tmp_path})
        .script("make install", network=network)
        .script("make more", network=Network.open())
    )
    assert {type(step) for step in image.steps} == set(get_args(Step)), "each kind of step is here"
    assert decode_all(encode(_travel.check_travels(image))) == [image]


def test_a_configuration_travels_whole(tmp_path: Path) -> None:
    config = SandboxConfig(
        memory_mib=512,
        vcpus=2,
        disk_mib=1000,
        max_output_bytes=7,
        hibernate_after=3,
        reclaim_after=None,
        warmup="import json",
        guest_namespaces=True,
        network=Network.allow("pypi.org"),
        mounts={"/data": tmp_path},
    )
    default = attrs.asdict(SandboxConfig(), recurse=False)
    assert not [name for name, value in attrs.asdict(config, recurse=False).items() if value == default[name]]
    assert decode_all(encode(config)) == [config]


def test_a_node_keeps_ready_what_it_will_be_asked_for() -> None:
    """Networks and idleness are the program's: a node never hears of them, nor of the secrets in them."""
    secret = Network.allow(NetworkRule("api.github.com", secrets={"TOKEN": "a secret value"}))
    configs = [
        SandboxConfig(),
        SandboxConfig(network=secret),
        SandboxConfig(hibernate_after=3),
        SandboxConfig(memory_mib=512, network=Network.open()),
    ]
    there = _travel.host_there(HostConfig(warm={("python", config): 1 for config in configs}))
    assert there.warm == {("python", SandboxConfig()): 3, ("python", SandboxConfig(memory_mib=512)): 1}
    assert {("python", _travel.sandbox_there(config)) for config in configs} == set(there.warm)


def test_all_else_of_a_host_travels_and_its_progress_does_not() -> None:
    told: list[Progress] = []
    config = HostConfig(memory_budget_mib=1000, templates=False, progress=told.append)
    there = _travel.host_there(config)
    assert there == config
    there.progress(Progress("stage", "message"))
    assert told == []


BAD: list[tuple[dict[str, object], type[Exception], str]] = [
    ({"config": 0}, TypeError, "`config` must be a HostConfig, not 0"),
    ({"config": {}}, TypeError, "`config` must be a HostConfig"),
    ({"config": SandboxConfig()}, TypeError, "`config` must be a HostConfig"),
    ({"fleet": ""}, TypeError, "`fleet` must be a FleetConfig"),
    ({"fleet": HostConfig()}, TypeError, "`fleet` must be a FleetConfig"),
    ({"address": 6379}, TypeError, "`address` must be str or None"),
    ({"address": b"auto"}, TypeError, "`address` must be str or None"),
    ({"address": FleetConfig()}, TypeError, "`address` must be str or None"),
    ({"address": ""}, ValueError, "`address` must be that of Ray's cluster"),
    ({"address": " "}, ValueError, "`address` must be that of Ray's cluster"),
    ({"config": HostConfig(proxy="no proxy")}, ValueError, "proxy"),
    ({"config": HostConfig(ca_certificates="/nonexistent/ca.pem")}, OSError, "ca.pem"),
    ({"config": HostConfig(warm={"oci-archive:app.tar": 1})}, ValueError, "push the image to a registry"),
    ({"config": HostConfig(warm={Image("python").script("make", network=calls_back()): 1})}, ValueError, "a function"),
    ({"config": HostConfig(warm={Image("python").files({"/opt/a": "/srv/a"}): 1})}, ValueError, "`warm` has"),
]


@pytest.mark.parametrize(("arguments", "kind", "text"), BAD, ids=[str(index) for index in range(len(BAD))])
async def test_what_is_wrong_is_said_before_anything_is_started(
    arguments: dict[str, Any], kind: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # so that importing it would fail
    with pytest.raises(kind, match=text):
        async with open_ray_host(**arguments):
            pass
