"""The authors' PyTorch code of ICD, from a checkout of their repository (megvii-research/ICD), for benchmarks/icd.py.

Their decoder, encoder and losses are imported from the checkout, and called in the same order as in their teacher and
distiller. The code was written for older versions of PyTorch and NumPy, whose removed names are restored first.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
import typing
import warnings
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

DECODER = {
    "TASK_NAME": "InstanceEncoder",
    "DECODER": "DecoderWrapper",
    "DECODER_POSEMB_ON_V": False,
    "ADD_SCALE_INDICATOR": True,
    "DISTILL_NORM": "ln",
    "NUM_CLASSES": 80,
    "UNIFORM_SAMPLE_CLASS": False,
    "UNIFORM_SAMPLE_BOX": False,
    "ATT_LAYERS": 1,
    "PROJECT_POS": True,
    "SAMPLE_RULE": "relative",
    "NUM_NEG_POS_RATIO": 5.0,
    "NUM_LABELS": 100,
    "MAX_LABELS": 300,
    "DROPOUT": 0.0,
    "CONFIDENCE_LOSS_WEIGHT": 1.0,
    "USE_POS_EMBEDDING": True,
    "ATT_HEADS": 8,
    "HIDDEN_DIM": 256,
    "VALUE_RECONST": -1.0,
}
DISTILLATION = {
    "WEIGHT_VALUE": 8.0,
    "TEMP_MASK": 1.0,
    "TEMP_VALUE": 1.0,
    "TEMP_DECAY": False,
    "TEMP_DECAY_TO": 1.0,
    "DISTILL_NEGATIVE": False,
    "LOSS_FORM": "mse",
    "SAMPLE_RANGE": 0.3,
}


class AuthorsICD:
    """Encoding, both decoders, auxiliary task and distillation loss as published. `run` is one forward and backward.

    Args:
        checkout: folder `pytorch_release` of their repository.
        teacher, student: levels (B, 256, H, W).
        targets: ground truth of each image.
        size: size of the unpadded images.
    """

    def __init__(
        self, checkout: str, teacher: list[Tensor], student: list[Tensor], targets: list, size: tuple[int, int]
    ):
        self.keys = [f"p{i}" for i in range(len(teacher))]
        self.teacher, self.student = (dict(zip(self.keys, maps, strict=True)) for maps in (teacher, student))
        self.inputs = [{"instances": target} for target in targets]
        self.images = types.SimpleNamespace(
            image_sizes=[size] * len(targets), tensor=torch.empty(len(targets), 3, *size, device=teacher[0].device)
        )
        device = str(teacher[0].device)
        distiller = {"INS": {**DECODER, "INPUT_FEATS": self.keys}, "INS_ATT_MIMIC": DISTILLATION}
        cfg = CfgNode({"MODEL": {"DEVICE": device, "DISTILLER": distiller}, "SOLVER": {"MAX_ITER": 90000}})
        with contextlib.chdir(checkout):  # they use a relative path for the class statistics
            self.utils, distillers = _import(Path.cwd())
            self.positions = self.utils.PositionEmbeddingSine(128, normalize=True)
            self.decoder = self.utils.build_decoder_module(cfg)
            self.encoder = self.utils.build_instance_encoder(cfg)
            self.distiller = distillers.InstanceConditionalDistillation(cfg, None, None).to(device)

    def run(self) -> None:
        for module in (self.decoder, self.encoder, self.distiller):
            module.zero_grad()
        for level in self.student.values():
            level.grad = None
        padding = self.utils.mask_out_padding(self.teacher, self.images)
        positions = {key: self.positions(self.teacher[key], padding[key]) for key in self.keys}
        sequence, positions, padding = self.distiller.concate_multiscale_reps(self.teacher, positions, padding)
        encoded = self.encoder(self.inputs)
        found, masks, values = self.decoder(
            encoded[0], sequence, sequence, encoded[1], key_padding_mask=padding, pos_embedding=positions
        )
        losses = self.encoder.loss(found[-1], encoded[2], encoded[1])
        student = {
            "images": self.images,
            "batched_inputs": None,
            "fpn_feat": self.student,
            "distill_flag": 1,
            "iteration": 0,
        }
        teacher = {"aux_feat": {"encoded_ins": encoded, "decoded_value": values, "decoded_mask": masks}}
        losses |= self.distiller(student, teacher)
        sum(losses.values()).backward()


def _import(checkout: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """Import their modules `utils` and `distiller`, without the other modules, which need AdelaiDet."""
    if not (checkout / "models" / "distiller.py").is_file():
        sys.exit(f"error: {os.fspath(checkout)} is not the folder pytorch_release of the authors' repository")
    for module in (torch.nn.functional, torch.nn.modules.activation):
        module.__dict__.pop("__all__", None)  # their star imports rely on names that these modules import
    for name in ("Tuple", "Optional"):
        setattr(torch.nn.functional, name, getattr(typing, name))
    for name in ("xavier_uniform_", "xavier_normal_", "constant_"):
        setattr(torch.nn.functional, name, getattr(torch.nn.init, name))
    torch.nn.functional.Parameter = torch.nn.Parameter
    torch.nn.functional.Module = torch.nn.Module
    torch.nn.functional.warnings = warnings
    np.bool = bool
    package = types.ModuleType("models")
    package.__path__ = [os.fspath(checkout / "models")]
    sys.modules["models"] = package
    import models.distiller
    import models.utils

    return models.utils, models.distiller
