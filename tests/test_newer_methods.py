"""CWD, PKD, MGD, FGD and ReviewKD: reference numbers of the authors' code, hand-worked formulas, gradients, and training."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from kd_d2 import Distiller, KDMetaArch, Teacher
from kd_d2.adapters import DensePredictions, DetectorOutputs, build_adapter
from kd_d2.distillers import CWD, FGD, MGD, PKD, ReviewKD
from kd_d2.distillers.adaptation import LevelGroup
from kd_d2.distillers.fgd import ContextBlock
from kd_d2.distillers.generation import random_mask
from kd_d2.distillers.pair import Pair
from kd_d2.distillers.reviewkd import FusionBlock
from kd_d2.errors import UserError
from kd_d2.losses import (
    attended_error,
    background_weights,
    channel_wise_loss,
    dist_loss,
    focal,
    foreground_weights,
    hierarchical_context_loss,
    own_attention,
    pearson_loss,
    pearson_loss_of_levels,
)
from kd_d2.losses.flat_levels import FlatLevels

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from helpers import KillAt, configured, make, make_project, save_fixed_weights, scaled, spec_of, targets_of, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytestmark = pytest.mark.unit

FIXTURES = Path(__file__).parent / "fixtures" / "methods"
STRIDES = (8, 16, 32)
METHODS = (CWD, PKD, MGD, FGD)


@cache
def _fixture(name: str) -> dict[str, Tensor]:
    """Load the results of a public implementation on small random inputs; see the README in the folder FIXTURES."""
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def _levels(name: str, prefix: str) -> dict[int, Tensor]:
    """Return a leaf tensor for each level, by stride."""
    return {stride: _fixture(name)[f"{prefix}.{stride}"].clone().requires_grad_() for stride in STRIDES}


def _outputs(features: dict[int, Tensor], dense: DensePredictions | None = None) -> DetectorOutputs:
    return DetectorOutputs(images=None, features=features, dense=dense)


def _assert_equal(found: Tensor | float, expected: Tensor, floor: float = 0.0) -> None:
    """Assert equality within 1e-5 of the largest expected value plus `floor`."""
    found = torch.as_tensor(found).reshape(expected.shape)
    difference, largest = (found.detach() - expected).abs().max().item(), expected.abs().max().item()
    assert difference <= 1e-5 * largest + floor, f"{difference} of {largest}"


def _copy(module: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(values[name].reshape(parameter.shape))


# --------------------------------------------------------------------------------- numbers of public implementations


@pytest.mark.parametrize(("case", "temperature"), [("neck_tau1", 1.0), ("neck_tau4", 4.0)])
def test_cwd_of_the_program(case: str, temperature: float) -> None:
    """Check the loss of each level, the weighted sum and the gradients."""
    values, student = _fixture("cwd"), _levels("cwd", "student")
    teacher = {s: values[f"teacher.{s}"] for s in STRIDES}
    cwd = make(CWD, spec_of(dict.fromkeys(STRIDES, 8)), temperature=temperature)
    loss = scaled(cwd, _outputs(student), _outputs(teacher), [])["loss_cwd"]
    loss.backward()
    for s in STRIDES:
        _assert_equal(channel_wise_loss(student[s], teacher[s], temperature), values[f"{case}.loss.{s}"])
        _assert_equal(student[s].grad, values[f"{case}.grad_student.{s}"])
    _assert_equal(loss, sum(values[f"{case}.weighted_loss.{s}"] for s in STRIDES))


def _dense(logit_maps: dict[int, Tensor], classes: int) -> DensePredictions:
    logits = {s: x.permute(0, 2, 3, 1).reshape(len(x), -1, classes) for s, x in logit_maps.items()}
    return DensePredictions(logits=logits, box_regression={}, anchors={}, decode=lambda *_: None)


@pytest.mark.parametrize("classes", [4, 2])
def test_cwd_on_logits_of_the_program(classes: int) -> None:
    """Check one anchor with four classes and two anchors with two, which have the same channels."""
    values, student = _fixture("cwd"), _levels("cwd", "student_logits")
    teacher = {s: values[f"teacher_logits.{s}"] for s in STRIDES}
    cwd = make(CWD, spec_of(dict.fromkeys(STRIDES, 8)), maps="logits")
    loss = scaled(cwd, *(_outputs(x, _dense(x, classes)) for x in (student, teacher)), [])["loss_cwd"]
    loss.backward()
    _assert_equal(loss, sum(values[f"logits_tau1.weighted_loss.{s}"] for s in STRIDES))
    for s in STRIDES:
        _assert_equal(student[s].grad, values[f"logits_tau1.grad_student.{s}"])


def test_cwd_behind_an_adaptation_layer() -> None:
    """Check the gradient through a 1x1 layer; the authors divide by the student's 6 channels, we by the 8 compared."""
    values, student = _fixture("cwd"), _levels("cwd", "adapted.student")
    cwd = make(CWD, *(spec_of(dict.fromkeys(STRIDES, c)) for c in (6, 8)), weight=5.0)
    for s in STRIDES:
        align = {name: values[f"adapted.param.{s}.align.{name}"] for name in ("weight", "bias")}
        _copy(cwd.adaptation.layers[str(s)], align)
    teacher = {s: values[f"teacher.{s}"] for s in STRIDES}
    scaled(cwd, _outputs(student), _outputs(teacher), [])["loss_cwd"].backward()
    for s in STRIDES:
        _assert_equal(student[s].grad * 8 / 6, values[f"adapted.public_grad_student.{s}"])


def test_pkd_of_the_program() -> None:
    """Check the loss of each level, the weighted sum and the gradients."""
    values, student = _fixture("pkd"), _levels("pkd", "student")
    teacher = {s: values[f"teacher.{s}"] for s in STRIDES}
    pkd = make(PKD, spec_of(dict.fromkeys(STRIDES, 8)))
    loss = scaled(pkd, _outputs(student), _outputs(teacher), [])["loss_pkd"]
    loss.backward()
    _assert_equal(loss, sum(values[f"weighted_loss.{s}"] for s in STRIDES))
    for s in STRIDES:
        _assert_equal(pearson_loss(student[s], teacher[s]), values[f"loss.{s}"])
        _assert_equal(student[s].grad, values[f"grad_student.{s}"])


