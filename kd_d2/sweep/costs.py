"""Inference costs of a detector: parameters, operations, time."""

from __future__ import annotations

import logging
import statistics
import time
import zlib
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from ..config import load_config, load_teacher_config, thawed
from ..lazy_teacher import is_lazy_config
from ..modeling.building import build_detector
from ..operations import detect_nothing, device_of, multiply_adds
from .matrix import Matrix

logger = logging.getLogger(__name__)

REPEATS = 10
ARCHITECTURE = "architecture"
MEASUREMENT_VERSION = 2
"""Version of the measurement, part of the checksum "architecture"; since version 2 the heads of R-CNNs count."""


def measure_costs(
    matrix: Matrix, opts: list[Any], known: dict[str, dict[str, float]] | None = None
) -> dict[str, dict[str, float]]:
    """Measure the costs of the student of every cell and of the teacher ("teacher"), if there is one.

    Images are square with side INPUT.MIN_SIZE_TEST of the cell, or INPUT.MAX_SIZE_TEST if the former is 0. Weights are
    random, with all detections suppressed, so that the time is that of the network. Times are medians of interleaved
    runs on one image.

    Args:
        known: costs measured before, which are returned if they are those of the same architectures and image sizes.

    Returns:
        "params" in millions, "gflops" (multiply-adds, 1e9; see `multiply_adds`), "ms_per_image", and the checksum "architecture"
        by cell. A detector that cannot be measured is logged, and left out.
    """
    students = {c.name: load_config(c.config, [*opts, *c.opts], student_only=True) for c in matrix.cells}
    configs = {**_teacher(matrix, opts), **students}
    codes = {
        name: zlib.crc32(f"{MEASUREMENT_VERSION} {_side(cfg)} {_architecture(cfg)}".encode())
        for name, cfg in configs.items()
    }
    if known and all(name in known and known[name].get(ARCHITECTURE, code) == code for name, code in codes.items()):
        return known  # older files have no checksums
    distinct = {code: name for name, code in codes.items()}
    measured = _measure({name: configs[name] for name in distinct.values()})
    return {
        name: {**measured[distinct[code]], ARCHITECTURE: code}
        for name, code in codes.items()
        if distinct[code] in measured
    }


def _teacher(matrix: Matrix, opts: list[Any]) -> dict[str, CfgNode]:
    if matrix.teacher is not None:
        return {"teacher": load_config(matrix.teacher.config, [*opts, *matrix.teacher.opts], student_only=True)}
    cell = matrix.taught_cell(opts)
    cfg = None if cell is None else load_config(cell.config, [*opts, *cell.opts])
    if cfg is None or is_lazy_config(cfg.MODEL.KD.TEACHER.CONFIG_FILE):  # the costs of a LazyConfig are not measured
        return {}
    teacher = load_teacher_config(cfg)
    teacher.INPUT = cfg.INPUT  # it is evaluated at the student's image sizes
    return {"teacher": teacher}


def _side(cfg: CfgNode) -> int:
    return cfg.INPUT.MIN_SIZE_TEST or cfg.INPUT.MAX_SIZE_TEST


def _architecture(cfg: CfgNode) -> str:
    """Return a text that is equal for equal detectors, independent of their training."""
    model = thawed(cfg.MODEL)
    model.KD, model.WEIGHTS, model.DEVICE = CfgNode(), "", ""
    return str(model)


def _measure(configs: dict[str, CfgNode]) -> dict[str, dict[str, float]]:
    models, costs = {}, {}
    for name, cfg in configs.items():
        try:
            model = _build(cfg)
            costs[name] = {
                "params": sum(p.numel() for p in model.parameters()) / 1e6,
                "gflops": multiply_adds(model, _side(cfg), _side(cfg)) / 1e9,
            }
            _seconds(model, _side(cfg))
            models[name] = model
        except Exception as error:  # of a detector from elsewhere
            logger.warning(f"The costs of the detector of {name} cannot be measured: {type(error).__name__}: {error}")
    times = [
        {name: _seconds(model, _side(configs[name])) for name, model in models.items()} for _ in range(REPEATS + 1)
    ]
    return {
        name: {**costs[name], "ms_per_image": 1000 * statistics.median(of_round[name] for of_round in times[1:])}
        for name in models
    }


@torch.no_grad()
def _seconds(model: nn.Module, side: int) -> float:
    """Return the duration of one inference of a square image."""
    start = time.perf_counter()
    detect_nothing(model, side, side)
    if device_of(model).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _build(cfg: CfgNode) -> nn.Module:
    cfg = thawed(cfg)
    cfg.MODEL.WEIGHTS = ""
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    model = build_detector(cfg).eval()
    for module in model.modules():
        if hasattr(module, "test_score_thresh"):
            module.test_score_thresh = 1.0
    return model
