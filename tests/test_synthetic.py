"""The synthetic dataset: the same bytes for the same seed, labels that match the pixels, all or nothing on disk."""

import json
import multiprocessing
from collections import Counter
from pathlib import Path

from kd_d2.data import synthetic
from kd_d2.data.synthetic import ensure_synthetic, generate_split, register_synthetic, scenes
from kd_d2.data.synthetic.__main__ import main
from kd_d2.data.synthetic.scenes import CLASSES, MIN_VISIBLE
from kd_d2.errors import UserError

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

NUM_IMAGES = 200


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_split(tmp_path_factory.mktemp("split"), NUM_IMAGES, seed=7).parent


@pytest.fixture(scope="module")
def coco(split: Path) -> COCO:
    return COCO(str(split / "annotations.json"))


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _axis_aligned(x: float, y: float, width: float, height: float) -> scenes.Shape:
    corners = np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], float)
    return scenes.Shape([corners], np.diag([width / 2, height / 2]), corners.mean(axis=0))


def _place(scene: scenes.Scene, shape: scenes.Shape, category: int = 2) -> bool:
    """Place and paint a rectangle."""
    coverage = scenes.rasterize(shape.outline, scene.height, scene.width)
    placed = scene.place(category, shape, coverage)
    if placed:
        scene.paint(np.random.default_rng(0), shape, coverage, "plain")
    return placed


