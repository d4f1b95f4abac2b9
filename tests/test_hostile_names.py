"""Names of classes, files and trainings with special meaning in HTML, terminals, paths or tables: none takes effect."""

from __future__ import annotations

import csv
import json
import logging
import sys
from html.parser import HTMLParser
from pathlib import Path

from kd_d2 import UserError
from kd_d2.analysis.base import Analysis
from kd_d2.analysis.drawing import draw_instances, titled
from kd_d2.analysis.errors.analysis import ErrorAnalysis
from kd_d2.analysis.errors.curves import analyze_errors
from kd_d2.analysis.examples import picture_name
from kd_d2.data import check_coco_json
from kd_d2.prediction import PredictOptions, find_inputs, predict
from kd_d2.predictor import Category
from kd_d2.report import Listing, Picture, Section, Table, render
from kd_d2.report.sections import run_section
from kd_d2.sweep.plots import plot_ap
from kd_d2.sweep.table import Row, as_csv, as_markdown
from kd_d2.text import csv_text, file_stem, folder_name, keep_controls_out_of_logs, label, printable

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from helpers import make_coco
from PIL import Image

pytestmark = pytest.mark.unit

NAMES = [
    "<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "</pre></details><h1>x", "{{ 7 * 7 }}", "&lt;b&gt;", "\x1b[2J\x1b[31mred", "a\nb",
    "a\r\nINFO: forged", "../../etc/passwd", "..", "/etc/passwd", "a\\b", "con\x00trol", "a" * 10_000, "\U0001f600" * 200, r"$\frac{$", "=cmd()", "@sum", "-1+1",
    "a|b", "<!-- end of the table -->", "\u2028", "\ud800", "", " ", ".hidden", "`x`",
]  # fmt: skip
PLAIN = [f"name {number}" for number in range(len(NAMES))]


class _Structure(HTMLParser):
    """Parser that records the elements of a page, with the names of their attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, *(name for name, _ in attrs), *(value for name, value in attrs if name == "href")))

    def handle_endtag(self, tag: str) -> None:
        self.elements.append(("/", tag))

    def handle_comment(self, data: str) -> None:
        self.elements.append(("comment", data))


def _page(names: list[str], picture: Path) -> str:
    sections = [
        Section(
            name, [name], [Table([name, name], [[name, name]], name), Picture(str(picture), name), Listing(name, name)]
        )
        for name in names
    ]
    return render("".join(names), sections, dict.fromkeys(names, "1"))


def test_a_page(tmp_path: Path) -> None:
    """Check that a page with hostile names has the same elements as one with plain names."""
    picture = tmp_path / "picture.png"
    Image.new("RGB", (4, 4)).save(picture)
    names = [name if name else "empty" for name in NAMES]
    page = _page(names, picture)
    assert _Structure(page).elements == _Structure(_page(PLAIN, picture)).elements
    page.encode()
    assert not any(ord(c) < 32 and c not in "\n\t" for c in page)


def test_the_section_of_a_run(tmp_path: Path) -> None:
    """Check a report of results for hostile class names, from a folder with a hostile name."""
    sections = {}
    for kind, names in (("plain", PLAIN), ("hostile", NAMES)):
        folder = tmp_path / (kind if kind == "plain" else "<b>\x1b[31m\n")
        folder.mkdir()
        (folder / "config.yaml").write_text("SEED: 1\n")
        (folder / "metrics.json").write_text('{"iteration": 0, "total_loss": 1.0}\n')
        scores = {"AP": 1.0, **{f"AP-{name}": 1.0 for name in names}}
        (folder / "train.json").write_text(json.dumps({"bbox": scores}))
        sections[kind] = _Structure(render("page", [run_section(str(folder), str(tmp_path))], {})).elements
    assert sections["hostile"] == sections["plain"]


def _errors(tmp_path: Path) -> ErrorAnalysis:
    truth = json.loads(make_coco(tmp_path / "data", 4, classes=tuple(PLAIN)).read_text())
    detections = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.5}
        for a in truth["annotations"]
    ]
    for category, name in zip(truth["categories"], NAMES, strict=True):
        category["name"] = name
    curves = analyze_errors(truth, detections, None, 1)
    return ErrorAnalysis({}, {"<title>\x1b[31m": curves}, draw_classes=True)


def test_error_analysis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that each class has its own file in the folder `classes` and, like all together, four rows in the table."""
    drawn = []
    monkeypatch.setattr("kd_d2.analysis.errors.plots.save_figure", lambda figure, path: drawn.append(Path(path)))
    found = _errors(tmp_path)
    (curves,) = found.curves.values()
    found.models = {"=title": type("", (), {"overall": curves.areas(), "classes": {n: curves.areas(n) for n in NAMES}})}
    found.draw(str(tmp_path))
    classes = [path for path in drawn if path.parent == tmp_path / "classes"]
    assert len(classes) == len(set(classes)) == len(NAMES) and len(drawn) == len(NAMES) + 3
    for path in classes:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with open(tmp_path / "errors.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 1 + 4 * (len(NAMES) + 1)
    assert not any(cell.startswith(("=", "@", "-1+")) for row in rows for cell in row)


def test_csv_by_hand() -> None:
    rows = [["=1+1", "-0.5", "+x", "@a", 3, None], ["a,b", 'say "x"', "l1\nl2", "\x1b[0m", "nan", "-inf"]]
    assert csv_text(rows) == '\'=1+1,-0.5,\'+x,\'@a,3,\n"a,b","say ""x""","l1\nl2",\\x1b[0m,nan,-inf\n'


def test_names_of_files_by_hand(tmp_path: Path) -> None:
    """Check that ordinary names are unchanged, and that all others become different files in their folder."""
    for name in ("traffic light", "Ampel (rot)", "\u4fe1\u53f7", "a.b", ".hidden"):
        assert file_stem(name) == name
    stems = {file_stem(name) for name in NAMES}
    assert len(stems) == len(NAMES)
    for stem in stems:
        path = tmp_path / f"00-{stem}.png"
        assert path.resolve().parent == tmp_path
        path.touch()
    assert file_stem("a/b") == "a-b-c14cddc0"
    assert picture_name({"file_name": "x/" + "y" * 250 + ".jpg"}).startswith("y" * 200 + "-")
    for name in NAMES:
        assert (tmp_path / folder_name(name)).resolve().parent == tmp_path
        (tmp_path / folder_name(name)).mkdir(exist_ok=True)


class _Detector:
    """A detector that finds an object of each class in every image."""

    input_format = "RGB"
    categories = [Category(number, name) for number, name in enumerate(NAMES, 1)]

    def detect(self, images: list[np.ndarray]) -> list[Instances]:
        found = Instances(images[0].shape[:2])
        found.pred_boxes = Boxes(torch.tensor([[2.0, 2.0, 20.0, 20.0]]).repeat(len(NAMES), 1))
        found.scores, found.pred_classes = torch.full((len(NAMES),), 0.9), torch.arange(len(NAMES))
        return [found] * len(images)


def test_prediction(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check files with hostile names: drawings are in the output folder, the log has a line each, the JSON is valid."""
    caplog.set_level(logging.INFO, "kd_d2")
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (tmp_path / "before").mkdir()
    names = [
        "<b>.png",
        "\x1b[31m.png",
        "a\nb.png",
        "a...png",
        "x" * 251 + ".png",
        "x" * 251 + ".bmp",
        "=a.png",
        "\udcff.png",
    ]
    for name in names:
        with open(folder / name, "wb") as file:
            Image.new("RGB", (24, 24)).save(file, "PNG")
    predict(_Detector(), find_inputs([str(folder)]), str(output), {}, PredictOptions())
    tree = json.loads((output / "detections.json").read_text())
    assert [c["name"] for c in tree["categories"]] == NAMES
    drawings = [entry["drawing"] for entry in tree["images"]]
    assert len(set(drawings)) == len(names)
    assert {path.name for path in output.iterdir()} == {*drawings, "detections.json"}
    lines = [record.message for record in caplog.records if "detections" in record.message]
    assert len(lines) == len(names) + 1 and all(line.isprintable() for line in lines)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "before"}


def test_pictures(tmp_path: Path) -> None:
    """Check that hostile labels and titles do not change the size of the pictures."""
    image = np.zeros((64, 64, 3), np.uint8)
    (found,) = _Detector().detect([image])
    assert draw_instances(image, found, NAMES).shape == draw_instances(image, found, PLAIN).shape
    assert {titled(image, name).shape for name in NAMES} == {titled(image, "x").shape}


def _rows(names: list[str]) -> list[Row]:
    return [
        Row(f"cell{number}", name, {c: [1.0] for c in ("AP", "AP50", "AP75", "APs", "APm", "APl")}, {})
        for number, name in enumerate(names)
    ]


def test_a_sweep(tmp_path: Path) -> None:
    """Check the tables in Markdown and CSV, and a plot, of trainings with hostile titles."""
    lines = as_markdown(_rows(NAMES)).splitlines()
    assert len(lines) == len(NAMES) + 2
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert not any("<" in line for line in lines)
    assert len(as_csv(_rows(NAMES)).splitlines()) == len(NAMES) + 1
    plot_ap(_rows(NAMES), str(tmp_path / "hostile.png"))
    plot_ap(_rows(PLAIN), str(tmp_path / "plain.png"))
    with Image.open(tmp_path / "hostile.png") as hostile, Image.open(tmp_path / "plain.png") as plain:
        assert hostile.size == plain.size


def test_what_is_printed() -> None:
    class Shown(Analysis):
        name, title, file = "shown", "Shown", "shown.json"

        @classmethod
        def run(cls, models, output):
            return cls()

        def tables(self) -> list[Table]:
            return [Table(NAMES, [NAMES])]

    lines = Shown().summary().splitlines()
    assert len(lines) == 3 and all(line.isprintable() for line in lines)


def test_logs(capsys: pytest.CaptureFixture) -> None:
    """Check that Detectron2's own colors are kept, and that other control characters are escaped."""
    before = logging.getLogRecordFactory()
    keep_controls_out_of_logs()
    handler = logging.StreamHandler(sys.stdout)
    try:
        for name in ("kd_d2.x", "detectron2.x"):
            logger = logging.getLogger(name)
            logger.addHandler(handler)
            logger.error("\x1b[36mtable\n\tof %s\x1b[0m \ud800", "\x1b[2J\x07name")
            logger.removeHandler(handler)
    finally:
        logging.setLogRecordFactory(before)
    ours, detectron2 = capsys.readouterr().out.split("\\ud800\n")[:2]
    assert ours == "\\x1b[36mtable\n\tof \\x1b[2J\\x07name\\x1b[0m "
    assert detectron2 == "\x1b[36mtable\n\tof \\x1b[2J\\x07name\x1b[0m "


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "a" * 201, "\x00", "\ud800"])
def test_class_names_that_are_refused(tmp_path: Path, name: str) -> None:
    path = make_coco(tmp_path)
    tree = json.loads(path.read_text())
    tree["categories"][0]["name"] = name
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError) as caught:
        check_coco_json(str(path), str(path.parent / "images"))
    assert str(caught.value).startswith(
        f"{path}: the category 1 has a name with control characters or more than 200 characters ({label(name)}"
    )
    assert str(caught.value).isprintable()


def test_one_line_by_hand() -> None:
    assert printable("a\nb\x1b[0m\u202e") == "a\\nb\\x1b[0m\\u202e"
    assert label("a" * 100) == "a" * 40 + " ... " + "a" * 40
