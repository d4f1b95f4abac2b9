"""Versions of the software that produced a result."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("kd_d2", "torch", "torchvision", "detectron2", "numpy", "pycocotools", "faster-coco-eval")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on, and the device."""
    found = {"python": platform.python_version()}
    found |= {package: text for package in PACKAGES if (text := _version(package))}
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        if package != "detectron2":
            return None
    import detectron2  # may be installed under another name

    return detectron2.__version__
