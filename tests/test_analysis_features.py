"""`kd-d2 analyze features`: numbers by hand and against NumPy, files, and error messages."""

from __future__ import annotations

import csv
import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

from kd_d2.analysis.features import FeatureStatistics, difference_map, distances, neighbor_correlation, plots
from kd_d2.figures import save_figure

import cv2
import numpy as np
import pytest
import torch
from helpers import Project, make_project, run_command, save_fixed_weights

run = functools.partial(run_command, "analyze", "features")


def _model(project: Project, title: str) -> list[object]:
    return ["--model", f"{title}={project.teacher}", project.teacher_weights]


def _data(project: Project, **more: object) -> list[object]:
    entry = [[project.name, str(project.annotations), str(project.annotations.parent / "images")]]
    return [x for pair in {"DATASETS.COCO_JSON": entry, "DATASETS.TEST": (project.name,), **more}.items() for x in pair]


def test_neighbors_by_hand() -> None:
    """Check a ramp to the right with equal rows (1 and 1), a chessboard (-1 and -1), and undefined correlations."""
    ramp = torch.arange(4.0).expand(3, 4)
    chess = (torch.arange(3)[:, None] + torch.arange(4)).remainder(2).float()
    constant = torch.ones(3, 4)
    assert neighbor_correlation(ramp[None]) == pytest.approx({"horizontal": 1, "vertical": 1})
    assert neighbor_correlation(chess[None]) == pytest.approx({"horizontal": -1, "vertical": -1})
    assert neighbor_correlation(torch.stack([ramp, chess, constant])) == pytest.approx({"horizontal": 0, "vertical": 0})
    undefined = neighbor_correlation(torch.ones(2, 1, 1))
    assert all(math.isnan(value) for value in undefined.values())
    one_row = neighbor_correlation(torch.tensor([[[1.0, 2, 4, 8]]]))
    assert one_row["horizontal"] == pytest.approx(1) and math.isnan(one_row["vertical"])


def test_neighbors_against_numpy() -> None:
    maps = torch.from_numpy(np.random.RandomState(0).randn(5, 7, 9)).cumsum(2)
    expected = [np.corrcoef(m[:, :-1].ravel(), m[:, 1:].ravel())[0, 1] for m in maps.numpy()]
    assert neighbor_correlation(maps)["horizontal"] == pytest.approx(np.mean(expected))
    expected = [np.corrcoef(m[:-1].ravel(), m[1:].ravel())[0, 1] for m in maps.numpy()]
    assert neighbor_correlation(maps)["vertical"] == pytest.approx(np.mean(expected))


def test_long_titles_of_rows_are_as_high_as_their_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check titles with and without spaces in a plot, and that a short one stays on one line."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *a: (figures.append(figure), save_figure(figure, *a)))
    pairs = {8: [torch.rand(2, 100).numpy()], 16: [torch.rand(2, 100).numpy()]}
    statistics = SimpleNamespace(pairs=pairs, mean_correlations=lambda: {key: {"horizontal": 0.0} for key in pairs})
    titles = ["short", "distilled with a long title, " * 2, "distilled_without_spaces_" * 3, "W" * 60]
    plots.plot_neighbors(dict.fromkeys(titles, statistics), str(tmp_path / "neighbors.png"))
    panels = figures[0].axes[::2]
    for axis in panels:
        text, panel = axis.yaxis.label.get_window_extent(), axis.get_window_extent()
        assert panel.y0 - 5 <= text.y0 < text.y1 <= panel.y1 + 5
    written = [axis.get_ylabel() for axis in panels]
    assert written[0] == "short" and written[1].replace("\n", " ") == titles[1].strip()


