"""A backend for deepagents: an agent's files and commands are in a sandbox. Needs the extra ``deepagents``.

with open_sandbox("python") as sandbox:
    agent = create_deep_agent(model, backend=SandboxBackend(sandbox))
"""

from __future__ import annotations

import secrets
from typing import Final, final

from deepagents.backends.protocol import ExecuteResponse, FileDownloadResponse, FileUploadResponse
from deepagents.backends.sandbox import BaseSandbox

from .. import OutputLimitError
from ..blocking import Sandbox, fail_after

#: Exit status of a command that took too long, as that of timeout(1).
_TIMED_OUT: Final = 124


@final
class SandboxBackend(BaseSandbox):
    """A sandbox of `trio_sandbox.blocking`, as deepagents sees it. Its image needs sh, python3 and grep, as the built-in ones have.

    Methods for asyncio work as well: deepagents calls the others in threads.

    Args:
      sandbox: What to work in; whoever opened it closes it.
      seconds: How long a command may take that names no other time.

    """

    def __init__(self, sandbox: Sandbox, *, seconds: float = 1800) -> None:
        self._sandbox = sandbox
        self._seconds = seconds
        self._id = f"trio-sandbox-{secrets.token_hex(8)}"

    @property
    def id(self) -> str:
        """A name of its own."""
        return self._id

    def execute(self, command: str, *, timeout: int | None = None) -> ExecuteResponse:
        """Run a line of shell in the home directory; what it leaves in the background goes on."""
        seconds = self._seconds if timeout is None else timeout
        try:
            with fail_after(seconds):
                done = self._sandbox.run_process(
                    command, shell=True, capture_stdout=True, stderr_to_stdout=True, check=False
                )
        except TimeoutError:
            return ExecuteResponse(f"the command took more than {seconds:g} seconds and was killed", _TIMED_OUT)
        except OutputLimitError as exc:
            return ExecuteResponse(exc.stdout_bytes.decode("utf-8", "replace"), None, truncated=True)
        status = done.returncode if done.returncode >= 0 else 128 - done.returncode
        return ExecuteResponse((done.stdout or b"").decode("utf-8", "replace"), status)

    def upload_files(self, files: list[tuple[str, bytes]]) -> list[FileUploadResponse]:
        """Write files; directories are made as needed."""
        return [FileUploadResponse(path, self._upload(path, content)) for path, content in files]

    def _upload(self, path: str, content: bytes) -> str | None:
        try:
            target = self._sandbox.path(path)
            if not target.is_absolute():
                return "invalid_path"
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                return "is_directory"
            target.write_bytes(content)
        except (OSError, ValueError) as exc:
            return _word(exc)
        return None

    def download_files(self, paths: list[str]) -> list[FileDownloadResponse]:
        """Read files."""
        return [self._download(path) for path in paths]

    def _download(self, path: str) -> FileDownloadResponse:
        try:
            source = self._sandbox.path(path)
            if not source.is_absolute():
                return FileDownloadResponse(path, None, "invalid_path")
            if source.is_dir():
                return FileDownloadResponse(path, None, "is_directory")
            return FileDownloadResponse(path, source.read_bytes())
        except (OSError, ValueError) as exc:
            return FileDownloadResponse(path, None, _word(exc))


def _word(exc: Exception) -> str:
    """Return deepagents' word for what went wrong, or the text of it."""
    words = {
        FileNotFoundError: "file_not_found",
        PermissionError: "permission_denied",
        IsADirectoryError: "is_directory",
        NotADirectoryError: "invalid_path",
        ValueError: "invalid_path",
    }
    return next((word for kind, word in words.items() if isinstance(exc, kind)), str(exc))
