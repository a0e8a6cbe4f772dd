"""The store with tiny recipes: who builds, what is left of what went wrong, and what is noticed."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest
import trio

from tests._leaks import cancel_at_every_step, nothing_left
from trio_sandbox import (
    ImageBuildError,
    ImageCorruptError,
    ImageError,
    ImageMissingError,
    MissingProgramError,
    Progress,
    SandboxError,
    UnknownImageError,
)
from trio_sandbox.image import BuildContext, ImageStore, default_cache_directory
from trio_sandbox.image._debian_image import IMAGE_NAME
from trio_sandbox.image._lock import open_lock, try_lock
from trio_sandbox.qemu import make_marked


async def write_disk(context: BuildContext) -> None:
    await trio.lowlevel.checkpoint()
    (context.output / IMAGE_NAME).write_bytes(b"disk")


@attrs.define
class TinyRecipe:
    """A recipe that makes one small file, in any way that a test likes."""

    name: str = "tiny"
    contents: str = "1"
    base: TinyRecipe | None = None
    make: Callable[[BuildContext], Awaitable[None]] = write_disk
    built: int = 0

    @property
    def files(self) -> tuple[str, ...]:
        return (IMAGE_NAME,)

    @property
    def languages(self) -> tuple[str, ...]:
        return ("python",)

    def digest(self) -> str:
        return f"{self.contents * 64}"[:64]

    async def build(self, context: BuildContext) -> Mapping[str, object]:
        self.built += 1
        context.report("making it", 0.5)
        await self.make(context)
        return {"virtual_size": 4}


def make_store(directory: Path, *recipes: TinyRecipe) -> ImageStore:
    return ImageStore(directory, recipes={recipe.name: recipe for recipe in recipes}, system=TinyRecipe("system"))


def files_below(directory: Path) -> set[str]:
    """Everything but the locks, which stay."""
    paths = {path.relative_to(directory).as_posix() for path in directory.rglob("*")}
    return {path for path in paths if not path.startswith("locks") and path not in ("store", "staging")}


async def test_an_image_is_built_once_and_then_found(tmp_path: Path) -> None:
    recipe = TinyRecipe()
    told: list[Progress] = []
    image = await make_store(tmp_path / "cache", recipe).ensure("tiny", progress=told.append)
    assert image.name == "tiny"
    assert image.digest == recipe.digest()
    assert image.path.is_absolute()
    assert image.path.read_bytes() == b"disk"
    assert image.path.stat().st_mode & 0o777 == 0o644
    assert image.virtual_size == 4
    assert image.manifest.files[IMAGE_NAME].size == 4
    assert told == [Progress("image tiny", "making it", 0.5), Progress("image tiny", "built", 1.0)]

    told.clear()
    assert await make_store(tmp_path / "cache", recipe).ensure("tiny", build=False, progress=told.append) == image
    assert recipe.built == 1
    assert told == []
    entry = image.path.parent.relative_to(tmp_path / "cache").as_posix()
    assert files_below(tmp_path / "cache") == {
        entry,
        f"{entry}/.trio-sandbox",
        f"{entry}/{IMAGE_NAME}",
        f"{entry}/manifest.json",
        f"{entry}/verified.json",
    }


async def test_another_digest_is_another_image(tmp_path: Path) -> None:
    old = await make_store(tmp_path, TinyRecipe(contents="1")).ensure("tiny")
    new = await make_store(tmp_path, TinyRecipe(contents="2")).ensure("tiny")
    assert old.path != new.path
    assert old.path.exists()


async def test_a_base_is_built_first_and_only_once(tmp_path: Path) -> None:
    base = TinyRecipe("base")
    seen: list[bytes] = []

    async def copy(context: BuildContext) -> None:
        assert context.base is not None
        seen.append((context.base / IMAGE_NAME).read_bytes())
        await write_disk(context)

    await make_store(tmp_path, TinyRecipe(base=base, make=copy)).ensure("tiny")
    await make_store(tmp_path, TinyRecipe(base=base, make=copy, contents="2")).ensure("tiny")
    assert seen == [b"disk", b"disk"]
    assert base.built == 1


async def test_what_is_missing_is_not_built_against_the_callers_will(tmp_path: Path) -> None:
    store = make_store(tmp_path / "cache", TinyRecipe())
    with pytest.raises(ImageMissingError, match="trio-sandbox image build"):
        await store.ensure("tiny", build=False)
    with pytest.raises(ImageMissingError, match="system disk"):
        await store.ensure_system(build=False)
    assert not (tmp_path / "cache").exists()


async def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    store = make_store(tmp_path, TinyRecipe("beta"), TinyRecipe("alpha"))
    assert store.known_names() == ("alpha", "beta")
    for ensure in (store.ensure, store.ensure_bootable):
        with pytest.raises(UnknownImageError, match=r"'gamma'.*alpha, beta"):
            await ensure("gamma")
    assert files_below(tmp_path) == set()


async def test_what_raises_leaves_nothing(tmp_path: Path) -> None:
    async def fail(context: BuildContext) -> None:
        await write_disk(context)
        raise ImageBuildError("the builder's own words")

    recipe = TinyRecipe(make=fail)
    with nothing_left(), pytest.raises(ImageBuildError, match="the builder's own words"):
        await make_store(tmp_path, recipe).ensure("tiny")
    assert files_below(tmp_path) == set()
    recipe.make = write_disk
    await make_store(tmp_path, recipe).ensure("tiny")


@pytest.mark.parametrize("files", [[], [IMAGE_NAME, "surprise"]])
async def test_a_builder_that_makes_other_files_is_found_out(tmp_path: Path, files: list[str]) -> None:
    async def make(context: BuildContext) -> None:
        await trio.lowlevel.checkpoint()
        for name in files:
            (context.output / name).touch()

    with pytest.raises(ImageBuildError, match="did not make what it should"):
        await make_store(tmp_path, TinyRecipe(make=make)).ensure("tiny")
    assert files_below(tmp_path) == set()


async def test_a_cancelled_build_leaves_nothing(tmp_path: Path) -> None:
    recipe = TinyRecipe(base=TinyRecipe("base"))

    async def build() -> None:
        with nothing_left():
            await make_store(tmp_path, recipe).ensure("tiny")

    def check() -> None:
        for entry in (tmp_path / "store").glob("*"):
            assert (entry / "manifest.json").exists()
            assert (entry / IMAGE_NAME).read_bytes() == b"disk"
        assert list((tmp_path / "staging").glob("*")) == []

    assert await cancel_at_every_step(build, check=check) > 5
    await make_store(tmp_path, recipe).ensure("tiny", build=False)


async def test_tasks_share_one_build(tmp_path: Path) -> None:
    proceed = trio.Event()

    async def wait(context: BuildContext) -> None:
        await proceed.wait()
        await write_disk(context)

    recipe = TinyRecipe(make=wait)
    told: list[str] = []

    def progress(progress: Progress) -> None:
        told.append(progress.message)
        if progress.message == "another process is building it":
            proceed.set()

    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(lambda: make_store(tmp_path, recipe).ensure("tiny", progress=progress))
    assert recipe.built == 1
    assert sorted(told) == ["another process is building it", "built", "making it"]


_BUILD_IN_ANOTHER_PROCESS = """
import sys, trio
from pathlib import Path
from tests.fake.test_image_store import TinyRecipe, make_store

