"""The contract of a distillation method, and what all methods share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..adapters import DetectorOutputs
from ..distributed import mean_count_across_ranks
from ..errors import UserError
from ..keys import AtLeast, Keys, keys_of
from .pair import Pair

LOG_PERIOD = 20  # iterations, the period of Detectron2's writers

Losses = dict[str, Tensor]
"""Losses by name, scalars."""

Weight = Annotated[float, AtLeast(0), "What the method's losses are multiplied by."]
"""The type of the key WEIGHT."""


@dataclass(frozen=True)
class OptimizerSettings:
    """An optimizer beside the student's.

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
    """Parameters of a distiller and who optimizes them: None is the student's own optimizer."""

    params: list[nn.Parameter]
    optimizer: OptimizerSettings | None = None


class Distiller(nn.Module):
    """A distillation method.

    Class attributes, the first three of which an instance may set anew in its `__init__`:
        needs: what `forward` reads of the student: a subset of what `DetectorSpec.provides` may name.
        loss_names: exactly the keys of the losses that `forward` returns, each `loss_<something>`.
        aux_loss_names: those of `loss_names` that train the method's own parameters alone: neither weight nor schedule scales them.
        alternative_needs: what an instance needs in place of `needs` where the student provides these alone.
        CONFIG_NODE: name of the method's node under MODEL.KD.
        resizes: whether `forward` takes maps of one stride whose sizes differ.

    Attributes:
        config: the values of the method's keys.
        weight: what the losses are multiplied by, but the auxiliary ones; `forward` leaves it out.
        relative_weight: the weight over its default; 1 where that is 0.
    """

    needs: frozenset[str]
    loss_names: tuple[str, ...]
    aux_loss_names: tuple[str, ...] = ()
    alternative_needs: frozenset[str] | None = None
    CONFIG_NODE: ClassVar[str]
    resizes: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Config(Keys):
        """The keys that all methods have. A method states its own in a subclass of the same name, a dataclass again."""

        weight: Weight = 1.0
        start_iter: Annotated[int, AtLeast(0), "First iteration in which the method takes part."] = 0
        warmup_iters: Annotated[
            int, AtLeast(0), "Iterations, from START_ITER on, over which the weight grows linearly."
        ] = 0
        end_iter: Annotated[int | None, "First iteration without the method; None for no end."] = None

    def __init_subclass__(cls, **arguments: Any):
        super().__init_subclass__(**arguments)
        old = [name for name in ("add_config", "validate_config", "from_config", "default_weight") if name in vars(cls)]
        if old:
            raise UserError(
                f"The method {cls.__name__} defines {' and '.join(old)}, which kd_d2 no longer calls since 0.2: declare its keys in a "
                "dataclass `Config(Distiller.Config)` inside the class, construct it in `__init__(self, config, pair)`, where "
                "`super().__init__` takes a `default_weight`, and return unweighted losses from `forward` (docs/guides/own-method.md)."
            )
        keys_of(cls.Config)

    def __init__(self, config: Config, pair: Pair, default_weight: float | None = None):
        """
        Args:
            config: the values of the method's keys.
            pair: what the method is built for.
            default_weight: the weight where the key WEIGHT is None, for methods whose default depends on the pair or on other keys.

        Raises:
            UserError: the pair cannot be distilled with these values.
        """
        super().__init__()
        self.config = config
        default = self.Config.weight if default_weight is None else default_weight
        self.weight = default if config.weight is None else config.weight
        self.relative_weight = self.weight / default if default else 1.0
        other = self.alternative_needs
        if other is not None and other <= pair.student.provides and not self.needs <= pair.student.provides:
            self.needs = other

    def weigh_losses(self, *weights: float, optional: Collection[str]) -> dict[str, float]:
        """The weights of the losses by name, without optional losses of weight 0, which are also removed from `loss_names`.

        Args:
            weights: in the order of `loss_names`.
            optional: names of the losses that `forward` can skip.
        """
        by_name = dict(zip(self.loss_names, weights, strict=True))
        self.loss_names = tuple(name for name, weight in by_name.items() if weight or name not in optional)
        return {name: by_name[name] for name in self.loss_names}

    @property
    def needs_of_teacher(self) -> frozenset[str]:
        """What `forward` reads of the teacher."""
        return self.needs - {"targets"}

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        """The losses, without the method's weight.

        Args:
            student, teacher: what `needs` names is there; the student's tensors carry gradients.
            targets: ground truth per image with `gt_boxes` in input pixels and `gt_classes`.
        """
        raise NotImplementedError

    def total(self, losses: Losses) -> Tensor:
        """The sum of losses that `forward` returned, but the auxiliary ones, times the weight."""
        return self.weight * sum(loss for name, loss in losses.items() if name not in self.aux_loss_names)

    def scaled(self, losses: Losses, factor: float = 1.0) -> Losses:
        """Losses that `forward` returned times the weight and `factor`; the auxiliary ones as they are."""
        factor = factor * self.weight
        return {name: loss if name in self.aux_loss_names else factor * loss for name, loss in losses.items()}

    @torch.enable_grad()
    def loss_maps(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[int, Tensor]:
        """Where on the student's neck the method acts: by stride (B, H, W).

        By default the norm over channels of the gradient of its losses, except auxiliary ones; zero for levels without a
        gradient. A method whose loss is a mean over positions may return the loss itself.
        """
        loss = self.total(self(student, teacher, targets))
        maps = {stride: torch.zeros_like(level[:, 0]) for stride, level in student.features.items()}
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, list(student.features.values()), allow_unused=True)
            maps |= {stride: gradient.norm(dim=1) for stride, gradient in zip(maps, gradients) if gradient is not None}
        return maps

    def param_groups(self, cfg: CfgNode) -> list[ParamGroup]:
        """Which optimizer trains which of the distiller's own parameters."""
        return [ParamGroup(list(self.parameters()))]

    def idle_losses(self, like: Tensor) -> Losses:
        """Zeros that keep the distiller's parameters in the graph, for iterations outside its schedule."""
        zero = like.new_zeros(()) + sum(p.sum() * 0.0 for p in self.parameters())
        return dict.fromkeys(self.loss_names, zero)


