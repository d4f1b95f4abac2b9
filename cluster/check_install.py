#!/usr/bin/env python
"""Check an installation: imports, operators, a forward and backward pass, and saving and loading of a checkpoint.

    cluster/check_install.py [--operators]

--operators: also require Detectron2's compiled operators with CUDA, and a C compiler for Triton's launchers. No GPU is
needed; if there is one, the forward and backward passes run on it too.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile

from kd_d2 import load_config
from kd_d2.analysis.robustness import corrupt
from kd_d2.checkpoint import KDCheckpointer
from kd_d2.losses import ssim_loss
from kd_d2.versions import versions

import numpy as np
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage


def check_operators() -> None:
    from detectron2 import _C

    if not _C.has_cuda():
        raise SystemExit("Detectron2's operators were built without CUDA.")


def check_compiler() -> None:
    """Check that there is a C compiler that finds Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "cc"
    command = [compiler, "-I", sysconfig.get_path("include"), "-fsyntax-only", "-x", "c", "-"]
    try:
        subprocess.run(command, input="#include <Python.h>\n", text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"Triton would not start on a GPU: {error}") from error


def check_ssim(device: str) -> None:
    """Check forward and backward of the SSIM loss, which has custom kernels, on two equal constant maps."""
    student = torch.ones(1, 2, 40, 60, device=device, requires_grad=True)
    loss = ssim_loss(student, torch.ones_like(student))
    loss.backward()
    if not (loss.abs() < 1e-3 and student.grad.isfinite().all()):
        raise SystemExit(f"The SSIM loss of two equal maps is {loss.item()} on {device}.")


def check_training(device: str) -> None:
    """Check a training step, a checkpoint and the detections of a small detector."""
    cfg = load_config("tiny/retinanet-student", ["MODEL.DEVICE", device, "MODEL.WEIGHTS", ""])
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
        raise SystemExit("The detector returned no detections.")


def main(operators: bool) -> None:
    if operators:
        check_operators()
        check_compiler()
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        check_ssim(device)
        check_training(device)
    if importlib.util.find_spec("imagecorruptions"):  # optional
        corrupt(np.zeros((40, 40, 3), np.uint8), "fog", 1, 0)
    print("kd_d2 works: " + ", ".join(f"{name} {version}" for name, version in versions().items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", action="store_true", help="require Detectron2's compiled operators")
    sys.exit(main(parser.parse_args().operators))
