"""Per-process training state: random states, and the loss normalizers that are not in a dense detector's state_dict."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import nn

from ..random_state import get_random_state, set_random_state


def get_rank_state(model: nn.Module) -> dict[str, Any]:
    """Return the state of this process."""
    return {"random": get_random_state(), "normalizers": get_loss_normalizers(model)}


def set_rank_state(model: nn.Module, states: list[dict[str, Any]], seed: int) -> None:
    """Restore the state of this process.

    Args:
        states: states of the previous processes, in order of rank. A process without one takes the loss normalizers of
            rank 0, and seeds its random numbers from `seed`.
    """
    rank = comm.get_rank()
    own = states[rank] if rank < len(states) else None
    set_loss_normalizers(model, (own or states[0])["normalizers"])
    if own:
        set_random_state(own["random"])
    else:
        seed_all_rng((seed + rank) % 2**31)


def get_loss_normalizers(model: nn.Module) -> dict[str, float]:
    """Return the loss normalizers by module name; those of keypoint heads are strings, which do not change."""
    found = {name: vars(module).get("loss_normalizer") for name, module in model.named_modules()}
    return {name: float(value) for name, value in found.items() if value is not None and not isinstance(value, str)}


def set_loss_normalizers(model: nn.Module, values: dict[str, float]) -> None:
    modules = dict(model.named_modules())
    for name, value in values.items():
        modules[name].loss_normalizer = value


@contextlib.contextmanager
def preserved_loss_normalizers(model: nn.Module) -> Iterator[None]:
    """Restore the loss normalizers on exit, whatever losses are computed within this context."""
    values = get_loss_normalizers(model)
    try:
        yield
    finally:
        set_loss_normalizers(model, values)
