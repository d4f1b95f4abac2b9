"""The student's optimizer and the auxiliary optimizers of distillers."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer, get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.solver.lr_scheduler import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler
from torch import nn

from ..distillers import OptimizerSettings
from ..meta_arch import KDMetaArch


class AuxiliaryOptimizer:
    """AdamW for a distiller's own network, with its own learning rate, schedule and gradient clipping.

    Args:
        settings: the distiller's optimizer settings.
        params: the parameters to optimize.
        max_iter: length of the training in iterations, the end of the schedule unless the settings have one.
    """

    def __init__(self, settings: OptimizerSettings, params: list[nn.Parameter], max_iter: int):
        self.settings = settings
        self.params = params
        self.optimizer = torch.optim.AdamW(params, lr=settings.lr, weight_decay=settings.weight_decay, eps=settings.eps)
        end = max_iter if settings.end_iter is None else settings.end_iter
        self.length = max(1, end - settings.start_iter)
        self.multiplier = CosineParamScheduler(1.0, 0.0)
        if settings.warmup_iters:
            first, length = 1.0 / settings.warmup_iters, settings.warmup_iters / self.length
            self.multiplier = WarmupParamScheduler(self.multiplier, first, length, rescale_interval=True)

    def step(self, iteration: int, scaler: torch.amp.GradScaler) -> None:
        """Clip the total gradient norm of all parameters, and step with the learning rate of this iteration."""
        if all(p.grad is None for p in self.params):
            return
        self.optimizer.param_groups[0]["lr"] = self.lr(iteration)
        scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.params, self.settings.clip_norm)
        scaler.step(self.optimizer)

    def lr(self, iteration: int) -> float:
        """Return the learning rate of an iteration. It is stateless, so there is nothing to resume."""
        passed = (iteration - self.settings.start_iter) / self.length
        return self.settings.lr * self.multiplier(min(max(passed, 0.0), 1.0))

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


def _build_adamw(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build AdamW over Detectron2's parameter groups, with the weight decays of SOLVER for norms and biases."""
    params = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    )
    optimizer = torch.optim.AdamW(params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)
    return maybe_add_gradient_clipping(cfg, optimizer)


def build_main_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of SOLVER over all trained parameters of a model: Detectron2's SGD, or AdamW.

    SOLVER.WEIGHT_DECAY_NORM applies to normalization layers, and to the parameters that a module of the model returns
    from a method `parameters_without_weight_decay`, as `TimmNetwork` does; a SOLVER.WEIGHT_DECAY_BIAS to all biases.
    """
    optimizer = build_optimizer(cfg, model) if cfg.SOLVER.OPTIMIZER == "SGD" else _build_adamw(cfg, model)
    like_norms = {p for m in model.modules() for p in getattr(m, "parameters_without_weight_decay", set)()}
    if cfg.SOLVER.WEIGHT_DECAY_BIAS is not None:
        like_norms -= {p for name, p in model.named_parameters() if name.endswith(".bias")}
    _set_weight_decay(optimizer, like_norms, cfg.SOLVER.WEIGHT_DECAY_NORM)
    return optimizer


def _set_weight_decay(optimizer: torch.optim.Optimizer, parameters: set[nn.Parameter], weight_decay: float) -> None:
    """Move those of the parameters that have another weight decay to groups with this one."""
    for group in [*optimizer.param_groups]:
        moved = [p for p in group["params"] if p in parameters]
        if moved and group["weight_decay"] != weight_decay:
            group["params"] = [p for p in group["params"] if p not in parameters]
            optimizer.add_param_group({**group, "params": moved, "weight_decay": weight_decay})


def build_optimizers(
    cfg: CfgNode, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> tuple[torch.optim.Optimizer, dict[str, AuxiliaryOptimizer]]:
    """Build the main optimizer and the auxiliary optimizers of the distillers by name.

    Args:
        cfg: the config.
        model: a KDMetaArch or a plain detector.
        optimizer: the main optimizer, from which the parameters of the others are removed; None for that of
            `build_main_optimizer`.
    """
    settings: dict[OptimizerSettings, list[nn.Parameter]] = {}
    if isinstance(model, KDMetaArch):
        for distiller in model.distillers.values():
            for group in distiller.param_groups(cfg):
                if group.optimizer is not None and group.params:
                    settings.setdefault(group.optimizer, []).extend(group.params)
    elsewhere = {p for params in settings.values() for p in params}
    optimizer = optimizer or build_main_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p not in elsewhere]
    for parameter in elsewhere:
        optimizer.state.pop(parameter, None)  # which Adagrad creates with the optimizer
    auxiliary = {s.name: AuxiliaryOptimizer(s, params, cfg.SOLVER.MAX_ITER) for s, params in settings.items()}
    if len(auxiliary) != len(settings):
        raise RuntimeError(f"two optimizers have the same name: {[s.name for s in settings]}")
    return optimizer, auxiliary
