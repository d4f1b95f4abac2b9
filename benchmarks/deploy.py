#!/usr/bin/env python
"""Measure AP and CPU latency of detectors in PyTorch, TorchScript, ONNX Runtime and OpenVINO, in float and int8.

    benchmarks/deploy.py --model [TITLE=]CONFIG_OR_RUN [WEIGHTS] [--model ...] [--images N] [--rounds N] [--threads N]
        [--calibration-images N] [--output FILE.json] [KEY VALUE ...]

Latency is the median time of the model only, from the resized image to the detections, with all variants alternating on
the same images. AP is measured on N images, evenly spaced over the dataset in DATASETS.TEST. A runtime that refuses a
detector has no values; the reason follows the table.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial

from kd_d2 import load_config
from kd_d2.analysis.models import TrainedModel, restrict_images
from kd_d2.arguments import add_model_argument
from kd_d2.class_names import names_in_checkpoint, names_in_training_set
from kd_d2.cli.overrides import split_overrides
from kd_d2.config import thawed
from kd_d2.data import register_coco_json, register_synthetic
from kd_d2.engine import KDTrainer
from kd_d2.engine.checks import check_datasets
from kd_d2.errors import UserError, exit_on_user_error
from kd_d2.export import ExportedModel, ExportOptions, export_detector, load_exported
from kd_d2.export.evaluating import evaluate
from kd_d2.export.exporting import describe
from kd_d2.export.images import dataset_files, prepared
from kd_d2.export.running import openvino_session, reason
from kd_d2.model_paths import read_model_paths
from kd_d2.predictor import Predictor
from measuring import device_name, seconds

import torch
from detectron2.config import CfgNode
from tabulate import tabulate
from torch import Tensor

TIMED_IMAGES = 16


def variants(cfg: CfgNode, folder: str, calibration_images: int) -> dict[str, Callable[[], Callable]]:
    """Return functions that create models with Detectron2's call interface, by title; their files are in `folder`."""
    script, plain, int8 = (os.path.join(folder, name) for name in ("float.ts", "float.onnx", "int8.onnx"))
    quantized = ExportOptions(int8=True, calibration_images=calibration_images)

    def exported(path: str, options: ExportOptions | None = None) -> ExportedModel:
        if not os.path.isfile(path):
            export_detector(cfg, path, options)
        return load_exported(path)

    def in_openvino(model: ExportedModel, path: str, precision: str = "f32") -> ExportedModel:
        try:
            return ExportedModel(openvino_session(path, precision), model.metadata)
        except RuntimeError as error:
            raise UserError(f"OpenVINO cannot run the ONNX file: {reason(error)}.") from error

    return {
        "PyTorch": lambda: Predictor(cfg, score_thresh=1.0).model,
        "TorchScript": lambda: exported(script),
        "ONNX Runtime": lambda: exported(plain),
        "OpenVINO": lambda: in_openvino(exported(plain), plain),
        "OpenVINO, bfloat16": lambda: in_openvino(exported(plain), plain, "bf16"),
        "ONNX Runtime, int8": lambda: exported(int8, quantized),
        "OpenVINO, int8": lambda: in_openvino(exported(int8, quantized), int8),
    }


def subset(cfg: CfgNode, count: int, folder: str) -> None:
    """Register the dataset of DATASETS.TEST and reduce it to `count` of its images.

    Raises:
        UserError: there is not exactly one dataset, or it is not in COCO format.
    """
    if len(cfg.DATASETS.TEST) != 1:
        raise UserError(f"DATASETS.TEST has {len(cfg.DATASETS.TEST)} datasets; AP is measured on one: name one.")
    register_synthetic()
    classes = names_in_checkpoint(cfg.MODEL.WEIGHTS) or names_in_training_set(cfg)
    test = thawed(cfg)
    test.DATASETS.TRAIN = ()  # its classes may be others
    register_coco_json(test, classes)
    check_datasets(test, train=False)
    [restricted] = restrict_images([TrainedModel("", test)], count, folder)
    cfg.DATASETS.TEST = restricted.cfg.DATASETS.TEST
    # As entries, they would be registered again without masks and with their own class order.
    cfg.DATASETS.COCO_JSON = [entry for entry in cfg.DATASETS.COCO_JSON if entry[0] not in cfg.DATASETS.TEST]


def latencies(
    models: dict[tuple[str, str], Callable], inputs: dict[str, list[Tensor]], rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Return the seconds per image of all variants, in turns.

    Args:
        models: by title and runtime.
        inputs: images by title, in the input format of the model.
    """
    times: dict[tuple[str, str], list[float]] = {key: [] for key in models}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for images in zip(*inputs.values(), strict=True):
                image_of = dict(zip(inputs, images, strict=True))
                for key, model in models.items():
                    taken = seconds(partial(model, [{"image": image_of[key[0]]}]))
                    if turn:  # the first turn is a warm-up
                        times[key].append(taken)
    return times


def main() -> None:
    options, opts = split_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_argument(parser, "one or more")
    parser.add_argument("--images", type=int, default=500, help="images to measure AP on (default 500)")
    parser.add_argument("--calibration-images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output")
    args = parser.parse_args(options)
    torch.set_num_threads(args.threads)

    with exit_on_user_error(), tempfile.TemporaryDirectory() as folder:
        rows, models, inputs, refused = [], {}, {}, {}
        for number, path in enumerate(read_model_paths(args.model)):
            cfg = load_config(path.config, [*opts, *path.overrides, "MODEL.DEVICE", "cpu"], student_only=True)
            place = os.path.join(folder, str(number))
            os.makedirs(place)
            subset(cfg, args.images, folder)
            cfg.OUTPUT_DIR = place
            for title, create in variants(cfg, place, args.calibration_images).items():
                row = {"model": path.title, "runtime": title, "AP": None, "AP50": None}
                rows.append(row)
                try:
                    model = create()
                except UserError as error:
                    if title == "PyTorch":
                        raise
                    refused[path.title, title] = error
                    continue
                results = evaluate(cfg, model) if isinstance(model, ExportedModel) else KDTrainer.test(cfg, model)
                row.update({key: results["bbox"][key] for key in ("AP", "AP50")})
                models[path.title, title] = model
            metadata = describe(cfg, models[path.title, "PyTorch"], ExportOptions())
            files = dataset_files(cfg, "TEST", TIMED_IMAGES)
            inputs[path.title] = [prepared(file, metadata) for file in files]
        times = latencies(models, inputs, args.rounds)
    median = {key: statistics.median(taken) for key, taken in times.items()}
    for row in rows:
        key = row["model"], row["runtime"]
        row["ms"] = 1000 * median[key] if key in median else None
        row["ratio"] = median[key] / median[rows[0]["model"], "PyTorch"] if key in median else None
    print(f"{device_name(args.threads)}, torch {torch.__version__}, {args.images} images, {args.rounds} rounds")
    print(
        tabulate(rows, headers="keys", floatfmt=("", "", ".1f", ".1f", ".1f", ".2f"), tablefmt="github", missingval="–")
    )
    for (model, runtime), error in refused.items():
        print(f"{model}, {runtime}: {error}")
    if args.output:
        with open(args.output, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
