"""DKD, DIST and soft labels on R-CNN box heads, DIST on dense heads: reference numbers, formulas, proposals."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd_d2 import KDMetaArch, Teacher, UserError
from kd_d2.adapters import DensePredictions, DetectorOutputs, SampledProposals, build_adapter
from kd_d2.adapters.rcnn import box_predictors
from kd_d2.distillers import DIST, DISTILLER_REGISTRY, DKD, Distiller, SoftLabel
from kd_d2.losses import decoupled_loss, dist_loss, softmax_divergence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from helpers import configured, make, scaled, spec_of
from torch import Tensor, nn

pytestmark = pytest.mark.unit

FIXTURES = Path(__file__).parent / "fixtures" / "methods"
"""Results of public code: `dkd_loss` of megvii-research/mdistiller, and the detection code of DIST's authors."""
METHODS = {"DKD": DKD, "DIST": DIST, "SOFT_LABEL": SoftLabel}
RCNNS = ("faster", "mask", "cascade")
RCNN = spec_of({}, "two-stage", provides=frozenset({"proposals"}))


@pytest.fixture
def stored() -> Callable[[str, str], Tensor]:
    """Return a function (file, entry) that loads a stored array."""

    def read(file: str, entry: str) -> Tensor:
        with np.load(FIXTURES / f"{file}.npz") as arrays:
            return torch.from_numpy(arrays[entry])

    return read


def _assert_stored(found: Tensor, expected: Tensor) -> None:
    """Assert equality within 1e-5 of each value plus 1e-5 of the largest."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("temperature", [1, 4])
def test_decoupled_loss_is_the_authors(stored: Callable, temperature: int) -> None:
    """Check both parts, the weighted sum and its gradient."""
    student, teacher = stored("dkd", "student").requires_grad_(), stored("dkd", "teacher")
    labels, of = stored("dkd", "labels").long(), f"T{temperature}."
    for weights, entry in (((1.0, 0.0), "tckd"), ((0.0, 1.0), "nckd")):
        _assert_stored(
            decoupled_loss(student, teacher, labels, *weights, temperature=temperature), stored("dkd", of + entry)
        )
    loss = decoupled_loss(student, teacher, labels, temperature=temperature)
    _assert_stored(loss, stored("dkd", of + "weighted_total"))
    loss.backward()
    _assert_stored(student.grad, stored("dkd", of + "grad_student"))


def _rows(maps: Tensor) -> Tensor:
    return maps.sigmoid().permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


@pytest.mark.parametrize("case", [8, 16, 32, "rois"])
def test_dist_loss_is_the_authors(stored: Callable, case: int | str) -> None:
    """Check both correlations, their sum and its gradient: sigmoid on three levels, softmax on proposals."""
    names = ("rois.{}", lambda x: x.softmax(1)) if case == "rois" else ("{}." + str(case), _rows)
    entry, probabilities = names
    student = stored("dist", entry.format("student")).requires_grad_()
    teacher = probabilities(stored("dist", entry.format("teacher")))
    for weights, part in (((1.0, 0.0), "inter"), ((0.0, 1.0), "intra")):
        _assert_stored(dist_loss(probabilities(student), teacher, *weights), stored("dist", entry.format(part)))
    loss = dist_loss(probabilities(student), teacher)
    _assert_stored(loss, stored("dist", entry.format("loss")))
    loss.backward()
    _assert_stored(student.grad, stored("dist", entry.format("grad_student")))


def _dense_outputs(maps: dict[int, Tensor], num_classes: int) -> DetectorOutputs:
    """Return outputs with logits in the layout of heads: (B, A * K, H, W) to (B, HWA, K)."""
    logits = {
        stride: x.unflatten(1, (-1, num_classes)).permute(0, 3, 4, 1, 2).flatten(1, 3) for stride, x in maps.items()
    }
    dense = DensePredictions(logits, box_regression={}, anchors={}, decode=lambda r, a: r)
    return DetectorOutputs(images=None, features=maps, dense=dense)


def test_dist_of_a_dense_head_is_the_authors(stored: Callable) -> None:
    """Check the sum over three levels with two anchors per position, times the weight."""
    strides = stored("dist", "strides").tolist()
    student = {s: stored("dist", f"student.{s}").requires_grad_() for s in strides}
    teacher = {s: stored("dist", f"teacher.{s}") for s in strides}
    outputs = [_dense_outputs(maps, int(stored("dist", "classes"))) for maps in (student, teacher)]
    (loss,) = scaled(make(DIST, spec_of({}, provides=frozenset({"dense"})), weight=2.0), *outputs, []).values()
    _assert_stored(loss, 2 * sum(stored("dist", f"loss.{s}") for s in strides))
    loss.backward()
    for stride, maps in student.items():
        _assert_stored(maps.grad, 2 * stored("dist", f"grad_student.{stride}"))


def test_dist_of_one_class_and_one_anchor() -> None:
    """Check GAMMA's term alone, with its correlation of 1/2, and the error without it; three anchors have both terms."""
    spec = spec_of({}, provides=frozenset({"dense"}), num_classes=1)
    student, teacher = (torch.tensor([x]).logit().view(1, 1, 1, 3) for x in ([0.1, 0.2, 0.3], [0.1, 0.3, 0.2]))
    outputs = [_dense_outputs({8: maps}, 1) for maps in (student, teacher)]
    assert make(DIST, spec, gamma=3.0)(*outputs, [])["loss_dist"].item() == pytest.approx(3 * (1 - 0.5))
    one, two, three = (
        dataclasses.replace(spec, cell_anchors={8: torch.tensor([[-4.0, -4.0, 4.0, 4.0]] * n)}) for n in (1, 2, 3)
    )
    box_head = spec_of({}, provides=frozenset({"proposals"}), num_classes=1)
    for few in (spec, one, two, box_head, dataclasses.replace(spec, num_classes=2)):
        with pytest.raises(UserError, match=r"GAMMA is 0, and the student \(Pupil\) has too few classes: BETA's"):
            make(DIST, few, gamma=0.0)
    for enough in (three, dataclasses.replace(box_head, num_classes=2), dataclasses.replace(spec, num_classes=3)):
        assert make(DIST, enough, gamma=0.0).loss.keywords["beta"] == 1.0


