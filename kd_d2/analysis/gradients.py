"""`kd-d2 analyze gradients`: the gradient of each distillation loss compared with that of the detection loss."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Self

import torch
import torch.nn.functional as F
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..balance import shared_parameters
from ..config import thawed
from ..data import build_stream_loader
from ..engine.checks import check_schedule
from ..engine.trainer import load_initial_weights
from ..errors import check_at_least
from ..files import check_output_folder
from ..gradients import gradients_of, loss_gradient
from ..meta_arch import KDMetaArch
from ..random_state import preserved_random_state
from ..report.page import Table, as_text
from .base import Analysis
from .models import Distillation, load_distillations

DETECTION = "detection"


@dataclass(frozen=True)
class GradientStats:
    """The gradient of a loss with respect to the student's neck parameters, which all losses share; means over batches.

    Attributes:
        loss: value of the loss.
        norm_ratio: norm of the gradient divided by that of the detection loss.
        cosine: cosine similarity of the gradient to that of the detection loss; 0 without a gradient.
        levels: by stride, the gradient norm for that neck output divided by the norm for all of them; 0 without a
            gradient. Empty in files of older versions.
    """

    loss: float | None
    norm_ratio: float | None
    cosine: float | None
    levels: dict[str, float] = field(default_factory=dict)


@dataclass
class MethodWeight:
    """The WEIGHT of a method.

    Attributes:
        norm_ratio: gradient norm ratio of the sum of the method's losses, without auxiliary ones.
        weight: the value in the config.
        suggested_weight: the weight for the gradient ratio `target` of the method alone; None if it has no gradient.
    """

    norm_ratio: float | None
    weight: float
    suggested_weight: float | None


@dataclass
class GradientAnalysis(Analysis):
    """Gradient norm of each distillation loss relative to the detection loss, and the WEIGHT for a chosen ratio.

    A first table has means over training batches for each loss: its value; the norm of its gradient with respect to the
    student's neck parameters, which all losses share, divided by that of the detection loss; and the cosine of the two
    gradients, negative if the method opposes the detection loss. A second table has the same ratio for each method's
    losses in sum, its WEIGHT, and the WEIGHT with which the method alone would have the ratio MODEL.KD.BALANCE.TARGET
    at this point of the training. A third has the share of each neck level in the gradient of each loss, which
    MODEL.KD.BALANCE.LEVELS sets to that of the detection loss.

    The model is a distillation: a config for the student at the start of training (MODEL.WEIGHTS, inheritance), or a
    run or a config with a checkpoint. The layers of the distillers are also loaded from a checkpoint of this library.
    The batches are the first of a training with the config's SEED, or 0 if unset. The output folder contains
    gradients.json.
    """

    name = "gradients"
    title = "Gradients"
    file = "gradients.json"
    model_count = (1, 1)
    read_models = staticmethod(partial(load_distillations, train=True))

    losses: dict[str, GradientStats]
    """By name, `DETECTION` first."""
    methods: dict[str, MethodWeight]
    """By distiller."""
    target: float
    """MODEL.KD.BALANCE.TARGET."""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--batches", type=int, default=4, help="number of training batches (default 4)")
        parser.add_argument(
            "--iteration", type=int, help="training iteration, on which schedules depend (default the last)"
        )

    @classmethod
    def run(
        cls, models: Sequence[Distillation], output: str, *, batches: int = 4, iteration: int | None = None
    ) -> Self:
        check_at_least("--batches", batches, 1)
        check_at_least("--iteration", iteration, 0)
        (distillation,) = models
        cfg = distillation.cfg
        check_schedule(cfg, 1)
        seed = max(cfg.SEED, 0)
        iteration = cfg.SOLVER.MAX_ITER - 1 if iteration is None else iteration
        with preserved_random_state():
            seed_all_rng(seed)
            model = build_for_training(distillation).train()
            check_output_folder(output, "--output")
            for name in model.distillers:
                if not model.schedules[name].is_active(iteration):
                    print(
                        f"{name} is not active in iteration {iteration}; choose another with --iteration.", flush=True
                    )
            found = measure_gradients(model, islice(build_stream_loader(cfg, seed), batches), iteration)
        target = cfg.MODEL.KD.BALANCE.TARGET
        methods = {}
        for name in model.distillers:
            ratio, weight = found.pop(name).norm_ratio, model.distillers[name].weight
            methods[name] = MethodWeight(ratio, weight, weight * target / ratio if ratio else None)
        return cls(found, methods, target)

    def sentences(self) -> list[str]:
        return [
            "Gradients for the parameters that all losses share, relative to the detection loss; means over batches."
        ]

    def tables(self) -> list[Table]:
        losses = [
            [name, as_text(s.loss, ".4g"), as_text(s.norm_ratio, ".3g"), as_text(s.cosine, "+.3f")]
            for name, s in self.losses.items()
        ]
        methods = [
            [name, as_text(m.norm_ratio, ".3g"), as_text(m.weight, ".4g"), as_text(m.suggested_weight, ".3g")]
            for name, m in self.methods.items()
        ]
        ratio = "gradient norm / detection"
        tables = [
            Table(["loss", "value", ratio, "cosine with detection"], losses),
            Table(["method", ratio, "WEIGHT", f"WEIGHT for {self.target:g}"], methods, "Each method alone."),
        ]
        strides = next((s.levels for s in self.losses.values()), {})
        if strides:
            shares = [[name, *(f"{share:.2f}" for share in s.levels.values())] for name, s in self.losses.items()]
            title = "Share of each neck output in the gradient's norm."
            tables.append(Table(["loss, by stride", *strides], shares, title))
        return tables


def build_for_training(distillation: Distillation) -> KDMetaArch:
    """Build student and teacher without balancing; the student from the checkpoint, or as at the start of training."""
    cfg = thawed(distillation.cfg)
    cfg.MODEL.KD.BALANCE.ENABLED = False
    distillation = Distillation(distillation.title, cfg, distillation.weights)
    if not distillation.weights:
        model = distillation.build()
        load_initial_weights(cfg, model)
        return model
    model = distillation.build_trained()
    states = distillation.distiller_states()
    for name, distiller in model.distillers.items():
        try:
            distiller.load_state_dict(states[name])
        except RuntimeError:
            print(f"The layers of {name} keep initial weights: {distillation.weights} has none that fit.", flush=True)
    return model


def measure_gradients(model: KDMetaArch, batches: Iterable[list[dict]], iteration: int) -> dict[str, GradientStats]:
    """Measure gradients: of the detection losses in sum (`DETECTION`), of each distillation loss and, by the name of
    the distiller, of its losses in sum without auxiliary ones.

    Args:
        model: in train mode, without gradient balancing; its parameters are not changed.
        batches: training batches.
        iteration: training iteration, on which schedules depend.

    Raises:
        UserError: the student's backbone is fully frozen.
    """
    parameters = shared_parameters(model.student)
    features: dict[int, Tensor] = {}  # neck outputs of the latest batch, by stride

    def record(_module: nn.Module, _args: tuple, named: dict[str, Tensor]) -> None:
        features.update(model.adapter.by_stride(named))

    measured: dict[str, list[Tensor]] = {}
    shares: dict[str, list[Tensor]] = {}
    for batch in batches:
        with EventStorage(iteration), model.student.backbone.register_forward_hook(record):
            losses = model(batch)
        distilled = {name: losses.pop(name) for d in model.distillers.values() for name in d.loss_names}
        detection = sum(losses.values())
        reference = loss_gradient(detection, parameters)
        together = {
            method: sum(distilled[name] for name in distiller.loss_names if name not in distiller.aux_loss_names)
            for method, distiller in model.distillers.items()
        }
        for name, loss in {DETECTION: detection, **distilled, **together}.items():
            gradient = loss_gradient(loss, parameters)
            ratio = gradient.norm() / reference.norm()
            cosine = F.cosine_similarity(gradient, reference, dim=0)
            measured.setdefault(name, []).append(torch.stack([loss.detach(), ratio, cosine]))
            norms = torch.stack([level.norm() for level in gradients_of(loss, features.values())])
            shares.setdefault(name, []).append(F.normalize(norms, dim=0))
    strides = list(map(str, features))
    levels = {n: dict(zip(strides, torch.stack(s).mean(0).tolist(), strict=True)) for n, s in shares.items()}
    return {n: GradientStats(*torch.stack(values).mean(0).tolist(), levels[n]) for n, values in measured.items()}