async def hang(context):
    (context.output / "half").write_text("half")
    print("building", flush=True)
    await trio.sleep_forever()

trio.run(make_store(Path(sys.argv[1]), TinyRecipe(make=hang)).ensure, "tiny")
"""


@contextmanager
def building_elsewhere(directory: Path) -> Generator[subprocess.Popen[bytes]]:
    """Another process that is in the middle of a build; killed at the end of the block."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-c", _BUILD_IN_ANOTHER_PROCESS, os.fspath(directory)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"building\n"
            yield process
        finally:
            process.kill()


async def test_another_process_is_waited_for_and_its_leftovers_are_removed(tmp_path: Path) -> None:
    recipe = TinyRecipe()
    told: list[str] = []
    with building_elsewhere(tmp_path) as process:
        # Waiting can be cancelled, and takes nothing from the one that builds.
        with trio.CancelScope() as scope:

            def cancel(progress: Progress) -> None:
                told.append(progress.message)
                scope.cancel(reason="the test saw it wait")

            await make_store(tmp_path, recipe).ensure("tiny", progress=cancel)
        assert scope.cancelled_caught
        assert told == ["another process is building it"]
        assert recipe.built == 0
        assert await make_store(tmp_path, recipe).prune() == 0
        assert [path.name for path in (tmp_path / "staging").rglob("half")] == ["half"]

        await make_store(tmp_path, recipe).ensure("tiny", progress=lambda progress: process.kill())
    assert recipe.built == 1
    assert list((tmp_path / "staging").iterdir()) == []


