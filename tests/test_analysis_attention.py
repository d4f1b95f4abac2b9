"""`kd-d2 analyze attention`: pictures, numbers and error messages."""

import functools
import json
import re
from pathlib import Path

from kd_d2.analysis import attention as attention_module
from kd_d2.analysis.attention import AttentionAnalysis, draw_attention, share_inside
from kd_d2.analysis.drawing import per_pixel

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from helpers import Project, make_project, run_command, train

run = functools.partial(run_command, "analyze", "attention", "--model")
KEYS = {
    "MODEL__KD__DISTILLERS": ("ICD",),
    "MODEL__KD__ICD__DIM": 16,
    "MODEL__KD__ICD__NUM_HEADS": 2,
    "SOLVER__MAX_ITER": 1,
    "SOLVER__STEPS": (),
}


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Train ICD for one iteration."""
    project = make_project(tmp_path_factory.mktemp("icd"), "retinanet", **KEYS)
    train(project)
    return project


def test_a_picture_for_each_image_with_instances(distilled: Project, tmp_path: Path, capsys) -> None:
    weights = distilled.output / "model_final.pth"
    run(distilled.student, weights, "--output", tmp_path / "out", "--images", 3, "--instances", 2)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "000.png",
        "001.png",
        "003.png",
        "analysis.json",
        "attention.json",
        "pictures.json",
    ]  # the third image has no instances
    data = AttentionAnalysis.load(str(tmp_path / "out"))
    truth = json.loads(distilled.annotations.read_text())
    areas = [a["area"] / (64 * 96) for a in truth["annotations"] if a["image_id"] in (1, 2, 4)]
    assert (data.images, data.instances) == (3, len(areas)) == (3, 4)
    assert data.box_area == pytest.approx(sum(areas) / 4) and 0 < data.share_in_box < 1
    assert "% of an instance's attention lies in its box, which covers" in capsys.readouterr().out
    picture = cv2.imread(str(tmp_path / "out" / "001.png"))
    columns = 2 + 5  # the instance, all levels together, P3 to P7
    assert picture.shape[1] == columns * (200 + 8)
    assert picture.shape[0] == 2 * (300 + 34 + 8)


def test_share_inside_by_hand() -> None:
    """Check four cells of 8 pixels, one of them in the box, and a cell of 16 pixels, centered on the box's border."""
    target = Instances((16, 16), gt_boxes=Boxes(torch.tensor([[0.0, 0.0, 8.0, 8.0]])))
    attention = {8: torch.tensor([[[0.1, 0.2], [0.2, 0.2]]]), 16: torch.tensor([[[0.3]]])}
    inside, area = share_inside(attention, target)
    assert inside.tolist() == pytest.approx([0.4]) and area.tolist() == [0.25]


def test_share_inside_of_two_instances_of_a_wide_image() -> None:
    """Check a box on the right half's upper half, and one whose corner is the center of a cell."""
    boxes = Boxes(torch.tensor([[16.0, 0.0, 32.0, 8.0], [0.0, 0.0, 8.0, 8.0]]))
    target = Instances((16, 32), gt_boxes=boxes)
    fine = torch.tensor([[0.1, 0.05, 0.2, 0.05], [0.1, 0.1, 0.1, 0.0]])
    attention = {8: torch.stack([fine, 2 * fine]), 16: torch.tensor([[[0.1, 0.2]], [[0.3, 0.4]]])}
    inside, area = share_inside(attention, target)
    assert inside.tolist() == pytest.approx([0.2 + 0.05 + 0.2, 2 * 0.1 + 0.3])
    assert area.tolist() == [0.25, 0.125]


def test_the_largest_instances_are_drawn_with_their_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the titles and the sums of the heat maps of the second of two instances, the larger one."""
    titles, heats = [], []
    monkeypatch.setattr(attention_module, "titled", lambda picture, title: titles.append(title) or picture)
    monkeypatch.setattr(attention_module, "overlay_heat", lambda image, heat: heats.append(heat.sum()) or image)
    target = Instances((64, 96), gt_boxes=Boxes(torch.tensor([[0.0, 0.0, 8.0, 8.0], [16.0, 0.0, 48.0, 16.0]])))
    target.gt_classes = torch.tensor([0, 0])
    attention = {8: torch.zeros(2, 8, 12), 16: torch.zeros(2, 4, 6)}
    attention[8][0, 1, 1], attention[8][1, 2, 5], attention[16][1, 1, 2] = 1.0, 0.75, 0.25
    draw_attention(np.zeros((64, 96, 3), np.uint8), target, attention, ["thing"], count=1)
    assert titles == ["instance", "all levels", "stride 8: 75 %", "stride 16: 25 %"]
    assert heats == pytest.approx([1.0, 0.75, 0.25])


def test_what_is_said_about_the_attention() -> None:
    assert AttentionAnalysis(8, 20, 0.456, 0.123).sentences() == [
        "46 % of an instance's attention lies in its box, which covers 12 % of the image (means of 20 instances)."
    ]


def test_heat_lies_where_the_attention_is() -> None:
    """Check position and sum: a cell of stride 8 covers 64 pixels, and padding is cropped."""
    level = np.zeros((4, 4), np.float32)
    level[1, 2] = 1.0
    pixels = per_pixel(level, 8, (30, 28)) / 64
    assert pixels.shape == (30, 28)
    assert pixels.sum() == pytest.approx(1, abs=0.02)
    assert np.unravel_index(pixels.argmax(), pixels.shape)[0] in (11, 12)
    assert np.unravel_index(pixels.argmax(), pixels.shape)[1] in (19, 20)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("plain config", "--model student must be the config of a distillation: MODEL.META_ARCH"),
        ("other methods", "--model student must be the config of a distillation with ICD"),
        ("student alone", r"student.pth does not contain the ICD decoder of this config: it has none"),
        ("other width", r"does not contain the ICD decoder of this config: Missing key"),
        ("no such file", r"--model student.*nothing.pth"),
    ],
)
def test_what_cannot_be_drawn(distilled: Project, tmp_path: Path, capsys, what: str, message: str) -> None:
    weights, opts = distilled.output / "model_final.pth", ()
    if what == "plain config":
        opts = ("MODEL.META_ARCHITECTURE", "RetinaNet")
    elif what == "other methods":
        opts = ("MODEL.KD.DISTILLERS", "('FeatureImitation',)")
    elif what == "student alone":
        checkpoint = torch.load(weights, weights_only=True)
        weights = tmp_path / "student.pth"
        torch.save({"model": checkpoint["model"]}, weights)
    elif what == "other width":
        opts = ("MODEL.KD.ICD.DIM", "32")
    else:
        weights = tmp_path / "nothing.pth"
    with pytest.raises(SystemExit) as exit_status:
        run(distilled.student, weights, "--output", tmp_path / "out", *opts)
    assert exit_status.value.code == 2
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert re.search(message, error), error


@pytest.mark.parametrize("option", ["--images", "--instances"])
def test_counts_are_at_least_one(distilled: Project, tmp_path: Path, capsys, option: str) -> None:
    with pytest.raises(SystemExit):
        run(distilled.student, distilled.output / "model_final.pth", "--output", tmp_path / "out", option, 0)
    assert f"error: {option} is 0; it must be at least 1." in capsys.readouterr().err


def test_a_config_alone_has_no_decoder(distilled: Project, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        run(distilled.student, "--output", tmp_path / "out")
    assert "error: --model student: write the student's checkpoint after the config" in capsys.readouterr().err
