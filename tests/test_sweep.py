"""Sweeps: matrix files, table statistics and resuming."""

import errno
import fcntl
import json
import linecache
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

from kd_d2 import DISTILLER_REGISTRY, UserError, signals
from kd_d2.adapters import DETECTOR_ADAPTER_REGISTRY, RCNNAdapter, RetinaNetAdapter
from kd_d2.cli import main
from kd_d2.config import load_config
from kd_d2.extensions import import_extensions
from kd_d2.figures import save_figure
from kd_d2.files import write_json
from kd_d2.sweep import SweepOptions, costs, plots, report, run_sweep, runner
from kd_d2.sweep.costs import measure_costs
from kd_d2.sweep.matrix import read_matrix
from kd_d2.sweep.own_code import code_of, parts_of_detectors
from kd_d2.sweep.plots import look, plot_ap, plot_curves
from kd_d2.sweep.report import first_curves, write_report
from kd_d2.sweep.results import read_curves, read_metrics, read_result, result_path
from kd_d2.sweep.runner import Job, run_jobs, teacher_evaluation, training_job
from kd_d2.sweep.settings import first_difference, measured_settings, of_evaluation, without_locations
from kd_d2.sweep.table import HEADERS, Row, as_csv, as_markdown, build_rows, format_row, pooled_deviation, read_results
from kd_d2.text import wrapped_label

import pytest
import torch
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_backbone, build_model
from detectron2.modeling.meta_arch import GeneralizedRCNN, RetinaNet
from fvcore.nn import FlopCountAnalysis
from helpers import clean_process, make_coco
from torch import nn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STUDENT = os.path.join(ROOT, "configs", "tiny", "retinanet-student.yaml")


@pytest.fixture(autouse=True)
def log_of_progress(caplog):
    caplog.set_level(logging.INFO, "kd_d2")


def write_matrix(folder, text):
    path = folder / "matrix.yaml"
    path.write_text(text.replace("STUDENT", STUDENT).replace("FOLDER", str(folder)))
    return str(path)


MATRIX = """
config: STUDENT
baseline: inheritance
student: plain
teacher: {config: STUDENT}
cells:
  plain: {title: plain student}
  inheritance: {seeds: [0, 1, 2]}
  better: {title: a method, seeds: [0, 1, 2], opts: {SOLVER.BASE_LR: 0.5}}
  unfinished: {}
"""


def result(cell, seed, ap, **more):
    scores = {"AP": ap, "AP50": 2 * ap, "AP75": ap, "APs": float("nan"), "APm": ap, "APl": ap}
    return {
        "cell": cell,
        "seed": seed,
        "scores": scores,
        "settings": {},
        "curves": {"total_loss": [[0, 2.0], [9, 1.0]]},
        **more,
    }


@pytest.fixture
def finished(tmp_path):
    matrix = read_matrix(write_matrix(tmp_path, MATRIX))
    values = {"teacher": [22.0], "plain": [2.0], "inheritance": [9.0, 10.0, 11.0], "better": [13.0, 14.0, 15.0]}
    for cell, aps in values.items():
        for seed, ap in enumerate(aps):
            path = result_path(str(tmp_path), cell, seed)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w") as file:
                json.dump(result(cell, seed, ap, seconds_per_iteration=1.0 + seed), file)
    return matrix, str(tmp_path)


def test_rows_hold_means_gains_and_gaps(finished):
    """Check the gain over the baseline, the test of two deviations and the share of the gap, worked out by hand."""
    matrix, output = finished
    rows = {row.name: row for row in build_rows(matrix, read_results(matrix, output), {"plain": {"params": 1.5}})}
    assert list(rows) == ["teacher", "plain", "inheritance", "better"]
    assert rows["better"].gain == pytest.approx(4.0)
    assert rows["better"].is_better is True  # deviations 1 and 1: pooled 1, 4 > 2
    assert rows["better"].gap_closed == pytest.approx((14 - 2) / (22 - 2))
    assert rows["plain"].gain == pytest.approx(-8.0) and rows["plain"].is_better is None
    assert rows["inheritance"].gain is None and rows["teacher"].gap_closed is None
    assert rows["better"].seconds_per_iteration == pytest.approx(2.0)
    assert rows["plain"].costs["params"] == 1.5


def test_pooled_deviation():
    """Check samples of different sizes, with variances 1 (n=3) and 8 (n=2): sqrt((2*1 + 1*8) / 3)."""
    assert pooled_deviation([1.0, 2.0, 3.0], [0.0, 4.0]) == pytest.approx(math.sqrt(10 / 3))
    assert pooled_deviation([1.0], [1.0, 2.0]) is None


def test_a_gain_within_the_spread_is_not_better(finished):
    """Check that a mean gain of at most two deviations does not count as better."""
    matrix, output = finished
    results = read_results(matrix, output)
    for entry, ap in zip(results["better"], (10.0, 12.0, 14.0)):
        entry["scores"]["AP"] = ap
    better = next(row for row in build_rows(matrix, results, {}) if row.name == "better")
    assert better.gain == pytest.approx(2.0)
    assert better.is_better is False  # pooled sqrt((1 + 4) / 2) = 1.58
    for entry, ap in zip(results["better"], (11.0, 12.0, 13.0)):
        entry["scores"]["AP"] = ap
    better = next(row for row in build_rows(matrix, results, {}) if row.name == "better")
    assert better.gain == 2.0 and better.is_better is False  # exactly two deviations of 1


def test_a_cell_that_detects_nothing_is_read_and_drawn(finished, tmp_path):
    """Check an AP of NaN, which is null in JSON, in the scores and in the curve."""
    matrix, output = finished
    path = result_path(output, "better", 0)
    with open(path) as file:
        original = file.read()
    nothing = {**json.loads(original), "curves": {"bbox/AP": [[1, None], [2, None]], "loss_cls": [[1, 0.5], [2, None]]}}
    nothing["scores"]["AP"] = None
    try:
        write_json(path, nothing)
        results = read_results(matrix, output)
        rows = {row.name: dict(zip(HEADERS, format_row(row), strict=True)) for row in build_rows(matrix, results, {})}
        assert [rows["better"][column] for column in ("AP", "gain", "> 2 sd", "gap closed")] == [""] * 4
        plot_curves(first_curves(matrix, results), str(tmp_path / "curves.png"))
    finally:
        write_json(path, json.loads(original))


def test_table_texts(finished):
    """Check that the printed table has the spread, and omits columns without values."""
    matrix, output = finished
    rows = build_rows(matrix, read_results(matrix, output), {})
    text = as_markdown(rows)
    assert "14.00 ± 1.00" in text and "+4.00" in text and "0.60" in text
    assert "APs" not in text and "GFLOPs" not in text
    assert as_csv(rows).splitlines()[4].startswith("better,3,14.00 ± 1.00,+4.00,yes,0.60,28.00 ± 2.00")


def test_multipliers_of_the_losses(finished):
    """Check geometric means over seeds, 2 for 1, 2 and 4, names if there are several, and no column without any."""
    matrix, output = finished
    results = read_results(matrix, output)
    assert "multipliers" not in as_markdown(build_rows(matrix, results, {}))
    for entry, value in zip(results["better"], (1.0, 2.0, 4.0)):
        entry["multipliers"] = {"PFI": value}
    results["inheritance"][0]["multipliers"] = {"PFI": 1500.0, "ICD": 0.25}
    rows = {row.name: row for row in build_rows(matrix, results, {})}
    assert rows["better"].multipliers == {"PFI": pytest.approx(2.0)}
    texts = {name: dict(zip(HEADERS, format_row(row), strict=True))["multipliers"] for name, row in rows.items()}
    assert texts == {"teacher": "", "plain": "", "inheritance": "PFI 1.5e+03, ICD 0.25", "better": "2"}
    del results["better"][0]["multipliers"]  # as in files of older versions
    (better,) = (row for row in build_rows(matrix, results, {}) if row.name == "better")
    assert better.multipliers == {"PFI": pytest.approx(8**0.5)}


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf])
def test_a_multiplier_without_a_logarithm(tmp_path, value):
    path = tmp_path / "a-seed0.json"
    path.write_text(json.dumps(result("a", 0, 1.0, multipliers={"PFI": value})))
    with pytest.raises(
        UserError, match=rf"{re.escape(str(path))}: the multiplier of 'PFI' is {value}; it must be a number above 0"
    ):
        read_result(str(path))


@pytest.mark.parametrize("point", [[1], [1, 2.0, 3.0], []])
def test_a_point_of_a_curve_without_two_coordinates(tmp_path, point):
    path = tmp_path / "a-seed0.json"
    path.write_text(json.dumps(result("a", 0, 1.0) | {"curves": {"loss": [[0, 1.0], point]}}))
    sentence = rf"{re.escape(str(path))}: an entry of 'loss' has {len(point)} entries, not 2"
    with pytest.raises(UserError, match=sentence):
        read_result(str(path))


def test_a_result_without_curves(tmp_path):
    matrix = read_matrix(write_matrix(tmp_path, MATRIX))
    without = {key: value for key, value in result("plain", 0, 1.0).items() if key != "curves"}
    assert first_curves(matrix, {"plain": [without]}) == {"plain student": {}}


def test_fragments_are_laid_over_the_config(tmp_path):
    """Check several fragments and their bases, the cell's own overrides last, and the message for a missing file."""
    (tmp_path / "base.yaml").write_text("SOLVER: {GAMMA: 0.2, BASE_LR: 0.3}\n")
    (tmp_path / "one.yaml").write_text("_BASE_: base.yaml\nSOLVER: {BASE_LR: 0.4}\nMODEL: {KD: {DISTILLERS: [ICD]}}\n")
    (tmp_path / "two.yaml").write_text("SOLVER: {MOMENTUM: 0.5}\n")
    text = "config: STUDENT\nbaseline: a\ncells: {a: {fragments: [one.yaml, two.yaml], opts: {SOLVER.GAMMA: 0.7}}}\n"
    cell = read_matrix(write_matrix(tmp_path, text)).cell("a")
    settings = measured_settings(cell.config, [*cell.opts])
    assert settings["MODEL.KD.DISTILLERS"] == ["ICD"]
    assert [settings[f"SOLVER.{key}"] for key in ("GAMMA", "BASE_LR", "MOMENTUM")] == [0.7, 0.4, 0.5]
    (tmp_path / "two.yaml").unlink()
    with pytest.raises(UserError, match=r"matrix.yaml: cell a: there is no file .*two.yaml"):
        read_matrix(str(tmp_path / "matrix.yaml"))


def test_nested_opts_are_read_as_in_a_config(tmp_path):
    """Check that overrides may be written as groups of keys, which a command line does not have."""
    text = "config: STUDENT\nbaseline: a\ncells: {a: {opts: {SOLVER: {BASE_LR: 0.5, AMP: {ENABLED: True}}, VIS_PERIOD: 1}}}\n"
    cell = read_matrix(write_matrix(tmp_path, text)).cell("a")
    assert cell.opts == ("SOLVER.BASE_LR", 0.5, "SOLVER.AMP.ENABLED", True, "VIS_PERIOD", 1)


