"""MODEL.KD.BALANCE: hand-worked multipliers, when they are measured, resuming, and several processes."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from kd_d2 import KDMetaArch, Teacher, UserError
from kd_d2.adapters import DensePredictions, DetectorOutputs, Towers
from kd_d2.balance import GradientBalance, shared_parameters
from kd_d2.config import load_config
from kd_d2.distillers import Distiller, FeatureImitation, Schedule
from kd_d2.distributed import sum_across_ranks
from kd_d2.gradients import gradient_norm, gradients_of
from kd_d2.level_balance import LevelBalance

import pytest
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from helpers import (
    META_ARCHITECTURES,
    KillAt,
    Project,
    make,
    make_project,
    make_trainer,
    methods_of,
    spec_of,
    train,
)
from torch import Tensor, nn

ON = {"MODEL__KD__BALANCE__ENABLED": True}


class Slopes:
    """A parameter (0, 0) and losses that are linear in it."""

    def __init__(self):
        self.parameters = [nn.Parameter(torch.zeros(2))]

    def loss(self, *slope: float) -> Tensor:
        return self.parameters[0] @ torch.tensor(slope, dtype=torch.float32)

    def multipliers(self, balance: GradientBalance, iteration: int, own: tuple, **losses: tuple) -> dict[str, float]:
        return balance.multipliers(
            iteration, self.parameters, self.loss(*own), {name: self.loss(*slope) for name, slope in losses.items()}
        )


@pytest.fixture
def slopes() -> Slopes:
    return Slopes()


def balance(target: float = 2.0, **options: object) -> GradientBalance:
    return GradientBalance(target=target, **options)


def test_multipliers_give_every_distiller_an_equal_share(slopes: Slopes) -> None:
    """Check a detection norm of 5 and distillers with norms 10 and 1: ratios 2 and 0.2 are both scaled to 1."""
    found = slopes.multipliers(balance(), 0, own=(3, 4), A=(0, 10), B=(1, 0))
    assert found == pytest.approx({"A": 0.5, "B": 5.0})


def test_shares_follow_the_weights(slopes: Slopes) -> None:
    """Check three quarters and a quarter of 2; a distiller with weight 0 is not measured."""
    weights = {"A": 3.0, "B": 1.0, "C": 0.0}
    found = slopes.multipliers(scaled := balance(weights=weights), 0, own=(3, 4), A=(0, 10), B=(1, 0), C=(7, 0))
    assert found == pytest.approx({"A": 0.75, "B": 2.5, "C": 1.0})
    assert scaled.ratios == pytest.approx({"A": 2.0, "B": 0.2})


@pytest.mark.parametrize(
    "arguments", [{"target": -1.0}, {"target": 0.0}, {"period": 0}, {"momentum": 1.0}, {"limit": 0.5}]
)
def test_arguments_out_of_range_are_refused(arguments: dict) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"^{name} is {value}; it must be "):
        balance(**arguments)


@pytest.mark.parametrize("weights", [{"B": -1.0}, {"A": 1.0, "B": -1.0}])
def test_a_weight_below_zero_is_refused(weights: dict) -> None:
    with pytest.raises(ValueError, match=r"^weight of B is -1\.0; it must be at least 0$"):
        balance(weights=weights)


@pytest.mark.parametrize("momentum", [1.5, 1.0, -3.0])
def test_a_momentum_of_levels_out_of_range_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match=f"^momentum is {momentum}; it must be at least 0 and below 1$"):
        LevelBalance(momentum)


def test_levels_without_features_are_refused(slopes: Slopes) -> None:
    with pytest.raises(ValueError, match=r"^features is None; with levels it must be "):
        slopes.multipliers(balance(levels=LevelBalance(0.9)), 0, (1, 0), A=(1, 0))


def test_multipliers_are_bounded(slopes: Slopes) -> None:
    assert slopes.multipliers(balance(limit=4.0), 0, (1, 0), A=(1e-3, 0), B=(1e3, 0)) == {"A": 4.0, "B": 0.25}


def test_when_ratios_are_measured(slopes: Slopes) -> None:
    """Check period 6: measurements in iterations 0, 1, 2, 4, then 6, 12, ..., and constant multipliers in between."""
    scaled, seen = balance(period=6, momentum=0.0), []
    for iteration in range(14):
        seen.append(slopes.multipliers(scaled, iteration, (1, 0), A=(2.0**iteration, 0))["A"])
    assert seen == pytest.approx([2.0**-k for k in (-1, 0, 1, 1, 3, 3, 5, 5, 5, 5, 5, 5, 11, 11)])


def test_the_moving_average_by_hand(slopes: Slopes) -> None:
    """Check log2 ratios 0, 4, 2, 8 with momentum 0.5: 0, the mean 2 of two, then half of 2 + 2 and of 2 + 8."""
    scaled, seen = balance(1.0, period=1, momentum=0.5), []
    for iteration, power in enumerate((0, 4, 2, 8)):
        slopes.multipliers(scaled, iteration, (1, 0), A=(2.0**power, 0))
        seen.append(math.log2(scaled.ratios["A"]))
    assert seen == pytest.approx([0, 2, 2, 5])


def test_first_measurements_count_equally(slopes: Slopes) -> None:
    scaled = balance(1.0, period=1, momentum=0.9)
    for iteration, power in enumerate((1, 3, 5)):
        slopes.multipliers(scaled, iteration, (1, 0), A=(2.0**power, 0))
    assert scaled.ratios["A"] == pytest.approx(2.0**3)


def test_a_distiller_that_starts_late_is_measured_at_once(slopes: Slopes) -> None:
    """Check iteration 7 with period 5: B is new and measured, A is not; from then on their shares are equal."""
    scaled = balance(period=5)
    assert slopes.multipliers(scaled, 0, (1, 0), A=(1, 0)) == {"A": 2.0}
    assert slopes.multipliers(scaled, 7, (1, 0), A=(9, 0), B=(4, 0)) == {"A": 1.0, "B": 0.25}


def test_a_loss_without_gradient_waits_for_its_first(slopes: Slopes) -> None:
    """Check zero, constant or unrelated losses: multiplier 1, other shares unchanged; later zeros change nothing."""
    scaled = balance(period=100)
    zero, constant = slopes.loss(0, 0), torch.tensor(3.0)
    elsewhere = nn.Parameter(torch.ones(())) * 2
    losses = {"A": slopes.loss(1, 0), "B": zero, "C": constant, "D": elsewhere}
    found = scaled.multipliers(3, slopes.parameters, slopes.loss(1, 0), losses)
    assert found == {"A": 0.5, "B": 1.0, "C": 1.0, "D": 1.0}
    assert slopes.multipliers(scaled, 5, (1, 0), A=(5, 0), B=(2, 0))["B"] == 0.5
    assert slopes.multipliers(scaled, 100, (1, 0), A=(0, 0), B=(0, 0)) == {"A": 1.0, "B": 0.5}


@pytest.mark.parametrize("own", [(0.0, 0.0), (math.inf, 0.0), (math.nan, 0.0)])
def test_an_own_gradient_that_says_nothing_is_passed_over(slopes: Slopes, own: tuple) -> None:
    scaled = balance()
    assert slopes.multipliers(scaled, 0, own, A=(1, 0)) == {"A": 1.0}
    assert slopes.multipliers(scaled, 1, (1, 0), A=(1, 0), B=(math.inf, 0)) == {"A": 1.0, "B": 1.0}
    assert scaled.ratios == {"A": 1.0}


def test_the_own_gradient_is_taken_only_where_a_distiller_has_one(slopes: Slopes) -> None:
    """Check that the detection losses have no backward pass before a distiller's first gradient."""
    scaled, own, passes = balance(), slopes.loss(3, 4), []
    own.register_hook(passes.append)
    for iteration, loss in enumerate((slopes.loss(0, 0), torch.zeros(()), slopes.loss(0, 10))):
        scaled.multipliers(iteration, slopes.parameters, own, {"A": loss})
        assert len(passes) == (iteration == 2)


