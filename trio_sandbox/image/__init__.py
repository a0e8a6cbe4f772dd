"""Images: how they are built, and where they are kept."""

from __future__ import annotations

from ._cargo import (
    Cargo as Cargo,
    describe_cargo as describe_cargo,
    entries_of as entries_of,
    take_cargo as take_cargo,
)
from ._containers import ensure_bootable as ensure_bootable, references_of as references_of
from ._contents import digest_of_tree as digest_of_tree
from ._debian_image import DebianImage as DebianImage
from ._entry import entry_name as entry_name, reading as reading
from ._exchange import export_image as export_image, import_images as import_images
from ._imported import Receive as Receive, copy_file as copy_file
from ._installer import PackageInstaller as PackageInstaller
from ._layer import (
    LAYER_MARK as LAYER_MARK,
    PLACE as PLACE,
    LayerJob as LayerJob,
    ProgramMissingError as ProgramMissingError,
    RunLayer as RunLayer,
)
from ._layers import ensure_layers as ensure_layers
from ._lock import try_lock as try_lock, try_lock_directory as try_lock_directory
from ._locked import LOCKED as LOCKED, spell_out as spell_out
from ._manifest import StoredFile as StoredFile, describe_files as describe_files
from ._mmdebstrap import examine_building as examine_building
from ._mounts_disk import (
    Place as Place,
    check_directory as check_directory,
    open_empty_mounts_disk as open_empty_mounts_disk,
    open_mounts_disk as open_mounts_disk,
    unreadable_mount as unreadable_mount,
)
from ._recipe import BuildContext as BuildContext, Recipe as Recipe
from ._recipes import IMAGES as IMAGES, images_with as images_with
from ._script_image import (
    image_for_program as image_for_program,
    image_for_script as image_for_script,
    read_source as read_source,
)
from ._store import ImageStore as ImageStore, own_caches as own_caches
from ._stored import (
    BuiltImage as BuiltImage,
    ImageSettings as ImageSettings,
    StoredImage as StoredImage,
    SystemDisk as SystemDisk,
    are_there as are_there,
    default_cache_directory as default_cache_directory,
)
from ._tree_disk import write_tree_disk as write_tree_disk