TAUGHT = (
    "{MODEL.META_ARCHITECTURE: KDMetaArch, MODEL.KD.INHERIT.ENABLED: True, "
    "MODEL.KD.TEACHER: {CONFIG_FILE: STUDENT, WEIGHTS: FOLDER/teacher.pth}}"
)


def test_the_teacher_is_evaluated_among_the_cells(tmp_path, monkeypatch):
    """Check that the evaluation is the first job, and the number of parallel jobs and of threads."""
    started = []
    monkeypatch.setattr(
        report, "run_jobs", lambda jobs, parallel, threads, gpus: started.append((jobs, parallel, threads))
    )
    monkeypatch.setattr(report, "measure_costs", lambda *arguments: {})
    (tmp_path / "teacher.pth").touch()
    text = f"config: STUDENT\nbaseline: a\ncells: {{a: {{opts: {TAUGHT}}}}}\n"
    run_sweep(read_matrix(write_matrix(tmp_path, text)), str(tmp_path / "output"), [], SweepOptions(jobs=2))
    ((jobs, parallel, threads),) = started
    assert ([job.cell for job in jobs], parallel, threads) == (["teacher", "a"], 2, 1)


def test_a_teacher_of_other_classes_is_not_evaluated(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "kd_d2")
    started = []
    monkeypatch.setattr(report, "run_jobs", lambda jobs, *_: started.extend(job.cell for job in jobs))
    monkeypatch.setattr(report, "measure_costs", lambda *arguments: {})
    (tmp_path / "teacher.pth").touch()
    text = f"config: STUDENT\nbaseline: a\ncells: {{a: {{opts: {TAUGHT}}}}}\n"
    opts = ["MODEL.RETINANET.NUM_CLASSES", "5"]
    run_sweep(read_matrix(write_matrix(tmp_path, text)), str(tmp_path / "output"), opts)
    assert started == ["a"]
    assert "The teacher is not evaluated: it has 8 classes and the students 5." in caplog.text


def test_the_teachers_row_is_one_for_all_cells(tmp_path):
    """Check that only what its evaluation uses counts, also in files of cells that were first before."""
    (tmp_path / "teacher.pth").touch()
    more = TAUGHT[:-1] + ", INPUT.RANDOM_FLIP: none, INPUT.MIN_SIZE_TRAIN: [64], DATASETS.TRAIN: [synthetic_val]}"
    large = TAUGHT[:-1] + ", INPUT.MIN_SIZE_TEST: 64}"
    text = (
        f"config: STUDENT\nbaseline: a\ncells: {{a: {{opts: {TAUGHT}}}, b: {{opts: {more}}}, c: {{opts: {large}}}}}\n"
    )
    matrix, folder = read_matrix(write_matrix(tmp_path, text)), str(tmp_path)
    a, b, c = (teacher_evaluation(cell, folder, folder, []) for cell in matrix.cells)
    assert a.settings == b.settings
    settings = measured_settings(STUDENT, [*matrix.cell("b").opts])
    assert "INPUT.RANDOM_FLIP" in settings
    write_json(a.result, result("teacher", 0, 1.0, settings=settings))
    assert runner.is_finished(a)
    with pytest.raises(
        UserError, match=r"was measured with different settings \(INPUT.MIN_SIZE_TEST: 144 then, 64 now\)"
    ):
        runner.is_finished(c)


def test_a_teacher_on_other_data_is_left_out(finished, caplog):
    """Check that another sweep's teacher in the folder of the results is not in the table, and closes no gap."""
    matrix, output = finished
    path = result_path(output, "teacher", 0)
    write_json(path, result("teacher", 0, 22.0, settings={"DATASETS.TEST": ["another"]}))
    rows = build_rows(matrix, read_results(matrix, output), {})
    assert [row.name for row in rows] == ["plain", "inheritance", "better"]
    assert [row.gap_closed for row in rows] == [None] * 3
    assert f"{path} is left out: the cells were evaluated on other data." in caplog.text


def test_the_gap_to_another_teacher(finished):
    """Check a cell whose teacher is not the one of the teacher's row, and a cell and a row of unknown files."""
    matrix, output = finished
    results = read_results(matrix, output)
    for entry in (*results["teacher"], *results["inheritance"]):
        entry["settings"]["files of the teacher"] = "one"
    for entry in results["better"]:
        entry["settings"]["files of the teacher"] = "two"
    rows = {row.name: row for row in build_rows(matrix, results, {})}
    assert (rows["inheritance"].gap_closed, rows["better"].gap_closed) == (pytest.approx((10 - 2) / (22 - 2)), None)
    del results["teacher"][0]["settings"]["files of the teacher"]
    rows = {row.name: row for row in build_rows(matrix, results, {})}
    assert rows["better"].gap_closed == pytest.approx((14 - 2) / (22 - 2))


OWN_METHOD = """
from kd_d2 import DISTILLER_REGISTRY, Distiller

FACTOR = {factor}
{comment}
@DISTILLER_REGISTRY.register()
class MyMethod(Distiller):
    CONFIG_NODE = "MINE"
    needs, loss_names = frozenset({{"features"}}), ("loss_mine",)

    def forward(self, student, teacher, targets):
        return {{"loss_mine": FACTOR * student.features[8].mean()}}
"""


def test_results_of_another_version_of_an_own_method_are_refused(tmp_path):
    """Check the code of its file, without comments; and that other cells do not have it."""
    (tmp_path / "teacher.pth").touch()
    path = tmp_path / "my_method.py"
    opts = [
        "MODEL.META_ARCHITECTURE", "KDMetaArch", "MODEL.KD.DISTILLERS", ("MyMethod",),
        "MODEL.KD.TEACHER.CONFIG_FILE", STUDENT, "MODEL.KD.TEACHER.WEIGHTS", str(tmp_path / "teacher.pth"),
    ]  # fmt: skip

    def settings(factor=1, comment=""):
        path.write_text(OWN_METHOD.format(factor=factor, comment=comment))
        linecache.checkcache()
        import_extensions([str(path)])
        try:
            return measured_settings(STUDENT, opts)
        finally:
            del sys.modules["my_method"], DISTILLER_REGISTRY._obj_map["MyMethod"]

    first = settings()
    job = Job("a", 0, [], str(tmp_path), str(tmp_path / "a.json"), first)
    write_json(job.result, result("a", 0, 1.0, settings=first))
    job.settings = settings(comment="# a comment\n")
    assert runner.is_finished(job)
    job.settings = settings(factor=2)
    with pytest.raises(UserError, match=r"with different settings \(code of the methods from --import: "):
        runner.is_finished(job)
    opts[3] = ("PKD",)
    assert "code of the methods from --import" not in settings()


OWN_DETECTOR = """
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_resnet_backbone
from detectron2.modeling.meta_arch import RetinaNet
from kd_d2.adapters import DETECTOR_ADAPTER_REGISTRY, RetinaNetAdapter

@META_ARCH_REGISTRY.register()
class MyDetector(RetinaNet):
    factor = 1

@DETECTOR_ADAPTER_REGISTRY.register()
class MyAdapter(RetinaNetAdapter):
    model_class = MyDetector

@BACKBONE_REGISTRY.register()
def my_backbone(cfg, input_shape):
    return build_resnet_backbone(cfg, input_shape)
"""


@pytest.fixture
def settings_with(tmp_path):
    """Return a function (text of my_detector.py, config keys) -> settings of a cell with this file imported."""
    (tmp_path / "teacher.pth").touch()
    teacher = {"MODEL.KD.TEACHER.CONFIG_FILE": STUDENT, "MODEL.KD.TEACHER.WEIGHTS": str(tmp_path / "teacher.pth")}
    path = tmp_path / "my_detector.py"

    def settings(text, keys):
        path.write_text(text)
        linecache.checkcache()
        import_extensions([str(path)])
        try:
            return measured_settings(STUDENT, [x for pair in (teacher | keys).items() for x in pair])
        finally:
            del sys.modules["my_detector"], META_ARCH_REGISTRY._obj_map["MyDetector"]
            del BACKBONE_REGISTRY._obj_map["my_backbone"], DETECTOR_ADAPTER_REGISTRY._obj_map["MyAdapter"]

    return settings


@pytest.mark.parametrize(
    "names",
    [
        {"MODEL.META_ARCHITECTURE": "MyDetector"},
        {"MODEL.BACKBONE.NAME": "my_backbone"},
        {"MODEL.META_ARCHITECTURE": "KDMetaArch", "MODEL.KD.STUDENT": "MyDetector", "MODEL.KD.DISTILLERS": ("PKD",)},
        {},
    ],
)
def test_settings_have_the_code_of_own_detectors(settings_with, names):
    """Check a detector, a backbone and a student of a file, with an adapter; and that other cells do not have it."""

    def code(text):
        return settings_with(text, names).get("code of the detectors from --import")

    first = code(OWN_DETECTOR)
    assert (first is not None) == bool(names)
    assert code(OWN_DETECTOR + "# a comment") == first
    assert (code(OWN_DETECTOR.replace("factor = 1", "factor = 2")) == first) == (not names)


def test_settings_have_the_code_of_an_own_teacher(tmp_path, settings_with):
    """Check a teacher with a backbone of a file; and that the teacher's evaluation depends on its code, but not on the student's."""
    file = tmp_path / "teacher.yaml"
    file.write_text(f"_BASE_: {STUDENT}\nMODEL: {{BACKBONE: {{NAME: my_backbone}}}}\n")
    keys = {"MODEL.META_ARCHITECTURE": "KDMetaArch", "MODEL.KD.DISTILLERS": ("PKD",)}
    of_teacher = keys | {"MODEL.KD.TEACHER.CONFIG_FILE": str(file)}
    of_student = keys | {"MODEL.KD.STUDENT": "MyDetector"}
    edited = OWN_DETECTOR.replace("factor = 1", "factor = 2")

    def difference(keys):
        before, now = settings_with(OWN_DETECTOR, keys), settings_with(edited, keys)
        names = (
            first_difference(*both).partition(": ")[0] for both in ((before, now), map(of_evaluation, (before, now)))
        )
        return tuple(names)

    assert difference(of_teacher) == ("code of the teacher from --import", "code of the teacher from --import")
    assert difference(of_student) == ("code of the detectors from --import", "")


