"""Adapters: unchanged detection losses, and outputs that agree with Detectron2's own modules."""

from __future__ import annotations

import copy
from collections.abc import Callable

from kd_d2.adapters import (
    BACKGROUND,
    IGNORED,
    ATSSAdapter,
    BackboneAdapter,
    DenseDetectorAdapter,
    DensePredictions,
    FCOSAdapter,
    FSAFAdapter,
    GFLAdapter,
    RCNNAdapter,
    RetinaNetAdapter,
    SingleAnchorAdapter,
    build_adapter,
    dense,
    rcnn,
)
from kd_d2.adapters.dense import labels_and_boxes
from kd_d2.errors import UserError
from kd_d2.modeling.assignment import assign_by_iou

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_backbone
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import GeneralizedRCNN, PanopticFPN, RetinaNet
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

pytestmark = pytest.mark.unit

NOTHING: frozenset[str] = frozenset()
EVERYTHING = frozenset({"features", "anchors", "dense", "losses", "targets"})
TOWERS = frozenset({"towers", "towers/0", "towers/1"})
"""What heads with one convolution per tower provide."""


def _targets(inputs: list[dict]) -> list[Instances]:
    return [x["instances"] for x in inputs]


def _count_calls(module: nn.Module) -> list[None]:
    """Return a list that grows by one with each call of the module."""
    calls: list[None] = []
    module.register_forward_hook(lambda *_: calls.append(None))
    return calls


