"""What dead programs left in the cache goes with the next host; what somebody is making, or what only looks like ours, stays."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from trio_sandbox.image import ImageStore, try_lock
from trio_sandbox.machines import NamedTemplateStore, TemplateStore, remove_leftovers
from trio_sandbox.qemu import make_marked

DEAD = (
    f"staging/python.build-{'1' * 16}",
    f"staging/node.removed-{'2' * 16}",
    f"templates/.staging-{'b' * 24}-00000001",
    f"templates/.removed-{'3' * 16}",
    f"saved/mine~{'4' * 16}",
)


class Cache:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.templates = TemplateStore(directory, budget_mib=1000)

    async def clean(self, *, templates: bool = True) -> None:
        images, named = ImageStore(self.directory), NamedTemplateStore(self.directory)
        await remove_leftovers(images, self.templates if templates else None, named, {})

    def there(self, *names: str) -> list[str]:
        return [name for name in names if (self.directory / name).exists()]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    (tmp_path / "locks").mkdir(0o700)
    for name in DEAD:
        (tmp_path / name).parent.mkdir(0o700, exist_ok=True)
        make_marked(tmp_path / name)
        (tmp_path / name / "file").write_bytes(bytes(2**20))
    return Cache(tmp_path)


async def test_what_the_dead_left_goes_and_the_log_says_so_once(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    await cache.clean()
    assert cache.there(*DEAD) == []
    assert [record.getMessage() for record in caplog.records] == ["removed 5 MiB that a dead program left in the cache"]
    caplog.clear()
    await cache.clean()
    assert not caplog.records


async def test_what_somebody_is_making_stays(cache: Cache) -> None:
    build, _, staging, _, saved = DEAD
    with ExitStack() as stack:
        assert stack.enter_context(try_lock(cache.directory / "locks/python"))
        assert stack.enter_context(cache.templates.lock("b" * 24))
        make_marked(cache.directory / staging)  # who has the lock has removed what was there
        await cache.clean()
        assert cache.there(*DEAD) == [build, staging]
    await cache.clean()
    assert cache.there(*DEAD) == []
    assert not cache.there(saved)


async def test_what_is_not_marked_as_ours_stays(cache: Cache) -> None:
    for name in DEAD:
        (cache.directory / name / ".trio-sandbox").unlink()
    await cache.clean()
    assert cache.there(*DEAD) == list(DEAD)


async def test_a_host_without_templates_leaves_them_to_others(cache: Cache) -> None:
    await cache.clean(templates=False)
    assert cache.there(*DEAD) == [name for name in DEAD if name.startswith("templates")]


async def test_what_can_not_be_removed_is_told_and_no_more(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: TemplateStore) -> int:
        raise PermissionError(13, os.strerror(13), "templates")

    monkeypatch.setattr(TemplateStore, "remove_leftovers", refuse)
    await cache.clean()
    assert "can't be removed: [Errno 13] Permission denied: 'templates'" in caplog.text


async def test_an_empty_cache_is_not_even_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await Cache(tmp_path / "nowhere").clean()
    assert not (tmp_path / "nowhere").exists()
    assert not caplog.records


async def test_of_a_cache_that_is_read_only_nobody_is_told(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: TemplateStore) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "locks")

    monkeypatch.setattr(TemplateStore, "remove_leftovers", refuse)
    await cache.clean()
    assert "can't be removed" not in caplog.text
