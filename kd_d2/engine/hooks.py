"""Training hooks for metrics and logs, and those of users."""

import logging
import resource
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import PreciseBN

from ..balance import GradientBalance
from ..errors import UserError
from ..meta_arch import KDMetaArch

logger = logging.getLogger(__name__)

HookBuilder = Callable[[CfgNode], HookBase | None]
HOOK_BUILDERS: list[HookBuilder] = []
"""The functions of `register_hook`."""


def register_hook(build: HookBuilder) -> HookBuilder:
    """Register a function that builds a hook of your own from the config of a training; None means no hook.

    A function decorator, for a file of `--import`. Every process of a training calls the function. The hook's `after_step` runs
    before a checkpoint of the iteration is written and before an evaluation, whose results are in the event storage from the next iteration
    on.
    """
    HOOK_BUILDERS.append(build)
    return build


def build_registered_hooks(cfg: CfgNode) -> list[HookBase]:
    """Build the hooks of `register_hook`. Raises a UserError if one is not a hook."""
    hooks = []
    for build in HOOK_BUILDERS:
        hook = build(cfg)
        if isinstance(hook, HookBase):
            hooks.append(hook)
        elif hook is not None:
            raise UserError(
                f"The function {build.__name__} of register_hook returned {hook!r}; it must be a HookBase or None."
            )
    return hooks


class PeakMemoryRecorder(HookBase):
    """Records the metric `peak_memory_mib` of this process: allocated GPU memory, or resident memory if it trains on a CPU.

    Metrics survive a resume; the last process of a resumed training may have used little memory.
    """

    def after_step(self) -> None:
        if next(self.trainer.bare_model.parameters()).device.type == "cuda":
            mib = torch.cuda.max_memory_allocated() / 2**20
        else:
            mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        self.trainer.storage.put_scalar("peak_memory_mib", mib, smoothing_hint=False)


class LastMultipliersLog(HookBase):
    """Logs the last multipliers of the gradient balance at the end of training.

    Register it before hooks that run the model after a step, such as Detectron2's PreciseBN.
    """

    def __init__(self, balance: GradientBalance):
        self.balance = balance
        self.multipliers: dict[str, float] = {}

    def after_step(self) -> None:
        self.multipliers = self.balance.last_multipliers

    def after_train(self) -> None:
        multipliers = ", ".join(f"{name} {value:.3g}" for name, value in self.multipliers.items())
        logger.info(f"Last multipliers of the distillation losses (MODEL.KD.BALANCE): {multipliers or 'none'}")


class PreciseStatisticsOfStudent(HookBase):
    """Runs Detectron2's `PreciseBN` without the distillers, whose layers it refuses if they run more than once in a forward pass."""

    def __init__(self, model: KDMetaArch, precise: PreciseBN):
        self.model = model
        self.precise = precise

    def after_step(self) -> None:
        self.precise.trainer = self.trainer
        with self.model.without_distillers():
            self.precise.after_step()
