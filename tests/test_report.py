"""tools/report.py: one page, self-contained, of what the other programs left; and what it says where something is missing."""

from __future__ import annotations

import base64
import functools
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

from kd_d2.report import Listing, Picture, Section, Table, render

import numpy as np
import pytest
from helpers import ROOT, make_project, run_program, write_yaml
from PIL import Image


@pytest.fixture
def run() -> Callable[..., None]:
    """Run the program as from a command line, in this process."""
    return functools.partial(run_program, ROOT / "tools" / "report.py")


class _Page(HTMLParser):
    """What a reader sees, and every address that the page would load; raises where tags do not close."""

    VOID = {"meta", "img"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.loads, self.images, self.text = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                (self.images if tag == "img" else self.loads).append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data + " ")

    def says(self, text: str) -> bool:
        return text in re.sub(r"\s+", " ", "".join(self.text))


def _picture(path: Path, size: tuple[int, int] = (40, 30), noise: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    if noise:
        pixels = np.random.RandomState(0).randint(0, 255, pixels.shape).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def _image(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))


def test_page_of_blocks(tmp_path: Path) -> None:
    """Check escaping, that plots keep every pixel, and that large photographs are packed and made smaller."""
    plot = _picture(tmp_path / "plot.png")
    photo = _picture(tmp_path / "photo.png", (2500, 100), noise=True)
    table = Table(["<method>", "AP"], [["a & b", "12.5"]], "caption")
    blocks = [table, Picture(str(plot), 'a "plot"'), Picture(str(photo)), Listing("config", "KEY: <b>value</b>")]
    page = _Page(render("<title>", [Section("First part", ["A sentence."], blocks)], {"torch": "2"}))
    for text in ("<title>", "<method>", "a & b", "KEY: <b>value</b>", "A sentence.", "torch 2"):
        assert page.says(text)
    assert page.loads == ["#part-1"]
    assert page.images[0] == "data:image/png;base64," + base64.b64encode(plot.read_bytes()).decode()
    assert page.images[1].startswith("data:image/webp") and _image(page.images[1]).size == (2200, 88)


def _analyses(folder: Path) -> list[object]:
    """Folders as the programs of analysis leave them, and the options that name them."""
    areas = {
        s: dict.fromkeys(("C75", "C50", "Loc", "Sim", "Oth", "BG", "FN"), 0.25)
        for s in ("all", "small", "medium", "large")
    }
    scores = {"clean": 20.0, "mPC": 10.0, "rPC": 0.5, "fog": 10.0}
    correlation = {"model": "student", "stride": 8, "horizontal": 0.5, "vertical": float("nan"), "mean": 0.5}
    distance = {"model": "student", "stride": 8, "relative": 0.1, "correlation": 0.9, "l1": 0.2, "ssim": 0.3}
    files = {
        "errors/errors.json": {"student": {"overall": areas, "classes": {"cat": areas}}},
        "robustness/summary.json": {"student": {"AP": scores, "AP50": scores}},
        "features/features.json": {"images": 7, "correlations": [correlation], "distances": [distance]},
        "detections/differences.json": {
            "compared": ["plain", "student"],
            "total": {"gained": 3, "lost": 1},
            "images": {},
        },
    }
    for name, tree in files.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(json.dumps(tree))
    for name in ("errors/curves", "robustness/robustness", "features/channels/x", "detections/01-x", "attention/y"):
        _picture(folder / f"{name}.png")
    names = ("errors", "robustness", "features", "detections", "attention")
    return [x for name in names for x in (f"--{name}", folder / name)] + ["--loss-maps", _picture(folder / "maps.png")]


