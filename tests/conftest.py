"""What all tests share: the images, built once, and a guard against tests that hang."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Generator
from typing import cast

import pytest
import trio
from _pytest.outcomes import Skipped
from hypothesis import settings

from tests._leaks import HANG_LIMIT
from trio_sandbox import Progress
from trio_sandbox.image import BuiltImage, ImageStore, SystemDisk, default_cache_directory

# No example is late on a machine that others use, too.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def umask() -> Generator[None]:
    """That of the guest, with which it is compared: some systems give users another."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture(scope="session", autouse=True)
def signals() -> Generator[None]:
    """Those of a program in the foreground: nohup(1), and shells for what runs in the background, have some ignored."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)]
    for number, handler in before:
        if handler is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def image_store() -> ImageStore:
    """The store in the user's own cache: building it anew would take longer than all other tests."""
    return ImageStore(default_cache_directory())


@pytest.fixture(scope="session")
def python_image(image_store: ImageStore) -> BuiltImage:
    """The image `python`, built now if need be."""
    return trio.run(functools.partial(image_store.ensure, "python", build=True, progress=_show))


@pytest.fixture(scope="session")
def node_image(image_store: ImageStore) -> BuiltImage:
    """The image `node`, built now if need be."""
    return trio.run(functools.partial(image_store.ensure, "node", build=True, progress=_show))


@pytest.fixture(scope="session")
def system_disk(image_store: ImageStore) -> SystemDisk:
    """The system disk, built now if need be."""
    return trio.run(functools.partial(image_store.ensure_system, build=True, progress=_show))


def _show(progress: Progress) -> None:
    percent = "" if progress.fraction is None else f" {progress.fraction:4.0%}"
    print(f"{progress.stage}{percent} {progress.message}", file=sys.__stderr__, flush=True)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Put a deadline around every asynchronous test with a real clock."""
    if not isinstance(item, pytest.Function) or not inspect.iscoroutinefunction(item.obj):
        return
    if {"autojump_clock", "mock_clock"} & set(item.fixturenames):
        return  # its seconds are not ours
    item.obj = _bounded(item.obj)


def _bounded(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def bounded(*args: object, **kwargs: object) -> None:
        with trio.fail_after(HANG_LIMIT):
            await test(*args, **kwargs)

    return bounded


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    """Let an asynchronous test that skips itself say why: pytest-trio raises another exception, without a reason or a place."""
    try:
        return (yield)
    except Skipped as exc:
        raise _skipped(exc.__context__) or exc from None


def _skipped(error: BaseException | None) -> Skipped | None:
    """Return the exception of the test that pytest-trio has found to be the only one in a group; None: it is another error."""
    while isinstance(error, BaseExceptionGroup):
        (error,) = cast("BaseExceptionGroup[BaseException]", error).exceptions
    return error if isinstance(error, Skipped) else None
