"""Base class, registry and helpers of distillation methods."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Set
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..adapters import CLASSIFIED_PARTS, DetectorOutputs
from ..errors import UserError
from ..extensions import HINT
from ..gradients import gradients_of
from ..keys import AtLeast, Keys, keys_of
from ..moved import explain_names
from .matching import in_words, without_adapter
from .pair import Pair

LOG_PERIOD = 20  # iterations, the period of Detectron2's writers

Losses = dict[str, Tensor]
"""Scalar losses by name."""

Weight = Annotated[float, AtLeast(0), "Weight of the method's losses."]
"""Type of the key WEIGHT."""


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of an optimizer separate from the student's.

    Attributes:
        name: name in the log ("lr_<name>") and in the checkpoint.
        lr: peak learning rate; linear warm-up, then cosine decay to zero.
        clip_norm: maximum gradient norm over all its parameters together; infinite for no clipping.
        eps: AdamW's epsilon; steps do not depend on the scale of gradients that are much larger.
        start_iter, end_iter: iterations at which warm-up and decay begin and end; None for the last iteration. The
            learning rate is zero from `end_iter` on.
    """

    name: str
    lr: float
    weight_decay: float = 0.0
    warmup_iters: int = 0
    clip_norm: float = math.inf
    eps: float = 1e-8
    start_iter: int = 0
    end_iter: int | None = None


@dataclass
class ParamGroup:
    """Parameters of a distiller and the optimizer that trains them; None for the student's optimizer."""

    params: list[nn.Parameter]
    optimizer: OptimizerSettings | None = None


