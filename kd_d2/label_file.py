"""Pseudo-labels of the teacher as a COCO annotation file."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from tqdm import tqdm

from .class_names import names_in_data
from .data import build_test_loader, register_coco_json, register_synthetic
from .engine.checks import TEACHERS_CLASSES, check_classes, check_datasets, check_distillation
from .errors import UserError
from .files import check_output_file, write_json
from .image_files import read_checked
from .prediction.predict import to_annotations
from .predictor import Category, unknown_names
from .pseudo_labels import PseudoLabels
from .teacher import Teacher


def write_label_file(
    cfg: CfgNode, output: str, dataset: str | None = None, score_thresh: float | None = None
) -> tuple[dict[str, Any], str]:
    """Label a training set with the teacher of a distillation config.

    Args:
        cfg: distillation config. With MODEL.KD.PSEUDO_LABELS.ENABLED the dataset needs no annotations.
        output: path of the annotation file.
        dataset: an entry of DATASETS.TRAIN; may be None if there is only one.
        score_thresh: score above which detections become annotations; None for MODEL.KD.PSEUDO_LABELS.SCORE_THRESH.

    Returns:
        The content of the file, and the command-line overrides of the config for training on it.

    Raises:
        UserError: config, data or output is invalid, the output is an annotation file of the config, or the teacher's own
            score threshold is above `score_thresh`.
    """
    check_distillation(cfg)
    threshold = cfg.MODEL.KD.PSEUDO_LABELS.SCORE_THRESH if score_thresh is None else score_thresh
    if not 0 <= threshold < 1:
        raise UserError(f"--score-thresh is {threshold}; it must be from 0 to below 1.")
    if cfg.MODEL.KEYPOINT_ON:
        raise UserError("MODEL.KEYPOINT_ON is True, but pseudo-labels are boxes and masks only: set it to False.")
    register_synthetic()
    register_coco_json(cfg)
    check_datasets(cfg, train=True)
    name = choose_dataset(cfg, dataset)
    check_output_file(output)
    if os.path.realpath(output) in map(os.path.realpath, _annotation_files(cfg)):
        raise UserError(
            f"--output: {output} is an annotation file of the config; choose another path, or remove it first."
        )
    skip_unusable = cfg.DATALOADER.SKIP_UNUSABLE_IMAGES
    if not skip_unusable:
        check_images(name)
    teacher = Teacher.from_config(cfg)
    teacher.check_detects()
    check_classes(cfg, teacher.model, TEACHERS_CLASSES)
    if "detections" not in teacher.spec.provides or teacher.spec.num_classes is None:
        raise UserError(
            f"The teacher ({teacher.spec.name}) does not predict detections with classes, so it cannot label images."
        )
    PseudoLabels(threshold).check_threshold(teacher.spec)
    if cfg.MODEL.MASK_ON and "masks" not in teacher.spec.provides:
        raise UserError(
            f"MODEL.MASK_ON is True, but the teacher ({teacher.spec.name}) predicts no masks: set it to False to label boxes only."
        )
    teacher.to(torch.device(cfg.MODEL.DEVICE))

    def detect(batch: list[dict]) -> list[dict]:
        return teacher.model(teacher.to_input_format(batch))

    batches = tqdm(build_test_loader(cfg, name, skip_unusable=skip_unusable), unit="image")
    classes = names_in_data(cfg)  # the teacher's, which has been matched to them
    names = classes.names if classes else unknown_names(teacher.spec.num_classes)
    tree, folder = label_images(detect, batches, names, threshold)
    write_json(output, tree, indent=None)
    return tree, overrides_to_train_on(cfg, name, [f"{name}_by_teacher", os.path.abspath(output), folder])


def _annotation_files(cfg: CfgNode) -> list[str]:
    """Return the annotation files of DATASETS.COCO_JSON and of the registered datasets of the config."""
    registered = [MetadataCatalog.get(name).get("json_file") for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)]
    return [*(json_file for _, json_file, _ in cfg.DATASETS.COCO_JSON), *filter(None, registered)]


def choose_dataset(cfg: CfgNode, name: str | None) -> str:
    """Return the given dataset, by default the only entry of DATASETS.TRAIN.

    Raises:
        UserError: the dataset is not in DATASETS.TRAIN, or `name` is None and there are several.
    """
    names = cfg.DATASETS.TRAIN
    if name is None and len(names) > 1:
        raise UserError(f"DATASETS.TRAIN has {len(names)} datasets: choose one of {', '.join(names)} with --dataset.")
    if name is not None and name not in names:
        raise UserError(f"--dataset {name!r} is not in DATASETS.TRAIN: {', '.join(names)}.")
    return name or names[0]


def check_images(dataset: str) -> None:
    """Open the images of a registered dataset without decoding them.

    Raises:
        DataError: one cannot be opened; see `read_checked`.
    """
    for entry in DatasetCatalog.get(dataset):
        if "file_name" in entry:
            read_checked(entry["file_name"], lambda: None)


@torch.no_grad()
def label_images(
    detect: Callable[[list[dict]], list[dict]],
    batches: Iterable[list[dict]],
    names: Sequence[str],
    score_threshold: float,
) -> tuple[dict[str, Any], str]:
    """Label images with a detector.

    Args:
        detect: Detectron2 detector in eval mode, with detections in pixels of the image on disk.
        batches: batches of Detectron2's test loader; empty ones are skipped.
        names: class names by class index.
        score_threshold: score above which detections become annotations.

    Returns:
        The tree of an annotation file with the score of each annotation, and the folder of its relative file names.

    Raises:
        UserError: there is no image.
    """
    categories = [Category(number, name) for number, name in enumerate(names, 1)]
    paths, images, annotations = [], [], []
    for batch in filter(None, batches):
        for entry, output in zip(batch, detect(batch), strict=True):
            detections = output["instances"].to("cpu")
            detections = detections[detections.scores > score_threshold]
            number = len(images) + 1
            height, width = detections.image_size
            paths.append(os.path.abspath(entry["file_name"]))
            images.append({"id": number, "width": width, "height": height})
            annotations += to_annotations(detections, number, categories, len(annotations) + 1)
    if not paths:
        raise UserError("None of the images can be used, so nothing is labelled.")
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    for image, path in zip(images, paths, strict=True):
        image["file_name"] = os.path.relpath(path, folder)
    return {"images": images, "annotations": annotations, "categories": list(map(asdict, categories))}, folder


def overrides_to_train_on(cfg: CfgNode, name: str, labelled: list[str]) -> str:
    """Return command-line overrides of the config that replace a dataset of DATASETS.TRAIN with its labeled copy.

    Args:
        labelled: entry of the copy in DATASETS.COCO_JSON.
    """
    files = [*(list(entry) for entry in cfg.DATASETS.COCO_JSON if entry[0] != labelled[0]), labelled]
    names = tuple(labelled[0] if other == name else other for other in cfg.DATASETS.TRAIN)
    keys = {"DATASETS.COCO_JSON": files, "DATASETS.TRAIN": names, "MODEL.KD.PSEUDO_LABELS.ENABLED": False}
    if cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
        keys["INPUT.MASK_FORMAT"] = "bitmask"  # the masks of detections are run-length encoded
    return " ".join(f"{key} {shlex.quote(str(value))}" for key, value in keys.items())
