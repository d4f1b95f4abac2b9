"""Inference on images with a trained detector."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import Instances
from PIL.Image import getmodebands

from .adapters import build_adapter
from .checkpoint import load_complete
from .class_names import names_in_checkpoint, names_in_training_set
from .data import read_image, register_synthetic
from .data.coco import read_categories as read_category_entries
from .data.images import resize_at_test
from .engine.checks import check_plain, check_supported
from .errors import UserError
from .modeling.building import build_detector, lower_score_threshold
from .moved import explain_names

logger = logging.getLogger(__name__)

SCORE_THRESH = 0.5
"""Default minimum score of a detection."""


@dataclass
class Category:
    """A class. `id` is the dataset's category id if known, else the model's class index."""

    id: int
    name: str


def read_categories(cfg: CfgNode, num_classes: int | None) -> list[Category] | None:
    """Return the model's classes: names from its checkpoint, ids from the first set of DATASETS.TEST or TRAIN with them.

    If the checkpoint has no names, they are taken from the first training set in DATASETS.COCO_JSON, else from the
    first of these sets that has `num_classes` classes. If no set gives ids, class indices are used, which is logged.

    Returns:
        Classes by class index, or None if `num_classes` is None.
    """
    if num_classes is None:
        return None
    register_synthetic()
    files = {name: path for name, path, _ in cfg.DATASETS.COCO_JSON}
    own = names_in_checkpoint(cfg.MODEL.WEIGHTS) or names_in_training_set(cfg)
    if own is not None and len(own.names) != num_classes:
        own = None
    sets = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)
    for name in sets:
        categories = _categories_of_file(files[name]) if name in files else _categories_of_catalog(name)
        if own is None and len(categories) == num_classes:
            return categories
        id_of = {category.name: category.id for category in categories}
        if own is not None and {*own.names} <= id_of.keys():
            return [Category(id_of[name], name) for name in own.names]
    logger.info(
        "No dataset of the config gives the category ids of the model's classes: class indices are used as ids."
    )
    known = [own.names] if own else [MetadataCatalog.get(name).get("thing_classes") or () for name in sets]
    names = next((names for names in known if len(names) == num_classes), unknown_names(num_classes))
    return [Category(number, name) for number, name in enumerate(names)]


def unknown_names(count: int) -> list[str]:
    """Return the names of classes whose own names are unknown."""
    return [f"class {number}" for number in range(count)]


def _categories_of_file(path: str) -> list[Category]:
    try:
        return [Category(entry["id"], entry["name"]) for entry in read_category_entries(path)]
    except UserError:
        return []


def _categories_of_catalog(name: str) -> list[Category]:
    """Return the classes of a registered set, or nothing if their ids are unknown.

    Detectron2 sets the ids of many sets only when it loads them; they are those of the annotation file.
    """
    metadata = MetadataCatalog.get(name)
    names = list(metadata.get("thing_classes") or ())
    number_of = metadata.get("thing_dataset_id_to_contiguous_id")
    if number_of:
        ids = {number: own for own, number in number_of.items()}
        return [Category(ids[number], name) for number, name in enumerate(names)]
    if names and metadata.get("evaluator_type") == "lvis":
        return [Category(number, name) for number, name in enumerate(names, 1)]
    categories = _categories_of_file(metadata.get("json_file") or "")
    return categories if not names or names == [category.name for category in categories] else []


class ImageDetector:
    """Detects objects in images with any model that has the call interface of Detectron2's models.

    Args:
        model: function from dictionaries with "image" (C, H, W), "height" and "width" to dictionaries with "instances".
        input_format: INPUT.FORMAT of the model.
        resize: function from an image's (height, width) to its resize transform.
        categories: classes by class index; None if unknown.
        score_thresh: minimum score of a detection.
    """

    def __init__(
        self,
        model: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
        input_format: str,
        resize: Callable[[int, int], T.Transform],
        categories: list[Category] | None,
        score_thresh: float,
    ):
        self.model = model
        self.input_format = input_format
        self.resize = resize
        self.categories = categories
        self.score_thresh = score_thresh

    def __call__(self, path: str) -> Instances:
        """Detect objects in an image file; the detections are on the CPU, in pixels of the original image.

        Raises:
            UserError: the model is not a detector, or the image cannot be used.
        """
        return self.detect([read_image(path, self.input_format)])[0]

    @torch.no_grad()
    def detect(self, images: list[np.ndarray]) -> list[Instances]:
        """Detect objects in images (H, W, C) of `input_format`, with values from 0 to 255 as uint8 or floats.

        The detections are on the CPU, in pixels of each input image.

        Consecutive images of equal size after resizing are batched. The results are those of single images, since no
        image is padded to the size of another.

        Raises:
            UserError: the model is not a detector, or an image has another shape or type.
        """
        entries = [self.prepare(image) for image in images]
        found = []
        for _, batch in itertools.groupby(entries, key=lambda entry: entry["image"].shape):
            for outputs in self.model(list(batch)):
                if "instances" not in outputs:
                    name = type(self.model).__name__
                    raise UserError(f"The model ({name}) is not a detector: it returns {', '.join(outputs)}.")
                detections = outputs["instances"].to("cpu")
                found.append(detections[detections.scores >= self.score_thresh])
        return found

    def prepare(self, image: np.ndarray) -> dict[str, Any]:
        """Return the model's input for an image (H, W, C) as `detect` takes them: resized, with the original size.

        Raises:
            UserError: the image has another shape or type.
        """
        channels = 3 if self.input_format in ("BGR", "YUV-BT.601") else getmodebands(self.input_format)
        is_array = isinstance(image, np.ndarray)
        is_usable = is_array and image.size and image.ndim == 3 and image.shape[2] == channels
        if not is_usable or not (image.dtype == np.uint8 or np.issubdtype(image.dtype, np.floating)):
            found = f"of shape {image.shape} and type {image.dtype}" if is_array else f"of type {type(image).__name__}"
            raise UserError(
                f"`detect` takes a list of images, each a NumPy array of shape (height, width, {channels}) and type uint8 or float; "
                f"one is {found}."
            )
        height, width = image.shape[:2]
        resized = self.resize(height, width).apply_image(image)
        tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
        return {"image": tensor, "height": height, "width": width}


class Predictor(ImageDetector):
    """A trained PyTorch detector, with the same results as Detectron2's DefaultPredictor.

    Checkpoints are loaded as safely as in training and must contain all of the model's weights.

    Args:
        cfg: plain detector config, as returned by `load_config(..., student_only=True)`.
        score_thresh: minimum score of a detection; overrides higher thresholds of the config.

    Raises:
        UserError: the config is not supported, or the checkpoint cannot be read or does not match it.
    """

    def __init__(self, cfg: CfgNode, score_thresh: float = SCORE_THRESH):
        check_plain(cfg)
        check_supported(cfg)
        model = build_detector(cfg).eval()
        load_complete(model, cfg.MODEL.WEIGHTS, "the detector")
        lower_score_threshold(model, score_thresh)
        resize = partial(resize_at_test, min_size=cfg.INPUT.MIN_SIZE_TEST, max_size=cfg.INPUT.MAX_SIZE_TEST)
        categories = read_categories(cfg, build_adapter(model).spec.num_classes)
        super().__init__(model, cfg.INPUT.FORMAT, resize, categories, score_thresh)


__getattr__ = explain_names(__name__)
