"""Detectors and backbones that Detectron2 lacks: hand-worked assignments and losses, shapes, weights, training."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable
from itertools import pairwise

from kd_d2.errors import UserError
from kd_d2.modeling import ATSS, FCOS, FSAF, GFL, RepPoints
from kd_d2.modeling.assignment import BACKGROUND, IGNORED, assign_adaptively
from kd_d2.modeling.atss import centerness_of
from kd_d2.modeling.deformable import DeformableConv, ModulatedDeformableConv, deformable_resnets
from kd_d2.modeling.fsaf import best_level, covers_cell, in_middle, smallest_box
from kd_d2.modeling.gfl import DistributionTransform, distribution_focal_loss, quality_focal_loss
from kd_d2.modeling.reppoints import PointTransform, assign_nearest

import pytest
import torch
import torchvision
from detectron2 import layers
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone
from detectron2.modeling.backbone import resnet
from detectron2.modeling.backbone.resnet import BottleneckBlock, DeformBottleneckBlock
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor


def _square(x: float, y: float, side: float) -> list[float]:
    return [x - side / 2, y - side / 2, x + side / 2, y + side / 2]


def _grid(stride: int, columns: int, rows: int, side: float) -> Boxes:
    """Return square anchors centered at the positions of a level."""
    return Boxes(
        torch.tensor(
            [_square((i + 0.5) * stride, (j + 0.5) * stride, side) for j in range(rows) for i in range(columns)]
        )
    )


def test_adaptive_assignment_by_hand() -> None:
    """Check candidates, threshold, and that the center must be inside the box, on one row of anchors."""
    anchors = [_grid(8, 5, 1, 8.0)]  # at x = 4, 12, 20, 28, 36
    box = Boxes(torch.tensor([[8.0, 0, 24, 8]]))  # overlaps 0, 1/2, 1/2, 0, 0
    # three nearest: at 12 and 20 (distance 4), then 4 or 28 (12): overlaps 1/2, 1/2, 0; mean 1/3, deviation 0.289: threshold 0.622
    assert assign_adaptively(anchors, box, topk=3).tolist() == [BACKGROUND] * 5
    # two nearest: overlaps 1/2 and 1/2: threshold 1/2
    assert assign_adaptively(anchors, box, topk=2).tolist() == [BACKGROUND, 0, 0, BACKGROUND, BACKGROUND]
    # all five: mean 0.2, deviation sqrt((2 * 0.09 + 3 * 0.04) / 4) = 0.274: threshold 0.474
    assert assign_adaptively(anchors, box, topk=9).tolist() == [BACKGROUND, 0, 0, BACKGROUND, BACKGROUND]
    # a box that overlaps an anchor (IoU 0.375) without containing its center
    narrow = Boxes(torch.tensor([[9.0, 0, 12, 8]]))
    assert pairwise_iou(narrow, anchors[0])[0].tolist() == pytest.approx([0, 0.375, 0, 0, 0])
    assert assign_adaptively(anchors, narrow, topk=2).tolist() == [BACKGROUND] * 5
    # a center on any of the four sides is not inside
    for sides in ([12.0, 0, 16, 8], [8.0, 0, 12, 8], [8.0, 4, 16, 8], [8.0, 0, 16, 4]):
        assert assign_adaptively(anchors, Boxes(torch.tensor([sides])), topk=1).tolist() == [BACKGROUND] * 5


def test_adaptive_assignment_takes_the_candidates_of_every_level() -> None:
    """Check a large box: only its best anchor, on the coarse level, exceeds the threshold over both levels."""
    anchors = [_grid(8, 4, 4, 8.0), _grid(16, 2, 2, 24.0)]
    box = Boxes(torch.tensor([[0.0, 0, 20, 20]]))
    # fine level: nine candidates inside, overlap 64 / 400 or less; coarse level: four, the first with 400 / 576
    row = assign_adaptively(anchors, box, topk=9).tolist()
    assert row[:16] == [BACKGROUND] * 16
    assert row[16:] == [0, BACKGROUND, BACKGROUND, BACKGROUND]


def test_an_anchor_of_several_boxes_takes_the_one_it_overlaps_most() -> None:
    anchors = [_grid(8, 3, 1, 8.0)]
    boxes = Boxes(torch.tensor([[0.0, 0, 7, 8], [0, 0, 8, 8], [1, 0, 8, 8]]))
    assert assign_adaptively(anchors, boxes, topk=1).tolist() == [1, BACKGROUND, BACKGROUND]
    assert assign_adaptively(anchors, boxes, topk=3).tolist() == [1, BACKGROUND, BACKGROUND]


def test_adaptive_assignment_without_boxes() -> None:
    assert assign_adaptively([_grid(8, 2, 1, 8.0)], Boxes(torch.zeros(0, 4))).tolist() == [BACKGROUND] * 2


def _slow_assignment(anchors: list[Boxes], boxes: Boxes, topk: int) -> list[int]:
    """Run algorithm 1 of the paper, box by box and anchor by anchor."""
    everywhere = Boxes.cat(anchors).tensor.double()
    starts = [0]
    for level in anchors:
        starts.append(starts[-1] + len(level))
    best = [(-1.0, BACKGROUND)] * len(everywhere)
    for index, box in enumerate(boxes.tensor.double()):
        candidates = []
        for start, end in pairwise(starts):
            distance = [
                ((everywhere[i, :2] + everywhere[i, 2:] - box[:2] - box[2:]) / 2).norm().item()
                for i in range(start, end)
            ]
            order = sorted(range(end - start), key=lambda i: (distance[i], i))[:topk]
            candidates += [start + i for i in order]
        overlaps = pairwise_iou(Boxes(box[None]), Boxes(everywhere[candidates]))[0]
        threshold = overlaps.mean() + overlaps.std()
        for i, overlap in zip(candidates, overlaps.tolist(), strict=True):
            x, y = ((everywhere[i, :2] + everywhere[i, 2:]) / 2).tolist()
            if overlap >= threshold and box[0] < x < box[2] and box[1] < y < box[3] and overlap > best[i][0]:
                best[i] = (overlap, index)
    return [index for _, index in best]


@pytest.mark.parametrize("seed", range(4))
def test_adaptive_assignment_equals_the_papers_algorithm(seed: int) -> None:
    """Check random boxes on three levels."""
    generator = torch.Generator().manual_seed(seed)
    anchors = [_grid(8, 12, 8, 64.0), _grid(16, 6, 4, 128.0), _grid(32, 3, 2, 256.0)]
    corners = torch.rand(7, 2, generator=generator) * 50
    boxes = Boxes(torch.cat([corners, corners + 5 + 60 * torch.rand(7, 2, generator=generator)], 1))
    expected = _slow_assignment(anchors, boxes, topk=9)
    assert assign_adaptively(anchors, boxes, topk=9).tolist() == expected
    assert any(index >= 0 for index in expected)


def test_centerness_by_hand() -> None:
    """Check the centers (4, 4), (2, 2) and (2, 4) of an 8 x 8 box: 1, sqrt(2/6 * 2/6) and sqrt(2/6 * 4/4)."""
    anchors = torch.tensor([_square(4, 4, 2), _square(2, 2, 9), _square(2, 4, 1)])
    boxes = torch.tensor([[0.0, 0, 8, 8]] * 3)
    torch.testing.assert_close(centerness_of(anchors, boxes), torch.tensor([1, 1 / 3, math.sqrt(1 / 3)]))


def test_quality_focal_loss_by_hand() -> None:
    """Check |y - p|^2 * BCE at p = 1/2 for y = 1, 3/4 and 0, and no loss for y = 1/2."""
    quality = torch.tensor([1.0, 0.75, 0.0, 0.5])
    loss = quality_focal_loss(torch.zeros(4), quality)
    expected = torch.tensor([0.25, 0.0625, 0.25, 0.0]) * math.log(2)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        quality_focal_loss(torch.zeros(4), quality, beta=1.0), expected.sqrt() * math.log(2) ** 0.5
    )


def test_distribution_focal_loss_by_hand() -> None:
    """Check a distance of 1.25 with bins 0 to 3, a whole distance, distances beyond both ends, and the gradient."""
    probability = torch.tensor([0.1, 0.2, 0.3, 0.4])
    logits = probability.log().expand(4, 4)
    loss = distribution_focal_loss(logits, torch.tensor([1.25, 2.0, -5.0, 77.0]))
    ends = -0.1 * math.log(0.3) - 0.9 * math.log(0.4)
    expected = [-0.75 * math.log(0.2) - 0.25 * math.log(0.3), -math.log(0.3), -math.log(0.1), ends]
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    logits = torch.randn(5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    distances = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 5
    assert torch.autograd.gradcheck(lambda x: distribution_focal_loss(x, distances), [logits])


def test_expected_box_of_a_known_distribution() -> None:
    """Check distances 1/2, 1, 2 and 3/2 in strides of 8 around (20, 12), and that `get_distances` inverts them."""
    transform = DistributionTransform(anchor_scale=8.0, reg_max=2)
    sides = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25], [0.0, 0.0, 1.0], [0.25, 0.0, 0.75]])
    anchor = torch.tensor([_square(20, 12, 64)])
    box = transform.apply_deltas(sides.clamp(min=1e-9).log().flatten()[None], anchor)
    torch.testing.assert_close(box, torch.tensor([[16.0, 4, 36, 24]]), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        transform.get_distances(anchor, box), torch.tensor([[0.5, 1, 2, 1.5]]), rtol=1e-4, atol=1e-4
    )


def _one_instance(model: torch.nn.Module) -> tuple[list[Boxes], Tensor, list[Instances]]:
    """Return two anchors of side 64 at stride 8, the first assigned to the only box, of side 32 at its center."""
    anchors = [_grid(8, 2, 1, 64.0)]
    target = Instances((8, 16), gt_boxes=Boxes(torch.tensor([_square(4, 4, 32)])), gt_classes=torch.tensor([1]))
    return anchors, torch.tensor([[0, BACKGROUND]]), [target]


def test_atss_losses_by_hand(tiny_detector: Callable) -> None:
    """Check a positive and a background anchor of three classes, logits 0, and a predicted box with doubled sides."""
    model = tiny_detector("atss")
    anchors, assignment, targets = _one_instance(model)
    predictions = [[torch.zeros(1, 2, 3)], [torch.zeros(1, 2, 4)], [torch.zeros(1, 2, 1)]]
    losses = model.losses(anchors, predictions, assignment, targets)
    # focal: one target with alpha 1/4, five others with 3/4, each 1/4 * ln 2
    assert losses["loss_atss_cls"].item() == pytest.approx((0.25 + 5 * 0.75) * 0.25 * math.log(2), rel=1e-5)
    # the predicted box is the anchor, which contains the true box: GIoU is the IoU, 1/4
    assert losses["loss_atss_box"].item() == pytest.approx(2 * (1 - 0.25), rel=1e-5)
    # the target centerness is 1
    assert losses["loss_atss_centerness"].item() == pytest.approx(math.log(2), rel=1e-5)
    scores = model.scores([[torch.zeros(1, 2, 3)], [], [torch.full((1, 2, 1), -math.log(7))]])
    torch.testing.assert_close(scores[0], torch.full((1, 2, 3), 0.25))  # sqrt(1/2 * 1/8)


def test_gfl_losses_by_hand(tiny_detector: Callable) -> None:
    """Check one positive: the target quality is the IoU of the predicted box, 1/4; the box weight is the score, 1/2."""
    model = tiny_detector("gfl")
    anchors, assignment, targets = _one_instance(model)
    sides = torch.full((1, 2, 4, 17), -1e9)
    sides[..., 4] = 0.0  # all sides at 4 strides: the box is the anchor
    predictions = [[torch.zeros(1, 2, 3)], [sides.flatten(2)]]
    losses = model.losses(anchors, predictions, assignment, targets)
    background, target = 0.25 * math.log(2), 0.25**2 * math.log(2)
    assert losses["loss_gfl_quality"].item() == pytest.approx(5 * background + target, rel=1e-5)
    # the weight is 1/2, and the sum of weights is clamped to at least 1
    assert losses["loss_gfl_box"].item() == pytest.approx(2 * (1 - 0.25) / 2, rel=1e-5)
    predictions[1] = [torch.zeros(1, 2, 68)]
    spread = model.losses(anchors, predictions, assignment, targets)["loss_gfl_distribution"].item()
    assert spread == pytest.approx(0.25 * math.log(17) / 2, rel=1e-5)


def _two_positives() -> tuple[list[Boxes], Tensor, list[Instances]]:
    """Return two anchors of side 64 at stride 8, both assigned to the only box, which is centered at the second."""
    target = Instances((8, 24), gt_boxes=Boxes(torch.tensor([[0.0, 0, 24, 8]])), gt_classes=torch.tensor([1]))
    return [_grid(8, 2, 1, 64.0)], torch.tensor([[0, 0]]), [target]


def test_atss_divisors_by_hand(tiny_detector: Callable) -> None:
    """Check two positives with centerness sqrt(1/5) and 1, boxes with IoU 3/64 and 1, and probabilities of 3/4."""
    model = tiny_detector("atss")
    anchors, assignment, targets = _two_positives()
    exact = model.box2box_transform.get_deltas(anchors[0].tensor[1:], targets[0].gt_boxes.tensor)
    predictions = [
        [torch.zeros(1, 2, 3)],
        [torch.cat([torch.zeros(1, 4), exact])[None]],
        [torch.full((1, 2, 1), math.log(3))],
    ]
    losses = model.losses(anchors, predictions, assignment, targets)
    assert losses["loss_atss_cls"].item() == pytest.approx((0.25 + 2 * 0.75) * 0.25 * math.log(2), rel=1e-5)
    first = math.sqrt(4 / 20)  # 4 and 20 pixels to the left and right side
    # weighted by the centerness, divided by its sum; the others are divided by the number of positives
    assert losses["loss_atss_box"].item() == pytest.approx(2 * first * (1 - 3 / 64) / (first + 1), rel=1e-5)
    quality = (first + 1) * math.log(4 / 3) + (1 - first) * math.log(4)
    assert losses["loss_atss_centerness"].item() == pytest.approx(quality / 2, rel=1e-5)


def test_gfl_weights_by_hand(tiny_detector: Callable) -> None:
    """Check two positives with scores 3/4 and 1/2 and IoU 3/64 and 1; neither scores nor qualities pass a gradient on."""
    model = tiny_detector("gfl")
    anchors, assignment, targets = _two_positives()
    logits = torch.zeros(1, 2, 3)
    logits[0, 0, 1] = math.log(3)
    sides = torch.full((1, 2, 4, 17), -1e9)
    sides[0, 0, :, 4] = 0.0  # the first box is the anchor
    for side, bins in enumerate(((1, 2), (0, 1), (1, 2), (0, 1))):  # 12 and 4 pixels from the second center
        sides[0, 1, side, bins] = 0.0
    sides = sides.flatten(2)
    losses = model.losses(anchors, [[logits.requires_grad_()], [sides.requires_grad_()]], assignment, targets)
    assert losses["loss_gfl_box"].item() == pytest.approx(2 * 0.75 * (1 - 3 / 64) / (0.75 + 0.5), rel=1e-5)
    # targets 3/64 and 1 of the class, and 0 of two other classes at each position
    others = 4 * 0.25 * math.log(2)
    own = (0.75 - 3 / 64) ** 2 * (3 / 64 * math.log(4 / 3) + 61 / 64 * math.log(4)) + 0.25 * math.log(2)
    assert losses["loss_gfl_quality"].item() == pytest.approx((others + own) / 2, rel=1e-5)
    boxes = losses["loss_gfl_box"] + losses["loss_gfl_distribution"]
    assert torch.autograd.grad(boxes, logits, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(losses["loss_gfl_quality"], sides, allow_unused=True) == (None,)
    spread = model.losses(anchors, [[logits], [torch.zeros(1, 2, 68)]], assignment, targets)["loss_gfl_distribution"]
    assert spread.item() == pytest.approx(0.25 * math.log(17), rel=1e-5)


DENSE = {"fcos": FCOS, "atss": ATSS, "gfl": GFL, "fsaf": FSAF, "reppoints": RepPoints}


@pytest.mark.parametrize("kind", DENSE)
def test_adapters_are_built_from_their_keys(kind: str, tiny_detector: Callable) -> None:
    node = {kind.upper(): {"NUM_CONVS": 2, "PRIOR_PROB": 0.2, "SCORE_THRESH_TEST": 0.125, "NMS_THRESH_TEST": 0.3}}
    model = tiny_detector(kind, {"MODEL": node, "INPUT": {"FORMAT": "RGB"}, "TEST": {"DETECTIONS_PER_IMAGE": 7}})
    assert type(model) is DENSE[kind]
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.head.cls_subnet) == 2
    torch.testing.assert_close(model.head.cls_score.bias.sigmoid(), torch.full((3,), 0.2))
    assert (model.test_score_thresh, model.test_nms_thresh, model.max_detections_per_image) == (0.125, 0.3, 7)
    assert model.input_format == "RGB"


@pytest.mark.parametrize(
    ("kind", "key", "name"),
    [
        ("atss", "BOX_LOSS_WEIGHT", "loss_atss_box"),
        ("gfl", "BOX_LOSS_WEIGHT", "loss_gfl_box"),
        ("gfl", "DISTRIBUTION_LOSS_WEIGHT", "loss_gfl_distribution"),
        ("fsaf", "BOX_LOSS_WEIGHT", "loss_fsaf_box"),
        ("reppoints", "INIT_LOSS_WEIGHT", "loss_reppoints_init"),
        ("reppoints", "REFINE_LOSS_WEIGHT", "loss_reppoints_refine"),
    ],
)
def test_a_loss_weight_multiplies_its_loss_alone(
    kind: str, key: str, name: str, tiny_detector: Callable, make_inputs: Callable, event_storage
) -> None:
    once, thrice = (
        tiny_detector(kind, {"MODEL": {kind.upper(): {key: weight}}})(make_inputs()) for weight in (1.0, 3.0)
    )
    assert once[name] > 0
    for each, loss in once.items():
        torch.testing.assert_close(thrice[each], loss * (3 if each == name else 1))


@pytest.mark.parametrize(
    ("kind", "key", "values", "names"),
    [
        ("atss", "FOCAL_LOSS_ALPHA", (0.25, 0.75), {"loss_atss_cls"}),
        ("reppoints", "FOCAL_LOSS_GAMMA", (2.0, 0.0), {"loss_reppoints_cls"}),
        ("gfl", "BETA", (2.0, 1.0), {"loss_gfl_quality"}),
        ("reppoints", "SMOOTH_L1_BETA", (0.11, 5.0), {"loss_reppoints_init", "loss_reppoints_refine"}),
    ],
)
def test_keys_of_losses_reach_them(
    kind: str, key: str, values: tuple, names: set[str], tiny_detector: Callable, make_inputs: Callable, event_storage
) -> None:
    first, second = (tiny_detector(kind, {"MODEL": {kind.upper(): {key: value}}})(make_inputs()) for value in values)
    assert {name for name, loss in first.items() if not torch.isclose(loss, second[name], rtol=1e-2)} == names


@pytest.mark.parametrize("kind", ["atss", "gfl"])
def test_number_of_candidates_reaches_the_assignment(kind: str, tiny_detector: Callable) -> None:
    model = tiny_detector(kind)
    anchors, box = [_grid(8, 5, 1, 8.0)], torch.tensor([[8.0, 0, 24, 8]])
    target = Instances((8, 40), gt_boxes=Boxes(box), gt_classes=torch.tensor([0]))
    for topk, expected in ((3, [BACKGROUND] * 5), (2, [BACKGROUND, 0, 0, BACKGROUND, BACKGROUND])):
        model.assign_topk = topk
        assert model.assign(anchors, [], [target]).tolist() == [expected]


@pytest.mark.parametrize("kind", ["atss", "gfl", "fsaf", "reppoints"])
def test_detections_per_image_are_limited(kind: str, tiny_detector: Callable, make_inputs: Callable) -> None:
    """Check that the best two are kept, except for empty boxes, which Detectron2 removes afterwards."""
    node = {kind.upper(): {"SCORE_THRESH_TEST": 0.0}}
    many, two = (
        tiny_detector(kind, {"MODEL": node, "TEST": {"DETECTIONS_PER_IMAGE": limit}}).eval()(make_inputs())
        for limit in (100, 2)
    )
    for all_of, kept in zip(many, two, strict=True):
        number = len(kept["instances"])
        assert number <= 2 < len(all_of["instances"])
        assert torch.equal(kept["instances"].scores, all_of["instances"].scores[:number])


@pytest.mark.parametrize("kind", DENSE)
def test_adapters_learn_one_image(kind: str, tiny_detector: Callable, make_inputs: Callable, event_storage) -> None:
    """Check that 80 steps on one image suffice to detect its object: losses, decoding and scores agree."""
    model = tiny_detector(kind)
    inputs = make_inputs(sizes=((64, 80),), counts=(1,))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        sum(model(inputs).values()).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        detections = model(inputs)[0]["instances"]
    assert detections.scores.tolist() == sorted(detections.scores.tolist(), reverse=True)
    truth = inputs[0]["instances"]
    overlap, index = pairwise_iou(truth.gt_boxes, detections.pred_boxes).max(1)
    assert (overlap > 0.6).all()
    assert torch.equal(detections.pred_classes[index], truth.gt_classes)


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_under_autocast(
    kind: str, dtype: torch.dtype, tiny_detector: Callable, make_inputs: Callable, event_storage
) -> None:
    model, inputs = tiny_detector(kind).eval(), make_inputs()
    model.training = True  # running statistics with the forward pass of training
    expected = model(inputs)
    with torch.autocast("cpu", dtype):
        losses = model(inputs)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("counts", [(0, 0), (2, 0), (0, 2)])
def test_images_without_objects_train(
    kind: str, counts: tuple[int, int], tiny_detector: Callable, make_inputs: Callable, event_storage
) -> None:
    """Check that losses and gradients are finite, and that every parameter has a gradient."""
    model = tiny_detector(kind)
    losses = model(make_inputs(counts=counts))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["fcos", "atss", "gfl"])
def test_boxes_that_are_no_numbers_make_losses_that_are_none(
    kind: str, tiny_detector: Callable, make_inputs: Callable, event_storage
) -> None:
    """Check that NaN boxes give a non-finite loss, which the trainer reports, instead of an error."""
    model = tiny_detector(kind)
    torch.nn.init.constant_(model.head.bbox_pred.weight, torch.nan)
    assert not sum(model(make_inputs()).values()).isfinite()


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("fcos", {"NUM_CONVS": 0}, "MODEL.FCOS.NUM_CONVS is 0; it must be a whole number at least 1"),
        (
            "fcos",
            {"CENTER_SAMPLING_RADIUS": 0.0},
            "MODEL.FCOS.CENTER_SAMPLING_RADIUS is 0.0; it must be a number above 0",
        ),
        ("fcos", {"PRIOR_PROB": 1.0}, "MODEL.FCOS.PRIOR_PROB is 1.0; it must be a number above 0 and below 1"),
        ("fcos", {"IN_FEATURES": ["p3", "p9"]}, r"MODEL.FCOS.IN_FEATURES is .*; the backbone has p3, p4, p5, p6, p7"),
        (
            "fcos",
            {"IN_FEATURES": ["p3", "p5", "p4"]},
            r"MODEL.FCOS.IN_FEATURES is \['p3', 'p5', 'p4'\]; order it from fine to coarse: \['p3', 'p4', 'p5'\]",
        ),
        ("reppoints", {"IN_FEATURES": ["p4", "p3"]}, r"MODEL.REPPOINTS.IN_FEATURES .* from fine to coarse"),
        ("atss", {"TOPK": 0}, "MODEL.ATSS.TOPK is 0; it must be a whole number at least 1"),
        ("gfl", {"ANCHOR_SCALE": 0.0}, "MODEL.GFL.ANCHOR_SCALE is 0.0; it must be a number above 0"),
        ("gfl", {"REG_MAX": 0}, "MODEL.GFL.REG_MAX is 0; it must be a whole number at least 1"),
        ("fsaf", {"EFFECTIVE_SCALE": 0.0}, "MODEL.FSAF.EFFECTIVE_SCALE is 0.0; it must be a number above 0"),
        ("reppoints", {"NUM_POINTS": 10}, "MODEL.REPPOINTS.NUM_POINTS is 10; it must be the square of an odd number"),
        ("reppoints", {"NUM_POINTS": 16}, "MODEL.REPPOINTS.NUM_POINTS is 16; it must be the square of an odd number"),
    ],
)
def test_keys_that_make_no_detector(kind: str, keys: dict, message: str, tiny_detector: Callable) -> None:
    with pytest.raises(UserError, match=message):
        tiny_detector(kind, {"MODEL": {kind.upper(): keys}})


@pytest.mark.parametrize("kind", ["fcos", "atss"])
def test_a_neck_that_does_not_divide_into_groups(kind: str, tiny_detector: Callable) -> None:
    keys = {"FPN": {"OUT_CHANNELS": 48}, kind.upper(): {"NORM": "GN"}}
    message = rf"^MODEL\.{kind.upper()}\.NORM is 'GN', which has 32 groups, but the neck has 48 channels \(MODEL\.FPN"
    with pytest.raises(UserError, match=message):
        tiny_detector(kind, {"MODEL": keys})


@pytest.mark.parametrize("width_mult", [1.0, 0.5])
def test_mobilenet_is_torchvisions(width_mult: float, tiny_cfg: Callable) -> None:
    """Check names, shapes and outputs of the stages against torchvision's network."""
    keys = {"BACKBONE": {"NAME": "build_mobilenet_v2_backbone"}, "MOBILENET_V2": {"WIDTH_MULT": width_mult}}
    net = build_backbone(tiny_cfg("retinanet", {"MODEL": keys})).eval()
    theirs = torchvision.models.mobilenet_v2(width_mult=width_mult).eval()
    weights = theirs.state_dict()
    assert {name for name in weights if not name.startswith(("features.18.", "classifier."))} == net.state_dict().keys()
    net.load_state_dict(weights, strict=False)
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = net(images)
        x, expected = images, {}
        for index, block in enumerate(theirs.features[:18]):
            x = block(x)
            expected[index] = x
    for name, index in {"res3": 6, "res4": 13, "res5": 17}.items():
        torch.testing.assert_close(outputs[name], expected[index])
        shape = net.output_shape()[name]
        assert (shape.channels, 64 // shape.stride) == (outputs[name].shape[1], outputs[name].shape[2])


def test_mobilenet_freezes_as_configured(tiny_cfg: Callable) -> None:
    keys = {"BACKBONE": {"NAME": "build_mobilenet_v2_backbone", "FREEZE_AT": 2}}
    net = build_backbone(tiny_cfg("retinanet", {"MODEL": keys}))
    frozen, trained = (
        {int(name.split(".")[1]) for name, p in net.named_parameters() if p.requires_grad == trains}
        for trains in (False, True)
    )
    assert (frozen, trained) == (set(range(4)), set(range(4, 18)))
    assert any(isinstance(m, FrozenBatchNorm2d) for m in net.features[3].modules())
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in net.features[4].modules())


