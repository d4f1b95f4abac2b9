#!/usr/bin/env python
"""Seconds and peak memory of ICD alone, forward and backward: 2 images of 800x1216, 256 channels.

    benchmarks/icd.py [--levels p3-p7|p2-p6] [--instances 10] [--rounds 7] [--threads 2] [--output FILE.json]

Encoding, decoder, auxiliary task, student's values and distillation loss, with gradients of the student's features and
of everything of ICD's own. Times: the median of the rounds after one that is thrown away. Memory: in a fresh process, above
what features and ICD itself take.
"""

import argparse
import json
import statistics
import time

from kd_d2.distillers import ICD
from kd_d2.distillers.icd.decoder import Decoder
from kd_d2.distillers.icd.encoding import InstanceEncoder
from kd_d2.distillers.icd.geometry import LevelGeometry
from kd_d2.distillers.icd.queries import FakeInstances, build_queries
from measuring import device_name, number_from_fresh_process, peak_memory

import torch
from detectron2.structures import Boxes, Instances

SIZE = (800, 1216)
BATCH, CHANNELS, NUM_CLASSES = 2, 256, 80
STRIDES = {"p3-p7": [8, 16, 32, 64, 128], "p2-p6": [4, 8, 16, 32, 64]}


class Bench:
    """ICD and its inputs; `run` is one forward and backward."""

    def __init__(self, levels: str, instances: int):
        torch.manual_seed(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        strides = STRIDES[levels]
        self.icd = ICD(
            weight=8.0,
            strides=strides,
            encoder=InstanceEncoder(NUM_CLASSES, 256),
            decoder=Decoder(CHANNELS, 256, 8, 1024, 1),
            student_channels=CHANNELS,
            fakes=FakeInstances(
                torch.ones(NUM_CLASSES), torch.full((NUM_CLASSES, 2), 0.2), torch.full((NUM_CLASSES, 2), 0.1)
            ),
        ).to(self.device)
        shapes = [(-(-SIZE[0] // s), -(-SIZE[1] // s)) for s in strides]
        self.teacher = [torch.randn(BATCH, CHANNELS, *shape, device=self.device) for shape in shapes]
        self.student = [torch.randn(BATCH, CHANNELS, *shape, device=self.device).requires_grad_() for shape in shapes]
        extent = torch.tensor([SIZE[1], SIZE[0]])
        self.targets = []
        for _ in range(BATCH):
            low, side = torch.rand(instances, 2) * 0.6, 0.05 + 0.3 * torch.rand(instances, 2)
            target = Instances(SIZE, gt_boxes=Boxes(torch.cat([low * extent, (low + side) * extent], 1)))
            target.gt_classes = torch.randint(NUM_CLASSES, (instances,))
            self.targets.append(target.to(self.device))

    def run(self) -> None:
        for tensor in (*self.student, *self.icd.parameters()):
            tensor.grad = None
        sizes = [SIZE] * BATCH
        queries = build_queries(self.targets, sizes, self.icd.fakes, **self.icd.query_options)
        geometry = LevelGeometry.of(self.teacher, sizes, SIZE)
        losses = self.icd.losses(self.icd.encoder(queries), queries, self.student, self.teacher, geometry)
        sum(losses.values()).backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", choices=STRIDES, default="p3-p7")
    parser.add_argument("--instances", type=int, default=10, help="of each image")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", help="json file for the figures")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args.levels, args.instances)
    if args.memory:
        print(peak_memory(bench.run))
        return
    seconds, cpu_seconds = [], []
    for _ in range(args.rounds + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        bench.run()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    memory = number_from_fresh_process(
        __file__, "--levels", args.levels, "--instances", args.instances, "--threads", args.threads, "--memory"
    )
    result = {
        "levels": args.levels,
        "instances": args.instances,
        "device": device_name(args.threads),
        "torch": torch.__version__,
        "seconds": seconds[1:],
        "cpu_seconds": cpu_seconds[1:],
        "memory_mib": memory,
    }
    print(
        f"{args.levels}, {args.instances} instances an image, {result['device']}: "
        f"{statistics.median(seconds[1:]):.3f} s ({statistics.median(cpu_seconds[1:]):.2f} CPU-seconds), {memory:.0f} MiB"
    )
    if args.output:
        with open(args.output, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
