"""`kd-d2 analyze errors` on tiny detectors: files, cached detections, and error messages."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from kd_d2.analysis.errors import STAGES, ErrorAnalysis, ModelErrors
from kd_d2.analysis.errors.analysis import read_supercategories, useful_workers
from kd_d2.analysis.errors.curves import SIZES

import cv2
import pytest
from helpers import data_arguments, make_project, run_command, teacher_arguments

run = functools.partial(run_command, "analyze", "errors")


def test_two_models_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Check files and table, that a second call reuses the detections, and that a super-category file changes Sim."""
    project, output = make_project(tmp_path), tmp_path / "out"
    common = ["--output", output, "--workers", 1]
    run(
        *teacher_arguments(project, "one"),
        *teacher_arguments(project, "the other"),
        *common,
        "--classes",
        *data_arguments(project),
    )
    printed = capsys.readouterr().out
    assert "The annotations have no super-categories, so Sim equals Loc" in printed
    assert "| one, all " in printed and "| the other, small " in printed
    found = json.loads((output / "errors.json").read_text())
    assert found["one"] == found["the other"]
    assert found["one"]["classes"].keys() == {"red", "green", "blue"}
    overall = found["one"]["overall"]["all"]
    assert overall["C75"] <= overall["C50"] <= overall["Loc"] == overall["Sim"] <= overall["Oth"] <= overall["FN"] == 1
    assert found["one"]["overall"]["large"]["C50"] is None  # no large objects; NaN is not valid JSON
    assert (output / "errors.csv").read_text().splitlines()[0] == "model,class,size,C75,C50,Loc,Sim,Oth,BG,FN"
    for name in ("curves", "sizes", "costs", "classes/red", "classes/green", "classes/blue"):
        assert cv2.imread(str(output / f"{name}.png")).std() > 0

    kept = (output / "one" / "coco_instances_results.json").stat().st_mtime_ns
    above = tmp_path / "above.yaml"
    above.write_text("red: color\ngreen: color\nblue: color\n")
    run(*teacher_arguments(project, "one"), *common, "--supercategories", above, *data_arguments(project))
    assert (output / "one" / "coco_instances_results.json").stat().st_mtime_ns == kept
    overall = json.loads((output / "errors.json").read_text())["one"]["overall"]["all"]
    assert overall["Sim"] == overall["Oth"]
    listed = json.loads((output / "pictures.json").read_text())["errors"]
    assert sorted(listed) == sorted(str(path.relative_to(output)) for path in output.rglob("*.png"))
    assert sorted(listed) == ["costs.png", "curves.png", "sizes.png"]


@pytest.mark.parametrize(("images", "classes", "expected"), [(87, 3, 1), (999, 20, 2), (1000, 20, 3), (5000, 80, 8)])
def test_workers_for_the_size_of_the_data(monkeypatch, images: int, classes: int, expected: int) -> None:
    """Check one process, and another for every 10,000 images times classes, on a machine with 8 cores."""
    monkeypatch.setattr("kd_d2.analysis.errors.analysis.available_cores", lambda: 8)
    assert useful_workers({"images": [{}] * images, "categories": [{}] * classes}) == expected


def test_supercategories_of_numbers(tmp_path: Path) -> None:
    """Check class names that YAML reads as numbers and as a truth value, as they are written."""
    names = ("0", "007", "1.50", "no")
    (tmp_path / "above.yaml").write_text("0: digit\n007: 1\n1.50: digit\nno: word\n")
    truth = {"categories": [{"id": number, "name": name} for number, name in enumerate(names)]}
    found = read_supercategories(str(tmp_path / "above.yaml"), truth)
    assert found == {0: "digit", 1: "1", 2: "digit", 3: "word"}


def test_a_class_called_all(tmp_path: Path) -> None:
    """Check that errors.csv has the rows of all classes and those of the class."""
    overall, own = ({size: dict.fromkeys(STAGES, area) for size in SIZES} for area in (0.25, 0.5))
    ErrorAnalysis({"one": ModelErrors(overall, {"all": own})}).draw(str(tmp_path))
    rows = [line.split(",") for line in (tmp_path / "errors.csv").read_text().splitlines()[1:]]
    assert [row[1:4] for row in rows if row[2] == "small"] == [["all", "small", "0.2500"], ["all", "small", "0.5000"]]


@pytest.mark.parametrize(
    ("arguments", "data", "expected"),
    [
        (["--workers", 0], {}, "--workers is 0; it must be at least 1"),
        (["--supercategories", "none.yaml"], {}, "--supercategories: there is no file"),
        ([], {"MODEL.RETINANET.NUM_CLASSES": 4}, "has 3 classes, but the model (RetinaNet) predicts 4"),
        ([], {"DATASETS.TEST": ()}, "DATASETS.TEST is empty"),
    ],
)
def test_what_cannot_be_analyzed(
    tmp_path: Path, capfd: pytest.CaptureFixture, arguments: list, data: dict, expected: str
) -> None:
    project = make_project(tmp_path)
    with pytest.raises(SystemExit):
        run(
            *teacher_arguments(project, "one"),
            "--output",
            tmp_path / "out",
            *arguments,
            *data_arguments(project, **data),
        )
    assert expected in capfd.readouterr().err


def test_wrong_models(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Check a missing checkpoint, two models with one title, an unknown class, and another model's checkpoint."""
    project, other = make_project(tmp_path / "a"), make_project(tmp_path / "b", "fcos")
    above = tmp_path / "above.yaml"
    above.write_text("purple: color\n")
    end = ["--output", tmp_path / "out", "--workers", 1]
    for arguments, expected in (
        (["--model", f"one={project.teacher}", "none.pth", *end], "--model one: there is no file"),
        (
            [*teacher_arguments(project, "one"), *teacher_arguments(project, "one"), *end],
            "--model: two models have the title 'one'",
        ),
        (
            [*teacher_arguments(project, "one"), *end, "--supercategories", above],
            "names the class 'purple'; available: red, green, blue",
        ),
        (
            ["--model", f"one={project.teacher}", other.teacher_weights, *end],
            "Do its config and weights match?",
        ),
    ):
        with pytest.raises(SystemExit):
            run(*arguments, *data_arguments(project))
        assert expected in capfd.readouterr().err
