"""What a balance came to, for the log."""

import logging

from detectron2.engine import HookBase

from ..balance import GradientBalance

logger = logging.getLogger(__name__)


class LastMultipliersLog(HookBase):
    """Logs the last multipliers of a balance at the end of a training."""

    def __init__(self, balance: GradientBalance):
        self.balance = balance

    def after_train(self) -> None:
        multipliers = ", ".join(f"{name} {value:.3g}" for name, value in self.balance.last_multipliers.items())
        logger.info(f"Last multipliers of the distillation losses (MODEL.KD.BALANCE): {multipliers or 'none'}")
