"""Drawing on images: instances, heat maps, titles, grids of pictures. All images are RGB (H, W, 3) uint8."""

from __future__ import annotations

import os
from collections.abc import Sequence

import cv2
import matplotlib
import numpy as np
from detectron2.structures import Instances, PolygonMasks, polygons_to_bitmask
from PIL import Image, ImageDraw, ImageFont

from ..errors import UserError
from ..files import atomic_write
from ..fonts import font_file
from ..text import label, printable

PALETTE = (
    (230, 57, 70), (29, 120, 200), (42, 157, 80), (244, 140, 6), (131, 56, 200), (0, 150, 160), (214, 40, 140), (120, 90, 40),
    (90, 110, 20), (70, 70, 160),
)  # fmt: skip
LONGEST_ENLARGED = 4  # times min_side
TITLE_HEIGHT, TITLE_MARGIN, TITLE_SIZES = 34, 6, range(20, 10, -1)
WHITE, BLACK = (255, 255, 255), (30, 30, 30)
LEAST_SURE_KEYPOINT = 0.05  # as in Detectron2's drawings


def draw_instances(
    image: np.ndarray,
    instances: Instances,
    class_names: list[str],
    min_side: int = 480,
    colors: list[tuple[int, int, int]] | None = None,
    on_top: list[bool] | None = None,
) -> np.ndarray:
    """Draw boxes with class names and scores, and masks and keypoints if available.

    Args:
        image: RGB (H, W, 3) uint8; enlarged to a shorter side of `min_side` pixels, so that labels are readable.
        instances: `pred_boxes`, `pred_classes`, `scores`, or `gt_boxes`, `gt_classes`, in pixels of `image`. Of keypoints,
            those are drawn that are labeled, or predicted with a score above LEAST_SURE_KEYPOINT.
        class_names: by class index.
        colors: RGB of each instance; None for the colors of the classes.
        on_top: whether each instance is drawn after those for which it is False; otherwise large ones come first.

    Returns:
        RGB uint8.
    """
    scale = max(1.0, min(min_side / min(image.shape[:2]), LONGEST_ENLARGED * min_side / max(image.shape[:2])))
    canvas = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
    canvas = np.ascontiguousarray(canvas)
    is_truth = instances.has("gt_boxes")
    boxes = (instances.gt_boxes if is_truth else instances.pred_boxes).tensor.numpy() * scale
    classes = (instances.gt_classes if is_truth else instances.pred_classes).tolist()
    scores = [None] * len(classes) if is_truth else instances.scores.tolist()
    colors = colors or [PALETTE[label % len(PALETTE)] for label in classes]
    thickness = max(2, round(min(canvas.shape[:2]) / 320))
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = np.lexsort((-areas, on_top or [False] * len(boxes)))
    masks, points = _masks(instances, is_truth), _points(instances, is_truth)
    for i in order:
        left, top, right, bottom = boxes[i].round().astype(int)
        if masks is not None:
            _tint(canvas, masks[i], colors[i])
        cv2.rectangle(canvas, (left, top), (right, bottom), colors[i], thickness, cv2.LINE_AA)
    for i in order if points is not None else ():
        for point in points[i]:
            _dot(canvas, point * scale, colors[i], 2 * thickness)
    picture = Image.fromarray(canvas)
    plates: list[tuple[int, int, int, int]] = []
    for i in order:
        name = class_names[classes[i]] if classes[i] < len(class_names) else str(classes[i])
        score = "" if scores[i] is None else f" {scores[i]:.2f}"
        _label(picture, name, score, boxes[i][:2], colors[i], plates)
    return np.asarray(picture)


def _masks(instances: Instances, is_truth: bool) -> Sequence[np.ndarray] | None:
    """Return the mask (H, W) of each instance, of any resolution, or None."""
    if not instances.has("gt_masks" if is_truth else "pred_masks"):
        return None
    if not is_truth:
        return instances.pred_masks.numpy()
    if isinstance(instances.gt_masks, PolygonMasks):
        return [polygons_to_bitmask(polygons, *instances.image_size) for polygons in instances.gt_masks.polygons]
    return instances.gt_masks.tensor.numpy()


def _points(instances: Instances, is_truth: bool) -> list[np.ndarray] | None:
    """Return the visible keypoints (K, 2) of each instance, or None."""
    if not instances.has("gt_keypoints" if is_truth else "pred_keypoints"):
        return None
    keypoints = (instances.gt_keypoints.tensor if is_truth else instances.pred_keypoints).numpy()
    least = 0 if is_truth else LEAST_SURE_KEYPOINT
    return [of_instance[of_instance[:, 2] > least, :2] for of_instance in keypoints]


def _dot(canvas: np.ndarray, center: np.ndarray, color: tuple[int, int, int], radius: int) -> None:
    x, y = center.round().astype(int).tolist()
    cv2.circle(canvas, (x, y), radius + 1, WHITE, -1, cv2.LINE_AA)
    cv2.circle(canvas, (x, y), radius, color, -1, cv2.LINE_AA)


def _tint(canvas: np.ndarray, mask: np.ndarray, color: tuple[int, int, int]) -> None:
    height, width = canvas.shape[:2]
    inside = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0
    canvas[inside] = (0.6 * canvas[inside] + 0.4 * np.array(color)).astype(np.uint8)


def _label(
    picture: Image.Image, name: str, score: str, corner: np.ndarray, color: tuple[int, int, int], plates: list
) -> None:
    """Draw a name, truncated if it is too long, and a score above the corner of a box, inside the image, below plates."""
    name = label(name)
    font = ImageFont.truetype(font_file(name), max(11, min(picture.size) // 34))
    text = _truncated(name, font, picture.width - 6, score)
    draw = ImageDraw.Draw(picture)
    width, plate = int(draw.textlength(text, font)) + 6, sum(font.getmetrics()) + 2
    left = int(np.clip(corner[0], 0, max(0, picture.width - width)))
    lowest = max(0, picture.height - plate)
    tops = [int(np.clip(corner[1] + (step - 1) * plate, 0, lowest)) for step in range(6)]
    places = [(left, top, left + width, top + plate) for top in tops]
    place = next((p for p in places if not any(_overlap(p, other) for other in plates)), places[0])
    plates.append(place)
    draw.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=color)
    draw.text((place[0] + 3, place[1] + 1), text, fill=WHITE, font=font)


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def enlarged(image: np.ndarray, side: int, interpolation: int = cv2.INTER_CUBIC) -> np.ndarray:
    """Return a resized copy whose shorter side has `side` pixels."""
    scale = side / min(image.shape[:2])
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=interpolation)


def overlay_heat(
    image: np.ndarray, heat: np.ndarray, opacity: float = 0.65, largest: float | None = None
) -> np.ndarray:
    """Overlay a heat map on a darkened image, from black and violet (0) to yellow (maximum).

    Args:
        image: RGB (H, W, 3) uint8.
        heat: (h, w) of any size, nonnegative; interpolated to the size of the image.
        largest: the value shown in yellow, so that pictures can be compared; None for the maximum of the heat map.
    """
    height, width = image.shape[:2]
    heat = cv2.resize(heat.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    heat = heat / max(float(heat.max()) if largest is None else largest, 1e-12)
    colors = matplotlib.colormaps["inferno"](heat)[..., :3] * 255
    return np.round((1 - opacity) * image + opacity * colors).astype(np.uint8)


def per_pixel(level: np.ndarray, stride: int, image_size: tuple[int, int]) -> np.ndarray:
    """Interpolate a map of a level to the pixels (H, W) of an image (height, width), without the padding."""
    size = (level.shape[1] * stride, level.shape[0] * stride)
    return cv2.resize(level, size, interpolation=cv2.INTER_LINEAR)[: image_size[0], : image_size[1]]


def titled(image: np.ndarray, title: str) -> np.ndarray:
    """Add a strip with a title above the image; long titles are written smaller, then truncated."""
    title, strip = printable(title), Image.new("RGB", (image.shape[1], TITLE_HEIGHT), WHITE)
    room = strip.width - 2 * TITLE_MARGIN
    fonts = [ImageFont.truetype(font_file(title), size) for size in TITLE_SIZES]
    font = next((f for f in fonts if f.getlength(title) <= room), fonts[-1])
    written = _truncated(title, font, room)
    ImageDraw.Draw(strip).text((TITLE_MARGIN, TITLE_HEIGHT // 2), written, fill=BLACK, font=font, anchor="lm")
    return np.concatenate([np.asarray(strip), image])


def _truncated(text: str, font: ImageFont.FreeTypeFont, room: float, suffix: str = "") -> str:
    """Return the text with the suffix, and with an ellipsis in place of characters for which there is no room."""
    written = text + suffix
    while text and font.getlength(written) > room:
        text, written = text[:-1], text[:-1].rstrip() + "\u2026" + suffix
    return written


def sheet(rows: list[list[np.ndarray]], gap: int = 8) -> np.ndarray:
    """Arrange rows of pictures on a white background."""
    joined = []
    for row in rows:
        bottom = max(p.shape[0] for p in row) + gap
        padded = [np.pad(p, ((0, bottom - p.shape[0]), (0, gap), (0, 0)), constant_values=255) for p in row]
        joined.append(np.concatenate(padded, axis=1))
    width = max(r.shape[1] for r in joined)
    return np.concatenate([np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0)), constant_values=255) for r in joined])


def save_picture(path: str, image: np.ndarray) -> None:
    """Save an image to a file, and create its folder if it does not exist."""
    is_encoded, content = cv2.imencode(os.path.splitext(path)[1], image[:, :, ::-1])
    if not is_encoded:
        height, width = image.shape[:2]
        raise UserError(f"The picture {path} cannot be written: its format does not allow {width} x {height} pixels.")
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with atomic_write(path, "wb") as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"The picture {path} cannot be written: {error.strerror}.") from error


def write_picture(path: str, image: np.ndarray) -> None:
    """Save an image to a file, and print its path."""
    save_picture(path, image)
    print(printable(path), flush=True)
