"""Import of detectors from MMDetection."""

from __future__ import annotations

import gzip
import json
import logging
import re
import runpy
import sys
import types
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kd_d2.checkpoint import load_complete
from kd_d2.config import load_config, load_teacher_config
from kd_d2.errors import UserError
from kd_d2.inheritance import inherit
from kd_d2.mmdet import import_detector
from kd_d2.mmdet.reading import parse_mmdet_config
from kd_d2.modeling.building import build_detector

import numpy as np
import pytest
import torch
import yaml
from detectron2.modeling import build_model
from helpers import CLASSES as DATA_CLASSES
from helpers import example, make_project, run_command, train

FIXTURES = Path(__file__).parent / "fixtures"
make = SimpleNamespace(**runpy.run_path(str(FIXTURES / "make_mmdet_reference.py")))
REFERENCE = json.loads(gzip.decompress(make.FILE.read_bytes()))
CLASSES = ("cat", "dog", "owl")
WITHOUT_ROOT = {"atss", "fcos", "fcos-deformable", "fcos-normalized"}
"""Detectors whose score is class probability * centerness in MMDetection, and its square root in Detectron2."""


def state_of(name: str) -> dict[str, torch.Tensor]:
    entry = REFERENCE[name]
    return {key: torch.from_numpy(value) for key, value in make.weights_of(entry["shapes"], entry["input_std"]).items()}


def save(folder: Path, name: str, **changes: Any) -> Path:
    """Write a checkpoint as MMDetection 3 does."""
    content = {
        "meta": {
            "cfg": REFERENCE[name]["config"],
            "dataset_meta": {"classes": CLASSES, "palette": [(1, 2, 3)]},
            "epoch": 12,
        },
        "state_dict": state_of(name),
        "optimizer": {"state": {}},
    }
    path = folder / f"{name}.pth"
    torch.save({**content, **changes}, path)
    return path


def with_config(folder: Path, name: str, *replacements: tuple[str, str]) -> Path:
    """Write a checkpoint whose config has other text in some places."""
    config = REFERENCE[name]["config"]
    for old, new in replacements:
        assert old in config
        config = config.replace(old, new)
    return save(folder, name, meta={"cfg": config, "CLASSES": CLASSES})


def detector_in(folder: Path) -> tuple[torch.nn.Module, str]:
    """Return the imported detector with its weights, and its channel order."""
    cfg = load_config(folder / "config.yaml")
    model = build_detector(cfg).eval()
    load_complete(model, cfg.MODEL.WEIGHTS, "the detector")
    return model, cfg.INPUT.FORMAT


def detect(model: torch.nn.Module, channel_order: str) -> Any:
    pixels = make.image()[..., ::-1] if channel_order == "RGB" else make.image()
    image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    with torch.no_grad():
        return model([{"image": image, "height": 128, "width": 192}])[0]["instances"]


UNITS = ["boxes are in different units: another BBOX_REG_WEIGHTS, BOX_ACTIVATION or LEVEL_SCALES"]


@pytest.mark.parametrize("name", REFERENCE)
def test_detections_are_those_of_mmdetection(tmp_path: Path, name: str) -> None:
    """Check boxes, scores, classes and masks against those of MMDetection 3.3 with the same weights."""
    folder = tmp_path / "imported"
    # More detections, since Detectron2 removes boxes without area after choosing the best ones, MMDetection before.
    imported = import_detector(save(tmp_path, name), folder, opts=["TEST.DETECTIONS_PER_IMAGE", 2000])
    expected = REFERENCE[name]
    count = len(expected["labels"])
    found = detect(*detector_in(folder))[:count]
    assert imported.classes == CLASSES
    assert len(found) == count > 30
    scores = found.scores**2 if name in WITHOUT_ROOT else found.scores
    np.testing.assert_allclose(scores, expected["scores"], atol=2e-5)
    assert found.pred_classes.tolist() == expected["labels"]
    np.testing.assert_allclose(found.pred_boxes.tensor, expected["boxes"], atol=2e-2)
    if name == "mask-rcnn":
        np.testing.assert_allclose(found.pred_masks.sum((1, 2)), expected["mask_areas"], atol=20)


def test_masks_that_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check the warning if a Cascade R-CNN has masks, and that there is none if it has not."""
    for name, count in (("cascade-rcnn", 0), ("cascade-mask-rcnn", 1)):
        with caplog.at_level(logging.WARNING, "kd_d2"):
            assert not import_detector(save(tmp_path, name), tmp_path / name).cfg.MODEL.MASK_ON
        assert [message.partition(":")[0] for message in caplog.messages] == ["The masks are left out"] * count


TEST_PIPELINE_OF_2 = """
data = dict(test=dict(pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(640, 480), flip=False, transforms=[
        dict(type='Resize', keep_ratio=True),
        dict(type='Normalize', mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], to_rgb=False)])]))
"""


TEST_PIPELINE = "test_pipeline = [dict(type='Resize', scale=(640, 480), keep_ratio=True)]"


def test_a_config_of_mmdetection_2(tmp_path: Path) -> None:
    """Check normalization and size of images, which are in the test pipeline, and another file for the config."""
    config = parse_mmdet_config(REFERENCE["faster-rcnn"]["config"], "it")
    del config["model"]["data_preprocessor"]
    config["model"]["pretrained"] = "torchvision://resnet50"
    file = tmp_path / "config.py"
    file.write_text(f"'''A comment.'''\nmodel = {config['model']!r}\n{TEST_PIPELINE_OF_2}", encoding="utf-8")
    checkpoint = save(tmp_path, "faster-rcnn", meta={"CLASSES": CLASSES, "config": "no Python"})
    imported = import_detector(checkpoint, tmp_path / "imported", file, opts=["INPUT.MAX_SIZE_TEST", 700])
    cfg = load_config(tmp_path / "imported" / "config.yaml")
    assert (cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == ("BGR", 480, 700)
    assert (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD) == ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert imported.classes == CLASSES


def test_a_config_of_early_versions_of_mmdetection_2(tmp_path: Path) -> None:
    """Check that the names of MMDetection 2.0, and its test settings beside the model, mean the same."""
    config = parse_mmdet_config(REFERENCE["faster-rcnn"]["config"], "it")
    model = config["model"]
    new = import_detector(
        save(tmp_path, "faster-rcnn", meta={"cfg": f"model = {model!r}\n{TEST_PIPELINE}"}), tmp_path / "new"
    )
    layer, test = model["roi_head"]["bbox_roi_extractor"]["roi_layer"], model.pop("test_cfg")
    layer["out_size"], layer["sample_num"] = layer.pop("output_size"), layer.pop("sampling_ratio")
    test["rcnn"]["nms"] = {"type": "nms", "iou_thr": test["rcnn"]["nms"]["iou_threshold"]}
    test["rpn"] |= {
        "nms_thr": test["rpn"].pop("nms")["iou_threshold"],
        "max_num": test["rpn"].pop("max_per_img"),
        "nms_post": 7,
    }
    old = import_detector(
        save(tmp_path, "faster-rcnn", meta={"cfg": f"model = {model!r}\ntest_cfg = {test!r}\n{TEST_PIPELINE}"}),
        tmp_path / "old",
    )
    assert old.cfg == new.cfg
    assert (old.cfg.MODEL.RPN.NMS_THRESH, old.cfg.MODEL.RPN.POST_NMS_TOPK_TEST) == (0.7, 40)


@pytest.mark.parametrize(
    ("name", "usual", "other"),
    [
        ("retinanet", "type='RetinaHead'", "type='FreeAnchorRetinaHead', pre_anchor_topk=50, bbox_thr=0.6"),
        ("retinanet", "type='RetinaHead'", "type='PISARetinaHead'"),
        ("faster-rcnn", "type='StandardRoIHead'", "type='DynamicRoIHead'"),
        ("mask-rcnn", "type='StandardRoIHead'", "type='PISARoIHead'"),
    ],
)
def test_heads_that_differ_only_in_training(tmp_path: Path, name: str, usual: str, other: str) -> None:
    cfg = import_detector(with_config(tmp_path, name, (usual, other)), tmp_path / "other").cfg
    assert cfg == import_detector(save(tmp_path, name), tmp_path / "usual").cfg


@pytest.mark.parametrize(
    ("name", "bottom_up"),
    [("retinanet-swin", "Swin Transformer"), ("gfl-deformable", "deformable ResNeXt-50"), ("gfl", "ResNeXt-50")],
)
def test_the_name_of_the_bottom_up_network(tmp_path: Path, name: str, bottom_up: str) -> None:
    assert import_detector(save(tmp_path, name), tmp_path / "imported").bottom_up == bottom_up


def test_a_swin_transformer_with_an_output_that_the_neck_does_not_use(tmp_path: Path) -> None:
    """Check that its normalization is imported, and that detections are the same."""
    name = "retinanet-swin"
    weights = state_of(name) | {"backbone.norm0.weight": torch.ones(16), "backbone.norm0.bias": torch.zeros(16)}
    config = re.sub(r"out_indices=\(\s*1,", "out_indices=(0, 1,", REFERENCE[name]["config"])
    config = config.replace("start_level=0", "start_level=1")
    import_detector(save(tmp_path, name), tmp_path / "three")
    cfg = import_detector(save(tmp_path, name, meta={"cfg": config}, state_dict=weights), tmp_path / "four").cfg
    assert (cfg.MODEL.RESNETS.OUT_FEATURES, cfg.MODEL.FPN.IN_FEATURES) == (
        ["res2", "res3", "res4", "res5"], ["res3", "res4", "res5"]
    )  # fmt: skip
    three, four = (detect(*detector_in(tmp_path / folder)) for folder in ("three", "four"))
    assert four.scores.equal(three.scores) and four.pred_boxes.tensor.equal(three.pred_boxes.tensor)


def test_deformable_convolutions_with_the_names_of_mmdetection_1(tmp_path: Path) -> None:
    """Check that groups and offsets are those of the layer with today's names."""
    name = "faster-rcnn-deformable"
    new = import_detector(save(tmp_path, name), tmp_path / "new")
    old_config = REFERENCE[name]["config"].replace("deform_groups=", "deformable_groups=")
    old_weights = {key.replace("conv2.conv_offset", "conv2_offset"): tensor for key, tensor in state_of(name).items()}
    old = import_detector(save(tmp_path, name, meta={"cfg": old_config}, state_dict=old_weights), tmp_path / "old")
    assert old.cfg == new.cfg and old.cfg.MODEL.RESNETS.DEFORM_NUM_GROUPS == 4
    before, after = (torch.load(tmp_path / version / "model_final.pth")["model"] for version in ("new", "old"))
    assert before.keys() == after.keys() and all(after[key].equal(before[key]) for key in before)


@pytest.mark.parametrize("prefix", ["architecture", "student"])
def test_a_student_beside_its_teacher(tmp_path: Path, prefix: str) -> None:
    """Check that teacher and connectors are left out."""
    state = state_of("retinanet")
    whole = {f"{prefix}.{name}": value for name, value in state.items()}
    whole |= {"teacher.backbone.conv1.weight": torch.zeros(1), "distiller.connectors.a.weight": torch.zeros(1)}
    student = parse_mmdet_config(REFERENCE["retinanet"]["config"], "it")
    model = {"type": "FpnTeacherDistill", "architecture": student["model"], "teacher": {"cfg_path": "mmdet::x.py"}}
    config = f"model = {model!r}\ntest_pipeline = {student['test_pipeline']!r}"
    own = import_detector(save(tmp_path, "retinanet"), tmp_path / "own").cfg
    meta = {"cfg": config, "dataset_meta": {"classes": CLASSES}}
    cfg = import_detector(save(tmp_path, "retinanet", state_dict=whole, meta=meta), tmp_path / "student").cfg
    assert cfg == own
    written = [torch.load(tmp_path / name / "model_final.pth")["model"] for name in ("own", "student")]
    assert all(torch.equal(value, written[1][name]) for name, value in written[0].items())


@pytest.mark.parametrize(
    "config",
    [
        "model = dict(type='SingleTeacherDistill', architecture=dict(cfg_path='retinanet/r50.py'))",
        "distiller = dict(type='DetectionDistiller')\nstudent_cfg = 'retinanet/r50.py'",
    ],
)
def test_a_config_that_names_that_of_the_student(tmp_path: Path, config: str) -> None:
    path = save(tmp_path, "retinanet", meta={"cfg": config})
    with pytest.raises(UserError, match=r"of a distillation, .* the student, retinanet/r50\.py: name .* with --config"):
        import_detector(path, tmp_path / "imported")