def test_distances_by_hand() -> None:
    """Check t = 0, 1, 2, 4 and s = 2 t: relative 1, correlation 1, equal if scaled; and t with two values swapped."""
    teacher = torch.tensor([[[0.0, 1.0], [2.0, 4.0]]])
    assert distances(2 * teacher, teacher) == pytest.approx(
        {
            "relative": 1,
            "correlation": 1,
            "l1": 0,
            "ssim": 0,
            "luminance": 1,
            "contrast": 1,
            "structure": 1,
            "range": 2,
        },
        abs=1e-6,
    )
    swapped = torch.tensor([[[1.0, 0.0], [2.0, 4.0]]])
    found = distances(swapped, teacher)
    assert found["relative"] == pytest.approx(2 / 21) and found["l1"] == pytest.approx(0.125) and found["ssim"] > 0.01
    assert found["correlation"] == pytest.approx(np.corrcoef([1, 0, 2, 4], [0, 1, 2, 4])[0, 1])
    np.testing.assert_allclose(difference_map(swapped, teacher), [[0.25, 0.25], [0, 0]])


def test_luminance_by_hand() -> None:
    """Check windows of one cell: t = 0, 1/2, 1 and s = 0, 1, 1 differ only in luminance, the middle 1.0001 / 1.2501."""
    found = distances(torch.tensor([[[0.0, 1.0, 1.0]]]), torch.tensor([[[0.0, 0.5, 1.0]]]))
    assert found["luminance"] == pytest.approx((2 + 1.0001 / 1.2501) / 3, abs=1e-6)
    assert found["contrast"] == pytest.approx(1) and found["structure"] == pytest.approx(1)


def test_components_tell_a_flat_map_from_an_alike_one() -> None:
    """Check one extreme value, which makes the rest of a scaled map flat: contrast is low, structure seems equal."""
    teacher = torch.rand(1, 24, 24, generator=torch.Generator().manual_seed(0))
    student = 1 - teacher
    student[0, 0, 0] = 10_000
    found = distances(student, teacher)
    assert found["range"] == pytest.approx(10_000, rel=0.1)
    assert found["correlation"] < 0.1 and found["contrast"] < 0.1 and found["structure"] > 0.85


def test_means_leave_out_what_is_undefined() -> None:
    statistics, random = FeatureStatistics(points=5), np.random.RandomState(0)
    statistics.add(8, torch.arange(4.0).expand(1, 3, 4), random)
    statistics.add(8, torch.tensor([[[1.0, 2, 4, 8]]]), random)
    statistics.add(16, torch.ones(1, 1, 1), random)
    means = statistics.mean_correlations()
    assert means[8] == pytest.approx({"horizontal": 1, "vertical": 1, "mean": 1})
    assert all(math.isnan(value) for value in means[16].values())
    x, y = np.concatenate(statistics.pairs[8], 1)
    assert len(x) == 10 and set(zip(x, y)) <= {(0, 1), (1, 2), (2, 3), (2, 4), (4, 8)}
    assert 16 not in statistics.pairs


