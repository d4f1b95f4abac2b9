"""Post-training int8 quantization of the convolutions in an ONNX file."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .running import needed_package

SELECTIONS = ("Gather", "GatherND", "GatherElements", "Slice", "Reshape", "Expand", "Tile")
"""Operators whose first input has the values; the others are indices or shapes."""
WITHOUT_COORDINATES = ("Shape", "NonZero", "NonMaxSuppression", "TopK", "RoiAlign")
"""Operators that box coordinates are not traced through."""


def quantize_onnx(source: str, target: str, images: list[Tensor]) -> None:
    """Write `source` with int8 convolutions: weights per channel, activations in the ranges observed on `images`.

    The convolutions that predict box coordinates and the operations after the head remain in float. Weights use 7 of the
    8 bits, so that sums of products do not saturate on CPUs without VNNI instructions. The format is QDQ, which ONNX
    Runtime and OpenVINO support.

    Args:
        images: calibration images uint8 [3, H, W], in the input format of the file.
    """
    onnx = needed_package("onnx")
    quantization = needed_package("onnxruntime.quantization")
    graph = onnx.load(source, load_external_data=False).graph
    in_float = box_convolutions(graph)

    class Images(quantization.CalibrationDataReader):
        left = ({"image": image.numpy()} for image in images)

        def get_next(self) -> dict | None:
            return next(self.left, None)

    with _without_log():
        quantization.quantize_static(
            source,
            target,
            Images(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_quantize=[
                node.name for node in graph.node if node.op_type == "Conv" and node.name not in in_float
            ],
        )
    model = onnx.load(target)
    # With inferred shapes, ONNX Runtime fuses reshapes in a way that fails if a level has no candidates.
    del model.graph.value_info[:]
    onnx.save(model, target)


def box_convolutions(graph: Any) -> set[str]:
    """Return the names of the convolutions whose outputs become coordinates in the output `boxes` of an ONNX graph.

    Selections by score are not followed: the convolutions that predict scores are not among them.
    """
    producers = {output: node for node in graph.node for output in node.output}
    convolutions, followed, values = set(), set(), ["boxes"]
    while values:
        value = values.pop()
        node = producers.get(value)
        if node is None or value in followed:
            continue
        followed.add(value)
        if node.op_type == "Conv":
            convolutions.add(node.name)
        elif node.op_type not in WITHOUT_COORDINATES:
            values += node.input[:1] if node.op_type in SELECTIONS else node.input
    return convolutions


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """Suppress ONNX Runtime's advice on a preprocessing step that needs all shapes to be known."""
    handlers = logging.root.handlers[:]
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        logging.root.handlers[:] = handlers