@pytest.mark.parametrize("resized", ["student", "teacher"])
def test_pkd_of_maps_of_other_size(resized: str) -> None:
    """Check a student level of stride 16 against a teacher level of stride 8, with either one resized."""
    values = _fixture("pkd")
    student = values["student.16"].clone().requires_grad_()
    pkd = make(PKD, spec_of({16: 8}), resize=resized)
    loss = pkd(_outputs({16: student}), _outputs({16: values["teacher.8"]}), [])["loss_pkd"]
    _assert_equal(loss, values[f"resize_{resized}.loss"])
    _assert_equal(torch.autograd.grad(loss, student)[0], values[f"resize_{resized}.grad_student"])


def test_pkd_of_a_constant_channel() -> None:
    """Check the program's loss, and its gradient except for the channel without variance, which has none."""
    values = _fixture("pkd")
    student = values["constant.student"].clone().requires_grad_()
    loss = pearson_loss(student, values["teacher.32"])
    (gradient,) = torch.autograd.grad(loss, student)
    _assert_equal(loss, values["constant.loss"])
    constant = student.flatten(2).std((0, 2)) == 0
    assert constant.tolist() == [True] + [False] * 7
    _assert_equal(gradient[:, ~constant], values["constant.grad_student"][:, ~constant])
    assert values["constant.grad_student"][:, constant].abs().max() > 0 and not gradient[:, constant].any()


def test_pkd_of_a_channel_that_varies_by_rounding() -> None:
    """Check values that differ by less than 1e-8, whose channel has neither a gradient nor a part in the loss."""
    student = torch.tensor([0.1, 0.1, 0.1, 0.1 + 8e-9]).view(1, 1, 2, 2).requires_grad_()
    assert student.std() > 0
    loss = pearson_loss(student, torch.tensor([1.0, 3.0, 1.0, 3.0]).view(1, 1, 2, 2))
    loss.backward()
    assert loss.item() == pytest.approx(3 / 8, rel=1e-5) and not student.grad.any()


@pytest.fixture
def program_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch torch.rand to return U = 1 - noise: U >= ratio keeps what the authors keep, noise <= 1 - ratio."""
    draws = iter([1 - _fixture("mgd")[f"noise.{s}"][:, 0] for s in STRIDES])
    monkeypatch.setattr(torch, "rand", lambda *size, device: next(draws))


def test_mgd_of_the_program(program_mask: None) -> None:
    """Check the weighted sum and the gradients of features, adaptation layers and generation blocks."""
    values, student = _fixture("mgd"), _levels("mgd", "student")
    teacher = {s: values[f"teacher.{s}"] for s in STRIDES}
    mgd = make(MGD, *(spec_of(dict.fromkeys(STRIDES, c)) for c in (6, 8)))
    adaptation = mgd.adaptation

    def of_level(prefix: str, stride: int) -> dict[str, Tensor]:
        start = f"{prefix}.{stride}."
        return {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}

    layers = {
        s: nn.ModuleDict({"align": adaptation.layers[str(s)], "generation": mgd.generation[str(s)]}) for s in STRIDES
    }
    for s, module in layers.items():
        _copy(module, of_level("param", s))
    loss = scaled(mgd, _outputs(student), _outputs(teacher), [])["loss_mgd"]
    loss.backward()
    _assert_equal(loss, sum(values[f"weighted_loss.{s}"] for s in STRIDES))
    for s, module in layers.items():
        _assert_equal(student[s].grad, values[f"grad_student.{s}"])
        expected = of_level("grad_param", s)
        assert expected.keys() == dict(module.named_parameters()).keys()
        for name, parameter in module.named_parameters():
            _assert_equal(parameter.grad, expected[name])


def test_reviewkd_of_the_program() -> None:
    """Check the weighted loss and the gradients of features, convolutions, normalizations and attention."""
    values, student = _fixture("reviewkd"), _levels("reviewkd", "student")
    teacher = {s: values[f"teacher.{s}"] for s in STRIDES}
    review = make(ReviewKD, *(spec_of(dict.fromkeys(STRIDES, c)) for c in (6, 8)), weight=1.2)
    names = {f"{s}.{name}" for s in STRIDES for name, _ in review.blocks[str(s)].named_parameters()}
    assert {f"param.{name}" for name in names} == {key for key in values if key.startswith("param.")}
    _copy(review.blocks, {name: values[f"param.{name}"] for name in names})
    loss = scaled(review, _outputs(student), _outputs(teacher), [])["loss_reviewkd"]
    loss.backward()
    _assert_equal(loss, values["weighted_loss"])
    for s in STRIDES:
        _assert_equal(student[s].grad, values[f"grad_student.{s}"])
    for name, parameter in review.blocks.named_parameters():
        _assert_equal(parameter.grad, values[f"grad_param.{name}"], floor=1e-6)


def test_hierarchical_context_loss_by_hand() -> None:
    """Check maps of 2 x 4 positions, pooled to one value only, and of 5 x 5 and 3 x 3 constant differences at all sizes."""
    student = torch.tensor([[[[4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 4.0]]]])
    teacher = torch.zeros(1, 1, 2, 4)
    # mean of squares 2 * 16 / 8 = 4; pooled to the mean 1, squared 1, with half the weight
    assert hierarchical_context_loss(student, teacher).item() == pytest.approx((4 + 0.5 * 1) / 1.5)
    assert hierarchical_context_loss(student[..., :1], teacher[..., :1]).item() == 8  # one column: no smaller size
    for side in (5, 3):
        assert hierarchical_context_loss(torch.full((2, 3, side, side), 3.0), torch.ones(2, 3, side, side)).item() == 4
    with pytest.raises(ValueError, match="different shapes"):
        hierarchical_context_loss(student, teacher[..., :3])


def test_fusion_of_levels_by_hand() -> None:
    """Check attention that depends on both levels, and that each coarse position is repeated."""
    block = FusionBlock(1, 1, 1, fuses=True).eval()
    for conv in (block.reduce[0], block.expand[0]):
        nn.init.zeros_(conv.weight)
        conv.weight.data[0, 0, conv.weight.shape[2] // 2, conv.weight.shape[3] // 2] = 1
    for norm in (block.reduce[1], block.expand[1]):
        norm.eps = 0.0
    with torch.no_grad():
        block.attention.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]])[..., None, None])
        block.attention.bias.zero_()
    output, fused = block(torch.tensor([[[[0.0, 2.0]]]]), torch.tensor([[[[3.0]]]]))

    def share(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = [3 * share(3), 2 * share(2) + 3 * share(3)]
    assert fused.flatten().tolist() == pytest.approx(expected) and torch.equal(output, fused)


def test_residual_reviewkd_starts_from_the_students_features() -> None:
    """Check the first loss, which is that of the features themselves, and that the last normalization learns from it."""
    student, teacher = torch.rand(2, 3, 5, 5, requires_grad=True), torch.rand(2, 3, 5, 5)
    review = make(ReviewKD, spec_of({8: 3}), residual=True)
    loss = review(_outputs({8: student}), _outputs({8: teacher}), [])["loss_reviewkd"]
    assert torch.equal(loss, hierarchical_context_loss(student, teacher))
    loss.backward()
    assert review.blocks["8"].expand[1].weight.grad.all() and not review.blocks["8"].reduce[0].weight.grad.any()
    with pytest.raises(
        UserError,
        match=r"^MODEL\.KD\.REVIEWKD\.RESIDUAL is True, but at stride 8 the student has 3 channels and the teacher 4",
    ):
        make(ReviewKD, spec_of({8: 3}), spec_of({8: 4}), residual=True)
    assert make(ReviewKD, spec_of({8: 3}), residual=None).is_residual
    assert not make(ReviewKD, spec_of({8: 3}), spec_of({8: 4}), residual=None).is_residual


def test_reviewkd_of_selected_channels() -> None:
    """Check a student with the first and third of four channels, which is compared with these alone."""
    channels = ({8: 2, 16: 2}, {8: 4, 16: 4})
    pair = Pair(*map(spec_of, channels), inherits_neck=True)
    review = ReviewKD(ReviewKD.Config(residual=None), pair)
    torch.manual_seed(0)
    teacher = {8: torch.randn(2, 4, 4, 4), 16: torch.randn(2, 4, 2, 2)}
    student = {stride: maps[:, [0, 2]].clone() for stride, maps in teacher.items()}
    assert review.is_residual and review(_outputs(student), _outputs(teacher), [])["loss_reviewkd"].item() == 0
    student[8][:, 1] += 2.0  # the difference of squares is 4 at every resolution, in half of the channels
    loss = review(_outputs(student), _outputs(teacher), [])["loss_reviewkd"]
    assert loss.item() == pytest.approx(2.0)
    for config in (ReviewKD.Config(residual=None, adaptation="none"), ReviewKD.Config(adaptation="none")):
        other = ReviewKD(config, pair)
        assert not other.is_residual and other.blocks["8"].expand[0].out_channels == 4
    with pytest.raises(UserError, match=r"REVIEWKD.ADAPTATION is 'select', but at stride 8 the student has 4 channels"):
        ReviewKD(ReviewKD.Config(adaptation="select"), Pair(*map(spec_of, channels[::-1])))


def test_reviewkd_of_one_position() -> None:
    """Check the message if the normalization has nothing to normalize over, and that two images suffice."""
    review = make(ReviewKD, spec_of({8: 2, 16: 2}))
    assert review.blocks["16"].attention is None and review.blocks["8"].attention is not None

    def loss(images: int) -> Tensor:
        maps = {8: torch.rand(images, 2, 2, 2), 16: torch.rand(images, 2, 1, 1)}
        return review(_outputs(maps), _outputs(maps), [])["loss_reviewkd"]

    with pytest.raises(
        UserError, match=r"a level has only one position, of one image.*MODEL\.KD\.REVIEWKD\.NUM_LEVELS"
    ):
        loss(1)
    assert loss(2) > 0


def test_residual_generation_starts_as_the_identity() -> None:
    """Check the loss, computed by hand from the features, and which parameters get a gradient in the first step."""
    student = torch.tensor([[[[1.0, -2.0], [3.0, 0.5]]]], requires_grad=True)
    teacher = torch.tensor([[[[0.0, -1.0], [1.0, 0.5]]]])
    mgd = make(MGD, spec_of({8: 1}), residual=True, mask_ratio=0.0)
    loss = mgd(_outputs({8: student}), _outputs({8: teacher}), [])["loss_mgd"]
    loss.backward()
    assert loss.item() == 1 + 1 + 4
    assert torch.equal(student.grad, 2 * (student - teacher).detach())
    first, _, second = mgd.generation["8"]
    assert not first.weight.grad.any()
    assert second.bias.grad.item() == 2 * (1 - 1 + 2)


def test_residual_generation_adds_to_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a masked position is zero, and that the output of the layers is added to the masked features."""
    monkeypatch.setattr(torch, "rand", lambda *size, device: torch.tensor([[[0.9, 0.1]]]))
    mgd = make(MGD, spec_of({8: 1}), residual=True, mask_ratio=0.5)
    nn.init.constant_(mgd.generation["8"][2].bias, 10.0)
    loss = mgd(_outputs({8: torch.tensor([[[[3.0, 5.0]]]])}), _outputs({8: torch.zeros(1, 1, 1, 2)}), [])["loss_mgd"]
    assert loss.item() == 13**2 + 10**2


