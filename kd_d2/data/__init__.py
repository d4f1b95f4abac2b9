"""Data: COCO-format sets by config, the synthetic set, the resumable stream."""

from .coco_json import check_coco_json, register_coco_json
from .stream import build_stream_loader
from .synthetic import register_synthetic

__all__ = ["build_stream_loader", "check_coco_json", "register_coco_json", "register_synthetic"]
