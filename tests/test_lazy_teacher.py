"""LazyConfigs: ViTDet and Swin backbones as teachers, untrusted files, and a student in Detectron2's own training."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

from kd_d2 import Teacher, UserError, load_config
from kd_d2.data import register_coco_json
from kd_d2.engine import evaluate_teacher
from kd_d2.lazy_teacher import build_lazy_teacher
from kd_d2.random_state import seeded

import pytest
import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from helpers import Project, example, make_project, train

ZOO_CONFIG = "new_baselines/mask_rcnn_R_50_FPN_50ep_LSJ.py"
DETECTOR = """
from functools import partial

import torch.nn as nn
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling import FPN, SimpleFeaturePyramid, SwinTransformer, ViT
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.roi_heads.num_classes = 3
model.roi_heads.mask_in_features = None
model.roi_heads.mask_pooler = None
model.roi_heads.mask_head = None
model.roi_heads.box_pooler.output_size = 3
model.roi_heads.box_head.conv_dims = []
model.roi_heads.box_head.fc_dims = [16]
for part in (model.proposal_generator.head, ):
    part.in_channels = 16
model.roi_heads.box_head.input_shape.channels = 16
model.roi_heads.box_head.input_shape.height = model.roi_heads.box_head.input_shape.width = 3
model.roi_heads.box_predictor.input_shape.channels = 16
"""
VITDET = (
    DETECTOR
    + """
model.input_format = "RGB"
model.backbone = L(SimpleFeaturePyramid)(
    net=L(ViT)(
        img_size=64, patch_size=16, embed_dim=24, depth=2, num_heads=2, window_size=4, mlp_ratio=2, qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), window_block_indexes=[0], residual_block_indexes=[], use_rel_pos=True,
        out_feature="last_feat",
    ),
    in_feature="${.net.out_feature}", out_channels=16, scale_factors=(4.0, 2.0, 1.0, 0.5), top_block=L(LastLevelMaxPool)(),
    norm="LN", square_pad=128,
)
"""
)
SWIN = (
    DETECTOR
    + """
