"""`kd-d2 analyze detections`: gained and lost objects, the choice of images, and the sheets."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from kd_d2 import UserError
from kd_d2.analysis import TrainedModel, load_analysis
from kd_d2.analysis.detections import (
    GAINED,
    LOST,
    SAME,
    DetectionAnalysis,
    Difference,
    as_instances,
    choose,
    differences,
    draw_differences,
)
from kd_d2.analysis.drawing import PALETTE, TITLE_HEIGHT
from kd_d2.evaluation.coco import found_objects

import cv2
import numpy as np
import pytest
from detectron2.config import get_cfg
from helpers import make_project, run_command, save_fixed_weights

run = functools.partial(run_command, "analyze", "detections")
HERE, THERE = [10, 10, 40, 40], [80, 10, 40, 40]


def _truth(*objects: tuple[int, int, list[float]]) -> dict:
    annotations = [
        {"id": n + 1, "image_id": image, "category_id": category, "bbox": box}
        for n, (image, category, box) in enumerate(objects)
    ]
    images = [{"id": n, "width": 200, "height": 100, "file_name": f"{n}.jpg"} for n in (1, 2)]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }


def test_found_objects_by_hand() -> None:
    """Check class, image, overlap and score, and that one detection matches one object."""
    truth = _truth((1, 1, HERE), (1, 2, THERE), (2, 1, HERE), (2, 1, [12, 10, 40, 40]))
    right = {"image_id": 1, "category_id": 1, "bbox": HERE, "score": 0.5}
    assert found_objects(truth, [right], 0.5) == {1}
    assert found_objects(truth, [right], 0.6) == set()
    assert found_objects(truth, [{**right, "category_id": 2}], 0.5) == set()
    assert found_objects(truth, [{**right, "bbox": [32, 10, 40, 40]}], 0.5) == set()
    assert found_objects(truth, [{**right, "image_id": 2}], 0.5) == {3}
    assert found_objects(truth, [], 0.5) == set()
    truth["annotations"][0]["iscrowd"] = 1
    assert found_objects(truth, [{**right, "bbox": [12, 12, 5, 5]}, right], 0.5) == set()


def test_gained_and_lost_and_the_choice() -> None:
    """Check both lists, and that images with gains and images with losses are chosen alternately."""
    truth = {"annotations": [{"id": n, "image_id": image} for n, image in enumerate((1, 1, 1, 2, 2, 3, 4))]}
    images = differences(truth, {3, 4, 5, 6}, {0, 1, 2, 6})
    assert images == {
        1: Difference(gained=[0, 1, 2], lost=[]),
        2: Difference(gained=[], lost=[3, 4]),
        3: Difference(gained=[], lost=[5]),
    }
    assert choose(images, 2) == [1, 2]
    assert choose(images, 9) == [1, 2, 3]
    assert choose({}, 3) == []
    much, little = Difference([*range(10)], [*range(9)]), Difference([11], [])
    assert choose({1: little, 2: little, 3: much}, 2) == [3, 1]
    assert choose({n: Difference([*range(n)], []) for n in range(1, 9)}, 4) == [8, 7, 6, 5]


def test_what_differs_is_drawn_on_top() -> None:
    """Check the edge that a large gained object shares with a small unchanged one."""
    truth = {"categories": [{"id": 1, "name": "a"}], "annotations": []}
    for number, box in enumerate(([20, 10, 300, 280], [20, 10, 200, 280])):
        truth["annotations"].append({"id": number, "image_id": 1, "category_id": 1, "bbox": box})
    image = np.zeros((400, 400, 3), np.uint8)
    picture = draw_differences(truth, 1, image, Difference([0], []), {})
    assert tuple(picture[150 + TITLE_HEIGHT, 20]) == GAINED


def test_colors_and_titles_of_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a gained, two lost and an unchanged object, a crowd, which is not drawn, and a detection of class 7."""
    titles: list[str] = []
    monkeypatch.setattr("kd_d2.analysis.detections.titled", lambda image, title: titles.append(title) or image)
    truth: dict = {"categories": [{"id": 7, "name": "b"}, {"id": 3, "name": "a"}], "annotations": []}
    lefts = (10, 90, 170, 250, 330)
    for number, left in enumerate(lefts):
        annotation = {"id": number, "image_id": 1, "category_id": 3, "bbox": [left, 60, 50, 280]}
        truth["annotations"].append({**annotation, "iscrowd": int(number == 3)})
    found = {"bbox": [10, 60, 50, 280], "category_id": 7, "score": 0.5}
    image = np.zeros((400, 400, 3), np.uint8)
    picture = draw_differences(truth, 1, image, Difference([0], [1, 4]), {"one": [found], "other": []})
    assert titles == ["objects: 1 gained, 2 lost", "one", "other"]
    drawn = [tuple(picture[200, x].tolist()) for x in (*lefts, 408 + 10, 2 * 408 + 10)]
    assert drawn == [GAINED, LOST, SAME, (0, 0, 0), LOST, PALETTE[1], (0, 0, 0)]


def test_detections_are_drawn_with_their_corners() -> None:
    found = {"bbox": [10, 20, 30, 5], "category_id": 7, "score": 0.5}
    instances = as_instances([found], np.zeros((40, 60, 3), np.uint8), {3: 0, 7: 1})
    assert instances.pred_boxes.tensor.tolist() == [[10, 20, 40, 25]]
    assert (instances.pred_classes.tolist(), instances.scores.tolist()) == ([1], [0.5])


