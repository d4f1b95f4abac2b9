"""Import of a torchvision detector as a Detectron2 config and checkpoint."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

from ..checkpoint import StateDict
from ..errors import UserError
from ..imported import Imported, Weights, check_empty, detectron2_config, write_detector
from .detectors import Choice, Keys, import_fcos, import_rcnn, import_retinanet
from .reading import CENTERNESS, COCO, NO_CLASS, read_detector, read_labels

logger = logging.getLogger(__name__)

PROGRAM = "torchvision"
EPSILON = 1e-5
"""What Detectron2's batch normalization adds to variances."""
BATCH_COUNTER = "backbone.body.bn1.num_batches_tracked"
"""Buffer of BatchNorm2d that FrozenBatchNorm2d does not have."""
COCO_OUTPUTS = 91


def import_detector(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    classes: str | None = None,
    epsilon: float | None = None,
    *,
    opts: Iterable[Any] = (),
) -> Imported:
    """Write a torchvision detector as a Detectron2 config and checkpoint.

    Args:
        source: a checkpoint with the weights of a detector, or the name of a torchvision detector whose own weights are downloaded.
        folder: output folder, new or empty.
        classes: a text file with the class names, one per line from label 1, or "coco"; None for those of torchvision's own
            weights, otherwise unknown.
        epsilon: of the batch normalization layers of the backbone; None for that of torchvision's own weights, otherwise 1e-5.
        opts: overrides of the Detectron2 config, alternating keys and values.

    Raises:
        UserError: a file cannot be read, the folder is not empty, or the detector has a part that Detectron2 lacks.
    """
    source, folder = os.fspath(source), os.fspath(folder)
    check_empty(folder)
    if epsilon is not None and not 0 <= epsilon < math.inf:
        raise UserError(f"--batch-norm-eps is {epsilon}; it must be at least 0 and finite.")
    detector = read_detector(source)
    labels = detector.labels if classes is None else read_labels(classes)
    kind, import_keys = _kind(detector.weights.keys(), source)
    weights = Weights(detector.weights, PROGRAM)
    keep = functools.partial(_kept, labels=labels, has_background=import_keys is import_rcnn)
    keys = import_keys(weights, keep)
    weights.check_all_moved()
    epsilon = next((e for e in (epsilon, detector.epsilon) if e is not None), None)
    if epsilon is None:
        epsilon = EPSILON
        # torchvision leaves the epsilon of FCOS unchanged.
        if BATCH_COUNTER not in detector.weights and import_keys is not import_fcos:
            logger.warning(
                f"The normalization layers of {source} are FrozenBatchNorm2d, whose epsilon the file does not show; {EPSILON:g} is used. If the "
                "detector was fine-tuned from torchvision's weights COCO_V1, it is 0: --batch-norm-eps 0."
            )
    _adapt_to_epsilon(weights.moved, epsilon)
    names = tuple(name for name in labels if name != NO_CLASS) if labels else None
    imported = Imported(kind, folder, detectron2_config(keys, opts, PROGRAM), names)
    write_detector(imported, weights.moved, PROGRAM)
    return imported


def _kind(names: Iterable[str], source: str) -> tuple[str, Callable[[Weights, Choice], Keys]]:
    """Return the detector that has these weights, and the function that imports it."""
    names = {*names}
    if "roi_heads.box_predictor.cls_score.weight" in names:
        parts = {part for name in names for part in name.split(".")}
        kinds = {"keypoint_predictor": "Keypoint R-CNN", "mask_predictor": "Mask R-CNN"}
        return next((kind for part, kind in kinds.items() if part in parts), "Faster R-CNN"), import_rcnn
    if CENTERNESS in names:
        return "FCOS", import_fcos
    if "head.classification_head.cls_logits.weight" in names:
        return "RetinaNet", import_retinanet
    raise UserError(
        f"{source} is not the checkpoint of a Faster, Mask or Keypoint R-CNN, RetinaNet or FCOS of torchvision; its first weight is "
        f"{min(names, default='missing')}."
    )


def _adapt_to_epsilon(weights: StateDict, epsilon: float) -> None:
    """Scale the weights of the backbone's normalization layers, so that Detectron2's epsilon gives the same outputs.

    Variances are not changed: torchvision's ResNets have some of 1e-12 and less, which a sum with 1e-5 would round away.
    """
    for name, variance in weights.items():
        if name.startswith("backbone.bottom_up.") and name.endswith(".running_var"):
            weight = name.removesuffix("running_var") + "weight"
            if (variance + epsilon <= 0).any():
                raise UserError(
                    f"The epsilon of the batch normalization layers cannot be {epsilon:g}: {name} of the imported detector has zeros."
                )
            factor = ((variance.double() + EPSILON) / (variance.double() + epsilon)).sqrt()
            weights[weight] = (weights[weight] * factor).to(weights[weight].dtype)


def _kept(outputs: int, labels: tuple[str, ...] | None, *, has_background: bool) -> list[int]:
    """Return the outputs of the classes; output 0 is that of the background, or of a label that torchvision's datasets lack."""
    if labels is None:
        if outputs == 1:
            raise UserError(
                "The detector has only output 0, which is for no class; if a RetinaNet or FCOS was trained with labels from 0, name its class with --classes."
            )
        if outputs == COCO_OUTPUTS:
            logger.warning(
                f"The detector has {outputs} outputs, like torchvision's detectors for COCO; if it is one, --classes {COCO} selects and names its 80 classes."
            )
        return [*range(1, outputs)]
    if len(labels) == outputs and not has_background:  # labels from 0
        return [*range(outputs)]
    if len(labels) != outputs - 1:
        raise UserError(
            f"There are {len(labels)} class names, but the detector has {outputs} outputs, of which the first one is for no class."
        )
    return [label for label, name in enumerate(labels, 1) if name != NO_CLASS]
