"""Per-process training state: random states, loss normalizers of dense detectors, and the state of methods."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import nn

from ..checkpoint import copy_to_cpu
from ..meta_arch import KDMetaArch, student_of
from ..random_state import get_random_state, set_random_state


def get_rank_state(model: nn.Module) -> dict[str, Any]:
    """Return the state of this process: of a KDMetaArch, that of its student and of its distillers."""
    state = {"random": get_random_state(), "normalizers": get_loss_normalizers(student_of(model))}
    if isinstance(model, KDMetaArch) and comm.get_rank() > 0:  # that of rank 0 is the checkpoint's entry "distillers"
        state["distillers"] = _state_beside_parameters(model.distillers)
    return state


def set_rank_state(model: nn.Module, states: list[dict[str, Any]], seed: int) -> None:
    """Restore the state of this process, except that of the distillers.

    Args:
        states: states of the previous processes, in order of rank. A process without one takes the loss normalizers of
            rank 0, and seeds its random numbers from `seed`.
    """
    own = own_state(states)
    set_loss_normalizers(student_of(model), (own or states[0])["normalizers"])
    if own:
        set_random_state(own["random"])
    else:
        seed_all_rng((seed + comm.get_rank()) % 2**31)


def own_state(states: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return this process's state among those of the previous processes, in order of rank, or None."""
    rank = comm.get_rank()
    return states[rank] if rank < len(states) else None


def set_distiller_state(distillers: nn.Module, own: dict[str, Any] | None) -> None:
    """Restore this process's state of the distillers, if it has one of its own."""
    if own:
        distillers.load_state_dict({**distillers.state_dict(), **own})


def _state_beside_parameters(module: nn.Module) -> dict[str, Any]:
    """Return a copy of buffers and other state, which may differ between processes."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return copy_to_cpu({name: value for name, value in module.state_dict().items() if name not in parameters})


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
