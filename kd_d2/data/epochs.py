"""SOLVER.EPOCHS: the length of a training in epochs of its images."""

from __future__ import annotations

import logging
from itertools import pairwise

from detectron2.config import CfgNode

from ..config import thawed, validate_kd_config
from ..errors import UserError, check_number, is_finite_number
from .sampling import images_per_epoch
from .stream import read_training_sets

logger = logging.getLogger(__name__)


def resolve_epochs(cfg: CfgNode) -> CfgNode:
    """Replace SOLVER.EPOCHS with the iterations that it means, and set it to None; a config in which it is None is returned as it is.

    The datasets in DATASETS.TRAIN must be registered; they are read to count their images.

    Raises:
        UserError: they cannot be read, SOLVER has invalid values, or the training is too short for its warm-up, its steps or the start of
            a method.
    """
    if cfg.SOLVER.EPOCHS is None:
        return cfg
    images = images_per_epoch(cfg, read_training_sets(cfg))
    resolved = in_iterations(cfg, cfg.SOLVER.EPOCHS, images)
    logger.info(describe(resolved, cfg.SOLVER.EPOCHS, images))
    if sentence := unusable_schedule(resolved, cfg.SOLVER.EPOCHS):
        raise UserError(sentence)
    validate_kd_config(resolved)
    return resolved


def in_iterations(cfg: CfgNode, epochs: float, images: float) -> CfgNode:
    """Return a config whose SOLVER.MAX_ITER is that of `epochs` of `images` each, with SOLVER.STEPS at the same fractions of it.

    Raises:
        UserError: SOLVER.MAX_ITER, IMS_PER_BATCH or STEPS is invalid.
    """
    solver = cfg.SOLVER
    for key in ("MAX_ITER", "IMS_PER_BATCH"):
        check_number(f"SOLVER.{key}", solver[key], 1)
    if not all(map(is_finite_number, solver.STEPS)):
        raise UserError(f"SOLVER.STEPS is {solver.STEPS!r}; it must be a list of iterations.")
    resolved = thawed(cfg)
    iterations = max(1, round(epochs * images / solver.IMS_PER_BATCH))
    resolved.SOLVER.STEPS = tuple(round(step * iterations / solver.MAX_ITER) for step in solver.STEPS)
    resolved.SOLVER.MAX_ITER, resolved.SOLVER.EPOCHS = iterations, None
    if cfg.is_frozen():
        resolved.freeze()
    return resolved


def describe(resolved: CfgNode, epochs: float, images: float) -> str:
    """Return what `in_iterations` has computed, and from what, as text."""
    return (
        f"SOLVER.EPOCHS {epochs:g} of {round(images)} training images with batches of {resolved.SOLVER.IMS_PER_BATCH}: "
        f"{iterations_of(resolved)}"
    )


def iterations_of(resolved: CfgNode) -> str:
    """Return the keys that `in_iterations` has set as text."""
    return f"SOLVER.MAX_ITER {resolved.SOLVER.MAX_ITER}, SOLVER.STEPS {resolved.SOLVER.STEPS}"


def unusable_schedule(resolved: CfgNode, epochs: float) -> str | None:
    """Return a sentence if the config of `in_iterations` is too short for its learning rate schedule, or None."""
    solver = resolved.SOLVER
    last, warm_up = solver.MAX_ITER, solver.WARMUP_ITERS
    length = f"SOLVER.EPOCHS {epochs:g} is a training of {last} iterations"
    if warm_up >= last:
        return (
            f"SOLVER.WARMUP_ITERS is {warm_up}, but {length}, which would never reach SOLVER.BASE_LR: lower SOLVER.WARMUP_ITERS, or raise "
            "SOLVER.EPOCHS."
        )
    changes = [0, *(step for step in solver.STEPS if step <= last), last]
    distinct = all(step < following for step, following in pairwise(changes))
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and not distinct:
        return (
            f"{length}, in which SOLVER.STEPS would be {solver.STEPS}; they must be different iterations between 0 and {last}: raise "
            "SOLVER.EPOCHS, or set SOLVER.STEPS to fewer steps or to ()."
        )
    return None
