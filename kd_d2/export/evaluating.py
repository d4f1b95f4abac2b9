"""Evaluation of an exported file."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog

from ..adapters import build_adapter
from ..config import thawed
from ..data import ClassOrder, build_test_loader, register_coco_json
from ..engine.program import write_results
from ..engine.setup import setup
from ..engine.trainer import KDTrainer
from ..errors import UserError
from ..extensions import import_extensions
from ..modeling.building import build_detector
from ..predictor import unknown_names
from .metadata import Resize
from .running import ExportedModel, load_exported

logger = logging.getLogger(__name__)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run `kd-d2 eval --model CONFIG_OR_RUN EXPORTED` in each process; `engine.program.main` for `args.exported`."""
    import_extensions(args.imports)
    cfg = setup(args)
    results = evaluate_exported(cfg, args.exported)
    write_results(cfg.OUTPUT_DIR, f"eval-{os.path.basename(args.exported)}.json", results)
    return results


def evaluate_exported(cfg: CfgNode, path: str) -> dict[str, Any]:
    """Evaluate a file of `kd-d2 export` on DATASETS.TEST, with images resized according to its metadata.

    Raises:
        UserError: see `load_exported`; or a dataset has different classes.
    """
    model = load_exported(path)
    names = model.metadata.class_names
    are_known = names != unknown_names(len(names))
    if are_known:
        register_coco_json(cfg, ClassOrder(tuple(names), path), train=False)
    for dataset in cfg.DATASETS.TEST:
        classes = MetadataCatalog.get(dataset).get("thing_classes", names)
        if len(classes) != len(names):
            raise UserError(f"The dataset {dataset} has {len(classes)} classes, but {path} predicts {len(names)}.")
        if are_known and list(classes) != list(names):
            raise UserError(
                f"The dataset {dataset} has the classes {', '.join(classes)}, but {path} predicts {', '.join(names)}."
            )
    lowest, of_file = _score_threshold(cfg), model.metadata.score_threshold
    if lowest is not None and lowest < of_file:
        logger.warning(
            f"{path} returns no detections below {of_file}, but the config's score threshold is {lowest}: its AP is lower "
            "for that reason."
        )
    own = model.metadata
    if own.fixed_size:
        logger.warning(
            f"{path} fits images into its fixed input size, {own.fixed_size[0]} x {own.fixed_size[1]} (height x width); the config's "
            "INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST have no effect."
        )
    elif (own.min_size, own.max_size) != (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST):
        logger.warning(
            f"{path} was exported with INPUT.MIN_SIZE_TEST {own.min_size} and MAX_SIZE_TEST {own.max_size}, to which it resizes images; those "
            "of the config have no effect."
        )
    return evaluate(cfg, model)


def _score_threshold(cfg: CfgNode) -> float | None:
    cfg = thawed(cfg)
    cfg.MODEL.DEVICE = "cpu"
    return build_adapter(build_detector(cfg)).score_threshold


def evaluate(cfg: CfgNode, model: ExportedModel) -> dict[str, Any]:
    """Return the results on DATASETS.TEST by task."""
    mapper = DatasetMapper(
        is_train=False, augmentations=[Resize(model.metadata)], image_format=model.metadata.input_format
    )

    class Test(KDTrainer):
        @classmethod
        def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
            return build_test_loader(cfg, dataset_name, mapper)

    return Test.test(cfg, model)
