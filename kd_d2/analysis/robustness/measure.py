"""Resumable evaluation of a detector on corrupted images: each corruption and severity is saved once measured."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import build_augmentation, convert_PIL_to_numpy
from detectron2.data.transforms import AugInput, AugmentationList
from detectron2.evaluation import inference_on_dataset
from PIL import Image
from torch import nn

from ...data import build_test_loader, read_image
from ...errors import UserError
from ...evaluation import build_evaluator
from ...files import read_json, temporary_folder, write_json
from ..models import TrainedModel, check_models
from .corruptions import check_large_enough, corrupt
from .metrics import Metrics, Robustness

CLEAN = "clean"


class CorruptedMapper:
    """Reads an image, corrupts it at its original size, and applies the test augmentations of the config.

    Args:
        corruption: one of CORRUPTIONS; None for clean images.
    """

    def __init__(self, cfg: CfgNode, corruption: str | None, severity: int):
        self.format = cfg.INPUT.FORMAT
        self.augmentations = AugmentationList(build_augmentation(cfg, is_train=False))
        self.corruption = corruption
        self.severity = severity

    def __call__(self, entry: dict[str, Any]) -> dict[str, Any]:
        image = read_image(entry["file_name"], "RGB")
        size = dict(zip(("height", "width"), image.shape[:2], strict=True))
        if self.corruption is not None:
            image = corrupt(image, self.corruption, self.severity, entry["image_id"])
        source = AugInput(convert_PIL_to_numpy(Image.fromarray(image), self.format))
        self.augmentations(source)
        tensor = torch.from_numpy(np.ascontiguousarray(source.image.transpose(2, 0, 1)))
        return {**size, **{k: v for k, v in entry.items() if k != "annotations"}, "image": tensor}


class RobustnessRecord:
    """The metrics measured so far for a model, stored in DIR/TITLE/robustness.json.

    Raises:
        UserError: the existing file is for different weights, a different config or different images.
    """

    def __init__(self, model: TrainedModel, output: str):
        self.path = os.path.join(output, model.folder_name, "robustness.json")
        self.title = model.title
        self.identity = model.identity()
        self.cells = self._stored()

    def _stored(self) -> dict[str, Metrics]:
        if not os.path.isfile(self.path):
            return {}
        found = read_json(self.path)
        if not isinstance(found, dict) or found.get("identity") != self.identity:
            raise UserError(
                f"--output: {self.path} was measured with different weights, config or images than {self.title} "
                "has now; use another folder or remove the file."
            )
        return {
            name: {metric: math.nan if value is None else value for metric, value in metrics.items()}
            for name, metrics in found["cells"].items()
        }

    def add(self, name: str, metrics: Metrics) -> None:
        """Store a measurement, and keep those that other processes have stored in the meantime."""
        self.cells = {**self._stored(), **self.cells, name: metrics}
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        write_json(self.path, {"identity": self.identity, "cells": self.cells})


def cell_name(corruption: str, severity: int) -> str:
    return f"{corruption}/{severity}"


def check_measurable(models: Sequence[TrainedModel], output: str) -> None:
    """Raise a UserError if `output` has a record of a different model, or one of several models cannot be built."""
    for model in models:
        RobustnessRecord(model, output)
    check_models(models)


def measure_robustness(
    model: TrainedModel,
    output: str,
    corruptions: Sequence[str],
    severities: Sequence[int],
    workers: int,
    progress: Callable[..., Any],
) -> Robustness:
    """Evaluate a detector on clean images, and under every corruption and severity that has not been measured yet.

    Args:
        output: folder of the record.
        workers: number of processes that read and corrupt images; it does not affect the results.
        progress: wraps an iterable and takes a description, such as tqdm.
    """
    record = RobustnessRecord(model, output)
    wanted = {CLEAN: (None, 0)} | {cell_name(c, s): (c, s) for c in corruptions for s in severities}
    for entry in DatasetCatalog.get(model.dataset):
        check_large_enough((entry["height"], entry["width"]), entry["image_id"])
    missing = {name: cell for name, cell in wanted.items() if name not in record.cells}
    detector = None
    for name, (corruption, severity) in missing.items():
        detector = detector or model.build()
        note = f"{model.title}: {name} ({len(record.cells.keys() & wanted.keys())} of {len(wanted)} done)"
        mapper = CorruptedMapper(model.cfg, corruption, severity)
        record.add(name, _evaluate(model, detector, mapper, workers, progress, note))
    of = {c: {s: record.cells[cell_name(c, s)] for s in severities} for c in corruptions}
    return Robustness(record.cells[CLEAN], of)


def _evaluate(
    model: TrainedModel,
    detector: nn.Module,
    mapper: CorruptedMapper,
    workers: int,
    progress: Callable[..., Any],
    note: str,
) -> Metrics:
    loader = build_test_loader(model.cfg, model.dataset, mapper, num_workers=workers)
    with temporary_folder() as folder, contextlib.redirect_stdout(io.StringIO()):
        evaluator = build_evaluator(model.cfg, model.dataset, folder)
        results = inference_on_dataset(detector, progress(loader, desc=note), evaluator)["bbox"]
    return {name: value for name, value in results.items() if not name.startswith("AP-")}
