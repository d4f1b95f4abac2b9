"""Learning rate schedules, scaling to the number of processes, and advice on learning rate and batch size."""

from __future__ import annotations

from typing import Any

import torch
from detectron2 import solver as detectron2_solver
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from ..config import solver_layers
from ..distillers import DISTILLER_REGISTRY
from ..errors import UserError

DEFAULT_BATCH = 16  # Detectron2's default
SCHEDULES = ("WarmupMultiStepLR", "WarmupCosineLR")
"""Supported schedules. Detectron2's WarmupStepWithFixedGammaLR is excluded: it fails after the last iteration."""


def scale_to_world_size(cfg: CfgNode, world_size: int) -> CfgNode:
    """Scale a config from SOLVER.REFERENCE_WORLD_SIZE processes to `world_size` processes.

    Batch size, learning rate and iterations scale as in Detectron2, and so do the iterations of the distillers: all
    keys that end in _ITER or _ITERS. The learning rates of auxiliary optimizers do not change, because Adam's steps do
    not grow with the batch size.

    Raises:
        UserError: SOLVER.REFERENCE_WORLD_SIZE is negative or does not divide the batch size.
    """
    reference, batch = cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if reference < 0 or (reference and batch % reference):
        raise UserError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}; it must be 0, or divide the {batch} images of SOLVER.IMS_PER_BATCH."
        )
    scaled = DefaultTrainer.auto_scale_workers(cfg, world_size)
    if scaled is cfg:
        return cfg
    factor = world_size / reference
    scaled.defrost()
    for _, distiller in DISTILLER_REGISTRY:
        node = scaled.MODEL.KD[distiller.CONFIG_NODE]
        for key, value in node.items():
            if key.endswith(("_ITER", "_ITERS")):
                node[key] = _divided(value, factor)
    scaled.freeze()
    return scaled


def _divided(value: Any, factor: float) -> Any:
    """Divide a number, or each of a list or tuple, and round; leave others, which the methods validate."""
    if isinstance(value, list | tuple):
        return type(value)(_divided(item, factor) for item in value)
    return round(value / factor) if type(value) in (int, float) else value


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> detectron2_solver.LRMultiplier:
    """Build Detectron2's learning rate scheduler from SOLVER.

    Raises:
        UserError: the name is not supported, or the values in SOLVER do not define a valid schedule.
    """
    name, end, rate = cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.BASE_LR_END, cfg.SOLVER.BASE_LR
    if name not in SCHEDULES:
        raise UserError(f"SOLVER.LR_SCHEDULER_NAME is {name!r}; it must be {' or '.join(map(repr, SCHEDULES))}.")
    if name == "WarmupCosineLR" and not 0 <= end <= rate:
        raise UserError(f"SOLVER.BASE_LR_END is {end}; for {name} it must be between 0 and SOLVER.BASE_LR {rate}.")
    warmup, max_iter = cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.MAX_ITER
    if cfg.SOLVER.RESCALE_INTERVAL and warmup >= max_iter:
        raise UserError(
            f"SOLVER.WARMUP_ITERS is {warmup}; with SOLVER.RESCALE_INTERVAL True it must be below SOLVER.MAX_ITER {max_iter}."
        )
    try:
        return detectron2_solver.build_lr_scheduler(cfg, optimizer)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"Invalid learning rate schedule: SOLVER.LR_SCHEDULER_NAME {name!r}, SOLVER.STEPS {cfg.SOLVER.STEPS} and SOLVER.MAX_ITER "
            f"{max_iter}: {error}."
        ) from error


def learning_rate_advice(config_file: str, opts: list[Any]) -> str | None:
    """Return advice if a later file or the command line changes the batch size but not the learning rate, or None."""
    batch = of_rate = DEFAULT_BATCH
    rate, source = None, "Detectron2's default"
    for name, solver in solver_layers(config_file, opts):
        batch = _number(solver.get("IMS_PER_BATCH", batch))
        if "BASE_LR" in solver:
            rate, source, of_rate = _number(solver["BASE_LR"]), name, batch
    if rate is None or batch == of_rate or batch < 1:
        return None
    return (
        f"SOLVER.BASE_LR {rate:g} comes from {source}, where SOLVER.IMS_PER_BATCH is {of_rate:g}; the batch size is now {batch:g}. "
        f"The linear scaling rule gives SOLVER.BASE_LR {rate * batch / of_rate:g}, with {of_rate / batch:g} times the iterations."
    )


def _number(value: Any) -> float:
    """Return a number of a config, which may be the text of a Python literal."""
    return float(CfgNode._decode_cfg_value(value))
