"""FRS: numbers of the authors' program, richness by hand, students and teachers of other kinds."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from kd_d2.adapters import DensePredictions, DetectorOutputs, build_adapter
from kd_d2.distillers import FRS
from kd_d2.errors import UserError
from kd_d2.losses import feature_richness

import numpy as np
import pytest
import torch
from detectron2.modeling.proposal_generator import RPN
from helpers import make, scaled, spec_of
from torch import Tensor, nn

pytestmark = pytest.mark.unit

FIXTURE = Path(__file__).parent / "fixtures" / "methods" / "frs.npz"
PARTS = {"dense": "dense", "rpn": "objectness"}
ONE_ANCHOR = {8: torch.zeros(1, 4), 16: torch.zeros(1, 4)}


def spec(part: str | None, channels: dict[int, int], **changes: object):
    """Return the spec of a detector with class scores of a kind, or without any."""
    family = {"dense": "one-stage", "objectness": "two-stage", None: "other"}[part]
    anchors = None if part is None else {stride: torch.zeros(1, 4) for stride in channels}
    provides = frozenset({"features", part} - {None})
    return spec_of(channels, family, cell_anchors=anchors, provides=provides, **changes)


def outputs(part: str, features: dict[int, Tensor], logits: dict[int, Tensor]) -> DetectorOutputs:
    """Return outputs with logits (B, HWA, K) of a dense head or of an RPN."""
    if part == "objectness":
        return DetectorOutputs(images=None, features=features, objectness=logits)
    return DetectorOutputs(images=None, features=features, dense=DensePredictions(logits, {}, {}, decode=None))


@pytest.mark.parametrize("kind", PARTS)
def test_losses_and_gradients_of_the_program(kind: str) -> None:
    """Check the losses of a one-stage and of a two-stage student, and all gradients, against the authors' program."""
    with np.load(FIXTURE) as arrays:
        values = {n.removeprefix(f"{kind}."): torch.from_numpy(arrays[n]) for n in arrays.files if n.startswith(kind)}
    num_classes, strides = (3 if kind == "dense" else 1), (8, 16)

    def read(name: str) -> dict[int, Tensor]:
        return {stride: values[f"{name}.{stride}"] for stride in strides}

    features, maps = ({s: x.requires_grad_() for s, x in read(name).items()} for name in ("student", "student_logits"))

    def by_anchor(levels: dict[int, Tensor]) -> dict[int, Tensor]:
        return {s: x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, num_classes)) for s, x in levels.items()}

    student = outputs(PARTS[kind], features, by_anchor(maps))
    teacher = outputs(PARTS[kind], read("teacher"), by_anchor(read("teacher_logits")))
    method = make(FRS, spec(PARTS[kind], {8: 6, 16: 6}), spec(PARTS[kind], {8: 8, 16: 8}))
    with torch.no_grad():
        for stride in strides:
            for name, parameter in method.adaptation.layers[str(stride)].named_parameters():
                parameter.copy_(values[f"param.{stride}.{name}"])
    losses = scaled(method, student, teacher, [])
    sum(losses.values()).backward()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, values[name.replace("_frs", "")], rtol=1e-5, atol=0)
    for stride in strides:
        for found, name in ((features[stride], "grad_student"), (maps[stride], "grad_logits")):
            torch.testing.assert_close(found.grad, values[f"{name}.{stride}"], rtol=1e-5, atol=1e-7)
        for name, parameter in method.adaptation.layers[str(stride)].named_parameters():
            torch.testing.assert_close(parameter.grad, values[f"grad_param.{stride}.{name}"], rtol=1e-5, atol=1e-7)


def test_richness_is_the_largest_probability_of_any_anchor() -> None:
    logits = torch.full((1, 2 * 3 * 2, 4), -20.0)  # 2 x 3 positions, 2 anchors, 4 classes
    logits[0, 2 * 5 + 1, 3] = math.log(3)  # second anchor of the last position
    logits[0, 0, 0] = 0.0
    richness = feature_richness(logits.half(), (2, 3))
    assert richness.dtype == torch.float32
    torch.testing.assert_close(richness, torch.tensor([[[0.5, 0, 0], [0, 0, 0.75]]]), atol=1e-3, rtol=0)


