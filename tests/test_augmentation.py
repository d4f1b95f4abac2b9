"""Augmentations from the config: images and boxes after the transform, computed by hand."""

from pathlib import Path

from kd_d2.config import add_kd_config, load_config
from kd_d2.config.augmentations import read_augmentations
from kd_d2.config.validation import validate_kd_config
from kd_d2.data.augmentation import build_mapper
from kd_d2.errors import UserError
from kd_d2.random_state import seeded

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import BoxMode
from helpers import example
from PIL import Image

WIDTH, HEIGHT = 100, 50
BOX = {"bbox": [25.0, 10.0, 75.0, 40.0], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0}


def config(**jitter: object) -> CfgNode:
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.INPUT.RANDOM_FLIP = "none"
    for key, value in {"ENABLED": True, "SIZE": 64, **jitter}.items():
        cfg.INPUT.LARGE_SCALE_JITTER[key] = value
    return cfg


def mapped(folder: Path, cfg: CfgNode, seed: int = 0, annotations: list[dict] | None = None) -> dict:
    file = folder / "image.png"
    annotations = [BOX] if annotations is None else annotations
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), 7, dtype=np.uint8)).save(file)
    with seeded(seed, 0):
        return build_mapper(cfg)({"file_name": str(file), "width": WIDTH, "height": HEIGHT, "annotations": annotations})


def test_at_scale_one_the_image_fits_the_square(tmp_path: Path) -> None:
    """Check the scale factor 0.64, the padding at the bottom, and the box."""
    found = mapped(tmp_path, config(MIN_SCALE=1.0, MAX_SCALE=1.0))
    assert found["image"].shape == (3, 64, 64)
    assert (found["image"][:, :32] == 7).all() and (found["image"][:, 32:] == 128).all()
    torch.testing.assert_close(found["instances"].gt_boxes.tensor, torch.tensor([[16.0, 6.4, 48.0, 25.6]]))


def test_at_scale_two_a_part_is_cut_out(tmp_path: Path) -> None:
    """Check that the 128 x 64 pixels and the box are cropped to the square at a position that depends on the seed."""
    cfg = config(MIN_SCALE=2.0, MAX_SCALE=2.0)
    places = set()
    for seed in range(6):
        found = mapped(tmp_path, cfg, seed)
        assert found["image"].shape == (3, 64, 64) and (found["image"] == 7).all()
        box = found["instances"].gt_boxes.tensor[0]
        assert box.min() >= 0 and box.max() <= 64
        torch.testing.assert_close(box[[1, 3]], torch.tensor([12.8, 51.2]))
        torch.testing.assert_close(box, mapped(tmp_path, cfg, seed)["instances"].gt_boxes.tensor[0])
        places.add(box[0].item())
    assert len(places) > 1


def test_flips_stay(tmp_path: Path) -> None:
    """Check that INPUT.RANDOM_FLIP still applies."""
    cfg = config(MIN_SCALE=1.0, MAX_SCALE=1.0)
    cfg.INPUT.RANDOM_FLIP = "vertical"
    tops = {mapped(tmp_path, cfg, seed)["instances"].gt_boxes.tensor[0, 1].item() for seed in range(8)}
    assert sorted(tops) == pytest.approx([6.4, 64 - 25.6])


@pytest.mark.parametrize("key", ["CROP", "LARGE_SCALE_JITTER"])
@pytest.mark.parametrize("crowds", [0, 1])
def test_boxes_of_masks_in_images_without_objects(tmp_path: Path, key: str, crowds: int) -> None:
    """Check images without annotations, and with nothing but a crowd."""
    cfg = config(ENABLED=key == "LARGE_SCALE_JITTER")
    cfg.INPUT.CROP.ENABLED = key == "CROP"
    cfg.MODEL.MASK_ON = True
    crowd = {**BOX, "iscrowd": 1, "segmentation": [[25.0, 10.0, 75.0, 10.0, 75.0, 40.0]]}
    found = mapped(tmp_path, cfg, annotations=[crowd] * crowds)
    assert len(found["instances"]) == 0 and "annotations" not in found
    assert found["instances"].gt_boxes.tensor.shape == (0, 4)


