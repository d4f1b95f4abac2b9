"""Training hooks for metrics and logs."""

import logging
import resource

import torch
from detectron2.engine import HookBase

from ..balance import GradientBalance

logger = logging.getLogger(__name__)


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
