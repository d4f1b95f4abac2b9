"""Exponential moving average (EMA) of the student's weights, evaluated and saved in place of the weights themselves."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn


class AveragedStudent(HookBase):
    """Maintains an exponential moving average (EMA) of the student's weights.

    After iteration n (starting at 0), the average is d * average + (1 - d) * weights with d = min(`decay`,
    (n + 1) / (n + 10)), so that the random weights of the first iterations fade quickly. Buffers, such as batch norm
    statistics, are copied from the student.

    A checkpoint stores the average as its `model`; a separate entry has the student's own weights, to resume from.

    Args:
        student: the model being trained.
        decay: less than 1.
    """

    def __init__(self, student: nn.Module, decay: float):
        self.student = student
        self.decay = decay
        self.average = copy.deepcopy(student).requires_grad_(False)
        self._is_resumed = False

    def before_train(self) -> None:
        if not self._is_resumed:
            self.average.load_state_dict(self.student.state_dict())

    @torch.no_grad()
    def after_step(self) -> None:
        decay = min(self.decay, (self.trainer.iter + 1) / (self.trainer.iter + 10))
        averages, weights = list(self.average.parameters()), [p.detach() for p in self.student.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - decay)
        self.copy_buffers()

    @torch.no_grad()
    def copy_buffers(self) -> None:
        """Copy the student's buffers to the average."""
        for average, buffer in zip(self.average.buffers(), self.student.buffers(), strict=True):
            average.copy_(buffer)

    @contextlib.contextmanager
    def in_place_of_student(self) -> Iterator[None]:
        """Swap the averaged weights into the student, and the student's weights into `average`, within this context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for own, average in zip(self.student.parameters(), self.average.parameters(), strict=True):
            own.data, average.data = average.data, own.data


class PreciseStatisticsOfAverage(HookBase):
    """Runs Detectron2's `PreciseBN` with the averaged weights, which are evaluated and saved.

    Register it after `averaged`.

    Args:
        averaged: the averaged weights.
        precise: the hook that computes the statistics.
    """

    def __init__(self, averaged: AveragedStudent, precise: HookBase):
        self.averaged = averaged
        self.precise = precise

    def after_step(self) -> None:
        self.precise.trainer = self.trainer
        with self.averaged.in_place_of_student():
            self.precise.after_step()
        self.averaged.copy_buffers()


class Unaveraged:
    """Checkpointable for the student's own weights. Save it within `in_place_of_student`."""

    def __init__(self, averaged: AveragedStudent):
        self.averaged = averaged

    def state_dict(self) -> dict[str, Tensor]:
        return self.averaged.average.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the student's own weights; the student must already hold the average from the checkpoint's `model`."""
        self.averaged.average.load_state_dict(self.averaged.student.state_dict())
        self.averaged.student.load_state_dict(state)
        self.averaged._is_resumed = True
