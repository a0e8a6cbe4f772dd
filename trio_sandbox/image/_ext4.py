"""Ext4 file systems out of directories, without mounting anything."""

from __future__ import annotations

# Everything is thrown away with its VM: no journal. Checksums of metadata are slow without the
# host's instructions. Inode tables that the kernel fills in later would end up in every overlay.
_OPTIONS = "-q -F -t ext4 -O ^has_journal,^metadata_csum,^resize_inode -m 0 -E lazy_itable_init=0,nodiscard"


def mke2fs_script(tree: str, disk: str) -> str:
    """Return the shell command that fills the file *disk* with the directory *tree*, owners and modes kept."""
    return f'mke2fs {_OPTIONS} -d "{tree}" {disk}'
