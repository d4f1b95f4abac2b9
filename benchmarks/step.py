#!/usr/bin/env python
"""Measure time and peak memory of a training iteration: plain student, student with teacher, and with each method.

    benchmarks/step.py [--pair PAIR] [--batch N] [--bfloat16] [--methods NAME[+NAME] | recommended/NAME ...] [--rounds N] [--threads N]
        [--output FILE.json]

All variants share one student and one teacher, and alternate in one process. Times are medians over rounds, and ratios
are medians of the ratio to student and teacher without a method in the same round: to "student + teacher's neck" for
methods that use only features, to "student + teacher" for those that also use predictions. "s alone" is the time of a
method's losses and their gradients with respect to the detector outputs, and "of iteration" its ratio to the same
reference; both are omitted for methods that run part of a detector's head. Memory is the peak of one iteration above
the level before it: allocated memory on a GPU, otherwise the resident set size in a fresh process.

Pairs: "tiny", "tiny-gfl" and "tiny-faster-rcnn" are those of configs/tiny, R18 -> R10, with 8 images of 192x256. "coco"
and "coco-faster-rcnn" are Detectron2's RetinaNet and Faster R-CNN, R101 -> R50, with 2 images of 800x1216.
"""

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable

from kd_d2 import DISTILLER_REGISTRY, Distiller, KDMetaArch, Teacher, UserError, load_config
from kd_d2.adapters import build_adapter
from kd_d2.distillers import Pair, build_distiller
from kd_d2.engine.optimizers import build_optimizers
from kd_d2.engine.step import DistillationStep
from kd_d2.errors import exit_on_user_error
from measuring import device_name, number_from_fresh_process, peak_memory, seconds

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn

HERE = os.path.dirname(os.path.abspath(__file__))
CONFIGS = os.path.join(os.path.dirname(HERE), "configs")
TINY = os.path.join(CONFIGS, "tiny")
PAIRS = {
    "tiny": (f"{TINY}/retinanet-student.yaml", f"{TINY}/retinanet-teacher.yaml", 8, (192, 256)),
    "tiny-gfl": (f"{TINY}/gfl-student.yaml", f"{TINY}/gfl-teacher.yaml", 8, (192, 256)),
    "tiny-faster-rcnn": (f"{TINY}/faster-rcnn-student.yaml", f"{TINY}/faster-rcnn-teacher.yaml", 8, (192, 256)),
    "coco": ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "COCO-Detection/retinanet_R_101_FPN_3x.yaml", 2, (800, 1216)),
    "coco-faster-rcnn": (
        "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
        "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml",
        2,
        (800, 1216),
    ),
}
DATASET = "benchmark"
PLAIN, NECK, WHOLE = "student", "student + teacher's neck", "student + teacher"
BOXES = 7
PAST_WARM_UPS = 10**6  # iterations
TINY_RATE = "1e-12"
"""Learning rate that keeps the random weights constant: variants share the student, and losses would diverge."""


class ReadOnly(Distiller):
    """Requests parts of the teacher's outputs without adding a loss."""

    loss_names = ("loss_nothing",)

    def __init__(self, needs: frozenset[str], pair: Pair):
        super().__init__(self.Config(), pair)
        self.needs = needs

    def forward(self, student, teacher, targets):
        return self.idle_losses(like=student.images.tensor)


READ = {NECK: frozenset({"features"}), WHOLE: frozenset({"features", "dense"})}
HEAD_PARTS = ("proposals", "towers")
"""Prefixes of the parts that methods use to run part of a head themselves."""


