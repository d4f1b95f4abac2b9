"""The frozen teacher."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.meta_arch import SemanticSegmentor
from detectron2.modeling.proposal_generator.rrpn import RRPN
from torch import nn

from .adapters import DetectorOutputs, DetectorSpec, build_adapter
from .adapters.adapter import WITHOUT_OBJECT_CLASSES
from .checkpoint import load_complete
from .class_names import (
    match_classes,
    names_in_checkpoint,
    names_in_data,
    read_names_of_training_set,
    warn_of_unknown_order,
)
from .compiled import compile_backbone
from .config import changed_keys, load_teacher_config
from .data.coco_json import ClassOrder
from .errors import UserError
from .lazy_teacher import build_lazy_teacher, is_lazy_config, lazy_teacher_files
from .memory_format import has_channels_last, to_channels_last
from .modeling.building import build_detector

logger = logging.getLogger(__name__)


class Teacher:
    """A trained detector, frozen and in eval mode, that is in no state_dict, optimizer or DDP bucket.

    A plain object, so that modules that hold it do not own its weights.

    Args:
        model: the detector; its parameters are frozen here.
        flip_channels: whether the input images have the opposite channel order (RGB for BGR or vice versa).
        compiled: whether to run its backbone through torch.compile, see `compile_backbone`.
        channels_last: whether to store its weights in channels-last format.

    Attributes:
        config: what its config file determines, to be compared when a training is resumed; None without a file.
    """

    def __init__(
        self, model: nn.Module, *, flip_channels: bool = False, compiled: bool = False, channels_last: bool = False
    ):
        self.model = model.requires_grad_(False).eval()
        if channels_last:
            to_channels_last(self.model)
        if compiled:
            compile_backbone(self.model, "MODEL.KD.TEACHER.COMPILE", channels_last=channels_last)
        self.adapter = build_adapter(self.model)
        self.flip_channels = flip_channels
        self.config: dict[str, Any] | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Teacher:
        """Build the teacher of MODEL.KD.TEACHER and load all of its weights.

        Raises:
            UserError: config or weights are missing, damaged, or do not match.
        """
        teacher_cfg = None
        if is_lazy_config(cfg.MODEL.KD.TEACHER.CONFIG_FILE):
            model, weights, input_format = build_lazy_teacher(cfg)
            with open(lazy_teacher_files(cfg.MODEL.KD.TEACHER)[0], encoding="utf-8", errors="replace") as file:
                config = {"file": file.read()}
        else:
            teacher_cfg = load_teacher_config(cfg)
            model = build_detector(teacher_cfg, f"MODEL of the teacher's config {cfg.MODEL.KD.TEACHER.CONFIG_FILE}")
            weights, input_format = teacher_cfg.MODEL.WEIGHTS, teacher_cfg.INPUT.FORMAT
            config = {key: value for key, value in changed_keys(teacher_cfg).items() if _determines_outputs(key)}
        load_complete(model, weights, "the teacher")
        own = names_in_checkpoint(weights)
        wanted = None if isinstance(model, WITHOUT_OBJECT_CLASSES) else names_in_data(cfg)
        if own is None and wanted and teacher_cfg is not None:
            own = _classes_in_training_data(cfg.MODEL.KD.TEACHER, teacher_cfg, wanted)
        number = build_adapter(model).spec.num_classes
        if wanted and number not in (None, len(wanted.names)):
            logger.info(
                f"The teacher has {number} classes and {wanted.source} {len(wanted.names)}: only its features can be used."
            )
        else:
            match_classes(model, "the teacher", own, wanted)
        logger.info(f"Teacher: {type(model).__name__} from {weights}")
        if input_format != cfg.INPUT.FORMAT and {input_format, cfg.INPUT.FORMAT} != {"BGR", "RGB"}:
            raise UserError(
                f"The student's INPUT.FORMAT is {cfg.INPUT.FORMAT} and the teacher's {input_format}: images are converted only "
                "between BGR and RGB."
            )
        teacher = cls(
            model,
            flip_channels=input_format != cfg.INPUT.FORMAT,
            compiled=cfg.MODEL.KD.TEACHER.COMPILE,
            channels_last=has_channels_last(cfg, cfg.MODEL.KD.TEACHER.CHANNELS_LAST),
        )
        teacher.config = config
        if own is None and wanted and cfg.DATASETS.COCO_JSON and teacher.spec.num_classes in (None, len(wanted.names)):
            warn_of_unknown_order("the teacher", wanted, _remedy(cfg.MODEL.KD.TEACHER.CONFIG_FILE))
        return teacher

    @property
    def spec(self) -> DetectorSpec:
        return self.adapter.spec

    def to(self, device: torch.device) -> None:
        """Move to the student's device; does nothing if it is already there."""
        if next(self.model.parameters()).device != device:
            self.model.to(device)

    @torch.no_grad()
    def __call__(self, batched_inputs: list[dict], want: frozenset[str]) -> DetectorOutputs:
        """Return the requested outputs for a training batch whose images have the student's channel order."""
        return self.adapter.run(self.to_input_format(batched_inputs), want)

    def check_detects(self) -> None:
        """Raise a UserError if the model needs precomputed proposals, or predicts no boxes or rotated ones."""
        generator = getattr(self.model, "proposal_generator", self)
        if generator is None:
            reason = "its MODEL.PROPOSAL_GENERATOR.NAME is PrecomputedProposals, which are not supported"
        elif isinstance(generator, RRPN):
            reason = "its MODEL.PROPOSAL_GENERATOR.NAME is RRPN, whose rotated boxes are not supported"
        elif isinstance(self.model, SemanticSegmentor):
            reason = "it predicts only semantic segmentation"
        else:
            return
        raise UserError(f"The teacher ({self.spec.name}) cannot detect: {reason}.")

    def to_input_format(self, batched_inputs: list[dict]) -> list[dict]:
        """Return the inputs with images in the teacher's channel order."""
        if not self.flip_channels:
            return batched_inputs
        return [{**x, "image": x["image"].flip(0)} for x in batched_inputs]