@pytest.mark.parametrize(("freeze_at", "trained"), [(-1, 18), (0, 18), (5, 0), (6, 0)])
def test_mobilenet_freezes_nothing_or_everything(tiny_cfg: Callable, freeze_at: int, trained: int) -> None:
    """Check the ends of the range and, as with Detectron2's ResNets, values beyond them."""
    keys = {"BACKBONE": {"NAME": "build_mobilenet_v2_backbone", "FREEZE_AT": freeze_at}}
    net = build_backbone(tiny_cfg("retinanet", {"MODEL": keys}))
    assert len({name.split(".")[1] for name, p in net.named_parameters() if p.requires_grad}) == trained


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"MOBILENET_V2": {"WIDTH_MULT": 0.0}}, "WIDTH_MULT is 0.0; it must be a number above 0 and at most 2"),
        ({"RESNETS": {"OUT_FEATURES": ["res6"]}}, "OUT_FEATURES names res6; MobileNetV2 has res2, res3, res4, res5"),
        ({"PIXEL_MEAN": [1.0], "PIXEL_STD": [1.0]}, "takes images with 3 channels"),
    ],
)
def test_mobilenet_refuses_what_it_cannot_be(tiny_cfg: Callable, keys: dict, message: str) -> None:
    cfg = tiny_cfg("retinanet", {"MODEL": {"BACKBONE": {"NAME": "build_mobilenet_v2_backbone"}, **keys}})
    with pytest.raises(UserError, match=message):
        build_backbone(cfg)


