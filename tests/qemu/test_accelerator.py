"""The accelerator's proof, with real QEMUs that run a few instructions; no kernel is booted."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import AsyncGenerator
from pathlib import Path

import attrs
import pytest

from tests._leaks import cancel_at_every_step, nothing_left
from trio_sandbox import HardwareRequiredError, MissingProgramError
from trio_sandbox.qemu import (
    Confinement,
    InheritedFds,
    QemuBuild,
    Runtime,
    detect_accelerator,
    open_runtime,
    prove_confinement,
)
from trio_sandbox.qemu._accelerator import prove_kvm, run_probe
from trio_sandbox.qemu._build import inspect_qemu
from trio_sandbox.qemu._machine import base_argv

pytestmark = pytest.mark.qemu

_UNCONFINED = Confinement(network_namespace=False, other_user=False, uid_per_vm=False, no_new_privileges=False)
#: `jmp $` at the reset vector: a guest that runs and never says so.
_ENDLESS = bytes(0xFFF0) + b"\xeb\xfe" + bytes(14)
#: Leaves with another number than the sum that the probe computes.
_WRONG = bytes(0xFFF0) + b"\xb0\x2a\xba\x01\x05\xee\xf4" + bytes(9)


@pytest.fixture
async def runtime() -> AsyncGenerator[Runtime]:
    async with open_runtime(Path("/tmp")) as runtime:
        yield runtime


async def probe(runtime: Runtime, *, deadline: float = 60, firmware: bytes | None = None) -> str | None:
    """Run the probe's guest, or another, under software emulation."""
    confinement = await prove_confinement(runtime.environment)
    return await run_probe(
        await inspect_qemu(runtime.environment),
        base_argv("tcg"),
        prefix=confinement.argv(confinement.choose_uid()),
        inherited=InheritedFds(),
        environment=runtime.environment,
        deadline=deadline,
        firmware=firmware,
    )


async def test_a_guest_runs_confined_under_software_emulation(runtime: Runtime) -> None:
    """It is the probe that is tested: what KVM makes of the same guest is then KVM's doing."""
    with nothing_left():
        assert await probe(runtime) is None


async def test_a_guest_that_computes_something_else_proves_nothing(runtime: Runtime) -> None:
    failure = await probe(runtime, firmware=_WRONG)
    assert failure is not None
    assert "exited with status 85 instead of running a guest" in failure


async def test_a_guest_that_hangs_is_killed_at_the_deadline(runtime: Runtime) -> None:
    with nothing_left():
        failure = await probe(runtime, firmware=_ENDLESS, deadline=0.3)
    assert failure == "a guest of a few instructions did not run within 0.3 s, though QEMU started"


async def test_cancelled_at_every_step_of_a_probe(runtime: Runtime) -> None:
    async def attempt() -> None:
        with nothing_left():
            assert await probe(runtime) is None

    await attempt()
    assert await cancel_at_every_step(attempt, every_task=True) > 4


async def test_the_verdict_about_this_machine_is_told_and_remembered(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    with nothing_left():
        first = await detect_accelerator(cache_dir=cache, environment=runtime.environment)
    assert first.hardware is (first.name == "kvm")
    assert first.reason
    assert os.listdir(cache) == ["accelerator.json"]

    def refuse(*_: object, **__: object) -> str:
        pytest.fail("proved again")

    with monkeypatch.context() as patch:
        patch.setattr("trio_sandbox.qemu._accelerator.prove_kvm", refuse)
        patch.setattr("trio_sandbox.qemu._accelerator.inspect_qemu", refuse)
        assert await detect_accelerator(cache_dir=cache, environment=runtime.environment) == first
        if not first.hardware:
            with pytest.raises(HardwareRequiredError, match="no hardware acceleration: "):
                await detect_accelerator(require_hardware=True, cache_dir=cache, environment=runtime.environment)
            with pytest.raises(HardwareRequiredError, match="no hardware acceleration: "):
                await detect_accelerator("kvm", cache_dir=cache, environment=runtime.environment)


async def test_a_verdict_about_another_boot_is_not_believed(runtime: Runtime, tmp_path: Path) -> None:
    first = await detect_accelerator(cache_dir=tmp_path, environment=runtime.environment)
    path = tmp_path / "accelerator.json"
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | {"key": "0" * 64, "failure": "it is another machine's"}))
    assert await detect_accelerator(cache_dir=tmp_path, environment=runtime.environment) == first
    assert json.loads(path.read_text()) == entry


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"key": 1, "version": null, "failure": 2}', "\x00"])
async def test_a_damaged_cache_is_replaced(
    runtime: Runtime, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "accelerator.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        accelerator = await detect_accelerator(cache_dir=tmp_path, environment=runtime.environment)
    assert "damaged" in caplog.text
    failure = json.loads(path.read_text())["failure"]
    assert failure is None if accelerator.hardware else failure in accelerator.reason


async def test_a_cache_that_can_not_be_written_is_no_error(
    runtime: Runtime, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()  # Not even root can make a directory below it.
    accelerator = await detect_accelerator(cache_dir=tmp_path / "file" / "cache", environment=runtime.environment)
    assert accelerator.reason
    assert "can't remember" in caplog.text


async def test_software_emulation_asked_for(runtime: Runtime) -> None:
    accelerator = await detect_accelerator("tcg", environment=runtime.environment)
    assert accelerator.name == "tcg"
    assert not accelerator.hardware
    with pytest.raises(HardwareRequiredError, match="asked for and refused"):
        await detect_accelerator("tcg", require_hardware=True, environment=runtime.environment)


async def test_kvm_unconfined_is_proved_or_refuted_in_time(runtime: Runtime) -> None:
    """Wherever this runs: KVM works and says so, is missing, or hangs and is killed."""
    build = await inspect_qemu(runtime.environment)
    with nothing_left():
        failure = await prove_kvm(build, _UNCONFINED, environment=runtime.environment, deadline=5)
    if not os.access("/dev/kvm", os.F_OK):
        assert failure == "/dev/kvm does not exist"
    elif not os.access("/dev/kvm", os.R_OK | os.W_OK):
        assert failure is not None
        assert "this user may not open /dev/kvm: join the group" in failure
    else:
        assert failure is None or "instead of running a guest" in failure or "did not run within" in failure


@pytest.mark.skipif(os.geteuid() != 0, reason="only root opens devices for others")
async def test_a_kvm_that_only_root_may_open(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "kvm"
    device.touch(mode=0o600)
    monkeypatch.setattr("trio_sandbox.qemu._accelerator._KVM", device)
    monkeypatch.setattr("trio_sandbox.qemu._confinement._KVM", device)
    confinement = attrs.evolve(_UNCONFINED, other_user=True)
    build = attrs.evolve(await inspect_qemu(runtime.environment), version=(7, 2, 0))
    failure = await prove_kvm(build, confinement, environment=runtime.environment, deadline=5)
    assert failure is not None
    assert "chgrp kvm" in failure


async def test_qemu_not_installed(runtime: Runtime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    confinement = await prove_confinement(runtime.environment)
    assert confinement.describe()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("trio_sandbox._programs.SYSTEM_DIRECTORIES", ())
    with pytest.raises(MissingProgramError, match="apt-get install qemu-system-x86"):
        await detect_accelerator(environment=runtime.environment)


def test_a_build_in_words() -> None:
    assert str(QemuBuild("/usr/bin/qemu", 1, 2, (7, 2, 22))) == "/usr/bin/qemu 7.2.22"
