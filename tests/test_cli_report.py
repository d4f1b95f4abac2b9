"""`kd-d2 report`: a self-contained page about trainings, analyses and a sweep, and error messages."""

from __future__ import annotations

import base64
import functools
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

from kd_d2.analysis import ANALYSES, find_analysis
from kd_d2.files import check_output_file, write_text
from kd_d2.report import Listing, Picture, Section, Table, render
from kd_d2.report.sections import _cost_sentence

import numpy as np
import pytest
from helpers import ROOT, make_project, run_command, write_yaml
from PIL import Image

run = functools.partial(run_command, "report")


class _Page(HTMLParser):
    """The visible text and all addresses of a page; raises AssertionError for tags that are not closed."""

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
    """Check escaping, that plots are embedded unchanged, and that large photographs are compressed and downscaled."""
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


def _analyses(folder: Path) -> list[Path]:
    """Write results of every analysis, and return their folders."""
    areas = {
        s: dict.fromkeys(("C75", "C50", "Loc", "Sim", "Oth", "BG", "FN"), 0.25)
        for s in ("all", "small", "medium", "large")
    }
    scores = {"clean": 20.0, "mPC": 10.0, "rPC": None, "fog": 10.0}
    correlation = {"model": "student", "stride": 8, "horizontal": 0.5, "vertical": None, "mean": 0.5}
    distance = {"model": "student", "stride": 8, "relative": 0.1, "correlation": 0.9, "l1": 0.2, "ssim": 0.3}
    features = {"images": 7, "correlations": [correlation], "distances": [distance]}
    gradients = {
        "losses": {"loss_one": {"loss": 1.25, "norm_ratio": 0.375, "cosine": None}},
        "methods": {"One": {"norm_ratio": 0.0, "weight": 4.5, "suggested_weight": None}},
        "target": 2.0,
    }
    point = {"threshold": 0.34, "precision": 0.75, "recall": 0.6, "f1": 0.667, "tp": 3, "fp": 1, "fn": 2}
    chosen = {"objects": 5, "detections": 9, "points": {"largest F1": point, "recall >= 0.9": None}}
    thresholds = {
        "iou": 0.5,
        "models": {"student": {"overall": chosen, "classes": {"cat": chosen}, "confusion": [[3, 2], [1, 0]]}},
    }
    found = {
        "errors": ("errors", {"student": {"overall": areas, "classes": {"cat": areas}}}),
        "robustness": ("summary", {"student": {"AP": scores, "AP50": scores}}),
        "features": ("features", features),
        "detections": (
            "differences",
            {"compared": ["plain", "student"], "total": {"gained": 3, "lost": 1}, "images": {}},
        ),
        "thresholds": ("thresholds", thresholds),
        "attention": ("attention", {"images": 1, "instances": 5, "share_in_box": 0.25, "box_area": 0.125}),
        "loss-maps": ("loss_maps", {"box_area": 0.26, "runs": {"ssim": {"records": 40, "share_in_boxes": 0.27}}}),
        "gradients": ("gradients", gradients),
        "ranks": ("ranks", {"images": ["z.png"], "features_compared": False}),
        "rank-oracle": ("rank_oracle", {"student": {"AP": 14.5, "AP50": None, "AP75": 0.5}}),
    }
    assert found.keys() == ANALYSES.keys()
    for name, (file, tree) in found.items():
        (folder / name).mkdir(parents=True)
        (folder / name / f"{file}.json").write_text(json.dumps(tree))
        (folder / name / "analysis.json").write_text(json.dumps({"analysis": name}))
    for name in ("errors/curves", "robustness/robustness", "features/channels/x", "detections/01-x", "attention/y"):
        _picture(folder / f"{name}.png")
    for name in ("loss-maps/loss_maps", "ranks/z", "thresholds/confusion/student"):
        _picture(folder / f"{name}.png")
    return [folder / name for name in found]


def test_median_of_an_even_number_of_rows() -> None:
    rows = [{"iteration": n, "total_loss": 1.0, "time": seconds} for n, seconds in enumerate((9.0, 1.0))]
    assert _cost_sentence(rows) == "2 iterations, 5.00 s per iteration (median)."