@pytest.mark.parametrize("keys", [{"DEFORM_ON_PER_STAGE": [False, True, True, True]}, {"RES5_DILATION": 2}])
def test_slim_resnets_say_which_keys_have_no_effect(tiny_cfg: Callable, keys: dict, caplog) -> None:
    cfg = tiny_cfg("retinanet", {"MODEL": {"BACKBONE": {"NAME": "build_slim_resnet_backbone"}, "RESNETS": keys}})
    build_backbone(cfg)
    ((key, value),) = keys.items()
    assert caplog.messages == [f"MODEL.RESNETS.{key} {value} has no effect on a slim ResNet."]


@pytest.mark.parametrize("bottom_up", ["slim_resnet", "mobilenet_v2"])
def test_necks(bottom_up: str, tiny_cfg: Callable) -> None:
    """Check the levels, and that dense detectors compute P6 from P5, so that its shape fits every backbone."""
    for name, levels in {"": "p2 p3 p4 p5 p6", "retinanet_": "p3 p4 p5 p6 p7", "dense_": "p3 p4 p5 p6 p7"}.items():
        builder = f"build_{name}{bottom_up}_fpn_backbone"
        cfg = tiny_cfg("retinanet" if name else "faster", {"MODEL": {"BACKBONE": {"NAME": builder}}})
        registered = BACKBONE_REGISTRY.get(builder)
        assert getattr(sys.modules[registered.__module__], builder) is registered  # so that LazyConfigs can name it
        neck = build_backbone(cfg)
        assert list(neck.output_shape()) == levels.split()
        outputs = neck(torch.zeros(1, 3, 64, 64))
        assert [x.shape[1] for x in outputs.values()] == [8] * 5
        if name:
            channels = neck.top_block.p6.weight.shape[1]
            assert (channels == 8) == (name == "dense_")


