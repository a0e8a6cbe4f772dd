"""Is there an accelerator that a guest ran on?"""

from __future__ import annotations

from trio_sandbox import HostConfig
from trio_sandbox.image import default_cache_directory
from trio_sandbox.qemu import detect_accelerator, open_runtime


async def prove_hardware(config: HostConfig) -> None:
    """Return if a host of *config* would run its guests on hardware.

    Raises:
      HardwareRequiredError: if not; the message says why.

    """
    async with open_runtime(config.runtime_dir) as runtime:
        # The verdict is remembered in the cache directory: each further test costs little.
        await detect_accelerator(
            config.accelerator,
            require_hardware=True,
            cache_dir=config.cache_dir or default_cache_directory(),
            environment=runtime.environment,
            timeouts=config.timeouts,
        )
