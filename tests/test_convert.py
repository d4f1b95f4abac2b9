"""kd-d2 convert: every format to COCO JSON with the same boxes, and the messages for broken or ambiguous data."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

from kd_d2.cli import main
from kd_d2.cli.convert import FORMATS as OFFERED
from kd_d2.config import load_config
from kd_d2.data import check_coco_json
from kd_d2.data.convert import FORMATS, ConvertOptions, SplitFile, convert
from kd_d2.data.convert import formats as formats_module
from kd_d2.data.convert import source as source_module
from kd_d2.data.convert.conversion import _config
from kd_d2.data.convert.labels import REMEDY
from kd_d2.errors import UserError

import pytest
import yaml
from helpers import CLASSES, make_coco
from PIL import Image
from test_readme import example

pytestmark = pytest.mark.unit

Tree = dict[str, list[dict]]


def picture(path: Path, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def voc_object(name: str, *corners: float, more: str = "") -> str:
    sides = "".join(f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), corners))
    return f"<object><name>{escape(name)}</name>{more}<bndbox>{sides}</bndbox></object>"


def voc_xml(filename: str, *objects: str, size: tuple[int, int] | None = (40, 30)) -> str:
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    return f"<annotation><filename>{escape(filename)}</filename>{sides}{''.join(objects)}</annotation>"


def run(folder: Path, format: str | None = None, **options: object) -> dict[str, Tree]:
    """Convert a folder, check that the written files need no repairs, and return their content by split."""
    result = convert(str(folder), str(folder.parent / "out"), format, ConvertOptions(**options), overwrite=True)
    for split in result.splits.values():
        assert check_coco_json(split.file, split.folder).repairs == []
    return {name: json.loads(Path(split.file).read_text()) for name, split in result.splits.items()}


def notes(folder: Path, format: str | None = None, **options: object) -> list[str]:
    """Return a conversion's notes on what was dropped or reinterpreted, without the folder and the examples."""
    result = convert(str(folder), str(folder.parent / "out"), format, ConvertOptions(**options), overwrite=True)
    return [note.removeprefix(f"{folder}: ").partition("; the first")[0] + ")" for note in result.notes]


