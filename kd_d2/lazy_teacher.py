"""Teachers with Python configs: Detectron2's LazyConfigs, such as its new baselines, ViTDet and Swin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from .config_files import find_config_file, find_weights, is_zoo_file
from .errors import UserError
from .modeling.deformable import deformable_resnets

FILE, TRUST, OPTS = (f"MODEL.KD.TEACHER.{key}" for key in ("CONFIG_FILE", "TRUST_CONFIG", "OPTS"))
MAPPER_FORMAT, MODEL_FORMAT = "dataloader.train.mapper.image_format", "model.input_format"


def is_lazy_config(name: str) -> bool:
    return name.endswith(".py")


def build_lazy_teacher(cfg: CfgNode) -> tuple[nn.Module, str, str]:
    """Build the teacher from `model` in a Python config, on the student's device.

    Configs that Detectron2 ships are loaded; others only with MODEL.KD.TEACHER.TRUST_CONFIG, since they execute code.
    MODEL.KD.TEACHER.OPTS are overrides in Detectron2's format for such configs: ["model.roi_heads.num_classes=20"]; they may
    have other classes and functions (`_target_`) or interpolations (`${...}`) only with TRUST_CONFIG.
    The channel order is that of the images that the config's mapper reads, otherwise `input_format` of the model.

    Returns:
        the detector without its weights, its checkpoint, and the channel order of its input.

    Raises:
        UserError: the config is not trusted, cannot be loaded, names no detector or weights, or two channel orders.
    """
    node = cfg.MODEL.KD.TEACHER
    path, weights = lazy_teacher_files(node)
    if not is_zoo_file(path) and not node.TRUST_CONFIG:
        raise UserError(
            f"{FILE} {path} is a Python file, which runs code when it is loaded; set {TRUST} True if you trust it."
        )
    config = _load(path, [str(override) for override in node.OPTS], node.TRUST_CONFIG)
    if "model" not in config:
        raise UserError(f"{FILE} {path} defines no `model`.")
    read, expected = _select(config, MAPPER_FORMAT), _select(config, MODEL_FORMAT)
    if read and expected and read != expected:
        raise UserError(
            f"{FILE} {path}: {MAPPER_FORMAT} is {read}, but {MODEL_FORMAT} is {expected}; set both to the channel order of the "
            f"teacher's training, such as {OPTS} \"['{MODEL_FORMAT}={read}']\"."
        )
    try:
        with deformable_resnets():
            model = instantiate(config.model).to(cfg.MODEL.DEVICE)
    except Exception as error:  # any error from classes in the config
        raise UserError(f"{FILE} {path}: its model cannot be built ({type(error).__name__}: {error}).") from error
    return model, weights, read or getattr(model, "input_format", None) or "BGR"


def lazy_teacher_files(node: CfgNode) -> tuple[str, str]:
    """Return the paths of the Python config and of the checkpoint that MODEL.KD.TEACHER names.

    Raises:
        UserError: there is no such file, or no checkpoint is named and the model zoo has none.
    """
    path = find_config_file(node.CONFIG_FILE, FILE)
    return path, _weights(node, path)


def _load(path: str, overrides: list[str], trusted: bool) -> Any:
    try:
        config = LazyConfig.load(path)
    except Exception as error:  # from code in the file
        raise UserError(f"{FILE} {path} cannot be loaded ({type(error).__name__}: {error}).") from error
    if not overrides:
        return config
    before = dict(_code(config))
    try:
        config = LazyConfig.apply_overrides(config, overrides)
    except Exception as error:  # from Hydra's parser and OmegaConf
        raise UserError(f"{OPTS} {overrides} cannot be applied to {path}; write KEY=VALUE ({error}).") from error
    for place, code in _code(config):
        if not trusted and before.get(place) != code:
            raise UserError(
                f"{OPTS} sets {place} to {code!r}, which may call a class or function; set {TRUST} True if you trust it."
            )
    return config


def _code(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the key and value of each `_target_` in a config, which `instantiate` calls, and of each interpolation."""
    nodes = [("", OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config)]
    while nodes:
        prefix, node = nodes.pop()
        entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
        for name, value in entries:
            key = f"{prefix}.{name}" if prefix else str(name)
            if name == "_target_" or (isinstance(value, str) and "${" in value):
                yield key, value
            nodes.append((key, value))


def _select(config: Any, key: str) -> Any:
    """Return the value of a key, or None if the config lacks it or it cannot be resolved."""
    try:
        return OmegaConf.select(config, key)
    except OmegaConfBaseException:
        return None


def _weights(node: CfgNode, path: str) -> str:
    if node.WEIGHTS:
        return find_weights(node.WEIGHTS, "MODEL.KD.TEACHER.WEIGHTS")
    try:
        return model_zoo.get_checkpoint_url(node.CONFIG_FILE)
    except RuntimeError as error:
        raise UserError(
            f"MODEL.KD.TEACHER.WEIGHTS is empty, and the model zoo has no checkpoint for {path}: name the teacher's checkpoint."
        ) from error
