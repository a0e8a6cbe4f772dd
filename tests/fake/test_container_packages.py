"""Packages for container images, with fake machines in which interpreters say what they are."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Generator, Sequence
from pathlib import Path

import attrs
import pytest
import trio

from tests._index import Index, make_wheel, serve_index
from tests._leaks import cancel_at_every_step, nothing_left
from trio_sandbox import Image, ImageBuildError, ImageMissingError, PackagesError
from trio_sandbox.image import BuiltImage, ImageStore, PackageInstaller, ProgramMissingError, ensure_layers
from trio_sandbox.image._interpreters import python_question
from trio_sandbox.image._stored import ImageSettings

from .test_image_layers import Site, packages
from .test_image_store import TinyRecipe

PLACE = "/run/image-step/content"
MARK = python_question()[-1]
ANSWER: dict[str, object] = {
    "implementation": "cpython",
    "version": "3.12",
    "wide": True,
    "threaded": False,
    "libc": ["musl", "1.2.5"],
    "interpreter": "/opt/venv/bin/python3",
    "site": "/opt/venv/lib/python3.12/site-packages",
    "scripts": "/opt/venv/bin",
    "prefix": "/opt/venv",
    "looked_for": True,
    "installed": [["pip", "24.0"]],
}


def said(**changes: object) -> bytes:
    return f"a greeting\n{MARK}{json.dumps({**ANSWER, **changes})}\n".encode()


@attrs.define
class ContainerSite(Site):
    """A store with one image, which is taken for a container's, owned by the user 1500."""

    async def base(self) -> BuiltImage:
        image = await self.store.ensure("tiny")
        settings = ImageSettings(user=1500, group=1501, directory="/")
        return attrs.evolve(image, settings=settings, system_packages={}, languages=())

    async def ensure(self, image: Image, *, build: bool = True) -> BuiltImage:
        system = await self.store.ensure_system()
        return await ensure_layers(
            self.store,
            image,
            await self.base(),
            system,
            self.run,
            build=build,
            progress=self.progress.append,
            environment={},
        )


def make_site(directory: Path, **changes: object) -> ContainerSite:
    store = ImageStore(directory / "cache", recipes={"tiny": TinyRecipe()}, system=TinyRecipe("system"))
    return ContainerSite(store, answers={"python3": said(**changes)})


CONTAINER = Image.oci("docker://example.org/app:1")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Index]:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for version in ("1.0", "2.0"):
        make_wheel(wheels, "alpha", version, requires=("beta",))
        make_wheel(wheels, "beta", version)
    make_wheel(wheels, "native", "1.0", tag="cp312-cp312-musllinux_1_2_x86_64")
    make_wheel(wheels, "native", "2.0", tag="cp312-cp312-manylinux_2_17_x86_64")
    make_wheel(wheels, "native", "3.0", tag="cp313-cp313-musllinux_1_2_x86_64")
    with serve_index(wheels, monkeypatch) as index:
        yield index


def installed(site: Site, number: int = -1) -> set[str]:
    return {
        name.removeprefix(PLACE) for name in site.seen[number] if name.startswith(PLACE) and "dist-info" not in name
    }


@pytest.mark.parametrize(
    ("libc", "version"), [(["musl", "1.2.5"], "1.0"), (["glibc", "2.17"], "2.0")], ids=["musl", "glibc"]
)
async def test_packages_are_for_the_images_own_python(
    tmp_path: Path, index: Index, libc: list[str], version: str
) -> None:
    site = make_site(tmp_path, libc=libc)
    built = await site.ensure(CONTAINER.packages("native"))
    assert built.packages == {"native": version}
    assert installed(site) == {"/opt/venv/bin/native", "/opt/venv/lib/python3.12/site-packages/native.py"}
    assert site.seen[-1][f"{PLACE}/opt/venv/bin/native"].startswith("#!/opt/venv/bin/python3\n")
    record = site.seen[-1][f"{PLACE}/opt/venv/lib/python3.12/site-packages/native-{version}.dist-info/RECORD"]
    assert "../../../bin/native,sha256=" in record
    # It takes nothing of the image but its Python.
    assert site.jobs[-1].work.command[:3] == ("/opt/venv/bin/python3", "-I", "-c")


async def test_an_image_is_asked_once(tmp_path: Path, index: Index) -> None:
    image = CONTAINER.packages("beta")
    with pytest.raises(ImageMissingError, match="were not chosen yet"):
        await make_site(tmp_path).ensure(image, build=False)
    site = make_site(tmp_path)
    built = await site.ensure(image)
    assert site.asked == ["python3"]
    again = make_site(tmp_path)
    await again.store.prune()
    assert await again.ensure(image, build=False) == built
    assert again.asked == []
    assert again.jobs == []
    # What a script has put there may be another one.
    await again.ensure(CONTAINER.script("make").packages("beta"))
    assert again.asked == ["python3"]
    for stored in again.store.list():
        if stored.step.startswith("packages"):
            await again.store.remove(stored.name)
    await again.store.prune()
    assert list(again.store.pylocks.iterdir()) == []


