"""Augmentation of training images."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import annotations_to_instances, filter_empty_instances
from detectron2.data.transforms import FixedSizeCrop, RandomFlip, ResizeScale, TransformList

from ..config.augmentations import move_objects, read_augmentations
from ..errors import UserError


class TrainingMapper(DatasetMapper):
    """Detectron2's DatasetMapper, with boxes of masks that end at the border of the image.

    Detectron2 fails to recompute the boxes of images without objects, as those have no masks, and lets boxes of polygons
    that are moved rather than cropped extend beyond the image, or lie outside of it.
    """

    def _transform_annotations(
        self, dataset_dict: dict, transforms: TransformList, image_shape: tuple[int, int]
    ) -> None:
        if not all(annotation.get("iscrowd") for annotation in dataset_dict["annotations"]):
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            if self.recompute_boxes:
                instances = dataset_dict["instances"]
                instances.gt_boxes.clip(image_shape)
                dataset_dict["instances"] = filter_empty_instances(instances)
            return
        del dataset_dict["annotations"]
        dataset_dict["instances"] = annotations_to_instances([], image_shape)


def build_mapper(cfg: CfgNode) -> DatasetMapper:
    """Build Detectron2's DatasetMapper from a config, with INPUT.AUGMENTATIONS, and INPUT.LARGE_SCALE_JITTER if it is enabled.

    Raises:
        UserError: both INPUT.LARGE_SCALE_JITTER and INPUT.CROP are enabled, or an augmentation cannot be applied.
    """
    options = TrainingMapper.from_config(cfg, is_train=True)
    augmentations = read_augmentations(cfg)
    jitter = cfg.INPUT.LARGE_SCALE_JITTER
    if jitter.ENABLED and cfg.INPUT.CROP.ENABLED:
        raise UserError(
            "INPUT.CROP.ENABLED and INPUT.LARGE_SCALE_JITTER.ENABLED are both True; set one of them to False."
        )
    if jitter.ENABLED:
        options["augmentations"] = [
            ResizeScale(jitter.MIN_SCALE, jitter.MAX_SCALE, jitter.SIZE, jitter.SIZE),
            FixedSizeCrop((jitter.SIZE, jitter.SIZE)),
            *(flip for flip in options["augmentations"] if isinstance(flip, RandomFlip)),
        ]
    options["augmentations"] = [*augmentations, *options["augmentations"]]
    options["recompute_boxes"] |= cfg.MODEL.MASK_ON and (jitter.ENABLED or move_objects(augmentations))
    return TrainingMapper(**options)
