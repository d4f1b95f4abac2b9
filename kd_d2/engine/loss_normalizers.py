"""Dense detectors keep a running loss normaliser outside their state_dict."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


def get_loss_normalizers(model: nn.Module) -> dict[str, float]:
    """By the name of the module that has it."""
    return {name: float(m.loss_normalizer) for name, m in model.named_modules() if "loss_normalizer" in vars(m)}


def set_loss_normalizers(model: nn.Module, values: dict[str, float]) -> None:
    modules = dict(model.named_modules())
    for name, value in values.items():
        modules[name].loss_normalizer = value


@contextlib.contextmanager
def preserved_loss_normalizers(model: nn.Module) -> Iterator[None]:
    """Leave them as they were, whatever losses are computed inside."""
    values = get_loss_normalizers(model)
    try:
        yield
    finally:
        set_loss_normalizers(model, values)
