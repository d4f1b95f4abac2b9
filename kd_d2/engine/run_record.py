"""A record of everything that determines a training, compared on resume."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from torch import nn

from ..config import changed_keys
from ..errors import UserError
from ..files import checksum
from ..teacher import Teacher

logger = logging.getLogger(__name__)

WITHOUT_EFFECT = (
    "OUTPUT_DIR", "TEST.", "DATASETS.TEST", "DATASETS.COCO_JSON", "DATALOADER.NUM_WORKERS", "VIS_PERIOD", "VERSION", "CUDNN_BENCHMARK",
    "MODEL.DEVICE", "MODEL.WEIGHTS", "MODEL.KD.INHERIT.", "MODEL.KD.TEACHER.WEIGHTS", "MODEL.KD.TEACHER.COMPILE",
    "MODEL.KD.TEACHER.CHANNELS_LAST", "SOLVER.CHANNELS_LAST", "SOLVER.COMPILE", "SOLVER.CHECKPOINT", "SOLVER.REFERENCE_WORLD_SIZE",
)  # fmt: skip
"""Prefixes of keys that do not affect a resumed training except for rounding; files are compared by content instead."""
STORED = (
    "SEED", "SOLVER.BASE_LR", "SOLVER.BIAS_LR_FACTOR", "SOLVER.MOMENTUM", "SOLVER.NESTEROV", "SOLVER.WEIGHT_DECAY",
    "SOLVER.WEIGHT_DECAY_NORM", "SOLVER.WEIGHT_DECAY_BIAS",
)  # fmt: skip
"""Keys whose values a checkpoint restores through the seed and the optimizer state."""
PROCESSES, ANNOTATIONS = "processes", "annotations of DATASETS.TRAIN"
DURATION = ("SOLVER.MAX_ITER", "SOLVER.STEPS")
TEACHER, TEACHER_CONFIG = "weights of the teacher", "config of the teacher"


class RunRecord:
    """A record of the processes, config, annotations and teacher of a training, stored in its checkpoints.

    Loading the record of a checkpoint logs all differences in one line.

    Args:
        cfg: the training config.
        teacher: the teacher, if any.

    Attributes:
        is_loaded: whether the record of a checkpoint was loaded; those of release 0.1 have none.
        another_training: the loaded record's differences by which a finished training is not this one, each as text;
            it may have had another number of processes, to which SOLVER.REFERENCE_WORLD_SIZE scales other keys, or of
            iterations.
    """

    def __init__(self, cfg: CfgNode, teacher: Teacher | None):
        keys = {key: value for key, value in changed_keys(cfg).items() if not _is_without_effect(key)}
        self.content: dict[str, Any] = {
            PROCESSES: comm.get_world_size(),
            ANNOTATIONS: [_content_of(name) for name in cfg.DATASETS.TRAIN],
            TEACHER: None if teacher is None else _content_of_weights(teacher.model),
            TEACHER_CONFIG: None if teacher is None else _content_of_config(teacher),
            **keys,
        }
        config_file = "MODEL.KD.TEACHER.CONFIG_FILE"
        if config_file in keys:
            self.content[config_file] = os.path.basename(keys[config_file])
        self.optimizer = cfg.SOLVER.OPTIMIZER
        self.is_scaled = bool(cfg.SOLVER.REFERENCE_WORLD_SIZE)
        self.is_loaded = False
        self.another_training: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        return self.content

    def load_state_dict(self, before: dict[str, Any]) -> None:
        """Compare with the record of the run that wrote the checkpoint.

        Raises:
            UserError: that run used another optimizer.
        """
        self.is_loaded = True
        optimizer = before.get("SOLVER.OPTIMIZER", "SGD")
        if optimizer != self.optimizer:
            raise UserError(
                f"--resume: the checkpoint has the state of SOLVER.OPTIMIZER {optimizer}, not of {self.optimizer}; resume with {optimizer}, or "
                "start from the checkpoint's weights (MODEL.WEIGHTS) in another OUTPUT_DIR."
            )
        before = {TEACHER_CONFIG: self.content[TEACHER_CONFIG], **before}  # not in checkpoints of release 0.1
        now = self.content
        changes = {key: _sentence(key, before, now) for key in now | before if before.get(key) != now.get(key)}
        if not (self.is_scaled and PROCESSES in changes):
            self.another_training = [text for key, text in changes.items() if key not in (PROCESSES, *DURATION)]
        if changes and comm.is_main_process():
            logger.warning(
                "--resume: the losses may differ from those of an uninterrupted training, since the checkpoint was written with: "
                f"{'; '.join(changes.values())}."
            )


def _sentence(key: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    if key in (ANNOTATIONS, TEACHER, TEACHER_CONFIG):
        return f"other {key}"
    if key in STORED:
        return f"{key} {_value(key, before)}, which is kept, not {_value(key, now)}"
    return f"{key} {_value(key, before)}, now {_value(key, now)}"


def _value(key: str, content: dict[str, Any]) -> str:
    text = str(content[key]) if key in content else "its default"
    return text if len(text) <= 100 else text[:100] + "..."


def _is_without_effect(key: str) -> bool:
    return key.startswith(WITHOUT_EFFECT) or key.endswith("_TEST")


def _content_of(dataset: str) -> str | None:
    """Return the hash of a dataset's annotation file, or None if it has no such file."""
    path = MetadataCatalog.get(dataset).get("json_file")
    return checksum(path) if path and os.path.isfile(path) else None


def _content_of_config(teacher: Teacher) -> str:
    return hashlib.sha256(json.dumps(teacher.config, sort_keys=True, default=str).encode()).hexdigest()


def _content_of_weights(model: nn.Module) -> str:
    content = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        content.update(name.encode())
        content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return content.hexdigest()
