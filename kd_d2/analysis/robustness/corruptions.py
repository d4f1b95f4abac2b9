"""Corruptions of "Benchmarking Robustness in Object Detection" (Michaelis et al. 2019), reproducible to the pixel."""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from ...errors import UserError
from ...random_state import preserved_random_state

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST_SIDE = 32


def corrupt(image: np.ndarray, corruption: str, severity: int, identity: int | str) -> np.ndarray:
    """Corrupt an image.

    Args:
        image: uint8, (H, W, 3), RGB, both sides at least 32 pixels.
        corruption: one of CORRUPTIONS.
        severity: 1 to 5.
        identity: id of the image, which seeds the random numbers together with corruption and severity. The state of
            the global generators is preserved.

    Raises:
        UserError: a side is shorter than 32 pixels, or imagecorruptions is not installed.
    """
    check_large_enough(image.shape[:2], identity)
    functions = load_corruptions()
    seed = zlib.crc32(f"{identity}/{corruption}/{severity}".encode())
    # Two of them take a seed instead of using NumPy's global generator.
    own = {"seed": seed} if "seed" in inspect.signature(functions[corruption]).parameters else {}
    with preserved_random_state(cuda=False), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.random.seed(seed)
        return np.uint8(functions[corruption](Image.fromarray(image), severity, **own))


def check_large_enough(size: tuple[int, int], identity: int | str) -> None:
    """Raise a UserError if the height or width of an image is too small for the corruptions."""
    if min(size) < SMALLEST_SIDE:
        raise UserError(
            f"The image {identity} has {size[1]} x {size[0]} pixels; corruptions need {SMALLEST_SIDE} a side."
        )


def load_corruptions() -> dict[str, Callable]:
    """Return the corruption functions by name.

    Raises:
        UserError: the package imagecorruptions is not installed.
    """
    try:
        from imagecorruptions import corruption_dict
    except ImportError as error:
        raise UserError(
            f"The package imagecorruptions-imaug or one of its dependencies is not installed ({error}): "
            "pip install 'kd_d2[robustness]' and then pip install --no-deps imagecorruptions-imaug."
        ) from error
    return corruption_dict
