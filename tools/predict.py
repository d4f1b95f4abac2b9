#!/usr/bin/env python
"""Detect objects in images of one's own: each image with its detections drawn, and all detections as COCO json.

    tools/predict.py --config-file CONFIG --weights CHECKPOINT --input IMAGE_OR_FOLDER ... --output DIR
                     [--score-thresh 0.5] [KEY VALUE ...]

CONFIG is the one that the checkpoint was trained with; a distillation's stands for its student. DIR/detections.json has
"images" (with the file read and the file drawn), "annotations" (boxes with scores) and "categories", as pycocotools
loads them.
"""

import argparse
import json
import os
from dataclasses import dataclass

from kd_d2 import UserError, load_config
from kd_d2.adapters import build_adapter
from kd_d2.analysis.drawing import draw_instances
from kd_d2.checkpoint import load_complete
from kd_d2.config import find_file
from kd_d2.data import register_synthetic
from kd_d2.engine.checks import check_output_folder
from kd_d2.errors import exit_on_user_error

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model
from detectron2.structures import Instances
from PIL import Image
from torch import nn


@dataclass
class Category:
    """A class: `id` is the data set's own where it is known, else the model's number of the class."""

    id: int
    name: str


def find_images(inputs: list[str]) -> list[str]:
    """The images among files and folders, each once. What a folder holds beside images is counted and left out.

    Raises:
        UserError: a path is not there, a named file is no image, or there is no image at all.
    """
    images, skipped = [], []
    for path in inputs:
        if os.path.isdir(path):
            entries = _files_of(path)
            problems = {entry: _problem(entry) for entry in entries}
            images += [entry for entry, problem in problems.items() if problem is None]
            skipped += [entry for entry, problem in problems.items() if problem is not None]
        elif os.path.isfile(path):
            problem = _problem(path)
            if problem is not None:
                raise UserError(f"--input: {path} cannot be read as an image: {problem}.")
            images.append(path)
        else:
            hint = "; overrides stand behind another option" if path.isupper() and "." in path else ""
            raise UserError(f"--input: there is no image or folder {path}{hint}.")
    if skipped:
        names = ", ".join(os.path.basename(path) for path in skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        print(f"Left out {len(skipped)} files that cannot be read as images: {names}", flush=True)
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
    """Why a file cannot be read as an image; None where it can."""
    try:
        with Image.open(path) as image:
            image.load()
    except Image.UnidentifiedImageError:
        return "its format is none that is known"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # whatever PIL's readers raise
        return (getattr(error, "strerror", None) or str(error)).rstrip(".")
    return None


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


def read_config(args: argparse.Namespace) -> CfgNode:
    """The detector's config with the checkpoint as its weights."""
    wrong = [opt for opt in args.opts if opt.startswith("--")]
    if wrong:
        raise UserError(f"{wrong[0]} stands behind the overrides; options come before them.")
    weights = find_file(args.weights, "--weights")
    return load_config(args.config_file, [*args.opts, "MODEL.WEIGHTS", weights], student_only=True, needs_data=False)


def read_categories(cfg: CfgNode, num_classes: int | None) -> list[Category] | None:
    """The model's classes, named by the first data set of DATASETS.TEST or TRAIN that is known and has as many.

    None where the model does not say how many it has.
    """
    if num_classes is None:
        return None
    register_synthetic()
    annotations = {name: path for name, path, _ in cfg.DATASETS.COCO_JSON}
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        categories = _categories_of_file(annotations[name]) if name in annotations else _categories_of_catalog(name)
        if len(categories) == num_classes:
            return categories
    return [Category(number, f"class {number}") for number in range(num_classes)]


def _categories_of_file(path: str) -> list[Category]:
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)["categories"]
        return sorted((Category(int(e["id"]), str(e["name"])) for e in entries), key=lambda c: c.id)
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _categories_of_catalog(name: str) -> list[Category]:
    metadata = MetadataCatalog.get(name)
    names = metadata.get("thing_classes") or []
    number_of = metadata.get("thing_dataset_id_to_contiguous_id") or {n: n for n in range(len(names))}
    ids = {number: own for own, number in number_of.items()}
    return [Category(ids[number], name) for number, name in enumerate(names)]


class Predictor:
    """Detects what DefaultPredictor would, in image files, with checkpoints that are read as safely as in training.

    Args:
        cfg: a plain detector's config; MODEL.WEIGHTS has to fill the model completely.
        score_thresh: lowest score of a detection, also where the config's own threshold is higher.
    """

    def __init__(self, cfg: CfgNode, score_thresh: float):
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
            UserError: the model is no detector.
        """
        image = read_image(path, self.input_format)
        height, width = image.shape[:2]
        resized = self.resize.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
        outputs = self.model([{"image": tensor, "height": height, "width": width}])[0]
        if "instances" not in outputs:
            raise UserError(f"The model ({type(self.model).__name__}) is no detector: it returns {', '.join(outputs)}.")
        detections = outputs["instances"].to("cpu")
        return detections[detections.scores >= self.score_thresh]


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


def main(args: argparse.Namespace) -> None:
    if not 0 <= args.score_thresh <= 1:
        raise UserError(f"--score-thresh is {args.score_thresh}; it must lie between 0 and 1.")
    cfg = read_config(args)
    images = find_images(args.input)
    drawings = drawing_paths(images, args.output)
    predictor = Predictor(cfg, args.score_thresh)
    check_output_folder(args.output, "--output")
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
        print(f"[{number}/{len(images)}] {path}: {len(detections)} detections", flush=True)

    info = {"config_file": args.config_file, "weights": args.weights, "score_thresh": args.score_thresh}
    seen = categories or [Category(c, f"class {c}") for c in sorted({a["category_id"] for a in annotations})]
    tree = {
        "info": info,
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": c.id, "name": c.name} for c in seen],
    }
    path = os.path.join(args.output, "detections.json")
    with open(path, "w") as file:
        json.dump(tree, file)
    print(f"{len(annotations)} detections in {len(images)} images: {path}, and the drawings beside it")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="the detector's config, or a model-zoo name")
    parser.add_argument("--weights", required=True, help="its checkpoint")
    parser.add_argument("--input", required=True, nargs="+", help="images, and folders of images")
    parser.add_argument("--output", required=True, help="folder of the drawings and of detections.json")
    parser.add_argument("--score-thresh", type=float, default=0.5, help="lowest score of a detection (default 0.5)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides: KEY VALUE ...")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse())
