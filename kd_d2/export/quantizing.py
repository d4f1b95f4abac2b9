"""Post-training quantization to int8: the convolutions of an ONNX file."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from torch import Tensor

from .running import needed_package


def quantize_onnx(source: str, target: str, images: list[Tensor]) -> None:
    """Write `source` with convolutions in int8: weights by channel, activations in the ranges that occur in `images`.

    What follows the head stays float. In the QDQ format, which ONNX Runtime and OpenVINO run.

    Args:
        images: calibration images uint8 [3, H, W], as the file takes them.
    """
    onnx = needed_package("onnx")
    quantization = needed_package("onnxruntime.quantization")
    nodes = onnx.load(source, load_external_data=False).graph.node

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
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_quantize=[node.name for node in nodes if node.op_type == "Conv"],
        )
    model = onnx.load(target)
    # With the inferred shapes ONNX Runtime fuses reshapes in a way that fails where a level has no candidate.
    del model.graph.value_info[:]
    onnx.save(model, target)


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """ONNX Runtime advises a pre-processing that needs all shapes to be known."""
    handlers = logging.root.handlers[:]
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        logging.root.handlers[:] = handlers