class Bench:
    """The student and the teacher of a pair, and the training step of any variant."""

    def __init__(self, pair: str, batch: int | None = None, autocast: torch.dtype | None = None):
        student_config, teacher_config, usual_batch, size = PAIRS[pair]
        self.autocast = autocast
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        opts = ["MODEL.DEVICE", self.device, "MODEL.WEIGHTS", ""]
        self.cfg = load_config(student_config, [*opts, "SOLVER.BASE_LR", TINY_RATE])
        torch.manual_seed(0)
        self.student = _build(self.cfg)
        self.teacher = Teacher(_build(load_config(teacher_config, opts)))
        self.references = [PLAIN, *(name for name, needs in READ.items() if needs <= self.teacher.spec.provides)]
        self.data = batch_of(batch or usual_batch, size, self.teacher.spec.num_classes)
        self.cfg.DATASETS.TRAIN = (DATASET,)
        if DATASET in DatasetCatalog:
            DatasetCatalog.remove(DATASET)
        DatasetCatalog.register(DATASET, lambda: _as_dataset(self.data))

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device, self.autocast, enabled=self.autocast is not None)

    def methods(self) -> list[str]:
        """Return the names of the methods that support the pair."""
        return [name for name, _ in DISTILLER_REGISTRY if self._goes_with(name)]

    def _goes_with(self, method: str) -> bool:
        try:
            self.model(method)
        except UserError:
            return False
        return True

    def reference_of(self, variant: str) -> str:
        """Return the variant without a method that a variant is compared to."""
        if variant in self.references:
            return WHOLE if variant == WHOLE else NECK
        return (
            WHOLE if any("dense" in distiller.needs for distiller in self.model(variant).distillers.values()) else NECK
        )

    def model(self, variant: str) -> nn.Module:
        if variant == PLAIN:
            return self.student
        pair = Pair.from_config(self.cfg, build_adapter(self.student).spec, self.teacher.spec)
        if variant in READ:
            distillers = {"ReadOnly": ReadOnly(READ[variant], pair)}
        else:
            cfg, names = self.cfg, variant.split("+")
            if "/" in variant:
                cfg = cfg.clone()
                cfg.merge_from_other_cfg(CfgNode(CfgNode.load_yaml_with_base(f"{CONFIGS}/{variant}.yaml")))
                names = cfg.MODEL.KD.DISTILLERS
            distillers = {name: build_distiller(cfg, name, pair) for name in names}
        return KDMetaArch(student=self.student, teacher=self.teacher, distillers=distillers).to(self.device)

    def step(self, variant: str) -> DistillationStep:
        model = self.model(variant)
        step = DistillationStep(model, *build_optimizers(self.cfg, model), autocast=self.autocast)
        step._data_loader_iter_obj = itertools.repeat(self.data)
        return step

    def method_alone(self, variant: str) -> Callable[[], None] | None:
        """Return a function that runs only a method's losses and their gradients with respect to the detector outputs.

        It is None for a method that runs part of a head.
        """
        model = self.model(variant)
        needs = frozenset().union(*(distiller.needs for distiller in model.distillers.values()))
        if any(part.startswith(HEAD_PARTS) for part in needs):
            return None
        targets = [item["instances"].to(self.device) for item in self.data]
        self.teacher.to(model.device)
        with torch.no_grad(), self.precision():
            teacher = self.teacher(self.data, needs)
            student = model.adapter.run(self.data, needs, targets)
        student.features, student.losses = _leaves(student.features), {}
        if student.dense is not None:
            student.dense.logits = _leaves(student.dense.logits)
            student.dense.box_regression = _leaves(student.dense.box_regression)

        def run() -> None:
            for dense in filter(None, (student.dense, teacher.dense)):
                for lazy in ("positives", "probabilities", "ranking_scores", "boxes"):
                    vars(dense).pop(lazy, None)  # recomputed in every iteration
            with self.precision():
                losses = [
                    loss
                    for distiller in model.distillers.values()
                    for loss in distiller.scaled(distiller(student, teacher, targets)).values()
                ]
            sum(losses).backward()

        return run


def _leaves(levels: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    return {stride: level.detach().requires_grad_() for stride, level in levels.items()}


def _build(cfg: CfgNode) -> nn.Module:
    """Build a detector with random weights. Frozen norms do not normalize: scale them to keep activations bounded."""
    model = build_model(cfg)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.fill_(0.5)
    return model


def batch_of(batch: int, size: tuple[int, int], num_classes: int) -> list[dict]:
    inputs = []
    for _ in range(batch):
        corner = torch.rand(BOXES, 2) * torch.tensor([size[1] * 0.6, size[0] * 0.6])
        extent = 16 + torch.rand(BOXES, 2) * torch.tensor([size[1] * 0.35, size[0] * 0.35])
        target = Instances(size, gt_boxes=Boxes(torch.cat([corner, corner + extent], 1)))
        target.gt_classes = torch.randint(num_classes, (BOXES,))
        inputs.append({"image": torch.randint(256, (3, *size)).float(), "instances": target})
    return inputs


def _as_dataset(inputs: list[dict]) -> list[dict]:
    """Convert inputs to a dataset for methods that use statistics of the training set."""
    dicts = []
    for item in inputs:
        target = item["instances"]
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label}
            for box, label in zip(target.gt_boxes.tensor.tolist(), target.gt_classes.tolist(), strict=True)
        ]
        dicts.append({"height": target.image_size[0], "width": target.image_size[1], "annotations": annotations})
    return dicts


def measure_times(bench: Bench, variants: list[str], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every round by variant, after a warm-up round."""
    steps = {variant: bench.step(variant) for variant in variants}
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    with EventStorage(PAST_WARM_UPS):
        for number in range(rounds + 1):
            for variant, step in steps.items():
                times[variant].append(seconds(step.run_step))
            print(f"round {number}: " + ", ".join(f"{v} {t[-1]:.2f} s" for v, t in times.items()), flush=True)
    return {variant: values[1:] for variant, values in times.items()}


def measure_alone(bench: Bench, methods: list[str], rounds: int) -> dict[str, float]:
    """Return the median seconds of each method without the detectors, free of the noise of a whole iteration."""
    medians = {}
    with EventStorage(PAST_WARM_UPS):
        for method in methods:
            call = bench.method_alone(method)  # keeps the outputs of both detectors, so one at a time
            if call is not None:
                medians[method] = statistics.median([seconds(call) for _ in range(rounds + 1)][1:])
    return medians


def measure_memory(bench: Bench, variant: str) -> float:
    """Return the peak memory of one iteration above the memory before it, in MiB; on a CPU, only in a fresh process."""
    step = bench.step(variant)
    with EventStorage(PAST_WARM_UPS):
        return peak_memory(step.run_step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="tiny")
    parser.add_argument("--batch", type=int, help="images per iteration (default that of the pair)")
    parser.add_argument(
        "--methods",
        nargs="+",
        help="methods, joined by +, or a config in configs/ such as recommended/fgd (default all methods that support the pair)",
    )
    parser.add_argument("--bfloat16", action="store_true", help="mixed precision (default float32)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", help="JSON file for the results")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args.pair, args.batch, torch.bfloat16 if args.bfloat16 else None)
    if args.memory_of:
        print(measure_memory(bench, args.memory_of))
        return

    methods = args.methods or bench.methods()
    variants = [*bench.references, *methods]
    times = measure_times(bench, variants, args.rounds)
    alone = measure_alone(bench, methods, args.rounds)
    options = ["--pair", args.pair, "--threads", args.threads, *(["--batch", args.batch] if args.batch else [])]
    options += ["--bfloat16"] if args.bfloat16 else []
    memory = {
        v: measure_memory(bench, v)
        if bench.device == "cuda"
        else number_from_fresh_process(__file__, *options, "--memory-of", v)
        for v in variants
    }
    references = {v: times[bench.reference_of(v)] for v in variants}
    ratios = {v: [a / b for a, b in zip(times[v], references[v])] for v in variants}
    result = {
        "pair": args.pair,
        "batch": len(bench.data),
        "precision": "bfloat16" if args.bfloat16 else "float32",
        "device": device_name(args.threads),
        "torch": torch.__version__,
        "variants": {
            v: {
                "seconds": times[v],
                "ratio": statistics.median(ratios[v]),
                "seconds_alone": alone.get(v),
                "memory_mib": memory[v],
            }
            for v in variants
        },
    }
    rows = [
        [
            v,
            statistics.median(times[v]),
            statistics.median(ratios[v]),
            min(ratios[v]),
            max(ratios[v]),
            alone.get(v),
            alone[v] / statistics.median(references[v]) if v in alone else None,
            memory[v],
        ]
        for v in variants
    ]
    headers = ["", "s / iteration", "ratio", "lowest", "highest", "s alone", "of iteration", "memory MiB"]
    print(
        f"{args.pair}, batch {result['batch']}, {result['precision']}, {result['device']}, torch {torch.__version__}, median of {args.rounds} interleaved rounds"
    )
    print(
        tabulate(
            rows, headers=headers, floatfmt=("", ".4f", ".3f", ".3f", ".3f", ".4f", ".3f", ".0f"), tablefmt="github"
        )
    )
    if args.output:
        with open(args.output, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
