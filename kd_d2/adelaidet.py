"""Import of AdelaiDet's FCOS as a Detectron2 config and checkpoint."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog

from .checkpoint import StateDict, read_checkpoint
from .config.reading import merge
from .config_files import find_file, leaves, read_yaml
from .errors import UserError, check_number
from .imported import Imported, Weights, check_empty, detectron2_config, write_detector

PROGRAM = "AdelaiDet"
HEAD = "proposal_generator.fcos_head"
FCOS_KEYS = {
    "NUM_CLASSES": 80,
    "IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
    "FPN_STRIDES": [8, 16, 32, 64, 128],
    "TOP_LEVELS": 2,
    "NORM": "GN",
    "USE_SCALE": True,
    "USE_DEFORMABLE": False,
    "NUM_CLS_CONVS": 4,
    "NUM_BOX_CONVS": 4,
    "NUM_SHARE_CONVS": 0,
    "INFERENCE_TH_TEST": 0.05,
    "THRESH_WITH_CTR": False,
    "PRE_NMS_TOPK_TEST": 1000,
    "POST_NMS_TOPK_TEST": 100,
    "NMS_TH": 0.6,
}
"""Keys of MODEL.FCOS, with AdelaiDet's defaults."""
WITHOUT_EFFECT = {
    "BOX_QUALITY",
    "CENTER_SAMPLE",
    "INFERENCE_TH_TRAIN",
    "LOC_LOSS_TYPE",
    "LOSS_ALPHA",
    "LOSS_GAMMA",
    "LOSS_NORMALIZER_CLS",
    "LOSS_WEIGHT_CLS",
    "POS_RADIUS",
    "POST_NMS_TOPK_TRAIN",
    "PRE_NMS_TOPK_TRAIN",
    "PRIOR_PROB",
    "SIZES_OF_INTEREST",
    "USE_RELU",
    "YIELD_BOX_FEATURES",
    "YIELD_PROPOSAL",
}
"""Keys of MODEL.FCOS that do not change what a trained detector does."""
READ = {
    "DATASETS": ("TRAIN",),
    "INPUT": ("FORMAT", "MIN_SIZE_TEST", "MAX_SIZE_TEST"),
    "MODEL": (
        "BACKBONE",
        "FCOS",
        "FPN",
        "META_ARCHITECTURE",
        "MOBILENET",
        "PIXEL_MEAN",
        "PIXEL_STD",
        "PROPOSAL_GENERATOR",
        "RESNETS",
    ),
}
"""Keys that describe an FCOS; the others are for training or for other detectors."""
SAME = ("INPUT.", "MODEL.BACKBONE.FREEZE_AT", "MODEL.FPN.", "MODEL.PIXEL_", "MODEL.RESNETS.")
"""Beginnings of keys with the same meaning in Detectron2."""
LEVELS = {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
"""Strides of the FPN's levels."""
NECKS = {0: "build_resnet_fpn_backbone", 2: "build_dense_resnet_fpn_backbone"}
"""Detectron2's backbones by number of levels above P5."""


def import_detector(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    config: str | os.PathLike[str] | None = None,
    *,
    opts: Iterable[Any] = (),
) -> Imported:
    """Write an FCOS trained with AdelaiDet as a Detectron2 config and checkpoint.

    Args:
        checkpoint: AdelaiDet's checkpoint.
        folder: output folder, new or empty.
        config: the YAML config of its training; None for config.yaml in the folder of the checkpoint.
        opts: overrides of the Detectron2 config, alternating keys and values.

    Raises:
        UserError: a file cannot be read, the folder is not empty, or the detector has a part or setting that Detectron2 lacks.
    """
    checkpoint, folder = os.fspath(checkpoint), os.fspath(folder)
    check_empty(folder)
    checkpoint = find_file(checkpoint, "CHECKPOINT")
    source = _read_config(config, checkpoint)
    weights = _moved_weights(checkpoint, source)
    imported = Imported("FCOS", folder, detectron2_config(_keys(source), opts, PROGRAM), _classes(source))
    write_detector(imported, weights, PROGRAM)
    return imported


def _read_config(config: str | os.PathLike[str] | None, checkpoint: str) -> CfgNode:
    """Return the keys in `READ` of AdelaiDet's config, over its defaults."""
    path = os.path.join(os.path.dirname(checkpoint), "config.yaml") if config is None else os.fspath(config)
    if config is None and not os.path.isfile(path):
        raise UserError(f"There is no file {path}: name the config with which {checkpoint} was trained with --config.")
    path = find_file(path, "--config")
    cfg = get_cfg()
    cfg.MODEL.FCOS = CfgNode(FCOS_KEYS)
    cfg.MODEL.MOBILENET = cfg.MODEL.BACKBONE.ANTI_ALIAS = False
    cfg.MODEL.RESNETS.DEFORM_INTERVAL = 1
    tree = {
        group: {name: value for name, value in node.items() if name in READ[group]}
        for group, node in read_yaml(path).items()
        if group in READ and isinstance(node, dict)
    }
    fcos = tree.get("MODEL", {}).get("FCOS")
    if isinstance(fcos, dict):
        tree["MODEL"]["FCOS"] = {name: value for name, value in fcos.items() if name not in WITHOUT_EFFECT}
    merge(cfg, tree, path)
    _check(cfg, path)
    return cfg


def _check(cfg: CfgNode, path: str) -> None:
    """Raise a UserError if a key has a value that cannot be imported."""
    fcos = cfg.MODEL.FCOS
    if not fcos.IN_FEATURES or not all(level in [*LEVELS] for level in fcos.IN_FEATURES):
        raise UserError(
            f"{path}: MODEL.FCOS.IN_FEATURES is {fcos.IN_FEATURES}; only some of {', '.join(LEVELS)} can be imported."
        )
    check_number(f"{path}: MODEL.FCOS.INFERENCE_TH_TEST", fcos.INFERENCE_TH_TEST, 0)
    check_number(f"{path}: MODEL.FCOS.POST_NMS_TOPK_TEST", fcos.POST_NMS_TOPK_TEST, 1)
    supported = {
        "MODEL.META_ARCHITECTURE": ["OneStageDetector"],
        "MODEL.PROPOSAL_GENERATOR.NAME": ["FCOS"],
        "MODEL.BACKBONE.NAME": ["build_fcos_resnet_fpn_backbone"],
        "MODEL.BACKBONE.ANTI_ALIAS": [False],
        "MODEL.RESNETS.DEFORM_INTERVAL": [1],
        "MODEL.MOBILENET": [False],
        "MODEL.FCOS.FPN_STRIDES": [[LEVELS[level] for level in fcos.IN_FEATURES]],
        "MODEL.FCOS.TOP_LEVELS": [*NECKS],
        "MODEL.FCOS.NORM": ["GN", "NaiveGN", "none"],
        "MODEL.FCOS.NUM_SHARE_CONVS": [0],
        "MODEL.FCOS.NUM_BOX_CONVS": [fcos.NUM_CLS_CONVS],
    }
    for key, choices in supported.items():
        value = functools.reduce(CfgNode.__getitem__, key.split("."), cfg)
        if value not in choices:
            raise UserError(f"{path}: {key} is {value!r}; only {' or '.join(map(repr, choices))} can be imported.")


def _keys(source: CfgNode) -> dict[str, Any]:
    """Return the keys of the Detectron2 config."""
    fcos = source.MODEL.FCOS
    # Detectron2's threshold is one of the square root of class probability * centerness.
    threshold = math.sqrt(fcos.INFERENCE_TH_TEST) if fcos.THRESH_WITH_CTR else fcos.INFERENCE_TH_TEST
    same = {key: value for key, value in leaves(source) if key.startswith(SAME) and not key.endswith("DEFORM_INTERVAL")}
    return same | {
        "MODEL.META_ARCHITECTURE": "FCOS",
        "MODEL.BACKBONE.NAME": NECKS[fcos.TOP_LEVELS],
        "MODEL.FCOS.NUM_CLASSES": fcos.NUM_CLASSES,
        "MODEL.FCOS.IN_FEATURES": fcos.IN_FEATURES,
        "MODEL.FCOS.NUM_CONVS": fcos.NUM_CLS_CONVS,
        "MODEL.FCOS.NORM": "" if fcos.NORM == "none" else "GN",
        "MODEL.FCOS.LEVEL_SCALES": fcos.USE_SCALE,
        "MODEL.FCOS.DEFORMABLE_TOWERS": fcos.USE_DEFORMABLE,
        "MODEL.FCOS.SCORE_THRESH_TEST": threshold,
        "MODEL.FCOS.TOPK_CANDIDATES_TEST": fcos.PRE_NMS_TOPK_TEST,
        "MODEL.FCOS.NMS_THRESH_TEST": fcos.NMS_TH,
        "TEST.DETECTIONS_PER_IMAGE": fcos.POST_NMS_TOPK_TEST,
    }


def _moved_weights(checkpoint: str, source: CfgNode) -> StateDict:
    """Return the weights by Detectron2's names."""
    content = read_checkpoint(checkpoint)["model"]
    weights = Weights({name: value for name, value in content.items() if not name.startswith("pixel_")}, PROGRAM)
    weights.module("backbone", "backbone", _rename)
    for name, target in {"cls_tower": "cls_subnet", "bbox_tower": "bbox_subnet"}.items():
        weights.module(f"{HEAD}.{name}", f"head.{target}", _rename)
    for name, target in {"cls_logits": "cls_score", "bbox_pred": "bbox_pred", "ctrness": "ctrness"}.items():
        weights.layer(f"{HEAD}.{name}", f"head.{target}")
    if source.MODEL.FCOS.USE_SCALE:
        weights.scales(f"{HEAD}.scales", "head.scales", len(source.MODEL.FCOS.IN_FEATURES))
    weights.check_all_moved()
    return weights.moved


def _rename(weights: StateDict, prefix: str) -> StateDict:
    """Rename the layers of the towers' deformable convolutions; the other names are equal."""
    offsets, convolution = re.compile(r"^(\d+)\.offset\."), re.compile(r"^(\d+)\.conv\.")
    return {
        prefix + convolution.sub(r"\1.", offsets.sub(r"\1.conv_offset.", name)): value
        for name, value in weights.items()
    }


def _classes(source: CfgNode) -> tuple[str, ...] | None:
    """Return the class names of the training data, if Detectron2 knows it."""
    known = [name for name in source.DATASETS.TRAIN if name in MetadataCatalog.list()]
    names = MetadataCatalog.get(known[0]).get("thing_classes", ()) if known else ()
    return tuple(names) if len(names) == source.MODEL.FCOS.NUM_CLASSES else None
