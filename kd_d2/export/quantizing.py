"""Post-training int8 quantization of the convolutions in an ONNX file."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from torch import Tensor

from .running import needed_package


def quantize_onnx(source: str, target: str, images: list[Tensor]) -> None:
    """Write `source` with int8 convolutions: weights per channel, activations in the ranges observed on `images`.

    Operations after the head remain in float. The format is QDQ, which ONNX Runtime and OpenVINO support.

    Args:
        images: calibration images uint8 [3, H, W], in the input format of the file.
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
    # With inferred shapes, ONNX Runtime fuses reshapes in a way that fails if a level has no candidates.
    del model.graph.value_info[:]
    onnx.save(model, target)


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
