"""Image size, channel order and normalization in MMDetection configs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import UserError
from .backbones import Keys
from .settings import Settings


def import_images(config: Mapping[str, Any], model: Settings) -> Keys:
    """Import what happens to a test image before the backbone.

    Args:
        config: the whole config.
        model: its entry "model".

    Returns:
        Config keys.

    Raises:
        UserError: normalization or resizing are missing, or not those of Detectron2.
    """
    steps = [*_steps(_test_pipeline(config))]
    if model.read("data_preprocessor", None) is None:  # MMDetection 2
        preprocessor = _step("Normalize", steps)
        is_rgb = preprocessor.choose("to_rgb", {True: True, False: False}, True)
    else:
        preprocessor = model.node("data_preprocessor")
        preprocessor.only(type="DetDataPreprocessor", rgb_to_bgr=False, pad_value=0)
        for name in (
            "pad_mask",
            "mask_pad_value",
            "pad_seg",
            "seg_pad_value",
            "pad_size_divisor",
            "boxtype2tensor",
            "non_blocking",
            "batch_augments",
        ):
            preprocessor.read(name, None)  # padding of labels, training, and padding to multiples of 32
        is_rgb = preprocessor.choose("bgr_to_rgb", {True: True, False: False}, False)
    mean, std = (preprocessor.numbers(name) for name in ("mean", "std"))
    preprocessor.check_all_read()
    short, long = sorted(_size(steps))
    return {
        "INPUT.FORMAT": "RGB" if is_rgb else "BGR",
        "MODEL.PIXEL_MEAN": mean,
        "MODEL.PIXEL_STD": std,
        "INPUT.MIN_SIZE_TEST": short,
        "INPUT.MAX_SIZE_TEST": long,
    }


def _test_pipeline(config: Mapping[str, Any]) -> Any:
    for path in (("test_dataloader", "dataset", "pipeline"), ("test_pipeline",), ("data", "test", "pipeline")):
        value: Any = config
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, list | tuple):
            return value
    raise UserError("The MMDetection config has no test_pipeline, from which the size of images is read.")


def _steps(pipeline: Any) -> Iterator[Mapping[str, Any]]:
    """Return the transforms of a pipeline, also those inside others."""
    for step in pipeline:
        if isinstance(step, Mapping):
            yield step
            if isinstance(step.get("transforms"), list | tuple):
                yield from _steps(step["transforms"])


def _step(kind: str, steps: list[Mapping[str, Any]]) -> Settings:
    for step in steps:
        settings = Settings(step, f"the test pipeline's {kind}")
        if settings.kind() == kind:
            return settings
    raise UserError(f"The MMDetection config has no {kind} in its test pipeline.")


def _size(steps: list[Mapping[str, Any]]) -> tuple[int, int]:
    """Return the two sides within which an image is resized."""
    resize = _step("Resize", steps)
    resize.choose("keep_ratio", {True: None}, False)
    scale = next((step["img_scale"] for step in steps if "img_scale" in step), None)  # MMDetection 2
    scale = resize.read("scale") if scale is None else scale
    if isinstance(scale, tuple | list) and len(scale) == 2 and all(type(side) is int for side in scale):
        return scale[0], scale[1]
    raise UserError(
        f"The MMDetection config resizes test images to {scale!r}; one size (long side, short side) is needed."
    )
