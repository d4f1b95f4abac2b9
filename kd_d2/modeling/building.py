"""Building of detectors from configs, with one sentence for a config that Detectron2 cannot build."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from types import TracebackType

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ..errors import UserError, is_out_of_memory
from ..extensions import HINT

ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
PACKAGES = {"kd_d2", "detectron2", "fvcore", "torch", *sys.stdlib_module_names}


def build_detector(cfg: CfgNode, source: str = "MODEL") -> nn.Module:
    """Build the detector of a config, on its device, as Detectron2's `build_model`.

    Raises:
        UserError: see `building_from`.
    """
    with building_from(source):
        return build_model(cfg)


@contextlib.contextmanager
def building_from(source: str) -> Iterator[None]:
    """Raise a UserError that names the config keys `source` if Detectron2 cannot build a detector from them.

    Errors in other packages, such as those of the user, and of the GPU are not changed.
    """
    try:
        yield
    except ERRORS as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        if is_out_of_memory(error) or "CUDA" in reason or _packages(error.__traceback__) - PACKAGES:
            raise
        hint = f"; {HINT}" if re.search(r"No object named .* registry", reason) else ""
        raise UserError(
            f"The detector cannot be built from {source}: {type(error).__name__}: {reason}{hint}."
        ) from error


def _packages(trace: TracebackType | None) -> set[str]:
    """Return the packages of the functions in a traceback."""
    packages = set()
    while trace is not None:
        packages.add(trace.tb_frame.f_globals.get("__name__", "").partition(".")[0])
        trace = trace.tb_next
    return packages
