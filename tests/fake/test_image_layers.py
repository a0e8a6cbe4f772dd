"""Layers of images, with fake machines that make them: what is shared, who makes them, what is left of what went wrong."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import tarfile
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest
import trio

from tests._index import Index, make_wheel, serve_index
from tests._leaks import cancel_at_every_step, nothing_left
from trio_sandbox import (
    Host,
    Image,
    ImageBuildError,
    ImageMissingError,
    PackagesError,
    Progress,
    UnknownImageError,
    WheelMissingError,
)
from trio_sandbox._image_steps import PackagesStep
from trio_sandbox.cli._image import description, listing
from trio_sandbox.image import PLACE, BuildContext, BuiltImage, ImageStore, LayerJob, PackageInstaller, ensure_layers
from trio_sandbox.image._stored import IMAGE_NAME
from trio_sandbox.machines import Dependents
from trio_sandbox.qemu import remove_tree

from ._host import open_fake_host
from .test_image_store import TinyRecipe

PYTHON = {"python3-minimal": "3.13.5-1", "libc6": "2.41-12"}


@attrs.define
class Base(TinyRecipe):
    """An image that says it has Python."""

    name: str = "python"

    async def build(self, context: BuildContext) -> Mapping[str, object]:
        return {**await TinyRecipe.build(self, context), "packages": PYTHON}


def files_of(tree: Path) -> dict[str, str]:
    """Give the files of a step, by where they are in the guest in the end, or where it finds them."""
    found: dict[str, str] = {}
    for path in tree.rglob("*"):
        if path.suffix == ".tar":
            found.update(packed_files(path))
        elif path.is_file():
            found[f"{PLACE}/{path.relative_to(tree)}"] = path.read_text(errors="replace")
    return found


def packed_files(archive: Path) -> dict[str, str]:
    """Give the files of an archive that is unpacked in /, and where its links lead."""
    found: dict[str, str] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.issym():
                found[f"/{member.name}"] = member.linkname
            elif (file := tar.extractfile(member)) is not None:
                found[f"/{member.name}"] = file.read().decode(errors="replace")
    return found


async def do_nothing(job: LayerJob) -> None:
    await trio.lowlevel.checkpoint()


@attrs.define
class Site:
    """A store, and what stands in for virtual machines: a layer's disk says what was done."""

    store: ImageStore
    jobs: list[LayerJob] = attrs.field(factory=list[LayerJob])
    seen: list[dict[str, str]] = attrs.field(factory=list[dict[str, str]])
    """The files that each job had, by where they are in the guest."""
    before: Callable[[LayerJob], Awaitable[None]] = do_nothing
    after: Callable[[LayerJob], Awaitable[None]] = do_nothing
    progress: list[Progress] = attrs.field(factory=list[Progress])
    answers: Mapping[str, bytes | Exception] = attrs.field(factory=dict[str, bytes | Exception])
    """What programs print, by their names; each is asked once for an image."""
    asked: list[str] = attrs.field(factory=list[str])

    async def run(self, job: LayerJob, report: Callable[[str, float | None], object]) -> bytes:
        await job.work.fill()
        program = job.work.command[0]
        if program in self.answers:
            self.asked.append(program)
            answer = self.answers[program]
            if isinstance(answer, Exception):
                raise answer
            return answer
        self.jobs.append(job)
        report("working", None)
        await self.before(job)
        self.seen.append({} if job.work.tree is None else files_of(job.work.tree))
        job.overlay.write_text(f"{job.image.content}\n{job.work.script}\n{sorted(self.seen[-1].items())}")
        await self.after(job)
        return b""

    async def ensure(self, image: Image, *, build: bool = True) -> BuiltImage:
        base, system = await self.store.ensure_bootable(image.name, build=build)
        return await ensure_layers(
            self.store, image, base, system, self.run, build=build, progress=self.progress.append, environment={}
        )


def make_site(directory: Path) -> Site:
    return Site(ImageStore(directory / "cache", recipes={"python": Base()}, system=TinyRecipe("system")))


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "cache" / "store").iterdir())


