"""Normalization of segmentations to the polygons and RLE that Detectron2 and pycocotools read."""

from __future__ import annotations

from typing import Any

import numpy as np
from detectron2.structures import polygons_to_bitmask
from pycocotools import mask as mask_util

LARGEST = 1e9  # px; no image is larger


def normalize_segmentation(value: Any, height: int, width: int) -> Any:
    """Return a list of polygons or an RLE with its size, or None if there is no usable segmentation.

    Args:
        value: segmentation in the file: polygons, one flat polygon, or RLE with or without its size.
        height, width: size of the image, in pixels.
    """
    if isinstance(value, dict):
        return _run_lengths(value, height, width)
    if not isinstance(value, list):
        return None
    if value and all(map(is_coordinate, value)):
        value = [value]
    polygons = [polygon for polygon in value if _is_polygon(polygon)]
    return polygons or None


def is_coordinate(value: Any) -> bool:
    """Return whether a value is a finite number of pixels."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _is_polygon(value: Any) -> bool:
    return isinstance(value, list) and len(value) >= 6 and len(value) % 2 == 0 and all(map(is_coordinate, value))


def _run_lengths(value: dict[str, Any], height: int, width: int) -> dict[str, Any] | None:
    counts = value.get("counts")
    if value.get("size") not in (None, [], [height, width]):
        return None
    found = {**value, "size": [height, width]}
    if isinstance(counts, list):
        whole = all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts)
        return found if whole and sum(counts) == height * width else None
    if not isinstance(counts, str) or not counts or not all(48 <= ord(letter) < 112 for letter in counts):
        return None
    return found if _total(counts) == height * width else None


def _total(compressed: str) -> int:
    """Return the number of pixels of a compressed RLE, or -1 if invalid; pycocotools writes to memory unchecked."""
    runs: list[int] = []
    value = shift = 0
    for letter in compressed:
        bits = ord(letter) - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            if len(runs) > 2:
                value += runs[-2]
            if value < 0:
                return -1
            runs.append(value)
            value = shift = 0
    return sum(runs)


def box_of(segmentation: Any) -> list[float]:
    """Return the bounding box [x, y, width, height] of a normalized segmentation."""
    if isinstance(segmentation, list):
        xs = [x for polygon in segmentation for x in polygon[::2]]
        ys = [y for polygon in segmentation for y in polygon[1::2]]
        return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    return mask_util.toBbox(_compressed(segmentation)).tolist()


def mask_of(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Return the mask (height, width) of a normalized segmentation, as bool."""
    if isinstance(segmentation, list):
        return polygons_to_bitmask([np.array(polygon) for polygon in segmentation], height, width)
    return mask_util.decode(_compressed(segmentation)).astype(bool)


def _compressed(run_lengths: dict[str, Any]) -> dict[str, Any]:
    if isinstance(run_lengths["counts"], list):
        return mask_util.frPyObjects(run_lengths, *run_lengths["size"])
    return run_lengths