def test_fsaf_candidates_by_hand() -> None:
    """Check the central fifth of a box of 40 on cells of 8, the smaller of two boxes, and a fifth within one cell."""
    cells = _grid(8, 6, 1, 8.0)  # [0, 8] to [40, 48] across, [0, 8] down
    boxes = Boxes(torch.tensor([[0.0, -16, 40, 24], [25.0, 0, 29, 8]]))
    # the central fifths: [16, 24] x [0, 8], and [26.6, 27.4] x [3.2, 4.8], a fiftieth of the cell [24, 32]
    assert covers_cell(cells, boxes, 0.2).tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]]
    inside = in_middle(cells, boxes, 0.2)
    assert inside.tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]]
    # the central halves: [10, 30] and [26, 28]; the centers of cells are at 4, 12, 20, 28, 36, 44
    assert in_middle(cells, boxes, 0.5).tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0]]
    assert smallest_box(in_middle(cells, boxes, 0.5), boxes).tolist() == [BACKGROUND, 0, 0, 1, BACKGROUND, BACKGROUND]
    assert smallest_box(inside[:0], boxes[:0]).tolist() == [BACKGROUND] * 6


def test_fsaf_best_level_by_hand() -> None:
    """Check means of 2 and 3 on level 0, 1 and 9 on level 1, and 4 on level 2, and an instance without candidates."""
    loss = torch.tensor([2.0, 3.0, 1.0, 9.0, 4.0, 0.5])
    instance = torch.tensor([0, 0, 0, 0, 0, 2])
    level = torch.tensor([0, 0, 1, 1, 2, 1])
    assert best_level(loss, instance, level, 3, 3)[[0, 2]].tolist() == [0, 1]
    assert best_level(loss - 4 * (level == 2), instance, level, 3, 3)[0] == 2


