"""Rank Mimicking, Prediction-guided Feature Imitation and soft labels: hand-worked equations, gradients, detectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from kd_d2.adapters import (
    BACKGROUND,
    IGNORED,
    DensePredictions,
    DetectorOutputs,
    DetectorSpec,
    Positives,
    build_adapter,
)
from kd_d2.distillers import PFI, Distiller, RankMimicking, SoftLabel
from kd_d2.errors import UserError
from kd_d2.losses import (
    count_ranked,
    prediction_difference,
    prediction_guided_loss,
    quality_focal_loss,
    rank_kl_loss,
    relative_to_mean,
    soft_label_loss,
    weighted_imitation_loss,
)
from kd_d2.meta_arch import KDMetaArch
from kd_d2.teacher import Teacher

import pytest
import torch
from detectron2.structures import Boxes, Instances
from helpers import configured, make, scaled, spec_of, targets_of
from torch import Tensor

pytestmark = pytest.mark.unit

DENSE = frozenset({"features", "anchors", "dense", "targets"})


def _spec(**changes: Any) -> DetectorSpec:
    """Build a spec with four channels at stride 8 and one anchor centered at (0, 0)."""
    return spec_of(
        **{"channels": {8: 4}, "cell_anchors": {8: torch.tensor([[-4.0, -4, 4, 4]])}, "provides": DENSE, **changes}
    )


NARROW = _spec(channels={8: 1, 16: 1})
METHODS = {"RANK_MIMICKING": RankMimicking, "PFI": PFI, "SOFT_LABEL": SoftLabel}
# The student ranks two candidates equally, the teacher gives one three times the share of the other.
EQUAL, THREE_TO_ONE = [0.0, 0.0], [math.log(3), 0.0]
DIVERGENCE = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _rank(student: list[float], teacher: list[float], instances: list[int], **options: Any) -> float:
    return rank_kl_loss(torch.tensor(student), torch.tensor(teacher), torch.tensor(instances), **options).item()


def test_rank_of_one_instance_by_hand() -> None:
    """Check equations 5 and 6, and that a constant added to all scores of an instance changes nothing."""
    assert _rank(EQUAL, THREE_TO_ONE, [0, 0]) == pytest.approx(DIVERGENCE, rel=1e-6)
    assert _rank([5.0, 5.0], [x - 2 for x in THREE_TO_ONE], [7, 7]) == pytest.approx(DIVERGENCE, rel=1e-5)


def test_rank_is_the_mean_over_instances_that_have_one() -> None:
    """Check two interleaved instances, and a third with one positive, which adds nothing and is not counted."""
    student = [EQUAL[0], 1.0, EQUAL[1], 1.0, 9.0]
    teacher = [THREE_TO_ONE[0], 4.0, THREE_TO_ONE[1], 4.0, -9.0]
    instances = [2, 5, 2, 5, 3]
    assert _rank(student, teacher, instances) == pytest.approx(DIVERGENCE / 2, rel=1e-6)
    assert count_ranked(torch.tensor(instances)) == 2
    assert _rank(student, teacher, instances, num_instances=4.0) == pytest.approx(DIVERGENCE / 4, rel=1e-6)


def test_rank_under_a_temperature_by_hand() -> None:
    """Check doubled scores at temperature 2, which give the loss times 2 squared, and the gradient numerically."""
    doubled = [2 * x for x in THREE_TO_ONE]
    assert _rank(EQUAL, doubled, [0, 0], temperature=2.0) == pytest.approx(4 * DIVERGENCE, rel=1e-6)
    student, teacher = torch.tensor([[0.1, 0.7, 0.3], [0.5, 0.2, 0.4]], dtype=torch.float64)
    instances = torch.tensor([0, 0, 0])
    assert torch.autograd.gradcheck(
        lambda s: rank_kl_loss(s, teacher, instances, temperature=0.1), [student.requires_grad_()]
    )


@pytest.mark.parametrize("scores", [[], [3.0]])
def test_without_a_rank_there_is_a_zero_with_a_gradient(scores: list[float]) -> None:
    """Check no positives and one positive."""
    student = torch.tensor(scores, requires_grad=True)
    loss = rank_kl_loss(student, torch.zeros(len(scores)), torch.zeros(len(scores), dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


def test_rank_gradient_is_the_numerical_one_and_the_students_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    teacher.requires_grad_()
    instances = torch.tensor([3, 0, 3, 3, 0, 8, 9, 9, 9, 0, 8, 1])
    assert torch.autograd.gradcheck(lambda s: rank_kl_loss(s, teacher, instances), [student])
    rank_kl_loss(student, teacher, instances).backward()
    assert teacher.grad is None


def test_rank_equals_a_loop_over_instances() -> None:
    """Check against torch's divergence per instance, with logits so large that exp would overflow."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = 100 * torch.randn(2, 40, generator=generator)
    instances = torch.randint(6, (40,), generator=generator)
    expected = [
        torch.nn.functional.kl_div(
            student[instances == i].log_softmax(0),
            teacher[instances == i].log_softmax(0),
            reduction="sum",
            log_target=True,
        )
        for i in instances.unique()
    ]
    torch.testing.assert_close(rank_kl_loss(student, teacher, instances), torch.stack(expected).mean())


