"""COCO files: errors are reported before training; harmless defects are repaired, counted and reported."""

import contextlib
import io
import json
import logging
import os
import shutil
from pathlib import Path

from kd_d2.config import add_kd_config
from kd_d2.data import build_stream_loader, check_coco_json, register_coco_json
from kd_d2.data.coco import BOX_FORMATS, read_categories, read_coco
from kd_d2.data.coco.boxes import check_format, overlaps, reaches_out
from kd_d2.data.coco.segmentation import normalize_segmentation
from kd_d2.data.coco_json import ClassOrder, CocoSummary
from kd_d2.errors import UserError
from kd_d2.image_files import size_on_disk

import numpy as np
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.detection_utils import read_image
from helpers import CLASSES, clean_process, make_coco
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

pytestmark = pytest.mark.unit


class Set:
    """A COCO dataset of four images with an annotation file that tests change."""

    def __init__(self, folder: Path):
        self.json = make_coco(folder, 4)
        self.images = folder / "images"

    def change(self, code) -> None:
        tree = json.loads(self.json.read_text())
        code(tree)
        self.json.write_text(json.dumps(tree))

    def check(self):
        return check_coco_json(str(self.json), str(self.images))

    def sentence(self) -> str:
        with pytest.raises(UserError) as caught:
            self.check()
        return str(caught.value)

    def config(self, name: str = "mine") -> CfgNode:
        cfg = get_cfg()
        add_kd_config(cfg)
        cfg.DATASETS.COCO_JSON = [[name, str(self.json), str(self.images)]]
        cfg.DATASETS.TRAIN = (name,)
        cfg.SOLVER.IMS_PER_BATCH = 1
        cfg.DATALOADER.NUM_WORKERS = 0
        return cfg


@pytest.fixture
def coco(tmp_path: Path) -> Set:
    return Set(tmp_path)


@pytest.fixture(autouse=True)
def _clean():
    with clean_process():
        yield


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is not readable json: Expecting property name"),
        ("[1, 2]", "is not a COCO annotation file: it needs the lists 'images', 'annotations' and 'categories'."),
        ("3", "is not a COCO annotation file: it needs the lists"),
        ('{"images": [], "annotations": {}, "categories": []}', "is not a COCO annotation file: it needs the lists"),
        ('{"images": [], "annotations": [], "categories": []}', "has no images."),
        ("[" * 100_000, "is not readable json: "),
    ],
    ids=range(6),
)
def test_files_of_something_else(coco: Set, content: str, expected: str) -> None:
    """Check that the message names the file and what it lacks."""
    coco.json.write_text(content)
    assert coco.sentence().startswith(f"{coco.json} {expected}")


def test_binary_and_missing_files(coco: Set) -> None:
    """Check that an image given as the JSON file, and a missing file, are named."""
    coco.json.write_bytes((coco.images / "000.png").read_bytes())
    assert coco.sentence().startswith(f"{coco.json} is not readable json: 'utf-8' codec can't decode")
    coco.json.unlink()
    assert coco.sentence().startswith(f"{coco.json} is not readable json: [Errno 2] No such file")


def _set(key: str, index: int, **fields: object):
    return lambda tree: tree[key][index].update(fields)


def _drop(key: str, index: int, field: str):
    return lambda tree: tree[key][index].pop(field)


def _boxes(convert):
    """Return a change that rewrites every box with a function of its four numbers and its image's size."""

    def change(tree: dict) -> None:
        size_of = {image["id"]: (image["width"], image["height"]) for image in tree["images"]}
        for annotation in tree["annotations"]:
            annotation["bbox"] = convert(*annotation["bbox"], *size_of[annotation["image_id"]])

    return change


