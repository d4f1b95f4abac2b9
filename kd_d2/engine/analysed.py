"""Models that are looked at after their training: what the programs of analysis share."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from torch import nn

from ..checkpoint import load_complete
from ..config import find_file, load_config
from ..data import build_test_loader, register_coco_json, register_synthetic
from ..distillers.matching import check_same_anchors
from ..errors import UserError
from ..evaluation import build_evaluator
from ..files import write_json
from ..meta_arch import KDMetaArch
from .checks import check_classes, check_datasets, check_distillation


def load_dense_pair(cfg: CfgNode, weights: str, program: str) -> KDMetaArch:
    """Student and teacher of a distillation in eval mode, both dense detectors with the same anchors; the student from a checkpoint.

    Args:
        program: for messages.

    Raises:
        UserError: the config is no distillation's, or its pair or the checkpoint is none of these.
    """
    check_distillation(cfg)
    model = build_model(cfg).eval()
    for whose, adapter in (("student", model.adapter), ("teacher", model.teacher.adapter)):
        if "dense" not in adapter.provides:
            raise UserError(f"The {whose} ({type(adapter.model).__name__}) has no dense predictions to compare.")
    check_same_anchors(program, model.adapter.spec, model.teacher.spec)
    check_classes(cfg, model)
    load_complete(model.student, weights, "the student")
    return model


@dataclass
class TrainedModel:
    """A detector with its weights: a teacher, a plain student or a distilled one.

    Attributes:
        title: what pictures and tables call it.
        cfg: its plain config; the first of DATASETS.TEST is the data set.
    """

    title: str
    cfg: CfgNode

    @property
    def dataset(self) -> str:
        return self.cfg.DATASETS.TEST[0]

    @property
    def folder_name(self) -> str:
        return re.sub(r"[^\w.-]+", "-", self.title)

    def identity(self) -> dict[str, object]:
        """What a result hangs on: the weights' file, the config, the images."""
        status = os.stat(self.cfg.MODEL.WEIGHTS)
        annotations = MetadataCatalog.get(self.dataset).get("json_file")
        if annotations:
            with open(annotations, "rb") as file:
                data = file.read()
        else:
            data = "\n".join(str(entry["image_id"]) for entry in DatasetCatalog.get(self.dataset)).encode()
        return {
            "weights": [os.path.realpath(self.cfg.MODEL.WEIGHTS), status.st_size, status.st_mtime_ns],
            "config": hashlib.sha256(self.cfg.dump().encode()).hexdigest(),
            "data": hashlib.sha256(data).hexdigest(),
        }

    def build(self) -> nn.Module:
        """The detector, in eval mode, every weight loaded.

        Raises:
            UserError: the checkpoint is another model's, or the data set has other classes.
        """
        model = build_model(self.cfg).eval()
        check_classes(self.cfg, model)
        load_complete(model, self.cfg.MODEL.WEIGHTS, self.title)
        return model


def add_model_arguments(parser: argparse.ArgumentParser, most: str) -> None:
    """--model, --output and overrides; `most` says how many models."""
    parser.add_argument(
        "--model",
        nargs=3,
        action="append",
        required=True,
        metavar=("TITLE", "CONFIG", "WEIGHTS"),
        help=f"a model and what to call it; a distillation's config stands for its student ({most})",
    )
    parser.add_argument("--output", required=True, help="folder of what is found")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides for all models: KEY VALUE ...")


def read_models(args: argparse.Namespace) -> list[TrainedModel]:
    """The models of a command line, their data registered and checked.

    Raises:
        UserError: two have one title, or are tested on different data sets; whatever of config, weights or data cannot work.
    """
    register_synthetic()
    models = []
    for title, config, weights in args.model:
        weights = find_file(weights, f"--model {title}")
        cfg = load_config(config, [*args.opts, "MODEL.WEIGHTS", weights], student_only=True)
        cfg.DATASETS.TRAIN = ()  # what it was trained on has no part in this
        register_coco_json(cfg)
        check_datasets(cfg, train=False)
        models.append(TrainedModel(title, cfg))
    for attribute, what in (("folder_name", "title"), ("dataset", "data set of DATASETS.TEST")):
        values = [getattr(model, attribute) for model in models]
        if attribute == "folder_name" and len(set(values)) < len(values):
            raise UserError(f"--model: two models have the {what} {values[0]!r}.")
        if attribute == "dataset" and len(set(values)) > 1:
            raise UserError(f"--model: the models have different data sets in DATASETS.TEST: {', '.join(values)}.")
    return models


def read_annotations(dataset: str) -> dict:
    """The tree of a data set's annotation file.

    Raises:
        UserError: the data set is not one file in COCO's format.
    """
    path = MetadataCatalog.get(dataset).get("json_file")
    if not path or not os.path.isfile(path):
        raise UserError(f"The data set {dataset} has no annotation file in COCO's format, which this analysis reads.")
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def restrict_images(models: list[TrainedModel], count: int, output: str) -> None:
    """Let the models be tested on `count` images, spread evenly over their data set; `output` gets the list.

    Raises:
        UserError: the count is below 1, or the data set is not one file in COCO's format.
    """
    if count < 1:
        raise UserError(f"--images is {count}; it must be at least 1.")
    dataset = models[0].dataset
    tree = read_annotations(dataset)
    if count >= len(tree["images"]):
        return
    places = [round(place) for place in np.linspace(0, len(tree["images"]) - 1, count)]
    images = [tree["images"][place] for place in places]
    ids = {image["id"] for image in images}
    annotations = [a for a in tree["annotations"] if a["image_id"] in ids]
    path = os.path.join(output, f"{count}-images.json")
    write_json(path, {**tree, "images": images, "annotations": annotations}, indent=None)
    entry = [f"{dataset}_{count}_images", path, MetadataCatalog.get(dataset).image_root]
    for model in models:
        model.cfg.DATASETS.COCO_JSON = [entry]
        model.cfg.DATASETS.TEST = (entry[0],)
        register_coco_json(model.cfg)


def detect_dataset(model: TrainedModel, output: str) -> list[dict]:
    """The model's detections of its data set in COCO's format; those of an earlier call with the same weights are kept."""
    folder = os.path.join(output, model.folder_name)
    path, source = os.path.join(folder, "coco_instances_results.json"), os.path.join(folder, "source.json")
    identity = model.identity()
    if os.path.isfile(path) and os.path.isfile(source):
        with open(source) as file:
            if json.load(file) == identity:
                with open(path) as detections:
                    return json.load(detections)
    os.makedirs(folder, exist_ok=True)
    detector = model.build()
    detector.to(torch.device(model.cfg.MODEL.DEVICE))
    loader = build_test_loader(model.cfg, model.dataset)
    inference_on_dataset(detector, loader, build_evaluator(model.cfg, model.dataset, folder))
    write_json(source, identity)
    with open(path) as detections:
        return json.load(detections)
