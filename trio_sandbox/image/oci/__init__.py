"""Container images (OCI, Docker): fetched by skopeo, checked, merged and written to a disk here, without any rights."""

from __future__ import annotations

from ._contents import CONTAINER_LANGUAGES as CONTAINER_LANGUAGES
from ._ext4 import BLOCK as BLOCK, UNIT as UNIT, write_file_system as write_file_system
from ._manifest import read_container_image as read_container_image
from ._notes import (
    NOTE_NAME as NOTE_NAME,
    Note as Note,
    manifest_of as manifest_of,
    note_path as note_path,
    read_note as read_note,
    state_of as state_of,
    write_note as write_note,
)
from ._recipe import (
    LARGEST_DISK as LARGEST_DISK,
    OciRecipe as OciRecipe,
    container_digest as container_digest,
    container_name as container_name,
)
from ._skopeo import fetch as fetch
from ._tar import Kind as Kind
from ._tree import Node as Node, TreeError as TreeError
