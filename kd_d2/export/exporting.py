"""Export of a trained detector to a file, with a check of its detections."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass, replace

from detectron2.config import CfgNode
from torch import Tensor, nn

from ..adapters import build_adapter
from ..checkpoint import load_complete
from ..config import thawed
from ..engine.checks import check_plain, check_supported
from ..errors import UserError, as_user_error, check_at_least, check_score_threshold
from ..files import check_output_folder, named_in_errors, temporary_folder
from ..model_paths import EXPORT_SUFFIXES, format_of
from ..modeling.building import build_detector
from ..predictor import read_categories
from .checking import Comparison, compare, require_equal
from .graph import CandidateGraph, DetectionGraph, check_detector
from .images import dataset_images, prepared, synthetic
from .metadata import ExportMetadata
from .quantizing import quantize_onnx
from .running import load_exported, needed_package, reason
from .writing import PACKAGES, WRITERS, add_onnx_metadata

logger = logging.getLogger(__name__)

CHECKED_IMAGES = 8
CALIBRATION_IMAGES = 128


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        fixed_size: (height, width) of the only supported input; None for any size.
        nms: whether the outputs of the file are detections, or the inputs of `decoding.decode`.
        score_thresh: minimum score of a detection; None for that of the config.
        int8: whether to quantize the convolutions of an ONNX file.
        calibration_images: number of images of DATASETS.TRAIN that determine the int8 ranges.
    """

    fixed_size: tuple[int, int] | None = None
    nms: bool = True
    score_thresh: float | None = None
    int8: bool = False
    calibration_images: int = CALIBRATION_IMAGES


def export_detector(
    cfg: CfgNode, path: str, options: ExportOptions | None = None, images: list[str] | None = None
) -> Comparison:
    """Export a detector to a file that runs without Detectron2, and check that its detections are those of PyTorch.

    Args:
        cfg: config of a plain detector; MODEL.WEIGHTS is its checkpoint.
        path: the file; its suffix determines the format, see `kd_d2.model_paths.EXPORT_SUFFIXES`. A link is kept, and
            its target replaced.
        images: image files for the check; None for some of DATASETS.TEST, or synthetic ones if no dataset is available.

    Returns:
        The differences between the detections of the file and PyTorch.

    Raises:
        UserError: an option, the config, the checkpoint, or the combination of detector and format is not supported, or
            the check fails; no file is written.
    """
    options = options or ExportOptions()
    export_format = _check(path, options)
    check_plain(cfg)
    check_supported(cfg)
    cfg = thawed(cfg)
    cfg.MODEL.DEVICE = "cpu"
    _check_limits(cfg, options)
    model = build_detector(cfg).eval()
    load_complete(model, cfg.MODEL.WEIGHTS, "the detector")
    check_detector(model)
    if options.score_thresh is not None:
        for module in model.modules():
            if hasattr(module, "test_score_thresh"):
                module.test_score_thresh = options.score_thresh
    graph = DetectionGraph(model) if options.nms else CandidateGraph(model)
    metadata = describe(cfg, model, options)
    inputs = _inputs(cfg, metadata, images)
    calibration = _calibration(cfg, metadata, options.calibration_images) if options.int8 else []

    folder = os.path.dirname(os.path.realpath(path))
    check_output_folder(folder, "--output")
    with temporary_folder(dir=folder, prefix=".export-") as drafts:
        draft = os.path.join(drafts, os.path.basename(path))
        try:
            with named_in_errors(f"--output {path}", draft):
                WRITERS[export_format](graph, inputs[0], draft, metadata)
            exported = load_exported(draft)
            comparison = compare(model, exported, inputs, metadata.score_threshold, cfg.TEST.DETECTIONS_PER_IMAGE)
        except UserError:
            raise
        except Exception as error:  # from the tracer, the exporter or the runtime
            sentence = f"{metadata.detector} cannot be exported to {export_format}: {reason(error)}."
            if os.path.exists(draft) and options.fixed_size is None:
                sentence += " A file for images of one size may be possible: --size HEIGHT WIDTH."
            raise as_user_error(error) or UserError(sentence) from error
        require_equal(comparison, path)
        if comparison.detections:
            logger.info(f"{metadata.detector} as {export_format} and in PyTorch: {comparison}")
        else:
            logger.warning(
                f"{metadata.detector} as {export_format} and in PyTorch: nothing was compared, since no score in the {comparison.images} "
                f"images is above {metadata.score_threshold}; export with a lower --score-thresh, or with other --images."
            )
        if calibration:
            _quantize(draft, calibration, metadata)
            compare(model, load_exported(draft), inputs, metadata.score_threshold, None)
        names = sorted(os.listdir(drafts))  # OpenVINO's weights before the .xml
        size = sum(os.path.getsize(os.path.join(drafts, name)) for name in names)
        for name in names:
            shutil.move(os.path.join(drafts, name), os.path.realpath(os.path.join(os.path.dirname(path), name)))
    logger.info(f"{path}: {size / 1e6:.1f} MB")
    return comparison