def test_code_without_comments_and_without_libraries(tmp_path, monkeypatch):
    """Check the text, which is the same in all versions of Python, and a class that is derived from one of a library."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_networks.py").write_text(
        "from torchvision.models import ResNet\n\n\nclass MyNetwork(ResNet):  # a comment\n    factor = (2)\n"
    )
    import_extensions(["my_networks"])
    try:
        code = code_of([sys.modules["my_networks"].MyNetwork])
    finally:
        del sys.modules["my_networks"]
    assert code == "from torchvision.models import ResNet\n\nclass MyNetwork(ResNet):\n    factor = 2"


def test_parts_of_detectors_are_found_by_name_and_adapters_by_class():
    """Check the names in a config, and that an adapter is found by its class of models."""
    cfg = load_config(STUDENT, ["MODEL.META_ARCHITECTURE", "RetinaNet"])
    parts = parts_of_detectors(cfg)
    assert {RetinaNet, RetinaNetAdapter, BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)} <= {*parts}
    assert GeneralizedRCNN not in parts and RCNNAdapter not in parts


OWN_PACKAGE = {
    "my_package/__init__.py": "",
    "my_package/method.py": "from . import formulas\n" + OWN_METHOD.format(factor=1, comment=""),
    "my_package/formulas.py": "import my_constants\n",
    "my_package/unused.py": "",
    "my_constants.py": "import my_package.method\n\nALPHA = 1\n",
}


@pytest.mark.parametrize(
    ("changed", "is_part"),
    [("my_package/formulas.py", True), ("my_constants.py", True), ("my_package/unused.py", False)],
)
def test_the_code_of_an_own_method_includes_the_modules_that_it_imports(tmp_path, monkeypatch, changed, is_part):
    """Check a module of the same package, one beside it that imports the method, and one that is not imported."""
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in OWN_PACKAGE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "teacher.pth").touch()
    opts = [
        "MODEL.META_ARCHITECTURE", "KDMetaArch", "MODEL.KD.DISTILLERS", ("MyMethod",),
        "MODEL.KD.TEACHER.CONFIG_FILE", STUDENT, "MODEL.KD.TEACHER.WEIGHTS", str(tmp_path / "teacher.pth"),
    ]  # fmt: skip
    try:
        import_extensions(["my_package.method"])
        before = measured_settings(STUDENT, opts)
        with open(tmp_path / changed, "a") as file:
            file.write("BETA = 2\n")
        linecache.checkcache()
        assert (measured_settings(STUDENT, opts) != before) == is_part
    finally:
        DISTILLER_REGISTRY._obj_map.pop("MyMethod", None)
        for name in [name for name in sys.modules if name.startswith(("my_package", "my_constants"))]:
            del sys.modules[name]


def test_paths_in_a_sweep_are_relative_to_its_files(tmp_path, monkeypatch):
    """Check those of a sweep's opts and of a fragment elsewhere; those in the working directory come first."""
    (tmp_path / "parts").mkdir()
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in ("start.pth", "parts/teacher.pth", "here/own.pth", "own.pth", "data.json"):
        (tmp_path / name).touch()
    (tmp_path / "images").mkdir()
    (tmp_path / "parts/part.yaml").write_text("MODEL: {KD: {TEACHER: {WEIGHTS: teacher.pth}}}\n")
    opts = "{MODEL.WEIGHTS: 'start.pth?matching_heuristics=True', DATASETS.COCO_JSON: [[mine, data.json, images]]}"
    text = (
        f"config: STUDENT\nbaseline: a\ncells: {{a: {{fragments: [parts/part.yaml], opts: {opts}}}, "
        "b: {opts: {MODEL.WEIGHTS: own.pth, MODEL.KD.TEACHER.CONFIG_FILE: COCO-Detection/retinanet_R_50_FPN_1x.yaml}}}\n"
    )
    matrix = read_matrix(write_matrix(tmp_path, text))
    folder = str(tmp_path)
    assert matrix.cell("a").opts == (
        "MODEL.KD.TEACHER.WEIGHTS", f"{folder}/parts/teacher.pth", "MODEL.WEIGHTS", f"{folder}/start.pth?matching_heuristics=True",
        "DATASETS.COCO_JSON", [["mine", f"{folder}/data.json", f"{folder}/images"]],
    )  # fmt: skip
    assert matrix.cell("b").opts[1::2] == ("own.pth", "COCO-Detection/retinanet_R_50_FPN_1x.yaml")


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (
            "{DATASETS.TEST: [synthetic_val, synthetic_train]}",
            "DATASETS.TEST names 2 datasets; a sweep needs exactly one",
        ),
        ("{DATASETS.TEST: []}", "DATASETS.TEST names 0 datasets"),
        (
            "{DATASETS.TEST: [synthetic_train]}",
            "the cell bad is evaluated on synthetic_train and good on synthetic_val, so that they cannot be compared",
        ),
        (
            "{DATASETS.COCO_JSON: [[mine, none.json, images]], DATASETS.TRAIN: [mine]}",
            r"DATASETS.COCO_JSON \(mine\): there is no file",
        ),
        (
            "{SOLVER.GAMMA: 0.2}",
            r"bad-seed0.json was measured with different settings \(SOLVER.GAMMA: 0.3 then, 0.2 now",
        ),
    ],
)
def test_mistakes_are_found_before_the_teacher_is_trained(tmp_path, monkeypatch, opts, message):
    monkeypatch.setattr(report, "run_jobs", lambda *_: pytest.fail("trained"))
    text = f"config: STUDENT\nbaseline: good\nteacher: {{config: STUDENT}}\ncells: {{good: , bad: {{opts: {opts}}}}}\n"
    results = tmp_path / "output" / "results"
    results.mkdir(parents=True)
    if "GAMMA" in opts:
        settings = measured_settings(STUDENT, ["SOLVER.GAMMA", 0.3])
        write_json(result_path(str(results), "bad", 0), result("bad", 0, 1.0, settings=settings))
    with pytest.raises(UserError, match=message):
        run_sweep(read_matrix(write_matrix(tmp_path, text)), str(tmp_path / "output"), [])


@pytest.mark.parametrize(("key", "place"), [("SEED", "the cell's seeds"), ("OUTPUT_DIR", "the option --output")])
def test_keys_that_a_sweep_sets_are_refused_on_its_command_line(tmp_path, key, place):
    matrix = read_matrix(write_matrix(tmp_path, MATRIX))
    with pytest.raises(UserError, match=f"{key} on the command line has no effect; use {place}"):
        run_sweep(matrix, str(tmp_path / "output"), [key, "5"])


def test_a_cell_with_the_teachers_title(tmp_path):
    text = "config: STUDENT\nbaseline: a\ncells: {a: {title: teacher}}\n"
    with pytest.raises(UserError, match="no cell can have the title 'teacher'"):
        read_matrix(write_matrix(tmp_path, text))


def test_the_columns_of_other_tasks(finished):
    """Check that AP of masks and keypoints has columns if a cell has it."""
    matrix, output = finished
    results = read_results(matrix, output)
    results["plain"][0]["scores"] |= {"mask AP": 7.5, "keypoint AP": None}
    rows = build_rows(matrix, results, {})
    headers = as_csv(rows).partition("\n")[0].split(",")
    plain = as_csv([row for row in rows if row.name == "plain"]).splitlines()[1].split(",")
    assert plain[headers.index("mask AP")] == "7.50"
    table = as_markdown(rows)
    assert "mask AP" in table
    assert "keypoint AP" not in table


def test_an_earlier_plot_of_curves_is_removed(tmp_path):
    path = tmp_path / "curves.png"
    plot_curves({"a": {"total_loss": [(1, 2.0), (2, 1.0)]}}, str(path))
    assert path.exists()
    plot_curves({"a": {"total_loss": [(1, 2.0)]}}, str(path))
    plot_curves({}, str(path))
    assert not path.exists()


def test_plots_without_a_value(tmp_path, monkeypatch):
    """Check AP of a cell that detects nothing, and AP50, which no cell has: no axis, and no curve of AP."""
    none, figures = math.nan, []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *a: figures.append(figure))
    scores = {"found": {"AP": [10.0, 12.0], "AP50": [none]}, "nothing": {"AP": [none, 1.0], "AP50": [none]}}
    plot_ap([Row(title, title, scores[title], {}) for title in scores], str(tmp_path / "ap.png"))
    curves = {"bbox/AP": [(1, none), (2, none), (3, 1.0)], "total_loss": [(1, 2.0), (2, 1.0)]}
    plot_curves({"nothing": curves}, str(tmp_path / "curves.png"))
    ap, ap50, *losses = figures[0].axes + figures[1].axes
    assert [text.get_text() for axis in (ap, ap50) for text in axis.texts] == [" 11.0", *["no value"] * 3]
    assert len(ap.get_xticks()) > 1 and len(ap50.get_xticks()) == 0
    assert [axis.get_title() for axis in losses] == ["total_loss"]


@pytest.mark.parametrize(("ap", "end"), [(0.0, 1), (0.5, 1), (50.0, 56)])
def test_axis_of_low_ap(tmp_path, monkeypatch, ap, end):
    """Check that the axis starts at 0 and ends at 1 if every AP is lower, or 12 % beyond the longest bar."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *a: figures.append(figure))
    rows = [Row(name, name, {"AP": [value], "AP50": [value]}, {}) for name, value in (("teacher", 0.0), ("a", ap))]
    plot_ap(rows, str(tmp_path / "ap.png"))
    assert [axis.get_xlim() for axis in figures[0].axes] == [pytest.approx((0, end))] * 2


def test_threads_of_jobs_sleep_while_they_wait(tmp_path, monkeypatch):
    """Check the environment of a job, and that the user's own variables take precedence."""
    script = tmp_path / "program.py"
    script.write_text(
        "import json, os, sys\njson.dump({'bbox': {}, **os.environ}, open(sys.argv[1] + '/train.json', 'w'))\n"
    )
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, str(script)))
    monkeypatch.setenv("KMP_BLOCKTIME", "5")
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    run_jobs([Job("a", 0, [str(tmp_path)], str(tmp_path), str(tmp_path / "a.json"), {})], 1, 3)
    seen = json.loads((tmp_path / "train.json").read_text())
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
    assert [seen[name] for name in names] == ["PASSIVE", "0", "5", "3"]


def test_jobs_are_distributed_over_gpus(tmp_path, monkeypatch):
    """Check four jobs, two at a time, of which the second takes until all others have ended."""
    script = tmp_path / "program.py"
    script.write_text(
        "import json, os, sys, time\n"
        "name, folder = sys.argv[1:]\n"
        "while name == 'b' and not os.path.exists(folder + '/../d.json'):\n"
        "    time.sleep(0.05)\n"
        "json.dump({'bbox': {'AP': float(os.environ['CUDA_VISIBLE_DEVICES'])}}, open(folder + '/train.json', 'w'))\n"
    )
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, str(script)))
    jobs = [Job(n, 0, [n, str(tmp_path / n)], str(tmp_path / n), str(tmp_path / f"{n}.json"), {}) for n in "abcd"]
    assert run_jobs(jobs, 2, 1, ["4", "5"]) == []
    assert [json.loads((tmp_path / f"{n}.json").read_text())["scores"]["AP"] for n in "abcd"] == [4, 5, 4, 4]