def test_fsaf_losses_by_hand(tiny_detector: Callable) -> None:
    """Check a box that is exact on the coarse level and has half its sides on the fine one, with all logits 0."""
    model = tiny_detector("fsaf")
    anchors = [_grid(8, 2, 2, 8.0), _grid(16, 1, 1, 16.0)]
    target = Instances((16, 16), gt_boxes=Boxes(torch.tensor([[0.0, 0, 16, 16]])), gt_classes=torch.tensor([1]))
    half = torch.tensor(
        [[0.5, 0.5, 0.5, 0.5]]
    )  # strides: [0, 8] around the first cell's center, [0, 16] on the coarse level
    predictions = [[torch.zeros(1, 4, 3), torch.zeros(1, 1, 3)], [half.expand(1, 4, 4), half[None]]]
    # the central fifth [6.4, 9.6] covers 0.04 of each fine cell
    assignment = model.assign(anchors, predictions, [target])
    assert assignment.tolist() == [[IGNORED] * 4 + [0]]
    losses = model.losses(anchors, predictions, assignment, [target])
    # one target with alpha 1/4; two other classes there and at each fine position, where the box's class is ignored
    assert losses["loss_fsaf_cls"].item() == pytest.approx((0.25 + 10 * 0.75) * 0.25 * math.log(2), rel=1e-5)
    assert losses["loss_fsaf_box"].item() == pytest.approx(0.0, abs=1e-6)
    # with a bad box on the coarse level, the fine level is chosen, where the IoU is 1/4
    predictions[1] = [half.expand(1, 4, 4), half[None] / 8]
    assignment = model.assign(anchors, predictions, [target])
    assert assignment.tolist() == [[0] * 4 + [IGNORED]]
    losses = model.losses(anchors, predictions, assignment, [target])
    assert losses["loss_fsaf_box"].item() == pytest.approx(math.log(4), rel=1e-5)


