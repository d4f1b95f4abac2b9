#!/usr/bin/env python
"""Whether an installation works: imports, operators, a forward and backward pass, and a checkpoint that comes back.

    cluster/check_install.py [--operators]

--operators: Detectron2's compiled operators must be there, with CUDA. Needs no GPU; where there is one, the pass runs on it too.
"""

import argparse
import os
import sys
import tempfile

from kd_d2 import load_config
from kd_d2.checkpoint import KDCheckpointer
from kd_d2.evaluation.corruptions import corrupt
from kd_d2.versions import versions

import numpy as np
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def check_operators() -> None:
    from detectron2 import _C

    if not _C.has_cuda():
        raise SystemExit("Detectron2's operators were built without CUDA.")


def check_training(device: str) -> None:
    """A step of a small detector, its checkpoint, and its detections."""
    cfg = load_config(
        os.path.join(ROOT, "configs", "tiny", "retinanet-student.yaml"), ["MODEL.DEVICE", device, "MODEL.WEIGHTS", ""]
    )
    model = build_model(cfg)
    objects = Instances(
        (64, 96), gt_boxes=Boxes(torch.tensor([[10.0, 10.0, 50.0, 40.0]])), gt_classes=torch.tensor([0])
    )
    entry = {"image": torch.zeros(3, 64, 96, dtype=torch.uint8), "instances": objects, "height": 64, "width": 96}
    with EventStorage():
        sum(model([entry]).values()).backward()
    with tempfile.TemporaryDirectory() as folder:
        KDCheckpointer(model, folder).save("model")
        KDCheckpointer(model, folder).load(os.path.join(folder, "model.pth"))
    if "instances" not in model.eval()([entry])[0]:
        raise SystemExit("The detector gave no detections.")


def main(operators: bool) -> None:
    if operators:
        check_operators()
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        check_training(device)
    corrupt(np.zeros((40, 40, 3), np.uint8), "fog", 1, 0)
    print("kd_d2 works: " + ", ".join(f"{name} {version}" for name, version in versions().items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", action="store_true", help="ask for Detectron2's compiled operators")
    sys.exit(main(parser.parse_args().operators))