def test_page_of_everything(tmp_path: Path, run: Callable, capsys: pytest.CaptureFixture) -> None:
    """Train two iterations, make a finished comparison by hand, and put them on a page with every analysis."""
    project = make_project(tmp_path / "project", SOLVER__MAX_ITER=2, SOLVER__STEPS=(), TEST__EVAL_PERIOD=1)
    project.main()
    found = {"AP": 30.0, "AP50": 50.0, "AP-red": 40.0, "AP-green": 20.0, "AP-blue": float("nan")}
    (project.output / "train.json").write_text(json.dumps({"bbox": found, "peak_memory_mib": 1.0}))
    cells = {
        "plain": {"title": "plain & simple", "opts": {"MODEL.META_ARCHITECTURE": "RetinaNet"}},
        "kd": {"title": "distilled"},
    }
    matrix = {"config": str(project.student), "baseline": "plain", "student": "plain", "cells": cells}
    results = tmp_path / "results"
    results.mkdir()
    for name, ap in (("plain", 10.0), ("kd", 12.5)):
        result = {"cell": name, "seed": 0, "scores": {"AP": ap, "AP50": 2 * ap}, "settings": {"SEED": 0}}
        curves = {"total_loss": [[0, 2.0], [9, 1.0]]}
        (results / f"{name}-seed0.json").write_text(
            json.dumps({**result, "curves": curves, "versions": {"torch": "9.9"}})
        )
    page_file = tmp_path / "page.html"
    options = ["--matrix", write_yaml(tmp_path / "matrix.yaml", matrix), "--results", results, "--run", project.output]
    run("--output", page_file, "--title", "All of it", *options, *_analyses(tmp_path / "found"))
    assert f"{page_file}: " in capsys.readouterr().out
    page = _Page(page_file.read_text())
    for text in (
        *("All of it", "plain & simple", "distilled", "+2.50", "torch: '9.9'", "over plain & simple"),
        *("Training project/output", "2 iterations", "AP by class", "red 40.00", "MODEL:", "faster-coco-eval:"),
        *("student finds 3 objects that plain does not, and misses 1", "student, small", "0.250", "cat, student"),
        *(
            "student, AP50",
            "mPC",
            "10.00",
            "Means over 7 images",
            "0.900",
            "Attention of ICD's decoder",
            "Where the loss falls",
        ),
    ):
        assert page.says(text), text
    assert all(uri.startswith("data:image/") for uri in page.images) and len(page.images) == 9
    assert all(address.startswith("#part-") for address in page.loads)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "There is nothing to report: name a comparison"),
        (["--matrix", "m.yaml"], "--matrix and --results belong together"),
        (["--run", "empty"], "--run: empty has no config.yaml and metrics.json"),
        (["--errors", "empty"], "--errors: empty has no errors.json, which tools/error_analysis.py writes"),
        (["--robustness", "none"], "--robustness: none has no summary.json, which tools/robustness.py writes"),
        (["--features", "empty"], "--features: empty has no features.json"),
        (["--detections", "empty"], "--detections: empty has no differences.json"),
        (["--loss-maps", "none.png"], "--loss-maps: none.png has no pictures"),
    ],
)
def test_what_is_missing(tmp_path: Path, run: Callable, monkeypatch, capfd, options: list[str], expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        run("--output", "page.html", *options)
    assert expected in capfd.readouterr().err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"a": 1}', "null"])
@pytest.mark.parametrize("option", ["errors", "robustness", "features", "detections"])
def test_files_that_hold_something_else(tmp_path: Path, run: Callable, capfd, option: str, text: str) -> None:
    names = {"errors": "errors", "robustness": "summary", "features": "features", "detections": "differences"}
    (tmp_path / f"{names[option]}.json").write_text(text)
    with pytest.raises(SystemExit):
        run("--output", tmp_path / "page.html", f"--{option}", tmp_path)
    assert f"error: --{option}: {tmp_path} does not hold what its program writes (" in capfd.readouterr().err


def test_a_comparison_without_a_finished_cell(tmp_path: Path, run: Callable, capfd) -> None:
    project = make_project(tmp_path)
    matrix = {
        "config": str(project.student),
        "baseline": "kd",
        "student": "kd",
        "cells": {"kd": {"title": "distilled"}},
    }
    with pytest.raises(SystemExit):
        run("--output", tmp_path / "p.html", "--matrix", write_yaml(tmp_path / "m.yaml", matrix), "--results", tmp_path)
    assert f"--results: {tmp_path} has no finished cell of the matrix" in capfd.readouterr().err