def test_fsaf_ignoring_region_is_not_the_effective_one(tiny_detector: Callable) -> None:
    """Check a box of 40 on cells of 8: its central half reaches three cells, its central fifth one of them."""
    model = tiny_detector("fsaf")
    cells = _grid(8, 6, 1, 8.0)
    boxes = Boxes(torch.tensor([[0.0, -16, 40, 24]]))
    target = Instances((8, 48), gt_boxes=boxes, gt_classes=torch.tensor([1]))
    predictions = [[torch.zeros(1, 6, 3)], [torch.ones(1, 6, 4)]]
    for effective, ignoring, ignored in ((0.2, 0.2, 1), (0.2, 0.5, 3), (0.5, 0.2, 3)):
        model.effective_scale, model.ignoring_scale = effective, ignoring
        losses = model.losses([cells], predictions, torch.full((1, 6), BACKGROUND), [target])
        expected = (18 - ignored) * 0.75 * 0.25 * math.log(2)
        assert losses["loss_fsaf_cls"].item() == pytest.approx(expected, rel=1e-5), (effective, ignoring)


def test_fsaf_level_without_ignored_classes(tiny_detector: Callable) -> None:
    """Check a high score of the class of a larger box with the same center, which is ignored where the smaller is assigned."""
    model = tiny_detector("fsaf")
    anchors = [_grid(8, 2, 2, 8.0), _grid(16, 1, 1, 16.0)]
    boxes = Boxes(torch.tensor([[0.0, 0, 16, 16], [-16.0, -16, 32, 32]]))
    target = Instances((16, 16), gt_boxes=boxes, gt_classes=torch.tensor([1, 0]))
    centers = [cells.get_centers().repeat(1, 2) for cells in anchors]
    exact = [(boxes.tensor[0] - c) * torch.tensor([-1.0, -1, 1, 1]) / s for c, s in zip(centers, (8, 16), strict=True)]
    distances = [exact[0][None], exact[1][None] / 2]
    logits = [torch.zeros(1, 4, 3), torch.zeros(1, 1, 3)]
    for score in (0.0, 9.0):
        logits[0][..., 0] = score
        assert model.assign(anchors, [logits, distances], [target]).tolist() == [[0] * 4 + [IGNORED]]
    logits[0][..., 2] = 9.0  # a class that is not near counts
    assert model.assign(anchors, [logits, distances], [target]).tolist() == [[IGNORED] * 4 + [0]]


def test_reppoints_box_of_known_points() -> None:
    """Check mean and deviation of nine points in strides of 8, the learned factor, and its gradient scaled by 0.01."""
    transfer = torch.nn.Parameter(torch.tensor([math.log(2.0), 0.0]))
    transform = PointTransform(4.0, transfer)
    y, x = torch.meshgrid(torch.tensor([-1.0, 0, 1]), torch.tensor([0.0, 2, 4]), indexing="ij")
    points = torch.stack([y.flatten(), x.flatten()], 1).flatten()[None]
    box = transform.apply_deltas(points, torch.tensor([_square(20, 12, 32)]))
    # deviations sqrt(6/8) down and sqrt(24/8) across, the latter times 2
    down, across = 8 * math.sqrt(0.75), 2 * 8 * math.sqrt(3)
    torch.testing.assert_close(
        box, torch.tensor([[36 - across, 12 - down, 36 + across, 12 + down]]), rtol=1e-5, atol=1e-4
    )
    box[0, 2].backward()
    assert transfer.grad.tolist() == pytest.approx([0.01 * across, 0.0], rel=1e-4)


def test_reppoints_offsets_that_are_not_finite() -> None:
    """Check that NaN offsets read the maps as offsets of zero do, and infinite ones outside of them, instead of crashing."""
    layer, x = DeformableConv(2, 4, 3, padding=1), torch.rand(1, 2, 5, 7)
    offset = torch.zeros(1, 18, 5, 7)
    torch.testing.assert_close(layer(x, offset * torch.nan), layer(x, offset))
    outside = layer.bias[:, None, None].expand(1, 4, 5, 7)
    torch.testing.assert_close(layer(x, offset - torch.inf), outside)


def test_modulated_deformable_convolution_by_hand() -> None:
    """Check a kernel of one point, which is read a row below with a factor that the features determine."""
    layer, x = ModulatedDeformableConv(2), torch.rand(1, 2, 4, 5)
    ordinary = torch.nn.functional.conv2d(x, layer.weight, padding=1)
    torch.testing.assert_close(layer(x), ordinary / 2 + layer.bias[:, None, None])
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:, :, 1, 1] = torch.eye(2)
        layer.bias.zero_()
        layer.conv_offset.bias[8] = 1  # y of the fifth point, the center
        layer.conv_offset.weight[22, 0, 1, 1] = 3  # its factor
    below = torch.cat([x[:, :, 1:], torch.zeros(1, 2, 1, 5)], 2)
    torch.testing.assert_close(layer(x), below * (3 * x[:, :1]).sigmoid())


def test_deformable_towers_of_fcos(tiny_detector: Callable, make_inputs: Callable, event_storage) -> None:
    """Check that the last convolution of each tower is deformable, starts like the ordinary one, and learns its offsets."""
    ordinary, deformable = (
        tiny_detector("fcos", {"MODEL": {"FCOS": {"DEFORMABLE_TOWERS": on, "NUM_CONVS": 2}}}) for on in (False, True)
    )
    towers = [tower for name in ("cls_subnet", "bbox_subnet") for tower in [getattr(deformable.head, name)]]
    kinds = [[type(layer) for layer in tower if hasattr(layer, "in_channels")] for tower in towers]
    assert kinds == [[torch.nn.Conv2d, ModulatedDeformableConv]] * 2
    last = max(number for number, layer in enumerate(ordinary.head.cls_subnet) if isinstance(layer, torch.nn.Conv2d))
    assert towers[0][last].weight.std().item() == pytest.approx(0.01, rel=0.1)
    sum(deformable(make_inputs()).values()).backward()
    assert all(tower[last].conv_offset.weight.grad.abs().sum() > 0 for tower in towers)


