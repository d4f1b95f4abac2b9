"""The parts common to all analyses: registry, models and weights, saved results, and users' own analyses."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kd_d2 import UserError
from kd_d2.analysis import (
    ANALYSES,
    Analysis,
    Distillation,
    TrainedModel,
    find_analysis,
    load_analysis,
    load_distillations,
    load_models,
    register_analysis,
)
from kd_d2.analysis.attention import AttentionAnalysis
from kd_d2.analysis.base import is_analysis, nanmean
from kd_d2.analysis.drawing import write_picture
from kd_d2.analysis.errors import ErrorAnalysis
from kd_d2.analysis.examples import read_examples
from kd_d2.analysis.features import FeatureAnalysis
from kd_d2.analysis.models import read_annotations, restrict_images
from kd_d2.analysis.ranks import RankAnalysis
from kd_d2.errors import as_user_error
from kd_d2.figures import save_figure, subplots
from kd_d2.files import read_json, write_json
from kd_d2.report.page import Picture, Table, as_text
from kd_d2.typed_json import from_tree

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from helpers import CLASSES, ROOT, Killed, Project, clean_process, make_project, run_command
from iopath.common.file_io import PathHandler


def example(name: str, file: str = "guides/own-analysis.md") -> str:
    """Return the code block after `<!-- test: name -->` in a file of docs/."""
    text = (ROOT / "docs" / file).read_text()
    return re.search(rf"<!-- test: {name} -->\n```python\n(.*?)```", text, re.DOTALL)[1]


@pytest.mark.parametrize("arguments", [["--help"], ["analyze", "--help"]])
def test_listing_commands_and_analyses_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys, kd_d2.cli\n"
        f"try: kd_d2.cli.main({arguments!r})\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'detectron2', 'matplotlib', 'cv2'} & sys.modules.keys()"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    expected = ANALYSES if "analyze" in arguments else ["train", "analyze", "report"]
    assert all(f" {name} " in printed for name in expected)


@pytest.mark.parametrize("name", list(ANALYSES))
def test_every_analysis_explains_itself(name: str, capsys: pytest.CaptureFixture) -> None:
    """Check the class that is registered for the name, and its help."""
    assert find_analysis(name).name == name
    with pytest.raises(SystemExit) as end:
        run_command("analyze", name, "--help")
    printed = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert f"usage: kd-d2 analyze {name} " in printed and "--model" in printed and "--output" in printed
    assert find_analysis(name).__doc__.partition("\n")[0] in printed


def test_an_unknown_analysis(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run_command("analyze", "horoscopes", "--model", "x", "--output", "y")
    assert "invalid choice: 'horoscopes'" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"Unknown analysis 'horoscopes'; available: errors, "):
        find_analysis("horoscopes")


def test_an_analysis_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    """Check that --import adds it to the list, that it runs with its own option, and that a report shows it."""
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    for name in list(ANALYSES):
        monkeypatch.setitem(ANALYSES, name, ANALYSES[name])
    project, file = make_project(tmp_path / "project"), tmp_path / "my_counts.py"
    file.write_text(example("analysis of your own"))
    try:
        with pytest.raises(SystemExit):
            run_command("analyze", "--import", file, "--help")
        assert "parameters          Numbers of parameters." in capsys.readouterr().out
        with clean_process():
            count = sum(p.numel() for p in load_models_of(project)[0].build().parameters())
        common = ["--import", file, "--output", tmp_path / "found", "--times", 2]
        run_command(
            "analyze",
            "parameters",
            "--model",
            f"mine={project.teacher}",
            project.teacher_weights,
            *common,
            *_data(project),
        )
        assert f"{2 * count} |" in capsys.readouterr().out
        assert json.loads((tmp_path / "found" / "parameters.json").read_text()) == {"mine": 2 * count}
        run_command("report", "--import", file, "--output", tmp_path / "page.html", tmp_path / "found")
        assert f"<td>{2 * count}</td>" in (tmp_path / "page.html").read_text()
        with pytest.raises(UserError, match="named 'parameters' is already registered"):
            register_analysis(find_analysis("parameters"))
    finally:
        ANALYSES.pop("parameters", None)


@dataclass
class Pair:
    first: int
    second: float | None = None


@pytest.mark.parametrize(
    ("kind", "tree", "expected"),
    [
        (Pair | None, {"first": 1}, Pair(1)),
        (list[Pair] | None, [{"first": 1, "second": 2.5}], [Pair(1, 2.5)]),
        (None | dict[str, Pair], {"a": {"first": 1}}, {"a": Pair(1)}),
    ],
)
def test_fields_that_may_be_null(kind: Any, tree: Any, expected: Any) -> None:
    assert from_tree(kind, None, "a.json", "it") is None
    assert from_tree(kind, tree, "a.json", "it") == expected
    with pytest.raises(UserError, match=r"a.json: it is 'x', not (an object|a list)"):
        from_tree(kind, "x", "a.json", "it")


def test_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the example in the documentation, with a run folder and a config with checkpoint where it expects them."""
    project = make_project(tmp_path / "project", SOLVER__MAX_ITER=1, SOLVER__STEPS=())
    project.main("OUTPUT_DIR", tmp_path / "output" / "plain")
    (tmp_path / "student.pth").write_bytes((tmp_path / "output" / "plain" / "model_final.pth").read_bytes())
    shutil.copy(tmp_path / "output" / "plain" / "config.yaml", tmp_path / "student.yaml")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    with clean_process():
        exec(compile(example("analysis in python", "analysis.md"), "analysis.md", "exec"), scope)
    assert scope["again"].models.keys() == {"plain", "student"}
    assert scope["again"].models["plain"] == scope["again"].models["student"]
    assert scope["again"].models["plain"].overall["all"]["FN"] == 1