class DistillerRegistry(Registry):
    """Refuses a method without a config node of its own."""

    def _do_register(self, name: str, method: type[Distiller]) -> None:
        node = getattr(method, "CONFIG_NODE", None)
        if node is None:
            raise UserError(f"The method {name} has no CONFIG_NODE, the name of its config node under MODEL.KD.")
        for other, registered in self:
            if node == registered.CONFIG_NODE:
                raise UserError(
                    f"The methods {other} and {name} have the same CONFIG_NODE {node!r}: rename one of them."
                )
        super()._do_register(name, method)


DISTILLER_REGISTRY = DistillerRegistry("DISTILLER")
DISTILLER_REGISTRY.__doc__ = """
Distillation methods by the name that MODEL.KD.DISTILLERS uses. Each is a `Distiller` class, called with `(config, pair)`: see
`build_distiller`.
"""


def build_distiller(cfg: CfgNode, name: str, pair: Pair) -> Distiller:
    """Build the method of a registered name for a pair of detectors, with the values of its node in the config.

    Raises:
        UserError: a value is wrong, or the pair cannot be distilled by the method.
    """
    method = DISTILLER_REGISTRY.get(name)
    node = f"MODEL.KD.{method.CONFIG_NODE}"
    return method(method.Config.read(cfg.MODEL.KD[method.CONFIG_NODE], node), pair)


def log_scalar(name: str, value: Callable[[], Tensor]) -> None:
    """Note a number to be looked at as `kd/<name>`, in the iterations that Detectron2's writers write (every 20th).

    Only there is it computed and read, since reading it makes a GPU wait.
    """
    storage = get_event_storage()
    if (storage.iter + 1) % LOG_PERIOD == 0:
        storage.put_scalar(f"kd/{name}", value().item(), smoothing_hint=False)


def count_of(rows: Tensor) -> Tensor:
    """The mean across ranks of the number of rows, as a divisor: see `mean_count_across_ranks`."""
    return mean_count_across_ranks(rows.new_full((), len(rows), dtype=torch.float32))


def in_float32(function):
    """Run a loss in float32 outside autocast: decorate functions and methods of tensors."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        device = next(a for a in args if isinstance(a, Tensor)).device.type
        args = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapper
