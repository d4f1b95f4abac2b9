"""KDTrainer: Detectron2's DefaultTrainer with its own setup, training step and resuming."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import sys
import weakref
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer, PreciseBN
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint import KDCheckpointer, UnreadableCheckpointError, check_readable, checkpoint_files
from ..class_names import match_classes, names_in_checkpoint, names_in_data
from ..compiled import compile_backbone
from ..config import KD_META_ARCH, thawed
from ..data import build_stream_loader, build_test_loader, resolve_epochs
from ..data.stream import BatchStream
from ..distillers.adaptation import selects_by_default
from ..errors import UserError
from ..evaluation import build_evaluator
from ..files import end_last_line
from ..image_files import DataError
from ..inheritance import inherit
from ..memory_format import to_channels_last, trains_with_channels_last
from ..meta_arch import KDMetaArch, student_of
from ..modeling.building import building_from
from ..random_state import preserved_random_state
from ..teacher import Teacher
from .averaging import AveragedStudent, PreciseStatisticsOfAverage, Unaveraged
from .checkpoints import BestCheckpoint, Checkpoints
from .checks import TEACHERS_CLASSES, check_best_metric_is_evaluated, check_classes, check_schedule
from .failures import Failures
from .folder_lock import unlock_folder
from .hooks import LastMultipliersLog, PeakMemoryRecorder, PreciseStatisticsOfStudent, build_registered_hooks
from .learning_rate import build_lr_scheduler, scale_to_world_size
from .optimizers import build_main_optimizer, build_optimizers
from .rank_states import get_rank_state, own_state, set_distiller_state, set_rank_state
from .run_record import RunRecord
from .step import DistillationStep
from .stop_request import StopRequest, TrainingStopped

logger = logging.getLogger(__name__)

UNAVERAGED = "unaveraged"
"""The checkpoint entry with the student's own weights if `model` is their average."""


