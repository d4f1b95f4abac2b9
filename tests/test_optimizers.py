"""The student's optimizer, and AdamW for distillers that request their own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

from kd_d2 import KDMetaArch, Teacher, UserError
from kd_d2.distillers import Distiller, OptimizerSettings, ParamGroup, Schedule
from kd_d2.engine.optimizers import AuxiliaryOptimizer, build_optimizers
from kd_d2.engine.step import DistillationStep, NonFiniteLossError

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

pytestmark = pytest.mark.unit

DECODER = OptimizerSettings("decoder", lr=0.1, weight_decay=0.5, warmup_iters=4, clip_norm=1.0)


class WithDecoder(Distiller):
    """A distiller with an adapter in the student's optimizer and a decoder (with a norm) in its own.

    Its losses have the gradients 1 (adapter), 3 and 4 (the decoder's two scalars).
    """

    needs = frozenset({"features"})

    def __init__(self, settings: OptimizerSettings = DECODER, name: str = "x"):
        super().__init__(self.Config(), pair=None)
        self.loss_names = (f"loss_{name}", f"loss_{name}_aux_y")
        self.aux_loss_names = self.loss_names[1:]
        self.settings = settings
        self.adapter = nn.Parameter(torch.tensor(1.0))
        self.first = nn.Parameter(torch.tensor(1.0))
        self.second = nn.Parameter(torch.tensor(-2.0))
        self.norm = nn.GroupNorm(1, 2)

    def param_groups(self, cfg: CfgNode) -> list[ParamGroup]:
        own = [self.first, self.second, *self.norm.parameters()]
        return [ParamGroup([self.adapter]), ParamGroup(own, self.settings)]

    def forward(self, student: Any, teacher: Any, targets: Any) -> dict[str, Tensor]:
        loss, aux = self.loss_names
        norm = sum(p.sum() * 0.0 for p in self.norm.parameters())
        return {loss: self.adapter, aux: 3 * self.first + 4 * self.second + norm}


class WithoutLayers(Distiller):
    needs = frozenset({"features"})
    loss_names = ("loss_without",)

    def __init__(self) -> None:
        super().__init__(self.Config(), pair=None)


class AddedLayer(Distiller):
    needs = frozenset({"features"})
    loss_names = ("loss_layer",)

    def __init__(self) -> None:
        super().__init__(self.Config(), pair=None)
        self.layer = nn.Parameter(torch.tensor(1.0))


def _model(toy_detector: type, **distillers: Distiller) -> KDMetaArch:
    return KDMetaArch(student=toy_detector(), teacher=Teacher(toy_detector()), distillers=distillers)


def _ids(params: Any) -> set[int]:
    return {id(p) for p in params}


def _ids_in(optimizer: torch.optim.Optimizer) -> set[int]:
    return _ids(p for group in optimizer.param_groups for p in group["params"])


def test_parameters_are_shared_out(toy_detector: type, tiny_cfg: Callable) -> None:
    """Check that student and adapter are in the student's SGD and the decoder in its own AdamW, each exactly once."""
    distiller = WithDecoder()
    model = _model(toy_detector, a=distiller)
    optimizer, auxiliary = build_optimizers(tiny_cfg("retinanet"), model)
    assert isinstance(optimizer, torch.optim.SGD)
    assert list(auxiliary) == ["decoder"]
    assert isinstance(auxiliary["decoder"].optimizer, torch.optim.AdamW)
    assert _ids_in(optimizer) == _ids(model.student.parameters()) | _ids([distiller.adapter])
    assert _ids_in(auxiliary["decoder"].optimizer) == _ids(model.distillers.parameters()) - _ids([distiller.adapter])
    assert _ids(auxiliary["decoder"].params) == _ids_in(auxiliary["decoder"].optimizer)
    total = sum(len(g["params"]) for o in (optimizer, auxiliary["decoder"].optimizer) for g in o.param_groups)
    assert total == len(list(model.parameters()))


def test_real_student_and_plain_detector(tiny_detector: Callable, tiny_cfg: Callable) -> None:
    """Check that a distilled student's SGD has the parameters of the plain student's SGD, plus the adapters."""
    cfg = tiny_cfg("retinanet", {"SOLVER": {"WEIGHT_DECAY": 0.01, "WEIGHT_DECAY_NORM": 0.0}})
    student = tiny_detector("retinanet", {"MODEL": {"BACKBONE": {"FREEZE_AT": 2}}})
    plain, none = build_optimizers(cfg, student)
    assert none == {}
    trained = [p for p in student.parameters() if p.requires_grad]
    assert len(trained) < len(list(student.parameters()))
    assert _ids_in(plain) == _ids(trained)
    distiller = WithDecoder()
    model = KDMetaArch(
        student=student, teacher=Teacher(tiny_detector("retinanet", seed=1)), distillers={"a": distiller}
    )
    optimizer, _ = build_optimizers(cfg, model)
    assert _ids_in(optimizer) == _ids(trained) | _ids([distiller.adapter])
    assert not _ids_in(optimizer) & _ids(model.teacher.model.parameters())
    norms = _ids(p for m in student.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.0 if id(parameter) in norms else 0.01)


def test_layer_lr_trains_added_layers_with_adamw(toy_detector: type, tiny_cfg: Callable) -> None:
    """Check that MODEL.KD.LAYER_LR moves a method's layers to AdamW, whose step a factor of the loss does not change."""
    steps = []
    for factor in (1.0, 100.0):
        method = AddedLayer()
        model = _model(toy_detector, a=method, b=WithoutLayers())
        cfg = tiny_cfg("retinanet", {"MODEL": {"KD": {"LAYER_LR": 0.01}}, "SOLVER": {"MAX_ITER": 10}})
        optimizer, auxiliary = build_optimizers(cfg, model)
        assert list(auxiliary) == ["layers"]
        assert _ids_in(auxiliary["layers"].optimizer) == _ids([method.layer])
        assert _ids_in(optimizer) == _ids(model.student.parameters())
        (factor * method.layer).backward()
        auxiliary["layers"].step(0, torch.amp.GradScaler("cpu", enabled=False))
        steps.append(1 - method.layer.item())
    assert steps == pytest.approx([0.01, 0.01], rel=1e-3)


def test_state_from_the_construction_of_an_optimizer(toy_detector: type, tiny_cfg: Callable) -> None:
    """Check that Adagrad's state has the parameters that stay, and can be saved."""
    model = _model(toy_detector, a=WithDecoder())
    optimizer, _ = build_optimizers(tiny_cfg("retinanet"), model, torch.optim.Adagrad(model.parameters()))
    assert _ids(optimizer.state) == _ids_in(optimizer)
    assert len(optimizer.state_dict()["state"]) == len(optimizer.state)


def test_layer_lr_without_added_layers(toy_detector: type, tiny_cfg: Callable) -> None:
    cfg = tiny_cfg("retinanet", {"MODEL": {"KD": {"LAYER_LR": 0.01}}})
    _, auxiliary = build_optimizers(cfg, _model(toy_detector, a=WithoutLayers()))
    assert auxiliary == {}


def test_one_optimizer_for_equal_settings(toy_detector: type, tiny_cfg: Callable) -> None:
    """Check that distillers with equal settings share an optimizer; one name for different settings is an error."""
    a, b = WithDecoder(), WithDecoder(name="z")
    _, auxiliary = build_optimizers(tiny_cfg("retinanet"), _model(toy_detector, a=a, b=b))
    assert list(auxiliary) == ["decoder"]
    assert _ids([a.first, b.first]) <= _ids_in(auxiliary["decoder"].optimizer)
    b.settings = OptimizerSettings("decoder", lr=0.2)
    with pytest.raises(RuntimeError, match=r"two optimizers have the same name: \['decoder', 'decoder'\]"):
        build_optimizers(tiny_cfg("retinanet"), _model(toy_detector, a=a, b=b))
    b.settings = OptimizerSettings("other", lr=0.2)
    _, auxiliary = build_optimizers(tiny_cfg("retinanet"), _model(toy_detector, a=a, b=b))
    assert {name: o.optimizer.defaults["lr"] for name, o in auxiliary.items()} == {"decoder": 0.1, "other": 0.2}


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    """Check a linear warm-up over 4 iterations from lr / 4, then a cosine over the other 6 that ends at zero."""
    other = AuxiliaryOptimizer(DECODER, [nn.Parameter(torch.zeros(()))], max_iter=10)
    warmup = [0.1 * (0.25 + 0.75 * i / 4) for i in range(4)]
    cosine = [0.1 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    assert [other.lr(i) for i in range(10)] == pytest.approx(warmup + cosine)
    assert cosine[0] == 0.1
    assert other.lr(10) == pytest.approx(0.0, abs=1e-12)


def test_learning_rate_without_warm_up_and_with_a_long_one() -> None:
    """Check that the rate starts at its peak without warm-up, and that warm-up may be longer than the training."""
    params = [nn.Parameter(torch.zeros(()))]
    plain = AuxiliaryOptimizer(OptimizerSettings("a", lr=2.0), params, max_iter=4)
    assert [plain.lr(i) for i in range(4)] == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])
    long = AuxiliaryOptimizer(OptimizerSettings("a", lr=1.0, warmup_iters=10), params, max_iter=5)
    assert [long.lr(i) for i in range(5)] == pytest.approx([0.1 + 0.9 * i / 10 for i in range(5)])


