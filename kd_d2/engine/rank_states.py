"""What each process of a training has of its own: random numbers, and the running loss normalizers that dense detectors keep outside
their state_dict."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import nn

from ..random_state import get_random_state, set_random_state


def get_rank_state(model: nn.Module) -> dict[str, Any]:
    """Of this process."""
    return {"random": get_random_state(), "normalizers": get_loss_normalizers(model)}


def set_rank_state(model: nn.Module, states: list[dict[str, Any]], seed: int) -> None:
    """Give this process its own state again.

    Args:
        states: of the processes that there were, in order of rank. A process without one takes the first's normalizers, and
            random numbers from `seed`.
    """
    rank = comm.get_rank()
    own = states[rank] if rank < len(states) else None
    set_loss_normalizers(model, (own or states[0])["normalizers"])
    if own:
        set_random_state(own["random"])
    else:
        seed_all_rng((seed + rank) % 2**31)


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