def test_prediction_guided_by_hand() -> None:
    """Check equations 7 to 9 on two levels: P averages over classes, D over channels, and the loss over levels."""
    student_probs = [torch.tensor([[[[0.0, 0.5]], [[0.0, 0.5]]]]), torch.tensor([[[[1.0]], [[0.0]]]])]
    teacher_probs = [torch.tensor([[[[1.0, 0.5]], [[0.0, 0.0]]]]), torch.tensor([[[[0.0]], [[0.0]]]])]
    student = [torch.tensor([[[[0.0, 0.0]], [[0.0, 0.0]]]]), torch.tensor([[[[1.0]], [[1.0]]]])]
    teacher = [torch.tensor([[[[2.0, 4.0]], [[0.0, 4.0]]]]), torch.tensor([[[[1.0]], [[3.0]]]])]
    # level 1: P = 1/2, 1/8; D = 2, 16; mean of P D = (1 + 2) / 2.   level 2: P = 1/2, D = 2: 1.
    assert prediction_difference(student_probs[0], teacher_probs[0]).tolist() == [[[0.5, 0.125]]]
    assert prediction_guided_loss(student, teacher, student_probs, teacher_probs).item() == pytest.approx((1.5 + 1) / 2)
    weights = relative_to_mean([torch.tensor([[[0.5, 0.125]]]), torch.zeros(1, 1, 1)])
    torch.testing.assert_close(weights[0], torch.tensor([[[1.6, 0.4]]]))
    assert weights[1].item() == 0
    # masked: only the second position of level 1, nothing of level 2
    masks = [torch.tensor([[[0.0, 1.0]]]), torch.zeros(1, 1, 1)]
    assert weighted_imitation_loss(student, teacher, masks, [1.0, 1.0]).item() == pytest.approx(16 / 2)


def test_relative_weights_have_no_gradient_through_their_mean() -> None:
    """Check 1, 3 with the mean 2: the gradient of each relative weight is 1/2 at its own position alone."""
    weights = torch.tensor([[[1.0, 3.0]]], requires_grad=True)
    (relative,) = relative_to_mean([weights])
    assert relative.tolist() == [[[0.5, 1.5]]]
    relative.sum().backward()
    assert weights.grad.tolist() == [[[0.5, 0.5]]]


