"""FGFI, DeFeat, FKD and GID: hand-worked formulas, gradients, and training steps of real detectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from kd_d2 import DISTILLER_REGISTRY, Distiller, KDMetaArch, Teacher
from kd_d2.adapters import DensePredictions, DetectorOutputs, build_adapter
from kd_d2.distillers import FGFI, FKD, GID, DeFeat
from kd_d2.distillers.fgfi import near_objects
from kd_d2.distillers.gid import relation_loss, select_instances
from kd_d2.distillers.masks import inside_boxes
from kd_d2.distillers.non_local import NonLocalBlock, non_local_matrices
from kd_d2.errors import UserError
from kd_d2.losses import channel_attention, masked_squared_error, spatial_attention
from kd_d2.losses.flat_levels import FlatLevels

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from helpers import configured, make, scaled, spec_of, targets_of
from torch import Tensor

pytestmark = pytest.mark.unit

METHODS = ("FGFI", "DeFeat", "FKD")


@pytest.fixture
def build(tiny_cfg: Callable, tiny_detector: Callable) -> Callable[..., Distiller]:
    """Return a function (method, keys) that builds a distiller of two RetinaNets, without adaptation by default."""

    def build(method: type[Distiller], **keys: Any) -> Distiller:
        cfg = tiny_cfg("retinanet", {"MODEL": {"KD": {method.CONFIG_NODE: {"ADAPTATION": "none", **keys}}}})
        torch.manual_seed(0)
        return configured(method, cfg, *(build_adapter(tiny_detector("retinanet")).spec for _ in range(2)))

    return build


def _outputs(features: dict[int, Tensor], anchors: dict[int, Boxes] | None = None) -> DetectorOutputs:
    return DetectorOutputs(images=None, features=features, anchors=anchors)


def _features(seed: int = 0, side: int = 64) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    levels = {stride: max(1, side // stride) for stride in (8, 16, 32, 64, 128)}
    return tuple({s: torch.randn(2, 8, n, n, generator=generator) for s, n in levels.items()} for _ in range(2))


def test_masked_squared_error_by_hand() -> None:
    """Check two channels with one position of weight 2: 2 * (1 + 9) / 2, and the gradient numerically."""
    student = torch.tensor([[[[1.0, 5.0]], [[0.0, 7.0]]]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[[[2.0, 0.0]], [[3.0, 0.0]]]], dtype=torch.float64)
    mask = torch.tensor([[[2.0, 0.0]]], dtype=torch.float64)
    assert masked_squared_error(student, teacher, mask).item() == 10
    assert torch.autograd.gradcheck(lambda s: masked_squared_error(s, teacher, mask), student)


def test_gid_keeps_the_images_of_a_batch_apart() -> None:
    """Check one box of each of two images, which torchvision's NMS would move onto each other if one were negative."""
    boxes = {8: torch.tensor([[[600.0, 600, 1000, 1000]], [[-401.0, -401, -1, -1]]])}
    student, teacher = (
        DensePredictions({8: torch.full((2, 1, 1), x)}, boxes, {8: Boxes(torch.zeros(1, 4))}, lambda x, _: x)
        for x in (0.0, 1.0)
    )
    assert select_instances(student, teacher, 1, 0.3).is_taken.tolist() == [True, True]


def test_inside_boxes_by_hand() -> None:
    """Check centers at x 4, 12, 20 and y 4, 12: boxes that overlap count once, a center on a side is outside."""
    student = _outputs({8: torch.zeros(2, 1, 2, 3)})
    overlapping, on_sides = [[3.9, 0.0, 12.1, 8.0], [0.0, 0.0, 8.0, 16.0]], [[4.0, 4.0, 12.0, 12.5]]
    (mask,) = inside_boxes(student, targets_of(overlapping, on_sides), [8])
    assert mask.tolist() == [[[1, 1, 0], [1, 0, 0]], [[0, 0, 0], [0, 0, 0]]]