def test_one_measurement_an_iteration(slopes: Slopes) -> None:
    """Check that the second part of an accumulated batch has the multipliers of the first."""
    scaled = balance()
    assert slopes.multipliers(scaled, 0, (1, 0), A=(1, 0)) == slopes.multipliers(scaled, 0, (1, 0), A=(7, 0))


def test_state_is_restored(slopes: Slopes) -> None:
    """Check that a state restored from JSON, which has no tuples, continues with the same numbers."""
    first, second = balance(period=1), balance(period=1)
    slopes.multipliers(first, 0, (1, 0), A=(3, 0))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert slopes.multipliers(first, 1, (1, 0), A=(5, 0)) == slopes.multipliers(second, 1, (1, 0), A=(5, 0))
    assert second.ratios == pytest.approx({"A": 15**0.5})


def test_a_weight_of_zero_after_resuming(slopes: Slopes) -> None:
    """Check the only distiller, measured before its WEIGHT was set to 0."""
    resumed = balance(weights={"A": 0.0})
    resumed.load_state_dict({"averages": {"A": [0.0, 1]}})
    assert slopes.multipliers(resumed, 1, (1, 0), A=(0, 0)) == {"A": 1.0}


def test_another_weight_after_resuming(slopes: Slopes) -> None:
    """Check a gradient of norm 3 at WEIGHT 10, so 30 at 100, with WEIGHT 0 in a run in between; shares stay equal."""

    def run(weight: float, state: dict | None, iteration: int) -> tuple[dict, float]:
        relative = {"A": weight / 10}
        scaled = balance(1.0, weights=relative, loss_weights={"A": weight}, momentum=0.5)
        if state:
            scaled.load_state_dict(json.loads(json.dumps(state)))
        found = slopes.multipliers(scaled, iteration, (1, 0), A=(0.3 * weight, 0))
        return scaled.state_dict(), found["A"]

    state, found = run(10.0, None, 0)
    assert found == pytest.approx(1 / 3)
    assert run(100.0, state, 3)[1] == pytest.approx(1 / 30)  # iteration 3 has no measurement
    off, found = run(0.0, state, 3)
    assert found == 1.0 and run(100.0, off, 5)[1] == pytest.approx(1 / 30)
    again, _ = run(100.0, state, 3)
    assert run(100.0, again, 3)[1] == pytest.approx(1 / 30)  # corrected once, not at every resume
    old = {"averages": state["averages"]}
    assert run(100.0, old, 3)[1] == pytest.approx(1 / 3)


