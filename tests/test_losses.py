"""Normalization and attention of feature maps by hand."""

import math
import re
from collections.abc import Callable

from kd_d2.losses import (
    agreement,
    attended_error,
    attended_value_loss,
    background_weights,
    channel_attention,
    channel_wise_loss,
    decoupled_loss,
    dist_loss,
    foreground_weights,
    icd_distill_loss,
    instance_attention,
    masked_squared_error,
    mean_activation,
    min_max_normalize,
    pearson_loss,
    prediction_difference,
    prediction_guided_loss,
    quality_focal_loss,
    rank_kl_loss,
    relative_to_mean,
    soft_label_loss,
    softmax_divergence,
    spatial_attention,
    ssim_loss,
    standardize,
    weighted_imitation_loss,
    with_statistics_of,
)

import pytest
import torch

pytestmark = pytest.mark.unit

STUDENT = torch.tensor([[0.0, 2.0], [4.0, 8.0]]).view(1, 2, 1, 2)
TEACHER = torch.tensor([[1.0, 1.0], [3.0, 5.0]]).view(1, 2, 1, 2)
NORMALIZED = {
    "sample": ([0.0, 0.25, 0.5, 1.0], [0.0, 0.0, 0.5, 1.0]),
    "channel": ([0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]),
    "joint": ([0.0, 0.25, 0.5, 1.0], [0.125, 0.125, 0.375, 0.625]),
    "none": ([0.0, 2.0, 4.0, 8.0], [1.0, 1.0, 3.0, 5.0]),
}


@pytest.mark.parametrize("scope", NORMALIZED)
def test_min_max_normalize_by_hand(scope: str) -> None:
    """Check each scope on two channels of two cells; a second sample with another range does not affect the first."""
    student, teacher = (torch.cat([x, 10 * x + 5]) for x in (STUDENT, TEACHER))
    for normalized, expected in zip(min_max_normalize(student, teacher, scope), NORMALIZED[scope], strict=True):
        torch.testing.assert_close(normalized[0].flatten(), torch.tensor(expected))
        if scope != "none":
            torch.testing.assert_close(normalized[1], normalized[0])


def test_min_max_normalize_joint_takes_the_extremes_of_either() -> None:
    """Check a map with the maximum and one with the minimum, each as student and as teacher."""
    above, below = (torch.tensor(x).view(1, 1, 1, 2) for x in ([0.0, 3.0], [-1.0, 1.0]))
    for maps in ((above, below), (below, above)):
        normalized = {id(x): y.flatten().tolist() for x, y in zip(maps, min_max_normalize(*maps, "joint"), strict=True)}
        assert normalized == {id(above): [0.25, 1.0], id(below): [0.0, 0.5]}


@pytest.mark.parametrize("scope", ["sample", "channel", "joint"])
def test_min_max_normalize_gradient(scope: str) -> None:
    """Check the gradient, which also passes through minimum and maximum, numerically in float64."""
    student, teacher = torch.rand(2, 2, 2, 3, 3, dtype=torch.float64)
    inputs = student.requires_grad_(), teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: min_max_normalize(s, t, scope), inputs)


@pytest.mark.parametrize("scope", ["sample", "channel", "joint"])
def test_min_max_normalize_of_constant_maps(scope: str) -> None:
    """Check that constant maps are normalized to zeros, with finite gradients."""
    student = torch.full((1, 2, 3, 3), 7.0, requires_grad=True)
    normalized, other = min_max_normalize(student, torch.full((1, 2, 3, 3), 7.0), scope)
    assert normalized.tolist() == torch.zeros(1, 2, 3, 3).tolist() == other.tolist()
    ((normalized - torch.rand(1, 2, 3, 3)) ** 2).mean().backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_normalization_in_half_precision(dtype: torch.dtype) -> None:
    """Check finite gradients of constant maps, and squares, ranges and means that float16 cannot hold, in float32."""
    for normalize in (standardize, lambda x: min_max_normalize(x, x.detach())[0]):
        constant = torch.full((1, 2, 2, 2), 0.5, dtype=dtype, requires_grad=True)
        result = normalize(constant)
        assert result.dtype is torch.float32 and not result.any()
        (result * torch.arange(4.0).view(2, 2)).sum().mul(1e-3).backward()
        assert constant.grad.isfinite().all()
    large = torch.tensor([-60000.0, 60000.0]).to(dtype).view(1, 1, 1, 2)
    assert standardize(large).flatten().tolist() == pytest.approx([-1, 1])
    assert min_max_normalize(large, large)[0].flatten().tolist() == [0, 1]
    (weights,) = relative_to_mean([torch.zeros(1, 2, 2, dtype=dtype)])
    assert weights.dtype is torch.float32 and not weights.any()