def test_random_mask_keeps_what_the_program_keeps(program_mask: None) -> None:
    values = _fixture("mgd")
    for s in STRIDES:
        assert torch.equal(random_mask(values[f"student.{s}"], 0.65)[:, None], values[f"kept.{s}"])


FGD_LAYERS = {
    "align": "adaptation.layers.{s}",
    "conv_mask_s": "student_relations.{s}.attention",
    "conv_mask_t": "teacher_relations.{s}.attention",
    **{f"channel_add_conv_s.{n}": f"student_relations.{{s}}.transform.{n}" for n in (0, 1, 3)},
    **{f"channel_add_conv_t.{n}": f"teacher_relations.{{s}}.transform.{n}" for n in (0, 1, 3)},
}
"""Our layer names by the authors' names."""


def _fgd() -> FGD:
    """Build an FGD distiller with the authors' parameters."""
    values = _fixture("fgd")
    fgd = make(FGD, *(spec_of(dict.fromkeys(STRIDES, c)) for c in (6, 8)))
    assert [*fgd.weights.values()] == pytest.approx(values["weights"].tolist())
    for s in STRIDES:
        for theirs, ours in FGD_LAYERS.items():
            layer = fgd.get_submodule(ours.format(s=s))
            _copy(layer, {name: values[f"param.{s}.{theirs}.{name}"] for name in ("weight", "bias")})
    return fgd


def _boxes(with_objects: tuple[bool, bool]) -> list[Instances]:
    boxes = [
        _fixture("fgd")[f"boxes.{image}"] if there else torch.zeros(0, 4) for image, there in enumerate(with_objects)
    ]
    return [Instances((64, 96), gt_boxes=Boxes(b)) for b in boxes]


