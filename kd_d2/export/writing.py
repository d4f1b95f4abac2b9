"""Writers of traced graphs in TorchScript, ONNX and OpenVINO format."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.onnx import register_custom_op_symbolic
from torch.onnx.symbolic_helper import parse_args

from ..files import named_in_errors, temporary_folder
from .graph import CandidateGraph, DetectionGraph
from .metadata import ExportMetadata
from .running import METADATA_FILE, OPENVINO_INFO, needed_package

OPSET = 19
"""The first opset with deformable convolutions; ONNX Runtime and OpenVINO support it."""
TRACER = logging.getLogger("torch.fx._symbolic_trace")
PACKAGES = {"torchscript": (), "onnx": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings of the tracer, and the printing of the whole graph if an operator is unknown."""
    was_enabled, level = torch._C._jit_is_onnx_log_enabled(), TRACER.level
    torch._C._jit_set_onnx_log_enabled(False)
    TRACER.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch._C._jit_set_onnx_log_enabled(was_enabled)
        TRACER.setLevel(level)


def write_torchscript(
    graph: DetectionGraph | CandidateGraph, image: Tensor, path: str, metadata: ExportMetadata
) -> None:
    with _quiet():
        traced = torch.jit.freeze(torch.jit.trace(graph, (image,), check_trace=False))
        with open(path, "wb") as file:  # torch's own writer of files ends the process if the disk is full
            torch.jit.save(traced, file, _extra_files={METADATA_FILE: json.dumps(metadata.to_strings())})


def write_onnx(graph: DetectionGraph | CandidateGraph, image: Tensor, path: str, metadata: ExportMetadata) -> None:
    _convert_to_onnx(graph, image, path, metadata)
    if isinstance(graph, CandidateGraph) and metadata.fixed_size is not None:
        _fold_constants(path)
    add_onnx_metadata(path, metadata)


def _convert_to_onnx(
    graph: DetectionGraph | CandidateGraph, image: Tensor, path: str, metadata: ExportMetadata
) -> None:
    """Export by tracing, since PyTorch's newer exporter does not support sizes that depend on the image content."""
    axes = {name: {0: "anchors" if isinstance(graph, CandidateGraph) else "detections"} for name in graph.outputs}
    if metadata.fixed_size is None:
        axes["image"] = {1: "height", 2: "width"}
    elif isinstance(graph, CandidateGraph):
        axes = {}
    register_custom_op_symbolic("torchvision::deform_conv2d", _deform_conv, OPSET)
    with _quiet():
        torch.onnx.export(
            graph,
            (image,),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(graph.outputs),
            dynamic_axes=axes,
        )


def _fold_constants(path: str) -> None:
    """Replace what does not depend on the image, such as shapes, with constants; compilers of accelerators need it."""
    onnx, runtime = needed_package("onnx"), needed_package("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    folded = f"{path}.folded"
    options.optimized_model_filepath = folded
    runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    os.replace(folded, path)
    model = onnx.load(path)
    domains = {node.domain for node in model.graph.node}
    unused = [entry for entry in model.opset_import if entry.domain not in domains]  # those of ONNX Runtime
    for entry in unused:
        model.opset_import.remove(entry)
    onnx.save(model, path)


def add_onnx_metadata(path: str, metadata: ExportMetadata) -> None:
    """Add the metadata to an existing file."""
    onnx = needed_package("onnx")
    model = onnx.load(path)
    onnx.helper.set_model_props(model, metadata.to_strings())
    onnx.save(model, path)


def write_openvino(graph: DetectionGraph | CandidateGraph, image: Tensor, path: str, metadata: ExportMetadata) -> None:
    """Convert from ONNX, and write PATH.xml and PATH.bin, with weights in float32."""
    openvino = needed_package("openvino")
    with temporary_folder() as folder:
        source = os.path.join(folder, "model.onnx")
        with named_in_errors(source):
            _convert_to_onnx(graph, image, source, metadata)
        model = openvino.Core().read_model(source)
        for key, value in metadata.to_strings().items():
            model.set_rt_info(value, [OPENVINO_INFO, key])
        openvino.save_model(model, path, compress_to_fp16=False)


WRITERS = {"torchscript": write_torchscript, "onnx": write_onnx, "openvino": write_openvino}


@parse_args("v", "v", "v", "v", "v", "i", "i", "i", "i", "i", "i", "i", "i", "b")
def _deform_conv(
    g, image, weight, offset, mask, bias, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, offset_groups, use_mask
):  # fmt: skip
    """Convert torchvision's deformable convolution to that of ONNX."""
    return g.op(
        "DeformConv",
        *(image, weight, offset, bias, *([mask] if use_mask else [])),
        strides_i=[stride_h, stride_w],
        pads_i=[pad_h, pad_w, pad_h, pad_w],
        dilations_i=[dilation_h, dilation_w],
        group_i=groups,
        offset_group_i=offset_groups,
    )
