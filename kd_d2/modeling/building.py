"""Building of detectors from configs, with one sentence for a config that Detectron2 cannot build."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ..errors import UserError, is_out_of_memory
from ..extensions import HINT
from .deformable import deformable_resnets

ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
PACKAGES = {"kd_d2", "detectron2", "fvcore", "torch", *sys.stdlib_module_names}


def build_detector(cfg: CfgNode, source: str = "MODEL") -> nn.Module:
    """Build the detector of a config, on its device, as Detectron2's `build_model`.

    Raises:
        UserError: see `building_from`.
    """
    with building_from(source, cfg):
        return build_model(cfg)


def lower_score_threshold(model: nn.Module, score_thresh: float) -> None:
    """Let a detector return detections down to a score; lower thresholds are kept."""
    for module in model.modules():
        if hasattr(module, "test_score_thresh"):
            module.test_score_thresh = min(module.test_score_thresh, score_thresh)


@contextlib.contextmanager
def building_from(source: str, cfg: CfgNode | None = None) -> Iterator[None]:
    """Build detectors, with deformable convolutions that run on any device.

    Args:
        source: description of the config keys.
        cfg: the config that has them, of which the message names the lists with an unknown feature map.

    Raises:
        UserError: Detectron2 cannot build a detector from the keys, which it names. Errors in other packages, such as those of
            the user, and of the GPU are not changed.
    """
    try:
        with deformable_resnets():
            yield
    except ImportError as error:
        if "detectron2._C" not in str(error):
            raise
        raise UserError(
            f"The detector cannot be built from {source}: {str(error).partition('. ')[0]}: this Detectron2 has no compiled operators; install the "
            "official one (make setup DETECTRON2=source)."
        ) from error
    except ERRORS as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".") or _failed_line(error)
        if is_out_of_memory(error) or "CUDA" in reason or _packages(error.__traceback__) - PACKAGES:
            raise
        hint = f"; {HINT}" if re.search(r"No object named .* registry", reason) else ""
        if cfg is not None and isinstance(error, KeyError) and (lists := _lists_with(error.args, cfg)):
            hint = f", which is in {' and '.join(lists)}"
        raise UserError(
            f"The detector cannot be built from {source}: {type(error).__name__}: {reason}{hint}."
        ) from error


def _lists_with(names: tuple, cfg: CfgNode) -> list[str]:
    """Return the keys in nodes of MODEL whose values are lists with one of these names, such as MODEL.RPN.IN_FEATURES."""
    return [
        f"MODEL.{node}.{key}"
        for node, keys in cfg.MODEL.items()
        if isinstance(keys, CfgNode)
        for key, value in keys.items()
        if isinstance(value, list | tuple) and any(name in value for name in names)
    ]


def _failed_line(error: Exception) -> str:
    """Return the line of code that raised an error, and its place."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.line} ({os.path.basename(frame.filename)}, line {frame.lineno})"


def _packages(trace: TracebackType | None) -> set[str]:
    """Return the packages of the functions in a traceback."""
    packages = set()
    while trace is not None:
        packages.add(trace.tb_frame.f_globals.get("__name__", "").partition(".")[0])
        trace = trace.tb_next
    return packages
