"""What argparse lacks: where the options of ``trio-sandbox run`` end and its program begins."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn


class Once(argparse.Action):
    """An option that may be given once: of two, nobody knows which one was meant."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Take the value, or refuse a second one."""
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string} may be given once; put -- before arguments of the code")
        setattr(namespace, self.dest, values)


class CommandParser(argparse.ArgumentParser):
    """Parses the arguments of one command."""

    takes_program = False
    """Whether options end at the first word that is none; it and all that follows are then `Namespace.words`.

    That is the file and its arguments, or those of the code given by ``-c``. ``--`` ends the options as well.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where the help is, and exit with status 2."""
        super().error(f"{message}; see `{self.prog} --help`")

    # What argparse itself offers for this, `nargs=REMAINDER`, treats "--" in another way in each version of Python.
    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse the options, and leave the words as they are."""
        arguments = sys.argv[1:] if args is None else args
        end = _end_of_options(arguments, self._option_string_actions) if self.takes_program else len(arguments)
        namespace = argparse.Namespace() if namespace is None else namespace
        _, unknown = super().parse_known_args(arguments[:end], namespace)
        if self.takes_program:
            namespace.words = list(arguments[end + 1 :] if arguments[end:][:1] == ["--"] else arguments[end:])
        return namespace, unknown


def _end_of_options(arguments: Sequence[str], options: Mapping[str, argparse.Action]) -> int:
    """Return the index of the first argument that is no option, nor the value of one."""
    index = 0
    while index < len(arguments):
        argument = arguments[index]
        if argument in ("-", "--") or not argument.startswith("-"):
            break
        index += 1
        if _wants_value(argument, options):
            index += 1
    return min(index, len(arguments))


def _wants_value(argument: str, options: Mapping[str, argparse.Action]) -> bool:
    """Tell whether the value of an option is the next argument."""
    if argument.startswith("--"):
        action = options.get(argument)
        return action is not None and action.nargs != 0
    # Several letters are several options, until one takes the rest for its value.
    for position, letter in enumerate(argument[1:], 1):
        action = options.get(f"-{letter}")
        if action is None:
            return False
        if action.nargs != 0:
            return position == len(argument) - 1
    return False
