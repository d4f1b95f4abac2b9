"""FeatureImitation and StructuralKD with hand-worked losses, and what all distillers share."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from kd_d2.adapters import DetectorOutputs
from kd_d2.distillers import (
    DISTILLER_REGISTRY,
    ICD,
    IMA,
    PKD,
    Distiller,
    FeatureImitation,
    OptimizerSettings,
    Schedule,
    StructuralKD,
    in_float32,
)
from kd_d2.distillers.adaptation import AdaptationLayers
from kd_d2.distillers.matching import common_strides, levels_by_stride
from kd_d2.errors import UserError, check_number
from kd_d2.losses import ms_ssim_loss, ssim_loss

import kornia
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from helpers import configured, make, scaled, spec_of
from omegaconf import OmegaConf
from torch import Tensor, nn

pytestmark = pytest.mark.unit

METHODS = {"FEATURE_IMITATION": FeatureImitation, "STRUCTURAL": StructuralKD}


def _outputs(features: dict[int, Tensor]) -> DetectorOutputs:
    return DetectorOutputs(images=None, features=features)


def _map(*rows: list[float]) -> Tensor:
    """Return a map with one channel of one image."""
    return torch.tensor(rows, dtype=torch.float32)[None, None]


@pytest.fixture
def build(tiny_cfg: Callable[..., CfgNode]) -> Callable[..., Distiller]:
    """Return a function (node, student channels by stride, teacher channels, family, keys) that builds a distiller."""

    def build(
        node_name: str,
        student: dict[int, int],
        teacher: dict[int, int] | None = None,
        family: str = "one-stage",
        **keys: Any,
    ) -> Distiller:
        cfg = tiny_cfg("retinanet", {"MODEL": {"KD": {node_name: keys}}})
        teacher = student if teacher is None else teacher
        torch.manual_seed(0)
        return configured(METHODS[node_name], cfg, spec_of(student, family), spec_of(teacher, "two-stage", "Master"))

    return build


def _loss(distiller: Distiller, student: dict[int, Tensor], teacher: dict[int, Tensor]) -> float:
    losses = scaled(distiller, _outputs(student), _outputs(teacher), [])
    assert tuple(losses) == distiller.loss_names
    (loss,) = losses.values()
    assert loss.shape == ()
    return loss.item()


# Two levels, deliberately not in order, of different sizes.
STUDENT = {16: _map([3, 5]), 8: _map([0, 1], [2, 4])}
TEACHER = {8: _map([0, 2], [2, 4]), 16: _map([5, 3])}


def test_feature_imitation_by_hand(build: Callable) -> None:
    """Check the mean per level and over levels: ((0 + 1 + 0 + 0) / 4 + (4 + 4) / 2) / 2 = 2.125, times the weight."""
    assert _loss(build("FEATURE_IMITATION", {8: 1, 16: 1}), STUDENT, TEACHER) == 2.125
    assert _loss(build("FEATURE_IMITATION", {8: 1, 16: 1}, WEIGHT=3.0), STUDENT, TEACHER) == 6.375


# After normalization: stride 8 is 0, 1/4, 1/2, 1 and 0, 1/2, 1/2, 1; stride 16 is 0, 1 and 1, 0.
BY_HAND = [
    ({"LOSS": "l1"}, 0.25 / 4 + 1),
    ({"LOSS": "l2"}, 0.25**2 / 4 + 1),
    ({"LOSS": "smooth_l1"}, (0.25 - 0.1 / 2) / 4 + (1 - 0.1 / 2)),
    ({"LOSS": "smooth_l1", "SMOOTH_L1_BETA": 0.5}, 0.5 * 0.25**2 / 0.5 / 4 + (1 - 0.5 / 2)),
    ({"LOSS": "l1", "NORMALIZATION": "none"}, 1 / 4 + 2),
    ({"LOSS": "l2", "NORMALIZATION": "none"}, 1 / 4 + 4),
]


@pytest.mark.parametrize(("keys", "expected"), BY_HAND)
def test_structural_by_hand(build: Callable, keys: dict[str, Any], expected: float) -> None:
    """Check the mean per level, the sum over levels and the weight, for losses that can be computed by hand."""
    distiller = build("STRUCTURAL", {8: 1, 16: 1}, WEIGHT=4.0, **keys)
    assert _loss(distiller, STUDENT, TEACHER) == pytest.approx(4 * expected, rel=1e-6)


def test_structural_of_one_joint_range(build: Callable) -> None:
    """Check 0, 1, 2, 4 against 0, 4, 4, 8: the joint range is 0 to 8; normalized separately, only one cell differs."""
    student, teacher = {8: _map([0, 1], [2, 4])}, {8: _map([0, 4], [4, 8])}
    joint, sample = (
        build("STRUCTURAL", {8: 1}, WEIGHT=1.0, LOSS="l1", NORMALIZATION=scope) for scope in ("joint", "sample")
    )
    assert _loss(joint, student, teacher) == pytest.approx((0 + 3 + 2 + 4) / 8 / 4)
    assert _loss(sample, student, teacher) == pytest.approx((0 + 1 / 4 + 0 + 0) / 4)


def test_structural_normalizes_each_sample_and_channel_as_configured(build: Callable) -> None:
    """Check that scaling samples has no effect, and that scaling channels has one for "sample", not for "channel"."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.rand(2, 2, 2, 6, 6, generator=generator)
    by_sample = student * torch.tensor([2.0, 9.0]).view(2, 1, 1, 1) - 3
    by_channel = student * torch.tensor([2.0, 9.0]).view(1, 2, 1, 1) - 3
    for scope, unchanged in [("sample", by_sample), ("channel", by_sample), ("channel", by_channel)]:
        distiller = build("STRUCTURAL", {8: 2}, NORMALIZATION=scope)
        expected = _loss(distiller, {8: student}, {8: teacher})
        assert _loss(distiller, {8: unchanged}, {8: teacher}) == pytest.approx(expected, rel=1e-4)
    distiller = build("STRUCTURAL", {8: 2}, NORMALIZATION="sample")
    expected = _loss(distiller, {8: student}, {8: teacher})
    assert abs(_loss(distiller, {8: by_channel}, {8: teacher}) - expected) > 0.01 * expected