async def test_what_only_looks_like_ours_is_left_alone(tmp_path: Path) -> None:
    store = make_store(tmp_path, TinyRecipe())
    await store.ensure("tiny")
    token = "0" * 16
    names = (
        "store/my-thesis",
        f"store/tiny-{token}",
        f"store/tiny-{'1' * 16}-old",
        "staging/tiny.notes",
        f"staging/tiny.build-{token}",
        f"staging/tiny.removed-{token}",
        f"build-trio-sandbox-{token}",
    )
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("a year of work")
    elsewhere = tmp_path / "elsewhere"
    make_marked(elsewhere)
    for link in (f"store/tiny-{'2' * 16}", f"staging/tiny.build-{'2' * 16}"):
        (tmp_path / link).symlink_to(elsewhere)
    # A note that was damaged, or planted, of a build that was killed.
    killed = tmp_path / f"staging/tiny.build-{'3' * 16}"
    make_marked(killed)
    (killed / "scratch-path").write_text(str(tmp_path / f"build-trio-sandbox-{token}"))
    assert await store.prune() > 0
    assert not killed.exists()
    assert await store.remove("tiny") > 0
    with pytest.raises(UnknownImageError):
        await store.remove("my")
    with pytest.raises(UnknownImageError):
        await store.remove(token)
    assert all((tmp_path / name / "thesis.txt").exists() for name in names)
    assert (elsewhere / ".trio-sandbox").exists()


async def test_what_earlier_versions_built_without_a_mark_can_be_removed(tmp_path: Path) -> None:
    store = make_store(tmp_path, TinyRecipe())
    image = await store.ensure("tiny")
    (image.path.parent / ".trio-sandbox").unlink()
    assert await store.remove("tiny") > 0
    assert files_below(tmp_path) == set()


UNTRUSTED = {
    "the directory": ("", 0o777),
    "the store": ("store", 0o777),
    "the store, for its group": ("store", 0o775),
    "the locks": ("locks", 0o777),
    "the staging directory": ("staging", 0o707),
    "the templates": ("templates", 0o777),
    "what is saved": ("saved", 0o720),
}


@pytest.mark.parametrize(("name", "mode"), UNTRUSTED.values(), ids=UNTRUSTED)
async def test_a_cache_that_others_may_write_to_is_refused(tmp_path: Path, name: str, mode: int) -> None:
    store = make_store(tmp_path / "cache", TinyRecipe())
    await store.ensure("tiny")
    (tmp_path / "cache" / name).mkdir(exist_ok=True)
    (tmp_path / "cache" / name).chmod(mode)
    with pytest.raises(
        ImageError, match=r"can't be used: .* not trusted, since other users may write to it.* --cache-dir"
    ):
        await store.ensure("tiny")
    with pytest.raises(ImageError):
        await store.remove("tiny")
    (tmp_path / "cache" / name).chmod(0o755)
    await store.ensure("tiny")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
@pytest.mark.parametrize("name", ["", "store", "locks"])
async def test_a_cache_of_somebody_else_is_refused(tmp_path: Path, name: str) -> None:
    store = make_store(tmp_path / "cache", TinyRecipe())
    await store.ensure("tiny")
    os.chown(tmp_path / "cache" / name, 12345, 12345)
    with pytest.raises(ImageError, match="not trusted, since it belongs to the user 12345"):
        await store.ensure("tiny")


@pytest.mark.parametrize("name", [".", "manifest.json", IMAGE_NAME])
async def test_an_image_that_others_may_write_to_is_not_used(tmp_path: Path, name: str) -> None:
    store = make_store(tmp_path, TinyRecipe())
    image = await store.ensure("tiny")
    (image.path.parent / name).chmod(0o777)
    with pytest.raises(ImageCorruptError, match="not trusted"):
        await store.ensure("tiny")


async def test_a_verdict_that_others_may_write_to_does_not_count(tmp_path: Path) -> None:
    store = make_store(tmp_path, TinyRecipe())
    image = await store.ensure("tiny")
    verdict = image.path.with_name("verified.json")
    status = image.path.stat()
    image.path.write_bytes(b"evil")
    changed = image.path.stat()
    verdict.write_text(
        verdict.read_text()
        .replace(str(status.st_mtime_ns), str(changed.st_mtime_ns))
        .replace(str(status.st_ctime_ns), str(changed.st_ctime_ns))
    )
    verdict.chmod(0o666)
    with pytest.raises(ImageCorruptError, match="is not what was built"):
        await store.ensure("tiny")