def test_prediction_guided_gradient_is_the_numerical_one_of_the_features_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 3, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    probs = [torch.rand(2, 4, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    student, student_probs = features[0].requires_grad_(), probs[0].requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return prediction_guided_loss([x], [features[1]], [student_probs], [probs[1]])

    assert torch.autograd.gradcheck(loss, [student])
    loss(student).backward()
    assert student_probs.grad is None


def test_soft_label_by_hand() -> None:
    """Check the divergence of 0.5 from 0.75, no loss for equal predictions, and the factor 4 of temperature 2."""
    student, teacher = torch.tensor([_logit(0.5), -7.0]), torch.tensor([_logit(0.75), -7.0])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert soft_label_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert soft_label_loss(student, teacher, weight=torch.tensor([0.0, 1.0])).item() == 0
    doubled = soft_label_loss(2 * student, 2 * teacher, temperature=2.0).item()
    assert doubled == pytest.approx(4 * expected, rel=1e-5)


def test_soft_label_focused_on_differences() -> None:
    """Check the weights |p_T - p_S| and its square, 1/4 and 1/16, and that no gradient passes through them."""
    student, teacher = torch.tensor([0.0], requires_grad=True), torch.tensor([_logit(0.75)])
    for power in (1, 2):
        loss = soft_label_loss(student, teacher, focus=float(power))
        assert loss.item() == pytest.approx(DIVERGENCE / 4**power, rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient.item() == pytest.approx((0.5 - 0.75) / 4**power, rel=1e-5)


def test_quality_focal_loss_by_hand() -> None:
    """Check |0.75 - 0.5| ** power times the cross-entropy log 2, weights, equal predictions, and the gradient."""
    student, teacher = torch.tensor([0.0, 2.0]), torch.tensor([_logit(0.75), 2.0])
    assert quality_focal_loss(student, student, power=0.0).item() == pytest.approx(math.log(2) + 0.36533, abs=1e-5)
    for power in (1.0, 2.0):
        loss = quality_focal_loss(student, teacher, power=power)
        assert loss.item() == pytest.approx(0.25**power * math.log(2), rel=1e-5)
    assert quality_focal_loss(student, teacher, torch.tensor([0.0, 1.0])).item() == 0
    for power in (0.1, 0.5, 1.0, 2.0):
        equal = teacher.clone().requires_grad_()
        loss = quality_focal_loss(equal, teacher, power=power)
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, equal)
        assert gradient.tolist() == pytest.approx([0, 0], abs=1e-6)
    student, teacher = 3 * torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.rand(6, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for power in (1.0, 1.5):
        loss = partial(quality_focal_loss, teacher_logits=teacher, weight=weight, power=power)
        assert torch.autograd.gradcheck(loss, [student.requires_grad_()])


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_label_gradient_is_the_numerical_one(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    weight = torch.tensor([[1.0], [0.0], [0.5], [2.0]], dtype=torch.float64)
    student.requires_grad_()
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: soft_label_loss(s, teacher, weight, temperature), [student])
    soft_label_loss(student, teacher).backward()
    assert teacher.grad is None
    large = torch.tensor([90.0, -90.0], requires_grad=True)
    soft_label_loss(large, -large).backward()
    assert large.grad.isfinite().all()


# Two levels of one image: stride 8 has 1 x 2 positions, stride 16 has 1 x 1; two anchors per position, two classes.
ANCHORS = {
    8: Boxes(torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 16], [8, 0, 16, 8], [8, 0, 16, 16]])),
    16: Boxes(torch.tensor([[0.0, 0, 16, 16], [0, 0, 16, 32]])),
}
ASSIGNMENT = torch.tensor([[0, 1, BACKGROUND, 0, 1, IGNORED]])


def _dense(logits: list[list[float]], shift: list[float] | None = None) -> DensePredictions:
    """Build predictions of six anchors with two classes; boxes are the anchors moved right by `shift`."""
    logits_tensor = torch.tensor([logits])
    shift_tensor = torch.tensor([shift or [0.0] * 6])[..., None]
    return DensePredictions(
        logits={8: logits_tensor[:, :4], 16: logits_tensor[:, 4:]},
        box_regression={8: shift_tensor[:, :4], 16: shift_tensor[:, 4:]},
        anchors=ANCHORS,
        decode=lambda x, anchors: anchors.tensor + x * torch.tensor([1.0, 0, 1, 0]),
        quality={8: torch.zeros(1, 4, 1), 16: torch.full((1, 2, 1), _logit(0.25))},
        assign=lambda: ASSIGNMENT,
    )


