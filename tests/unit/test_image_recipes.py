"""Recipes, manifests and the agent's files as values."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import attrs
import pytest

from trio_sandbox import ImageCorruptError
from trio_sandbox._stored_json import parse_json
from trio_sandbox.image import _agent_tree, _manifest
from trio_sandbox.image._manifest import Manifest, StoredFile
from trio_sandbox.image._recipes import IMAGES
from trio_sandbox.image._system import SystemRecipe


def test_every_name_is_its_recipes_own() -> None:
    assert {name: recipe.name for name, recipe in IMAGES.items()} == {name: name for name in IMAGES}
    assert "python" in IMAGES


def test_an_images_digest_covers_its_recipe() -> None:
    recipe = IMAGES["python"]
    others = [
        attrs.evolve(recipe, name="other"),
        attrs.evolve(recipe, suite="sid"),
        attrs.evolve(recipe, packages=("bash",)),
        attrs.evolve(recipe, virtual_size=2**30),
    ]
    assert len({recipe.digest(), *(other.digest() for other in others)}) == 5
    assert attrs.evolve(recipe).digest() == recipe.digest()


def test_the_system_disks_digest_covers_its_base() -> None:
    recipe = SystemRecipe()
    assert SystemRecipe().digest() == recipe.digest()
    other = attrs.evolve(recipe, base=attrs.evolve(recipe.base, kernel_suite="sid"))
    assert other.digest() != recipe.digest()


def test_the_system_disks_digest_covers_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    before = SystemRecipe().digest()
    monkeypatch.setattr(_agent_tree, "_MAIN", b"print('another agent')\n")
    assert SystemRecipe().digest() != before
    assert SystemRecipe().base.digest() == SystemRecipe().base.digest()


def test_the_agent_brings_what_it_imports_and_nothing_else() -> None:
    with tarfile.open(fileobj=io.BytesIO(_agent_tree.agent_archive())) as tar:
        members = tar.getmembers()
    names = {member.name for member in members}
    assert {"__main__.py", "trio_sandbox/guest/agent/init.py", "trio_sandbox/wire/__init__.py"} <= names
    assert {"trio/__init__.py", "trio/_core/_run.py", "attr/__init__.py", "attrs/__init__.py"} <= names
    assert {"outcome/__init__.py", "sortedcontainers/__init__.py", "idna/__init__.py", "sniffio/__init__.py"} <= names
    # The host's side, and what only tests use, stay outside.
    assert "trio_sandbox/__init__.py" not in names
    assert not [
        name
        for name in names
        if "_tests" in name or name.startswith("trio_sandbox/sandbox/") or not name.endswith((".py", ".js", ".sh"))
    ]
    assert {(member.mode, member.uid, member.gid, member.mtime) for member in members} == {(0o644, 0, 0, 0)}


MANIFEST = Manifest(
    name="tiny", digest="ab" * 32, created=12.5, files={"disk": StoredFile(size=3, sha256="cd")}, details={"a": [1]}
)


def test_a_manifest_survives_being_written() -> None:
    assert Manifest.from_value(parse_json(MANIFEST.to_json().encode())) == MANIFEST


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        MANIFEST.to_json()[:-20],
        MANIFEST.to_json().replace('"format": 1', '"format": 2'),
        MANIFEST.to_json().replace('"size": 3', '"size": "3"'),
        MANIFEST.to_json().replace('"tiny"', "7"),
        MANIFEST.to_json().replace("12.5", "[]"),
    ],
)
def test_what_is_no_manifest_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format|manifest|damaged|Expecting|Unterminated|delimiter"):
        Manifest.from_value(parse_json(text.encode()))
    directory = tmp_path / "tiny-abab"
    directory.mkdir()
    (directory / _manifest.MANIFEST_NAME).write_text(text)
    with pytest.raises(ImageCorruptError, match="trio-sandbox image rm tiny"):
        _manifest.read_manifest(directory)
