"""The length of a training in epochs."""

from __future__ import annotations

from itertools import chain
from typing import Any

from detectron2.config import CfgNode
from detectron2.data.build import filter_images_with_few_keypoints, filter_images_with_only_crowd_annotations

from ..data.coco import CocoData
from ..data.epochs import describe, in_iterations, iterations_of, unusable_schedule
from ..data.sampling import images_per_epoch, samples_by_set
from .check import DataCheck
from .sets import DataSet, config_to_check

EPOCHS = 12
"""Length of Detectron2's 1x schedule on COCO."""


def schedule_of_config(config_file: str, opts: list[Any], check: DataCheck) -> str | None:
    """Return the iterations of the config's SOLVER.EPOCHS as text; without it, the epochs of its iterations and those of 12 epochs.

    None if a training set cannot be read or no image is left to train on, or there are no iterations.
    """
    cfg = config_to_check(config_file, opts)
    sets = [_training_images(cfg, dataset, data) for dataset, data in check.sets if dataset.role == "train"]
    last, batch = cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH
    if len(sets) < len(cfg.DATASETS.TRAIN) or not any(sets) or min(last, batch) < 1:
        return None
    images = images_per_epoch(cfg, sets if samples_by_set(cfg) else [[*chain(*sets)]])
    epochs = cfg.SOLVER.EPOCHS or EPOCHS
    resolved = in_iterations(cfg, epochs, images)
    sentences = [describe(resolved, epochs, images)]
    if cfg.SOLVER.EPOCHS is None:
        sentences = [
            f"SOLVER.MAX_ITER {last} with batches of {batch} is {last * batch / images:.1f} epochs of {round(images)} training images.",
            f"For the same schedule in {EPOCHS} epochs, set SOLVER.EPOCHS {EPOCHS}: {iterations_of(resolved)}",
        ]
    return "\n".join([*sentences, *filter(None, [unusable_schedule(resolved, epochs)])])


def _training_images(cfg: CfgNode, dataset: DataSet, data: CocoData) -> list[dict[str, Any]]:
    """Return the annotations of the images that Detectron2's filters keep, as parts of its dataset dictionaries."""
    images: dict[int, dict[str, Any]] = {image["id"]: {"annotations": []} for image in data.tree["images"]}
    for annotation in data.tree["annotations"]:
        images[annotation["image_id"]]["annotations"].append(annotation)
    kept, least = list(images.values()), cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and dataset.annotated:
        kept = filter_images_with_only_crowd_annotations(kept)
    if dataset.keypoints:
        kept = filter_images_with_few_keypoints(kept, least)
    return kept