def test_near_objects_by_hand() -> None:
    """Check IoUs 1, 1/3, 1/4 and 0 against 0.5 and 0.2 of the best, two anchors per position, and several boxes."""
    wide = [[0.0, 0, 16, 8], [8.0, 0, 24, 8], [0.0, 0, 8, 24], [40, 0, 48, 8]]
    anchors = Boxes(torch.tensor(wide))  # two positions of two anchors
    box = [0.0, 0, 16, 8]
    # IoUs: 1, 8 * 8 / (2 * 128 - 64) = 1/3; 64 / (128 + 192 - 64) = 1/4, 0
    near = near_objects(anchors, (1, 2), targets_of([box], []), 0.5)
    assert near.tolist() == [[[1, 0]], [[0, 0]]]
    assert near_objects(anchors, (1, 2), targets_of([box]), 0.2).tolist() == [[[1, 1]]]
    assert near_objects(anchors, (1, 2), targets_of([box, [40.0, 0, 48, 8]]), 0.5).tolist() == [[[1, 1]]]
    # a box that no anchor overlaps marks no position
    assert near_objects(anchors, (1, 2), targets_of([[100.0, 100, 110, 110]]), 0.5).tolist() == [[[0, 0]]]


def test_fgfi_by_hand(build: Callable) -> None:
    """Check the sum over levels, positions and channels, divided by twice the marked positions of all levels."""
    student, teacher = _features()
    centers = {s: torch.arange(len(x[0, 0])) * s + s / 2 for s, x in student.items()}
    anchors = {}
    for stride, center in centers.items():
        y, x = torch.meshgrid(center, center, indexing="ij")
        corner = torch.stack([x, y, x, y], -1).view(-1, 4)
        anchors[stride] = Boxes(corner + torch.tensor([-1.0, -1, 1, 1]) * stride / 2)
    targets = targets_of([[0.0, 0, 8, 8]], [[32.0, 32, 64, 64]])
    masks = [near_objects(anchors[s], student[s].shape[-2:], targets, 0.5) for s in student]
    assert [int(m.sum()) for m in masks] == [1 + 16, 1 + 4, 1 + 1, 1 + 1, 1 + 1]
    total = sum((m[:, None] * (student[s] - teacher[s]).square()).sum() for s, m in zip(student, masks, strict=True))
    loss = scaled(build(FGFI, WEIGHT=0.1), _outputs(student, anchors), _outputs(teacher), targets)
    assert loss["loss_fgfi"].item() == pytest.approx(0.1 * total.item() / (2 * 28), rel=1e-5)
    assert build(FGFI)(_outputs(student, anchors), _outputs(teacher), targets_of([], []))["loss_fgfi"].item() == 0


def test_defeat_by_hand(build: Callable) -> None:
    """Check half the mean over foreground and background elements of each level, the mean over levels, and weights."""
    student, teacher = _features()
    targets = targets_of([[0.0, 0, 32, 64]], [])
    losses = scaled(build(DeFeat, WEIGHT=2.0), _outputs(student), _outputs(teacher), targets)
    inside, outside = [], []
    for stride, s in student.items():
        error = (s - teacher[stride]).square()
        mask = torch.zeros(2, *s.shape[-2:], dtype=torch.bool)
        center = (torch.arange(s.shape[-1]) + 0.5) * stride
        mask[0, center < 64, :] = (center > 0) & (center < 32)
        inside.append(error.permute(0, 2, 3, 1)[mask].sum() / max(1, int(mask.sum())) / 8)
        outside.append(error.permute(0, 2, 3, 1)[~mask].mean())
    assert losses["loss_defeat_foreground"].item() == pytest.approx(2 * 3 * (sum(inside) / 5 / 2).item(), rel=1e-5)
    assert losses["loss_defeat_background"].item() == pytest.approx(2 * 12 * (sum(outside) / 5 / 2).item(), rel=1e-5)


def test_many_positions_are_counted_in_half_precision() -> None:
    """Check a mask of more positions than float16 has numbers, under autocast."""
    student = _outputs({4: torch.zeros(2, 1, 200, 200)})
    with torch.autocast("cpu", torch.float16):
        (mask,) = inside_boxes(student, targets_of([[0.0, 0, 800, 800], [8.0, 8, 16, 16]], [[0.0, 0, 800, 796]]), [4])
    assert mask.sum().item() == 40_000 + 39_800


