"""Names of classes: they travel with checkpoints, and models and data are matched by them."""

from __future__ import annotations

import json
import logging
import os
from urllib.parse import urlparse

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import nn

from .adapters import build_adapter
from .checkpoint import CLASS_NAMES, read_checkpoint
from .config_files import find_file
from .data.coco import read_categories
from .data.coco_json import ClassOrder
from .errors import UserError

logger = logging.getLogger(__name__)


def names_in_checkpoint(path: str) -> ClassOrder | None:
    """The classes of a checkpoint of this library by the model's class index; None where a file has none, or is none.

    Args:
        path: file or URL; only a local file is read.
    """
    file = urlparse(path).path
    if not file.endswith(".pth") or not os.path.isfile(file):
        return None
    try:
        names = read_checkpoint(file).get(CLASS_NAMES)
    except UserError:  # is said where its weights are loaded
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return ClassOrder(tuple(names), file)


def names_in_training_set(cfg: CfgNode, folder: str = "") -> ClassOrder | None:
    """The classes of the first set of DATASETS.TRAIN that DATASETS.COCO_JSON has, in order of category id; None if it is not there.

    Args:
        folder: relative paths count from the working directory, then from here.
    """
    files = {name: json_file for name, json_file, _ in cfg.DATASETS.COCO_JSON}
    try:
        path = next(
            find_file(files[name], "DATASETS.COCO_JSON", folder) for name in cfg.DATASETS.TRAIN if name in files
        )
        names = tuple(category["name"] for category in read_categories(path))
    except (StopIteration, UserError):
        return None
    return ClassOrder(names, path) if names else None


def names_in_data(cfg: CfgNode) -> ClassOrder | None:
    """The classes of the config's datasets as they are registered, in the model's order; None if no set is known."""
    own = {entry[0] for entry in cfg.DATASETS.COCO_JSON}
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    for name in sorted(names, key=lambda name: name not in own):  # a built-in one may be the default that nobody chose
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes:
            return ClassOrder(tuple(classes), f"the dataset {name}")
    return None


def match_classes(model: nn.Module, whose: str, own: ClassOrder | None, wanted: ClassOrder | None) -> None:
    """Put a model's classes into another order, in place, exactly; nothing happens where one order is unknown.

    Args:
        model: a detector with its weights.
        whose: for messages, such as "the teacher".
        own: the order of its classes now.
        wanted: the order that they shall have.

    Raises:
        UserError: the two have different classes, or this kind of detector cannot be changed.
    """
    if own is None or wanted is None or own.names == wanted.names:
        return
    if sorted(own.names) != sorted(wanted.names):
        lacking = [name for name in wanted.names if name not in own.names]
        extra = [name for name in own.names if name not in wanted.names]
        differences = [f"lacks {', '.join(map(repr, lacking[:5]))}"] if lacking else []
        differences += [f"has {', '.join(map(repr, extra[:5]))} beside them"] if extra else []
        raise UserError(
            f"The classes of {whose} ({own.source}) are not those of {wanted.source}: it {' and '.join(differences)}; rename them "
            "in the annotations, or take a model of the same classes."
        )
    build_adapter(model).reorder_classes([own.names.index(name) for name in wanted.names])
    logger.info(f"The classes of {whose} are put into the order of {wanted.source}: {', '.join(wanted.names)}")


def as_comment(names: tuple[str, ...]) -> str:
    """A line for a yaml file that keeps the names where Detectron2 has no key for them."""
    return f"# class_names: {json.dumps(names)}\n"
