"""The configurations that the command line asks for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .._config import HostConfig, SandboxConfig
from .._network import Network, NetworkRule


def host_config(options: argparse.Namespace) -> HostConfig:
    """Give the host's configuration as the command line says."""
    return HostConfig(
        cache_dir=options.cache_dir,
        accelerator=options.accelerator,
        require_hardware=options.require_hardware,
        build_images=not options.no_build,
        templates=not options.no_templates,
        proxy=options.proxy,
    )


def sandbox_config(options: argparse.Namespace) -> SandboxConfig:
    """Give the sandbox's configuration as the command line says; `ValueError` where it can't be."""
    return SandboxConfig(memory_mib=options.memory, vcpus=options.vcpus, network=network(options.network))


def network(wanted: Sequence[NetworkRule | None]) -> Network:
    """Give the policy that the arguments of ``--network`` ask for together."""
    rules = tuple(rule for rule in wanted if rule is not None)
    if len(rules) < len(wanted):
        return Network.open(*rules)
    return Network.allow(*rules) if rules else Network.none()
