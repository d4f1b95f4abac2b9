"""Loading of student and teacher configs: reading, validation, and resolution of paths."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from ..config_files import find_config_file, find_file, find_weights, is_zoo_file, read_yaml
from ..errors import UserError
from .library_keys import KD_META_ARCH, add_kd_config
from .reading import merge, read_config, solver_layers, tree_from_opts
from .validation import validate_kd_config

LENGTH = ("EPOCHS", "MAX_ITER", "STEPS")
"""Keys of SOLVER for the length of a training and the places of the steps in it."""


def load_config(
    config_file: str | os.PathLike[str],
    opts: Iterable[Any] = (),
    *,
    student_only: bool = False,
    needs_data: bool = True,
    needs_weights: bool = True,
) -> CN:
    """Load a config file and overrides into a full config.

    Relative paths in the config are resolved against the working directory, then against the config file's folder; the
    OUTPUT_DIR against the working directory. A leading ~ is the home directory.

    Args:
        config_file: a config (see `config_files.find_config_file`), or "" for the defaults.
        opts: alternating keys and values.
        student_only: for evaluation: replace KDMetaArch with the student's meta-architecture; the teacher and the
            training data need not exist.
        needs_data: whether the files in DATASETS.COCO_JSON must exist; False if no dataset is read.
        needs_weights: whether the file in MODEL.WEIGHTS must exist; False if no model is built.

    Returns:
        The config, validated by `validate_kd_config`, not frozen.

    Raises:
        UserError: a missing or unreadable file, an unknown key, a value of the wrong type.
    """
    config_file, opts = os.fspath(config_file), list(opts)
    cfg = read_config(config_file, opts)
    folder = os.path.dirname(find_config_file(config_file, "the config")) if config_file else ""
    if student_only and cfg.MODEL.META_ARCHITECTURE == KD_META_ARCH:
        cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.KD.STUDENT
    validate_kd_config(cfg)
    _check_length(cfg, config_file, opts)
    _choose_device(cfg, opts)
    _resolve_paths(cfg, folder, student_only, needs_data, needs_weights)
    return cfg


def _check_length(cfg: CN, config_file: str, opts: list[Any]) -> None:
    """Raise a UserError if SOLVER.EPOCHS hides a SOLVER.MAX_ITER that was set after it, or gives SOLVER.STEPS another scale."""
    if cfg.SOLVER.EPOCHS is None:
        return
    sources = solver_layers(config_file, opts)
    last = {key: max((n for n, (_, keys) in enumerate(sources) if key in keys), default=-1) for key in LENGTH}
    epochs, max_iter, steps = (last[key] for key in LENGTH)
    if max_iter > epochs:
        raise UserError(
            f"SOLVER.MAX_ITER comes from {sources[max_iter][0]}, but SOLVER.EPOCHS {cfg.SOLVER.EPOCHS:g} from {sources[epochs][0]} determines "
            "the number of iterations: set SOLVER.EPOCHS to another number, or to None."
        )
    if cfg.SOLVER.STEPS and steps >= epochs and steps > max_iter:
        raise UserError(
            f"SOLVER.STEPS comes from {sources[steps][0]}, but not SOLVER.MAX_ITER, of which the steps are fractions if SOLVER.EPOCHS is set: "
            "set both there, for example to (8, 11) and 12 for steps after 8 and 11 of 12 epochs."
        )


def _choose_device(cfg: CN, opts: Iterable[Any]) -> None:
    """Replace a device that PyTorch cannot use here, such as Detectron2's default "cuda" without a GPU, with "cpu".

    Raises:
        UserError: it was set in `opts`.
    """
    device = cfg.MODEL.DEVICE
    if _is_usable(device):
        return
    if "MODEL.DEVICE" in opts:
        if device.startswith("cuda"):
            raise UserError(f"MODEL.DEVICE is {device!r}, but this machine has no usable GPU; set it to 'cpu'.")
        raise UserError(f"MODEL.DEVICE is {device!r}, which PyTorch cannot use here; it is usually 'cuda' or 'cpu'.")
    cfg.MODEL.DEVICE = "cpu"


def _is_usable(device: str) -> bool:
    """Return whether tensors can be computed on a device; of a GPU, whether there is any."""
    if device.startswith("cuda"):
        return torch.cuda.is_available()
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, ImportError, RuntimeError):
        return False
    return True


def _resolve_paths(cfg: CN, folder: str, student_only: bool, needs_data: bool, needs_weights: bool) -> None:
    used = set(cfg.DATASETS.TEST) | (set() if student_only else set(cfg.DATASETS.TRAIN))
    cfg.OUTPUT_DIR = os.path.expanduser(cfg.OUTPUT_DIR)
    resolved = []
    for name, json_file, images in cfg.DATASETS.COCO_JSON:
        key = f"DATASETS.COCO_JSON ({name})"
        try:
            json_file = find_file(json_file, key, folder)
            images = find_file(images, key, folder, is_folder=True)
        except UserError:
            if needs_data and name in used:
                raise
        resolved.append([name, json_file, images])
    cfg.DATASETS.COCO_JSON = resolved
    if cfg.MODEL.WEIGHTS and needs_weights:
        cfg.MODEL.WEIGHTS = find_weights(cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS", folder)
    if cfg.MODEL.META_ARCHITECTURE == KD_META_ARCH:
        teacher = cfg.MODEL.KD.TEACHER
        # Keep a model zoo name unchanged: it also identifies the trained checkpoint.
        path = find_config_file(teacher.CONFIG_FILE, "MODEL.KD.TEACHER.CONFIG_FILE", folder)
        if not is_zoo_file(path):
            teacher.CONFIG_FILE = path
        if teacher.WEIGHTS:
            teacher.WEIGHTS = find_weights(teacher.WEIGHTS, "MODEL.KD.TEACHER.WEIGHTS", folder)


def load_teacher_config(cfg: CN) -> CN:
    """Load the teacher's full config, with the checkpoint to load in MODEL.WEIGHTS, the student's device, and no federated loss.

    If the config has KDMetaArch, the teacher is its student.
    """
    node = cfg.MODEL.KD.TEACHER
    path = find_config_file(node.CONFIG_FILE, "MODEL.KD.TEACHER.CONFIG_FILE")
    teacher_cfg = get_cfg()
    add_kd_config(teacher_cfg)
    merge(teacher_cfg, read_yaml(path), path)
    source = "MODEL.KD.TEACHER.OPTS"
    merge(teacher_cfg, tree_from_opts(list(node.OPTS), source), source)
    if teacher_cfg.MODEL.META_ARCHITECTURE == KD_META_ARCH:
        teacher_cfg.MODEL.META_ARCHITECTURE = teacher_cfg.MODEL.KD.STUDENT
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    teacher_cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS = False  # which needs its training set, for training only
    if node.WEIGHTS:
        teacher_cfg.MODEL.WEIGHTS = node.WEIGHTS
    elif is_zoo_file(path):
        try:
            teacher_cfg.MODEL.WEIGHTS = model_zoo.get_checkpoint_url(node.CONFIG_FILE)
        except RuntimeError as error:
            raise UserError(
                f"MODEL.KD.TEACHER.WEIGHTS is empty, and the model zoo has no checkpoint for {node.CONFIG_FILE}."
            ) from error
    if not teacher_cfg.MODEL.WEIGHTS:
        raise UserError(
            f"MODEL.KD.TEACHER.WEIGHTS is empty, and {path} does not set MODEL.WEIGHTS: the teacher would be untrained."
        )
    folder = os.path.dirname(path)
    teacher_cfg.MODEL.WEIGHTS = find_weights(teacher_cfg.MODEL.WEIGHTS, "MODEL.KD.TEACHER.WEIGHTS", folder)
    return teacher_cfg