def _data(project: Project) -> list[str]:
    entry = [[project.name, str(project.annotations), str(project.annotations.parent / "images")]]
    return ["DATASETS.COCO_JSON", str(entry), "DATASETS.TEST", str((project.name,))]


def load_models_of(project: Project, weights: object = None, title: str = "one") -> list[TrainedModel]:
    return load_models([(f"{title}={project.teacher}", str(weights or project.teacher_weights))], _data(project))


class _Elsewhere(PathHandler):
    """Resolves addresses elsewhere://NAME to files in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _get_supported_prefixes(self) -> list[str]:
        return ["elsewhere://"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: object) -> str:
        return str(self.folder / path.removeprefix("elsewhere://"))


def test_weights_may_be_urls_and_have_queries(tmp_path: Path) -> None:
    """Check a model's identity and weights, and the student and distiller layers of a distillation."""
    project = make_project(tmp_path)
    PathManager.register_handler(_Elsewhere(tmp_path), allow_override=True)
    content = torch.load(project.teacher_weights)
    torch.save({**content, "distillers": {"ICD.x": torch.ones(1)}}, tmp_path / "student.pth")
    with clean_process():
        for weights in ("elsewhere://student.pth", f"{tmp_path}/student.pth?matching_heuristics=True"):
            (model,) = load_models_of(project, weights)
            assert model.identity()["weights"][0] == str((tmp_path / "student.pth").resolve())
            built = model.build().state_dict()
            assert all(torch.equal(built[name], value) for name, value in content["model"].items())
            (distillation,) = load_distillations([(str(project.student), weights)])
            assert distillation.distiller_states()["ICD"]["x"].tolist() == [1]
            student = distillation.build_trained().student.state_dict()
            assert all(torch.equal(student[name], value) for name, value in content["model"].items())
        for weights in ("nowhere://student.pth", "elsewhere://none.pth"):
            (model,) = load_models_of(project, weights)
            with pytest.raises(UserError, match=r"There is no checkpoint .*\.pth"):
                model.identity()


def test_what_changes_the_identity_of_a_model(tmp_path: Path) -> None:
    """Check weights of the same size, the config and the annotations, on which cached detections depend."""
    project = make_project(tmp_path)

    def changed(opts: tuple = ()) -> set[str]:
        with clean_process():
            (model,) = load_models([(str(project.student), str(project.teacher_weights))], opts)
            now = model.identity()
        names = {name for name, value in now.items() if value != latest.get(name)}
        latest.update(now)
        return names

    latest: dict[str, object] = {}
    assert changed() == {"weights", "config", "data"} and changed() == set()
    status = project.teacher_weights.stat()
    os.utime(project.teacher_weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert changed() == {"weights"}
    project.change_annotations(lambda tree: tree["annotations"][0].update(category_id=3))
    assert changed() == {"data"}
    assert changed(("MODEL.RETINANET.SCORE_THRESH_TEST", "0.5")) == {"config"}


def test_detections_are_cached_until_the_weights_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a run that is killed after it replaced the detections, and then the earlier weights again."""
    project, runs = make_project(tmp_path), []

    def infer(model: None, loader: object, evaluator: object) -> None:
        runs.append(len(runs))
        Path(folder, "coco_instances_results.json").write_text(json.dumps(runs[-1:]))
        if runs[-1] == 1:
            raise Killed

    monkeypatch.setattr(TrainedModel, "build", lambda model: None)
    monkeypatch.setattr("kd_d2.analysis.models.inference_on_dataset", infer)
    folder, status = tmp_path / "found" / "one", project.teacher_weights.stat()
    with clean_process():
        (model,) = load_models_of(project)
        assert [model.detections(str(tmp_path / "found")) for _ in range(2)] == [[0], [0]]
        os.utime(project.teacher_weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        with pytest.raises(Killed):
            model.detections(str(tmp_path / "found"))
        os.utime(project.teacher_weights, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert model.detections(str(tmp_path / "found")) == [2]


def test_classes_in_another_order(tmp_path: Path) -> None:
    """Check that models and students are brought to the order of the data, by the class names in their checkpoints."""
    project = make_project(tmp_path)
    weights = torch.load(project.teacher_weights)["model"]
    for name, order in (("own", CLASSES), ("other", ("green", "red", "blue")), ("strange", ("red", "green", "pink"))):
        torch.save({"model": weights, "class_names": list(order)}, tmp_path / f"{name}.pth")
    rows = weights["head.cls_score.weight"].unflatten(0, (-1, 3))
    with clean_process():
        models = load_models([(f"{n}={project.student}", str(tmp_path / f"{n}.pth")) for n in ("own", "other")])
        found = [model.build().head.cls_score.weight.unflatten(0, (-1, 3)) for model in models]
        (distillation,) = load_distillations([(str(project.student), str(tmp_path / "other.pth"))])
        found.append(distillation.build_trained().student.head.cls_score.weight.unflatten(0, (-1, 3)))
        (strange,) = load_distillations([(str(project.student), str(tmp_path / "strange.pth"))])
        with pytest.raises(UserError, match=r"The classes of the student .* lacks 'blue' and also has 'pink'"):
            strange.build_trained()
    assert torch.equal(found[0], rows) and not torch.equal(rows, rows[:, [1, 0, 2]])
    assert all(torch.equal(of, rows[:, [1, 0, 2]]) for of in found[1:])


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["a={plain}"], "--model a: write a checkpoint after the config"),
        (["a b={plain} {weights}", "a-b={plain} {weights}"], "several titles give the folder name 'a-b'"),
    ],
)
def test_models_that_cannot_be_loaded(tmp_path: Path, models: list[str], message: str) -> None:
    project = make_project(tmp_path)
    paths = {"plain": project.teacher, "weights": project.teacher_weights}
    named = [[part.format(**paths) for part in model.rsplit(" ", model.count(" {w"))] for model in models]
    with clean_process(), pytest.raises(UserError, match=message):
        load_models(named, [*_data(project), *([] if len(named) > 1 else ["MODEL.WEIGHTS", ""])])


def test_data_with_more_classes_than_the_student(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    project.change_annotations(lambda tree: tree["categories"].append({"id": 4, "name": "pink"}))
    with clean_process():
        (distillation,) = load_distillations([(str(project.student), str(project.teacher_weights))])
        with pytest.raises(UserError, match=r"has 4 classes, but the .*predicts 3"):
            distillation.build()


def test_models_of_different_data_and_weights_given_twice(tmp_path: Path) -> None:
    one, other = make_project(tmp_path / "one"), make_project(tmp_path / "other")
    pairs = [(f"{p.folder.name}={p.student}", str(p.teacher_weights)) for p in (one, other)]
    with clean_process():
        with pytest.raises(UserError, match=f"different datasets in DATASETS.TEST: {one.name}, {other.name}"):
            load_models(pairs)
        with pytest.raises(
            UserError, match=r"--model one names the checkpoint .*: leave out the override MODEL\.WEIGHTS"
        ):
            load_models(pairs[:1], ["MODEL.WEIGHTS", str(other.teacher_weights)])


def test_training_data_is_checked_where_it_is_read(tmp_path: Path) -> None:
    project = make_project(tmp_path, DATASETS__TRAIN=("nowhere",))
    with clean_process():
        assert len(load_distillations([str(project.student)])) == 1
        with pytest.raises(UserError, match="nowhere"):
            load_distillations([str(project.student)], train=True)


def test_datasets_that_cannot_be_drawn(tmp_path: Path) -> None:
    """Check a dataset without annotation file, and one whose only objects are crowds."""
    with pytest.raises(UserError, match="voc_2007_test has no annotation file in COCO format"):
        read_annotations("voc_2007_test")
    project = make_project(tmp_path)
    with clean_process():
        cfg = load_distillations([str(project.student)])[0].cfg
        assert [Path(of["file_name"]).name for of in read_examples(cfg, 2)] == ["000.png", "001.png"]
    project.change_annotations(lambda tree: [a.update(iscrowd=1) for a in tree["annotations"]])
    with clean_process():
        cfg = load_distillations([str(project.student)])[0].cfg
        with pytest.raises(UserError, match=f"The dataset {project.name} has no image with objects"):
            read_examples(cfg, 2)


def test_examples_of_masks_in_any_format(tmp_path: Path) -> None:
    """Check that examples with RLE masks are read for a detector that is trained on polygons."""
    project = make_project(tmp_path)
    project.change_annotations(
        lambda tree: [
            a.update(segmentation={"size": [i["height"], i["width"]], "counts": [0, i["height"] * i["width"]]})
            for i in tree["images"]
            for a in tree["annotations"]
            if a["image_id"] == i["id"]
        ]
    )
    with clean_process():
        cfg = load_distillations([str(project.student)], ["MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "polygon"])[0].cfg
        (example,) = read_examples(cfg, 1)
        assert example["instances"].gt_masks.tensor.all()


def test_some_images_of_other_datasets(tmp_path: Path) -> None:
    """Check that no COCO metrics are reported for another dataset, and that features need no annotation file."""
    project = make_project(tmp_path)
    with clean_process():
        models = load_models([(project.student, project.teacher_weights)])
        metadata = MetadataCatalog.get(models[0].dataset)
        del metadata.evaluator_type
        metadata.evaluator_type = "lvis"
        assert restrict_images(models, 6, str(tmp_path)) == models
        with pytest.raises(UserError, match=f"^--images needs COCO metrics, which {models[0].dataset} does not use"):
            restrict_images(models, 2, str(tmp_path))
        del metadata.json_file
        found = FeatureAnalysis.run(models, str(tmp_path / "two"), images=2, pictures=0, channels=0)
        assert found.images == 2


def test_the_same_images_in_several_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check two folders in one process, and that the results do not depend on how a folder's path is written."""
    project = make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    identities = []
    with clean_process():
        for output in ("one", "two", str(tmp_path / "one")):
            Path(output).mkdir(exist_ok=True)
            models = load_models([(str(project.student), str(project.teacher_weights))])
            (restricted,) = restrict_images(models, 2, output)
            assert len(DatasetCatalog.get(restricted.dataset)) == 2
            assert len(DatasetCatalog.get(models[0].dataset)) == 6
            identities.append(restricted.identity())
    assert identities[0] == identities[2]


def test_analyses_of_the_same_models(tmp_path: Path) -> None:
    """Check that an analysis of some images leaves the models, with frozen configs, to others of all images."""
    project = make_project(tmp_path)
    with clean_process():
        models = load_models([(project.student, project.teacher_weights)])  # paths that are no text
        models[0].cfg.freeze()
        FeatureAnalysis.run(models, str(tmp_path / "two"), images=2, pictures=0, channels=0)
        found = FeatureAnalysis.run(models, str(tmp_path / "five"), images=5, pictures=0, channels=0)
        assert "Means over 5 images" in found.summary()
        models[0].down_to(0.01)
        assert len(DatasetCatalog.get(models[0].dataset)) == 6


def test_a_single_path_is_no_list_of_models(tmp_path: Path) -> None:
    for path in ("output/plain", Path("output/plain")):
        with pytest.raises(UserError, match=r"The models are a list of paths, such as \['output/plain'\]"):
            load_models(path)


def test_plots_leave_matplotlib_alone(tmp_path: Path) -> None:
    """Check the backend, parsing of formulas and open figures of a program that imports all plots, and a name with dollars."""
    code = (
        "import matplotlib; matplotlib.use('svg')\n"
        "import kd_d2.sweep.plots as plots, kd_d2.analysis.errors.plots, kd_d2.analysis.features.plots\n"
        "import kd_d2.analysis.robustness.plots\n"
        "curves = {r'$x_{': {'total_loss': [(1, 2.0), (2, 1.0)]}}\n"
        f"plots.plot_curves(curves, {str(tmp_path / 'curves.png')!r})\n"
        "from matplotlib import pyplot\n"
        "assert matplotlib.get_backend() == 'svg' and matplotlib.rcParams['text.parse_math']\n"
        "assert pyplot.get_fignums() == []\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert (tmp_path / "curves.png").exists()


def test_a_section_before_it_is_saved() -> None:
    """Check that it has no pictures, such as those of the working directory."""
    assert not any(isinstance(block, Picture) for block in ErrorAnalysis({}).section().blocks)


def test_nan_is_null_in_files(tmp_path: Path) -> None:
    path = str(tmp_path / "x.json")
    write_json(path, {"a": [math.nan, 1.5], "b": (math.inf, "NaN"), "c": {"d": -math.inf}})
    assert read_json(path) == {"a": [None, 1.5], "b": [None, "NaN"], "c": {"d": None}}
    with pytest.raises(UserError, match=r"none.json cannot be read \(No such file"):
        read_json(str(tmp_path / "none.json"))
    Path(path).write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"x.json cannot be read \(it is not valid JSON: "):
        read_json(path)


def test_numbers_in_tables() -> None:
    assert [as_text(x) for x in (1.23456, None, math.nan, 0.0)] == ["1.235", "-", "-", "0.000"]
    assert as_text(None, missing="none") == "none" and as_text(12.5, "+.1f") == "+12.5"


def test_nanmean() -> None:
    assert nanmean([1.0, math.nan, 3.0]) == 2 and math.isnan(nanmean([math.nan]))
    np.testing.assert_array_equal(nanmean(np.array([[1, np.nan], [3, np.nan]]), 0), [2, np.nan])


AREAS = {s: dict.fromkeys(("C75", "C50"), 0.5) for s in ("all", "small")}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "the file is empty"),
        ({"a": 1}, "'a' is '1', not an object"),
        ({"a": {"overall": AREAS}}, "'a' has no 'classes'"),
        ({"a": {"overall": {"all": {"C75": "x"}}, "classes": {}}}, "'C75' is 'x', not a number or null"),
        ({"a": {"overall": {"all": {"C75": True}}, "classes": {}}}, "'C75' is 'True', not a number or null"),
        ({"a": {"overall": AREAS, "classes": [AREAS]}}, "'classes' is .*, not an object"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, tree: dict, message: str) -> None:
    write_json(str(tmp_path / "errors.json"), tree)
    write_json(str(tmp_path / "analysis.json"), {"analysis": "errors"})
    with pytest.raises(UserError, match=message):
        load_analysis(str(tmp_path))
    write_json(str(tmp_path / "errors.json"), {"a": {"overall": {"all": {"C75": 1, "C50": None}}, "classes": {}}})
    loaded = load_analysis(str(tmp_path))
    assert isinstance(loaded, ErrorAnalysis) and loaded.models["a"].overall["all"] == {"C75": 1, "C50": None}
    assert loaded.folder == str(tmp_path) and "| a, all" in loaded.summary()