def test_learning_rate_of_a_part_of_the_training() -> None:
    """Check that the schedule spans START_ITER to END_ITER, outside of which the rate is at its ends."""
    settings = OptimizerSettings("a", lr=2.0, start_iter=10, end_iter=14)
    part = AuxiliaryOptimizer(settings, [nn.Parameter(torch.zeros(()))], max_iter=100)
    expected = [2.0, 2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0, 0.0]
    assert [part.lr(i) for i in (3, 10, 11, 12, 13, 14, 99)] == pytest.approx(expected)
    empty = OptimizerSettings("a", lr=2.0, start_iter=10, end_iter=10)
    assert AuxiliaryOptimizer(empty, [nn.Parameter(torch.zeros(()))], max_iter=100).lr(11) == pytest.approx(0.0)


def _adamw(value: float, grad: float, lr: float, weight_decay: float) -> float:
    """Return a parameter after AdamW's first step, whose corrected moments are the gradient and its square."""
    return value * (1 - lr * weight_decay) - lr * grad / (abs(grad) + 1e-8)


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_step_clips_all_parameters_together(scale: float | None) -> None:
    """Check gradients 3 and 4 (norm 5) with a limit of 1: they are clipped to 0.6 and 0.8, also with a loss scaler."""
    params = [nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(-2.0))]
    other = AuxiliaryOptimizer(DECODER, params, max_iter=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    scaler.scale(3 * params[0] + 4 * params[1]).backward()
    other.step(2, scaler)
    scaler.update()
    assert [p.grad.item() for p in params] == pytest.approx([0.6, 0.8], rel=1e-5)
    lr = 0.1 * 0.625
    assert params[0].item() == pytest.approx(_adamw(1.0, 0.6, lr, 0.5))
    assert params[1].item() == pytest.approx(_adamw(-2.0, 0.8, lr, 0.5))
    assert other.optimizer.param_groups[0]["lr"] == pytest.approx(lr)


def test_step_leaves_small_gradients_alone() -> None:
    """Check that gradients below the limit are not scaled up, and that there is no limit by default."""
    for settings, grad in [(DECODER, 0.5), (OptimizerSettings("a", lr=0.1), 1e4)]:
        parameter = nn.Parameter(torch.tensor(1.0))
        (grad * parameter).backward()
        AuxiliaryOptimizer(settings, [parameter], 10).step(0, torch.amp.GradScaler("cpu", enabled=False))
        assert parameter.grad.item() == grad


def test_step_without_gradients_changes_nothing() -> None:
    """Check an idle distiller: no weight decay, no moments, and no error from the loss scaler."""
    parameter = nn.Parameter(torch.tensor(1.0))
    other = AuxiliaryOptimizer(DECODER, [parameter], max_iter=10)
    other.step(0, torch.amp.GradScaler("cpu"))
    assert parameter.item() == 1.0
    assert other.optimizer.state_dict()["state"] == {}


def test_state_is_resumed() -> None:
    """Check that two steps, saved and loaded in between, equal two consecutive steps."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(other: AuxiliaryOptimizer, iteration: int) -> None:
        (parameter,) = other.params
        parameter.grad = parameter.detach() * (iteration + 1)
        other.step(iteration, scaler)

    whole = AuxiliaryOptimizer(DECODER, [nn.Parameter(torch.tensor([1.0, -3.0]))], 10)
    step(whole, 0)
    resumed = AuxiliaryOptimizer(DECODER, [nn.Parameter(whole.params[0].detach().clone())], 10)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for other in (whole, resumed):
        step(other, 1)
    assert torch.equal(whole.params[0], resumed.params[0])


def _run(step: DistillationStep, storage: EventStorage, iterations: int) -> None:
    for iteration in range(iterations):
        storage.iter = step.iter = iteration
        step.run_step()


def test_training_step_uses_both_optimizers(
    toy_detector: type, tiny_cfg: Callable, constant_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check the first iteration by hand: SGD for student and adapter, AdamW at its own warm-up rate for the decoder."""
    cfg = tiny_cfg("retinanet", {"SOLVER": {"BASE_LR": 0.01, "MOMENTUM": 0.0, "WEIGHT_DECAY": 0.0, "MAX_ITER": 10}})
    distiller = WithDecoder()
    model = _model(toy_detector, a=distiller)
    optimizer, auxiliary = build_optimizers(cfg, model)
    step = DistillationStep(model, optimizer, auxiliary)
    step.data_loader = [constant_inputs((2.0, 2.0, 2.0))]
    _run(step, event_storage, 1)
    assert model.student.backbone.scale.item() == pytest.approx(1 - 0.01 * 2)
    assert distiller.adapter.item() == pytest.approx(1 - 0.01 * 1)
    assert distiller.first.item() == pytest.approx(_adamw(1.0, 0.6, 0.025, 0.5))
    assert distiller.second.item() == pytest.approx(_adamw(-2.0, 0.8, 0.025, 0.5))
    logged = {name: value for name, (value, _) in event_storage.latest().items()}
    assert logged["lr_decoder"] == pytest.approx(0.025)
    expected = {"loss_toy": 3.0, "loss_x": 1.0, "loss_x_aux_y": 3 - 8.0}
    assert {name: logged[name] for name in expected} == expected
    assert logged["total_loss"] == pytest.approx(sum(expected.values()))


@pytest.mark.parametrize("autocast", [None, torch.float16])
def test_gradients_do_not_pile_up_and_idle_decoders_rest(
    toy_detector: type,
    tiny_cfg: Callable,
    constant_inputs: Callable,
    event_storage: EventStorage,
    autocast: torch.dtype | None,
) -> None:
    """Check three iterations, with the distiller active in the second only: its decoder moves once, by one gradient."""
    cfg = tiny_cfg("retinanet", {"SOLVER": {"BASE_LR": 0.01, "MOMENTUM": 0.0, "WEIGHT_DECAY": 0.0, "MAX_ITER": 10}})
    distiller = WithDecoder()
    model = KDMetaArch(
        student=toy_detector(),
        teacher=Teacher(toy_detector()),
        distillers={"a": distiller},
        schedules={"a": Schedule(start=1, end=2)},
    )
    optimizer, auxiliary = build_optimizers(cfg, model)
    step = DistillationStep(model, optimizer, auxiliary, autocast)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=autocast is not None)
    step.data_loader = [constant_inputs((2.0, 2.0, 2.0))] * 3
    _run(step, event_storage, 3)
    assert model.student.backbone.scale.item() == pytest.approx(1 - 3 * 0.01 * 2, rel=1e-3)
    assert distiller.adapter.item() == pytest.approx(1 - 0.01)
    assert distiller.first.item() == pytest.approx(_adamw(1.0, 0.6, 0.1 * (0.25 + 0.75 / 4), 0.5), rel=1e-5)


