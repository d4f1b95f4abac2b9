"""What a training adds to its metrics and its log."""

import logging
import resource

import torch
from detectron2.engine import HookBase

from ..balance import GradientBalance

logger = logging.getLogger(__name__)


class PeakMemoryRecorder(HookBase):
    """Writes `peak_memory_mib` among the metrics: the most that this process ever held, of its GPU where it has one, else resident.

    As a metric it outlives a resumed run, whose last process may have done little.
    """

    def after_step(self) -> None:
        if torch.cuda.is_available():
            mib = torch.cuda.max_memory_allocated() / 2**20
        else:
            mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        self.trainer.storage.put_scalar("peak_memory_mib", mib, smoothing_hint=False)


class LastMultipliersLog(HookBase):
    """Logs the last multipliers of a balance at the end of a training."""

    def __init__(self, balance: GradientBalance):
        self.balance = balance

    def after_train(self) -> None:
        multipliers = ", ".join(f"{name} {value:.3g}" for name, value in self.balance.last_multipliers.items())
        logger.info(f"Last multipliers of the distillation losses (MODEL.KD.BALANCE): {multipliers or 'none'}")
