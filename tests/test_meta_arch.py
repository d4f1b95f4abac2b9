"""KDMetaArch and Teacher: trained and frozen parts, the images of each detector, and the losses."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from kd_d2 import KDMetaArch, Teacher, UserError, load_config
from kd_d2.adapters import DetectorOutputs, build_adapter
from kd_d2.balance import GradientBalance
from kd_d2.distillers import Distiller, FeatureImitation, RankMimicking, Schedule, StructuralKD
from kd_d2.engine.optimizers import build_optimizers
from kd_d2.engine.step import DistillationStep
from kd_d2.inheritance import component_of, inherit
from kd_d2.meta_arch import student_of

import pytest
import torch
import yaml
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from helpers import configured, make, spec_of
from torch import Tensor, nn

pytestmark = pytest.mark.unit


def _imitation(strides: tuple[int, ...], channels: int, adaptation: str = "none") -> FeatureImitation:
    return make(FeatureImitation, spec_of(dict.fromkeys(strides, channels)), adaptation=adaptation)


def _structural(strides: tuple[int, ...], channels: int) -> StructuralKD:
    return make(StructuralKD, spec_of(dict.fromkeys(strides, channels)), weight=1.0, loss="l2")


class Recorder(Distiller):
    """Returns 10 times its parameter as `loss_kd`, 100 times as `loss_kd_aux_size`, and records its inputs."""

    needs = frozenset({"features"})
    loss_names = ("loss_kd", "loss_kd_aux_size")
    aux_loss_names = ("loss_kd_aux_size",)

    def __init__(self, needs: frozenset[str] = needs, loss_names: tuple[str, ...] = loss_names, weight: float = 1.0):
        super().__init__(self.Config(weight=weight), pair=None)
        self.needs, self.loss_names, self.aux_loss_names = needs, loss_names, loss_names[1:]
        self.own = nn.Parameter(torch.tensor(1.0))
        self.given: list[tuple[DetectorOutputs, DetectorOutputs, list[Instances]]] = []

    def forward(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[str, Tensor]:
        self.given.append((student, teacher, targets))
        return {"loss_kd": 10 * self.own, "loss_kd_aux_size": 100 * self.own}


def _teacher_tensors(teacher: Teacher) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in (*teacher.model.named_parameters(), *teacher.model.named_buffers())}


def test_losses_and_gradient_by_hand(
    toy_detector: type, constant_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check pixels of 3: features 2 * 3 of the student and 5 * 3 of the teacher, loss 81 and slope 2 * 3 * -9."""
    student, teacher = toy_detector(scale=2.0), Teacher(toy_detector(scale=5.0))
    model = KDMetaArch(student=student, teacher=teacher, distillers={"FitNet": _imitation((4, 8), 3)})
    losses = model(constant_inputs((3.0, 3.0, 3.0)))
    assert {name: loss.item() for name, loss in losses.items()} == {"loss_toy": 7.0, "loss_feature_imitation": 81.0}
    sum(losses.values()).backward()
    assert student.backbone.scale.grad.item() == pytest.approx(3 - 54)
    assert teacher.model.backbone.scale.grad is None