def test_one_training_for_each_gpu(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(report, "run_jobs", lambda jobs, parallel, threads, gpus: started.append((parallel, gpus)))
    monkeypatch.setattr(report, "measure_costs", lambda *arguments: {})
    matrix = read_matrix(write_matrix(tmp_path, "config: STUDENT\nbaseline: a\ncells: {a: }\n"))
    run_sweep(matrix, str(tmp_path / "output"), [], SweepOptions(gpus=["0", "1", "2"]))
    run_sweep(matrix, str(tmp_path / "output"), [], SweepOptions(gpus=["0", "1"], jobs=6))
    assert started == [(3, ["0", "1", "2"]), (6, ["0", "1"])]


def test_plots_show_every_finished_cell(finished, tmp_path, monkeypatch):
    """Check bars, the teacher's line and the lines of losses, of the cells that are finished."""
    matrix, output = finished
    results = read_results(matrix, output)
    rows, curves = build_rows(matrix, results, {}), first_curves(matrix, results)
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *a: (figures.append(figure), save_figure(figure, *a)))
    plot_ap(rows, str(tmp_path / "ap.png"))
    plot_curves(curves, str(tmp_path / "curves.png"))
    bars, lines = figures[0].axes[0], figures[1].axes
    titles = [row.title for row in rows if row.name != "teacher"]
    assert [text.get_text() for text in bars.get_yticklabels()] == titles
    assert [bar.get_width() for bar in bars.patches] == [mean(r.scores["AP"]) for r in rows if r.name != "teacher"]
    assert [line.get_label() for line in bars.lines if line.get_linestyle() == "--"] == ["teacher"]
    assert [text.get_text() for text in figures[1].legends[0].get_texts()] == list(curves)
    assert all(len(axis.lines) <= len(curves) for axis in lines) and len(lines[0].lines) == len(curves)
    assert all((tmp_path / name).is_file() for name in ("ap.png", "curves.png"))


def test_curves_of_several_test_sets_and_negative_losses(tmp_path, monkeypatch):
    """Check AP of each test set, first, and that only axes without negative values begin at 0."""
    rows = [{"iteration": n, "total_loss": 1.0 + n, "loss_own": -1.0 - n, "time": 1.0} for n in (0, 1)]
    for n in (2, 3):
        rows.append({"iteration": n, "day/bbox/AP": n, "night/bbox/AP": 2 * n, "day/bbox/AP-red": 5.0})
    curves = read_curves(rows)
    assert curves.keys() == {"day/bbox/AP", "night/bbox/AP", "total_loss", "loss_own"}
    assert curves["night/bbox/AP"] == [[2, 4.0], [3, 6.0]]
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *a: figures.append(figure))
    plot_curves({"one": curves}, str(tmp_path / "curves.png"))
    drawn = {axis.get_title(): axis.get_ylim() for axis in figures[0].axes if axis.get_title()}
    assert list(drawn) == ["day/AP", "night/AP", "total_loss", "loss_own"]
    assert drawn["total_loss"][0] == drawn["day/AP"][0] == 0
    assert drawn["loss_own"][0] < -2 < -1 < drawn["loss_own"][1]


def test_a_loss_that_hardly_falls_is_below_the_frame(tmp_path, monkeypatch):
    """Check that matplotlib's margin of 5 % is a share of the axis from 0, not of the loss's small range."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *a: figures.append(figure))
    plot_curves({"one": {"total_loss": [(1, 2.0), (2, 1.96)]}}, str(tmp_path / "curves.png"))
    assert figures[0].axes[0].get_ylim() == (0, pytest.approx(2.1))


def test_long_titles_are_told_apart(tmp_path, monkeypatch):
    """Check titles that differ in the middle alone, in both plots, and a legend that is no wider than its figure."""
    titles = [f"{'inheritance, ' * 6}{method}{', levels balanced' * 5}" for method in ("SSIM", "CrossKD")]
    assert wrapped_label("a " * 300 + "z").splitlines() == ["a " * 39 + "a", "a " * 38 + "...", "a " * 20 + "z"]
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *a: (figures.append(figure), save_figure(figure, *a)))
    scores = {column: [1.0] for column in ("AP", "AP50")}
    plot_ap([Row(title, title, scores, {}) for title in titles], str(tmp_path / "ap.png"))
    plot_curves({title: {"total_loss": [(1, 2.0), (2, 1.0)]} for title in titles}, str(tmp_path / "curves.png"))
    bars, legend = figures[0].axes[0].get_yticklabels(), figures[1].legends[0]
    for texts in (bars, legend.get_texts()):
        assert [text.get_text().replace("\n", " ") for text in texts] == titles
    assert legend.get_window_extent().width <= figures[1].bbox.width


@pytest.mark.filterwarnings("error")
def test_a_legend_higher_than_the_panels_is_laid_out_without_a_warning(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *a: (save_figure(figure, *a), figures.append(figure)))
    plot_curves({f"method {i}": {"total_loss": [(1, 2.0), (2, 1.0)]} for i in range(40)}, str(tmp_path / "curves.png"))
    (panel,), (legend,) = figures[0].axes, figures[0].legends
    assert legend.get_window_extent().height > panel.bbox.height
    assert legend.get_window_extent().y1 < panel.get_tightbbox().y0


@pytest.mark.parametrize("count", [3, 10, 11, 45])
def test_no_two_lines_of_a_plot_look_alike(count):
    """Check up to as many trainings as the whole evidence matrix has."""
    assert len({tuple(look(index, count).values()) for index in range(count)}) == count


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config: STUDENT\nbaseline: x\ncells: {plain: {}}", "baseline 'x' is not a cell; available: plain"),
        ("config: STUDENT\nbaseline: plain\ncells: {plain: {optz: {}}}", "cell plain has the unknown key 'optz'"),
        ("baseline: plain\ncells: {plain: {}}", "cell plain has no config"),
        ("config: [", "is not plain yaml"),
        ("config: STUDENT\ncells: {plain: {}}", "a baseline"),
        (
            "config: [STUDENT]\nbaseline: plain\ncells: {plain: {}}",
            r"config of the sweep is \['.*'\]; it must be a text",
        ),
        (
            "config: STUDENT\nbaseline: plain\ncells: {plain: {seeds: [a]}}",
            "seeds of cell plain is .* a list of whole numbers",
        ),
        (
            "config: STUDENT\nbaseline: plain\ncells: {plain: {seeds: [0, 4294967296]}}",
            r"a seed of cell plain is 4294967296; it must be below 2\*\*32",
        ),
        ("config: STUDENT\nbaseline: plain\ncells: {'../plain': {}}", "the cell '../plain' is not a valid folder name"),
        ("config: STUDENT\nbaseline: plain\ncells: {.: {}}", "the cell '.' is not a valid folder name"),
        ("config: STUDENT\nbaseline: plain\ncells: {plain: , teacher: }", "no cell can be named 'teacher'"),
        (
            "config: STUDENT\nbaseline: plain\ncells: {plain: {opts: {SEED: 5}}}",
            "cell plain sets SEED in opts, without effect; use the cell's seeds",
        ),
        (
            "config: STUDENT\nbaseline: plain\ncells: {plain: {opts: {OUTPUT_DIR: x}}}",
            "cell plain sets OUTPUT_DIR in opts, without effect; use the option --output",
        ),
        ("config: STUDENT\nbaseline: plain\ncells: {plain: , b: {title: plain}}", "two cells have the title 'plain'"),
    ],
)
def test_a_wrong_matrix_is_one_sentence(tmp_path, text, message):
    """Check that the message names the error and the file on one line."""
    with pytest.raises(UserError, match=message) as error:
        read_matrix(write_matrix(tmp_path, text))
    assert "matrix.yaml" in str(error.value) and "\n" not in str(error.value)


def test_selecting_an_unknown_cell(tmp_path):
    """Check that an unknown cell or seed is refused, and that runs are ordered by seed, then by cell."""
    matrix = read_matrix(write_matrix(tmp_path, MATRIX))
    with pytest.raises(UserError, match="no cell 'worse'; available: plain, inheritance"):
        matrix.select(["worse"], None)
    with pytest.raises(UserError, match="no cell with the seed 7; available: 0, 1, 2"):
        matrix.select(None, [1, 7])
    with pytest.raises(UserError, match="the cells in --cells have none of the seeds in --seeds; available: 0"):
        matrix.select(["plain", "unfinished"], [1, 2])
    pairs = [(cell.name, seed) for cell, seed in matrix.select(["better", "plain"], None)]
    assert pairs == [("plain", 0), ("better", 0), ("better", 1), ("better", 2)]


@pytest.mark.parametrize("report_only", [False, True])
def test_an_unknown_cell_is_refused_before_training(tmp_path, monkeypatch, report_only):
    """Check that the teacher of the sweep is not trained, and that no table is written."""
    matrix = read_matrix(write_matrix(tmp_path, MATRIX))
    monkeypatch.setattr(report, "run_jobs", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError, match="no cell 'worse'"):
        run_sweep(matrix, str(tmp_path / "out"), [], SweepOptions(report_only=report_only, cells=["worse"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("teacher", ["", "teacher: {config: STUDENT}\n"])
@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ("{SOLVER.BASE: 1}", r"Sweep .*matrix.yaml: cell bad: there is no config key SOLVER.BASE. Did you mean"),
        ("{SOLVER.GAMMA: [1]}", r"Sweep .*matrix.yaml: cell bad: SOLVER.GAMMA is \[1\]; it must be of type float"),
        (
            "{MODEL.META_ARCHITECTURE: KDMetaArch, MODEL.KD: {DISTILLERS: [SSIM], TEACHER: {CONFIG_FILE: STUDENT}}}",
            "MODEL.KD.DISTILLERS.*SSIM",
        ),
    ],
)
def test_a_cell_with_a_wrong_config(tmp_path, monkeypatch, teacher, opts, message):
    """Check that it is refused before the teacher or another cell is trained, and ignored if it is not selected."""
    ran = []
    monkeypatch.setattr(report, "run_jobs", lambda jobs, *_: ran.extend(jobs))
    monkeypatch.setattr(report, "measure_costs", lambda matrix, *_: {cell.name: {} for cell in matrix.cells})
    text = f"{teacher}config: STUDENT\nbaseline: good\ncells: {{good: , bad: {{opts: {opts}}}}}\n"
    matrix, output = read_matrix(write_matrix(tmp_path, text)), str(tmp_path / "output")
    with pytest.raises(UserError, match=message):
        run_sweep(matrix, output, [], SweepOptions(cells=["bad"]))
    assert ran == []
    write_json(result_path(output + "/results", "teacher", 0), result("teacher", 0, 1.0))
    write_json(output + "/results/costs.json", {"bad": {"params": 1.0}})
    run_sweep(matrix, output, [], SweepOptions(cells=["good"]))
    assert ran[-1].cell == "good"
    assert json.loads((tmp_path / "output/results/costs.json").read_text()) == {"bad": {"params": 1.0}, "good": {}}


@pytest.mark.parametrize("option", ["jobs", "threads"])
def test_no_jobs_at_all(tmp_path, option):
    """Check that a sweep that could never start a training is refused."""
    matrix = read_matrix(write_matrix(tmp_path, MATRIX))
    with pytest.raises(UserError, match=f"--{option} is 0; it must be a number at least 1"):
        run_sweep(matrix, str(tmp_path / "out"), [], SweepOptions(**{option: 0}))


def test_seeds_of_a_cell(tmp_path):
    """Check that a repeated seed counts once, and that an empty list means the default."""
    text = "config: STUDENT\nbaseline: a\nteacher: {config: STUDENT, seeds: []}\ncells: {a: {seeds: [1, 0, 1]}}\n"
    matrix = read_matrix(write_matrix(tmp_path, text))
    assert (matrix.cell("a").seeds, matrix.teacher.seeds) == ((1, 0), (0,))


def test_settings_ignore_places_and_defaults():
    """Check that a cell's settings have the keys that affect its result, without paths, seed, device and defaults."""
    settings = measured_settings(STUDENT, ["SOLVER.BASE_LR", "0.5", "OUTPUT_DIR", "elsewhere", "SEED", "7"])
    assert settings["SOLVER.BASE_LR"] == 0.5
    assert settings["SOLVER.STEPS"] == [560, 720]
    assert not {"OUTPUT_DIR", "SEED", "MODEL.DEVICE", "MODEL.MASK_ON"} & settings.keys()


def test_an_infinite_setting(tmp_path):
    """Check that the command of a cell with an infinite norm has a literal, and that its result is that of the cell."""
    text = "config: STUDENT\nbaseline: a\ncells: {a: {opts: {SOLVER.CLIP_GRADIENTS.NORM_TYPE: .inf}}}\n"
    cell = read_matrix(write_matrix(tmp_path, text)).cell("a")
    job = training_job(cell, 0, str(tmp_path), str(tmp_path), [])
    literal = job.command[job.command.index("SOLVER.CLIP_GRADIENTS.NORM_TYPE") + 1]
    cfg = load_config(STUDENT, ["SOLVER.CLIP_GRADIENTS.NORM_TYPE", literal])
    assert math.isinf(cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE)
    write_json(job.result, result("a", 0, 1.0, settings=job.settings))
    assert run_jobs([job], 1, 1) == []


@pytest.mark.parametrize("names", ["()", "('synthetic_val', 'synthetic_train')"])
def test_results_are_those_of_one_data_set(names):
    """Check that a sweep with another number of test sets is refused before training."""
    with pytest.raises(UserError, match=r"DATASETS.TEST names [02] datasets; a sweep needs exactly one"):
        measured_settings(STUDENT, ["DATASETS.TEST", names])


def test_a_finished_cell_is_not_run_again(tmp_path, monkeypatch, caplog):
    """Check that a result with equal settings is kept, and that one with other settings is refused, naming the key."""
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, str(tmp_path / "nothing.py")))
    matrix = read_matrix(write_matrix(tmp_path, MATRIX))
    job = training_job(matrix.cell("better"), 0, str(tmp_path), str(tmp_path / "cells"), [])
    os.makedirs(os.path.dirname(job.result))
    with open(job.result, "w") as file:
        json.dump(result("better", 0, 1.0) | {"settings": job.settings}, file)
    run_jobs([job], 1, 1)
    assert "1 of 1 cells are already finished" in caplog.text
    changed = training_job(matrix.cell("better"), 0, str(tmp_path), str(tmp_path / "cells"), ["SOLVER.GAMMA", "0.2"])
    with pytest.raises(UserError, match=r"SOLVER.GAMMA: default then, 0.2 now"):
        run_jobs([changed], 1, 1)


@pytest.mark.parametrize("selected", [{"cells": ["a"]}, {"seeds": [1]}])
def test_the_results_that_are_not_selected_have_the_settings_too(tmp_path, monkeypatch, selected):
    """Check a baseline, and a seed, that were measured with fewer iterations."""
    monkeypatch.setattr(report, "run_jobs", lambda *arguments: [])
    text = "config: STUDENT\nbaseline: plain\ncells: {plain: , a: {seeds: [0, 1], opts: {SOLVER.GAMMA: 0.2}}}\n"
    matrix = read_matrix(write_matrix(tmp_path, text))
    path = result_path(str(tmp_path / "results"), "plain", 0)
    os.makedirs(os.path.dirname(path))
    write_json(path, result("plain", 0, 1.0, settings=measured_settings(STUDENT, ["SOLVER.MAX_ITER", 5])))
    with pytest.raises(
        UserError, match=rf"^{re.escape(path)} was measured with different settings \(SOLVER.MAX_ITER: 5 then, 800"
    ):
        run_sweep(matrix, str(tmp_path), [], SweepOptions(**selected))


def test_a_report_warns_of_other_settings(tmp_path, caplog):
    """Check one line per cell, for an override and for a cell that has changed, and none for paths."""
    text = "config: STUDENT\nbaseline: plain\ncells: {plain: {seeds: [0, 1]}, a: {opts: {SOLVER.GAMMA: 0.2}}}\n"
    matrix = read_matrix(write_matrix(tmp_path, text))
    results = tmp_path / "results"
    results.mkdir()
    for cell, seed, opts in (("plain", 0, []), ("plain", 1, []), ("a", 0, ["SOLVER.GAMMA", 0.3])):
        settings = {**measured_settings(STUDENT, opts), "files of the teacher": "0"}
        write_json(result_path(str(results), cell, seed), result(cell, seed, 1.0, settings=settings))
    for opts, lines in (
        (
            ["DATASETS.COCO_JSON", "[['x', 'y', 'z']]"],
            ["a-seed0.json was measured with different settings (SOLVER.GAMMA"],
        ),
        (
            ["SEED", "3", "SOLVER.MAX_ITER", "9"],
            [
                "plain-seed0.json was measured with different settings (SOLVER.MAX_ITER: 800 then, 9 now).",
                "a-seed0.json",
            ],
        ),
    ):
        caplog.clear()
        run_sweep(matrix, str(tmp_path), opts, SweepOptions(report_only=True))
        warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert [line in message for line, message in zip(lines, warned, strict=True)] == [True] * len(lines)


def test_a_report_warns_of_other_code(tmp_path, caplog, monkeypatch):
    """Check a cell with an own backbone, once it is registered, and one without."""
    text = "config: STUDENT\nbaseline: plain\ncells: {plain: , own: {opts: {MODEL.BACKBONE.NAME: my_backbone}}}\n"
    matrix = read_matrix(write_matrix(tmp_path, text))
    results = tmp_path / "results"
    results.mkdir()
    key = "code of the detectors from --import"
    own = {**without_locations(load_config(STUDENT, [])), "MODEL.BACKBONE.NAME": "my_backbone", key: "0"}
    for cell, settings in (("plain", measured_settings(STUDENT, [])), ("own", own)):
        write_json(result_path(str(results), cell, 0), result(cell, 0, 1.0, settings=settings))

    def warnings():
        caplog.clear()
        run_sweep(matrix, str(tmp_path), [], SweepOptions(report_only=True))
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    assert warnings() == []
    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "my_backbone", lambda cfg, input_shape: None)
    (message,) = warnings()
    assert f"own-seed0.json was measured with different settings ({key}: 0 then, " in message


def test_results_with_another_teacher_are_refused(tmp_path):
    """Check the teacher's row and a student's after the checkpoint has changed, and files without this setting."""
    weights = tmp_path / "teacher.pth"
    weights.write_text("one")
    cell = read_matrix(
        write_matrix(tmp_path, f"config: STUDENT\nbaseline: a\ncells: {{a: {{opts: {TAUGHT}}}}}\n")
    ).cell("a")
    folder = str(tmp_path)

    def jobs():
        return [teacher_evaluation(cell, folder, folder, []), training_job(cell, 0, folder, folder, [])]

    for job in jobs():
        write_json(job.result, result(job.cell, 0, 1.0, settings=job.settings))
    assert run_jobs(jobs(), 1, 1) == []
    weights.write_text("two")
    for job in jobs():
        with pytest.raises(
            UserError, match=rf"{re.escape(job.result)} was measured with different settings \(files of the teacher"
        ):
            run_jobs([job], 1, 1)
        del job.settings["files of the teacher"]
        write_json(job.result, result(job.cell, 0, 1.0, settings=job.settings))
    assert run_jobs(jobs(), 1, 1) == []


def test_results_from_other_initial_weights_are_refused(tmp_path):
    """Check other content, the same content elsewhere, no weights, and an older file without the checksum."""
    cell = read_matrix(write_matrix(tmp_path, "config: STUDENT\nbaseline: a\ncells: {a: }\n")).cell("a")
    for name, text in (("one.pth", "1"), ("two.pth", "2"), ("copy.pth", "1")):
        (tmp_path / name).write_text(text)

    def job(name):
        weights = str(tmp_path / name) if name else ""
        return training_job(cell, 0, str(tmp_path), str(tmp_path), ["MODEL.WEIGHTS", weights])

    first = job("one.pth")
    write_json(first.result, result("a", 0, 1.0, settings=first.settings))
    assert run_jobs([job("copy.pth")], 1, 1) == []
    for other in ("two.pth", ""):
        with pytest.raises(UserError, match=r"was measured with different settings \(file of MODEL.WEIGHTS: "):
            run_jobs([job(other)], 1, 1)
    del first.settings["file of MODEL.WEIGHTS"]
    write_json(first.result, result("a", 0, 1.0, settings=first.settings))
    assert run_jobs([job("two.pth")], 1, 1) == []


def test_results_on_other_annotations_are_refused(tmp_path):
    """Check other content, the same content elsewhere, and a file without the checksum, for a training and a teacher."""
    (tmp_path / "teacher.pth").touch()
    paths = {name: make_coco(tmp_path / name, 2) for name in ("one", "copy", "other")}
    paths["other"].write_text(paths["one"].read_text().replace('"red"', '"blue"'))
    cell = read_matrix(
        write_matrix(tmp_path, f"config: STUDENT\nbaseline: a\ncells: {{a: {{opts: {TAUGHT}}}}}\n")
    ).cell("a")
    folder = str(tmp_path)

    def jobs(name):
        entry = ["mine", str(paths[name]), str(paths[name].parent / "images")]
        opts = ["DATASETS.COCO_JSON", [entry], "DATASETS.TRAIN", ("mine",), "DATASETS.TEST", ("mine",)]
        return [training_job(cell, 0, folder, folder, opts), teacher_evaluation(cell, folder, folder, opts)]

    for job in jobs("one"):
        write_json(job.result, result(job.cell, 0, 1.0, settings=job.settings))
    assert run_jobs(jobs("copy"), 1, 1) == []
    for job in jobs("other"):
        with pytest.raises(UserError, match=r"was measured with different settings \(annotations of DATASETS.TEST: "):
            run_jobs([job], 1, 1)
        settings = {key: value for key, value in job.settings.items() if not key.startswith("annotations")}
        write_json(job.result, result(job.cell, 0, 1.0, settings=settings))
    assert run_jobs(jobs("one"), 1, 1) == []


def test_the_checksum_of_a_lazy_config(tmp_path):
    """Check that a sweep notes the file and the weights of a LazyConfig teacher, without running its code."""
    code, weights = tmp_path / "teacher.py", tmp_path / "teacher.pth"
    opts = ["MODEL.META_ARCHITECTURE", "KDMetaArch", "MODEL.KD.TEACHER.CONFIG_FILE", str(code)]
    opts += ["MODEL.KD.TEACHER.WEIGHTS", str(weights), "MODEL.KD.INHERIT.ENABLED", "True"]
    seen = set()
    for files in (("raise SystemExit", "one"), ("raise KeyError", "one"), ("raise KeyError", "two")):
        for path, text in zip((code, weights), files, strict=True):
            path.write_text(text)
        seen.add(measured_settings(STUDENT, opts)["files of the teacher"])
    assert len(seen) == 3