def test_same_seed_gives_same_bytes_and_another_seed_other_images(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        generate_split(tmp_path / name, 6, seed)
    a, b, c = (_files(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert not set(a.values()) & set(c.values())


def test_longer_split_begins_with_the_shorter_one(tmp_path: Path, split: Path) -> None:
    generate_split(tmp_path, 3, seed=7)
    for image in (tmp_path / "images").iterdir():
        assert image.read_bytes() == (split / "images" / image.name).read_bytes()


def test_splits_of_one_and_of_neighboring_seeds_share_no_image(tmp_path: Path) -> None:
    for seed in (0, 1):
        ensure_synthetic(tmp_path / str(seed), num_train=3, num_val=3, seed=seed)
    images = [path.read_bytes() for path in tmp_path.rglob("*.jpg")]
    assert len(images) == len(set(images)) == 12


def test_images_on_disk_have_the_sizes_in_the_json(split: Path, coco: COCO) -> None:
    shapes = Counter()
    for image in coco.dataset["images"]:
        height, width = cv2.imread(str(split / "images" / image["file_name"])).shape[:2]
        assert (height, width) == (image["height"], image["width"])
        assert max(height, width) == 160
        shapes[height > width] += 1
    assert min(shapes[True], shapes[False]) > NUM_IMAGES // 5  # both portrait and landscape


def test_boxes_lie_inside_their_image(coco: COCO) -> None:
    for annotation in coco.dataset["annotations"]:
        image = coco.imgs[annotation["image_id"]]
        x, y, width, height = annotation["bbox"]
        assert x >= 0 and y >= 0 and width > 0 and height > 0
        assert x + width <= image["width"] and y + height <= image["height"]
        assert 0 < annotation["area"] <= width * height


def test_polygons_agree_with_boxes_and_areas(coco: COCO) -> None:
    ring = CLASSES.index("ring") + 1  # its polygon covers the hole
    for annotation in coco.dataset["annotations"]:
        x, y, width, height = annotation["bbox"]
        corners = np.concatenate([np.reshape(p, (-1, 2)) for p in annotation["segmentation"]])
        extent = [*corners.min(axis=0), *corners.max(axis=0)]
        np.testing.assert_allclose(extent, [x, y, x + width, y + height], atol=1)
        if annotation["category_id"] != ring:
            assert coco.annToMask(annotation).sum() > 0.85 * annotation["area"]


def test_ids_count_from_one(coco: COCO) -> None:
    assert [image["id"] for image in coco.dataset["images"]] == list(range(1, NUM_IMAGES + 1))
    ids = [annotation["id"] for annotation in coco.dataset["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    assert [c["name"] for c in coco.loadCats(range(1, len(CLASSES) + 1))] == list(CLASSES)


def test_all_classes_occur_about_equally_often(coco: COCO) -> None:
    counts = Counter(annotation["category_id"] for annotation in coco.dataset["annotations"])
    assert len(counts) == len(CLASSES)
    assert min(counts.values()) > 0.5 * max(counts.values())


def test_few_images_are_empty_and_none_is_crowded(coco: COCO) -> None:
    counts = [len(coco.getAnnIds(image_id)) for image_id in coco.getImgIds()]
    assert 0.01 <= np.mean(np.equal(counts, 0)) <= 0.08
    assert max(counts) == 7


def test_box_area_and_pixels_of_a_lone_rectangle() -> None:
    blank = np.full((60, 80, 3), 128, np.float32)
    scene = scenes.Scene(blank.copy())
    assert _place(scene, _axis_aligned(10, 20, 30, 15))
    (annotation,) = synthetic._annotations(scene, image_id=1, first_id=1)
    assert annotation["bbox"] == [10, 20, 30, 15]
    assert annotation["area"] == pytest.approx(30 * 15, rel=0.05)
    change = np.abs(scene.canvas - blank).max(axis=2)
    drawn = (change > 0.5 * np.median(change[change > 0])).astype(np.uint8)
    assert cv2.boundingRect(drawn) == (10, 20, 30, 15)
    assert drawn.sum() == 30 * 15


def test_box_of_a_covered_or_cut_object_is_that_of_its_visible_part() -> None:
    scene = scenes.Scene(np.full((60, 80, 3), 128, np.float32))
    assert _place(scene, _axis_aligned(-5, 10, 30, 20))
    assert _place(scene, _axis_aligned(17, 5, 30, 40))
    behind, front = synthetic._annotations(scene, image_id=1, first_id=1)
    assert behind["bbox"] == [0, 10, 17, 20]
    assert front["bbox"] == [17, 5, 30, 40]


def test_an_object_that_would_hide_another_is_not_placed() -> None:
    scene = scenes.Scene(np.full((60, 80, 3), 128, np.float32))
    assert _place(scene, _axis_aligned(20, 20, 20, 20))
    before = scene.canvas.copy()
    assert not _place(scene, _axis_aligned(20, 20, 20 * (1 - MIN_VISIBLE) + 1, 20))
    assert not _place(scene, _axis_aligned(-18, 0, 20, 20))  # mostly outside the image
    assert len(scene.categories) == len(scene.visible) == 1
    assert (scene.canvas == before).all()
    assert _place(scene, _axis_aligned(20, 20, 20 * (1 - MIN_VISIBLE) - 1, 20))


def test_the_clear_style_is_another_set_whose_classes_have_their_hues(tmp_path: Path) -> None:
    """Check that images differ from the default style's, have 1 to 5 objects, and that two classes have their hues."""
    split = generate_split(tmp_path / "clear", 40, seed=7, style="clear").parent
    generate_split(tmp_path / "cluttered", 1, seed=7)
    assert (split / "images/000000.jpg").read_bytes() != (tmp_path / "cluttered/images/000000.jpg").read_bytes()
    coco = COCO(str(split / "annotations.json"))
    assert all(1 <= len(coco.getAnnIds(number)) <= 5 for number in coco.getImgIds())
    for name, hue in (("circle", [1.0, 0.0, 0.0]), ("triangle", [0.0, 1.0, 1.0])):  # in the image's channel order
        expected, category = np.array(hue), CLASSES.index(name) + 1
        for annotation in coco.loadAnns(coco.getAnnIds(catIds=category)):
            image = cv2.imread(str(split / "images" / coco.imgs[annotation["image_id"]]["file_name"]))
            inside = cv2.erode(coco.annToMask(annotation), np.ones((9, 9), np.uint8)) > 0
            color = np.median(image[inside], axis=0) if inside.any() else expected
            spread = color - color.min()
            assert spread @ expected > 0.6 * np.linalg.norm(spread) * np.linalg.norm(expected)


def test_a_style_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="style must be one of cluttered, clear, got 'easy'"):
        generate_split(tmp_path, 1, 0, style="easy")


def test_a_set_is_made_once(tmp_path: Path) -> None:
    root = ensure_synthetic(tmp_path / "deep" / "set", num_train=3, num_val=2)
    assert len(COCO(str(root / "train" / "annotations.json")).imgs) == 3
    assert len(COCO(str(root / "val" / "annotations.json")).imgs) == 2
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert ensure_synthetic(root, num_train=3, num_val=2) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == times


def test_other_settings_are_an_error_that_names_folder_and_both_settings(tmp_path: Path) -> None:
    root = ensure_synthetic(tmp_path / "set", num_train=3, num_val=2, seed=5)
    before = _files(root)
    with pytest.raises(UserError) as caught:
        ensure_synthetic(root, num_train=4, num_val=2, seed=6)
    for part in (str(root), "'num_train': 3", "'num_train': 4", "'seed': 5", "'seed': 6"):
        assert part in str(caught.value)
    assert _files(root) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not a synthetic set"):
        ensure_synthetic(tmp_path, num_train=1, num_val=1)
    assert _files(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("failure", "seen"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), UserError)],
)
def test_an_interrupted_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, seen: type[BaseException]
) -> None:
    encode, calls = cv2.imencode, []

    def fail_at_the_fifth_image(*args):
        calls.append(args)
        if len(calls) == 5:
            raise failure
        return encode(*args)

    monkeypatch.setattr(cv2, "imencode", fail_at_the_fifth_image)
    with pytest.raises(seen):
        ensure_synthetic(tmp_path / "set", num_train=3, num_val=4)
    assert list(tmp_path.iterdir()) == []
    ensure_synthetic(tmp_path / "set", num_train=3, num_val=4)


def test_the_loser_of_a_race_uses_the_set_of_the_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, generate = tmp_path / "set", synthetic.generate_split

    def lose(*args, **kwargs):
        monkeypatch.setattr(synthetic, "generate_split", generate)
        ensure_synthetic(root, num_train=2, num_val=1)
        (root / "winner").touch()
        return generate(*args, **kwargs)

    monkeypatch.setattr(synthetic, "generate_split", lose)
    assert ensure_synthetic(root, num_train=2, num_val=1) == root
    assert (root / "winner").exists()
    assert list(tmp_path.iterdir()) == [root]


def test_processes_that_start_together_agree(tmp_path: Path) -> None:
    root = tmp_path / "set"
    processes = [
        multiprocessing.get_context("fork").Process(
            target=ensure_synthetic, args=(root,), kwargs={"num_train": 8, "num_val": 8}
        )
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == [root]


def test_registered_names_load_through_detectron2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from detectron2.data import DatasetCatalog, MetadataCatalog

    names = ("synthetic_train", "synthetic_val", "shapes_train", "shapes_val")
    for name in names:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    small = {"num_train": 4, "num_val": 2}
    monkeypatch.setattr(synthetic, "ensure_synthetic", lambda root, style: ensure_synthetic(root, **small, style=style))
    try:
        register_synthetic()
        register_synthetic()
        metadata = MetadataCatalog.get("synthetic_val")
        assert metadata.thing_classes == list(CLASSES)
        assert metadata.evaluator_type == "coco"
        assert list(tmp_path.iterdir()) == []
        records = DatasetCatalog.get("synthetic_train")
        assert len(records) == 4
        assert all(Path(record["file_name"]).is_file() for record in records)
        assert {a["category_id"] for r in records for a in r["annotations"]} <= set(range(len(CLASSES)))
        assert len(json.loads(Path(metadata.json_file).read_text())["images"]) == 2
        assert len(DatasetCatalog.get("shapes_val")) == 2
    finally:
        for name in names:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_main_writes_a_set(tmp_path: Path) -> None:
    assert main([str(tmp_path / "set"), "--train", "2", "--val", "1", "--seed", "9"]) == 0
    same = ensure_synthetic(tmp_path / "same", num_train=2, num_val=1, seed=9)
    assert _files(same) == _files(tmp_path / "set")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train", "0"], "num_train must be 1 or more, got 0"),
        (["--val", "-3"], "num_val must be 1 or more, got -3"),
        (["--seed", "-1"], "seed must be 0 or more, got -1"),
        (["--image-size", "8"], "image_size must be 64 px or more, got 8"),
    ],
)
def test_main_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main([str(tmp_path / "set"), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_main_names_a_folder_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "set"
    assert main([str(out), "--train", "1", "--val", "1"]) == 2
    error = capsys.readouterr().err
    assert str(out) in error and error.count("\n") == 1
