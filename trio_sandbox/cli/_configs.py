"""The configurations that the command line asks for."""

from __future__ import annotations

import argparse

from .._config import HostConfig, SandboxConfig


def host_config(options: argparse.Namespace) -> HostConfig:
    """Give the host's configuration as the command line says."""
    return HostConfig(
        cache_dir=options.cache_dir,
        accelerator=options.accelerator,
        require_hardware=options.require_hardware,
        build_images=not options.no_build,
        templates=not options.no_templates,
    )


def sandbox_config(options: argparse.Namespace) -> SandboxConfig:
    """Give the sandbox's configuration as the command line says; `ValueError` where it can't be."""
    return SandboxConfig(memory_mib=options.memory, vcpus=options.vcpus)
