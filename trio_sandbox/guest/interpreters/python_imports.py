"""Where a Python interpreter imports from: for us the image, for the code of runs what `python3` would.

Like the worker, whose part it is, it stands alone: the standard library of Python 3.9 or later, in the process of code
that nobody trusts.

The interpreter is started in isolated mode, so that nothing of the user's is read before we are there: no module in the
working directory, no PYTHON variable, no user site directory with its `.pth` files and its `usercustomize`. Then the code gets the paths
that are missing. What we import later is looked for where we started from.
"""

from __future__ import annotations

import os
import site
import sys
from _frozen_importlib_external import PathFinder
from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


class Imports:
    """The code's paths and ours.

    Args:
      hooks: What to call before the code imports a module for the first time, by the module's name.
      patches: What to call with a module of the standard library that was just imported, by its name.

    """

    def __init__(self, hooks: dict[str, Callable[[], None]], patches: dict[str, Callable[[ModuleType], None]]) -> None:
        self._ours = list(sys.path)
        self._are_ours_in_use = False
        # A virtual environment has none.
        self._has_user_site = sys.prefix != sys.base_prefix or os.environ.get("PYTHONNOUSERSITE", "") != ""
        """It needs no looking for, or none any more."""
        sys.path[:0] = _paths_before_ours()
        sys.meta_path[:0] = [_Hooks(hooks), _Patches(patches)]
        sys.meta_path.append(self)
        if not self._has_user_site:
            site.ENABLE_USER_SITE = True
        # As `python3` has them, for child processes that are started with the same.
        if sys.version_info >= (3, 13):
            sys.flags = sys.flags.__replace__(isolated=0, ignore_environment=0, no_user_site=0, safe_path=False)

    def load(self, *names: str) -> None:
        """Import modules of the standard library, which the code may have in its directories by the same names."""
        if all(name in sys.modules for name in names):
            return
        theirs, sys.path = sys.path, list(self._ours)
        self._are_ours_in_use = True
        try:
            for name in names:
                import_module(name)
        finally:
            sys.path = theirs
            self._are_ours_in_use = False

    def add_user_site(self) -> bool:
        """Put the user's site directory on the path, if there is one and it is not yet there; tell whether it was put there.

        Its `.pth` files are obeyed, which may run code of the user's.
        """
        if self._has_user_site or self._are_ours_in_use:
            return False
        directory = site.getusersitepackages()
        if not os.path.isdir(directory):
            return False
        self._has_user_site = True
        # Before the image's own packages, as `site` does it.
        images = site.getsitepackages()
        index = next((index for index, path in enumerate(sys.path) if path in images), len(sys.path))
        after = sys.path[index:]
        del sys.path[index:]
        try:
            site.addsitedir(directory)
        finally:
            sys.path += after
        return True

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Look for what nobody else has found in a user's site directory that was made after the interpreter was started."""
        if path is None and self.add_user_site():
            return PathFinder.find_spec(name)
        return None


class _Hooks:
    """Calls what is to be called before a module is imported. It finds nothing."""

    def __init__(self, hooks: dict[str, Callable[[], None]]) -> None:
        self._hooks = hooks

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in self._hooks:
            self._hooks.pop(name)()
            if not self._hooks:
                sys.meta_path.remove(self)


class _Patches:
    """Finds what is to be patched, and patches it when it was loaded."""

    def __init__(self, patches: dict[str, Callable[[ModuleType], None]]) -> None:
        self._patches = patches

    def find_spec(self, name: str, path: Any = None, target: object = None) -> ModuleSpec | None:
        if name not in self._patches:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader, self._patches[name])  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
        return spec


class _PatchingLoader:
    """Loads a module as its own loader does, and leaves no trace of itself."""

    def __init__(self, loader: Any, patch: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._patch = patch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._patch(module)


def _paths_before_ours() -> list[str]:
    paths = [] if os.environ.get("PYTHONSAFEPATH") else [""]
    given = os.environ.get("PYTHONPATH")
    if given:
        paths += map(os.path.abspath, given.split(os.pathsep))
    return paths
