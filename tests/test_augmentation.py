"""Large-scale jitter from the config: images and boxes after the transform, computed by hand."""

from pathlib import Path

from kd_d2.config import add_kd_config
from kd_d2.config.validation import validate_kd_config
from kd_d2.data.augmentation import build_mapper
from kd_d2.errors import UserError
from kd_d2.random_state import seeded

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import BoxMode
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