def test_the_weight_of_a_checkpoint_is_the_methods(tmp_path: Path) -> None:
    """Check PKD's default with and without a WEIGHT, as kept in the checkpoint."""
    project = make_project(tmp_path, MODEL__KD__DISTILLERS=("PKD", "StructuralKD"), MODEL__KD__PKD__WEIGHT=5.0, **ON)
    state = make_trainer(project).bare_model.balance.state_dict()
    assert state["loss_weights"] == {"PKD": 5.0, "StructuralKD": 4.0}


def test_a_frozen_level_has_no_gradient() -> None:
    """Check gradients, factors and loss maps with a first level that does not require a gradient."""
    features = _levels(1.0, 1.0, 1.0)
    features[8] = features[8].detach()
    outputs, levels = DetectorOutputs(images=None, features=features), LevelBalance(momentum=0.5)
    seen = levels.gated("A", outputs).features
    loss = seen[8].sum() + 12 * seen[16].sum() + 5 * seen[32].sum()
    assert [x.item() for x in gradients_of(loss, features.values())] == [0, 12, 5]
    assert [x.item() for x in gradients_of(loss, [features[8]])] == [0]
    own = dict(zip(features, gradients_of(3 * features[16].sum() + 4 * features[32].sum(), features.values())))
    levels.measure(own, {"A": loss}, features)
    factors = levels.factors("A")
    assert [factors[16], factors[32]] == pytest.approx([7.8 / 12, 10.4 / 5], rel=1e-5)
    imitation = make(FeatureImitation, spec_of({8: 1, 16: 1, 32: 1}))
    teacher = DetectorOutputs(images=None, features=_levels(2.0, 2.0, 2.0))
    maps = imitation.loss_maps(outputs, teacher, [])
    assert maps[8].tolist() == [[[0.0]]] and maps[16].item() > 0


