"""Writing of an imported detector as a Detectron2 config and checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg

from ..checkpoint import KDCheckpointer, StateDict, fill
from ..class_names import as_comment
from ..config import add_kd_config, changed_keys
from ..config.reading import merge, tree_from_opts
from ..errors import UserError
from ..files import check_output_folder, write_text
from ..modeling.building import build_detector
from ..text import label
from .weights import CONSTANTS

CONFIG, WEIGHTS = "config.yaml", "model_final.pth"


@dataclass(frozen=True)
class Imported:
    """An imported detector.

    Attributes:
        kind: name of the detector in the program that it is from.
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
            f"{self.kind} with {self.bottom_up}, {self.number_of_classes} classes ({names}), "
            f"{cfg.INPUT.FORMAT} images with a shorter side of {cfg.INPUT.MIN_SIZE_TEST} and a longer side of at most {cfg.INPUT.MAX_SIZE_TEST} pixels",
            f"Config and weights are in {config} and {os.path.join(self.folder, WEIGHTS)}.",
            f"As a teacher: MODEL.KD.TEACHER.CONFIG_FILE {config}",
        ])  # fmt: skip

    @property
    def bottom_up(self) -> str:
        """Name of the network without neck and head."""
        if "_swin_" in self.cfg.MODEL.BACKBONE.NAME:
            return "Swin Transformer"
        resnet = self.cfg.MODEL.RESNETS
        deformable = "deformable " if any(resnet.DEFORM_ON_PER_STAGE) else ""
        return f"{deformable}{'ResNeXt' if resnet.NUM_GROUPS > 1 else 'ResNet'}-{resnet.DEPTH}"

    @property
    def number_of_classes(self) -> int:
        model = self.cfg.MODEL
        node = "ROI_HEADS" if model.META_ARCHITECTURE == "GeneralizedRCNN" else model.META_ARCHITECTURE.upper()
        return model[node].NUM_CLASSES


def check_empty(folder: str) -> None:
    """Raise a UserError if a folder for an imported detector exists and is not empty."""
    if os.path.exists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise UserError(f"{folder} exists already and is not an empty folder.")


def detectron2_config(keys: Mapping[str, Any], opts: Iterable[Any], program: str) -> CfgNode:
    """Return Detectron2's defaults with the keys of a detector of a program, and overrides of the command line."""
    cfg = get_cfg()
    add_kd_config(cfg)
    source = f"the {program} config"
    merge(cfg, tree_from_opts([item for pair in keys.items() for item in pair], source), source)
    merge(cfg, tree_from_opts(list(opts), "the command line"), "the command line")
    return cfg


def write_detector(imported: Imported, weights: StateDict, program: str) -> None:
    """Write config and checkpoint to the folder of an imported detector.

    Raises:
        UserError: weights of the detector are missing or do not fit, or the folder cannot be written.
    """
    cfg, classes, folder = imported.cfg, imported.classes, imported.folder
    on_cpu = cfg.clone()
    on_cpu.MODEL.DEVICE = "cpu"
    detector = build_detector(on_cpu, f"the {program} config")
    fit = fill(detector, weights)
    missing = [name for name in fit.missing if not name.endswith(CONSTANTS)]
    unfilled = [*missing, *fit.misfits, *(weights.keys() - {*fit.filled, *fit.misfits})]
    if unfilled:
        reason = fit.misfits.get(unfilled[0], "missing" if unfilled[0] in missing else "not a weight of the model")
        raise UserError(f"The {program} checkpoint does not fit the detector: {unfilled[0]} is {reason}.")
    check_output_folder(folder, "OUT")
    checkpointer = KDCheckpointer(detector, folder)
    checkpointer.class_names = list(classes) if classes else None
    checkpointer.save(WEIGHTS.removesuffix(".pth"))
    keys = {**changed_keys(cfg), "MODEL.WEIGHTS": WEIGHTS}
    tree = tree_from_opts([item for pair in keys.items() for item in pair], CONFIG)
    write_text(
        os.path.join(folder, CONFIG),
        (as_comment(classes) if classes else "") + yaml.safe_dump(tree, default_flow_style=None, width=120),
    )
