"""`kd-d2 export`: files that match PyTorch for any size and number of objects, and error messages."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from kd_d2 import UserError, load_config
from kd_d2.export import ExportOptions, export_detector, exporting, load_exported, load_exported_detector, writing
from kd_d2.export.checking import Comparison, match
from kd_d2.export.decoding import decode
from kd_d2.export.graph import batched_nms
from kd_d2.export.images import dataset_files, dataset_images, prepared
from kd_d2.export.quantizing import box_convolutions
from kd_d2.export.running import ExportedModel
from kd_d2.modeling.building import build_detector
from kd_d2.predictor import Predictor

import numpy as np
import pytest
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from helpers import CLASSES, META_ARCHITECTURES, ROOT, make_project, run_command, save_fixed_weights
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

NEEDS_EXTRA = "needs the extra export: pip install '.[export]'"
onnx = pytest.importorskip("onnx", reason=NEEDS_EXTRA)
pytest.importorskip("openvino", reason=NEEDS_EXTRA)
if importlib.util.find_spec("onnxruntime") is None:  # its import would send usage data
    pytest.skip(NEEDS_EXTRA, allow_module_level=True)

DETECTORS = (*META_ARCHITECTURES, "mask-rcnn", "cascade-rcnn", "c4", "deformable")
TOPK = 30
"""Candidates per level, fewer than there are."""
GRAY = torch.full((3, 50, 50), 127, dtype=torch.uint8)


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CfgNode]:
    """Return the configs of tiny detectors with fixed weights by name, each built on first access."""

    class Configs(dict):
        def __missing__(self, name: str) -> CfgNode:
            self[name] = _make_config(tmp_path_factory.mktemp(name), name)
            return self[name]

    return Configs()


def limit_of(detector: str) -> int:
    """Return the maximum number of detections per image, fewer than one of IMAGES would have."""
    return 2 if "rcnn" in detector or detector == "c4" else 6


def _make_config(folder: Path, name: str) -> CfgNode:
    kinds = {"deformable": "retinanet", **dict.fromkeys(("mask-rcnn", "cascade-rcnn", "c4"), "faster-rcnn")}
    project = make_project(folder, kinds.get(name, name))
    cfg = load_config(str(project.student), ["OUTPUT_DIR", str(folder)], student_only=True)
    if name == "mask-rcnn":
        project.change_annotations(_outline)
        cfg.MODEL.MASK_ON = True
        cfg.MODEL.ROI_MASK_HEAD.update(NAME="MaskRCNNConvUpsampleHead", NUM_CONV=1, CONV_DIM=8)
    if name == "cascade-rcnn":
        cfg.MODEL.ROI_HEADS.NAME = "CascadeROIHeads"
        cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    if name == "c4":
        cfg.MODEL.BACKBONE.NAME = "build_slim_resnet_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4"]
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = cfg.MODEL.SLIM_RESNET.WIDTHS[2] // 4  # the head expects 4 times as many
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16, 32, 64]]
        cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
    if name == "deformable":
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.update(DEPTH=50, WIDTH_PER_GROUP=4, RES2_OUT_CHANNELS=16, DEFORM_NUM_GROUPS=2)
        cfg.MODEL.RESNETS.update(DEFORM_ON_PER_STAGE=[False, True, True, True], DEFORM_MODULATED=True)
    for node in ("RETINANET", "FCOS", "ATSS", "GFL", "FSAF", "REPPOINTS"):
        cfg.MODEL[node].TOPK_CANDIDATES_TEST = TOPK
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = TOPK
    cfg.TEST.DETECTIONS_PER_IMAGE = limit_of(name)
    config_file = folder / "plain.yaml"
    config_file.write_text(cfg.dump())
    weights = save_fixed_weights(config_file, folder / "model.pth", seed=2).state_dict()
    for key, tensor in weights.items():
        if "cls_score.weight" in key or "bbox_pred.weight" in key:
            tensor *= 0.03  # scores between 0 and 1, boxes smaller than the image
        if "offset" in key:
            tensor *= 0.1  # not much more than a position
    torch.save({"model": weights}, folder / "model.pth")
    cfg.MODEL.WEIGHTS = str(folder / "model.pth")
    _set_threshold(cfg, 0.0)
    _set_threshold(cfg, float(detect(pytorch_model(cfg), GRAY).scores.max()) + 1e-3)  # none in the gray image
    return cfg


def _outline(tree: dict) -> None:
    """Add the outline of every box as its mask."""
    for annotation in tree["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]


def _set_threshold(cfg: CfgNode, threshold: float) -> None:
    for node in ("RETINANET", "FCOS", "ATSS", "GFL", "FSAF", "REPPOINTS", "ROI_HEADS"):
        cfg.MODEL[node].SCORE_THRESH_TEST = threshold


def pytorch_model(cfg: CfgNode) -> nn.Module:
    model = build_detector(cfg).eval()
    model.load_state_dict(torch.load(cfg.MODEL.WEIGHTS)["model"])
    return model


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    cells = np.random.RandomState(seed).randint(0, 256, (3, -(-height // 8), -(-width // 8))).astype(np.uint8)
    return torch.from_numpy(cells.repeat(8, 1).repeat(8, 2)[:, :height, :width].copy())


IMAGES = [noise(64, 96), noise(96, 64, 1), noise(77, 130, 2), noise(33, 200, 3), GRAY]


def detect(model, image: Tensor) -> Instances:
    with torch.no_grad():
        return model([{"image": image}])[0]["instances"]


def assert_equal(expected: Instances, found: Instances) -> None:
    """Check boxes to 0.01 pixels, scores to 1e-4, classes, and masks except for 0.1 % of the pixels."""
    assert len(found) == len(expected)
    assert found.image_size == tuple(map(int, expected.image_size))
    pairs = match(expected, found)
    assert [i for i, _ in pairs] == list(range(len(expected)))
    order = [j for _, j in pairs]
    found = found[order]
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-2, rtol=0)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)
    assert found.pred_classes.tolist() == expected.pred_classes.tolist()
    if expected.has("pred_masks"):
        assert found.pred_masks.shape == expected.pred_masks.shape
        assert (found.pred_masks != expected.pred_masks).sum() <= 1e-3 * expected.pred_masks.numel()


FAST = {
    ("retinanet", "onnx"),
    ("retinanet", "ts"),
    ("faster-rcnn", "onnx"),
}
WITH_DEFORMABLE_CONVOLUTIONS = {"reppoints": "RepPoints", "deformable": "RetinaNet"}
PAIRS = [
    pytest.param(detector, suffix, marks=() if (detector, suffix) in FAST else pytest.mark.slow)
    for detector in DETECTORS
    for suffix in ("onnx", "ts", "xml")
    if suffix != "xml" or detector not in WITH_DEFORMABLE_CONVOLUTIONS
]


BOX_PREDICTORS = {
    "reppoints": {"first_points", "refined_points"},
    **{detector: {"anchor_deltas"} for detector in ("faster-rcnn", "mask-rcnn", "cascade-rcnn")},
    "c4": {"anchor_deltas", "conv", "shortcut"},  # of the blocks of res5, before its linear layers
}


def modules(nodes: set[str]) -> set[str]:
    """Return the module names of ONNX nodes, such as bbox_pred for /model/head/bbox_pred_1/Conv."""
    return {node.split("/")[-2].rstrip("_0123456789") for node in nodes}


@pytest.mark.parametrize(("detector", "suffix"), PAIRS)
def test_file_detects_what_pytorch_does(
    detector: str, suffix: str, configs: dict[str, CfgNode], tmp_path: Path
) -> None:
    """Check sizes that were not traced, a uniform image, and more candidates and detections than the limits."""
    cfg = configs[detector].clone()
    cfg.freeze()
    path = tmp_path / f"model.{suffix}"
    comparison = export_detector(cfg, str(path))
    model, exported = pytorch_model(cfg), load_exported(str(path))
    expected = [detect(model, image) for image in IMAGES]
    for image, detections in zip(IMAGES, expected, strict=True):
        assert_equal(detections, detect(exported, image))
    assert max(map(len, expected)) == limit_of(detector) and len(expected[-1]) == 0
    assert comparison.images == 7 and comparison.unmatched == 0 and comparison.box < 1e-2 and comparison.score < 1e-4
    if suffix == "onnx":
        assert modules(box_convolutions(onnx.load(path).graph)) == BOX_PREDICTORS.get(detector, {"bbox_pred"})


def test_the_warning_of_the_tracer_is_not_shown() -> None:
    """Check the logger of "is_fx_tracing will return true", which the export of every R-CNN prints once per process."""
    tracer = logging.getLogger("torch.fx._symbolic_trace")
    before = tracer.level
    with writing._quiet():
        assert not tracer.isEnabledFor(logging.WARNING)
    assert tracer.level == before


@pytest.mark.parametrize("detector", WITH_DEFORMABLE_CONVOLUTIONS)
def test_openvino_cannot_run_deformable_convolutions(
    detector: str, configs: dict[str, CfgNode], tmp_path: Path
) -> None:
    name = WITH_DEFORMABLE_CONVOLUTIONS[detector]
    with pytest.raises(UserError, match=rf"{name} cannot be exported to openvino: .*DeformConv") as caught:
        export_detector(configs[detector], str(tmp_path / "model.xml"))
    assert "--size" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "suffix", ["onnx", pytest.param("ts", marks=pytest.mark.slow), pytest.param("xml", marks=pytest.mark.slow)]
)
def test_a_swin_transformer_is_exported_for_one_size(tmp_path: Path, suffix: str) -> None:
    """Check that a file for all sizes is refused, and one of a single size; Detectron2 computes masks of shifted windows in Python."""
    project = make_project(tmp_path, "retinanet")
    cfg = load_config(str(project.student), ["OUTPUT_DIR", str(tmp_path)], student_only=True)
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_swin_fpn_backbone"
    cfg.MODEL.SWIN.update(EMBED_DIM=4, DEPTHS=(2, 1, 1, 1), NUM_HEADS=(1, 1, 1, 1), WINDOW_SIZE=3)
    config_file, weights = tmp_path / "swin.yaml", tmp_path / "swin.pth"
    config_file.write_text(cfg.dump())
    save_fixed_weights(config_file, weights)
    cfg.MODEL.WEIGHTS = str(weights)
    path = tmp_path / f"model.{suffix}"
    message = (
        "its detections differ"
        if suffix == "xml"
        else r"A file for images of one size may be possible: --size HEIGHT WIDTH\.$"
    )
    with pytest.raises(UserError, match=message):
        export_detector(cfg, str(path), ExportOptions(score_thresh=1e-3))
    comparison = export_detector(cfg, str(path), ExportOptions(fixed_size=(64, 96), score_thresh=1e-3))
    assert comparison.detections and comparison.unmatched == 0


DENSE_DETECTORS = [
    "retinanet",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("fcos", "atss", "gfl", "fsaf", "reppoints")),
]


@pytest.mark.parametrize("detector", DENSE_DETECTORS)
def test_without_nms_the_graph_is_static_and_decoding_gives_the_detections(
    detector: str, configs: dict[str, CfgNode], tmp_path: Path
) -> None:
    cfg, path = configs[detector], tmp_path / "model.onnx"
    export_detector(cfg, str(path), ExportOptions(nms=False))
    graph = onnx.load(path).graph
    assert {"NonMaxSuppression", "NonZero", "TopK", "If", "Loop"}.isdisjoint(node.op_type for node in graph.node)
    assert [output.name for output in graph.output] == ["boxes", "scores", "levels"]
    model, exported = pytorch_model(cfg), load_exported(str(path))
    for image in IMAGES:
        assert_equal(detect(model, image), detect(exported, image))


@pytest.mark.parametrize("detector", DENSE_DETECTORS)
def test_without_nms_and_of_a_fixed_size_all_shapes_are_constant(
    detector: str, configs: dict[str, CfgNode], tmp_path: Path
) -> None:
    cfg, path = configs[detector], tmp_path / "model.onnx"
    export_detector(cfg, str(path), ExportOptions(nms=False, fixed_size=(64, 96)))
    model = onnx.load(path)
    assert {"Shape", "Range", "ConstantOfShape", "If"}.isdisjoint(node.op_type for node in model.graph.node)
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    candidates = shapes["levels"][0]
    assert candidates > 96
    assert shapes == {
        "image": [3, 64, 96],
        "boxes": [candidates, 4],
        "scores": [candidates, 3],
        "levels": [candidates],
    }
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", writing.OPSET)]
    exported = load_exported(str(path))
    assert exported.metadata.fixed_size == [64, 96]
    assert_equal(detect(pytorch_model(cfg), IMAGES[0]), detect(exported, IMAGES[0]))


def test_nms_of_many_classes() -> None:
    """Check that boxes of a class far from the first are as precise, and that classes do not touch, also left of zero."""
    generator = torch.Generator().manual_seed(0)
    center_NC = torch.rand(3000, 2, generator=generator) * 40 + torch.randint(30, (3000, 2), generator=generator) * 45
    box_N4 = torch.cat([center_NC - 30, center_NC + 30], dim=1)
    class_N = torch.randint(1200, 1203, (3000,), generator=generator)
    class_N[:300] = torch.arange(300)
    score_N = torch.rand(3000, generator=generator)
    expected = torchvision.ops.boxes._batched_nms_vanilla(box_N4, score_N, class_N, 0.5)
    assert 300 < len(expected) < 2900
    assert batched_nms(box_N4, score_N, class_N, 0.5).tolist() == expected.tolist()
    wide_N4 = torch.tensor([[-50.0, 0.0, 50.0, 10.0], [-51.0, 0.0, 49.0, 10.0]])
    assert batched_nms(wide_N4, torch.tensor([0.5, 0.6]), torch.tensor([0, 1]), 0.0).tolist() == [1, 0]
    assert batched_nms(wide_N4, torch.tensor([0.5, 0.6]), torch.tensor([1, 1]), 0.5).tolist() == [1]
    assert batched_nms(wide_N4[:0], torch.rand(0), class_N[:0], 0.5).tolist() == []


def test_float_images_are_rounded() -> None:
    seen = []

    def session(image: np.ndarray) -> tuple[np.ndarray, ...]:
        seen.append(image)
        return np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64)

    model = ExportedModel(session, SimpleNamespace(nms=True, padded=lambda image: image))
    model([{"image": torch.tensor([0.4, 254.7, 256.0]).reshape(3, 1, 1)}])
    assert seen[0].dtype == np.uint8 and seen[0].flatten().tolist() == [0, 255, 255]


def test_decoding_by_hand() -> None:
    """Check the threshold, the candidates of a level, NMS within classes, and the limit."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]])
    scores = torch.tensor([[0.9, 0.0], [0.8, 0.7], [0.05, 0.0], [0.6, 0.0], [0.5, 0.4]])
    levels = torch.tensor([0, 0, 0, 1, 1])
    info = exporting.ExportMetadata(
        "X", ["a", "b"], [1, 2], "RGB", 8, 8, None, [0, 0, 0], 1, False, 0.1, nms_threshold=0.5, topk_candidates=3, max_detections=4
    )  # fmt: skip
    found_boxes, found_scores, found_classes = decode(boxes, scores, levels, info)
    torch.testing.assert_close(
        found_scores, torch.tensor([0.9, 0.7, 0.6, 0.5])
    )  # 0.8 is suppressed by 0.9; 0.4 exceeds the limit
    assert found_classes.tolist() == [0, 1, 0, 0]
    assert found_boxes[:, 0].tolist() == [0, 0, 40, 60]
    at_the_threshold = replace(info, score_threshold=0.5)
    torch.testing.assert_close(decode(boxes, scores, levels, at_the_threshold)[1], torch.tensor([0.9, 0.7, 0.6]))


