"""GradientBalance: multipliers that keep each distiller's gradient at its share relative to the detection losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor, nn

from .errors import UserError
from .gradients import LogAverages, gradient_norm, gradients_of, mean_of_processes
from .inheritance import bottom_up_of, component_of
from .level_balance import LevelBalance


class GradientBalance:
    """Scales distillation losses so that their gradients have chosen norms relative to the detection losses.

    The gradient ratio of a distiller is the gradient norm of its losses, except auxiliary ones, divided by that of the
    detection losses, in the parameters of the student's neck (`shared_parameters`), which all losses reach. As in
    GradNorm (Chen et al. 2018), these are the last that all losses share; unlike in GradNorm, nothing is learned. The
    multiplier of a distiller is `target * share / ratio`: the shares of the active distillers sum to 1, and the ratio
    is a moving average of its logarithm over measurements.

    Attributes:
        levels: spreads each distiller's gradient over the levels of the neck; None to disable.
        ratios: averaged gradient ratios by distiller, without those that have had no gradient yet.
        last_multipliers: last result of `multipliers`, by active distiller.
    """

    def __init__(
        self,
        *,
        target: float,
        period: int = 20,
        momentum: float = 0.9,
        limit: float = 100000.0,
        weights: Mapping[str, float] | None = None,
        levels: LevelBalance | None = None,
        loss_weights: Mapping[str, float] | None = None,
    ):
        """
        Args:
            target: sum of the gradient ratios of all active distillers.
            period: iterations between measurements. Within the first `period` iterations, there are more: in the
                iterations 0, 1, 2, 4, 8, ...
            momentum: averaging factor in [0, 1). The first 1 / (1 - momentum) measurements count equally.
            limit: multipliers are at least 1 / limit and at most limit.
            weights: by distiller, what its share is proportional to, at least 0; 1 if it is not named.
            levels: see the attribute.
            loss_weights: by distiller, the factor that its losses contain (`Distiller.weight`). A training resumed with
                another one corrects the averaged ratios for it, if both are above 0; those not named are not corrected.

        Raises:
            ValueError: a value is out of range.
        """
        for name, value, holds, words in (
            ("target", target, target > 0, "above 0"),
            ("period", period, period >= 1, "at least 1"),
            ("limit", limit, limit >= 1, "at least 1"),
            *((f"weight of {name}", weight, weight >= 0, "at least 0") for name, weight in (weights or {}).items()),
        ):
            if not holds:
                raise ValueError(f"{name} is {value}; it must be {words}")
        self.target = target
        self.period = period
        self.momentum = momentum
        self.levels = levels
        self.limit = limit
        self.weights = dict(weights or {})
        self.last_multipliers: dict[str, float] = {}
        self._averages = LogAverages(momentum)
        self._loss_weights = {name: weight for name, weight in (loss_weights or {}).items() if weight > 0}
        self._last_iteration: int | None = None

    @classmethod
    def from_node(
        cls, node: CfgNode, weights: Mapping[str, float], loss_weights: Mapping[str, float] | None = None
    ) -> GradientBalance | None:
        """Build the balance from MODEL.KD.BALANCE; None if it is disabled. Other arguments as for the constructor."""
        if not node.ENABLED:
            return None
        levels = LevelBalance(node.MOMENTUM) if node.LEVELS else None
        return cls(
            target=node.TARGET,
            period=node.PERIOD,
            momentum=node.MOMENTUM,
            limit=node.LIMIT,
            weights=weights,
            levels=levels,
            loss_weights=loss_weights,
        )

    @property
    def ratios(self) -> dict[str, float]:
        return self._averages.values()

    def multipliers(
        self,
        iteration: int,
        parameters: list[nn.Parameter],
        own_loss: Tensor,
        losses: Mapping[str, Tensor],
        features: Mapping[int, Tensor] | None = None,
    ) -> dict[str, float]:
        """Return the multiplier of each active distiller, after a measurement if one is due.

        All processes of a training must call this with the same names in the same order; they get the same values. The
        multiplier of a distiller that has had no gradient yet, or whose weight is 0, is 1.

        Args:
            iteration: training iteration. Only the first call in an iteration measures (gradient accumulation).
            parameters: see `shared_parameters`.
            own_loss: sum of the detection losses.
            losses: by active distiller, the sum of its losses except auxiliary ones, before any schedule.
            features: the student's neck outputs by stride; needed with `levels`, otherwise not used.

        Raises:
            ValueError: there are `levels`, but no features.
        """
        if self.levels and features is None:
            raise ValueError("features is None; with levels it must be the student's neck outputs by stride")
        weights = {name: self.weights.get(name, 1.0) for name in losses}
        if iteration != self._last_iteration:
            self._last_iteration = iteration
            is_due = self._is_due(iteration)
            due = {n: loss for n, loss in losses.items() if weights[n] > 0 and (is_due or n not in self._averages)}
            if due:
                self._measure(parameters, own_loss, due, features)
        total, ratios = sum(weights.values()), self.ratios
        self.last_multipliers = {
            name: self._bounded(self.target * weight / total / ratios[name]) if weight and name in ratios else 1.0
            for name, weight in weights.items()
        }
        return self.last_multipliers

    def _bounded(self, multiplier: float) -> float:
        return min(max(multiplier, 1 / self.limit), self.limit)

    def _is_due(self, iteration: int) -> bool:
        if iteration < self.period:
            return iteration & (iteration - 1) == 0  # 0 and the powers of two
        return iteration % self.period == 0

    def _measure(
        self,
        parameters: list[nn.Parameter],
        own_loss: Tensor,
        losses: Mapping[str, Tensor],
        features: Mapping[int, Tensor] | None,
    ) -> None:
        norms = {name: gradient_norm(loss, parameters) for name, loss in losses.items()}
        if not any(norms.values()):  # as in every iteration before a method's first gradient
            return
        outputs = features if self.levels else {}
        gradients = gradients_of(own_loss, [*parameters, *outputs.values()])
        own = mean_of_processes(gradients[: len(parameters)]).norm().item()
        if self.levels:
            self.levels.measure(dict(zip(outputs, gradients[len(parameters) :], strict=True)), losses, outputs)
            norms = {name: gradient_norm(loss, parameters) for name, loss in losses.items()}
        for name, norm in norms.items():
            if 0 < norm < math.inf and 0 < own < math.inf:
                self._averages.add(name, norm / own)

    def state_dict(self) -> dict[str, Any]:
        averages = {name: [mean, count] for name, mean, count in self._averages.state()}
        state = {"averages": averages, "loss_weights": dict(self._loss_weights)}
        return state | ({"levels": self.levels.state_dict()} if self.levels else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        measured_with = state.get("loss_weights", {})  # absent from older checkpoints
        changes = {name: weight / measured_with.get(name, weight) for name, weight in self._loss_weights.items()}
        self._averages.load(
            (name, mean + math.log(changes.get(name, 1.0)), count) for name, (mean, count) in state["averages"].items()
        )
        self._loss_weights = measured_with | self._loss_weights
        if self.levels and "levels" in state:
            self.levels.load_state_dict(state["levels"])


def shared_parameters(student: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters of a detector's neck, or of its whole backbone if the neck has none.

    Raises:
        UserError: the backbone has no trainable parameters.
    """
    trained = {f"backbone.{n}": p for n, p in student.backbone.named_parameters() if p.requires_grad}
    if not trained:
        raise UserError(
            "The student's backbone is fully frozen (MODEL.BACKBONE.FREEZE_AT), so there is no gradient to measure."
        )
    bottom_up = bottom_up_of(student)
    neck = [p for name, p in trained.items() if component_of(name, bottom_up) == "neck"]
    return neck or list(trained.values())