def test_images_are_padded_to_the_least_common_multiple(
    toy_detector: type, constant_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check divisibilities 4 and 6: both pad to 12; in eval mode and without distillers, the student pads to 4."""
    student, teacher = toy_detector(divisibility=4), Teacher(toy_detector(divisibility=6))
    model = KDMetaArch(student=student, teacher=teacher, distillers={"a": _structural((4, 8), 3)})
    inputs = constant_inputs(size=(10, 14))
    model(inputs)
    assert student.backbone.seen[-1].shape == teacher.model.backbone.seen[-1].shape == (1, 3, 12, 24)
    model.eval()(inputs)
    assert student.backbone.seen[-1].shape == (1, 3, 12, 16)

    student, teacher = toy_detector(divisibility=4), Teacher(toy_detector(divisibility=6))
    KDMetaArch(student=student, teacher=teacher, distillers={})(inputs)
    assert student.backbone.seen[-1].shape == (1, 3, 12, 16)


def test_each_detector_normalizes_its_own_way(
    toy_detector: type, constant_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check an RGB student of a BGR teacher: (1, 2, 5) is flipped to (5, 2, 1), and each subtracts its own mean."""
    student = toy_detector(pixel_mean=(1.0, 1.0, 1.0))
    teacher = Teacher(toy_detector(pixel_mean=(5.0, 1.0, 0.0)), flip_channels=True)
    inputs = constant_inputs((1.0, 2.0, 5.0), size=(8, 8))
    model = KDMetaArch(student=student, teacher=teacher, distillers={"a": _structural((4, 8), 3)})
    model(inputs)
    assert student.backbone.seen[-1][0, :, 3, 3].tolist() == [0.0, 1.0, 4.0]
    assert teacher.model.backbone.seen[-1][0, :, 3, 3].tolist() == [0.0, 1.0, 1.0]
    assert inputs[0]["image"][:, 0, 0].tolist() == [1.0, 2.0, 5.0]
    assert teacher.to_input_format(inputs)[0].keys() == inputs[0].keys()

    teacher = Teacher(toy_detector())
    KDMetaArch(student=student, teacher=teacher, distillers={"a": _structural((4, 8), 3)})(inputs)
    assert teacher.model.backbone.seen[-1][0, :, 3, 3].tolist() == [1.0, 2.0, 5.0]


def test_sizes_that_do_not_agree_are_an_error(
    toy_detector: type, constant_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check a teacher that always pads to squares of 32 with a student that does not: the error names both sizes."""
    teacher = Teacher(toy_detector(constraints={"square_size": 32}))
    teacher.adapter.pad_to = lambda *sizes: None
    model = KDMetaArch(student=toy_detector(), teacher=teacher, distillers={"a": _structural((4, 8), 3)})
    model.adapter.pad_to(8)
    with pytest.raises(
        UserError, match=r"student \(ToyDetector\) saw images of \(16, 16\) .* teacher \(ToyDetector\) of \(32, 32\)"
    ):
        model(constant_inputs())


def test_both_detectors_pad_to_the_squares_of_one(
    toy_detector: type, constant_inputs: Callable, event_storage: EventStorage
) -> None:
    teacher = Teacher(toy_detector(constraints={"square_size": 32}))
    model = KDMetaArch(student=toy_detector(), teacher=teacher, distillers={"a": _structural((4, 8), 3)})
    inputs = constant_inputs()
    assert model.adapter.preprocess(inputs).tensor.shape[-2:] == (32, 32)
    assert all(loss.isfinite() for loss in model(inputs).values())


def test_maps_that_do_not_agree_are_an_error(
    toy_detector: type, constant_inputs: Callable, event_storage: EventStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check maps with equal strides but different sizes, which some losses would silently broadcast."""
    teacher = Teacher(toy_detector())
    monkeypatch.setattr(teacher.model.backbone, "forward", lambda x: {f"stride{s}": x[..., :1, :1] for s in (4, 8)})
    model = KDMetaArch(student=toy_detector(), teacher=teacher, distillers={"a": _imitation((4, 8), 3)})
    with pytest.raises(
        UserError, match=r"stride 4 .* student \(ToyDetector\) .* \(4, 4\) .* teacher \(ToyDetector\) .* \(1, 1\)"
    ):
        model(constant_inputs())


def test_a_partner_that_cannot_be_padded_is_an_error(tiny_detector: Callable, toy_detector: type) -> None:
    """Check a student that is read through its backbone alone, with a teacher that needs other multiples."""
    teacher = Teacher(toy_detector(divisibility=48))
    with pytest.raises(
        UserError, match=r"PanopticFPN pads its images to multiples of 32 pixels, but its partner needs multiples of 96"
    ):
        KDMetaArch(student=tiny_detector("panoptic"), teacher=teacher, distillers={"a": Recorder()})
    KDMetaArch(
        student=tiny_detector("panoptic"), teacher=Teacher(toy_detector(divisibility=16)), distillers={"a": Recorder()}
    )


def test_teacher_is_no_part_of_the_module(tiny_detector: Callable) -> None:
    """Check that its tensors are in no state_dict, parameters, buffers or modules, and that it stays in eval mode."""
    model = KDMetaArch(
        student=tiny_detector("retinanet"),
        teacher=Teacher(tiny_detector("retinanet", seed=1)),
        distillers={"FitNet": _imitation((8,), 8, "1x1")},
    )
    theirs = {id(t) for t in (*model.teacher.model.parameters(), *model.teacher.model.buffers())}
    assert theirs
    assert not theirs & {id(t) for t in (*model.parameters(), *model.buffers())}
    assert not theirs & {id(t) for t in model.state_dict(keep_vars=True).values()}
    assert not {id(m) for m in model.teacher.model.modules()} & {id(m) for m in model.modules()}
    expected = {f"student.{k}" for k in model.student.state_dict()}
    expected |= {f"distillers.FitNet.adaptation.layers.8.{k}" for k in ("weight", "bias")}
    assert model.state_dict().keys() == expected
    model.train()
    assert model.student.training
    assert not any(m.training for m in model.teacher.model.modules())
    assert not any(p.requires_grad for p in model.teacher.model.parameters())


def _step(model: KDMetaArch, batches: list[list[dict]], cfg: Any) -> DistillationStep:
    optimizer, auxiliary = build_optimizers(cfg, model)
    step = DistillationStep(model, optimizer, auxiliary)
    step.data_loader = batches
    return step


def _cross_family(tiny_detector: Callable) -> KDMetaArch:
    strides = (8, 16, 32, 64)
    return KDMetaArch(
        student=tiny_detector("retinanet"),
        teacher=Teacher(tiny_detector("faster", seed=1)),
        distillers={"StructuralKD": _structural(strides, 8), "FeatureImitation": _imitation(strides, 8, "1x1")},
    )


def test_only_student_and_adapters_learn(
    tiny_detector: Callable, tiny_cfg: Callable, make_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check three steps of RetinaNet with a Faster R-CNN teacher: it is bitwise unchanged, all else has changed."""
    model = _cross_family(tiny_detector)
    before = _teacher_tensors(model.teacher)
    assert any("running_mean" in name for name in before)
    start = copy.deepcopy(model.state_dict())
    step = _step(model, [make_inputs(seed=i) for i in range(3)], tiny_cfg("retinanet"))
    for iteration in range(3):
        event_storage.iter = step.iter = iteration
        step.run_step()
    after = _teacher_tensors(model.teacher)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(p.grad is None for p in model.teacher.model.parameters())
    still = [name for name, t in model.state_dict().items() if torch.equal(t, start[name])]
    assert still == [name for name in still if "anchor_generator" in name]


def test_distillation_gradient_reaches_student_and_adapters_alone(
    tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check that distillation gradients reach the student's backbone, not its head, and every adaptation layer."""
    model = _cross_family(tiny_detector)
    losses = model(make_inputs())
    (losses["loss_structural"] + losses["loss_feature_imitation"]).backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert not any(name.startswith("student.head") for name in reached)
    # p7 (stride 128) is in no pair
    expected = {n for n, _ in model.named_parameters() if "student.head" not in n and "top_block.p7" not in n}
    # biases in front of a min-max normalization or a batch norm may have no gradient
    assert {n for n in expected if n.endswith("weight") and "norm" not in n} <= reached <= expected
    assert all(p.grad is None for p in model.teacher.model.parameters())


def test_pair_across_families_shares_strides_8_to_64(
    tiny_detector: Callable, tiny_cfg: Callable, make_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check that RetinaNet with a Faster R-CNN teacher compares each of the four shared levels."""
    student, teacher = tiny_detector("retinanet"), Teacher(tiny_detector("faster", seed=1))
    probe = KDMetaArch(student=student, teacher=teacher, distillers={})
    distiller = configured(StructuralKD, tiny_cfg("retinanet"), probe.adapter.spec, teacher.spec)
    assert distiller.adaptation.strides == (8, 16, 32, 64)
    model = KDMetaArch(student=student, teacher=teacher, distillers={"StructuralKD": distiller, "Recorder": Recorder()})
    losses = model(make_inputs())
    ours, theirs, _ = model.distillers["Recorder"].given[0]
    alone = [distiller.level_loss(ours.features[s], theirs.features[s]).item() for s in (8, 16, 32, 64)]
    assert losses["loss_structural"].item() == pytest.approx(4 * sum(alone), rel=1e-5)
    assert min(alone) > 0.01


def test_equal_models_have_nothing_to_learn(
    tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check that the distillation losses of equal detectors are 0."""
    student = tiny_detector("retinanet").eval()
    teacher = Teacher(copy.deepcopy(student))
    distillers = {"a": _structural((8, 16, 32, 64, 128), 8), "b": _imitation((8, 128), 8)}
    model = KDMetaArch(student=student, teacher=teacher, distillers=distillers)
    model.training = True  # batch norms stay in eval mode
    losses = model(make_inputs())
    assert losses["loss_structural"].item() == 0.0
    assert losses["loss_feature_imitation"].item() == 0.0


def test_schedule_scales_all_but_auxiliary_losses(
    toy_detector: type, constant_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check start 2, warm-up 4, end 7: weight and factor scale the loss; the auxiliary loss is unscaled or 0."""
    distiller = Recorder(weight=4.0)
    teacher = Teacher(toy_detector())
    model = KDMetaArch(
        student=toy_detector(),
        teacher=teacher,
        distillers={"Recorder": distiller},
        schedules={"Recorder": Schedule(start=2, warmup=4, end=7)},
    )
    losses, idle, teacher_runs = [], [], []
    for iteration in range(8):
        event_storage.iter = iteration
        teacher.model.backbone.seen.clear()
        result = model(constant_inputs())
        assert result.keys() == {"loss_toy", "loss_kd", "loss_kd_aux_size"}
        assert result["loss_toy"].item() == 4.0
        losses.append((result["loss_kd"].item(), result["loss_kd_aux_size"].item()))
        idle.append(len(model.idle_parameters(iteration)))
        teacher_runs.append(len(teacher.model.backbone.seen))
    assert losses == [(0, 0), (0, 0), (10, 100), (20, 100), (30, 100), (40, 100), (40, 100), (0, 0)]
    assert idle == [1, 1, 0, 0, 0, 0, 0, 1]
    assert teacher_runs == [0, 0, 1, 1, 1, 1, 1, 0]


def test_idle_distiller_stays_in_the_graph(
    toy_detector: type, constant_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check that its parameters get zero gradients, which DDP waits for, and are listed as idle."""
    distillers = {"early": Recorder(), "late": _imitation((4, 8), 3, "1x1")}
    model = KDMetaArch(
        student=toy_detector(),
        teacher=Teacher(toy_detector()),
        distillers=distillers,
        schedules={"late": Schedule(start=1)},
    )
    losses = model(constant_inputs())
    assert losses["loss_feature_imitation"].item() == 0.0
    assert losses["loss_kd"].item() == 10.0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad.abs().max() == 0 for p in distillers["late"].parameters())
    assert {id(p) for p in model.idle_parameters(0)} == {id(p) for p in distillers["late"].parameters()}
    assert model.idle_parameters(1) == []


@pytest.mark.parametrize(("processes", "gradient"), [(1, None), (2, 0.0)])
def test_a_loss_without_gradient_keeps_parameters_in_the_graph_of_several_processes(
    toy_detector: type,
    constant_inputs: Callable,
    event_storage: EventStorage,
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
    gradient: float | None,
) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)
    distiller = Recorder()
    monkeypatch.setattr(
        distiller, "forward", lambda *_: {"loss_kd": torch.tensor(3.0), "loss_kd_aux_size": torch.zeros(())}
    )
    model = KDMetaArch(student=toy_detector(), teacher=Teacher(toy_detector()), distillers={"a": distiller})
    losses = model(constant_inputs())
    assert (losses["loss_kd"].item(), losses["loss_kd_aux_size"].item()) == (3.0, 0.0)
    sum(losses.values()).backward()
    assert distiller.own.grad == gradient


@pytest.mark.parametrize("clipping", [{}, {"ENABLED": True, "CLIP_TYPE": "value", "CLIP_VALUE": 1000.0}])
def test_idle_parameters_keep_still_under_momentum_and_decay(
    toy_detector: type, tiny_cfg: Callable, constant_inputs: Callable, event_storage: EventStorage, clipping: dict
) -> None:
    """Check four steps of a distiller that is active in 1 and 2 only: its parameters change only in these."""
    solver = {"BASE_LR": 0.001, "WEIGHT_DECAY": 0.1, "MOMENTUM": 0.9, "CLIP_GRADIENTS": clipping}
    cfg = tiny_cfg("retinanet", {"SOLVER": solver})
    distiller = Recorder()
    model = KDMetaArch(
        student=toy_detector(),
        teacher=Teacher(toy_detector()),
        distillers={"Recorder": distiller},
        schedules={"Recorder": Schedule(start=1, end=3)},
    )
    step = _step(model, [constant_inputs()] * 4, cfg)
    values, scales = [distiller.own.item()], [model.student.backbone.scale.item()]
    for iteration in range(4):
        event_storage.iter = step.iter = iteration
        step.run_step()
        values.append(distiller.own.item())
        scales.append(model.student.backbone.scale.item())
    moved = [a != b for a, b in pairwise(values)]
    assert moved == [False, True, True, False]
    # gradient 110 + 0.1 * 1, learning rate 0.001
    assert values[2] == pytest.approx(1 - 0.1101, rel=1e-5)
    assert len(set(scales)) == 5


def test_distillers_get_what_they_need_and_no_more(
    tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check that the teacher computes only what active distillers need, and that the distiller gets the targets."""
    features, dense = Recorder(), Recorder(needs=frozenset({"dense", "targets"}), loss_names=("loss_x", "loss_x_aux_y"))
    dense.forward = lambda s, t, targets: (
        dense.given.append((s, t, targets))
        or {
            "loss_x": dense.own,
            "loss_x_aux_y": dense.own,
        }
    )
    model = KDMetaArch(
        student=tiny_detector("retinanet"),
        teacher=Teacher(tiny_detector("retinanet", seed=1)),
        distillers={"features": features, "dense": dense},
        schedules={"dense": Schedule(start=1)},
    )
    inputs = make_inputs()
    model(inputs)
    assert features.given[0][1].dense is None
    assert dense.given == []
    event_storage.iter = 1
    model(inputs)
    student, teacher, targets = dense.given[0]
    assert [len(t) for t in targets] == [3, 2]
    assert all(
        torch.equal(t.gt_boxes.tensor, x["instances"].gt_boxes.tensor) for t, x in zip(targets, inputs, strict=True)
    )
    assert teacher.losses == {}
    for stride, logits in teacher.dense.logits.items():
        assert logits.shape == student.dense.logits[stride].shape
        assert not logits.requires_grad
        assert student.dense.logits[stride].requires_grad
    assert not any(x.requires_grad for x in teacher.features.values())
    assert all(x.requires_grad for x in student.features.values())


@pytest.mark.parametrize("names", [("loss_other",), ("loss_kd",), ("loss_kd", "loss_kd_aux_size", "loss_more")])
def test_undeclared_losses_are_an_error(
    toy_detector: type, constant_inputs: Callable, event_storage: EventStorage, names: tuple[str, ...]
) -> None:
    model = KDMetaArch(
        student=toy_detector(), teacher=Teacher(toy_detector()), distillers={"Recorder": Recorder(loss_names=names)}
    )
    with pytest.raises(
        RuntimeError, match=r"Recorder returned the losses \['loss_kd', 'loss_kd_aux_size'\]; it declares"
    ):
        model(constant_inputs())


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(
    ("returned", "found"),
    [
        ({"loss_kd": 0.5}, "0.5 as loss_kd"),
        ({"loss_kd": torch.ones(2)}, r"a tensor of shape \(2,\) as loss_kd"),
        (torch.ones(()), "a Tensor instead of a dict"),
    ],
)
def test_losses_that_are_no_scalar_tensors_are_an_error(
    toy_detector: type,
    constant_inputs: Callable,
    event_storage: EventStorage,
    returned: object,
    found: str,
    balanced: bool,
) -> None:
    recorder = Recorder(loss_names=("loss_kd",))
    recorder.forward = lambda *outputs: returned
    model = KDMetaArch(
        student=toy_detector(),
        teacher=Teacher(toy_detector()),
        distillers={"Recorder": recorder},
        balance=GradientBalance(target=1.0) if balanced else None,
    )
    with pytest.raises(TypeError, match=f"Recorder returned {found}"):
        model(constant_inputs())


def test_a_loss_with_one_element_is_a_scalar(
    toy_detector: type, constant_inputs: Callable, event_storage: EventStorage
) -> None:
    recorder = Recorder(loss_names=("loss_kd",))
    recorder.forward = lambda *outputs: {"loss_kd": torch.full((1,), 3.0)}
    model = KDMetaArch(student=toy_detector(), teacher=Teacher(toy_detector()), distillers={"Recorder": recorder})
    loss = model(constant_inputs())["loss_kd"]
    assert (loss.shape, loss.item()) == ((), 3.0)


def test_a_student_that_is_its_own_teacher_is_an_error(toy_detector: type) -> None:
    """Check that it does not train nothing, since the teacher is frozen."""
    student = toy_detector()
    with pytest.raises(UserError, match="The student and the teacher are the same module"):
        KDMetaArch(student=student, teacher=Teacher(student), distillers={})


def test_a_teacher_that_is_a_model_is_an_error(toy_detector: type) -> None:
    with pytest.raises(TypeError, match=r"teacher is a ToyDetector; pass a Teacher, as in .*teacher=Teacher\(model\)"):
        KDMetaArch(student=toy_detector(), teacher=toy_detector(), distillers={})


def test_a_method_without_loss_names_is_an_error(toy_detector: type) -> None:
    class Nameless(Distiller):
        needs = frozenset({"features"})

    nameless = Nameless(Nameless.Config(), pair=None)
    with pytest.raises(TypeError, match="Nameless does not set the attribute 'loss_names'"):
        KDMetaArch(student=toy_detector(), teacher=Teacher(toy_detector()), distillers={"Nameless": nameless})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("loss_names", "loss_mine", "loss_names = 'loss_mine', which is no tuple of names, such as"),
        ("aux_loss_names", "loss_mine", "aux_loss_names = 'loss_mine', which is no tuple of names, such as"),
        ("needs", ("features",), "needs = ('features',), which is no set of names, such as"),
        ("needs", "features", "needs = 'features', which is no set of names, such as"),
        ("alternative_needs", ["proposals"], "alternative_needs = ['proposals'], which is no set of names, such as"),
    ],
)
def test_needs_and_loss_names_of_a_wrong_type(name: str, value: object, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        type("Mine", (Distiller,), {name: value})
    assert str(caught.value).startswith(f"The method Mine has {expected}")


def test_a_need_that_is_no_part_is_an_error(toy_detector: type) -> None:
    distillers = {"Recorder": Recorder(needs=frozenset({"features", "proposal"}))}
    with pytest.raises(UserError, match=r"Recorder needs 'proposal', .* known parts are anchors, .* proposals"):
        KDMetaArch(student=toy_detector(), teacher=Teacher(toy_detector()), distillers=distillers)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"schedules": {"Recroder": Schedule(start=1)}}, "schedules"),
        ({"balance": GradientBalance(target=1.0, weights={"Recroder": 3.0})}, r"balance\.weights"),
    ],
)
def test_names_of_no_distiller_are_an_error(toy_detector: type, arguments: dict, what: str) -> None:
    detectors = {"student": toy_detector(), "teacher": Teacher(toy_detector())}
    with pytest.raises(UserError, match=rf"^{what} names \['Recroder'\], but the distillers are \['Recorder'\]\.$"):
        KDMetaArch(**detectors, distillers={"Recorder": Recorder()}, **arguments)


def test_auxiliary_losses_are_among_the_losses(toy_detector: type) -> None:
    """Check a distiller that declares an auxiliary loss that is not among its losses."""
    distiller = Recorder()
    distiller.aux_loss_names = ("loss_other",)
    with pytest.raises(
        RuntimeError, match=r"Recorder declares the auxiliary losses \['loss_other'\], which are not all"
    ):
        KDMetaArch(student=toy_detector(), teacher=Teacher(toy_detector()), distillers={"Recorder": distiller})


def test_losses_of_one_name_are_an_error(toy_detector: type) -> None:
    """Check a second distiller whose losses would overwrite those of the first."""
    distillers = {"a": Recorder(), "b": Recorder()}
    with pytest.raises(UserError, match=r"The distillers a and b both have a loss 'loss_kd': one of them must rename"):
        KDMetaArch(student=toy_detector(), teacher=Teacher(toy_detector()), distillers=distillers)


def test_a_loss_that_curves_leave_out(toy_detector: type, caplog: pytest.LogCaptureFixture) -> None:
    distillers = {"Recorder": Recorder(loss_names=("kd", "loss_kd_aux_size"))}
    with caplog.at_level(logging.WARNING, "kd_d2"):
        KDMetaArch(student=toy_detector(), teacher=Teacher(toy_detector()), distillers=distillers)
    assert [message.partition(",")[0] for message in caplog.messages] == ["The distiller Recorder has a loss 'kd'"]


def test_a_loss_named_like_one_of_the_student_is_an_error(
    toy_detector: type, constant_inputs: Callable, event_storage: EventStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    distiller = Recorder(loss_names=("loss_toy",))
    monkeypatch.setattr(distiller, "forward", lambda *_: {"loss_toy": distiller.own})
    model = KDMetaArch(student=toy_detector(), teacher=Teacher(toy_detector()), distillers={"a": distiller})
    with pytest.raises(RuntimeError, match=r"a returned the losses \['loss_toy'\].* \['loss_toy'\] already exist"):
        model(constant_inputs())


def test_a_loss_that_trains_nothing_is_reported_once(
    toy_detector: type,
    constant_inputs: Callable,
    event_storage: EventStorage,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Check a detached loss; one of 0, as of images without objects, and one of a forward pass without gradients are not."""
    distiller, factor = Recorder(), 0
    monkeypatch.setattr(
        distiller,
        "forward",
        lambda *_: {"loss_kd": factor * distiller.own.detach(), "loss_kd_aux_size": 100 * distiller.own},
    )
    model = KDMetaArch(student=toy_detector(), teacher=Teacher(toy_detector()), distillers={"a": distiller})
    event_storage.iter = 19
    model(constant_inputs())
    factor = 10
    with torch.no_grad():
        model(constant_inputs())
    event_storage.iter = 20  # in which losses are not read
    model(constant_inputs())
    assert caplog.messages == []
    event_storage.iter = 39
    for _ in range(2):
        assert model(constant_inputs())["loss_kd"].item() == 10
    (message,) = caplog.messages
    assert message.startswith("The loss loss_kd of a has no gradient and trains nothing: it is computed from detached")


def test_class_counts_must_agree(toy_detector: type) -> None:
    """Check that the error names both counts and detectors, and that features and an unknown count are accepted."""
    student, teacher = toy_detector(num_classes=3), Teacher(toy_detector(num_classes=80))
    distiller = Recorder(needs=frozenset({"dense"}))
    with pytest.raises(
        UserError, match=r"student \(ToyDetector\) has 3 classes and the teacher \(ToyDetector\) 80.* for a\."
    ):
        KDMetaArch(student=student, teacher=teacher, distillers={"a": distiller})
    KDMetaArch(student=student, teacher=teacher, distillers={"a": Recorder()})
    student.num_classes = None
    with pytest.raises(UserError, match="The distiller a needs dense predictions"):  # the next check
        KDMetaArch(student=student, teacher=teacher, distillers={"a": distiller})


@pytest.mark.parametrize(
    ("student", "teacher", "needs", "whose", "lacks"),
    [
        ("retinanet", "faster", {"dense"}, r"teacher \(GeneralizedRCNN\)", "dense predictions"),
        ("faster", "retinanet", {"dense", "targets"}, r"student \(GeneralizedRCNN\)", "dense predictions"),
        ("panoptic", "fcos", {"anchors", "dense"}, r"student \(PanopticFPN\)", "anchors and dense predictions"),
        ("retinanet", "panoptic", {"anchors", "features"}, r"teacher \(PanopticFPN\)", "anchors"),
    ],
)
def test_needs_must_be_met(
    tiny_detector: Callable, student: str, teacher: str, needs: set[str], whose: str, lacks: str
) -> None:
    """Check that the error names the distiller, the detector and what it lacks; targets are always available."""
    distillers = {"Recorder": Recorder(needs=frozenset(needs))}
    with pytest.raises(UserError, match=f"The distiller Recorder needs {lacks}, which the {whose} "):
        KDMetaArch(student=tiny_detector(student), teacher=Teacher(tiny_detector(teacher)), distillers=distillers)
    met = {"Recorder": Recorder(needs=frozenset(needs - {"dense", "anchors"} | {"targets"}))}
    KDMetaArch(student=tiny_detector(student), teacher=Teacher(tiny_detector(teacher)), distillers=met)


def test_inference_is_the_student_alone(tiny_detector: Callable, make_inputs: Callable) -> None:
    """Check that detections are bitwise those of the student, and that the teacher does not run."""
    student = tiny_detector("retinanet", {"MODEL": {"RETINANET": {"SCORE_THRESH_TEST": 0.0}}})
    teacher = Teacher(tiny_detector("retinanet", seed=1))
    calls: list[None] = []
    teacher.model.backbone.register_forward_hook(lambda *_: calls.append(None))
    model = KDMetaArch(student=student, teacher=teacher, distillers={"a": _imitation((8,), 8, "1x1")}).eval()
    inputs = [{k: v for k, v in x.items() if k != "instances"} for x in make_inputs()]
    with torch.no_grad():
        detections, expected = model(inputs), copy.deepcopy(student)(inputs)
    assert calls == []
    for ours, theirs in zip(detections, expected, strict=True):
        assert len(ours["instances"]) > 10
        assert torch.equal(ours["instances"].pred_boxes.tensor, theirs["instances"].pred_boxes.tensor)
        assert torch.equal(ours["instances"].scores, theirs["instances"].scores)


@pytest.mark.parametrize("kind", ["retinanet", "faster"])
def test_images_without_objects_train(
    tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage, kind: str
) -> None:
    """Check a batch without objects: no box loss, and a gradient for the classifier from the background."""
    strides = (8, 16, 32, 64)
    model = KDMetaArch(
        student=tiny_detector(kind),
        teacher=Teacher(tiny_detector("retinanet", seed=1)),
        distillers={"StructuralKD": _structural(strides, 8)},
    )
    losses = model(make_inputs(counts=(0, 0)))
    assert losses["loss_box_reg"].item() == 0.0
    assert losses["loss_cls"].item() > 0
    assert losses["loss_structural"].item() > 0
    sum(losses.values()).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(g.isfinite().all() for g in grads.values())
    classifier = "student.head.cls_score" if kind == "retinanet" else "student.roi_heads.box_predictor.cls_score"
    assert grads[f"{classifier}.weight"].abs().max() > 0


def test_classes_of_an_image_without_objects_may_be_floats(
    tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage
) -> None:
    student, teacher = tiny_detector("retinanet"), Teacher(tiny_detector("retinanet", seed=1))
    ranks = make(RankMimicking, build_adapter(student).spec, teacher.spec)
    model = KDMetaArch(student=student, teacher=teacher, distillers={"RankMimicking": ranks})
    inputs = make_inputs(counts=(0, 0))
    for x in inputs:
        x["instances"].gt_classes = torch.tensor([])
    assert all(model(inputs)[name].item() == 0 for name in ranks.loss_names)


def test_teacher_records_no_graph(toy_detector: type, constant_inputs: Callable) -> None:
    """Check that the teacher's features require no gradient even if the image does, so that no graph is kept."""
    inputs = constant_inputs()
    inputs[0]["image"].requires_grad_()
    teacher = Teacher(toy_detector())
    assert teacher.adapter.run(inputs, frozenset()).features[4].requires_grad
    assert not teacher(inputs, frozenset({"features"})).features[4].requires_grad


def test_teacher_moves_to_the_students_device(toy_detector: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the teacher moves if the device differs, and only then."""
    teacher = Teacher(toy_detector())
    moves: list[Any] = []
    monkeypatch.setattr(teacher.model, "to", moves.append)
    teacher.to(torch.device("cpu"))
    assert moves == []
    teacher.to(torch.device("meta"))
    assert moves == [torch.device("meta")]


@pytest.fixture
def kd_cfg(tmp_path: Path, tiny_tree: Callable, tiny_detector: Callable) -> Callable[..., Any]:
    """Return a function (teacher kind, KD keys, overrides) that writes a teacher and returns a RetinaNet's config."""

    def build(kind: str, kd: dict[str, Any], student: dict[str, Any] | None = None, teacher: dict | None = None) -> Any:
        def write(name: str, tree: dict[str, Any]) -> str:
            path = tmp_path / name
            # tuples as lists
            path.write_text(yaml.safe_dump(yaml.safe_load(yaml.dump(tree).replace("!!python/tuple", ""))))
            return str(path)

        weights = tmp_path / "teacher.pth"
        torch.save({"model": tiny_detector(kind, teacher, seed=3).state_dict()}, weights)
        tree = tiny_tree("retinanet", student)
        tree["MODEL"] |= {"META_ARCHITECTURE": "KDMetaArch", "KD": {"STUDENT": "RetinaNet", **kd}}
        tree["MODEL"]["KD"]["TEACHER"] = {
            "CONFIG_FILE": write("teacher.yaml", tiny_tree(kind, teacher)),
            "WEIGHTS": str(weights),
        }
        return load_config(write("student.yaml", tree))

    return build


def test_from_config(
    kd_cfg: Callable, tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check that the config determines student, trained teacher, distillers and schedules."""
    kd = {
        "DISTILLERS": ["StructuralKD", "FeatureImitation"],
        "STRUCTURAL": {"START_ITER": 3, "LOSS": "l2"},
        "FEATURE_IMITATION": {"WEIGHT": 2.0, "WARMUP_ITERS": 5, "ADAPTATION": "1x1"},
    }
    model = build_model(kd_cfg("faster", kd))
    assert type(model.student).__name__ == "RetinaNet"
    assert student_of(model) is model.student
    trained = tiny_detector("faster", seed=3).state_dict()
    loaded = model.teacher.model.state_dict()
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    assert not model.teacher.flip_channels
    assert list(model.distillers) == kd["DISTILLERS"]
    structural, imitation = model.distillers.values()
    assert (structural.weight, imitation.weight) == (4.0, 2.0)
    assert structural.adaptation.strides == imitation.adaptation.strides == (8, 16, 32, 64)
    assert model.schedules == {"StructuralKD": Schedule(start=3), "FeatureImitation": Schedule(warmup=5)}
    losses = model(make_inputs())
    assert losses.keys() == {"loss_cls", "loss_box_reg", "loss_structural", "loss_feature_imitation"}
    assert losses["loss_structural"].item() == 0.0
    assert losses["loss_feature_imitation"].item() > 0


def test_from_config_flips_channels_between_formats(kd_cfg: Callable) -> None:
    """Check an RGB student of a BGR teacher."""
    model = build_model(kd_cfg("retinanet", {"DISTILLERS": ["StructuralKD"]}, student={"INPUT": {"FORMAT": "RGB"}}))
    assert model.teacher.flip_channels


def test_from_config_refuses_a_teacher_of_other_classes(kd_cfg: Callable) -> None:
    """Check that class counts are compared when the model is built."""
    teacher = {"MODEL": {"RETINANET": {"NUM_CLASSES": 5}}}
    with pytest.raises(UserError, match=r"student \(RetinaNet\) has 3 classes and the teacher \(RetinaNet\) 5"):
        build_model(kd_cfg("retinanet", {"DISTILLERS": ["StructuralKD", "PFI"]}, teacher=teacher))


def test_features_weighted_by_scores_of_other_classes(
    kd_cfg: Callable, make_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check that FRS without its class loss reads a teacher of other classes, and that with it, like MasKD, it refuses one."""
    teacher = {"MODEL": {"RETINANET": {"NUM_CLASSES": 5}}}
    model = build_model(kd_cfg("retinanet", {"DISTILLERS": ["FRS"], "FRS": {"CLASS_WEIGHT": 0.0}}, teacher=teacher))
    assert model(make_inputs()).keys() == {"loss_cls", "loss_box_reg", "loss_frs_feature"}
    for method in ("FRS", "MasKD"):
        with pytest.raises(UserError, match=f"they must be the same for {method}"):
            build_model(kd_cfg("retinanet", {"DISTILLERS": [method]}, teacher=teacher))


def test_inheritance_without_distillers(kd_cfg: Callable, make_inputs: Callable, event_storage: EventStorage) -> None:
    """Check that neck and head come from the teacher, and that losses and optimizer are those of the student."""
    cfg = kd_cfg("retinanet", {"DISTILLERS": [], "INHERIT": {"ENABLED": True}})
    model = build_model(cfg)
    calls: list[None] = []
    model.teacher.model.backbone.register_forward_hook(lambda *_: calls.append(None))
    start = copy.deepcopy(model.student.state_dict())
    inherit(model.student, model.teacher.model, cfg.MODEL.KD.INHERIT.MODULES)
    source = model.teacher.model.state_dict()
    for name, tensor in model.student.state_dict().items():
        expected = start if component_of(name) == "bottom_up" else source
        assert torch.equal(tensor, expected[name]), name
    assert not torch.equal(start["head.cls_score.weight"], source["head.cls_score.weight"])
    losses = model(make_inputs())
    assert losses.keys() == {"loss_cls", "loss_box_reg"}
    assert calls == []
    optimizer, auxiliary = build_optimizers(cfg, model)
    assert auxiliary == {}
    alone = build_optimizer(cfg, model.student)
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(g["params"]) for g in alone.param_groups]