@pytest.mark.parametrize("suffix", ["onnx", "ts"])
def test_a_full_disk(suffix: str, configs: dict[str, CfgNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"model.{suffix}"
    drafts = tmp_path / "drafts"
    drafts.mkdir()
    (drafts / path.name).symlink_to("/dev/full")
    monkeypatch.setattr(exporting, "temporary_folder", lambda **_: contextlib.nullcontext(str(drafts)))
    with pytest.raises(UserError, match=rf"^--output {path} cannot be written: No space left on device\.$"):
        export_detector(configs["retinanet"], str(path))


@pytest.mark.parametrize("suffix", ["onnx", "ts", "xml"])
def test_fixed_size(suffix: str, configs: dict[str, CfgNode], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check that an image is resized and padded with the mean to the fixed size, with boxes in its own pixels.

    The size in the log includes the weights that OpenVINO keeps in another file.
    """
    cfg, path = configs["retinanet"], tmp_path / f"model.{suffix}"
    with caplog.at_level("INFO"):
        export_detector(cfg, str(path), ExportOptions(fixed_size=(64, 128)))
    size = sum(file.stat().st_size for file in tmp_path.glob("model.*"))
    assert f"{path}: {size / 1e6:.1f} MB" in caplog.text
    detector = load_exported_detector(str(path), detect_threshold := detector_threshold(path))
    image = noise(100, 100, 5).permute(1, 2, 0).numpy()
    resized = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR))
    padded = np.empty((64, 128, 3), np.uint8)
    padded[:] = [round(mean) for mean in cfg.MODEL.PIXEL_MEAN]
    padded[:, :64] = resized
    expected = detect(pytorch_model(cfg), torch.from_numpy(padded.transpose(2, 0, 1).copy()))
    expected.pred_boxes.scale(100 / 64, 100 / 64)
    expected.pred_boxes.clip((100, 100))
    expected = expected[expected.pred_boxes.nonempty() & (expected.scores >= detect_threshold)]
    found = detector.detect([image])[0]
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-2, rtol=0)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)
    if suffix == "onnx":
        shape = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
        assert [dim.dim_value for dim in shape] == [3, 64, 128]


def test_images_that_are_not_resized(configs: dict[str, CfgNode], tmp_path: Path) -> None:
    cfg = configs["retinanet"].clone()
    cfg.INPUT.MIN_SIZE_TEST = 0
    assert export_detector(cfg, str(tmp_path / "model.ts")).unmatched == 0
    assert load_exported(str(tmp_path / "model.ts")).metadata.min_size == 0


def detector_threshold(path: Path) -> float:
    return load_exported(str(path)).metadata.score_threshold


def test_metadata(configs: dict[str, CfgNode], tmp_path: Path) -> None:
    """Check what a program without kd_d2 reads from the file."""
    path = tmp_path / "model.onnx"
    export_detector(configs["retinanet"], str(path), ExportOptions(score_thresh=0.25))
    model = onnx.load(path)
    entries = {entry.key: entry.value for entry in model.metadata_props}
    assert entries["detector"] == "RetinaNet" and entries["input_format"] == "RGB"
    assert json.loads(entries["class_names"]) == list(CLASSES) and json.loads(entries["category_ids"]) == [1, 2, 3]
    assert (entries["min_size"], entries["max_size"], entries["fixed_size"]) == ("64", "128", "null")
    assert (entries["score_threshold"], entries["nms"], entries["int8"]) == ("0.25", "true", "false")
    onnx.checker.check_model(model)
    [image] = model.graph.input
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [dim.dim_param or dim.dim_value for dim in image.type.tensor_type.shape.dim] == [3, "height", "width"]
    assert [output.name for output in model.graph.output] == ["boxes", "scores", "classes"]


@pytest.mark.slow
def test_int8(configs: dict[str, CfgNode], tmp_path: Path) -> None:
    """Check which convolutions are quantized, that scores are close, and that a gray image has few objects."""
    cfg, path = configs["retinanet"], tmp_path / "model.onnx"
    export_detector(cfg, str(path), ExportOptions(int8=True, calibration_images=4))
    graph = onnx.load(path).graph
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    in_float = {node.name for node in convolutions if dequantized.isdisjoint(node.input)}
    assert len(convolutions) == 40 and len(in_float) == 5 and modules(in_float) == {"bbox_pred"}
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer]
    assert max(np.abs(array).max() for array in weights if array.dtype == np.int8 and array.ndim == 4) == 64
    exported = load_exported(str(path))
    assert exported.metadata.int8 and len(detect(exported, GRAY)) <= 2

    every = [tmp_path / "float.onnx", tmp_path / "int8.onnx"]
    for file, int8 in zip(every, (False, True)):
        export_detector(cfg, str(file), ExportOptions(nms=False, int8=int8, calibration_images=4))
    for image in IMAGES[:4]:
        expected, found = (load_exported(str(file)).session(image.numpy())[1] for file in every)
        assert 0 < np.abs(found - expected).max() < 0.4
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.8


def instances(boxes: list[list[float]], scores: list[float], classes: list[int]) -> Instances:
    return Instances(
        (100, 200),
        pred_boxes=Boxes(torch.tensor(boxes).view(-1, 4)),
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(classes, dtype=torch.int64),
    )


def test_comparison_tells_equal_from_different_detections() -> None:
    """Check order, a shifted box, another class, another score, and detections at the threshold and at the limit."""
    a, b = [0.0, 0, 10, 10], [50.0, 0, 60, 10]

    def unmatched(found: Instances, threshold: float = 0.1, limit: int | None = None) -> int:
        comparison = Comparison()
        comparison.add(instances([a, b], [0.9, 0.5], [0, 1]), found, threshold, limit)
        return comparison.unmatched

    assert unmatched(instances([b, a], [0.5, 0.9], [1, 0])) == 0
    assert unmatched(instances([[0, 0, 10, 10.03], b], [0.9, 0.5], [0, 1])) == 2  # tolerance: 200 * 1e-4 pixels
    assert unmatched(instances([[0, 0, 10, 10.01], b], [0.9, 0.5], [0, 1])) == 0
    assert unmatched(instances([a, b], [0.9, 0.5], [1, 1])) == 2
    assert unmatched(instances([a, b], [0.898, 0.5], [0, 1])) == 2
    assert unmatched(instances([a], [0.9], [0])) == 1
    assert unmatched(instances([a, b, a], [0.9, 0.5, 0.0], [0, 1, 0])) == 1  # below the threshold, thus invalid
    assert unmatched(instances([a], [0.9], [0]), threshold=0.4995) == 0
    assert unmatched(instances([a], [0.9], [0]), limit=2) == 0
    assert unmatched(instances([a], [0.9], [0]), limit=-1) == 1
    assert unmatched(instances([], [], []), limit=-1) == 2


def test_a_detection_is_the_counterpart_of_one() -> None:
    """Check two equal detections, of which the other model has only one."""
    a, b = [0.0, 0, 10, 10], [50.0, 0, 60, 10]
    twice, once = instances([a, a], [0.9, 0.9], [0, 0]), instances([a, b], [0.9, 0.9], [0, 0])
    assert match(twice, once) == match(once, twice) == [(0, 0)]
    assert match(twice, twice) == [(0, 0), (1, 1)]


def test_masks_are_compared() -> None:
    """Check masks that differ in 20 and in 21 of 100 x 200 pixels, with a tolerance of 0.1 %."""
    expected, found = (instances([[0.0, 0, 10, 10]], [0.9], [0]) for _ in range(2))
    expected.pred_masks = torch.zeros(1, 100, 200, dtype=torch.bool)
    found.pred_masks = expected.pred_masks.clone()
    found.pred_masks[0, 0, :20] = True
    assert match(expected, found) == [(0, 0)]
    found.pred_masks[0, 1, 0] = True
    assert match(expected, found) == []


def test_only_masks_of_equal_boxes_are_compared() -> None:
    """Check detections in reverse order, one with another mask, without a tensor larger than the masks of one model."""

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.largest = max(self.largest, result.numel())
            return result

    expected = instances([[10.0 * i, 0, 10.0 * i + 10, 10] for i in range(10)], [0.9] * 10, [0] * 10)
    expected.pred_masks = torch.zeros(10, 100, 200, dtype=torch.bool)
    found = expected[torch.arange(9, -1, -1)]
    found.pred_masks[3] = True
    with Sizes() as sizes:
        pairs = match(expected, found)
    assert pairs == [(i, 9 - i) for i in range(10) if i != 6]
    assert sizes.largest <= expected.pred_masks.numel()


def test_evaluation_tells_that_the_file_has_a_higher_threshold(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for threshold, is_higher in (("0.999", True), ("0.01", False)):
        path = tmp_path / "student.ts"
        run_command("export", "--model", run_folder, "--output", path, "--score-thresh", threshold)
        run_command("eval", "--model", run_folder, path, "OUTPUT_DIR", run_folder)
        words = f"returns no detections below {threshold}, but the config's score threshold is 0."
        assert (words in capsys.readouterr().out) == is_higher


def test_padding_is_a_color(configs: dict[str, CfgNode]) -> None:
    cfg = configs["retinanet"].clone()
    cfg.MODEL.PIXEL_MEAN = [300.0, -5.0, 127.4]
    assert exporting.describe(cfg, build_model(cfg), ExportOptions()).padding == [255, 0, 127]


def test_unusable_images_are_left_out(
    configs: dict[str, CfgNode], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    project = make_project(tmp_path, "retinanet")
    cfg = load_config(str(project.student), student_only=True)
    metadata = exporting.describe(cfg, build_model(cfg), ExportOptions())
    files = dataset_files(cfg, "TRAIN", 3)
    Path(files[1]).write_text("no image")
    with pytest.raises(UserError, match=f"The image {files[1]} cannot be used"):
        dataset_images(cfg, "TRAIN", 3, metadata)
    cfg.DATALOADER.SKIP_UNUSABLE_IMAGES = True
    images = dataset_images(cfg, "TRAIN", 3, metadata)
    assert [image.tolist() for image in images] == [prepared(files[i], metadata).tolist() for i in (0, 2)]
    assert f"The image {files[1]} cannot be used" in caplog.text and "It is left out." in caplog.text


def test_no_detections_to_export(configs: dict[str, CfgNode], tmp_path: Path) -> None:
    for detector, key in (
        ("faster-rcnn", "TEST.DETECTIONS_PER_IMAGE"),
        ("faster-rcnn", "MODEL.RPN.POST_NMS_TOPK_TEST"),
        ("retinanet", "MODEL.RETINANET.TOPK_CANDIDATES_TEST"),
    ):
        cfg = configs[detector].clone()
        cfg.merge_from_list([key, 0])
        with pytest.raises(UserError, match=rf"^{key} is 0, with which the exported file would have no detections\.$"):
            export_detector(cfg, str(tmp_path / "model.ts"))


def test_nothing_to_compare_is_not_called_equal(
    configs: dict[str, CfgNode], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = exporting.ExportOptions(score_thresh=0.999)
    assert export_detector(configs["retinanet"], str(tmp_path / "model.ts"), options).detections == 0
    assert "nothing was compared, since no score in the 7 images is above 0.999; export with a lower" in caplog.text
    assert "differ by at most" not in caplog.text


def test_the_target_of_a_link_is_replaced(configs: dict[str, CfgNode], tmp_path: Path) -> None:
    target, link = tmp_path / "files" / "target", tmp_path / "link.ts"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    export_detector(configs["retinanet"], str(link))
    assert link.is_symlink() and load_exported(str(link)).metadata.detector == "RetinaNet"
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    only_the_graph = tmp_path / "link.xml"
    only_the_graph.symlink_to(target.parent / "target.xml")
    with pytest.raises(UserError, match=r"link\.xml is a link, but .*link\.bin is not a link to the file beside"):
        export_detector(configs["retinanet"], str(only_the_graph))


def test_file_that_detects_something_else_is_not_written(
    configs: dict[str, CfgNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = exporting.WRITERS["onnx"]

    def write_another(graph: nn.Module, *arguments: object) -> None:
        graph.model.box2box_transform.weights = (1.1, 1.0, 1.0, 1.0)
        write(graph, *arguments)
        graph.model.box2box_transform.weights = (1.0, 1.0, 1.0, 1.0)

    monkeypatch.setitem(exporting.WRITERS, "onnx", write_another)
    with pytest.raises(UserError, match=r"was not written, since its detections differ from PyTorch's: \d+ have"):
        export_detector(configs["retinanet"], str(tmp_path / "model.onnx"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def run_folder(configs: dict[str, CfgNode], tmp_path: Path) -> Path:
    """Create the output folder of a RetinaNet training."""
    cfg, folder = configs["retinanet"], tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "model_final.pth").write_bytes(Path(cfg.MODEL.WEIGHTS).read_bytes())
    return folder


def test_evaluation_tells_that_the_file_has_another_image_size(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "student.ts"
    own, other = ("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 96), ("INPUT.MIN_SIZE_TEST", 48)
    for options, used, words in (
        ((*own,), own, ""),
        ((*own,), (*own, *other), "was exported with INPUT.MIN_SIZE_TEST 64 and MAX_SIZE_TEST 96, to which it resizes images"),
        (("--size", 64, 96, *own), own, "fits images into its fixed input size, 64 x 96 (height x width)"),
    ):  # fmt: skip
        run_command("export", "--model", run_folder, "--output", path, *options)
        capsys.readouterr()
        run_command("eval", "--model", run_folder, path, "OUTPUT_DIR", run_folder, *used)
        printed = "".join(capsys.readouterr())
        assert words in printed and ("of the config" in printed or "config's INPUT" in printed) == bool(words)


def test_command_prediction_and_evaluation(
    run_folder: Path, configs: dict[str, CfgNode], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that export, predict and eval work together: the file has the detections and the AP of the checkpoint."""
    path = tmp_path / "student.onnx"
    run_command("export", "--model", run_folder, "--output", path)
    assert "RetinaNet as onnx and in PyTorch: " in capsys.readouterr().out
    threshold = detector_threshold(path)
    images = Path(configs["retinanet"].MODEL.WEIGHTS).parent / "data" / "images"
    trees = []
    for number, model in enumerate((run_folder, path)):
        output = tmp_path / str(number)
        run_command("predict", "--model", model, "--input", images, "--output", output, "--score-thresh", threshold)
        trees.append(json.loads((output / "detections.json").read_text()))
    assert trees[0]["categories"] == trees[1]["categories"] and trees[0]["images"] == trees[1]["images"]
    expected, found = (tree["annotations"] for tree in trees)
    assert len(found) == len(expected) > 5
    np.testing.assert_allclose([a["bbox"] for a in found], [a["bbox"] for a in expected], atol=1e-2)
    np.testing.assert_allclose([a["score"] for a in found], [a["score"] for a in expected], atol=1e-4)
    assert [a["category_id"] for a in found] == [a["category_id"] for a in expected]

    run_command("eval", "--model", run_folder, "OUTPUT_DIR", run_folder)
    run_command("eval", "--model", run_folder, path, "OUTPUT_DIR", run_folder)
    of_checkpoint, of_file = (
        json.loads((run_folder / name).read_text()) for name in ("eval.json", "eval-student.onnx.json")
    )
    assert of_checkpoint["bbox"]["AP50"] > 0
    for key, value in of_checkpoint["bbox"].items():
        assert of_file["bbox"][key] == (value if value is None else pytest.approx(value, abs=0.05)), key


def test_evaluation_with_data_in_another_order(run_folder: Path, configs: dict[str, CfgNode], tmp_path: Path) -> None:
    """Check that the AP of each class is the same if the ids of the classes are others than in the training data."""
    path = tmp_path / "student.ts"
    run_command("export", "--model", run_folder, "--output", path)
    annotations = Path(configs["retinanet"].MODEL.WEIGHTS).parent / "data" / "annotations.json"
    original = annotations.read_text()
    tree = json.loads(original)
    for entry in tree["categories"]:
        entry["id"] = entry["id"] % 3 + 1
    for entry in tree["annotations"]:
        entry["category_id"] = entry["category_id"] % 3 + 1
    results = []
    try:
        for content in (original, json.dumps(tree)):
            annotations.write_text(content)
            run_command("eval", "--model", run_folder, path, "OUTPUT_DIR", run_folder)
            results.append(json.loads((run_folder / "eval-student.ts.json").read_text())["bbox"])
        assert max(results[0][f"AP-{name}"] for name in CLASSES) > 0
        assert all(results[1][f"AP-{name}"] == results[0][f"AP-{name}"] for name in CLASSES)
        tree["categories"][0]["name"] = "other"
        annotations.write_text(json.dumps(tree))
        with pytest.raises(SystemExit):
            run_command("eval", "--model", run_folder, path, "OUTPUT_DIR", run_folder)
    finally:
        annotations.write_text(original)


def test_example_without_detectron2(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Check that the example imports neither torch nor this library, and prints the checkpoint's detections."""
    weights = torch.load(run_folder / "model_final.pth")
    weights["model"]["head.cls_score.bias"] += 3  # scores above 0.5
    torch.save(weights, run_folder / "model_final.pth")
    path, image = tmp_path / "student.onnx", tmp_path / "image.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed rotated by 90 degrees
    run_command("export", "--model", run_folder, "--output", path)
    Image.fromarray(noise(120, 150, 7).permute(1, 2, 0).numpy()).save(image, exif=exif)
    source = (ROOT / "examples" / "detect_onnx.py").read_text()
    assert not any(f"import {name}" in source for name in ("torch", "detectron2", "kd_d2"))
    cfg = load_config(str(run_folder / "config.yaml"), ["MODEL.WEIGHTS", str(run_folder / "model_final.pth")])
    expected = Predictor(cfg, 0.5)(str(image))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["detect_onnx.py", str(path), str(image)])
    runpy.run_path(str(ROOT / "examples" / "detect_onnx.py"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(expected) > 0
    for line, box, score, label in zip(lines, expected.pred_boxes.tensor, expected.scores, expected.pred_classes):
        name, *numbers = line.split()
        assert name == CLASSES[label]
        np.testing.assert_allclose(list(map(float, numbers)), [float(score), *box.tolist()], atol=0.06)
    sys.argv.append("1.01")
    runpy.run_path(str(ROOT / "examples" / "detect_onnx.py"))
    assert capsys.readouterr() == ("", "No detection has a score of at least 1.01.\n")
    Image.new("RGB", (1, 3000)).save(image)
    runpy.run_path(str(ROOT / "examples" / "detect_onnx.py"))
    Image.fromarray(np.full((60, 60), 5000, np.uint16)).save(image)
    with pytest.raises(SystemExit, match="has more than 8 bits per value"):
        runpy.run_path(str(ROOT / "examples" / "detect_onnx.py"))


def test_example_resizes_as_detectron2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check sides that are rounded from half a pixel, limited by the longest side or not; and a damaged image."""
    metadata = {"class_names": "[]", "min_size": "400", "max_size": "667", "input_format": "RGB"}
    sizes = []

    class Session:
        def __init__(self, *_: object, **__: object):
            self.custom_metadata_map = {"nms": "true", "fixed_size": "null", **metadata}

        def get_modelmeta(self) -> Session:
            return self

        def run(self, _: list[str], inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
            sizes.append(inputs["image"].shape[1:])
            return np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0)

    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=Session))
    image = tmp_path / "image.jpg"
    monkeypatch.setattr(sys, "argv", ["detect_onnx.py", "model.onnx", str(image)])
    originals = [(265, 530), (530, 265), (184, 4), (46, 7), (333, 500), (300, 300), (640, 401)]
    for height, width in originals:
        Image.new("RGB", (width, height)).save(image)
        runpy.run_path(str(ROOT / "examples" / "detect_onnx.py"))
    assert sizes == [ResizeShortestEdge.get_output_shape(*size, 400, 667) for size in originals]
    image.write_bytes(image.read_bytes()[:-500])
    with pytest.raises(SystemExit, match=r"image\.jpg cannot be read: image file is truncated"):
        runpy.run_path(str(ROOT / "examples" / "detect_onnx.py"))


def test_only_the_images_in_use_are_needed(tmp_path: Path) -> None:
    """Check a training set whose images are missing, beside a test set without masks, and the reverse."""
    project = make_project(tmp_path, "retinanet")
    cfg = load_config(str(project.student), student_only=True)
    cfg.DATASETS.COCO_JSON = [
        *cfg.DATASETS.COCO_JSON,
        ["without_images", str(project.annotations), str(tmp_path / "none")],
    ]
    cfg.MODEL.MASK_ON = True
    for used, unused in (("TEST", "TRAIN"), ("TRAIN", "TEST")):
        cfg.DATASETS[used], cfg.DATASETS[unused] = (project.name,), ("without_images",)
        files = dataset_files(cfg, used, 2)
        assert len(files) == 2 and all(map(os.path.isfile, files))
        images = sorted(os.listdir(os.path.dirname(files[0])))
        assert [os.path.basename(file) for file in files] == [images[0], images[-1]]  # evenly spaced
        assert dataset_files(cfg, unused, 2) == []


def run_deploy(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["deploy.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "benchmarks" / "deploy.py"), run_name="__main__")


def test_benchmark_on_images_of_a_registered_dataset(
    configs: dict[str, CfgNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check a dataset with a file in COCO format that DATASETS.COCO_JSON does not name, with two of its images."""
    project = make_project(tmp_path, "retinanet")
    name = f"registered_{tmp_path.name}"
    register_coco_instances(name, {}, str(project.annotations), str(project.annotations.parent / "images"))
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    subset = runpy.run_path(str(ROOT / "benchmarks" / "deploy.py"))["subset"]
    cfg = configs["retinanet"].clone()
    cfg.DATASETS.TEST = (name,)
    subset(cfg, 2, str(tmp_path))
    every = json.loads(project.annotations.read_text())["images"]
    [chosen] = cfg.DATASETS.TEST
    files = [os.path.basename(entry["file_name"]) for entry in DatasetCatalog.get(chosen)]
    assert files == [os.path.basename(every[place]["file_name"]) for place in (0, -1)]
    assert MetadataCatalog.get(chosen).thing_classes == list(CLASSES)


@pytest.mark.slow
def test_benchmark_of_a_detector_that_a_runtime_refuses(
    configs: dict[str, CfgNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = configs["reppoints"].clone()
    folder, output = Path(cfg.MODEL.WEIGHTS).parent, tmp_path / "deploy.json"
    model = f"a={folder / 'plain.yaml'}"
    options = ("--images", 3, "--rounds", 1, "--calibration-images", 2, "--output", output)
    run_deploy(monkeypatch, "--model", model, cfg.MODEL.WEIGHTS, *options)
    printed = capsys.readouterr().out
    assert re.search(r"^a, OpenVINO: OpenVINO cannot run the ONNX file: .*DeformConv", printed, re.MULTILINE)
    assert re.search(r"^\| a +\| OpenVINO +\| +– +\| +– +\| +– +\| +– +\|$", printed, re.MULTILINE)
    rows = {row["runtime"]: row for row in json.loads(output.read_text())}
    refused = {runtime for runtime, row in rows.items() if row["ms"] is None}
    assert refused == {"OpenVINO", "OpenVINO, bfloat16", "OpenVINO, int8"} and len(rows) == 7
    assert rows["ONNX Runtime"]["AP"] == pytest.approx(rows["PyTorch"]["AP"], abs=0.05)


@pytest.mark.parametrize("datasets", ["()", "('coco_2017_val', 'coco_2017_train')"])
def test_benchmark_of_one_dataset(
    datasets: str, configs: dict[str, CfgNode], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = configs["retinanet"]
    config_file = Path(cfg.MODEL.WEIGHTS).with_name("plain.yaml")
    with pytest.raises(SystemExit):
        run_deploy(monkeypatch, "--model", config_file, cfg.MODEL.WEIGHTS, "DATASETS.TEST", datasets)
    assert re.search(r"^error: DATASETS\.TEST has [02] datasets; ", capsys.readouterr().err, re.MULTILINE)


def test_what_cannot_be_exported_is_one_sentence(
    run_folder: Path, configs: dict[str, CfgNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "notes.onnx").write_text("no model")
    (tmp_path / "notes.ts").write_text("no model")
    torch.jit.save(torch.jit.trace(nn.Identity(), torch.ones(1)), str(tmp_path / "other.ts"))
    rcnn = Path(configs["faster-rcnn"].MODEL.WEIGHTS).parent
    onnx_file = tmp_path / "x.onnx"
    predict = ("predict", "--input", rcnn / "data", "--output", tmp_path / "out", "--model")
    (tmp_path / "x.bin").mkdir()
    cases = [
        (("--output", tmp_path / "x.xml"), "x.bin, the file of its weights, is a folder; choose another name."),
        (("--output", tmp_path / "x.pt"), "the name must end with .onnx, .ts, .torchscript, .xml"),
        (("--output", tmp_path / "x.XML"), "the suffix of an OpenVINO file must be .xml in lower case"),
        (("--output", tmp_path / "x.ts", "--format", "onnx"), "--format is onnx, but --output"),
        (("--output", tmp_path / "x.ts", "--int8"), "--int8 needs an ONNX file"),
        (("--output", onnx_file, "--size", "0", "9"), "--size is (0, 9)"),
        (("--output", onnx_file, "--score-thresh", "2"), "--score-thresh is 2.0"),
        (("--output", onnx_file, "--int8", "--calibration-images", "0"), "--calibration-images is 0"),
        (("--output", onnx_file, "--int8", "DATASETS.TRAIN", "()"), "needs images of DATASETS.TRAIN"),
        (("--output", onnx_file, "--images", tmp_path / "none"), "--images: there is no file or folder"),
    ]
    commands = [(("export", "--model", run_folder, *arguments), words) for arguments, words in cases]
    commands += [
        (("export", "--model", run_folder / "config.yaml", "none.pth", "--output", onnx_file), "MODEL.WEIGHTS: there is no file"),
        (("export", "--model", rcnn / "plain.yaml", rcnn / "model.pth", "--output", onnx_file, "--no-nms"), "GeneralizedRCNN needs NMS internally"),
        (("export", "--model", tmp_path / "notes.onnx", "--output", onnx_file), "only by kd-d2 predict and eval"),
        ((*predict, tmp_path / "notes.onnx", rcnn / "model.pth"), "notes.onnx is an exported model, which includes its weights; leave out"),
        ((*predict, tmp_path / "none.onnx"), "There is no exported model"),
        ((*predict, tmp_path / "notes.onnx"), "cannot be read as onnx"),
        ((*predict, tmp_path / "notes.ts"), "cannot be read as torchscript"),
        ((*predict, tmp_path / "other.ts"), "was not written by kd-d2 export"),
        (("eval", "--model", tmp_path / "notes.onnx"), "names no data; use --model CONFIG_OR_RUN"),
    ]  # fmt: skip
    for command, words in commands:
        with pytest.raises(SystemExit) as ended:
            run_command(*command)
        assert ended.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and words in error, error
    assert not onnx_file.exists() and not (tmp_path / "out").exists()

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(
        UserError, match=r"The package onnx is required but not installed: pip install 'kd_d2\[export\]'"
    ):
        export_detector(configs["retinanet"], str(onnx_file))
    own = pytorch_model(configs["retinanet"])
    del own.test_nms_thresh, own.max_detections_per_image
    with pytest.raises(UserError, match="no attribute test_nms_thresh, max_detections_per_image, as RetinaNet has"):
        exporting.describe(configs["retinanet"], own, ExportOptions(nms=False))
    exporting.describe(configs["retinanet"], own, ExportOptions())
    del own.test_score_thresh
    with pytest.raises(
        UserError, match="RetinaNet has no attribute test_score_thresh, the score above which it returns"
    ):
        exporting.describe(configs["retinanet"], own, ExportOptions())
    keypoints = configs["faster-rcnn"].clone()
    model = pytorch_model(keypoints)
    model.roi_heads.keypoint_on = True
    with pytest.raises(UserError, match="keypoints cannot be exported"):
        exporting.check_detector(model)


def test_prediction_below_the_threshold_of_the_file(run_folder: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "student.ts"
    run_command("export", "--model", run_folder, "--output", path, "--score-thresh", "0.4")
    options = ("--input", run_folder, "--output", tmp_path / "out", "--model", path)
    Image.new("RGB", (64, 64)).save(run_folder / "a.png")
    for more, words in (
        (("--score-thresh", "0.3"), "returns no detections below 0.4"),
        (("MODEL.DEVICE", "cpu"), "the override MODEL.DEVICE has no effect"),
    ):
        with pytest.raises(SystemExit):
            run_command("predict", *options, *more)
        assert words in capsys.readouterr().err


def test_prediction_uses_the_higher_threshold_of_the_file(run_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "student.ts"
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    for of_file, used in (("0.6", 0.6), ("0.4", 0.5)):
        run_command("export", "--model", run_folder, "--output", path, "--score-thresh", of_file)
        run_command("predict", "--model", path, "--input", tmp_path / "a.png", "--output", tmp_path / "out")
        assert json.loads((tmp_path / "out" / "detections.json").read_text())["info"]["score_thresh"] == used


def test_onnx_runtime_sends_no_usage_data(tmp_path: Path) -> None:
    """Check in a separate process that importing it leaves no device identifier in the home directory."""
    code = "from kd_d2.export.running import needed_package; needed_package('onnxruntime')"
    environment = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**environment, "HOME": str(tmp_path)}, check=True)
    assert not list(tmp_path.rglob("*onnxruntime*"))
