#!/usr/bin/env python
"""Seconds and peak memory of the SSIM loss, forward and backward, beside other libraries'.

    benchmarks/ssim.py [--levels 5] [--rounds 9] [--threads 2] [--output FILE.json]

Maps: the levels P3 to P7 of 2 images of 800x1216 with 256 channels; the gradient goes to the student. The implementations
take turns, round after round, in one process: ratios are to kornia in the same round. Memory: in a fresh process, above what
the maps take. On a GPU the plain form takes part through torch.compile too. pytorch-msssim takes part where it is installed; it smooths without padding, so its maps are smaller.
"""

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from functools import partial

from kd_d2.losses import ssim_loss
from kd_d2.losses.similarity import similarity_map
from measuring import device_name, number_from_fresh_process, peak_memory, seconds

import kornia
import torch
from tabulate import tabulate
from torch import Tensor

BATCH, CHANNELS, SIZE = 2, 256, (800, 1216)
STRIDES = (8, 16, 32, 64, 128)
WINDOW = 11
REFERENCE = "kornia"


def _pytorch_msssim(student: Tensor, teacher: Tensor, window: int) -> Tensor:
    from pytorch_msssim import ssim

    return (1 - ssim(student, teacher, data_range=1.0, win_size=window)) / 2


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "kornia": lambda s, t, window: kornia.losses.ssim_loss(s, t, window),
    "fused": ssim_loss,
    "plain": lambda s, t, window: ((1 - similarity_map(s, t, window, 1.0, (1, 1, 1))) / 2).mean(),
}
if torch.cuda.is_available():
    IMPLEMENTATIONS["plain, compiled"] = torch.compile(IMPLEMENTATIONS["plain"], dynamic=True)
if importlib.util.find_spec("pytorch_msssim"):
    IMPLEMENTATIONS["pytorch-msssim"] = _pytorch_msssim


class Pyramid:
    def __init__(self, levels: int):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        shapes = [(BATCH, CHANNELS, *(-(-side // stride) for side in SIZE)) for stride in STRIDES[:levels]]
        self.teacher = [torch.rand(shape, device=device) for shape in shapes]
        self.student = [torch.rand(shape, device=device, requires_grad=True) for shape in shapes]

    def run(self, implementation: str) -> None:
        for student in self.student:
            student.grad = None
        losses = [
            IMPLEMENTATIONS[implementation](s, t, min(WINDOW, 2 * min(s.shape[-2:]) - 1))
            for s, t in zip(self.student, self.teacher, strict=True)
        ]
        sum(losses).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=int, default=len(STRIDES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", help="json file for the figures")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pyramid = Pyramid(args.levels)
    if args.memory_of:
        print(peak_memory(partial(pyramid.run, args.memory_of)))
        return

    times: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(args.rounds + 1):
        for name in IMPLEMENTATIONS:
            times[name].append(seconds(partial(pyramid.run, name)))
    times = {name: values[1:] for name, values in times.items()}
    options = ["--levels", args.levels, "--threads", args.threads]
    memory = {n: number_from_fresh_process(__file__, *options, "--memory-of", n) for n in IMPLEMENTATIONS}
    ratios = {n: [a / b for a, b in zip(times[n], times[REFERENCE], strict=True)] for n in IMPLEMENTATIONS}
    rows = [
        [
            name,
            statistics.median(times[name]),
            statistics.median(ratios[name]),
            min(ratios[name]),
            max(ratios[name]),
            memory[name],
            memory[name] / memory[REFERENCE],
        ]
        for name in IMPLEMENTATIONS
    ]
    print(f"{device_name(args.threads)}, torch {torch.__version__}, kornia {kornia.__version__}, {args.rounds} rounds")
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