def test_settings_of_the_test(tmp_path: Path) -> None:
    """Check thresholds and limits of an R-CNN, in which those of RPN and box head differ."""
    checkpoint = with_config(
        tmp_path, "faster-rcnn", ("iou_threshold=0.5", "iou_threshold=0.45"), ("nms_pre=1000", "nms_pre=900")
    )
    cfg = import_detector(checkpoint, tmp_path / "imported").cfg
    assert (cfg.MODEL.RPN.NMS_THRESH, cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST) == (0.7, 0.45)
    assert (cfg.MODEL.RPN.PRE_NMS_TOPK_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST) == (900, 40)
    assert (cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE) == (0.1, 40)
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 2
    dense = import_detector(
        with_config(tmp_path, "gfl", ("iou_threshold=1.0", "iou_threshold=0.55")), tmp_path / "dense"
    ).cfg
    assert (dense.MODEL.GFL.NMS_THRESH_TEST, dense.MODEL.GFL.TOPK_CANDIDATES_TEST) == (0.55, 1000)


@pytest.mark.parametrize(("name", "old", "new", "message"), [
    ("faster-rcnn", "type='FasterRCNN'", "type='DETR'", "model.type is 'DETR' in the MMDetection config; only 'RetinaNet' or 'GFL' or"),
    ("faster-rcnn", "type='ResNet'", "type='RegNet'", "model.backbone.type is 'RegNet' in the MMDetection config; only 'ResNet' or 'ResNeXt' or 'Swin"),
    ("mask-rcnn-swin", "patch_norm=True", "patch_norm=False", "model.backbone.patch_norm is False in the MMDetection config; only True can"),
    ("mask-rcnn-swin", "patch_norm=True", "use_abs_pos_embed=True", "model.backbone.use_abs_pos_embed is True"),
    ("retinanet-swin", "start_level=0", "start_level=1", "model.neck.start_level is 1 in the MMDetection config; only 0 can"),
    ("mask-rcnn-swin", "window_size=3", "window_size=7", "The MMDetection checkpoint does not fit the detector: backbone.bottom_up.layers.0.blocks.0.attn."),
    ("faster-rcnn", "num_stages=4", "num_stages=4, dcn=dict(type='DCNv3')", "model.backbone.dcn.type is 'DCNv3' in the MMDetection config; only 'DCN' or 'DCNv2' can"),
    ("faster-rcnn", "num_stages=4", "num_stages=4, dcn=dict(fallback_on_stride=True)", "model.backbone.dcn.fallback_on_stride is True"),
    ("faster-rcnn", "num_stages=4", "num_stages=4, plugins=[1]", "model.backbone.plugins is [1] in the MMDetection config; Detectron2"),
    ("gfl-deformable", "stage_with_dcn=", "stage_with_dcn=None, other=", "model.backbone.stage_with_dcn is None in the MMDetection config; it must be a list"),
    ("gfl-deformable", "deform_groups=1", "deform_groups=2", "The MMDetection checkpoint does not fit the detector: backbone.bottom_up.res4.0.conv2_offset."),
    ("faster-rcnn", "num_stages=4", "num_stages=4, deep_stem=True", "model.backbone.deep_stem is True in the MMDetection config; only False can"),
    ("faster-rcnn", "type='FPN'", "type='mmdet.models.PAFPN'", "model.neck.type is 'PAFPN'"),
    ("faster-rcnn", "num_outs=5", "num_outs=5, norm_cfg=dict(type='BN')", "model.neck.norm_cfg.type is 'BN'"),
    ("faster-rcnn", "type='Shared2FCBBoxHead'", "type='Shared4Conv1FCBBoxHead'", "model.roi_head.bbox_head.type is"),
    ("faster-rcnn", "type='RoIAlign'", "type='RoIAlign', aligned=False", "model.roi_head.bbox_roi_extractor.roi_layer.aligned is False"),
    ("retinanet", "type='nms'", "type='soft_nms'", "model.test_cfg.nms.type is 'soft_nms' in the MMDetection config; only 'nms' can"),
    ("retinanet", "scales_per_octave=3,", "scales_per_octave=3, center_offset=0.5,", "model.bbox_head.anchor_generator.center_offset is 0.5"),
    ("retinanet", "start_level=1", "start_level=0", "model.neck.start_level is 0"),
    ("retinanet", "keep_ratio=True", "keep_ratio=False", "the test pipeline's Resize.keep_ratio is False"),
    ("retinanet", "stacked_convs=2", "stacked_convs=3", "The MMDetection checkpoint has no bbox_head.cls_convs.2.conv.weight, which"),
    ("retinanet", "stacked_convs=2", "stacked_convs=1", "The MMDetection checkpoint has 4 weights for which the detector has no layer; the first one is bbox_head.cls_convs.1.conv.bias"),
    ("retinanet", "num_classes=3", "num_classes=4", "retinanet.pth has 3 class names, but its detector predicts 4 classes"),
    ("retinanet", "depth=50", "depth=101", "The MMDetection checkpoint does not fit the detector: backbone.bottom_up.res4.6.conv1.weight is missing"),
    ("retinanet", "out_channels=32", "out_channels=40", "model.bbox_head.in_channels is 32 in the MMDetection config; only 40 can"),
    ("gfl", "ratios=[", "ratios=[2.0, ", "model.bbox_head.anchor_generator.ratios is [2.0, 1.0]"),
    ("atss", "type='ATSSHead'", "type='ATSSHead', norm_cfg=dict(type='GN', num_groups=16)", "model.bbox_head.norm_cfg.num_groups is 16"),
    ("cascade-rcnn", "num_stages=3", "num_stages=2", "model.roi_head.num_stages is 2"),
    ("retinanet", "depth=50", "depth=dict(a=1)", "model.backbone.depth is {'a': 1} in the MMDetection config; only 18 or"),
    ("retinanet", "nms_pre=1000", "nms_pre=-1", "model.test_cfg.nms_pre is -1 in the MMDetection config; it must be a positive integer"),
    ("faster-rcnn", "max_per_img=40", "max_per_img=-1", "model.test_cfg.rpn.max_per_img is -1 in the MMDetection config; it must be a positive integer"),
    ("gfl", "score_thr=0.1", "score_thr=None", "model.test_cfg.score_thr is None in the MMDetection config; it must be a number"),
    ("retinanet", "std=[", "std=57.0, other=[", "model.data_preprocessor.std is 57.0 in the MMDetection config; it must be a list of numbers"),
    ("retinanet", "scales_per_octave=3", "scales_per_octave=2", "The MMDetection checkpoint does not fit the detector: bbox_head.retina_cls.weight is of shape (27, 32, 3, 3)"),
])  # fmt: skip
def test_what_detectron2_lacks_is_refused(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    """Check that the message names the setting or weight, and that nothing is written."""
    checkpoint = with_config(tmp_path, name, (old, new))
    with pytest.raises(UserError) as caught:
        import_detector(checkpoint, tmp_path / "imported")
    assert message in str(caught.value)
    assert not (tmp_path / "imported").exists()


class Recorder:
    """Runs a function when it is unpickled."""

    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('code of the checkpoint ran')",)


def test_other_objects_in_a_checkpoint_are_left_out(tmp_path: Path) -> None:
    """Check a checkpoint with the training history of MMEngine, a NumPy array and an object that would run code."""
    module = types.ModuleType("mmengine_like")
    history = type("HistoryBuffer", (), {"__module__": "mmengine_like", "mean": lambda self: 0})
    module.HistoryBuffer = history
    sys.modules["mmengine_like"] = module
    try:
        buffer = history()
        buffer.values, buffer.method = np.arange(3), buffer.mean
        path = save(tmp_path, "retinanet", message_hub={"loss": buffer}, hooks=[Recorder()], seed=np.int64(3))
    finally:
        del sys.modules["mmengine_like"]
    assert import_detector(path, tmp_path / "imported").classes == CLASSES


class Program(torch.nn.Module):
    """A TorchScript program that writes a file when it is loaded."""

    def __init__(self, file: Path):
        super().__init__()
        self.file = str(file)

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.file, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.file, self.training = state
        torch.save(torch.zeros(1), self.file)


def test_a_torchscript_program_is_refused_and_not_run(tmp_path: Path) -> None:
    """Check that it does not write its file, which it does when it is loaded with torch.load."""
    marker, path = tmp_path / "executed", tmp_path / "program.pth"
    torch.jit.script(Program(marker)).save(str(path))
    with pytest.raises(UserError, match="is a TorchScript program, not a checkpoint"):
        import_detector(path, tmp_path / "imported")
    assert not marker.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(("change", "message"), [
    ({"state_dict": None}, "is not a checkpoint of MMDetection: it has no state_dict"),
    ({"state_dict": {"a": [1.0]}}, "is not a dictionary of weights: its entry 'a' is not a tensor"),
    ({"state_dict": {3: torch.zeros(1)}}, "holds a dict, not a dictionary of weights by name"),
    ({"state_dict": {"a": torch.zeros(1).half().expand(10**13)}}, "its entry 'a' is an expanded tensor"),
    ({"meta": {}}, "has no config: name that of its training with --config"),
    ({"meta": None}, "has no config: name that of its training with --config"),
    ({"meta": {"dataset_meta": ["cat"]}}, "has no config: name that of its training with --config"),
    ({"meta": {"cfg": "model = dict("}}, "is not Python code"),
    ({"meta": {"cfg": "_base_ = ['a.py']"}}, "inherits from other files (_base_)"),
    ({"meta": {"cfg": "import os"}}, "has 'import os' in line 1, which is not a plain value"),
    ({"meta": {"cfg": "a = 1\nmodel = open('x')"}}, "has \"open('x')\" in line 2, which is not a plain value"),
    ({"meta": {"cfg": "c = range(2)\nmodel = dict(b=c)"}}, "has 'c' in line 2, which is not a plain value"),
    ({"meta": {"cfg": "model = dict([('b', 1)])"}}, "has \"dict([('b', 1)])\" in line 1, which is not a plain value"),
    ({"meta": {"cfg": "a = " + "[" * 5000 + "]" * 5000}}, "The config in"),
    ({"meta": {"cfg": "model = dict()"}}, "The MMDetection config has no model.type"),
    ({"meta": {"cfg": "a = 1"}}, "The MMDetection config has no model.type"),
    ({"meta": {"cfg": "model = 1"}}, "The MMDetection config has no model.type"),
])  # fmt: skip
def test_files_that_are_no_such_checkpoint(tmp_path: Path, change: dict, message: str) -> None:
    """Check that one sentence says what the file lacks."""
    with pytest.raises(UserError) as caught:
        import_detector(save(tmp_path, "retinanet", **change), tmp_path / "imported")
    assert message in str(caught.value)


def test_files_and_folders(tmp_path: Path) -> None:
    """Check a missing and a damaged checkpoint, a missing config, and a folder that is not empty."""
    checkpoint = save(tmp_path, "retinanet")
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(checkpoint.read_bytes()[:5000])
    for arguments, message in (
        ((tmp_path / "none.pth", tmp_path / "new"), "There is no checkpoint"),
        ((damaged, tmp_path / "new"), "is damaged or not a checkpoint"),
        ((checkpoint, tmp_path / "new", tmp_path / "none.py"), "cannot be read"),
        ((checkpoint, tmp_path), "exists already and is not an empty folder"),
    ):
        with pytest.raises(UserError, match=message):
            import_detector(*arguments)


def test_defaults_of_mmdetection(tmp_path: Path) -> None:
    """Check the box regression of a box head and of an RPN without settings, and types with the scope of a package."""
    coder = re.compile(r"bbox_coder=dict\(.*?type='DeltaXYWHBBoxCoder'\),", re.DOTALL)
    config, removed = coder.subn("", REFERENCE["faster-rcnn"]["config"])
    config = config.replace("type='RPNHead'", "type='mmdet.RPNHead'")
    cfg = import_detector(save(tmp_path, "faster-rcnn", meta={"cfg": config}), tmp_path / "imported").cfg
    assert removed == 2
    assert cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS == (10.0, 10.0, 5.0, 5.0)
    assert cfg.MODEL.RPN.BBOX_REG_WEIGHTS == (1.0, 1.0, 1.0, 1.0)


def test_what_only_training_needs(tmp_path: Path) -> None:
    """Check the state of a loss, and settings without effect on a trained detector."""
    config = REFERENCE["faster-rcnn"]["config"].replace(
        "num_classes=3", "num_classes=3, reg_decoded_bbox=True, loss_other=dict(a=1)"
    )
    state = {**state_of("faster-rcnn"), "roi_head.bbox_head.loss_bbox.acc_sum": torch.zeros(3)}
    import_detector(save(tmp_path, "faster-rcnn", meta={"cfg": config}, state_dict=state), tmp_path / "imported")


def test_values_in_configs() -> None:
    """Check literals, nested dicts in both forms, and names assigned before."""
    text = "size = (2, 3)\nmodel = dict(a=-1.5, b=[None, 'x'], c={'d': True, 'e': size}, f=dict({'g.h': 1}))\n"
    assert parse_mmdet_config(text, "it") == {
        "size": (2, 3),
        "model": {"a": -1.5, "b": [None, "x"], "c": {"d": True, "e": (2, 3)}, "f": {"g.h": 1}},
    }


def test_values_that_the_detector_does_not_need() -> None:
    """Check what MMDetection 2 writes for the number of GPUs, and what both versions write for an infinite number."""
    text = "gpu_ids = range(0, 8)\nhook = dict(limit=inf)\nmodel = dict(a=1)\nsame = hook\nlr = open('x')\nlr = 2"
    assert parse_mmdet_config(text, "it") == {"model": {"a": 1}, "lr": 2}


def test_a_teacher_from_mmdetection(
    tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """Check the program, and a training with the imported teacher, whose classes are in another order."""
    meta = {"cfg": REFERENCE["retinanet"]["config"], "dataset_meta": {"CLASSES": DATA_CLASSES[::-1]}}
    checkpoint = save(tmp_path, "retinanet", meta=meta)
    run_command("import-mmdet", checkpoint, tmp_path / "teacher", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.2")
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("RetinaNet with ResNet-50, 3 classes (blue, green, red), RGB images")
    assert last == f"As a teacher: MODEL.KD.TEACHER.CONFIG_FILE {tmp_path}/teacher/config.yaml"
    written = yaml.safe_load((tmp_path / "teacher" / "config.yaml").read_text())
    assert written["MODEL"]["RETINANET"]["SCORE_THRESH_TEST"] == 0.2
    assert torch.load(tmp_path / "teacher" / "model_final.pth")["class_names"] == list(DATA_CLASSES[::-1])
    project = make_project(
        tmp_path / "project",
        MODEL__KD__TEACHER__CONFIG_FILE=str(tmp_path / "teacher" / "config.yaml"),
        MODEL__KD__TEACHER__WEIGHTS="",
        MODEL__KD__FEATURE_IMITATION__ADAPTATION="1x1",
    )
    with caplog.at_level(logging.INFO):
        run = train(project, "SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 0)
    assert "The classes of the teacher are reordered" in caplog.text
    assert run.losses[0]["loss_feature_imitation"] > 0


@pytest.mark.parametrize(("name", "keys", "warnings", "reasons"), [
    ("atss", {}, [], []),
    ("atss", {"RELU_BEFORE_P7": True}, ["MODEL.KD.INHERIT: backbone.top_block.p7 is inherited, but MODEL.DENSE_FPN.RELU_BEFORE_P7 is True for the student and False"], []),
    ("atss", {"ANCHOR_OFFSET": 0.5}, ["MODEL.KD.INHERIT: the student's anchors are not the teacher's"], []),
    ("fcos", {}, [], []),
    ("fcos", {"ANCHOR_OFFSET": 0.0, "CENTERNESS_TOWER": "box"}, ["MODEL.KD.INHERIT: head.ctrness is inherited, but MODEL.FCOS.CENTERNESS_TOWER is box for the student and class", "MODEL.KD.INHERIT: the student's anchors are not the teacher's"], []),
    ("fcos", {"BOX_ACTIVATION": "relu"}, [], UNITS),
    ("fcos", {"LEVEL_SCALES": False}, [], UNITS),
    ("retinanet", {"BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0)}, [], UNITS),
])  # fmt: skip
def test_inheritance_from_an_imported_detector(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, keys: dict, warnings: list[str], reasons: list[str]
) -> None:
    """Check the warning if a student uses inherited layers in another way than its teacher, and that boxes in other units are not inherited."""
    cfg = import_detector(save(tmp_path, name), tmp_path / "teacher").cfg
    cfg.MODEL.DEVICE = "cpu"
    teacher = build_model(cfg)
    for key, value in keys.items():
        node = cfg.MODEL.DENSE_FPN if key in cfg.MODEL.DENSE_FPN else cfg.MODEL[name.upper()]
        node[key] = value
    with caplog.at_level(logging.WARNING, "kd_d2"):
        fit = inherit(build_model(cfg), teacher, ("neck", "head"))
    assert ("head.bbox_pred.weight" in fit.filled) == (not reasons)
    assert [*{*fit.misfits.values()}] == reasons
    assert [message[: len(start)] for message, start in zip(caplog.messages, warnings, strict=True)] == warnings


def test_p6_and_p7_of_the_dense_fpn(tiny_cfg: Any) -> None:
    """Check the source of P6, and P7 of a P6 that is negative everywhere, which a ReLU would set to zero."""
    cfg = tiny_cfg("retinanet", {"MODEL": {"BACKBONE": {"NAME": "build_dense_slim_resnet_fpn_backbone"}}})
    levels = {}
    for relu in (True, False):
        cfg.MODEL.DENSE_FPN.P6_SOURCE, cfg.MODEL.DENSE_FPN.RELU_BEFORE_P7 = "res5", relu
        backbone = build_model(cfg).backbone
        block = backbone.top_block
        assert block.p6.in_channels == backbone.bottom_up.output_shape()["res5"].channels
        torch.nn.init.zeros_(block.p6.weight), torch.nn.init.constant_(block.p6.bias, -2.0)
        torch.nn.init.ones_(block.p7.weight), torch.nn.init.zeros_(block.p7.bias)
        levels[relu] = backbone(torch.zeros(1, 3, 128, 128))["p7"]
    channels = levels[True].shape[1]
    # P6 has 2 x 2 positions, all within the only kernel of P7.
    assert torch.equal(levels[True], torch.zeros(1, channels, 1, 1))
    assert torch.equal(levels[False], torch.full((1, channels, 1, 1), -2.0 * 4 * channels))


@pytest.mark.parametrize("kind", ["fcos", "gfl", "fsaf", "reppoints"])
def test_the_offset_of_anchors(tiny_cfg: Any, kind: str) -> None:
    """Check the first anchor's center of the finest level, of stride 8."""
    cfg = tiny_cfg(kind, {})
    for offset in (0.0, 0.5):
        cfg.MODEL[kind.upper()].ANCHOR_OFFSET = offset
        anchors = build_model(cfg).anchor_generator([torch.zeros(1, 1, 2, 2)] * 5)[0].get_centers()
        assert anchors[0].tolist() == [8 * offset, 8 * offset]


def test_the_guides_student_of_an_imported_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Check that it is a valid distillation, and inherits the neck as the teacher uses it."""
    monkeypatch.chdir(tmp_path)
    import_detector(save(tmp_path, "retinanet"), "teacher")
    (tmp_path / "my.yaml").write_text(example("student of an imported teacher", "docs/guides/own-teacher.md"))
    (tmp_path / "resnet18.pth").touch()
    cfg = load_config("my.yaml", ["MODEL.DEVICE", "cpu"], needs_data=False)
    teacher = build_model(load_teacher_config(cfg))
    cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.KD.STUDENT
    with caplog.at_level(logging.WARNING, "kd_d2"):
        fit = inherit(build_model(cfg), teacher, ("neck", "head"))
    assert {"backbone.top_block.p7.weight", "head.bbox_pred.weight"} <= {*fit.filled} and not caplog.messages
