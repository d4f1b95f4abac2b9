"""`kd-d2 analyze thresholds` on tiny detectors: files, tables, and error messages."""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path

from kd_d2.analysis import load_analysis
from kd_d2.analysis.thresholds import ThresholdAnalysis, confusion_matrix
from kd_d2.analysis.thresholds.analysis import SAVED

import cv2
import numpy as np
import pytest
from helpers import Project, data_arguments, make_project, run_command, teacher_arguments

run = functools.partial(run_command, "analyze", "thresholds")


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _known_detections(project: Project) -> list[dict]:
    """Return a detection of each object with its class and score 0.75, and one of a green object on every image, 0.25."""
    truth = json.loads(project.annotations.read_text())
    right = [{**{k: a[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.75} for a in truth["annotations"]]
    return right + [
        {"image_id": i["id"], "category_id": 2, "bbox": [0, 0, 4, 4], "score": 0.25} for i in truth["images"]
    ]


def test_two_models_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check files, tables and the printed command, with detections replaced by known ones, and the loaded analysis."""
    project, output = make_project(tmp_path), tmp_path / "out"
    known = _known_detections(project)
    objects = len(known) - 6
    of_model = {"perfect": known, "the other": known[:1] + known[objects:]}
    monkeypatch.setattr("kd_d2.analysis.TrainedModel.detections", lambda model, output: of_model[model.title])
    options = ["--output", output, "--precision", 0.9, "--recall", 0.9]
    run(
        *teacher_arguments(project, "perfect"),
        *teacher_arguments(project, "the other"),
        *options,
        *data_arguments(project),
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert "kd-d2 predict --model MODEL --input IMAGES --output FOLDER --score-thresh 0.74" in printed
    assert "Choose a threshold on other images than those" in printed
    assert f"| perfect, largest F1 | 0.74 | 1.000 | 1.000 | 1.000 | {objects} | 0 | 0 |" in printed
    assert "| the other, recall >= 0.9 | none | - | - | - | - | - | - |" in printed

    chosen = {(r["model"], r["class"], r["criterion"]): r for r in _rows(output / "thresholds.csv")}
    assert len(chosen) == 2 * (1 + 3) * 3
    best = chosen["perfect", "all", "largest F1"]
    assert [best[key] for key in ("threshold", "precision", "tp", "fp", "fn")] == [
        "0.74", "1.0000", str(objects), "0", "0",
    ]  # fmt: skip
    assert chosen["the other", "all", "recall >= 0.9"]["threshold"] == ""
    curves = [r for r in _rows(output / "curves.csv") if (r["model"], r["class"]) == ("perfect", "all")]
    assert [(r["threshold"], r["tp"], r["fp"]) for r in curves] == [
        ("0.74", str(objects), "0"), ("0.24", str(objects), "6"),
    ]  # fmt: skip
    truth = json.loads(project.annotations.read_text())
    matrix = [[r[key] for key in ("red", "green", "blue", "missed")] for r in _rows(output / "confusion.csv")[:4]]
    assert np.array_equal(np.array(matrix, int), confusion_matrix(truth, known, 0.74))
    names = ["confusion/perfect.png", "confusion/the other.png", "curves.png"]
    assert sorted(json.loads((output / "pictures.json").read_text())["thresholds"]) == names
    for name in names:
        assert cv2.imread(str(output / name)).std() > 0
    loaded = load_analysis(str(output))
    assert isinstance(loaded, ThresholdAnalysis)
    assert " ".join(loaded.summary().split()) in printed
    assert [table.caption for table in loaded.details()] == [
        "By class: largest F1.", "By class: precision >= 0.9.", "By class: recall >= 0.9.",
    ]  # fmt: skip


def test_a_detector_without_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Check real detections, of which hardly any is true, a class without objects, and the size of the curves."""
    project, output = make_project(tmp_path), tmp_path / "out"
    project.change_annotations(lambda tree: [a.update(category_id=1) for a in tree["annotations"]])
    run(*teacher_arguments(project, "one"), "--output", output, "--iou", 0.01, *data_arguments(project))
    printed = capsys.readouterr().out
    assert "nan" not in printed
    rows = _rows(output / "curves.csv")
    assert {r["class"] for r in rows} == {"all", "red", "green", "blue"}
    assert max(sum(r["class"] == name for r in rows) for name in ("all", "red")) <= SAVED
    details = ThresholdAnalysis.load(str(output)).details()[0].rows
    assert details[1] == ["green, one", "0", *["-"] * 7]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--iou", 0], "--iou is 0.0; it must be greater than 0 and at most 1"),
        (["--iou", 1.5], "--iou is 1.5; it must be greater than 0 and at most 1"),
        (["--precision", "nan"], "--precision is nan; it must be greater than 0 and at most 1"),
        (["--recall", 90], "--recall is 90.0; it must be greater than 0 and at most 1"),
        (["--output", "/dev/null/out"], "--output /dev/null/out cannot be written: Not a directory"),
    ],
)
def test_what_cannot_be_analyzed(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, arguments: list, expected: str
) -> None:
    monkeypatch.setattr("kd_d2.analysis.TrainedModel.detections", lambda *arguments: pytest.fail("evaluated"))
    project = make_project(tmp_path)
    with pytest.raises(SystemExit):
        run(*teacher_arguments(project, "one"), "--output", tmp_path / "out", *arguments, *data_arguments(project))
    assert expected in capfd.readouterr().err


def test_annotations_without_objects(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check a test set of which all objects are crowds."""
    monkeypatch.setattr("kd_d2.analysis.TrainedModel.detections", lambda *arguments: pytest.fail("evaluated"))
    project = make_project(tmp_path)
    project.change_annotations(lambda tree: [a.update(iscrowd=1) for a in tree["annotations"]])
    with pytest.raises(SystemExit):
        run(*teacher_arguments(project, "one"), "--output", tmp_path / "out", *data_arguments(project))
    assert "The annotations have no objects: there is nothing to analyze" in capfd.readouterr().err
