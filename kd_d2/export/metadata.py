"""What an exported file says about itself: how images are prepared for it, and what its outputs mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import numpy as np
from detectron2.data import transforms as T

from .. import __version__
from ..data.images import resize_at_test
from ..errors import UserError


@dataclass(frozen=True)
class ExportMetadata:
    """The entries of ONNX's metadata_props, of kd_d2.json in a TorchScript file, and of OpenVINO's rt_info.

    Attributes:
        detector: its class.
        class_names, category_ids: by the class index that the file returns.
        input_format: order of the channels, RGB or BGR. The input `image` is uint8 [3, height, width]; mean and standard
            deviation are inside.
        min_size, max_size: the shorter side of an image is resized to min_size pixels (0: not at all), or less, so that
            the longer is at most max_size.
        fixed_size: [height, width] of the one size that the input may have, or None. An image is resized to fit inside,
            and padded at its right and bottom.
        padding: value of that padding in each channel.
        size_divisibility: the file itself pads to a multiple of it.
        nms: whether the outputs are detections, the best first: `boxes` [N, 4] (left, top, right, bottom in pixels of the
            input), `scores` [N], `classes` [N], and of some detectors `masks` [N, M, M], probabilities inside the box.
            If not: of all anchors `boxes` [R, 4], `scores` [R, classes] and `levels` [R], for `decoding.decode`.
        score_threshold: detections have a higher score.
        nms_threshold, topk_candidates, max_detections: what `decode` needs; None if `nms`.
        int8: whether convolutions are quantized.
        kd_d2_version: of the program that wrote the file.
    """

    detector: str
    class_names: list[str]
    category_ids: list[int]
    input_format: str
    min_size: int
    max_size: int
    fixed_size: list[int] | None
    padding: list[int]
    size_divisibility: int
    nms: bool
    score_threshold: float
    nms_threshold: float | None = None
    topk_candidates: int | None = None
    max_detections: int | None = None
    int8: bool = False
    kd_d2_version: str = __version__

    def to_strings(self) -> dict[str, str]:
        """Text as it is, everything else as JSON."""
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in asdict(self).items()}

    @classmethod
    def from_strings(cls, entries: Mapping[str, str], path: str) -> ExportMetadata:
        """
        Raises:
            UserError: an entry is missing or has another form: the file `path` is not one that kd-d2 wrote.
        """
        try:
            return cls(
                **{f.name: entries[f.name] if f.type == "str" else json.loads(entries[f.name]) for f in fields(cls)}
            )
        except (KeyError, ValueError) as error:
            raise UserError(f"{path} was not written by kd-d2 export: its metadata lack {error}.") from error

    def resize_transform(self, height: int, width: int) -> T.Transform:
        """How an image of this size is resized."""
        if self.fixed_size is None:
            return resize_at_test(height, width, self.min_size, self.max_size)
        scale = min(self.fixed_size[0] / height, self.fixed_size[1] / width)
        return T.ResizeTransform(height, width, max(1, round(height * scale)), max(1, round(width * scale)))

    def padded(self, image: np.ndarray) -> np.ndarray:
        """The input that the file takes, of a resized image uint8 [3, H, W]."""
        if self.fixed_size is None:
            return np.ascontiguousarray(image)
        canvas = np.empty((3, *self.fixed_size), np.uint8)
        canvas[:] = np.array(self.padding, np.uint8)[:, None, None]
        canvas[:, : image.shape[1], : image.shape[2]] = image
        return canvas


class Resize(T.Augmentation):
    """`ExportMetadata.resize_transform` as an augmentation of Detectron2's DatasetMapper."""

    def __init__(self, metadata: ExportMetadata):
        super().__init__()
        self.metadata = metadata

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return self.metadata.resize_transform(*image.shape[:2])
