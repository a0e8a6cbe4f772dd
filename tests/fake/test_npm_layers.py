"""Packages of Node.js in layers: chosen and fetched by npm from a registry of the test's own, with fake machines."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Generator, Mapping
from pathlib import Path

import attrs
import pytest

from tests._leaks import cancel_at_every_step, nothing_left
from tests._registry import Registry, serve_registry
from trio_sandbox import Image, ImageMissingError, MissingProgramError, PackagesError
from trio_sandbox.image import BuildContext, ImageStore, ensure_layers
from trio_sandbox.image._interpreters import node_question
from trio_sandbox.image._stored import ImageSettings

from .test_image_layers import Base, Site
from .test_image_store import TinyRecipe

pytestmark = pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm (Debian: apt-get install npm)")

PLACE = "/run/image-step"
NODE = Image("node")


@attrs.define
class NodeBase(TinyRecipe):
    """An image that says it has Node.js."""

    name: str = "node"

    async def build(self, context: BuildContext) -> Mapping[str, object]:
        return {**await TinyRecipe.build(self, context), "packages": {"nodejs": "20.19.2+dfsg-1"}}


def make_site(directory: Path) -> Site:
    recipes = {"node": NodeBase(), "python": Base()}
    return Site(ImageStore(directory / "cache", recipes=recipes, system=TinyRecipe("system")))


def versions(site: Site, number: int = -1) -> dict[str, str]:
    """Give what a machine was given to install: versions by places."""
    found = {name: text for name, text in site.seen[number].items() if name.endswith("/version.txt")}
    return {
        name.removeprefix(PLACE).removeprefix("/node_modules/").removesuffix("/version.txt"): found[name]
        for name in found
    }


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Registry]:
    with serve_registry(tmp_path, monkeypatch) as registry:
        for name, version, dependencies in [
            ("left-pad", "1.2.0", {}),
            ("left-pad", "1.3.0", {}),
            ("left-pad", "2.0.0", {}),
            ("app", "1.0.0", {"left-pad": "^1.0.0", "@scope/x": "*"}),
            ("old", "1.0.0", {"left-pad": "1.2.0"}),
            ("@scope/x", "2.0.0", {}),
            ("scope-x", "2.0.0", {}),
        ]:
            files = {"version.txt": version, "cli.js": "#!/usr/bin/env node\n"}
            scripts = {"install": f"touch {tmp_path}/ran", "prepare": f"touch {tmp_path}/ran"}
            programs = {name.rpartition("/")[2]: "cli.js", "evil": "../../../bin/sh"}
            registry.add(name, version, files, dependencies=dependencies, scripts=scripts, bin=programs)
        yield registry
        assert not (tmp_path / "ran").exists()


async def test_packages_are_chosen_and_unpacked(tmp_path: Path, registry: Registry) -> None:
    site = make_site(tmp_path)
    image = NODE.npm("app", "scope-x@2")
    await site.ensure(image)
    assert versions(site) == {"app": "1.0.0", "left-pad": "1.3.0", "@scope/x": "2.0.0", "scope-x": "2.0.0"}
    # Programs of what was asked for are found by name, others by who needs them.
    links = {name.removeprefix(PLACE) for name in site.seen[0] if "bin/" in name}
    assert links == {
        "/usr/local/bin/app",
        "/usr/local/bin/scope-x",
        *(f"/node_modules/.bin/{name}" for name in ("app", "scope-x", "left-pad", "x")),
    }
    assert [step.message for step in site.progress] == [
        "choosing packages",
        "fetching 4 packages",
        "unpacking them",
        "packing them",
        "working",
        "built",
    ]


async def test_an_unchanged_image_asks_nobody(tmp_path: Path, registry: Registry) -> None:
    image = NODE.npm("left-pad@^1")
    await make_site(tmp_path).store.ensure_bootable("node")
    with pytest.raises(ImageMissingError, match=r"npm left-pad@\^1.* were not chosen yet"):
        await make_site(tmp_path).ensure(image, build=False)
    built = await make_site(tmp_path).ensure(image)
    registry.add("left-pad", "1.4.0", {})
    registry.asked.clear()
    site = make_site(tmp_path)
    await site.store.prune()
    assert await site.ensure(image, build=False) == built
    assert registry.asked == []
    await site.store.remove(built.name)
    await site.store.prune()
    assert list(site.store.pylocks.iterdir()) == []


async def test_a_layer_is_made_again_from_npms_cache(tmp_path: Path, registry: Registry) -> None:
    site = make_site(tmp_path)
    built = await site.ensure(NODE.npm("app"))
    await site.store.remove(built.name)
    registry.asked.clear()
    assert (await site.ensure(NODE.npm("app"))).digest == built.digest
    assert registry.asked == []


async def test_a_second_step_adds_what_is_missing(tmp_path: Path, registry: Registry) -> None:
    site = make_site(tmp_path)
    built = await site.ensure(NODE.npm("left-pad@1.2.0").npm("app", "scope-x"))
    assert versions(site, 0) == {"left-pad": "1.2.0"}
    assert versions(site, 1) == {"app": "1.0.0", "@scope/x": "2.0.0", "scope-x": "2.0.0"}
    # On a layer by its name, too.
    named = await site.store.ensure(built.name)
    assert named.npm_lock == built.npm_lock != ""
    await site.ensure(Image(built.name).npm("old"))
    assert versions(site) == {"old": "1.0.0"}


async def test_what_was_asked_for_earlier_stays(tmp_path: Path, registry: Registry) -> None:
    site = make_site(tmp_path)
    with pytest.raises(
        PackagesError, match=r"an earlier step of the image has left-pad@1\.3\.0, .* make that left-pad@2\.0\.0"
    ):
        await site.ensure(NODE.npm("left-pad@1").npm("left-pad@2"))
    assert len(site.jobs) == 1


async def test_a_package_that_makes_room_is_replaced(tmp_path: Path, registry: Registry) -> None:
    site = make_site(tmp_path)
    await site.ensure(NODE.npm("app").npm("left-pad@2"))
    # What was there for another package goes into the directory of that.
    assert versions(site, 1) == {"left-pad": "2.0.0", "app/node_modules/left-pad": "1.3.0"}
    assert site.jobs[1].work.script.startswith("rm -rf /node_modules/left-pad\n")


@pytest.mark.parametrize(
    ("requirement", "message"),
    [
        ("none", r"(?s)can't be installed together.*npm says:.*404"),
        ("left-pad@9", r"(?s)npm says:.*No matching version found for left-pad@9"),
    ],
)
async def test_what_there_is_not(tmp_path: Path, registry: Registry, requirement: str, message: str) -> None:
    site = make_site(tmp_path)
    with pytest.raises(PackagesError, match=message):
        await site.ensure(NODE.npm(requirement))
    assert site.jobs == []
    assert list((tmp_path / "cache" / "staging").iterdir()) == []


async def test_a_registry_out_of_reach_is_named(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:1/")
    with pytest.raises(PackagesError, match=r"(?s)can't be reached.*safe to try again.*npm says:"):
        await make_site(tmp_path).ensure(NODE.npm("app"))


async def test_a_registry_that_lies_is_found_out(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(tmp_path)
    built = await site.ensure(NODE.npm("left-pad@1.3.0"))
    await site.store.remove(built.name)
    # The same version has other content now, with the digest of that.
    registry.add("left-pad", "1.3.0", {"index.js": "evil"})
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "another-cache"))
    with pytest.raises(PackagesError, match=r"left-pad@1\.3\.0 .*is not the one that the lock was made of"):
        await site.ensure(NODE.npm("left-pad@1.3.0"))
    assert len(site.jobs) == 1


@pytest.mark.parametrize("source", ["git+file:///nowhere", "file:/etc", "https://127.0.0.1:1/x.tgz"])
async def test_what_is_of_no_registry_is_refused(tmp_path: Path, registry: Registry, source: str) -> None:
    registry.add("needy", "1.0.0", {}, dependencies={"other": source})
    site = make_site(tmp_path)
    with pytest.raises(PackagesError):
        await site.ensure(NODE.npm("needy"))
    assert site.jobs == []


async def test_packages_for_other_platforms(tmp_path: Path, registry: Registry) -> None:
    registry.add("windows", "1.0.0", {"version.txt": "1.0.0"}, os=["win32"])
    registry.add("chooses", "1.0.0", {"version.txt": "1.0.0"}, optionalDependencies={"windows": "1"})
    site = make_site(tmp_path)
    await site.ensure(NODE.npm("chooses"))
    assert versions(site) == {"chooses": "1.0.0"}


async def test_paths_in_npms_variables_are_of_our_directory(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("npm_config_registry")
    monkeypatch.setenv("npm_config_userconfig", "own-npmrc")
    (tmp_path / "own-npmrc").write_text(f"registry={registry.url}\n")
    site = make_site(tmp_path)
    await site.ensure(NODE.npm("left-pad"))
    assert versions(site) == {"left-pad": "2.0.0"}


async def test_an_image_without_node_takes_no_packages(tmp_path: Path, registry: Registry) -> None:
    site = make_site(tmp_path)
    with pytest.raises(PackagesError, match=r"'python', which has no Node\.js: .*\.apt\('nodejs'\)"):
        await site.ensure(Image("python").npm("app"))
    await site.ensure(Image("python").apt("nodejs").npm("left-pad"))
    assert versions(site) == {"left-pad": "2.0.0"}


@pytest.mark.parametrize("libc", ["glibc", "musl"])
async def test_a_container_gets_what_is_for_its_c_library(tmp_path: Path, registry: Registry, libc: str) -> None:
    for each in ("glibc", "musl"):
        registry.add(f"for-{each}", "1.0.0", {"version.txt": each}, libc=[each], os=["linux"], cpu=["x64"])
    registry.add("native", "1.0.0", {"version.txt": "1"}, optionalDependencies={"for-glibc": "*", "for-musl": "*"})
    site = make_site(tmp_path)
    facts = {"interpreter": "/opt/node", "version": "22.1.0", "architecture": "x64", "libc": libc}
    site.answers = {"node": f"{node_question()[-1]}{json.dumps(facts)}\n".encode()}
    base, system = await site.store.ensure_bootable("python")
    container = attrs.evolve(base, settings=ImageSettings(user=0, group=0, directory="/"), system_packages={})
    for _ in range(2):
        built = await ensure_layers(
            site.store,
            Image.oci("docker://x").npm("native"),
            container,
            system,
            site.run,
            build=True,
            progress=site.progress.append,
            environment={},
        )
        assert built.languages == (*base.languages, "javascript")
    assert site.asked == ["node"]
    # Debian's npm, 9.2, says nothing of C libraries in a lock. Then both are there, and the program takes the one that fits.
    assert {"native": "1", f"for-{libc}": libc}.items() <= versions(site).items()
    # It needs nothing of the image but its Node.js.
    assert site.jobs[-1].work.command[:2] == ("/opt/node", "-e")


async def test_a_host_without_npm_says_so(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("trio_sandbox._programs.SYSTEM_DIRECTORIES", ())
    monkeypatch.setattr("trio_sandbox.image._npm._WHEEL", "no_such_wheel")
    with pytest.raises(MissingProgramError, match=r"npm was not found on PATH; .* pip install 'trio-sandbox\[npm\]'"):
        await make_site(tmp_path).ensure(NODE.npm("app"))


async def test_a_wheel_can_have_npm(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel of the extra has a place of its own for each part; here the parts are this machine's."""
    node, npm = shutil.which("node"), shutil.which("npm")
    assert node is not None
    assert npm is not None
    wheel = tmp_path / "site" / "wheel_of_node"
    for place, part in (("bin/node", Path(node)), ("lib/node_modules/npm", Path(npm).resolve().parents[1])):
        (wheel / place).parent.mkdir(parents=True)
        (wheel / place).symlink_to(part)
    (wheel / "__init__.py").write_text("raise AssertionError('nobody imports it')")
    monkeypatch.setattr("sys.path", [os.fspath(wheel.parent), *sys.path])
    monkeypatch.setattr("trio_sandbox.image._npm._WHEEL", wheel.name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("trio_sandbox._programs.SYSTEM_DIRECTORIES", ())
    site = make_site(tmp_path)
    await site.ensure(NODE.npm("left-pad"))
    assert versions(site) == {"left-pad": "2.0.0"}


async def test_a_build_that_is_cancelled_leaves_nothing(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(tmp_path)
    await site.store.remove((await site.ensure(NODE.npm("left-pad"))).name)  # what was chosen stays
    # npm would take a third of a second each time.
    (archive, _) = registry.packages["left-pad"]["2.0.0"]
    (tmp_path / "archive").write_bytes(archive)
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(
        f'#!/bin/sh\nfor each; do case "$each" in --pack-destination=*) cp {tmp_path}/archive "${{each#*=}}/left-pad-2.0.0.tgz"; esac; done\n'
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:{os.environ['PATH']}")

    async def build() -> None:
        with nothing_left():
            await make_site(tmp_path).ensure(NODE.npm("left-pad"))

    def check() -> None:
        assert list((tmp_path / "cache" / "staging").glob("*")) == []

    assert await cancel_at_every_step(build, check=check) > 10
