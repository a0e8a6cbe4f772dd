"""Container images for tests: archives, and layouts of them in a directory, without any program."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

KINDS = {
    "file": tarfile.REGTYPE,
    "directory": tarfile.DIRTYPE,
    "symlink": tarfile.SYMTYPE,
    "link": tarfile.LNKTYPE,
    "character": tarfile.CHRTYPE,
    "block": tarfile.BLKTYPE,
    "fifo": tarfile.FIFOTYPE,
}

Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, content: bytes | str = b"", *, kind: str = "file", **fields: object) -> Member:
    """Describe an entry; *fields* are those of `tarfile.TarInfo`. A link's *content* is what it leads to."""
    info = tarfile.TarInfo(name)
    info.type = KINDS[kind]
    info.mode = 0o755 if kind == "directory" else 0o644
    data = b""
    if kind in ("symlink", "link"):
        info.linkname = content if isinstance(content, str) else content.decode()
    else:
        data = content.encode() if isinstance(content, str) else content
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def directory(name: str, **fields: object) -> Member:
    return member(name, b"", kind="directory", **fields)


def archive(*members: Member, style: int = tarfile.PAX_FORMAT) -> bytes:
    """Return an archive of *members*, in that order."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=style, encoding="utf-8", errors="surrogateescape") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return output.getvalue()


def write_layout(
    path: Path,
    *layers: bytes,
    config: object = None,
    architecture: str = "amd64",
    diff_ids: Sequence[str] | None = None,
    packed: Sequence[bytes] | None = None,
    tag: str = "latest",
) -> str:
    """Write an image's layout into the new directory *path*; return the digest of its manifest.

    Args:
      path: Where.
      layers: Archives, the lowest first.
      config: What the image says of how its program is run.
      architecture: What it is for.
      diff_ids: What it says the digests of the layers are; None: the truth.
      packed: The layers as they are stored; None: by gzip.
      tag: Its name in the layout.
    """
    blobs = path / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{media_type}", "digest": f"sha256:{digest}", "size": len(data)}

    if packed is None:
        packed = [gzip.compress(layer, 1, mtime=0) for layer in layers]
    if diff_ids is None:
        diff_ids = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
    configuration = {
        "architecture": architecture,
        "os": "linux",
        "config": config or {},
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": put(json.dumps(configuration).encode(), "config.v1+json"),
        "layers": [put(data, f"layer.v1.tar{_compression(data)}") for data in packed],
    }
    described = put(json.dumps(manifest).encode(), "manifest.v1+json")
    described["annotations"] = {"org.opencontainers.image.ref.name": tag}
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [described]}))
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return str(described["digest"])


def write_fetched(path: Path, *layers: bytes, **fields: object) -> str:
    """Write an image as skopeo leaves it in a directory; arguments and result as of `write_layout`."""
    layout = path.with_name(f"{path.name}.layout")
    digest = write_layout(layout, *layers, **fields)  # type: ignore[arg-type]
    path.mkdir()
    for blob in (layout / "blobs" / "sha256").iterdir():
        name = "manifest.json" if blob.name == digest.partition(":")[2] else blob.name
        (path / name).write_bytes(blob.read_bytes())
    return digest


def _compression(data: bytes) -> str:
    return "+gzip" if data.startswith(b"\x1f\x8b") else "+zstd" if data.startswith(b"\x28\xb5\x2f\xfd") else ""
