"""Import of detectors from torchvision."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

from kd_d2.checkpoint import load_complete
from kd_d2.config import load_config
from kd_d2.errors import UserError
from kd_d2.modeling import TorchvisionAnchorGenerator
from kd_d2.torchvision import import_detector
from kd_d2.torchvision.reading import read_labels

import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from helpers import CLASSES as DATA_CLASSES
from helpers import make_project, run_command, train
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead, _default_anchorgen
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

SIZE = (192, 224)  # the strides of the coarsest feature map are 96 and 112 pixels in torchvision, not 128
OUTPUTS = 4
DENSE = (RetinaNet, FCOS)


def resnet_fpn(**arguments: Any) -> nn.Module:
    return _resnet_fpn_extractor(torchvision.models.resnet18(), 5, **arguments)


def faster_rcnn(kind: type[FasterRCNN] = FasterRCNN, outputs: int = OUTPUTS, **arguments: Any) -> FasterRCNN:
    box_head, predictor = TwoMLPHead(256 * 7 * 7, 64), FastRCNNPredictor(64, outputs)
    return kind(resnet_fpn(), None, min_size=SIZE[0], box_head=box_head, box_predictor=predictor, **arguments)


def mask_rcnn() -> MaskRCNN:
    return faster_rcnn(MaskRCNN, mask_predictor=MaskRCNNPredictor(256, 256, OUTPUTS))


def keypoint_rcnn() -> KeypointRCNN:
    head, predictor = KeypointRCNNHeads(256, [16, 24]), KeypointRCNNPredictor(24, 5)
    return faster_rcnn(KeypointRCNN, outputs=2, keypoint_head=head, keypoint_predictor=predictor)


def faster_rcnn_v2(kind: type[FasterRCNN] = FasterRCNN, **arguments: Any) -> FasterRCNN:
    box_head = FastRCNNConvFCHead((256, 7, 7), [32, 32], [64], norm_layer=nn.BatchNorm2d)
    backbone = resnet_fpn(norm_layer=nn.BatchNorm2d)
    rpn_head = RPNHead(256, 3, conv_depth=2)
    predictor = FastRCNNPredictor(64, OUTPUTS)
    return kind(backbone, None, min_size=SIZE[0], rpn_head=rpn_head, box_head=box_head, box_predictor=predictor, **arguments)  # fmt: skip


def mask_rcnn_v2() -> MaskRCNN:
    head = MaskRCNNHeads(256, [32, 32], 1, norm_layer=nn.BatchNorm2d)
    return faster_rcnn_v2(MaskRCNN, mask_head=head, mask_predictor=MaskRCNNPredictor(32, 32, OUTPUTS))


def retinanet(outputs: int = OUTPUTS) -> RetinaNet:
    backbone = resnet_fpn(returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
    return RetinaNet(backbone, outputs, min_size=SIZE[0], anchor_generator=_default_anchorgen())


def retinanet_v2() -> RetinaNet:
    backbone = resnet_fpn(returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(512, 256))
    anchors = _default_anchorgen()
    head = RetinaNetHead(256, 9, OUTPUTS, norm_layer=functools.partial(nn.GroupNorm, 32))
    return RetinaNet(backbone, OUTPUTS, min_size=SIZE[0], anchor_generator=anchors, head=head)


def fcos(outputs: int = OUTPUTS) -> FCOS:
    backbone = resnet_fpn(returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
    return FCOS(backbone, outputs, min_size=SIZE[0])


DETECTORS: dict[str, Callable[[], nn.Module]] = {
    "faster-rcnn": faster_rcnn,
    "faster-rcnn-v2": faster_rcnn_v2,
    "mask-rcnn": mask_rcnn,
    "mask-rcnn-v2": mask_rcnn_v2,
    "keypoint-rcnn": keypoint_rcnn,
    "retinanet": retinanet,
    "retinanet-v2": retinanet_v2,
    "fcos": fcos,
}


def build(name: str) -> nn.Module:
    """Return a detector whose detections have different scores and classes."""
    torch.manual_seed(0)
    model = DETECTORS[name]().eval()
    generator = torch.Generator().manual_seed(1)
    for key, tensor in [*model.named_buffers(), *model.named_parameters()]:
        noise = torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        if key.endswith("running_var"):
            tensor.copy_(1 + noise.abs())
        elif key.endswith("running_mean"):
            tensor.copy_(0.1 * noise)
        elif key.endswith("bias") and re.search("cls|bbox", key):
            tensor.data.zero_()
        elif re.search(r"cls_score|cls_logits|bbox_(reg|pred|ctrness)|mask_fcn_logits", key):
            tensor.data.copy_(0.05 * noise)
    if isinstance(model, DENSE):
        # Label 0, which no object has, would take the place of other detections.
        logits = model.head.classification_head.cls_logits
        logits.weight.data.unflatten(0, (-1, OUTPUTS))[:, 0] = 0
        logits.bias.data.unflatten(0, (-1, OUTPUTS))[:, 0] = -100
    else:  # class scores that differ among the proposals
        predictor, logits = model.roi_heads.box_predictor.cls_score, []
        handle = predictor.register_forward_hook(lambda module, inputs, output: logits.append(output))
        with torch.no_grad():
            model([image() / 255])
        handle.remove()
        scale = 3 / logits[0].std(0).mean()
        predictor.weight.data.mul_(scale)
        predictor.bias.data.copy_(-scale * logits[0].mean(0))
    return model


def image() -> Tensor:
    blocks = torch.rand(1, 3, 8, 10, generator=torch.Generator().manual_seed(0)).mul(255).round()
    return nn.functional.interpolate(blocks, SIZE)[0]


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    """Return a function that writes the weights of a detector, or anything else, to a file."""

    def write(content: Any) -> Path:
        path = tmp_path / "net.pth"
        torch.save(content.state_dict() if isinstance(content, nn.Module) else content, path)
        return path

    return write


def detector_in(folder: Path, *opts: Any) -> nn.Module:
    cfg = load_config(folder / "config.yaml", ["MODEL.DEVICE", "cpu", *opts])
    model = build_model(cfg).eval()
    load_complete(model, cfg.MODEL.WEIGHTS, "the detector")
    return model


@pytest.mark.parametrize("name", DETECTORS)
def test_detections_are_those_of_torchvision(tmp_path: Path, save: Callable, name: str) -> None:
    """Check feature maps, boxes, scores, classes and masks with the same weights.

    Detectron2's dense detectors clip boxes after the NMS, torchvision's before, so that both are compared without NMS.
    """
    theirs = build(name)
    imported = import_detector(save(theirs), tmp_path / "out")
    assert imported.classes is None
    if isinstance(theirs, DENSE):
        theirs.nms_thresh = 1.0
    ours = detector_in(tmp_path / "out", "MODEL.RETINANET.NMS_THRESH_TEST", 1.0, "MODEL.FCOS.NMS_THRESH_TEST", 1.0)
    with torch.no_grad():
        images = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(2))
        for own, other in zip(ours.backbone(images).values(), theirs.backbone(images).values(), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
        expected = theirs([image() / 255])[0]
        found = ours([{"image": image(), "height": SIZE[0], "width": SIZE[1]}])[0]["instances"]
    kept = (expected["boxes"][:, 2:] > expected["boxes"][:, :2]).all(1)  # Detectron2 removes boxes without area
    boxes, scores, labels = (expected[key][kept] for key in ("boxes", "scores", "labels"))
    assert len(found) == len(boxes) > 30
    assert len({*labels.tolist()}) == found.pred_classes.max() + 1
    # Detections of equal scores may change places.
    order, own = (torch.argsort(b[:, 0] + 1000 * s.mul(1e3).round()) for b, s in ((boxes, scores), (found.pred_boxes.tensor, found.scores)))  # fmt: skip
    torch.testing.assert_close(found.scores[own], scores[order], atol=1e-4, rtol=0)
    assert torch.equal(found.pred_classes[own], labels[order] - 1)
    torch.testing.assert_close(found.pred_boxes.tensor[own], boxes[order], atol=2e-2, rtol=0)
    if "keypoints" in expected:
        keypoints = expected["keypoints"][kept][order, :, :2]
        torch.testing.assert_close(found.pred_keypoints[own, :, :2], keypoints, atol=2e-2, rtol=0)
    if "masks" in expected:
        logits = theirs.roi_heads.mask_predictor.mask_fcn_logits
        assert torch.equal(ours.roi_heads.mask_head.predictor.weight, logits.weight[1:])
        areas = (expected["masks"][kept][:, 0] > 0.5).sum((1, 2)).float()[order]
        assert (found.pred_masks.sum((1, 2))[own] - areas).abs().mean() < 0.2 * areas.mean()


@pytest.mark.parametrize("size", [(256, 320), (800, 800), (416, 1344)])
def test_anchors_are_those_of_torchvision(size: tuple[int, int]) -> None:
    """Check anchors on images whose sides are no multiples of the largest stride."""
    theirs = _default_anchorgen()
    assert isinstance(theirs, AnchorGenerator)
    features, (height, width) = [], (size[0] // 8, size[1] // 8)
    for _ in range(5):
        features.append(torch.zeros(1, 1, height, width))
        height, width = (height + 1) // 2, (width + 1) // 2
    sizes = [[*map(float, level)] for level in theirs.sizes]
    ours = TorchvisionAnchorGenerator(sizes=sizes, aspect_ratios=[[0.5, 1, 2]], strides=[8, 16, 32, 64, 128])(features)
    expected = theirs(ImageList(torch.zeros(1, 3, *size), [size]), features)[0]
    levels = [len(level) for level in ours]
    for own, other in zip(ours, expected.split(levels), strict=True):
        by_ratio = other.unflatten(0, (-1, 3, 3)).transpose(1, 2).flatten(0, 2)  # torchvision: ratio, then size
        assert torch.equal(own.tensor, by_ratio)


def test_points_of_fcos_are_those_of_torchvision(tmp_path: Path, save: Callable) -> None:
    """Check the points of all levels, of which the coarsest has strides of 96 and 112 pixels instead of 128."""
    theirs = fcos()
    import_detector(save(theirs), tmp_path / "out")
    images = torch.zeros(1, 3, *SIZE)
    features = [*theirs.backbone(images).values()]
    (expected,) = theirs.anchor_generator(ImageList(images, [SIZE]), features)
    ours = detector_in(tmp_path / "out").anchor_generator(features)
    assert torch.equal(torch.cat([level.tensor for level in ours]), expected)


def _moved(path: Path, folder: Path, **arguments: Any) -> tuple[dict[str, Tensor], Any]:
    imported = import_detector(path, folder, **arguments)
    return torch.load(folder / "model_final.pth")["model"], imported


def test_classes_of_coco(tmp_path: Path, save: Callable) -> None:
    """Check which of the 91 outputs are kept, and that an R-CNN's background comes last."""
    categories = torchvision.models.detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    labels = [label for label, name in enumerate(categories) if name not in ("__background__", "N/A")]
    assert len(labels) == 80
    model = faster_rcnn(outputs=91)
    weights, imported = _moved(save(model), tmp_path / "rcnn", classes="coco")
    assert imported.classes == tuple(categories[label] for label in labels)
    assert imported.cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
    predictor = model.roi_heads.box_predictor
    assert torch.equal(weights["roi_heads.box_predictor.cls_score.weight"], predictor.cls_score.weight[[*labels, 0]])
    deltas = predictor.bbox_pred.weight.view(91, 4, -1)[labels].flatten(0, 1)
    assert torch.equal(weights["roi_heads.box_predictor.bbox_pred.weight"], deltas)
    dense = retinanet(outputs=91)
    weights, imported = _moved(save(dense), tmp_path / "retinanet", classes="coco")
    logits = dense.head.classification_head.cls_logits.bias.view(3, 3, 91)  # ratio, size, label
    assert torch.equal(weights["head.cls_score.bias"].view(3, 3, 80), logits.transpose(0, 1)[:, :, labels])


