"""The error analysis on cases whose curves are all known."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from pathlib import Path

from kd_d2 import UserError
from kd_d2.analysis.errors import STAGES, ErrorCurves, analyze_errors, plots

import numpy as np
import pytest
from matplotlib.figure import Figure

CAT, DOG, CAR = 1, 2, 3
CATEGORIES = [
    {"id": CAT, "name": "cat", "supercategory": "animal"},
    {"id": DOG, "name": "dog", "supercategory": "animal"},
    {"id": CAR, "name": "car", "supercategory": "vehicle"},
]
HERE, THERE, NOWHERE = [10, 10, 100, 100], [200, 10, 100, 100], [10, 300, 50, 50]
FIRST_HALF = 51 / 101  # recalls from 0 to 0.5


def _truth(*objects: tuple[int, list[float]]) -> dict:
    annotations = [
        {"id": n + 1, "image_id": 1, "category_id": category, "bbox": box} for n, (category, box) in enumerate(objects)
    ]
    images = [{"id": 1, "width": 400, "height": 400, "file_name": "1.jpg"}]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def _found(*detections: tuple[int, list[float], float]) -> list[dict]:
    return [{"image_id": 1, "category_id": c, "bbox": box, "score": score} for c, box, score in detections]


def _areas(truth: dict, detections: list[dict], name: str = "cat") -> list[float]:
    return list(analyze_errors(truth, detections).areas(name)["all"].values())


CASES = {
    "right": ([(CAT, HERE)], [(CAT, HERE, 0.9)], [1, 1, 1, 1, 1, 1, 1]),
    # 100 x 100 moved by 25: IoU 75 / 125
    "slightly shifted": ([(CAT, HERE)], [(CAT, [35, 10, 100, 100], 0.9)], [0, 1, 1, 1, 1, 1, 1]),
    # moved by 60: IoU 40 / 160
    "strongly shifted": ([(CAT, HERE)], [(CAT, [70, 10, 100, 100], 0.9)], [0, 0, 1, 1, 1, 1, 1]),
    # moved by 80: IoU 20 / 180; moved by 84: IoU 16 / 184, which is background
    "barely overlapping": ([(CAT, HERE)], [(CAT, [90, 10, 100, 100], 0.9)], [0, 0, 1, 1, 1, 1, 1]),
    "hardly overlapping": ([(CAT, HERE)], [(CAT, [94, 10, 100, 100], 0.9)], [0, 0, 0, 0, 0, 0, 1]),
    "missed": ([(CAT, HERE), (CAT, THERE)], [(CAT, HERE, 0.9)], [FIRST_HALF] * 6 + [1]),
    "background": ([(CAT, HERE)], [(CAT, NOWHERE, 0.9), (CAT, HERE, 0.5)], [0.5] * 5 + [1, 1]),
    "similar class": (
        [(CAT, HERE), (DOG, THERE)],
        [(CAT, THERE, 0.9), (CAT, HERE, 0.5)],
        [0.5, 0.5, 0.5, 1, 1, 1, 1],
    ),
    "other class": (
        [(CAT, HERE), (CAR, THERE)],
        [(CAT, THERE, 0.9), (CAT, HERE, 0.5)],
        [0.5, 0.5, 0.5, 0.5, 1, 1, 1],
    ),
    "twice": (
        [(CAT, HERE), (CAT, THERE)],
        [(CAT, HERE, 0.9), (CAT, HERE, 0.8), (CAT, THERE, 0.7)],
        [FIRST_HALF + (1 - FIRST_HALF) * 2 / 3] * 5 + [1, 1],
    ),
    "nothing found": ([(CAT, HERE)], [], [0, 0, 0, 0, 0, 0, 1]),
}


@pytest.mark.parametrize(("objects", "detections", "expected"), CASES.values(), ids=CASES.keys())
def test_areas_by_hand(objects: list, detections: list, expected: list[float]) -> None:
    """Check each kind of error by itself: the areas of the stages before and after it is ignored."""
    assert _areas(_truth(*objects), _found(*detections)) == pytest.approx(expected, abs=1e-6)


def test_classes_sizes_and_means() -> None:
    """Check a class without objects, objects that are all large, and the mean over the classes that have objects."""
    truth = _truth((CAT, HERE), (CAR, THERE))
    curves = analyze_errors(truth, _found((CAT, HERE, 0.9)))
    assert curves.precision.shape == (3, 4, 7, 101)
    assert all(np.isnan(area) for area in curves.areas("dog")["all"].values())
    assert np.isnan(curves.areas("cat")["small"]["C50"])
    assert curves.areas("cat")["large"]["C50"] == pytest.approx(1)
    assert curves.areas()["large"] == curves.areas()["all"]
    assert curves.areas()["all"] == pytest.approx(dict(zip(STAGES, [0.5] * 6 + [1], strict=True)))


def test_a_class_without_super_category_is_like_no_other() -> None:
    """Check annotations without super-categories, and super-categories given separately."""
    truth = _truth((CAT, HERE), (DOG, THERE))
    plain = [{**c, "supercategory": "none"} for c in CATEGORIES]
    del plain[-1]["supercategory"]
    detections = _found((CAT, THERE, 0.9), (CAT, HERE, 0.5))
    without = analyze_errors({**truth, "categories": plain}, detections).areas("cat")["all"]
    assert (without["Loc"], without["Sim"], without["Oth"]) == pytest.approx((0.5, 0.5, 1))
    for empty in ("", None):  # as "none"
        unnamed = {**truth, "categories": [{**c, "supercategory": empty} for c in CATEGORIES]}
        assert analyze_errors(unnamed, detections).areas("cat")["all"] == without
    named = analyze_errors({**truth, "categories": plain}, detections, {CAT: "animal", DOG: "animal"})
    assert named.areas("cat")["all"]["Sim"] == pytest.approx(1)


def test_annotation_ids_may_start_at_0() -> None:
    objects = [(CAT, HERE), (DOG, THERE)]
    truth, detections = _truth(*objects), _found(*((*o, 0.9) for o in objects))
    for annotation in truth["annotations"]:
        annotation["id"] -= 1
    assert _areas(truth, detections) == pytest.approx([1] * 7)


@pytest.mark.parametrize(("start_method", "categories"), [("fork", CATEGORIES), ("spawn", CATEGORIES[:1])])
def test_several_processes_give_the_same(
    start_method: str, categories: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check two processes, and one that starts as in the program, which takes seconds."""
    of_class = {category["id"] for category in categories}
    truth = {**_truth(*CASES["twice"][0], (CAR, NOWHERE)), "categories": categories}
    truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] in of_class]
    detections = [d for d in _found(*CASES["twice"][1], (CAR, HERE, 0.4)) if d["category_id"] in of_class]
    context = multiprocessing.get_context(start_method)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    one, two = (analyze_errors(truth, detections, workers=n) for n in (1, 2))
    np.testing.assert_array_equal(one.precision, two.precision)


