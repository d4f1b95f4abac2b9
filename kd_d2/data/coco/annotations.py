"""Validation and repair of the annotations of a COCO file."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from ...errors import UserError
from .boxes import BOX_FORMATS, Box, check_format, overlaps
from .ids import LARGEST_ID, Ids, whole_number
from .keypoints import check_keypoints
from .repairs import Repairs
from .segmentation import LARGEST, box_of, is_coordinate, normalize_segmentation

Entry = dict[str, Any]
MOST_BOXES = 10_000
"""Maximum number of boxes per image; each one is compared with every anchor."""
IS_CROWD = {0: 0, 1: 1, None: 0, "0": 0, "1": 1, "": 0, "false": 0, "true": 1}


class Annotations:
    """Reads the annotations of a file.

    Args:
        path: annotation file, for messages.
        images: images with width and height, by id.
        image_ids, category_ids: ids that annotations may refer to.
        repairs: record to which repairs are added.
    """

    def __init__(self, path: str, images: dict[int, Entry], image_ids: Ids, category_ids: Ids, repairs: Repairs):
        self.path = path
        self.images = images
        self.image_ids = image_ids
        self.category_ids = category_ids
        self.repairs = repairs

    def read(self, entries: list[Entry], *, masks: bool, boxes: str, keypoints: int = 0) -> list[Entry]:
        """Return repaired annotations without duplicates and boxes without area in their image.

        They are renumbered from 1 if any id is unusable.

        Args:
            entries: annotations of the file; not modified.
            masks: whether segmentations are required.
            boxes: box format, one of BOX_FORMATS.
            keypoints: number of keypoints of each annotation; 0 if they are not used.

        Raises:
            UserError: an annotation is invalid, its image or category is missing, or boxes are in another format.
        """
        self._check_counts(entries)
        found = [(entry, a) for entry in entries if (a := self._read(entry, masks, keypoints)) is not None]
        if boxes == "xywh":
            check_format(self.path, [(a["bbox"], self._size(a)) for _, a in found])
        else:
            for _, annotation in found:
                annotation["bbox"] = BOX_FORMATS[boxes](annotation["bbox"], self._size(annotation))
                annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        kept = self._without_repeated([pair for pair in found if self._has_area(*pair)], masks)
        self._number(kept)
        return [annotation for _, annotation in kept]

    def _check_counts(self, entries: list[Entry]) -> None:
        counts = Counter(self.image_ids.find(entry.get("image_id")) for entry in entries)
        for image_id, count in counts.most_common(1):
            if count > MOST_BOXES and image_id is not None:
                raise UserError(
                    f"{self.path}: the image {self.images[image_id]['file_name']} has {count} annotations, more than {MOST_BOXES}: split "
                    "it into tiles."
                )

    def _size(self, annotation: Entry) -> tuple[int, int]:
        image = self.images[annotation["image_id"]]
        return image["width"], image["height"]

    def _read(self, entry: Entry, masks: bool, keypoints: int) -> Entry | None:
        what = f"{self.path}: the annotation {_name(entry)}"
        image_id = self.image_ids.find(entry.get("image_id"))
        if image_id is None:
            raise UserError(
                f"{what} refers to image {entry.get('image_id')!r}, which is not among the file's images: remove it, or add the image."
            )
        category_id = self.category_ids.find(entry.get("category_id"))
        if category_id is None:
            raise UserError(
                f"{what} refers to category {entry.get('category_id')!r}, which is not among the file's categories: add it there."
            )
        if entry.get("ignore"):
            raise UserError(f"{what} has 'ignore' set, which Detectron2 does not support; use 'iscrowd' or remove it.")
        for key in ("image_id", "category_id"):
            if type(entry[key]) is not int and whole_number(entry[key]) is not None:
                self.repairs.add("references read as whole numbers", f"{key} {entry[key]!r}")
        annotation = {**entry, "image_id": image_id, "category_id": category_id}
        self._read_crowd(what, annotation)
        annotation["bbox"] = self._read_box(what, annotation)
        self._read_keypoints(what, annotation, keypoints)
        if not self._read_segmentation(what, annotation, masks):
            return None
        if "area" in annotation and not _is_positive(annotation["area"]):
            if annotation["area"] != 0 or annotation["bbox"][2] * annotation["bbox"][3] > 0:
                self.repairs.add("areas computed from boxes", f"annotation {_name(entry)}, area {annotation['area']!r}")
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        return annotation

    def _read_crowd(self, what: str, annotation: Entry) -> None:
        if "iscrowd" not in annotation:
            return
        value = annotation["iscrowd"]
        key = value.lower() if isinstance(value, str) else value
        if isinstance(key, list | dict) or key not in IS_CROWD:
            raise UserError(f"{what} has iscrowd {value!r}; it must be 0 or 1.")
        if type(value) is not int:
            self.repairs.add("iscrowd read as 0 or 1", f"annotation {_name(annotation)}, {value!r}")
        annotation["iscrowd"] = IS_CROWD[key]

    def _read_segmentation(self, what: str, annotation: Entry, masks: bool) -> bool:
        """Read the segmentation, and return whether the annotation is kept."""
        value = annotation.get("segmentation")
        image = self.images[annotation["image_id"]]
        if not masks:
            if value and not _is_harmless(value, image):
                del annotation["segmentation"]
            return True
        if not value:
            raise UserError(
                f"{what} has no segmentation, which MODEL.MASK_ON needs; set MODEL.MASK_ON False to train on boxes only."
            )
        found = normalize_segmentation(value, image["height"], image["width"])
        if found is None and isinstance(value, dict):
            raise UserError(
                f"{what} has run lengths that do not fit its image of {image['width']} x {image['height']} pixels: "
                f"{str(value)[:80]}; export its mask again."
            )
        if found is None:
            self.repairs.add("annotations without a polygon of three points dropped", f"annotation {_name(annotation)}")
            return False
        if found != value:
            self.repairs.add(
                "segmentations read as lists of polygons, or with their image's size", f"annotation {_name(annotation)}"
            )
            annotation["segmentation"] = found
        return True

    def _read_keypoints(self, what: str, annotation: Entry, count: int) -> None:
        value = annotation.get("keypoints", [])
        if count and not value:
            self.repairs.add("annotations without keypoints read as having none that is labeled", _name(annotation))
            annotation.update(keypoints=[0] * 3 * count, num_keypoints=0)
        elif count:
            check_keypoints(what, value, count)
        elif not isinstance(value, list) or not all(map(is_coordinate, value)):
            del annotation["keypoints"]  # unused in training, but processed by Detectron2

    def _read_box(self, what: str, annotation: Entry) -> Box:
        box = annotation.get("bbox")
        if box in (None, []):
            image = self.images[annotation["image_id"]]
            outline = normalize_segmentation(annotation.get("segmentation"), image["height"], image["width"])
            if outline is None:
                raise UserError(f"{what} has neither a bbox nor a segmentation: remove it, or add its bbox.")
            self.repairs.add("boxes computed from segmentations", f"annotation {_name(annotation)}")
            return box_of(outline)
        if isinstance(box, list) and any(isinstance(value, str) for value in box):
            numbers = [_written_number(value) for value in box]
            if None not in numbers:
                self.repairs.add("box coordinates read from text", f"annotation {_name(annotation)}, {box}")
                box = numbers
        if not isinstance(box, list) or len(box) != 4 or not all(map(is_coordinate, box)):
            raise UserError(
                f"{what} has the bbox {str(box)[:80]}; it must be four finite numbers [x, y, width, height]."
            )
        return box

    def _has_area(self, entry: Entry, annotation: Entry) -> bool:
        has_area = min(annotation["bbox"][2:]) > 0
        if has_area and overlaps(annotation["bbox"], self._size(annotation)):
            return True
        kind = "boxes outside their image dropped" if has_area else "boxes without area dropped"
        self.repairs.add(kind, f"annotation {_name(entry)}, bbox {entry.get('bbox')}")
        return False

    def _without_repeated(self, found: list[tuple[Entry, Entry]], masks: bool) -> list[tuple[Entry, Entry]]:
        seen, kept = set(), []
        for entry, annotation in found:
            outline = json.dumps(annotation["segmentation"]) if masks else ""
            key = (
                annotation["image_id"], annotation["category_id"], *annotation["bbox"], annotation.get("iscrowd", 0), outline
            )  # fmt: skip
            if key in seen:
                self.repairs.add("duplicate annotations dropped", f"annotation {_name(entry)} of image {key[0]}")
                continue
            seen.add(key)
            kept.append((entry, annotation))
        return kept

    def _number(self, kept: list[tuple[Entry, Entry]]) -> None:
        """Number the annotations from 1, unless all have unique ids that the evaluators accept."""
        ids = [whole_number(entry.get("id")) for entry, _ in kept]
        seen: set[int] = set()
        unusable = None
        for (entry, _), number in zip(kept, ids):
            # pycocotools has 0 for "not found".
            if number is None or not 0 < number < LARGEST_ID or number in seen:
                unusable = repr(entry.get("id"))
                break
            seen.add(number)
        if unusable:
            self.repairs.add(
                "annotations numbered from 1 because an id is missing, repeated, not positive or not a number", unusable
            )
            ids = list(range(1, len(kept) + 1))
        for (entry, annotation), number in zip(kept, ids):
            if not unusable and type(entry["id"]) is not int:
                self.repairs.add("ids of annotations read as whole numbers", repr(entry["id"]))
            annotation["id"] = number


def _name(entry: Entry) -> str:
    """Return how messages refer to an annotation."""
    return f"with id {entry['id']!r}" if "id" in entry else f"without id, {str(entry)[:80]},"


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < LARGEST**2


def _written_number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def _is_harmless(segmentation: Any, image: Entry) -> bool:
    """Return whether Detectron2 keeps the annotation; coordinates of polygons are not checked, for speed."""
    if isinstance(segmentation, dict):
        return normalize_segmentation(segmentation, image["height"], image["width"]) == segmentation
    return isinstance(segmentation, list) and all(
        isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation
    )