def test_a_training_with_other_settings_is_not_resumed(tmp_path, monkeypatch):
    """Check that a checkpoint is resumed only with the settings of its config, whose data may be elsewhere by now."""
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, str(tmp_path / "nothing.py")))
    cell = read_matrix(write_matrix(tmp_path, MATRIX)).cell("better")
    same, other = (
        training_job(cell, 0, str(tmp_path), str(tmp_path / "cells"), opts) for opts in ([], ["SOLVER.GAMMA", "0.2"])
    )
    os.makedirs(same.output)
    cfg = load_config(STUDENT, cell.opts)
    cfg.DATASETS.COCO_JSON = [["synthetic_val", "/gone/val.json", "/gone/images"]]
    for name, text in (("config.yaml", cfg.dump()), ("last_checkpoint", "model_0000399.pth")):
        with open(os.path.join(same.output, name), "w") as file:
            file.write(text)
    with pytest.raises(
        UserError, match=r"seed0 has a training with different settings \(SOLVER.GAMMA: default then, 0.2"
    ):
        run_jobs([other], 1, 1)
    assert run_jobs([same], 1, 1) == [same]  # it was started, and failed


def test_a_training_from_other_files_is_not_resumed(tmp_path, monkeypatch):
    """Check initial weights that have changed since a sweep started the training, and a folder from before this check."""
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, str(tmp_path / "nothing.py")))
    weights = tmp_path / "weights.pth"
    weights.write_text("1")
    cell = read_matrix(write_matrix(tmp_path, MATRIX)).cell("better")

    def job():
        return training_job(cell, 0, str(tmp_path), str(tmp_path / "cells"), ["MODEL.WEIGHTS", str(weights)])

    (failed,) = run_jobs([job()], 1, 1)
    weights.write_text("2")
    assert len(run_jobs([job()], 1, 1)) == 1  # there was no checkpoint
    folder = Path(failed.output)
    (folder / "config.yaml").write_text(load_config(STUDENT, cell.opts).dump())
    (folder / "last_checkpoint").write_text("model_0000399.pth")
    assert len(run_jobs([job()], 1, 1)) == 1
    weights.write_text("1")
    with pytest.raises(UserError, match=r"seed0 has a training with different settings \(file of MODEL.WEIGHTS: "):
        run_jobs([job()], 1, 1)
    (folder / "sweep_settings.json").unlink()
    assert len(run_jobs([job()], 1, 1)) == 1


def test_the_evaluation_of_the_teacher_in_the_folder_of_its_training(tmp_path, monkeypatch):
    """Check that the scores are those of the evaluation, whose settings are not those of the training."""
    folder, script = tmp_path / "teacher", tmp_path / "program.py"
    folder.mkdir()
    (folder / "config.yaml").write_text(load_config(STUDENT).dump())
    (folder / "model_final.pth").touch()
    write_json(str(folder / "train.json"), {"bbox": {"AP": 10.0}})
    script.write_text(f"import json\njson.dump({{'bbox': {{'AP': 50.0}}}}, open('{folder}/teacher.json', 'w'))\n")
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, str(script)))
    opts = TAUGHT.replace("FOLDER/teacher.pth", str(folder / "model_final.pth"))
    cell = read_matrix(write_matrix(tmp_path, f"config: STUDENT\nbaseline: a\ncells: {{a: {{opts: {opts}}}}}\n")).cell(
        "a"
    )
    job = teacher_evaluation(cell, str(tmp_path), str(tmp_path / "results"), [])
    assert job.output == str(folder)
    assert run_jobs([job], 1, 1) == []
    assert read_result(job.result)["scores"] == {"AP": 50.0}


def test_a_failing_cell_is_returned_and_others_finish(tmp_path, monkeypatch, caplog):
    """Check that a failing cell has a log, that one without boxes fails, and that the others write their results."""
    script = tmp_path / "program.py"
    script.write_text(
        "import json, sys\n"
        "folder = sys.argv[1]\n"
        "if folder.endswith('bad'): sys.exit('no such data')\n"
        "if folder.endswith('masks'): sys.exit(json.dump({}, open(folder + '/train.json', 'w')))\n"
        "scores = {'bbox': {'AP': 12.5, 'AP-cat': 1.0}, 'segm': {'AP': 9.25, 'AP50': 3}, 'keypoints': {'AP': None}}\n"
        "json.dump(scores, open(folder + '/train.json', 'w'))\n"
        "open(folder + '/config.yaml', 'w').write('SOLVER: {MAX_ITER: 20}')\n"
        "rows = [{'iteration': 9, 'time': 0.5, 'total_loss': 1.0, 'peak_memory_mib': 7.0, 'kd/balance/PFI': 8.0},\n"
        "        {'iteration': 15, 'kd/balance/PFI': 1234.56},\n"
        "        {'iteration': 19, 'time': 0.7, 'bbox/AP': 12.5, 'peak_memory_mib': 4.0}]\n"
        "open(folder + '/metrics.json', 'w').writelines(json.dumps(r) + '\\n' for r in rows)\n"
    )
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, str(script)))
    jobs = [
        Job(
            name,
            0,
            [str(tmp_path / name)],
            str(tmp_path / name),
            str(tmp_path / "cells" / f"{name}.json"),
            {},
        )
        for name in ("bad", "masks", "good")
    ]
    assert run_jobs(jobs, 1, 1) == jobs[:2]
    assert f"masks seed 0: FAILED: {tmp_path / 'masks' / 'train.json'}: the file has no 'bbox'" in caplog.text
    assert "no such data" in (tmp_path / "bad" / "process.log").read_text()
    good = json.loads((tmp_path / "cells" / "good.json").read_text())
    assert good["scores"] == {"AP": 12.5, "mask AP": 9.25, "keypoint AP": None}
    assert good["seconds_per_iteration"] == pytest.approx(0.6)
    assert good["peak_memory_mib"] == 7.0
    assert good["multipliers"] == {"PFI": 1235.0}
    assert good["curves"] == {"total_loss": [[9, 1.0]], "bbox/AP": [[19, 12.5]]}
    assert not (tmp_path / "cells" / "bad.json").exists()


def test_modules_of_the_current_folder_do_not_replace_others(tmp_path, monkeypatch):
    """Check a job of the kd-d2 program, and of `python -m kd_d2` in a checkout that is not installed."""
    (tmp_path / "argparse.py").write_text("raise SystemExit('of the current folder')\n")
    monkeypatch.setenv("PYTHONPATH", ROOT)
    monkeypatch.syspath_prepend(str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)
    subprocess.run([*runner.program(), "--version"], check=True)
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(ROOT)
    command, *options = runner.program()
    subprocess.run([command, "-S", *options, "--version"], check=True)  # without site-packages


@pytest.mark.parametrize("fails", ["cell", "teacher"])
def test_a_table_of_the_others_is_written_if_a_cell_fails(finished, tmp_path, monkeypatch, fails):
    """Check that the error names the log, and that the table and plots have the finished cells."""
    matrix, folder = finished
    if fails == "teacher":
        os.remove(result_path(folder, "teacher", 0))
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, str(tmp_path / "nothing.py")))
    monkeypatch.setattr(report, "measure_costs", lambda *arguments: {})
    for module in (runner, report):
        monkeypatch.setattr(module, "first_difference", lambda *arguments: "")
    name = {"cell": "unfinished", "teacher": "teacher"}[fails]
    with pytest.raises(UserError, match=rf"These cells failed: {name} seed 0, see .*{name}/seed0/process.log"):
        run_sweep(matrix, str(tmp_path / "output"), [], SweepOptions(results=folder, report=str(tmp_path / "report")))
    table = (tmp_path / "report" / "table.csv").read_text()
    assert "better,3" in table and "unfinished" not in table
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == ["ap.png", "curves.png", "table.csv", "table.md"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_stops_the_cells(tmp_path, monkeypatch, number):
    """Check that a sweep sends SIGTERM to its trainings, and waits until they have stopped, also if another signal follows."""
    script = tmp_path / "program.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "def stop(number, frame):\n"
        "    Path(sys.argv[1], 'stopping').touch()\n"
        "    while not os.path.exists(sys.argv[2]):\n"
        "        time.sleep(0.05)\n"
        "    time.sleep(0.5)\n"
        "    Path(sys.argv[1], 'stopped').touch()\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "Path(sys.argv[1], 'started').touch()\n"  # a file object's destructor would drop the exception of `stop`
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, str(script)))
    monkeypatch.setattr(signals, "SAME_REQUEST", 600)  # on a busy machine, the second signal may be late
    folders, signalled_twice = [tmp_path / name for name in ("a", "b")], tmp_path / "signalled_twice"
    jobs = [Job(f.name, 0, [str(f), str(signalled_twice)], str(f), str(f / "result.json"), {}) for f in folders]
    sweep = os.fork()
    if sweep == 0:
        try:
            signal.signal(number, signal.SIG_DFL)  # SIGHUP is ignored if pytest runs under nohup
            run_jobs(jobs, 2, 1)
        except SystemExit as end:
            os._exit(end.code)
        finally:
            os._exit(1)
    for sent, state in ((number, "started"), (signal.SIGTERM, "stopping")):
        while not all((folder / state).exists() for folder in folders):
            assert os.waitpid(sweep, os.WNOHANG) == (0, 0)
            time.sleep(0.05)
        os.kill(sweep, sent)
    signalled_twice.touch()
    assert os.waitstatus_to_exitcode(os.waitpid(sweep, 0)[1]) == 128 + number
    assert all((folder / "stopped").exists() for folder in folders)


def test_a_signal_while_a_cell_starts(tmp_path, monkeypatch):
    """Check that a process that has only just started is stopped too."""
    processes = []

    class Signalled(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            processes.append(self)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Signalled)
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, "-c", "import time; time.sleep(60)"))
    with pytest.raises(SystemExit) as left:
        run_jobs([Job("cell", 0, [], str(tmp_path), str(tmp_path / "result.json"), {})], 1, 1)
    assert left.value.code == 128 + signal.SIGTERM
    assert [process.poll() for process in processes] == [-signal.SIGTERM]


def test_a_cell_that_another_process_runs_is_left_to_it(tmp_path, monkeypatch, caplog):
    """Check that a cell whose folder is locked is skipped, and run once the lock is released."""
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, str(tmp_path / "nothing.py")))
    job = Job("busy", 0, [], str(tmp_path / "busy"), str(tmp_path / "cells" / "busy.json"), {})
    os.makedirs(job.output)
    with open(os.path.join(job.output, ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run_jobs([job], 1, 1)
    assert f"busy seed 0: skipped, another process is training it in {job.output}" in caplog.text
    assert not os.path.exists(os.path.join(job.output, "process.log"))
    assert run_jobs([job], 1, 1) == [job]  # no longer locked, so it is run


def test_a_cell_is_locked_until_its_result_is_written(tmp_path, monkeypatch):
    script = tmp_path / "program.py"
    script.write_text("import sys; open(sys.argv[1] + '/train.json', 'w').write('{\"bbox\": {\"AP\": 1.0}}')")
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, str(script)))
    job = Job("cell", 0, [str(tmp_path)], str(tmp_path), str(tmp_path / "result.json"), {})

    def write_if_locked(*args, **options):
        assert not runner._claim(replace(job))
        write_json(*args, **options)

    monkeypatch.setattr(runner, "write_json", write_if_locked)
    assert run_jobs([job], 1, 1) == []
    assert runner._claim(replace(job))


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runner.fcntl, "flock", fail)
    assert runner._claim(Job("cell", 0, [], str(tmp_path), "result.json", {}))
    assert f"{tmp_path} cannot be locked (No locks available): make sure that no other sweep uses it." in caplog.text