def test_a_polygon_is_cropped(tmp_path: Path) -> None:
    """Check the box of a triangle that is cropped at the right edge, which is not its box cropped there."""
    cfg = config(MIN_SCALE=1.0, MAX_SCALE=1.0)
    cfg.MODEL.MASK_ON = True
    triangle = {**BOX, "segmentation": [[50.0, 10.0, 150.0, 10.0, 150.0, 60.0]]}
    instances = mapped(tmp_path, cfg, annotations=[triangle])["instances"]
    torch.testing.assert_close(instances.gt_boxes.tensor, torch.tensor([[32.0, 6.4, 64.0, 22.4]]))


def test_values_that_do_not_go_together() -> None:
    cfg = config(MIN_SCALE=0.5, MAX_SCALE=0.2)
    with pytest.raises(UserError) as caught:
        validate_kd_config(cfg)
    assert str(caught.value) == ("INPUT.LARGE_SCALE_JITTER.MIN_SCALE is 0.5; it must be at most MAX_SCALE 0.2.")
    cfg = config(MIN_SCALE=0.5, MAX_SCALE=0.5)
    cfg.INPUT.MIN_SIZE_TRAIN = ()  # which it replaces
    validate_kd_config(cfg)
    cfg.INPUT.CROP.ENABLED = True
    with pytest.raises(UserError) as caught:
        build_mapper(cfg)
    assert str(caught.value) == (
        "INPUT.CROP.ENABLED and INPUT.LARGE_SCALE_JITTER.ENABLED are both True; set one of them to False."
    )


def with_augmentations(*entries: object) -> CfgNode:
    cfg = config(MIN_SCALE=1.0, MAX_SCALE=1.0)
    cfg.INPUT.AUGMENTATIONS = list(entries)
    validate_kd_config(cfg)
    return cfg


def test_augmentations_come_before_the_resizing(tmp_path: Path) -> None:
    """Check brightness by a factor, which leaves the padding gray, and boxes of an image turned by a right angle."""
    found = mapped(tmp_path, with_augmentations(["RandomBrightness", 3.0, 3.0], ["RandomRotation", [90, 90]]))
    assert (found["image"][:, :, 32:] == 128).all() and (found["image"][:, 1:-1, 1:31] == 21).all()
    box = torch.tensor([[6.4, 16.0, 25.6, 48.0]])
    torch.testing.assert_close(found["instances"].gt_boxes.tensor, box, atol=0.7, rtol=0)


def test_augmentations_with_a_probability_and_keyword_arguments(tmp_path: Path) -> None:
    """Check that a flip that is applied with a probability of 0.5 turns some of 20 images upside down."""
    cfg = with_augmentations(["RandomApply", ["RandomFlip", 1.0, {"horizontal": False, "vertical": True}], 0.5])
    upper = {**BOX, "bbox": [25.0, 10.0, 75.0, 20.0]}
    found = (mapped(tmp_path, cfg, seed, [upper])["instances"].gt_boxes.tensor[0, 1].item() for seed in range(20))
    assert {round(top, 1) for top in found} == {6.4, 19.2}