async def test_images_that_begin_alike_share_layers(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    first = Image("python").script("one")
    one = await site.ensure(first)
    two = await site.ensure(first.script("two"))
    three = await site.ensure(first.script("three"))
    assert [job.work.script for job in site.jobs] == ["one", "two", "three"]
    assert one.layers == two.layers[:1] == three.layers[:1]
    assert len({one.path, two.path, three.path}) == 1
    assert [job.image.layers for job in site.jobs] == [(), one.layers, one.layers]
    assert len({one.digest, two.digest, three.digest}) == 3
    assert one.layers[0].stat().st_mode & 0o777 == 0o644
    assert one.languages == ("python",)


async def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    image = Image("python").script("one").env({"A": "b"})
    built = await make_site(tmp_path).ensure(image)
    site = make_site(tmp_path)
    with nothing_left():
        assert await site.ensure(image, build=False) == built
    assert site.jobs == []
    assert site.progress == []


async def test_the_same_step_on_another_disk_is_another_layer(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    plain = await site.ensure(Image("python").script("one"))
    other = await site.ensure(Image("python").env({"A": "b"}).script("one"))
    assert plain.layers[-1] != other.layers[-1]
    # The base was built anew, from newer packages: the recipe is the same, the disk is not.
    await site.store.remove("python")

    async def write_another(context: BuildContext) -> None:
        await trio.lowlevel.checkpoint()
        (context.output / IMAGE_NAME).write_bytes(b"newer")

    rebuilt = Site(
        ImageStore(tmp_path / "cache", recipes={"python": Base(make=write_another)}, system=TinyRecipe("system"))
    )
    assert (await rebuilt.ensure(Image("python").script("one"))).digest != plain.digest


async def test_nothing_is_made_against_the_callers_will(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    await site.ensure(Image("python").script("one"))
    for image in (Image("python").script("two"), Image("python").packages("idna")):
        with pytest.raises(ImageMissingError, match="building"):
            await site.ensure(image, build=False)
    assert len(site.jobs) == 1


async def test_a_cancelled_build_leaves_whole_layers_only(tmp_path: Path) -> None:
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "run").write_text("x")
    image = Image("python").files({"/opt/tool": tmp_path / "tool"}).script("one")

    async def build() -> None:
        with nothing_left():
            await make_site(tmp_path).ensure(image)

    def check() -> None:
        store = tmp_path / "cache" / "store"
        for entry in store.glob("*"):
            assert (entry / "manifest.json").exists()
        assert list((tmp_path / "cache" / "staging").glob("*")) == []

    assert await cancel_at_every_step(build, check=check) > 10
    await make_site(tmp_path).ensure(image, build=False)


async def test_what_fails_leaves_the_layers_below(tmp_path: Path) -> None:
    site = make_site(tmp_path)

    async def fail(job: LayerJob) -> None:
        await trio.lowlevel.checkpoint()
        if job.work.script == "two":
            job.overlay.write_text("half")
            raise ImageBuildError("the script's own words")

    site.before = fail
    image = Image("python").script("one").script("two")
    with pytest.raises(ImageBuildError, match="the script's own words"):
        await site.ensure(image)
    assert list((tmp_path / "cache" / "staging").iterdir()) == []
    site.before = do_nothing
    await site.ensure(image)
    assert [job.work.script for job in site.jobs] == ["one", "two", "two"]


@pytest.mark.parametrize("harm", ["changed", "gone", "no manifest"])
async def test_a_damaged_layer_is_made_anew(tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    image = Image("python").script("one").script("two")
    built = await make_site(tmp_path).ensure(image)
    lowest = built.layers[0]
    if harm == "changed":
        lowest.write_text("another disk")
    elif harm == "gone":
        lowest.unlink()
    else:
        (lowest.parent / "manifest.json").unlink()
    site = make_site(tmp_path)
    with caplog.at_level(logging.WARNING):
        again = await site.ensure(image)
    assert "a layer is made anew" in caplog.text
    assert again.layers == built.layers  # the machine that made it did the same again
    assert [job.work.script for job in site.jobs] == ["one"]


_MAKE_IN_ANOTHER_PROCESS = """
import sys, trio
from pathlib import Path
from tests.fake.test_image_layers import make_site
from trio_sandbox import Image

async def hang(job):
    job.overlay.write_text("half")
    print("making", flush=True)
    await trio.sleep_forever()

site = make_site(Path(sys.argv[1]))
site.before = hang
trio.run(site.ensure, Image("python").script("one"))
"""


@contextmanager
def making_elsewhere(directory: Path) -> Generator[subprocess.Popen[bytes]]:
    """Another process that is in the middle of making a layer; killed at the end of the block."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-c", _MAKE_IN_ANOTHER_PROCESS, os.fspath(directory)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"making\n"
            yield process
        finally:
            process.kill()


async def test_another_process_is_waited_for_and_a_killed_one_leaves_nothing(tmp_path: Path) -> None:
    await make_site(tmp_path).store.ensure_bootable("python")
    with making_elsewhere(tmp_path) as process:
        site = make_site(tmp_path)
        # Another layer does not wait for this one.
        await site.ensure(Image("python").script("another"))

        class Told(list[Progress]):
            def append(self, progress: Progress) -> None:
                super().append(progress)
                process.kill()

        site.progress = Told()
        await site.ensure(Image("python").script("one"))
        assert site.progress[0].message == "another process is building it"
    assert [job.work.script for job in site.jobs] == ["another", "one"]
    assert list((tmp_path / "cache" / "staging").iterdir()) == []


async def test_tasks_make_a_layer_once(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    waiting = 0
    proceed = trio.Event()

    async def wait(job: LayerJob) -> None:
        await proceed.wait()

    class Told(list[Progress]):
        def append(self, progress: Progress) -> None:
            nonlocal waiting
            waiting += progress.message == "another process is building it"
            if waiting == 2:
                proceed.set()

    site.before, site.progress = wait, Told()
    await site.store.ensure_bootable("python")
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(site.ensure, Image("python").script("one"))
    assert len(site.jobs) == 1


# --- What is in the store ---


async def test_a_layer_has_a_name(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    built = await site.ensure(Image("python").script("one").script("two"))
    assert built.name.startswith("python+")
    assert await make_site(tmp_path).store.ensure(built.name, build=False) == built
    with pytest.raises(UnknownImageError, match="there is no image"):
        await site.store.ensure("python+000000000000")


async def test_a_layer_without_what_it_stands_on_is_missing(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    built = await site.ensure(Image("python").script("one").script("two"))
    for path in built.layers[0].parent.iterdir():
        path.unlink()
    built.layers[0].parent.rmdir()
    with pytest.raises(ImageMissingError, match=r"depends on a build of 'python.*make it anew from its Image"):
        await site.store.ensure(built.name)
    assert [image.current for image in site.store.list() if image.name == built.name] == [False]
    await site.store.prune()
    assert not built.layers[1].exists()


async def test_the_store_knows_who_stands_on_whom(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    built = await site.ensure(Image("python").script("one\nmore").env({"A": "b"}))
    rows = {image.name: (image.below, image.step, image.current) for image in site.store.list()}
    lower = next(name for name, (below, _, _) in rows.items() if below == "python")
    assert rows == {
        "python": ("", "", True),
        "system": ("", "", True),
        lower: ("python", "script one ...", True),
        built.name: (lower, "environment A", True),
    }
    assert await site.store.prune() == 0  # all of it is of use
    await site.store.remove(lower)
    assert {image.name for image in site.store.list()} == {"python", "system"}
    built = await site.ensure(Image("python").script("one"))
    await site.store.remove("python")
    assert not built.layers[0].exists()


async def test_the_command_line_shows_what_stands_on_what(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    built = await site.ensure(Image("python").env({"A": "b"}))
    rows = listing(site.store, as_json=False).splitlines()
    assert [row for row in rows if "on python: environment A" in row and row.startswith(built.name)]
    assert {each["name"]: each["below"] for each in json.loads(listing(site.store, as_json=True))} == {
        "python": None,
        "system": None,
        built.name: "python",
    }
    lower, upper = json.loads(description(site.store, Dependents(tmp_path / "cache"), built.name))
    assert (lower["name"], lower["packages"]) == ("python", PYTHON)
    assert (upper["name"], upper["step"], upper["below"]["name"]) == (built.name, "environment A", "python")
    with pytest.raises(UnknownImageError, match="'none'; it has: python"):
        description(site.store, Dependents(tmp_path / "cache"), "none")


async def test_a_host_runs_a_script_with_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_bytes(b'# coding: latin-1\n# /// script\n# dependencies = ["alpha"]\n# ///\nprint("\xe9")\n')
    asked: list[tuple[object, ...]] = []

    async def run(self: Host, code: str, *, image: object, check: bool, memory_mib: int, **_: object) -> str:
        await trio.lowlevel.checkpoint()
        asked.append((code, image, check, memory_mib))
        return "the result"

    async with open_fake_host(tmp_path) as host:
        monkeypatch.setattr(Host, "run", run)
        with pytest.raises(FileNotFoundError):
            await host.run_script(tmp_path / "none.py")
        with pytest.raises(TypeError, match="must be the name of an image"):
            await host.run_script(script, image=5)  # type: ignore[arg-type]
        result = await host.run_script(script, check=True, memory_mib=512)
    assert result == "the result"  # type: ignore[comparison-overlap]
    ((code, image, check, memory_mib),) = asked
    assert "print('é')" in str(code).replace('"', "'")
    assert (image, check, memory_mib) == (Image("python").packages("alpha"), True, 512)


# --- Packages ---


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Index]:
    directory = tmp_path / "index"
    directory.mkdir()
    make_wheel(directory, "alpha", "1.0", requires=("beta>=1",))
    make_wheel(directory, "beta", "1.0")
    make_wheel(directory, "beta", "2.0")
    make_wheel(directory, "gamma", "1.0", requires=("beta<2",))
    make_wheel(directory, "other", "1.0", tag="cp313-cp313-win_amd64")
    make_wheel(directory, "native", "1.0", tag="cp313-cp313-manylinux_2_17_x86_64")
    make_wheel(directory, "native", "1.1", tag="cp311-cp311-manylinux_2_17_x86_64")
    (directory / "source-1.0.tar.gz").write_bytes(b"never opened")
    with serve_index(directory, monkeypatch) as index:
        yield index


SITE = "/usr/local/lib/python3.13/dist-packages"


async def test_packages_are_chosen_for_the_image_and_unpacked(tmp_path: Path, index: Index) -> None:
    site = make_site(tmp_path)
    built = await site.ensure(Image("python").packages("alpha", "native"))
    (files,) = site.seen
    assert {name for name in files if name.endswith(".py")} == {
        f"{SITE}/{name}.py" for name in ("alpha", "beta", "native")
    }
    assert files["/usr/local/bin/alpha"].startswith("#!/usr/bin/python3\n")
    assert built.manifest.details["packages"] == {"alpha": "1.0", "beta": "2.0", "native": "1.0"}
    assert "compileall" in site.jobs[0].work.script
    assert [step.message for step in site.progress] == [
        "choosing packages",
        "fetching 3 packages",
        "compiling them",
        "packing them",
        "working",
        "built",
    ]


async def test_an_unchanged_image_asks_nobody(tmp_path: Path, index: Index) -> None:
    image = Image("python").packages("alpha")
    built = await make_site(tmp_path).ensure(image)
    make_wheel(index.directory, "alpha", "2.0")
    index.asked.clear()
    assert await make_site(tmp_path).ensure(image, build=False) == built
    assert index.asked == []
    # What was chosen goes with the last layer that uses it.
    site = make_site(tmp_path)
    await site.store.prune()
    assert await site.ensure(image) == built
    await site.store.remove(built.name)
    await site.store.prune()
    assert list(site.store.pylocks.iterdir()) == []


async def test_a_layer_is_made_again_from_ones_own_cache(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image("python").packages("alpha")
    site = make_site(tmp_path)
    built = await site.ensure(image)
    for offline in ("1", "0"):  # it needs no telling
        await site.store.remove(built.name)
        monkeypatch.setenv("UV_OFFLINE", offline)
        index.asked.clear()
        assert (await site.ensure(image)).digest == built.digest
        assert index.asked == []


async def test_packages_of_earlier_steps_keep_their_versions(tmp_path: Path, index: Index) -> None:
    site = make_site(tmp_path)
    built = await site.ensure(Image("python").packages("beta<2").packages("alpha"))
    assert built.manifest.details["packages"] == {"alpha": "1.0", "beta": "1.0"}
    assert {name for name in site.seen[1] if name.endswith(".py")} == {f"{SITE}/alpha.py"}
    with pytest.raises(PackagesError, match=r"(?s)uv says:.*beta"):
        await site.ensure(Image("python").packages("beta").packages("gamma"))


@pytest.mark.parametrize("damage", ["cut", "emptied"])
async def test_a_damaged_choice_is_made_again(tmp_path: Path, index: Index, damage: str) -> None:
    site = make_site(tmp_path)
    image = Image("python").packages("alpha")
    built = await site.ensure(image)
    (lock,) = site.store.pylocks.iterdir()
    lock.write_text("" if damage == "emptied" else lock.read_text()[:-20])
    assert await site.ensure(image) == built  # and it is the same


@pytest.mark.parametrize(
    ("requirements", "said"),
    [
        (("nowhere",), "nowhere was not found"),
        (("beta==9",), r"there is no version of beta==9"),
        (("gamma", "beta>=2"), "unsatisfiable"),
        (("beta>=one",), "Couldn't parse requirement"),
    ],
)
async def test_what_can_not_be_installed_is_said_in_uvs_words(
    tmp_path: Path, index: Index, requirements: tuple[str, ...], said: str
) -> None:
    site = make_site(tmp_path)
    with nothing_left(), pytest.raises(PackagesError, match=f"(?s)can't be installed together.*uv says:.*{said}"):
        await site.ensure(Image("python").packages(*requirements))
    assert site.jobs == []
    assert list((tmp_path / "cache" / "staging").iterdir()) == []


@pytest.mark.parametrize(("package", "version"), [("other", "1.0"), ("source", "1.0")])
async def test_what_has_no_wheel_is_named_and_never_built(
    tmp_path: Path, index: Index, package: str, version: str
) -> None:
    with pytest.raises(WheelMissingError, match=r"\.script\(") as caught:
        await make_site(tmp_path).ensure(Image("python").packages(f"{package}=={version}"))
    assert caught.value.package == package
    assert caught.value.version in (version, "")
    assert f"/files/source-{version}.tar.gz" not in index.asked


async def test_a_project_of_the_hosts_is_not_built_either(tmp_path: Path, index: Index) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text(
        '[project]\nname = "project"\nversion = "1"\n[build-system]\nrequires = []\nbuild-backend = "backend"\n'
        'backend-path = ["."]\n'
    )
    (project / "backend.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(WheelMissingError):
        await make_site(tmp_path).ensure(Image("python").packages(f"project @ {project.as_uri()}"))
    assert not (tmp_path / "ran").exists()


async def test_an_index_that_lies_is_found_out(tmp_path: Path, index: Index) -> None:
    lock = tmp_path / "pylock.toml"
    digest = hashlib.sha256((index.directory / "beta-2.0-py3-none-any.whl").read_bytes()).hexdigest()
    url = index.url.replace("simple", "files") + "/beta-2.0-py3-none-any.whl"
    wheel = f'{{url = "{url}", hashes = {{sha256 = "{digest}"}}}}'
    lock.write_text(
        f'lock-version = "1.0"\ncreated-by = "test"\nrequires-python = ">=3.13"\n[[packages]]\nname = "beta"\n'
        f'version = "2.0"\nwheels = [{wheel}]\n'
    )
    image = Image("python").packages(lock)
    index.lies["beta-2.0-py3-none-any.whl"] = make_wheel(tmp_path, "beta", "2.0", files={"evil.py": ""}).read_bytes()
    site = make_site(tmp_path)
    with pytest.raises(PackagesError, match=r"(?s)uv says:.*[Hh]ash"):
        await site.ensure(image)
    assert site.jobs == []
    index.lies.clear()
    await site.ensure(image)
    assert f"{SITE}/beta.py" in site.seen[0]


async def test_an_image_that_comes_as_a_lock_takes_its_files_from_the_users_index(tmp_path: Path, index: Index) -> None:
    wheel = (index.directory / "beta-2.0-py3-none-any.whl").read_bytes()
    digest = hashlib.sha256(wheel).hexdigest()

    def data(digest: str) -> Image:
        return Image("python", steps=(PackagesStep(("beta==2.0",), digests=(digest, "0" * 64), label="data"),))

    site = make_site(tmp_path)
    built = await site.ensure(data(digest))
    assert built.packages == {"beta": "2.0"}
    # Another file of that version is not taken, even where one was chosen before.
    with pytest.raises(PackagesError, match=r"beta 2\.0 is in the index with other files than those of the lock"):
        await site.ensure(data("1" * 64))
    assert len(site.jobs) == 1


async def test_a_wheel_that_is_deeper_than_anybody_looks(tmp_path: Path, index: Index) -> None:
    """And it is gone afterwards, so that the next build has room."""
    make_wheel(index.directory, "deep", "1.0", files={"deep/" + "d/" * 1500 + "x.py": "", "more/x.py": ""})
    site = make_site(tmp_path)
    try:
        with nothing_left(), pytest.raises(ImageBuildError, match="too many directories within each other"):
            await site.ensure(Image("python").packages("deep"))
    finally:
        remove_tree(tmp_path / "uv-cache")  # which pytest could not
    assert list((tmp_path / "cache" / "staging").iterdir()) == []
    assert len(entries(tmp_path)) == 2


async def test_places_in_ones_own_directory_are_found(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UV_FIND_LINKS", "index")
    monkeypatch.setenv("UV_NO_INDEX", "1")
    site = make_site(tmp_path)
    built = await site.ensure(Image("python").packages("alpha"))
    assert built.packages == {"alpha": "1.0", "beta": "2.0"}
    assert f"{SITE}/alpha.py" in site.seen[0]


async def test_an_index_out_of_reach_is_named(tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_OFFLINE", "1")
    with pytest.raises(PackagesError, match="uv says:"):
        await make_site(tmp_path).ensure(Image("python").packages("alpha"))


async def test_an_image_without_python_takes_no_packages(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "cache", recipes={"tiny": TinyRecipe()}, system=TinyRecipe("system"))
    with pytest.raises(PackagesError, match="it has no Python"):
        await Site(store).ensure(Image("tiny").packages("alpha"))


# --- Packages for a sandbox that runs ---


async def packer(site: Site, image: BuiltImage) -> PackageInstaller:
    system = await site.store.ensure_system()
    return PackageInstaller(
        site.store, image, system, name="python", build=True, progress=site.progress.append, environment={}
    )


async def ask_nobody(command: Sequence[str]) -> bytes:
    raise AssertionError(f"our own images are known: {command[0]}")


def packages(*requirements: str) -> PackagesStep:
    (step,) = Image("python").packages(*requirements).steps
    assert isinstance(step, PackagesStep)
    return step


async def test_packages_for_a_running_machine_are_the_users(tmp_path: Path, index: Index) -> None:
    site = make_site(tmp_path)
    image = await site.ensure(Image("python").packages("beta<2"))
    async with (await packer(site, image)).open_archive(packages("alpha"), ask_nobody) as packed:
        assert packed is not None
        assert packed.unpacking(packed.interpreter)[0] == "tar"
        with tarfile.open(packed.archive) as tar:
            members = tar.getmembers()
    assert {member.name for member in members if member.isfile() and ".dist-info/" not in member.name} == {
        "usr/local/bin/alpha",
        "usr/local/lib/python3.13/dist-packages/alpha.py",
    }
    assert {(member.uid, member.gid, member.uname) for member in members} == {(1000, 1000, "")}
    # The directories on the way stay whose they are.
    assert {member.name for member in members if member.isdir()} == {
        "usr/local/lib/python3.13/dist-packages/alpha-1.0.dist-info"
    }
    assert list((tmp_path / "cache" / "staging").iterdir()) == []


async def test_what_the_image_has_is_not_installed_again(tmp_path: Path, index: Index) -> None:
    site = make_site(tmp_path)
    image = await site.ensure(Image("python").packages("alpha"))
    named = await site.store.ensure(image.name)  # as a saved sandbox knows it
    for each in (image, named):
        async with (await packer(site, each)).open_archive(packages("beta"), ask_nobody) as archive:
            assert archive is None
    with pytest.raises(PackagesError, match=r"(?s)uv says:.*beta"):
        async with (await packer(site, image)).open_archive(packages("gamma"), ask_nobody):
            pass


async def test_what_goes_wrong_in_the_guest_is_raised_as_it_is(tmp_path: Path, index: Index) -> None:
    site = make_site(tmp_path)
    image, _ = await site.store.ensure_bootable("python")
    with pytest.raises(PermissionError, match="not for you"):
        async with (await packer(site, image)).open_archive(packages("beta"), ask_nobody):
            raise PermissionError(13, "not for you")
    assert list((tmp_path / "cache" / "staging").iterdir()) == []


async def test_packing_that_is_cancelled_leaves_nothing(tmp_path: Path, index: Index) -> None:
    site = make_site(tmp_path)
    image, _ = await site.store.ensure_bootable("python")

    async def pack() -> None:
        with nothing_left():
            async with (await packer(site, image)).open_archive(packages("beta"), ask_nobody):
                await trio.lowlevel.checkpoint()

    def check() -> None:
        assert list((tmp_path / "cache" / "staging").glob("*")) == []

    assert await cancel_at_every_step(pack, check=check) > 10
