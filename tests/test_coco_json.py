"""COCO files: what is wrong with one is said before training; what training can live with is counted and reported."""

import json
import logging
from pathlib import Path

from kd_d2.config import add_kd_config
from kd_d2.data import build_stream_loader, check_coco_json, register_coco_json
from kd_d2.errors import UserError

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import CLASSES, clean_process, make_coco

pytestmark = pytest.mark.unit


class Set:
    """A COCO set of four images, whose annotation file a test changes."""

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
)
def test_files_of_something_else(coco: Set, content: str, expected: str) -> None:
    """Check that a file that is not COCO's json is named with what it lacks."""
    coco.json.write_text(content)
    assert coco.sentence().startswith(f"{coco.json} {expected}")


def test_binary_and_missing_files(coco: Set) -> None:
    """Check that a picture given for the json, and a file that is gone, are named."""
    coco.json.write_bytes((coco.images / "000.png").read_bytes())
    assert coco.sentence().startswith(f"{coco.json} is not readable json: 'utf-8' codec can't decode")
    coco.json.unlink()
    assert coco.sentence().startswith(f"{coco.json} is not readable json: [Errno 2] No such file")


def _set(key: str, index: int, **fields: object):
    return lambda tree: tree[key][index].update(fields)


def _drop(key: str, index: int, field: str):
    return lambda tree: tree[key][index].pop(field)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            _drop("images", 1, "file_name"),
            " is not a COCO annotation file: an image has no str 'file_name': {'id': 2, ",
        ),
        (_set("images", 1, width="96"), " is not a COCO annotation file: an image has no int 'width': "),
        (_set("images", 1, id=True), " is not a COCO annotation file: an image has no int 'id': "),
        (_set("images", 1, id=1), ": the id 1 occurs more than once in its images."),
        (_set("images", 1, height=0), ": the image with id 2 has 64 x 0 pixels; both must be positive."),
        (lambda tree: tree.update(categories=[]), " has no categories."),
        (_drop("categories", 0, "name"), " is not a COCO annotation file: a category has no str 'name': {'id': 1}."),
        (_set("categories", 1, id=3), ": the id 3 occurs more than once in its categories."),
        (_drop("annotations", 0, "bbox"), " is not a COCO annotation file: an annotation has no list 'bbox': "),
        (
            lambda tree: tree["annotations"].append(7),
            " is not a COCO annotation file: an annotation has no int 'id': 7.",
        ),
        (_set("annotations", 1, id=1), ": the id 1 occurs more than once in its annotations."),
        (_set("annotations", 1, image_id=9), ": the annotation with id 2 is of image 9, which is not in the file."),
        (
            _set("annotations", 1, category_id=9),
            ": the annotation with id 2 is of category 9, which is not in the file.",
        ),
        (
            _set("annotations", 1, ignore=1),
            ": the annotation with id 2 has 'ignore' set, which Detectron2 does not know",
        ),
        (
            _set("annotations", 1, bbox=[1, 2, 3]),
            ": the annotation with id 2 has the bbox [1, 2, 3]; it must be four finite numbers [x, y, width, height].",
        ),
        (
            _set("annotations", 1, bbox=[1, 2, 3, "4"]),
            ": the annotation with id 2 has the bbox [1, 2, 3, '4']; it must",
        ),
        (
            _set("annotations", 1, bbox=[1, 2, 3, float("nan")]),
            ": the annotation with id 2 has the bbox [1, 2, 3, nan]",
        ),
    ],
)
def test_wrong_entries(coco: Set, change, expected: str) -> None:
    """Check that each kind of wrong entry is named with the file and the entry's id."""
    coco.check()
    coco.change(change)
    assert coco.sentence().startswith(f"{coco.json}{expected}")


def test_images_that_are_not_on_disk(coco: Set) -> None:
    """Check that missing images are counted and the first is named."""
    (coco.images / "001.png").unlink()
    (coco.images / "003.png").unlink()
    assert coco.sentence() == (f"{coco.json}: 2 of 4 images are not in {coco.images}, the first is 001.png.")


