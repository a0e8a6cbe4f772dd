"""A saved sandbox that no machine was ever behind, for tests of what is done with such ones."""

from __future__ import annotations

from pathlib import Path

import attrs

from trio_sandbox.machines import NamedTemplate


def saved_template(name: str, directory: Path, **fields: object) -> NamedTemplate:
    """Describe one whose files are in *directory*; *fields* say what it has otherwise."""
    template = NamedTemplate(
        name=name,
        directory=directory,
        image="python",
        image_digest="d",
        memory_mib=1,
        vcpus=2,
        machine="m",
        qemu="QEMU",
        marker=b"x" * 16,
        with_memory=False,
        balloon=False,
        mounted=False,
        layer_count=1,
    )
    return attrs.evolve(template, **fields)  # type: ignore[arg-type]