def test_metrics_of_a_run_that_was_killed_and_resumed(tmp_path):
    """Check that rows after the checkpoint are those of the resumed training, and that an incomplete line is ignored."""
    rows = [{"iteration": i, "total_loss": float(i)} for i in (19, 39, 59)] + [{"iteration": 39, "total_loss": 1.0}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.json").write_text(text + '{"iteration": 59, "to')
    assert [(r["iteration"], r["total_loss"]) for r in read_metrics(str(tmp_path))] == [(19, 19.0), (39, 1.0)]


def test_metrics_of_an_evaluation_alone(tmp_path):
    """Check that the results of an earlier iteration, without a loss, drop no rows of the training."""
    rows = [
        {"iteration": 19, "total_loss": 2.0},
        {"iteration": 39, "total_loss": 1.0},
        {"iteration": 20, "bbox/AP": 30},
    ]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["iteration"] for row in read_metrics(str(tmp_path))] == [19, 20, 39]


def test_the_result_of_a_job(tmp_path):
    """Check the median of the times, the highest memory, and scores without those of single classes."""
    rows = [{"time": t, "peak_memory_mib": m, "total_loss": 1.0} for t, m in ((1.0, 5.0), (9.0, 7.0), (2.0, 6.0))]
    lines = [json.dumps({"iteration": number, **row}) + "\n" for number, row in enumerate(rows)]
    (tmp_path / "metrics.json").write_text("".join(lines))
    write_json(str(tmp_path / "train.json"), {"bbox": {"AP": 12.34567, "APs": None, "AP-disc": 40.0}})
    job = Job("cell", 0, [], str(tmp_path), str(tmp_path / "results" / "cell-seed0.json"), {})
    job.process = SimpleNamespace(returncode=0)
    assert runner._finish(job)
    found = read_result(job.result)
    assert found["scores"] == {"AP": 12.3457, "APs": None}
    assert (found["seconds_per_iteration"], found["peak_memory_mib"]) == (2.0, 7.0)


@pytest.mark.parametrize(
    ("ap", "said"), [(12.345, "AP 12.35"), (math.nan, "without AP, since the test set has no objects that count")]
)
def test_what_is_said_of_a_finished_job(tmp_path, caplog, ap, said):
    caplog.set_level(logging.INFO, "kd_d2")
    write_json(str(tmp_path / "train.json"), {"bbox": {"AP": ap}})
    job = Job("cell", 0, [], str(tmp_path), str(tmp_path / "results" / "cell-seed0.json"), {}, started=time.time())
    job.process = SimpleNamespace(returncode=0)
    assert runner._finish(job)
    assert caplog.messages == [f"cell seed 0: finished after 0.0 min, {said}"]


def test_progress_of_a_resumed_cell(tmp_path, caplog):
    """Check that rows of an earlier process are not reported as progress, and that the last complete row is."""
    job = Job("cell", 0, [], str(tmp_path), str(tmp_path / "result.json"), {})
    (tmp_path / "config.yaml").write_text("SOLVER: {MAX_ITER: 100}")
    metrics = tmp_path / "metrics.json"
    metrics.write_text('{"iteration": 79, "total_loss": 1.0}\n')
    job.started = metrics.stat().st_mtime + 1
    runner._report_progress(job)
    assert caplog.text == ""
    job.started = 0.0
    metrics.write_text(metrics.read_text() + '{"iteration": 59, "total_loss": 2.0}\n{"iteration": 69, "tot')
    runner._report_progress(job)
    assert "iteration 60, loss 2.000" in caplog.text


def test_a_report_of_some_cells_in_a_folder_of_its_own(finished, tmp_path):
    """Check that the table has the finished ones of the selected cells, baseline, plain student and teacher."""
    matrix, folder = finished
    report = tmp_path / "report"
    report.mkdir()
    rows = write_report(matrix.reduced_to(["better"]), folder, {}, str(report))
    assert [row.name for row in rows] == ["teacher", "plain", "inheritance", "better"]
    rows = write_report(matrix.reduced_to([]), folder, {}, str(report))
    assert [row.name for row in rows] == ["teacher", "plain", "inheritance"]
    assert "better" not in (report / "table.csv").read_text()
    assert sorted(path.name for path in report.iterdir()) == ["ap.png", "curves.png", "table.csv", "table.md"]


@pytest.mark.parametrize("program", ["kd-d2 sweep", "tools/compare.py"])
def test_a_table_that_is_kept_in_a_readme(finished, tmp_path, program):
    """Check that nothing is trained, that the text around the table is kept, and that an old marker is updated."""
    matrix, folder = finished
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n<!-- table of {program} -->\nold\n<!-- end of the table -->\n\nBelow.\n")
    output = str(tmp_path / "output")
    options = SweepOptions(results=folder, report=str(tmp_path), readme=str(readme), report_only=True)
    for _ in range(2):
        rows = run_sweep(matrix, output, [], options)
        text = readme.read_text()
        assert text.startswith("# Title\n\n<!-- table of kd-d2 sweep -->\n\n|")
        assert text.endswith("table -->\n\nBelow.\n")
        assert "old" not in text and text.count(rows[-1].title) == 1
    assert not os.path.exists(output)
    for bad in ("no marks", f"<!-- end of the table --> <!-- table of {program} -->"):
        readme.write_text(bad)
        with pytest.raises(UserError, match=r"needs one line <!-- table of kd-d2 sweep --> and below it one line"):
            run_sweep(matrix, output, [], options)
        assert readme.read_text() == bad
    with pytest.raises(UserError, match="--readme: there is no file"):
        run_sweep(matrix, output, [], replace(options, readme=str(tmp_path / "none.md")))
    with pytest.raises(UserError, match="--readme /proc cannot be written"):
        run_sweep(matrix, output, [], replace(options, readme="/proc/version"))


def test_a_report_of_read_only_results(finished, tmp_path, monkeypatch):
    """Check that only the folder of the report needs to be writable, and that the message names its option."""
    matrix, folder = finished

    def refuse(path, key):
        if path == folder:
            raise UserError(f"{key} {path} cannot be written.")

    monkeypatch.setattr(report, "check_output_folder", refuse)
    options = SweepOptions(results=folder, report=str(tmp_path / "report"), report_only=True)
    (tmp_path / "report").mkdir()
    rows = run_sweep(matrix, folder, [], options)
    assert (tmp_path / "report" / "table.md").read_text() == as_markdown(rows) + "\n"
    with pytest.raises(UserError, match="--report"):
        run_sweep(matrix, folder, [], replace(options, report=None))


@pytest.mark.parametrize("has_readme", [False, True])
def test_a_report_without_a_finished_cell(finished, tmp_path, has_readme):
    """Check that a wrong folder of results is not created, and that no table is replaced by an empty one."""
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table of kd-d2 sweep -->\nold\n<!-- end of the table -->\n")
    output, results = tmp_path / "output", tmp_path / "none"
    options = SweepOptions(results=str(results), readme=str(readme) if has_readme else None, report_only=True)
    with pytest.raises(UserError, match=f"--results: {re.escape(str(results))} has no finished cell of the sweep"):
        run_sweep(finished[0], str(output), [], options)
    assert "old" in readme.read_text() and not output.exists() and not results.exists()


def test_no_table_if_every_cell_fails(tmp_path, monkeypatch):
    """Check that the table of a readme is kept."""
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, str(tmp_path / "nothing.py")))
    monkeypatch.setattr(report, "measure_costs", lambda *arguments: {})
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table of kd-d2 sweep -->\nold\n<!-- end of the table -->\n")
    matrix = read_matrix(write_matrix(tmp_path, "config: STUDENT\nbaseline: a\ncells: {a: }\n"))
    with pytest.raises(UserError, match="These cells failed: a seed 0"):
        run_sweep(matrix, str(tmp_path / "output"), [], SweepOptions(readme=str(readme)))
    assert "old" in readme.read_text()


@pytest.mark.parametrize(
    ("end", "expected"),
    [("sys.exit(2)", " 2 (error: The key is wrong.), see "), ("os.kill(os.getpid(), 9)", " -9, see ")],
)
def test_the_reason_of_a_failed_cell_is_logged(tmp_path, monkeypatch, caplog, end, expected):
    """Check that it is the last line of the log, unless the process was killed."""
    script = tmp_path / "program.py"
    script.write_text(f"import os, sys\nprint('started\\nerror: The key is wrong.\\n', flush=True)\n{end}\n")
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, str(script)))
    job = runner.Job("a", 0, [], str(tmp_path / "a"), str(tmp_path / "a.json"), {})
    with caplog.at_level(logging.INFO):
        assert runner.run_jobs([job], 1, 1) == [job]
    assert f"a seed 0: FAILED with exit status{expected}{tmp_path}/a/process.log" in caplog.messages


def test_one_of_two_tables_in_a_readme(finished, tmp_path):
    """Check that only the named table changes, and that a name without its markers is an error."""
    matrix, folder = finished
    readme = tmp_path / "README.md"
    marks = "<!-- table of kd-d2 sweep: {} -->\n{}\n<!-- end of the table -->\n"
    readme.write_text(marks.format("first", "one") + marks.format("second", "two"))
    options = SweepOptions(results=folder, report=str(tmp_path), report_only=True)
    for _ in range(2):
        run_sweep(matrix, str(tmp_path / "output"), [], replace(options, readme=f"{readme}#second"))
        first, second = readme.read_text().split("<!-- table of kd-d2 sweep: second -->")
        assert first == marks.format("first", "one")
        assert second.startswith("\n\n|") and second.endswith("|\n\n<!-- end of the table -->\n")
        assert "two" not in second
    kept = readme.read_text()
    for name in ("#third", ""):
        with pytest.raises(UserError, match=r"needs one line <!-- table of kd-d2 sweep"):
            run_sweep(matrix, str(tmp_path / "output"), [], replace(options, readme=f"{readme}{name}"))
    for bad in (kept.replace("<!-- end of the table -->", "", 1), kept + kept):
        readme.write_text(bad)
        with pytest.raises(UserError, match=r"needs one line <!-- table of kd-d2 sweep: first -->"):
            run_sweep(matrix, str(tmp_path / "output"), [], replace(options, readme=f"{readme}#first"))


def test_a_readme_of_another_system(finished, tmp_path):
    """Check a path with "#", a symbolic link, and CRLF line ends, which the table gets too."""
    matrix, folder = finished
    target, link = tmp_path / "target.md", tmp_path / "#1" / "README.md"
    target.write_bytes(b"Above.\r\n<!-- table of kd-d2 sweep: one -->\r\n<!-- end of the table -->\r\n")
    link.parent.mkdir()
    link.symlink_to(target)
    options = SweepOptions(results=folder, report=str(tmp_path), readme=f"{link}#one", report_only=True)
    run_sweep(matrix, str(tmp_path / "output"), [], options)
    assert link.is_symlink()
    text = target.read_bytes()
    assert b"a method" in text
    assert text.startswith(b"Above.\r\n<!-- table") and text.count(b"\n") == text.count(b"\r\n")


