"""Rendering of synthetic images: overlapping textured shapes of eight classes on cluttered backgrounds.

Color and rotation are independent of the class. A checkerboard differs from a square only by its texture, which other
shapes may also have. At least MIN_VISIBLE of each object's area is visible.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

CLASSES: tuple[str, ...] = (
    "circle", "ring", "square", "checkerboard", "triangle", "hexagon", "star", "cross",
)  # fmt: skip
MIN_VISIBLE = 0.5  # fraction of an object's whole area, including the part outside the image
DRAWING_VERSION = 3  # increment when the drawing changes, so that older sets are not reused
SUPERSAMPLING = 4

_MAX_STRETCH = 1.3
_PLACEMENT_TRIALS = 12
_SHADOW_REACH = 10  # px

_TEXTURES = ("plain", "plain", "gradient", "noise", "stripes", "dots", "checks")


@dataclass(frozen=True)
class Style:
    """Parameters that determine the difficulty of the images.

    Attributes:
        object_counts: probabilities of 1, 2, ... objects in a non-empty image.
        object_sizes: minimum and maximum ratio of the longer box side to the longer image side.
        empty_rate: fraction of images without objects.
        rotations: minimum and maximum rotation of objects in radians; at -pi / 2 stars and triangles point up.
        min_visible: minimum visible fraction of each object's area, which includes the part outside the image.
        textures: textures to sample from for all objects except checkerboards.
        contrast: minimum Euclidean distance between an object's color and what it covers, channels in 0..255.
        hue_of_class: whether each class has its own hue, on pale backgrounds.
        clutter, lines: maximum numbers of fragments and lines under the objects.
        degrade: whether blur, contrast and noise vary.
    """

    object_counts: tuple[float, ...] = (0.06, 0.12, 0.18, 0.2, 0.18, 0.14, 0.12)
    object_sizes: tuple[float, float] = (0.14, 0.55)
    empty_rate: float = 0.03
    rotations: tuple[float, float] = (0.0, 2 * math.pi)
    min_visible: float = MIN_VISIBLE
    textures: tuple[str, ...] = _TEXTURES
    contrast: float = 130.0
    hue_of_class: bool = False
    clutter: int = 2
    lines: int = 2
    degrade: bool = True


STYLES = {
    "cluttered": Style(),
    "clear": Style(
        object_counts=(0.1, 0.25, 0.3, 0.25, 0.1),
        object_sizes=(0.22, 0.5),
        empty_rate=0.0,
        rotations=(-math.pi / 2 - 0.35, -math.pi / 2 + 0.35),
        min_visible=0.8,
        textures=("plain", "gradient"),
        contrast=110.0,
        hue_of_class=True,
        clutter=0,
        lines=1,
        degrade=False,
    ),
}
"""Drawing styles by name; "clear" can be learned in minutes."""

Outline = list[np.ndarray]  # closed polygons [K, 2] of (x, y), filled by the even-odd rule


# ---------------------------------------------------------------------------------------------- outlines


def _regular_polygon(corners: int, radius: float = 1.0) -> np.ndarray:
    angles = 2 * math.pi * np.arange(corners) / corners
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _square() -> np.ndarray:
    return np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])


def _star(rng: np.random.Generator) -> np.ndarray:
    corners = _regular_polygon(10)
    corners[1::2] *= rng.uniform(0.38, 0.5)
    return corners


def _cross(rng: np.random.Generator) -> np.ndarray:
    a = rng.uniform(0.26, 0.4)
    quarter = np.array([[1.0, -a], [1.0, a], [a, a]])
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k).T for k in range(4)])


_CLASS_OUTLINES: dict[str, Callable[[np.random.Generator], Outline]] = {
    "circle": lambda rng: [_regular_polygon(48)],
    "ring": lambda rng: [_regular_polygon(48), _regular_polygon(48, rng.uniform(0.45, 0.65))],
    "square": lambda rng: [_square()],
    "checkerboard": lambda rng: [_square()],
    "triangle": lambda rng: [_regular_polygon(3)],
    "hexagon": lambda rng: [_regular_polygon(6)],
    "star": lambda rng: [_star(rng)],
    "cross": lambda rng: [_cross(rng)],
}


def _blob(rng: np.random.Generator) -> Outline:
    angles = 2 * math.pi * np.arange(40) / 40
    radius = np.ones(40)
    for harmonic in (2, 3, 5):
        height = rng.uniform(0.12, 0.5) / harmonic**0.5
        radius += height * np.cos(harmonic * angles + rng.uniform(0, 2 * math.pi))
    radius = np.maximum(radius, 0.15)
    return [np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)]


def _band(rng: np.random.Generator) -> Outline:
    """Return a segment of an annulus, too short to be mistaken for an occluded ring."""
    angles = np.linspace(0, rng.uniform(0.6, 2.2), 16)
    arc = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return [np.concatenate([arc, rng.uniform(0.7, 0.9) * arc[::-1]])]


def _corner(rng: np.random.Generator) -> Outline:
    a, b = rng.uniform(0.15, 0.35, size=2)
    return [np.array([[0, 0], [1, 0], [1, a], [b, a], [b, 1], [0, 1]])]


def _zigzag(rng: np.random.Generator) -> Outline:
    x = np.linspace(-1, 1, int(rng.integers(4, 8)))
    edge = np.stack([x, 0.25 * (-1.0) ** np.arange(len(x))], axis=1)
    return [np.concatenate([edge, edge[::-1] + [0.0, rng.uniform(0.15, 0.3)]])]


def _bar(rng: np.random.Generator) -> Outline:
    return [_square() * [1.0, rng.uniform(0.06, 0.18)]]


_CLUTTER_OUTLINES = (_blob, _blob, _band, _corner, _zigzag, _bar)


@dataclass(frozen=True)
class Shape:
    """An outline in image coordinates, with the affine map from its own frame, about [-1, 1]."""

    outline: Outline
    linear: np.ndarray
    center: np.ndarray

    @property
    def area(self) -> float:
        """Whole area in px^2, including occluded parts and parts outside the image."""
        outer, *holes = (cv2.contourArea(polygon.astype(np.float32)) for polygon in self.outline)
        return outer - sum(holes)

    def shifted(self, offset: np.ndarray) -> Shape:
        return Shape([polygon + offset for polygon in self.outline], self.linear, self.center + offset)

    def own_coordinates(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return each pixel's coordinates in the shape's own frame, for textures that rotate and stretch with it."""
        inverse = np.linalg.inv(self.linear).astype(np.float32)
        x = np.arange(width, dtype=np.float32)[None, :] + np.float32(0.5 - self.center[0])
        y = np.arange(height, dtype=np.float32)[:, None] + np.float32(0.5 - self.center[1])
        return inverse[0, 0] * x + inverse[0, 1] * y, inverse[1, 0] * x + inverse[1, 1] * y


def _pose(
    rng: np.random.Generator,
    outline: Outline,
    size: float,
    center: np.ndarray,
    rotations: tuple[float, float] = (0.0, 2 * math.pi),
) -> Shape:
    """Stretch an outline, rotate it within `rotations` at random, and scale it to a longer box side of size px."""
    stretch = math.sqrt(_MAX_STRETCH) ** rng.uniform(-1, 1)
    angle = rng.uniform(*rotations)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    linear = rotation @ np.diag([stretch, 1 / stretch])
    linear *= size / np.ptp(outline[0] @ linear.T, axis=0).max()
    return Shape([polygon @ linear.T + center for polygon in outline], linear, center)


def rasterize(outline: Outline, height: int, width: int) -> np.ndarray:
    """Return the fraction of each pixel covered by the outline, float32 [height, width] in 0..1."""
    fraction_bits = 4
    fine = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    corners = [(polygon * SUPERSAMPLING - 0.5) * 2**fraction_bits for polygon in outline]
    cv2.fillPoly(fine, [np.round(c).astype(np.int32) for c in corners], 255, shift=fraction_bits)
    return cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


# ------------------------------------------------------------------------------------ colors and textures


def _color(rng: np.random.Generator) -> np.ndarray:
    return 255 * np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.05, 0.95), rng.uniform(0.15, 1.0)))