def _count_anchors(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Return a list that grows by one whenever an adapter generates anchors."""
    calls: list[None] = []
    for module in (dense, rcnn):
        make = module.grid_anchors
        monkeypatch.setattr(module, "grid_anchors", lambda *args, make=make: calls.append(None) or make(*args))
    return calls


def _assert_own_losses(model: nn.Module, batches: list[list[dict]], want: frozenset[str] = EVERYTHING) -> None:
    """Assert that losses, gradients and buffers equal those of the model's own forward pass over the batches."""
    reference = copy.deepcopy(model)
    adapter = build_adapter(model)
    for batch in batches:
        torch.manual_seed(7)
        expected = reference(batch)
        torch.manual_seed(7)
        losses = adapter.run(batch, want, _targets(batch)).losses
        assert losses.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(
                losses[name], expected[name], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
            )
        sum(expected.values()).backward()
        sum(losses.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-5, atol=1e-6)
    for (name, buffer), other in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(buffer, other), name


@pytest.mark.parametrize("want", [NOTHING, EVERYTHING], ids=["nothing", "everything"])
def test_retinanet_losses_are_its_own(
    tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage, want: frozenset[str]
) -> None:
    """Check losses, gradients, buffers and the running normalizer over two batches with an image without objects."""
    model = tiny_detector("retinanet")
    reference = copy.deepcopy(model)
    batches = [make_inputs(), make_inputs(counts=(0, 4), seed=1)]
    _assert_own_losses(model, batches, want)
    for batch in batches:
        reference(batch)
    assert model.loss_normalizer == reference.loss_normalizer != 100


@pytest.mark.parametrize("box_loss", ["giou", "smooth_l1"])
def test_retinanet_losses_follow_its_config(
    tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage, box_loss: str
) -> None:
    overrides = {"MODEL": {"RETINANET": {"BBOX_REG_LOSS_TYPE": box_loss, "FOCAL_LOSS_GAMMA": 1.0}}}
    _assert_own_losses(tiny_detector("retinanet", overrides), [make_inputs()])


def test_levels_that_the_head_does_not_read_play_no_part(
    tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check a head on three of the neck's five levels: the spec has only these, and the losses are unchanged."""
    overrides = {
        "RETINANET": {"IN_FEATURES": ["p3", "p4", "p5"]},
        "ANCHOR_GENERATOR": {"SIZES": [[16], [32], [64]]},
    }
    model = tiny_detector("retinanet", {"MODEL": overrides})
    assert list(build_adapter(model).spec.shapes) == [8, 16, 32]
    _assert_own_losses(model, [make_inputs()])


ADAPTERS = {
    "fcos": FCOSAdapter,
    "atss": ATSSAdapter,
    "gfl": GFLAdapter,
    "fsaf": FSAFAdapter,
    "reppoints": SingleAnchorAdapter,
    "faster": RCNNAdapter,
    "mask": RCNNAdapter,
    "cascade": RCNNAdapter,
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_detectors_losses_are_their_own(
    tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage, kind: str
) -> None:
    """Check losses, gradients and buffers with the same random numbers; one image has no objects."""
    model = tiny_detector(kind)
    assert type(build_adapter(model)) is ADAPTERS[kind]
    _assert_own_losses(model, [make_inputs(masks=True), make_inputs(counts=(0, 4), seed=1, masks=True)])


def test_rcnn_with_given_proposals(tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage) -> None:
    """Check a Fast R-CNN: without an RPN it provides no anchors, and uses the proposals of the inputs."""
    overrides = {"MODEL": {"PROPOSAL_GENERATOR": {"NAME": "PrecomputedProposals"}}}
    model = tiny_detector("faster", overrides)
    batch = make_inputs()
    for item in batch:
        proposals = Instances(item["instances"].image_size)
        proposals.proposal_boxes = Boxes(torch.tensor([[4.0, 4.0, 40.0, 40.0], [8.0, 20.0, 60.0, 50.0]]))
        proposals.objectness_logits = torch.zeros(2)
        item["proposals"] = proposals
    spec = build_adapter(model).spec
    assert spec.provides == {"features", "detections", "losses", "targets", "proposals"}
    assert spec.cell_anchors is None
    _assert_own_losses(model, [batch], want=frozenset({"features"}))


def test_distributions_need_a_number_of_bins(tiny_detector: Callable) -> None:
    class WithoutBins(GFLAdapter):
        num_bins = None

    with pytest.raises(UserError, match=r"^WithoutBins provides distributions .* `num_bins`"):
        _ = WithoutBins(tiny_detector("gfl")).spec


def test_specs(tiny_detector: Callable) -> None:
    """Check what adapters report before the first forward pass."""
    dense = build_adapter(tiny_detector("retinanet")).spec
    assert (dense.name, dense.family, dense.num_classes) == ("RetinaNet", "one-stage", 3)
    assert dense.shapes == {s: ShapeSpec(channels=8, stride=s) for s in (8, 16, 32, 64, 128)}
    assert dense.provides == EVERYTHING | TOWERS | {"detections"}
    assert (dense.tower_channels, dense.num_bins) == ((8, 8), None)
    sides = {s: (a[:, 2:] - a[:, :2]).prod(1).sqrt() for s, a in dense.cell_anchors.items()}
    for (stride, side), expected in zip(sides.items(), (16, 32, 64, 128, 256), strict=True):
        assert expected == 2 * stride
        torch.testing.assert_close(side, torch.full((3,), float(expected)))

    rcnn = build_adapter(tiny_detector("cascade")).spec
    assert (rcnn.name, rcnn.family, rcnn.num_classes) == ("GeneralizedRCNN", "two-stage", 3)
    assert list(rcnn.shapes) == [4, 8, 16, 32, 64] == list(rcnn.cell_anchors)
    assert rcnn.provides == {"features", "anchors", "detections", "losses", "targets", "proposals", "objectness"}
    assert rcnn.tower_channels is None
    cascade = tiny_detector("cascade")
    cascade.roi_heads.box_predictor[0].test_score_thresh = 0.9  # of a stage whose scores are not thresholded
    assert build_adapter(cascade).spec.score_threshold == 0.05

    fcos = build_adapter(tiny_detector("fcos")).spec
    assert (fcos.name, fcos.family, fcos.num_classes) == ("FCOS", "one-stage", 3)
    assert list(fcos.shapes) == [8, 16, 32, 64, 128]
    with_quality = EVERYTHING | TOWERS | {"detections", "quality"}
    assert fcos.provides == with_quality | {"points"}
    assert build_adapter(tiny_detector("atss")).spec.provides == with_quality
    gfl = build_adapter(tiny_detector("gfl")).spec
    assert gfl.provides == EVERYTHING | TOWERS | {"detections", "distributions"}
    assert gfl.num_bins == 17
    assert build_adapter(tiny_detector("fsaf")).spec.provides == EVERYTHING | TOWERS | {"detections", "points"}
    reppoints = build_adapter(tiny_detector("reppoints")).spec
    assert (reppoints.provides, reppoints.tower_channels) == (EVERYTHING | {"detections"}, None)
    assert gfl.cell_anchors[16].tolist() == [[8 - 64, 8 - 64, 8 + 64, 8 + 64]]  # around the center of the first cell


@pytest.mark.parametrize("kind", ["fcos", "gfl", "reppoints", "retinanet"])
def test_dense_boxes_are_float32_under_autocast(kind: str, tiny_detector: Callable) -> None:
    """Check that half-precision head outputs do not round the positions of anchors far from the origin."""
    model = tiny_detector(kind)
    decode = build_adapter(model)._decode
    anchors = Boxes(torch.tensor([[1001.0, 1003.0, 1065.0, 1067.0]]))
    dims = {"gfl": 4 * 17, "reppoints": 18}.get(kind, 4)
    half = torch.randn(2, 1, dims, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        boxes = decode(half, anchors)
    assert boxes.dtype == torch.float32
    torch.testing.assert_close(boxes, decode(half.float(), anchors))


def test_losses_of_detectron2s_fcos_are_float32_under_autocast(
    tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check the class of LazyConfigs, whose own losses fail, against kd_d2's of equal weights."""
    ours, theirs = tiny_detector("fcos"), tiny_detector("fcos")
    theirs.__class__ = FCOS
    batch = make_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (build_adapter(model).run(batch, NOTHING, _targets(batch)).losses for model in (ours, theirs))
    assert found == expected and all(loss.dtype == torch.float32 and loss > 0 for loss in found.values())


@pytest.mark.parametrize("kind", ["retinanet", "faster"])
def test_features_by_stride_are_the_backbones(tiny_detector: Callable, make_inputs: Callable, kind: str) -> None:
    """Check that each level has its own stride and the values that the detector's backbone computes."""
    model = tiny_detector(kind).eval()
    batch = make_inputs()
    with torch.no_grad():
        outputs = build_adapter(model).run(batch, frozenset({"features"}))
        images = model.preprocess_image(batch)
        named = model.backbone(images.tensor)
    assert torch.equal(outputs.images.tensor, images.tensor)
    assert outputs.images.image_sizes == [(64, 80), (56, 96)]
    assert list(outputs.features) == sorted(outputs.features)
    for stride, feature in outputs.features.items():
        assert torch.equal(feature, named[f"p{stride.bit_length() - 1}"])
        assert feature.shape[-2:] == tuple(-(-side // stride) for side in images.tensor.shape[-2:])


def test_retinanet_dense_predictions_are_the_heads(
    tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check logits, box regression, probabilities, anchors and boxes of each level against the detector's own."""
    model = tiny_detector("retinanet").eval()
    nn.init.normal_(model.head.cls_score.weight, std=0.5)
    nn.init.normal_(model.head.bbox_pred.weight, std=0.1)
    batch = make_inputs()
    with torch.no_grad():
        dense = build_adapter(model).run(batch, frozenset({"dense"})).dense
        features = list(model.backbone(model.preprocess_image(batch).tensor).values())
        logits, deltas = model._transpose_dense_predictions(model.head(features), [3, 4])
        anchors = model.anchor_generator(features)
    for level, stride in enumerate((8, 16, 32, 64, 128)):
        assert torch.equal(dense.logits[stride], logits[level])
        assert torch.equal(dense.box_regression[stride], deltas[level])
        assert torch.equal(dense.anchors[stride].tensor, anchors[level].tensor)
        torch.testing.assert_close(dense.probabilities[stride], 1 / (1 + torch.exp(-logits[level])))
        torch.testing.assert_close(dense.ranking_scores[stride], dense.probabilities[stride])
        for image in range(2):
            boxes = model.box2box_transform.apply_deltas(deltas[level][image], anchors[level].tensor)
            torch.testing.assert_close(dense.boxes[stride][image], boxes, rtol=1e-6, atol=1e-5)
            assert not torch.allclose(boxes, anchors[level].tensor, atol=0.1)
    with pytest.raises(RuntimeError, match="label assignment requested from a forward pass without targets"):
        dense.assignment  # noqa: B018


def test_ranking_scores_with_quality() -> None:
    """Check sqrt(class probability * quality) by hand: sqrt(1/2 * 1/8) = 1/4."""
    dense = DensePredictions(
        logits={8: torch.zeros(1, 1, 2)},
        box_regression={},
        anchors={},
        decode=lambda deltas, anchors: deltas,
        quality={8: torch.tensor([[[1.0 / 7.0]]]).log()},
    )
    torch.testing.assert_close(dense.ranking_scores[8], torch.full((1, 1, 2), 0.25))


def _random_targets(generator: torch.Generator, counts: tuple[int, ...]) -> list[Instances]:
    targets = []
    for count in counts:
        target = Instances((96, 128))
        corners = torch.rand(count, 2, generator=generator) * torch.tensor([80.0, 60.0])
        extent = 6 + torch.rand(count, 2, generator=generator) * 60
        target.gt_boxes = Boxes(torch.cat([corners, corners + extent], 1))
        target.gt_classes = torch.randint(0, 3, (count,), generator=generator)
        targets.append(target)
    return targets


def test_assignment_equals_label_anchors(tiny_detector: Callable) -> None:
    """Check classes, background, ignored anchors and matched boxes for random boxes and images without boxes."""
    model = tiny_detector("retinanet")
    anchors = model.anchor_generator([torch.zeros(1, 8, -(-96 // s), 128 // s) for s in (8, 16, 32, 64, 128)])
    generator = torch.Generator().manual_seed(0)
    seen: dict[str, int] = dict.fromkeys(("foreground", "background", "ignored"), 0)
    for counts in [(3, 0, 6), (1, 12, 0), (0, 0, 2), (20, 5, 1)]:
        targets = _random_targets(generator, counts)
        expected_labels, expected_boxes = model.label_anchors(anchors, targets)
        assignment = build_adapter(model).assign(anchors, [], targets)
        assert assignment.shape == (3, len(Boxes.cat(anchors)))
        labels, boxes = labels_and_boxes(assignment, targets, model.num_classes)
        for image in range(3):
            assert torch.equal(labels[image], expected_labels[image])
            foreground = assignment[image] >= 0
            assert torch.equal(boxes[image][foreground], expected_boxes[image][foreground])
            assert torch.equal(assignment[image] == IGNORED, labels[image] == -1)
            assert torch.equal(assignment[image] == BACKGROUND, labels[image] == model.num_classes)
            if counts[image] and foreground.any():
                best = pairwise_iou(targets[image].gt_boxes, Boxes.cat(anchors)).argmax(0)
                assert torch.equal(assignment[image][foreground], best[foreground])
            seen["foreground"] += int(foreground.sum())
            seen["background"] += int((assignment[image] == BACKGROUND).sum())
            seen["ignored"] += int((assignment[image] == IGNORED).sum())
    assert min(seen.values()) > 20, seen


def test_assignment_of_an_image_without_objects_is_background() -> None:
    """Check that nothing is ignored or matched, even if the matcher's lowest label is "ignored"."""
    matcher = Matcher([0.1], [-1, 1])
    assert assign_by_iou(torch.zeros(0, 1), matcher).tolist() == [BACKGROUND]


@pytest.mark.parametrize("allow_low_quality_matches", [True, False])
@pytest.mark.parametrize(("thresholds", "labels"), [([0.4, 0.5], [0, -1, 1]), ([0.2, 0.4, 0.8], [-1, 0, -1, 1])])
def test_assignment_is_the_matchers(thresholds: list, labels: list, allow_low_quality_matches: bool) -> None:
    """Check IoUs with many ties, including at the thresholds, and boxes that no anchor overlaps."""
    overlap = torch.randint(0, 11, (6, 40), generator=torch.Generator().manual_seed(0)) / 10
    overlap[2], overlap[:, :4] = 0, 0
    matcher = Matcher(thresholds, labels, allow_low_quality_matches)
    for rows in (overlap, overlap[:1], overlap / 3):
        index, label = matcher(rows)
        expected = index.masked_fill(label == 0, BACKGROUND).masked_fill(label == -1, IGNORED)
        assert torch.equal(assign_by_iou(rows, matcher), expected)


def test_run_gives_the_assignment_of_its_own_loss(
    tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check that `dense.assignment` in training matches the boxes of the batch, with levels in order of stride."""
    model = tiny_detector("retinanet")
    batch = make_inputs(counts=(3, 0))
    outputs = build_adapter(model).run(batch, frozenset({"dense"}), _targets(batch))
    labels, _ = model.label_anchors(list(outputs.anchors.values()), _targets(batch))
    classes = batch[0]["instances"].gt_classes
    assignment = outputs.dense.assignment
    assert assignment.shape == (2, sum(x.shape[1] for x in outputs.dense.logits.values()))
    foreground = assignment[0] >= 0
    assert foreground.any()
    assert torch.equal(classes[assignment[0][foreground]], labels[0][foreground])
    assert (assignment[1] == BACKGROUND).all()


def test_teacher_pass_computes_only_what_is_wanted(
    tiny_detector: Callable, make_inputs: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the numbers of calls: features need neither head nor anchor generator, and anchors need no head."""
    model = tiny_detector("retinanet").eval()
    heads, generators = _count_calls(model.head), _count_anchors(monkeypatch)
    adapter = build_adapter(model)
    outputs = adapter.run(make_inputs(), frozenset({"features"}))
    assert (outputs.anchors, outputs.dense, outputs.losses) == (None, None, {})
    assert (len(heads), len(generators)) == (0, 0)
    outputs = adapter.run(make_inputs(), frozenset({"anchors"}))
    assert outputs.dense is None
    assert (len(heads), len(generators)) == (0, 1)
    outputs = adapter.run(make_inputs(), frozenset({"dense"}))
    assert outputs.dense is not None
    assert outputs.losses == {}
    assert (len(heads), len(generators)) == (1, 2)


def test_rcnn_teacher_pass_computes_only_what_is_wanted(
    tiny_detector: Callable, make_inputs: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that neither RPN nor heads run, and that the RPN's anchors, if wanted, are keyed by stride."""
    model = tiny_detector("faster").eval()
    heads, rpns = _count_calls(model.roi_heads), _count_calls(model.proposal_generator)
    generators = _count_anchors(monkeypatch)
    adapter = build_adapter(model)
    outputs = adapter.run(make_inputs(), frozenset({"features"}))
    assert (outputs.anchors, outputs.dense, outputs.losses) == (None, None, {})
    assert len(generators) == 0
    outputs = adapter.run(make_inputs(), frozenset({"anchors"}))
    assert (len(generators), len(rpns), len(heads)) == (1, 0, 0)
    for stride, anchors in outputs.anchors.items():
        height, width = outputs.features[stride].shape[-2:]
        assert len(anchors) == 3 * height * width
        # three shapes per position, then one stride to the right
        torch.testing.assert_close(anchors.tensor[3] - anchors.tensor[0], torch.tensor([1.0, 0.0, 1.0, 0.0]) * stride)
        torch.testing.assert_close(anchors.area()[:3], torch.full((3,), float((2 * stride) ** 2)))


class OwnForward(RetinaNet):
    """Adds a loss in `forward`."""

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        return {**super().forward(batched_inputs), "loss_own": torch.tensor(5.0)}


class OwnTraining(RetinaNet):
    """Adds a loss in `forward_training`."""

    def forward_training(self, *args) -> dict[str, Tensor]:
        return {**super().forward_training(*args), "loss_own": torch.tensor(5.0)}


class OwnLabels(RetinaNet):
    """Labels all anchors as background."""

    def label_anchors(self, anchors, gt_instances):
        labels, boxes = super().label_anchors(anchors, gt_instances)
        return [torch.full_like(x, self.num_classes) for x in labels], boxes


class OwnLosses(RetinaNet):
    """Doubles the losses."""

    def losses(self, *args) -> dict[str, Tensor]:
        return {name: 2 * loss for name, loss in super().losses(*args).items()}


class OwnPreprocessing(GeneralizedRCNN):
    """Overrides the preprocessing of images."""

    def preprocess_image(self, batched_inputs: list[dict]):
        images = super().preprocess_image(batched_inputs)
        images.tensor.mul_(2)
        return images


@pytest.mark.parametrize(
    ("cls", "adapter"),
    [
        (OwnForward, BackboneAdapter),
        (OwnTraining, DenseDetectorAdapter),
        (OwnLabels, DenseDetectorAdapter),
        (OwnLosses, RetinaNetAdapter),
        (OwnPreprocessing, BackboneAdapter),
    ],
)
def test_subclasses_keep_what_they_override(
    tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage, cls: type, adapter: type
) -> None:
    """Check that a subclass gets the most informative adapter that does not bypass what it overrides."""
    model = tiny_detector("faster" if issubclass(cls, GeneralizedRCNN) else "retinanet")
    model.__class__ = cls
    assert type(build_adapter(model)) is adapter
    _assert_own_losses(model, [make_inputs()], want=frozenset({"features"}))


class OwnInference(GeneralizedRCNN):
    """Keeps one detection of each image."""

    def inference(self, batched_inputs: list[dict], detected_instances=None, do_postprocess: bool = True):
        results = super().inference(batched_inputs, detected_instances, do_postprocess)
        return [{"instances": result["instances"][:1]} for result in results]


def test_detections_of_an_rcnn_with_its_own_inference(tiny_detector: Callable, make_inputs: Callable) -> None:
    """Check that they are those of the model, in pixels of the input image, and that the adapter keeps all its parts."""
    model = tiny_detector("faster", {"MODEL": {"ROI_HEADS": {"SCORE_THRESH_TEST": 0.0}}}).eval()
    parts = build_adapter(model).spec.provides
    inputs = make_inputs()
    with torch.no_grad():
        all_of_them = build_adapter(model).run(inputs, frozenset({"detections"})).detections
        model.__class__ = OwnInference
        found = build_adapter(model).run([{**x, "height": 500} for x in inputs], frozenset({"detections"})).detections
    assert build_adapter(model).spec.provides == parts
    for one, several in zip(found, all_of_them, strict=True):
        assert (len(one), one.image_size) == (1, several.image_size)
        assert len(several) > 1
        assert torch.equal(one.pred_boxes.tensor, several[:1].pred_boxes.tensor)


class DilatedBackbone(Backbone):
    """Its third level has the stride of the second."""

    STRIDES = (8, 16, 16, 32, 64)

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, channels, 1, stride=stride) for stride in self.STRIDES)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {f"p{number}": layer(images) for number, layer in enumerate(self.layers, 3)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        channels = self.layers[0].out_channels
        return {f"p{n}": ShapeSpec(channels=channels, stride=stride) for n, stride in enumerate(self.STRIDES, 3)}

    @property
    def size_divisibility(self) -> int:
        return 64


@pytest.mark.parametrize("cls", [RetinaNet, OwnTraining])
def test_a_dense_head_with_two_levels_of_one_stride(
    tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage, cls: type
) -> None:
    """Check that the detector runs unchanged, with all its levels, and provides the deeper map of the two."""
    model = tiny_detector("retinanet")
    model.__class__ = cls
    model.backbone = DilatedBackbone(model.backbone.output_shape()["p3"].channels)
    assert type(build_adapter(model)) is BackboneAdapter
    _assert_own_losses(model, [make_inputs()], want=frozenset({"features"}))
    outputs = build_adapter(model).run(make_inputs(), frozenset({"features"}))
    named = model.backbone(outputs.images.tensor)
    assert list(outputs.features) == [8, 16, 32, 64]
    assert torch.equal(outputs.features[16], named["p5"])


def test_anchors_of_an_rpn_with_two_levels_of_one_stride(tiny_detector: Callable) -> None:
    model = tiny_detector("faster")
    assert "anchors" in build_adapter(model).spec.provides
    model.proposal_generator.in_features = [*model.proposal_generator.in_features, "p2"]
    assert "anchors" not in build_adapter(model).spec.provides


def test_panoptic_fpn_falls_to_the_backbone(
    tiny_detector: Callable, make_inputs: Callable, event_storage: EventStorage
) -> None:
    """Check a GeneralizedRCNN that overrides `forward`: all its losses are kept, and the features are captured."""
    model = tiny_detector("panoptic")
    assert isinstance(model, PanopticFPN)
    adapter = build_adapter(model)
    assert type(adapter) is BackboneAdapter
    assert (adapter.spec.family, adapter.spec.num_classes) == ("other", 3)
    assert adapter.spec.provides == {"features", "detections", "targets", "masks"}
    batch = make_inputs(masks=True, sem_seg=True)
    outputs = adapter.run(batch, frozenset({"features"}), _targets(batch))
    assert {"loss_sem_seg", "loss_mask", "loss_rpn_cls", "loss_cls"} <= outputs.losses.keys()
    assert list(outputs.features) == [4, 8, 16, 32, 64]
    assert outputs.features[4].requires_grad
    assert torch.equal(outputs.images.tensor, model.preprocess_image(batch).tensor)
    _assert_own_losses(model, [batch])


def test_backbone_adapter_stops_a_teacher_behind_its_backbone(tiny_detector: Callable, make_inputs: Callable) -> None:
    """Check that the teacher's heads do not run, that its features are right, and that no hooks remain."""
    model = tiny_detector("panoptic").eval()
    later = [_count_calls(m) for m in (model.proposal_generator, model.roi_heads, model.sem_seg_head)]
    batch = make_inputs()
    with torch.no_grad():
        outputs = build_adapter(model).run(batch, frozenset({"features"}))
        named = model.backbone(model.preprocess_image(batch).tensor)
    assert later == [[], [], []]
    assert outputs.losses == {}
    assert outputs.images.image_sizes == [(64, 80), (56, 96)]
    for stride, feature in outputs.features.items():
        assert torch.equal(feature, named[f"p{stride.bit_length() - 1}"])
    assert not model.backbone._forward_hooks


def test_backbone_adapter_refuses_a_model_without_backbone() -> None:
    with pytest.raises(UserError, match=r"^Linear has no Detectron2 backbone"):
        build_adapter(nn.Linear(1, 1))


def test_backbone_adapter_refuses_other_padding(tiny_detector: Callable) -> None:
    """Check that its own divisibility is accepted, and that the error for another one names both."""
    adapter = build_adapter(tiny_detector("panoptic"))
    adapter.pad_to(32)
    with pytest.raises(
        UserError,
        match=r"PanopticFPN pads its images to multiples of 32 pixels, .* multiples of 64: .* `size_divisibility`",
    ):
        adapter.pad_to(64)


class TwiceRun(nn.Module):
    """Calls its backbone twice per image in training mode, and never in eval mode."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        if self.training:
            for x in batched_inputs * 2:
                self.backbone(x["image"][None])
        return {}


class NamedCall(nn.Module):
    """Calls its backbone with a named argument, and returns one loss in training mode."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, batched_inputs: list[dict]) -> Tensor:
        features = self.backbone(images=torch.stack([x["image"] for x in batched_inputs]))
        return next(iter(features.values())).sum()


def test_backbone_adapter_takes_named_arguments_and_one_loss(toy_detector: type, constant_inputs: Callable) -> None:
    adapter, inputs = build_adapter(NamedCall(toy_detector().backbone)), constant_inputs()
    outputs = adapter.run(inputs, NOTHING, targets=[])
    assert torch.equal(outputs.images.tensor[0], inputs[0]["image"])
    finest = outputs.features[min(outputs.features)]
    assert outputs.losses == {"loss": finest.sum()}


def test_backbone_adapter_wants_one_call_of_the_backbone(toy_detector: type, constant_inputs: Callable) -> None:
    """Check that two calls or none raise an error instead of giving stale or missing features."""
    adapter = build_adapter(TwiceRun(toy_detector().backbone))
    with pytest.raises(RuntimeError, match="TwiceRun called its backbone 2 times"):
        adapter.run(constant_inputs(), NOTHING, targets=[])
    adapter.model.eval()
    with pytest.raises(RuntimeError, match="TwiceRun called its backbone 0 times"):
        adapter.run(constant_inputs(), NOTHING)


def test_of_two_levels_of_one_stride_the_deeper_counts(toy_detector: type) -> None:
    """Check a backbone with two maps of stride 4."""
    backbone = toy_detector().backbone
    backbone.output_shape = lambda: {
        "c": ShapeSpec(channels=1, stride=8),
        "a": ShapeSpec(channels=2, stride=4),
        "b": ShapeSpec(channels=3, stride=4),
    }
    adapter = build_adapter(TwiceRun(backbone))
    assert adapter.neck_shapes() == {"b": ShapeSpec(channels=3, stride=4), "c": ShapeSpec(channels=1, stride=8)}
    assert adapter.spec.shapes[4].channels == 3
    maps = {"a": torch.zeros(1), "b": torch.ones(1), "c": torch.ones(1) * 2}
    assert adapter.by_stride(maps) == {4: maps["b"], 8: maps["c"]}


@pytest.mark.parametrize("constraints", [{}, {"size_divisibility": 4}, {"square_size": 0}])
def test_preprocess_normalizes_and_pads(
    toy_detector: type, constant_inputs: Callable, constraints: dict[str, int]
) -> None:
    """Check zero padding after normalization, and that `pad_to` overrides the backbone's divisibility."""
    model = toy_detector(divisibility=4, pixel_mean=(1.0, 2.0, 3.0), constraints=constraints)
    model.pixel_std.fill_(2.0)
    adapter = build_adapter(model)
    assert adapter.size_divisibility == 4
    images = adapter.preprocess(constant_inputs((5.0, 2.0, 1.0), (6, 9))).tensor
    assert images.shape == (1, 3, 8, 12)
    assert images[0, :, 5, 8].tolist() == [2.0, 0.0, -1.0]
    assert images[0, :, 6:].abs().max() == 0 == images[0, :, :, 9:].abs().max()
    adapter.pad_to(20)
    assert adapter.preprocess(constant_inputs(size=(6, 21))).tensor.shape == (1, 3, 20, 40)


def test_preprocess_keeps_a_square_size(toy_detector: type, constant_inputs: Callable) -> None:
    """Check a backbone that needs square images (ViTDet)."""
    adapter = build_adapter(toy_detector(divisibility=4, constraints={"square_size": 24}))
    assert adapter.preprocess(constant_inputs(size=(6, 9))).tensor.shape == (1, 3, 24, 24)


def _slim_cfg(tiny_cfg: Callable, **slim) -> object:
    return tiny_cfg(
        "retinanet",
        {
            "MODEL": {
                "BACKBONE": {"NAME": "build_slim_resnet_backbone"},
                "RESNETS": {"STEM_OUT_CHANNELS": 64, "NORM": "BN"},
                "SLIM_RESNET": slim,
            }
        },
    )


def test_slim_resnet_has_the_names_and_shapes_of_resnet18(tiny_cfg: Callable) -> None:
    """Check that ResNet-18's tensors cover a full-width ResNet-10, and that blocks 2-2-2-2 give ResNet-18."""
    cfg = _slim_cfg(tiny_cfg, WIDTHS=(64, 128, 256, 512))
    resnet10 = build_backbone(cfg)
    cfg.MODEL.SLIM_RESNET.BLOCKS_PER_STAGE = (2, 2, 2, 2)
    same = build_backbone(cfg)
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    resnet18 = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    shapes10, shapes, shapes18 = (
        {name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (resnet10, same, resnet18)
    )
    assert shapes == shapes18
    assert shapes10.items() < shapes18.items()
    assert {name.split(".")[1] for name in shapes10 if name.startswith("res")} == {"0"}
    # with the weights of ResNet-18, blocks 2-2-2-2 compute the same features
    same.load_state_dict(resnet18.state_dict())
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        for name, feature in resnet18.eval()(image).items():
            assert torch.equal(same.eval()(image)[name], feature)


def test_slim_resnet_widths_and_blocks(tiny_cfg: Callable) -> None:
    """Check that each stage has its own width and number of blocks, and that all but the first halve the map."""
    net = build_backbone(_slim_cfg(tiny_cfg, WIDTHS=(2, 4, 6, 8), BLOCKS_PER_STAGE=(1, 2, 1, 3)))
    assert [len(stage) for stage in net.stages] == [1, 2, 1, 3]
    features = net(torch.rand(1, 3, 64, 64))
    assert {name: tuple(f.shape[1:]) for name, f in features.items()} == {
        "res3": (4, 8, 8),
        "res4": (6, 4, 4),
        "res5": (8, 2, 2),
    }
    assert {name: s.stride for name, s in net.output_shape().items()} == {"res3": 8, "res4": 16, "res5": 32}


def test_slim_resnet_freezes_as_configured(tiny_cfg: Callable) -> None:
    """Check that MODEL.BACKBONE.FREEZE_AT 2 freezes the stem and the first stage."""
    cfg = _slim_cfg(tiny_cfg, WIDTHS=(2, 4, 6, 8))
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    trained = {name.split(".")[0] for name, p in build_backbone(cfg).named_parameters() if p.requires_grad}
    assert trained == {"res3", "res4", "res5"}


def test_slim_resnet_refuses_equal_neighbors(tiny_cfg: Callable) -> None:
    """Check equal widths, between which Detectron2's basic block has no shortcut to downsample with."""
    with pytest.raises(
        UserError, match=r"MODEL\.SLIM_RESNET\.WIDTHS is \(64, 64, 128, 256\); adjacent stages must differ"
    ):
        build_backbone(_slim_cfg(tiny_cfg, WIDTHS=(64, 64, 128, 256)))


@pytest.mark.parametrize(
    ("key", "value"), [("WIDTHS", (1, 2, 3)), ("WIDTHS", (1, 2, 3, 0)), ("BLOCKS_PER_STAGE", (1, 1, 1.5, 1))]
)
def test_slim_resnet_refuses_wrong_lists(tiny_cfg: Callable, key: str, value: tuple) -> None:
    with pytest.raises(UserError, match=rf"MODEL\.SLIM_RESNET\.{key} is .*; it must be four whole numbers at least 1"):
        build_backbone(_slim_cfg(tiny_cfg, **{key: value}))