@pytest.mark.parametrize(
    ("case", "with_objects"),
    [("loss", (True, True)), ("no_boxes_in_1", (True, False)), ("no_boxes", (False, False))],
)
def test_fgd_of_the_program(case: str, with_objects: tuple[bool, bool]) -> None:
    """Check the four losses, including batches in which one image or none has objects."""
    values = _fixture("fgd")
    features = [{s: values[f"{whose}.{s}"] for s in STRIDES} for whose in ("student", "teacher")]
    losses = scaled(_fgd(), *map(_outputs, features), _boxes(with_objects))
    for weight, name in zip(values["weights"], ("foreground", "background", "attention", "relation"), strict=True):
        expected = weight * sum(values[f"{case}.{s}.{name}"] for s in STRIDES)
        _assert_equal(losses[f"loss_fgd_{name}"], expected)
    _assert_equal(sum(losses.values()), sum(values[f"{case}.{s}.weighted_total"] for s in STRIDES))


def test_fgd_of_each_level_of_the_program() -> None:
    """Check the losses and masks of each level, and the gradients of features and all layers."""
    values, student, fgd = _fixture("fgd"), _levels("fgd", "student"), _fgd()
    teacher = {s: values[f"teacher.{s}"] for s in STRIDES}
    pairs = dict(zip(STRIDES, fgd.adaptation.pairs(_outputs(student), _outputs(teacher)), strict=True))
    boxes = nn.utils.rnn.pad_sequence([values[f"boxes.{n}"] for n in (0, 1)], batch_first=True, padding_value=-1e4)
    for s in STRIDES:
        foreground = foreground_weights(boxes / s, *teacher[s].shape[-2:])
        _assert_equal(foreground, values[f"loss.{s}.mask_fg"])
        _assert_equal(background_weights(foreground), values[f"loss.{s}.mask_bg"])
        sums = fgd.losses_of_levels(LevelGroup((s,), *((x,) for x in pairs[s])), boxes)
        parts = {name: loss / len(boxes) for name, loss in sums.items()}
        for name in ("foreground", "background", "attention", "relation"):
            _assert_equal(parts[f"loss_fgd_{name}"], values[f"loss.{s}.{name}"])
        sum(weight * parts[name] for name, weight in fgd.weights.items()).backward()
        _assert_equal(student[s].grad, values[f"loss.{s}.grad_student"])
        for theirs, ours in FGD_LAYERS.items():
            for name, parameter in fgd.get_submodule(ours.format(s=s)).named_parameters():
                # softmax is invariant to the bias: the gradient is 0 up to rounding on both sides
                floor = 1e-9 if theirs.startswith("conv_mask") and name == "bias" else 0.0
                _assert_equal(parameter.grad, values[f"loss.{s}.grad_param.{theirs}.{name}"], floor)


# ------------------------------------------------------------------------------------------------------------------- by hand


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_channel_wise_loss_by_hand() -> None:
    """Check softmax (1/4, 3/4) against (1/2, 1/2) and an equal channel, at temperatures 1 and 2, and the gradient."""
    student = torch.tensor([[0.0, math.log(3)], [1.0, 2.0]], dtype=torch.float64).view(1, 2, 1, 2)
    teacher = torch.tensor([[7.0, 7.0], [5.0, 6.0]], dtype=torch.float64).view(1, 2, 1, 2)
    expected = math.log(4 / 3) / 2 / 2
    assert channel_wise_loss(student, teacher).item() == pytest.approx(expected)
    assert channel_wise_loss(2 * student, 2 * teacher, 2.0).item() == pytest.approx(4 * expected)
    maps = _random(2, 3, 2, 2), _random(2, 3, 2, 2, seed=1)
    assert torch.autograd.gradcheck(lambda s: channel_wise_loss(s, maps[1], 2.0), maps[0].requires_grad_())
    (own,) = torch.autograd.grad(channel_wise_loss(maps[0], maps[1].requires_grad_()), maps[1], allow_unused=True)
    assert own is None


def test_pearson_loss_by_hand() -> None:
    """Check correlations 1 (for any scale and shift), -1 and 0 of four positions, one position, and the gradient."""
    ramp = torch.tensor([0.0, 1, 2, 3], dtype=torch.float64).view(1, 1, 2, 2)
    other = torch.tensor([1.0, 0, 0, 1], dtype=torch.float64).view(1, 1, 2, 2)
    assert pearson_loss(ramp, 1e3 * ramp - 5e4).item() == pytest.approx(0, abs=1e-5)
    assert pearson_loss(ramp, -ramp).item() == pytest.approx(2 * 3 / 4, rel=1e-5)
    assert pearson_loss(ramp, other).item() == pytest.approx(3 / 4, rel=1e-5)
    both = torch.cat([ramp, ramp], 1), torch.cat([-ramp, other], 1)
    assert pearson_loss(*both).item() == pytest.approx((2 + 1) / 2 * 3 / 4, rel=1e-5)
    single = torch.ones(1, 2, 1, 1, requires_grad=True)
    loss = pearson_loss(single, torch.zeros(1, 2, 1, 1))
    assert loss.item() == 0 and torch.autograd.grad(loss, single)[0].abs().max() == 0
    maps = _random(2, 3, 2, 2), _random(2, 3, 2, 2, seed=1)
    assert torch.autograd.gradcheck(lambda s: pearson_loss(s, maps[1]), maps[0].requires_grad_())
    (own,) = torch.autograd.grad(pearson_loss(maps[0], maps[1].requires_grad_()), maps[1], allow_unused=True)
    assert own is None


