"""``trio-sandbox completion``: a script by which a shell completes our command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, cast

from . import _status
from ._parser import build_parser
from ._report import complain

if TYPE_CHECKING:
    from collections.abc import Iterator

#: What is completed as the name of a directory, and as that of any file.
_DIRECTORIES = ("cache_dir", "workspace")
_FILES = ("uploads",)


def completion(options: argparse.Namespace) -> int:
    """Print the script; return the exit status."""
    try:
        import shtab
    except ModuleNotFoundError as exc:
        complain(f"completion needs the extra `cli` ({exc}): pip install 'trio-sandbox[cli]'")
        return _status.SANDBOX_FAILURE
    parser = build_parser()
    for each in all_parsers(parser):
        if getattr(each, "takes_program", False):
            # For the parser all words are the program's; the first is a file.
            each.add_argument("words", nargs="*", metavar="FILE", type=Path)
        for action in each._actions:  # pyright: ignore[reportPrivateUsage] - shtab itself looks there
            if action.dest in _DIRECTORIES:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.type is Path or action.dest in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell=options.shell))
    return 0


def all_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Give a parser and those of all its commands."""
    yield parser
    for action in parser._actions:  # pyright: ignore[reportPrivateUsage]
        if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage]
            commands = cast("argparse._SubParsersAction[argparse.ArgumentParser]", action)  # pyright: ignore[reportPrivateUsage]
            for command in dict.fromkeys(commands.choices.values()):
                yield from all_parsers(command)
