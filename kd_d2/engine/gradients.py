"""How hard each loss pulls at the student, and whether the same way as the detector's own losses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..errors import UserError
from ..meta_arch import KDMetaArch

OWN = "the detector's own"


@dataclass(frozen=True)
class Pull:
    """What a loss does to the student's backbone, which all losses share; means over batches.

    Attributes:
        loss: its value.
        strength: the norm of its gradient, over that of the detector's own losses.
        cosine: of its gradient and that of the detector's own losses; 0 where it has none.
    """

    loss: float
    strength: float
    cosine: float


def measure_pulls(model: KDMetaArch, batches: Iterable[list[dict]], iteration: int) -> dict[str, Pull]:
    """By name the pulls of the detector's own losses together (`OWN`) and of each loss of each distiller.

    Args:
        model: in train mode; its parameters stay as they are.
        batches: of training data.
        iteration: of the training, for what depends on it: schedules, gradients that begin late.

    Raises:
        UserError: nothing of the student's backbone is trained.
    """
    parameters = [p for p in model.student.backbone.parameters() if p.requires_grad]
    if not parameters:
        raise UserError("Nothing of the student's backbone is trained (MODEL.BACKBONE.FREEZE_AT): no loss pulls at it.")
    measured: dict[str, list[Tensor]] = {}
    for batch in batches:
        with EventStorage(iteration):
            losses = model(batch)
        distilled = {name: losses.pop(name) for d in model.distillers.values() for name in d.loss_names}
        own = sum(losses.values())
        own_gradient = _gradient(own, parameters)
        for name, loss in {OWN: own, **distilled}.items():
            gradient = _gradient(loss, parameters)
            strength = gradient.norm() / own_gradient.norm()
            cosine = F.cosine_similarity(gradient, own_gradient, dim=0)
            measured.setdefault(name, []).append(torch.stack([loss.detach(), strength, cosine]))
    return {name: Pull(*torch.stack(values).mean(0).tolist()) for name, values in measured.items()}


def _gradient(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Of all parameters together, in double precision; 0 where the loss does not depend on one."""
    if not loss.requires_grad:
        loss = loss + 0 * parameters[0].sum()
    parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([part.double().flatten() for part in parts])
