#!/usr/bin/env python
"""How a student differs from its teacher: final detections with their anchors, ranks of candidates, predictions, features.

    tools/ranks.py --config-file CONFIG --weights CHECKPOINT --output DIR [--images 8 | --input IMAGE ...]
                   [--instances 3] [--score-thresh 0.3] [KEY VALUE ...]

CONFIG is a distillation's, CHECKPOINT any of a student of its kind, distilled or plain; both detectors are dense ones with the same
anchors.
A picture an image: detections of student and teacher, each with the anchor that it came from (dashed, a dot in its middle);
for each of the largest instances the positives' centres in colours of the score that student and teacher give
them, the best with a ring; and where class probabilities and features of the two differ, all levels and each alone. Where their
channels differ, features can only be compared through PFI's adaptation layers: CONFIG and CHECKPOINT must have them.
Images are the first of the test set; files of one's own have no ground truth and so no positives.
"""

import argparse
import os

from kd_d2 import KDMetaArch, UserError, load_config
from kd_d2.adapters import DetectorOutputs
from kd_d2.checkpoint import distiller_states
from kd_d2.config import find_file
from kd_d2.data import register_coco_json, register_synthetic
from kd_d2.distillers.adaptation import AdaptationLayers
from kd_d2.engine.analysed import load_dense_pair
from kd_d2.engine.checks import check_datasets, check_output_folder
from kd_d2.errors import exit_on_user_error
from kd_d2.evaluation.drawing import PALETTE, draw_instances, overlay_heat, per_pixel, sheet, titled
from kd_d2.evaluation.examples import pixels, read_examples, read_files
from kd_d2.losses import prediction_difference

import cv2
import matplotlib
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

SIDE = 240  # px of a picture's shorter side
DENSE = frozenset({"features", "dense"})


def comparable_layers(model: KDMetaArch, weights: str) -> AdaptationLayers | None:
    """What brings the student's features to the teacher's channels: PFI's layers of the checkpoint, or none where they agree.

    None, with a sentence, where features cannot be compared.
    """
    trained = distiller_states(weights)["PFI"]
    if trained and "PFI" in model.distillers:
        try:
            model.distillers["PFI"].load_state_dict(trained)
        except RuntimeError as error:
            raise UserError(f"The layers of PFI in {weights} are not those of the config: {error}") from error
        return model.distillers["PFI"].adaptation
    student, teacher = model.adapter.spec.shapes, model.teacher.spec.shapes
    channels = {s: (student[s].channels, teacher[s].channels) for s in sorted(student.keys() & teacher.keys())}
    if all(ours == theirs for ours, theirs in channels.values()):
        return AdaptationLayers(channels, kernel_size=0)
    print(
        f"Features are not drawn: their channels differ, and the config or {weights} has no layers of PFI between them."
    )
    return None


@torch.no_grad()
def detect(model: DenseDetector, outputs: DetectorOutputs, score_thresh: float) -> tuple[Instances, Boxes]:
    """The final detections of one image, and the anchor that each came from."""
    features = list(outputs.features.values())
    (found,) = model.forward_inference(outputs.images, features, model.head(features))
    found = found[found.scores >= score_thresh]
    dense = outputs.dense
    boxes, anchors = torch.cat([*dense.boxes.values()], 1)[0], Boxes.cat([*dense.anchors.values()]).tensor
    scores = torch.cat([*dense.ranking_scores.values()], 1)[0][:, found.pred_classes].T
    # A detection is its anchor's box and score, to the last bits: the nearest is the one.
    distance = (found.pred_boxes.tensor[:, None] - boxes).abs().sum(-1) + 1e4 * (found.scores[:, None] - scores).abs()
    found.anchor = distance.argmin(1)
    height, width = outputs.images.image_sizes[0]
    found = detector_postprocess(found, height, width)
    return found.to("cpu"), Boxes(anchors[found.anchor].cpu())


def draw_detections(image: np.ndarray, found: Instances, anchors: Boxes, names: list[str]) -> np.ndarray:
    """Detections over their anchors, these dashed in the same colours."""
    canvas, scale = enlarged(image)
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


def enlarged(image: np.ndarray) -> tuple[np.ndarray, float]:
    """A copy whose shorter side has SIDE pixels, and how much larger it is."""
    scale = SIDE / min(image.shape[:2])
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC), scale


def _dashed(canvas: np.ndarray, start: np.ndarray, end: np.ndarray, color: tuple, dash: float = 6.0) -> None:
    length = float(np.linalg.norm(end - start))
    for at in np.arange(0, length, 2 * dash):
        a, b = (start + (end - start) * min(t, length) / length for t in (at, at + dash))
        cv2.line(
            canvas, tuple(a.round().astype(int).tolist()), tuple(b.round().astype(int).tolist()), color, 1, cv2.LINE_AA
        )


def draw_ranks(image: np.ndarray, box: Tensor, centers: Tensor, scores: Tensor) -> np.ndarray:
    """The positives' centres (P, 2) of an instance in colours of their scores (P,), 0 violet to the largest yellow."""
    canvas, scale = enlarged(image)
    canvas = (0.55 * canvas).astype(np.uint8)
    x1, y1, x2, y2 = (box * scale).round().int().tolist()
    cv2.rectangle(canvas, (x1, y1), (x2, y2), (255, 255, 255), 1, cv2.LINE_AA)
    colors = matplotlib.colormaps["plasma"](scores.numpy() / max(float(scores.max()), 1e-12))[:, :3] * 255
    for i in scores.argsort().tolist():  # the best on top
        x, y = (centers[i] * scale).round().int().tolist()
        cv2.circle(canvas, (x, y), 4, colors[i].round().tolist(), -1, cv2.LINE_AA)
    best = (centers[scores.argmax()] * scale).round().int().tolist()
    cv2.circle(canvas, best, 8, (255, 255, 255), 2, cv2.LINE_AA)
    return canvas