model.backbone = L(FPN)(
    bottom_up=L(SwinTransformer)(depths=[1, 1, 1, 1], embed_dim=12, num_heads=[1, 2, 3, 4], window_size=4, drop_path_rate=0.0),
    in_features=("p0", "p1", "p2", "p3"), out_channels=16, square_pad=0, top_block=L(LastLevelMaxPool)(),
)
"""
)


def make_pair(folder: Path, student: str, config: str, **keys: object) -> Project:
    """Create a tiny project whose teacher is a LazyConfig with random weights."""
    project = make_project(folder, student, **keys)
    path = folder / "teacher.py"
    path.write_text(config)
    torch.manual_seed(0)
    torch.save({"model": instantiate(LazyConfig.load(str(path)).model).state_dict()}, folder / "lazy.pth")
    project.change(
        MODEL__KD__TEACHER__CONFIG_FILE="teacher.py",
        MODEL__KD__TEACHER__WEIGHTS="lazy.pth",
        MODEL__KD__TEACHER__TRUST_CONFIG=True,
        MODEL__KD__DISTILLERS=("FeatureImitation", "PKD", "MGD"),
        SOLVER__MAX_ITER=2,
        SOLVER__STEPS=(),
    )
    return project


@pytest.mark.parametrize("student", ["retinanet", "faster-rcnn"])
@pytest.mark.parametrize("config", [VITDET, SWIN], ids=["vitdet", "swin"])
def test_a_transformer_teaches(tmp_path: Path, student: str, config: str) -> None:
    """Check the losses of two iterations, also for a teacher with square images, and that the teacher is unchanged."""
    project = make_pair(tmp_path, student, config)
    run = train(project)
    names = {"loss_feature_imitation", "loss_pkd", "loss_mgd"}
    for losses in run.losses.values():
        assert names <= losses.keys() and all(math.isfinite(value) and value > 0 for value in losses.values())
    teacher, saved = run.trainer.bare_model.teacher.model, torch.load(tmp_path / "lazy.pth")["model"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in teacher.state_dict().items())


def test_images_that_do_not_fit_into_the_teachers_squares(tmp_path: Path) -> None:
    """Check a training and an evaluation of the teacher, which would be of cropped images."""
    project = make_pair(tmp_path, "retinanet", VITDET.replace("square_pad=128", "square_pad=64"))
    expected = "padded to squares of 64 pixels .* one has a side of .* set INPUT.MAX_SIZE_TRAIN and INPUT.MAX_SIZE_TEST to at most 64"
    with pytest.raises(UserError, match=expected):
        train(project)
    cfg = load_config(str(project.student), ["OUTPUT_DIR", str(project.output)])
    register_coco_json(cfg)
    with pytest.raises(UserError, match=expected):
        evaluate_teacher(cfg, Teacher.from_config(cfg))


def test_a_format_that_cannot_be_converted(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    with pytest.raises(UserError, match=r"is YUV-BT.601 and the teacher's RGB: images are converted only between"):
        Teacher.from_config(load_config(str(project.student), ["INPUT.FORMAT", "YUV-BT.601"]))


def test_the_channel_order_of_the_config(tmp_path: Path) -> None:
    """Check that an RGB teacher gets the images of a BGR student with flipped channels."""
    project = make_pair(tmp_path, "retinanet", VITDET)
    teacher = Teacher.from_config(load_config(str(project.student), ["INPUT.FORMAT", "BGR"]))
    image = torch.stack([torch.full((4, 4), float(channel)) for channel in range(3)])
    assert teacher.flip_channels
    assert teacher.to_input_format([{"image": image}])[0]["image"][:, 0, 0].tolist() == [2, 1, 0]


MAPPER = """
dataloader = {"train": {"mapper": {"image_format": "RGB"}, "dataset": L("nowhere.Data")(names="${gone}")}}
"""


def test_the_channel_order_of_the_mapper(tmp_path: Path) -> None:
    """Check that it is that of a model without `input_format`, and has to be that of a model with one."""
    project = make_pair(tmp_path, "retinanet", SWIN)
    path, cfg = tmp_path / "teacher.py", load_config(str(project.student))

    def channel_order(config: str) -> str:
        path.write_text(config)
        return build_lazy_teacher(cfg)[2]

    without = SWIN + "del model.input_format\n"
    assert channel_order(without) == channel_order(without + 'dataloader = {"train": "${gone}"}\n') == "BGR"
    assert channel_order(without + MAPPER) == channel_order(SWIN + MAPPER + 'model.input_format = "RGB"\n') == "RGB"
    with pytest.raises(
        UserError, match=r"mapper.image_format is RGB, but model.input_format is BGR; .*input_format=RGB"
    ):
        channel_order(SWIN + MAPPER)


def test_overrides(tmp_path: Path) -> None:
    project = make_pair(tmp_path, "retinanet", SWIN)
    cfg = load_config(str(project.student), ["MODEL.KD.TEACHER.OPTS", ["model.roi_heads.num_classes=7"]])
    assert build_lazy_teacher(cfg)[0].roi_heads.num_classes == 7


@pytest.mark.parametrize(
    ("config", "opts", "expected"),
    [
        ("open('ran', 'w')", ["MODEL.KD.TEACHER.TRUST_CONFIG", False], "set MODEL.KD.TEACHER.TRUST_CONFIG True if you trust"),
        ("model = 1 / 0", [], r"cannot be loaded \(ZeroDivisionError"),
        ("other = dict(a=1)", [], "defines no `model`"),
        ("from detectron2.config import LazyCall as L\nmodel = L(int)(x='a')", [], "its model cannot be built"),
        (SWIN, ["MODEL.KD.TEACHER.OPTS", ["model.x"]], "cannot be applied to .* write KEY=VALUE"),
        (SWIN, ["MODEL.KD.TEACHER.WEIGHTS", ""], "the model zoo has no checkpoint for .*teacher.py: name the teacher's checkpoint"),
    ],
    ids=["not trusted", "error", "no model", "not a detector", "invalid override", "no weights"],
)  # fmt: skip
def test_what_cannot_be_a_teacher(tmp_path: Path, monkeypatch, config: str, opts: list, expected: str) -> None:
    """Check each error, and that an untrusted file is not executed."""
    monkeypatch.chdir(tmp_path)
    project = make_pair(tmp_path / "project", "retinanet", SWIN)
    (tmp_path / "project" / "teacher.py").write_text(config)
    with pytest.raises(UserError, match=expected):
        build_lazy_teacher(load_config(str(project.student), opts))
    assert not (tmp_path / "ran").exists()


def test_a_config_of_the_model_zoo(tmp_path: Path) -> None:
    """Check that a config that Detectron2 ships is trusted."""
    project = make_project(tmp_path)
    opts = ["MODEL.KD.TEACHER.CONFIG_FILE", ZOO_CONFIG]
    model, weights, input_format = build_lazy_teacher(load_config(str(project.student), opts))
    assert type(model).__name__ == "GeneralizedRCNN" and input_format == "BGR"
    assert weights == str(project.teacher_weights)


@pytest.mark.parametrize(
    "override",
    [
        "+model.hook={_target_: builtins.open, file: ran, mode: w}",
        "+model.list=[1, {_target_: builtins.open, file: ran, mode: w}]",
        "model._target_=builtins.print",
        "+model={hook: {_target_: builtins.open, file: ran, mode: w}}",
        "+model.hook=${oc.create:{_target_:builtins.open,file:ran,mode:w}}",
        "+model.hook='${oc.decode:\"{_target_: builtins.open, file: ran, mode: w}\"}'",
        "+model.hook=$\\{oc.decode:x\\}",
    ],
)
def test_overrides_run_code_only_if_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str) -> None:
    monkeypatch.chdir(tmp_path)
    project = make_project(tmp_path)
    zoo = ["MODEL.KD.TEACHER.CONFIG_FILE", ZOO_CONFIG, "MODEL.KD.TEACHER.OPTS"]
    with pytest.raises(UserError, match=r"OPTS (sets model\..*TRUST_CONFIG True|.* cannot be applied)"):
        build_lazy_teacher(load_config(str(project.student), [*zoo, [override]]))
    assert not (tmp_path / "ran").exists()


def test_an_override_that_runs_no_code(tmp_path: Path) -> None:
    zoo = ["MODEL.KD.TEACHER.CONFIG_FILE", ZOO_CONFIG, "MODEL.KD.TEACHER.OPTS", ["model.roi_heads.num_classes=7"]]
    cfg = load_config(str(make_project(tmp_path).student), zoo)
    assert build_lazy_teacher(cfg)[0].roi_heads.num_classes == 7


def test_the_example_of_a_lazy_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_inputs: Callable) -> None:
    """Check the guide's files with smaller detectors: training, the teacher, and the student's checkpoint."""
    for file, name in (("distilled.py", "own training"), ("distill_R50.py", "lazy student")):
        (tmp_path / file).write_text(example(name, "docs/guides/own-training.md"))
    (tmp_path / "swin.py").write_text(SWIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    cfg, small = (LazyConfig.load(str(tmp_path / file)) for file in ("distill_R50.py", "swin.py"))
    small.model.roi_heads.box_predictor.test_score_thresh = 0.0
    weights = instantiate(small.model).state_dict()
    torch.save({"model": weights}, tmp_path / "teacher.pth")
    cfg.model.update(student=small.model, teacher=small.model, teacher_weights=str(tmp_path / "teacher.pth"))
    model = instantiate(cfg.model).train()
    inherited = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(model.student.state_dict()[inherited], weights[inherited])
    cfg.optimizer.params.model = model
    trainer = SimpleTrainer(model, [make_inputs()] * 2, instantiate(cfg.optimizer))
    trainer.train(0, 2)
    assert trainer.storage.history("loss_pkd").latest() > 0
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.teacher.model.state_dict().items())
    DetectionCheckpointer(model.student, str(tmp_path)).save("student")
    saved = torch.load(tmp_path / "student.pth")["model"]
    student = instantiate(small.model)
    student.load_state_dict(saved)
    assert not torch.equal(saved["backbone.fpn_output2.weight"], weights["backbone.fpn_output2.weight"])
    ours, theirs = (detector.eval()(make_inputs())[0]["instances"] for detector in (model, student))
    assert torch.equal(ours.scores, theirs.scores) and len(ours)


def test_a_yaml_config_of_the_lazy_student(tmp_path: Path) -> None:
    """Check that the guide's YAML config has the detections of its LazyConfig with the same weights."""
    config = tmp_path / "student.yaml"
    config.write_text(example("config of the lazy student", "docs/guides/own-training.md"))
    keep = {"SCORE_THRESH_TEST": 0.0, "NMS_THRESH_TEST": 1.0}
    cfg = load_config(str(config), ["MODEL.DEVICE", "cpu", "MODEL.RPN.NMS_THRESH", 1.0, "MODEL.ROI_HEADS", keep])
    lazy = model_zoo.get_config("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py").model
    lazy.proposal_generator.nms_thresh = 1.0
    lazy.roi_heads.box_predictor.update(test_score_thresh=0.0, test_nms_thresh=1.0)
    with seeded(0):
        theirs, ours = instantiate(lazy).eval(), build_model(cfg).eval()
    ours.load_state_dict(theirs.state_dict())
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0)) * 255
    with torch.no_grad():
        expected, found = (detector([{"image": image}])[0]["instances"] for detector in (theirs, ours))
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.pred_masks, expected.pred_masks) and len(found) > 10