class KDTrainer(DefaultTrainer):
    """Trains a KDMetaArch, or any plain Detectron2 detector, from a config.

    As in Detectron2, a subclass can override the class methods `build_model`, `build_optimizer`, `build_lr_scheduler`,
    `build_train_loader`, `build_test_loader`, `build_evaluator` and `test`. A training that resumes has the same batches
    as an uninterrupted one only with loaders of `kd_d2.data.build_stream_loader`, which takes a mapper.
    """

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)
        cfg = scale_to_world_size(resolve_epochs(cfg), comm.get_world_size())
        check_schedule(cfg, comm.get_world_size())
        self.cfg = cfg
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.stop = StopRequest()
        self._distiller_state: dict[str, Any] | None = None  # of this rank, while a checkpoint is loaded

        self.bare_model = self.build_model(cfg)
        channels_last = trains_with_channels_last(cfg, self.bare_model)
        if channels_last:
            to_channels_last(self.bare_model)
        check_classes(cfg, self.bare_model)
        if self._has_library_evaluation():
            check_best_metric_is_evaluated(cfg)
        main_optimizer = self.build_optimizer(cfg, self.bare_model)
        optimizer, auxiliary = build_optimizers(cfg, self.bare_model, main_optimizer)
        autocast = getattr(torch, cfg.SOLVER.AMP.DTYPE) if cfg.SOLVER.AMP.ENABLED else None
        self._trainer = DistillationStep(
            _distributed(self.bare_model), optimizer, auxiliary, autocast, cfg.SOLVER.GRADIENT_ACCUMULATION_STEPS
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        teacher = self.bare_model.teacher if isinstance(self.bare_model, KDMetaArch) else None
        self.run_record = RunRecord(cfg, teacher)
        self.checkpointer = KDCheckpointer(
            student_of(self.bare_model), cfg.OUTPUT_DIR, run=self.run_record, trainer=weakref.proxy(self)
        )
        classes = names_in_data(cfg, train=True)
        self.checkpointer.class_names = list(classes.names) if classes else None
        self.checkpointer.asynchronous = cfg.SOLVER.CHECKPOINT_ASYNC
        if isinstance(self.bare_model, KDMetaArch):
            self.checkpointer.add_checkpointable("distillers", self.bare_model.distillers)
            if self.bare_model.balance:
                self.checkpointer.add_checkpointable("balance", self.bare_model.balance)
        self.averaged = None
        if cfg.SOLVER.EMA_DECAY:
            self.averaged = AveragedStudent(student_of(self.bare_model), cfg.SOLVER.EMA_DECAY)
            self.checkpointer.add_checkpointable(UNAVERAGED, Unaveraged(self.averaged))
        if cfg.SOLVER.COMPILE:
            compile_backbone(student_of(self.bare_model), "SOLVER.COMPILE", channels_last=channels_last)
        modules = {key: obj for key, obj in self.checkpointer.checkpointables.items() if isinstance(obj, nn.Module)}
        check_readable({key: obj.state_dict() for key, obj in {"model": self.checkpointer.model, **modules}.items()})
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from the last checkpoint in OUTPUT_DIR, or load MODEL.WEIGHTS and inherit from the teacher.

        Also opens the training data stream, so that errors in the data are reported now.
        """
        resume = resume and self.checkpointer.has_checkpoint()
        if resume or comm.get_world_size() > 1:
            self._resume_in_step(resume)
        if not resume:
            load_initial_weights(self.cfg, self.bare_model)
        self._open_stream()

    def _resume_in_step(self, resume: bool) -> None:
        """Resume this process if requested; raise a UserError unless all processes resume from the same checkpoint."""
        beginning, failure = "nothing", None
        try:
            if resume:
                beginning = self._resume_from_any(checkpoint_files(self.cfg.OUTPUT_DIR))
        except UserError as error:
            beginning, failure = f"nothing ({error})", error
        beginnings = comm.all_gather(beginning)
        if failure:
            raise failure
        for rank, other in enumerate(beginnings):
            if other != beginnings[0]:
                raise UserError(
                    f"--resume: ranks resume from different checkpoints (0: {beginnings[0]}, {rank}: {other}); OUTPUT_DIR must be on a "
                    "file system that all machines share."
                )

    def _resume_from_any(self, files: list[str]) -> str:
        """Resume from the first readable file and return its name; if there is none, raise the first file's error."""
        errors = []
        for file in files:
            try:
                self._resume(file)
                return os.path.basename(file)
            except UnreadableCheckpointError as error:
                logger.warning(f"{error} Trying the previous checkpoint.")
                errors.append(error)
        raise errors[0]

    def _resume(self, file: str) -> None:
        own, wanted = names_in_checkpoint(file), names_in_data(self.cfg, train=True)
        if own and wanted and own.names != wanted.names:
            raise UserError(
                f"--resume: {file} was trained with the classes {', '.join(own.names)}, but {wanted.source} has "
                f"{', '.join(wanted.names)}; resume with the data that it was started with, or train in another OUTPUT_DIR."
            )
        try:
            rest = self.checkpointer.load(file)
            if isinstance(self.bare_model, KDMetaArch):
                set_distiller_state(self.bare_model.distillers, self._distiller_state)  # that of rank 0 is loaded
                self._distiller_state = None
            logger.info(f"Resuming from {file}")
            if UNAVERAGED in rest:
                logger.warning(
                    f"{file} is from a training with SOLVER.EMA_DECAY, but this one has none: it continues from the averaged weights."
                )
        except (KeyError, ValueError, RuntimeError) as error:
            reason, holds_only_weights = _first_reason(error), False
        else:
            fit = self.checkpointer.incompatible
            misfits = [*fit.missing_keys, *fit.unexpected_keys, *(name for name, _, _ in fit.incorrect_shapes)]
            reason = f"{misfits[0]} does not fit" if misfits else ""
            holds_only_weights = self.start_iter == 0
            if holds_only_weights:
                reason = "it holds only weights"
        if not (self.run_record.is_loaded or holds_only_weights):
            self._check_adaptations(file)
        if reason:
            raise UserError(
                f"--resume: {file} does not fit a training with this config ({reason}); resume with the config that it was started "
                "with, or train in another OUTPUT_DIR."
            )
        if self.start_iter >= self.max_iter and self.run_record.another_training:
            raise UserError(
                f"--resume: the training in OUTPUT_DIR {self.cfg.OUTPUT_DIR} has done {self.start_iter} of {self.max_iter} iterations, with "
                f"other settings ({'; '.join(self.run_record.another_training)}): choose another OUTPUT_DIR."
            )

    def _check_adaptations(self, file: str) -> None:
        """Raise a UserError if methods select channels by default, which was not the default of release 0.1."""
        methods = self.bare_model.distillers.values() if isinstance(self.bare_model, KDMetaArch) else ()
        keys = [f"MODEL.KD.{method.CONFIG_NODE}.ADAPTATION" for method in methods if selects_by_default(method)]
        if keys:
            raise UserError(
                f"--resume: {file} is of kd_d2 0.1, in which ADAPTATION None never meant 'select'; resume with {' and '.join(keys)} '1x1', or "
                "'none' for ICD."
            )

    def _open_stream(self) -> None:
        cfg = self._seeded_cfg()
        loader = self._trainer.data_loader = self.build_train_loader(cfg)
        stream = getattr(loader, "batch_sampler", None)
        if isinstance(stream, BatchStream):
            stream.start = self.start_iter
            if cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler":  # others select or repeat images
                total, images = self.max_iter * cfg.SOLVER.IMS_PER_BATCH, len(loader.dataset)
                logger.info(
                    f"Training on {total} images in total: {total / images:.1f} epochs of the {images} in DATASETS.TRAIN"
                )
        elif self.start_iter:
            logger.warning(
                f"The batches of {type(self).__name__}.build_train_loader begin anew; only loaders of build_stream_loader continue "
                "at the iteration from which a training resumes."
            )

    def _seeded_cfg(self) -> CfgNode:
        cfg = thawed(self.cfg)
        cfg.SEED = self.seed
        return cfg

    def train(self) -> Any:
        """Train and evaluate until the last iteration; the program verifies TEST.EXPECTED_RESULTS afterwards.

        Raises:
            TrainingStopped: a signal stopped the training; a checkpoint of the last completed iteration exists.
            UserError: an error that the user can fix.
        """
        if self._trainer.data_loader is None:
            self._open_stream()
        if self.start_iter >= self.max_iter:
            logger.info(
                f"The training has already finished: SOLVER.MAX_ITER is {self.max_iter}, and the checkpoint is from the end of iteration "
                f"{self.start_iter - 1}. The detector is only evaluated."
            )
        failures = Failures(self.cfg, resumed=self.start_iter > 0)
        train_loop = logging.getLogger("detectron2.engine.train_loop")
        train_loop.addFilter(failures.log_as_sentence)
        try:
            with self.stop:
                return super(DefaultTrainer, self).train(self.start_iter, self.max_iter)
        except TrainingStopped as stopped:
            logger.warning(
                f"{stopped.signal_name}: training stopped after iteration {self.iter}; --resume continues from "
                f"{self.checkpointer.get_checkpoint_file()}"
            )
            raise
        except (OSError, EOFError, RuntimeError, ValueError, MemoryError, FloatingPointError, DataError) as error:
            sentence = failures.explain(error)
            if sentence is None:
                raise
            raise sentence from error
        finally:
            train_loop.removeFilter(failures.log_as_sentence)
            unlock_folder(self.cfg.OUTPUT_DIR)

    def after_train(self) -> None:
        self.iter = min(self.iter, max(self.start_iter, self.max_iter))  # Detectron2 counts one more without any left
        if self.iter < self.max_iter and isinstance(sys.exception(), Exception):
            self._end_hooks_after_error()
        else:
            super().after_train()

    def _end_hooks_after_error(self) -> None:
        """Call `after_train` of the hooks; their errors are only logged, in order not to hide that of the training."""
        self.storage.iter = self.iter
        for hook in self._hooks:
            try:
                hook.after_train()
            except Exception as error:
                logger.error(f"{type(hook).__name__} also failed, after the error of the training: {error}")

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["seed"] = self.seed
        state.update(get_rank_state(self.bare_model), other_workers=self.checkpoints.others)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.start_iter = self.iter + 1
        self.seed = state["seed"]
        states = [state, *state.get("other_workers", [])]
        set_rank_state(self.bare_model, states, seed=self.seed + 7919 * state["iteration"])
        self._distiller_state = (own_state(states) or {}).get("distillers")

    def build_hooks(self) -> list[HookBase]:
        """Build Detectron2's hooks, with `Checkpoints` as checkpointer and an evaluation that signals can interrupt."""
        self.checkpoints = Checkpoints(self.cfg, self.checkpointer, self.bare_model, self.stop, self.averaged)
        evaluation, best = EvalHook(self.cfg.TEST.EVAL_PERIOD, self._evaluate), None
        if self.cfg.TEST.EVAL_PERIOD > 0 and comm.is_main_process():
            best = BestCheckpoint(
                self.checkpointer, lambda: getattr(self, "_last_eval_results", {}), self.cfg.TEST.BEST_METRIC
            )
        hooks: list[HookBase | None] = [PeakMemoryRecorder()]
        if isinstance(self.bare_model, KDMetaArch) and self.bare_model.balance:
            hooks.append(LastMultipliersLog(self.bare_model.balance))
        precise = None
        cfg, self.cfg = self.cfg, self._seeded_cfg()  # from which Detectron2 builds the loader of PreciseBN
        detectron2_hooks = super().build_hooks()
        self.cfg = cfg
        for hook in detectron2_hooks:
            is_precise = isinstance(hook, PreciseBN)
            if is_precise and isinstance(self.bare_model, KDMetaArch):
                hook = PreciseStatisticsOfStudent(self.bare_model, hook)
            if is_precise and self.averaged:
                precise = PreciseStatisticsOfAverage(self.averaged, hook)
            elif isinstance(hook, EvalHook):
                hooks += build_registered_hooks(self.cfg)
                hooks += [self.averaged, precise, self.checkpoints, evaluation, best]
            elif not isinstance(hook, PeriodicCheckpointer):
                hooks.append(hook)
        return hooks

    def build_writers(self) -> list[EventWriter]:
        end_last_line(os.path.join(self.cfg.OUTPUT_DIR, "metrics.json"))
        return super().build_writers()

    def register_before_checkpoints(self, hook: HookBase) -> None:
        """Register a hook whose `after_step` runs also in an iteration after which a signal stops the training."""
        self.register_hooks([hook])
        self._hooks.insert(self._hooks.index(self.checkpoints), self._hooks.pop())

    def _evaluate(self) -> dict:
        if self.iter + 1 == self.max_iter:  # it was stopped or has failed
            return {}
        handle = self.model.register_forward_pre_hook(lambda *_: self.stop.raise_if_received())
        try:
            with self.averaged.in_place_of_student() if self.averaged else contextlib.nullcontext():
                self._last_eval_results = self.test(self.cfg, self.model)
        finally:
            handle.remove()
        return self._last_eval_results

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        plain = cfg.MODEL.META_ARCHITECTURE != KD_META_ARCH
        with building_from("MODEL", cfg) if plain else contextlib.nullcontext():
            return super().build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_main_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        return build_stream_loader(cfg, max(cfg.SEED, 0))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def _has_library_evaluation(cls) -> bool:
        """Return whether the evaluation, with its metrics, is that of this class, not of a subclass."""
        overridable = ("build_evaluator", "test")
        return all(inspect.getattr_static(cls, name) is inspect.getattr_static(KDTrainer, name) for name in overridable)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None) -> dict:
        """Evaluate on all datasets in DATASETS.TEST, without changing the random state of the training."""
        with preserved_random_state():
            return super().test(cfg, model, evaluators)


