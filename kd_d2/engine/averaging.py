"""The average of a student's weights over the training, which is evaluated and saved in their place."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn


class AveragedStudent(HookBase):
    """An exponential moving average of the student's weights (EMA).

    After iteration n (from 0) the average is d * average + (1 - d) * weights, where d is the smaller one of `decay` and
    (n + 1) / (n + 10), so that the first iterations, of random weights, are soon forgotten. Buffers, such as the statistics of batch
    norms, are those of the student.

    A checkpoint has the average as its `model`, and the student's own weights in an entry of their own, from which a training resumes.

    Args:
        student: the model that is trained.
        decay: below 1.
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
        for average, buffer in zip(self.average.buffers(), self.student.buffers(), strict=True):
            average.copy_(buffer)

    @contextlib.contextmanager
    def in_place_of_student(self) -> Iterator[None]:
        """Within this context the student has the averaged weights, and `average` the student's."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for own, average in zip(self.student.parameters(), self.average.parameters(), strict=True):
            own.data, average.data = average.data, own.data


class Unaveraged:
    """What a checkpoint has beside the average: the student's own weights. For use within `in_place_of_student`."""

    def __init__(self, averaged: AveragedStudent):
        self.averaged = averaged

    def state_dict(self) -> dict[str, Tensor]:
        return self.averaged.average.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Of a student that has just got the average from the checkpoint's `model`."""
        self.averaged.average.load_state_dict(self.averaged.student.state_dict())
        self.averaged.student.load_state_dict(state)
        self.averaged._is_resumed = True
