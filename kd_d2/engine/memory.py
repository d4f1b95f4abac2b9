"""How much memory a training holds."""

import resource

import torch
from detectron2.engine import HookBase


class PeakMemoryRecorder(HookBase):
    """Writes `peak_memory_mib` among the metrics: the most that this process ever held, of its GPU where it has one, else resident.

    As a metric it outlives a resumed run, whose last process may have done little.
    """

    def after_step(self) -> None:
        self.trainer.storage.put_scalar("peak_memory_mib", _peak_memory_mib(), smoothing_hint=False)


def _peak_memory_mib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