@pytest.mark.parametrize("loss", [pearson_loss, lambda s, t: dist_loss(*(x.flatten(0, 2) for x in (s, t)))])
def test_correlations_far_from_zero(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Check that float32 suffices for values with a deviation of 1 around 1000, also for the gradient."""
    student, teacher = ((_random(2, 3, 8, 8, seed=seed) + 1000).float() for seed in (0, 1))
    pairs = [
        (student.to(dtype).clone().requires_grad_(), teacher.to(dtype)) for dtype in (torch.float32, torch.float64)
    ]
    found, expected = (loss(*pair) for pair in pairs)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    found, expected = (torch.autograd.grad(x, pair[0])[0] for x, pair in zip((found, expected), pairs, strict=True))
    _assert_equal(found, expected)


def test_pearson_loss_of_levels() -> None:
    """Check the sum over levels of different channels and sizes, and its gradients."""
    shapes = (2, 3, 4, 5), (2, 1, 2, 2)
    student, teacher = ([_random(*shape, seed=seed).requires_grad_() for shape in shapes] for seed in (0, 1))
    loss, levels = (
        pearson_loss_of_levels(student, teacher),
        [pearson_loss(*level) for level in zip(student, teacher, strict=True)],
    )
    torch.testing.assert_close(loss, sum(levels))
    for found, expected in zip(
        torch.autograd.grad(loss, student), torch.autograd.grad(sum(levels), student), strict=True
    ):
        torch.testing.assert_close(found, expected)
    fixed = [t.detach() for t in teacher]
    assert torch.autograd.gradcheck(lambda *maps: pearson_loss_of_levels(maps, fixed), student)


def test_pearson_loss_of_a_batch_on_two_ranks() -> None:
    """Check that each of two ranks, simulated in turn, gets the loss and its part of the whole batch's gradient."""
    student, teacher = _random(4, 3, 2, 5).requires_grad_(), _random(4, 3, 2, 5, seed=1)
    whole = pearson_loss(student, teacher)
    expected = torch.autograd.grad(whole, student)[0]
    ranks = slice(0, 3), slice(3, 4)
    known: list[Tensor] = []

    def run(rank: int) -> tuple[Tensor, list[Tensor]]:
        """Return the loss and the rank's values of all sums, with known sums of both ranks in their place."""
        own: list[Tensor] = []

        def total(value: Tensor) -> Tensor:
            own.append(value.detach())
            return value + (known[len(own) - 1] - value.detach()) if len(own) <= len(known) else value

        return pearson_loss_of_levels([student[ranks[rank]]], [teacher[ranks[rank]]], total), own

    for number in range(2):
        known.append(sum(run(rank)[1][number] for rank in range(2)))
    for rank in range(2):
        loss, _ = run(rank)
        torch.testing.assert_close(loss, whole)
        (found,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(found[ranks[rank]], expected[ranks[rank]])


def test_own_attention_by_hand() -> None:
    """Check shares 1/4 and 3/4 of two positions and of two channels, times their number of 2, and the gradient."""
    positions = torch.tensor([[0.0, -math.log(3)], [0.0, math.log(3)]]).view(1, 2, 1, 2)
    over_positions, over_channels = own_attention(positions / 2, 0.5)
    assert over_positions.flatten().tolist() == pytest.approx([2 / 4, 2 * 3 / 4])
    assert over_channels.flatten().tolist() == pytest.approx([1, 1])
    assert over_channels.shape == (1, 2, 1, 1) and over_positions.shape == (1, 1, 1, 2)
    over_positions, over_channels = own_attention(positions.transpose(1, 3) / 2, 0.5)
    assert over_positions.flatten().tolist() == pytest.approx([1, 1])
    assert over_channels.flatten().tolist() == pytest.approx([2 / 4, 2 * 3 / 4])
    assert torch.autograd.gradcheck(lambda x: own_attention(x, 0.5), _random(2, 2, 2, 3).requires_grad_())


def test_focal_weights_by_hand() -> None:
    """Check inclusive floor and ceil, the smaller of two boxes, a box beyond the map, padding, and no boxes."""
    boxes = torch.full((2, 3, 4), -1e4)
    boxes[0] = torch.tensor([[0.5, 0.0, 1.2, 1.0], [1.0, 1.0, 1.0, 1.0], [2.5, 2.0, 5.5, 2.0]])
    foreground = foreground_weights(boxes, 3, 4)
    sixth, fifth = 1 / (3 * 2), 1 / 5
    expected = [[sixth, sixth, sixth, 0], [sixth, 1, sixth, 0], [0, 0, fifth, fifth]]
    torch.testing.assert_close(foreground[0], torch.tensor(expected))
    assert (foreground[1] == 0).all()
    background = background_weights(foreground)
    torch.testing.assert_close(background[0], torch.tensor([[0, 0, 0, 1.0], [0, 0, 0, 1], [1, 1, 0, 0]]) / 4)
    torch.testing.assert_close(background[1], torch.full((3, 4), 1 / 12))
    everywhere = foreground_weights(torch.tensor([[[0.0, 0.0, 4.0, 3.0]]]), 3, 4)
    assert (everywhere == 1 / 20).all() and (background_weights(everywhere) == 0).all()
    assert (foreground_weights(torch.zeros(2, 0, 4), 3, 4) == 0).all()


def test_focal_weights_and_attention_do_not_use_autocast() -> None:
    """Check that sums over positions, which are matrix products, stay in float32."""
    foreground = (torch.rand(2, 30, 41, generator=torch.Generator().manual_seed(0)) > 0.3).float()
    maps = _random(2, 3, 30, 41).float()
    expected = background_weights(foreground), *own_attention(maps, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        actual = background_weights(foreground), *own_attention(maps, 0.5)
    torch.testing.assert_close(actual, expected)


def test_attended_error_by_hand() -> None:
    """Check 2 * 1 + 3 * 4 at one position, and that only the student gets a gradient."""
    student = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).requires_grad_()
    teacher = torch.zeros(1, 2, 1, 1, requires_grad=True)
    error = attended_error(student, teacher, torch.tensor([2.0, 3.0]).view(1, 2, 1, 1))
    assert error.shape == (1, 1, 1) and error.item() == pytest.approx(14.0)
    ours, theirs = torch.autograd.grad(error.sum(), (student, teacher), allow_unused=True)
    assert ours.flatten().tolist() == pytest.approx([4.0, 12.0]) and theirs is None


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor, views excluded, that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(results) if isinstance(x, Tensor) and x._base is None]
        self.elements = max([self.elements, *sizes])
        return results


def _loop_over_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    mask = torch.zeros(len(boxes), height, width)
    for image, of_image in enumerate(boxes.tolist()):
        for x1, y1, x2, y2 in of_image:
            x1, y1, x2, y2 = math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)
            part = mask[image, y1 : y2 + 1, x1 : x2 + 1]
            part.clamp_(min=1 / ((x2 - x1 + 1) * (y2 - y1 + 1)))
    return mask


