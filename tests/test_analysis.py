"""The parts common to all analyses: registry, models and weights, saved results, and users' own analyses."""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

from kd_d2 import UserError
from kd_d2.analysis import (
    ANALYSES,
    Analysis,
    TrainedModel,
    find_analysis,
    load_analysis,
    load_distillations,
    load_models,
    register_analysis,
)
from kd_d2.analysis.attention import AttentionAnalysis
from kd_d2.analysis.base import nanmean
from kd_d2.analysis.drawing import write_picture
from kd_d2.analysis.errors import ErrorAnalysis
from kd_d2.analysis.models import restrict_images
from kd_d2.analysis.ranks import RankAnalysis
from kd_d2.files import read_json, write_json
from kd_d2.report.page import Picture

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.utils.file_io import PathManager
from helpers import ROOT, Project, clean_process, make_project, run_command
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


def test_the_same_images_in_several_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check two folders in one process, and that the results do not depend on how a folder's path is written."""
    project = make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    identities = []
    with clean_process():
        for output in ("one", "two", str(tmp_path / "one")):
            Path(output).mkdir(exist_ok=True)
            models = load_models([(str(project.student), str(project.teacher_weights))])
            restrict_images(models, 2, output)
            assert len(DatasetCatalog.get(models[0].dataset)) == 2
            identities.append(models[0].identity())
    assert identities[0] == identities[2]


def test_nan_is_null_in_files(tmp_path: Path) -> None:
    path = str(tmp_path / "x.json")
    write_json(path, {"a": [math.nan, 1.5], "b": (math.inf, "NaN"), "c": {"d": -math.inf}})
    assert read_json(path) == {"a": [None, 1.5], "b": [None, "NaN"], "c": {"d": None}}
    with pytest.raises(UserError, match=r"none.json cannot be read \(No such file"):
        read_json(str(tmp_path / "none.json"))
    Path(path).write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"x.json cannot be read \(it is not valid JSON: "):
        read_json(path)


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


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UserError, match=r"^The picture .*a\.png cannot be written: "):
        write_picture(str(tmp_path / "a.png"), np.zeros((4, 4, 3), np.uint8))


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
