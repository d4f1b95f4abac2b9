"""Datasets in COCO format, synthetic datasets, and the resumable training data loader."""

from ..image_files import read_image
from .coco_json import ClassOrder, check_coco_json, register_coco_json
from .epochs import resolve_epochs
from .images import CheckedMapper, build_test_loader, build_test_mapper, evenly_spaced
from .stream import build_stream_loader
from .synthetic import register_synthetic

__all__ = [
    "CheckedMapper",
    "ClassOrder",
    "build_stream_loader",
    "build_test_loader",
    "build_test_mapper",
    "check_coco_json",
    "evenly_spaced",
    "read_image",
    "register_coco_json",
    "register_synthetic",
    "resolve_epochs",
]
