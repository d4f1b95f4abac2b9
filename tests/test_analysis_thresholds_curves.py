"""Counts, thresholds and confusion on cases worked by hand, and against pycocotools on random boxes."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from kd_d2 import UserError
from kd_d2.analysis.thresholds import ThresholdCurve, confusion_matrix, measure_thresholds, plots, pooled
from kd_d2.analysis.thresholds.curves import LARGEST_F1, rounded_down

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

CAT, DOG, CAR = 1, 2, 3
NAMES = {CAT: "cat", DOG: "dog", CAR: "car"}
LEFT, MIDDLE, RIGHT, BELOW = ([left, top, 40, 40] for left, top in ((10, 10), (110, 10), (210, 10), (10, 110)))


def _truth(*objects: tuple[int, list[float]], crowds: tuple[int, ...] = ()) -> dict:
    annotations = [
        {"id": n, "image_id": 1, "category_id": category, "bbox": box, "iscrowd": int(n in crowds)}
        for n, (category, box) in enumerate(objects)
    ]
    categories = [{"id": number, "name": name} for number, name in NAMES.items()]
    images = [{"id": 1, "width": 400, "height": 400, "file_name": "1.jpg"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def _found(*detections: tuple[int, list[float], float]) -> list[dict]:
    return [{"image_id": 1, "category_id": c, "bbox": box, "score": score} for c, box, score in detections]


def _curve(*scores: tuple[float, bool], objects: int = 3) -> ThresholdCurve:
    return ThresholdCurve.of(objects, np.array([s for s, _ in scores]), np.array([t for _, t in scores], bool))


def test_three_objects_of_one_class() -> None:
    """Check .9 true, .8 false, .7 true and .6 false: measures at each score, and the three chosen thresholds."""
    truth = _truth((CAT, LEFT), (CAT, MIDDLE), (CAT, RIGHT))
    curve = measure_thresholds(
        truth, _found((CAT, BELOW, 0.6), (CAT, LEFT, 0.9), (CAT, BELOW, 0.8), (CAT, MIDDLE, 0.7))
    )["cat"]
    assert curve.scores.tolist() == [0.9, 0.8, 0.7, 0.6]
    assert curve.precision == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2])
    assert curve.recall == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3])
    assert curve.f1 == pytest.approx([1 / 2, 2 / 5, 2 / 3, 4 / 7])
    points = curve.points(precision=0.9, recall=0.9)
    best = points[LARGEST_F1]
    assert (best.threshold, best.tp, best.fp, best.fn) == (0.7, 2, 1, 1)
    assert (best.precision, best.recall, best.f1) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert points["precision >= 0.9"].threshold == 0.9
    assert points["recall >= 0.9"] is None
    assert curve.points(precision=0.5, recall=0.5)["precision >= 0.5"].fp == 2
    assert curve.points(recall=0.5)["recall >= 0.5"].threshold == 0.7


def test_ties() -> None:
    """Check that equal scores are one threshold, and that the higher of two thresholds with the same F1 is chosen."""
    curve = _curve((0.5, False), (0.9, True), (0.5, True))
    assert (curve.scores.tolist(), curve.tp.tolist(), curve.fp.tolist()) == ([0.9, 0.5], [1, 2], [0, 1])
    same = _curve((0.9, True), (0.6, False), (0.5, False), (0.4, True), objects=2)
    assert same.f1 == pytest.approx([2 / 3, 1 / 2, 2 / 5, 2 / 3])
    assert same.largest_f1() == 0


def test_a_crowd_counts_as_nothing() -> None:
    """Check a crowd that is not missed, and two detections in it that are neither true nor false."""
    truth = _truth((CAT, LEFT), (CAT, [200, 200, 100, 100]), crowds=(1,))
    found = _found((CAT, LEFT, 0.9), (CAT, [210, 210, 20, 20], 0.8), (CAT, [250, 250, 20, 20], 0.7), (CAT, RIGHT, 0.6))
    curve = measure_thresholds(truth, found)["cat"]
    assert (curve.objects, curve.scores.tolist()) == (1, [0.9, 0.6])
    assert (curve.tp.tolist(), curve.fp.tolist()) == ([1, 1], [0, 1])
    assert confusion_matrix(truth, found, 0).tolist() == [[1, 0, 0, 0], [0] * 4, [0] * 4, [1, 0, 0, 0]]


def test_classes_without_objects_or_detections() -> None:
    """Check a class with detections only, one with objects only, and their sums."""
    curves = measure_thresholds(_truth((CAT, LEFT), (CAR, LEFT)), _found((CAT, LEFT, 0.9), (DOG, LEFT, 0.8)))
    assert np.isnan(curves["dog"].recall).all() and curves["dog"].f1.tolist() == [0]
    for name in ("dog", "car"):
        assert set(curves[name].points(precision=0.5, recall=0.5).values()) == {None}
    together = pooled(curves.values())
    assert (together.objects, together.tp.tolist(), together.fp.tolist()) == (2, [1, 1], [0, 1])
    nothing = pooled(measure_thresholds(_truth((CAT, LEFT)), []).values())
    assert set(nothing.points(precision=0.5, recall=0.5).values()) == {None}


def test_confusion_by_hand() -> None:
    """Check a right detection, a confusion, a second detection of an object, background, a miss, and a low score.

    The dog's best detection is that of a cat, so its own, with a lower score, is background.
    """
    truth = _truth((CAT, LEFT), (DOG, MIDDLE), (DOG, RIGHT), (CAT, BELOW))
    found = _found(
        (CAT, LEFT, 0.9), (CAT, MIDDLE, 0.8), (DOG, MIDDLE, 0.7), (CAT, [300, 300, 40, 40], 0.6), (DOG, RIGHT, 0.4)
    )  # fmt: skip
    expected = [[1, 0, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert confusion_matrix(truth, found, 0.5).tolist() == expected
    expected[1] = [1, 1, 0, 0]
    assert confusion_matrix(truth, found, 0.4).tolist() == expected


def test_confusion_takes_the_largest_overlap_of_any_class() -> None:
    """Check an object of another class with a larger IoU, and an IoU of 0.6 at a minimum of 0.7."""
    shifted = [20, 10, 40, 40]  # IoU with LEFT 30 / 50
    truth = _truth((CAT, LEFT), (DOG, shifted))
    assert confusion_matrix(truth, _found((CAT, shifted, 0.9)), 0.5).tolist() == [
        [0, 0, 0, 1],
        [1, 0, 0, 0],
        [0] * 4,
        [0] * 4,
    ]
    only = _truth((CAT, LEFT))
    assert confusion_matrix(only, _found((CAT, shifted, 0.9)), 0.5, 0.7)[[0, 3], [3, 0]].tolist() == [1, 1]


def _random(seed: int) -> tuple[dict, list[dict]]:
    random = np.random.RandomState(seed)
    truth, detections = _truth(), []
    truth["images"] = [{"id": n, "width": 400, "height": 400, "file_name": f"{n}.jpg"} for n in range(1, 7)]
    for image in range(1, 7):
        for _ in range(random.randint(1, 9)):
            box = [*random.uniform(0, 300, 2).tolist(), *random.uniform(20, 100, 2).tolist()]
            category, is_crowd = random.randint(1, 4), random.rand() < 0.1
            truth["annotations"].append(
                {"id": len(truth["annotations"]) + 1, "image_id": image, "category_id": category, "bbox": box}
                | {"iscrowd": int(is_crowd), "area": box[2] * box[3]}
            )
            for _ in range(random.randint(0, 4)):
                near = (np.array(box) + random.normal(0, 6, 4)).clip(1).tolist()
                label = category if random.rand() < 0.8 else random.randint(1, 4)
                score = float(np.round(random.rand(), 1))  # with ties
                detections.append({"image_id": image, "category_id": int(label), "bbox": near, "score": score})
    return truth, detections


@pytest.mark.parametrize("seed", range(3))
def test_counts_at_every_threshold_are_those_of_pycocotools(seed: int) -> None:
    """Check each class, and all together, against a new evaluation of only the detections with at least the score."""
    truth, detections = _random(seed)
    curves = measure_thresholds(truth, detections)
    curves["all"] = pooled(curves.values())
    for name, curve in curves.items():
        for index, score in enumerate(curve.scores):
            sure = [d for d in detections if d["score"] >= score]
            with contextlib.redirect_stdout(io.StringIO()):
                annotated = COCO()
                annotated.dataset = truth
                annotated.createIndex()
                evaluation = COCOeval(annotated, annotated.loadRes([dict(d) for d in sure]), "bbox")
                evaluation.params.areaRng = [[0, 1e10]]
                evaluation.evaluate()
            ids = [number for number, of in NAMES.items() if name in (of, "all")]
            found = [e for e in evaluation.evalImgs if e is not None and e["category_id"] in ids]
            true = sum(
                int(m > 0 and not i) for e in found for m, i in zip(e["dtMatches"][0], e["dtIgnore"][0], strict=True)
            )
            counted = sum(int(not i) for e in found for i in e["dtIgnore"][0])
            objects = sum(int(not i) for e in found for i in e["gtIgnore"])
            point = curve.at(index)
            assert (point.tp, point.fp, point.fn) == (true, counted - true, objects - true)
            assert point.precision == true / counted and point.recall == true / objects


@pytest.mark.parametrize("seed", range(3))
def test_confusion_matrix_has_every_object_and_detection_once(seed: int) -> None:
    truth, detections = _random(seed)
    truth["annotations"] = [a for a in truth["annotations"] if not a["iscrowd"]]
    matrix = confusion_matrix(truth, detections, 0.5)
    for entries, sums in (
        (truth["annotations"], matrix.sum(1)),
        ([d for d in detections if d["score"] >= 0.5], matrix.sum(0)),
    ):
        assert sums[:-1].tolist() == [sum(e["category_id"] == c for e in entries) for c in NAMES]
    assert matrix[-1, -1] == 0


@pytest.mark.parametrize(
    ("score", "lower", "expected"),
    [
        (0.69993, 0.1, 0.69),
        (0.69993, 0.6995, 0.6999),
        (0.5, 0.4, 0.49),  # a detector that keeps greater scores only would not keep 0.5
        (0.061, 0.0, 0.06),
        (0.0042, 0.0, 0.004),
    ],
)
def test_rounded_thresholds(score: float, lower: float, expected: float) -> None:
    assert rounded_down(score, lower) == expected


def test_rounded_thresholds_separate_neighbors() -> None:
    """Check neighboring numbers in single precision, compared in single and in double precision."""
    for score in np.random.RandomState(0).uniform(0.001, 1, 200).astype(np.float32):
        lower = np.nextafter(score, np.float32(0))
        value = rounded_down(float(score), float(lower))
        assert float(lower) < value <= float(score)
        assert score > np.float32(value) >= lower


def test_curves_of_bounded_size() -> None:
    """Check the first and last of a thousand scores, and that the differences of those between are about equal."""
    curve = _curve(*((score, True) for score in np.linspace(0, 1, 1001) ** 3), objects=1001)
    scores = curve.scores[curve.spread(100)]
    assert len(scores) <= 100 and (scores[0], scores[-1]) == (1, 0)
    assert np.diff(-scores).max() < 0.02
    assert curve.spread(2000) == list(range(1001))


def test_what_cannot_be_counted() -> None:
    found = _found((CAT, LEFT, 0.9))
    for truth in (_truth(), _truth((CAT, LEFT), crowds=(0,))):
        with pytest.raises(UserError, match="The annotations have no objects: there is nothing to analyze"):
            measure_thresholds(truth, found)
    for compute in (measure_thresholds, lambda t, d: confusion_matrix(t, d, 0)):
        with pytest.raises(UserError, match="A detection has the category_id 9, which is not among the categories"):
            compute(_truth((CAT, LEFT)), [{**found[0], "category_id": 9}])


@pytest.mark.parametrize(("count", "length"), [(1, 3), (3, 1000), (110, 40)])
def test_confusion_plots_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, length: int) -> None:
    """Check that the names of all classes, at most 100, are inside the picture, and a count of background."""
    drawn: list[Figure] = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: save(figure, path) or drawn.append(figure))
    matrix = np.diag([*range(1, count + 1), 0])
    matrix[count, 0] = 12345
    names = [f"{number} {'W' * length}" for number in range(count)]
    plots.plot_confusion(matrix, names, "W" * length, str(tmp_path / "plot.png"))
    (axis,) = drawn[0].axes
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert len(labels) == min(count, 100) + 1 and labels[0].startswith("0 W") and labels[-1] == "missed"
    assert max(cv2.imread(str(tmp_path / "plot.png")).shape) < 4000
    drawn[0].draw_without_rendering()
    width, height = drawn[0].bbox.size
    for text in (*axis.get_xticklabels(), *axis.get_yticklabels(), axis.title):
        place = text.get_window_extent()
        assert min(place.x0, place.y0) >= 0 and place.x1 <= width and place.y1 <= height
    assert "12345" in [text.get_text() for text in axis.texts]


def test_curve_plots_without_detections(tmp_path: Path) -> None:
    curves = {"one": _curve((0.9, True), (0.5, False)), "other": _curve()}
    points = {title: curve.points(0.5, 0.9) for title, curve in curves.items()}
    plots.plot_threshold_curves(curves, points, str(tmp_path / "plot.png"))
    picture = cv2.imread(str(tmp_path / "plot.png"))
    left, right = np.array_split(picture, 2, axis=1)
    assert left.std() > right.std() > 0
