"""Loading, repair and registration of the COCO-format datasets in DATASETS.COCO_JSON."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from ..cache import cache_folder
from ..config import reads_annotations
from ..errors import UserError
from ..files import write_text
from ..text import composed
from .coco import CocoData, read_coco
from .coco.boxes import reaches_out
from .coco.keypoints import keypoint_names, mirrored_keypoints
from .coco.reader import PLACEHOLDERS

logger = logging.getLogger(__name__)


@dataclass
class CocoSummary:
    """Counts of an annotation file.

    Attributes:
        images, boxes: numbers of images and boxes in use.
        classes: class names sorted by category id.
        boxes_out_of_range: number of boxes that extend more than one pixel beyond their image; training clips them.
        repairs: sentences that describe the repairs.
    """

    images: int
    boxes: int
    classes: list[str]
    boxes_out_of_range: int
    repairs: list[str]


@dataclass(frozen=True)
class ClassOrder:
    """Class names in a model's order, in Unicode's form NFC.

    Attributes:
        names: class names by class index.
        source: origin of the names, for messages.
    """

    names: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(map(composed, self.names)))

    @property
    def listed(self) -> str:
        """The names, or the first 20 of them, for messages."""
        return f"{', '.join(self.names[:20])}{', ...' if len(self.names) > 20 else ''}"


def register_coco_json(cfg: CfgNode, classes: ClassOrder | None = None, *, train: bool = True) -> None:
    """Check and register the entries of DATASETS.COCO_JSON that are used in DATASETS.TRAIN or DATASETS.TEST.

    If a file needs repairs, they are logged, and a repaired copy is written to a cache folder and used as the dataset's
    `json_file`. Annotations of sets that are used only for training with pseudo-labels are not read.

    Args:
        cfg: config; DATASETS, INPUT.RANDOM_FLIP, MODEL.MASK_ON, KEYPOINT_ON and KD.PSEUDO_LABELS are read.
        classes: class order of all sets; by default that of the first set of TRAIN, else of TEST. It is sorted by
            category id, unless another program registered the set. Sets with the same classes in another order, or with
            fewer classes, are matched by name.
        train: whether the sets of TRAIN are registered, too.

    Raises:
        UserError: see `read_coco`; or a name is registered for another dataset; or a set has other classes.
    """
    used = [*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST]
    entries = {entry[0]: entry[1:] for entry in cfg.DATASETS.COCO_JSON}
    if classes is None and train and cfg.DATASETS.TRAIN and entries.keys() & set(used):
        classes = None if cfg.DATASETS.TRAIN[0] in entries else registered_classes(cfg.DATASETS.TRAIN[0])
    for name in dict.fromkeys(used):
        json_file, folder = entries.get(name, ("", ""))
        if not os.path.isfile(json_file):
            continue
        annotated = name in cfg.DATASETS.TEST or reads_annotations(cfg)
        status = os.stat(json_file)
        version = (status.st_mtime_ns, status.st_size)
        masks, keypoints = cfg.MODEL.MASK_ON and annotated, cfg.MODEL.KEYPOINT_ON and annotated
        registration = [json_file, folder, annotated, masks, keypoints, classes and classes.names, version]
        check_name(name, json_file)
        if name in DatasetCatalog.list() and MetadataCatalog.get(name).registration != registration:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        if name not in DatasetCatalog.list():
            data = read_coco(json_file, folder, annotated=annotated, masks=masks, keypoints=keypoints)
            _register(name, data, folder, annotated, classes)
            if keypoints:
                _register_keypoints(cfg, name, data)
            MetadataCatalog.get(name).set(registration=registration)
        if classes is None and MetadataCatalog.get(name).get("thing_classes"):
            classes = ClassOrder(tuple(MetadataCatalog.get(name).thing_classes), json_file)


def is_taken(name: str, json_file: str) -> bool:
    """Return whether a name is registered for another dataset than that of this annotation file."""
    if name not in DatasetCatalog.list():
        return False
    known = MetadataCatalog.get(name).get("registration")
    return known is None or known[0] != json_file


def check_name(name: str, json_file: str) -> None:
    """Raise a UserError if the name of an entry of DATASETS.COCO_JSON is registered for another dataset."""
    if is_taken(name, json_file):
        raise UserError(f"DATASETS.COCO_JSON: the name {name!r} is already taken by another dataset; choose a new one.")


def registered_classes(name: str) -> ClassOrder | None:
    """Return the classes of a registered set, or None if they are unknown."""
    metadata = MetadataCatalog.get(name)
    if name in DatasetCatalog.list() and not metadata.get("thing_classes"):
        with contextlib.suppress(OSError, AssertionError):  # missing files are reported by `check_datasets`
            DatasetCatalog.get(name)  # Detectron2's `register_coco_instances` reads the classes with the annotations
    names = metadata.get("thing_classes")
    return ClassOrder(tuple(names), f"the dataset {name}") if names else None


def _register(name: str, data: CocoData, folder: str, annotated: bool, classes: ClassOrder | None) -> None:
    json_file = data.repairs.path
    if annotated and classes:
        data = with_classes(data, classes)
    log_summary(name, json_file, summarize(data))
    usable_file = json_file if data.is_as_written else write_clean(data)
    categories = data.tree["categories"]
    names = list(classes.names) if annotated and classes else data.class_names
    number_of = {category["id"]: names.index(category["name"]) for category in categories if category["name"] in names}
    load = functools.partial(_load, number_of=number_of) if annotated else _load_images
    DatasetCatalog.register(name, functools.partial(load, usable_file, folder))
    metadata = MetadataCatalog.get(name)
    metadata.set(json_file=usable_file, image_root=folder, evaluator_type="coco")
    metadata.set(placeholder=data.repairs.examples.get(PLACEHOLDERS))
    if names:
        metadata.set(thing_classes=names, thing_dataset_id_to_contiguous_id=number_of)


def _register_keypoints(cfg: CfgNode, name: str, data: CocoData) -> None:
    """Set the names of the keypoints and which ones a horizontal flip swaps, if the file has names."""
    path, names = data.repairs.path, keypoint_names(data.repairs.path, data.tree["categories"])
    pairs, alone = mirrored_keypoints(names)
    if names and name in cfg.DATASETS.TRAIN and cfg.INPUT.RANDOM_FLIP == "horizontal":
        if alone:
            raise UserError(
                f"{path}: the keypoint {alone[0]!r} has no counterpart of the other side, so that it is unclear what a horizontal flip "
                "swaps; rename it, or set INPUT.RANDOM_FLIP 'none'."
            )
        swapped = ", ".join(f"{left} and {right}" for left, right in pairs)
        if pairs:
            logger.info(f"{name}: horizontal flips swap the keypoints {swapped}")
        else:
            logger.warning(
                f"{name}: horizontal flips swap no keypoints, since the names of none differ in left and right ({', '.join(names)}); if some "
                "have a side, rename them, or set INPUT.RANDOM_FLIP 'none'."
            )
    if names:
        MetadataCatalog.get(name).set(keypoint_names=names, keypoint_flip_map=pairs)


def with_classes(data: CocoData, classes: ClassOrder) -> CocoData:
    """Return the data with exactly the given classes, dropping or adding classes without boxes; category ids are kept.

    Raises:
        UserError: there are boxes of other classes, or the data have none of the given classes.
    """
    path, categories = data.repairs.path, data.tree["categories"]
    used = {annotation["category_id"] for annotation in data.tree["annotations"]}
    for category in categories:
        if category["name"] not in classes.names and category["id"] in used:
            raise UserError(
                f"{path} has boxes of the class {category['name']!r}, which {classes.source} does not have "
                f"({classes.listed}): rename the class in one of them, or remove its boxes."
            )
    kept = [category for category in categories if category["name"] in classes.names]
    if not kept:
        raise UserError(
            f"{path} has none of the classes of {classes.source} ({classes.listed}): rename them in one of them."
        )
    missing = [name for name in classes.names if name not in data.class_names]
    next_id = max(category["id"] for category in categories) + 1
    added = [{"id": next_id + number, "name": name} for number, name in enumerate(missing)]
    if len(kept) == len(categories) and not added:
        if tuple(data.class_names) != classes.names:
            logger.info(f"{path}: its classes are matched by name with those of {classes.source}, whose order differs.")
        return data
    for category in categories:
        if category not in kept:
            data.repairs.add(f"categories without boxes dropped that are not in {classes.source}", category["name"])
    for category in added:
        data.repairs.add(f"categories added from {classes.source}", category["name"])
    return CocoData({**data.tree, "categories": [*kept, *added]}, data.repairs, is_as_written=False)


def write_clean(data: CocoData) -> str:
    """Write the repaired annotations to the cache folder, named by a hash of the content, and return the path."""
    content = json.dumps(data.tree)
    encoded = content.encode()
    path = os.path.join(cache_folder("annotations"), hashlib.sha256(encoded).hexdigest()[:32] + ".json")
    if not _has_content(path, encoded):
        write_text(path, content)
    logger.info(f"{data.repairs.path}: training and evaluation read the repaired copy {path}")
    return path


def _has_content(path: str, content: bytes) -> bool:
    if not os.path.isfile(path) or os.path.getsize(path) != len(content):
        return False
    with open(path, "rb") as file:
        return file.read() == content


def _load_images(json_file: str, folder: str) -> list[dict[str, Any]]:
    """Return Detectron2's dataset dictionaries of unannotated images."""
    with open(json_file, encoding="utf-8") as file:
        images = json.load(file)["images"]
    return [
        {
            "file_name": os.path.join(folder, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
        }
        for image in images
    ]


def _load(json_file: str, folder: str, number_of: dict[int, int]) -> list[dict[str, Any]]:
    """Return Detectron2's dataset dictionaries with the model's class indices."""
    dicts = load_coco_json(json_file, folder)
    for image in dicts:
        for annotation in image["annotations"]:
            annotation["category_id"] = number_of[annotation["category_id"]]
    return dicts


def check_coco_json(path: str, image_folder: str, *, annotated: bool = True, masks: bool = False) -> CocoSummary:
    """Read an annotation file in COCO format and check that Detectron2 can train and evaluate on it.

    Args:
        path: JSON file.
        image_folder: folder of the images.
        annotated: whether annotations are read; if False, they are optional and ignored.
        masks: whether segmentations are required.

    Raises:
        UserError: see `read_coco`.
    """
    return summarize(read_coco(path, image_folder, annotated=annotated, masks=masks))


def summarize(data: CocoData) -> CocoSummary:
    """Count the images, boxes and classes of an annotation file."""
    size_of = {image["id"]: (image["width"], image["height"]) for image in data.tree["images"]}
    annotations = data.tree["annotations"]
    return CocoSummary(
        images=len(size_of),
        boxes=len(annotations),
        classes=data.class_names,
        boxes_out_of_range=sum(reaches_out(a["bbox"], size_of[a["image_id"]]) for a in annotations),
        repairs=data.repairs.sentences(),
    )


def log_summary(name: str, path: str, summary: CocoSummary) -> None:
    """Log the counts of an annotation file, its repairs, and the number of boxes that training will clip."""
    logger.info(f"{name}: {summary.images} images, {summary.boxes} boxes, {len(summary.classes)} classes in {path}")
    for sentence in summary.repairs:
        logger.warning(sentence)
    if summary.boxes_out_of_range:
        logger.warning(f"{name}: {summary.boxes_out_of_range} boxes extend beyond their image; training clips them.")
