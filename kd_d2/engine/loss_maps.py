"""Where on chosen images a distiller's loss falls, noted again and again while a student is trained."""

from __future__ import annotations

import glob
import os

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from ..errors import UserError
from ..meta_arch import KDMetaArch
from .random_state import preserved_random_state

FOLDER = "loss_maps"


class LossMapRecorder(HookBase):
    """Every so many iterations writes `loss_maps/iteration_<N>.npz` into the output folder.

    Each holds arrays "<image>/<stride>" (H, W), of student and teacher in eval mode. A resumed training writes the
    iterations that it repeats anew.

    Args:
        model: has one distiller with `loss_maps`.
        examples: images as Detectron2's test loader gives them.
        every: iterations.
        output: the training's output folder.

    Raises:
        UserError: no distiller can tell, or several can.
    """

    def __init__(self, model: KDMetaArch, examples: list[dict], every: int, output: str):
        names = [name for name, distiller in model.distillers.items() if hasattr(distiller, "loss_maps")]
        if len(names) != 1:
            raise UserError(
                f"MODEL.KD.DISTILLERS must name one method whose loss has a place on the map; it names {len(names)}: "
                f"{', '.join(model.distillers) or 'none'}."
            )
        self.model = model
        self.distiller = model.distillers[names[0]]
        self.examples = examples
        self.every = every
        self.folder = os.path.join(output, FOLDER)
        os.makedirs(self.folder, exist_ok=True)

    def forget(self) -> None:
        """Remove what an earlier training has noted in the folder."""
        for path in _noted(self.folder):
            os.remove(path)

    def after_step(self) -> None:
        iteration = self.trainer.iter + 1
        if iteration % self.every == 0 and comm.is_main_process():
            path = os.path.join(self.folder, f"iteration_{iteration:07d}.npz")
            with open(path + ".partial", "wb") as file:
                np.savez(file, **self.record())
            os.replace(path + ".partial", path)

    @torch.no_grad()
    def record(self) -> dict[str, np.ndarray]:
        """The maps of this moment."""
        maps = {}
        was_training = self.model.training
        self.model.eval()
        with preserved_random_state():
            self.model.teacher.to(self.model.device)
            for number, example in enumerate(self.examples):
                student = self.model.adapter.run([example], self.distiller.needs)
                teacher = self.model.teacher([example], self.distiller.needs)
                for stride, level in self.distiller.loss_maps(student, teacher).items():
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
