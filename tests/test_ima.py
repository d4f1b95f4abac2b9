"""IMA: hand-worked stages, gradients, and training steps of real detectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kd_d2 import KDMetaArch, Teacher
from kd_d2.adapters import DetectorOutputs, build_adapter
from kd_d2.distillers import IMA
from kd_d2.distillers.adaptation import AdaptationLayers
from kd_d2.errors import UserError
from kd_d2.losses import agreement, standardize

import pytest
import torch
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from helpers import configured, scaled, targets_of
from torch import Tensor
from torchvision.ops import roi_align

pytestmark = pytest.mark.unit

OFF: dict[str, Any] = {
    "ADAPTATION": "none",
    "MASK": "none",
    "GENERATION": False,
    "STANDARDIZE": "none",
    "DEFLATE": False,
}


def _outputs(features: dict[int, Tensor]) -> DetectorOutputs:
    return DetectorOutputs(images=None, features=features)


@pytest.fixture
def build(tiny_cfg: Callable, tiny_detector: Callable) -> Callable[..., IMA]:
    """Return a function (student kind, teacher kind, keys) that builds IMA; all stages are off by default."""

    def build(kind: str = "retinanet", teacher: str = "retinanet", **keys: Any) -> IMA:
        cfg = tiny_cfg(kind, {"MODEL": {"KD": {"IMA": {**OFF, **keys}}}})
        torch.manual_seed(0)
        return configured(IMA, cfg, *(build_adapter(tiny_detector(k)).spec for k in (kind, teacher)))

    return build


def _features(seed: int = 0, side: int = 8, batch: int = 2) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    levels = {stride: max(1, side * 8 // stride) for stride in (8, 16, 32, 64, 128)}
    return tuple({s: torch.randn(batch, 8, n, n, generator=generator) for s, n in levels.items()} for _ in range(2))


def _loss(ima: IMA, student: dict, teacher: dict, targets: list[Instances]) -> Tensor:
    (loss,) = scaled(ima, _outputs(student), _outputs(teacher), targets).values()
    return loss


def test_residual_generation_starts_as_the_identity(build: Callable) -> None:
    student, teacher = _features()
    without = _loss(build(), student, teacher, [])
    assert torch.equal(_loss(build(GENERATION=True, RESIDUAL=True), student, teacher, []), without)
    assert not torch.equal(_loss(build(GENERATION=True), student, teacher, []), without)


def test_standardize_by_hand() -> None:
    """Check 1, 1, 3, 3 (mean 2, deviation 1), a constant map, and the gradient numerically."""
    maps = torch.tensor([[[[1.0, 1.0], [3.0, 3.0]], [[5.0, 5.0], [5.0, 5.0]]]], dtype=torch.float64, requires_grad=True)
    result = standardize(maps)
    torch.testing.assert_close(result[0, 0], torch.tensor([[-1.0, -1], [1, 1]]).double(), rtol=1e-4, atol=0)
    assert (result[0, 1] == 0).all()
    assert torch.autograd.gradcheck(standardize, maps)
    flat = 1e-3 * maps.detach()[:, :1]  # deviations of 0.001 and a variance of 1e-6, so 1.1e-5 with the added 1e-5
    torch.testing.assert_close(standardize(flat)[0, 0, 0, 0].item(), -1e-3 / 1.1e-5**0.5, rtol=1e-6, atol=0)


def test_agreement_by_hand() -> None:
    """Check 0.6 for (3, 4) and (1, 0), 0 for opposite and zero vectors, and that there is no gradient."""
    student = torch.tensor([[3.0, 4.0], [-1.0, 0.0], [0.0, 0.0]], requires_grad=True).view(3, 2, 1, 1)
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]).view(3, 2, 1, 1)
    scale = agreement(student, teacher)
    assert scale.tolist() == pytest.approx([0.6, 0, 0])
    assert not scale.requires_grad


def test_all_stages_off_is_the_squared_error(build: Callable, event_storage: EventStorage) -> None:
    """Check the mean and the sum over levels, and the weight."""
    student, teacher = _features()
    expected = sum((student[s] - teacher[s]).square().mean() for s in student) / 5
    assert _loss(build(WEIGHT=3.0), student, teacher, []).item() == pytest.approx(3 * expected.item(), rel=1e-5)
    summed = _loss(build(WEIGHT=3.0, LEVELS="sum"), student, teacher, [])
    assert summed.item() == pytest.approx(15 * expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("keys", "aligned"),
    [
        ({"STANDARDIZE": "both"}, lambda s, t: (standardize(s), standardize(t))),
        ({"STANDARDIZE": "student"}, lambda s, t: (standardize(s), t)),
        ({"DEFLATE": True}, lambda s, t: (agreement(s, t).view(-1, 1, 1, 1) * s, t)),
        (
            {"STANDARDIZE": "both", "DEFLATE": True},
            lambda s, t: (agreement(s, t).view(-1, 1, 1, 1) * standardize(s), standardize(t)),
        ),
    ],
)
def test_alignment(build: Callable, keys: dict, aligned: Callable, event_storage: EventStorage) -> None:
    """Check that samples are standardized, then scaled by their agreement before standardization."""
    student, teacher = _features()
    pairs = [aligned(student[s], teacher[s]) for s in student]
    expected = sum((s - t).square().mean() for s, t in pairs) / 5
    assert _loss(build(**keys), student, teacher, []).item() == pytest.approx(expected.item(), rel=1e-5)


def test_gamma_is_of_the_students_own_features(build: Callable, event_storage: EventStorage) -> None:
    """Check that gamma ignores P, the mask and G, whose random outputs agree with nothing."""
    event_storage.iter = 19
    ima = build(ADAPTATION="1x1", MASK="random", GENERATION=True, STANDARDIZE="both", DEFLATE=True)
    _, teacher = _features()
    student = {s: 2 * level for s, level in teacher.items()}
    _loss(ima, student, teacher, [])
    assert event_storage.latest()["kd/ima_gamma"][0] == pytest.approx(1, rel=1e-5)


def test_no_gamma_where_channels_differ(build: Callable, event_storage: EventStorage) -> None:
    """Check that the cosine of features in different spaces, which is 0 on average, does not scale the loss."""
    student, teacher = _features()
    student = {s: level[:, :6] for s, level in student.items()}
    losses = []
    for deflate in (True, False):
        ima = build(ADAPTATION="1x1", DEFLATE=deflate)
        torch.manual_seed(0)
        ima.adaptation = AdaptationLayers({s: (6, 8) for s in student}, 1)
        losses.append(_loss(ima, student, teacher, []))
    assert losses[0] == losses[1] > 0


def test_masks_hide_their_part(build: Callable) -> None:
    """Check the share masked everywhere, only inside the boxes, and nowhere."""
    student = {s: torch.ones(2, 8, n, n) for s, n in ((8, 64), (16, 32), (32, 16), (64, 8), (128, 4))}
    targets = targets_of([[0.0, 0, 256, 512]], [])
    for mask, expected in (("random", (0.35, 0.35)), ("instance", (0.35, 1.0)), ("none", (1.0, 1.0))):
        masks = build(MASK=mask)._masks(_outputs(student), targets)
        assert [m.shape for m in masks] == [(2, n, n) for n in (64, 32, 16, 8, 4)]
        assert {v for m in masks for v in m.unique().tolist()} <= {0.0, 1.0}
        assert masks[0][0, :, :32].mean().item() == pytest.approx(expected[0], abs=0.05)
        assert masks[0][0, :, 32:].mean().item() == pytest.approx(expected[1], abs=0.05)
    half = build(MASK="random", MASK_RATIO=0.2)._masks(_outputs(student), targets)
    assert half[0].mean().item() == pytest.approx(0.8, abs=0.03)
    assert not torch.equal(half[0][0], half[0][1])


def test_hidden_positions_are_filled_in(build: Callable, event_storage: EventStorage) -> None:
    """Check the order: projection, mask, then generation by two convolutions with a ReLU in between."""
    ima = build(ADAPTATION="1x1", MASK="random", GENERATION=True)
    student, teacher = _features()
    torch.manual_seed(3)
    loss = _loss(ima, student, teacher, [])
    torch.manual_seed(3)
    errors = []
    shown = [(torch.rand(2, *student[s].shape[-2:]) >= 0.65).float() for s in student]
    for stride, seen in zip(student, shown, strict=True):
        block = ima.generation[str(stride)]
        hidden = ima.adaptation.layers[str(stride)](student[stride]) * seen[:, None]
        errors.append((block[2](block[0](hidden).relu()) - teacher[stride]).square().mean())
    assert loss.item() == pytest.approx((sum(errors) / 5).item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ima.parameters())


def test_boxes_as_instances(build: Callable, event_storage: EventStorage) -> None:
    """Check RoIAlign features of two boxes in two images, and a zero loss with zero gradients without boxes."""
    student, teacher = _features()
    for level in student.values():
        level.requires_grad_()
    targets = targets_of([[0.0, 0, 40, 40]], [[8.0, 8, 60, 30]])
    loss = _loss(build(INSTANCE="box"), student, teacher, targets)
    boxes = [t.gt_boxes.tensor for t in targets]
    pairs = [[roi_align(x[s], boxes, 7, 1 / s, 2, True) for x in (student, teacher)] for s in student]
    expected = sum((s - t).square().mean() for s, t in pairs) / 5
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    nothing = _loss(build(INSTANCE="box", STANDARDIZE="both", DEFLATE=True), student, teacher, targets_of([], []))
    assert nothing.item() == 0
    nothing.backward()
    assert all(level.grad.abs().max() == 0 for level in student.values())


def test_gradient_numerically(build: Callable, event_storage: EventStorage) -> None:
    """Check the aligned error in float64 with constant gamma."""
    ima = build(STANDARDIZE="both", DEFLATE=True)
    student, teacher = torch.randn(2, 2, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gamma = torch.tensor([0.25, 0.75], dtype=torch.float64)
    errors = IMA.aligned_errors.__wrapped__
    assert torch.autograd.gradcheck(lambda s: errors(ima, s, teacher, gamma), student.requires_grad_())


@pytest.mark.parametrize(
    ("kind", "teacher"), [("retinanet", "retinanet"), ("faster", "cascade"), ("fcos", "retinanet")]
)
@pytest.mark.parametrize("keys", [{}, {"MASK": "instance", "INSTANCE": "box"}])
@pytest.mark.parametrize("counts", [(3, 2), (1, 0), (0, 0)])
def test_on_detectors(
    tiny_cfg: Callable,
    tiny_detector: Callable,
    make_inputs: Callable,
    event_storage: EventStorage,
    kind: str,
    teacher: str,
    keys: dict,
    counts: tuple[int, int],
) -> None:
    """Check finite losses of one-stage and two-stage pairs, also without objects, and no gradient in the teacher."""
    event_storage.iter = 19
    student, other = tiny_detector(kind), tiny_detector(teacher, seed=1)
    cfg = tiny_cfg(kind, {"MODEL": {"KD": {"IMA": keys}}})
    ima = configured(IMA, cfg, build_adapter(student).spec, build_adapter(other).spec)
    model = KDMetaArch(student=student, teacher=Teacher(other), distillers={"IMA": ima})
    loss = model(make_inputs(counts=counts))["loss_ima"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in ima.parameters())
    assert all(p.grad is None for p in other.parameters())
    if sum(counts) or not keys:
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.backbone.parameters())
        assert 0 <= event_storage.latest()["kd/ima_gamma"][0] <= 1


@pytest.mark.parametrize("whose", ["both", "student"])
def test_boxes_of_one_cell_are_not_standardized(build: Callable, whose: str) -> None:
    with pytest.raises(UserError, match=rf"MODEL.KD.IMA.BOX_RESOLUTION is 1, but STANDARDIZE '{whose}' makes"):
        build(INSTANCE="box", BOX_RESOLUTION=1, STANDARDIZE=whose)
    assert build(INSTANCE="box", BOX_RESOLUTION=1).config.box_resolution == 1
    assert build(INSTANCE="sample", BOX_RESOLUTION=1, STANDARDIZE=whose).config.standardize == whose


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MASK", "all"),
        ("MASK_RATIO", 1.0),
        ("INSTANCE", "map"),
        ("STANDARDIZE", "teacher"),
        ("BOX_RESOLUTION", 0),
        ("LEVELS", "max"),
    ],
)
def test_wrong_values_name_their_key(build: Callable, key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"MODEL.KD.IMA.{key} is"):
        build(**{key: value})