def test_channel_attention_by_hand() -> None:
    """Check two channels with mean |F| of 1 and 2 for the student, 0 and log 3 for the teacher."""
    student = torch.tensor([[1.0, -1.0], [-2.0, 2.0]]).view(1, 2, 1, 2)
    teacher = torch.tensor([[0.0, 0.0], [-math.log(3), math.log(3)]]).view(1, 2, 1, 2)
    weight = channel_attention(student, teacher, 1.0)
    of_student = 2 * math.e / (1 + math.e)
    assert weight.shape == (1, 2, 1, 1)
    assert weight.flatten().tolist() == pytest.approx([(2 - of_student + 0.5) / 2, (of_student + 1.5) / 2])


def test_fkd_by_hand(build: Callable) -> None:
    """Check the three norms per image; the non-local blocks start as the identity."""
    fkd = build(FKD)
    for layer in fkd.relation_adaptation.values():
        torch.nn.init.dirac_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    student, teacher = _features()
    losses = fkd(_outputs(student), _outputs(teacher), [])
    attention = feature = relation = 0.0
    for stride, s in student.items():
        t = teacher[stride]
        mask = spatial_attention(s, t, 0.5) * channel_attention(s, t, 0.5)
        for image in range(2):
            a, b = s[image], t[image]
            attention += (a.abs().mean(0) - b.abs().mean(0)).norm() + (
                a.abs().mean((1, 2)) - b.abs().mean((1, 2))
            ).norm()
            feature += ((a - b).square() * mask[image]).sum().sqrt()
            relation += (a - b).norm()
    for name, weight, expected in (
        ("attention", 4e-3, attention),
        ("feature", 7e-5, feature),
        ("relation", 7e-5, relation),
    ):
        assert losses[f"loss_fkd_{name}"].item() == pytest.approx(weight * expected.item() / 2, rel=1e-4)


def test_fkd_of_the_program_by_hand(build: Callable) -> None:
    """Check attention of signed means through separate layers and norms over the batch, with identity layers."""
    fkd = build(FKD, ATTENTION="adapted", NORM="batch")
    for layer in (*fkd.relation_adaptation.values(), *(a.positions for a in fkd.attention_adaptation.values())):
        torch.nn.init.dirac_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    for layer in fkd.attention_adaptation.values():
        torch.nn.init.eye_(layer.channels.weight)
        torch.nn.init.zeros_(layer.channels.bias)
    student, teacher = _features()
    losses = fkd(_outputs(student), _outputs(teacher), [])
    attention = feature = relation = 0.0
    for stride, s in student.items():
        difference = s - teacher[stride]
        mask = spatial_attention(s, teacher[stride], 0.5) * channel_attention(s, teacher[stride], 0.5)
        attention += difference.mean(1).norm() + difference.mean((2, 3)).norm()
        feature += (difference.square() * mask).sum().sqrt()
        relation += difference.norm()
    assert losses["loss_fkd_attention"].item() == pytest.approx(4e-3 * attention.item(), rel=1e-4)
    assert losses["loss_fkd_feature"].item() == pytest.approx(7e-5 * feature.item(), rel=1e-4)
    assert losses["loss_fkd_relation"].item() == pytest.approx(7e-5 * relation.item(), rel=1e-4)


def test_fkd_without_what_has_no_weight(build: Callable) -> None:
    """Check that the loss of masked features is unchanged, without other losses or layers."""
    maps = [_outputs(features) for features in _features()]
    part = build(FKD, ATTENTION="adapted", ATTENTION_WEIGHT=0.0, RELATION_WEIGHT=0.0)
    losses = part(*maps, [])
    assert part.loss_names == tuple(losses) == ("loss_fkd_feature",)
    assert losses.items() <= build(FKD)(*maps, []).items()
    assert not list(part.parameters())


