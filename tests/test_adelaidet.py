"""Import of FCOS from AdelaiDet."""

from __future__ import annotations

import gzip
import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kd_d2.adelaidet import import_detector
from kd_d2.checkpoint import load_complete
from kd_d2.config import load_config
from kd_d2.errors import UserError
from kd_d2.modeling.building import build_detector

import numpy as np
import pytest
import torch
import yaml
from helpers import make_project, run_command, train

FIXTURES = Path(__file__).parent / "fixtures"
make = SimpleNamespace(**runpy.run_path(str(FIXTURES / "make_adelaidet_reference.py")))
REFERENCE = json.loads(gzip.decompress(make.FILE.read_bytes()))


def weights_of(name: str) -> dict[str, torch.Tensor]:
    shapes = REFERENCE[name]["shapes"]
    pixel_std = yaml.safe_load(REFERENCE[name]["config"])["MODEL"]["PIXEL_STD"][0]
    return {key: torch.from_numpy(value) for key, value in make.weights_of(shapes, pixel_std).items()}


def save(folder: Path, name: str, weights: dict[str, torch.Tensor] | None = None, **keys: Any) -> Path:
    """Write a checkpoint and a config.yaml, in which some keys of MODEL.FCOS differ, as AdelaiDet does."""
    config = yaml.safe_load(REFERENCE[name]["config"])
    config["MODEL"]["FCOS"] |= keys
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    path = folder / "model_final.pth"
    torch.save({"model": weights_of(name) if weights is None else weights, "iteration": 89999}, path)
    return path


@pytest.mark.parametrize("name", REFERENCE)
def test_detections_are_those_of_adelaidet(tmp_path: Path, name: str) -> None:
    """Check boxes, scores and classes against those of AdelaiDet with the same weights."""
    imported = import_detector(save(tmp_path, name), tmp_path / "imported")
    cfg = load_config(tmp_path / "imported" / "config.yaml")
    model = build_detector(cfg).eval()
    load_complete(model, cfg.MODEL.WEIGHTS, "the detector")
    image = torch.from_numpy(make.image().transpose(2, 0, 1).copy())
    with torch.no_grad():
        found = model([{"image": image, "height": 128, "width": 192}])[0]["instances"]
    expected = REFERENCE[name]
    assert imported.classes is None  # three classes, but COCO has 80
    assert found.pred_classes.tolist() == expected["labels"]
    np.testing.assert_allclose(found.scores, expected["scores"], atol=2e-5)
    np.testing.assert_allclose(found.pred_boxes.tensor, expected["boxes"], atol=2e-2)


def test_settings_of_the_test(tmp_path: Path) -> None:
    """Check limits and thresholds, of which that of class probability * centerness becomes one of its square root."""
    limits = {"NMS_TH": 0.55, "PRE_NMS_TOPK_TEST": 900, "POST_NMS_TOPK_TEST": 50}
    for multiplied, threshold in ((False, 0.36), (True, 0.6)):
        path = save(tmp_path, "basic", THRESH_WITH_CTR=multiplied, INFERENCE_TH_TEST=0.36, **limits)
        cfg = import_detector(path, tmp_path / str(multiplied)).cfg
        assert pytest.approx(threshold) == cfg.MODEL.FCOS.SCORE_THRESH_TEST
        assert (cfg.MODEL.FCOS.NMS_THRESH_TEST, cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST) == (0.55, 900)
        assert cfg.TEST.DETECTIONS_PER_IMAGE == 50


def test_class_names_of_coco(tmp_path: Path) -> None:
    """Check that the names are those of the training data, if they are as many as the detector's classes."""
    weights = weights_of("basic")
    for kind in ("weight", "bias"):
        name = f"proposal_generator.fcos_head.cls_logits.{kind}"
        weights[name] = torch.zeros(80, *weights[name].shape[1:])
    weights["pixel_mean"] = torch.zeros(3, 1, 1)  # as early versions have it
    classes = import_detector(save(tmp_path, "basic", weights, NUM_CLASSES=80), tmp_path / "imported").classes
    assert classes is not None and (len(classes), classes[0], classes[79]) == (80, "person", "toothbrush")


def test_a_config_of_the_repository(tmp_path: Path) -> None:
    """Check a config with a base, without the keys that have AdelaiDet's defaults."""
    path = save(tmp_path, "basic")
    full = yaml.safe_load(REFERENCE["basic"]["config"])["MODEL"]
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"There is no file .*config\.yaml: name the config with which .* --config"):
        import_detector(path, tmp_path / "imported")
    base = {name: full[name] for name in ("META_ARCHITECTURE", "BACKBONE", "PROPOSAL_GENERATOR", "RESNETS", "FPN")}
    own = {"FCOS": {"NUM_CLASSES": 3, "NUM_CLS_CONVS": 2, "NUM_BOX_CONVS": 2}}
    (tmp_path / "Base-FCOS.yaml").write_text(
        yaml.safe_dump({"MODEL": base, "DATASETS": {"TRAIN": '("coco_2017_train",)'}})
    )
    (tmp_path / "R_50.yaml").write_text(
        yaml.safe_dump({"_BASE_": "Base-FCOS.yaml", "MODEL": own, "INPUT": {"MIN_SIZE_TEST": 512, "HFLIP_TRAIN": True}})
    )
    cfg = import_detector(path, tmp_path / "imported", tmp_path / "R_50.yaml", opts=["INPUT.MAX_SIZE_TEST", 700]).cfg
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (512, 700)
    assert cfg.MODEL.FCOS.LEVEL_SCALES and cfg.MODEL.FCOS.NORM == "GN"
    assert cfg.MODEL.BACKBONE.NAME == "build_dense_resnet_fpn_backbone"