def test_min_max_normalize_refuses_an_unknown_scope() -> None:
    """Check that the error names the value and the choices."""
    with pytest.raises(ValueError, match="'batch'; it must be one of sample, channel, joint, none"):
        min_max_normalize(STUDENT, TEACHER, "batch")


def test_spatial_attention_by_hand() -> None:
    """Check mean |F| of 1 and 2 (student), 0 and log 3 (teacher) at temperature 1, then the teacher alone at 1/2."""
    student = torch.tensor([[1.0, -2.0], [-1.0, 2.0]]).view(1, 2, 1, 2)
    teacher = torch.tensor([0.0, -math.log(3)]).view(1, 1, 1, 2)
    of_student = 2 * math.e / (1 + math.e)
    weight = spatial_attention(student, teacher, 1.0)
    assert weight.shape == (1, 1, 1, 2)
    assert weight.flatten().tolist() == pytest.approx([(2 - of_student + 0.5) / 2, (of_student + 1.5) / 2])
    sharper = spatial_attention(teacher, teacher, 0.5)
    assert sharper.flatten().tolist() == pytest.approx([0.2, 1.8])


def test_spatial_attention_has_mean_one_and_no_gradient() -> None:
    """Check each image of a batch, in float32 and bfloat16."""
    student, teacher = (100 * torch.randn(3, c, 5, 7, requires_grad=True) for c in (4, 6))
    for dtype in (torch.float32, torch.bfloat16):
        weight = spatial_attention(student.to(dtype), teacher.to(dtype), 0.5)
        assert weight.dtype == torch.float32
        assert not weight.requires_grad
        torch.testing.assert_close(weight.mean((1, 2, 3)), torch.ones(3))


