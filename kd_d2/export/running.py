"""Inference with exported files in TorchScript, ONNX Runtime or OpenVINO, called like a Detectron2 model."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances

from ..errors import UserError
from ..model_paths import format_of
from ..predictor import SCORE_THRESH, Category, ImageDetector
from .decoding import decode
from .metadata import ExportMetadata

METADATA_FILE = "kd_d2.json"
"""The metadata file in a TorchScript archive."""
OPENVINO_INFO = "kd_d2"
"""The key of the metadata in OpenVINO's rt_info."""

Session = Callable[[np.ndarray], list[np.ndarray]]
"""Image uint8 [3, H, W] -> outputs of the file."""


def needed_package(name: str) -> ModuleType:
    """Import a package of the extra `export`, with ONNX Runtime's telemetry disabled by default.

    Raises:
        UserError: the package is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"The package {name} is required but not installed: pip install 'kd_d2[export]'.") from error


def _open_torchscript(path: str) -> tuple[Session, dict[str, str]]:
    extra = {METADATA_FILE: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        module = torch.jit.load(path, map_location="cpu", _extra_files=extra)

    def run(image: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [output.numpy() for output in module(torch.from_numpy(image))]

    return run, json.loads(extra[METADATA_FILE] or "{}")


def _open_onnx(path: str) -> tuple[Session, dict[str, str]]:
    runtime = needed_package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image}), session.get_modelmeta().custom_metadata_map


def _open_openvino(path: str) -> tuple[Session, dict[str, str]]:
    openvino = needed_package("openvino")
    model = openvino.Core().read_model(path)
    entries = model.get_rt_info(OPENVINO_INFO).value if model.has_rt_info(OPENVINO_INFO) else {}
    return openvino_session(model), dict(entries)


def openvino_session(model: Any, precision: str = "f32") -> Session:
    """Create a session for an OpenVINO model, or the path of an ONNX file, on the CPU.

    Args:
        precision: of layers that are not quantized; OpenVINO's default is "bf16" if the CPU supports it.
    """
    openvino = needed_package("openvino")
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(model, "CPU", options)

    def run(image: np.ndarray) -> list[np.ndarray]:
        results = compiled(image)
        return [np.array(results[output]) for output in compiled.outputs]

    return run


OPENERS = {"torchscript": _open_torchscript, "onnx": _open_onnx, "openvino": _open_openvino}


class ExportedModel:
    """Exported model, called like a Detectron2 model in eval mode: "image", "height" and "width" -> "instances".

    Attributes:
        metadata: metadata of the file.
    """

    def __init__(self, session: Session, metadata: ExportMetadata):
        self.session = session
        self.metadata = metadata

    def __call__(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """
        Args:
            batched_inputs: "image" [3, H, W], 0 to 255, resized by `metadata.resize_transform`; "height" and "width" of
                the original image for detections in its pixels.
        """
        return [{"instances": self._detect(entry)} for entry in batched_inputs]

    def _detect(self, entry: dict[str, Any]) -> Instances:
        image = entry["image"]
        size = tuple(image.shape[1:])
        outputs = map(
            torch.from_numpy, self.session(self.metadata.padded(image.round().clamp(0, 255).to(torch.uint8).numpy()))
        )
        boxes, scores, classes, *masks = outputs if self.metadata.nms else decode(*outputs, self.metadata)
        found = Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
        if masks:
            found.pred_masks = masks[0][:, None]
        return detector_postprocess(found, entry.get("height", size[0]), entry.get("width", size[1]))


def load_exported(path: str) -> ExportedModel:
    """Load a file of `kd-d2 export`.

    Raises:
        UserError: the file is missing, cannot be read, or was written by another program; or a package is missing.
    """
    if not os.path.isfile(path):
        raise UserError(f"There is no exported model {path}.")
    try:
        session, entries = OPENERS[format_of(path)](path)
    except UserError:
        raise
    except Exception as error:  # each runtime has its own types
        raise UserError(f"{path} cannot be read as {format_of(path)}: {reason(error)}.") from error
    return ExportedModel(session, ExportMetadata.from_strings(entries, path))


def load_exported_detector(path: str, score_thresh: float | None = None) -> ImageDetector:
    """Load a file of `kd-d2 export` as a detector of images.

    Args:
        score_thresh: minimum score of a detection; None for 0.5, or the score threshold of the file if it is higher.

    Raises:
        UserError: see `load_exported`; or `score_thresh` is below the score threshold of the file.
    """
    model = load_exported(path)
    metadata = model.metadata
    if score_thresh is None:
        score_thresh = max(SCORE_THRESH, metadata.score_threshold)
    if score_thresh < metadata.score_threshold:
        raise UserError(
            f"--score-thresh is {score_thresh}, but {path} returns no detections below {metadata.score_threshold}; "
            "use that value, or export with a lower --score-thresh."
        )
    categories = [Category(*entry) for entry in zip(metadata.category_ids, metadata.class_names, strict=True)]
    return ImageDetector(model, metadata.input_format, metadata.resize_transform, categories, score_thresh)


def reason(error: Exception) -> str:
    """Return the message of a runtime's error on one line, without the source locations that OpenVINO adds."""
    lines = [line.strip("- \t.") for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check '", "FrontEnd API"))]
    unknown = [line for line in told if line.startswith("No conversion rule")]
    return next(iter([*unknown, *told]), type(error).__name__)
