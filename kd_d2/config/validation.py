"""Validation of config values before any data is read or model is built.

It is followed, before the first iteration, by checks of the data (`engine.checks.check_datasets`, `check_classes`), the
student-teacher pair (`KDMetaArch`), and batch size and schedule (`engine.checks.check_schedule`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode as CN
from detectron2.layers import get_norm
from detectron2.modeling import ANCHOR_GENERATOR_REGISTRY, BACKBONE_REGISTRY, META_ARCH_REGISTRY

from ..distillers import DISTILLER_REGISTRY
from ..errors import UserError, check_number, check_seed, is_finite_number
from ..extensions import HINT
from .augmentations import read_augmentations
from .library_keys import KD_META_ARCH, LIBRARY_KEYS, node_at

CHOICES = {
    "INPUT.FORMAT": ("BGR", "RGB", "L", "LA", "RGBA", "RGBX", "CMYK", "HSV", "LAB", "YCbCr", "YUV-BT.601"),  # of 8 bits
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
    **{
        f"MODEL.{node}.BBOX_REG_LOSS_TYPE": ("smooth_l1", "giou", "diou", "ciou")
        for node in ("RPN", "RETINANET", "ROI_BOX_HEAD")
    },
}
"""Values of Detectron2's keys."""
REGISTRIES = {"MODEL.BACKBONE.NAME": BACKBONE_REGISTRY, "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY}
NORMS = ("RESNETS", "FPN", "RETINANET", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD")
"""Detectron2's nodes of MODEL that have a key NORM."""


def validate_kd_config(cfg: CN) -> None:
    """Validate every key of the library, and Detectron2's keys with a known set of values, without building a model.

    Raises:
        UserError: a value is invalid; the message names the key.
    """
    for entry in cfg.DATASETS.COCO_JSON:
        if not isinstance(entry, list | tuple) or len(entry) != 3 or not all(isinstance(part, str) for part in entry):
            raise UserError(
                "DATASETS.COCO_JSON must be a list of lists, [[name, annotations.json, image folder], ...]; one entry is "
                f"{entry!r}."
            )
    names = [name for name, _, _ in cfg.DATASETS.COCO_JSON]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"DATASETS.COCO_JSON has several entries with the name {twice[0]!r}.")
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if not isinstance(name, str):
                raise UserError(f"DATASETS.{key} contains {name!r}; it must be a list of dataset names.")
    check_seed("SEED", cfg.SEED)
    _validate_choices(cfg)
    _validate_images(cfg)
    distilled = cfg.MODEL.META_ARCHITECTURE == KD_META_ARCH
    for path, keys in LIBRARY_KEYS.items():
        if distilled or not path.startswith("MODEL.KD"):
            keys.read(node_at(cfg, path), path)
    try:
        torch.device(cfg.MODEL.DEVICE)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, which PyTorch does not know; it is usually 'cuda' or 'cpu'."
        ) from error
    if not distilled and cfg.MODEL.META_ARCHITECTURE not in META_ARCH_REGISTRY:
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}, which is not the name of a registered detector; "
            f"{HINT}."
        )
    if distilled:
        _validate_distillation(cfg)


def _validate_choices(cfg: CN) -> None:
    for key, values in CHOICES.items():
        value = _value(cfg, key)
        if value not in values:
            raise UserError(f"{key} is {value!r}; it must be one of {', '.join(map(repr, values))}.")
    for key, registry in REGISTRIES.items():
        value = _value(cfg, key)
        if value not in registry:
            raise UserError(f"{key} is {value!r}, which is not registered in Detectron2; {HINT}.")
    for node in NORMS:
        norm = cfg.MODEL[node].NORM
        try:
            get_norm(norm, 32)
        except KeyError:
            raise UserError(f"MODEL.{node}.NORM is {norm!r}, which is not a normalization of Detectron2.") from None


