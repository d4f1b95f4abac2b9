#!/usr/bin/env python
"""Measure time and peak memory of ICD only, forward and backward, with 2 images of 800x1216 and 256 channels.

    benchmarks/icd.py [--levels p3-p7|p2-p6] [--instances 10] [--rounds 7] [--threads 2] [--output FILE.json]
                      [--authors CHECKOUT/pytorch_release]

This includes encoding, decoder, auxiliary task, student values and distillation loss, with gradients of the student's
features and ICD's parameters. Times are medians over the rounds after a warm-up round. Memory is measured in a fresh
process, above that of the features and ICD itself. With a checkout of the authors' repository, both codes alternate.
"""

import argparse
import json
import statistics
import time

from kd_d2.adapters import DetectorSpec
from kd_d2.distillers import ICD, Pair
from kd_d2.distillers.icd.geometry import LevelGeometry
from kd_d2.distillers.icd.queries import FakeInstances, build_queries
from measuring import device_name, number_from_fresh_process, peak_memory, seconds
from reference_icd import AuthorsICD

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances

SIZE = (800, 1216)
BATCH, CHANNELS, NUM_CLASSES = 2, 256, 80
STRIDES = {"p3-p7": [8, 16, 32, 64, 128], "p2-p6": [4, 8, 16, 32, 64]}


class Inputs:
    """Features of teacher and student, and instances of the images."""

    def __init__(self, levels: str, instances: int):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.strides = STRIDES[levels]
        shapes = [(-(-SIZE[0] // s), -(-SIZE[1] // s)) for s in self.strides]
        self.teacher = [torch.randn(BATCH, CHANNELS, *shape, device=self.device) for shape in shapes]
        self.student = [torch.randn(BATCH, CHANNELS, *shape, device=self.device).requires_grad_() for shape in shapes]
        extent = torch.tensor([SIZE[1], SIZE[0]])
        self.targets = []
        for _ in range(BATCH):
            low, side = torch.rand(instances, 2) * 0.6, 0.05 + 0.3 * torch.rand(instances, 2)
            target = Instances(SIZE, gt_boxes=Boxes(torch.cat([low * extent, (low + side) * extent], 1)))
            target.gt_classes = torch.randint(NUM_CLASSES, (instances,))
            self.targets.append(target.to(self.device))


class OurICD:
    """This library's ICD. `run` is one forward and backward pass."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        shapes = {stride: ShapeSpec(channels=CHANNELS, stride=stride) for stride in inputs.strides}
        spec = DetectorSpec("RetinaNet", "one-stage", shapes, NUM_CLASSES, None, frozenset({"features"}))
        self.icd = ICD(ICD.Config(), Pair(spec, spec, max_iter=90000))
        self.icd.fakes = FakeInstances(
            torch.ones(NUM_CLASSES), torch.full((NUM_CLASSES, 2), 0.2), torch.full((NUM_CLASSES, 2), 0.1)
        )
        self.icd.to(inputs.device)

    def run(self) -> None:
        for tensor in (*self.inputs.student, *self.icd.parameters()):
            tensor.grad = None
        sizes = [SIZE] * BATCH
        queries = build_queries(self.inputs.targets, sizes, self.icd.fakes, **self.icd.query_options)
        geometry = LevelGeometry.of(self.inputs.teacher, sizes, SIZE)
        encoded = self.icd.encoder(queries)
        losses = self.icd.losses(encoded, queries, self.inputs.student, self.inputs.teacher, geometry)
        sum(self.icd.scaled(losses).values()).backward()


def build(whose: str, args: argparse.Namespace) -> OurICD | AuthorsICD:
    torch.manual_seed(0)
    inputs = Inputs(args.levels, args.instances)
    if whose == "ours":
        return OurICD(inputs)
    return AuthorsICD(args.authors, inputs.teacher, inputs.student, inputs.targets, SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", choices=STRIDES, default="p3-p7")
    parser.add_argument("--instances", type=int, default=10, help="instances per image")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", help="JSON file for the results")
    parser.add_argument("--authors", metavar="FOLDER", help="pytorch_release of the authors' repository")
    parser.add_argument("--memory", choices=["ours", "authors"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        print(peak_memory(build(args.memory, args).run))
        return
    variants = {whose: build(whose, args) for whose in (["ours", "authors"] if args.authors else ["ours"])}
    wall_seconds = {whose: [] for whose in variants}
    cpu_seconds = {whose: [] for whose in variants}
    for _ in range(args.rounds + 1):
        for whose, variant in variants.items():
            cpu_start = time.process_time()
            wall_seconds[whose].append(seconds(variant.run))
            cpu_seconds[whose].append(time.process_time() - cpu_start)
    same = ["--levels", args.levels, "--instances", args.instances, "--threads", args.threads]
    same += ["--authors", args.authors] if args.authors else []
    result = {
        "levels": args.levels,
        "instances": args.instances,
        "device": device_name(args.threads),
        "torch": torch.__version__,
    }
    for whose in variants:
        result[whose] = {
            "seconds": wall_seconds[whose][1:],
            "cpu_seconds": cpu_seconds[whose][1:],
            "memory_mib": number_from_fresh_process(__file__, *same, "--memory", whose),
        }
    print(f"{args.levels}, {args.instances} instances an image, {result['device']}:")
    for whose in variants:
        time_, cpu_time = (statistics.median(result[whose][key]) for key in ("seconds", "cpu_seconds"))
        print(f"  {whose}: {time_:.3f} s ({cpu_time:.2f} CPU-seconds), {result[whose]['memory_mib']:.0f} MiB")
    if args.authors:
        ratios = [a / b for a, b in zip(result["ours"]["seconds"], result["authors"]["seconds"], strict=True)]
        memory = result["ours"]["memory_mib"] / result["authors"]["memory_mib"]
        print(
            f"  ours to the authors', round by round: {statistics.median(ratios):.2f} of the time "
            f"({min(ratios):.2f} to {max(ratios):.2f}), {memory:.2f} of the memory"
        )
    if args.output:
        with open(args.output, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
