"""Synthetic object detection datasets, generated from a seed and written to disk as COCO JSON and JPEG files.

Boxes, areas and polygons cover the visible part of an object. Every object is annotated.

    python -m kd_d2.data.synthetic OUT --train 600 --val 150 --seed 0
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np

from ...errors import UserError
from ...files import temporary_folder
from .scenes import CLASSES, DRAWING_VERSION, STYLES, SUPERSAMPLING, Scene, render, visible_box

MIN_IMAGE_SIZE = 64  # px
SETTINGS_FILE = "settings.json"
DEFAULT_SEED = 0
DEFAULT_IMAGE_SIZE = 160
DEFAULT_NUM_TRAIN = 600
DEFAULT_NUM_VAL = 150
DEFAULT_STYLE = "cluttered"

_POLYGON_TOLERANCE = 0.4  # px


def _polygons(visible: np.ndarray) -> list[list[float]]:
    """Return the outer contours of the visible part as COCO polygons; holes are filled."""
    x, y, w, h = visible_box(visible)
    mask = (visible[y : y + h, x : x + w] > 0.5).astype(np.uint8)
    fine = np.repeat(np.repeat(mask, SUPERSAMPLING, axis=0), SUPERSAMPLING, axis=1)
    offset = (x * SUPERSAMPLING, y * SUPERSAMPLING)
    contours, _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=offset)
    polygons = []
    for contour in contours:
        contour = cv2.approxPolyDP(contour, _POLYGON_TOLERANCE * SUPERSAMPLING, True)
        if len(contour) >= 3:
            polygons.append(np.round((contour.reshape(-1) + 0.5) / SUPERSAMPLING, 2).tolist())
    return polygons


def _annotations(scene: Scene, image_id: int, first_id: int) -> list[dict]:
    return [
        {
            "id": first_id + i,
            "image_id": image_id,
            "category_id": category + 1,
            "bbox": [float(side) for side in visible_box(visible)],
            "area": round(float(visible.sum()), 2),
            "iscrowd": 0,
            "segmentation": _polygons(visible),
        }
        for i, (category, visible) in enumerate(zip(scene.categories, scene.visible, strict=True))
    ]


def generate_split(
    folder: str | Path, num_images: int, seed: int, *, image_size: int = DEFAULT_IMAGE_SIZE, style: str = DEFAULT_STYLE
) -> Path:
    """Generate num_images images and write them to `folder/images/*.jpg` and `folder/annotations.json`.

    Image i depends only on (seed, i, image_size, style): the same seed gives the same bytes, and a longer split
    starts with the images of a shorter one. Existing files are overwritten.

    Args:
        folder: output folder; created with its parents if it does not exist.
        num_images: number of images, 1 or more.
        seed: random seed, 0 or more.
        image_size: longer side of each image in px, MIN_IMAGE_SIZE or more; the shorter side is 68 to 92 % of it.
        style: key of `STYLES`.

    Returns:
        The path of the COCO JSON file, which is written last.

    Raises:
        UserError: an argument is out of range.
        OSError: the folder cannot be written.
    """
    _check(num_images=num_images, seed=seed, image_size=image_size, style=style)
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for index in range(num_images):
        rng = np.random.default_rng((seed, index))
        pixels, scene = render(rng, image_size, STYLES[style])
        file_name = f"{index:06d}.jpg"
        _, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(55, 96))])
        (folder / "images" / file_name).write_bytes(encoded.tobytes())
        images.append({"id": index + 1, "file_name": file_name, "width": scene.width, "height": scene.height})
        annotations += _annotations(scene, image_id=index + 1, first_id=len(annotations) + 1)
    coco = {
        "info": {"description": f"kd_d2 synthetic shapes, seed {seed}", "version": str(DRAWING_VERSION)},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
    }
    json_file = folder / "annotations.json"
    json_file.write_text(json.dumps(coco))
    return json_file


def _check(*, seed: int, image_size: int, style: str, **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name} must be 1 or more, got {count}.")
    if seed < 0:
        raise UserError(f"seed must be 0 or more, got {seed}.")
    if image_size < MIN_IMAGE_SIZE:
        raise UserError(f"image_size must be {MIN_IMAGE_SIZE} px or more, got {image_size}.")
    if style not in STYLES:
        raise UserError(f"style must be one of {', '.join(STYLES)}, got {style!r}.")


def _holds_set(root: Path, settings: dict[str, int | str]) -> bool:
    """Return whether root contains the set with these settings; raise a UserError if it contains anything else."""
    try:
        if not root.exists() or (root.is_dir() and not any(root.iterdir())):
            return False
        found = json.loads((root / SETTINGS_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{root} exists but is not a synthetic set (no readable {SETTINGS_FILE} in it): "
            "choose another folder or remove it."
        ) from error
    if found != settings:
        raise UserError(
            f"{root} has a synthetic set with the settings {found}, not {settings}: choose another folder or remove it."
        )
    return True


def ensure_synthetic(
    root: str | Path,
    *,
    num_train: int = DEFAULT_NUM_TRAIN,
    num_val: int = DEFAULT_NUM_VAL,
    seed: int = DEFAULT_SEED,
    image_size: int = DEFAULT_IMAGE_SIZE,
    style: str = DEFAULT_STYLE,
) -> Path:
    """Generate the splits `root/train` and `root/val` unless they exist.

    The set is generated in a temporary folder next to root and then renamed, so root is never incomplete.
    Concurrent calls are safe: the first process to finish wins, and the others use its set.

    Args:
        root: folder of the set; may exist if it is empty or contains a set with the same settings.
        num_train, num_val: number of images per split, 1 or more.
        seed: random seed, 0 or more; the splits use the seeds 2 * seed and 2 * seed + 1, so no two sets share images.
        image_size: longer image side in px.
        style: key of `STYLES`.

    Returns:
        root as a Path.

    Raises:
        UserError: an argument is out of range, root cannot be written, or it contains anything else.
    """
    _check(num_train=num_train, num_val=num_val, seed=seed, image_size=image_size, style=style)
    root = Path(root)
    settings = {
        "num_train": num_train,
        "num_val": num_val,
        "seed": seed,
        "image_size": image_size,
        "generator_version": DRAWING_VERSION,
    }
    if style != DEFAULT_STYLE:  # sets from before styles were added lack this key
        settings["style"] = style
    if _holds_set(root, settings):
        return root
    try:
        parent = root.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(prefix=f".{root.name}.tmp-", dir=parent) as scratch:
            made = Path(scratch) / "set"
            generate_split(made / "train", num_train, 2 * seed, image_size=image_size, style=style)
            generate_split(made / "val", num_val, 2 * seed + 1, image_size=image_size, style=style)
            (made / SETTINGS_FILE).write_text(json.dumps(settings))
            try:
                os.replace(made, root)
            except OSError:
                if not _holds_set(root, settings):
                    raise
    except OSError as error:
        raise UserError(f"Cannot write the synthetic set to {root}: {error}.") from error
    return root


def register_synthetic() -> None:
    """Register the datasets `synthetic_train`, `synthetic_val`, `shapes_train` and `shapes_val` with Detectron2.

    The style of the `synthetic` set (600 and 150 images) is "cluttered", that of `shapes`, which `kd-d2 demo` uses,
    "clear". Both splits of a set are generated when one of them is first loaded, in a folder named like the set under
    $DETECTRON2_DATASETS (default: datasets); the variable is read at registration. The metadata (thing_classes,
    thing_dataset_id_to_contiguous_id, json_file, image_root, evaluator_type "coco") is set immediately. Further calls
    have no effect.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets.coco import load_coco_json

    home = Path(os.getenv("DETECTRON2_DATASETS", "datasets"))

    def register(name: str, style: str, split: str) -> None:
        root, dataset = home / name, f"{name}_{split}"
        json_file, image_root = str(root / split / "annotations.json"), str(root / split / "images")

        def load() -> list[dict]:
            ensure_synthetic(root, style=style)
            return load_coco_json(json_file, image_root, dataset)

        if dataset in DatasetCatalog:
            return
        DatasetCatalog.register(dataset, load)
        MetadataCatalog.get(dataset).set(
            thing_classes=list(CLASSES),
            thing_dataset_id_to_contiguous_id={number + 1: number for number in range(len(CLASSES))},
            json_file=json_file,
            image_root=image_root,
            evaluator_type="coco",
        )

    for name, style in (("synthetic", "cluttered"), ("shapes", "clear")):
        for split in ("train", "val"):
            register(name, style, split)
