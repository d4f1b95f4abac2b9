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
from ..detectors import DetectorOutputs, DetectorSpec
from ..errors import UserError
from ..workers import mean_count_of_workers

LOG_PERIOD = 20  # iterations, the period of Detectron2's writers

DISTILLER_REGISTRY = Registry("DISTILLER")
DISTILLER_REGISTRY.__doc__ = """
Distillation methods by the name that MODEL.KD.DISTILLERS uses. Each is a `Distiller` class, called with
`(cfg, student: DetectorSpec, teacher: DetectorSpec)`.
"""


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
        if self.warmup == 0:
            return 1.0
        return min(1.0, (iteration - self.start + 1) / self.warmup)


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


def common_strides(student: DetectorSpec, teacher: DetectorSpec) -> list[int]:
    """Strides of the neck levels that both detectors have, ascending. Raises a UserError where there is none."""
    strides = sorted(student.shapes.keys() & teacher.shapes.keys())
    if not strides:
        raise UserError(
            f"The student ({student.name}, strides {sorted(student.shapes)}) and the teacher ({teacher.name}, strides "
            f"{sorted(teacher.shapes)}) have no feature level of the same stride."
        )
    return strides


def check_same_anchors(method: str, student: DetectorSpec, teacher: DetectorSpec) -> None:
    """Raise a UserError unless both detectors predict at the same anchors or points of the same levels."""

    def anchors_of(spec: DetectorSpec) -> dict[int, list[list[float]]]:
        return {stride: anchors.tolist() for stride, anchors in sorted((spec.cell_anchors or {}).items())}

    ours, theirs = anchors_of(student), anchors_of(teacher)
    if ours.keys() != theirs.keys():
        raise UserError(
            f"{method} compares predictions anchor by anchor, but the student ({student.name}) predicts at the strides "
            f"{list(ours)} and the teacher ({teacher.name}) at {list(theirs)}."
        )
    for stride, anchors in ours.items():
        if anchors != theirs[stride]:
            raise UserError(
                f"{method} compares predictions anchor by anchor, but at stride {stride} the student ({student.name}) has "
                f"{_describe(anchors)} and the teacher ({teacher.name}) {_describe(theirs[stride])}."
            )


def _describe(anchors: list[list[float]]) -> str:
    x1, y1, x2, y2 = anchors[0]
    sides = f"{x2 - x1:.4g}x{y2 - y1:.4g} pixels around ({(x1 + x2) / 2:.4g}, {(y1 + y2) / 2:.4g})"
    return f"{len(anchors)} anchors a position, the first of {sides}" if len(anchors) > 1 else f"one anchor of {sides}"


def levels_by_stride(features: dict[int, Tensor], strides: Iterable[int], whose: str) -> list[Tensor]:
    """The feature maps of the given strides. Raises where one was not captured."""
    missing = [s for s in strides if s not in features]
    if missing:
        raise RuntimeError(
            f"the {whose}'s features of stride {missing} were not captured; there are {sorted(features)}"
        )
    return [features[s] for s in strides]


ADAPTATION_KERNELS = {"none": 0, "1x1": 1, "3x3": 3}


class AdaptationLayers(nn.Module):
    """What brings the student's features to the teacher's channels: one convolution a level, or nothing.

    Args:
        channels: by stride the student's and the teacher's channels.
        kernel_size: side of the convolution; 0 for the identity.
    """

    def __init__(self, channels: dict[int, tuple[int, int]], kernel_size: int):
        super().__init__()
        self.strides = tuple(channels)
        self.layers = nn.ModuleDict()
        if kernel_size:
            for stride, (student, teacher) in channels.items():
                self.layers[str(stride)] = nn.Conv2d(student, teacher, kernel_size, padding=kernel_size // 2)

    @classmethod
    def from_node(cls, node_name: str, node: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> AdaptationLayers:
        """The layers that `node.ADAPTATION` asks for, at every stride that both detectors have.

        None asks for 1x1 where the channels differ, and for nothing where they agree.

        Raises:
            UserError: no common stride, or no adaptation and different channels.
        """
        channels = {
            stride: (student.shapes[stride].channels, teacher.shapes[stride].channels)
            for stride in common_strides(student, teacher)
        }
        needed = "none" if all(ours == theirs for ours, theirs in channels.values()) else "1x1"
        kernel_size = ADAPTATION_KERNELS[node.ADAPTATION or needed]
        for stride, (ours, theirs) in channels.items():
            if not kernel_size and ours != theirs:
                raise UserError(
                    f"MODEL.KD.{node_name}.ADAPTATION is 'none', but at stride {stride} the student has {ours} channels "
                    f"and the teacher {theirs}: set it to '1x1'."
                )
        return cls(channels, kernel_size)

    def pairs(self, student: DetectorOutputs, teacher: DetectorOutputs) -> list[tuple[Tensor, Tensor]]:
        """By level the student's adapted and the teacher's feature map, (B, C_teacher, H, W) each."""
        student_maps = self(levels_by_stride(student.features, self.strides, "student"))
        return list(zip(student_maps, levels_by_stride(teacher.features, self.strides, "teacher"), strict=True))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """(B, C_student, H, W) per level, in order of `strides`, to (B, C_teacher, H, W)."""
        if not self.layers:
            return features
        return [self.layers[str(s)](x) for s, x in zip(self.strides, features, strict=True)]


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
    """The mean over workers of the number of rows, as a divisor: see `mean_count_of_workers`."""
    return mean_count_of_workers(rows.new_tensor(len(rows), dtype=torch.float32))


def in_float32(function):
    """Run a loss in float32 outside autocast: decorate functions and methods of tensors."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        device = next(a for a in args if isinstance(a, Tensor)).device.type
        args = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapper
