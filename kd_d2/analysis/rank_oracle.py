"""`kd-d2 analyze rank-oracle`: AP of a student whose candidates are ranked or scored like the teacher's.

Shape suffixes: B images, A anchors per position, K classes, H W map, R anchors of an image on all levels, P positives.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from detectron2.config import CfgNode
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

from ..adapters import DensePredictions, DetectorOutputs
from ..adapters.dense import strides_of_head
from ..errors import check_at_least
from ..evaluation import check_coco_metrics
from ..evaluation.coco_evaluator import CocoEvaluator
from ..files import check_output_folder, temporary_folder
from ..losses import reordered
from ..meta_arch import KDMetaArch
from ..report.page import Table, as_text
from .base import Analysis
from .examples import read_examples
from .models import Distillation, load_distillations

NEEDS = frozenset({"dense", "targets"})
STUDENT, RANKS, SCORES = "student", "the teacher's ranks", "the teacher's scores"
COLUMNS = ("AP", "AP50", "AP75")


@dataclass
class RankOracleAnalysis(Analysis):
    """AP of a student if its class scores ranked the candidates of each object like the teacher's.

    Evaluates the student on the first test images with objects: unchanged; with only the class scores of each object's
    positive anchors permuted into the teacher's order; and with these scores replaced by the teacher's. The model is a
    distillation and a checkpoint of a matching student. Both detectors must be dense and have the same anchors. The
    output folder contains rank_oracle.json.
    """

    name = "rank-oracle"
    title = "Rank oracle"
    file = "rank_oracle.json"
    model_count = (1, 1)
    read_models = staticmethod(load_distillations)

    variants: dict[str, dict[str, float | None]]
    """By variant and metric."""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--images", type=int, default=400, help="number of test images with objects (default 400)")

    @classmethod
    def run(cls, models: Sequence[Distillation], output: str, *, images: int = 400) -> Self:
        check_at_least("--images", images, 1)
        (distillation,) = models
        model = distillation.build_dense_pair("kd-d2 analyze rank-oracle")
        check_output_folder(output, "--output")
        results = rank_oracle(distillation.cfg, model, read_examples(distillation.cfg, images))
        return cls({name: {column: result[column] for column in COLUMNS} for name, result in results.items()})

    def sentences(self) -> list[str]:
        return [
            "AP of the student unchanged, with the class scores of each object's positive anchors in the teacher's "
            "order, and with the teacher's scores instead."
        ]

    def tables(self) -> list[Table]:
        rows = [[name, *(as_text(of.get(column), ".2f") for column in COLUMNS)] for name, of in self.variants.items()]
        return [Table(["", *COLUMNS], rows)]


@torch.no_grad()
def rank_oracle(cfg: CfgNode, model: KDMetaArch, examples: Iterable[dict]) -> dict[str, dict[str, float]]:
    """Compute the box AP of the student on images with ground truth: unchanged, and with exchanged scores of positives.

    Args:
        cfg: has the dataset of the examples as the first of DATASETS.TEST.
        model: in eval mode; both detectors have dense predictions at the same anchors.
        examples: mapped entries of that dataset with "instances".

    Returns:
        COCO results for boxes by variant: `STUDENT`, `RANKS` and `SCORES`; see `exchanged_logits`.

    Raises:
        UserError: the dataset is not evaluated with COCO metrics.
    """
    dataset = cfg.DATASETS.TEST[0]
    check_coco_metrics(dataset, "kd-d2 analyze rank-oracle")
    with temporary_folder() as folder:  # for the files that evaluators write
        evaluators = {
            name: CocoEvaluator(dataset, folder, cfg.TEST.KEYPOINT_OKS_SIGMAS) for name in (STUDENT, RANKS, SCORES)
        }
        for evaluator in evaluators.values():
            evaluator.reset()
        image_ids = []
        for example in examples:
            targets = [example["instances"].to(model.device)]
            with EventStorage():
                student = model.adapter.run([example], NEEDS, targets)
            teacher = model.teacher([example], NEEDS)
            for name, logits in exchanged_logits(student.dense, teacher.dense, targets).items():
                (found,) = detect_with(model.student, student, logits)
                found = detector_postprocess(found, example["height"], example["width"])
                evaluators[name].process([example], [{"instances": found}])
            image_ids.append(example["image_id"])
        return {name: evaluator.evaluate(img_ids=image_ids)["bbox"] for name, evaluator in evaluators.items()}


def exchanged_logits(
    student: DensePredictions, teacher: DensePredictions, targets: list[Instances]
) -> dict[str, Tensor]:
    """Return class logits (B, R, K) by variant: the student's, also with the logits of each instance's class at its
    positives in the teacher's order or replaced by the teacher's."""
    positives = student.positives
    class_P, _ = positives.ground_truth(targets)
    ours_P, theirs_P = (positives.pick(dense.logits.values(), class_P) for dense in (student, teacher))
    own = torch.cat(list(student.logits.values()), 1)
    variants = {
        STUDENT: ours_P,
        RANKS: reordered(ours_P, theirs_P, positives.among_all(targets)),
        SCORES: theirs_P,
    }
    where = positives.image, positives.anchor, class_P
    return {name: own.index_put(where, values) for name, values in variants.items()}


def detect_with(model: DenseDetector, outputs: DetectorOutputs, logits_BRK: Tensor) -> list[Instances]:
    """Return the final detections of each image, with class logits in place of the head's."""
    strides = strides_of_head(model)
    features = [outputs.features[stride] for stride in strides]
    _, *others = model.head(features)
    sizes = [level.shape[1] for level in outputs.dense.logits.values()]
    levels = dict(zip(outputs.dense.logits, logits_BRK.split(sizes, 1), strict=True))
    maps = [
        levels[stride].unflatten(1, (*outputs.features[stride].shape[-2:], -1)).flatten(3).permute(0, 3, 1, 2)
        for stride in strides
    ]
    return model.forward_inference(outputs.images, features, [maps, *others])