REFUSED = {
    "no file name": (_drop("images", 1, "file_name"), ": an image has no 'file_name': {'id': 2, "),
    "image id": (_set("images", 1, id=True), ": an entry of images has no usable id: {'id': True, "),
    "image id twice": (_set("images", 1, id="1"), ": the id 1 occurs more than once in its images; annotations refer"),
    "no categories": (lambda tree: tree.update(categories=[], annotations=[]), " has no categories: add the classes"),
    "no name": (_drop("categories", 0, "name"), ": a category has no 'name': {'id': 1}."),
    "category id twice": (
        _set("categories", 1, id=3),
        ": the id 3 occurs more than once in its categories; annotations",
    ),
    "a name twice": (
        _set("categories", 1, name="red"),
        ": the categories 1 and 2 have the same name 'red'; rename one, or give its annotations the other's id.",
    ),
    "no box": (
        _drop("annotations", 0, "bbox"),
        ": the annotation with id 1 has neither a bbox nor a segmentation: remove it, or add its bbox.",
    ),
    "no object": (lambda tree: tree["annotations"].append(7), ": its annotations contain 7; each entry must be a JSON"),
    "unknown image": (
        _set("annotations", 1, image_id=9),
        ": the annotation with id 2 refers to image 9, which is not among the file's images: remove it, or add the image.",
    ),
    "unknown category": (
        _set("annotations", 1, category_id=9),
        ": the annotation with id 2 refers to category 9, which is not among the file's categories: add it there.",
    ),
    "ignore": (_set("annotations", 1, ignore=1), ": the annotation with id 2 has 'ignore' set, which Detectron2 does"),
    "crowd": (
        _set("annotations", 1, iscrowd="many"),
        ": the annotation with id 2 has iscrowd 'many'; it must be 0 or 1.",
    ),
    "three numbers": (
        _set("annotations", 1, bbox=[1, 2, 3]),
        ": the annotation with id 2 has the bbox [1, 2, 3]; it must be four finite numbers [x, y, width, height].",
    ),
    "a word": (
        _set("annotations", 1, bbox=[1, 2, 3, "a"]),
        ": the annotation with id 2 has the bbox [1, 2, 3, 'a']; it",
    ),
    "nan": (
        _set("annotations", 1, bbox=[1, 2, 3, float("nan")]),
        ": the annotation with id 2 has the bbox [1, 2, 3, nan]",
    ),
    "corners": (
        _boxes(lambda x, y, w, h, *size: [x, y, x + w, y + h]),
        ": 3 of its 4 boxes end outside their image, such as [",
    ),
    "fractions": (
        _boxes(lambda x, y, w, h, width, height: [x / width, y / height, w / width, h / height]),
        ": all its boxes are between 0 and 1, such as [0.52",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_ambiguous_is_refused(coco: Set, case: str) -> None:
    """Check that the message names the file, and the wrong entry or boxes."""
    change, expected = REFUSED[case]
    coco.check()
    coco.change(change)
    assert coco.sentence().startswith(f"{coco.json}{expected}")


def test_more_annotations_than_an_image_may_have(coco: Set) -> None:
    """Check the maximum of 10,000 annotations, and one more."""

    def fill(count: int) -> None:
        boxes = ([n % 50, n // 50 % 20, 10 + n // 1000, 12] for n in range(count))
        entries = [{"id": n + 1, "image_id": 2, "category_id": 1, "bbox": box} for n, box in enumerate(boxes)]
        coco.change(lambda tree: tree.update(annotations=entries))

    fill(10_000)
    assert coco.check().boxes == 10_000
    fill(10_001)
    assert coco.sentence() == (
        f"{coco.json}: the image 001.png has 10001 annotations, more than 10000: split it into tiles."
    )


@pytest.mark.parametrize("value", [[10, 10, "visible"], ["x", None, 2], {"nose": [1, 2]}, "none", 5, None])
def test_keypoints_that_detectron2_cannot_read_are_left_out(coco: Set, value: object) -> None:
    """Check that Detectron2's reader reads the boxes, and that numeric keypoints are kept."""
    coco.change(lambda tree: [a.update(keypoints=value if a["id"] == 1 else [1, 2, 2]) for a in tree["annotations"]])
    with clean_process():
        register_coco_json(coco.config())
        annotations = [a for image in DatasetCatalog.get("mine") for a in image["annotations"]]
    assert "keypoints" not in annotations[0]
    assert len(annotations) > 2 and all(a["keypoints"] == [1.5, 2.5, 2] for a in annotations[1:])


def test_images_that_are_not_on_disk(coco: Set) -> None:
    """Check that missing images are counted and the first is named."""
    (coco.images / "001.png").unlink()
    (coco.images / "003.png").unlink()
    assert coco.sentence() == (
        f"{coco.json}: 2 of 4 images are not in {coco.images}, the first is 001.png; specify their folder."
    )


def _each(key: str, field: str, convert):
    def change(tree: dict) -> None:
        for number, entry in enumerate(tree[key]):
            entry[field] = convert(entry.get(field), number)

    return change


def _all(*changes):
    return lambda tree: [change(tree) for change in changes]


def _without(key: str, *fields: str):
    return lambda tree: [entry.pop(field, None) for entry in tree[key] for field in fields]


def _ids_of_text(tree: dict) -> None:
    _each("images", "id", lambda value, _: f"image-{value}")(tree)
    _each("annotations", "image_id", lambda value, _: f"image-{value}")(tree)


def _roboflow(tree: dict) -> None:
    tree["categories"] = [{"id": 0, "name": "colors", "supercategory": "none"}] + [
        {**category, "supercategory": "colors"} for category in tree["categories"]
    ]


def _lvis(tree: dict) -> None:
    for image in tree["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image.pop('file_name')}"


ACCEPTED = {
    "sizes left out": (
        _without("images", "width", "height"),
        "image sizes read from the image files (4; the first: 000.png)",
    ),
    "sizes of zero": (_each("images", "width", lambda *_: 0), "image sizes read from the image files (4"),
    "sizes as text": (
        _each("images", "width", lambda value, _: str(value)),
        "image sizes read as whole numbers (4; the",
    ),
    "ids as floats": (
        _all(
            _each("images", "id", lambda value, _: float(value)),
            _each("categories", "id", lambda value, _: float(value)),
        ),
        "ids of images read as whole numbers (4; the first: 1.0)",
    ),
    "references as text": (
        _each("annotations", "category_id", lambda value, _: str(value)),
        "references read as whole numbers (4; the first: category_id '2')",
    ),
    "huge ids of images": (
        _all(
            _each("images", "id", lambda value, _: 2**62 + value),
            _each("annotations", "image_id", lambda value, _: 2**62 + value),
        ),
        "images numbered from 1 because ids are too large (1; the first: 4611686018427387905)",
    ),
    "huge ids of categories": (
        _all(
            _each("categories", "id", lambda value, _: 2**62 + value),
            _each("annotations", "category_id", lambda value, _: 2**62 + value),
            lambda tree: tree["categories"].reverse(),
        ),
        "categories numbered from 1 because ids are too large (1; the first: 4611686018427387907)",
    ),
    "ids of text": (_ids_of_text, "images numbered from 1 because ids are text (1; the first: 'image-1')"),
    "no annotation ids": (
        _without("annotations", "id"),
        "annotations numbered from 1 because an id is missing, repeated",
    ),
    "negative ids": (
        _each("annotations", "id", lambda _, n: n - 9),
        "annotations numbered from 1 because an id is missing",
    ),
    "an id of zero": (
        _each("annotations", "id", lambda _, n: n),
        "annotations numbered from 1 because an id is missing",
    ),
    "huge ids": (
        _each("annotations", "id", lambda _, n: 2**63 + n),
        "annotations numbered from 1 because an id is missing",
    ),
    "ids twice": (_each("annotations", "id", lambda *_: 3), "annotations numbered from 1 because an id is missing"),
    "backslashes": (
        _each("images", "file_name", lambda name, _: f"..\\images\\{name}"),
        "images found under another name (4; the first: ..\\images\\000.png is 000.png)",
    ),
    "a folder": (_each("images", "file_name", lambda name, _: f"val/{name}"), "images found under another name (4"),
    "an upload prefix": (
        _each("images", "file_name", lambda name, _: f"/data/upload/3/1b2c3d4e-{name}"),
        "images found under another name (4",
    ),
    "a URL": (
        _each("images", "file_name", lambda name, _: f"https://host/a%20b/{name}?token=7"),
        "images found under another name (4",
    ),
    "local files": (
        _each("images", "file_name", lambda name, _: f"/data/local-files/?d=set%2F{name}"),
        "images found under another name (4",
    ),
    "letter case": (_each("images", "file_name", lambda name, _: name.upper()), "images found under another name (4"),
    "another format": (
        _each("images", "file_name", lambda name, _: name.replace("png", "jpeg")),
        "images found under another name (4",
    ),
    "LVIS": (_lvis, "images found under another name (4"),
    "Roboflow": (_roboflow, "placeholder categories without boxes dropped (1; the first: 'colors')"),
    "background": (
        lambda tree: tree["categories"].insert(0, {"id": 0, "name": "__background__"}),
        "placeholder categories without boxes dropped (1; the first: '__background__')",
    ),
    "every annotation twice": (
        lambda tree: tree["annotations"].extend([{**a, "id": a["id"] + 10} for a in tree["annotations"]]),
        "duplicate annotations dropped (4; the first: annotation with id 11 of image 1)",
    ),
    "a box without area": (
        lambda tree: tree["annotations"].append(
            {"id": 9, "image_id": 3, "category_id": 1, "bbox": [5, 5, 0, 9], "area": 0, "iscrowd": 0}
        ),
        "boxes without area dropped (1; the first: annotation with id 9, bbox [5, 5, 0, 9])",
    ),
    "boxes outside their image": (
        lambda tree: tree["annotations"].extend(
            {"id": 9 + i, "image_id": 3, "category_id": 1, "bbox": box, "area": 81, "iscrowd": 0}
            for i, box in enumerate([[500, 5, 9, 9], [5, -9, 9, 9]])
        ),
        "boxes outside their image dropped (2; the first: annotation with id 9, bbox [500, 5, 9, 9])",
    ),
    "boxes as text": (
        _each("annotations", "bbox", lambda box, _: [str(v) for v in box]),
        "box coordinates read from text (4; the first: annotation with id 1, ['50', ",
    ),
    "boxes of polygons": (
        lambda tree: [
            a.update(segmentation=[[x, y, x + w, y, x + w, y + h]])
            for a in tree["annotations"]
            for x, y, w, h in [a.pop("bbox")]
        ],
        "boxes computed from segmentations (4; the first: annotation with id 1)",
    ),
    "iscrowd null": (
        _each("annotations", "iscrowd", lambda *_: None),
        "iscrowd read as 0 or 1 (4; the first: annotation",
    ),
    "iscrowd false": (
        _each("annotations", "iscrowd", lambda *_: False),
        "iscrowd read as 0 or 1 (4; the first: annotation",
    ),
    "area null": (
        _each("annotations", "area", lambda *_: None),
        "areas computed from boxes (4; the first: annotation with id 1",
    ),
    # Training on boxes only does not use segmentations, so their defects are not reported.
    "flat polygons": (_each("annotations", "segmentation", lambda *_: [1, 2, 3, 4, 5, 6]), None),
    "short polygons": (_each("annotations", "segmentation", lambda *_: [[1, 2], [3, 4, 5, 6]]), None),
    "run lengths without size": (_each("annotations", "segmentation", lambda *_: {"counts": [6144]}), None),
    "run lengths of nonsense": (
        _each("annotations", "segmentation", lambda *_: {"counts": "zzzz", "size": [9, 9]}),
        None,
    ),
    "empty segmentations": (_each("annotations", "segmentation", lambda *_: []), None),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_unambiguous_is_repaired(coco: Set, case: str, caplog: pytest.LogCaptureFixture) -> None:
    """Check that training and evaluation read the content of the original file, and that repairs are logged once."""
    cfg = coco.config()
    register_coco_json(cfg)
    wanted, truth = _records("mine"), _truth("mine")
    DatasetCatalog.remove("mine")
    MetadataCatalog.remove("mine")
    change, expected = ACCEPTED[case]
    coco.change(change)
    with caplog.at_level(logging.WARNING, "kd_d2"):
        register_coco_json(cfg)
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith(f"{coco.json}: {expected}") for line in said) if expected else not said, said
    assert len(said) == len(set(said)) <= 3
    assert _records("mine") == wanted
    assert MetadataCatalog.get("mine").thing_classes == list(CLASSES)
    assert _truth("mine") == truth


def _records(name: str) -> list[dict]:
    """Return Detectron2's dictionaries without segmentations, which training on boxes does not use."""
    return [
        {**d, "annotations": [{k: v for k, v in a.items() if k != "segmentation"} for a in d["annotations"]]}
        for d in DatasetCatalog.get(name)
    ]


def _truth(name: str) -> list[tuple]:
    """Return id, image, category, box, area and crowd flag of each annotation, as the evaluators read them."""
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    with contextlib.redirect_stdout(io.StringIO()):
        tree = COCO(MetadataCatalog.get(name).json_file)
    return [tuple(a[key] for key in keys) for a in tree.anns.values()]


def test_a_clean_file_is_read_as_it_is_and_a_repaired_one_from_the_cache(coco: Set) -> None:
    """Check that the user's folder is unchanged, and that a repaired file is written to the cache folder."""
    cfg = coco.config()
    register_coco_json(cfg)
    assert MetadataCatalog.get("mine").json_file == str(coco.json)
    DatasetCatalog.remove("mine")
    MetadataCatalog.remove("mine")
    coco.json.write_bytes(b"\xef\xbb\xbf" + coco.json.read_bytes())
    before = {path: path.read_bytes() for path in coco.json.parent.rglob("*") if path.is_file()}
    register_coco_json(cfg)
    clean = Path(MetadataCatalog.get("mine").json_file)
    assert clean.parent == Path(os.environ["XDG_CACHE_HOME"]) / "kd_d2" / "annotations"
    assert json.loads(clean.read_text()) == json.loads(coco.json.read_text(encoding="utf-8-sig"))
    assert {path: path.read_bytes() for path in coco.json.parent.rglob("*") if path.is_file()} == before
    written = clean.read_bytes()
    clean.write_bytes(b"\xff" * len(written))  # not what its name stands for
    DatasetCatalog.remove("mine")
    MetadataCatalog.remove("mine")
    register_coco_json(cfg)
    assert clean.read_bytes() == written


def test_a_crowd_with_the_box_of_an_object_is_no_duplicate(coco: Set) -> None:
    boxes = coco.check().boxes
    coco.change(lambda tree: tree["annotations"].append({**tree["annotations"][0], "id": 99, "iscrowd": 1}))
    assert (coco.check().boxes, coco.check().repairs) == (boxes + 1, [])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings(coco: Set, encoding: str) -> None:
    """Check that other encodings are read, and that Detectron2 reads a copy in UTF-8."""
    register_coco_json(coco.config())
    expected = _records("mine")
    coco.json.write_text(coco.json.read_text(), encoding=encoding)
    register_coco_json(coco.config())
    assert MetadataCatalog.get("mine").json_file != str(coco.json)
    assert _records("mine") == expected


def test_images_whose_names_may_mean_several_files(coco: Set) -> None:
    """Check that two files of one name, and two entries for one file, are refused; a folder in the name decides."""
    for folder in ("a", "b"):
        (coco.images / folder).mkdir()
        shutil.copy(coco.images / "000.png", coco.images / folder / "same.png")
    coco.change(_set("images", 0, file_name="c/Same.png"))
    assert coco.sentence() == (
        f"The image c/Same.png may be a/same.png or b/same.png in {coco.images}: use the right one as its file name, "
        "or remove the other."
    )
    coco.change(_set("images", 0, file_name="export/b/Same.png"))
    assert coco.check().repairs == [
        f"{coco.json}: images found under another name (1; the first: export/b/Same.png is b/same.png)."
    ]
    coco.change(_set("images", 1, file_name="b/same.png"))
    assert coco.sentence() == (
        f"{coco.json}: the images export/b/Same.png and b/same.png both match b/same.png in {coco.images}."
    )


def test_an_image_twice(coco: Set) -> None:
    """Check that annotations of the second entry of a file become those of the first, as for one entry."""
    register_coco_json(coco.config())
    expected = _records("mine")

    def repeat(tree: dict) -> None:
        tree["images"].append({**tree["images"][1], "id": 9})
        next(a for a in tree["annotations"] if a["image_id"] == 2)["image_id"] = 9

    coco.change(repeat)
    assert coco.check().repairs == [
        f"{coco.json}: repeated images merged with the first (1; the first: 001.png with id 9)."
    ]
    register_coco_json(coco.config())
    assert _records("mine") == expected


def test_ids_of_text_that_are_equal_numbers(coco: Set) -> None:
    """Check "1", "01", "001" and "0001"; the annotations are those of the same images."""
    register_coco_json(coco.config())
    expected = _records("mine")
    text_of = {number: f"{1:0{number}d}" for number in range(1, 5)}

    def write(tree: dict) -> None:
        for image in tree["images"]:
            image["id"] = text_of[image["id"]]
        for annotation in tree["annotations"]:
            annotation["image_id"] = text_of[annotation["image_id"]]

    coco.change(write)
    register_coco_json(coco.config())
    assert _records("mine") == expected


def test_a_category_that_is_the_supercategory_of_others(coco: Set) -> None:
    """Check that it is a class if it has annotations, even if they are not read, or if the file has none."""
    coco.change(lambda tree: [category.update(supercategory="red") for category in tree["categories"][1:]])

    def classes() -> list[list[str]]:
        path, images = str(coco.json), str(coco.images)
        data = [read_coco(path, images, annotated=annotated).class_names for annotated in (True, False)]
        return [*data, [category["name"] for category in read_categories(path)]]

    assert classes() == [list(CLASSES)] * 3
    coco.change(lambda tree: [a.update(bbox=[1, 1, 0, 0]) for a in tree["annotations"] if a["category_id"] == 1])
    assert classes() == [list(CLASSES)] * 3
    coco.change(lambda tree: [a.update(category_id=2) for a in tree["annotations"]])
    assert classes() == [list(CLASSES[1:])] * 3
    coco.change(lambda tree: tree.update(annotations=[]))
    assert classes() == [list(CLASSES)] * 3


def test_the_root_category_of_roboflow_in_a_file_without_annotations(coco: Set) -> None:
    """Check that it is dropped in a file for pseudo-labels, unless it is not above all others."""
    coco.change(lambda tree: (_roboflow(tree), tree.update(annotations=[])))

    def classes() -> list[list[str]]:
        data = [read_coco(str(coco.json), str(coco.images), annotated=annotated) for annotated in (True, False)]
        return [read.class_names for read in data]

    assert classes() == [list(CLASSES)] * 2
    for other in ("none", ["colors"]):
        coco.change(lambda tree, other=other: tree["categories"][-1].update(supercategory=other))
        assert classes() == [["colors", *CLASSES]] * 2


def test_the_size_of_a_turned_image_is_that_of_the_upright_one(coco: Set) -> None:
    """Check a JPEG whose EXIF orientation swaps its sides, as Detectron2 reads it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (50, 20)).save(coco.images / "turned.jpg", exif=exif)
    assert (
        size_on_disk(str(coco.images / "turned.jpg"))
        == read_image(str(coco.images / "turned.jpg")).shape[1::-1]
        == (20, 50)
    )


def _with_masks(tree: dict) -> None:
    for annotation in tree["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]


def _polygon(convert):
    return _all(_with_masks, lambda tree: tree["annotations"][1].update(segmentation=convert(tree["annotations"][1])))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            _polygon(lambda a: a["segmentation"][0]),
            "segmentations read as lists of polygons, or with their image's size (1",
        ),
        (
            _polygon(lambda a: [*a["segmentation"], [1, 2, 3, 4]]),
            "segmentations read as lists of polygons, or with their",
        ),
        (
            _polygon(lambda a: {"counts": [0, 6144]}),
            "segmentations read as lists of polygons, or with their image's size (1",
        ),
        (
            _polygon(lambda a: [[1, 2]]),
            "annotations without a polygon of three points dropped (1; the first: annotation with id 2",
        ),
    ],
    ids=["flat polygon", "one polygon too short", "run lengths without size", "all polygons too short"],
)
def test_masks_that_are_trained(coco: Set, change, expected: str) -> None:
    """Check that segmentations are kept and converted to Detectron2's form if MODEL.MASK_ON is set."""
    coco.change(change)
    data = read_coco(str(coco.json), str(coco.images), masks=True)
    assert next(line.partition(": ")[2] for line in data.repairs.sentences()).startswith(expected)
    x, y, w, h = [12, 32, 30, 25] if "dropped" in expected else data.tree["annotations"][1]["bbox"]
    outline = data.tree["annotations"][1]["segmentation"]
    assert outline in ([[x, y, x + w, y, x + w, y + h, x, y + h]], {"counts": [0, 6144], "size": [96, 64]})


@pytest.mark.parametrize(
    ("convert", "expected"),
    [
        (lambda a: [], "has no segmentation, which MODEL.MASK_ON needs; set MODEL.MASK_ON False to train on boxes"),
        (
            lambda a: {"counts": [9]},
            "has run lengths that do not fit its image of 64 x 96 pixels: {'counts': [9]}; export",
        ),
        (
            lambda a: {"counts": "01", "size": [96, 64]},
            "has run lengths that do not fit its image of 64 x 96 pixels: ",
        ),
    ],
)
def test_masks_that_cannot_be_trained(coco: Set, convert, expected: str) -> None:
    coco.change(_polygon(convert))
    with pytest.raises(UserError) as caught:
        read_coco(str(coco.json), str(coco.images), masks=True)
    assert str(caught.value).startswith(f"{coco.json}: the annotation with id 2 {expected}")


def test_compressed_run_lengths_are_measured_as_pycocotools_does(coco: Set) -> None:
    """Check that masks encoded by pycocotools are unchanged if their lengths fill the image, and refused otherwise."""
    random = np.random.RandomState(0)
    for _ in range(20):
        height, width = random.randint(1, 70, 2)
        mask = np.asfortranarray(random.rand(height, width) > random.rand(), np.uint8)
        encoded = mask_util.encode(mask)
        encoded["counts"] = encoded["counts"].decode()
        assert normalize_segmentation(encoded, height, width) == {**encoded, "size": [height, width]}
        assert normalize_segmentation({"counts": encoded["counts"]}, height + 1, width) is None


@pytest.mark.parametrize("form", [form for form in BOX_FORMATS if form != "xywh"])
def test_other_forms_of_boxes(coco: Set, form: str) -> None:
    """Check that a file converted to each format, by its definition, is read with the original boxes and areas."""
    wanted = read_coco(str(coco.json), str(coco.images)).tree["annotations"]

    def rewrite(x, y, w, h, width, height):
        numbers = {"xywh": (x, y, w, h), "xyxy": (x, y, x + w, y + h), "cxcywh": (x + w / 2, y + h / 2, w, h)}
        scale = (width, height) * 2 if form.startswith("relative") else (1, 1, 1, 1)
        return [number / side for number, side in zip(numbers[form.rpartition("-")[2]], scale)]

    coco.change(_boxes(rewrite))
    coco.change(lambda tree: [a.update(area=0.25) for a in tree["annotations"]])  # of a box in another format
    found = read_coco(str(coco.json), str(coco.images), boxes=form).tree["annotations"]
    assert [a["bbox"] for a in found] == [pytest.approx(a["bbox"]) for a in wanted]
    assert [a["area"] for a in found] == [pytest.approx(a["area"]) for a in wanted]


def test_boxes_beyond_their_image_are_counted_and_clipped(coco: Set, caplog: pytest.LogCaptureFixture) -> None:
    """Check the count, the warning, and that training clips boxes; none is refused, as not all would fit as corners."""
    boxes = [
        [-30, -5, 400, 20],
        [-30, 5, 50, 20],
        [5, 40, 20, 90],
        [-1, -1, 20, 20],
    ]  # the last one is within tolerance

    def replace(tree: dict) -> None:
        tree["annotations"] = [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "iscrowd": 0} for i, box in enumerate(boxes, 1)
        ]
        tree["images"] = tree["images"][:1]

    coco.change(replace)
    assert coco.check() == CocoSummary(1, 4, list(CLASSES), 3, [])
    cfg = coco.config()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (64,), "none"
    with caplog.at_level(logging.WARNING):
        register_coco_json(cfg)
    assert [r.getMessage() for r in caplog.records] == ["mine: 3 boxes extend beyond their image; training clips them."]
    instances = next(iter(build_stream_loader(cfg, seed=0)))[0]["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[0, 0, 96, 15], [0, 5, 20, 25], [5, 40, 25, 64], [0, 0, 19, 19]]


@pytest.mark.parametrize("by_detectron2", [False, True])
def test_whole_numbers_in_an_image_of_half_the_size(coco: Set, by_detectron2: bool) -> None:
    """Check that boxes and polygons keep the fractions of resized coordinates, also of a dataset from elsewhere."""
    outline = [51, 11, 80, 11, 80, 39]

    def replace(tree: dict) -> None:
        annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [51, 11, 30, 28], "iscrowd": 0}
        tree.update(annotations=[{**annotation, "segmentation": [outline]}], images=tree["images"][:1])

    coco.change(replace)
    cfg = coco.config()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP, cfg.MODEL.MASK_ON = (32,), "none", True
    if by_detectron2:
        name, *files = cfg.DATASETS.COCO_JSON[0]
        register_coco_instances(name, {}, *files)
    else:
        register_coco_json(cfg)
    instances = next(iter(build_stream_loader(cfg, seed=0)))[0]["instances"]
    assert instances.image_size == (32, 48)
    assert instances.gt_boxes.tensor.tolist() == [[25.5, 5.5, 40.5, 19.5]]
    assert instances.gt_masks.polygons[0][0].tolist() == [x / 2 for x in outline]


def test_registration(coco: Set) -> None:
    """Check names, classes in the order of their ids, and that only datasets in TRAIN or TEST are registered."""
    coco.change(lambda tree: tree.update(categories=tree["categories"][::-1]))
    cfg = coco.config()
    cfg.DATASETS.COCO_JSON.append(["unused", "gone.json", "gone"])
    register_coco_json(cfg)
    assert "unused" not in DatasetCatalog.list()
    assert MetadataCatalog.get("mine").thing_classes == list(CLASSES)
    assert [len(d["annotations"]) for d in DatasetCatalog.get("mine")] == [1, 2, 0, 1]
    register_coco_json(cfg)  # a second program in this process


def test_a_file_that_changes(coco: Set) -> None:
    """Check that a second program in this process reads the new content."""
    register_coco_json(coco.config())
    before = [a["category_id"] for d in DatasetCatalog.get("mine") for a in d["annotations"]]
    coco.change(_reversed_categories)
    register_coco_json(coco.config())
    assert MetadataCatalog.get("mine").thing_classes == list(CLASSES[::-1])
    assert [2 - a["category_id"] for d in DatasetCatalog.get("mine") for a in d["annotations"]] == before


def test_a_name_that_is_taken(coco: Set, tmp_path: Path) -> None:
    """Check that neither a built-in name nor that of another file can be used again."""
    register_coco_json(coco.config())
    other = Set(tmp_path / "other")
    for name in ("mine", "coco_2017_val"):
        with pytest.raises(UserError) as caught:
            register_coco_json(other.config(name))
        assert str(caught.value) == (
            f"DATASETS.COCO_JSON: the name {name!r} is already taken by another dataset; choose a new one."
        )


def test_sets_without_a_usable_image(coco: Set) -> None:
    """Check that a dataset is refused only if its images are all filtered out."""
    coco.change(lambda tree: tree.update(annotations=[]))
    cfg = coco.config()
    register_coco_json(cfg)
    assert len(next(iter(build_stream_loader(cfg, seed=0)))) == 1
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    with pytest.raises(UserError) as caught:
        build_stream_loader(cfg, seed=0)
    assert str(caught.value) == "DATASETS.TRAIN mine cannot be trained on: No valid data found in mine."


def test_sets_of_other_classes(coco: Set, tmp_path: Path) -> None:
    """Check that a dataset with boxes of a class that the first lacks, or without any of its classes, is refused."""
    other = Set(tmp_path / "other")
    other.change(_set("categories", 0, name="purple"))
    cfg = coco.config()
    cfg.DATASETS.COCO_JSON += other.config("theirs").DATASETS.COCO_JSON
    cfg.DATASETS.TEST = ("theirs",)
    with pytest.raises(UserError) as caught:
        register_coco_json(cfg)
    assert str(caught.value) == (
        f"{other.json} has boxes of the class 'purple', which {coco.json} does not have (red, green, blue): rename the class in "
        "one of them, or remove its boxes."
    )
    other.change(lambda tree: tree.update(annotations=[], categories=[{"id": 1, "name": "purple"}]))
    with pytest.raises(
        UserError, match=r"has none of the classes of .* \(red, green, blue\): rename them in one of them"
    ):
        register_coco_json(cfg)


def _reversed_categories(tree: dict) -> None:
    """Reverse the order of the ids, with the same classes."""
    tree["categories"] = [{"id": 4 - c["id"], "name": c["name"]} for c in tree["categories"]]
    for annotation in tree["annotations"]:
        annotation["category_id"] = 4 - annotation["category_id"]


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_a_set_with_its_categories_in_another_order(coco: Set, tmp_path: Path, key: str) -> None:
    """Check that it gets the class indices of the first, in training and in testing, and keeps its own ids."""
    other = Set(tmp_path / "other")
    other.change(_reversed_categories)
    cfg = coco.config()
    cfg.DATASETS.COCO_JSON += other.config("theirs").DATASETS.COCO_JSON
    cfg.DATASETS[key] = (*cfg.DATASETS[key], "theirs")
    register_coco_json(cfg)
    classes = [
        [a["category_id"] for d in DatasetCatalog.get(name) for a in d["annotations"]] for name in ("mine", "theirs")
    ]
    assert classes[0] == classes[1]
    metadata = MetadataCatalog.get("theirs")
    assert metadata.thing_classes == list(CLASSES)
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 2, 2: 1, 3: 0}
    assert metadata.json_file == str(other.json)
    if key == "TRAIN":
        cfg.SOLVER.IMS_PER_BATCH = 2
        assert len(next(iter(build_stream_loader(cfg, seed=0)))) == 2


@pytest.mark.parametrize("is_lazy", [True, False])
def test_a_first_training_set_that_another_program_registered(coco: Set, tmp_path: Path, is_lazy: bool) -> None:
    """Check that its classes determine the order, even if Detectron2 has yet to read them from its file."""
    other = Set(tmp_path / "other")
    other.change(_reversed_categories)
    register_coco_instances("theirs", {}, str(other.json), str(other.images))
    if not is_lazy:
        MetadataCatalog.get("theirs").thing_classes = list(CLASSES[::-1])
    cfg = coco.config()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("theirs",), ("mine",)
    register_coco_json(cfg, train=False)
    assert MetadataCatalog.get("mine").thing_classes == list(CLASSES)
    register_coco_json(cfg)
    assert MetadataCatalog.get("mine").thing_classes == list(CLASSES[::-1])
    indices = [
        [a["category_id"] for d in DatasetCatalog.get(name) for a in d["annotations"]] for name in ("mine", "theirs")
    ]
    assert indices[0] == indices[1]


def test_names_with_accents_in_either_form_of_unicode(coco: Set, tmp_path: Path) -> None:
    """Check classes of a model, and of two sets, one with the accent as part of the letter and one with it apart."""
    other = Set(tmp_path / "other")
    for own, name in ((coco, "caf\u00e9"), (other, "cafe\u0301")):
        own.change(_set("categories", 0, name=name))
    order = ClassOrder(("cafe\u0301", "green", "blue"), "model.pth")
    assert order.names == ("caf\u00e9", "green", "blue")
    cfg = coco.config()
    cfg.DATASETS.COCO_JSON += other.config("other").DATASETS.COCO_JSON
    cfg.DATASETS.TEST = ("other",)
    for classes in (None, order):
        register_coco_json(cfg, classes)
        assert [MetadataCatalog.get(name).thing_classes[0] for name in ("mine", "other")] == ["caf\u00e9"] * 2
    assert "form NFC" in other.check().repairs[0] and coco.check().repairs == []
    other.change(lambda tree: tree["categories"].append({"id": 9, "name": "caf\u00e9"}))
    assert "the categories 1 and 9 have the same name" in other.sentence()


def test_a_set_that_lacks_classes_or_names_more_without_boxes(coco: Set, tmp_path: Path) -> None:
    """Check that a model's classes determine the indices, for small test sets and for exports with unused labels."""
    coco.change(
        lambda tree: tree.update(
            categories=[{"id": 5, "name": "unused"}, *(c for c in tree["categories"] if c["name"] != "blue")],
            annotations=[a for a in tree["annotations"] if a["category_id"] != 3],
        )
    )
    register_coco_json(coco.config(), ClassOrder(("blue", "green", "red"), "model.pth"))
    metadata = MetadataCatalog.get("mine")
    assert metadata.thing_classes == ["blue", "green", "red"]
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 2, 2: 1, 6: 0}
    categories = json.loads(Path(metadata.json_file).read_text())["categories"]
    assert [(c["id"], c["name"]) for c in categories] == [(1, "red"), (2, "green"), (6, "blue")]


def test_boxes_that_reach_out_by_hand() -> None:
    """Check a tolerance of one pixel, and that boxes count as corners only if most of them end outside their image."""
    assert not reaches_out([-1, 0, 102, 51], (100, 50))
    for box in ([-1.5, 0, 9, 9], [0, -1.5, 9, 9], [0, 0, 101.5, 9], [0, 0, 9, 51.5]):
        assert reaches_out(box, (100, 50)), box
    inside, beyond = ([10, 10, 20, 20], (100, 100)), ([60, 60, 70, 70], (100, 100))
    check_format("some.json", [inside, beyond])
    with pytest.raises(
        UserError, match=r"some\.json: 2 of its 3 boxes end outside their image, such as \[60, 60, 70, 70\]"
    ):
        check_format("some.json", [inside, beyond, beyond])


def test_boxes_that_overlap_their_image_by_hand() -> None:
    """Check boxes beside an image of 100 x 50 pixels, on each side, and ones that reach into it."""
    for box in ([-9, 5, 9, 9], [100, 5, 9, 9], [5, -9, 9, 9], [5, 50, 9, 9]):
        assert not overlaps(box, (100, 50)), box
    for box in ([-9, 5, 10, 9], [99, 5, 9, 9], [5, -9, 9, 10], [5, 49, 9, 9]):
        assert overlaps(box, (100, 50)), box
    assert overlaps([5, 60, 9, 9], (50, 100))


def test_boxes_of_whole_images_in_fractions() -> None:
    with pytest.raises(UserError, match=r"some\.json: all its boxes are between 0 and 1, such as \[0, 0, 1, 1\]"):
        check_format("some.json", [([0, 0, 1, 1], (100, 50)), ([0, 0, 0.5, 1], (100, 50))])
