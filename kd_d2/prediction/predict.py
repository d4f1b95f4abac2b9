"""Inference on images and videos, with drawings and COCO JSON."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from PIL import Image

from ..analysis.drawing import draw_instances
from ..data import read_image
from ..errors import UserError, check_at_least
from ..files import check_output_folder, write_json
from ..image_files import DataError
from ..predictor import Category, ImageDetector
from ..text import printable
from .drawings import COMMENT
from .inputs import DETECTIONS, Input, drawing_names
from .video import VideoReader, VideoWriter

logger = logging.getLogger(__name__)

FRAMES_PER_LINE = 100


@dataclass(frozen=True)
class PredictOptions:
    """Options of `predict`.

    Attributes:
        batch: maximum batch size; only consecutive images of equal size are batched.
        drawings: whether to draw the detections.
    """

    batch: int = 1
    drawings: bool = True


def predict(
    detector: ImageDetector,
    inputs: list[Input],
    output: str,
    info: dict[str, Any],
    options: PredictOptions | None = None,
) -> dict[str, Any]:
    """Detect objects in images and videos, save drawings in `output`, and write `output`/detections.json.

    Args:
        inputs: see `find_inputs`.
        info: information on the run for detections.json.

    Returns:
        Content of detections.json, which pycocotools can load: "images" (input file and drawing; for a video one entry
        per frame, with frame number and time in seconds), "annotations" (boxes with scores), "categories" and "info".

    Raises:
        UserError: an option or the output folder is invalid, or detections.json cannot be written.
    """
    options = options or PredictOptions()
    check_at_least("--batch", options.batch, 1)
    drawings = drawing_names(inputs, output) if options.drawings else [None] * len(inputs)
    check_output_folder(output, "--output")
    path = os.path.join(output, DETECTIONS)
    if os.path.isdir(path):
        raise UserError(f"--output: {path} is a folder; remove it, or choose another output folder.")
    run = _Run(detector, output, options)
    numbered = [(f"[{n}/{len(inputs)}]", *pair) for n, pair in enumerate(zip(inputs, drawings, strict=True), 1)]
    for is_video, group in itertools.groupby(numbered, key=lambda item: item[1].is_video):
        if is_video:
            for item in group:
                run.video(*item)
        else:
            run.images(group)
    tree = run.tree(info)
    write_json(path, tree, indent=None)
    beside = ", with drawings in the same folder" if options.drawings else ""
    logger.info(f"{len(tree['annotations'])} detections in {len(tree['images'])} images: {path}{beside}")
    return tree


class _Run:
    def __init__(self, detector: ImageDetector, output: str, options: PredictOptions):
        self.detector, self.output, self.options = detector, output, options
        self.names = [category.name for category in detector.categories or []]
        self.entries: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def images(self, numbered: Iterable[tuple[str, Input, str | None]]) -> None:
        for batch in _batches(numbered, self.options.batch):
            usable = [(item, image) for item in batch if (image := _read(item[1])) is not None]
            found = self._detect([image for _, image in usable])
            for ((number, source, drawing), _), (image, detections) in zip(usable, found, strict=True):
                drawing = self._draw(drawing, image, detections, _save)
                self._add(detections, source, drawing)
                logger.info(f"{number} {printable(source.path)}: {len(detections)} detections")

    def video(self, number: str, source: Input, drawing: str | None) -> None:
        reader, name = VideoReader(source.path), printable(source.path)
        before, frames = len(self.annotations), 0
        with VideoWriter(os.path.join(self.output, drawing or ""), reader.fps) as writer:
            for batch in _batches(reader, self.options.batch):
                for image, detections in self._detect(batch):
                    drawing = self._draw(drawing, image, detections, lambda _, drawn: writer.write(drawn))
                    self._add(detections, source, drawing, frame=frames, time=round(reader.times[frames], 4))
                    frames += 1
                    if frames % FRAMES_PER_LINE == 0:
                        logger.info(f"{number} {name}: {frames} of {reader.length or '?'} frames")
        if reader.is_cut():
            logger.warning(f"{name} ends after {frames} of {reader.length} frames.")
        logger.info(f"{number} {name}: {len(self.annotations) - before} detections in {frames} frames")

    def _detect(self, images: list[np.ndarray]) -> list[tuple[np.ndarray, Instances]]:
        """Detect objects in RGB images; return each with its detections."""
        input_format = self.detector.input_format
        found = self.detector.detect([convert_PIL_to_numpy(Image.fromarray(image), input_format) for image in images])
        return list(zip(images, found, strict=True))

    def _draw(
        self,
        name: str | None,
        image: np.ndarray,
        detections: Instances,
        write: Callable[[str, np.ndarray], None],
    ) -> str | None:
        """Write a drawing, if it has a name, and return its name, or None with a warning if it cannot be written."""
        if name is None:
            return None
        path = os.path.join(self.output, name)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write(path, draw_instances(image, detections, self.names))
        except OSError as error:
            logger.warning(f"The drawing {printable(path)} cannot be written: {error.strerror or error}.")
            return None
        return name

    def _add(self, detections: Instances, source: Input, drawing: str | None, **of_frame: float) -> None:
        height, width = detections.image_size
        entry = {"id": len(self.entries) + 1, "file_name": source.path, "width": width, "height": height, **of_frame}
        self.entries.append(entry if drawing is None else {**entry, "drawing": drawing})
        first = len(self.annotations) + 1
        self.annotations += to_annotations(detections, entry["id"], self.detector.categories, first)

    def tree(self, info: dict[str, Any]) -> dict[str, Any]:
        seen = sorted({annotation["category_id"] for annotation in self.annotations})
        categories = self.detector.categories or [Category(number, f"class {number}") for number in seen]
        return {
            "info": info,
            "images": self.entries,
            "annotations": self.annotations,
            "categories": list(map(asdict, categories)),
        }


def _read(source: Input) -> np.ndarray | None:
    """Return an RGB image, or None with a warning if it has become unusable since `find_inputs`."""
    try:
        return read_image(source.path, "RGB")
    except DataError as error:
        logger.warning(f"{printable(str(error))} It is left out.")
        return None


def _save(path: str, drawn: np.ndarray) -> None:
    Image.fromarray(drawn).save(path, quality=95, comment=COMMENT)


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def to_annotations(
    detections: Instances, image_id: int, categories: list[Category] | None, first_id: int
) -> list[dict]:
    """Return detections as COCO annotations with scores, with ids from `first_id` on. Area is that of the mask, if any."""
    annotations = []
    for number, entry in enumerate(instances_to_coco_json(detections, image_id)):
        if categories:
            entry["category_id"] = categories[entry["category_id"]].id
        mask, (_, _, width, height) = entry.get("segmentation"), entry["bbox"]
        area = int(mask_util.area(mask)) if mask else width * height
        annotations.append({"id": first_id + number, **entry, "area": area, "iscrowd": 0})
    return annotations
