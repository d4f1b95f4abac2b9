"""Drawing on images: sizes, colors and order of instances, labels, heat maps, sheets and files."""

from __future__ import annotations

from pathlib import Path

from kd_d2.analysis.drawing import PALETTE, draw_instances, overlay_heat, per_pixel, sheet, write_picture
from kd_d2.analysis.examples import pixels

import cv2
import matplotlib
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

pytestmark = pytest.mark.unit


def _objects(boxes: list[list[float]], classes: list[int]) -> Instances:
    return Instances((0, 0), gt_boxes=Boxes(torch.tensor(boxes).view(-1, 4)), gt_classes=torch.tensor(classes).long())


def _black(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ((24, 48), (48, 96)),  # the shorter side becomes min_side
        ((10, 1000), (10, 1000)),  # the longer side is at most four times min_side, unless the image is larger
        ((10, 96), (20, 192)),
        ((100, 60), (100, 60)),  # never smaller than the image
    ],
)
def test_sizes_of_drawings(size: tuple[int, int], drawn: tuple[int, int]) -> None:
    assert draw_instances(_black(*size), _objects([], []), [], min_side=48).shape == (*drawn, 3)


def test_small_boxes_are_drawn_over_large_ones() -> None:
    """Check the left side that two boxes share, in either order."""
    boxes = [[20.0, 100, 300, 380], [20.0, 100, 200, 380]]
    for order in ([0, 1], [1, 0]):
        drawn = draw_instances(_black(480, 480), _objects([boxes[i] for i in order], order), ["large", "small"])
        assert tuple(drawn[250, 20]) == PALETTE[1]


def test_a_class_without_name_and_beyond_the_colors() -> None:
    """Check that it has its number for a name, and the color of an earlier class."""
    number = len(PALETTE) + 1
    there = [[100.0, 100, 300, 300]]
    drawn = draw_instances(_black(480, 480), _objects(there, [number]), ["thing"])
    named = draw_instances(_black(480, 480), _objects(there, [1]), ["thing", str(number)])
    assert tuple(drawn[200, 100]) == PALETTE[1] and np.array_equal(drawn, named)


@pytest.mark.parametrize(
    "corner", [(0.0, 0.0), (470.0, 0.0), (0.0, 475.0), (470.0, 475.0), (-30.0, 520.0), (520.0, -30.0)]
)
def test_labels_are_inside_the_image(corner: tuple[float, float]) -> None:
    """Check the area of the label of a box at each corner of the image, or beyond, against that of one in the middle."""

    def plate(left: float, top: float) -> int:
        drawn = draw_instances(_black(480, 480), _objects([[left, top, left, top]], [0]), ["label"])
        return int((drawn != 0).any(2).sum())

    assert plate(*corner) == pytest.approx(plate(200, 200), rel=0.1)


def test_scores_are_on_labels() -> None:
    """Check the widths of the labels of an object and of a detection, whose label has its score."""
    boxes, labels = Boxes(torch.tensor([[100.0, 100, 300, 300]])), torch.tensor([0])
    found = Instances((480, 480), pred_boxes=boxes, pred_classes=labels, scores=torch.tensor([0.876]))
    detected = draw_instances(_black(480, 480), found, ["thing"])
    written = draw_instances(_black(480, 480), _objects([[100.0, 100, 300, 300]], [0]), ["thing 0.88"])
    assert np.array_equal(detected, written)


def test_long_names_leave_room_for_scores() -> None:
    """Check that scores of a class whose name is wider than the image are seen, but not where a box has none."""
    there, labels, names = Boxes(torch.tensor([[10.0, 100, 100, 300]])), torch.tensor([0]), ["a long name " * 10]
    drawn = [
        draw_instances(
            _black(480, 480),
            Instances((480, 480), pred_boxes=there, pred_classes=labels, scores=torch.tensor([score])),
            names,
        )
        for score in (0.41, 0.42)
    ]
    columns = (drawn[0] != drawn[1]).any((0, 2)).nonzero()[0]
    assert 460 < columns.min() <= columns.max() < 478


def test_masks_are_transparent() -> None:
    found = Instances((480, 480), pred_boxes=Boxes(torch.tensor([[100.0, 100, 300, 300]])), scores=torch.tensor([0.9]))
    found.pred_classes, found.pred_masks = torch.tensor([0]), torch.zeros(1, 480, 480, dtype=torch.bool)
    found.pred_masks[0, 150:250, 150:250] = True
    drawn = draw_instances(np.full((480, 480, 3), 100, np.uint8), found, ["thing"])
    assert drawn[200, 200].tolist() == [60 + int(0.4 * c) for c in PALETTE[0]]
    assert drawn[270, 270].tolist() == [100, 100, 100]


@pytest.mark.parametrize("masks", [
    PolygonMasks([[np.array([150.0, 150, 250, 150, 250, 250, 150, 250])]]),
    PolygonMasks([[np.array([150.0, 150, 250, 150, 250, 250]), np.array([150.0, 150, 250, 250, 150, 250])]]),
    BitMasks(torch.nn.functional.pad(torch.ones(1, 50, 50), (75, 115, 75, 115)) > 0),
])  # fmt: skip
def test_annotated_masks(masks: PolygonMasks | BitMasks) -> None:
    """Check a square from 150 to 250, as polygons, and as a bitmap of half the image's size."""
    truth = Instances((480, 480), gt_boxes=Boxes(torch.tensor([[100.0, 100, 300, 300]])), gt_masks=masks)
    truth.gt_classes = torch.tensor([0])
    drawn = draw_instances(np.full((480, 480, 3), 100, np.uint8), truth, ["thing"])
    assert drawn[200, 240].tolist() == [60 + int(0.4 * c) for c in PALETTE[0]]
    assert drawn[270, 270].tolist() == [100, 100, 100]


@pytest.mark.parametrize("is_truth", [True, False])
def test_keypoints(is_truth: bool) -> None:
    """Check a keypoint at twice the size of the image, and one that is not labeled or not sure."""
    shown, hidden = (1.0, 0.0) if is_truth else (0.06, 0.05)
    keypoints = torch.tensor([[[120.0, 80, shown], [60.0, 80, hidden]]])
    boxes = Boxes(torch.tensor([[40.0, 60, 200, 200]]))
    found = Instances((240, 240), pred_boxes=boxes, pred_keypoints=keypoints, scores=torch.tensor([0.9]))
    truth = Instances((240, 240), gt_boxes=boxes, gt_keypoints=Keypoints(keypoints))
    truth.gt_classes = found.pred_classes = torch.tensor([3])
    drawn = draw_instances(_black(240, 240), truth if is_truth else found, [])
    assert tuple(drawn[160, 240]) == PALETTE[3]
    assert drawn[160, 120].tolist() == drawn[80, 120].tolist() == [0, 0, 0]


def test_colors_of_heat() -> None:
    """Check the ends of the color map over a gray image, relative to the maximum or to a given value."""
    gray, heat = np.full((1, 2, 3), 200, np.uint8), np.array([[0.0, 3.0]])
    low, high = (np.array(matplotlib.colormaps["inferno"](x)[:3]) * 255 for x in (0.0, 1.0))
    expected = [np.round(0.35 * 200 + 0.65 * color).tolist() for color in (low, high)]
    assert overlay_heat(gray, heat)[0].tolist() == expected
    assert overlay_heat(gray, heat, largest=3.0)[0].tolist() == expected
    assert overlay_heat(gray, 0.0 * heat)[0].tolist() == expected[:1] * 2
    half = np.array(matplotlib.colormaps["inferno"](0.5)[:3]) * 255
    assert overlay_heat(gray, heat, largest=6.0)[0, 1].tolist() == np.round(70 + 0.65 * half).tolist()


def test_maps_of_images_that_are_no_multiple_of_the_stride() -> None:
    """Check two rows and three columns of cells of 8 pixels in an image of 12 x 20 pixels."""
    level = np.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], np.float32)
    found = per_pixel(level, 8, (12, 20))
    assert found.shape == (12, 20) and (found == found[0]).all()
    assert found[0, [0, 3, 8, 19]].tolist() == [0.0, 0.0, 0.5625, 1.9375]


def test_sheets_of_pictures_of_different_sizes() -> None:
    """Check the places of three pictures in two rows, and the white between and beside them."""
    one, two, three = (
        np.full((height, width, 3), value, np.uint8) for height, width, value in ((2, 3, 1), (5, 4, 2), (1, 2, 3))
    )
    found = sheet([[one, two], [three]], gap=2)
    expected = np.full((5 + 2 + 1 + 2, 3 + 2 + 4 + 2, 3), 255, np.uint8)
    expected[:2, :3], expected[:5, 5:9], expected[7, :2] = 1, 2, 3
    np.testing.assert_array_equal(found, expected)


def test_colors_of_written_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Check a red picture, in a folder that does not exist yet."""
    path = tmp_path / "new" / "red.png"
    write_picture(str(path), np.full((4, 4, 3), (200, 10, 20), np.uint8))
    assert cv2.imread(str(path))[0, 0].tolist() == [20, 10, 200]  # BGR
    assert capsys.readouterr().out == f"{path}\n"


@pytest.mark.parametrize(("order", "expected"), [("RGB", [1, 2, 3]), ("BGR", [3, 2, 1])])
def test_channels_of_examples(order: str, expected: list[int]) -> None:
    cfg = get_cfg()
    cfg.INPUT.FORMAT = order
    image = torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 5)
    found = pixels({"image": image}, cfg)
    assert found.shape == (4, 5, 3) and found[0, 0].tolist() == expected