@pytest.mark.parametrize(("name", "recomputed"), [("RandomContrast", False), ("RandomExtent", True)])
def test_boxes_are_recomputed_from_masks_that_move(name: str, recomputed: bool) -> None:
    arguments = {"RandomContrast": [0.9, 1.1], "RandomExtent": [[1, 1], [0.1, 0.1]]}[name]
    for entry in ([name, *arguments], ["RandomApply", ["RandomApply", [name, *arguments]]]):
        cfg = with_augmentations(entry)
        cfg.INPUT.LARGE_SCALE_JITTER.ENABLED = False
        assert not build_mapper(cfg).recompute_boxes
        cfg.MODEL.MASK_ON = True
        assert build_mapper(cfg).recompute_boxes == recomputed


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_boxes_of_masks_end_at_the_border(tmp_path: Path, mask_format: str) -> None:
    """Check the middle half of an image of 50x100: an object at the left edge is cut, one in the corner is dropped."""
    cfg = with_augmentations(["RandomExtent", [0.5, 0.5], [0, 0]])
    cfg.INPUT.LARGE_SCALE_JITTER.ENABLED, cfg.INPUT.MIN_SIZE_TRAIN, cfg.MODEL.MASK_ON = False, (0,), True
    cfg.INPUT.MASK_FORMAT = mask_format
    annotations = [
        {**BOX, "bbox": [x, y, x + 40, y + 10], "segmentation": [[x, y, x + 40, y, x + 40, y + 10, x, y + 10]]}
        for x, y in ((10.0, 20.0), (-20.0, 0.0))
    ]
    found = mapped(tmp_path, cfg, annotations=annotations)
    box = torch.tensor([[0, 7.5, 25, 17.5]])
    torch.testing.assert_close(found["instances"].gt_boxes.tensor, box, atol=0.5, rtol=0)  # bitmasks have whole pixels


def test_the_augmentations_of_the_guide(tmp_path: Path) -> None:
    """Check the names and the probability, and that batches do not depend on earlier random numbers."""
    file = tmp_path / "augmented.yaml"
    file.write_text(example("augmentations", "docs/guides/own-data.md"))
    cfg = load_config(str(file))
    applied = read_augmentations(cfg)
    assert [type(augmentation).__name__ for augmentation in applied[:3]] == [
        f"Random{x}" for x in ("Brightness", "Contrast", "Saturation")
    ]
    assert (applied[3].prob, applied[3].aug.angle, applied[3].aug.expand) == (0.5, [-10, 10], False)
    first, second = (mapped(tmp_path, cfg, seed=5)["image"] for _ in range(2))
    assert first.equal(second)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("RandomFlip", "An entry of INPUT.AUGMENTATIONS is 'RandomFlip'; it must be a list of a name and arguments, such as"),
        ([], "An entry of INPUT.AUGMENTATIONS is []; it must be"),
        ([["RandomFlip"]], "An entry of INPUT.AUGMENTATIONS is [['RandomFlip']]; it must be"),
        (["RandomApply", ["Mosaic"]], "An entry of INPUT.AUGMENTATIONS is ['Mosaic']; it must be"),
        (["RandomApply"], "INPUT.AUGMENTATIONS: ['RandomApply'] cannot be applied to an image: RandomApply.__init__() missing 1"),
        (["RandomBrightness", 0.8], "INPUT.AUGMENTATIONS: ['RandomBrightness', 0.8] cannot be applied to an image: RandomBrightness"),
        (["RandomApply", ["RandomLighting", "a"], 0.0], "INPUT.AUGMENTATIONS: ['RandomLighting', 'a'] cannot be applied to an image: "),
        (["RandomBrightness", "a", "b"], "INPUT.AUGMENTATIONS: ['RandomBrightness', 'a', 'b'] cannot be applied to an image: "),
    ],
)  # fmt: skip
def test_augmentations_that_cannot_be_applied(entry: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        with_augmentations(entry)
    assert str(caught.value).startswith(message)


def test_augmentations_of_color_images_on_gray_ones() -> None:
    cfg = with_augmentations(["RandomSaturation", 0.5, 1.5])
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = "L", [100.0], [50.0]
    with pytest.raises(UserError, match=r"RandomSaturation.*RandomSaturation only works on RGB images"):
        validate_kd_config(cfg)


@pytest.mark.parametrize("entry", [["RandomRotation", [-5, 5]], ["RandomApply", ["RandomExtent", [1, 1], [0, 0]]]])
def test_augmentations_that_would_fill_a_semantic_segmentation(entry: list) -> None:
    cfg = with_augmentations(entry)
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    with pytest.raises(
        UserError, match=r"INPUT\.AUGMENTATIONS has Random(Rotation|Extent), which would fill the semantic"
    ):
        validate_kd_config(cfg)