def _kill(truth: dict) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check processes that end before the first class."""
    monkeypatch.setattr("kd_d2.analysis.errors.curves._remember", _kill)
    context = multiprocessing.get_context("fork")  # starts at once
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    with pytest.raises(
        UserError, match=r"--workers is 2, and one of these processes was killed, most likely .* out of memory"
    ):
        analyze_errors(_truth((CAT, HERE)), [], workers=2)


def test_every_stage_forgives_more() -> None:
    """Check random boxes of random classes: no area is smaller than that of the previous stage."""
    random = np.random.RandomState(0)

    def boxes(count: int) -> np.ndarray:
        return np.concatenate([random.uniform(0, 300, (count, 2)), random.uniform(20, 100, (count, 2))], 1)

    objects = boxes(30)
    truth = _truth(*((int(random.choice([CAT, DOG, CAR])), box.tolist()) for box in objects))
    near = np.concatenate([objects + random.normal(0, 4, objects.shape), boxes(20)])
    detections = _found(
        *((int(random.choice([CAT, DOG, CAR])), b.clip(1).tolist(), float(random.rand())) for b in near)
    )
    areas = [
        list(analyze_errors(truth, detections).areas(name)["all"].values()) for name in ("cat", "dog", "car", None)
    ]
    for of_class in areas:
        assert all(after >= before - 1e-9 for before, after in itertools.pairwise(of_class))
        assert 0 < of_class[0] < of_class[2] < of_class[4] < of_class[6]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"image_id": 7}, "A detection has the image_id 7, which is not among the images"),
        ({"category_id": 9}, "A detection has the category_id 9, which is not among the categories"),
    ],
)
def test_unknown_detections_are_refused(change: dict, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        analyze_errors(_truth((CAT, HERE)), [{**_found((CAT, HERE, 0.9))[0], **change}])
    with pytest.raises(UserError, match="no categories or no images"):
        analyze_errors({"images": [], "categories": CATEGORIES, "annotations": []}, [])


def test_areas_are_means_over_recall() -> None:
    curves = ErrorCurves(["one"], np.tile(np.linspace(0, 1, 101), (1, 4, 7, 1)))
    assert curves.areas()["all"]["C75"] == pytest.approx(0.5)


@pytest.mark.parametrize("length", [10, 62, 1000])
def test_titles_of_any_length_fit_into_the_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    figures: list[Figure] = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: save(figure, path) or figures.append(figure))
    curves = ErrorCurves(["cat"], np.tile(np.linspace(0, 1, 101), (1, 4, 7, 1)))
    models = {letter * length: curves for letter in "WM"}
    plots.plot_error_curves(models, str(tmp_path / "plot.png"))
    plots.plot_error_shares(models, str(tmp_path / "plot.png"))
    curves_figure, shares_figure = figures
    first, second = (axis.title.get_window_extent() for axis in curves_figure.axes)
    assert 0 <= first.x0 < first.x1 < second.x0 < second.x1 <= curves_figure.bbox.width
    if length == 10:
        assert {axis.title.get_size() for axis in curves_figure.axes} == {12}
    (legend,) = shares_figure.legends
    assert [len(text.get_text()) for text in legend.get_texts()] == [min(length, 85)] * 2
    assert not any(legend.get_window_extent().overlaps(axis.get_window_extent()) for axis in shares_figure.axes)


def test_titles_with_an_underscore_are_in_the_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    curves = ErrorCurves(["cat"], np.tile(np.linspace(0, 1, 101), (1, 4, 7, 1)))
    plots.plot_error_shares({"_old": curves, "new": curves}, str(tmp_path / "plot.png"))
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["_old", "new"]


def test_sizes_without_objects_have_no_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    precision = np.tile(np.linspace(0, 1, 101), (1, 4, 7, 1))
    precision[:, 3] = np.nan  # no large objects
    models = {"model": ErrorCurves(["cat"], precision)}
    plots.plot_error_shares(models, str(tmp_path / "plot.png"))
    plots.plot_error_curves(models, str(tmp_path / "plot.png"), sizes=("small", "medium", "large"))
    shares, curves = ([axis.get_title() for axis in figure.axes] for figure in figures)
    assert shares == ["all", "small", "medium"]
    assert curves == ["model: all classes, small", "model: all classes, medium"]
