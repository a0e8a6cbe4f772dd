"""The image `data`: what its lock says, and what it is short for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import trio_sandbox
from trio_sandbox import Image, PackagesError
from trio_sandbox._image_steps import PackagesStep
from trio_sandbox.image import IMAGES, LOCKED, spell_out
from trio_sandbox.image._pylock import parse_lock

DIRECTORY = Path(trio_sandbox.__file__).parent / "image"
#: Wheels that run in an image: of its Python or of any, for its processor or for any.
FITTING = re.compile(r"(cp313-cp313|cp3\d+-abi3|py3|py2\.py3)-")


@pytest.mark.parametrize("name", LOCKED)
def test_the_lock_has_what_was_asked_for_from_where_everybody_finds_it(name: str) -> None:
    text = (DIRECTORY / f"pylock.{name}.toml").read_text("utf-8")
    lock = parse_lock(text)
    wanted = [line for line in (DIRECTORY / f"{name}.in").read_text().splitlines() if line and line[0] != "#"]
    assert set(wanted) <= {pin.name for pin in lock.pins}
    packages: list[Any] = tomllib.loads(text)["packages"]
    for package in packages:
        assert package["wheels"]
        for wheel in package["wheels"]:
            assert wheel["url"].startswith("https://files.pythonhosted.org/packages/")
            assert FITTING.search(wheel["url"]), wheel["url"]
    assert IMAGES[LOCKED[name]].python == "3.13"


def test_the_name_is_short_for_another_image_with_these_very_files() -> None:
    whole = spell_out("data")
    assert isinstance(whole, Image)
    assert whole.name == "python"
    (step,) = whole.steps
    assert isinstance(step, PackagesStep)
    assert all(re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+", each) for each in step.requirements)
    assert all(re.fullmatch("[0-9a-f]{64}", each) for each in step.digests)
    assert str(whole) == "python, the packages of data"
    assert spell_out("data") == whole
    longer = spell_out(Image("data").packages("rich"))
    assert isinstance(longer, Image)
    assert longer.steps == (step, *Image("python").packages("rich").steps)
    for other in ("python", Image("node").script("true")):
        assert spell_out(other) is other


def test_only_files_of_the_lock_are_taken() -> None:
    digests = ["a" * 64, "b" * 64]
    wheels = ", ".join(
        f'{{url = "https://a/x-1-py3-none-any.whl", hashes = {{sha256 = "{each}"}}}}' for each in digests
    )
    lock = parse_lock(f'lock-version = "1.0"\npackages = [{{name = "x", version = "1", wheels = [{wheels}]}}]')
    assert lock.only(set(digests)) == lock
    fewer = lock.only({digests[0], "c" * 64})
    assert digests[0] in fewer.text
    assert digests[1] not in fewer.text
    with pytest.raises(PackagesError, match="x 1 is in the index with other files than those of the lock"):
        lock.only({"c" * 64})