def _outputs(dense: DensePredictions, features: dict[int, Tensor] | None = None) -> DetectorOutputs:
    features = features or {8: torch.zeros(1, 1, 1, 2), 16: torch.zeros(1, 1, 1, 1)}
    return DetectorOutputs(images=None, features=features, dense=dense)


def _targets() -> list[Instances]:
    target = Instances((16, 16), gt_boxes=Boxes(torch.tensor([[0.0, 0, 8, 8], [0, 0, 16, 16]])))
    target.gt_classes = torch.tensor([1, 0])
    return [target]


def test_positives_and_what_they_hold() -> None:
    """Check image, anchor and instance of the positives, and the values picked from all levels."""
    dense = _dense([[i, 10 + i] for i in range(6)])
    positives = dense.positives
    assert positives.image.tolist() == [0] * 4
    assert positives.anchor.tolist() == [0, 1, 3, 4]
    assert positives.instance.tolist() == [0, 1, 0, 1]
    assert positives.pick(dense.logits.values()).tolist() == [[0, 10], [1, 11], [3, 13], [4, 14]]
    assert positives.pick(dense.logits.values(), torch.tensor([1, 0, 1, 0])).tolist() == [10, 1, 13, 4]
    assert positives.among_all([[0] * 3, [0]]).tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(dense.boxes_at(positives)[2:], torch.tensor([[8.0, 0, 16, 16], [0, 0, 16, 16]]))


def test_positives_of_the_second_image_come_after_those_of_the_first() -> None:
    dense = _dense([[0.0, 0.0]] * 6)
    dense.assign = lambda: torch.tensor([[BACKGROUND] * 5 + [1], [0] + [BACKGROUND] * 5])
    assert dense.positives.among_all([[None] * 4, [None]]).tolist() == [1, 4]


def test_classes_and_boxes_of_positives_in_several_images() -> None:
    """Check three images with two, no and one instance."""
    positives = Positives.of(torch.tensor([[1, BACKGROUND, 0], [BACKGROUND] * 3, [IGNORED, 0, BACKGROUND]]))
    targets = targets_of([[0.0, 0, 8, 8], [0, 0, 16, 16]], [], [[4.0, 4, 12, 12]])
    for target, classes in zip(targets, ([2, 0], [], [1]), strict=True):
        target.gt_classes = torch.tensor(classes, dtype=torch.int64)
    class_P, box_P4 = positives.ground_truth(targets)
    assert class_P.tolist() == [0, 2, 1]
    assert box_P4.tolist() == [[0, 0, 16, 16], [0, 0, 8, 8], [4, 4, 12, 12]]


def test_rank_mimicking_by_hand() -> None:
    """Check both losses of two instances: ranks by the probability of the instance's class and by the boxes' IoU."""
    # instance 0, class 1: anchors 0 and 3; instance 1, class 0: anchors 1 and 4
    student = _dense([[0.0, _logit(0.4)], [0, 0], [0, 0], [0, _logit(0.4)], [0, 0], [0, 0]])
    teacher = _dense([[0.0, _logit(0.9)], [0, 0], [0, 0], [0, _logit(0.4)], [0, 0], [0, 0]], [0, 4, 0, -8, 0, 0])
    losses = scaled(make(RankMimicking, _spec()), _outputs(student), _outputs(teacher), _targets())
    share = math.exp(0.5) / (1 + math.exp(0.5))  # of scores that differ by 0.9 - 0.4
    classification = share * math.log(2 * share) + (1 - share) * math.log(2 * (1 - share))
    assert losses["loss_rank_classification"].item() == pytest.approx(4 * classification / 2, rel=1e-5)
    # IoUs of the student: instance 0: 1 and 0, instance 1: 128/256 and 1; of the teacher: 1 and 1/2, 128/256 and 1
    pairs = [([1, 0], [1, 0.5]), ([0.5, 1], [0.5, 1])]
    localization = sum(_rank(list(map(float, s)), list(map(float, t)), [0, 0]) for s, t in pairs) / 2
    assert losses["loss_rank_localization"].item() == pytest.approx(4 * localization, rel=1e-5)


