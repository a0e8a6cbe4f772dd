"""What `test_upgrades` has two versions of the library do with one cache. The other version's process imports it, too."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import trio

from trio_sandbox import SandboxError
from trio_sandbox.image import BuildContext, ImageStore
from trio_sandbox.image._debian_image import IMAGE_NAME
from trio_sandbox.image._recipe import digest_of
from trio_sandbox.machines import LedgerEntry, open_ledger
from trio_sandbox.machines._named import NamedTemplate, NamedTemplateStore
from trio_sandbox.machines._templates import TemplateStore, new_template, template_key


@attrs.define
class TinyRecipe:
    """A recipe that makes one small file."""

    name: str = "tiny"
    base: None = None
    built: int = 0

    @property
    def files(self) -> tuple[str, ...]:
        return (IMAGE_NAME,)

    @property
    def languages(self) -> tuple[str, ...]:
        return ("python",)

    def digest(self) -> str:
        return digest_of("tiny")

    async def build(self, context: BuildContext) -> Mapping[str, object]:
        self.built += 1
        await trio.lowlevel.checkpoint()
        (context.output / IMAGE_NAME).write_bytes(b"disk")
        return {}


async def use_cache(cache: Path, name: str, *, save: bool = True) -> dict[str, Any]:
    """Have an image, a template and a saved sandbox *name*, made if need be and *save*; return what was made."""
    recipe = TinyRecipe()
    image = await ImageStore(cache, recipes={"tiny": recipe}, system=recipe).ensure("tiny")
    templates, named = TemplateStore(cache, budget_mib=100), NamedTemplateStore(cache)
    key, made = template_key("machine"), 0
    if templates.find(key) is None:
        made = 1
        wanted = new_template(key, image="tiny", memory_mib=1, vcpus=1, warmup="")
        with templates.lock(key) as held, templates.make(wanted) as staged:
            assert held
            staged.devices.write_bytes(b"devices")
            staged.overlay.touch()
        templates.evict()
    template = templates.find(key)
    assert template is not None
    if save:
        with named.make(name, memory_mib=1, replace=True) as saving:
            saving.template = _describe(name, saving.directory)
            for path in saving.template.files:
                path.write_bytes(b"saved")
    found = named.find(name)
    return {
        "built": recipe.built,
        "made": made,
        "image": os.fspath(image.path),
        "template": os.fspath(template.directory),
        "saved": os.fspath(found.directory),
    }


def _describe(name: str, directory: Path) -> NamedTemplate:
    return NamedTemplate(
        name=name,
        directory=directory,
        image="tiny",
        image_digest="d",
        memory_mib=1,
        vcpus=1,
        machine="m",
        qemu="q",
        marker=b"x" * 16,
        with_memory=False,
        balloon=False,
        mounted=False,
        layer_count=1,
    )


def main(cache: str, ledgers: str) -> None:
    """Use the cache once for each line of standard input, and answer with what came of that."""
    with open_ledger(Path(ledgers)) as ledger:
        ledger.publish(LedgerEntry(pid=os.getpid(), memory_total=100, memory_reserved=9))
        for _ in sys.stdin:
            answer = trio.run(use_cache, Path(cache), "theirs")
            try:
                NamedTemplateStore(Path(cache)).find("ours")
            except SandboxError as exc:
                answer["refused"] = str(exc)
            answer["elsewhere"] = sum(entry.memory_reserved for entry in ledger.others())
            print(json.dumps(answer), flush=True)
