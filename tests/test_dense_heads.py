"""CrossKD, BCKD and LD: split dense heads, losses against slow implementations of the definitions, and valid pairs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd_d2 import KDMetaArch, Teacher, UserError
from kd_d2.adapters import IGNORED, DensePredictions, DetectorOutputs, Towers, build_adapter, towers_at
from kd_d2.adapters.other_features import normalized_by_this_batch
from kd_d2.balance import GradientBalance
from kd_d2.distillers import BCKD, DISTILLER_REGISTRY, GID, LD, CrossKD, Distiller, RankMimicking
from kd_d2.distillers.boxes import giou_loss, iou_loss
from kd_d2.distillers.ld import center_penalty, valuable_region
from kd_d2.losses import with_statistics_of
from kd_d2.modeling.assignment import adaptive_thresholds, assign_adaptively

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import CycleBatchNormList
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from helpers import configured, make, scaled, spec_of
from torch import Tensor, nn
from torchvision.ops import box_iou, distance_box_iou, generalized_box_iou

pytestmark = pytest.mark.unit

KINDS = ("retinanet", "fcos", "atss", "gfl", "fsaf")
STRIDES = (8, 16, 32, 64, 128)
WEIGHTS = {
    "retinanet": (1.0, 1.0),
    "fcos": (0.4, 0.75),
    "atss": (1.0, 1.0, 1.0),
    "gfl": (1.0, 4.0),
    "fsaf": (0.4, 0.75),
}
"""The authors' weights for classes, boxes and, if used, centerness; FSAF has those of FCOS."""


