"""One training iteration: forward, backward, check of the losses, and optimizer steps."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError
from ..memory_format import narrow_maps_in_float32
from ..meta_arch import KDMetaArch
from .optimizers import AuxiliaryOptimizer


class NonFiniteLossError(UserError, FloatingPointError):
    """A loss is infinite or NaN. It has not changed any parameter; none has changed yet `in_first_iteration`."""

    def __init__(self, message: str, *, in_first_iteration: bool = False):
        super().__init__(message)
        self.in_first_iteration = in_first_iteration


class DistillationStep(SimpleTrainer):
    """Detectron2's SimpleTrainer with several optimizers, and mixed precision on any device.

    Args:
        model: a KDMetaArch or a plain detector, wrapped in DistributedDataParallel if there are several processes.
        optimizer: the student's optimizer.
        auxiliary: auxiliary optimizers by name.
        autocast: dtype of mixed precision, with gradient scaling for float16; None for float32.
        accumulation_steps: number of parts of a batch that are processed one after another. Loss normalizers and batch
            norm statistics are those of each part.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        auxiliary: dict[str, AuxiliaryOptimizer],
        autocast: torch.dtype | None = None,
        accumulation_steps: int = 1,
    ):
        super().__init__(model, data_loader=None, optimizer=optimizer)
        self.auxiliary = auxiliary
        self.autocast = autocast
        self.accumulation_steps = accumulation_steps
        self.device_type = next(model.parameters()).device.type
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=autocast is torch.float16)

    def run_step(self) -> None:
        if not self.model.training:
            raise RuntimeError("the model was left in eval mode")
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        self.optimizer.zero_grad()
        for other in self.auxiliary.values():
            other.optimizer.zero_grad()
        losses = self._accumulate(data)
        self._check_gradients()
        self.after_backward()
        self._record(losses, data_time)

        model = getattr(self.model, "module", self.model)
        if isinstance(model, KDMetaArch):
            for parameter in model.idle_parameters(self.iter):
                parameter.grad = None
        with _without_idle_parameters(self.optimizer):
            self.scaler.step(self.optimizer)
        for other in self.auxiliary.values():
            other.step(self.iter, self.scaler)
        self.scaler.update()

    def _accumulate(self, data: list[dict]) -> dict[str, Tensor]:
        """Run forward and backward on each part; return the mean losses. Only the last part synchronizes gradients."""
        size, rest = divmod(len(data), self.accumulation_steps)
        if rest or not size:
            raise UserError(
                f"SOLVER.GRADIENT_ACCUMULATION_STEPS is {self.accumulation_steps}, but a batch of the training data loader has "
                f"{len(data)} images per process; it must be a multiple of the steps."
            )
        total: dict[str, Tensor] = {}
        for start in range(0, len(data), size):
            is_last = start + size == len(data)
            exchanges = is_last or not isinstance(self.model, DistributedDataParallel)
            with contextlib.nullcontext() if exchanges else self.model.no_sync():
                with self._mixed_precision():
                    losses = _named_scalars(self.model(data[start : start + size]))
                self.scaler.scale(sum(losses.values()) / self.accumulation_steps).backward()
            for name, loss in losses.items():
                total[name] = total.get(name, 0) + loss.detach() / self.accumulation_steps
        return total

    def _check_gradients(self) -> None:
        """Raise a UserError if a parameter has no gradient, in which case DistributedDataParallel exchanges only some of them."""
        if not isinstance(self.model, DistributedDataParallel) or self.model.find_unused_parameters:
            return
        trained = [(name, p) for name, p in self.model.module.named_parameters() if p.requires_grad]
        unused = [name for name, parameter in trained if parameter.grad is None]
        if unused:
            more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            raise UserError(
                f"The parameters {unused[0]}{more} have no gradient, which only a training in one process allows: no loss depends on them. "
                "If they compute feature maps that the head does not read, add these to the IN_FEATURES of the head, or choose a "
                "MODEL.BACKBONE.NAME without them."
            )

    @contextlib.contextmanager
    def _mixed_precision(self) -> Iterator[None]:
        is_wrong_on_narrow_maps = self.device_type == "cpu" and self.autocast is torch.bfloat16
        with (
            torch.autocast(self.device_type, self.autocast, enabled=self.autocast is not None),
            narrow_maps_in_float32(self.model) if is_wrong_on_narrow_maps else contextlib.nullcontext(),
        ):
            yield

    def _record(self, losses: dict[str, Tensor], data_time: float) -> None:
        """Put all losses, averaged over processes, into the event storage; raise an error if one is not finite."""
        values = torch.stack([loss.float() for loss in losses.values()])
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(values)
            values /= comm.get_world_size()
        values = dict(zip(losses, values.tolist(), strict=True))
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"In iteration {self.iter} the loss {name} is {value}", in_first_iteration=self.iter == 0
                )
        storage = get_event_storage()
        storage.put_scalar("data_time", data_time)
        storage.put_scalar("total_loss", sum(values.values()))
        storage.put_scalars(**values)
        for name, other in self.auxiliary.items():
            storage.put_scalar(f"lr_{name}", other.lr(self.iter), smoothing_hint=False)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["auxiliary"] = {name: other.state_dict() for name, other in self.auxiliary.items()}
        state["scaler"] = self.scaler.state_dict()
        state["parameters"] = self._names_of_parameters()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        before, now = sorted(state["auxiliary"]), sorted(self.auxiliary)
        if before != now:
            raise UserError(
                f"--resume: the checkpoint has the state of {_described(before)}, and this training {_described(now)}; resume with the "
                "MODEL.KD.DISTILLERS and MODEL.KD.LAYER_LR that it was started with, or start from the checkpoint's weights "
                "(MODEL.WEIGHTS) in another OUTPUT_DIR."
            )
        self._restore_groups(state)
        self._check_parameters(state.get("parameters", self._names_of_parameters()))
        super().load_state_dict(state)
        for name, other in self.auxiliary.items():
            other.load_state_dict(state["auxiliary"][name])
        if state["scaler"]:  # empty if the training had no scaler
            self.scaler.load_state_dict(state["scaler"])

    def _names_of_parameters(self) -> list[str]:
        """Return the names of the trained parameters in the order of the optimizers' states."""
        model = getattr(self.model, "module", self.model)
        names = {parameter: name for name, parameter in model.named_parameters()}
        optimizers = [self.optimizer, *(other.optimizer for other in self.auxiliary.values())]
        return [names[p] for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]

    def _restore_groups(self, state: dict[str, Any]) -> None:
        """Group the main optimizer's parameters as in a checkpoint of the same parameters, whose weight decays are kept."""
        before, now = state.get("parameters", []), self._names_of_parameters()
        if sorted(before) != sorted(now) or _methods_of(before) != _methods_of(now):
            return
        model = getattr(self.model, "module", self.model)
        parameters = iter([model.get_parameter(name) for name in before])
        self.optimizer.param_groups[:] = [
            {**group, "params": [*itertools.islice(parameters, len(group["params"]))]}
            for group in state["optimizer"]["param_groups"]
        ]

    def _check_parameters(self, before: list[str]) -> None:
        """Raise an error unless the checkpoint has the states of the same parameters, in the same order."""
        now = self._names_of_parameters()
        if before == now:
            return
        own_before, own_now = ([n for n in names if not n.startswith("distillers.")] for names in (before, now))
        if own_before != own_now:
            raise ValueError("it trained other parameters of the student")
        methods = ", now ".join(", ".join(_methods_of(names)) or "none" for names in (before, now))
        raise UserError(
            f"--resume: the layers that methods add are not those of the checkpoint (methods with layers: {methods}); resume with the methods "
            "and settings that it was started with, in the same order, or start from the checkpoint's weights (MODEL.WEIGHTS) in another "
            "OUTPUT_DIR."
        )


@contextlib.contextmanager
def _without_idle_parameters(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Context in which an optimizer has only parameters with a gradient: clipping by value fails for others."""
    params = [group["params"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p.grad is not None]
        yield
    finally:
        for group, own in zip(optimizer.param_groups, params, strict=True):
            group["params"] = own


def _named_scalars(losses: dict[str, Tensor] | Tensor) -> dict[str, Tensor]:
    """Return a model's losses by name, without dimensions; like Detectron2's trainer, also from one tensor or (1,)."""
    named = {"loss": losses} if isinstance(losses, Tensor) else losses
    return {name: loss.reshape(()) for name, loss in named.items()}


def _methods_of(names: list[str]) -> list[str]:
    """Return the distillers whose layers have these names, in this order."""
    return list(dict.fromkeys(name.split(".")[1] for name in names if name.startswith("distillers.")))


def _described(optimizers: list[str]) -> str:
    return f"the separate optimizers {', '.join(optimizers)}" if optimizers else "no separate optimizer"
