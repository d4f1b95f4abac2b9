"""The contract of a distillation method, and what all methods share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from .. import errors
from ..adapters import DetectorOutputs, DetectorSpec
from ..distributed import mean_count_across_ranks
from ..errors import UserError

LOG_PERIOD = 20  # iterations, the period of Detectron2's writers

DISTILLER_REGISTRY = Registry("DISTILLER")
DISTILLER_REGISTRY.__doc__ = """
Distillation methods by the name that MODEL.KD.DISTILLERS uses. Each is a `Distiller` class, called with
`(cfg, student: DetectorSpec, teacher: DetectorSpec)`.
"""


@dataclass(frozen=True)
class OptimizerSettings:
    """An optimiser beside the student's.

    Attributes:
        name: for the log ("lr_<name>") and the checkpoint.
        lr: peak learning rate; linear warm-up, then a cosine to zero at the last iteration.
        clip_norm: limit of the gradient norm over all its parameters together; infinite for none.
    """

    name: str
    lr: float
    weight_decay: float = 0.0
    warmup_iters: int = 0
    clip_norm: float = math.inf


@dataclass
class ParamGroup:
    """Parameters of a distiller and who optimises them: None is the student's own optimiser."""

    params: list[nn.Parameter]
    optimizer: OptimizerSettings | None = None


class Distiller(nn.Module):
    """A distillation method.

    Class attributes:
        needs: what `forward` reads of the student: a subset of what `DetectorSpec.provides` may name. An instance may need more, where
            its keys say so.
        alternative_needs: what it can read in place of `needs`; which of them, an instance says in its own `needs`.
        loss_names: exactly the keys that `forward` returns, each `loss_<something>`; `loss_<something>_aux_<...>` is an
            auxiliary loss, which trains the method's own parameters and is never scaled by the schedule.
        CONFIG_NODE: the method's node under MODEL.KD.
        default_weight: the default of the node's WEIGHT.
        resizes: whether `forward` takes maps of one stride whose sizes differ.
    """

    needs: ClassVar[frozenset[str]]
    alternative_needs: ClassVar[frozenset[str] | None] = None
    loss_names: ClassVar[tuple[str, ...]]
    CONFIG_NODE: ClassVar[str]
    default_weight: ClassVar[float] = 1.0
    resizes: ClassVar[bool] = False

    @classmethod
    def needs_of(cls, student: DetectorSpec) -> frozenset[str]:
        """`needs`, or `alternative_needs` where the student provides these alone."""
        other = cls.alternative_needs
        is_other = other is not None and other <= student.provides and not cls.needs <= student.provides
        return other if is_other else cls.needs

    @classmethod
    def weight_default(cls, node: CfgNode, student: DetectorSpec) -> float:
        """The WEIGHT that None stands for, which may depend on the student's family and on the method's other keys."""
        return cls.default_weight

    @classmethod
    def weight_of(cls, node: CfgNode, student: DetectorSpec) -> float:
        """The node's WEIGHT, or its default where that is None."""
        return cls.weight_default(node, student) if node.WEIGHT is None else node.WEIGHT

    @classmethod
    def relative_weight(cls, node: CfgNode, student: DetectorSpec) -> float:
        """The node's WEIGHT over its default."""
        return cls.weight_of(node, student) / cls.weight_default(node, student)

    @property
    def needs_of_teacher(self) -> frozenset[str]:
        """What `forward` reads of the teacher, where it is less than of the student a class attribute."""
        return self.needs - {"targets"}

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        """Add the method's own keys to its node, which has WEIGHT, START_ITER, WARMUP_ITERS and END_ITER already."""

    @classmethod
    def validate_config(cls, node: CfgNode) -> None:
        """Raise a UserError that names the key when a value of the method's own keys makes no sense."""

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> dict:
        """The arguments of `__init__`, for `@configurable`. Raises a UserError where the pair cannot be distilled."""
        raise NotImplementedError

    def forward(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[str, Tensor]:
        """The losses, each times its WEIGHT.

        Args:
            student, teacher: what `needs` names is there; the student's tensors carry gradients.
            targets: ground truth per image with `gt_boxes` in input pixels and `gt_classes`.
        """
        raise NotImplementedError

    @torch.enable_grad()
    def loss_maps(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[int, Tensor]:
        """Where on the student's neck the method acts: by stride (B, H, W).

        Here how hard it pulls: the length, over channels, of the gradient of its losses but the auxiliary ones. Levels that no
        loss reaches are zero. A method whose loss is a mean over positions may tell the loss itself.
        """
        losses = self(student, teacher, targets)
        loss = sum(value for name, value in losses.items() if not is_auxiliary(name))
        maps = {stride: torch.zeros_like(level[:, 0]) for stride, level in student.features.items()}
        if loss.requires_grad:
            pulls = torch.autograd.grad(loss, list(student.features.values()), allow_unused=True)
            maps |= {stride: pull.norm(dim=1) for stride, pull in zip(maps, pulls) if pull is not None}
        return maps

    def param_groups(self, cfg: CfgNode) -> list[ParamGroup]:
        """Which optimiser trains which of the distiller's own parameters."""
        return [ParamGroup(list(self.parameters()))]

    def idle_losses(self, like: Tensor) -> dict[str, Tensor]:
        """Zeros that keep the distiller's parameters in the graph, for iterations outside its schedule."""
        zero = like.new_zeros(()) + sum(p.sum() * 0.0 for p in self.parameters())
        return dict.fromkeys(self.loss_names, zero)


def is_auxiliary(loss_name: str) -> bool:
    """Whether a loss trains the method's own parameters alone."""
    return "_aux_" in loss_name


def check_choice(node_name: str, key: str, value: object, choices: Iterable[str]) -> None:
    """Raise a UserError unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"MODEL.KD.{node_name}.{key} is {value!r}; it must be one of {', '.join(map(repr, choices))}.")


def check_number(node_name: str, key: str, value: object, minimum: float, *, exclusive: bool = False) -> None:
    """Raise a UserError unless `value` is a finite number of at least (or, exclusive, above) `minimum`."""
    errors.check_number(f"MODEL.KD.{node_name}.{key}", value, minimum, exclusive=exclusive)


def log_scalar(name: str, value: Callable[[], Tensor]) -> None:
    """Note a number to be looked at as `kd/<name>`, in the iterations that Detectron2's writers write (every 20th).

    Only there is it computed and read, since reading it makes a GPU wait.
    """
    storage = get_event_storage()
    if (storage.iter + 1) % LOG_PERIOD == 0:
        storage.put_scalar(f"kd/{name}", value().item(), smoothing_hint=False)


def count_of(rows: Tensor) -> Tensor:
    """The mean across ranks of the number of rows, as a divisor: see `mean_count_across_ranks`."""
    return mean_count_across_ranks(rows.new_tensor(len(rows), dtype=torch.float32))


def in_float32(function):
    """Run a loss in float32 outside autocast: decorate functions and methods of tensors."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        device = next(a for a in args if isinstance(a, Tensor)).device.type
        args = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapper
