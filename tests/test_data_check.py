"""kd-d2 data check: counts computed by hand, findings, errors, and output files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from kd_d2.analysis.drawing import PALETTE, TITLE_HEIGHT
from kd_d2.cli import main
from kd_d2.config import load_config
from kd_d2.data.coco import CocoData, Repairs, read_coco
from kd_d2.data_check import DataSet, check_sets, draw_augmented, draw_samples, measure, sets_of_config
from kd_d2.data_check.picture import CELL, _choose
from kd_d2.distillers import DISTILLER_REGISTRY
from kd_d2.errors import UserError

import cv2
import numpy as np
import pytest
from helpers import CLASSES, clean_process, example, make_coco, make_project, write_yaml
from PIL import Image
from pycocotools import mask as mask_util

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _clean():
    with clean_process():
        yield


@pytest.fixture
def pair(tmp_path: Path) -> list[DataSet]:
    """Create a training and a test set with different pixels."""
    sets = []
    for seed, role in ((0, "train"), (3, "test")):
        path = make_coco(tmp_path / role, 6, seed=seed)
        sets.append(DataSet(role, role, str(path), str(path.parent / "images")))
    return sets


def change(dataset: DataSet, code) -> None:
    path = Path(dataset.json_file)
    tree = json.loads(path.read_text())
    code(tree)
    path.write_text(json.dumps(tree))


def found(sets: list[DataSet], **keywords: object) -> tuple[list[str], list[str]]:
    """Return errors and warnings, except those about rare classes, which every tiny dataset has."""
    findings = [f for f in check_sets(sets, **keywords).findings if "fewer than 10 boxes" not in f.text]
    as_text = [(f.is_error, f"{f.dataset}: {f.text}") for f in findings]
    return [text for is_error, text in as_text if is_error], [text for is_error, text in as_text if not is_error]


def test_counts_by_hand() -> None:
    """Check sizes at COCO's limits, crowds, images without boxes, and percentiles."""
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 100 * i, "height": 200} for i in (1, 2, 3, 4)]
    boxes = [
        (1, 1, [0, 0, 31, 33]),
        (1, 1, [0, 0, 32, 32]),
        (1, 2, [0, 0, 96, 95]),
        (2, 1, [0, 0, 96, 96]),
        (3, 2, [0, 0, 1, 1]),
    ]
    annotations = [
        {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": int(n == 5)}
        for n, (i, c, b) in enumerate(boxes, 1)
    ]  # fmt: skip
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}, {"id": 3, "name": "c"}]
    tree = {"images": images, "annotations": annotations, "categories": categories}
    statistics = measure(CocoData(tree, Repairs("x"), True))
    assert [(c.name, c.boxes, c.small, c.medium, c.large, c.images) for c in statistics.classes] == [
        ("a", 3, 1, 1, 1, 2), ("b", 1, 0, 1, 0, 1), ("c", 0, 0, 0, 0, 0)
    ]  # fmt: skip
    assert (statistics.images, statistics.empty, statistics.boxes, statistics.crowds) == (4, 1, 4, 1)
    percentiles = statistics.percentiles
    assert percentiles["image width"] == pytest.approx([100, 115, 250, 385, 400])
    assert percentiles["boxes an image"] == pytest.approx([0, 0, 0.5, 2.7, 3])
    assert percentiles["side of a box"][::2] == pytest.approx([(31 * 33) ** 0.5, (32 + (96 * 95) ** 0.5) / 2, 96])
    assert percentiles["width / height of a box"][::4] == pytest.approx([31 / 33, 96 / 95])
    assert statistics.image_sizes == [[100, 200, 1], [200, 200, 1], [300, 200, 1]]


def test_sets_in_order(pair: list[DataSet]) -> None:
    assert found(pair) == ([], [])


def test_what_annotations_have(pair: list[DataSet]) -> None:
    """Check repairs, and boxes and names that look like mistakes; the first box of each kind is named."""

    def spoil(tree: dict) -> None:
        tree["categories"] += [{"id": 4, "name": "Red "}, {"id": 5, "name": "none yet"}]
        common = {"image_id": 3, "area": 1, "iscrowd": 0}
        boxes = [(4, [90, 60, 30, 10]), (4, [1, 1, 40, 1]), (4, [0, 0, 96, 64]), (1, [1, 1, 1, 1.5])]
        tree["annotations"] += [{**common, "id": -n, "category_id": c, "bbox": b} for n, (c, b) in enumerate(boxes, 1)]

    change(pair[0], spoil)
    errors, warnings = found(pair[:1])
    assert errors == []
    assert warnings == [
        f"train: {pair[0].json_file}: annotations numbered from 1 because an id is missing, repeated, not positive or not a number (1; the first: -1).",
        "train: 1 boxes extend beyond their image, where training clips them, the first is [90, 60, 30, 10] in 002.png.",
        "train: 2 boxes have a side below 2 pixels, the first is [1, 1, 40, 1] in 002.png.",
        "train: 1 boxes are more than 20 times as long as wide, the first is [1, 1, 40, 1] in 002.png.",
        "train: 1 boxes cover at least 98% of their image, the first is [0, 0, 96, 64] in 002.png.",
        "train: classes without boxes: none yet.",
        "train: classes with nearly identical names: 'red', 'Red '.",
    ]


def test_annotations_that_stop_a_training(pair: list[DataSet]) -> None:
    """Check that an unreadable dataset does not hide findings in the other, and that having no boxes is an error."""
    change(pair[0], lambda tree: tree["annotations"][0].update(image_id=99))
    change(pair[1], lambda tree: tree.update(annotations=[]))
    errors, _ = found(pair)
    assert errors == [
        f"train: {pair[0].json_file}: the annotation with id 1 refers to image 99, which is not among the file's images: remove it, or "
        "add the image.",
        "test: it has no boxes.",
    ]


def test_classes_that_differ(pair: list[DataSet]) -> None:
    def rename(tree: dict, old: str, new: str) -> None:
        next(category for category in tree["categories"] if category["name"] == old)["name"] = new

    def turn(tree: dict) -> None:
        for entry in (*tree["categories"], *tree["annotations"]):
            key = "id" if "name" in entry else "category_id"
            entry[key] = 4 - entry[key]

    change(pair[1], turn)
    assert found(pair) == ([], ["train, test: test has its classes in a different order; they are matched by name."])
    change(pair[1], turn)
    green = next(a["category_id"] for a in json.loads(Path(pair[1].json_file).read_text())["annotations"])
    name = CLASSES[green - 1]
    change(pair[1], lambda tree: rename(tree, name, "violet"))
    errors, _ = found(pair)
    assert errors == [
        f"train, test: {pair[1].json_file} has boxes of the class 'violet', which {pair[0].json_file} does not have "
        f"({', '.join(CLASSES)}): rename the class in one of them, or remove its boxes."
    ]
    change(pair[1], lambda tree: rename(tree, "violet", name))
    change(pair[1], lambda tree: tree.update(annotations=[a for a in tree["annotations"] if a["category_id"] != green]))
    assert f"train, test: classes with boxes only in train, not in test: {name}." in found(pair)[1]


def test_the_same_images_twice(pair: list[DataSet]) -> None:
    """Check copies under other names: a warning within a dataset, an error between training and test sets."""
    train, test = (Path(dataset.folder) for dataset in pair)
    shutil.copy(train / "000.png", train / "002.png")
    shutil.copy(train / "004.png", test / "000.png")
    errors, warnings = found(pair)
    assert errors == [
        "train, test: 1 of 6 test images are also in the training set, such as 000.png (004.png): remove them from one set."
    ]
    assert warnings == ["train: 1 images are duplicates of others in the set, such as 002.png of 000.png."]
    same = DataSet("test", "mine", pair[0].json_file, pair[0].folder)
    assert "train, mine: 6 of 6 test images are also in the training set" in found([pair[0], same])[0][0]
    twice = DataSet("train", "more", pair[0].json_file, pair[0].folder)
    assert found([pair[0], twice])[0] == []


@pytest.mark.parametrize(("images", "expected"), [(None, [2, 1]), (2, [1, 1]), (0, [0, 0])])
def test_images_that_cannot_be_used(pair: list[DataSet], images: int | None, expected: list[int]) -> None:
    """Check a file that is not an image and images of another size, among all images, the first and last, or none."""
    folder = Path(pair[0].folder)
    (folder / "000.png").write_bytes(b"no image")
    Image.new("RGB", (96, 60)).save(folder / "002.png")
    Image.new("RGB", (60, 64)).save(Path(pair[1].folder) / "005.png")
    errors, warnings = found(pair, images=images)
    assert warnings == []
    counts = [
        next((int(e.split(": ")[1].split()[0]) for e in errors if e.startswith(role)), 0) for role in ("train", "test")
    ]
    assert counts == expected
    if images is None:
        assert errors[0] == (
            f"train: 2 of 6 images cannot be used, the first: The image {folder}/000.png cannot be used: its format is none of JPEG, PNG, "
            "BMP, WEBP, TIFF, GIF, PPM."
        )
        assert errors[1].endswith("005.png has 60 x 64 pixels, but its annotations say 64 x 96.")
    # A training skips them; an evaluation does not.
    assert found(pair, images=images, skips_unusable=True) == (errors[1:], errors[:1])


def test_samples_show_each_class(pair: list[DataSet]) -> None:
    """Check that the image of a rare class is chosen early, and where its box is drawn, centered in the cell."""

    def add_rare(tree: dict) -> None:
        tree["categories"].append({"id": 4, "name": "rare"})
        tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] != 6]
        box = {"id": 900, "image_id": 6, "category_id": 4, "bbox": [8, 12, 48, 72], "area": 48 * 72, "iscrowd": 0}
        tree["annotations"].append(box)

    change(pair[0], add_rare)
    data = read_coco(pair[0].json_file, pair[0].folder)
    assert 6 in [image["id"] for image in _choose(data, 4)]
    assert _choose(data, 6)[-1]["id"] == 3  # without boxes
    data.tree["images"] = [image for image in data.tree["images"] if image["id"] == 6]
    data.tree["annotations"] = [a for a in data.tree["annotations"] if a["image_id"] == 6]
    drawn = draw_samples([(pair[0], data)], 4)[-CELL[1] - 8 :, : CELL[0]]
    colored = np.argwhere((drawn[: CELL[1]] == (244, 140, 6)).all(-1))  # the color of the fourth class
    scale, left = CELL[1] / 96, (CELL[0] - 64 * CELL[1] / 96) / 2
    assert colored.max(0).tolist() == pytest.approx([(12 + 72) * scale, left + (8 + 48) * scale], abs=3)


def test_labels_of_large_images_are_readable(pair: list[DataSet]) -> None:
    """Check the height of the box and the label of a small object in a portrait photograph."""
    data = read_coco(pair[0].json_file, pair[0].folder)
    images = data.tree["images"][:1]
    Image.new("RGB", (1080, 1920)).save(Path(pair[0].folder) / images[0]["file_name"])
    box = {"id": 1, "image_id": images[0]["id"], "category_id": 1, "bbox": [300, 900, 1, 1]}
    data.tree |= {"images": images, "annotations": [box]}
    colored = np.argwhere((draw_samples([(pair[0], data)], 1) == (230, 57, 70)).all(-1))
    assert np.ptp(colored, 0)[0] > 10


def test_augmented_samples(pair: list[DataSet]) -> None:
    """Check that images and boxes are mirrored as the config says, those of the test set left out, and a gray image."""
    cfg = load_config("", ["INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TRAIN", (0,), "MODEL.MASK_ON", True])
    sets = [(dataset, read_coco(dataset.json_file, dataset.folder)) for dataset in pair]
    drawn = draw_augmented(sets, cfg, 4)
    np.testing.assert_array_equal(drawn, draw_samples(sets[:1], 4))
    sets[0][1].tree["images"] = sets[0][1].tree["images"][:1]
    box = {"id": 1, "image_id": sets[0][1].tree["images"][0]["id"], "category_id": 1, "bbox": [8, 12, 20, 30]}
    sets[0][1].tree["annotations"] = [box]
    cfg.INPUT.AUGMENTATIONS = [["RandomFlip", 1.0]]
    colored = np.argwhere((draw_augmented(sets, cfg, 4) == (230, 57, 70)).all(-1))[:, 1]
    assert colored.max() == pytest.approx((96 - 8) * CELL[0] / 96, abs=3)
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = "L", [100.0], [50.0]
    gray = draw_augmented(sets, cfg, 4)[CELL[1] - 40, : CELL[0]]  # below the box
    assert (gray == gray[:, :1]).all()


