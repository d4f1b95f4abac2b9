"""How hard each loss pulls at the student, and whether the same way as the detector's own losses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from torch import Tensor

from ..balance import loss_gradient, shared_parameters
from ..meta_arch import KDMetaArch

OWN = "the detector's own"


@dataclass(frozen=True)
class Pull:
    """What a loss does to the parameters of the student's neck, which all losses reach; means over batches.

    Attributes:
        loss: its value.
        strength: the norm of its gradient, over that of the detector's own losses.
        cosine: of its gradient and that of the detector's own losses; 0 where it has none.
    """

    loss: float
    strength: float
    cosine: float


def measure_pulls(model: KDMetaArch, batches: Iterable[list[dict]], iteration: int) -> dict[str, Pull]:
    """By name the pulls of the detector's own losses together (`OWN`), of each loss of each distiller, and, by the name of the
    distiller, of its losses but the auxiliary ones together.

    Args:
        model: in train mode, without a balance; its parameters stay as they are.
        batches: of training data.
        iteration: of the training, for what depends on it: schedules, gradients that begin late.

    Raises:
        UserError: nothing of the student's backbone is trained.
    """
    parameters = shared_parameters(model.student)
    measured: dict[str, list[Tensor]] = {}
    for batch in batches:
        with EventStorage(iteration):
            losses = model(batch)
        distilled = {name: losses.pop(name) for d in model.distillers.values() for name in d.loss_names}
        own = sum(losses.values())
        own_gradient = loss_gradient(own, parameters)
        together = {
            method: sum(distilled[name] for name in distiller.loss_names if name not in distiller.aux_loss_names)
            for method, distiller in model.distillers.items()
        }
        for name, loss in {OWN: own, **distilled, **together}.items():
            gradient = loss_gradient(loss, parameters)
            strength = gradient.norm() / own_gradient.norm()
            cosine = F.cosine_similarity(gradient, own_gradient, dim=0)
            measured.setdefault(name, []).append(torch.stack([loss.detach(), strength, cosine]))
    return {name: Pull(*torch.stack(values).mean(0).tolist()) for name, values in measured.items()}
