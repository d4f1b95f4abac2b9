"""Augmentations from the config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.transforms import (
    AugInput,
    Augmentation,
    RandomApply,
    RandomBrightness,
    RandomContrast,
    RandomExtent,
    RandomFlip,
    RandomLighting,
    RandomRotation,
    RandomSaturation,
)

from ..errors import UserError
from ..random_state import seeded
from .library_keys import detector_of

KEY = "INPUT.AUGMENTATIONS"
OF_COLORS = (RandomBrightness, RandomContrast, RandomLighting, RandomSaturation)
OF_PLACES = (RandomExtent, RandomFlip, RandomRotation)
FILLING = (RandomExtent, RandomRotation)
CLASSES = {kind.__name__: kind for kind in (*OF_COLORS, *OF_PLACES, RandomApply)}
"""Augmentations of Detectron2 that need only the image; INPUT has other keys for resizing and cropping."""


def read_augmentations(cfg: CfgNode) -> list[Augmentation]:
    """Build the augmentations in INPUT.AUGMENTATIONS.

    Raises:
        UserError: an entry is not an augmentation of Detectron2 with its arguments, or cannot be applied to images of
            INPUT.FORMAT or to the detector's semantic segmentation.
    """
    image = np.zeros((32, 32, len(cfg.MODEL.PIXEL_MEAN)), dtype=np.uint8)
    built = [_build(entry, image) for entry in cfg.INPUT.AUGMENTATIONS]
    detector, filling = detector_of(cfg), [a for a in _applied(built) if isinstance(a, FILLING)]
    if filling and detector in ("PanopticFPN", "SemanticSegmentor"):
        raise UserError(
            f"{KEY} has {type(filling[0]).__name__}, which would fill the semantic segmentation of a {detector} outside of the image with "
            "its first class."
        )
    return built


def move_objects(augmentations: Sequence[Augmentation]) -> bool:
    """Return whether any of the augmentations changes the places of objects."""
    return not all(isinstance(augmentation, OF_COLORS) for augmentation in _applied(augmentations))


def _applied(augmentations: Sequence[Augmentation]) -> list[Augmentation]:
    """Replace each RandomApply by its augmentation."""
    applied = []
    for augmentation in augmentations:
        while isinstance(augmentation, RandomApply):
            augmentation = augmentation.aug
        applied.append(augmentation)
    return applied


def _build(entry: Any, image: np.ndarray) -> Augmentation:
    if not isinstance(entry, list | tuple) or not entry or entry[0] not in [*CLASSES]:
        raise UserError(
            f"An entry of {KEY} is {entry!r}; it must be a list of a name and arguments, such as ['RandomBrightness', 0.8, 1.2]. Names "
            f"are {', '.join(CLASSES)}."
        )
    name, *arguments = entry
    keywords = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
    if name == RandomApply.__name__ and arguments:
        arguments[0] = _build(arguments[0], image)
    try:
        augmentation = CLASSES[name](*arguments, **keywords)
        with seeded(0, 0):
            augmentation(AugInput(image))
    except Exception as error:  # any error from its arguments
        reason = str(error) or type(error).__name__
        raise UserError(f"{KEY}: {entry!r} cannot be applied to an image: {reason.rstrip('.')}.") from error
    return augmentation