def refusal(folder: Path, format: str | None = None, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        convert(str(folder), str(folder.parent / "refused"), format, ConvertOptions(**options))
    assert not (folder.parent / "refused").exists()
    return str(caught.value).replace(f"{folder}{os.sep}", "").replace(str(folder), "IN_FOLDER")


def boxes(tree: Tree) -> dict[str, list[tuple[str, list[float]]]]:
    """Return the sorted boxes of each image, by the stem of its file name."""
    name_of = {category["id"]: category["name"] for category in tree["categories"]}
    found: dict[str, list] = {Path(image["file_name"]).stem: [] for image in tree["images"]}
    stem_of = {image["id"]: Path(image["file_name"]).stem for image in tree["images"]}
    for annotation in tree["annotations"]:
        found[stem_of[annotation["image_id"]]].append((name_of[annotation["category_id"]], annotation["bbox"]))
    return {stem: sorted(entries) for stem, entries in found.items()}


# ------------------------------------------------------------------------------------------ round trips


class Written:
    """A COCO dataset of six images, to be written in another format; the third image has no objects."""

    def __init__(self, folder: Path):
        path = make_coco(folder / "coco", 6)
        self.tree = json.loads(path.read_text())
        self.images = path.parent / "images"
        self.root = folder / "set"
        self.name_of = {category["id"]: category["name"] for category in self.tree["categories"]}

    def objects(self, image: dict) -> list[tuple[str, list[float]]]:
        return [
            (self.name_of[a["category_id"]], a["bbox"])
            for a in self.tree["annotations"]
            if a["image_id"] == image["id"]
        ]

    def put(self, image: dict, folder: str) -> None:
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        (self.root / folder / image["file_name"]).hardlink_to(self.images / image["file_name"])


def as_voc(written: Written) -> None:
    for image in written.tree["images"]:
        written.put(image, "JPEGImages")
        objects = [voc_object(name, x + 1, y + 1, x + w, y + h) for name, (x, y, w, h) in written.objects(image)]
        content = voc_xml(image["file_name"], *objects, size=(image["width"], image["height"]))
        text(written.root / "Annotations" / f"{Path(image['file_name']).stem}.xml", content)


def as_yolo(written: Written) -> None:
    text(written.root / "data.yaml", yaml.safe_dump({"train": "images", "names": list(CLASSES)}))
    for image in written.tree["images"]:
        written.put(image, "images")
        width, height = image["width"], image["height"]
        lines = [
            f"{CLASSES.index(name)} {(x + w / 2) / width:.6f} {(y + h / 2) / height:.6f} {w / width:.6f} {h / height:.6f}"
            for name, (x, y, w, h) in written.objects(image)
        ]
        text(written.root / "labels" / f"{Path(image['file_name']).stem}.txt", "\n".join(lines))


def as_labelme(written: Written) -> None:
    for number, image in enumerate(written.tree["images"]):
        written.put(image, ".")
        shapes = [
            {"label": name, "shape_type": "rectangle", "points": [[x + w, y], [x, y + h]]}
            if number % 2
            else {"label": name, "shape_type": "polygon", "points": [[x, y], [x + w, y + h / 2], [x + w / 2, y + h]]}
            for name, (x, y, w, h) in written.objects(image)
        ]
        tree = {"shapes": shapes, "imagePath": f"..\\photos\\{image['file_name']}", "imageData": "AAAA"}
        tree |= {"imageWidth": image["width"], "imageHeight": image["height"]}
        text(written.root / f"{Path(image['file_name']).stem}.json", json.dumps(tree))


def as_cvat(written: Written) -> None:
    nodes = []
    for number, image in enumerate(written.tree["images"]):
        written.put(image, "images")
        shapes = [
            f'<box label="{name}" xtl="{x}" ytl="{y}" xbr="{x + w}" ybr="{y + h}"/>'
            if number % 2
            else f'<polygon label="{name}" points="{x},{y};{x + w},{y};{x + w},{y + h}"/>'
            for name, (x, y, w, h) in written.objects(image)
        ]
        size = f'width="{image["width"]}" height="{image["height"]}"'
        nodes.append(f'<image id="{number}" name="photos/{image["file_name"]}" {size}>{"".join(shapes)}</image>')
    labels = "".join(f"<label><name>{name}</name></label>" for name in CLASSES)
    text(
        written.root / "annotations.xml",
        f"<annotations><version>1.1</version><meta><job><labels>{labels}</labels></job></meta>{''.join(nodes)}</annotations>",
    )


def as_open_images(written: Written) -> None:
    rows = []
    for image in written.tree["images"]:
        written.put(image, "images")
        width, height = image["width"], image["height"]
        for name, (x, y, w, h) in written.objects(image):
            row = {"ImageID": Path(image["file_name"]).stem, "LabelName": f"/m/{name}", "IsGroupOf": "0"}
            row |= {"XMin": x / width, "XMax": (x + w) / width, "YMin": y / height, "YMax": (y + h) / height}
            rows.append(row)
    text(written.root / "class-descriptions.csv", "".join(f"/m/{name},{name}\n" for name in CLASSES))
    with open(written.root / "boxes.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def as_coco(written: Written) -> None:
    for image in written.tree["images"]:
        written.put(image, "images")
    text(written.root / "annotations" / "instances.json", json.dumps(written.tree))


WRITERS = {
    "voc": as_voc, "yolo": as_yolo, "labelme": as_labelme, "cvat": as_cvat, "openimages": as_open_images, "coco": as_coco
}  # fmt: skip


def test_every_format_is_tested_and_offered() -> None:
    assert tuple(FORMATS) == tuple(WRITERS) == OFFERED


@pytest.mark.parametrize("format", WRITERS)
def test_round_trip(tmp_path: Path, format: str) -> None:
    """Check that the format is detected, and that all its images are found, with boxes exact to half a pixel."""
    written = Written(tmp_path)
    WRITERS[format](written)
    (tree,) = run(written.root).values()
    expected, found = boxes(written.tree), boxes(tree)
    if format == "openimages":  # an image without objects has no row
        assert expected.pop("002") == []
    assert found.keys() == expected.keys()
    for stem, entries in expected.items():
        assert [name for name, _ in found[stem]] == [name for name, _ in entries]
        for (_, box), (_, wanted) in zip(found[stem], entries):
            assert box == pytest.approx(wanted, abs=0.5)
    in_order = format in ("yolo", "cvat", "coco")
    assert [category["name"] for category in tree["categories"]] == (list(CLASSES) if in_order else sorted(CLASSES))


def test_what_is_printed_trains(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Check the counts of a handmade dataset, and that the written config refers to the right files and images."""
    root = tmp_path / "Cats & Dogs"
    for split, name in (("train", "a"), ("train", "b"), ("valid", "a")):
        picture(root / split / f"{name}.jpg")
    text(root / "train/a.xml", voc_xml("a.jpg", voc_object("cat", 1, 1, 10, 20), voc_object("dog", 5, 5, 9, 9)))
    text(root / "train/b.xml", voc_xml("b.jpg"))
    text(root / "valid/a.xml", voc_xml("a.jpg", voc_object("dog", 2, 3, 40, 30)))
    main(["convert", str(root), str(tmp_path / "out")])
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    assert f"train: 2 images, 1 of them without boxes; 2 boxes: {out}/train.json" in printed
    assert "the first: train/a.xml: its object 1)." in printed
    assert f"valid: 1 images, 0 of them without boxes; 1 boxes: {out}/valid.json" in printed
    assert [line.split("|")[1:4] for line in printed.splitlines() if line.startswith("| cat")] == [
        [" cat                 ", "       1 ", "       0 "]
    ]
    assert "coordinates read as 1-based, as Pascal VOC defines them (--first-pixel 0 if not) (3; the first:" in printed
    assert (out / "datasets.yaml").read_text().rstrip() in printed
    config = text(tmp_path / "my.yaml", "_BASE_: [tiny/retinanet-student, out/datasets.yaml]\n")
    cfg = load_config(str(config))
    assert cfg.DATASETS.TRAIN == ("cats_dogs_train",) and cfg.DATASETS.TEST == ("cats_dogs_valid",)
    assert cfg.DATASETS.COCO_JSON[1] == ["cats_dogs_valid", f"{out}/valid.json", str(root)]
    tree = json.loads((out / "valid.json").read_text())
    assert tree["annotations"] == [
        {"id": 1, "image_id": 1, "category_id": 2, "bbox": [1, 2, 39, 28], "area": 1092, "iscrowd": 0}
    ]
    assert tree["images"] == [{"id": 1, "file_name": "valid/a.jpg", "width": 40, "height": 30}]


def test_the_configs_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the guide's YAML of at most ten lines configures a distillation on a converted dataset."""
    written = Written(tmp_path)
    as_voc(written)
    monkeypatch.chdir(tmp_path)
    main(["convert", str(written.root), "coco", "--val-share", "0.4"])
    for name in ("resnet18.pth", "output/teacher/model_final.pth"):
        text(tmp_path / name, "")
    lines = 0
    for name in ("teacher", "student"):
        content = example(name, "docs/guides/published-data.md")
        text(tmp_path / f"{name}.yaml", content)
        lines += len([line for line in content.splitlines() if not line.startswith("#")])
    assert lines <= 10
    cfg = load_config("student.yaml")
    assert cfg.MODEL.META_ARCHITECTURE == "KDMetaArch" and len(CLASSES) == cfg.MODEL.RETINANET.NUM_CLASSES
    assert str(tmp_path / "teacher.yaml") == cfg.MODEL.KD.TEACHER.CONFIG_FILE
    assert cfg.DATASETS.TRAIN == load_config("teacher.yaml").DATASETS.TRAIN == ("set_train",)
    assert cfg.DATASETS.TEST == ("set_val",)


# -------------------------------------------------------------------------------------------- Pascal VOC


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """Create VOC's layout with five images, four of which are in the lists of ImageSets/Main."""
    root = tmp_path / "VOC2007"
    for number in range(1, 6):
        picture(root / "JPEGImages" / f"{number:06d}.jpg")
        text(root / "Annotations" / f"{number:06d}.xml", voc_xml(f"{number:06d}.jpg", voc_object("cow", 1, 1, 9, 9)))
    text(root / "ImageSets/Main/train.txt", "000001\n000002\n")
    text(root / "ImageSets/Main/val.txt", "000003\n000003\n")
    text(root / "ImageSets/Main/trainval.txt", "000001\n000002\n000003\n000004")
    text(root / "ImageSets/Main/cow_train.txt", "000001  1\n000002 -1\n")
    text(root / "ImageSets/Layout/train.txt", "000001 1\n")
    return root


def test_the_devkit(devkit: Path) -> None:
    """Check that splits are read from the image lists, not from the class lists."""
    trees = run(devkit)
    assert {split: sorted(boxes(tree)) for split, tree in trees.items()} == {
        "train": ["000001", "000002"],
        "trainval": ["000001", "000002", "000003", "000004"],
        "val": ["000003"],
    }
    assert boxes(trees["trainval"])["000001"] == boxes(trees["train"])["000001"] == [("cow", [0, 0, 9, 9])]
    assert notes(devkit) == [
        "duplicate entries of val.txt dropped (1)",
        "labels that are in no list of ImageSets/Main dropped (1)",
        "coordinates read as 1-based, as Pascal VOC defines them (--first-pixel 0 if not) (4)",
        "images without labels or in no split dropped (1)",
    ]


def test_images_and_masks_of_the_same_name(devkit: Path) -> None:
    """Check that masks, even those with the suffix of the images, are not images, and that a <filename> is enough."""
    expected = run(devkit)
    for folder in ("SegmentationClass", "SegmentationObject"):
        picture(devkit / folder / "000001.png")
    picture(devkit / "SegmentationClass/000002.jpg")
    picture(devkit / "depth/000003.png")
    assert run(devkit) == expected
    assert "segmentation masks not read as images (3)" in notes(devkit)
    text(devkit / "Annotations/000003.xml", voc_xml("", voc_object("cow", 1, 1, 9, 9)))
    assert refusal(devkit).startswith("The image 000003 may be JPEGImages/000003.jpg or depth/000003.png in IN_FOLDER")


def test_lists_of_names_with_spaces(devkit: Path) -> None:
    """Check that they are not mistaken for lists of a single class."""
    picture(devkit / "JPEGImages/brown cow.jpg")
    text(devkit / "Annotations/brown cow.xml", voc_xml("brown cow.jpg", voc_object("cow", 1, 1, 9, 9)))
    text(devkit / "ImageSets/Main/val.txt", "000003\nbrown cow\n")
    assert sorted(boxes(run(devkit)["val"])) == ["000003", "brown cow"]


def test_lists_of_file_names(devkit: Path) -> None:
    """Check names of images, one of them repeated without its suffix, and one whose label file has the suffix, too."""
    text(devkit / "ImageSets/Main/val.txt", "000003.jpg\n000004.JPG\n000003\n000005.jpg\n")
    (devkit / "Annotations/000005.xml").rename(devkit / "Annotations/000005.jpg.xml")
    tree = run(devkit)["val"]
    assert [Path(image["file_name"]).stem for image in tree["images"]] == ["000003", "000004", "000005"]


def test_lists_of_the_devkit_that_do_not_fit(devkit: Path) -> None:
    text(devkit / "ImageSets/Main/test.txt", "../../etc/passwd\n")
    assert refusal(devkit) == (
        "IN_FOLDER: ImageSets/Main/test.txt lists ../../etc/passwd, which has no label file: remove the list if its "
        "labels are not published, or the entry, or pass --unlabelled keep if it has no objects."
    )
    text(devkit / "ImageSets/Main/test.txt", "000005\n")
    (devkit / "Annotations/000005.xml").unlink()
    assert "lists 000005, which has no label file" in refusal(devkit)
    assert boxes(run(devkit, unlabelled="keep")["test"]) == {"000005": []}


def test_a_broken_file_of_the_devkit_counts_once(devkit: Path) -> None:
    text(devkit / "Annotations/000001.xml", "<annotation>")
    assert "unreadable entries dropped (1)" in notes(devkit, drop_broken=True)
    assert {split: len(tree["images"]) for split, tree in run(devkit, drop_broken=True).items()} == {
        "train": 1, "trainval": 3, "val": 1
    }  # fmt: skip


def test_two_devkits(devkit: Path) -> None:
    both = devkit.parent / "both"
    both.mkdir()
    devkit.rename(both / "VOC2007")
    text(both / "VOC2012/ImageSets/Main/train.txt", "000001\n")
    assert refusal(both) == "IN: IN_FOLDER contains several datasets, VOC2007 and VOC2012: convert them one at a time."


def voc_of(tmp_path: Path, *objects: str, **keywords: object) -> Path:
    root = tmp_path / "set"
    picture(root / "images/a.jpg")
    text(root / "xml/a.xml", voc_xml("a.jpg", *objects, **keywords))
    return root


@pytest.mark.parametrize(
    ("first_pixel", "corners", "expected"),
    [
        (None, (1, 1, 10, 20), [0, 0, 10, 20]),
        (None, (0, 5, 10, 20), [0, 5, 10, 15]),  # pixel 0 exists only in 0-based coordinates
        (0, (1, 1, 10, 20), [1, 1, 9, 19]),
        (1, (1, 1, 40, 30), [0, 0, 40, 30]),
        (None, (2.5, 3.25, 10, 20), [1.5, 2.25, 8.5, 17.75]),
    ],
)
def test_the_first_pixel(tmp_path: Path, first_pixel: int | None, corners: tuple, expected: list[float]) -> None:
    (tree,) = run(voc_of(tmp_path, voc_object("a", *corners)), first_pixel=first_pixel).values()
    assert tree["annotations"][0]["bbox"] == expected


def test_difficult_boxes(tmp_path: Path) -> None:
    marked = voc_object("a", 1, 1, 9, 9, more="<difficult>1</difficult>")
    root = voc_of(tmp_path, marked, voc_object("a", 3, 3, 20, 20, more="<difficult>0</difficult>"))
    crowds = {
        choice: [a["iscrowd"] for a in run(root, difficult=choice)["all"]["annotations"]]
        for choice in ("crowd", "keep", "drop")
    }
    assert crowds == {"crowd": [1, 0], "keep": [0, 0], "drop": [0]}
    assert notes(root)[1:] == ["difficult boxes marked as crowd, which is ignored in training and evaluation (1)"]
    assert notes(root, difficult="drop")[1:] == ["difficult boxes dropped (1)"]


def test_difficult_in_words_and_coordinates_to_a_thousandth(tmp_path: Path) -> None:
    marked = voc_object("a", 1.23456, 2, 9.5, 9, more="<difficult>True</difficult>")
    (annotation,) = run(voc_of(tmp_path, marked), first_pixel=0)["all"]["annotations"]
    assert annotation["iscrowd"] == 1 and annotation["bbox"] == [1.235, 2, 8.265, 7]
    assert annotation["area"] == 57.855


def test_sets_of_the_config_are_train_and_val_before_test() -> None:
    splits = {
        name: SplitFile(f"set_{name}", f"{name}.json", "set", images=1, empty=0, boxes={"a": 1}, crowds=0)
        for name in ("test2017", "train2017", "val2017")
    }
    lines = _config(splits).splitlines()
    assert "  TRAIN: [set_train2017]" in lines and "  TEST: [set_val2017]" in lines
    del splits["val2017"]
    assert "  TEST: [set_test2017]" in _config(splits).splitlines()


def test_boxes_that_are_cut_and_dropped(tmp_path: Path) -> None:
    root = voc_of(
        tmp_path,
        voc_object("a", -8, 5, 10, 20),
        voc_object("a", 10, 20, 60, 40),
        voc_object("a", 50, 5, 60, 20),
        voc_object("a", 7, 5, 7, 20),
        voc_object("b", 5, 5, 9, 9),
        voc_object("b", 5, 5, 9, 9),
    )
    (tree,) = run(root).values()
    assert [a["bbox"] for a in tree["annotations"]] == [[0, 5, 10, 15], [10, 20, 30, 10], [5, 5, 4, 4]]
    assert notes(root) == [
        "boxes that start at 0, so all coordinates are read as 0-based (1)",
        "boxes clipped to their image (3)",
        "boxes without area dropped (2)",
        "duplicate boxes dropped (1)",
    ]


def test_images_of_voc_are_found_by_what_is_right(tmp_path: Path) -> None:
    """Check a file name without suffix, the name of an image that was renamed, nested folders, and sizes of 0."""
    root = tmp_path / "set"
    for name in ("sub/x/a.png", "sub/y/b.JPEG", "c.jpg"):
        picture(root / name)
    text(root / "xml/sub/x/a.xml", voc_xml("a", voc_object("k", 1, 1, 9, 9), size=(0, 0)))
    text(root / "xml/sub/y/b.xml", voc_xml("IMG_0001.jpg", voc_object("k", 1, 1, 9, 9), size=None))
    text(root / "xml/c.xml", voc_xml("/home/me/c.jpg", voc_object("k", 1, 1, 9, 9)))
    (tree,) = run(root).values()
    assert [image["file_name"] for image in tree["images"]] == ["c.jpg", "sub/x/a.png", "sub/y/b.JPEG"]


def test_images_of_one_name_in_folders_like_those_of_their_labels(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for number, folder in enumerate(("a", "b"), 1):
        picture(root / "images" / folder / "0.jpg")
        text(root / "labels" / folder / "0.xml", voc_xml("0.jpg", voc_object("k", 1, 1, 9, number)))
    (tree,) = run(root).values()
    assert [image["file_name"] for image in tree["images"]] == ["images/a/0.jpg", "images/b/0.jpg"]
    assert [a["bbox"] for a in tree["annotations"]] == [[0, 0, 9, 1], [0, 0, 9, 2]]
    (root / "labels/a").rename(root / "labels/c")
    assert refusal(root).startswith("The image 0.jpg may be images/a/0.jpg or images/b/0.jpg in IN_FOLDER")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("<annotation>", "xml/a.xml is not readable XML: no element found: line 1, column 12."),
        ("<html></html>", "xml/a.xml is not in Pascal VOC's format: its root is 'html', not 'annotation'."),
        (voc_xml("b.jpg"), "xml/a.xml says that its image is b.jpg, but its own name matches images/a.jpg: rename it, or correct its <filename>."),
        (voc_xml("a.jpg", size=(30, 40)), "xml/a.xml says that its image has 30 x 40 pixels, but images/a.jpg has 40 x 30 (EXIF orientation applied): correct it, or pass --drop-broken to skip unreadable entries."),
        (voc_xml("a.jpg", "<object><name>k</name></object>"), "xml/a.xml: its object 1 is not a valid box (Syntax error in imagenet annotation format): correct it, or pass --drop-broken to skip unreadable entries."),
        (voc_xml("a.jpg", voc_object("k", 1, 1, 9, 9), voc_object("k", 9, 1, 5, 9)), "xml/a.xml: its object 2 is not a valid box (`xmax` must be greater than `xmin`): correct it, or pass --drop-broken to skip unreadable entries."),
        (voc_xml("a.jpg", voc_object("k", 1, 1, float("inf"), 9)), "xml/a.xml: its object 1 has the corners (1.0, 1.0, inf, 9.0), which are not all finite: correct it, or pass --drop-broken to skip unreadable entries."),
        (voc_xml("a.jpg", voc_object(" ", 1, 1, 9, 9)), "xml/a.xml: its object 1 has no class: correct it, or pass --drop-broken to skip unreadable entries."),
    ],
)  # fmt: skip
def test_broken_files_of_voc(tmp_path: Path, content: str, sentence: str) -> None:
    """Check the message, and that --drop-broken drops only that entry."""
    root = voc_of(tmp_path)
    picture(root / "images/b.jpg")
    picture(root / "images/good.jpg")
    text(root / "xml/a.xml", content)
    text(root / "xml/good.xml", voc_xml("good.jpg", voc_object("k", 2, 2, 9, 9)))
    assert refusal(root, "voc") == sentence
    (tree,) = run(root, "voc", drop_broken=True).values()
    assert boxes(tree)["good"] == [("k", [1, 1, 8, 8])]
    assert "unreadable entries dropped (1)" in notes(root, "voc", drop_broken=True)


def test_two_labels_of_one_image(tmp_path: Path) -> None:
    root = voc_of(tmp_path, voc_object("k", 1, 1, 9, 9))
    text(root / "more/a.xml", voc_xml("a.jpg", voc_object("k", 1, 1, 9, 9)))
    assert refusal(root) == "The image images/a.jpg has two labels, more/a.xml and xml/a.xml: remove one."


def test_entities_and_huge_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check entities that would fill the memory, in two encodings, one that reads a local file, and a 1 KiB limit."""
    root = voc_of(tmp_path)
    laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 12))
    bomb = f'<!DOCTYPE a [<!ENTITY l0 "ha">{laughs}]><annotation><filename>&l11;</filename></annotation>'
    for encoding in ("utf-8", "utf-16"):
        (root / "xml/a.xml").write_bytes(bomb.encode(encoding))
        assert (
            refusal(root, "voc") == "xml/a.xml declares the entity 'l0', which labels do not need: remove its DOCTYPE."
        )
    text(
        root / "xml/a.xml",
        '<!DOCTYPE a [<!ENTITY f SYSTEM "file:///etc/passwd">]><annotation><filename>&f;</filename></annotation>',
    )
    assert "declares the entity 'f'" in refusal(root, "voc")
    monkeypatch.setattr(source_module, "LARGEST_FILE", 2**10)
    text(root / "xml/a.xml", voc_xml("a.jpg" + " " * 2**10))
    assert "xml/a.xml is not a regular file of at most 0 MiB." in refusal(root, "voc")


# ------------------------------------------------------------------------------------------------- YOLO


def yolo_of(tmp_path: Path, *lines: str, description: str = "names: [cat, dog]") -> Path:
    root = tmp_path / "set"
    picture(root / "images/a.jpg")
    text(root / "labels/a.txt", "\n".join(lines))
    text(root / "data.yaml", description)
    return root


def test_lines_of_yolo(tmp_path: Path) -> None:
    """Check a box, a class written as a float, an empty line, a score, a polygon and a rotated box, all by hand."""
    lines = [
        "0 0.5 0.5 0.5 0.2",
        "1.0e+00 0.25 0.5 0.5 1.0",
        "",
        "1 0.5 0.5 0.1 0.1 0.87",
        "0 0.1 0.2 0.3 0.2 0.3 0.4",
        "1 0.5 0.1 0.9 0.5 0.5 0.9 0.1 0.5",
    ]
    root = yolo_of(tmp_path, *lines)
    (tree,) = run(root).values()
    assert [(a["category_id"], a["bbox"]) for a in tree["annotations"]] == [
        (1, [10, 12, 20, 6]), (2, [0, 0, 20, 30]), (2, [18, 13.5, 4, 3]), (1, [4, 6, 8, 6]), (2, [4, 3, 32, 24])
    ]  # fmt: skip
    assert notes(root) == [
        "scores of boxes dropped (1)",
        "outlines and rotated boxes converted to their bounding boxes (2)",
    ]


def test_label_files_of_yolo_with_an_upper_case_suffix(tmp_path: Path) -> None:
    root = yolo_of(tmp_path, "0 0.5 0.5 0.5 0.2")
    (root / "labels/a.txt").rename(root / "labels/a.TXT")
    assert boxes(run(root)["all"]) == {"a": [("cat", [10, 12, 20, 6])]}


@pytest.mark.parametrize("style", ["names: [{}]", "{{names: {{0: {}, 1: {}, 2: {}, 03: {}, 4: {}, 5: {}}}}}"])
def test_names_of_yolo_are_those_written(tmp_path: Path, style: str) -> None:
    """Check names that YAML reads as a truth value, numbers, an hour or a date."""
    names = ["no", "007", "1:30", "1_000", "2.0", "2020-01-01"]
    description = style.format(", ".join(names)) if "[" in style else style.format(*names)
    (tree,) = run(yolo_of(tmp_path, "0 0.5 0.5 0.5 0.2", description=description)).values()
    assert [category["name"] for category in tree["categories"]] == names


@pytest.mark.parametrize("score", ["", " 0.9"])
def test_keypoints_of_yolo(tmp_path: Path, score: str) -> None:
    """Check lines with keypoints, of which a third of the numbers are visibilities, without and with a score."""
    line = f"0 0.5 0.5 0.5 0.2 0.4 0.4 2 0.6 0.6 2 0.5 0.5 2{score}"
    root = yolo_of(tmp_path, line, description="{names: [a], kpt_shape: [3, 3]}")
    assert [a["bbox"] for a in run(root)["all"]["annotations"]] == [[10, 12, 20, 6]]
    assert notes(root) == [*(["scores of boxes dropped (1)"] if score else []), "keypoints dropped (1)"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("0 0.5 0.5 0.1", "labels/a.txt: its line 2 is not a valid box (Syntax error in yolo_seg annotation file"),
        ("0 0.5 0.5 x 0.1", "labels/a.txt: its line 2 is not a valid box (Syntax error in txt annotation file)"),
        ("0 0.5 0.5 -0.1 0.1", "labels/a.txt: its line 2 is not a valid box (`xmax` must be greater than `xmin`)"),
        ("0 nan 0.5 0.1 0.1", "labels/a.txt: its line 2 is not a valid box"),
        ("0 20 15 10 8", "labels/a.txt: its line 2 has a number above 2, but YOLO's are fractions of the image"),
        ("2 0.5 0.5 0.1 0.1", "labels/a.txt: its line 2 has class 2, but data.yaml has the classes 0 to 1: add its name there"),
        ("cat 0.5 0.5 0.1 0.1", "labels/a.txt: its line 2 has class cat, but data.yaml"),
    ],
)  # fmt: skip
def test_broken_lines_of_yolo(tmp_path: Path, line: str, sentence: str) -> None:
    root = yolo_of(tmp_path, "0 0.5 0.5 0.5 0.2", line)
    assert refusal(root).startswith(sentence)
    assert len(run(root, drop_broken=True)["all"]["annotations"]) == 1


@pytest.mark.parametrize(
    "description",
    [
        "{train: ../train/images, val: ../valid/images, names: [x]}",  # Roboflow
        "{path: ../datasets/mine, train: train/images, val: valid/images, names: {0: x}}",  # Ultralytics
        "{train: /content/mine/train/images, val: [/content/mine/valid/images], names: [x]}",  # from another machine
        "{train: train.txt, val: lists/val.txt, names: [x]}",
        "{names: [x]}",  # from the folder names
    ],
)
def test_splits_of_yolo(tmp_path: Path, description: str) -> None:
    """Check the ways to name splits, images with several suffixes, and one without a label file."""
    root = tmp_path / "set"
    for name in ("train/images/a.jpg", "train/images/deep/b.png", "valid/images/a.webp", "valid/images/c.jpg"):
        picture(root / name)
        if "c.jpg" not in name:
            text((root / name.replace("images", "labels")).with_suffix(".txt"), "0 0.5 0.5 0.5 0.5\n")
    text(root / "train.txt", "./train/images/a.jpg\n/other/machine/train/images/deep/b.png\n")
    text(root / "lists/val.txt", "../valid/images/a.webp\nvalid/images/c.jpg\n")
    text(root / "data.yaml", description)
    text(root / "README.roboflow.txt", "This dataset was exported via roboflow.com")
    trees = run(root)
    assert [boxes(tree) for tree in trees.values()] == [
        {"a": [("x", [10, 7.5, 20, 15])], "b": [("x", [10, 7.5, 20, 15])]},
        {"a": [("x", [10, 7.5, 20, 15])], "c": []},
    ]
    assert notes(root) == ["images without a label file read as images without objects (1)"]
    if "valid" in trees or "val" in trees:
        assert [len(tree["images"]) for tree in run(root, unlabelled="drop").values()] == [2, 1]


def test_yolo_labels_of_images_in_a_folder_images_in_another(tmp_path: Path) -> None:
    """Check that the last folder `images` of a path is replaced by `labels`, as in Ultralytics, if both have labels."""
    root = tmp_path / "set"
    picture(root / "images/mine/images/a.jpg")
    text(root / "images/mine/labels/a.txt", "0 0.5 0.5 0.5 0.5\n  \n")  # the last line has only spaces
    text(root / "labels/mine/images/a.txt", "0 0.5 0.5 0.1 0.1\n")
    text(root / "data.yaml", "{train: images/mine/images, names: [x]}")
    (tree,) = run(root).values()
    assert boxes(tree) == {"a": [("x", [10, 7.5, 20, 15])]}


@pytest.mark.parametrize(
    ("description", "sentence"),
    [
        ("nc: 2", "IN: IN_FOLDER has no data.yaml with class names: create one, such as 'names: [cat, dog]'."),
        ("names: []", "data.yaml has no class names, or an empty one; each class needs a name."),
        ("names: ['']", "data.yaml has no class names, or an empty one; each class needs a name."),
        ("names: 3", "data.yaml: its names must be a list, or map numbers to names, such as '0: cat'."),
        ("names: {cat: 0}", "data.yaml: its names must be a list, or map numbers to names, such as '0: cat'."),
        ("names: [[cat]]", "data.yaml: its names must be a list, or map numbers to names, such as '0: cat'."),
        ("names: [cat, cat]", "data.yaml: two classes are named 'cat'; class names must be unique."),
        ("names: [", "data.yaml is not plain yaml: while parsing a flow node"),
        ("{names: [a], train: ../nowhere}", "data.yaml: its images for train are not in IN_FOLDER: ../nowhere; correct the path."),
        ("{names: [a], train: /etc}", "data.yaml: its images for train are not in IN_FOLDER: /etc; correct the path."),
        ("{names: [a], train: ../train/images, val: ../valid/images}", "data.yaml: its images for train are not in IN_FOLDER: ../train/images; correct the path."),
        ("{names: [a], train: x/images, val: /y/images}", "data.yaml: its images for train, x/images, and for val, /y/images, would both be images; correct the paths."),
        ("{names: [a], train: ../../..}", "data.yaml: its images for train are not in IN_FOLDER"),
    ],
)  # fmt: skip
def test_descriptions_of_yolo_that_do_not_fit(tmp_path: Path, description: str, sentence: str) -> None:
    assert refusal(yolo_of(tmp_path, "0 0.5 0.5 0.5 0.2", description=description), "yolo").startswith(sentence)


def test_splits_of_yolo_that_are_not_there_or_the_same(tmp_path: Path) -> None:
    """Check that a missing folder of a split is not replaced by one above it, and that one folder may be named twice."""
    lines = "0 0.5 0.5 0.5 0.2"
    root = yolo_of(tmp_path, lines, description="{names: [a], train: images, val: ../valid/images}")
    assert run(root).keys() == {"train"}
    assert notes(root) == ["splits of the yaml file without images skipped (1)"]
    yolo_of(tmp_path, lines, description="{names: [a], train: ../set/images, val: set/images}")
    train, val = run(root).values()
    assert train == val


def test_a_list_of_names_in_place_of_a_yaml(tmp_path: Path) -> None:
    """Check the output of labelImg: labels next to the images, and classes.txt."""
    root = tmp_path / "set"
    picture(root / "a.jpg")
    text(root / "a.txt", "1 0.5 0.5 0.5 0.2")
    text(root / "classes.txt", "cat\ndog\n")
    (tree,) = run(root).values()
    assert boxes(tree) == {"a": [("dog", [10, 12, 20, 6])]}
    assert [category["name"] for category in tree["categories"]] == ["cat", "dog"]


def test_names_of_the_darknet_export_of_roboflow(tmp_path: Path) -> None:
    """Check that each split has its own list of names, and that different lists are refused."""
    root = tmp_path / "set"
    for split in ("train", "valid"):
        picture(root / split / "a.jpg")
        text(root / split / "a.txt", "1 0.5 0.5 0.5 0.2")
        text(root / split / "_darknet.labels", "cat\ndog")
    train, valid = run(root).values()
    assert boxes(train) == boxes(valid) == {"a": [("dog", [10, 12, 20, 6])]}
    text(root / "valid" / "_darknet.labels", "dog\ncat")
    assert refusal(root) == (
        "IN: train/_darknet.labels and valid/_darknet.labels list different classes: convert the folder of one dataset."
    )


# -------------------------------------------------------------------------- LabelMe, CVAT, Open Images, COCO


def labelme_of(tmp_path: Path, *shapes: object, **keys: object) -> Path:
    root = tmp_path / "set"
    picture(root / "a.jpg")
    text(root / "a.json", json.dumps({"shapes": shapes, "imagePath": "a.jpg", **keys}))
    return root


def test_shapes_of_labelme(tmp_path: Path) -> None:
    """Check groups, shape types without a box, old files without a shape type, and a difficult object."""
    root = labelme_of(
        tmp_path,
        {"label": "a", "shape_type": "rectangle", "points": [[1, 2], [5, 6]], "group_id": 1},
        {"label": "a", "shape_type": "polygon", "points": [[8, 8], [9, 12], [10, 9]], "group_id": 1},
        {"label": "b", "shape_type": "rectangle", "points": [[1, 2], [5, 6]], "group_id": 1, "difficult": True},
        {"label": "c", "shape_type": "circle", "points": [[1, 2], [5, 6]]},
        {"label": "a", "points": [[20, 20], [30, 20], [30, 25]]},
    )
    (tree,) = run(root).values()
    assert [(a["category_id"], a["bbox"], a["iscrowd"]) for a in tree["annotations"]] == [
        (1, [1, 2, 9, 10], 0), (2, [1, 2, 4, 4], 1), (1, [20, 20, 10, 5], 0)
    ]  # fmt: skip
    assert notes(root)[:3] == [
        "outlines converted to their bounding boxes (2)",
        "shapes with the same group_id merged into one object (1)",
        "shapes without a box dropped, such as points, lines and circles (1)",
    ]


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ({"label": "a", "shape_type": "rectangle"}, "a.json: its shape 1 is not a valid box (Syntax error in labelme annotation file)"),
        ({"shape_type": "rectangle", "points": [[1, 2], [3, 4]]}, "a.json: its shape 1 is not a valid box"),
        ({"label": "a", "shape_type": "polygon", "points": [[1, 2], 3]}, "a.json: its shape 1 is not a valid box"),
        ("x", "a.json: its shape 1 is 'x', not a JSON object."),
    ],
)  # fmt: skip
def test_broken_shapes_of_labelme(tmp_path: Path, shape: object, sentence: str) -> None:
    root = labelme_of(tmp_path, shape, {"label": "a", "shape_type": "rectangle", "points": [[1, 2], [5, 6]]})
    assert refusal(root).startswith(sentence)
    assert len(run(root, drop_broken=True)["all"]["annotations"]) == 1


def test_hostile_names_of_images(tmp_path: Path) -> None:
    """Check that a name cannot refer to an image outside the folder."""
    picture(tmp_path / "outside.jpg")
    for name in ("../outside.jpg", str(tmp_path / "outside.jpg"), "..%2Foutside.jpg", "x\\..\\..\\outside.jpg"):
        root = labelme_of(tmp_path, imagePath=name)
        (root / "a.json").rename(root / "b.json")
        sentence = refusal(root)
        assert sentence.startswith("b.json: its image ") and sentence.endswith(
            " is not in IN_FOLDER: correct it, or pass --drop-broken to skip unreadable entries."
        )


def cvat_of(tmp_path: Path, shapes: str, image: str = 'name="a.jpg"', more: str = "") -> Path:
    root = tmp_path / "set"
    picture(root / "images/a.jpg")
    text(root / "annotations.xml", f"<annotations>{more}<image {image}>{shapes}</image></annotations>")
    return root


def test_shapes_and_subsets_of_cvat(tmp_path: Path) -> None:
    box = '<box label="b" xtl="1" ytl="2" xbr="5" ybr="6"><attribute name="x">1</attribute></box>'
    root = cvat_of(tmp_path, box + '<points label="p" points="1,2"/><tag label="t"/>', 'name="a.jpg" subset="Train"')
    assert {split: boxes(tree) for split, tree in run(root).items()} == {"train": {"a": [("b", [1, 2, 4, 4])]}}
    assert notes(root) == ["shapes without a box dropped, such as points and lines (1)"]


def test_images_of_one_name_in_subsets_of_cvat(tmp_path: Path) -> None:
    root, nodes = tmp_path / "set", ""
    for number, subset in enumerate(("Train", "Mine"), 1):
        picture(root / "images" / subset / "x/0.jpg")
        box = f'<box label="b" xtl="1" ytl="2" xbr="5" ybr="{2 + number}"/>'
        nodes += f'<image name="x/0.jpg" subset="{subset}">{box}</image>'
    text(root / "annotations.xml", f"<annotations>{nodes}</annotations>")
    trees = run(root)
    assert {split: tree["images"][0]["file_name"] for split, tree in trees.items()} == {
        "train": "images/Train/x/0.jpg", "mine": "images/Mine/x/0.jpg"
    }  # fmt: skip
    assert [tree["annotations"][0]["bbox"][3] for tree in trees.values()] == [1, 2]


def test_sublabels_of_cvat_are_no_classes(tmp_path: Path) -> None:
    """Check a label whose skeleton has points with labels of their own, which name their parent."""
    named = ["<name>b</name>", "<name>hand</name>", "<name>finger</name><parent>hand</parent>"]
    more = f"<meta><task><labels>{''.join(f'<label>{label}</label>' for label in named)}</labels></task></meta>"
    root = cvat_of(tmp_path, '<box label="b" xtl="1" ytl="2" xbr="5" ybr="6"/>', more=more)
    (tree,) = run(root).values()
    assert [category["name"] for category in tree["categories"]] == ["b", "hand"]


@pytest.mark.parametrize(
    ("shapes", "keywords", "sentence"),
    [
        ('<box label="b" xtl="1" ytl="2" xbr="5"/>', {}, "annotations.xml: the image a.jpg, its shape 1 is not a valid box (Syntax error in CVAT"),
        ('<box label="b" xtl="1" ytl="2" xbr="5" ybr="6" rotation="12.5"/>', {}, "annotations.xml: the image a.jpg, its shape 1 is a rotated box"),
        ('<polygon label="b" points="1,2;3"/>', {}, "annotations.xml: the image a.jpg, its shape 1 is not a valid box"),
        ("", {"image": 'name="../b.jpg"'}, "annotations.xml: its image ../b.jpg is not in IN_FOLDER: correct it, or pass --drop-broken"),
        ("", {"more": "<track/>"}, "annotations.xml has tracks of a video: export the task as 'CVAT for images'."),
        ('<box label="b" xtl="1" ytl="2" xbr="5" ybr="6"/>', {"image": 'name="a.jpg" subset="../../x"'}, "IN: a split is named '../../x'; only letters"),
    ],
)  # fmt: skip
def test_broken_files_of_cvat(tmp_path: Path, shapes: str, keywords: dict, sentence: str) -> None:
    assert refusal(cvat_of(tmp_path, shapes, **keywords)).startswith(sentence)


def test_open_images(tmp_path: Path) -> None:
    """Check splits by file, groups, and boxes of images that were not downloaded."""
    root = tmp_path / "set"
    for name in ("train/a.jpg", "validation/b.jpg", "validation/c.jpg"):
        picture(root / name)
    header = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsGroupOf\n"
    text(root / "train-annotations-bbox.csv", f"{header}a,x,/m/1,1,0.1,0.5,0.2,1.0,0,1\nz,x,/m/1,1,0,1,0,1,0,0\n")
    text(root / "validation-annotations-bbox.csv", f"{header}b,x,/m/2,1,0.1,0.5,0.2,1.0,0,-1\n")
    text(root / "class-descriptions-boxable.csv", '/m/1,Cat\n/m/2,"Dog, small"\n')
    trees = run(root)
    assert {split: boxes(tree) for split, tree in trees.items()} == {
        "train": {"a": [("Cat", [4, 6, 16, 24])]},
        "validation": {"b": [("Dog, small", [4, 6, 16, 24])]},
    }
    assert [tree["annotations"][0]["iscrowd"] for tree in trees.values()] == [1, 0]
    assert notes(root) == [
        "boxes of missing images dropped (1)",
        "images without labels or in no split dropped (1)",
    ]
    text(root / "train-annotations-bbox.csv", f"{header}a,x,/m/1,1,0.1,,0.2,1.0,0,1\n")
    assert refusal(root).startswith("train-annotations-bbox.csv: its line 2 is not a valid box (could not convert")


@pytest.mark.parametrize("project", ["cells", "RBC"])
def test_a_coco_export_of_roboflow(tmp_path: Path, project: str) -> None:
    """Check that the placeholder category is dropped, even if it has the name of the only class, and that splits with
    images of the same name are kept apart."""
    root = tmp_path / "set"
    categories = [
        {"id": 0, "name": project, "supercategory": "none"},
        {"id": 1, "name": "RBC", "supercategory": project},
    ]
    for split in ("train", "valid"):
        picture(root / split / "a.jpg")
        image = {"id": 0, "file_name": "a.jpg", "width": 40, "height": 30}
        box = {"id": 0, "image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}
        tree = {"images": [image], "annotations": [box], "categories": categories}
        text(root / split / "_annotations.coco.json", json.dumps(tree))
    result = convert(str(root), str(tmp_path / "out"))
    assert [(name, split.folder, split.boxes) for name, split in result.splits.items()] == [
        ("train", str(root / "train"), {"RBC": 1}),
        ("valid", str(root / "valid"), {"RBC": 1}),
    ]


def test_a_folder_without_a_coco_file(tmp_path: Path) -> None:
    picture(tmp_path / "set" / "a.jpg")
    text(tmp_path / "set" / "notes.json", "{}")
    assert refusal(tmp_path / "set", "coco") == "IN: IN_FOLDER has no json file in COCO's format; nothing is written."


def test_a_coco_file_twice(tmp_path: Path) -> None:
    """Check that a second file of a split is skipped if it has the same content, and refused otherwise."""
    written = Written(tmp_path)
    as_coco(written)
    copy = written.root / "images" / "_annotations.coco.json"
    text(copy, (written.root / "annotations" / "instances.json").read_text())
    assert boxes(run(written.root)["all"]) == boxes(written.tree)
    assert notes(written.root) == ["duplicate json files skipped (1)"]
    original = written.root / "annotations" / "instances.json"
    text(copy, original.read_text().replace("red", "rod"))
    os.utime(copy, ns=(original.stat().st_atime_ns, original.stat().st_mtime_ns))
    assert refusal(written.root).startswith(
        "IN: IN_FOLDER has several COCO files for the split all, the second is images/"
    )


def test_a_coco_file_with_the_size_before_turning(tmp_path: Path) -> None:
    """Check an image that EXIF turns, whose boxes would be misplaced: refused, and dropped with --drop-broken."""
    written = Written(tmp_path)
    as_coco(written)
    image = written.tree["images"][0]
    path = written.root / "images" / image["file_name"]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (image["width"], image["height"])).save(path, exif=exif)
    assert refusal(written.root) == (
        f"{Path('annotations/instances.json')} says that its image has {image['width']} x {image['height']} pixels, but "
        f"images/{image['file_name']} has {image['height']} x {image['width']} (EXIF orientation applied): {REMEDY}."
    )
    (tree,) = run(written.root, drop_broken=True).values()
    assert image["id"] not in {entry["id"] for entry in tree["images"]}
    assert {a["image_id"] for a in tree["annotations"]} <= {entry["id"] for entry in tree["images"]}
    assert len(tree["images"]) == len(written.tree["images"]) - 1


def test_images_that_a_coco_file_lacks(tmp_path: Path) -> None:
    """Check that --drop-broken drops missing images with their boxes, and that at least one image must exist."""
    written = Written(tmp_path)
    as_coco(written)
    absent = written.tree["images"][0]
    (written.root / "images" / absent["file_name"]).unlink()
    assert refusal(written.root) == (
        f"annotations/instances.json: 1 of 6 images are not in images, the first is {absent['file_name']}; specify their "
        "folder, or leave them out with --drop-broken."
    )
    rest = {stem: found for stem, found in boxes(written.tree).items() if stem != Path(absent["file_name"]).stem}
    assert boxes(run(written.root, drop_broken=True)["all"]) == rest
    assert notes(written.root, drop_broken=True) == ["missing images dropped (1)"]
    for image in written.tree["images"][1:]:
        (written.root / "images" / image["file_name"]).unlink()
    picture(written.root / "images" / "other.jpg")
    sentence = refusal(written.root, drop_broken=True)
    assert "6 of 6 images are not in images" in sentence and sentence.endswith("; specify their folder.")


def test_a_coco_file_with_images_in_two_folders(tmp_path: Path) -> None:
    """Check that images next to the file are found too if its folder `images` has only some of them."""
    written = Written(tmp_path)
    for number, image in enumerate(written.tree["images"]):
        written.put(image, "train/images" if number % 2 else "train")
    text(written.root / "train" / "_annotations.coco.json", json.dumps(written.tree))
    assert boxes(run(written.root)["train"]) == boxes(written.tree)
    absent = written.tree["images"][0]["file_name"]
    (written.root / "train" / absent).unlink()
    rest = {stem: found for stem, found in boxes(written.tree).items() if stem != Path(absent).stem}
    assert boxes(run(written.root, drop_broken=True)["train"]) == rest


# ------------------------------------------------------------------------------------------ any format


def test_a_share_for_validation(tmp_path: Path) -> None:
    """Check that both parts together are the whole dataset, and that the split depends on the names of images alone."""
    written = Written(tmp_path)
    as_yolo(written)
    text(written.root / "data.yaml", "names: [red, green, blue]")
    whole = boxes(run(written.root)["all"])
    parts = {split: boxes(tree) for split, tree in run(written.root, val_share=0.3).items()}
    assert {split: len(part) for split, part in parts.items()} == {"train": 4, "val": 2}
    assert parts["train"] | parts["val"] == whole
    next(
        file for file in written.root.rglob("*") if file.stem == min(parts["train"]) and file.suffix != ".txt"
    ).unlink()
    fewer = run(written.root, val_share=0.4)
    assert boxes(fewer["val"]) == parts["val"] and len(boxes(fewer["train"])) == 3
    with pytest.raises(UserError, match=r"--val-share 0\.01 of 5 images leaves no image for train or val"):
        run(written.root, val_share=0.01)
    text(written.root / "data.yaml", "{names: [red, green, blue], train: images, val: images}")
    with pytest.raises(UserError, match=r"--val-share: .* already has the splits train, val; leave it out\."):
        run(written.root, val_share=0.3)


def test_a_share_of_images_whose_names_are_not_utf8(tmp_path: Path) -> None:
    """Check names in Latin-1, as older archives have them."""
    for number in range(4):
        name = os.fsdecode(b"stra\xdfe%d" % number)
        picture(tmp_path / "set" / f"{name}.png")
        text(tmp_path / "set" / f"{name}.txt", "0 0.5 0.5 0.5 0.5")
    text(tmp_path / "set" / "classes.txt", "car")
    assert {split: len(boxes(tree)) for split, tree in run(tmp_path / "set", val_share=0.5).items()} == {
        "train": 2,
        "val": 2,
    }


def test_links_to_folders_are_named(tmp_path: Path) -> None:
    """Check that they are not followed, in a folder that has other images and in one that has none."""
    root = yolo_of(tmp_path, "0 0.5 0.5 0.5 0.2")
    picture(tmp_path / "elsewhere/b.jpg")
    (root / "images/more").symlink_to(tmp_path / "elsewhere")
    assert "links to folders not followed (1)" in notes(root)
    (root / "images/a.jpg").unlink()
    assert refusal(root) == (
        "IN: there is no image in IN_FOLDER (the link images/more to a folder is not followed); specify the folder of images and labels."
    )


def test_folders_whose_names_are_not_utf8(tmp_path: Path) -> None:
    """Check that they are refused before anything is written, as the config could not name them."""
    root = yolo_of(tmp_path, "0 0.5 0.5 0.5 0.2")
    bad = tmp_path / os.fsdecode(b"stra\xdfe")
    with pytest.raises(
        UserError, match=r"^OUT: the path .* is not UTF-8, but the config names it: rename the folder\.$"
    ):
        convert(str(root), str(bad))
    assert not bad.exists()
    assert refusal(root.rename(bad)).startswith("IN: the path ")


def test_folders_that_cannot_be_converted(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere") == "IN: there is no folder IN_FOLDER."
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refusal(empty) == "IN: there is no image in IN_FOLDER; specify the folder of images and labels."
    picture(empty / "a.jpg")
    assert refusal(empty) == (
        "IN: IN_FOLDER has no labels in any of the formats voc, yolo, labelme, cvat, openimages, coco."
    )
    text(empty / "a.xml", voc_xml("a.jpg"))
    assert refusal(empty) == "IN: no box was read in IN_FOLDER; nothing is written."
    text(empty / "a.json", json.dumps({"shapes": [], "imagePath": "a.jpg"}))
    assert refusal(empty) == "IN: IN_FOLDER may be voc or labelme: choose one with --format."
    (empty / "a.jpg").write_bytes(b"no image")
    text(empty / "a.xml", "<annotation>")
    assert refusal(empty, "voc", drop_broken=True) == (
        "IN: no box was read in IN_FOLDER (the first unreadable entry: a.xml is not readable XML: no element found: line 1, "
        "column 12); nothing is written."
    )


def test_files_that_are_there_stay(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = voc_of(tmp_path, voc_object("k", 1, 1, 9, 9))
    mine = text(root / "out/all.json", "mine")
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(root), str(root / "out")])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"error: OUT: {mine} already exists: choose another folder, or pass --overwrite.\n"
    )
    assert mine.read_text() == "mine"
    main(["convert", str(root), str(root / "out"), "--overwrite"])
    before = mine.read_text()
    main(["convert", str(root), str(root / "out"), "--overwrite"])  # OUT within IN is not read as a COCO dataset
    assert mine.read_text() == before and json.loads(before)["annotations"]


def test_an_annotation_file_of_the_input_stays(tmp_path: Path) -> None:
    """Check a COCO file that the conversion reads, also through a link to its folder, and one that Pascal VOC has not."""
    path = make_coco(tmp_path / "set", 3)
    mine = path.rename(path.with_name("train.json"))
    before = mine.read_text()
    (tmp_path / "link").symlink_to(mine.parent)
    for output in (mine.parent, tmp_path / "link"):
        with pytest.raises(UserError) as caught:
            convert(str(mine.parent), str(output), "coco", overwrite=True)
        assert str(caught.value) == f"OUT: {output / 'train.json'} would overwrite a file of IN: choose another folder."
        assert mine.read_text() == before
    root = voc_of(tmp_path, voc_object("k", 1, 1, 9, 9))
    for _ in range(2):
        convert(str(root), str(root), "voc", overwrite=True)


def test_a_conversion_into_the_folder_of_a_yolo_dataset_is_repeated(tmp_path: Path) -> None:
    """Check that datasets.yaml of the first one, which could be a file of YOLO, is replaced."""
    root = yolo_of(tmp_path, "0 0.5 0.5 0.2 0.2")
    for _ in range(2):
        convert(str(root), str(root), "yolo", overwrite=True)


def test_class_names_with_accents_in_either_form_of_unicode(tmp_path: Path) -> None:
    """Check that a class whose name has the accent as part of the letter in one file, and apart in another, is one."""
    root = voc_of(tmp_path, voc_object("caf\u00e9", 1, 1, 9, 9), voc_object("cafe\u0301", 2, 2, 9, 9))
    assert [category["name"] for category in run(root)["all"]["categories"]] == ["caf\u00e9"]


def test_names_of_detectron2s_datasets_are_avoided(tmp_path: Path) -> None:
    """Check a folder and a split whose names would give one of Detectron2's own datasets."""
    path = make_coco(tmp_path / "COCO 2017", 3)
    path.rename(path.with_name("val.json"))
    result = convert(str(path.parent), str(tmp_path / "out"))
    assert result.splits["val"].dataset == "my_coco_2017_val"
    assert "TEST: [my_coco_2017_val]" in Path(result.config).read_text()


def test_options_that_are_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, sentence in (
        (["--val-share", "1"], "--val-share is 1.0; it must be from 0 to below 1."),
        (["SEED", "1"], "kd-d2 convert takes no config overrides, such as SEED."),
    ):
        with pytest.raises(SystemExit):
            main(["convert", "a", "b", *arguments])
        assert capsys.readouterr().err == f"error: {sentence}\n"


@pytest.mark.parametrize(
    ("format", "options", "sentence"),
    [
        ("yolo", {"first_pixel": 0}, "--first-pixel has no effect for YOLO: leave it out."),
        ("cvat", {"difficult": "drop"}, "--difficult has no effect for CVAT for images: leave it out."),
        ("coco", {"difficult": "drop"}, "--difficult has no effect for COCO: leave it out."),
        (
            "voc",
            {"unlabelled": "keep", "drop_broken": True},
            "--unlabelled keep and --drop-broken cannot be combined: an image",
        ),
    ],
)
def test_options_that_do_not_fit_the_format(tmp_path: Path, format: str, options: dict, sentence: str) -> None:
    written = Written(tmp_path)
    WRITERS[format](written)
    assert refusal(written.root, **options).startswith(sentence)


def test_without_globox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the message if the package is missing, and that COCO does not need it."""
    find: Callable = importlib.util.find_spec
    monkeypatch.setattr(formats_module, "find_spec", lambda name: None if name == "globox" else find(name))
    assert refusal(voc_of(tmp_path)) == "Pascal VOC needs the package globox: pip install 'kd_d2[convert]'."
    written = Written(tmp_path / "other")
    as_coco(written)
    assert boxes(run(written.root)["all"]) == boxes(written.tree)
