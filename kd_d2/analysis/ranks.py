"""`kd-d2 analyze ranks`: how student and teacher rank the candidates of each object, and where their outputs differ."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import cv2
import matplotlib
import numpy as np
import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

from ..adapters import DetectorOutputs
from ..adapters.dense import strides_of_head
from ..distillers.adaptation import AdaptationLayers
from ..errors import UserError, check_at_least, check_score_threshold
from ..files import check_output_folder
from ..losses import prediction_difference
from ..meta_arch import KDMetaArch
from ..modeling.building import lower_score_threshold
from .base import Analysis
from .drawing import PALETTE, draw_instances, enlarged, overlay_heat, per_pixel, sheet, titled, write_picture
from .examples import picture_names, pixels, read_examples, read_files
from .models import Distillation, load_distillations

SIDE = 240  # shorter side of a picture, in pixels
NEEDS = frozenset({"features", "dense"})


@dataclass
class RankAnalysis(Analysis):
    """How student and teacher rank the candidates of each object, and where their predictions and features differ.

    The model is a distillation and a checkpoint of a matching student, distilled or plain. Both detectors must be dense
    and have the same anchors. The output folder contains one picture per image: the detections of student and teacher,
    each with its anchor (dashed, with a dot at the center); for each of the largest instances, the centers of the
    positives, colored by the scores of student and teacher, with a ring around the best; and the differences in class
    probabilities and features, over all levels and by level. If the channels differ, features can only be compared with
    PFI's adaptation layers in config and checkpoint. Images of --input have no ground truth, hence no positives.
    """

    name = "ranks"
    title = "Ranks"
    file = "ranks.json"
    model_count = (1, 1)
    read_models = staticmethod(load_distillations)

    images: list[str]
    """File names of the pictures."""
    features_compared: bool
    """Whether the pictures also show differences of features."""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--images", type=int, default=8, help="number of test images, the first with instances (default 8)"
        )
        parser.add_argument("--input", nargs="+", metavar="IMAGE", help="image files to use instead of test images")
        parser.add_argument("--instances", type=int, default=3, help="number of instances to show ranks of (default 3)")
        parser.add_argument("--score-thresh", type=float, default=0.3, help="minimum detection score (default 0.3)")

    @classmethod
    def run(
        cls,
        models: Sequence[Distillation],
        output: str,
        *,
        images: int = 8,
        input: Sequence[str] | None = None,
        instances: int = 3,
        score_thresh: float = 0.3,
    ) -> Self:
        check_at_least("--images", images, 1)
        check_at_least("--instances", instances, 1)
        check_score_threshold(score_thresh)
        (distillation,) = models
        pair = Pair(distillation)
        for detector in (pair.model.student, pair.model.teacher.model):
            lower_score_threshold(detector, score_thresh)
        check_output_folder(output, "--output")
        cfg = distillation.cfg
        examples = read_files(cfg, input) if input else read_examples(cfg, images)
        names = picture_names(examples, output)
        cls.clear(output)
        for example, name in zip(examples, names, strict=True):
            write_picture(os.path.join(output, name), pair.draw(example, instances, score_thresh))
        analysis = cls(names, pair.layers is not None)
        analysis.picture_files = names
        return analysis

    def sentences(self) -> list[str]:
        if self.features_compared:
            return []
        return [
            "Features are not drawn: their channels differ, and config or checkpoint have no PFI layers to adapt them."
        ]


class Pair:
    """Draws the predictions of student and teacher of a distillation.

    Attributes:
        layers: map the student's features to the teacher's channels; see `comparable_layers`.

    Raises:
        UserError: the detectors have no dense predictions at the same anchors.
    """

    def __init__(self, distillation: Distillation):
        self.cfg = distillation.cfg
        self.names = distillation.class_names
        self.model = distillation.build_dense_pair("kd-d2 analyze ranks")
        self.layers = comparable_layers(self.model, distillation)

    @torch.no_grad()
    def draw(self, example: dict, instances: int, score_thresh: float) -> np.ndarray:
        """Draw the picture of an image: detections, ranks of the largest instances, differences."""
        image = pixels(example, self.cfg)
        targets = [example["instances"].to(self.model.device)] if "instances" in example else None
        with EventStorage():  # detectors log their numbers of positives
            student = self.model.adapter.run([example], NEEDS, targets)
        teacher = self.model.teacher([example], NEEDS)
        first = []
        if targets:
            truth = draw_instances(image, targets[0].to("cpu"), self.names, min_side=SIDE)
            first.append(titled(truth, "ground truth"))
        detectors = (("student", self.model.student, student), ("teacher", self.model.teacher.model, teacher))
        for whose, detector, outputs in detectors:
            found, anchors = detect_with_anchors(detector, outputs, score_thresh)
            first.append(titled(draw_detections(image, found, anchors, self.names), whose))
        rows = [first]
        if targets:
            rows += rank_rows(image, student, teacher, targets[0], self.names, instances)
        return sheet(rows + difference_rows(image, differences(self.layers, student, teacher)))


def comparable_layers(model: KDMetaArch, distillation: Distillation) -> AdaptationLayers | None:
    """Return layers that map the student's features to the teacher's channels: PFI's, trained ones from the checkpoint,
    the identity if the channels are equal, or None if features cannot be compared."""
    trained = distillation.distiller_states()["PFI"]
    if "PFI" in model.distillers and (trained or model.distillers["PFI"].adaptation.selections):
        try:
            model.distillers["PFI"].load_state_dict(trained)
        except RuntimeError as error:
            raise UserError(f"The PFI layers in {distillation.weights} do not match the config: {error}") from error
        return model.distillers["PFI"].adaptation
    student, teacher = model.adapter.spec.shapes, model.teacher.spec.shapes
    channels = {s: (student[s].channels, teacher[s].channels) for s in sorted(student.keys() & teacher.keys())}
    return AdaptationLayers(channels, kernel_size=0) if all(s == t for s, t in channels.values()) else None


@torch.no_grad()
def detect_with_anchors(model: DenseDetector, outputs: DetectorOutputs, score_thresh: float) -> tuple[Instances, Boxes]:
    """Return the final detections of one image and the anchor of each."""
    features = [outputs.features[stride] for stride in strides_of_head(model)]
    (found,) = model.forward_inference(outputs.images, features, model.head(features))
    found = found[found.scores >= score_thresh]
    dense = outputs.dense
    boxes, anchors = torch.cat([*dense.boxes.values()], 1)[0], Boxes.cat([*dense.anchors.values()]).tensor
    scores = torch.cat([*dense.ranking_scores.values()], 1)[0][:, found.pred_classes].T
    # A detection has the box and score of its anchor up to rounding, so the nearest one is its anchor.
    distance = (found.pred_boxes.tensor[:, None] - boxes).abs().sum(-1) + 1e4 * (found.scores[:, None] - scores).abs()
    found.anchor = distance.argmin(1)
    height, width = outputs.images.image_sizes[0]
    found = detector_postprocess(found, height, width)
    return found.to("cpu"), Boxes(anchors[found.anchor].cpu())


def draw_detections(image: np.ndarray, found: Instances, anchors: Boxes, names: list[str]) -> np.ndarray:
    """Draw detections over their anchors, which are dashed in the same colors."""
    canvas, scale = enlarged(image, SIDE), SIDE / min(image.shape[:2])
    for box, label in zip((anchors.tensor.numpy() * scale).round(), found.pred_classes.tolist(), strict=True):
        color = PALETTE[label % len(PALETTE)]
        x1, y1, x2, y2 = box.tolist()
        for start, end in (((x1, y1), (x2, y1)), ((x2, y1), (x2, y2)), ((x2, y2), (x1, y2)), ((x1, y2), (x1, y1))):
            _dashed(canvas, np.array(start), np.array(end), color)
        center = (round((x1 + x2) / 2), round((y1 + y2) / 2))
        cv2.circle(canvas, center, 4, (255, 255, 255), -1, cv2.LINE_AA)
        cv2.circle(canvas, center, 3, color, -1, cv2.LINE_AA)
    shown = Instances(canvas.shape[:2], pred_boxes=found.pred_boxes.clone(), scores=found.scores)
    shown.pred_classes = found.pred_classes
    shown.pred_boxes.scale(scale, scale)
    return draw_instances(canvas, shown, names, min_side=SIDE)


def _dashed(canvas: np.ndarray, start: np.ndarray, end: np.ndarray, color: tuple, dash: float = 6.0) -> None:
    length = float(np.linalg.norm(end - start))
    for at in np.arange(0, length, 2 * dash):
        a, b = (start + (end - start) * min(t, length) / length for t in (at, at + dash))
        cv2.line(
            canvas, tuple(a.round().astype(int).tolist()), tuple(b.round().astype(int).tolist()), color, 1, cv2.LINE_AA
        )


def draw_ranks(image: np.ndarray, box: Tensor, centers: Tensor, scores: Tensor) -> np.ndarray:
    """Draw the centers (P, 2) of an instance's positives, colored by their scores (P,) from violet (0) to yellow."""
    scale = SIDE / min(image.shape[:2])
    canvas = (0.55 * enlarged(image, SIDE)).astype(np.uint8)
    x1, y1, x2, y2 = (box * scale).round().int().tolist()
    cv2.rectangle(canvas, (x1, y1), (x2, y2), (255, 255, 255), 1, cv2.LINE_AA)
    colors = matplotlib.colormaps["plasma"](scores.numpy() / max(float(scores.max()), 1e-12))[:, :3] * 255
    for i in scores.argsort().tolist():  # the best on top
        x, y = (centers[i] * scale).round().int().tolist()
        cv2.circle(canvas, (x, y), 4, colors[i].round().tolist(), -1, cv2.LINE_AA)
    best = (centers[scores.argmax()] * scale).round().int().tolist()
    cv2.circle(canvas, best, 8, (255, 255, 255), 2, cv2.LINE_AA)
    return canvas


@dataclass
class InstanceRanks:
    """The positives of an instance.

    Attributes:
        instance: index of the instance.
        centers: centers (P, 2) of the positives' anchors.
        scores: scores (P,) by detector, "student" and "teacher".
    """

    instance: int
    centers: Tensor
    scores: dict[str, Tensor]


def instance_ranks(
    student: DetectorOutputs, teacher: DetectorOutputs, target: Instances, count: int
) -> list[InstanceRanks]:
    """Return the positives of the `count` largest instances that have any, the largest first."""
    positives = student.dense.positives
    class_P, _ = positives.ground_truth([target])
    centers = Boxes.cat([*student.dense.anchors.values()])[positives.anchor].get_centers().cpu()
    scores = {
        whose: positives.pick(outputs.dense.ranking_scores.values(), class_P).cpu()
        for whose, outputs in (("student", student), ("teacher", teacher))
    }
    ranks = []
    for n in target.gt_boxes.area().argsort(descending=True).tolist():
        mine = (positives.instance == n).cpu()
        if mine.any():
            ranks.append(InstanceRanks(n, centers[mine], {whose: score[mine] for whose, score in scores.items()}))
    return ranks[:count]


def rank_rows(
    image: np.ndarray,
    student: DetectorOutputs,
    teacher: DetectorOutputs,
    target: Instances,
    names: list[str],
    count: int,
) -> list[list[np.ndarray]]:
    """Draw one row per instance: its box, and its positives ranked by student and teacher."""
    rows = []
    for ranks in instance_ranks(student, teacher, target, count):
        boxed = draw_instances(image, target[[ranks.instance]].to("cpu"), names, min_side=SIDE)
        row = [titled(boxed, f"{len(ranks.centers)} positives")]
        for whose, score in ranks.scores.items():
            drawn = draw_ranks(image, target.gt_boxes.tensor[ranks.instance].cpu(), ranks.centers, score)
            row.append(titled(drawn, f"{whose}: {score.min():.2f} to {score.max():.2f}"))
        rows.append(row)
    return rows


