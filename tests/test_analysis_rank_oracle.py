"""`kd-d2 analyze rank-oracle`: scores in the teacher's order, and the teacher's scores; by hand and as a command."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from kd_d2.adapters import BACKGROUND, DensePredictions, build_adapter
from kd_d2.analysis.examples import read_examples
from kd_d2.analysis.rank_oracle import RANKS, SCORES, STUDENT, detect_with, exchanged_logits, rank_oracle
from kd_d2.config import load_config
from kd_d2.data import register_coco_json
from kd_d2.errors import UserError
from kd_d2.losses import reordered

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.structures import Boxes, Instances
from helpers import clean_process, make_project, run_command, train

run = functools.partial(run_command, "analyze", "rank-oracle")


def test_scores_in_another_order_by_hand() -> None:
    """Check interleaved instances with three, two and one positives."""
    scores = torch.tensor([5.0, 1.0, 7.0, 2.0, 9.0, 4.0])
    other = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.5, 0.2])
    instances = torch.tensor([3, 3, 0, 3, 0, 8])
    assert reordered(scores, other, instances).tolist() == [1.0, 5.0, 7.0, 2.0, 9.0, 4.0]
    assert reordered(scores, -other, instances).tolist() == [5.0, 1.0, 9.0, 2.0, 7.0, 4.0]
    assert reordered(scores[:0], other[:0], instances[:0]).tolist() == []


def _dense(logits: list[list[float]]) -> DensePredictions:
    """Return an image's predictions for four anchors on two levels, two classes; the first three match one object."""
    tensor = torch.tensor([logits])
    anchors = Boxes(torch.zeros(2, 4))
    return DensePredictions(
        logits={8: tensor[:, :2], 16: tensor[:, 2:]},
        box_regression={},
        anchors={8: anchors, 16: anchors},
        decode=lambda regression, anchors: regression,
        assign=lambda: torch.tensor([[0, 0, 0, BACKGROUND]]),
    )


def test_exchanged_logits_by_hand() -> None:
    """Check that only the object's class at its positives changes, across levels."""
    student = _dense([[1.0, 10], [2, 20], [3, 30], [4, 40]])
    teacher = _dense([[0.0, 7], [0, 9], [0, 8], [0, 0]])
    target = Instances((16, 16), gt_boxes=Boxes(torch.zeros(1, 4)), gt_classes=torch.tensor([1]))
    found = exchanged_logits(student, teacher, [target])
    assert {name: logits[0, :, 1].tolist() for name, logits in found.items()} == {
        STUDENT: [10, 20, 30, 40],
        RANKS: [10, 30, 20, 40],
        SCORES: [7, 9, 8, 40],
    }
    assert all(logits[0, :, 0].tolist() == [1, 2, 3, 4] for logits in found.values())


@pytest.mark.parametrize("kind", ["retinanet", "reversed retinanet", "fcos", "atss", "gfl"])
def test_own_logits_give_own_detections(kind: str, tiny_detector: Callable, make_inputs: Callable) -> None:
    """Check that logits are mapped back to the head's outputs, and that other logits change the detections."""
    model = tiny_detector(kind).eval()
    with torch.no_grad():
        model.head.cls_score.weight.normal_(std=0.5)
        model.head.bbox_pred.weight.normal_(std=0.2)
        outputs = build_adapter(model).run(make_inputs(), frozenset({"features", "dense"}))
        logits = torch.cat(list(outputs.dense.logits.values()), 1)
        maps = model.backbone(outputs.images.tensor)
        features = [maps[name] for name in model.head_in_features]
        expected = model.forward_inference(outputs.images, features, model.head(features))
        found = detect_with(model, outputs, logits)
        for ours, theirs in zip(found, expected, strict=True):
            assert len(ours) > 5
            torch.testing.assert_close(ours.scores, theirs.scores)
            torch.testing.assert_close(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
        assert all(len(few) == 0 for few in detect_with(model, outputs, torch.full_like(logits, -1e4)))


def test_from_a_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Check the table's rows, that a student equal to its teacher gains nothing, that the files of the training do not
    change, and an invalid number."""
    project = make_project(tmp_path, SOLVER__MAX_ITER=1, SOLVER__STEPS=())
    train(project)
    command = ("--output", tmp_path / "found", "--model", project.student)
    run(*command, project.teacher_weights, "--images", 3)
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    table = {name.strip(): [float(n) for n in numbers] for name, *numbers in rows[2:]}
    assert table.keys() == {STUDENT, RANKS, SCORES}
    assert table[STUDENT] == table[RANKS] == table[SCORES]
    written = {path: path.stat().st_mtime_ns for path in project.output.rglob("*")}
    run(*command, project.output / "model_final.pth", "--images", 2)
    assert capsys.readouterr().out.count("|") > 15
    assert written == {path: path.stat().st_mtime_ns for path in project.output.rglob("*")}
    with pytest.raises(SystemExit):
        run(*command, project.teacher_weights, "--images", 0)
    assert "--images is 0" in capsys.readouterr().err


def test_each_variant_is_evaluated_on_the_given_images_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check three of six images at half their size, in which one, two or all of three classes are found exactly."""

    def adapt(inputs: list[dict], needs: frozenset, targets: list[Instances]) -> SimpleNamespace:
        return SimpleNamespace(dense="dense of the student", truth=targets[0])

    def exchange(student: str, teacher: str, targets: list[Instances]) -> dict[str, set[int]]:
        assert (student, teacher) == ("dense of the student", "dense of the teacher")
        return {STUDENT: {0}, RANKS: {1, 2}, SCORES: {0, 1, 2}}

    def detect(detector: str, outputs: SimpleNamespace, classes: set[int]) -> list[Instances]:
        assert detector == "student"
        truth = outputs.truth
        found = Instances(truth.image_size, pred_boxes=truth.gt_boxes, pred_classes=truth.gt_classes)
        found.scores = torch.ones(len(found))
        return [found[[label in classes for label in found.pred_classes.tolist()]]]

    model = SimpleNamespace(student="student", adapter=SimpleNamespace(run=adapt), device="cpu")
    model.teacher = lambda inputs, needs: SimpleNamespace(dense="dense of the teacher")
    monkeypatch.setattr("kd_d2.analysis.rank_oracle.exchanged_logits", exchange)
    monkeypatch.setattr("kd_d2.analysis.rank_oracle.detect_with", detect)
    cfg = load_config(str(make_project(tmp_path, INPUT__MIN_SIZE_TEST=32).student))
    with clean_process():
        register_coco_json(cfg)
        found = rank_oracle(cfg, model, read_examples(cfg, 3))
    assert {name: of["AP50"] for name, of in found.items()} == pytest.approx(
        {STUDENT: 100 / 3, RANKS: 200 / 3, SCORES: 100}, abs=1e-3
    )


def test_needs_coco_metrics() -> None:
    """Check a test set with Pascal VOC metrics, which cannot evaluate a subset of the images."""
    cfg = get_cfg()
    cfg.DATASETS.TEST = ("voc_2007_test",)
    with pytest.raises(UserError, match="COCO metrics, which voc_2007_test does not use"):
        rank_oracle(cfg, None, [])