def _classes_in_training_data(node: CfgNode, teacher_cfg: CfgNode, wanted: ClassOrder) -> ClassOrder | None:
    """Return the classes of the training data that MODEL.KD.TEACHER.OPTS name, or else the teacher's config.

    Those of the config may be left over from another training: they are not used if they are not the wanted classes.

    Raises:
        UserError: the data that OPTS name cannot be read.
    """
    is_named_by_opts = "DATASETS.COCO_JSON" in node.OPTS[::2]
    if not is_named_by_opts and not teacher_cfg.DATASETS.COCO_JSON:
        return None
    try:
        classes = read_names_of_training_set(teacher_cfg, os.path.dirname(node.CONFIG_FILE))
    except UserError as error:
        if is_named_by_opts:
            raise UserError(f"MODEL.KD.TEACHER.OPTS: {error}") from error
        logger.info(f"The teacher's config {node.CONFIG_FILE} does not determine its class order: {error}")
        return None
    if is_named_by_opts or sorted(classes.names) == sorted(wanted.names):
        return classes
    logger.info(
        f"The teacher's config {node.CONFIG_FILE} does not determine its class order: the classes of {classes.source} are not those "
        f"of {wanted.source}."
    )
    return None


def _remedy(config_file: str) -> str:
    """Return what to do about a wrong class order of the teacher with this config."""
    if is_lazy_config(config_file):
        return "add their names in its order to its .pth checkpoint, as the list `class_names`"
    return (
        "name its training data: MODEL.KD.TEACHER.OPTS "
        "\"['DATASETS.COCO_JSON', [['its_train', 'annotations.json', 'images']], 'DATASETS.TRAIN', ['its_train']]\""
    )


def _determines_outputs(key: str) -> bool:
    return key.startswith(("MODEL.", "INPUT.")) and key not in ("MODEL.WEIGHTS", "MODEL.DEVICE")
