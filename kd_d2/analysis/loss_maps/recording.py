"""A training that records loss maps."""

from __future__ import annotations

import argparse
import glob
import os

import numpy as np
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from ...engine import KDTrainer, setup, write_configs
from ...engine.checks import check_distillation
from ...engine.learning_rate import scale_to_world_size
from ...engine.rank_states import preserved_loss_normalizers
from ...errors import UserError
from ...extensions import import_extensions
from ...files import atomic_write, remove_leftovers
from ...meta_arch import KDMetaArch
from ...random_state import preserved_random_state
from ..examples import pixels, read_examples
from .files import FOLDER, are_equal, check_stride, read_saved_examples, record_files, save_examples

RECORDS = 40  # per training, unless --every is given


def train_with_loss_maps(args: argparse.Namespace) -> None:
    """Train a distillation and record loss maps; the main function of each process.

    Args:
        args: those of `engine.setup`, plus `title`, `imports`, `images`, `every` and `stride`.

    Raises:
        UserError: nothing would be recorded, or the student has no level of the stride.
    """
    import_extensions(args.imports)
    cfg = setup(args)
    check_distillation(cfg, f"--model {args.title}")
    iterations = scale_to_world_size(cfg, comm.get_world_size()).SOLVER.MAX_ITER
    every = args.every or max(1, iterations // RECORDS)
    if every > iterations:
        raise UserError(f"--every is {every}, but SOLVER.MAX_ITER is {iterations}: nothing would be recorded.")
    examples = read_examples(cfg, args.images)
    if args.resume:
        check_recorded_images(examples, cfg)
    trainer = KDTrainer(cfg)
    check_stride(args.stride, trainer.bare_model.adapter.spec.shapes, f"--model {args.title}")
    recorder = LossMapRecorder(trainer.bare_model, examples, every, cfg.OUTPUT_DIR)
    if comm.is_main_process():
        for path in record_files(recorder.folder) if not args.resume else ():  # from an earlier training
            os.remove(path)
        save_examples(examples, cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.register_before_checkpoints(recorder)
    write_configs(cfg)
    trainer.train()


def check_recorded_images(examples: list[dict], cfg: CfgNode) -> None:
    """Raise a UserError if OUTPUT_DIR has records of other images or sizes."""
    drawn = [(pixels(example, cfg), example["instances"]) for example in examples]
    if record_files(os.path.join(cfg.OUTPUT_DIR, FOLDER)) and not are_equal(
        drawn, read_saved_examples(cfg.OUTPUT_DIR)[0]
    ):
        raise UserError(
            f"--resume: {cfg.OUTPUT_DIR} has loss maps of other images or image sizes; resume with the same --images, "
            "test set and test size, or train anew without --resume."
        )


class LossMapRecorder(HookBase):
    """Writes `loss_maps/iteration_<N>.npz` in the output folder every `every` iterations.

    Each file has arrays "<image>/<stride>" (H, W), with student and teacher in eval mode. A resumed training overwrites
    files of repeated iterations. All processes record, as losses are normalized over all of them; the first one writes.

    Args:
        model: has one distiller.
        examples: images with ground truth, as returned by Detectron2's mapper for training.
        every: number of iterations.
        output: output folder of the training.

    Raises:
        UserError: there is no distiller or more than one.
    """

    def __init__(self, model: KDMetaArch, examples: list[dict], every: int, output: str):
        if len(model.distillers) != 1:
            raise UserError(
                "MODEL.KD.DISTILLERS must name one method, whose loss is recorded; it names "
                f"{', '.join(model.distillers) or 'none'}."
            )
        self.model = model
        (self.distiller,) = model.distillers.values()
        self.examples = examples
        self.every = every
        self.folder = os.path.join(output, FOLDER)
        os.makedirs(self.folder, exist_ok=True)
        remove_leftovers(os.path.join(glob.escape(self.folder), "*.npz"))

    def after_step(self) -> None:
        iteration = self.trainer.iter + 1
        if iteration % self.every == 0:
            maps = self.record()
            if comm.is_main_process():
                path = os.path.join(self.folder, f"iteration_{iteration:07d}.npz")
                with atomic_write(path, "wb") as file:
                    np.savez(file, **maps)

    def record(self) -> dict[str, np.ndarray]:
        """Return the maps at the current iteration."""
        maps = {}
        was_training = self.model.training
        self.model.eval()
        with preserved_random_state(), preserved_loss_normalizers(self.model.student), EventStorage(self.trainer.iter):
            self.model.teacher.to(self.model.device)
            for number, example in enumerate(self.examples):
                targets = [example["instances"].to(self.model.device)]
                student = self.model.adapter.run([example], self.distiller.needs, targets)
                teacher = self.model.teacher([example], self.distiller.needs_of_teacher)
                for stride, level in self.distiller.loss_maps(student, teacher, targets).items():
                    maps[f"{number}/{stride}"] = level[0].cpu().numpy()
        self.model.train(was_training)
        return maps
