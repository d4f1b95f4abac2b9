#!/usr/bin/env python
"""Measure time and peak memory of a loss, forward and backward, compared to other implementations.

    benchmarks/losses.py ssim [--rounds 9] [--threads 2] [--output FILE.json]
    benchmarks/losses.py icd | soft-label [...]

Inputs are for 2 images of 800x1216 on levels P3 to P7: maps of 256 channels for SSIM, values of 8 heads of 32 channels
for ICD, logits of 80 classes and 9 anchors for SoftLabel; only the student has a gradient. Implementations alternate in
one process; ratios are to the first one in the same round. Memory is measured in a fresh process, above the inputs.
"plain" uses autograd, "compiled" also torch.compile. pytorch-msssim, if installed, does not pad: its maps are smaller.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kd_d2.losses import soft_label_loss, ssim_loss
from kd_d2.losses.icd import ATTENTION_EPS, LAYER_NORM_EPS, attended_value_loss
from kd_d2.losses.similarity import similarity_map
from measuring import device_name, number_from_fresh_process, peak_memory, seconds

import kornia
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

BATCH, CHANNELS, SIZE = 2, 256, (800, 1216)
HEADS, ANCHORS, CLASSES = 8, 9, 80
SIZES = [tuple(-(-side // stride) for side in SIZE) for stride in (8, 16, 32, 64, 128)]
POSITIONS = sum(height * width for height, width in SIZES)
WINDOW = 11

Implementation = Callable[..., Tensor]


@dataclass(frozen=True)
class Contest:
    """Implementations of one loss, called with each of `inputs`: a student tensor, a teacher tensor, and others."""

    inputs: Callable[[], list[list[Tensor]]]
    implementations: dict[str, Implementation]


def maps() -> list[list[Tensor]]:
    return [[torch.rand(BATCH, CHANNELS, *size) for _ in range(2)] for size in SIZES]


def values() -> list[list[Tensor]]:
    shape = BATCH, HEADS, POSITIONS
    return [[torch.randn(*shape, CHANNELS // HEADS), torch.randn(*shape, CHANNELS // HEADS), torch.rand(shape)]]


def logits() -> list[list[Tensor]]:
    return [[torch.randn(BATCH, POSITIONS * ANCHORS, CLASSES) for _ in range(2)]]


def window_of(maps: Tensor) -> int:
    return min(WINDOW, 2 * min(maps.shape[-2:]) - 1)


def plain_ssim(student: Tensor, teacher: Tensor) -> Tensor:
    return ((1 - similarity_map(student, teacher, window_of(student), 1.0, (1, 1, 1))) / 2).mean()


def msssim_package(student: Tensor, teacher: Tensor) -> Tensor:
    from pytorch_msssim import ssim

    return (1 - ssim(student, teacher, data_range=1.0, win_size=window_of(student))) / 2


def plain_icd(student: Tensor, teacher: Tensor, attention: Tensor) -> Tensor:
    ours, theirs = (F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS) for x in (student, teacher))
    error = (ours - theirs).square().mean(-1)
    return ((attention * error).sum(-1) / attention.sum(-1).clamp(min=ATTENTION_EPS)).mean()


def plain_soft_label(student: Tensor, teacher: Tensor) -> Tensor:
    target = teacher.sigmoid()
    return (target * (teacher - student) + F.softplus(student) - F.softplus(teacher)).sum()


def with_compiled(implementations: dict[str, Implementation], plain: Implementation) -> dict[str, Implementation]:
    return {**implementations, "plain": plain, "plain, compiled": torch.compile(plain, dynamic=False)}


CONTESTS = {
    "ssim": Contest(
        maps,
        with_compiled(
            {
                "kornia": lambda s, t: kornia.losses.ssim_loss(s, t, window_of(s)),
                "kd_d2": lambda s, t: ssim_loss(s, t, window_of(s)),
            },
            plain_ssim,
        ),
    ),
    "icd": Contest(values, with_compiled({"kd_d2": attended_value_loss}, plain_icd)),
    "soft-label": Contest(logits, with_compiled({"kd_d2": soft_label_loss}, plain_soft_label)),
}
if importlib.util.find_spec("pytorch_msssim"):
    CONTESTS["ssim"].implementations["pytorch-msssim"] = msssim_package


class Inputs:
    def __init__(self, contest: Contest):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        self.levels = [[x.to(device) for x in level] for level in contest.inputs()]
        for student, *_ in self.levels:
            student.requires_grad_()

    def forget(self) -> None:
        for student, *_ in self.levels:
            student.grad = None

    def run(self, implementation: Implementation) -> None:
        self.forget()
        sum(implementation(*level) for level in self.levels).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loss", choices=CONTESTS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", help="JSON file for the results")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    contest = CONTESTS[args.loss]
    implementations, inputs = contest.implementations, Inputs(contest)
    if args.memory_of:
        implementation = implementations[args.memory_of]
        inputs.run(implementation)  # exclude the memory of compilation
        inputs.forget()
        print(peak_memory(partial(inputs.run, implementation)))
        return

    times: dict[str, list[float]] = {name: [] for name in implementations}
    for _ in range(args.rounds + 1):
        for name, implementation in implementations.items():
            times[name].append(seconds(partial(inputs.run, implementation)))
    times = {name: values[1:] for name, values in times.items()}
    options = [args.loss, "--threads", args.threads]
    memory = {name: number_from_fresh_process(__file__, *options, "--memory-of", name) for name in implementations}
    reference = next(iter(implementations))
    rows = []
    for name in implementations:
        ratios = [a / b for a, b in zip(times[name], times[reference], strict=True)]
        middle = statistics.median(times[name]), statistics.median(ratios), min(ratios), max(ratios)
        rows.append([name, *middle, memory[name], memory[name] / memory[reference]])
    print(
        f"{args.loss}, {device_name(args.threads)}, torch {torch.__version__}, kornia {kornia.__version__}, {args.rounds} rounds"
    )
    headers = ["", "s", "ratio", "lowest", "highest", "MiB", "ratio"]
    print(tabulate(rows, headers=headers, floatfmt=("", ".5f", ".3f", ".3f", ".3f", ".0f", ".3f"), tablefmt="github"))
    if args.output:
        result = {
            "device": device_name(args.threads),
            "torch": torch.__version__,
            "kornia": kornia.__version__,
            "seconds": times,
            "memory_mib": memory,
        }
        with open(args.output, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