def test_losses_by_hand() -> None:
    """Check two positions with richness 0.75 and 0.25: their sum is 1, so that the losses are weighted means."""
    teacher_logits = torch.tensor([[[math.log(3)], [-math.log(3)]]])
    student = outputs("dense", {8: torch.tensor([[[[1.0, 2.0]], [[0.0, 2.0]]]])}, {8: torch.zeros(1, 2, 1)})
    teacher = outputs("dense", {8: torch.zeros(1, 2, 1, 2)}, {8: teacher_logits})
    method = make(FRS, spec("dense", {8: 2}), adaptation="none", feature_weight=1.0, class_weight=10.0)
    losses = method(student, teacher, [])
    assert losses["loss_frs_feature"].item() == pytest.approx(0.75 * 1 + 0.25 * (4 + 4))
    assert losses["loss_frs_class"].item() == pytest.approx(10 * math.log(2))


def test_scores_too_small_to_weight_anything() -> None:
    """Check that probabilities of 0 everywhere give losses and gradients of 0, not NaN."""
    features = {8: torch.randn(1, 2, 1, 2, requires_grad=True)}
    student = outputs("dense", features, {8: torch.zeros(1, 2, 1)})
    teacher = outputs("dense", {8: torch.zeros(1, 2, 1, 2)}, {8: torch.full((1, 2, 1), -200.0)})
    losses = make(FRS, spec("dense", {8: 2}), adaptation="none")(student, teacher, [])
    sum(losses.values()).backward()
    assert {loss.item() for loss in losses.values()} == {0.0} and not features[8].grad.any()


@pytest.mark.parametrize(
    ("part", "name", "weights"),
    [
        ("dense", "RetinaNet", (0.005, 0.02)),
        ("dense", "FCOS", (0.01, 0.05)),
        ("dense", "GFL", (0.1, 0.05)),
        ("objectness", "GeneralizedRCNN", (0.002, 0.1)),
    ],
)
def test_published_weights(part: str, name: str, weights: tuple[float, float]) -> None:
    method = make(FRS, spec(part, {8: 2}, name=name))
    assert tuple(method.weights.values()) == weights and method.weight == 1.0
    assert tuple(make(FRS, spec(part, {8: 2}, name=name), feature_weight=3.0).weights.values()) == (3.0, weights[1])


def test_objectness_has_no_classes() -> None:
    assert make(FRS, spec("dense", {8: 2})).compares_classes
    assert not make(FRS, spec("objectness", {8: 2})).compares_classes


def test_objectness_of_changed_levels() -> None:
    """Check that changed outputs of a detector, as by balanced levels, and those in another order include objectness."""
    levels = {16: torch.ones(1, 2, 1), 8: torch.zeros(1, 2, 1)}
    of_rpn = outputs("objectness", {16: torch.ones(1, 2, 1, 2), 8: torch.ones(1, 2, 1, 2)}, levels)
    assert [*of_rpn.ascending().objectness] == [8, 16]
    doubled = of_rpn.with_levels(lambda maps: {stride: 2 * x for stride, x in maps.items()}).objectness
    assert torch.equal(doubled[16], 2 * levels[16]) and [*doubled] == [16, 8]


@pytest.mark.parametrize("teacher", ["dense", "objectness"])
@pytest.mark.parametrize("student", ["dense", "objectness", None])
def test_features_alone_of_any_pair(student: str | None, teacher: str) -> None:
    """Check that without the class loss only the teacher needs class scores, and of any classes."""
    method = make(FRS, spec(student, {8: 2}), spec(teacher, {8: 2}), class_weight=0.0)
    assert method.needs == {"features"} and method.needs_of_teacher == {"features", teacher}
    assert method.loss_names == ("loss_frs_feature",) and not method.compares_classes
    maps = DetectorOutputs(images=None, features={8: torch.ones(1, 2, 1, 2)})
    losses = method(maps, outputs(teacher, {8: torch.zeros(1, 2, 1, 2)}, {8: torch.zeros(1, 2, 1)}), [])
    assert losses.keys() == {"loss_frs_feature"}


