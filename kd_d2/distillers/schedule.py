"""When a method takes part in a training."""

from __future__ import annotations

from dataclasses import dataclass

from detectron2.config import CfgNode


@dataclass(frozen=True)
class Schedule:
    """When a distiller takes part: from `start` until before `end`, with a linear warm-up of its weight.

    Attributes:
        start: first iteration.
        warmup: iterations over which the factor grows linearly; it reaches 1 in the last of them.
        end: the first iteration without it; None for never.
    """

    start: int = 0
    warmup: int = 0
    end: int | None = None

    @classmethod
    def from_node(cls, node: CfgNode) -> Schedule:
        return cls(node.START_ITER, node.WARMUP_ITERS, node.END_ITER)

    def is_active(self, iteration: int) -> bool:
        return self.start <= iteration and (self.end is None or iteration < self.end)

    def factor(self, iteration: int) -> float:
        """What the distiller's losses are multiplied by at `iteration`: in [0, 1]."""
        if not self.is_active(iteration):
            return 0.0
        return min(1.0, (iteration - self.start + 1) / max(1, self.warmup))