class HalfLoss(nn.Module):
    """A convolution with a loss whose float16 gradient is 0, right, or infinite, depending on the factor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.ones_(self.layer.weight)

    def forward(self, factor: float) -> Tensor:
        return (self.layer(torch.ones(1, 1, 1, 1)) * factor).sum().float()


@pytest.mark.parametrize("factor", [1e-9, 1e-5, 1.0, 30.0])
def test_float16_neither_underflows_nor_overflows(factor: float) -> None:
    """Check factors whose gradients under autocast would be 0 (1e-9) or, scaled by 65536, infinite (30)."""
    model = HalfLoss()
    with torch.autocast("cpu", torch.float16):
        loss = model.layer(torch.ones(1, 1, 1, 1)).float().sum() * factor
        assert loss.requires_grad and model.layer(torch.ones(1, 1, 1, 1)).dtype is torch.float16
        assert gradient_norm(loss, model.layer.parameters()) == pytest.approx(factor, rel=1e-2)


def test_float16_gradients_of_features_do_not_underflow() -> None:
    """Check the gradient in a float16 feature map, as level balancing measures it, below float16's smallest number."""
    with torch.autocast("cpu", torch.float16):
        features = nn.Conv2d(1, 1, 1)(torch.ones(1, 1, 1, 1))
        (gradient,) = gradients_of(features.float().sum() * 1e-8, [features])
    assert features.dtype is torch.float16 and gradient.item() == pytest.approx(1e-8, rel=1e-2)


def test_float16_gradients_of_which_one_alone_overflows() -> None:
    """Check slopes 30, infinite if scaled by 65536, and 2e-8, zero if not scaled."""
    with torch.autocast("cpu", torch.float16):
        layer = nn.Conv2d(1, 1, 1)
        first, second = layer(torch.ones(1, 1, 1, 1)), layer(torch.ones(1, 1, 1, 1))
        found = gradients_of(30.0 * first.float().sum() + 2e-8 * second.float().sum(), [first, second])
    assert [gradient.item() for gradient in found] == pytest.approx([30.0, 2e-8], rel=1e-2)


def _levels(*values: float) -> dict[int, Tensor]:
    """Return maps of one position by stride, with gradients."""
    strides = (8, 16, 32)[: len(values)]
    return {s: torch.full((1, 1, 1, 1), v, requires_grad=True) for s, v in zip(strides, values, strict=True)}


def test_levels_have_the_shares_of_the_detectors_gradient() -> None:
    """Check detection norms 3 and 4: distillation norms 12 and 5, together 13, are scaled to 13 * 3/5 and 13 * 4/5."""
    levels = LevelBalance(momentum=0.5)
    features = {8: torch.zeros(1, 1, 1, 1), 16: torch.zeros(1, 2, 1, 1)}
    for level in features.values():
        level.requires_grad_()
    outputs = DetectorOutputs(images=None, features=features)
    gated = {name: levels.gated(name, outputs).features for name in "AB"}
    own = {8: torch.tensor([3.0]), 16: torch.tensor([0.0, 4.0])}
    loss = 12 * gated["A"][8].sum() + 5 * gated["A"][16][0, 0].sum()
    levels.measure(own, {"A": loss, "B": gated["B"][8].sum() * 0}, features)
    assert levels.factors("A") == pytest.approx({8: 7.8 / 12, 16: 10.4 / 5}) and levels.factors("B") == {}
    found = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(features.values()))])
    assert found.tolist() == pytest.approx([7.8, 10.4, 0.0])

    restored = LevelBalance(momentum=0.5)
    restored.load_state_dict(levels.state_dict())
    again = restored.gated("A", outputs).features
    loss = 12 * again[8].sum() + 5 * again[16][0, 0].sum()
    assert torch.autograd.grad(loss, features[8], retain_graph=True)[0].item() == pytest.approx(7.8)
    # detection norms 16 / 3 and 1e-9, counted as 16 / 3000: geometric means with the first, 4 and sqrt(16 / 750)
    restored.measure({8: torch.tensor([16 / 3]), 16: torch.tensor([0.0, 1e-9])}, {"A": loss}, features)
    small = (16 / 750) ** 0.5
    whole = 13 / math.hypot(4, small)
    assert restored.factors("A") == pytest.approx({8: whole * 4 / 12, 16: whole * small / 5})