def _color_apart(rng: np.random.Generator, reference: np.ndarray, distance: float) -> np.ndarray:
    """Return a random color at a Euclidean distance (channels in 0..255) of at least `distance` from the reference."""
    while True:
        color = _color(rng)
        if np.linalg.norm(color - reference) >= distance:
            return color


def _color_of_class(rng: np.random.Generator, category: int, reference: np.ndarray, distance: float) -> np.ndarray:
    """Return a saturated color of the class's hue, relaxing `distance` from the reference until one is found."""
    while True:
        hue = (category / len(CLASSES) + rng.normal(0, 0.015)) % 1
        color = 255 * np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.7, 1.0), rng.uniform(0.45, 0.95)))
        if np.linalg.norm(color - reference) >= distance:
            return color
        distance *= 0.9


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """Return smooth noise in 0..1 with a length scale of about `cell` px."""
    rows, columns = math.ceil(height / cell) + 1, math.ceil(width / cell) + 1
    coarse = rng.random((rows, columns), dtype=np.float32)
    return np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)


def _wave(phase: np.ndarray) -> np.ndarray:
    return np.sin(phase * np.float32(math.pi))


def _steep(values: np.ndarray, slope: float) -> np.ndarray:
    return np.clip(0.5 + np.float32(slope) * values, 0, 1)


def _checks(u: np.ndarray, v: np.ndarray, cells: int) -> np.ndarray:
    scale = np.float32(cells / 2)
    return _steep(_wave((u + 1) * scale) * _wave((v + 1) * scale), 2.5)


def _texture(rng: np.random.Generator, kind: str, shape: Shape, height: int, width: int) -> np.ndarray:
    """Return the weight of the second of two colors at each pixel, float32 [height, width] in 0..1."""
    if kind == "plain":
        return np.full((height, width), rng.uniform(0, 0.3), np.float32)
    if kind == "noise":
        return _smooth_noise(rng, height, width, rng.uniform(1.5, 8))
    u, v = shape.own_coordinates(height, width)
    length = 2 * math.sqrt(abs(np.linalg.det(shape.linear)))  # px per extent [-1, 1] of the shape's own frame
    cells = int(np.clip(length / rng.uniform(4, 9), 3, 8))
    if kind == "checks":
        return _checks(u, v, cells)
    angle = rng.uniform(0, math.pi)
    along = u * np.float32(math.cos(angle)) + v * np.float32(math.sin(angle))
    if kind == "gradient":
        return np.clip(0.5 + 0.5 * along, 0, 1)
    if kind == "stripes":
        return _steep(_wave(along * np.float32(cells / 2)), 1.5)
    across = v * np.float32(math.cos(angle)) - u * np.float32(math.sin(angle))
    scale = np.float32(cells / 2)
    return _steep(_wave(along * scale) ** 2 * _wave(across * scale) ** 2 - np.float32(0.35), 4)  # dots


def _texture_of(rng: np.random.Generator, class_name: str | None, textures: tuple[str, ...]) -> str:
    if class_name == "checkerboard":
        return "checks"
    return str(rng.choice([kind for kind in textures if class_name != "square" or kind != "checks"]))


# ------------------------------------------------------------------------------------------------- scenes


def visible_box(visible: np.ndarray) -> tuple[int, int, int, int]:
    """Return the bounding box x, y, width, height in px of the pixels that are more than half visible."""
    return cv2.boundingRect((visible > 0.5).astype(np.uint8))


