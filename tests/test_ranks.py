"""tools/ranks.py: detections find their anchors, pictures for data and files, and what it says of input that it cannot use."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from kd_d2.detectors import build_adapter

import cv2
import pytest
import torch
from helpers import ROOT, Project, clean_process, make_project, train

PROGRAM = str(ROOT / "tools" / "ranks.py")


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One iteration of Rank Mimicking and PFI, and its checkpoint."""
    keys = {
        "MODEL__KD__DISTILLERS": ("RankMimicking", "PFI"),
        "MODEL__KD__PFI__ADAPTATION": "1x1",
        "SOLVER__MAX_ITER": 1,
        "SOLVER__STEPS": (),
    }
    project = make_project(tmp_path_factory.mktemp("ranks"), "retinanet", **keys)
    train(project)
    return project


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch, distilled: Project, tmp_path: Path) -> Callable[..., list[str]]:
    """Run the program as from a command line, in this process; the names of what it drew."""

    def run(*more: object, config: Path = distilled.student) -> list[str]:
        weights = distilled.output / "model_final.pth"
        argv = ["--config-file", config, "--weights", weights, "--output", tmp_path / "out", *more]
        monkeypatch.setattr(sys, "argv", [PROGRAM, *(str(a) for a in argv)])
        with clean_process():
            runpy.run_path(PROGRAM, run_name="__main__")
        return sorted(p.name for p in (tmp_path / "out").iterdir())

    return run


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "atss", "gfl"])
def test_detections_come_from_their_anchors(kind: str, tiny_detector: Callable, make_inputs: Callable) -> None:
    """Check that the box and the score at each detection's anchor are the detection's."""
    model = tiny_detector(kind).eval()
    with torch.no_grad():
        model.head.cls_score.weight.normal_(std=0.5)
        model.head.bbox_pred.weight.normal_(std=0.2)
        outputs = build_adapter(model).run(make_inputs()[:1], frozenset({"features", "dense"}))
    detect = runpy.run_path(PROGRAM, run_name="ranks")["detect"]
    found, anchors = detect(model, outputs, 0.0)
    assert len(found) == len(anchors) > 10
    boxes = torch.cat([*outputs.dense.boxes.values()], 1)[0][found.anchor]
    expected = boxes.clamp(min=0).minimum(torch.tensor([80.0, 64.0]).repeat(2))
    torch.testing.assert_close(found.pred_boxes.tensor, expected, rtol=1e-4, atol=1e-2)
    scores = torch.cat([*outputs.dense.ranking_scores.values()], 1)[0][found.anchor]
    torch.testing.assert_close(found.scores, scores[torch.arange(len(found)), found.pred_classes])


def test_a_picture_for_each_image_with_instances(draw: Callable, capsys) -> None:
    assert draw("--images", 3, "--instances", 1, "--score-thresh", 0.0) == ["000.png", "001.png", "003.png"]
    assert capsys.readouterr().out.count(".png") == 3


def test_files_of_ones_own_have_no_ranks(draw: Callable, distilled: Project, tmp_path: Path) -> None:
    image = distilled.annotations.parent / "images" / "001.png"
    assert draw("--input", image) == ["001.png"]
    picture = cv2.imread(str(tmp_path / "out" / "001.png"))
    assert picture.shape == (
        3 * (360 + 34 + 8),
        6 * (240 + 8),
        3,
    )  # detections, predictions, features; all and P3 to P7


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--input", "nowhere.png"), "--input: nowhere.png cannot be read as an image"),
        (("MODEL.META_ARCHITECTURE", "RetinaNet"), "MODEL.META_ARCHITECTURE is not KDMetaArch"),
        (("MODEL.RETINANET.NUM_CLASSES", 4), "3"),
    ],
)
def test_what_cannot_be_drawn(draw: Callable, capsys, more: tuple, message: str) -> None:
    with pytest.raises(SystemExit):
        draw(*more)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_detectors_without_dense_predictions(draw: Callable, tmp_path: Path, capsys) -> None:
    config = make_project(tmp_path / "rcnn", "faster-rcnn").student
    with pytest.raises(SystemExit):
        draw(config=config)
    assert "error: The student (GeneralizedRCNN) has no dense predictions to compare." in capsys.readouterr().err