def test_non_local_block_is_the_sum_over_all_pairs() -> None:
    """Check blocks of two levels against the explicit matrix of all pairs of positions, and the gradients."""
    torch.manual_seed(0)
    blocks = [NonLocalBlock(3, 2).double() for _ in range(2)]
    maps = [torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True) for size in ((4, 5), (2, 3))]
    expected = []
    for block, x in zip(blocks, maps, strict=True):
        torch.nn.init.normal_(block.out.weight)
        torch.nn.init.normal_(block.out.bias)
        theta, phi, g = (layer(x).flatten(2) for layer in (block.theta, block.phi, block.g))
        pairs = torch.einsum("bdi,bdj->bij", theta, phi) / x[0, 0].numel()
        gathered = torch.einsum("bij,bdj->bdi", pairs, g).view(2, 2, *x.shape[2:])
        expected.append(x + block.out(gathered))
    matrices = non_local_matrices(blocks, [x.flatten(2) for x in maps], FlatLevels.of(maps))
    for matrix, block, x, wanted in zip(matrices, blocks, maps, expected, strict=True):
        with_ones = torch.cat([x.flatten(2), torch.ones(2, 1, x[0, 0].numel())], 1)
        torch.testing.assert_close((matrix @ with_ones).view_as(x), wanted)
        leaves, upstream = [x, *block.parameters()], torch.randn_like(wanted)
        found = torch.autograd.grad(block(x), leaves, upstream)
        torch.testing.assert_close(found, torch.autograd.grad(wanted, leaves, upstream))


def test_fkd_of_equal_features_has_finite_gradients(build: Callable) -> None:
    """Check norms at zero."""
    fkd, (student, _) = build(FKD), _features()
    for layer in fkd.relation_adaptation.values():
        torch.nn.init.dirac_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    ours = {s: x.clone().requires_grad_() for s, x in student.items()}
    sum(fkd(_outputs(ours), _outputs(student), []).values()).backward()
    assert all(x.grad.isfinite().all() for x in ours.values())


@pytest.mark.parametrize(("attention", "norm"), [("absolute", "image"), ("adapted", "batch")])
def test_fkd_gradient_numerically(build: Callable, attention: str, norm: str) -> None:
    """Check relation, attention and feature distances in float64, per image and over the batch."""
    fkd = build(FKD, ATTENTION=attention, NORM=norm).double()
    student, teacher = torch.randn(2, 1, 8, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    student.requires_grad_()
    for layer in fkd.student_relations.values():
        torch.nn.init.normal_(layer.out.weight, std=0.1)
    levels, strides = FlatLevels.of([teacher]), (8,)

    def attention_distance(s: Tensor) -> Tensor:
        adapted = FKD.adapted_attention.__wrapped__(fkd, s, strides=strides) if attention == "adapted" else None
        return fkd.norm_of_images(squares(s, adapted)["loss_fkd_attention"])

    def relation_distance(s: Tensor) -> Tensor:
        return fkd.norm_of_images(FKD.relation_squares.__wrapped__(fkd, s, teacher, strides=strides, levels=levels))

    def squares(s: Tensor, adapted: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        return FKD.flat_squares.__wrapped__(fkd, s.flatten(2), teacher.flatten(2), adapted, levels)

    assert torch.autograd.gradcheck(relation_distance, student)
    assert torch.autograd.gradcheck(attention_distance, student)
    # the masks are constants: numerically, the distance is taken with the masks of this student
    mask = (spatial_attention(student, teacher, 0.5) * channel_attention(student, teacher, 0.5)).detach()

    def masked_distance(s: Tensor) -> Tensor:
        return (mask * (s - teacher).square()).sum((1, 2, 3)).sqrt()

    assert torch.autograd.gradcheck(masked_distance, student)
    (expected,) = torch.autograd.grad(masked_distance(student).sum(), student)
    (found,) = torch.autograd.grad(fkd.norm_of_images(squares(student)["loss_fkd_feature"]), student)
    torch.testing.assert_close(found, expected)


def _dense(logits: Tensor, offset: float) -> DensePredictions:
    """Build predictions of two levels with four and one anchors of 8 and 16 pixels; boxes are anchors moved right."""
    small = Boxes(torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8], [0, 8, 8, 16], [8, 8, 16, 16]]))
    large = Boxes(torch.tensor([[0.0, 0, 16, 16]]))
    return DensePredictions(
        logits={8: logits[:, :4], 16: logits[:, 4:]},
        box_regression={8: torch.full((len(logits), 4, 1), offset), 16: torch.full((len(logits), 1, 1), offset)},
        anchors={8: small, 16: large},
        decode=lambda regression, anchors: anchors.tensor + regression * torch.tensor([1.0, 0, 1, 0]),
    )