@pytest.mark.parametrize(
    ("student", "teacher", "keys", "message"),
    [
        ("dense", "objectness", {}, r"\(Pupil\) has dense predictions and .* \(Pupil\) the objectness .* set MODEL.KD.FRS.CLASS_WEIGHT to 0"),
        ("objectness", "dense", {}, "CLASS_WEIGHT to 0"),
        (None, "dense", {}, r"of a dense head or an RPN, which the student \(Pupil\) does not have. To .*CLASS_WEIGHT to 0"),
        ("dense", None, {"class_weight": 0.0}, r"weights features by class scores .*, which the teacher \(Pupil\) does not have"),
    ],
)  # fmt: skip
def test_invalid_pairs(student: str | None, teacher: str | None, keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(FRS, spec(student, {8: 2}), spec(teacher, {8: 2}), **keys)


def test_classes_are_compared() -> None:
    """Check that other classes are rejected, with the remedy, except of RPNs, which have none."""
    with pytest.raises(UserError, match=r"has 3 classes .* 5; .* set MODEL.KD.FRS.CLASS_WEIGHT to 0"):
        make(FRS, spec("dense", {8: 2}), spec("dense", {8: 2}, num_classes=5))
    make(FRS, spec("objectness", {8: 2}), spec("objectness", {8: 2}, num_classes=5))


def test_anchors_are_compared() -> None:
    """Check that different anchors are rejected with the class loss only, and levels without scores in any case."""
    other = spec_of({8: 2}, cell_anchors={8: torch.ones(1, 4)}, provides=frozenset({"features", "dense"}))
    with pytest.raises(UserError, match=r"compares predictions anchor by anchor.* set MODEL.KD.FRS.CLASS_WEIGHT to 0"):
        make(FRS, spec("dense", {8: 2}), other)
    make(FRS, spec("dense", {8: 2}), other, class_weight=0.0)
    with pytest.raises(UserError, match=r"FRS reads the teacher's anchors .* none at the strides \[16\]"):
        make(FRS, spec("dense", {8: 2, 16: 2}), spec_of({8: 2, 16: 2}, cell_anchors={8: torch.zeros(1, 4)}, provides=other.provides), class_weight=0.0)  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
def test_objectness_of_an_rpn(
    tiny_detector: Callable, make_inputs: Callable, event_storage: object, training: bool
) -> None:
    """Check that objectness, also with detection losses, equals what the RPN computes from the features, by anchor."""
    model: nn.Module = tiny_detector("faster").train(training)
    adapter, inputs = build_adapter(model), make_inputs()
    assert "objectness" in adapter.spec.provides
    targets = [x["instances"] for x in inputs]
    calls = []
    model.proposal_generator.rpn_head.register_forward_hook(lambda *_: calls.append(1))
    for targets_or_none in (targets, None) if training else (None,):
        calls.clear()
        found = adapter.run(inputs, frozenset({"features", "objectness"}), targets_or_none)
        assert len(calls) == 1
        maps, _ = model.proposal_generator.rpn_head([found.features[stride] for stride in found.objectness])
        for (stride, logits), expected in zip(found.objectness.items(), maps, strict=True):
            A, H, W = expected.shape[1:]
            assert logits.shape == (len(inputs), A * H * W, 1) and found.features[stride].shape[-2:] == (H, W)
            torch.testing.assert_close(logits.view(-1, H, W, A), expected.permute(0, 2, 3, 1))
    assert adapter.run(inputs, frozenset({"features"}), targets).objectness is None


def test_no_objectness_of_an_rpn_with_its_own_forward_pass(tiny_detector: Callable) -> None:
    class OwnRPN(RPN):
        def forward(self, images, features, gt_instances=None):
            raise NotImplementedError

    model = tiny_detector("faster")
    model.proposal_generator.__class__ = OwnRPN
    assert {"anchors", "objectness"} & build_adapter(model).spec.provides == {"anchors"}
