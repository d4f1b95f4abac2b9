"""Detection in images of one's own: each image with its detections drawn, and all detections as COCO json."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, detection_utils
from detectron2.data import transforms as T
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model
from detectron2.structures import Instances
from PIL import Image
from torch import nn

from .adapters import build_adapter
from .analysis.drawing import draw_instances
from .checkpoint import load_complete
from .class_names import names_in_checkpoint
from .data import read_image, register_synthetic
from .data.coco import read_categories as read_category_entries
from .data.images import DataError, open_image, read_checked
from .engine.checks import check_output_folder
from .errors import UserError
from .files import write_json

logger = logging.getLogger(__name__)


@dataclass
class Category:
    """A class: `id` is the data set's own if it is known, else the model's index of the class."""

    id: int
    name: str


def find_images(inputs: list[str]) -> list[str]:
    """The images among files and folders, each once. Other files in a folder are skipped, with a line in the log.

    Raises:
        UserError: a path does not exist, a file is not an image, or there is no image at all.
    """
    images, skipped = [], []
    for path in inputs:
        if os.path.isdir(path):
            entries = _files_of(path)
            for entry in entries:
                (skipped if _problem(entry) else images).append(entry)
        elif os.path.isfile(path):
            problem = _problem(path)
            if problem is not None:
                raise UserError(f"--input: {problem}")
            images.append(path)
        else:
            raise UserError(f"--input: there is no image or folder {path}.")
    if skipped:
        names = ", ".join(os.path.basename(path) for path in skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        logger.info(f"Skipped {len(skipped)} files that cannot be read as images: {names}")
    if not images:
        raise UserError(f"--input: there is no image in {', '.join(inputs)}.")
    unique: dict[str, str] = {}
    for image in images:
        unique.setdefault(os.path.realpath(image), image)
    return list(unique.values())


def _files_of(folder: str) -> list[str]:
    try:
        return sorted(entry.path for entry in os.scandir(folder) if entry.is_file() and entry.name[0] != ".")
    except OSError as error:
        raise UserError(f"--input: the folder {folder} cannot be read: {error.strerror}.") from error


def _problem(path: str) -> str | None:
    """A sentence why a file cannot be read as an image; None if it can."""

    def read() -> None:
        with open_image(path) as image:
            image.load()

    try:
        return read_checked(path, read)
    except DataError as error:
        return str(error)


def drawing_paths(images: list[str], folder: str) -> list[str]:
    """For each image the file to draw it to; images of the same name are numbered.

    Raises:
        UserError: a drawing would replace an input.
    """
    inputs = {os.path.realpath(path) for path in images}
    taken, paths = set(), []
    for image in images:
        stem = os.path.splitext(os.path.basename(image))[0]
        name, number = f"{stem}.jpg", 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}.jpg"
        taken.add(name)
        path = os.path.join(folder, name)
        if os.path.realpath(path) in inputs:
            raise UserError(f"--output: the drawing {path} would replace an input image; choose another folder.")
        paths.append(path)
    return paths


def read_categories(cfg: CfgNode, num_classes: int | None) -> list[Category] | None:
    """The model's classes: by the names in its checkpoint, with the ids of the first data set of DATASETS.TEST or TRAIN that has them.

    A checkpoint without names takes them from the first of these sets that has as many classes.

    Returns:
        By class index; None if the number of the model's classes is unknown.
    """
    if num_classes is None:
        return None
    register_synthetic()
    files = {name: path for name, path, _ in cfg.DATASETS.COCO_JSON}
    own = names_in_checkpoint(cfg.MODEL.WEIGHTS)
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        categories = _categories_of_file(files[name]) if name in files else _categories_of_catalog(name)
        if own is None and len(categories) == num_classes:
            return categories
        id_of = {category.name: category.id for category in categories}
        if own is not None and {*own.names} <= id_of.keys():
            return [Category(id_of[name], name) for name in own.names]
    names = own.names if own else [f"class {number}" for number in range(num_classes)]
    return [Category(number, name) for number, name in enumerate(names)]


def _categories_of_file(path: str) -> list[Category]:
    try:
        return [Category(entry["id"], entry["name"]) for entry in read_category_entries(path)]
    except UserError:
        return []


def _categories_of_catalog(name: str) -> list[Category]:
    metadata = MetadataCatalog.get(name)
    names = metadata.get("thing_classes") or []
    number_of = metadata.get("thing_dataset_id_to_contiguous_id") or {n: n for n in range(len(names))}
    ids = {number: own for own, number in number_of.items()}
    return [Category(ids[number], name) for number, name in enumerate(names)]


class Predictor:
    """Detects objects in image files, with the results of Detectron2's DefaultPredictor.

    Checkpoints are read as safely as in training, and must fill the model completely.

    Args:
        cfg: a plain detector's config, as `load_config(..., student_only=True)` returns it.
        score_thresh: lowest score of a detection, even if the config's own threshold is higher.

    Raises:
        UserError: the checkpoint cannot be read, or does not belong to the config.
    """

    def __init__(self, cfg: CfgNode, score_thresh: float = 0.5):
        self.score_thresh = score_thresh
        self.input_format = cfg.INPUT.FORMAT
        self.resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
        self.model: nn.Module = build_model(cfg).eval()
        load_complete(self.model, cfg.MODEL.WEIGHTS, "the detector")
        for module in self.model.modules():
            if hasattr(module, "test_score_thresh"):
                module.test_score_thresh = min(module.test_score_thresh, score_thresh)

    @torch.no_grad()
    def __call__(self, path: str) -> Instances:
        """The detections in an image, on the CPU, in the image's own pixels.

        Raises:
            UserError: the model is no detector, or the image cannot be used.
        """
        outputs = self.model([read_checked(path, lambda: self._read(path))])[0]
        if "instances" not in outputs:
            raise UserError(
                f"The model ({type(self.model).__name__}) is not a detector: it returns {', '.join(outputs)}."
            )
        detections = outputs["instances"].to("cpu")
        return detections[detections.scores >= self.score_thresh]

    def _read(self, path: str) -> dict[str, Any]:
        image = detection_utils.read_image(path, self.input_format)
        height, width = image.shape[:2]
        resized = self.resize.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
        return {"image": tensor, "height": height, "width": width}


def to_annotations(
    detections: Instances, image_id: int, categories: list[Category] | None, first_id: int
) -> list[dict]:
    """COCO annotations with scores, numbered from `first_id`."""
    annotations = []
    for number, entry in enumerate(instances_to_coco_json(detections, image_id)):
        if categories:
            entry["category_id"] = categories[entry["category_id"]].id
        area = entry["bbox"][2] * entry["bbox"][3]
        annotations.append({"id": first_id + number, **entry, "area": area, "iscrowd": 0})
    return annotations


def predict_images(cfg: CfgNode, inputs: list[str], output: str, score_thresh: float) -> dict[str, Any]:
    """Detect objects in images, draw them into `output`, and write `output`/detections.json.

    Args:
        cfg: a plain detector's config; MODEL.WEIGHTS is its checkpoint.
        inputs: image files, and folders of images.
        output: folder of the drawings and of detections.json.
        score_thresh: lowest score of a detection.

    Returns:
        What detections.json holds, as pycocotools loads it: "images" (with the file that was read and the drawing),
        "annotations" (boxes with scores), "categories", and "info" about the run.

    Raises:
        UserError: an input, the checkpoint or the output folder cannot be used.
    """
    if not 0 <= score_thresh <= 1:
        raise UserError(f"--score-thresh is {score_thresh}; it must lie between 0 and 1.")
    images = find_images(inputs)
    drawings = drawing_paths(images, output)
    predictor = Predictor(cfg, score_thresh)
    check_output_folder(output, "--output")
    categories = read_categories(cfg, build_adapter(predictor.model).spec.num_classes)

    entries, annotations = [], []
    for number, (path, drawing) in enumerate(zip(images, drawings), 1):
        detections = predictor(path)
        drawn = draw_instances(read_image(path, "RGB"), detections, [c.name for c in categories or []])
        Image.fromarray(drawn).save(drawing, quality=95)
        height, width = detections.image_size
        entries.append(
            {"id": number, "file_name": path, "width": width, "height": height, "drawing": os.path.basename(drawing)}
        )
        annotations += to_annotations(detections, number, categories, first_id=len(annotations) + 1)
        logger.info(f"[{number}/{len(images)}] {path}: {len(detections)} detections")

    seen = categories or [Category(c, f"class {c}") for c in sorted({a["category_id"] for a in annotations})]
    tree = {
        "info": {"weights": cfg.MODEL.WEIGHTS, "score_thresh": score_thresh},
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": c.id, "name": c.name} for c in seen],
    }
    path = os.path.join(output, "detections.json")
    write_json(path, tree, indent=None)
    logger.info(f"{len(annotations)} detections in {len(images)} images: {path}, with the drawings beside it")
    return tree
