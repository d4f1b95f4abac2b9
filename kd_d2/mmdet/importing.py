"""Import of an MMDetection checkpoint as a Detectron2 config and checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import UserError
from ..imported import Imported, Weights, check_empty, detectron2_config, write_detector
from .backbones import Keys
from .dense import import_atss, import_fcos, import_fsaf, import_gfl, import_reppoints, import_retinanet
from .images import import_images
from .rcnn import import_cascade_rcnn, import_rcnn
from .reading import MMDetectionCheckpoint, parse_mmdet_config, read_mmdet_checkpoint, read_mmdet_config
from .settings import Settings

DETECTORS: dict[str, Callable[[Settings, Weights], Keys]] = {
    "RetinaNet": import_retinanet,
    "GFL": import_gfl,
    "ATSS": import_atss,
    "FCOS": import_fcos,
    "FSAF": import_fsaf,
    "RepPointsDetector": import_reppoints,
    "FasterRCNN": import_rcnn,
    "MaskRCNN": import_rcnn,
    "CascadeRCNN": import_cascade_rcnn,
}
"""Detectors of MMDetection that can be imported."""
PROGRAM = "MMDetection"


def import_detector(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    config: str | os.PathLike[str] | None = None,
    *,
    opts: Iterable[Any] = (),
) -> Imported:
    """Write a detector trained with MMDetection 2 or 3 as a Detectron2 config and checkpoint.

    Args:
        checkpoint: MMDetection's checkpoint.
        folder: output folder, new or empty.
        config: the complete config as MMDetection writes it to its work_dir; None for that in the checkpoint.
        opts: overrides of the Detectron2 config, alternating keys and values.

    Raises:
        UserError: a file cannot be read, the folder is not empty, or the detector has a part or setting that Detectron2 lacks.
    """
    checkpoint, folder = os.fspath(checkpoint), os.fspath(folder)
    check_empty(folder)
    source = read_mmdet_checkpoint(checkpoint)
    settings = _config(source, checkpoint, config)
    model = _model(settings)
    weights = Weights(source.weights, PROGRAM)
    keys = model.choose("type", DETECTORS)(model, weights) | import_images(settings, model)
    model.check_all_read()
    weights.check_all_moved()
    cfg = detectron2_config(keys, opts, PROGRAM)
    imported = Imported(model.kind(), folder, cfg, source.classes)
    if source.classes and len(source.classes) != imported.number_of_classes:
        raise UserError(
            f"{checkpoint} has {len(source.classes)} class names, but its detector predicts {imported.number_of_classes} classes."
        )
    write_detector(imported, weights.moved, PROGRAM)
    return imported


def _config(source: MMDetectionCheckpoint, checkpoint: str, config: str | os.PathLike[str] | None) -> dict[str, Any]:
    if config is not None:
        return read_mmdet_config(config)
    if source.config is None:
        raise UserError(f"{checkpoint} has no config: name that of its training with --config.")
    return parse_mmdet_config(source.config, f"The config in {checkpoint}")


def _model(settings: dict[str, Any]) -> Settings:
    """Return the entry "model", with the test settings that are beside it in early versions of MMDetection 2.

    In a config of MMRazor, it is the entry "architecture" of this one, which may be the name of a config, as "student_cfg" is in those of
    FGD and MGD.
    """
    model, test = (
        {**value} if isinstance(value := settings.get(name), Mapping) else {} for name in ("model", "test_cfg")
    )
    student = model.get("architecture")
    model = {**student} if isinstance(student, Mapping) else model
    if named := model.get("cfg_path") if model else settings.get("student_cfg"):
        raise UserError(
            f"The config is one of a distillation, which only names that of the student, {named}: name the complete config of the student "
            "with --config, as MMDetection writes it to a work_dir."
        )
    if test and "type" not in test:  # that of MMDetection 3 is a loop
        model.setdefault("test_cfg", test)
    return Settings(model, "model")