def load_initial_weights(cfg: CfgNode, model: nn.Module) -> None:
    """Load the initial weights: those of MODEL.WEIGHTS, then those inherited from the teacher, if enabled.

    Raises:
        UserError: they cannot be read, or none of them fits.
    """
    student = student_of(model)
    KDCheckpointer(student, save_to_disk=False).load(cfg.MODEL.WEIGHTS)
    own, wanted = names_in_checkpoint(cfg.MODEL.WEIGHTS), names_in_data(cfg, train=True)
    if own and wanted and sorted(own.names) == sorted(wanted.names):
        match_classes(student, "MODEL.WEIGHTS", own, wanted)
    if isinstance(model, KDMetaArch) and cfg.MODEL.KD.INHERIT.ENABLED:
        keys = cfg.MODEL.KD.INHERIT
        inherit(model.student, model.teacher.model, keys.MODULES, weight_selection=keys.WEIGHT_SELECTION)


def evaluate_teacher(cfg: CfgNode, teacher: Teacher) -> dict:
    """Evaluate the teacher on DATASETS.TEST, at the student's image sizes and in the teacher's channel order."""
    teacher.check_detects()
    check_classes(cfg, teacher.model, TEACHERS_CLASSES)
    cfg = thawed(cfg)
    if teacher.flip_channels:
        cfg.INPUT.FORMAT = {"RGB": "BGR", "BGR": "RGB"}[cfg.INPUT.FORMAT]
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "teacher")
    teacher.to(torch.device(cfg.MODEL.DEVICE))
    logger.info("Evaluating the teacher")
    check = teacher.model.register_forward_pre_hook(lambda _, inputs: teacher.adapter.check_sizes(*inputs))
    try:
        return KDTrainer.test(cfg, teacher.model)
    finally:
        check.remove()


def _first_reason(error: Exception) -> str:
    """Return the first line of a message, without the heading that `load_state_dict` places before its reasons."""
    heading, *reasons = str(error).splitlines() or [""]
    return reasons[0].strip().rstrip(".") if reasons and heading.startswith("Error(s) in loading") else heading


def _distributed(model: nn.Module) -> nn.Module:
    if comm.get_world_size() == 1:
        return model
    if not next(model.parameters()).is_cuda and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        raise UserError(
            "The detector has synchronized batch normalization (SyncBN), which several processes can only train on GPUs; set its NORM to "
            "'BN', or train in one process."
        )
    device_ids = [comm.get_local_rank()] if next(model.parameters()).is_cuda else None
    # PyTorch 2.14 has a new name for the option, and a warning about the old one.
    names = inspect.signature(DistributedDataParallel).parameters
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return DistributedDataParallel(model, device_ids=device_ids, **{sync_buffers: False})