def test_sheets_of_three_models(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the sheets with the objects and three models, and the counts, with detections replaced by known ones."""
    shown = []

    def draw(*arguments: Any) -> np.ndarray:
        shown.extend(found["score"] for of_model in arguments[-1].values() for found in of_model)
        file = project.annotations.parent / "images" / f"{arguments[1] - 1:03d}.png"
        np.testing.assert_array_equal(arguments[2], cv2.imread(str(file))[:, :, ::-1])
        return draw_differences(*arguments)

    monkeypatch.setattr("kd_d2.analysis.detections.draw_differences", draw)
    project, output = make_project(tmp_path), tmp_path / "out"
    other = tmp_path / "other.pth"
    save_fixed_weights(project.teacher, other, seed=5)
    models = [
        x
        for title, weights in (("plain", project.teacher_weights), ("distilled", other), ("teacher", other))
        for x in ("--model", f"{title}={project.teacher}", weights)
    ]
    entry = [[project.name, str(project.annotations), str(project.annotations.parent / "images")]]
    data = ["DATASETS.COCO_JSON", entry, "DATASETS.TEST", (project.name,)]
    arguments = [*models, "--output", output, "--images", 2, "--score-thresh", 0.5, *data]
    run(*arguments)
    assert "distilled finds 0 objects that plain does not, and misses 0" in capsys.readouterr().out
    # Detections are cached by weights and config, so these replace the models'.
    truth = json.loads(project.annotations.read_text())
    objects = truth["annotations"]
    for title, kept in (("plain", objects[:1]), ("distilled", objects[1:]), ("teacher", objects)):
        found = [
            {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": score}
            for score, some in ((0.9, kept), (0.4, objects))  # those below --score-thresh do not count
            for a in some
        ]
        (output / title / "coco_instances_results.json").write_text(json.dumps(found))
    run(*arguments)
    printed = capsys.readouterr().out
    assert f"distilled finds {len(objects) - 1} objects that plain does not, and misses 1 that it finds" in printed
    assert set(shown) == {0.9}
    tree = json.loads((output / "differences.json").read_text())
    assert tree["total"] == {"gained": len(objects) - 1, "lost": 1}
    sheets = sorted(output.glob("*.png"))
    assert [p.name[:3] for p in sheets] == ["001", "002"]
    assert cv2.imread(str(sheets[0])).shape[1] == 4 * (360 * 3 // 2 + 8) or cv2.imread(str(sheets[0])).shape[1] == 4 * (
        360 + 8
    )
    arguments[arguments.index("--images") + 1] = 1
    run(*arguments)
    (sheet,) = output.glob("*.png")  # those of the earlier run are deleted
    other = sheet.with_name("100-other.png")
    other.write_bytes(b"")
    assert [block.path for block in load_analysis(str(output)).section().blocks] == [str(sheet)]
    (output / "pictures.json").unlink()  # as written by older versions
    assert [block.path for block in load_analysis(str(output)).section().blocks] == [str(sheet), str(other)]
    sheet.unlink()
    sheet.symlink_to(project.annotations.parent / "images" / "000.png")
    with pytest.raises(SystemExit):
        run(*arguments)
    assert f"error: --output: the drawing {sheet} would overwrite an input" in capsys.readouterr().err


def test_a_threshold_below_that_of_the_config(tmp_path: Path) -> None:
    """Check that the cached detections go down to --score-thresh, and are kept at a higher one."""
    project, output = make_project(tmp_path), tmp_path / "out"
    models = [
        x for title in ("one", "other") for x in ("--model", f"{title}={project.teacher}", project.teacher_weights)
    ]
    entry = [[project.name, str(project.annotations), str(project.annotations.parent / "images")]]
    data = ["DATASETS.COCO_JSON", entry, "DATASETS.TEST", (project.name,), "MODEL.RETINANET.SCORE_THRESH_TEST", 0.9999]
    kept = output / "one" / "coco_instances_results.json"
    found = []
    for threshold in (1.0, 0.0):
        run(*models, "--output", output, "--score-thresh", threshold, *data)
        found.append(json.loads(kept.read_text()))
    assert len(found[0]) < len(found[1]) and min(detection["score"] for detection in found[1]) < 0.9999


def test_needs_coco_metrics(tmp_path: Path) -> None:
    """Check a built-in set with LVIS metrics."""
    cfg = get_cfg()
    cfg.DATASETS.TEST = ("lvis_v1_val",)
    with pytest.raises(UserError, match="needs COCO metrics, which lvis_v1_val does not use"):
        TrainedModel("one", cfg).detections(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"images": 0}, "--images is 0; it must be at least 1."),
        ({"score_thresh": 30.0}, "--score-thresh is 30.0; it must be between 0 and 1."),
        ({"score_thresh": -0.1}, "--score-thresh is -0.1; it must be between 0 and 1."),
    ],
)
def test_options_out_of_range(tmp_path: Path, options: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{sentence}$"):
        DetectionAnalysis.run([], str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_one_model_is_not_enough(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    project = make_project(tmp_path)
    with pytest.raises(SystemExit):
        run("--model", f"one={project.teacher}", project.teacher_weights, "--output", tmp_path / "out")
    assert "--model: kd-d2 analyze detections takes two or more of them, not 1" in capfd.readouterr().err