def rank_rows(
    image: np.ndarray,
    student: DetectorOutputs,
    teacher: DetectorOutputs,
    target: Instances,
    names: list[str],
    most: int,
) -> list[list[np.ndarray]]:
    """A row an instance with positives, the largest first."""
    positives = student.dense.positives
    class_P, _ = positives.ground_truth([target])
    centers = Boxes.cat([*student.dense.anchors.values()])[positives.anchor].get_centers().cpu()
    scores = [positives.pick(o.dense.ranking_scores.values(), class_P).cpu() for o in (student, teacher)]
    rows = []
    for n in target.gt_boxes.area().argsort(descending=True).tolist():
        mine = (positives.instance == n).cpu()
        if not mine.any() or len(rows) == most:
            continue
        row = [
            titled(draw_instances(image, target[[n]].to("cpu"), names, min_side=SIDE), f"{int(mine.sum())} positives")
        ]
        for whose, score in zip(("student", "teacher"), scores, strict=True):
            drawn = draw_ranks(image, target.gt_boxes.tensor[n].cpu(), centers[mine], score[mine])
            row.append(titled(drawn, f"{whose}: {score[mine].min():.2f} to {score[mine].max():.2f}"))
        rows.append(row)
    return rows


def difference_rows(
    image: np.ndarray, layers: AdaptationLayers | None, student: DetectorOutputs, teacher: DetectorOutputs
) -> list[list[np.ndarray]]:
    """Where the class probabilities (P of PFI) and the features (D) of the two differ."""
    strides = sorted(student.dense.logits)
    predictions = {s: prediction_difference(student.probability_map(s), teacher.probability_map(s)) for s in strides}
    rows = [_heat_row(image, "predictions", predictions)]
    if layers is not None:
        pairs = zip(layers.strides, layers.pairs(student, teacher), strict=True)
        rows.append(_heat_row(image, "features", {s: (a - b).square().mean(1) for s, (a, b) in pairs}))
    return rows


def _heat_row(image: np.ndarray, what: str, levels: dict[int, Tensor]) -> list[np.ndarray]:
    canvas, _ = enlarged(image)
    spread = {s: per_pixel(level[0].cpu().numpy(), s, image.shape[:2]) for s, level in levels.items()}
    pictures = [titled(overlay_heat(canvas, sum(spread.values())), f"{what}, all levels")]
    return pictures + [
        titled(overlay_heat(canvas, heat), f"stride {s}: {levels[s].mean():.2g}") for s, heat in spread.items()
    ]


@torch.no_grad()
def draw(
    model: KDMetaArch,
    layers: AdaptationLayers | None,
    example: dict,
    cfg: CfgNode,
    names: list[str],
    args: argparse.Namespace,
) -> np.ndarray:
    """The sheet of an image."""
    image = pixels(example, cfg)
    targets = [example["instances"].to(model.device)] if "instances" in example else None
    with EventStorage():  # detectors count their positives
        student = model.adapter.run([example], DENSE, targets)
    teacher = model.teacher([example], DENSE)
    first = []
    if targets:
        first.append(titled(draw_instances(image, targets[0].to("cpu"), names, min_side=SIDE), "ground truth"))
    for whose, detector, outputs in (("student", model.student, student), ("teacher", model.teacher.model, teacher)):
        found, anchors = detect(detector, outputs, args.score_thresh)
        first.append(titled(draw_detections(image, found, anchors, names), whose))
    rows = [first]
    if targets:
        rows += rank_rows(image, student, teacher, targets[0], names, args.instances)
    return sheet(rows + difference_rows(image, layers, student, teacher))


def main(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file, args.opts)
    weights = find_file(args.weights, "--weights")
    register_synthetic()
    register_coco_json(cfg)
    check_datasets(cfg, train=False)
    model = load_dense_pair(cfg, weights, "tools/ranks.py")
    layers = comparable_layers(model, weights)
    check_output_folder(args.output, "--output")
    names = MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes
    examples = read_files(cfg, args.input) if args.input else read_examples(cfg, args.images)
    for example in examples:
        path = os.path.join(args.output, os.path.splitext(os.path.basename(example["file_name"]))[0] + ".png")
        cv2.imwrite(path, draw(model, layers, example, cfg, names, args)[:, :, ::-1])
        print(path, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="config of the distillation")
    parser.add_argument("--weights", required=True, help="a checkpoint of the student")
    parser.add_argument("--output", required=True, help="folder of the pictures")
    parser.add_argument(
        "--images", type=int, default=8, help="of the test set, with instances, from the first on (default 8)"
    )
    parser.add_argument("--input", nargs="+", help="image files instead")
    parser.add_argument("--instances", type=int, default=3, help="rows of ranks (default 3)")
    parser.add_argument("--score-thresh", type=float, default=0.3, help="lowest score of a detection (default 0.3)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides: KEY VALUE ...")
    with exit_on_user_error():
        main(parser.parse_args())