def test_fgfi_reads_the_students_anchors_alone(
    tiny_cfg: Callable, tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check a teacher without anchors, and a student whose RPN skips a level."""
    student, teacher = tiny_detector("faster"), tiny_detector("panoptic", seed=1)
    specs = build_adapter(student).spec, build_adapter(teacher).spec
    fgfi = configured(FGFI, tiny_cfg("faster"), *specs)
    model = KDMetaArch(student=student, teacher=Teacher(teacher), distillers={"FGFI": fgfi})
    assert model(make_inputs())["loss_fgfi"] > 0
    sizes = {"ANCHOR_GENERATOR": {"SIZES": [[16], [32], [64], [128]]}}
    fewer = tiny_detector("faster", {"MODEL": {"RPN": {"IN_FEATURES": ["p2", "p3", "p4", "p5"]}, **sizes}})
    with pytest.raises(UserError, match=r"GeneralizedRCNN has none at the strides \[64\]"):
        configured(FGFI, tiny_cfg("faster"), build_adapter(fewer).spec, specs[1])


def test_general_instances_by_hand() -> None:
    """Check the order by difference, the box of the more confident detector, NMS, and the maximum per image."""
    student = torch.tensor([[[-9.0, -9], [-9, 2], [-9, -9], [-9, -9], [-9, -9]]]).repeat(2, 1, 1)
    teacher = torch.tensor([[[1.0, -9], [-9, -9], [-9, -9], [-9, 0], [-9, 3]]]).repeat(2, 1, 1)
    teacher[1, 4] = -9.0
    outputs = _dense(student, 0.5), _dense(teacher, 0.25)
    # differences: the large anchor 0.95, then 0.88 at the second (the student's), 0.73 at the first, 0.5 at the fourth
    best = select_instances(*outputs, 3, 0.3)
    assert best.anchors.image.tolist() == [0, 0, 0, 1, 1, 1]
    assert best.anchors.anchor.tolist() == [4, 1, 0, 1, 0, 3]
    assert best.boxes[:3].tolist() == [[0.25, 0, 16.25, 16], [8.5, 0, 16.5, 8], [0.25, 0, 8.25, 8]]
    assert best.is_taken.all()
    # each small box has an IoU of about 1/4 with the large one
    best = select_instances(*outputs, 3, 0.2)
    assert best.anchors.anchor[best.is_taken].tolist() == [4, 1, 0, 3]
    assert best.anchors.image[best.is_taken].tolist() == [0, 1, 1, 1]
    assert best.is_taken.tolist() == [True, False, False, True, True, True]
    assert select_instances(*outputs, 1, 0.3).anchors.anchor.tolist() == [4, 1]


def test_the_surer_detector_is_that_with_the_best_class() -> None:
    """Check (0.9, 0.01) against (0.6, 0.7): the second class differs most, but the teacher is more confident."""
    student, teacher = (torch.full((1, 5, 2), -9.0) for _ in range(2))
    student[0, 0], teacher[0, 0] = (torch.tensor(p).logit() for p in ([0.6, 0.7], [0.9, 0.01]))
    best = select_instances(_dense(student, 0.5), _dense(teacher, 0.25), 1, 0.3)
    assert best.anchors.anchor.tolist() == [0]
    assert best.boxes.tolist() == [[0.25, 0, 8.25, 8]]


def test_relation_loss_by_hand() -> None:
    """Check distances 3, 4, 5 and 1, 1, 1, divided by their means, two images, and fewer than three instances."""
    triangle = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0], [7.0, 7.0]], dtype=torch.float64)
    even = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)], [-9.0, 2.0]], dtype=torch.float64)
    # 3/4, 4/4, 5/4 against 1: smooth l1 of 1/4 is 1/32
    expected = 2 / 32 / 3
    three = torch.tensor([[True, True, True, False]])
    two = torch.tensor([[True, True, False, False]])
    assert relation_loss(triangle[None], even[None], three).item() == pytest.approx(expected)
    both = [torch.stack([x, x]) for x in (triangle, even)]
    assert relation_loss(*both, torch.cat([three, two])).item() == pytest.approx(expected)
    assert relation_loss(*(x[1:] for x in both), two).item() == 0
    student = triangle[None].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: relation_loss(s, even[None], three), student)


def test_relation_loss_of_equal_instances() -> None:
    """Check three instances with distances of zero against 1, 1, 1: smooth l1 of 1 is 1/2, and gradients are finite."""
    student = torch.ones(1, 3, 2, requires_grad=True)
    even = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]]])
    loss = relation_loss(student, even, torch.ones(1, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == pytest.approx(0.5) and student.grad.isfinite().all()


def _stride_maps() -> dict[int, Tensor]:
    """Return neck outputs of a 64 px image whose values are their stride."""
    return {s: torch.full((1, 8, n, n), float(s)) for s, n in ((8, 8), (16, 4), (32, 2), (64, 1), (128, 1))}


def test_gid_responses_and_features_by_hand(build: Callable) -> None:
    """Check the sums over selected anchors, the features of each instance from its own level, and the divisors."""
    student, teacher = torch.randn(2, 1, 5, 3, generator=torch.Generator().manual_seed(0))
    ours, theirs = _dense(student, 0.5), _dense(teacher, 0.25)
    gid = build(GID, INSTANCES=7)  # more than there are anchors: five slots are taken
    best = select_instances(ours, theirs, 7, 0.3)
    assert best.is_taken.tolist() == [True] * 5 + [False] * 2
    chosen = best.anchors.anchor[:5]
    assert sorted(chosen.tolist()) == [0, 1, 2, 3, 4]
    picked = [x[0, chosen] for x in (student, teacher)]
    probability = picked[1].sigmoid()
    entropy = -(probability * picked[0].sigmoid().log() + (1 - probability) * (-picked[0]).sigmoid().log())
    maps = _stride_maps()
    outputs = [DetectorOutputs(images=None, features=maps, dense=dense) for dense in (ours, theirs)]
    features, _ = gid._features(*outputs, best)
    assert features.shape == (7, 8, 10, 10)
    for instance, anchor in zip(features[:5], chosen.tolist(), strict=True):
        torch.testing.assert_close(instance, torch.full_like(instance, 8.0 if anchor < 4 else 16.0))
    other = DetectorOutputs(images=None, features={s: x + 1 for s, x in maps.items()}, dense=theirs)
    losses = gid(outputs[0], other, targets_of([]))
    # a difference of 1 in 8 channels at every cell
    assert losses["loss_gid_feature"].item() == pytest.approx(5e-4 * 8, rel=1e-5)
    assert losses["loss_gid_class"].item() == pytest.approx(0.1 * entropy.sum().item() / 5, rel=1e-5)
    assert losses["loss_gid_box"].item() == pytest.approx(0.1 * 0.25, rel=1e-5)
    assert losses["loss_gid_relation"].item() == pytest.approx(0, abs=1e-9)  # the same distances
    for absent, weights in (
        (["relation", "class", "box"], {"RELATION_WEIGHT": 0.0, "CLASS_WEIGHT": 0.0, "BOX_WEIGHT": 0.0}),
        (["class"], {"CLASS_WEIGHT": 0.0}),
    ):
        part = build(GID, INSTANCES=7, **weights)
        rest = {name: loss for name, loss in losses.items() if name.split("_")[-1] not in absent}
        assert part(outputs[0], other, targets_of([])) == rest and part.loss_names == tuple(rest)


def test_gid_gradient_is_of_the_taken_places(build: Callable) -> None:
    """Check p_S - p_T at the selected anchors, weighted and divided by their number, and zero elsewhere."""
    student, teacher = torch.randn(2, 1, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = select_instances(_dense(student, 0.5), _dense(teacher, 0.25), 7, 0.2)
    assert not best.is_taken.all()
    gid, float32 = build(GID, INSTANCES=7, NMS_THRESH=0.2), student.float().requires_grad_()
    dense = _dense(float32, 0.5), _dense(teacher.float(), 0.25)
    outputs = [DetectorOutputs(images=None, features=_stride_maps(), dense=part) for part in dense]
    (gradient,) = torch.autograd.grad(gid(*outputs, targets_of([]))["loss_gid_class"], float32)
    expected = torch.zeros_like(gradient)
    taken = best.anchors.anchor[best.is_taken]
    expected[0, taken] = (student.sigmoid() - teacher.sigmoid())[0, taken].float()
    torch.testing.assert_close(gradient, 0.1 * expected / len(taken))


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "atss", "gfl", "fsaf", "reppoints"])
def test_gid_on_detectors(
    tiny_cfg: Callable, tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage, kind: str
) -> None:
    """Check every dense detector on images without objects, since general instances need no annotations."""
    student, other = tiny_detector(kind), tiny_detector(kind, seed=1)
    gid = configured(GID, tiny_cfg(kind), build_adapter(student).spec, build_adapter(other).spec)
    model = KDMetaArch(student=student, teacher=Teacher(other), distillers={"GID": gid})
    losses = model(make_inputs(counts=(0, 0)))
    sum(losses[name] for name in gid.loss_names).backward()
    assert all(losses[name].isfinite() and losses[name] > 0 for name in gid.loss_names)
    assert all(p.grad.isfinite().all() for p in gid.parameters())
    assert any(p.grad.abs().max() > 0 for p in gid.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.backbone.parameters())


def test_gid_needs_the_same_channels_at_all_levels() -> None:
    properties = {
        "provides": frozenset({"features", "dense"}),
        "cell_anchors": {8: torch.ones(1, 4), 16: torch.ones(1, 4)},
    }
    student, teacher = spec_of({8: 4, 16: 6}, **properties), spec_of({8: 8, 16: 8}, **properties)
    make(GID, student, teacher)
    with pytest.raises(UserError, match=r"^GID compares .* those of Pupil have different channels: {8: 4, 16: 6}\.$"):
        make(GID, teacher, student)


def test_gid_needs_the_same_anchors(tiny_cfg: Callable, tiny_detector: Callable) -> None:
    specs = [build_adapter(tiny_detector(kind)).spec for kind in ("retinanet", "atss")]
    with pytest.raises(UserError, match="GID compares predictions anchor by anchor"):
        configured(GID, tiny_cfg("retinanet"), *specs)
    two_stage = tiny_detector("faster")
    spec = build_adapter(two_stage).spec
    with pytest.raises(UserError, match=r"GID needs dense predictions, which the student \(GeneralizedRCNN\)"):
        KDMetaArch(
            student=two_stage,
            teacher=Teacher(tiny_detector("faster")),
            distillers={"GID": configured(GID, tiny_cfg("faster"), spec, spec)},
        )


@pytest.mark.parametrize(
    ("kind", "teacher"), [("retinanet", "retinanet"), ("faster", "cascade"), ("fcos", "retinanet"), ("gfl", "atss")]
)
@pytest.mark.parametrize("counts", [(3, 2), (1, 0), (0, 0)])
def test_on_detectors(
    tiny_cfg: Callable,
    tiny_detector: Callable,
    make_inputs: Callable,
    event_storage: EventStorage,
    kind: str,
    teacher: str,
    counts: tuple[int, int],
) -> None:
    """Check finite losses of one-stage and two-stage pairs, also without objects, and no gradient in the teacher."""
    student, other = tiny_detector(kind), tiny_detector(teacher, seed=1)
    cfg = tiny_cfg(kind)
    specs = build_adapter(student).spec, build_adapter(other).spec
    distillers = {name: configured(DISTILLER_REGISTRY.get(name), cfg, *specs) for name in METHODS}
    model = KDMetaArch(student=student, teacher=Teacher(other), distillers=distillers)
    losses = model(make_inputs(counts=counts))
    names = [name for distiller in distillers.values() for name in distiller.loss_names]
    sum(losses[name] for name in names).backward()
    assert all(losses[name].isfinite() for name in names)
    assert all(p.grad.isfinite().all() for p in model.distillers.parameters())
    assert all(p.grad is None for p in other.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.backbone.parameters())
    assert (losses["loss_fgfi"] > 0) == (losses["loss_defeat_foreground"] > 0) == (sum(counts) > 0)


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        (FGFI, "THRESHOLD", 1.0),
        (FGFI, "ADAPTATION", "5x5"),
        (DeFeat, "BACKGROUND_WEIGHT", -1.0),
        (FKD, "TEMPERATURE", 0.0),
        (FKD, "RELATION_DIM", 0),
        (FKD, "ATTENTION", "signed"),
        (FKD, "NORM", "level"),
        (GID, "NMS_THRESH", 0.0),
        (GID, "INSTANCES", 0),
    ],
)
def test_wrong_values_name_their_key(build: Callable, method: type[Distiller], key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"MODEL.KD.{method.CONFIG_NODE}.{key} is"):
        build(method, **{key: value})