def differences(
    layers: AdaptationLayers | None, student: DetectorOutputs, teacher: DetectorOutputs
) -> dict[str, dict[int, Tensor]]:
    """Return mean squared differences (B, H, W) by stride: predictions (P of PFI) and, with layers, features (D)."""
    strides = sorted(student.dense.logits)
    found = {
        "predictions": {
            s: prediction_difference(student.probability_map(s), teacher.probability_map(s)) for s in strides
        }
    }
    if layers is not None:
        pairs = zip(layers.strides, layers.pairs(student, teacher), strict=True)
        found["features"] = {s: (a - b).square().mean(1) for s, (a, b) in pairs}
    return found


def difference_rows(image: np.ndarray, found: dict[str, dict[int, Tensor]]) -> list[list[np.ndarray]]:
    """Draw one row per kind of difference: all levels together, then each level."""
    rows, plain = [], enlarged(image, SIDE)
    for kind, levels in found.items():
        spread = {s: per_pixel(level[0].cpu().numpy(), s, image.shape[:2]) for s, level in levels.items()}
        row = [titled(overlay_heat(plain, sum(spread.values())), f"{kind}, all levels")]
        row += [titled(overlay_heat(plain, heat), f"stride {s}: {levels[s].mean():.2g}") for s, heat in spread.items()]
        rows.append(row)
    return rows