def _ranks(folder: Path, names: list[str] | None) -> RankAnalysis:
    """Return an analysis that wrote pictures with these names; None: as written by older versions."""
    for name in names or ():
        (folder / name).write_bytes(b"")
    analysis = RankAnalysis(names or [], True)
    analysis.picture_files = names
    return analysis


def _shown(analysis: Analysis) -> list[str]:
    return [Path(block.path).name for block in analysis.section().blocks if isinstance(block, Picture)]


def test_an_analysis_is_finished_after_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a folder whose pictures were not all drawn, which reports do not take for an analysis."""

    def killed(analysis: Analysis, folder: str) -> None:
        raise Killed

    monkeypatch.setattr(RankAnalysis, "draw", killed)
    with pytest.raises(Killed):
        _ranks(tmp_path, ["a.png"]).save(str(tmp_path))
    assert (tmp_path / "ranks.json").exists() and not is_analysis(str(tmp_path))


@dataclass
class Counts(Analysis):
    """Counts of something."""

    name, title, file = "counts", "Counts", "counts.json"
    figures = {"all.png": "All of them.", "[0-9].png": "One of them: "}

    count: int

    @classmethod
    def run(cls, models: list, output: str) -> Counts:
        return cls(len(models))

    def sentences(self) -> list[str]:
        return ["Two sentences.", "And numbers."]

    def tables(self) -> list[Table]:
        return [Table(["a", "b"], [["x", "1"]], "A caption."), Table(["c"], [["y"]])]

    def details(self) -> list[Table]:
        return [Table(["d"], [["z"]])]


def test_what_is_printed_and_what_a_report_shows(tmp_path: Path) -> None:
    """Check the order of sentences, tables and pictures, and that a report alone has the details."""
    for name in ("2.png", "all.png", "1.png", "other.png"):
        (tmp_path / name).write_bytes(b"")
    analysis = Counts(3)
    analysis.save(str(tmp_path))
    assert json.loads((tmp_path / "counts.json").read_text()) == 3
    expected = ["Two sentences.", "And numbers.", "A caption.", "| a | b |\n| x | 1 |", "| c |\n| y |"]
    printed = re.sub(r"\n\|[-:|]+\n", "\n", analysis.summary())  # without the lines below headers
    assert re.sub(" +", " ", printed) == "\n\n".join(expected)
    section = analysis.section()
    assert (section.title, section.intro) == ("Counts", ["Two sentences.", "And numbers."])
    shown = [
        block.headers if isinstance(block, Table) else (Path(block.path).name, block.caption)
        for block in section.blocks
    ]
    assert shown == [
        *(["a", "b"], ["c"], ["d"]),
        *(("all.png", "All of them."), ("1.png", "One of them: "), ("2.png", "One of them: ")),
    ]


@pytest.mark.parametrize(("lacking", "sentence"), [
    ("student", "The student (Identity) has no dense predictions to compare."),
    ("teacher", "The teacher (Identity) has no dense predictions to compare."),
])  # fmt: skip
def test_a_pair_without_dense_predictions(monkeypatch: pytest.MonkeyPatch, lacking: str, sentence: str) -> None:
    parts = {
        whose: SimpleNamespace(model=torch.nn.Identity(), provides=frozenset() if whose == lacking else {"dense"})
        for whose in ("student", "teacher")
    }
    model = SimpleNamespace(adapter=parts["student"], teacher=SimpleNamespace(adapter=parts["teacher"]))
    monkeypatch.setattr(Distillation, "build", lambda distillation: model)
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        Distillation("one", get_cfg(), "x.pth").build_dense_pair("this")


def test_pictures_that_cannot_be_written(tmp_path: Path) -> None:
    """Check a picture in place of a folder, and a picture and a figure on a device without space, and too many pixels."""
    folder, full = tmp_path / "a.png", tmp_path / "b.png"
    folder.mkdir()
    full.symlink_to("/dev/full")
    for path, reason in ((folder, "Is a directory"), (full, "No space left on device")):
        with pytest.raises(UserError, match=rf"^The picture {path} cannot be written: {reason}\.$"):
            write_picture(str(path), np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match=r"c\.jpg cannot be written: its format does not allow 70000 x 1 pixels"):
        write_picture(str(tmp_path / "c.jpg"), np.zeros((1, 70000, 3), np.uint8))
    with pytest.raises(OSError) as caught:
        save_figure(subplots(1, 1, figsize=(1, 1))[0], str(full))
    assert str(as_user_error(caught.value)) == f"{full} cannot be written: No space left on device."


def test_pictures_in_one_folder_belong_to_their_analyses(tmp_path: Path) -> None:
    """Check that a rerun deletes and a report shows an analysis's own pictures, also after another ran in between."""
    folder, photo = str(tmp_path), tmp_path / "photo.png"
    photo.write_bytes(b"")
    _ranks(tmp_path, ["a.png", "b.png"]).save(folder)
    assert _shown(load_analysis(folder)) == ["a.png", "b.png"]
    attention = AttentionAnalysis(1, 1, 0.5, 0.5)
    attention.picture_files = ["b.png", "c.png"]
    (tmp_path / "c.png").write_bytes(b"")
    attention.save(folder)
    assert _shown(load_analysis(folder)) == ["b.png", "c.png"]
    RankAnalysis.clear(folder)
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["b.png", "c.png", "photo.png"]
    assert load_analysis(folder).name == "attention"
    _ranks(tmp_path, ["d.png"]).save(folder)
    assert _shown(load_analysis(folder)) == ["d.png"]
    RankAnalysis.clear(folder)
    assert not (tmp_path / "d.png").exists() and not (tmp_path / "analysis.json").exists()