def _normalized(x: Tensor) -> Tensor:
    return torch.stack([(sample - sample.min()) / (sample.max() - sample.min()) for sample in x])


@pytest.mark.parametrize(
    ("window_size", "size", "used"),
    [(11, (12, 14), 11), (5, (12, 14), 5), (13, (12, 14), 13), (11, (4, 9), 7), (11, (5, 3), 5), (11, (6, 9), 11)],
)
def test_structural_ssim_cuts_its_window_to_small_maps(
    build: Callable, window_size: int, size: tuple[int, int], used: int
) -> None:
    """Check each level against kornia with the window min(window, 2 * min(H, W) - 1)."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = 5 * torch.randn(2, 2, 3, *size, generator=generator)
    distiller = build("STRUCTURAL", {32: 3}, WEIGHT=1.0, WINDOW_SIZE=window_size)
    expected, other = (
        kornia.losses.ssim_loss(_normalized(student), _normalized(teacher), window).item()
        for window in (used, used - 2)
    )
    loss = _loss(distiller, {32: student}, {32: teacher})
    assert loss == pytest.approx(expected, rel=2e-6)
    assert loss != pytest.approx(other, rel=2e-6)


def test_structural_ssim_on_single_cells_and_rows(build: Callable) -> None:
    """Check the smallest maps by hand: with a window of one cell only the luminance term (C1 = 1e-4) remains."""
    distiller = build("STRUCTURAL", {8: 1, 16: 1}, WEIGHT=1.0)
    # A single cell has no range and is normalized to 0. In the row, 0, 1 is compared with 1, 0.
    loss = _loss(distiller, {8: _map([7.0]), 16: _map([3, 5])}, {8: _map([2.0]), 16: _map([5, 3])})
    assert loss == pytest.approx((1 - 1e-4 / (1 + 1e-4)) / 2, abs=2e-5)


def test_structural_loss_maps_by_hand(build: Callable) -> None:
    """Check the values for the maps of BY_HAND at each position, and the mean over two channels."""
    maps = build("STRUCTURAL", {8: 1, 16: 1}, LOSS="l1").loss_maps(_outputs(STUDENT), _outputs(TEACHER), [])
    assert list(maps) == [8, 16]
    torch.testing.assert_close(maps[8], torch.tensor([[[0.0, 0.25], [0.0, 0.0]]]))
    torch.testing.assert_close(maps[16], torch.ones(1, 1, 2))
    two = {8: torch.cat([STUDENT[8], STUDENT[8]], 1)}, {8: torch.cat([TEACHER[8], STUDENT[8]], 1)}
    maps = build("STRUCTURAL", {8: 2}, LOSS="l1").loss_maps(*map(_outputs, two), [])
    torch.testing.assert_close(maps[8], torch.tensor([[[0.0, 0.125], [0.0, 0.0]]]))


@pytest.mark.parametrize("keys", [{}, {"LOSS": "l1_ms_ssim"}, {"LOSS": "l2", "SPATIAL_ATTENTION": True}])
def test_structural_loss_maps_add_up(build: Callable, keys: dict[str, Any]) -> None:
    """Check that their mean is the loss, for losses without hand-worked values, under `no_grad`."""
    student, teacher = torch.rand(2, 2, 3, 8, 9, generator=torch.Generator().manual_seed(0))
    distiller = build("STRUCTURAL", {8: 3}, WEIGHT=1.0, **keys)
    with torch.no_grad():
        maps = distiller.loss_maps(_outputs({8: student}), _outputs({8: teacher}), [])
    assert maps[8].shape == (2, 8, 9)
    assert maps[8].mean().item() == pytest.approx(_loss(distiller, {8: student}, {8: teacher}), rel=1e-5)


def test_structural_spatial_attention(build: Callable) -> None:
    """Check that positions are weighted by attention, and the temperature by family."""
    student, teacher = {8: _map([0.0, 1.0], [2.0, 4.0])}, {8: _map([0.0, 2.0], [2.0, 4.0])}
    distiller = build("STRUCTURAL", {8: 1}, LOSS="l1", WEIGHT=1.0, SPATIAL_ATTENTION=True)
    assert distiller.attention_temperature == 0.5
    shares = [torch.tensor(row).div(0.5).softmax(0)[1].item() for row in ([0.0, 1, 2, 4], [0.0, 2, 2, 4])]
    # one of four positions differs, by a quarter; the attention has mean 1
    assert _loss(distiller, student, teacher) == pytest.approx(0.25 * sum(shares) / 2)
    assert build("STRUCTURAL", {8: 1}, None, "two-stage", SPATIAL_ATTENTION=True).attention_temperature == 0.1
    assert build("STRUCTURAL", {8: 1}).attention_temperature is None


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"LOSS": "ms_ssim"}, lambda s, t: ms_ssim_loss(s, t, 13)),
        ({"LOSS": "ms_ssim", "MS_SSIM_WINDOW_SIZE": 5}, lambda s, t: ms_ssim_loss(s, t, 5)),
        ({"LOSS": "l1_ms_ssim"}, lambda s, t: 0.15 * (s - t).abs().mean() + 0.85 * ms_ssim_loss(s, t, 13)),
        ({"SSIM_EXPONENTS": (0.0, 0.0, 1.0)}, lambda s, t: ssim_loss(s, t, 11, exponents=(0, 0, 1))),
    ],
)
def test_structural_losses_by_name(build: Callable, keys: dict[str, Any], expected: Callable) -> None:
    """Check the losses, the window on a small map, and the exponents against the functions."""
    student, teacher = torch.rand(2, 1, 2, 7, 9, generator=torch.Generator().manual_seed(3))
    distiller = build("STRUCTURAL", {8: 2}, WEIGHT=1.0, NORMALIZATION="none", **keys)
    assert _loss(distiller, {8: student}, {8: teacher}) == pytest.approx(expected(student, teacher).item(), rel=1e-6)


NOISE = torch.rand(2, 2, 3, 6, 7, generator=torch.Generator().manual_seed(4))
EXTREMES = {
    "zeros": (torch.zeros(2, 3, 6, 7), torch.zeros(2, 3, 6, 7)),
    "constant student": (torch.full((2, 3, 6, 7), 2.5), NOISE[1]),
    "constant teacher": (NOISE[0], torch.full((2, 3, 6, 7), -3.0)),
    "identical": (NOISE[0], NOISE[0]),
    "huge": (1e6 * NOISE[0], -1e6 * NOISE[1]),
    "one outlier": (NOISE[0], torch.where(NOISE[1] == NOISE[1].max(), 1e8, NOISE[1])),
    "a cell": (NOISE[0, :, :, :1, :1], NOISE[1, :, :, :1, :1]),
    "a row": (NOISE[0, :, :, :1], NOISE[1, :, :, :1]),
}


@pytest.mark.parametrize("scope", ["sample", "channel", "joint", "none"])
@pytest.mark.parametrize("loss", ["l1", "l2", "smooth_l1", "ssim", "ms_ssim", "l1_ms_ssim", "structure", "attention"])
@pytest.mark.parametrize("maps", EXTREMES.values(), ids=EXTREMES.keys())
def test_structural_is_finite(build: Callable, maps: tuple[Tensor, Tensor], loss: str, scope: str) -> None:
    """Check every loss and normalization scope, including gradients."""
    keys = {"structure": {"SSIM_EXPONENTS": (0.0, 0.0, 1.0)}, "attention": {"SPATIAL_ATTENTION": True}}
    distiller = build("STRUCTURAL", {8: 3}, NORMALIZATION=scope, **keys.get(loss, {"LOSS": loss}))
    student = maps[0].clone().requires_grad_()
    (value,) = distiller(_outputs({8: student}), _outputs({8: maps[1]}), []).values()
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_structural_levels_are_summed_and_weighted(build: Callable) -> None:
    """Check for SSIM that the loss of two levels is the sum of the losses of both, times the weight."""
    generator = torch.Generator().manual_seed(2)
    maps = {s: torch.randn(2, 1, 2, 64 // s, 80 // s, generator=generator) for s in (4, 8)}
    student, teacher = ({s: pair[i] for s, pair in maps.items()} for i in (0, 1))
    alone = [_loss(build("STRUCTURAL", {s: 2}, WEIGHT=1.0), student, teacher) for s in (4, 8)]
    assert _loss(build("STRUCTURAL", {4: 2, 8: 2}, WEIGHT=3.0), student, teacher) == pytest.approx(3 * sum(alone))


@pytest.mark.parametrize(
    ("family", "keys", "weight"),
    [
        ("one-stage", {}, 4.0),
        ("two-stage", {}, 2.0),
        ("other", {}, 2.0),
        ("one-stage", {"WEIGHT": 0.5}, 0.5),
        ("two-stage", {"WEIGHT": 0.0}, 0.0),
    ],
)
def test_structural_weight_by_family(build: Callable, family: str, keys: dict[str, Any], weight: float) -> None:
    """Check lambda: 4 for a one-stage student, 2 for others, or WEIGHT if it is set."""
    distiller = build("STRUCTURAL", {8: 1, 16: 1}, family=family, LOSS="l1", **keys)
    assert _loss(distiller, STUDENT, TEACHER) == pytest.approx(weight * 1.0625)


@pytest.mark.parametrize("node_name", METHODS)
def test_losses_are_float32_under_autocast(build: Callable, node_name: str) -> None:
    """Check that the loss of nearly equal bfloat16 maps is bitwise that of their float32 copies."""
    keys = {} if node_name == "FEATURE_IMITATION" else {"LOSS": "l1"}
    distiller = build(node_name, {8: 2}, **keys)
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(1, 2, 9, 9, generator=generator).bfloat16()
    teacher = student + 0.03 * torch.randn(1, 2, 9, 9, generator=generator).bfloat16()
    expected = distiller(_outputs({8: student.float()}), _outputs({8: teacher.float()}), [])
    with torch.autocast("cpu", torch.bfloat16):
        losses = distiller(_outputs({8: student}), _outputs({8: teacher}), [])
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == expected[name].item()


@pytest.mark.parametrize("node_name", METHODS)
def test_gradients_reach_the_student_at_every_level(build: Callable, node_name: str) -> None:
    """Check that gradients reach both levels, and that a small gradient step lowers the loss."""
    generator = torch.Generator().manual_seed(0)
    distiller = build(node_name, {8: 2, 16: 2})
    student = {s: torch.randn(1, 2, 64 // s, 64 // s, generator=generator).requires_grad_() for s in (8, 16)}
    teacher = {s: torch.randn(1, 2, 64 // s, 64 // s, generator=generator) for s in (8, 16)}
    (loss,) = scaled(distiller, _outputs(student), _outputs(teacher), []).values()
    loss.backward()
    assert all(x.grad.abs().max() > 0 for x in student.values())
    stepped = {s: x.detach() - 0.1 * x.grad / x.grad.norm() for s, x in student.items()}
    assert _loss(distiller, stepped, teacher) < loss.item() - 0.01 * loss.item()


@pytest.mark.parametrize("node_name", METHODS)
@pytest.mark.parametrize(("adaptation", "kernel"), [("1x1", 1), ("3x3", 3)])
def test_adaptation_layers(build: Callable, node_name: str, adaptation: str, kernel: int) -> None:
    """Check one trainable convolution per level, from the student's channels to the teacher's, that keeps the size."""
    distiller = build(node_name, {8: 2, 16: 4}, {8: 5, 16: 5}, ADAPTATION=adaptation)
    shapes = {name: tuple(p.shape) for name, p in distiller.named_parameters()}
    assert shapes == {
        "adaptation.layers.8.weight": (5, 2, kernel, kernel),
        "adaptation.layers.8.bias": (5,),
        "adaptation.layers.16.weight": (5, 4, kernel, kernel),
        "adaptation.layers.16.bias": (5,),
    }
    student = {8: torch.randn(2, 2, 6, 4), 16: torch.randn(2, 4, 3, 2)}
    adapted = distiller.adaptation([student[8], student[16]])
    assert [tuple(x.shape) for x in adapted] == [(2, 5, 6, 4), (2, 5, 3, 2)]
    convolved = nn.functional.conv2d(
        student[16],
        distiller.adaptation.layers["16"].weight,
        distiller.adaptation.layers["16"].bias,
        padding=kernel // 2,
    )
    assert torch.equal(adapted[1], convolved)
    # the teacher's features equal the adapted features of the student: no loss
    teacher = {8: adapted[0].detach(), 16: adapted[1].detach()}
    assert _loss(distiller, student, teacher) == pytest.approx(0.0, abs=1e-5)
    teacher = {8: torch.randn(2, 5, 6, 4), 16: torch.randn(2, 5, 3, 2)}
    (loss,) = distiller(_outputs(student), _outputs(teacher), []).values()
    loss.backward()
    assert all(p.grad.abs().max() > 0 for name, p in distiller.named_parameters() if name.endswith("weight"))


def test_without_adaptation_features_pass_as_they_are(build: Callable) -> None:
    """Check that "none" has no parameters and returns the same tensors."""
    distiller = build("STRUCTURAL", {8: 2, 16: 2})
    assert list(distiller.parameters()) == []
    features = [torch.rand(1, 2, 4, 4), torch.rand(1, 2, 2, 2)]
    assert all(a is b for a, b in zip(distiller.adaptation(features), features, strict=True))


@pytest.mark.parametrize("node_name", METHODS)
def test_selected_channels_of_the_teacher(build: Callable, node_name: str) -> None:
    """Check that channels 0 and 1 of 3 are those for 2, without a layer, and that a student of more channels is refused."""
    distiller = build(node_name, {8: 2, 16: 3}, {8: 3, 16: 3}, ADAPTATION="select")
    assert not list(distiller.parameters()) and not distiller.state_dict()
    teacher = {8: torch.randn(1, 3, 4, 4), 16: torch.randn(1, 3, 2, 2)}
    assert _loss(distiller, {8: teacher[8][:, :2], 16: teacher[16]}, teacher) == pytest.approx(0.0, abs=1e-6)
    assert _loss(distiller, {8: teacher[8][:, 1:], 16: teacher[16]}, teacher) > 0.01
    with pytest.raises(
        UserError, match=r"ADAPTATION is 'select', but at stride 16 the student has 4 channels and the teacher only 3"
    ):
        build(node_name, {8: 2, 16: 4}, {8: 3, 16: 3}, ADAPTATION="select")


@pytest.mark.parametrize("node_name", METHODS)
def test_channels_that_differ_need_an_adaptation_layer(build: Callable, node_name: str) -> None:
    """Check that the error names the key, the stride, both numbers of channels and the remedy."""
    with pytest.raises(
        UserError,
        match=rf"MODEL\.KD\.{node_name}\.ADAPTATION is 'none', but at stride 16 the student has 4 channels "
        "and the teacher 5: set it to '1x1'",
    ):
        build(node_name, {8: 2, 16: 4}, {8: 2, 16: 5})


@pytest.mark.parametrize("node_name", METHODS)
def test_levels_are_paired_by_stride(build: Callable, node_name: str) -> None:
    """Check that levels of only one detector are skipped, and that levels are paired by stride, not by order."""
    student = {8: torch.randn(1, 2, 8, 8), 16: torch.randn(1, 2, 4, 4), 32: torch.randn(1, 2, 2, 2)}
    teacher = {4: torch.randn(1, 2, 16, 16), 16: 2 * student[16], 8: 3 * student[8]}
    keys = {"NORMALIZATION": "none", "LOSS": "l2", "WEIGHT": 1.0} if node_name == "STRUCTURAL" else {}
    distiller = build(node_name, dict.fromkeys(student, 2), dict.fromkeys(teacher, 2), **keys)
    assert distiller.adaptation.strides == (8, 16)
    levels = [(2 * student[8]).square().mean(), student[16].square().mean()]
    expected = sum(levels) / (1 if node_name == "STRUCTURAL" else 2)
    assert _loss(distiller, student, teacher) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("node_name", METHODS)
def test_disjoint_strides_name_both(build: Callable, node_name: str) -> None:
    with pytest.raises(
        UserError,
        match=r"The student \(Pupil, strides \[16, 32\]\) and the teacher \(Master, strides \[4, 8\]\) have no",
    ):
        build(node_name, {32: 2, 16: 2}, {4: 2, 8: 2})


def test_common_strides_are_ascending() -> None:
    """Check the order for detectors with levels in any order."""
    assert common_strides(spec_of({64: 1, 8: 1, 16: 1}), spec_of({16: 1, 64: 1, 4: 1})) == [16, 64]


@pytest.mark.parametrize("node_name", METHODS)
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_missing_feature_is_an_error(build: Callable, node_name: str, whose: str) -> None:
    """Check that the error names the detector, the missing stride and the captured strides."""
    distiller = build(node_name, {8: 1, 16: 1})
    given = {"student": STUDENT, "teacher": TEACHER}
    given[whose] = {8: STUDENT[8]}
    with pytest.raises(
        RuntimeError, match=rf"the {whose}'s features at strides \[16\] were not captured; captured strides: \[8\]"
    ):
        distiller(_outputs(given["student"]), _outputs(given["teacher"]), [])


def test_levels_by_stride_follow_the_order_asked_for() -> None:
    """Check that the list has the order of the requested strides, not that of the dict."""
    assert levels_by_stride(STUDENT, (8, 16), "student") == [STUDENT[8], STUDENT[16]]


@pytest.mark.parametrize(
    ("node_name", "key", "value"),
    [
        ("FEATURE_IMITATION", "ADAPTATION", "5x5"),
        ("STRUCTURAL", "ADAPTATION", "linear"),
        ("STRUCTURAL", "LOSS", "ssin"),
        ("STRUCTURAL", "NORMALIZATION", "batch"),
        ("STRUCTURAL", "WINDOW_SIZE", 10),
        ("STRUCTURAL", "WINDOW_SIZE", -1),
        ("STRUCTURAL", "SMOOTH_L1_BETA", 0.0),
        ("STRUCTURAL", "SMOOTH_L1_BETA", float("nan")),
    ],
)
def test_wrong_values_name_their_key(build: Callable, node_name: str, key: str, value: object) -> None:
    """Check that the error names the key and the value."""
    with pytest.raises(UserError, match=rf"MODEL\.KD\.{node_name}\.{key} is {value!r}"):
        build(node_name, {8: 1}, **{key: value})


@pytest.mark.parametrize(
    ("method", "keys", "message"),
    [
        (PKD, {"num_levels": -1}, r"PKD\.Config\.num_levels is -1; it must be None or a whole number at least 1\."),
        (PKD, {"weight": -3.0}, r"PKD\.Config\.weight is -3\.0; it must be None or a number at least 0\."),
        (PKD, {"weight": np.float32(-3)}, r"PKD\.Config\.weight is -3\.0; it must be None or a number at least 0\."),
        (PKD, {"num_levels": np.float32(1)}, r"PKD\.Config\.num_levels is 1\.0; it must be None or a whole number"),
        (PKD, {"weight": "5"}, r"PKD\.Config\.weight is '5'; it must be None or a number at least 0\."),
        (PKD, {"weight": torch.tensor([5.0])}, r"PKD\.Config\.weight is \[5\.0\]; it must be None or a number"),
        (
            StructuralKD,
            {"ssim_exponents": "111"},
            r"StructuralKD\.Config\.ssim_exponents is '111'; it must be three numbers",
        ),
        (IMA, {"mask": "radnom"}, r"IMA\.Config\.mask is 'radnom'; it must be one of "),
        (StructuralKD, {"loss": "sim"}, r"StructuralKD\.Config\.loss is 'sim'; it must be one of "),
        (ICD, {"dim": 30}, r"ICD\.Config\.DIM is 30; it must be a multiple of 4\."),
    ],
)
def test_wrong_values_of_a_config_built_in_code_are_refused(method: type, keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        make(method, spec_of({8: 4}), **keys)


def test_in_float32_converts_all_tensors_of_the_arguments() -> None:
    """Check positional and keyword tensors, those in containers, and that integers remain as they are."""

    @in_float32
    def types(maps, *, other, by_stride):
        assert not torch.is_autocast_enabled("cpu")
        return [x.dtype for x in (*maps, other, *by_stride[8])]

    half, index = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        assert types([half], other=half, by_stride={8: (half, index)}) == [torch.float32] * 3 + [torch.int64]


def test_in_float32_without_a_tensor_is_an_error() -> None:
    @in_float32
    def nothing(value):
        return value

    with pytest.raises(TypeError, match=r"^nothing got no tensor"):
        nothing([1.0])


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        (StructuralKD, {"ssim_exponents": [1.0, 0.5, 1]}),
        (StructuralKD, {"ssim_exponents": OmegaConf.create([1.0, 1, 1])}),
        (StructuralKD, {"ssim_exponents": np.ones(3)}),
        (PKD, {"weight": np.float32(5)}),
        (PKD, {"weight": torch.tensor(5.0)}),
        (PKD, {"weight": Fraction(1, 2)}),
        (PKD, {"num_levels": np.int64(1)}),
    ],
)
def test_sequences_and_numbers_of_any_type_in_a_config_built_in_code(method: type, keys: dict) -> None:
    make(method, spec_of({8: 4}), **keys)


@pytest.mark.parametrize("value", [True, "3", None, float("inf"), -0.5])
def test_check_number_refuses_what_is_no_finite_number(value: object) -> None:
    """Check booleans, strings, None, infinity and numbers below the minimum, which is valid unless excluded."""
    with pytest.raises(UserError, match=r"MODEL\.KD\.ICD\.WEIGHT is .*; it must be a number at least 0\."):
        check_number("MODEL.KD.ICD.WEIGHT", value, 0)
    check_number("MODEL.KD.ICD.WEIGHT", 0, 0)
    with pytest.raises(UserError, match="must be a number above 0"):
        check_number("MODEL.KD.ICD.WEIGHT", 0, 0, exclusive=True)


def test_schedule_by_hand() -> None:
    """Check the start, a linear warm-up that reaches 1 in its last iteration, and the end, which is exclusive."""
    schedule = Schedule(start=2, warmup=4, end=8)
    factors = [schedule.factor(i) for i in range(10)]
    assert factors == [0, 0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0, 0]
    assert [schedule.is_active(i) for i in range(10)] == [f > 0 for f in factors]
    always = Schedule()
    assert [always.factor(i) for i in (0, 1, 10**6)] == [1.0, 1.0, 1.0]
    assert [Schedule(start=3).factor(i) for i in (2, 3)] == [0.0, 1.0]
    cut = Schedule(warmup=10, end=2)
    assert [cut.factor(i) for i in (0, 1, 2)] == [0.1, 0.2, 0.0]


def test_schedule_from_its_config_node(tiny_cfg: Callable[..., CfgNode]) -> None:
    keys = {"START_ITER": 5, "WARMUP_ITERS": 7, "END_ITER": 90}
    node = tiny_cfg("retinanet", {"MODEL": {"KD": {"STRUCTURAL": keys}}}).MODEL.KD.STRUCTURAL
    assert Schedule.from_node(node) == Schedule(start=5, warmup=7, end=90)


@pytest.mark.parametrize("node_name", METHODS)
def test_idle_losses_keep_parameters_in_the_graph(build: Callable, node_name: str) -> None:
    """Check zero losses under the declared names, with zero gradients for all parameters."""
    distiller = build(node_name, {8: 2}, {8: 3}, ADAPTATION="1x1")
    losses = distiller.idle_losses(like=torch.ones(1, 3, 4, 4))
    assert tuple(losses) == distiller.loss_names
    assert [x.item() for x in losses.values()] == [0.0] * len(losses)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in distiller.parameters())


def test_param_groups_default_to_the_students_optimizer(build: Callable, tiny_cfg: Callable[..., CfgNode]) -> None:
    distiller = build("STRUCTURAL", {8: 2}, ADAPTATION="1x1")
    (group,) = distiller.param_groups(tiny_cfg("retinanet"))
    assert group.optimizer is None
    assert {id(p) for p in group.params} == {id(p) for p in distiller.parameters()}
    assert OptimizerSettings("x", 1e-3).clip_norm == float("inf")


def test_layer_lr_gives_added_layers_an_optimizer(build: Callable, tiny_cfg: Callable[..., CfgNode]) -> None:
    cfg = tiny_cfg("retinanet", {"MODEL": {"KD": {"LAYER_LR": 0.002}}})
    (group,) = build("STRUCTURAL", {8: 2}, ADAPTATION="1x1").param_groups(cfg)
    assert group.optimizer == OptimizerSettings("layers", 0.002, eps=1e-15)


@pytest.mark.parametrize("name", [name for name, _ in DISTILLER_REGISTRY])
def test_registered_methods_keep_the_contract(name: str, tiny_cfg: Callable[..., CfgNode]) -> None:
    """Check the names of losses and needed parts, and that the config node has the shared keys and defaults."""
    method = DISTILLER_REGISTRY.get(name)
    assert issubclass(method, Distiller)
    assert method.__name__ == name
    parts = {"features", "anchors", "dense", "targets", "proposals", "objectness", "distributions", "towers"}
    assert method.needs <= parts and (method.alternative_needs or frozenset()) <= parts
    assert method.loss_names
    assert len(set(method.loss_names)) == len(method.loss_names)
    assert all(n.startswith("loss_") for n in method.loss_names)
    assert set(method.aux_loss_names) < set(method.loss_names)
    assert set(method.aux_loss_names) == {n for n in method.loss_names if "_aux_" in n}
    node = tiny_cfg("retinanet").MODEL.KD[method.CONFIG_NODE]
    assert {"WEIGHT", "START_ITER", "WARMUP_ITERS", "END_ITER"} <= node.keys()
    assert method.Config.read(node, "MODEL.KD") == method.Config()
    owners = [other for other, cls in DISTILLER_REGISTRY if cls.CONFIG_NODE == method.CONFIG_NODE]
    assert owners == [name]


def test_adaptation_layers_check_the_number_of_levels() -> None:
    """Check that an extra level is an error and not silently dropped."""
    layers = AdaptationLayers({8: (1, 1)}, 1)
    with pytest.raises(ValueError, match="zip"):
        layers([torch.rand(1, 1, 2, 2)] * 2)


def test_levels_of_the_same_channels_are_grouped() -> None:
    """Check strides and maps of two groups, which are those of `pairs`."""
    layers = AdaptationLayers({8: (2, 3), 16: (2, 4), 32: (2, 3)}, 1)
    student, teacher = (
        DetectorOutputs(images=None, features={s: torch.rand(1, c, 2, 2) for s, c in channels.items()}, anchors=None)
        for channels in ({8: 2, 16: 2, 32: 2}, {8: 3, 16: 4, 32: 3})
    )
    groups, pairs = layers.groups(student, teacher), layers.pairs(student, teacher)
    assert [group.strides for group in groups] == [(8, 32), (16,)]
    found = [pair for group in groups for pair in zip(group.student, group.teacher, strict=True)]
    for ours, theirs in zip(found, (pairs[0], pairs[2], pairs[1]), strict=True):
        assert ours[1] is theirs[1]
        assert torch.equal(ours[0], theirs[0])