def _deformable_block(modulated: bool, groups: int = 1) -> DeformBottleneckBlock:
    with deformable_resnets():
        return DeformBottleneckBlock(
            6, 6, bottleneck_channels=4, norm="", deform_modulated=modulated, deform_num_groups=groups
        )


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_blocks_by_hand(modulated: bool) -> None:
    """Check that a block without offsets is an ordinary one, whose 3x3 convolution a mask of sigmoid(0) halves."""
    block, x = _deformable_block(modulated), torch.randn(2, 6, 5, 7)
    ordinary = BottleneckBlock(6, 6, bottleneck_channels=4, norm="")
    ordinary.load_state_dict({name: tensor for name, tensor in block.state_dict().items() if "offset" not in name})
    if modulated:
        with torch.no_grad():
            ordinary.conv2.weight /= 2
    torch.testing.assert_close(block(x), ordinary(x))


def test_deformable_blocks_shift_each_group_of_channels() -> None:
    """Check offsets of one position down for the first group, and of two to the right for the second."""
    block, x = _deformable_block(modulated=True, groups=2), torch.rand(1, 4, 6, 8)
    offsets = torch.zeros(2, 9, 2)
    offsets[0, :, 0], offsets[1, :, 1] = 1, 2
    offsets = offsets.flatten()[None, :, None, None].expand(1, -1, 6, 8)
    padded = torch.nn.functional.pad(x, (0, 2, 0, 1))
    shifted = torch.cat([padded[:, :2, 1:, :8], padded[:, 2:, :6, 2:]], dim=1)
    mask = torch.full((1, 18, 6, 8), 0.25)
    ordinary = torch.nn.functional.conv2d(shifted, block.conv2.weight / 4, padding=1)
    # Values in front of the first row and column are 0 in the shifted map, but not in the deformable convolution.
    torch.testing.assert_close(block.conv2(x, offsets, mask)[..., 1:, 1:], ordinary[..., 1:, 1:])


def test_detectron2_keeps_its_deformable_convolutions() -> None:
    with pytest.raises(ValueError), deformable_resnets():
        raise ValueError
    assert (resnet.DeformConv, resnet.ModulatedDeformConv) == (layers.DeformConv, layers.ModulatedDeformConv)


def test_detectron2_keeps_its_deformable_convolutions_if_two_threads_build() -> None:
    """Check a thread that starts to build while another one does, and ends later."""
    started, may_end = threading.Event(), threading.Event()

    def build() -> None:
        with deformable_resnets():
            started.set()
            may_end.wait(60)

    thread = threading.Thread(target=build)
    with deformable_resnets():
        thread.start()
        started.wait(0.5)
    may_end.set()
    thread.join()
    assert (resnet.DeformConv, resnet.ModulatedDeformConv) == (layers.DeformConv, layers.ModulatedDeformConv)