def test_rank_mimicking_options_by_hand() -> None:
    """Check logits and joint scores instead of probabilities, without localization."""
    student = _dense([[0.0, 1.0], [0, 0], [0, 0], [0, 3.0], [0, 0], [0, 0]])
    teacher = _dense([[0.0, 2.0], [0, 0], [0, 0], [0, 2.0], [0, 0], [0, 0]])
    losses = make(RankMimicking, _spec(), on_logits=True, localization=False)(
        _outputs(student), _outputs(teacher), _targets()
    )
    assert list(losses) == ["loss_rank_classification"]
    assert losses["loss_rank_classification"].item() == pytest.approx(
        _rank([1.0, 3.0], [2.0, 2.0], [0, 0]) / 2, rel=1e-5
    )
    # for instance 1, anchor 4 is on the level with quality 0.25, anchor 1 on the one with 0.5
    teacher = _dense([[0.0, 0.0], [math.log(3), 0], [0, 0], [0, 0], [math.log(3), 0], [0, 0]])
    losses = make(RankMimicking, _spec(provides=DENSE | {"quality"}), joint_score=True, localization=False)(
        _outputs(student), _outputs(teacher), _targets()
    )
    ours = [1 / (1 + math.exp(-1.0)) / 2, 1 / (1 + math.exp(-3.0)) / 2]
    expected = _rank(ours, [0.25, 0.25], [0, 0]) + _rank([0.25, 0.125], [0.375, 0.1875], [0, 0])
    assert losses["loss_rank_classification"].item() == pytest.approx(expected / 2, rel=1e-4)


def test_rank_mimicking_with_temperatures_by_hand() -> None:
    """Check that classification and localization have separate temperatures."""
    student = _dense([[0.0, 1.0], [0, 0], [0, 0], [0, 3.0], [0, 0], [0, 0]])
    teacher = _dense([[0.0, 2.0], [0, 0], [0, 0], [0, 2.0], [0, 0], [0, 0]], [0, 4, 0, -8, 0, 0])
    rank = make(RankMimicking, _spec(), on_logits=True, temperature=2.0, localization_temperature=0.5)
    losses = rank(_outputs(student), _outputs(teacher), _targets())
    scores = _rank([1.0, 3.0], [2.0, 2.0], [0, 0], temperature=2.0)
    overlaps = _rank([1.0, 0.0], [1.0, 0.5], [0, 0], temperature=0.5)
    assert losses["loss_rank_classification"].item() == pytest.approx(scores / 2, rel=1e-5)
    assert losses["loss_rank_localization"].item() == pytest.approx(overlaps / 2, rel=1e-5)


def test_soft_label_options_by_hand() -> None:
    """Check positives only, two of which differ, and all anchors, three of which differ, for both forms of the loss."""
    student = _dense([[0.0, 0.0]] * 6)
    other = [_logit(0.75), 0.0]
    teacher = _dense([other, [0.0, 0.0], other, other, [0.0, 0.0], [50.0, -50.0]])
    entropy = 0.25 * math.log(2)
    for options, expected in (
        ({"anchors": "positives"}, 2 * DIVERGENCE),
        ({"focus": 1.0}, 3 * DIVERGENCE / 4),
        ({"loss": "quality_focal", "focus": 1.0}, 3 * entropy),
        ({"loss": "quality_focal", "focus": 1.0, "anchors": "positives"}, 2 * entropy),
    ):
        losses = scaled(
            make(SoftLabel, _spec(), weight=2.0, **options), _outputs(student), _outputs(teacher), _targets()
        )
        assert losses["loss_soft_label"].item() == pytest.approx(2 * expected / 4, rel=1e-5), options