def test_page_of_everything(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Check a page with a training of two iterations, a finished sweep made by hand, and every analysis."""
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
    options = ["--sweep", write_yaml(tmp_path / "matrix.yaml", matrix), "--results", results]
    run("--output", page_file, "--title", "All of it", *options, project.output, *_analyses(tmp_path / "found"))
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
            "25 % of an instance's attention lies in its box, which covers 12 % of the image",
            "ssim: 27 % of the loss lies in the objects' boxes, which cover 26 % of the image (means; 40 records",
            "loss_one 1.25 0.375 -",
            "One 0 4.5 -",
            "student 14.50 - 0.50",
            "Features are not drawn",
            "--score-thresh 0.34",
            "student, recall >= 0.9 none - - - - - -",
        ),
    ):
        assert page.says(text), text
    assert all(uri.startswith("data:image/") for uri in page.images) and len(page.images) == 11
    assert all(address.startswith("#part-") for address in page.loads)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "There is nothing to report; give output folders of trainings or analyses"),
        (["--sweep", "m.yaml"], "--sweep and --results must be given together"),
        (
            ["empty"],
            "empty is neither the output folder of a training (it has no config.yaml and metrics.json) nor that of a",
        ),
        (["none"], "none is neither the output folder of a training"),
        (["unknown"], "Unknown analysis 'mine'; available: errors, detections"),
        (["bytes"], "Config file bytes/config.yaml cannot be read: 'utf-8' codec can't decode byte 0xff"),
        (["unnamed"], "analysis.json: the file has no 'analysis'"),
        (["SEED", "1"], "kd-d2 report takes no config overrides, such as SEED"),
    ],
)
def test_what_is_missing(tmp_path: Path, monkeypatch, capfd, options: list[str], expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes" / "metrics.json").write_text('{"iteration": 0, "total_loss": 1.0}')
    (tmp_path / "bytes" / "config.yaml").write_bytes(b"\xff\xfe")
    for name, marker in (("empty", None), ("unknown", '{"analysis": "mine"}'), ("unnamed", "{}")):
        (tmp_path / name).mkdir()
        if marker:
            (tmp_path / name / "analysis.json").write_text(marker)
    with pytest.raises(SystemExit):
        run("--output", "page.html", *options)
    assert expected in capfd.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_folder_in_place_of_the_page(tmp_path: Path, capfd) -> None:
    ranks = next(folder for folder in _analyses(tmp_path) if folder.name == "ranks")
    for output in (str(ranks), f"{tmp_path}/new/"):
        with pytest.raises(SystemExit):
            run("--output", output, ranks)
        assert capfd.readouterr().err == f"error: --output {output} is a folder; name a file.\n"


def test_a_page_that_is_a_link_or_a_device(tmp_path: Path) -> None:
    """Check that a link is kept and its target written, and that a pipe, as a device, is written to and kept."""
    check_output_file(str(tmp_path / "pages" / "target.html"))
    (tmp_path / "link.html").symlink_to(tmp_path / "pages" / "target.html")
    check_output_file(str(tmp_path / "link.html"))
    write_text(str(tmp_path / "link.html"), "page")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "pages" / "target.html").read_text() == "page"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_output_file(str(pipe))
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(str(pipe), "page")
    assert os.read(reader, 100) == b"page"
    os.close(reader)
    assert pipe.is_fifo() and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"a": 1}', "null", None])
@pytest.mark.parametrize("name", list(ANALYSES))
def test_files_that_hold_something_else(tmp_path: Path, capfd, name: str, text: str | None) -> None:
    """Check that the message names the file, also if it does not exist."""
    (tmp_path / "analysis.json").write_text(json.dumps({"analysis": name}))
    path = tmp_path / find_analysis(name).file
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit):
        run("--output", tmp_path / "page.html", tmp_path)
    said = capfd.readouterr().err
    assert said.startswith(f"error: {path}") and said.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_a_shipped_sweep(tmp_path: Path) -> None:
    """Check the name of a sweep, as kd-d2 sweep accepts it."""
    page = tmp_path / "page.html"
    run("--output", page, "--sweep", "evidence/narrow-matrix", "--results", ROOT / "projects/evidence/narrow")
    assert _Page(page.read_text()).says("Mean and standard deviation over seeds")


def test_a_comparison_without_a_finished_cell(tmp_path: Path, capfd) -> None:
    project = make_project(tmp_path)
    matrix = {
        "config": str(project.student),
        "baseline": "kd",
        "student": "kd",
        "cells": {"kd": {"title": "distilled"}},
    }
    with pytest.raises(SystemExit):
        run("--output", tmp_path / "p.html", "--sweep", write_yaml(tmp_path / "m.yaml", matrix), "--results", tmp_path)
    assert f"--results: {tmp_path} has no finished cell of the sweep" in capfd.readouterr().err