def test_names_of_classes(tmp_path: Path, save: Callable, caplog: pytest.LogCaptureFixture) -> None:
    """Check names of labels from 1, of labels from 0, the wrong number of names, and 91 outputs without names."""
    file = tmp_path / "classes.txt"
    file.write_text("cat\ndog\n\nbarn owl\n")
    path = save(retinanet())
    weights, imported = _moved(path, tmp_path / "from-1", classes=str(file))
    assert imported.classes == ("cat", "dog", "barn owl")
    assert len(weights["head.cls_score.bias"]) == 27
    assert torch.load(tmp_path / "from-1/model_final.pth")["class_names"] == ["cat", "dog", "barn owl"]
    file.write_text("cat\ndog\nowl\nfox")
    weights, imported = _moved(path, tmp_path / "from-0", classes=str(file))
    assert len(weights["head.cls_score.bias"]) == 36
    for text, count in (("cat", 1), ("a\nb\nc\nd\ne", 5)):
        file.write_text(text)
        with pytest.raises(
            UserError, match=f"There are {count} class names, but the detector has 4 outputs, of which the"
        ):
            import_detector(path, tmp_path / "wrong", str(file))
    with pytest.raises(UserError, match="There are 4 class names"):  # an R-CNN always has an output for the background
        file.write_text("a\nb\nc\nd")
        import_detector(save(faster_rcnn()), tmp_path / "wrong", str(file))
    assert not (tmp_path / "wrong").exists()
    import_detector(save(retinanet(outputs=91)), tmp_path / "coco")
    assert "if it is one, --classes coco selects and names its 80 classes" in caplog.text
    file.write_text("cat\nN/A\nN/A")
    assert read_labels(str(file)) == ("cat", "N/A", "N/A")
    file.write_text("cat\ndog\ncat")
    with pytest.raises(UserError, match="has the name 'cat' more than once"):
        read_labels(str(file))
    file.write_text("cat")
    _, imported = _moved(save(retinanet(outputs=1)), tmp_path / "one", classes=str(file))
    assert imported.number_of_classes == 1
    file.write_text("\n")
    with pytest.raises(UserError, match="has no names: one in each line"):
        read_labels(str(file))