@pytest.mark.parametrize("chunk", [focal.CHUNK, 1])
def test_three_hundred_boxes(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the weights against a loop, for all boxes at once and one by one, and the size of the largest tensor."""
    monkeypatch.setattr(focal, "CHUNK", chunk)
    corners = torch.rand(2, 300, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([28.0, 18.0])
    sides = torch.rand(2, 300, 2, generator=torch.Generator().manual_seed(1)) * 12
    boxes = torch.cat([corners, corners + sides], 2)
    torch.testing.assert_close(foreground_weights(boxes, 20, 30), _loop_over_boxes(boxes, 20, 30))
    with Largest() as largest:
        foreground_weights(boxes * 4, 100, 152)
    assert largest.elements <= max(chunk, 2 * 300 * 152)


def test_context_block_by_hand() -> None:
    """Check that the block starts as the identity, and with random W2 and a bias of 1 against a loop over positions."""
    torch.manual_seed(0)
    block = ContextBlock(4)
    assert [tuple(layer.weight.shape) for layer in block.transform if hasattr(layer, "weight")] == [
        (2, 4),
        (2,),
        (4, 2),
    ]
    x = torch.randn(2, 4, 2, 3)
    assert torch.equal(block(x), x)
    nn.init.normal_(block.transform[3].weight)
    nn.init.ones_(block.transform[3].bias)
    weight = block.attention.weight[0, :, 0, 0]
    for image, result in zip(x, block(x), strict=True):
        share = (weight @ image.flatten(1)).softmax(0)
        context = sum(share[n] * image.flatten(1)[:, n] for n in range(6))
        first, norm, _, last = block.transform
        hidden = F.layer_norm(first.weight @ context + first.bias, (2,), norm.weight, norm.bias).relu()
        torch.testing.assert_close(result - image, (last.weight @ hidden + 1)[:, None, None].expand(4, 2, 3))
    assert ContextBlock(1)(x[:, :1]).shape == (2, 1, 2, 3)


def test_fgd_gradient_numerically() -> None:
    """Check the four losses in float64, away from the kinks of absolute values."""
    fgd = make(FGD, spec_of({8: 2})).double()
    for block in (fgd.student_relations, fgd.teacher_relations):
        nn.init.normal_(block["8"].transform[3].weight)
    student, teacher = _random(2, 2, 2, 3).requires_grad_(), _random(2, 2, 2, 3, seed=1)
    foreground = foreground_weights(torch.tensor([[[0.0, 0, 1, 0.5]], [[-1e4] * 4]], dtype=torch.float64), 2, 3)
    losses = functools.partial(FGD._flat_losses.__wrapped__, fgd)
    rest = teacher.flatten(2), foreground.flatten(1), FlatLevels.of([teacher]), ["8"]
    assert torch.autograd.gradcheck(lambda s: tuple(losses(s.flatten(2), *rest).values()), student)


def test_fgd_of_levels_with_different_channels() -> None:
    """Check that the losses are the sums of those of each level alone."""
    fgd = make(FGD, spec_of({8: 4, 16: 6, 32: 4}))
    student, teacher = (
        {
            8: _random(2, 4, 8, 8, seed=n).float(),
            16: _random(2, 6, 4, 4, seed=n).float(),
            32: _random(2, 4, 2, 2).float() * n,
        }
        for n in (1, 2)
    )
    targets = targets_of([[8.0, 8, 40, 40]], [[0.0, 16, 20, 60]])
    losses = fgd(_outputs(student), _outputs(teacher), targets)
    boxes = torch.stack([target.gt_boxes.tensor for target in targets])
    alone = [fgd.losses_of_levels(LevelGroup((s,), (student[s],), (teacher[s],)), boxes) for s in student]
    for name, weight in fgd.weights.items():
        torch.testing.assert_close(losses[name], weight / 2 * sum(level[name] for level in alone))


def test_fgd_without_what_has_no_weight() -> None:
    """Check that foreground and background losses are unchanged, without other losses or layers."""
    maps = [_outputs({8: _random(1, 4, 8, 8, seed=seed).float()}) for seed in (0, 1)]
    targets = targets_of([[8.0, 8, 40, 40]])
    full, part = (
        make(FGD, spec_of({8: 4}), **keys) for keys in ({}, {"attention_weight": 0.0, "relation_weight": 0.0})
    )
    losses = part(*maps, targets)
    assert part.loss_names == tuple(losses) == ("loss_fgd_foreground", "loss_fgd_background")
    assert losses.items() <= full(*maps, targets).items()
    assert not list(part.parameters())


def test_equal_features_have_no_loss_and_finite_gradients() -> None:
    """Check CWD, PKD and newly initialized FGD on equal maps."""
    for method in (make(method, spec_of({8: 4})) for method in (CWD, PKD, FGD)):
        maps = _random(2, 4, 8, 8).float()
        student = maps.clone().requires_grad_()
        losses = scaled(method, _outputs({8: student}), _outputs({8: maps}), targets_of([[8.0, 8, 40, 40]], []))
        assert [x.item() for x in losses.values()] == pytest.approx([0] * len(losses), abs=1e-5)
        sum(losses.values()).backward()
        assert student.grad.isfinite().all()


# -------------------------------------------------------------------------------------------------------- keys and their defaults


@pytest.fixture
def build(tiny_cfg: Callable, tiny_detector: Callable) -> Callable[..., Distiller]:
    """Return a function (method, student kind, teacher kind, keys) that builds the distiller of the two detectors."""

    def build(method: type[Distiller], kind: str = "retinanet", teacher: str = "retinanet", **keys: Any) -> Distiller:
        cfg = tiny_cfg(kind, {"MODEL": {"KD": {method.CONFIG_NODE: keys}}})
        torch.manual_seed(0)
        return configured(method, cfg, *(build_adapter(tiny_detector(k)).spec for k in (kind, teacher)))

    return build


ONE_STAGE, TWO_STAGE = (1e-3, 5e-4, 5e-4, 5e-6), (5e-5, 2.5e-5, 5e-5, 5e-7)
POINTS = (1.6e-3, 8e-4, 8e-4, 8e-6)


@pytest.mark.parametrize(
    ("kind", "pkd", "mgd", "ratio", "fgd"),
    [
        ("retinanet", 10, 2e-5, 0.65, ONE_STAGE),
        ("fcos", 10, 2e-5, 0.65, POINTS),
        ("reppoints", 10, 2e-5, 0.65, POINTS),
        ("gfl", 10, 2e-5, 0.65, ONE_STAGE),
        ("faster", 6, 5e-7, 0.45, TWO_STAGE),
        ("cascade", 6, 5e-7, 0.45, TWO_STAGE),
    ],
)
def test_defaults_are_the_authors(build: Callable, kind: str, pkd: float, mgd: float, ratio: float, fgd: tuple) -> None:
    """Check the defaults of each student, for any teacher, and that equal channels need no adaptation layers."""
    for teacher in (kind, "faster"):
        methods = {method: build(method, kind, teacher) for method in METHODS}
        assert (methods[CWD].weight, methods[CWD].config.temperature, methods[PKD].weight) == (10, 1, pkd)
        assert (methods[MGD].weight, methods[MGD].mask_ratio) == (mgd, ratio)
        assert [*methods[FGD].weights.values()] == pytest.approx(fgd)
        assert methods[FGD].temperature == (0.8 if kind == "fcos" else 0.5)
        assert all(not method.adaptation.layers for method in methods.values())
        assert not list(methods[CWD].parameters()) and not list(methods[PKD].parameters())
    assert build(CWD, "retinanet", MAPS="logits").weight == 5


@pytest.mark.parametrize("method", [PKD, MGD, FGD, ReviewKD])
def test_number_of_levels(build: Callable, method: type[Distiller]) -> None:
    """Check that the finest of the common levels are compared, for pairs with strides from 8 to 128 and from 4 to 64."""
    for teacher, common in (("retinanet", (8, 16, 32, 64, 128)), ("faster", (8, 16, 32, 64))):
        for number in (None, 1, 4, 9):
            built = build(method, "retinanet", teacher, NUM_LEVELS=number)
            assert built.adaptation.strides == common[:number]
            layers = next(
                (x for name in ("generation", "student_relations", "blocks") if (x := getattr(built, name, None))), None
            )
            assert layers is None or [*layers] == [str(stride) for stride in common[:number]]


def test_weights_that_are_named(build: Callable) -> None:
    """Check that WEIGHT replaces a default or multiplies FGD's four weights, and each of these on its own."""
    for method in (CWD, PKD, MGD, ReviewKD):
        assert build(method, WEIGHT=3.0).weight == 3
    assert build(MGD, MASK_RATIO=0.25).mask_ratio == 0.25
    keys = ("FOREGROUND_WEIGHT", "BACKGROUND_WEIGHT", "ATTENTION_WEIGHT", "RELATION_WEIGHT")
    for number, key in enumerate(keys):
        fgd = build(FGD, WEIGHT=2.0, **{key: 0.25})
        assert fgd.weight == 2 and fgd.relative_weight == 2
        assert [*fgd.weights.values()] == pytest.approx([0.25 if n == number else w for n, w in enumerate(ONE_STAGE)])


@pytest.mark.parametrize(("maps", "weight", "share"), [("neck", None, 1), ("neck", 5.0, 0.5), ("logits", 5.0, 1)])
def test_share_of_cwd_among_balanced_methods(maps: str, weight: float | None, share: float, build: Callable) -> None:
    """Check that the published weight for the compared maps counts as 1."""
    assert build(CWD, MAPS=maps, WEIGHT=weight).relative_weight == share


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        *((method, "ADAPTATION", "5x5") for method in METHODS),
        (CWD, "MAPS", "boxes"),
        (CWD, "TEMPERATURE", 0.0),
        (PKD, "RESIZE", "both"),
        (PKD, "NUM_LEVELS", 0),
        (MGD, "MASK_RATIO", 1.0),
        (MGD, "MASK_RATIO", -0.1),
        (MGD, "MASK_RATIO", "half"),
        (FGD, "TEMPERATURE", -1.0),
        (FGD, "FOREGROUND_WEIGHT", -1.0),
        (FGD, "BACKGROUND_WEIGHT", float("nan")),
        (FGD, "ATTENTION_WEIGHT", "much"),
        (FGD, "RELATION_WEIGHT", -1e-9),
        (ReviewKD, "MID_CHANNELS", 0),
    ],
)
def test_wrong_values_name_their_key(build: Callable, method: type[Distiller], key: str, value: object) -> None:
    """Check that the error is one sentence that starts with the key."""
    with pytest.raises(UserError, match=rf"^MODEL\.KD\.{method.CONFIG_NODE}\.{key} is [^\n]*\.$"):
        build(method, **{key: value})


