"""An HTTP proxy between this machine and the outside: connections are made by CONNECT (RFC 9110, section 9.3.6)."""

from __future__ import annotations

import base64
import errno
import urllib.request
from typing import Final, final
from urllib.parse import unquote, urlsplit

import attrs
import trio

#: Bytes that a proxy's answer may have before the connection begins.
_LONGEST_HEAD: Final = 16 * 2**10
_DEFAULT_PORT: Final = 3128
#: What its answers mean to the guest; any other is EHOSTUNREACH.
_ERRORS: Final = {502: errno.ECONNREFUSED, 504: errno.ETIMEDOUT}


@final
@attrs.frozen
class Proxy:
    """A proxy that takes CONNECT."""

    host: str
    """Its name or address."""
    port: int
    """Its port."""
    authorization: str | None = attrs.field(default=None, repr=False)
    """The value of the header Proxy-Authorization."""

    @classmethod
    def parse(cls, url: str) -> Proxy:
        """Return the proxy at *url*, ``http://user:password@host:port``.

        Raises:
          ValueError: if it is no such URL. The text does not repeat it, since it may hold a password.

        """
        parts = urlsplit(url)
        try:
            port = parts.port or _DEFAULT_PORT
        except ValueError:
            port = 0
        if parts.scheme != "http" or not parts.hostname or not port or parts.path.strip("/") or parts.query:
            raise ValueError(
                f"a proxy must be a URL such as 'http://user:password@host:{_DEFAULT_PORT}'; only proxies that speak "
                "plain HTTP can be used"
            )
        authorization = None
        if parts.username is not None:
            credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            authorization = f"Basic {base64.b64encode(credentials.encode()).decode()}"
        return cls(parts.hostname, port, authorization)

    async def connect(self, stream: trio.abc.Stream, host: str, port: int) -> None:
        """Have *stream*, a connection to the proxy, lead to *port* of *host*, which the proxy resolves.

        Raises:
          OSError: if the proxy refuses, or breaks the connection off.

        """
        try:
            lines = [f"CONNECT {host}:{port} HTTP/1.1", f"Host: {host}:{port}"]
            if self.authorization is not None:
                lines.append(f"Proxy-Authorization: {self.authorization}")
            await stream.send_all("\r\n".join([*lines, "", ""]).encode("ascii"))
            status = _parse_status(await self._receive_head(stream))
        except trio.BrokenResourceError as exc:
            raise OSError(errno.ECONNRESET, "the proxy broke the connection off") from exc
        if not 200 <= status < 300:
            raise OSError(_ERRORS.get(status, errno.EHOSTUNREACH), f"the proxy answered with status {status}")

    async def _receive_head(self, stream: trio.abc.Stream) -> bytes:
        # Byte by byte at the end: what follows the head is the connection's, and can't be put back.
        head = bytearray()
        while not head.endswith(b"\r\n\r\n"):
            missing = 4 - next((n for n in (3, 2, 1) if head.endswith(b"\r\n\r\n"[:n])), 0)
            data = await stream.receive_some(missing)
            if not data:
                raise OSError(errno.ECONNRESET, "the proxy ended the connection")
            head += data
            if len(head) > _LONGEST_HEAD:
                raise OSError(errno.EPROTO, f"the proxy's answer is longer than {_LONGEST_HEAD} bytes")
        return bytes(head)


def _parse_status(head: bytes) -> int:
    version, _, rest = head.partition(b" ")
    status = rest[:3]
    if not version.startswith(b"HTTP/1.") or not status.isdigit() or rest[3:4] not in (b" ", b"\r"):
        raise OSError(errno.EPROTO, "the proxy does not speak HTTP")
    return int(status)


def find_proxy(setting: str | None) -> Proxy | None:
    """Return the proxy that `HostConfig.proxy` names; for "environment" that of https_proxy or all_proxy.

    Raises:
      ValueError: if it is none.

    """
    if setting is None:
        return None
    if setting != "environment":
        return Proxy.parse(setting)
    proxies = urllib.request.getproxies()
    url = proxies.get("https") or proxies.get("all")
    return Proxy.parse(url) if url else None