def test_a_decoders_gradients_do_not_pile_up(
    toy_detector: type, tiny_cfg: Callable, constant_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check two iterations without clipping, which would hide it: the last gradients are 3 and 4, not 6 and 8."""
    distiller = WithDecoder(OptimizerSettings("decoder", lr=0.1))
    model = _model(toy_detector, a=distiller)
    step = DistillationStep(model, *build_optimizers(tiny_cfg("retinanet"), model))
    step.data_loader = [constant_inputs()] * 2
    _run(step, event_storage, 2)
    assert [distiller.first.grad.item(), distiller.second.grad.item()] == [3.0, 4.0]


@pytest.mark.parametrize("images", [1, 3])
def test_batches_that_cannot_be_accumulated(
    toy_detector: type, tiny_cfg: Callable, constant_inputs: Callable, event_storage: EventStorage, images: int
) -> None:
    """Check that a batch of a loader of one's own is refused unless it has as many images in each part."""
    model = toy_detector()
    step = DistillationStep(model, *build_optimizers(tiny_cfg("retinanet"), model), accumulation_steps=2)
    step.data_loader = [constant_inputs() * images]
    with pytest.raises(UserError, match=rf"GRADIENT_ACCUMULATION_STEPS is 2, but a batch .* has {images} images"):
        _run(step, event_storage, 1)
    assert model.backbone.scale.grad is None


@pytest.mark.parametrize(("returned", "name"), [("a tensor", "loss"), ("one element", "loss_x")])
def test_losses_of_a_detector_of_ones_own(
    toy_detector: type, tiny_cfg: Callable, event_storage: EventStorage, returned: str, name: str
) -> None:
    """Check one loss without a name, and losses (1,) beside scalars, as Detectron2's trainer takes them."""
    model = toy_detector()
    scale = model.backbone.scale

    def forward(inputs: list[dict]) -> Any:
        return scale * 5 if returned == "a tensor" else {"loss_x": scale.view(1) * 2, "loss_y": scale * 3}

    model.forward = forward
    step = DistillationStep(model, *build_optimizers(tiny_cfg("retinanet"), model))
    step.data_loader = [[{}]]
    _run(step, event_storage, 1)
    assert scale.grad.item() == 5.0
    assert event_storage.latest()[name][0] == (5.0 if returned == "a tensor" else 2.0)
    assert event_storage.latest()["total_loss"][0] == 5.0


def test_a_loss_that_is_not_finite_stops_before_the_weights(
    toy_detector: type, tiny_cfg: Callable, constant_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check that the message names loss, value and iteration, and that no parameter has changed."""
    model = _model(toy_detector, a=WithDecoder())
    with torch.no_grad():
        model.distillers["a"].adapter.fill_(float("nan"))
    before = [p.item() for p in model.distillers["a"].parameters() if p.numel() == 1][1:]
    step = DistillationStep(model, *build_optimizers(tiny_cfg("retinanet"), model))
    step.data_loader = [constant_inputs()]
    with pytest.raises(NonFiniteLossError, match="In iteration 0 the loss loss_x is nan") as caught:
        _run(step, event_storage, 1)
    assert caught.value.in_first_iteration
    assert model.student.backbone.scale.item() == 1.0
    assert [p.item() for p in model.distillers["a"].parameters() if p.numel() == 1][1:] == before


def test_the_scale_of_losses_is_resumed(toy_detector: type, tiny_cfg: Callable) -> None:
    """Check also a training that had no scale, and a state without the names of its parameters, as of release 0.1."""

    def step(autocast: torch.dtype | None) -> DistillationStep:
        model = _model(toy_detector, a=WithDecoder())
        return DistillationStep(model, *build_optimizers(tiny_cfg("retinanet"), model), autocast)

    before, after = step(torch.float16), step(torch.float16)
    before.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    before.scaler.scale(torch.zeros(()))
    state = before.state_dict()
    del state["parameters"]
    after.load_state_dict(state)
    assert after.scaler.get_scale() == 256.0
    after.load_state_dict(step(None).state_dict())
    assert after.scaler.get_scale() == 256.0


def test_students_gradients_are_clipped_one_by_one(
    toy_detector: type, tiny_cfg: Callable, constant_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check that SOLVER.CLIP_GRADIENTS applies to student and adapter, one by one, and not to the decoder."""
    clip = {"ENABLED": True, "CLIP_TYPE": "norm", "CLIP_VALUE": 0.5}
    cfg = tiny_cfg(
        "retinanet",
        {"SOLVER": {"BASE_LR": 0.1, "MOMENTUM": 0.0, "WEIGHT_DECAY": 0.0, "MAX_ITER": 10, "CLIP_GRADIENTS": clip}},
    )
    distiller = WithDecoder()
    model = _model(toy_detector, a=distiller)
    step = DistillationStep(model, *build_optimizers(cfg, model))
    step.data_loader = [constant_inputs((2.0, 2.0, 2.0))]
    _run(step, event_storage, 1)
    assert model.student.backbone.scale.item() == pytest.approx(1 - 0.1 * 0.5)
    assert distiller.adapter.item() == pytest.approx(1 - 0.1 * 0.5)
    assert [distiller.first.grad.item(), distiller.second.grad.item()] == pytest.approx([0.6, 0.8], rel=1e-5)