@pytest.mark.parametrize(
    ("arguments", "cells", "seeds", "opts"),
    [
        (["--cells", "plain", "better", "SOLVER.BASE_LR", "0.1"], ["plain", "better"], None, ["SOLVER.BASE_LR", "0.1"]),
        (["--seeds", "0", "1", "SOLVER.BASE_LR=0.1"], None, [0, 1], ["SOLVER.BASE_LR", "0.1"]),
        (["--cells", "plain", "--jobs", "2", "SOLVER.BASE_LR", "1"], ["plain"], None, ["SOLVER.BASE_LR", "1"]),
        (["--gpus", "0", "1", "SOLVER.BASE_LR", "0.1"], None, None, ["SOLVER.BASE_LR", "0.1"]),
        ([], None, None, []),
    ],
)
def test_the_command(tmp_path, monkeypatch, arguments, cells, seeds, opts):
    """Check the options, and overrides after an option that takes a list."""
    seen = []
    monkeypatch.setattr("kd_d2.sweep.run_sweep", lambda *arguments: seen.append(arguments))
    with clean_process():
        main(["sweep", write_matrix(tmp_path, MATRIX), "--output", "out", *arguments])
    ((matrix, output, found, options),) = seen
    assert (matrix.student, output, found) == ("plain", "out", opts)
    assert (options.cells, options.seeds, options.jobs) == (cells, seeds, 2 if "--jobs" in arguments else None)
    assert [*options.gpus] == (["0", "1"] if "--gpus" in arguments else [])


def test_jobs_import_what_the_sweep_imports(tmp_path):
    """Check both kinds of jobs: the options precede the overrides."""
    matrix = read_matrix(write_matrix(tmp_path, MATRIX))
    cell, folder = matrix.cell("better"), str(tmp_path)
    for make, arguments in ((training_job, (cell, 0)), (teacher_evaluation, (cell,))):
        command = make(*arguments, folder, folder, ["SOLVER.GAMMA", 0.2], ["one.py", "two"]).command
        start = command.index("--import")
        assert command[start : start + 4] == ["--import", "one.py", "--import", "two"]
        assert start < command.index("SOLVER.GAMMA")


def test_costs_of_images_that_have_to_be_padded(tmp_path):
    """Check a test size of 40, its padded size, 64, and no resizing, and that equal detectors cost the same."""
    matrix = read_matrix(
        write_matrix(
            tmp_path,
            "config: STUDENT\nbaseline: plain\nteacher: {config: STUDENT}\ncells: {plain: , same: {opts: {SOLVER.GAMMA: 0.2}}}\n",
        )
    )
    narrow = ["MODEL.SLIM_RESNET.WIDTHS", "(4, 6, 8, 10)", "MODEL.FPN.OUT_CHANNELS", "8"]
    odd, padded, unresized = (
        measure_costs(matrix, [*narrow, "INPUT.MAX_SIZE_TEST", 64, "INPUT.MIN_SIZE_TEST", side]) for side in (40, 64, 0)
    )
    assert odd.keys() == {"teacher", "plain", "same"}
    assert odd["plain"] == odd["same"] == odd["teacher"]
    for key in ("params", "gflops"):
        assert odd["plain"][key] == padded["plain"][key] == unresized["plain"][key] > 0


class WithOwnHead(nn.Module):
    """A detector that is none of Detectron2's, with a `head` of its own and without `device`."""

    def __init__(self, cfg):
        super().__init__()
        self.backbone = build_backbone(cfg)
        self.head = nn.Conv2d(cfg.MODEL.FPN.OUT_CHANNELS, 1, 1)

    def forward(self, inputs):
        return [self.head(self.backbone(inputs[0]["image"][None])["p3"])]


class WithoutInference(WithOwnHead):
    def forward(self, inputs):
        raise NotImplementedError("it is only trained")


def test_costs_of_detectors_of_ones_own(tmp_path, monkeypatch, caplog):
    """Check one that can be measured, and that one that cannot is logged by name and does not hide the others."""
    for cls in (WithOwnHead, WithoutInference):
        monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, cls.__name__, cls)
    opts = [f"{{opts: {{MODEL.META_ARCHITECTURE: {name}}}}}" for name in ("WithOwnHead", "WithoutInference")]
    text = f"config: STUDENT\nbaseline: plain\ncells: {{plain: , own: {opts[0]}, broken: {opts[1]}}}\n"
    found = measure_costs(read_matrix(write_matrix(tmp_path, text)), ["INPUT.MIN_SIZE_TEST", 64])
    assert found.keys() == {"plain", "own"}
    assert 0 < found["own"]["gflops"] < found["plain"]["gflops"]
    assert 0 < found["own"]["params"] < found["plain"]["params"]
    assert (
        "The costs of the detector of broken cannot be measured: NotImplementedError: it is only trained" in caplog.text
    )


def test_costs_are_measured_without_detections():
    model = costs._build(load_config(STUDENT, student_only=True))
    with torch.no_grad():
        model.head.cls_score.bias.fill_(10.0)  # all scores above 0.9999
        (output,) = model([{"image": torch.zeros(3, 64, 64), "height": 64, "width": 64}])
    assert len(output["instances"]) == 0


def _record_sides(monkeypatch, sides):
    """Do not measure costs, but append the image size of each detector."""

    def measure(configs):
        sides.extend(cfg.INPUT.MIN_SIZE_TEST for cfg in configs.values())
        return {name: {} for name in configs}

    monkeypatch.setattr(costs, "_measure", measure)


def test_costs_at_the_test_size_of_each_cell(tmp_path, monkeypatch):
    """Check that a cell with larger images has costs of its own, and that the teacher has the size of the students."""
    (tmp_path / "teacher.pth").touch()
    (tmp_path / "teacher.yaml").write_text(f"_BASE_: {STUDENT}\nINPUT: {{MIN_SIZE_TEST: 96}}\n")
    taught = TAUGHT.replace("CONFIG_FILE: STUDENT", "CONFIG_FILE: FOLDER/teacher.yaml")
    text = (
        f"config: STUDENT\nbaseline: a\ncells: {{a: {{opts: {taught}}}, b: {{opts: {{INPUT.MIN_SIZE_TEST: 288}}}}}}\n"
    )
    sides: list[int] = []
    _record_sides(monkeypatch, sides)
    found = measure_costs(read_matrix(write_matrix(tmp_path, text)), [])
    assert sorted(sides) == [144, 288]
    assert found["teacher"] == found["a"] != found["b"]


def test_costs_are_measured_anew_if_a_detector_has_changed(tmp_path, monkeypatch):
    """Check that other layers and another image size count, and that training keys do not."""
    matrix = read_matrix(write_matrix(tmp_path, "config: STUDENT\nbaseline: plain\ncells: {plain: }\n"))
    measured = []
    _record_sides(monkeypatch, measured)
    known = measure_costs(matrix, [])
    older = {"plain": {"params": 1.0}}
    assert measure_costs(matrix, ["SOLVER.GAMMA", 0.2], known) is known
    assert measure_costs(matrix, [], older) is older
    assert len(measured) == 1
    for key, value in (("MODEL.FPN.OUT_CHANNELS", 8), ("INPUT.MIN_SIZE_TEST", 128)):
        assert measure_costs(matrix, [key, value], known) != known
    assert measured == [144, 144, 128]


def test_plain_detectors_are_compared_without_a_teacher(tmp_path):
    """Check that there is no teacher to evaluate or measure if no cell has one."""
    text = "config: STUDENT\nbaseline: one\ncells: {one: , other: {opts: {SOLVER.GAMMA: 0.2}}}\n"
    plain = ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.SLIM_RESNET.WIDTHS", "(4, 6, 8, 10)"]
    matrix = read_matrix(write_matrix(tmp_path, text))
    assert matrix.taught_cell(plain) is None
    assert measure_costs(matrix, plain).keys() == {"one", "other"}


def test_operations_of_the_heads_of_an_r_cnn(tmp_path):
    """Check those of the RPN and of the box head, whose number of proposals the config limits."""
    teacher = os.path.join(ROOT, "configs", "tiny", "faster-rcnn-student.yaml")
    text = f"config: {teacher}\nbaseline: one\ncells: {{one: , two: {{opts: {{}}}}}}\n"
    matrix = read_matrix(write_matrix(tmp_path, text))
    keys = {
        "SLIM_RESNET.WIDTHS": "(4, 6, 8, 10)",
        "FPN.OUT_CHANNELS": 8,
        "ROI_BOX_HEAD.FC_DIM": 16,
        "ROI_HEADS.NUM_CLASSES": 3,
        "META_ARCHITECTURE": "GeneralizedRCNN",
    }
    opts = ["INPUT.MIN_SIZE_TEST", 64, *chain.from_iterable((f"MODEL.{key}", value) for key, value in keys.items())]
    few, more = (
        measure_costs(matrix, [*opts, "MODEL.RPN.POST_NMS_TOPK_TEST", number])["one"]["gflops"] for number in (5, 25)
    )
    per_proposal = 8 * 7 * 7 * 16 + 16 * 16 + 16 * (4 + 3 * 4)
    assert more - few == pytest.approx(20 * per_proposal / 1e9, rel=1e-6)
    cfg = load_config(teacher, [*opts, "MODEL.RPN.POST_NMS_TOPK_TEST", 5], student_only=True)
    backbone = FlopCountAnalysis(build_model(cfg).backbone.eval(), torch.zeros(1, 3, 64, 64))
    positions = sum((64 // stride) ** 2 for stride in (4, 8, 16, 32, 64))
    rpn = positions * (9 * 8 * 8 + 8 * 3 * 5)
    expected = backbone.unsupported_ops_warnings(False).total() + rpn + 5 * per_proposal
    assert few == pytest.approx(expected / 1e9, rel=1e-6)


def test_deformable_convolutions_count(tmp_path):
    """Check how many operations 16 more points add to RepPoints' head; deformable convolutions count as ordinary."""
    teacher = os.path.join(ROOT, "configs", "tiny", "reppoints-student.yaml")
    matrix = read_matrix(
        write_matrix(tmp_path, f"config: {teacher}\nbaseline: one\ncells: {{one: , two: {{opts: {{}}}}}}\n")
    )
    narrow = [
        "MODEL.SLIM_RESNET.WIDTHS",
        "(4, 6, 8, 10)",
        "MODEL.FPN.OUT_CHANNELS",
        "8",
        "MODEL.REPPOINTS.NUM_CONVS",
        1,
        "MODEL.REPPOINTS.NORM",
        "",
    ]
    few, more = (
        measure_costs(matrix, [*narrow, "INPUT.MIN_SIZE_TEST", 128, "MODEL.REPPOINTS.NUM_POINTS", n])["one"]
        for n in (9, 25)
    )
    positions = sum((128 // stride) ** 2 for stride in (8, 16, 32, 64, 128))
    # 16 more points: in the kernels of two deformable convolutions, and as outputs (y and x) of two 1 x 1 convolutions
    per_position = 2 * 8 * 8 * 16 + 2 * 8 * 2 * 16
    assert more["gflops"] - few["gflops"] == pytest.approx(positions * per_position / 1e9, rel=1e-6)