def test_logits_have_no_adaptation(build: Callable) -> None:
    with pytest.raises(UserError, match=r"MODEL\.KD\.CWD\.ADAPTATION is '1x1', which only MAPS 'neck' uses"):
        build(CWD, MAPS="logits", ADAPTATION="1x1")
    assert not list(build(CWD, MAPS="logits", ADAPTATION="none").parameters())


# ----------------------------------------------------------------------------------------------------------------- on detectors

OTHER_TEACHER: dict[str, Any] = {
    "MODEL": {
        "FPN": {"OUT_CHANNELS": 12, "NORM": "LN"},
        "RESNETS": {"NORM": "FrozenBN"},
        "RPN": {"CONV_DIMS": [12]},
        "PIXEL_MEAN": [0.0, 0.0, 0.0],
        "PIXEL_STD": [57.0, 57.0, 57.0],
    }
}
"""Config of a teacher with other FPN channels, norms and pixel statistics."""


def _model(
    tiny_cfg: Callable, student: nn.Module, other: nn.Module, kind: str, methods: tuple = METHODS, **keys: Any
) -> KDMetaArch:
    cfg = tiny_cfg(kind, {"MODEL": {"KD": keys}})
    specs = build_adapter(student).spec, build_adapter(other).spec
    distillers = {method.__name__: configured(method, cfg, *specs) for method in methods}
    return KDMetaArch(student=student, teacher=Teacher(other), distillers=distillers)


def _check_step(model: KDMetaArch, inputs: list[dict]) -> dict[str, Tensor]:
    """Run a step, assert finite losses and gradients and none in the teacher, and return the distillation losses."""
    losses = model(inputs)
    names = [name for distiller in model.distillers.values() for name in distiller.loss_names]
    sum(losses[name] for name in names).backward()
    assert all(losses[name].isfinite() for name in names)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.distillers.parameters())
    assert all(p.grad is None for p in model.teacher.model.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.student.backbone.parameters())
    return {name: losses[name] for name in names}


@pytest.mark.parametrize(
    ("kind", "teacher"),
    [("retinanet", "retinanet"), ("faster", "cascade"), ("fcos", "retinanet"), ("panoptic", "faster")],
)
@pytest.mark.parametrize("counts", [(3, 2), (1, 0), (0, 0), (300, 0)])
def test_on_detectors(
    tiny_cfg: Callable,
    tiny_detector: Callable,
    make_inputs: Callable,
    event_storage: EventStorage,
    kind: str,
    teacher: str,
    counts: tuple[int, int],
) -> None:
    """Check one-stage and two-stage pairs with many objects, one object and none."""
    student, other = tiny_detector(kind), tiny_detector(teacher, seed=1)
    panoptic = kind == "panoptic"
    inputs = make_inputs(counts=counts, masks=panoptic, sem_seg=panoptic)
    losses = _check_step(_model(tiny_cfg, student, other, kind), inputs)
    assert (losses["loss_fgd_foreground"] > 0) == (sum(counts) > 0)
    assert all(loss > 0 for name, loss in losses.items() if name != "loss_fgd_foreground")