@pytest.fixture
def dense(tiny_detector: Callable) -> Callable[..., nn.Module]:
    """Return a function (kind, seed, keys) that builds a detector with two convolutions per tower and varied output."""

    def build(kind: str, seed: int = 0, **keys: Any) -> nn.Module:
        model = tiny_detector(kind, {"MODEL": {kind.upper(): {"NUM_CONVS": 2, **keys}}}, seed)
        torch.manual_seed(seed)
        for module in model.head.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.12)
        nn.init.constant_(model.head.cls_score.bias, -1.0)
        nn.init.constant_(model.head.bbox_pred.bias, 0.5)
        norms = [module for module in model.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():  # so that a teacher's maps, in eval mode, have the magnitude of a student's
            model.backbone(128 * torch.rand(2, 3, 64, 96))
        for norm in norms:
            norm.momentum = 0.1
        return model

    return build


def _read(model: nn.Module, inputs: list[dict], split: int, training: bool = True) -> DetectorOutputs:
    want = frozenset({"dense", towers_at(split)})
    return build_adapter(model).run(inputs, want, [x["instances"] for x in inputs] if training else None)


# ------------------------------------------------------------------------------------------------------- towers


@pytest.mark.parametrize("norm", ["", "GN", "BN"])
@pytest.mark.parametrize("split", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_finished_from_its_own_features(
    dense: Callable, make_inputs: Callable, kind: str, split: int, norm: str
) -> None:
    """Check that the rest of the head gives the head's predictions, and check the features against the layers."""
    model = dense(kind, NORM=norm and "BN").eval()
    if norm == "GN":  # replaces the batch norms, since Detectron2's GN has 32 groups
        for name, module in list(model.head.named_modules()):
            if isinstance(module, CycleBatchNormList):
                model.head.set_submodule(name, nn.GroupNorm(2, 8))
    with torch.no_grad():
        outputs = _read(model, make_inputs(), split, training=False)
    assert list(outputs.towers) == [split]
    towers = outputs.towers[split]
    finished = towers.finish(towers.class_features, towers.box_features)
    for stride in STRIDES:
        assert torch.equal(finished.logits[stride], outputs.dense.logits[stride])
        assert torch.equal(finished.box_regression[stride], outputs.dense.box_regression[stride])
        torch.testing.assert_close(finished.boxes[stride], outputs.dense.boxes[stride])
        assert (finished.quality is None) == (outputs.dense.quality is None) == (kind not in ("fcos", "atss"))
        if finished.quality:
            assert torch.equal(finished.quality[stride], outputs.dense.quality[stride])
    if norm != "BN":  # each level has its own batch norms
        per_block = 3 if norm else 2
        for features, tower in ((towers.class_features, "cls_subnet"), (towers.box_features, "bbox_subnet")):
            layers = getattr(model.head, tower)[: max(per_block * split - 1, 0)]
            for stride, level in features.items():
                assert torch.equal(level, layers(outputs.features[stride]))
                assert split == 0 or (level < 0).any()


@pytest.mark.parametrize("split", [0, 1, 2])
def test_a_head_with_deformable_towers_is_finished_from_its_own_features(
    dense: Callable, make_inputs: Callable, split: int
) -> None:
    """Check cuts before and after the last convolution of each tower, which is deformable."""
    model = dense("fcos", DEFORMABLE_TOWERS=True).eval()
    with torch.no_grad():
        outputs = _read(model, make_inputs(), split, training=False)
    towers = outputs.towers[split]
    finished = towers.finish(towers.class_features, towers.box_features)
    for stride in STRIDES:
        assert torch.equal(finished.logits[stride], outputs.dense.logits[stride])
        assert torch.equal(finished.box_regression[stride], outputs.dense.box_regression[stride])


def test_only_the_cut_that_was_asked_for_is_kept(
    dense: Callable, make_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check two splits in one forward pass, none without a request, and that no hooks remain."""
    model, inputs = dense("retinanet"), make_inputs()
    targets = [x["instances"] for x in inputs]
    assert build_adapter(model).run(inputs, frozenset({"dense"}), targets).towers == {}
    outputs = build_adapter(model).run(inputs, frozenset({"towers/2", "towers/0"}), targets)
    assert outputs.towers.keys() == {0, 2}
    assert outputs.towers[0].class_features == outputs.towers[0].box_features == outputs.features
    assert not any(module._forward_hooks for module in model.modules())


def test_finishing_changes_nothing_of_the_head(dense: Callable, make_inputs: Callable) -> None:
    """Check that gradients reach the features but no parameter, and that the head's modules are unchanged."""
    teacher = Teacher(dense("atss"))
    head = teacher.model.head
    before, modules = copy.deepcopy(head.state_dict()), list(head.modules())
    with torch.no_grad():
        towers = _read(teacher.model, make_inputs(), 1, training=False).towers[1]
    given = [
        {s: x.clone().requires_grad_() for s, x in f.items()} for f in (towers.class_features, towers.box_features)
    ]
    finished = towers.finish(*given)
    sum(x.sum() for part in (finished.logits, finished.boxes, finished.quality) for x in part.values()).backward()
    assert all(x.grad.any() for features in given for x in features.values())
    assert list(head.modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    assert all(p.grad is None for p in teacher.model.parameters())


# --------------------------------------------------------------------------------------------------- statistics


def test_statistics_by_hand() -> None:
    """Check one channel of two images: from mean 2 and deviation sqrt(2) to mean 10 and deviation 3 * sqrt(2)."""
    student = torch.tensor([[[[1.0]]], [[[3.0]]]])
    teacher = torch.tensor([[[[7.0]]], [[[13.0]]]])
    (found,) = with_statistics_of([student], [teacher])
    torch.testing.assert_close(found, teacher, rtol=1e-5, atol=0)
    (found,) = with_statistics_of([student], [-teacher])
    assert found.flatten().tolist() == pytest.approx([-13, -7], rel=1e-5)


def test_statistics_of_several_maps_are_torchs() -> None:
    """Check maps of different channels and sizes against torch, the gradient numerically, and none for the teacher."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 4, 5), (2, 1, 2, 2))
    student, teacher = (
        [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
        for _ in range(2)
    )
    for found, s, t in zip(with_statistics_of(student, teacher), student, teacher, strict=True):
        for channel in range(s.shape[1]):
            ours, theirs = s[:, channel], t[:, channel]
            expected = (ours - ours.mean()) / (ours.std() + 1e-6) * theirs.std() + theirs.mean()
            torch.testing.assert_close(found[:, channel], expected)
    fixed = [t.detach() for t in teacher]
    assert torch.autograd.gradcheck(lambda *maps: tuple(with_statistics_of(maps, fixed)), student)
    sum(x.square().sum() for x in with_statistics_of(student, teacher)).backward()
    assert all(t.grad is None for t in teacher)


def test_statistics_of_what_does_not_vary() -> None:
    """Check a single position, two equal ones, and a constant whose mean is rounded: the teacher's mean, no gradient."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1, 1, 1), (2, 1, 1, 1), (2, 1, 25, 42)):
        student, teacher = torch.full(shape, 1.3, requires_grad=True), torch.randn(shape, generator=generator)
        (found,) = with_statistics_of([student], [teacher])
        (found * teacher).sum().backward()
        torch.testing.assert_close(found, teacher.mean().expand(shape))
        assert not student.grad.any()


def test_statistics_of_a_spread_batch() -> None:
    """Check two workers with one image each, simulated in turn: each gets its part of the whole batch's result."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    (whole,) = with_statistics_of([student], [teacher])
    asked: list[list[Tensor]] = [[], []]

    class Played(Exception):
        pass

    def run(worker: int, sums: list[Tensor]) -> Tensor:
        left = iter(sums)

        def total(value: Tensor) -> Tensor:
            known = next(left, None)
            if known is None:
                asked[worker].append(value)
                raise Played
            return known

        return with_statistics_of([student[worker : worker + 1]], [teacher[worker : worker + 1]], total)[0]

    sums: list[Tensor] = []
    for _ in range(2):
        for worker in range(2):
            with pytest.raises(Played):
                run(worker, sums)
        sums.append(asked[0][-1] + asked[1][-1])
    torch.testing.assert_close(torch.cat([run(worker, sums) for worker in range(2)]), whole)


# ------------------------------------------------------------------------------------------------------ CrossKD


def _slow_boxes(kind: str, numbers: Tensor, anchors: Tensor) -> Tensor:
    """Decode box regression (R, 4) to boxes (R, 4)."""
    center, side = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    if kind in ("fcos", "fsaf"):
        distance = (numbers.clamp(min=0) if kind == "fcos" else numbers) * side[:, :1]
        return torch.cat([center - distance[:, :2], center + distance[:, 2:]], 1)
    scale = {"retinanet": (1, 1), "atss": (10, 5)}[kind]
    center = center + numbers[:, :2] / scale[0] * side
    side = side * (numbers[:, 2:] / scale[1]).clamp(max=math.log(1000 / 16)).exp()
    return torch.cat([center - side / 2, center + side / 2], 1)


def _slow_box_loss(kind: str, numbers: Tensor, expected: Tensor, anchors: Tensor) -> Tensor:
    """Return the box losses (R,) of one level of one image."""
    if kind == "gfl":
        sides = zip(numbers.split(17, 1), expected.split(17, 1), strict=True)
        return sum(F.kl_div(x.log_softmax(1), t.softmax(1), reduction="none").sum(1) for x, t in sides) / 4
    boxes = _slow_boxes(kind, numbers, anchors), _slow_boxes(kind, expected, anchors)
    if kind in ("fcos", "fsaf"):
        loss = torch.full((len(numbers),), -math.log(1e-6), dtype=torch.float64)  # of two empty boxes
        there = torch.stack([(x[:, 2:] > x[:, :2]).all(1) for x in boxes]).any(0)
        for row in there.nonzero()[:, 0]:
            loss[row] = -box_iou(*(x[row, None] for x in boxes))[0, 0].clamp(min=1e-6).log()
        return loss
    return 1 - generalized_box_iou(*boxes).diagonal()


def _slow_head(kind: str, head: nn.Module, split: int, level: int, maps: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Run the rest of the head on a level; return logits, boxes and, if any, centerness: (B, HWA, dim)."""
    layers = (head.cls_subnet, head.bbox_subnet)
    start = max(2 * split - 1, 0)  # convolutions and ReLUs alternate
    class_map, box_map = maps
    for number in range(start, 4):
        class_map, box_map = layers[0][number](class_map), layers[1][number](box_map)
    boxes = head.bbox_pred(box_map)
    if kind in ("atss", "gfl"):
        boxes = boxes * head.scales[level]
    if kind == "fsaf":
        boxes = 4 * boxes.clamp(min=0)
    outputs = [head.cls_score(class_map), boxes]
    if kind in ("fcos", "atss"):
        outputs.append(head.ctrness(box_map))
    anchors = 3 if kind == "retinanet" else 1
    return [x.unflatten(1, (anchors, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in outputs]


def _slow_centerness(student: DetectorOutputs, targets: list[Instances]) -> float:
    """Return the sum of the positives' centerness in their boxes."""
    found = 0.0
    for stride, assignment in student.dense.assignment_by_level.items():
        for image, anchor in (assignment >= 0).nonzero().tolist():
            x, y = student.anchors[stride].get_centers()[anchor].tolist()
            box = targets[image].gt_boxes.tensor[assignment[image, anchor]].tolist()
            left, top, right, bottom = x - box[0], y - box[1], box[2] - x, box[3] - y
            found += math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))
    return found


def _slow_crosskd(
    kind: str,
    head: nn.Module,
    split: int,
    maps: list[dict[int, Tensor]],
    theirs: list[dict[int, Tensor]],
    student: DetectorOutputs,
    targets: list[Instances],
) -> list[Tensor]:
    """Compute the unweighted class, box and centerness losses from the definition, in double precision."""
    assignment = student.dense.assignment_by_level
    positives = max(sum(int((a >= 0).sum()) for a in assignment.values()), 1)
    total = positives if kind != "fcos" else max(_slow_centerness(student, targets), 1)
    classes, boxes, centerness, weights = (torch.zeros((), dtype=torch.float64) for _ in range(4))
    for number, stride in enumerate(STRIDES):
        crossed_maps = []
        for ours, expected in zip(maps, theirs, strict=True):
            s, t = ours[stride], expected[stride]
            aligned = torch.empty_like(s)
            for channel in range(s.shape[1]):
                deviation = s[:, channel].std() + 1e-6
                aligned[:, channel] = (s[:, channel] - s[:, channel].mean()) / deviation * t[:, channel].std()
                aligned[:, channel] += t[:, channel].mean()
            crossed_maps.append(aligned)
        crossed = _slow_head(kind, head, split, number, tuple(crossed_maps))
        target = _slow_head(kind, head, split, number, tuple(x[stride] for x in theirs))
        anchors = student.anchors[stride].tensor.double()
        for image, labels in enumerate(assignment[stride]):
            counts = (labels != IGNORED).double()
            p, t = crossed[0][image].sigmoid(), target[0][image].sigmoid()
            entropy = -t * p.log() - (1 - t) * (1 - p).log()
            classes = classes + (counts[:, None] * (p - t).abs() * entropy).sum()
            weight = counts * t.amax(1)
            weights = weights + weight.sum()
            boxes = boxes + (weight * _slow_box_loss(kind, crossed[1][image], target[1][image], anchors)).sum()
            if len(crossed) > 2:
                p, t = (x[2][image, :, 0].sigmoid() for x in (crossed, target))
                entropy = -t * p.log() - (1 - t) * (1 - p).log()
                centerness = centerness + entropy[labels >= 0].sum()
    divisor = weights.clamp(min=1) if kind == "gfl" else total
    return [classes / total, boxes / divisor, centerness / positives]


@pytest.mark.parametrize("counts", [(3, 2), (0, 1), (0, 0)])
@pytest.mark.parametrize("split", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_crosskd_is_its_definition(
    dense: Callable, make_inputs: Callable, event_storage: EventStorage, kind: str, split: int, counts: tuple
) -> None:
    """Check the losses and the gradients of the student's features against a double-precision implementation."""
    inputs = make_inputs(counts=counts)
    targets = [entry["instances"] for entry in inputs]
    student, teacher = _read(dense(kind), inputs, split), Teacher(dense(kind, seed=1))
    theirs = teacher(inputs, frozenset({"dense", towers_at(split)}))
    both = [[t.class_features, t.box_features] for t in (student.towers[split], theirs.towers[split])]
    ours = [{s: x.detach().requires_grad_() for s, x in features.items()} for features in both[0]]
    student.towers[split] = Towers(*ours, student.towers[split].finish)
    weights = (1.0, 2.0, 3.0 if kind in ("fcos", "atss") else 0.0)
    keys = dict(zip(("class_weight", "box_weight", "centerness_weight"), weights, strict=True))
    losses = make(CrossKD, teacher.spec, split=split, **keys)(student, theirs, targets)
    assert len(losses) == (3 if weights[2] else 2)
    sum(losses.values()).backward()

    slow = [{s: x.detach().double().requires_grad_() for s, x in features.items()} for features in ours]
    given = [{s: x.double() for s, x in features.items()} for features in both[1]]
    expected = _slow_crosskd(kind, copy.deepcopy(teacher.model.head).double(), split, slow, given, student, targets)
    for name, weight, value in zip(losses, weights, expected):
        assert losses[name].item() == pytest.approx(weight * value.item(), rel=1e-4, abs=1e-6), name
    sum(weight * value for weight, value in zip(weights, expected, strict=True)).backward()
    for found, right in zip(ours, slow, strict=True):
        for stride in STRIDES:
            # the coarsest level has two or three positions, whose standardized values hardly depend on the features
            scale = max(float(right[s].grad.abs().max()) for s in STRIDES)
            torch.testing.assert_close(found[stride].grad.double(), right[stride].grad, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_crosskds_gradient_reaches_the_student_alone(
    dense: Callable, tiny_cfg: Callable, make_inputs: Callable, event_storage: EventStorage, kind: str
) -> None:
    """Check gradients before the split and none after it, and an unchanged teacher, including its batch norms."""
    student, teacher = dense(kind), Teacher(dense(kind, seed=1))
    before = copy.deepcopy(teacher.model.state_dict())
    distiller = configured(CrossKD, tiny_cfg(kind), build_adapter(student).spec, teacher.spec)
    model = KDMetaArch(student=student, teacher=teacher, distillers={"CrossKD": distiller})
    losses = model(make_inputs())
    sum(losses[name] for name in distiller.loss_names).backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    for name in ("backbone.fpn_output3.weight", "head.cls_subnet.0.weight", "head.bbox_subnet.0.weight"):
        assert gradients[name].any(), name
    assert gradients["head.cls_subnet.2.weight"] is None and gradients["head.cls_score.weight"] is None
    assert all(p.grad is None for p in teacher.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())


def test_a_student_may_end_in_another_head(
    dense: Callable, tiny_cfg: Callable, make_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check an ATSS student with a GFL teacher, which has the same anchors: the box loss compares distributions."""
    student, teacher = dense("atss"), Teacher(dense("gfl", seed=1))
    distiller = configured(CrossKD, tiny_cfg("atss"), build_adapter(student).spec, teacher.spec)
    losses = KDMetaArch(student=student, teacher=teacher, distillers={"CrossKD": distiller})(make_inputs())
    assert distiller.box_loss == "distributions" and losses["loss_crosskd_box"] > 0


def test_levels_may_have_any_order(tiny_detector: Callable, make_inputs: Callable, event_storage) -> None:
    """Check methods that compare anchors by index, with heads that read their levels from fine to coarse or reversed."""

    def build(kind: str, seed: int) -> nn.Module:
        model = tiny_detector(kind, seed=seed)
        nn.init.normal_(model.head.cls_score.weight, std=0.3)
        nn.init.normal_(model.head.bbox_pred.weight, std=0.1)
        return model

    def losses(student: nn.Module, teacher: Teacher) -> dict[str, float]:
        specs = build_adapter(student).spec, teacher.spec
        methods = {m.__name__: make(m, *specs) for m in (GID, RankMimicking, CrossKD)}
        model = KDMetaArch(student=student, teacher=teacher, distillers=methods)
        return {name: loss.item() for name, loss in model(make_inputs()).items()}

    ascending, reverse = "retinanet", "reversed retinanet"
    expected = losses(build(ascending, 0), Teacher(build(ascending, 1)))
    for ours, theirs in ((ascending, reverse), (reverse, ascending), (reverse, reverse)):
        assert losses(build(ours, 0), Teacher(build(theirs, 1))) == pytest.approx(expected, rel=1e-4)


def test_outputs_are_in_ascending_order_of_stride(
    tiny_detector: Callable, make_inputs: Callable, event_storage
) -> None:
    """Check FCOS with reversed levels, whose first and last have open ranges of sizes: losses remain its own."""
    model = tiny_detector("fcos")
    model.head_in_features.reverse()
    model.anchor_generator.strides.reverse()
    model.anchor_generator.cell_anchors._buffers.update(
        zip("01234", [*model.anchor_generator.cell_anchors][::-1], strict=True)
    )
    inputs = make_inputs(sizes=((192, 256), (224, 192)), counts=(6, 5))
    expected = copy.deepcopy(model)(inputs)
    outputs = _read(model, inputs, 1)
    for name, loss in outputs.losses.items():
        torch.testing.assert_close(loss, expected[name])
    dense, towers = outputs.dense, outputs.towers[1]
    finished = towers.finish(towers.class_features, towers.box_features)
    levels = [outputs.features, outputs.anchors, towers.class_features, towers.box_features]
    levels += [dense.logits, dense.box_regression, dense.anchors, dense.quality, dense.assignment_by_level]
    assert all(tuple(by_stride) == STRIDES for by_stride in [*levels, finished.logits, finished.anchors])
    torch.testing.assert_close(finished.boxes, dense.boxes)
    assert dense.positives.anchor.tolist() == (dense.assignment >= 0).nonzero()[:, 1].tolist() != []
    centers = Boxes.cat([*dense.anchors.values()]).get_centers()[dense.positives.anchor]
    boxes = dense.positives.ground_truth([x["instances"] for x in inputs])[1]
    assert ((centers > boxes[:, :2]) & (centers < boxes[:, 2:])).all()
    targets = [x["instances"] for x in inputs]
    with normalized_by_this_batch(model):
        own = build_adapter(model).run(inputs, frozenset({"features", "losses"}), targets)
    for name, loss in own.losses_of(own.features, targets).items():
        torch.testing.assert_close(loss, own.losses[name])


# -------------------------------------------------------------------------------------------------------- BCKD


def _bckd_outputs(values: dict[str, Tensor], who: str) -> DetectorOutputs:
    """Return outputs whose box regression is the boxes themselves."""
    logits, boxes = ({s: values[f"{who}_{kind}.{s}"] for s in (8, 16, 32)} for kind in ("logits", "boxes"))
    anchors = {s: Boxes(torch.zeros(x.shape[1], 4)) for s, x in boxes.items()}
    labels = torch.cat([values[f"labels.{s}"] for s in (8, 16, 32)], 1)
    dense = DensePredictions(logits, boxes, anchors, lambda regression, anchors: regression, assign=lambda: labels)
    return DetectorOutputs(images=None, features={}, dense=dense)


def test_bckd_of_the_program() -> None:
    """Check both losses and their gradients against those of the authors' program, on levels that all have positives."""
    with np.load(Path(__file__).parent / "fixtures" / "methods" / "bckd.npz") as arrays:
        values = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    leaves = {
        key: value.requires_grad_()
        for key, value in values.items()
        if key.startswith(("student_logits", "student_boxes"))
    }
    spec = spec_of({8: 4, 16: 4, 32: 4}, provides=frozenset({"dense", "targets"}))
    bckd = make(BCKD, spec)
    losses = scaled(bckd, _bckd_outputs(values, "student"), _bckd_outputs(values, "teacher"), [])
    assert losses["loss_bckd_class"].item() == pytest.approx(values["loss_class"].item(), rel=1e-5)
    assert losses["loss_bckd_box"].item() == pytest.approx(values["loss_box"].item(), rel=1e-5)
    sum(losses.values()).backward()
    for key, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, values[key.replace("student", "grad")], rtol=1e-4, atol=1e-6)
    alone = scaled(
        make(BCKD, spec, box_weight=0.0), _bckd_outputs(values, "student"), _bckd_outputs(values, "teacher"), []
    )
    assert alone.keys() == {"loss_bckd_class"} and alone["loss_bckd_class"] == losses["loss_bckd_class"]


def test_bckd_by_hand() -> None:
    """Check two anchors, of which one is ignored, without positives."""
    values = {
        "labels.8": torch.tensor([[-1, -2]]),
        "student_logits.8": torch.zeros(1, 2, 1),
        "teacher_logits.8": torch.full((1, 2, 1), math.log(3)),
    }
    values |= {
        "student_boxes.8": torch.tensor([[[0.0, 0, 2, 2], [0, 0, 1, 1]]]),
        "teacher_boxes.8": torch.tensor([[[0.0, 0, 2, 4], [5, 5, 6, 6]]]),
    }
    for s in (16, 32):
        values |= {f"labels.{s}": torch.zeros(1, 0, dtype=torch.int64)}
        values |= {
            f"{who}_{kind}.{s}": torch.zeros(1, 0, n)
            for who in ("student", "teacher")
            for kind, n in (("logits", 1), ("boxes", 4))
        }
    bckd = make(BCKD, spec_of({8: 4, 16: 4, 32: 4}, provides=frozenset({"dense", "targets"})), class_weight=2.0)
    losses = bckd(_bckd_outputs(values, "student"), _bckd_outputs(values, "teacher"), [])
    # p_T = 3/4 and p_S = 1/2: the cross-entropy is log 2; the boxes overlap by half
    assert losses["loss_bckd_class"].item() == pytest.approx(2 * 0.25 * math.log(2))
    assert losses["loss_bckd_box"].item() == pytest.approx(4 * 0.25 * 0.5)


def test_box_losses_are_torchvisions() -> None:
    """Check GIoU and IoU losses of distant and near boxes with gradients, and that empty boxes have finite ones."""
    generator = torch.Generator().manual_seed(0)
    corners, sides = torch.rand(2, 2, 30, 2, generator=generator) * torch.tensor([20.0]).view(1, 1, 1, 1)
    boxes, targets = torch.cat([corners, corners + sides + 1], 2).unbind()
    ours, theirs = boxes.clone().requires_grad_(), boxes.double().requires_grad_()
    expected = (
        1 - generalized_box_iou(theirs, targets.double()).diagonal(),
        -box_iou(theirs, targets.double()).diagonal().clamp(min=1e-6).log(),
    )
    assert (expected[1] > 10).any() and (expected[1] < 2).any()
    for loss, value in zip((giou_loss, iou_loss), expected, strict=True):
        found = loss(ours, targets)
        torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-5)
        (gradient,), (exact,) = torch.autograd.grad(found.sum(), ours), torch.autograd.grad(value.sum(), theirs)
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-6)
    empty = torch.full((1, 4), 3.0)
    for loss in (giou_loss, iou_loss):
        for target in (empty, boxes[:1]):
            moved = empty.clone().requires_grad_()
            value = loss(moved, target).sum()
            value.backward()
            assert value.isfinite() and moved.grad.isfinite().all()


# ----------------------------------------------------------------------------------------------------------- LD


def _slow_ld(
    student: DetectorOutputs, teacher: DetectorOutputs, picked: list[tuple[int, int, float]], tau: float
) -> Tensor:
    """Compute LD over a region, given as (image, anchor, weight), in double precision."""
    sides = [torch.cat(list(x.dense.box_regression.values()), 1).double() for x in (student, teacher)]
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for image, anchor, weight in picked:
        weights += weight
        for side in range(4):
            s, t = (x[image, anchor, 17 * side : 17 * (side + 1)] / tau for x in sides)
            total = total + weight * tau**2 * F.kl_div(s.log_softmax(0), t.softmax(0), reduction="sum") / 17
    return total / 4 / max(weights, 1)


def _slow_region(anchors: Tensor, boxes: Tensor, thresholds: Tensor) -> dict[int, float]:
    """Return the weight of each anchor in the valuable localization region of an image."""
    region: dict[int, float] = {}
    overlaps, distances = box_iou(boxes, anchors), distance_box_iou(boxes, anchors)
    for box, threshold in enumerate(thresholds.flatten().tolist()):
        for anchor in range(len(anchors)):
            if 0.25 * threshold <= distances[box, anchor] < threshold:
                region[anchor] = max(region.get(anchor, 0.0), float(overlaps[box, anchor]))
    return region


@pytest.mark.parametrize("counts", [(3, 2), (0, 1), (0, 0)])
def test_ld_is_its_definition(
    dense: Callable, make_inputs: Callable, event_storage: EventStorage, counts: tuple
) -> None:
    """Check the losses of both regions and of class logits, and their gradients, against double precision."""
    inputs = make_inputs(counts=counts)
    targets = [x["instances"] for x in inputs]
    model, teacher = dense("gfl"), Teacher(dense("gfl", seed=1))
    student, theirs = _read(model, inputs, 0), teacher(inputs, frozenset({"dense"}))
    for part in (student.dense.logits, student.dense.box_regression):
        for stride in part:
            part[stride] = part[stride].detach().requires_grad_()
    losses = make(LD, teacher.spec, valuable_weight=0.5, class_weight=10.0)(student, theirs, targets)
    assert list(losses) == ["loss_ld", "loss_ld_valuable", "loss_ld_class"]
    leaves = [*student.dense.logits.values(), *student.dense.box_regression.values()]
    found = torch.autograd.grad(sum(losses.values()), leaves, allow_unused=True, materialize_grads=True)

    logits = [torch.cat(list(x.dense.logits.values()), 1).double() for x in (student, theirs)]
    labels = student.dense.assignment
    positives = [(i, int(a)) for i in range(2) for a in (labels[i] >= 0).nonzero()]
    assert bool(positives) == (sum(counts) > 0)
    main = [(i, a, logits[0][i, a].sigmoid().max().item()) for i, a in positives]
    levels = list(student.anchors.values())
    valuable = []
    for image, target in enumerate(targets):
        if len(target):
            thresholds = adaptive_thresholds(levels, target.gt_boxes)[2]
            region = _slow_region(Boxes.cat(levels).tensor, target.gt_boxes.tensor, thresholds)
            valuable += [(image, anchor, weight) for anchor, weight in region.items()]
    assert bool(valuable) == (sum(counts) > 0)
    classes = torch.zeros((), dtype=torch.float64)
    for image, anchor in positives:
        s, t = (x[image, anchor] / 2 for x in logits)
        classes = classes + 4 * F.kl_div(s.log_softmax(0), t.softmax(0), reduction="sum") / 3
    expected = [
        0.25 * _slow_ld(student, theirs, main, 10.0),
        0.5 * _slow_ld(student, theirs, valuable, 10.0),
        10 * classes / max(len(positives), 1),
    ]
    for name, value in zip(losses, expected, strict=True):
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-7), name
    right = torch.autograd.grad(
        sum(expected) + sum(x.sum() * 0 for x in leaves).double(), leaves, materialize_grads=True
    )
    for ours, slow in zip(found, right, strict=True):
        torch.testing.assert_close(ours, slow, rtol=1e-3, atol=1e-6)


def test_valuable_region_lies_around_the_positives(dense: Callable, make_inputs: Callable) -> None:
    """Check that the region has unassigned anchors, weights between 0 and the IoU, and is empty without boxes."""
    model = dense("gfl")
    levels = model.anchor_generator([torch.zeros(1, 8, -(-96 // s), -(-96 // s)) for s in STRIDES])
    boxes = Boxes(torch.tensor([[10.0, 12.0, 70.0, 80.0], [30.0, 30.0, 90.0, 85.0]]))
    weight_R = valuable_region(levels, boxes)
    assignment_R = assign_adaptively(levels, boxes)
    assert ((weight_R > 0) & (assignment_R < 0)).sum() > 10
    assert weight_R.min() >= 0 and weight_R.max() <= 1
    overlap_R = pairwise_iou(boxes, Boxes.cat(levels)).amax(0)
    assert (weight_R <= overlap_R).all()
    nothing = valuable_region(levels, Boxes(torch.zeros(0, 4)))
    assert nothing.shape == weight_R.shape and not nothing.any()


def test_valuable_region_by_hand() -> None:
    """Check squares of side 4, 8 and 16 around the center of a box of side 8, with IoU 1/4, 1 and 1/4, and one far away."""
    squares = [[-x, -x, x, x] for x in (2.0, 4.0, 8.0)]
    levels = [Boxes(torch.tensor([square])) for square in squares] + [Boxes(torch.tensor([[90.0, 90, 98, 98]]))]
    box = Boxes(torch.tensor([squares[1]]))
    # mean 3/8 and deviation sqrt((2 / 64 + 25 / 64 + 9 / 64) / 3) = 0.433: threshold 0.808
    assert valuable_region(levels, box).tolist() == [0.25, 0, 0.25, 0]
    # the only candidate has the threshold itself, so it is not below it
    assert valuable_region(levels[:1], box).tolist() == [0]


def test_valuable_region_has_as_many_candidates_as_configured() -> None:
    """Check IoUs of 1 and of 4/8 for anchors at a distance of 4: thresholds of 1 and of 0.75 + 0.354."""
    level = Boxes(torch.tensor([[0.0, 0, 8, 8], [0.0, 4, 8, 8]]))
    box = level[0]
    assert valuable_region([level], box, candidates=1).tolist() == [0, 0.5]
    assert valuable_region([level], box, candidates=2).tolist() == [1, 0.5]


def test_center_penalty_is_torchvisions() -> None:
    generator = torch.Generator().manual_seed(0)
    corners, sides = torch.rand(2, 9, 2, generator=generator) * 20
    boxes = torch.cat([corners, corners + sides + 1], 1)
    expected = box_iou(boxes[:4], boxes) - distance_box_iou(boxes[:4], boxes)
    torch.testing.assert_close(center_penalty(Boxes(boxes[:4]), Boxes(boxes)), expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------- the first version of FCOS

FIRST_FCOS = {"BOX_ACTIVATION": "exp", "LEVEL_SCALES": True, "CENTERNESS_TOWER": "class"}


def test_boxes_and_centerness_of_the_first_fcos(dense: Callable, make_inputs: Callable) -> None:
    """Check boxes, in pixels, and centerness with a different scale for each level, and what the rest of the head predicts."""
    model = dense("fcos", **FIRST_FCOS).eval()
    scales = torch.tensor([0.5, 0.7, 0.9, 1.1, 1.3])
    model.head.scales.data.copy_(scales)
    with torch.no_grad():
        outputs = _read(model, make_inputs(), 1, training=False)
        towers = outputs.towers[1]
        finished = towers.finish(towers.class_features, towers.box_features)
        for stride, scale in zip(STRIDES, scales, strict=True):
            level = outputs.features[stride]
            centerness = model.head.ctrness(model.head.cls_subnet(level)).flatten(2).transpose(1, 2)
            torch.testing.assert_close(outputs.dense.quality[stride], centerness)
            logarithms = model.head.bbox_pred(model.head.bbox_subnet(level)).flatten(2).transpose(1, 2) * scale
            left, top, right, bottom = logarithms.exp().unbind(-1)
            x, y = outputs.anchors[stride].get_centers().unbind(-1)
            expected = torch.stack([x - left, y - top, x + right, y + bottom], -1)
            torch.testing.assert_close(outputs.dense.boxes[stride], expected)
            assert torch.equal(finished.box_regression[stride], outputs.dense.box_regression[stride])
            assert torch.equal(finished.quality[stride], outputs.dense.quality[stride])


def test_losses_of_both_versions_of_fcos(dense: Callable, make_inputs: Callable, event_storage: EventStorage) -> None:
    """Check that they are equal for the same distances, given in strides or as logarithms in pixels."""
    targets = [x["instances"] for x in make_inputs()]
    torch.manual_seed(0)
    cells = [torch.empty(1, 1, 64 // stride or 1, 96 // stride or 1) for stride in STRIDES]
    sizes = [cell.numel() for cell in cells]
    logits, centerness = ([torch.randn(2, size, dim) for size in sizes] for dim in (3, 1))
    distances = [0.5 + 3 * torch.rand(2, size, 4) for size in sizes]
    losses = []
    for keys, regression in (
        ({}, distances),
        ({"BOX_ACTIVATION": "exp"}, [(d * stride).log() for d, stride in zip(distances, STRIDES, strict=True)]),
    ):
        model = dense("fcos", **keys)
        anchors = model.anchor_generator(cells)
        labels, boxes = model.label_anchors(anchors, targets)
        losses.append(model.losses(anchors, logits, labels, regression, boxes, centerness))
    assert losses[0].keys() == losses[1].keys()
    for name in losses[0]:
        torch.testing.assert_close(losses[0][name], losses[1][name])
    assert losses[0]["loss_fcos_loc"] > 0.01


# ----------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("counts", [(3, 2), (0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_with_every_loss(
    dense: Callable, tiny_cfg: Callable, make_inputs: Callable, event_storage: EventStorage, kind: str, counts: tuple
) -> None:
    """Check finite losses and gradients, with and without balancing, for images with several objects, one and none."""
    keys = {"LD": {"VALUABLE_WEIGHT": 0.25, "CLASS_WEIGHT": 10.0}}
    student, teacher = dense(kind), Teacher(dense(kind, seed=1))
    specs = build_adapter(student).spec, teacher.spec
    methods = (CrossKD, BCKD, LD) if kind == "gfl" else (CrossKD, BCKD)
    cfg = tiny_cfg(kind, {"MODEL": {"KD": keys}})
    distillers = {m.__name__: configured(m, cfg, *specs) for m in methods}
    balance = GradientBalance(target=0.5, period=10, momentum=0.9, limit=100.0, weights={})
    for each in (None, balance):
        model = KDMetaArch(student=student, teacher=teacher, distillers=distillers, balance=each)
        student.zero_grad()
        losses = model(make_inputs(counts=counts))
        sum(losses.values()).backward()
        assert {n for d in distillers.values() for n in d.loss_names} <= losses.keys()
        assert all(loss.isfinite() for loss in losses.values())
        assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
    assert 0 < balance.ratios["CrossKD"] < math.inf


def test_a_student_of_the_first_fcos(
    dense: Callable, tiny_cfg: Callable, make_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check that CrossKD and BCKD, which compare boxes, accept a teacher with boxes in other units, and their gradient."""
    student, teacher = dense("fcos", LEVEL_SCALES=True), Teacher(dense("fcos", seed=1, **FIRST_FCOS))
    specs = build_adapter(student).spec, teacher.spec
    distillers = {m.__name__: configured(m, tiny_cfg("fcos"), *specs) for m in (CrossKD, BCKD)}
    losses = KDMetaArch(student=student, teacher=teacher, distillers=distillers)(make_inputs())
    sum(losses[name] for distiller in distillers.values() for name in distiller.loss_names).backward()
    for parameter in (student.head.scales, student.head.bbox_pred.weight, student.head.cls_score.weight):
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["gfl", "retinanet"])
def test_equal_detectors_agree(
    dense: Callable, tiny_cfg: Callable, make_inputs: Callable, event_storage, kind: str
) -> None:
    """Check that all losses are zero between a detector and its copy."""
    student = dense(kind).eval()
    teacher = Teacher(copy.deepcopy(student))
    specs = build_adapter(student).spec, teacher.spec
    methods = (CrossKD, BCKD, LD) if kind == "gfl" else (CrossKD, BCKD)
    distillers = {m.__name__: configured(m, tiny_cfg(kind), *specs) for m in methods}
    model = KDMetaArch(student=student, teacher=teacher, distillers=distillers)
    model.training = True  # batch norms stay in eval mode
    losses = model(make_inputs())
    for name in (n for d in distillers.values() for n in d.loss_names):
        assert losses[name].item() == pytest.approx(0, abs=1e-3), name


# ---------------------------------------------------------------------------------------------- valid pairs and keys


@pytest.fixture
def build(tiny_cfg: Callable, tiny_detector: Callable) -> Callable[..., Distiller]:
    """Return a function (method, kind, NUM_CONVS of both, keys) that builds a distiller for two such detectors."""

    def build(
        method: type[Distiller], kind: str = "gfl", convolutions: tuple[int, int] = (4, 4), **keys: Any
    ) -> Distiller:
        cfg = tiny_cfg(kind, {"MODEL": {"KD": {method.CONFIG_NODE: keys}}})
        models = (tiny_detector(kind, {"MODEL": {kind.upper(): {"NUM_CONVS": n}}}) for n in convolutions)
        return configured(method, cfg, *(build_adapter(model).spec for model in models))

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_crosskds_defaults_are_the_authors(build: Callable, kind: str) -> None:
    """Check weights, box loss and the split of four convolutions: after the third, for FCOS and FSAF the second."""
    distiller = build(CrossKD, kind)
    assert tuple(distiller.weights.values()) == WEIGHTS[kind]
    assert distiller.box_loss == {"gfl": "distributions", "fcos": "iou", "fsaf": "iou"}.get(kind, "giou")
    split = 2 if kind in ("fcos", "fsaf") else 3
    assert (distiller.split, distiller.needs) == (split, {"dense", "targets", f"towers/{split}"})
    assert ("loss_crosskd_centerness" in distiller.loss_names) == (kind == "atss")
    assert build(CrossKD, kind, (1, 1)).split == 0


def test_crosskds_keys(build: Callable) -> None:
    """Check WEIGHT and each loss's weight, a split after the last convolution, and that the shorter head decides."""
    keys = {"WEIGHT": 2.0, "CLASS_WEIGHT": 3.0, "BOX_WEIGHT": 0.5, "CENTERNESS_WEIGHT": 0.25}
    distiller = build(CrossKD, "fcos", SPLIT=4, **keys)
    assert (distiller.weight, [*distiller.weights.values()], distiller.split) == (2.0, [3.0, 0.5, 0.25], 4)
    assert distiller.loss_names[-1] == "loss_crosskd_centerness"
    assert build(CrossKD, "gfl", (2, 4)).split == build(CrossKD, "gfl", (4, 2)).split == 1


def test_lds_defaults_and_keys(build: Callable) -> None:
    """Check the authors' temperature and main-region weight, and that weights enable the other losses."""
    ld = build(LD)
    assert (ld.weights, ld.config.temperature, ld.loss_names) == ({"loss_ld": 0.25}, 10.0, ("loss_ld",))
    keys = {
        "VALUABLE_WEIGHT": 0.25,
        "CLASS_WEIGHT": 10.0,
        "TEMPERATURE": 5.0,
        "CLASS_TEMPERATURE": 3.0,
        "CANDIDATES": 4,
    }
    ld = build(LD, WEIGHT=2.0, MAIN_WEIGHT=1.0, **keys)
    assert (ld.weight, [*ld.weights.values()]) == (2, [1, 0.25, 10])
    assert (ld.config.temperature, ld.config.class_temperature, ld.config.candidates) == (5.0, 3.0, 4)
    assert ld.loss_names == ("loss_ld", "loss_ld_valuable", "loss_ld_class")


@pytest.mark.parametrize(
    ("method", "student", "teacher", "sentence"),
    [
        ("LD", "retinanet", "gfl", r"LD needs distributions of box sides, which the student \(RetinaNet\) does not have\."),
        ("LD", "gfl", "atss", r"LD needs distributions of box sides, which the teacher \(ATSS\) does not have\."),
        ("CrossKD", "retinanet", "reppoints", r"CrossKD needs a dense head with two convolutional towers, which the teacher \(RepPoints\) does"),
        ("CrossKD", "faster", "retinanet", r"CrossKD needs dense predictions and a dense head .* which the student \(GeneralizedRCNN\)"),
        ("CrossKD", "retinanet", "atss", r"CrossKD compares predictions anchor by anchor, but at stride 8 the student \(RetinaNet\)"),
        ("LD", "gfl", "other gfl", r"the student \(GFL\) have 17 bins and those of the teacher \(GFL\) 9: their REG_MAX must be"),
        ("GID", "atss", "gfl", r"GID compares box regression, which the student \(ATSS\) and the teacher \(GFL\) encode differently"),
        ("CrossKD", "gfl", "wide gfl", r"at MODEL.KD.CROSSKD.SPLIT 0 the student \(GFL\) has 8 channels and the teacher \(GFL\) 16\."),
    ],
)  # fmt: skip
def test_pairs_that_cannot_are_told_in_a_sentence(
    tiny_detector: Callable, tiny_cfg: Callable, method: str, student: str, teacher: str, sentence: str
) -> None:
    """Check that the error names the method, what is missing or differs, and the detectors."""
    keys = {"other gfl": {"GFL": {"REG_MAX": 8}}, "wide gfl": {"FPN": {"OUT_CHANNELS": 16}}}.get(teacher, {})
    student, teacher = tiny_detector(student), Teacher(tiny_detector(teacher.split()[-1], {"MODEL": keys}))
    specs = build_adapter(student).spec, teacher.spec
    with pytest.raises(UserError, match=sentence):
        distillers = {method: configured(DISTILLER_REGISTRY.get(method), tiny_cfg("gfl"), *specs)}
        KDMetaArch(student=student, teacher=teacher, distillers=distillers)


def test_heads_of_other_depth_must_agree_at_the_cut(build: Callable) -> None:
    """Check a SPLIT beyond the depth of one of the two heads."""
    with pytest.raises(
        UserError, match=r"SPLIT is 3, but the towers of the student \(GFL\) have 2 .* teacher \(GFL\) 4\."
    ):
        build(CrossKD, "gfl", (2, 4), SPLIT=3)


def test_a_centerness_that_is_not_there(build: Callable) -> None:
    with pytest.raises(
        UserError, match=r"CROSSKD\.CENTERNESS_WEIGHT is 1\.0, but the teacher \(GFL\) has no centerness"
    ):
        build(CrossKD, "gfl", CENTERNESS_WEIGHT=1.0)


def test_lds_class_loss_needs_two_classes() -> None:
    spec = spec_of({8: 8}, num_classes=1)
    with pytest.raises(UserError, match=r"MODEL\.KD\.LD\.CLASS_WEIGHT is 10\.0, but with one class"):
        make(LD, spec, class_weight=10.0)
    assert make(LD, spec).loss_names == ("loss_ld",)


def _convolution() -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1)


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.Sequential(_convolution(), nn.ReLU())],
        lambda: [_convolution(), nn.SiLU()],
        lambda: [nn.ReLU(), _convolution()],
        lambda: [],
    ],
    ids=["blocks", "SiLU", "ReLU first", "empty"],
)
def test_other_towers_are_not_split(
    tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage, layers: Callable
) -> None:
    """Check that a head with such towers is read otherwise, and that CrossKD refuses it."""
    model, teacher = tiny_detector("retinanet"), Teacher(tiny_detector("retinanet"))
    for name in ("cls_subnet", "bbox_subnet"):
        setattr(model.head, name, nn.Sequential(*layers()))
    assert build_adapter(model).spec.tower_channels is None
    assert _read(model, make_inputs(), 0).losses
    crosskd = make(CrossKD, build_adapter(model).spec, teacher.spec)
    with pytest.raises(UserError, match="needs a dense head with two convolutional towers, which the student"):
        KDMetaArch(student=model, teacher=teacher, distillers={"CrossKD": crosskd})


def test_towers_with_common_layers_are_not_split(tiny_detector: Callable) -> None:
    model = tiny_detector("retinanet")
    model.head.bbox_subnet = nn.Sequential(*model.head.cls_subnet)
    assert build_adapter(model).spec.tower_channels is None
    model.head.bbox_subnet = model.head.cls_subnet
    assert build_adapter(model).spec.tower_channels is None


def test_heads_that_are_read_otherwise_have_no_towers(tiny_detector: Callable) -> None:
    """Check a head whose towers differ, and one that overrides `forward`."""
    model = tiny_detector("retinanet")
    spec = build_adapter(model).spec
    assert spec.tower_channels == (8, 8) and "towers/1" in spec.provides and "towers/2" not in spec.provides
    model.head.bbox_subnet = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU())
    assert build_adapter(model).spec.tower_channels is None
    model = tiny_detector("retinanet")
    model.head.__class__ = type("OtherHead", (type(model.head),), {"forward": lambda self, features: None})
    assert "towers" not in build_adapter(model).spec.provides


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        (BCKD, "BOX_WEIGHT", -1.0),
        (CrossKD, "SPLIT", -1),
        (CrossKD, "SPLIT", 1.5),
        (CrossKD, "SPLIT", True),
        (CrossKD, "CLASS_WEIGHT", -1.0),
        (CrossKD, "BOX_WEIGHT", "four"),
        (CrossKD, "CENTERNESS_WEIGHT", float("nan")),
        (LD, "TEMPERATURE", 0.0),
        (LD, "CLASS_TEMPERATURE", -2.0),
        (LD, "MAIN_WEIGHT", -0.25),
        (LD, "VALUABLE_WEIGHT", float("inf")),
        (LD, "CLASS_WEIGHT", -10.0),
        (LD, "CANDIDATES", 0),
    ],
)
def test_wrong_values_name_their_key(build: Callable, method: type[Distiller], key: str, value: object) -> None:
    """Check that the error names the key and the value."""
    with pytest.raises(UserError, match=rf"MODEL\.KD\.{method.CONFIG_NODE}\.{key} is {value!r}"):
        build(method, **{key: value})
