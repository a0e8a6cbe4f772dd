"""The environment variables and the working directory that a run is given, for that run only.

Like the worker, whose part it is, it stands alone: the standard library of Python 3.9 or later, in the process of code
that nobody trusts.
"""

from __future__ import annotations

from fcntl import F_DUPFD_CLOEXEC, fcntl
from os import O_CLOEXEC, O_DIRECTORY, O_PATH, chdir, close, environ, fchdir, fstat, open as open_descriptor
from time import tzset

#: Out of the way of code that counts on low numbers, or closes them.
_LOWEST_DESCRIPTOR = 100


class Surroundings:
    """The variables and the directory that a run is given, and what was there before.

    Raises:
      OSError, ValueError: if the run can't have them; then it is as before.

    """

    def __init__(self, env: dict[str, str] | None, cwd: str | None) -> None:
        self._variables: dict[str, str | None] = {name: environ.get(name) for name in env or ()}
        self._directory = -1
        self._identity = (0, 0)
        try:
            if cwd is not None:
                self._keep_directory()
                chdir(cwd)
            environ.update(env or ())
            self._tell_clock()
        except BaseException:
            self.restore()
            raise

    def _tell_clock(self) -> None:
        # C's library has read it, for all but a new process.
        if "TZ" in self._variables:
            tzset()

    def _keep_directory(self) -> None:
        try:
            # By a descriptor, as it may have no name any more.
            directory = open_descriptor(".", O_PATH | O_DIRECTORY | O_CLOEXEC)
        except OSError:
            return  # nobody could go back there
        self._directory = fcntl(directory, F_DUPFD_CLOEXEC, _LOWEST_DESCRIPTOR)
        self._identity = _identity(self._directory)
        close(directory)

    def restore(self) -> None:
        """Bring back what was there before, whatever the code did to it meanwhile."""
        for name, value in self._variables.items():
            if value is None:
                environ.pop(name, None)
            else:
                environ[name] = value
        self._tell_clock()
        if self._directory < 0:
            return
        try:
            if _identity(self._directory) == self._identity:
                fchdir(self._directory)
                close(self._directory)
        except OSError:
            pass  # the code has closed it, or made the directory inaccessible


def _identity(descriptor: int) -> tuple[int, int]:
    status = fstat(descriptor)
    return status.st_dev, status.st_ino
