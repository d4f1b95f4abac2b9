#!/usr/bin/env python
"""Measure AP and CPU latency of detectors in PyTorch, TorchScript, ONNX Runtime and OpenVINO, in float and int8.

    benchmarks/deploy.py --model [TITLE=]CONFIG_OR_RUN [WEIGHTS] [--model ...] [--images N] [--rounds N] [--threads N]
        [--calibration-images N] [--output FILE.json] [KEY VALUE ...]

Latency is the median time of the model only, from the resized image to the detections, with all variants alternating on
the same images. AP is measured on N images, evenly spaced over DATASETS.TEST.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial

from kd_d2 import load_config
from kd_d2.arguments import add_model_argument
from kd_d2.cli.overrides import split_overrides
from kd_d2.engine import KDTrainer
from kd_d2.errors import exit_on_user_error
from kd_d2.export import ExportedModel, ExportOptions, export_detector, load_exported
from kd_d2.export.evaluating import evaluate
from kd_d2.export.images import dataset_files, prepared
from kd_d2.export.running import openvino_session
from kd_d2.model_paths import read_model_paths
from kd_d2.predictor import Predictor
from measuring import device_name, seconds

import torch
from detectron2.config import CfgNode
from tabulate import tabulate
from torch import Tensor

TIMED_IMAGES = 16


def variants(cfg: CfgNode, folder: str, calibration_images: int) -> Iterator[tuple[str, Callable]]:
    """Yield titles and models with Detectron2's call interface; their files are written to `folder`."""
    yield "PyTorch", Predictor(cfg, score_thresh=1.0).model
    script, plain, int8 = (os.path.join(folder, name) for name in ("float.ts", "float.onnx", "int8.onnx"))
    export_detector(cfg, script)
    export_detector(cfg, plain)
    export_detector(cfg, int8, ExportOptions(int8=True, calibration_images=calibration_images))
    yield "TorchScript", load_exported(script)
    for title, path in (("", plain), (", int8", int8)):
        exported = load_exported(path)
        yield f"ONNX Runtime{title}", exported
        yield f"OpenVINO{title}", ExportedModel(openvino_session(path), exported.metadata)
        if not title:
            yield "OpenVINO, bfloat16", ExportedModel(openvino_session(path, "bf16"), exported.metadata)


def subset(cfg: CfgNode, count: int, folder: str) -> None:
    """Reduce DATASETS.TEST to `count` of its images."""
    [name] = cfg.DATASETS.TEST
    [(_, annotations, images)] = [entry for entry in cfg.DATASETS.COCO_JSON if entry[0] == name]
    with open(annotations) as file:
        tree = json.load(file)
    chosen = {os.path.basename(path) for path in dataset_files(cfg, "TEST", count)}
    tree["images"] = [image for image in tree["images"] if os.path.basename(image["file_name"]) in chosen]
    ids = {image["id"] for image in tree["images"]}
    tree["annotations"] = [annotation for annotation in tree["annotations"] if annotation["image_id"] in ids]
    path = os.path.join(folder, "subset.json")
    with open(path, "w") as file:
        json.dump(tree, file)
    cfg.DATASETS.COCO_JSON = [*cfg.DATASETS.COCO_JSON, [f"{name}_subset", path, images]]
    cfg.DATASETS.TEST = (f"{name}_subset",)
    dataset_files(cfg, "TEST", 1)  # registers it


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
        rows, models, inputs = [], {}, {}
        for number, path in enumerate(read_model_paths(args.model)):
            cfg = load_config(path.config, [*opts, *path.overrides, "MODEL.DEVICE", "cpu"], student_only=True)
            place = os.path.join(folder, str(number))
            os.makedirs(place)
            subset(cfg, args.images, folder)
            cfg.OUTPUT_DIR = place
            for title, model in variants(cfg, place, args.calibration_images):
                results = evaluate(cfg, model) if isinstance(model, ExportedModel) else KDTrainer.test(cfg, model)
                rows.append(
                    {
                        "model": path.title,
                        "runtime": title,
                        "AP": results["bbox"]["AP"],
                        "AP50": results["bbox"]["AP50"],
                    }
                )
                models[path.title, title] = model
            metadata = models[path.title, "ONNX Runtime"].metadata
            files = dataset_files(cfg, "TEST", TIMED_IMAGES)
            inputs[path.title] = [prepared(file, metadata) for file in files]
        times = latencies(models, inputs, args.rounds)
    for row in rows:
        row["ms"] = 1000 * statistics.median(times[row["model"], row["runtime"]])
        row["ratio"] = row["ms"] / (1000 * statistics.median(times[rows[0]["model"], "PyTorch"]))
    print(f"{device_name(args.threads)}, torch {torch.__version__}, {args.images} images, {args.rounds} rounds")
    print(tabulate(rows, headers="keys", floatfmt=("", "", ".1f", ".1f", ".1f", ".2f"), tablefmt="github"))
    if args.output:
        with open(args.output, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
