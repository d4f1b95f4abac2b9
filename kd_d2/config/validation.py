"""Validation of config values before any data is read or model is built.

It is followed, before the first iteration, by checks of the data (`engine.checks.check_datasets`, `check_classes`), the
student-teacher pair (`KDMetaArch`), and batch size and schedule (`engine.checks.check_schedule`).
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode as CN
from detectron2.modeling import META_ARCH_REGISTRY

from ..distillers import DISTILLER_REGISTRY
from ..errors import UserError
from .library_keys import KD_META_ARCH, LIBRARY_KEYS, node_at


def validate_kd_config(cfg: CN) -> None:
    """Validate every key of the library that can be checked without building anything.

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
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}, which is not the name of a registered detector."
        )
    if distilled:
        _validate_distillation(cfg)


def _validate_distillation(cfg: CN) -> None:
    kd = cfg.MODEL.KD
    if kd.STUDENT == KD_META_ARCH or kd.STUDENT not in META_ARCH_REGISTRY:
        raise UserError(
            f"MODEL.KD.STUDENT is {kd.STUDENT!r}; it must be the name of a registered detector, such as 'RetinaNet'."
        )
    if not kd.TEACHER.CONFIG_FILE:
        raise UserError("MODEL.KD.TEACHER.CONFIG_FILE is empty: name the teacher's config.")
    for name in kd.DISTILLERS:
        method = DISTILLER_REGISTRY.get(name)
        if list(kd.DISTILLERS).count(name) > 1:
            raise UserError(f"MODEL.KD.DISTILLERS names {name!r} twice.")
        node, node_name = kd[method.CONFIG_NODE], f"MODEL.KD.{method.CONFIG_NODE}"
        _validate_schedule(node_name, node, cfg.SOLVER.MAX_ITER)
        method.Config.read(node, node_name)
    if not kd.DISTILLERS and not kd.INHERIT.ENABLED and not kd.PSEUDO_LABELS.ENABLED:
        raise UserError(
            "MODEL.KD.DISTILLERS is empty and MODEL.KD.INHERIT.ENABLED and MODEL.KD.PSEUDO_LABELS.ENABLED are False: the "
            f"teacher would have no effect. For a plain student, set MODEL.META_ARCHITECTURE to {kd.STUDENT!r}."
        )


def _validate_schedule(name: str, node: CN, max_iter: int) -> None:
    if max_iter <= node.START_ITER:
        raise UserError(
            f"{name}.START_ITER is {node.START_ITER}, but training ends at SOLVER.MAX_ITER {max_iter}: it would never run."
        )
    if node.END_ITER is not None and (not isinstance(node.END_ITER, int) or node.END_ITER <= node.START_ITER):
        raise UserError(
            f"{name}.END_ITER is {node.END_ITER!r}; it must be None or a whole number above START_ITER {node.START_ITER}."
        )