@pytest.mark.parametrize(("keys", "message"), [
    ({"NORM": "SyncBN"}, "config.yaml: MODEL.FCOS.NORM is 'SyncBN'; only 'GN' or 'NaiveGN' or 'none' can be imported."),
    ({"NUM_SHARE_CONVS": 4}, "MODEL.FCOS.NUM_SHARE_CONVS is 4; only 0 can be imported."),
    ({"NUM_BOX_CONVS": 0}, "MODEL.FCOS.NUM_BOX_CONVS is 0; only 2 can be imported."),
    ({"TOP_LEVELS": 1}, "MODEL.FCOS.TOP_LEVELS is 1; only 0 or 2 can be imported."),
    ({"FPN_STRIDES": [8, 16, 32, 64, 100]}, "MODEL.FCOS.FPN_STRIDES is [8, 16, 32, 64, 100]; only [8, 16, 32, 64, 128] can be imported."),
    ({"IN_FEATURES": ["p2"]}, "config.yaml: MODEL.FCOS.IN_FEATURES is ['p2']; only some of p3, p4, p5, p6, p7 can be imported."),
    ({"IN_FEATURES": [["p3"]]}, "MODEL.FCOS.IN_FEATURES is [['p3']]; only some of p3, p4, p5, p6, p7 can be imported."),
    ({"IN_FEATURES": [], "FPN_STRIDES": []}, "MODEL.FCOS.IN_FEATURES is []; only some of p3, p4, p5, p6, p7 can be imported."),
    ({"INFERENCE_TH_TEST": -0.1, "THRESH_WITH_CTR": True}, "config.yaml: MODEL.FCOS.INFERENCE_TH_TEST is -0.1; it must be a number at least 0."),
    ({"POST_NMS_TOPK_TEST": -1}, "config.yaml: MODEL.FCOS.POST_NMS_TOPK_TEST is -1; it must be a number at least 1."),
    ({"NEW_KEY": 1}, "config.yaml: there is no config key MODEL.FCOS.NEW_KEY"),
    ({"NUM_CLASSES": "three"}, "MODEL.FCOS.NUM_CLASSES is 'three'; it must be of type int"),
    ({"NUM_CLASSES": 4}, "The AdelaiDet checkpoint does not fit the detector: head.cls_score.weight is"),
    ({"USE_SCALE": False}, "The AdelaiDet checkpoint has 5 weights for which the detector has no layer; the first one is proposal_generator.fcos_head.scales.0.scale."),
    ({"USE_DEFORMABLE": True}, "The AdelaiDet checkpoint does not fit the detector: head.cls_subnet.3.conv_offset.weight is missing."),
    ({"NUM_CLS_CONVS": 3, "NUM_BOX_CONVS": 3}, "The AdelaiDet checkpoint does not fit the detector: head.cls_subnet.6.weight is missing."),
])  # fmt: skip
def test_what_detectron2_lacks_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    """Check that the message names the key or weight, and that nothing is written."""
    with pytest.raises(UserError) as caught:
        import_detector(save(tmp_path, "basic", **keys), tmp_path / "imported")
    assert message in str(caught.value)
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(("node", "value", "message"), [
    ("META_ARCHITECTURE", "CondInst", "MODEL.META_ARCHITECTURE is 'CondInst'; only 'OneStageDetector' can be imported."),
    ("BACKBONE", {"NAME": "build_fcos_vovnet_fpn_backbone"}, "MODEL.BACKBONE.NAME is 'build_fcos_vovnet_fpn_backbone'; only"),
    ("BACKBONE", {"NAME": "build_fcos_resnet_fpn_backbone", "ANTI_ALIAS": True}, "MODEL.BACKBONE.ANTI_ALIAS is True; only False can be imported."),
    ("RESNETS", {"DEFORM_INTERVAL": 3}, "MODEL.RESNETS.DEFORM_INTERVAL is 3; only 1 can be imported."),
    ("MOBILENET", True, "MODEL.MOBILENET is True; only False can be imported."),
    ("FCOS", 3, "MODEL.FCOS is a group of keys and cannot be set to 3."),
])  # fmt: skip
def test_other_detectors_are_refused(tmp_path: Path, node: str, value: Any, message: str) -> None:
    path = save(tmp_path, "basic")
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["MODEL"][node] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError) as caught:
        import_detector(path, tmp_path / "imported")
    assert message in str(caught.value)


def test_a_teacher_from_adelaidet(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Check the program, and a training of an FCOS with an imported teacher that has deformable towers."""
    run_command("import-adelaidet", save(tmp_path, "deformable"), tmp_path / "teacher", "INPUT.MIN_SIZE_TEST", "256")
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "FCOS with deformable ResNeXt-50, 3 classes (names unknown), BGR images with a shorter side of 256"
    )
    assert last == f"As a teacher: MODEL.KD.TEACHER.CONFIG_FILE {tmp_path}/teacher/config.yaml"
    project = make_project(
        tmp_path / "project",
        "fcos",
        MODEL__KD__TEACHER__CONFIG_FILE=str(tmp_path / "teacher" / "config.yaml"),
        MODEL__KD__TEACHER__WEIGHTS="",
        MODEL__KD__DISTILLERS=["CrossKD"],
        MODEL__FPN__OUT_CHANNELS=32,
        MODEL__FCOS__NUM_CONVS=2,
        MODEL__FCOS__LEVEL_SCALES=True,
        MODEL__KD__CROSSKD__SPLIT=1,
        MODEL__KD__INHERIT__ENABLED=True,
    )
    run = train(project, "SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 0)
    assert all(run.losses[0][f"loss_crosskd_{part}"] > 0 for part in ("class", "box"))