async def test_what_the_image_has_keeps_its_version(tmp_path: Path, index: Index) -> None:
    site = make_site(tmp_path, installed=[["Beta", "1.0.0"], ["odd", "1.0-custom"]])
    built = await site.ensure(CONTAINER.packages("alpha"))
    assert built.packages == {"alpha": "2.0", "beta": "1.0"}
    assert not any("beta" in name for name in installed(site))
    with pytest.raises(PackagesError, match=r"(?s)what the image has keeps its version: beta==1\.0\.0\nuv says:.*beta"):
        await site.ensure(CONTAINER.packages("beta>=2"))
    # With nothing to add, the image is what it was.
    await site.ensure(CONTAINER.packages("beta"))
    assert site.jobs[-1].work.command == ("/opt/venv/bin/python3", "-V")


async def test_what_a_step_has_changed_is_what_is_there(tmp_path: Path, index: Index) -> None:
    """Whether it was a script that has installed another version, or the interpreter itself."""
    site = make_site(tmp_path)
    first = CONTAINER.packages("beta==1.0")
    assert (await site.base()).languages == ()
    assert (await site.ensure(first)).languages == ("python",)
    site.answers = {"python3": said(installed=[["beta", "2.0"]])}
    built = await site.ensure(first.script("upgrade").packages("alpha"))
    assert built.packages == {"alpha": "2.0", "beta": "2.0"}
    assert not any("beta" in name for name in installed(site))
    assert (await site.store.ensure(built.name)).languages[-1] == "python"
    older = await make_site(tmp_path / "older", version="3.9").ensure(CONTAINER.packages("beta"))
    assert (older.packages, older.languages) == ({"beta": "2.0"}, ())


async def test_an_image_without_python_is_named(tmp_path: Path, index: Index) -> None:
    site = make_site(tmp_path)
    site.answers = {"python3": ProgramMissingError("oci+1", "python3", "No such file"), "node": b""}
    with pytest.raises(PackagesError, match=r"'docker://example\.org/app:1': it has no python3 .*\.script\("):
        await site.ensure(CONTAINER.packages("beta"))
    with pytest.raises(PackagesError, match="its interpreter does not say what it is"):
        await site.ensure(CONTAINER.npm("left-pad"))
    assert list((tmp_path / "cache" / "staging").iterdir()) == []
    with pytest.raises(PackagesError, match="it is pypy"):
        await make_site(tmp_path, implementation="pypy").ensure(CONTAINER.packages("beta"))


async def test_a_machine_that_fails_is_no_answer(tmp_path: Path, index: Index) -> None:
    site = make_site(tmp_path)
    site.answers = {"python3": ImageBuildError("a step of the image ended with status 1")}
    with pytest.raises(ImageBuildError, match="status 1"):
        await site.ensure(CONTAINER.packages("beta"))
    # It is asked again.
    site.answers = {"python3": said()}
    assert (await site.ensure(CONTAINER.packages("beta"))).packages == {"beta": "2.0"}


async def test_asking_that_is_cancelled_leaves_nothing(tmp_path: Path, index: Index) -> None:
    site = make_site(tmp_path)
    base = await site.base()

    async def ask() -> None:
        with nothing_left(), pytest.raises(PackagesError, match="it is pypy"):
            await make_site(tmp_path, implementation="pypy").ensure(CONTAINER.packages("beta"))

    assert await cancel_at_every_step(ask, check=lambda: None) > 5
    assert [entry.name for entry in (tmp_path / "cache" / "store").iterdir() if "+" in entry.name] == []
    assert base.path.exists()


# --- For a sandbox that runs ---


async def packer(site: ContainerSite) -> PackageInstaller:
    system = await site.store.ensure_system()
    return PackageInstaller(
        site.store,
        await site.base(),
        system,
        name=str(CONTAINER),
        build=True,
        progress=site.progress.append,
        environment={},
    )


async def test_packages_for_a_running_container_are_its_users(tmp_path: Path, index: Index) -> None:
    site = make_site(tmp_path)
    asked: list[str] = []

    async def ask(command: Sequence[str]) -> bytes:
        await trio.lowlevel.checkpoint()
        asked.append(command[0])
        return said(installed=[["beta", "1.0"]] if len(asked) > 1 else [])

    installer = await packer(site)
    async with installer.open_archive(packages("alpha"), ask) as packed:
        assert packed is not None
        assert packed.interpreter == "/opt/venv/bin/python3"
        assert packed.unpacking("/usr/bin/python3")[:4] == ("/usr/bin/python3", "-S", "-I", "-c")
        with tarfile.open(packed.archive) as tar:
            members = tar.getmembers()
    names = {member.name for member in members}
    assert {"opt/venv/bin/alpha", "opt/venv/lib/python3.12/site-packages/beta.py"} <= names
    # Of the directories that are not a package's own nothing is said.
    assert not {"opt", "opt/venv", "opt/venv/bin", "opt/venv/lib/python3.12/site-packages"} & names
    assert {(member.uid, member.gid) for member in members} == {(1500, 1501)}
    # It may have something else by now.
    async with installer.open_archive(packages("beta"), ask) as packed:
        assert packed is None
    assert asked == ["python3", "python3"]


async def test_a_running_container_without_python_is_named(tmp_path: Path, index: Index) -> None:
    async def ask(command: Sequence[str]) -> bytes:
        raise FileNotFoundError(2, "No such file", command[0])

    with pytest.raises(PackagesError, match=r"'docker://example\.org/app:1': it has no python3"):
        async with (await packer(make_site(tmp_path))).open_archive(packages("beta"), ask):
            pass
