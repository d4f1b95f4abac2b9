"""Models that are looked at after their training: what the programs of analysis share."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from torch import nn

from ..checkpoint import load_complete
from ..config import find_file, load_config
from ..data import register_coco_json, register_synthetic
from ..errors import UserError
from ..evaluation import build_evaluator
from .checks import check_classes, check_datasets


@dataclass
class AnalysedModel:
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


def read_models(args: argparse.Namespace) -> list[AnalysedModel]:
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
        models.append(AnalysedModel(title, cfg))
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


def detect_dataset(model: AnalysedModel, output: str) -> list[dict]:
    """The model's detections of its data set in COCO's format; those of an earlier call with the same weights are kept."""
    folder = os.path.join(output, model.folder_name)
    path, source = os.path.join(folder, "coco_instances_results.json"), os.path.join(folder, "source.json")
    status = os.stat(model.cfg.MODEL.WEIGHTS)
    identity = {
        "weights": [os.path.realpath(model.cfg.MODEL.WEIGHTS), status.st_size, status.st_mtime_ns],
        "config": hashlib.sha256(model.cfg.dump().encode()).hexdigest(),
    }
    if os.path.isfile(path) and os.path.isfile(source):
        with open(source) as file:
            if json.load(file) == identity:
                with open(path) as detections:
                    return json.load(detections)
    os.makedirs(folder, exist_ok=True)
    detector = model.build()
    detector.to(torch.device(model.cfg.MODEL.DEVICE))
    loader = build_detection_test_loader(model.cfg, model.dataset)
    inference_on_dataset(detector, loader, build_evaluator(model.cfg, model.dataset, folder))
    with open(source, "w") as file:
        json.dump(identity, file)
    with open(path) as detections:
        return json.load(detections)
