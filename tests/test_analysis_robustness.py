"""Corruptions and `kd-d2 analyze robustness`: reproducibility, numbers by hand, and resuming after a kill."""

from __future__ import annotations

import csv
import functools
import json
import math
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from kd_d2 import UserError
from kd_d2.analysis import TrainedModel
from kd_d2.analysis.robustness import CORRUPTIONS, Robustness, corrupt, plots
from kd_d2.analysis.robustness import measure as engine
from kd_d2.analysis.robustness.corruptions import check_large_enough
from kd_d2.config import load_config
from kd_d2.figures import save_figure

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from helpers import Killed, Project, make_project, run_command
from torch import nn

run = functools.partial(run_command, "analyze", "robustness")


def _arguments(project: Project, output: Path, title: str = "toy", **keys: object) -> list[object]:
    entry = [[project.name, str(project.annotations), str(project.annotations.parent / "images")]]
    keys = {"DATASETS.COCO_JSON": entry, "DATASETS.TEST": (project.name,), **keys}
    model = ["--model", f"{title}={project.teacher}", project.teacher_weights]
    return [*model, "--workers", 0, "--output", output, *(x for pair in keys.items() for x in pair)]


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_corruptions_are_repeatable(corruption: str) -> None:
    """Check that image, corruption, severity and id determine the pixels, and the global generator is unchanged."""
    image = np.random.RandomState(0).randint(40, 200, (40, 56, 3)).astype(np.uint8)
    image = cv2.GaussianBlur(image, (5, 5), 2)
    np.random.seed(1)
    expected = np.random.rand()
    np.random.seed(1)
    first = corrupt(image, corruption, 3, 7)
    assert np.random.rand() == expected
    np.random.seed(2)
    np.testing.assert_array_equal(corrupt(image, corruption, 3, 7), first)
    assert first.shape == image.shape and first.dtype == np.uint8
    assert np.abs(first.astype(int) - image).mean() > 1
    assert not np.array_equal(corrupt(image, corruption, 5, 7), first)
    if corruption in ("gaussian_noise", "impulse_noise", "glass_blur", "snow", "fog", "elastic_transform"):
        assert not np.array_equal(corrupt(image, corruption, 3, 8), first)


def test_noise_of_another_severity_is_not_the_same_noise() -> None:
    """Check the correlation of the noise that is added to a gray image at two severities."""
    gray = np.full((64, 64, 3), 128, np.uint8)
    noise = [corrupt(gray, "gaussian_noise", severity, 7).astype(float).ravel() - 128 for severity in (1, 2)]
    assert abs(np.corrcoef(noise)[0, 1]) < 0.1


def test_metrics_by_hand() -> None:
    """Check two corruptions, (30 + 10) / 2 = 20 and (40 + 0) / 2 = 20, and clean 50: mPC 20, rPC 0.4."""
    found = Robustness(
        {"AP": 50.0, "AP50": 0.0},
        {
            "fog": {1: {"AP": 30.0, "AP50": 1.0}, 5: {"AP": 10.0, "AP50": 2.0}},
            "snow": {1: {"AP": 40.0, "AP50": 3.0}, 5: {"AP": 0.0, "AP50": 4.0}},
        },
    )
    assert found.of_corruption("fog") == 20 and found.of_corruption("snow") == 20
    assert found.mean() == 20 and found.relative() == pytest.approx(0.4)
    assert found.mean("AP50") == 2.5 and np.isnan(found.relative("AP50"))
    assert found.by_severity() == {0: 50, 1: 35, 5: 5}
    assert found.by_severity("fog", "AP50") == {0: 0, 1: 1, 5: 2}


def test_smallest_image_that_can_be_corrupted() -> None:
    check_large_enough((32, 32), 7)
    with pytest.raises(UserError, match="The image 7 has 32 x 31 pixels"):
        check_large_enough((31, 32), 7)


