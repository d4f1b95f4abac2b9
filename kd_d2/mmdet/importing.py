"""Import of an MMDetection checkpoint as a Detectron2 config and checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg

from ..checkpoint import KDCheckpointer, fill
from ..class_names import as_comment
from ..config import add_kd_config, changed_keys
from ..config.reading import merge, tree_from_opts
from ..errors import UserError
from ..files import write_text
from ..modeling.building import build_detector
from ..text import label
from .backbones import Keys
from .dense import import_atss, import_gfl, import_retinanet
from .images import import_images
from .rcnn import import_cascade_rcnn, import_rcnn
from .reading import MMDetectionCheckpoint, parse_mmdet_config, read_mmdet_checkpoint, read_mmdet_config
from .settings import Settings
from .weights import Weights

DETECTORS: dict[str, Callable[[Settings, Weights], Keys]] = {
    "RetinaNet": import_retinanet,
    "GFL": import_gfl,
    "ATSS": import_atss,
    "FasterRCNN": import_rcnn,
    "MaskRCNN": import_rcnn,
    "CascadeRCNN": import_cascade_rcnn,
}
"""Detectors of MMDetection that can be imported."""
CONFIG, WEIGHTS = "config.yaml", "model_final.pth"


@dataclass(frozen=True)
class Imported:
    """An imported detector.

    Attributes:
        kind: name of the detector in MMDetection.
        folder: folder with config.yaml and model_final.pth, which can be used like the output folder of a training.
        cfg: the config.
        classes: class names by class index; None if the checkpoint has none.
    """

    kind: str
    folder: str
    cfg: CfgNode
    classes: tuple[str, ...] | None

    def summary(self) -> str:
        """Return lines that describe the detector and its use as a teacher."""
        cfg, config = self.cfg, os.path.join(self.folder, CONFIG)
        names = (
            ", ".join(map(label, self.classes[:3])) + (", ..." if len(self.classes) > 3 else "")
            if self.classes
            else "names unknown"
        )
        return "\n".join([
            f"{self.kind} with {'ResNeXt' if cfg.MODEL.RESNETS.NUM_GROUPS > 1 else 'ResNet'}-{cfg.MODEL.RESNETS.DEPTH}, {self.number_of_classes} classes ({names}), "
            f"{cfg.INPUT.FORMAT} images with a shorter side of {cfg.INPUT.MIN_SIZE_TEST} and a longer side of at most {cfg.INPUT.MAX_SIZE_TEST} pixels",
            f"Config and weights are in {config} and {os.path.join(self.folder, WEIGHTS)}.",
            f"As a teacher: MODEL.KD.TEACHER.CONFIG_FILE {config}",
        ])  # fmt: skip

    @property
    def number_of_classes(self) -> int:
        model = self.cfg.MODEL
        node = "ROI_HEADS" if model.META_ARCHITECTURE == "GeneralizedRCNN" else model.META_ARCHITECTURE.upper()
        return model[node].NUM_CLASSES


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
    if os.path.exists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise UserError(f"{folder} exists already and is not an empty folder.")
    source = read_mmdet_checkpoint(checkpoint)
    settings = _config(source, checkpoint, config)
    model = _model(settings)
    weights = Weights(source.weights)
    keys = model.choose("type", DETECTORS)(model, weights) | import_images(settings, model)
    model.check_all_read()
    weights.check_all_moved()
    cfg = _detectron2_config(keys, opts)
    imported = Imported(model.kind(), folder, cfg, source.classes)
    if source.classes and len(source.classes) != imported.number_of_classes:
        raise UserError(
            f"{checkpoint} has {len(source.classes)} class names, but its detector predicts {imported.number_of_classes} classes."
        )
    _write(cfg, weights, source.classes, folder)
    return imported


def _config(source: MMDetectionCheckpoint, checkpoint: str, config: str | os.PathLike[str] | None) -> dict[str, Any]:
    if config is not None:
        return read_mmdet_config(config)
    if source.config is None:
        raise UserError(f"{checkpoint} has no config: name that of its training with --config.")
    return parse_mmdet_config(source.config, f"The config in {checkpoint}")


def _model(settings: dict[str, Any]) -> Settings:
    """Return the entry "model", with the test settings that are beside it in early versions of MMDetection 2."""
    model, test = (
        {**value} if isinstance(value := settings.get(name), Mapping) else {} for name in ("model", "test_cfg")
    )
    if test and "type" not in test:  # that of MMDetection 3 is a loop
        model.setdefault("test_cfg", test)
    return Settings(model, "model")


def _detectron2_config(keys: Keys, opts: Iterable[Any]) -> CfgNode:
    cfg = get_cfg()
    add_kd_config(cfg)
    merge(
        cfg,
        tree_from_opts([item for pair in keys.items() for item in pair], "the MMDetection config"),
        "the MMDetection config",
    )
    merge(cfg, tree_from_opts(list(opts), "the command line"), "the command line")
    return cfg


def _write(cfg: CfgNode, weights: Weights, classes: tuple[str, ...] | None, folder: str) -> None:
    on_cpu = cfg.clone()
    on_cpu.MODEL.DEVICE = "cpu"
    detector = build_detector(on_cpu, "the MMDetection config")
    fit = fill(detector, weights.moved)
    unfilled = [*fit.missing, *fit.misfits, *(weights.moved.keys() - {*fit.filled, *fit.misfits})]
    if unfilled:
        reason = fit.misfits.get(unfilled[0], "missing" if unfilled[0] in fit.missing else "not a weight of the model")
        raise UserError(f"The MMDetection checkpoint does not fit its config: {unfilled[0]} is {reason}.")
    os.makedirs(folder, exist_ok=True)
    checkpointer = KDCheckpointer(detector, folder)
    checkpointer.class_names = list(classes) if classes else None
    checkpointer.save(WEIGHTS.removesuffix(".pth"))
    keys = {**changed_keys(cfg), "MODEL.WEIGHTS": WEIGHTS}
    tree = tree_from_opts([item for pair in keys.items() for item in pair], CONFIG)
    write_text(
        os.path.join(folder, CONFIG),
        (as_comment(classes) if classes else "") + yaml.safe_dump(tree, default_flow_style=None, width=120),
    )
