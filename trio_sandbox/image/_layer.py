"""Layers: what one step adds to an image, made by a virtual machine of that image whose disk is then frozen.

Nothing is done as root on the host. Whatever a step is, it is a program or a shell script that runs as root in the guest, or what our own file
helper does there, and a directory that these read; the machine's overlay becomes the layer.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final, Protocol, final

import attrs
import trio

from .._errors import ImageBuildError
from .._network import Network
from ..constants import OUTPUT_TAIL_BYTES
from ._recipe import BuildContext, StandsAlone, digest_of
from ._stored import IMAGE_NAME, BuiltImage, SystemDisk
from ._uv import Report

#: Between the name of the image below and the layer's own digits.
LAYER_MARK: Final = "+"
_NAME_DIGITS: Final = 12
SHELL: Final = "/bin/sh"
#: Where the guest finds the directory of a step: in memory, so that nothing of it stays.
PLACE: Final = "/run/image-step"
_WITHOUT_SHELL: Final = (
    ". Only .files(), .env(), .packages() and .npm() do without a shell: take an image that has one, have an earlier step bring one "
    "(.files({'/bin/sh': 'busybox'}), of a static busybox), or have the container image do the step itself"
)


@final
@attrs.frozen(kw_only=True)
class Work:
    """What a virtual machine does to make a layer."""

    script: str = ""
    """Run by ``sh -e`` as root, in /; "": nothing is."""
    program: tuple[str, ...] = ()
    """Run in place of the script, with its arguments, where there may be no shell."""
    file_requests: tuple[tuple[str, ...], ...] = ()
    """What our own file helper is asked to do first, as root: operations with their arguments, for which the image needs no program."""
    tree: Path | None = None
    """A directory of ours; it finds a copy at `PLACE`, which is root's."""
    fill: Callable[[], Awaitable[None]] = attrs.field(default=trio.lowlevel.checkpoint, eq=False)
    """Makes the directory complete; the machine may boot meanwhile."""
    spent: tuple[Path, ...] = ()
    """Directories of ours that nobody needs once that is copied: removed while the machine works."""
    network: Network = attrs.field(factory=Network.none)
    """What the script may reach."""
    most_output: int = OUTPUT_TAIL_BYTES
    """Bytes of the end of what it prints that are kept."""
    patience: float = math.inf
    """Seconds that it may take."""
    details: Mapping[str, object] = attrs.field(factory=dict[str, object])
    """What the manifest is to say."""

    @property
    def command(self) -> tuple[str, ...]:
        """The command line."""
        return self.program or (SHELL, "-e", "-c", self.script)


@final
@attrs.frozen(kw_only=True)
class LayerJob:
    """What a virtual machine is opened for, to make a layer."""

    image: BuiltImage
    """What it stands on."""
    system: SystemDisk
    work: Work
    overlay: Path
    """The new file for what it writes to its disk: complete, and nobody's any more, when the job is done."""
    mounts: Path
    """The new file for the disk of `Work.tree`; of no use afterwards."""


RunLayer = Callable[[LayerJob, Report], Awaitable[bytes]]
"""Has a job done; returns the end of what it printed. Raises `ProgramMissingError` if the image has not the program."""


class ProgramMissingError(ImageBuildError):
    """The image has not the program that a step of it is to run."""

    def __init__(self, image: str, program: str, reason: str) -> None:
        super().__init__(
            f"a step of the image needs {program}, which can't be started in the image {image!r}: {reason}"
            + (_WITHOUT_SHELL if program == SHELL else "")
        )
        self.program = program


class Content(Protocol):
    """What a step is once all is known that decides what it makes."""

    def key(self) -> object:
        """Return that as JSON values."""
        ...

    async def prepare(self, context: BuildContext) -> Work:
        """Return what is to be done; files of it are in `BuildContext.staging`."""
        ...


@final
@attrs.frozen(kw_only=True)
class LayerRecipe(StandsAlone):
    """How to make a layer: a recipe for the store."""

    image: BuiltImage
    """What it stands on."""
    system: SystemDisk = attrs.field(eq=False)
    content: Content
    step: str
    """In words."""
    run: RunLayer = attrs.field(eq=False)

    @property
    def name(self) -> str:
        """What it can be called: each layer has a name, and a lock, of its own."""
        return layer_name(self.image.name, self.digest())

    @property
    def files(self) -> tuple[str, ...]:
        """The one disk."""
        return (IMAGE_NAME,)

    @property
    def languages(self) -> tuple[str, ...]:
        """Those of the image below."""
        return self.image.languages

    def digest(self) -> str:
        """Return a digest of the step and of the very disk that it stands on."""
        return digest_of("layer", self.image.content, self.content.key())

    async def build(self, context: BuildContext) -> Mapping[str, object]:
        """Make the layer."""
        work = await self.content.prepare(context)
        overlay = context.output / IMAGE_NAME
        job = LayerJob(
            image=self.image, system=self.system, work=work, overlay=overlay, mounts=context.staging / "mounts"
        )
        await self.run(job, context.report)
        return {
            **work.details,
            "step": self.step,
            "below": {"name": self.image.name, "content": self.image.content},
            "virtual_size": self.image.virtual_size,
        }


def layer_name(image: str, digest: str) -> str:
    """Return the name of the layer with that digest, on an image or on another layer."""
    return f"{image.partition(LAYER_MARK)[0]}{LAYER_MARK}{digest[:_NAME_DIGITS]}"