OLD = {
    r"(fpn\.\w+_blocks\.\d+)\.0\.": r"\1.",
    r"rpn\.head\.conv\.0\.0\.": "rpn.head.conv.",
    r"mask_head\.(\d)\.0": lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}",
    r"_head\.conv\.(\d)\.0": lambda m: f"_head.conv.{2 * int(m[1])}",
}
"""Names before torchvision 0.13, by parts of the names since."""


@pytest.mark.parametrize("name", ["mask-rcnn", "retinanet"])
def test_other_files_with_the_same_weights(tmp_path: Path, save: Callable, name: str) -> None:
    """Check old names, prefixes of programs that wrap a model, and entries of torchvision's reference scripts."""
    weights = build(name).state_dict()
    expected, _ = _moved(save(weights), tmp_path / "new")
    old = {}
    for key, tensor in weights.items():
        for pattern, replacement in OLD.items():
            key = re.sub(pattern, replacement, key)
        old[key] = tensor
    assert old.keys() != weights.keys()
    parallel = {f"module.{key}": tensor for key, tensor in weights.items()}
    lightning = {"state_dict": {f"detector._orig_mod.{key}": tensor for key, tensor in old.items()}}
    script = {"model": weights, "optimizer": {"state": {}}, "args": Path("x"), "epoch": 3}
    for index, content in enumerate([old, parallel, lightning, script, {"model_state_dict": weights}]):
        found, _ = _moved(save(content), tmp_path / str(index))
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
        assert found.keys() == expected.keys()


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Let torchvision download the detectors in the returned list, and fail when it is empty."""
    models: list[nn.Module] = []

    def get_model(name: str, weights: str) -> nn.Module:
        assert (name, weights) == ("fasterrcnn_resnet50_fpn", "DEFAULT")
        if not models:
            raise URLError("no network")
        return models.pop()

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    return models


def test_weights_of_torchvision(tmp_path: Path, download: list[nn.Module]) -> None:
    """Check names of classes, and the epsilon of normalization layers, which torchvision sets to 0 in these detectors."""
    model = faster_rcnn(outputs=91).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
            module.running_var.fill_(1e-4)
    download.append(model)
    imported = import_detector("fasterrcnn_resnet50_fpn", tmp_path / "out")
    assert imported.classes is not None
    assert imported.classes[0] == "person"
    ours = detector_in(tmp_path / "out")
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours.backbone(images)["p3"], model.backbone(images)["1"], rtol=1e-3, atol=1e-3)
    with pytest.raises(
        UserError, match=r"torchvision's weights of fasterrcnn_resnet50_fpn cannot be downloaded: .*no network"
    ):
        import_detector("fasterrcnn_resnet50_fpn", tmp_path / "none")


def test_epsilon_of_a_file(tmp_path: Path, save: Callable) -> None:
    """Check the factor of a normalization layer, also for a variance that is much smaller than the epsilons."""
    model, layer = faster_rcnn(), "backbone.bottom_up.stem.conv1.norm"
    model.backbone.body.bn1.weight.data.fill_(1e-7)
    model.backbone.body.bn1.running_var.fill_(1e-12)
    path = save(model)
    for epsilon, factor in ((None, 10**-4.5), (1e-5, 10**-4.5), (0.0, 0.1), (1e-12, 0.5**0.5 / 10), (1e-3, 10**-5.5)):
        weights, _ = _moved(path, tmp_path / str(epsilon), epsilon=epsilon)
        found = weights[f"{layer}.weight"] * torch.rsqrt(weights[f"{layer}.running_var"] + 1e-5)
        torch.testing.assert_close(found, torch.full((64,), factor), rtol=1e-5, atol=0)


def test_warning_of_an_unknown_epsilon(tmp_path: Path, save: Callable, caplog: pytest.LogCaptureFixture) -> None:
    """Check that only files with frozen normalization layers, such as fine-tuned COCO_V1, are warned of, unless it is given.

    In torchvision's FCOS it is always 1e-5.
    """
    body = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    frozen, trained = FasterRCNN(_resnet_fpn_extractor(body, 5), 2), faster_rcnn()
    dense = _resnet_fpn_extractor(body, 5, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
    for index, (model, epsilon, is_warned) in enumerate(
        [
            (frozen, None, True),
            (frozen, 0.0, False),
            (frozen, 1e-5, False),
            (trained, None, False),
            (FCOS(dense, 2), None, False),
        ]
    ):
        caplog.clear()
        import_detector(save(model), tmp_path / str(index), epsilon=epsilon)
        assert ("COCO_V1, it is 0: --batch-norm-eps 0." in caplog.text) is is_warned


@pytest.mark.parametrize("epsilon", [-1e-3, float("nan"), float("inf")])
def test_epsilon_that_cannot_be(tmp_path: Path, save: Callable, epsilon: float) -> None:
    with pytest.raises(UserError, match=rf"--batch-norm-eps is {epsilon}; it must be at least 0 and finite."):
        import_detector(save(faster_rcnn()), tmp_path / "out", epsilon=epsilon)


def test_epsilon_of_0_with_variances_of_0(tmp_path: Path, save: Callable) -> None:
    model = faster_rcnn()
    model.backbone.body.layer1[0].bn2.running_var[3] = 0
    with pytest.raises(
        UserError,
        match=r"cannot be 0: backbone.bottom_up.res2.0.conv2.norm.running_var of the imported detector has zeros.",
    ):
        import_detector(save(model), tmp_path / "out", epsilon=0.0)


def _changed(model: nn.Module, **changes: Any) -> dict[str, Tensor]:
    """Return the weights of a detector without the names that contain a key, or with another tensor."""
    weights = model.state_dict()
    for key, value in changes.items():
        part = key.replace("__", ".")
        for name in [name for name in weights if part in name]:
            if value is None:
                del weights[name]
            else:
                weights[name] = value
    return weights


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: _changed(fcos(), bbox_ctrness__bias=None), "does not fit the detector: head.ctrness.bias is missing"),
        (lambda: fcos(outputs=1), "The detector has only output 0, which is for no class; if a RetinaNet or FCOS was trained with labels from 0"),
        (lambda: torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None), "another backbone than a ResNet"),
        (lambda: torchvision.models.resnet18(), "is not the checkpoint of a Faster, Mask or Keypoint R-CNN, RetinaNet or FCOS of torchvision; its first weight is bn1.bias."),
        (lambda: torch.zeros(1), "has no weights: a checkpoint is needed that was saved with torch.save"),
        (lambda: {"epoch": 3}, "has no weights: a checkpoint is needed that was saved with torch.save"),
        (lambda: _changed(retinanet(), layer4__1=None), r"has a ResNet of \(2, 2, 2, 1\) blocks, which Detectron2 does not have."),
        (lambda: _changed(faster_rcnn(), fc7=None), "The torchvision checkpoint has no roi_heads.box_head.fc7.weight, which the detector needs."),
        (lambda: {**retinanet().state_dict(), "head.extra.weight": torch.zeros(1)}, "has 1 weights for which the detector has no layer; the first one is head.extra.weight."),
        (lambda: _changed(faster_rcnn(), rpn__head__cls_logits=torch.zeros(15)), "has an RPN of 15 anchors per cell, not torchvision's 3."),
        (lambda: _changed(retinanet(), cls_logits=torch.zeros(40)), "has 40 outputs of classes, not a multiple of torchvision's 9 anchors."),
        (lambda: retinanet(outputs=1), "The detector has only output 0, which is for no class; if a RetinaNet or FCOS was trained with labels from 0"),
        (lambda: _changed(retinanet(), inner_blocks__2=None), "has an FPN of 2 levels; 3 are needed."),
        (lambda: _changed(retinanet(), fpn__layer_blocks__0__0__weight=torch.zeros(3)), r"does not fit the detector: backbone.fpn_output3.weight is shape \(3,\) offered"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported(tmp_path: Path, save: Callable, content: Callable, message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_detector(save(content()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_teacher_from_torchvision(
    tmp_path: Path, save: Callable, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """Check the program, a training with the imported teacher, and bad arguments."""
    (tmp_path / "classes.txt").write_text("\n".join(DATA_CLASSES))
    path, folder = save(retinanet()), tmp_path / "teacher"
    arguments = ("--classes", tmp_path / "classes.txt", "INPUT.MIN_SIZE_TEST", "300")
    run_command("import-torchvision", path, folder, *arguments)
    first, *_, last = capsys.readouterr().out.splitlines()
    names = ", ".join(DATA_CLASSES)
    assert first.startswith(f"RetinaNet with ResNet-18, 3 classes ({names}), RGB images with a shorter side of 300")
    assert last == f"As a teacher: MODEL.KD.TEACHER.CONFIG_FILE {folder}/config.yaml"
    project = make_project(
        tmp_path / "project",
        MODEL__KD__TEACHER__CONFIG_FILE=str(folder / "config.yaml"),
        MODEL__KD__TEACHER__WEIGHTS="",
        MODEL__KD__FEATURE_IMITATION__ADAPTATION="1x1",
    )
    run = train(project, "SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 0)
    assert run.losses[0]["loss_feature_imitation"] > 0
    with pytest.raises(UserError, match="exists already and is not an empty folder"):
        import_detector(path, folder)
    with pytest.raises(UserError, match=r"OUT .*net.pth/new cannot be written: Not a directory."):
        import_detector(path, path / "new")
    with pytest.raises(UserError, match="There is no checkpoint retinanet"):
        import_detector("retinanet", tmp_path / "new")
    with pytest.raises(
        UserError, match="The ssd300_vgg16 of torchvision cannot be imported; fasterrcnn_resnet50_fpn, "
    ):
        import_detector("ssd300_vgg16", tmp_path / "new")