def test_pictures_that_are_not_listed_are_shown_and_kept(tmp_path: Path) -> None:
    """Check an output folder of an older version, and that a list names no file elsewhere."""
    folder, outside = tmp_path / "out", tmp_path / "x.png"
    folder.mkdir()
    for path in (folder / "a.png", outside):
        path.write_bytes(b"")
    _ranks(folder, None).save(str(folder))
    assert not (folder / "pictures.json").exists() and _shown(load_analysis(str(folder))) == ["a.png"]
    RankAnalysis.clear(str(folder))
    assert (folder / "a.png").exists() and not (folder / "analysis.json").exists()
    _ranks(folder, ["../x.png", str(outside), "ranks.json"]).save(str(folder))
    assert _shown(load_analysis(str(folder))) == []
    RankAnalysis.clear(str(folder))
    assert outside.exists() and (folder / "ranks.json").exists()
    write_json(str(folder / "pictures.json"), {"ranks": "a.png"})
    with pytest.raises(UserError, match=r"pictures.json: 'ranks' is 'a.png', not a list"):
        RankAnalysis.load(str(folder))


@pytest.mark.parametrize(
    ("old", "new"), [("engine.analysed", "analysis.models"), ("evaluation.error_types", "analysis.errors")]
)
def test_an_old_module_names_the_new_one(old: str, new: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"kd_d2.{old} is now kd_d2.{new}"):
        importlib.import_module(f"kd_d2.{old}")
    importlib.import_module(f"kd_d2.{new}")