class Distiller(nn.Module):
    """Base class of distillation methods.

    Class attributes; an instance may override the first three in its `__init__`:
        needs: student outputs that `forward` reads, a subset of those that `DetectorSpec.provides` can name.
        loss_names: exact keys of the losses that `forward` returns, each `loss_<something>`.
        aux_loss_names: losses that train only the method's own parameters: weight, warm-up and balance do not scale
            them. Outside its schedule, the whole method rests, including its parameters.
        alternative_needs: outputs read instead of `needs` if the student provides only these.
        CONFIG_NODE: name of the method's node under MODEL.KD.
        resizes: whether `forward` accepts student and teacher maps of different sizes at the same stride.

    Attributes:
        config: values of the method's keys.
        weight: factor of all losses except auxiliary ones; not applied by `forward`.
        relative_weight: weight divided by its default; 1 if the default is 0.
    """

    needs: frozenset[str]
    loss_names: tuple[str, ...]
    aux_loss_names: tuple[str, ...] = ()
    alternative_needs: frozenset[str] | None = None
    CONFIG_NODE: ClassVar[str]
    resizes: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Config(Keys):
        """Keys of all methods. A method adds its own in a nested dataclass `Config(Distiller.Config)`."""

        weight: Weight = 1.0
        start_iter: Annotated[int, AtLeast(0), "First iteration in which the method is active."] = 0
        warmup_iters: Annotated[
            int, AtLeast(0), "Iterations, starting at START_ITER, over which the weight increases linearly."
        ] = 0
        end_iter: Annotated[int | None, "First iteration after the method ends; None for no end."] = None

    def __init_subclass__(cls, **arguments: Any):
        super().__init_subclass__(**arguments)
        old = [name for name in ("add_config", "validate_config", "from_config", "default_weight") if name in vars(cls)]
        if old:
            raise UserError(
                f"The method {cls.__name__} defines {' and '.join(old)}, which kd_d2 no longer calls as of 0.2: declare its keys in a "
                "dataclass `Config(Distiller.Config)` inside the class, construct it in `__init__(self, config, pair)`, where "
                "`super().__init__` takes a `default_weight`, and return unweighted losses from `forward` (docs/guides/own-method.md)."
            )
        for name, kind, example in (
            ("needs", Set, '{"features"}'),
            ("alternative_needs", Set, '{"proposals"}'),
            ("loss_names", tuple | list, '("loss_mine",)'),
            ("aux_loss_names", tuple | list, '("loss_mine_aux",)'),
        ):
            value = vars(cls).get(name)
            if not (value is None or isinstance(value, kind) or hasattr(value, "__get__")):
                raise UserError(
                    f"The method {cls.__name__} has {name} = {value!r}, which is no {'set' if kind is Set else 'tuple'} of names, "
                    f"such as {example}."
                )
        if not issubclass(cls.Config, Distiller.Config):
            raise UserError(
                f"The Config of the method {cls.__name__} is not derived from Distiller.Config, which has the keys of all methods: "
                "declare it as `class Config(Distiller.Config)`."
            )
        if "get_extra_state" in vars(cls) and cls.set_extra_state is nn.Module.set_extra_state:
            raise UserError(
                f"The method {cls.__name__} defines get_extra_state without set_extra_state, so that no training could be resumed."
            )
        keys_of(cls.Config)

    def __init__(self, config: Config, pair: Pair, default_weight: float | None = None):
        """
        Args:
            config: values of the method's keys.
            pair: the detectors and training settings that the method is built for.
            default_weight: value if the key WEIGHT is None, for defaults that depend on the pair or on other keys.

        Raises:
            UserError: a value is invalid, or the pair cannot be distilled with these values.
        """
        super().__init__()
        config.validate(f"{type(self).__name__}.Config")
        self.config = config
        default = self.Config.weight if default_weight is None else default_weight
        self.weight = default if config.weight is None else config.weight
        self.relative_weight = self.weight / default if default else 1.0
        other = self.alternative_needs
        if other is not None and not self.needs <= pair.student.provides:
            if not other <= pair.student.provides:
                needs, others = (in_words(parts - pair.student.provides) for parts in (self.needs, other))
                raise UserError(
                    f"The distiller {type(self).__name__} needs {needs} or {others}, neither of which the student ({pair.student.name}) "
                    f"has{without_adapter(pair.student)}."
                )
            self.needs = other

    def weigh_losses(self, *weights: float, optional: Collection[str]) -> dict[str, float]:
        """Return the loss weights by name, without optional losses of weight 0, and remove these from `loss_names`.

        Args:
            weights: weights in the order of `loss_names`.
            optional: names of the losses that `forward` can skip.
        """
        by_name = dict(zip(self.loss_names, weights, strict=True))
        self.loss_names = tuple(name for name, weight in by_name.items() if weight or name not in optional)
        return {name: by_name[name] for name in self.loss_names}

    @property
    def needs_of_teacher(self) -> frozenset[str]:
        """Parts of the teacher's outputs that `forward` reads."""
        return self.needs - {"targets"}

    @property
    def compares_classes(self) -> bool:
        """Whether `forward` compares class predictions, so that the detectors must have the same classes."""
        return bool(self.needs_of_teacher & CLASSIFIED_PARTS)

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        """Compute the losses, without the method's weight.

        Args:
            student, teacher: outputs with the parts named in `needs`; the student's tensors are differentiable.
            targets: ground truth per image with `gt_boxes` in input pixels and `gt_classes`.
        """
        raise NotImplementedError

    def total(self, losses: Losses) -> Tensor:
        """Return the weighted sum of losses that `forward` returned, except auxiliary ones."""
        return torch.as_tensor(self.weight * sum(x for name, x in losses.items() if name not in self.aux_loss_names))

    def scaled(self, losses: Losses, factor: float = 1.0) -> Losses:
        """Multiply losses that `forward` returned by the weight and `factor`; auxiliary ones remain unchanged."""
        factor = factor * self.weight
        return {name: loss if name in self.aux_loss_names else factor * loss for name, loss in losses.items()}

    @torch.enable_grad()
    def loss_maps(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[int, Tensor]:
        """Compute where on the student's neck the method acts, as maps (B, H, W) by stride.

        By default, a map is the norm over channels of the gradient of the method's losses, except auxiliary ones; it is
        zero for levels without a gradient. A method whose loss is a mean over positions may return the loss itself.
        """
        loss = self.total(self(student, teacher, targets))
        gradients = gradients_of(loss, student.features.values())
        return {stride: gradient.norm(dim=1) for stride, gradient in zip(student.features, gradients, strict=True)}

    def param_groups(self, cfg: CfgNode) -> list[ParamGroup]:
        """Return the distiller's own parameters, grouped by the optimizer that trains them; MODEL.KD.LAYER_LR selects the default."""
        lr = cfg.MODEL.KD.LAYER_LR
        return [ParamGroup(list(self.parameters()), None if lr is None else OptimizerSettings("layers", lr, eps=1e-15))]

    def idle_losses(self, like: Tensor) -> Losses:
        """Return zeros with the distiller's parameters in their graph, in which losses of an iteration may lack them."""
        none_of_each = [p.unsqueeze(0)[:0].reshape(-1) for p in self.parameters()]  # views, whose sum needs one kernel
        return dict.fromkeys(self.loss_names, torch.cat([like.new_zeros(1), *none_of_each]).sum())


def _is_same_definition(new: type, old: type) -> bool:
    """Return whether a class replaces another one of its module, by a definition of the same name."""
    return (new.__module__, new.__qualname__) == (old.__module__, old.__qualname__)


class DistillerRegistry(Registry):
    """Registry that rejects methods without a name and a config node of their own; for an unknown name, the error lists the known ones."""

    def get(self, name: str) -> type[Distiller]:
        known = sorted(registered for registered, _ in self)
        if name not in known:
            raise UserError(
                f"MODEL.KD.DISTILLERS names the unknown method {name!r}; available: {', '.join(known)}; {HINT}."
            )
        return super().get(name)

    def _do_register(self, name: str, method: type[Distiller]) -> None:
        if not issubclass(method, Distiller):
            raise UserError(f"The method {name} is not derived from kd_d2.distillers.Distiller.")
        node = getattr(method, "CONFIG_NODE", None)
        if node is None:
            raise UserError(f"The method {name} has no CONFIG_NODE, the name of its config node under MODEL.KD.")
        if not re.fullmatch(r"[^\s.]+", node):
            raise UserError(
                f"The method {name} has the CONFIG_NODE {node!r}, which is not one word without dots, such as 'MINE'."
            )
        for other, registered in self:
            if other == name and _is_same_definition(method, registered):  # as in a notebook whose cell runs again
                self._obj_map[name] = method
                return
            if other == name and node != registered.CONFIG_NODE:
                raise UserError(
                    f"There are two methods with the name {name}, of {registered.__module__} and of {method.__module__}: rename one of them."
                )
            if node == registered.CONFIG_NODE:
                raise UserError(
                    f"The methods {other} and {name} have the same CONFIG_NODE {node!r}: rename one of them."
                )
        super()._do_register(name, method)


DISTILLER_REGISTRY = DistillerRegistry("DISTILLER")
DISTILLER_REGISTRY.__doc__ = """
Distillation methods by their names in MODEL.KD.DISTILLERS. Each is a `Distiller` class, called with `(config, pair)`; see
`build_distiller`.
"""


def build_distiller(cfg: CfgNode, name: str, pair: Pair) -> Distiller:
    """Build a registered method for a pair of detectors, with the values of its config node.

    Raises:
        UserError: a value is invalid, or the method cannot distill the pair.
    """
    method = DISTILLER_REGISTRY.get(name)
    node = f"MODEL.KD.{method.CONFIG_NODE}"
    return method(method.Config.read(cfg.MODEL.KD[method.CONFIG_NODE], node), pair)


def log_scalar(name: str, value: Callable[[], Tensor]) -> None:
    """Log a scalar as `kd/<name>` in the iterations in which Detectron2's writers write (every 20th).

    It is computed and read only in these iterations, since reading it synchronizes with the GPU.
    """
    storage = get_event_storage()
    if (storage.iter + 1) % LOG_PERIOD == 0:
        storage.put_scalar(f"kd/{name}", value().item(), smoothing_hint=False)


def in_float32(function):
    """Decorate a function or method so that it runs in float32 with autocast disabled.

    Tensors among its arguments are converted, also in lists, tuples and dicts; at least one is required.
    """

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        devices: list[str] = []
        args = _as_float32(args, devices)
        kwargs = _as_float32(kwargs, devices)
        if not devices:
            raise TypeError(f"{getattr(function, '__name__', function)} got no tensor to run in float32")
        with torch.autocast(devices[0], enabled=False):
            return function(*args, **kwargs)

    return wrapper


def _as_float32(value: Any, devices: list[str]) -> Any:
    """Convert tensors, and those in lists, tuples and dicts, and add the types of their devices to `devices`."""
    if isinstance(value, Tensor):
        devices.append(value.device.type)
        return value.float() if value.is_floating_point() else value
    if type(value) in (list, tuple):
        return type(value)([_as_float32(x, devices) for x in value])
    if type(value) is dict:
        return {name: _as_float32(x, devices) for name, x in value.items()}
    return value


__getattr__ = explain_names(__name__)
