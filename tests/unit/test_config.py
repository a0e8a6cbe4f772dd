"""What configurations take, and what they say of all else: the field, the limit, the value."""

from __future__ import annotations

import inspect
import math
import typing
from pathlib import Path
from typing import Any

import attrs
import pytest

from trio_sandbox import HostConfig, SandboxConfig, Timeouts, open_sandbox
from trio_sandbox._config import SandboxFields, sandbox_config
from trio_sandbox.constants import MAXIMUM_VCPUS, MINIMUM_DISK_MIB, MINIMUM_MEMORY_MIB
from trio_sandbox.host import Host, check_image
from trio_sandbox.machines import fit
from trio_sandbox.machines._fit import boots_anew, saved_config

WHOLE = (True, False, 1.0, math.inf, "1", None, [1])
FLAGS = (1, 0, "yes", None, math.nan)
SECONDS = (True, "5", [5], b"5", 1j)

#: Values of the wrong kind for each field, and how the message begins.
WRONG_KINDS: dict[type, dict[str, tuple[tuple[object, ...], str]]] = {
    HostConfig: {
        "cache_dir": ((5, b"/x", True, ["/x"]), "must be a path, str or Path, not "),
        "runtime_dir": ((5, b"/x", True, ["/x"]), "must be a path, str or Path, not "),
        "accelerator": ((), ""),
        "require_hardware": (FLAGS, "must be True or False, not "),
        "confinement": ((), ""),
        "memory_budget_mib": ([x for x in WHOLE if x is not None], "must be a whole number of MiB, not "),  # type: ignore[dict-item]
        "memory_overcommit": ((True, "2", None, [2], 1j), "must be a number, not "),
        "vcpu_budget": ([x for x in WHOLE if x is not None], "must be a whole number, not "),  # type: ignore[dict-item]
        "disk_budget_mib": ([x for x in WHOLE if x is not None], "must be a whole number of MiB, not "),  # type: ignore[dict-item]
        "build_images": (FLAGS, "must be True or False, not "),
        "image_budget_mib": ([x for x in WHOLE if x is not None], "must be a whole number of MiB, not "),  # type: ignore[dict-item]
        "templates": (FLAGS, "must be True or False, not "),
        "template_budget_mib": (WHOLE, "must be a whole number of MiB, not "),
        "warm": ((5, "python", None), "must be a mapping from images to numbers, not "),
        "proxy": ((5, b"http://proxy", True), "must be str, not "),
        "ca_certificates": ((5, b"/x", True, ["/x"]), "must be a path, str or Path, not "),
        "cgroup": ((5, None, True, b"/x"), "must be a path, str or Path, not "),
        "timeouts": ((5, None, {"boot": 5}), "must be a Timeouts, not "),
        "progress": ((5, None, "print"), "must be a function, not "),
    },
    SandboxConfig: {
        "memory_mib": (WHOLE, "must be a whole number of MiB, not "),
        "vcpus": (WHOLE, "must be a whole number, not "),
        "disk_mib": ([x for x in WHOLE if x is not None], "must be a whole number of MiB, not "),  # type: ignore[dict-item]
        "max_output_bytes": (WHOLE, "must be a whole number of bytes, not "),
        "hibernate_after": (SECONDS, "must be a number of seconds, not "),
        "reclaim_after": (SECONDS, "must be a number of seconds, not "),
        "warmup": ((5, None, b"import x", Path("x")), "must be str, not "),
        "guest_namespaces": (FLAGS, "must be True or False, not "),
        "network": (("pypi.org", None, ["pypi.org"]), "must be a Network, such as Network.allow('pypi.org'), not "),
        "mounts": (
            (5, "x", ["/x"], None),
            "must be a mapping from places in the guest to directories, as in {'/data': '/srv/data'}, not ",
        ),
    },
    Timeouts: {field.name: ((*SECONDS, None), "must be a number of seconds, not ") for field in attrs.fields(Timeouts)},
}

#: Values of the right kind that are out of range, and the whole of what is said of them.
OUT_OF_RANGE = [
    (HostConfig, "cache_dir", "", "must be the path of a directory, not ''"),
    (HostConfig, "ca_certificates", "", "must be the path of a file, not ''"),
    (HostConfig, "runtime_dir", "a\0b", "must be the path of a directory, not 'a\\x00b'"),
    (HostConfig, "accelerator", "hvf", "must be 'auto', 'kvm' or 'tcg', not 'hvf'"),
    (HostConfig, "accelerator", ["kvm"], "must be 'auto', 'kvm' or 'tcg', not ['kvm']"),
    (HostConfig, "accelerator", None, "must be 'auto', 'kvm' or 'tcg', not None"),
    (HostConfig, "confinement", "none", "must be 'best' or 'require', not 'none'"),
    (HostConfig, "confinement", True, "must be 'best' or 'require', not True"),
    (HostConfig, "cgroup", "best", "must be 'auto', 'off' or the absolute path of a control group, not 'best'"),
    (HostConfig, "memory_budget_mib", 0, "must be at least 1 MiB, not 0"),
    (HostConfig, "memory_overcommit", 0.99, "must be from 1 to 32, not 0.99"),
    (HostConfig, "memory_overcommit", 33, "must be from 1 to 32, not 33"),
    (HostConfig, "memory_overcommit", math.nan, "must be from 1 to 32, not nan"),
    (HostConfig, "memory_overcommit", math.inf, "must be from 1 to 32, not inf"),
    (HostConfig, "vcpu_budget", -1, "must be at least 1, not -1"),
    (HostConfig, "disk_budget_mib", 15, f"must be at least {MINIMUM_DISK_MIB} MiB, not 15"),
    (HostConfig, "image_budget_mib", 0, "must be at least 1 MiB, not 0"),
    (HostConfig, "template_budget_mib", 0, "must be at least 1 MiB, not 0"),
    (SandboxConfig, "memory_mib", 127, f"must be at least {MINIMUM_MEMORY_MIB} MiB, not 127"),
    (SandboxConfig, "vcpus", 0, f"must be from 1 to {MAXIMUM_VCPUS}, not 0"),
    (SandboxConfig, "vcpus", 65, f"must be from 1 to {MAXIMUM_VCPUS}, not 65"),
    (SandboxConfig, "disk_mib", 15, f"must be at least {MINIMUM_DISK_MIB} MiB, not 15"),
    (SandboxConfig, "max_output_bytes", 0, "must be at least 1 bytes, not 0"),
    (SandboxConfig, "hibernate_after", 0, "must be a positive number of seconds, not 0"),
    (SandboxConfig, "reclaim_after", math.nan, "must be a positive number of seconds, not nan"),
    (Timeouts, "boot", 1e16, "must be at most 1e+15 seconds, or math.inf, not 1e+16"),
    (Timeouts, "boot", 10**400, f"must be at most 1e+15 seconds, or math.inf, not 1{'0' * 99}"),
    (Timeouts, "boot", -1, "must be a positive number of seconds, not -1"),
    (Timeouts, "kill", math.nan, "must be a positive number of seconds, not nan"),
]


@pytest.mark.parametrize("kind", WRONG_KINDS)
def test_every_field_says_what_kind_it_takes(kind: type) -> None:
    assert set(WRONG_KINDS[kind]) == {field.name for field in attrs.fields(kind)}
    for name, (values, words) in WRONG_KINDS[kind].items():
        for value in values:
            with pytest.raises(TypeError) as caught:
                kind(**{name: value})
            assert str(caught.value).startswith(f"`{name}` {words}"), (name, value)


@pytest.mark.parametrize(("kind", "name", "value", "words"), OUT_OF_RANGE)
def test_every_field_says_its_limits(kind: type, name: str, value: object, words: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        kind(**{name: value})
    assert str(caught.value) == f"`{name}` {words}"


def test_a_long_value_is_cut_in_a_message() -> None:
    with pytest.raises(TypeError) as caught:
        SandboxConfig(memory_mib="x" * 10_000)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200


def test_the_source_of_a_mount_is_named() -> None:
    with pytest.raises(TypeError, match=r"`mounts\['/data'\]` must be a path, str or Path, not 5"):
        SandboxConfig(mounts={"/data": 5})  # type: ignore[dict-item]


def test_what_is_good_is_taken() -> None:
    assert HostConfig(cache_dir="/x", runtime_dir=Path("/y")).cache_dir == Path("/x")
    assert SandboxConfig(hibernate_after=math.inf, reclaim_after=None).hibernate_after == math.inf
    assert Timeouts(boot=5).boot == 5
    assert [HostConfig(memory_overcommit=value).memory_overcommit for value in (1, 1.5, 32)] == [1, 1.5, 32]


# --- Fields as arguments ---


def test_the_arguments_are_the_fields() -> None:
    fields = attrs.fields_dict(SandboxConfig)
    assert list(SandboxFields.__annotations__) == list(fields)
    hints = typing.get_type_hints(SandboxFields)
    for name, parameter in inspect.signature(SandboxConfig, eval_str=True).parameters.items():
        assert hints[name] == parameter.annotation, name


def test_fields_make_a_configuration() -> None:
    assert sandbox_config(None, {}) is None
    assert sandbox_config(None, {"memory_mib": 512}) == SandboxConfig(memory_mib=512)
    whole = SandboxConfig(memory_mib=512, mounts={"/x": "/y"})
    assert sandbox_config(whole, {}) is whole
    assert sandbox_config(whole, {"memory_mib": 512, "mounts": {"/x": "/y"}}) is whole


@pytest.mark.parametrize(
    ("config", "fields", "words"),
    [
        (
            None,
            {"timeout": 5},
            "opening a sandbox has no `timeout`, and nothing was done: put a deadline around it, `with trio.fail_after(",
        ),
        (None, {"memory": 512}, "there is no argument 'memory'; a sandbox has memory_mib, vcpus, "),
        (None, {"vcpus": True}, "`vcpus` must be a whole number, not True"),
        (SandboxConfig(), {"memory_mib": 512}, "`memory_mib` is 512, and in `config` it is 256: say it once"),
        (SandboxConfig(warmup="x"), {"warmup": ""}, "`warmup` is '', and in `config` it is 'x'"),
        ("python", {}, "`config` must be a SandboxConfig, not 'python'"),
        (HostConfig(), {}, "`config` must be a SandboxConfig, not HostConfig"),
    ],
)
def test_what_contradicts_itself_is_refused(config: Any, fields: dict[str, object], words: str) -> None:
    with pytest.raises(TypeError) as caught:
        sandbox_config(config, fields)
    assert str(caught.value).startswith(words)


def test_a_configuration_in_the_place_of_the_image_is_seen() -> None:
    with pytest.raises(TypeError, match="not a SandboxConfig: pass that as `config=`"):
        check_image(SandboxConfig())
    with pytest.raises(TypeError, match="must be the name of an image, not 5"):
        check_image(5)


def test_both_doors_take_the_same_arguments() -> None:
    one, other = inspect.signature(open_sandbox).parameters, inspect.signature(Host.open_sandbox).parameters
    assert [*one] == [*[name for name in other if name not in ("self", "fields")], "host_config", "fields"]


# --- Saved sandboxes ---


class Saved:
    """What is asked of a saved sandbox."""

    name, image, memory_mib, vcpus, guest_namespaces = "mine", "node", 512, 2, False


@pytest.mark.parametrize(
    ("config", "fields", "wanted"),
    [
        (None, {}, SandboxConfig(memory_mib=512, vcpus=2)),
        (SandboxConfig(max_output_bytes=5), {}, SandboxConfig(memory_mib=512, vcpus=2, max_output_bytes=5)),
        (SandboxConfig(memory_mib=512), {}, SandboxConfig(memory_mib=512, vcpus=2)),
        (
            SandboxConfig(max_output_bytes=5),
            {"max_output_bytes"},
            SandboxConfig(memory_mib=512, vcpus=2, max_output_bytes=5),
        ),
    ],
)
def test_a_saved_sandbox_keeps_its_size_whatever_else_is_said(
    config: SandboxConfig | None, fields: set[str], wanted: SandboxConfig
) -> None:
    assert fit(Saved, "python", config, fields) == ("node", wanted)  # type: ignore[arg-type]


def test_a_saved_sandbox_keeps_its_namespaces() -> None:
    class WithNamespaces(Saved):
        guest_namespaces = True

    for config in (None, SandboxConfig(), SandboxConfig(guest_namespaces=True)):
        assert fit(WithNamespaces, "python", config, ())[1].guest_namespaces  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has guest_namespaces=True, not guest_namespaces=False: "):
        fit(WithNamespaces, "python", SandboxConfig(), {"guest_namespaces"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (SandboxConfig(memory_mib=256), ("memory_mib",)),
        (SandboxConfig(memory_mib=511), ()),
        (SandboxConfig(vcpus=4), ()),
        (SandboxConfig(guest_namespaces=True), ()),
    ],
)
def test_another_size_is_refused(config: SandboxConfig, fields: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="its state fits no other machine, so leave them out"):
        fit(Saved, "python", config, fields)  # type: ignore[arg-type]


def test_more_memory_means_a_boot_from_its_disk() -> None:
    for config, wanted in (
        (SandboxConfig(memory_mib=1024), SandboxConfig(memory_mib=1024, vcpus=2)),
        (SandboxConfig(memory_mib=513, vcpus=4), SandboxConfig(memory_mib=513, vcpus=4)),
    ):
        assert fit(Saved, "python", config, ()) == ("node", wanted)  # type: ignore[arg-type]
        assert boots_anew(Saved, wanted)  # type: ignore[arg-type]
        state = saved_config(Saved, wanted)  # type: ignore[arg-type]
        assert (state.memory_mib, state.vcpus) == (512, 2)
        assert not boots_anew(Saved, state)  # type: ignore[arg-type]


def test_mounts_of_a_saved_sandbox_may_be_new(tmp_path: Path) -> None:
    config = SandboxConfig(mounts={"/data": tmp_path})
    assert fit(Saved, "python", config, ())[1].mounts == {"/data": tmp_path}  # type: ignore[arg-type]
