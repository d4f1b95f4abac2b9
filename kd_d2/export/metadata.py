"""Metadata of an exported file: the preprocessing of images and the meaning of the outputs."""

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
        detector: class name of the detector.
        class_names, category_ids: by the class index that the file returns.
        input_format: channel order, RGB or BGR. The input `image` is uint8 [3, height, width]; the file applies mean
            and standard deviation.
        min_size, max_size: the shorter side of an image is resized to min_size pixels (0: no resizing), or less, so
            that the longer side is at most max_size.
        fixed_size: [height, width] of the only supported input, or None. An image is resized to fit inside, and padded
            at the right and bottom.
        padding: padding value of each channel.
        size_divisibility: the file pads its input to a multiple of it.
        nms: whether the outputs are detections, the best first: `boxes` [N, 4] (left, top, right, bottom in input
            pixels), `scores` [N], `classes` [N], and for some detectors `masks` [N, M, M], probabilities inside boxes.
            Otherwise, for all anchors, `boxes` [R, 4], `scores` [R, classes], `levels` [R] for `decoding.decode`.
        score_threshold: detections have higher scores.
        nms_threshold, topk_candidates, max_detections: parameters of `decode`; None if `nms`.
        int8: whether convolutions are quantized.
        kd_d2_version: version of kd_d2 that wrote the file.
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
        """Return the entries as strings: text unchanged, everything else as JSON."""
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in asdict(self).items()}

    @classmethod
    def from_strings(cls, entries: Mapping[str, str], path: str) -> ExportMetadata:
        """Parse the entries of the file `path`. Raises a UserError if one is missing or invalid."""
        try:
            return cls(
                **{f.name: entries[f.name] if f.type == "str" else json.loads(entries[f.name]) for f in fields(cls)}
            )
        except (KeyError, ValueError) as error:
            raise UserError(f"{path} was not written by kd-d2 export: its metadata lack {error}.") from error

    def resize_transform(self, height: int, width: int) -> T.Transform:
        """Return the transform that resizes an image of this size."""
        if self.fixed_size is None:
            return resize_at_test(height, width, self.min_size, self.max_size)
        scale = min(self.fixed_size[0] / height, self.fixed_size[1] / width)
        return T.ResizeTransform(height, width, max(1, round(height * scale)), max(1, round(width * scale)))

    def padded(self, image: np.ndarray) -> np.ndarray:
        """Pad a resized image uint8 [3, H, W] to the input size of the file."""
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
