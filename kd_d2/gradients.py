"""Gradients of losses and their norms, measured during training."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from .distributed import mean_across_ranks

LOSS_SCALES = (2.0**16, 2.0**8, 1.0)
"""Factors of a float16 loss before its gradient is computed: the first that does not overflow is used."""


def gradients_of(loss: Tensor, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Compute this process's gradients of a loss and retain the graph.

    They are zero for tensors that the loss does not depend on or that do not require a gradient, such as frozen levels.
    Under float16 autocast, the loss is scaled as by a gradient scaler, by the same factor in all processes. Gradients
    are in at least float32.
    """
    tensors = list(tensors)
    device = tensors[0].device.type
    in_float16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16
    with torch.autocast(device, enabled=False):
        for scale in LOSS_SCALES if in_float16 else (1.0,):
            gradients = [torch.zeros_like(x) for x in tensors]
            differentiable = [i for i, x in enumerate(tensors) if x.requires_grad]
            if loss.requires_grad and differentiable:
                sources = [tensors[i] for i in differentiable]
                found = torch.autograd.grad(
                    loss * scale, sources, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for i, gradient in zip(differentiable, found, strict=True):
                    gradients[i] = gradient
            gradients = [x.to(torch.promote_types(x.dtype, torch.float32)) / scale for x in gradients]
            if scale == 1.0 or _are_finite(gradients):
                break
    return gradients


def _are_finite(gradients: list[Tensor]) -> bool:
    """Return whether the gradients of all processes are finite."""
    share = torch.stack([gradient.isfinite().all() for gradient in gradients]).all().float()
    return bool(mean_across_ranks(share) == 1)


def loss_gradient(loss: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Compute a loss's gradient in all parameters together (P,), averaged over processes; see `gradients_of`."""
    return mean_of_processes(gradients_of(loss, parameters))


def mean_of_processes(gradients: Iterable[Tensor]) -> Tensor:
    """Return all gradients concatenated (P,) and averaged over processes."""
    return mean_across_ranks(torch.cat([part.flatten() for part in gradients]))


def gradient_norm(loss: Tensor, parameters: Iterable[Tensor]) -> float:
    """Return the norm of `loss_gradient`."""
    return loss_gradient(loss, parameters).norm().item()


class LogAverages:
    """Moving averages of logarithms by key. The first 1 / (1 - momentum) values of a key count equally."""

    def __init__(self, momentum: float):
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; it must be at least 0 and below 1")
        self.momentum = momentum
        self._averages: dict[Hashable, tuple[float, int]] = {}  # mean, number of values

    def add(self, key: Hashable, value: float) -> None:
        mean, count = self._averages.get(key, (0.0, 0))
        momentum = min(self.momentum, count / (count + 1))
        self._averages[key] = momentum * mean + (1 - momentum) * math.log(value), count + 1

    def __contains__(self, key: Hashable) -> bool:
        return key in self._averages

    def values(self) -> dict[Any, float]:
        """Return the geometric mean of each key."""
        return {key: math.exp(mean) for key, (mean, _) in self._averages.items()}

    def state(self) -> list[tuple[Hashable, float, int]]:
        return [(key, *average) for key, average in self._averages.items()]

    def load(self, state: Iterable[tuple[Hashable, float, int]]) -> None:
        self._averages = {key: (mean, count) for key, mean, count in state}