def test_soft_label_leaves_out_what_the_detector_ignores() -> None:
    """Check a background anchor and an ignored one with other predictions; the divisor is the four positives."""
    student = _dense([[0.0, 0.0]] * 6)
    teacher = _dense([[0.0, 0.0]] * 2 + [[_logit(0.75), 0.0]] + [[0.0, 0.0]] * 2 + [[50.0, -50.0]])
    losses = scaled(make(SoftLabel, _spec(), weight=2.0), _outputs(student), _outputs(teacher), _targets())
    assert losses["loss_soft_label"].item() == pytest.approx(2 * DIVERGENCE / 4, rel=1e-5)


# Anchors per position: stride 8: positive and background, background and ignored; stride 16: both positive.
PARTLY_POSITIVE = torch.tensor([[0, BACKGROUND, BACKGROUND, IGNORED, 1, 1]])
MASKED = {
    "whole": ([1, 1], [1]),
    "positives": ([1, 0], [1]),
    "negatives": ([0, 1], [0]),
    "boxes": ([1, 0], [0]),
}


@pytest.mark.parametrize("mask", MASKED)
def test_pfi_masks_by_hand(mask: str, event_storage) -> None:
    """Check the mean over the masked positions of each level, with squared differences 1, 4 and 9."""
    (near, far), (coarse,) = MASKED[mask]
    target = Instances((16, 16), gt_boxes=Boxes(torch.tensor([[0.0, 0, 7, 7]])))
    features = {8: torch.tensor([[[[1.0, 2.0]]]]), 16: torch.tensor([[[[3.0]]]])}
    distiller = make(PFI, NARROW, weight=2.0, mask=mask)
    dense = _dense([[0.0, 0.0]] * 6)
    dense.assign = lambda: PARTLY_POSITIVE
    loss = scaled(distiller, _outputs(dense, features), _outputs(dense), [target])["loss_pfi"].item()
    assert loss == pytest.approx((near * 1 + far * 4) / max(near + far, 1) + coarse * 9)


def test_pfi_reads_each_positions_anchors_and_classes(event_storage) -> None:
    """Check P with a teacher that differs in one class of one anchor: stride 8, second position, first anchor."""
    student, teacher = _dense([[0.0, 0.0]] * 6), _dense([[0.0, 0.0]] * 2 + [[_logit(0.9), 0.0]] + [[0.0, 0.0]] * 3)
    features = {8: torch.tensor([[[[1.0, 2.0]]]]), 16: torch.tensor([[[[3.0]]]])}
    loss = make(PFI, NARROW)(_outputs(student, features), _outputs(teacher), _targets())["loss_pfi"].item()
    assert loss == pytest.approx(0.4**2 / 4 * 4 / 2 / 2, rel=1e-5)
    loss = make(PFI, NARROW, relative=True)(_outputs(student, features), _outputs(teacher), _targets())[
        "loss_pfi"
    ].item()
    assert loss == pytest.approx(2 * 4 / 2 / 2, rel=1e-5)
    loss = make(PFI, NARROW, on_logits=True)(_outputs(student, features), _outputs(teacher), _targets())[
        "loss_pfi"
    ].item()
    assert loss == pytest.approx(math.log(9) ** 2 / 4 * 4 / 2 / 2, rel=1e-5)


@pytest.mark.parametrize("through", [False, True])
def test_pfi_gradients_through_the_prediction_are_an_option(through: bool, event_storage) -> None:
    student, teacher = _dense([[0.0, 0.0]] * 6), _dense([[1.0, 0.0]] * 6)
    for logits in student.logits.values():
        logits.requires_grad_()
    features = {8: torch.ones(1, 1, 1, 2, requires_grad=True), 16: torch.ones(1, 1, 1, 1, requires_grad=True)}
    make(PFI, NARROW, through_prediction=through)(_outputs(student, features), _outputs(teacher), _targets())[
        "loss_pfi"
    ].backward()
    assert all(x.grad.all() for x in features.values())
    assert all((x.grad is not None) == through for x in student.logits.values())