def test_instance_attention_under_autocast() -> None:
    """Check that the sum over instances is not rounded to bfloat16."""
    logits, is_real = torch.randn(2, 2, 3, 7), torch.ones(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention = instance_attention(logits, is_real)
    assert torch.equal(attention, instance_attention(logits, is_real))


def test_foreground_and_background_weights_of_bfloat16_boxes() -> None:
    """Check a box of 2 x 2 cells on a map of 2 x 3, of which two cells are background."""
    foreground = foreground_weights(torch.tensor([[[0, 0, 1, 1]]], dtype=torch.bfloat16), 2, 3)
    assert foreground.tolist() == [[[0.25, 0.25, 0], [0.25, 0.25, 0]]]
    assert background_weights(foreground).tolist() == [[[0, 0, 0.5], [0, 0, 0.5]]]


@pytest.mark.parametrize(
    "loss",
    [
        pearson_loss,
        channel_wise_loss,
        soft_label_loss,
        quality_focal_loss,
        softmax_divergence,
        prediction_difference,
        agreement,
        lambda s, t: masked_squared_error(s, t, torch.ones(2, 4, 4)),
        lambda s, t: attended_error(s, t, torch.ones(2, 3, 1, 1)),
        lambda s, t: attended_value_loss(s, t, torch.ones(2, 3, 4)),
        lambda s, t: with_statistics_of([s], [t]),
        lambda s, t: dist_loss(s.flatten(1), t.flatten(1)),
        lambda s, t: decoupled_loss(s.flatten(1), t.flatten(1), torch.tensor([0, 1])),
        lambda s, t: rank_kl_loss(s[:, 0, 0, 0], t[0, 0, 0, :1], torch.tensor([0, 0])),
    ],
)
def test_shapes_that_differ_are_refused(loss: Callable) -> None:
    """Check maps that would otherwise be broadcast."""
    with pytest.raises(ValueError, match=r"^student \(2.*\) and teacher \(.*1.*\) have different shapes$"):
        loss(torch.rand(2, 3, 4, 4), torch.rand(2, 1, 4, 4))


@pytest.mark.parametrize(
    ("shape", "loss"),
    [
        ((2, 1, 4, 4), masked_squared_error),
        ((3, 4, 4), masked_squared_error),
        ((2, 1, 4, 4), lambda s, t, weight: weighted_imitation_loss([s], [t], [weight])),
        ((4,), lambda s, t, weight: soft_label_loss(s[..., :1], t[..., :1], weight)),
        ((4,), lambda s, t, weight: quality_focal_loss(s[..., :1], t[..., :1], weight)),
        ((4,), lambda s, t, weight: quality_focal_loss(s[..., :1], t[..., :1], weight, 2.0)),
        ((2, 2, 3, 4, 4), lambda s, t, weight: ssim_loss(s, t, 3, weight=weight)),
    ],
)
def test_weights_that_would_enlarge_the_losses_are_refused(shape: tuple, loss: Callable) -> None:
    with pytest.raises(ValueError, match=rf"^weight {re.escape(str(shape))} does not broadcast to \(2, "):
        loss(*torch.rand(2, 2, 3, 4, 4), torch.ones(shape))


def test_a_weight_of_all_images_is_that_of_each() -> None:
    student, teacher = torch.rand(2, 2, 3, 4, 4)
    weight = torch.rand(1, 4, 4)
    each = weighted_imitation_loss([student], [teacher], [weight.expand(2, 4, 4)])
    torch.testing.assert_close(weighted_imitation_loss([student], [teacher], [weight]), each)


def test_weights_in_a_compiled_loss() -> None:
    maps = torch.rand(2, 2, 3, 4, 4)
    compiled = torch.compile(masked_squared_error, backend="eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(*maps, torch.ones(1, 4, 1)), masked_squared_error(*maps, torch.ones(1, 4, 1)))


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_quality_focal_loss_has_no_gradient_to_the_weight(power: float) -> None:
    student, teacher, weight = torch.rand(3, 5, 1).requires_grad_()
    loss = quality_focal_loss(student, teacher, weight, power)
    assert torch.autograd.grad(loss, (student, teacher, weight), allow_unused=True)[1:] == (None, None)


@pytest.mark.parametrize(
    "loss",
    [
        pearson_loss,
        channel_wise_loss,
        lambda s, t: weighted_imitation_loss([s], [t], [t[:, 0]]),
        lambda s, t: prediction_guided_loss([s], [t], [s], [t]),
        lambda s, t: icd_distill_loss(s, t, torch.zeros(0, 3, 2, 4), torch.zeros(0, 2)),
        lambda s, t: mean_activation(s, 1).sum(),
        lambda s, t: attended_error(s, t, spatial_attention(s, t, 0.5) * channel_attention(s, t, 0.5)).sum(),
    ],
)
def test_a_batch_without_images_costs_nothing(loss: Callable) -> None:
    student, teacher = torch.zeros(0, 3, 4, 4, requires_grad=True), torch.zeros(0, 3, 4, 4)
    value = loss(student, teacher)
    value.backward()
    assert value.item() == 0 and student.grad.shape == student.shape


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("CentralSums", lambda x: pearson_loss(x, torch.zeros_like(x))),
        ("Alignment", lambda x: with_statistics_of([x], [x.detach()])[0].sum()),
        ("QualityFocal", lambda x: quality_focal_loss(x, torch.zeros_like(x))),
    ],
)
def test_a_second_derivative_is_refused(name: str, loss: Callable) -> None:
    """Check that it is not silently that of the other terms of a sum."""
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"{name}.* has no second derivative"):
        torch.autograd.grad(loss(x) + x.pow(3).sum(), x, create_graph=True)