def test_two_students_and_their_teacher(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Check distance 0 for a copy of the teacher, and that files are complete, deterministic and of the right shape."""
    project, other = make_project(tmp_path / "a"), make_project(tmp_path / "b")
    save_fixed_weights(other.teacher, other.teacher_weights, seed=5)
    models = ["--teacher", "big", *_model(project, "big"), *_model(project, "copy"), *_model(other, "other")]
    trees = []
    for name in ("one", "two"):
        output = tmp_path / name
        run(
            *models,
            "--images",
            4,
            "--pictures",
            2,
            "--channels",
            3,
            "--stride",
            16,
            "--output",
            output,
            *_data(project),
        )
        trees.append(json.loads((output / "features.json").read_text()))
    assert json.dumps(trees[0]) == json.dumps(trees[1])
    assert trees[0]["images"] == 4
    undefined = next(row for row in trees[0]["correlations"] if row["stride"] == 128)
    assert undefined["vertical"] is None  # one cell; NaN is not valid JSON
    of = {(row["model"], row["stride"]): row for row in trees[0]["distances"]}
    assert of.keys() == {(title, stride) for title in ("copy", "other") for stride in (8, 16, 32, 64, 128)}
    for stride in (8, 16, 32, 64, 128):
        assert of["copy", stride]["relative"] == 0 < of["other", stride]["relative"]
        assert of["copy", stride]["ssim"] == pytest.approx(0, abs=1e-6) and of["other", stride]["ssim"] > 0
    with open(output / "correlation.csv") as file:
        rows = {(row["model"], row["stride"]): float(row["mean"]) for row in csv.DictReader(file)}
    assert rows["big", "8"] == rows["copy", "8"] != rows["other", "8"]
    assert rows["image pixels", "1"] > 0.3 and abs(rows["random numbers", "1"]) < 0.05
    assert len(list((output / "differences").iterdir())) == len(list((output / "channels").iterdir())) == 2
    drawn = cv2.imread(
        str(output / "channels" / "000.png")
    )  # 64 x 96 pixels, three models, the image and three channels
    assert drawn.shape == (3 * (200 + 34 + 8), 4 * (300 + 8), 3)
    assert cv2.imread(str(output / "neighbors.png")).std() > 0
    listed = json.loads((output / "pictures.json").read_text())["features"]
    assert sorted(listed) == sorted(str(path.relative_to(output)) for path in output.rglob("*.png"))
    assert "| copy " in capsys.readouterr().out


def test_detectors_with_different_finest_levels(tmp_path: Path) -> None:
    """Check that channels are drawn at the finest level of both: the first detector has stride 4, the second not."""
    first, second = make_project(tmp_path / "a", "faster-rcnn"), make_project(tmp_path / "b")
    common = ["--images", 1, "--pictures", 1, "--output", tmp_path / "out"]
    run(*_model(first, "big"), *_model(second, "small"), *common, *_data(second))
    assert cv2.imread(str(tmp_path / "out" / "channels" / "000.png")) is not None


def test_levels_do_not_know_of_padding(tmp_path: Path) -> None:
    """Check images of 64 x 96 pixels, padded to 128: the finest map is 8 x 12."""
    project = make_project(tmp_path)
    seen = []
    original = FeatureStatistics.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            FeatureStatistics,
            "add",
            lambda self, stride, maps, random: (
                seen.append((stride, *maps.shape[1:])),
                original(self, stride, maps, random),
            ),
        )
        common = ["--images", 1, "--output", tmp_path / "out"]
        run(*_model(project, "one"), *common, *_data(project))
    assert (8, 8, 12) in seen and (128, 1, 1) in seen


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--images", 0], "--images is 0; it must be at least 1"),
        (["--pictures", -1], "--pictures is -1; it must be at least 0"),
        (["--stride", 4], "--stride is 4; one has the strides 8, 16, 32, 64, 128"),
    ],
)
def test_what_cannot_be_analyzed(tmp_path: Path, capfd, arguments: list, expected: str) -> None:
    project = make_project(tmp_path)
    with pytest.raises(SystemExit):
        run(*_model(project, "one"), *arguments, "--output", tmp_path / "out", *_data(project))
    assert expected in capfd.readouterr().err


def test_features_that_cannot_be_compared(tmp_path: Path, capfd) -> None:
    """Check images of another size, and other channels at every level."""
    project, other = make_project(tmp_path / "a"), make_project(tmp_path / "b")
    models = ["--teacher", "big", *_model(project, "big"), *_model(other, "small")]
    other.change_teacher(INPUT__MIN_SIZE_TEST=96)
    common = ["--output", tmp_path / "out", *_data(project)]
    with pytest.raises(SystemExit):
        run(*models, *common)
    assert "At stride 8 small has maps of (11, 16) cells and big of (8, 12): set INPUT.MIN" in capfd.readouterr().err
    other.change_teacher(MODEL__FPN__OUT_CHANNELS=8)
    save_fixed_weights(other.teacher, other.teacher_weights)
    with pytest.raises(SystemExit):
        run(*models, *common)
    assert "small and big have no level with the same stride and number of channels" in capfd.readouterr().err


def test_models_without_a_common_level(tmp_path: Path, capfd) -> None:
    first, second = make_project(tmp_path / "a"), make_project(tmp_path / "b")
    for project, level in ((first, "p3"), (second, "p4")):
        project.change_teacher(MODEL__RETINANET__IN_FEATURES=[level], MODEL__ANCHOR_GENERATOR__SIZES=[[32]])
        save_fixed_weights(project.teacher, project.teacher_weights)
    with pytest.raises(SystemExit):
        run(*_model(first, "fine"), *_model(second, "coarse"), "--output", tmp_path / "out", *_data(first))
    expected = "The models have no level of the same stride: fine has 8, coarse has 16"
    assert expected in capfd.readouterr().err
