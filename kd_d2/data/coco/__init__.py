"""Reading and repair of COCO annotation files as written by common tools."""

from .boxes import BOX_FORMATS
from .image_names import ImageFinder
from .reader import CocoData, read_categories, read_coco, read_json_bytes
from .repairs import Repairs

__all__ = ["BOX_FORMATS", "CocoData", "ImageFinder", "Repairs", "read_categories", "read_coco", "read_json_bytes"]
