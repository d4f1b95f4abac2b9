"""Augmentation of training images."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import build_augmentation
from detectron2.data.transforms import FixedSizeCrop, RandomFlip, ResizeScale

from ..errors import UserError


def build_mapper(cfg: CfgNode) -> DatasetMapper:
    """Build Detectron2's DatasetMapper from a config, with large-scale jitter if INPUT.LARGE_SCALE_JITTER is enabled.

    Raises:
        UserError: both INPUT.LARGE_SCALE_JITTER and INPUT.CROP are enabled.
    """
    if not cfg.INPUT.LARGE_SCALE_JITTER.ENABLED:
        return DatasetMapper(cfg, is_train=True)
    if cfg.INPUT.CROP.ENABLED:
        raise UserError(
            "INPUT.CROP.ENABLED and INPUT.LARGE_SCALE_JITTER.ENABLED are both True; set one of them to False."
        )
    jitter = cfg.INPUT.LARGE_SCALE_JITTER
    augmentations = [
        ResizeScale(jitter.MIN_SCALE, jitter.MAX_SCALE, jitter.SIZE, jitter.SIZE),
        FixedSizeCrop((jitter.SIZE, jitter.SIZE)),
        *(flip for flip in build_augmentation(cfg, is_train=True) if isinstance(flip, RandomFlip)),
    ]
    options = DatasetMapper.from_config(cfg, is_train=True)
    return DatasetMapper(**options | {"augmentations": augmentations, "recompute_boxes": cfg.MODEL.MASK_ON})