def test_a_level_whose_gradient_is_not_finite_is_passed_over() -> None:
    """Check that NaN in the last level, as of an overflow in float16, does not enter the averages."""
    levels = LevelBalance(momentum=0.5)
    features = _levels(1.0, 1.0)
    gated = levels.gated("A", DetectorOutputs(images=None, features=features)).features
    own = {8: torch.tensor([1.0]), 16: torch.tensor([math.nan])}
    levels.measure(own, {"A": gated[8].sum() + gated[16].sum()}, features)
    assert levels.factors("A") == {}


def test_levels_of_predictions_and_towers() -> None:
    """Check gradients that reach the neck through logits, boxes, quality and towers: 12 and 5 become 7.8 and 10.4."""
    features = _levels(1.0, 1.0)

    def scaled_by(factor: float) -> dict[int, Tensor]:
        return {stride: factor * level for stride, level in features.items()}

    dense = DensePredictions(
        scaled_by(1.0),
        scaled_by(2.0),
        anchors={},
        decode=None,
        quality=scaled_by(3.0),
        assign=lambda: torch.zeros(1, 2),
    )
    assert len(dense.positives.anchor) == 2
    towers = Towers(scaled_by(4.0), scaled_by(2.0), finish=None)
    outputs = DetectorOutputs(images=None, features=features, dense=dense, towers={1: towers})
    levels = LevelBalance(momentum=0.5)
    seen = levels.gated("A", outputs)
    parts = (
        seen.dense.logits,
        seen.dense.box_regression,
        seen.dense.quality,
        seen.towers[1].class_features,
        seen.towers[1].box_features,
    )
    loss = sum(part[8].sum() + 5 / 12 * part[16].sum() for part in parts)  # slopes 1 + 2 + 3 + 4 + 2 = 12
    levels.measure({8: torch.tensor([3.0]), 16: torch.tensor([4.0])}, {"A": loss}, features)
    gradients = torch.autograd.grad(loss, list(features.values()))
    assert [gradient.item() for gradient in gradients] == pytest.approx([7.8, 10.4])
    assert seen.dense.assignment is dense.assignment and seen.dense.positives is dense.positives


