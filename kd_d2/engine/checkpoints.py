"""Checkpoint schedule and retention."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, SupportsFloat

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoint import KDCheckpointer
from ..errors import UserError
from ..files import link_or_copy, read_json, write_json
from ..meta_arch import student_of
from .averaging import AveragedStudent
from .failures import saved
from .rank_states import get_rank_state
from .stop_request import StopRequest, TrainingStopped

logger = logging.getLogger(__name__)

LATEST = "model_latest"
"""The name of the checkpoint written between those of SOLVER.CHECKPOINT_PERIOD; each overwrites the previous one."""
BEST = "model_best"
BOX_AP = "bbox/AP"


class Checkpoints(HookBase):
    """Writes checkpoints every SOLVER.CHECKPOINT_PERIOD iterations and after the last one, and `model_latest.pth` every
    SOLVER.CHECKPOINT_MINUTES, before an evaluation, and when a signal stops the training.

    Register the hook on all ranks: a checkpoint holds the state of every rank. Rank 0 writes it.

    Args:
        cfg: the training config.
        checkpointer: writes the files, on rank 0.
        model: the trained model, a KDMetaArch or a plain detector, of which each rank has state of its own.
        stop: the stop request of this rank.
        averaged: the averaged student, saved in place of the student.

    Attributes:
        others: states of the other ranks at the last checkpoint; empty except on rank 0.
    """

    def __init__(
        self,
        cfg: CfgNode,
        checkpointer: KDCheckpointer,
        model: nn.Module,
        stop: StopRequest,
        averaged: AveragedStudent | None = None,
    ):
        self.checkpointer = checkpointer
        self.averaged = averaged
        self.model = model
        self.stop = stop
        self.period = cfg.SOLVER.CHECKPOINT_PERIOD
        self.seconds = 60 * cfg.SOLVER.CHECKPOINT_MINUTES or math.inf
        self.evaluation_period = cfg.TEST.EVAL_PERIOD
        self.keep = cfg.SOLVER.CHECKPOINTS_TO_KEEP
        self.others: list[dict[str, Any]] = []
        self.files_at_start: list[str] = []
        self.written = time.monotonic()

    def before_train(self) -> None:
        self.written = time.monotonic()
        folder = self.checkpointer.save_dir
        self.files_at_start = os.listdir(folder) if comm.is_main_process() and folder else []

    def after_step(self) -> None:
        is_due, signal_number = self._agreed()
        finished = self.trainer.iter + 1
        names = [f"model_{self.trainer.iter:07d}"] if finished % self.period == 0 else []
        if finished >= self.trainer.max_iter:
            names.append("model_final")
        evaluates = self.evaluation_period > 0 and finished % self.evaluation_period == 0
        if not names and (is_due or evaluates or signal_number):
            names.append(LATEST)
        if names:
            self._write(names)
        if signal_number:
            self.checkpointer.wait()
            comm.synchronize()  # no rank may exit while rank 0 writes
            raise TrainingStopped(signal_number)

    def after_train(self) -> None:
        self.checkpointer.wait()

    def _agreed(self) -> tuple[bool, int]:
        """Return whether a checkpoint is due on rank 0 and the signal that any rank received, the same on all ranks."""
        is_due = comm.is_main_process() and time.monotonic() - self.written > self.seconds
        if comm.get_world_size() == 1:
            return is_due, self.stop.number
        device = next(self.model.parameters()).device
        flags = torch.tensor([int(is_due), self.stop.number], device=device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        is_due, number = flags.tolist()
        return bool(is_due), number

    def _write(self, names: list[str]) -> None:
        share_statistics(student_of(self.model))
        self.others = comm.gather(get_rank_state(self.model))[1:]
        self.written = time.monotonic()
        if comm.is_main_process():
            is_lost = self._has_lost_its_folder()
            names = [LATEST] if is_lost else names
            with self.averaged.in_place_of_student() if self.averaged else contextlib.nullcontext():
                for name in names:
                    self.checkpointer.save(name, iteration=self.trainer.iter)
            if is_lost:
                self.checkpointer.wait()
                folder = self.checkpointer.save_dir
                raise UserError(
                    f"OUTPUT_DIR {folder} was removed or replaced during training; training stops, and {saved(folder)}."
                )
            self._remove_old()

    def _has_lost_its_folder(self) -> bool:
        """Return whether the folder had files when training began and has lost all of them; if so, create it again."""
        folder = self.checkpointer.save_dir
        if not self.files_at_start or any(os.path.lexists(os.path.join(folder, name)) for name in self.files_at_start):
            return False
        os.makedirs(folder, exist_ok=True)
        return True

    def _remove_old(self) -> None:
        """Delete all but the last `keep` periodic checkpoints, first those of an earlier, longer training; 0 keeps all."""
        folder = self.checkpointer.save_dir
        found = [match for name in os.listdir(folder) if (match := re.fullmatch(r"model_(\d{7,})\.pth", name))]
        numbered = [(int(match[1]) <= self.trainer.iter, int(match[1]), match[0]) for match in found]
        for _, _, name in sorted(numbered)[: -self.keep] if self.keep else []:
            os.remove(os.path.join(folder, name))


def share_statistics(model: nn.Module) -> None:
    """Give all ranks the batch norm statistics of rank 0, which are saved, so that all evaluate the saved model."""
    if comm.get_world_size() > 1:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                for buffer in module.buffers(recurse=False):
                    torch.distributed.broadcast(buffer, 0)


class BestCheckpoint(HookBase):
    """Keeps the evaluated checkpoint with the highest metric as `model_best.pth`, and its value in `model_best.json`.

    Register the hook on rank 0 only, after `Checkpoints` and the evaluation.

    Args:
        checkpointer: wrote the checkpoint that is evaluated.
        results: () -> results of the last evaluation.
        metric: see TEST.BEST_METRIC.
    """

    def __init__(self, checkpointer: KDCheckpointer, results: Callable[[], dict], metric: str = BOX_AP):
        self.checkpointer = checkpointer
        self.results = results
        self.metric = metric
        self.name = "AP" if metric == BOX_AP else metric  # in model_best.json
        self.seen: dict | None = None
        self.best = -math.inf
        self.has_warned = False
        self.path = os.path.join(checkpointer.save_dir, BEST)

    def before_train(self) -> None:
        if self.trainer.start_iter == 0:
            with contextlib.suppress(FileNotFoundError):
                os.remove(f"{self.path}.json")  # of an earlier training
        elif os.path.isfile(f"{self.path}.json"):  # may be newer than the resumed checkpoint
            self.best = max(self.best, read_json(f"{self.path}.json").get(self.name, -math.inf))

    def after_step(self) -> None:
        results = self.results()
        if not results or results is self.seen:
            return
        self.seen = results
        value = self._value(results)
        if value is None:
            found = ", ".join(name for name in flatten_results_dict(results) if "/AP-" not in name)  # of classes
            self._warn(
                f"{BEST}.pth is not written: TEST.BEST_METRIC is {self.metric!r}, but the evaluation gives {found}."
            )
        elif math.isnan(value):
            self._warn(f"{BEST}.pth is not written while {self.name} is NaN, as it is without objects in the test set.")
        elif value > self.best:
            self.best = value
            self.checkpointer.wait()
            link_or_copy(self.checkpointer.get_checkpoint_file(), f"{self.path}.pth")
            write_json(f"{self.path}.json", {self.name: value})

    def _value(self, results: dict) -> float | None:
        """Return the metric of the test set, or of the first of several; None if its evaluation has no such number."""
        for value in (results, next(iter(results.values()))):
            for name in self.metric.split("/", 1):  # names of classes may contain "/"
                value = value.get(name) if isinstance(value, Mapping) else None
            if isinstance(value, SupportsFloat):  # also scalars of NumPy
                return float(value)
        return None

    def _warn(self, message: str) -> None:
        if not self.has_warned:
            self.has_warned = True
            logger.warning(message)

    def after_train(self) -> None:
        self.after_step()

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "best": self.best} if math.isfinite(self.best) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("metric", BOX_AP) == self.metric:
            self.best = state["best"]
