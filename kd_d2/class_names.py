"""Class names stored in checkpoints, and matching of models to data by them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import GeneralizedRCNN
from torch import nn

from .adapters import build_adapter
from .adapters.adapter import WITHOUT_OBJECT_CLASSES
from .checkpoint import CLASS_NAMES, read_checkpoint
from .config_files import find_file
from .data.coco import read_categories
from .data.coco_json import ClassOrder
from .errors import UserError
from .text import label

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassCount:
    """The number of classes that a detector predicts.

    Attributes:
        number: the number.
        detector: name of the detector's class.
        key: config key of the number; None for a kind of detector that is not known.
    """

    number: int
    detector: str
    key: str | None

    @classmethod
    def in_config(cls, cfg: CfgNode, detector: Callable) -> ClassCount | None:
        """Return the number of a kind of detector from its config key, or None if the key is not known."""
        key = class_count_key(cfg, detector)
        return cls(cfg.MODEL[key.split(".")[1]].NUM_CLASSES, detector.__name__, key) if key else None

    def difference(self, dataset: str, classes: int, placeholder: str | None = None) -> str | None:
        """Return a sentence on how a dataset with another number of classes differs, or None if it has the same.

        Args:
            dataset, classes: name of the dataset, and its number of classes.
            placeholder: name, in quotes, of a category that was dropped when the dataset was read.
        """
        if classes == self.number:
            return None
        without = f" (without the placeholder category {placeholder})" if placeholder else ""
        return (
            f"The dataset {dataset} has {classes} classes{without}, but the model ({self.detector}) predicts {self.number}: "
            f"set {self.key or 'its number of classes'} accordingly."
        )


def class_count_key(cfg: CfgNode, detector: Callable) -> str | None:
    """Return the config key of the number of classes of a kind of detector, which may subclass a known one.

    None if it is of another kind, or a function that builds a detector.
    """
    if not isinstance(detector, type):
        return None
    if issubclass(detector, GeneralizedRCNN):
        return "MODEL.ROI_HEADS.NUM_CLASSES"
    nodes = (base.__name__.upper() for base in detector.__mro__)
    return next((f"MODEL.{node}.NUM_CLASSES" for node in nodes if "NUM_CLASSES" in cfg.MODEL.get(node, {})), None)


def names_in_checkpoint(path: str) -> ClassOrder | None:
    """Return the classes in a checkpoint of this library by class index; None if the file has none or is not one.

    Args:
        path: file or URL; only a local `.pth` file is read.
    """
    file = path.partition("?")[0]
    if not file.endswith(".pth") or not os.path.isfile(file):
        return None
    try:
        names = read_checkpoint(file).get(CLASS_NAMES)
    except UserError:  # reported when its weights are loaded
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return ClassOrder(tuple(names), file)


def names_in_training_set(cfg: CfgNode) -> ClassOrder | None:
    """Return the classes of the first DATASETS.TRAIN set in DATASETS.COCO_JSON, or None if they are unknown."""
    try:
        return read_names_of_training_set(cfg)
    except UserError:
        return None


def read_names_of_training_set(cfg: CfgNode, folder: str = "") -> ClassOrder:
    """Return the classes of the first DATASETS.TRAIN set in DATASETS.COCO_JSON by category id.

    Args:
        folder: directory against which relative paths are resolved if they are not found in the working directory.

    Raises:
        UserError: no set of DATASETS.TRAIN is in DATASETS.COCO_JSON, or its file cannot be read or has no classes.
    """
    files = {name: json_file for name, json_file, _ in cfg.DATASETS.COCO_JSON}
    name = next((name for name in cfg.DATASETS.TRAIN if name in files), None)
    if name is None:
        raise UserError(
            f"DATASETS.TRAIN ({', '.join(cfg.DATASETS.TRAIN) or 'empty'}) names no entry of DATASETS.COCO_JSON "
            f"({', '.join(files) or 'empty'})."
        )
    path = find_file(files[name], f"DATASETS.COCO_JSON ({name})", folder)
    names = tuple(category["name"] for category in read_categories(path))
    if not names:
        raise UserError(f"{path} has no categories.")
    return ClassOrder(names, path)


def names_in_data(cfg: CfgNode, *, train: bool = False) -> ClassOrder | None:
    """Return the registered classes of the config's datasets, in the model's order, or None if no dataset has any.

    Args:
        train: whether the first set of DATASETS.TRAIN determines them. Otherwise it is the first set in
            DATASETS.COCO_JSON, since a built-in one may be an unchanged default.
    """
    own = {entry[0] for entry in cfg.DATASETS.COCO_JSON}
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    for name in sorted(names, key=lambda name: not train and name not in own):
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes:
            return ClassOrder(tuple(classes), f"the dataset {name}")
    return None


def match_classes(model: nn.Module, whose: str, own: ClassOrder | None, wanted: ClassOrder | None) -> None:
    """Reorder a model's classes in place by permuting its weights.

    Do nothing if either order is unknown, or the model does not classify objects.

    Args:
        model: detector with its weights.
        whose: name of the model in messages, such as "the teacher".
        own: current class order of the model.
        wanted: target class order.

    Raises:
        UserError: the class names differ, or this kind of detector does not support reordering.
    """
    if own is None or wanted is None or own.names == wanted.names or isinstance(model, WITHOUT_OBJECT_CLASSES):
        return
    if sorted(own.names) != sorted(wanted.names):
        lacking = [name for name in wanted.names if name not in own.names]
        extra = [name for name in own.names if name not in wanted.names]
        differences = [f"lacks {', '.join(map(repr, lacking[:5]))}"] if lacking else []
        differences += [f"also has {', '.join(map(repr, extra[:5]))}"] if extra else []
        raise UserError(
            f"The classes of {whose} ({own.source}) are not those of {wanted.source}: it {' and '.join(differences)}; rename them "
            "in the annotations, or use a model with the same classes."
        )
    build_adapter(model).reorder_classes([own.names.index(name) for name in wanted.names])
    logger.info(f"The classes of {whose} are reordered to match {wanted.source}: {', '.join(wanted.names)}")


def warn_of_unknown_order(whose: str, wanted: ClassOrder, remedy: str) -> None:
    """Log a warning that a model is assumed to have the classes of `wanted`, unless there is only one order."""
    if len(wanted.names) < 2:
        return
    names = ", ".join(map(label, wanted.names[:3])) + (", ..." if len(wanted.names) > 3 else "")
    logger.warning(
        f"The class order of {whose} is unknown; it is assumed to be that of {wanted.source} ({names}). If it is not, {remedy}."
    )


def as_comment(names: tuple[str, ...]) -> str:
    """Return a YAML comment with the class names, for which Detectron2 has no config key."""
    return f"# class_names: {json.dumps(names)}\n"
