"""LevelBalance: distribution of a distiller's gradient over neck levels like that of the detection losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .adapters import DetectorOutputs
from .distributed import mean_across_ranks
from .gradients import LogAverages, gradients_of

SMALLEST_SHARE = 1e-3
"""Norms of a level below this fraction of the largest are raised to it: they are rounding errors or uninformative."""


class LevelBalance:
    """Scales a distiller's gradient at each level of the student's outputs; the forward pass is unchanged.

    The gradient of many methods is almost entirely in the coarsest levels, where that of the detection losses is small.
    The factor of a level is proportional to the norm of the detection gradient over that of the distiller's, as moving
    averages over measurements. The total norm of a distiller's gradient is preserved; `GradientBalance` scales it.
    """

    def __init__(self, momentum: float):
        """
        Args:
            momentum: averaging factor in [0, 1). The first 1 / (1 - momentum) measurements count equally.

        Raises:
            ValueError: the momentum is out of range.
        """
        self._norms, self._own_norms = LogAverages(momentum), LogAverages(momentum)  # by distiller and stride
        self._gates: dict[str, dict[int, float]] = {}  # factors of the next backward pass, by distiller and stride

    def gated(self, name: str, outputs: DetectorOutputs) -> DetectorOutputs:
        """Return the student's outputs for a distiller, with gradients scaled in the backward pass.

        Proposals are not changed, because a box head pools features of several levels.
        """
        gates = self._gates[name] = dict.fromkeys(outputs.features, 1.0)
        self._set_gates(name)
        return outputs.with_levels(lambda levels: {s: _Gated.apply(level, gates, s) for s, level in levels.items()})

    def factors(self, name: str) -> dict[int, float]:
        """Return the factors by stride; empty before the first gradient of the distiller and of the detector."""
        norms = {stride: norm for (whose, stride), norm in self._norms.values().items() if whose == name}
        own = {stride: norm for (whose, stride), norm in self._own_norms.values().items() if whose == name}
        whole = math.hypot(*norms.values()) / math.hypot(*own.values()) if norms else 1.0
        return {stride: whole * own[stride] / norm for stride, norm in norms.items()}

    def measure(self, own: Mapping[int, Tensor], losses: Mapping[str, Tensor], features: Mapping[int, Tensor]) -> None:
        """Set the factors, including those for the backward pass of the given losses. The same on all processes.

        Args:
            own: by stride, the gradient of the detection losses in the neck output.
            losses: by distiller, the sum of its losses, computed from what `gated` returned.
            features: the student's neck outputs by stride.
        """
        own = _norms(own)
        for name, loss in losses.items():
            self._gates[name].update(dict.fromkeys(self._gates[name], 1.0))
            norms = _norms(dict(zip(features, gradients_of(loss, features.values()), strict=True)))
            if own and norms:
                for stride in norms:
                    self._norms.add((name, stride), norms[stride])
                    self._own_norms.add((name, stride), own[stride])
            self._set_gates(name)

    def _set_gates(self, name: str) -> None:
        for stride, factor in self.factors(name).items():
            if stride in self._gates[name]:
                self._gates[name][stride] = factor

    def state_dict(self) -> dict[str, Any]:
        return {
            name: [[*key, mean, count] for key, mean, count in averages.state()]
            for name, averages in (("norms", self._norms), ("own_norms", self._own_norms))
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for averages, rows in ((self._norms, state["norms"]), (self._own_norms, state["own_norms"])):
            averages.load(((name, stride), mean, count) for name, stride, mean, count in rows)


class _Gated(torch.autograd.Function):
    """The identity, with its gradient multiplied by the stride's factor at the time of the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, factors: Mapping[int, float], stride: int) -> Tensor:
        ctx.factors, ctx.stride = factors, stride
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.factors[ctx.stride], None, None


def _norms(gradients: Mapping[int, Tensor]) -> dict[int, float]:
    """Return norms over all processes' images, at least `SMALLEST_SHARE` of the largest.

    Empty if there is no gradient, or if it is not finite.
    """
    squares = torch.stack([gradient.square().sum() for gradient in gradients.values()])
    norms = mean_across_ranks(squares).sqrt().tolist()
    if not any(norms) or not all(map(math.isfinite, norms)):
        return {}
    return {stride: max(norm, SMALLEST_SHARE * max(norms)) for stride, norm in zip(gradients, norms, strict=True)}