def test_dkd_of_one_class() -> None:
    """Check the error for BETA's term alone, which is 0 with one other class."""
    spec = spec_of({}, provides=frozenset({"proposals"}), num_classes=1)
    with pytest.raises(UserError, match=r"ALPHA is 0, and the student \(Pupil\) has one class"):
        make(DKD, spec, alpha=0.0)
    make(DKD, spec)


def test_decoupled_loss_by_hand() -> None:
    """Check (1/2, 1/4, 1/4) against uniform for label 0: (1/2, 1/2) against (1/3, 2/3); the rest is halves in both."""
    student, teacher = torch.zeros(1, 3), torch.tensor([[math.log(2), 0.0, 0.0]])
    target = 0.5 * math.log(0.5 / (1 / 3)) + 0.5 * math.log(0.5 / (2 / 3))
    labels = torch.tensor([0])
    assert decoupled_loss(student, teacher, labels, 1.0, 0.0).item() == pytest.approx(target, rel=1e-5)
    assert decoupled_loss(student, teacher, labels, 0.0, 1.0).item() == pytest.approx(0, abs=1e-6)
    other = 2 / 3 * math.log(2 / 3 / 0.5) + 1 / 3 * math.log(1 / 3 / 0.5)  # label 1: two thirds and a third of the rest
    assert decoupled_loss(student, teacher, torch.tensor([1]), 0.0, 2.0).item() == pytest.approx(2 * other, rel=1e-5)
    assert decoupled_loss(student, teacher, labels, 1.0, 0.0, num_proposals=4).item() == pytest.approx(target / 4)


