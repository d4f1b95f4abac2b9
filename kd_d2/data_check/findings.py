"""Checks of annotations for errors and likely mistakes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..class_names import ClassCount
from ..data.coco import CocoData
from ..data.coco.boxes import reaches_out
from ..data.coco.keypoints import keypoint_names
from ..data.coco.reader import PLACEHOLDERS
from ..data.coco_json import ClassOrder, with_classes
from ..errors import UserError
from .sets import DataSet
from .statistics import SetStatistics

SMALLEST_SIDE = 2  # px
LONGEST = 20  # ratio of the longer to the shorter side
WHOLE_IMAGE = 0.98  # fraction of the image area
FEWEST_BOXES = 10


@dataclass(frozen=True)
class Finding:
    """An error or warning about a dataset.

    Attributes:
        is_error: whether it breaks a training or invalidates its results.
        dataset: name of the dataset, or of both datasets if it concerns two.
        text: message.
    """

    is_error: bool
    dataset: str
    text: str


def find_in_set(dataset: DataSet, data: CocoData, statistics: SetStatistics) -> Iterator[Finding]:
    """Find repairs, suspicious boxes, unreadable masks, missing keypoints, and rare or similarly named classes of one dataset."""
    for text in (*data.repairs.sentences(), *_about_boxes(data), *_about_classes(statistics)):
        yield Finding(False, dataset.name, text)
    if dataset.annotated and not statistics.boxes:
        yield Finding(True, dataset.name, "it has no boxes.")
    encoded = sum(isinstance(a.get("segmentation"), dict) and not a.get("iscrowd") for a in data.tree["annotations"])
    if dataset.polygons and encoded:
        text = f"{encoded} masks are run-length encoded (RLE), but INPUT.MASK_FORMAT is 'polygon'; set it to 'bitmask'."
        yield Finding(True, dataset.name, text)
    named = len(keypoint_names(data.repairs.path, data.tree["categories"])) if dataset.keypoints else 0
    if named != dataset.keypoints:
        text = (
            f"its categories list {named} keypoints, but MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {dataset.keypoints}."
        )
        yield Finding(True, dataset.name, text)


def find_wrong_class_count(read: list[tuple[DataSet, CocoData]], predicted: ClassCount | None) -> Iterator[Finding]:
    """Compare the number of classes of the data, which the first set with classes determines, with the detector's."""
    for dataset, data in read:
        if predicted and data.class_names:
            placeholder = data.repairs.examples.get(PLACEHOLDERS)
            sentence = predicted.difference(dataset.name, len(data.class_names), placeholder)
            if sentence:
                yield Finding(True, dataset.name, sentence)
            return


def _about_boxes(data: CocoData) -> Iterator[str]:
    image_of = {image["id"]: image for image in data.tree["images"]}
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for annotation in data.tree["annotations"]:
        if annotation.get("iscrowd"):
            continue
        image = image_of[annotation["image_id"]]
        for text, is_so in SUSPICIOUS.items():
            if is_so(annotation["bbox"], (image["width"], image["height"])):
                found[text].append(annotation)
    for text in SUSPICIOUS:
        if found[text]:
            first = found[text][0]
            name = image_of[first["image_id"]]["file_name"]
            yield f"{len(found[text])} boxes {text}, the first is {first['bbox']} in {name}."


SUSPICIOUS: dict[str, Callable[[list[float], tuple[int, int]], bool]] = {
    "extend beyond their image, where training clips them": reaches_out,
    f"have a side below {SMALLEST_SIDE} pixels": lambda box, size: min(box[2:]) < SMALLEST_SIDE,
    f"are more than {LONGEST} times as long as wide": lambda box, size: max(box[2:]) > LONGEST * min(box[2:]),
    f"cover at least {WHOLE_IMAGE:.0%} of their image": (
        lambda box, size: box[2] * box[3] >= WHOLE_IMAGE * size[0] * size[1]
    ),
}
"""Tests for suspicious boxes [x, y, width, height] in an image of (width, height), by their description."""


def _about_classes(statistics: SetStatistics) -> Iterator[str]:
    absent = [entry.name for entry in statistics.classes if entry.boxes == 0]
    rare = [f"{entry.name} ({entry.boxes})" for entry in statistics.classes if 0 < entry.boxes < FEWEST_BOXES]
    if absent and statistics.boxes:
        yield f"classes without boxes: {', '.join(absent)}."
    if rare:
        yield f"classes with fewer than {FEWEST_BOXES} boxes: {', '.join(rare)}."
    alike = defaultdict(list)
    for entry in statistics.classes:
        alike["".join(letter for letter in entry.name.casefold() if letter.isalnum())].append(entry.name)
    for names in alike.values():
        if len(names) > 1:
            yield f"classes with nearly identical names: {', '.join(map(repr, names))}."


def find_between(
    train: str, train_data: CocoData, others: str, data: CocoData, counts: tuple[SetStatistics, SetStatistics]
) -> Iterator[Finding]:
    """Find differences in classes between a dataset and the first training set, which determines the classes."""
    where = f"{train}, {others}"
    order = ClassOrder(tuple(train_data.class_names), train_data.repairs.path)
    try:
        with_classes(data, order)
    except UserError as error:
        yield Finding(True, where, str(error))
        return
    shared = [name for name in train_data.class_names if name in data.class_names]
    if shared != [name for name in data.class_names if name in train_data.class_names]:
        yield Finding(False, where, f"{others} has its classes in a different order; they are matched by name.")
    with_boxes = [{entry.name for entry in statistics.classes if entry.boxes} for statistics in counts]
    for names, here, there in (
        (with_boxes[0] - with_boxes[1], train, others),
        (with_boxes[1] - with_boxes[0], others, train),
    ):
        if names:
            yield Finding(
                False, where, f"classes with boxes only in {here}, not in {there}: {', '.join(sorted(names))}."
            )