@pytest.mark.parametrize("counts", [(3, 2), (0, 0), (0, 1), (1, 0)])
def test_all_three_in_a_training_step(
    counts: tuple[int, int], tiny_detector: Callable, tiny_cfg: Callable, make_inputs: Callable, event_storage
) -> None:
    """Check finite losses, gradients in the student and an unchanged teacher, including images without objects."""
    student, teacher = tiny_detector("retinanet"), tiny_detector("retinanet", seed=1)
    cfg = tiny_cfg("retinanet", {"MODEL": {"KD": {"DISTILLERS": tuple(m.__name__ for m in METHODS.values())}}})
    specs = build_adapter(student).spec, build_adapter(teacher).spec
    distillers = {m.__name__: configured(m, cfg, *specs) for m in METHODS.values()}
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    model = KDMetaArch(student=student, teacher=Teacher(teacher), distillers=distillers)
    event_storage.iter = 19  # an iteration that Detectron2's writers write
    losses = model(make_inputs(counts=counts))
    names = [name for distiller in distillers.values() for name in distiller.loss_names]
    assert set(names) <= losses.keys()
    sum(losses[name] for name in names).backward()
    gradients = [p.grad for p in student.backbone.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    own = sum(loss.item() for name, loss in losses.items() if name not in names)
    logged, iteration = event_storage.latest()["kd/pfi_to_detector_loss"]
    assert (logged, iteration) == (pytest.approx(losses["loss_pfi"].item() / own, rel=1e-4), 19)


def test_equal_detectors_agree(tiny_detector: Callable, make_inputs: Callable, event_storage) -> None:
    """Check that every loss is zero between a detector and its copy."""
    student, teacher = tiny_detector("retinanet").eval(), tiny_detector("retinanet").eval()
    inputs = make_inputs()
    targets = [x["instances"] for x in inputs]
    want = frozenset({"features", "dense", "targets"})
    outputs = [build_adapter(m).run(inputs, want, targets) for m in (student, teacher)]
    spec = build_adapter(student).spec
    for distiller in (make(RankMimicking, spec), make(SoftLabel, spec), make(PFI, spec, mask="whole"), make(PFI, spec)):
        assert sum(scaled(distiller, *outputs, targets).values()).item() == pytest.approx(0, abs=1e-6)


@pytest.fixture
def build(tiny_cfg: Callable) -> Callable[..., Distiller]:
    def build(node: str, teacher: DetectorSpec, **keys: Any) -> Distiller:
        cfg = tiny_cfg("retinanet", {"MODEL": {"KD": {node: keys}}})
        return configured(METHODS[node], cfg, _spec(), teacher)

    return build


def test_defaults_are_the_papers(build: Callable) -> None:
    """Check the weights of equation 10, and that Rank Mimicking has both parts by default."""
    rank = build("RANK_MIMICKING", _spec())
    assert rank.weight == 4.0
    config = rank.config
    assert (config.on_logits, config.joint_score, config.localization) == (False, False, True)
    assert (config.temperature, config.localization_temperature) == (1.0, 1.0)
    pfi = build("PFI", _spec())
    assert (pfi.weight, pfi.config.mask) == (1.5, "prediction")
    assert not (pfi.config.on_logits or pfi.config.relative or pfi.config.through_prediction)
    assert not pfi.adaptation.layers
    soft = build("SOFT_LABEL", _spec())
    config = soft.config
    assert (soft.weight, config.loss, config.temperature, config.focus, config.anchors) == (1, "kl", 1.0, 0.0, "all")


def test_pfi_adapts_where_channels_differ(build: Callable) -> None:
    teacher = _spec(channels={8: 6})
    assert build("PFI", teacher).adaptation.layers["8"].weight.shape == (6, 4, 1, 1)
    with pytest.raises(UserError, match="ADAPTATION is 'none', but at stride 8"):
        build("PFI", teacher, ADAPTATION="none")


@pytest.mark.parametrize("node", METHODS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cell_anchors": {8: torch.tensor([[-8.0, -8, 8, 8]])}},
            "at stride 8 the student .Pupil. has one anchor of 8x8",
        ),
        (
            {"cell_anchors": {8: torch.tensor([[0.0, 0, 8, 8]])}},
            r"teacher .Master. one anchor of 8x8 pixels around \(4, 4\)",
        ),
        ({"cell_anchors": {8: torch.tensor([[-4.0, -4, 4, 4]] * 3)}}, "the teacher .Master. 3 anchors per position"),
        ({"cell_anchors": {4: torch.tensor([[-4.0, -4, 4, 4]])}}, r"strides \[8\] and the teacher .Master. at \[4\]"),
    ],
)
def test_other_anchors_are_refused(build: Callable, node: str, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(node, _spec(name="Master", **change))


def test_anchors_at_other_places_are_refused(tiny_cfg: Callable, tiny_detector: Callable) -> None:
    """Check two RetinaNets whose anchors are half a stride apart."""
    shifted = {"MODEL": {"ANCHOR_GENERATOR": {"OFFSET": 0.5}}}
    student, teacher = (build_adapter(tiny_detector("retinanet", keys)).spec for keys in ({}, shifted))
    with pytest.raises(UserError, match=r"around \(0, 0\) and the teacher .RetinaNet. 3 anchors .* around \(4, 4\)"):
        configured(RankMimicking, tiny_cfg("retinanet"), student, teacher)


def test_masks_that_read_no_prediction_take_any_anchors(build: Callable) -> None:
    assert build("PFI", _spec(cell_anchors={8: torch.zeros(2, 4)}), MASK="boxes").config.mask == "boxes"


@pytest.mark.parametrize(
    ("node", "keys", "message"),
    [
        ("RANK_MIMICKING", {"ON_LOGITS": True, "JOINT_SCORE": True}, "ON_LOGITS and JOINT_SCORE are both True"),
        ("RANK_MIMICKING", {"JOINT_SCORE": True}, "has no centerness"),
        ("PFI", {"MASK": "foreground"}, "MODEL.KD.PFI.MASK is 'foreground'"),
        ("PFI", {"ADAPTATION": "5x5"}, "MODEL.KD.PFI.ADAPTATION is '5x5'"),
        (
            "PFI",
            {"MASK": "boxes", "RELATIVE": True},
            "MODEL.KD.PFI.RELATIVE is True, but MASK 'boxes' does not use predictions",
        ),
        ("PFI", {"MASK": "whole", "ON_LOGITS": True}, "MODEL.KD.PFI.ON_LOGITS is True, but MASK 'whole' does not"),
        ("SOFT_LABEL", {"TEMPERATURE": 0.0}, "TEMPERATURE is 0.0; it must be a number above 0"),
        ("SOFT_LABEL", {"FOCUS": -1.0}, "FOCUS is -1.0; it must be a number at least 0"),
        ("SOFT_LABEL", {"ANCHORS": "negatives"}, "ANCHORS is 'negatives'; it must be one of 'all', 'positives'"),
        ("SOFT_LABEL", {"LOSS": "bce"}, "LOSS is 'bce'; it must be one of 'kl', 'quality_focal'"),
        (
            "SOFT_LABEL",
            {"LOSS": "quality_focal", "TEMPERATURE": 2.0},
            "TEMPERATURE is 2.0, which only LOSS 'kl' uses",
        ),
        ("RANK_MIMICKING", {"TEMPERATURE": 0.0}, "RANK_MIMICKING.TEMPERATURE is 0.0"),
        ("RANK_MIMICKING", {"LOCALIZATION_TEMPERATURE": -1.0}, "LOCALIZATION_TEMPERATURE is -1.0"),
    ],
)
def test_what_cannot_work_is_refused(build: Callable, node: str, keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(node, _spec(), **keys)