async def test_whatever_the_umask_says_nobody_else_may_write(tmp_path: Path) -> None:
    for umask in (0o000, 0o022, 0o077):
        cache = tmp_path / f"umask-{umask:o}"
        before = os.umask(umask)
        try:
            image = await make_store(cache / "below", TinyRecipe()).ensure("tiny")
        finally:
            os.umask(before)
        modes = {path: path.lstat().st_mode & 0o777 for path in (cache, *cache.rglob("*"))}
        assert all(mode & 0o022 == 0 for mode in modes.values()), modes
        for name in (".", "below", "below/locks", "below/staging"):
            assert modes[cache / name] == 0o700
        assert modes[cache / "below/locks/tiny"] == 0o600
        assert modes[image.path] == 0o644


async def test_no_link_that_somebody_planted_is_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    store = make_store(tmp_path / "cache", TinyRecipe())
    image = await store.ensure("tiny")
    image.path.with_name("verified.json").unlink()
    image.path.with_name(f"verified.json.{os.getpid()}").symlink_to(precious)
    image.path.with_name("verified.json").symlink_to(precious)
    await store.ensure("tiny")
    (tmp_path / "cache/locks/tiny").unlink()
    (tmp_path / "cache/locks/tiny").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        await store.remove("tiny")
    assert precious.read_text() == "mine"


async def test_prune_removes_what_a_killed_build_left(tmp_path: Path) -> None:
    with building_elsewhere(tmp_path):
        pass
    assert list((tmp_path / "staging").iterdir()) != []
    assert await make_store(tmp_path, TinyRecipe()).prune() > 0
    assert list((tmp_path / "staging").iterdir()) == []


def damage(path: Path, kind: str) -> None:
    status = path.stat()
    if kind == "content":
        # As a disk does it: size and time of modification are what they were.
        path.write_bytes(b"dusk")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif kind == "cut short":
        path.write_bytes(b"dis")
    elif kind == "gone":
        path.unlink()


@pytest.mark.parametrize("kind", ["content", "cut short", "gone"])
async def test_damage_is_noticed_and_the_way_out_works(tmp_path: Path, kind: str) -> None:
    store = make_store(tmp_path, TinyRecipe())
    image = await store.ensure("tiny")
    damage(image.path, kind)
    for _ in range(2):  # it is not noticed once, and then believed
        with pytest.raises(ImageCorruptError, match="trio-sandbox image rm tiny"):
            await store.ensure("tiny")
    assert await store.remove("tiny") > 0
    assert (await store.ensure("tiny")).path.read_bytes() == b"disk"


@pytest.mark.parametrize("text", ["", "{}", "[1", None])
async def test_a_damaged_manifest_is_noticed(tmp_path: Path, text: str | None) -> None:
    store = make_store(tmp_path, TinyRecipe())
    manifest = (await store.ensure("tiny")).path.with_name("manifest.json")
    if text is None:
        manifest.unlink()
    else:
        manifest.write_text(text)
    with pytest.raises(ImageCorruptError, match=r"manifest\.json.*trio-sandbox image rm tiny"):
        await store.ensure("tiny")
    assert store.list() == []
    await store.remove("tiny")
    await store.ensure("tiny")


async def test_a_verdict_is_believed_until_somebody_writes(tmp_path: Path) -> None:
    store = make_store(tmp_path, TinyRecipe())
    image = await store.ensure("tiny")
    verdict = image.path.with_name("verified.json")
    # Damage that the verdict vouches for passes: so the file was not read.
    damage(image.path, "content")
    status = image.path.stat()
    state = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    verdict.write_text(json.dumps({IMAGE_NAME: state}))
    await store.ensure("tiny")
    verdict.unlink()
    with pytest.raises(ImageCorruptError):
        await store.ensure("tiny")
    # A copy to another place is read once, and then believed.
    image.path.write_bytes(b"disk")
    await store.ensure("tiny")
    assert json.loads(verdict.read_text())[IMAGE_NAME][4] == image.path.stat().st_ctime_ns


