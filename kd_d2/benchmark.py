"""Speed and size of trained and exported detectors, measured in turns on the same images."""

from __future__ import annotations

import logging
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .operations import device_of, multiply_adds
from .predictor import ImageDetector
from .tables import markdown_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Speed:
    """Measurements of one detector.

    Attributes:
        title: name of the detector.
        runtime: "PyTorch" with the device, or the format of an exported file.
        input_size: height and width of the first image after resizing.
        parameters: number of parameters; None for an exported file.
        multiply_adds: for the first image (see `multiply_adds`); None if they are unknown.
        size_bytes: size of the weights, or of an exported model's files.
        resizing_ms: median time to resize an image, in milliseconds.
        ms, ms_90: median and 90th percentile of the time per image in the model, including the NMS, in milliseconds.
        ratio: median over rounds of the time relative to the first detector's in the same round.
    """

    title: str
    runtime: str
    input_size: tuple[int, int]
    parameters: int | None
    multiply_adds: float | None
    size_bytes: int
    resizing_ms: float
    ms: float
    ms_90: float
    ratio: float


@dataclass(frozen=True)
class Candidate:
    """A detector to measure.

    Attributes:
        title, runtime: see `Speed`.
        detector: the detector.
        files: the files of an exported model.
    """

    title: str
    runtime: str
    detector: ImageDetector
    files: tuple[str, ...] = ()


def benchmark(
    candidates: Sequence[Candidate], images: dict[str, list[np.ndarray]], rounds: int, batch: int = 1
) -> list[Speed]:
    """Measure detectors in turns: in each round, all of them on each image. A round before the first is not counted.

    Args:
        candidates: detectors; times are also given relative to those of the first.
        images: images by `input_format` of the detectors, (H, W, C) each.
        rounds: number of rounds.
        batch: number of copies of an image in a batch; exported files process them one by one.
    """
    seconds: list[list[list[tuple[float, float]]]] = [[] for _ in candidates]
    for number in range(rounds + 1):
        for candidate, measured in zip(candidates, seconds, strict=True):
            of_round = [_measure(candidate.detector, image, batch) for image in images[candidate.detector.input_format]]
            measured += [of_round] if number else []
    return [
        _speed(candidate, measured, seconds[0], images) for candidate, measured in zip(candidates, seconds, strict=True)
    ]


@torch.no_grad()
def _measure(detector: ImageDetector, image: np.ndarray, batch: int) -> tuple[float, float]:
    """Return the seconds per image to resize an image and to detect objects in it."""
    start = time.perf_counter()
    entry = detector.prepare(image)
    resized = time.perf_counter()
    detector.model([entry] * batch)
    if isinstance(detector.model, nn.Module) and device_of(detector.model).type == "cuda":
        torch.cuda.synchronize()
    return resized - start, (time.perf_counter() - resized) / batch


def _speed(
    candidate: Candidate,
    rounds: list[list[tuple[float, float]]],
    of_first: list[list[tuple[float, float]]],
    images: dict[str, list[np.ndarray]],
) -> Speed:
    detector = candidate.detector
    resizing, detecting = (np.array([[pair[part] for pair in of_round] for of_round in rounds]) for part in (0, 1))
    first = np.array([[pair[1] for pair in of_round] for of_round in of_first])
    size = tuple(detector.prepare(images[detector.input_format][0])["image"].shape[1:])
    model = detector.model
    is_module = isinstance(model, nn.Module)
    return Speed(
        candidate.title,
        candidate.runtime,
        size,
        sum(p.numel() for p in model.parameters()) if is_module else None,
        _multiply_adds(candidate.title, model, size) if is_module else None,
        _bytes_of_weights(model) if is_module else sum(map(os.path.getsize, candidate.files)),
        1000 * float(np.median(resizing)),
        1000 * float(np.median(detecting)),
        1000 * float(np.quantile(detecting, 0.9)),
        statistics.median(detecting.mean(1) / first.mean(1)),
    )


def _bytes_of_weights(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def _multiply_adds(title: str, model: nn.Module, size: tuple[int, int]) -> float | None:
    try:
        return multiply_adds(model, *size)
    except Exception as error:  # of a detector from elsewhere
        logger.warning(f"The multiply-adds of {title} cannot be counted: {type(error).__name__}: {error}")
        return None


HEADERS = (
    "detector",
    "runtime",
    "input",
    "parameters M",
    "GFLOPs",
    "MB",
    "resizing ms",
    "ms / image",
    "90th percentile",
    "relative",
)


def table(speeds: Sequence[Speed]) -> str:
    """Return a Markdown table."""
    rows = [
        (
            speed.title,
            speed.runtime,
            "{} x {}".format(*speed.input_size),
            "" if speed.parameters is None else f"{speed.parameters / 1e6:.2f}",
            "" if speed.multiply_adds is None else f"{speed.multiply_adds / 1e9:.2f}",
            f"{speed.size_bytes / 1e6:.1f}",
            f"{speed.resizing_ms:.1f}",
            f"{speed.ms:.1f}",
            f"{speed.ms_90:.1f}",
            f"{speed.ratio:.2f}",
        )
        for speed in speeds
    ]
    return markdown_table(HEADERS, rows, left=3)


def machine() -> dict[str, Any]:
    """Return processor, GPU if there is one, number of PyTorch's threads, and its version."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"processor": _processor(), **gpu, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def as_json(speeds: Sequence[Speed], machine: dict[str, Any]) -> dict[str, Any]:
    """Return the content of the JSON file: `machine`, and the fields of each `Speed`."""
    return {"machine": machine, "detectors": [asdict(speed) for speed in speeds]}