class Scene:
    """An image under construction, with the visible part of each object so far, back to front."""

    def __init__(self, canvas: np.ndarray, style: Style = STYLES["cluttered"]) -> None:
        self.style = style
        self.canvas = canvas.astype(np.float32)
        self.height, self.width = canvas.shape[:2]
        self.categories: list[int] = []
        self.whole_areas: list[float] = []
        self.visible: list[np.ndarray] = []

    def place(self, category: int, shape: Shape, coverage: np.ndarray) -> bool:
        """Place an object in front of the others unless this leaves too little of any object visible.

        Returns whether it was placed. The canvas is not changed; see `paint`.
        """
        visible = [earlier * (1 - coverage) for earlier in self.visible] + [coverage]
        areas = [*self.whole_areas, shape.area]
        if any(part.sum() < self.style.min_visible * area for part, area in zip(visible, areas, strict=True)):
            return False
        if any(not (part > 0.5).any() for part in visible):
            return False
        self.categories.append(category)
        self.visible, self.whole_areas = visible, areas
        return True

    def paint(
        self,
        rng: np.random.Generator,
        shape: Shape,
        coverage: np.ndarray,
        texture: str,
        category: int | None = None,
    ) -> None:
        """Draw a shape on the canvas in two colors that contrast with what it covers.

        Args:
            category: class index of the object; None for clutter.
        """
        x, y, w, h = visible_box(coverage)
        left, top = max(x - _SHADOW_REACH, 0), max(y - _SHADOW_REACH, 0)
        window = (slice(top, y + h + _SHADOW_REACH), slice(left, x + w + _SHADOW_REACH))
        canvas, coverage = self.canvas[window], coverage[window]
        covered = np.array(cv2.mean(canvas, (coverage > 0.5).astype(np.uint8))[:3])
        if self.style.hue_of_class and category is not None:
            first = _color_of_class(rng, category, covered, self.style.contrast)
            second = 0.3 * first
        else:
            first = _color_apart(rng, covered, self.style.contrast)
            second = _color_apart(rng, first, 110)
        ink = _ink(rng, (first, second), shape.shifted(np.array([-left, -top])), coverage, texture)
        if rng.random() < 0.3:
            canvas *= _shade_under(rng, coverage)[..., None]
        canvas += coverage[..., None] * (ink - canvas)


def _ink(
    rng: np.random.Generator, colors: tuple[np.ndarray, np.ndarray], shape: Shape, coverage: np.ndarray, texture: str
) -> np.ndarray:
    """Return the color of a shape at each pixel of a canvas."""
    height, width = coverage.shape
    first, second = colors
    mix = _texture(rng, texture, shape, height, width)[..., None]
    mix *= np.float32(1 if texture == "checks" else rng.uniform(0.1, 0.4))
    ink = (1 - mix) * first.astype(np.float32) + mix * second.astype(np.float32)
    if rng.random() < 0.5:
        u, _ = shape.own_coordinates(height, width)
        ink *= np.clip(1 + np.float32(rng.uniform(0.1, 0.35)) * u, 0.5, 1.5)[..., None]
    if rng.random() < 0.35:
        rim = coverage - cv2.erode(coverage, np.ones((3, 3), np.uint8))
        ink *= 1 - np.float32(rng.uniform(0.3, 0.8)) * rim[..., None]
    return ink


def _shade_under(rng: np.random.Generator, coverage: np.ndarray) -> np.ndarray:
    """Return the brightness factor of each pixel under a shape's shadow, in 0..1."""
    height, width = coverage.shape
    shift = np.array([[1, 0, rng.uniform(-3, 3)], [0, 1, rng.uniform(1, 4)]])
    shadow = cv2.GaussianBlur(cv2.warpAffine(coverage, shift, (width, height)), (0, 0), rng.uniform(1, 2))
    return 1 - np.float32(rng.uniform(0.2, 0.6)) * shadow


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    frame = Shape([], np.diag([width / 2, height / 2]), np.array([width / 2, height / 2]))
    ground = _color(rng)
    colors = [ground] + [np.clip(ground + rng.normal(0, 30, size=3), 0, 255) for _ in range(3)]
    first, second, third, fourth = (color.astype(np.float32) for color in colors)
    ramp = _texture(rng, "gradient", frame, height, width)[..., None]
    canvas = (1 - ramp) * first + ramp * second
    clouds = _smooth_noise(rng, height, width, rng.uniform(0.2, 0.6) * height)[..., None]
    canvas += np.float32(rng.uniform(0.2, 0.8)) * clouds * (third - canvas)
    if rng.random() < 0.25:
        pattern = _texture(rng, str(rng.choice(_TEXTURES)), frame, height, width)
        patch = _steep(_smooth_noise(rng, height, width, 0.4 * height) - np.float32(0.5), 6)
        canvas += np.float32(rng.uniform(0.2, 0.6)) * (pattern * patch)[..., None] * (fourth - canvas)
    return canvas