def test_deformable_convolutions_under_autocast() -> None:
    """Check float32 under autocast, and gradients of offsets and masks."""
    block, x = _deformable_block(modulated=True), torch.randn(1, 6, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    out.float().sum().backward()
    torch.testing.assert_close(out.float(), block(x), atol=0.05, rtol=0.05)
    gradient = block.conv2_offset.weight.grad
    assert gradient.isfinite().all() and gradient[:18].any() and gradient[18:].any()


def test_reppoints_nearest_positions_by_hand() -> None:
    """Check the level by size (anchors of 32 and 64), distances relative to the box, and two boxes at one position."""
    anchors = [_grid(8, 4, 2, 32.0), _grid(16, 2, 1, 64.0)]
    boxes = [
        [0.0, 0, 63, 64],  # side 63.5: fine; center (31.5, 32), nearest to (28, 12)
        [16.0, 0, 48, 128],  # side 64: coarse
        [4.0, 4, 6, 6],  # smaller than all anchors: the finest level
        [2.0, 2, 9, 9],  # nearest to the same position: center 1.5 and not 1 away, but nearer relative to its size
    ]
    row = assign_nearest(anchors, Boxes(torch.tensor(boxes)))
    expected = [BACKGROUND] * 10
    expected[0], expected[7], expected[9] = 3, 0, 1
    assert row.tolist() == expected
    assert assign_nearest(anchors, Boxes(torch.zeros(0, 4))).tolist() == [BACKGROUND] * 10


def test_reppoints_that_overlap_nothing_have_no_positive(tiny_detector: Callable) -> None:
    """Check points without extent, 8 pixels apart: a 4-pixel instance overlaps none and gets none."""
    model = tiny_detector("reppoints")
    anchors = [_grid(8, 4, 4, 32.0)]
    boxes = Boxes(torch.tensor([[6.0, 6, 10, 10], [3.0, 3, 11, 11]]))  # the second has the center (4, 4)
    target = Instances((32, 32), gt_boxes=boxes, gt_classes=torch.tensor([0, 1]))
    points = torch.zeros(1, 16, 18)
    (row,) = model.assign(anchors, [[], [], [points]], [target])
    assert row.view(4, 4).tolist() == [[1, -1, -1, -1], [-1] * 4, [-1] * 4, [-1] * 4]


def test_an_instance_out_of_reach_adds_no_positives_to_others(tiny_detector: Callable) -> None:
    """Check an instance of which one position has the best box, beside one that no box overlaps."""
    model = tiny_detector("reppoints")
    anchors = [_grid(8, 4, 1, 32.0)]
    boxes = Boxes(torch.tensor([[0.0, 0, 32, 8], [100.0, 0, 104, 4]]))
    side = torch.tensor([0.5, 0.75, 0.5, 0.5])  # strides
    points = torch.stack(torch.meshgrid(*[torch.tensor([-1.0, 0, 1])] * 2, indexing="ij"), -1).flatten()
    points = points * side[:, None] / 2 / math.sqrt(0.75)
    for number in (1, 2):
        target = Instances((8, 112), gt_boxes=boxes[:number], gt_classes=torch.zeros(number, dtype=torch.long))
        assert model.assign(anchors, [[], [], [points[None]]], [target]).tolist() == [
            [BACKGROUND, 0, BACKGROUND, BACKGROUND]
        ]


def test_reppoints_losses_by_hand(tiny_detector: Callable) -> None:
    """Check first points whose box is the anchor, refined ones off by a quarter, and one background position."""
    model = tiny_detector("reppoints")
    anchors = [_grid(8, 3, 1, 32.0)]
    half = 16 / 8  # strides
    points = torch.stack(torch.meshgrid(*[torch.tensor([-1.0, 0, 1])] * 2, indexing="ij"), -1).flatten()
    points = points * half / math.sqrt(0.75)
    moved = points + torch.tensor([0.0, 1.0]).repeat(9)  # 8 pixels across
    target = Instances((8, 24), gt_boxes=Boxes(torch.tensor([_square(4, 4, 32)])), gt_classes=torch.tensor([1]))
    predictions = [[torch.zeros(1, 3, 3)], [moved.expand(1, 3, 18)], [points.expand(1, 3, 18)]]
    # IoUs of anchors 8 and 16 pixels beside the box: 24 / 40 = 0.6 and 16 / 48
    assignment = model.assign(anchors, predictions, [target])
    assert assignment.tolist() == [[0, 0, BACKGROUND]]
    losses = model.losses(anchors, predictions, assignment, [target])
    # two positives with a target of alpha 1/4 each, and seven others with 3/4
    assert losses["loss_reppoints_cls"].item() == pytest.approx(
        (2 * 0.25 + 7 * 0.75) * 0.25 * math.log(2) / 2, rel=1e-5
    )
    # only the nearest position, which is exact
    assert losses["loss_reppoints_init"].item() == pytest.approx(0, abs=1e-5)
    # both positives: left and right sides 8 and 16 pixels too far right, in units of 32, minus half of beta
    expected = (2 * (0.25 - 0.055) + 2 * (0.5 - 0.055)) / 2
    assert losses["loss_reppoints_refine"].item() == pytest.approx(expected, rel=1e-3)
    assignment[0, 2] = IGNORED  # without its three classes
    assert model.losses(anchors, predictions, assignment, [target])["loss_reppoints_cls"].item() == pytest.approx(
        (2 * 0.25 + 4 * 0.75) * 0.25 * math.log(2) / 2, rel=1e-5
    )
    far = Instances((8, 24), gt_boxes=Boxes(torch.tensor([_square(-10, 4, 32)])), gt_classes=torch.tensor([1]))
    assert model.assign(anchors, predictions, [far]).tolist() == [[0, BACKGROUND, BACKGROUND]]  # its best IoU is 0.39


def test_reppoints_begin_with_the_anchors_as_boxes(tiny_detector: Callable) -> None:
    """Check the first and the refined boxes of every level for zero features."""
    model = tiny_detector("reppoints")
    levels = [torch.zeros(1, 8, side, side) for side in (8, 4, 2, 1, 1)]
    anchors = Boxes.cat(model.anchor_generator(levels)).tensor
    _, refined, first = model.transpose(model.head(levels))
    for points in (first, refined):
        boxes = model.box2box_transform.apply_deltas(torch.cat(points, 1)[0], anchors)
        torch.testing.assert_close(boxes, anchors, rtol=1e-4, atol=1e-2)


def test_reppoints_sample_where_the_first_points_are(tiny_detector: Callable) -> None:
    """Check that first points on the kernel grid give an ordinary convolution, and the gradient share of 0.1."""
    head = tiny_detector("reppoints").head
    x = torch.randn(1, 8, 5, 6)
    with torch.no_grad():
        head.first_points.weight.zero_()
        head.first_points.bias.copy_(head.kernel_grid.flatten())
    logits = head([x] * 5)[0][0]
    class_features = torch.nn.functional.conv2d(head.cls_subnet(x), head.class_conv.weight, padding=1)
    torch.testing.assert_close(logits, head.cls_score(class_features.relu()), rtol=1e-4, atol=1e-5)
    (through_logits,) = torch.autograd.grad(logits.square().sum(), head.first_points.bias, retain_graph=True)
    head.gradient_share = 1.0
    whole = head([x] * 5)[0][0]
    (all_of_it,) = torch.autograd.grad(whole.square().sum(), head.first_points.bias)
    torch.testing.assert_close(through_logits, 0.1 * all_of_it, rtol=1e-3, atol=1e-7)
    with torch.no_grad():
        head.refined_points.weight.zero_()
    (through_refined,) = torch.autograd.grad(head([x] * 5)[1][0].sum(), head.first_points.bias)
    assert through_refined.abs().max() == 0  # the first points are added without a gradient


SWIN = {"EMBED_DIM": 4, "DEPTHS": (1, 2, 1, 1), "NUM_HEADS": (1, 2, 2, 4), "WINDOW_SIZE": 3, "DROP_PATH_RATE": 0.4}


def _swin(tiny_cfg: Callable, freeze_at: int = 0, **keys: object) -> torch.nn.Module:
    backbone = {"NAME": "build_retinanet_swin_fpn_backbone", "FREEZE_AT": freeze_at}
    return build_backbone(tiny_cfg("retinanet", {"MODEL": {"BACKBONE": backbone, "SWIN": {**SWIN, **keys}}})).bottom_up


def test_swin_returns_the_chosen_stages(tiny_cfg: Callable) -> None:
    """Check names, strides and channels, for an image whose feature maps are no multiples of the window."""
    network = _swin(tiny_cfg).eval()
    features = network(torch.rand(1, 3, 64, 128))
    shapes = {name: tuple(x.shape) for name, x in features.items()}
    assert shapes == {"res3": (1, 8, 8, 16), "res4": (1, 16, 4, 8), "res5": (1, 32, 2, 4)}
    assert {name: (shape.channels, shape.stride) for name, shape in network.output_shape().items()} == {
        "res3": (8, 8), "res4": (16, 16), "res5": (32, 32)
    }  # fmt: skip


def test_swin_drops_whole_paths_of_images(tiny_cfg: Callable) -> None:
    """Check rates that increase from 0 to the last block's, and that evaluation has none."""
    network = _swin(tiny_cfg)
    paths = [block.drop_path for layer in network.layers for block in layer.blocks]
    assert [path.p for path in paths] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    torch.manual_seed(0)
    dropped = paths[-1](torch.ones(200, 3, 2))
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.6]) and (dropped == dropped[:, :1, :1]).all()
    network.eval()
    x = torch.rand(2, 3, 32, 32)
    assert network(x)["res5"].equal(network(x)["res5"])


@pytest.mark.parametrize(("freeze_at", "frozen"), [(0, set()), (1, {"patch_embed"}), (2, {"patch_embed", "layers.0"})])
def test_swin_freezes_as_resnets_do(tiny_cfg: Callable, freeze_at: int, frozen: set[str]) -> None:
    parameters = _swin(tiny_cfg, freeze_at).named_parameters()
    fixed = {name for name, p in parameters if not p.requires_grad}
    assert {name.partition(".")[0] if name[0] == "p" else name[:8] for name in fixed} == frozen


def test_tables_of_relative_positions_have_no_weight_decay(tiny_cfg: Callable) -> None:
    without = _swin(tiny_cfg).parameters_without_weight_decay()
    assert len(without) == 5 and {p.shape[0] for p in without} == {(2 * 3 - 1) ** 2}


def test_swin_whose_heads_do_not_divide_the_channels(tiny_cfg: Callable) -> None:
    with pytest.raises(
        UserError, match=r"MODEL\.SWIN\.NUM_HEADS is .*; 3 heads do not divide the 8 channels of stage 2"
    ):
        _swin(tiny_cfg, NUM_HEADS=(1, 3, 2, 4))
