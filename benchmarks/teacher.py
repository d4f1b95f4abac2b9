#!/usr/bin/env python
"""Measure the frozen teacher's forward pass up to its neck: unchanged, compiled, with channels last, and in bfloat16.

    benchmarks/teacher.py [--pair tiny|coco] [--rounds N] [--threads N]

Variants alternate over batches of several sizes, as in training. Ratios are to "as it is" in the same round. The pairs
are those of benchmarks/step.py. The first pass over all sizes includes compilation.
"""

import argparse
import contextlib
import copy
import statistics
from typing import NamedTuple

from kd_d2 import Teacher
from measuring import device_name, seconds
from step import PAIRS, Bench, batch_of

import torch
from tabulate import tabulate

WIDER = (1.0, 1.125, 1.25)  # factors on the image width of the pair


class Variant(NamedTuple):
    compiled: bool = False
    channels_last: bool = False
    bfloat16: bool = False


AS_IT_IS = "as it is"
VARIANTS = {
    AS_IT_IS: Variant(),
    "compiled": Variant(compiled=True),
    "channels last": Variant(channels_last=True),
    "both": Variant(compiled=True, channels_last=True),
    "bfloat16": Variant(bfloat16=True),
    "bfloat16 and both": Variant(compiled=True, channels_last=True, bfloat16=True),
}


class Forward:
    """The forward passes of one variant over all batches."""

    def __init__(self, model: torch.nn.Module, batches: list[list[dict]], device: str, variant: Variant):
        self.teacher = Teacher(model, compiled=variant.compiled, channels_last=variant.channels_last)
        self.teacher.to(torch.device(device))
        self.batches = batches
        self.precision = torch.autocast(device, torch.bfloat16) if variant.bfloat16 else contextlib.nullcontext()

    def __call__(self) -> None:
        with self.precision:
            for batch in self.batches:
                self.teacher(batch, frozenset({"features"}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="tiny")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    bench = Bench(args.pair)
    *_, images, (height, width) = PAIRS[args.pair]
    sizes = [(height, round(width * factor)) for factor in WIDER]
    batches = [batch_of(images, size, bench.teacher.spec.num_classes) for size in sizes]
    passes = {
        name: Forward(copy.deepcopy(bench.teacher.model), batches, bench.device, variant)
        for name, variant in VARIANTS.items()
    }
    first = {name: seconds(forward) for name, forward in passes.items()}
    times = {name: [] for name in passes}
    for _ in range(args.rounds):
        for name, forward in passes.items():
            times[name].append(seconds(forward))
    rows = []
    for name, values in times.items():
        ratios = [ours / plain for ours, plain in zip(values, times[AS_IT_IS], strict=True)]
        rows.append(
            [
                name,
                statistics.median(values) / len(sizes),
                statistics.median(ratios),
                min(ratios),
                max(ratios),
                first[name],
            ]
        )
    print(
        f"{args.pair}, {device_name(args.threads)}, torch {torch.__version__}, {args.rounds} rounds of {len(sizes)} sizes"
    )
    headers = ["", "s / batch", "ratio", "lowest", "highest", "s, first pass"]
    print(tabulate(rows, headers=headers, floatfmt=("", ".3f", ".3f", ".3f", ".3f", ".1f"), tablefmt="github"))


if __name__ == "__main__":
    main()