@pytest.mark.parametrize("is_rle", [False, True])
def test_masks_and_keypoints_of_samples(pair: list[DataSet], is_rle: bool) -> None:
    """Check a mask that fills the left half of the box of a gray image of 96 x 64 pixels, also mirrored, and a keypoint."""
    data = read_coco(pair[0].json_file, pair[0].folder)
    images = data.tree["images"][:1]
    Image.new("RGB", (96, 64), (100, 100, 100)).save(Path(pair[0].folder) / images[0]["file_name"])
    mask = np.zeros((64, 96), np.uint8, order="F")
    mask[20:60, 8:28] = 1
    outline = [[8, 20, 28, 20, 28, 60, 8, 60]]
    box = {
        "id": 1,
        "image_id": images[0]["id"],
        "category_id": 1,
        "bbox": [8, 20, 40, 40],
        "keypoints": [38, 50, 2, 0, 0, 0],
    }
    data.tree |= {
        "images": images,
        "annotations": [box | {"segmentation": mask_util.encode(mask) if is_rle else outline}],
    }
    sets = [(replace(pair[0], masks=True, keypoints=2), data)]
    cfg = load_config("", ["INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TRAIN", (0,), "MODEL.MASK_ON", True])
    cfg.INPUT.AUGMENTATIONS = [["RandomFlip", 1.0]]
    scale = CELL[0] / 96
    top = int((CELL[1] - 64 * scale) / 2) + TITLE_HEIGHT
    y, left, right = top + int(40 * scale), int(18 * scale), int(38 * scale)
    tinted, gray = [60 + int(0.4 * value) for value in PALETTE[0]], [100, 100, 100]
    samples, augmented = draw_samples(sets, 1), draw_augmented(sets, cfg, 1)
    assert samples[y, left].tolist() == tinted and samples[y, right].tolist() == gray
    assert augmented[y, CELL[0] - left].tolist() == tinted and augmented[y, CELL[0] - right].tolist() == gray
    assert tuple(samples[top + int(50 * scale), right]) == PALETTE[0]
    assert samples[top + 2, 2].tolist() == gray  # a keypoint that is not labeled


def test_the_command_on_files(pair: list[DataSet], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Check the printed and written output, and the exit status in case of an error."""
    arguments = ["data", "check", "--output", str(tmp_path / "out")]
    for dataset in pair:
        arguments += [f"--{dataset.role}", dataset.json_file, dataset.folder]
    main(arguments)
    printed = capsys.readouterr().out
    assert (
        f"train: train/annotations.json, {pair[0].json_file}\n6 images, 1 of them without annotations; 9 boxes;"
        in printed
    )
    assert "Found in annotations, file contents and up to 200 images of each set: 0 error(s), " in printed
    written = json.loads((tmp_path / "out/check.json").read_text())
    assert [entry["role"] for entry in written["sets"]] == ["train", "test"]
    assert sum(c["small"] + c["medium"] + c["large"] for c in written["sets"][0]["classes"]) == 9
    assert [finding["is_error"] for finding in written["findings"]] == [False, False]
    assert not (tmp_path / "out/augmented.png").exists()
    assert cv2.imread(str(tmp_path / "out/samples.png")).shape[1] == 4 * (CELL[0] + 8)
    shutil.copy(Path(pair[0].folder) / "000.png", Path(pair[1].folder) / "000.png")
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    assert "errors:\n- train/annotations.json, test/annotations.json: 1 of 6 test images" in capsys.readouterr().out


def test_the_command_on_a_config(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Check that paths are relative to the config, no weights are needed, and training on the test set is reported."""
    project = make_project(tmp_path)
    project.teacher_weights.unlink()
    project.change(MODEL__WEIGHTS="gone.pth")
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", str(project.student), "--images", "all", "--output", str(tmp_path / "out")])
    assert ended.value.code == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"check.json", "samples.png", "augmented.png"}
    assert f"{project.name}, {project.name}: 6 of 6 test images are also in the training set" in capsys.readouterr().out
    sets, skips = sets_of_config(str(project.student), ["DATALOADER.SKIP_UNUSABLE_IMAGES", "True"])
    assert [(s.role, s.name, s.json_file) for s in sets] == [
        (role, project.name, str(project.annotations)) for role in ("train", "test")
    ]
    assert skips


@pytest.mark.parametrize(("drops_empty", "images", "epochs", "iterations"), [(False, 6, 30.0, 36), (True, 5, 36.0, 30)])
def test_the_schedule_in_epochs(
    tmp_path: Path, capsys: pytest.CaptureFixture, drops_empty: bool, images: int, epochs: float, iterations: int
) -> None:
    """Check 90 batches of 2 of six images, one of which has no objects, and the same schedule for 12 epochs."""
    project = make_project(tmp_path, DATALOADER__FILTER_EMPTY_ANNOTATIONS=drops_empty)
    with pytest.raises(SystemExit):
        main(["data", "check", str(project.student), "SOLVER.MAX_ITER", "90", "SOLVER.STEPS", "(60, 80)"])
    steps = {36: (24, 32), 30: (20, 27)}[iterations]
    assert (
        capsys.readouterr()
        .out.rstrip()
        .endswith(
            f"\n\nSOLVER.MAX_ITER 90 with batches of 2 is {epochs} epochs of {images} training images.\nFor the same schedule in 12 "
            f"epochs, set SOLVER.EPOCHS 12: SOLVER.MAX_ITER {iterations}, SOLVER.STEPS {steps}"
        )
    )


def test_the_schedule_of_sets_that_are_repeated(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Check the example of the guide: six annotated images count four times, six others once."""
    for role, images, seed in (("train", "images", 0), ("labels", "more_images", 3)):
        make_coco(tmp_path / role, 6, seed=seed).rename(tmp_path / f"{role}.json")
        (tmp_path / role / "images").rename(tmp_path / images)
    file = tmp_path / "my.yaml"
    file.write_text(example("two sets", "docs/guides/own-data.md") + "SOLVER: {IMS_PER_BATCH: 2, MAX_ITER: 90}\n")
    main(["data", "check", str(file), "MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", "3"])
    assert "SOLVER.MAX_ITER 90 with batches of 2 is 6.0 epochs of 30 training images." in capsys.readouterr().out


def test_a_config_with_the_name_of_another_dataset(tmp_path: Path) -> None:
    """Check the sentence of the training for a name of Detectron2's own datasets."""
    project = make_project(tmp_path)
    entry = [["voc_2007_val", str(project.annotations), str(project.annotations.parent / "images")]]
    with pytest.raises(UserError, match=r"^DATASETS.COCO_JSON: the name 'voc_2007_val' is already taken by another"):
        sets_of_config(str(project.student), ["DATASETS.COCO_JSON", entry, "DATASETS.TRAIN", ("voc_2007_val",)])


@pytest.mark.parametrize("pseudo_labels", [False, True])
def test_the_number_of_classes_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture, pseudo_labels: bool) -> None:
    """Check the sentence of the training for a number other than that of the data."""
    project = make_project(tmp_path, MODEL__KD__PSEUDO_LABELS__ENABLED=pseudo_labels)
    for number in (3, 4):
        with pytest.raises(SystemExit):
            main(["data", "check", str(project.student), "MODEL.RETINANET.NUM_CLASSES", str(number)])
        wrong = (
            f"- {project.name}: The dataset {project.name} has 3 classes, but the model (RetinaNet) predicts 4: set "
            "MODEL.RETINANET.NUM_CLASSES accordingly."
        )
        assert (wrong in capsys.readouterr().out) == (number == 4)