def test_levels_of_a_method_that_compares_predictions(tmp_path: Path) -> None:
    """Check that DIST's gradient in the neck outputs of a training step has the shares of the detection losses."""
    project = make_project(tmp_path, MODEL__KD__DISTILLERS=("DIST",), MODEL__KD__BALANCE__LEVELS=True, **ON)
    trainer = make_trainer(project)
    trainer.resume_or_load(resume=False)
    model, batch = trainer.bare_model.train(), next(iter(trainer._trainer.data_loader))
    run, seen = model.adapter.run, []

    def keep(*args: object) -> DetectorOutputs:
        seen.append(run(*args))
        return seen[0]

    model.adapter.run = keep
    with EventStorage(0):
        losses = model(batch)
    own, distilled = (
        torch.stack([g.norm() for g in gradients_of(sum(parts), seen[0].features.values())])
        for parts in ([v for n, v in losses.items() if n != "loss_dist"], [losses["loss_dist"]])
    )
    expected = own.clamp(min=1e-3 * own.max())
    torch.testing.assert_close(distilled / distilled.norm(), expected / expected.norm(), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("detector", META_ARCHITECTURES)
def test_levels_of_all_methods(tmp_path: Path, detector: str) -> None:
    """Check a training step of every method that supports the detector, and that each has factors or no gradient yet."""
    project = make_project(tmp_path, detector, MODEL__KD__DISTILLERS=tuple(methods_of(detector)))
    project.change(MODEL__KD__BALANCE__LEVELS=True, **ON)
    trainer = make_trainer(project)
    trainer.resume_or_load(resume=False)
    model, batch = trainer.bare_model.train(), next(iter(trainer._trainer.data_loader))
    with EventStorage(0):
        sum(model(batch).values()).backward()
    for name in model.balance.ratios:
        assert len(model.balance.levels.factors(name)) == 5
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_parameters_that_all_losses_share(tiny_detector: Callable) -> None:
    """Check the neck, a backbone with a frozen neck, and the error for a frozen backbone."""
    retinanet = tiny_detector("retinanet")
    names = {id(p): name for name, p in retinanet.named_parameters()}
    shared = {names[id(p)] for p in shared_parameters(retinanet)}
    assert shared == {n for n in names.values() if n.startswith("backbone.") and ".bottom_up." not in n}
    for name, parameter in retinanet.named_parameters():
        parameter.requires_grad_("bottom_up.res5" in name)
    assert {names[id(p)].split(".")[2] for p in shared_parameters(retinanet)} == {"res5"}
    retinanet.requires_grad_(False)
    with pytest.raises(UserError, match=r"backbone is fully frozen \(MODEL.BACKBONE.FREEZE_AT\)"):
        shared_parameters(retinanet)


def test_parameters_of_the_neck_of_a_vitdet() -> None:
    """Check that a SimpleFeaturePyramid's `net` is not shared, as it is no neck."""
    student = nn.Module()
    student.backbone = nn.ModuleDict({"net": nn.Linear(2, 2), "simfp_2": nn.Linear(2, 2)})
    assert {*shared_parameters(student)} == {*student.backbone["simfp_2"].parameters()}


class Auxiliary(Distiller):
    """Returns 4 times the mean of the student's first level as `loss_a`, its own parameter as `loss_a_aux_own`."""

    needs = frozenset({"features"})
    loss_names = ("loss_a", "loss_a_aux_own")
    aux_loss_names = ("loss_a_aux_own",)

    def __init__(self):
        super().__init__(self.Config(), pair=None)
        self.own = nn.Parameter(torch.tensor(5.0))

    def forward(self, student, teacher, targets) -> dict[str, Tensor]:
        return {"loss_a": 4 * student.features[4].mean(), "loss_a_aux_own": self.own}


def test_a_method_with_auxiliary_losses_only_has_no_gradient() -> None:
    method = Auxiliary()
    method.aux_loss_names = method.loss_names
    total = method.total({"loss_a": torch.ones((), requires_grad=True)})
    assert gradients_of(total, [torch.ones(2, requires_grad=True)])[0].tolist() == [0, 0]


def _imitation(weight: float = 1.0) -> FeatureImitation:
    return make(FeatureImitation, spec_of({4: 3, 8: 3}), weight=weight)


def test_losses_of_the_meta_architecture(
    toy_detector: type, constant_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check pixels of 3: detection slope 3; imitation 81, slope -54, ratio 18; `loss_a` 4 * 6, slope 12, ratio 4.

    With target 2, multipliers 1/18 and 1/4 give both a slope of 3; warm-up then halves one, but no auxiliary loss.
    """
    event_storage.iter = 1
    student, teacher = toy_detector(scale=2.0), Teacher(toy_detector(scale=5.0))
    model = KDMetaArch(
        student=student,
        teacher=teacher,
        distillers={"FitNet": _imitation(), "A": Auxiliary()},
        schedules={"A": Schedule(warmup=4)},
        balance=balance(2.0),
    )
    losses = model(constant_inputs((3.0, 3.0, 3.0)))
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {"loss_toy": 7.0, "loss_feature_imitation": 81 / 18, "loss_a": 24 / 4 / 2, "loss_a_aux_own": 5.0}
    )
    latest = {name: value for name, (value, _) in event_storage.latest().items()}
    assert latest == pytest.approx({"kd/balance/FitNet": 1 / 18, "kd/balance/A": 1 / 4})
    sum(losses.values()).backward()
    assert student.backbone.scale.grad.item() == pytest.approx(3 - 3 + 3 / 2)
    assert teacher.model.backbone.scale.grad is None


def test_shares_among_active_distillers_alone(
    toy_detector: type, constant_inputs: Callable, event_storage: EventStorage
) -> None:
    model = KDMetaArch(
        student=toy_detector(scale=2.0),
        teacher=Teacher(toy_detector(scale=5.0)),
        distillers={"FitNet": _imitation(), "A": Auxiliary()},
        schedules={"A": Schedule(start=5)},
        balance=balance(2.0),
    )
    assert model(constant_inputs())["loss_feature_imitation"].item() == pytest.approx(81 / 9)
    event_storage.iter = 5
    assert model(constant_inputs())["loss_feature_imitation"].item() == pytest.approx(81 / 18)


def test_a_student_without_trained_backbone_is_refused(toy_detector: type) -> None:
    student = toy_detector()
    student.backbone.requires_grad_(False)
    with pytest.raises(UserError, match="backbone is fully frozen"):
        KDMetaArch(student=student, teacher=Teacher(toy_detector()), distillers={}, balance=balance())


def test_weights_from_the_config(tmp_path: Path) -> None:
    """Check that twice the default WEIGHT gives twice the share, for any default; None is the family's default."""
    project = make_project(
        tmp_path,
        MODEL__KD__DISTILLERS=("StructuralKD", "ICD", "FGFI"),
        MODEL__KD__STRUCTURAL__WEIGHT=8.0,
        MODEL__KD__FGFI__WEIGHT=0.005,
        **ON,
    )
    trainer = make_trainer(project, "MODEL.KD.BALANCE.TARGET", 3.0, "MODEL.KD.BALANCE.PERIOD", 7)
    scaled = trainer.bare_model.balance
    assert scaled.weights == {"StructuralKD": 2.0, "ICD": 1.0, "FGFI": 0.5}
    assert (scaled.target, scaled.period, scaled.momentum, scaled.limit) == (3.0, 7, 0.9, 100000.0)
    assert make_trainer(project, "MODEL.KD.BALANCE.ENABLED", "False").bare_model.balance is None


def test_the_last_multipliers_are_those_of_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check the log after statistics for batch normalization were computed, as if in iteration 0, before a method starts."""
    keys = {"MODEL__KD__FEATURE_IMITATION__START_ITER": 1, "TEST__PRECISE_BN__ENABLED": True}
    project = make_project(tmp_path, **keys, TEST__PRECISE_BN__NUM_ITER=1, TEST__EVAL_PERIOD=2, **ON)
    with caplog.at_level(logging.INFO, "kd_d2"):
        train(project, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ())
    assert "Last multipliers of the distillation losses (MODEL.KD.BALANCE): FeatureImitation " in caplog.text


METHODS = {
    "MODEL__KD__DISTILLERS": ("StructuralKD", "ICD", "PFI"),
    "MODEL__KD__ICD__DETACH_STUDENT_ITERS": 2,
    "MODEL__KD__BALANCE__PERIOD": 2,
    "MODEL__KD__BALANCE__ENABLED": True,
    "SOLVER__MAX_ITER": 6,
    "SOLVER__STEPS": (),
    "SOLVER__CHECKPOINT_PERIOD": 3,
    "SOLVER__BASE_LR": 0.001,
}


def _written(output: Path) -> dict[str, float]:
    """Return the last multipliers in metrics.json."""
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    mark = "kd/balance/"
    return {name.removeprefix(mark): x for row in rows for name, x in row.items() if name.startswith(mark)}


@pytest.mark.parametrize("levels", [False, True])
def test_a_resumed_run_goes_on_with_its_multipliers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, levels: bool
) -> None:
    """Check a run killed between measurements, with ICD detached at first; the last multipliers are in the log."""
    project = make_project(tmp_path, **METHODS, MODEL__KD__BALANCE__LEVELS=levels)
    unbroken = train(project, "OUTPUT_DIR", tmp_path / "unbroken")
    train(project, hooks=(KillAt(3),))
    with caplog.at_level(logging.INFO, "kd_d2"):
        resumed = train(project, resume=True, seed=99)
    assert list(resumed.losses) == [3, 4, 5]
    for iteration, losses in resumed.losses.items():
        assert losses == pytest.approx(unbroken.losses[iteration], rel=1e-5)
    first, second = (run.trainer.bare_model.balance.ratios for run in (unbroken, resumed))
    assert second == pytest.approx(first, rel=1e-5) and second.keys() == {"StructuralKD", "ICD", "PFI"}
    if levels:
        factors = [run.trainer.bare_model.balance.levels.factors("ICD") for run in (unbroken, resumed)]
        assert factors[1] == pytest.approx(factors[0], rel=1e-5) and len(factors[0]) > 1
    last = resumed.trainer.bare_model.balance.last_multipliers
    assert _written(project.output) == pytest.approx(last) and last.keys() == second.keys()
    ours = [record.getMessage() for record in caplog.records if "MODEL.KD.BALANCE" in record.getMessage()]
    assert len(ours) == 1 and all(f"{name} {x:.3g}" in ours[0] for name, x in last.items())


@pytest.mark.parametrize("levels", [False, True])
def test_accumulation_and_mixed_precision(tmp_path: Path, levels: bool) -> None:
    """Check that ratios in mixed precision and of half batches are close to those of the whole batch in float32."""
    project = make_project(tmp_path, **METHODS, MODEL__KD__BALANCE__LEVELS=levels)
    project.change(SOLVER__MAX_ITER=1, MODEL__KD__ICD__DETACH_STUDENT_ITERS=0)
    project.change(
        INPUT__MIN_SIZE_TRAIN=(160,), INPUT__MAX_SIZE_TRAIN=240
    )  # oneDNN's bfloat16 is wrong on maps of one cell
    exact = train(project).trainer.bare_model.balance.ratios
    for options in (("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"), ("SOLVER.AMP.ENABLED", True)):
        ratios = train(project, *options).trainer.bare_model.balance.ratios
        assert ratios == pytest.approx(exact, rel=0.2)
    ratios = train(project, "SOLVER.GRADIENT_ACCUMULATION_STEPS", 2).trainer.bare_model.balance.ratios
    assert ratios.keys() == exact.keys() and all(0.1 < ratios[n] / exact[n] < 10 for n in exact)


def _measure(rank: int, project: Project, folder: str) -> None:
    """Check in one of two processes, with different slopes, that multipliers come from the mean over processes."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    slopes = Slopes()
    own, a, b = (((2.0, 0.0), (0.0, 4.0), (0.0, 0.0)), ((0.0, 2.0), (4.0, 4.0), (2.0, 0.0)))[rank]
    found = slopes.multipliers(balance(2.0), 0, own, A=a, B=b)  # means: own (1, 1), A (2, 4), B (1, 0)
    assert found == pytest.approx({"A": 2**0.5 / 20**0.5, "B": 2**0.5})
    run = train(project, seed=rank)
    trained = run.trainer.bare_model.balance
    ratios = comm.all_gather(trained.ratios)
    assert ratios[0] == ratios[1] and ratios[0].keys() == {"StructuralKD", "ICD", "PFI"}
    factors = comm.all_gather([trained.levels.factors(name) for name in trained.ratios])
    assert factors[0] == factors[1] and max(factors[0][0].values()) > 1 > min(factors[0][0].values())
    torch.distributed.destroy_process_group()


def _measure_in_float16(rank: int, folder: str) -> None:
    store, limit = f"file://{folder}/store", timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
    layer = nn.Conv2d(1, 1, 1)
    with torch.autocast("cpu", torch.float16):
        loss = sum_across_ranks(layer(torch.ones(1, 1, 1, 1)).float().sum() * (30.0, 0.1)[rank])
        assert gradient_norm(loss, [layer.weight]) == pytest.approx(30.1, rel=1e-2)
    torch.distributed.destroy_process_group()


def test_an_overflow_in_one_process_alone(tmp_path: Path) -> None:
    """Check a loss whose backward pass sums over processes, which all of them must run equally often."""
    torch.multiprocessing.start_processes(_measure_in_float16, nprocs=2, args=(str(tmp_path),), start_method="fork")


def test_two_processes_have_the_same_multipliers(tmp_path: Path) -> None:
    """Check by hand, with a distiller without gradient in one process, and in training with DistributedDataParallel."""
    project = make_project(tmp_path, **METHODS, MODEL__KD__BALANCE__LEVELS=True)
    torch.multiprocessing.start_processes(_measure, nprocs=2, args=(project, str(tmp_path)), start_method="fork")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("TARGET", 0.0, "TARGET is 0.0; it must be a number above 0"),
        ("TARGET", math.inf, "TARGET is inf"),
        ("PERIOD", 0, "PERIOD is 0; it must be a whole number at least 1"),
        ("MOMENTUM", -0.1, "MOMENTUM is -0.1; it must be a number from 0 to below 1"),
        ("MOMENTUM", 1.0, "MOMENTUM is 1.0; it must be a number from 0 to below 1"),
        ("LIMIT", 0.5, "LIMIT is 0.5; it must be a number at least 1"),
    ],
)
def test_wrong_values_name_their_key(tmp_path: Path, key: str, value: object, message: str) -> None:
    project = make_project(tmp_path, **{f"MODEL__KD__BALANCE__{key}": value})
    with pytest.raises(UserError, match=f"MODEL.KD.BALANCE.{message}"):
        load_config(str(project.student))
