"""What the warm pool does with virtual machines: up and idle, fit for use, and cheap meanwhile."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, final
from weakref import WeakKeyDictionary

from .._config import SandboxConfig, Timeouts
from .._errors import VmError
from .._image import AnyImage
from ..client import ask
from ..image import BuiltImage, SystemDisk
from ..qemu import Vm
from ._launcher import Launcher
from ._warm_up import run_trivial_code

#: Under software emulation whatever a guest does is slow at first: its code has yet to be translated.
_REHEARSALS: Final = 3
#: Seconds that an idle machine has for proving that it is fit for use. A new one takes less than that from a template.
_WAKE_PATIENCE: Final = 1.0
_AWAKE: Final = b"awake"


@final
class WarmVms:
    """Virtual machines for a `WarmPool`.

    Args:
      hold: Yields an image and the system disk, built if need be, which stay for the block.
      launcher: Opens machines.
      timeouts: Bounds on what the guest is asked to do.

    """

    def __init__(
        self,
        hold: Callable[[AnyImage], AbstractAsyncContextManager[tuple[BuiltImage, SystemDisk]]],
        launcher: Launcher,
        timeouts: Timeouts,
    ) -> None:
        self._hold = hold
        self._launcher = launcher
        self._timeouts = timeouts
        self._languages: WeakKeyDictionary[Vm, str] = WeakKeyDictionary()

    async def prepare(self, image: AnyImage) -> None:
        """Have the image and the system disk ready, building them if need be."""
        async with self._hold(image):
            pass

    @asynccontextmanager
    async def open(self, image: AnyImage, config: SandboxConfig) -> AsyncGenerator[Vm]:
        """Open a machine as for a sandbox."""
        async with self._hold(image) as (disk, system), self._launcher.open_machine(disk, system, config) as vm:
            self._languages[vm] = disk.language
            yield vm

    async def settle(self, vm: Vm) -> None:  # noqa: ASYNC910 - each run is one
        """Have the code of a hand-over and of a run translated."""
        for _ in range(_REHEARSALS):
            await _wake(vm, self._timeouts.boot)
            await run_trivial_code(vm, self._languages[vm], self._timeouts)

    async def wake(self, vm: Vm) -> None:
        """Give the guest the time, which proves that all of it works.

        Raises:
          VmError: if it answers anything else.
          SandboxClosedError, OutcomeUnknownError, GuestProtocolError: if it is gone or broken, or does not answer soon.

        """
        await _wake(vm, _WAKE_PATIENCE)
        # It may have heard it late.
        vm.clock.disturb()


async def _wake(vm: Vm, patience: float) -> None:
    # It ran on all the time, but its clock's rate is a guess, and this host's clock may have been set.
    request = {"service": "wake", "time": time.time_ns()}
    answer = await ask(vm, request, "a hand-over", most=len(_AWAKE), patience=patience)
    if answer != _AWAKE:
        raise VmError(f"the guest answered a hand-over with {answer!r}", console=vm.console())