def test_a_config_of_a_method_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Check that --import registers the method whose keys the config sets."""
    path = tmp_path / "my_checked_method.py"
    path.write_text(
        "from kd_d2.distillers import DISTILLER_REGISTRY, Distiller\n\n\n@DISTILLER_REGISTRY.register()\n"
        "class Checked(Distiller):\n    CONFIG_NODE = 'CHECKED'\n"
    )
    project = make_project(tmp_path)
    project.change(MODEL__KD__CHECKED__WEIGHT=2.0)
    with pytest.raises(SystemExit):
        main(["data", "check", str(project.student)])
    assert "there is no config key MODEL.KD.CHECKED" in capsys.readouterr().err
    try:
        with pytest.raises(SystemExit):
            main(["data", "check", str(project.student), "--import", str(path)])
        assert "test images are also in the training set" in capsys.readouterr().out
    finally:
        DISTILLER_REGISTRY._obj_map.pop("Checked", None)


def _encode_masks(tree: dict) -> None:
    """Give every object but the first, a crowd, a mask of all pixels as RLE."""
    for annotation in tree["annotations"]:
        annotation["segmentation"] = {"counts": [0, 64 * 96]}
    tree["annotations"][0]["iscrowd"] = 1


def test_what_a_training_needs(tmp_path: Path) -> None:
    """Check that segmentations are needed for masks, and that nothing but images is needed for pseudo-labels."""
    project = make_project(tmp_path)
    (error,), _ = found(sets_of_config(str(project.student), ["MODEL.MASK_ON", "True", "DATASETS.TEST", "()"])[0])
    assert "has no segmentation, which MODEL.MASK_ON needs" in error
    project.change_annotations(_encode_masks)
    for mask_format, errors in (("polygon", 1), ("bitmask", 0)):
        opts = ["MODEL.MASK_ON", "True", "DATASETS.TEST", "()", "INPUT.MASK_FORMAT", mask_format]
        sentences = [s for s in found(sets_of_config(str(project.student), opts)[0])[0] if "RLE" in s]
        assert (
            sentences
            == [
                f"{project.name}: 8 masks are run-length encoded (RLE), but INPUT.MASK_FORMAT is 'polygon'; set it to 'bitmask'."
            ][:errors]
        )
    project.change(MODEL__KD__PSEUDO_LABELS__ENABLED=True)
    project.change_annotations(lambda tree: [tree.pop(key) for key in ("annotations", "categories")])
    assert found(sets_of_config(str(project.student), ["DATASETS.TEST", "()"])[0])[0] == []


def test_files_of_one_name(pair: list[DataSet], capsys: pytest.CaptureFixture) -> None:
    """Check that files of the same name in different folders, as Roboflow writes them, are named with their folders."""
    change(pair[1], lambda tree: tree["categories"].append({"id": 9, "name": "more"}))
    arguments = [(f"--{dataset.role}", dataset.json_file, dataset.folder) for dataset in pair]
    main(["data", "check", *(word for given in arguments for word in given)])
    name = Path(pair[0].json_file).name
    assert Path(pair[1].json_file).name == name
    printed = capsys.readouterr().out
    assert f"test/{name}: classes without boxes: more." in printed and f"train/{name}: classes with" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Give either a CONFIG, or annotation files with --train and --test."),
        (["a.yaml", "--train", "a", "b"], "Give either a CONFIG, or annotation files with --train and --test."),
        (["--train", "a", "b", "SEED", "1"], "The override SEED has no effect without a CONFIG."),
        (["--train", "a", "b", "--images", "some"], "--images is 'some'; it must be a whole number or all."),
        (["--train", "a", "b", "--samples", "0"], "--samples is 0; it must be at least 1."),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture, arguments: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", *arguments])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


@pytest.mark.parametrize(
    ("datasets", "sentence"),
    [
        ({"TRAIN": ["voc_2007_train"]}, "DATASETS.TRAIN names 'voc_2007_train', which is neither an entry of DATASETS.COCO_JSON nor"),
        ({"TRAIN": [], "TEST": []}, "DATASETS.TRAIN and DATASETS.TEST are empty: name a dataset."),
        ({"COCO_JSON": [["x", "x.json", "x"]], "TRAIN": ["x"]}, r"DATASETS.COCO_JSON \(x\): there is no file"),
    ],
)  # fmt: skip
def test_configs_whose_sets_are_not_there(tmp_path: Path, datasets: dict, sentence: str) -> None:
    config = write_yaml(tmp_path / "a.yaml", {"_BASE_": "tiny/retinanet-student", "DATASETS": datasets})
    with pytest.raises(UserError, match=sentence):
        sets_of_config(str(config), [])