def _check(path: str, options: ExportOptions) -> str:
    """Return the format given by the file name; check that the options fit it and that its packages are installed."""
    export_format = format_of(path)
    if export_format is None:
        raise UserError(f"--output {path}: the name must end with {', '.join(EXPORT_SUFFIXES)}, which sets the format.")
    if export_format == "openvino" and not path.endswith(".xml"):
        raise UserError(f"--output {path}: the suffix of an OpenVINO file must be .xml in lower case.")
    if os.path.isdir(path):
        raise UserError(f"--output {path} is a folder; name a file.")
    weights = f"{os.path.splitext(path)[0]}.bin"
    if export_format == "openvino":
        if os.path.isdir(weights):
            raise UserError(f"--output {path}: {weights}, the file of its weights, is a folder; choose another name.")
        if os.path.splitext(os.path.realpath(path))[0] != os.path.splitext(os.path.realpath(weights))[0]:
            raise UserError(
                f"--output {path} is a link, but {weights} is not a link to the file beside its target; name the target."
            )
    if options.int8 and export_format != "onnx":
        raise UserError(f"--int8 needs an ONNX file, which OpenVINO runs as well; --output {path} is {export_format}.")
    check_score_threshold(options.score_thresh)
    if options.fixed_size is not None and min(options.fixed_size) < 1:
        raise UserError(f"--size is {options.fixed_size}; height and width must be at least 1.")
    check_at_least("--calibration-images", options.calibration_images, 1)
    for package in PACKAGES[export_format]:
        needed_package(package)
    return export_format


def _check_limits(cfg: CfgNode, options: ExportOptions) -> None:
    """Raise a UserError if the config limits candidates or detections to none, for which OpenVINO ends the process."""
    if not options.nms:
        return
    detector = cfg.MODEL.META_ARCHITECTURE.upper()
    node = detector if detector in cfg.MODEL else "RPN"
    of_candidates = ("TOPK_CANDIDATES_TEST", "PRE_NMS_TOPK_TEST", "POST_NMS_TOPK_TEST")
    limits = {f"MODEL.{node}.{key}": cfg.MODEL[node][key] for key in of_candidates if key in cfg.MODEL[node]}
    for key, limit in {**limits, "TEST.DETECTIONS_PER_IMAGE": abs(cfg.TEST.DETECTIONS_PER_IMAGE)}.items():
        if limit < 1:
            raise UserError(f"{key} is {limit}, with which the exported file would have no detections.")


def describe(cfg: CfgNode, model: nn.Module, options: ExportOptions) -> ExportMetadata:
    """Create the metadata.

    Raises:
        UserError: the model has no classes or lacks an attribute with a setting of its inference, or its images do not
            have three channels.
    """
    adapter = build_adapter(model)
    categories = read_categories(cfg, adapter.num_classes)
    if categories is None:
        raise UserError(f"{type(model).__name__} is not a detector that kd-d2 can export: it has no classes.")
    if adapter.score_threshold is None:
        raise UserError(
            f"{type(model).__name__} has no attribute test_score_thresh, the score above which it returns detections, which the exported file "
            "states: add it to the class."
        )
    if cfg.INPUT.FORMAT not in ("RGB", "BGR") or len(cfg.MODEL.PIXEL_MEAN) != 3:
        raise UserError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT}; only RGB and BGR can be exported.")
    decoding = {
        "nms_threshold": "test_nms_thresh",
        "topk_candidates": "test_topk_candidates",
        "max_detections": "max_detections_per_image",
    }
    missing = [attribute for attribute in decoding.values() if not hasattr(model, attribute)]
    if missing and not options.nms:
        raise UserError(
            f"--no-nms: {type(model).__name__} has no attribute {', '.join(missing)}, as RetinaNet has for its NMS: add it to the class, or omit "
            "the option."
        )
    return ExportMetadata(
        detector=type(model).__name__,
        class_names=[category.name for category in categories],
        category_ids=[category.id for category in categories],
        input_format=cfg.INPUT.FORMAT,
        min_size=cfg.INPUT.MIN_SIZE_TEST,
        max_size=cfg.INPUT.MAX_SIZE_TEST,
        fixed_size=list(options.fixed_size) if options.fixed_size else None,
        padding=[min(max(round(mean), 0), 255) for mean in cfg.MODEL.PIXEL_MEAN],
        size_divisibility=adapter.size_divisibility,
        nms=options.nms,
        score_threshold=adapter.score_threshold,
        **({} if options.nms else {key: getattr(model, attribute) for key, attribute in decoding.items()}),
    )


def _inputs(cfg: CfgNode, metadata: ExportMetadata, images: list[str] | None) -> list[Tensor]:
    """Return the images for the check, including one without objects."""
    if images:
        usable = [prepared(file, metadata) for file in images]
    else:
        usable = dataset_images(cfg, "TEST", CHECKED_IMAGES, metadata)
    if not usable:
        logger.warning(
            "Checked on synthetic images, since no image of DATASETS.TEST can be read; use --images for others."
        )
        return synthetic(metadata)
    return [*usable, synthetic(metadata)[-1]]


def _calibration(cfg: CfgNode, metadata: ExportMetadata, count: int) -> list[Tensor]:
    images = dataset_images(cfg, "TRAIN", count, metadata)
    if not images:
        raise UserError("--int8 needs images of DATASETS.TRAIN to measure activation ranges; none are available.")
    return images


def _quantize(path: str, images: list[Tensor], metadata: ExportMetadata) -> None:
    """Replace an ONNX file with its quantized version."""
    source = f"{path}.float"
    os.replace(path, source)
    quantize_onnx(source, path, images)
    os.remove(source)
    add_onnx_metadata(path, replace(metadata, int8=True))
    load_exported(path)([{"image": images[0]}])
    logger.info(f"Quantized with {len(images)} images of DATASETS.TRAIN; kd-d2 eval measures the AP of the file.")