def test_corruptions_see_rgb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the channel order that is corrupted, and that the detector gets its own."""
    project = make_project(tmp_path)
    cv2.imwrite(str(tmp_path / "red.png"), np.full((40, 40, 3), (0, 0, 200), np.uint8))  # BGR
    seen = []
    monkeypatch.setattr(engine, "corrupt", lambda image, *_: seen.append(image) or image // 2)
    cfg = load_config(str(project.teacher))
    cfg.INPUT.FORMAT = "BGR"
    mapped = engine.CorruptedMapper(cfg, "fog", 3)({"file_name": str(tmp_path / "red.png"), "image_id": 1})
    assert seen[0][0, 0].tolist() == [200, 0, 0]
    assert mapped["image"][:, 0, 0].tolist() == [0, 0, 100]


def test_a_metric_that_is_undefined_stays_so_in_the_record(tmp_path: Path) -> None:
    model = SimpleNamespace(folder_name="toy", title="toy", identity=lambda: {"weights": "1"})
    engine.RobustnessRecord(model, str(tmp_path)).add("clean", {"AP": 1.0, "APs": math.nan})
    found = engine.RobustnessRecord(model, str(tmp_path)).cells["clean"]
    assert found["AP"] == 1 and math.isnan(found["APs"])


def test_two_processes_measure_parts_of_a_model(tmp_path: Path) -> None:
    model = SimpleNamespace(folder_name="toy", title="toy", identity=lambda: {"weights": "1"})
    one, other = (engine.RobustnessRecord(model, str(tmp_path)) for _ in range(2))
    one.add("fog/1", {"AP": 1.0})
    other.add("snow/1", {"AP": 2.0})
    one.add("fog/2", {"AP": 3.0})
    found = engine.RobustnessRecord(model, str(tmp_path)).cells
    assert found == {"fog/1": {"AP": 1.0}, "snow/1": {"AP": 2.0}, "fog/2": {"AP": 3.0}}


class _SeesClassesByContrast(nn.Module):
    """Finds every object exactly, but blue only above 0.8 and green only above 0.25 of the original contrast."""

    def __init__(self, truth: dict):
        super().__init__()
        self.truth = truth
        self.calls = 0

    def forward(self, inputs: list[dict]) -> list[dict]:
        self.calls += 1
        given = inputs[0]
        contrast = given["image"].float().std((1, 2)).sum() / cv2.imread(given["file_name"]).std((0, 1)).sum()
        classes = 3 if contrast > 0.8 else 2 if contrast > 0.25 else 1
        objects = [a for a in self.truth["annotations"] if a["image_id"] == given["image_id"]]
        objects = [a for a in objects if a["category_id"] <= classes]
        found = Instances((given["height"], given["width"]))
        boxes = torch.tensor([a["bbox"] for a in objects]).float().view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found.pred_boxes = Boxes(boxes)
        found.scores = torch.full((len(objects),), 0.9)
        found.pred_classes = torch.tensor([a["category_id"] - 1 for a in objects], dtype=torch.int64)
        return [{"instances": found}]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Project, _SeesClassesByContrast]:
    """Return a project whose models are all the toy detector, and the detector."""
    project = make_project(tmp_path / "toy")
    detector = _SeesClassesByContrast(json.loads(project.annotations.read_text())).eval()
    monkeypatch.setattr(TrainedModel, "build", lambda _: detector)
    return project, detector


def test_a_detector_with_known_robustness(tmp_path: Path, toy: tuple, capsys) -> None:
    """Check contrast 0.4, 0.3, 0.2, 0.1, 0.05: 2 of 3 classes twice, then 1: (2 * 66.7 + 3 * 33.3) / 5 = 46.7."""
    project, output = toy[0], tmp_path / "out"
    run("--corruptions", "contrast,jpeg_compression", *_arguments(project, output))
    found = json.loads((output / "summary.json").read_text())["toy"]["AP"]
    assert found["clean"] == pytest.approx(100) and found["contrast"] == pytest.approx(140 / 3)
    assert found["jpeg_compression"] == pytest.approx(100)
    assert found["mPC"] == pytest.approx(220 / 3) and found["rPC"] == pytest.approx(2.2 / 3)
    with open(output / "robustness.csv") as file:
        rows = {(row["corruption"], row["severity"]): float(row["AP"]) for row in csv.DictReader(file)}
    expected = [100, 200 / 3, 200 / 3, 100 / 3, 100 / 3, 100 / 3]
    assert [rows["clean", "0"], *(rows["contrast", str(s)] for s in range(1, 6))] == pytest.approx(expected, abs=1e-4)
    assert "| mPC " in capsys.readouterr().out
    for name in ("robustness", "corruptions"):
        assert cv2.imread(str(output / f"{name}.png")).std() > 0


def test_a_killed_run_goes_on(tmp_path: Path, toy: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a run killed at the fourth of six measurements: the next takes three, a third none, with equal results."""
    project, detector = toy
    arguments = ["--corruptions", "contrast", *_arguments(project, tmp_path / "killed")]
    evaluate, measured = engine._evaluate, []

    def killed_at_the_fourth(*args: object) -> dict:
        if len(measured) == 3:
            raise Killed
        measured.append(1)
        return evaluate(*args)

    monkeypatch.setattr(engine, "_evaluate", killed_at_the_fourth)
    with pytest.raises(Killed):
        run(*arguments)
    monkeypatch.setattr(engine, "_evaluate", evaluate)
    images = len(detector.truth["images"])
    assert detector.calls == 3 * images
    run(*arguments)
    assert detector.calls == 6 * images
    run(*arguments)
    assert detector.calls == 6 * images
    run("--corruptions", "contrast", *_arguments(project, tmp_path / "whole"))
    summaries = [(tmp_path / name / "summary.json").read_text() for name in ("killed", "whole")]
    assert summaries[0] == summaries[1]


