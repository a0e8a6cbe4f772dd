"""Virtual machines that make layers of images: booted, told what to do as root, and gone; what they wrote is the layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Final, final

import attrs
import trio

from .._config import SandboxConfig, Timeouts
from .._errors import (
    GuestProtocolError,
    ImageBuildError,
    MountError,
    OutcomeUnknownError,
    QemuStorageDaemonError,
    QMPError,
    SandboxClosedError,
    VmError,
)
from .._nurseries import hide_nursery
from .._quote import quote_lines
from ..client import ask, open_process, process_request
from ..constants import BUILD_MEMORY_MIB, OUTPUT_TAIL_BYTES
from ..image import PLACE, LayerJob, Place, ProgramMissingError, open_empty_mounts_disk, write_tree_disk
from ..network import Gateway
from ..qemu import BoundedTail, OverlayPool, Vm, VmManager, forget_backing_file, remove_tree
from ._description import describe_machine
from ._file_requests import ask_file_helper
from ._mounts import mount

_SEALED: Final = b"sealed"
_ROOT: Final = 0
#: More do not make a build faster: most of it is one program after the other.
_MOST_VCPUS: Final = 2
_FAILURES: Final = (
    VmError,
    GuestProtocolError,
    OutcomeUnknownError,
    QemuStorageDaemonError,
    QMPError,
    MountError,
    SandboxClosedError,
)

Report = Callable[[str, float | None], object]


@final
class LayerBuilder:
    """Makes the layers of one host.

    Args:
      machines: What runs virtual machines.
      overlays: What makes their disks.
      environment: `Runtime.environment`.
      timeouts: Bounds on what the guest is asked to do; how long a step takes nobody bounds.

    """

    def __init__(
        self,
        *,
        machines: VmManager,
        overlays: OverlayPool,
        environment: Mapping[str, str],
        timeouts: Timeouts,
    ) -> None:
        self._machines = machines
        self._overlays = overlays
        self._environment = environment
        self._timeouts = timeouts
        self.config: Final = SandboxConfig(
            memory_mib=BUILD_MEMORY_MIB, vcpus=min(_MOST_VCPUS, len(os.sched_getaffinity(0)))
        )
        """What a machine that makes a layer has; it is for the caller to be admitted with that."""

    async def build(self, job: LayerJob, gateway: Gateway, report: Report) -> bytes:
        """Make a layer: its file is complete when this returns. Return the end of what the step printed.

        Cancelled or failed, it leaves no process, and files that are of no use.

        Args:
          job: What to do.
          gateway: What decides on the guest's connections.
          report: Told what is going on.

        Raises:
          ProgramMissingError: if the image has not the program that the step is.
          ImageBuildError: if the step fails, or the machine does; the end of what it printed is in the message.

        """
        try:
            said = await self._build(job, gateway, report)
        except _FAILURES as exc:
            raise ImageBuildError(f"the virtual machine that was to make the layer failed: {exc}") from exc
        # It is always opened with what it stands on, by whoever has both; a path of this machine is of no use elsewhere.
        forget_backing_file(job.overlay)
        return said

    async def _build(self, job: LayerJob, gateway: Gateway, report: Report) -> bytes:
        # No code is run in there: no interpreter is started for it.
        image = attrs.evolve(job.image, languages=())
        machine = describe_machine(image, job.system, self.config, overlay=job.overlay, balloon=False)
        tree = job.work.tree
        size = 0
        filled = trio.Event()

        async def fill() -> None:
            nonlocal size
            await job.work.fill()
            if tree is not None:
                size = await trio.to_thread.run_sync(write_tree_disk, tree, job.mounts)
            filled.set()
            for path in job.work.spent:
                with suppress(OSError):  # whatever stays is removed with all that the build made
                    await trio.to_thread.run_sync(remove_tree, path)

        with ExitStack() as stack, hide_nursery("LayerBuilder.build()"):
            if tree is not None:
                stack.enter_context(open_empty_mounts_disk(job.mounts))
                machine = attrs.evolve(machine, mounts=job.mounts)
            # What the machine finds on its third disk is made while it boots.
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fill)
                await self._overlays.acquire(job.image.top, job.overlay)
                report("booting a VM", None)
                async with self._machines.open_vm(
                    machine, guest_handler=gateway.handler, guest_certificates=gateway.certificates
                ) as vm:
                    await filled.wait()
                    if tree is not None:
                        await mount(vm, [Place(PLACE, 0, size)], patience=self._timeouts.boot)
                    report("working", None)
                    said = await self._work(vm, job, gateway.environment)
                    report("freezing its disk", None)
                    await self._seal(vm)
        return said

    async def _work(self, vm: Vm, job: LayerJob, variables: Mapping[str, str]) -> bytes:
        work = job.work
        await trio.lowlevel.checkpoint()
        for request in work.file_requests:
            await ask_file_helper(vm, request)
        return await self._run(vm, job, variables) if work.program or work.script else b""

    async def _run(self, vm: Vm, job: LayerJob, variables: Mapping[str, str]) -> bytes:
        command = job.work.command
        request = process_request([*command], env=None, cwd="/", user=_ROOT)
        if variables:
            request["more_env"] = dict(variables)
        try:
            with trio.move_on_after(job.work.patience):
                return await self._collect(vm, request, job.work.most_output)
        except OSError as exc:
            raise ProgramMissingError(job.image.name, command[0], exc.strerror or str(exc)) from exc
        raise ImageBuildError(
            f"{command[0]} did not end within {job.work.patience:g} s in the image {job.image.name!r}; it is safe to try again"
        )

    async def _collect(self, vm: Vm, request: dict[str, object], most: int) -> bytes:
        """Run a process to its end; return the end of what it printed."""
        tail = BoundedTail(most)
        async with open_process(
            vm,
            request,
            stdin=False,
            stdout=True,
            stderr="stdout",
            terminal=None,
            patience=self._timeouts.kill,
            leaves=False,
        ) as process:
            assert process.stdout is not None
            async for data in process.stdout:
                tail.append(bytes(data))
            status = await process.wait()
        if status != 0:
            why = "was killed for want of memory" if process.oom else f"ended with status {status}"
            said = quote_lines(bytes(tail)[-OUTPUT_TAIL_BYTES:].decode("utf-8", "replace"))
            raise ImageBuildError(f"a step of the image {why}:\n{said}" if said else f"a step of the image {why}")
        return bytes(tail)

    async def _seal(self, vm: Vm) -> None:
        """Have all on the disk, and nothing more written to it."""
        header = {"service": "disk", "seal": True}
        answer = await ask(vm, header, "the end of all writing", most=len(_SEALED), patience=self._timeouts.boot)
        if answer != _SEALED:
            raise GuestProtocolError(f"the guest answered a request to seal its disk with {answer!r}")
        # Stopped, QEMU writes what it knows of the file to the file.
        await vm.qmp.execute("stop")
        # What is written late fails after the program that wrote it has ended well, and is missing in the layer.
        stats = [device["stats"] for device in await vm.qmp.execute("query-blockstats")]
        if any(each["failed_wr_operations"] or each["failed_flush_operations"] for each in stats):
            raise ImageBuildError(
                "what the virtual machine wrote could not be stored: the disk of the cache directory is full or has a fault, and the layer "
                "is given up; free some, or use another cache directory"
            )