def _draw_lines(rng: np.random.Generator, canvas: np.ndarray, count: int) -> np.ndarray:
    """Draw thin lines and open curves across the canvas."""
    height, width = canvas.shape[:2]
    lined = canvas.copy()
    for _ in range(count):
        ends = rng.uniform(-0.1, 1.1, size=(3, 2)) * [width, height]
        t = np.linspace(0, 1, 12)[:, None]
        curve = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * ends[1] + t**2 * ends[2]
        color = tuple(float(channel) for channel in _color(rng))
        points = np.round(curve).astype(np.int32)
        cv2.polylines(lined, [points], False, color, int(rng.integers(1, 3)), cv2.LINE_AA)
    return canvas + np.float32(rng.uniform(0.4, 0.9)) * (lined - canvas)


def _draw_clutter(rng: np.random.Generator, scene: Scene) -> None:
    """Draw fragments of no class, before any objects."""
    for _ in range(int(rng.integers(0, scene.style.clutter + 1))):
        outline = _CLUTTER_OUTLINES[rng.integers(len(_CLUTTER_OUTLINES))](rng)
        size = _log_uniform(rng, 0.06, 0.25) * max(scene.height, scene.width)
        shape = _pose(rng, outline, size, rng.random(2) * [scene.width, scene.height])
        coverage = rasterize(shape.outline, scene.height, scene.width)
        if coverage.max() > 0.5:
            scene.paint(rng, shape, coverage, _texture_of(rng, None, scene.style.textures))


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _add_object(rng: np.random.Generator, scene: Scene) -> None:
    """Add an object to the scene, or none if no valid placement is found in _PLACEMENT_TRIALS trials."""
    category = int(rng.integers(len(CLASSES)))
    name = CLASSES[category]
    outline = _CLASS_OUTLINES[name](rng)
    extent = np.array([scene.width, scene.height])
    for _ in range(_PLACEMENT_TRIALS):
        size = _log_uniform(rng, *scene.style.object_sizes) * extent.max()
        center = rng.uniform(0.02, 0.98, size=2) * extent
        if scene.visible and rng.random() < 0.15:  # seek an overlap
            x, y, w, h = visible_box(scene.visible[rng.integers(len(scene.visible))])
            center = np.array([x + w / 2, y + h / 2]) + rng.uniform(-0.7, 0.7, size=2) * (w, h)
        shape = _pose(rng, outline, size, center, scene.style.rotations)
        coverage = rasterize(shape.outline, scene.height, scene.width)
        if scene.place(category, shape, coverage):
            scene.paint(rng, shape, coverage, _texture_of(rng, name, scene.style.textures), category)
            return


def _degrade(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    if rng.random() < 0.4:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.4, 1.0))
    canvas = (canvas - 128) * np.float32(rng.uniform(0.75, 1.1)) + np.float32(128 + rng.uniform(-20, 20))
    noise = rng.standard_normal(canvas.shape, dtype=np.float32)
    return canvas + np.float32(rng.uniform(0, 5)) * noise


def render(rng: np.random.Generator, image_size: int, style: Style) -> tuple[np.ndarray, Scene]:
    """Render an image, uint8 [H, W, 3] with a longer side of image_size px, and return it with its scene."""
    shorter = round(image_size * rng.uniform(0.68, 0.92))
    is_landscape = rng.random() < 0.6
    height, width = (shorter, image_size) if is_landscape else (image_size, shorter)
    background = _background(rng, height, width)
    if style.hue_of_class:
        background = 0.6 * 255 + 0.4 * background
    scene = Scene(background, style)
    scene.canvas = _draw_lines(rng, scene.canvas, int(rng.integers(0, style.lines + 1)))
    _draw_clutter(rng, scene)
    if rng.random() >= style.empty_rate:
        for _ in range(1 + int(rng.choice(len(style.object_counts), p=style.object_counts))):
            _add_object(rng, scene)
    if rng.random() < 0.3:
        scene.canvas = _draw_lines(rng, scene.canvas, min(style.lines, 1))
    canvas = _degrade(rng, scene.canvas) if style.degrade else scene.canvas
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8), scene
