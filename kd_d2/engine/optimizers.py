"""The student's optimizer, and those that distillers ask for beside it."""

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
    """AdamW for a distiller's own network: its own learning rate, schedule and clipping.

    Args:
        settings: as the distiller gave them.
        params: the parameters.
        max_iter: length of the training in iterations, where the cosine reaches zero.
    """

    def __init__(self, settings: OptimizerSettings, params: list[nn.Parameter], max_iter: int):
        self.settings = settings
        self.params = params
        self.optimizer = torch.optim.AdamW(params, lr=settings.lr, weight_decay=settings.weight_decay)
        self.max_iter = max_iter
        self.multiplier = CosineParamScheduler(1.0, 0.0)
        if settings.warmup_iters:
            first, length = 1.0 / settings.warmup_iters, settings.warmup_iters / max_iter
            self.multiplier = WarmupParamScheduler(self.multiplier, first, length, rescale_interval=True)

    def step(self, iteration: int, scaler: torch.amp.GradScaler) -> None:
        """Clip the gradients of all parameters together, and step with this iteration's learning rate."""
        if all(p.grad is None for p in self.params):
            return
        self.optimizer.param_groups[0]["lr"] = self.lr(iteration)
        scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.params, self.settings.clip_norm)
        scaler.step(self.optimizer)

    def lr(self, iteration: int) -> float:
        """The learning rate of an iteration: it needs no memory, so there is nothing to resume."""
        return self.settings.lr * self.multiplier(iteration / self.max_iter)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


def _build_adamw(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over Detectron2's parameter groups: no weight decay or another one for norms and biases, as SOLVER says."""
    params = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    )
    optimizer = torch.optim.AdamW(params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)
    return maybe_add_gradient_clipping(cfg, optimizer)


def build_optimizers(cfg: CfgNode, model: nn.Module) -> tuple[torch.optim.Optimizer, dict[str, AuxiliaryOptimizer]]:
    """The student's optimizer, Detectron2's SGD or AdamW, and the others by name.

    Args:
        cfg: SOLVER is the student's.
        model: a KDMetaArch or a plain detector.
    """
    settings: dict[OptimizerSettings, list[nn.Parameter]] = {}
    if isinstance(model, KDMetaArch):
        for distiller in model.distillers.values():
            for group in distiller.param_groups(cfg):
                if group.optimizer is not None:
                    settings.setdefault(group.optimizer, []).extend(group.params)
    elsewhere = {id(p) for params in settings.values() for p in params}
    optimizer = build_optimizer(cfg, model) if cfg.SOLVER.OPTIMIZER == "SGD" else _build_adamw(cfg, model)
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in elsewhere]
    auxiliary = {s.name: AuxiliaryOptimizer(s, params, cfg.SOLVER.MAX_ITER) for s, params in settings.items()}
    if len(auxiliary) != len(settings):
        raise RuntimeError(f"two optimizers of one name: {[s.name for s in settings]}")
    return optimizer, auxiliary
