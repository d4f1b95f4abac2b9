"""How a config's training images are resized, cut and flipped."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import build_augmentation
from detectron2.data.transforms import Augmentation, FixedSizeCrop, RandomFlip, ResizeScale

from ..errors import UserError


def build_mapper(cfg: CfgNode) -> DatasetMapper:
    """Detectron2's mapper of a config, with large-scale jitter where INPUT.LARGE_SCALE_JITTER enables it.

    Raises:
        UserError: INPUT.CROP is enabled too.
    """
    if not cfg.INPUT.LARGE_SCALE_JITTER.ENABLED:
        return DatasetMapper(cfg, is_train=True)
    if cfg.INPUT.CROP.ENABLED:
        raise UserError(
            "INPUT.CROP.ENABLED and INPUT.LARGE_SCALE_JITTER.ENABLED are both True; set one of them to False."
        )
    options = DatasetMapper.from_config(cfg, is_train=True)
    options |= {"augmentations": _large_scale_jitter(cfg), "recompute_boxes": cfg.MODEL.MASK_ON}
    return DatasetMapper(**options)


def _large_scale_jitter(cfg: CfgNode) -> list[Augmentation]:
    jitter = cfg.INPUT.LARGE_SCALE_JITTER
    flips = [
        augmentation for augmentation in build_augmentation(cfg, is_train=True) if isinstance(augmentation, RandomFlip)
    ]
    return [
        ResizeScale(jitter.MIN_SCALE, jitter.MAX_SCALE, jitter.SIZE, jitter.SIZE),
        FixedSizeCrop((jitter.SIZE, jitter.SIZE)),
        *flips,
    ]