def _validate_images(cfg: CN) -> None:
    for value in cfg.MODEL.PIXEL_MEAN:
        if not is_finite_number(value):
            raise UserError(f"A value of MODEL.PIXEL_MEAN is {value!r}; it must be a number.")
    for value in cfg.MODEL.PIXEL_STD:
        check_number("A value of MODEL.PIXEL_STD", value, 0, exclusive=True)
    channels = 3 if cfg.INPUT.FORMAT in ("BGR", "RGB") else len(cfg.MODEL.PIXEL_MEAN)
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        if len(cfg.MODEL[key]) != channels:
            raise UserError(f"MODEL.{key} has {len(cfg.MODEL[key])} values; it must have {channels}, one per channel.")
    if cfg.INPUT.CROP.ENABLED:
        _validate_crop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE)
    check_number("INPUT.MIN_SIZE_TEST", cfg.INPUT.MIN_SIZE_TEST, 0)
    if cfg.INPUT.MIN_SIZE_TEST:  # otherwise, images keep their size
        check_number("INPUT.MAX_SIZE_TEST", cfg.INPUT.MAX_SIZE_TEST, 1)
    read_augmentations(cfg)
    sizes, ranges = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    if cfg.INPUT.LARGE_SCALE_JITTER.ENABLED:  # which replaces it
        return
    is_range = len(sizes) == 2 and list(sizes) == sorted(sizes)
    if not sizes or not all(type(size) is int and size >= 0 for size in sizes) or (ranges and not is_range):
        words = "two ascending sizes, for MIN_SIZE_TRAIN_SAMPLING 'range'" if ranges else "a list of sizes in pixels"
        raise UserError(f"INPUT.MIN_SIZE_TRAIN is {sizes!r}; it must be {words}.")
    if any(sizes):  # otherwise, images keep their size
        check_number("INPUT.MAX_SIZE_TRAIN", cfg.INPUT.MAX_SIZE_TRAIN, 1)


def _validate_crop(kind: str, size: Sequence[Any]) -> None:
    if kind.startswith("relative"):
        words, valid = "two numbers above 0 and at most 1", all(is_finite_number(s) and 0 < s <= 1 for s in size)
    else:
        words, valid = "two whole numbers of pixels, at least 1", all(type(s) is int and s >= 1 for s in size)
    if kind == "absolute_range":
        words, valid = f"{words} and ascending", valid and list(size) == sorted(size)
    if len(size) != 2 or not valid:
        raise UserError(f"INPUT.CROP.SIZE is {size!r}; for INPUT.CROP.TYPE {kind!r} it must be {words}.")


def _value(cfg: CN, key: str) -> Any:
    path, _, name = key.rpartition(".")
    return node_at(cfg, path)[name]


def _validate_distillation(cfg: CN) -> None:
    kd = cfg.MODEL.KD
    if kd.STUDENT == KD_META_ARCH or kd.STUDENT not in META_ARCH_REGISTRY:
        raise UserError(
            f"MODEL.KD.STUDENT is {kd.STUDENT!r}; it must be the name of a registered detector, such as 'RetinaNet'; {HINT}."
        )
    if not kd.TEACHER.CONFIG_FILE:
        raise UserError("MODEL.KD.TEACHER.CONFIG_FILE is empty: name the teacher's config.")
    for name in kd.DISTILLERS:
        method = DISTILLER_REGISTRY.get(name)
        if list(kd.DISTILLERS).count(name) > 1:
            raise UserError(f"MODEL.KD.DISTILLERS names {name!r} twice.")
        node, node_name = kd[method.CONFIG_NODE], f"MODEL.KD.{method.CONFIG_NODE}"
        _validate_schedule(node_name, node, cfg.SOLVER.MAX_ITER if cfg.SOLVER.EPOCHS is None else None)
        method.Config.read(node, node_name)
    if not kd.DISTILLERS and not kd.INHERIT.ENABLED and not kd.PSEUDO_LABELS.ENABLED:
        raise UserError(
            "MODEL.KD.DISTILLERS is empty and MODEL.KD.INHERIT.ENABLED and MODEL.KD.PSEUDO_LABELS.ENABLED are False: the "
            f"teacher would have no effect. For a plain student, set MODEL.META_ARCHITECTURE to {kd.STUDENT!r}."
        )


def _validate_schedule(name: str, node: CN, max_iter: int | None) -> None:
    """Validate the schedule of a method. The length of the training, `max_iter`, may be unknown: None."""
    if max_iter is not None and max_iter <= node.START_ITER:
        raise UserError(
            f"{name}.START_ITER is {node.START_ITER}, but training ends at SOLVER.MAX_ITER {max_iter}: it would never run."
        )
    if node.END_ITER is not None and (not isinstance(node.END_ITER, int) or node.END_ITER <= node.START_ITER):
        raise UserError(
            f"{name}.END_ITER is {node.END_ITER!r}; it must be None or a whole number above START_ITER {node.START_ITER}."
        )