async def test_the_list_says_what_is_current(tmp_path: Path) -> None:
    await make_store(tmp_path, TinyRecipe(contents="1")).ensure("tiny")
    store = make_store(tmp_path, TinyRecipe(contents="2"))
    assert make_store(tmp_path / "nowhere").list() == []
    await store.ensure("tiny")
    await store.ensure_system()
    assert [(entry.name, entry.digest[0], entry.current) for entry in store.list()] == [
        ("system", "1", True),
        ("tiny", "2", True),
        ("tiny", "1", False),
    ]
    assert all(entry.size_bytes > 0 and entry.path.is_dir() for entry in store.list())

    assert await store.prune() > 0
    assert [(entry.name, entry.digest[0]) for entry in store.list()] == [("system", "1"), ("tiny", "2")]


async def test_remove_takes_a_name_or_a_digest(tmp_path: Path) -> None:
    first, second = (make_store(tmp_path, TinyRecipe(contents=digit)) for digit in "12")
    await first.ensure("tiny")
    await second.ensure("tiny")
    with pytest.raises(UnknownImageError, match="tiny-1111111111111111, tiny-2222222222222222"):
        await first.remove("tin")
    with pytest.raises(UnknownImageError):
        await first.remove("222")
    await first.remove("2222222")
    assert [entry.digest[0] for entry in first.list()] == ["1"]
    await second.ensure("tiny")
    await first.remove("tiny")
    assert first.list() == []
    with pytest.raises(UnknownImageError, match="it has: nothing"):
        await first.remove("tiny")
    assert list((tmp_path / "staging").iterdir()) == []


async def test_a_cache_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    # Not a matter of modes, which root would ignore.
    for directory in (tmp_path / "file", Path("/proc/nowhere")):
        with pytest.raises(ImageBuildError, match=r"can't be written.*--cache-dir"):
            await make_store(directory, TinyRecipe()).ensure("tiny")


async def test_a_full_disk_is_said_to_be_full(tmp_path: Path) -> None:
    async def fill(context: BuildContext) -> None:
        await trio.lowlevel.checkpoint()
        (context.output / IMAGE_NAME).symlink_to("/dev/full")
        (context.output / IMAGE_NAME).write_bytes(b"x")

    with pytest.raises(ImageBuildError, match=r"is full.*another cache directory") as info:
        await make_store(tmp_path, TinyRecipe(make=fill)).ensure("tiny")
    assert isinstance(info.value.__cause__, OSError)
    assert files_below(tmp_path) == set()


async def test_both_parts_are_made_at_the_same_time(tmp_path: Path) -> None:
    events = {"tiny": trio.Event(), "system": trio.Event()}

    def meet(name: str, other: str) -> Callable[[BuildContext], Awaitable[None]]:
        async def make(context: BuildContext) -> None:
            events[name].set()
            await events[other].wait()
            await write_disk(context)

        return make

    tiny = TinyRecipe(make=meet("tiny", "system"))
    system = TinyRecipe("system", make=meet("system", "tiny"))
    store = ImageStore(tmp_path, recipes={"tiny": tiny}, system=system)
    image, disk = await store.ensure_bootable("tiny")
    assert image == await store.ensure("tiny", build=False)
    assert disk == await store.ensure_system(build=False)


async def test_one_part_that_fails_ends_the_other(tmp_path: Path) -> None:
    async def hang(context: BuildContext) -> None:
        await trio.sleep_forever()

    async def fail(context: BuildContext) -> None:
        await trio.lowlevel.checkpoint()
        raise MissingProgramError("mke2fs", "e2fsprogs")

    for image, system in ((hang, fail), (fail, hang)):
        store = ImageStore(tmp_path, recipes={"tiny": TinyRecipe(make=image)}, system=TinyRecipe("system", make=system))
        with nothing_left(), pytest.raises(MissingProgramError, match="mke2fs"):
            await store.ensure_bootable("tiny")
        assert files_below(tmp_path) == set()


async def test_a_lock_is_gone_with_its_block(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with nothing_left():
        async with open_lock(path, on_wait=lambda: None):
            with try_lock(path) as held:
                assert not held
        with try_lock(path) as held:
            assert held


def test_the_default_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_directory() == Path("/somewhere/trio-sandbox")
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        monkeypatch.setenv("HOME", "/home/somebody")
        assert default_cache_directory() == Path("/home/somebody/.cache/trio-sandbox")


@pytest.mark.parametrize("home", [None, "", "relative"])
def test_without_a_home_the_password_database_says_where_it_is(
    home: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    assert default_cache_directory() == Path(pwd.getpwuid(os.getuid()).pw_dir, ".cache/trio-sandbox")


def test_a_user_whom_nobody_knows_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(SandboxError, match=r"no user 54321.*--cache-dir"):
        default_cache_directory()
