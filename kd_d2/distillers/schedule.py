"""Schedule of a method during training."""

from __future__ import annotations

from dataclasses import dataclass

from detectron2.config import CfgNode


@dataclass(frozen=True)
class Schedule:
    """Iterations in which a distiller is active, from `start` to before `end`, with a linear warm-up of its weight.

    Attributes:
        start: first iteration.
        warmup: iterations over which the factor increases linearly; it reaches 1 in the last of them.
        end: first iteration after the method ends; None for no end.
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
        """Return the factor of the distiller's losses at `iteration`, in [0, 1]."""
        if not self.is_active(iteration):
            return 0.0
        return min(1.0, (iteration - self.start + 1) / max(1, self.warmup))