@pytest.mark.parametrize(
    ("title", "folder"),
    [("a b/c", "a-b-c"), ("../../x", "-..-x"), ("..", "model"), ("\x1b[31m<b>", "-31m-b-"), ("x" * 10_000, "x" * 100)],
    ids=["space", "parent folder", "dots", "escape code", "long"],
)
def test_folders_of_hostile_titles(title: str, folder: str) -> None:
    """Check that a model's files stay in the folder of the analysis."""
    assert TrainedModel(title, get_cfg()).folder_name == folder


@pytest.mark.parametrize("analysis", ["errors", "detections"])
def test_all_models_are_checked_before_the_first_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, analysis: str
) -> None:
    """Check a second model whose checkpoint is of another detector."""
    project, other = make_project(tmp_path), tmp_path / "other.pth"
    torch.save({"model": {"weight": torch.zeros(1)}}, other)
    models = ["--model", f"one={project.teacher}", project.teacher_weights, "--model", f"two={project.teacher}", other]
    entry = [[project.name, str(project.annotations), str(project.annotations.parent / "images")]]
    data = ["DATASETS.COCO_JSON", entry, "DATASETS.TEST", (project.name,)]
    monkeypatch.setattr("kd_d2.analysis.models.inference_on_dataset", lambda *_: pytest.fail("The first is evaluated."))
    with pytest.raises(SystemExit):
        run_command("analyze", analysis, *models, "--output", tmp_path / "out", *data)
    assert f"{other} fills no parameter" in capfd.readouterr().err