def test_the_progress_counts_what_is_wanted(tmp_path: Path, toy: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a run of two measurements in the folder of a run of three, of which it needs one."""
    evaluate, notes = engine._evaluate, []
    monkeypatch.setattr(engine, "_evaluate", lambda *args: notes.append(args[-1]) or evaluate(*args))
    for corruption, severities in (("contrast", "1,2"), ("jpeg_compression", "1")):
        run("--corruptions", corruption, "--severities", severities, *_arguments(toy[0], tmp_path / "out"))
    assert notes == [
        *("toy: clean (0 of 3 done)", "toy: contrast/1 (1 of 3 done)", "toy: contrast/2 (2 of 3 done)"),
        "toy: jpeg_compression/1 (1 of 2 done)",
    ]


def test_titles_with_an_underscore_are_in_the_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *args: figures.append(figure))
    scores = {"AP": 5.0, "AP50": 5.0}
    plots.plot_robustness(dict.fromkeys(("_old", "new"), Robustness(scores, {"fog": {1: scores}})), "plot.png")
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["_old", "new"]


def test_the_legend_is_below_the_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check titles longer than a panel is wide, and that a longer legend does not change the sizes of the panels."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *a: (figures.append(figure), save_figure(figure, *a)))
    robustness = Robustness({"AP": 5.0}, {"fog": {1: {"AP": 4.0}}, "snow": {1: {"AP": 3.0}}})
    for count in (1, 4):
        titles = [f"student {number} {'with a long title ' * 4}" for number in range(count)]
        plots.plot_robustness(dict.fromkeys(titles, robustness), str(tmp_path / "plot.png"))
    for figure in figures:
        lowest = min(axis.get_tightbbox().y0 for axis in figure.axes)
        assert 0 <= figure.legends[0].get_window_extent().y0 < figure.legends[0].get_window_extent().y1 <= lowest
    one, four = ([axis.get_window_extent().size for axis in figure.axes] for figure in figures)
    assert np.allclose(one, four, rtol=0.05) and np.allclose(one[0], one)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((320, 240), (320, 240)),
        ((64, 96), (240, 360)),
        ((2400, 3200), (480, 640)),
        ((600, 9600), (60, 960)),
        ((40, 96000), (1, 960)),
    ],
)
def test_pictures_of_corruptions_have_a_moderate_size(monkeypatch, size: tuple, shown: tuple) -> None:
    """Check the size of five pictures in rows of four, with a title of 34 pixels and a gap of 8 each."""
    seen = []
    monkeypatch.setattr(plots, "corrupt", lambda image, *_: seen.append(image.shape[:2]) or image)
    picture = plots.corruption_sheet(np.zeros((*size, 3), np.uint8), 1, CORRUPTIONS[:4], 3)
    assert picture.shape == (2 * (shown[0] + 34 + 8), 4 * (shown[1] + 8), 3)
    assert seen == [size] * 4


def test_panels_without_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check panels of a model that has no AP under fog, and a plot without any value, which has no axis of AP."""
    figures, none = [], {"AP": float("nan")}
    monkeypatch.setattr(plots, "save_figure", lambda figure, *args: figures.append(figure))
    plots.plot_robustness({"a": Robustness({"AP": 5.0}, {"fog": {1: none, 2: none}})}, "plot.png")
    plots.plot_robustness({"a": Robustness(none, {"fog": {1: none, 2: none}})}, "plot.png")
    texts = [[text.get_text() for axis in figure.axes for text in axis.texts] for figure in figures]
    assert texts == [[], ["no value"] * 2]
    assert figures[0].axes[1].get_xlim() == (-0.25, 2.25) and len(figures[0].axes[1].get_yticks()) > 1
    assert len(figures[1].axes[0].get_yticks()) == 0


def test_workers_do_not_change_numbers_and_images_are_taken_evenly(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    common = ["--corruptions", "gaussian_noise,glass_blur", "--severities", "3", "--images", "4"]
    found = []
    for workers in (0, 2):
        output = tmp_path / f"workers{workers}"
        arguments = _arguments(project, output, **{"MODEL.RETINANET.SCORE_THRESH_TEST": 0.0})
        arguments[arguments.index("--workers") + 1] = workers
        run(*common, *arguments)
        found.append(json.loads((output / "summary.json").read_text()))
        chosen = json.loads((output / "4-images.json").read_text())
        assert [image["id"] for image in chosen["images"]] == [1, 3, 4, 6]
        assert {a["image_id"] for a in chosen["annotations"]} == {1, 4, 6}  # image 3 has no objects
    assert found[0] == found[1]


def test_other_weights_in_the_same_folder(tmp_path: Path, toy: tuple, capfd) -> None:
    project, output = toy[0], tmp_path / "out"
    common = ["--corruptions", "fog", "--severities", "2,1"]
    run(*common, *_arguments(project, output))
    rows = [line.split(",") for line in (output / "robustness.csv").read_text().splitlines()[1:]]
    assert [row[2] for row in rows] == ["0", "1", "2"]  # in the order of the plots
    project.teacher_weights.write_bytes(project.teacher_weights.read_bytes() + b" ")
    with pytest.raises(SystemExit):
        run(*common, *_arguments(project, output))
    assert "was measured with different weights, config or images than toy has now" in capfd.readouterr().err


def test_all_models_are_checked_before_the_first_is_measured(tmp_path: Path, monkeypatch, capfd) -> None:
    """Check a second model whose checkpoint is of another detector, and one that has a record of another model."""
    project, output, other = make_project(tmp_path / "toy"), tmp_path / "out", tmp_path / "other.pth"
    torch.save({"model": {"weight": torch.zeros(1)}}, other)
    record = output / "second" / "robustness.json"
    monkeypatch.setattr(engine, "_evaluate", lambda *_: pytest.fail("The first model is measured."))
    for weights, expected in (
        (other, f"{other} fills no parameter"),
        (project.teacher_weights, f"{record} was measured"),
    ):
        arguments = _arguments(project, output)
        arguments[3:3] = ["--model", f"second={project.teacher}", weights]
        with pytest.raises(SystemExit):
            run(*arguments)
        assert expected in capfd.readouterr().err
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text("{}")


def test_a_signal_leaves_no_temporary_folder(tmp_path: Path, toy: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(engine, "inference_on_dataset", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(SystemExit):
            run("--corruptions", "fog", *_arguments(toy[0], tmp_path / "out"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not [*temporary.iterdir()]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--workers", "-1"], "--workers is -1; it must be at least 0"),
        (["--corruptions", "rain"], "--corruptions names 'rain'; available: gaussian_noise"),
        (["--severities", "1,6"], "--severities names '6'; available: 1, 2, 3, 4, 5"),
        (["--images", "0"], "--images is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_measured(tmp_path: Path, capfd, arguments: list[str], expected: str) -> None:
    project = make_project(tmp_path)
    common = _arguments(project, tmp_path / "out")
    if arguments[0] == "--workers":
        common[common.index("--workers") + 1] = arguments[1]
        arguments = []
    with pytest.raises(SystemExit):
        run(*arguments, *common)
    assert expected in capfd.readouterr().err


def test_an_image_too_small_to_corrupt(tmp_path: Path, toy: tuple, capfd) -> None:
    toy[0].change_annotations(lambda tree: tree["images"][3].update(height=31))
    with pytest.raises(SystemExit):
        run(*_arguments(toy[0], tmp_path / "out"))
    assert "The image 4 has 64 x 31 pixels; corruptions need 32 a side" in capfd.readouterr().err


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(UserError, match=r"imagecorruptions-imaug or one of its dependencies is not"):
        corrupt(np.zeros((40, 40, 3), np.uint8), "fog", 1, 0)