def test_gradients_are_the_numerical_ones_and_the_students_alone() -> None:
    """Check all three losses in double precision."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 3, 3, 1, 2, 3])
    losses = (
        lambda s, t: decoupled_loss(s, t, labels, 0.7, 0.4, temperature=2.0),
        lambda s, t: dist_loss(s.softmax(1), t.softmax(1), 0.3, 0.8),
        lambda s, t: softmax_divergence(s, t, 3.0).sum(),
    )
    for loss in losses:
        assert torch.autograd.gradcheck(lambda s, f=loss: f(s, teacher), [student.clone().requires_grad_()])
        given = teacher.clone().requires_grad_()
        loss(student.clone().requires_grad_(), given).backward()
        assert given.grad is None


def test_softmax_divergence_is_torchs() -> None:
    """Check the temperature and its squared factor against torch's divergence."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 7, generator=generator)
    expected = F.kl_div((student / 4).log_softmax(-1), (teacher / 4).softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(softmax_divergence(student, teacher, 4.0), 16 * expected)


def test_what_does_not_vary_has_no_correlation() -> None:
    """Check constant rows and columns, a single row, no rows, and a head with one class, without other classes."""
    torch.manual_seed(0)
    constant = torch.full((4, 3), 0.2)
    for student, teacher in (
        (constant, torch.rand(4, 3)),
        (torch.rand(4, 3), constant),
        (torch.rand(1, 3), torch.rand(1, 3)),
        (torch.rand(4, 1), torch.rand(4, 1)),
        (torch.rand(0, 3), torch.rand(0, 3)),
    ):
        student = student.clone().requires_grad_()
        loss = dist_loss(student, teacher)
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all() and student.grad.abs().sum() < 10
    for shape in ((0, 3), (2, 2)):
        logits = torch.rand(shape, requires_grad=True)
        loss = decoupled_loss(logits, torch.rand(shape), torch.zeros(shape[0], dtype=torch.int64))
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("logit", [-4.5625, -4.625, 0.3])
def test_a_constant_whose_mean_is_rounded_has_no_gradient(logit: float) -> None:
    student = torch.full((4608, 80), logit).sigmoid().requires_grad_()
    dist_loss(student, torch.rand(4608, 80, generator=torch.Generator().manual_seed(0))).backward()
    assert not student.grad.any()


def test_dist_of_a_batch_on_two_ranks() -> None:
    """Check that ranks with three and with one proposal, simulated in turn, get the whole batch's loss and gradient."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.rand(2, 4, 3, generator=generator, dtype=torch.float64)
    whole = dist_loss(student.requires_grad_(), teacher)
    (expected,) = torch.autograd.grad(whole, student)
    known: list[Tensor] = []

    def run(part: slice) -> tuple[Tensor, list[Tensor]]:
        """Return the loss and the rank's values of all sums, with known sums of both ranks in their place."""
        own: list[Tensor] = []

        def total(value: Tensor) -> Tensor:
            own.append(value.detach().clone())
            return value + (known[len(own) - 1] - value.detach()) if len(own) <= len(known) else value

        return dist_loss(student[part], teacher[part], total=total), own

    ranks = slice(0, 3), slice(3, 4)
    for number in range(3):  # the rows' distances, then the columns' means and deviations
        known.append(sum(run(part)[1][number] for part in ranks))
    for part in ranks:
        loss, own = run(part)
        assert len(own) == 3
        torch.testing.assert_close(loss, whole)
        torch.testing.assert_close(torch.autograd.grad(loss, student)[0][part], expected[part])


def test_dist_of_half_precision_has_the_gradients_of_float32() -> None:
    """Check logits of a new dense head, most rows and columns of which are constant after rounding to bfloat16."""
    torch.manual_seed(0)
    logits, teacher = torch.randn(200, 20) * 5e-3 - 4.6, torch.randn(200, 20).sigmoid()
    gradients = []
    for student in (logits, logits.bfloat16().float()):
        student.requires_grad_()
        dist_loss(student.sigmoid(), teacher).backward()
        gradients.append(student.grad.norm().item())
    assert gradients[1] < 2 * gradients[0]


# --------------------------------------------------------------------------------------------------- detectors


def _head_weights(model: nn.Module) -> nn.Module:
    """Initialize class scores that differ, since Detectron2's initial weights give nearly equal ones."""
    for module in model.roi_heads.modules():
        if hasattr(module, "cls_score"):
            nn.init.normal_(module.cls_score.weight, std=0.3)
    return model


@pytest.fixture
def rcnn(tiny_detector: Callable) -> Callable[..., nn.Module]:
    """Return a function (kind, overrides, seed) that builds an R-CNN with 3 classes."""
    return lambda kind, overrides=None, seed=0: _head_weights(tiny_detector(kind, overrides, seed))


@pytest.mark.parametrize("kind", RCNNS)
@pytest.mark.parametrize("on_predicted", [False, True])
def test_the_students_proposals_are_those_of_its_own_loss(
    rcnn: Callable, make_inputs: Callable, event_storage: EventStorage, kind: str, on_predicted: bool
) -> None:
    """Check that logits and labels give the class loss, that the head reproduces the logits, and that it runs once."""
    keys = {"MODEL": {"ROI_BOX_HEAD": {"TRAIN_ON_PRED_BOXES": on_predicted}}}
    model = rcnn(kind, {} if kind == "cascade" else keys)
    adapter, inputs = build_adapter(model), make_inputs(masks=True)
    predictor = box_predictors(model.roi_heads)[0]
    calls: list[None] = []
    predictor.register_forward_hook(lambda *_: calls.append(None))
    outputs = adapter.run(inputs, frozenset({"proposals"}), [x["instances"] for x in inputs])
    assert len(calls) == 1
    proposals = outputs.proposals
    name = "loss_cls_stage0" if kind == "cascade" else "loss_cls"
    torch.testing.assert_close(F.cross_entropy(proposals.logits, proposals.labels), outputs.losses[name])
    assert proposals.logits.requires_grad
    assert (proposals.labels < 3).any() and (proposals.labels == 3).any()
    assert sum(map(len, proposals.boxes)) == len(proposals.labels) == 32
    again = outputs.classify(proposals.boxes)
    torch.testing.assert_close(again, proposals.logits)
    assert not again.requires_grad


def test_nothing_is_recorded_unless_asked(rcnn: Callable, make_inputs: Callable, event_storage: EventStorage) -> None:
    """Check that there are no proposals without a request, and that no hooks remain after one."""
    model, inputs = rcnn("faster"), make_inputs()
    targets = [x["instances"] for x in inputs]
    for want, is_there in ((frozenset({"features"}), False), (frozenset({"proposals"}), True)):
        outputs = build_adapter(model).run(inputs, want, targets)
        assert (outputs.proposals is not None, outputs.classify is not None) == (is_there, is_there)
    assert not model.roi_heads.box_pooler._forward_pre_hooks and not model.roi_heads.box_predictor._forward_hooks


def test_proposals_of_a_student_in_eval_mode(
    rcnn: Callable, make_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check labeled proposals with gradients in eval mode, as used for loss maps."""
    model, inputs = rcnn("faster").eval(), make_inputs()
    outputs = build_adapter(model).run(inputs, frozenset({"proposals"}), [x["instances"] for x in inputs])
    assert not outputs.losses and outputs.proposals.logits.requires_grad
    torch.testing.assert_close(outputs.classify(outputs.proposals.boxes), outputs.proposals.logits)


@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_the_teacher_classifies_once_for_all_methods(
    rcnn: Callable, tiny_cfg: Callable, make_inputs: Callable, event_storage: EventStorage, kind: str
) -> None:
    """Check one pass of the teacher's (first) box head per iteration, at the student's boxes; it is unchanged."""
    teacher = Teacher(rcnn(kind, seed=1))
    before = copy.deepcopy(teacher.model.state_dict())
    student = rcnn("faster")
    specs = build_adapter(student).spec, teacher.spec
    distillers = {m.__name__: configured(m, tiny_cfg("faster"), *specs) for m in METHODS.values()}
    model = KDMetaArch(student=student, teacher=teacher, distillers=distillers)
    calls: list[Tensor] = []
    given: list[tuple] = []
    box_predictors(teacher.model.roi_heads)[0].register_forward_hook(lambda _, args, out: calls.append(out[0]))
    distillers["DKD"].register_forward_pre_hook(lambda _, args: given.append(args))
    for iteration in range(2):
        losses = model(make_inputs(seed=iteration))
        assert len(calls) == iteration + 1
    ours, theirs, _ = given[-1]
    sum(losses[name] for d in distillers.values() for name in d.loss_names).backward()
    assert (
        student.backbone.fpn_output2.weight.grad.any() and student.roi_heads.box_predictor.cls_score.weight.grad.any()
    )
    assert all(p.grad is None for p in teacher.model.parameters()) and not calls[-1].requires_grad
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    heads = teacher.model.roi_heads
    features = [level for stride, level in theirs.features.items() if stride <= 32]
    box_head, predictor = (x[0] if kind == "cascade" else x for x in (heads.box_head, heads.box_predictor))
    expected = predictor(box_head(heads.box_pooler(features, ours.proposals.boxes)))[0]
    assert torch.equal(theirs.logits_at(ours.proposals), expected)
    assert losses["loss_dkd"].item() == pytest.approx(
        decoupled_loss(ours.proposals.logits, expected, ours.proposals.labels).item(), rel=1e-5
    )


@pytest.mark.parametrize("counts", [(3, 2), (0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize("kind", RCNNS)
def test_a_step_of_all_three(
    rcnn: Callable, tiny_cfg: Callable, make_inputs: Callable, event_storage: EventStorage, counts: tuple, kind: str
) -> None:
    """Check positive losses and finite gradients, including images without objects."""
    student, teacher = rcnn(kind), Teacher(rcnn(kind, seed=1))
    specs = build_adapter(student).spec, teacher.spec
    distillers = {m.__name__: configured(m, tiny_cfg(kind), *specs) for m in METHODS.values()}
    losses = KDMetaArch(student=student, teacher=teacher, distillers=distillers)(make_inputs(counts=counts, masks=True))
    sum(losses.values()).backward()
    assert all(losses[n].isfinite() and losses[n] > 0 for d in distillers.values() for n in d.loss_names)
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


def test_equal_detectors_agree(
    tiny_detector: Callable, tiny_cfg: Callable, make_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check that every loss is zero between a detector and its copy."""
    student = tiny_detector("faster").eval()
    teacher = Teacher(copy.deepcopy(student))
    specs = build_adapter(student).spec, teacher.spec
    distillers = {m.__name__: configured(m, tiny_cfg("faster"), *specs) for m in METHODS.values()}
    model = KDMetaArch(student=student, teacher=teacher, distillers=distillers)
    model.training = True  # batch norms stay in eval mode
    losses = model(make_inputs())
    assert [losses[n].item() for d in distillers.values() for n in d.loss_names] == pytest.approx([0.0] * 3, abs=1e-5)


def _proposal_outputs(
    logits: Tensor, teacher_logits: Tensor, labels: list[int]
) -> tuple[DetectorOutputs, DetectorOutputs]:
    student = DetectorOutputs(images=None, features={}, proposals=SampledProposals([], logits, torch.tensor(labels)))
    return student, DetectorOutputs(images=None, features={}, classify=lambda boxes: teacher_logits)


def test_soft_labels_of_proposals_by_hand() -> None:
    """Check two proposals, one of them equal: half the divergence of (3/4, 1/4) from (1/2, 1/2), times T squared."""
    student = torch.zeros(2, 2, requires_grad=True)
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    for temperature in (1.0, 2.0):
        teacher = torch.tensor([[temperature * math.log(3), 0.0], [0.0, 0.0]])
        outputs = _proposal_outputs(student, teacher, [0, 1])
        soft = make(SoftLabel, RCNN, weight=6.0, temperature=temperature)
        loss = scaled(soft, *outputs, [])["loss_soft_label"]
        assert loss.item() == pytest.approx(temperature**2 * 6 * divergence / 2, rel=1e-5)


@pytest.mark.parametrize("method", METHODS.values())
def test_box_head_losses_are_float32_under_autocast(method: type[Distiller]) -> None:
    """Check that the loss of nearly equal bfloat16 logits is that of their float32 copies."""
    method = make(method, RCNN)
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 4, generator=generator).bfloat16()
    teacher = student + (0.05 * torch.randn(6, 4, generator=generator)).bfloat16()
    labels = [0, 1, 2, 3, 3, 3]
    (expected,) = method(*_proposal_outputs(student.float(), teacher.float(), labels), []).values()
    with torch.autocast("cpu", torch.bfloat16):
        (loss,) = method(*_proposal_outputs(student, teacher, labels), []).values()
    assert loss.dtype == torch.float32 and loss.item() == expected.item() > 0


# ---------------------------------------------------------------------------------------------- valid pairs and keys


@pytest.fixture
def build(tiny_cfg: Callable, tiny_detector: Callable) -> Callable[..., Distiller]:
    """Return a function (node, kind, keys) that builds a distiller for two detectors of that kind."""

    def build(node: str, kind: str = "faster", **keys: Any) -> Distiller:
        cfg = tiny_cfg(kind, {"MODEL": {"KD": {node: keys}}})
        return configured(METHODS[node], cfg, *(build_adapter(tiny_detector(kind)).spec for _ in range(2)))

    return build


def test_defaults_are_the_authors(build: Callable) -> None:
    """Check DKD's weights for detectors, and that all other values are 1."""
    dkd, dist, soft = (build(node) for node in METHODS)
    assert (dkd.weight, dkd.config.alpha, dkd.config.beta, dkd.config.temperature) == (1.0, 1.0, 0.25, 1.0)
    assert (dist.weight, dist.config.beta, dist.config.gamma) == (1, 1, 1)
    assert (soft.weight, soft.config.temperature) == (1.0, 1.0)


def test_keys_reach_the_losses(build: Callable) -> None:
    """Check every key of DKD and DIST against the loss functions."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, generator=generator)
    outputs = _proposal_outputs(student, teacher, [0, 1, 2, 3, 3])
    labels = outputs[0].proposals.labels
    dkd = scaled(build("DKD", WEIGHT=2.0, ALPHA=3.0, BETA=0.5, TEMPERATURE=4.0), *outputs, [])["loss_dkd"]
    torch.testing.assert_close(dkd, 2 * decoupled_loss(student, teacher, labels, 3.0, 0.5, 4.0))
    dist = scaled(build("DIST", WEIGHT=2.0, BETA=3.0, GAMMA=0.5), *outputs, [])["loss_dist"]
    torch.testing.assert_close(dist, 2 * dist_loss(student.softmax(1), teacher.softmax(1), 3.0, 0.5))


@pytest.mark.parametrize("node", ["DIST", "SOFT_LABEL"])
def test_what_is_read_follows_from_the_student(build: Callable, node: str) -> None:
    """Check that dense students need dense predictions, and R-CNNs need proposals."""
    assert build(node).needs == {"proposals"} == build(node).needs_of_teacher
    assert build(node, "retinanet").needs == METHODS[node].needs >= {"dense"}


@pytest.mark.parametrize(
    ("method", "student", "teacher", "sentence"),
    [
        ("DKD", "retinanet", "faster", r"DKD needs a box head that classifies proposals by softmax \(in standard ROI heads\), which the student \(RetinaNet\) does"),
        ("DKD", "faster", "retinanet", r"DKD needs a box head that classifies .* which the teacher \(RetinaNet\) does not have\."),
        ("DKD", "panoptic", "faster", r"which the student \(PanopticFPN\) does not have: it has no adapter .*, and BackboneAdapter reads only its backbone\."),
        ("DIST", "faster", "retinanet", r"DIST needs a box head that classifies .* which the teacher \(RetinaNet\) does not"),
        ("DIST", "retinanet", "faster", r"DIST needs dense predictions, which the teacher \(GeneralizedRCNN\) does not have\."),
        ("SoftLabel", "panoptic", "panoptic", r"SoftLabel needs dense predictions or a box head that classifies proposals by softmax \(in standard ROI heads\), neither of which the student \(PanopticFPN\) has: it has no adapter of its own"),
        ("DIST", "panoptic", "faster", r"DIST needs dense predictions or a box head .*, neither of which the student \(PanopticFPN\) has: it has no adapter of its own"),
    ],
)  # fmt: skip
def test_pairs_that_cannot_are_told_in_a_sentence(
    tiny_detector: Callable, tiny_cfg: Callable, method: str, student: str, teacher: str, sentence: str
) -> None:
    """Check that the error names the method, the part and the detector."""
    student, teacher = tiny_detector(student), Teacher(tiny_detector(teacher))
    specs = build_adapter(student).spec, teacher.spec
    with pytest.raises(UserError, match=sentence):
        distillers = {method: configured(DISTILLER_REGISTRY.get(method), tiny_cfg("faster"), *specs)}
        KDMetaArch(student=student, teacher=teacher, distillers=distillers)


def test_box_heads_that_train_otherwise_are_not_read(tiny_detector: Callable) -> None:
    """Check ROI heads that override the training pass, whose proposals are unknown."""
    model = tiny_detector("faster")
    heads = model.roi_heads
    heads.__class__ = type("OtherHeads", (type(heads),), {"_forward_box": lambda self, features, proposals: {}})
    assert "proposals" not in build_adapter(model).spec.provides


def test_box_heads_of_sigmoids_have_no_softmax(tiny_detector: Callable) -> None:
    """Check that only softmax heads provide proposals."""
    keys = {"MODEL": {"ROI_BOX_HEAD": {"USE_SIGMOID_CE": True}}}
    assert "proposals" in build_adapter(tiny_detector("cascade")).spec.provides
    assert "proposals" not in build_adapter(tiny_detector("faster", keys)).spec.provides


@pytest.mark.parametrize(
    ("node", "key", "value"),
    [
        ("DKD", "ALPHA", -1.0),
        ("DKD", "BETA", float("nan")),
        ("DKD", "TEMPERATURE", 0.0),
        ("DIST", "BETA", -0.5),
        ("DIST", "GAMMA", float("inf")),
        ("SOFT_LABEL", "LOSS", "quality_focal"),
        ("SOFT_LABEL", "FOCUS", 1.0),
        ("SOFT_LABEL", "ANCHORS", "positives"),
    ],
)
def test_wrong_values_name_their_key(build: Callable, node: str, key: str, value: object) -> None:
    """Check that the error names the key and the value; those of SOFT_LABEL are for dense heads only."""
    with pytest.raises(UserError, match=rf"MODEL\.KD\.{node}\.{key} is {value!r}"):
        build(node, **{key: value})
