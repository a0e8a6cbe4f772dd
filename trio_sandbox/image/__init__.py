"""Images: how they are built, and where they are kept."""

from ._recipe import BuildContext as BuildContext
from ._recipe import Recipe as Recipe
from ._store import Image as Image
from ._store import ImageStore as ImageStore
from ._store import SystemDisk as SystemDisk