@pytest.mark.parametrize(
    ("kind", "teacher"), [("retinanet", "faster"), ("fcos", "cascade"), ("gfl", "mask"), ("faster", "retinanet")]
)
def test_on_detectors_of_different_families(
    tiny_cfg: Callable,
    tiny_detector: Callable,
    make_inputs: Callable,
    event_storage: EventStorage,
    kind: str,
    teacher: str,
) -> None:
    """Check two-stage teachers of dense students and vice versa, with other channels, norms and pixel statistics."""
    student, other = tiny_detector(kind), tiny_detector(teacher, OTHER_TEACHER, seed=1)
    model = _model(tiny_cfg, student, other, kind)
    for distiller in model.distillers.values():
        assert distiller.adaptation.strides == (8, 16, 32, 64)
        assert {tuple(layer.weight.shape) for layer in distiller.adaptation.layers.values()} == {(12, 8, 1, 1)}
    assert all(loss > 0 for loss in _check_step(model, make_inputs()).values())


@pytest.mark.parametrize("student", ["retinanet", "fcos"])
def test_training_from_a_two_stage_teacher(tmp_path: Path, student: str) -> None:
    """Check all four at once, with balancing and mixed precision: finite losses, and equal losses after resuming."""
    other = make_project(tmp_path / "teacher", "faster-rcnn")
    save_fixed_weights(other.change_teacher(MODEL__FPN__OUT_CHANNELS=24), other.teacher_weights, seed=1)
    project = make_project(
        tmp_path / "student",
        student,
        MODEL__KD__DISTILLERS=[method.__name__ for method in METHODS],
        MODEL__KD__TEACHER__CONFIG_FILE=str(other.teacher),
        MODEL__KD__TEACHER__WEIGHTS=str(other.teacher_weights),
        MODEL__KD__BALANCE__ENABLED=True,
        SOLVER__AMP__ENABLED=True,
        SOLVER__AMP__DTYPE="bfloat16",
        INPUT__MIN_SIZE_TRAIN=(192,),  # oneDNN's bfloat16 is wrong on maps of one cell
        INPUT__MAX_SIZE_TRAIN=288,
        SOLVER__CHECKPOINT_PERIOD=2,
        SOLVER__BASE_LR=0.001,
        SOLVER__STEPS=(),
    )
    unbroken = train(project, "OUTPUT_DIR", tmp_path / "unbroken")
    train(project, hooks=(KillAt(2),))
    resumed = train(project, resume=True, seed=12345)
    names = {name for method in METHODS for name in method.loss_names}
    assert len(unbroken.losses) == 4 and all(names <= losses.keys() for losses in unbroken.losses.values())
    assert all(math.isfinite(value) for losses in unbroken.losses.values() for value in losses.values())
    assert resumed.losses.keys() == {2, 3}
    for iteration, losses in resumed.losses.items():
        assert losses == pytest.approx(unbroken.losses[iteration], rel=1e-3)
    ratios = unbroken.trainer.bare_model.balance.ratios
    assert ratios.keys() == {method.__name__ for method in METHODS} and all(ratio > 0 for ratio in ratios.values())


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "atss", "gfl", "fsaf", "reppoints"])
def test_cwd_on_logits_of_detectors(
    tiny_cfg: Callable, tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage, kind: str
) -> None:
    """Check every dense detector against the formula applied to the outputs of the heads."""
    model = _model(tiny_cfg, tiny_detector(kind), tiny_detector(kind, seed=1), kind, (CWD,), CWD={"MAPS": "logits"})
    inputs = make_inputs(counts=(0, 0))
    (loss,) = _check_step(model, inputs).values()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.student.head.parameters())
    with torch.no_grad():
        targets = [item["instances"] for item in inputs]
        ours = model.adapter.run(inputs, frozenset({"features", "dense"}), targets)
        theirs = model.teacher(inputs, frozenset({"features", "dense"}))
        pairs = [(ours.logit_map(s), theirs.logit_map(s)) for s in (8, 16, 32, 64, 128)]
        expected = 5 * sum(channel_wise_loss(*pair) for pair in pairs)
    assert pairs[0][0].shape[1] == 3 * len(build_adapter(model.student).spec.cell_anchors[8])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_cwd_on_logits_needs_them(build: Callable, tiny_cfg: Callable, tiny_detector: Callable) -> None:
    """Check a student or a teacher without dense predictions, and heads with different numbers of anchors."""
    detectors = {kind: tiny_detector(kind) for kind in ("retinanet", "faster")}
    for whose, kind, other in (("student", "faster", "retinanet"), ("teacher", "retinanet", "faster")):
        with pytest.raises(UserError, match=rf"CWD needs dense predictions, which the {whose} \(GeneralizedRCNN\)"):
            _model(tiny_cfg, detectors[kind], detectors[other], kind, (CWD,), CWD={"MAPS": "logits"})
    ratios = len(build_adapter(detectors["retinanet"]).spec.cell_anchors[8])
    with pytest.raises(
        UserError, match=rf"at stride 8 the student \(RetinaNet\) has {ratios} anchors .* \(FCOS\) 1\.$"
    ):
        build(CWD, "retinanet", "fcos", MAPS="logits")
    assert build(CWD, "fcos", "gfl", MAPS="logits").strides == [8, 16, 32, 64, 128]
    assert CWD.needs == {"features"}


def test_pkd_takes_maps_of_other_sizes(
    toy_detector: type,
    constant_inputs: Callable,
    event_storage: EventStorage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check a teacher whose maps are half as large: PKD alone resizes them; with another method it is an error."""
    teacher = Teacher(toy_detector())
    monkeypatch.setattr(
        teacher.model.backbone, "forward", lambda x: {f"stride{s}": x[..., :: 2 * s, :: 2 * s] for s in (4, 8)}
    )
    pkd = make(PKD, spec_of({4: 3, 8: 3}), weight=1.0)
    model = KDMetaArch(student=toy_detector(), teacher=teacher, distillers={"PKD": pkd})
    inputs = constant_inputs()
    inputs[0]["image"] = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert 0 < model(inputs)["loss_pkd"] < 2
    both = {"PKD": pkd, "CWD": make(CWD, spec_of({4: 3, 8: 3}))}
    with pytest.raises(UserError, match="they cannot be compared"):
        KDMetaArch(student=toy_detector(), teacher=teacher, distillers=both)(inputs)


def test_random_mask_hides_its_part() -> None:
    """Check the share of masked positions, one mask for all channels, another per image, and no mask at ratio 0."""
    torch.manual_seed(0)
    maps = torch.ones(2, 3, 64, 64)
    mask = random_mask(maps, 0.65)
    assert mask.shape == (2, 64, 64) and set(mask.unique().tolist()) == {0, 1}
    assert mask.mean().item() == pytest.approx(0.35, abs=0.03)
    assert not torch.equal(mask[0], mask[1])
    assert (random_mask(maps, 0.0) == 1).all()