def test_odd_boxes_are_counted_reported_and_survived(coco: Set, caplog: pytest.LogCaptureFixture) -> None:
    """Check the counts by hand, the warnings, and that training drops the empty boxes and clips the others."""
    beyond = [[-30, -5, 400, 20], [-30, 5, 50, 20], [5, 40, 20, 90]]
    boxes = [*beyond, [5, 5, 0, 9], [40, 40, -9, -9], [-1, -1, 20, 20]]  # the last one is within tolerance

    def replace(tree: dict) -> None:
        tree["annotations"] = [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "iscrowd": 0} for i, box in enumerate(boxes)
        ]
        tree["images"] = tree["images"][:1]

    coco.change(replace)
    summary = coco.check()
    assert (summary.images, summary.boxes, summary.classes) == (1, 6, list(CLASSES))
    assert (summary.boxes_without_area, summary.boxes_out_of_range, summary.zero_ids) == (2, 3, 1)
    cfg = coco.config()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (64,), "none"
    with caplog.at_level(logging.WARNING):
        register_coco_json(cfg)
    assert [r.getMessage() for r in caplog.records] == [
        "mine: 2 boxes have no area; training drops them, evaluation counts them as missed.",
        "mine: 3 boxes reach beyond their image; training clips them.",
        "mine: an annotation has id 0, which pycocotools never counts as found; number them from 1.",
    ]
    instances = next(iter(build_stream_loader(cfg, seed=0)))[0]["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[0, 0, 96, 15], [0, 5, 20, 25], [5, 40, 25, 64], [0, 0, 19, 19]]


def test_registration(coco: Set) -> None:
    """Check names, classes in order of their ids, and that only the sets that TRAIN or TEST names are registered."""
    coco.change(lambda tree: tree.update(categories=tree["categories"][::-1]))
    cfg = coco.config()
    cfg.DATASETS.COCO_JSON.append(["unused", "gone.json", "gone"])
    register_coco_json(cfg)
    assert "unused" not in DatasetCatalog.list()
    assert MetadataCatalog.get("mine").thing_classes == list(CLASSES)
    assert [len(d["annotations"]) for d in DatasetCatalog.get("mine")] == [1, 2, 0, 1]
    register_coco_json(cfg)  # a second program in this process


def test_a_name_that_is_taken(coco: Set, tmp_path: Path) -> None:
    """Check that neither a built-in name nor that of another file is given a second meaning."""
    register_coco_json(coco.config())
    other = Set(tmp_path / "other")
    for name in ("mine", "coco_2017_val"):
        with pytest.raises(UserError) as caught:
            register_coco_json(other.config(name))
        assert str(caught.value) == (
            f"DATASETS.COCO_JSON: the name {name!r} belongs to another data set already; choose a new one."
        )


def test_sets_without_a_usable_image(coco: Set) -> None:
    """Check that a set whose images are all filtered out is named."""
    coco.change(lambda tree: tree.update(annotations=[]))
    cfg = coco.config()
    register_coco_json(cfg)
    assert len(next(iter(build_stream_loader(cfg, seed=0)))) == 1
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    with pytest.raises(UserError) as caught:
        build_stream_loader(cfg, seed=0)
    assert str(caught.value) == "DATASETS.TRAIN mine cannot be trained on: No valid data found in mine."


def test_training_sets_of_other_classes(coco: Set, tmp_path: Path) -> None:
    """Check that two training sets whose classes differ are refused in a sentence."""
    other = Set(tmp_path / "other")
    other.change(_set("categories", 0, name="purple"))
    cfg = coco.config()
    cfg.DATASETS.COCO_JSON += other.config("theirs").DATASETS.COCO_JSON
    cfg.DATASETS.TRAIN = ("mine", "theirs")
    register_coco_json(cfg)
    with pytest.raises(UserError, match=r"^DATASETS.TRAIN mine, theirs cannot be trained on: .*different metadata"):
        build_stream_loader(cfg, seed=0)
