"""Where on chosen images a distiller's loss falls, noted again and again while a student is trained."""

from __future__ import annotations

import glob
import os

import numpy as np
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from ..errors import UserError
from ..files import atomic_write
from ..meta_arch import KDMetaArch
from ..random_state import preserved_random_state
from .loss_normalizers import preserved_loss_normalizers

FOLDER = "loss_maps"


class LossMapRecorder(HookBase):
    """Every so many iterations writes `loss_maps/iteration_<N>.npz` into the output folder.

    Each holds arrays "<image>/<stride>" (H, W), of student and teacher in eval mode. A resumed training writes the
    iterations that it repeats anew. Of several processes all record, since losses count over all of them, and the first writes.

    Args:
        model: has one distiller.
        examples: images with their ground truth, as Detectron2's mapper gives them for a training.
        every: iterations.
        output: the training's output folder.

    Raises:
        UserError: there is no distiller, or there are several.
    """

    def __init__(self, model: KDMetaArch, examples: list[dict], every: int, output: str):
        if len(model.distillers) != 1:
            raise UserError(
                "MODEL.KD.DISTILLERS must name one method, whose loss is to be seen; it names "
                f"{', '.join(model.distillers) or 'none'}."
            )
        self.model = model
        (self.distiller,) = model.distillers.values()
        self.examples = examples
        self.every = every
        self.folder = os.path.join(output, FOLDER)
        os.makedirs(self.folder, exist_ok=True)

    def forget(self) -> None:
        """Remove what an earlier training has noted in the folder."""
        if comm.is_main_process():
            for path in _noted(self.folder):
                os.remove(path)

    def after_step(self) -> None:
        iteration = self.trainer.iter + 1
        if iteration % self.every == 0:
            maps = self.record()
            if comm.is_main_process():
                path = os.path.join(self.folder, f"iteration_{iteration:07d}.npz")
                with atomic_write(path, "wb") as file:
                    np.savez(file, **maps)

    def record(self) -> dict[str, np.ndarray]:
        """The maps of this moment."""
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


def mean_loss_maps(output: str) -> tuple[dict[str, np.ndarray], int]:
    """The mean of all that a run has noted by "<image>/<stride>", and how often it did.

    Raises:
        UserError: it has noted nothing.
    """
    paths = _noted(os.path.join(output, FOLDER))
    if not paths:
        raise UserError(f"{output} has no {FOLDER}: train it by tools/loss_maps.py train.")
    total: dict[str, np.ndarray] = {}
    for path in paths:
        with np.load(path) as maps:
            for name, level in maps.items():
                total[name] = total.get(name, 0) + level.astype(np.float64)
    return {name: level / len(paths) for name, level in total.items()}, len(paths)


def _noted(folder: str) -> list[str]:
    return glob.glob(os.path.join(glob.escape(folder), "iteration_*.npz"))
