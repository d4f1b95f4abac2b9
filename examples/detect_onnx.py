"""Detection with an exported ONNX model, without kd_d2, Detectron2 or PyTorch: pip install numpy onnxruntime pillow

python detect_onnx.py MODEL.onnx IMAGE [SCORE]          prints detections with at least this score (default 0.5)
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
metadata = session.get_modelmeta().custom_metadata_map
if metadata["nms"] != "true" or metadata["fixed_size"] != "null":
    sys.exit(f"{sys.argv[1]} was exported with --no-nms or --size, which this example does not support.")
names, shorter, longest = (json.loads(metadata[key]) for key in ("class_names", "min_size", "max_size"))

try:
    image = ImageOps.exif_transpose(Image.open(sys.argv[2]))
except (OSError, SyntaxError, ValueError) as error:
    sys.exit(f"{sys.argv[2]} cannot be read: {error}")
if image.mode[0] in "IF":
    sys.exit(f"{sys.argv[2]} has more than 8 bits per value, which this example does not support.")
image = image.convert("RGB")
sides = image.size
if shorter:  # in two steps, with the rounding of Detectron2
    sides = [shorter if side == min(sides) else shorter / min(sides) * side for side in sides]
    sides = [side * min(1, longest / max(sides)) for side in sides]
resized = np.asarray(image.resize([max(1, int(side + 0.5)) for side in sides], Image.Resampling.BILINEAR))
channels = resized.transpose(2, 0, 1)[:: -1 if metadata["input_format"] == "BGR" else 1]
boxes, scores, classes = session.run(["boxes", "scores", "classes"], {"image": np.ascontiguousarray(channels)})
boxes *= np.tile([image.width / resized.shape[1], image.height / resized.shape[0]], 2).astype(np.float32)

lowest = float(sys.argv[3]) if len(sys.argv) > 3 else 0.5
if not (scores >= lowest).any():
    print(f"No detection has a score of at least {lowest}.", file=sys.stderr)
for box, score, label in zip(boxes, scores, classes):
    if score >= lowest:
        print(f"{names[label]} {score:.3f}", *(f"{side:.1f}" for side in box))
